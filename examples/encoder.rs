//! How do I exchange the attention of a bidirectional encoder?
//!
//! ```sh
//! cargo run --release --example encoder
//! cargo run --release --example encoder -- --model path/to/bert --states states.safetensors
//! ```
//!
//! The second form takes any directory that `Checkpoint` opens, with a safetensors file of hidden
//! states `[b, n, D]` called `layers.N.attention_input`. The first one takes the language model of
//! the repository, for want of an encoder of that size: its trained projections, with every token
//! looking at the whole window, on real text.
//!
//! There is no local window here, whose exactness a causal layer leans on: what the maps can
//! express is what there is.

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "lm/mod.rs"]
mod lm;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use dijiang::attention::KeyMask;
use dijiang::calibrate::{CalibrateOptions, ProjectionFit};
use dijiang::checkpoint::{Checkpoint, Tensors};
use dijiang::kernel::DctMapConfig;
use dijiang::layer::{Attention, Causality, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::{Array2, Array3, Axis, concatenate, s};

use crate::lm::evaluate::output_error;
use crate::lm::llama::Llama;
use crate::lm::progress::Progress;
use crate::lm::text::Text;

/// Exchanges and calibrates bidirectional attention layers, and compares them with the softmax
/// layers they came from.
#[derive(Debug, Parser)]
struct Args {
    /// Model directory: with --states of any family, else of a LLaMA-format model with
    /// calibration.txt
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Hidden states of the model's attention layers
    #[arg(long, value_name = "FILE")]
    states: Option<PathBuf>,
    /// Tokens per window of text
    #[arg(long, value_name = "N", default_value_t = 256)]
    tokens: usize,
    /// Windows of text; a quarter of them is not calibrated on, but measured on
    #[arg(long, value_name = "N", default_value_t = 32)]
    windows: usize,
    /// Blocks of head_dim features each
    #[arg(long, value_name = "N", default_value_t = 2)]
    blocks: usize,
    /// Steps of calibration by gradient
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Length of the sequence that times are taken on
    #[arg(long, value_name = "N", default_value_t = 4096)]
    long: usize,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

/// A softmax layer and the hidden states it is given, one array `[n, D]` per sequence.
struct Layer {
    softmax: SoftmaxAttention<f32>,
    states: Vec<Array2<f32>>,
}

fn run(args: &Args) -> Result<()> {
    let layers = match &args.states {
        Some(file) => stored(&args.model, file)?,
        None => language_model(args)?,
    };
    let Some(first) = layers.first().filter(|layer| layer.states.len() >= 2) else {
        return Err("at least one layer and two sequences are needed".into());
    };
    let apart = (first.states.len() / 4).max(1);
    let (config, n) = (first.softmax.config(), first.states[0].nrows());
    let m = args.blocks * config.head_dim.unwrap_or(config.model_dim / config.heads);
    println!(
        "{} layers, {} heads, m = {m}, {} sequences of {n} tokens, {apart} of them unseen",
        layers.len(),
        config.heads,
        first.states.len()
    );

    let progress = Progress::new();
    progress.stage("calibrating", 3 * layers.len());
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "layer",
        "as exchanged",
        "centres only",
        "calibrated",
        "dense projections",
    ]);
    let mut kept = None;
    for (l, Layer { softmax, states }) in layers.iter().enumerate() {
        let (calibration, unseen) = states.split_at(states.len() - apart);
        let calibration: Vec<_> = calibration.iter().map(|x| x.view()).collect();
        let exchanged = DijiangAttention::from_softmax(
            softmax,
            DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(args.blocks)),
        )?;
        let mut row =
            vec![l.to_string(), format!("{:.3}", output_error(softmax, &exchanged, unseen)?)];
        for (steps, projection) in [
            (0, ProjectionFit::Keep),
            (args.steps, ProjectionFit::Keep),
            (args.steps, ProjectionFit::Dense),
        ] {
            let options = CalibrateOptions::new().with_steps(steps).with_projection(projection);
            let mut linear = exchanged.clone();
            linear.calibrate(&calibration, &options, |_| ControlFlow::Continue(()))?;
            row.push(format!("{:.3}", output_error(softmax, &linear, unseen)?));
            kept = Some(linear);
            progress.tick();
        }
        table.add_row(row);
    }
    progress.finish();
    for column in table.column_iter_mut() {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    println!(
        "error of the layer's output on the unseen sequences: Σ|ŷ − y|² / Σ|y − ȳ|², 1 for a plain \
         mean\n"
    );

    let (Some(Layer { softmax, states }), Some(linear)) = (layers.last(), kept) else {
        return Ok(());
    };
    padding(&linear, states)?;
    let repeated: Vec<_> =
        states.iter().cycle().take(args.long.div_ceil(n)).map(|x| x.view()).collect();
    let long = concatenate(Axis(0), &repeated)?.slice_move(s![..args.long, ..]);
    let [softmax, linear] = [microseconds(softmax, &long)?, microseconds(&linear, &long)?];
    println!(
        "{} tokens at once, projections included, all threads: softmax {softmax:.1}, linear \
         {linear:.1} µs per token",
        args.long
    );
    Ok(())
}

