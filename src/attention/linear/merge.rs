//! Segments of one sequence, each fed by itself, put together: what sequence parallelism over
//! threads or processes needs.
//!
//! ```text
//! c = max(c₁ + λ(p₂ − p₁), c₂)
//! S = exp(c₁ + λ(p₂ − p₁) − c)·S₁ + exp(c₂ − c)·S₂      (z likewise)
//! ```
//!
//! with the frames (c, p) of both states, λ = log γ. Keys that lie in the first segment's
//! window, but no more in that of the end, leave it before: they are kept or join the sums. The
//! others stay in the window. Sinks of the second segment become sinks where the first has too few;
//! else they are keys like others. Its kept keys compete with those of the first one.

use std::ops::Range;

use crate::Real;
use crate::attention::linear::LinearAttention;
use crate::attention::linear::absorb::{KeyBlock, leave, leave_chunk};
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{CausalState, HeadState, NOWHERE, Tokens};
use crate::attention::qkv::not_finite;
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::{BLOCK, Scratch, Whole};
use crate::attention::workspace::Workspace;
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::low::simd::padded;

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// `state` becomes that of its own segment and the next one, `next`: what feeding it the next
    /// segment's tokens would have made of it, up to rounding. Any cut will do, within a window
    /// chunk too.
    ///
    /// Merging is associative up to rounding, and the empty state of a position is neutral, so that
    /// any scan or reduction over segments gives the states that sequence parallelism needs:
    ///
    /// 1. every worker [extends](crate::attention::Operator::extend) a
    ///    [`new_state_at`](Self::new_state_at) the beginning of its segment by its tokens;
    /// 2. an *exclusive* scan with `merge` gives every worker the state of everything before its
    ///    segment;
    /// 3. every worker prefills its tokens from that state, which gives its outputs: those of one
    ///    worker over the whole, up to rounding.
    ///
    /// Workers may be threads, or processes that exchange `CausalState::to_bytes` (feature
    /// `states`): with MPI, `MPI_Exscan` over a user-defined operation that reads two states,
    /// merges and writes one; with a library that only gathers (NCCL), an all-gather of the bytes,
    /// whose number is the same for all, and a merge of those before one's own. What travels does
    /// not grow with the number of tokens. The example `sequence_parallel` shows it; the crate
    /// `dijiang-mpi` of this repository does it.
    ///
    /// # Cost
    /// O(m·e) per head, and O(chunk · back + R) keys through the map with a local window. On the
    /// calling thread, no allocation but for the first time in a
    /// [`step_workspace`](crate::attention::Operator::step_workspace).
    ///
    /// # Errors
    /// [`Error::Value`] unless `next` begins where `state` ends, [`Error::Foreign`] for states and
    /// a workspace of another shape or states of other maps; nothing is changed then. `state` is
    /// poisoned after an [`Error::Value`] for log-features that are not finite.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{KeyMask, LinearConfig, Operator, Window};
    /// use dijiang::kernel::DctMapConfig;
    /// use ndarray::{Array, Array3, s};
    ///
    /// let map = DctMapConfig::new().build::<f64>(8)?;
    /// let attention = LinearConfig::new().with_window(Window::new(4, 1)).build(vec![map])?;
    /// let element = |(_, i, j)| ((3 * i + 5 * j) % 7) as f64 / 7.0;
    /// let k: Array3<f64> = Array::from_shape_fn((1, 30, 8), element);
    ///
    /// let mut workspace = attention.workspace();
    /// let (first, last) = (k.slice(s![.., ..10, ..]), k.slice(s![.., 10.., ..]));
    /// let (mut state, mut next) = (attention.new_state(), attention.new_state_at(10)?);
    /// attention.extend(&mut state, (&first, &first), KeyMask::All, &mut workspace)?;
    /// attention.extend(&mut next, (&last, &last), KeyMask::All, &mut workspace)?;
    /// attention.merge(&mut state, &next, &mut workspace)?;
    /// assert_eq!((state.start(), state.position()), (0, 30));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn merge(
        &self,
        state: &mut CausalState<T>,
        next: &CausalState<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        state.check(self.shape())?;
        workspace.check(self.sizes())?;
        next.check(self.shape())?;
        if next.start() != state.position {
            return Err(Error::Value {
                argument: "the next segment",
                expected: "one that begins where the other ends",
                got: next.start() as f64,
            });
        }
        if next.position == next.start() {
            return Ok(());
        }
        let (scratch, Whole { part, .. }) = workspace.first().all();
        let (cut, end) = (state.position, next.position);
        for (h, (own, next)) in state.change().iter_mut().zip(&next.heads).enumerate() {
            let head = self.head(h);
            hand_over(&head, own, cut, (next, end), scratch);
            take_sinks(&head, own, (next, end), scratch);
            let kept = &next.kept.tokens;
            take_tokens(&head, own, kept, 0..kept.positions.len(), scratch);
            part.copy(&next.sums);
            part.settle(head.ops);
            own.sums.join(head.ops, head.log_decay, part, &mut scratch.features.feature);
            own.sums.check().map_err(|OutOfRange| not_finite())?;
        }
        state.changed(end - cut);
        Ok(())
    }
}

