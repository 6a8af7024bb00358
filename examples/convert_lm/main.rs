//! Takes a trained byte-level language model of the LLaMA format, exchanges its softmax attention
//! for DCT-kernelized linear attention, and shows on real text what that costs.
//!
//! ```sh
//! cargo run --release --example convert_lm
//! cargo run --release --example convert_lm -- --help
//! ```

mod args;
mod convert;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
mod report;
#[cfg(test)]
mod tests;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rayon::ThreadPoolBuilder;

use crate::args::Args;
use crate::lm::error::{Error, Result};
use crate::lm::evaluate::{bits_per_byte, check_logits};
use crate::lm::generate::{Sampling, generate};
use crate::lm::llama::Llama;
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::report::{ChoiceReport, LayerReport, Report};

fn main() -> ExitCode {
    let args = Args::parse();
    lm::exit(run(&args).and_then(|report| report.print(args.json)))
}

fn run(args: &Args) -> Result<Report> {
    if args.prompt.is_empty() {
        return Err(Error::Option {
            option: "prompt",
            expected: "at least one byte long",
            found: "none".to_owned(),
        });
    }
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(Error::Option {
            option: "temperature",
            expected: "at least 0",
            found: args.temperature.to_string(),
        });
    }
    for (option, value) in [("budget", args.budget), ("seconds", args.seconds())] {
        if let Some(found) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
            return Err(Error::Option {
                option,
                expected: "finite and more than 0",
                found: found.to_string(),
            });
        }
    }
    ThreadPoolBuilder::new().num_threads(args.threads).build()?.install(|| measure(args))
}

fn measure(args: &Args) -> Result<Report> {
    let start = Instant::now();
    let progress = Progress::new();
    let tick = || progress.tick();

    progress.stage("softmax against golden logits", 1);
    let softmax = Llama::load(&args.model)?;
    let logits_difference = check_logits(&softmax, &args.model)?;

    let context = args.context.unwrap_or(softmax.config().context);
    if context == 0 {
        return Err(Error::Option {
            option: "context",
            expected: "at least 1",
            found: "0".to_owned(),
        });
    }
    let (text_path, calibration_path) = (args.text(), args.calibration_text());
    let text = Text::read(&text_path, context)?;
    let windows = if args.windows == 0 { text.windows() } else { args.windows.min(text.windows()) };
    let window = args.window(softmax.config().head_dim);

    let calibration = Text::read(&calibration_path, context)?;
    let samples: Vec<&[u8]> = calibration.spread(args.calibration_windows(context)).collect();
    progress.stage("calibrating", 3 * softmax.config().layers);
    let converted = convert::convert(&softmax, window, args, &samples, tick)?;

    let measured = |name, f: &dyn Fn() -> Result<f64>| {
        progress.stage(name, windows);
        f()
    };
    let softmax_bpb = measured("softmax", &|| bits_per_byte(&softmax, &text, windows, tick))?;
    let exchanged_bpb = measured("linear + window, as exchanged", &|| {
        bits_per_byte(&converted.exchanged, &text, windows, tick)
    })?;
    let closed_form_bpb = measured("linear + window, closed form", &|| {
        bits_per_byte(&converted.closed_form, &text, windows, tick)
    })?;
    let calibrated_bpb = measured("linear + window, calibrated", &|| {
        bits_per_byte(&converted.calibrated, &text, windows, tick)
    })?;
    let window_only_bpb =
        measured("window alone", &|| bits_per_byte(&converted.window_only, &text, windows, tick))?;
    let pure_bpb = measured("linear alone, calibrated", &|| {
        bits_per_byte(&converted.pure, &text, windows, tick)
    })?;

    progress.stage("generating", args.generate);
    let mut stream = converted.calibrated.stream();
    let sampling = Sampling { temperature: args.temperature, seed: args.seed };
    let (generated, seconds_per_token) =
        generate(&mut stream, args.prompt.as_bytes(), args.generate, &sampling, tick)?;
    let tokens = args.prompt.len() + args.generate;
    progress.finish();

    Ok(Report {
        model: args.model.display().to_string(),
        text: text_path.display().to_string(),
        windows,
        context,
        chunk: window.chunk,
        back: window.back,
        features: args.blocks * softmax.config().head_dim,
        softmax_bpb,
        exchanged_bpb,
        closed_form_bpb,
        calibrated_bpb,
        window_only_bpb,
        pure_bpb,
        logits_difference,
        calibration_tokens: samples.iter().map(|sample| sample.len()).sum(),
        steps: args.steps(),
        choices: converted.choices.iter().map(ChoiceReport::from).collect(),
        layers: converted.reports[0].iter().map(LayerReport::from).collect(),
        pure_layers: converted.reports[1].iter().map(LayerReport::from).collect(),
        calibration_seconds: converted.calibration_seconds,
        prompt: args.prompt.clone(),
        generated: String::from_utf8_lossy(&generated).into_owned(),
        tokens,
        tokens_per_second: if args.generate == 0 { 0.0 } else { 1.0 / seconds_per_token },
        state_bytes: stream.states().iter().map(|state| state.bytes()).sum(),
        kv_bytes: softmax.config().kv_cache_bytes(tokens),
        seconds: start.elapsed().as_secs_f64(),
    })
}
