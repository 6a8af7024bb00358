//! Shared by the benchmarks: random inputs and names.
#![allow(dead_code, missing_docs, reason = "every benchmark uses its own part")]

use dijiang::Real;
use dijiang::attention::{LinearAttention, LinearConfig, Window};
use dijiang::kernel::{DctMap, DctMapConfig};
use ndarray::{Array, Array3};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Chunk length of the local window.
pub(crate) const CHUNK: usize = 64;

/// Standard normal `[a, b, c]`.
pub(crate) fn gaussian<T: Real>(seed: u64, shape: (usize, usize, usize)) -> Array3<T> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    Array::from_shape_simple_fn(shape, || {
        let x: f64 = StandardNormal.sample(&mut rng);
        T::from_f64(x)
    })
}

/// Linear attention with `heads` plain maps of m = d features.
pub(crate) fn linear<T: Real>(
    heads: usize,
    d: usize,
    window: bool,
) -> LinearAttention<T, DctMap<T>> {
    let maps = (0..heads)
        .map(|h| DctMapConfig::new().with_seed(h as u64).build(d).expect("a valid map"))
        .collect();
    let config = LinearConfig::new();
    let config = if window { config.with_window(Window::new(CHUNK, 1)) } else { config };
    config.build(maps).expect("a valid operator")
}

/// What was measured, on what: `f32/n1024/d64/m64`.
pub(crate) fn id<T: Real>(n: usize, d: usize, m: usize) -> String {
    format!("{}/n{n}/d{d}/m{m}", T::NAME)
}
