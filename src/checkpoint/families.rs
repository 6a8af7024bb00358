//! Where each family keeps its projections.

use ndarray::{Array1, Array2, s};

use super::config::{Biases, Config};
use super::tensors::Tensors;
use super::{Family, fault};
use crate::Real;
use crate::error::Result;
use crate::layer::{AttentionConfig, AttentionWeights};

/// Names of the tensors of a family's attention.
#[derive(Debug, Clone, Copy)]
struct Names {
    /// What may stand before the layers' numbers: with the head of the model or without, or as a
    /// part of a larger model.
    prefixes: &'static [&'static str],
    /// What stands between the number and the projections.
    attention: &'static str,
    projections: Projections,
}

#[derive(Debug, Clone, Copy)]
enum Projections {
    /// Queries, keys, values and outputs.
    Separate([&'static str; 4]),
    /// Query, key and value of a head together, head after head, and outputs.
    ByHeads([&'static str; 2]),
    /// All queries, all keys, all values, and outputs.
    Stacked([&'static str; 2]),
}

impl Projections {
    fn names(&self) -> &[&'static str] {
        match self {
            Self::Separate(names) => names,
            Self::ByHeads(names) | Self::Stacked(names) => names,
        }
    }
}

impl Names {
    fn of(family: Family) -> Self {
        let llama = Self {
            prefixes: &[
                "model.layers.",
                "layers.",
                "language_model.model.layers.",
                "model.language_model.layers.",
            ],
            attention: ".self_attn.",
            projections: Projections::Separate(["q_proj", "k_proj", "v_proj", "o_proj"]),
        };
        match family {
            Family::GptNeox => Self {
                prefixes: &["gpt_neox.layers.", "layers."],
                attention: ".attention.",
                projections: Projections::ByHeads(["query_key_value", "dense"]),
            },
            Family::Opt => Self {
                prefixes: &["model.decoder.layers.", "decoder.layers."],
                projections: Projections::Separate(["q_proj", "k_proj", "v_proj", "out_proj"]),
                ..llama
            },
            Family::Bert => Self {
                prefixes: &["bert.encoder.layer.", "encoder.layer."],
                attention: ".attention.",
                projections: Projections::Separate([
                    "self.query",
                    "self.key",
                    "self.value",
                    "output.dense",
                ]),
            },
            Family::Phi3 => {
                Self { projections: Projections::Stacked(["qkv_proj", "o_proj"]), ..llama }
            }
            _ => llama,
        }
    }

    /// Whether attention has a tensor of this name, whatever it is read for.
    fn has(&self, config: &Config, name: &str, shape: &[usize]) -> bool {
        let names = self.projections.names();
        let part = |end: &str| {
            let own = name.strip_suffix(end);
            own.and_then(|own| names.iter().position(|&projection| projection == own))
        };
        if part(".weight").is_some() {
            return true;
        }
        if let Some(projection) = part(".bias") {
            let output = projection + 1 == names.len();
            return config.biases == Biases::All || config.biases == Biases::Qkv && !output;
        }
        match (config.family, name) {
            // A table made of the config, in files of older versions.
            (_, "rotary_emb.inv_freq") => config.attention.rotary.is_some(),
            (_, "q_norm.weight" | "k_norm.weight") => config.attention.qk_norm.is_some(),
            // The causal mask, in files of older versions.
            (Family::GptNeox, "bias") => shape.len() == 4,
            (Family::GptNeox, "masked_bias") => shape.is_empty(),
            // Behind the residual connection.
            (Family::Bert, name) => {
                let norm = name.strip_prefix("output.LayerNorm.");
                norm.is_some_and(|part| ["weight", "bias", "gamma", "beta"].contains(&part))
            }
            _ => false,
        }
    }
}

/// What stands before the layers' numbers in these files. Refuses tensors under the attention of
/// any layer that would not be read.
pub(super) fn prefix(config: &Config, tensors: &Tensors) -> Result<&'static str> {
    let names = Names::of(config.family);
    let (attention, probe) = (names.attention, names.projections.names()[0]);
    let first = |prefix: &str| format!("{prefix}0{attention}{probe}.weight");
    let mut found = names.prefixes.iter().copied().filter(|p| tensors.contains(&first(p)));
    let Some(prefix) = found.next() else {
        let name = first(names.prefixes[0]);
        let tensor = names.of_layer_0(tensors).map_or("nothing".to_owned(), |name| {
            format!("{name:?} among the tensors of its attention")
        });
        return Err(fault(name, "a tensor of the model", tensor));
    };
    if let Some(other) = found.next() {
        return Err(fault(first(other), "absent", format!("a second {:?}", first(prefix))));
    }
    let unknown = tensors.names().find(|name| {
        let within = name.strip_prefix(prefix).and_then(|rest| rest.split_once(attention));
        within.is_some_and(|(layer, own)| {
            let shape = tensors.shape(name).unwrap_or_default();
            layer.bytes().all(|byte| byte.is_ascii_digit()) && !names.has(config, own, shape)
        })
    });
    match unknown {
        Some(name) => Err(fault(
            name,
            "absent, as the config announces no such tensor of attention",
            format!("a tensor {:?}", tensors.shape(name).unwrap_or_default()),
        )),
        None => Ok(prefix),
    }
}

impl Names {
    /// Some tensor of the first layer's attention, for a message.
    fn of_layer_0<'t>(&self, tensors: &'t Tensors) -> Option<&'t str> {
        let is_own = |name: &&str| {
            let mut starts =
                self.prefixes.iter().map(|prefix| format!("{prefix}0{}", self.attention));
            starts.any(|start| name.starts_with(&start))
        };
        tensors.names().find(is_own)
    }
}

/// The projections of one layer, `layer` being below their number.
pub(super) fn attention_weights<T: Real>(
    config: &Config,
    tensors: &Tensors,
    prefix: &str,
    layer: usize,
) -> Result<AttentionWeights<T>> {
    let names = Names::of(config.family);
    let place = format!("{prefix}{layer}{}", names.attention);
    let name = |name: &&str| format!("{place}{name}");
    let weights = match &names.projections {
        Projections::Separate(names) => separate(config, tensors, names.each_ref().map(name))?,
        Projections::ByHeads(names) => {
            let biases = config.biases != Biases::None;
            let [qkv, out] = names.each_ref().map(name);
            by_heads(&config.attention, config.head_dim, biases, tensors, &qkv, &out)?
        }
        Projections::Stacked(names) => stacked(config, tensors, names.each_ref().map(name))?,
    };
    if config.attention.qk_norm.is_none() {
        return Ok(weights);
    }
    let norm = |which: &str| -> Result<Array1<T>> {
        let norm = tensors.vector(&format!("{place}{which}_norm.weight"), config.head_dim)?;
        Ok(norm + T::from_f64(config.norm_shift))
    };
    Ok(weights.with_qk_norms(norm("q")?, norm("k")?))
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
    let bias = |name: &str, len| tensors.vector(&format!("{name}.bias"), len);
    let qkv = || -> Result<_> { Ok((bias(q, wide)?, bias(k, narrow)?, bias(v, narrow)?)) };
    Ok(match config.biases {
        Biases::None => weights,
        Biases::Qkv => {
            let (q, k, v) = qkv()?;
            weights.with_qkv_biases(q, k, v)
        }
        Biases::All => {
            let (q, k, v) = qkv()?;
            weights.with_biases(q, k, v, bias(o, hidden)?)
        }
    })
}

/// All queries, then all keys, then all values in one tensor, without biases: `[(h + 2·h_kv)·d,
/// D]`.
fn stacked<T: Real>(
    config: &Config,
    tensors: &Tensors,
    names: [String; 2],
) -> Result<AttentionWeights<T>> {
    let (hidden, wide) = (config.attention.model_dim, config.attention.heads * config.head_dim);
    let narrow = config.attention.kv_heads * config.head_dim;
    let [qkv, o] = names.map(|name| format!("{name}.weight"));
    let qkv: Array2<T> = tensors.matrix(&qkv, wide + 2 * narrow, hidden)?;
    let part = |first, rows| qkv.slice(s![first..first + rows, ..]).to_owned();
    Ok(AttentionWeights::new(
        part(0, wide),
        part(wide, narrow),
        part(wide + narrow, narrow),
        tensors.matrix(&o, hidden, wide)?,
    ))
}

/// Query, key and value of a head together, head after head: `[h, 3, d, D]`.
pub(super) fn by_heads<T: Real>(
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
