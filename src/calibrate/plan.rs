//! [`Planner`]: which key-value head of a model gets which local window, under a budget.
//!
//! ```text
//! ε(c) = mean_t |W_o (ô_t − o_t)|² / |h_t|²
//! ```
//!
//! with o a head's softmax outputs, ô its outputs with a window of chunks of c tokens, W_o its
//! columns of the output projection, and h the hidden state that enters the block: the energy that
//! the head's error leaves in the residual stream. It is measured for every head and every window
//! on offer, layer by layer, on hidden states of the softmax model. Then all heads start at the
//! smallest window, and whoever gains most per unit of cost takes the next step up, over whole
//! jumps: from 64 to 512 at once, where 128 alone would hardly help. Heads differ by orders of
//! magnitude in what a window is worth to them.

use ndarray::{Array2, ArrayView2, Axis, s};

use super::energy;
use super::sample::Sample;
use crate::Real;
use crate::attention::{Window, check_exact_part, largest_window};
use crate::check::{check_len, check_shape};
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::layer::{Attention, DijiangAttention};
use crate::low::simd::product;
use crate::threads::{max_threads, try_each};

/// What a plan may cost, over all key-value heads of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum Budget {
    /// Bytes of state of one sequence.
    Bytes(usize),
    /// Half of the tokens that a head's window holds, on average: the length of a chunk, if there
    /// is one chunk back.
    AverageWindow(f64),
    /// Multiply-adds of a token's attention, all heads: what decoding time goes by.
    Work(usize),
}

/// How a [`Planner`] measures.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PlanOptions {
    /// Windows on offer, none of which holds fewer tokens than the one before. Default: 32, 64,
    /// 128, 256, 512, 1024 and 2048 tokens in eight chunks, or in chunks of 16. A query sees all of
    /// them but, on average, half a chunk: with two chunks a quarter of the window lies idle, with
    /// eight a sixteenth. Those of 64 to 512 tokens are there a second time with a quarter of their
    /// room for kept keys; longer ones are what finds a passage again word by word, and stay whole.
    pub windows: Vec<Window>,
    /// Sinks beside every window. Default: 4.
    pub sinks: usize,
}

impl Default for PlanOptions {
    fn default() -> Self {
        let offers = [32, 64, 128, 256, 512, 1024, 2048].map(|tokens: usize| {
            let chunk = (tokens / 8).max(16);
            let with =
                |kept: usize| Window::new(chunk, (tokens - kept) / chunk - 1).with_kept(kept);
            let kept = (64..=512).contains(&tokens).then_some(tokens / 4);
            [0].into_iter().chain(kept).map(with).collect::<Vec<_>>()
        });
        Self { windows: offers.concat(), sinks: 4 }
    }
}

impl PlanOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Windows on offer, none of which holds fewer tokens than the one before.
    #[must_use]
    pub fn with_windows(self, windows: Vec<Window>) -> Self {
        Self { windows, ..self }
    }

    /// Sinks beside every window.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }
}

/// Measurements of a model, layer by layer, from which [`plan`](Self::plan) makes a plan for any
/// budget. Deterministic; holds a number for each head and window.
///
/// # Examples
/// ```
/// use dijiang::attention::Window;
/// use dijiang::calibrate::{Budget, PlanOptions, Planner, Sample};
/// use dijiang::layer::{
///     AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
/// };
/// use ndarray::Array2;
///
/// let matrix = |p: usize| {
///     Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 9.0 - 0.9)
/// };
/// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
/// let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
///
/// let windows = [4, 8, 16, 32].map(|chunk| Window::new(chunk, 1));
/// let mut planner = Planner::new(PlanOptions::new().with_windows(windows.to_vec()))?;
/// let x = Array2::from_shape_fn((200, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0);
/// let sample = Sample::new(&softmax, &x)?;
/// planner.measure(&linear, &[(&sample, x.view())])?; // one layer of one window of text
///
/// let plan = planner.plan(Budget::AverageWindow(16.0))?;
/// assert!(plan.average_window() <= 16.0);
/// let linear = plan.apply(0, &linear)?;
/// assert_eq!(linear.windows(), plan.windows(0)?);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Planner {
    options: PlanOptions,
    /// `[layers][kv heads]`
    layers: Vec<Vec<Measured>>,
}

