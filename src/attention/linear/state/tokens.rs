//! [`Tokens`]: single tokens that stay as they are, sinks say.

use ndarray::Array2;

use crate::Real;
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, Ops, padded};

/// Keys and values of up to so many tokens.
#[derive(Debug, PartialEq)]
pub(crate) struct Tokens<T> {
    /// One for each token there is.
    pub(crate) positions: Vec<usize>,
    /// Scaled keys `[d, room_padded]`, columns are tokens.
    pub(crate) keys: Aligned<T>,
    /// Values `[room, e_padded]`.
    pub(crate) values: Aligned<T>,
    /// e, padded to whole lane groups.
    value_stride: usize,
}

/// A copy has room for as many: no token that joins it allocates.
impl<T: Clone> Clone for Tokens<T> {
    fn clone(&self) -> Self {
        let room = self.values.len() / self.value_stride;
        Self {
            positions: roomy(&self.positions, room),
            keys: self.keys.clone(),
            values: self.values.clone(),
            value_stride: self.value_stride,
        }
    }
}

/// A copy with room for so many elements, which a clone does not have.
pub(crate) fn roomy<E: Copy>(elements: &[E], room: usize) -> Vec<E> {
    let mut copy = Vec::with_capacity(room);
    copy.extend_from_slice(elements);
    copy
}

/// The position of what stands in for a sink of an earlier segment.
pub(crate) const NOWHERE: usize = usize::MAX;

impl<T: Real> Tokens<T> {
    /// None yet, with room for so many.
    pub(crate) fn new(room: usize, dim: usize, value_dim: usize) -> Self {
        Self {
            positions: Vec::with_capacity(room),
            keys: Aligned::filled(dim * padded(room), T::ZERO),
            values: Aligned::filled(room * padded(value_dim), T::ZERO),
            value_stride: padded(value_dim),
        }
    }

    /// Room for so many, there being none: without allocating if there was as much before.
    pub(crate) fn reshape(&mut self, room: usize, dim: usize, value_dim: usize) {
        self.keys.resize(dim * padded(room), T::ZERO);
        self.values.resize(room * padded(value_dim), T::ZERO);
    }

    /// How many there can be.
    pub(crate) fn room(&self) -> usize {
        self.values.len() / self.value_stride
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        self.keys.len() + self.values.len()
    }

    /// Back to none.
    pub(crate) fn reset(&mut self) {
        self.positions.clear();
        self.keys.fill(T::zero());
        self.values.fill(T::zero());
    }

