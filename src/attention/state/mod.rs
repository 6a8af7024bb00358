//! [`CausalState`]: what a sequence leaves behind, at constant size.

#[cfg(feature = "states")]
mod bytes;
#[cfg(feature = "serde")]
mod serial;

#[cfg(feature = "states")]
pub use bytes::Storage;

use crate::attention::rows::{Valid, is_valid};
use crate::attention::window::Ring;
use crate::attention::workspace::Scratch;
use crate::attention::{Head, Window};
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ahead, Ops, Product, padded};

/// What one sequence leaves behind for its next tokens: constant size, whatever the number of
/// tokens.
///
/// Per key-value head: the sums S `[m, e]` of φ(k)·v, the normaliser z `[m]`, the reference
/// exponent c `[m]` they are scaled by, and with a local window the last `back + 1` chunks of keys and
/// values. Made by [`LinearAttention::new_state`](crate::attention::LinearAttention::new_state),
/// and fed by its `prefill` and `step`; `clone` is a snapshot to roll back to or to continue
/// several times.
#[derive(Debug, Clone, PartialEq)]
pub struct CausalState<T> {
    pub(super) heads: Vec<HeadState<T>>,
    start: usize,
    pub(super) position: usize,
    shape: Shape,
}

/// Largest position a state may begin at: exact as an f64, and later ones can still be counted.
pub(super) const MAX_POSITION: usize = 1 << 52;

/// What a state must share with the operator it is used by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) heads: usize,
    pub(super) dim: usize,
    pub(super) features: usize,
    pub(super) value_dim: usize,
    pub(super) window: Option<Window>,
}

impl<T: Real> CausalState<T> {
    pub(super) fn new(shape: Shape) -> Self {
        Self { heads: vec![HeadState::new(shape); shape.heads], start: 0, position: 0, shape }
    }

    pub(super) fn at(shape: Shape, position: usize) -> Result<Self> {
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
    /// [`Error::Foreign`] for a state of an operator of another shape; this one is unchanged then.
    pub fn copy_from(&mut self, from: &Self) -> Result<()> {
        from.check(self.shape)?;
        (self.start, self.position) = (from.start, from.position);
        self.heads.iter_mut().zip(&from.heads).for_each(|(head, from)| head.copy(from));
        Ok(())
    }

    /// Back to the empty state of a whole sequence, without allocating.
    pub fn reset(&mut self) {
        (self.start, self.position) = (0, 0);
        for head in &mut self.heads {
            head.reset();
        }
    }

    /// Whether this state was made by an operator of this shape.
    pub(super) fn check(&self, shape: Shape) -> Result<()> {
        shape.check(self.shape)
    }
}

impl Shape {
    /// Whether a state of the other shape is one of this shape.
    fn check(self, got: Self) -> Result<()> {
        let window =
            |shape: Self| shape.window.map_or((0, 0), |window| (window.chunk, window.back));
        let pairs = [
            ("number of heads", self.heads, got.heads),
            ("head dimension", self.dim, got.dim),
            ("number of features", self.features, got.features),
            ("value dimension", self.value_dim, got.value_dim),
            ("window chunk", window(self).0, window(got).0),
            ("window back", window(self).1, window(got).1),
        ];
        match pairs.into_iter().find(|(_, expected, got)| expected != got) {
            Some((what, expected, got)) => {
                Err(Error::Foreign { argument: "state", what, expected, got })
            }
            None => Ok(()),
        }
    }
}

/// The state of one key-value head.
///
/// Key j at position p_j has weight exp(b_jf − λ(p_j − p₀) − c_f) in row f of the sums, where λ =
/// log γ and the *frame* (c, p₀) is the reference exponent and the position it was taken at. A
/// query at position p reads with exp(a_f + λ(p − p₀) + c_f). The frame only moves when a key
/// exceeds it by more than [`ceiling`]: so decay costs nothing per token and accumulates no
/// rounding, c_f is always attained by some past key up to that ceiling, and the normaliser cannot
/// vanish.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct HeadState<T> {
    /// S `[m, e_padded]`.
    pub(super) sums: Vec<T>,
    /// z `[m]`.
    pub(super) norm: Vec<T>,
    /// What rounding has kept out of S, and of z: sums over millions of keys would stand still
    /// without it.
    pub(super) sums_rest: Vec<T>,
    pub(super) norm_rest: Vec<T>,
    /// c `[m]`.
    pub(super) reference: Vec<T>,
    /// p₀.
    pub(super) reference_position: usize,
    /// Decoded keys that have not joined the sums yet.
    pub(super) pending: Pending<T>,
    /// Whether any key was absorbed; until then the frame means nothing.
    pub(super) started: bool,
    /// The local window's keys and values.
    pub(super) ring: Option<Ring<T>>,
}

