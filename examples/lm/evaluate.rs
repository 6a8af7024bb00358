//! Bits per byte, the comparison with golden logits, and that of two layers.

use std::path::Path;

use dijiang::attention::KeyMask;
use dijiang::checkpoint::Tensors;
use dijiang::layer::Attention;
use ndarray::{Array2, ArrayView1, Axis, s};
use rayon::prelude::*;

use super::error::{Error, Result};
use super::llama::Llama;
use super::text::Text;

/// Logits of the first window of the model's own `valid.txt`: `logits` after its first positions,
/// `logits_last64` after its last.
const GOLDEN: &str = "lm_kjv_logits_f32.safetensors";
/// Positions in each of the two.
const GOLDEN_POSITIONS: usize = 64;
/// Largest difference accepted.
const GOLDEN_LIMIT: f32 = 2e-3;

/// Mean negative log₂-likelihood of the next byte over the first `windows` windows, each read on
/// its own from its beginning.
///
/// `tick` is called after every window. Windows are shared among threads; the result does not
/// depend on how.
pub(crate) fn bits_per_byte<A: Attention<f32>>(
    model: &Llama<A>,
    text: &Text,
    windows: usize,
    tick: impl Fn() + Sync,
) -> Result<f64> {
    let window = |k| -> Result<f64> {
        let logits = model.forward(text.input(k))?;
        let nats: f64 = logits
            .rows()
            .into_iter()
            .zip(text.targets(k))
            .map(|(row, &target)| surprise(row, target))
            .sum();
        tick();
        Ok(nats / text.targets(k).len() as f64)
    };
    let nats: Vec<f64> = (0..windows).into_par_iter().map(window).collect::<Result<_>>()?;
    Ok(nats.iter().sum::<f64>() / windows as f64 / std::f64::consts::LN_2)
}

/// −ln softmax(logits)[target].
fn surprise(logits: ArrayView1<'_, f32>, target: u8) -> f64 {
    let max = logits.fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    sum.ln() + f64::from(max - logits[usize::from(target)])
}

/// The largest difference from the golden logits in the model's directory, if there are any; an
/// error if it is too large.
pub(crate) fn check_logits<A: Attention<f32>>(
    model: &Llama<A>,
    directory: &Path,
) -> Result<Option<f32>> {
    let path = directory.join(GOLDEN);
    if !path.exists() {
        return Ok(None);
    }
    let golden = Tensors::open_file(&path)?;
    let text = Text::read(&directory.join("valid.txt"), model.config().context)?;
    let logits = model.forward(text.input(0))?;
    let n = logits.nrows();
    let first = logits.slice(s![..n.min(GOLDEN_POSITIONS), ..]);
    let last = logits.slice(s![n.saturating_sub(GOLDEN_POSITIONS).., ..]);
    let mut found = 0.0_f32;
    for (name, ours) in [("logits", first), ("logits_last64", last)] {
        let theirs = golden.matrix::<f32>(name, ours.nrows(), ours.ncols())?;
        // Not `f32::max`: a NaN must not be passed over.
        found = (&ours - &theirs)
            .iter()
            .fold(found, |max, x| if x.abs() <= max { max } else { x.abs() });
    }
    match found <= GOLDEN_LIMIT {
        true => Ok(Some(found)),
        false => Err(Error::Golden { path, limit: GOLDEN_LIMIT, found }),
    }
}

/// How far a layer's outputs are from another one's on the same hidden states: Σ|ŷ − y|² / Σ|y −
/// ȳ|², 1 for a plain mean.
pub(crate) fn output_error(
    exact: &impl Attention<f32>,
    other: &impl Attention<f32>,
    sequences: &[Array2<f32>],
) -> dijiang::Result<f64> {
    let (mut difference, mut variance) = (0.0, 0.0);
    for x in sequences {
        let (expected, found) = (exact.forward(x, KeyMask::All)?, other.forward(x, KeyMask::All)?);
        let mean = expected.sum_axis(Axis(0)) / expected.nrows() as f32;
        difference += (found - &expected).iter().map(|d| f64::from(d * d)).sum::<f64>();
        variance += (expected - &mean).iter().map(|d| f64::from(d * d)).sum::<f64>();
    }
    Ok(difference / variance)
}