    /// Takes over others of this shape, without allocating.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.positions.clone_from(&from.positions);
        self.keys.clone_from(&from.keys);
        self.values.clone_from(&from.values);
    }

    /// No token becomes one any more: sinks, if what lies before has them all.
    pub(crate) fn close(&mut self) {
        self.positions.resize(self.room(), NOWHERE);
    }

    /// Whether there is room for one more.
    pub(crate) fn wants_more(&self) -> bool {
        self.positions.len() < self.room()
    }

    /// One more: its scaled key, column `column` of a panel, and its value `[e_padded]`.
    pub(crate) fn push(&mut self, position: usize, panel: MatRef<'_, T>, column: usize, v: &[T]) {
        self.positions.push(position);
        self.replace(self.positions.len() - 1, position, panel, column, v);
    }

    /// Another in the place of the one at `at`.
    pub(crate) fn replace(
        &mut self,
        at: usize,
        position: usize,
        panel: MatRef<'_, T>,
        column: usize,
        v: &[T],
    ) {
        let stride = self.keys.len() / panel.rows;
        for (row, keys) in self.keys.chunks_exact_mut(stride).enumerate() {
            keys[at] = panel.at(row, column);
        }
        self.values[at * v.len()..][..v.len()].copy_from_slice(v);
        self.positions[at] = position;
    }

    /// The scaled keys, a panel of columns.
    pub(crate) fn panel(&self, dim: usize) -> MatRef<'_, T> {
        MatRef::packed(&self.keys, dim, self.keys.len() / dim)
    }

    /// The value of the one at `at`, `[e_padded]`.
    pub(crate) fn value(&self, at: usize) -> &[T] {
        &self.values[at * self.value_stride..][..self.value_stride]
    }

    /// Whether the token at `position` is one.
    pub(crate) fn contain(&self, position: usize) -> bool {
        self.positions.contains(&position)
    }

    /// How many lie before `position`, of tokens in order.
    pub(crate) fn before(&self, position: usize) -> usize {
        self.positions.partition_point(|&sink| sink < position)
    }

    /// Some of them: scaled keys `[count, d]` and values `[count, e]`.
    pub(crate) fn rows(
        &self,
        which: impl ExactSizeIterator<Item = usize>,
        d: usize,
        e: usize,
    ) -> (Array2<T>, Array2<T>) {
        let (mut keys, mut values) =
            (Array2::zeros((which.len(), d)), Array2::zeros((which.len(), e)));
        let stride = self.keys.len() / d;
        for (at, (mut key, mut value)) in
            which.zip(keys.rows_mut().into_iter().zip(values.rows_mut()))
        {
            key.iter_mut().enumerate().for_each(|(i, key)| *key = self.keys[i * stride + at]);
            value.iter_mut().zip(self.value(at)).for_each(|(to, &from)| *to = from);
        }
        (keys, values)
    }

    /// Scores of the queries (rows of `x`) over the first `count` of them into `p`, whose rows are
    /// `stride` apart; −∞ beyond.
    pub(crate) fn score(
        &self,
        ops: &Ops<T>,
        count: usize,
        x: MatRef<'_, T>,
        (p, stride): (&mut [T], usize),
        ahead: Option<&mut Ahead<T>>,
    ) {
        if count == 0 {
            return;
        }
        let columns = padded(count);
        (ops.matmul_ahead)(
            MatMut::new(p, x.rows, columns, stride),
            Accum::Replace,
            x,
            MatRef::new(&self.keys, x.cols, columns, self.keys.len() / x.cols),
            ahead,
        );
        for row in p.chunks_mut(stride).take(x.rows) {
            row[count..columns].fill(T::NEG_INFINITY);
        }
    }

    /// Adds the values, weighted by the scores `p`, to `o` `[rows, e_padded]`.
    pub(crate) fn add_values(
        &self,
        ops: &Ops<T>,
        count: usize,
        p: MatRef<'_, T>,
        o: &mut [T],
        ahead: Option<&mut Ahead<T>>,
    ) {
        if count == 0 {
            return;
        }
        let e = self.value_stride;
        (ops.matmul_ahead)(
            MatMut::packed(o, p.rows, e),
            Accum::Add,
            p,
            MatRef::packed(&self.values, count, e),
            ahead,
        );
    }
}

/// Sinks and kept tokens, and how many of them have left the window: a column group of scores each.
pub(crate) struct Single<'s, T>(pub(crate) [(&'s Tokens<T>, usize); 2]);

impl<T: Real> Single<'_, T> {
    /// Columns of their scores.
    pub(crate) fn width(&self) -> usize {
        self.0.iter().map(|(_, count)| padded(*count)).sum()
    }

    /// [`Tokens::score`] of each.
    pub(crate) fn score(
        &self,
        ops: &Ops<T>,
        x: MatRef<'_, T>,
        (p, stride): (&mut [T], usize),
        mut ahead: Option<&mut Ahead<T>>,
    ) {
        let mut at = 0;
        for (tokens, count) in self.0 {
            tokens.score(ops, count, x, (&mut p[at..], stride), ahead.as_deref_mut());
            at += padded(count);
        }
    }

    /// [`Tokens::add_values`] of each, for `rows` queries whose scores are `stride` apart.
    pub(crate) fn add_values(
        &self,
        ops: &Ops<T>,
        (p, rows, stride): (&[T], usize, usize),
        o: &mut [T],
        mut ahead: Option<&mut Ahead<T>>,
    ) {
        let mut at = 0;
        for (tokens, count) in self.0 {
            let scores = MatRef::new(&p[at..], rows, count, stride);
            tokens.add_values(ops, count, scores, o, ahead.as_deref_mut());
            at += padded(count);
        }
    }
}
