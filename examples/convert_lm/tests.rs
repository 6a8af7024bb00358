//! Models and texts that are not for this program; tokens, likelihoods in blocks, streams and walks
//! against the plain way.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dijiang::attention::KeyMask;
use dijiang::checkpoint::Family;
use dijiang::layer::{Attention, SoftmaxAttention};
use ndarray::Array2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::lm::error::{Error, Result};
use crate::lm::evaluate::score;
use crate::lm::exp::exp;
use crate::lm::llama::{Forcing, Llama};
use crate::lm::text::Text;
use crate::lm::tokens::{Token, Tokenizer};

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

    /// A directory with a whole model of two layers in it, whose tokens are bytes.
    fn with_model(test: &str) -> Self {
        let directory = Self::new(test);
        directory.write("config.json", config(256).to_string());
        directory.write_tensors("model.safetensors", &tensors(256));
        directory
    }

    /// As [`with_model`](Self::with_model), with a tokenizer of so many entries.
    fn with_subwords(test: &str, entries: usize) -> Self {
        let directory = Self::new(test);
        directory.write("config.json", config(entries).to_string());
        directory.write_tensors("model.safetensors", &tensors(entries));
        directory.write("tokenizer.json", tokenizer(entries).to_string());
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

fn load(directory: &Path) -> Result<Llama<SoftmaxAttention<f32>>> {
    Llama::load(directory)
}

/// The config of a model with a vocabulary of so many entries.
fn config(vocabulary: usize) -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "vocab_size": vocabulary,
        "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": HEAD_DIM,
        "max_position_embeddings": 16,
        "rms_norm_eps": 1e-5, "rope_theta": 100.0, "tie_word_embeddings": true
    })
}

/// Byte-level pairs: the letters of [`TEXT`], three words of it, and entries that it does not have,
/// `entries` in all.
fn tokenizer(entries: usize) -> Value {
    let mut vocabulary: Vec<String> =
        ["I", "n", "t", "h", "e", "b", "g", "i", "Ġ", "Ã", "Ł"].map(str::to_owned).to_vec();
    let merges = [["I", "n"], ["Ġ", "t"], ["h", "e"], ["Ġt", "he"]];
    vocabulary.extend(merges.iter().map(|pair| pair.concat()));
    vocabulary.extend((vocabulary.len()..entries).map(|entry| format!("<{entry}>")));
    let vocabulary: BTreeMap<&String, usize> = vocabulary.iter().zip(0..).collect();
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true
    });
    json!({
        "version": "1.0",
        "truncation": {
            "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0
        },
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": { "type": "BPE", "vocab": vocabulary, "merges": merges }
    })
}

/// With a letter of two bytes.
const TEXT: &str = "In the beginning the ßhe";
/// Its tokens.
const SUBWORDS: &[&str] =
    &["In", "Ġthe", "Ġ", "b", "e", "g", "i", "n", "n", "i", "n", "g", "Ġthe", "Ġ", "Ã", "Ł", "he"];

/// Weights that bf16 holds exactly, stored as f32.
fn tensors(vocabulary: usize) -> Tensors {
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_owned(), vec![vocabulary, HIDDEN]),
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

/// As bytes, so as tokens of a model of 256 entries.
fn tokens() -> Vec<Token> {
    b"In the beginning".iter().map(|&byte| byte.into()).collect()
}

/// The largest difference, NaN if there is one.
fn difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: &[f32]) -> f32 {
    let pairs = a.into_iter().zip(b);
    pairs.fold(0.0, |max, (a, b)| if (a - b).abs() <= max { max } else { (a - b).abs() })
}

