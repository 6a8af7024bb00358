//! Text from a model, one token at a time.

use std::time::Instant;

use dijiang::layer::Attention;
use ndarray::ArrayView1;
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};

use super::error::Result;
use super::stream::Stream;
use super::tokens::Token;

/// How the next token is chosen.
pub(crate) struct Sampling {
    /// 0 takes the likeliest.
    pub(crate) temperature: f64,
    pub(crate) seed: u64,
}

/// Continues `prompt` by `count` tokens; returns them and the seconds each step took on average.
pub(crate) fn generate<A: Attention<f32>>(
    stream: &mut Stream<'_, A>,
    prompt: &[Token],
    count: usize,
    sampling: &Sampling,
    tick: impl Fn(),
) -> Result<(Vec<Token>, f64)> {
    let mut random = ChaCha12Rng::seed_from_u64(sampling.seed);
    let mut logits = stream.prefill(prompt)?;
    let mut tokens = Vec::with_capacity(count);
    let start = Instant::now();
    for _ in 0..count {
        let token = sample(logits.view(), sampling.temperature, random.random());
        tokens.push(token);
        logits = stream.step(token)?;
        tick();
    }
    Ok((tokens, start.elapsed().as_secs_f64() / count.max(1) as f64))
}

/// The token at which the cumulative distribution softmax(logits / temperature) passes `uniform`, a
/// number in [0, 1).
pub(crate) fn sample(logits: ArrayView1<'_, f32>, temperature: f64, uniform: f64) -> Token {
    let (likeliest, &max) =
        (0..).zip(&logits).max_by(|a, b| a.1.total_cmp(b.1)).unwrap_or((0, &0.0));
    if temperature == 0.0 {
        return likeliest;
    }
    let weights: Vec<f64> =
        logits.iter().map(|&logit| (f64::from(logit - max) / temperature).exp()).collect();
    let mut rest = uniform * weights.iter().sum::<f64>();
    for (token, weight) in (0..).zip(weights) {
        rest -= weight;
        if rest < 0.0 {
            return token;
        }
    }
    likeliest
}
