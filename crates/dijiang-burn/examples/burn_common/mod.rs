//! What `burn_exchange` and `burn_train` share: a small language model made of burn's own modules,
//! the text it reads, and the exchange of its attention.

pub(crate) mod exchange;
pub(crate) mod model;
pub(crate) mod pretrain;
pub(crate) mod text;

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use clap::Args;

use model::{Model, ModelConfig};
use text::{Loader, Text};

/// Examples hand on whatever goes wrong.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The softmax model, its texts and its exchange.
#[derive(Args)]
pub(crate) struct Setup {
    /// Text to train and calibrate on.
    #[arg(long, default_value_os_t = shipped("calibration.txt"))]
    train_text: PathBuf,
    /// Held-out text.
    #[arg(long, default_value_os_t = shipped("valid.txt"))]
    held_out_text: PathBuf,
    /// Held-out windows that losses are of.
    #[arg(long, default_value_t = 64)]
    held_out: usize,
    /// Tokens of a window; a token is a byte.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Model dimension.
    #[arg(long, default_value_t = 128)]
    d_model: usize,
    /// Heads of every layer.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    /// Layers.
    #[arg(long, default_value_t = 2)]
    layers: usize,
    /// Steps that the softmax model is trained for.
    #[arg(long, default_value_t = 600)]
    pretrain: usize,
    /// Length of the first of those steps; it falls to 0 as half a cosine.
    #[arg(long, default_value_t = 3e-3)]
    pretrain_rate: f64,
    /// Windows of a step.
    #[arg(long, default_value_t = 8)]
    pub(crate) batch: usize,
    /// The softmax model's weights: read if the file is there, written after training if not.
    #[arg(long)]
    record: Option<PathBuf>,
    /// Chunk length of the exact local window; one chunk back.
    #[arg(long, default_value_t = 16)]
    pub(crate) window: usize,
    /// Windows of text to calibrate on.
    #[arg(long, default_value_t = 32)]
    calibration: usize,
    /// Steps of the calibration by gradient.
    #[arg(long, default_value_t = 60)]
    pub(crate) calibration_steps: usize,
    /// Seed of weights and order.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// A text of the repository: see `examples/data/lm-kjv/README.md`.
fn shipped(name: &str) -> PathBuf {
    let texts = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/lm-kjv");
    Path::new(texts).join(name)
}

impl Setup {
    /// Windows of the text to train on.
    pub(crate) fn text(&self) -> Result<Text> {
        Text::read(&self.train_text, self.context)
    }

    /// Windows of `text` in another order every time.
    pub(crate) fn shuffled(&self, text: &Text, device: &Device) -> Loader {
        text::loader(text.windows(), self.batch, Some(self.seed), device)
    }

    /// The held-out windows, in order.
    pub(crate) fn held_out(&self, device: &Device) -> Result<Loader> {
        let text = Text::read(&self.held_out_text, self.context)?;
        Ok(text::loader(text.spread(self.held_out), self.batch, None, device))
    }

    /// The windows to calibrate on, spread over the text.
    pub(crate) fn calibration(&self, text: &Text, device: &Device) -> text::Batch {
        text::Batch::new(&text.spread(self.calibration), device)
    }

    /// The softmax model, read or trained.
    pub(crate) fn softmax(&self, text: &Text, device: &Device) -> Result<Model> {
        device.seed(self.seed);
        let config = ModelConfig::new(self.context, self.d_model, self.heads, self.layers);
        let model = config.init(device);
        if let Some(record) = self.record.as_ref().filter(|path| path.exists()) {
            return Ok(model.try_load_file(record)?);
        }
        let loader = self.shuffled(text, device);
        let model = pretrain::pretrain(model, &loader, self.pretrain, self.pretrain_rate)?;
        if let Some(record) = &self.record {
            model.clone().save_file(record)?;
        }
        Ok(model)
    }
}
