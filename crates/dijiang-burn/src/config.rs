//! [`DijiangAttentionConfig`]: the shape of the layer and how its maps begin.

use burn::config::Config;
use burn::module::Initializer;
use dijiang::attention::{Causality, Window};
use dijiang::kernel::{
    DctMapConfig, DctParams, Envelope, InputScales, Mixing, Pairing, Points, Radial,
};
use dijiang::layer::{AttentionConfig, AttentionWeights, DijiangOptions, Rotary, SoftmaxAttention};
use ndarray::Array2;
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The linear map of the feature maps: see [`dijiang::kernel::Projection`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum ProjectionKind {
    /// One cosine transform per block: the paper's.
    #[default]
    Dct,
    /// Three transforms with random signs between them.
    Mixed,
    /// Three transforms with trainable scales between them.
    Deep,
    /// A trainable matrix.
    Dense,
}

/// The shape of a [`DijiangAttention`](crate::DijiangAttention), and how its maps begin.
///
/// # Examples
/// ```
/// use burn::tensor::{Device, Distribution, Tensor};
/// use dijiang_burn::DijiangAttentionConfig;
///
/// let device = Device::default();
/// let config = DijiangAttentionConfig::new(32, 4).with_n_kv_heads(Some(2)).with_sinks(2);
/// let attention = config.init(&device)?;
/// let x = Tensor::<3>::random([2, 10, 32], Distribution::Default, &device);
/// assert_eq!(attention.forward(x)?.dims(), [2, 10, 32]);
/// # Ok::<(), dijiang_burn::Error>(())
/// ```
#[derive(Config, Debug)]
pub struct DijiangAttentionConfig {
    /// Model dimension D.
    pub d_model: usize,
    /// Query heads h.
    pub n_heads: usize,
    /// Key-value heads, of which h is a multiple (grouped queries). Default: h.
    pub n_kv_heads: Option<usize>,
    /// Head dimension d. Default: D / h, which then has to be whole.
    pub head_dim: Option<usize>,
    /// Softmax scale σ. Default: 1/√d.
    pub scale: Option<f64>,
    /// What a token may look at. Default: [`Causality::Causal`].
    #[config(default = "Causality::Causal")]
    pub causality: Causality,
    /// Rotary position embedding of queries and keys. Default: none.
    pub rotary: Option<Rotary>,
    /// Exact local windows: none, one for all key-value heads, or one for each. Default: 64 tokens
    /// a chunk, one chunk back. A bidirectional layer has none and ignores them.
    #[config(default = "vec![Window::new(64, 1)]")]
    pub windows: Vec<Window>,
    /// The first tokens of a sequence, which stay exact for every later query. Without a window
    /// there are none. Default: 4.
    #[config(default = 4)]
    pub sinks: usize,
    /// Features m per head, a multiple of d (of 2·d with [`Pairing::Antithetic`]). Default: the
    /// least.
    pub features: Option<usize>,
    /// The linear map of the feature maps. Default: [`ProjectionKind::Dct`].
    #[config(default = "ProjectionKind::Dct")]
    pub projection: ProjectionKind,
    /// Features per projected coordinate. Default: [`Pairing::Single`].
    #[config(default = "Pairing::Single")]
    pub pairing: Pairing,
    /// Envelope p. Default: [`Envelope::None`].
    #[config(default = "Envelope::None")]
    pub envelope: Envelope,
    /// Law of the initial radii. Default: [`Radial::Normal`].
    #[config(default = "Radial::Normal")]
    pub radial: Radial,
    /// Initial log γ ≤ 0 of every head. Default: 0. Causal layers only.
    #[config(default = 0.0)]
    pub log_decay: f64,
    /// Seed of the maps' points and signs. Default: 0.
    #[config(default = 0)]
    pub seed: u64,
    /// Biases of the query, key and value projections. Default: yes.
    #[config(default = true)]
    pub qkv_bias: bool,
    /// Bias of the output projection. Default: yes.
    #[config(default = true)]
    pub output_bias: bool,
    /// Initial weights of the projections. Default: that of burn's `MultiHeadAttention`.
    #[config(
        default = "Initializer::KaimingUniform{gain: 1.0 / 3f64.sqrt(), fan_out_only: false}"
    )]
    pub initializer: Initializer,
}

