//! [`Ahead`]: what will be read next.

use ndarray::ArrayView2;

use super::lane::Simd;

/// Bytes of a cache line.
const LINE: usize = 64;

/// Cache lines asked for at a time: more of them at once would wait for each other, and everything else for them.
const LINES: usize = 16;

/// Most arrays whose rows are fetched.
const RUNS: usize = 8;

/// Rows that the next block of work will touch. The matrix products of this block ask for them between their tiles, some at
/// a time, so that memory is read while the arithmetic goes on. Without this, long sequences wait for memory for a sixth of
/// their time (8192 tokens, 8 heads of 64 in f32, measured 2026-11 on one core of an AMD EPYC of the fifth generation).
pub(crate) struct Ahead<T> {
    runs: [Run<T>; RUNS],
    /// Runs in use.
    len: usize,
    /// The run being fetched; those before it are.
    at: usize,
}

/// Rows of one array.
#[derive(Clone, Copy)]
struct Run<T> {
    first: *const T,
    stride: isize,
    rows: usize,
    /// Cache lines of a row.
    lines: usize,
    /// Rows asked for at a time.
    at_once: usize,
    /// The rows to come.
    next: *const T,
    left: usize,
}

impl<T: Copy> Ahead<T> {
    /// Fetches rows of these arrays, those needed first coming first; of the first few, if there are very many.
    pub(crate) fn of<'a>(arrays: impl IntoIterator<Item = ArrayView2<'a, T>>) -> Self
    where
        T: 'a,
    {
        let null = Run { first: std::ptr::null(), stride: 0, rows: 0, lines: 0, at_once: 0, next: std::ptr::null(), left: 0 };
        let mut ahead = Self { runs: [null; RUNS], len: 0, at: 0 };
        for (run, array) in ahead.runs.iter_mut().zip(arrays) {
            let lines = if array.strides()[1] == 1 { (array.ncols() * size_of::<T>()).div_ceil(LINE) } else { 0 };
            let (first, stride, rows) = (array.as_ptr(), array.strides()[0], array.nrows());
            *run = Run { first, stride, rows, lines, at_once: LINES.div_ceil(lines.max(1)), ..null };
            ahead.len += 1;
        }
        ahead
    }

    /// Turns to `rows` rows from `start` on, as far as there are any.
    pub(crate) fn aim(&mut self, start: usize, rows: usize) {
        for run in &mut self.runs[..self.len] {
            run.next = run.first.wrapping_offset(start as isize * run.stride);
            run.left = rows.min(run.rows.saturating_sub(start));
        }
        self.at = 0;
    }

    /// Asks for the next few lines.
    #[inline(always)]
    pub(super) fn fetch<S: Simd<T = T>>(&mut self, simd: S) {
        if self.at < self.len {
            let run = &mut self.runs[self.at];
            let rows = run.left.min(run.at_once);
            for _ in 0..rows {
                for line in 0..run.lines {
                    simd.prefetch(run.next.wrapping_add(line * (LINE / size_of::<T>())));
                }
                run.next = run.next.wrapping_offset(run.stride);
            }
            run.left -= rows;
            self.at += usize::from(run.left == 0);
        }
    }
}
