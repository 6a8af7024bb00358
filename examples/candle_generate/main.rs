//! A LLaMA written with candle generates text: with this crate's attention, and with its own
//! softmax attention beside it.
//!
//! ```sh
//! cargo run --release --features candle --example candle_generate
//! cargo run --release --features candle --example candle_generate -- \
//!     --weights target/candle_finetune.safetensors
//! ```

#[path = "../candle_common/mod.rs"]
#[allow(dead_code, reason = "each example uses its own part")]
mod common;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
mod softmax;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use candle_core::Device;
use clap::{Parser, ValueEnum};
use dijiang::checkpoint::Checkpoint;
use ndarray::aview1;
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};

use crate::common::convert;
use crate::common::llama::{Llama, Result, SelfAttention, with_tensors};
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::lm::tokens::{Token, Tokenizer};
use crate::lm::{generate, llama};
use crate::softmax::Softmax;

/// Generate text from a LLaMA-format model in candle, with linear attention in place of
/// softmax.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory of the model, with calibration.txt
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Weights that candle_finetune wrote, for the linear model
    #[arg(long, value_name = "FILE")]
    weights: Option<PathBuf>,
    /// Whose text to generate
    #[arg(long, value_enum, default_value_t = Which::Both)]
    attention: Which,
    /// What the text continues
    #[arg(long, value_name = "TEXT", default_value = "And it came to pass")]
    prompt: String,
    /// Tokens to generate
    #[arg(long, value_name = "N", default_value_t = 400)]
    generate: usize,
    /// Temperature of sampling; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.7)]
    temperature: f64,
    /// Seed of sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Windows of calibration.txt to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    samples: usize,
    /// Steps of calibration by gradient, 0 for the closed form alone
    #[arg(long, value_name = "N", default_value_t = 20)]
    steps: usize,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// Whose attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Which {
    Linear,
    Softmax,
    Both,
}

/// What one model wrote.
struct Generated {
    attention: &'static str,
    text: String,
    /// Read and written.
    tokens: usize,
    seconds_per_token: f64,
    cache_bytes: usize,
}

fn main() -> ExitCode {
    let args = Args::parse();
    lm::exit(run(&args).map(|generated| print(&args, &generated)))
}

fn run(args: &Args) -> Result<Vec<Generated>> {
    if args.prompt.is_empty() || !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err("--prompt must hold at least one byte, --temperature be at least 0".into());
    }
    let softmax = llama::Llama::load(&args.model)?;
    let tokenizer = softmax.tokenizer();
    let prompt = tokenizer.encode(args.prompt.clone().into(), Path::new("--prompt"))?.tokens;
    let progress = Progress::new();
    let mut generated = Vec::new();
    if args.attention != Which::Softmax {
        let context = softmax.config().context;
        let calibration =
            Text::read(&args.model.join("calibration.txt"), softmax.tokenizer(), context)?;
        let samples: Vec<_> = calibration.spread(args.samples).collect();
        progress.stage("calibrating", softmax.config().layers);
        let mut model =
            convert::linear(&args.model, &softmax, &samples, args.steps, || progress.tick())?;
        if let Some(path) = &args.weights {
            model = with_tensors(&model, &candle_core::safetensors::load(path, &Device::Cpu)?)?;
        }
        generated.push(continue_prompt("linear", &model, (tokenizer, &prompt), args, &progress)?);
    }
    if args.attention != Which::Linear {
        let (attention, context) =
            (Checkpoint::open(&args.model)?.attention_config(0)?, prompt.len() + args.generate);
        let model = Llama::load(&args.model, softmax.config().clone(), |_, weights| {
            Softmax::new(&attention, weights, context)
        })?;
        generated.push(continue_prompt("softmax", &model, (tokenizer, &prompt), args, &progress)?);
    }
    progress.finish();
    Ok(generated)
}

fn continue_prompt<A: SelfAttention>(
    attention: &'static str,
    model: &Llama<A>,
    (tokenizer, prompt): (&Tokenizer, &[Token]),
    args: &Args,
    progress: &Progress,
) -> Result<Generated> {
    progress.stage(attention, args.generate);
    let mut random = ChaCha12Rng::seed_from_u64(args.seed);
    let mut stream = model.stream()?;
    let mut logits = stream.read(prompt)?;
    let mut tokens = Vec::with_capacity(args.generate);
    let start = Instant::now();
    for _ in 0..args.generate {
        let token = generate::sample(aview1(&logits), args.temperature, random.random());
        tokens.push(token);
        logits = stream.read(&[token])?;
        progress.tick();
    }
    let seconds_per_token = start.elapsed().as_secs_f64() / args.generate.max(1) as f64;
    Ok(Generated {
        attention,
        text: tokenizer.decode(&tokens)?,
        tokens: prompt.len() + tokens.len(),
        seconds_per_token,
        cache_bytes: stream.bytes(),
    })
}

fn print(args: &Args, generated: &[Generated]) {
    if args.json {
        let models = generated.iter().map(|model| {
            serde_json::json!({
                "attention": model.attention, "text": model.text, "cache_bytes": model.cache_bytes,
                "microseconds_per_token": 1e6 * model.seconds_per_token,
            })
        });
        println!(
            "{}",
            serde_json::json!({ "prompt": args.prompt, "models": models.collect::<Vec<_>>() })
        );
        return;
    }
    for model in generated {
        let (tokens, bytes) = (model.tokens, model.cache_bytes as f64 / 1e3);
        println!(
            "--- {}: {:.0} tokens/s, {bytes:.0} kB after {tokens} tokens",
            model.attention,
            1.0 / model.seconds_per_token
        );
        println!("{}{}", args.prompt, model.text);
    }
}
