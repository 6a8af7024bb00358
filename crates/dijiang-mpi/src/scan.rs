//! Exclusive scans: every rank gets what all ranks before it have together, or all ranks behind it.

use std::time::Instant;

use mpi::request::WaitGuard;
use mpi::traits::{Communicator, CommunicatorCollectives, Destination, Source};

use crate::error::Result;
use crate::ranks::{Ranks, attempt};

/// How states reach the ranks behind, and gradients the ranks before.
///
/// Both give the same up to rounding, and the same bits whenever they are run again.
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

/// What a scan carries from rank to rank.
pub(crate) trait Carrier {
    type Item: Clone;

    /// Where the scan begins.
    const FROM: End;

    /// As many bytes on all ranks.
    fn write(&self, item: &Self::Item) -> Vec<u8>;

    fn read(&self, bytes: &[u8]) -> dijiang::Result<Self::Item>;

    /// What two neighbours have together, `far` being nearer to where the scan begins.
    fn join(&mut self, far: Self::Item, near: &Self::Item) -> dijiang::Result<Self::Item>;
}

/// An end of the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    First,
    Last,
}

impl Ranks {
    /// What the ranks between the scan's beginning and this one have together; none on the rank
    /// where it begins. What the one where it ends has is not looked at.
    ///
    /// A failure is not returned before all ranks have had their messages.
    pub(crate) fn exclusive<C: Carrier>(
        &self,
        carrier: &mut C,
        own: &C::Item,
    ) -> Result<Option<C::Item>, String> {
        let begun = Instant::now();
        let before = match self.scan() {
            Scan::Rounds => self.rounds(carrier, own),
            Scan::Gather => self.gathered(carrier, own),
        };
        self.spend(|spent| spent.exchanging += begun.elapsed());
        before
    }

    /// The rank at a place of the scan, or the place of a rank.
    fn counted(&self, from: End, index: usize) -> usize {
        match from {
            End::First => index,
            End::Last => self.size() - 1 - index,
        }
    }

    fn rounds<C: Carrier>(
        &self,
        carrier: &mut C,
        own: &C::Item,
    ) -> Result<Option<C::Item>, String> {
        let (place, size) = (self.counted(C::FROM, self.rank()), self.size());
        let rank_at = |place| self.counted(C::FROM, place);
        let mut bytes = carrier.write(own);
        let mut received = vec![0; bytes.len()];
        // Of the last `distance` pieces up to this one, and up to the one before.
        let (mut total, mut before) = (own.clone(), None);
        let mut result = Ok(());
        for distance in std::iter::successors(Some(1), |d| Some(2 * d)).take_while(|&d| d < size) {
            let (to, from) = (Some(place + distance), place.checked_sub(distance));
            let to = to.filter(|&to| to < size);
            self.exchange(
                to.map(|to| (rank_at(to), &bytes[..])),
                from.map(|from| (rank_at(from), &mut received[..])),
            );
            if from.is_none() || result.is_err() {
                continue;
            }
            result = attempt(|| {
                let far = carrier.read(&received)?;
                if place + 2 * distance < size {
                    total = carrier.join(far.clone(), &total)?;
                    bytes = carrier.write(&total);
                }
                before = Some(match before.take() {
                    Some(before) => carrier.join(far, &before)?,
                    None => far,
                });
                Ok(())
            });
        }
        result.map(|()| before)
    }

    fn gathered<C: Carrier>(
        &self,
        carrier: &mut C,
        own: &C::Item,
    ) -> Result<Option<C::Item>, String> {
        let items = self.all_gather(&carrier.write(own));
        attempt(|| {
            let mut before: Option<C::Item> = None;
            for place in 0..self.counted(C::FROM, self.rank()) {
                let near = carrier.read(&items[self.counted(C::FROM, place)])?;
                before = Some(match before {
                    Some(far) => carrier.join(far, &near)?,
                    None => near,
                });
            }
            Ok(before)
        })
    }

    /// The bytes of all ranks, as many of each.
    pub(crate) fn all_gather(&self, bytes: &[u8]) -> Vec<Vec<u8>> {
        let mut items = vec![Vec::with_capacity(bytes.len()); self.size()];
        for part in bytes.chunks(MESSAGE / self.size()) {
            let mut all = vec![0; part.len() * self.size()];
            self.comm().all_gather_into(part, &mut all[..]);
            let parts = items.iter_mut().zip(all.chunks_exact(part.len()));
            parts.for_each(|(item, part)| item.extend_from_slice(part));
        }
        let sent = bytes.len() * (self.size() - 1);
        self.spend(|spent| spent.bytes_sent += sent as u64);
        items
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
