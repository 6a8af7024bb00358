//! A LLaMA model in candle whose attention layers are a type parameter.

use std::error::Error;
use std::path::Path;

use candle_core::{Device, Module, Tensor};
use candle_nn::Linear;
use candle_nn::ops::rms_norm_slow;
use dijiang::candle::CandleAttention;
use dijiang::checkpoint::Checkpoint;
use dijiang::layer::AttentionWeights;

use crate::lm::config::LlamaConfig;
use crate::lm::tokens::Token;

/// `std::result::Result` with whatever went wrong.
pub(crate) type Result<T, E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

/// An attention layer of a candle model.
pub(crate) trait SelfAttention {
    /// What a batch of sequences leaves behind for its next tokens.
    type Cache;

    fn new_cache(&self, batch: usize) -> candle_core::Result<Self::Cache>;

    /// Hidden states `[b, n, D]` to hidden states; the first token is at `position`. Without a
    /// cache the tokens are whole sequences.
    fn forward(
        &self,
        x: &Tensor,
        position: usize,
        cache: Option<&mut Self::Cache>,
    ) -> candle_core::Result<Tensor>;

    fn cache_bytes(cache: &Self::Cache) -> usize;
}

impl SelfAttention for CandleAttention {
    type Cache = dijiang::candle::CandleState;

    fn new_cache(&self, batch: usize) -> candle_core::Result<Self::Cache> {
        self.new_state(batch)
    }

    fn forward(
        &self,
        x: &Tensor,
        position: usize,
        cache: Option<&mut Self::Cache>,
    ) -> candle_core::Result<Tensor> {
        self.forward(x, position, cache)
    }

    fn cache_bytes(cache: &Self::Cache) -> usize {
        cache.bytes()
    }
}

/// Token embedding, blocks of attention and SwiGLU with RMS norms before each, final norm and
/// output projection.
pub(crate) struct Llama<A> {
    config: LlamaConfig,
    /// `[vocabulary, D]`.
    embedding: Tensor,
    blocks: Vec<Block<A>>,
    norm: Tensor,
    /// `[vocabulary, D]`; the embedding if absent.
    head: Option<Tensor>,
}

struct Block<A> {
    attention_norm: Tensor,
    attention: A,
    mlp_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// One sequence being read or written token by token.
pub(crate) struct Stream<'a, A: SelfAttention> {
    model: &'a Llama<A>,
    caches: Vec<A::Cache>,
    position: usize,
}

impl<A: SelfAttention> Llama<A> {
    /// Reads the model in `directory`, of this `config`; `attention` makes the layer of a given
    /// index from its weights.
    pub(crate) fn load(
        directory: &Path,
        config: LlamaConfig,
        attention: impl Fn(usize, AttentionWeights<f32>) -> Result<A>,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(directory)?;
        let files = checkpoint.tensors();
        let vector =
            |name: &str, len: usize| tensor(files.vector::<f32>(name, len)?.to_vec(), &[len]);
        let matrix = |name: &str, rows: usize, columns: usize| {
            tensor(files.numbers::<f32>(name, &[rows, columns])?, &[rows, columns])
        };
        let (hidden, inner, vocabulary) = (config.hidden, config.intermediate, config.vocabulary);
        let block = |l: usize| {
            let name = |what: &str| format!("model.layers.{l}.{what}");
            let linear = |which: &str, rows: usize, columns: usize| -> Result<Linear> {
                let bias = config
                    .mlp_bias
                    .then(|| vector(&name(&format!("mlp.{which}_proj.bias")), rows))
                    .transpose()?;
                Ok(Linear::new(
                    matrix(&name(&format!("mlp.{which}_proj.weight")), rows, columns)?,
                    bias,
                ))
            };
            Ok(Block {
                attention_norm: vector(&name("input_layernorm.weight"), hidden)?,
                attention: attention(l, checkpoint.attention_weights(l)?)?,
                mlp_norm: vector(&name("post_attention_layernorm.weight"), hidden)?,
                gate: linear("gate", inner, hidden)?,
                up: linear("up", inner, hidden)?,
                down: linear("down", hidden, inner)?,
            })
        };
        Ok(Self {
            embedding: matrix("model.embed_tokens.weight", vocabulary, hidden)?,
            blocks: (0..config.layers).map(block).collect::<Result<_>>()?,
            norm: vector("model.norm.weight", hidden)?,
            head: (!config.tied_embeddings)
                .then(|| matrix("lm_head.weight", vocabulary, hidden))
                .transpose()?,
            config,
        })
    }

    /// Logits of every position.
    ///
    /// # Shapes
    /// - `tokens`: `[b, n]` of type U32, returns `[b, n, vocabulary]`.
    pub(crate) fn forward(&self, tokens: &Tensor) -> candle_core::Result<Tensor> {
        self.run(tokens, 0, self.blocks.iter().map(|_| None))
    }

