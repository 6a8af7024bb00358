//! Slow literal oracles: the specification one can run.
//!
//! Every function is its formula in plain loops over `f64`, one head at a time, in O(n²) time and
//! memory. Nothing here is shared with the fast paths it judges, so that an error would have to be
//! made twice, independently, to go unseen.
//!
//! ```text
//! x, y         = √σ·q, √σ·k                                the caller scales
//! a, b         log-features of x and y                     PlainMap
//! scores       S_ij = x_i·y_j                              scores
//! log_kernel   L_ij = ln Σ_f exp(a_if + b_jf)              log_kernel
//! key_scores   max_f b_jf                                  key_scores
//! A_ij         = exp(S_ij)                 if window(i,j), sink(j) or kept(i,j)
//!              = γ^(i−j)·exp(L_ij)         otherwise
//! o_i          = Σ_j A_ij v_j / Σ_j A_ij                   linear_attention, softmax_attention
//! ```
//!
//! # Examples
//! ```
//! use dijiang::reference::{Pairs, PlainMap, linear_attention, log_kernel, scores};
//! use ndarray::array;
//!
//! let (x, y) = (array![[0.3, -0.1], [0.2, 0.4]], array![[0.5, 0.1], [-0.6, 0.2]]);
//! let v = array![[1.0], [3.0]];
//! let map = PlainMap::new(2);
//! let kernel = log_kernel(&map.query_log_features(&x)?, &map.key_log_features(&y)?)?;
//! let out = linear_attention(&scores(&x, &y)?, &kernel, &v, &Pairs::causal())?;
//! assert_eq!(out[[0, 0]], 1.0); // the first token sees only itself
//! let weights = kernel.mapv(f64::exp);
//! let sum = weights[[1, 0]] + weights[[1, 1]];
//! let expected = (weights[[1, 0]] * 1.0 + weights[[1, 1]] * 3.0) / sum;
//! assert!((out[[1, 0]] - expected).abs() < 1e-15);
//! # Ok::<(), dijiang::Error>(())
//! ```

use std::f64::consts::PI;

use ndarray::{Array2, ArrayRef2, ArrayView1};

use crate::check::{check_len, check_positive, check_room, check_shape};
use crate::error::Result;

/// The orthonormal DCT-II as a matrix; `C·x` is the transform of x, `Cᵀ·x` (DCT-III) its inverse.
///
/// ```text
/// C[f,i] = s_f cos(π(2i+1)f / 2d),   s_0 = √(1/d), otherwise √(2/d)
/// ```
///
/// # Shapes
/// - returns `[d, d]`: row = frequency f, column = coordinate i.
///
/// # Cost
/// O(d²).
///
/// # Panics
/// If there is no room for d² numbers.
///
/// # Examples
/// ```
/// let c = dijiang::reference::dct_matrix(5);
/// let identity = c.dot(&c.t());
/// assert!((identity[[2, 2]] - 1.0).abs() < 1e-15 && identity[[2, 3]].abs() < 1e-15);
/// ```
#[must_use]
pub fn dct_matrix(d: usize) -> Array2<f64> {
    Array2::from_shape_fn((d, d), |(f, i)| {
        let norm = if f == 0 { (1.0 / d as f64).sqrt() } else { (2.0 / d as f64).sqrt() };
        // The cosine has period 4d in (2i+1)f: reduced in integers, the angle is exact to the last
        // bit.
        norm * (PI * ((2 * i + 1) * f % (4 * d)) as f64 / (2 * d) as f64).cos()
    })
}

/// Whether each row of the projection yields one feature or two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pairing {
    /// m = G·d features: +u.
    #[default]
    Single,
    /// m = 2·G·d features: +u, then −u.
    Antithetic,
}

/// The term p(z) that every feature of a token shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Envelope {
    /// p(z) = 0: the paper's weighted DCT features.
    #[default]
    None,
    /// p(z) = −|z|²/2: positive random features.
    Gaussian,
}

