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
