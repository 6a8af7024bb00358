//! [`Family`]: what sets the families apart.

use super::rope::Rules;

/// The families of models whose attention can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Family {
    /// LLaMA and its like.
    Llama,
    /// Mistral.
    Mistral,
    /// Qwen 2 and 2.5.
    Qwen2,
    /// Qwen 3.
    Qwen3,
    /// Phi 3, 3.5 and 4 mini.
    Phi3,
    /// Gemma.
    Gemma,
    /// Gemma 2.
    Gemma2,
    /// The language model of Gemma 3.
    Gemma3,
    /// SmolLM 3.
    SmolLm3,
    /// GPT-NeoX, Pythia.
    GptNeox,
    /// OPT.
    Opt,
    /// BERT.
    Bert,
}

/// What sets the families apart beside their rotary embeddings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Defaults {
    /// Key-value heads if the config has no key for them; none where it may have none.
    pub(super) kv_heads: Option<usize>,
    pub(super) head_dim: Option<usize>,
    /// `sliding_window`, if the config has no such key.
    pub(super) window: Option<usize>,
    /// ε of the norms of queries and keys; none without norms.
    pub(super) norm: Option<f64>,
    pub(super) rotary: Option<Rules>,
}

/// Keys that every family uses, if only to refuse what stands there.
pub(super) const COMMON: [&str; 10] = [
    "model_type",
    "architectures",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "text_config",
    "quantization",
    "quantization_config",
    "compression_config",
];

/// Keys of the families with rotary embedding.
pub(super) const ROTARY: [&str; 5] = [
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "max_position_embeddings",
    "original_max_position_embeddings",
];

impl Family {
    pub(super) const ALL: [Self; 12] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Phi3,
        Self::Gemma,
        Self::Gemma2,
        Self::Gemma3,
        Self::SmolLm3,
        Self::GptNeox,
        Self::Opt,
        Self::Bert,
    ];

    /// Its `model_type`.
    pub(super) fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Phi3 => "phi3",
            Self::Gemma => "gemma",
            Self::Gemma2 => "gemma2",
            Self::Gemma3 => "gemma3_text",
            Self::SmolLm3 => "smollm3",
            Self::GptNeox => "gpt_neox",
            Self::Opt => "opt",
            Self::Bert => "bert",
        }
    }

    /// The family of a class in `architectures`: `Qwen2ForCausalLM`, `BertModel`.
    pub(super) fn of_class(class: &str) -> Option<Self> {
        let ends = ["For", "Model", "LMHead", "PreTrained", "TextModel"];
        let name = ends.iter().filter_map(|end| class.find(end)).min().map(|end| &class[..end])?;
        Self::ALL.into_iter().find(|family| {
            let plain = family.model_type().trim_end_matches("_text").replace('_', "");
            name.eq_ignore_ascii_case(&plain)
        })
    }

    /// Keys it uses beside those of all families and of the rotary embedding.
    pub(super) fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Llama | Self::Gemma => &["num_key_value_heads", "attention_bias"],
            Self::Mistral => &["num_key_value_heads", "sliding_window", "layer_types"],
            Self::Qwen2 => &[
                "num_key_value_heads",
                "use_sliding_window",
                "sliding_window",
                "max_window_layers",
                "layer_types",
            ],
            Self::Qwen3 => &[
                "num_key_value_heads",
                "attention_bias",
                "rms_norm_eps",
                "use_sliding_window",
                "sliding_window",
                "max_window_layers",
                "layer_types",
            ],
            Self::Phi3 => &["num_key_value_heads", "partial_rotary_factor", "sliding_window"],
            Self::Gemma2 => &[
                "num_key_value_heads",
                "attention_bias",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "sliding_window",
                "layer_types",
            ],
            Self::Gemma3 => &[
                "num_key_value_heads",
                "attention_bias",
                "query_pre_attn_scalar",
                "attn_logit_softcapping",
                "rms_norm_eps",
                "sliding_window",
                "sliding_window_pattern",
                "_sliding_window_pattern",
                "layer_types",
                "rope_local_base_freq",
            ],
            Self::SmolLm3 => &[
                "num_key_value_heads",
                "attention_bias",
                "use_sliding_window",
                "sliding_window",
                "max_window_layers",
                "layer_types",
                "no_rope_layers",
                "no_rope_layer_interval",
            ],
            Self::GptNeox => {
                &["attention_bias", "rotary_pct", "rotary_emb_base", "partial_rotary_factor"]
            }
            Self::Opt => &["enable_bias"],
            Self::Bert => &["position_embedding_type", "is_decoder"],
        }
    }

    /// What transformers takes for absent keys.
    pub(super) fn defaults(self) -> Defaults {
        let plain = Defaults {
            kv_heads: None,
            head_dim: None,
            window: None,
            norm: None,
            rotary: Some(Rules::new(1e4)),
        };
        match self {
            Self::Llama | Self::Opt | Self::Bert => {
                Defaults { rotary: plain.rotary.filter(|_| self == Self::Llama), ..plain }
            }
            Self::Mistral => Defaults { kv_heads: Some(8), window: Some(4096), ..plain },
            Self::Qwen2 => Defaults { kv_heads: Some(32), window: Some(4096), ..plain },
            Self::Qwen3 => Defaults {
                kv_heads: Some(32),
                head_dim: Some(128),
                window: Some(4096),
                norm: Some(1e-6),
                ..plain
            },
            Self::Phi3 => {
                let share = Some(("partial_rotary_factor", 1.0));
                let default_original = Some(4096);
                let rules = Some(Rules { share, default_original, ..Rules::new(1e4) });
                Defaults { rotary: rules, ..plain }
            }
            Self::Gemma => Defaults { kv_heads: Some(16), head_dim: Some(256), ..plain },
            Self::Gemma2 => {
                Defaults { kv_heads: Some(4), head_dim: Some(256), window: Some(4096), ..plain }
            }
            Self::Gemma3 => Defaults {
                kv_heads: Some(4),
                head_dim: Some(256),
                window: Some(4096),
                norm: Some(1e-6),
                rotary: Some(Rules { original_beside: false, ..Rules::new(1e6) }),
            },
            Self::SmolLm3 => Defaults { kv_heads: Some(4), rotary: Some(Rules::new(2e6)), ..plain },
            Self::GptNeox => {
                let share = Some(("rotary_pct", 0.25));
                let rules = Rules { theta: "rotary_emb_base", share, ..Rules::new(1e4) };
                Defaults { rotary: Some(rules), ..plain }
            }
        }
    }
}
