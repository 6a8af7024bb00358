//! The error that every rank returns alike.

/// What can be wrong with a collective call. All ranks of the call return the same error, and no
/// state is changed.
///
/// A rank that dies is none of these: MPI then ends the whole job.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What one rank was given is wrong, or its feature map panicked.
    #[error("rank {rank}: {message}")]
    Rank {
        /// The first rank that failed.
        rank: usize,
        /// Its error, in words.
        message: String,
    },
    /// Ranks that should work on one sequence do not agree.
    #[error("the {what} of rank {rank} differ from those of rank 0")]
    Differ {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// `calls`, `options`, `maps` or `weights`.
        what: &'static str,
    },
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
