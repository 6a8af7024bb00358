//! [`DijiangAttention`]: the same layer with linear attention in place of softmax.
//!
//! ```text
//! A_ij = exp(x_i·y_j) where exact(i,j), otherwise γ^(i−j) · e^g · Σ_f exp(a_f(x_i) + b_f(y_j))
//! y    = W_o · concat_h (A v_h / A 1) + b_o                               x = √σ·q, y = √σ·k
//! ```
//! [Chen et al. 2024, arXiv 2403.19928; local window and centres: this crate]

use std::sync::Arc;

use ndarray::{Array2, ArrayRef2};

use crate::Real;
use crate::attention::{
    CausalState, Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Window,
    check_state_size, largest_window,
};
use crate::check::check_len;
use crate::error::{Error, Result};
use crate::kernel::{DctMap, DctMapConfig, FeatureMap, Pairing, mixed};
use crate::layer::config::check_no_sliding;
use crate::layer::generic::{Layer, LayerState};
use crate::layer::qkv_proj::{ProjectedQkv, QkvProj};
use crate::layer::softmax::SoftmaxAttention;
use crate::layer::weights::AttentionWeights;

/// How [`DijiangAttention::from_softmax`] sets up its attention.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DijiangOptions {
    /// The maps. Every head gets a seed of its own, derived from theirs.
    pub map: DctMapConfig,
    /// Local windows: none, one for all key-value heads, or one for each. Default: 64 tokens a
    /// chunk, one chunk back. A bidirectional layer has none and ignores them.
    pub windows: Vec<Window>,
    /// Sinks: the first tokens of a sequence, which stay exact for every later query. Without a
    /// window there are none. Default: 4.
    pub sinks: usize,
    /// log γ ≤ 0 of every head. Default: 0. Causal layers only.
    pub log_decay: f64,
}

impl Default for DijiangOptions {
    fn default() -> Self {
        Self {
            map: DctMapConfig::new(),
            windows: vec![Window::new(64, 1)],
            sinks: 4,
            log_decay: 0.0,
        }
    }
}

impl DijiangOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// How the maps are made.
    #[must_use]
    pub fn with_map(self, map: DctMapConfig) -> Self {
        Self { map, ..self }
    }

    /// One local window for all heads, or none.
    #[must_use]
    pub fn with_window(self, window: impl Into<Option<Window>>) -> Self {
        self.with_windows(window.into().into_iter().collect())
    }

    /// A local window for each key-value head.
    #[must_use]
    pub fn with_windows(self, windows: Vec<Window>) -> Self {
        Self { windows, ..self }
    }

    /// Sinks.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// log γ of every head.
    #[must_use]
    pub fn with_log_decay(self, log_decay: f64) -> Self {
        Self { log_decay, ..self }
    }

    /// Windows and sinks: a bidirectional layer has neither, and without a window there are no
    /// sinks.
    pub(crate) fn exact_part(&self, causality: Causality) -> (&[Window], usize) {
        match causality {
            Causality::Causal if !self.windows.is_empty() => (&self.windows, self.sinks),
            _ => (&[], 0),
        }
    }

    /// The map options of one key-value head.
    fn map(&self, head: usize) -> DctMapConfig {
        DctMapConfig { seed: head_seed(self.map.seed, head), ..self.map.clone() }
    }
}

