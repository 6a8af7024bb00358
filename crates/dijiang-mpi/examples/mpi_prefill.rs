//! One long text through a whole language model of the LLaMA format, over all ranks: each holds a
//! piece of the text in every layer. The last rank ends with the logits of the last token, and
//! with the states to go on from.
//!
//! ```sh
//! RAYON_NUM_THREADS=1 mpirun -n 4 target/release/examples/mpi_prefill --tokens 100000 --check
//! ```

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../../../examples/lm/mod.rs"]
mod lm;
mod start;

use std::error::Error;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use dijiang::attention::KeyMask;
use dijiang::checkpoint::load_maps;
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions};
use dijiang_mpi::{Cost, Ranks, pieces};
use lm::llama::Llama;
use lm::text::Text;
use mpi::topology::SimpleCommunicator;
use ndarray::{Array1, s};

/// Tokens that are shown: the most likely ones.
const SHOWN: usize = 5;

#[derive(Parser)]
struct Args {
    /// Directory with config.json, the weights, and tokenizer.json unless tokens are bytes.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/lm-kjv"))]
    model: PathBuf,
    /// The text. Default: calibration.txt beside the model.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Maps that calibration has saved. Default: maps as they are drawn.
    #[arg(long)]
    maps: Option<PathBuf>,
    /// Tokens of the text that are read.
    #[arg(long, default_value_t = 100_000)]
    tokens: usize,
    /// The last rank computes everything alone too, and compares.
    #[arg(long)]
    check: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    start::on_all_ranks(|world| run(&args, world))
}

fn run(args: &Args, world: &SimpleCommunicator) -> Result<(), Box<dyn Error>> {
    let ranks = Ranks::new(world);
    let softmax = Llama::load(&args.model)?;
    let convert = |layer: &_| DijiangAttention::from_softmax(layer, DijiangOptions::new());
    let mut model = softmax.exchange(convert)?;
    if let Some(maps) = &args.maps {
        load_maps(model.attention_mut(), &std::fs::read(maps)?)?;
    }
    let path = args.text.clone().unwrap_or_else(|| args.model.join("calibration.txt"));
    let text = Text::read(&path, model.tokenizer(), args.tokens)?;
    let tokens = text.input(0);

    // Most of a token's cost is in what every rank does once, beside attention.
    let lengths = pieces(tokens.len(), ranks.size(), Cost::new(0.0, 0.0));
    let start = lengths[..ranks.rank()].iter().sum::<usize>();
    let own = &tokens[start..start + lengths[ranks.rank()]];

    let begun = Instant::now();
    let (body, layers) = (model.body(), model.attention());
    let mut states: Vec<_> = layers.iter().map(Attention::new_state).collect();
    let mut x = body.embed(own);
    for (l, (layer, state)) in layers.iter().zip(&mut states).enumerate() {
        let y = ranks.prefill_layer(layer, state, &body.attention_input(l, &x), KeyMask::All)?;
        body.block(l, &mut x, |_| Ok(y))?;
    }
    let (seconds, spent) = (begun.elapsed().as_secs_f64(), ranks.spent());
    println!(
        "rank {}: {} tokens in {seconds:.2} s, {:.2} s of them waiting and {:.2} s for states",
        ranks.rank(),
        own.len(),
        spent.waiting.as_secs_f64(),
        spent.exchanging.as_secs_f64()
    );
    if !ranks.is_last() {
        return Ok(());
    }

    let logits = body.logits(&x.slice(s![-1.., ..])).row(0).to_owned();
    show(&model, &logits)?;
    if args.check {
        let alone = model.stream().prefill(tokens)?;
        let largest = |x: &Array1<f32>| x.iter().fold(0.0, |top: f32, x| top.max(x.abs()));
        let difference = largest(&(&alone - &logits)) / largest(&alone);
        println!("largest difference from one rank's logits, of the largest one: {difference:.1e}");
        if difference > 1e-3 {
            return Err("the ranks' logits are not those of one rank".into());
        }
    }
    Ok(())
}

/// The most likely next tokens.
fn show(model: &Llama<DijiangAttention<f32>>, logits: &Array1<f32>) -> Result<(), Box<dyn Error>> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
    for token in order.into_iter().take(SHOWN) {
        println!("{:?}: {:.3}", model.tokenizer().decode(&[token as u32])?, logits[token]);
    }
    Ok(())
}
