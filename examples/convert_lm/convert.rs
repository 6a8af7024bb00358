//! The exchange itself: softmax layers out, linear layers in, and their calibration.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dijiang::attention::Window;
use dijiang::layer::{
    CalibrateOptions, CalibrateReport, ChooseOptions, ChooseReport, DijiangAttention,
    DijiangOptions, Fit, SoftmaxAttention,
};

use crate::args::Args;
use crate::lm::error::{Error, Result};
use crate::lm::llama::Llama;

/// The softmax model with its attention exchanged in five ways.
pub(crate) struct Converted {
    /// Liwindow attention and the exact local window, the maps as they are made.
    pub(crate) exchanged: Llama<DijiangAttention<f32>>,
    /// The same, the maps calibrated in closed form.
    pub(crate) closed_form: Llama<DijiangAttention<f32>>,
    /// The same, the maps calibrated by gradient; or the structure chosen as well.
    pub(crate) calibrated: Llama<DijiangAttention<f32>>,
    /// The local window, and nothing for older tokens.
    pub(crate) window_only: Llama<SoftmaxAttention<f32>>,
    /// Liwindow attention for all tokens, the maps calibrated.
    pub(crate) pure: Llama<DijiangAttention<f32>>,
    /// What calibration by gradient did to each layer: with the local window, and without.
    pub(crate) reports: [Vec<CalibrateReport>; 2],
    /// What was chosen for each layer, if that was asked for.
    pub(crate) choices: Vec<ChooseReport>,
    /// Time calibration by gradient took, both models together.
    pub(crate) calibration_seconds: f64,
}

/// Makes all five. Calibration reads `samples` through the softmax model; `tick` is called after
/// every layer.
pub(crate) fn convert(
    softmax: &Llama<SoftmaxAttention<f32>>,
    window: Window,
    args: &Args,
    samples: &[&[u8]],
    tick: impl Fn(),
) -> Result<Converted> {
    let options = |window| {
        DijiangOptions::new().with_window(window).with_blocks(args.blocks).with_seed(args.seed)
    };
    let window_only = softmax.exchange(|layer| layer.clone().with_window(Some(window)))?;
    let exchanged =
        softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options(Some(window))))?;
    let pure = softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options(None)))?;

    let closed = CalibrateOptions::new().with_steps(0);
    let again = || exchanged.exchange(|layer| Ok(layer.clone()));
    let (mut closed_form, mut calibrated, mut pure) = (again()?, again()?, pure);
    softmax.each_attention_input(samples, |l, inputs| {
        closed_form.attention_mut()[l]
            .calibrate(inputs, &closed, |_| ControlFlow::Continue(()))
            .map_err(Error::in_layer(l))?;
        tick();
        Ok(())
    })?;

    let start = Instant::now();
    let trained = closed
        .with_projection(args.projection())
        .with_steps(args.steps())
        .with_batch(args.batch(samples.iter().map(|sample| sample.len()).max().unwrap_or(1)))
        .with_learning_rate(args.learning_rate)
        .with_seed(args.seed);
    // What is left of the time, shared out among the calibrations that are left.
    let limited = |options: &CalibrateOptions, left: usize| {
        let seconds = args
            .seconds()
            .map(|seconds| (seconds - start.elapsed().as_secs_f64()).max(0.1) / left as f64);
        options.clone().with_seconds(seconds)
    };
    let choice = args.choose().then(|| {
        let budget = args.budget.map(|microseconds| Duration::from_secs_f64(microseconds * 1e-6));
        ChooseOptions::new()
            .with_map(options(None))
            .with_calibrate(trained.clone())
            .with_budget(budget)
    });
    let (mut reports, mut choices) = ([Vec::new(), Vec::new()], Vec::new());
    softmax.each_attention_input(samples, |l, inputs| {
        if let Some(choice) = &choice {
            let exact = &softmax.attention()[l];
            let chosen =
                DijiangAttention::choose(exact, inputs, choice, |_| ControlFlow::Continue(()));
            let (layer, report) = chosen.map_err(Error::in_layer(l))?;
            calibrated.attention_mut()[l] = layer;
            reports[0].push(report.calibration.clone());
            choices.push(report);
            tick();
        }
        let with_decay = trained.clone().with_decay(Fit::Train);
        let models =
            [(&mut calibrated, &trained), (&mut pure, &with_decay)].into_iter().zip(&mut reports);
        for (done, ((model, options), reports)) in
            models.enumerate().skip(usize::from(choice.is_some()))
        {
            let left = 2 * (softmax.config().layers - l) - done;
            let report =
                model.attention_mut()[l]
                    .calibrate(inputs, &limited(options, left), |_| ControlFlow::Continue(()));
            reports.push(report.map_err(Error::in_layer(l))?);
            tick();
        }
        Ok(())
    })?;
    let calibration_seconds = start.elapsed().as_secs_f64();
    Ok(Converted {
        exchanged,
        closed_form,
        calibrated,
        window_only,
        pure,
        reports,
        choices,
        calibration_seconds,
    })
}
