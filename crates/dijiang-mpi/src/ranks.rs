//! [`Ranks`]: the communicator, and how ranks agree.

use std::cell::Cell;
use std::fmt;
use std::ops::Sub;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use dijiang::Real;
use dijiang::attention::{LinearAttention, Qkv};
use dijiang::kernel::FeatureMap;
use mpi::topology::{Communicator, SimpleCommunicator};
use mpi::traits::{CommunicatorCollectives, Root};

use crate::error::{Error, Result};
use crate::fingerprint::Fingerprint;
use crate::pieces::Cost;
use crate::scan::Scan;

/// The ranks that share a sequence: rank i holds the piece before that of rank i + 1.
///
/// Every method but the plain accessors is *collective*: all ranks call it, in the same order.
/// Messages travel on a duplicate of the communicator, so that the caller's own cannot be mixed up
/// with them.
pub struct Ranks {
    comm: SimpleCommunicator,
    scan: Scan,
    cost: Cost,
    spent: Cell<Spent>,
}

/// What a rank has spent on the others since its [`Ranks`] were made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Spent {
    /// Time in the small exchanges by which ranks agree: all but microseconds of it is waiting for
    /// slower ranks.
    pub waiting: Duration,
    /// Time in which states were written, sent, read and merged.
    pub exchanging: Duration,
    /// Bytes of states sent by this rank.
    pub bytes_sent: u64,
}

impl Sub for Spent {
    type Output = Self;

    /// What was spent after `earlier`.
    fn sub(self, earlier: Self) -> Self {
        Self {
            waiting: self.waiting - earlier.waiting,
            exchanging: self.exchanging - earlier.exchanging,
            bytes_sent: self.bytes_sent - earlier.bytes_sent,
        }
    }
}

/// Where the piece of a rank lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Position of its first token.
    pub(crate) start: usize,
    pub(crate) tokens: usize,
    /// Tokens of the ranks before that may be attended to.
    pub(crate) valid_before: usize,
    /// Tokens of the longest piece but the last.
    pub(crate) longest_before: usize,
}

/// What a rank tells the others before any work is done.
pub(crate) struct Opening {
    pub(crate) tokens: usize,
    /// Tokens that may be attended to.
    pub(crate) valid: usize,
    /// Of the state it was given: that of rank 0 counts.
    pub(crate) position: usize,
    pub(crate) fingerprint: Fingerprint,
}

impl Ranks {
    /// All ranks of `comm`, in their order. Collective.
    pub fn new(comm: &impl Communicator) -> Self {
        Self {
            comm: comm.duplicate(),
            scan: Scan::default(),
            cost: Cost::default(),
            spent: Cell::default(),
        }
    }

    /// How states reach the ranks behind; the same on all ranks.
    #[must_use]
    pub fn with_scan(self, scan: Scan) -> Self {
        Self { scan, ..self }
    }

    /// How states reach the ranks behind.
    pub fn scan(&self) -> Scan {
        self.scan
    }

    /// What a token costs: how much the last rank does while it would wait for the others. Bits of
    /// its outputs depend on it.
    #[must_use]
    pub fn with_cost(self, cost: Cost) -> Self {
        Self { cost, ..self }
    }

    /// What a token costs.
    pub fn cost(&self) -> Cost {
        self.cost
    }

    /// What a token costs here, with all ranks at work: the mean of what each finds on its sample,
    /// best of a few tries. Collective; the same on all ranks.
    ///
    /// # Shapes
    /// - `sample`: as for [`prefill`](Self::prefill), at least one token; tens of thousands, as new
    ///   memory for outputs is part of the cost, and small arrays find some that was used before.
    ///
    /// # Errors
    /// [`Error::Rank`] if one of the ranks was given what [`prefill`](Self::prefill) refuses.
    pub fn measure<T: Real, M: FeatureMap<T>>(
        &self,
        attention: &LinearAttention<T, M>,
        sample: Qkv<'_, T>,
    ) -> Result<Cost> {
        let Cost { keys, queries } = self.agree(attempt(|| Cost::measure(attention, sample)))?;
        let all = self.gather(&[keys.to_bits(), queries.to_bits()]);
        let mean = |i: usize| {
            let shares = all.iter().skip(i).step_by(2).map(|&bits| f64::from_bits(bits));
            shares.sum::<f64>() / self.size() as f64
        };
        Ok(Cost::new(mean(0), mean(1)))
    }

