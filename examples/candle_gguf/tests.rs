//! A tiny model through every command, against the same model as a directory.

#[path = "../../tests/tiny_gguf/mod.rs"]
mod tiny_gguf;

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use clap::Parser;
use dijiang::checkpoint::Gguf;

use self::tiny_gguf::Tiny;
use crate::args::{Args, Command};
use crate::attention::Attend;
use crate::lm::llama;
use crate::lm::tokens::{Token, Tokenizer};
use crate::model::Model;
use crate::{Opened, Result, bench, chat, plan, score, vocabulary};

/// A model in a folder of its own, which is removed when the test is over.
struct Written(PathBuf);

impl Written {
    fn new(test: &str, tiny: &Tiny) -> Self {
        let folder = std::env::temp_dir();
        let folder = folder.join(format!("dijiang-candle_gguf-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("model.gguf");
        tiny.write(&path);
        Self(path)
    }

    fn folder(&self) -> &Path {
        self.0.parent().unwrap()
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        // Nothing is lost if it stays.
        let _ = std::fs::remove_dir_all(self.folder());
    }
}

fn tokens(n: usize) -> Vec<Token> {
    (0..n).map(|i| ((i * i * 7 + i * 3 + 11) % 256) as Token).collect()
}

/// What a text would be that is long enough.
fn text(folder: &Path) -> PathBuf {
    let path = folder.join("text.txt");
    let words = ["the", "other", "5 thin", "Then", "ünter", "no"];
    let words: Vec<_> = (0..600).map(|i| words[i * i % 31 % words.len()]).collect();
    std::fs::write(&path, words.join(" ")).unwrap();
    path
}

fn run(arguments: &[&str]) -> Result<()> {
    crate::run(&Args::try_parse_from([&["candle_gguf"][..], arguments].concat())?)
}

fn surprises<A: Attend>(model: &Model<'_, A>, tokens: &[Token]) -> Vec<f64> {
    model.stream().surprises(&tokens[..tokens.len() - 1], &tokens[1..]).unwrap()
}

fn largest_difference(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    // Not `f64::max`: a NaN must not be passed over.
    let larger = |max: f64, x: f64| if x <= max { max } else { x };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, larger)
}

/// The whole model against the one that other examples run, on weights of both kinds: rotation,
/// norms, grouped queries, products, parts.
#[test]
fn softmax_is_that_of_the_directory() {
    // 700 tokens are more than a stream reads at once; few rows are multiplied in 8 bits.
    for (dtype, n, limit) in
        [(GgmlDType::F32, 700, 2e-3), (GgmlDType::Q4_1, 700, 0.05), (GgmlDType::Q8_0, 20, 0.15)]
    {
        let tiny = Tiny::new(dtype);
        let written = Written::new(&format!("softmax_{dtype:?}"), &tiny);
        let directory = written.folder();
        let opened = Opened::open(&written.0).unwrap();
        tiny.write_directory(directory);
        let tokenizer = serde_json::to_string(subwords(&opened.tokenizer)).unwrap();
        std::fs::write(directory.join("tokenizer.json"), tokenizer).unwrap();
        let reference = llama::Llama::load(directory).unwrap();
        let tokens = tokens(n);
        let expected = reference.surprises(&tokens[..n - 1], &tokens[1..]).unwrap();
        let found = surprises(&opened.softmax(), &tokens);
        let difference = largest_difference(&expected, &found);
        assert!(difference < limit, "{dtype:?}: {difference}");
    }
}

fn subwords(tokenizer: &Tokenizer) -> &tokenizers::Tokenizer {
    match tokenizer {
        Tokenizer::Subwords(tokenizer) => tokenizer,
        Tokenizer::Bytes => panic!("bytes"),
    }
}

/// Within its window, linear attention is softmax; token by token it is what it is at once.
#[test]
fn linear_attention_within_its_window() {
    let written = Written::new("window", &Tiny::new(GgmlDType::F32));
    let opened = Opened::open(&written.0).unwrap();
    let choices =
        plan::Choices { sinks: 4, average_window: 64.0, hold: Some(50), calibration: None };
    let calibration = tokens(300);
    let samples = [&calibration[..]];
    let (plan, layers) = plan::plan(&opened.gguf, &opened.body, &samples, &choices, || ()).unwrap();
    assert!(plan.average_window() <= 64.0);
    let linear = opened.linear_of(&layers);

    let tokens = tokens(200);
    let [ours, softmax] = [surprises(&linear, &tokens), surprises(&opened.softmax(), &tokens)];
    assert!(largest_difference(&ours[..16], &softmax[..16]) < 1e-3);
    assert!(largest_difference(&ours, &softmax) > 1e-3, "nothing went through the maps");

    let mut stream = linear.stream();
    let (mut one_by_one, bytes) = (Vec::new(), stream.bytes());
    for pair in tokens.windows(2) {
        one_by_one.extend(stream.surprises(&pair[..1], &pair[1..]).unwrap());
    }
    assert!(largest_difference(&ours, &one_by_one) < 2e-2);
    assert_eq!(stream.bytes(), bytes);
}

/// With nothing behind its windows a model forgets what they no longer hold; with maps it does not.
#[test]
fn windows_alone_forget() {
    let written = Written::new("alone", &Tiny::new(GgmlDType::F32));
    let opened = Opened::open(&written.0).unwrap();
    let choices = plan::Choices { sinks: 4, average_window: 32.0, hold: None, calibration: None };
    let calibration = tokens(200);
    let samples = [&calibration[..]];
    let layers = plan::plan(&opened.gguf, &opened.body, &samples, &choices, || ()).unwrap().1;
    // No window holds more than 200 tokens, so two layers see no further back than 400.
    let tokens = tokens(700);
    let mut others = tokens.clone();
    others[10] += 1;
    let last = |layers: &[_], tokens: &[Token]| {
        surprises(&opened.linear_of(layers), tokens).pop().unwrap()
    };
    assert!(last(&layers, &tokens) != last(&layers, &others));
    let alone = score::alone(layers).unwrap();
    assert!(last(&alone, &tokens) == last(&alone, &others));
}

/// plan, run with a state that is put aside, and bench: what a user types.
#[test]
fn commands() {
    let written = Written::new("commands", &Tiny::new(GgmlDType::Q4_1));
    let folder = written.folder();
    let (model, text) = (written.0.to_str().unwrap(), text(folder));
    let text = text.to_str().unwrap();
    let place = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let (maps, other_maps, state) = (place("maps"), place("other"), place("state"));
    let plan = |maps: &str, steps: &str| {
        run(&[
            "plan",
            "--model",
            model,
            "--text",
            text,
            "--maps",
            maps,
            "--context",
            "200",
            "--windows",
            "2",
            "--average-window",
            "40",
            "--steps",
            steps,
        ])
    };
    plan(&maps, "2").unwrap();
    plan(&other_maps, "0").unwrap();
    let bytes = std::fs::metadata(&maps).unwrap().len();
    assert!(bytes < 100_000, "{bytes}");

    let prompt = |more: &[&str]| {
        let always = ["run", "--model", model, "--prompt", "the other", "--generate", "5"];
        run(&[&always[..], more].concat())
    };
    prompt(&["--softmax"]).unwrap();
    prompt(&["--maps", &maps, "--endless", "--save", &state]).unwrap();
    prompt(&["--maps", &maps, "--resume", &state]).unwrap();
    let error = prompt(&["--maps", &other_maps, "--resume", &state]).unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
    let error = prompt(&["--maps", &maps, "--resume", &maps]).unwrap_err().to_string();
    assert!(error.contains("state") || error.contains("checksum"), "{error}");
    assert!(prompt(&["--maps", &state]).is_err());
    let score = |more: &[&str]| {
        let always =
            ["score", "--model", model, "--text", text, "--context", "300", "--windows", "1"];
        run(&[&always[..], more].concat())
    };
    score(&[]).unwrap();
    score(&["--maps", &maps, "--alone", "--every", "100"]).unwrap();
    assert!(score(&["--alone"]).is_err());

    for maps in [Some(&maps[..]), None] {
        let mut arguments = vec![
            "candle_gguf",
            "bench",
            "--model",
            model,
            "--text",
            text,
            "--contexts",
            "40,300",
            "--decode",
            "3",
            "--repeat",
            "2",
            "--json",
        ];
        arguments.extend(maps.iter().flat_map(|maps| ["--maps", maps]));
        let Command::Bench(args) = Args::try_parse_from(arguments).unwrap().command else {
            panic!("another command");
        };
        let rows = bench::measure(&args).unwrap().rows;
        let engines: Vec<_> = rows.iter().map(|row| (row.engine, row.context)).collect();
        let expected = [("softmax", 40), ("linear", 40), ("softmax", 300), ("linear", 300)];
        assert_eq!(engines, expected);
        assert_eq!(rows[1].state_bytes, rows[3].state_bytes);
        assert!(rows.iter().all(|row| row.decode_tokens_per_second > 0.0));
    }
}

/// A chat that was saved goes on bit for bit as if it had not been.
#[test]
fn a_state_on_disk() {
    let written = Written::new("state", &Tiny::new(GgmlDType::Q8_0));
    let opened = Opened::open(&written.0).unwrap();
    let choices = plan::Choices { sinks: 2, average_window: 32.0, hold: None, calibration: None };
    let calibration = tokens(200);
    let planned =
        plan::plan(&opened.gguf, &opened.body, &[&calibration[..]], &choices, || ()).unwrap();
    let linear = opened.linear_of(&planned.1);
    let tokens = tokens(150);
    let mut whole = linear.stream();
    whole.read(&tokens[..100]).unwrap();
    let state = written.0.with_extension("state");
    chat::save(&whole, &state, "maps").unwrap();
    let mut resumed = chat::resume(&linear, &state, "maps").unwrap();
    assert_eq!(resumed.position(), 100);
    for token in &tokens[100..] {
        assert_eq!(whole.read(&[*token]).unwrap(), resumed.read(&[*token]).unwrap());
    }

    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() - 9]).unwrap();
    assert!(chat::resume(&linear, &state, "maps").is_err());
}

