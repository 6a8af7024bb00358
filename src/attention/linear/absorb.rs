//! Keys leave the window: they are kept, or join the sums.

use crate::Real;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, Kept, Sums, key_scores};
use crate::attention::scratch::{BLOCK, FeatureScratch, Scratch};
use crate::low::mat::MatRef;
use crate::low::simd::padded;

/// A block of keys that every later reader may see whole.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyBlock<'a, T> {
    /// Position of each key that counts, `None` of the others.
    pub(crate) positions: &'a [Option<usize>],
    /// Scaled keys, a panel `[d, width]`.
    pub(crate) keys: &'a [T],
    /// Values `[tokens, e_padded]`.
    pub(crate) values: &'a [T],
}

impl<T: Real> KeyBlock<'_, T> {
    /// Columns of its panels.
    fn width(&self) -> usize {
        padded(self.positions.len())
    }
}

/// The keys of a block, weighted by their features, join the sums.
pub(crate) fn absorb<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    block: KeyBlock<'_, T>,
    scratch: &mut FeatureScratch<T>,
) {
    log_features(head, block, scratch);
    join(head, sums, block, scratch);
}

/// Log-features of the block's keys into `b`.
fn log_features<T: Real>(
    head: &Head<'_, T>,
    block: KeyBlock<'_, T>,
    scratch: &mut FeatureScratch<T>,
) {
    let FeatureScratch { b, map, .. } = scratch;
    let width = block.width();
    head.map.key_panel(
        width,
        &block.keys[..head.dim * width],
        &mut b[..head.features * width],
        map,
    );
}

/// The keys of a block, whose log-features are in `b`, join the sums.
fn join<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    block: KeyBlock<'_, T>,
    scratch: &mut FeatureScratch<T>,
) {
    let FeatureScratch { b, column, top, feature, ahead, .. } = scratch;
    let KeyBlock { positions, values, .. } = block;
    let (tokens, width) = (positions.len(), block.width());
    let b = &mut b[..head.features * width];
    let (column, top) = (&mut column[..width], &mut top[..width]);
    sums.exponents(head.log_decay, tokens, |j| positions[j], column);
    if sums.first_above(head.ops, b, column, top, feature).is_some() {
        sums.raise(head.ops, head.log_decay, positions, b, column, feature);
    } else if !sums.started {
        return;
    }
    (head.ops.weigh)(b, &sums.reference, column, feature);
    let weights = MatRef::new(b, head.features, tokens, width);
    let values = MatRef::packed(values, tokens, head.value_stride);
    sums.accumulate(head.ops, weights, feature, values, ahead);
}

/// Keys that have left the window: those of the largest scores are kept as they are, and all others
/// join the sums, those included whose place was taken. `keys` and `values` are scratch for as
/// many.
pub(crate) fn leave<T: Real>(
    head: &Head<'_, T>,
    (sums, kept): (&mut Sums<T>, &mut Kept<T>),
    block: KeyBlock<'_, T>,
    (keys, values): (&mut [T], &mut [T]),
    scratch: &mut FeatureScratch<T>,
) {
    log_features(head, block, scratch);
    let room = kept.tokens.room();
    if room == 0 {
        return join(head, sums, block, scratch);
    }
    let (tokens, stride) = (block.positions.len(), head.value_stride);
    let mut joining = [None; BLOCK];
    joining[..tokens].copy_from_slice(block.positions);
    let (mut gone, mut count) = ([None; BLOCK], 0);
    let FeatureScratch { b, column, feature, .. } = &mut *scratch;
    let width = block.width();
    key_scores(&b[..head.features * width], &mut column[..width], feature);
    let mut place = kept.last_place();
    for (j, joining) in joining[..tokens].iter_mut().enumerate() {
        let Some(position) = *joining else { continue };
        let token = (column[j].to_f64() - head.log_decay * position as f64 + 0.0, position);
        if !kept.wins(place, token) {
            continue;
        }
        *joining = None;
        if place < kept.scores.len() {
            gone[count] = Some(kept.tokens.positions[place]);
            let panel = kept.tokens.panel(head.dim);
            for (row, keys) in keys.chunks_exact_mut(BLOCK).take(head.dim).enumerate() {
                keys[count] = panel.at(row, place);
            }
            values[count * stride..][..stride].copy_from_slice(kept.tokens.value(place));
            count += 1;
        }
        let panel = MatRef::packed(block.keys, head.dim, width);
        kept.put(place, token, panel, j, &block.values[j * stride..][..stride]);
        place = kept.last_place();
    }
    if joining != [None; BLOCK] {
        join(head, sums, KeyBlock { positions: &joining[..tokens], ..block }, scratch);
    }
    if count > 0 {
        let width = padded(count);
        for row in 0..head.dim {
            keys.copy_within(row * BLOCK..row * BLOCK + count, row * width);
            keys[row * width + count..(row + 1) * width].fill(T::ZERO);
        }
        absorb(head, sums, KeyBlock { positions: &gone[..count], keys, values }, scratch);
    }
}

/// Before chunk `chunk` begins: the oldest chunk of the window leaves its slot.
pub(crate) fn retire<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    let slots = state.ring.as_ref().map_or(0, |ring| ring.slots());
    if chunk >= slots {
        leave_chunk(head, state, chunk - slots, scratch);
    }
    if let Some(ring) = &mut state.ring {
        ring.clear_slot(chunk);
    }
}

/// The keys of a chunk leave the window, but for sinks.
pub(crate) fn leave_chunk<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    let HeadState { sums, ring: Some(ring), sinks, kept } = state else { return };
    let Scratch { x, y, o, features, .. } = scratch;
    let (length, slot, stride) = (ring.chunk(), ring.slot(chunk), padded(ring.chunk()));
    for start in (0..length).step_by(BLOCK) {
        let tokens = BLOCK.min(length - start);
        let (width, first) = (padded(tokens), chunk * length + start);
        let mut positions = [None; BLOCK];
        for (j, position) in positions[..tokens].iter_mut().enumerate() {
            let joins = slot.valid[start + j] && !sinks.contain(first + j);
            *position = joins.then_some(first + j);
        }
        if positions == [None; BLOCK] {
            continue;
        }
        for (y, keys) in y.chunks_exact_mut(width).zip(slot.keys.chunks_exact(stride)) {
            y[..tokens].copy_from_slice(&keys[start..start + tokens]);
            y[tokens..].fill(T::zero());
        }
        let block = KeyBlock {
            positions: &positions[..tokens],
            keys: y,
            values: &slot.values[start * head.value_stride..][..tokens * head.value_stride],
        };
        leave(head, (&mut *sums, &mut *kept), block, (&mut *x, &mut *o), features);
    }
}
