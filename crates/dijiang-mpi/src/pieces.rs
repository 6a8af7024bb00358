//! Sizing the pieces.

/// x
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// y
    pub keys: f64,
}

/// z
pub fn pieces(n: usize, ranks: usize, _cost: Cost) -> Vec<usize> {
    (0..ranks).map(|i| (i + 1) * n / ranks - i * n / ranks).collect()
}