    /// This rank.
    pub fn rank(&self) -> usize {
        self.comm.rank() as usize
    }

    /// Number of ranks.
    pub fn size(&self) -> usize {
        self.comm.size() as usize
    }

    /// Whether the piece of this rank is the last one.
    pub fn is_last(&self) -> bool {
        self.rank() + 1 == self.size()
    }

    /// What this rank has spent so far.
    pub fn spent(&self) -> Spent {
        self.spent.get()
    }

    pub(crate) fn comm(&self) -> &SimpleCommunicator {
        &self.comm
    }

    pub(crate) fn spend(&self, change: impl FnOnce(&mut Spent)) {
        let mut spent = self.spent.get();
        change(&mut spent);
        self.spent.set(spent);
    }

    /// The first exchange of every call: either all ranks go on, each knowing its place, or all
    /// return the same error.
    pub(crate) fn open(&self, own: Result<Opening, String>) -> Result<Place> {
        let (own, words) = match own {
            Ok(Opening { tokens, valid, position, fingerprint }) => {
                (Ok(tokens), ([0, tokens, valid, position], fingerprint))
            }
            Err(message) => (Err(message), ([1, 0, 0, 0], Fingerprint::default())),
        };
        let words = [&words.0.map(|word| word as u64)[..], &words.1.words()].concat();
        let all = self.gather(&words);
        let ranks: Vec<&[u64]> = all.chunks_exact(words.len()).collect();
        let tokens = self.same(ranks.iter().position(|words| words[0] != 0), own)?;
        let prints: Vec<_> = ranks.iter().map(|words| Fingerprint::of_words(&words[4..])).collect();
        if let Some((rank, what)) = Fingerprint::first_different(&prints) {
            return Err(Error::Differ { rank, what });
        }
        let (before, others) = (&ranks[..self.rank()], &ranks[..self.size() - 1]);
        let sum =
            |i: usize, first| before.iter().map(|words| words[i]).fold(first, u64::saturating_add);
        let longest = others.iter().map(|words| words[1]).max().unwrap_or(0);
        let [start, valid_before, longest_before] = [sum(1, ranks[0][3]), sum(2, 0), longest]
            .map(|word| usize::try_from(word).unwrap_or(usize::MAX));
        Ok(Place { start, tokens, valid_before, longest_before })
    }

    /// Either all ranks get what they have, or all the error of the first one that failed.
    pub(crate) fn agree<R>(&self, own: Result<R, String>) -> Result<R> {
        let failed = self.gather(&[own.is_err().into()]).iter().position(|&failed| failed != 0);
        self.same(failed, own)
    }

    /// What this rank has if none `failed`; else the error of the one that did.
    fn same<R>(&self, failed: Option<usize>, own: Result<R, String>) -> Result<R> {
        match (own, failed) {
            (Ok(own), None) => Ok(own),
            (own, failed) => {
                let rank = failed.unwrap_or(self.rank());
                let message = self.broadcast(rank, own.err().unwrap_or_default());
                Err(Error::Rank { rank, message })
            }
        }
    }

    /// The words of all ranks, one rank after the other.
    fn gather(&self, words: &[u64]) -> Vec<u64> {
        let begun = Instant::now();
        let mut all = vec![0; words.len() * self.size()];
        self.comm.all_gather_into(words, &mut all[..]);
        self.spend(|spent| spent.waiting += begun.elapsed());
        all
    }

    /// The text that `rank` has.
    fn broadcast(&self, rank: usize, text: String) -> String {
        let (root, mut bytes) = (self.comm.process_at_rank(rank as i32), text.into_bytes());
        let mut len = bytes.len() as u64;
        root.broadcast_into(&mut len);
        bytes.resize(len as usize, 0);
        root.broadcast_into(&mut bytes[..]);
        String::from_utf8_lossy(&bytes).into_owned()
    }
}

impl fmt::Debug for Ranks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Ranks({} of {}, {:?})", self.rank(), self.size(), self.scan)
    }
}

/// Runs what only this rank does. A panic, in a feature map of the caller's say, becomes an error
/// like any other: the other ranks are waiting.
pub(crate) fn attempt<R>(work: impl FnOnce() -> dijiang::Result<R>) -> Result<R, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("panicked".into()),
    }
}
