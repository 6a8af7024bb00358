//! The keys that a block of queries sees as they are.

use std::ops::Range;

use ndarray::Axis;

use super::pass::Pass;
use crate::Real;
use crate::attention::Window;
use crate::attention::rows::Rows;
use crate::attention::scratch::BLOCK;
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, LANES, padded};

/// exp(x·y)-weighted sums over the sinks and the window of every query, kept keys aside.
#[derive(Debug, Clone)]
pub(crate) struct WindowSums<T> {
    /// Σ_j exp(x_i·y_j − top_i) v_j, `[n, e_padded]`.
    pub(crate) numerator: Vec<T>,
    /// Σ_j exp(x_i·y_j − top_i), `[n]`.
    pub(crate) total: Vec<T>,
    /// max_j x_i·y_j, `[n]`; −∞ without keys.
    pub(crate) top: Vec<T>,
}

/// The keys that a block of queries sees as they are: sinks, kept ones, and those in the window.
#[derive(Debug, Clone, Default)]
pub(crate) struct WindowBuffers<T> {
    /// Which ones, in ascending order.
    pub(crate) runs: Vec<Range<usize>>,
    /// How many, 0 for none.
    pub(crate) rows: usize,
    /// Scaled keys: panels of up to BLOCK columns, one after the other; every run begins one.
    pub(crate) y: Aligned<T>,
    /// Values `[keys, e_padded]`.
    pub(crate) v: Aligned<T>,
    /// Scores, then weights, `[keys, width]`.
    pub(crate) p: Aligned<T>,
    /// ȯ·v, then gradients of scores, `[keys, width]`.
    pub(crate) dp: Aligned<T>,
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

impl<T: Real> WindowBuffers<T> {
    /// The window's `keys`, those that are `kept` beyond it, and the sinks before it, whichever
    /// query head they are for.
    pub(crate) fn load<M>(
        &mut self,
        pass: &Pass<'_, T, M>,
        kept: &[usize],
        keys: Range<usize>,
        zeros: &[T],
    ) {
        self.runs.clear();
        let sinks = pass.sinks.iter().take_while(|&&sink| sink < keys.start);
        self.runs.extend(sinks.chain(kept).map(|&key| key..key + 1));
        self.runs.sort_unstable_by_key(|run| run.start);
        self.runs.dedup_by(|next, run| {
            let joined = run.end == next.start;
            run.end = if joined { next.end } else { run.end };
            joined
        });
        self.runs.push(keys);
        self.rows = self.runs.iter().map(ExactSizeIterator::len).sum();
        let (dim, stride) = (pass.k.ncols(), padded(pass.v.ncols()));
        let columns: usize = blocks(&self.runs).map(|(_, block)| padded(block.len())).sum();
        if self.ones.len() < self.rows || self.y.len() < columns * dim {
            self.y.resize(columns * dim, T::ZERO);
            self.v.resize(self.rows * stride, T::ZERO);
            self.p.resize(self.rows * BLOCK, T::ZERO);
            self.dp.resize(self.rows * BLOCK, T::ZERO);
            self.ones.resize(self.rows, T::ONE);
            self.zeros.resize(self.rows, T::ZERO);
        }
        let mut rest = &mut self.y[..];
        for (row, tokens) in blocks(&self.runs) {
            let (panel, others) = rest.split_at_mut(dim * padded(tokens.len()));
            rest = others;
            let rows = |array| Rows { array, tokens: tokens.clone(), valid: pass.valid };
            _ = rows(pass.k).gather(T::ops(), pass.key_scale, panel, zeros);
            _ = rows(pass.v).copy(T::ops(), &mut self.v[row * stride..]);
        }
    }

    /// Nothing but the sums is seen.
    pub(crate) fn clear(&mut self) {
        self.runs.clear();
        self.rows = 0;
    }

    /// The panels of scaled keys: the first row, how many rows, and the panel.
    pub(crate) fn panels(&self, dim: usize) -> impl Iterator<Item = (usize, usize, &[T])> {
        blocks(&self.runs).scan(&self.y[..], move |rest, (row, keys)| {
            let (panel, others) = rest.split_at(dim * padded(keys.len()));
            *rest = others;
            Some((row, keys.len(), panel))
        })
    }

    /// Scores of the keys (rows) for the queries (columns) of the panel `x`, whose first one
    /// belongs to key `query`; −∞ where a query must not look.
    pub(crate) fn score<M>(
        &mut self,
        pass: &Pass<'_, T, M>,
        query: usize,
        x: MatRef<'_, T>,
        ahead: &mut Ahead<T>,
    ) {
        let (width, mut p) = (x.cols, std::mem::take(&mut self.p));
        for (row, count, y) in self.panels(x.rows) {
            (T::ops().matmul_ahead)(
                MatMut::packed(&mut p[row * width..], count, width),
                Accum::Replace,
                MatRef::new(y, x.rows, count, padded(count)).t(),
                x,
                Some(&mut *ahead),
            );
        }
        for (key, row) in self.runs.iter().cloned().flatten().zip(p.chunks_exact_mut(width)) {
            let hidden =
                if pass.is_valid(key) { key.saturating_sub(query).min(width) } else { width };
            row[..hidden].fill(T::NEG_INFINITY);
        }
        self.p = p;
    }
}

/// Blocks of up to BLOCK keys, with the first row of each.
fn blocks(runs: &[Range<usize>]) -> impl Iterator<Item = (usize, Range<usize>)> {
    let of_runs = runs.iter().scan(0, |row, run| {
        let (first, run) = (*row, run.clone());
        *row += run.len();
        let starts = run.clone().step_by(BLOCK);
        Some(starts.map(move |at| (first + at - run.start, at..run.end.min(at + BLOCK))))
    });
    of_runs.flatten()
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
            let (tokens, width) = (end - start, padded(end - start));
            let (column, total) = (&mut column[..width], &mut total[..width]);
            buffers.load(pass, &[], first..pass.lead + end, &no_token);
            _ = Rows { array: pass.q.index_axis(Axis(0), h), tokens: start..end, valid: None }
                .gather(ops, pass.query_scale, &mut x, &no_token);
            buffers.score(pass, pass.lead + start, MatRef::packed(&x, dim, width), &mut ahead);
            let WindowBuffers { v, p, ones, zeros, rows, .. } = &mut buffers;
            let (rows, p) = (*rows, &mut p[..*rows * width]);
            (ops.column_max)(p, &zeros[..rows], column);
            sums.top[start..end].copy_from_slice(&column[..tokens]);
            column
                .iter_mut()
                .for_each(|top| *top = if *top > T::NEG_INFINITY { -*top } else { T::ZERO });
            (ops.exp_dot)(p, &zeros[..rows], column, &ones[..rows], total);
            sums.total[start..end].copy_from_slice(&total[..tokens]);
            let out = &mut sums.numerator[start * stride..end * stride];
            (ops.matmul_ahead)(
                MatMut::packed(out, tokens, stride),
                Accum::Replace,
                MatRef::new(p, rows, tokens, width).t(),
                MatRef::packed(v, rows, stride),
                Some(&mut ahead),
            );
            start = end;
        }
        sums
    }
}
