//! [`PublishedAttention`]: the attention layer of the code published with the paper, which is
//! another function than the paper's.
//!
//! ```text
//! φ(z) = softmax_f (t_f·[Cᵀz]_f)                   of rotated, unscaled queries and keys
//! o_i  = Σ_{j≤i} γ^(i−j) (φ(q_i)·φ(k_j)) v_j       γ per head, no normaliser
//! y_i  = W_o (silu(x_i W_g) ⊙ norm(o_i)) + b_o     norm: GroupNorm over the channels of all heads
//! ```

use std::sync::Arc;

use ndarray::{
    Array1, Array2, Array3, ArrayRef1, ArrayRef2, ArrayRef3, ArrayView2, ArrayViewMut2, Axis, s,
};

use crate::Real;
use crate::attention::KeyMask;
use crate::check::{check_elements, check_finite, check_len, check_same, check_shape};
use crate::error::{Error, Result};
use crate::kernel::{hash, published_projection, softmax_rows, word};
use crate::layer::Attention;
use crate::layer::config::{AttentionConfig, check_no_sliding};
use crate::layer::qkv_proj::{ProjectedQkv, QkvProj, StepScratch};
use crate::layer::weights::AttentionWeights;
use crate::simd::product;
use crate::threads::{for_each, max_threads};

/// Tokens worked on at a time.
const BLOCK: usize = 64;
/// Most heads.
const MOST_HEADS: usize = 1 << 20;

/// What the published layer has beside the projections of every attention layer.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct PublishedWeights<T> {
    /// Radii t, `[d]`, shared by all heads, queries and keys.
    pub radii: Vec<f64>,
    /// log γ ≤ 0 of every head.
    pub log_decay: Vec<f64>,
    /// W_g, `[D, D]`, in the code's own layout: x W_g.
    pub gate: Array2<T>,
    /// Scale of the normalised channels, `[D]`.
    pub norm_scale: Array1<T>,
    /// What is added to them, `[D]`.
    pub norm_shift: Array1<T>,
    /// Groups of consecutive channels that are normalised together. The code: d of them, of h
    /// channels each.
    pub groups: usize,
    /// Added to the variance of a group. The code: 10⁻⁵.
    pub epsilon: f64,
}

impl<T: Real> PublishedWeights<T> {
    /// Everything that is trained, with as many groups as radii and ε = 10⁻⁵. Checked by the
    /// layer's constructor.
    ///
    /// # Shapes
    /// - `radii`: `[d]`, `log_decay`: `[h]`, `gate`: `[D, D]`, `norm_scale` and `norm_shift`: `[D]`
    pub fn new(
        radii: Vec<f64>,
        log_decay: Vec<f64>,
        gate: Array2<T>,
        norm_scale: Array1<T>,
        norm_shift: Array1<T>,
    ) -> Self {
        Self { groups: radii.len(), radii, log_decay, gate, norm_scale, norm_shift, epsilon: 1e-5 }
    }

    /// The decays log γ, `[heads]`, that the code gives its heads: γ = 1 − 2^−a, a from 5 to 9 in
    /// equal steps. None for more than 2²⁰ heads, which no layer has.
    pub fn decays(heads: usize) -> Vec<f64> {
        let heads = if heads > MOST_HEADS { 0 } else { heads };
        let step = 4.0 / heads.saturating_sub(1).max(1) as f64;
        (0..heads).map(|h| (-(-(5.0 + step * h as f64)).exp2()).ln_1p()).collect()
    }

    fn check(&self, config: &AttentionConfig, head_dim: usize) -> Result<()> {
        let (channels, limit) = (config.model_dim, T::LIMIT);
        check_len("radii", head_dim, self.radii.len())?;
        check_len("log_decay", config.heads, self.log_decay.len())?;
        for &decay in &self.log_decay {
            check_finite("log_decay", decay)?;
            if decay > 0.0 {
                return Err(Error::Value {
                    argument: "log_decay",
                    expected: "at most 0",
                    got: decay,
                });
            }
        }
        if let Some(index) = self.radii.iter().position(|t| t.is_nan() || t.abs() > limit) {
            return Err(Error::NonFinite {
                argument: "radii",
                index,
                limit,
                got: self.radii[index],
            });
        }
        check_shape("gate", &self.gate, &[channels, channels])?;
        check_len("norm_scale", channels, self.norm_scale.len())?;
        check_len("norm_shift", channels, self.norm_shift.len())?;
        check_elements("gate", &self.gate)?;
        check_elements("norm_scale", &self.norm_scale)?;
        check_elements("norm_shift", &self.norm_shift)?;
        if self.groups == 0 || !channels.is_multiple_of(self.groups) {
            return Err(Error::Value {
                argument: "groups",
                expected: "a divisor of the model dimension",
                got: self.groups as f64,
            });
        }
        if !(self.epsilon.is_finite() && self.epsilon > 0.0) {
            return Err(Error::Value {
                argument: "epsilon",
                expected: "finite and positive",
                got: self.epsilon,
            });
        }
        Ok(())
    }
}

