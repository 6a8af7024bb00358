//! How does a decoder read an encoder's memory?
//!
//! ```sh
//! cargo run --release --example cross_attention
//! ```
//!
//! Queries of one sequence, keys and values of another: bidirectional attention. Where the queries
//! come one by one, a causal state takes the memory in once and is read with a masked key for every
//! query, at a cost that does not depend on the memory's length.
//!
//! There is no local window here, so the map has to stand for all of softmax, and the paper's does
//! not: of the maps that need no calibration, those that are unbiased for exp(x·y) get better with
//! every feature.

use std::time::Instant;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use dijiang::Result;
use dijiang::attention::{
    Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, SoftmaxConfig,
};
use dijiang::kernel::{DctMap, DctMapConfig, Envelope, Mixing, Radial};
use ndarray::{Array, Array2, Array3, ArrayView2, Axis, s};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Heads h.
const HEADS: usize = 4;
/// Head dimension d.
const DIM: usize = 64;

/// Cross attention of some queries over memories of growing length, linear and exact.
#[derive(Debug, Parser)]
struct Args {
    /// Lengths of the encoder's memory
    #[arg(
        long, value_name = "N,…", value_delimiter = ',',
        default_values_t = [256, 1024, 4096, 16384]
    )]
    memory: Vec<usize>,
    /// Queries of the decoder
    #[arg(long, value_name = "N", default_value_t = 1000)]
    queries: usize,
    /// Features of the unbiased maps, in multiples of the head dimension
    #[arg(long, value_name = "N", default_value_t = 4)]
    features: usize,
}

fn main() -> Result<()> {
    let Args { memory, queries, features } = Args::parse();
    let mut random = ChaCha12Rng::seed_from_u64(7);
    let mut normal = |shape: (usize, usize, usize), scale: f32| -> Array3<f32> {
        Array::from_shape_simple_fn(shape, || {
            let x: f32 = StandardNormal.sample(&mut random);
            scale * x
        })
    };
    // Heads of trained models have means: those of queries and keys are what centres take away.
    let (query_mean, key_mean) = (normal((HEADS, 1, DIM), 0.4), normal((HEADS, 1, DIM), 0.4));
    let q = normal((HEADS, queries, DIM), 0.4) + &query_mean;
    let mix = normal((HEADS, DIM, DIM), 1.0 / (DIM as f32).sqrt());

    let m = features * DIM;
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "memory".to_owned(),
        format!("error\npaper's, m = {DIM}"),
        format!("error\nunbiased, m = {m}"),
        format!("error\n+ OPRF, m = {m}"),
        format!("all at once, µs\nlinear, m = {m}"),
        "all at once, µs\nexact".to_owned(),
        format!("one by one, µs\nlinear, m = {m}"),
        "one by one, µs\nexact".to_owned(),
    ]);
    for n in memory {
        let k = normal((HEADS, n, DIM), 0.4) + &key_mean;
        let mut v = normal((HEADS, n, DIM), 0.2);
        v.outer_iter_mut()
            .zip(k.outer_iter())
            .zip(mix.outer_iter())
            .for_each(|((mut v, k), mix)| v += &k.dot(&mix));
        // The last tenth is padding.
        let valid = (0..n).map(|j| j < n.div_ceil(10) * 9).collect();
        table.add_row([vec![n.to_string()], row(features, &q, &Memory { k, v, valid })?].concat());
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!(
        "{queries} queries, {HEADS} heads of {DIM}, all threads, centred maps, times per \
         query\n{table}"
    );
    println!(
        "error: Σ|ô − o|² / Σ|o − ō|², o exact, ô linear; a plain mean of the values has about 1"
    );
    Ok(())
}

/// What the encoder leaves behind: keys and values `[h, n, d]`, and which of them are no padding.
struct Memory {
    k: Array3<f32>,
    v: Array3<f32>,
    valid: Vec<bool>,
}

