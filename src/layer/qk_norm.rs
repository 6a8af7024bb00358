//! The RMS norm of every head's queries or keys.
//!
//! ```text
//! y_i = w_i x_i r,   r = 1/√(|x|²/d + ε)
//! ẋ_i = r (w_i ẏ_i − x_i r²/d Σ_j w_j ẏ_j x_j),   ẇ_i = Σ ẏ_i x_i r     a dot: the gradient
//! ```
//!
//! [Zhang and Sennrich 2019, *Root Mean Square Layer Normalization*, equation 4]

use crate::Real;

/// Accumulators of a sum.
const LANES: usize = 8;

/// w `[d]` and ε.
#[derive(Debug, Clone, Copy)]
pub(super) struct RmsNorm<'a, T> {
    pub(super) weight: &'a [T],
    pub(super) epsilon: f64,
}

impl<T: Real> RmsNorm<'_, T> {
    /// Normalises every head of `rows`.
    pub(super) fn apply(&self, rows: &mut [T]) {
        for head in rows.chunks_exact_mut(self.weight.len()) {
            let r = T::from_f64(self.inverse_root(head));
            for (x, &w) in head.iter_mut().zip(self.weight) {
                *x = *x * r * w;
            }
        }
    }

    /// Turns the gradients with respect to the outputs of [`apply`](Self::apply) into those with
    /// respect to its inputs `rows`, and adds that with respect to w to `grad_weight` `[d]`.
    pub(super) fn backward(&self, rows: &[T], grad: &mut [T], grad_weight: &mut [f64]) {
        let d = self.weight.len();
        for (head, grad) in rows.chunks_exact(d).zip(grad.chunks_exact_mut(d)) {
            let r = self.inverse_root(head);
            let weighted = |i: usize| self.weight[i].to_f64() * grad[i].to_f64() * head[i].to_f64();
            let along = sum(d, weighted) * r * r / d as f64;
            for (i, grad) in grad.iter_mut().enumerate() {
                let (x, w, g) = (head[i].to_f64(), self.weight[i].to_f64(), grad.to_f64());
                grad_weight[i] += g * x * r;
                *grad = T::from_f64(r * (w * g - x * along));
            }
        }
    }

    /// r, and NaN where |x|² has no place in an `f64`.
    fn inverse_root(&self, head: &[T]) -> f64 {
        let squares = sum(head.len(), |i| head[i].to_f64() * head[i].to_f64());
        if squares.is_finite() {
            1.0 / (squares / head.len() as f64 + self.epsilon).sqrt()
        } else {
            f64::NAN
        }
    }
}

fn sum(n: usize, term: impl Fn(usize) -> f64) -> f64 {
    let mut lanes = [0.0; LANES];
    for first in (0..n).step_by(LANES) {
        for (lane, i) in lanes.iter_mut().zip(first..n) {
            *lane += term(i);
        }
    }
    lanes.iter().sum()
}
