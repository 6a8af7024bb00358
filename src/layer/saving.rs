//! Layers and their maps as safetensors files.
//!
//! ```text
//! __metadata__   dijiang.version = 1, dijiang.layers (files of several layers)
//! per layer      self_attn.{q,k,v,o}_proj.{weight,bias}                        the layer's own type
//! per kv head    self_attn.dijiang.{h}.{query,key}.{center,scale,radii}        F64
//!                self_attn.dijiang.{h}.{log_weight,log_mix,log_decay}, and .signs or .dense.{query,key}
//! ```
//!
//! Several layers are told apart by `model.layers.{l}.` before each name, as in Hugging Face files of the LLaMA family. Config and
//! choices are metadata under the same names (`self_attn.dijiang.scale`, `self_attn.dijiang.0.pairing`).

use std::slice::from_ref;
use std::sync::Arc;

use ndarray::{Array1, Array2, ArrayViewD};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use safetensors::{SafeTensorError, SafeTensors};

use crate::attention::Near;
use crate::error::{Error, Result, within};
use crate::kernel::{DctMap, DctParams, Envelope, Pairing, Projection, SideParams, Sides};
use crate::layer::Attention;
use crate::layer::config::{AttentionConfig, Causality};
use crate::layer::dijiang::DijiangAttention;
use crate::layer::projection::Projections;
use crate::layer::rotary::{Rotary, RotaryPairing, RotaryScaling};
use crate::layer::weights::AttentionWeights;
use crate::real::Real;

/// What this version writes, and all it reads.
const VERSION: &str = "1";

/// Where the only layer of a file lies.
const ALONE: &str = "self_attn.";

/// Largest header the safetensors parser accepts, in bytes.
const MAX_HEADER: usize = 100_000_000;

/// Where layer `l` of several lies.
fn place(l: usize) -> String {
    format!("model.layers.{l}.self_attn.")
}

impl<T: Real> DijiangAttention<T> {
    /// The whole layer as a safetensors file: weights, config, maps, decays and near part.
    ///
    /// Names are those of Hugging Face LLaMA files without their `model.layers.{l}.` (`self_attn.q_proj.weight`), and
    /// `self_attn.dijiang.*` for everything else. The same layer gives the same bytes.
    ///
    /// # Cost
    /// One allocation of the file's size: the weights, and a few numbers per feature in f64.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more heads than a safetensors header can list, some tens of thousands.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::KeyMask;
    /// use dijiang::layer::{Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention};
    /// use ndarray::Array2;
    ///
    /// let eye = || Array2::<f32>::eye(8);
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), AttentionWeights::new(eye(), eye(), eye(), eye()))?;
    /// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_near(None))?;
    /// let file = layer.to_safetensors()?; // std::fs::write(path, &file)
    ///
    /// let loaded = DijiangAttention::<f32>::from_safetensors(&file)?;
    /// let x = Array2::from_shape_fn((5, 8), |(i, j)| ((i * 3 + j) % 7) as f32 - 3.0);
    /// assert_eq!(loaded.forward(&x, KeyMask::All)?, layer.forward(&x, KeyMask::All)?); // bit for bit
    ///
    /// // The maps alone, for a layer made anew from the model's own file.
    /// let maps = layer.save_maps()?;
    /// let mut anew = DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_blocks(2))?;
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

    /// The layer that [`to_safetensors`](Self::to_safetensors) wrote: it gives the same bits. Other tensors and metadata in the
    /// file are ignored.
    ///
    /// # Cost
    /// One copy of the weights, and what building the maps costs. Never more memory than a small multiple of the file.
    ///
    /// # Errors
    /// [`Error::Format`], naming what is missing, damaged, of another shape or type (weights are never converted), out of its
    /// domain, or of another version.
    pub fn from_safetensors(bytes: &[u8]) -> Result<Self> {
        File::open(bytes)?.layer(ALONE)
    }

    /// What calibration made, without the weights: maps, decays and near part. A small file to go with the model's own.
    ///
    /// # Cost
    /// Some numbers per feature, in f64.
    ///
    /// # Errors
    /// As [`to_safetensors`](Self::to_safetensors).
    pub fn save_maps(&self) -> Result<Vec<u8>> {
        let mut writer = Writer::new();
        writer.maps(ALONE, self);
        writer.finish()
    }

    /// Takes over maps, decays and near part that [`save_maps`](Self::save_maps) wrote, whatever they were here: with the same
    /// weights, the layer then gives the same bits as the saved one. States made before belong to another layer then.
    ///
    /// Files are not bound to an element type: maps of an `f64` layer fit an `f32` one.
    ///
    /// # Errors
    /// [`Error::Format`] as [`from_safetensors`](Self::from_safetensors), and for a layer of another config. After an error the
    /// layer is unchanged.
    pub fn load_maps(&mut self, bytes: &[u8]) -> Result<()> {
        *self = File::open(bytes)?.maps(ALONE, self)?;
        Ok(())
    }
}

