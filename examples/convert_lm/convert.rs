//! The exchange itself: softmax layers out, linear layers in, their plan, calibration and refit.

use std::time::{Duration, Instant};

use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{Budget, CalibrateOptions, CalibrateReport, Fit, Plan, Refit, Sample};
use dijiang::layer::{Attention, DijiangAttention, SoftmaxAttention};
use ndarray::Array2;

use crate::args::{Args, Row};
use crate::lm::error::{Error, Result};
use crate::lm::llama::Llama;
use crate::lm::plan::{self, Fitted, Offers, proceed};
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
    /// Tokens that a uniform window holds in as many bytes.
    pub(crate) window_alone: Option<usize>,
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
    let mut calibrator = Calibrator::new(args, softmax.config().layers, samples);
    let (mut plan, mut plan_alone, mut window_alone, mut planning) = (None, None, None, Vec::new());
    if rows.iter().any(|row| row.is_planned()) {
        let offers;
        (offers, planning) = measured(softmax, args, samples, &mut calibrator, &tick)?;
        let token_bytes = softmax.config().kv_cache_bytes(1);
        let chosen = args.plan(&offers.with_maps, softmax.config().head_dim, token_bytes)?;
        // In tokens of all heads: what the plan holds, sums among it.
        let tokens = chosen.bytes() as f64 / token_bytes as f64;
        let exact = tokens - args.sinks as f64;
        window_alone = Some(exact as usize);
        let alone = offers.alone.map(|alone| alone.plan(Budget::AverageWindow(exact / 2.0)));
        plan_alone = alone.transpose()?;
        plan = Some(chosen);
    }

    let mut linear = Vec::new();
    for row in args.models() {
        let options = args.options().with_window((row != Row::Pure).then_some(window));
        let mut model =
            softmax.exchange(|layer| DijiangAttention::from_softmax(layer, options.clone()))?;
        let mut reports = Vec::new();
        if let (Row::Planned, Some(plan)) = (row, &plan) {
            for (l, (layer, (maps, report))) in
                model.attention_mut().iter_mut().zip(planning.drain(..)).enumerate()
            {
                let planned = plan.apply(l, layer).and_then(|layer| layer.with_maps(maps));
                *layer = planned.map_err(Error::in_layer(l))?;
                reports.push(report);
            }
        }
        linear.push(Linear { row, model, reports });
    }
    if linear.iter().any(|linear| args.is_fitted(linear.row)) {
        let mut walk = softmax.walk(samples);
        while let Some(l) = walk.layer() {
            let teacher = &softmax.attention()[l];
            let samples = plan::samples(teacher, &walk.inputs()).map_err(Error::in_layer(l))?;
            for linear in linear.iter_mut().filter(|linear| args.is_fitted(linear.row)) {
                let layer = &mut linear.model.attention_mut()[l];
                let report = calibrator.calibrate(Stage::Row(linear.row), layer, &samples);
                let report = report.map_err(Error::in_layer(l))?;
                linear.reports.truncate(l);
                linear.reports.push(report);
            }
            walk.advance_with(|w, _| samples[w].output(teacher))?;
            tick();
        }
    }
    if rows.contains(&Row::PlannedRefit) {
        let planned = linear.iter().find(|linear| linear.row == Row::Planned);
        if let Some(Linear { model, reports, .. }) = planned {
            let (row, reports) = (Row::PlannedRefit, reports.clone());
            let mut model = model.exchange(|layer| Ok(layer.clone()))?;
            refit(softmax, &mut model, samples, &tick)?;
            linear.push(Linear { row, model, reports });
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(Converted { linear, plan, plan_alone, window_alone, seconds })
}

/// What every window is worth to every head, and the maps that it was measured with, for every
/// layer.
fn measured(
    softmax: &Llama<SoftmaxAttention<f32>>,
    args: &Args,
    samples: &[&[Token]],
    calibrator: &mut Calibrator,
    tick: &impl Fn(),
) -> Result<(Offers, Vec<Fitted>)> {
    let alone = args.rows().contains(&Row::PlannedWindow);
    let mut offers = Offers::new(samples, args.options(), true, alone)?;
    let (mut walk, mut maps) = (softmax.walk(samples), Vec::new());
    while let Some(l) = walk.layer() {
        let teacher = &softmax.attention()[l];
        let samples = plan::samples(teacher, &walk.inputs()).map_err(Error::in_layer(l))?;
        let calibrate = |layer: &mut _| calibrator.calibrate(Stage::Planning, layer, &samples);
        let fitted = offers.measure(teacher, &samples, walk.hidden(), calibrate);
        maps.push(fitted.map_err(Error::in_layer(l))?);
        walk.advance_with(|w, _| samples[w].output(teacher))?;
        tick();
    }
    Ok((offers, maps))
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

/// What a calibration is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The maps that a plan is measured with.
    Planning,
    /// The maps of a row.
    Row(Row),
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
    fn new(args: &Args, layers: usize, samples: &[&[Token]]) -> Self {
        let longest = samples.iter().map(|sample| sample.len()).max().unwrap_or(1);
        let trained = CalibrateOptions::new()
            .with_projection(args.projection())
            .with_steps(args.steps())
            .with_batch(args.batch(longest))
            .with_learning_rate(args.learning_rate)
            .with_seed(args.seed);
        let planned = usize::from(args.rows().iter().any(|row| row.is_planned()));
        let by_gradient = args.models().iter().filter(|row| row.is_by_gradient()).count();
        Self {
            trained,
            limit: args.seconds(),
            spent: Duration::ZERO,
            left: (planned + by_gradient) * layers,
        }
    }

    /// One layer.
    fn calibrate(
        &mut self,
        stage: Stage,
        layer: &mut DijiangAttention<f32>,
        samples: &[Sample<f32>],
    ) -> dijiang::Result<CalibrateReport> {
        let start = Instant::now();
        let mut options = self.trained.clone();
        if stage == Stage::Row(Row::ClosedForm) {
            options = options.with_steps(0);
        } else {
            // What is left of the time, shared out among the calibrations that are left.
            let limit = self
                .limit
                .map(|limit| (limit - self.spent.as_secs_f64()).max(0.1) / self.left.max(1) as f64);
            self.left = self.left.saturating_sub(1);
            options = options.with_seconds(limit);
        }
        options = match stage {
            Stage::Planning => plan::shares(&options)[0].clone(),
            Stage::Row(row) if row.is_planned() => plan::shares(&options)[1].clone(),
            Stage::Row(Row::Pure) => options.with_decay(Fit::Train),
            Stage::Row(_) => options,
        };
        let report = layer.calibrate_on(samples, &options, proceed)?;
        self.spent += start.elapsed();
        Ok(report)
    }
}
