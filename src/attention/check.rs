//! What every attention operator checks.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::ArrayRef3;

use crate::Real;
use crate::attention::Window;
use crate::attention::rows::{Rows, Valid};
use crate::attention::scratch::BLOCK;
use crate::check::{check_len, check_positive, within};
use crate::error::{Error, Result};
use crate::low::simd::LANES;
use crate::threads::{for_each, max_threads};

/// Largest dimension or number of heads: beyond it nothing of the kind could be allocated.
const MAX_SIZE: usize = 1 << 20;
/// Most elements of a state, all heads: 4 GiB in f32.
pub(crate) const MAX_STATE: usize = 1 << 30;
/// Largest σ·d. With it no product of an element in range by another, scaled and summed over d,
/// overflows an f32.
pub(crate) const MAX_SCALE: f64 = 1e6;

/// A size from 1 to [`MAX_SIZE`].
pub(crate) fn check_size(argument: &'static str, got: usize) -> Result<()> {
    check_positive(argument, got)?;
    if got > MAX_SIZE { Err(Error::TooLarge { argument, limit: MAX_SIZE, got }) } else { Ok(()) }
}

/// The softmax scale must be a positive number, and so small that no score of elements in range
/// overflows.
pub(crate) fn check_scale(scale: f64, dim: usize) -> Result<()> {
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
    let ring = window.map_or(0, |window| {
        let ring = window.back.saturating_add(1).saturating_mul(padded(window.chunk));
        ring.saturating_add(padded(window.kept))
    });
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

/// One window for each head: those given, or the one given for all.
pub(crate) fn each_head(
    argument: &'static str,
    windows: Vec<Window>,
    heads: usize,
) -> Result<Vec<Window>> {
    match windows.as_slice() {
        [] => Ok(windows),
        [window] => Ok(vec![*window; heads]),
        _ => check_len(argument, heads, windows.len()).map(|()| windows),
    }
}

/// Windows are possible, and sinks fit beside each of them.
pub(crate) fn check_exact_part(windows: &[Window], sinks: usize) -> Result<()> {
    windows.iter().try_for_each(|window| window.check())?;
    match windows.iter().map(|window| window.chunk).min() {
        None if sinks > 0 => Err(Error::Conflict { argument: "sinks", other: "no local window" }),
        Some(chunk) if sinks > chunk.min(BLOCK) => {
            let limit = chunk.min(BLOCK);
            Err(Error::TooLarge { argument: "sinks", limit, got: sinks })
        }
        _ => Ok(()),
    }
}

/// Every element of every valid token is in range: all heads at once, on all threads.
pub(crate) fn check_all<T: Real>(
    argument: &'static str,
    x: &ArrayRef3<T>,
    valid: Valid<'_>,
) -> Result<()> {
    let clean = AtomicBool::new(true);
    for_each(&mut vec![(); max_threads()], x.outer_iter(), |(), rows| {
        let rows = Rows { array: rows, tokens: 0..rows.nrows(), valid };
        if rows.check().is_err() {
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
