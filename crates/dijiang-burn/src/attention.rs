//! [`DijiangAttention`]: the layer.

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Bool, DType, Device, Tensor};
use dijiang::attention::Causality;
use dijiang::layer::Rotary;

use crate::cache::{CacheShape, DijiangCache, States};
use crate::config::DijiangAttentionConfig;
use crate::engine::{self, Choices, EngineState};
use crate::error::{Error, Result, check_shape};
use crate::maps::{FeatureMaps, unreadable, working};
use crate::tensors::{State, Tokens, full};

/// Tokens that the tensor path takes at a time where nothing is kept for gradients: enough to be
/// few operations, and few enough to stay in a processor's caches.
const SEGMENT: usize = 1024;

/// Hidden states, and which of them are padding.
#[derive(Debug, Clone)]
pub struct DijiangInput {
    x: Tensor<3>,
    mask_pad: Option<Tensor<2, Bool>>,
}

impl DijiangInput {
    /// Of no padding.
    ///
    /// # Shapes
    /// - `x`: `[b, n, D]`
    pub fn new(x: Tensor<3>) -> Self {
        Self { x, mask_pad: None }
    }

    /// Which tokens are padding, as burn says it: true for those that must not be attended to. They
    /// count as tokens for positions and windows, never as sinks; their own outputs mean nothing.
    ///
    /// # Shapes
    /// - `mask_pad`: `[b, n]`
    #[must_use]
    pub fn mask_pad(self, mask_pad: Tensor<2, Bool>) -> Self {
        Self { mask_pad: Some(mask_pad), ..self }
    }
}

impl From<Tensor<3>> for DijiangInput {
    fn from(x: Tensor<3>) -> Self {
        Self::new(x)
    }
}

/// What computes the attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AttentionPath {
    /// dijiang's engine where the tensors are on burn's CPU backend `flex` and of type f32 or f64,
    /// plain tensor operations everywhere else.
    #[default]
    Automatic,
    /// Plain tensor operations everywhere.
    Tensors,
}

/// A linear attention layer in place of [`burn::nn::attention::MultiHeadAttention`]: O(n) time, and
/// a cache of constant size.
///
/// Its maps are parameters like its projections: they train, and burn's stores save and load them.
/// Made by [`DijiangAttentionConfig::init`], from a layer of [`dijiang`]
/// ([`from_layer`](Self::from_layer)) or from burn's own ([`from_mha`](Self::from_mha)).
///
/// Where tensors are on the CPU backend, attention is computed by dijiang's engine, forward and
/// backward; elsewhere by plain tensor operations: see [`AttentionPath`].
#[derive(Module, Debug)]
pub struct DijiangAttention {
    /// Query projection, D to h·d.
    pub query: Linear,
    /// Key projection, D to h_kv·d.
    pub key: Linear,
    /// Value projection, D to h_kv·d.
    pub value: Linear,
    /// Output projection, h·d to D.
    pub output: Linear,
    /// The feature maps.
    pub maps: FeatureMaps,
    #[module(skip)]
    pub(crate) config: DijiangAttentionConfig,
    #[module(skip)]
    path: AttentionPath,
}

impl DijiangAttentionConfig {
    /// The layer with new weights, on `device`.
    ///
    /// # Errors
    /// [`Error::Dijiang`] for a shape that is impossible: what
    /// [`AttentionConfig::check`](dijiang::layer::AttentionConfig::check) and
    /// [`from_softmax`](dijiang::layer::DijiangAttention::from_softmax) find, and
    /// [`dijiang::Error::NotDivisible`] for `features`.
    pub fn init(&self, device: &Device) -> Result<DijiangAttention> {
        let (config, maps) = self.resolve()?;
        let (heads, kv_heads, dim) = config.heads();
        let linear = |from, to, bias| {
            LinearConfig::new(from, to)
                .with_bias(bias)
                .with_initializer(config.initializer.clone())
                .init(device)
        };
        let query = linear(config.d_model, heads * dim, config.qkv_bias);
        let dtype = query.weight.val().dtype();
        let maps = FeatureMaps::new(&maps, &vec![config.log_decay; kv_heads], (device, dtype))?;
        Ok(DijiangAttention {
            query,
            key: linear(config.d_model, kv_heads * dim, config.qkv_bias),
            value: linear(config.d_model, kv_heads * dim, config.qkv_bias),
            output: linear(heads * dim, config.d_model, config.output_bias),
            maps,
            config,
            path: AttentionPath::default(),
        })
    }

