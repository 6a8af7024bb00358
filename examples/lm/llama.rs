//! A LLaMA model whose attention layers are a type parameter: exchanging them is `exchange`,
//! nothing else changes.

use std::path::Path;
use std::sync::Arc;

use dijiang::attention::KeyMask;
use dijiang::checkpoint::{Checkpoint, Family};
use dijiang::layer::{Attention, SoftmaxAttention};
use ndarray::{Array2, ArrayView2};
use rayon::prelude::*;

use super::body::Body;
use super::config::LlamaConfig;
use super::error::{Error, Result};
use super::stream::Stream;
use super::tokens::{Token, Tokenizer};
use super::walk::Walk;

/// A [`Body`] with an attention layer in each block.
///
/// The weights other than attention's are shared between a model and those made from it.
pub(crate) struct Llama<A> {
    body: Arc<Body>,
    attention: Vec<A>,
}

/// Whose hidden states the layers of a new model are fitted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forcing {
    /// Those of the model whose layers are exchanged.
    Teacher,
    /// Those of the new model: its earlier layers are the exchanged ones.
    Student,
}

impl Llama<SoftmaxAttention<f32>> {
    /// Reads `config.json`, `tokenizer.json` and the weight files in `directory`. Without a
    /// tokenizer the vocabulary must be the 256 bytes.
    ///
    /// # Cost
    /// The memory of the weights in f32, once.
    pub(crate) fn load(directory: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(directory)?;
        if checkpoint.family() != Family::Llama {
            return Err(Error::Family {
                path: directory.to_path_buf(),
                found: checkpoint.family(),
            });
        }
        let config =
            LlamaConfig::read(directory, checkpoint.layers(), &checkpoint.attention_config(0)?)?;
        let tokenizer = Tokenizer::read(directory, config.vocabulary)?;
        let attention = (0..config.layers).into_par_iter();
        let attention = attention
            .map(|l| checkpoint.softmax_attention(l).map_err(Error::in_layer(l)))
            .collect::<Result<_>>()?;
        let body = Body::load(checkpoint.tensors(), config, tokenizer)?;
        Ok(Self { body: Arc::new(body), attention })
    }
}

impl<A: Attention<f32>> Llama<A> {
    pub(crate) fn config(&self) -> &LlamaConfig {
        self.body.config()
    }

    /// All but the attention layers, for a program that runs those in its own way.
    pub(crate) fn body(&self) -> &Body {
        &self.body
    }

    /// How its text becomes tokens.
    pub(crate) fn tokenizer(&self) -> &Tokenizer {
        self.body.tokenizer()
    }

    /// The attention layers, first block first.
    pub(crate) fn attention(&self) -> &[A] {
        &self.attention
    }

    /// As [`attention`](Self::attention).
    pub(crate) fn attention_mut(&mut self) -> &mut [A] {
        &mut self.attention
    }

    /// The same model with other attention layers, each made from the one it takes the place of.
    pub(crate) fn exchange<B>(
        &self,
        convert: impl Fn(&A) -> dijiang::Result<B>,
    ) -> Result<Llama<B>> {
        let layers = self.attention.iter().enumerate();
        let attention = layers
            .map(|(l, layer)| convert(layer).map_err(Error::in_layer(l)))
            .collect::<Result<_>>()?;
        Ok(Llama { body: Arc::clone(&self.body), attention })
    }

    /// The same model with other attention layers, first block first, each made from the one it
    /// takes the place of and from what that layer is given for each of `windows`: `[n, D]`, after
    /// the block's norm.
    ///
    /// # Cost
    /// As [`walk`](Self::walk).
    pub(crate) fn exchange_on<B: Attention<f32>>(
        &self,
        windows: &[&[Token]],
        forcing: Forcing,
        mut convert: impl FnMut(usize, &A, &[ArrayView2<'_, f32>]) -> Result<B>,
    ) -> Result<Llama<B>> {
        let mut walk = self.walk(windows);
        let mut attention = Vec::with_capacity(self.attention.len());
        while let Some(l) = walk.layer() {
            let inputs = walk.inputs();
            let views: Vec<_> = inputs.iter().map(|input| input.view()).collect();
            let layer = convert(l, &self.attention[l], &views)?;
            match forcing {
                Forcing::Teacher => walk.advance(&self.attention[l])?,
                Forcing::Student => walk.advance(&layer)?,
            }
            attention.push(layer);
        }
        Ok(Llama { body: Arc::clone(&self.body), attention })
    }

    /// Goes through the blocks one by one with the hidden states of `windows`, with these attention
    /// layers or others.
    ///
    /// # Cost
    /// Memory for the hidden states of one block at a time, beside what [`Walk::inputs`] returns.
    pub(crate) fn walk(&self, windows: &[&[Token]]) -> Walk<'_> {
        Walk::new(&self.body, windows)
    }

    /// Calls `visit` for every layer with its index and with what it is given for each of
    /// `windows`; the hidden states are this model's own.
    ///
    /// # Cost
    /// As [`walk`](Self::walk).
    pub(crate) fn each_attention_input(
        &self,
        windows: &[&[Token]],
        mut visit: impl FnMut(usize, &[ArrayView2<'_, f32>]) -> Result<()>,
    ) -> Result<()> {
        let mut walk = self.walk(windows);
        while let Some(l) = walk.layer() {
            let inputs = walk.inputs();
            visit(l, &inputs.iter().map(|input| input.view()).collect::<Vec<_>>())?;
            drop(inputs);
            walk.advance(&self.attention[l])?;
        }
        Ok(())
    }

    /// What the attention layer of block `l` is given for each of `windows`.
    pub(crate) fn attention_inputs(
        &self,
        l: usize,
        windows: &[&[Token]],
    ) -> Result<Vec<Array2<f32>>> {
        let mut walk = self.walk(windows);
        for layer in &self.attention[..l] {
            walk.advance(layer)?;
        }
        Ok(walk.inputs())
    }

    /// Logits of every position of a sequence: large, where the vocabulary is.
    ///
    /// # Shapes
    /// - `tokens`: n, returns `[n, vocabulary]`.
    pub(crate) fn forward(&self, tokens: &[Token]) -> Result<Array2<f32>> {
        Ok(self.body.logits(&self.hidden(tokens)?))
    }

    /// −ln of the likelihood of `targets`, each after the token at the same place of `tokens` and
    /// those before it.
    ///
    /// # Cost
    /// As [`forward`](Self::forward) in time, without its memory.
    pub(crate) fn surprises(&self, tokens: &[Token], targets: &[Token]) -> Result<Vec<f64>> {
        Ok(self.body.surprises(&self.hidden(tokens)?, targets))
    }

    /// Hidden states `[n, D]` behind the last block.
    fn hidden(&self, tokens: &[Token]) -> Result<Array2<f32>> {
        let mut x = self.body.embed(tokens);
        for (l, layer) in self.attention.iter().enumerate() {
            self.body.block(l, &mut x, |h| layer.forward(h, KeyMask::All))?;
        }
        Ok(x)
    }

    /// A stream that has seen no token yet.
    pub(crate) fn stream(&self) -> Stream<'_, A> {
        Stream::new(&self.body, &self.attention)
    }
}
