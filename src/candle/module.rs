//! [`CandleAttention`]: the layer for models written with candle.

use std::sync::Arc;

use candle_core::{DType, Device, Module, Result, Tensor, TensorId, WithDType};
use candle_nn::{Init, Linear, VarBuilder};
use ndarray::{Array1, Array2};

use super::maps::{MapTensors, ProjectionTensors, SideTensors};
use super::ops::{self, AttentionOptions, build};
use super::rotate::rotate;
use super::state::CandleState;
use super::tensors::{HeadLayout, check_cpu, check_dtype, working_dtype};
use crate::Real;
use crate::attention::{LinearConfig, MAX_POSITION, Window};
use crate::error::Error;
use crate::kernel::{DctMap, Mixing, Pairing};
use crate::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    RotaryTable, SoftmaxAttention, check_no_sliding,
};

/// A linear attention layer on candle's tensors: [`DijiangAttention`] as a module.
///
/// Names below the [`VarBuilder`]'s prefix, usually `model.layers.{l}.self_attn`:
/// `{q,k,v,o}_proj.weight`, `{q,k,v,o}_proj.bias` where there are any, and `dijiang.{h}.*` for the
/// map of key-value head h, as `DijiangAttention::to_safetensors` (feature `safetensors`) writes
/// them.
///
/// # Examples
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use dijiang::candle::CandleAttention;
/// use dijiang::layer::{
///     AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
///     SoftmaxAttention,
/// };
/// use ndarray::Array2;
///
/// // A layer made, and calibrated, with the crate's own types …
/// let eye = || Array2::<f32>::eye(16);
/// let config = AttentionConfig::new(16, 2).with_rotary(Rotary::new(10_000.0));
/// let softmax = SoftmaxAttention::new(config, AttentionWeights::new(eye(), eye(), eye(), eye()))?;
/// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
///
/// // … in a candle model: a batch of two prompts, then a token of each.
/// let attention = CandleAttention::from_layer(&layer, DType::F32)?;
/// let mut state = attention.new_state(2)?;
/// let x = Tensor::randn(0f32, 1.0, (2, 10, 16), &Device::Cpu)?;
/// attention.forward(&x.narrow(1, 0, 9)?, 0, Some(&mut state))?;
/// let last = attention.forward(&x.narrow(1, 9, 1)?, 9, Some(&mut state))?;
///
/// // All at once, with gradients.
/// let whole = attention.forward(&x, 0, None)?;
/// let difference = (whole.narrow(1, 9, 1)? - last)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert!(difference < 1e-5);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct CandleAttention {
    config: AttentionConfig,
    head_dim: usize,
    windows: Vec<Window>,
    sinks: usize,
    rotary: Option<Arc<RotaryTable>>,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    maps: Vec<MapTensors>,
}

impl CandleAttention {
    /// The layer whose tensors `vb` has, of the `VarBuilder`'s type; those of the maps in f64.
    ///
    /// Of `options`, `windows` and `sinks` count, and what says how large the tensors of the maps
    /// are: `blocks`, `pairing`, `envelope` and `mixing`. A head with `dense.query` among its
    /// tensors has a dense projection. Where the `VarBuilder` makes tensors that are not there
    /// (that of a `VarMap` does), radii are normally distributed, and everything else is as
    /// `options` says but the signs of `mixing`, which are 1.
    ///
    /// # Errors
    /// Those of the `VarBuilder` for missing tensors and other shapes; what
    /// [`AttentionConfig::check`] finds; [`Error::Value`] and [`Error::TooLarge`] for impossible
    /// `options`; [`Error::Conflict`] for a sliding window and for norms of
    /// queries and keys.
    pub fn new(
        config: &AttentionConfig,
        options: &DijiangOptions,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (config, head_dim) = config.resolved()?;
        options.map.check(head_dim)?;
        let (width, kv_width) = (config.heads * head_dim, config.kv_heads * head_dim);
        let q_proj = projection(config.model_dim, width, vb.pp("q_proj"))?;
        let k_proj = projection(config.model_dim, kv_width, vb.pp("k_proj"))?;
        let v_proj = projection(config.model_dim, kv_width, vb.pp("v_proj"))?;
        let o_proj = projection(width, config.model_dim, vb.pp("o_proj"))?;
        let maps = (0..config.kv_heads)
            .map(|h| map(head_dim, options, &vb.pp("dijiang").pp(h)))
            .collect::<Result<_>>()?;
        let projections = [q_proj, k_proj, v_proj, o_proj];
        Self::assemble(&config, options.exact_part(config.causality), projections, maps)
    }

