//! [`CausalState`]: what a sequence leaves behind, at constant size.

#[cfg(feature = "states")]
mod bytes;
mod kept;
mod ring;
#[cfg(feature = "serde")]
mod serde;
mod sums;
mod tokens;

#[cfg(feature = "states")]
pub use bytes::Storage;
pub(crate) use kept::{Kept, key_scores, last_place, wins};
pub(crate) use ring::Ring;
pub(crate) use sums::{Outputs, PENDING, Pending, Sums, ceiling};
pub(crate) use tokens::{NOWHERE, Single, Tokens};

use std::sync::Arc;

use crate::Real;
use crate::attention::Window;
use crate::check::check_same;
use crate::error::{Error, Result};

/// What one sequence leaves behind for its next tokens: constant size, whatever the number of
/// tokens.
///
/// Per key-value head: the sums S `[m, e]` of φ(k)·v, the normaliser z `[m]`, the reference
/// exponent c `[m]` they are scaled by, and with a local window the last `back + 1` chunks of keys
/// and values, and those of sinks and kept keys. Made by
/// [`LinearAttention::new_state`](crate::attention::Operator::new_state), and fed by its `prefill`
/// and `step`; `clone` is a snapshot to roll back to or to continue several times.
///
/// It knows whose it is: an operator of another shape, or with other maps, decay or scale, refuses
/// it with [`Error::Foreign`]. An equal operator, built anew from the same parameters, takes it.
///
/// A panic in the middle of a change, or log-features that are no numbers, of a feature map of your
/// own say, leaves a state that nothing can be told of: every method refuses it with
/// [`Error::Poisoned`] until it is [`reset`](Self::reset) or [copied over](Self::copy_from).
#[derive(Debug, Clone, PartialEq)]
pub struct CausalState<T> {
    pub(crate) heads: Vec<HeadState<T>>,
    start: usize,
    pub(crate) position: usize,
    shape: Shape,
    /// Somebody is changing it, or was when a panic came.
    changing: bool,
}

/// Largest position a state may begin at: exact as an f64, and later ones can still be counted.
pub(crate) const MAX_POSITION: usize = 1 << 52;

/// What a state must share with the operator it is used by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) heads: usize,
    pub(crate) dim: usize,
    pub(crate) features: usize,
    pub(crate) value_dim: usize,
    /// One for each head, or none.
    pub(crate) windows: Arc<[Window]>,
    pub(crate) sinks: usize,
    /// Of maps, decay and scale; 0 for a state saved before states knew it, which any operator
    /// takes.
    pub(crate) fingerprint: u64,
}

/// The shape of one head's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HeadShape {
    pub(crate) dim: usize,
    pub(crate) features: usize,
    pub(crate) value_dim: usize,
    pub(crate) window: Option<Window>,
    pub(crate) sinks: usize,
}

impl<T: Real> CausalState<T> {
    pub(crate) fn new(shape: &Shape) -> Self {
        let heads = (0..shape.heads).map(|h| HeadState::new(shape.head(h))).collect();
        Self { heads, start: 0, position: 0, shape: shape.clone(), changing: false }
    }

    pub(crate) fn at(shape: &Shape, position: usize) -> Result<Self> {
        if position > MAX_POSITION {
            return Err(Error::TooLarge {
                argument: "position",
                limit: MAX_POSITION,
                got: position,
            });
        }
        Ok(Self { start: position, position, ..Self::new(shape) })
    }

    /// Position of the first token seen; 0 but for segments made by
    /// [`new_state_at`](crate::attention::LinearAttention::new_state_at).
    pub fn start(&self) -> usize {
        self.start
    }

    /// Position of the next token: with a [`start`](Self::start) of 0, the number of tokens seen so
    /// far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes held; does not grow.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(|head| head.len() * size_of::<T>()).sum()
    }

    /// Takes over another state of the same operator, without allocating: back to a snapshot, or on
    /// from one.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of an operator of another shape or with other maps,
    /// [`Error::Poisoned`] for one that was left half changed; this one is unchanged then.
    pub fn copy_from(&mut self, from: &Self) -> Result<()> {
        from.check(&self.shape)?;
        (self.start, self.position) = (from.start, from.position);
        self.heads.iter_mut().zip(&from.heads).for_each(|(head, from)| head.copy(from));
        self.changing = false;
        Ok(())
    }

    /// Back to the empty state of a whole sequence, without allocating.
    pub fn reset(&mut self) {
        (self.start, self.position, self.changing) = (0, 0, false);
        self.heads.iter_mut().for_each(HeadState::reset);
    }

    /// No token has been seen.
    pub(crate) fn is_fresh(&self) -> bool {
        self.position == self.start
    }

    /// From here to [`changed`](Self::changed) a panic leaves the state poisoned.
    pub(crate) fn change(&mut self) -> &mut [HeadState<T>] {
        self.changing = true;
        &mut self.heads
    }

    /// What [`change`](Self::change) began has ended, `tokens` further on.
    pub(crate) fn changed(&mut self, tokens: usize) {
        self.position += tokens;
        self.changing = false;
    }

    /// Whether this state was made by an operator of this shape and with these maps, and is whole.
    pub(crate) fn check(&self, shape: &Shape) -> Result<()> {
        shape.check(&self.shape)?;
        if self.changing { Err(Error::Poisoned { argument: "state" }) } else { Ok(()) }
    }
}

