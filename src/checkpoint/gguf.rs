//! [`Gguf`]: attention layers from the files of llama.cpp.

use std::borrow::Cow;
use std::io::{self, Cursor, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use candle_core::Device;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::quantized::{QStorage, QTensor};
use ndarray::{Array1, Array2};

use super::{fault_in, io_error};
use crate::Real;
use crate::check::within;
use crate::error::{Error, Result};
use crate::layer::{AttentionConfig, AttentionWeights, Rotary, RotaryScaling, SoftmaxAttention};
use crate::low::mapped::Mapped;

/// The architecture that is read.
const ARCHITECTURE: &str = "llama";

/// Keys of the architecture that attention is made from, without `llama.`.
const READ: [&str; 10] = [
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "block_count",
    "embedding_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.type",
];

/// Keys of the architecture that say nothing about what attention computes.
const IRRELEVANT: [&str; 8] = [
    "attention.layer_norm_rms_epsilon",
    "context_length",
    "expert_count",
    "expert_used_count",
    "feed_forward_length",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "vocab_size",
];

/// Factors that frequencies are divided by, as Llama 3.1 and later have them.
const FREQUENCIES: &str = "rope_freqs.weight";

/// A model in the GGUF format of llama.cpp, of the architecture `llama`: LLaMA, SmolLM 2, Mistral
/// without sliding window and their like. Feature `candle`, whose reader of the format this is.
///
/// llama.cpp keeps the two coordinates of a rotated pair beside each other. Here the rows of
/// queries and keys come back in the order of Hugging Face files, half a head apart
/// ([`RotaryPairing::Halves`](crate::layer::RotaryPairing::Halves)): what was calibrated on a model
/// directory fits the GGUF file of the same model, and the other way round.
///
/// What the file says of attention is used, or the file is refused with an error that names the key
/// or the tensor.
///
/// # Examples
/// ```no_run
/// use dijiang::checkpoint::Gguf;
/// use dijiang::layer::{DijiangAttention, DijiangOptions};
///
/// let model = Gguf::open("path/to/model.gguf")?;
/// for l in 0..model.layers() {
///     let softmax = model.softmax_attention::<f32>(l)?;
///     let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
/// }
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    map: Mapped,
    content: Content,
    layers: usize,
    attention: AttentionConfig,
    head_dim: usize,
}