/// Splits and merges of the file's own vocabulary.
#[test]
fn the_vocabulary_of_the_file() {
    let mut tiny = Tiny::new(GgmlDType::F32);
    let encode = |tiny: &Tiny, text: &str| -> Result<Vec<String>> {
        let written = Written::new("vocabulary", tiny);
        let path = &written.0;
        let gguf = Gguf::open(path)?;
        let (tokenizer, _) = vocabulary::read(path, gguf.content())?;
        let encoded = tokenizer.encode(text.as_bytes().to_vec(), path)?;
        assert_eq!(tokenizer.decode(&encoded.tokens)?, text.replace("<|end|>", ""));
        let words = encoded.tokens.iter().map(|&token| subwords(&tokenizer).id_to_token(token));
        Ok(words.map(Option::unwrap).collect())
    };
    let text = "the the123<|end|>é";
    let smollm = ["the", "Ġthe", "1", "2", "3", "<|end|>", "Ã", "©"];
    assert_eq!(encode(&tiny, text).unwrap(), smollm);
    for pre in ["gpt-2", "llama-bpe"] {
        tiny.metadata.insert("tokenizer.ggml.pre".to_owned(), Value::String(pre.to_owned()));
        assert_eq!(encode(&tiny, text).unwrap(), smollm, "{pre}");
    }
    for (key, value) in [
        ("pre", Some(Value::String("another".to_owned()))),
        ("model", Some(Value::String("llama".to_owned()))),
        ("merges", None),
        ("tokens", None),
        ("tokens", Some(Value::Array(vec![Value::String("a".to_owned())]))),
    ] {
        let key = format!("tokenizer.ggml.{key}");
        let mut tiny = Tiny::new(GgmlDType::F32);
        tiny.metadata.remove(&key);
        tiny.metadata.extend(value.map(|value| (key.clone(), value)));
        let error = encode(&tiny, text).unwrap_err().to_string();
        assert!(error.contains(&key) && !error.contains('\n'), "{error}");
    }
}

