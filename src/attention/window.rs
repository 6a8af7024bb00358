//! Causal linear attention with an exact local window: the last chunks of keys as they are, everything
//! older through the state.

use ndarray::{Array2, ArrayView2, ArrayView3, ArrayViewMut3, s};

use crate::attention::pages::SEGMENT;
use crate::attention::rows::{Valid, copy_rows, gather, is_valid, normalise};
use crate::attention::state::HeadState;
use crate::attention::workspace::{BLOCK, Scratch};
use crate::attention::{Head, Window};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ahead, LANES, Ops, Product, padded};

/// The keys and values of the last `back + 1` chunks; chunk i lies in slot i mod (back + 1).
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ring<T> {
    /// c.
    chunk: usize,
    slots: Vec<Slot<T>>,
}

#[derive(Debug, Clone, PartialEq)]
struct Slot<T> {
    /// Scaled keys `[d, c_padded]`, columns are tokens.
    keys: Vec<T>,
    /// Values `[c, e_padded]`.
    values: Vec<T>,
    /// Tokens that may be attended to, `[c]`.
    valid: Vec<bool>,
}

impl<T: Real> Ring<T> {
    pub(super) fn new(window: Window, dim: usize, value_dim: usize) -> Self {
        let chunk = window.chunk;
        let slot = Slot {
            keys: vec![T::zero(); dim * padded(chunk)],
            values: vec![T::zero(); chunk * padded(value_dim)],
            valid: vec![false; chunk],
        };
        Self { chunk, slots: vec![slot; window.back + 1] }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.iter().map(|slot| slot.keys.len() + slot.values.len()).sum()
    }

    /// Keys and values, slot after slot.
    #[cfg(feature = "states")]
    pub(super) fn numbers(&self) -> impl Iterator<Item = &[T]> {
        self.slots.iter().flat_map(|slot| [&slot.keys[..], &slot.values])
    }