/// Parameters of one side, query or key, of a [`PlainMap`].
#[derive(Debug, Clone, PartialEq)]
pub struct PlainSide {
    /// Centre μ, `[d]`.
    pub center: Vec<f64>,
    /// Input scales s, `[G, d]`: one row per block.
    pub scale: Array2<f64>,
    /// Radii t, `[G·d]`.
    pub radii: Vec<f64>,
}

/// The weighted DCT feature map in O(m·d) per token.
///
/// ```text
/// u_f(z)  = t_f · [C (s_g ⊙ z)]_i,  f = g·d + i             [arXiv 2403.19928, the map φ_WDCF]
/// query:    a_f(x) = u_f(x − μq) + p(x − μq) + x·μk − μq·μk + g
/// key:      b_f(y) = u_f(y − μk) + p(y − μk) + w_f + μq·y
/// K(x,y)  = Σ_f exp(a_f(x) + b_f(y))
/// ```
///
/// # Examples
/// ```
/// use dijiang::reference::{PlainMap, dct_matrix};
/// use ndarray::array;
///
/// let map = PlainMap::new(3);
/// let x = array![[1.0, -2.0, 0.5]];
/// let a = map.query_log_features(&x)?; // one block, t = s = 1, no centre: just the transform
/// let expected = x.dot(&dct_matrix(3).t());
/// assert!(a.iter().zip(&expected).all(|(a, e)| (a - e).abs() < 1e-15));
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct PlainMap {
    /// Query side: μq, s, t.
    pub query: PlainSide,
    /// Key side: μk, s, t.
    pub key: PlainSide,
    /// Log-weights w, `[m]`.
    pub log_weight: Vec<f64>,
    /// log of the mix e^g.
    pub log_mix: f64,
    /// One feature per row, or two.
    pub pairing: Pairing,
    /// p(z).
    pub envelope: Envelope,
}

impl PlainMap {
    /// One block of dimension `d`: t = s = 1, centres 0, w = −ln d, g = 0, no pairing, no envelope.
    ///
    /// # Panics
    /// If there is no room for d numbers.
    #[must_use]
    pub fn new(d: usize) -> Self {
        let side =
            PlainSide { center: vec![0.0; d], scale: Array2::ones((1, d)), radii: vec![1.0; d] };
        Self {
            query: side.clone(),
            key: side,
            log_weight: vec![-(d as f64).ln(); d],
            log_mix: 0.0,
            pairing: Pairing::Single,
            envelope: Envelope::None,
        }
    }

    /// Number of features m.
    #[must_use]
    pub fn features(&self) -> usize {
        self.query.radii.len() * if self.pairing == Pairing::Antithetic { 2 } else { 1 }
    }

    /// a_f(x), g included.
    ///
    /// # Shapes
    /// - `x`: `[n, d]`, returns `[n, m]`.
    ///
    /// # Cost
    /// O(n·m·d).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Length`](crate::Error::Length) where `x`
    /// or a parameter does not fit.
    pub fn query_log_features(&self, x: &ArrayRef2<f64>) -> Result<Array2<f64>> {
        self.check("x", x)?;
        Ok(self.log_features(&self.query, x, |x, _| {
            dot(x, &self.key.center) - dot(&self.query.center, &self.key.center) + self.log_mix
        }))
    }

    /// b_f(y), w included.
    ///
    /// # Shapes
    /// - `y`: `[n, d]`, returns `[n, m]`.
    ///
    /// # Cost
    /// O(n·m·d).
    ///
    /// # Errors
    /// As [`query_log_features`](Self::query_log_features).
    pub fn key_log_features(&self, y: &ArrayRef2<f64>) -> Result<Array2<f64>> {
        self.check("y", y)?;
        Ok(self.log_features(&self.key, y, |y, f| self.log_weight[f] + dot(&self.query.center, y)))
    }

