//! [`Ahead`]: what will be read next.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::ArrayView2;

use super::lane::Simd;
use crate::low::aligned::LINE;

/// Cache lines asked for at a time: more of them at once would wait for each other, and everything
/// else for them.
const LINES: usize = 16;

/// Most arrays whose rows are fetched.
const RUNS: usize = 8;

/// Rows that the next block of work will touch. The matrix products of this block ask for them
/// between their tiles, some at a time, so that memory is read while the arithmetic goes on.
/// Without this, long sequences wait for memory for a sixth of their time (8192 tokens, 8 heads of
/// 64 in f32, measured 2026-11 on one core of an AMD EPYC of the fifth generation).
#[derive(Debug, Clone)]
pub(crate) struct Ahead<T> {
    runs: [Run; RUNS],
    /// Runs in use.
    len: usize,
    /// The run being fetched; those before it are.
    at: usize,
    /// The first run that is not to be fetched.
    end: usize,
    element: PhantomData<T>,
}

/// Rows of one array, by addresses, which are never accessed.
#[derive(Debug, Clone, Copy, Default)]
struct Run {
    first: usize,
    /// Bytes between rows.
    stride: isize,
    rows: usize,
    /// Cache lines of a row.
    lines: usize,
    /// Rows asked for at a time.
    at_once: usize,
    /// The rows to come.
    next: usize,
    left: usize,
}

impl<T> Ahead<T> {
    /// Fetches rows of these arrays, those needed first coming first; of the first few, if there
    /// are very many.
    pub(crate) fn of<'a>(arrays: impl IntoIterator<Item = ArrayView2<'a, T>>) -> Self
    where
        T: 'a,
    {
        let mut ahead =
            Self { runs: [Run::default(); RUNS], len: 0, at: 0, end: 0, element: PhantomData };
        for (run, array) in ahead.runs.iter_mut().zip(arrays) {
            let lines = if array.strides()[1] == 1 {
                (array.ncols() * size_of::<T>()).div_ceil(LINE)
            } else {
                0
            };
            let stride = array.strides()[0] * size_of::<T>() as isize;
            let (first, rows, at_once) =
                (array.as_ptr().addr(), array.nrows(), LINES.div_ceil(lines.max(1)));
            *run = Run { first, stride, rows, lines, at_once, next: 0, left: 0 };
            ahead.len += 1;
        }
        ahead
    }

    /// Turns to `rows` rows from `start` on, as far as there are any.
    pub(crate) fn aim(&mut self, start: usize, rows: usize) {
        self.aim_some(0..self.len, start, rows);
    }

    /// [`aim`](Self::aim) for some of the arrays, and nothing else.
    pub(crate) fn aim_some(&mut self, arrays: Range<usize>, start: usize, rows: usize) {
        let end = arrays.end.min(self.len);
        for run in &mut self.runs[arrays.start.min(end)..end] {
            run.next = run.first.wrapping_add_signed(run.stride.wrapping_mul(start as isize));
            run.left = rows.min(run.rows.saturating_sub(start));
        }
        (self.at, self.end) = (arrays.start.min(end), end);
    }

    /// Asks for the next few lines.
    #[inline(always)]
    pub(super) fn fetch<S: Simd<T = T>>(&mut self, simd: S) {
        if self.at < self.end {
            let run = &mut self.runs[self.at];
            let rows = run.left.min(run.at_once);
            for _ in 0..rows {
                for line in 0..run.lines {
                    simd.prefetch(std::ptr::without_provenance(run.next.wrapping_add(line * LINE)));
                }
                run.next = run.next.wrapping_add_signed(run.stride);
            }
            run.left -= rows;
            self.at += usize::from(run.left == 0);
        }
    }
}
