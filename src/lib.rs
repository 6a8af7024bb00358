//! DCT-kernelized linear attention.

pub mod attention;
pub mod error;
pub mod kernel;
pub mod layer;
mod low;
pub mod real;
pub mod reference;
mod threads;

pub use error::{Error, Result};
use low::simd;
pub use real::Real;
