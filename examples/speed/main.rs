//! How fast is it, and from how many tokens on does it beat softmax attention?
//!
//! ```text
//! cargo run --release --example speed [-- --threads 2 --json --svg FILE]
//! ```
//!
//! Measures microseconds per token and head for n tokens, f32, random inputs, against this crate's
//! tiled softmax attention in the same run, and the rate of the general matrix product as the
//! yardstick of the machine. With `--features candle` also against candle-nn's flash attention,
//! causal and in f32; ratios are then to the faster of the two.

mod flash;
mod gemm;
mod measure;
mod report;

use std::error::Error;
use std::path::PathBuf;

use clap::Parser;

/// Measures linear attention against softmax attention.
#[derive(Debug, Parser)]
struct Args {
    /// Threads to run on.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Query heads; without --windows, queries and keys have as many.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// A planned layer in place of two chunks of 64 tokens for all heads: the tokens that each of
    /// its key-value heads holds, of those on offer to a plan, and four sinks. Decoding is then
    /// measured with them too.
    #[arg(long, value_name = "N,…", value_delimiter = ',')]
    windows: Vec<usize>,
    /// Head dimension d = value dimension e = features m.
    #[arg(long, default_value_t = 64)]
    dim: usize,
    /// Element type.
    #[arg(long, default_value = "f32", value_parser = ["f32", "f64"])]
    dtype: String,
    /// Smallest number of tokens; doubled until --to.
    #[arg(long, default_value_t = 64)]
    from: usize,
    /// Largest number of tokens.
    #[arg(long, default_value_t = 16384)]
    to: usize,
    /// Where softmax attention stops being measured, to save time.
    #[arg(long, default_value_t = 16384)]
    softmax_to: usize,
    /// Seconds spent on each figure, at least one run.
    #[arg(long, default_value_t = 0.2)]
    seconds: f64,
    /// One JSON object on stdout instead of the table.
    #[arg(long)]
    json: bool,
    /// Where to write the plot.
    #[arg(long, default_value = "target/speed.svg")]
    svg: PathBuf,
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let args = Args::parse();
    if args.from == 0 || args.to < args.from || args.threads == 0 {
        return Err("--from must be at least 1 and at most --to, --threads at least 1".into());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(args.threads).build()?;
    let report = pool.install(|| match args.dtype.as_str() {
        "f64" => measure::all::<f64>(&args),
        _ => measure::all::<f32>(&args),
    })?;
    report::plot(&report, &args.svg)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        report::print(&report, &args.svg);
    }
    Ok(())
}