/// SplitMix64 of seed and head: different streams for different heads.
fn head_seed(seed: u64, head: usize) -> u64 {
    mixed(seed.wrapping_add((head as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// A DCT-kernelized linear attention layer: O(n) time, and a state of constant size.
///
/// One map, one state per key-value head; the query heads that share a key-value head share both.
///
/// # Examples
///
/// ```
/// use dijiang::attention::{KeyMask, Window};
/// use dijiang::kernel::DctMapConfig;
/// use dijiang::layer::{
///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
///     SoftmaxAttention,
/// };
/// use ndarray::{Array2, array};
///
/// let eye = || Array2::<f64>::eye(2);
/// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(2, 1), weights)?;
/// let options = DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(4));
/// let layer = DijiangAttention::from_softmax(&softmax, options)?;
///
/// // Short sequences lie within the local window (64 tokens a chunk, one chunk back): the two
/// // layers agree.
/// let x = array![[1.0, 0.0], [0.0, 1.0], [-1.0, 0.5]];
/// let difference = layer.forward(&x, KeyMask::All)? - softmax.forward(&x, KeyMask::All)?;
/// assert!(difference.iter().all(|d| d.abs() < 1e-12));
///
/// // The state holds per head S [8, 2], z [8] and the window tokens, whatever the length.
/// let (mut state, mut bytes) = (layer.new_state(), Vec::new());
/// for _ in 0..3 {
///     layer.prefill(&mut state, &Array2::ones((100, 2)), KeyMask::All)?;
///     bytes.push(state.bytes());
/// }
/// assert_eq!(state.position(), 300);
/// assert!(bytes.iter().all(|&b| b == bytes[0]));
/// # Ok::<(), dijiang::Error>(())
/// ```
pub type DijiangAttention<T> = Layer<T, LinearAttention<T, DctMap<T>>>;

/// What one sequence leaves behind for its next tokens, at constant size, with the scratch memory
/// of a step.
pub type DijiangState<T> = LayerState<T, CausalState<T>>;

impl<T: Real> DijiangState<T> {
    /// The state as bytes, which [`DijiangAttention::state_from_bytes`] reads: see
    /// [`CausalState::to_bytes`].
    #[cfg(feature = "states")]
    pub fn to_bytes(&self, storage: crate::attention::Storage) -> Vec<u8> {
        self.attention.to_bytes(storage)
    }

    /// Takes over another state of the same layer, without allocating: back to a snapshot, or on
    /// from one.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of a layer of another shape or with other maps; this one is
    /// unchanged then.
    pub fn copy_from(&mut self, from: &Self) -> Result<()> {
        self.attention.copy_from(&from.attention)
    }
}

impl<T: Real> DijiangAttention<T> {
    /// Exchanges the attention of `layer` and keeps its weights (shared, not copied), rotary
    /// embedding, heads and scale. [Windows](SoftmaxAttention::with_windows) of `layer` are not
    /// taken over: `options` has its own.
    ///
    /// # Cost
    /// Draws and tabulates the maps, O(m·d) a key-value head at most. Nothing is measured on data:
    /// [`calibrate`](Self::calibrate).
    ///
    /// # Errors
    /// - [`Error::Value`], [`Error::TooLarge`]: impossible `options`, see [`DctMapConfig::build`]
    ///   and [`LinearConfig::build`];
    /// - [`Error::Conflict`]: a decay in a bidirectional layer; a layer with a
    ///   [sliding window](crate::layer::AttentionConfig::sliding_window).
    pub fn from_softmax(layer: &SoftmaxAttention<T>, options: DijiangOptions) -> Result<Self> {
        let proj = layer.proj.clone();
        check_no_sliding(proj.config())?;
        let (heads, d) = (proj.config().kv_heads, proj.head_dim());
        let (windows, sinks) = options.exact_part(proj.config().causality);
        options.map.check(d)?;
        let features =
            options.map.blocks * d * if options.map.pairing == Pairing::Antithetic { 2 } else { 1 };
        check_state_size(heads, d, features, d, largest_window(windows))?;
        let maps = (0..heads).map(|head| options.map(head).build(d)).collect::<Result<_>>()?;
        let config = LinearConfig::new()
            .with_windows(windows.to_vec())
            .with_sinks(sinks)
            .with_log_decay(vec![options.log_decay; heads]);
        Self::from_parts(proj, config, maps)
    }

    /// A layer of its parts: as many maps and decays as key-value heads, of the head dimension. Of
    /// `config`, windows, sinks and decay count.
    pub(crate) fn from_parts(
        proj: QkvProj<T>,
        config: LinearConfig,
        maps: Vec<DctMap<T>>,
    ) -> Result<Self> {
        let of_layer = proj.config();
        let attention = config
            .with_heads(of_layer.heads)
            .with_scale(proj.scale())
            .with_causality(of_layer.causality)
            .build(maps)?;
        Ok(Self { proj, attention })
    }

    /// The state that [`DijiangState::to_bytes`] wrote, for a layer of this shape: see
    /// [`LinearAttention::state_from_bytes`].
    ///
    /// # Errors
    /// As [`LinearAttention::state_from_bytes`].
    #[cfg(feature = "states")]
    pub fn state_from_bytes(&self, bytes: &[u8]) -> Result<DijiangState<T>> {
        Ok(self.state_of(self.attention.state_from_bytes(bytes)?))
    }

    /// The layer's state with this state of its attention, put aside by [`LayerState::attention`].
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of a layer of another shape or with other maps.
    pub fn resume(&self, state: CausalState<T>) -> Result<DijiangState<T>> {
        self.attention.check_state(&state)?;
        Ok(self.state_of(state))
    }

    /// The empty state of a segment that begins at `position` of its sequence: see
    /// [`LinearAttention::new_state_at`].
    ///
    /// # Errors
    /// As [`LinearAttention::new_state_at`].
    pub fn new_state_at(&self, position: usize) -> Result<DijiangState<T>> {
        Ok(self.state_of(self.attention.new_state_at(position)?))
    }

    /// Tokens that nobody queries join a state: [`prefill`](crate::layer::Attention::prefill)
    /// without outputs, at less than half the cost. The state becomes the same, bit for bit.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: n keys.
    ///
    /// # Errors
    /// As [`prefill`](crate::layer::Attention::prefill), but the queries are not looked at.
    pub fn extend(
        &self,
        state: &mut DijiangState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<()> {
        self.proj.check_sequence("x", x)?;
        let (k, v) = self.proj.project_keys(x, state.position());
        let (k, v) = (self.proj.heads(&k), self.proj.heads(&v));
        let workspace = &mut self.attention.workspace();
        self.attention.extend(&mut state.attention, (&k, &v), mask, workspace)
    }

    /// `state` becomes that of its own segment and the next one: see [`LinearAttention::merge`].
    ///
    /// # Errors
    /// As [`LinearAttention::merge`].
    pub fn merge(&self, state: &mut DijiangState<T>, next: &DijiangState<T>) -> Result<()> {
        self.attention.merge(&mut state.attention, &next.attention, &mut state.workspace)
    }

    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[DctMap<T>] {
        self.attention.maps()
    }

    /// The local windows, one for each key-value head, if there are any.
    pub fn windows(&self) -> &[Window] {
        self.attention.windows()
    }

    /// Sinks.
    pub fn sinks(&self) -> usize {
        self.attention.sinks()
    }

    /// log γ, one per key-value head.
    pub fn log_decay(&self) -> &[f64] {
        self.attention.log_decay()
    }

    /// Replaces the maps, one per key-value head: calibrated elsewhere, or loaded from a file.
    /// States made before are refused by other maps: start new ones.
    ///
    /// # Cost
    /// None beside the maps' own: they are moved in.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of maps, [`Error::Foreign`] for a map of another head
    /// dimension. After an error the layer is unchanged.
    pub fn set_maps(&mut self, maps: Vec<DctMap<T>>) -> Result<()> {
        check_len("maps", self.proj.config().kv_heads, maps.len())?;
        let expected = self.proj.head_dim();
        if let Some(map) = maps.iter().find(|map| map.dim() != expected) {
            return Err(Error::Foreign {
                argument: "map",
                what: "head dimension",
                expected,
                got: map.dim(),
            });
        }
        self.attention = self.attention.config().build(maps)?;
        Ok(())
    }

    /// [`set_maps`](Self::set_maps) as a constructor. Weights are shared, not copied, here and
    /// below.
    ///
    /// # Errors
    /// As [`set_maps`](Self::set_maps).
    pub fn with_maps(mut self, maps: Vec<DctMap<T>>) -> Result<Self> {
        self.set_maps(maps)?;
        Ok(self)
    }

    /// Other local windows, one for all key-value heads or one for each, or none; and sinks. States
    /// made before belong to another layer then.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the layer is bidirectional, and those of [`LinearConfig::build`].
    pub fn with_windows(self, windows: Vec<Window>, sinks: usize) -> Result<Self> {
        self.rebuilt(|config| config.with_windows(windows).with_sinks(sinks))
    }

    /// log γ ≤ 0, one per key-value head.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of heads, [`Error::Value`] or [`Error::NonFinite`] for
    /// numbers that are no decay, [`Error::Conflict`] if the layer is bidirectional and a number is
    /// not zero.
    pub fn with_log_decay(self, log_decay: Vec<f64>) -> Result<Self> {
        check_len("log_decay", self.proj.config().kv_heads, log_decay.len())?;
        self.rebuilt(|config| config.with_log_decay(log_decay))
    }

    /// Other projection weights, of the same shapes: those of a step of training, say. Maps,
    /// windows and decay stay.
    ///
    /// # Errors
    /// As [`AttentionWeights::check`].
    pub fn with_weights(self, weights: AttentionWeights<T>) -> Result<Self> {
        let proj = QkvProj::new(self.proj.config().clone(), Arc::new(weights))?;
        Ok(Self { proj, ..self })
    }

    /// The outputs of all heads on a sequence, before the output projection, `[n, h·d]`.
    pub(crate) fn outputs_of_heads(&self, x: &ArrayRef2<T>) -> Result<Array2<T>> {
        self.proj.check_sequence("x", x)?;
        let ProjectedQkv { q, k, v } = self.proj.project(x, 0);
        let [q, k, v] = [&q, &k, &v].map(|rows| self.proj.heads(rows));
        let mut o = Array2::zeros((x.nrows(), q.shape()[0] * q.shape()[2]));
        let mut workspace = self.attention.workspace();
        let out = &mut self.proj.heads_mut(&mut o);
        self.attention.forward_into(Qkv::new(&q, &k, &v), out, &mut workspace)?;
        Ok(o)
    }

    /// Another output projection, W_o + ΔW_o, refitted by
    /// [`Refit`](crate::calibrate::Refit) say. The weights it had are kept, for
    /// [`without_output_delta`](Self::without_output_delta); a second delta takes the place of the
    /// first.
    ///
    /// # Shapes
    /// - `delta`: `[D, h·d]`.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::NonFinite`] for a delta that does not fit.
    pub fn with_output_delta(self, delta: Array2<T>) -> Result<Self> {
        Ok(Self { proj: self.proj.with_output_delta(delta)?, ..self })
    }

    /// The weights that [`with_output_delta`](Self::with_output_delta) found.
    #[must_use]
    pub fn without_output_delta(self) -> Self {
        Self { proj: self.proj.without_output_delta(), ..self }
    }

    /// ΔW_o, if there is one.
    pub fn output_delta(&self) -> Option<&Array2<T>> {
        self.proj.output_delta()
    }

    /// Maps and decays at once, of the lengths and dimensions there were.
    pub(crate) fn set_heads(&mut self, maps: Vec<DctMap<T>>, log_decay: Vec<f64>) -> Result<()> {
        self.attention = self.attention.config().with_log_decay(log_decay).build(maps)?;
        Ok(())
    }

    /// The same maps under another config.
    fn rebuilt(self, change: impl FnOnce(LinearConfig) -> LinearConfig) -> Result<Self> {
        let attention = change(self.attention.config()).build(self.attention.into_maps())?;
        Ok(Self { attention, ..self })
    }
}