/// The layers of a model in one safetensors file, each as [`DijiangAttention::to_safetensors`] writes it, under `model.layers.{l}.`.
///
/// # Errors
/// [`Error::Empty`] without layers, [`Error::TooLarge`] for more heads than a safetensors header can list.
pub fn save_layers<'a, T: Real>(layers: impl IntoIterator<Item = &'a DijiangAttention<T>>) -> Result<Vec<u8>> {
    save(layers, |writer, place, layer| {
        writer.maps(place, layer);
        writer.weights(place, layer);
    })
}

/// The layers that [`save_layers`] wrote, in their order.
///
/// # Errors
/// As [`DijiangAttention::from_safetensors`].
pub fn load_layers<T: Real>(bytes: &[u8]) -> Result<Vec<DijiangAttention<T>>> {
    let file = File::open(bytes)?;
    (0..file.layers()?).map(|l| file.layer(&place(l))).collect()
}

/// The maps of a model in one safetensors file, each as [`DijiangAttention::save_maps`] writes them, under `model.layers.{l}.`.
///
/// # Errors
/// As [`save_layers`].
///
/// # Examples
/// ```
/// use dijiang::layer::{AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention, load_maps, save_maps};
/// use ndarray::Array2;
///
/// let eye = || Array2::<f32>::eye(8);
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), AttentionWeights::new(eye(), eye(), eye(), eye()))?;
/// let layer = |seed| DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_seed(seed));
///
/// let file = save_maps(&[layer(1)?, layer(2)?])?;
/// let mut model = [layer(3)?, layer(4)?];
/// load_maps(&mut model, &file)?;
/// assert_eq!(model[1].maps()[0].params(), layer(2)?.maps()[0].params());
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn save_maps<'a, T: Real>(layers: impl IntoIterator<Item = &'a DijiangAttention<T>>) -> Result<Vec<u8>> {
    save(layers, |writer, place, layer| writer.maps(place, layer))
}

