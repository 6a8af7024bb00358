//! The one error type, and the checks every public door makes.

/// What a caller can do wrong. Every variant names the argument, what was expected and what was
/// given.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An array has the wrong length along one axis.
    #[error("{argument}: axis {axis} must have length {expected}, got {got}")]
    Shape {
        /// The argument's name.
        argument: &'static str,
        /// The axis that does not fit, counted from 0.
        axis: usize,
        /// The length that would fit.
        expected: usize,
        /// The length that was given.
        got: usize,
    },
    /// A slice or list has the wrong number of elements.
    #[error("{argument} must have {expected} elements, got {got}")]
    Length {
        /// The argument's name.
        argument: &'static str,
        /// The number of elements that would fit.
        expected: usize,
        /// The number of elements that was given.
        got: usize,
    },
    /// Something that must hold at least one element holds none.
    #[error("{argument} must not be empty")]
    Empty {
        /// The argument's name.
        argument: &'static str,
    },
    /// A single number is outside its domain.
    #[error("{argument} must be {expected}, got {}", Number(*got))]
    Value {
        /// The argument's name.
        argument: &'static str,
        /// The domain, in words.
        expected: &'static str,
        /// The number that was given.
        got: f64,
    },
    /// An element of an array or list is NaN, infinite, or too large to be worked with.
    #[error(
        "{argument}[{index}] must be finite and at most {limit:e} in magnitude, got {}",
        Number(*got)
    )]
    NonFinite {
        /// The argument's name.
        argument: &'static str,
        /// Index of the first offending element, counted in row-major order.
        index: usize,
        /// Largest magnitude accepted.
        limit: f64,
        /// The element.
        got: f64,
    },
    /// A count must be a multiple of another one.
    #[error("{argument} must be a multiple of {divisor} ({divisor_value}), got {got}")]
    NotDivisible {
        /// The argument's name.
        argument: &'static str,
        /// Name of the number it must be a multiple of.
        divisor: &'static str,
        /// Value of the number it must be a multiple of.
        divisor_value: usize,
        /// The value that was given.
        got: usize,
    },
    /// A size, or the elements of something, are beyond what can be represented or allocated.
    #[error("{argument} must be at most {limit}, got {got}")]
    TooLarge {
        /// The argument's name.
        argument: &'static str,
        /// Largest value accepted.
        limit: usize,
        /// The value that was given (saturated where it overflows).
        got: usize,
    },
    /// A state, cache or workspace was made by a layer of another shape, or a state by one with
    /// other maps, whose fingerprint is another.
    #[error(
        "the {argument} belongs to another layer: its {what} is {got}, this layer's is {expected}"
    )]
    Foreign {
        /// `state`, `cache` or `workspace`.
        argument: &'static str,
        /// The property that differs.
        what: &'static str,
        /// This layer's value.
        expected: usize,
        /// The given object's value.
        got: usize,
    },
    /// A panic, in a feature map say, or log-features that are no numbers left the object half
    /// changed: only `reset` or a copy of a whole one makes it useful again.
    #[error("{argument} was left half changed by a failure: reset it or copy a whole one over it")]
    Poisoned {
        /// The argument's name.
        argument: &'static str,
    },
    /// Two choices exclude each other.
    #[error("{argument} cannot be combined with {other}")]
    Conflict {
        /// The argument's name.
        argument: &'static str,
        /// What it cannot be combined with.
        other: &'static str,
    },
    /// A file that is damaged, of another version, or of another layer.
    #[error("{name} must be {expected}, got {got}")]
    Format {
        /// The tensor or metadata entry, by its whole name; `file` for the file itself.
        name: String,
        /// What would fit, in words.
        expected: String,
        /// What was found instead.
        got: String,
    },
    /// A file that cannot be read.
    #[error("cannot read {path}: {message}")]
    Io {
        /// The file.
        path: String,
        /// What kind of trouble it is.
        kind: std::io::ErrorKind,
        /// What the system says.
        message: String,
    },
    /// A tensor of another library is not of a kind that can be worked with: its rank, element type
    /// or device.
    #[cfg(feature = "candle")]
    #[error("{argument} must be {expected}, got {got}")]
    Tensor {
        /// The argument's name.
        argument: &'static str,
        /// What would do, in words.
        expected: &'static str,
        /// What it is instead.
        got: String,
    },
    /// A progress callback asked to stop.
    #[error("cancelled by the caller; nothing was changed")]
    Cancelled,
}

/// A number in a message: one that would be long is written as a power of ten.
struct Number(f64);

impl std::fmt::Display for Number {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.abs() {
            size if size < 1e7 && (size >= 1e-3 || size == 0.0) => write!(formatter, "{}", self.0),
            _ => write!(formatter, "{:e}", self.0),
        }
    }
}

/// `std::result::Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
