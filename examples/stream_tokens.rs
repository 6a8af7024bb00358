//! What does one token cost after 100, 1 000, 10 000 … tokens, in time and in memory?
//!
//! ```sh
//! cargo run --release --example stream_tokens
//! ```

use std::time::Instant;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use dijiang::attention::KeyMask;
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use ndarray::{Array, Array1, Array2};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Model dimension D: 4 heads of 64.
const D: usize = 256;
/// Steps timed at each length.
const STEPS: usize = 64;

fn main() -> dijiang::Result<()> {
    let mut random = ChaCha12Rng::seed_from_u64(7);
    let mut normal = |rows: usize, scale: f32| -> Array2<f32> {
        Array::from_shape_simple_fn((rows, D), || {
            let x: f32 = StandardNormal.sample(&mut random);
            scale * x
        })
    };
    let config = AttentionConfig::new(D, 4).with_rotary(Rotary::new(10_000.0));
    let weights =
        AttentionWeights::new(normal(D, 0.06), normal(D, 0.06), normal(D, 0.06), normal(D, 0.06));
    let softmax = SoftmaxAttention::new(config, weights)?;
    let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    let tokens = normal(1000, 1.0);

    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "tokens so far",
        "linear: µs per token",
        "state, kB",
        "softmax: µs per token",
        "key-value cache, kB",
    ]);
    let (mut state, mut cache) = (linear.new_state(), softmax.new_state());
    for length in [100, 1_000, 4_000, 16_000] {
        let seen = state.position();
        let linear_time = advance(&linear, &mut state, &tokens, length - seen)?;
        let softmax_time = advance(&softmax, &mut cache, &tokens, length - seen)?;
        let number = |x: f64| format!("{x:.1}");
        let kb = |bytes: usize| (bytes / 1000).to_string();
        table.add_row([
            length.to_string(),
            number(linear_time),
            kb(state.bytes()),
            number(softmax_time),
            kb(cache.bytes()),
        ]);
    }
    println!("{table}");
    Ok(())
}

/// Feeds `count` more tokens to a stream, the last of them one by one; returns the microseconds one
/// of these took.
fn advance<A: Attention<f32>>(
    layer: &A,
    state: &mut A::State,
    tokens: &Array2<f32>,
    count: usize,
) -> dijiang::Result<f64> {
    let mut rest = count.saturating_sub(STEPS);
    while rest > 0 {
        let piece = rest.min(tokens.nrows());
        layer.prefill(state, &tokens.slice(ndarray::s![..piece, ..]), KeyMask::All)?;
        rest -= piece;
    }
    let mut out = Array1::zeros(D);
    let start = Instant::now();
    for token in tokens.rows().into_iter().take(count.min(STEPS)) {
        layer.step(state, &token, &mut out)?;
    }
    Ok(start.elapsed().as_secs_f64() * 1e6 / count.min(STEPS) as f64)
}