    /// ±u_f(z − μ) + p(z − μ) + rest(z, f).
    fn log_features(
        &self,
        side: &PlainSide,
        z: &ArrayRef2<f64>,
        rest: impl Fn(&[f64], usize) -> f64,
    ) -> Array2<f64> {
        let (n, d) = z.dim();
        let c = dct_matrix(d);
        let mut out = Array2::zeros((n, self.features()));
        for row in 0..n {
            let token = z.row(row).to_vec();
            let centred: Vec<f64> = token.iter().zip(&side.center).map(|(z, mu)| z - mu).collect();
            let p = match self.envelope {
                Envelope::None => 0.0,
                Envelope::Gaussian => -0.5 * dot(&centred, &centred),
            };
            for f in 0..out.ncols() {
                let sign = if f < side.radii.len() { 1.0 } else { -1.0 };
                let (g, i) = (f % side.radii.len() / d, f % d);
                let mut u = 0.0;
                for j in 0..d {
                    u += c[[i, j]] * side.scale[[g, j]] * centred[j];
                }
                out[[row, f]] = sign * side.radii[g * d + i] * u + p + rest(&token, f);
            }
        }
        out
    }

    fn check(&self, argument: &'static str, z: &ArrayRef2<f64>) -> Result<()> {
        let (blocks, d) = self.query.scale.dim();
        check_shape(argument, z, &[z.nrows(), d])?;
        check_shape("scale", &self.key.scale, &[blocks, d])?;
        for side in [&self.query, &self.key] {
            check_len("center", d, side.center.len())?;
            check_len("radii", blocks * d, side.radii.len())?;
        }
        check_room::<f64>("log-features", &[z.nrows(), self.features()])?;
        check_len("log_weight", self.features(), self.log_weight.len())
    }
}

/// S_ij = x_i·y_j: what softmax attention exponentiates.
///
/// # Shapes
/// - `x`: `[n_q, d]`, `y`: `[n_k, d]`, returns `[n_q, n_k]`.
///
/// # Cost
/// O(n_q·n_k·d).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if d differs.
///
/// # Examples
/// ```
/// use ndarray::array;
///
/// let s = dijiang::reference::scores(&array![[1.0, 2.0]], &array![[3.0, 4.0], [5.0, 6.0]])?;
/// assert_eq!(s, array![[11.0, 17.0]]);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn scores(x: &ArrayRef2<f64>, y: &ArrayRef2<f64>) -> Result<Array2<f64>> {
    check_shape("y", y, &[y.nrows(), x.ncols()])?;
    check_room::<f64>("scores", &[x.nrows(), y.nrows()])?;
    Ok(Array2::from_shape_fn((x.nrows(), y.nrows()), |(i, j)| {
        (0..x.ncols()).map(|l| x[[i, l]] * y[[j, l]]).sum()
    }))
}

/// L_ij = ln Σ_f exp(a_if + b_jf), the logarithm of the kernel matrix, by log-sum-exp: finite
/// wherever a and b are.
///
/// # Shapes
/// - `a`: `[n_q, m]`, `b`: `[n_k, m]`, returns `[n_q, n_k]`.
///
/// # Cost
/// O(n_q·n_k·m).
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) if m differs.
///
/// # Examples
/// ```
/// use ndarray::array;
///
/// let l = dijiang::reference::log_kernel(&array![[600.0, 600.0]], &array![[700.0, 700.0]])?;
/// assert!((l[[0, 0]] - (1300.0 + 2f64.ln())).abs() < 1e-12); // exp(1300) itself overflows
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn log_kernel(a: &ArrayRef2<f64>, b: &ArrayRef2<f64>) -> Result<Array2<f64>> {
    check_shape("b", b, &[b.nrows(), a.ncols()])?;
    check_room::<f64>("log_kernel", &[a.nrows(), b.nrows()])?;
    Ok(Array2::from_shape_fn((a.nrows(), b.nrows()), |(i, j)| {
        let (a, b) = (a.row(i), b.row(j));
        let sums = || a.iter().zip(b).map(|(a, b)| a + b);
        let top = sums().fold(f64::NEG_INFINITY, f64::max);
        if top == f64::NEG_INFINITY {
            return top;
        }
        top + sums().map(|sum| (sum - top).exp()).sum::<f64>().ln()
    }))
}