/// Bytes that make no numbers end with a line, neither as text nor as a perplexity.
#[test]
fn damaged_weights() {
    let mut tiny = Tiny::new(GgmlDType::F32);
    let norm = Tensor::full(f32::NAN, tiny_gguf::HIDDEN, &Device::Cpu).unwrap();
    let norm = QTensor::quantize(&norm, GgmlDType::F32).unwrap();
    tiny.tensors.insert("output_norm.weight".to_owned(), norm);
    let written = Written::new("damaged", &tiny);
    let opened = Opened::open(&written.0).unwrap();
    let model = opened.softmax();
    let read = model.stream().read(&tokens(3)).map(drop);
    let scored = model.stream().surprises(&tokens(3), &tokens(3)).map(drop);
    for result in [read, scored] {
        assert!(result.unwrap_err().to_string().contains("not finite"));
    }
}

/// What the program does not compute, and tensors that are missing.
#[test]
fn files_that_are_refused() {
    let opened = |change: fn(&mut Tiny)| {
        let mut tiny = Tiny::new(GgmlDType::F32);
        change(&mut tiny);
        let written = Written::new("refused", &tiny);
        let error = Opened::open(&written.0).map(drop).unwrap_err().to_string();
        assert!(!error.contains('\n'), "{error}");
        error
    };
    let error = opened(|tiny| {
        tiny.metadata.insert("llama.expert_count".to_owned(), Value::U32(4));
    });
    assert!(error.contains("expert_count"), "{error}");
    for name in ["token_embd.weight", "blk.1.ffn_up.weight", "blk.0.attn_v.weight"] {
        let missing = opened(match name {
            "token_embd.weight" => |tiny| drop(tiny.tensors.remove("token_embd.weight")),
            "blk.1.ffn_up.weight" => |tiny| drop(tiny.tensors.remove("blk.1.ffn_up.weight")),
            _ => |tiny| drop(tiny.tensors.remove("blk.0.attn_v.weight")),
        });
        assert!(missing.contains(name) || name == "token_embd.weight", "{missing}");
    }
    let error = opened(|tiny| {
        tiny.metadata.remove("llama.attention.layer_norm_rms_epsilon");
    });
    assert!(error.contains("layer_norm_rms_epsilon"), "{error}");
    let written = Written::new("text", &Tiny::new(GgmlDType::F32));
    std::fs::write(&written.0, "no model").unwrap();
    assert!(Opened::open(&written.0).map(drop).unwrap_err().to_string().contains("model.gguf"));
}