    /// h, h_kv and d of a resolved config.
    pub(crate) fn heads(&self) -> (usize, usize, usize) {
        let kv_heads = self.n_kv_heads.unwrap_or(self.n_heads);
        (self.n_heads, kv_heads, self.head_dim.unwrap_or(self.d_model / self.n_heads))
    }
}

impl DijiangAttention {
    /// A layer of its parts, which fit each other.
    pub(crate) fn assemble(
        config: DijiangAttentionConfig,
        [query, key, value, output]: [Linear; 4],
        maps: FeatureMaps,
    ) -> Self {
        Self { query, key, value, output, maps, config, path: AttentionPath::default() }
    }

    /// The config with every default filled in: its `init` makes a layer that this one's records
    /// can be loaded into.
    pub fn config(&self) -> &DijiangAttentionConfig {
        &self.config
    }

    /// What computes the attention. Default: [`AttentionPath::Automatic`].
    #[must_use]
    pub fn with_path(self, path: AttentionPath) -> Self {
        Self { path, ..self }
    }

    /// Attention of whole sequences.
    ///
    /// # Shapes
    /// - `input`: `[b, n, D]`, with or without a mask `[b, n]`; returns `[b, n, D]`.
    ///
    /// # Conventions
    /// Tensors are of the type of the weights. f16 and bf16 are computed in f32 between the
    /// projections.
    ///
    /// # Cost
    /// O(n). The tensor path keeps about m + (r + 1)·c + d numbers per token and head for
    /// gradients, for several of its operations each (r + 1 chunks of c tokens are the window); the
    /// engine keeps q, k and v.
    ///
    /// # Errors
    /// [`dijiang::Error::Shape`] and [`dijiang::Error::Empty`] for the input,
    /// [`dijiang::Error::NonFinite`] from the engine for elements that are not finite, which the
    /// tensor path hands on as NaN. The engine's gradients are NaN where it cannot work with the
    /// gradient of its output.
    pub fn forward(&self, input: impl Into<DijiangInput>) -> Result<Tensor<3>> {
        let DijiangInput { x, mask_pad } = input.into();
        let valid = self.check(&x, mask_pad)?;
        let out = self.of_heads(self.project(x.clone(), 0)?, valid)?;
        Ok(self.project_output(out, x.dtype()))
    }

    /// Attention alone, of queries, keys and values that the caller has projected and rotated.
    ///
    /// # Shapes
    /// - `q`: `[b, n, h, d]`, `k` and `v`: `[b, n, h_kv, d]`
    /// - `mask_pad`: `[b, n]`, true for padding
    /// - returns `[b, n, h, d]`
    ///
    /// # Conventions
    /// As [`forward`](Self::forward) between its projections: σ is applied here.
    ///
    /// # Cost
    /// That of [`forward`](Self::forward) without O(n·D²) for the projections.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), for each of the arguments.
    ///
    /// # Examples
    /// ```
    /// use burn::tensor::{Device, Distribution, Tensor};
    /// use dijiang_burn::DijiangAttentionConfig;
    ///
    /// let device = Device::default();
    /// let attention = DijiangAttentionConfig::new(32, 4).with_n_kv_heads(Some(2)).init(&device)?;
    /// let random = |heads| Tensor::random([1, 10, heads, 8], Distribution::Default, &device);
    /// let out = attention.attend(random(4), random(2), random(2), None)?;
    /// assert_eq!(out.dims(), [1, 10, 4, 8]);
    /// # Ok::<(), dijiang_burn::Error>(())
    /// ```
    pub fn attend(
        &self,
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        mask_pad: Option<Tensor<2, Bool>>,
    ) -> Result<Tensor<4>> {
        let ([batch, n, ..], (heads, kv_heads, dim)) = (q.dims(), self.config.heads());
        for (argument, x, heads) in [("q", &q, heads), ("k", &k, kv_heads), ("v", &v, kv_heads)] {
            check_shape(argument, [batch, n, heads, dim], x.dims())?;
            self.check_elements(argument, batch * n, x.dtype())?;
        }
        let valid = check_mask(mask_pad, [batch, n])?;
        self.of_heads([q, k, v].map(working), valid)
    }

