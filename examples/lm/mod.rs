//! The small language model that several examples read: a byte-level LLaMA whose attention layers
//! are exchanged, the texts it is given, and what these programs have in common.

pub(crate) mod config;
pub(crate) mod error;
pub(crate) mod evaluate;
pub(crate) mod generate;
pub(crate) mod llama;
mod product;
pub(crate) mod progress;
pub(crate) mod text;

use std::fmt::Display;
use std::process::ExitCode;

/// What a program ends with; an error is written to standard error.
pub(crate) fn exit(result: Result<(), impl Display>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
