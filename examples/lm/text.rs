//! A file of text, cut into windows of tokens.

use std::path::Path;

use super::error::{Error, Result};
use super::tokens::{Encoded, Token, Tokenizer};

/// A text in tokens, read as windows of one length that follow each other without gaps.
pub(crate) struct Text {
    encoded: Encoded,
    window: usize,
}

impl Text {
    /// Reads a file that holds at least one window of `window` tokens and the token after it. The
    /// file is tokenised as a whole.
    pub(crate) fn read(path: &Path, tokenizer: &Tokenizer, window: usize) -> Result<Self> {
        let bytes =
            std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        let encoded = tokenizer.encode(bytes, path)?;
        if encoded.tokens.len() <= window {
            return Err(Error::TextTooShort {
                path: path.to_path_buf(),
                window,
                found: encoded.tokens.len(),
            });
        }
        Ok(Self { encoded, window })
    }

    /// Whole windows whose last token has a successor.
    pub(crate) fn windows(&self) -> usize {
        (self.encoded.tokens.len() - 1) / self.window
    }

    /// Tokens per window.
    pub(crate) fn window(&self) -> usize {
        self.window
    }

    /// The tokens of window `k`.
    pub(crate) fn input(&self, k: usize) -> &[Token] {
        &self.encoded.tokens[k * self.window..(k + 1) * self.window]
    }

    /// For every token of window `k`, the token after it.
    pub(crate) fn targets(&self, k: usize) -> &[Token] {
        &self.encoded.tokens[k * self.window + 1..(k + 1) * self.window + 1]
    }

    /// Bytes of the text that the [targets](Self::targets) of window `k` stand for.
    pub(crate) fn target_bytes(&self, k: usize) -> usize {
        let bounds = &self.encoded.bounds;
        bounds[(k + 1) * self.window + 1] - bounds[k * self.window + 1]
    }

    /// At most `count` windows, spread evenly over the text.
    pub(crate) fn spread(&self, count: usize) -> impl Iterator<Item = &[Token]> {
        let (windows, count) = (self.windows(), count.min(self.windows()));
        (0..count).map(move |i| self.input(i * windows / count))
    }
}
