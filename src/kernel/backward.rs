//! Vector–Jacobian products of the DCT feature maps.
//!
//! Every map of this room is a = A(x − μ) + …, with A = T·W·S, `[P, d]`, and what its parameters'
//! gradients need of the tokens is small: the moments M = Σ_j ȧ_j z_jᵀ and the sums r = Σ_j ȧ_j,
//! where ȧ_j is the gradient with respect to the log-features of token j and z_j = x_j − μ:
//!
//! ```text
//! ṫ_f = Σ_i W_fi s_i M_fi        ṡ_i = Σ_f t_f W_fi M_fi        Ẇ_fi = t_f s_i M_fi
//! μ̇   = −Aᵀr (+ Σ_f M_f with the Gaussian envelope)             ẇ_f = r_f        ġ = Σ_f r_f
//! ```
//!
//! and with Ȧ = M the chain rule through the transforms, if the projection is deep.
//!
//! So the gradients cost one matrix product per panel of tokens, whatever the projection is made
//! of. But where it is transforms with tokens along the lanes, most of M is not needed, and two
//! transforms take its place: û = C(s ⊙ z) once more, and y = Cᵀ(t ⊙ u̇).
//!
//! ```text
//! ṫ = Σ_j u̇_j ⊙ û_j     ṡ = Σ_j y_j ⊙ z_j     μ̇ = −s ⊙ Σ_j y_j (+ …)     ẋ_j = s ⊙ y_j + …
//! ```

use std::fmt::Debug;

use super::FeatureMap;
use super::dct_map::{
    DctMap, cast, deep_gradients, lane_tables, lanes, lanes_transposed, projection_matrix,
};
use super::favor::FavorMap;
use super::params::{DctParams, Envelope, Pairing, Projection, SideParams};
use crate::Real;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::simd::{DctTables, LANES, padded, supports_dct, transpose};

/// Panels whose moments are summed in the element type before they are added to the sums in f64.
const PANELS: usize = 32;

/// A feature map whose parameters have gradients.
///
/// A pass over many tokens adds each panel's contribution to [`Sums`](Self::Sums) and asks for the
/// gradients once, at the end.
///
/// # Examples
/// ```
/// use dijiang::kernel::{DctMapConfig, DifferentiableMap, PanelGradients};
///
/// // loss = Σ_f a_f(x): its gradient with respect to x is Σ_f A_f, with respect to log_mix m.
/// let map = DctMapConfig::new().build::<f64>(4)?;
/// let (width, mut grad_x) = (16, vec![0.0; 4 * 16]);
/// let (x, grad_a) = (vec![0.5; 4 * width], vec![1.0; 4 * width]);
/// let mut sums = map.new_sums();
/// let panel = PanelGradients { width, x: &x, grad: &grad_a, grad_x: Some(&mut grad_x) };
/// map.query_vjp(panel, &mut sums, &mut vec![0.0; map.vjp_scratch_len(width)]);
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

    /// Carries the gradient with respect to the log-features of a panel of queries over to the
    /// queries and parameters. `scratch` has at least [`vjp_scratch_len`](Self::vjp_scratch_len)
    /// elements, contents garbage before and after.
    ///
    /// # Cost
    /// Two matrix products of m·d·width, or one without `grad_x`; two batches of transforms for a
    /// projection by batched transforms. Does not allocate.
    fn query_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut Self::Sums, scratch: &mut [T]);

    /// The same for keys.
    fn key_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut Self::Sums, scratch: &mut [T]);

    /// The gradients with respect to the parameters of this map. Allocates.
    fn gradients(&self, sums: &Self::Sums) -> Self::Gradients;
}

