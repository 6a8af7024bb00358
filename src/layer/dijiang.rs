//! [`DijiangAttention`]: the same layer with linear attention in place of softmax.
//!
//! ```text
//! A_ij = exp(x_i·y_j) where window(i,j), otherwise γ^(i−j) · e^g · Σ_f exp(a_f(x_i) + b_f(y_j)),   x = √σ·q, y = √σ·k
//! y    = W_o · concat_h (A v_h / A 1) + b_o        [Chen et al. 2024, arXiv 2403.19928; local window and centres: this crate]
//! ```

use std::sync::Arc;

use ndarray::{Array2, ArrayRef1, ArrayRef2, Axis};

use crate::Real;
use crate::attention::{
    CausalState, Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Window,
    Workspace, check_offsets, check_offsets_of, check_state_size,
};
use crate::check::{check_elements, check_len};
use crate::error::{Error, Result};
use crate::kernel::{
    DctMap, DctMapConfig, Envelope, FeatureMap, InputScales, Mixing, Pairing, Points, Radial, Sides,
};
use crate::layer::config::{AttentionConfig, check_no_sliding};
use crate::layer::qkv_proj::{ProjectedQkv, QkvProj, Runs, StepScratch};
use crate::layer::softmax::SoftmaxAttention;
use crate::layer::weights::AttentionWeights;
use crate::layer::{Attention, check_causal};
use crate::threads::{for_each, max_threads};

/// How [`DijiangAttention::from_softmax`] sets up its maps. The defaults are those of
/// [`DctMapConfig`].
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DijiangOptions {
    /// Blocks G ≥ 1: m = G·d features, twice as many with antithetic pairs. Default: 1.
    pub blocks: usize,
    /// Features per projected coordinate. Default: [`Pairing::Single`].
    pub pairing: Pairing,
    /// Law of the radii. Default: [`Radial::Normal`].
    pub radial: Radial,
    /// Point set of the radii. Default: [`Points::Sobol`].
    pub points: Points,
    /// Envelope p. Default: [`Envelope::None`].
    pub envelope: Envelope,
    /// Whether calibration must keep scales and radii of both sides equal. Default:
    /// [`Sides::Untied`].
    pub sides: Sides,
    /// Initial input scales. Default: [`InputScales::RandomSigns`].
    pub scales: InputScales,
    /// What stands in place of the transform. Default: [`Mixing::None`].
    pub mixing: Mixing,
    /// Seed of points and signs; every head gets one of its own, derived from it. Default: 0.
    pub seed: u64,
    /// The exact local window. Default: 64 tokens a chunk, one chunk back. A bidirectional layer has
    /// none and ignores it.
    pub window: Option<Window>,
    /// log γ ≤ 0 of every head. Default: 0. Causal layers only.
    pub log_decay: f64,
}

impl Default for DijiangOptions {
    fn default() -> Self {
        let map = DctMapConfig::new(1);
        Self {
            blocks: map.blocks,
            pairing: map.pairing,
            radial: map.radial,
            points: map.points,
            envelope: map.envelope,
            sides: map.sides,
            scales: map.scales,
            mixing: map.mixing,
            seed: map.seed,
            window: Some(Window::new(64, 1)),
            log_decay: 0.0,
        }
    }
}

impl DijiangOptions {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Blocks G.
    #[must_use]
    pub fn with_blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    /// Features per projected coordinate.
    #[must_use]
    pub fn with_pairing(self, pairing: Pairing) -> Self {
        Self { pairing, ..self }
    }

    /// Law of the radii.
    #[must_use]
    pub fn with_radial(self, radial: Radial) -> Self {
        Self { radial, ..self }
    }

    /// Point set of the radii.
    #[must_use]
    pub fn with_points(self, points: Points) -> Self {
        Self { points, ..self }
    }

    /// Envelope p.
    #[must_use]
    pub fn with_envelope(self, envelope: Envelope) -> Self {
        Self { envelope, ..self }
    }

    /// Whether both sides share scales and radii.
    #[must_use]
    pub fn with_sides(self, sides: Sides) -> Self {
        Self { sides, ..self }
    }

    /// Initial input scales.
    #[must_use]
    pub fn with_scales(self, scales: InputScales) -> Self {
        Self { scales, ..self }
    }

    /// What stands in place of the transform.
    #[must_use]
    pub fn with_mixing(self, mixing: Mixing) -> Self {
        Self { mixing, ..self }
    }

