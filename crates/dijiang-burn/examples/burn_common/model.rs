//! A small language model over bytes.

use burn::config::Config;
use burn::module::Module;
use burn::nn::attention::{
    MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask,
};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::{
    Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig,
    PositionalEncoding, PositionalEncodingConfig,
};
use burn::tensor::activation::gelu;
use burn::tensor::{Device, Int, Tensor};
use dijiang_burn::DijiangAttention;

use super::text::{Batch, Loader};

/// Tokens are bytes.
const TOKENS: usize = 256;

/// Bytes that each position knows without attention: its own and those before it.
const BACK: usize = 3;

/// Attention before its exchange or after it.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant, reason = "there are few, and a module holds modules")]
pub(crate) enum Attention {
    Softmax(MultiHeadAttention),
    Linear(DijiangAttention),
}

impl Attention {
    /// Causal attention, `[b, n, D]` to the same.
    fn forward(&self, x: Tensor<3>) -> Result<Tensor<3>, dijiang_burn::Error> {
        match self {
            Self::Softmax(softmax) => {
                let [batch, n, _] = x.dims();
                let mask = generate_autoregressive_mask(batch, n, &x.device());
                Ok(softmax.forward(MhaInput::self_attn(x).mask_attn(mask)).context)
            }
            Self::Linear(linear) => linear.forward(x),
        }
    }
}

/// Attention and two linear layers, each after a norm and added to what goes in.
#[derive(Module, Debug)]
pub(crate) struct Block {
    attention_norm: LayerNorm,
    pub(crate) attention: Attention,
    linear_norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl Block {
    /// What follows attention, given what went into the block and what attention made of it.
    fn rest(&self, x: Tensor<3>, attention: Tensor<3>) -> Tensor<3> {
        let x = x + attention;
        let hidden = gelu(self.up.forward(self.linear_norm.forward(x.clone())));
        x + self.down.forward(hidden)
    }
}

/// The shape of a [`Model`].
#[derive(Config, Debug)]
pub(crate) struct ModelConfig {
    context: usize,
    d_model: usize,
    n_heads: usize,
    n_layers: usize,
}

impl ModelConfig {
    /// The model with new weights and softmax attention.
    pub(crate) fn init(&self, device: &Device) -> Model {
        let d = self.d_model;
        let attention = MultiHeadAttentionConfig::new(d, self.n_heads).with_dropout(0.0);
        let block = |_| Block {
            attention_norm: LayerNormConfig::new(d).init(device),
            attention: Attention::Softmax(attention.init(device)),
            linear_norm: LayerNormConfig::new(d).init(device),
            up: LinearConfig::new(d, 4 * d).init(device),
            down: LinearConfig::new(4 * d, d).init(device),
        };
        Model {
            tokens: (0..BACK).map(|_| EmbeddingConfig::new(TOKENS, d).init(device)).collect(),
            positions: PositionalEncodingConfig::new(d)
                .with_max_sequence_size(self.context)
                .init(device),
            blocks: (0..self.n_layers).map(block).collect(),
            norm: LayerNormConfig::new(d).init(device),
            output: LinearConfig::new(d, TOKENS).init(device),
        }
    }
}

/// A language model over bytes.
#[derive(Module, Debug)]
pub(crate) struct Model {
    /// Of a byte, of the one before it, and so on: with one alone it would take a brief training
    /// all its time to learn to look one byte back.
    tokens: Vec<Embedding>,
    positions: PositionalEncoding,
    pub(crate) blocks: Vec<Block>,
    norm: LayerNorm,
    output: Linear,
}

impl Model {
    /// Logits `[b, n, 256]` of the next byte, and what each block's attention was given.
    pub(crate) fn forward(
        &self,
        inputs: Tensor<2, Int>,
    ) -> Result<(Tensor<3>, Vec<Tensor<3>>), dijiang_burn::Error> {
        let [batch, n] = inputs.dims();
        let mut x = self.tokens[0].forward(inputs.clone());
        for (back, tokens) in self.tokens.iter().enumerate().skip(1) {
            let none = Tensor::zeros([batch, back.min(n)], &inputs.device());
            let earlier = inputs.clone().narrow(1, 0, n - back.min(n));
            x = x + tokens.forward(Tensor::cat(vec![none, earlier], 1));
        }
        let mut x = self.positions.forward(x);
        let mut hidden = Vec::new();
        for block in &self.blocks {
            let input = block.attention_norm.forward(x.clone());
            x = block.rest(x, block.attention.forward(input.clone())?);
            hidden.push(input);
        }
        Ok((self.output.forward(self.norm.forward(x)), hidden))
    }

    /// The loss of a batch, with the logits `[b·n, 256]` and targets `[b·n]` that it is made of.
    pub(crate) fn loss(
        &self,
        batch: Batch,
    ) -> Result<(Tensor<1>, Tensor<2>, Tensor<1, Int>), dijiang_burn::Error> {
        let (logits, _) = self.forward(batch.inputs)?;
        let (logits, targets) = (logits.flatten(0, 1), batch.targets.flatten(0, 1));
        let loss = CrossEntropyLossConfig::new().init(&logits.device());
        Ok((loss.forward(logits.clone(), targets.clone()), logits, targets))
    }

    /// Bits per byte over all of `loader`'s windows.
    pub(crate) fn bits(&self, loader: &Loader) -> super::Result<f64> {
        let (mut sum, mut tokens) = (0.0, 0.0);
        for batch in loader.iter() {
            let batch = batch?;
            let count = batch.inputs.shape().num_elements() as f64;
            sum += self.loss(batch)?.0.try_into_scalar::<f64>()? * count;
            tokens += count;
        }
        Ok(sum / tokens / std::f64::consts::LN_2)
    }
}