/// The last few decoded keys without a local window. A token then reads the sums and writes a row
/// here; writing all of the sums, with what rounding keeps out of them, waits until there are
/// [`PENDING`] rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Pending<T> {
    /// Weights in the state's frame, `[PENDING, m]`.
    pub(super) weights: Vec<T>,
    /// `[PENDING, e_padded]`.
    pub(super) values: Vec<T>,
    /// Rows in use.
    pub(super) len: usize,
}

/// Rows of [`Pending`].
pub(super) const PENDING: usize = 16;

/// By how much a key's exponent may exceed the frame. e^20 in `f32` (e^200 in `f64`) leaves room
/// for 10^12 keys and values of [`Real::LIMIT`] before anything overflows.
pub(super) fn ceiling<T: Real>() -> T {
    T::from_f64(if size_of::<T>() == 4 { 20.0 } else { 200.0 })
}

impl<T: Real> HeadState<T> {
    pub(super) fn new(shape: Shape) -> Self {
        let Shape { dim, features, value_dim, window, .. } = shape;
        let pending = if window.is_some() { 0 } else { PENDING };
        let pending = Pending {
            weights: vec![T::zero(); pending * features],
            values: vec![T::zero(); pending * padded(value_dim)],
            len: 0,
        };
        Self {
            sums: vec![T::zero(); features * padded(value_dim)],
            norm: vec![T::zero(); features],
            sums_rest: vec![T::zero(); features * padded(value_dim)],
            norm_rest: vec![T::zero(); features],
            reference: vec![T::zero(); features],
            reference_position: 0,
            pending,
            started: false,
            ring: window.map(|window| Ring::new(window, dim, value_dim)),
        }
    }

    /// Elements held.
    pub(super) fn len(&self) -> usize {
        2 * (self.sums.len() + self.norm.len())
            + self.reference.len()
            + self.pending.weights.len()
            + self.pending.values.len()
            + self.ring.as_ref().map_or(0, Ring::len)
    }

    pub(super) fn reset(&mut self) {
        self.sums.fill(T::zero());
        self.norm.fill(T::zero());
        self.sums_rest.fill(T::zero());
        self.norm_rest.fill(T::zero());
        self.reference.fill(T::zero());
        self.reference_position = 0;
        self.pending.weights.fill(T::zero());
        self.pending.values.fill(T::zero());
        self.pending.len = 0;
        self.started = false;
        if let Some(ring) = &mut self.ring {
            ring.clear();
        }
    }

    /// Takes over everything of another state; without allocating if it is of this shape.
    pub(super) fn copy(&mut self, from: &Self) {
        self.copy_far(from);
        match (&mut self.ring, &from.ring) {
            (Some(ring), Some(from)) => ring.copy(from),
            (ring, from) => ring.clone_from(from),
        }
    }

    /// Takes over the sums and frame of another state of this shape, without its local window.
    pub(super) fn copy_sums(&mut self, ops: &Ops<T>, from: &Self) {
        self.copy_far(from);
        self.settle(ops);
    }

    fn copy_far(&mut self, from: &Self) {
        self.sums.clone_from(&from.sums);
        self.norm.clone_from(&from.norm);
        self.sums_rest.clone_from(&from.sums_rest);
        self.norm_rest.clone_from(&from.norm_rest);
        self.reference.clone_from(&from.reference);
        self.reference_position = from.reference_position;
        self.started = from.started;
        self.pending.weights.clone_from(&from.pending.weights);
        self.pending.values.clone_from(&from.pending.values);
        self.pending.len = from.pending.len;
    }

