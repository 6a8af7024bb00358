//! Errors over random setups, for each number type.

use std::error::Error;

use dijiang_cuda::{Device, Element};
use half::{bf16, f16};
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

use crate::setup::Setup;

/// Relative errors of a setup with inputs of this seed.
pub(crate) type Compare<const N: usize> =
    fn(&Device, &Setup, u64) -> Result<[f64; N], Box<dyn Error>>;

/// Which setups are drawn.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Draws {
    pub(crate) setups: u64,
    pub(crate) seed: u64,
    /// Of one sequence each; 0 for what the setup has drawn.
    pub(crate) tokens: u64,
    pub(crate) windows: bool,
}

/// Compares every setup in bf16, f16 and f32, and prints the largest errors of each.
///
/// `columns` are what is compared, with what its errors may be over the type's limit.
pub(crate) fn check<const N: usize>(
    device: &Device,
    draws: Draws,
    columns: [(&str, f64); N],
    types: [(Compare<N>, f64); 3],
) -> Result<(), Box<dyn Error>> {
    let (mut most, mut failed) = ([[0.0; N]; 3], [0; 3]);
    let names = [bf16::NAME, f16::NAME, f32::NAME];
    for i in 0..draws.setups {
        let mut random = ChaCha8Rng::seed_from_u64(draws.seed + i);
        let setup = Setup::draw(&mut random).with_tokens(draws.tokens as usize);
        let setup = if draws.windows { setup } else { setup.without_windows() };
        let inputs: u64 = random.random();
        for (t, (compare, limit)) in types.into_iter().enumerate() {
            let errors = compare(device, &setup, inputs)?;
            // NaN must not pass.
            if !errors.iter().zip(columns).all(|(&error, (_, times))| error <= times * limit) {
                failed[t] += 1;
                println!("{} {} {setup:?}", names[t], shown(errors));
            }
            for (most, error) in most[t].iter_mut().zip(errors) {
                *most = larger(*most, error);
            }
        }
    }
    println!(
        "type  setups failed  limit    {}",
        columns.map(|(name, _)| format!("{name:8}")).join(" ")
    );
    for (t, (_, limit)) in types.into_iter().enumerate() {
        let (name, setups, failed) = (names[t], draws.setups, failed[t]);
        println!("{name:5} {setups:6} {failed:6}  {limit:.1e}   {}", shown(most[t]));
    }
    if failed == [0; 3] { Ok(()) } else { Err("errors beyond the limit".into()) }
}

fn larger(a: f64, b: f64) -> f64 {
    if b.is_nan() || b > a { b } else { a }
}

fn shown<const N: usize>(errors: [f64; N]) -> String {
    errors.map(|error| format!("{error:.1e} ")).join(" ")
}
