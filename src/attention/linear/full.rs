//! Full linear attention: every query sees every key.
//!
//! Keys are cut into at most [`PARTS`] parts, whose sums are computed by themselves and joined in
//! order, on one thread as on many: where the cuts are depends on the number of keys only, and so
//! do the bits.

use std::ops::Range;

use ndarray::{ArrayView3, ArrayViewMut3, Axis, s};

use crate::Real;
use crate::attention::linear::absorb::{KeyBlock, absorb};
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{Outputs, Sums};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::{OutOfRange, Rows};
use crate::attention::scratch::{BLOCK, FeatureScratch, SEGMENT, Scratch, Whole, Worker};
use crate::low::simd::{Ahead, padded};
use crate::threads::{for_each, try_each};

/// Parts that keys are cut into at most.
pub(crate) const PARTS: usize = 16;

/// Keys of a part at least: to join the sums of shorter ones would be felt.
const PART: usize = 4 * SEGMENT;

/// All keys of one key-value head into the sums, then all queries of its group out of it.
pub(crate) fn attend<T: Real>(
    head: &Head<'_, T>,
    qkv: HeadQkv<'_, T>,
    out: ArrayViewMut3<'_, T>,
    worker: &mut Worker<T>,
) -> Result<(), OutOfRange> {
    let (scratch, Whole { state, part }) = worker.all();
    let sums = &mut state.sums;
    for (i, keys) in parts(qkv.k.nrows()).enumerate() {
        sum(head, &qkv, keys, if i == 0 { &mut *sums } else { &mut *part }, scratch)?;
        if i > 0 {
            sums.join(head.ops, 0.0, part, &mut scratch.features.feature);
        }
    }
    read(head, sums, qkv.q, out, scratch)
}

/// [`attend`] for a few heads, each of which all threads share, in room for the sums of [`PARTS`]
/// parts of each.
pub(crate) fn attend_shared<'a, 'o, T: Real>(
    heads: &[Head<'_, T>],
    qkv: Vec<(HeadQkv<'a, T>, ArrayViewMut3<'o, T>)>,
    sums: &mut [Sums<T>],
    workers: &mut [Worker<T>],
) -> Result<(), OutOfRange> {
    let items = qkv.iter().zip(sums.chunks_exact_mut(PARTS)).flat_map(|((qkv, _), sums)| {
        parts(qkv.k.nrows()).zip(sums).map(move |(keys, part)| (qkv, keys, part))
    });
    try_each(workers, items, |worker, (qkv, keys, part)| {
        sum(&heads[qkv.head], qkv, keys, part, &mut worker.scratch)
    })?;
    let items = qkv.iter().zip(sums.chunks_exact_mut(PARTS));
    for_each(workers, items, |worker, ((qkv, _), sums)| {
        let Some((whole, others)) = sums.split_first_mut() else { return };
        for (part, _) in others.iter().zip(parts(qkv.k.nrows()).skip(1)) {
            whole.join(T::ops(), 0.0, part, &mut worker.scratch.features.feature);
        }
    });
    let items = qkv.into_iter().zip(sums.chunks_exact(PARTS)).flat_map(|((qkv, out), sums)| {
        let (n, q) = (qkv.q.shape()[1], qkv.q);
        (0..n).step_by(SEGMENT).scan(Some(out), move |rest, start| {
            let end = n.min(start + SEGMENT);
            let (out, later) = rest.take()?.split_at(Axis(1), end - start);
            *rest = Some(later);
            Some((qkv.head, q.slice_move(s![.., start..end, ..]), out, &sums[0]))
        })
    });
    try_each(workers, items, |worker, (h, q, out, sums)| {
        read(&heads[h], sums, q, out, &mut worker.scratch)
    })
}

/// The parts that `n` keys are cut into, of whole blocks; an empty one of none.
fn parts(n: usize) -> impl Iterator<Item = Range<usize>> + Send {
    let len = n.div_ceil(PARTS).next_multiple_of(BLOCK).max(PART);
    (0..n.max(1)).step_by(len).map(move |start| start..n.min(start + len))
}

/// The sums over some keys.
fn sum<T: Real>(
    head: &Head<'_, T>,
    qkv: &HeadQkv<'_, T>,
    keys: Range<usize>,
    sums: &mut Sums<T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let Scratch { y, v, zeros, features, .. } = scratch;
    sums.reset();
    features.ahead = Ahead::of([qkv.k, qkv.v]);
    for start in keys.clone().step_by(BLOCK) {
        let block = start..keys.end.min(start + BLOCK);
        qkv.key_rows(block.clone()).gather(head.ops, head.scale, y, zeros)?;
        qkv.value_rows(block.clone()).copy(head.ops, v)?;
        features.ahead.aim(block.end, BLOCK);
        let mut positions = [None; BLOCK];
        for (position, j) in positions.iter_mut().zip(block.clone()) {
            *position = qkv.is_valid(j).then_some(j);
        }
        let positions = &positions[..block.len()];
        let block = KeyBlock { positions, keys: &*y, values: &*v };
        absorb(head, sums, block, features);
    }
    Ok(())
}

/// Outputs of a group's queries over the sums; zeros if there was no key.
fn read<T: Real>(
    head: &Head<'_, T>,
    sums: &Sums<T>,
    q: ArrayView3<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()) {
        if !sums.started {
            out.fill(T::zero());
            Rows::all_valid(q, 0..q.nrows()).check()?;
            continue;
        }
        scratch.features.ahead = Ahead::of([q, out.view()]);
        for start in (0..q.nrows()).step_by(BLOCK) {
            let block = start..q.nrows().min(start + BLOCK);
            let (tokens, width) = (block.len(), padded(block.len()));
            let Scratch { x, o, total, zeros, features, .. } = &mut *scratch;
            let FeatureScratch { a, column, top, map, ahead, .. } = features;
            Rows::all_valid(q, block.clone()).gather(head.ops, head.scale, x, zeros)?;
            let a = &mut a[..head.features * width];
            head.map.query_panel(width, &x[..head.dim * width], a, map);
            (head.ops.column_max)(a, &sums.reference, &mut top[..width]);
            column.iter_mut().zip(&top[..width]).for_each(|(shift, &top)| *shift = -top);
            ahead.aim(block.end, BLOCK);
            let sums_of = Outputs { tokens, numerator: o, total: &mut total[..width] };
            sums.read(head.ops, a, &column[..width], sums_of, ahead);
            scratch.put_outputs(head.value_stride, block, out.view_mut())?;
        }
    }
    Ok(())
}
