//! The measurements.

use std::error::Error;
use std::time::{Duration, Instant};

use dijiang::Real;
use dijiang::attention::{
    Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Softmax, SoftmaxConfig,
    Window,
};
use dijiang::calibrate::PlanOptions;
use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap};
use indicatif::{ProgressBar, ProgressStyle};
use ndarray::{Array, Array2, Array3, Axis};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};
use serde::Serialize;

use crate::gemm::Gemm;
use crate::{Args, flash};

/// Everything one run measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) cpu: String,
    pub(crate) threads: usize,
    pub(crate) dtype: &'static str,
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    /// Tokens that each key-value head's window holds.
    pub(crate) windows: Vec<usize>,
    /// Rate of the general matrix product at 1024³ on one thread, GFLOP/s, in the element type.
    pub(crate) sgemm_gflops: f64,
    pub(crate) rows: Vec<Row>,
    pub(crate) feature_maps: Vec<MapRow>,
}

/// Feature maps alone: the log-features of a block of tokens, features by tokens, as the next
/// product wants them.
#[derive(Debug, Serialize)]
pub(crate) struct MapRow {
    /// d = m.
    pub(crate) dim: usize,
    /// Nanoseconds per vector by the batched transform.
    pub(crate) dct_ns: f64,
    /// The same map as a product with its matrix.
    pub(crate) matrix_ns: f64,
}

/// One figure.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    /// `pure`, `window`, `full` or `decode`.
    pub(crate) mode: &'static str,
    /// Tokens; for `decode`, tokens seen before.
    pub(crate) n: usize,
    /// Microseconds per token and head.
    pub(crate) us: f64,
    /// The same for softmax attention.
    pub(crate) softmax_us: Option<f64>,
    /// The same for candle-nn's flash attention, where it is measured.
    pub(crate) candle_us: Option<f64>,
    /// Matrix-product FLOPs of the algorithm (see [`flops`]) divided by time.
    pub(crate) gflops: f64,
    /// The same for softmax attention.
    pub(crate) softmax_gflops: Option<f64>,
}

impl Row {
    /// The shorter times of two measurements.
    fn best(self, other: Self) -> Self {
        let slower = |a: Option<f64>, b: Option<f64>| a.zip(b).is_some_and(|(a, b)| b < a);
        let (us, gflops) =
            if other.us < self.us { (other.us, other.gflops) } else { (self.us, self.gflops) };
        let softmax = if slower(self.softmax_us, other.softmax_us) { &other } else { &self };
        let candle_us =
            if slower(self.candle_us, other.candle_us) { other.candle_us } else { self.candle_us };
        Self {
            us,
            gflops,
            softmax_us: softmax.softmax_us,
            softmax_gflops: softmax.softmax_gflops,
            candle_us,
            ..self
        }
    }
}

/// Turns in which the modes at one number of tokens are measured: what else a shared machine does
/// comes in bursts longer than one figure takes.
const TURNS: usize = 3;

/// Seconds for one number of tokens after which no further turn begins.
const PATIENCE: f64 = 5.0;

/// Chunk length of the local window, and tokens decoded at once.
const CHUNK: usize = 64;

/// Dimensions of the feature maps measured alone.
const MAP_DIMS: [usize; 4] = [32, 64, 128, 256];

/// Matrix-product FLOPs per token and head, m = d = e, of the plain algorithm in chunks of 64: what
/// rates are counted by. Purely causal attention here does a third fewer, in shorter blocks and
/// without what is above their diagonals.
fn flops(mode: &str, d: usize, windows: &[usize]) -> f64 {
    let square = 2.0 * (d * d) as f64;
    let row = 2.0 * d as f64;
    match mode {
        // Scores and their values within a block, reading and updating the state.
        "pure" => 2.0 * CHUNK as f64 * row + 2.0 * square,
        // Scores and values of the whole window, reading and updating the state.
        "window" => {
            let tokens = windows.iter().sum::<usize>() as f64 / windows.len() as f64;
            2.0 * tokens * row + 2.0 * square
        }
        _ => 2.0 * square,
    }
}

