//! Model directories of every family: against what transformers gave, and damaged in every way.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use common::assert_close;
use dijiang::attention::KeyMask;
use dijiang::checkpoint::{Checkpoint, Family, Tensors};
use dijiang::layer::{Attention, AttentionWeights, Causality, RotaryScaling, SoftmaxAttention};
use dijiang::{Error, Result};
use half::{bf16, f16};
use ndarray::{Array1, Array2, Array3, s};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

const FAMILIES: [(&str, Family); 4] = [
    ("hf-llama", Family::Llama),
    ("hf-gpt_neox", Family::GptNeox),
    ("hf-opt", Family::Opt),
    ("hf-bert", Family::Bert),
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// A directory of its own for every test, removed when the test is over.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("dijiang-checkpoint-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a golden model.
    fn copy(test: &str, name: &str) -> Self {
        let directory = Self::new(test);
        for file in ["config.json", "model.safetensors"] {
            directory.write(file, fs::read(golden(name).join(file)).unwrap());
        }
        directory
    }

    fn write(&self, file: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), contents).unwrap();
    }

    fn write_tensors(&self, file: &str, tensors: &Stored) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        self.write(file, safetensors::serialize(views, None).unwrap());
    }

    /// The first layer's weights.
    fn weights(&self) -> Result<AttentionWeights<f32>> {
        Checkpoint::open(&self.0)?.attention_weights(0)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn stored(name: &str) -> Stored {
    let bytes = fs::read(golden(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, view)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        })
        .collect()
}

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

/// What [`Error::Format`] names.
fn named<T>(found: Result<T>) -> String {
    match found.map(|_| ()).unwrap_err() {
        Error::Format { name, .. } => name,
        other => panic!("{other}"),
    }
}

#[test]
fn every_family_gives_what_transformers_gave() {
    for (name, family) in FAMILIES {
        let checkpoint = Checkpoint::open(golden(name)).unwrap();
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
            let rows = |what: &str| golden_rows(name, &format!("layers.{l}.attention_{what}"));
            let (x, expected) = (rows("input"), rows("output").mapv(f64::from));
            assert_close(name, &attention.forward_batch(&x, None).unwrap(), &expected, 1e-5);
            if attention.config().causality == Causality::Causal {
                for (x, expected) in x.outer_iter().zip(expected.outer_iter()) {
                    let mut state = attention.new_state();
                    attention.prefill(&mut state, &x.slice(s![..7, ..]), KeyMask::All).unwrap();
                    for (i, x) in x.outer_iter().enumerate().skip(7) {
                        let mut out = Array1::zeros(64);
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

fn golden_rows(name: &str, tensor: &str) -> Array3<f32> {
    let bytes = fs::read(golden(name).join("io.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let values = tensors
        .tensor(tensor)
        .unwrap()
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect();
    Array3::from_shape_vec((2, 40, 64), values).unwrap()
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

#[test]
fn impossible_configs_are_refused() {
    let directory = Directory::copy("configs", "hf-llama");
    let good: Value =
        serde_json::from_slice(&fs::read(golden("hf-llama").join("config.json")).unwrap()).unwrap();
    let open = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        directory.write("config.json", config.to_string());
        Checkpoint::open(&directory.0)
    };
    for (key, value) in [
        ("model_type", json!("mamba")),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(u64::MAX)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 })),
        ("rope_scaling", json!({ "type": "linear" })),
        ("rope_scaling", json!("linear")),
    ] {
        let text = value.to_string();
        assert!(named(open(key, value)).ends_with(key), "{key}: {text}");
    }
    for (key, value) in [
        ("rope_theta", json!(-1.0)),
        ("rope_scaling", json!({ "type": "linear", "factor": 0.0 })),
        ("head_dim", json!(7)),
    ] {
        assert!(named(open(key, value)).ends_with("attention"), "{key}");
    }
    for value in [json!(-1), json!("8"), json!(null), json!(8.5)] {
        assert!(named(open("hidden_size", value)).ends_with("config.json"));
    }
    // Sizes that no file can hold meet the file before they meet memory.
    for (key, value) in [
        ("hidden_size", json!(1 << 30)),
        ("num_attention_heads", json!(1 << 20)),
        ("head_dim", json!(1 << 20)),
    ] {
        let found = open(key, value).and_then(|checkpoint| checkpoint.attention_weights::<f64>(0));
        assert!(matches!(found.unwrap_err(), Error::Format { .. }), "{key}");
    }
    assert_eq!(open("num_hidden_layers", json!(1 << 30)).unwrap().layers(), 1 << 30);
    let scaling = |value| {
        open("rope_scaling", value).unwrap().attention_config().rotary.clone().unwrap().scaling
    };
    assert_eq!(scaling(json!({ "rope_type": "default" })), RotaryScaling::None);
    assert_eq!(
        scaling(json!({ "type": "linear", "factor": 2.0 })),
        RotaryScaling::Linear { factor: 2.0 }
    );
    let llama3 = json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192 });
    assert!(matches!(scaling(llama3), RotaryScaling::Llama3 { original_context: 8192, .. }));
    // Newer files have base, scaling and share of rotated coordinates in one place.
    for (name, older) in [("hf-llama", "rope_theta"), ("hf-gpt_neox", "rotary_emb_base")] {
        let directory = Directory::copy(&format!("newer-{name}"), name);
        let mut config: Value =
            serde_json::from_slice(&fs::read(golden(name).join("config.json")).unwrap()).unwrap();
        let object = config.as_object_mut().unwrap();
        for key in [
            older,
            "rotary_emb_base",
            "rope_theta",
            "rotary_pct",
            "partial_rotary_factor",
            "rope_scaling",
        ] {
            object.remove(key);
        }
        let parameters = json!({ "rope_type": "linear", "factor": 3.0, "rope_theta": 5e5, "partial_rotary_factor": 0.5 });
        object.insert("rope_parameters".to_owned(), parameters);
        directory.write("config.json", config.to_string());
        let checkpoint = Checkpoint::open(&directory.0).unwrap();
        let rotary = checkpoint.attention_config().rotary.clone().unwrap();
        assert_eq!(
            (rotary.base, rotary.scaling),
            (5e5, RotaryScaling::Linear { factor: 3.0 }),
            "{name}"
        );
        assert_eq!(rotary.dims, (name == "hf-gpt_neox").then_some(8), "{name}");
    }

    let directory = Directory::copy("configs-bert", "hf-bert");
    let mut config: Value =
        serde_json::from_slice(&fs::read(golden("hf-bert").join("config.json")).unwrap()).unwrap();
    config["position_embedding_type"] = json!("relative_key");
    directory.write("config.json", config.to_string());
    assert!(named(Checkpoint::open(&directory.0)).ends_with("position_embedding_type"));
    fs::remove_file(directory.0.join("config.json")).unwrap();
    assert!(matches!(Checkpoint::open(&directory.0).unwrap_err(), Error::Io { .. }));
}
