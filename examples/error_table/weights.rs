//! Attention by explicit weights, in f64: softmax's, a map's, and the distance between the two.

use ndarray::{Array2, ArrayView2, Axis, Zip};

/// Softmax attention of one head on one window.
pub(crate) struct Exact {
    /// p, `[n, n]`, zero above the diagonal.
    weights: Array2<f64>,
    /// Σ_j p_ij ln p_ij, summed over queries.
    negative_entropy: f64,
    /// v, `[n, d]`.
    values: Array2<f64>,
    /// o, `[n, d]`.
    outputs: Array2<f64>,
}

/// How far the linear attention of a window is from softmax attention: sums over its queries.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Distance {
    /// Σ |ô − o|².
    pub(crate) squared: f64,
    /// Σ KL(p ‖ r), nats.
    pub(crate) divergence: f64,
}

impl Exact {
    /// From scaled queries and keys x, y and values, each `[n, d]`.
    pub(crate) fn new(x: ArrayView2<'_, f64>, y: ArrayView2<'_, f64>, values: Array2<f64>) -> Self {
        let log_weights = causal_log_softmax(x.dot(&y.t()));
        let weights = log_weights.mapv(f64::exp);
        let negative_entropy = Zip::from(&weights)
            .and(&log_weights)
            .fold(0.0, |sum, &p, &log| if p > 0.0 { sum + p * log } else { sum });
        let outputs = weights.dot(&values);
        Self { weights, negative_entropy, values, outputs }
    }

    /// o, `[n, d]`.
    pub(crate) fn outputs(&self) -> &Array2<f64> {
        &self.outputs
    }

    /// To linear attention with the kernel e^`log_kernel`, `[n, n]`.
    pub(crate) fn distance(&self, log_kernel: Array2<f64>) -> Distance {
        let log_weights = causal_log_softmax(log_kernel);
        let cross = Zip::from(&self.weights)
            .and(&log_weights)
            .fold(0.0, |sum, &p, &log| if p > 0.0 { sum + p * log } else { sum });
        let outputs = log_weights.mapv_into(f64::exp).dot(&self.values);
        let squared =
            Zip::from(&outputs).and(&self.outputs).fold(0.0, |sum, a, b| sum + (a - b).powi(2));
        Distance { squared, divergence: self.negative_entropy - cross }
    }
}

/// ln of the normalised causal weights whose logarithms are `scores`, up to a constant per row; −∞
/// above the diagonal.
fn causal_log_softmax(mut scores: Array2<f64>) -> Array2<f64> {
    for (i, mut row) in scores.outer_iter_mut().enumerate() {
        let (mut seen, mut later) = row.view_mut().split_at(Axis(0), i + 1);
        later.fill(f64::NEG_INFINITY);
        let max = seen.fold(f64::NEG_INFINITY, |max, &score| max.max(score));
        let total = max + seen.fold(0.0, |sum, score| sum + (score - max).exp()).ln();
        seen -= total;
    }
    scores
}

/// Sums smaller than this may have lost terms to underflow.
const SAFE: f64 = 1e-250;

/// ln K_ij = ln Σ_f exp(a_if + b_jf) for log-features a, b `[n, m]`: a matrix product of stabilised
/// features, and term by term where that underflows.
pub(crate) fn log_kernel(a: &Array2<f64>, b: &Array2<f64>) -> Array2<f64> {
    let peak = b.fold_axis(Axis(0), f64::NEG_INFINITY, |max, &b| max.max(b));
    let mut query = a + &peak;
    let top = query.fold_axis(Axis(1), f64::NEG_INFINITY, |max, &a| max.max(a));
    query -= &top.view().insert_axis(Axis(1));
    query.mapv_inplace(f64::exp);
    let key = (b - &peak).mapv_into(f64::exp);
    let mut kernel = query.dot(&key.t());
    for ((i, j), value) in kernel.indexed_iter_mut().filter(|((i, j), _)| j <= i) {
        *value = if *value > SAFE {
            value.ln() + top[i]
        } else {
            log_sum(a.row(i).iter().zip(b.row(j)).map(|(a, b)| a + b))
        };
    }
    kernel
}

/// ln Σ e^t.
fn log_sum(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let max = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    max + terms.map(|term| (term - max).exp()).sum::<f64>().ln()
}

#[cfg(test)]
mod tests {
    use dijiang::attention::{LinearConfig, Operator, Qkv, SoftmaxConfig};
    use dijiang::kernel::{DctMapConfig, FeatureMap};
    use dijiang::reference;

    use super::*;

    fn wave(n: usize, d: usize, phase: usize) -> Array2<f64> {
        Array2::from_shape_fn((n, d), |(i, j)| {
            (((i * 37 + j * 11 + phase * 17) % 29) as f64 / 14.0 - 1.0) * 1.5
        })
    }

    #[test]
    fn the_exact_kernel_is_at_distance_zero() {
        let (x, y) = (wave(33, 8, 0), wave(33, 8, 1));
        let exact = Exact::new(x.view(), y.view(), wave(33, 8, 2));
        let distance = exact.distance(x.dot(&y.t()) + 700.0);
        assert!(distance.squared < 1e-20 && distance.divergence.abs() < 1e-10, "{distance:?}");
        assert!(exact.distance(Array2::zeros((33, 33))).divergence > 0.1);
    }

    #[test]
    fn log_kernel_is_its_sum_at_any_size() -> dijiang::Result<()> {
        for spread in [1.0, 900.0] {
            let (a, b) = (wave(20, 12, 0) * spread, wave(20, 12, 1) * spread);
            let (kernel, expected) = (log_kernel(&a, &b), reference::log_kernel(&a, &b)?);
            for ((i, j), &expected) in expected.indexed_iter().filter(|((i, j), _)| j <= i) {
                let found = kernel[[i, j]];
                assert!(
                    (found - expected).abs() < 1e-10 * (1.0 + expected.abs()),
                    "{i} {j}: {found} and {expected}"
                );
            }
        }
        Ok(())
    }

    #[test]
    fn outputs_are_those_of_the_crate() -> dijiang::Result<()> {
        let (n, d) = (150, 16);
        let (q, k, v) = (wave(n, d, 0), wave(n, d, 1), wave(n, d, 2));
        let root = 1.0 / (d as f64).powf(0.25);
        let (x, y) = (&q * root, &k * root);
        let map = DctMapConfig::new().with_blocks(2).build::<f64>(d)?;
        let exact = Exact::new(x.view(), y.view(), v.clone());
        let distance =
            exact.distance(log_kernel(&map.query_log_features(&x)?, &map.key_log_features(&y)?));

        let [q, k, v] = [q, k, v].map(|rows| rows.insert_axis(Axis(0)));
        let softmax = SoftmaxConfig::new(1, d)
            .build()?
            .forward(Qkv::new(&q, &k, &v))?
            .index_axis_move(Axis(0), 0);
        let linear = LinearConfig::new()
            .build(vec![map])?
            .forward(Qkv::new(&q, &k, &v))?
            .index_axis_move(Axis(0), 0);
        assert!((&softmax - exact.outputs()).iter().all(|difference| difference.abs() < 1e-12));
        let squared = (&linear - &softmax).mapv(|difference| difference * difference).sum();
        assert!(
            (squared / distance.squared - 1.0).abs() < 1e-9,
            "{squared} and {}",
            distance.squared
        );
        Ok(())
    }
}
