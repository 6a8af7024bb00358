//! What reading files and states takes, and faults that say what was found in place of what.

#[cfg(feature = "safetensors")]
mod header;

#[cfg(feature = "safetensors")]
pub(crate) use header::{MAX_HEADER, header, quoted};

use crate::error::Error;

/// Something in a file is not what it must be.
pub(crate) fn fault(name: impl ToString, expected: impl ToString, got: impl ToString) -> Error {
    Error::Format { name: name.to_string(), expected: expected.to_string(), got: got.to_string() }
}

/// Little-endian elements of N bytes each, wherever they lie in memory.
pub(crate) fn elements<const N: usize, T>(bytes: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|&chunk| convert(chunk)).collect()
}
