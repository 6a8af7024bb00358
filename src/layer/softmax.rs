//! [`SoftmaxAttention`]: the layer as it was trained.
//!
//! ```text
//! y = W_o · concat_h softmax(σ q_h k_hᵀ) v_h + b_o        [Vaswani et al. 2017, equations 1 and 4]
//! ```

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayRef1, ArrayRef2};

use crate::Real;
use crate::attention::{
    Causality, KeyMask, KvCache, Operator, Qkv, Softmax, SoftmaxConfig, Window, Workspace,
    check_offsets, check_offsets_of,
};
use crate::check::check_elements;
use crate::error::{Error, Result};
use crate::layer::config::AttentionConfig;
use crate::layer::qkv_proj::{ProjectedQkv, QkvProj, Runs, StepScratch};
use crate::layer::weights::AttentionWeights;
use crate::layer::{Attention, check_causal};

/// A softmax attention layer: O(n²) time, and a cache that grows with every token.
///
/// # Examples
///
/// ```
/// use dijiang::attention::KeyMask;
/// use dijiang::layer::{Attention, AttentionConfig, AttentionWeights, SoftmaxAttention};
/// use ndarray::{Array2, array};
///
/// // Queries of zero attend to everything before them alike: running means.
/// let (zero, one) = (Array2::<f64>::zeros((2, 2)), Array2::eye(2));
/// let layer = SoftmaxAttention::new(AttentionConfig::new(2, 1), AttentionWeights::new(zero, one.clone(), one.clone(), one))?;
/// let y = layer.forward(&array![[2.0, 4.0], [4.0, 0.0]], KeyMask::All)?;
/// assert_eq!(y, array![[2.0, 4.0], [3.0, 2.0]]);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct SoftmaxAttention<T> {
    projections: QkvProj<T>,
    exact: Softmax<T>,
}

/// Keys and values of every token of one sequence so far, with the scratch memory of a step.
#[derive(Debug, Clone)]
pub struct SoftmaxState<T> {
    cache: KvCache<T>,
    workspace: Workspace<T>,
    scratch: StepScratch<T>,
}

impl<T: Real> SoftmaxState<T> {
    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.cache.position()
    }

    /// Bytes of keys and values held. The scratch memory beside it does not grow and is not
    /// counted.
    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Back to the empty state; keeps its memory.
    pub fn reset(&mut self) {
        self.cache.reset();
    }
}

/// Equal keys and values; the scratch memory means nothing.
impl<T: Real> PartialEq for SoftmaxState<T> {
    fn eq(&self, other: &Self) -> bool {
        self.cache == other.cache
    }
}

impl<T: Real> SoftmaxAttention<T> {
    /// Checks config and weights. Weights may be given as they are or behind an `Arc`, which is
    /// then shared.
    ///
    /// # Errors
    /// Whatever [`AttentionConfig::check`] and [`AttentionWeights::check`] find.
    pub fn new(
        config: AttentionConfig,
        weights: impl Into<Arc<AttentionWeights<T>>>,
    ) -> Result<Self> {
        let projections = QkvProj::new(config, weights.into())?;
        let window = projections.config().sliding_window.map(|tokens| Window::new(1, tokens - 1));
        let exact = exact(&projections, window)?;
        Ok(Self { projections, exact })
    }

    /// The projection weights.
    pub fn weights(&self) -> &Arc<AttentionWeights<T>> {
        self.projections.weights()
    }

    /// The local window, if any: that of [`with_window`](Self::with_window), or the config's sliding
    /// window as one of chunks of one token.
    pub fn window(&self) -> Option<Window> {
        self.exact.config().window
    }

    /// Restricts attention to the query's own chunk and the chunks right before it: what the near
    /// part of [`DijiangAttention`](crate::layer::DijiangAttention) sees, without the kernel. A
    /// baseline.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the layer is bidirectional or has a sliding window of its own,
    /// [`Error::Value`] for a chunk length of zero.
    pub fn with_window(self, window: Option<Window>) -> Result<Self> {
        if self.projections.config().sliding_window.is_some() {
            return Err(Error::Conflict { argument: "window", other: "a sliding window" });
        }
        if window.is_some() && self.projections.config().causality == Causality::Bidirectional {
            return Err(Error::Conflict { argument: "window", other: "bidirectional attention" });
        }
        let exact = exact(&self.projections, window)?;
        Ok(Self { exact, ..self })
    }

