//! [`Ring`]: the keys and values of the local window, as they are.

use ndarray::Array2;

use crate::Real;
use crate::attention::Window;
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ops, padded};

/// The keys and values of the last `back + 1` chunks; chunk i lies in slot i mod (back + 1).
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Ring<T> {
    /// c.
    chunk: usize,
    slots: Vec<Slot<T>>,
}

/// One chunk of tokens.
#[derive(Debug, Clone)]
pub(crate) struct Slot<T> {
    /// Scaled keys `[d, c_padded]`, columns are tokens.
    pub(crate) keys: Aligned<T>,
    /// Values `[c, e_padded]`.
    pub(crate) values: Aligned<T>,
    /// Tokens that may be attended to, `[c]`.
    pub(crate) valid: Vec<bool>,
    /// Whether anything may have been written since it was cleared: a short sequence leaves most
    /// slots alone, and those are not cleared again.
    used: bool,
}

impl<T: Real> Ring<T> {
    pub(crate) fn new(window: Window, dim: usize, value_dim: usize) -> Self {
        let chunk = window.chunk;
        let slot = Slot {
            keys: Aligned::filled(dim * padded(chunk), T::ZERO),
            values: Aligned::filled(chunk * padded(value_dim), T::ZERO),
            valid: vec![false; chunk],
            used: false,
        };
        Self { chunk, slots: vec![slot; window.back + 1] }
    }

    /// Empty, for another window of at most as many chunks of at most as many tokens, without
    /// allocating.
    pub(crate) fn reshape(&mut self, window: Window, dim: usize, value_dim: usize) {
        let empty = || Slot {
            keys: Aligned::default(),
            values: Aligned::default(),
            valid: vec![],
            used: false,
        };
        self.chunk = window.chunk;
        self.slots.resize_with(window.back + 1, empty);
        for slot in &mut self.slots {
            slot.clear();
            slot.keys.resize(dim * padded(window.chunk), T::zero());
            slot.values.resize(window.chunk * padded(value_dim), T::zero());
            slot.valid.resize(window.chunk, false);
        }
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        self.slots.iter().map(|slot| slot.keys.len() + slot.values.len()).sum()
    }

    /// Keys and values, slot after slot.
    #[cfg(feature = "states")]
    pub(crate) fn numbers(&self) -> impl Iterator<Item = &[T]> {
        self.slots.iter().flat_map(|slot| [&slot.keys[..], &slot.values])
    }

    /// As [`numbers`](Self::numbers).
    #[cfg(feature = "states")]
    pub(crate) fn numbers_mut(&mut self) -> impl Iterator<Item = &mut [T]> {
        self.slots.iter_mut().flat_map(|slot| {
            slot.used = true;
            [&mut slot.keys[..], &mut slot.values]
        })
    }

    /// Which tokens may be attended to, slot after slot.
    #[cfg(feature = "states")]
    pub(crate) fn valid(&self) -> impl Iterator<Item = &[bool]> {
        self.slots.iter().map(|slot| &slot.valid[..])
    }

    /// As [`valid`](Self::valid).
    #[cfg(feature = "states")]
    pub(crate) fn valid_mut(&mut self) -> impl Iterator<Item = &mut [bool]> {
        self.slots.iter_mut().map(|slot| {
            slot.used = true;
            &mut slot.valid[..]
        })
    }

