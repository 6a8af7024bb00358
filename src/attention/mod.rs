//! Attention over heads: the linear one, in O(n) with causal prefix sums, and the exact softmax one
//! beside it.
//!
//! ```text
//! A_ij = exp(x_i·y_j)         if window(i, j), kept(i, j) or sink(j)
//!      = γ^(i−j) · K(x_i, y_j) otherwise, for every allowed pair
//! o_i  = Σ_j A_ij v_j / Σ_j A_ij            a row with no allowed key gives zeros
//! ```
//!
//! with x = √σ·q, y = √σ·k and K(x, y) = Σ_f exp(a_f(x) + b_f(y)) by a
//! [`FeatureMap`](crate::kernel::FeatureMap). [`LinearAttention`] computes it in O(n);
//! [`Softmax`] is softmax attention (window(i, j) for every pair), in O(n²) and with a cache
//! that grows.
//!
//! Sources: sums over features: Katharopoulos et al. 2020, *Transformers are RNNs*, equations 8 to
//! 12; decay: Sun et al. 2023, *RetNet*, equation 5; running maxima as in the online softmax of
//! Milakov and Gimelshein 2018; the local window and the keys that it keeps are this crate's.
//!
//! Elements of q, k and v must be numbers of at most [`Real::LIMIT`](crate::Real::LIMIT) in
//! magnitude: everything else is refused at the door, before anything is changed. Within it no NaN
//! and no infinity can arise, but for one case: with decay, log-features so large (10⁸ and more in
//! `f32`) that their rounding is more than what decays over a block.

mod backward;
mod check;
mod linear;
mod operator;
mod qkv;
mod rows;
mod scratch;
mod softmax;
mod workspace;

use std::ops::Range;

pub use backward::{AttentionGradients, BackwardWorkspace, StateGradients};
pub(crate) use backward::{FarPart, Tape};
pub(crate) use check::{check_exact_part, check_state_size};
#[cfg(feature = "candle")]
pub(crate) use linear::MAX_POSITION;
#[cfg(feature = "states")]
pub use linear::Storage;
pub(crate) use linear::largest_window;
pub use linear::{CausalState, LinearAttention, LinearConfig};
pub use operator::{Operator, SequenceState};
pub use qkv::Qkv;
pub(crate) use qkv::{HeadQkv, check_offsets, check_offsets_of, ranges};
pub use softmax::{KvCache, Softmax, SoftmaxConfig};
pub use workspace::Workspace;

use crate::check::check_positive;
use crate::error::{Error, Result};

/// Which keys a query sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Causality {
    /// Its own and those before it (language models).
    #[default]
    Causal,
    /// Every key of the sequence (encoders, cross attention). There is no state to decode from.
    Bidirectional,
}

impl Causality {
    /// `argument` needs a direction.
    pub(crate) fn check_causal(self, argument: &'static str) -> Result<()> {
        match self {
            Causality::Causal => Ok(()),
            Causality::Bidirectional => {
                Err(Error::Conflict { argument, other: "bidirectional attention" })
            }
        }
    }
}

/// Which keys may be attended to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KeyMask<'a> {
    /// Every key.
    #[default]
    All,
    /// Keys whose entry is `true`, one entry per key. The k and v of the others are never looked
    /// at; they leave numerator, normaliser and state untouched, and count as tokens for positions,
    /// chunks and decay.
    Valid(&'a [bool]),
}

impl<'a> KeyMask<'a> {
    pub(crate) fn valid(self) -> Option<&'a [bool]> {
        match self {
            KeyMask::All => None,
            KeyMask::Valid(valid) => Some(valid),
        }
    }

    /// The mask of some of the keys.
    pub(crate) fn of(self, keys: Range<usize>) -> Self {
        match self {
            KeyMask::All => KeyMask::All,
            KeyMask::Valid(valid) => KeyMask::Valid(&valid[keys]),
        }
    }
}

/// Largest local window, in tokens: beyond it the ring of keys would be no constant-size state any
/// more.
const MAX_WINDOW: usize = 1 << 20;

/// The local window: the query's own chunk and the `back` chunks before it are exact softmax
/// attention, and so are `kept` keys beyond it.
///
/// ```text
/// window(i, j) = ⌊i/c⌋ − ⌊j/c⌋ ≤ r and j ≤ i
/// kept(i, j)   = score_j is among the R largest of the keys older than i's window
/// score_j      = max_f b_f(y_j) − j·log γ
/// ```
///
/// Masked keys and sinks aside; of equal scores the earlier key is kept. A key's score is the
/// largest exponent that it would have in the sums. Once there are R of them, one leaves for the
/// sums when one of a larger score comes out of the window. On SmolLM2 a quarter of a window's room
/// is worth more as kept keys than as the window's oldest ones.
///
/// Chunks are aligned to absolute positions, so prefill in any pieces and decoding agree exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Window {
    /// Chunk length c in tokens. The drop-in layer's default: 64.
    pub chunk: usize,
    /// Number r of whole chunks before the query's own one. The drop-in layer's default: 1.
    pub back: usize,
    /// Number R of keys beyond the window, sinks aside, that are exact. Default: 0.
    #[cfg_attr(feature = "serde", serde(default))]
    pub kept: usize,
}

impl Window {
    /// Chunks of `chunk` tokens, `back` of them before the query's own.
    pub fn new(chunk: usize, back: usize) -> Self {
        Self { chunk, back, kept: 0 }
    }

    /// R keys beyond the window are exact.
    #[must_use]
    pub fn with_kept(self, kept: usize) -> Self {
        Self { kept, ..self }
    }

    /// The local window that costs a head of dimension `dim` no more per token than 64 tokens a
    /// chunk cost one of dimension 64: 4096/d tokens a chunk, in whole groups of 16 and at least
    /// 64, and one chunk back. Narrow heads are worse approximated by their features, and gain more
    /// from a longer local window than from anything else.
    pub fn for_dim(dim: usize) -> Self {
        Self::new((4096 / dim.max(1)).next_multiple_of(16).clamp(64, 512), 1)
    }

    /// Tokens it holds when it is full: (r + 1)·c + R.
    pub fn tokens(self) -> usize {
        self.back.saturating_add(1).saturating_mul(self.chunk).saturating_add(self.kept)
    }

    /// Chunks of at least one token, and not too many of them.
    pub(crate) fn check(self) -> Result<()> {
        check_positive("window chunk", self.chunk)?;
        let got = self.tokens();
        if got > MAX_WINDOW {
            Err(Error::TooLarge { argument: "window tokens", limit: MAX_WINDOW, got })
        } else {
            Ok(())
        }
    }
}
