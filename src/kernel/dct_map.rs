//! The weighted DCT feature map.
//!
//! ```text
//! u(z)    = t ⊙ C(s ⊙ z)                                  per block; C is the orthonormal DCT-II
//! query:  a(x) = u(x − μq) + p(x − μq) + x·μk − μq·μk + g
//! key:    b(y) = u(y − μk) + p(y − μk) + w + μq·y
//! K(x, y) = Σ_f exp(a_f(x) + b_f(y))
//! ```
//!
//! The paper's φ_WDCF(x) = D·exp(T·C·x) is the case of one block, s = 1, p = 0, centres 0 and w = log D².

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::FeatureMap;
use super::backward::Tables;
use super::params::{DctParams, Envelope, InputScales, Mixing, Pairing, Points, Projection, Radial, SideParams, Sides, paired};
use super::quantile::Quantile;
use super::sampler::{MAX_POINTS, Purpose, signs, unit_points};
use super::transform::{DctPlan, dense_panel};
use crate::error::{Error, Result, check_positive};
use crate::real::Real;

/// How a [`DctMap`] is to be made.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, FeatureMap, Pairing};
///
/// let map = DctMapConfig::new(64).with_blocks(2).with_pairing(Pairing::Antithetic).build::<f32>()?;
/// assert_eq!(map.features(), 2 * 2 * 64);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DctMapConfig {
    /// Head dimension d ≥ 1.
    pub dim: usize,
    /// Blocks G ≥ 1. Default: 1.
    pub blocks: usize,
    /// Features per projected coordinate. Default: [`Pairing::Single`].
    pub pairing: Pairing,
    /// Law of the radii. Default: [`Radial::Normal`].
    pub radial: Radial,
    /// Point set of the radii. Default: [`Points::Sobol`].
    pub points: Points,
    /// Envelope p. Default: [`Envelope::None`].
    pub envelope: Envelope,
    /// Whether calibration must keep both sides equal. Default: [`Sides::Untied`].
    pub sides: Sides,
    /// Initial input scales. Default: [`InputScales::RandomSigns`].
    pub scales: InputScales,
    /// What stands in place of the transform. Default: [`Mixing::None`].
    pub mixing: Mixing,
    /// Seed of points and signs. Default: 0.
    pub seed: u64,
}

impl DctMapConfig {
    /// The map of the paper for head dimension `dim`: one block, normal radii, Sobol points, no envelope.
    pub fn new(dim: usize) -> Self {
        Self {
            dim,
            blocks: 1,
            pairing: Pairing::default(),
            radial: Radial::default(),
            points: Points::default(),
            envelope: Envelope::default(),
            sides: Sides::default(),
            scales: InputScales::default(),
            mixing: Mixing::default(),
            seed: 0,
        }
    }

    /// Blocks G. Powers of two stratify the radii of each row best.
    #[must_use]
    pub fn with_blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    /// Features per projected coordinate.
    #[must_use]
    pub fn with_pairing(self, pairing: Pairing) -> Self {
        Self { pairing, ..self }
    }

    /// Law of the radii.
    #[must_use]
    pub fn with_radial(self, radial: Radial) -> Self {
        Self { radial, ..self }
    }

    /// Point set of the radii.
    #[must_use]
    pub fn with_points(self, points: Points) -> Self {
        Self { points, ..self }
    }

    /// Envelope p.
    #[must_use]
    pub fn with_envelope(self, envelope: Envelope) -> Self {
        Self { envelope, ..self }
    }

    /// Whether calibration must keep both sides equal.
    #[must_use]
    pub fn with_sides(self, sides: Sides) -> Self {
        Self { sides, ..self }
    }

    /// Initial input scales.
    #[must_use]
    pub fn with_scales(self, scales: InputScales) -> Self {
        Self { scales, ..self }
    }

    /// What stands in place of the transform.
    #[must_use]
    pub fn with_mixing(self, mixing: Mixing) -> Self {
        Self { mixing, ..self }
    }

