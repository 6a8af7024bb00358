//! The numbers a DCT feature map is made of, and the choices behind them.

use super::dct_map::projection_matrix;
use super::sampler::MAX_POINTS;
use super::{hash, word};
use crate::Real;
use crate::check::{check_len, check_room};
use crate::error::{Error, Result};

/// Law F of the radii t = F⁻¹(u).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Radial {
    /// Standard normal: the paper and its code.
    #[default]
    Normal,
    /// Chi with d degrees of freedom: the length of a d-dimensional standard normal vector.
    Chi,
}

/// Where the u in (0, 1) come from that the radii are the quantiles of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Points {
    /// An Owen-scrambled Sobol sequence: quasi-Monte Carlo.
    #[default]
    Sobol,
    /// Pseudo-random numbers: the Monte Carlo baseline.
    Random,
}

/// The envelope p(z) of the log-features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Envelope {
    /// p(z) = 0: the paper's φ_WDCF.
    #[default]
    None,
    /// p(z) = −|z|²/2: positive random features.
    Gaussian,
}

/// How many features one projected coordinate u_f yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Pairing {
    /// One, +u: m = G·d.
    #[default]
    Single,
    /// Two, +u and −u: m = 2·G·d. Features 0..G·d are +u, features G·d..2·G·d are −u.
    Antithetic,
}

/// Whether queries and keys may have scales and radii of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Sides {
    /// They may. A map that was just built has equal ones; calibration changes them apart.
    #[default]
    Untied,
    /// They share them, and calibration keeps them equal.
    Tied,
}

/// Initial input scales s.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum InputScales {
    /// Ones for the first block, random signs for every further one.
    #[default]
    RandomSigns,
    /// Ones for every block. All blocks then share the d directions of the cosine matrix: see the
    /// [additive kernel](crate::kernel#what-the-maps-converge-to).
    Ones,
}

/// What stands in place of the single transform C.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Mixing {
    /// Nothing: C.
    #[default]
    None,
    /// C·D₁·C·D₂·C·D₃ with random sign diagonals per block: directions close to uniform ones on the
    /// sphere.
    Mixed,
}

/// The parameters of one side, queries or keys.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SideParams {
    /// Centre μ of this side's scaled vectors, `[d]`.
    pub center: Vec<f64>,
    /// Input scales s, `[G·d]` (`[d]` for [`Projection::Dense`]).
    pub scale: Vec<f64>,
    /// Radii t, `[G·d]` (`[P]` for [`Projection::Dense`]).
    pub radii: Vec<f64>,
}

/// The linear map between the input scales and the radii.
#[derive(Debug, Clone, PartialEq)]
pub enum Projection {
    /// u = t ⊙ C(s ⊙ z), block by block.
    Dct,
    /// u = t ⊙ C D₁ C D₂ C D₃ (s ⊙ z), block by block.
    Mixed {
        /// The diagonals D₁, D₂, D₃ of every block, `[G, 3, d]`. Random signs at first; any numbers
        /// are accepted.
        signs: Vec<f64>,
    },
    /// u = t ⊙ C(s ⊙ Cᵀ(r ⊙ C(p ⊙ z))), block by block: a transform between two more, which at r =
    /// p = 1 undo each other.
    Deep {
        /// p and r of the queries, `[G, 2, d]`.
        query: Vec<f64>,
        /// p and r of the keys, `[G, 2, d]`.
        key: Vec<f64>,
    },
    /// u = t ⊙ W (s ⊙ z) with one matrix for each side, one block.
    Dense {
        /// W of the queries, `[P, d]` row-major.
        query: Vec<f64>,
        /// W of the keys, `[P, d]` row-major.
        key: Vec<f64>,
    },
}

impl Projection {
    /// What only one side has of it, queries and keys: scales of a deep projection, the matrix of a
    /// dense one, nothing of others.
    pub(crate) fn sides(&self) -> (&[f64], &[f64]) {
        match self {
            Projection::Dct | Projection::Mixed { .. } => (&[], &[]),
            Projection::Deep { query, key } | Projection::Dense { query, key } => (query, key),
        }
    }

    /// As [`sides`](Self::sides).
    pub(crate) fn sides_mut(&mut self) -> (&mut [f64], &mut [f64]) {
        match self {
            Projection::Dct | Projection::Mixed { .. } => (&mut [], &mut []),
            Projection::Deep { query, key } | Projection::Dense { query, key } => (query, key),
        }
    }
}

