//! Does it hold for long, and whatever it is given?
//!
//! ```text
//! cargo run --release --example soak [-- --seconds 60 --tokens 1000000 --json]
//! ```
//!
//! Streams ten million tokens through an f32 state and, on the same stream, an f64 one, and tells
//! how far their outputs have drifted apart at every power of ten, and the process's memory there.
//! Then, for the rest of the time, gives hostile inputs to every public door and to the readers of
//! states and files, and compares the fast paths with the reference on random configurations: the
//! cases of `tests/common`. Counts what was accepted, the errors by kind, and panics.

#[allow(unreachable_pub, dead_code, reason = "shared with the tests")]
mod drift;
mod inputs;
mod memory;

use std::error::Error;
use std::time::{Duration, Instant};

use clap::Parser;
use comfy_table::{Table, presets};
use serde::Serialize;

/// Streams many tokens, then tries hostile inputs.
#[derive(Debug, Parser)]
struct Args {
    /// Tokens to stream. Not all of them, if they take more than four fifths of the time.
    #[arg(long, default_value_t = 10_000_000)]
    tokens: u64,
    /// Seconds in all.
    #[arg(long, default_value_t = 285)]
    seconds: u64,
    /// Seed of stream and inputs.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// One JSON object on stdout instead of the tables.
    #[arg(long)]
    json: bool,
}

/// Everything that was found.
#[derive(Debug, Serialize)]
struct Report {
    #[serde(flatten)]
    stream: drift::Stream,
    #[serde(flatten)]
    inputs: inputs::Inputs,
    peak_memory_kb: Option<u64>,
    seconds: f64,
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let args = Args::parse();
    let (start, time) = (Instant::now(), Duration::from_secs(args.seconds));
    let stream = drift::run(args.tokens, args.seed, start + time * 4 / 5)?;
    let inputs = inputs::run(args.seed, start + time);
    let report = Report {
        stream,
        inputs,
        peak_memory_kb: memory::peak_kb(),
        seconds: start.elapsed().as_secs_f64(),
    };
    match args.json {
        true => println!("{}", serde_json::to_string(&report)?),
        false => print(&report),
    }
    if report.inputs.panics > 0 { Err("some inputs panicked".into()) } else { Ok(()) }
}

fn print(report: &Report) {
    let Report { stream, inputs, peak_memory_kb, seconds } = report;
    println!(
        "{} tokens streamed at {:.0}/s, {}",
        stream.streamed_tokens, stream.tokens_per_second, stream.shape
    );
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header([
        "tokens",
        "drift",
        "bytes of state",
        "memory, kB",
    ]);
    for point in &stream.drift {
        let memory = point.memory_kb.map_or_else(|| "–".to_owned(), |kb| kb.to_string());
        table.add_row([
            point.tokens.to_string(),
            format!("{:.2e}", point.drift),
            point.state_bytes.to_string(),
            memory,
        ]);
    }
    println!(
        "{table}\n\n{} inputs in {seconds:.0} s: {} accepted, {} panics",
        inputs.inputs, inputs.accepted, inputs.panics
    );
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header(["refused with", "inputs"]);
    inputs.errors.iter().for_each(|(kind, count)| {
        table.add_row([(*kind).to_owned(), count.to_string()]);
    });
    println!("{table}\n\ncases: {:?}", inputs.cases);
    println!(
        "peak memory: {}",
        peak_memory_kb.map_or_else(|| "unknown".to_owned(), |kb| format!("{kb} kB"))
    );
}