    /// The same layer: its weights as constants of type `dtype`, its maps in f64.
    ///
    /// # Errors
    /// [`Error::Tensor`] unless `dtype` is f32, f64, f16 or bf16; [`Error::Conflict`] for norms of
    /// queries and keys.
    pub fn from_layer<T: Real + WithDType>(
        layer: &DijiangAttention<T>,
        dtype: DType,
    ) -> Result<Self> {
        working_dtype("dtype", dtype)?;
        let weights = layer.weights();
        let linear = |weight: &Array2<T>, bias: &Option<Array1<T>>| {
            let tensor = |values: Vec<T>, shape: &[usize]| {
                Tensor::from_vec(values, shape, &Device::Cpu)?.to_dtype(dtype)
            };
            let bias = bias.as_ref().map(|bias| tensor(bias.to_vec(), bias.shape())).transpose()?;
            Ok::<_, candle_core::Error>(Linear::new(
                tensor(weight.iter().copied().collect(), weight.shape())?,
                bias,
            ))
        };
        let projections = [
            linear(&weights.q, &weights.q_bias)?,
            linear(&weights.k, &weights.k_bias)?,
            linear(&weights.v, &weights.v_bias)?,
            linear(&weights.o, &weights.o_bias)?,
        ];
        let maps = layer
            .maps()
            .iter()
            .zip(layer.log_decay())
            .map(|(map, &log_decay)| MapTensors::new(map.params(), log_decay))
            .collect::<Result<_>>()?;
        Self::assemble(layer.config(), (layer.windows(), layer.sinks()), projections, maps)
    }

    /// The same layer with the crate's own types, from the present values.
    ///
    /// # Errors
    /// What [`SoftmaxAttention::new`] and [`DctMap::from_params`] find wrong with the values.
    pub fn to_layer<T: Real + WithDType>(&self) -> Result<DijiangAttention<T>> {
        let vector = |tensor: &Tensor| tensor.flatten_all()?.to_dtype(T::DTYPE)?.to_vec1::<T>();
        let matrix = |linear: &Linear| {
            let (rows, columns) = linear.weight().dims2()?;
            let matrix = Array2::from_shape_vec((rows, columns), vector(linear.weight())?);
            matrix.map_err(candle_core::Error::wrap)
        };
        let bias =
            |linear: &Linear| linear.bias().map(|bias| vector(bias).map(Array1::from)).transpose();
        let (q, k, v, o) = (&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj);
        let weights = AttentionWeights {
            q_bias: bias(q)?,
            k_bias: bias(k)?,
            v_bias: bias(v)?,
            o_bias: bias(o)?,
            ..AttentionWeights::new(matrix(q)?, matrix(k)?, matrix(v)?, matrix(o)?)
        };
        let heads =
            self.present_maps()?.iter().map(MapTensors::params).collect::<Result<Vec<_>>>()?;
        let (params, log_decay): (Vec<_>, Vec<_>) = heads.into_iter().unzip();
        let maps = params.into_iter().map(DctMap::from_params).collect::<crate::Result<_>>()?;
        let softmax = SoftmaxAttention::new(self.config.clone(), weights)?;
        let layer = DijiangAttention::from_softmax(
            &softmax,
            DijiangOptions {
                windows: self.windows.clone(),
                sinks: self.sinks,
                ..DijiangOptions::new()
            },
        )?;
        Ok(layer.with_maps(maps)?.with_log_decay(log_decay)?)
    }

