//! The low level: the only folder with `unsafe`, every block with its obligations.
#![allow(unsafe_code)]

pub(crate) mod simd;