/// A panel of queries or keys and the gradients with respect to it.
#[derive(Debug)]
pub struct PanelGradients<'a, T> {
    /// Its columns, a multiple of 16.
    pub width: usize,
    /// Scaled queries x or keys y, `[d, width]`.
    pub x: &'a [T],
    /// With respect to the log-features, `[m, width]`; zero in columns that stand for no token.
    pub grad: &'a [T],
    /// With respect to `x`, `[d, width]`, added to; `None` if nobody wants it.
    pub grad_x: Option<&'a mut [T]>,
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
    /// Of what only this side has of the projection: p and r of a deep one, `[G, 2, d]`, the matrix
    /// of a dense one, `[P, d]`; empty for others.
    pub projection: Vec<f64>,
}

/// The gradients with respect to [`DctParams`]. Both sides are told apart even where the map ties
/// them.
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
        let side = |side: &SideParams, of_side: &[f64]| SideGradients {
            center: vec![0.0; side.center.len()],
            scale: vec![0.0; side.scale.len()],
            radii: vec![0.0; side.radii.len()],
            projection: vec![0.0; of_side.len()],
        };
        let (query, key) = params.projection.sides();
        Self {
            query: side(&params.query, query),
            key: side(&params.key, key),
            log_weight: vec![0.0; params.log_weight.len()],
            log_mix: 0.0,
        }
    }

    /// Adds the gradients of another pass through a map of the same shape; numbers one of them
    /// lacks are left alone.
    pub fn add(&mut self, other: &Self) {
        for (to, from) in [(&mut self.query, &other.query), (&mut self.key, &other.key)] {
            add(&mut to.center, &from.center);
            add(&mut to.scale, &from.scale);
            add(&mut to.radii, &from.radii);
            add(&mut to.projection, &from.projection);
        }
        add(&mut self.log_weight, &other.log_weight);
        self.log_mix += other.log_mix;
    }
}

fn add(to: &mut [f64], from: &[f64]) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to += from);
}

/// What the gradients of a [`DctMap`] need to know of the tokens.
#[derive(Debug, Clone)]
pub struct DctSums<T> {
    query: SideSums<T>,
    key: SideSums<T>,
}

impl<T: Real> DctSums<T> {
    /// Adds the sums over other tokens, through a map of the same shape.
    pub(crate) fn add(&mut self, other: &Self) {
        self.query.add(&other.query);
        self.key.add(&other.key);
    }
}

#[derive(Debug, Clone)]
struct SideSums<T> {
    /// Of the last panels.
    last: Vec<T>,
    /// Panels in `last`.
    panels: usize,
    /// Of all panels before.
    all: Vec<f64>,
}

impl<T: Real> SideSums<T> {
    fn new(len: usize) -> Self {
        Self { last: vec![T::ZERO; len], panels: 0, all: vec![0.0; len] }
    }

    /// Counts a panel that was added to `last`.
    fn count(&mut self) {
        self.panels += 1;
        if self.panels == PANELS {
            self.all.iter_mut().zip(&self.last).for_each(|(all, last)| *all += last.to_f64());
            self.last.fill(T::ZERO);
            self.panels = 0;
        }
    }

    fn add(&mut self, other: &Self) {
        add(&mut self.all, &other.total());
    }

    /// Of all panels.
    fn total(&self) -> Vec<f64> {
        self.all.iter().zip(&self.last).map(|(all, last)| all + last.to_f64()).collect()
    }
}

/// One side's tables of the backward pass.
#[derive(Debug)]
enum Table<T> {
    Lanes(LanesTable<T>),
    Matrix(MatrixTable<T>),
}

/// QkvProj that are batched transforms with tokens along the lanes.
///
/// The sums are, LANES partial ones of each, those over the tokens of ȧ_f `[m]`, ȧ_f·û_f `[m]` with
/// û = C(s ⊙ z), y_i `[P]` with y = Cᵀ(t ⊙ u̇), y_i z_i `[P]`, and z_i Σ_f ȧ_f `[d]`.
#[derive(Debug)]
struct LanesTable<T> {
    /// û of z, chains as in the forward pass.
    forward: Vec<Vec<DctTables<T>>>,
    /// Whose transpose is y of u̇.
    reverse: Vec<Vec<DctTables<T>>>,
    /// s, `[P]`.
    scale: Vec<T>,
    /// μ, `[d]`.
    center: Vec<T>,
    /// The other side's μ, `[d]`.
    tilt: Vec<T>,
    /// 1 with a Gaussian envelope.
    envelope: T,
    /// m ones.
    ones: Vec<T>,
}

