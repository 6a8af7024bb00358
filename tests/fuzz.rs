//! Fuzzing without a fuzzer: the cases of every target on the numbers of seed after seed, anywhere
//! `cargo test` runs.
//!
//! ```text
//! DIJIANG_FUZZ_CASES=1000000 cargo test --release --test fuzz differential
//! DIJIANG_FUZZ_SEED=17 cargo test --test fuzz differential       the one case of this seed
//! ```
//!
//! `fuzz/` has thin targets over the same cases for cargo-fuzz.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use dijiang_testing::cases::{Source, TARGETS, Tally};

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    std::env::var(name)
        .ok()
        .map(|value| value.parse().unwrap_or_else(|error| panic!("{name}: {error}")))
}

/// Says which seed it was when a case panics.
struct Running(&'static str, u64);

impl Drop for Running {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("again: DIJIANG_FUZZ_SEED={} cargo test --test fuzz {}", self.1, self.0);
        }
    }
}

/// Runs the target's first `count` seeds, or as many as the environment says, on all cores, each
/// case on one thread.
fn drive(target: &'static str, count: u64) {
    let case = TARGETS.iter().find(|(name, _)| *name == target).map(|(_, case)| *case);
    let case = case.unwrap_or_else(|| panic!("no target {target}"));
    let one = setting("DIJIANG_FUZZ_SEED");
    let seeds =
        one.map_or(0..setting("DIJIANG_FUZZ_CASES").unwrap_or(count), |seed| seed..seed + 1);
    let (next, start) = (AtomicU64::new(seeds.start), Instant::now());
    let work = || {
        let mut tally = Tally::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return tally;
            }
            let _running = Running(target, seed);
            case(&mut Source::seeded(seed), &mut tally);
        }
    };
    let worker = || match rayon::ThreadPoolBuilder::new().num_threads(1).build() {
        Ok(pool) => pool.install(work),
        Err(error) => panic!("{error}"),
    };
    let mut tally = Tally::default();
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(part) => tally.add(&part),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
    });
    let (cases, seconds) = (seeds.end - seeds.start, start.elapsed().as_secs_f64());
    let rate = cases as f64 / seconds;
    println!(
        "{target}: {cases} cases, {} calls, {seconds:.1} s, {rate:.0} cases/s; {tally:?}",
        tally.inputs()
    );
    assert!(one.is_some() || tally.accepted > 0, "all of it was refused: {tally:?}");
}

#[test]
fn differential() {
    drive("differential", 20_000);
}

#[test]
fn states() {
    drive("states", 20_000);
}

#[test]
fn doors() {
    drive("doors", 5_000);
}

#[test]
fn files() {
    drive("files", 5_000);
}
