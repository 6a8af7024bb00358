//! Sequences of different lengths in one array: packed one after another, or padded to one length.

use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, s};

use crate::Real;
use crate::attention::{KeyMask, ranges};
use crate::check::{check_len, check_room, check_shape};
use crate::error::{Error, Result};

/// On which side of its tokens a sequence is padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Padding {
    /// The tokens come first.
    #[default]
    Right,
    /// The tokens come last, so that the last tokens of all sequences stand in one column.
    Left,
}

/// Outputs of `work` for every sequence that has tokens.
pub(super) fn each<T: Real>(
    x: &ArrayRef2<T>,
    offsets: &[usize],
    mask: KeyMask<'_>,
    mut work: impl FnMut(usize, &ArrayRef2<T>, KeyMask<'_>) -> Result<Array2<T>>,
) -> Result<Array2<T>> {
    if x.is_empty() {
        return Err(Error::Empty { argument: "x" });
    }
    if let KeyMask::Valid(valid) = mask {
        check_len("mask", x.nrows(), valid.len())?;
    }
    check_room::<T>("hidden states", x.shape())?;
    let mut out = Array2::zeros(x.raw_dim());
    for (i, tokens) in ranges(offsets).enumerate().filter(|(_, tokens)| !tokens.is_empty()) {
        let mask = mask.of(tokens.clone());
        out.slice_mut(s![tokens.clone(), ..]).assign(&work(i, &x.slice(s![tokens, ..]), mask)?);
    }
    Ok(out)
}

/// Packs the tokens of padded sequences for `work` and puts its outputs back in their places.
pub(super) fn padded<T: Real>(
    model_dim: usize,
    x: &ArrayRef3<T>,
    lengths: &[usize],
    padding: Padding,
    work: impl FnOnce(&Array2<T>, &[usize]) -> Result<Array2<T>>,
) -> Result<Array3<T>> {
    let (b, n, _) = x.dim();
    check_shape("x", x, &[b, n, model_dim])?;
    check_len("lengths", b, lengths.len())?;
    if let Some(&got) = lengths.iter().find(|&&length| length > n) {
        return Err(Error::TooLarge { argument: "lengths", limit: n, got });
    }
    let ends = lengths.iter().scan(0, |end, length| {
        *end += length;
        Some(*end)
    });
    let offsets: Vec<usize> = std::iter::once(0).chain(ends).collect();
    let own = |length: usize| match padding {
        Padding::Right => 0..length,
        Padding::Left => n - length..n,
    };
    // The sequences' own tokens, and outputs for all.
    check_room::<T>("hidden states", &[2, b, n, model_dim])?;
    let mut rows = Array2::zeros((offsets[b], model_dim));
    for ((x, &length), tokens) in x.outer_iter().zip(lengths).zip(ranges(&offsets)) {
        rows.slice_mut(s![tokens, ..]).assign(&x.slice(s![own(length), ..]));
    }
    let rows = work(&rows, &offsets)?;
    let mut out = Array3::zeros(x.raw_dim());
    for ((mut out, &length), tokens) in out.outer_iter_mut().zip(lengths).zip(ranges(&offsets)) {
        out.slice_mut(s![own(length), ..]).assign(&rows.slice(s![tokens, ..]));
    }
    Ok(out)
}
