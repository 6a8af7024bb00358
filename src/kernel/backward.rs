//! Vector–Jacobian products of the DCT feature maps.
//!
//! Every map of this room is a = A(x − μ) + …, with A = T·W·S, `[P, d]`, and what its parameters' gradients need of the
//! tokens is small: the moments M = Σ_j ȧ_j z_jᵀ and the sums r = Σ_j ȧ_j, where ȧ_j is the gradient with respect to
//! the log-features of token j and z_j = x_j − μ:
//!
//! ```text
//! ṫ_f = Σ_i W_fi s_i M_fi        ṡ_i = Σ_f t_f W_fi M_fi        Ẇ_fi = t_f s_i M_fi
//! μ̇   = −Aᵀr (+ Σ_f M_f with the Gaussian envelope)             ẇ_f = r_f        ġ = Σ_f r_f
//! ```
//!
//! So the gradients cost one matrix product per panel of tokens, whatever the projection is made of.

use std::fmt::Debug;

use super::FeatureMap;
use super::dct_map::{DctMap, projection_matrix};
use super::favor::FavorMap;
use super::params::{DctParams, Envelope, Pairing, Projection, SideParams};
use crate::real::Real;
use crate::simd::{Ops, Product, padded, transpose};

/// Panels whose moments are summed in the element type before they are added to the sums in f64.
const PANELS: usize = 32;

/// A feature map whose parameters have gradients.
///
/// A pass over many tokens adds each panel's contribution to [`Sums`](Self::Sums) and asks for the gradients once, at
/// the end.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, DifferentiableMap};
///
/// // loss = Σ_f a_f(x): its gradient with respect to x is Σ_f A_f, with respect to log_mix it is m.
/// let map = DctMapConfig::new(4).build::<f64>()?;
/// let (width, mut grad_x) = (16, vec![0.0; 4 * 16]);
/// let (x, grad_a) = (vec![0.5; 4 * width], vec![1.0; 4 * width]);
/// let mut sums = map.new_sums();
/// map.query_vjp(width, &x, &grad_a, Some(&mut grad_x), &mut sums, &mut vec![0.0; map.vjp_scratch_len(width)]);
/// assert_eq!(map.gradients(&sums).log_mix, 4.0 * 16.0);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub trait DifferentiableMap<T: Real>: FeatureMap<T> {
    /// The gradients of a scalar with respect to the map's parameters.
    type Gradients: Debug + Clone + Send;

    /// What the gradients need to know of the tokens, summed over them.
    type Sums: Debug + Clone + Send;

    /// Sums over no tokens.
    fn new_sums(&self) -> Self::Sums;

    /// Scratch elements that the methods below need for panels `width` columns wide.
    fn vjp_scratch_len(&self, width: usize) -> usize;

    /// Carries the gradient with respect to the log-features of a panel of queries over to the queries and parameters.
    ///
    /// # Shapes
    /// - `x`: `[d, width]`, the scaled queries; `grad_a`: `[m, width]`, zero in columns that stand for no token; `width`
    ///   is a multiple of 16.
    /// - `grad_x`: `[d, width]`, added to; `None` if nobody wants it.
    /// - `scratch`: at least [`vjp_scratch_len`](Self::vjp_scratch_len) elements, contents garbage before and after.
    ///
    /// # Cost
    /// Two matrix products of m·d·width; one without `grad_x`. Does not allocate.
    fn query_vjp(&self, width: usize, x: &[T], grad_a: &[T], grad_x: Option<&mut [T]>, sums: &mut Self::Sums, scratch: &mut [T]);

    /// The same for keys.
    fn key_vjp(&self, width: usize, y: &[T], grad_b: &[T], grad_y: Option<&mut [T]>, sums: &mut Self::Sums, scratch: &mut [T]);

    /// The gradients with respect to the parameters of this map. Allocates.
    fn gradients(&self, sums: &Self::Sums) -> Self::Gradients;
}

/// The gradients with respect to the parameters of one side.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct SideGradients {
    /// Of the centre μ, `[d]`, including its part in the other side's log-features.
    pub center: Vec<f64>,
    /// Of the input scales s, as long as they.
    pub scale: Vec<f64>,
    /// Of the radii t, as long as they.
    pub radii: Vec<f64>,
    /// Of the rows of a dense projection, `[P, d]`; empty for other projections.
    pub rows: Vec<f64>,
}

