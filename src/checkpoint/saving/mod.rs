//! Layers and their maps as safetensors files.
//!
//! ```text
//! __metadata__   dijiang.version = 2, dijiang.crc32, dijiang.layers (files of several layers)
//! per layer      the layer's own type
//!                self_attn.{q,k,v,o}_proj.{weight,bias}, self_attn.{q,k}_norm.weight
//!                self_attn.dijiang.output_delta
//! per kv head    F64
//!                self_attn.dijiang.{h}.{query,key}.{center,scale,radii}
//!                self_attn.dijiang.{h}.{log_weight,log_mix,log_decay}
//!                self_attn.dijiang.{h}.signs or .{deep,dense}.{query,key}
//! ```
//!
//! Several layers are told apart by `model.layers.{l}.` before each name, as in Hugging Face files
//! of the LLaMA family. Config and choices are metadata under the same names
//! (`self_attn.dijiang.scale`, `self_attn.dijiang.0.pairing`). The output projection stands there
//! without its delta, which has a tensor of its own. The checksum is over all of this, by
//! [`Checksum`].

mod read;
mod write;

use crc32fast::Hasher;
use safetensors::tensor::Dtype;

use crate::Real;
use crate::attention::Causality;
use crate::error::{Error, Result};
use crate::files::fault;
use crate::kernel::{Envelope, Pairing, Sides};
use crate::layer::{AttentionConfig, DijiangAttention, RotaryPairing, RotaryScaling};
use read::File;
use write::Writer;

/// What this version writes.
const VERSION: &str = "2";
/// What it reads too: one local window for all heads, no sinks, no norms, no deltas, no checksum.
const FIRST_VERSION: &str = "1";

/// Where the only layer of a file lies.
const ALONE: &str = "self_attn.";

/// Where layer `l` of several lies.
fn place(l: usize) -> String {
    format!("model.layers.{l}.self_attn.")
}

impl<T: Real> DijiangAttention<T> {
    /// The whole layer as a safetensors file: weights, config, maps, decays, windows and sinks.
    ///
    /// Names are those of Hugging Face LLaMA files without their `model.layers.{l}.`
    /// (`self_attn.q_proj.weight`), and `self_attn.dijiang.*` for everything else. The same layer
    /// gives the same bytes.
    ///
    /// # Cost
    /// One allocation of the file's size: the weights, and a few numbers per feature in f64.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more heads than a safetensors header can list, some tens of
    /// thousands.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::KeyMask;
    /// use dijiang::kernel::DctMapConfig;
    /// use dijiang::layer::{
    ///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    ///     SoftmaxAttention,
    /// };
    /// use ndarray::Array2;
    ///
    /// let eye = || Array2::<f32>::eye(8);
    /// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let options = DijiangOptions::new().with_window(None);
    /// let layer = DijiangAttention::from_softmax(&softmax, options)?;
    /// let file = layer.to_safetensors()?; // std::fs::write(path, &file)
    ///
    /// let loaded = DijiangAttention::<f32>::from_safetensors(&file)?;
    /// let x = Array2::from_shape_fn((5, 8), |(i, j)| ((i * 3 + j) % 7) as f32 - 3.0);
    /// // Bit for bit:
    /// assert_eq!(loaded.forward(&x, KeyMask::All)?, layer.forward(&x, KeyMask::All)?);
    ///
    /// // The maps alone, for a layer made anew from the model's own file.
    /// let maps = layer.save_maps()?;
    /// let options = DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(2));
    /// let mut anew = DijiangAttention::from_softmax(&softmax, options)?;
    /// anew.load_maps(&maps)?;
    /// assert_eq!(anew.forward(&x, KeyMask::All)?, layer.forward(&x, KeyMask::All)?);
    /// assert!(anew.load_maps(&maps[..maps.len() - 1]).is_err()); // and `anew` is as it was
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn to_safetensors(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.maps(ALONE, self);
        writer.weights(ALONE, self);
        writer.finish()
    }

    /// The layer that [`to_safetensors`](Self::to_safetensors) wrote: it gives the same bits. Other
    /// tensors and metadata in the file are ignored.
    ///
    /// # Cost
    /// One copy of the weights, and what building the maps costs. No size in the file takes memory
    /// before a tensor of that size has been found in it.
    ///
    /// # Errors
    /// [`Error::Format`], naming what is missing, damaged, of another shape or type (weights are
    /// never converted), out of its domain, or of another version.
    pub fn from_safetensors(bytes: &[u8]) -> Result<Self> {
        File::open(bytes)?.layer(ALONE)
    }

    /// What calibration, plan and refit made, without the weights: maps, decays, windows, sinks and
    /// [output delta](Self::output_delta). A small file to go with the model's own.
    ///
    /// # Cost
    /// Some numbers per feature, in f64, and a delta if there is one.
    ///
    /// # Errors
    /// As [`to_safetensors`](Self::to_safetensors).
    pub fn save_maps(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.maps(ALONE, self);
        writer.finish()
    }