/// All other projections. The sums are M `[m, d_padded]` and r `[m]`.
#[derive(Debug)]
struct MatrixTable<T> {
    /// ∂a_f/∂x_i without the envelope, ±A + the other side's centre, `[m, d]`.
    jacobian: Vec<T>,
    features: usize,
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
        let (query, key) = params.projection.sides();
        Self {
            query: Table::new(params, &params.query, &params.key, query),
            key: Table::new(params, &params.key, &params.query, key),
        }
    }
}

/// What both kinds of sums tell of one side, besides the gradients of its radii, scales and
/// projection.
struct Common {
    /// Σ_j ȧ_fj, `[m]`.
    rows: Vec<f64>,
    /// Σ_fj ȧ_fj z_ij, `[d]`.
    inputs: Vec<f64>,
}

impl<T: Real> Table<T> {
    fn new(params: &DctParams, own: &SideParams, other: &SideParams, of_side: &[f64]) -> Self {
        match params.projection {
            Projection::Dct | Projection::Mixed { .. } if supports_dct(params.dim()) => {
                Self::Lanes(LanesTable::new(params, own, other))
            }
            _ => Self::Matrix(MatrixTable::new(params, own, other, of_side)),
        }
    }

    fn new_sums(&self) -> SideSums<T> {
        SideSums::new(match self {
            Self::Lanes(table) => {
                (2 * table.ones.len() + 2 * table.scale.len() + table.center.len()) * LANES
            }
            Self::Matrix(table) => table.features * (padded(table.dim()) + 1),
        })
    }

    fn vjp(&self, panel: PanelGradients<'_, T>, sums: &mut SideSums<T>, scratch: &mut [T]) {
        if panel.width == 0 {
            return;
        }
        match self {
            Self::Lanes(table) => table.vjp(panel, &mut sums.last, scratch),
            Self::Matrix(table) => table.vjp(panel, &mut sums.last, scratch),
        }
        sums.count();
    }

    /// The gradients of one side's own parameters but for its part in the other side's; `unit` as
    /// [`matrix_gradients`] wants it.
    fn gradients(
        &self,
        params: &DctParams,
        own: &SideParams,
        unit: &[f64],
        sums: &SideSums<T>,
        out: &mut SideGradients,
    ) -> Common {
        let common = match self {
            Self::Lanes(table) => table.gradients(own, &sums.total(), out),
            Self::Matrix(_) => matrix_gradients(params, own, unit, &sums.total(), out),
        };
        if params.envelope == Envelope::Gaussian {
            add(&mut out.center, &common.inputs);
        }
        common
    }
}

impl<T: Real> LanesTable<T> {
    fn new(params: &DctParams, own: &SideParams, other: &SideParams) -> Self {
        let ones = |values: &[f64]| vec![1.0; values.len()];
        let unscaled = SideParams {
            center: vec![0.0; own.center.len()],
            scale: ones(&own.scale),
            radii: own.radii.clone(),
        };
        Self {
            forward: lane_tables(params, &SideParams { radii: ones(&own.radii), ..own.clone() }),
            reverse: lane_tables(params, &unscaled),
            scale: cast(&own.scale),
            center: cast(&own.center),
            tilt: cast(&other.center),
            envelope: if params.envelope == Envelope::Gaussian { T::ONE } else { T::ZERO },
            ones: vec![T::ONE; params.features()],
        }
    }

