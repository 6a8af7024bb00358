//! Model directories: the golden ones, and others made for one test.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use dijiang::checkpoint::Checkpoint;
use dijiang::layer::{AttentionConfig, AttentionWeights};
use dijiang::{Error, Result};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Map, Value};

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden").join(name)
}

/// A directory of its own for every test, removed when the test is over.
pub struct Directory(pub PathBuf);

impl Directory {
    pub fn new(test: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("dijiang-checkpoint-{}-{test}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// A copy of a golden model.
    pub fn copy(test: &str, name: &str) -> Self {
        let directory = Self::new(test);
        for file in ["config.json", "model.safetensors"] {
            directory.write(file, fs::read(golden(name).join(file)).unwrap());
        }
        directory
    }

    pub fn write(&self, file: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.0.join(file), contents).unwrap();
    }

    pub fn write_tensors(&self, file: &str, tensors: &Stored) {
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap())
        });
        self.write(file, safetensors::serialize(views, None).unwrap());
    }

    /// The first layer's weights.
    pub fn weights(&self) -> Result<AttentionWeights<f32>> {
        Checkpoint::open(&self.0)?.attention_weights(0)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub type Stored = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

pub fn stored(name: &str) -> Stored {
    let bytes = fs::read(golden(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .iter()
        .map(|(name, view)| {
            (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
        })
        .collect()
}

/// What [`Error::Format`] names.
pub fn named<T>(found: Result<T>) -> String {
    match found.map(|_| ()).unwrap_err() {
        Error::Format { name, .. } => name,
        other => panic!("{other}"),
    }
}

/// A model and its config, which a test changes.
pub struct Model {
    pub directory: Directory,
    pub config: Map<String, Value>,
}

impl Model {
    pub fn copy(test: &str, name: &str) -> Self {
        let config = fs::read(golden(name).join("config.json")).unwrap();
        let config = serde_json::from_slice(&config).unwrap();
        Self { directory: Directory::copy(&format!("{test}-{name}"), name), config }
    }

    /// Without any key of the rotary embedding.
    pub fn without_rotary(mut self) -> Self {
        for key in
            ["rope_theta", "rope_scaling", "rope_parameters", "rotary_emb_base", "rotary_pct"]
        {
            self.config.remove(key);
        }
        self.config.remove("partial_rotary_factor");
        self
    }

    /// Opened with other values of some keys.
    pub fn with(&self, changes: Value) -> Result<Checkpoint> {
        let mut config = self.config.clone();
        config.extend(changes.as_object().unwrap().clone());
        self.directory.write("config.json", Value::Object(config).to_string());
        Checkpoint::open(&self.directory.0)
    }

    pub fn without(&self, key: &str) -> Result<Checkpoint> {
        let mut config = self.config.clone();
        config.remove(key);
        self.directory.write("config.json", Value::Object(config).to_string());
        Checkpoint::open(&self.directory.0)
    }

    /// The first layer's config with other values of some keys.
    pub fn first(&self, changes: Value) -> AttentionConfig {
        self.with(changes).unwrap().attention_config(0).unwrap()
    }

    /// The directory is refused, and the error names this key.
    #[track_caller]
    pub fn refuses(&self, key: &str, changes: Value) {
        let text = changes.to_string();
        let name = named(self.with(changes));
        assert!(name.ends_with(&format!(": {key}")), "{text}: {name}, not {key}");
    }

    /// As [`refuses`](Self::refuses), for a value of the key itself.
    #[track_caller]
    pub fn refuses_value(&self, key: &str, value: Value) {
        let changes = Map::from_iter([(key.to_owned(), value)]);
        self.refuses(key, Value::Object(changes));
    }
}
