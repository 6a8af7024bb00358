//! What the examples on candle share.

pub(crate) mod convert;
pub(crate) mod llama;
