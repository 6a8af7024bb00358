//! Attention layers from GGUF files, against the directory of the same model; files that are
//! refused.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod tiny_gguf;

use std::path::PathBuf;

use candle_core::quantized::gguf_file::Value;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use dijiang::Error;
use dijiang::attention::KeyMask;
use dijiang::checkpoint::{Checkpoint, Gguf};
use dijiang::layer::{Attention, AttentionWeights, RotaryPairing, RotaryScaling, SoftmaxAttention};
use ndarray::Array2;
use tiny_gguf::{DIM, HIDDEN, LAYERS, Tiny};

/// A folder of this test's own.
fn folder(test: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("gguf_{test}"));
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

fn opened(test: &str, tiny: &Tiny) -> Result<Gguf, Error> {
    let path = folder(test).join("model.gguf");
    tiny.write(&path);
    Gguf::open(&path)
}

/// The same weights as the directory of the model, bit for bit, whatever they are stored as.
#[test]
fn weights_are_those_of_the_directory() {
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::Q8_0, GgmlDType::Q4_1] {
        let tiny = Tiny::new(dtype);
        let file = opened(&format!("weights_{dtype:?}"), &tiny).unwrap();
        let folder = folder(&format!("weights_{dtype:?}"));
        tiny.write_directory(&folder);
        let directory = Checkpoint::open(&folder).unwrap();
        assert_eq!(file.layers(), LAYERS);
        for l in 0..LAYERS {
            assert_eq!(file.attention_config(), &directory.attention_config(l).unwrap());
            let [ours, theirs] = [
                file.attention_weights::<f64>(l).unwrap(),
                directory.attention_weights::<f64>(l).unwrap(),
            ];
            assert_eq!(ours, theirs, "layer {l} of {dtype:?}");
        }
        assert!(matches!(file.attention_weights::<f32>(LAYERS), Err(Error::Value { .. })));
    }
}

/// Rows as they lie in the file, rotated in adjacent pairs as llama.cpp does it, give the same
/// attention.
#[test]
fn rotation_is_that_of_llama_cpp() {
    let tiny = Tiny::new(GgmlDType::F32);
    let file = opened("rotation", &tiny).unwrap();
    let layer = file.softmax_attention::<f64>(1).unwrap();
    let stored = |which: &str| {
        let tensor = tiny.tensors[&format!("blk.1.attn_{which}.weight")].dequantize(&Device::Cpu);
        let tensor = tensor.unwrap();
        let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
        let values = values.into_iter().map(f64::from).collect();
        Array2::from_shape_vec(tensor.dims2().unwrap(), values).unwrap()
    };
    let mut weights = AttentionWeights::clone(layer.weights());
    (weights.q, weights.k) = (stored("q"), stored("k"));
    let mut config = file.attention_config().clone();
    config.rotary = config.rotary.map(|rotary| rotary.with_pairing(RotaryPairing::Interleaved));
    let adjacent = SoftmaxAttention::new(config, weights).unwrap();
    let x = Array2::from_shape_fn((23, HIDDEN), |(i, j)| ((i * 13 + j * 29) % 31) as f64 / 15.0);
    let [ours, theirs] = [&layer, &adjacent].map(|layer| layer.forward(&x, KeyMask::All).unwrap());
    let largest = (&ours - &theirs).iter().fold(0.0_f64, |max, x| max.max(x.abs()));
    assert!(largest < 1e-12, "{largest}");
}

#[test]
fn biases_and_factors_of_frequencies() {
    let mut tiny = Tiny::new(GgmlDType::F32);
    let vector = |len: usize| {
        let values: Vec<f32> = (0..len).map(|i| 1.0 + i as f32).collect();
        let tensor = Tensor::from_vec(values, len, &Device::Cpu).unwrap();
        QTensor::quantize(&tensor, GgmlDType::F32).unwrap()
    };
    for l in 0..LAYERS {
        for (which, rows) in [("q", HIDDEN), ("k", HIDDEN / 2), ("v", HIDDEN / 2)] {
            tiny.tensors.insert(format!("blk.{l}.attn_{which}.bias"), vector(rows));
        }
    }
    tiny.tensors.insert("rope_freqs.weight".to_owned(), vector(DIM / 2));
    let file = opened("biases", &tiny).unwrap();
    let weights = file.attention_weights::<f32>(0).unwrap();
    let of_first_head = weights.q_bias.unwrap().to_vec()[..DIM].to_vec();
    let expected = [1, 3, 5, 7, 9, 11, 13, 15, 2, 4, 6, 8, 10, 12, 14, 16].map(|x| x as f32);
    assert_eq!(of_first_head, expected);
    assert_eq!(weights.v_bias.unwrap()[1], 2.0);
    assert_eq!(weights.o_bias, None);
    let factors = (1..=DIM / 2).map(|i| i as f64).collect();
    let scaling = RotaryScaling::LongRope { factors, attention_factor: 1.0 };
    assert_eq!(file.attention_config().rotary.as_ref().unwrap().scaling, scaling);

    tiny.tensors.remove("blk.1.attn_v.bias");
    let file = opened("biases", &tiny).unwrap();
    assert!(message(file.attention_weights::<f32>(1)).contains("blk.1.attn_v.bias"));
}