    /// Seed of points and signs.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// The exact local window, or none.
    #[must_use]
    pub fn with_window(self, window: Option<Window>) -> Self {
        Self { window, ..self }
    }

    /// log γ of every head.
    #[must_use]
    pub fn with_log_decay(self, log_decay: f64) -> Self {
        Self { log_decay, ..self }
    }

    /// The map of one key-value head.
    fn map(&self, dim: usize, head: usize) -> DctMapConfig {
        DctMapConfig {
            dim,
            blocks: self.blocks,
            pairing: self.pairing,
            radial: self.radial,
            points: self.points,
            envelope: self.envelope,
            sides: self.sides,
            scales: self.scales,
            mixing: self.mixing,
            seed: head_seed(self.seed, head),
        }
    }
}

/// SplitMix64 of seed and head: different streams for different heads [Steele, Lea, Flood 2014].
fn head_seed(seed: u64, head: usize) -> u64 {
    mixed(seed.wrapping_add((head as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)))
}

/// SplitMix64's output for the state `z`.
pub(super) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A DCT-kernelized linear attention layer: O(n) time, and a state of constant size.
///
/// One map, one state per key-value head; the query heads that share a key-value head share both.
///
/// # Examples
///
/// ```
/// use dijiang::attention::{KeyMask, Window};
/// use dijiang::layer::{Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention};
/// use ndarray::{Array2, array};
///
/// let eye = || Array2::<f64>::eye(2);
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(2, 1), AttentionWeights::new(eye(), eye(), eye(), eye()))?;
/// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_blocks(4))?;
///
/// // Short sequences lie within the local window (64 tokens a chunk, one chunk back): the two layers agree.
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
#[derive(Debug, Clone)]
pub struct DijiangAttention<T> {
    pub(super) projections: QkvProj<T>,
    pub(super) linear: LinearAttention<T, DctMap<T>>,
}

/// What one sequence leaves behind for its next tokens, at constant size, with the scratch memory
/// of a step.
#[derive(Debug, Clone)]
pub struct DijiangState<T> {
    causal: CausalState<T>,
    workspace: Workspace<T>,
    scratch: StepScratch<T>,
}

impl<T: Real> DijiangState<T> {
    /// Position of the next token: but for segments made by
    /// [`new_state_at`](DijiangAttention::new_state_at), the number of tokens seen so far, masked
    /// ones included.
    pub fn position(&self) -> usize {
        self.causal.position()
    }

    /// The attention's state, without the scratch memory: what is worth keeping.
    /// [`DijiangAttention::resume`] takes it back.
    pub fn causal(&self) -> &CausalState<T> {
        &self.causal
    }

    /// Bytes of state, the same at any position. The scratch memory beside it is not counted.
    pub fn bytes(&self) -> usize {
        self.causal.bytes()
    }

    /// The state as bytes, which [`DijiangAttention::state_from_bytes`] reads: see
    /// [`CausalState::to_bytes`].
    #[cfg(feature = "states")]
    pub fn to_bytes(&self, storage: crate::attention::Storage) -> Vec<u8> {
        self.causal.to_bytes(storage)
    }

    /// Takes over another state of the same layer, without allocating: back to a snapshot, or on
    /// from one.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of a layer of another shape; this one is unchanged then.
    pub fn copy_from(&mut self, from: &Self) -> Result<()> {
        self.causal.copy_from(&from.causal)
    }

    /// Back to the empty state, without allocating.
    pub fn reset(&mut self) {
        self.causal.reset();
    }
}

/// Equal attention states; the scratch memory means nothing.
impl<T: Real> PartialEq for DijiangState<T> {
    fn eq(&self, other: &Self) -> bool {
        self.causal == other.causal
    }
}