/// FLOPs of softmax attention per token and head.
fn softmax_flops(mode: &str, n: usize, d: usize) -> f64 {
    let keys = if mode == "pure" || mode == "window" { n as f64 / 2.0 } else { n as f64 };
    4.0 * keys * d as f64
}

/// Shortest of as many runs as fit the budget, at least one, in seconds.
pub(crate) fn shortest(budget: f64, mut run: impl FnMut()) -> f64 {
    let begin = Instant::now();
    run();
    let mut best = begin.elapsed();
    while begin.elapsed() < Duration::from_secs_f64(budget) {
        let start = Instant::now();
        run();
        best = best.min(start.elapsed());
    }
    best.as_secs_f64()
}

fn gaussian<T: Real>(rng: &mut ChaCha12Rng, shape: (usize, usize, usize)) -> Array3<T> {
    Array::from_shape_simple_fn(shape, || {
        let x: f64 = StandardNormal.sample(rng);
        T::from_f64(x)
    })
}

struct Bench<T> {
    heads: usize,
    windows: Vec<Window>,
    /// Whether the windows are those of a planned layer.
    planned: bool,
    dim: usize,
    seconds: f64,
    exact: Softmax<T>,
    pure: LinearAttention<T, DctMap<T>>,
    /// Bidirectional: softmax attention, and linear attention by the maps of `pure`.
    full_exact: Softmax<T>,
    full: LinearAttention<T, DctMap<T>>,
    window: LinearAttention<T, DctMap<T>>,
    rng: ChaCha12Rng,
}

pub(crate) fn all<T: Gemm>(args: &Args) -> Result<Report, Box<dyn Error + Send + Sync>> {
    let planned = !args.windows.is_empty();
    let (windows, sinks) = match planned {
        true => (args.windows.iter().map(|&tokens| on_offer(tokens)).collect::<Result<_, _>>()?, 4),
        false => (vec![Window::new(CHUNK, 1); args.heads], 0),
    };
    let maps = (0..windows.len())
        .map(|h| DctMapConfig::new().with_seed(h as u64).build(args.dim))
        .collect::<Result<Vec<_>, _>>()?;
    let config = LinearConfig::new().with_heads(args.heads);
    let exact = SoftmaxConfig::new(args.heads, args.dim).with_kv_heads(maps.len());
    let pure = config.clone().build(maps.clone())?;
    let mut bench = Bench::<T> {
        heads: args.heads,
        planned,
        dim: args.dim,
        seconds: args.seconds,
        full_exact: exact.clone().with_causality(Causality::Bidirectional).build()?,
        full: pure.clone().with_causality(Causality::Bidirectional)?,
        exact: exact.build()?,
        pure,
        window: config.with_windows(windows.clone()).with_sinks(sinks).build(maps)?,
        windows,
        rng: ChaCha12Rng::seed_from_u64(1),
    };
    let sizes: Vec<usize> = std::iter::successors(Some(args.from), |n| n.checked_mul(2))
        .take_while(|&n| n <= args.to)
        .collect();
    let bar = ProgressBar::new(sizes.len() as u64 + 1)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}")?);
    bar.set_message("matrix product 1024³");
    let sgemm_gflops = bench.sgemm();
    let mut rows = Vec::new();
    for n in sizes {
        bar.inc(1);
        bar.set_message(format!("{n} tokens"));
        let begin = Instant::now();
        let mut best = bench.tokens(n, n <= args.softmax_to)?;
        for _ in 1..TURNS {
            if begin.elapsed().as_secs_f64() < PATIENCE {
                let again = bench.tokens(n, n <= args.softmax_to)?;
                best = best.into_iter().zip(again).map(|(row, other)| row.best(other)).collect();
            }
        }
        rows.extend(best);
    }
    bar.set_message("feature maps");
    let feature_maps =
        MAP_DIMS.into_iter().map(|dim| bench.feature_map(dim)).collect::<Result<_, _>>()?;
    bar.finish_and_clear();
    rows.sort_by_key(|row: &Row| {
        ["pure", "window", "full", "decode"].iter().position(|mode| *mode == row.mode)
    });
    Ok(Report {
        cpu: cpu::<T>(),
        threads: args.threads,
        dtype: T::NAME,
        heads: args.heads,
        dim: args.dim,
        windows: bench.window_tokens(),
        sgemm_gflops,
        rows,
        feature_maps,
    })
}

