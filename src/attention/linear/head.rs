//! [`Head`]: one key-value head of an operator.

use crate::Real;
use crate::kernel::FeatureMap;
use crate::low::simd::{Ops, padded};

/// What the loops need to know of one key-value head.
#[derive(Clone, Copy)]
pub(crate) struct Head<'a, T: 'static> {
    pub(crate) map: &'a dyn FeatureMap<T>,
    pub(crate) ops: &'static Ops<T>,
    /// d.
    pub(crate) dim: usize,
    /// m.
    pub(crate) features: usize,
    /// e, padded to whole lane groups.
    pub(crate) value_stride: usize,
    /// √σ.
    pub(crate) scale: T,
    /// λ = log γ.
    pub(crate) log_decay: f64,
}

impl<'a, T: Real> Head<'a, T> {
    pub(crate) fn new(
        map: &'a dyn FeatureMap<T>,
        value_dim: usize,
        scale: f64,
        log_decay: f64,
    ) -> Self {
        Self {
            map,
            ops: T::ops(),
            dim: map.dim(),
            features: map.features(),
            value_stride: padded(value_dim),
            scale: T::from_f64(scale.sqrt()),
            log_decay,
        }
    }
}