/// Takes over the maps that [`save_maps`] or [`save_layers`] wrote, as [`DijiangAttention::load_maps`] does.
///
/// # Errors
/// As [`DijiangAttention::load_maps`], and for another number of layers. After an error every layer is unchanged.
pub fn load_maps<'a, T: Real>(layers: impl IntoIterator<Item = &'a mut DijiangAttention<T>>, bytes: &[u8]) -> Result<()> {
    let file = File::open(bytes)?;
    let layers: Vec<_> = layers.into_iter().collect();
    let saved = file.layers()?;
    if saved != layers.len() {
        return Err(fault("dijiang.layers", layers.len(), saved));
    }
    let loaded: Vec<_> = layers.iter().enumerate().map(|(l, layer)| file.maps(&place(l), layer)).collect::<Result<_>>()?;
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

// ---- words for choices ---------------------------------------------------------------------------------------------

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

/// The config as metadata, names without their place. Floats in the shortest form that is read back as the same number.
fn config_notes(config: &AttentionConfig, head_dim: usize, scale: f64) -> Vec<(&'static str, String)> {
    let mut notes = vec![
        ("model_dim", config.model_dim.to_string()),
        ("heads", config.heads.to_string()),
        ("kv_heads", config.kv_heads.to_string()),
        ("head_dim", head_dim.to_string()),
        ("scale", format!("{scale:?}")),
        ("causality", config.causality.word().to_owned()),
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
    match rotary.scaling {
        RotaryScaling::None => notes.push(("rotary.scaling", "none".to_owned())),
        RotaryScaling::Linear { factor } => {
            notes.extend([("rotary.scaling", "linear".to_owned()), ("rotary.factor", format!("{factor:?}"))]);
        }
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => notes.extend([
            ("rotary.scaling", "llama3".to_owned()),
            ("rotary.factor", format!("{factor:?}")),
            ("rotary.low_freq_factor", format!("{low_freq_factor:?}")),
            ("rotary.high_freq_factor", format!("{high_freq_factor:?}")),
            ("rotary.original_context", original_context.to_string()),
        ]),
    }
    notes
}

// ---- writing -------------------------------------------------------------------------------------------------------

/// A file being put together: metadata and tensors in the order they are written. The `safetensors` crate would write the
/// metadata in another order each time.
struct Writer<'a, T> {
    notes: Vec<(String, String)>,
    tensors: Vec<(String, Vec<usize>, Numbers<'a, T>)>,
}

enum Numbers<'a, T> {
    Params(&'a [f64]),
    Weights(ArrayViewD<'a, T>),
}

impl<T: Real> Numbers<'_, T> {
    fn dtype(&self) -> Dtype {
        match self {
            Numbers::Params(_) => Dtype::F64,
            Numbers::Weights(_) => dtype::<T>(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Numbers::Params(numbers) => size_of_val(*numbers),
            Numbers::Weights(numbers) => numbers.len() * size_of::<T>(),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Numbers::Params(numbers) => out.extend(numbers.iter().flat_map(|number| number.to_le_bytes())),
            Numbers::Weights(numbers) if dtype::<T>() == Dtype::F64 => out.extend(numbers.iter().flat_map(|w| w.to_f64().to_le_bytes())),
            Numbers::Weights(numbers) => out.extend(numbers.iter().flat_map(|w| (w.to_f64() as f32).to_le_bytes())), // exact
        }
    }
}

/// The safetensors type of `E`.
fn dtype<E: Real>() -> Dtype {
    if size_of::<E>() == size_of::<f64>() { Dtype::F64 } else { Dtype::F32 }
}

impl<'a, T: Real> Writer<'a, T> {
    fn new() -> Self {
        let mut writer = Self { notes: Vec::new(), tensors: Vec::new() };
        writer.note("dijiang.version", VERSION);
        writer
    }

    fn note(&mut self, name: impl ToString, value: impl ToString) {
        self.notes.push((name.to_string(), value.to_string()));
    }

    fn params(&mut self, name: String, shape: &[usize], numbers: &'a [f64]) {
        self.tensors.push((name, shape.to_vec(), Numbers::Params(numbers)));
    }

    /// Everything but the weights.
    fn maps(&mut self, place: &str, layer: &'a DijiangAttention<T>) {
        let projections = layer.projections();
        for (name, value) in config_notes(projections.config(), projections.head_dim(), projections.scale()) {
            self.note(format!("{place}dijiang.{name}"), value);
        }
        self.note(format!("{place}dijiang.near"), if layer.near().is_some() { "chunks" } else { "none" });
        if let Some(near) = layer.near() {
            self.note(format!("{place}dijiang.near.chunk"), near.chunk);
            self.note(format!("{place}dijiang.near.back"), near.back);
        }
        for (h, (map, log_decay)) in layer.maps().iter().zip(layer.log_decay()).enumerate() {
            let place = format!("{place}dijiang.{h}.");
            self.map(&place, map.params());
            self.params(format!("{place}log_decay"), &[], from_ref(log_decay));
        }
    }

    fn map(&mut self, place: &str, params: &'a DctParams) {
        let (dim, rows) = (params.dim(), params.query.radii.len());
        let projection = match &params.projection {
            Projection::Dct => "dct",
            Projection::Mixed { signs } => {
                self.params(format!("{place}signs"), &[params.blocks(), 3, dim], signs);
                "mixed"
            }
            Projection::Dense { query, key } => {
                self.params(format!("{place}dense.query"), &[rows, dim], query);
                self.params(format!("{place}dense.key"), &[rows, dim], key);
                "dense"
            }
        };
        self.note(format!("{place}projection"), projection);
        self.note(format!("{place}envelope"), params.envelope.word());
        self.note(format!("{place}pairing"), params.pairing.word());
        self.note(format!("{place}sides"), params.sides.word());
        for (name, side) in [("query", &params.query), ("key", &params.key)] {
            for (what, numbers) in [("center", &side.center), ("scale", &side.scale), ("radii", &side.radii)] {
                self.params(format!("{place}{name}.{what}"), &[numbers.len()], numbers);
            }
        }
        self.params(format!("{place}log_weight"), &[params.log_weight.len()], &params.log_weight);
        self.params(format!("{place}log_mix"), &[], from_ref(&params.log_mix));
    }

    fn weights(&mut self, place: &str, layer: &'a DijiangAttention<T>) {
        let weights = layer.weights().as_ref();
        let mut biases = String::new();
        for (name, matrix, bias) in [
            ('q', &weights.q, &weights.q_bias),
            ('k', &weights.k, &weights.k_bias),
            ('v', &weights.v, &weights.v_bias),
            ('o', &weights.o, &weights.o_bias),
        ] {
            let matrix = Numbers::Weights(matrix.view().into_dyn());
            self.tensors.push((format!("{place}{name}_proj.weight"), weights_shape(layer.config(), name), matrix));
            if let Some(bias) = bias {
                let numbers = Numbers::Weights(bias.view().into_dyn());
                self.tensors.push((format!("{place}{name}_proj.bias"), vec![bias.len()], numbers));
                biases.push(name);
            }
        }
        self.note(format!("{place}dijiang.biases"), biases);
    }

    /// The bytes. Wide numbers lie first, so that every tensor is aligned.
    fn finish(mut self) -> Result<Vec<u8>> {
        self.tensors.sort_by_key(|(_, _, numbers)| numbers.dtype() != Dtype::F64);
        let notes: Vec<_> = self.notes.iter().map(|(name, value)| format!(r#""{name}":"{value}""#)).collect();
        let mut header = format!(r#"{{"__metadata__":{{{}}}"#, notes.join(","));
        let mut end = 0;
        for (name, shape, numbers) in &self.tensors {
            let start = end;
            end += numbers.bytes();
            header += &format!(r#","{name}":{{"dtype":"{:?}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#, numbers.dtype());
        }
        header.push('}');
        let len = header.len().next_multiple_of(8);
        if len > MAX_HEADER {
            return Err(Error::TooLarge { argument: "bytes of header", limit: MAX_HEADER, got: len });
        }
        let mut bytes = Vec::with_capacity(8 + len + end);
        bytes.extend((len as u64).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.resize(8 + len, b' ');
        self.tensors.iter().for_each(|(_, _, numbers)| numbers.write(&mut bytes));
        Ok(bytes)
    }
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

// ---- reading -------------------------------------------------------------------------------------------------------

/// A file whose header is sound. Every count in it that leads to memory being taken is first compared with a tensor's shape.
struct File<'a> {
    metadata: Metadata,
    data: &'a [u8],
}

fn fault(name: impl ToString, expected: impl ToString, got: impl ToString) -> Error {
    Error::Format { name: name.to_string(), expected: expected.to_string(), got: got.to_string() }
}

/// A fault that a constructor found in what lies at `place`.
fn fault_at(place: &str, expected: &str, error: Error) -> Error {
    fault(place.trim_end_matches('.'), expected, error)
}

impl<'a> File<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self> {
        check_numbers(bytes)?;
        let damaged = |error: SafeTensorError| fault("file", "in safetensors format", error);
        let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
        let data = bytes.get(8 + header..).ok_or_else(|| damaged(SafeTensorError::InvalidHeaderLength))?;
        let file = Self { metadata, data };
        match file.note("dijiang.version")? {
            VERSION => Ok(file),
            other => Err(fault("dijiang.version", VERSION, other)),
        }
    }

    fn note(&self, name: &str) -> Result<&str> {
        let note = self.metadata.metadata().as_ref().and_then(|notes| notes.get(name));
        note.map(String::as_str).ok_or_else(|| fault(name, "in the metadata", "nothing"))
    }

    /// A number in the metadata.
    fn number<N: std::str::FromStr>(&self, name: &str, expected: &str) -> Result<N> {
        let note = self.note(name)?;
        note.parse().map_err(|_| fault(name, expected, format!("{note:?}")))
    }

    fn count(&self, name: &str) -> Result<usize> {
        self.number(name, "a whole number")
    }

    fn float(&self, name: &str) -> Result<f64> {
        self.number(name, "a number")
    }

    fn choice<W: Word>(&self, name: &str) -> Result<W> {
        let note = self.note(name)?;
        let found = W::ALL.iter().find(|choice| choice.word() == note);
        found.copied().ok_or_else(|| {
            let words: Vec<_> = W::ALL.iter().map(|choice| choice.word()).collect();
            fault(name, words.join(" or "), format!("{note:?}"))
        })
    }

    fn layers(&self) -> Result<usize> {
        match self.count("dijiang.layers")? {
            0 => Err(fault("dijiang.layers", "at least 1", 0)),
            layers => Ok(layers),
        }
    }

    fn info(&self, name: &str, expected: impl Fn() -> String) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| fault(name, expected(), "nothing"))
    }

    /// The numbers of a tensor of exactly this type and shape, at most `limit` in magnitude.
    fn tensor<E: Real>(&self, name: &str, shape: &[usize], limit: f64) -> Result<Vec<E>> {
        let described = |dtype: Dtype, shape: &[usize]| format!("{dtype:?} {shape:?}");
        let expected = || described(dtype::<E>(), shape);
        let info = self.info(name, expected)?;
        if info.dtype != dtype::<E>() || info.shape != shape {
            return Err(fault(name, expected(), described(info.dtype, &info.shape)));
        }
        let (start, end) = info.data_offsets;
        let bytes = self.data.get(start..end).ok_or_else(|| fault(name, expected(), "an end of the file"))?;
        let numbers: Vec<E> = match dtype::<E>() {
            Dtype::F64 => bytes.as_chunks().0.iter().map(|&bytes| E::from_f64(f64::from_le_bytes(bytes))).collect(),
            _ => bytes.as_chunks().0.iter().map(|&bytes| E::from_f64(f64::from(f32::from_le_bytes(bytes)))).collect(),
        };
        match numbers.iter().position(|number| !within(number.to_f64(), limit)) {
            None => Ok(numbers),
            Some(index) => {
                let got = format!("{:e} at index {index}", numbers[index].to_f64());
                Err(fault(name, format!("finite and at most {limit:e} in magnitude"), got))
            }
        }
    }

    /// A tensor without axes.
    fn scalar(&self, name: &str, limit: f64) -> Result<f64> {
        Ok(self.tensor(name, &[], limit)?.first().copied().unwrap_or(0.0))
    }

    fn layer<T: Real>(&self, place: &str) -> Result<DijiangAttention<T>> {
        let config = self.config(&format!("{place}dijiang."))?;
        config.check().map_err(|error| fault_at(&format!("{place}dijiang"), "a config of a layer", error))?;
        let weights = Arc::new(self.weights(place, &config)?);
        let projections = Projections::new(config, weights).map_err(|error| fault_at(place, "a layer", error))?;
        self.heads(place, projections)
    }

    /// `layer` with other maps, decays and near part.
    fn maps<T: Real>(&self, place: &str, layer: &DijiangAttention<T>) -> Result<DijiangAttention<T>> {
        let projections = layer.projections();
        for (name, value) in config_notes(projections.config(), projections.head_dim(), projections.scale()) {
            let name = format!("{place}dijiang.{name}");
            let got = self.note(&name)?;
            if got != value {
                return Err(fault(name, format!("{value} as in this layer"), got));
            }
        }
        self.heads(place, projections.clone())
    }

    fn config(&self, place: &str) -> Result<AttentionConfig> {
        let name = |name: &str| format!("{place}{name}");
        let config = AttentionConfig::new(self.count(&name("model_dim"))?, self.count(&name("heads"))?)
            .with_kv_heads(self.count(&name("kv_heads"))?)
            .with_head_dim(self.count(&name("head_dim"))?)
            .with_scale(self.float(&name("scale"))?)
            .with_causality(self.choice(&name("causality"))?);
        if self.note(&name("rotary"))? == "none" {
            return Ok(config);
        }
        let dims = match self.note(&name("rotary.dims"))? {
            "all" => None,
            _ => Some(self.count(&name("rotary.dims"))?),
        };
        let factor = |which: &str| self.float(&name(which));
        let scaling = match self.note(&name("rotary.scaling"))? {
            "none" => RotaryScaling::None,
            "linear" => RotaryScaling::Linear { factor: factor("rotary.factor")? },
            "llama3" => RotaryScaling::Llama3 {
                factor: factor("rotary.factor")?,
                low_freq_factor: factor("rotary.low_freq_factor")?,
                high_freq_factor: factor("rotary.high_freq_factor")?,
                original_context: self.count(&name("rotary.original_context"))?,
            },
            other => return Err(fault(name("rotary.scaling"), "none, linear or llama3", format!("{other:?}"))),
        };
        let (base, pairing) = (factor("rotary.base")?, self.choice(&name("rotary"))?);
        Ok(config.with_rotary(Rotary { base, dims, pairing, scaling }))
    }

    /// `config` has been checked.
    fn weights<T: Real>(&self, place: &str, config: &AttentionConfig) -> Result<AttentionWeights<T>> {
        let matrix = |which: char| {
            let (name, shape) = (format!("{place}{which}_proj.weight"), weights_shape(config, which));
            let numbers = self.tensor(&name, &shape, T::LIMIT)?;
            Array2::from_shape_vec((shape[0], shape[1]), numbers).map_err(|error| fault(name, "a matrix", error))
        };
        let weights = AttentionWeights::new(matrix('q')?, matrix('k')?, matrix('v')?, matrix('o')?);
        let note = format!("{place}dijiang.biases");
        let biases = self.note(&note)?;
        if !biases.chars().all(|which| "qkvo".contains(which)) {
            return Err(fault(note, "some of the letters qkvo", format!("{biases:?}")));
        }
        let bias = |which: char| {
            let bias = || self.tensor(&format!("{place}{which}_proj.bias"), &weights_shape(config, which)[..1], T::LIMIT);
            biases.contains(which).then(bias).transpose().map(|bias| bias.map(Array1::from))
        };
        Ok(AttentionWeights { q_bias: bias('q')?, k_bias: bias('k')?, v_bias: bias('v')?, o_bias: bias('o')?, ..weights })
    }

    fn heads<T: Real>(&self, place: &str, projections: Projections<T>) -> Result<DijiangAttention<T>> {
        let name = |name: &str| format!("{place}dijiang.{name}");
        let near = match self.note(&name("near"))? {
            "none" => None,
            "chunks" => Some(Near::new(self.count(&name("near.chunk"))?, self.count(&name("near.back"))?)),
            other => return Err(fault(name("near"), "none or chunks", format!("{other:?}"))),
        };
        let dim = projections.head_dim();
        let head = |h: usize| {
            let place = name(&format!("{h}."));
            let log_decay = self.scalar(&format!("{place}log_decay"), f64::MAX)?;
            let map = DctMap::from_params(self.params::<T>(&place, dim)?);
            Ok((map.map_err(|error| fault_at(&place, "the parameters of a map", error))?, log_decay))
        };
        let (maps, log_decay) = (0..projections.config().kv_heads).map(head).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let layer = DijiangAttention::from_parts(projections, maps, near, log_decay);
        layer.map_err(|error| fault_at(&name(""), "maps, decays and near part of one layer", error))
    }

    /// The parameters of one head; their lengths agree, the rest is for [`DctMap::from_params`] to check.
    fn params<T: Real>(&self, place: &str, dim: usize) -> Result<DctParams> {
        let name = |name: &str| format!("{place}{name}");
        let numbers = |what: &str, shape: &[usize]| self.tensor(&name(what), shape, T::LIMIT);
        let radii = name("query.radii");
        let expected = || "F64 of one axis".to_owned();
        let info = self.info(&radii, expected)?;
        let [rows] = info.shape[..] else { return Err(fault(radii, expected(), format!("{:?}", info.shape))) };
        let (projection, scales) = match self.note(&name("projection"))? {
            "dct" => (Projection::Dct, rows),
            "mixed" => (Projection::Mixed { signs: numbers("signs", &[rows / dim, 3, dim])? }, rows),
            "dense" => {
                let (query, key) = (numbers("dense.query", &[rows, dim])?, numbers("dense.key", &[rows, dim])?);
                (Projection::Dense { query, key }, dim)
            }
            other => return Err(fault(name("projection"), "dct, mixed or dense", format!("{other:?}"))),
        };
        let side = |side: &str| {
            let (center, scale) = (numbers(&format!("{side}.center"), &[dim])?, numbers(&format!("{side}.scale"), &[scales])?);
            Ok(SideParams { center, scale, radii: numbers(&format!("{side}.radii"), &[rows])? })
        };
        let pairing = self.choice(&name("pairing"))?;
        let features = match pairing {
            Pairing::Single => rows,
            Pairing::Antithetic => rows.saturating_mul(2),
        };
        Ok(DctParams {
            projection,
            envelope: self.choice(&name("envelope"))?,
            pairing,
            sides: self.choice(&name("sides"))?,
            query: side("query")?,
            key: side("key")?,
            log_weight: numbers("log_weight", &[features])?,
            log_mix: self.scalar(&name("log_mix"), T::LIMIT)?,
        })
    }
}

/// Refuses headers with numbers too long for `usize`'s every sum: the parser adds the last offset to the header's length
/// without care for overflow.
fn check_numbers(bytes: &[u8]) -> Result<()> {
    let Some((len, rest)) = bytes.split_first_chunk() else { return Ok(()) }; // the parser's to refuse
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().filter(|&len| len <= MAX_HEADER);
    let (mut quoted, mut escaped, mut digits) = (false, false, 0);
    for &byte in header.and_then(|len| rest.get(..len)).unwrap_or_default() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            _ => {}
        }
        digits = if byte.is_ascii_digit() && !quoted { digits + 1 } else { 0 };
        if digits > usize::MAX.ilog10() {
            return Err(fault("file", "in safetensors format", format!("a number of more than {} digits", digits - 1)));
        }
    }
    Ok(())
}
