//! Calibration: fits the maps of a [`DijiangAttention`] to hidden states of the user's own text.
//!
//! ```text
//! error = Σ (ô − o)² / Σ (o − ō)²      o: a head's softmax outputs on the samples, ō: their mean, ô: its linear outputs
//! ```
//!
//! In closed form, for every key-value head: the centres μq, μk become the means of x = √σ·q (over all query heads that
//! share the map) and of y = √σ·k. They leave the kernel that is approximated as it is and shrink the error of the
//! approximation. Then the mix g, which weighs the kernel against the exact near part, by a one-dimensional search for
//! the smallest error: a coarse grid, then ever shorter steps around its best point. Scales, radii and log-weights stay.

use std::ops::ControlFlow;

use ndarray::{Array2, Array3, ArrayRef1, ArrayView2, ArrayView3, Axis, s};

use crate::attention::{KeyMask, LinearAttention, LinearConfig, Workspace};
use crate::error::{Error, Result};
use crate::kernel::{DctMap, DctParams};
use crate::layer::config::Causality;
use crate::layer::dijiang::DijiangAttention;
use crate::layer::projection::{Projected, Projections};
use crate::layer::softmax::exact;
use crate::real::Real;
use crate::threads::{for_each, max_threads};

/// How [`DijiangAttention::calibrate`] searches.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CalibrateOptions {
    /// The mix g is searched in [−range, range]. Default: 12.
    pub mix_range: f64,
    /// Grid points of the coarse search, at least 2. Default: 13.
    pub mix_grid: usize,
    /// How often the step is halved around the best grid point. Default: 5, that is to 1/16 with the other defaults.
    pub mix_halvings: usize,
}

impl Default for CalibrateOptions {
    fn default() -> Self {
        Self { mix_range: 12.0, mix_grid: 13, mix_halvings: 5 }
    }
}

impl CalibrateOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
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
        if !(self.mix_range.is_finite() && self.mix_range > 0.0) {
            return Err(Error::Value { argument: "mix_range", expected: "finite and positive", got: self.mix_range });
        }
        if self.mix_grid < 2 {
            return Err(Error::Value { argument: "mix_grid", expected: "at least 2", got: self.mix_grid as f64 });
        }
        Ok(())
    }
}

/// Where a calibration stands, told after every pass over the samples.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct CalibrateProgress {
    /// Passes made.
    pub done: usize,
    /// Passes there will be.
    pub total: usize,
    /// Mean over heads of the smallest error found so far.
    pub error: f64,
}

/// What a calibration did.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct CalibrateReport {
    /// One entry per key-value head.
    pub heads: Vec<HeadReport>,
}

/// What a calibration did to one key-value head. Errors are squared differences of the outputs of its query heads,
/// relative to the variance of the softmax outputs (or to the rounding of their mean square, if that is larger).
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HeadReport {
    /// Error before.
    pub before: f64,
    /// Error after: never above the one before.
    pub after: f64,
    /// Mix g after.
    pub log_mix: f64,
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
    /// Fits every head's map to the layer's own inputs, in closed form: centres, then the mix of kernel and near part. Any text
    /// of the kind the model will read will do; some thousand tokens are enough. No weight of the model is touched.
    ///
    /// `progress` is called on this thread after every pass over the samples; [`ControlFlow::Break`] ends the calibration.
    /// A head keeps its old map where the new one is not better.
    ///
    /// # Shapes
    /// - `samples`: hidden states as the layer receives them, one array `[n, D]` per sequence, positions from 0.
    ///
    /// # Cost
    /// Softmax attention once, linear attention about 25 times over the samples (twice without a near part, where the mix
    /// cancels). Heads and samples in parallel; the result does not depend on the number of threads.
    ///
    /// # Errors
    /// [`Error::Empty`] without samples or for an empty one, [`Error::Shape`] for one of another width,
    /// [`Error::NonFinite`] for elements beyond [`Real::LIMIT`], [`Error::Value`] for impossible options, [`Error::Cancelled`]
    /// after `Break`. After an error the layer is unchanged.
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
        mut progress: impl FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        options.check()?;
        if samples.is_empty() {
            return Err(Error::Empty { argument: "samples" });
        }
        let samples = samples.iter().map(|x| Sample::new(self.projections(), x)).collect::<Result<Vec<_>>>()?;
        let judge = Judge::new(self, &samples)?;
        let old: Vec<DctParams> = self.maps().iter().map(|map| map.params().clone()).collect();
        let centred: Vec<DctParams> = old.iter().enumerate().map(|(head, params)| judge.centred(head, params)).collect();

        // Without a near part the mix cancels: there is nothing to search.
        let searched = self.near().is_some();
        let total = 1 + if searched { options.mix_grid + 2 * options.mix_halvings } else { 1 };
        let before = judge.errors(old.clone())?;
        let mut best: Vec<_> = old.into_iter().zip(before.iter().copied()).collect();
        let mut found = Search::new(options, centred.len());
        for done in 1..=total {
            let error = mean(best.iter().map(|(_, error)| *error));
            if progress(CalibrateProgress { done, total, error }).is_break() {
                return Err(Error::Cancelled);
            }
            if done == total {
                break;
            }
            let mut candidates = centred.clone();
            if searched {
                candidates.iter_mut().zip(found.candidates(done - 1)).for_each(|(params, mix)| params.log_mix = mix);
            }
            let errors = judge.errors(candidates.clone())?;
            found.learn(&candidates, &errors);
            for (best, candidate) in best.iter_mut().zip(candidates.into_iter().zip(errors)) {
                if candidate.1 < best.1 {
                    *best = candidate;
                }
            }
        }
        let heads = before.into_iter().zip(&best);
        let heads = heads.map(|(before, (params, after))| HeadReport { before, after: *after, log_mix: params.log_mix }).collect();
        self.set_maps(best.into_iter().map(|(params, _)| DctMap::from_params(params)).collect::<Result<_>>()?)?;
        Ok(CalibrateReport { heads })
    }
}

