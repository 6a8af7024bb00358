//! `config.json`, checked.

use std::fmt::Debug;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{Family, fault_in, read_json};
use crate::error::Result;
use crate::files::quoted;
use crate::layer::{AttentionConfig, Causality, Rotary, RotaryScaling};

/// No size in a config may be larger, so that no product of two sizes overflows.
const LARGEST: usize = 1 << 31;

/// What `config.json` says of attention.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) family: Family,
    pub(super) layers: usize,
    pub(super) attention: AttentionConfig,
    /// d.
    pub(super) head_dim: usize,
    /// Whether the projections have biases.
    pub(super) biases: bool,
}

/// The keys of the file that matter here, of all families; Hugging Face's defaults stand in for
/// absent ones.
#[derive(Deserialize)]
struct File {
    model_type: Option<String>,
    hidden_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    rope_theta: Option<f64>,
    /// GPT-NeoX's older name of `rope_theta`.
    rotary_emb_base: Option<f64>,
    rotary_pct: Option<f64>,
    partial_rotary_factor: Option<f64>,
    rope_scaling: Option<Value>,
    /// Newer files keep `rope_theta`, `partial_rotary_factor` and the scaling together here.
    rope_parameters: Option<Value>,
    attention_bias: Option<bool>,
    enable_bias: Option<bool>,
    position_embedding_type: Option<String>,
}

/// The scaling laws of the rotary embedding that models come with.
#[derive(Deserialize)]
#[serde(tag = "rope_type", rename_all = "lowercase")]
enum Scaling {
    Default,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_position_embeddings: usize,
    },
}

impl Config {
    /// Reads and checks `config.json` in `directory`.
    pub(super) fn read(directory: &Path) -> Result<Self> {
        let path = directory.join("config.json");
        let file: File = read_json(&path)?;
        let expect = |holds: bool, key: &str, expected: &str, found: &dyn Debug| match holds {
            true => Ok(()),
            false => Err(fault_in(&path, key, expected, format!("{found:?}"))),
        };
        let size = |key: &str, found: usize| {
            expect((1..=LARGEST).contains(&found), key, "at least 1 and at most 2³¹", &found)
                .map(|()| found)
        };
        let family = match file.model_type.as_deref() {
            None | Some("llama") => Family::Llama,
            Some("gpt_neox") => Family::GptNeox,
            Some("opt") => Family::Opt,
            Some("bert") => Family::Bert,
            Some(other) => {
                return Err(fault_in(
                    &path,
                    "model_type",
                    "llama, gpt_neox, opt or bert",
                    quoted(other),
                ));
            }
        };
        let heads = size("num_attention_heads", file.num_attention_heads)?;
        let hidden = size("hidden_size", file.hidden_size)?;
        let layers = size("num_hidden_layers", file.num_hidden_layers)?;
        let kv_heads = match family {
            Family::Llama => {
                size("num_key_value_heads", file.num_key_value_heads.unwrap_or(heads))?
            }
            _ => heads,
        };
        expect(
            heads.is_multiple_of(kv_heads),
            "num_key_value_heads",
            "a divisor of num_attention_heads",
            &kv_heads,
        )?;
        let given = file.head_dim.filter(|_| family == Family::Llama);
        if given.is_none() {
            expect(
                hidden.is_multiple_of(heads),
                "hidden_size",
                "a multiple of num_attention_heads",
                &hidden,
            )?;
        }
        let head_dim = size("head_dim", given.unwrap_or(hidden / heads))?;

        let mut attention =
            AttentionConfig::new(hidden, heads).with_kv_heads(kv_heads).with_head_dim(head_dim);
        let mut biases = true;
        match family {
            Family::Llama => {
                attention.rotary = Some(file.rotary(&path)?);
                biases = file.attention_bias.unwrap_or(false);
            }
            Family::GptNeox => {
                let nested = file.nested("partial_rotary_factor");
                let share =
                    file.rotary_pct.or(file.partial_rotary_factor).or(nested).unwrap_or(0.25);
                expect(
                    share > 0.0 && share <= 1.0,
                    "rotary_pct",
                    "more than 0 and at most 1",
                    &share,
                )?;
                attention.rotary =
                    Some(file.rotary(&path)?.with_dims((head_dim as f64 * share) as usize));
                biases = file.attention_bias.unwrap_or(true);
            }
            Family::Opt => biases = file.enable_bias.unwrap_or(true),
            Family::Bert => {
                let position = file.position_embedding_type.as_deref().unwrap_or("absolute");
                expect(
                    position == "absolute",
                    "position_embedding_type",
                    "\"absolute\"",
                    &position,
                )?;
                attention.causality = Causality::Bidirectional;
            }
        }
        attention
            .check()
            .map_err(|error| fault_in(&path, "attention", "the shape of a layer", error))?;
        Ok(Self { family, layers, attention, head_dim, biases })
    }
}

impl File {
    fn nested(&self, key: &str) -> Option<f64> {
        self.rope_parameters.as_ref()?.get(key)?.as_f64()
    }

    fn rotary(&self, path: &Path) -> Result<Rotary> {
        let base = self
            .rope_theta
            .or(self.rotary_emb_base)
            .or_else(|| self.nested("rope_theta"))
            .unwrap_or(10_000.0);
        let scaling = scaling(self.rope_scaling.as_ref().or(self.rope_parameters.as_ref()))
            .map_err(|found| {
                let expected =
                    "absent, null or of type default, linear or llama3 with all its numbers";
                fault_in(path, "rope_scaling", expected, quoted(&found))
            })?;
        Ok(Rotary::new(base).with_scaling(scaling))
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
    let named = object
        .get("rope_type")
        .or_else(|| object.get("type"))
        .cloned()
        .unwrap_or_else(|| "default".into());
    object.insert("rope_type".to_owned(), named);
    match Scaling::deserialize(&Value::Object(object)) {
        Ok(Scaling::Default) => Ok(RotaryScaling::None),
        Ok(Scaling::Linear { factor }) => Ok(RotaryScaling::Linear { factor }),
        Ok(Scaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        }) => Ok(RotaryScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context: original_max_position_embeddings,
        }),
        Err(_) => Err(value.map(Value::to_string).unwrap_or_default()),
    }
}
