//! The tensors of a Hugging Face directory: `model.safetensors`, or the shards that `model.safetensors.index.json` lists.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use memmap2::Mmap;
use ndarray::{Array1, Array2};
use safetensors::tensor::Metadata;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use crate::error::{Error, Result};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Memory-mapped weight files. Tensors are converted to f32 when they are asked for.
pub(crate) struct Checkpoint {
    /// Named in the error if a tensor is missing.
    root: PathBuf,
    shards: Vec<Shard>,
    shard_of: HashMap<String, usize>,
}

struct Shard {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Offset of the first tensor's first byte.
    data: usize,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens and validates every file of the checkpoint in `directory`; reads no tensor yet.
    pub(crate) fn open(directory: &Path) -> Result<Self> {
        let index_path = directory.join(INDEX);
        if !index_path.exists() {
            return Self::single(&directory.join(SINGLE));
        }
        let index: Index = read_json(&index_path)?;
        let mut names: Vec<&String> = index.weight_map.values().collect();
        names.sort();
        names.dedup();
        let mut shards = Vec::with_capacity(names.len());
        for name in &names {
            if Path::new(name).file_name() != Some(name.as_ref()) {
                let found = format!("{name:?}");
                return Err(Error::Config { path: index_path, key: "weight_map", expected: "names of files beside it", found });
            }
            shards.push(Shard::open(&directory.join(name))?);
        }
        let shard_of = index.weight_map.iter().filter_map(|(tensor, file)| Some((tensor.clone(), names.binary_search(&file).ok()?)));
        Ok(Self { shard_of: shard_of.collect(), shards, root: index_path })
    }

    /// One file that holds everything.
    pub(crate) fn single(path: &Path) -> Result<Self> {
        let shard = Shard::open(path)?;
        let shard_of = shard.metadata.offset_keys().into_iter().map(|name| (name, 0)).collect();
        Ok(Self { root: path.to_path_buf(), shards: vec![shard], shard_of })
    }

    /// The matrix called `name`.
    pub(crate) fn matrix(&self, name: &str, rows: usize, columns: usize) -> Result<Array2<f32>> {
        let values = self.tensor(name, &[rows, columns])?;
        // The length was checked against the shape, so `from_shape_vec` has nothing left to refuse.
        Array2::from_shape_vec((rows, columns), values).map_err(|_| self.missing(name))
    }

    /// The vector called `name`.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Array1<f32>> {
        Ok(self.tensor(name, &[len])?.into())
    }

    /// Finite values of the tensor called `name`, row-major.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let shard = self.shard_of.get(name).map(|&index| &self.shards[index]).ok_or_else(|| self.missing(name))?;
        let path = || shard.path.clone();
        let info = shard.metadata.info(name).ok_or_else(|| Error::MissingTensor { path: path(), name: name.to_owned() })?;
        if info.shape != shape {
            let (expected, found) = (shape.to_vec(), info.shape.clone());
            return Err(Error::TensorShape { path: path(), name: name.to_owned(), expected, found });
        }
        // In range: opening the file checked the offsets against its length and against shape and type.
        let bytes = &shard.map[shard.data + info.data_offsets.0..shard.data + info.data_offsets.1];
        let values = match info.dtype {
            Dtype::F32 => elements(bytes, f32::from_le_bytes),
            Dtype::F16 => elements(bytes, f16::from_le_bytes).to_f32_vec(),
            Dtype::BF16 => elements(bytes, bf16::from_le_bytes).to_f32_vec(),
            found => return Err(Error::TensorType { path: path(), name: name.to_owned(), found }),
        };
        match values.iter().position(|value| !value.is_finite()) {
            None => Ok(values),
            Some(index) => Err(Error::TensorValue { path: path(), name: name.to_owned(), index, found: values[index] }),
        }
    }

    fn missing(&self, name: &str) -> Error {
        Error::MissingTensor { path: self.root.clone(), name: name.to_owned() }
    }
}

impl Shard {
    #[allow(unsafe_code)]
    fn open(path: &Path) -> Result<Self> {
        let io = |source| Error::Io { path: path.to_path_buf(), source };
        let file = File::open(path).map_err(io)?;
        // SAFETY: the map is only read. As with every memory map, another process that truncates the file while this one
        // runs would end it; a model directory is not written to while it is in use.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        let (header, metadata) =
            SafeTensors::read_metadata(&map).map_err(|source| Error::Safetensors { path: path.to_path_buf(), source })?;
        Ok(Self { path: path.to_path_buf(), data: size_of::<u64>() + header, metadata, map })
    }
}

/// Little-endian elements of N bytes each, wherever they start in memory.
fn elements<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| convert(chunk)).collect()
}

/// Reads a JSON file into `T`.
pub(crate) fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    serde_json::from_slice(&text).map_err(|source| Error::Json { path: path.to_path_buf(), source })
}
