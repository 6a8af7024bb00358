//! Models that are not for this program; the stream against the whole sequence.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dijiang::checkpoint::Family;
use ndarray::s;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::lm::error::{Error, Result};
use crate::lm::evaluate::score;
use crate::lm::llama::Llama;
use crate::lm::text::Text;

const HIDDEN: usize = 8;
const INNER: usize = 12;
const HEAD_DIM: usize = 4;

/// A directory of its own for every test, removed when the test is over.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("dijiang-convert_lm-{}-{test}", std::process::id()));
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
            (
                name,
                TensorView::new(*dtype, shape.clone(), bytes)
                    .expect("as many bytes as the shape asks for"),
            )
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
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![256, HIDDEN]),
        ("model.norm.weight".to_owned(), vec![HIDDEN]),
    ];
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
        let values = (0..shape.iter().product())
            .map(|j: usize| ((j * j * 7 + j * 13 + i * 5) % 17) as f32 / 16.0 - 0.5);
        (name, (Dtype::F32, shape, values.flat_map(f32::to_le_bytes).collect()))
    };
    shapes.into_iter().enumerate().map(tensor).collect()
}

const TOKENS: &[u8] = b"In the beginning";

#[test]
fn foreign_models_are_refused() {
    let directory = Directory::with_model("foreign");
    let read = |key: &str, value: Value| {
        let mut config = config();
        config[key] = value;
        directory.write("config.json", config.to_string());
        directory.load_error()
    };
    for (key, value) in [
        ("hidden_act", json!("gelu")),
        ("vocab_size", json!(u64::MAX)),
        ("rms_norm_eps", json!(-1.0)),
    ] {
        let error = read(key, value);
        assert!(
            matches!(error, Error::Config { key: named, .. } if named == key),
            "{key}: {error}"
        );
    }
    assert!(matches!(read("vocab_size", json!(32000)), Error::Vocabulary { found: 32000 }));
    assert!(matches!(read("model_type", json!("opt")), Error::Family { found: Family::Opt, .. }));
    assert!(matches!(read("intermediate_size", json!("8")), Error::Json { .. }));
    assert!(matches!(read("head_dim", json!(0)), Error::Model(dijiang::Error::Format { .. })));
    directory.write("config.json", config().to_string());
    fs::remove_file(directory.0.join("model.safetensors")).expect("the file");
    assert!(matches!(directory.load_error(), Error::Model(dijiang::Error::Io { .. })));
}

#[test]
fn a_stream_is_the_whole_sequence() {
    let directory = Directory::with_model("stream");
    let model = load(&directory.0).expect("a model");
    let whole = model.forward(TOKENS).expect("logits");
    let mut stream = model.stream();
    let begun = stream.prefill(&TOKENS[..5]).expect("logits");
    let difference = |a: ndarray::ArrayViewD<'_, f32>, b: ndarray::ArrayViewD<'_, f32>| {
        (&a - &b).iter().fold(0.0_f32, |max, x| max.max(x.abs()))
    };
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
    assert!(matches!(
        Text::read(&path, 16),
        Err(Error::TextTooShort { expected: 17, found: 16, .. })
    ));

    // All logits equal: every byte costs eight bits.
    let mut tensors = tensors();
    tensors.get_mut("model.embed_tokens.weight").expect("a tensor").2.fill(0);
    directory.write_tensors("model.safetensors", &tensors);
    directory.write("text", &bytes);
    let text = Text::read(&path, 16).expect("a text");
    let bits =
        load(&directory.0).and_then(|model| bits_per_byte(&model, &text, 6, || ())).expect("bits");
    assert!((bits - 8.0).abs() < 1e-12, "{bits}");
}
