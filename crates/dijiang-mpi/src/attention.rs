//! Sequence-parallel causal attention.

use std::ops::Range;

use dijiang::Real;
use dijiang::attention::{
    CausalState, KeyMask, LinearAttention, Operator, Qkv, Storage, Workspace,
};
use dijiang::kernel::FeatureMap;
use ndarray::{Array3, ArrayView1, ArrayView3, ArrayViewMut1, ArrayViewMut3, Zip, s};

use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::ranks::{Opening, Place, Ranks, attempt};
use crate::scan::{Carrier, End};

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
            let valid = valid(tokens, qkv.mask());
            Ok(Opening { tokens, valid, position: state.position(), fingerprint })
        }))?;
        let (out, next) = self.attend(attention, state, place, Ok(qkv))?;
        *state = next;
        Ok(out)
    }

    /// From the pieces' tokens to their outputs and the states behind them. A rank that has nothing
    /// to give, because something was wrong before, says so in `qkv`.
    ///
    /// ```text
    /// ranks before the last   keys ── states ── keys and queries ────────
    /// last rank               first tokens ── states ── first queries again ── other tokens
    /// ```
    ///
    /// Nobody waits for the last rank's state. While it would wait for the others' it computes its
    /// first tokens over its own keys alone, and adds what is before them when it knows it.
    pub(crate) fn attend<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        state: &CausalState<T>,
        place: Place,
        qkv: Result<Qkv<'_, T>, String>,
    ) -> Result<(Array3<T>, CausalState<T>)> {
        let own = qkv.and_then(|qkv| {
            attempt(|| {
                let mut workspace = attention.workspace();
                let mut first = None;
                let mut own = match self.rank() {
                    0 => state.clone(),
                    _ => attention.new_state_at(place.start)?,
                };
                let ahead = self.ahead(attention, place);
                if ahead > 0 {
                    own = attention.new_state_past_sinks(place.start)?;
                    let (tokens, workspace) = (Tokens::of(qkv, 0..ahead), &mut workspace);
                    first = Some(attention.prefill_partial(&mut own, tokens.qkv(), workspace)?);
                } else if place.tokens > 0 && !self.is_last() {
                    let [_, k, v] = qkv.arrays();
                    attention.extend(&mut own, (&k, &v), qkv.mask(), &mut workspace)?;
                }
                Ok((qkv, own, first, workspace))
            })
        });
        let (qkv, own, first, mut workspace) = self.agree(own)?;
        let before = self.exclusive(&mut States::of(attention), &own);
        let result = before.and_then(|before| {
            attempt(|| {
                let mut next = before.unwrap_or_else(|| state.clone());
                let (h, e) = (attention.heads(), attention.value_dim());
                let mut out = Array3::zeros((h, place.tokens, e));
                let done = first.as_ref().map_or(0, |first| first.shape()[1]);
                if let Some(first) = first {
                    let tokens = Tokens::of(qkv, 0..done);
                    let mut out = out.slice_mut(s![.., ..done, ..]);
                    let mut earlier = next.clone();
                    add_earlier(
                        attention,
                        &mut earlier,
                        &tokens,
                        &first,
                        &mut out,
                        &mut workspace,
                    )?;
                    attention.merge(&mut next, &own, &mut workspace)?;
                }
                if done < place.tokens {
                    let tokens = Tokens::of(qkv, done..place.tokens);
                    let mut out = out.slice_mut(s![.., done.., ..]);
                    let workspace = &mut workspace;
                    attention.prefill_into(&mut [&mut next], tokens.qkv(), &mut out, workspace)?;
                }
                Ok((out, next))
            })
        });
        self.agree(result)
    }

    /// Tokens that this rank computes before it knows what is before them: on the last rank, as
    /// many as there is time for while the others absorb their keys.
    fn ahead<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        place: Place,
    ) -> usize {
        let sinks_are_before = place.valid_before >= attention.sinks();
        if self.rank() > 0 && self.is_last() && sinks_are_before {
            let time = self.cost().keys * place.longest_before as f64;
            (time as usize).min(place.tokens)
        } else {
            0
        }
    }
}

/// States that are merged.
pub(crate) struct States<'a, T: Real, M> {
    attention: &'a LinearAttention<T, M>,
    workspace: Workspace<T>,
}

impl<'a, T: Real, M: FeatureMap<T>> States<'a, T, M> {
    pub(crate) fn of(attention: &'a LinearAttention<T, M>) -> Self {
        Self { attention, workspace: attention.step_workspace() }
    }
}

