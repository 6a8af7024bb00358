//! FAVOR+: positive random features with dense Gaussian rows, the Monte Carlo baseline of the
//! paper's comparison.
//!
//! Choromanski et al.: *Rethinking Attention with Performers*, ICLR 2021.
//!
//! ```text
//! a_f(x) = ω_f·x − |x|²/2,   b_f(y) = ω_f·y − |y|²/2 − ln m,   ω_f ~ N(0, I)
//! E K(x, y) = exp(x·y)
//! ```

use super::FeatureMap;
use super::dct_map::DctMap;
use super::params::{DctParams, Envelope, Pairing, Projection, Sides};
use super::sampler::{MAX_POINTS, Purpose, normals};
use crate::Real;
use crate::check::check_positive;
use crate::error::{Error, Result};

/// Most elements of the matrix of rows: 1 GiB of f64.
const MAX_ELEMENTS: usize = 1 << 27;

/// How the Gaussian rows ω_f of [`FavorMap`] depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum FavorRows {
    /// Orthogonal within every block of d rows, with the lengths of independent Gaussian vectors:
    /// lower variance.
    #[default]
    Orthogonal,
    /// Independent.
    Iid,
}

/// How a [`FavorMap`] is to be made.
///
/// # Examples
/// ```
/// use dijiang::kernel::{FavorConfig, FeatureMap};
///
/// let map = FavorConfig::new(16, 100).with_seed(7).build::<f32>()?;
/// assert_eq!((map.dim(), map.features()), (16, 100));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct FavorConfig {
    /// Head dimension d ≥ 1.
    pub dim: usize,
    /// Features m ≥ 1, any number; the last block of orthogonal rows may be partial.
    pub features: usize,
    /// Dependence of the rows. Default: [`FavorRows::Orthogonal`].
    pub rows: FavorRows,
    /// φ = mean |x + y|² of the closed-form OPRF weights. Default: none, all features weigh 1/m.
    pub oprf: Option<f64>,
    /// Seed of the rows. Default: 0.
    pub seed: u64,
}

impl FavorConfig {
    /// `features` orthogonal rows in dimension `dim`.
    pub fn new(dim: usize, features: usize) -> Self {
        Self { dim, features, rows: FavorRows::default(), oprf: None, seed: 0 }
    }

    /// Dependence of the rows.
    #[must_use]
    pub fn with_rows(self, rows: FavorRows) -> Self {
        Self { rows, ..self }
    }

    /// Closed-form OPRF weights for φ = mean |x + y|²; see [`DctParams::with_oprf`].
    #[must_use]
    pub fn with_oprf(self, phi: f64) -> Self {
        Self { oprf: Some(phi), ..self }
    }

    /// Seed of the rows.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Draws the parameters: a dense projection, Gaussian envelope, w = −ln m. Same config, same
    /// numbers.
    ///
    /// # Cost
    /// m·d normal numbers, and O(m·d²) to orthogonalise.
    ///
    /// # Errors
    /// [`Error::Value`] for `dim` = 0, `features` = 0 or an OPRF φ that is negative or not finite;
    /// [`Error::TooLarge`] beyond 2²⁷ matrix elements m·d, or a `dim` of 2²⁴.
    pub fn params(&self) -> Result<DctParams> {
        check_positive("dim", self.dim)?;
        check_positive("features", self.features)?;
        if self.dim > MAX_POINTS {
            return Err(Error::TooLarge { argument: "dim", limit: MAX_POINTS, got: self.dim });
        }
        if self.features > MAX_ELEMENTS / self.dim {
            return Err(Error::TooLarge {
                argument: "features",
                limit: MAX_ELEMENTS / self.dim,
                got: self.features,
            });
        }
        let rows = gaussian_rows(self.rows, self.dim, self.features, self.seed);
        let mut params = DctParams::new(self.dim);
        params.projection = Projection::Dense { query: rows.clone(), key: rows };
        params.envelope = Envelope::Gaussian;
        params.pairing = Pairing::Single;
        params.sides = Sides::Untied;
        params.query.radii = vec![1.0; self.features];
        params.key.radii = vec![1.0; self.features];
        params.log_weight = vec![-(self.features as f64).ln(); self.features];
        match self.oprf {
            None => Ok(params),
            Some(phi) => params.with_oprf(phi),
        }
    }

    /// Draws the rows and builds the map.
    ///
    /// # Errors
    /// As [`params`](Self::params).
    pub fn build<T: Real>(&self) -> Result<FavorMap<T>> {
        Ok(FavorMap { map: DctMap::from_params(self.params()?)? })
    }
}

/// The FAVOR+ feature map: unbiased for exp(x·y), O(m·d) per token.
///
/// # Examples
/// ```
/// use dijiang::kernel::{FavorConfig, FeatureMap};
/// use ndarray::array;
///
/// let map = FavorConfig::new(4, 4096).build::<f64>()?;
/// let (x, y) = (array![[0.3, -0.2, 0.5, 0.1]], array![[0.4, 0.6, 0.2, -0.5]]);
/// let (a, b) = (map.query_log_features(&x)?, map.key_log_features(&y)?);
/// let kernel: f64 = (&a + &b).mapv(f64::exp).sum();
/// assert!((kernel / 0.05_f64.exp() - 1.0).abs() < 0.1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct FavorMap<T> {
    map: DctMap<T>,
}

impl<T: Real> FavorMap<T> {
    /// The parameters: a dense projection with Gaussian envelope.
    pub fn params(&self) -> &DctParams {
        self.map.params()
    }

    /// The DCT map with these rows that it is.
    pub(super) fn as_dct(&self) -> &DctMap<T> {
        &self.map
    }
}

impl<T> From<FavorMap<T>> for DctMap<T> {
    fn from(favor: FavorMap<T>) -> Self {
        favor.map
    }
}

impl<T: Real> FeatureMap<T> for FavorMap<T> {
    fn dim(&self) -> usize {
        self.map.dim()
    }

    fn features(&self) -> usize {
        self.map.features()
    }

    fn scratch_len(&self, width: usize) -> usize {
        self.map.scratch_len(width)
    }

    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        self.map.query_panel(width, x, out, scratch);
    }

    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]) {
        self.map.key_panel(width, y, out, scratch);
    }

    fn fingerprint(&self) -> u64 {
        self.map.fingerprint()
    }
}

/// `count` rows ω, `[count, dim]`.
fn gaussian_rows(kind: FavorRows, dim: usize, count: usize, seed: u64) -> Vec<f64> {
    let mut normal = normals(seed, Purpose::Rows);
    let mut rows: Vec<f64> = normal.by_ref().take(count * dim).collect();
    if kind == FavorRows::Orthogonal {
        for block in rows.chunks_mut(dim * dim) {
            orthonormalise(block, dim);
            for row in block.chunks_exact_mut(dim) {
                let length = normal.by_ref().take(dim).map(|v| v * v).sum::<f64>().sqrt();
                row.iter_mut().for_each(|v| *v *= length);
            }
        }
    }
    rows
}

/// Gram–Schmidt on at most `dim` rows, each projected twice (once loses orthogonality to rounding).
fn orthonormalise(rows: &mut [f64], dim: usize) {
    for index in 0..rows.len() / dim {
        let (before, row) = rows.split_at_mut(index * dim);
        let row = &mut row[..dim];
        for _ in 0..2 {
            for other in before.chunks_exact(dim) {
                let along = dot(row, other);
                row.iter_mut().zip(other).for_each(|(v, o)| *v -= along * o);
            }
        }
        let length = dot(row, row).sqrt();
        row.iter_mut().for_each(|v| *v /= length);
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