/// The gradients with respect to [`DctParams`]. Both sides are told apart even where the map ties them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DctGradients {
    /// Of the query side.
    pub query: SideGradients,
    /// Of the key side.
    pub key: SideGradients,
    /// Of the log-weights w, `[m]`.
    pub log_weight: Vec<f64>,
    /// Of the mix g.
    pub log_mix: f64,
}

impl DctGradients {
    /// All zeros, for parameters of this shape.
    pub fn zeros(params: &DctParams) -> Self {
        let side = |side: &SideParams| SideGradients {
            center: vec![0.0; side.center.len()],
            scale: vec![0.0; side.scale.len()],
            radii: vec![0.0; side.radii.len()],
            rows: vec![0.0; if dense(params).is_some() { side.radii.len() * side.center.len() } else { 0 }],
        };
        Self { query: side(&params.query), key: side(&params.key), log_weight: vec![0.0; params.log_weight.len()], log_mix: 0.0 }
    }

    /// Adds the gradients of another pass through a map of the same shape; numbers one of them lacks are left alone.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in [(&mut self.query, &other.query), (&mut self.key, &other.key)] {
            add(&mut to.center, &from.center);
            add(&mut to.scale, &from.scale);
            add(&mut to.radii, &from.radii);
            add(&mut to.rows, &from.rows);
        }
        add(&mut self.log_weight, &other.log_weight);
        self.log_mix += other.log_mix;
    }
}

