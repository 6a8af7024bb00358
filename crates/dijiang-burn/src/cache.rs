//! [`DijiangCache`]: what a batch of sequences leaves behind for its next tokens.

use crate::engine::EngineState;
use crate::tensors::State;

/// What a batch of sequences leaves behind in one layer, in place of a cache of keys and values: of
/// constant size at any length. Made by
/// [`DijiangAttention::new_cache`](crate::DijiangAttention::new_cache); a clone is a snapshot to
/// return to.
#[derive(Debug, Clone)]
pub struct DijiangCache {
    pub(crate) states: States,
    pub(crate) shape: CacheShape,
    pub(crate) position: usize,
}

/// The states of all sequences.
#[derive(Debug, Clone)]
pub(crate) enum States {
    Tensors(State),
    F32(EngineState<f32>),
    F64(EngineState<f64>),
}

/// What a layer and its caches have in common.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct CacheShape {
    pub(crate) batch: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) dim: usize,
    pub(crate) features: usize,
    pub(crate) windows: Vec<dijiang::attention::Window>,
    pub(crate) sinks: usize,
}

impl DijiangCache {
    /// Tokens each sequence has seen, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        self.shape.batch
    }

    /// Bytes of all sequences' states. They do not grow beyond those of a full window.
    pub fn bytes(&self) -> usize {
        match &self.states {
            States::Tensors(state) => state.bytes(),
            States::F32(state) => state.bytes(),
            States::F64(state) => state.bytes(),
        }
    }
}
