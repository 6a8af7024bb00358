//! What the doors of every attention operator look at.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::ArrayRef3;

use crate::attention::rows::{Valid, tokens_fit};
use crate::attention::workspace::Sizes;
use crate::attention::{KeyMask, Window};
use crate::error::{Error, Result, check_len, check_positive, check_shape, within};
use crate::real::Real;
use crate::simd::LANES;
use crate::threads::{for_each, max_threads};

/// Largest dimension or number of heads: beyond it nothing of the kind could be allocated.
const MAX_SIZE: usize = 1 << 20;
/// Most elements of a state, all heads: 4 GiB in f32.
const MAX_STATE: usize = 1 << 30;
/// Largest σ·d. With it no product of an element in range by another, scaled and summed over d,
/// overflows an f32.
const MAX_SCALE: f64 = 1e6;

/// A size from 1 to [`MAX_SIZE`].
pub(super) fn check_size(argument: &'static str, got: usize) -> Result<()> {
    check_positive(argument, got)?;
    if got > MAX_SIZE { Err(Error::TooLarge { argument, limit: MAX_SIZE, got }) } else { Ok(()) }
}

/// The softmax scale must be a positive number, and so small that no score of elements in range
/// overflows.
pub(super) fn check_scale(scale: f64, dim: usize) -> Result<()> {
    if scale > 0.0 && scale * dim as f64 <= MAX_SCALE {
        Ok(())
    } else {
        Err(Error::Value {
            argument: "scale", expected: "positive and at most 10⁶/d", got: scale
        })
    }
}

/// Whether a state of this shape, all heads, and the scratch for one can be made at all.
pub(crate) fn check_state_size(
    heads: usize,
    dim: usize,
    features: usize,
    value_dim: usize,
    window: Option<Window>,
) -> Result<()> {
    let padded = |n: usize| n.saturating_add(LANES);
    let ring = window
        .map_or(0, |window| window.back.saturating_add(1).saturating_mul(padded(window.chunk)));
    // Sums and what rounding keeps out of them, normaliser, reference and pending keys; and the
    // keys and values of the ring.
    let far = features.saturating_mul(2 * padded(value_dim) + 32);
    let window = ring.saturating_mul(padded(dim).saturating_add(padded(value_dim)));
    let got = heads.saturating_mul(far.saturating_add(window));
    let limit = MAX_STATE;
    if got > limit {
        Err(Error::TooLarge { argument: "elements of a state", limit, got })
    } else {
        Ok(())
    }
}

/// Whether the arguments of a pass over many tokens fit each other.
pub(super) fn check_shapes<T: Real>(
    heads: usize,
    kv_heads: usize,
    sizes: Sizes,
    q: &ArrayRef3<T>,
    k: &ArrayRef3<T>,
    v: &ArrayRef3<T>,
    mask: KeyMask<'_>,
    out: &ArrayRef3<T>,
) -> Result<()> {
    let n = q.shape()[1];
    check_shape("q", q, &[heads, n, sizes.dim])?;
    check_shape("out", out, &[heads, n, sizes.value_dim])?;
    if n == 0 {
        return Err(Error::Empty { argument: "q" });
    }
    check_key_shapes(kv_heads, sizes, k, v, mask)
}

/// Whether keys, values and their mask fit each other.
pub(super) fn check_key_shapes<T: Real>(
    kv_heads: usize,
    sizes: Sizes,
    k: &ArrayRef3<T>,
    v: &ArrayRef3<T>,
    mask: KeyMask<'_>,
) -> Result<()> {
    let n = k.shape()[1];
    check_shape("k", k, &[kv_heads, n, sizes.dim])?;
    check_shape("v", v, &[kv_heads, n, sizes.value_dim])?;
    if n == 0 {
        return Err(Error::Empty { argument: "k" });
    }
    mask.valid().map_or(Ok(()), |valid| check_len("mask", n, valid.len()))
}

/// Whether every element is in range.
pub(super) fn check_tokens<T: Real>(
    q: &ArrayRef3<T>,
    k: &ArrayRef3<T>,
    v: &ArrayRef3<T>,
    mask: KeyMask<'_>,
) -> Result<()> {
    check_all("q", q, None)?;
    check_keys(k, v, mask)
}

/// Whether every element of a valid key and its value is in range.
pub(super) fn check_keys<T: Real>(
    k: &ArrayRef3<T>,
    v: &ArrayRef3<T>,
    mask: KeyMask<'_>,
) -> Result<()> {
    check_all("k", k, mask.valid())?;
    check_all("v", v, mask.valid())
}

/// Every element of every valid token is in range: all heads at once, on all threads.
fn check_all<T: Real>(argument: &'static str, x: &ArrayRef3<T>, valid: Valid<'_>) -> Result<()> {
    let clean = AtomicBool::new(true);
    for_each(&mut vec![(); max_threads()], x.outer_iter(), |(), rows| {
        if !tokens_fit(rows, 0..rows.nrows(), valid) {
            clean.store(false, Ordering::Relaxed);
        }
    });
    if clean.into_inner() {
        return Ok(());
    }
    let (tokens, limit) = (x.shape()[1], T::from_f64(T::LIMIT));
    let bad = x
        .rows()
        .into_iter()
        .enumerate()
        .filter(|(row, _)| valid.is_none_or(|valid| valid[row % tokens]));
    let mut bad =
        bad.flat_map(|(row, x)| x.into_iter().enumerate().map(move |(i, &value)| (row, i, value)));
    match bad.find(|(_, _, value)| !within(*value, limit)) {
        Some((row, i, value)) => Err(Error::NonFinite {
            argument,
            index: row * x.shape()[2] + i,
            limit: T::LIMIT,
            got: value.to_f64(),
        }),
        None => Ok(()),
    }
}