impl<T: Real> DijiangAttention<T> {
    /// Exchanges the attention of `layer` and keeps its weights (shared, not copied), rotary
    /// embedding, heads and scale. A [`window`](SoftmaxAttention::with_window) restriction of `layer`
    /// is not taken over: `options` has its own.
    ///
    /// # Cost
    /// Draws and tabulates the maps, O(m·d) a key-value head at most. Nothing is measured on data:
    /// [`calibrate`](Self::calibrate).
    ///
    /// # Errors
    /// - [`Error::Value`], [`Error::TooLarge`]: impossible `options`, see [`DctMapConfig::build`]
    ///   and [`LinearConfig::build`];
    /// - [`Error::Conflict`]: a decay in a bidirectional layer; a layer with a
    ///   [sliding window](AttentionConfig::sliding_window).
    pub fn from_softmax(layer: &SoftmaxAttention<T>, options: DijiangOptions) -> Result<Self> {
        let projections = layer.projections().clone();
        check_no_sliding(projections.config())?;
        let heads = projections.config().kv_heads;
        let window = options.window.filter(|_| projections.config().causality == Causality::Causal);
        let log_decay = vec![options.log_decay; heads];
        let d = projections.head_dim();
        options.map(d, 0).check()?;
        let features =
            options.blocks * d * if options.pairing == Pairing::Antithetic { 2 } else { 1 };
        check_state_size(heads, d, features, d, window)?;
        let maps = (0..heads).map(|head| options.map(d, head).build()).collect::<Result<_>>()?;
        let linear = linear(&projections, maps, window, log_decay)?;
        Ok(Self { projections, linear })
    }

    /// The state that [`DijiangState::to_bytes`] wrote, for a layer of this shape: see
    /// [`LinearAttention::state_from_bytes`].
    ///
    /// # Errors
    /// As [`LinearAttention::state_from_bytes`].
    #[cfg(feature = "states")]
    pub fn state_from_bytes(&self, bytes: &[u8]) -> Result<DijiangState<T>> {
        Ok(DijiangState { causal: self.linear.state_from_bytes(bytes)?, ..self.new_state() })
    }

    /// The layer's state with this state of its attention, put aside by [`DijiangState::causal`].
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of a layer of another shape.
    pub fn resume(&self, causal: CausalState<T>) -> Result<DijiangState<T>> {
        let state = self.new_state();
        self.linear.check_state(&causal)?;
        Ok(DijiangState { causal, ..state })
    }

    /// The empty state of a segment that begins at `position` of its sequence: see
    /// [`LinearAttention::new_state_at`].
    ///
    /// # Errors
    /// As [`LinearAttention::new_state_at`].
    pub fn new_state_at(&self, position: usize) -> Result<DijiangState<T>> {
        self.resume(self.linear.new_state_at(position)?)
    }

