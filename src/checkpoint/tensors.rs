//! [`Tensors`]: the weight files of a directory.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use ndarray::{Array1, Array2};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::json::read;
use super::{fault_in, io_error};
use crate::Real;
use crate::check::within;
use crate::error::{Error, Result};
use crate::files::{elements, header};
use crate::low::mapped::Mapped;

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Tensors in safetensors files: those of a model directory, or of one file.
///
/// The files are mapped into memory, and must not be written to or cut short while this lives.
/// Elements are converted from what they are stored as when a tensor is asked for.
#[derive(Debug)]
pub struct Tensors {
    /// The file to name where a tensor is missing.
    root: PathBuf,
    shards: Vec<Shard>,
    shard_of: HashMap<String, usize>,
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    map: Mapped,
    metadata: Metadata,
    /// Offset of the first tensor's first byte.
    data: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Tensors {
    /// Opens the weight files of a model directory: `model.safetensors`, or without it the shards
    /// that `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`Error::Io`] for files that cannot be read, [`Error::Format`] for damaged ones, for a
    /// tensor that is not in the shard the index names, and for weights in another format alone.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let (single, index) = (directory.join(SINGLE), directory.join(INDEX));
        if single.exists() {
            Self::open_file(single) // an index beside it is of another time
        } else if index.exists() {
            Self::open_shards(directory, index)
        } else {
            match other_weights(directory) {
                Some(got) => Err(fault_in(directory, SINGLE, "there, or its index", got)),
                None => Self::open_file(single),
            }
        }
    }

    fn open_shards(directory: &Path, index_path: PathBuf) -> Result<Self> {
        let index: Index = read(&index_path)?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut shards = Vec::with_capacity(names.len());
        for name in &names {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                return Err(fault_in(
                    &index_path,
                    "weight_map",
                    "names of files beside it",
                    format!("{name:?}"),
                ));
            }
            shards.push(Shard::open(directory.join(name))?);
        }
        // What the shards hold, listed or not: nothing they hold goes unseen.
        let mut shard_of = HashMap::new();
        for (i, shard) in shards.iter().enumerate() {
            for tensor in shard.metadata.offset_keys() {
                let listed = index.weight_map.contains_key(&tensor);
                if shard_of.insert(tensor.clone(), i).is_some() && !listed {
                    let got = "several shards that hold it".to_owned();
                    return Err(fault_in(&index_path, &tensor, "in weight_map", got));
                }
            }
        }
        for (tensor, file) in &index.weight_map {
            let shard = names.binary_search(&file).ok();
            match shard.filter(|&i| shards[i].metadata.info(tensor).is_some()) {
                Some(i) => shard_of.insert(tensor.clone(), i),
                None => {
                    let expected = format!("a tensor of {file:?}");
                    return Err(fault_in(&index_path, tensor, expected, "nothing"));
                }
            };
        }
        Ok(Self { shard_of, shards, root: index_path })
    }

    /// Opens one safetensors file.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_file(path: impl AsRef<Path>) -> Result<Self> {
        let shard = Shard::open(path.as_ref().to_path_buf())?;
        let shard_of = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { root: shard.path.clone(), shards: vec![shard], shard_of })
    }

    /// The names of all tensors, in no order.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.shard_of.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.shard_of.contains_key(name)
    }

    /// The shape of the tensor called `name`, if there is one.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        let shard = &self.shards[*self.shard_of.get(name)?];
        Some(&shard.metadata.info(name)?.shape)
    }

    /// The tensor of two axes called `name`, `[rows, columns]`.
    ///
    /// # Cost
    /// One pass over its bytes, which come from the disk if nobody has looked at them yet, and the
    /// memory of its elements in `T`.
    ///
    /// # Errors
    /// [`Error::Format`] for a tensor that is missing, of another shape or type, or with elements
    /// beyond [`Real::LIMIT`]. No memory is taken before the shape has been compared with that of
    /// the file.
    pub fn matrix<T: Real>(&self, name: &str, rows: usize, columns: usize) -> Result<Array2<T>> {
        let values = self.numbers(name, &[rows, columns])?;
        Array2::from_shape_vec((rows, columns), values)
            .map_err(|error| fault_in(&self.root, name, "a matrix", error))
    }

    /// The tensor of one axis called `name`, `[len]`. Costs what [`matrix`](Self::matrix) costs.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn vector<T: Real>(&self, name: &str, len: usize) -> Result<Array1<T>> {
        Ok(self.numbers(name, &[len])?.into())
    }

    /// The numbers of the tensor of this shape, row-major. Costs what [`matrix`](Self::matrix)
    /// costs.
    ///
    /// # Errors
    /// As [`matrix`](Self::matrix).
    pub fn numbers<T: Real>(&self, name: &str, shape: &[usize]) -> Result<Vec<T>> {
        let missing = || fault_in(&self.root, name, format!("a tensor {shape:?}"), "nothing");
        let shard = &self.shards[*self.shard_of.get(name).ok_or_else(missing)?];
        let info = shard.metadata.info(name).ok_or_else(missing)?;
        let fault = |expected: String, got: String| fault_in(&shard.path, name, expected, got);
        if info.shape != shape {
            return Err(fault(format!("of shape {shape:?}"), format!("{:?}", info.shape)));
        }
        let (start, end) = info.data_offsets;
        let bytes = shard.map[shard.data..]
            .get(start..end)
            .ok_or_else(|| fault("whole".to_owned(), "an end of the file".to_owned()))?;
        let values: Vec<T> = match info.dtype {
            Dtype::F64 => elements(bytes, |bytes| T::from_f64(f64::from_le_bytes(bytes))),
            Dtype::F32 => {
                elements(bytes, |bytes| T::from_f64(f64::from(f32::from_le_bytes(bytes))))
            }
            Dtype::F16 => {
                elements(bytes, |bytes| T::from_f64(f64::from(f16::from_le_bytes(bytes))))
            }
            Dtype::BF16 => {
                elements(bytes, |bytes| T::from_f64(f64::from(bf16::from_le_bytes(bytes))))
            }
            other => {
                return Err(fault(
                    "stored as F64, F32, F16 or BF16".to_owned(),
                    format!("{other:?}"),
                ));
            }
        };
        match values.iter().position(|&value| !within(value, T::from_f64(T::LIMIT))) {
            None => Ok(values),
            Some(index) => {
                let expected = format!("finite and at most {:e} in magnitude", T::LIMIT);
                Err(fault(expected, format!("{:e} at element {index}", values[index].to_f64())))
            }
        }
    }
}

/// Weights in other formats in a directory, for a message: some of their names.
fn other_weights(directory: &Path) -> Option<String> {
    const ENDS: [&str; 9] = [
        ".safetensors",
        ".bin",
        ".bin.index.json",
        ".pt",
        ".pth",
        ".gguf",
        ".h5",
        ".msgpack",
        ".ckpt",
    ];
    let names = std::fs::read_dir(directory).ok()?.flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> =
        names.filter(|name| ENDS.iter().any(|end| name.ends_with(end))).collect();
    names.sort();
    names.truncate(3);
    (!names.is_empty()).then(|| format!("{} instead", names.join(", ")))
}

impl Shard {
    fn open(path: PathBuf) -> Result<Self> {
        let map = Mapped::open(&path).map_err(|error| io_error(&path, &error))?;
        let named = |error| match error {
            Error::Format { name, expected, got } => fault_in(&path, &name, expected, got),
            other => other,
        };
        let (metadata, data) = header(&map).map_err(named)?;
        Ok(Self { path, map, metadata, data })
    }
}
