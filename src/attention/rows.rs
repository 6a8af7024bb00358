//! Between the caller's arrays, whose rows are tokens, and the panels of the inner loops.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayViewMut1};

use crate::real::Real;
use crate::simd::{LANES, Ops, padded};

/// The tokens a block of work may look at: `None` for all.
pub(super) type Valid<'a> = Option<&'a [bool]>;

/// Whether token `j` may be looked at.
pub(super) fn is_valid(valid: Valid<'_>, j: usize) -> bool {
    valid.is_none_or(|valid| valid[j])
}

/// Rows `tokens` of `rows` become the columns of `panel` `[d, padded]`, multiplied by `scale`; masked tokens and the
/// columns that fill up the last lane group become zeros.
pub(super) fn gather<T: Real>(
    ops: &Ops<T>,
    rows: ArrayView2<'_, T>,
    tokens: Range<usize>,
    valid: Valid<'_>,
    scale: T,
    panel: &mut [T],
    zeros: &[T],
) {
    let (d, width) = (rows.ncols(), padded(tokens.len()));
    let zeros = &zeros[..d];
    for group in (0..width).step_by(LANES) {
        let token = |lane: usize| Some(tokens.start + group + lane).filter(|&j| j < tokens.end && is_valid(valid, j));
        let mut contiguous = true;
        let columns: [&[T]; LANES] = std::array::from_fn(|lane| match token(lane) {
            Some(j) => rows.row(j).to_slice().unwrap_or_else(|| {
                contiguous = false;
                zeros
            }),
            None => zeros,
        });
        (ops.gather)(&columns, scale, &mut panel[group..], width);
        if !contiguous {
            for (lane, j) in (0..LANES).filter_map(|lane| token(lane).map(|j| (lane, j))) {
                for (i, &value) in rows.row(j).iter().enumerate() {
                    panel[i * width + group + lane] = value * scale;
                }
            }
        }
    }
}

/// Rows `tokens` of `rows` one after the other in `out`, padded to whole lane groups; masked tokens become zeros.
pub(super) fn copy_rows<T: Real>(rows: ArrayView2<'_, T>, tokens: Range<usize>, valid: Valid<'_>, out: &mut [T]) {
    let (e, stride) = (rows.ncols(), padded(rows.ncols()));
    for (out, j) in out.chunks_exact_mut(stride).zip(tokens) {
        let (row, padding) = out.split_at_mut(e);
        padding.fill(T::zero());
        if !is_valid(valid, j) {
            row.fill(T::zero());
        } else if let Some(slice) = rows.row(j).to_slice() {
            row.copy_from_slice(slice);
        } else {
            row.iter_mut().zip(rows.row(j)).for_each(|(to, &from)| *to = from);
        }
    }
}

/// `out = sums / total`, zeros where there was nothing to sum.
pub(super) fn normalise<T: Real>(sums: &[T], total: T, mut out: ArrayViewMut1<'_, T>) {
    let factor = if total > T::zero() { T::one() / total } else { T::zero() };
    match out.as_slice_mut() {
        Some(out) => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum * factor),
        None => out.iter_mut().zip(sums).for_each(|(out, &sum)| *out = sum * factor),
    }
}