/// The window of this many tokens among those that a plan chooses from.
fn on_offer(tokens: usize) -> Result<Window, String> {
    let windows = PlanOptions::new().windows;
    let windows: Vec<_> = windows.into_iter().filter(|window| window.kept == 0).collect();
    let found = windows.iter().find(|window| window.tokens() == tokens).copied();
    found.ok_or_else(|| {
        let offers: Vec<_> = windows.iter().map(|window| window.tokens().to_string()).collect();
        format!("--windows: a plan offers {}, found {tokens}", offers.join(", "))
    })
}

impl<T: Gemm> Bench<T> {
    /// Tokens that each key-value head's window holds.
    fn window_tokens(&self) -> Vec<usize> {
        self.windows.iter().map(|window| window.tokens()).collect()
    }

    /// GFLOP/s of `gemm` at 1024³, one thread.
    fn sgemm(&mut self) -> f64 {
        let n = 1024;
        let a = gaussian::<T>(&mut self.rng, (1, n, n));
        let b = gaussian::<T>(&mut self.rng, (1, n, n));
        let mut c = Array2::<T>::zeros((n, n));
        let (a, b) = (a.index_axis(Axis(0), 0), b.index_axis(Axis(0), 0));
        let seconds = shortest(self.seconds.max(0.5), || T::product(a, b, &mut c));
        2.0 * (n as f64).powi(3) / seconds / 1e9
    }

    /// Nanoseconds per vector of the query map of this dimension: by the transform, and by the
    /// matrix it stands for.
    fn feature_map(&mut self, dim: usize) -> Result<MapRow, dijiang::Error> {
        let map = DctMapConfig::new().build::<T>(dim)?;
        let matrix = DctMap::<T>::from_params(map.params().to_dense()?)?;
        let x = gaussian::<T>(&mut self.rng, (1, dim, CHUNK));
        let x = x.as_slice_memory_order().unwrap_or_default();
        let mut out = vec![T::from_f64(0.0); dim * CHUNK];
        // One call is too short for the clock.
        const CALLS: usize = 64;
        let mut ns = |map: &DctMap<T>| {
            let mut scratch = vec![T::from_f64(0.0); map.scratch_len(CHUNK)];
            let seconds = shortest(self.seconds, || {
                (0..CALLS).for_each(|_| map.query_panel(CHUNK, x, &mut out, &mut scratch))
            });
            1e9 * seconds / (CALLS * CHUNK) as f64
        };
        Ok(MapRow { dim, dct_ns: ns(&map), matrix_ns: ns(&matrix) })
    }

    /// Seconds of one turn for each figure.
    fn turn(&self) -> f64 {
        self.seconds / TURNS as f64
    }

