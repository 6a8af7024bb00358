#![doc = include_str!("../README.md")]

mod attention;
mod backward;
mod bytes;
mod call;
#[cfg(feature = "candle")]
pub mod candle;
mod compile;
mod device;
mod element;
mod error;
mod pool;
mod tables;

pub use attention::{Attention, Qkv, Workspace};
pub use backward::{BackwardWorkspace, InputGradients, MapGradients};
pub use compile::{Cache, compile_ahead};
pub use cudarc;
pub use device::Device;
pub use element::Element;
pub use error::{Error, Result};
pub use pool::Pool;
