//! How much faster are several ranks than one on one long sequence, and what do they say to each
//! other?
//!
//! Random queries, keys and values; first rank 0 computes the whole sequence alone, then every rank
//! does, each for itself, which shows what ranks of one machine take from each other, then all
//! together. One thread a rank:
//!
//! ```sh
//! RAYON_NUM_THREADS=1 mpirun -n 2 target/release/examples/mpi_speed --tokens 262144 --window 128
//! ```

mod start;

use std::error::Error;
use std::time::Instant;

use clap::Parser;
use dijiang::attention::{LinearAttention, LinearConfig, Operator, Qkv, Window};
use dijiang::kernel::{DctMap, DctMapConfig};
use dijiang_mpi::{Cost, Ranks, Scan, pieces};
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::CommunicatorCollectives;
use ndarray::Array3;

/// Tokens that the cost of one is measured on.
const SAMPLE: usize = 32_768;
/// Head dimension d, features m, value dimension e.
const D: usize = 64;

#[derive(Parser)]
struct Args {
    /// Tokens of the sequence.
    #[arg(long, default_value_t = 1 << 18)]
    tokens: usize,
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Tokens a chunk of the window, one chunk back; 0 for none.
    #[arg(long, default_value_t = 0)]
    window: usize,
    /// One all-gather of states in place of rounds.
    #[arg(long)]
    gather: bool,
    /// Pieces of one length.
    #[arg(long)]
    equal: bool,
    /// Calls that are timed; the fastest one counts.
    #[arg(long, default_value_t = 7)]
    repeat: usize,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    start::on_all_ranks(|world| run(&args, world))
}

fn run(args: &Args, world: &SimpleCommunicator) -> Result<(), Box<dyn Error>> {
    let ranks = Ranks::new(world).with_scan(if args.gather { Scan::Gather } else { Scan::Rounds });
    let (rank, size) = (ranks.rank(), ranks.size());

    let maps = (0..args.heads).map(|h| DctMapConfig::new().with_seed(h as u64).build(D));
    let mut config = LinearConfig::new();
    if args.window > 0 {
        config = config.with_window(Window::new(args.window, 1)).with_sinks(4);
    }
    let attention: LinearAttention<f32, DctMap<f32>> =
        config.build(maps.collect::<Result<_, _>>()?)?;

    let (alone, at_once) = whole(args, &attention, world)?;
    let [q, k, v] = arrays(args, SAMPLE, 0);
    let cost = ranks.measure(&attention, Qkv::new(&q, &k, &v))?;
    let ranks = ranks.with_cost(cost);
    let lengths = pieces(args.tokens, size, if args.equal { Cost::new(0.0, 0.0) } else { cost });
    let [q, k, v] = arrays(args, lengths[rank], rank as u64 + 1);
    let mut best = (f64::INFINITY, ranks.spent());
    for _ in 0..args.repeat {
        world.barrier();
        let (begun, before) = (Instant::now(), ranks.spent());
        ranks.prefill(&attention, &mut attention.new_state(), Qkv::new(&q, &k, &v))?;
        let seconds = begun.elapsed().as_secs_f64();
        if seconds < best.0 {
            best = (seconds, ranks.spent() - before);
        }
    }
    let (together, spent) = best;
    if rank == 0 {
        println!("{} tokens, {} heads, window {}", args.tokens, args.heads, args.window);
        println!("of a token's cost: keys {:.3}, queries {:.3}", cost.keys, cost.queries);
        println!(
            "1 rank {alone:.3} s, {size} ranks {together:.3} s: {:.2} times as fast ({:.2} times \
             as fast as with all ranks at the whole of it: {at_once:.3} s)",
            alone / together,
            at_once / together
        );
    }
    for turn in 0..size {
        world.barrier();
        if turn == rank {
            println!(
                "rank {rank}: {} tokens, {:.3} s waiting, {:.2} % of the time for states, {} \
                 bytes of them sent per head",
                lengths[rank],
                spent.waiting.as_secs_f64(),
                100.0 * spent.exchanging.as_secs_f64() / together,
                spent.bytes_sent / args.heads as u64
            );
        }
    }
    Ok(())
}

/// Seconds for the whole sequence, of rank 0 alone and of this rank with all of them at it.
fn whole(
    args: &Args,
    attention: &LinearAttention<f32, DctMap<f32>>,
    world: &SimpleCommunicator,
) -> dijiang::Result<(f64, f64)> {
    let [q, k, v] = arrays(args, args.tokens, world.rank() as u64);
    let best_of = |tries: usize| {
        (0..tries).try_fold(f64::INFINITY, |best, _| {
            let begun = Instant::now();
            attention.prefill(&mut attention.new_state(), Qkv::new(&q, &k, &v))?;
            Ok(best.min(begun.elapsed().as_secs_f64()))
        })
    };
    let alone = best_of(if world.rank() == 0 { args.repeat } else { 0 })?;
    world.barrier();
    Ok((alone, best_of(args.repeat)?))
}

/// Queries, keys and values of `tokens` tokens: numbers from −1 to 1.
fn arrays(args: &Args, tokens: usize, seed: u64) -> [Array3<f32>; 3] {
    let mut state = seed;
    [(); 3].map(|()| {
        Array3::from_shape_simple_fn((args.heads, tokens, D), || {
            // Steps of a linear congruential generator [Knuth, MMIX].
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
    })
}
