//! The exclusive scan: every rank gets the state of everything before its piece.

use std::time::Instant;

use dijiang::Real;
use dijiang::attention::{CausalState, LinearAttention, Operator, Storage, Workspace};
use dijiang::kernel::FeatureMap;
use mpi::request::WaitGuard;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Source};

use crate::error::Result;
use crate::ranks::{Ranks, attempt};

/// How states reach the ranks behind.
///
/// Both give the same states up to rounding, and the same bits whenever they are run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Scan {
    /// ⌈log₂ P⌉ rounds: in round r rank i sends the state of its last 2^r pieces to rank i + 2^r,
    /// and merges it twice at most.
    #[default]
    Rounds,
    /// One all-gather of all P states; every rank merges those before it. Fewer messages, one after
    /// the other, and P − 1 merges on the last rank.
    Gather,
}

/// Largest message: MPI counts in 32 bits.
const MESSAGE: usize = 1 << 30;

impl Ranks {
    /// The state of everything before this rank's piece, from the states of the pieces; none on
    /// rank 0. The last rank's is not looked at.
    ///
    /// A failure is not returned before all ranks have had their messages.
    pub(crate) fn exclusive<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        own: &CausalState<T>,
    ) -> Result<Option<CausalState<T>>, String> {
        let begun = Instant::now();
        let mut merging = Merging { attention, workspace: attention.step_workspace() };
        let before = match self.scan() {
            Scan::Rounds => self.rounds(&mut merging, own),
            Scan::Gather => self.gathered(&mut merging, own),
        };
        self.spend(|spent| spent.exchanging += begun.elapsed());
        before
    }

    fn rounds<T: Real, M: FeatureMap<T>>(
        &self,
        merging: &mut Merging<'_, T, M>,
        own: &CausalState<T>,
    ) -> Result<Option<CausalState<T>>, String> {
        let (rank, size) = (self.rank(), self.size());
        let mut bytes = own.to_bytes(Storage::Exact);
        let mut received = vec![0; bytes.len()];
        // Of the last `distance` pieces up to this one, and up to the one before.
        let (mut total, mut before) = (own.clone(), None);
        let mut result = Ok(());
        for distance in std::iter::successors(Some(1), |d| Some(2 * d)).take_while(|&d| d < size) {
            let (to, from) = (Some(rank + distance), rank.checked_sub(distance));
            let to = to.filter(|&to| to < size);
            self.exchange(
                to.map(|to| (to, &bytes[..])),
                from.map(|from| (from, &mut received[..])),
            );
            if from.is_none() || result.is_err() {
                continue;
            }
            result = attempt(|| {
                let left = merging.attention.state_from_bytes(&received)?;
                if rank + 2 * distance < size {
                    total = merging.join(left.clone(), &total)?;
                    bytes = total.to_bytes(Storage::Exact);
                }
                before = Some(match before.take() {
                    Some(before) => merging.join(left, &before)?,
                    None => left,
                });
                Ok(())
            });
        }
        result.map(|()| before)
    }

    fn gathered<T: Real, M: FeatureMap<T>>(
        &self,
        merging: &mut Merging<'_, T, M>,
        own: &CausalState<T>,
    ) -> Result<Option<CausalState<T>>, String> {
        let bytes = own.to_bytes(Storage::Exact);
        let mut states = vec![Vec::with_capacity(bytes.len()); self.size()];
        for part in bytes.chunks(MESSAGE / self.size()) {
            let mut all = vec![0; part.len() * self.size()];
            self.comm().all_gather_into(part, &mut all[..]);
            let parts = states.iter_mut().zip(all.chunks_exact(part.len()));
            parts.for_each(|(state, part)| state.extend_from_slice(part));
        }
        let sent = bytes.len() * (self.size() - 1);
        self.spend(|spent| spent.bytes_sent += sent as u64);
        attempt(|| {
            let mut before: Option<CausalState<T>> = None;
            for bytes in &states[..self.rank()] {
                let next = merging.attention.state_from_bytes(bytes)?;
                before = Some(match before {
                    Some(before) => merging.join(before, &next)?,
                    None => next,
                });
            }
            Ok(before)
        })
    }

    /// Sends to one rank while receiving from another.
    fn exchange(&self, to: Option<(usize, &[u8])>, from: Option<(usize, &mut [u8])>) {
        mpi::request::scope(|scope| {
            let mut sending = Vec::new();
            if let Some((to, bytes)) = to {
                let process = self.comm().process_at_rank(to as i32);
                for part in bytes.chunks(MESSAGE) {
                    sending.push(WaitGuard::from(process.immediate_send(scope, part)));
                }
                self.spend(|spent| spent.bytes_sent += bytes.len() as u64);
            }
            if let Some((from, bytes)) = from {
                let process = self.comm().process_at_rank(from as i32);
                bytes.chunks_mut(MESSAGE).for_each(|part| _ = process.receive_into(part));
            }
        });
    }
}

/// What merging needs.
struct Merging<'a, T: Real, M> {
    attention: &'a LinearAttention<T, M>,
    workspace: Workspace<T>,
}

impl<T: Real, M: FeatureMap<T>> Merging<'_, T, M> {
    fn join(
        &mut self,
        mut state: CausalState<T>,
        next: &CausalState<T>,
    ) -> dijiang::Result<CausalState<T>> {
        self.attention.merge(&mut state, next, &mut self.workspace)?;
        Ok(state)
    }
}
