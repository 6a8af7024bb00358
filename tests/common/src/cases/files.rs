//! Bytes that say they are a model: safetensors files of layers and maps, and Hugging Face
//! directories.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use dijiang::Error;
use dijiang::attention::{KeyMask, Window};
use dijiang::checkpoint::{
    CheckpointOptions, Tensors, load_layers, load_maps, save_layers, save_maps,
};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    PublishedAttention, Rotary, SoftmaxAttention,
};
use ndarray::Array2;
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use super::{Source, Tally};

pub fn run(source: &mut Source<'_>, tally: &mut Tally) {
    if source.chance(0.7) { layers(source, tally) } else { directories(source, tally) }
}

fn layer(window: Option<Window>) -> DijiangAttention<f32> {
    let matrix = |p: usize| {
        Array2::from_shape_fn((4, 4), |(i, j)| ((i * 37 + j * p) % 17) as f32 / 17.0 - 0.3)
    };
    let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    let softmax =
        SoftmaxAttention::new(AttentionConfig::new(4, 2).with_rotary(Rotary::new(1e4)), weights);
    let layer = softmax.and_then(|softmax| {
        DijiangAttention::from_softmax(
            &softmax,
            DijiangOptions::new().with_window(window).with_sinks(2),
        )
    });
    layer.unwrap_or_else(|error| panic!("{error}"))
}

/// Whole files: two layers, two layers' maps, one layer, its maps.
fn sound() -> &'static [Vec<u8>; 4] {
    static FILES: OnceLock<[Vec<u8>; 4]> = OnceLock::new();
    FILES.get_or_init(|| {
        let (one, two) = (layer(None), layer(Some(Window::new(3, 1))));
        let files = [
            save_layers([&one, &two]),
            save_maps([&one, &two]),
            one.to_safetensors(),
            two.save_maps(),
        ];
        files.map(|file| file.unwrap_or_else(|error| panic!("{error}")))
    })
}

fn layers(source: &mut Source<'_>, tally: &mut Tally) {
    let mut bytes = source.choose(sound());
    damage(source, &mut bytes);
    if source.chance(0.9) {
        put_checksum_right(&mut bytes);
    }
    let mut works = |layer: &DijiangAttention<f32>| {
        let x = Array2::from_elem((7, layer.config().model_dim), 0.5);
        tally.record(layer.forward(&x, KeyMask::All));
    };
    let (mut mine, kept) = (layer(None), layer(None));
    let mut model = [mine.clone(), mine.clone()];
    let results = (
        DijiangAttention::<f32>::from_safetensors(&bytes),
        load_layers::<f32>(&bytes),
        mine.load_maps(&bytes),
        load_maps(&mut model, &bytes),
    );
    let x = Array2::from_elem((7, 4), 0.5);
    let same = |layer: &DijiangAttention<f32>| {
        layer.forward(&x, KeyMask::All).ok() == kept.forward(&x, KeyMask::All).ok()
            && layer.windows() == kept.windows()
            && layer.sinks() == kept.sinks()
    };
    assert!(results.2.is_ok() || same(&mine), "a refused file changed the layer");
    assert!(results.3.is_ok() || model.iter().all(same), "a refused file changed a layer");
    results.0.iter().chain(results.1.iter().flatten()).for_each(&mut works);
    tally.record(results.0);
    tally.record(results.1);
    tally.record(results.2);
    tally.record(results.3);
}

/// The checksum becomes that of the contents, so that what lies behind it is reached.
fn put_checksum_right(bytes: &mut [u8]) {
    let Err(Error::Format { name, expected, .. }) =
        DijiangAttention::<f32>::from_safetensors(bytes)
    else {
        return;
    };
    let key = format!("\"{name}\":\"").into_bytes();
    let Some(at) = bytes.windows(key.len()).position(|window| window == key) else { return };
    if name == "dijiang.crc32" {
        bytes
            .iter_mut()
            .skip(at + key.len())
            .zip(expected.bytes().take(8))
            .for_each(|(b, c)| *b = c);
    }
}

/// A number, whole or not, that nobody should write into a file.
fn absurd(source: &mut Source<'_>) -> String {
    let size = source.size().to_string();
    source
        .choose(&[
            size.as_str(),
            "-1",
            "1e400",
            "0",
            "99999999999999999999999",
            "null",
            "\"\"",
            "[]",
            "0.5",
            "1e-300",
        ])
        .to_owned()
}

