//! Choice of structure: how far the local window reaches, how many features a map has, and which
//! projection each head has, by trial calibrations within a budget of time.
//!
//! One question after the other: the local window first, which the whole layer shares and which is
//! worth most; then the number of features; then, head by head, the projection. Of two answers the
//! cheaper one stays unless the other lowers the error on the held-out samples by at least 2 %.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use ndarray::{Array3, ArrayView2};

use crate::Real;
use crate::attention::Causality;
use crate::attention::{LinearConfig, Operator, Qkv, Window};
use crate::error::{Error, Result};
use crate::kernel::DctMap;
use crate::layer::Attention;
use crate::layer::calibrate::{
    CalibrateOptions, CalibrateProgress, CalibrateReport, Fit, ProjectionFit, mean,
};
use crate::layer::dijiang::{DijiangAttention, DijiangOptions, mixed};
use crate::layer::softmax::SoftmaxAttention;

/// What an answer must lower the error by, as a share of it.
const WORTH: f64 = 0.02;
/// Tokens of a stretch whose time is taken.
const STRETCH: usize = 256;
/// Stretches of which the shortest time counts.
const REPEATS: usize = 9;

/// What [`DijiangAttention::choose`] may choose from, and how long it may look.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct ChooseOptions {
    /// Longest time per token that attention of all heads may take on one thread of this machine in
    /// a long prefill, projections by the weights not counted. Default: none, whatever lowers the
    /// error.
    pub budget: Option<Duration>,
    /// Window parts, the cheapest first. A bidirectional layer has none and ignores them. Default: 64
    /// and 128 tokens a chunk, one chunk back.
    pub window: Vec<Option<Window>>,
    /// Blocks G of d features each, the cheapest first. Default: 1 and 2.
    pub blocks: Vec<usize>,
    /// QkvProj, the cheapest first. Default: all, [`ProjectionFit::Keep`] first.
    pub projections: Vec<ProjectionFit>,
    /// Everything else about the maps. Default: [`DijiangOptions::new`].
    pub map: DijiangOptions,
    /// The calibration of a trial. Default: [`CalibrateOptions::new`] with 20 steps.
    pub trial: CalibrateOptions,
    /// The calibration of what was chosen. Default: [`CalibrateOptions::new`].
    pub calibrate: CalibrateOptions,
}

impl Default for ChooseOptions {
    fn default() -> Self {
        Self {
            budget: None,
            window: vec![Some(Window::new(64, 1)), Some(Window::new(128, 1))],
            blocks: vec![1, 2],
            projections: vec![ProjectionFit::Keep, ProjectionFit::Deep, ProjectionFit::Dense],
            map: DijiangOptions::new(),
            trial: CalibrateOptions::new().with_steps(20),
            calibrate: CalibrateOptions::new(),
        }
    }
}

impl ChooseOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Longest time per token.
    #[must_use]
    pub fn with_budget(self, budget: Option<Duration>) -> Self {
        Self { budget, ..self }
    }

    /// Window parts, the cheapest first.
    #[must_use]
    pub fn with_window(self, window: Vec<Option<Window>>) -> Self {
        Self { window, ..self }
    }

    /// Blocks, the cheapest first.
    #[must_use]
    pub fn with_blocks(self, blocks: Vec<usize>) -> Self {
        Self { blocks, ..self }
    }

    /// QkvProj, the cheapest first.
    #[must_use]
    pub fn with_projections(self, projections: Vec<ProjectionFit>) -> Self {
        Self { projections, ..self }
    }

    /// Everything else about the maps.
    #[must_use]
    pub fn with_map(self, map: DijiangOptions) -> Self {
        Self { map, ..self }
    }

    /// The calibration of a trial.
    #[must_use]
    pub fn with_trial(self, trial: CalibrateOptions) -> Self {
        Self { trial, ..self }
    }

    /// The calibration of what was chosen.
    #[must_use]
    pub fn with_calibrate(self, calibrate: CalibrateOptions) -> Self {
        Self { calibrate, ..self }
    }

    fn check(&self) -> Result<()> {
        let lists = [
            ("window", self.window.len()),
            ("blocks", self.blocks.len()),
            ("projections", self.projections.len()),
        ];
        match lists.into_iter().find(|(_, len)| *len == 0) {
            Some((argument, _)) => Err(Error::Empty { argument }),
            None => Ok(()),
        }
    }
}