    /// The empty cache of `batch` new sequences.
    ///
    /// It belongs to this layer's maps as they are now: after they have changed, start a new one.
    ///
    /// # Errors
    /// [`dijiang::Error::Empty`] for a batch of 0, [`dijiang::Error::Conflict`] for a bidirectional
    /// layer, and what the engine finds wrong with the maps.
    pub fn new_cache(&self, batch: usize) -> Result<DijiangCache> {
        if batch == 0 {
            return Err(dijiang::Error::Empty { argument: "batch" }.into());
        }
        if self.config.causality == Causality::Bidirectional {
            let other = "bidirectional attention";
            return Err(dijiang::Error::Conflict { argument: "cache", other }.into());
        }
        let weight = self.query.weight.val();
        // The engine has no gradients through a state.
        let engine = self.engine(&weight.device(), weight.dtype()) && !weight.is_autodiff();
        let states = match weight.dtype() {
            DType::F64 if engine => {
                States::F64(EngineState::new(&self.maps, &self.choices(), batch)?)
            }
            _ if engine => States::F32(EngineState::new(&self.maps, &self.choices(), batch)?),
            _ => States::Tensors(self.new_state(batch)),
        };
        Ok(DijiangCache { states, shape: self.cache_shape(batch), position: 0 })
    }

    /// The next tokens of the cache's sequences, one or many: in any parts it gives what
    /// [`forward`](Self::forward) gives for the whole.
    ///
    /// # Shapes
    /// - as [`forward`](Self::forward), n new tokens; b is the batch of the cache.
    ///
    /// # Cost
    /// Constant per token at any position. With tensor operations on an autodiff device, gradients
    /// flow through the cache, which then keeps the graph of all earlier parts.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), [`dijiang::Error::Foreign`] for a cache of another batch and
    /// [`dijiang::Error::Conflict`] for one of another layer's shape. After an error the cache is
    /// unchanged.
    pub fn forward_cache(
        &self,
        input: impl Into<DijiangInput>,
        cache: &mut DijiangCache,
    ) -> Result<Tensor<3>> {
        let DijiangInput { x, mask_pad } = input.into();
        let valid = self.check(&x, mask_pad)?;
        let [batch, n, _] = x.dims();
        if batch != cache.batch() {
            return Err(dijiang::Error::Foreign {
                argument: "cache",
                what: "batch",
                expected: batch,
                got: cache.batch(),
            }
            .into());
        }
        if cache.shape != self.cache_shape(batch) {
            let other = "the cache of a layer of another shape";
            return Err(dijiang::Error::Conflict { argument: "layer", other }.into());
        }
        let [q, k, v] = self.project(x.clone(), cache.position)?;
        let out = match &mut cache.states {
            States::Tensors(state) => {
                let tokens = self.tokens([q, k, v], valid);
                state.extend(&self.maps, &tokens, segment(&x)).swap_dims(1, 2)
            }
            States::F32(state) => {
                state.extend([q, k, v], valid.map(rows).transpose()?.as_deref())?
            }
            States::F64(state) => {
                state.extend([q, k, v], valid.map(rows).transpose()?.as_deref())?
            }
        };
        cache.position += n;
        Ok(self.project_output(out, x.dtype()))
    }

    /// Which tokens may be attended to.
    fn check(
        &self,
        x: &Tensor<3>,
        mask_pad: Option<Tensor<2, Bool>>,
    ) -> Result<Option<Tensor<2, Bool>>> {
        let [batch, n, width] = x.dims();
        check_shape("x", [batch, n, self.config.d_model], [batch, n, width])?;
        self.check_elements("x", batch * n, x.dtype())?;
        check_mask(mask_pad, [batch, n])
    }

    /// There are tokens, and they are of the type of the weights.
    fn check_elements(&self, argument: &'static str, tokens: usize, dtype: DType) -> Result<()> {
        if tokens == 0 {
            return Err(dijiang::Error::Empty { argument }.into());
        }
        let expected = self.query.weight.val().dtype();
        if dtype != expected {
            return Err(Error::Tensor {
                argument,
                expected: "of the type of the weights",
                got: format!("{dtype:?} instead of {expected:?}"),
            });
        }
        Ok(())
    }

