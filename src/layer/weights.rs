//! [`AttentionWeights`]: the four matrices of an attention layer, as trained.

use ndarray::{Array1, Array2};

use crate::Real;
use crate::check::{check_elements, check_len, check_shape};
use crate::error::{Error, Result};
use crate::layer::config::AttentionConfig;

/// Projection weights of an attention layer, in the layout of `torch.nn.Linear` and of Hugging Face
/// files: `[out, in]`, y = W x + b. Each layer keeps them behind an `Arc`: a softmax layer and the
/// layer made from it share one copy.
///
/// The heads lie one after another along the `out` axis of `q`, `k` and `v`. A fused matrix has to
/// be cut first.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AttentionWeights<T> {
    /// Query projection, `[h·d, D]`.
    pub q: Array2<T>,
    /// Key projection, `[h_kv·d, D]`.
    pub k: Array2<T>,
    /// Value projection, `[h_kv·d, D]`.
    pub v: Array2<T>,
    /// Output projection, `[D, h·d]`.
    pub o: Array2<T>,
    /// Query bias, `[h·d]`. Default: none.
    pub q_bias: Option<Array1<T>>,
    /// Key bias, `[h_kv·d]`. Default: none.
    pub k_bias: Option<Array1<T>>,
    /// Value bias, `[h_kv·d]`. Default: none.
    pub v_bias: Option<Array1<T>>,
    /// Output bias, `[D]`. Default: none.
    pub o_bias: Option<Array1<T>>,
    /// Weights of the queries' RMS norm, `[d]`, the same for every head. There if
    /// [`AttentionConfig::qk_norm`] is, and only then. Default: none.
    pub q_norm: Option<Array1<T>>,
    /// Weights of the keys' RMS norm, `[d]`, as [`q_norm`](Self::q_norm). Default: none.
    pub k_norm: Option<Array1<T>>,
}

impl<T: Real> AttentionWeights<T> {
    /// Weights without biases. Shapes and elements are checked by the constructor of the layer.
    ///
    /// # Shapes
    /// - `q`: `[h·d, D]`, `k` and `v`: `[h_kv·d, D]`, `o`: `[D, h·d]`
    pub fn new(q: Array2<T>, k: Array2<T>, v: Array2<T>, o: Array2<T>) -> Self {
        let (q_bias, k_bias, v_bias, o_bias) = (None, None, None, None);
        Self { q, k, v, o, q_bias, k_bias, v_bias, o_bias, q_norm: None, k_norm: None }
    }

    /// Biases of queries, keys and values.
    ///
    /// # Shapes
    /// - `q`: `[h·d]`, `k` and `v`: `[h_kv·d]`
    #[must_use]
    pub fn with_qkv_biases(self, q: Array1<T>, k: Array1<T>, v: Array1<T>) -> Self {
        Self { q_bias: Some(q), k_bias: Some(k), v_bias: Some(v), ..self }
    }

    /// Biases of all four projections.
    ///
    /// # Shapes
    /// - `q`: `[h·d]`, `k` and `v`: `[h_kv·d]`, `o`: `[D]`
    #[must_use]
    pub fn with_biases(self, q: Array1<T>, k: Array1<T>, v: Array1<T>, o: Array1<T>) -> Self {
        Self { o_bias: Some(o), ..self.with_qkv_biases(q, k, v) }
    }

    /// Weights of the norms of queries and keys, for [`AttentionConfig::with_qk_norm`].
    ///
    /// # Shapes
    /// - `q`, `k`: `[d]`
    #[must_use]
    pub fn with_qk_norms(self, q: Array1<T>, k: Array1<T>) -> Self {
        Self { q_norm: Some(q), k_norm: Some(k), ..self }
    }

    /// Every shape fits `config`, and every element is a number a layer can work with.
    ///
    /// # Errors
    /// - whatever [`AttentionConfig::check`] says;
    /// - [`Error::Shape`](crate::Error::Shape) and [`Error::Length`](crate::Error::Length) for
    ///   matrices, biases and norms that do not fit;
    /// - [`Error::Conflict`](crate::Error::Conflict) for norms that `config` does not have, or has
    ///   and these weights do not;
    /// - [`Error::NonFinite`](crate::Error::NonFinite) for NaN, infinity and elements beyond
    ///   [`Real::LIMIT`].
    pub fn check(&self, config: &AttentionConfig) -> Result<()> {
        let (config, head_dim) = config.resolved()?;
        let (model, width, kv_width) =
            (config.model_dim, config.heads * head_dim, config.kv_heads * head_dim);
        for (argument, matrix, shape) in [
            ("q", &self.q, [width, model]),
            ("k", &self.k, [kv_width, model]),
            ("v", &self.v, [kv_width, model]),
            ("o", &self.o, [model, width]),
        ] {
            check_shape(argument, matrix, &shape)?;
            check_elements(argument, matrix)?;
        }
        for (argument, bias, len) in [
            ("q_bias", &self.q_bias, width),
            ("k_bias", &self.k_bias, kv_width),
            ("v_bias", &self.v_bias, kv_width),
            ("o_bias", &self.o_bias, model),
        ] {
            if let Some(bias) = bias {
                check_len(argument, len, bias.len())?;
                check_elements(argument, bias)?;
            }
        }
        for (argument, norm) in [("q_norm", &self.q_norm), ("k_norm", &self.k_norm)] {
            match (norm, config.qk_norm) {
                (Some(norm), Some(_)) => {
                    check_len(argument, head_dim, norm.len())?;
                    check_elements(argument, norm)?;
                }
                (None, None) => {}
                (Some(_), None) => {
                    return Err(Error::Conflict { argument, other: "a config without qk_norm" });
                }
                (None, Some(_)) => {
                    return Err(Error::Conflict {
                        argument: "qk_norm",
                        other: "weights without q_norm and k_norm",
                    });
                }
            }
        }
        Ok(())
    }

    /// Rows one after another, as the projections read them.
    pub(crate) fn is_standard(&self) -> bool {
        [&self.q, &self.k, &self.v, &self.o].iter().all(|matrix| matrix.is_standard_layout())
            && [&self.q_norm, &self.k_norm]
                .into_iter()
                .flatten()
                .all(|norm| norm.is_standard_layout())
    }

    /// A copy with rows one after another.
    pub(crate) fn to_standard(&self) -> Self {
        let standard = |matrix: &Array2<T>| matrix.as_standard_layout().into_owned();
        let in_order =
            |norm: &Option<Array1<T>>| norm.as_ref().map(|norm| norm.iter().copied().collect());
        Self {
            q: standard(&self.q),
            k: standard(&self.k),
            v: standard(&self.v),
            o: standard(&self.o),
            q_norm: in_order(&self.q_norm),
            k_norm: in_order(&self.k_norm),
            ..self.clone()
        }
    }
}
