//! Calibration: fits the maps of a [`DijiangAttention`] to hidden states of the user's own text.
//!
//! ```text
//! error = Σ (ô − o)² / Σ (o − ō)²      o: a head's softmax outputs on the samples, ō: their mean,
//!                                      ô: its linear outputs
//! ```
//!
//! Every key-value head by itself, first in closed form: the centres μq, μk become the means of x =
//! √σ·q (over all query heads that share the map) and of y = √σ·k. They leave the kernel that is
//! approximated as it is and shrink the error of the approximation. Then the decay, where it is to
//! be fitted, from a grid of half-lives, and the mix g, which weighs the kernel against the exact
//! local window, by least squares: with
//!
//! ```text
//! g ← g + log( Σ (ô − n)·(o − n) / Σ (ô − n)² )        n: outputs over the window keys alone
//! ```
//!
//! which would be exact at once if outputs were linear in exp(g).
//!
//! Then by gradient: Adam with cosine decay of the step length on scales, radii, log-weights, mix
//! and, where they are to be fitted, decay and centres. Only the far part is computed in every
//! step; the sums over window keys are constants.
//!
//! Some of the samples are held out of all this. By the error on them the best of the steps is
//! taken; and a head whose error on them did not fall keeps its old numbers.

mod adam;
mod objective;
mod plan;
mod refit;
mod sample;

use std::ops::{ControlFlow, Range};
use std::time::Instant;

use ndarray::{ArrayView1, ArrayView2};

use crate::Real;
use crate::attention::{Causality, Window};
use crate::check::check_positive;
use crate::error::{Error, Result};
use crate::kernel::{DctMap, DctParams, mixed};
use crate::layer::DijiangAttention;

use adam::{Adam, Moved};
use objective::{HeadParams, Objective};
pub use plan::{Budget, HeadPlan, Plan, PlanOptions, Planner, Point};
pub use refit::Refit;
pub use sample::Sample;

/// Steps between two looks at the held-out samples.
const LOOK: usize = 10;
/// Most steps there can be.
const MOST_STEPS: usize = 1 << 24;
/// Half-lives tried in closed form: 2, 4, … tokens.
const HALF_LIVES: usize = 11;
/// The mix is searched between these.
const MIX: (f64, f64) = (-12.0, 4.0);
/// Where the search begins: from below, outputs being concave in exp(g).
const FIRST_MIX: f64 = -4.0;
/// Its passes.
const MIX_PASSES: usize = 6;
/// One of so many samples is held out.
const HELD_OUT: usize = 8;

/// Whether calibration fits something that it could also leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Fit {
    /// It stays.
    #[default]
    Keep,
    /// It is fitted.
    Train,
}

/// What a map's projection is fitted as: each can express more than the one before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum ProjectionFit {
    /// What it is: of a plain one its scales and radii.
    #[default]
    Keep,
    /// With two more transforms: see [`DctParams::to_deep`].
    Deep,
    /// Every element of it: see [`DctParams::to_dense`].
    Dense,
}

impl ProjectionFit {
    /// The same map, its projection written so that it can be fitted this way.
    pub(super) fn prepare(self, params: &DctParams) -> Result<DctParams> {
        match self {
            ProjectionFit::Keep => Ok(params.clone()),
            ProjectionFit::Deep => Ok(params.to_deep()),
            ProjectionFit::Dense => params.to_dense(),
        }
    }
}

