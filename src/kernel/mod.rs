//! Feature maps: K(x, y) = Σ_f exp(a_f(x) + b_f(y)), an approximation of the softmax kernel
//! exp(x·y).
//!
//! Every map works in the *log domain*: it yields the log-features a_f and b_f, never their
//! exponentials, so that attention can stabilise them with a running maximum. x = √σ·q and y = √σ·k
//! are the scaled queries and keys.
//!
//! # The weighted DCT feature map
//!
//! C is the orthonormal DCT-II, `C[f,i] = s_f cos(π(2i+1)f / 2d)`. Blocks g = 0..G, features f =
//! g·d + i, m = G·d, or m = 2·G·d with antithetic pairs (+u, −u):
//!
//! ```text
//! u_f(z)  = t_f · [C (s_g ⊙ z)]_i
//! query:    a_f(x) = u_f(x − μq) + p(x − μq) + x·μk − μq·μk + g
//! key:      b_f(y) = u_f(y − μk) + p(y − μk) + w_f + μq·y
//! ```
//!
//! with radii t, input scales s, log-weights w, centres μ, envelope p and mix g. The centres cancel
//! exactly: with p(z) = −|z|²/2 the map estimates exp(x·y) whatever they are, and they change its
//! error only.
//!
//! Sources: φ_WDCF of Chen et al. 2024, arXiv 2403.19928, with w = log D²; the envelope as in
//! Choromanski et al. 2021; centres, mix and separate sides are this crate's.
//!
//! # What the maps converge to
//!
//! * With one transform per block ([`Mixing::None`]), normal radii, s = 1, no envelope and w = −ln
//!   m the kernel tends to the *additive* kernel (1/d) Σ_f exp((c_f·(x+y))²/2) as the blocks grow,
//!   c_f being the rows of C. It is not exp(x·y), nor a multiple of it.
//! * With [`Mixing::Mixed`], [`Radial::Chi`] and [`Envelope::Gaussian`] the projection's rows are
//!   nearly standard normal vectors, and the kernel is nearly unbiased for exp(x·y).
//! * [`FavorMap`], the dense Monte Carlo baseline, is exactly unbiased for exp(x·y).
//!
//! ```
//! use dijiang::kernel::{DctMapConfig, FeatureMap, InputScales};
//! use ndarray::array;
//!
//! let map = DctMapConfig::new().with_blocks(4096).with_scales(InputScales::Ones).build::<f64>(2)?;
//! let (x, y) = (array![[0.6, -0.1]], array![[0.4, 0.3]]);
//! let (a, b) = (map.query_log_features(&x)?, map.key_log_features(&y)?);
//! let kernel: f64 = (&a + &b).mapv(f64::exp).sum();
//! // x + y = (1, 0.2), and the rows of C are (1, 1)/√2 and (1, −1)/√2.
//! let additive = 0.5 * ((0.72_f64 / 2.0).exp() + (0.32_f64 / 2.0).exp());
//! assert!((kernel / additive - 1.0).abs() < 1e-3);
//! # Ok::<(), dijiang::Error>(())
//! ```

mod backward;
mod dct_map;
mod favor;
mod oprf;
mod params;
mod published;
mod quantile;
mod sampler;
mod transform;

pub use backward::{DctGradients, DctSums, DifferentiableMap, PanelGradients, SideGradients};
pub use dct_map::{DctMap, DctMapConfig};
pub use favor::{FavorConfig, FavorMap, FavorRows};
pub use params::{
    DctParams, Envelope, InputScales, Mixing, Pairing, Points, Projection, Radial, SideParams,
    Sides,
};
pub use published::published_features;
#[cfg(feature = "safetensors")]
pub(crate) use published::published_radii;
pub(crate) use published::{published_projection, softmax_rows};

use std::fmt::Debug;

use ndarray::{Array2, ArrayRef2, Axis};

use crate::Real;
use crate::check::{check_elements, check_room};
use crate::error::{Error, Result};
use crate::simd::{LANES, padded};

/// A pair of log-feature maps, one for queries and one for keys.
///
/// The kernel it stands for is K(x, y) = Σ_f exp(a_f(x) + b_f(y)).
///
/// Implementors work on *panels*: column = token, row = coordinate or feature, row-major, so that
/// tokens lie along SIMD lanes and the features are ready for the matrix products of attention. A
/// column's result must depend on that column alone, bit for bit, whatever the width of the panel.
/// Log-features must be finite: attention over others is refused, and its states are poisoned.
pub trait FeatureMap<T: Real>: Debug + Send + Sync {
    /// Head dimension d.
    fn dim(&self) -> usize;

    /// Number of features m.
    fn features(&self) -> usize;

    /// Scratch elements that the panel methods need for panels `width` columns wide.
    fn scratch_len(&self, width: usize) -> usize;

