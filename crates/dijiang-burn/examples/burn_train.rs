//! Trains a small transformer with softmax attention, exchanges it, and trains on with linear
//! attention: burn's own learner, progress and metrics both times, and dijiang's backward pass the
//! second time. What was trained is saved, loaded and measured again.

mod text;

use burn::data::dataloader::batcher::Batcher;
use burn::module::Module;
use burn::tensor::Device;
use clap::Parser;
use dijiang::attention::Window;
use dijiang::layer::DijiangOptions;
use text::{TextBatcher, TextModel, texts, train};

/// Trains on with linear attention.
#[derive(Parser)]
struct Args {
    /// Texts of a context each that both are trained on.
    #[arg(long, default_value_t = 1600)]
    training: usize,
    /// Bytes a text has.
    #[arg(long, default_value_t = 256)]
    context: usize,
    /// Width of the model, a multiple of 32.
    #[arg(long, default_value_t = 128)]
    width: usize,
    /// Passes over the texts with linear attention.
    #[arg(long, default_value_t = 1)]
    epochs: usize,
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
    let data = (training, unseen.clone());
    let directory = std::env::temp_dir().join("burn_train");
    let model = TextModel::new(args.width, 2, args.context, &device.clone().autodiff());
    let softmax = train(model, data.clone(), (1, 1e-3), &directory);

    let options = DijiangOptions::new().with_window(Window::new(16, 1));
    let linear = softmax.exchange(&options, None)?;
    let trained = train(linear.clone().train(), data, (args.epochs, 5e-4), &directory);

    let file = directory.join("linear");
    trained.clone().save_file(&file)?;
    let loaded = linear.clone().load_file(&file);

    let measured: Vec<_> =
        unseen.into_iter().map(|text| TextBatcher.batch(vec![text], &device)).collect();
    for (name, model) in [
        ("softmax", &softmax),
        ("exchanged", &linear),
        ("trained on", &trained),
        ("loaded", &loaded),
    ] {
        println!("{name:<12} {:.4} bits per byte", model.bits_per_byte(&measured)?);
    }
    Ok(())
}
