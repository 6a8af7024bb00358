//! How well a text is predicted, the comparison with golden logits, and that of two layers.

use std::path::Path;

use dijiang::attention::KeyMask;
use dijiang::checkpoint::Tensors;
use dijiang::layer::Attention;
use ndarray::{Array2, Axis, s};
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

/// How well a model predicts a text.
#[derive(Debug, Clone)]
pub(crate) struct Score {
    /// Mean −ln of the likelihood of the next token in each window, in nats.
    pub(crate) windows: Vec<f64>,
    /// Tokens predicted in each window.
    context: usize,
    /// Bytes these tokens stand for, all windows together.
    bytes: usize,
}

impl Score {
    /// Mean −ln of the likelihood of the next token.
    pub(crate) fn nats(&self) -> f64 {
        self.windows.iter().sum::<f64>() / self.windows.len() as f64
    }

    /// e to the power of [`nats`](Self::nats): between so many tokens that are equally likely the
    /// model would be as undecided.
    pub(crate) fn perplexity(&self) -> f64 {
        self.nats().exp()
    }

    /// −log₂ of the likelihood of the text over its length in bytes, which does not depend on how
    /// the text is cut into tokens.
    pub(crate) fn bits_per_byte(&self) -> f64 {
        let tokens = (self.windows.len() * self.context) as f64;
        self.nats() / std::f64::consts::LN_2 * (tokens / self.bytes as f64)
    }
}

/// Predicts the first `windows` windows, each read on its own from its beginning.
///
/// `tick` is called after every window. Windows are shared among threads; the result does not
/// depend on how.
pub(crate) fn score<A: Attention<f32>>(
    model: &Llama<A>,
    text: &Text,
    windows: usize,
    tick: impl Fn() + Sync,
) -> Result<Score> {
    let window = |k| -> Result<f64> {
        let surprises = model.surprises(text.input(k), text.targets(k))?;
        tick();
        Ok(surprises.iter().sum::<f64>() / surprises.len() as f64)
    };
    Ok(Score {
        windows: (0..windows).into_par_iter().map(window).collect::<Result<_>>()?,
        context: text.window(),
        bytes: (0..windows).map(|k| text.target_bytes(k)).sum(),
    })
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
    let text = Text::read(&directory.join("valid.txt"), model.tokenizer(), model.config().context)?;
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
