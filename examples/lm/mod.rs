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
use std::io::Write;
use std::process::ExitCode;

use serde::Serialize;

/// The directory of the model that comes with the examples.
pub(crate) const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/data/lm-kjv");

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

/// Writes what was found to standard output: as one JSON object, or as text.
pub(crate) fn print<R: Serialize>(
    report: &R,
    json: bool,
    text: impl FnOnce(&R) -> String,
) -> error::Result<()> {
    let mut text = match json {
        true => {
            serde_json::to_string(report).map_err(|error| error::Error::Output(error.into()))?
        }
        false => text(report),
    };
    text.push('\n');
    std::io::stdout().lock().write_all(text.as_bytes()).map_err(error::Error::Output)
}
