//! [`Operator`]: what linear and softmax attention offer alike.

use std::fmt::Debug;

use ndarray::{Array3, ArrayRef2, ArrayRef3};

use crate::Real;
use crate::attention::{KeyMask, Qkv, Workspace};
use crate::error::Result;

/// What one sequence leaves behind for its next tokens.
pub trait SequenceState: Debug + Clone + PartialEq + Send {
    /// Position of the next token.
    fn position(&self) -> usize;

    /// Bytes of what is worth keeping.
    fn bytes(&self) -> usize;

    /// Back to the empty state, without allocating.
    fn reset(&mut self);
}

/// Attention over all heads of a layer, from queries, keys and values to outputs:
/// [`LinearAttention`](crate::attention::LinearAttention), and
/// [`Softmax`](crate::attention::Softmax) which it replaces.
///
/// # Errors
/// What every method checks, before anything is changed:
/// - [`Error::Shape`](crate::Error::Shape) and [`Error::Length`](crate::Error::Length) for
///   arguments that do not fit, [`Error::Empty`](crate::Error::Empty) without queries or keys;
/// - [`Error::Value`](crate::Error::Value) for offsets that do not begin with 0, fall, or do not
///   end with the number of tokens;
/// - [`Error::Foreign`](crate::Error::Foreign) for a state or workspace of an operator of another
///   shape, or a state of one with other maps, [`Error::Poisoned`](crate::Error::Poisoned) for a
///   state that was left half changed;
/// - [`Error::TooLarge`](crate::Error::TooLarge) for outputs there is no room for;
/// - [`Error::NonFinite`](crate::Error::NonFinite) for elements beyond
///   [`Real::LIMIT`]. Keys that the mask hides, and their values, are not looked at. States are
///   unchanged after it; what an output argument holds means nothing.
///
/// And while the work is done: [`Error::Value`](crate::Error::Value) for a feature map whose
/// log-features are not finite. States that were being changed are poisoned after it.
pub trait Operator<T: Real>: Debug + Send + Sync {
    /// What one sequence leaves behind. A clone is a snapshot to return to.
    type State: SequenceState;

    /// The empty state of a new sequence.
    fn new_state(&self) -> Self::State;

    /// Whether a state can go on here.
    ///
    /// # Errors
    /// [`Error::Foreign`](crate::Error::Foreign) for a state of an operator of another shape or
    /// with other maps, [`Error::Poisoned`](crate::Error::Poisoned) for one that was left half
    /// changed.
    fn check_state(&self, state: &Self::State) -> Result<()>;

    /// Scratch for every method, for as many threads as the current pool has.
    fn workspace(&self) -> Workspace<T>;

    /// Scratch for [`step`](Self::step), smaller: for one thread. What other methods need more is
    /// made at their first call.
    fn step_workspace(&self) -> Workspace<T>;

    /// Whole sequences. Allocates the output and scratch.
    ///
    /// # Shapes
    /// - `qkv`: see [`Qkv`]; returns `[h, n_q, e]`, zeros for a query without a key.
    ///
    /// # Errors
    /// As listed at the [trait](Self).
    fn forward(&self, qkv: Qkv<'_, T>) -> Result<Array3<T>>;

    /// [`forward`](Self::forward) into the caller's memory, without allocating. Heads and sequences
    /// are shared out among the threads of the current pool; if there are at most half as many of
    /// them as threads, several threads share a long one, in room that the workspace makes at the
    /// first such call. The bits do not depend on it.
    ///
    /// # Shapes
    /// - as [`forward`](Self::forward); `out`: `[h, n_q, e]`.
    ///
    /// # Errors
    /// As listed at the [trait](Self).
    fn forward_into(
        &self,
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;

    /// The next n tokens of a sequence, of causal attention. In any pieces it gives what
    /// [`forward`](Self::forward) gives for the whole. Allocates the output and scratch.
    ///
    /// # Shapes
    /// - as [`forward`](Self::forward).
    ///
    /// # Errors
    /// As listed at the [trait](Self), and [`Error::Conflict`](crate::Error::Conflict) if attention
    /// is bidirectional.
    fn prefill(&self, state: &mut Self::State, qkv: Qkv<'_, T>) -> Result<Array3<T>> {
        self.prefill_packed(&mut [state], qkv)
    }

    /// The next tokens of several sequences, one for each state: [`prefill`](Self::prefill) of
    /// each, bit for bit. A sequence without tokens leaves its state as it is.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill); [`Error::Length`](crate::Error::Length) unless there is one
    /// offset more than states.
    fn prefill_packed(&self, states: &mut [&mut Self::State], qkv: Qkv<'_, T>)
    -> Result<Array3<T>>;

    /// [`prefill_packed`](Self::prefill_packed) into the caller's memory, shared out among threads
    /// as [`forward_into`](Self::forward_into) is. Linear attention does not allocate; a
    /// key-value cache grows.
    ///
    /// # Errors
    /// As [`prefill_packed`](Self::prefill_packed).
    fn prefill_into(
        &self,
        states: &mut [&mut Self::State],
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;

    /// Tokens that nobody queries join a state: [`prefill_into`](Self::prefill_into) without
    /// queries and outputs, at less than half the cost. The state becomes the same, bit for bit.
    ///
    /// # Shapes
    /// - `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    fn extend(
        &self,
        state: &mut Self::State,
        keys_and_values: (&ArrayRef3<T>, &ArrayRef3<T>),
        mask: KeyMask<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;

    /// The next token of a sequence, on the calling thread. A token that the mask hides (padding)
    /// has an output and a position, and is never attended to.
    ///
    /// # Shapes
    /// - `token`: [`Qkv::token`], or one token of any [`Qkv`]; `out`: `[h, e]`.
    ///
    /// # Cost
    /// Linear attention: constant, O(m·e) per head, and O(chunk · (d + e)) with a local window; no
    /// allocation. Softmax attention: O(position).
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    fn step(
        &self,
        state: &mut Self::State,
        token: Qkv<'_, T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;
}
