//! Correctness against the CPU engine in f64, then times, on the first GPU.
//!
//! ```text
//! check correct [setups] [seed] [tokens]    random setups: odd lengths, windows, sinks, masks,
//!                                  packed; with `tokens` one sequence of this length each
//! check backward [setups] [seed] [tokens]   gradients of the same setups
//! check decode [tokens]            a long decode, compared at its end
//! check time [forward | backward | decode | short]    one line of JSON for each
//! check compile [driver] [i]       the kernels these need, into the cache, without a GPU; of the
//!                                  24 sets only number i
//! check profile                    each kernel once or twice, for a profiler
//! ```

mod gradients;
mod setup;
mod time;

use std::error::Error;

use dijiang_cuda::{Cache, Device, Element, compile_ahead};
use half::{bf16, f16};
use rand::rngs::ChaCha8Rng;
use rand::{Rng, RngExt, SeedableRng};

use setup::{Setup, compare};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize, default: u64| arguments.get(i).map_or(Ok(default), |text| text.parse());
    if arguments.first().is_some_and(|first| first == "compile") {
        return compile(number(1, 13000)? as i32, arguments.get(2).map(|i| i.parse()).transpose()?);
    }
    let device = Device::new(0)?;
    match arguments.first().map(String::as_str) {
        Some("correct") => correct(&device, number(1, 200)?, number(2, 0)?, number(3, 0)?),
        Some("backward") => gradients::all(&device, number(1, 200)?, number(2, 0)?, number(3, 0)?),
        Some("decode") => setup::long_decode(&device, number(1, 1_000_000)? as usize),
        Some("time") => time::all(&device, arguments.get(1).map_or("", String::as_str)),
        Some("profile") => time::profile(&device),
        _ => Err("say correct, backward, decode, time, compile or profile".into()),
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

/// Largest errors of a number type, with what they are allowed to be.
struct Errors {
    name: &'static str,
    limit: f64,
    rounding: f64,
    forward: f64,
    parts: f64,
    states: f64,
    setups: usize,
    failed: usize,
}

impl Errors {
    fn new<E: Element>(limit: f64) -> Self {
        let name = E::NAME;
        Self {
            name,
            limit,
            rounding: 0.0,
            forward: 0.0,
            parts: 0.0,
            states: 0.0,
            setups: 0,
            failed: 0,
        }
    }

    fn add(&mut self, setup: &Setup, [rounding, forward, parts, states]: [f64; 4]) {
        // NaN must not pass.
        let passes = [forward, parts, states].iter().all(|&error| error <= self.limit);
        if !passes {
            println!("{} {forward:.1e} {parts:.1e} {states:.1e} {setup:?}", self.name);
        }
        self.failed += usize::from(!passes);
        self.setups += 1;
        self.rounding = larger(self.rounding, rounding);
        self.forward = larger(self.forward, forward);
        self.parts = larger(self.parts, parts);
        self.states = larger(self.states, states);
    }
}

fn larger(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}

fn correct(device: &Device, setups: u64, seed: u64, tokens: u64) -> Result<(), Box<dyn Error>> {
    let mut errors =
        [Errors::new::<bf16>(2e-3), Errors::new::<f16>(5e-4), Errors::new::<f32>(2e-5)];
    for i in 0..setups {
        let mut random = ChaCha8Rng::seed_from_u64(seed + i);
        let setup = Setup::draw(&mut random).with_tokens(tokens as usize);
        let inputs: u64 = random.random();
        errors[0].add(&setup, compare::<bf16>(device, &setup, inputs)?);
        errors[1].add(&setup, compare::<f16>(device, &setup, inputs)?);
        errors[2].add(&setup, compare::<f32>(device, &setup, inputs)?);
    }
    println!(
        "type  setups failed  limit    rounding  forward  parts+steps  states from and to the CPU"
    );
    for e in &errors {
        println!(
            "{:5} {:6} {:6}  {:.1e}  {:.1e}   {:.1e}  {:.1e}      {:.1e}",
            e.name, e.setups, e.failed, e.limit, e.rounding, e.forward, e.parts, e.states
        );
    }
    if errors.iter().all(|e| e.failed == 0) {
        Ok(())
    } else {
        Err("errors beyond the limit".into())
    }
}

/// A standard normal number.
fn normal(random: &mut impl Rng) -> f64 {
    let [u, v]: [f64; 2] = [random.random(), random.random()];
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}
