//! From text to tokens and back: by the model's `tokenizer.json`, or byte by byte.

use std::path::Path;

use super::error::{Error, Result};

/// The number of one entry of the vocabulary.
pub(crate) type Token = u32;

/// Tokens of a vocabulary of bytes.
const BYTES: usize = 256;
/// Models pad their vocabulary by a few entries; a tokenizer that leaves more than one entry in
/// this many unused belongs to another model.
const PADDING: usize = 8;

/// How a model's text becomes tokens.
#[derive(Debug)]
pub(crate) enum Tokenizer {
    /// Token = byte.
    Bytes,
    /// What `tokenizer.json` says.
    Subwords(Box<tokenizers::Tokenizer>),
}

/// A text in tokens.
#[derive(Debug)]
pub(crate) struct Encoded {
    pub(crate) tokens: Vec<Token>,
    /// The byte of the text at which each token begins, and the length of the text in bytes.
    pub(crate) bounds: Vec<usize>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` in the directory of a model with `vocabulary` entries. Without that
    /// file the vocabulary must be the 256 bytes.
    pub(crate) fn read(directory: &Path, vocabulary: usize) -> Result<Self> {
        let path = directory.join("tokenizer.json");
        if !path.exists() {
            return match vocabulary {
                BYTES => Ok(Self::Bytes),
                _ => Err(Error::NoTokenizer { path, vocabulary }),
            };
        }
        let mut tokenizer = tokenizers::Tokenizer::from_file(&path)
            .map_err(|source| Error::Tokenizer { path: path.clone(), source })?;
        let known = tokenizer.get_vocab(true).into_values().max().map_or(0, |max| max as usize + 1);
        if known > vocabulary || vocabulary - known > vocabulary / PADDING {
            return Err(Error::Vocabulary { path, tokenizer: known, model: vocabulary });
        }
        // Texts are longer than what a model is given at once: they are cut here, not there.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|source| Error::Tokenizer { path, source })?;
        Ok(Self::Subwords(Box::new(tokenizer)))
    }

    /// The tokens of a whole text, without any that mark its beginning or end. `path` is named
    /// where something is wrong with the text.
    pub(crate) fn encode(&self, text: Vec<u8>, path: &Path) -> Result<Encoded> {
        let tokenizer = match self {
            Self::Bytes => {
                return Ok(Encoded {
                    tokens: text.iter().map(|&byte| Token::from(byte)).collect(),
                    bounds: (0..=text.len()).collect(),
                });
            }
            Self::Subwords(tokenizer) => tokenizer,
        };
        let text = String::from_utf8(text).map_err(|error| Error::Encoding {
            path: path.to_path_buf(),
            position: error.utf8_error().valid_up_to(),
        })?;
        let encoding = tokenizer
            .encode(text.as_str(), false)
            .map_err(|source| Error::Tokenizer { path: path.to_path_buf(), source })?;
        let starts = encoding.get_offsets().iter().map(|&(start, _)| start);
        Ok(Encoded {
            tokens: encoding.get_ids().to_vec(),
            bounds: starts.chain([text.len()]).collect(),
        })
    }

    /// The text that `tokens` stand for, bytes that are no UTF-8 replaced.
    pub(crate) fn decode(&self, tokens: &[Token]) -> Result<String> {
        match self {
            Self::Bytes => {
                let bytes: Vec<u8> = tokens.iter().map(|&token| token as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::Subwords(tokenizer) => tokenizer.decode(tokens, true).map_err(Error::Decoding),
        }
    }
}
