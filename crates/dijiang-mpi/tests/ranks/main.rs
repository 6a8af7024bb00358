//! Runs itself under `mpirun` with several numbers of ranks, more of them than cores, and compares
//! every rank's share with what one process computes.

mod cases;
mod faults;
mod random;

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use dijiang_mpi::{Ranks, Scan};
use mpi::traits::Communicator;

/// Set in the processes that are ranks, to what they are to do.
const ROLE: &str = "DIJIANG_MPI_TEST";
const SIZES: [usize; 5] = [1, 2, 3, 4, 7];
/// A job that takes longer hangs, however busy the machine.
const LIMIT: Duration = Duration::from_secs(600);

fn main() -> ExitCode {
    if let Ok(role) = std::env::var(ROLE) {
        rank(&role);
        return ExitCode::SUCCESS;
    }
    let mut failed = false;
    let jobs = SIZES.map(|size| ("equal", size)).into_iter();
    for (role, size) in jobs.chain([("faults", 1), ("faults", 3), ("dies", 3)]) {
        let begun = Instant::now();
        let passed = job(role, size);
        println!("{role} on {size} ranks: {passed:?} in {:.1} s", begun.elapsed().as_secs_f64());
        failed |= passed.is_err();
    }
    if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Runs this program on `size` ranks.
fn job(role: &str, size: usize) -> Result<(), String> {
    let program = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut command = Command::new("mpirun");
    command.args(["-n", &size.to_string()]).arg(program).env(ROLE, role);
    // Options of Open MPI, which others do not read: containers know no other user than root, and
    // ranks that wait leave the cores to the others.
    command.envs([
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("OMPI_MCA_mpi_yield_when_idle", "1"),
        ("RAYON_NUM_THREADS", "1"),
    ]);
    if role == "dies" {
        command.stderr(Stdio::null());
    }
    let begun = Instant::now();
    let mut child = command.spawn().map_err(|error| format!("mpirun: {error}"))?;
    let status = loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) => break status,
            None if begun.elapsed() > LIMIT => {
                _ = child.kill();
                return Err("it hangs".into());
            }
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    match status.success() == (role != "dies") {
        true => Ok(()),
        false => Err(status.to_string()),
    }
}

/// What one rank does. A failed assertion ends the whole job.
fn rank(role: &str) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !faults::is_wanted(info) {
            hook(info);
            std::process::exit(1);
        }
    }));
    let universe = mpi::initialize().expect("MPI was not initialised before");
    let world = universe.world();
    let ranks = [Scan::Rounds, Scan::Gather].map(|scan| Ranks::new(&world).with_scan(scan));
    match role {
        "equal" => ranks.iter().for_each(|ranks| cases::equal(ranks, &world)),
        "faults" => ranks.iter().for_each(faults::all),
        _ if world.rank() == 1 => std::process::exit(3),
        _ => cases::equal(&ranks[0], &world),
    }
}
