//! The exchange itself: softmax layers out, linear layers in, their plan, calibration and refit.

use std::time::{Duration, Instant};

use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{Budget, CalibrateOptions, CalibrateReport, Fit, Plan, Planner, Refit};
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::{Array2, ArrayView2};

use crate::args::{Args, Row};
use crate::lm::error::{Error, Result};
use crate::lm::llama::Llama;
use crate::lm::plan::{Offers, PLAN_WINDOWS, proceed};
use crate::lm::tokens::Token;

/// A model with linear attention, and what calibration did to each of its layers.
pub(crate) struct Linear {
    pub(crate) row: Row,
    pub(crate) model: Llama<DijiangAttention<f32>>,
    pub(crate) reports: Vec<CalibrateReport>,
}

/// The softmax model with its attention exchanged.
pub(crate) struct Converted {
    /// In the order in which they were asked for.
    pub(crate) linear: Vec<Linear>,
    /// The window of every head, if a plan was asked for.
    pub(crate) plan: Option<Plan>,
    /// The same for windows with nothing behind them, which take as many bytes as those with maps.
    pub(crate) plan_alone: Option<Plan>,
    /// Time that plan, calibration and refit took, the walks through the model among it.
    pub(crate) seconds: f64,
}

/// Makes those of `rows` that have linear attention. Calibration reads `samples` through the
/// softmax model; `tick` is called after every layer of every walk.
pub(crate) fn convert(
    softmax: &Llama<SoftmaxAttention<f32>>,
    window: Window,
    args: &Args,
    samples: &[&[Token]],
    tick: impl Fn(),
) -> Result<Converted> {
    let start = Instant::now();
    let rows = args.rows();
    let planned = rows.iter().any(|row| row.is_planned());
    let head_dim = softmax.config().head_dim;
    let (mut plan, mut plan_alone) = (None, None);
    if planned {
        let planner = measured(softmax, args, samples, &tick)?;
        let chosen = planner.plan(args.plan_budget(head_dim))?;
        // In tokens of all heads: what the plan holds, sums among it.
        let tokens = chosen.bytes() as f64 / softmax.config().kv_cache_bytes(1) as f64;
        let chunk = (tokens - args.sinks as f64) / 2.0;
        plan_alone = Some(planner.plan(Budget::AverageWindow(chunk))?);
        plan = Some(chosen);
    }

    let mut linear = Vec::new();
    for &row in rows.iter().filter(|row| row.has_maps()) {
        let options = DijiangOptions::new().with_blocks(args.blocks).with_seed(args.seed);
        let options = options.with_sinks(args.sinks);
        let options = options.with_window((row != Row::Pure).then_some(window));
        let mut model =
            softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options.clone()))?;
        if let (true, Some(plan)) = (row.is_planned(), &plan) {
            for (l, layer) in model.attention_mut().iter_mut().enumerate() {
                *layer = plan.apply(l, layer).map_err(Error::in_layer(l))?;
            }
        }
        linear.push(Linear { row, model, reports: Vec::new() });
    }
    let mut calibrator = Calibrator::new(args, softmax.config().layers, samples, &linear);
    if linear.iter().any(|linear| linear.row.is_calibrated()) {
        softmax.each_attention_input(samples, |l, inputs| {
            let mut of_plan: Option<(DijiangAttention<f32>, CalibrateReport)> = None;
            for linear in linear.iter_mut().filter(|linear| linear.row.is_calibrated()) {
                let layer = &mut linear.model.attention_mut()[l];
                // The refit starts from the same maps.
                let known = of_plan.clone().filter(|_| linear.row == Row::PlannedRefit);
                let (calibrated, report) = match known {
                    Some(known) => known,
                    None => calibrator.calibrate(l, linear.row, layer, inputs)?,
                };
                *layer = calibrated.clone();
                linear.reports.push(report.clone());
                if linear.row == Row::Planned {
                    of_plan = Some((calibrated, report));
                }
            }
            tick();
            Ok(())
        })?;
    }
    for linear in linear.iter_mut().filter(|linear| linear.row == Row::PlannedRefit) {
        refit(softmax, &mut linear.model, samples, &tick)?;
    }
    Ok(Converted { linear, plan, plan_alone, seconds: start.elapsed().as_secs_f64() })
}