    fn vjp(&self, panel: PanelGradients<'_, T>, sums: &mut [T], scratch: &mut [T]) {
        let PanelGradients { width, x, grad, grad_x } = panel;
        let (ops, m, dim, rows) = (T::ops(), self.ones.len(), self.center.len(), self.scale.len());
        let size = dim * width;
        let (panel, scratch) = scratch.split_at_mut(size);
        let (link, scratch) = scratch.split_at_mut(size);
        let (zeros, scratch) = scratch.split_at_mut(width.max(dim));
        let total = &mut scratch[..width];
        zeros.fill(T::ZERO);
        column_sums_of(&self.ones, grad, total);

        let (row_sums, sums) = sums.split_at_mut(m * LANES);
        let (radii_sums, sums) = sums.split_at_mut(m * LANES);
        let (y_sums, sums) = sums.split_at_mut(rows * LANES);
        let (scale_sums, input_sums) = sums.split_at_mut(rows * LANES);
        let (plus, minus) = grad.split_at(rows * width);
        let grad_x = grad_x.unwrap_or_default();
        for (g, (forward, reverse)) in self.forward.iter().zip(&self.reverse).enumerate() {
            // û, and what it is multiplied with; feature P + f is that of −u_f.
            lanes(forward, x, &zeros[..width], &zeros[..dim], panel, &[], &mut [], zeros, link);
            let of_features = |first: usize| (first * LANES)..((first + dim) * LANES);
            let minus = minus.get(g * size..(g + 1) * size).unwrap_or_default();
            for (first, grad) in
                [(g * dim, &plus[g * size..(g + 1) * size]), (rows + g * dim, minus)]
            {
                if !grad.is_empty() {
                    let (sums, products) =
                        (&mut row_sums[of_features(first)], &mut radii_sums[of_features(first)]);
                    (ops.lane_sums)(grad, panel, &zeros[..dim], sums, products);
                }
            }
            let grad = &plus[g * size..(g + 1) * size];
            lanes_transposed(reverse, width, grad, minus, panel, link);
            let of_block = of_features(g * dim);
            (ops.lane_sums)(
                panel,
                x,
                &self.center,
                &mut y_sums[of_block.clone()],
                &mut scale_sums[of_block],
            );
            // What the features have in common comes with the first block.
            let total = if g == 0 { &*total } else { &zeros[..width] };
            let scale = &self.scale[g * dim..(g + 1) * dim];
            (ops.input_vjp)(
                x,
                &self.center,
                panel,
                scale,
                total,
                &self.tilt,
                self.envelope,
                grad_x,
                input_sums,
            );
        }
    }

    fn gradients(&self, own: &SideParams, sums: &[f64], out: &mut SideGradients) -> Common {
        let (m, rows, dim) = (self.ones.len(), own.radii.len(), own.center.len());
        let sums: Vec<f64> = sums.chunks_exact(LANES).map(|lanes| lanes.iter().sum()).collect();
        let (row_sums, sums) = sums.split_at(m);
        let (radii, sums) = sums.split_at(m);
        let (y, sums) = sums.split_at(rows);
        let (scale, inputs) = sums.split_at(rows);
        add(&mut out.radii, &radii[..rows]);
        out.radii.iter_mut().zip(&radii[rows..]).for_each(|(to, minus)| *to -= minus);
        add(&mut out.scale, scale);
        for (y, scale) in y.chunks_exact(dim).zip(own.scale.chunks_exact(dim)) {
            out.center.iter_mut().zip(y.iter().zip(scale)).for_each(|(to, (y, s))| *to -= s * y);
        }
        Common { rows: row_sums.to_vec(), inputs: inputs.to_vec() }
    }
}

