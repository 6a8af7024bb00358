//! The feature map of the code published with the paper, which is another function than the paper's.
//!
//! ```text
//! φ_f(x) = exp(t_f·[Cᵀx]_f) / Σ_f' exp(t_f'·[Cᵀx]_f')
//! ```
//!
//! A DCT-III where the paper has a DCT-II, of the unscaled query or key, and a softmax over the features in place of
//! the paper's weights. Needed to reproduce models trained with that code, and for comparison.

use ndarray::{Array2, ArrayRef2};

use super::params::check_limit;
use super::transform::DctPlan;
use crate::error::{Error, Result, check_elements};
use crate::real::Real;

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
/// [`Error::NonFinite`] for elements or radii beyond [`Real::LIMIT`].
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
        softmax(row);
    }
    Array2::from_shape_vec(x.dim(), features).map_err(|_| Error::Length { argument: "x", expected: x.len(), got: x.len() })
}

fn softmax<T: Real>(row: &mut [T]) {
    let max = row.iter().fold(T::NEG_INFINITY, |max, &v| max.max(v));
    row.iter_mut().for_each(|v| *v = (*v - max).exp());
    let sum = row.iter().fold(T::zero(), |sum, &v| sum + v);
    row.iter_mut().for_each(|v| *v /= sum);
}
