//! Between the caller's arrays, whose rows are tokens, and the panels of the inner loops.

use std::ops::Range;

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut1, s};

use crate::error::within;
use crate::real::Real;
use crate::simd::{LANES, Ops, padded};

/// The tokens a block of work may look at: `None` for all.
pub(super) type Valid<'a> = Option<&'a [bool]>;

/// Whether token `j` may be looked at.
pub(super) fn is_valid(valid: Valid<'_>, j: usize) -> bool {
    valid.is_none_or(|valid| valid[j])
}

/// Rows `tokens` of `rows` become the columns of `panel` `[d, padded]`, multiplied by `scale`;
/// masked tokens and the columns that fill up the last lane group become zeros. Returns whether
/// every element taken is in range.
pub(super) fn gather<T: Real>(
    ops: &Ops<T>,
    rows: ArrayView2<'_, T>,
    tokens: Range<usize>,
    valid: Valid<'_>,
    scale: T,
    panel: &mut [T],
    zeros: &[T],
) -> bool {
    let (d, width) = (rows.ncols(), padded(tokens.len()));
    let zeros = &zeros[..d];
    let (mut squares, mut strided) = (T::ZERO, false);
    for group in (0..width).step_by(LANES) {
        let token = |lane: usize| {
            Some(tokens.start + group + lane).filter(|&j| j < tokens.end && is_valid(valid, j))
        };
        let mut contiguous = true;
        let columns: [&[T]; LANES] = std::array::from_fn(|lane| match token(lane) {
            Some(j) => rows.row(j).to_slice().unwrap_or_else(|| {
                contiguous = false;
                zeros
            }),
            None => zeros,
        });
        squares += (ops.gather)(&columns, scale, &mut panel[group..], width);
        if !contiguous {
            strided = true;
            for (lane, j) in (0..LANES).filter_map(|lane| token(lane).map(|j| (lane, j))) {
                for (i, &value) in rows.row(j).iter().enumerate() {
                    panel[i * width + group + lane] = value * scale;
                }
            }
        }
    }
    !strided && proves::<T>(squares) || tokens_fit(rows, tokens, valid)
}

/// Rows `tokens` of `rows` one after the other in `out`, padded to whole lane groups; masked tokens
/// become zeros. Returns whether every element taken is in range.
pub(super) fn copy_rows<T: Real>(
    ops: &Ops<T>,
    rows: ArrayView2<'_, T>,
    tokens: Range<usize>,
    valid: Valid<'_>,
    out: &mut [T],
) -> bool {
    let (e, stride) = (rows.ncols(), padded(rows.ncols()));
    let (mut squares, mut strided) = (T::ZERO, false);
    match rows.slice(s![tokens.clone(), ..]).to_slice() {
        Some(whole) if e == stride && valid.is_none() => {
            squares = (ops.copy)(whole, &mut out[..whole.len()])
        }
        _ => {
            for (out, j) in out.chunks_exact_mut(stride).zip(tokens.clone()) {
                let (row, padding) = out.split_at_mut(e);
                padding.fill(T::zero());
                if !is_valid(valid, j) {
                    row.fill(T::zero());
                } else if let Some(slice) = rows.row(j).to_slice() {
                    squares += (ops.copy)(slice, row);
                } else {
                    strided = true;
                    row.iter_mut().zip(rows.row(j)).for_each(|(to, &from)| *to = from);
                }
            }
        }
    }
    !strided && proves::<T>(squares) || tokens_fit(rows, tokens, valid)
}

/// Whether a sum of squares is too small for any element to be out of range.
fn proves<T: Real>(squares: T) -> bool {
    squares <= T::from_f64(T::LIMIT * T::LIMIT)
}

/// Whether every element of the valid tokens is in range.
pub(super) fn tokens_fit<T: Real>(
    rows: ArrayView2<'_, T>,
    tokens: Range<usize>,
    valid: Valid<'_>,
) -> bool {
    let limit = T::from_f64(T::LIMIT);
    let token_fits = |row: ArrayView1<'_, T>| match row.to_slice() {
        Some(row) => (T::ops().all_within)(row, limit),
        None => row.iter().all(|&x| within(x, limit)),
    };
    match (rows.slice(s![tokens.clone(), ..]).to_slice(), valid) {
        (Some(rows), None) => (T::ops().all_within)(rows, limit),
        _ => tokens.filter(|&j| is_valid(valid, j)).all(|j| token_fits(rows.row(j))),
    }
}

/// `out = sums / total`, zeros where there was nothing to sum.
pub(super) fn normalise<T: Real>(sums: &[T], total: T, out: ArrayViewMut1<'_, T>) {
    put_row(sums, if total > T::zero() { T::one() / total } else { T::zero() }, out);
}

/// `out = factor · row`, without the row's padding.
pub(super) fn put_row<T: Real>(row: &[T], factor: T, mut out: ArrayViewMut1<'_, T>) {
    match out.as_slice_mut() {
        Some(out) => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * factor),
        None => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * factor),
    }
}