    /// Attention of what [`project`](Self::project) gives, `[b, n, h, d]`.
    fn of_heads(
        &self,
        [q, k, v]: [Tensor<4>; 3],
        valid: Option<Tensor<2, Bool>>,
    ) -> Result<Tensor<4>> {
        if self.engine(&q.device(), self.query.weight.val().dtype()) {
            let valid = valid.map(rows).transpose()?;
            return engine::attend([q, k, v], &self.maps, self.choices(), valid);
        }
        let (batch, segment) = (q.dims()[0], segment(&q));
        let tokens = self.tokens([q, k, v], valid);
        let out = if self.config.causality == Causality::Causal {
            self.new_state(batch).extend(&self.maps, &tokens, segment)
        } else {
            full(&self.maps, tokens)
        };
        Ok(out.swap_dims(1, 2))
    }

    /// Queries `[b, n, h, d]`, keys and values `[b, n, h_kv, d]`, rotated.
    fn project(&self, x: Tensor<3>, position: usize) -> Result<[Tensor<4>; 3]> {
        let [batch, n, _] = x.dims();
        let (heads, kv_heads, dim) = self.config.heads();
        let rotary = self.config.rotary.as_ref();
        let project = |linear: &Linear, heads: usize, rotary: Option<&Rotary>| {
            let rows = working(linear.forward(x.clone())).reshape([batch, n, heads, dim]);
            match rotary {
                Some(rotary) => crate::rotary::rotate(rows, rotary, position),
                None => Ok(rows),
            }
        };
        Ok([
            project(&self.query, heads, rotary)?,
            project(&self.key, kv_heads, rotary)?,
            project(&self.value, kv_heads, None)?,
        ])
    }

    /// `[b, n, h, d]` to `[b, n, D]`.
    fn project_output(&self, out: Tensor<4>, dtype: DType) -> Tensor<3> {
        let [batch, n, heads, dim] = out.dims();
        let out = out.reshape([batch, n, heads * dim]);
        self.output.forward(if out.dtype() == dtype { out } else { out.cast(dtype) })
    }

    /// For the tensor path, heads before tokens and scaled.
    fn tokens(&self, [q, k, v]: [Tensor<4>; 3], valid: Option<Tensor<2, Bool>>) -> Tokens {
        let root = self.choices().scale.sqrt();
        let [q, k, v] = [q * root, k * root, v].map(|x| x.swap_dims(1, 2));
        Tokens { q, k, v, valid }
    }

    fn engine(&self, device: &Device, dtype: DType) -> bool {
        self.path == AttentionPath::Automatic
            && matches!(dtype, DType::F32 | DType::F64)
            && engine::runs_on(device)
    }

    fn choices(&self) -> Choices {
        let (heads, _, dim) = self.config.heads();
        Choices {
            heads,
            causality: self.config.causality,
            scale: self.config.scale.unwrap_or(1.0 / (dim as f64).sqrt()),
            windows: self.config.windows.clone(),
            sinks: self.config.sinks,
        }
    }

    fn new_state(&self, batch: usize) -> State {
        State::new(&self.maps, &self.config.windows, self.config.sinks, batch)
    }

    fn cache_shape(&self, batch: usize) -> CacheShape {
        let (heads, kv_heads, dim) = self.config.heads();
        CacheShape {
            batch,
            heads,
            kv_heads,
            dim,
            features: self.maps.features(),
            windows: self.config.windows.clone(),
            sinks: self.config.sinks,
        }
    }
}

/// Tokens that the tensor path takes at a time: all where a graph is kept, in which every cut would
/// cost as much as the whole.
fn segment<const D: usize>(x: &Tensor<D>) -> usize {
    if x.is_autodiff() { usize::MAX } else { SEGMENT }
}

/// Which keys may be attended to.
fn check_mask(
    mask_pad: Option<Tensor<2, Bool>>,
    sizes: [usize; 2],
) -> Result<Option<Tensor<2, Bool>>> {
    if let Some(mask) = &mask_pad {
        check_shape("mask_pad", sizes, mask.dims())?;
    }
    Ok(mask_pad.map(Tensor::bool_not))
}

/// A mask on the host, sequence by sequence.
fn rows(mask: Tensor<2, Bool>) -> Result<Vec<Vec<bool>>> {
    let [_, n] = mask.dims();
    let mask = mask.try_into_data().map_err(|error| unreadable(&error))?;
    let values: Vec<bool> = mask.iter::<bool>().collect();
    Ok(values.chunks(n).map(<[bool]>::to_vec).collect())
}