    /// Tokens that nobody queries join a state: [`prefill`](Attention::prefill) without outputs, at
    /// less than half the cost. The state becomes the same, bit for bit.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: n keys.
    ///
    /// # Errors
    /// As [`prefill`](Attention::prefill), but the queries are not looked at.
    pub fn extend(
        &self,
        state: &mut DijiangState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<()> {
        check_causal(self.config(), "extend")?;
        self.projections.check_sequence("x", x)?;
        let (k, v) = self.projections.project_keys(x, state.position());
        let (k, v) = (self.projections.heads(&k), self.projections.heads(&v));
        self.linear.extend(&mut state.causal, (&k, &v), mask, &mut self.linear.workspace())
    }

    /// `state` becomes that of its own segment and the next one: see [`LinearAttention::merge`].
    ///
    /// # Errors
    /// As [`LinearAttention::merge`].
    pub fn merge(&self, state: &mut DijiangState<T>, next: &DijiangState<T>) -> Result<()> {
        self.linear.merge(&mut state.causal, &next.causal, &mut state.workspace)
    }

    /// The projection weights.
    pub fn weights(&self) -> &Arc<AttentionWeights<T>> {
        self.projections.weights()
    }

    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[DctMap<T>] {
        self.linear.maps()
    }

    /// The exact local window. None in a bidirectional layer.
    pub fn window(&self) -> Option<Window> {
        self.linear.window()
    }

    /// log γ, one per key-value head.
    pub fn log_decay(&self) -> &[f64] {
        self.linear.log_decay()
    }

    /// Replaces the maps, one per key-value head: calibrated elsewhere, or loaded from a file.
    /// States made before mean something else to the new maps: start new ones.
    ///
    /// # Cost
    /// None beside the maps' own: they are moved in.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of maps, [`Error::Foreign`] for a map of another head
    /// dimension. After an error the layer is unchanged.
    pub fn set_maps(&mut self, maps: Vec<DctMap<T>>) -> Result<()> {
        check_len("maps", self.projections.config().kv_heads, maps.len())?;
        let expected = self.projections.head_dim();
        if let Some(map) = maps.iter().find(|map| map.dim() != expected) {
            return Err(Error::Foreign {
                argument: "map",
                what: "head dimension",
                expected,
                got: map.dim(),
            });
        }
        self.linear = linear(&self.projections, maps, self.window(), self.log_decay().to_vec())?;
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

    /// Another local window, or none. States made before belong to another layer then.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the layer is bidirectional, [`Error::Value`] for a chunk length of
    /// zero.
    pub fn with_window(self, window: Option<Window>) -> Result<Self> {
        check_window(&self.projections, window)?;
        let linear =
            linear(&self.projections, self.maps().to_vec(), window, self.log_decay().to_vec())?;
        Ok(Self { linear, ..self })
    }

    /// log γ ≤ 0, one per key-value head.
    ///
    /// # Errors
    /// [`Error::Length`] for another number of heads, [`Error::Value`] or [`Error::NonFinite`] for
    /// numbers that are no decay, [`Error::Conflict`] if the layer is bidirectional and a number is
    /// not zero.
    pub fn with_log_decay(self, log_decay: Vec<f64>) -> Result<Self> {
        check_len("log_decay", self.projections.config().kv_heads, log_decay.len())?;
        let linear = linear(&self.projections, self.maps().to_vec(), self.window(), log_decay)?;
        Ok(Self { linear, ..self })
    }

    /// Other projection weights, of the same shapes: those of a step of training, say. Maps, near
    /// part and decay stay.
    ///
    /// # Errors
    /// As [`AttentionWeights::check`].
    pub fn with_weights(self, weights: AttentionWeights<T>) -> Result<Self> {
        let projections = QkvProj::new(self.projections.config().clone(), Arc::new(weights))?;
        Ok(Self { projections, ..self })
    }

    /// Maps and decays at once, of the lengths and dimensions there were.
    pub(super) fn set_heads(&mut self, maps: Vec<DctMap<T>>, log_decay: Vec<f64>) -> Result<()> {
        self.linear = linear(&self.projections, maps, self.window(), log_decay)?;
        Ok(())
    }

    /// A layer of its parts: as many maps and decays as key-value heads, of the head dimension.
    #[cfg(feature = "safetensors")]
    pub(super) fn from_parts(
        projections: QkvProj<T>,
        maps: Vec<DctMap<T>>,
        window: Option<Window>,
        log_decay: Vec<f64>,
    ) -> Result<Self> {
        check_window(&projections, window)?;
        let linear = linear(&projections, maps, window, log_decay)?;
        Ok(Self { projections, linear })
    }

    /// The next token of each of several sequences: what [`step`](Attention::step) gives for each
    /// alone, bit for bit, but every weight is read once for all of them.
    ///
    /// # Shapes
    /// - `states`: b of them; `x` and `out`: `[b, D]`, a row per state.
    ///
    /// # Cost
    /// The matrix products of b tokens by the projections, one thread; attention of the sequences
    /// on all threads. Allocates for the batch.
    ///
    /// # Errors
    /// As [`step`](Attention::step), for any of the tokens and states. After an error no state is
    /// changed, nor `out`.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::KeyMask;
    /// use dijiang::layer::{Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let eye = || Array2::<f32>::eye(8);
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), AttentionWeights::new(eye(), eye(), eye(), eye()))?;
    /// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    ///
    /// // Two sequences of different lengths go on together.
    /// let mut states = [layer.new_state(), layer.new_state()];
    /// layer.prefill(&mut states[1], &Array2::ones((5, 8)), KeyMask::All)?;
    /// let (x, mut out) = (Array2::ones((2, 8)), Array2::zeros((2, 8)));
    /// layer.step_batch(&mut states.each_mut(), &x, &mut out)?;
    /// assert_eq!((states[0].position(), states[1].position()), (1, 6));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn step_batch(
        &self,
        states: &mut [&mut DijiangState<T>],
        x: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
    ) -> Result<()> {
        check_causal(self.config(), "step")?;
        if states.is_empty() {
            return Err(Error::Empty { argument: "states" });
        }
        for state in states.iter() {
            self.linear.check_state(&state.causal)?;
        }
        let positions: Vec<usize> = states.iter().map(|state| state.position()).collect();
        self.projections.steps(x, &positions, out, |projected, o| {
            let ProjectedQkv { q, k, v } = projected;
            for (argument, rows) in [("q", q), ("k", k), ("v", v)] {
                check_elements(argument, rows)?;
            }
            let [q, k, v] = [q, k, v].map(|rows| self.projections.heads(rows));
            let mut o = self.projections.heads_mut(o);
            let tokens = q
                .axis_iter(Axis(1))
                .zip(k.axis_iter(Axis(1)).zip(v.axis_iter(Axis(1))))
                .zip(o.axis_iter_mut(Axis(1)));
            let threads = max_threads().min(positions.len());
            let mut results = vec![Ok(()); positions.len()];
            let sequences = states.iter_mut().zip(tokens).zip(&mut results);
            for_each(
                &mut vec![(); threads],
                sequences,
                |(), ((state, ((q, (k, v)), mut out)), result)| {
                    *result = self.linear.step(
                        &mut state.causal,
                        Qkv::token(&q, &k, &v),
                        &mut out,
                        &mut state.workspace,
                    );
                },
            );
            results.into_iter().collect()
        })
    }

    pub(crate) fn projections(&self) -> &QkvProj<T> {
        &self.projections
    }
}