    /// Seed of points and signs.
    #[must_use]
    pub fn with_seed(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// Draws the parameters: t = F⁻¹(u), s, mixing signs, centres 0, w = −ln m, g = 0. Same config, same numbers.
    ///
    /// # Cost
    /// One quantile per row, G·d of them: about 30 ns each for the normal law, 3 µs for chi.
    ///
    /// # Errors
    /// [`Error::Value`] for `dim` = 0 or `blocks` = 0, [`Error::TooLarge`] beyond 65 536 · 256 rows G·d, which is as
    /// far as the Sobol sequence reaches.
    pub fn params(&self) -> Result<DctParams> {
        check_positive("dim", self.dim)?;
        check_positive("blocks", self.blocks)?;
        if self.dim > MAX_POINTS {
            return Err(Error::TooLarge { argument: "dim", limit: MAX_POINTS, got: self.dim });
        }
        if self.blocks > MAX_POINTS / self.dim {
            return Err(Error::TooLarge { argument: "blocks", limit: MAX_POINTS / self.dim, got: self.blocks });
        }
        let rows = self.blocks * self.dim;
        let quantile = Quantile::new(self.radial, self.dim)?;
        let radii = unit_points(self.points, self.dim, self.blocks, self.seed).into_iter().map(|u| quantile.at(u)).collect();
        let mut scale = vec![1.0; rows];
        if self.scales == InputScales::RandomSigns {
            scale[self.dim..].copy_from_slice(&signs(rows - self.dim, self.seed, Purpose::InputSigns));
        }
        let projection = match self.mixing {
            Mixing::None => Projection::Dct,
            Mixing::Mixed => Projection::Mixed { signs: signs(3 * rows, self.seed, Purpose::MixingSigns) },
        };
        let side = SideParams { center: vec![0.0; self.dim], scale, radii };
        let features = paired(self.pairing, rows);
        Ok(DctParams {
            projection,
            envelope: self.envelope,
            pairing: self.pairing,
            sides: self.sides,
            query: side.clone(),
            key: side,
            log_weight: vec![-(features as f64).ln(); features],
            log_mix: 0.0,
        })
    }

    /// Draws the parameters and builds the map.
    ///
    /// # Errors
    /// As [`params`](Self::params).
    pub fn build<T: Real>(&self) -> Result<DctMap<T>> {
        DctMap::from_params(self.params()?)
    }
}

/// The weighted DCT feature map: O(d log d) per token and block, any d ≥ 1.
///
/// Immutable; tables are computed in f64, cast once and shared by clones.
///
/// # Conventions
/// x = √σ·q and y = √σ·k come in scaled; C is orthonormal; the mix g and the constant −μq·μk are on the query side, the
/// log-weights on the key side. Parameters and inputs within [`Real::LIMIT`] give finite log-features unless their
/// products overflow the type, in which case the log-features are infinite or NaN.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, Envelope, FeatureMap, Mixing, Radial};
/// use ndarray::array;
///
/// // Nearly unbiased for exp(x·y), and with 4096 features close to it.
/// let map = DctMapConfig::new(4)
///     .with_blocks(1024)
///     .with_mixing(Mixing::Mixed)
///     .with_radial(Radial::Chi)
///     .with_envelope(Envelope::Gaussian)
///     .build::<f64>()?;
/// let (x, y) = (array![[0.3, -0.2, 0.5, 0.1]], array![[0.4, 0.6, 0.2, -0.5]]);
/// let (a, b) = (map.query_log_features(&x)?, map.key_log_features(&y)?);
/// let kernel: f64 = (&a + &b).mapv(f64::exp).sum();
/// assert!((kernel / 0.05_f64.exp() - 1.0).abs() < 0.05);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Clone)]
pub struct DctMap<T> {
    inner: Arc<Inner<T>>,
}

struct Inner<T> {
    params: DctParams,
    dim: usize,
    rows: usize,
    envelope: bool,
    antithetic: bool,
    plan: DctPlan<T>,
    query: Side<T>,
    key: Side<T>,
    /// Made by the first backward pass.
    backward: OnceLock<Tables<T>>,
}

/// One side's tables, cast to the element type. What is trivially absent is `None`.
struct Side<T> {
    /// μ of this side.
    center: Option<Vec<T>>,
    /// μ of the other side, of which the dot product with the token is added.
    tilt: Option<Vec<T>>,
    /// Added to every log-feature.
    constant: T,
    /// Added per feature, `[m]`.
    log_weight: Option<Vec<T>>,
    /// t, `[P]`; ones where the rows already hold them.
    radii: Vec<T>,
    rows: Rows<T>,
}

enum Rows<T> {
    /// C(s ⊙ z): s, `[G, d]`.
    Dct(Vec<T>),
    /// C D₁ C D₂ C (D₃ s ⊙ z): the diagonals in the order they are applied, `[G, 3, d]`.
    Mixed(Vec<T>),
    /// W with t and s multiplied in, `[P, d]`.
    Dense(Vec<T>),
}

impl<T: Real> DctMap<T> {
    /// Builds the map that `params` describe.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::NotDivisible`] and [`Error::Length`] for lengths that do not fit each other,
    /// [`Error::NonFinite`] for numbers that are not finite or beyond [`Real::LIMIT`], [`Error::Conflict`] for
    /// [`Sides::Tied`] with sides that differ.
    pub fn from_params(params: DctParams) -> Result<Self> {
        params.check::<T>()?;
        let dot: f64 = params.query.center.iter().zip(&params.key.center).map(|(q, k)| q * k).sum();
        let (dense_query, dense_key) = match &params.projection {
            Projection::Dense { query, key } => (&query[..], &key[..]),
            Projection::Dct | Projection::Mixed { .. } => (&[][..], &[][..]),
        };
        let query = Side {
            constant: T::from_f64(params.log_mix - dot),
            log_weight: None,
            ..Side::new(&params, &params.query, &params.key, dense_query)
        };
        let key = Side::new(&params, &params.key, &params.query, dense_key);
        let key = Side { log_weight: Some(cast(&params.log_weight)), ..key };
        Ok(Self {
            inner: Arc::new(Inner {
                dim: params.dim(),
                rows: params.rows(),
                envelope: params.envelope == Envelope::Gaussian,
                antithetic: params.pairing == Pairing::Antithetic,
                plan: DctPlan::new(params.dim()),
                query,
                key,
                backward: OnceLock::new(),
                params,
            }),
        })
    }