    /// Log-features a_f(x) of a panel of scaled queries.
    ///
    /// # Shapes
    /// - `x`: `[d, width]`, `out`: `[m, width]`, row-major without gaps; `width` is a multiple of
    ///   16.
    /// - `scratch`: at least [`scratch_len`](Self::scratch_len) elements, contents garbage before
    ///   and after.
    ///
    /// # Panics
    /// If a slice is shorter than that.
    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]);

    /// Log-features b_f(y) of a panel of scaled keys; shapes as for
    /// [`query_panel`](Self::query_panel).
    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]);

    /// Scratch elements that the token methods need.
    fn token_scratch_len(&self) -> usize {
        (LANES * (self.dim() + self.features())).saturating_add(self.scratch_len(LANES))
    }

    /// Log-features of one scaled query, as a panel of one token would have them (to rounding): for
    /// decoding.
    ///
    /// The provided method fills a panel with the token and 15 zeros.
    ///
    /// # Shapes
    /// - `x`: `[d]`, `out`: `[m]`, `scratch`: at least
    ///   [`token_scratch_len`](Self::token_scratch_len) elements.
    ///
    /// # Panics
    /// If a slice is shorter than that.
    fn query_token(&self, x: &[T], out: &mut [T], scratch: &mut [T]) {
        token(self.features(), x, out, scratch, |width, x, out, scratch| {
            self.query_panel(width, x, out, scratch)
        });
    }

    /// Log-features of one scaled key, as [`query_token`](Self::query_token).
    fn key_token(&self, y: &[T], out: &mut [T], scratch: &mut [T]) {
        token(self.features(), y, out, scratch, |width, y, out, scratch| {
            self.key_panel(width, y, out, scratch)
        });
    }

    /// A number that is the same for the same map, and all but surely another one for another map.
    /// States remember that of their operator, in their bytes too, and no other operator takes
    /// them.
    ///
    /// The provided method hashes the log-features of one token, to the last bit. A map whose
    /// states go from one kind of machine to another, where they may be rounded differently, hashes
    /// its parameters instead.
    fn fingerprint(&self) -> u64 {
        let element = |(_, i): (usize, usize)| T::from_f64(((7 * i + 3) % 11) as f64 / 11.0 - 0.4);
        let token = Array2::from_shape_fn((1, self.dim()), element);
        let sides = [self.query_log_features(&token), self.key_log_features(&token)];
        hash(sides.iter().flatten().flatten().map(|x| x.to_f64().to_bits()))
    }

    /// Log-features a_f(x) of scaled queries, rows are tokens. Allocates.
    ///
    /// # Shapes
    /// - `x`: `[n, d]`, returns `[n, m]`.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `x` has d columns; [`Error::NonFinite`] for elements beyond
    /// [`Real::LIMIT`]; [`Error::TooLarge`] for results there is no room for.
    fn query_log_features(&self, x: &ArrayRef2<T>) -> Result<Array2<T>> {
        rows(self.dim(), self.features(), self.scratch_len(ROWS), x, "x", |w, x, o, s| {
            self.query_panel(w, x, o, s)
        })
    }

    /// Log-features b_f(y) of scaled keys, rows are tokens. Allocates.
    ///
    /// # Shapes
    /// - `y`: `[n, d]`, returns `[n, m]`.
    ///
    /// # Errors
    /// As [`query_log_features`](Self::query_log_features).
    fn key_log_features(&self, y: &ArrayRef2<T>) -> Result<Array2<T>> {
        rows(self.dim(), self.features(), self.scratch_len(ROWS), y, "y", |w, y, o, s| {
            self.key_panel(w, y, o, s)
        })
    }
}

/// A hash of these words, by SplitMix64's output function.
pub(crate) fn hash(words: impl Iterator<Item = u64>) -> u64 {
    words.fold(0, |hash, word| mixed((hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15)))
}

/// A parameter as a word to [`hash`], to the precision of f32: mathematical functions round
/// differently on different machines.
pub(crate) fn word(parameter: f64) -> u64 {
    (parameter as f32).to_bits().into()
}

/// SplitMix64's output for the state `z` [Steele, Lea, Flood 2014].
pub(crate) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Runs a panel method on one token.
fn token<T: Real>(
    features: usize,
    x: &[T],
    out: &mut [T],
    scratch: &mut [T],
    panel: impl Fn(usize, &[T], &mut [T], &mut [T]),
) {
    let (input, scratch) = scratch.split_at_mut(LANES * x.len());
    let (output, scratch) = scratch.split_at_mut(LANES * features);
    input.fill(T::ZERO);
    input.chunks_exact_mut(LANES).zip(x).for_each(|(row, &x)| row[0] = x);
    panel(LANES, input, output, scratch);
    out.iter_mut().zip(output.chunks_exact(LANES)).for_each(|(out, row)| *out = row[0]);
}

/// Rows that go through a panel together.
const ROWS: usize = 64;

/// Runs a panel method on rows: transposes in, transposes out.
fn rows<T: Real>(
    dim: usize,
    features: usize,
    scratch_len: usize,
    rows: &ArrayRef2<T>,
    argument: &'static str,
    panel: impl Fn(usize, &[T], &mut [T], &mut [T]),
) -> Result<Array2<T>> {
    if rows.ncols() != dim {
        return Err(Error::Shape { argument, axis: 1, expected: dim, got: rows.ncols() });
    }
    check_room::<T>("log-features", &[rows.nrows(), features])?;
    check_elements(argument, rows)?;
    let mut features_of = Array2::zeros((rows.nrows(), features));
    let (mut x, mut out) = (vec![T::ZERO; dim * ROWS], vec![T::ZERO; features * ROWS]);
    let mut scratch = vec![T::ZERO; scratch_len];
    for (rows, mut features_of) in
        rows.axis_chunks_iter(Axis(0), ROWS).zip(features_of.axis_chunks_iter_mut(Axis(0), ROWS))
    {
        let width = padded(rows.nrows());
        let (x, out) = (&mut x[..dim * width], &mut out[..features * width]);
        x.fill(T::ZERO);
        for (j, row) in rows.outer_iter().enumerate() {
            for (i, &value) in row.iter().enumerate() {
                x[i * width + j] = value;
            }
        }
        panel(width, x, out, &mut scratch);
        features_of.indexed_iter_mut().for_each(|((j, f), value)| *value = out[f * width + j]);
    }
    Ok(features_of)
}
