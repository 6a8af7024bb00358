//! Keys of `config.json` drawn at random, and every key a family uses: none is ignored without a
//! word.

use std::path::Path;

use dijiang::checkpoint::{Checkpoint, CheckpointOptions};
use dijiang::layer::{AttentionConfig, AttentionWeights};
use dijiang::{Error, Result};
use dijiang_testing::Random;
use dijiang_testing::models::{Model, golden, named};
use serde_json::{Map, Value, json};

/// The golden models.
const MODELS: &str = "\
    hf-llama hf-gpt_neox hf-opt hf-bert hf-mistral hf-qwen2 hf-qwen3 hf-phi3 hf-gemma hf-gemma2 \
    hf-gemma3 hf-smollm3";

/// Keys of real files that say nothing about what attention computes.
const HARMLESS: &str = "\
    _name_or_path _attn_implementation_autoset activation_function attention_dropout \
    attention_probs_dropout_prob auto_map bad_words_ids begin_suppress_tokens bos_token_id \
    cache_implementation chunk_size_feed_forward classifier_dropout decoder_start_token_id \
    diversity_penalty do_sample dtype early_stopping embd_pdrop encoder_no_repeat_ngram_size \
    eos_token_id final_logit_softcapping finetuning_task gradient_checkpointing hidden_act \
    hidden_activation hidden_dropout hidden_dropout_prob id2label initializer_range \
    intermediate_size label2id layer_norm_eps length_penalty mask_token_id max_length mlp_bias \
    no_repeat_ngram_size num_beams num_experts_per_tok num_local_experts output_attentions \
    output_hidden_states pad_token_id prefix pretraining_tp problem_type repetition_penalty \
    resid_pdrop return_dict router_aux_loss_coef sep_token_id temperature tie_word_embeddings \
    tokenizer_class top_k top_p torch_dtype transformers_version use_cache vocab_size";

/// Words that make a key one of attention, whatever stands beside them.
const TELLING: &str = "\
    attention attn rope rotary alibi position positional window sliding softcap head heads \
    causal bidirectional qkv kv query key value qk sinks sparse chunk global";

fn config_and_weights(checkpoint: &Checkpoint) -> (Vec<AttentionConfig>, AttentionWeights<f32>) {
    let layers = 0..checkpoint.layers();
    let configs = layers.map(|l| checkpoint.attention_config(l).unwrap()).collect();
    (configs, checkpoint.attention_weights(0).unwrap())
}

fn open(path: &Path) -> Result<Checkpoint> {
    CheckpointOptions::new().with_length(24).open(path)
}

/// A key of no family is refused by name if it speaks of attention, and changes nothing otherwise.
#[test]
fn random_keys() {
    let mut random = Random::new(31);
    let words = |list: &'static str| list.split_whitespace().collect::<Vec<_>>();
    let (harmless, telling) = (words(HARMLESS), words(TELLING));
    let beside =
        ["use", "max", "num", "layer", "local", "scale", "type", "new", "q", "block", "enabled"];
    let values = [json!(true), json!(2), json!(0.5), json!("on"), json!([1, 0]), json!({ "a": 1 })];
    for name in MODELS.split_whitespace() {
        let model = Model::copy("random", name);
        let plain = config_and_weights(&open(&golden(name)).unwrap());
        let with = |config: Map<String, Value>| {
            model.directory.write("config.json", Value::Object(config).to_string());
            open(&model.directory.0)
        };
        for _ in 0..60 {
            let mut config = model.config.clone();
            for _ in 0..4 {
                let key = harmless[random.below(harmless.len())];
                if !model.config.contains_key(key) {
                    let value = values[random.below(values.len())].clone();
                    config.insert(key.to_owned(), value);
                }
            }
            assert_eq!(config_and_weights(&with(config.clone()).unwrap()), plain, "{config:?}");

            let mut words = vec![telling[random.below(telling.len())]];
            for _ in 0..random.below(3) {
                let at = random.below(words.len() + 1);
                words.insert(at, beside[random.below(beside.len())]);
            }
            // Two of these words are enough never to be a key of the family itself.
            words.push("x");
            let key = words.join("_");
            config.insert(key.clone(), Value::Null);
            assert_eq!(config_and_weights(&with(config.clone()).unwrap()), plain, "null {key}");
            config.insert(key.clone(), values[random.below(values.len())].clone());
            let refused = named(with(config));
            assert!(refused.ends_with(&format!(": {key}")), "{name}: {key}, but {refused}");
        }
    }
}

