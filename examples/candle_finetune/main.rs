//! Trains a whole LLaMA written with candle after its attention was exchanged: maps calibrated
//! first, then AdamW on every weight with candle's autograd, to whose graph this crate's attention
//! and its gradients belong.
//!
//! The loss is the divergence from the softmax model's likelihoods (`--loss teacher`): the small
//! model that comes with this crate knows its training text by heart (1.05 bits per byte there, 1.6
//! on unseen text), so that the text itself (`--loss text`) has nothing to teach it but to forget
//! the rest. The numbers of the maps, which the exchange brought in, take longer steps than the
//! trained weights.
//!
//! ```sh
//! cargo run --release --features candle --example candle_finetune
//! # Goes on from target/candle_finetune.safetensors:
//! cargo run --release --features candle --example candle_finetune -- --resume
//! ```

mod adamw;
mod checkpoint;
#[path = "../candle_common/mod.rs"]
#[allow(dead_code, reason = "each example uses its own part")]
mod common;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{Device, Tensor, Var};
use candle_nn::loss::{cross_entropy, nll};
use candle_nn::ops::log_softmax;
use clap::{Parser, ValueEnum};
use dijiang::candle::CandleAttention;
use dijiang::layer::SoftmaxAttention;
use indicatif::{ProgressBar, ProgressStyle};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::adamw::AdamW;
use crate::common::convert;
use crate::common::llama::{Llama, Result, batch, detached};
use crate::lm::text::Text;
use crate::lm::{evaluate, llama};

/// Exchange the attention of a LLaMA-format model, calibrate it, and fine-tune all
/// weights with candle.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory of the model, with calibration.txt and valid.txt
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Tokens of calibration.txt to train on, in random order; it is read again if they are more
    /// than it has
    #[arg(long, value_name = "N", default_value_t = 200_000)]
    tokens: usize,
    /// What to learn: what the softmax model says of the text, or the text itself
    #[arg(long, value_enum, default_value_t = Loss::Teacher)]
    loss: Loss,
    /// Tokens per sequence [default: the model's max_position_embeddings]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Sequences in every step
    #[arg(long, value_name = "N", default_value_t = 2)]
    batch: usize,
    /// Length of the longest steps of the weights; it rises to this over the first tenth and falls
    /// to 0 as half a cosine
    #[arg(long, value_name = "X", default_value_t = 2e-5)]
    learning_rate: f64,
    /// The same for the numbers of the maps
    #[arg(long, value_name = "X", default_value_t = 1e-2)]
    map_learning_rate: f64,
    /// Windows of calibration.txt to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    samples: usize,
    /// Steps of calibration by gradient, 0 for the closed form alone
    #[arg(long, value_name = "N", default_value_t = 20)]
    calibration_steps: usize,
    /// Windows of valid.txt to measure on; 0 means all
    #[arg(long, value_name = "N", default_value_t = 20)]
    windows: usize,
    /// Steps between two measurements, each of which writes a checkpoint
    #[arg(long, value_name = "N", default_value_t = 20)]
    every: usize,
    /// Where checkpoints go
    #[arg(long, value_name = "FILE", default_value = "target/candle_finetune.safetensors")]
    checkpoint: PathBuf,
    /// Go on from the checkpoint
    #[arg(long)]
    resume: bool,
    /// Seed of the order of the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What is learned from a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Loss {
    Teacher,
    Text,
}

/// What came out.
#[derive(Debug, Serialize)]
struct Report {
    /// Bits per byte on valid.txt of the softmax model.
    softmax_bpb: f64,
    /// Of the linear model before fine-tuning, after calibration.
    calibrated_bpb: f64,
    /// After fine-tuning.
    fine_tuned_bpb: f64,
    measurements: Vec<Measurement>,
    parameters: usize,
    windows: usize,
    context: usize,
    seconds: f64,
}

/// One look at a run.
#[derive(Debug, Clone, Serialize)]
struct Measurement {
    /// Tokens trained on.
    tokens: usize,
    /// Bits per byte of the text trained on since the last look.
    training_bpb: f64,
    /// Bits per byte on valid.txt.
    valid_bpb: f64,
}

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let report = train(args)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!("bits per byte on {} windows of {} tokens", report.windows, report.context);
        println!("  softmax      {:.4}", report.softmax_bpb);
        println!("  calibrated   {:.4}   maps only", report.calibrated_bpb);
        println!(
            "  fine-tuned   {:.4}   {} parameters, {:.0} s",
            report.fine_tuned_bpb, report.parameters, report.seconds
        );
    }
    Ok(())
}

