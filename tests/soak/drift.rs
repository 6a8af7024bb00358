//! A long stream through an f32 state, against the same stream in f64.

use std::time::Instant;

use dijiang::Real;
use dijiang::attention::{CausalState, LinearAttention, LinearConfig, Operator, Qkv, Workspace};
use dijiang::kernel::{DctMap, DctMapConfig};
use ndarray::{Array2, Axis};
use serde::Serialize;

use crate::memory::resident_kb;
use dijiang_testing::cases::Source;

/// Head dimension d, features m, value dimension e.
const DIM: usize = 32;
/// Steps at each point of measurement over which drift is averaged.
const WINDOW: u64 = 256;
/// Steps between two looks at the clock.
const ROUND: u64 = 4096;

/// What the stream did.
#[derive(Debug, Serialize)]
pub(crate) struct Stream {
    pub(crate) streamed_tokens: u64,
    pub(crate) tokens_per_second: f64,
    pub(crate) shape: String,
    /// At powers of ten, and at the end.
    pub(crate) drift: Vec<Point>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Point {
    pub(crate) tokens: u64,
    /// √(Σ|o − ô|² / Σ|ô|²) over the last steps, ô being the outputs in f64.
    pub(crate) drift: f64,
    pub(crate) state_bytes: usize,
    pub(crate) memory_kb: Option<u64>,
}

/// One head's operator, with a stream's state.
struct Side<T> {
    attention: LinearAttention<T, DctMap<T>>,
    state: CausalState<T>,
    workspace: Workspace<T>,
    out: Array2<T>,
}

impl<T: Real> Side<T> {
    fn new(seed: u64) -> dijiang::Result<Self> {
        let attention =
            LinearConfig::new().build(vec![DctMapConfig::new().with_seed(seed).build(DIM)?])?;
        let (state, workspace) = (attention.new_state(), attention.step_workspace());
        Ok(Self { attention, state, workspace, out: Array2::zeros((1, DIM)) })
    }

    /// One token; the same numbers for either type.
    fn step(&mut self, token: &[Array2<f64>; 3]) -> dijiang::Result<()> {
        let [q, k, v] = token.each_ref().map(|x| x.mapv(T::from_f64));
        self.attention.step(
            &mut self.state,
            Qkv::token(&q, &k, &v),
            &mut self.out,
            &mut self.workspace,
        )
    }
}

/// Streams `tokens` tokens, as many as there is time for until `end`.
pub(crate) fn run(tokens: u64, seed: u64, end: Instant) -> dijiang::Result<Stream> {
    let (mut single, mut double) = (Side::<f32>::new(seed)?, Side::<f64>::new(seed)?);
    let mut source = Source::seeded(seed);
    let (start, mut drift, mut total) = (Instant::now(), Vec::new(), tokens.max(WINDOW));
    let (mut difference, mut size) = (0.0, 0.0);
    let mut streamed = 0;
    while streamed < total {
        // Values that follow their keys, as a model's do: outputs then depend on the queries and do
        // not average out to nothing.
        let mut random = || Array2::from_shape_simple_fn((1, DIM), || source.normal());
        let (q, k, noise) = (random(), random(), random());
        let v = (&k + noise).mapv(|v| f64::from((0.5 * v) as f32));
        let token = [q, k, v];
        single.step(&token)?;
        double.step(&token)?;
        streamed += 1;
        if streamed.is_multiple_of(ROUND) && Instant::now() >= end {
            total = total.min(streamed + WINDOW);
        }
        let next = next_point(streamed.saturating_sub(1), total);
        if streamed + WINDOW > next {
            for (o, exact) in
                single.out.index_axis(Axis(0), 0).iter().zip(double.out.index_axis(Axis(0), 0))
            {
                difference += (f64::from(*o) - exact).powi(2);
                size += exact.powi(2);
            }
        }
        if streamed == next {
            let state_bytes = single.state.bytes() + double.state.bytes();
            drift.push(Point {
                tokens: streamed,
                drift: (difference / size).sqrt(),
                state_bytes,
                memory_kb: resident_kb(),
            });
            (difference, size) = (0.0, 0.0);
        }
    }
    let tokens_per_second = streamed as f64 / start.elapsed().as_secs_f64();
    let shape = format!("one head, d = m = e = {DIM}, no local window, no decay, f32 and f64");
    Ok(Stream { streamed_tokens: streamed, tokens_per_second, shape, drift })
}

/// The first power of ten beyond `streamed`, from 1000 on, or the end.
fn next_point(streamed: u64, total: u64) -> u64 {
    let powers = std::iter::successors(Some(1000_u64), |power| power.checked_mul(10));
    powers.into_iter().find(|&power| power > streamed).map_or(total, |power| power.min(total))
}
