//! Model directories of every family: against what transformers gave, and damaged in every way.

use std::fs;

use dijiang::Error;
use dijiang::attention::KeyMask;
use dijiang::checkpoint::{Checkpoint, CheckpointOptions, Family, Tensors};
use dijiang::layer::{Attention, AttentionWeights, Causality, SoftmaxAttention};
use dijiang_testing::assert_close;
use dijiang_testing::models::{Directory, Stored, golden, named, stored};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, s};
use safetensors::Dtype;
use serde_json::{Value, json};

const FAMILIES: [(&str, Family); 12] = [
    ("hf-llama", Family::Llama),
    ("hf-gpt_neox", Family::GptNeox),
    ("hf-opt", Family::Opt),
    ("hf-bert", Family::Bert),
    ("hf-mistral", Family::Mistral),
    ("hf-qwen2", Family::Qwen2),
    ("hf-qwen3", Family::Qwen3),
    ("hf-phi3", Family::Phi3),
    ("hf-gemma", Family::Gemma),
    ("hf-gemma2", Family::Gemma2),
    ("hf-gemma3", Family::Gemma3),
    ("hf-smollm3", Family::SmolLm3),
];

/// The same numbers, as well as two bytes hold them.
fn shortened(tensors: &Stored, dtype: Dtype) -> Stored {
    let short = |bytes: [u8; 4]| match dtype {
        Dtype::F16 => f16::from_f32(f32::from_le_bytes(bytes)).to_le_bytes(),
        _ => bf16::from_f32(f32::from_le_bytes(bytes)).to_le_bytes(),
    };
    let shorten =
        |bytes: &[u8]| bytes.as_chunks().0.iter().flat_map(|&bytes| short(bytes)).collect();
    tensors
        .iter()
        .map(|(name, (_, shape, bytes))| (name.clone(), (dtype, shape.clone(), shorten(bytes))))
        .collect()
}

#[test]
fn every_family_gives_what_transformers_gave() {
    for (name, family) in FAMILIES {
        // The golden outputs of 24 tokens: beyond the short context of Phi 3's LongRoPE.
        let checkpoint = CheckpointOptions::new().with_length(24).open(golden(name)).unwrap();
        assert_eq!((checkpoint.family(), checkpoint.layers()), (family, 2));
        let io = Tensors::open_file(golden(name).join("io.safetensors")).unwrap();
        for l in 0..2 {
            let mut attention = checkpoint.softmax_attention::<f32>(l).unwrap();
            if family == Family::Bert {
                // The golden output is taken before the output projection.
                let AttentionWeights { q, k, v, q_bias, k_bias, v_bias, .. } =
                    AttentionWeights::clone(attention.weights());
                let weights = AttentionWeights::new(q, k, v, Array2::eye(64));
                let weights =
                    weights.with_qkv_biases(q_bias.unwrap(), k_bias.unwrap(), v_bias.unwrap());
                attention = SoftmaxAttention::new(attention.config().clone(), weights).unwrap();
            }
            let rows = |what: &str| golden_rows(&io, &format!("layers.{l}.attention_{what}"));
            let (x, expected) = (rows("input"), rows("output").mapv(f64::from));
            assert_close(name, &attention.forward_batch(&x, None).unwrap(), &expected, 1e-5);
            if attention.config().causality == Causality::Causal {
                for (x, expected) in x.outer_iter().zip(expected.outer_iter()) {
                    let mut state = attention.new_state();
                    attention.prefill(&mut state, &x.slice(s![..7, ..]), KeyMask::All).unwrap();
                    for (i, x) in x.outer_iter().enumerate().skip(7) {
                        let mut out = Array1::zeros(x.len());
                        attention.step(&mut state, &x, &mut out).unwrap();
                        assert_close(name, &out, &expected.row(i), 1e-5);
                    }
                }
            }
        }
        assert!(
            io.contains("layers.0.attention_input") && !io.contains("layers.2.attention_input")
        );
        let beyond = checkpoint.attention_weights::<f32>(2).unwrap_err();
        assert!(matches!(beyond, Error::Value { argument: "layer", .. }), "{beyond}");
    }
}

