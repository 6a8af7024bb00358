//! Causal linear attention by blocks: everything before the block through the sums, the block
//! itself through the products of its features.

use std::ops::Range;

use ndarray::{ArrayViewMut3, Axis, s};

use crate::Real;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{Outputs, Sums};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::{CAUSAL_BLOCK, FeatureScratch, SEGMENT, Scratch};
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, LANES, padded};

/// The next tokens of one key-value head and its group of query heads, without a local window.
///
/// A block ends before the first key whose exponent leaves the sums' frame, and the frame is moved
/// with that key as the first of the next block. So the frame of a block depends on nothing after
/// the block's first token, and no output can depend on later tokens, not by a bit.
///
/// Elements are looked at as they are read; after an error the sums hold anything.
pub(crate) fn prefill<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    qkv: HeadQkv<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let n = qkv.k.nrows();
    scratch.features.ahead = Ahead::of(
        [qkv.k, qkv.v].into_iter().chain(qkv.q.outer_iter()).chain(out.view().outer_iter()),
    );
    sums.settle(head.ops);
    let mut start = 0;
    while start < n {
        let tokens = block_at(start, n);
        let block = if qkv.any_valid(tokens.clone()) {
            Block { tokens: keys(head, sums, &qkv, start, scratch)?, width: padded(tokens.len()) }
        } else {
            Block { tokens, width: 0 }
        };
        scratch.features.ahead.aim(block.tokens.end, CAUSAL_BLOCK);
        queries(head, sums, &qkv, &block, out.view_mut(), scratch)?;
        if block.width > 0 && sums.started {
            let (tokens, width) = (block.tokens.len(), block.width);
            let FeatureScratch { b, feature, ahead, .. } = &mut scratch.features;
            let weights = MatRef::new(b, head.features, tokens, width);
            let values = MatRef::packed(&scratch.v, tokens, head.value_stride);
            sums.accumulate(head.ops, weights, feature, values, ahead);
        }
        start = block.tokens.end;
    }
    Ok(())
}

/// Keys and values in scratch.
struct Block {
    tokens: Range<usize>,
    /// Columns of the key panel; none if no key may be attended to.
    width: usize,
}

/// Tokens of the block that begins at `start`, if no key cuts it short.
fn block_at(start: usize, n: usize) -> Range<usize> {
    start..n.min(start + CAUSAL_BLOCK.min(SEGMENT - start % SEGMENT))
}

/// Key weights of the block at `start`, in the sums' frame, into `b`, their row sums into
/// `feature`, its values into `v`; returns the tokens of the block.
fn keys<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    qkv: &HeadQkv<'_, T>,
    start: usize,
    scratch: &mut Scratch<T>,
) -> Result<Range<usize>, OutOfRange> {
    let Scratch { y, v: values, zeros, features, .. } = scratch;
    let FeatureScratch { b, column, top, feature, map, .. } = features;
    let block = block_at(start, qkv.k.nrows());
    let (tokens, width) = (block.len(), padded(block.len()));
    let b = &mut b[..head.features * width];
    let (column, top) = (&mut column[..width], &mut top[..width]);
    qkv.key_rows(block.clone()).gather(head.ops, head.scale, y, zeros)?;
    qkv.value_rows(block).copy(head.ops, values)?;
    head.map.key_panel(width, &y[..head.dim * width], b, map);

    let exponents = |sums: &Sums<T>, column: &mut [T]| {
        let position = |j: usize| qkv.is_valid(start + j).then_some(qkv.position + start + j);
        sums.exponents(head.log_decay, tokens, position, column);
    };
    exponents(sums, column);
    let mut cut = sums.first_above(head.ops, b, column, top, feature);
    if cut == Some(0) {
        feature.iter_mut().zip(b.chunks_exact(width)).for_each(|(candidate, b)| *candidate = b[0]);
        sums.rebase(head.ops, head.log_decay, qkv.position + start, feature);
        exponents(sums, column);
        cut = sums.first_above(head.ops, b, column, top, feature);
    }
    let tokens = cut.unwrap_or(tokens);
    column[tokens..].fill(T::NEG_INFINITY);
    (head.ops.weigh)(b, &sums.reference, column, feature);
    Ok(start..start + tokens)
}

/// Outputs of a block's queries over the sums and over the block's own keys.
fn queries<T: Real>(
    head: &Head<'_, T>,
    sums: &Sums<T>,
    qkv: &HeadQkv<'_, T>,
    block: &Block,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let rows = block.tokens.clone();
    if !sums.started {
        // Only masked keys so far.
        out.slice_mut(s![.., rows.clone(), ..]).fill(T::zero());
        return qkv.check_queries(rows);
    }
    for h in 0..qkv.q.shape()[0] {
        let Scratch { x, zeros, .. } = scratch;
        qkv.query_rows(h, rows.clone()).gather(head.ops, head.scale, x, zeros)?;
        weigh(head, sums, block, scratch);
        // Exponents relative to the frame become those of the weights themselves.
        for (i, top) in scratch.features.top[..rows.len()].iter_mut().enumerate() {
            *top += sums.decay(head.log_decay, qkv.position + rows.start + i);
        }
        head.put_outputs(scratch, rows.clone(), out.index_axis_mut(Axis(0), h))?;
    }
    Ok(())
}

/// Sums and normalisers of the queries `x` over the sums and over the block's own keys, into `o`
/// and `total`.
fn weigh<T: Real>(head: &Head<'_, T>, sums: &Sums<T>, block: &Block, scratch: &mut Scratch<T>) {
    let Scratch { x, v, p, o, total, features, .. } = scratch;
    let FeatureScratch { a, b, column, top, map, ahead, .. } = features;
    let (m, stride, key_width) = (head.features, head.value_stride, block.width);
    let (tokens, width) = (block.tokens.len(), padded(block.tokens.len()));
    let a = &mut a[..m * width];
    head.map.query_panel(width, &x[..head.dim * width], a, map);
    (head.ops.column_max)(a, &sums.reference, &mut top[..width]);
    column.iter_mut().zip(&top[..width]).for_each(|(shift, &top)| *shift = -top);
    let out = Outputs { tokens, numerator: o, total: &mut total[..width] };
    sums.read(head.ops, a, &column[..width], out, ahead);

    if key_width == 0 {
        return;
    }
    // Bands of LANES queries: band r needs the keys 0..(r + 1)·LANES only.
    for band in (0..tokens).step_by(LANES) {
        let (rows, columns) = (LANES.min(tokens - band), band + LANES);
        let scores = &mut p[band * key_width..];
        (head.ops.matmul_ahead)(
            MatMut::new(scores, rows, columns, key_width),
            Accum::Replace,
            MatRef::packed(a, m, width).cols(band..band + rows).t(),
            MatRef::new(b, m, columns, key_width),
            Some(ahead),
        );
        (head.ops.mask_triangle)(scores, key_width, band, &mut total[band..band + rows]);
        let keys = columns.min(tokens);
        (head.ops.matmul_ahead)(
            MatMut::packed(&mut o[band * stride..], rows, stride),
            Accum::Add,
            MatRef::new(scores, rows, keys, key_width),
            MatRef::packed(v, keys, stride),
            Some(ahead),
        );
    }
}