/// What every window is worth to every head, measured with maps in closed form.
fn measured(
    softmax: &Llama<SoftmaxAttention<f32>>,
    args: &Args,
    samples: &[&[Token]],
    tick: &impl Fn(),
) -> Result<Planner> {
    let samples = &samples[..samples.len().min(PLAN_WINDOWS)];
    let options =
        DijiangOptions::new().with_blocks(args.blocks).with_seed(args.seed).with_sinks(args.sinks);
    let mut offers = Offers::new(samples, options)?;
    let mut walk = softmax.walk(samples);
    while let Some(l) = walk.layer() {
        let teacher = &softmax.attention()[l];
        offers.measure(teacher, &walk.inputs(), walk.hidden()).map_err(Error::in_layer(l))?;
        walk.advance(teacher)?;
        tick();
    }
    Ok(offers.planner)
}

/// The output projection of every layer in closed form, each on the hidden states that the layers
/// before it make.
fn refit(
    softmax: &Llama<SoftmaxAttention<f32>>,
    model: &mut Llama<DijiangAttention<f32>>,
    samples: &[&[Token]],
    tick: &impl Fn(),
) -> Result<()> {
    let (mut teacher, mut student) = (softmax.walk(samples), softmax.walk(samples));
    while let Some(l) = teacher.layer() {
        let attention = &softmax.attention()[l];
        let hidden = teacher.hidden().to_vec();
        let outputs: Vec<Array2<f32>> = teacher
            .inputs()
            .iter()
            .map(|input| attention.forward(input, KeyMask::All).map_err(Error::in_layer(l)))
            .collect::<Result<_>>()?;
        let layer = &mut model.attention_mut()[l];
        let mut refit = Refit::new(layer);
        for (w, input) in student.inputs().iter().enumerate() {
            let target = &(&hidden[w] + &outputs[w]) - &student.hidden()[w];
            let added = refit.add(layer, input.view(), target.view(), hidden[w].view());
            added.map_err(Error::in_layer(l))?;
        }
        let delta = refit.solve().map_err(Error::in_layer(l))?;
        *layer = layer.clone().with_output_delta(delta).map_err(Error::in_layer(l))?;
        student.advance(layer)?;
        teacher.advance_with(|w, _| Ok(outputs[w].clone()))?;
        tick();
    }
    Ok(())
}

/// Calibrates layer after layer, by gradient within a limit of time.
struct Calibrator {
    trained: CalibrateOptions,
    limit: Option<f64>,
    spent: Duration,
    /// Calibrations by gradient to come.
    left: usize,
}

impl Calibrator {
    fn new(args: &Args, layers: usize, samples: &[&[Token]], linear: &[Linear]) -> Self {
        let longest = samples.iter().map(|sample| sample.len()).max().unwrap_or(1);
        let trained = CalibrateOptions::new()
            .with_projection(args.projection())
            .with_steps(args.steps())
            .with_batch(args.batch(longest))
            .with_learning_rate(args.learning_rate)
            .with_seed(args.seed);
        let rows: Vec<Row> = linear.iter().map(|linear| linear.row).collect();
        let shared = rows.contains(&Row::Planned) && rows.contains(&Row::PlannedRefit);
        let by_gradient = rows.iter().filter(|row| row.is_by_gradient()).count();
        Self {
            trained,
            limit: args.seconds(),
            spent: Duration::ZERO,
            left: (by_gradient - usize::from(shared)) * layers,
        }
    }

    /// The layer with index `l` of one model, which is given `inputs`.
    fn calibrate(
        &mut self,
        l: usize,
        row: Row,
        layer: &DijiangAttention<f32>,
        inputs: &[ArrayView2<'_, f32>],
    ) -> Result<(DijiangAttention<f32>, CalibrateReport)> {
        let start = Instant::now();
        let mut options = self.trained.clone();
        if row.is_by_gradient() {
            // What is left of the time, shared out among the calibrations that are left.
            let limit = self
                .limit
                .map(|limit| (limit - self.spent.as_secs_f64()).max(0.1) / self.left.max(1) as f64);
            self.left = self.left.saturating_sub(1);
            options = options.with_seconds(limit);
        } else {
            options = options.with_steps(0);
        }
        if row == Row::Pure {
            options = options.with_decay(Fit::Train);
        }
        let mut layer = layer.clone();
        let report = layer.calibrate(inputs, &options, proceed).map_err(Error::in_layer(l))?;
        self.spent += start.elapsed();
        Ok((layer, report))
    }
}
