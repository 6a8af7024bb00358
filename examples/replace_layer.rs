//! How do I replace one softmax layer of my own model?
//!
//! ```sh
//! cargo run --release --example replace_layer
//! ```

use std::ops::ControlFlow;

use dijiang::attention::KeyMask;
use dijiang::calibrate::CalibrateOptions;
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use ndarray::{Array, Array2};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Tokens per sequence.
const N: usize = 2048;
/// Model dimension D; 8 query heads of 32 share 2 key-value heads.
const D: usize = 256;

fn main() -> dijiang::Result<()> {
    let mut random = ChaCha12Rng::seed_from_u64(7);
    let mut normal = |rows: usize, cols: usize, scale: f32| -> Array2<f32> {
        Array::from_shape_simple_fn((rows, cols), || {
            let x: f32 = StandardNormal.sample(&mut random);
            scale * x
        })
    };

    // 1. The layer as trained: Hugging Face layout, [out, in]. Random numbers stand in for your
    //    weights and hidden states here.
    let config = AttentionConfig::new(D, 8).with_kv_heads(2).with_rotary(Rotary::new(10_000.0));
    let kv = 2 * D / 8;
    let weights = AttentionWeights::new(
        normal(D, D, 0.09),
        normal(kv, D, 0.09),
        normal(kv, D, 0.06),
        normal(D, D, 0.06),
    );
    let softmax = SoftmaxAttention::new(config, weights)?;
    let mean = normal(1, D, 0.5);
    let mut hidden = || &normal(N, D, 1.0) + &mean;
    let (samples, unseen) = ([hidden(), hidden()], hidden());

    // 2. The exchange: same weights, linear attention.
    let mut linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    let exchanged = linear.forward(&unseen, KeyMask::All)?;

    // 3. Calibration on some hidden states, the ones this layer receives in the model.
    let report = linear.calibrate(
        &samples.each_ref().map(|x| x.view()),
        &CalibrateOptions::new(),
        |_| ControlFlow::Continue(()),
    )?;
    let calibrated = linear.forward(&unseen, KeyMask::All)?;

    let expected = softmax.forward(&unseen, KeyMask::All)?;
    let error = |found: &Array2<f32>| {
        ((found - &expected).mapv(|x| x * x).sum() / expected.mapv(|x| x * x).sum()).sqrt()
    };
    println!(
        "head outputs on the samples, error before and after calibration: {:.4}, {:.4}",
        report.before(),
        report.after()
    );
    println!(
        "layer output on an unseen sequence, relative error: exchanged {:.4}, calibrated {:.4}",
        error(&exchanged),
        error(&calibrated)
    );
    Ok(())
}