impl Gguf {
    /// Opens the file at `path` and checks what it says of attention. No weight is read yet.
    ///
    /// # Cost
    /// Reads metadata and the list of tensors; the rest is mapped, and must not be written to or
    /// cut short while this lives.
    ///
    /// # Errors
    /// [`Error::Io`] for a file that cannot be read; [`Error::Format`] for one that is damaged, of
    /// another architecture, or says something impossible, for a type of quantisation that candle
    /// does not know, and for metadata and tensors of attention that this crate does not know how
    /// to use, each of them by name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let map = Mapped::open(&path).map_err(|error| io_error(&path, &error))?;
        let content = Content::read(&mut Guarded { file: Cursor::new(&map[..]), alignment: None })
            .map_err(|error| fault_in(&path, "file", "a whole one in GGUF format", line(&error)))?;
        let metadata = Metadata { path: &path, content: &content };
        metadata.check_kind()?;
        let layers = metadata.needed_size("block_count")?;
        let attention = metadata.attention()?;
        let head_dim = attention.head_dim.unwrap_or(attention.model_dim / attention.heads);
        let mut model = Self { path, map, content, layers, attention, head_dim };
        model.check_tensors()?;
        if model.content.tensor_infos.contains_key(FREQUENCIES) {
            model.attention.rotary = Some(model.divided_frequencies()?);
        }
        let attention = &model.attention;
        attention
            .check()
            .map_err(|error| fault_in(&model.path, "attention", "the shape of a layer", error))?;
        Ok(model)
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.layers
    }

    /// The config of every attention layer.
    pub fn attention_config(&self) -> &AttentionConfig {
        &self.attention
    }

    /// The projections of the attention layer with index `layer`, dequantised; rows of queries and
    /// keys in the order of Hugging Face files.
    ///
    /// # Cost
    /// One pass over the tensors, and the memory of the weights in `T`.
    ///
    /// # Errors
    /// [`Error::Value`] for a layer that is not there, [`Error::Format`] for tensors that are
    /// missing, of another shape, or not finite in `T`.
    pub fn attention_weights<T: Real>(&self, layer: usize) -> Result<AttentionWeights<T>> {
        super::check_layer(layer, self.layers)?;
        let (hidden, d) = (self.attention.model_dim, self.head_dim);
        let (wide, narrow) = (self.attention.heads * d, self.attention.kv_heads * d);
        let name = |which: &str, what: &str| format!("blk.{layer}.attn_{which}.{what}");
        let matrix = |which: &str, rows, columns| -> Result<Array2<T>> {
            let values = self.numbers(&name(which, "weight"), &[rows, columns])?;
            let matrix = Array2::from_shape_vec((rows, columns), values);
            matrix.map_err(|error| self.fault(&name(which, "weight"), "a matrix", error))
        };
        let bias = |which: &str, len| -> Result<Array1<T>> {
            Ok(self.numbers(&name(which, "bias"), &[len])?.into())
        };
        let has = |which: &str| self.content.tensor_infos.contains_key(&name(which, "bias"));
        let weights = AttentionWeights::new(
            matrix("q", wide, hidden)?,
            matrix("k", narrow, hidden)?,
            matrix("v", narrow, hidden)?,
            matrix("output", hidden, wide)?,
        );
        let qkv = ["q", "k", "v"].into_iter().any(has);
        Ok(match (qkv, has("output")) {
            (false, false) => weights,
            (_, output) => {
                let (q, k, v) = (bias("q", wide)?, bias("k", narrow)?, bias("v", narrow)?);
                match output {
                    true => weights.with_biases(q, k, v, bias("output", hidden)?),
                    false => weights.with_qkv_biases(q, k, v),
                }
            }
        })
    }

    /// The attention layer with index `layer` as it was trained, dequantised.
    ///
    /// # Cost
    /// As [`attention_weights`](Self::attention_weights); the layer keeps these weights.
    ///
    /// # Errors
    /// As [`attention_weights`](Self::attention_weights).
    pub fn softmax_attention<T: Real>(&self, layer: usize) -> Result<SoftmaxAttention<T>> {
        SoftmaxAttention::new(self.attention.clone(), self.attention_weights(layer)?)
    }

    /// Metadata and the list of tensors, as candle read them.
    pub fn content(&self) -> &Content {
        &self.content
    }

    /// The tensor called `name` as it is stored, but for the rows of queries and keys
    /// (`blk.{l}.attn_q` and `attn_k`, weights and biases), which are put in the order of Hugging
    /// Face files: blocks of quantised numbers never reach over the end of a row.
    ///
    /// # Shapes
    /// - `shape`: as candle has it, `[out, in]` for a matrix.
    ///
    /// # Cost
    /// A copy of the tensor's bytes.
    ///
    /// # Errors
    /// [`Error::Format`] for a tensor that is missing, of another shape, or beyond the end of the
    /// file. No memory is taken before its shape and place have been checked.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<QTensor> {
        let Some(info) = self.content.tensor_infos.get(name) else {
            return Err(self.fault(name, format!("a tensor {shape:?}"), "nothing"));
        };
        let found = info.shape.dims();
        if found != shape {
            return Err(self.fault(name, format!("of shape {shape:?}"), format!("{found:?}")));
        }
        if shape.iter().try_fold(1_usize, |product, &axis| product.checked_mul(axis)).is_none() {
            return Err(self.fault(name, "small enough for memory", format!("{shape:?}")));
        }
        let damaged = |error| self.fault(name, "a whole tensor", line(&error));
        let file = &mut Cursor::new(&self.map[..]);
        let start = self.content.tensor_data_offset;
        let tensor = info.read(file, start, &Device::Cpu).map_err(damaged)?;
        match attention_part(name) {
            Some((_, "q.weight" | "k.weight" | "q.bias" | "k.bias")) => {
                self.halves(&tensor).map_err(damaged)
            }
            _ => Ok(tensor),
        }
    }

    /// The same tensor with the coordinates of each head's rotated pairs half a head apart: row
    /// 2i + j of a head becomes row j·d/2 + i.
    fn halves(&self, tensor: &QTensor) -> candle_core::Result<QTensor> {
        let (data, rows, d) = (tensor.data()?, tensor.shape().dims()[0], self.head_dim);
        if tensor.shape().rank() == 1 && tensor.dtype().block_size() > 1 {
            candle_core::bail!("a bias that is quantised");
        }
        let bytes = data.len() / rows;
        let mut turned = Vec::with_capacity(data.len());
        for row in 0..rows {
            let (head, place) = (row / d * d, row % d);
            let from = head + place % (d / 2) * 2 + place / (d / 2);
            turned.extend_from_slice(&data[from * bytes..][..bytes]);
        }
        let storage = QStorage::from_data(Cow::Owned(turned), &Device::Cpu, tensor.dtype())?;
        QTensor::new(storage, tensor.shape().clone())
    }

    /// The dequantised numbers of a tensor, row-major.
    fn numbers<T: Real>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let dequantised = self.tensor(name, shape)?.dequantize(&Device::Cpu);
        let values = dequantised.and_then(|tensor| tensor.flatten_all()?.to_vec1::<f32>());
        let values = values.map_err(|error| self.fault(name, "a whole tensor", line(&error)))?;
        let values: Vec<T> = values.into_iter().map(|x| T::from_f64(f64::from(x))).collect();
        match values.iter().position(|&value| !within(value, T::from_f64(T::LIMIT))) {
            None => Ok(values),
            Some(index) => {
                let expected = format!("finite and at most {:e} in magnitude", T::LIMIT);
                let got = format!("{:e} at element {index}", values[index].to_f64());
                Err(self.fault(name, expected, got))
            }
        }
    }

    /// The rotary embedding whose frequencies the file divides one by one.
    fn divided_frequencies(&self) -> Result<Rotary> {
        let Some(rotary) = self.attention.rotary.clone() else {
            return Err(self.fault(FREQUENCIES, "absent without rotary embedding", "it"));
        };
        if rotary.scaling != RotaryScaling::None {
            let got = "it and llama.rope.scaling.type";
            return Err(self.fault(FREQUENCIES, "the only scaling of the rotary embedding", got));
        }
        let factors = self.numbers(FREQUENCIES, &[self.head_dim / 2])?;
        Ok(rotary.with_scaling(RotaryScaling::LongRope { factors, attention_factor: 1.0 }))
    }

    /// Refuses tensors of attention that would not be read.
    fn check_tensors(&self) -> Result<()> {
        let bias = |which: &str| {
            let name = format!("blk.0.attn_{which}.bias");
            self.content.tensor_infos.contains_key(&name)
        };
        for name in self.content.tensor_infos.keys() {
            let Some((layer, part)) = attention_part(name) else {
                if name.starts_with("rope_") && name != FREQUENCIES {
                    return Err(self.fault(name, "absent: it is not read", "a tensor"));
                }
                continue;
            };
            let known = match part {
                "norm.weight" | "q.weight" | "k.weight" | "v.weight" | "output.weight" => true,
                _ => part
                    .strip_suffix(".bias")
                    .is_some_and(|which| ["q", "k", "v", "output"].contains(&which) && bias(which)),
            };
            if !known {
                let expected = "absent: attention of this architecture is read without it";
                return Err(self.fault(name, expected, "a tensor"));
            }
            if layer.parse::<usize>().ok().is_none_or(|layer| layer >= self.layers) {
                let expected = format!("of a layer below llama.block_count, {}", self.layers);
                return Err(self.fault(name, expected, "a tensor"));
            }
        }
        Ok(())
    }

    fn fault(&self, name: &str, expected: impl ToString, got: impl ToString) -> Error {
        fault_in(&self.path, name, expected, got)
    }
}

