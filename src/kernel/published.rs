//! The feature map of the code published with the paper, which is another function than the
//! paper's.
//!
//! ```text
//! φ_f(x) = exp(t_f·[Cᵀx]_f) / Σ_f' exp(t_f'·[Cᵀx]_f')
//! ```
//!
//! A DCT-III where the paper has a DCT-II, of the unscaled query or key, and a softmax over the
//! features in place of the paper's weights. Needed to reproduce models trained with that code, and
//! for comparison.

use ndarray::{Array2, ArrayRef2, ArrayViewMut2};

use super::params::check_limit;
use super::transform::DctPlan;
use crate::Real;
use crate::check::{check_elements, check_room};
use crate::error::{Error, Result};

/// Features of the code published with the paper, rows are tokens.
///
/// φ = softmax over f of t_f·(Cᵀx)_f, with C the orthonormal DCT-II.
///
/// # Shapes
/// - `x`: `[n, d]`, unscaled queries or keys
/// - `radii`: t, `[d]`
/// - returns `[n, d]`; every row is positive and sums to one
///
/// # Cost
/// O(n·d log d); allocates the result and one plan.
///
/// # Errors
/// [`Error::Empty`] for d = 0, [`Error::Shape`] unless `x` has as many columns as there are radii,
/// [`Error::NonFinite`] for elements or radii beyond [`Real::LIMIT`], [`Error::TooLarge`] for
/// features there is no room for.
///
/// # Examples
/// ```
/// use dijiang::kernel::published_features;
/// use ndarray::array;
///
/// let features = published_features(&array![[0.5_f64, -1.0, 2.0]], &[1.0, 0.3, -0.7])?;
/// assert!((features.sum() - 1.0).abs() < 1e-12);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn published_features<T: Real>(x: &ArrayRef2<T>, radii: &[f64]) -> Result<Array2<T>> {
    if radii.is_empty() {
        return Err(Error::Empty { argument: "radii" });
    }
    if x.ncols() != radii.len() {
        return Err(Error::Shape { argument: "x", axis: 1, expected: radii.len(), got: x.ncols() });
    }
    check_limit("radii", radii, T::LIMIT)?;
    check_room::<T>("features", &[x.nrows(), x.ncols()])?;
    check_elements("x", x)?;
    let radii: Vec<T> = radii.iter().map(|&t| T::from_f64(t)).collect();
    let plan = DctPlan::<T>::new(radii.len());
    let mut scratch = vec![T::zero(); plan.row_scratch_len()];
    // Row-major whatever the layout of x, so that every row is one slice.
    let mut features = Vec::with_capacity(x.len());
    features.extend(x.iter().copied());
    for row in features.chunks_exact_mut(radii.len()) {
        plan.dct3_row(row, &mut scratch);
        row.iter_mut().zip(&radii).for_each(|(v, &t)| *v *= t);
    }
    let features = Array2::from_shape_vec(x.dim(), features);
    let mut features =
        features.map_err(|_| Error::Length { argument: "x", expected: x.len(), got: x.len() })?;
    softmax_rows(features.view_mut());
    Ok(features)
}

/// Every row becomes its softmax.
pub(crate) fn softmax_rows<T: Real>(mut rows: ArrayViewMut2<'_, T>) {
    for mut row in rows.outer_iter_mut() {
        let max = row.iter().fold(T::NEG_INFINITY, |max, &v| max.max(v));
        row.mapv_inplace(|v| (v - max).exp());
        let sum = row.sum();
        row.mapv_inplace(|v| v / sum);
    }
}

/// P `[d, d]` with z·P = t ⊙ Cᵀz for a row z.
pub(crate) fn published_projection<T: Real>(radii: &[f64]) -> Array2<T> {
    let d = radii.len();
    let plan = DctPlan::<f64>::new(d);
    let mut scratch = vec![0.0; plan.row_scratch_len()];
    let mut projection = Array2::zeros((d, d));
    for (i, mut out) in projection.outer_iter_mut().enumerate() {
        let mut row = vec![0.0; d];
        row[i] = 1.0;
        plan.dct3_row(&mut row, &mut scratch);
        out.iter_mut()
            .zip(row.iter().zip(radii))
            .for_each(|(out, (c, t))| *out = T::from_f64(c * t));
    }
    projection
}

/// The radii t of such a P.
#[cfg(feature = "safetensors")]
pub(crate) fn published_radii(projection: &ArrayRef2<f64>) -> Vec<f64> {
    let cosines = published_projection::<f64>(&vec![1.0; projection.ncols()]);
    cosines.columns().into_iter().zip(projection.columns()).map(|(c, p)| c.dot(&p)).collect()
}