    /// As [`numbers`](Self::numbers).
    #[cfg(feature = "states")]
    pub(super) fn numbers_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        self.slots.iter_mut().flat_map(|slot| [&mut slot.keys[..], &mut slot.values])
    }

    /// Which tokens may be attended to, slot after slot.
    #[cfg(feature = "states")]
    pub(super) fn valid(&self) -> impl Iterator<Item = &[bool]> {
        self.slots.iter().map(|slot| &slot.valid[..])
    }

    /// As [`valid`](Self::valid).
    #[cfg(feature = "states")]
    pub(super) fn valid_mut(&mut self) -> impl Iterator<Item = &mut [bool]> {
        self.slots.iter_mut().map(|slot| &mut slot.valid[..])
    }

    /// Takes over another ring; without allocating if it is of this shape.
    pub(super) fn copy(&mut self, from: &Self) {
        self.chunk = from.chunk;
        if self.slots.len() != from.slots.len() {
            self.slots.clone_from(&from.slots);
        }
        for (slot, from) in self.slots.iter_mut().zip(&from.slots) {
            slot.keys.clone_from(&from.keys);
            slot.values.clone_from(&from.values);
            slot.valid.clone_from(&from.valid);
        }
    }

    pub(super) fn clear(&mut self) {
        self.slots.iter_mut().for_each(Slot::clear);
    }

    fn slot(&self, chunk: usize) -> &Slot<T> {
        &self.slots[chunk % self.slots.len()]
    }

    fn slot_mut(&mut self, chunk: usize) -> &mut Slot<T> {
        let slots = self.slots.len();
        &mut self.slots[chunk % slots]
    }

    /// c.
    pub(super) fn chunk(&self) -> usize {
        self.chunk
    }

    /// Position of the first token that has not left for the state when `position` tokens have been
    /// seen.
    pub(super) fn first(&self, position: usize) -> usize {
        // Chunk i leaves when chunk i + slots begins, not when it is about to.
        position.div_ceil(self.chunk).saturating_sub(self.slots.len()) * self.chunk
    }

    /// What the tokens before `position` left here: the position of the first one, scaled keys
    /// `[tokens, d]`, values `[tokens, e]`, and which tokens may be attended to.
    pub(super) fn tokens(
        &self,
        position: usize,
        value_dim: usize,
    ) -> (usize, Array2<T>, Array2<T>, Vec<bool>) {
        let first = self.first(position);
        let (stride, value_stride) = (padded(self.chunk), padded(value_dim));
        let at = |j: usize| (self.slot((first + j) / self.chunk), (first + j) % self.chunk);
        let dim = self.slots[0].keys.len() / stride;
        let keys = Array2::from_shape_fn((position - first, dim), |(j, i)| {
            at(j).0.keys[i * stride + at(j).1]
        });
        let values = Array2::from_shape_fn((position - first, value_dim), |(j, i)| {
            at(j).0.values[at(j).1 * value_stride + i]
        });
        (first, keys, values, (0..position - first).map(|j| at(j).0.valid[at(j).1]).collect())
    }

    /// Stores one token: its scaled key `[d]` and its value `[e_padded]`.
    pub(super) fn push(&mut self, position: usize, key: &[T], value: &[T]) {
        let (chunk, within, stride) =
            (position / self.chunk, position % self.chunk, padded(self.chunk));
        let slot = self.slot_mut(chunk);
        for (row, &key) in slot.keys.chunks_exact_mut(stride).zip(key) {
            row[within] = key;
        }
        slot.values[within * value.len()..(within + 1) * value.len()].copy_from_slice(value);
        slot.valid[within] = true;
    }

    /// Chunks that a query at `position` sees, with the first column of their scores and the keys
    /// they hold.
    fn seen(&self, position: usize) -> impl Iterator<Item = (&Slot<T>, usize, usize)> {
        let (chunk, within) = (position / self.chunk, position % self.chunk);
        let back = (self.slots.len() - 1).min(chunk);
        (0..=back).map(move |i| {
            let keys = if i == back { within + 1 } else { self.chunk };
            (self.slot(chunk - back + i), i * padded(self.chunk), keys)
        })
    }

    /// Scores of one scaled query `[d]` over the keys it sees, −∞ between and behind them; returns
    /// how many columns.
    pub(super) fn scores_of(&self, ops: &Ops<T>, position: usize, x: &[T], p: &mut [T]) -> usize {
        let stride = padded(self.chunk);
        let mut width = 0;
        for (slot, at, keys) in self.seen(position) {
            let columns = padded(keys);
            width = at + columns;
            let product = Product {
                m: 1,
                n: columns,
                k: x.len(),
                a_row: x.len(),
                a_col: 1,
                b_row: stride,
                c_row: stride,
                accumulate: false,
            };
            ops.matmul(product, x, &slot.keys, &mut p[at..]);
            p[at + keys..width].fill(T::NEG_INFINITY);
            for (score, _) in
                p[at..].iter_mut().zip(&slot.valid[..keys]).filter(|(_, valid)| !**valid)
            {
                *score = T::NEG_INFINITY;
            }
        }
        width
    }

    /// Adds the values, weighted by the scores `p` of [`scores_of`](Self::scores_of), to `o`.
    pub(super) fn add_values(
        &self,
        ops: &Ops<T>,
        position: usize,
        stride: usize,
        p: &[T],
        o: &mut [T],
    ) {
        for (slot, at, keys) in self.seen(position) {
            let product = Product {
                m: 1,
                n: stride,
                k: keys,
                a_row: keys,
                a_col: 1,
                b_row: stride,
                c_row: stride,
                accumulate: true,
            };
            ops.matmul(product, &p[at..], &slot.values, o);
        }
    }

    /// Columns of the widest row of scores.
    pub(super) fn scores(window: Window) -> usize {
        (window.back + 1) * padded(window.chunk)
    }
}

impl<T: Real> Slot<T> {
    /// Takes over the tokens of another slot for chunks of `length`, from the one at `first` on.
    fn copy_from(&mut self, from: &Self, first: usize, length: usize) {
        let stride = padded(length);
        for (keys, from) in self.keys.chunks_exact_mut(stride).zip(from.keys.chunks_exact(stride)) {
            keys[first..].copy_from_slice(&from[first..]);
        }
        let value = first * (self.values.len() / length);
        self.values[value..].copy_from_slice(&from.values[value..]);
        self.valid[first..].copy_from_slice(&from.valid[first..]);
    }

    fn clear(&mut self) {
        self.keys.fill(T::zero());
        self.values.fill(T::zero());
        self.valid.fill(false);
    }
}

/// The next tokens of one key-value head and its group of query heads.
///
/// Elements are looked at as they are read; returns false, leaving the state anywhere, if one is
/// out of range.
///
/// # Shapes
/// - `q`: `[group, n, d]`, `k`: `[n, d]`, `v`: `[n, e]`, `out`: `[group, n, e]`.
pub(super) fn window<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    position: usize,
    q: ArrayView3<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> bool {
    let Some(mut ring) = state.ring.take() else { return true };
    let (mut start, mut fits) = (0, true);
    let mut ahead =
        Ahead::of([k, v].into_iter().chain(q.outer_iter()).chain(out.view().outer_iter()));
    while fits && start < k.nrows() {
        let end = keys(head, state, &mut ring, position, k, v, valid, start, scratch);
        fits = end.is_some_and(|end| {
            let share = s![.., start..end, ..];
            ahead.aim(end, BLOCK);
            queries(
                head,
                state,
                &ring,
                position + start,
                q.slice(share),
                out.slice_mut(share),
                scratch,
                Some(&mut ahead),
            )
        });
        start = end.unwrap_or(start);
    }
    state.ring = Some(ring);
    fits
}

