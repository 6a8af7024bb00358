//! The workshop: the only room with `unsafe`. Vector loops chosen at run time, and the general matrix product.
#![allow(unsafe_code)]

mod product;

pub(crate) use product::{Gemm, product};

use crate::real::Real;

/// Panels (`[rows, tokens]`) have a width that is a multiple of this, on every CPU and for both types.
pub(crate) const LANES: usize = 16;

/// `n` rounded up to whole lane groups.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// One implementation of every vector loop.
pub struct Ops<T> {
    /// Which instruction set this table was compiled for.
    pub name: &'static str,
    /// Every element is a number of at most this magnitude.
    pub all_within: fn(&[T], T) -> bool,
}

/// The fastest table this CPU can run.
pub(crate) fn select_ops<T: Real>() -> &'static Ops<T> {
    const { &Ops { name: "portable", all_within: |x, limit| x.iter().all(|v| v.abs() <= limit) } }
}