fn add(to: &mut [f64], from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// The matrices of a dense projection, queries and keys.
fn dense(params: &DctParams) -> Option<(&[f64], &[f64])> {
    match &params.projection {
        Projection::Dense { query, key } => Some((query, key)),
        Projection::Dct | Projection::Mixed { .. } => None,
    }
}

/// What the gradients of a [`DctMap`] need to know of the tokens.
#[derive(Debug, Clone)]
pub struct DctSums<T> {
    query: SideSums<T>,
    key: SideSums<T>,
}

#[derive(Debug, Clone)]
struct SideSums<T> {
    /// Σ_j ȧ_fj z_ij of the last panels, `[m, d_padded]`.
    moments: Vec<T>,
    /// Σ_j ȧ_fj of the last panels, `[m]`.
    rows: Vec<T>,
    /// Panels in the two above.
    panels: usize,
    /// Those of all panels before.
    all_moments: Vec<f64>,
    all_rows: Vec<f64>,
}

impl<T: Real> SideSums<T> {
    fn new(dim: usize, features: usize) -> Self {
        let moments = features * padded(dim);
        Self {
            moments: vec![T::ZERO; moments],
            rows: vec![T::ZERO; features],
            panels: 0,
            all_moments: vec![0.0; moments],
            all_rows: vec![0.0; features],
        }
    }

    /// Adds a panel; `z` are its tokens as rows `[width, d_padded]`.
    fn push(&mut self, ops: &Ops<T>, width: usize, grad: &[T], z: &[T]) {
        let (m, stride) = (self.rows.len(), self.moments.len() / self.rows.len());
        (ops.add_row_sums)(grad, &mut self.rows);
        let product = Product { m, n: stride, k: width, a_row: width, a_col: 1, b_row: stride, c_row: stride, accumulate: true };
        ops.matmul(product, grad, z, &mut self.moments);
        self.panels += 1;
        if self.panels == PANELS {
            for (all, last) in [(&mut self.all_moments, &mut self.moments), (&mut self.all_rows, &mut self.rows)] {
                all.iter_mut().zip(last.iter()).for_each(|(all, last)| *all += last.to_f64());
                last.fill(T::ZERO);
            }
            self.panels = 0;
        }
    }

    /// (M `[m, d]`, r `[m]`) of all panels.
    fn total(&self, dim: usize) -> (Vec<f64>, Vec<f64>) {
        let sum = |all: &[f64], last: &[T]| all.iter().zip(last).map(|(all, last)| all + last.to_f64()).collect::<Vec<f64>>();
        let moments = sum(&self.all_moments, &self.moments);
        let moments = moments.chunks_exact(padded(dim)).flat_map(|row| row[..dim].iter().copied()).collect();
        (moments, sum(&self.all_rows, &self.rows))
    }
}

/// One side's tables of the backward pass.
#[derive(Debug)]
struct Table<T> {
    /// ∂a_f/∂x_i without the envelope, ±A + the other side's centre, `[m, d]`.
    jacobian: Vec<T>,
    /// μ, `[d]`, if it is not zero.
    center: Option<Vec<T>>,
    /// m ones, if there is a Gaussian envelope.
    ones: Option<Vec<T>>,
}

/// What a [`DctMap`] keeps for its backward pass; made when it is first needed.
#[derive(Debug)]
pub(super) struct Tables<T> {
    query: Table<T>,
    key: Table<T>,
}

impl<T: Real> Tables<T> {
    pub(super) fn new(params: &DctParams) -> Self {
        let (query, key) = unit_projections(params);
        Self { query: Table::new(params, &params.query, &params.key, &query), key: Table::new(params, &params.key, &params.query, &key) }
    }
}

impl<T: Real> Table<T> {
    fn new(params: &DctParams, own: &SideParams, other: &SideParams, unit: &[f64]) -> Self {
        let dim = params.dim();
        let plus = unit.chunks_exact(dim).enumerate().map(|(f, row)| (own.radii[f], scales(own, f), row));
        let minus = plus.clone().map(|(t, s, row)| (-t, s, row));
        let antithetic = params.pairing == Pairing::Antithetic;
        let rows = plus.chain(minus.filter(|_| antithetic));
        let jacobian =
            rows.flat_map(|(t, s, row)| row.iter().zip(s).zip(&other.center).map(move |((w, s), mu)| T::from_f64(t * w * s + mu)));
        let cast = |values: &[f64]| values.iter().map(|&x| T::from_f64(x)).collect();
        Self {
            jacobian: jacobian.collect(),
            center: own.center.iter().any(|&mu| mu != 0.0).then(|| cast(&own.center)),
            ones: (params.envelope == Envelope::Gaussian).then(|| vec![T::ONE; params.features()]),
        }
    }

    fn vjp(&self, width: usize, x: &[T], grad: &[T], grad_x: Option<&mut [T]>, sums: &mut SideSums<T>, scratch: &mut [T]) {
        if width == 0 {
            return;
        }
        let ops = T::ops();
        let dim = x.len() / width;
        let stride = padded(dim);
        let (rows, scratch) = scratch.split_at_mut(stride * width);
        let (centered, total) = scratch.split_at_mut(stride * width);
        // z, with rows of zeros up to whole lane groups of coordinates, then its transpose.
        let centered = &mut centered[..stride * width];
        centered[..x.len()].copy_from_slice(x);
        centered[x.len()..].fill(T::ZERO);
        if let Some(center) = &self.center {
            for (row, &mu) in centered.chunks_exact_mut(width).zip(center) {
                row.iter_mut().for_each(|z| *z -= mu);
            }
        }
        transpose(ops, width, centered, T::ONE, rows);
        sums.push(ops, width, grad, rows);
        let Some(grad_x) = grad_x else { return };
        let m = grad.len() / width;
        let product = Product { m: dim, n: width, k: m, a_row: 1, a_col: dim, b_row: width, c_row: width, accumulate: true };
        ops.matmul(product, &self.jacobian, grad, grad_x);
        if let Some(ones) = &self.ones {
            let total = &mut total[..width];
            let product = Product { m: 1, n: width, k: m, a_row: m, a_col: 1, b_row: width, c_row: width, accumulate: false };
            ops.matmul(product, ones, grad, total);
            for (to, z) in grad_x.chunks_exact_mut(width).zip(centered.chunks_exact(width)) {
                to.iter_mut().zip(z).zip(total.iter()).for_each(|((to, &z), &total)| *to -= z * total);
            }
        }
    }
}

/// The input scales that row `f` of the projection sees, `[d]`.
fn scales(side: &SideParams, f: usize) -> &[f64] {
    let dim = side.center.len();
    // One block of scales serves all rows of a dense projection.
    let block = if side.scale.len() == side.radii.len() { f / dim } else { 0 };
    &side.scale[block * dim..][..dim]
}

/// W of both sides, `[P, d]`: the projection with radii and scales of one.
fn unit_projections(params: &DctParams) -> (Vec<f64>, Vec<f64>) {
    if let Some((query, key)) = dense(params) {
        return (query.to_vec(), key.to_vec());
    }
    let ones = vec![1.0; params.rows()];
    let unit = projection_matrix(params, &SideParams { center: Vec::new(), scale: ones.clone(), radii: ones }, &[]);
    (unit.clone(), unit)
}

/// Turns one side's sums into gradients: of its own parameters, and of the other side's centre.
fn side_gradients(params: &DctParams, own: &SideParams, unit: &[f64], moments: &[f64], rows: &[f64], out: &mut SideGradients) {
    let dim = params.dim();
    let paired = params.rows();
    let antithetic = params.pairing == Pairing::Antithetic;
    let one_block = own.scale.len() != own.radii.len();
    for (f, unit) in unit.chunks_exact(dim).enumerate() {
        let (t, s) = (own.radii[f], scales(own, f));
        let minus = |f: usize| f + paired;
        let row = rows[f] - if antithetic { rows[minus(f)] } else { 0.0 };
        for i in 0..dim {
            let moment = moments[f * dim + i] - if antithetic { moments[minus(f) * dim + i] } else { 0.0 };
            out.radii[f] += unit[i] * s[i] * moment;
            out.scale[if one_block { i } else { f / dim * dim + i }] += t * unit[i] * moment;
            out.center[i] -= t * unit[i] * s[i] * row;
            if let Some(to) = out.rows.get_mut(f * dim + i) {
                *to += t * s[i] * moment;
            }
        }
    }
    if params.envelope == Envelope::Gaussian {
        add(&mut out.center, &column_sums(dim, moments));
    }
}

/// Σ_f M_fi
fn column_sums(dim: usize, moments: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; dim];
    moments.chunks_exact(dim).for_each(|row| add(&mut sums, row));
    sums
}

