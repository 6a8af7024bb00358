//! [`Tensors`]: the weight files of a directory.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use ndarray::{Array1, Array2};
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;

use super::{fault_in, io_error, read_json};
use crate::check::within;
use crate::error::{Error, Result};
use crate::files::{elements, header};
use crate::low::mapped::Mapped;
use crate::real::Real;

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
    /// Opens the weight files of a model directory: `model.safetensors`, or the shards that
    /// `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// [`Error::Io`] for files that cannot be read, [`Error::Format`] for damaged ones.
    pub fn open(directory: impl AsRef<Path>) -> Result<Self> {
        let directory = directory.as_ref();
        let index_path = directory.join(INDEX);
        if !index_path.exists() {
            return Self::open_file(directory.join(SINGLE));
        }
        let index: Index = read_json(&index_path)?;
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
        let shard_of = index
            .weight_map
            .iter()
            .filter_map(|(tensor, file)| Some((tensor.clone(), names.binary_search(&file).ok()?)));
        Ok(Self { shard_of: shard_of.collect(), shards, root: index_path })
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
