//! The exchange itself: softmax layers out, linear layers in, and their calibration.

use std::ops::ControlFlow;
use std::time::Instant;

use dijiang::attention::Near;
use dijiang::layer::{CalibrateOptions, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::args::Args;
use crate::error::{Error, Result};
use crate::llama::Llama;

/// The softmax model with its attention exchanged in four ways.
pub(crate) struct Converted {
    /// Linear attention and the exact near part, the maps as they are made.
    pub(crate) exchanged: Llama<DijiangAttention<f32>>,
    /// The same, the maps calibrated.
    pub(crate) calibrated: Llama<DijiangAttention<f32>>,
    /// The near part, and nothing for older tokens.
    pub(crate) near_only: Llama<SoftmaxAttention<f32>>,
    /// Linear attention for all tokens, the maps calibrated.
    pub(crate) pure: Llama<DijiangAttention<f32>>,
    /// Time calibration took, both models together.
    pub(crate) calibration_seconds: f64,
}

/// Makes all four. Calibration reads `samples` through the softmax model; `tick` is called after every layer.
pub(crate) fn convert(
    softmax: &Llama<SoftmaxAttention<f32>>,
    near: Near,
    args: &Args,
    samples: &[&[u8]],
    tick: impl Fn(),
) -> Result<Converted> {
    let options = |near| DijiangOptions::new().with_near(near).with_blocks(args.blocks).with_seed(args.seed);
    let near_only = softmax.exchange(|layer| layer.clone().with_near(Some(near)))?;
    let exchanged = softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options(Some(near))))?;
    let pure = softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options(None)))?;

    let start = Instant::now();
    let mut models = [exchanged.exchange(|layer| Ok(layer.clone()))?, pure];
    calibrate(softmax, &mut models, samples, tick)?;
    let calibration_seconds = start.elapsed().as_secs_f64();
    let [calibrated, pure] = models;
    Ok(Converted { exchanged, calibrated, near_only, pure, calibration_seconds })
}

/// Calibrates every layer of `models` on the hidden states that the layer in its place in `softmax` is given.
///
/// Goes block by block, so that the hidden states of one block are all it has to hold.
fn calibrate(
    softmax: &Llama<SoftmaxAttention<f32>>,
    models: &mut [Llama<DijiangAttention<f32>>],
    samples: &[&[u8]],
    tick: impl Fn(),
) -> Result<()> {
    let mut hidden: Vec<Array2<f32>> = samples.iter().map(|sample| softmax.embed(sample)).collect();
    for l in 0..softmax.config().layers {
        let inputs: Vec<Array2<f32>> = hidden.par_iter().map(|x| softmax.attention_input(l, x)).collect();
        let views: Vec<ArrayView2<'_, f32>> = inputs.iter().map(|input| input.view()).collect();
        for model in &mut *models {
            let layer = &mut model.attention_mut()[l];
            let told = layer.calibrate(&views, &CalibrateOptions::new(), |_| {
                tick();
                ControlFlow::Continue(())
            });
            told.map_err(Error::in_layer(l))?;
        }
        hidden.par_iter_mut().try_for_each(|x| softmax.block(l, x))?;
    }
    Ok(())
}