/// One head.
#[derive(Debug, Clone)]
struct Measured {
    /// ε of each window on offer.
    errors: Vec<f64>,
    /// Bytes of state and multiply-adds of a token with each window on offer.
    bytes: Vec<usize>,
    work: Vec<usize>,
}

/// What a plan says of one key-value head.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct HeadPlan {
    /// Its window.
    pub window: Window,
    /// ε that was measured with it.
    pub error: f64,
    /// Bytes of its state.
    pub bytes: usize,
}

/// A point of the frontier: what less or more memory would buy.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Point {
    /// Half of the tokens that a head's window holds, on average.
    pub average_window: f64,
    /// Bytes of state, all heads.
    pub bytes: usize,
    /// Σ ε, all heads.
    pub error: f64,
}

/// A window for every key-value head of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    layers: Vec<Vec<HeadPlan>>,
    sinks: usize,
    frontier: Vec<Point>,
}

impl Planner {
    /// Without a layer yet.
    ///
    /// # Errors
    /// [`Error::Empty`] without windows, [`Error::Value`] if one holds fewer tokens than the one
    /// before, [`Error::TooLarge`] for windows too large, and for more sinks than the smallest
    /// chunk has tokens or 64.
    pub fn new(options: PlanOptions) -> Result<Self> {
        if options.windows.is_empty() {
            return Err(Error::Empty { argument: "windows" });
        }
        check_exact_part(&options.windows, options.sinks)?;
        let pairs = || options.windows.windows(2);
        if let Some(pair) = pairs().find(|pair| pair[1].tokens() < pair[0].tokens()) {
            let (expected, got) = ("no smaller than the one before", pair[1].tokens() as f64);
            return Err(Error::Value { argument: "windows", expected, got });
        }
        Ok(Self { options, layers: Vec::new() })
    }