/// How [`DijiangAttention::calibrate`] searches.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct CalibrateOptions {
    /// Steps by gradient after the closed form; 0 for the closed form alone. Default: 60.
    pub steps: usize,
    /// Length of the first steps, in every number; it falls to 0 as half a cosine. Default: 0.1.
    pub learning_rate: f64,
    /// Samples in every step, all of them if there are fewer. Default: 8.
    pub batch: usize,
    /// log γ of every head. Worth most without a local window, next to nothing with one. Default:
    /// [`Fit::Keep`].
    pub decay: Fit,
    /// The centres by gradient; from the means they start in any case. Default: [`Fit::Keep`].
    pub centers: Fit,
    /// What the projection is fitted as. Default: [`ProjectionFit::Keep`].
    pub projection: ProjectionFit,
    /// Seconds after which the steps end, their lengths having fallen to 0 by then. The closed form
    /// always finishes. With a limit the result depends on the machine and its load. Default: none.
    pub seconds: Option<f64>,
    /// Seed of the order in which samples are taken. Default: 0.
    pub seed: u64,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self {
            steps: 60,
            learning_rate: 0.1,
            batch: 8,
            decay: Fit::Keep,
            centers: Fit::Keep,
            projection: ProjectionFit::Keep,
            seconds: None,
            seed: 0,
        }
    }
}

impl CalibrateOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Steps by gradient.
    #[must_use]
    pub fn with_steps(self, steps: usize) -> Self {
        Self { steps, ..self }
    }

    /// Length of the first steps.
    #[must_use]
    pub fn with_learning_rate(self, learning_rate: f64) -> Self {
        Self { learning_rate, ..self }
    }

    /// Samples in every step.
    #[must_use]
    pub fn with_batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// Whether to fit log γ.
    #[must_use]
    pub fn with_decay(self, decay: Fit) -> Self {
        Self { decay, ..self }
    }

    /// Whether to fit the centres by gradient.
    #[must_use]
    pub fn with_centers(self, centers: Fit) -> Self {
        Self { centers, ..self }
    }

    /// What the projection is fitted as.
    #[must_use]
    pub fn with_projection(self, projection: ProjectionFit) -> Self {
        Self { projection, ..self }
    }

    /// Seconds after which the steps end.
    #[must_use]
    pub fn with_seconds(self, seconds: Option<f64>) -> Self {
        Self { seconds, ..self }
    }

    /// Seed of the order in which samples are taken.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    fn check(&self, causality: Causality) -> Result<()> {
        if self.decay == Fit::Train {
            causality.check_causal("decay")?;
        }
        positive("learning_rate", self.learning_rate)?;
        check_positive("batch", self.batch)?;
        self.seconds.map_or(Ok(()), |seconds| positive("seconds", seconds))?;
        match self.steps > MOST_STEPS {
            true => Err(Error::TooLarge { argument: "steps", limit: MOST_STEPS, got: self.steps }),
            false => Ok(()),
        }
    }
}

/// A number that must be finite and more than 0.
fn positive(argument: &'static str, got: f64) -> Result<()> {
    let fits = got.is_finite() && got > 0.0;
    if fits { Ok(()) } else { Err(Error::Value { argument, expected: "finite and positive", got }) }
}

/// Where a calibration stands, told after every pass over the samples and after every step.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct CalibrateProgress {
    /// Passes and steps made.
    pub done: usize,
    /// Passes and steps there will be; a limit of time may skip some.
    pub total: usize,
    /// Mean over heads of the error on the held-out samples of the best numbers so far.
    pub error: f64,
}

/// What a calibration did.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CalibrateReport {
    /// One entry per key-value head.
    pub heads: Vec<HeadReport>,
    /// Tokens that were calibrated on.
    pub tokens: usize,
    /// Tokens held out, which the errors were measured on.
    pub held_out: usize,
}

/// What a calibration did to one key-value head. Errors are squared differences of the outputs of
/// its query heads on the held-out samples, relative to the variance of the softmax outputs (or to
/// the rounding of their mean square, if that is larger).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HeadReport {
    /// Error before.
    pub before: f64,
    /// Error of the closed form.
    pub closed_form: f64,
    /// Error after: never above the one before.
    pub after: f64,
    /// Mix g after.
    pub log_mix: f64,
    /// log γ after.
    pub log_decay: f64,
    /// The share of softmax attention's mass that is on far keys, in the last sample: what the map
    /// stands for. 1 without a local window.
    pub far_mass: f64,
}

