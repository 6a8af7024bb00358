//! Full linear attention: every query sees every key.
//!
//! Keys are cut into at most [`PARTS`] parts, whose sums are computed by themselves and joined in order, on one thread as on many:
//! where the cuts are depends on the number of keys only, and so do the bits.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis};

use crate::attention::Head;
use crate::attention::pages::SEGMENT;
use crate::attention::rows::{Valid, copy_rows, gather, normalise};
use crate::attention::state::HeadState;
use crate::attention::workspace::{BLOCK, Scratch};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ahead, padded};
use crate::threads::for_each;

/// Parts that keys are cut into at most.
pub(super) const PARTS: usize = 16;

/// Keys of a part at least: to join the sums of shorter ones would be felt.
const PART: usize = 4 * SEGMENT;

/// All keys of one key-value head into the sums, then all queries of its group out of it.
///
/// # Shapes
/// - `q`: `[group, n_q, d]`, `k`: `[n_k, d]`, `v`: `[n_k, e]`, `out`: `[group, n_q, e]`.
pub(super) fn full<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    q: ArrayView3<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) {
    let (mut state, mut part) = (std::mem::take(&mut scratch.sums), std::mem::take(&mut scratch.part));
    for (i, keys) in parts(k.nrows()).enumerate() {
        sum(head, k, v, valid, keys, if i == 0 { &mut state } else { &mut part }, scratch);
        if i > 0 {
            state.join(head.ops, 0.0, &part, &mut scratch.feature);
        }
    }
    for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
        read(head, &state, q, out, scratch);
    }
    (scratch.sums, scratch.part) = (state, part);
}

/// [`full`] on all threads, in room for the sums of [`PARTS`] parts.
pub(super) fn full_shared<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    q: ArrayView3<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    mut out: ArrayViewMut3<'_, T>,
    sums: &mut [HeadState<T>],
    scratches: &mut [Scratch<T>],
) {
    for_each(scratches, parts(k.nrows()).zip(&mut *sums), |scratch, (keys, part)| sum(head, k, v, valid, keys, part, scratch));
    let Some((state, others)) = sums.split_first_mut() else { return };
    for (part, _) in others.iter().zip(parts(k.nrows()).skip(1)) {
        state.join(head.ops, 0.0, part, &mut scratches[0].feature);
    }
    let segments = q.axis_chunks_iter(Axis(1), SEGMENT).zip(out.axis_chunks_iter_mut(Axis(1), SEGMENT));
    for_each(scratches, segments, |scratch, (q, mut out)| {
        q.outer_iter().zip(out.outer_iter_mut()).for_each(|(q, out)| read(head, state, q, out, scratch));
    });
}

/// The parts that `n` keys are cut into, of whole blocks; an empty one of none.
fn parts(n: usize) -> impl Iterator<Item = Range<usize>> + Send {
    let len = n.div_ceil(PARTS).next_multiple_of(BLOCK).max(PART);
    (0..n.max(1)).step_by(len).map(move |start| start..n.min(start + len))
}

/// The sums over some keys, into `state`.
fn sum<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    keys: Range<usize>,
    state: &mut HeadState<T>,
    scratch: &mut Scratch<T>,
) {
    let mut values = std::mem::take(&mut scratch.v);
    state.reset();
    let mut ahead = Ahead::of([k, v]);
    for start in keys.clone().step_by(BLOCK) {
        let end = keys.end.min(start + BLOCK);
        gather(head.ops, k, start..end, valid, head.scale, &mut scratch.y, &scratch.zeros);
        copy_rows(head.ops, v, start..end, valid, &mut values);
        ahead.aim(end, BLOCK);
        let valid = valid.map(|valid| &valid[start..end]);
        state.absorb(head, start, end - start, valid, &values, scratch, Some(&mut ahead));
    }
    scratch.v = values;
}

/// Outputs of one query head's queries over the sums; zeros if there was no key.
fn read<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    q: ArrayView2<'_, T>,
    mut out: ArrayViewMut2<'_, T>,
    scratch: &mut Scratch<T>,
) {
    if !state.started {
        return out.fill(T::zero());
    }
    let mut ahead = Ahead::of([q, out.view()]);
    for start in (0..q.nrows()).step_by(BLOCK) {
        let end = q.nrows().min(start + BLOCK);
        gather(head.ops, q, start..end, None, head.scale, &mut scratch.x, &scratch.zeros);
        let Scratch { x, a, o, column, top, total, map, .. } = scratch;
        let width = padded(end - start);
        let a = &mut a[..head.features * width];
        head.map.query_panel(width, &x[..head.dim * width], a, map);
        (head.ops.column_max)(a, &state.reference, &mut top[..width]);
        column.iter_mut().zip(&top[..width]).for_each(|(shift, &top)| *shift = -top);
        ahead.aim(end, BLOCK);
        state.read(head.ops, a, end - start, &column[..width], &mut total[..width], o, Some(&mut ahead));
        for i in 0..end - start {
            normalise(&o[i * head.value_stride..], total[i], out.row_mut(start + i));
        }
    }
}
