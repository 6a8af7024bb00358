//! From and to the layers of [`dijiang`], and from burn's own.

use burn::module::Param;
use burn::nn::Linear;
use burn::nn::attention::MultiHeadAttention;
use burn::tensor::{Device, Element, Tensor, TensorData};
use dijiang::Real;
use dijiang::attention::Causality;
use dijiang::calibrate::{CalibrateOptions, CalibrateProgress, CalibrateReport};
use dijiang::kernel::DctMap;
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangOptions, SoftmaxAttention,
};
use ndarray::{Array1, Array2, Array3};
use std::ops::ControlFlow;

use crate::attention::DijiangAttention;
use crate::config::{DijiangAttentionConfig, check_windows};
use crate::error::{Error, Result};
use crate::maps::{FeatureMaps, MapKind, elements};

impl DijiangAttention {
    /// The same layer as one of [`dijiang`], calibrated or read from a checkpoint, say: its weights
    /// and maps as parameters of its element type, on `device`.
    ///
    /// # Errors
    /// [`dijiang::Error::Conflict`] for norms of queries and keys, and for heads whose maps are not
    /// of one kind; [`Error::Tensor`] if the device does not have the element type.
    pub fn from_layer<T: Real + Element>(
        layer: &dijiang::layer::DijiangAttention<T>,
        device: &Device,
    ) -> Result<Self> {
        let dtype = T::dtype();
        if !device.supports_dtype(dtype) {
            return Err(Error::Tensor {
                argument: "device",
                expected: "one that has the layer's element type",
                got: format!("{device:?} for {dtype:?}"),
            });
        }
        let (of_layer, weights) = (layer.config(), layer.weights());
        if of_layer.qk_norm.is_some() {
            let other = "burn's layer";
            return Err(dijiang::Error::Conflict { argument: "qk_norm", other }.into());
        }
        check_windows(layer.windows())?;
        let params: Vec<_> = layer.maps().iter().map(|map| map.params().clone()).collect();
        let maps = FeatureMaps::new(&params, layer.log_decay(), (device, dtype))?;
        let MapKind { projection, envelope, pairing } = maps.kind;
        let config = DijiangAttentionConfig::new(of_layer.model_dim, of_layer.heads)
            .with_n_kv_heads(Some(of_layer.kv_heads))
            .with_head_dim(of_layer.head_dim)
            .with_scale(of_layer.scale)
            .with_causality(of_layer.causality)
            .with_rotary(of_layer.rotary.clone())
            .with_windows(layer.windows().to_vec())
            .with_sinks(layer.sinks())
            .with_features(Some(maps.features()))
            .with_projection(projection)
            .with_pairing(pairing)
            .with_envelope(envelope)
            .with_qkv_bias(weights.q_bias.is_some())
            .with_output_bias(weights.o_bias.is_some());
        let linear = |weight: &Array2<T>, bias: &Option<Array1<T>>| {
            let (out, input) = weight.dim();
            let elements: Vec<T> = weight.t().iter().copied().collect();
            let data = TensorData::new(elements, [input, out]);
            let bias = bias.as_ref().map(|bias| {
                let data = TensorData::new(bias.to_vec(), [out]);
                Param::from_tensor(Tensor::from_data(data, (device, dtype)))
            });
            Linear { weight: Param::from_tensor(Tensor::from_data(data, (device, dtype))), bias }
        };
        let projections = [
            linear(&weights.q, &weights.q_bias),
            linear(&weights.k, &weights.k_bias),
            linear(&weights.v, &weights.v_bias),
            linear(&weights.o, &weights.o_bias),
        ];
        Ok(Self::assemble(config, projections, maps))
    }

    /// The same layer as one of [`dijiang`], from the present values.
    ///
    /// # Errors
    /// What [`SoftmaxAttention::new`] and [`DctMap::from_params`] find wrong with the values.
    pub fn to_layer<T: Real + Element>(&self) -> Result<dijiang::layer::DijiangAttention<T>> {
        let projections = [&self.query, &self.key, &self.value, &self.output];
        let softmax = SoftmaxAttention::new(self.config().layer(), weights(projections)?)?;
        let options = DijiangOptions::new()
            .with_windows(self.config().windows.clone())
            .with_sinks(self.config().sinks);
        let layer = dijiang::layer::DijiangAttention::from_softmax(&softmax, options)?;
        let (params, log_decay) = self.maps.params()?;
        let maps = params.into_iter().map(DctMap::from_params);
        let layer = layer.with_maps(maps.collect::<dijiang::Result<_>>()?)?;
        Ok(match self.config().causality {
            Causality::Causal => layer.with_log_decay(log_decay)?,
            Causality::Bidirectional => layer,
        })
    }