/// The one-dimensional search, for all heads at once: which mix to try next.
struct Search<'a> {
    options: &'a CalibrateOptions,
    /// Smallest error of each head so far, and its mix.
    best: Vec<(f64, f64)>,
    /// The mix around which the present halving looks, one per head.
    around: Vec<f64>,
}

impl<'a> Search<'a> {
    fn new(options: &'a CalibrateOptions, heads: usize) -> Self {
        Self { options, best: vec![(f64::INFINITY, 0.0); heads], around: vec![0.0; heads] }
    }

    /// What each head should try in pass `pass`, counted from 0: the grid, then pairs of steps to the left and to the right.
    fn candidates(&mut self, pass: usize) -> Vec<f64> {
        let CalibrateOptions { mix_range: range, mix_grid: grid, .. } = *self.options;
        let step = 2.0 * range / (grid - 1) as f64;
        if pass < grid {
            return vec![pass as f64 * step - range; self.best.len()];
        }
        let halving = (pass - grid) / 2;
        let step = step * 0.5_f64.powi(halving as i32 + 1);
        if (pass - grid).is_multiple_of(2) {
            self.around = self.best.iter().map(|&(_, mix)| mix).collect();
            self.around.iter().map(|mix| (mix - step).max(-range)).collect()
        } else {
            self.around.iter().map(|mix| (mix + step).min(range)).collect()
        }
    }

    fn learn(&mut self, tried: &[DctParams], errors: &[f64]) {
        for ((best, params), &error) in self.best.iter_mut().zip(tried).zip(errors) {
            if error < best.0 {
                *best = (error, params.log_mix);
            }
        }
    }
}

/// One sample, projected, with what softmax attention makes of it: `[n, h·d]`.
struct Sample<T> {
    projected: Projected<T>,
    teacher: Array2<T>,
}

impl<T: Real> Sample<T> {
    fn new(projections: &Projections<T>, x: &ArrayView2<'_, T>) -> Result<Self> {
        projections.check_sequence("samples", x)?;
        let projected = projections.project(x, 0);
        let exact = exact(projections, None)?;
        let mut teacher = Array2::zeros(projected.q.raw_dim());
        {
            let (q, k, v) = (projections.heads(&projected.q), projections.heads(&projected.k), projections.heads(&projected.v));
            let (mut out, mut workspace) = (projections.heads_mut(&mut teacher), exact.workspace());
            match projections.config().causality {
                Causality::Causal => exact.causal_into(&q, &k, &v, KeyMask::All, &mut out, &mut workspace)?,
                Causality::Bidirectional => exact.full_into(&q, &k, &v, KeyMask::All, &mut out, &mut workspace)?,
            }
        }
        Ok(Self { projected, teacher })
    }
}

/// Measures how far a head's linear attention is from softmax attention on the samples.
struct Judge<'a, T> {
    projections: &'a Projections<T>,
    samples: &'a [Sample<T>],
    /// The linear attention of one key-value head, but for its decay.
    config: LinearConfig,
    /// log γ per key-value head.
    log_decay: Vec<f64>,
    /// Query heads per key-value head.
    group: usize,
    /// Σ (o − ō)² per key-value head, never 0.
    variance: Vec<f64>,
}

impl<'a, T: Real> Judge<'a, T> {
    fn new(layer: &'a DijiangAttention<T>, samples: &'a [Sample<T>]) -> Result<Self> {
        let projections = layer.projections();
        let shape = projections.config();
        let group = shape.heads / shape.kv_heads;
        let config = LinearConfig::new().with_heads(group).with_scale(projections.scale());
        let config = LinearConfig { near: layer.near(), ..config };
        let log_decay = layer.log_decay().to_vec();
        let judge = Self { projections, samples, config, log_decay, group, variance: Vec::new() };
        let variance = (0..shape.kv_heads).map(|head| judge.variance(head)).collect();
        Ok(Self { variance, ..judge })
    }

