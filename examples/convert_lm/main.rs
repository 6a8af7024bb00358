//! Takes a trained language model of the LLaMA format, exchanges its softmax attention for
//! DCT-kernelized linear attention, and shows on real text what that costs.
//!
//! ```sh
//! cargo run --release --example convert_lm
//! cargo run --release --example convert_lm -- --model path/to/model --context 2048 --windows 8 \
//!     --text text --calibration other-text
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

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dijiang::calibrate::HeadPlan;
use dijiang::checkpoint::save_maps;
use dijiang::layer::Attention;
use rayon::ThreadPoolBuilder;

use crate::args::{Args, Row};
use crate::convert::convert;
use crate::lm::error::{Error, Result};
use crate::lm::evaluate::{check_logits, score};
use crate::lm::generate::{Sampling, generate};
use crate::lm::llama::Llama;
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::lm::tokens::Token;
use crate::report::{LayerReport, PlanReport, Report, RowReport};

fn main() -> ExitCode {
    let args = Args::parse();
    lm::exit(run(&args).and_then(|report| report.print(args.json)))
}

fn run(args: &Args) -> Result<Report> {
    args.check()?;
    ThreadPoolBuilder::new().num_threads(args.threads).build()?.install(|| measure(args))
}

fn measure(args: &Args) -> Result<Report> {
    let start = Instant::now();
    let progress = Progress::new();

    progress.stage("softmax against golden logits", 1);
    let softmax = Llama::load(&args.model)?;
    let logits_difference = check_logits(&softmax, &args.model)?;

    let context = args.context.unwrap_or(softmax.config().context);
    let text_path = args.text()?;
    let text = Text::read(&text_path, softmax.tokenizer(), context)?;
    let windows = if args.windows == 0 { text.windows() } else { args.windows.min(text.windows()) };
    let window = args.window(softmax.config().head_dim);
    let prompt = softmax.tokenizer().encode(args.prompt.clone().into(), Path::new("--prompt"))?;
    let prompt = prompt.tokens;

    let calibrated = args.rows().iter().any(|row| !matches!(row, Row::Softmax | Row::Window));
    let calibration = match calibrated {
        true => Some(Text::read(&args.calibration()?, softmax.tokenizer(), context)?),
        false => None,
    };
    let samples: Vec<_> = calibration
        .iter()
        .flat_map(|text| text.spread(args.calibration_windows(context)))
        .collect();
    progress.stage("calibrating", args.walks() * softmax.config().layers);
    let converted = convert(&softmax, window, args, &samples, || progress.tick())?;

    let mut measurement =
        Measurement { text: &text, windows, progress: &progress, rows: Vec::new() };
    for row in args.rows() {
        match row {
            Row::Softmax => {
                let bytes = softmax.config().kv_cache_bytes(context);
                measurement.add(row, &softmax, bytes)?;
            }
            Row::Window => {
                // As many bytes as the planned rows.
                let window = converted.window_alone.map_or(window, |tokens| args.window_of(tokens));
                let windows = || vec![window];
                let model =
                    softmax.exchange(|layer| layer.clone().with_windows(windows(), args.sinks))?;
                let held = context.min(window.tokens() + args.sinks);
                measurement.add(row, &model, model.config().kv_cache_bytes(held))?;
            }
            Row::PlannedWindow => {
                let Some(plan) = &converted.plan_alone else { continue };
                let mut model = softmax.exchange(|layer| Ok(layer.clone()))?;
                for (l, layer) in model.attention_mut().iter_mut().enumerate() {
                    let windowed = layer.clone().with_windows(plan.windows(l)?, plan.sinks());
                    *layer = windowed.map_err(Error::in_layer(l))?;
                }
                let held = |head: &HeadPlan| context.min(head.window.tokens() + plan.sinks());
                let tokens: usize = plan.layers().iter().flatten().map(held).sum();
                let heads: usize = plan.layers().iter().map(Vec::len).sum();
                measurement.add(row, &model, model.config().kv_cache_bytes(1) * tokens / heads)?;
            }
            _ => {
                for linear in converted.linear.iter().filter(|linear| linear.row == row) {
                    let states = linear.model.attention().iter().map(Attention::new_state);
                    let bytes = states.map(|state| state.bytes()).sum();
                    measurement.add(row, &linear.model, bytes)?;
                }
            }
        }
    }
    let rows = measurement.rows;

    let writer = converted.linear.iter().rfind(|linear| linear.row != Row::Pure);
    if let (Some(path), Some(linear)) = (&args.save, writer) {
        let maps = save_maps(linear.model.attention())?;
        std::fs::write(path, maps).map_err(|source| Error::Io { path: path.clone(), source })?;
    }
    let (generated, seconds_per_token) = match writer {
        Some(linear) => write(&linear.model, args, &prompt, &progress)?,
        None => write(&softmax, args, &prompt, &progress)?,
    };
    progress.finish();

    let reports = |row: Row| {
        let linear = converted.linear.iter().filter(move |linear| linear.row == row);
        linear.flat_map(|linear| linear.reports.iter().map(LayerReport::from)).collect()
    };
    Ok(Report {
        model: args.model.display().to_string(),
        text: text_path.display().to_string(),
        vocabulary: softmax.config().vocabulary,
        windows,
        context,
        average_window: match &converted.plan {
            Some(plan) => plan.average_window(),
            None => window.tokens() as f64 / 2.0,
        },
        back: window.back,
        features: args.blocks * softmax.config().head_dim,
        rows,
        logits_difference,
        calibration_tokens: samples.iter().map(|sample| sample.len()).sum(),
        calibration_seconds: converted.seconds,
        steps: args.steps(),
        plan: converted.plan.as_ref().map(PlanReport::from),
        layers: reports(if args.rows().contains(&Row::Planned) {
            Row::Planned
        } else {
            Row::Calibrated
        }),
        pure_layers: reports(Row::Pure),
        prompt: args.prompt.clone(),
        generated,
        writer: writer.map_or(Row::Softmax, |linear| linear.row),
        tokens_per_second: if args.generate == 0 { 0.0 } else { 1.0 / seconds_per_token },
        kv_bytes: softmax.config().kv_cache_bytes(context),
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The rows of the table, one after another.
struct Measurement<'a> {
    text: &'a Text,
    windows: usize,
    progress: &'a Progress,
    rows: Vec<RowReport>,
}

impl Measurement<'_> {
    /// Measures a model that holds `state_bytes` after a window.
    fn add<A: Attention<f32>>(
        &mut self,
        row: Row,
        model: &Llama<A>,
        state_bytes: usize,
    ) -> Result<()> {
        self.progress.stage(row.label(), self.windows);
        let score = score(model, self.text, self.windows, || self.progress.tick())?;
        self.rows.push(RowReport::new(row, &score, state_bytes));
        Ok(())
    }
}

/// Text from a model, and the seconds a token took.
fn write<A: Attention<f32>>(
    model: &Llama<A>,
    args: &Args,
    prompt: &[Token],
    progress: &Progress,
) -> Result<(String, f64)> {
    progress.stage("generating", args.generate);
    let sampling = Sampling { temperature: args.temperature, seed: args.seed };
    let (tokens, seconds_per_token) =
        generate(&mut model.stream(), prompt, args.generate, &sampling, || progress.tick())?;
    Ok((model.tokenizer().decode(&tokens)?, seconds_per_token))
}
