//! The low level: the only folder with `unsafe`, every block with its obligations.
#![allow(unsafe_code)]

pub(crate) mod aligned;
#[cfg(feature = "safetensors")]
pub(crate) mod mapped;
pub(crate) mod mat;
pub(crate) mod real;
pub(crate) mod simd;