fn damage(source: &mut Source<'_>, bytes: &mut Vec<u8>) {
    for _ in 0..source.upto(3) {
        let header = bytes
            .first_chunk()
            .map_or(0, |len| u64::from_le_bytes(*len) as usize)
            .min(bytes.len().saturating_sub(8));
        if bytes.len() < 9 || header == 0 {
            return;
        }
        match source.below(8) {
            0 => bytes.truncate(source.below(bytes.len())),
            1 => bytes.extend(std::iter::repeat_n(0, source.below(99))),
            2 => bytes[..8].copy_from_slice(&(source.size() as u64).to_le_bytes()),
            3 => {
                let at = 8 + header + source.below((bytes.len() - 8 - header).max(1));
                let number = source.number();
                for (byte, new) in bytes.iter_mut().skip(at).zip(number.to_le_bytes()) {
                    *byte = new;
                }
            }
            4 | 5 => {
                // One of the header's numbers becomes another, and the header's length follows.
                let text = String::from_utf8_lossy(&bytes[8..8 + header]).into_owned();
                let text = replace_number(source, &text);
                let rest = bytes.split_off(8 + header);
                *bytes = (text.len() as u64)
                    .to_le_bytes()
                    .into_iter()
                    .chain(text.into_bytes())
                    .chain(rest)
                    .collect();
            }
            _ => {
                let end = if source.chance(0.5) { 8 + header } else { bytes.len() };
                bytes[source.below(end)] ^= 1 << source.below(8);
            }
        }
    }
}

/// `text` with one of its numbers, or a word between quotes, exchanged.
fn replace_number(source: &mut Source<'_>, text: &str) -> String {
    let starts: Vec<usize> =
        text.match_indices(|c: char| c.is_ascii_digit()).map(|(at, _)| at).collect();
    if starts.is_empty() {
        return text.to_owned();
    }
    let at = source.choose(&starts);
    let from = text.as_bytes()[..at]
        .iter()
        .rposition(|byte| !byte.is_ascii_digit())
        .map_or(0, |before| before + 1);
    let to = text[at..].find(|c: char| !c.is_ascii_digit()).map_or(text.len(), |len| at + len);
    format!("{}{}{}", &text[..from], absurd(source), &text[to..])
}

/// This thread's own directory.
fn directory() -> PathBuf {
    let path = std::env::temp_dir().join(format!(
        "dijiang-fuzz-{}-{:?}",
        std::process::id(),
        std::thread::current().id()
    ));
    fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    path
}

/// Names of the tensors of attention in a file, of D = 4 and two heads, and their shapes.
type Named = &'static [(&'static str, &'static [usize])];

const PLAIN: Named = &[
    ("self_attn.q_proj.weight", &[4, 4]),
    ("self_attn.k_proj.weight", &[4, 4]),
    ("self_attn.v_proj.weight", &[4, 4]),
    ("self_attn.o_proj.weight", &[4, 4]),
];
const BIASES: Named = &[
    ("self_attn.q_proj.bias", &[4]),
    ("self_attn.k_proj.bias", &[4]),
    ("self_attn.v_proj.bias", &[4]),
];
const NORMS: Named = &[("self_attn.q_norm.weight", &[2]), ("self_attn.k_norm.weight", &[2])];
const FUSED: Named =
    &[("self_attn.qkv_proj.weight", &[12, 4]), ("self_attn.o_proj.weight", &[4, 4])];
const NEOX: Named = &[
    ("attention.query_key_value.weight", &[12, 4]),
    ("attention.query_key_value.bias", &[12]),
    ("attention.dense.weight", &[4, 4]),
    ("attention.dense.bias", &[4]),
];

/// The weights of a family, or of another one now and then.
fn weights(source: &mut Source<'_>, family: &str) -> Vec<u8> {
    let parts: &[Named] = match family {
        _ if source.chance(0.1) => &[PLAIN, FUSED],
        "qwen2" => &[PLAIN, BIASES],
        "qwen3" | "gemma3_text" => &[PLAIN, NORMS],
        "phi3" => &[FUSED],
        "gpt_neox" => &[NEOX],
        _ => &[PLAIN],
    };
    let numbers: Vec<u8> =
        (0..48).flat_map(|i| ((i * 7 % 11) as f32 / 11.0 - 0.4).to_le_bytes()).collect();
    let tensor = |(name, shape): &(&str, &[usize])| {
        let bytes = &numbers[..4 * shape.iter().product::<usize>()];
        let view = TensorView::new(Dtype::F32, shape.to_vec(), bytes);
        (format!("layers.0.{name}"), view.unwrap_or_else(|error| panic!("{error}")))
    };
    let tensors: BTreeMap<_, _> = parts.iter().copied().flatten().map(tensor).collect();
    safetensors::serialize(tensors, None).unwrap_or_else(|error| panic!("{error}"))
}