/// The layers of any model, with hidden states from a file.
fn stored(directory: &Path, states: &Path) -> Result<Vec<Layer>> {
    let (checkpoint, tensors) = (Checkpoint::open(directory)?, Tensors::open_file(states)?);
    let layer = |l: usize| {
        let name = format!("layers.{l}.attention_input");
        let Some(&[b, n, width]) = tensors.shape(&name) else {
            return Err(format!("{}: no tensor {name} of three axes", states.display()).into());
        };
        let values =
            Array3::from_shape_vec((b, n, width), tensors.numbers(&name, &[b, n, width])?)?;
        let states = values.outer_iter().map(|x| x.to_owned()).collect();
        Ok(Layer { softmax: bidirectional(&checkpoint.softmax_attention(l)?)?, states })
    };
    (0..checkpoint.layers()).map(layer).collect()
}

/// The layers of a language model, with its hidden states on its text.
fn language_model(args: &Args) -> Result<Vec<Layer>> {
    let model = Llama::load(&args.model)?;
    let text =
        Text::read(&args.model.join("calibration.txt"), model.tokenizer(), args.tokens.max(1))?;
    let windows: Vec<_> = text.spread(args.windows).collect();
    let mut layers = Vec::new();
    model.each_attention_input(&windows, |l, inputs| {
        let states = inputs.iter().map(|x| x.to_owned()).collect();
        layers.push(Layer { softmax: bidirectional(&model.attention()[l])?, states });
        Ok(())
    })?;
    Ok(layers)
}

/// The same layer, every token looking at every other one.
fn bidirectional(layer: &SoftmaxAttention<f32>) -> dijiang::Result<SoftmaxAttention<f32>> {
    SoftmaxAttention::new(
        layer.config().clone().with_causality(Causality::Bidirectional),
        layer.weights().clone(),
    )
}

/// Sequences of different lengths in one batch: padding changes nothing.
fn padding(linear: &DijiangAttention<f32>, states: &[Array2<f32>]) -> Result<()> {
    let (n, width) = states[0].dim();
    let short = n.div_ceil(3);
    let mut batch = Array3::zeros((2, n, width));
    batch.slice_mut(s![0, .., ..]).assign(&states[0]);
    batch.slice_mut(s![1, ..short, ..]).assign(&states[1].slice(s![..short, ..]));
    let masks = Array2::from_shape_fn((2, n), |(i, j)| i == 0 || j < short);
    let padded = linear.forward_batch(&batch, Some(&masks))?;
    let alone = linear.forward(&states[1].slice(s![..short, ..]), KeyMask::All)?;
    let difference = (&padded.slice(s![1, ..short, ..]) - &alone)
        .iter()
        .fold(0.0_f32, |most, d| most.max(d.abs()));
    println!(
        "a sequence of {short} tokens padded to {n} differs from the same one alone by at most \
         {difference:.1e}"
    );
    Ok(())
}

/// The fastest of three runs.
fn microseconds(layer: &impl Attention<f32>, x: &Array2<f32>) -> dijiang::Result<f64> {
    let seconds = (0..3).try_fold(f64::INFINITY, |least, _| {
        let start = Instant::now();
        layer.forward(x, KeyMask::All)?;
        Ok(least.min(start.elapsed().as_secs_f64()))
    });
    seconds.map(|seconds| 1e6 * seconds / x.nrows() as f64)
}