fn train(args: &Args) -> Result<Report> {
    let positive = |rate: f64| rate.is_finite() && rate > 0.0;
    let softmax = llama::Llama::load(&args.model)?;
    let context = args.context.unwrap_or(softmax.config().context);
    if context == 0
        || args.batch == 0
        || args.every == 0
        || !positive(args.learning_rate)
        || !positive(args.map_learning_rate)
    {
        return Err("--context, --batch, --every and the learning rates must be more than 0".into());
    }
    let valid = Text::read(&args.model.join("valid.txt"), softmax.tokenizer(), context)?;
    let text = Text::read(&args.model.join("calibration.txt"), softmax.tokenizer(), context)?;
    let windows =
        if args.windows == 0 { valid.windows() } else { args.windows.min(valid.windows()) };
    let steps = args.tokens.div_ceil(args.batch * context);

    let bar = ProgressBar::new(softmax.config().layers as u64);
    bar.set_style(ProgressStyle::with_template(
        "{msg:44} {wide_bar} {pos}/{len} {elapsed} (left: {eta})",
    )?);
    bar.set_message("calibrating");
    let samples: Vec<_> = text.spread(args.samples).collect();
    let calibrated =
        convert::linear(&args.model, &softmax, &samples, args.calibration_steps, || bar.inc(1))?;
    let mut vars = Vec::new();
    let model = calibrated.try_map(|name, tensor| {
        let var = Var::from_tensor(tensor)?;
        vars.push((name.to_owned(), var.clone()));
        Ok(var.into_inner())
    })?;
    let parameters = vars.iter().map(|(_, var)| var.elem_count()).sum();
    let mut optimizer = AdamW::new(vars, args.map_learning_rate / args.learning_rate)?;
    let taught = f64::from(u8::from(args.loss == Loss::Teacher));
    let settings = [
        steps as f64,
        args.batch as f64,
        context as f64,
        args.learning_rate,
        args.map_learning_rate,
        args.seed as f64,
        taught,
    ];

    bar.set_message("measuring");
    let softmax_bpb = evaluate::score(&softmax, &valid, windows, || ())?.bits_per_byte();
    let calibrated_bpb = bits_per_byte(&calibrated, &valid, windows)?;
    if args.resume {
        checkpoint::resume(&args.checkpoint, &mut optimizer, &settings)?;
    }
    let say = |line: String| {
        if !args.json {
            bar.suspend(|| println!("{line}"))
        }
    };
    say(format!("{:>9} tokens: {calibrated_bpb:.4} bits/byte on valid.txt, calibrated", 0));
    if args.resume {
        let tokens = optimizer.step * args.batch * context;
        say(format!("{tokens:>9} tokens: going on from {}", args.checkpoint.display()));
    }

    let order = order(text.windows(), steps * args.batch, args.seed);
    bar.set_length(steps as u64);
    bar.reset_eta();
    let start = Instant::now();
    let (mut measurements, mut losses): (Vec<Measurement>, Vec<f64>) = (Vec::new(), Vec::new());
    while optimizer.step < steps {
        let step = optimizer.step;
        bar.set_position(step as u64);
        let chosen = &order[step * args.batch..(step + 1) * args.batch];
        let (loss, nats) = match args.loss {
            Loss::Teacher => teacher_loss(&model, &softmax, &text, chosen)?,
            Loss::Text => text_loss(&model, &text, chosen)?,
        };
        let bytes = chosen.iter().map(|&k| text.target_bytes(k)).sum::<usize>();
        let bits = nats / std::f64::consts::LN_2 * ((args.batch * context) as f64 / bytes as f64);
        if !bits.is_finite() {
            return Err(format!(
                "the loss of step {step} is {bits}: the learning rate is too high"
            )
            .into());
        }
        losses.push(bits);
        bar.set_message(format!("fine-tuning: {bits:.4} bits/byte"));
        optimizer.step(&loss.backward()?, rate(step, steps, args.learning_rate))?;
        if optimizer.step.is_multiple_of(args.every) || optimizer.step == steps {
            let training_bpb = losses.iter().sum::<f64>() / losses.len() as f64;
            losses.clear();
            let valid_bpb = bits_per_byte(&detached(&model)?, &valid, windows)?;
            checkpoint::save(&args.checkpoint, &optimizer, &settings)?;
            let tokens = optimizer.step * args.batch * context;
            say(format!(
                "{tokens:>9} tokens: {valid_bpb:.4} bits/byte on valid.txt, {training_bpb:.4} in \
                 training"
            ));
            measurements.push(Measurement { tokens, training_bpb, valid_bpb });
        }
    }
    bar.finish_and_clear();
    let fine_tuned_bpb = match measurements.last() {
        Some(last) => last.valid_bpb,
        None => bits_per_byte(&detached(&model)?, &valid, windows)?,
    };
    let seconds = start.elapsed().as_secs_f64();
    Ok(Report {
        softmax_bpb,
        calibrated_bpb,
        fine_tuned_bpb,
        measurements,
        parameters,
        windows,
        context,
        seconds,
    })
}