fn directories(source: &mut Source<'_>, tally: &mut Tally) {
    let family = source.choose(&[
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "phi3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "smollm3",
        "gpt_neox",
        "opt",
        "bert",
        "mamba",
    ]);
    let mut config = format!(
        r#"{{"model_type":"{family}","hidden_size":4,"num_hidden_layers":1,"num_attention_heads":2,
        "rope_theta":10000.0,"max_position_embeddings":64,"attn_logit_softcapping":null"#
    );
    if !matches!(family, "gpt_neox" | "opt" | "bert") {
        config += r#","num_key_value_heads":2,"head_dim":2"#;
    }
    for (chance, key) in [
        (
            0.3,
            r#""rope_scaling":{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,
            "high_freq_factor":4.0,"original_max_position_embeddings":64}"#,
        ),
        (
            0.2,
            r#""rope_parameters":{"rope_type":"yarn","factor":4.0,
            "original_max_position_embeddings":16,"beta_fast":32}"#,
        ),
        (
            0.2,
            r#""rope_parameters":{"type":"longrope","short_factor":[1.0],"long_factor":[2.0],
            "attention_factor":1.1}"#,
        ),
        (0.2, r#""rope_parameters":{"rope_type":"dynamic","factor":2.0}"#),
        (
            0.2,
            r#""rope_parameters":{"sliding_attention":{"rope_theta":10.0},
            "full_attention":{"type":"linear","factor":8}}"#,
        ),
        (0.2, r#""sliding_window":2,"use_sliding_window":true,"max_window_layers":0"#),
        (0.2, r#""layer_types":["sliding_attention"]"#),
        (0.2, r#""no_rope_layers":[0]"#),
        (0.2, r#""attention_bias":false"#),
        (0.2, r#""query_pre_attn_scalar":24,"rms_norm_eps":0.001"#),
        (0.1, r#""rotary_pct":1.0,"partial_rotary_factor":1.0"#),
        (0.1, r#""quantization_config":{"quant_method":"fp8"}"#),
        (0.1, r#""text_config":{"model_type":"llama"}"#),
        (0.1, r#""architectures":["LlamaForCausalLM"]"#),
        (0.1, r#""attention_multiplier":1"#),
    ] {
        if source.chance(chance) {
            config += ",";
            config += key;
        }
    }
    config += "}";
    for _ in 0..source.below(3) {
        config = replace_number(source, &config);
    }
    let mut config = config.into_bytes();
    if source.chance(0.2) {
        let at = source.below(config.len());
        config[at] ^= 1 << source.below(8);
    }
    // Of the family, or a file of this crate's layers.
    let mut weights = match source.chance(0.8) {
        true => weights(source, family),
        false => source.choose(&[&sound()[0], &sound()[2]]).clone(),
    };
    if source.chance(0.4) {
        damage(source, &mut weights);
    }
    let directory = directory();
    let write = |name: &str, bytes: &[u8]| {
        fs::write(directory.join(name), bytes).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    write("config.json", &config);
    write("model.safetensors", &weights);
    if source.chance(0.3) {
        let file =
            source.choose(&["model.safetensors", "config.json", "..", "", "absent", "/dev/zero"]);
        write(
            "model.safetensors.index.json",
            format!(r#"{{"weight_map":{{"self_attn.q_proj.weight":"{file}"}}}}"#).as_bytes(),
        );
    }
    let mut options = CheckpointOptions::new();
    if source.chance(0.3) {
        options = options.with_length(source.size());
    }
    if source.chance(0.2) {
        options = options.with_config(source.choose(&[
            r#"{"model_type":"llama"}"#,
            r#"{"sliding_window":null}"#,
            r#"{"rope_scaling":{"type":"linear","factor":1e-320}}"#,
            "[]",
            "{",
        ]));
    }
    if let Some(model) = tally.record(options.open(&directory)) {
        let layer = source.choose(&[0, 0, 0, 1, usize::MAX]);
        if let Some(softmax) = tally.record(model.softmax_attention::<f32>(layer)) {
            let x = Array2::from_elem((3, softmax.config().model_dim), 0.5);
            tally.record(softmax.forward(&x, KeyMask::All));
        }
    }
    if let Some(tensors) = tally.record(Tensors::open_file(directory.join("model.safetensors"))) {
        tally.record(tensors.numbers::<f64>("self_attn.q_proj.weight", &[source.size(), 4]));
        tally.record(tensors.matrix::<f32>("self_attn.q_proj.weight", 4, 4));
        tally.record(PublishedAttention::<f32>::from_tensors(
            &tensors,
            "self_attn.",
            AttentionConfig::new(4, 2),
        ));
    }
    fs::remove_dir_all(&directory).unwrap_or_else(|error| panic!("{error}"));
}