    fn assemble(
        config: &AttentionConfig,
        (windows, sinks): (&[Window], usize),
        projections: [Linear; 4],
        maps: Vec<MapTensors>,
    ) -> Result<Self> {
        let (config, head_dim) = config.resolved()?;
        if config.qk_norm.is_some() {
            return Err(Error::Conflict { argument: "qk_norm", other: "candle's layer" }.into());
        }
        check_no_sliding(&config)?;
        let rotary =
            config.rotary.as_ref().map(|rotary| Arc::new(RotaryTable::new(rotary, head_dim)));
        let [q_proj, k_proj, v_proj, o_proj] = projections;
        Ok(Self {
            config,
            head_dim,
            windows: windows.to_vec(),
            sinks,
            rotary,
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            maps,
        })
    }

    /// The config, head dimension and scale filled in.
    pub fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// The exact local windows: one per key-value head, one for all, or none.
    pub fn windows(&self) -> &[Window] {
        &self.windows
    }

    /// Tokens at the beginning that stay exact for every later query.
    pub fn sinks(&self) -> usize {
        self.sinks
    }

    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[MapTensors] {
        &self.maps
    }

    /// Every tensor with its name below the layer's prefix.
    pub fn named(&self) -> Vec<(String, Tensor)> {
        let mut named = Vec::new();
        for (which, linear) in
            [("q", &self.q_proj), ("k", &self.k_proj), ("v", &self.v_proj), ("o", &self.o_proj)]
        {
            named.push((format!("{which}_proj.weight"), linear.weight().clone()));
            named.extend(linear.bias().map(|bias| (format!("{which}_proj.bias"), bias.clone())));
        }
        for (h, map) in self.maps.iter().enumerate() {
            named.extend(
                map.named()
                    .into_iter()
                    .map(|(name, tensor)| (format!("dijiang.{h}.{name}"), tensor.clone())),
            );
        }
        named
    }

