//! What `config.json` of a LLaMA-format model says beside its attention layers, checked.

use std::fmt::Debug;
use std::path::Path;

use dijiang::layer::AttentionConfig;
use serde::Deserialize;

use super::error::{Error, Result};

/// No size in a config may be larger, so that no product of two sizes overflows.
const LARGEST: usize = 1 << 31;

/// The shapes and constants of one model.
#[derive(Debug, Clone)]
pub(crate) struct LlamaConfig {
    /// D.
    pub(crate) hidden: usize,
    /// Inner size of the SwiGLU block.
    pub(crate) intermediate: usize,
    pub(crate) layers: usize,
    pub(crate) kv_heads: usize,
    /// d.
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    /// Context length the model was trained for.
    pub(crate) context: usize,
    pub(crate) norm_epsilon: f32,
    pub(crate) tied_embeddings: bool,
    pub(crate) mlp_bias: bool,
}

/// The keys of the file that matter here; Hugging Face's defaults stand in for absent ones.
#[derive(Deserialize)]
struct File {
    intermediate_size: usize,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "epsilon")]
    rms_norm_eps: f64,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    mlp_bias: bool,
}

fn silu() -> String {
    "silu".to_owned()
}

fn epsilon() -> f64 {
    1e-6
}

impl LlamaConfig {
    /// Reads and checks `config.json` in `directory`, of a model with these `layers` of this
    /// `attention`.
    pub(crate) fn read(
        directory: &Path,
        layers: usize,
        attention: &AttentionConfig,
    ) -> Result<Self> {
        let path = directory.join("config.json");
        let text =
            std::fs::read(&path).map_err(|source| Error::Io { path: path.clone(), source })?;
        let file: File = serde_json::from_slice(&text)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let expect =
            |holds: bool, key: &'static str, expected: &'static str, found: &dyn Debug| match holds
            {
                true => Ok(()),
                false => Err(Error::Config {
                    path: path.clone(),
                    key,
                    expected,
                    found: format!("{found:?}"),
                }),
            };
        expect(file.hidden_act == "silu", "hidden_act", "\"silu\"", &file.hidden_act)?;
        expect(
            file.rms_norm_eps.is_finite() && file.rms_norm_eps >= 0.0,
            "rms_norm_eps",
            "at least 0",
            &file.rms_norm_eps,
        )?;
        let size = |key: &'static str, found: usize| {
            expect((1..=LARGEST).contains(&found), key, "at least 1 and at most 2³¹", &found)
                .map(|()| found)
        };
        Ok(Self {
            hidden: attention.model_dim,
            intermediate: size("intermediate_size", file.intermediate_size)?,
            layers,
            kv_heads: attention.kv_heads,
            head_dim: attention.head_dim.unwrap_or(attention.model_dim / attention.heads),
            vocabulary: size("vocab_size", file.vocab_size)?,
            context: size("max_position_embeddings", file.max_position_embeddings)?,
            norm_epsilon: file.rms_norm_eps as f32,
            tied_embeddings: file.tie_word_embeddings,
            mlp_bias: file.mlp_bias,
        })
    }

    /// Bytes of an f32 key-value cache that softmax attention holds after `tokens` tokens, all
    /// layers together.
    pub(crate) fn kv_cache_bytes(&self, tokens: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * size_of::<f32>() * tokens
    }
}