/// Errors and times of queries `[h, n, d]` over one memory.
fn row(features: usize, q: &Array3<f32>, memory: &Memory) -> Result<Vec<String>> {
    let Memory { k, v, valid } = memory;
    let mask = KeyMask::Valid(valid);
    let exact = SoftmaxConfig::new(HEADS, DIM).with_causality(Causality::Bidirectional);
    let exact = exact.build::<f32>()?;
    let paper = DctMapConfig::new();
    let normal_rows =
        paper.clone().with_blocks(features).with_mixing(Mixing::Mixed).with_radial(Radial::Chi);
    let normal_rows = normal_rows.with_envelope(Envelope::Gaussian);
    let linear = attention(&normal_rows, q, k, true)?;
    let expected = exact.forward(Qkv::new(q, k, v).with_mask(mask))?;
    let mut row = Vec::new();
    for linear in
        [&attention(&paper, q, k, false)?, &attention(&normal_rows, q, k, false)?, &linear]
    {
        row.push(format!(
            "{:.3}",
            error(&linear.forward(Qkv::new(q, k, v).with_mask(mask))?, &expected)
        ));
    }

    let (mut out, mut workspace, mut exact_workspace) =
        (Array3::zeros(q.raw_dim()), linear.workspace(), exact.workspace());
    let mut add =
        |seconds: f64, queries: usize| row.push(format!("{:.1}", 1e6 * seconds / queries as f64));
    add(
        shortest(|| {
            linear.forward_into(Qkv::new(q, k, v).with_mask(mask), &mut out, &mut workspace)
        })?,
        q.len_of(Axis(1)),
    );
    add(
        shortest(|| {
            exact.forward_into(Qkv::new(q, k, v).with_mask(mask), &mut out, &mut exact_workspace)
        })?,
        q.len_of(Axis(1)),
    );

    // The memory once, without anybody to ask; then queries whose own keys are masked, which leaves
    // the state as it is.
    let linear = linear.with_causality(Causality::Causal)?;
    let exact = SoftmaxConfig::new(HEADS, DIM).build::<f32>()?;
    let (mut state, mut cache) = (linear.new_state(), exact.new_state());
    linear.extend(&mut state, (k, v), mask, &mut workspace)?;
    exact.extend(&mut cache, (k, v), mask, &mut exact_workspace)?;
    let some = q.slice(s![.., ..q.len_of(Axis(1)).min(100), ..]);
    let (nothing, mut one, unseen) =
        (Array3::zeros((HEADS, 1, DIM)), Array3::zeros((HEADS, 1, DIM)), KeyMask::Valid(&[false]));
    let each = || some.axis_chunks_iter(Axis(1), 1);
    let read = || {
        each().try_for_each(|q| {
            linear.prefill_into(
                &mut [&mut state],
                Qkv::new(&q, &nothing, &nothing).with_mask(unseen),
                &mut one,
                &mut workspace,
            )
        })
    };
    add(shortest(read)?, some.len_of(Axis(1)));
    let read = || {
        // A cache grows with masked keys as well.
        let mut cache = cache.clone();
        each().try_for_each(|q| {
            exact.prefill_into(
                &mut [&mut cache],
                Qkv::new(&q, &nothing, &nothing).with_mask(unseen),
                &mut one,
                &mut exact_workspace,
            )
        })
    };
    add(shortest(read)?, some.len_of(Axis(1)));
    Ok(row)
}

/// Attention by a map for every head, centred on its queries and keys; with OPRF weights if asked
/// for.
fn attention(
    config: &DctMapConfig,
    q: &Array3<f32>,
    k: &Array3<f32>,
    oprf: bool,
) -> Result<LinearAttention<f32, DctMap<f32>>> {
    let map = |h: usize| {
        let mut params = config.clone().with_seed(h as u64).params(DIM)?;
        let (query, key) = (moments(q.index_axis(Axis(0), h)), moments(k.index_axis(Axis(0), h)));
        (params.query.center, params.key.center) = (query.0, key.0);
        // The mean of |x + y|² over all pairs of centred ones.
        DctMap::from_params(if oprf { params.with_oprf(query.1 + key.1)? } else { params })
    };
    let config = LinearConfig::new().with_causality(Causality::Bidirectional);
    config.build((0..HEADS).map(map).collect::<Result<_>>()?)
}

/// Mean and total variance of the scaled vectors √σ·q or √σ·k, σ = 1/√d.
fn moments(rows: ArrayView2<'_, f32>) -> (Vec<f64>, f64) {
    let root = (DIM as f64).powf(-0.25);
    let columns = rows.columns().into_iter().map(|column| {
        let mean = column.iter().map(|&x| root * f64::from(x)).sum::<f64>() / column.len() as f64;
        let variance = column.iter().map(|&x| (root * f64::from(x) - mean).powi(2)).sum::<f64>()
            / column.len() as f64;
        (mean, variance)
    });
    let (means, variances): (Vec<f64>, Vec<f64>) = columns.unzip();
    (means, variances.into_iter().sum())
}

/// Squared difference over the variance of what is expected, the mean of every head taken away.
fn error(found: &Array3<f32>, expected: &Array3<f32>) -> f64 {
    let squares = |rows: Array2<f32>| rows.iter().map(|&x| f64::from(x * x)).sum::<f64>();
    let heads = found.outer_iter().zip(expected.outer_iter());
    let (difference, variance) =
        heads.fold((0.0, 0.0), |(difference, variance), (found, expected)| {
            let mean = expected.sum_axis(Axis(0)) / expected.nrows() as f32;
            (difference + squares(&found - &expected), variance + squares(&expected - &mean))
        });
    difference / variance
}

/// Seconds of the fastest of five runs.
fn shortest(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    (0..5).try_fold(f64::INFINITY, |least, _| {
        let start = Instant::now();
        run()?;
        Ok(least.min(start.elapsed().as_secs_f64()))
    })
}