/// Another value of a key that a family uses changes what is read, or is refused by name.
#[test]
fn no_key_is_ignored() {
    // Where a value changes nothing, and why.
    let unused = |name: &str, key: &str| match key {
        "max_position_embeddings" => true, // only where a rule depends on it
        "original_max_position_embeddings" => name != "hf-qwen2" && name != "hf-phi3",
        "max_window_layers" => true,      // layer_types says it
        "no_rope_layer_interval" => true, // no_rope_layers says it
        "_sliding_window_pattern" | "sliding_window_pattern" => true, // layer_types says it
        "rms_norm_eps" => name != "hf-qwen3" && name != "hf-gemma3",
        "rope_local_base_freq" | "rope_theta" => true, // rope_parameters says it
        "is_decoder" => name != "hf-bert",
        // Off, or so for all layers already.
        "sliding_window" | "use_sliding_window" => name == "hf-qwen3" || name == "hf-smollm3",
        "layer_types" => name == "hf-mistral",
        "partial_rotary_factor" => name == "hf-phi3", // rope_parameters says it
        "vocab_size" | "intermediate_size" | "initializer_range" => true,
        _ => false,
    };
    let keys = "\
        num_attention_heads num_key_value_heads hidden_size num_hidden_layers head_dim \
        attention_bias enable_bias rope_theta rope_scaling rope_parameters rotary_pct \
        rotary_emb_base partial_rotary_factor max_position_embeddings \
        original_max_position_embeddings sliding_window use_sliding_window max_window_layers \
        layer_types sliding_window_pattern _sliding_window_pattern rope_local_base_freq \
        no_rope_layers no_rope_layer_interval query_pre_attn_scalar attn_logit_softcapping \
        rms_norm_eps position_embedding_type is_decoder is_encoder_decoder add_cross_attention \
        use_bidirectional_attention is_causal quantization_config text_config qk_layernorm alibi \
        multi_query bias per_layer_config attention_multiplier clip_qkv kv_lora_rank \
        num_kv_heads attn_temperature_tuning use_qk_norm rope_interleave attention_chunk_size \
        softmax_scale use_logn_attn index_head_dim key_multiplier global_attn_every_n_layers";
    let values = [
        json!(true),
        json!(false),
        json!(3),
        json!(0.5),
        json!(1e5),
        json!("relative"),
        json!({ "rope_type": "linear", "factor": 3.0, "rope_theta": 7e3 }),
        json!({ "a": 1 }),
        json!(["sliding_attention", "sliding_attention"]),
        json!([0, 0]),
    ];
    // Values that say what is so without the key.
    let neutral = |key: &str, value: &Value| match key {
        "is_causal" => value == &json!(true),
        _ => value == &json!(false),
    };
    let mut ignored = Vec::new();
    for name in MODELS.split_whitespace() {
        let model = Model::copy("ignored", name);
        let plain = config_and_weights(&open(&golden(name)).unwrap());
        for key in keys.split_whitespace() {
            for value in &values {
                let before = model.config.get(key);
                if before == Some(value) || unused(name, key) {
                    continue;
                }
                let mut config = model.config.clone();
                config.insert(key.to_owned(), value.clone());
                model.directory.write("config.json", Value::Object(config).to_string());
                let opened = open(&model.directory.0);
                let read = opened.and_then(|checkpoint| {
                    let layers = 0..checkpoint.layers();
                    let configs: Result<Vec<_>> =
                        layers.map(|l| checkpoint.attention_config(l)).collect();
                    let configs = configs?;
                    let same = configs == plain.0;
                    Ok(same && checkpoint.attention_weights::<f32>(0)? == plain.1)
                });
                match read {
                    Err(error) => assert!(matches!(error, Error::Format { .. }), "{error}"),
                    Ok(true) => {
                        if before.is_some_and(|before| !before.is_null()) || !neutral(key, value) {
                            ignored.push(format!("{name}: {key} = {value}"));
                        }
                    }
                    Ok(false) => {}
                }
            }
        }
    }
    assert!(ignored.is_empty(), "{ignored:#?}");
}
