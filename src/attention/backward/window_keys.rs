//! The keys in the window of a block of queries, as they are.

use std::ops::Range;

use ndarray::Axis;

use super::pass::Pass;
use crate::Real;
use crate::attention::Window;
use crate::attention::rows::Rows;
use crate::attention::scratch::BLOCK;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, LANES, Ops, padded};

/// exp(x·y)-weighted sums over the window keys of every query.
#[derive(Debug, Clone)]
pub(crate) struct WindowSums<T> {
    /// Σ_j exp(x_i·y_j − top_i) v_j, `[n, e_padded]`.
    pub(crate) numerator: Vec<T>,
    /// Σ_j exp(x_i·y_j − top_i), `[n]`.
    pub(crate) total: Vec<T>,
    /// max_j x_i·y_j, `[n]`; −∞ without keys.
    pub(crate) top: Vec<T>,
}

/// The window keys of a block.
#[derive(Debug, Clone, Default)]
pub(crate) struct WindowBuffers<T> {
    /// Scaled keys: panels `[d, BLOCK]`, one after the other.
    pub(crate) y: Vec<T>,
    /// Values `[keys, e_padded]`.
    pub(crate) v: Vec<T>,
    /// Scores, then weights, `[keys, width]`.
    pub(crate) p: Vec<T>,
    /// ȯ·v, then gradients of scores, `[keys, width]`.
    pub(crate) dp: Vec<T>,
    pub(crate) ones: Vec<T>,
    pub(crate) zeros: Vec<T>,
}

/// Where the block of queries beginning at `start` ends, and the first key that is near to it.
pub(crate) fn window_block<T, M>(
    pass: &Pass<'_, T, M>,
    window: Window,
    start: usize,
) -> (usize, usize) {
    let position = pass.position + pass.lead + start;
    let (chunk, within) = (position / window.chunk, position % window.chunk);
    let end = pass.q.shape()[1].min(start + BLOCK.min(window.chunk - within));
    (end, (chunk.saturating_sub(window.back) * window.chunk).saturating_sub(pass.position))
}

/// The window keys of a block of queries, whichever query head they are for.
pub(crate) fn load_window<T: Real, M>(
    pass: &Pass<'_, T, M>,
    keys: Range<usize>,
    window: &mut WindowBuffers<T>,
    zeros: &[T],
) {
    let (dim, stride, count) = (pass.k.ncols(), padded(pass.v.ncols()), keys.len());
    if window.ones.len() < count {
        window.y.resize(count.next_multiple_of(BLOCK) * dim, T::ZERO);
        window.v.resize(count * stride, T::ZERO);
        window.p.resize(count * BLOCK, T::ZERO);
        window.dp.resize(count * BLOCK, T::ZERO);
        window.ones.resize(count, T::ONE);
        window.zeros.resize(count, T::ZERO);
    }
    for (start, panel) in keys.clone().step_by(BLOCK).zip(window.y.chunks_exact_mut(dim * BLOCK)) {
        _ = Rows { array: pass.k, tokens: start..keys.end.min(start + BLOCK), valid: pass.valid }
            .gather(T::ops(), pass.key_scale, panel, zeros);
    }
    _ = Rows { array: pass.v, tokens: keys, valid: pass.valid }.copy(T::ops(), &mut window.v);
}

/// Scores of the window keys (rows) for the queries (columns) of the panel `x`, whose first one
/// belongs to key `query`; −∞ where a query must not look.
pub(crate) fn window_scores<T: Real, M>(
    ops: &Ops<T>,
    pass: &Pass<'_, T, M>,
    keys: Range<usize>,
    query: usize,
    width: usize,
    x: &[T],
    window: &mut WindowBuffers<T>,
    ahead: &mut Ahead<T>,
) {
    let dim = pass.k.ncols();
    for (start, y) in (0..keys.len()).step_by(BLOCK).zip(window.y.chunks_exact(dim * BLOCK)) {
        let count = BLOCK.min(keys.len() - start);
        let p = &mut window.p[start * width..];
        (ops.matmul_ahead)(
            MatMut::new(p, count, width, width),
            Accum::Replace,
            MatRef::new(y, dim, count, padded(count)).t(),
            MatRef::new(x, dim, width, width),
            Some(ahead),
        );
    }
    for (key, row) in keys.zip(window.p.chunks_exact_mut(width)) {
        let hidden = if pass.is_valid(key) { key.saturating_sub(query).min(width) } else { width };
        row[..hidden].fill(T::NEG_INFINITY);
    }
}

impl<T: Real> WindowSums<T> {
    /// Sums over the window keys of query head `h`, the pass having a window.
    pub(crate) fn new<M>(pass: &Pass<'_, T, M>, window: Window, h: usize) -> Self {
        let ops = T::ops();
        let (queries, dim, stride) = (pass.q.shape()[1], pass.q.shape()[2], padded(pass.v.ncols()));
        let zeros = |len| vec![T::ZERO; len];
        let mut sums = Self {
            numerator: zeros(queries * stride),
            total: zeros(queries),
            top: vec![T::NEG_INFINITY; queries],
        };
        let mut ahead = Ahead::of([pass.k, pass.v, pass.q.index_axis_move(Axis(0), h)]);
        let mut buffers = WindowBuffers::default();
        let (mut x, no_token) = (zeros(dim * BLOCK), zeros(dim.max(LANES)));
        let (mut column, mut total) = (zeros(BLOCK), zeros(BLOCK));
        let mut start = 0;
        while start < queries {
            let (end, first) = window_block(pass, window, start);
            ahead.aim(end, BLOCK);
            let keys = first..pass.lead + end;
            let (tokens, width) = (end - start, padded(end - start));
            let (column, total) = (&mut column[..width], &mut total[..width]);
            load_window(pass, keys.clone(), &mut buffers, &no_token);
            _ = Rows { array: pass.q.index_axis(Axis(0), h), tokens: start..end, valid: None }
                .gather(ops, pass.query_scale, &mut x, &no_token);
            window_scores(
                ops,
                pass,
                keys.clone(),
                pass.lead + start,
                width,
                &x,
                &mut buffers,
                &mut ahead,
            );
            let WindowBuffers { v, p, ones, zeros, .. } = &mut buffers;
            let p = &mut p[..keys.len() * width];
            (ops.column_max)(p, &zeros[..keys.len()], column);
            sums.top[start..end].copy_from_slice(&column[..tokens]);
            column
                .iter_mut()
                .for_each(|top| *top = if *top > T::NEG_INFINITY { -*top } else { T::ZERO });
            (ops.exp_dot)(p, &zeros[..keys.len()], column, &ones[..keys.len()], total);
            sums.total[start..end].copy_from_slice(&total[..tokens]);
            let out = &mut sums.numerator[start * stride..end * stride];
            (ops.matmul_ahead)(
                MatMut::new(out, tokens, stride, stride),
                Accum::Replace,
                MatRef::new(p, keys.len(), tokens, width).t(),
                MatRef::new(v, keys.len(), stride, stride),
                Some(&mut ahead),
            );
            start = end;
        }
        sums
    }
}
