//! How many features, and how long a local window, for the time I have?
//!
//! ```sh
//! cargo run --release --example choose_structure
//! cargo run --release --example choose_structure -- --layer 3 --budget 12
//! ```
//!
//! Gives one layer of a language model a budget of microseconds per token, lets
//! `DijiangAttention::choose` try structures on real hidden states, shows what it tried and why it
//! chose as it did, and compares with the default structure on text nobody has seen.

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "lm/mod.rs"]
mod lm;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use dijiang::attention::Window;
use dijiang::layer::{
    CalibrateOptions, ChooseOptions, ChooseReport, DijiangAttention, DijiangOptions, ProjectionFit,
    SoftmaxAttention, Trial,
};
use ndarray::{Array2, ArrayView2};

use crate::lm::evaluate::output_error;
use crate::lm::llama::Llama;
use crate::lm::progress::Progress;
use crate::lm::text::Text;

/// Chooses local window, features and projections of one layer within a budget of time.
#[derive(Debug, Parser)]
struct Args {
    /// Directory of a LLaMA-format model with valid.txt and calibration.txt
    #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/lm-kjv"), hide_default_value = true)]
    model: PathBuf,
    /// The layer, counted from 0
    #[arg(long, value_name = "N", default_value_t = 1)]
    layer: usize,
    /// Longest time for attention of the layer per token on one thread [default: 1.7 times what the
    /// default structure takes]
    #[arg(long, value_name = "MICROSECONDS")]
    budget: Option<f64>,
    /// Windows of the model's context to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    windows: usize,
    /// Steps of a trial
    #[arg(long, value_name = "N", default_value_t = 20)]
    trial_steps: usize,
    /// Steps of the calibration of what was chosen
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let model = Llama::load(&args.model)?;
    let layers = model.config().layers;
    if args.layer >= layers {
        return Err(format!("--layer must be below {layers}, found {}", args.layer).into());
    }
    if let Some(found) = args.budget.filter(|budget| !(budget.is_finite() && *budget > 0.0)) {
        return Err(format!("--budget must be finite and positive, found {found}").into());
    }
    let context = model.config().context;
    let inputs = |file: &str, windows: usize| -> Result<Vec<Array2<f32>>> {
        let text = Text::read(&args.model.join(file), model.tokenizer(), context)?;
        Ok(model.attention_inputs(args.layer, &text.spread(windows).collect::<Vec<_>>())?)
    };
    let (samples, unseen) =
        (inputs("calibration.txt", args.windows.max(2))?, inputs("valid.txt", 4)?);
    let samples: Vec<_> = samples.iter().map(|sample| sample.view()).collect();
    let softmax = &model.attention()[args.layer];

    let progress = Progress::new();
    let calibrate = CalibrateOptions::new().with_steps(args.steps);
    progress.stage("the default structure", 1);
    let mut default = DijiangAttention::from_softmax(softmax, DijiangOptions::new())?;
    default.calibrate(&samples, &calibrate, |_| ControlFlow::Continue(()))?;
    let options = ChooseOptions::new()
        .with_window([64, 96, 128, 192].map(|chunk| Some(Window::new(chunk, 1))).to_vec())
        .with_blocks(vec![1, 2, 4])
        .with_trial(CalibrateOptions::new().with_steps(args.trial_steps))
        .with_calibrate(calibrate);
    let budget = match args.budget {
        Some(microseconds) => Duration::from_secs_f64(1e-6 * microseconds),
        None => time(softmax, &samples, &options)?.mul_f64(1.7),
    };
    let mut stage = None;
    let (chosen, report) =
        DijiangAttention::choose(softmax, &samples, &options.with_budget(Some(budget)), |state| {
            if stage.replace(state.trial) != Some(state.trial) {
                progress.stage("trying structures", state.trials);
                (0..state.trial).for_each(|_| progress.tick());
            }
            ControlFlow::Continue(())
        })?;
    progress.finish();
    print(args, &report, budget, chosen.maps()[0].params().dim());

    let figure = |layer: &DijiangAttention<f32>| {
        output_error(softmax, layer, &unseen).map(|error| format!("{error:.1e}"))
    };
    println!(
        "layer output on {} unseen windows of {context} tokens, relative error:",
        unseen.len()
    );
    println!("  default structure {}, chosen {}", figure(&default)?, figure(&chosen)?);
    Ok(())
}

/// What the first of all structures takes per token here.
fn time(
    softmax: &SoftmaxAttention<f32>,
    samples: &[ArrayView2<'_, f32>],
    options: &ChooseOptions,
) -> Result<Duration> {
    let nothing = CalibrateOptions::new().with_steps(0);
    let first =
        options.clone().with_window(vec![options.window[0]]).with_blocks(vec![options.blocks[0]]);
    let first = first
        .with_projections(vec![ProjectionFit::Keep])
        .with_trial(nothing.clone())
        .with_calibrate(nothing);
    Ok(DijiangAttention::choose(softmax, &samples[..1], &first, |_| ControlFlow::Continue(()))?
        .1
        .time)
}

fn print(args: &Args, report: &ChooseReport, budget: Duration, dim: usize) {
    let microseconds = |time: Duration| format!("{:.2}", 1e6 * time.as_secs_f64());
    let window = |window: Option<Window>| {
        window.map_or("none".to_owned(), |window| format!("{} × {}", window.back + 1, window.chunk))
    };
    let projection = |fit: ProjectionFit| match fit {
        ProjectionFit::Keep => "DCT",
        ProjectionFit::Deep => "deep",
        ProjectionFit::Dense => "dense",
    };
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "local window, tokens",
        "features m",
        "projection",
        "µs per token",
        "error",
    ]);
    for Trial { window: tried, blocks, projection: fit, time, error, .. } in &report.trials {
        let error = error.map_or("over budget".to_owned(), |error| format!("{error:.1e}"));
        table.add_row([
            window(*tried),
            (blocks * dim).to_string(),
            projection(*fit).to_owned(),
            microseconds(*time),
            error,
        ]);
    }
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!(
        "layer {}, budget {} µs per token on one thread; trials of {} steps, in this order:",
        args.layer,
        microseconds(budget),
        args.trial_steps
    );
    println!("{table}");
    println!(
        "a costlier structure must lower the error by 2 %; error: of head outputs on held-out windows, relative to their variance\n"
    );
    let projections: Vec<_> = report.projections.iter().map(|&fit| projection(fit)).collect();
    println!(
        "chosen: local window {}, m = {}, projections by head {}, {} µs per token; after {} steps error {:.1e}",
        window(report.window),
        report.blocks * dim,
        projections.join(" "),
        microseconds(report.time),
        args.steps,
        report.calibration.after(),
    );
}