impl Shape {
    /// The shape of head `h`.
    pub(crate) fn head(&self, h: usize) -> HeadShape {
        let Self { dim, features, value_dim, sinks, .. } = *self;
        HeadShape { dim, features, value_dim, window: self.windows.get(h).copied(), sinks }
    }

    /// Whether a state of the other shape is one of this shape.
    pub(crate) fn check(&self, got: &Self) -> Result<()> {
        let different = (0..self.heads).find(|&h| self.windows.get(h) != got.windows.get(h));
        let window = |shape: &Self| {
            let window = shape.windows.get(different.unwrap_or(0));
            window.copied().unwrap_or(Window::new(0, 0))
        };
        let pairs = [
            ("number of heads", self.heads, got.heads),
            ("head dimension", self.dim, got.dim),
            ("number of features", self.features, got.features),
            ("value dimension", self.value_dim, got.value_dim),
            ("window chunk", window(self).chunk, window(got).chunk),
            ("window back", window(self).back, window(got).back),
            ("window kept", window(self).kept, window(got).kept),
            ("number of sinks", self.sinks, got.sinks),
        ];
        check_same("state", pairs)?;
        match (self.fingerprint, got.fingerprint) {
            (0, _) | (_, 0) => Ok(()),
            (own, got) => check_same("state", [("fingerprint", own as usize, got as usize)]),
        }
    }
}

/// The state of one key-value head: parts that work side by side.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HeadState<T> {
    /// Keys older than the local window.
    pub(crate) sums: Sums<T>,
    /// Those in the window.
    pub(crate) ring: Option<Ring<T>>,
    /// The first ones of the sequence. They lie in the ring too, for as long as they are in the
    /// window, and never join the sums.
    pub(crate) sinks: Tokens<T>,
    /// Those of the largest scores among the keys older than the window, which are in no sum.
    pub(crate) kept: Kept<T>,
}

impl<T: Real> HeadState<T> {
    pub(crate) fn new(shape: HeadShape) -> Self {
        let HeadShape { dim, features, value_dim, window, sinks } = shape;
        Self {
            sums: Sums::new(features, value_dim, if window.is_some() { 0 } else { PENDING }),
            ring: window.map(|window| Ring::new(window, dim, value_dim)),
            sinks: Tokens::new(sinks, dim, value_dim),
            kept: Kept::new(window.map_or(0, |window| window.kept), dim, value_dim),
        }
    }

    /// Empty, for another head of the same operator, without allocating if the rings of this one
    /// are as large.
    pub(crate) fn reshape(&mut self, shape: HeadShape) {
        self.reset();
        if let (Some(ring), Some(window)) = (&mut self.ring, shape.window) {
            ring.reshape(window, shape.dim, shape.value_dim);
            self.kept.tokens.reshape(window.kept, shape.dim, shape.value_dim);
        }
    }

    /// Its single tokens for queries whose window begins at `first`.
    pub(crate) fn single(&self, first: usize) -> Single<'_, T> {
        let kept = &self.kept.tokens;
        Single([(&self.sinks, self.sinks.before(first)), (kept, kept.positions.len())])
    }

    /// Positions of the tokens it remembers as they are, the next token being at `position`: sinks
    /// that have left the window, kept ones in order, then those in the ring.
    pub(crate) fn remembered(&self, position: usize) -> Vec<usize> {
        let first = self.ring.as_ref().map_or(position, |ring| ring.first(position));
        let outside = self.ring.as_ref().map_or(0, |_| self.sinks.before(first));
        let sinks = self.sinks.positions[..outside].iter().copied();
        let kept = self.kept.in_order().into_iter().map(|place| self.kept.tokens.positions[place]);
        sinks.chain(kept).chain(first..position).collect()
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        self.sums.len()
            + self.ring.as_ref().map_or(0, Ring::len)
            + self.sinks.len()
            + self.kept.tokens.len()
    }

    pub(crate) fn reset(&mut self) {
        self.sums.reset();
        self.sinks.reset();
        self.kept.reset();
        if let Some(ring) = &mut self.ring {
            ring.clear();
        }
    }

    /// Takes over another state; without allocating if it is of this shape.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.sums.copy(&from.sums);
        self.sinks.copy(&from.sinks);
        self.kept.copy(&from.kept);
        match (&mut self.ring, &from.ring) {
            (Some(ring), Some(from)) => ring.copy(from),
            (ring, from) => ring.clone_from(from),
        }
    }
}