/// The block of keys and values at `start` goes to the ring, after the oldest chunk has left it for
/// the state, if it must; returns where the block ends, or `None` for elements out of range.
fn keys<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    ring: &mut Ring<T>,
    position: usize,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    start: usize,
    scratch: &mut Scratch<T>,
) -> Option<usize> {
    let (chunk, within) = ((position + start) / ring.chunk, (position + start) % ring.chunk);
    let end = k.nrows().min(start + BLOCK.min(ring.chunk - within).min(SEGMENT - start % SEGMENT));
    let width = padded(end - start);
    if within == 0 {
        retire(head, state, ring, chunk, scratch);
    }
    let slot = ring.slot_mut(chunk);
    let values = &mut slot.values[within * head.value_stride..];
    if !gather(head.ops, k, start..end, valid, head.scale, &mut scratch.y, &scratch.zeros)
        || !copy_rows(head.ops, v, start..end, valid, values)
    {
        return None;
    }
    let stride = padded(slot.valid.len());
    for (keys, y) in slot.keys.chunks_exact_mut(stride).zip(scratch.y.chunks_exact(width)) {
        keys[within..within + end - start].copy_from_slice(&y[..end - start]);
    }
    for j in start..end {
        slot.valid[within + j - start] = is_valid(valid, j);
    }
    Some(end)
}

/// Outputs of a block's queries, the first at `position`, over the window keys and the state. Returns
/// whether all elements were in range.
///
/// # Shapes
/// - `q`: `[group, tokens, d]`, `out`: `[group, tokens, e]`.
fn queries<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    ring: &Ring<T>,
    position: usize,
    q: ArrayView3<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
    mut ahead: Option<&mut Ahead<T>>,
) -> bool {
    let tokens = q.shape()[1];
    for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()) {
        if !gather(head.ops, q, 0..tokens, None, head.scale, &mut scratch.x, &scratch.zeros) {
            return false;
        }
        sums(head, state, ring, position, tokens, scratch, ahead.as_deref_mut());
        for (i, out) in out.outer_iter_mut().enumerate() {
            normalise(&scratch.o[i * head.value_stride..], scratch.total[i], out);
        }
    }
    true
}

/// Before chunk `chunk` begins: the oldest chunk leaves its slot for the state.
pub(super) fn retire<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    ring: &mut Ring<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    if chunk >= ring.slots.len() {
        absorb(head, state, ring, chunk - ring.slots.len(), scratch);
    }
    ring.slot_mut(chunk).clear();
}

/// The keys of a chunk in the ring join the state.
fn absorb<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    ring: &Ring<T>,
    chunk: usize,
    scratch: &mut Scratch<T>,
) {
    let (length, slot, stride) = (ring.chunk, ring.slot(chunk), padded(ring.chunk));
    for start in (0..length).step_by(BLOCK) {
        let tokens = BLOCK.min(length - start);
        let width = padded(tokens);
        for (y, keys) in scratch.y.chunks_exact_mut(width).zip(slot.keys.chunks_exact(stride)) {
            y[..tokens].copy_from_slice(&keys[start..start + tokens]);
            y[tokens..].fill(T::zero());
        }
        let values = &slot.values[start * head.value_stride..(start + tokens) * head.value_stride];
        let valid = Some(&slot.valid[start..start + tokens]);
        state.absorb(head, chunk * length + start, tokens, valid, values, scratch, None);
    }
}

/// A segment that ends at `cut` is followed by one whose end is at `position` > `cut`, with the
/// local window `next`: chunks of `ring` that are no longer near there join the state, and the next
/// one's tokens join the ring.
pub(super) fn hand_over<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    ring: &mut Ring<T>,
    cut: usize,
    next: &Ring<T>,
    position: usize,
    scratch: &mut Scratch<T>,
) {
    let (length, slots) = (ring.chunk, ring.slots.len());
    let first_window = |position: usize| position.div_ceil(length).saturating_sub(slots);
    let kept = first_window(position);
    for chunk in first_window(cut)..cut.div_ceil(length).min(kept) {
        absorb(head, state, ring, chunk, scratch);
        ring.slot_mut(chunk).clear();
    }
    for chunk in kept.max(cut / length)..position.div_ceil(length) {
        let first = cut.saturating_sub(chunk * length);
        ring.slot_mut(chunk).copy_from(next.slot(chunk), first, length);
    }
}

