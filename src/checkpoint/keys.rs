//! Which keys of `config.json` may be there without being read.
//!
//! A key that a family does not use is one of three things: known to say nothing about attention;
//! of a name that has nothing to do with attention; or a reason to refuse the file, unless its
//! value is known to change nothing. The guide's table of families and keys says the same.

use serde_json::{Map, Value};

use super::json::{Object, quoted_value};
use crate::error::Result;

/// Keys that sound like attention and say nothing about what it computes: training, generation,
/// which implementation is to run, what is put out, other parts of the model.
const IRRELEVANT: [&str; 20] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_flash_attn_2_enabled",
    "attn_implementation",
    "attn_pdrop",
    "chunk_size_feed_forward",
    "final_logit_softcapping",
    "flash_attn",
    "keys_to_ignore_at_inference",
    "lm_head_bias",
    "max_position_embeddings",
    "mlp_bias",
    "num_local_experts",
    "original_max_position_embeddings",
    "output_attentions",
    "top_k",
    "use_flash_attention",
    "use_flash_attention_2",
    "use_flash_attn",
];

/// Ends of names that say nothing about what attention computes.
const IRRELEVANT_ENDS: [&str; 6] =
    ["_token_id", "_token_ids", "_token_index", "_dropout", "_dropout_prob", "_layernorm_eps"];

/// Values with which attention is as it is without the key.
const NEUTRAL: [(&str, &str); 32] = [
    ("add_cross_attention", "false"),
    ("alibi", "false"),
    ("attention_bias", "false"),
    ("attention_out_bias", "false"),
    ("attn_bias", "false"),
    ("bias", "false"),
    ("causal", "true"),
    ("full_attn_mod", "1"),
    ("interpolate_factor", "1"),
    ("is_causal", "true"),
    ("is_encoder_decoder", "false"),
    ("multi_query", "false"),
    ("no_bias", "true"),
    ("o_bias", "false"),
    ("partial_rotary_factor", "1"),
    ("per_layer_config", "{}"),
    ("pruned_heads", "{}"),
    ("qk_layernorm", "false"),
    ("qk_norm", "false"),
    ("qkv_bias", "false"),
    ("rope_interleave", "false"),
    ("rope_interleaved", "false"),
    ("rope_parameters", "{}"),
    ("rope_scaling", "{}"),
    ("rotary_pct", "1"),
    ("use_alibi", "false"),
    ("use_attention_sinks", "false"),
    ("use_bias", "false"),
    ("use_bidirectional_attention", "false"),
    ("use_mrope", "false"),
    ("use_qk_norm", "false"),
    ("use_sliding_window", "false"),
];

/// Parts of names that speak of attention wherever they stand.
const PARTS: [&str; 16] = [
    "alibi",
    "attention",
    "attn",
    "bidirectional",
    "causal",
    "encoder_decoder",
    "head",
    "layer_types",
    "nope",
    "per_layer",
    "posit",
    "rotary",
    "sliding",
    "softcap",
    "soft_cap",
    "window",
];

/// Words of names, between underscores, that speak of attention.
const WORDS: [&str; 33] = [
    "bias",
    "chunk",
    "chunked",
    "global",
    "interpolate",
    "k",
    "key",
    "keys",
    "kv",
    "local",
    "logn",
    "lora",
    "mask",
    "masked",
    "mla",
    "mrope",
    "mup",
    "ntk",
    "q",
    "qk",
    "qkv",
    "queries",
    "query",
    "rel",
    "relative",
    "rope",
    "sink",
    "sinks",
    "softmax",
    "sparse",
    "swa",
    "v",
    "value",
];

/// Refuses keys that `used` does not list and that may change what attention computes.
pub(super) fn check(config: Object<'_>, used: impl Fn(&str) -> bool) -> Result<()> {
    let suspect = config.map.iter().find(|(key, value)| {
        !value.is_null() && !used(key) && speaks_of_attention(key) && !changes_nothing(key, value)
    });
    match suspect {
        Some((key, value)) => {
            let expected = "absent or null: attention of this family is read without it";
            Err(config.fault(key, expected, quoted_value(value)))
        }
        None => Ok(()),
    }
}

fn speaks_of_attention(key: &str) -> bool {
    let name = key.to_ascii_lowercase();
    let irrelevant =
        IRRELEVANT.contains(&key) || IRRELEVANT_ENDS.iter().any(|end| name.ends_with(end));
    !irrelevant
        && (PARTS.iter().any(|part| name.contains(part))
            || name.split(['_', '.', '-']).any(|word| WORDS.contains(&word)))
}

fn changes_nothing(key: &str, value: &Value) -> bool {
    if key == "layer_types" {
        let full = |kind: &Value| kind.as_str() == Some("full_attention");
        return value.as_array().is_some_and(|kinds| kinds.iter().all(full));
    }
    NEUTRAL.iter().filter(|(name, _)| *name == key).any(|(_, neutral)| match value {
        Value::Bool(flag) => flag.to_string() == *neutral,
        Value::Number(number) => {
            number.as_f64().is_some_and(|number| number.to_string() == *neutral)
        }
        Value::Object(map) => *neutral == "{}" && is_empty(map),
        _ => false,
    })
}

/// Whether an object holds nothing but nulls.
fn is_empty(map: &Map<String, Value>) -> bool {
    map.values().all(Value::is_null)
}

#[cfg(test)]
mod tests {
    use super::super::Family;
    use super::super::family::{COMMON, ROTARY};
    use super::*;

    /// The guide's page names every key and word of this file and of the families.
    #[test]
    fn the_guide_says_the_same() {
        let page = include_str!("../guide/checkpoints.md");
        let families = Family::ALL.into_iter();
        let own = families.flat_map(|family| [family.keys(), &[family.model_type()]].concat());
        let neutral = NEUTRAL.iter().map(|(key, _)| *key);
        let others = [&COMMON[..], &ROTARY, &IRRELEVANT, &IRRELEVANT_ENDS, &PARTS, &WORDS].concat();
        for key in others.into_iter().chain(own).chain(neutral) {
            assert!(page.contains(&format!("`{key}`")), "{key} is not in the guide");
        }
    }
}
