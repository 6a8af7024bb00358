//! The exchange itself: softmax layers out, linear layers in, and their calibration.

use std::ops::ControlFlow;
use std::time::Instant;

use dijiang::attention::Near;
use dijiang::layer::{CalibrateOptions, CalibrateReport, DijiangAttention, DijiangOptions, Fit, SoftmaxAttention};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use crate::args::Args;
use crate::error::{Error, Result};
use crate::llama::Llama;

/// The softmax model with its attention exchanged in five ways.
pub(crate) struct Converted {
    /// Linear attention and the exact near part, the maps as they are made.
    pub(crate) exchanged: Llama<DijiangAttention<f32>>,
    /// The same, the maps calibrated in closed form.
    pub(crate) closed_form: Llama<DijiangAttention<f32>>,
    /// The same, the maps calibrated by gradient.
    pub(crate) calibrated: Llama<DijiangAttention<f32>>,
    /// The near part, and nothing for older tokens.
    pub(crate) near_only: Llama<SoftmaxAttention<f32>>,
    /// Linear attention for all tokens, the maps calibrated.
    pub(crate) pure: Llama<DijiangAttention<f32>>,
    /// What calibration by gradient did to each layer: with the near part, and without.
    pub(crate) reports: [Vec<CalibrateReport>; 2],
    /// Time calibration by gradient took, both models together.
    pub(crate) calibration_seconds: f64,
}

/// Makes all five. Calibration reads `samples` through the softmax model; `tick` is called after every layer.
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

    let closed = CalibrateOptions::new().with_steps(0);
    let again = || exchanged.exchange(|layer| Ok(layer.clone()));
    let (mut models, mut calibrated) = ([again()?], [again()?, pure]);
    calibrate(softmax, &mut models, std::array::from_ref(&closed), samples, &tick)?;
    let [closed_form] = models;

    let start = Instant::now();
    let projection = if args.dense { Fit::Train } else { Fit::Keep };
    let trained = closed
        .with_projection(projection)
        .with_steps(args.steps())
        .with_batch(args.batch())
        .with_learning_rate(args.learning_rate)
        .with_seed(args.seed);
    let reports = calibrate(softmax, &mut calibrated, &[trained.clone(), trained.with_decay(Fit::Train)], samples, &tick)?;
    let calibration_seconds = start.elapsed().as_secs_f64();
    let [calibrated, pure] = calibrated;
    Ok(Converted { exchanged, closed_form, calibrated, near_only, pure, reports, calibration_seconds })
}

/// Calibrates every layer of `models`, each by its own options, on the hidden states that the layer in its place in `softmax` is given.
///
/// Goes block by block, so that the hidden states of one block are all it has to hold.
fn calibrate<const MODELS: usize>(
    softmax: &Llama<SoftmaxAttention<f32>>,
    models: &mut [Llama<DijiangAttention<f32>>; MODELS],
    options: &[CalibrateOptions; MODELS],
    samples: &[&[u8]],
    tick: impl Fn(),
) -> Result<[Vec<CalibrateReport>; MODELS]> {
    let mut reports = [const { Vec::new() }; MODELS];
    let mut hidden: Vec<Array2<f32>> = samples.iter().map(|sample| softmax.embed(sample)).collect();
    for l in 0..softmax.config().layers {
        let inputs: Vec<Array2<f32>> = hidden.par_iter().map(|x| softmax.attention_input(l, x)).collect();
        let views: Vec<ArrayView2<'_, f32>> = inputs.iter().map(|input| input.view()).collect();
        for (model, (options, reports)) in models.iter_mut().zip(options.iter().zip(&mut reports)) {
            let report = model.attention_mut()[l].calibrate(&views, options, |_| ControlFlow::Continue(()));
            reports.push(report.map_err(Error::in_layer(l))?);
            tick();
        }
        hidden.par_iter_mut().try_for_each(|x| softmax.block(l, x))?;
    }
    Ok(reports)
}
