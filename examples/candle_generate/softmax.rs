//! Softmax attention in candle, with a key-value cache: what is exchanged.

use candle_core::{D, Device, Module, Tensor};
use candle_nn::Linear;
use candle_nn::ops::softmax_last_dim;
use candle_nn::rotary_emb::rope;
use dijiang::layer::{AttentionConfig, AttentionWeights, Rotary, SoftmaxAttention};
use ndarray::Array2;

use crate::common::llama::{Result, SelfAttention};

/// A softmax attention layer with rotary embedding of whole heads, without biases.
pub(crate) struct Softmax {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    scale: f64,
    /// `[context, d/2]`.
    cos: Tensor,
    sin: Tensor,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
}

impl Softmax {
    /// The layer of these weights, for sequences of up to `context` tokens.
    pub(crate) fn new(
        config: &AttentionConfig,
        weights: AttentionWeights<f32>,
        context: usize,
    ) -> Result<Self> {
        // It fills in head dimension and scale, and checks.
        let layer = SoftmaxAttention::new(config.clone(), weights)?;
        let (config, weights) = (dijiang::layer::Attention::config(&layer), layer.weights());
        let head_dim = config.head_dim.unwrap_or(config.model_dim / config.heads);
        let base =
            match &config.rotary {
                Some(rotary) if *rotary == Rotary::new(rotary.base) => rotary.base,
                other => return Err(format!(
                    "only plain rotary embedding of whole heads can be compared here, not {other:?}"
                )
                .into()),
            };
        let angle = |i: usize| {
            (i / (head_dim / 2)) as f64
                * base.powf(-2.0 * (i % (head_dim / 2)) as f64 / head_dim as f64)
        };
        let table = |turn: fn(f64) -> f64| {
            let values: Vec<f32> =
                (0..context * head_dim / 2).map(|i| turn(angle(i)) as f32).collect();
            Tensor::from_vec(values, (context, head_dim / 2), &Device::Cpu)
        };
        let linear = |weight: &Array2<f32>| {
            let values = weight.iter().copied().collect();
            Ok::<_, candle_core::Error>(Linear::new(
                Tensor::from_vec(values, weight.dim(), &Device::Cpu)?,
                None,
            ))
        };
        Ok(Self {
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim,
            scale: config.scale.unwrap_or(1.0 / (head_dim as f64).sqrt()),
            cos: table(f64::cos)?,
            sin: table(f64::sin)?,
            q_proj: linear(&weights.q)?,
            k_proj: linear(&weights.k)?,
            v_proj: linear(&weights.v)?,
            o_proj: linear(&weights.o)?,
        })
    }

    /// `[b, h_kv, n, d]` to `[b, h, n, d]`, each repeated for its group.
    fn for_all_heads(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (b, kv_heads, n, d) = x.dims4()?;
        x.unsqueeze(2)?
            .expand((b, kv_heads, self.heads / kv_heads, n, d))?
            .reshape((b, self.heads, n, d))
    }
}

/// Keys and values so far, `[b, h_kv, n, d]`.
pub(crate) type KvCache = Option<(Tensor, Tensor)>;

impl SelfAttention for Softmax {
    type Cache = KvCache;

    fn new_cache(&self, _batch: usize) -> candle_core::Result<KvCache> {
        Ok(None)
    }

    fn forward(
        &self,
        x: &Tensor,
        position: usize,
        cache: Option<&mut KvCache>,
    ) -> candle_core::Result<Tensor> {
        let (b, n, _) = x.dims3()?;
        let heads = |linear: &Linear, heads: usize| {
            linear.forward(x)?.reshape((b, n, heads, self.head_dim))?.transpose(1, 2)?.contiguous()
        };
        let (cos, sin) = (self.cos.narrow(0, position, n)?, self.sin.narrow(0, position, n)?);
        let q = rope(&heads(&self.q_proj, self.heads)?, &cos, &sin)?;
        let mut k = rope(&heads(&self.k_proj, self.kv_heads)?, &cos, &sin)?;
        let mut v = heads(&self.v_proj, self.kv_heads)?;
        if let Some(cache) = cache {
            if let Some((keys, values)) = cache.as_ref() {
                (k, v) = (Tensor::cat(&[keys, &k], 2)?, Tensor::cat(&[values, &v], 2)?);
            }
            *cache = Some((k.clone(), v.clone()));
        }
        let scores = (q.matmul(&self.for_all_heads(&k)?.t()?)? * self.scale)?;
        let (keys, earlier) = (k.dim(2)?, k.dim(2)? - n);
        let mask: Vec<f32> = (0..n * keys)
            .map(|i| if i % keys > earlier + i / keys { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let weights = softmax_last_dim(&scores.broadcast_add(&Tensor::from_vec(
            mask,
            (n, keys),
            &Device::Cpu,
        )?)?)?;
        let out = weights.matmul(&self.for_all_heads(&v)?)?;
        self.o_proj.forward(&out.transpose(1, 2)?.flatten_from(D::Minus2)?)
    }

    fn cache_bytes(cache: &KvCache) -> usize {
        cache.as_ref().map_or(0, |(k, v)| (k.elem_count() + v.elem_count()) * size_of::<f32>())
    }
}
