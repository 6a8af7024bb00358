//! Hostile inputs by the million.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use serde::Serialize;

use dijiang_testing::cases::{Source, TARGETS, Tally};

/// Cases between two looks at the clock.
const ROUND: u64 = 16;

/// What became of the inputs.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Inputs {
    /// Calls that were made.
    pub(crate) inputs: u64,
    pub(crate) accepted: u64,
    pub(crate) errors: BTreeMap<&'static str, u64>,
    pub(crate) panics: u64,
    /// Cases of each target.
    pub(crate) cases: BTreeMap<&'static str, u64>,
}

/// One case after the other, until `end`; at least one round of every target.
pub(crate) fn run(seed: u64, end: Instant) -> Inputs {
    let (mut tally, mut inputs) = (Tally::default(), Inputs::default());
    let mut next = seed << 32;
    loop {
        for (target, case) in TARGETS {
            for _ in 0..ROUND {
                let run =
                    catch_unwind(AssertUnwindSafe(|| case(&mut Source::seeded(next), &mut tally)));
                if run.is_err() {
                    eprintln!("{target}: seed {next} panicked");
                    inputs.panics += 1;
                }
                next += 1;
            }
            *inputs.cases.entry(target).or_default() += ROUND;
        }
        if Instant::now() >= end {
            break;
        }
    }
    Inputs { inputs: tally.inputs(), accepted: tally.accepted, errors: tally.errors, ..inputs }
}