fn golden_rows(io: &Tensors, tensor: &str) -> Array3<f32> {
    let &[b, n, width] = io.shape(tensor).unwrap() else { panic!("{tensor}") };
    Array3::from_shape_vec((b, n, width), io.numbers(tensor, &[b, n, width]).unwrap()).unwrap()
}

#[test]
fn prefixes_shards_and_short_floats() {
    // The golden BERT is stored without its prefix, the others with theirs.
    for (name, prefix) in [
        ("hf-llama", "model."),
        ("hf-gpt_neox", "gpt_neox."),
        ("hf-opt", "model."),
        ("hf-bert", "bert."),
    ] {
        let directory = Directory::copy(&format!("prefix-{name}"), name);
        let whole = directory.weights().unwrap();
        let rename = |name: &str| {
            name.strip_prefix(prefix).map_or_else(|| format!("{prefix}{name}"), str::to_owned)
        };
        let renamed =
            stored(name).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
        directory.write_tensors("model.safetensors", &renamed);
        assert_eq!(directory.weights().unwrap(), whole, "{name} with other prefixes");
    }
    let directory = Directory::copy("shards", "hf-llama");
    for dtype in [Dtype::F16, Dtype::BF16] {
        directory.write_tensors("model.safetensors", &shortened(&stored("hf-llama"), dtype));
        let whole = directory.weights().unwrap();
        let exact =
            Checkpoint::open(golden("hf-llama")).unwrap().attention_weights::<f32>(0).unwrap();
        let rounded = |x: f32| {
            if dtype == Dtype::F16 { f16::from_f32(x).to_f32() } else { bf16::from_f32(x).to_f32() }
        };
        let AttentionWeights { q, k, v, o, .. } = AttentionWeights::clone(&exact);
        let expected = AttentionWeights::new(
            q.mapv(rounded),
            k.mapv(rounded),
            v.mapv(rounded),
            o.mapv(rounded),
        );
        assert!(expected == whole && expected != exact, "{dtype:?}");

        fs::remove_file(directory.0.join("model.safetensors")).unwrap();
        let mut first = shortened(&stored("hf-llama"), dtype);
        let second = first.split_off("model.layers.0.self_attn.o_proj.weight");
        directory.write_tensors("a.safetensors", &first);
        directory.write_tensors("b.safetensors", &second);
        let file = |(name, file): (&String, &str)| (name.clone(), json!(file));
        let names = first
            .keys()
            .map(|name| (name, "a.safetensors"))
            .chain(second.keys().map(|name| (name, "b.safetensors")));
        let map: serde_json::Map<String, Value> = names.map(file).collect();
        directory.write(
            "model.safetensors.index.json",
            json!({ "metadata": {}, "weight_map": map }).to_string(),
        );
        assert_eq!(directory.weights().unwrap(), whole);
        fs::remove_file(directory.0.join("model.safetensors.index.json")).unwrap();
    }
    for elsewhere in ["../a.safetensors", "/etc/passwd", "", ".."] {
        directory.write(
            "model.safetensors.index.json",
            json!({ "weight_map": { "model.norm.weight": elsewhere } }).to_string(),
        );
        assert!(named(directory.weights()).ends_with("weight_map"), "{elsewhere}");
    }
    directory.write(
        "model.safetensors.index.json",
        json!({ "weight_map": { "a": "missing.safetensors" } }).to_string(),
    );
    assert!(matches!(
        directory.weights().unwrap_err(),
        Error::Io { kind: std::io::ErrorKind::NotFound, .. }
    ));
    directory.write("model.safetensors.index.json", "{");
    assert!(named(directory.weights()).ends_with("index.json"));
}

