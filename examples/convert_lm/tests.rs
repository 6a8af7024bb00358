//! The loader against files that are whole, split, foreign or damaged; the stream against the whole sequence.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use ndarray::s;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::evaluate::bits_per_byte;
use crate::llama::Llama;
use crate::text::Text;

const HIDDEN: usize = 8;
const INNER: usize = 12;
const HEAD_DIM: usize = 4;

/// A directory of its own for every test, removed when the test is over.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dijiang-convert_lm-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).expect("a temporary directory");
        Self(path)
    }

    /// A directory with a whole model of two layers in it.
    fn with_model(test: &str) -> Self {
        let directory = Self::new(test);
        directory.write("config.json", config().to_string());
        directory.write_tensors("model.safetensors", &tensors());
        directory
    }

    fn write(&self, file: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), contents).expect("a file");
    }

    fn write_tensors(&self, file: &str, tensors: &Tensors) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape asks for"))
        });
        self.write(file, safetensors::serialize(views, None).expect("valid tensors"));
    }

    fn load_error(&self) -> Error {
        load(&self.0).map(|_| ()).expect_err("an error")
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn load(directory: &Path) -> Result<Llama<dijiang::layer::SoftmaxAttention<f32>>> {
    Llama::load(directory)
}

fn config() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM, "vocab_size": 256, "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": true
    })
}

/// Weights that bf16 holds exactly, stored as f32.
fn tensors() -> Tensors {
    let mut shapes = vec![("model.embed_tokens.weight".to_owned(), vec![256, HIDDEN]), ("model.norm.weight".to_owned(), vec![HIDDEN])];
    for l in 0..2 {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("self_attn.q_proj", vec![4 * HEAD_DIM, HIDDEN]),
            ("self_attn.k_proj", vec![2 * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![2 * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, 4 * HEAD_DIM]),
            ("mlp.gate_proj", vec![INNER, HIDDEN]),
            ("mlp.up_proj", vec![INNER, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INNER]),
        ] {
            shapes.push((format!("model.layers.{l}.{name}.weight"), shape));
        }
    }
    let tensor = |(i, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = (0..shape.iter().product()).map(|j: usize| ((j * j * 7 + j * 13 + i * 5) % 17) as f32 / 16.0 - 0.5);
        (name, (Dtype::F32, shape, values.flat_map(f32::to_le_bytes).collect()))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

fn to_bf16(tensors: &Tensors) -> Tensors {
    let convert =
        |bytes: &Vec<u8>| bytes.as_chunks::<4>().0.iter().flat_map(|&b| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()).collect();
    tensors.iter().map(|(name, (_, shape, bytes))| (name.clone(), (Dtype::BF16, shape.clone(), convert(bytes)))).collect()
}

const TOKENS: &[u8] = b"In the beginning";

#[test]
fn shards_and_short_floats_are_the_same_model() {
    let directory = Directory::with_model("shards");
    let whole = load(&directory.0).and_then(|model| model.forward(TOKENS)).expect("logits");
    fs::remove_file(directory.0.join("model.safetensors")).expect("the whole file");
    let mut first = to_bf16(&tensors());
    let second = first.split_off("model.layers.1");
    directory.write_tensors("a.safetensors", &first);
    directory.write_tensors("b.safetensors", &second);
    let file = |(name, file): (&String, &str)| (name.clone(), json!(file));
    let names = first.keys().map(|name| (name, "a.safetensors")).chain(second.keys().map(|name| (name, "b.safetensors")));
    let map: serde_json::Map<String, Value> = names.map(file).collect();
    directory.write("model.safetensors.index.json", json!({ "metadata": {}, "weight_map": map }).to_string());
    assert_eq!(load(&directory.0).and_then(|model| model.forward(TOKENS)).expect("logits"), whole);

    directory.write("model.safetensors.index.json", json!({ "weight_map": { "model.norm.weight": "../a.safetensors" } }).to_string());
    assert!(matches!(directory.load_error(), Error::Config { key: "weight_map", .. }));
}

#[test]
fn damaged_weights_are_refused() {
    let directory = Directory::with_model("damaged");
    let path = directory.0.join("model.safetensors");
    let bytes = fs::read(&path).expect("the file");
    for keep in [0, 4, 8, 100, bytes.len() / 2, bytes.len() - 1] {
        directory.write("model.safetensors", &bytes[..keep]);
        assert!(matches!(directory.load_error(), Error::Safetensors { .. } | Error::Io { .. }), "{keep} bytes");
    }
    directory.write("model.safetensors", "this is not a model, but it is long enough to look like one");
    assert!(matches!(directory.load_error(), Error::Safetensors { .. }));
    fs::remove_file(&path).expect("the file");
    assert!(matches!(directory.load_error(), Error::Io { .. }));
}

#[test]
fn foreign_weights_are_refused() {
    let directory = Directory::with_model("foreign");
    let up = "model.layers.1.mlp.up_proj.weight";
    let change = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = tensors();
        change(&mut tensors);
        directory.write_tensors("model.safetensors", &tensors);
        directory.load_error()
    };
    let error = change(&|tensors| drop(tensors.remove(up)));
    assert!(matches!(error, Error::MissingTensor { ref name, .. } if name == up), "{error}");
    let error = change(&|tensors| tensors.get_mut(up).expect("a tensor").1 = vec![HIDDEN, INNER]);
    assert!(
        matches!(error, Error::TensorShape { ref name, ref expected, ref found, .. }
            if name == up && expected == &[INNER, HIDDEN] && found == &[HIDDEN, INNER]),
        "{error}"
    );
    let error = change(&|tensors| tensors.get_mut(up).expect("a tensor").0 = Dtype::U32);
    assert!(matches!(error, Error::TensorType { found: Dtype::U32, .. }), "{error}");
    let error = change(&|tensors| tensors.get_mut(up).expect("a tensor").2[8..12].copy_from_slice(&f32::NAN.to_le_bytes()));
    assert!(matches!(error, Error::TensorValue { index: 2, .. }), "{error}");
}

#[test]
fn foreign_configs_are_refused() {
    let directory = Directory::new("configs");
    let read = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        directory.write("config.json", config.to_string());
        LlamaConfig::read(&directory.0)
    };
    for (key, value) in [
        ("model_type", json!("bert")),
        ("hidden_act", json!("gelu")),
        ("hidden_size", json!(0)),
        ("num_hidden_layers", json!(0)),
        ("num_attention_heads", json!(0)),
        ("num_key_value_heads", json!(3)),
        ("head_dim", json!(0)),
        ("vocab_size", json!(u64::MAX)),
        ("rms_norm_eps", json!(-1.0)),
        ("rope_scaling", json!({ "rope_type": "yarn", "factor": 4.0 })),
        ("rope_scaling", json!({ "type": "linear" })),
        ("rope_scaling", json!("linear")),
    ] {
        let text = value.to_string();
        let found = read(key, value);
        assert!(matches!(found, Err(Error::Config { key: named, .. }) if named == key), "{key}: {text}: {found:?}");
    }
    for value in [json!(-1), json!("8"), json!(null), json!(8.5)] {
        assert!(matches!(read("hidden_size", value), Err(Error::Json { .. })));
    }
    for value in [
        json!(null),
        json!({ "rope_type": "default" }),
        json!({ "type": "linear", "factor": 2.0 }),
        json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192 }),
    ] {
        read("rope_scaling", value).expect("a supported scaling");
    }
    read("rope_parameters", json!({ "rope_type": "default", "rope_theta": 5e5 })).expect("the newer spelling");

    let directory = Directory::with_model("vocabulary");
    let mut config = config();
    config["vocab_size"] = json!(32000);
    directory.write("config.json", config.to_string());
    assert!(matches!(directory.load_error(), Error::Vocabulary { found: 32000 }));
}

