#![doc = include_str!("../README.md")]

pub mod attention;
pub mod calibrate;
#[cfg(feature = "candle")]
pub mod candle;
mod check;
#[cfg(feature = "safetensors")]
pub mod checkpoint;
pub mod error;
#[cfg(any(feature = "safetensors", feature = "states"))]
mod files;
pub mod guide;
#[cfg(all(debug_assertions, not(test)))]
mod instances;
pub mod kernel;
pub mod layer;
mod low;
pub mod reference;
mod threads;

pub use error::{Error, Result};
pub use low::real::Real;
use low::simd;
