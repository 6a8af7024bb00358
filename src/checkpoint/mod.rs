//! Attention layers from the model directories of Hugging Face, and to and from files of our own.
//!
//! A directory holds `config.json` and the weights: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` lists. Tensors are stored in f32, f16, bf16 or f64 and converted
//! when they are asked for; the files are mapped, not read, so opening a large model costs nothing.
//!
//! | family (`model_type`) | attention |
//! | --- | --- |
//! | LLaMA and its like (`llama`) | causal, grouped queries, rotary embedding, biases if any |
//! | Mistral (`mistral`) | as LLaMA, with a sliding window if the config has one |
//! | Qwen 2, 2.5 (`qwen2`) | as LLaMA, with biases of queries, keys and values |
//! | Qwen 3 (`qwen3`) | as LLaMA, with norms of queries and keys |
//! | Phi 3, 3.5, 4 mini (`phi3`) | as LLaMA, fused weights, partial rotary, sliding window |
//! | Gemma (`gemma`) | as LLaMA |
//! | Gemma 2 (`gemma2`) | its own scale, a sliding window in every other layer; no soft caps |
//! | Gemma 3, text (`gemma3_text`) | as Gemma 2, norms of queries and keys, two rotary embeddings |
//! | SmolLM 3 (`smollm3`) | as LLaMA, with layers without rotary embedding |
//! | GPT-NeoX, Pythia (`gpt_neox`) | causal, partial rotary embedding, fused weights with biases |
//! | OPT (`opt`) | causal, biases, no rotary embedding |
//! | BERT (`bert`) | bidirectional (causal as a decoder), biases |
//!
//! What a config says of attention is used, or the directory is refused with an error that names
//! the key; so are tensors of an attention module that would not be read. The guide lists the
//! [keys](crate::guide::checkpoints) of each family. Where files of different times disagree, the
//! reading of Hugging Face transformers 5 counts.
//!
//! ```no_run
//! use dijiang::checkpoint::Checkpoint;
//! use dijiang::layer::{DijiangAttention, DijiangOptions};
//!
//! let model = Checkpoint::open("path/to/model")?;
//! for l in 0..model.layers() {
//!     let softmax = model.softmax_attention::<f32>(l)?;
//!     let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
//! }
//! # Ok::<(), dijiang::Error>(())
//! ```
//!
//! With the feature `candle`, `Gguf` reads the files of llama.cpp, of the architecture `llama`.
//!
//! What calibration made goes to a small file beside the model's own, and comes back with the same
//! bits: [`save_maps`] and [`load_maps`]; [`save_layers`] and [`load_layers`] for the weights as
//! well; methods of [`DijiangAttention`](crate::layer::DijiangAttention) for one layer.

mod config;
mod families;
mod family;
#[cfg(feature = "candle")]
mod gguf;
mod json;
mod keys;
mod published;
mod rope;
mod saving;
mod tensors;

use std::path::Path;

use crate::Real;
use crate::error::{Error, Result};
use crate::files::fault;
use crate::layer::{AttentionConfig, AttentionWeights, SoftmaxAttention};
use config::Config;
pub use family::Family;
#[cfg(feature = "candle")]
pub use gguf::Gguf;
pub use saving::{load_layers, load_maps, save_layers, save_maps};
pub use tensors::Tensors;

/// How a model directory is read where its config is not to be taken as it is.
///
/// # Examples
/// ```no_run
/// use dijiang::checkpoint::CheckpointOptions;
///
/// // A model of another name with LLaMA's attention, for sequences of up to 16384 tokens.
/// let options = CheckpointOptions::new()
///     .with_config(r#"{ "model_type": "llama", "architectures": null }"#)
///     .with_length(16_384);
/// let model = options.open("path/to/model")?;
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct CheckpointOptions {
    /// A JSON object whose keys are put in place of those of `config.json`: for a model that
    /// differs from a family by name, or a key that is not to count. Default: none.
    pub config: Option<String>,
    /// Tokens of the longest sequence, for rotary embeddings that depend on it: `longrope`, which
    /// cannot be read without where it has two lists of factors, and `dynamic`, which by default is
    /// fixed for `max_position_embeddings`. Default: none.
    pub length: Option<usize>,
}

