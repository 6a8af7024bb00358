//! The one error type.

/// What a caller can do wrong. Every message names the argument, what was expected and what was
/// given.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// What [`dijiang`] itself finds wrong.
    #[error(transparent)]
    Dijiang(#[from] dijiang::Error),
    /// A tensor is not of a kind that can be worked with: its element type or its backend.
    #[error("{argument} must be {expected}, got {got}")]
    Tensor {
        /// The argument's name.
        argument: &'static str,
        /// What would do, in words.
        expected: &'static str,
        /// What it is instead.
        got: String,
    },
}

/// `std::result::Result` with this crate's [`enum@Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// `sizes` are as `expected`.
pub(crate) fn check_shape<const D: usize>(
    argument: &'static str,
    expected: [usize; D],
    sizes: [usize; D],
) -> Result<()> {
    match (0..D).find(|&axis| sizes[axis] != expected[axis]) {
        None => Ok(()),
        Some(axis) => {
            let (expected, got) = (expected[axis], sizes[axis]);
            Err(dijiang::Error::Shape { argument, axis, expected, got }.into())
        }
    }
}
