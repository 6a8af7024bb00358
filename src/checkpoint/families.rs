//! Where each family keeps its projections.

use ndarray::{Array1, Array2, s};

use super::config::Config;
use super::tensors::Tensors;
use super::{Family, fault};
use crate::error::Result;
use crate::layer::{AttentionConfig, AttentionWeights};
use crate::real::Real;

/// The projections of one layer, `layer` being below their number.
pub(super) fn attention_weights<T: Real>(
    config: &Config,
    tensors: &Tensors,
    layer: usize,
) -> Result<AttentionWeights<T>> {
    // Before the layers' names, with the head of the model or without.
    let (prefixes, probe): (&[&str], _) = match config.family {
        Family::Llama => (&["model.layers.", "layers."], ".self_attn.q_proj.weight"),
        Family::GptNeox => (&["gpt_neox.layers.", "layers."], ".attention.query_key_value.weight"),
        Family::Opt => (&["model.decoder.layers.", "decoder.layers."], ".self_attn.q_proj.weight"),
        Family::Bert => {
            (&["bert.encoder.layer.", "encoder.layer."], ".attention.self.query.weight")
        }
    };
    let found = prefixes.iter().find(|prefix| tensors.contains(&format!("{prefix}{layer}{probe}")));
    let Some(prefix) = found else {
        return Err(fault(
            format!("{}{layer}{probe}", prefixes[0]),
            "a tensor of the model",
            "nothing",
        ));
    };
    let place = format!("{prefix}{layer}.");
    match config.family {
        Family::Llama => separate(
            config,
            tensors,
            ["q", "k", "v", "o"].map(|which| format!("{place}self_attn.{which}_proj")),
        ),
        Family::Opt => separate(
            config,
            tensors,
            ["q", "k", "v", "out"].map(|which| format!("{place}self_attn.{which}_proj")),
        ),
        Family::Bert => {
            let names = ["self.query", "self.key", "self.value", "output.dense"]
                .map(|which| format!("{place}attention.{which}"));
            separate(config, tensors, names)
        }
        Family::GptNeox => {
            let names =
                ["query_key_value", "dense"].map(|which| format!("{place}attention.{which}"));
            fused(&config.attention, config.head_dim, config.biases, tensors, &names[0], &names[1])
        }
    }
}

/// Queries, keys, values and outputs each in a tensor of their own.
fn separate<T: Real>(
    config: &Config,
    tensors: &Tensors,
    names: [String; 4],
) -> Result<AttentionWeights<T>> {
    let (hidden, wide) = (config.attention.model_dim, config.attention.heads * config.head_dim);
    let narrow = config.attention.kv_heads * config.head_dim;
    let matrix =
        |name: &str, rows, columns| tensors.matrix(&format!("{name}.weight"), rows, columns);
    let [q, k, v, o] = &names;
    let weights = AttentionWeights::new(
        matrix(q, wide, hidden)?,
        matrix(k, narrow, hidden)?,
        matrix(v, narrow, hidden)?,
        matrix(o, hidden, wide)?,
    );
    if !config.biases {
        return Ok(weights);
    }
    let bias = |name: &str, len| tensors.vector(&format!("{name}.bias"), len);
    Ok(weights.with_biases(bias(q, wide)?, bias(k, narrow)?, bias(v, narrow)?, bias(o, hidden)?))
}

/// Query, key and value of a head together, head after head: `[h, 3, d, D]`.
pub(super) fn fused<T: Real>(
    config: &AttentionConfig,
    d: usize,
    biases: bool,
    tensors: &Tensors,
    qkv: &str,
    out: &str,
) -> Result<AttentionWeights<T>> {
    let (hidden, heads) = (config.model_dim, config.heads);
    let matrix: Array2<T> = tensors.matrix(&format!("{qkv}.weight"), 3 * heads * d, hidden)?;
    let rows_of = |which: usize| (0..heads * d).map(move |row| (row / d * 3 + which) * d + row % d);
    let part = |which| {
        let mut part = Array2::zeros((heads * d, hidden));
        for (row, from) in rows_of(which).enumerate() {
            part.slice_mut(s![row, ..]).assign(&matrix.slice(s![from, ..]));
        }
        part
    };
    let output = tensors.matrix(&format!("{out}.weight"), hidden, heads * d)?;
    let weights = AttentionWeights::new(part(0), part(1), part(2), output);
    if !biases {
        return Ok(weights);
    }
    let bias: Array1<T> = tensors.vector(&format!("{qkv}.bias"), 3 * heads * d)?;
    let part = |which| rows_of(which).map(|from| bias[from]).collect::<Array1<T>>();
    Ok(weights.with_biases(
        part(0),
        part(1),
        part(2),
        tensors.vector(&format!("{out}.bias"), hidden)?,
    ))
}
