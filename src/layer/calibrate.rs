//! Calibration: fits the maps of a [`DijiangAttention`] to hidden states of the user's own text.
//!
//! ```text
//! error = Σ (ô − o)² / Σ (o − ō)²      o: a head's softmax outputs on the samples, ō: their mean, ô: its linear outputs
//! ```
//!
//! Every key-value head by itself, first in closed form: the centres μq, μk become the means of x = √σ·q (over all query
//! heads that share the map) and of y = √σ·k. They leave the kernel that is approximated as it is and shrink the error of
//! the approximation. Then the decay, where it is to be fitted, from a grid of half-lives, and the mix g, which weighs the
//! kernel against the exact near part, by a one-dimensional search for the smallest error: a coarse grid, then ever
//! shorter steps around its best point.
//!
//! Then by gradient: Adam with cosine decay of the step length on scales, radii, log-weights, mix and, where they are to
//! be fitted, decay and centres. Only the far part is computed in every step; the sums over near keys are constants.
//!
//! Some of the samples are held out of all this, and a head keeps the numbers that were best on them, or its old ones.

use std::ops::{ControlFlow, Range};
use std::time::Instant;

use ndarray::ArrayView2;

use crate::attention::Order;
use crate::error::{Error, Result, check_positive};
use crate::kernel::DctMap;
use crate::layer::config::Causality;
use crate::layer::descent::{Descent, Moved};
use crate::layer::dijiang::{DijiangAttention, mixed};
use crate::layer::judge::{Head, Judge, Sample};
use crate::real::Real;

/// Steps between two looks at the held-out samples.
const LOOK: usize = 10;
/// Half-lives tried in closed form: 2, 4, … tokens.
const HALF_LIVES: usize = 11;
/// One of so many samples is held out.
const HELD_OUT: usize = 8;

/// Whether calibration fits something that it could also leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fit {
    /// It stays.
    #[default]
    Keep,
    /// It is fitted.
    Train,
}

