//! What the fuzz targets run: functions from a source of numbers to calls of the crate, which panic
//! where a promise is broken.
//!
//! | target | promise |
//! | --- | --- |
//! | `differential` | the fast paths give what `dijiang::reference` gives |
//! | `doors` | any shapes, numbers, masks give a typed error and no change, or finite numbers |
//! | `states` | any bytes for a state give a typed error, or a state that works |
//! | `files` | any bytes for a model file or config give a typed error, or a layer that works |

pub mod arrays;
pub mod differential;
pub mod doors;
pub mod files;
pub mod source;
pub mod states;

use std::collections::BTreeMap;

use dijiang::{Error, Result};
pub use source::Source;

/// Every target by its name.
pub const TARGETS: [(&str, fn(&mut Source<'_>, &mut Tally)); 4] = [
    ("differential", differential::run),
    ("doors", doors::run),
    ("states", states::run),
    ("files", files::run),
];

/// What became of the inputs.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    /// Calls that were accepted.
    pub accepted: u64,
    /// Calls that were refused, by the kind of error.
    pub errors: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// Counts a result.
    pub fn record<T>(&mut self, result: Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                self.accepted += 1;
                Some(value)
            }
            Err(error) => {
                assert!(!error.to_string().is_empty());
                *self.errors.entry(kind(&error)).or_default() += 1;
                None
            }
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.accepted += other.accepted;
        for (kind, count) in &other.errors {
            *self.errors.entry(kind).or_default() += count;
        }
    }

    /// Calls that were made.
    pub fn inputs(&self) -> u64 {
        self.accepted + self.errors.values().sum::<u64>()
    }
}

fn kind(error: &Error) -> &'static str {
    match error {
        Error::Shape { .. } => "Shape",
        Error::Length { .. } => "Length",
        Error::Empty { .. } => "Empty",
        Error::Value { .. } => "Value",
        Error::NonFinite { .. } => "NonFinite",
        Error::NotDivisible { .. } => "NotDivisible",
        Error::TooLarge { .. } => "TooLarge",
        Error::Foreign { .. } => "Foreign",
        Error::Poisoned { .. } => "Poisoned",
        Error::Conflict { .. } => "Conflict",
        Error::Format { .. } => "Format",
        Error::Io { .. } => "Io",
        Error::Cancelled => "Cancelled",
        other => panic!("an error these cases do not know: {other:?}"),
    }
}
