//! Panels and vectors of a block.

use crate::Real;
use crate::attention::scratch::BLOCK;
use crate::low::simd::padded;

/// Panels and vectors of a block; contents are garbage between steps.
#[derive(Debug, Clone)]
pub(crate) struct Buffers<T> {
    /// Scaled queries or keys `[d_padded, width]`, rows beyond d zero.
    pub(crate) x: Vec<T>,
    /// Their transpose.
    pub(crate) x_rows: Vec<T>,
    /// Their gradient `[d_padded, width]`, rows beyond d zero.
    pub(crate) dx: Vec<T>,
    /// Query features `[m, width]`.
    pub(crate) a: Vec<T>,
    /// Key features `[m, width]`.
    pub(crate) b: Vec<T>,
    /// Gradient of features `[m, width]`.
    pub(crate) df: Vec<T>,
    /// Values `[width, e_padded]`.
    pub(crate) v_rows: Vec<T>,
    /// Values, or ȯ, `[e_padded, width]`.
    pub(crate) v: Vec<T>,
    /// ȯ `[width, e_padded]`.
    pub(crate) g_rows: Vec<T>,
    /// v̇ `[width, e_padded]`.
    pub(crate) dv_rows: Vec<T>,
    /// Outputs, or ȯ/D, `[width, e_padded]`.
    pub(crate) o: Vec<T>,
    /// Products of features `[width, width]`.
    pub(crate) s: Vec<T>,
    /// Products ȯ·v `[width, width]`.
    pub(crate) h: Vec<T>,
    pub(crate) top: Vec<T>,
    pub(crate) shift: Vec<T>,
    pub(crate) total: Vec<T>,
    pub(crate) inverse: Vec<T>,
    pub(crate) delta: Vec<T>,
    pub(crate) column: Vec<T>,
    pub(crate) feature: Vec<T>,
    pub(crate) ones: Vec<T>,
    pub(crate) zeros: Vec<T>,
    pub(crate) map: Vec<T>,
}

impl<T: Real> Buffers<T> {
    pub(crate) fn new(dim: usize, features: usize, value_dim: usize) -> Self {
        let (x, f, v) = (padded(dim) * BLOCK, features * BLOCK, padded(value_dim) * BLOCK);
        let zeros = |len| vec![T::ZERO; len];
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
            ones: vec![T::ONE; BLOCK],
            zeros: zeros(dim.max(BLOCK)),
            map: Vec::new(),
        }
    }
}