/// How [`DijiangAttention::calibrate`] searches.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CalibrateOptions {
    /// Steps by gradient after the closed form; 0 for the closed form alone. Default: 60.
    pub steps: usize,
    /// Length of the first steps, in every number; it falls to 0 as half a cosine. Default: 0.02.
    pub learning_rate: f64,
    /// Samples in every step, all of them if there are fewer. Default: 8.
    pub batch: usize,
    /// log γ of every head. Worth most without a near part, next to nothing with one. Default: [`Fit::Keep`].
    pub decay: Fit,
    /// The centres by gradient; from the means they start in any case. Default: [`Fit::Keep`].
    pub centers: Fit,
    /// Seconds after which the steps end, their lengths having fallen to 0 by then; the closed form always finishes.
    /// With it the result depends on the machine and its load. Default: none.
    pub seconds: Option<f64>,
    /// Seed of the order in which samples are taken. Default: 0.
    pub seed: u64,
    /// The mix g is searched in [−range, range]. Default: 12.
    pub mix_range: f64,
    /// Grid points of the coarse search, at least 2 and at most 65536. Default: 13.
    pub mix_grid: usize,
    /// How often the step is halved around the best grid point, at most 50. Default: 5, that is to 1/16 with the other defaults.
    pub mix_halvings: usize,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self {
            steps: 60,
            learning_rate: 0.02,
            batch: 8,
            decay: Fit::Keep,
            centers: Fit::Keep,
            seconds: None,
            seed: 0,
            mix_range: 12.0,
            mix_grid: 13,
            mix_halvings: 5,
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

    /// Range of the mix.
    #[must_use]
    pub fn with_mix_range(self, mix_range: f64) -> Self {
        Self { mix_range, ..self }
    }

    /// Grid points of the coarse search.
    #[must_use]
    pub fn with_mix_grid(self, mix_grid: usize) -> Self {
        Self { mix_grid, ..self }
    }

    /// Halvings of the step around the best grid point.
    #[must_use]
    pub fn with_mix_halvings(self, mix_halvings: usize) -> Self {
        Self { mix_halvings, ..self }
    }

    fn check(&self) -> Result<()> {
        for (argument, got) in [("learning_rate", self.learning_rate), ("mix_range", self.mix_range)] {
            positive(argument, got)?;
        }
        check_positive("batch", self.batch)?;
        self.seconds.map_or(Ok(()), |seconds| positive("seconds", seconds))?;
        if self.mix_grid < 2 {
            return Err(Error::Value { argument: "mix_grid", expected: "at least 2", got: self.mix_grid as f64 });
        }
        let limits = [("steps", 1 << 24, self.steps), ("mix_grid", 1 << 16, self.mix_grid), ("mix_halvings", 50, self.mix_halvings)];
        for (argument, limit, got) in limits {
            if got > limit {
                return Err(Error::TooLarge { argument, limit, got });
            }
        }
        Ok(())
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
    /// Mean over heads of the smallest error on the held-out samples found so far.
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

/// What a calibration did to one key-value head. Errors are squared differences of the outputs of its query heads on the
/// held-out samples, relative to the variance of the softmax outputs (or to the rounding of their mean square, if that is
/// larger).
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
    /// The share of softmax attention's mass that is on far keys: what the map stands for. 1 without a near part.
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

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let len = values.len();
    values.sum::<f64>() / len as f64
}

impl<T: Real> DijiangAttention<T> {
    /// Fits every head's map to the layer's own inputs: in closed form, then by gradient. Any text of the kind the model will
    /// read will do; some thousand tokens are enough for the closed form, some ten thousand for the rest. No weight of the
    /// model is touched.
    ///
    /// The last eighth of the samples, at least one, is held out; errors are measured on it, and a head keeps its old map
    /// where no new one is better there. A single sample, or the closed form alone ([`steps`](CalibrateOptions::steps)
    /// = 0), has nothing held out: what was calibrated on is what is measured.
    ///
    /// Samples that lie within the near part, at most c·(r + 1) tokens long, teach nothing and are left out.
    ///
    /// `progress` is called on this thread after every pass over the samples and every step; [`ControlFlow::Break`] ends the
    /// calibration.
    ///
    /// # Shapes
    /// - `samples`: hidden states as the layer receives them, one array `[n, D]` per sequence, positions from 0.
    ///
    /// # Cost
    /// Softmax attention once (twice on the held-out samples), then linear attention's far part about 25 times over the
    /// samples (with no near part, where the mix cancels, once, and 11 times with decay), and forward and backward once
    /// per step over [`batch`](CalibrateOptions::batch) of them. Heads and samples in parallel; without a limit of time the
    /// result does not depend on the number of threads. Memory: about 5·n·h·d numbers for n tokens in all samples.
    ///
    /// # Errors
    /// [`Error::Empty`] without samples or for an empty one, [`Error::Shape`] for one of another width,
    /// [`Error::NonFinite`] for elements beyond [`Real::LIMIT`], [`Error::Value`] if no sample is longer than the near part,
    /// [`Error::Value`] and [`Error::TooLarge`] for impossible options, [`Error::Conflict`] for fitting the decay of a
    /// bidirectional layer, [`Error::Cancelled`] after `Break`. After an error the layer is unchanged.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::ops::ControlFlow;
    ///
    /// use dijiang::attention::Near;
    /// use dijiang::layer::{AttentionConfig, AttentionWeights, CalibrateOptions, DijiangAttention, DijiangOptions, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let matrix = |p: usize| Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3);
    /// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let options = DijiangOptions::new().with_near(Some(Near::new(8, 1)));
    /// let mut layer = DijiangAttention::from_softmax(&softmax, options)?;
    ///
    /// let sample = Array2::from_shape_fn((64, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0);
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
        progress: impl FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        let start = Instant::now();
        options.check()?;
        let causal = self.projections().config().causality == Causality::Causal;
        if options.decay == Fit::Train && !causal {
            return Err(Error::Conflict { argument: "decay", other: "bidirectional attention" });
        }
        let order = if causal { self.near().map_or(Order::Causal, Order::Near) } else { Order::Full };
        let samples = capture(self, samples, order)?;
        let decays = self.log_decay().iter();
        let old = self.maps().iter().zip(decays).map(|(map, &log_decay)| Head { params: map.params().clone(), log_decay });
        let old: Vec<Head> = old.collect();

        let split = samples.len() - (samples.len() / HELD_OUT).max(1);
        let apart = options.steps > 0 && split > 0;
        let (train, held) = if apart { (0..split, split..samples.len()) } else { (0..samples.len(), 0..samples.len()) };
        let tokens = |set: &Range<usize>| samples[set.clone()].iter().map(Sample::len).sum();
        let (trained_on, held_out) = (tokens(&train), if apart { tokens(&held) } else { 0 });

        let mut judge = Judge::new(self.projections(), order, &samples);
        let far_mass = judge.far_mass(held.clone());
        let run = Run { options, start, near: matches!(order, Order::Near(_)), apart, train, held, progress };
        let found = run.run(&mut judge, old)?;
        let heads = found.iter().zip(far_mass).map(|(found, far_mass)| HeadReport {
            before: found.before,
            closed_form: found.closed_form,
            after: found.after,
            log_mix: found.head.params.log_mix,
            log_decay: found.head.log_decay,
            far_mass,
        });
        let report = CalibrateReport { heads: heads.collect(), tokens: trained_on, held_out };
        let log_decay = found.iter().map(|found| found.head.log_decay).collect();
        let maps = found.into_iter().map(|found| DctMap::from_params(found.head.params)).collect::<Result<_>>()?;
        self.set_heads(maps, log_decay)?;
        Ok(report)
    }
}

