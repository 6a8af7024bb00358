//! Attention over heads: the linear one, in O(n) with causal prefix sums, and the exact softmax one beside it.
//!
//! ```text
//! A_ij = exp(x_i·y_j)        if near(i,j)
//!      = γ^(i−j) · K(x_i,y_j) otherwise, for every allowed pair
//! o_i  = Σ_j A_ij v_j / Σ_j A_ij            a row with no allowed key gives zeros
//! ```

use std::marker::PhantomData;

use ndarray::{Array3, ArrayRef2, ArrayRef3};

use crate::error::Result;
use crate::kernel::FeatureMap;
use crate::real::Real;

/// Which keys may be attended to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KeyMask<'a> {
    /// Every key.
    #[default]
    All,
    /// Keys whose entry is `true`, one entry per key. The k and v of the others are never looked at.
    Valid(&'a [bool]),
}

/// The near part: the query's own chunk and the `back` chunks before it are exact softmax attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Near {
    /// Chunk length c in tokens. Default of the drop-in layer: 64.
    pub chunk: usize,
    /// Number r of whole chunks before the query's own one. Default of the drop-in layer: 1.
    pub back: usize,
}

impl Near {
    /// Chunks of `chunk` tokens, `back` of them before the query's own.
    pub fn new(chunk: usize, back: usize) -> Self {
        Self { chunk, back }
    }
}

/// How [`LinearAttention`] is to be built.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LinearConfig {
    /// Query heads h. Default: one per map. A multiple of the number of maps (grouped queries: one map, one state and
    /// one key-value head serve h / maps consecutive query heads).
    pub heads: Option<usize>,
    /// Value dimension e. Default: the maps' dimension d.
    pub value_dim: Option<usize>,
    /// Softmax scale σ. Default: 1/√d.
    pub scale: Option<f64>,
    /// The exact near part of causal attention. Default: none.
    pub near: Option<Near>,
    /// log γ ≤ 0, one per map, causal attention only. Default: empty, which stands for zeros (γ = 1).
    pub log_decay: Vec<f64>,
}

/// DCT-kernelized linear attention over all heads of a layer.
#[derive(Debug, Clone)]
pub struct LinearAttention<T, M> {
    maps: Vec<M>,
    element: PhantomData<T>,
}

/// What one sequence leaves behind for its next tokens: constant size, whatever the number of tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalState<T> {
    position: usize,
    element: PhantomData<T>,
}

impl<T: Real> CausalState<T> {
    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        0
    }

    /// Back to the empty state, without allocating.
    pub fn reset(&mut self) {
        self.position = 0;
    }
}

/// Scratch memory. Its size depends on the layer, not on the number of tokens; its contents mean nothing.
#[derive(Debug, Clone)]
pub struct Workspace<T> {
    element: PhantomData<T>,
}

impl LinearConfig {
    /// All defaults.
    pub fn new() -> Self {
        Self { heads: None, value_dim: None, scale: None, near: None, log_decay: Vec::new() }
    }

    /// Query heads h, a multiple of the number of maps.
    #[must_use]
    pub fn with_heads(self, heads: usize) -> Self {
        Self { heads: Some(heads), ..self }
    }

    /// Value dimension e.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim: Some(value_dim), ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Exact near part.
    #[must_use]
    pub fn with_near(self, near: Near) -> Self {
        Self { near: Some(near), ..self }
    }

    /// log γ per map.
    #[must_use]
    pub fn with_log_decay(self, log_decay: Vec<f64>) -> Self {
        Self { log_decay, ..self }
    }

