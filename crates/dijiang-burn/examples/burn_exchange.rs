//! A small transformer of burn's own: trains it, exchanges its attention, calibrates, and measures
//! the loss before and after on text it has never seen.

mod text;

use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::tensor::Device;
use clap::Parser;
use dijiang::attention::Window;
use dijiang::layer::DijiangOptions;
use text::{TextBatcher, TextModel, texts, train};

/// Exchanges the attention of a small transformer written with burn.
#[derive(Parser)]
struct Args {
    /// Texts of a context each that the softmax model is trained on.
    #[arg(long, default_value_t = 1600)]
    training: usize,
    /// Bytes a text has.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Width of the model, a multiple of 32.
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Tokens of a chunk: each and the one before it stay exact.
    #[arg(long, default_value_t = 16)]
    window: usize,
    /// Texts that the maps are fitted to.
    #[arg(long, default_value_t = 32)]
    calibration: usize,
    /// Texts that the loss is measured on.
    #[arg(long, default_value_t = 40)]
    texts: usize,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    let device = Device::default();
    device.seed(1);
    let training = texts("calibration.txt", args.context, args.training)?;
    let unseen = texts("valid.txt", args.context, args.texts)?;
    let directory = std::env::temp_dir().join("burn_exchange");
    let model = TextModel::new(args.width, 2, args.context, &device.clone().autodiff());
    let model = train(model, (training.clone(), unseen.clone()), (1, 1e-3), &directory).valid();

    let measured: Vec<_> =
        unseen.into_iter().map(|text| TextBatcher.batch(vec![text], &device)).collect();
    let samples = training.into_iter().take(args.calibration).collect();
    let samples = TextBatcher.batch(samples, &device).inputs;
    let options = DijiangOptions::new().with_window(Window::new(args.window, 1));
    let exchanged = model.exchange(&options, None)?;
    let calibrated = model.exchange(&options, Some(samples))?;
    for (name, model) in
        [("softmax", &model), ("exchanged", &exchanged), ("calibrated", &calibrated)]
    {
        println!("{name:<12} {:.4} bits per byte", model.bits_per_byte(&measured)?);
    }
    Ok(())
}