    /// The same layer with every tensor replaced by what `replace` makes of it and its name: a
    /// variable, to train the layer.
    ///
    /// # Errors
    /// Those of `replace`.
    pub fn try_map(
        &self,
        mut replace: impl FnMut(&str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut linear = |which: &str, linear: &Linear| {
            let weight = replace(&format!("{which}_proj.weight"), linear.weight())?;
            let bias = linear
                .bias()
                .map(|bias| replace(&format!("{which}_proj.bias"), bias))
                .transpose()?;
            Ok::<_, candle_core::Error>(Linear::new(weight, bias))
        };
        Ok(Self {
            q_proj: linear("q", &self.q_proj)?,
            k_proj: linear("k", &self.k_proj)?,
            v_proj: linear("v", &self.v_proj)?,
            o_proj: linear("o", &self.o_proj)?,
            maps: (self.maps.iter().enumerate())
                .map(|(h, map)| {
                    map.try_map(|name, tensor| replace(&format!("dijiang.{h}.{name}"), tensor))
                })
                .collect::<Result<_>>()?,
            config: self.config.clone(),
            head_dim: self.head_dim,
            windows: self.windows.clone(),
            sinks: self.sinks,
            rotary: self.rotary.clone(),
        })
    }

    /// The empty state of `batch` new sequences, with the maps of now: train on, and it is that of
    /// another layer.
    ///
    /// # Errors
    /// [`Error::Empty`] for a batch of 0, [`Error::TooLarge`] for one there is no room for,
    /// [`Error::Conflict`] for a bidirectional layer, and what is wrong with the maps.
    pub fn new_state(&self, batch: usize) -> Result<CandleState> {
        self.config.causality.check_causal("state")?;
        let config = LinearConfig {
            scale: self.config.scale,
            windows: self.windows.clone(),
            sinks: self.sinks,
            ..LinearConfig::new()
        }
        .with_heads(self.config.heads);
        let maps = self.present_maps()?;
        let params = MapTensors::pack(&maps)?;
        match working_dtype("weights", self.q_proj.weight().dtype())? {
            DType::F64 => {
                let attention = build::<f64>(config, &maps, &params)?;
                Ok(CandleState::new(attention, self.map_ids(), batch)?)
            }
            _ => {
                let attention = build::<f32>(config, &maps, &params)?;
                Ok(CandleState::new(attention, self.map_ids(), batch)?)
            }
        }
    }

    /// Hidden states in, hidden states out, as the attention of candle's own models: `index_pos` is
    /// the position of the first token.
    ///
    /// Without a state, these tokens are whole sequences, and the result has gradients with respect
    /// to `x` and every variable among the layer's tensors. With one, they are the next tokens of
    /// its sequences; attention has no gradients then.
    ///
    /// # Shapes
    /// - `x`: `[b, n, D]`, returns `[b, n, D]`.
    ///
    /// # Conventions
    /// `x` is of the type of the weights. Rotary embedding and attention of f16 and bf16 are
    /// computed in f32, as is the state. log γ is min(`log_decay`, 0), so that an optimizer may
    /// overshoot.
    ///
    /// # Errors
    /// [`Error::Tensor`], [`Error::Shape`] and [`Error::Empty`] for `x`, [`Error::Value`] if
    /// `index_pos` is not where the state is, [`Error::TooLarge`] if it is beyond 2⁵²,
    /// [`Error::Foreign`] for a state of another batch, [`Error::Conflict`] for one made for other
    /// maps; those of [`causal`](super::causal). After an error the state is unchanged.
    pub fn forward(
        &self,
        x: &Tensor,
        index_pos: usize,
        state: Option<&mut CandleState>,
    ) -> Result<Tensor> {
        self.run(x, index_pos, state, None)
    }

    /// [`forward`](Self::forward) where some keys must not be attended to: `key_mask` is `[b, n]`
    /// of type U8, 0 for those.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Tensor`] and [`Error::Shape`] for the mask.
    pub fn forward_masked(
        &self,
        x: &Tensor,
        index_pos: usize,
        key_mask: &Tensor,
        state: Option<&mut CandleState>,
    ) -> Result<Tensor> {
        self.run(x, index_pos, state, Some(key_mask))
    }

    fn run(
        &self,
        x: &Tensor,
        index_pos: usize,
        state: Option<&mut CandleState>,
        key_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let AttentionConfig { model_dim, heads, kv_heads, scale, causality, .. } = self.config;
        check_cpu("x", x)?;
        check_dtype("x", x, self.q_proj.weight().dtype(), "of the type of the weights")?;
        let &[b, n, got] = x.dims() else {
            return Err(Error::Tensor {
                argument: "x",
                expected: "of three axes",
                got: format!("{:?}", x.dims()),
            }
            .into());
        };
        if got != model_dim {
            return Err(Error::Shape { argument: "x", axis: 2, expected: model_dim, got }.into());
        }
        if b == 0 || n == 0 {
            return Err(Error::Empty { argument: "x" }.into());
        }
        if let Some(state) = &state {
            state.check(&self.map_ids(), b, index_pos)?;
        }
        if index_pos > MAX_POSITION {
            let (argument, limit, got) = ("index_pos", MAX_POSITION, index_pos);
            return Err(Error::TooLarge { argument, limit, got }.into());
        }
        let working = working_dtype("x", x.dtype())?;
        let project = |linear: &Linear, heads: usize, rotary: Option<&Arc<RotaryTable>>| {
            let rows = linear.forward(x)?.to_dtype(working)?;
            let rows = match rotary {
                Some(table) => rotate(&rows, table, index_pos)?,
                None => rows,
            };
            rows.reshape((b, n, heads, self.head_dim))
        };
        let q = project(&self.q_proj, heads, self.rotary.as_ref())?;
        let k = project(&self.k_proj, kv_heads, self.rotary.as_ref())?;
        let v = project(&self.v_proj, kv_heads, None)?;
        let options = AttentionOptions {
            layout: HeadLayout::TokensFirst,
            scale,
            windows: &self.windows,
            sinks: self.sinks,
            key_mask,
        };
        let out = match (state, causality) {
            (Some(state), _) => state.extend(&q, &k, &v, key_mask)?,
            (None, Causality::Causal) => ops::causal(&q, &k, &v, &self.present_maps()?, &options)?,
            (None, Causality::Bidirectional) => {
                ops::full(&q, &k, &v, &self.present_maps()?, &options)?
            }
        };
        self.o_proj.forward(&out.reshape((b, n, heads * self.head_dim))?.to_dtype(x.dtype())?)
    }

    /// What tells this layer's maps from those of another, and is the same for clones.
    fn map_ids(&self) -> Vec<TensorId> {
        self.maps.iter().map(|map| map.query.radii.id()).collect()
    }

    /// The maps as they are used: with decays that are decays.
    fn present_maps(&self) -> Result<Vec<MapTensors>> {
        let present = |map: &MapTensors| {
            let log_decay = match self.config.causality {
                Causality::Causal => map.log_decay.minimum(0.0)?,
                Causality::Bidirectional => map.log_decay.zeros_like()?,
            };
            Ok(MapTensors { log_decay, ..map.clone() })
        };
        self.maps.iter().map(present).collect()
    }
}

/// A projection, with a bias if there is one.
fn projection(inner: usize, out: usize, vb: VarBuilder<'_>) -> Result<Linear> {
    let weight =
        vb.get_with_hints((out, inner), "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    let bias = vb.contains_tensor("bias").then(|| vb.get(out, "bias")).transpose()?;
    Ok(Linear::new(weight, bias))
}

/// The map of one head.
fn map(dim: usize, options: &DijiangOptions, vb: &VarBuilder<'_>) -> Result<MapTensors> {
    let get = |name: &str, shape: &[usize], init: Init| {
        vb.get_with_hints_dtype(shape, name, init, DType::F64)
    };
    let rows = options.map.blocks * dim;
    let features = if options.map.pairing == Pairing::Antithetic { 2 * rows } else { rows };
    let dense = vb.contains_tensor("dense.query");
    let scales = if dense { dim } else { rows };
    let side = |side: &str| {
        Ok::<_, candle_core::Error>(SideTensors {
            center: get(&format!("{side}.center"), &[dim], Init::Const(0.0))?,
            scale: get(&format!("{side}.scale"), &[scales], Init::Const(1.0))?,
            radii: get(&format!("{side}.radii"), &[rows], Init::Randn { mean: 0.0, stdev: 1.0 })?,
        })
    };
    let projection = match options.map.mixing {
        _ if dense => {
            let matrix = |side: &str| get(&format!("dense.{side}"), &[rows, dim], Init::Const(0.0));
            ProjectionTensors::Dense { query: matrix("query")?, key: matrix("key")? }
        }
        _ if vb.contains_tensor("deep.query") => {
            let scales = |side: &str| {
                get(&format!("deep.{side}"), &[options.map.blocks, 2, dim], Init::Const(1.0))
            };
            ProjectionTensors::Deep { query: scales("query")?, key: scales("key")? }
        }
        Mixing::None => ProjectionTensors::Dct,
        Mixing::Mixed => ProjectionTensors::Mixed {
            signs: get("signs", &[options.map.blocks, 3, dim], Init::Const(1.0))?,
        },
    };
    Ok(MapTensors {
        projection,
        envelope: options.map.envelope,
        pairing: options.map.pairing,
        query: side("query")?,
        key: side("key")?,
        log_weight: get("log_weight", &[features], Init::Const(-(features.max(1) as f64).ln()))?,
        log_mix: get("log_mix", &[], Init::Const(0.0))?,
        log_decay: get("log_decay", &[], Init::Const(options.log_decay))?,
    })
}