/// Projects the samples that reach beyond the near part.
fn capture<T: Real>(layer: &DijiangAttention<T>, samples: &[ArrayView2<'_, T>], order: Order) -> Result<Vec<Sample<T>>> {
    if samples.is_empty() {
        return Err(Error::Empty { argument: "samples" });
    }
    let near = match order {
        Order::Near(near) => near.chunk.saturating_mul(near.back.saturating_add(1)),
        Order::Full | Order::Causal => 0,
    };
    let longest = samples.iter().map(|x| x.nrows()).max().unwrap_or(0);
    let samples = samples.iter().map(|x| Sample::new(layer.projections(), x)).collect::<Result<Vec<_>>>()?;
    let samples: Vec<_> = samples.into_iter().filter(|sample| sample.len() > near).collect();
    if samples.is_empty() {
        return Err(Error::Value { argument: "samples", expected: "longer than the near part", got: longest as f64 });
    }
    Ok(samples)
}

/// What was found for one head.
struct Found {
    /// The numbers with the smallest error on the held-out samples so far.
    head: Head,
    before: f64,
    closed_form: f64,
    after: f64,
}

impl Found {
    fn learn(&mut self, head: &Head, error: f64) {
        if error < self.after {
            (self.head, self.after) = (head.clone(), error);
        }
    }
}

/// One calibration.
struct Run<'a, F> {
    options: &'a CalibrateOptions,
    start: Instant,
    /// Whether there is a near part.
    near: bool,
    /// Whether the samples that are calibrated on and those held out are different ones.
    apart: bool,
    train: Range<usize>,
    held: Range<usize>,
    progress: F,
}

impl<F: FnMut(CalibrateProgress) -> ControlFlow<()>> Run<'_, F> {
    fn run<T: Real>(mut self, judge: &mut Judge<'_, T>, old: Vec<Head>) -> Result<Vec<Found>> {
        let variance = |judge: &Judge<'_, T>, set: &Range<usize>| -> Vec<f64> {
            (0..old.len()).map(|head| judge.variance(head, set.clone())).collect()
        };
        let (train_variance, held_variance) = (variance(judge, &self.train), variance(judge, &self.held));
        let centred = old.iter().enumerate().map(|(h, old)| {
            let params = judge.centred(h, &old.params, self.train.clone());
            Head { params, ..*old }
        });
        let mut search = Search::new(self.options, self.near, centred.collect());
        let total = 1 + search.passes() + usize::from(self.apart) + self.options.steps;

        let before = judge.errors(&old, self.held.clone(), &held_variance);
        let found = old.iter().zip(before);
        let found = found.map(|(head, before)| Found { head: head.clone(), before, closed_form: f64::INFINITY, after: before });
        let mut found: Vec<Found> = found.collect();
        let mut done = 1;
        self.tell(&found, done, total)?;

        for pass in 0..search.passes() {
            let candidates = search.candidates(pass);
            let errors = judge.errors(&candidates, self.train.clone(), &train_variance);
            if !self.apart {
                learn(&mut found, &candidates, &errors);
            }
            search.learn(candidates, errors);
            done += 1;
            self.tell(&found, done, total)?;
        }
        let closed: Vec<Head> = search.best.iter().map(|(_, head)| head.clone()).collect();
        let errors: Vec<f64> = match self.apart {
            true => judge.errors(&closed, self.held.clone(), &held_variance),
            false => search.best.iter().map(|(error, _)| *error).collect(),
        };
        found.iter_mut().zip(&errors).for_each(|(found, &error)| found.closed_form = error);
        if self.apart {
            learn(&mut found, &closed, &errors);
            done += 1;
            self.tell(&found, done, total)?;
        }
        if self.options.steps > 0 {
            self.descend(judge, &mut found, &held_variance, done, total)?;
        }
        Ok(found)
    }

    /// Adam, from the best numbers so far.
    fn descend<T: Real>(
        &mut self,
        judge: &mut Judge<'_, T>,
        found: &mut [Found],
        variance: &[f64],
        done: usize,
        total: usize,
    ) -> Result<()> {
        let CalibrateOptions { steps, batch, learning_rate, .. } = *self.options;
        let moved = Moved {
            // Without a near part the mix cancels.
            mix: self.near,
            centers: self.options.centers == Fit::Train,
            decay: self.options.decay == Fit::Train,
        };
        let row_variance: Vec<f64> = (0..found.len()).map(|head| judge.row_variance(head, self.train.clone())).collect();
        let mut descents: Vec<Descent> = found.iter().map(|found| Descent::new(found.head.clone(), moved)).collect();
        let mut deck = Deck::new(self.options.seed, self.train.clone());
        for step in 0..steps {
            let passed = self.options.seconds.map_or(0.0, |seconds| self.start.elapsed().as_secs_f64() / seconds);
            let passed = passed.max(step as f64 / steps as f64);
            let last = passed >= 1.0 || step + 1 == steps;
            if passed < 1.0 {
                let batch = deck.deal(batch.min(self.train.len()));
                let heads: Vec<Head> = descents.iter().map(|descent| descent.head.clone()).collect();
                let slopes = judge.slopes(&heads, &batch, &row_variance);
                let rate = learning_rate * 0.5 * (1.0 + (std::f64::consts::PI * passed).cos());
                descents.iter_mut().zip(&slopes).for_each(|(descent, slope)| descent.step(slope.as_ref(), rate));
            }
            if last || (step + 1) % LOOK == 0 {
                let heads: Vec<Head> = descents.iter().map(|descent| descent.head.clone()).collect();
                let errors = judge.errors(&heads, self.held.clone(), variance);
                learn(found, &heads, &errors);
            }
            self.tell(found, if last { total } else { done + step + 1 }, total)?;
            if last {
                break;
            }
        }
        Ok(())
    }

    fn tell(&mut self, found: &[Found], done: usize, total: usize) -> Result<()> {
        let error = mean(found.iter().map(|found| found.after));
        match (self.progress)(CalibrateProgress { done, total, error }) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Cancelled),
        }
    }
}

