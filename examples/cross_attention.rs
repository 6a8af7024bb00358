//! How does a decoder read an encoder's memory?
//!
//! ```sh
//! cargo run --release --example cross_attention
//! ```
//!
//! Queries of one sequence, keys and values of another: `LinearAttention::full`. Where the queries come one by one, the memory is
//! taken in once and read with a masked key for every query, at a cost that does not depend on its length.

use std::time::Instant;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use dijiang::Result;
use dijiang::attention::{ExactConfig, KeyMask, LinearAttention, LinearConfig};
use dijiang::kernel::{DctMap, DctMapConfig, Envelope, Mixing, Radial};
use ndarray::{Array, Array2, Array3, ArrayView2, ArrayView3, Axis};
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
    #[arg(long, value_delimiter = ',', value_name = "N", default_values_t = [256, 1024, 4096, 16384])]
    memory: Vec<usize>,
    /// Queries of the decoder
    #[arg(long, value_name = "N", default_value_t = 48)]
    queries: usize,
    /// Features of the unbiased map, in multiples of the head dimension
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
    let (query_mean, key_mean) = (normal((HEADS, 1, DIM), 0.6), normal((HEADS, 1, DIM), 0.6));
    let q = normal((HEADS, queries, DIM), 0.7) + &query_mean;
    let mix = normal((HEADS, DIM, DIM), 1.0 / (DIM as f32).sqrt());

    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "memory".to_owned(),
        format!("error\npaper, m = {DIM}"),
        format!("error\n+ centres, m = {DIM}"),
        format!("error\nunbiased, m = {}", features * DIM),
        "µs per query\nlinear, all at once".to_owned(),
        "µs per query\nexact".to_owned(),
        "µs per query\nlinear, one by one".to_owned(),
        "µs per query\nexact".to_owned(),
    ]);
    let exact = ExactConfig::new(HEADS, DIM).build::<f32>()?;
    for n in memory {
        let k = normal((HEADS, n, DIM), 0.7) + &key_mean;
        let mut v = normal((HEADS, n, DIM), 0.5);
        v.outer_iter_mut().zip(k.outer_iter()).zip(mix.outer_iter()).for_each(|((mut v, k), mix)| v += &k.dot(&mix));
        // The last tenth is padding.
        let valid: Vec<bool> = (0..n).map(|j| j < n.div_ceil(10) * 9).collect();
        let mask = KeyMask::Valid(&valid);

        let plain = DctMapConfig::new(DIM);
        let unbiased = plain.clone().with_blocks(features).with_mixing(Mixing::Mixed).with_radial(Radial::Chi);
        let unbiased = unbiased.with_envelope(Envelope::Gaussian);
        let expected = exact.full(&q, &k, &v, mask)?;
        let maps = [attention(&plain, None)?, attention(&plain, Some((&q, &k)))?, attention(&unbiased, Some((&q, &k)))?];
        let mut row = vec![n.to_string()];
        for linear in &maps {
            row.push(format!("{:.3}", error(&linear.full(&q, &k, &v, mask)?, &expected)));
        }
        let linear = &maps[2];

        let (mut out, mut workspace, mut exact_workspace) = (Array3::zeros(q.raw_dim()), linear.workspace(), exact.workspace());
        let per_query = |seconds: f64| format!("{:.1}", 1e6 * seconds / queries as f64);
        row.push(per_query(shortest(|| linear.full_into(&q, &k, &v, mask, &mut out, &mut workspace))?));
        row.push(per_query(shortest(|| exact.full_into(&q, &k, &v, mask, &mut out, &mut exact_workspace))?));

        // The memory once, without anybody to ask; then queries whose own keys are masked, which leaves the state as it is.
        let (mut state, mut cache) = (linear.new_state(), exact.new_cache());
        linear.prefill(&mut state, &Array3::zeros(k.raw_dim()), &k, &v, mask)?;
        exact.extend(&mut cache, &k, &v, mask, &mut exact_workspace)?;
        let nothing = Array3::zeros((HEADS, 1, DIM));
        let mut one = nothing.clone();
        let unseen = KeyMask::Valid(&[false]);
        let mut each_query = |read: &mut dyn FnMut(ArrayView3<'_, f32>, &mut Array3<f32>) -> Result<()>| {
            shortest(|| q.axis_chunks_iter(Axis(1), 1).try_for_each(|q| read(q, &mut one)))
        };
        row.push(per_query(each_query(&mut |q, out| {
            linear.prefill_into(&mut state, &q, &nothing, &nothing, unseen, out, &mut workspace)
        })?));
        row.push(per_query(each_query(&mut |q, out| {
            exact.prefill_into(&mut cache, &q, &nothing, &nothing, unseen, out, &mut exact_workspace)
        })?));
        table.add_row(row);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{queries} queries, {HEADS} heads of {DIM}, all threads\n{table}");
    println!("error: Σ|ô − o|² / Σ|o − ō|², o exact, ô linear; a plain mean of the values has about 1");
    Ok(())
}

/// Attention by a map for every head, centred on queries and keys if they are given.
fn attention(config: &DctMapConfig, centres: Option<(&Array3<f32>, &Array3<f32>)>) -> Result<LinearAttention<f32, DctMap<f32>>> {
    // Of the scaled vectors √σ·q and √σ·k, σ = 1/√d.
    let mean = |rows: ArrayView2<'_, f32>| -> Vec<f64> {
        let root = (DIM as f64).powf(-0.25);
        rows.columns().into_iter().map(|column| root * f64::from(column.sum()) / column.len() as f64).collect()
    };
    let map = |h: usize| {
        let mut params = config.clone().with_seed(h as u64).params()?;
        if let Some((q, k)) = centres {
            params.query.center = mean(q.index_axis(Axis(0), h));
            params.key.center = mean(k.index_axis(Axis(0), h));
        }
        DctMap::from_params(params)
    };
    LinearConfig::new().build((0..HEADS).map(map).collect::<Result<_>>()?)
}

/// Squared difference over the variance of what is expected, the mean of every head taken away.
fn error(found: &Array3<f32>, expected: &Array3<f32>) -> f64 {
    let squares = |rows: Array2<f32>| rows.iter().map(|&x| f64::from(x * x)).sum::<f64>();
    let heads = found.outer_iter().zip(expected.outer_iter());
    let (difference, variance) = heads.fold((0.0, 0.0), |(difference, variance), (found, expected)| {
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
