//! The model of `burn_exchange`, trained on after its exchange with burn's own learner: progress
//! and metrics as burn shows them, a dashboard on a terminal. So that the gain is not the further
//! training's alone, the softmax model is trained on in the same way.

#[path = "burn_common/mod.rs"]
mod burn_common;

use std::path::PathBuf;

use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::Module;
use burn::tensor::Device;
use burn::train::metric::{AccuracyMetric, LearningRateMetric, LossMetric};
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
};
use burn_common::exchange::exchange;
use burn_common::model::Model;
use burn_common::pretrain::optimizer;
use burn_common::text::{self, Batch, Loader};
use burn_common::{Result, Setup};
use clap::Parser;
use comfy_table::Table;

/// Trains an exchanged model on, and the softmax model beside it.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    setup: Setup,
    /// Passes over the windows that are trained on.
    #[arg(long, default_value_t = 1)]
    epochs: usize,
    /// Windows that are trained on, spread over the text.
    #[arg(long, default_value_t = 800)]
    windows: usize,
    /// The first steps' length; it falls to 0 as half a cosine.
    #[arg(long, default_value_t = 1e-4)]
    learning_rate: f64,
    /// Where the learner writes its logs.
    #[arg(long, default_value_os_t = std::env::temp_dir().join("dijiang-burn-train"))]
    directory: PathBuf,
}

/// The loss inside the learner, whose steps cannot fail: an error there is a model that is no
/// longer finite.
fn loss(model: &Model, batch: Batch) -> ClassificationOutput {
    match model.loss(batch) {
        Ok((loss, logits, targets)) => ClassificationOutput::new(loss, logits, targets),
        Err(error) => panic!("the model cannot be computed: {error}"),
    }
}

impl TrainStep for Model {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> TrainOutput<ClassificationOutput> {
        let output = loss(self, batch);
        TrainOutput::new(self, output.loss.backward(), output)
    }
}

impl InferenceStep for Model {
    type Input = Batch;
    type Output = ClassificationOutput;

    fn step(&self, batch: Batch) -> ClassificationOutput {
        loss(self, batch)
    }
}

/// The model after `epochs` passes over `train`.
fn learn(model: Model, name: &str, args: &Args, loaders: [&Loader; 2]) -> Result<Model> {
    let [train, held_out] = loaders;
    let steps = args.epochs * train.num_items().div_ceil(args.setup.batch);
    let rate = CosineAnnealingLrSchedulerConfig::new(args.learning_rate, steps).init()?;
    let learner = Learner::new(model.train(), optimizer(), rate);
    let result =
        SupervisedTraining::new(args.directory.join(name), train.clone(), held_out.clone())
            .metrics((LossMetric::new(), AccuracyMetric::new()))
            .metric_train_numeric(LearningRateMetric::new())
            .num_epochs(args.epochs)
            .label(name)
            .summary()
            .launch(learner);
    match result.error {
        Some(error) => Err(error.to_string().into()),
        None => Ok(result.model),
    }
}

fn main() -> Result<()> {
    let args = Args::parse();
    let (setup, device) = (&args.setup, Device::flex());
    let text = setup.text()?;
    let softmax = setup.softmax(&text, &device)?;
    let (texts, held_out) = (setup.calibration(&text, &device), setup.held_out(&device)?);
    let exchanged = exchange(&softmax, &texts, setup.window, Some(setup.calibration_steps))?;

    let train = text::loader(text.spread(args.windows), setup.batch, Some(1), &device);
    let mut table = Table::new();
    table.set_header(["attention", "held out, bits per byte", "trained on"]);
    for (name, model) in [("softmax", softmax), ("exchanged", exchanged)] {
        let before = model.bits(&held_out)?;
        let after = learn(model, name, &args, [&train, &held_out])?.bits(&held_out)?;
        table.add_row([name.to_owned(), format!("{before:.4}"), format!("{after:.4}")]);
    }
    println!("{table}");
    Ok(())
}