/// All parameters of a DCT feature map: readable, replaceable, checked when a map is built from
/// them.
///
/// A map is [`DctMap::from_params`](super::DctMap::from_params) of these numbers and nothing else;
/// save them, not the seed they came from.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap};
///
/// let mut params = DctMapConfig::new().with_blocks(2).params(8)?;
/// params.query.center[0] = 0.5;
/// params.log_mix = -0.25;
/// let map = DctMap::<f32>::from_params(params)?;
/// assert_eq!((map.dim(), map.features()), (8, 16));
/// assert_eq!(map.params().log_mix, -0.25);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DctParams {
    /// The linear map from z to u/t.
    pub projection: Projection,
    /// The envelope p of both sides.
    pub envelope: Envelope,
    /// Features per projected coordinate.
    pub pairing: Pairing,
    /// Whether both sides share scales and radii.
    pub sides: Sides,
    /// Parameters of the query side.
    pub query: SideParams,
    /// Parameters of the key side.
    pub key: SideParams,
    /// Log-weights w (the paper's log D²), `[m]`, on the key side.
    pub log_weight: Vec<f64>,
    /// Mix g: the kernel is multiplied by e^g, on the query side.
    pub log_mix: f64,
}

impl DctParams {
    /// One plain block: the DCT itself, t = s = 1, centres 0, w = −ln d, g = 0.
    ///
    /// `dim` = 0 gives empty parameters, which no map can be built from, and so does a `dim` beyond
    /// 2²⁴.
    pub fn new(dim: usize) -> Self {
        let dim = if dim > MAX_POINTS { 0 } else { dim };
        let side =
            SideParams { center: vec![0.0; dim], scale: vec![1.0; dim], radii: vec![1.0; dim] };
        Self {
            projection: Projection::Dct,
            envelope: Envelope::None,
            pairing: Pairing::Single,
            sides: Sides::Untied,
            query: side.clone(),
            key: side,
            log_weight: vec![-(dim as f64).ln(); dim],
            log_mix: 0.0,
        }
    }

    /// The same map with two more transforms per block, r = p = 1, which calibration can move away
    /// from each other: 2·d more numbers per block and side than the plain projection has. Mixed,
    /// deep and dense projections stay what they are.
    ///
    /// Costs what [`to_dense`](Self::to_dense) costs for d ≤ 256, where a product with the matrix
    /// is what is computed; O(m·log d) per token beyond.
    #[must_use]
    pub fn to_deep(&self) -> Self {
        match self.projection {
            Projection::Dct => {
                let ones = vec![1.0; 2 * self.rows()];
                Self {
                    projection: Projection::Deep { query: ones.clone(), key: ones },
                    ..self.clone()
                }
            }
            Projection::Mixed { .. } | Projection::Deep { .. } | Projection::Dense { .. } => {
                self.clone()
            }
        }
    }

    /// The same map with its projection written out: one matrix W for each side, which a backward
    /// pass has gradients of. It can express more, and costs O(m·d) per token instead of O(m·log
    /// d).
    ///
    /// # Errors
    /// Those of [`DctMap::from_params`](super::DctMap::from_params) for parameters that do not fit
    /// each other, and [`Error::TooLarge`] for matrices there is no room for.
    pub fn to_dense(&self) -> Result<Self> {
        self.check::<f64>()?;
        if matches!(self.projection, Projection::Dense { .. }) {
            return Ok(self.clone());
        }
        check_room::<f64>("projection", &[2, self.rows(), self.dim()])?;
        let rows = |side: &SideParams, of_side: &[f64]| {
            let side = SideParams { radii: vec![1.0; side.radii.len()], ..side.clone() };
            projection_matrix(self, &side, of_side)
        };
        let (query, key) = self.projection.sides();
        let projection =
            Projection::Dense { query: rows(&self.query, query), key: rows(&self.key, key) };
        let side = |side: &SideParams| SideParams { scale: vec![1.0; self.dim()], ..side.clone() };
        Ok(Self { projection, query: side(&self.query), key: side(&self.key), ..self.clone() })
    }

    /// Head dimension d.
    pub fn dim(&self) -> usize {
        self.query.center.len()
    }

    /// Blocks G; 1 for a dense projection.
    pub fn blocks(&self) -> usize {
        self.query.scale.len().checked_div(self.dim()).unwrap_or(0)
    }

    /// Features m.
    pub fn features(&self) -> usize {
        self.log_weight.len()
    }

    /// Rows P of the projection: projected coordinates u_f, features before pairing.
    pub(super) fn rows(&self) -> usize {
        self.query.radii.len()
    }