/// The attention layer of the code published with the paper.
///
/// **Which one to use.** This one for models that were trained with that code, and for nothing
/// else: it computes what they computed. To exchange the attention of a trained softmax model take
/// [`DijiangAttention`](crate::layer::DijiangAttention): it starts from the weights of the softmax
/// layer and is close to it after seconds of calibration, while this one has a gate and a norm that
/// no softmax layer has, so it means nothing before it has been trained, for about as many tokens
/// as the paper's models.
///
/// What differs from the paper's formula:
///
/// * features are softmaxed over f, so they sum to one; the paper weighs `exp(t_f·[Cx]_f)` by D_f,
///   and there is no D here;
/// * the transform is a DCT-III (Cᵀ), the paper's a DCT-II (C);
/// * queries and keys are not scaled by 1/√d;
/// * the radii t are independent normal numbers, the paper's quasi-Monte Carlo points; all heads,
///   queries and keys share them;
/// * there is no normaliser `Σ_j φ(q_i)·φ(k_j)`: GroupNorm over the channels of a token takes its
///   place, over groups of h channels that are no heads;
/// * a SiLU gate of the layer's input multiplies what comes out of the norm;
/// * every head decays, by a γ that is not trained.
///
/// What `DijiangAttention` has beside the paper's formula and this layer has not: the exact near
/// part, centres and mix, any number of features, calibration, gradients, grouped queries,
/// bidirectional attention, a batched step, files of its own.
///
/// What differs from that code: decay is applied as exp((i − j)·log γ), where the code multiplies
/// γⁱ by γ^−j, which overflows on long sequences; time is O(n), where the code computes n×n scores;
/// and [`step`](Attention::step) agrees with the whole pass, where the code's cached decoding sees
/// one key only.
///
/// # Cost
/// O(n·d²) per head, a state of d² numbers per head.
#[derive(Debug, Clone)]
pub struct PublishedAttention<T> {
    proj: QkvProj<T>,
    weights: Arc<PublishedWeights<T>>,
    /// diag(t)·C, transposed: features are the softmax of z·P, `[d, d]`.
    projection: Arc<Array2<T>>,
    /// Of radii and decays: what states are told apart by.
    fingerprint: u64,
}

/// What one sequence leaves behind for its next tokens, at constant size.
#[derive(Debug, Clone)]
pub struct PublishedState<T> {
    /// Σ_j γ^(p−j) φ(k_j) v_jᵀ of every head, p being the last position, `[h, d, d]`.
    sums: Array3<T>,
    position: usize,
    scratch: StepScratch<T>,
    /// Of the layer.
    fingerprint: u64,
}

impl<T: Real> PublishedState<T> {
    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes of state, the same at any position.
    pub fn bytes(&self) -> usize {
        self.sums.len() * size_of::<T>()
    }

    /// Back to the empty state.
    pub fn reset(&mut self) {
        self.sums.fill(T::zero());
        self.position = 0;
    }
}

/// Equal sums at equal positions; the scratch memory means nothing.
impl<T: Real> PartialEq for PublishedState<T> {
    fn eq(&self, other: &Self) -> bool {
        self.position == other.position && self.sums == other.sums
    }
}