impl<T: Real> MatrixTable<T> {
    fn new(params: &DctParams, own: &SideParams, other: &SideParams, of_side: &[f64]) -> Self {
        let matrix = projection_matrix(params, own, of_side);
        let plus = matrix.chunks_exact(params.dim()).map(|row| (1.0, row));
        let minus = plus.clone().map(|(_, row)| (-1.0, row));
        let antithetic = params.pairing == Pairing::Antithetic;
        let rows = plus.chain(minus.filter(|_| antithetic));
        let jacobian = rows.flat_map(|(sign, row)| {
            row.iter().zip(&other.center).map(move |(a, mu)| T::from_f64(sign * a + mu))
        });
        Self {
            jacobian: jacobian.collect(),
            features: params.features(),
            center: own.center.iter().any(|&mu| mu != 0.0).then(|| cast(&own.center)),
            ones: (params.envelope == Envelope::Gaussian).then(|| vec![T::ONE; params.features()]),
        }
    }

    fn dim(&self) -> usize {
        self.jacobian.len() / self.features
    }

    fn vjp(&self, panel: PanelGradients<'_, T>, sums: &mut [T], scratch: &mut [T]) {
        let PanelGradients { width, x, grad, grad_x } = panel;
        let ops = T::ops();
        let (m, dim, stride) = (self.features, self.dim(), padded(self.dim()));
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
        let (moments, row_sums) = sums.split_at_mut(m * stride);
        (ops.add_row_sums)(grad, row_sums);
        ops.matmul(
            MatMut::packed(moments, m, stride),
            Accum::Add,
            MatRef::packed(grad, m, width),
            MatRef::packed(rows, width, stride),
        );
        let Some(grad_x) = grad_x else { return };
        ops.matmul(
            MatMut::packed(grad_x, dim, width),
            Accum::Add,
            MatRef::packed(&self.jacobian, m, dim).t(),
            MatRef::packed(grad, m, width),
        );
        if let Some(ones) = &self.ones {
            let total = &mut total[..width];
            column_sums_of(ones, grad, total);
            for (to, z) in grad_x.chunks_exact_mut(width).zip(centered.chunks_exact(width)) {
                to.iter_mut()
                    .zip(z)
                    .zip(total.iter())
                    .for_each(|((to, &z), &total)| *to -= z * total);
            }
        }
    }
}

/// The sums of a panel's columns, which has as many rows as there are ones.
fn column_sums_of<T: Real>(ones: &[T], panel: &[T], sums: &mut [T]) {
    let (m, width) = (ones.len(), sums.len());
    T::ops().matmul(
        MatMut::packed(sums, 1, width),
        Accum::Replace,
        MatRef::packed(ones, 1, m),
        MatRef::packed(panel, m, width),
    );
}

/// The input scales that row `f` of the projection sees, `[d]`.
fn scales(side: &SideParams, f: usize) -> &[f64] {
    let dim = side.center.len();
    // One block of scales serves all rows of a dense projection.
    let block = if side.scale.len() == side.radii.len() { f / dim } else { 0 };
    &side.scale[block * dim..][..dim]
}

/// W of both sides, `[P, d]`: transforms with radii and scales of one.
fn unit_projection(params: &DctParams) -> Vec<f64> {
    let ones = vec![1.0; params.rows()];
    projection_matrix(
        params,
        &SideParams { center: Vec::new(), scale: ones.clone(), radii: ones },
        &[],
    )
}

/// [`Table::gradients`] from moments M and sums r; `unit` is W, or p and r of a deep projection.
fn matrix_gradients(
    params: &DctParams,
    own: &SideParams,
    unit: &[f64],
    sums: &[f64],
    out: &mut SideGradients,
) -> Common {
    let (dim, paired) = (params.dim(), params.rows());
    let (moments, rows) = sums.split_at(params.features() * padded(dim));
    let moments: Vec<f64> =
        moments.chunks_exact(padded(dim)).flat_map(|row| row[..dim].iter().copied()).collect();
    let common = Common { rows: rows.to_vec(), inputs: column_sums(dim, &moments) };
    // Feature P + f is that of −u_f.
    let mut folded = (moments[..paired * dim].to_vec(), rows[..paired].to_vec());
    folded.0.iter_mut().zip(&moments[paired * dim..]).for_each(|(plus, minus)| *plus -= minus);
    folded.1.iter_mut().zip(&rows[paired..]).for_each(|(plus, minus)| *plus -= minus);
    let (moments, rows) = folded;
    if let Projection::Deep { .. } = params.projection {
        deep_side(params, own, unit, &moments, &rows, out);
        return common;
    }
    let one_block = own.scale.len() != own.radii.len();
    for (f, (unit, moments)) in unit.chunks_exact(dim).zip(moments.chunks_exact(dim)).enumerate() {
        let (t, s) = (own.radii[f], scales(own, f));
        for i in 0..dim {
            out.radii[f] += unit[i] * s[i] * moments[i];
            out.scale[if one_block { i } else { f / dim * dim + i }] += t * unit[i] * moments[i];
            out.center[i] -= t * unit[i] * s[i] * rows[f];
            if let Some(to) = out.projection.get_mut(f * dim + i) {
                *to += t * s[i] * moments[i];
            }
        }
    }
    common
}