    /// Takes over all that [`save_maps`](Self::save_maps) wrote, whatever it was here: with the
    /// same weights, the layer then gives the same bits as the saved one. States made before belong
    /// to another layer then.
    ///
    /// Files are not bound to an element type: maps of an `f64` layer fit an `f32` one, deltas do
    /// not. The configs are compared; other weights of the same config are not noticed.
    ///
    /// # Cost
    /// What building the maps costs. The weights are neither copied nor looked at, but for the
    /// output projection where there is a delta.
    ///
    /// # Errors
    /// [`Error::Format`] as [`from_safetensors`](Self::from_safetensors), and for a layer of
    /// another config. After an error the layer is unchanged.
    pub fn load_maps(&mut self, bytes: &[u8]) -> Result<()> {
        *self = File::open(bytes)?.maps(ALONE, self)?;
        Ok(())
    }
}

/// The layers of a model in one safetensors file, each as [`DijiangAttention::to_safetensors`]
/// writes it, under `model.layers.{l}.`.
///
/// # Cost
/// One allocation of the file's size.
///
/// # Errors
/// [`Error::Empty`] without layers, [`Error::TooLarge`] for more heads than a safetensors header
/// can list.
pub fn save_layers<'a, T: Real>(
    layers: impl IntoIterator<Item = &'a DijiangAttention<T>>,
) -> Result<Vec<u8>> {
    save(layers, |writer, place, layer| {
        writer.maps(place, layer);
        writer.weights(place, layer);
    })
}

/// The layers that [`save_layers`] wrote, in their order.
///
/// # Cost
/// That of each layer, one after another; the file's bytes may be mapped rather than read.
///
/// # Errors
/// As [`DijiangAttention::from_safetensors`].
pub fn load_layers<T: Real>(bytes: &[u8]) -> Result<Vec<DijiangAttention<T>>> {
    let file = File::open(bytes)?;
    (0..file.layers()?).map(|l| file.layer(&place(l))).collect()
}

/// The maps of a model in one safetensors file, each as [`DijiangAttention::save_maps`] writes
/// them, under `model.layers.{l}.`.
///
/// # Errors
/// As [`save_layers`].
///
/// # Examples
/// ```
/// use dijiang::checkpoint::{load_maps, save_maps};
/// use dijiang::kernel::DctMapConfig;
/// use dijiang::layer::{
///     AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
/// };
/// use ndarray::Array2;
///
/// let eye = || Array2::<f32>::eye(8);
/// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
/// let options = |seed| DijiangOptions::new().with_map(DctMapConfig::new().with_seed(seed));
/// let layer = |seed| DijiangAttention::from_softmax(&softmax, options(seed));
///
/// let file = save_maps(&[layer(1)?, layer(2)?])?;
/// let mut model = [layer(3)?, layer(4)?];
/// load_maps(&mut model, &file)?;
/// assert_eq!(model[1].maps()[0].params(), layer(2)?.maps()[0].params());
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn save_maps<'a, T: Real>(
    layers: impl IntoIterator<Item = &'a DijiangAttention<T>>,
) -> Result<Vec<u8>> {
    save(layers, |writer, place, layer| writer.maps(place, layer))
}

/// Takes over the maps that [`save_maps`] or [`save_layers`] wrote, as
/// [`DijiangAttention::load_maps`] does.
///
/// # Errors
/// As [`DijiangAttention::load_maps`], and for another number of layers. After an error every layer
/// is unchanged.
pub fn load_maps<'a, T: Real>(
    layers: impl IntoIterator<Item = &'a mut DijiangAttention<T>>,
    bytes: &[u8],
) -> Result<()> {
    let file = File::open(bytes)?;
    let layers: Vec<_> = layers.into_iter().collect();
    let saved = file.layers()?;
    if saved != layers.len() {
        return Err(fault("dijiang.layers", layers.len(), saved));
    }
    let loaded: Vec<_> = layers
        .iter()
        .enumerate()
        .map(|(l, layer)| file.maps(&place(l), layer))
        .collect::<Result<_>>()?;
    for (layer, loaded) in layers.into_iter().zip(loaded) {
        *layer = loaded;
    }
    Ok(())
}

fn save<'a, T: Real>(
    layers: impl IntoIterator<Item = &'a DijiangAttention<T>>,
    add: impl Fn(&mut Writer<'a, T>, &str, &'a DijiangAttention<T>),
) -> Result<Vec<u8>> {
    let (mut writer, mut count) = (Writer::new(), 0);
    for layer in layers {
        add(&mut writer, &place(count), layer);
        count += 1;
    }
    if count == 0 {
        return Err(Error::Empty { argument: "layers" });
    }
    writer.note("dijiang.layers", count);
    writer.finish()
}

/// CRC-32 over the format's own notes and then its tensors, each by their names in order: name, a
/// zero, value or little-endian numbers, a zero.
#[derive(Default)]
struct Checksum(Hasher);

/// Where a file says its [`Checksum`].
const CHECKSUM: &str = "dijiang.crc32";

