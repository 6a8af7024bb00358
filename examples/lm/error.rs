//! What can go wrong with the files and options a user gives, each with the file, the thing, the
//! numbers, and what to do about it.

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
    #[error(
        "{}: this program runs models of the LLaMA format (\"model_type\": \"llama\"), this one is \
         {found:?}",
        path.display()
    )]
    Family { path: PathBuf, found: dijiang::checkpoint::Family },
    #[error(
        "{}: there is no such file, and the model's vocabulary of {vocabulary} entries is not the \
         256 bytes: put the model's tokenizer.json there",
        path.display()
    )]
    NoTokenizer { path: PathBuf, vocabulary: usize },
    #[error(
        "{}: a tokenizer of {tokenizer} entries, but the model's vocabulary has {model}: take the \
         tokenizer.json that came with the model",
        path.display()
    )]
    Vocabulary { path: PathBuf, tokenizer: usize, model: usize },
    #[error("{}: cannot be tokenised: {source}", path.display())]
    Tokenizer { path: PathBuf, source: tokenizers::Error },
    #[error("tokens cannot be turned into text: {0}")]
    Decoding(#[source] tokenizers::Error),
    #[error("{}: no UTF-8 at byte {position}: convert the text to UTF-8", path.display())]
    Encoding { path: PathBuf, position: usize },
    #[error("{}: there is no such file: name a text with --{option} FILE", path.display())]
    NoText { path: PathBuf, option: &'static str },
    #[error(
        "{}: a window of {window} tokens and the one after it are needed, found {found}: give a \
         longer text or a shorter window",
        path.display()
    )]
    TextTooShort { path: PathBuf, window: usize, found: usize },
    #[error(
        "{}: softmax logits must agree within {limit:e}, found a difference of {found:e}",
        path.display()
    )]
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
