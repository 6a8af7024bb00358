//! Calibrates the maps of a language model of the LLaMA format, spread over ranks: each makes the
//! softmax model's hidden states of some windows of text, once for all; each fits some of the
//! layers; rank 0 writes one file of maps, which `mpi_prefill --maps` reads.
//!
//! ```sh
//! mpirun -n 4 target/release/examples/mpi_calibrate --windows 16 --out maps.safetensors
//! ```

#[allow(dead_code, reason = "each example uses its own part")]
#[path = "../../../examples/lm/mod.rs"]
mod lm;
mod start;

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Instant;

use clap::Parser;
use dijiang::attention::KeyMask;
use dijiang::calibrate::CalibrateOptions;
use dijiang::checkpoint::save_maps;
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions};
use lm::llama::Llama;
use lm::text::Text;
use mpi::topology::SimpleCommunicator;
use mpi::traits::{Communicator, Destination, Source};
use ndarray::Array2;

#[derive(Parser)]
struct Args {
    /// Directory with config.json, the weights, and tokenizer.json unless tokens are bytes.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/data/lm-kjv"))]
    model: PathBuf,
    /// The text. Default: calibration.txt beside the model.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Windows of text.
    #[arg(long, default_value_t = 16)]
    windows: usize,
    /// Tokens a window. Default: the model's context.
    #[arg(long)]
    tokens: Option<usize>,
    /// Steps of gradient descent; 0 for what has a closed form.
    #[arg(long, default_value_t = 60)]
    steps: usize,
    #[arg(long, default_value = "maps.safetensors")]
    out: PathBuf,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    start::on_all_ranks(|world| run(&args, world))
}

fn run(args: &Args, world: &SimpleCommunicator) -> Result<(), Box<dyn Error>> {
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let softmax = Llama::load(&args.model)?;
    let convert = |layer: &_| DijiangAttention::from_softmax(layer, DijiangOptions::new());
    let mut model = softmax.exchange(convert)?;
    let path = args.text.clone().unwrap_or_else(|| args.model.join("calibration.txt"));
    let tokens = args.tokens.unwrap_or(softmax.config().context);
    let text = Text::read(&path, softmax.tokenizer(), tokens)?;
    let windows: Vec<_> = text.spread(args.windows).collect();

    // Layer l and window w belong to the ranks l and w, counted around.
    let begun = Instant::now();
    let body = softmax.body();
    let own = windows.iter().skip(rank).step_by(size);
    let mut hidden: Vec<Array2<f32>> = own.map(|window| body.embed(window)).collect();
    let mut inputs = Vec::new();
    for (l, layer) in softmax.attention().iter().enumerate() {
        let given: Vec<_> = hidden.iter().map(|x| body.attention_input(l, x)).collect();
        if l % size == rank {
            inputs.push(collected(world, &given, windows.len())?);
        } else {
            let owner = world.process_at_rank((l % size) as i32);
            given.iter().filter_map(|x| x.as_slice()).for_each(|x| owner.send(x));
        }
        for (x, given) in hidden.iter_mut().zip(&given) {
            let y = layer.forward(given, KeyMask::All)?;
            body.block(l, x, |_| Ok(y))?;
        }
    }
    let walked = begun.elapsed().as_secs_f64();

    let options = CalibrateOptions::new().with_steps(args.steps);
    let layers = model.attention_mut();
    for (i, inputs) in inputs.iter().enumerate() {
        let l = rank + i * size;
        let views: Vec<_> = inputs.iter().map(|x| x.view()).collect();
        let report = layers[l].calibrate(&views, &options, |_| ControlFlow::Continue(()))?;
        println!("layer {l}, rank {rank}: error {:.4}, was {:.4}", report.after(), report.before());
    }
    if rank > 0 {
        let own = layers.iter().skip(rank).step_by(size);
        let maps = own.map(DijiangAttention::save_maps).collect::<dijiang::Result<Vec<_>>>()?;
        maps.iter().for_each(|maps| world.process_at_rank(0).send(&maps[..]));
        return Ok(());
    }
    for (l, layer) in layers.iter_mut().enumerate().filter(|(l, _)| l % size > 0) {
        let (maps, _) = world.process_at_rank((l % size) as i32).receive_vec::<u8>();
        layer.load_maps(&maps)?;
    }
    std::fs::write(&args.out, save_maps(model.attention())?)?;
    let all = begun.elapsed().as_secs_f64();
    println!(
        "{} written in {all:.1} s, {walked:.1} s of them for hidden states",
        args.out.display()
    );
    Ok(())
}

/// What a layer is given for each window, `given` on this rank and the rest on the others.
fn collected(
    world: &SimpleCommunicator,
    given: &[Array2<f32>],
    windows: usize,
) -> Result<Vec<Array2<f32>>, Box<dyn Error>> {
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    let mut own = given.iter();
    let mut all = Vec::with_capacity(windows);
    let shape = given.first().map(Array2::raw_dim);
    for w in 0..windows {
        all.push(match (w % size == rank, shape) {
            (true, _) => own.next().cloned().unwrap_or_default(),
            (false, Some(shape)) => {
                let (rows, _) = world.process_at_rank((w % size) as i32).receive_vec::<f32>();
                Array2::from_shape_vec(shape, rows)?
            }
            (false, None) => return Err("there are more ranks than windows of text".into()),
        });
    }
    Ok(all)
}
