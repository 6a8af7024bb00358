//! What does a head look at, before and after?
//!
//! ```sh
//! cargo run --release --example attention_maps
//! cargo run --release --example attention_maps -- --layer 3 --head 2 --text path/to/text \
//!     --svg maps.svg
//! ```
//!
//! Draws the attention weights of one head of a language model on real text side by side:
//! softmax's, and those of the calibrated linear layer, whose older tokens go through the kernel.

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
mod plot;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use dijiang::attention::Window;
use dijiang::calibrate::CalibrateOptions;
use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap};
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions, SoftmaxAttention};
use dijiang::reference;
use ndarray::{Array2, Axis, Zip};

use crate::lm::llama::Llama;
use crate::lm::text::Text;
use crate::plot::Maps;

/// Draws one head's softmax and linear attention weights.
#[derive(Debug, Parser)]
struct Args {
    /// Directory of a LLaMA-format model with valid.txt and calibration.txt
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Text to look at [default: valid.txt in the model's directory]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Which window of the text
    #[arg(long, value_name = "N", default_value_t = 1)]
    window: usize,
    /// Tokens of it
    #[arg(long, value_name = "N", default_value_t = 256)]
    tokens: usize,
    /// The layer, counted from 0
    #[arg(long, value_name = "N", default_value_t = 2)]
    layer: usize,
    /// The query head, counted from 0
    #[arg(long, value_name = "N", default_value_t = 1)]
    head: usize,
    /// Tokens of a chunk of the local window, 0 for none
    #[arg(long, value_name = "N", default_value_t = 32)]
    chunk: usize,
    /// Blocks of head_dim features each
    #[arg(long, value_name = "N", default_value_t = 1)]
    blocks: usize,
    /// Windows of the calibration text to calibrate on
    #[arg(long, value_name = "N", default_value_t = 16)]
    windows: usize,
    /// Steps of calibration by gradient
    #[arg(long, value_name = "N", default_value_t = 60)]
    steps: usize,
    /// Where to write the picture
    #[arg(long, default_value = "target/attention_maps.svg")]
    svg: PathBuf,
}

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

fn main() -> ExitCode {
    lm::exit(run(&Args::parse()))
}

fn run(args: &Args) -> Result<()> {
    let model = Llama::load(&args.model)?;
    let heads = model.attention().first().map_or(0, |layer| heads(layer).0);
    for (option, found, limit) in
        [("layer", args.layer, model.config().layers), ("head", args.head, heads)]
    {
        if found >= limit {
            return Err(format!("--{option} must be below {limit}, found {found}").into());
        }
    }
    if args.tokens < 2 {
        return Err(format!("--tokens must be at least 2, found {}", args.tokens).into());
    }
    let path = args.text.clone().unwrap_or_else(|| args.model.join("valid.txt"));
    let text = Text::read(&path, model.tokenizer(), args.tokens)?;
    if args.window >= text.windows() {
        return Err(
            format!("--window must be below {}, found {}", text.windows(), args.window).into()
        );
    }
    let shown = text.input(args.window);
    let x = model.attention_inputs(args.layer, &[shown])?.remove(0);

    let softmax = &model.attention()[args.layer];
    let window = (args.chunk > 0).then(|| Window::new(args.chunk, 1));
    let mut linear = DijiangAttention::from_softmax(
        softmax,
        DijiangOptions::new()
            .with_map(DctMapConfig::new().with_blocks(args.blocks))
            .with_window(window),
    )?;
    let calibration =
        Text::read(&args.model.join("calibration.txt"), model.tokenizer(), model.config().context)?;
    let samples = model.attention_inputs(
        args.layer,
        &calibration.spread(args.windows.max(2)).collect::<Vec<_>>(),
    )?;
    let samples: Vec<_> = samples.iter().map(|sample| sample.view()).collect();
    linear.calibrate(&samples, &CalibrateOptions::new().with_steps(args.steps), |_| {
        ControlFlow::Continue(())
    })?;

    let (exact, approximate) = weights(softmax, &linear, args.head, &x)?;
    let name =
        args.model.file_name().map_or("model".into(), |name| name.to_string_lossy().into_owned());
    let m = linear.maps()[0].features();
    let maps = Maps {
        title: format!("{name}, layer {}, head {}", args.layer, args.head),
        text: model.tokenizer().decode(shown)?,
        exact: ("softmax attention".to_owned(), &exact),
        linear: (format!("linear attention, m = {m}"), &approximate),
        window,
    };
    plot::draw(&maps, &args.svg)?;
    report(args, window, &exact, &approximate);
    Ok(())
}

/// Query heads, and those that share a key-value head.
fn heads(layer: &SoftmaxAttention<f32>) -> (usize, usize) {
    (layer.config().heads, layer.config().heads / layer.config().kv_heads)
}

/// The weights `[n, n]` of a head in both layers, rows adding up to one.
fn weights(
    softmax: &SoftmaxAttention<f32>,
    linear: &DijiangAttention<f32>,
    head: usize,
    x: &Array2<f32>,
) -> Result<(Array2<f64>, Array2<f64>)> {
    let [q, k, _] = softmax.project_at(x, 0)?;
    let kv_head = head / heads(softmax).1;
    // √σ each, σ = 1/√d unless the model has another scale.
    let scale = softmax.config().scale.unwrap_or(1.0).sqrt();
    let [x, y] = [q.index_axis(Axis(0), head), k.index_axis(Axis(0), kv_head)]
        .map(|rows| rows.mapv(|z| scale * f64::from(z)));
    let map = DctMap::<f64>::from_params(linear.maps()[kv_head].params().clone())?;
    let scores = reference::scores(&x, &y)?;
    let mut log_weights =
        reference::log_kernel(&map.query_log_features(&x)?, &map.key_log_features(&y)?)?;
    let decay = linear.log_decay()[kv_head];
    for ((i, j), log_weight) in log_weights.indexed_iter_mut() {
        let in_window = |window: &Window| i / window.chunk - j / window.chunk <= window.back;
        match linear.windows().get(kv_head) {
            Some(window) if j <= i && (j < linear.sinks() || in_window(window)) => {
                *log_weight = scores[[i, j]];
            }
            _ => *log_weight += decay * (i as f64 - j as f64),
        }
    }
    Ok((causal_softmax(scores), causal_softmax(log_weights)))
}

/// e^scores below and on the diagonal, over the sum of their row; zero above.
fn causal_softmax(mut scores: Array2<f64>) -> Array2<f64> {
    for (i, mut row) in scores.outer_iter_mut().enumerate() {
        let (mut seen, mut later) = row.view_mut().split_at(Axis(0), i + 1);
        later.fill(0.0);
        let top = seen.fold(f64::NEG_INFINITY, |top, &score| top.max(score));
        seen.mapv_inplace(|score| (score - top).exp());
        let sum = seen.sum();
        seen.mapv_inplace(|weight| weight / sum);
    }
    scores
}

fn report(args: &Args, window: Option<Window>, exact: &Array2<f64>, linear: &Array2<f64>) {
    let far = |(i, j): (usize, usize)| {
        window.is_none_or(|window| i / window.chunk - j / window.chunk > window.back)
    };
    let far_mass = |weights: &Array2<f64>| {
        let far = weights
            .indexed_iter()
            .filter(|&((i, j), _)| j <= i && far((i, j)))
            .map(|(_, weight)| weight);
        100.0 * far.sum::<f64>() / weights.nrows() as f64
    };
    let divergence = Zip::from(exact)
        .and(linear)
        .fold(0.0, |sum, &p, &r| if p > 0.0 { sum + p * (p / r).ln() } else { sum });
    println!("layer {}, head {}, {} tokens", args.layer, args.head, args.tokens);
    if window.is_some() {
        println!(
            "weight on keys behind the local window: softmax {:.1} %, linear {:.1} %",
            far_mass(exact),
            far_mass(linear)
        );
    }
    println!(
        "KL divergence of the linear weights from softmax's: {:.3} nats per query",
        divergence / exact.nrows() as f64
    );
    println!("picture: {}", args.svg.display());
}