    /// Adds the pending keys to the sums.
    pub(super) fn settle(&mut self, ops: &Ops<T>) {
        let len = std::mem::take(&mut self.pending.len);
        if len > 0 {
            let (m, stride) = (self.norm.len(), self.sums.len() / self.norm.len());
            for row in self.pending.weights.chunks_exact(m).take(len) {
                self.norm_rest.iter_mut().zip(row).for_each(|(rest, &weight)| *rest += weight);
            }
            let product = Product {
                m,
                n: stride,
                k: len,
                a_row: 1,
                a_col: m,
                b_row: stride,
                c_row: stride,
                accumulate: true,
            };
            ops.matmul(product, &self.pending.weights, &self.pending.values, &mut self.sums_rest);
            self.fold(ops);
        }
    }

    fn fold(&mut self, ops: &Ops<T>) {
        (ops.fold)(&mut self.norm, &mut self.norm_rest);
        (ops.fold)(&mut self.sums, &mut self.sums_rest);
    }

    /// λ(position − p₀).
    pub(super) fn decay(&self, log_decay: f64, position: usize) -> T {
        if log_decay == 0.0 {
            T::zero()
        } else {
            T::from_f64(log_decay * (position - self.reference_position) as f64)
        }
    }

    /// Moves the frame to `position` and to at least the exponents `candidate`.
    pub(super) fn rebase(
        &mut self,
        ops: &Ops<T>,
        log_decay: f64,
        position: usize,
        candidate: &[T],
    ) {
        self.settle(ops);
        let decay = self.decay(log_decay, position);
        let stride = self.sums.len() / self.norm.len();
        for (f, &candidate) in candidate.iter().enumerate() {
            if self.started {
                let current = self.reference[f] + decay;
                self.reference[f] = current.max(candidate);
                let factor = (current - self.reference[f]).exp();
                if factor != T::one() {
                    (ops.scale)(factor, &mut self.sums[f * stride..(f + 1) * stride]);
                    (ops.scale)(factor, &mut self.sums_rest[f * stride..(f + 1) * stride]);
                    self.norm[f] *= factor;
                    self.norm_rest[f] *= factor;
                }
            } else {
                self.reference[f] = candidate;
            }
        }
        self.reference_position = position;
        self.started = true;
    }

    /// Adds the sums of another state, one without pending keys. `candidate` is scratch.
    pub(super) fn join(&mut self, ops: &Ops<T>, log_decay: f64, other: &Self, candidate: &mut [T]) {
        if !other.started {
            return;
        }
        if !self.started {
            return self.copy_far(other);
        }
        let position = self.reference_position.max(other.reference_position);
        let decay = other.decay(log_decay, position);
        candidate
            .iter_mut()
            .zip(&other.reference)
            .for_each(|(candidate, &c)| *candidate = c + decay);
        self.rebase(ops, log_decay, position, candidate);
        let stride = self.sums.len() / self.norm.len();
        for (f, &candidate) in candidate.iter().enumerate() {
            let factor = (candidate - self.reference[f]).exp();
            self.norm_rest[f] += factor * (other.norm[f] + other.norm_rest[f]);
            let row = f * stride..(f + 1) * stride;
            let sums = other.sums[row.clone()].iter().zip(&other.sums_rest[row.clone()]);
            self.sums_rest[row]
                .iter_mut()
                .zip(sums)
                .for_each(|(own, (&sum, &rest))| *own += factor * (sum + rest));
        }
        self.fold(ops);
    }

    /// First token of a panel of log-features whose exponent leaves the frame; `exponents` holds
    /// −λ(p_j − p₀), or −∞ for masked tokens. In an unstarted state every valid token does. `top`
    /// and `negated` are scratch.
    pub(super) fn first_above(
        &self,
        ops: &Ops<T>,
        b: &[T],
        exponents: &[T],
        top: &mut [T],
        negated: &mut [T],
    ) -> Option<usize> {
        if !self.started {
            return exponents.iter().position(|&exponent| exponent > T::NEG_INFINITY);
        }
        negated.iter_mut().zip(&self.reference).for_each(|(negated, &c)| *negated = -c);
        (ops.column_max)(b, negated, top);
        let ceiling = ceiling::<T>();
        top.iter().zip(exponents).position(|(&top, &exponent)| top + exponent > ceiling)
    }

