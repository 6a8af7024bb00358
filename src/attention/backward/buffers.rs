//! Panels and vectors of a block.

use crate::Real;
use crate::attention::scratch::BLOCK;
use crate::low::aligned::Aligned;
use crate::low::simd::padded;

/// Panels and vectors of a block; contents are garbage between steps.
#[derive(Debug, Clone)]
pub(crate) struct Buffers<T> {
    /// Scaled queries or keys `[d_padded, width]`, rows beyond d zero.
    pub(crate) x: Aligned<T>,
    /// Their transpose.
    pub(crate) x_rows: Aligned<T>,
    /// Their gradient `[d_padded, width]`, rows beyond d zero.
    pub(crate) dx: Aligned<T>,
    /// Query features `[m, width]`.
    pub(crate) a: Aligned<T>,
    /// Key features `[m, width]`.
    pub(crate) b: Aligned<T>,
    /// Gradient of features `[m, width]`.
    pub(crate) df: Aligned<T>,
    /// Values `[width, e_padded]`.
    pub(crate) v_rows: Aligned<T>,
    /// Values, or ȯ, `[e_padded, width]`.
    pub(crate) v: Aligned<T>,
    /// ȯ `[width, e_padded]`.
    pub(crate) g_rows: Aligned<T>,
    /// v̇ `[width, e_padded]`.
    pub(crate) dv_rows: Aligned<T>,
    /// Outputs, or ȯ/D, `[width, e_padded]`.
    pub(crate) o: Aligned<T>,
    /// Products of features `[width, width]`.
    pub(crate) s: Aligned<T>,
    /// Products ȯ·v `[width, width]`.
    pub(crate) h: Aligned<T>,
    pub(crate) top: Aligned<T>,
    pub(crate) shift: Aligned<T>,
    pub(crate) total: Aligned<T>,
    pub(crate) inverse: Aligned<T>,
    pub(crate) delta: Aligned<T>,
    pub(crate) column: Aligned<T>,
    pub(crate) feature: Aligned<T>,
    pub(crate) ones: Aligned<T>,
    pub(crate) zeros: Aligned<T>,
    pub(crate) map: Aligned<T>,
}

impl<T: Real> Buffers<T> {
    pub(crate) fn new(dim: usize, features: usize, value_dim: usize) -> Self {
        let (x, f, v) = (padded(dim) * BLOCK, features * BLOCK, padded(value_dim) * BLOCK);
        let zeros = |len| Aligned::filled(len, T::ZERO);
        Self {
            x: zeros(x),
            x_rows: zeros(x),
            dx: zeros(x),
            a: zeros(f),
            b: zeros(f),
            df: zeros(f),
            v_rows: zeros(v),
            v: zeros(v),
            g_rows: zeros(v),
            dv_rows: zeros(v),
            o: zeros(v),
            s: zeros(BLOCK * BLOCK),
            h: zeros(BLOCK * BLOCK),
            top: zeros(BLOCK),
            shift: zeros(BLOCK),
            total: zeros(BLOCK),
            inverse: zeros(BLOCK),
            delta: zeros(BLOCK),
            column: zeros(BLOCK),
            feature: zeros(features),
            ones: Aligned::filled(BLOCK, T::ONE),
            zeros: zeros(dim.max(BLOCK)),
            map: Aligned::default(),
        }
    }
}