/// [`matrix_gradients`] of a deep projection.
fn deep_side(
    params: &DctParams,
    own: &SideParams,
    of_side: &[f64],
    moments: &[f64],
    rows: &[f64],
    out: &mut SideGradients,
) {
    let dim = params.dim();
    for (row, &sum) in projection_matrix(params, own, of_side).chunks_exact(dim).zip(rows) {
        out.center.iter_mut().zip(row).for_each(|(to, a)| *to -= a * sum);
    }
    for (g, moments) in moments.chunks_exact(dim * dim).enumerate() {
        let (block, outer) = (g * dim..(g + 1) * dim, 2 * g * dim..2 * (g + 1) * dim);
        let (radii, scale, of_outer) = deep_gradients(
            &own.radii[block.clone()],
            &own.scale[block.clone()],
            &of_side[outer.clone()],
            moments,
        );
        add(&mut out.radii[block.clone()], &radii);
        add(&mut out.scale[block], &scale);
        add(&mut out.projection[outer], &of_outer);
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
        DctSums { query: self.tables().query.new_sums(), key: self.tables().key.new_sums() }
    }

    fn vjp_scratch_len(&self, width: usize) -> usize {
        (2 * padded(self.dim()) + 1) * width + width.max(self.dim())
    }

    fn query_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.tables().query.vjp(panel, &mut sums.query, scratch);
    }

    fn key_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.tables().key.vjp(panel, &mut sums.key, scratch);
    }

    fn gradients(&self, sums: &DctSums<T>) -> DctGradients {
        let (params, tables) = (self.params(), self.tables());
        let mut out = DctGradients::zeros(params);
        let (of_query, of_key) = params.projection.sides();
        let shared = matches!(tables.query, Table::Matrix(_)) && of_query.is_empty();
        let unit = if shared { unit_projection(params) } else { Vec::new() };
        let (query_unit, key_unit) =
            if shared { (&unit[..], &unit[..]) } else { (of_query, of_key) };
        let query =
            tables.query.gradients(params, &params.query, query_unit, &sums.query, &mut out.query);
        let key = tables.key.gradients(params, &params.key, key_unit, &sums.key, &mut out.key);
        // x·μk − μq·μk on the query side gives μk the sum of x − μq, and μq what is left of it;
        // μq·y the sum of y.
        let (query_total, key_total) =
            (query.rows.iter().sum::<f64>(), key.rows.iter().sum::<f64>());
        add(&mut out.key.center, &query.inputs);
        add(&mut out.query.center, &key.inputs);
        for (to, mu) in out.query.center.iter_mut().zip(&params.key.center) {
            *to += mu * (key_total - query_total);
        }
        out.log_weight = key.rows;
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

    fn query_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.as_dct().query_vjp(panel, sums, scratch);
    }

    fn key_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut DctSums<T>, scratch: &mut [T]) {
        self.as_dct().key_vjp(panel, sums, scratch);
    }

    fn gradients(&self, sums: &DctSums<T>) -> DctGradients {
        self.as_dct().gradients(sums)
    }
}
