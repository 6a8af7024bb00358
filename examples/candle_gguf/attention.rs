//! What stands between the projections of a layer: candle's softmax attention with its cache, or
//! this crate's linear attention with its state.

use candle_core::{D, Device, Result, Tensor};
use candle_nn::attention::{AttnMask, flash_attn};
use candle_nn::kv_cache::KvCache;
use dijiang::attention::{CausalState, LinearAttention, Operator, Qkv, Workspace};
use dijiang::kernel::DctMap;
use dijiang::layer::{Attention, AttentionConfig, DijiangAttention};
use ndarray::{ArrayView3, ArrayViewMut3, Axis, s};

/// Attention of all heads of a layer, behind rotary embedding and before the output projection.
pub(crate) trait Attend {
    /// What a sequence leaves behind for its next tokens.
    type State;

    fn new_state(&self) -> Self::State;

    /// The next tokens of a sequence.
    ///
    /// # Shapes
    /// - `qk`: `[n, h + h_kv, d]`, queries and then keys; `v`: `[n, h_kv·d]`; returns `[n, h·d]`.
    fn attend(&self, qk: &Tensor, v: &Tensor, state: &mut Self::State) -> Result<Tensor>;

    /// Bytes that a state holds.
    fn bytes(state: &Self::State) -> usize;
}

/// Sizes of attention.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Heads {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// d.
    pub(crate) dim: usize,
}

impl Heads {
    pub(crate) fn of(config: &AttentionConfig) -> Self {
        let dim = config.head_dim.unwrap_or(config.model_dim / config.heads);
        Self { heads: config.heads, kv_heads: config.kv_heads, dim }
    }
}

/// candle's own.
pub(crate) struct Softmax(pub(crate) Heads);

/// Tokens by which the memory of a key-value cache grows.
const GROWTH: usize = 512;

impl Attend for Softmax {
    type State = KvCache;

    fn new_state(&self) -> KvCache {
        KvCache::new(1, GROWTH)
    }

    fn attend(&self, qk: &Tensor, v: &Tensor, state: &mut KvCache) -> Result<Tensor> {
        let Heads { heads, kv_heads, dim } = self.0;
        let n = qk.dim(0)?;
        let q = qk.narrow(1, 0, heads)?.contiguous()?.unsqueeze(0)?;
        let k = qk.narrow(1, heads, kv_heads)?.contiguous()?.unsqueeze(0)?;
        let v = v.contiguous()?.reshape((1, n, kv_heads, dim))?;
        let before = state.current_seq_len();
        let (k, v) = state.append(&k, &v)?;
        let (mask, scale) = (AttnMask::causal_with_offset(before), 1.0 / (dim as f32).sqrt());
        let out = flash_attn::<f32>(&q, &k, &v, scale, mask, None, None)?;
        out.transpose(1, 2)?.reshape((n, heads * dim))
    }

    fn bytes(state: &KvCache) -> usize {
        let held = [state.k_cache(), state.v_cache()].map(|cache| cache.all_data().as_ref());
        held.into_iter().flatten().map(|x| x.elem_count() * x.dtype().size_in_bytes()).sum()
    }
}

/// This crate's.
pub(crate) struct Linear {
    pub(crate) attention: LinearAttention<f32, DctMap<f32>>,
    heads: Heads,
}

/// A state with the memory of a step.
pub(crate) struct LinearState {
    pub(crate) state: CausalState<f32>,
    workspace: Workspace<f32>,
}

impl Linear {
    /// The attention of `layer`, without its projections.
    pub(crate) fn of(layer: &DijiangAttention<f32>) -> Self {
        Self { attention: layer.operator().clone(), heads: Heads::of(layer.config()) }
    }

    /// A state that was put aside.
    pub(crate) fn resume(&self, state: CausalState<f32>) -> LinearState {
        LinearState { state, workspace: self.attention.step_workspace() }
    }
}

impl Attend for Linear {
    type State = LinearState;

    fn new_state(&self) -> LinearState {
        self.resume(self.attention.new_state())
    }

    fn attend(&self, qk: &Tensor, v: &Tensor, state: &mut LinearState) -> Result<Tensor> {
        let Heads { heads, kv_heads, dim } = self.heads;
        let n = qk.dim(0)?;
        let (qk, v) = (qk.flatten_all()?.to_vec1::<f32>()?, v.flatten_all()?.to_vec1::<f32>()?);
        let mut out = vec![0.0; n * heads * dim];
        // Heads first, without moving anything.
        let view = |x, heads| -> Result<_> {
            let view = ArrayView3::<f32>::from_shape((n, heads, dim), x);
            Ok(view.map_err(candle_core::Error::wrap)?.permuted_axes([1, 0, 2]))
        };
        let (qk, v) = (view(&qk, heads + kv_heads)?, view(&v, kv_heads)?);
        let (q, k) = (qk.slice(s![..heads, .., ..]), qk.slice(s![heads.., .., ..]));
        let rows = ArrayViewMut3::from_shape((n, heads, dim), &mut out);
        let mut rows = rows.map_err(candle_core::Error::wrap)?.permuted_axes([1, 0, 2]);
        if n == 1 {
            let [q, k, v] = [q, k, v].map(|x| x.index_axis_move(Axis(1), 0));
            let (token, out) = (Qkv::token(&q, &k, &v), &mut rows.index_axis_mut(Axis(1), 0));
            self.attention.step(&mut state.state, token, out, &mut state.workspace)?;
        } else {
            let (tokens, workspace) = (Qkv::new(&q, &k, &v), &mut self.attention.workspace());
            self.attention.prefill_into(&mut [&mut state.state], tokens, &mut rows, workspace)?;
        }
        Tensor::from_vec(out, (n, heads * dim), &Device::Cpu)
    }

    fn bytes(state: &LinearState) -> usize {
        state.state.bytes()
    }
}

/// Rotary embedding of queries and keys together: `[n, (h + h_kv)·d]` to `[n, h + h_kv, d]`.
pub(crate) fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (n, width) = x.dims2()?;
    let dim = 2 * cos.dim(D::Minus1)?;
    let x = x.contiguous()?.reshape((1, n, width / dim, dim))?;
    candle_nn::rotary_emb::rope_thd(&x, cos, sin)?.squeeze(0)
}
