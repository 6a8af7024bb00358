//! [`SoftmaxAttention`]: the layer as it was trained.
//!
//! ```text
//! y = W_o · concat_h softmax(σ q_h k_hᵀ) v_h + b_o        [Vaswani et al. 2017, equations 1 and 4]
//! ```

use std::sync::Arc;

use crate::Real;
use crate::attention::{KvCache, Softmax, SoftmaxConfig, Window};
use crate::error::{Error, Result};
use crate::layer::config::AttentionConfig;
use crate::layer::generic::{Layer, LayerState};
use crate::layer::qkv_proj::QkvProj;
use crate::layer::weights::AttentionWeights;

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
/// let weights = AttentionWeights::new(zero, one.clone(), one.clone(), one);
/// let layer = SoftmaxAttention::new(AttentionConfig::new(2, 1), weights)?;
/// let y = layer.forward(&array![[2.0, 4.0], [4.0, 0.0]], KeyMask::All)?;
/// assert_eq!(y, array![[2.0, 4.0], [3.0, 2.0]]);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub type SoftmaxAttention<T> = Layer<T, Softmax<T>>;

/// Keys and values of every token of one sequence so far, with the scratch memory of a step.
pub type SoftmaxState<T> = LayerState<T, KvCache<T>>;

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
        let proj = QkvProj::new(config, weights.into())?;
        let window = proj.config().sliding_window.map(|tokens| Window::new(1, tokens - 1));
        let attention = softmax_of(&proj, window.into_iter().collect(), 0)?;
        Ok(Self { proj, attention })
    }

    /// The local windows, one for each key-value head, if there are any: those of
    /// [`with_windows`](Self::with_windows), or the config's sliding window as one of chunks of one
    /// token.
    pub fn windows(&self) -> &[Window] {
        &self.attention.config().windows
    }

    /// Restricts attention to local windows, one for all key-value heads or one for each, and
    /// `sinks` sinks: what [`DijiangAttention`](crate::layer::DijiangAttention) computes exactly,
    /// without the kernel. A baseline. Only maps tell which keys to keep beyond a window, so plan
    /// for it without such windows.
    ///
    /// # Errors
    /// [`Error::Conflict`] if the layer is bidirectional or has a sliding window of its own, and
    /// those of [`SoftmaxConfig::build`].
    pub fn with_windows(self, windows: Vec<Window>, sinks: usize) -> Result<Self> {
        if self.proj.config().sliding_window.is_some() {
            return Err(Error::Conflict { argument: "windows", other: "a sliding window" });
        }
        let attention = softmax_of(&self.proj, windows, sinks)?;
        Ok(Self { attention, ..self })
    }
}

/// The softmax attention of a layer.
pub(crate) fn softmax_of<T: Real>(
    proj: &QkvProj<T>,
    windows: Vec<Window>,
    sinks: usize,
) -> Result<Softmax<T>> {
    let config = proj.config();
    SoftmaxConfig::new(config.heads, proj.head_dim())
        .with_kv_heads(config.kv_heads)
        .with_scale(proj.scale())
        .with_causality(config.causality)
        .with_windows(windows)
        .with_sinks(sinks)
        .build()
}