    /// Exchanges burn's softmax attention and keeps its weights, on its device. `causality` says
    /// what mask it is used with, which is no part of it: [`Causality::Causal`] for
    /// [`generate_autoregressive_mask`](burn::nn::attention::generate_autoregressive_mask).
    ///
    /// The maps are as `options` draws them; then [`calibrate`](Self::calibrate). Dropout of
    /// attention weights is not taken over: there are none here.
    ///
    /// # Errors
    /// As [`softmax_layer`] and
    /// [`from_softmax`](dijiang::layer::DijiangAttention::from_softmax).
    pub fn from_mha(
        mha: &MultiHeadAttention,
        causality: Causality,
        options: DijiangOptions,
    ) -> Result<Self> {
        let softmax = softmax_layer::<f32>(mha, causality)?;
        let layer = dijiang::layer::DijiangAttention::from_softmax(&softmax, options)?;
        Self::from_layer(&layer, &mha.query.weight.val().device())
    }

    /// Fits the maps to hidden states, so that the heads' outputs come close to softmax's: see
    /// [`dijiang::layer::DijiangAttention::calibrate`], which runs on the CPU wherever the layer
    /// is. The maps' parameters are new ones afterwards; no other changes.
    ///
    /// # Shapes
    /// - `x`: `[b, n, D]`, what the layer is given on b texts, each longer than a window.
    ///
    /// # Errors
    /// As there, and [`dijiang::Error::Shape`] for `x`; the layer is unchanged then.
    pub fn calibrate(
        &mut self,
        x: Tensor<3>,
        options: &CalibrateOptions,
        progress: impl FnMut(CalibrateProgress) -> ControlFlow<()>,
    ) -> Result<CalibrateReport> {
        let [batch, n, width] = x.dims();
        let mut layer = self.to_layer::<f32>()?;
        let texts = Array3::from_shape_vec((batch, n, width), elements(x)?);
        let texts = texts.map_err(|_| Error::Tensor {
            argument: "x",
            expected: "of numbers",
            got: "others".to_owned(),
        })?;
        let samples: Vec<_> = texts.outer_iter().collect();
        let report = layer.calibrate(&samples, options, progress)?;
        let present = self.maps.log_mix.val();
        let params: Vec<_> = layer.maps().iter().map(|map| map.params().clone()).collect();
        let device = (&present.device(), present.dtype());
        self.maps = FeatureMaps::new(&params, layer.log_decay(), device)?;
        Ok(report)
    }
}

/// Burn's softmax attention as a layer of [`dijiang`]: to calibrate and plan with, say.
///
/// # Errors
/// [`dijiang::Error::Conflict`] for its `quiet_softmax`, and what [`SoftmaxAttention::new`] finds.
pub fn softmax_layer<T: Real + Element>(
    mha: &MultiHeadAttention,
    causality: Causality,
) -> Result<SoftmaxAttention<T>> {
    if mha.quiet_softmax {
        let other = "linear attention";
        return Err(dijiang::Error::Conflict { argument: "quiet_softmax", other }.into());
    }
    let config = AttentionConfig::new(mha.d_model, mha.n_heads).with_causality(causality);
    let projections = [&mha.query, &mha.key, &mha.value, &mha.output];
    Ok(SoftmaxAttention::new(config, weights(projections)?)?)
}

/// `[out, in]` matrices of burn's `[in, out]` ones.
fn weights<T: Real + Element>(projections: [&Linear; 4]) -> Result<AttentionWeights<T>> {
    let matrix = |linear: &Linear| {
        let weight = linear.weight.val();
        let [rows, columns] = weight.dims();
        let matrix = Array2::from_shape_vec((rows, columns), elements(weight)?);
        let matrix = matrix.map_err(|_| Error::Tensor {
            argument: "weight",
            expected: "a matrix of numbers",
            got: format!("one of {rows} by {columns} that cannot be read"),
        })?;
        Ok::<_, Error>(matrix.reversed_axes().as_standard_layout().into_owned())
    };
    let bias = |linear: &Linear| {
        let bias = linear.bias.as_ref().map(|bias| elements(bias.val()).map(Array1::from));
        bias.transpose()
    };
    let [q, k, v, o] = projections;
    let mut weights = AttentionWeights::new(matrix(q)?, matrix(k)?, matrix(v)?, matrix(o)?);
    (weights.q_bias, weights.k_bias) = (bias(q)?, bias(k)?);
    (weights.v_bias, weights.o_bias) = (bias(v)?, bias(o)?);
    Ok(weights)
}
