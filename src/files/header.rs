//! The header of a safetensors file.

use safetensors::tensor::Metadata;
use safetensors::{SafeTensorError, SafeTensors};

use super::fault;
use crate::error::Result;

/// Largest header the safetensors parser accepts, in bytes.
pub(crate) const MAX_HEADER: usize = 100_000_000;

/// What a file says, short enough for a message.
pub(crate) fn quoted(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// The header of a safetensors file, its tensors' types, shapes and offsets checked, and where its
/// data begin.
pub(crate) fn header(bytes: &[u8]) -> Result<(Metadata, usize)> {
    check_numbers(bytes)?;
    let damaged = |error: SafeTensorError| fault("file", "in safetensors format", error);
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(damaged)?;
    let start = size_of::<u64>() + header;
    if start > bytes.len() {
        Err(damaged(SafeTensorError::InvalidHeaderLength))
    } else {
        Ok((metadata, start))
    }
}

/// Refuses headers with numbers too long for `usize`'s every sum: the parser adds the last offset
/// to the header's length without care for overflow.
fn check_numbers(bytes: &[u8]) -> Result<()> {
    // Fewer bytes than a length are the parser's to refuse.
    let Some((len, rest)) = bytes.split_first_chunk() else { return Ok(()) };
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().filter(|&len| len <= MAX_HEADER);
    let (mut quoted, mut escaped, mut digits) = (false, false, 0);
    for &byte in header.and_then(|len| rest.get(..len)).unwrap_or_default() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = quoted,
            b'"' => quoted = !quoted,
            _ => {}
        }
        digits = if byte.is_ascii_digit() && !quoted { digits + 1 } else { 0 };
        if digits > usize::MAX.ilog10() {
            return Err(fault(
                "file",
                "in safetensors format",
                format!("a number of more than {} digits", digits - 1),
            ));
        }
    }
    Ok(())
}