impl<T: Real> PublishedAttention<T> {
    /// Checks config and weights. Both may be given as they are or behind an `Arc`, which is then
    /// shared.
    ///
    /// # Cost
    /// A pass over the weights, and a `[d, d]` matrix; weights are moved or shared, not copied.
    ///
    /// # Errors
    /// Whatever [`AttentionConfig::check`] and [`AttentionWeights::check`] find; [`Error::Value`]
    /// for grouped queries, heads whose dimensions do not add up to the model's, groups that do not
    /// divide it, positive decays; [`Error::Shape`], [`Error::Length`] and [`Error::NonFinite`] for
    /// `published`; [`Error::Conflict`] for bidirectional attention and sliding windows.
    pub fn new(
        config: AttentionConfig,
        weights: impl Into<Arc<AttentionWeights<T>>>,
        published: impl Into<Arc<PublishedWeights<T>>>,
    ) -> Result<Self> {
        let (proj, published) = (QkvProj::new(config, weights.into())?, published.into());
        let (config, d) = (proj.config(), proj.head_dim());
        check_no_sliding(config)?;
        config.causality.check_causal("the published layer")?;
        if config.kv_heads != config.heads {
            return Err(Error::Value {
                argument: "kv_heads",
                expected: "as many as heads",
                got: config.kv_heads as f64,
            });
        }
        if config.heads * d != config.model_dim {
            return Err(Error::Value {
                argument: "head_dim",
                expected: "model_dim / heads",
                got: d as f64,
            });
        }
        published.check(config, d)?;
        let projection = Arc::new(published_projection(&published.radii));
        let numbers = published.radii.iter().chain(&published.log_decay);
        let fingerprint = hash(numbers.map(|&number| word(number)));
        Ok(Self { proj, weights: published, projection, fingerprint })
    }

    /// The projection weights.
    pub fn weights(&self) -> &Arc<AttentionWeights<T>> {
        self.proj.weights()
    }

    /// Everything else that is trained.
    pub fn published_weights(&self) -> &Arc<PublishedWeights<T>> {
        &self.weights
    }

    /// The next n tokens of every head through its sums; `q`, `k`, `v`, `out` are `[h, n, d]`,
    /// elements in range.
    fn attend(
        &self,
        sums: &mut Array3<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
    ) {
        let valid = mask.valid();
        let heads =
            q.outer_iter().zip(k.outer_iter()).zip(v.outer_iter().zip(out.outer_iter_mut()));
        let items = heads.zip(sums.outer_iter_mut().zip(&self.weights.log_decay));
        let threads = max_threads().min(q.len_of(Axis(0)));
        for_each(
            &mut vec![(); threads],
            items,
            |(), (((q, k), (v, mut out)), (mut sums, &decay))| {
                for start in (0..q.nrows()).step_by(BLOCK) {
                    let tokens = s![start..q.nrows().min(start + BLOCK), ..];
                    let valid = |j: usize| valid.is_none_or(|valid| valid[start + j]);
                    self.block(
                        decay,
                        valid,
                        q.slice(tokens),
                        k.slice(tokens),
                        v.slice(tokens),
                        out.slice_mut(tokens),
                        sums.view_mut(),
                    );
                }
            },
        );
    }

    /// One block of one head.
    #[allow(clippy::too_many_arguments, reason = "views into what is shared out among threads")]
    fn block(
        &self,
        decay: f64,
        valid: impl Fn(usize) -> bool,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mut out: ArrayViewMut2<'_, T>,
        mut sums: ArrayViewMut2<'_, T>,
    ) {
        let n = q.nrows();
        let power = |steps: usize| T::from_f64((decay * steps as f64).exp());
        let (mut queries, mut keys) = (self.features(q), self.features(k));
        // A masked key's features are nothing, and neither is its value.
        let mut values = v.to_owned();
        for j in (0..n).filter(|&j| !valid(j)) {
            keys.row_mut(j).fill(T::zero());
            values.row_mut(j).fill(T::zero());
        }
        let mut scores = Array2::zeros((n, n));
        product(queries.view(), keys.t(), scores.view_mut(), false);
        for ((i, j), score) in scores.indexed_iter_mut() {
            *score = if j <= i { *score * power(i - j) } else { T::zero() };
        }
        product(scores.view(), values.view(), out.view_mut(), false);
        for (i, mut row) in queries.outer_iter_mut().enumerate() {
            let factor = power(i + 1);
            row.mapv_inplace(|x| x * factor);
        }
        product(queries.view(), sums.view(), out, true);
        for (j, mut row) in keys.outer_iter_mut().enumerate() {
            let factor = power(n - 1 - j);
            row.mapv_inplace(|x| x * factor);
        }
        let factor = power(n);
        sums.mapv_inplace(|x| x * factor);
        product(keys.t(), values.view(), sums, true);
    }

    /// φ of every row.
    fn features(&self, rows: ArrayView2<'_, T>) -> Array2<T> {
        let mut features = Array2::zeros(rows.raw_dim());
        product(rows, self.projection.view(), features.view_mut(), false);
        softmax_rows(features.view_mut());
        features
    }

