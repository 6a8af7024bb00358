//! Pages to read beside the reference.

#[doc = include_str!("checkpoints.md")]
pub mod checkpoints {}

#[doc = include_str!("coming_from_softmax.md")]
pub mod coming_from_softmax {}

#[doc = include_str!("features.md")]
pub mod features {}

#[doc = include_str!("budgets.md")]
pub mod budgets {}
