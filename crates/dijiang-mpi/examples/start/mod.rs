//! How every example begins and ends.

use std::error::Error;

use mpi::topology::SimpleCommunicator;
use mpi::traits::Communicator;

/// Runs `run` on all ranks; an error on one of them ends the job.
pub(crate) fn on_all_ranks(
    run: impl FnOnce(&SimpleCommunicator) -> Result<(), Box<dyn Error>>,
) -> Result<(), Box<dyn Error>> {
    let universe = mpi::initialize().ok_or("MPI was initialised before")?;
    let world = universe.world();
    if let Err(error) = run(&world) {
        // The others may be waiting for this rank.
        eprintln!("rank {}: {error}", world.rank());
        world.abort(1);
    }
    Ok(())
}