/// Where a choice stands.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct ChooseProgress {
    /// Trials finished.
    pub trial: usize,
    /// Most trials there can be.
    pub trials: usize,
    /// The calibration under way: a trial's, or at the end that of what was chosen.
    pub calibrate: CalibrateProgress,
}

/// One structure that was tried for all heads alike.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Trial {
    /// The local window.
    pub window: Option<Window>,
    /// Blocks G.
    pub blocks: usize,
    /// The projection.
    pub projection: ProjectionFit,
    /// Time per token, all heads.
    pub time: Duration,
    /// Mean error on the held-out samples after the trial calibration; `None` if the time was
    /// beyond the budget.
    pub error: Option<f64>,
}

/// What was chosen, and why.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ChooseReport {
    /// Everything that was tried, in this order.
    pub trials: Vec<Trial>,
    /// The local window chosen.
    pub window: Option<Window>,
    /// The blocks chosen.
    pub blocks: usize,
    /// The projection chosen for every key-value head.
    pub projections: Vec<ProjectionFit>,
    /// Time per token, all heads, as far as the trials tell.
    pub time: Duration,
    /// The calibration of what was chosen.
    pub calibration: CalibrateReport,
}

impl<T: Real> DijiangAttention<T> {
    /// [`from_softmax`](Self::from_softmax) and [`calibrate`](Self::calibrate) for those who would
    /// rather give a budget of time than choose local window, features and projection themselves.
    ///
    /// Times are taken on the machine it runs on, so the choice may differ where a structure is at
    /// the edge of the budget; without a budget the same samples, options and seed give the same
    /// layer.
    ///
    /// # Shapes
    /// - `samples`: as [`calibrate`](Self::calibrate). Window parts that none of them reaches beyond
    ///   are left out.
    ///
    /// # Cost
    /// A calibration by [`trial`](ChooseOptions::trial) for every local window, then for every further
    /// number of blocks, then for every further projection, and one by
    /// [`calibrate`](ChooseOptions::calibrate) at the end.
    ///
    /// # Errors
    /// [`Error::Empty`] for an empty list, [`Error::Value`] if no structure is within the budget or
    /// no sample is longer than a local window, [`Error::Cancelled`] after `Break`, and those of
    /// [`from_softmax`](Self::from_softmax) and [`calibrate`](Self::calibrate).
    ///
    /// # Examples
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use std::time::Duration;
    ///
    /// use dijiang::attention::Window;
    /// use dijiang::layer::{AttentionConfig, AttentionWeights, ChooseOptions, DijiangAttention, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let matrix = |p: usize| Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3);
    /// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let sample = Array2::from_shape_fn((96, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0);
    ///
    /// let options = ChooseOptions::new()
    ///     .with_window(vec![Some(Window::new(8, 1)), Some(Window::new(16, 1))])
    ///     .with_budget(Some(Duration::from_millis(1)));
    /// let (layer, report) = DijiangAttention::choose(&softmax, &[sample.view()], &options, |_| ControlFlow::Continue(()))?;
    /// assert_eq!(layer.window(), report.window);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn choose(
        layer: &SoftmaxAttention<T>,
        samples: &[ArrayView2<'_, T>],
        options: &ChooseOptions,
        progress: impl FnMut(ChooseProgress) -> ControlFlow<()>,
    ) -> Result<(Self, ChooseReport)> {
        options.check()?;
        let causal = layer.config().causality == Causality::Causal;
        let longest = samples.iter().map(|sample| sample.nrows()).max().unwrap_or(0);
        let reached = |window: &Option<Window>| {
            window.is_none_or(|window| {
                window.chunk.saturating_mul(window.back.saturating_add(1)) < longest
            })
        };
        let nears: Vec<Option<Window>> = match causal {
            true => options.window.iter().copied().filter(reached).collect(),
            false => vec![None],
        };
        if nears.is_empty() {
            return Err(Error::Value {
                argument: "samples",
                expected: "longer than the local window",
                got: longest as f64,
            });
        }
        let trials = nears.len() + options.blocks.len() - 1 + options.projections.len() - 1;
        let mut search =
            Search { layer, samples, options, causal, trials, made: Vec::new(), progress };
        let (blocks, projection) = (options.blocks[0], options.projections[0]);
        let mut best: Option<Tried<T>> = None;
        for window in nears {
            best = better(best, search.trial(window, blocks, projection)?);
        }
        for &blocks in &options.blocks[1..] {
            let window = best.as_ref().map(|best| best.window);
            if let Some(window) = window {
                best = better(best, search.trial(window, blocks, projection)?);
            }
        }
        let Some(best) = best else {
            let got = options.budget.unwrap_or_default().as_secs_f64();
            return Err(Error::Value {
                argument: "budget",
                expected: "seconds enough for one of the structures",
                got,
            });
        };
        let mut tried = vec![best];
        for &projection in &options.projections[1..] {
            tried.extend(search.trial(tried[0].window, tried[0].blocks, projection)?);
        }
        let (chosen, time) = per_head(&tried, options.budget);
        let part = |h: usize| &tried[chosen[h]];
        let maps = (0..chosen.len()).map(|h| part(h).layer.maps()[h].clone()).collect();
        let log_decay = (0..chosen.len()).map(|h| part(h).layer.log_decay()[h]).collect();
        let mut layer = tried[0].layer.clone();
        layer.set_heads(maps, log_decay)?;
        let calibration = search.calibrate(&mut layer, &options.calibrate)?;
        let (window, blocks) = (tried[0].window, tried[0].blocks);
        let projections = chosen.iter().map(|&chosen| tried[chosen].projection).collect();
        Ok((
            layer,
            ChooseReport { trials: search.made, window, blocks, projections, time, calibration },
        ))
    }
}