/// The first sinks of `next`, which ends at `end`, become sinks where some are missing; the others
/// are none in the whole, and join the sums if they have left the window.
fn take_sinks<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    (next, end): (&HeadState<T>, usize),
    scratch: &mut Scratch<T>,
) {
    let first_kept = state.ring.as_ref().map_or(end, |ring| ring.first(end));
    let sinks = &next.sinks;
    for (i, &position) in sinks.positions.iter().enumerate().filter(|(_, at)| **at != NOWHERE) {
        if state.sinks.wants_more() {
            state.sinks.push(position, sinks.panel(head.dim), i, sinks.value(i));
        } else if position < first_kept {
            take_tokens(head, state, sinks, i..i + 1, scratch);
        }
    }
}

/// Some tokens of the next segment that are older than the window at its end, and no sinks.
fn take_tokens<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    tokens: &Tokens<T>,
    which: Range<usize>,
    scratch: &mut Scratch<T>,
) {
    let HeadState { sums, kept, .. } = state;
    let Scratch { x, y, o, features, .. } = scratch;
    let (panel, stride) = (tokens.panel(head.dim), head.value_stride);
    for start in which.clone().step_by(BLOCK) {
        let end = which.end.min(start + BLOCK);
        let (count, width) = (end - start, padded(end - start));
        let mut positions = [None; BLOCK];
        for (position, i) in positions.iter_mut().zip(start..end) {
            *position = Some(tokens.positions[i]);
        }
        for (row, keys) in y.chunks_exact_mut(width).take(head.dim).enumerate() {
            keys.fill(T::ZERO);
            keys.iter_mut().zip(start..end).for_each(|(key, i)| *key = panel.at(row, i));
        }
        let (positions, values) = (&positions[..count], &tokens.values[start * stride..]);
        let block = KeyBlock { positions, keys: y, values };
        leave(head, (&mut *sums, &mut *kept), block, (&mut *x, &mut *o), features);
    }
}

/// A segment that ends at `cut` is followed by one that leaves the state `next` at its end: chunks
/// of the first one's window that are outside the window there join the sums, and the next one's
/// window joins the ring.
fn hand_over<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    cut: usize,
    (next, end): (&HeadState<T>, usize),
    scratch: &mut Scratch<T>,
) {
    let (Some(ring), Some(next)) = (&state.ring, &next.ring) else { return };
    let (length, slots) = (ring.chunk(), ring.slots());
    let first_kept = |position: usize| position.div_ceil(length).saturating_sub(slots);
    let kept = first_kept(end);
    for chunk in first_kept(cut)..cut.div_ceil(length).min(kept) {
        leave_chunk(head, state, chunk, scratch);
        if let Some(ring) = &mut state.ring {
            ring.clear_slot(chunk);
        }
    }
    let Some(ring) = &mut state.ring else { return };
    for chunk in kept.max(cut / length)..end.div_ceil(length) {
        let first = cut.saturating_sub(chunk * length);
        ring.slot_mut(chunk).copy_from(next.slot(chunk), first, length);
    }
}
