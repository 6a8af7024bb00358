//! [`Sinks`]: the first tokens of a sequence, which every later query sees as they are.

use ndarray::Array2;

use crate::Real;
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, Ops, padded};

/// Keys and values of the first unmasked tokens. They lie in the window's ring too, for as long as
/// they are in the window, and never join the sums.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sinks<T> {
    /// Positions, ascending.
    pub(crate) positions: Vec<usize>,
    /// Scaled keys `[d, s_padded]`, columns are tokens.
    pub(crate) keys: Aligned<T>,
    /// Values `[s, e_padded]`.
    pub(crate) values: Aligned<T>,
    /// e, padded to whole lane groups.
    value_stride: usize,
}

/// The position of what stands in for a sink of an earlier segment.
pub(crate) const NOWHERE: usize = usize::MAX;

impl<T: Real> Sinks<T> {
    pub(crate) fn new(sinks: usize, dim: usize, value_dim: usize) -> Self {
        Self {
            positions: Vec::with_capacity(sinks),
            keys: Aligned::filled(dim * padded(sinks), T::ZERO),
            values: Aligned::filled(sinks * padded(value_dim), T::ZERO),
            value_stride: padded(value_dim),
        }
    }

    /// s.
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

    /// Takes over other sinks of this shape, without allocating.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.positions.clone_from(&from.positions);
        self.keys.clone_from(&from.keys);
        self.values.clone_from(&from.values);
    }

    /// No token becomes one any more: what lies before has them all.
    pub(crate) fn close(&mut self) {
        self.positions.resize(self.room(), NOWHERE);
    }

    /// Whether the next unmasked token becomes one.
    pub(crate) fn wants_more(&self) -> bool {
        self.positions.len() < self.room()
    }

    /// One more: its scaled key, column `column` of a panel, and its value `[e_padded]`.
    pub(crate) fn push(&mut self, position: usize, panel: MatRef<'_, T>, column: usize, v: &[T]) {
        let (at, stride) = (self.positions.len(), self.keys.len() / panel.rows);
        for (row, keys) in self.keys.chunks_exact_mut(stride).enumerate() {
            keys[at] = panel.at(row, column);
        }
        self.values[at * v.len()..][..v.len()].copy_from_slice(v);
        self.positions.push(position);
    }

    /// Whether the token at `position` is one.
    pub(crate) fn contain(&self, position: usize) -> bool {
        self.positions.contains(&position)
    }

    /// How many lie before `position`.
    pub(crate) fn before(&self, position: usize) -> usize {
        self.positions.partition_point(|&sink| sink < position)
    }

    /// The first `count` of them: scaled keys `[count, d]` and values `[count, e]`.
    pub(crate) fn rows(&self, count: usize, d: usize, e: usize) -> (Array2<T>, Array2<T>) {
        let stride = self.keys.len() / d;
        (
            Array2::from_shape_fn((count, d), |(j, i)| self.keys[i * stride + j]),
            Array2::from_shape_fn((count, e), |(j, i)| self.values[j * self.value_stride + i]),
        )
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