impl CalibrateReport {
    /// Mean error before.
    pub fn before(&self) -> f64 {
        mean(self.heads.iter().map(|head| head.before))
    }

    /// Mean error after.
    pub fn after(&self) -> f64 {
        mean(self.heads.iter().map(|head| head.after))
    }
}

pub(super) fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let len = values.len();
    values.sum::<f64>() / len as f64
}

impl<T: Real> DijiangAttention<T> {
    /// Fits every head's map to the layer's own inputs: in closed form, then by gradient. Any text
    /// of the kind the model will read will do; some thousand tokens are enough for the closed
    /// form, some ten thousand for the rest. No weight of the model is touched.
    ///
    /// The last eighth of the samples, at least one, is held out; errors are measured on it, and a
    /// head keeps its old map where no new one is better there. A single sample, or the closed form
    /// alone ([`steps`](CalibrateOptions::steps) = 0), has nothing held out: what was calibrated on
    /// is what is measured.
    ///
    /// Samples that lie within the local window, at most c·(r + 1) tokens long, teach nothing and
    /// are left out.
    ///
    /// `progress` is called on this thread after every pass over the samples and every step;
    /// [`ControlFlow::Break`] ends the calibration.
    ///
    /// # Shapes
    /// - `samples`: hidden states as the layer receives them, one array `[n, D]` per sequence,
    ///   positions from 0.
    ///
    /// # Cost
    /// Softmax attention once (twice for the last sample), then linear attention's far part 6 times
    /// over the samples for the closed form, and forward and backward once per step over
    /// [`batch`](CalibrateOptions::batch) of them; with no local window, where the mix cancels, the
    /// steps alone. Fitting decay adds 12 times. Heads and samples in parallel; without a limit of
    /// time the result does not depend on the number of threads. Memory: about 5·n·h·d numbers for
    /// n tokens in all samples.
    ///
    /// # Errors
    /// [`Error::Empty`] without samples or for an empty one, [`Error::Shape`] for one of another
    /// width, [`Error::NonFinite`] for elements beyond [`Real::LIMIT`], [`Error::Value`] if no
    /// sample is longer than the shortest local window, [`Error::Value`] and [`Error::TooLarge`]
    /// for impossible options, [`Error::Conflict`] for fitting the decay of a bidirectional layer,
    /// [`Error::Cancelled`] after `Break`. After an error the layer is unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use dijiang::attention::Window;
    /// use dijiang::calibrate::CalibrateOptions;
    /// use dijiang::layer::{
    ///     AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
    /// };
    /// use ndarray::Array2;
    ///
    /// let matrix = |p: usize| {
    ///     Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3)
    /// };
    /// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let options = DijiangOptions::new().with_window(Some(Window::new(8, 1)));
    /// let mut layer = DijiangAttention::from_softmax(&softmax, options)?;
    ///
    /// let element = |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0;
    /// let sample = Array2::from_shape_fn((64, 8), element);
    /// let report = layer.calibrate(&[sample.view()], &CalibrateOptions::new(), |progress| {
    ///     assert!(progress.done <= progress.total);
    ///     ControlFlow::Continue(())
    /// })?;
    /// assert!(report.after() < report.before());
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn calibrate(
        &mut self,
        samples: &[ArrayView2<'_, T>],
        options: &CalibrateOptions,
        mut progress: impl FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        let start = Instant::now();
        options.check(self.proj.config().causality)?;
        let samples = samples.iter().map(|x| Sample::new(self, x)).collect::<Result<Vec<_>>>()?;
        self.fit(&samples, options, start, &mut progress)
    }

    /// As [`calibrate`](Self::calibrate), with what softmax attention makes of the samples: in
    /// O(n).
    ///
    /// # Errors
    /// As [`calibrate`](Self::calibrate), and [`Error::Foreign`] for samples of a layer of another
    /// shape.
    pub fn calibrate_on(
        &mut self,
        samples: &[Sample<T>],
        options: &CalibrateOptions,
        mut progress: impl FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        options.check(self.proj.config().causality)?;
        self.fit(samples, options, Instant::now(), &mut progress)
    }

    /// With checked options, for a calibration that began at `start`.
    fn fit(
        &mut self,
        samples: &[Sample<T>],
        options: &CalibrateOptions,
        start: Instant,
        progress: &mut dyn FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        let samples = long_enough(self, samples)?;
        let decays = self.log_decay().iter();
        let old = self
            .maps()
            .iter()
            .zip(decays)
            .map(|(map, &log_decay)| HeadParams { params: map.params().clone(), log_decay });
        let old: Vec<HeadParams> = old.collect();

        let split = samples.len() - (samples.len() / HELD_OUT).max(1);
        let apart = options.steps > 0 && split > 0;
        let (train, held) = if apart {
            (0..split, split..samples.len())
        } else {
            (0..samples.len(), 0..samples.len())
        };
        let tokens =
            |set: &Range<usize>| samples[set.clone()].iter().map(|sample| sample.len()).sum();
        let (trained_on, held_out) = (tokens(&train), if apart { tokens(&held) } else { 0 });

        let mut objective = Objective::new(&self.proj, (self.windows(), self.sinks()), &samples);
        let far_mass = objective.far_mass(samples.len() - 1);
        let run = Run {
            options,
            start,
            window: !self.windows().is_empty(),
            train,
            held,
            done: 0,
            progress,
        };
        let best = run.run(&mut objective, old)?;
        let heads = best.iter().zip(far_mass).map(|(best, far_mass)| HeadReport {
            before: best.before,
            closed_form: best.closed_form,
            after: best.after,
            log_mix: best.head.params.log_mix,
            log_decay: best.head.log_decay,
            far_mass,
        });
        let report = CalibrateReport { heads: heads.collect(), tokens: trained_on, held_out };
        let log_decay = best.iter().map(|best| best.head.log_decay).collect();
        let maps = best
            .into_iter()
            .map(|best| DctMap::from_params(best.head.params))
            .collect::<Result<_>>()?;
        self.set_heads(maps, log_decay)?;
        Ok(report)
    }
}

/// The samples that reach beyond the local window.
fn long_enough<'s, T: Real>(
    layer: &DijiangAttention<T>,
    samples: &'s [Sample<T>],
) -> Result<Vec<&'s Sample<T>>> {
    if samples.is_empty() {
        return Err(Error::Empty { argument: "samples" });
    }
    samples.iter().try_for_each(|sample| sample.check(&layer.proj))?;
    let beyond = |window: &Window| window.with_kept(0).tokens();
    let window = layer.windows().iter().map(beyond).min().unwrap_or(0);
    let longest = samples.iter().map(Sample::len).max().unwrap_or(0);
    let samples: Vec<_> = samples.iter().filter(|sample| sample.len() > window).collect();
    if samples.is_empty() {
        return Err(Error::Value {
            argument: "samples",
            expected: "longer than the shortest local window",
            got: longest as f64,
        });
    }
    Ok(samples)
}