    /// GroupNorm over the channels of each token of `o` `[h, n, d]`, times the gate of its input
    /// `x` `[n, D]`.
    fn normalise(&self, x: ArrayView2<'_, T>, o: &mut ArrayRef3<T>) {
        let PublishedWeights { gate, norm_scale, norm_shift, groups, epsilon, .. } = &*self.weights;
        let mut gates = Array2::zeros(x.raw_dim());
        product(x, gate.view(), gates.view_mut(), false);
        let (d, size) = (o.len_of(Axis(2)), x.ncols() / groups);
        for (i, gates) in gates.outer_iter().enumerate() {
            for group in 0..*groups {
                let channels = group * size..(group + 1) * size;
                let values: Vec<f64> = channels
                    .clone()
                    .map(|channel| o[[channel / d, i, channel % d]].to_f64())
                    .collect();
                let mean = values.iter().sum::<f64>() / size as f64;
                let variance =
                    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / size as f64;
                let root = (variance + epsilon).sqrt();
                for (channel, value) in channels.zip(values) {
                    let gate = gates[channel].to_f64();
                    let silu = gate / (1.0 + (-gate).exp());
                    let normed = (value - mean) / root * norm_scale[channel].to_f64()
                        + norm_shift[channel].to_f64();
                    o[[channel / d, i, channel % d]] = T::from_f64(silu * normed);
                }
            }
        }
    }

    fn check_state(&self, state: &PublishedState<T>) -> Result<()> {
        let (config, d) = (self.proj.config(), self.proj.head_dim());
        let (heads, dim, _) = state.sums.dim();
        let fingerprints = (self.fingerprint as usize, state.fingerprint as usize);
        let pairs = [
            ("number of heads", config.heads, heads),
            ("head dimension", d, dim),
            ("fingerprint", fingerprints.0, fingerprints.1),
        ];
        check_same("state", pairs)
    }
}

impl<T: Real> Attention<T> for PublishedAttention<T> {
    type State = PublishedState<T>;

    fn config(&self) -> &AttentionConfig {
        self.proj.config()
    }

    fn new_state(&self) -> PublishedState<T> {
        let (heads, d) = (self.proj.config().heads, self.proj.head_dim());
        PublishedState {
            sums: Array3::zeros((heads, d, d)),
            position: 0,
            scratch: self.proj.step_scratch(),
            fingerprint: self.fingerprint,
        }
    }

    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> Result<Array2<T>> {
        self.prefill(&mut self.new_state(), x, mask)
    }

    fn prefill(
        &self,
        state: &mut PublishedState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        self.check_state(state)?;
        self.proj.check_sequence("x", x)?;
        if let KeyMask::Valid(valid) = mask {
            check_len("mask", x.nrows(), valid.len())?;
        }
        let ProjectedQkv { q, k, v } = self.proj.project(x, state.position);
        let [q, k, v] = [&q, &k, &v].map(|rows| self.proj.heads(rows));
        let mut o = Array2::zeros((x.nrows(), q.shape()[0] * q.shape()[2]));
        let mut out = self.proj.heads_mut(&mut o);
        let mut sums = state.sums.clone();
        for (argument, rows) in [("q", &q), ("k", &k), ("v", &v)] {
            check_elements(argument, rows)?;
        }
        self.attend(&mut sums, &q, &k, &v, mask, &mut out);
        self.normalise(x.view(), &mut out);
        check_elements("gated outputs", &out)?;
        state.sums = sums;
        state.position += x.nrows();
        Ok(self.proj.output(&o))
    }

    fn step(
        &self,
        state: &mut PublishedState<T>,
        x: &ArrayRef1<T>,
        out: &mut ArrayRef1<T>,
    ) -> Result<()> {
        self.check_state(state)?;
        let PublishedState { sums, position, scratch, .. } = state;
        check_len("out", self.config().model_dim, out.len())?;
        self.proj.project_token(x, *position, scratch)?;
        let StepScratch { q, k, v, o, .. } = &mut *scratch;
        for (argument, rows) in [("q", &*q), ("k", k), ("v", v)] {
            check_elements(argument, rows)?;
        }
        let token = |rows: &ArrayRef2<T>| rows.view().insert_axis(Axis(1)).into_owned();
        let mut o = o.view_mut().insert_axis(Axis(1));
        let mut next = sums.clone();
        self.attend(&mut next, &token(q), &token(k), &token(v), KeyMask::All, &mut o);
        self.normalise(x.view().insert_axis(Axis(0)), &mut o);
        check_elements("gated outputs", &o)?;
        *sums = next;
        *position += 1;
        self.proj.output_token(scratch, out);
        Ok(())
    }
}