impl Checksum {
    /// Whether the format defines what is called so; anything else may lie in a file too.
    fn covers(name: &str) -> bool {
        name != CHECKSUM && (name.starts_with("dijiang.") || name.contains("self_attn."))
    }

    fn add(&mut self, name: &str, value: &[u8]) {
        for part in [name.as_bytes(), b"\0", value, b"\0"] {
            self.0.update(part);
        }
    }

    fn finish(self) -> String {
        format!("{:08x}", self.0.finalize())
    }
}

/// A choice as a word.
trait Word: Copy + 'static {
    const ALL: &'static [Self];

    fn word(self) -> &'static str;
}

macro_rules! words {
    ($($choice:ident: $($variant:ident $word:literal),+;)+) => {$(
        impl Word for $choice {
            const ALL: &'static [Self] = &[$(Self::$variant),+];

            fn word(self) -> &'static str {
                match self {
                    $(Self::$variant => $word),+
                }
            }
        }
    )+};
}

words! {
    Causality: Causal "causal", Bidirectional "bidirectional";
    RotaryPairing: Halves "halves", Interleaved "interleaved";
    Envelope: None "none", Gaussian "gaussian";
    Pairing: Single "single", Antithetic "antithetic";
    Sides: Untied "untied", Tied "tied";
}

/// The note of the rotary embedding's hold, which comes with the maps.
const HOLD: &str = "rotary.hold";

/// The config as metadata, but for [`HOLD`], names without their place. Floats in the shortest form
/// that is read back as the same number.
fn config_notes(
    config: &AttentionConfig,
    head_dim: usize,
    scale: f64,
) -> Vec<(&'static str, String)> {
    let mut notes = vec![
        ("model_dim", config.model_dim.to_string()),
        ("heads", config.heads.to_string()),
        ("kv_heads", config.kv_heads.to_string()),
        ("head_dim", head_dim.to_string()),
        ("scale", format!("{scale:?}")),
        ("causality", config.causality.word().to_owned()),
        ("qk_norm", config.qk_norm.map_or("none".to_owned(), |epsilon| format!("{epsilon:?}"))),
    ];
    let Some(rotary) = &config.rotary else {
        notes.push(("rotary", "none".to_owned()));
        return notes;
    };
    let dims = rotary.dims.filter(|&dims| dims != head_dim); // all of them is no choice
    notes.extend([
        ("rotary", rotary.pairing.word().to_owned()),
        ("rotary.base", format!("{:?}", rotary.base)),
        ("rotary.dims", dims.map_or("all".to_owned(), |dims| dims.to_string())),
    ]);
    match &rotary.scaling {
        RotaryScaling::None => notes.push(("rotary.scaling", "none".to_owned())),
        RotaryScaling::Linear { factor } => {
            notes.extend([
                ("rotary.scaling", "linear".to_owned()),
                ("rotary.factor", format!("{factor:?}")),
            ]);
        }
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            notes.extend([
                ("rotary.scaling", "llama3".to_owned()),
                ("rotary.factor", format!("{factor:?}")),
                ("rotary.low_freq_factor", format!("{low_freq_factor:?}")),
                ("rotary.high_freq_factor", format!("{high_freq_factor:?}")),
                ("rotary.original_context", original_context.to_string()),
            ])
        }
        RotaryScaling::Dynamic { factor, original_context, length } => notes.extend([
            ("rotary.scaling", "dynamic".to_owned()),
            ("rotary.factor", format!("{factor:?}")),
            ("rotary.original_context", original_context.to_string()),
            ("rotary.length", length.to_string()),
        ]),
        RotaryScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
        } => notes.extend([
            ("rotary.scaling", "yarn".to_owned()),
            ("rotary.factor", format!("{factor:?}")),
            ("rotary.original_context", original_context.to_string()),
            ("rotary.beta_fast", format!("{beta_fast:?}")),
            ("rotary.beta_slow", format!("{beta_slow:?}")),
            ("rotary.attention_factor", format!("{attention_factor:?}")),
        ]),
        RotaryScaling::LongRope { factors, attention_factor } => {
            let factors: Vec<String> = factors.iter().map(|factor| format!("{factor:?}")).collect();
            notes.extend([
                ("rotary.scaling", "longrope".to_owned()),
                ("rotary.factors", factors.join(" ")),
                ("rotary.attention_factor", format!("{attention_factor:?}")),
            ]);
        }
    }
    notes
}

/// The shape of a projection of a checked config.
fn weights_shape(config: &AttentionConfig, name: char) -> Vec<usize> {
    let head_dim = config.head_dim.unwrap_or(config.model_dim / config.heads);
    match name {
        'q' => vec![config.heads * head_dim, config.model_dim],
        'o' => vec![config.model_dim, config.heads * head_dim],
        _ => vec![config.kv_heads * head_dim, config.model_dim],
    }
}

/// The safetensors type of `E`.
fn dtype<E: Real>() -> Dtype {
    if size_of::<E>() == size_of::<f64>() { Dtype::F64 } else { Dtype::F32 }
}
