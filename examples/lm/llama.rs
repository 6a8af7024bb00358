//! A LLaMA model whose attention layers are a type parameter: exchanging them is `exchange`,
//! nothing else changes.

use std::path::Path;
use std::sync::Arc;

use dijiang::attention::KeyMask;
use dijiang::checkpoint::{Checkpoint, Family, Tensors};
use dijiang::layer::{Attention, SoftmaxAttention};
use ndarray::{Array1, Array2, ArrayView1, ArrayView2, Axis, Zip};
use rayon::prelude::*;

use super::config::LlamaConfig;
use super::error::{Error, Result};
use super::product::linear;

/// Token embedding, blocks of attention and SwiGLU with RMS norms before each, final norm and
/// output projection.
///
/// The weights other than attention's are shared between a model and those made from it.
pub(crate) struct Llama<A> {
    body: Arc<Body>,
    attention: Vec<A>,
}

struct Body {
    config: LlamaConfig,
    /// `[vocabulary, D]`.
    embedding: Array2<f32>,
    blocks: Vec<Block>,
    norm: Array1<f32>,
    /// `[vocabulary, D]`; the embedding if absent.
    head: Option<Array2<f32>>,
}

/// What a block holds beside its attention layer.
struct Block {
    attention_norm: Array1<f32>,
    mlp_norm: Array1<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
}

impl Llama<SoftmaxAttention<f32>> {
    /// Reads `config.json` and the weight files in `directory`. Token = byte, so the vocabulary
    /// must be 256.
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
        if config.vocabulary != 256 {
            return Err(Error::Vocabulary { found: config.vocabulary });
        }
        let (vocabulary, hidden) = (config.vocabulary, config.hidden);
        let layers = 0..config.layers;
        let attention = layers
            .clone()
            .map(|l| checkpoint.softmax_attention(l).map_err(Error::in_layer(l)))
            .collect::<Result<_>>()?;
        let files = checkpoint.tensors();
        let body = Body {
            embedding: files.matrix("model.embed_tokens.weight", vocabulary, hidden)?,
            blocks: layers.map(|l| Block::load(files, &config, l)).collect::<Result<_>>()?,
            norm: files.vector("model.norm.weight", hidden)?,
            head: match config.tied_embeddings {
                true => None,
                false => Some(files.matrix("lm_head.weight", vocabulary, hidden)?),
            },
            config,
        };
        Ok(Self { body: Arc::new(body), attention })
    }
}

impl<A: Attention<f32>> Llama<A> {
    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.body.config
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

    /// Logits of every position of a sequence.
    ///
    /// # Shapes
    /// - `tokens`: n bytes, returns `[n, vocabulary]`.
    pub(crate) fn forward(&self, tokens: &[u8]) -> Result<Array2<f32>> {
        let mut x = self.embed(tokens);
        for l in 0..self.attention.len() {
            self.block(l, &mut x)?;
        }
        Ok(self.logits(&x))
    }

    /// Hidden states `[n, D]` that enter the first block.
    pub(crate) fn embed(&self, tokens: &[u8]) -> Array2<f32> {
        let rows: Vec<usize> = tokens.iter().map(|&token| usize::from(token)).collect();
        self.body.embedding.select(Axis(0), &rows)
    }

    /// What the attention layer of block `l` is given when `x` enters that block.
    pub(crate) fn attention_input(&self, l: usize, x: &Array2<f32>) -> Array2<f32> {
        rms_norm(x, &self.body.blocks[l].attention_norm, self.body.config.norm_epsilon)
    }

    /// What the attention layer of block `l` is given for each of `samples`.
    pub(crate) fn attention_inputs(&self, l: usize, samples: &[&[u8]]) -> Result<Vec<Array2<f32>>> {
        let input = |sample: &&[u8]| {
            let mut x = self.embed(sample);
            (0..l).try_for_each(|before| self.block(before, &mut x))?;
            Ok(self.attention_input(l, &x))
        };
        samples.par_iter().map(input).collect()
    }