    /// Measures the model's next layer.
    ///
    /// `linear` is the layer that will take the place of the softmax layer, its maps calibrated
    /// behind the smallest window say; its own windows and sinks do not matter. `samples` holds for
    /// every window of text the softmax layer's sample, and the hidden states that enter the block
    /// (the residual stream), `[n, D]`.
    ///
    /// # Cost
    /// A pass of linear attention for every window on offer. Keeps a few numbers per head.
    ///
    /// # Errors
    /// [`Error::Empty`] without samples, [`Error::Foreign`] for those of a layer of another shape,
    /// [`Error::Shape`] for hidden states of another shape. After an error nothing was added.
    pub fn measure<T: Real>(
        &mut self,
        linear: &DijiangAttention<T>,
        samples: &[(&Sample<T>, ArrayView2<'_, T>)],
    ) -> Result<()> {
        if samples.is_empty() {
            return Err(Error::Empty { argument: "samples" });
        }
        let offers: Vec<DijiangAttention<T>> = self
            .options
            .windows
            .iter()
            .map(|&window| linear.clone().with_windows(vec![window], self.options.sinks))
            .collect::<Result<_>>()?;
        let kv_heads = linear.config().kv_heads;
        let grams = (0..kv_heads).map(|head| gram(linear, head)).collect::<Vec<_>>();
        let mut errors = vec![vec![0.0; offers.len()]; kv_heads];
        let mut rows = 0;
        for (sample, hidden) in samples {
            sample.check(&linear.proj)?;
            check_shape("hidden states", hidden, &[sample.len(), linear.config().model_dim])?;
            let energies: Vec<f64> = hidden.rows().into_iter().map(energy).collect();
            let mut of_offers: Vec<Vec<f64>> = vec![Vec::new(); offers.len()];
            let threads = &mut vec![(); max_threads().min(offers.len())];
            // The largest windows first: nobody waits for them at the end.
            let items = offers.iter().zip(&mut of_offers).rev();
            try_each(threads, items, |(), (offer, errors)| {
                *errors = residual_errors(offer, sample, &grams, &energies)?;
                Ok::<(), Error>(())
            })?;
            for (offer, of_heads) in of_offers.into_iter().enumerate() {
                for (errors, error) in errors.iter_mut().zip(of_heads) {
                    errors[offer] += error;
                }
            }
            rows += sample.len();
        }
        let measured = errors.into_iter().map(|errors| Measured {
            errors: errors.into_iter().map(|error| error / rows as f64).collect(),
            bytes: offers.iter().map(|offer| offer.new_state().bytes() / kv_heads).collect(),
            work: offers.iter().map(|offer| work(offer) / kv_heads).collect(),
        });
        self.layers.push(measured.collect());
        Ok(())
    }

    /// The plan for `budget`, over all layers that were measured.
    ///
    /// # Errors
    /// [`Error::Empty`] if none was; [`Error::Value`] for a budget below that of the smallest
    /// window in every head, which it names.
    pub fn plan(&self, budget: Budget) -> Result<Plan> {
        if self.layers.is_empty() {
            return Err(Error::Empty { argument: "layers measured" });
        }
        let heads: Vec<&Measured> = self.layers.iter().flatten().collect();
        let cost = |head: &Measured, offer: usize| match budget {
            Budget::Bytes(_) => head.bytes[offer] as f64,
            Budget::AverageWindow(_) => half(self.options.windows[offer]),
            Budget::Work(_) => head.work[offer] as f64,
        };
        let (argument, limit) = match budget {
            Budget::Bytes(bytes) => ("bytes of state", bytes as f64),
            Budget::AverageWindow(chunk) => ("average window", chunk * heads.len() as f64),
            Budget::Work(work) => ("work", work as f64),
        };
        let mut spent: f64 = heads.iter().map(|head| cost(head, 0)).sum();
        if limit.is_nan() || spent > limit {
            let expected = "enough for the smallest window in every head";
            return Err(Error::Value { argument, expected, got: limit });
        }
        let mut chosen = vec![0; heads.len()];
        let mut frontier = vec![self.point(&chosen)];
        while let Some((head, offer)) = best_jump(&heads, &chosen, limit - spent, &cost) {
            spent += cost(heads[head], offer) - cost(heads[head], chosen[head]);
            chosen[head] = offer;
            frontier.push(self.point(&chosen));
        }
        let mut offers = chosen.into_iter();
        let layers = self.layers.iter().map(|layer| {
            let heads = layer.iter().zip(&mut offers).map(|(head, offer)| HeadPlan {
                window: self.options.windows[offer],
                error: head.errors[offer],
                bytes: head.bytes[offer],
            });
            heads.collect()
        });
        Ok(Plan { layers: layers.collect(), sinks: self.options.sinks, frontier })
    }

    /// Where a choice for every head lies.
    fn point(&self, chosen: &[usize]) -> Point {
        let heads = || self.layers.iter().flatten().zip(chosen);
        let halves: f64 = chosen.iter().map(|&offer| half(self.options.windows[offer])).sum();
        Point {
            average_window: halves / chosen.len() as f64,
            bytes: heads().map(|(head, &offer)| head.bytes[offer]).sum(),
            error: heads().map(|(head, &offer)| head.errors[offer]).sum(),
        }
    }
}

/// Half of the tokens that a window holds.
fn half(window: Window) -> f64 {
    window.tokens() as f64 / 2.0
}

/// The head and the window whose step up gains most per unit of cost, of those that fit in `left`;
/// a better window that costs no more first of all.
fn best_jump(
    heads: &[&Measured],
    chosen: &[usize],
    left: f64,
    cost: &impl Fn(&Measured, usize) -> f64,
) -> Option<(usize, usize)> {
    let mut best: Option<(f64, usize, usize)> = None;
    for (h, (head, &at)) in heads.iter().zip(chosen).enumerate() {
        for offer in at + 1..head.errors.len() {
            let more = cost(head, offer) - cost(head, at);
            let saved = head.errors[at] - head.errors[offer];
            let gain = if more > 0.0 { saved / more } else { saved * f64::INFINITY };
            if more <= left && gain > best.map_or(0.0, |(gain, ..)| gain) {
                best = Some((gain, h, offer));
            }
        }
    }
    best.map(|(_, head, offer)| (head, offer))
}

impl Plan {
    /// For every layer its key-value heads.
    pub fn layers(&self) -> &[Vec<HeadPlan>] {
        &self.layers
    }

    /// Sinks of every head.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// What the way to this plan passed through, from the smallest windows on: error against bytes.
    pub fn frontier(&self) -> &[Point] {
        &self.frontier
    }

    /// Half of the tokens that a head's window holds, on average.
    pub fn average_window(&self) -> f64 {
        let heads = || self.layers.iter().flatten();
        heads().map(|head| half(head.window)).sum::<f64>() / heads().count() as f64
    }

    /// Bytes of state of one sequence, all layers.
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|head| head.bytes).sum()
    }

