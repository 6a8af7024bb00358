//! `config.json` of a LLaMA-format model, checked.

use std::fmt::Debug;
use std::path::Path;

use dijiang::layer::{AttentionConfig, Rotary, RotaryScaling};
use serde::Deserialize;
use serde_json::Value;

use crate::checkpoint::read_json;
use crate::error::{Error, Result};

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
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// d.
    pub(crate) head_dim: usize,
    pub(crate) vocabulary: usize,
    /// Context length the model was trained for.
    pub(crate) context: usize,
    pub(crate) norm_epsilon: f32,
    pub(crate) tied_embeddings: bool,
    pub(crate) attention_bias: bool,
    pub(crate) mlp_bias: bool,
    rotary: Rotary,
}

/// The keys of the file that matter here; Hugging Face's defaults stand in for absent ones.
#[derive(Deserialize)]
struct File {
    #[serde(default = "llama")]
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    #[serde(default = "silu")]
    hidden_act: String,
    #[serde(default = "epsilon")]
    rms_norm_eps: f64,
    rope_theta: Option<f64>,
    rope_scaling: Option<Value>,
    /// Newer files keep `rope_theta` and the scaling together here.
    rope_parameters: Option<Value>,
    #[serde(default)]
    tie_word_embeddings: bool,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
}

fn llama() -> String {
    "llama".to_owned()
}

fn silu() -> String {
    "silu".to_owned()
}

fn epsilon() -> f64 {
    1e-6
}

/// The scaling laws of the rotary embedding that LLaMA-format models come with.
#[derive(Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
enum Scaling {
    Default,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: usize },
}

impl LlamaConfig {
    /// Reads and checks `config.json` in `directory`.
    pub(crate) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let file: File = read_json(&path)?;
        let expect = |holds: bool, key: &'static str, expected: &'static str, found: &dyn Debug| match holds {
            true => Ok(()),
            false => Err(Error::Config { path: path.clone(), key, expected, found: format!("{found:?}") }),
        };
        expect(file.model_type == "llama", "model_type", "\"llama\"", &file.model_type)?;
        expect(file.hidden_act == "silu", "hidden_act", "\"silu\"", &file.hidden_act)?;
        expect(file.rms_norm_eps.is_finite() && file.rms_norm_eps >= 0.0, "rms_norm_eps", "at least 0", &file.rms_norm_eps)?;
        let size = |key: &'static str, found: usize| {
            expect((1..=LARGEST).contains(&found), key, "at least 1 and at most 2³¹", &found).map(|()| found)
        };
        let heads = size("num_attention_heads", file.num_attention_heads)?;
        let hidden = size("hidden_size", file.hidden_size)?;
        let kv_heads = size("num_key_value_heads", file.num_key_value_heads.unwrap_or(heads))?;
        expect(heads.is_multiple_of(kv_heads), "num_key_value_heads", "a divisor of num_attention_heads", &kv_heads)?;
        if file.head_dim.is_none() {
            expect(hidden.is_multiple_of(heads), "hidden_size", "a multiple of num_attention_heads", &hidden)?;
        }
        let head_dim = size("head_dim", file.head_dim.unwrap_or(hidden / heads))?;

        let nested = |key: &str| file.rope_parameters.as_ref().and_then(|parameters| parameters.get(key));
        let theta = file.rope_theta.or_else(|| nested("rope_theta").and_then(Value::as_f64)).unwrap_or(10_000.0);
        let rotary = match scaling(file.rope_scaling.as_ref().or(file.rope_parameters.as_ref())) {
            Ok(scaling) => Rotary::new(theta).with_scaling(scaling),
            Err(found) => {
                let expected = "absent, null or of type default, linear or llama3 with all its numbers";
                return Err(Error::Config { path, key: "rope_scaling", expected, found });
            }
        };
        Ok(Self {
            hidden,
            intermediate: size("intermediate_size", file.intermediate_size)?,
            layers: size("num_hidden_layers", file.num_hidden_layers)?,
            heads,
            kv_heads,
            head_dim,
            vocabulary: size("vocab_size", file.vocab_size)?,
            context: size("max_position_embeddings", file.max_position_embeddings)?,
            norm_epsilon: file.rms_norm_eps as f32,
            tied_embeddings: file.tie_word_embeddings,
            attention_bias: file.attention_bias,
            mlp_bias: file.mlp_bias,
            rotary,
        })
    }

    /// What every attention layer of this model has in common.
    pub(crate) fn attention(&self) -> AttentionConfig {
        AttentionConfig::new(self.hidden, self.heads)
            .with_kv_heads(self.kv_heads)
            .with_head_dim(self.head_dim)
            .with_rotary(self.rotary.clone())
    }

    /// Bytes of an f32 key-value cache that softmax attention holds after `tokens` tokens, all layers together.
    pub(crate) fn kv_cache_bytes(&self, tokens: usize) -> usize {
        2 * self.layers * self.kv_heads * self.head_dim * size_of::<f32>() * tokens
    }
}

/// The scaling law of the rotary embedding, or the text of what it is instead of one.
fn scaling(value: Option<&Value>) -> Result<RotaryScaling, String> {
    let Some(Value::Object(object)) = value else {
        return match value {
            None | Some(Value::Null) => Ok(RotaryScaling::None),
            Some(other) => Err(other.to_string()),
        };
    };
    let mut object = object.clone();
    // Older files say `type`.
    let named = object.get("rope_type").or_else(|| object.get("type")).cloned().unwrap_or_else(|| "default".into());
    object.insert("rope_type".to_owned(), named);
    match Scaling::deserialize(&Value::Object(object)) {
        Ok(Scaling::Default) => Ok(RotaryScaling::None),
        Ok(Scaling::Linear { factor }) => Ok(RotaryScaling::Linear { factor }),
        Ok(Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings }) => {
            Ok(RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context: original_max_position_embeddings })
        }
        Err(_) => Err(value.map(Value::to_string).unwrap_or_default()),
    }
}
