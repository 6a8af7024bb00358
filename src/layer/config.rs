//! [`AttentionConfig`]: the shape of an attention layer, before any weight is looked at.

use crate::attention::Causality;
use crate::check::check_positive;
use crate::error::{Error, Result};
use crate::layer::rotary::Rotary;

/// The shape of an attention layer. Checked by [`check`](Self::check), which every layer's
/// constructor calls.
///
/// # Examples
///
/// ```
/// use dijiang::layer::{AttentionConfig, Rotary};
///
/// // Llama 3 8B: 32 query heads, 8 key-value heads, all 128 coordinates of a head rotated.
/// let rotary = Rotary::new(500_000.0);
/// let config = AttentionConfig::new(4096, 32).with_kv_heads(8).with_rotary(rotary);
/// config.check()?;
/// assert!(AttentionConfig::new(4096, 33).check().is_err()); // 4096 is no multiple of 33
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct AttentionConfig {
    /// Model dimension D: the width of a hidden state.
    pub model_dim: usize,
    /// Query heads h.
    pub heads: usize,
    /// Key-value heads; h is a multiple of it, h / kv_heads consecutive query heads share one.
    /// Default: h.
    pub kv_heads: usize,
    /// Head dimension d, of keys, queries and values. Default: D / h, which then has to be whole. A
    /// layer's own [`config`](crate::layer::Attention::config) has it filled in.
    pub head_dim: Option<usize>,
    /// Rotary position embedding of queries and keys. Default: none.
    pub rotary: Option<Rotary>,
    /// What a token may look at. Default: [`Causality::Causal`].
    pub causality: Causality,
    /// Softmax scale σ. Default: 1/√d. A layer's own [`config`](crate::layer::Attention::config)
    /// has it filled in.
    pub scale: Option<f64>,
    /// ε of an RMS norm of every head's query and key before the rotary embedding, `q_norm` and
    /// `k_norm` of [`AttentionWeights`](crate::layer::AttentionWeights): Qwen 3, Gemma 3. Default:
    /// no norm.
    ///
    /// ```text
    /// q → w ⊙ q / √(|q|²/d + ε)
    /// ```
    pub qk_norm: Option<f64>,
    /// A causal query sees the last w tokens only, its own one included (Mistral, the local layers
    /// of Gemma 3): token j from token i if i − w < j ≤ i. Default: all before it.
    ///
    /// Softmax attention alone has it: a linear layer is there to see what is further away, and
    /// refuses to be made of such a layer. Leave it as it is, or set this to `None` first.
    pub sliding_window: Option<usize>,
}

impl AttentionConfig {
    /// Causal attention with `heads` heads in a model of width `model_dim`, everything else by
    /// default.
    pub fn new(model_dim: usize, heads: usize) -> Self {
        Self {
            model_dim,
            heads,
            kv_heads: heads,
            head_dim: None,
            rotary: None,
            causality: Causality::Causal,
            scale: None,
            qk_norm: None,
            sliding_window: None,
        }
    }

    /// Fewer key-value heads than query heads (grouped queries).
    #[must_use]
    pub fn with_kv_heads(self, kv_heads: usize) -> Self {
        Self { kv_heads, ..self }
    }

    /// Head dimension d, for models where it is not D / h.
    #[must_use]
    pub fn with_head_dim(self, head_dim: usize) -> Self {
        Self { head_dim: Some(head_dim), ..self }
    }

    /// Rotary position embedding.
    #[must_use]
    pub fn with_rotary(self, rotary: Rotary) -> Self {
        Self { rotary: Some(rotary), ..self }
    }

    /// What a token may look at.
    #[must_use]
    pub fn with_causality(self, causality: Causality) -> Self {
        Self { causality, ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// An RMS norm of every head's query and key, with this ε.
    #[must_use]
    pub fn with_qk_norm(self, epsilon: f64) -> Self {
        Self { qk_norm: Some(epsilon), ..self }
    }

    /// The last `tokens` tokens only, or all.
    #[must_use]
    pub fn with_sliding_window(self, tokens: Option<usize>) -> Self {
        Self { sliding_window: tokens, ..self }
    }

    /// Checks everything that can be checked without weights.
    ///
    /// # Errors
    /// - [`Error::Value`]: a size of zero; a scale that is not finite and positive; an ε that is
    ///   not from 0 to 1; a rotary embedding that is impossible (see [`Rotary`]).
    /// - [`Error::Conflict`]: a sliding window in bidirectional attention.
    /// - [`Error::NotDivisible`]: `heads` by `kv_heads`; `model_dim` by `heads` when no head
    ///   dimension is given.
    /// - [`Error::TooLarge`]: a weight matrix of this shape could not exist, or more coordinates
    ///   rotated than there are.
    pub fn check(&self) -> Result<()> {
        self.resolved().map(|_| ())
    }

    /// The checked config with every default filled in, and the head dimension.
    pub(crate) fn resolved(&self) -> Result<(Self, usize)> {
        check_positive("model_dim", self.model_dim)?;
        check_positive("heads", self.heads)?;
        check_positive("kv_heads", self.kv_heads)?;
        check_multiple("heads", self.heads, "kv_heads", self.kv_heads)?;
        if self.head_dim.is_none() {
            check_multiple("model_dim", self.model_dim, "heads", self.heads)?;
        }
        let head_dim = self.head_dim.unwrap_or(self.model_dim / self.heads);
        check_positive("head_dim", head_dim)?;
        let elements = self
            .heads
            .checked_mul(head_dim)
            .and_then(|width| width.checked_mul(self.model_dim))
            .unwrap_or(usize::MAX);
        let limit = isize::MAX as usize / size_of::<f64>();
        if elements > limit {
            return Err(Error::TooLarge {
                argument: "model_dim · heads · head_dim",
                limit,
                got: elements,
            });
        }
        let scale = self.scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        if !(scale.is_finite() && scale > 0.0) {
            return Err(Error::Value {
                argument: "scale",
                expected: "finite and positive",
                got: scale,
            });
        }
        if let Some(rotary) = &self.rotary {
            rotary.check(head_dim)?;
        }
        if let Some(got) = self.qk_norm.filter(|epsilon| !(0.0..=1.0).contains(epsilon)) {
            return Err(Error::Value { argument: "qk_norm", expected: "from 0 to 1", got });
        }
        if let Some(tokens) = self.sliding_window {
            check_positive("sliding_window", tokens)?;
            self.causality.check_causal("sliding_window")?;
        }
        Ok((Self { head_dim: Some(head_dim), scale: Some(scale), ..self.clone() }, head_dim))
    }
}

/// Layers without a softmax have no sliding window.
pub(crate) fn check_no_sliding(config: &AttentionConfig) -> Result<()> {
    match config.sliding_window {
        Some(_) => Err(Error::Conflict { argument: "sliding_window", other: "linear attention" }),
        None => Ok(()),
    }
}

fn check_multiple(
    argument: &'static str,
    got: usize,
    divisor: &'static str,
    divisor_value: usize,
) -> Result<()> {
    if got.is_multiple_of(divisor_value) {
        Ok(())
    } else {
        Err(Error::NotDivisible { argument, divisor, divisor_value, got })
    }
}