/// Sums and normalisers of the queries `scratch.x`, the first at `position`, over the window keys and
/// the state, into `scratch.o` and `scratch.total`.
fn sums<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    ring: &Ring<T>,
    position: usize,
    tokens: usize,
    scratch: &mut Scratch<T>,
    mut ahead: Option<&mut Ahead<T>>,
) {
    let Scratch { x, a, p, o, column, top, total, map, .. } = scratch;
    let width = padded(tokens);
    let x = &x[..head.dim * width];
    let (column, top, total) = (&mut column[..width], &mut top[..width], &mut total[..width]);
    let (chunk, within) = (position / ring.chunk, position % ring.chunk);
    let back = (ring.slots.len() - 1).min(chunk);
    let slot_width = padded(ring.chunk);
    let stride = (back + 1) * slot_width;
    let stride_v = head.value_stride;

    // Scores of the older chunks, then of the query's own up to the diagonal; −∞ where no key may
    // be looked at.
    for age in (0..=back).rev() {
        let slot = ring.slot(chunk - age);
        let at = (back - age) * slot_width;
        let last = if age == 0 { within + tokens } else { ring.chunk };
        let masked = slot.valid[..last].contains(&false);
        for band in (0..tokens).step_by(LANES) {
            let rows = LANES.min(tokens - band);
            let columns = if age == 0 { padded(within + band + rows) } else { slot_width };
            let product = Product {
                m: rows,
                n: columns,
                k: head.dim,
                a_row: 1,
                a_col: width,
                b_row: slot_width,
                c_row: stride,
                accumulate: false,
            };
            (head.ops.matmul_ahead)(
                product,
                &x[band..],
                &slot.keys,
                &mut p[band * stride + at..],
                ahead.as_deref_mut(),
            );
            for i in band..band + rows {
                let row = &mut p[i * stride + at..][..slot_width];
                let end = if age == 0 { within + i + 1 } else { ring.chunk };
                row[end..columns].fill(T::NEG_INFINITY);
                if masked {
                    for (score, _) in row.iter_mut().zip(&slot.valid).filter(|(_, valid)| !**valid)
                    {
                        *score = T::NEG_INFINITY;
                    }
                }
            }
        }
    }
    // Where the scores of a band's queries end: the own chunk comes last.
    let scores = |i: usize| {
        i * stride
            ..i * stride
                + back * slot_width
                + padded(within + tokens.min(i / LANES * LANES + LANES))
    };
    for (i, top) in top.iter_mut().enumerate() {
        *top = if i < tokens { (head.ops.slice_max)(&p[scores(i)]) } else { T::zero() };
    }

    // The far part shares the row's largest exponent with the near one.
    if state.started {
        let a = &mut a[..head.features * width];
        head.map.query_panel(width, x, a, map);
        (head.ops.column_max)(a, &state.reference, column);
        for (i, (shift, top)) in column.iter_mut().zip(top.iter_mut()).enumerate() {
            let decay = state.decay(head.log_decay, position + i);
            let far = *shift + decay;
            *top = top.max(far);
            // decay − top, so that nothing of a strong decay's rounding is left where far keys are
            // all there is.
            *shift = (far - *top) - *shift;
        }
        state.read(head.ops, a, tokens, column, total, o, ahead.as_deref_mut());
    } else {
        total.fill(T::zero());
        o[..tokens * stride_v].fill(T::zero());
    }
    for i in 0..tokens {
        let row = &mut p[scores(i)];
        if top[i] > T::NEG_INFINITY {
            total[i] += (head.ops.exp_sum)(row, -top[i]);
        } else {
            row.fill(T::zero());
        }
    }
    for age in (0..=back).rev() {
        let slot = ring.slot(chunk - age);
        let at = (back - age) * slot_width;
        for band in (0..tokens).step_by(LANES) {
            let rows = LANES.min(tokens - band);
            let keys = if age == 0 { within + band + rows } else { ring.chunk };
            let product = Product {
                m: rows,
                n: stride_v,
                k: keys,
                a_row: stride,
                a_col: 1,
                b_row: stride_v,
                c_row: stride_v,
                accumulate: true,
            };
            (head.ops.matmul_ahead)(
                product,
                &p[band * stride + at..],
                &slot.values,
                &mut o[band * stride_v..],
                ahead.as_deref_mut(),
            );
        }
    }
}
