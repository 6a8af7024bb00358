//! Perplexity on a text.

use dijiang::layer::DijiangAttention;

use crate::args::ScoreArgs;
use crate::attention::Attend;
use crate::lm::plan::silenced;
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::model::Model;
use crate::{Opened, Result, plan};

pub(crate) fn run(args: &ScoreArgs) -> Result<()> {
    let opened = Opened::open(&args.common.model)?;
    let text = Text::read(&args.text, &opened.tokenizer, args.context)?;
    let surprises = match &args.maps {
        Some(maps) => {
            let layers = plan::load(&opened.gguf, maps)?;
            let layers = if args.alone { alone(layers)? } else { layers };
            surprises(&opened.linear_of(&layers), &text, args.windows)?
        }
        None => surprises(&opened.softmax(), &text, args.windows)?,
    };
    if let Some(every) = args.every {
        for start in (0..args.context).step_by(every) {
            let end = args.context.min(start + every);
            let part = surprises.iter().flat_map(|window| &window[start..end]);
            println!("tokens {start} to {end}: perplexity {:.4}", perplexity(part));
        }
    }
    println!(
        "perplexity {:.4} over {} windows of {} tokens",
        perplexity(surprises.iter().flatten()),
        surprises.len(),
        args.context
    );
    Ok(())
}

/// The windows and sinks of these layers with nothing behind them.
pub(crate) fn alone(
    layers: Vec<DijiangAttention<f32>>,
) -> dijiang::Result<Vec<DijiangAttention<f32>>> {
    layers.into_iter().map(silenced).collect()
}

/// −ln of the likelihood of every token in the first windows, each read on its own.
pub(crate) fn surprises<A: Attend>(
    model: &Model<'_, A>,
    text: &Text,
    windows: usize,
) -> Result<Vec<Vec<f64>>> {
    let windows = windows.min(text.windows());
    let progress = Progress::new();
    progress.stage("reading", windows);
    let window = |k| {
        let surprises = model.stream().surprises(text.input(k), text.targets(k));
        progress.tick();
        surprises
    };
    let surprises = (0..windows).map(window).collect();
    progress.finish();
    surprises
}

/// e to the power of the mean.
pub(crate) fn perplexity<'a>(surprises: impl Iterator<Item = &'a f64>) -> f64 {
    let (sum, count) = surprises.fold((0.0, 0), |(sum, count), x| (sum + x, count + 1));
    (sum / f64::from(count.max(1))).exp()
}
