//! What is measured on: softmax layers, each with the hidden states it is given.

use dijiang::layer::{AttentionConfig, AttentionWeights, SoftmaxAttention};
use ndarray::{Array, Array2};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

use crate::lm::llama::Llama;
use crate::lm::text::Text;
use crate::lm::walk::Walk;
use crate::{Args, Result};

/// A kind of queries, keys and values.
pub(crate) struct Input {
    pub(crate) name: String,
    pub(crate) layers: Vec<Layer>,
}

/// A layer and its hidden states, one array `[n, D]` per window.
pub(crate) struct Layer {
    pub(crate) softmax: SoftmaxAttention<f32>,
    /// For centres, φ and calibration.
    pub(crate) calibration: Vec<Array2<f32>>,
    /// To measure on.
    pub(crate) measured: Vec<Array2<f32>>,
}

/// All attention layers of the language model in `args.model`, with what they are given on its two
/// texts.
pub(crate) fn language_model(args: &Args) -> Result<Input> {
    let model = Llama::load(&args.model)?;
    let read = |file: &str| Text::read(&args.model.join(file), model.tokenizer(), args.tokens);
    let texts = [read("calibration.txt")?, read("valid.txt")?];
    let mut walks = Vec::new();
    for (text, windows) in texts.iter().zip([args.calibration_windows, args.windows]) {
        walks.push(model.walk(&text.spread(windows).collect::<Vec<_>>()));
    }
    let mut layers = Vec::with_capacity(model.attention().len());
    for softmax in model.attention() {
        let mut inputs = walks.iter().map(Walk::inputs);
        let (calibration, measured) =
            (inputs.next().unwrap_or_default(), inputs.next().unwrap_or_default());
        layers.push(Layer { softmax: softmax.clone(), calibration, measured });
        walks.iter_mut().try_for_each(|walk| walk.advance(softmax))?;
    }
    let name =
        args.model.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    Ok(Input { name, layers })
}

/// One layer of `heads` heads whose queries and keys are standard normal times `args.scale` and
/// whose values are standard normal, no rotary embedding. Its projections pick the three out of
/// hidden states that hold them side by side.
pub(crate) fn gaussian(args: &Args, heads: usize, dim: usize) -> Result<Input> {
    let width = heads * dim;
    let pick = |part: usize, factor: f64| {
        Array2::from_shape_fn((width, 3 * width), |(i, j)| {
            if j == part * width + i { factor as f32 } else { 0.0 }
        })
    };
    let weights = AttentionWeights::new(
        pick(0, args.scale),
        pick(1, args.scale),
        pick(2, 1.0),
        pick(0, 1.0).reversed_axes(),
    );
    let softmax =
        SoftmaxAttention::new(AttentionConfig::new(3 * width, heads).with_head_dim(dim), weights)?;
    let mut rng = ChaCha12Rng::seed_from_u64(0);
    let mut draw = |windows: usize| {
        let window = |_| {
            Array::from_shape_simple_fn((args.tokens, 3 * width), || {
                StandardNormal.sample(&mut rng)
            })
        };
        (0..windows).map(window).collect()
    };
    let (calibration, measured) = (draw(args.calibration_windows), draw(args.windows));
    let name = format!("Gaussian, scale {}", args.scale);
    Ok(Input { name, layers: vec![Layer { softmax, calibration, measured }] })
}
