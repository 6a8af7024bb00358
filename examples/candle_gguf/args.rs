//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

/// Run a model in GGUF format with linear attention in place of softmax.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Plan windows and calibrate maps on a text; write them to a small file
    Plan(PlanArgs),
    /// Continue a prompt
    Run(RunArgs),
    /// Measure the speed of both attentions
    Bench(BenchArgs),
    /// Measure perplexity on a text
    Score(ScoreArgs),
}

/// What all commands need.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// The model, of the architecture llama; tokenizer.json beside it takes the place of its own
    /// vocabulary
    #[arg(long, value_name = "FILE")]
    pub(crate) model: PathBuf,
    /// Threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) threads: Option<u16>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// Text to calibrate on
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// File to write
    #[arg(long, value_name = "FILE")]
    pub(crate) maps: PathBuf,
    /// Half of the tokens that a local window holds, on average over all key-value heads
    #[arg(long, value_name = "N", default_value_t = 128.0)]
    pub(crate) average_window: f64,
    /// Tokens at the beginning that stay exact for every later query
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) sinks: usize,
    /// Windows of the text to calibrate on
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) windows: usize,
    /// Tokens per window of the text
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = at_least_1)]
    pub(crate) context: usize,
    /// For texts of at most --context tokens: a little better there, and of no use beyond
    #[arg(long)]
    pub(crate) bounded: bool,
    /// Steps of calibration by gradient, 0 for the closed form alone
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub(crate) steps: usize,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// What plan wrote
    #[arg(long, value_name = "FILE", required_unless_present = "softmax")]
    pub(crate) maps: Option<PathBuf>,
    /// candle's softmax attention instead
    #[arg(long, conflicts_with_all = ["maps", "resume", "save"])]
    pub(crate) softmax: bool,
    /// What to continue
    #[arg(long, value_name = "TEXT", required_unless_present = "prompt_file")]
    pub(crate) prompt: Option<String>,
    /// A file of what to continue
    #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub(crate) generate: usize,
    /// Go on after a token that ends a text
    #[arg(long)]
    pub(crate) endless: bool,
    /// Temperature of sampling; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.0)]
    pub(crate) temperature: f64,
    /// Seed of sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on from a state that --save wrote: the prompt comes after all that it has seen
    #[arg(long, value_name = "FILE")]
    pub(crate) resume: Option<PathBuf>,
    /// Write the state at the end
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
    /// Say how it goes after every so many tokens
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub(crate) report: Option<usize>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct BenchArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// What plan wrote [default: windows planned on the text, maps as they are made]
    #[arg(long, value_name = "FILE")]
    pub(crate) maps: Option<PathBuf>,
    /// Text to read
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens to read before the decoding that is timed, comma-separated
    #[arg(
        long, value_name = "N,…", value_delimiter = ',', default_values_t = [64, 2048, 8000],
        value_parser = at_least_1
    )]
    pub(crate) contexts: Vec<usize>,
    /// Tokens whose decoding is timed
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = at_least_1)]
    pub(crate) decode: usize,
    /// Times that everything is measured, in turns; medians are shown
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_1)]
    pub(crate) repeat: usize,
    /// Measure linear attention alone
    #[arg(long)]
    pub(crate) linear_only: bool,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct ScoreArgs {
    #[command(flatten)]
    pub(crate) common: Common,
    /// What plan wrote [default: candle's softmax attention]
    #[arg(long, value_name = "FILE")]
    pub(crate) maps: Option<PathBuf>,
    /// Its windows and sinks alone, with nothing behind them
    #[arg(long, requires = "maps")]
    pub(crate) alone: bool,
    /// Text to measure on
    #[arg(long, value_name = "FILE")]
    pub(crate) text: PathBuf,
    /// Tokens per window
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = at_least_1)]
    pub(crate) context: usize,
    /// Windows of the text to measure on
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = at_least_1)]
    pub(crate) windows: usize,
    /// Perplexity of every so many tokens of a window too
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub(crate) every: Option<usize>,
}

impl Args {
    /// Threads that were asked for.
    pub(crate) fn threads(&self) -> Option<u16> {
        match &self.command {
            Command::Plan(args) => args.common.threads,
            Command::Run(args) => args.common.threads,
            Command::Bench(args) => args.common.threads,
            Command::Score(args) => args.common.threads,
        }
    }
}

/// A number that is not 0.
fn at_least_1(text: &str) -> Result<usize, String> {
    let number: std::num::NonZeroUsize = text.parse().map_err(|error| format!("{error}"))?;
    Ok(number.get())
}
