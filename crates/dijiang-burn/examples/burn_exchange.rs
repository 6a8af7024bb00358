//! A small language model made of burn's own modules, trained for a minute on bytes of a book; its
//! attention is exchanged and calibrated. Prints the held-out loss of each.

#[path = "burn_common/mod.rs"]
mod burn_common;

use burn::module::Module;
use burn::tensor::Device;
use burn_common::exchange::exchange;
use burn_common::model::{Attention, Model};
use burn_common::{Result, Setup};
use clap::Parser;
use comfy_table::Table;

/// Exchanges the attention of a small model; prints its loss before and after.
#[derive(Parser)]
struct Args {
    #[command(flatten)]
    setup: Setup,
}

/// A mix at which older tokens weigh nothing.
const NOTHING: f64 = -1e3;

/// The model with nothing for the tokens beyond windows and sinks.
fn without_maps(mut model: Model) -> Model {
    for block in &mut model.blocks {
        if let Attention::Linear(linear) = &mut block.attention {
            let maps = &mut linear.maps;
            maps.log_mix = maps.log_mix.clone().map(|mix| mix * 0.0 + NOTHING);
        }
    }
    model
}

fn main() -> Result<()> {
    let Args { setup } = Args::parse();
    let device = Device::flex();
    let text = setup.text()?;
    let softmax = setup.softmax(&text, &device)?;
    let (texts, held_out) = (setup.calibration(&text, &device), setup.held_out(&device)?);

    let exchanged = |steps| exchange(&softmax, &texts, setup.window, steps);
    let drawn = exchanged(None)?;
    let models = [
        ("softmax", softmax.clone()),
        ("window and sinks alone", without_maps(drawn.clone())),
        ("maps as drawn", drawn),
        ("maps in closed form", exchanged(Some(0))?),
        ("maps calibrated", exchanged(Some(setup.calibration_steps))?),
    ];
    let mut table = Table::new();
    table.set_header(["attention", "parameters", "held out, bits per byte", "over softmax"]);
    let before = softmax.bits(&held_out)?;
    for (name, model) in models {
        let (parameters, bits) = (model.num_params(), model.bits(&held_out)?);
        table.add_row([
            name.to_owned(),
            parameters.to_string(),
            format!("{bits:.4}"),
            format!("{:+.2} %", (bits / before - 1.0) * 100.0),
        ]);
    }
    println!("{table}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn_common::model::ModelConfig;
    use burn_common::text::Batch;

    fn setup(arguments: &[&str]) -> Result<Setup> {
        let name = ["burn_exchange"].iter();
        Ok(Args::try_parse_from(name.chain(arguments))?.setup)
    }

    /// A target is the byte after its input, and windows follow each other.
    #[test]
    fn targets_are_the_bytes_after() -> Result<()> {
        let text = setup(&["--context", "10"])?.text()?;
        let windows = text.windows();
        assert_eq!(windows[0][10], windows[1][0]);
        assert_eq!(text.spread(2)[0], windows[0]);
        let Batch { inputs, targets } = Batch::new(&windows[..3], &Device::flex());
        let (inputs, targets) = (inputs.narrow(1, 1, 9), targets.narrow(1, 0, 9));
        assert_eq!(inputs.into_data(), targets.into_data());
        Ok(())
    }

    /// A text that is no longer than the window does not need the maps.
    #[test]
    fn within_the_window_nothing_changes() -> Result<()> {
        let device = Device::flex();
        device.seed(3);
        let softmax = ModelConfig::new(16, 16, 2, 2).init(&device);
        let text = setup(&["--context", "16"])?.text()?;
        let texts = Batch::new(&text.spread(5), &device);
        let logits = |model: &Model| model.forward(texts.inputs.clone()).map(|(logits, _)| logits);
        let expected = logits(&softmax)?;
        let exchanged = exchange(&softmax, &texts, 16, None)?;
        for model in [exchanged.clone(), without_maps(exchanged)] {
            let difference = (logits(&model)? - expected.clone()).abs().max();
            assert!(difference.into_scalar::<f32>() < 1e-4);
        }
        Ok(())
    }

    /// A byte changes nothing before it, whatever the attention.
    #[test]
    fn no_byte_is_seen_early() -> Result<()> {
        let device = Device::flex();
        device.seed(4);
        let softmax = ModelConfig::new(40, 16, 2, 2).init(&device);
        let text = setup(&["--context", "40"])?.text()?;
        let mut windows = text.spread(3);
        let texts = Batch::new(&windows, &device);
        windows.iter_mut().for_each(|window| window[30] = b'#');
        let changed = Batch::new(&windows, &device);
        for model in [exchange(&softmax, &texts, 8, None)?, softmax] {
            let [(a, _), (b, _)] =
                [model.forward(texts.inputs.clone())?, model.forward(changed.inputs.clone())?];
            let difference = (a - b).abs();
            let before = difference.clone().narrow(1, 0, 30).max().into_scalar::<f32>();
            let after = difference.narrow(1, 30, 10).max().into_scalar::<f32>();
            assert!(before < 1e-4 && after > 1e-2, "{before} before the byte, {after} after it");
        }
        Ok(())
    }
}
