//! [`Refit`]: the output projection in closed form, so that a layer makes up for what it and the
//! layers before it got wrong.
//!
//! ```text
//! ΔW_o = argmin Σ_t |ŷ_t (W_o + ΔW_o)ᵀ − T_t|² / |h_t|² + λ |ΔW_o|²
//! ```
//!
//! with ŷ the converted layer's head outputs on the *converted* model's hidden states ĥ, and
//! T = (h + o W_oᵀ) − ĥ, which leads back to the softmax model's stream. λ is a share of the mean
//! diagonal of Σ_t ŷ_tᵀŷ_t/|h_t|².

use ndarray::{Array2, ArrayView2, Axis};

use super::energy;
use crate::Real;
use crate::check::check_shape;
use crate::error::{Error, Result};
use crate::layer::DijiangAttention;
use crate::low::simd::product;

/// Share of the mean diagonal that a refit is drawn to the weights there were by.
const RIDGE: f64 = 0.1;

/// Sums for the refit of one layer's output projection, over any number of samples.
#[derive(Debug, Clone)]
pub struct Refit {
    /// Σ ŷᵀŷ/|h|², `[h·d, h·d]`.
    gram: Array2<f64>,
    /// Σ ŷᵀ(T − ŷ W_oᵀ)/|h|², `[h·d, D]`.
    moments: Array2<f64>,
}

impl Refit {
    /// Without a sample yet.
    pub fn new<T: Real>(layer: &DijiangAttention<T>) -> Self {
        let (model, width) = layer.weights().o.dim();
        Self { gram: Array2::zeros((width, width)), moments: Array2::zeros((width, model)) }
    }

    /// Adds a sample.
    ///
    /// # Shapes
    /// - `input`: `[n, D]`, what the layer is given in the converted model, norm(ĥ); `target`: `[n,
    ///   D]`, the output the layer should have, T; `hidden`: `[n, D]`, the softmax model's h.
    ///
    /// # Cost
    /// The layer's attention, and products of n·(h·d)² and n·h·d·D.
    ///
    /// # Errors
    /// Those of [`forward`](crate::layer::Attention::forward); [`Error::Shape`] for targets and
    /// hidden states of another shape. After an error nothing was added.
    pub fn add<T: Real>(
        &mut self,
        layer: &DijiangAttention<T>,
        input: ArrayView2<'_, T>,
        target: ArrayView2<'_, T>,
        hidden: ArrayView2<'_, T>,
    ) -> Result<()> {
        check_shape("target", &target, input.shape())?;
        check_shape("hidden states", &hidden, input.shape())?;
        let outputs = layer.outputs_of_heads(&input)?;
        let rest = &target - &layer.proj.output(&outputs);
        let mut weighed = outputs.clone();
        for (mut row, hidden) in weighed.axis_iter_mut(Axis(0)).zip(hidden.rows()) {
            let weight = T::from_f64(1.0 / energy(hidden));
            row.mapv_inplace(|x| x * weight);
        }
        let mut gram = Array2::zeros((outputs.ncols(), outputs.ncols()));
        let mut moments = Array2::zeros((outputs.ncols(), rest.ncols()));
        product(weighed.t(), outputs.view(), gram.view_mut(), false);
        product(weighed.t(), rest.view(), moments.view_mut(), false);
        self.gram.zip_mut_with(&gram, |sum, x| *sum += x.to_f64());
        self.moments.zip_mut_with(&moments, |sum, x| *sum += x.to_f64());
        Ok(())
    }

    /// ΔW_o, `[D, h·d]`: add it by [`DijiangAttention::with_output_delta`].
    ///
    /// # Cost
    /// O((h·d)³ + (h·d)²·D).
    ///
    /// # Errors
    /// [`Error::Empty`] if no sample had an output that is not zero.
    pub fn solve<T: Real>(&self) -> Result<Array2<T>> {
        let width = self.gram.nrows();
        let ridge = RIDGE * self.gram.diag().sum() / width as f64;
        let mut matrix = self.gram.clone();
        matrix.diag_mut().mapv_inplace(|x| x + ridge);
        if ridge.is_nan() || ridge <= 0.0 || !factor(&mut matrix) {
            return Err(Error::Empty { argument: "samples of the refit" });
        }
        let mut solution = self.moments.clone();
        substitute(&matrix, &mut solution);
        Ok(solution.t().mapv(T::from_f64))
    }
}

/// The lower Cholesky factor of a symmetric matrix in place, its upper half left alone; false
/// unless it is positive definite.
fn factor(a: &mut Array2<f64>) -> bool {
    for j in 0..a.nrows() {
        for i in j..a.nrows() {
            let (row_i, row_j) = (a.row(i), a.row(j));
            let dot: f64 = row_i.iter().zip(row_j).take(j).map(|(x, y)| x * y).sum();
            let rest = a[[i, j]] - dot;
            a[[i, j]] = if i == j { rest.sqrt() } else { rest / a[[j, j]] };
        }
        if !(a[[j, j]] > 0.0 && a[[j, j]].is_finite()) {
            return false;
        }
    }
    true
}

/// X with L Lᵀ X = B in place of B.
fn substitute(l: &Array2<f64>, b: &mut Array2<f64>) {
    let n = l.nrows();
    for i in 0..n {
        let (done, mut rest) = b.view_mut().split_at(Axis(0), i);
        let mut row = rest.row_mut(0);
        for (j, done) in done.rows().into_iter().enumerate() {
            row.scaled_add(-l[[i, j]], &done);
        }
        row /= l[[i, i]];
    }
    for i in (0..n).rev() {
        let (mut rest, done) = b.view_mut().split_at(Axis(0), i + 1);
        let mut row = rest.row_mut(i);
        for (j, done) in done.rows().into_iter().enumerate() {
            row.scaled_add(-l[[i + 1 + j, i]], &done);
        }
        row /= l[[i, i]];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn solves_what_it_factors() {
        let n = 7;
        let half = Array2::from_shape_fn((n, n), |(i, j)| ((i * 5 + j * 3) % 11) as f64 - 4.0);
        let a = half.dot(&half.t()) + Array2::<f64>::eye(n);
        let x = Array2::from_shape_fn((n, 3), |(i, j)| (i as f64 - 2.0) * (j + 1) as f64);
        let (mut matrix, mut solution) = (a.clone(), a.dot(&x));
        assert!(factor(&mut matrix));
        substitute(&matrix, &mut solution);
        assert!((&solution - &x).iter().all(|error| error.abs() < 1e-9), "{solution}");
        assert!(!factor(&mut Array2::zeros((2, 2))));
    }
}