    /// The parameters the map was built from, in f64 as they were given.
    pub fn params(&self) -> &DctParams {
        &self.inner.params
    }

    /// The tables of the backward pass.
    pub(super) fn tables(&self) -> &Tables<T> {
        self.inner.backward.get_or_init(|| Tables::new(&self.inner.params))
    }
}

impl<T> fmt::Debug for DctMap<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let params = &self.inner.params;
        f.debug_struct("DctMap")
            .field("dim", &self.inner.dim)
            .field("features", &params.features())
            .field("blocks", &params.blocks())
            .field("envelope", &params.envelope)
            .field("pairing", &params.pairing)
            .finish_non_exhaustive()
    }
}

impl<T: Real> FeatureMap<T> for DctMap<T> {
    fn dim(&self) -> usize {
        self.inner.dim
    }

    fn features(&self) -> usize {
        self.inner.params.features()
    }

    fn scratch_len(&self, width: usize) -> usize {
        let rows = match &self.inner.query.rows {
            Rows::Dct(_) | Rows::Mixed(_) => self.inner.plan.scratch_len(width),
            Rows::Dense(_) => self.inner.dim * width,
        };
        width + rows
    }

    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        self.inner.panel(&self.inner.query, width, x, out, scratch);
    }

    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]) {
        self.inner.panel(&self.inner.key, width, y, out, scratch);
    }
}

impl<T: Real> Inner<T> {
    /// Log-features of one side, `[d, width]` to `[m, width]`.
    fn panel(&self, side: &Side<T>, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        if width == 0 {
            return;
        }
        let (x, out) = (&x[..self.dim * width], &mut out[..self.params.features() * width]);
        let (offset, scratch) = scratch.split_at_mut(width);
        let (plus, minus) = out.split_at_mut(self.rows * width);
        side.project(&self.plan, self.dim, width, x, plus, scratch);
        let offset = side.offset(self.envelope, width, x, offset);
        let weight = |f: usize| side.log_weight.as_ref().map_or(T::zero(), |w| w[f]);
        for (f, (row, &t)) in plus.chunks_exact_mut(width).zip(&side.radii).enumerate() {
            if self.antithetic {
                let minus = &mut minus[f * width..(f + 1) * width];
                scale_and_add(row, minus, -t, weight(self.rows + f), offset, side.constant);
            }
            scale_and_add_in_place(row, t, weight(f), offset, side.constant);
        }
    }
}

impl<T: Real> Side<T> {
    /// Tables of `own` side; `dense` is its matrix, if the projection is dense. The constant is left at zero.
    fn new(params: &DctParams, own: &SideParams, other: &SideParams, dense: &[f64]) -> Self {
        let dim = params.dim();
        let mut radii = cast(&own.radii);
        let rows = match &params.projection {
            Projection::Dct => Rows::Dct(cast(&own.scale)),
            Projection::Mixed { signs } => {
                let mut diagonals = Vec::with_capacity(signs.len());
                for (signs, scale) in signs.chunks_exact(3 * dim).zip(own.scale.chunks_exact(dim)) {
                    diagonals.extend(signs[2 * dim..].iter().zip(scale).map(|(d3, s)| T::from_f64(d3 * s)));
                    diagonals.extend(signs[dim..2 * dim].iter().map(|&d2| T::from_f64(d2)));
                    diagonals.extend(signs[..dim].iter().map(|&d1| T::from_f64(d1)));
                }
                Rows::Mixed(diagonals)
            }
            Projection::Dense { .. } => {
                radii.fill(T::one());
                let row = |(w, &t): (&[f64], &f64)| -> Vec<T> { w.iter().zip(&own.scale).map(|(w, s)| T::from_f64(t * w * s)).collect() };
                Rows::Dense(dense.chunks_exact(dim).zip(&own.radii).flat_map(row).collect())
            }
        };
        let unless_zero = |center: &[f64]| center.iter().any(|&c| c != 0.0).then(|| cast(center));
        Self { center: unless_zero(&own.center), tilt: unless_zero(&other.center), constant: T::zero(), log_weight: None, radii, rows }
    }