fn learn(found: &mut [Found], heads: &[Head], errors: &[f64]) {
    found.iter_mut().zip(heads.iter().zip(errors)).for_each(|(found, (head, &error))| found.learn(head, error));
}

/// Samples in an order of their own, all of them before any comes again.
struct Deck {
    random: u64,
    samples: Vec<usize>,
    dealt: usize,
}

impl Deck {
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

/// The search of the closed form, for all heads at once: what to try next.
struct Search<'a> {
    options: &'a CalibrateOptions,
    near: bool,
    /// Smallest error of each head so far, and its numbers.
    best: Vec<(f64, Head)>,
    /// The mix around which the present halving looks, one per head.
    around: Vec<f64>,
}

impl<'a> Search<'a> {
    fn new(options: &'a CalibrateOptions, near: bool, heads: Vec<Head>) -> Self {
        Self { options, near, around: vec![0.0; heads.len()], best: heads.into_iter().map(|head| (f64::INFINITY, head)).collect() }
    }

    /// Passes that look at the heads as they are, or at decays.
    fn decays(&self) -> usize {
        match (self.options.decay, self.near) {
            (Fit::Train, _) => 1 + HALF_LIVES,
            (Fit::Keep, true) => 0,
            (Fit::Keep, false) => 1,
        }
    }

    fn passes(&self) -> usize {
        // Without a near part the mix cancels: there is nothing to search.
        self.decays() + if self.near { self.options.mix_grid + 2 * self.options.mix_halvings } else { 0 }
    }

    /// What each head should try in pass `pass`, counted from 0: decays, then mixes.
    fn candidates(&mut self, pass: usize) -> Vec<Head> {
        let mut heads: Vec<Head> = self.best.iter().map(|(_, head)| head.clone()).collect();
        let decays = self.decays();
        if pass >= decays {
            heads.iter_mut().zip(self.mixes(pass - decays)).for_each(|(head, mix)| head.params.log_mix = mix);
        } else if pass > 0 {
            let log_decay = -std::f64::consts::LN_2 / 2.0_f64.powi(pass as i32);
            heads.iter_mut().for_each(|head| head.log_decay = log_decay);
        }
        heads
    }

    /// The grid, then pairs of steps to the left and to the right.
    fn mixes(&mut self, pass: usize) -> Vec<f64> {
        let CalibrateOptions { mix_range: range, mix_grid: grid, .. } = *self.options;
        let step = 2.0 * range / (grid - 1) as f64;
        if pass < grid {
            return vec![pass as f64 * step - range; self.best.len()];
        }
        let halving = (pass - grid) / 2;
        let step = step * 0.5_f64.powi(halving as i32 + 1);
        if (pass - grid).is_multiple_of(2) {
            self.around = self.best.iter().map(|(_, head)| head.params.log_mix).collect();
            self.around.iter().map(|mix| (mix - step).max(-range)).collect()
        } else {
            self.around.iter().map(|mix| (mix + step).min(range)).collect()
        }
    }

    fn learn(&mut self, tried: Vec<Head>, errors: Vec<f64>) {
        for (best, tried) in self.best.iter_mut().zip(errors.into_iter().zip(tried)) {
            if tried.0 < best.0 {
                *best = tried;
            }
        }
    }
}
