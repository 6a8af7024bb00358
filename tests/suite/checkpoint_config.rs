//! What `config.json` says of attention is used or refused by name: against transformers' own
//! rotary tables, and key by key.

use std::fs;

use dijiang::checkpoint::{Checkpoint, CheckpointOptions};
use dijiang::layer::{Causality, RotaryScaling};
use dijiang::{Error, Result};
use dijiang_testing::models::{Directory, Model, Stored, golden, named, stored};
use ndarray::Array2;
use safetensors::Dtype;
use serde_json::{Value, json};

fn tensor(shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    (Dtype::F32, shape.to_vec(), vec![0; 4 * shape.iter().product::<usize>()])
}

/// The layer's queries of `[cos 0 …, sin 0 …]` are those of its rotary embedding.
#[test]
fn rotary_embeddings_are_those_of_transformers() {
    let cases = fs::read(golden("hf-rope").join("cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_slice(&cases).unwrap();
    assert!(cases.len() >= 30);
    for case in &cases {
        let name = case["name"].as_str().unwrap();
        let directory = Directory::new(&format!("rope-{}", name.replace(' ', "-")));
        directory.write("config.json", case["config"].to_string());
        let eye = |copies: usize| {
            let rows = (0..copies * 16).flat_map(|i| (0..16).map(move |j| f32::from(i % 16 == j)));
            (
                Dtype::F32,
                vec![copies * 16, 16],
                rows.flat_map(f32::to_le_bytes).collect::<Vec<u8>>(),
            )
        };
        let mut tensors = Stored::new();
        let mut put = |name: &str, tensor| drop(tensors.insert(format!("layers.0.{name}"), tensor));
        match case["config"]["model_type"].as_str().unwrap() {
            "phi3" => {
                put("self_attn.qkv_proj.weight", eye(3));
                put("self_attn.o_proj.weight", eye(1));
            }
            "gpt_neox" => {
                put("attention.query_key_value.weight", eye(3));
                put("attention.query_key_value.bias", tensor(&[48]));
                put("attention.dense.weight", eye(1));
                put("attention.dense.bias", tensor(&[16]));
            }
            _ => ["q", "k", "v", "o"]
                .map(|which| put(&format!("self_attn.{which}_proj.weight"), eye(1)))
                .into_iter()
                .collect(),
        }
        directory.write_tensors("model.safetensors", &tensors);
        let length = case["length"].as_u64().unwrap() as usize;
        let options = CheckpointOptions::new().with_length(length);
        let layer = options.open(&directory.0).unwrap().softmax_attention::<f64>(0).unwrap();

        let numbers = |key: &str, row: usize| -> Vec<f64> {
            let row = case[key][row].as_array().unwrap();
            row.iter().map(|number| number.as_f64().unwrap()).collect()
        };
        let half = numbers("cos", 0).len();
        let x = Array2::from_shape_fn((length, 16), |(_, i)| f64::from(i < half || i >= 2 * half));
        let [q, k, _] = layer.project_at(&x, 0).unwrap();
        for (row, position) in case["positions"].as_array().unwrap().iter().enumerate() {
            let position = position.as_u64().unwrap() as usize;
            let passed = vec![1.0; 16 - 2 * half];
            let expected = [numbers("cos", row), numbers("sin", row), passed].concat();
            for heads in [&q, &k] {
                for (i, expected) in expected.iter().enumerate() {
                    let got = heads[[0, position, i]];
                    // Angles are computed in single precision there.
                    let tolerance = 1e-6 * (1.0 + position as f64);
                    assert!(
                        (got - expected).abs() < tolerance,
                        "{name}: {got}, not {expected} at position {position}, {i}"
                    );
                }
            }
        }
    }
}

/// Every line of the table of what was once read wrongly.
#[test]
fn nothing_is_read_wrongly_without_a_word() {
    let llama = Model::copy("wrong", "hf-llama");
    let plain = llama.first(json!({}));

    // Biases that the config does not announce, and announced ones that are not there.
    let at = "model.layers.1.self_attn.";
    let mut tensors = stored("hf-llama");
    tensors.insert(format!("{at}k_proj.bias"), tensor(&[16]));
    llama.directory.write_tensors("model.safetensors", &tensors);
    for changes in [json!({}), json!({ "attention_bias": null }), json!({ "bias": false })] {
        assert_eq!(named(llama.with(changes)), format!("{at}k_proj.bias"));
    }
    llama.refuses("bias", json!({ "bias": true }));
    let announced = llama.with(json!({ "attention_bias": true })).unwrap();
    assert!(
        named(announced.attention_weights::<f32>(0)).ends_with("layers.0.self_attn.q_proj.bias")
    );

    // Unknown tensors of attention.
    for name in [
        "q_norm.weight",
        "k_norm.weight",
        "sinks",
        "q_proj.weight_scale",
        "q_proj.lora_A.weight",
        "rotary_emb.sin_cached",
        "inner.q_proj.weight",
    ] {
        let mut tensors = stored("hf-llama");
        tensors.insert(format!("{at}{name}"), tensor(&[8]));
        llama.directory.write_tensors("model.safetensors", &tensors);
        assert_eq!(named(llama.with(json!({}))), format!("{at}{name}"));
    }
    let mut tensors = stored("hf-llama");
    for known in [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn_layer_norm.weight",
        "model.layers.0.mlp.experts.q_norm.weight",
        "vision.layers.0.self_attn.q_norm.weight",
    ] {
        tensors.insert(known.to_owned(), tensor(&[4]));
    }
    llama.directory.write_tensors("model.safetensors", &tensors);
    assert_eq!(llama.first(json!({})), plain);
    // Two models in one file.
    tensors.insert("layers.0.self_attn.q_proj.weight".to_owned(), tensor(&[64, 64]));
    llama.directory.write_tensors("model.safetensors", &tensors);
    assert_eq!(named(llama.with(json!({}))), "layers.0.self_attn.q_proj.weight");
    llama.directory.write_tensors("model.safetensors", &stored("hf-llama"));

    // No model_type.
    for (class, sizes) in [("Qwen2ForCausalLM", json!({})), ("MistralForCausalLM", json!(16))] {
        let mut config = llama.config.clone();
        config.remove("model_type");
        config.extend([("architectures".to_owned(), json!([class]))]);
        if !sizes.is_object() {
            config.insert("sliding_window".to_owned(), sizes);
        }
        llama.directory.write("config.json", Value::Object(config).to_string());
        let found = Checkpoint::open(&llama.directory.0);
        if class == "MistralForCausalLM" {
            assert_eq!(found.unwrap().attention_config(1).unwrap().sliding_window, Some(16));
        } else {
            let found = found.unwrap().attention_weights::<f32>(0);
            assert!(named(found).ends_with("layers.0.self_attn.q_proj.bias"));
        }
    }
    llama.refuses("architectures", json!({ "architectures": ["Qwen2ForCausalLM"] }));
    llama.refuses("architectures", json!({ "architectures": ["LlamaBidirectionalModel"] }));
    llama.refuses("model_type", json!({ "model_type": null, "architectures": [] }));
    llama.refuses("architectures", json!({ "model_type": null, "architectures": ["Mamba"] }));
    for class in ["LlamaForCausalLM", "LlamaModel", "LLaMAForSequenceClassification"] {
        assert_eq!(llama.first(json!({ "architectures": [class] })), plain);
    }

    // Rotary embedding: what `rotary_embeddings_are_those_of_transformers` does not say.
    let bare = Model::copy("bare", "hf-llama").without_rotary();
    bare.refuses("rope_scaling.factor", json!({ "rope_scaling": { "factor": 4.0 } }));
    bare.refuses(
        "rope_parameters.full_attention",
        json!({ "rope_parameters": { "full_attention": { "rope_type": "default" },
            "sliding_attention": { "rope_type": "default" } } }),
    );
    bare.refuses(
        "rope_parameters",
        json!({ "rope_scaling": { "rope_type": "linear", "factor": 2.0 },
            "rope_parameters": { "rope_type": "linear", "factor": 4.0 } }),
    );
    let twice = json!({ "rope_type": "linear", "factor": 2.0 });
    bare.with(json!({ "rope_scaling": twice, "rope_parameters": twice })).unwrap();
    for (key, value) in [
        ("alpha", json!(1000.0)),
        ("finetuned", json!(true)),
        ("mrope_section", json!([16, 24, 24])),
        ("low_freq_factor", json!(1.0)),
        ("original_max_position_embeddings", json!(2048)),
    ] {
        for rule in ["dynamic", "linear"] {
            let mut scaling = json!({ "rope_type": rule, "factor": 2.0 });
            scaling[key] = value.clone();
            bare.refuses(&format!("rope_scaling.{key}"), json!({ "rope_scaling": scaling }));
        }
    }
    llama.refuses("partial_rotary_factor", json!({ "partial_rotary_factor": 0.5 }));
    llama.refuses(
        "rope_parameters.partial_rotary_factor",
        json!({ "rope_parameters": { "partial_rotary_factor": 0.5 } }),
    );
    assert_eq!(llama.first(json!({ "partial_rotary_factor": 1 })), plain);
    llama.refuses("sliding_window", json!({ "sliding_window": 16 }));
    llama.refuses("layer_types", json!({ "layer_types": ["full_attention", "sliding_attention"] }));
    let full = json!({ "layer_types": ["full_attention", "full_attention"] });
    assert_eq!(llama.first(full), plain);

    // BERT as a decoder.
    let bert = Model::copy("wrong", "hf-bert");
    assert_eq!(bert.first(json!({})).causality, Causality::Bidirectional);
    assert_eq!(bert.first(json!({ "is_decoder": true })).causality, Causality::Causal);
    bert.refuses("add_cross_attention", json!({ "is_decoder": true, "add_cross_attention": true }));
    bert.refuses("pruned_heads", json!({ "pruned_heads": { "0": [1] } }));

    // Quantised weights.
    for key in ["quantization_config", "quantization", "compression_config"] {
        let method = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
        let error = llama.with(json!({ key: method })).unwrap_err();
        assert!(error.to_string().contains("fp8") && error.to_string().contains(key), "{error}");
    }
    // More than text.
    let error = llama
        .with(json!({ "model_type": "gemma3", "text_config": { "model_type": "gemma3_text" } }))
        .unwrap_err();
    assert!(error.to_string().contains("text_config") && error.to_string().contains("gemma3_text"));
}

#[test]
fn impossible_configs_are_refused() {
    let llama = Model::copy("impossible", "hf-llama");
    for (key, value) in [
        ("model_type", json!("mamba")),
        ("model_type", json!(7)),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("hidden_size", json!(1e300)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("num_key_value_heads", json!([2, 2])),
        ("head_dim", json!(0)),
        ("attention_bias", json!("yes")),
        ("rope_theta", json!("10000")),
        ("rope_scaling", json!("linear")),
        ("architectures", json!("LlamaForCausalLM")),
    ] {
        llama.refuses_value(key, value);
    }
    for value in [json!(-1), json!("8"), json!(null), json!(8.5)] {
        llama.refuses_value("hidden_size", value);
    }
    assert!(named(llama.without("hidden_size")).ends_with(": hidden_size"));
    // Whole numbers may be written as others are.
    let plain = llama.first(json!({}));
    let same = json!({ "hidden_size": 64.0, "num_attention_heads": 8.0, "num_hidden_layers": 2.0,
        "num_key_value_heads": 2.0, "head_dim": 8.0, "rope_theta": 10000 });
    assert_eq!(llama.first(same), plain);

    for (key, rule) in [
        ("rope_scaling.rope_type", json!({ "rope_type": "longer" })),
        ("rope_scaling.type", json!({ "type": "mrope" })),
        ("rope_scaling.type", json!({ "type": "mrope", "rope_type": "default" })),
        ("rope_scaling.rope_type", json!({ "rope_type": 1 })),
        ("rope_scaling.factor", json!({ "type": "linear" })),
        ("rope_scaling.factor", json!({ "type": "linear", "factor": "4" })),
        ("rope_scaling.factor", json!({ "type": "yarn" })),
        ("rope_scaling.truncate", json!({ "type": "yarn", "factor": 4.0, "truncate": false })),
        (
            "rope_scaling.high_freq_factor",
            json!({ "type": "llama3", "factor": 4.0, "low_freq_factor": 1.0 }),
        ),
        (
            "rope_scaling.short_factor",
            json!({ "type": "longrope", "short_factor": [1, 1, 1], "long_factor": [1, 1, 1, 1] }),
        ),
        (
            "rope_scaling.long_factor",
            json!({
                "type": "longrope", "short_factor": [1, 1, 1, 1],
                "long_factor": [1.0, 2.0, "3", 4.0]
            }),
        ),
        (
            "rope_scaling.long_factor", // depends on the length of sequences
            json!({ "type": "longrope", "short_factor": [1, 1, 1, 1], "long_factor": [2, 2, 2, 2],
                "original_max_position_embeddings": 64 }),
        ),
        ("attention", json!({ "type": "linear", "factor": 0.0 })),
        ("attention", json!({ "type": "linear", "factor": 1e-320 })),
        ("attention", json!({ "type": "yarn", "factor": 4.0, "attention_factor": 0.0 })),
    ] {
        llama.refuses(key, json!({ "rope_scaling": rule }));
    }
    llama.refuses("attention", json!({ "rope_theta": -1.0 }));
    llama.refuses("attention", json!({ "head_dim": 7 }));
    let linear = json!({ "rope_scaling": { "type": "linear", "factor": 2.0 } });
    let scaling = llama.first(linear).rotary.unwrap().scaling;
    assert_eq!(scaling, RotaryScaling::Linear { factor: 2.0 });

    // Sizes that no file can hold meet the file before they meet memory.
    for (key, value) in
        [("hidden_size", 1 << 30), ("num_attention_heads", 1 << 20), ("head_dim", 1 << 20)]
    {
        let found = llama.with(json!({ key: value }));
        let found = found.and_then(|checkpoint| checkpoint.attention_weights::<f64>(0));
        assert!(matches!(found.unwrap_err(), Error::Format { .. }), "{key}");
    }
    assert_eq!(llama.with(json!({ "num_hidden_layers": 1 << 30 })).unwrap().layers(), 1 << 30);

    let bert = Model::copy("impossible", "hf-bert");
    bert.refuses_value("position_embedding_type", json!("relative_key"));
    bert.refuses_value("head_dim", json!(8));
    bert.refuses_value("num_key_value_heads", json!(2));
    let neox = Model::copy("impossible", "hf-gpt_neox");
    neox.refuses_value("rope_theta", json!(5e5));
    neox.refuses_value("rotary_pct", json!(0.0));
    neox.refuses_value("partial_rotary_factor", json!(0.5));
    neox.with(json!({ "rotary_emb_base": 5e5, "rope_theta": 5e5 })).unwrap();
    fs::remove_file(bert.directory.0.join("config.json")).unwrap();
    assert!(matches!(Checkpoint::open(&bert.directory.0).unwrap_err(), Error::Io { .. }));
}

#[test]
fn layers_of_different_kinds() {
    let windows = |checkpoint: &Checkpoint| -> Vec<Option<usize>> {
        let config = |l| checkpoint.attention_config(l).unwrap().sliding_window;
        (0..checkpoint.layers()).map(config).collect()
    };
    // By default: Mistral all layers, Qwen from one on, Gemma 2 every other, Gemma 3 five of six.
    let mistral = Model::copy("kinds", "hf-mistral");
    assert_eq!(windows(&mistral.without("sliding_window").unwrap()), [Some(4096); 2]);
    assert_eq!(windows(&mistral.with(json!({ "sliding_window": null })).unwrap()), [None; 2]);
    mistral.refuses_value("layer_types", json!(["full_attention", "sliding_attention"]));
    mistral.refuses_value("sliding_window", json!(0));

    let mut qwen = Model::copy("kinds", "hf-qwen2");
    qwen.config.remove("layer_types");
    let off = qwen.with(json!({ "use_sliding_window": false })).unwrap();
    assert_eq!(windows(&off), [None; 2]);
    assert_eq!(windows(&qwen.with(json!({ "max_window_layers": 0 })).unwrap()), [Some(7); 2]);
    let listed = json!(["sliding_attention", "full_attention"]);
    let checkpoint = qwen.with(json!({ "layer_types": listed })).unwrap();
    assert_eq!(windows(&checkpoint), [Some(7), None]);
    qwen.refuses("layer_types", json!({ "layer_types": listed, "use_sliding_window": false }));
    qwen.refuses_value("layer_types", json!(["full_attention"]));
    qwen.refuses_value("layer_types", json!(["full_attention", "chunked_attention"]));

    let mut gemma2 = Model::copy("kinds", "hf-gemma2");
    gemma2.config.remove("layer_types");
    let checkpoint = gemma2.with(json!({ "num_hidden_layers": 5 })).unwrap();
    assert_eq!(windows(&checkpoint), [Some(7), None, Some(7), None, Some(7)]);
    gemma2.refuses_value("attn_logit_softcapping", json!(50.0));
    assert!(named(gemma2.without("attn_logit_softcapping")).ends_with("attn_logit_softcapping"));
    gemma2.refuses_value("use_bidirectional_attention", json!(true));
    assert_eq!(gemma2.first(json!({ "query_pre_attn_scalar": 144 })).scale, Some(1.0 / 12.0));
    let checkpoint = gemma2.without("query_pre_attn_scalar").unwrap();
    assert_eq!(checkpoint.attention_config(0).unwrap().scale, Some(1.0 / 16.0));
    gemma2.refuses("attention", json!({ "query_pre_attn_scalar": 0 }));

    // The file as transformers 4 writes it.
    let mut gemma3 = Model::copy("kinds", "hf-gemma3").without_rotary();
    for key in ["layer_types", "_sliding_window_pattern"] {
        gemma3.config.remove(key);
    }
    let older = json!({ "num_hidden_layers": 7, "rope_theta": 5e5, "rope_local_base_freq": 2e4,
        "rope_scaling": { "rope_type": "linear", "factor": 8.0 } });
    let checkpoint = gemma3.with(older).unwrap();
    assert_eq!(windows(&checkpoint)[3..], [Some(7), Some(7), None, Some(7)]);
    let rotary = |l| checkpoint.attention_config(l).unwrap().rotary.unwrap();
    assert_eq!((rotary(0).base, rotary(0).scaling), (2e4, RotaryScaling::None));
    assert_eq!((rotary(5).base, rotary(5).scaling), (5e5, RotaryScaling::Linear { factor: 8.0 }));
    let defaults = gemma3.with(json!({ "sliding_window_pattern": 2 })).unwrap();
    let base = |l| defaults.attention_config(l).unwrap().rotary.unwrap().base;
    assert_eq!((base(0), base(1), windows(&defaults)), (1e4, 1e6, vec![Some(7), None]));
    // Without windows the layers keep their rotary embeddings.
    let open = gemma3.with(json!({ "sliding_window_pattern": 2, "sliding_window": null })).unwrap();
    let config = open.attention_config(0).unwrap();
    assert_eq!((config.rotary.unwrap().base, config.sliding_window), (1e4, None));
    gemma3
        .refuses("rope_parameters.rope_theta", json!({ "rope_parameters": { "rope_theta": 1e4 } }));
    gemma3.refuses(
        "rope_parameters.sliding_attention.alpha",
        json!({ "rope_parameters": { "sliding_attention": { "alpha": 1.0 } } }),
    );
    let older_name = json!({ "rope_scaling": { "type": "linear", "factor": 8.0 } });
    gemma3.refuses("rope_scaling.type", older_name);
    gemma3.refuses_value("_sliding_window_pattern", json!(5));

    let mut smol = Model::copy("kinds", "hf-smollm3");
    let has_rotary = |checkpoint: Checkpoint| -> Vec<bool> {
        let config = |l| checkpoint.attention_config(l).unwrap().rotary.is_some();
        (0..checkpoint.layers()).map(config).collect()
    };
    assert_eq!(has_rotary(smol.with(json!({})).unwrap()), [true, false]);
    let listed = json!({ "no_rope_layers": [0, 1, 0] });
    assert_eq!(has_rotary(smol.with(listed).unwrap()), [false, true]);
    smol.refuses_value("no_rope_layers", json!([1]));
    smol.refuses_value("no_rope_layers", json!([1, 2]));
    smol.config.remove("layer_types");
    let local = json!({ "use_sliding_window": true, "sliding_window": 5 });
    assert_eq!(windows(&smol.with(local).unwrap()), [None, Some(5)]);
    smol.config.remove("no_rope_layers");
    let interval = json!({ "no_rope_layer_interval": 3, "num_hidden_layers": 4 });
    assert_eq!(has_rotary(smol.with(interval).unwrap()), [true, true, false, true]);

    let qwen3 = Model::copy("kinds", "hf-qwen3");
    assert_eq!(qwen3.first(json!({})).qk_norm, Some(1e-3));
    let checkpoint = qwen3.without("rms_norm_eps").unwrap();
    assert_eq!(checkpoint.attention_config(0).unwrap().qk_norm, Some(1e-6));
    let mut tensors = stored("hf-qwen3");
    tensors.remove("model.layers.1.self_attn.k_norm.weight");
    qwen3.directory.write_tensors("model.safetensors", &tensors);
    let found = qwen3.with(json!({})).unwrap().attention_weights::<f32>(1);
    assert!(named(found).ends_with("model.layers.1.self_attn.k_norm.weight"));
}

#[test]
fn overrides_and_lengths() {
    let model = Model::copy("overrides", "hf-mistral");
    let changes = json!({ "model_type": "ministral", "architectures": ["MinistralForCausalLM"] });
    model.refuses("model_type", changes);
    let options = |json: &str| CheckpointOptions::new().with_config(json);
    let open = |json: &str| options(json).open(&model.directory.0);
    let as_mistral = r#"{"model_type": "mistral", "architectures": null"#;
    let whole = open(&format!("{as_mistral}}}")).unwrap();
    assert_eq!(whole.attention_config(0).unwrap().sliding_window, Some(7));
    let open_window = open(&format!(r#"{as_mistral}, "sliding_window": null}}"#)).unwrap();
    assert_eq!(open_window.attention_config(0).unwrap().sliding_window, None);
    assert!(named(open("[]")).contains("config given"));
    assert!(named(open("{")).contains("config given"));
    assert!(named(open(r#"{"model_type": "gpt"}"#)).ends_with("model_type"));

    // The short list for short sequences, the long one for others, and none without a length.
    let path = golden("hf-phi3");
    let factors = |tokens| {
        let checkpoint = CheckpointOptions::new().with_length(tokens).open(&path).unwrap();
        match checkpoint.attention_config(0).unwrap().rotary.unwrap().scaling {
            RotaryScaling::LongRope { factors, .. } => factors,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(factors(16), [1.0, 1.1, 1.2, 1.3]);
    assert_eq!(factors(17), [1.0, 1.5, 2.5, 4.0]);
    assert!(named(Checkpoint::open(&path)).ends_with("rope_parameters.long_factor"));
    let short = CheckpointOptions::new().with_config(r#"{"max_position_embeddings": 16}"#);
    short.open(&path).unwrap();

    // The language model of a model for more than text, by its own config.
    let gemma = Model::copy("overrides", "hf-gemma3");
    let renamed = |from: &str| {
        let tensors = stored("hf-gemma3").into_iter();
        tensors.map(|(name, tensor)| (name.replace("model.", from), tensor)).collect()
    };
    for from in ["language_model.model.", "model.language_model."] {
        gemma.directory.write_tensors("model.safetensors", &renamed(from));
        let mut text = gemma.config.clone();
        text.insert("text_config".to_owned(), Value::Null);
        let outer = json!({ "model_type": "gemma3", "text_config": gemma.config,
            "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256 });
        gemma.directory.write("config.json", outer.to_string());
        let options = CheckpointOptions::new().with_config(Value::Object(text).to_string());
        let expected = Checkpoint::open(golden("hf-gemma3")).unwrap();
        let got = options.open(&gemma.directory.0).unwrap();
        assert_eq!(
            got.attention_weights::<f32>(0).unwrap(),
            expected.attention_weights::<f32>(0).unwrap()
        );
        assert!(named(Checkpoint::open(&gemma.directory.0)).ends_with("text_config"));
    }
}

/// What stands in the config files of published models opens as it is, but for Gemma 2's soft caps.
#[test]
fn configs_as_published() {
    let open = |name: &str, probe: &str, config: Value| {
        let directory = Directory::new(&format!("published-{name}"));
        directory.write("config.json", config.to_string());
        let weight = (probe.to_owned(), tensor(&[1]));
        directory.write_tensors("model.safetensors", &Stored::from([weight]));
        CheckpointOptions::new().with_length(131_072).open(&directory.0)
    };
    let q = "model.layers.0.self_attn.q_proj.weight";
    let config =
        |checkpoint: Result<Checkpoint>, l| checkpoint.unwrap().attention_config(l).unwrap();

    let smol = json!({ "architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers.js_config":
        { "kv_cache_dtype": { "q4f16": "float16", "fp16": "float16" } },
        "transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152 });
    let smol = config(open("smollm2", q, smol), 29);
    assert_eq!((smol.heads, smol.kv_heads, smol.head_dim), (9, 3, Some(64)));

    let mistral = json!({ "architectures": ["MistralForCausalLM"], "bos_token_id": 1,
        "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
        "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "torch_dtype": "bfloat16", "use_cache": true,
        "vocab_size": 32000 });
    assert_eq!(config(open("mistral", q, mistral), 0).sliding_window, Some(4096));

    let qwen2 = json!({ "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
        "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
        "torch_dtype": "bfloat16", "use_cache": true, "use_mrope": false,
        "use_sliding_window": false, "vocab_size": 151936 });
    assert_eq!(config(open("qwen2", q, qwen2), 23).sliding_window, None);

    let qwen3 = json!({ "architectures": ["Qwen3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024,
        "initializer_range": 0.02, "intermediate_size": 3072, "max_position_embeddings": 40960,
        "max_window_layers": 28, "model_type": "qwen3", "num_attention_heads": 16,
        "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
        "tie_word_embeddings": true, "use_cache": true, "use_sliding_window": false });
    assert_eq!(config(open("qwen3", q, qwen3), 0).qk_norm, Some(1e-6));

    let factors = |last: f64| (0..48).map(|i| 1.0 + last * f64::from(i)).collect::<Vec<_>>();
    let phi = json!({ "_name_or_path": "Phi-4-mini-instruct", "architectures": ["Phi3ForCausalLM"],
        "attention_bias": false, "attention_dropout": 0.0, "auto_map": {
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM" }, "embd_pdrop": 0.0,
        "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "interpolate_factor": 1,
        "lm_head_bias": false, "max_position_embeddings": 131072, "mlp_bias": false,
        "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
        "num_key_value_heads": 8, "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": { "long_factor": factors(0.7), "short_factor": factors(0.0),
        "type": "longrope" }, "rope_theta": 10000.0, "sliding_window": 262144,
        "tie_word_embeddings": true, "use_cache": true, "vocab_size": 200064 });
    let phi = config(open("phi4", "model.layers.0.self_attn.qkv_proj.weight", phi), 0);
    let rotary = phi.rotary.unwrap();
    assert_eq!((rotary.dims, phi.sliding_window), (Some(96), Some(262_144)));
    assert!(matches!(rotary.scaling, RotaryScaling::LongRope { attention_factor, .. }
        if (attention_factor - (1.0 + 32f64.ln() / 4096f64.ln()).sqrt()).abs() < 1e-15));

    let gemma3 = json!({ "architectures": ["Gemma3ForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "attn_logit_softcapping": null, "cache_implementation": "hybrid",
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512,
        "sliding_window_pattern": 6, "use_cache": true, "vocab_size": 262144 });
    let gemma3 = open("gemma3", q, gemma3).unwrap();
    let windowed = |l: &usize| gemma3.attention_config(*l).unwrap().sliding_window.is_some();
    assert_eq!((0..26).filter(|l| !windowed(l)).collect::<Vec<_>>(), [5, 11, 17, 23]);

    let gemma2 = json!({ "architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_size": 2304, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0, "sliding_window": 4096 });
    assert!(named(open("gemma2", q, gemma2)).ends_with(": attn_logit_softcapping"));

    let smollm3 = json!({ "architectures": ["SmolLM3ForCausalLM"], "attention_bias": false,
        "hidden_size": 2048, "max_position_embeddings": 65536, "max_window_layers": 28,
        "mlp_bias": false, "model_type": "smollm3", "no_rope_layer_interval": 4,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rope_scaling": null, "rope_theta": 5000000.0,
        "sliding_window": null, "use_sliding_window": false });
    assert_eq!(config(open("smollm3", q, smollm3), 3).rotary, None);

    let pythia = json!({ "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "max_position_embeddings": 2048,
        "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false,
        "use_parallel_residual": true, "vocab_size": 50304 });
    let place = "gpt_neox.layers.0.attention.query_key_value.weight";
    assert_eq!(config(open("pythia", place, pythia), 0).rotary.unwrap().dims, Some(16));

    let opt = json!({ "_remove_final_layer_norm": false, "activation_function": "relu",
        "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
        "do_layer_norm_before": true, "dropout": 0.1, "ffn_dim": 3072, "hidden_size": 768,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 12, "num_hidden_layers": 12, "prefix": "</s>",
        "word_embed_proj_dim": 768 });
    open("opt", "model.decoder.layers.0.self_attn.q_proj.weight", opt).unwrap();

    let bert = json!({ "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": false, "hidden_dropout_prob": 0.1, "hidden_size": 768,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "type_vocab_size": 2, "vocab_size": 30522 });
    open("bert", "bert.encoder.layer.0.attention.self.query.weight", bert).unwrap();
}
