//! A file of bytes, cut into windows.

use std::path::Path;

use super::error::{Error, Result};

/// A text read as bytes: token = byte.
pub(crate) struct Text {
    bytes: Vec<u8>,
    window: usize,
}

impl Text {
    /// Reads a file that holds at least one window of `window` bytes and the byte after it.
    pub(crate) fn read(path: &Path, window: usize) -> Result<Self> {
        let bytes =
            std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
        if bytes.len() <= window {
            return Err(Error::TextTooShort {
                path: path.to_path_buf(),
                expected: window + 1,
                found: bytes.len(),
            });
        }
        Ok(Self { bytes, window })
    }

    /// Whole windows whose last byte has a successor.
    pub(crate) fn windows(&self) -> usize {
        (self.bytes.len() - 1) / self.window
    }

    /// The bytes of window `k`.
    pub(crate) fn input(&self, k: usize) -> &[u8] {
        &self.bytes[k * self.window..(k + 1) * self.window]
    }

    /// For every byte of window `k`, the byte after it.
    pub(crate) fn targets(&self, k: usize) -> &[u8] {
        &self.bytes[k * self.window + 1..(k + 1) * self.window + 1]
    }

    /// At most `count` windows, spread evenly over the text.
    pub(crate) fn spread(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        let (windows, count) = (self.windows(), count.min(self.windows()));
        (0..count).map(move |i| self.input(i * windows / count))
    }
}
