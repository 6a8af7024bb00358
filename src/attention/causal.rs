//! Causal linear attention by blocks: everything before the block through the state, the block
//! itself through the products of its features.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut3, s};

use crate::attention::Head;
use crate::attention::pages::SEGMENT;
use crate::attention::rows::{Valid, copy_rows, gather, is_valid, normalise, tokens_fit};
use crate::attention::state::HeadState;
use crate::attention::workspace::{CAUSAL_BLOCK, Scratch};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ahead, LANES, Product, padded};

/// The next tokens of one key-value head and its group of query heads, without a local window.
///
/// A block ends before the first key whose exponent leaves the state's frame, and the frame is
/// moved with that key as the first of the next block. So the frame of a block depends on nothing
/// after the block's first token, and no output can depend on later tokens, not by a bit.
///
/// Elements are looked at as they are read; returns false, leaving the state anywhere, if one is
/// out of range.
///
/// # Shapes
/// - `q`: `[group, n, d]`, `k`: `[n, d]`, `v`: `[n, e]`, `out`: `[group, n, e]`.
pub(super) fn causal<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    position: usize,
    q: ArrayView3<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> bool {
    let n = k.nrows();
    let mut start = 0;
    let mut ahead =
        Ahead::of([k, v].into_iter().chain(q.outer_iter()).chain(out.view().outer_iter()));
    state.settle(head.ops);
    while start < n {
        let Some(end) = keys(head, state, position, k, v, valid, start, scratch) else {
            return false;
        };
        let share = s![.., start..end, ..];
        ahead.aim(end, CAUSAL_BLOCK);
        if !queries(
            head,
            state,
            q.slice(share),
            out.slice_mut(share),
            width_of(start, n),
            scratch,
            Some(&mut ahead),
        ) {
            return false;
        }
        accumulate(head, state, start..end, n, scratch, Some(&mut ahead));
        start = end;
    }
    true
}

/// Tokens of the block that begins at `start`, if no key cuts it short.
fn block_at(start: usize, n: usize) -> Range<usize> {
    start..n.min(start + CAUSAL_BLOCK.min(SEGMENT - start % SEGMENT))
}

/// Columns of the key panel of a block that begins at `start`.
fn width_of(start: usize, n: usize) -> usize {
    padded(block_at(start, n).len())
}

/// The block's keys and values in `scratch` join the state.
fn accumulate<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    block: Range<usize>,
    n: usize,
    scratch: &Scratch<T>,
    ahead: Option<&mut Ahead<T>>,
) {
    if state.started {
        let width = width_of(block.start, n);
        let weights = &scratch.b[..head.features * width];
        state.accumulate(
            head.ops,
            weights,
            &scratch.feature,
            width,
            block.len(),
            &scratch.v,
            ahead,
        );
    }
}

/// Key weights of the block at `start`, in the state's frame, into `scratch.b`, their sums into
/// `scratch.feature`, its values into `scratch.v`; returns where the block ends, or `None` for
/// elements out of range.
fn keys<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    position: usize,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    start: usize,
    scratch: &mut Scratch<T>,
) -> Option<usize> {
    let Scratch { y, b, v: values, column, top, feature, map, zeros, .. } = scratch;
    let block = block_at(start, k.nrows());
    let (tokens, width) = (block.len(), padded(block.len()));
    let b = &mut b[..head.features * width];
    let (column, top) = (&mut column[..width], &mut top[..width]);
    if !gather(head.ops, k, block.clone(), valid, head.scale, y, zeros)
        || !copy_rows(head.ops, v, block, valid, values)
    {
        return None;
    }
    head.map.key_panel(width, &y[..head.dim * width], b, map);

    let exponents = |state: &HeadState<T>, column: &mut [T]| {
        state.exponents(
            head.log_decay,
            position + start,
            tokens,
            |j| is_valid(valid, start + j),
            column,
        );
    };
    exponents(state, column);
    let mut cut = state.first_above(head.ops, b, column, top, feature);
    if cut == Some(0) {
        feature.iter_mut().zip(b.chunks_exact(width)).for_each(|(candidate, b)| *candidate = b[0]);
        state.rebase(head.ops, head.log_decay, position + start, feature);
        exponents(state, column);
        cut = state.first_above(head.ops, b, column, top, feature);
    }
    let tokens = cut.unwrap_or(tokens);
    column[tokens..].fill(T::NEG_INFINITY);
    (head.ops.weigh)(b, &state.reference, column, feature);
    Some(start + tokens)
}

/// Outputs of a block's queries over the state and over the block's own keys in `scratch`, whose
/// panel is `key_width` wide. Returns whether all elements were in range.
///
/// # Shapes
/// - `q`: `[group, tokens, d]`, `out`: `[group, tokens, e]`.
fn queries<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    q: ArrayView3<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    key_width: usize,
    scratch: &mut Scratch<T>,
    mut ahead: Option<&mut Ahead<T>>,
) -> bool {
    let tokens = q.shape()[1];
    if !state.started {
        // Only masked keys so far.
        out.fill(T::zero());
        return q.outer_iter().all(|q| tokens_fit(q, 0..tokens, None));
    }
    for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()) {
        if !gather(head.ops, q, 0..tokens, None, head.scale, &mut scratch.x, &scratch.zeros) {
            return false;
        }
        sums(head, state, tokens, padded(tokens), key_width, scratch, ahead.as_deref_mut());
        for (i, out) in out.outer_iter_mut().enumerate() {
            normalise(&scratch.o[i * head.value_stride..], scratch.total[i], out);
        }
    }
    true
}

/// Sums and normalisers of the queries `scratch.x` over the state and over the block's own keys,
/// into `scratch.o` and `scratch.total`. Query panels are `width` wide, the key panel `key_width`.
fn sums<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    tokens: usize,
    width: usize,
    key_width: usize,
    scratch: &mut Scratch<T>,
    mut ahead: Option<&mut Ahead<T>>,
) {
    let Scratch { x, a, b, v, p, o, column, top, total, map, .. } = scratch;
    let a = &mut a[..head.features * width];
    head.map.query_panel(width, &x[..head.dim * width], a, map);
    (head.ops.column_max)(a, &state.reference, &mut top[..width]);
    column.iter_mut().zip(&top[..width]).for_each(|(shift, &top)| *shift = -top);
    state.read(head.ops, a, tokens, &column[..width], &mut total[..width], o, ahead.as_deref_mut());

    // Bands of LANES queries: band r needs the keys 0..(r + 1)·LANES only.
    for band in (0..tokens).step_by(LANES) {
        let (rows, columns) = (LANES.min(tokens - band), band + LANES);
        let scores = &mut p[band * key_width..];
        let product = Product {
            m: rows,
            n: columns,
            k: head.features,
            a_row: 1,
            a_col: width,
            b_row: key_width,
            c_row: key_width,
            accumulate: false,
        };
        (head.ops.matmul_ahead)(product, &a[band..], b, scores, ahead.as_deref_mut());
        (head.ops.mask_triangle)(scores, key_width, band, &mut total[band..band + rows]);
        let stride = head.value_stride;
        let product = Product {
            m: rows,
            n: stride,
            k: columns.min(tokens),
            a_row: key_width,
            a_col: 1,
            b_row: stride,
            c_row: stride,
            accumulate: true,
        };
        (head.ops.matmul_ahead)(product, scores, v, &mut o[band * stride..], ahead.as_deref_mut());
    }
}