/// A structure within the budget, after its trial calibration.
struct Tried<T> {
    window: Option<Window>,
    blocks: usize,
    projection: ProjectionFit,
    layer: DijiangAttention<T>,
    time: Duration,
    /// Errors of the heads.
    errors: Vec<f64>,
}

impl<T> Tried<T> {
    fn error(&self) -> f64 {
        mean(self.errors.iter().copied())
    }
}

/// The one that was there, unless the other one is worth its cost.
fn better<T>(best: Option<Tried<T>>, other: Option<Tried<T>>) -> Option<Tried<T>> {
    match (best, other) {
        (Some(best), Some(other)) if other.error() > (1.0 - WORTH) * best.error() => Some(best),
        (best, other) => other.or(best),
    }
}

/// For every head which of `tried` it gets, the first one being for all who get no other; and the
/// time of it all. What lowers an error most for its time comes first, as far as the budget goes.
fn per_head<T>(tried: &[Tried<T>], budget: Option<Duration>) -> (Vec<usize>, Duration) {
    let heads = tried[0].errors.len();
    let share = |which: usize| tried[which].time.as_secs_f64() / heads as f64;
    let gain = |which: usize, head: usize| tried[0].errors[head] - tried[which].errors[head];
    let mut offers: Vec<(usize, usize)> =
        (1..tried.len()).flat_map(|which| (0..heads).map(move |head| (which, head))).collect();
    offers.retain(|&(which, head)| gain(which, head) > WORTH * tried[0].errors[head]);
    let rate =
        |&(which, head): &(usize, usize)| gain(which, head) / (share(which) - share(0)).max(1e-12);
    offers.sort_by(|a, b| rate(b).total_cmp(&rate(a)));
    let mut chosen = vec![0; heads];
    let mut time = tried[0].time.as_secs_f64();
    for (which, head) in offers {
        let now = chosen[head];
        let then = time + share(which) - share(now);
        let affordable = budget.is_none_or(|budget| then <= budget.as_secs_f64());
        if affordable && gain(which, head) > gain(now, head) {
            (chosen[head], time) = (which, then);
        }
    }
    (chosen, Duration::from_secs_f64(time.max(0.0)))
}

