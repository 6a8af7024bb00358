//! What can go wrong with the files and options a user gives, each with the file, the thing and the
//! numbers.

use std::path::PathBuf;

/// `std::result::Result` with the language model's [`Error`].
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// What reading and running the model can fail with, and options that are wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("{}: not the expected JSON: {source}", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("{}: {key} must be {expected}, found {found}", path.display())]
    Config { path: PathBuf, key: &'static str, expected: &'static str, found: String },
    #[error(transparent)]
    Model(#[from] dijiang::Error),
    #[error("{}: only models of the LLaMA format can be run here, this one is {found:?}", path.display())]
    Family { path: PathBuf, found: dijiang::checkpoint::Family },
    #[error(
        "text is read as bytes, so only models with a vocabulary of 256 (token = byte) can be used; this one has {found}"
    )]
    Vocabulary { found: usize },
    #[error("{}: at least {expected} bytes are needed, found {found}", path.display())]
    TextTooShort { path: PathBuf, expected: usize, found: usize },
    #[error("{}: softmax logits must agree within {limit:e}, found a difference of {found:e}", path.display())]
    Golden { path: PathBuf, limit: f32, found: f32 },
    #[error("--{option} must be {expected}, found {found}")]
    Option { option: &'static str, expected: &'static str, found: String },
    #[error("layer {layer}: {source}")]
    Layer { layer: usize, source: dijiang::Error },
    #[error("cannot start threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
    #[error("cannot write the result: {0}")]
    Output(#[source] std::io::Error),
}

impl Error {
    /// For `map_err`: an error of the layer with this index.
    pub(crate) fn in_layer(layer: usize) -> impl FnOnce(dijiang::Error) -> Self {
        move |source| Self::Layer { layer, source }
    }
}
