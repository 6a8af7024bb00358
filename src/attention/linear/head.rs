//! [`Head`]: one key-value head of an operator.

use std::ops::Range;

use ndarray::{ArrayViewMut2, s};

use crate::Real;
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::Scratch;
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
    /// e.
    pub(crate) value_dim: usize,
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
            value_dim,
            value_stride: padded(value_dim),
            scale: T::from_f64(scale.sqrt()),
            log_decay,
        }
    }

    /// Outputs of a block's queries, rows of `out`: what [`Scratch::put_outputs`] puts there, and
    /// if `out` has columns for more, the exponent that their weights are relative to and the
    /// normaliser.
    pub(crate) fn put_outputs(
        &self,
        scratch: &Scratch<T>,
        queries: Range<usize>,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), OutOfRange> {
        let e = self.value_dim;
        let outputs = out.slice_mut(s![.., ..e]);
        scratch.put_outputs(self.value_stride, queries.clone(), outputs)?;
        if out.ncols() > e {
            for (i, query) in queries.enumerate() {
                out[[query, e]] = scratch.features.top[i];
                out[[query, e + 1]] = scratch.total[i];
            }
        }
        Ok(())
    }
}
