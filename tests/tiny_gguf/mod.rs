//! A model small enough to write for a test: as a GGUF file, and as a directory of Hugging Face.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

pub(crate) const HIDDEN: usize = 64;
pub(crate) const HEADS: usize = 4;
pub(crate) const KV_HEADS: usize = 2;
pub(crate) const DIM: usize = 16;
pub(crate) const INNER: usize = 128;
pub(crate) const LAYERS: usize = 2;
const EPSILON: f32 = 1e-5;
const THETA: f32 = 5000.0;

/// Metadata and tensors of a file, to be changed before it is written.
pub(crate) struct Tiny {
    pub(crate) metadata: BTreeMap<String, Value>,
    /// As llama.cpp names and orders them.
    pub(crate) tensors: BTreeMap<String, QTensor>,
}

impl Tiny {
    /// Matrices of this type, everything else in f32.
    pub(crate) fn new(dtype: GgmlDType) -> Self {
        let tokens = vocabulary();
        let size = |size: usize| Value::U32(size as u32);
        let text = |text: &str| Value::String(text.to_owned());
        let texts = |texts: &[String]| {
            Value::Array(texts.iter().map(|text| Value::String(text.clone())).collect())
        };
        let kinds = |i: usize| Value::I32(if i + 1 == tokens.len() { 3 } else { 1 });
        let metadata = [
            ("general.architecture", text("llama")),
            ("llama.block_count", size(LAYERS)),
            ("llama.context_length", size(256)),
            ("llama.embedding_length", size(HIDDEN)),
            ("llama.feed_forward_length", size(INNER)),
            ("llama.attention.head_count", size(HEADS)),
            ("llama.attention.head_count_kv", size(KV_HEADS)),
            ("llama.attention.layer_norm_rms_epsilon", Value::F32(EPSILON)),
            ("llama.rope.dimension_count", size(DIM)),
            ("llama.rope.freq_base", Value::F32(THETA)),
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text("smollm")),
            ("tokenizer.ggml.tokens", texts(&tokens)),
            ("tokenizer.ggml.token_type", Value::Array((0..tokens.len()).map(kinds).collect())),
            ("tokenizer.ggml.merges", texts(&["t h", "th e", "Ġ the"].map(str::to_owned))),
            ("tokenizer.ggml.eos_token_id", size(tokens.len() - 1)),
        ];
        let metadata = metadata.map(|(key, value)| (key.to_owned(), value));
        let tensors = weights(tokens.len()).into_iter().map(|(name, values, shape)| {
            let (name, heads) = of_llama_cpp(&name);
            let values = heads.map_or(values.clone(), |heads| adjacent(&values, heads));
            let dtype = if shape.len() == 2 { dtype } else { GgmlDType::F32 };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
            (name, QTensor::quantize(&tensor, dtype).unwrap())
        });
        Self { metadata: metadata.into(), tensors: tensors.collect() }
    }

    pub(crate) fn write(&self, path: &Path) {
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (&key[..], value)).collect();
        let tensors: Vec<_> =
            self.tensors.iter().map(|(name, tensor)| (&name[..], tensor)).collect();
        gguf_file::write(&mut File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    /// The same model as `config.json` and `model.safetensors`, dequantised.
    pub(crate) fn write_directory(&self, directory: &Path) {
        let config = serde_json::json!({
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
            "num_hidden_layers": LAYERS, "rms_norm_eps": EPSILON, "rope_theta": THETA,
            "max_position_embeddings": 256, "vocab_size": vocabulary().len(),
            "tie_word_embeddings": true, "hidden_act": "silu",
        });
        std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
        let tensors = weights(vocabulary().len()).into_iter().map(|(name, _, shape)| {
            let (of_llama_cpp, heads) = of_llama_cpp(&name);
            let tensor = self.tensors[&of_llama_cpp].dequantize(&Device::Cpu).unwrap();
            let values: Vec<f32> = tensor.flatten_all().unwrap().to_vec1().unwrap();
            let values = heads.map_or(values.clone(), |heads| halves(&values, heads));
            (name, Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        });
        let tensors: HashMap<_, _> = tensors.collect();
        candle_core::safetensors::save(&tensors, directory.join("model.safetensors")).unwrap();
    }
}

/// The 256 bytes as byte-level tokenizers write them, three merges, and a token that ends a text.
fn vocabulary() -> Vec<String> {
    let printable = |byte: u32| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    let mut other = 0x100..;
    let letters = (0..0x100).map(|byte| if printable(byte) { byte } else { other.next().unwrap() });
    let letters = letters.map(|letter| char::from_u32(letter).unwrap().to_string());
    letters.chain(["th", "the", "Ġthe", "<|end|>"].map(str::to_owned)).collect()
}

/// Names of Hugging Face, numbers, shapes.
fn weights(vocabulary: usize) -> Vec<(String, Vec<f32>, Vec<usize>)> {
    let mut seed = 0_u32;
    let mut matrix = |name: String, rows: usize, columns: usize| {
        let values = (0..rows * columns).map(|_| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) as f32 / (1 << 23) as f32 - 1.0
        });
        let scale = 1.5 / (columns as f32).sqrt();
        (name, values.map(|x| x * scale).collect(), vec![rows, columns])
    };
    let norm = |name: String| {
        let values = (0..HIDDEN).map(|i| 1.0 + 0.01 * (i % 7) as f32).collect();
        (name, values, vec![HIDDEN])
    };
    let mut all = vec![
        matrix("model.embed_tokens.weight".to_owned(), vocabulary, HIDDEN),
        norm("model.norm.weight".to_owned()),
    ];
    for l in 0..LAYERS {
        let name = |what: &str| format!("model.layers.{l}.{what}.weight");
        all.extend([
            norm(name("input_layernorm")),
            norm(name("post_attention_layernorm")),
            matrix(name("self_attn.q_proj"), HEADS * DIM, HIDDEN),
            matrix(name("self_attn.k_proj"), KV_HEADS * DIM, HIDDEN),
            matrix(name("self_attn.v_proj"), KV_HEADS * DIM, HIDDEN),
            matrix(name("self_attn.o_proj"), HIDDEN, HEADS * DIM),
            matrix(name("mlp.gate_proj"), INNER, HIDDEN),
            matrix(name("mlp.up_proj"), INNER, HIDDEN),
            matrix(name("mlp.down_proj"), HIDDEN, INNER),
        ]);
    }
    all
}

/// The name in a GGUF file, and the number of heads whose rows have another order there.
fn of_llama_cpp(name: &str) -> (String, Option<usize>) {
    let names = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("model.layers.", "blk."),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let renamed = names.iter().fold(name.to_owned(), |name, (from, to)| name.replace(from, to));
    let heads = match name {
        _ if name.contains("q_proj") => Some(HEADS),
        _ if name.contains("k_proj") => Some(KV_HEADS),
        _ => None,
    };
    (renamed, heads)
}

/// Rows of rotated pairs beside each other: as llama.cpp's converter does it, `[h, 2, d/2, D]` to
/// `[h, d/2, 2, D]`.
fn adjacent(values: &[f32], heads: usize) -> Vec<f32> {
    swapped(values, heads, 2, DIM / 2)
}

fn halves(values: &[f32], heads: usize) -> Vec<f32> {
    swapped(values, heads, DIM / 2, 2)
}

fn swapped(values: &[f32], heads: usize, outer: usize, inner: usize) -> Vec<f32> {
    let columns = values.len() / (heads * outer * inner);
    let x = Tensor::from_slice(values, (heads, outer, inner, columns), &Device::Cpu).unwrap();
    x.transpose(1, 2).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}