    /// All modes at n tokens, once in every turn.
    fn tokens(
        &mut self,
        n: usize,
        softmax: bool,
    ) -> Result<Vec<Row>, Box<dyn Error + Send + Sync>> {
        let shape = (self.heads, n, self.dim);
        let [q, k, v] = [self.heads, self.windows.len(), self.windows.len()]
            .map(|heads| gaussian::<T>(&mut self.rng, (heads, n, self.dim)));
        let mut out = Array3::<T>::zeros(shape);
        let per_token = 1e6 / (self.heads * n) as f64;

        let (mut ws, mut exact_ws) = (self.pure.workspace(), self.exact.workspace());
        let mut window_ws = self.window.workspace();
        let mut check = Ok(());
        let mut state = self.pure.new_state();
        let pure = shortest(self.turn(), || {
            state.reset();
            check =
                self.pure.prefill_into(&mut [&mut state], Qkv::new(&q, &k, &v), &mut out, &mut ws);
        });
        check?;
        let mut window_state = self.window.new_state();
        let mut check = Ok(());
        let window = shortest(self.turn(), || {
            window_state.reset();
            check = self.window.prefill_into(
                &mut [&mut window_state],
                Qkv::new(&q, &k, &v),
                &mut out,
                &mut window_ws,
            );
        });
        check?;
        let mut check = Ok(());
        let full = shortest(self.turn(), || {
            check = self.full.forward_into(Qkv::new(&q, &k, &v), &mut out, &mut ws)
        });
        check?;
        let mut check = Ok(());
        let causal_exact = softmax.then(|| {
            shortest(self.turn(), || {
                check = self.exact.forward_into(Qkv::new(&q, &k, &v), &mut out, &mut exact_ws)
            }) * per_token
        });
        let mut check_full = Ok(());
        let full_exact = softmax.then(|| {
            shortest(self.turn(), || {
                check_full =
                    self.full_exact.forward_into(Qkv::new(&q, &k, &v), &mut out, &mut exact_ws)
            }) * per_token
        });
        check.and(check_full)?;
        let candle = if softmax && !self.planned {
            flash::causal([&q, &k, &v], self.turn())?.map(|seconds| seconds * per_token)
        } else {
            None
        };

        let (decode, decode_exact) = self.decode(&q, &k, &v)?;
        let row = |mode: &'static str, seconds: f64, softmax_us: Option<f64>| {
            let us = seconds * per_token;
            let gflops = flops(mode, self.dim, &self.window_tokens()) / us / 1e3;
            let softmax_gflops = softmax_us.map(|us| softmax_flops(mode, n, self.dim) / us / 1e3);
            let candle_us = candle.filter(|_| mode == "pure" || mode == "window");
            Row { mode, n, us, softmax_us, candle_us, gflops, softmax_gflops }
        };
        let mut rows = vec![
            row("pure", pure, causal_exact),
            row("window", window, causal_exact),
            row("full", full, full_exact),
        ];
        rows.push(row("decode", decode / per_token, Some(decode_exact)));
        Ok(rows)
    }

    /// Microseconds per head of one more token after those of q, k, v: linear and softmax.
    fn decode(
        &mut self,
        q: &Array3<T>,
        k: &Array3<T>,
        v: &Array3<T>,
    ) -> Result<(f64, f64), dijiang::Error> {
        let n = k.shape()[1];
        let operator = if self.planned { &self.window } else { &self.pure };
        let mut state = operator.new_state();
        operator.prefill(&mut state, Qkv::new(q, k, v))?;
        let mut cache = self.exact.new_state();
        self.exact.extend(&mut cache, (k, v), KeyMask::All, &mut self.exact.workspace())?;
        let token = |x: &Array3<T>, i: usize| x.index_axis(Axis(1), i % n).to_owned();
        let tokens: Vec<_> = (0..CHUNK).map(|i| (token(q, i), token(k, i), token(v, i))).collect();
        let mut out = Array2::<T>::zeros((self.heads, self.dim));
        let per_head = 1e6 / (self.heads * CHUNK) as f64;
        let (mut ws, mut exact_ws) = (operator.workspace(), self.exact.workspace());
        let mut check = Ok(());
        let linear = shortest(self.turn(), || {
            for (q, k, v) in &tokens {
                check = operator.step(&mut state, Qkv::token(q, k, v), &mut out, &mut ws);
            }
        });
        check?;
        let mut check = Ok(());
        let snapshot = cache.clone();
        let mut exact = f64::INFINITY;
        let begin = Instant::now();
        while exact.is_infinite() || begin.elapsed() < Duration::from_secs_f64(self.turn()) {
            cache.clone_from(&snapshot);
            let start = Instant::now();
            for (q, k, v) in &tokens {
                check = self.exact.step(&mut cache, Qkv::token(q, k, v), &mut out, &mut exact_ws);
            }
            exact = exact.min(start.elapsed().as_secs_f64());
        }
        check?;
        Ok((linear * per_head, exact * per_head))
    }
}

/// The CPU's name, as the system tells it, and the instructions the crate chose on it.
fn cpu<T: Real>() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info
        .lines()
        .find(|line| line.starts_with("model name"))
        .and_then(|line| line.split(':').nth(1));
    format!("{} ({})", name.map_or(std::env::consts::ARCH, str::trim), T::instruction_set())
}