#[test]
fn damaged_files_are_refused() {
    let directory = Directory::copy("damaged", "hf-opt");
    let bytes = fs::read(directory.0.join("model.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(*bytes.first_chunk().unwrap()) as usize;
    for keep in (0..header + 64).step_by(97).chain([bytes.len() / 2, bytes.len() - 1]) {
        directory.write("model.safetensors", &bytes[..keep]);
        assert!(
            matches!(directory.weights().unwrap_err(), Error::Format { .. } | Error::Io { .. }),
            "{keep} bytes"
        );
    }
    // A flipped bit of the header is found, or makes no difference to what is read, or to names
    // nobody asks for.
    for bit in (0..8 * header).step_by(13) {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        directory.write("model.safetensors", &flipped);
        if let Err(error) = directory.weights() {
            assert!(matches!(error, Error::Format { .. }), "bit {bit}: {error}");
        }
    }
    fs::remove_file(directory.0.join("model.safetensors")).unwrap();
    assert!(matches!(
        directory.weights().unwrap_err(),
        Error::Io { kind: std::io::ErrorKind::NotFound, .. }
    ));
    fs::create_dir(directory.0.join("model.safetensors")).unwrap();
    assert!(matches!(directory.weights().unwrap_err(), Error::Io { .. }));
}

#[test]
fn foreign_tensors_are_refused() {
    for (name, tensor) in [
        ("hf-llama", "model.layers.0.self_attn.k_proj.weight"),
        ("hf-gpt_neox", "gpt_neox.layers.0.attention.query_key_value.bias"),
        ("hf-opt", "model.decoder.layers.0.self_attn.out_proj.weight"),
        ("hf-bert", "encoder.layer.0.attention.output.dense.bias"),
    ] {
        let directory = Directory::copy(&format!("tensors-{name}"), name);
        let change = |change: &dyn Fn(&mut Stored)| {
            let mut tensors = stored(name);
            change(&mut tensors);
            directory.write_tensors("model.safetensors", &tensors);
            named(directory.weights())
        };
        let at = |tensors: &mut Stored| tensors.get_mut(tensor).unwrap().clone();
        let put = |tensors: &mut Stored, new| drop(tensors.insert(tensor.to_owned(), new));
        assert!(change(&|tensors| drop(tensors.remove(tensor))).ends_with(tensor));
        let reshaped = change(&|tensors| {
            let (dtype, mut shape, bytes) = at(tensors);
            shape.push(1);
            put(tensors, (dtype, shape, bytes));
        });
        assert!(reshaped.ends_with(tensor));
        let whole_numbers = change(&|tensors| {
            let (_, shape, bytes) = at(tensors);
            put(tensors, (Dtype::I32, shape, bytes));
        });
        assert!(whole_numbers.ends_with(tensor));
        for bad in [f32::NAN, f32::NEG_INFINITY, 3e38] {
            let not_finite = change(&|tensors| {
                tensors.get_mut(tensor).unwrap().2[8..12].copy_from_slice(&bad.to_le_bytes())
            });
            assert!(not_finite.ends_with(tensor));
        }
    }
}

/// An index says where tensors are; what it says and the shards do not hold is an error at once,
/// and where there is one file an index beside it is of another time.
#[test]
fn indices_that_do_not_fit() {
    const INDEX: &str = "model.safetensors.index.json";
    let directory = Directory::copy("indices", "hf-llama");
    let index = |map: Value| json!({ "metadata": {}, "weight_map": map }).to_string();
    let whole = directory.weights().unwrap();
    directory.write(INDEX, index(json!({ "model.norm.weight": "gone.safetensors" })));
    assert_eq!(directory.weights().unwrap(), whole);
    directory.write(INDEX, "{");
    assert_eq!(directory.weights().unwrap(), whole);

    fs::rename(directory.0.join("model.safetensors"), directory.0.join("a.safetensors")).unwrap();
    let all = || stored("hf-llama").into_keys();
    let map = |names: Vec<String>| -> Value {
        names.into_iter().map(|name| (name, json!("a.safetensors"))).collect()
    };
    directory.write(INDEX, index(map(all().collect())));
    assert_eq!(directory.weights().unwrap(), whole);
    // A tensor that is not listed is there all the same, and refused if it is one of attention.
    let mut listed = all().collect::<Vec<_>>();
    let absent = "model.layers.7.self_attn.q_proj.weight";
    listed.push(absent.to_owned());
    directory.write(INDEX, index(map(listed)));
    assert!(named(Checkpoint::open(&directory.0)).ends_with(absent));
    let mut tensors = stored("hf-llama");
    let norm = "model.layers.1.self_attn.q_norm.weight";
    tensors.insert(norm.to_owned(), (Dtype::F32, vec![8], vec![0; 32]));
    directory.write_tensors("a.safetensors", &tensors);
    directory.write(INDEX, index(map(all().collect())));
    assert_eq!(named(Checkpoint::open(&directory.0)), norm);
    // One that several shards hold, and the index none.
    directory.write_tensors("a.safetensors", &stored("hf-llama"));
    directory.write_tensors("b.safetensors", &stored("hf-llama"));
    let twice = json!({ "model.norm.weight": "a.safetensors", "lm_head.weight": "b.safetensors" });
    directory.write(INDEX, index(twice));
    assert!(named(Checkpoint::open(&directory.0)).contains(INDEX));
    directory.write(INDEX, r#"{"weight_map": ["a.safetensors"]}"#);
    assert!(named(Checkpoint::open(&directory.0)).ends_with(INDEX));
}

#[test]
fn messages_say_what_is_there_instead() {
    for other in ["pytorch_model.bin", "consolidated.safetensors", "model-q4_k_m.gguf"] {
        let directory = Directory::copy(&format!("instead-{other}"), "hf-llama");
        fs::rename(directory.0.join("model.safetensors"), directory.0.join(other)).unwrap();
        let error = directory.weights().unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains(other), "{error}");
    }
    let directory = Directory::copy("instead-names", "hf-llama");
    let quantised = stored("hf-llama")
        .into_iter()
        .map(|(name, tensor)| (name.replace("q_proj.weight", "q_proj.qweight"), tensor));
    directory.write_tensors("model.safetensors", &quantised.collect());
    let error = directory.weights().unwrap_err().to_string();
    assert!(error.contains("q_proj.weight") && error.contains(".self_attn."), "{error}");
}

/// Tensors of older versions under the attention that say nothing the config does not say.
#[test]
fn tables_and_masks_of_older_versions() {
    let with = |name: &str, more: &[(&str, Dtype, Vec<usize>)]| {
        let directory = Directory::copy(&format!("older-{name}"), name);
        let mut tensors = stored(name);
        for (tensor, dtype, shape) in more {
            let size = if *dtype == Dtype::F32 { 4 } else { 1 };
            let bytes = vec![0; size * shape.iter().product::<usize>()];
            tensors.insert((*tensor).to_owned(), (*dtype, shape.clone(), bytes));
        }
        directory.write_tensors("model.safetensors", &tensors);
        directory.weights()
    };
    let place = "gpt_neox.layers.0.attention.";
    let mask = [&format!("{place}bias")[..], &format!("{place}masked_bias")];
    let table = &format!("{place}rotary_emb.inv_freq")[..];
    let older = [
        (mask[0], Dtype::BOOL, vec![1, 1, 128, 128]),
        (mask[1], Dtype::F32, vec![]),
        (table, Dtype::F32, vec![2]),
    ];
    with("hf-gpt_neox", &older).unwrap();
    assert_eq!(named(with("hf-gpt_neox", &[(mask[0], Dtype::F32, vec![192])])), mask[0]);
    let norm = "encoder.layer.1.attention.output.LayerNorm.gamma";
    with("hf-bert", &[(norm, Dtype::F32, vec![64])]).unwrap();
    let distances = "encoder.layer.1.attention.self.distance_embedding.weight";
    assert_eq!(named(with("hf-bert", &[(distances, Dtype::F32, vec![255, 16])])), distances);
}