#[test]
fn a_stream_is_the_whole_sequence() {
    let directory = Directory::with_model("stream");
    let model = load(&directory.0).expect("a model");
    let whole = model.forward(TOKENS).expect("logits");
    let mut stream = model.stream();
    let begun = stream.prefill(&TOKENS[..5]).expect("logits");
    let difference =
        |a: ndarray::ArrayViewD<'_, f32>, b: ndarray::ArrayViewD<'_, f32>| (&a - &b).iter().fold(0.0_f32, |max, x| max.max(x.abs()));
    assert!(difference(begun.view().into_dyn(), whole.slice(s![..5, ..]).into_dyn()) < 1e-4);
    for (i, &token) in TOKENS.iter().enumerate().skip(5) {
        let logits = stream.step(token).expect("logits");
        assert!(difference(logits.view().into_dyn(), whole.row(i).into_dyn()) < 1e-4, "token {i}");
    }
}

#[test]
fn text_is_cut_into_windows_with_successors() {
    let directory = Directory::with_model("text");
    let path = directory.0.join("text");
    let bytes: Vec<u8> = (0..100).collect();
    for (len, windows) in [(17, 1), (32, 1), (33, 2), (96, 5), (97, 6)] {
        directory.write("text", &bytes[..len]);
        let text = Text::read(&path, 16).expect("a text");
        assert_eq!(text.windows(), windows, "{len} bytes");
        let last = windows - 1;
        assert_eq!(text.input(last), &bytes[last * 16..windows * 16]);
        assert_eq!(text.targets(last), &bytes[last * 16 + 1..windows * 16 + 1]);
        assert_eq!(text.spread(3).count(), windows.min(3));
    }
    directory.write("text", &bytes[..16]);
    assert!(matches!(Text::read(&path, 16), Err(Error::TextTooShort { expected: 17, found: 16, .. })));

    // All logits equal: every byte costs eight bits.
    let mut tensors = tensors();
    tensors.get_mut("model.embed_tokens.weight").expect("a tensor").2.fill(0);
    directory.write_tensors("model.safetensors", &tensors);
    directory.write("text", &bytes);
    let text = Text::read(&path, 16).expect("a text");
    let bits = load(&directory.0).and_then(|model| bits_per_byte(&model, &text, 6, || ())).expect("bits");
    assert!((bits - 8.0).abs() < 1e-12, "{bits}");
}