    /// The projection without radii of z = x − μ, `[d, width]` to `[P, width]`.
    fn project(&self, plan: &DctPlan<T>, dim: usize, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        match &self.rows {
            Rows::Dct(scale) => {
                for (block, scale) in out.chunks_exact_mut(dim * width).zip(scale.chunks_exact(dim)) {
                    self.center_and_scale(scale, width, x, block);
                    plan.dct2_panel(width, block, scratch);
                }
            }
            Rows::Mixed(diagonals) => {
                for (block, diagonals) in out.chunks_exact_mut(dim * width).zip(diagonals.chunks_exact(3 * dim)) {
                    let (first, further) = diagonals.split_at(dim);
                    self.center_and_scale(first, width, x, block);
                    plan.dct2_panel(width, block, scratch);
                    for diagonal in further.chunks_exact(dim) {
                        for (row, &sign) in block.chunks_exact_mut(width).zip(diagonal) {
                            row.iter_mut().for_each(|value| *value *= sign);
                        }
                        plan.dct2_panel(width, block, scratch);
                    }
                }
            }
            Rows::Dense(matrix) => {
                let z = match &self.center {
                    None => x,
                    Some(center) => {
                        let z = &mut scratch[..dim * width];
                        for ((z, x), &center) in z.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(center) {
                            z.iter_mut().zip(x).for_each(|(z, &x)| *z = x - center);
                        }
                        z
                    }
                };
                dense_panel(matrix, dim, width, z, out);
            }
        }
    }

    /// out = s ⊙ (x − μ), one block.
    fn center_and_scale(&self, scale: &[T], width: usize, x: &[T], out: &mut [T]) {
        let rows = out.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(scale);
        match &self.center {
            None => rows.for_each(|((out, x), &s)| out.iter_mut().zip(x).for_each(|(out, &x)| *out = s * x)),
            Some(center) => rows.zip(center).for_each(|(((out, x), &s), &mu)| {
                out.iter_mut().zip(x).for_each(|(out, &x)| *out = s * (x - mu));
            }),
        }
    }

    /// What every feature of a token has in common besides the constant: p(x − μ) + (other μ)·x, `[width]`.
    fn offset<'a>(&self, envelope: bool, width: usize, x: &[T], offset: &'a mut [T]) -> Option<&'a [T]> {
        if !envelope && self.tilt.is_none() {
            return None;
        }
        offset.fill(T::zero());
        if envelope {
            for (i, x) in x.chunks_exact(width).enumerate() {
                let center = self.center.as_ref().map_or(T::zero(), |center| center[i]);
                for (sum, &x) in offset.iter_mut().zip(x) {
                    *sum += (x - center) * (x - center);
                }
            }
            let factor = T::from_f64(-0.5);
            offset.iter_mut().for_each(|sum| *sum *= factor);
        }
        if let Some(tilt) = &self.tilt {
            for (x, &tilt) in x.chunks_exact(width).zip(tilt) {
                for (sum, &x) in offset.iter_mut().zip(x) {
                    *sum += tilt * x;
                }
            }
        }
        Some(offset)
    }
}

/// out = t·u + (offset + weight + constant).
fn scale_and_add<T: Real>(u: &[T], out: &mut [T], t: T, weight: T, offset: Option<&[T]>, constant: T) {
    let shift = weight + constant;
    match offset {
        None => out.iter_mut().zip(u).for_each(|(out, &u)| *out = t * u + shift),
        Some(offset) => out.iter_mut().zip(u).zip(offset).for_each(|((out, &u), &offset)| *out = t * u + (offset + shift)),
    }
}

/// [`scale_and_add`] with u and out in one place.
fn scale_and_add_in_place<T: Real>(u: &mut [T], t: T, weight: T, offset: Option<&[T]>, constant: T) {
    let shift = weight + constant;
    match offset {
        None => u.iter_mut().for_each(|u| *u = t * *u + shift),
        Some(offset) => u.iter_mut().zip(offset).for_each(|(u, &offset)| *u = t * *u + (offset + shift)),
    }
}

fn cast<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}