impl DijiangAttentionConfig {
    /// The same without what has a default, as [`dijiang`] names it.
    pub(crate) fn layer(&self) -> AttentionConfig {
        let mut config = AttentionConfig::new(self.d_model, self.n_heads)
            .with_kv_heads(self.n_kv_heads.unwrap_or(self.n_heads))
            .with_causality(self.causality);
        (config.head_dim, config.scale) = (self.head_dim, self.scale);
        config.rotary.clone_from(&self.rotary);
        config
    }

    /// Every default filled in, and the maps it begins with.
    ///
    /// # Errors
    /// What [`AttentionConfig::check`] and [`dijiang::layer::DijiangAttention::from_softmax`] find
    /// wrong, and [`dijiang::Error::NotDivisible`] for `features`.
    pub(crate) fn resolve(&self) -> Result<(Self, Vec<DctParams>)> {
        let layer = self.layer();
        layer.check()?;
        check_windows(&self.windows)?;
        let dim = layer.head_dim.unwrap_or(layer.model_dim / layer.heads);
        let least = if self.pairing == Pairing::Antithetic { 2 * dim } else { dim };
        let features = self.features.unwrap_or(least);
        if !features.is_multiple_of(least) {
            return Err(dijiang::Error::NotDivisible {
                argument: "features",
                divisor: "the least number of features",
                divisor_value: least,
                got: features,
            }
            .into());
        }
        // What it is in the middle does not matter to the maps.
        let (width, kv_width) = (layer.heads * dim, layer.kv_heads * dim);
        let mut narrow = layer.clone();
        (narrow.model_dim, narrow.head_dim) = (1, Some(dim));
        let zeros = |shape| Array2::<f64>::zeros(shape);
        let weights = AttentionWeights::new(
            zeros((width, 1)),
            zeros((kv_width, 1)),
            zeros((kv_width, 1)),
            zeros((1, width)),
        );
        let mixing = match self.projection {
            ProjectionKind::Mixed => Mixing::Mixed,
            _ => Mixing::None,
        };
        let options = DijiangOptions::new()
            .with_map(
                DctMapConfig::new()
                    .with_blocks(features / least)
                    .with_pairing(self.pairing)
                    .with_envelope(self.envelope)
                    .with_radial(self.radial)
                    .with_mixing(mixing)
                    .with_points(Points::Sobol)
                    .with_scales(InputScales::RandomSigns)
                    .with_seed(self.seed),
            )
            .with_windows(self.windows.clone())
            .with_sinks(self.sinks)
            .with_log_decay(self.log_decay);
        let softmax = SoftmaxAttention::new(narrow, weights)?;
        let exchanged = dijiang::layer::DijiangAttention::from_softmax(&softmax, options)?;
        let maps = exchanged.maps().iter().map(|map| match self.projection {
            ProjectionKind::Dct | ProjectionKind::Mixed => Ok(map.params().clone()),
            ProjectionKind::Deep => Ok(map.params().to_deep()),
            ProjectionKind::Dense => map.params().to_dense(),
        });
        let maps = maps.collect::<dijiang::Result<Vec<_>>>()?;
        let resolved = Self {
            n_kv_heads: Some(layer.kv_heads),
            head_dim: Some(dim),
            scale: Some(self.scale.unwrap_or(1.0 / (dim as f64).sqrt())),
            features: Some(features),
            windows: exchanged.windows().to_vec(),
            sinks: exchanged.sinks(),
            ..self.clone()
        };
        Ok((resolved, maps))
    }
}

/// Kept keys are chosen one after another, which no tensor operation does.
pub(crate) fn check_windows(windows: &[Window]) -> Result<()> {
    match windows.iter().find(|window| window.kept > 0) {
        Some(window) => {
            let (argument, expected, got) = ("window kept", "0", window.kept as f64);
            Err(dijiang::Error::Value { argument, expected, got }.into())
        }
        None => Ok(()),
    }
}
