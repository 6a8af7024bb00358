//! The language model that several examples read: any of the LLaMA format, whose attention layers
//! are exchanged, the texts it is given, and what these programs have in common.

mod block;
mod body;
pub(crate) mod config;
pub(crate) mod error;
pub(crate) mod evaluate;
pub(crate) mod exp;
pub(crate) mod generate;
mod head;
pub(crate) mod llama;
pub(crate) mod plan;
mod product;
pub(crate) mod progress;
pub(crate) mod stream;
pub(crate) mod text;
pub(crate) mod tokens;
pub(crate) mod walk;

use std::fmt::Display;
use std::process::ExitCode;

/// The directory of the model that comes with the examples.
pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/data/lm-kjv");

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