    /// Checks everything and precomputes: one map per key-value head.
    pub fn build<T: Real, M: FeatureMap<T>>(self, maps: Vec<M>) -> Result<LinearAttention<T, M>> {
        todo!()
    }
}

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[M] {
        &self.maps
    }

    /// Scratch for every method below.
    pub fn workspace(&self) -> Workspace<T> {
        todo!()
    }

    /// The empty state of a new sequence.
    pub fn new_state(&self) -> CausalState<T> {
        todo!()
    }

    /// Every query sees every allowed key (bidirectional, cross attention): q `[h, n_q, d]`, k `[h_kv, n_k, d]`,
    /// v `[h_kv, n_k, e]`, returns `[h, n_q, e]`. No near part, no decay: [`Error::Conflict`] if configured.
    pub fn full(&self, q: &ArrayRef3<T>, k: &ArrayRef3<T>, v: &ArrayRef3<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
        todo!()
    }

    /// [`full`](Self::full) into the caller's memory, without allocating.
    pub fn full_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }

    /// A whole sequence, each query seeing the keys up to its own: [`prefill`](Self::prefill) from the empty state.
    pub fn causal(&self, q: &ArrayRef3<T>, k: &ArrayRef3<T>, v: &ArrayRef3<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
        todo!()
    }

    /// The next n tokens of a sequence: q `[h, n, d]`, k `[h_kv, n, d]`, v `[h_kv, n, e]`, returns `[h, n, e]`.
    pub fn prefill(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        todo!()
    }

    /// [`prefill`](Self::prefill) into the caller's memory, without allocating. After an error the state is unchanged.
    pub fn prefill_into(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }

    /// The next token: q `[h, d]`, k `[h_kv, d]`, v `[h_kv, e]`, out `[h, e]`. Never allocates.
    pub fn step(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef2<T>,
        k: &ArrayRef2<T>,
        v: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }
}

/// How [`ExactAttention`] is to be built.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ExactConfig {
    /// Query heads h.
    pub heads: usize,
    /// Key-value heads. Default: h.
    pub kv_heads: usize,
    /// Head dimension d.
    pub dim: usize,
    /// Value dimension e. Default: d.
    pub value_dim: usize,
    /// Softmax scale σ. Default: 1/√d.
    pub scale: f64,
    /// Sliding window of the near part alone: only the query's own chunk and `back` chunks before it. Default: none.
    pub near: Option<Near>,
}

impl ExactConfig {
    /// `heads` heads of dimension `dim`, everything else by default.
    pub fn new(heads: usize, dim: usize) -> Self {
        Self { heads, kv_heads: heads, dim, value_dim: dim, scale: 1.0 / (dim as f64).sqrt(), near: None }
    }

    /// Fewer key-value heads than query heads.
    #[must_use]
    pub fn with_kv_heads(self, kv_heads: usize) -> Self {
        Self { kv_heads, ..self }
    }

    /// Value dimension e.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim, ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    /// Checks everything.
    pub fn build<T: Real>(self) -> Result<ExactAttention<T>> {
        todo!()
    }
}

/// Exact softmax attention over all heads of a layer, tiled with online softmax.
#[derive(Debug, Clone)]
pub struct ExactAttention<T> {
    element: PhantomData<T>,
}

/// The keys and values of every token so far: what [`ExactAttention`] needs to decode. Grows with every token.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCache<T> {
    position: usize,
    element: PhantomData<T>,
}

impl<T: Real> KvCache<T> {
    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        0
    }

    /// Back to the empty cache; keeps its memory.
    pub fn reset(&mut self) {
        self.position = 0;
    }
}

// ExactAttention<T: Real> has the same methods as LinearAttention: workspace, new_cache() -> KvCache<T> (instead of
// new_state), full, full_into, causal, prefill, prefill_into, step, with the same signatures but KvCache for the state.
impl<T: Real> ExactAttention<T> {
    /// Scratch for every method below.
    pub fn workspace(&self) -> Workspace<T> {
        todo!()
    }

    /// The empty cache of a new sequence.
    pub fn new_cache(&self) -> KvCache<T> {
        todo!()
    }

    /// As [`LinearAttention::full_into`].
    pub fn full_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }

    /// As [`LinearAttention::prefill_into`].
    pub fn prefill_into(
        &self,
        cache: &mut KvCache<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }

    /// As [`LinearAttention::step`].
    pub fn step(
        &self,
        cache: &mut KvCache<T>,
        q: &ArrayRef2<T>,
        k: &ArrayRef2<T>,
        v: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        todo!()
    }
}
