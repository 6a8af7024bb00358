//! Closed-form weights of optimal positive random features.
//!
//! Likhosherstov, Choromanski, Dubey, Liu, Sarlós, Weller: *Chefs' Random Tables: Non-Trigonometric
//! Random Features*, NeurIPS 2022. In the symbols of this crate, per side and with ω_f the f-th row
//! of the projection:
//!
//! ```text
//! u_f → √(1 − 4A)·u_f,   add A·|ω_f|² + (d/4)·ln(1 − 4A)
//! A = (d − 2φ − √((2φ + d)² + 8dφ)) / 16d,   φ = mean |x + y|²
//! ```

use ndarray::{Array2, Axis};

use super::params::{DctParams, Envelope, Pairing};
use super::{DctMap, FeatureMap};
use crate::error::{Error, Result};

impl DctParams {
    /// The same map with the closed-form weights of optimal positive random features (OPRF).
    ///
    /// Radii become √(1 − 4A)·t, and w_f grows by A·(|ω_f|² + |ω′_f|²) + (d/2)·ln(1 − 4A), where
    /// ω_f and ω′_f are the rows of the query and key projection (|ω_f| = t_f unless scales were
    /// changed) and A = (d − 2φ − √((2φ + d)² + 8dφ)) / 16d. When the rows are standard normal
    /// vectors the kernel stays unbiased for exp(x·y) and its variance at |x + y|² = φ becomes the
    /// least possible. `phi` is the mean of |x + y|² over pairs of centred scaled queries and keys.
    ///
    /// # Errors
    /// [`Error::Value`] for a `phi` that is negative or not finite, [`Error::Conflict`] without
    /// [`Envelope::Gaussian`], and those of [`DctMap::from_params`] for the parameters before and
    /// after.
    ///
    /// # Examples
    /// ```
    /// use dijiang::kernel::{DctMapConfig, Envelope, Mixing, Radial};
    ///
    /// let config = DctMapConfig::new().with_mixing(Mixing::Mixed);
    /// let config = config.with_radial(Radial::Chi).with_envelope(Envelope::Gaussian);
    /// let (plain, weighted) = (config.params(16)?, config.params(16)?.with_oprf(4.0)?);
    /// let a = (16.0 - 8.0 - (24.0_f64.powi(2) + 8.0 * 16.0 * 4.0).sqrt()) / (16.0 * 16.0);
    /// let (t, stretch) = (plain.query.radii[3], (1.0 - 4.0 * a).sqrt());
    /// assert!((weighted.query.radii[3] - stretch * t).abs() < 1e-12);
    /// let added = weighted.log_weight[3] - plain.log_weight[3];
    /// assert!((added - 2.0 * (a * t * t + 4.0 * (1.0 - 4.0 * a).ln())).abs() < 1e-12);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn with_oprf(mut self, phi: f64) -> Result<Self> {
        if !(phi >= 0.0 && phi.is_finite()) {
            return Err(Error::Value {
                argument: "phi",
                expected: "finite and at least 0",
                got: phi,
            });
        }
        self.check::<f64>()?;
        if self.envelope != Envelope::Gaussian {
            return Err(Error::Conflict { argument: "OPRF weights", other: "Envelope::None" });
        }
        let norms = self.squared_row_norms()?;
        let d = self.dim() as f64;
        let a = optimal_a(d, phi);
        let stretch = (1.0 - 4.0 * a).sqrt();
        let side_constant = d / 4.0 * (-4.0 * a).ln_1p();
        for radius in self.query.radii.iter_mut().chain(&mut self.key.radii) {
            *radius *= stretch;
        }
        for (w, norms) in self.log_weight.iter_mut().zip(norms.iter().cycle()) {
            *w += a * norms + 2.0 * side_constant;
        }
        self.check::<f64>()?;
        Ok(self)
    }

    /// |ω_f|² + |ω′_f|² of every row f before pairing, by projecting the unit vectors.
    fn squared_row_norms(&self) -> Result<Vec<f64>> {
        let (d, rows) = (self.dim(), self.rows());
        let mut bare = Self {
            envelope: Envelope::None,
            pairing: Pairing::Single,
            log_weight: vec![0.0; rows],
            log_mix: 0.0,
            ..self.clone()
        };
        bare.query.center.fill(0.0);
        bare.key.center.fill(0.0);
        let map = DctMap::<f64>::from_params(bare)?;
        let unit = Array2::eye(d);
        let squares = map.query_log_features(&unit)?.mapv(|v| v * v)
            + map.key_log_features(&unit)?.mapv(|v| v * v);
        Ok(squares.sum_axis(Axis(0)).to_vec())
    }
}

/// A ≤ 0 of least variance at |x + y|² = `phi` in dimension `d`.
fn optimal_a(d: f64, phi: f64) -> f64 {
    let r = phi / d;
    // hypot, because the square of a large r overflows.
    (1.0 - 2.0 * r - (2.0 * r + 1.0).hypot((8.0 * r).sqrt())) / 16.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_is_the_formula_and_finite() {
        for d in [1.0, 7.0, 64.0] {
            assert_eq!(optimal_a(d, 0.0), 0.0);
            for phi in [0.1, 3.0, 250.0_f64] {
                let formula =
                    (d - 2.0 * phi - ((2.0 * phi + d).powi(2) + 8.0 * d * phi).sqrt()) / (16.0 * d);
                assert!((optimal_a(d, phi) - formula).abs() < 1e-14 * formula.abs().max(1.0));
            }
            assert!(optimal_a(d, 1e300).is_finite());
        }
    }

    /// A is where the second moment of one feature product, hence its variance, is least.
    #[test]
    fn a_minimises_the_second_moment() {
        // E exp(4A|ω|² + 2√(1−4A) ω·(x+y)) (1−4A)^d = (1−4A)^d (1−8A)^(−d/2) exp(2(1−4A)φ/(1−8A)).
        let log_moment = |d: f64, phi: f64, a: f64| {
            d * (1.0 - 4.0 * a).ln() - d / 2.0 * (1.0 - 8.0 * a).ln()
                + 2.0 * (1.0 - 4.0 * a) * phi / (1.0 - 8.0 * a)
        };
        for (d, phi) in [(1.0, 0.5), (16.0, 4.0), (64.0, 200.0)] {
            let a = optimal_a(d, phi);
            let least = log_moment(d, phi, a);
            for step in [-1e-3, 1e-3] {
                assert!(log_moment(d, phi, a + step) > least, "d {d} phi {phi} step {step}");
            }
        }
    }
}
