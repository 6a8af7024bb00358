#![doc = include_str!("../README.md")]

mod attention;
mod cache;
mod config;
mod convert;
mod engine;
mod error;
mod maps;
mod rotary;
mod scan;
mod tensors;

pub use attention::{AttentionPath, DijiangAttention, DijiangInput};
pub use cache::DijiangCache;
pub use config::{DijiangAttentionConfig, ProjectionKind};
pub use convert::softmax_layer;
pub use error::{Error, Result};
pub use maps::{FeatureMaps, SideMaps};