    /// Takes over another ring; without allocating if it is of this shape.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.chunk = from.chunk;
        if self.slots.len() != from.slots.len() {
            self.slots.clone_from(&from.slots);
        }
        for (slot, from) in self.slots.iter_mut().zip(&from.slots) {
            slot.keys.clone_from(&from.keys);
            slot.values.clone_from(&from.values);
            slot.valid.clone_from(&from.valid);
            slot.used = from.used;
        }
    }

    pub(crate) fn clear(&mut self) {
        self.slots.iter_mut().for_each(Slot::clear);
    }

    /// No tokens of a chunk.
    pub(crate) fn clear_slot(&mut self, chunk: usize) {
        let slots = self.slots.len();
        self.slots[chunk % slots].clear();
    }

    pub(crate) fn slot(&self, chunk: usize) -> &Slot<T> {
        &self.slots[chunk % self.slots.len()]
    }

    pub(crate) fn slot_mut(&mut self, chunk: usize) -> &mut Slot<T> {
        let slots = self.slots.len();
        let slot = &mut self.slots[chunk % slots];
        slot.used = true;
        slot
    }

    /// back + 1.
    pub(crate) fn slots(&self) -> usize {
        self.slots.len()
    }

    /// c.
    pub(crate) fn chunk(&self) -> usize {
        self.chunk
    }

    /// Position of the first token that has not left for the state when `position` tokens have been
    /// seen.
    pub(crate) fn first(&self, position: usize) -> usize {
        // Chunk i leaves when chunk i + slots begins, not when it is about to.
        position.div_ceil(self.chunk).saturating_sub(self.slots.len()) * self.chunk
    }

    /// What the tokens before `position` left here: the position of the first one, scaled keys
    /// `[tokens, d]`, values `[tokens, e]`, and which tokens may be attended to.
    pub(crate) fn tokens(
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
    pub(crate) fn push(&mut self, position: usize, key: &[T], value: &[T]) {
        let (chunk, within, stride) =
            (position / self.chunk, position % self.chunk, padded(self.chunk));
        let slot = self.slot_mut(chunk);
        for (row, &key) in slot.keys.chunks_exact_mut(stride).zip(key) {
            row[within] = key;
        }
        slot.values[within * value.len()..(within + 1) * value.len()].copy_from_slice(value);
        slot.valid[within] = true;
    }

    /// Position of the first token that a query at `position` sees here.
    pub(crate) fn first_seen(&self, position: usize) -> usize {
        (position / self.chunk).saturating_sub(self.slots.len() - 1) * self.chunk
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

    /// Columns of the scores of a query at `position`.
    pub(crate) fn columns(&self, position: usize) -> usize {
        self.seen(position).last().map_or(0, |(_, at, keys)| at + padded(keys))
    }

    /// Scores of scaled queries at `position`, rows of `x`, over the keys they see, into the rows
    /// of `p`, which are `width` apart; −∞ between and behind them.
    pub(crate) fn score(
        &self,
        ops: &Ops<T>,
        position: usize,
        x: MatRef<'_, T>,
        (p, width): (&mut [T], usize),
    ) {
        for (slot, at, keys) in self.seen(position) {
            let columns = padded(keys);
            ops.matmul(
                MatMut::new(&mut p[at..], x.rows, columns, width),
                Accum::Replace,
                x,
                MatRef::new(&slot.keys, x.cols, columns, padded(self.chunk)),
            );
            for row in p.chunks_mut(width).take(x.rows) {
                let (seen, behind) = row[at..at + columns].split_at_mut(keys);
                behind.fill(T::NEG_INFINITY);
                for (score, _) in seen.iter_mut().zip(&slot.valid).filter(|(_, valid)| !**valid) {
                    *score = T::NEG_INFINITY;
                }
            }
        }
    }

    /// Adds the values, weighted by the scores `p` of [`score`](Self::score), to the rows of `o`.
    pub(crate) fn add_values(&self, ops: &Ops<T>, position: usize, p: MatRef<'_, T>, o: &mut [T]) {
        for (slot, at, keys) in self.seen(position) {
            let stride = slot.values.len() / self.chunk;
            ops.matmul(
                MatMut::packed(&mut *o, p.rows, stride),
                Accum::Add,
                p.cols(at..at + keys),
                MatRef::packed(&slot.values, keys, stride),
            );
        }
    }

    /// Columns of the widest row of scores, those of kept tokens included.
    pub(crate) fn scores(window: Window) -> usize {
        (window.back + 1) * padded(window.chunk) + padded(window.kept)
    }
}

impl<T: Real> Slot<T> {
    /// Takes over the tokens of another slot for chunks of `length`, from the one at `first` on.
    pub(crate) fn copy_from(&mut self, from: &Self, first: usize, length: usize) {
        let stride = padded(length);
        for (keys, from) in self.keys.chunks_exact_mut(stride).zip(from.keys.chunks_exact(stride)) {
            keys[first..].copy_from_slice(&from[first..]);
        }
        let value = first * (self.values.len() / length);
        self.values[value..].copy_from_slice(&from.values[value..]);
        self.valid[first..].copy_from_slice(&from.valid[first..]);
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.used) {
            self.keys.fill(T::zero());
            self.values.fill(T::zero());
            self.valid.fill(false);
        }
    }
}

/// What they hold.
impl<T: PartialEq> PartialEq for Slot<T> {
    fn eq(&self, other: &Self) -> bool {
        (&self.keys, &self.values, &self.valid) == (&other.keys, &other.values, &other.valid)
    }
}