/// One search.
struct Search<'a, T, F> {
    layer: &'a SoftmaxAttention<T>,
    samples: &'a [ArrayView2<'a, T>],
    options: &'a ChooseOptions,
    causal: bool,
    trials: usize,
    made: Vec<Trial>,
    progress: F,
}

impl<T: Real, F: FnMut(ChooseProgress) -> ControlFlow<()>> Search<'_, T, F> {
    /// Calibrates one structure, if it is within the budget.
    fn trial(
        &mut self,
        window: Option<Window>,
        blocks: usize,
        projection: ProjectionFit,
    ) -> Result<Option<Tried<T>>> {
        let options = self.options.map.clone().with_window(window).with_blocks(blocks);
        let mut layer = DijiangAttention::from_softmax(self.layer, options)?;
        let maps = layer
            .maps()
            .iter()
            .map(|map| projection.prepare(map.params()).and_then(DctMap::from_params));
        layer.set_maps(maps.collect::<Result<_>>()?)?;
        let time = time_per_token(&layer)?;
        let mut trial = Trial { window, blocks, projection, time, error: None };
        if self.options.budget.is_some_and(|budget| time > budget) {
            self.made.push(trial);
            return Ok(None);
        }
        let report = self.calibrate(&mut layer, &self.options.trial)?;
        trial.error = Some(report.after());
        self.made.push(trial);
        let errors = report.heads.iter().map(|head| head.after).collect();
        Ok(Some(Tried { window, blocks, projection, layer, time, errors }))
    }

    fn calibrate(
        &mut self,
        layer: &mut DijiangAttention<T>,
        options: &CalibrateOptions,
    ) -> Result<CalibrateReport> {
        // Without a local window, decay is what a causal head needs most.
        let decay =
            if self.causal && layer.window().is_none() { Fit::Train } else { options.decay };
        let (trial, trials) = (self.made.len(), self.trials);
        let options = options.clone().with_decay(decay).with_projection(ProjectionFit::Keep);
        layer.calibrate(self.samples, &options, |calibrate| {
            (self.progress)(ChooseProgress { trial, trials, calibrate })
        })
    }
}

/// Time that attention of all heads takes per token once the local window is full, on one thread: that
/// of the first key-value head, for as many heads as there are.
fn time_per_token<T: Real>(layer: &DijiangAttention<T>) -> Result<Duration> {
    let (heads, d) = (layer.config().kv_heads, layer.projections().head_dim());
    let group = layer.config().heads / heads;
    let causality = layer.config().causality;
    let config = LinearConfig { window: layer.window(), causality, ..LinearConfig::new() };
    let linear = config.with_heads(group).build(vec![layer.maps()[0].clone()])?;
    let random = |h: usize, i: usize, l: usize| {
        mixed(((h * STRETCH + i) * d + l) as u64) as f64 / u64::MAX as f64 - 0.5
    };
    let stretch = |heads: usize| {
        Array3::from_shape_fn((heads, STRETCH, d), |(h, i, l)| T::from_f64(random(h, i, l)))
    };
    let (q, k) = (stretch(group), stretch(1));
    let (mut out, mut workspace, mut state) = (q.clone(), linear.workspace(), linear.new_state());
    let causal = causality == Causality::Causal;
    let mut shortest = Duration::MAX;
    let reach = layer.window().map_or(0, |window| window.chunk * (window.back + 1)) / STRETCH + 1;
    for repeat in 0..reach + REPEATS {
        let start = Instant::now();
        let qkv = Qkv::new(&q, &k, &k);
        match causal {
            true => linear.prefill_into(&mut [&mut state], qkv, &mut out, &mut workspace)?,
            false => linear.forward_into(qkv, &mut out, &mut workspace)?,
        }
        if repeat >= reach {
            shortest = shortest.min(start.elapsed());
        }
    }
    Ok(shortest * heads as u32 / STRETCH as u32)
}
