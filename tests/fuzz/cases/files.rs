//! Bytes that say they are a model: safetensors files of layers and maps, and Hugging Face
//! directories.

use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

use dijiang::attention::{KeyMask, Window};
use dijiang::checkpoint::{Checkpoint, Tensors};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    PublishedAttention, Rotary, SoftmaxAttention, load_layers, load_maps, save_layers, save_maps,
};
use ndarray::Array2;

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
        DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_window(window))
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

fn directories(source: &mut Source<'_>, tally: &mut Tally) {
    let family = source.choose(&["llama", "gpt_neox", "opt", "bert", "mamba"]);
    let mut config = format!(
        r#"{{"model_type":"{family}","hidden_size":4,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":2,"head_dim":2,"rope_theta":10000.0,"rotary_pct":1.0,"rope_scaling":{{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":64}},"attention_bias":false,"enable_bias":false}}"#
    );
    for _ in 0..source.below(3) {
        config = replace_number(source, &config);
    }
    let mut config = config.into_bytes();
    if source.chance(0.2) {
        let at = source.below(config.len());
        config[at] ^= 1 << source.below(8);
    }
    // With the names of a LLaMA model, or of one layer.
    let mut weights = source.choose(&[&sound()[0], &sound()[2]]).clone();
    if source.chance(0.5) {
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
    if let Some(model) = tally.record(Checkpoint::open(&directory)) {
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