impl<T: Real, M: FeatureMap<T>> Carrier for States<'_, T, M> {
    type Item = CausalState<T>;

    const FROM: End = End::First;

    fn write(&self, state: &CausalState<T>) -> Vec<u8> {
        state.to_bytes(Storage::Exact)
    }

    fn read(&self, bytes: &[u8]) -> dijiang::Result<CausalState<T>> {
        self.attention.state_from_bytes(bytes)
    }

    fn join(
        &mut self,
        mut far: CausalState<T>,
        near: &CausalState<T>,
    ) -> dijiang::Result<CausalState<T>> {
        self.attention.merge(&mut far, near, &mut self.workspace)?;
        Ok(far)
    }
}

/// Queries whose first outputs are looked at again together.
const SEGMENT: usize = 4096;

/// Outputs of queries over all keys, from `first`, those over the keys of their own piece, and the
/// state before it, which moves on with them.
fn add_earlier<T: Real, M: FeatureMap<T>>(
    attention: &LinearAttention<T, M>,
    state: &mut CausalState<T>,
    tokens: &Tokens<'_, T>,
    first: &Array3<T>,
    out: &mut ArrayViewMut3<'_, T>,
    workspace: &mut Workspace<T>,
) -> dijiang::Result<()> {
    let n = first.shape()[1];
    let nobody = vec![false; n.min(SEGMENT)];
    for start in (0..n).step_by(SEGMENT) {
        let rows = start..n.min(start + SEGMENT);
        let own = first.slice(s![.., rows.clone(), ..]);
        let tokens = Tokens::of(tokens.qkv(), rows.clone());
        let qkv = tokens.qkv().with_mask(KeyMask::Valid(&nobody[..rows.len()]));
        let earlier = attention.prefill_partial(state, qkv, workspace)?;
        let mut out = out.slice_mut(s![.., rows, ..]);
        Zip::from(out.rows_mut()).and(own.rows()).and(earlier.rows()).for_each(join);
    }
    Ok(())
}

/// An output over two sets of keys, from those over each, with exponents and normalisers.
fn join<T: Real>(mut out: ArrayViewMut1<'_, T>, a: ArrayView1<'_, T>, b: ArrayView1<'_, T>) {
    let e = out.len();
    let [(s_a, z_a), (s_b, z_b)] = [&a, &b].map(|row| (row[e].to_f64(), row[e + 1].to_f64()));
    // The weight of a over that of b. Without a key there is no exponent.
    let ratio = if z_b > 0.0 { z_a / z_b * (s_a - s_b).exp() } else { f64::INFINITY };
    let share = if z_a > 0.0 { 1.0 / (1.0 + 1.0 / ratio) } else { 0.0 };
    let [of_a, of_b] = [share, 1.0 - share].map(T::from_f64);
    Zip::from(&mut out)
        .and(&a.slice_move(s![..e]))
        .and(&b.slice_move(s![..e]))
        .for_each(|out, &a, &b| *out = of_a * a + of_b * b);
}

/// Some tokens of a [`Qkv`].
struct Tokens<'a, T> {
    arrays: [ArrayView3<'a, T>; 3],
    mask: KeyMask<'a>,
}

impl<'a, T: Real> Tokens<'a, T> {
    fn of(qkv: Qkv<'a, T>, tokens: Range<usize>) -> Self {
        let mask = match qkv.mask() {
            KeyMask::Valid(valid) => KeyMask::Valid(&valid[tokens.clone()]),
            all => all,
        };
        let some = |array: ArrayView3<'a, T>| array.slice_move(s![.., tokens.clone(), ..]);
        Self { arrays: qkv.arrays().map(some), mask }
    }

    fn qkv(&self) -> Qkv<'_, T> {
        let [q, k, v] = &self.arrays;
        Qkv::new(q, k, v).with_mask(self.mask)
    }
}

/// How many of `n` tokens may be attended to.
pub(crate) fn valid(n: usize, mask: KeyMask<'_>) -> usize {
    match mask {
        KeyMask::Valid(valid) => valid.iter().filter(|&&valid| valid).count(),
        _ => n,
    }
}

/// Whether all arrays have the shapes they should: what can be told before any work is done.
pub(crate) fn check<T: Real, M: FeatureMap<T>>(
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

pub(crate) fn check_shape<T>(
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