/// What was best for one head.
struct Best {
    /// The numbers with the smallest error on the held-out samples so far.
    head: HeadParams,
    before: f64,
    closed_form: f64,
    after: f64,
}

impl Best {
    fn keep_if_better(&mut self, head: &HeadParams, error: f64) {
        if error < self.after {
            (self.head, self.after) = (head.clone(), error);
        }
    }
}

/// One calibration.
struct Run<'a> {
    options: &'a CalibrateOptions,
    start: Instant,
    /// Whether there is a local window. Without one the mix cancels.
    window: bool,
    train: Range<usize>,
    held: Range<usize>,
    /// Passes and steps made.
    done: usize,
    progress: &'a mut dyn FnMut(CalibrateProgress) -> ControlFlow<()>,
}

impl Run<'_> {
    fn run<T: Real>(
        mut self,
        objective: &mut Objective<'_, T>,
        old: Vec<HeadParams>,
    ) -> Result<Vec<Best>> {
        let held_variance: Vec<f64> =
            (0..old.len()).map(|head| objective.variance(head, self.held.clone())).collect();
        let closed: Vec<HeadParams> = old
            .iter()
            .enumerate()
            .map(|(h, old)| {
                let params = objective.centred(h, &old.params, self.train.clone());
                HeadParams { params, ..*old }
            })
            .collect();

        let before = objective.errors(&old, self.held.clone(), &held_variance);
        let best = old.iter().zip(before);
        let best = best.map(|(head, before)| Best {
            head: head.clone(),
            before,
            closed_form: f64::INFINITY,
            after: before,
        });
        let mut best: Vec<Best> = best.collect();
        self.report(&best)?;

        let mut closed = self.fit_decay(objective, closed, &best)?;
        if self.window {
            closed = self.fit_mix(objective, closed, &best)?;
        }
        let errors = objective.errors(&closed, self.held.clone(), &held_variance);
        best.iter_mut().zip(&errors).for_each(|(best, &error)| best.closed_form = error);
        keep_best(&mut best, &closed, &errors);
        self.report(&best)?;

        if self.options.steps > 0 {
            self.descend(objective, &mut best, &held_variance)?;
        }
        Ok(best)
    }

    /// Passes and steps there will be.
    fn total(&self) -> usize {
        let decays = if self.options.decay == Fit::Train { 1 + HALF_LIVES } else { 0 };
        let mix = if self.window { MIX_PASSES } else { 0 };
        1 + decays + mix + 1 + self.options.steps
    }

    /// The half-life of least error, or none.
    fn fit_decay<T: Real>(
        &mut self,
        objective: &mut Objective<'_, T>,
        heads: Vec<HeadParams>,
        best: &[Best],
    ) -> Result<Vec<HeadParams>> {
        if self.options.decay == Fit::Keep {
            return Ok(heads);
        }
        let variance: Vec<f64> =
            (0..heads.len()).map(|head| objective.variance(head, self.train.clone())).collect();
        let mut nearest: Vec<(f64, HeadParams)> =
            heads.iter().map(|head| (f64::INFINITY, head.clone())).collect();
        for power in 0..=HALF_LIVES {
            let log_decay = |head: &HeadParams| {
                if power == 0 {
                    head.log_decay
                } else {
                    -std::f64::consts::LN_2 / 2.0_f64.powi(power as i32)
                }
            };
            let tried: Vec<HeadParams> = heads
                .iter()
                .map(|head| HeadParams { log_decay: log_decay(head), ..head.clone() })
                .collect();
            let errors = objective.errors(&tried, self.train.clone(), &variance);
            for (nearest, tried) in nearest.iter_mut().zip(errors.into_iter().zip(tried)) {
                if tried.0 < nearest.0 {
                    *nearest = tried;
                }
            }
            self.report(best)?;
        }
        Ok(nearest.into_iter().map(|(_, head)| head).collect())
    }

    /// The mix by least squares.
    fn fit_mix<T: Real>(
        &mut self,
        objective: &mut Objective<'_, T>,
        mut heads: Vec<HeadParams>,
        best: &[Best],
    ) -> Result<Vec<HeadParams>> {
        heads.iter_mut().for_each(|head| head.params.log_mix = FIRST_MIX);
        let mut searched = vec![true; heads.len()];
        for _ in 0..MIX_PASSES {
            let shares = objective.far_shares(&heads, self.train.clone());
            for ((head, searched), far) in heads.iter_mut().zip(&mut searched).zip(shares) {
                let factor = far.map_or(0.0, |far| far.least_squares());
                // Where far keys only do harm, there are none from then on.
                *searched &= factor > 0.0;
                let mix = if *searched { head.params.log_mix + factor.ln() } else { MIX.0 };
                head.params.log_mix = mix.clamp(MIX.0, MIX.1);
            }
            self.report(best)?;
        }
        Ok(heads)
    }

    /// Adam, from the best numbers so far, until the limit of time.
    fn descend<T: Real>(
        &mut self,
        objective: &mut Objective<'_, T>,
        best: &mut [Best],
        variance: &[f64],
    ) -> Result<()> {
        let CalibrateOptions { steps, batch, learning_rate, .. } = *self.options;
        let moved = Moved {
            mix: self.window,
            centers: self.options.centers == Fit::Train,
            decay: self.options.decay == Fit::Train,
        };
        let row_variance: Vec<f64> =
            (0..best.len()).map(|head| objective.row_variance(head, self.train.clone())).collect();
        let first = |best: &Best| {
            Ok(HeadParams {
                params: self.options.projection.prepare(&best.head.params)?,
                ..best.head
            })
        };
        let mut adam = best
            .iter()
            .map(|best| Ok(Adam::new(first(best)?, moved)))
            .collect::<Result<Vec<Adam>>>()?;
        let mut shuffler = Shuffler::new(self.options.seed, self.train.clone());
        for step in 0..steps {
            let share = |seconds: f64| self.start.elapsed().as_secs_f64() / seconds;
            let passed = self.options.seconds.map_or(0.0, share);
            let passed = passed.max(step as f64 / steps as f64);
            let last = passed >= 1.0 || step + 1 == steps;
            if passed < 1.0 {
                let batch = shuffler.deal(batch.min(self.train.len()));
                let heads: Vec<HeadParams> = adam.iter().map(|adam| adam.head.clone()).collect();
                let gradients = objective.gradients(&heads, &batch, &row_variance);
                let rate = learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * passed).cos());
                adam.iter_mut()
                    .zip(&gradients)
                    .for_each(|(adam, gradient)| adam.step(gradient.as_ref(), rate));
            }
            if last || (step + 1) % LOOK == 0 {
                let heads: Vec<HeadParams> = adam.iter().map(|adam| adam.head.clone()).collect();
                let errors = objective.errors(&heads, self.held.clone(), variance);
                keep_best(best, &heads, &errors);
            }
            if last {
                self.done += steps - 1 - step;
            }
            self.report(best)?;
            if last {
                break;
            }
        }
        Ok(())
    }

    /// One more pass or step is made.
    fn report(&mut self, best: &[Best]) -> Result<()> {
        self.done += 1;
        let error = mean(best.iter().map(|best| best.after));
        let progress = CalibrateProgress { done: self.done, total: self.total(), error };
        match (self.progress)(progress) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

fn keep_best(best: &mut [Best], heads: &[HeadParams], errors: &[f64]) {
    best.iter_mut()
        .zip(heads.iter().zip(errors))
        .for_each(|(best, (head, &error))| best.keep_if_better(head, error));
}

/// |h|² of a hidden state; never 0.
fn energy<T: Real>(hidden: ArrayView1<'_, T>) -> f64 {
    hidden.iter().map(|x| x.to_f64() * x.to_f64()).sum::<f64>().max(f64::MIN_POSITIVE)
}

/// Samples in an order of their own, all of them before any comes again.
struct Shuffler {
    random: u64,
    samples: Vec<usize>,
    dealt: usize,
}

impl Shuffler {
    fn new(seed: u64, samples: Range<usize>) -> Self {
        let samples: Vec<usize> = samples.collect();
        Self { random: seed, dealt: samples.len(), samples }
    }

    /// `count` different samples.
    fn deal(&mut self, count: usize) -> Vec<usize> {
        if self.dealt + count > self.samples.len() {
            // Fisher and Yates.
            for i in (1..self.samples.len()).rev() {
                self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
                self.samples.swap(i, (mixed(self.random) % (i as u64 + 1)) as usize);
            }
            self.dealt = 0;
        }
        self.dealt += count;
        self.samples[self.dealt - count..self.dealt].to_vec()
    }
}
