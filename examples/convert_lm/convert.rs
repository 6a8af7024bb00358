//! The exchange itself: softmax layers out, linear layers in, and their calibration.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use dijiang::attention::Window;
use dijiang::calibrate::{CalibrateOptions, CalibrateReport, Fit};
use dijiang::layer::{
    ChooseOptions, ChooseReport, DijiangAttention, DijiangOptions, SoftmaxAttention,
};
use ndarray::ArrayView2;

use crate::args::{Args, Row};
use crate::lm::error::{Error, Result};
use crate::lm::llama::Llama;
use crate::lm::tokens::Token;

/// A model with linear attention, and what calibration by gradient did to each of its layers.
pub(crate) struct Linear {
    pub(crate) row: Row,
    pub(crate) model: Llama<DijiangAttention<f32>>,
    pub(crate) reports: Vec<CalibrateReport>,
}

/// The softmax model with its attention exchanged.
pub(crate) struct Converted {
    /// In the order in which they were asked for.
    pub(crate) linear: Vec<Linear>,
    /// What was chosen for each layer, if that was asked for.
    pub(crate) choices: Vec<ChooseReport>,
    /// Time calibration by gradient took, all models together.
    pub(crate) calibration_seconds: f64,
}

/// Makes those of `rows` that have linear attention. Calibration reads `samples` through the
/// softmax model; `tick` is called after every layer.
pub(crate) fn convert(
    softmax: &Llama<SoftmaxAttention<f32>>,
    window: Window,
    args: &Args,
    samples: &[&[Token]],
    tick: impl Fn(),
) -> Result<Converted> {
    let mut linear = Vec::new();
    for row in args.rows() {
        let window = match row {
            Row::Softmax | Row::Window => continue,
            Row::Exchanged | Row::ClosedForm | Row::Calibrated => Some(window),
            Row::Pure => None,
        };
        let options = map(args).with_window(window);
        let model =
            softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options.clone()))?;
        linear.push(Linear { row, model, reports: Vec::new() });
    }
    let mut calibrator = Calibrator::new(args, softmax, samples, &linear);
    if linear.iter().any(|Linear { row, .. }| *row != Row::Exchanged) {
        softmax.each_attention_input(samples, |l, inputs| {
            for linear in &mut linear {
                calibrator.calibrate(l, linear, inputs)?;
            }
            tick();
            Ok(())
        })?;
    }
    Ok(Converted {
        linear,
        choices: calibrator.choices,
        calibration_seconds: calibrator.spent.as_secs_f64(),
    })
}

/// The feature maps of a new layer.
fn map(args: &Args) -> DijiangOptions {
    DijiangOptions::new().with_blocks(args.blocks).with_seed(args.seed)
}

/// Calibrates layer after layer, by gradient within a limit of time.
struct Calibrator<'a> {
    softmax: &'a Llama<SoftmaxAttention<f32>>,
    trained: CalibrateOptions,
    choice: Option<ChooseOptions>,
    choices: Vec<ChooseReport>,
    limit: Option<f64>,
    spent: Duration,
    /// Calibrations by gradient to come.
    left: usize,
}

impl<'a> Calibrator<'a> {
    fn new(
        args: &Args,
        softmax: &'a Llama<SoftmaxAttention<f32>>,
        samples: &[&[Token]],
        linear: &[Linear],
    ) -> Self {
        let trained = CalibrateOptions::new()
            .with_projection(args.projection())
            .with_steps(args.steps())
            .with_batch(args.batch(samples.iter().map(|sample| sample.len()).max().unwrap_or(1)))
            .with_learning_rate(args.learning_rate)
            .with_seed(args.seed);
        let budget = args.budget.map(|microseconds| Duration::from_secs_f64(microseconds * 1e-6));
        let choice = args.choose().then(|| {
            let options = ChooseOptions::new().with_map(map(args).with_window(None));
            options.with_calibrate(trained.clone()).with_budget(budget)
        });
        let by_gradient = linear.iter().filter(|linear| match linear.row {
            Row::Calibrated => choice.is_none(),
            row => row == Row::Pure,
        });
        Self {
            softmax,
            left: by_gradient.count() * softmax.config().layers,
            trained,
            choice,
            choices: Vec::new(),
            limit: args.seconds(),
            spent: Duration::ZERO,
        }
    }

    /// The layer with index `l` of one model, which is given `inputs`.
    fn calibrate(
        &mut self,
        l: usize,
        linear: &mut Linear,
        inputs: &[ArrayView2<'_, f32>],
    ) -> Result<()> {
        let layer = &mut linear.model.attention_mut()[l];
        let start = Instant::now();
        let report = match (linear.row, &self.choice) {
            (Row::Softmax | Row::Window | Row::Exchanged, _) => return Ok(()),
            (Row::ClosedForm, _) => {
                let closed = CalibrateOptions::new().with_steps(0);
                layer.calibrate(inputs, &closed, proceed).map_err(Error::in_layer(l))?;
                return Ok(());
            }
            (Row::Calibrated, Some(choice)) => {
                let exact = &self.softmax.attention()[l];
                let chosen = DijiangAttention::choose(exact, inputs, choice, proceed);
                let (chosen, report) = chosen.map_err(Error::in_layer(l))?;
                *layer = chosen;
                self.choices.push(report.clone());
                report.calibration
            }
            (Row::Calibrated | Row::Pure, _) => {
                // What is left of the time, shared out among the calibrations that are left.
                let limit = self.limit.map(|limit| {
                    (limit - self.spent.as_secs_f64()).max(0.1) / self.left.max(1) as f64
                });
                let mut options = self.trained.clone().with_seconds(limit);
                if linear.row == Row::Pure {
                    options = options.with_decay(Fit::Train);
                }
                self.left = self.left.saturating_sub(1);
                layer.calibrate(inputs, &options, proceed).map_err(Error::in_layer(l))?
            }
        };
        linear.reports.push(report);
        self.spent += start.elapsed();
        Ok(())
    }
}

/// Nobody stops a calibration here.
fn proceed<P>(_: P) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