/// Layer and part of the name of a tensor of attention: `blk.{layer}.attn_{part}`.
fn attention_part(name: &str) -> Option<(&str, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer, part.strip_prefix("attn_")?))
}

/// What a file says of its model.
struct Metadata<'a> {
    path: &'a Path,
    content: &'a Content,
}

impl Metadata<'_> {
    /// The architecture is known, and so are all its keys.
    fn check_kind(&self) -> Result<()> {
        const KEY: &str = "general.architecture";
        match self.content.metadata.get(KEY) {
            Some(Value::String(name)) if name == ARCHITECTURE => {}
            other => {
                let got = other.map_or("nothing".to_owned(), shown);
                return Err(fault_in(self.path, KEY, format!("{ARCHITECTURE:?}"), got));
            }
        }
        let prefix = format!("{ARCHITECTURE}.");
        let own =
            self.content.metadata.iter().filter_map(|(key, value)| {
                key.strip_prefix(&prefix).map(|name| (key, name, value))
            });
        let mut unknown =
            own.filter(|(_, name, _)| !READ.contains(name) && !IRRELEVANT.contains(name));
        match unknown.next() {
            None => Ok(()),
            Some((key, _, value)) => {
                let expected = "absent: attention of this architecture is read without it";
                Err(fault_in(self.path, key, expected, shown(value)))
            }
        }
    }

    /// The attention of every layer, but for factors of its frequencies.
    fn attention(&self) -> Result<AttentionConfig> {
        let hidden = self.needed_size("embedding_length")?;
        let heads = self.needed_size("attention.head_count")?;
        let kv_heads = self.size("attention.head_count_kv")?.unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of attention.head_count, {heads}");
            return Err(self.unfit("attention.head_count_kv", expected));
        }
        let d = match self.size("attention.key_length")? {
            Some(d) => d,
            None if hidden.is_multiple_of(heads) => hidden / heads,
            None => {
                let expected = format!("a multiple of attention.head_count, {heads}");
                return Err(self.unfit("embedding_length", expected));
            }
        };
        if !d.is_multiple_of(2) {
            return Err(self.unfit("attention.key_length", "even"));
        }
        for key in ["attention.value_length", "rope.dimension_count"] {
            if self.size(key)?.is_some_and(|found| found != d) {
                return Err(self.unfit(key, format!("absent or the length of a head, {d}")));
            }
        }
        let rotary = Rotary::new(self.number("rope.freq_base")?.unwrap_or(10_000.0));
        let factor = self.number("rope.scaling.factor")?;
        let rotary = match self.value("rope.scaling.type") {
            None if factor.is_none() => rotary,
            Some(Value::String(kind)) if kind == "none" => rotary,
            Some(Value::String(kind)) if kind == "linear" && factor.is_some() => {
                rotary.with_scaling(RotaryScaling::Linear { factor: factor.unwrap_or(1.0) })
            }
            _ => {
                let expected = "none, or linear with a factor";
                return Err(self.unfit("rope.scaling.type", expected));
            }
        };
        let attention = AttentionConfig::new(hidden, heads).with_kv_heads(kv_heads);
        Ok(attention.with_head_dim(d).with_rotary(rotary))
    }

    fn value(&self, name: &str) -> Option<&Value> {
        self.content.metadata.get(&format!("{ARCHITECTURE}.{name}"))
    }

    fn needed_size(&self, name: &str) -> Result<usize> {
        self.size(name)?.ok_or_else(|| self.unfit(name, "a number of at least 1"))
    }

    /// A size, at least 1 and so small that no product of two overflows.
    fn size(&self, name: &str) -> Result<Option<usize>> {
        let Some(value) = self.value(name) else { return Ok(None) };
        let size = match value {
            Value::I32(size) => usize::try_from(*size).ok(),
            Value::I64(size) => usize::try_from(*size).ok(),
            Value::Bool(_) => None,
            value => value.to_u64().ok().and_then(|size| usize::try_from(size).ok()),
        };
        match size.filter(|size| (1..=1 << 31).contains(size)) {
            Some(size) => Ok(Some(size)),
            None => Err(self.unfit(name, "one number, at least 1 and at most 2³¹")),
        }
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(f64::from(*number))),
            Some(Value::F64(number)) => Ok(Some(*number)),
            Some(_) => Err(self.unfit(name, "one floating-point number")),
        }
    }

    fn unfit(&self, name: &str, expected: impl ToString) -> Error {
        let got = self.value(name).map_or("nothing".to_owned(), shown);
        fault_in(self.path, &format!("{ARCHITECTURE}.{name}"), expected, got)
    }
}

/// An error of candle without the backtrace that it may carry.
fn line(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// A value, short enough for a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Array(values) => format!("a list of {}", values.len()),
        Value::String(text) => crate::files::quoted(text),
        other => format!("{other:?}"),
    }
}

/// A file that is refused for an alignment of 0, by which candle's reader would divide.
struct Guarded<'a> {
    file: Cursor<&'a [u8]>,
    /// Reads since the key of the alignment: its type comes next, then its value.
    alignment: Option<usize>,
}

impl Read for Guarded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read(buffer)?;
        self.alignment = match self.alignment {
            Some(0) => Some(1),
            Some(_) if buffer.iter().all(|&byte| byte == 0) => {
                return Err(io::Error::other("general.alignment must be at least 1, got 0"));
            }
            _ => (buffer == b"general.alignment").then_some(0),
        };
        Ok(read)
    }
}

impl Seek for Guarded<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guide's page names every key.
    #[test]
    fn the_guide_says_the_same() {
        let page = include_str!("../guide/checkpoints.md");
        for key in READ.iter().chain(&IRRELEVANT) {
            assert!(page.contains(&format!("`{key}`")), "{key} is not in the guide");
        }
    }
}