/// An error of one line.
fn message<T>(result: Result<T, Error>) -> String {
    let message = result.err().expect("an error").to_string();
    assert!(!message.contains('\n'), "{message}");
    message
}

/// What is not understood is refused by name.
#[test]
fn refusals() {
    type Change = fn(&mut Tiny);
    let set = |tiny: &mut Tiny, key: &str, value| tiny.metadata.insert(key.to_owned(), value);
    let cases: [(&str, Change); 13] = [
        ("general.architecture", |tiny| {
            tiny.metadata.insert("general.architecture".into(), Value::String("qwen2".into()));
        }),
        ("general.architecture", |tiny| {
            tiny.metadata.remove("general.architecture");
        }),
        ("llama.attention.sliding_window", |tiny| {
            tiny.metadata.insert("llama.attention.sliding_window".into(), Value::U32(7));
        }),
        ("llama.attention.head_count", |tiny| {
            tiny.metadata.remove("llama.attention.head_count");
        }),
        ("llama.attention.head_count", |tiny| {
            tiny.metadata.insert("llama.attention.head_count".into(), Value::U32(0));
        }),
        ("llama.attention.head_count_kv", |tiny| {
            let kv = Value::Array(vec![Value::U32(2), Value::U32(2)]);
            tiny.metadata.insert("llama.attention.head_count_kv".into(), kv);
        }),
        ("llama.attention.head_count_kv", |tiny| {
            tiny.metadata.insert("llama.attention.head_count_kv".into(), Value::U32(3));
        }),
        ("llama.rope.dimension_count", |tiny| {
            tiny.metadata.insert("llama.rope.dimension_count".into(), Value::U32(8));
        }),
        ("llama.rope.scaling.type", |tiny| {
            tiny.metadata.insert("llama.rope.scaling.type".into(), Value::String("yarn".into()));
        }),
        ("llama.rope.scaling.type", |tiny| {
            tiny.metadata.insert("llama.rope.scaling.factor".into(), Value::F32(2.0));
        }),
        ("rotary.base", |tiny| {
            tiny.metadata.insert("llama.rope.freq_base".into(), Value::F32(-1.0));
        }),
        ("blk.0.attn_sinks.weight", |tiny| {
            let norm = tiny.tensors.remove("output_norm.weight").unwrap();
            tiny.tensors.insert("blk.0.attn_sinks.weight".into(), norm);
        }),
        ("blk.2.attn_q.weight", |tiny| {
            let q = tiny.tensors.remove("blk.1.attn_q.weight").unwrap();
            tiny.tensors.insert("blk.2.attn_q.weight".into(), q);
        }),
    ];
    for (i, (name, change)) in cases.into_iter().enumerate() {
        let mut tiny = Tiny::new(GgmlDType::F32);
        change(&mut tiny);
        let message = message(opened(&format!("refusals_{i}"), &tiny));
        assert!(message.contains(name), "{name}: {message}");
    }

    let mut tiny = Tiny::new(GgmlDType::F32);
    set(&mut tiny, "llama.attention.head_count", Value::U32(2));
    set(&mut tiny, "llama.attention.head_count_kv", Value::U32(2));
    set(&mut tiny, "llama.rope.dimension_count", Value::U32(32));
    let file = opened("refusals_shape", &tiny).unwrap();
    let message = message(file.attention_weights::<f32>(0));
    assert!(message.contains("blk.0.attn_k.weight"), "{message}");
}

/// A file that ends anywhere, or says that its data are aligned to nothing.
#[test]
fn damaged_files() {
    let mut tiny = Tiny::new(GgmlDType::Q8_0);
    let path = folder("damaged").join("model.gguf");
    tiny.write(&path);
    let bytes = std::fs::read(&path).unwrap();
    let ends = (0..200).chain((200..bytes.len() - 64).step_by(997));
    for end in ends {
        std::fs::write(&path, &bytes[..end]).unwrap();
        match Gguf::open(&path) {
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
            Ok(file) => {
                let all = (0..LAYERS).try_for_each(|l| file.attention_weights::<f32>(l).map(drop));
                let rest = file.tensor("token_embd.weight", &[260, HIDDEN]).map(drop);
                assert!(all.and(rest).is_err(), "cut at {end}");
            }
        }
    }

    let at = bytes.windows(20).position(|bytes| bytes == b"blk.0.attn_q.weight\x02").unwrap();
    let mut unknown = bytes.clone();
    unknown[at + 19 + 4 + 16] = 99;
    std::fs::write(&path, &unknown).unwrap();
    assert!(message(Gguf::open(&path)).contains("99"));

    tiny.metadata.insert("general.alignment".to_owned(), Value::U32(0));
    assert!(message(opened("damaged", &tiny)).contains("general.alignment"));
    assert!(matches!(Gguf::open(folder("damaged").join("none")), Err(Error::Io { .. })));
}