/// Mean −ln of the likelihood of every next token in these windows, as a tensor and as a number.
fn text_loss(
    model: &Llama<CandleAttention>,
    text: &Text,
    windows: &[usize],
) -> Result<(Tensor, f64)> {
    let inputs: Vec<_> = windows.iter().map(|&k| text.input(k)).collect();
    let loss =
        cross_entropy(&model.forward(&batch(&inputs)?)?.flatten_to(1)?, &targets(text, windows)?)?;
    let nats = f64::from(loss.to_scalar::<f32>()?);
    Ok((loss, nats))
}

/// Mean divergence of the model's likelihoods of every token from those of the softmax model, Σ p
/// ln(p/q); and as a number, what [`text_loss`] is.
fn teacher_loss(
    model: &Llama<CandleAttention>,
    softmax: &llama::Llama<SoftmaxAttention<f32>>,
    text: &Text,
    windows: &[usize],
) -> Result<(Tensor, f64)> {
    let inputs: Vec<_> = windows.iter().map(|&k| text.input(k)).collect();
    let taught = inputs.iter().map(|input| {
        let logits = softmax.forward(input)?;
        Ok(Tensor::from_vec(logits.iter().copied().collect(), logits.dim(), &Device::Cpu)?)
    });
    let taught = log_softmax(&Tensor::cat(&taught.collect::<Result<Vec<_>>>()?, 0)?, 1)?;
    let learned = log_softmax(&model.forward(&batch(&inputs)?)?.flatten_to(1)?, 1)?;
    let loss = (taught.exp()? * (&taught - &learned)?)?.sum(1)?.mean_all()?;
    Ok((loss, f64::from(nll(&learned.detach(), &targets(text, windows)?)?.to_scalar::<f32>()?)))
}

/// For every token of these windows the token after it.
fn targets(text: &Text, windows: &[usize]) -> candle_core::Result<Tensor> {
    batch(&windows.iter().map(|&k| text.targets(k)).collect::<Vec<_>>())?.flatten_all()
}

/// Over the first `windows` windows, each read on its own from its beginning.
fn bits_per_byte(model: &Llama<CandleAttention>, text: &Text, windows: usize) -> Result<f64> {
    let nats = (0..windows).map(|k| Ok(text_loss(model, text, &[k])?.1)).sum::<Result<f64>>()?;
    let bytes: usize = (0..windows).map(|k| text.target_bytes(k)).sum();
    Ok(nats * text.window() as f64 / bytes as f64 / std::f64::consts::LN_2)
}

/// `count` windows, each as often as any other but for the last round.
fn order(windows: usize, count: usize, seed: u64) -> Vec<usize> {
    let mut random = ChaCha12Rng::seed_from_u64(seed);
    let mut order = Vec::with_capacity(count + windows);
    while order.len() < count {
        let mut round: Vec<usize> = (0..windows).collect();
        round.shuffle(&mut random);
        order.append(&mut round);
    }
    order
}

/// Length of a step: up to `longest` over the first tenth of the steps, then down to 0.
fn rate(step: usize, steps: usize, longest: f64) -> f64 {
    let warm = steps.div_ceil(10);
    if step < warm {
        return longest * (step + 1) as f64 / warm as f64;
    }
    let done = (step - warm) as f64 / (steps - warm).max(1) as f64;
    longest * 0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}