    /// −λ(p_j − p₀) for the tokens at `position`.. of a panel, −∞ for masked ones and for padding.
    pub(super) fn exponents(
        &self,
        log_decay: f64,
        position: usize,
        tokens: usize,
        valid: impl Fn(usize) -> bool,
        out: &mut [T],
    ) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = if j < tokens && valid(j) {
                -self.decay(log_decay, position + j)
            } else {
                T::NEG_INFINITY
            };
        }
    }

    /// Adds weights (a panel of `tokens` exponentials, `[m, width]`, and their row sums) times
    /// values `[tokens, e_padded]` to the sums.
    pub(super) fn accumulate(
        &mut self,
        ops: &Ops<T>,
        weights: &[T],
        row_sums: &[T],
        width: usize,
        tokens: usize,
        values: &[T],
        ahead: Option<&mut Ahead<T>>,
    ) {
        let (m, stride) = (self.norm.len(), self.sums.len() / self.norm.len());
        self.norm_rest.iter_mut().zip(row_sums).for_each(|(rest, &sum)| *rest += sum);
        let product = Product {
            m,
            n: stride,
            k: tokens,
            a_row: width,
            a_col: 1,
            b_row: stride,
            c_row: stride,
            accumulate: true,
        };
        (ops.matmul_ahead)(product, weights, values, &mut self.sums_rest, ahead);
        self.fold(ops);
    }

    /// Absorbs a block of keys that every later reader may see whole: scaled keys as the panel
    /// `scratch.y`, values as the rows `values`; the first one is at `position`.
    pub(super) fn absorb<M: FeatureMap<T>>(
        &mut self,
        head: &Head<'_, T, M>,
        position: usize,
        tokens: usize,
        valid: Valid<'_>,
        values: &[T],
        scratch: &mut Scratch<T>,
        ahead: Option<&mut Ahead<T>>,
    ) {
        let Scratch { y, b, column, top, feature, map, .. } = scratch;
        let width = padded(tokens);
        let b = &mut b[..head.features * width];
        let (column, top) = (&mut column[..width], &mut top[..width]);
        head.map.key_panel(width, &y[..head.dim * width], b, map);
        self.exponents(head.log_decay, position, tokens, |j| is_valid(valid, j), column);
        if self.first_above(head.ops, b, column, top, feature).is_some() {
            // The new frame is taken at `position`: exponents relative to it, then their maximum
            // for every feature.
            for (j, exponent) in
                column.iter_mut().enumerate().filter(|(_, exponent)| **exponent > T::NEG_INFINITY)
            {
                *exponent = T::from_f64(-head.log_decay * j as f64);
            }
            (head.ops.row_max)(b, column, feature);
            self.rebase(head.ops, head.log_decay, position, feature);
        } else if !self.started {
            return;
        }
        (head.ops.weigh)(b, &self.reference, column, feature);
        self.accumulate(head.ops, b, feature, width, tokens, values, ahead);
    }

    /// The sums hold nothing: no key has joined them, as in the first block of a sequence, or none
    /// that counts in this frame.
    pub(super) fn is_empty(&self) -> bool {
        self.norm.iter().all(|&norm| norm == T::ZERO)
    }

    /// Reads the sums for a panel of query log-features: on return `o` holds wᵀS and `total` wᵀz
    /// for every token, where w_f = exp(a_f + c_f + shift).
    pub(super) fn read(
        &self,
        ops: &Ops<T>,
        a: &mut [T],
        tokens: usize,
        shift: &[T],
        total: &mut [T],
        o: &mut [T],
        ahead: Option<&mut Ahead<T>>,
    ) {
        let (m, stride, width) = (self.norm.len(), self.sums.len() / self.norm.len(), shift.len());
        if self.is_empty() {
            (ops.exp_panel)(a, &self.reference, shift);
            total.fill(T::ZERO);
            o[..tokens * stride].fill(T::ZERO);
            return;
        }
        (ops.exp_dot)(a, &self.reference, shift, &self.norm, total);
        let product = Product {
            m: tokens,
            n: stride,
            k: m,
            a_row: 1,
            a_col: width,
            b_row: stride,
            c_row: stride,
            accumulate: false,
        };
        (ops.matmul_ahead)(product, a, &self.sums, o, ahead);
    }
}
