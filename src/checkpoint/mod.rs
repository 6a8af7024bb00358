//! Attention layers from the model directories of Hugging Face.
//!
//! A directory holds `config.json` and the weights: `model.safetensors`, or the shards that
//! `model.safetensors.index.json` lists. Tensors are stored in f32, f16, bf16 or f64 and converted
//! when they are asked for; the files are mapped, not read, so opening a large model costs nothing.
//!
//! | family (`model_type`) | attention |
//! | --- | --- |
//! | LLaMA, TinyLLaMA (`llama`) | causal, grouped queries, rotary embedding with its scalings, biases if the config says so |
//! | GPT-NeoX, Pythia (`gpt_neox`) | causal, rotary embedding of a part of each head, fused weights with biases |
//! | OPT (`opt`) | causal, biases, no rotary embedding |
//! | BERT (`bert`) | bidirectional, biases |
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

mod config;
mod families;
mod published;
mod tensors;

use std::path::Path;

use crate::error::{Error, Result};
use crate::files::fault;
use crate::layer::{AttentionConfig, AttentionWeights, SoftmaxAttention};
use crate::real::Real;
use config::Config;
pub use tensors::Tensors;

/// Largest JSON file that is read, in bytes.
const MAX_JSON: u64 = 100_000_000;

/// The families of models whose attention can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// LLaMA and its like.
    Llama,
    /// GPT-NeoX, Pythia.
    GptNeox,
    /// OPT.
    Opt,
    /// BERT.
    Bert,
}

/// A model directory, opened.
///
/// Shared freely between threads. The files must not be written to or cut short while it lives:
/// they are mapped into memory.
#[derive(Debug)]
pub struct Checkpoint {
    config: Config,
    tensors: Tensors,
}

impl Checkpoint {
    /// Opens `directory` and checks its config and the headers of its weight files. No weight is
    /// read yet.
    ///
    /// # Cost
    /// Reads the config and the headers, some kilobytes a file; the rest is mapped. Files stay open
    /// as long as this lives.
    ///
    /// # Errors
    /// [`Error::Io`] for files that cannot be read, [`Error::Format`] for those that are damaged,
    /// of another family, or say something impossible.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        Ok(Self { config: Config::read(directory)?, tensors: Tensors::open(directory)? })
    }

    /// The model's family.
    pub fn family(&self) -> Family {
        self.config.family
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.config.layers
    }

    /// What all attention layers of the model have in common.
    pub fn attention_config(&self) -> &AttentionConfig {
        &self.config.attention
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
        if layer >= self.layers() {
            return Err(Error::Value {
                argument: "layer",
                expected: "below the number of layers",
                got: layer as f64,
            });
        }
        families::attention_weights(&self.config, &self.tensors, layer)
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
        SoftmaxAttention::new(self.attention_config().clone(), self.attention_weights(layer)?)
    }

    /// Every tensor of the model, by name.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }
}

/// A fault in the file at `path`.
fn fault_in(path: &Path, what: &str, expected: impl ToString, got: impl ToString) -> Error {
    fault(format!("{}: {what}", path.display()), expected, got)
}

/// The file at `path` cannot be read.
fn io_error(path: &Path, error: &std::io::Error) -> Error {
    Error::Io { path: path.display().to_string(), kind: error.kind(), message: error.to_string() }
}

/// The JSON file at `path`.
fn read_json<J: for<'de> serde::Deserialize<'de>>(path: &Path) -> Result<J> {
    let metadata = std::fs::metadata(path).map_err(|error| io_error(path, &error))?;
    if !metadata.is_file() || metadata.len() > MAX_JSON {
        let got = if metadata.is_file() {
            format!("{} bytes", metadata.len())
        } else {
            "something else".to_owned()
        };
        return Err(fault(path.display(), format!("a file of at most {MAX_JSON} bytes"), got));
    }
    let text = std::fs::read(path).map_err(|error| io_error(path, &error))?;
    serde_json::from_slice(&text).map_err(|error| fault(path.display(), "the expected JSON", error))
}