impl CheckpointOptions {
    /// All defaults: the config as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// Keys in place of those of `config.json`, as a JSON object.
    #[must_use]
    pub fn with_config(self, json: impl Into<String>) -> Self {
        Self { config: Some(json.into()), ..self }
    }

    /// Tokens of the longest sequence.
    #[must_use]
    pub fn with_length(self, tokens: usize) -> Self {
        Self { length: Some(tokens), ..self }
    }

    /// Opens `directory`: see [`Checkpoint::open`].
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; [`Error::Format`] for a `config` that is no JSON object.
    pub fn open(&self, directory: impl AsRef<Path>) -> Result<Checkpoint> {
        let directory = directory.as_ref();
        let config = Config::read(directory, self)?;
        let tensors = Tensors::open(directory)?;
        let prefix = families::prefix(&config, &tensors)?;
        Ok(Checkpoint { config, tensors, prefix })
    }
}

/// A model directory, opened.
///
/// Shared freely between threads. The files must not be written to or cut short while it lives:
/// they are mapped into memory.
#[derive(Debug)]
pub struct Checkpoint {
    config: Config,
    tensors: Tensors,
    /// Of the layers' tensors, before their numbers.
    prefix: &'static str,
}

impl Checkpoint {
    /// Opens `directory` and checks its config and the headers of its weight files. No weight is
    /// read yet. [`CheckpointOptions`] has choices.
    ///
    /// # Cost
    /// Reads the config and the headers, some kilobytes a file; the rest is mapped. Files stay open
    /// as long as this lives.
    ///
    /// # Errors
    /// [`Error::Io`] for files that cannot be read; [`Error::Format`] for those that are damaged,
    /// of another family, or say something impossible, for keys of the config and tensors of
    /// attention that this crate does not know how to use, each of them by name.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        CheckpointOptions::new().open(directory)
    }

    /// The model's family.
    pub fn family(&self) -> Family {
        self.config.family
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.config.layers
    }

    /// The config of the attention layer with index `layer`. Layers of some families differ in
    /// sliding window and rotary embedding.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that is not there.
    pub fn attention_config(&self, layer: usize) -> Result<AttentionConfig> {
        check_layer(layer, self.layers())?;
        Ok(self.config.of_layer(layer))
    }

    /// The projections of the attention layer with index `layer`.
    ///
    /// # Cost
    /// One pass over the tensors, and the memory of the weights in `T`.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that is not there, [`Error::Format`] for tensors that are
    /// missing, of another shape or type, or not finite in `T`.
    pub fn attention_weights<T: Real>(&self, layer: usize) -> Result<AttentionWeights<T>> {
        check_layer(layer, self.layers())?;
        families::attention_weights(&self.config, &self.tensors, self.prefix, layer)
    }

    /// The attention layer with index `layer` as it was trained.
    ///
    /// # Cost
    /// As [`attention_weights`](Self::attention_weights); the layer keeps these weights, without
    /// another copy.
    ///
    /// # Errors
    /// As [`attention_weights`](Self::attention_weights).
    pub fn softmax_attention<T: Real>(&self, layer: usize) -> Result<SoftmaxAttention<T>> {
        SoftmaxAttention::new(self.attention_config(layer)?, self.attention_weights(layer)?)
    }

    /// Every tensor of the model, by name.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }
}

/// The layer is one of so many.
fn check_layer(layer: usize, layers: usize) -> Result<()> {
    if layer < layers {
        return Ok(());
    }
    Err(Error::Value {
        argument: "layer",
        expected: "below the number of layers",
        got: layer as f64,
    })
}

/// A fault in the file at `path`.
fn fault_in(path: &Path, what: &str, expected: impl ToString, got: impl ToString) -> Error {
    fault(format!("{}: {what}", path.display()), expected, got)
}

/// The file at `path` cannot be read.
fn io_error(path: &Path, error: &std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), kind: error.kind(), message: error.to_string() }
}
