//! How good is the approximation?
//!
//! ```text
//! cargo run --release --example error_table [-- --seeds 5 --steps 60 --json --svg FILE]
//! ```
//!
//! For every feature map and m features, linear attention without a local window, causal, next to
//! softmax attention:
//!
//! ```text
//! error = Σ |ô − o|² / Σ |o − ō|²             o: a head's softmax outputs, ō: their mean,
//!                                             ô: its linear outputs
//! KL    = mean_i Σ_j p_ij ln(p_ij / r_ij)     p, r: the weights of softmax and of linear attention
//!                                             (in nats)
//! ```
//!
//! both averaged over heads, on queries, keys and values of a language model (after the rotary
//! embedding) and on Gaussian ones. Centres, φ and calibrated maps come from text (or draws) other
//! than what is measured on.

mod inputs;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
mod maps;
mod measure;
mod report;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;

/// Measures how far the linear attention of each feature map is from softmax attention.
#[derive(Debug, Parser)]
struct Args {
    /// Directory of a byte-level LLaMA-format model with valid.txt and calibration.txt.
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Features m, as multiples of the head dimension d.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8])]
    features: Vec<usize>,
    /// Tokens per window.
    #[arg(long, default_value_t = 256)]
    tokens: usize,
    /// Windows to measure on, spread over valid.txt.
    #[arg(long, default_value_t = 4)]
    windows: usize,
    /// Windows for centres, φ and calibration, spread over calibration.txt.
    #[arg(long, default_value_t = 48)]
    calibration_windows: usize,
    /// Seeds that random maps are averaged over; calibration has one.
    #[arg(long, default_value_t = 5)]
    seeds: usize,
    /// Steps of calibration by gradient.
    #[arg(long, default_value_t = 60)]
    steps: usize,
    /// Standard deviation of the coordinates of Gaussian queries and keys.
    #[arg(long, default_value_t = 1.0)]
    scale: f64,
    /// Threads; 0 means one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// One JSON object on stdout instead of the tables.
    #[arg(long)]
    json: bool,
    /// Where to write the plot.
    #[arg(long, default_value = "target/error_table.svg")]
    svg: PathBuf,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    for (option, value, least) in [
        ("features", args.features.iter().copied().min().unwrap_or(0), 1),
        ("tokens", args.tokens, 2),
        ("windows", args.windows, 1),
        ("calibration-windows", args.calibration_windows, 1),
        ("seeds", args.seeds, 1),
    ] {
        if value < least {
            return Err(format!("--{option} must be at least {least}, found {value}").into());
        }
    }
    if !(args.scale.is_finite() && args.scale > 0.0) {
        return Err(format!("--scale must be finite and positive, found {}", args.scale).into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?;
    let report = pool.install(|| measure::all(args))?;
    report::plot(&report, &args.svg)?;
    match args.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => report::print(&report, &args.svg),
    }
    Ok(())
}
