//! DCT-kernelized linear attention.

pub mod attention;
pub mod error;
pub mod kernel;
pub mod layer;
pub mod real;
pub mod reference;
mod simd;
mod threads;

pub use error::{Error, Result};
pub use real::Real;