/// max_f b_jf: the largest log-feature of key j, by which keys are kept.
///
/// # Shapes
/// - `b`: `[n_k, m]`, returns `[n_k]`.
///
/// # Cost
/// O(n_k·m).
pub fn key_scores(b: &ArrayRef2<f64>) -> Vec<f64> {
    let largest =
        |row: ArrayView1<'_, f64>| row.iter().fold(f64::NEG_INFINITY, |top, &b| top.max(b));
    b.rows().into_iter().map(largest).collect()
}

/// Which keys a query may see at all, before masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// All of them.
    #[default]
    Full,
    /// Those up to its own: j ≤ i.
    Causal,
}

/// Which pairs (i, j) take part, which of them are near, and how the far ones decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pairs<'a> {
    /// Default of [`full`](Self::full) and [`causal`](Self::causal) respectively.
    pub order: Order,
    /// (c, r): pair (i, j) is near if ⌊i/c⌋ − ⌊j/c⌋ ≤ r and j ≤ i. Default: none.
    pub window: Option<(usize, usize)>,
    /// Sinks: the first so many keys that take part are near for every later query. Default: 0.
    pub sinks: usize,
    /// R: beyond the window, so many keys are near, those of the largest scores. Default: 0.
    pub kept: usize,
    /// The [score](key_scores) of every key, read if keys are kept. Default: none.
    pub scores: &'a [f64],
    /// log γ. Default: 0.
    pub log_decay: f64,
    /// One entry per key, `false` for keys that take no part. Default: none, every key takes part.
    pub valid: Option<&'a [bool]>,
}

impl<'a> Pairs<'a> {
    /// Every query sees every key.
    #[must_use]
    pub fn full() -> Self {
        Self {
            order: Order::Full,
            window: None,
            sinks: 0,
            kept: 0,
            scores: &[],
            log_decay: 0.0,
            valid: None,
        }
    }

    /// Every query sees the keys up to its own.
    #[must_use]
    pub fn causal() -> Self {
        Self { order: Order::Causal, ..Self::full() }
    }

    /// Window pairs: the query's own chunk of `chunk` tokens and `back` chunks before it.
    #[must_use]
    pub fn with_window(self, chunk: usize, back: usize) -> Self {
        Self { window: Some((chunk, back)), ..self }
    }

    /// The first so many keys that take part are near for every later query.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// So many keys of the largest `scores` beyond the window are near.
    #[must_use]
    pub fn with_kept(self, kept: usize, scores: &'a [f64]) -> Self {
        Self { kept, scores, ..self }
    }

    /// log γ of the far pairs.
    #[must_use]
    pub fn with_log_decay(self, log_decay: f64) -> Self {
        Self { log_decay, ..self }
    }

    /// The keys that take part.
    #[must_use]
    pub fn with_valid(self, valid: &'a [bool]) -> Self {
        Self { valid: Some(valid), ..self }
    }

    fn allowed(&self, i: usize, j: usize) -> bool {
        (self.order == Order::Full || j <= i) && self.valid.is_none_or(|valid| valid[j])
    }

    /// near(i, j) = window(i, j) or sink(j)
    fn is_near(&self, i: usize, j: usize) -> bool {
        let is_valid = |&key: &usize| self.valid.is_none_or(|valid| valid[key]);
        let earlier = || (0..j).filter(is_valid).take(self.sinks).count();
        let sink = j <= i && earlier() < self.sinks;
        sink || self.window.is_some_and(|(chunk, back)| j <= i && i / chunk - j / chunk <= back)
    }

