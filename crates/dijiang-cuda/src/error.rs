//! The one error type.

use cudarc::driver::DriverError;

/// Why a call could not be made. Nothing was changed then, unless the driver says so.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no NVIDIA driver on this machine.
    #[error("no NVIDIA driver was found: libcuda could not be loaded")]
    NoDriver,
    /// There is no NVRTC, and the kernels are not in the cache.
    #[error("kernels must be compiled and libnvrtc could not be loaded")]
    NoCompiler,
    /// NVRTC refused the kernels: for an architecture that it does not know, say.
    #[error("NVRTC failed for {architecture}: {log}")]
    Compile {
        /// What they were to be compiled for.
        architecture: String,
        /// What NVRTC said.
        log: String,
    },
    /// The driver refused a call.
    #[error("the NVIDIA driver failed: {0}")]
    Driver(#[from] DriverError),
    /// What the CPU engine can do and these kernels cannot.
    #[error("{argument} must be {expected} on a GPU, got {got}")]
    Unsupported {
        /// Which argument.
        argument: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: usize,
    },
    /// An argument has another length than it must have.
    #[error("{argument} must have {expected} elements, got {got}")]
    Length {
        /// Which argument.
        argument: &'static str,
        /// How many it must have.
        expected: usize,
        /// How many it has.
        got: usize,
    },
    /// A number is not one it may be.
    #[error("{argument} must be {expected}, got {got}")]
    Value {
        /// Which argument.
        argument: &'static str,
        /// What it must be.
        expected: &'static str,
        /// What it is.
        got: usize,
    },
    /// A tensor is not of the kind that it must be.
    #[cfg(feature = "candle")]
    #[error("{argument} must be {expected}, got {got}")]
    Tensor {
        /// Which argument.
        argument: &'static str,
        /// What it must be.
        expected: String,
        /// What it is.
        got: String,
    },
    /// What the CPU crate refuses: bytes that are no state, say.
    #[error(transparent)]
    Dijiang(#[from] dijiang::Error),
}

/// A result with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

pub(crate) fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { argument, expected, got }) }
}
