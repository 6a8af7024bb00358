//! Sequence-parallel causal attention.

use std::ops::Range;

use dijiang::Real;
use dijiang::attention::{
    CausalState, KeyMask, LinearAttention, Operator, Qkv, Storage, Workspace,
};
use dijiang::kernel::FeatureMap;
use ndarray::{Array3, ArrayView3, s};

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
                let mut partial =
                    Partial::new(attention, place.tokens, self.ahead(attention, place));
                let own = if partial.tokens() > 0 {
                    let mut own = attention.new_state_past_sinks(place.start)?;
                    partial.over_own_keys(attention, &mut own, qkv, &mut workspace)?;
                    own
                } else {
                    self.absorb(attention, state, place, qkv, &mut workspace)?
                };
                Ok((qkv, own, partial, workspace))
            })
        });
        let (qkv, own, mut partial, mut workspace) = self.agree(own)?;
        let before = self.exclusive(&mut States::of(attention), &own);
        let result = before.and_then(|before| {
            attempt(|| {
                let mut next = before.unwrap_or_else(|| state.clone());
                let done = partial.tokens();
                if done > 0 {
                    partial.over_earlier_keys(attention, next.clone(), qkv, &mut workspace)?;
                    attention.merge(&mut next, &own, &mut workspace)?;
                }
                if done < place.tokens {
                    let tokens = Tokens::of(qkv, done..place.tokens);
                    let mut out = partial.out.slice_mut(s![.., done.., ..]);
                    let workspace = &mut workspace;
                    attention.prefill_into(&mut [&mut next], tokens.qkv(), &mut out, workspace)?;
                }
                Ok((partial.out, next))
            })
        });
        self.agree(result)
    }

    /// The state behind the keys of this rank's piece alone, on rank 0 with what is before them.
    /// The last rank's is nobody's business, and empty.
    pub(crate) fn absorb<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        state: &CausalState<T>,
        place: Place,
        qkv: Qkv<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> dijiang::Result<CausalState<T>> {
        let mut own = match self.rank() {
            0 => state.clone(),
            _ => attention.new_state_at(place.start)?,
        };
        if place.tokens > 0 && !self.is_last() {
            let [_, k, v] = qkv.arrays();
            attention.extend(&mut own, (&k, &v), qkv.mask(), workspace)?;
        }
        Ok(own)
    }

    /// Tokens that this rank computes before it knows what is before them: on the last rank, as
    /// many as there is time for while the others absorb their keys.
    fn ahead<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        place: Place,
    ) -> usize {
        let sinks_are_before = place.valid_before >= attention.sinks();
        // Which keys are kept depends on those before.
        let keeps = attention.windows().iter().any(|window| window.kept > 0);
        if self.rank() > 0 && self.is_last() && sinks_are_before && !keeps {
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

/// Outputs of a piece, the first of which are over some of the keys only.
pub(crate) struct Partial<T> {
    /// `[h, n, e]`
    pub(crate) out: Array3<T>,
    /// Exponents and normalisers of the first ones, `[h, tokens, 2]`.
    norms: Array3<T>,
}

impl<T: Real> Partial<T> {
    /// Of `n` tokens, `ahead` of them over some keys only.
    pub(crate) fn new<M: FeatureMap<T>>(
        attention: &LinearAttention<T, M>,
        n: usize,
        ahead: usize,
    ) -> Self {
        Self {
            out: Array3::zeros((attention.heads(), n, attention.value_dim())),
            norms: Array3::zeros((attention.heads(), ahead, 2)),
        }
    }

    /// How many are over some keys only.
    fn tokens(&self) -> usize {
        self.norms.shape()[1]
    }

    fn segments(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        let n = self.tokens();
        (0..n).step_by(SEGMENT).map(move |start| start..n.min(start + SEGMENT))
    }

    /// Outputs and norms of some of the first tokens, one head after the other.
    fn rows(&mut self, tokens: Range<usize>) -> impl Iterator<Item = (&mut [T], &mut [T])> {
        let Self { out, norms } = self;
        let (heads, of_heads) = (out.outer_iter_mut(), norms.outer_iter_mut());
        heads.zip(of_heads).flat_map(move |(out, norms)| {
            let [out, norms] = [out, norms].map(|rows| {
                let width = rows.ncols();
                let rows = rows.into_slice().expect("in standard layout");
                rows[tokens.start * width..tokens.end * width].chunks_exact_mut(width)
            });
            out.zip(norms)
        })
    }

    /// Those over the keys of their own piece, from an empty state at its beginning.
    pub(crate) fn over_own_keys<M: FeatureMap<T>>(
        &mut self,
        attention: &LinearAttention<T, M>,
        state: &mut CausalState<T>,
        qkv: Qkv<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> dijiang::Result<()> {
        for rows in self.segments() {
            let tokens = Tokens::of(qkv, rows.clone());
            let found = attention.prefill_partial(state, tokens.qkv(), workspace)?;
            for ((out, norms), found) in self.rows(rows).zip(in_rows(&found)) {
                let (of_out, of_norms) = found.split_at(out.len());
                out.copy_from_slice(of_out);
                norms.copy_from_slice(of_norms);
            }
        }
        Ok(())
    }

    /// From those to the outputs over all keys, with the state before the piece.
    pub(crate) fn over_earlier_keys<M: FeatureMap<T>>(
        &mut self,
        attention: &LinearAttention<T, M>,
        mut state: CausalState<T>,
        qkv: Qkv<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> dijiang::Result<()> {
        let nobody = vec![false; SEGMENT];
        for rows in self.segments() {
            let tokens = Tokens::of(qkv, rows.clone());
            let qkv = tokens.qkv().with_mask(KeyMask::Valid(&nobody[..rows.len()]));
            let earlier = attention.prefill_partial(&mut state, qkv, workspace)?;
            for ((out, norms), earlier) in self.rows(rows).zip(in_rows(&earlier)) {
                join(out, norms, earlier);
            }
        }
        Ok(())
    }
}

/// What an operator found, row by row.
fn in_rows<T>(found: &Array3<T>) -> impl Iterator<Item = &[T]> {
    found.as_slice().expect("in standard layout").chunks_exact(found.shape()[2])
}

/// An output over two sets of keys: from that over the first, with its exponent and normaliser, and
/// that over the second, with its own behind it.
fn join<T: Real>(out: &mut [T], norms: &[T], other: &[T]) {
    let (other, of_other) = other.split_at(out.len());
    let [s_a, z_a, s_b, z_b] = [norms[0], norms[1], of_other[0], of_other[1]].map(Real::to_f64);
    // The weight of the first over that of the second. Without a key there is no exponent.
    let ratio = if z_b > 0.0 { z_a / z_b * (s_a - s_b).exp() } else { f64::INFINITY };
    let share = if z_a > 0.0 { 1.0 / (1.0 + 1.0 / ratio) } else { 0.0 };
    let [of_out, of_other] = [share, 1.0 - share].map(T::from_f64);
    out.iter_mut().zip(other).for_each(|(out, &other)| *out = of_out * *out + of_other * other);
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