    /// kept(i, j): key j is beyond the window, and fewer than R others there have a larger score,
    /// or as large a one and are earlier.
    fn is_kept(&self, i: usize, j: usize) -> bool {
        let beyond = |j: usize| j <= i && self.allowed(i, j) && !self.is_near(i, j);
        let score = |j: usize| self.scores[j] - self.log_decay * j as f64;
        let is_before =
            |other: usize| score(other) > score(j) || score(other) == score(j) && other < j;
        self.kept > 0
            && beyond(j)
            && (0..self.scores.len().min(i)).filter(|&j| is_before(j) && beyond(j)).count()
                < self.kept
    }

    fn check(&self, n_k: usize) -> Result<()> {
        if let Some((chunk, _)) = self.window {
            check_positive("chunk", chunk)?;
        }
        if self.kept > 0 {
            check_len("scores", n_k, self.scores.len())?;
        }
        self.valid.map_or(Ok(()), |valid| check_len("valid", n_k, valid.len()))
    }
}

/// Linear attention with its optional exact local window.
///
/// ```text
/// A_ij = exp(S_ij)                        if window(i,j) or sink(j) or kept(i,j)
///      = γ^max(i−j, 0) · exp(L_ij)        otherwise, for every allowed pair
/// o_i  = Σ_j A_ij v_j / Σ_j A_ij          zeros if no pair is allowed
/// ```
///
/// # Shapes
/// - `scores`: S, `[n_q, n_k]`, read at near pairs only; `log_kernel`: L, `[n_q, n_k]`; `v`: `[n_k,
///   e]`; returns `[n_q, e]`.
///
/// # Conventions
/// Row i and column j count tokens from the start of the same sequence. Values at pairs that are
/// not allowed are never read.
///
/// # Cost
/// O(n_q·n_k·e); with kept keys up to O(n_q·n_k³) more.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Length`](crate::Error::Length) for a mask that
/// does not fit, [`Error::Value`](crate::Error::Value) for a chunk of length 0.
///
/// # Examples
/// ```
/// use dijiang::reference::{Pairs, linear_attention};
/// use ndarray::{Array2, array};
///
/// // Equal weights, halved with every step back in time; token 2 is masked.
/// let (scores, kernel) = (Array2::zeros((3, 3)), Array2::zeros((3, 3)));
/// let v = array![[1.0], [4.0], [f64::NAN]];
/// let pairs = Pairs::causal().with_log_decay(0.5f64.ln()).with_valid(&[true, true, false]);
/// let out = linear_attention(&scores, &kernel, &v, &pairs)?;
/// assert!((out[[2, 0]] - (0.25 * 1.0 + 0.5 * 4.0) / 0.75).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn linear_attention(
    scores: &ArrayRef2<f64>,
    log_kernel: &ArrayRef2<f64>,
    v: &ArrayRef2<f64>,
    pairs: &Pairs<'_>,
) -> Result<Array2<f64>> {
    let (n_q, n_k) = scores.dim();
    check_shape("log_kernel", log_kernel, &[n_q, n_k])?;
    check_shape("v", v, &[n_k, v.ncols()])?;
    pairs.check(n_k)?;
    check_room::<f64>("outputs", &[n_q, v.ncols()])?;
    Ok(attend(
        (n_q, n_k),
        v,
        |i, j| {
            if pairs.is_near(i, j) || pairs.is_kept(i, j) {
                scores[[i, j]]
            } else {
                log_kernel[[i, j]] + pairs.log_decay * i.saturating_sub(j) as f64
            }
        },
        |i, j| pairs.allowed(i, j),
    ))
}

