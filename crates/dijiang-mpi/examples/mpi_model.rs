//! A model, on paper, of time against ranks: what one process measures, extended to many of them on
//! a network. Runs without `mpirun`:
//!
//! ```sh
//! RAYON_NUM_THREADS=1 cargo run --release --example mpi_model
//! ```
//!
//! ```text
//! T(P) = n·t·(1 + κ) / (P + κ − ρκ) + ⌈log₂ P⌉·(L + 8·S/B + M)
//! ```
//!
//! with t the time of a token, κ and ρ the keys' and the second look's share of it, S the bytes of
//! a state, M the time to read, merge twice and write one, L and B latency and bandwidth.

mod start;

use std::error::Error;
use std::time::Instant;

use clap::Parser;
use dijiang::attention::{KeyMask, LinearConfig, Operator, Qkv, Storage, Window};
use dijiang::kernel::DctMapConfig;
use dijiang_mpi::{Cost, Ranks};
use ndarray::Array3;

const D: usize = 64;
/// Tokens that are measured.
const SAMPLE: usize = 32_768;
/// Seconds until a message arrives, whatever its length.
const LATENCY: f64 = 20e-6;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 8)]
    heads: usize,
}

/// What one process measures, all heads together.
struct Measured {
    /// Seconds a token.
    token: f64,
    cost: Cost,
    /// Bytes of a state.
    state: f64,
    /// Seconds to read a state, merge it twice and write it.
    merge: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    start::on_all_ranks(|world| run(&args, &Ranks::new(world)))
}

fn run(args: &Args, ranks: &Ranks) -> Result<(), Box<dyn Error>> {
    for window in [0, 128] {
        let found = measure(ranks, args.heads, window)?;
        println!("\n{} heads, d = m = {D}, window {window}:", args.heads);
        println!(
            "{:.3} µs a token and head, keys {:.2}, queries {:.2} of it; a state of \
             {:.0} kB a head, {:.2} ms to merge\n",
            1e6 * found.token / args.heads as f64,
            found.cost.keys,
            found.cost.queries,
            found.state / args.heads as f64 / 1e3,
            1e3 * found.merge
        );
        println!("| tokens | Gbit/s | 1 rank | 4 | 16 | 64 | 256 | communication takes 10 % at |");
        println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
        for (tokens, gigabits) in
            [(1 << 20, 10.0), (1 << 20, 100.0), (1 << 24, 10.0), (1 << 24, 100.0)]
        {
            let time = |ranks| found.time(tokens as f64, gigabits, ranks);
            let row = [1, 4, 16, 64, 256].map(|ranks| {
                let (computing, talking) = time(ranks);
                format!("{:.3} s", computing + talking)
            });
            let limit = (2..1 << 20).find(|&ranks| {
                let (computing, talking) = time(ranks);
                talking > 0.1 * (computing + talking)
            });
            let limit = limit.map_or("none".into(), |ranks| format!("{ranks} ranks"));
            println!("| {} M | {gigabits} | {} | {limit} |", tokens >> 20, row.join(" | "));
        }
    }
    Ok(())
}

impl Measured {
    /// Seconds of computing and of communication.
    fn time(&self, n: f64, gigabits: f64, ranks: usize) -> (f64, f64) {
        let Self { token, cost: Cost { keys, queries, .. }, state, merge } = self;
        if ranks == 1 {
            return (n * token, 0.0);
        }
        let longest = n / (ranks as f64 + keys - queries * keys);
        let rounds = f64::from(ranks.next_power_of_two().ilog2());
        let message = LATENCY + 8.0 * state / (gigabits * 1e9) + merge;
        (longest * token * (1.0 + keys), rounds * message)
    }
}

fn measure(ranks: &Ranks, heads: usize, window: usize) -> Result<Measured, Box<dyn Error>> {
    let maps = (0..heads).map(|h| DctMapConfig::new().with_seed(h as u64).build::<f32>(D));
    let mut config = LinearConfig::new();
    if window > 0 {
        config = config.with_window(Window::new(window, 1)).with_sinks(4);
    }
    let attention = config.build(maps.collect::<dijiang::Result<Vec<_>>>()?)?;
    let element = |(h, i, j)| ((h + 3 * i + 5 * j) % 17) as f32 / 8.0 - 1.0;
    let x = Array3::from_shape_fn((heads, SAMPLE, D), element);
    let qkv = Qkv::new(&x, &x, &x);
    let cost = ranks.measure(&attention, qkv)?;
    let mut state = attention.new_state();
    let all = seconds(|| attention.prefill(&mut state, qkv).map(drop))?;

    let mut workspace = attention.workspace();
    let mut next = attention.new_state_at(state.position())?;
    attention.extend(&mut next, (&x, &x), KeyMask::All, &mut workspace)?;
    let bytes = next.to_bytes(Storage::Exact);
    let merge = seconds(|| {
        let next = attention.state_from_bytes(&bytes)?;
        for _ in 0..2 {
            attention.merge(&mut state.clone(), &next, &mut workspace)?;
        }
        state.to_bytes(Storage::Exact);
        Ok(())
    })?;
    Ok(Measured { token: all / SAMPLE as f64, cost, state: bytes.len() as f64, merge })
}

/// The fastest of three runs.
fn seconds(mut work: impl FnMut() -> dijiang::Result<()>) -> dijiang::Result<f64> {
    let mut best = f64::INFINITY;
    for _ in 0..3 {
        let begun = Instant::now();
        work()?;
        best = best.min(begun.elapsed().as_secs_f64());
    }
    Ok(best)
}
