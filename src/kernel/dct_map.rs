//! The weighted DCT feature map.
//!
//! ```text
//! u(z)    = t ⊙ C(s ⊙ z)                                  per block; C is the orthonormal DCT-II
//! query:  a(x) = u(x − μq) + p(x − μq) + x·μk − μq·μk + g
//! key:    b(y) = u(y − μk) + p(y − μk) + w + μq·y
//! K(x, y) = Σ_f exp(a_f(x) + b_f(y))
//! ```
//!
//! The paper's φ_WDCF(x) = D·exp(T·C·x) is the case of one block, s = 1, p = 0, centres 0 and w =
//! log D².

use std::fmt;
use std::sync::{Arc, OnceLock};

use super::FeatureMap;
use super::backward::Tables;
use super::params::{
    DctParams, Envelope, InputScales, Mixing, Pairing, Points, Projection, Radial, SideParams,
    Sides, paired,
};
use super::quantile::Quantile;
use super::sampler::{MAX_POINTS, Purpose, signs, unit_points};
use super::transform::{DctPlan, shared_halves, transposed};
use crate::Real;
use crate::check::check_positive;
use crate::error::{Error, Result};
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::simd::{DctTables, padded, supports_dct};

/// How a [`DctMap`] is to be made, whatever the head dimension d.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, FeatureMap, Pairing};
///
/// let config = DctMapConfig::new().with_blocks(2).with_pairing(Pairing::Antithetic);
/// let map = config.build::<f32>(64)?;
/// assert_eq!(map.features(), 2 * 2 * 64);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct DctMapConfig {
    /// Blocks G ≥ 1: m = G·d features, twice as many with antithetic pairs. Default: 1.
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