/// Exact softmax attention; with `window`, only within that window of chunks.
///
/// ```text
/// o_i = Σ_j exp(S_ij) v_j / Σ_j exp(S_ij)    over the allowed pairs, the ones in the window among
///                                            them if `window` is set; zeros if there is none
/// ```
///
/// # Shapes
/// - `scores`: S, `[n_q, n_k]`; `v`: `[n_k, e]`; returns `[n_q, e]`.
///
/// # Conventions
/// As [`linear_attention`]; `log_decay` is ignored.
///
/// # Cost
/// O(n_q·n_k·e).
///
/// # Errors
/// As [`linear_attention`].
///
/// # Examples
/// ```
/// use dijiang::reference::{Pairs, softmax_attention};
/// use ndarray::array;
///
/// let out = softmax_attention(&array![[0.0, 3f64.ln()]], &array![[1.0], [5.0]], &Pairs::full())?;
/// assert!((out[[0, 0]] - 4.0).abs() < 1e-15);
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn softmax_attention(
    scores: &ArrayRef2<f64>,
    v: &ArrayRef2<f64>,
    pairs: &Pairs<'_>,
) -> Result<Array2<f64>> {
    let (n_q, n_k) = scores.dim();
    check_shape("v", v, &[n_k, v.ncols()])?;
    pairs.check(n_k)?;
    check_room::<f64>("outputs", &[n_q, v.ncols()])?;
    let windowed = |i, j| pairs.window.is_none() || pairs.is_near(i, j);
    Ok(attend((n_q, n_k), v, |i, j| scores[[i, j]], |i, j| pairs.allowed(i, j) && windowed(i, j)))
}

/// The feature map of the code published with the paper: another function than [`PlainMap`],
/// without a logarithm.
///
/// ```text
/// φ_f(x) = exp(t_f·[Cᵀx]_f) / Σ_h exp(t_h·[Cᵀx]_h)
/// ```
///
/// # Shapes
/// - `x`: `[n, d]`, `radii`: `[d]`, returns `[n, d]`; every row sums to one.
///
/// # Conventions
/// Cᵀ is the DCT-III; x is not scaled.
///
/// # Cost
/// O(n·d²).
///
/// # Errors
/// [`Error::Length`](crate::Error::Length) unless there are d radii.
///
/// # Examples
/// ```
/// use ndarray::array;
///
/// let phi = dijiang::reference::published_features(&array![[0.4, -1.0, 2.0]], &[0.0, 0.0, 0.0])?;
/// assert!(phi.iter().all(|p| (p - 1.0 / 3.0).abs() < 1e-15));
/// # Ok::<(), dijiang::Error>(())
/// ```
pub fn published_features(x: &ArrayRef2<f64>, radii: &[f64]) -> Result<Array2<f64>> {
    let (n, d) = x.dim();
    check_len("radii", d, radii.len())?;
    check_room::<f64>("features", &[n, d])?;
    let c = dct_matrix(d);
    let mut out = Array2::zeros((n, d));
    for row in 0..n {
        let mut u = vec![0.0; d];
        for f in 0..d {
            for i in 0..d {
                u[f] += radii[f] * c[[i, f]] * x[[row, i]];
            }
        }
        let top = u.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = u.iter().map(|u| (u - top).exp()).sum();
        for f in 0..d {
            out[[row, f]] = (u[f] - top).exp() / sum;
        }
    }
    Ok(out)
}

/// Σ_j exp(log_weight(i,j)) v_j / Σ_j exp(log_weight(i,j)) over the allowed j.
fn attend(
    (n_q, n_k): (usize, usize),
    v: &ArrayRef2<f64>,
    log_weight: impl Fn(usize, usize) -> f64,
    allowed: impl Fn(usize, usize) -> bool,
) -> Array2<f64> {
    let mut out = Array2::zeros((n_q, v.ncols()));
    for i in 0..n_q {
        let mut top = f64::NEG_INFINITY;
        for j in 0..n_k {
            if allowed(i, j) {
                top = top.max(log_weight(i, j));
            }
        }
        if top == f64::NEG_INFINITY {
            continue;
        }
        let mut normaliser = 0.0;
        for j in 0..n_k {
            if allowed(i, j) {
                let weight = (log_weight(i, j) - top).exp();
                normaliser += weight;
                for l in 0..v.ncols() {
                    out[[i, l]] += weight * v[[j, l]];
                }
            }
        }
        for l in 0..v.ncols() {
            out[[i, l]] /= normaliser;
        }
    }
    out
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