    /// Calls `visit` for every layer with its index and with what it is given for each of
    /// `samples`.
    ///
    /// Goes block by block, so that the hidden states of one block are all it has to hold.
    pub(crate) fn each_attention_input(
        &self,
        samples: &[&[u8]],
        mut visit: impl FnMut(usize, &[ArrayView2<'_, f32>]) -> Result<()>,
    ) -> Result<()> {
        let mut hidden: Vec<Array2<f32>> =
            samples.iter().map(|sample| self.embed(sample)).collect();
        for l in 0..self.attention.len() {
            let inputs: Vec<Array2<f32>> =
                hidden.par_iter().map(|x| self.attention_input(l, x)).collect();
            let views: Vec<ArrayView2<'_, f32>> = inputs.iter().map(|input| input.view()).collect();
            visit(l, &views)?;
            hidden.par_iter_mut().try_for_each(|x| self.block(l, x))?;
        }
        Ok(())
    }

    /// Takes the hidden states of whole sequences through block `l`.
    pub(crate) fn block(&self, l: usize, x: &mut Array2<f32>) -> Result<()> {
        self.block_with(l, x, |layer, h| layer.forward(h, KeyMask::All))
    }

    fn block_with(
        &self,
        l: usize,
        x: &mut Array2<f32>,
        attend: impl FnOnce(&A, &Array2<f32>) -> dijiang::Result<Array2<f32>>,
    ) -> Result<()> {
        let h = self.attention_input(l, x);
        *x += &attend(&self.attention[l], &h).map_err(Error::in_layer(l))?;
        let block = &self.body.blocks[l];
        let h = rms_norm(x, &block.mlp_norm, self.body.config.norm_epsilon);
        let mut inner = block.gate.forward(&h);
        Zip::from(&mut inner)
            .and(&block.up.forward(&h))
            .for_each(|gate, &up| *gate *= up / (1.0 + (-*gate).exp()));
        *x += &block.down.forward(&inner);
        Ok(())
    }

    fn logits(&self, x: &Array2<f32>) -> Array2<f32> {
        let body = &self.body;
        linear(
            rms_norm(x, &body.norm, body.config.norm_epsilon).view(),
            body.head.as_ref().unwrap_or(&body.embedding).view(),
        )
    }

    /// A stream that has seen no token yet.
    pub(crate) fn stream(&self) -> Stream<'_, A> {
        Stream { model: self, states: self.attention.iter().map(Attention::new_state).collect() }
    }
}

/// One sequence being read or written token by token.
pub(crate) struct Stream<'a, A: Attention<f32>> {
    model: &'a Llama<A>,
    states: Vec<A::State>,
}

impl<A: Attention<f32>> Stream<'_, A> {
    /// One state per layer.
    pub(crate) fn states(&self) -> &[A::State] {
        &self.states
    }

    /// Reads many tokens at once; returns the logits `[n, vocabulary]` after each.
    pub(crate) fn prefill(&mut self, tokens: &[u8]) -> Result<Array2<f32>> {
        let mut x = self.model.embed(tokens);
        for (l, state) in self.states.iter_mut().enumerate() {
            self.model.block_with(l, &mut x, |layer, h| layer.prefill(state, h, KeyMask::All))?;
        }
        Ok(self.model.logits(&x))
    }

    /// Reads one token; returns the logits `[vocabulary]` after it.
    pub(crate) fn step(&mut self, token: u8) -> Result<Array1<f32>> {
        let mut x = self.model.embed(&[token]);
        for (l, state) in self.states.iter_mut().enumerate() {
            self.model.block_with(l, &mut x, |layer, h| {
                let mut out = Array2::zeros(h.dim());
                layer.step(state, &h.row(0), &mut out.row_mut(0))?;
                Ok(out)
            })?;
        }
        Ok(self.model.logits(&x).remove_axis(Axis(0)))
    }
}

impl Block {
    fn load(files: &Tensors, config: &LlamaConfig, l: usize) -> Result<Self> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let norm = |which: &str| {
            files.vector(&format!("model.layers.{l}.{which}_layernorm.weight"), hidden)
        };
        let linear = |which: &str, rows: usize, columns: usize| -> Result<Linear> {
            let name = |what: &str| format!("model.layers.{l}.mlp.{which}_proj.{what}");
            Ok(Linear {
                weight: files.matrix(&name("weight"), rows, columns)?,
                bias: config.mlp_bias.then(|| files.vector(&name("bias"), rows)).transpose()?,
            })
        };
        Ok(Self {
            attention_norm: norm("input")?,
            mlp_norm: norm("post_attention")?,
            gate: linear("gate", inner, hidden)?,
            up: linear("up", inner, hidden)?,
            down: linear("down", hidden, inner)?,
        })
    }
}

impl Linear {
    fn forward(&self, x: &Array2<f32>) -> Array2<f32> {
        let y = linear(x.view(), self.weight.view());
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
}

/// x / √(mean(x²) + ε) · weight, for every row.
fn rms_norm(x: &Array2<f32>, weight: &Array1<f32>, epsilon: f32) -> Array2<f32> {
    let mut y = x.clone();
    for mut row in y.rows_mut() {
        let scale = 1.0 / (mean_square(row.view()) + epsilon).sqrt();
        Zip::from(&mut row).and(weight).for_each(|y, &w| *y *= scale * w);
    }
    y
}

fn mean_square(row: ArrayView1<'_, f32>) -> f32 {
    row.dot(&row) / row.len() as f32
}
