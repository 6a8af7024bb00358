//! Fine-tunes the weights of exchanged attention layers without a training framework: layer by
//! layer, by regression on what the softmax model makes of the same text.
//!
//! Each layer reads the hidden states of the linear model so far and learns to bring them to those
//! of the softmax model: errors of earlier layers are corrected on the way. Gradients come from
//! `DijiangAttention::backward`, steps are Adam's.
//!
//! ```sh
//! cargo run --release --example fine_tune
//! cargo run --release --example fine_tune -- --pure
//! ```

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
mod regression;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{CalibrateOptions, Fit};
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::Array2;
use rayon::prelude::*;

use crate::lm::error::{Error, Result};
use crate::lm::evaluate::score;
use crate::lm::llama::{Forcing, Llama};
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::lm::tokens::Token;
use crate::regression::{Options, fit};

/// Exchange the attention of a LLaMA-format model, calibrate it, fine-tune its weights,
/// and measure each.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory of the model, with calibration.txt and valid.txt
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Windows of valid.txt to measure on; 0 means all
    #[arg(long, value_name = "N", default_value_t = 40)]
    windows: usize,
    /// Windows of calibration.txt to learn from; every eighth is held out
    #[arg(long, value_name = "N", default_value_t = 64)]
    samples: usize,
    /// Steps of calibration
    #[arg(long, value_name = "N", default_value_t = 100)]
    calibration_steps: usize,
    /// Steps of fine-tuning, per layer
    #[arg(long, value_name = "N", default_value_t = 100)]
    steps: usize,
    /// Windows in every step
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch: usize,
    /// Length of the first steps of fine-tuning, relative to the size of a matrix's elements
    #[arg(long, value_name = "X", default_value_t = 0.02)]
    learning_rate: f64,
    /// No exact local window, but decay: linear attention alone
    #[arg(long)]
    pure: bool,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let softmax = Llama::load(&args.model)?;
    let context = softmax.config().context;
    let valid = Text::read(&args.model.join("valid.txt"), softmax.tokenizer(), context)?;
    let windows =
        if args.windows == 0 { valid.windows() } else { args.windows.min(valid.windows()) };
    let text = Text::read(&args.model.join("calibration.txt"), softmax.tokenizer(), context)?;
    let samples: Vec<&[Token]> = text.spread(args.samples).collect();

    let progress = Progress::new();
    let start = Instant::now();
    progress.stage("calibrating", softmax.config().layers);
    let calibrated = calibrate(&softmax, &samples, args, || progress.tick())?;
    let calibration_seconds = start.elapsed().as_secs_f64();
    let start = Instant::now();
    progress.stage("fine-tuning", softmax.config().layers * args.steps);
    let tuned = fine_tune(&softmax, &calibrated, &samples, args, || progress.tick())?;
    let seconds = start.elapsed().as_secs_f64();

    progress.stage("measuring", 3 * windows);
    let tick = || progress.tick();
    let softmax_bpb = score(&softmax, &valid, windows, tick)?.bits_per_byte();
    let calibrated_bpb = score(&calibrated, &valid, windows, tick)?.bits_per_byte();
    let tuned_bpb = score(&tuned, &valid, windows, tick)?.bits_per_byte();
    progress.finish();
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "softmax_bpb": softmax_bpb, "calibrated_bpb": calibrated_bpb,
                "fine_tuned_bpb": tuned_bpb, "windows": windows,
                "tokens": samples.iter().map(|sample| sample.len()).sum::<usize>(),
                "calibration_seconds": calibration_seconds, "fine_tuning_seconds": seconds,
            })
        );
    } else {
        println!("bits per byte on {windows} windows of {context} tokens");
        println!("  softmax      {softmax_bpb:.4}");
        println!("  calibrated   {calibrated_bpb:.4}   maps only, {calibration_seconds:.0} s");
        println!("  fine-tuned   {tuned_bpb:.4}   and q, k, v, o, {seconds:.0} s");
    }
    Ok(())
}

/// Exchanges every layer and calibrates its maps on the softmax model's hidden states.
fn calibrate(
    softmax: &Llama<SoftmaxAttention<f32>>,
    samples: &[&[Token]],
    args: &Args,
    tick: impl Fn(),
) -> Result<Llama<DijiangAttention<f32>>> {
    let window = (!args.pure).then(|| Window::new(64, 1));
    let decay = if args.pure { Fit::Train } else { Fit::Keep };
    let options = CalibrateOptions::new()
        .with_steps(args.calibration_steps)
        .with_batch(args.batch)
        .with_decay(decay);
    softmax.exchange_on(samples, Forcing::Teacher, |l, layer, inputs| {
        let exchanged =
            DijiangAttention::from_softmax(layer, DijiangOptions::new().with_window(window));
        let mut linear = exchanged.map_err(Error::in_layer(l))?;
        linear
            .calibrate(inputs, &options, |_| ControlFlow::Continue(()))
            .map_err(Error::in_layer(l))?;
        tick();
        Ok(linear)
    })
}

/// The weights of every layer, first block first.
fn fine_tune(
    softmax: &Llama<SoftmaxAttention<f32>>,
    calibrated: &Llama<DijiangAttention<f32>>,
    samples: &[&[Token]],
    args: &Args,
    tick: impl Fn() + Sync,
) -> Result<Llama<DijiangAttention<f32>>> {
    let mut model = calibrated.exchange(|layer| Ok(layer.clone()))?;
    let (mut teacher, mut student) = (softmax.walk(samples), model.walk(samples));
    let options =
        Options { steps: args.steps, batch: args.batch, learning_rate: args.learning_rate };
    let mut tuned = Vec::new();
    while let Some(l) = teacher.layer() {
        let exact = &softmax.attention()[l];
        let inputs = teacher.inputs();
        let outputs = inputs.par_iter().map(|input| exact.forward(input, KeyMask::All));
        let outputs: Vec<Array2<f32>> =
            outputs.collect::<dijiang::Result<_>>().map_err(Error::in_layer(l))?;
        // What leads from the student's hidden states to the teacher's.
        let targets = outputs.iter().zip(teacher.hidden()).zip(student.hidden());
        let targets = targets.map(|((output, teacher), student)| output + teacher - student);
        let pairs: Vec<_> = student.inputs().into_iter().zip(targets).collect();
        let layer =
            fit(&calibrated.attention()[l], &pairs, &options, &tick).map_err(Error::in_layer(l))?;
        teacher.advance_with(|window, _| Ok(outputs[window].clone()))?;
        student.advance(&layer)?;
        tuned.push(layer);
    }
    drop(student);
    for (layer, tuned) in model.attention_mut().iter_mut().zip(tuned) {
        *layer = tuned;
    }
    Ok(model)
}
