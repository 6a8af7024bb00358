//! One long sequence over several workers that share nothing but messages: how far are their
//! outputs from those of one worker?
//!
//! Each worker sums up its own segment, waits for the state of everything before it, hands on that
//! of everything up to its end, and computes its outputs. Here workers are threads and messages go
//! through channels; they are bytes, so that sockets do just as well, or MPI: see
//! `crates/dijiang-mpi`.
//!
//! ```sh
//! cargo run --release --example sequence_parallel
//! ```

use std::ops::Range;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use comfy_table::Table;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use dijiang::attention::{KeyMask, Storage};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use ndarray::{Array, Array2, ArrayView2, Axis, concatenate, s};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

/// Model dimension D: 2 heads of 32.
const D: usize = 64;
const TOKENS: usize = 3000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut random = ChaCha12Rng::seed_from_u64(7);
    let mut normal = |rows: usize, scale: f32| -> Array2<f32> {
        Array::from_shape_simple_fn((rows, D), || {
            let x: f32 = StandardNormal.sample(&mut random);
            scale * x
        })
    };
    let config = AttentionConfig::new(D, 2).with_rotary(Rotary::new(10_000.0));
    let weights =
        AttentionWeights::new(normal(D, 0.2), normal(D, 0.2), normal(D, 0.2), normal(D, 0.2));
    let layer = DijiangAttention::from_softmax(
        &SoftmaxAttention::new(config, weights)?,
        DijiangOptions::new(),
    )?;
    let x = normal(TOKENS, 1.0);

    let alone = layer.forward(&x, KeyMask::All)?;
    let largest = alone.iter().fold(0.0, |top: f32, y| top.max(y.abs()));
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED);
    table.set_header([
        "workers",
        "tokens per worker",
        "kB handed on by each",
        "largest difference, of the largest output",
    ]);
    for workers in [1, 2, 3, 8] {
        let (outputs, bytes) = together(&layer, &x, workers)?;
        let difference = outputs
            .iter()
            .zip(&alone)
            .fold(0.0, |top: f32, (y, expected)| top.max((y - expected).abs()));
        let row = [
            workers.to_string(),
            (TOKENS / workers).to_string(),
            (bytes / 1000).to_string(),
            format!("{:.1e}", difference / largest),
        ];
        table.add_row(row);
        assert!(difference <= 1e-5 * largest, "rounding only");
    }
    println!("{table}");
    Ok(())
}

/// The layer's outputs, computed by `workers` threads, and the bytes of a message.
fn together(
    layer: &DijiangAttention<f32>,
    x: &Array2<f32>,
    workers: usize,
) -> dijiang::Result<(Array2<f32>, usize)> {
    let segments: Vec<Range<usize>> =
        (0..workers).map(|i| i * TOKENS / workers..(i + 1) * TOKENS / workers).collect();
    let message = layer.new_state().to_bytes(Storage::Exact);
    let (first, mut from_left) = channel();
    let bytes = message.len();
    // Before the first token nothing has been seen.
    let _ = first.send(message);
    let outputs = thread::scope(|scope| {
        let mut running = Vec::new();
        for segment in segments {
            let ((to_right, next), start) = (channel(), segment.start);
            let (own, left) = (x.slice(s![segment, ..]), std::mem::replace(&mut from_left, next));
            running.push(scope.spawn(move || worker(layer, start, own, &left, &to_right)));
        }
        running
            .into_iter()
            .map(|worker| worker.join().expect("no worker panics"))
            .collect::<dijiang::Result<Vec<_>>>()
    })?;
    let views: Vec<_> = outputs.iter().map(|rows| rows.view()).collect();
    Ok((concatenate(Axis(0), &views).expect("as many columns"), bytes))
}

/// One worker's part: outputs of the tokens from position `start` on.
fn worker(
    layer: &DijiangAttention<f32>,
    start: usize,
    x: ArrayView2<'_, f32>,
    from_left: &Receiver<Vec<u8>>,
    to_right: &Sender<Vec<u8>>,
) -> dijiang::Result<Array2<f32>> {
    let mut own = layer.new_state_at(start)?;
    layer.extend(&mut own, &x, KeyMask::All)?;
    // A neighbour that has failed has nothing to hand on; its error is reported, not this one.
    let message = from_left.recv().unwrap_or_default();
    let mut before = layer.state_from_bytes(&message)?;
    let mut whole = before.clone();
    layer.merge(&mut whole, &own)?;
    // Nobody listens to the last one.
    let _ = to_right.send(whole.to_bytes(Storage::Exact));
    layer.prefill(&mut before, &x, KeyMask::All)
}