    fn run<'a>(
        &self,
        tokens: &Tensor,
        position: usize,
        caches: impl Iterator<Item = Option<&'a mut A::Cache>>,
    ) -> candle_core::Result<Tensor>
    where
        A::Cache: 'a,
    {
        let (b, n) = tokens.dims2()?;
        let epsilon = self.config.norm_epsilon;
        let mut x = self.embedding.index_select(&tokens.flatten_all()?, 0)?.reshape((
            b,
            n,
            self.config.hidden,
        ))?;
        for (block, cache) in self.blocks.iter().zip(caches) {
            let h = rms_norm_slow(&x, &block.attention_norm, epsilon)?;
            x = (x + block.attention.forward(&h, position, cache)?)?;
            let h = rms_norm_slow(&x, &block.mlp_norm, epsilon)?;
            let inner = (block.gate.forward(&h)?.silu()? * block.up.forward(&h)?)?;
            x = (x + block.down.forward(&inner)?)?;
        }
        let head = Linear::new(self.head.as_ref().unwrap_or(&self.embedding).clone(), None);
        head.forward(&rms_norm_slow(&x, &self.norm, epsilon)?)
    }

    /// A stream that has seen no token yet.
    pub(crate) fn stream(&self) -> Result<Stream<'_, A>> {
        let caches = self
            .blocks
            .iter()
            .map(|block| block.attention.new_cache(1))
            .collect::<candle_core::Result<_>>()?;
        Ok(Stream { model: self, caches, position: 0 })
    }
}

impl Llama<CandleAttention> {
    /// The same model with every tensor replaced by what `replace` makes of it and its name in
    /// files.
    pub(crate) fn try_map(
        &self,
        mut replace: impl FnMut(&str, &Tensor) -> candle_core::Result<Tensor>,
    ) -> candle_core::Result<Self> {
        let embedding = replace("model.embed_tokens.weight", &self.embedding)?;
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for (l, block) in self.blocks.iter().enumerate() {
            let mut inside =
                |name: &str, tensor: &Tensor| replace(&format!("model.layers.{l}.{name}"), tensor);
            let attention = block
                .attention
                .try_map(|name, tensor| inside(&format!("self_attn.{name}"), tensor))?;
            let mut linear = |which: &str, linear: &Linear| {
                let weight = inside(&format!("mlp.{which}_proj.weight"), linear.weight())?;
                let bias = linear
                    .bias()
                    .map(|bias| inside(&format!("mlp.{which}_proj.bias"), bias))
                    .transpose()?;
                Ok::<_, candle_core::Error>(Linear::new(weight, bias))
            };
            let (gate, up, down) = (
                linear("gate", &block.gate)?,
                linear("up", &block.up)?,
                linear("down", &block.down)?,
            );
            let attention_norm = inside("input_layernorm.weight", &block.attention_norm)?;
            let mlp_norm = inside("post_attention_layernorm.weight", &block.mlp_norm)?;
            blocks.push(Block { attention_norm, attention, mlp_norm, gate, up, down });
        }
        let norm = replace("model.norm.weight", &self.norm)?;
        let head = self.head.as_ref().map(|head| replace("lm_head.weight", head)).transpose()?;
        Ok(Self { config: self.config.clone(), embedding, blocks, norm, head })
    }
}

impl<A: SelfAttention> Stream<'_, A> {
    /// Reads the next tokens; returns the logits `[vocabulary]` after the last.
    pub(crate) fn read(&mut self, tokens: &[Token]) -> Result<Vec<f32>> {
        let logits =
            self.model.run(&batch(&[tokens])?, self.position, self.caches.iter_mut().map(Some))?;
        self.position += tokens.len();
        Ok(logits.get(0)?.get(tokens.len() - 1)?.to_vec1()?)
    }

    /// Bytes of all layers' caches.
    pub(crate) fn bytes(&self) -> usize {
        self.caches.iter().map(A::cache_bytes).sum()
    }
}

/// Sequences of one length as tokens `[b, n]`.
pub(crate) fn batch(sequences: &[&[Token]]) -> candle_core::Result<Tensor> {
    let shape = (sequences.len(), sequences.first().map_or(0, |sequence| sequence.len()));
    Tensor::from_vec(sequences.concat(), shape, &Device::Cpu)
}

fn tensor(values: Vec<f32>, shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A checkpoint's tensors in place of those of the same names.
pub(crate) fn with_tensors(
    model: &Llama<CandleAttention>,
    tensors: &std::collections::HashMap<String, Tensor>,
) -> candle_core::Result<Llama<CandleAttention>> {
    model.try_map(|name, tensor| match tensors.get(name) {
        Some(found) if found.shape() == tensor.shape() => found.to_dtype(tensor.dtype()),
        Some(found) => {
            candle_core::bail!("{name} must be {:?}, found {:?}", tensor.shape(), found.shape())
        }
        None => candle_core::bail!("no tensor {name}"),
    })
}

/// The model's weights as they are, which need no gradients.
pub(crate) fn detached(
    model: &Llama<CandleAttention>,
) -> candle_core::Result<Llama<CandleAttention>> {
    model.try_map(|_, tensor| Ok(tensor.detach()))
}
