//! Keys join the sums.

use crate::Real;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, Sums};
use crate::attention::rows::Valid;
use crate::attention::scratch::{BLOCK, FeatureScratch, Scratch};
use crate::low::mat::MatRef;
use crate::low::simd::padded;

/// A block of keys that every later reader may see whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyBlock<'a, T> {
    /// Position of the first key.
    pub(crate) position: usize,
    pub(crate) tokens: usize,
    pub(crate) valid: Valid<'a>,
    /// Scaled keys, a panel `[d, width]`.
    pub(crate) keys: &'a [T],
    /// Values `[tokens, e_padded]`.
    pub(crate) values: &'a [T],
}

/// The keys of a block, weighted by their features, join the sums.
pub(crate) fn absorb<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    block: KeyBlock<'_, T>,
    scratch: &mut FeatureScratch<T>,
) {
    let FeatureScratch { b, column, top, feature, map, ahead, .. } = scratch;
    let KeyBlock { position, tokens, valid, keys, values } = block;
    let width = padded(tokens);
    let b = &mut b[..head.features * width];
    let (column, top) = (&mut column[..width], &mut top[..width]);
    head.map.key_panel(width, &keys[..head.dim * width], b, map);
    let is_valid = |j: usize| valid.is_none_or(|valid| valid[j]);
    sums.exponents(head.log_decay, position, tokens, is_valid, column);
    if sums.first_above(head.ops, b, column, top, feature).is_some() {
        // The new frame is taken at `position`: exponents relative to it, then their maximum for
        // every feature.
        for (j, exponent) in
            column.iter_mut().enumerate().filter(|(_, exponent)| **exponent > T::NEG_INFINITY)
        {
            *exponent = T::from_f64(-head.log_decay * j as f64);
        }
        (head.ops.row_max)(b, column, feature);
        sums.rebase(head.ops, head.log_decay, position, feature);
    } else if !sums.started {
        return;
    }
    (head.ops.weigh)(b, &sums.reference, column, feature);
    let weights = MatRef::new(b, head.features, tokens, width);
    let values = MatRef::packed(values, tokens, head.value_stride);
    sums.accumulate(head.ops, weights, feature, values, ahead);
}

/// Before chunk `chunk` begins: the oldest chunk of the window leaves its slot for the sums.
pub(crate) fn retire<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    let slots = state.ring.as_ref().map_or(0, |ring| ring.slots());
    if chunk >= slots {
        absorb_chunk(head, state, chunk - slots, scratch);
    }
    if let Some(ring) = &mut state.ring {
        ring.clear_slot(chunk);
    }
}

/// The keys of a chunk in the window join the sums, but for sinks.
pub(crate) fn absorb_chunk<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    let HeadState { sums, ring: Some(ring), sinks } = state else { return };
    let Scratch { y, features, .. } = scratch;
    let (length, slot, stride) = (ring.chunk(), ring.slot(chunk), padded(ring.chunk()));
    for start in (0..length).step_by(BLOCK) {
        let tokens = BLOCK.min(length - start);
        let (width, position) = (padded(tokens), chunk * length + start);
        let mut valid = [false; BLOCK];
        for (j, valid) in valid[..tokens].iter_mut().enumerate() {
            *valid = slot.valid[start + j] && !sinks.contain(position + j);
        }
        if !valid.contains(&true) {
            continue;
        }
        for (y, keys) in y.chunks_exact_mut(width).zip(slot.keys.chunks_exact(stride)) {
            y[..tokens].copy_from_slice(&keys[start..start + tokens]);
            y[tokens..].fill(T::zero());
        }
        let block = KeyBlock {
            position,
            tokens,
            valid: Some(&valid[..tokens]),
            keys: y,
            values: &slot.values[start * head.value_stride..][..tokens * head.value_stride],
        };
        absorb(head, sums, block, features);
    }
}
