//! A model in llama.cpp's format, GGUF, run by candle with its weights quantised: with this crate's
//! attention, whose state never grows, and with candle's own softmax attention.
//!
//! ```sh
//! alias candle_gguf="cargo run --release --features candle --example candle_gguf --"
//! candle_gguf plan --model model.gguf --text calibration.txt --maps maps.safetensors
//! candle_gguf run --model model.gguf --maps maps.safetensors --prompt "Once upon a time"
//! candle_gguf bench --model model.gguf --maps maps.safetensors --text text.txt \
//!     --contexts 64,2048,8000
//! candle_gguf score --model model.gguf --maps maps.safetensors --text text.txt
//! ```

mod args;
mod attention;
mod bench;
mod chat;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../lm/mod.rs"]
mod lm;
#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../../tests/soak/memory.rs"]
mod memory;
mod model;
mod plan;
mod product;
mod score;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests;
mod vocabulary;

use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use dijiang::calibrate::CalibrateOptions;
use dijiang::checkpoint::{Gguf, save_maps};
use dijiang::layer::{Attention, DijiangAttention, Rotary};

use crate::args::{Args, Command, PlanArgs};
use crate::attention::{Linear, Softmax};
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::lm::tokens::Tokenizer;
use crate::model::{Body, Model};
use crate::plan::Choices;

/// Whatever goes wrong, in one line.
pub(crate) type Error = Box<dyn std::error::Error + Send + Sync>;
/// `std::result::Result` with it.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

fn main() -> ExitCode {
    let args = Args::parse();
    if let Some(threads) = args.threads() {
        set_threads(threads);
    }
    lm::exit(run(&args))
}

/// Tells candle and rayon, which look when they first start threads.
#[allow(unsafe_code, reason = "there is no other way to tell candle")]
fn set_threads(threads: u16) {
    // SAFETY: called at the beginning of `main`, when there is no other thread.
    unsafe { std::env::set_var("RAYON_NUM_THREADS", threads.to_string()) }
}

fn run(args: &Args) -> Result<()> {
    match &args.command {
        Command::Plan(args) => plan(args),
        Command::Run(args) => chat::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Score(args) => score::run(args),
    }
}

/// A file, opened.
pub(crate) struct Opened {
    pub(crate) gguf: Gguf,
    pub(crate) body: Body,
    rotary: Rotary,
    pub(crate) tokenizer: Tokenizer,
    /// The token that ends a text.
    pub(crate) end: Option<u32>,
}

impl Opened {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let (tokenizer, end) = vocabulary::read(path, gguf.content())?;
        let body = Body::load(path, &gguf)?;
        let Some(rotary) = gguf.attention_config().rotary.clone() else {
            return Err(model::fault(path, "attention", "with rotary embedding", "none"));
        };
        Ok(Self { gguf, body, rotary, tokenizer, end })
    }

    /// The model as it was trained.
    pub(crate) fn softmax(&self) -> Model<'_, Softmax> {
        let attention = (0..self.body.layers()).map(|_| Softmax(self.body.heads)).collect();
        Model { body: &self.body, rotary: self.rotary.clone(), attention }
    }

    /// The model with the maps in this file.
    pub(crate) fn linear(&self, maps: &Path) -> Result<Model<'_, Linear>> {
        Ok(self.linear_of(&plan::load(&self.gguf, maps)?))
    }

    /// The model with the windows and maps of these layers.
    pub(crate) fn linear_of(&self, layers: &[DijiangAttention<f32>]) -> Model<'_, Linear> {
        let hold = layers.iter().find_map(|layer| layer.config().rotary.as_ref()?.hold);
        Model {
            body: &self.body,
            rotary: self.rotary.clone().with_hold(hold),
            attention: layers.iter().map(Linear::of).collect(),
        }
    }
}

fn plan(args: &PlanArgs) -> Result<()> {
    let opened = Opened::open(&args.common.model)?;
    let text = Text::read(&args.text, &opened.tokenizer, args.context)?;
    let samples: Vec<_> = text.spread(args.windows).collect();
    let batch = (8192 / args.context).max(1);
    let choices = Choices {
        sinks: args.sinks,
        average_window: args.average_window,
        // Three quarters of a window of text are as it will be ever after.
        hold: (!args.bounded).then_some((args.context / 4).max(1)),
        calibration: Some(CalibrateOptions::new().with_steps(args.steps).with_batch(batch)),
    };
    let progress = Progress::new();
    progress.stage("planning and calibrating", 2 * opened.body.layers());
    let planned = plan::plan(&opened.gguf, &opened.body, &samples, &choices, || progress.tick());
    progress.finish();
    let (plan, layers) = planned?;
    let bytes = save_maps(&layers)?;
    std::fs::write(&args.maps, &bytes)
        .map_err(|error| format!("cannot write {}: {error}", args.maps.display()))?;
    println!(
        "{}: {} kB; windows of {:.0} tokens on average, {} kB of state at any length",
        args.maps.display(),
        bytes.len() / 1000,
        2.0 * plan.average_window(),
        plan.bytes() / 1000
    );
    Ok(())
}