impl Default for DctMapConfig {
    fn default() -> Self {
        Self {
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
}

impl DctMapConfig {
    /// The map of the paper: one block, normal radii, Sobol points, no envelope.
    pub fn new() -> Self {
        Self::default()
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

    /// What [`params`](Self::params) refuses.
    pub(crate) fn check(&self, dim: usize) -> Result<()> {
        check_positive("dim", dim)?;
        check_positive("blocks", self.blocks)?;
        if dim > MAX_POINTS {
            return Err(Error::TooLarge { argument: "dim", limit: MAX_POINTS, got: dim });
        }
        if self.blocks > MAX_POINTS / dim {
            return Err(Error::TooLarge {
                argument: "blocks",
                limit: MAX_POINTS / dim,
                got: self.blocks,
            });
        }
        Ok(())
    }

    /// Draws the parameters for head dimension `dim`: t = F⁻¹(u), s, mixing signs, centres 0, w =
    /// −ln m, g = 0. Same config, same numbers.
    ///
    /// # Cost
    /// One quantile per row, G·d of them: about 30 ns each for the normal law, 3 µs for chi.
    ///
    /// # Errors
    /// [`Error::Value`] for `dim` = 0 or `blocks` = 0, [`Error::TooLarge`] beyond 65 536 · 256 rows
    /// G·d, which is as far as the Sobol sequence reaches.
    pub fn params(&self, dim: usize) -> Result<DctParams> {
        self.check(dim)?;
        let rows = self.blocks * dim;
        let quantile = Quantile::new(self.radial, dim)?;
        let radii = unit_points(self.points, dim, self.blocks, self.seed)
            .into_iter()
            .map(|u| quantile.at(u))
            .collect();
        let mut scale = vec![1.0; rows];
        if self.scales == InputScales::RandomSigns {
            scale[dim..].copy_from_slice(&signs(rows - dim, self.seed, Purpose::InputSigns));
        }
        let projection = match self.mixing {
            Mixing::None => Projection::Dct,
            Mixing::Mixed => {
                Projection::Mixed { signs: signs(3 * rows, self.seed, Purpose::MixingSigns) }
            }
        };
        let side = SideParams { center: vec![0.0; dim], scale, radii };
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

    /// Draws the parameters and builds the map for head dimension `dim`.
    ///
    /// # Errors
    /// As [`params`](Self::params).
    pub fn build<T: Real>(&self, dim: usize) -> Result<DctMap<T>> {
        DctMap::from_params(self.params(dim)?)
    }
}

/// The weighted DCT feature map: O(d log d) per token and block, any d ≥ 1.
///
/// Immutable; tables are computed in f64, cast once and shared by clones.
///
/// # Conventions
/// x = √σ·q and y = √σ·k come in scaled; C is orthonormal; the mix g and the constant −μq·μk are on
/// the query side, the log-weights on the key side. Parameters and inputs within [`Real::LIMIT`]
/// give finite log-features unless their products overflow the type, in which case the log-features
/// are infinite or NaN.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, Envelope, FeatureMap, Mixing, Radial};
/// use ndarray::array;
///
/// // Nearly unbiased for exp(x·y), and with 4096 features close to it.
/// let map = DctMapConfig::new()
///     .with_blocks(1024)
///     .with_mixing(Mixing::Mixed)
///     .with_radial(Radial::Chi)
///     .with_envelope(Envelope::Gaussian)
///     .build::<f64>(4)?;
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
    /// Rows P of the projection.
    rows: usize,
    envelope: bool,
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
    /// Added to every log-feature of a token: constants and log-weights, `[m]`.
    row: Vec<T>,
    projector: Projector<T>,
    /// How a single token is projected, while its matrix is small enough for that to be the
    /// fastest.
    token: Option<TokenProjector<T>>,
}

/// The projection of a single token: a product with a matrix.
enum TokenProjector<T> {
    /// One DCT between diagonals per block.
    Dct {
        /// Of the matrix C, shared by all maps of this dimension: with many heads their own
        /// matrices would push each other out of the fastest cache.
        halves: Arc<Aligned<T>>,
        /// s, `[P]`.
        scale: Vec<T>,
        /// t, `[P]`.
        radii: Vec<T>,
    },
    /// Everything in one, `[d, P_padded]`.
    Matrix(Aligned<T>),
}

/// How the projection u = t ⊙ C(s ⊙ z) of a panel is computed; which one is faster was measured
/// (benches/kernel.rs).
enum Projector<T> {
    /// Batched transforms with tokens along the lanes, a chain of them (three if mixed) per block:
    /// d = 2^k, 3·2^k or 5·2^k, k ≥ 3, up to 256.
    Lanes(Vec<Vec<DctTables<T>>>),
    /// A matrix `[P, d]`: other d up to 256, rows that are no transform, and deep projections up to
    /// that d, for which batched transforms there and back would be hardly faster.
    Matrix(Vec<T>),
    /// One transform per column by rustdct, between diagonals: larger d.
    Columns {
        plan: DctPlan<T>,
        /// Per block the diagonals that stand before each transform, `[G, chain, d]`.
        diagonals: Vec<T>,
        /// Transforms per block.
        chain: Chain,
        /// t, `[P]`.
        radii: Vec<T>,
    },
}

/// Largest d for which a product with the matrix of the projection beats one transform per column.
const MATRIX_DIM: usize = 256;

/// Largest matrix, in elements, that a single token is projected with.
const TOKEN_MATRIX: usize = 1 << 15;

impl<T: Real> DctMap<T> {
    /// Builds the map that `params` describe.
    ///
    /// # Cost
    /// Tables of O(m + d·log d) numbers for a transform; a matrix `[P, d]` a side for a dense
    /// projection, and where d is below 256 and not 2^k, 3·2^k or 5·2^k with k ≥ 3. Maps of equal d
    /// share their cosines.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::NotDivisible`] and [`Error::Length`] for lengths that do not fit
    /// each other, [`Error::NonFinite`] for numbers that are not finite or beyond [`Real::LIMIT`],
    /// [`Error::Conflict`] for [`Sides::Tied`] with sides that differ.
    pub fn from_params(params: DctParams) -> Result<Self> {
        params.check::<T>()?;
        let dot: f64 = params.query.center.iter().zip(&params.key.center).map(|(q, k)| q * k).sum();
        let (of_query, of_key) = params.projection.sides();
        let query_row = vec![params.log_mix - dot; params.features()];
        Ok(Self {
            inner: Arc::new(Inner {
                dim: params.dim(),
                rows: params.rows(),
                envelope: params.envelope == Envelope::Gaussian,
                query: Side::new(&params, &params.query, &params.key, of_query, &query_row),
                key: Side::new(&params, &params.key, &params.query, of_key, &params.log_weight),
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
        let columns = match &self.inner.query.projector {
            Projector::Lanes(_) | Projector::Matrix(_) => 0,
            Projector::Columns { plan, .. } => plan.scratch_len(width),
        };
        width + width.max(self.inner.dim) + (self.inner.dim * width).max(columns)
    }

    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        self.inner.panel(&self.inner.query, width, x, out, scratch);
    }

    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]) {
        self.inner.panel(&self.inner.key, width, y, out, scratch);
    }

    fn query_token(&self, x: &[T], out: &mut [T], scratch: &mut [T]) {
        match &self.inner.query.token {
            Some(projector) => self.inner.token(&self.inner.query, projector, x, out, scratch),
            None => super::token(self.features(), x, out, scratch, |width, x, out, scratch| {
                self.query_panel(width, x, out, scratch)
            }),
        }
    }

    fn key_token(&self, y: &[T], out: &mut [T], scratch: &mut [T]) {
        match &self.inner.key.token {
            Some(projector) => self.inner.token(&self.inner.key, projector, y, out, scratch),
            None => super::token(self.features(), y, out, scratch, |width, y, out, scratch| {
                self.key_panel(width, y, out, scratch)
            }),
        }
    }

    /// Of the parameters: the same on every machine, for `f32` and `f64`, and for equal
    /// parameters however they were come by.
    fn fingerprint(&self) -> u64 {
        self.inner.params.fingerprint()
    }
}

impl<T: Real> Inner<T> {
    /// Log-features of one side, `[d, width]` to `[m, width]`.
    fn panel(&self, side: &Side<T>, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        if width == 0 {
            return;
        }
        let (x, out) = (&x[..self.dim * width], &mut out[..self.params.features() * width]);
        let (column, scratch) = scratch.split_at_mut(width);
        let (zeros, scratch) = scratch.split_at_mut(width.max(self.dim));
        side.column(self.envelope, x, column);
        zeros.fill(T::ZERO);
        let (plus, minus) = out.split_at_mut(self.rows * width);
        let (row, mirror_row) = side.row.split_at(self.rows);
        match &side.projector {
            Projector::Lanes(blocks) => {
                let size = self.dim * width;
                let mut mirrors =
                    minus.chunks_exact_mut(size).zip(mirror_row.chunks_exact(self.dim));
                for ((chain, out), row) in
                    blocks.iter().zip(plus.chunks_exact_mut(size)).zip(row.chunks_exact(self.dim))
                {
                    let (mirror, mirror_row) = mirrors.next().unwrap_or_default();
                    lanes(
                        chain,
                        x,
                        column,
                        row,
                        out,
                        mirror_row,
                        mirror,
                        zeros,
                        &mut scratch[..size],
                    );
                }
            }
            Projector::Matrix(matrix) => {
                let z = side.centred(x, width, scratch);
                T::ops().matmul(
                    MatMut::packed(plus, self.rows, width),
                    Accum::Replace,
                    MatRef::packed(matrix, self.rows, self.dim),
                    MatRef::packed(z, self.dim, width),
                );
                add_rows_and_column(plus, row, minus, mirror_row, column);
            }
            Projector::Columns { plan, diagonals, chain, radii } => {
                let blocks = plus
                    .chunks_exact_mut(self.dim * width)
                    .zip(diagonals.chunks_exact(chain.len() * self.dim));
                for ((block, diagonals), radii) in blocks.zip(radii.chunks_exact(self.dim)) {
                    block.copy_from_slice(x);
                    if let Some(center) = &side.center {
                        block
                            .chunks_exact_mut(width)
                            .zip(center)
                            .for_each(|(row, &mu)| row.iter_mut().for_each(|z| *z -= mu));
                    }
                    for (link, diagonal) in diagonals.chunks_exact(self.dim).enumerate() {
                        scale_rows(block, diagonal);
                        chain.transform(link, plan, width, block, scratch);
                    }
                    scale_rows(block, radii);
                }
                add_rows_and_column(plus, row, minus, mirror_row, column);
            }
        }
    }

    /// Log-features of one token of one side.
    fn token(
        &self,
        side: &Side<T>,
        projector: &TokenProjector<T>,
        x: &[T],
        out: &mut [T],
        scratch: &mut [T],
    ) {
        let (x, out) = (&x[..self.dim], &mut out[..self.params.features()]);
        let (centred, scratch) = scratch.split_at_mut(self.dim);
        let (plus, minus) = out.split_at_mut(self.rows);
        let (row, mirror_row) = side.row.split_at(self.rows);
        let z = match &side.center {
            None => x,
            Some(center) => {
                centred.iter_mut().zip(x.iter().zip(center)).for_each(|(z, (&x, &mu))| *z = x - mu);
                &*centred
            }
        };
        let mut offset = [T::ZERO];
        if self.envelope {
            (T::ops().matvec)(z, z.len(), z, &mut offset);
            offset[0] *= T::from_f64(-0.5);
        }
        if let Some(tilt) = &side.tilt {
            (T::ops().matvec)(tilt, x.len(), x, &mut offset);
        }
        let offset = offset[0];
        match projector {
            TokenProjector::Dct { halves, scale, radii } => {
                // Ranges, not chunks, whose iterators divide: a token is that short.
                let (mut start, size) = (0, self.dim);
                while start < self.rows {
                    let block = start..start + size;
                    let (mirror_row, minus) = if minus.is_empty() {
                        Default::default()
                    } else {
                        (&mirror_row[block.clone()], &mut minus[block.clone()])
                    };
                    let (scale, radii, row) =
                        (&scale[block.clone()], &radii[block.clone()], &row[block.clone()]);
                    start = block.end;
                    (T::ops().dct_token)(
                        halves,
                        z,
                        scale,
                        radii,
                        offset,
                        row,
                        &mut plus[block],
                        mirror_row,
                        minus,
                        scratch,
                    );
                }
            }
            TokenProjector::Matrix(matrix) => {
                let u = &mut scratch[..padded(self.rows)];
                (T::ops().vecmat)(z, matrix, false, u);
                plus.iter_mut()
                    .zip(&*u)
                    .zip(row)
                    .for_each(|((out, &u), &row)| *out = u + (row + offset));
                minus
                    .iter_mut()
                    .zip(&*u)
                    .zip(mirror_row)
                    .for_each(|((out, &u), &row)| *out = (row + offset) - u);
            }
        }
    }
}

impl<T: Real> Side<T> {
    /// Tables of `own` side; `of_side` is what only it has of the projection, `row` what is added
    /// per feature.
    fn new(
        params: &DctParams,
        own: &SideParams,
        other: &SideParams,
        of_side: &[f64],
        row: &[f64],
    ) -> Self {
        let unless_zero = |center: &[f64]| center.iter().any(|&c| c != 0.0).then(|| cast(center));
        let (dim, rows) = (params.dim(), params.rows());
        let token = match params.projection {
            Projection::Dct if dim * dim / 2 <= TOKEN_MATRIX => Some(TokenProjector::Dct {
                halves: shared_halves(dim),
                scale: cast(&own.scale),
                radii: cast(&own.radii),
            }),
            Projection::Mixed { .. } | Projection::Deep { .. } | Projection::Dense { .. }
                if rows * dim <= TOKEN_MATRIX =>
            {
                Some(TokenProjector::Matrix(transposed(
                    &projection_matrix(params, own, of_side),
                    dim,
                    dim,
                )))
            }
            _ => None,
        };
        let projector = match params.projection {
            Projection::Dct | Projection::Mixed { .. } if supports_dct(dim) => {
                Projector::Lanes(lane_tables(params, own))
            }
            Projection::Dct | Projection::Mixed { .. } | Projection::Deep { .. }
                if dim > MATRIX_DIM =>
            {
                let (diagonals, chain) = chain_diagonals(params, own, of_side);
                Projector::Columns {
                    plan: DctPlan::new(dim),
                    diagonals: cast(&diagonals),
                    chain,
                    radii: cast(&own.radii),
                }
            }
            _ => Projector::Matrix(cast(&projection_matrix(params, own, of_side))),
        };
        Self {
            center: unless_zero(&own.center),
            tilt: unless_zero(&other.center),
            row: cast(row),
            projector,
            token,
        }
    }

    /// z = x − μ, in `scratch` unless the centre is zero.
    fn centred<'a>(&self, x: &'a [T], width: usize, scratch: &'a mut [T]) -> &'a [T] {
        match &self.center {
            None => x,
            Some(center) => {
                let z = &mut scratch[..x.len()];
                for ((z, x), &mu) in
                    z.chunks_exact_mut(width).zip(x.chunks_exact(width)).zip(center)
                {
                    z.iter_mut().zip(x).for_each(|(z, &x)| *z = x - mu);
                }
                z
            }
        }
    }

    /// What all features of a token have in common: p(x − μ) + (other μ)·x, `[width]`.
    fn column(&self, envelope: bool, x: &[T], column: &mut [T]) {
        let width = column.len();
        column.fill(T::ZERO);
        if envelope {
            let half = T::from_f64(-0.5);
            for (i, x) in x.chunks_exact(width).enumerate() {
                let center = self.center.as_ref().map_or(T::ZERO, |center| center[i]);
                column
                    .iter_mut()
                    .zip(x)
                    .for_each(|(sum, &x)| *sum += half * ((x - center) * (x - center)));
            }
        }
        if let Some(tilt) = &self.tilt {
            for (x, &tilt) in x.chunks_exact(width).zip(tilt) {
                column.iter_mut().zip(x).for_each(|(sum, &x)| *sum += tilt * x);
            }
        }
    }
}

/// One block by its chain of batched transforms; all but the last one write plain panels.
#[allow(clippy::too_many_arguments, reason = "the operands of the transform that ends the chain")]
pub(super) fn lanes<T: Real>(
    chain: &[DctTables<T>],
    x: &[T],
    column: &[T],
    row: &[T],
    out: &mut [T],
    mirror_row: &[T],
    mirror: &mut [T],
    zeros: &[T],
    scratch: &mut [T],
) {
    let ops = T::ops();
    match chain {
        [only] => (ops.dct)(only, x, column, row, out, mirror_row, mirror),
        [first, second, third] => {
            let (zero_row, zero_column) = (&zeros[..row.len()], &zeros[..column.len()]);
            (ops.dct)(first, x, zero_column, zero_row, out, &[], &mut []);
            (ops.dct)(second, out, zero_column, zero_row, scratch, &[], &mut []);
            (ops.dct)(third, scratch, column, row, out, mirror_row, mirror);
        }
        _ => unreachable!("one transform, or three"),
    }
}

/// The transpose of [`lanes`] without its additions: `out` is what the block's input gets from
/// `grad − minus`.
pub(super) fn lanes_transposed<T: Real>(
    chain: &[DctTables<T>],
    width: usize,
    grad: &[T],
    minus: &[T],
    out: &mut [T],
    scratch: &mut [T],
) {
    let ops = T::ops();
    match chain {
        [only] => (ops.dct_transposed)(only, width, grad, minus, out),
        [first, second, third] => {
            (ops.dct_transposed)(third, width, grad, minus, out);
            (ops.dct_transposed)(second, width, out, &[], scratch);
            (ops.dct_transposed)(first, width, scratch, &[], out);
        }
        _ => unreachable!("one transform, or three"),
    }
}

/// The transforms of a block, in the order they are applied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Chain {
    /// C.
    Plain,
    /// C, C, C.
    Mixed,
    /// C, Cᵀ, C.
    Deep,
}

impl Chain {
    fn len(self) -> usize {
        match self {
            Chain::Plain => 1,
            Chain::Mixed | Chain::Deep => 3,
        }
    }

    /// Transform `link` of the columns of a panel.
    fn transform<T: Real>(
        self,
        link: usize,
        plan: &DctPlan<T>,
        width: usize,
        panel: &mut [T],
        scratch: &mut [T],
    ) {
        match (self, link) {
            (Chain::Deep, 1) => plan.dct3_panel(width, panel, scratch),
            _ => plan.dct2_panel(width, panel, scratch),
        }
    }
}

/// Per block the diagonals before each transform, in the order they are applied, `[G, chain, d]`:
/// s, or D₃s, D₂, D₁, or p, r, s.
fn chain_diagonals(params: &DctParams, own: &SideParams, of_side: &[f64]) -> (Vec<f64>, Chain) {
    let dim = params.dim();
    match &params.projection {
        Projection::Mixed { signs } => {
            let blocks = signs.chunks_exact(3 * dim).zip(own.scale.chunks_exact(dim));
            let diagonals = blocks.flat_map(|(signs, scale)| {
                let (first, rest) = signs.split_at(dim);
                let (second, third) = rest.split_at(dim);
                third
                    .iter()
                    .zip(scale)
                    .map(|(sign, s)| sign * s)
                    .chain(second.iter().copied())
                    .chain(first.iter().copied())
            });
            (diagonals.collect(), Chain::Mixed)
        }
        Projection::Deep { .. } => {
            let blocks = of_side.chunks_exact(2 * dim).zip(own.scale.chunks_exact(dim));
            (
                blocks.flat_map(|(outer, scale)| outer.iter().chain(scale).copied()).collect(),
                Chain::Deep,
            )
        }
        Projection::Dct | Projection::Dense { .. } => (own.scale.clone(), Chain::Plain),
    }
}

/// The batched transforms of every block: centre and first diagonal before the first, radii after
/// the last.
pub(super) fn lane_tables<T: Real>(params: &DctParams, own: &SideParams) -> Vec<Vec<DctTables<T>>> {
    let dim = params.dim();
    let (diagonals, chain) = chain_diagonals(params, own, &[]);
    let (ones, zeros) = (vec![1.0; dim], vec![0.0; dim]);
    let block = |(diagonals, radii): (&[f64], &[f64])| {
        let links = diagonals.chunks_exact(dim).enumerate().map(|(link, diagonal)| {
            let shift: Vec<f64> = diagonal.iter().zip(&own.center).map(|(s, mu)| -s * mu).collect();
            DctTables::new(
                diagonal,
                if link == 0 { &shift } else { &zeros },
                if link + 1 == chain.len() { radii } else { &ones },
            )
        });
        links.collect()
    };
    diagonals.chunks_exact(chain.len() * dim).zip(own.radii.chunks_exact(dim)).map(block).collect()
}

/// The projection as a matrix W `[P, d]`, u = W z: the transforms, run on the unit vectors in f64,
/// or the dense rows.
pub(super) fn projection_matrix(params: &DctParams, own: &SideParams, of_side: &[f64]) -> Vec<f64> {
    let dim = params.dim();
    if let Projection::Dense { .. } = params.projection {
        let row = |(w, &t): (&[f64], &f64)| -> Vec<f64> {
            w.iter().zip(&own.scale).map(|(w, s)| t * w * s).collect()
        };
        return of_side.chunks_exact(dim).zip(&own.radii).flat_map(row).collect();
    }
    let (diagonals, chain) = chain_diagonals(params, own, of_side);
    let mut square = Square::new(dim);
    let mut matrix = Vec::with_capacity(own.radii.len() * dim);
    for (diagonals, radii) in
        diagonals.chunks_exact(chain.len() * dim).zip(own.radii.chunks_exact(dim))
    {
        let mut panel = square.identity();
        for (link, diagonal) in diagonals.chunks_exact(dim).enumerate() {
            scale_rows(&mut panel, diagonal);
            chain.transform(link, &square.plan, square.width, &mut panel, &mut square.scratch);
        }
        scale_rows(&mut panel, radii);
        matrix.extend(square.rows(&panel));
    }
    matrix
}

/// Transforms of the columns of d × d matrices in f64, for tables and gradients; rows padded to
/// whole lane groups.
struct Square {
    plan: DctPlan<f64>,
    dim: usize,
    width: usize,
    scratch: Vec<f64>,
}

impl Square {
    fn new(dim: usize) -> Self {
        let (plan, width) = (DctPlan::new(dim), padded(dim));
        let scratch = vec![0.0; plan.scratch_len(width)];
        Self { plan, dim, width, scratch }
    }

    fn identity(&self) -> Vec<f64> {
        let mut panel = vec![0.0; self.dim * self.width];
        (0..self.dim).for_each(|i| panel[i * self.width + i] = 1.0);
        panel
    }

    /// The elements of a panel without its padding.
    fn rows<'a>(&self, panel: &'a [f64]) -> impl Iterator<Item = &'a f64> + use<'a> {
        let dim = self.dim;
        panel.chunks_exact(self.width).flat_map(move |row| &row[..dim])
    }

    /// C X
    fn dct2(&mut self, panel: &mut [f64]) {
        self.plan.dct2_panel(self.width, panel, &mut self.scratch);
    }

    /// Cᵀ X
    fn dct3(&mut self, panel: &mut [f64]) {
        self.plan.dct3_panel(self.width, panel, &mut self.scratch);
    }
}

/// The gradients of one block of a deep projection A = T C S Cᵀ R C P from that of its matrix, Ȧ
/// `[d, d]`:
///
/// ```text
/// X₁ = C P      X₂ = Cᵀ R X₁      X₃ = C S X₂      Ẋ₂ = S Cᵀ T Ȧ      Ẋ₁ = R C Ẋ₂
/// ṫ_f = Ȧ_f·X₃_f      ṡ_i = (CᵀTȦ)_i·X₂_i      ṙ_f = (C Ẋ₂)_f·X₁_f      ṗ_i = (Cᵀ Ẋ₁)_ii
/// ```
///
/// `outer` is p, r. Returns ṫ, ṡ, and ṗ, ṙ one after the other.
pub(super) fn deep_gradients(
    radii: &[f64],
    scale: &[f64],
    outer: &[f64],
    matrix: &[f64],
) -> (Vec<f64>, Vec<f64>, Vec<f64>) {
    let dim = radii.len();
    let (p, r) = outer.split_at(dim);
    let mut square = Square::new(dim);
    let width = square.width;
    let dots = |a: &[f64], b: &[f64]| -> Vec<f64> {
        let rows = a.chunks_exact(width).zip(b.chunks_exact(width));
        rows.map(|(a, b)| a.iter().zip(b).map(|(a, b)| a * b).sum()).collect()
    };
    let mut first = square.identity();
    scale_rows(&mut first, p);
    square.dct2(&mut first);
    let mut second = first.clone();
    scale_rows(&mut second, r);
    square.dct3(&mut second);
    let mut third = second.clone();
    scale_rows(&mut third, scale);
    square.dct2(&mut third);

    let mut slope = vec![0.0; dim * width];
    slope
        .chunks_exact_mut(width)
        .zip(matrix.chunks_exact(dim))
        .for_each(|(row, from)| row[..dim].copy_from_slice(from));
    let of_radii = dots(&slope, &third);
    scale_rows(&mut slope, radii);
    square.dct3(&mut slope);
    let of_scale = dots(&slope, &second);
    scale_rows(&mut slope, scale);
    square.dct2(&mut slope);
    let of_r = dots(&slope, &first);
    scale_rows(&mut slope, r);
    square.dct3(&mut slope);
    let of_p = (0..dim).map(|i| slope[i * width + i]);
    (of_radii, of_scale, of_p.chain(of_r).collect())
}

/// Row f of `panel` times `factors[f]`.
fn scale_rows<T: Real>(panel: &mut [T], factors: &[T]) {
    let width = panel.len() / factors.len();
    for (row, &factor) in panel.chunks_exact_mut(width).zip(factors) {
        row.iter_mut().for_each(|value| *value *= factor);
    }
}

/// `mirror = −u + mirror_row + column` unless it is empty, then `u += row + column`.
fn add_rows_and_column<T: Real>(
    u: &mut [T],
    row: &[T],
    mirror: &mut [T],
    mirror_row: &[T],
    column: &[T],
) {
    let width = column.len();
    for ((u, mirror), &weight) in
        u.chunks_exact(width).zip(mirror.chunks_exact_mut(width)).zip(mirror_row)
    {
        mirror
            .iter_mut()
            .zip(u)
            .zip(column)
            .for_each(|((out, &u), &column)| *out = (weight + column) - u);
    }
    for (u, &weight) in u.chunks_exact_mut(width).zip(row) {
        u.iter_mut().zip(column).for_each(|(u, &column)| *u += weight + column);
    }
}

pub(super) fn cast<T: Real>(values: &[f64]) -> Vec<T> {
    values.iter().map(|&v| T::from_f64(v)).collect()
}