/// A local window needs a direction.
fn check_window<T: Real>(projections: &QkvProj<T>, window: Option<Window>) -> Result<()> {
    if window.is_some() && projections.config().causality == Causality::Bidirectional {
        return Err(Error::Conflict { argument: "window", other: "bidirectional attention" });
    }
    Ok(())
}

/// The linear attention of a layer.
fn linear<T: Real>(
    projections: &QkvProj<T>,
    maps: Vec<DctMap<T>>,
    window: Option<Window>,
    log_decay: Vec<f64>,
) -> Result<LinearAttention<T, DctMap<T>>> {
    let config = projections.config();
    if config.causality == Causality::Bidirectional && log_decay.iter().any(|&decay| decay != 0.0) {
        return Err(Error::Conflict { argument: "log_decay", other: "bidirectional attention" });
    }
    let linear = LinearConfig::new()
        .with_heads(config.heads)
        .with_scale(projections.scale())
        .with_log_decay(log_decay)
        .with_causality(config.causality);
    LinearConfig { window, ..linear }.build(maps)
}

impl<T: Real> Attention<T> for DijiangAttention<T> {
    type State = DijiangState<T>;

    fn config(&self) -> &AttentionConfig {
        self.projections.config()
    }

    fn new_state(&self) -> DijiangState<T> {
        DijiangState {
            causal: self.linear.new_state(),
            workspace: self.linear.step_workspace(),
            scratch: self.projections.step_scratch(),
        }
    }

    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> Result<Array2<T>> {
        let mut workspace = self.linear.workspace();
        self.projections.run(x, mask, 0, |q, k, v, out| {
            self.linear.forward_into(Qkv::new(q, k, v).with_mask(mask), out, &mut workspace)
        })
    }

    fn prefill(
        &self,
        state: &mut DijiangState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_causal(self.config(), "prefill")?;
        self.projections.run(x, mask, state.position(), |q, k, v, out| {
            let qkv = Qkv::new(q, k, v).with_mask(mask);
            let workspace = &mut self.linear.workspace();
            self.linear.prefill_into(&mut [&mut state.causal], qkv, out, workspace)
        })
    }

    fn forward_packed(
        &self,
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets("offsets", offsets, x.nrows())?;
        let (starts, mut workspace) = (vec![0; offsets.len() - 1], self.linear.workspace());
        self.projections.run_packed(x, mask, Runs { offsets, starts: &starts }, |q, k, v, out| {
            let qkv = Qkv::new(q, k, v).with_mask(mask).with_offsets(offsets);
            self.linear.forward_into(qkv, out, &mut workspace)
        })
    }

    fn prefill_packed(
        &self,
        states: &mut [&mut DijiangState<T>],
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_causal(self.config(), "prefill")?;
        check_offsets_of(states.len(), offsets, x.nrows())?;
        let starts: Vec<_> = states.iter().map(|state| state.position()).collect();
        self.projections.run_packed(x, mask, Runs { offsets, starts: &starts }, |q, k, v, out| {
            let mut states: Vec<_> = states.iter_mut().map(|state| &mut state.causal).collect();
            let qkv = Qkv::new(q, k, v).with_mask(mask).with_offsets(offsets);
            self.linear.prefill_into(&mut states, qkv, out, &mut self.linear.workspace())
        })
    }

    /// As [`Attention::step`]. Never allocates.
    fn step(
        &self,
        state: &mut DijiangState<T>,
        x: &ArrayRef1<T>,
        out: &mut ArrayRef1<T>,
    ) -> Result<()> {
        check_causal(self.config(), "step")?;
        let DijiangState { causal, workspace, scratch } = state;
        self.projections.step(x, causal.position(), scratch, out, |q, k, v, out| {
            self.linear.step(causal, Qkv::token(q, k, v), out, workspace)
        })
    }
}
