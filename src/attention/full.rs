//! Full linear attention: every query sees every key.
//!
//! Keys are cut into at most [`PARTS`] parts, whose sums are computed by themselves and joined in
//! order, on one thread as on many: where the cuts are depends on the number of keys only, and so
//! do the bits.

use std::ops::Range;

use ndarray::{ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis, s};

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
    let (mut state, mut part) =
        (std::mem::take(&mut scratch.sums), std::mem::take(&mut scratch.part));
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

/// [`full`] of several heads, each of which all threads share, in room for the sums of [`PARTS`]
/// parts of each.
///
/// # Shapes
/// - `k`: `[h_kv, n_k, d]`, `v`: `[h_kv, n_k, e]`; `queries`: those of every key-value head,
///   `[group, n_q, d]`, and their outputs.
pub(super) fn full_shared<'a, T: Real, M: FeatureMap<T> + 'a>(
    head: impl Fn(usize) -> Head<'a, T, M> + Sync,
    k: &ArrayRef3<T>,
    v: &ArrayRef3<T>,
    valid: Valid<'_>,
    queries: impl Iterator<Item = (ArrayView3<'a, T>, ArrayViewMut3<'a, T>)> + Send,
    sums: &mut [HeadState<T>],
    scratches: &mut [Scratch<T>],
) {
    let n = k.shape()[1];
    let heads = k.outer_iter().zip(v.outer_iter()).zip(sums.chunks_exact_mut(PARTS)).enumerate();
    let items = heads.flat_map(|(h, ((k, v), sums))| {
        parts(n).zip(sums).map(move |(keys, part)| (h, k, v, keys, part))
    });
    for_each(scratches, items, |scratch, (h, k, v, keys, part)| {
        sum(&head(h), k, v, valid, keys, part, scratch)
    });
    for_each(scratches, sums.chunks_exact_mut(PARTS), |scratch, sums| {
        let Some((state, others)) = sums.split_first_mut() else { return };
        for (part, _) in others.iter().zip(parts(n).skip(1)) {
            state.join(T::ops(), 0.0, part, &mut scratch.feature);
        }
    });
    let items =
        queries.zip(sums.chunks_exact(PARTS)).enumerate().flat_map(|(h, ((q, out), sums))| {
            (0..q.shape()[1]).step_by(SEGMENT).scan(Some(out), move |rest, start| {
                let end = q.shape()[1].min(start + SEGMENT);
                let (out, later) = rest.take()?.split_at(Axis(1), end - start);
                *rest = Some(later);
                Some((h, q.slice_move(s![.., start..end, ..]), out, &sums[0]))
            })
        });
    for_each(scratches, items, |scratch, (h, q, mut out, state)| {
        q.outer_iter()
            .zip(out.outer_iter_mut())
            .for_each(|(q, out)| read(&head(h), state, q, out, scratch));
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
        state.read(
            head.ops,
            a,
            end - start,
            &column[..width],
            &mut total[..width],
            o,
            Some(&mut ahead),
        );
        for i in 0..end - start {
            normalise(&o[i * head.value_stride..], total[i], out.row_mut(start + i));
        }
    }
}