#[test]
fn foreign_models_are_refused() {
    let directory = Directory::with_model("foreign");
    let read = |key: &str, value: Value| {
        let mut config = config(256);
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
    let error = read("vocab_size", json!(32000));
    assert!(matches!(error, Error::NoTokenizer { vocabulary: 32000, .. }), "{error}");
    assert!(error.to_string().contains("tokenizer.json"), "{error}");
    let opt = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/hf-opt");
    assert!(matches!(load(&opt), Err(Error::Family { found: Family::Opt, .. })));
    assert!(matches!(read("intermediate_size", json!("8")), Error::Json { .. }));
    assert!(matches!(read("head_dim", json!(0)), Error::Model(dijiang::Error::Format { .. })));
    directory.write("config.json", config(256).to_string());
    fs::remove_file(directory.0.join("model.safetensors")).expect("the file");
    assert!(matches!(directory.load_error(), Error::Model(dijiang::Error::Io { .. })));
}

#[test]
fn a_tokenizer_belongs_to_its_model() {
    let directory = Directory::with_subwords("tokenizer", 300);
    load(&directory.0).expect("a model");
    // A few entries that no text has are common.
    directory.write("tokenizer.json", tokenizer(290).to_string());
    load(&directory.0).expect("a model");
    for entries in [301, 200] {
        directory.write("tokenizer.json", tokenizer(entries).to_string());
        let error = directory.load_error();
        assert!(
            matches!(
                error,
                Error::Vocabulary { tokenizer, model: 300, .. } if tokenizer == entries
            ),
            "{entries}: {error}"
        );
    }
    directory.write("tokenizer.json", "{}");
    assert!(matches!(directory.load_error(), Error::Tokenizer { .. }));
}

#[test]
fn texts_are_tokenised_whole_and_counted_in_bytes() {
    let directory = Directory::with_subwords("subwords", 40);
    let tokenizer = Tokenizer::read(&directory.0, 40).expect("a tokenizer");
    let path = directory.0.join("text");
    let encoded = tokenizer.encode(TEXT.into(), &path).expect("tokens");
    let Tokenizer::Subwords(inner) = &tokenizer else { panic!("bytes") };
    let expected: Vec<_> = SUBWORDS.iter().map(|name| inner.token_to_id(name)).collect();
    assert_eq!(encoded.tokens.iter().copied().map(Some).collect::<Vec<_>>(), expected);
    assert_eq!(encoded.bounds[..4], [0, 2, 6, 7]);
    assert_eq!(encoded.bounds.last(), Some(&TEXT.len()));
    assert_eq!(tokenizer.decode(&encoded.tokens).expect("text"), TEXT);

    directory.write("text", TEXT);
    let text = Text::read(&path, &tokenizer, 8).expect("a text");
    assert_eq!((text.windows(), text.target_bytes(0), text.target_bytes(1)), (2, 11, 12));
    directory.write("text", b"In \xff");
    assert!(matches!(Text::read(&path, &tokenizer, 2), Err(Error::Encoding { position: 3, .. })));
}

/// More entries than are looked at at once.
#[test]
fn likelihoods_in_blocks_are_those_of_all_logits() {
    let entries = 2500;
    let directory = Directory::with_subwords("blocks", entries);
    let model = load(&directory.0).expect("a model");
    // Longer than the rows looked at at once, with targets in all blocks.
    let tokens: Vec<Token> = (0..300).map(|i| i * 997 % entries as Token).collect();
    let (input, targets) = (&tokens[..299], &tokens[1..]);
    let logits = model.forward(input).expect("logits").mapv(f64::from);
    let surprises = model.surprises(input, targets).expect("likelihoods");
    for (i, (row, &target)) in logits.rows().into_iter().zip(targets).enumerate() {
        let expected = row.mapv(f64::exp).sum().ln() - row[target as usize];
        assert!((surprises[i] - expected).abs() < 1e-5, "{i}: {} {expected}", surprises[i]);
    }
}

#[test]
fn a_stream_is_the_whole_sequence() {
    let directory = Directory::with_model("stream");
    let (model, tokens) = (load(&directory.0).expect("a model"), tokens());
    let whole = model.forward(&tokens).expect("logits");
    let mut stream = model.stream();
    let begun = stream.prefill(&tokens[..5]).expect("logits");
    assert!(difference(whole.row(4), &begun.to_vec()) < 1e-4);
    for (i, &token) in tokens.iter().enumerate().skip(5) {
        let logits = stream.step(token).expect("logits");
        assert!(difference(whole.row(i), &logits.to_vec()) < 1e-4, "token {i}");
    }
    // Longer than what is read at once.
    let long: Vec<Token> = tokens.iter().copied().cycle().take(1100).collect();
    let last = model.forward(&long).expect("logits").row(1099).to_vec();
    assert!(difference(&model.stream().prefill(&long).expect("logits"), &last) < 1e-4);
}

#[test]
fn a_walk_is_the_whole_model() {
    let directory = Directory::with_model("walk");
    let (model, tokens) = (load(&directory.0).expect("a model"), tokens());
    let (input, targets) = (&tokens[..15], &tokens[1..]);
    let windows = [input, &input[..7]];
    let expected = model.surprises(input, targets).expect("likelihoods");

    let mut walk = model.walk(&windows);
    let mut visited = Vec::new();
    while let Some(l) = walk.layer() {
        let inputs = walk.inputs();
        assert_eq!(inputs.iter().map(Array2::dim).collect::<Vec<_>>(), [(15, HIDDEN), (7, HIDDEN)]);
        assert_eq!(walk.hidden()[1].dim(), (7, HIDDEN));
        assert_eq!(model.attention_inputs(l, &windows).expect("inputs"), inputs);
        visited.push(l);
        walk.advance(&model.attention()[l]).expect("a step");
    }
    assert_eq!(visited, [0, 1]);
    assert_eq!(walk.surprises(&[targets, &targets[..7]])[0], expected);
    walk.advance(&model.attention()[0]).expect("nothing to do");
    assert_eq!(walk.surprises(&[targets, &[]])[0], expected);

    // What the second layer is given depends on what the first one was exchanged for.
    let silent = |l: usize, layer: &SoftmaxAttention<f32>| {
        let mut weights = (**layer.weights()).clone();
        if l == 0 {
            weights.o.fill(0.0);
        }
        Ok(SoftmaxAttention::new(layer.config().clone(), weights)?)
    };
    let mut given = Vec::new();
    for forcing in [Forcing::Teacher, Forcing::Student] {
        let exchanged = model.exchange_on(&windows, forcing, |l, layer, inputs| {
            given.push(inputs[0].to_owned());
            silent(l, layer)
        });
        let mut walk = model.walk(&windows[..1]);
        walk.advance_with(|_, input| Ok(Array2::zeros(input.dim()))).expect("a step");
        let student = walk.inputs().remove(0);
        let teacher = model.attention_inputs(1, &windows).expect("inputs").remove(0);
        let expected = if forcing == Forcing::Teacher { teacher } else { student };
        assert_eq!(given.pop(), Some(expected), "{forcing:?}");
        let exchanged = exchanged.expect("a model");
        let (layer, x) = (&exchanged.attention()[0], model.walk(&windows).inputs().remove(0));
        assert!(layer.forward(&x, KeyMask::All).expect("outputs").iter().all(|&y| y == 0.0));
    }
}

#[test]
fn text_is_cut_into_windows_with_successors() {
    let directory = Directory::with_model("text");
    let path = directory.0.join("text");
    let bytes: Vec<u8> = (0..100).collect();
    for (len, windows) in [(17, 1), (32, 1), (33, 2), (96, 5), (97, 6)] {
        directory.write("text", &bytes[..len]);
        let text = Text::read(&path, &Tokenizer::Bytes, 16).expect("a text");
        assert_eq!(text.windows(), windows, "{len} bytes");
        let last = windows - 1;
        let tokens: Vec<Token> = bytes.iter().map(|&byte| byte.into()).collect();
        assert_eq!(text.input(last), &tokens[last * 16..windows * 16]);
        assert_eq!(text.targets(last), &tokens[last * 16 + 1..windows * 16 + 1]);
        assert_eq!(text.target_bytes(last), 16);
        assert_eq!(text.spread(3).count(), windows.min(3));
    }
    directory.write("text", &bytes[..16]);
    assert!(matches!(
        Text::read(&path, &Tokenizer::Bytes, 16),
        Err(Error::TextTooShort { window: 16, found: 16, .. })
    ));

    // All logits equal: every byte costs eight bits.
    let mut tensors = tensors(256);
    tensors.get_mut("model.embed_tokens.weight").expect("a tensor").2.fill(0);
    directory.write_tensors("model.safetensors", &tensors);
    directory.write("text", &bytes);
    let text = Text::read(&path, &Tokenizer::Bytes, 16).expect("a text");
    let score = load(&directory.0).and_then(|model| score(&model, &text, 6, || ())).expect("bits");
    assert!((score.bits_per_byte() - 8.0).abs() < 1e-6, "{score:?}");
    assert!((score.perplexity() - 256.0).abs() < 1e-3, "{score:?}");
}

#[test]
fn exp_is_the_exponential_function() {
    for i in -8700..8800 {
        let x = i as f32 * 0.01;
        let (found, expected) = (f64::from(exp(x)), f64::from(x).exp());
        assert!((found / expected - 1.0).abs() < 2e-7, "{x}: {found} {expected}");
    }
    assert!(exp(-1e30) > 0.0 && exp(-1e30) < 1e-37 && exp(1e30) > 1e38);
    assert!(exp(f32::NAN).is_nan());
}