    /// The windows of layer `l`, for all its key-value heads.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that was not planned.
    pub fn windows(&self, l: usize) -> Result<Vec<Window>> {
        let layer = self.layers.get(l).ok_or(Error::Value {
            argument: "layer",
            expected: "one of the plan's",
            got: l as f64,
        })?;
        Ok(layer.iter().map(|head| head.window).collect())
    }

    /// `layer` with the windows of layer `l`, and the sinks.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that was not planned, [`Error::Length`] for a layer with
    /// another number of key-value heads.
    pub fn apply<T: Real>(
        &self,
        l: usize,
        layer: &DijiangAttention<T>,
    ) -> Result<DijiangAttention<T>> {
        let windows = self.windows(l)?;
        check_len("heads of the plan", layer.config().kv_heads, windows.len())?;
        layer.clone().with_windows(windows, self.sinks)
    }
}

/// W_oᵀ W_o of a key-value head's columns, `[group·d, group·d]`.
fn gram<T: Real>(layer: &DijiangAttention<T>, head: usize) -> Array2<T> {
    let width = layer.config().heads / layer.config().kv_heads * layer.proj.head_dim();
    let columns = layer.weights().o.slice(s![.., head * width..(head + 1) * width]);
    let mut gram = Array2::zeros((width, width));
    product(columns.t(), columns, gram.view_mut(), false);
    gram
}

/// Multiply-adds of a token's attention in all heads, once the windows are full.
fn work<T: Real>(layer: &DijiangAttention<T>) -> usize {
    let (config, d) = (layer.config(), layer.proj.head_dim());
    let m = layer.maps()[0].features();
    let window = largest_window(layer.windows()).map_or(0, Window::tokens);
    2 * config.heads * d * (m + window) + 2 * config.kv_heads * d * m
}

/// Σ_t |W_o (ô_t − o_t)|² / |h_t|² of every key-value head.
fn residual_errors<T: Real>(
    layer: &DijiangAttention<T>,
    sample: &Sample<T>,
    grams: &[Array2<T>],
    energies: &[f64],
) -> Result<Vec<f64>> {
    let mut difference = sample.outputs(layer)?;
    difference -= &sample.teacher;
    let width = difference.ncols() / grams.len();
    let errors = grams.iter().enumerate().map(|(head, gram)| {
        let own = difference.slice(s![.., head * width..(head + 1) * width]);
        let mut through = Array2::zeros(own.raw_dim());
        product(own, gram.view(), through.view_mut(), false);
        let rows = own.axis_iter(Axis(0)).zip(through.axis_iter(Axis(0))).zip(energies);
        rows.map(|((own, through), energy)| {
            let dot: f64 = own.iter().zip(through).map(|(a, b)| a.to_f64() * b.to_f64()).sum();
            dot.max(0.0) / energy
        })
        .sum()
    });
    Ok(errors.collect())
}