    /// A hash of all that log-features are made of.
    pub(super) fn fingerprint(&self) -> u64 {
        let (kind, signs): (u64, &[f64]) = match &self.projection {
            Projection::Dct => (0, &[]),
            Projection::Mixed { signs } => (1, signs),
            Projection::Deep { .. } => (2, &[]),
            Projection::Dense { .. } => (3, &[]),
        };
        let (query, key) = self.projection.sides();
        let sides = [&self.query, &self.key].map(|side| [&side.center, &side.scale, &side.radii]);
        let numbers = [signs, query, key, &self.log_weight, &[self.log_mix]];
        let numbers = sides.iter().flatten().map(|numbers| &numbers[..]).chain(numbers);
        let choices = [kind, self.envelope as u64, self.pairing as u64];
        hash(choices.into_iter().chain(numbers.flatten().map(|&number| word(number))))
    }

    /// Checks lengths, finiteness and ties; numbers must be at most [`Real::LIMIT`] of the type
    /// they will be cast to.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::NotDivisible`], [`Error::Length`] for lengths that do not fit,
    /// [`Error::NonFinite`] and [`Error::Value`] for numbers, [`Error::Conflict`] for tied sides
    /// that differ.
    pub(super) fn check<T: Real>(&self) -> Result<()> {
        self.check_lengths()?;
        self.check_numbers(T::LIMIT)?;
        self.check_ties()
    }

    fn check_lengths(&self) -> Result<()> {
        let (dim, scales, rows) = (self.dim(), self.query.scale.len(), self.rows());
        if dim == 0 {
            return Err(Error::Empty { argument: "query.center" });
        }
        if rows == 0 {
            return Err(Error::Empty { argument: "query.radii" });
        }
        match &self.projection {
            Projection::Dct | Projection::Mixed { .. } | Projection::Deep { .. } => {
                if rows % dim != 0 {
                    return Err(Error::NotDivisible {
                        argument: "query.radii",
                        divisor: "dim",
                        divisor_value: dim,
                        got: rows,
                    });
                }
                check_len("query.scale", rows, scales)?;
            }
            Projection::Dense { .. } => check_len("query.scale", dim, scales)?,
        }
        check_len("key.center", dim, self.key.center.len())?;
        check_len("key.scale", scales, self.key.scale.len())?;
        check_len("key.radii", rows, self.key.radii.len())?;
        match &self.projection {
            Projection::Dct => {}
            Projection::Mixed { signs } => {
                check_len("projection.signs", rows.saturating_mul(3), signs.len())?
            }
            Projection::Deep { query, key } => {
                check_len("projection.query", rows.saturating_mul(2), query.len())?;
                check_len("projection.key", rows.saturating_mul(2), key.len())?;
            }
            Projection::Dense { query, key } => {
                check_len("projection.query", rows.saturating_mul(dim), query.len())?;
                check_len("projection.key", rows.saturating_mul(dim), key.len())?;
            }
        }
        check_len("log_weight", paired(self.pairing, rows), self.log_weight.len())
    }

    fn check_numbers(&self, limit: f64) -> Result<()> {
        for (side, [center, scale, radii]) in [
            (&self.query, ["query.center", "query.scale", "query.radii"]),
            (&self.key, ["key.center", "key.scale", "key.radii"]),
        ] {
            check_limit(center, &side.center, limit)?;
            check_limit(scale, &side.scale, limit)?;
            check_limit(radii, &side.radii, limit)?;
        }
        match &self.projection {
            Projection::Dct => {}
            Projection::Mixed { signs } => check_limit("projection.signs", signs, limit)?,
            Projection::Deep { query, key } | Projection::Dense { query, key } => {
                check_limit("projection.query", query, limit)?;
                check_limit("projection.key", key, limit)?;
            }
        }
        check_limit("log_weight", &self.log_weight, limit)?;
        check_limit("log_mix", &[self.log_mix], limit)
    }

    fn check_ties(&self) -> Result<()> {
        let (query, key) = self.projection.sides();
        let same = query == key
            && self.query.scale == self.key.scale
            && self.query.radii == self.key.radii;
        if self.sides == Sides::Tied && !same {
            return Err(Error::Conflict {
                argument: "Sides::Tied",
                other: "scales, radii or projections that differ between the sides",
            });
        }
        Ok(())
    }
}

/// Features that `rows` projected coordinates yield (saturated).
pub(super) fn paired(pairing: Pairing, rows: usize) -> usize {
    match pairing {
        Pairing::Single => rows,
        Pairing::Antithetic => rows.saturating_mul(2),
    }
}

/// Every value is finite and at most `limit` in magnitude.
pub(super) fn check_limit(argument: &'static str, values: &[f64], limit: f64) -> Result<()> {
    match values.iter().position(|v| v.is_nan() || v.abs() > limit) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinite { argument, index, limit, got: values[index] }),
    }
}
