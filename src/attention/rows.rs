//! Between the caller's arrays, whose rows are tokens, and the panels of the inner loops.

use std::ops::Range;

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, s};

use crate::Real;
use crate::check::within;
use crate::low::simd::{LANES, Ops, padded};

/// The tokens a block of work may look at: `None` for all.
pub(crate) type Valid<'a> = Option<&'a [bool]>;

/// An element is no number, or beyond [`Real::LIMIT`], or a feature map made no numbers of elements
/// in range. The public function that was called finds out which one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OutOfRange;

/// Some rows of an array, those of masked tokens not to be looked at.
#[derive(Debug, Clone)]
pub(crate) struct Rows<'a, T> {
    pub(crate) array: ArrayView2<'a, T>,
    pub(crate) tokens: Range<usize>,
    pub(crate) valid: Valid<'a>,
}

impl<'a, T: Real> Rows<'a, T> {
    pub(crate) fn all_valid(array: ArrayView2<'a, T>, tokens: Range<usize>) -> Self {
        Self { array, tokens, valid: None }
    }

    fn is_valid(&self, j: usize) -> bool {
        self.valid.is_none_or(|valid| valid[j])
    }

    /// The rows become the columns of `panel` `[d, padded]`, multiplied by `scale`; masked tokens
    /// and the columns that fill up the last lane group become zeros. `zeros` holds at least d of
    /// them.
    pub(crate) fn gather(
        &self,
        ops: &Ops<T>,
        scale: T,
        panel: &mut [T],
        zeros: &[T],
    ) -> Result<(), OutOfRange> {
        let (d, width) = (self.array.ncols(), padded(self.tokens.len()));
        let zeros = &zeros[..d];
        let (mut squares, mut strided) = (T::ZERO, false);
        for group in (0..width).step_by(LANES) {
            let token = |lane: usize| {
                Some(self.tokens.start + group + lane)
                    .filter(|&j| j < self.tokens.end && self.is_valid(j))
            };
            let mut contiguous = true;
            let columns: [&[T]; LANES] = std::array::from_fn(|lane| match token(lane) {
                Some(j) => self.array.row(j).to_slice().unwrap_or_else(|| {
                    contiguous = false;
                    zeros
                }),
                None => zeros,
            });
            squares += (ops.gather)(&columns, scale, &mut panel[group..], width);
            if !contiguous {
                strided = true;
                for (lane, j) in (0..LANES).filter_map(|lane| token(lane).map(|j| (lane, j))) {
                    for (i, &value) in self.array.row(j).iter().enumerate() {
                        panel[i * width + group + lane] = value * scale;
                    }
                }
            }
        }
        if !strided && proves::<T>(squares) { Ok(()) } else { self.check() }
    }

    /// The rows one after the other in `out`, padded to whole lane groups; masked tokens become
    /// zeros.
    pub(crate) fn copy(&self, ops: &Ops<T>, out: &mut [T]) -> Result<(), OutOfRange> {
        let (e, stride) = (self.array.ncols(), padded(self.array.ncols()));
        let (mut squares, mut strided) = (T::ZERO, false);
        match self.array.slice(s![self.tokens.clone(), ..]).to_slice() {
            Some(whole) if e == stride && self.valid.is_none() => {
                squares = (ops.copy)(whole, &mut out[..whole.len()]);
            }
            _ => {
                for (out, j) in out.chunks_exact_mut(stride).zip(self.tokens.clone()) {
                    let (row, padding) = out.split_at_mut(e);
                    padding.fill(T::zero());
                    if !self.is_valid(j) {
                        row.fill(T::zero());
                    } else if let Some(slice) = self.array.row(j).to_slice() {
                        squares += (ops.copy)(slice, row);
                    } else {
                        strided = true;
                        row.iter_mut().zip(self.array.row(j)).for_each(|(to, &from)| *to = from);
                    }
                }
            }
        }
        if !strided && proves::<T>(squares) { Ok(()) } else { self.check() }
    }

    /// Whether every element of the valid tokens is in range.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        let limit = T::from_f64(T::LIMIT);
        let fits = |row: ArrayView1<'_, T>| match row.to_slice() {
            Some(row) => (T::ops().all_within)(row, limit),
            None => row.iter().all(|&x| within(x, limit)),
        };
        let all = match (self.array.slice(s![self.tokens.clone(), ..]).to_slice(), self.valid) {
            (Some(rows), None) => (T::ops().all_within)(rows, limit),
            _ => self.tokens.clone().filter(|&j| self.is_valid(j)).all(|j| fits(self.array.row(j))),
        };
        if all { Ok(()) } else { Err(OutOfRange) }
    }
}

/// Whether a sum of squares is too small for any element to be out of range.
fn proves<T: Real>(squares: T) -> bool {
    squares <= T::from_f64(T::LIMIT * T::LIMIT)
}

/// `out = sums / total`, zeros where there was nothing to sum. Whatever has not been finite on the
/// way makes the total no number.
pub(crate) fn normalise<T: Real>(
    sums: &[T],
    total: T,
    out: ArrayViewMut1<'_, T>,
) -> Result<(), OutOfRange> {
    put_row(sums, if total > T::ZERO { T::ONE / total } else { T::ZERO }, out);
    if total < -T::NEG_INFINITY { Ok(()) } else { Err(OutOfRange) }
}

/// `out = factor · row`, without the row's padding.
pub(crate) fn put_row<T: Real>(row: &[T], factor: T, mut out: ArrayViewMut1<'_, T>) {
    match out.as_slice_mut() {
        Some(out) => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * factor),
        None => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * factor),
    }
}
