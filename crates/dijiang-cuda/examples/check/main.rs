//! Correctness against the CPU engine in f64, then times, on the first GPU.
//!
//! ```text
//! check correct [setups] [seed] [tokens]    random setups: odd lengths, windows, sinks, masks,
//!                                  packed; with `tokens` one sequence of this length each
//! check windowless [setups] [seed] [tokens]   the same without windows and sinks
//! check backward [setups] [seed] [tokens]   gradients of the same setups
//! check decode [tokens]            a long decode, compared at its end
//! check time [forward | backward | decode | windowless | short]    one line of JSON for each
//! check compile [driver] [i]       the kernels these need, into the cache, without a GPU; of the
//!                                  24 sets only number i
//! check profile                    each kernel once or twice, for a profiler
//! ```

mod errors;
mod gradients;
mod setup;
mod time;

use std::error::Error;

use dijiang_cuda::{Cache, Device, compile_ahead};
use half::{bf16, f16};
use rand::{Rng, RngExt};

use errors::{Compare, Draws};
use setup::compare;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: u64| arguments.get(i).map_or(Ok(default), |text| text.parse());
    if arguments.first().is_some_and(|first| first == "compile") {
        return compile(number(1, 13000)? as i32, arguments.get(2).map(|i| i.parse()).transpose()?);
    }
    let device = Device::new(0)?;
    let what = arguments.first().map(String::as_str);
    let windows = what != Some("windowless");
    let draws = || {
        let [setups, seed, tokens] = [number(1, 200)?, number(2, 0)?, number(3, 0)?];
        Ok(Draws { setups, seed, tokens, windows })
    };
    match what {
        Some("correct" | "windowless") => draws().and_then(|draws| correct(&device, draws)),
        Some("backward") => draws().and_then(|draws| gradients::check(&device, draws)),
        Some("decode") => setup::long_decode(&device, number(1, 1_000_000)? as usize),
        Some("time") => time::all(&device, arguments.get(1).map_or("", String::as_str)),
        Some("profile") => time::profile(&device),
        _ => Err("say correct, windowless, backward, decode, time, compile or profile".into()),
    }
}

fn compile(driver: i32, only: Option<usize>) -> Result<(), Box<dyn Error>> {
    let cache = Cache::default();
    for (i, sizes) in setup::sizes().enumerate() {
        let elements: [fn(_, _, _, &_) -> _; 3] =
            [compile_ahead::<bf16>, compile_ahead::<f16>, compile_ahead::<f32>];
        for (j, compile) in elements.into_iter().enumerate() {
            if only.is_none_or(|only| only == 3 * i + j) {
                compile(sizes, 90, driver, &cache)?;
            }
        }
    }
    Ok(())
}

/// Outputs, of all ways to them. What rounding alone costs is shown beside them.
fn correct(device: &Device, draws: Draws) -> Result<(), Box<dyn Error>> {
    let columns = [("rounding", f64::INFINITY), ("forward", 1.0), ("parts", 1.0), ("states", 1.0)];
    let types: [(Compare<4>, f64); 3] =
        [(compare::<bf16>, 2e-3), (compare::<f16>, 5e-4), (compare::<f32>, 2e-5)];
    errors::check(device, draws, columns, types)
}

/// A standard normal number.
fn normal(random: &mut impl Rng) -> f64 {
    let [u, v]: [f64; 2] = [random.random(), random.random()];
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
