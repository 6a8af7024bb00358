//! The feature maps as the kernels want them: one affine map of a token for each side,
//!
//! ```text
//! a(q) = A q + α − p,   b(k) = B k + β − p,   p = σ|·|²/2 with an envelope, 0 without
//! ```
//!
//! in units of log 2, with the radii, centres and the softmax scale multiplied in.

use std::f64::consts::LOG2_E;

use dijiang::Result;
use dijiang::kernel::{DctParams, Envelope, Pairing, Projection, SideParams};

use crate::element::Element;

/// One side of one head: a matrix `[m, d]` and what is added to each feature, `[m]`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Side {
    pub(crate) matrix: Vec<f64>,
    pub(crate) row: Vec<f64>,
}

impl Side {
    /// Query and key side of a map.
    pub(crate) fn both(params: &DctParams, scale: f64) -> Result<[Self; 2]> {
        let dense = params.to_dense()?;
        let (query, key) = match &dense.projection {
            Projection::Dense { query, key } => (query, key),
            _ => unreachable!("`to_dense` makes a dense projection"),
        };
        let mix = dense.log_mix - dot(&dense.query.center, &dense.key.center);
        let mixes = vec![mix; dense.features()];
        Ok([
            Self::new(&dense, query, &dense.query, &dense.key, &mixes, scale),
            Self::new(&dense, key, &dense.key, &dense.query, &dense.log_weight, scale),
        ])
    }

    fn new(
        params: &DctParams,
        projection: &[f64],
        own: &SideParams,
        other: &SideParams,
        constants: &[f64],
        scale: f64,
    ) -> Self {
        let (dim, rows) = (params.dim(), own.radii.len());
        let envelope = f64::from(u8::from(params.envelope == Envelope::Gaussian));
        let signs = match params.pairing {
            Pairing::Single => &[1.0][..],
            Pairing::Antithetic => &[1.0, -1.0],
        };
        let norm = dot(&own.center, &own.center);
        let (mut matrix, mut row) = (Vec::with_capacity(signs.len() * rows * dim), Vec::new());
        for sign in signs {
            for f in 0..rows {
                let weights: Vec<f64> = projection[f * dim..][..dim]
                    .iter()
                    .zip(&own.scale)
                    .map(|(w, s)| sign * own.radii[f] * w * s)
                    .collect();
                let shift = dot(&weights, &own.center) + 0.5 * envelope * norm;
                row.push(LOG2_E * (constants[row.len()] - shift));
                let tilt = |i: usize| other.center[i] + envelope * own.center[i];
                let token = |(i, w): (usize, &f64)| LOG2_E * scale.sqrt() * (w + tilt(i));
                matrix.extend(weights.iter().enumerate().map(token));
            }
        }
        Self { matrix, row }
    }

    /// The matrix as the sum of two of elements: what the first one rounds away is in the second.
    pub(crate) fn split<E: Element>(&self) -> [Vec<E>; 2] {
        let high: Vec<E> = self.matrix.iter().map(|&w| E::from_f64(w)).collect();
        let rest = |(w, high): (&f64, &E)| E::from_f64(w - high.to_f64());
        let low = self.matrix.iter().zip(&high).map(rest).collect();
        [high, low]
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap, InputScales, Mixing};
    use half::bf16;
    use ndarray::{Array1, Array2};

    use super::*;

    /// Of every kind of map, and with centres: what the tables say is what the map says.
    #[test]
    fn tables_are_the_map() {
        let (d, scale) = (16, 0.3);
        let config = DctMapConfig::new().with_blocks(2).with_scales(InputScales::RandomSigns);
        let configs = [
            config.clone(),
            config.clone().with_mixing(Mixing::Mixed).with_envelope(Envelope::Gaussian),
            config.with_pairing(Pairing::Antithetic),
        ];
        for (config, deep) in configs.iter().flat_map(|config| [(config, false), (config, true)]) {
            let mut params = config.params(d).expect("sizes are right");
            for (i, (q, k)) in
                params.query.center.iter_mut().zip(&mut params.key.center).enumerate()
            {
                (*q, *k) = (0.1 * i as f64 - 0.4, 0.7 - 0.05 * i as f64);
            }
            params.log_mix = 0.25;
            let params = if deep { params.to_deep() } else { params };
            let sides = Side::both(&params, scale).expect("sizes are right");
            let envelope = params.envelope == Envelope::Gaussian;
            let map = DctMap::<f64>::from_params(params).expect("sizes are right");
            let token = Array1::from_shape_fn(d, |i| (1.7 * i as f64).sin());
            let scaled: Array2<f64> = (&token * scale.sqrt()).insert_axis(ndarray::Axis(0));
            let expected = [map.query_log_features(&scaled), map.key_log_features(&scaled)]
                .map(|features| features.expect("sizes are right").into_raw_vec_and_offset().0);
            for (side, expected) in sides.iter().zip(&expected) {
                let norm = if envelope { 0.5 * scale * token.dot(&token) } else { 0.0 };
                for (f, expected) in expected.iter().enumerate() {
                    let got = dot(&side.matrix[f * d..][..d], token.as_slice().unwrap_or(&[]));
                    let got = (got + side.row[f]) / LOG2_E - norm;
                    assert!((got - expected).abs() < 1e-12, "feature {f}: {got} {expected}");
                }
            }
        }
    }

    #[test]
    fn two_halves_are_closer_than_one() {
        let side = Side { matrix: vec![0.1, -3.3, 1e-3], row: vec![] };
        let [high, low] = side.split::<bf16>();
        for ((w, high), low) in side.matrix.iter().zip(&high).zip(&low) {
            assert!((w - high.to_f64() - low.to_f64()).abs() < w.abs() / 65e3);
        }
    }
}
