#![doc = include_str!("../README.md")]

mod attention;
mod backward;
mod error;
mod fingerprint;
mod layer;
mod pieces;
mod ranks;
mod scan;

pub use error::{Error, Result};
pub use pieces::{Cost, pieces};
pub use ranks::{Ranks, Spent};
pub use scan::Scan;