    /// Queries, keys and values of every head, after the rotary embedding: what the layer's
    /// attention is computed from, for looking at it or for attention of another kind. Positions
    /// count from 0. Allocates.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, returns `[h, n, d]`, `[h_kv, n, d]`, `[h_kv, n, d]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Empty`] and [`Error::NonFinite`], as
    /// [`forward`](Attention::forward).
    pub fn project(&self, x: &ArrayRef2<T>) -> Result<(Array3<T>, Array3<T>, Array3<T>)> {
        self.projections.check_sequence("x", x)?;
        let ProjectedQkv { q, k, v } = self.projections.project(x, 0);
        for (argument, rows) in [("q", &q), ("k", &k), ("v", &v)] {
            check_elements(argument, rows)?;
        }
        let heads =
            |rows: Array2<T>| self.projections.heads(&rows).as_standard_layout().into_owned();
        Ok((heads(q), heads(k), heads(v)))
    }

    pub(crate) fn projections(&self) -> &QkvProj<T> {
        &self.projections
    }
}

/// The exact attention of a layer.
pub(crate) fn exact<T: Real>(
    projections: &QkvProj<T>,
    window: Option<Window>,
) -> Result<Softmax<T>> {
    let config = projections.config();
    let mut exact =
        SoftmaxConfig::new(config.heads, projections.head_dim()).with_kv_heads(config.kv_heads);
    exact.scale = projections.scale();
    exact.window = window;
    exact.causality = config.causality;
    exact.build()
}

impl<T: Real> Attention<T> for SoftmaxAttention<T> {
    type State = SoftmaxState<T>;

    fn config(&self) -> &AttentionConfig {
        self.projections.config()
    }

    fn new_state(&self) -> SoftmaxState<T> {
        SoftmaxState {
            cache: self.exact.new_state(),
            workspace: self.exact.workspace(),
            scratch: self.projections.step_scratch(),
        }
    }

    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> Result<Array2<T>> {
        let mut workspace = self.exact.workspace();
        self.projections.run(x, mask, 0, |q, k, v, out| {
            self.exact.forward_into(Qkv::new(q, k, v).with_mask(mask), out, &mut workspace)
        })
    }

    fn prefill(
        &self,
        state: &mut SoftmaxState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_causal(self.config(), "prefill")?;
        self.projections.run(x, mask, state.position(), |q, k, v, out| {
            let qkv = Qkv::new(q, k, v).with_mask(mask);
            let workspace = &mut self.exact.workspace();
            self.exact.prefill_into(&mut [&mut state.cache], qkv, out, workspace)
        })
    }

    fn forward_packed(
        &self,
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets("offsets", offsets, x.nrows())?;
        let (starts, mut workspace) = (vec![0; offsets.len() - 1], self.exact.workspace());
        self.projections.run_packed(x, mask, Runs { offsets, starts: &starts }, |q, k, v, out| {
            let qkv = Qkv::new(q, k, v).with_mask(mask).with_offsets(offsets);
            self.exact.forward_into(qkv, out, &mut workspace)
        })
    }

    fn prefill_packed(
        &self,
        states: &mut [&mut SoftmaxState<T>],
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_causal(self.config(), "prefill")?;
        check_offsets_of(states.len(), offsets, x.nrows())?;
        let starts: Vec<_> = states.iter().map(|state| state.position()).collect();
        self.projections.run_packed(x, mask, Runs { offsets, starts: &starts }, |q, k, v, out| {
            let mut states: Vec<_> = states.iter_mut().map(|state| &mut state.cache).collect();
            let qkv = Qkv::new(q, k, v).with_mask(mask).with_offsets(offsets);
            self.exact.prefill_into(&mut states, qkv, out, &mut self.exact.workspace())
        })
    }

    /// As [`Attention::step`]. Allocates nothing itself, but the cache grows now and then.
    fn step(
        &self,
        state: &mut SoftmaxState<T>,
        x: &ArrayRef1<T>,
        out: &mut ArrayRef1<T>,
    ) -> Result<()> {
        check_causal(self.config(), "step")?;
        let SoftmaxState { cache, workspace, scratch } = state;
        self.projections.step(x, cache.position(), scratch, out, |q, k, v, out| {
            self.exact.step(cache, Qkv::token(q, k, v), out, workspace)
        })
    }
}
