//! [`Body`]: what all models made from one have in common.

use dijiang::checkpoint::Tensors;
use ndarray::{Array2, ArrayRef2, ArrayView2, Axis};
use rayon::prelude::*;

use super::block::{Block, Norm};
use super::config::LlamaConfig;
use super::error::{Error, Result};
use super::head;
use super::tokens::{Token, Tokenizer};

/// A model without its attention layers: token embedding, blocks of attention and SwiGLU with RMS
/// norms before each, final norm and output projection.
pub(crate) struct Body {
    config: LlamaConfig,
    tokenizer: Tokenizer,
    /// `[vocabulary, D]`.
    embedding: Array2<f32>,
    blocks: Vec<Block>,
    norm: Norm,
    /// `[vocabulary, D]`; the embedding if absent.
    head: Option<Array2<f32>>,
}

impl Body {
    /// Reads everything but the attention layers.
    pub(crate) fn load(files: &Tensors, config: LlamaConfig, tokenizer: Tokenizer) -> Result<Self> {
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        // A model saved without its output projection has names without the prefix.
        let place = if files.contains("embed_tokens.weight") { "" } else { "model." };
        let blocks = (0..config.layers).into_par_iter();
        Ok(Self {
            embedding: files.matrix(&format!("{place}embed_tokens.weight"), vocabulary, hidden)?,
            blocks: blocks.map(|l| Block::load(files, &config, place, l)).collect::<Result<_>>()?,
            norm: Norm::load(files, &format!("{place}norm.weight"), &config)?,
            head: match config.tied_embeddings {
                true => None,
                false => Some(files.matrix("lm_head.weight", vocabulary, hidden)?),
            },
            config,
            tokenizer,
        })
    }

    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.config
    }

    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    pub(crate) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// Hidden states `[n, D]` that enter the first block.
    pub(crate) fn embed(&self, tokens: &[Token]) -> Array2<f32> {
        let rows: Vec<usize> = tokens.iter().map(|&token| token as usize).collect();
        self.embedding.select(Axis(0), &rows)
    }

    /// What the attention layer of block `l` is given when `x` enters that block.
    pub(crate) fn attention_input(&self, l: usize, x: &ArrayRef2<f32>) -> Array2<f32> {
        self.blocks[l].attention_input(x)
    }

    /// Takes hidden states through block `l`; `attend` makes attention's output from its input.
    pub(crate) fn block(
        &self,
        l: usize,
        x: &mut Array2<f32>,
        attend: impl FnOnce(&Array2<f32>) -> dijiang::Result<Array2<f32>>,
    ) -> Result<()> {
        *x += &attend(&self.attention_input(l, x)).map_err(Error::in_layer(l))?;
        self.blocks[l].mlp(x);
        Ok(())
    }

    /// Logits `[n, vocabulary]` from hidden states `[n, D]` behind the last block.
    pub(crate) fn logits(&self, x: &ArrayRef2<f32>) -> Array2<f32> {
        head::logits(&self.norm.forward(x), self.head())
    }

    /// −ln of the likelihood of `targets` after the hidden states `x` behind the last block.
    pub(crate) fn surprises(&self, x: &ArrayRef2<f32>, targets: &[Token]) -> Vec<f64> {
        head::surprises(&self.norm.forward(x), self.head(), targets)
    }

    fn head(&self) -> ArrayView2<'_, f32> {
        self.head.as_ref().unwrap_or(&self.embedding).view()
    }
}