impl<T: Real> DifferentiableMap<T> for DctMap<T> {
    type Gradients = DctGradients;
    type Sums = DctSums<T>;

    fn new_sums(&self) -> DctSums<T> {
        let side = || SideSums::new(self.dim(), self.features());
        DctSums { query: side(), key: side() }
    }

    fn vjp_scratch_len(&self, width: usize) -> usize {
        (2 * padded(self.dim()) + 1) * width
    }

    fn query_vjp(&self, width: usize, x: &[T], grad_a: &[T], grad_x: Option<&mut [T]>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.tables().query.vjp(width, x, grad_a, grad_x, &mut sums.query, scratch);
    }

    fn key_vjp(&self, width: usize, y: &[T], grad_b: &[T], grad_y: Option<&mut [T]>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.tables().key.vjp(width, y, grad_b, grad_y, &mut sums.key, scratch);
    }

    fn gradients(&self, sums: &DctSums<T>) -> DctGradients {
        let params = self.params();
        let dim = params.dim();
        let mut out = DctGradients::zeros(params);
        let (query_unit, key_unit) = unit_projections(params);
        let (query, query_rows) = sums.query.total(dim);
        let (key, key_rows) = sums.key.total(dim);
        side_gradients(params, &params.query, &query_unit, &query, &query_rows, &mut out.query);
        side_gradients(params, &params.key, &key_unit, &key, &key_rows, &mut out.key);
        // x·μk − μq·μk on the query side gives μk the sum of x − μq, and μq what is left of it; μq·y the sum of y.
        let (query_total, key_total) = (query_rows.iter().sum::<f64>(), key_rows.iter().sum::<f64>());
        add(&mut out.key.center, &column_sums(dim, &query));
        add(&mut out.query.center, &column_sums(dim, &key));
        for (to, mu) in out.query.center.iter_mut().zip(&params.key.center) {
            *to += mu * (key_total - query_total);
        }
        out.log_weight = key_rows;
        out.log_mix = query_total;
        out
    }
}

impl<T: Real> DifferentiableMap<T> for FavorMap<T> {
    type Gradients = DctGradients;
    type Sums = DctSums<T>;

    fn new_sums(&self) -> DctSums<T> {
        self.as_dct().new_sums()
    }

    fn vjp_scratch_len(&self, width: usize) -> usize {
        self.as_dct().vjp_scratch_len(width)
    }

    fn query_vjp(&self, width: usize, x: &[T], grad_a: &[T], grad_x: Option<&mut [T]>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.as_dct().query_vjp(width, x, grad_a, grad_x, sums, scratch);
    }

    fn key_vjp(&self, width: usize, y: &[T], grad_b: &[T], grad_y: Option<&mut [T]>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.as_dct().key_vjp(width, y, grad_b, grad_y, sums, scratch);
    }

    fn gradients(&self, sums: &DctSums<T>) -> DctGradients {
        self.as_dct().gradients(sums)
    }
}
