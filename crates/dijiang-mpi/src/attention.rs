//! Sequence-parallel causal attention.

use dijiang::Real;
use dijiang::attention::{CausalState, LinearAttention, Operator, Qkv};
use dijiang::kernel::FeatureMap;
use ndarray::{Array3, ArrayView3};

use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::ranks::{Opening, Place, Ranks, attempt};

impl Ranks {
    /// The next tokens of one sequence, of which this rank holds a piece: what
    /// [`prefill`](Operator::prefill) gives for all pieces at once, up to rounding. Collective.
    ///
    /// On rank 0 `state` is what the sequence goes on from, an empty one at its beginning; on the
    /// others it is not looked at. On return every rank's `state` is that behind its own piece: the
    /// last rank's goes on with [`step`](Operator::step).
    ///
    /// # Shapes
    /// - `qkv`: one sequence, as for [`forward`](Operator::forward), any number of tokens, none
    ///   too; returns `[h, n, e]`.
    ///
    /// # Cost
    /// The keys of all pieces but the last go through the maps twice. A rank sends ⌈log₂ P⌉ states
    /// at most ([`Scan::Rounds`](crate::Scan::Rounds)), whose size does not depend on the number of
    /// tokens.
    ///
    /// # Errors
    /// The same on all ranks, no state changed:
    /// [`Error::Differ`](crate::Error::Differ) for ranks with other options or maps than rank 0's,
    /// [`Error::Rank`](crate::Error::Rank) if one of them was given what
    /// [`prefill`](Operator::prefill) refuses.
    pub fn prefill<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        state: &mut CausalState<T>,
        qkv: Qkv<'_, T>,
    ) -> Result<Array3<T>> {
        let tokens = qkv.arrays()[0].shape()[1];
        let place = self.open(attempt(|| {
            attention.check_state(state)?;
            check(attention, qkv)?;
            let fingerprint = Fingerprint::new("prefill", self.scan(), attention)?;
            Ok(Opening { tokens, position: state.position(), fingerprint })
        }))?;
        let (out, next) = self.attend(attention, state, place, Ok(qkv))?;
        *state = next;
        Ok(out)
    }

    /// From the pieces' tokens to their outputs and the states behind them. A rank that has nothing
    /// to give, because something was wrong before, says so in `qkv`.
    pub(crate) fn attend<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        state: &CausalState<T>,
        place: Place,
        qkv: Result<Qkv<'_, T>, String>,
    ) -> Result<(Array3<T>, CausalState<T>)> {
        let own = qkv.and_then(|qkv| {
            attempt(|| {
                let mut own = match self.rank() {
                    0 => state.clone(),
                    _ => attention.new_state_at(place.start)?,
                };
                // Nobody waits for the last one.
                if place.tokens > 0 && !self.is_last() {
                    let [_, k, v] = qkv.arrays();
                    let mut workspace = attention.workspace();
                    attention.extend(&mut own, (&k, &v), qkv.mask(), &mut workspace)?;
                }
                Ok((qkv, own))
            })
        });
        let (qkv, own) = self.agree(own)?;
        let before = self.exclusive(attention, own);
        let result = before.and_then(|before| {
            attempt(|| {
                let mut next = before.unwrap_or_else(|| state.clone());
                let out = match place.tokens {
                    0 => Array3::zeros((attention.heads(), 0, attention.value_dim())),
                    _ => attention.prefill(&mut next, qkv)?,
                };
                Ok((out, next))
            })
        });
        self.agree(result)
    }
}

/// Whether all arrays have the shapes they should: what can be told before any work is done.
fn check<T: Real, M: FeatureMap<T>>(
    attention: &LinearAttention<T, M>,
    qkv: Qkv<'_, T>,
) -> dijiang::Result<()> {
    let [q, k, v] = qkv.arrays();
    let (kv_heads, n) = (attention.maps().len(), q.shape()[1]);
    let d = attention.maps().first().map_or(0, FeatureMap::dim);
    check_shape("q", &q, [attention.heads(), n, d])?;
    check_shape("k", &k, [kv_heads, n, d])?;
    check_shape("v", &v, [kv_heads, n, attention.value_dim()])
}

fn check_shape<T>(
    argument: &'static str,
    array: &ArrayView3<'_, T>,
    expected: [usize; 3],
) -> dijiang::Result<()> {
    let pairs = expected.into_iter().zip(array.shape().iter().copied()).enumerate();
    match { pairs }.find(|(_, (expected, got))| expected != got) {
        Some((axis, (expected, got))) => {
            Err(dijiang::Error::Shape { argument, axis, expected, got })
        }
        None => Ok(()),
    }
}