    /// The query heads that share key-value head `head`: `[group, n, d]`.
    fn queries<'s>(&self, head: usize, rows: &'s Array2<T>) -> ArrayView3<'s, T> {
        self.projections.heads(rows).slice_move(s![head * self.group..(head + 1) * self.group, .., ..])
    }

    /// One key-value head: `[1, n, d]`.
    fn keys<'s>(&self, head: usize, rows: &'s Array2<T>) -> ArrayView3<'s, T> {
        self.projections.heads(rows).slice_move(s![head..head + 1, .., ..])
    }

    /// Σ (o − ō)² of the softmax outputs, each query head with its own mean; at least what rounding makes of constant ones.
    fn variance(&self, head: usize) -> f64 {
        let (mut variance, mut square) = (0.0, 0.0);
        for i in 0..self.group {
            let outputs = || self.samples.iter().map(|sample| self.queries(head, &sample.teacher).slice_move(s![i..i + 1, .., ..]));
            let mean = mean_row(outputs());
            let zero = vec![0.0; mean.len()];
            for o in outputs() {
                variance += o.rows().into_iter().map(|row| squared_difference(&row, &mean)).sum::<f64>();
                square += o.rows().into_iter().map(|row| squared_difference(&row, &zero)).sum::<f64>();
            }
        }
        let variance = variance.max(T::EPSILON.to_f64() * square);
        if variance > 0.0 { variance } else { 1.0 }
    }

    /// `params` with the centres of the samples.
    fn centred(&self, head: usize, params: &DctParams) -> DctParams {
        let root = self.projections.scale().sqrt();
        let scaled = |mean: Vec<f64>| mean.into_iter().map(|mean| root * mean).collect();
        let mut params = params.clone();
        params.query.center = scaled(mean_row(self.samples.iter().map(|sample| self.queries(head, &sample.projected.q))));
        params.key.center = scaled(mean_row(self.samples.iter().map(|sample| self.keys(head, &sample.projected.k))));
        params
    }

    /// The error of every head with these maps, relative to the variance.
    fn errors(&self, params: Vec<DctParams>) -> Result<Vec<f64>> {
        let heads = params.into_iter().zip(&self.log_decay).map(|(params, &decay)| self.head(params, decay));
        let heads: Vec<LinearAttention<T, DctMap<T>>> = heads.collect::<Result<_>>()?;
        let mut sums = vec![Ok(0.0); heads.len() * self.samples.len()];
        let workspace = || heads.first().map(LinearAttention::workspace);
        let mut workspaces: Vec<_> = (0..max_threads().min(sums.len())).filter_map(|_| workspace()).collect();
        for_each(&mut workspaces, sums.iter_mut().enumerate(), |workspace, (i, sum)| {
            let (head, sample) = (i / self.samples.len(), &self.samples[i % self.samples.len()]);
            *sum = self.squared_error(head, &heads[head], sample, workspace);
        });
        let sums = sums.into_iter().collect::<Result<Vec<f64>>>()?;
        Ok(sums.chunks(self.samples.len()).zip(&self.variance).map(|(sums, variance)| sums.iter().sum::<f64>() / variance).collect())
    }

    /// The linear attention of one key-value head.
    fn head(&self, params: DctParams, log_decay: f64) -> Result<LinearAttention<T, DctMap<T>>> {
        self.config.clone().with_log_decay(vec![log_decay]).build(vec![DctMap::from_params(params)?])
    }

    /// Σ (ô − o)² of one key-value head over one sample.
    fn squared_error(
        &self,
        head: usize,
        linear: &LinearAttention<T, DctMap<T>>,
        sample: &Sample<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<f64> {
        let Projected { q, k, v } = &sample.projected;
        let (q, k, v) = (self.queries(head, q), self.keys(head, k), self.keys(head, v));
        let mut out = Array3::zeros(q.raw_dim());
        match self.projections.config().causality {
            Causality::Causal => linear.prefill_into(&mut linear.new_state(), &q, &k, &v, KeyMask::All, &mut out, workspace)?,
            Causality::Bidirectional => linear.full_into(&q, &k, &v, KeyMask::All, &mut out, workspace)?,
        }
        let teacher = self.queries(head, &sample.teacher);
        Ok(out.iter().zip(&teacher).map(|(a, b)| (a.to_f64() - b.to_f64()).powi(2)).sum())
    }
}

/// Mean over all rows of all arrays, which end in the same axis.
fn mean_row<'s, T: Real>(arrays: impl Iterator<Item = ArrayView3<'s, T>>) -> Vec<f64> {
    let (mut sums, mut rows) = (Vec::new(), 0);
    for array in arrays {
        sums.resize(array.len_of(Axis(2)), 0.0);
        for row in array.rows() {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value.to_f64());
            rows += 1;
        }
    }
    sums.into_iter().map(|sum| sum / rows as f64).collect()
}

fn squared_difference<T: Real>(row: &ArrayRef1<T>, mean: &[f64]) -> f64 {
    row.iter().zip(mean).map(|(value, mean)| (value.to_f64() - mean).powi(2)).sum()
}
