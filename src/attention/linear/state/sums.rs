//! [`Sums`]: running sums over features, in a frame that keeps them in range.

use crate::Real;
use crate::attention::rows::OutOfRange;
use crate::low::aligned::Aligned;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, Ops, padded};

/// Sums over the keys of one key-value head that are older than its local window.
///
/// Key j at position p_j has weight exp(b_jf − λ(p_j − p₀) − c_f) in row f of the sums, where λ =
/// log γ and the *frame* (c, p₀) is the reference exponent and the position it was taken at. A
/// query at position p reads with exp(a_f + λ(p − p₀) + c_f). The frame only moves when a key
/// exceeds it by more than [`ceiling`]: so decay costs nothing per token and accumulates no
/// rounding, c_f is always attained by some past key up to that ceiling, and the normaliser cannot
/// vanish.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Sums<T> {
    /// S `[m, e_padded]`.
    pub(crate) numerator: Aligned<T>,
    /// z `[m]`.
    pub(crate) norm: Vec<T>,
    /// What rounding has kept out of S, and of z: sums over millions of keys would stand still
    /// without it.
    pub(crate) numerator_rest: Aligned<T>,
    pub(crate) norm_rest: Vec<T>,
    /// c `[m]`.
    pub(crate) reference: Vec<T>,
    /// p₀.
    pub(crate) reference_position: usize,
    /// Decoded keys that have not joined the sums yet.
    pub(crate) pending: Pending<T>,
    /// Whether any key was absorbed; until then the frame means nothing.
    pub(crate) started: bool,
}

/// The last few decoded keys without a local window. A token then reads the sums and writes a row
/// here; writing all of the sums, with what rounding keeps out of them, waits until there are
/// [`PENDING`] rows.
#[derive(Debug, Clone, PartialEq, Default)]
pub(crate) struct Pending<T> {
    /// Weights in the state's frame, `[PENDING, m]`.
    pub(crate) weights: Aligned<T>,
    /// `[PENDING, e_padded]`.
    pub(crate) values: Aligned<T>,
    /// Rows in use.
    pub(crate) len: usize,
}

/// Where the sums of some queries go.
#[derive(Debug)]
pub(crate) struct Outputs<'o, T> {
    /// Number of queries.
    pub(crate) tokens: usize,
    /// `[tokens, e_padded]`
    pub(crate) numerator: &'o mut [T],
    /// Normalisers, one for every column of the panel.
    pub(crate) total: &'o mut [T],
}

/// Rows of [`Pending`].
pub(crate) const PENDING: usize = 16;

/// By how much a key's exponent may exceed the frame. e^20 in `f32` (e^200 in `f64`) leaves room
/// for 10^12 keys and values of [`Real::LIMIT`] before anything overflows.
pub(crate) fn ceiling<T: Real>() -> T {
    T::from_f64(if size_of::<T>() == 4 { 20.0 } else { 200.0 })
}

impl<T: Real> Sums<T> {
    /// Empty sums, with room for `pending` decoded keys: 0 or [`PENDING`].
    pub(crate) fn new(features: usize, value_dim: usize, pending: usize) -> Self {
        let zeros = |rows, row| Aligned::filled(rows * row, T::ZERO);
        let stride = padded(value_dim);
        Self {
            numerator: zeros(features, stride),
            norm: vec![T::zero(); features],
            numerator_rest: zeros(features, stride),
            norm_rest: vec![T::zero(); features],
            reference: vec![T::zero(); features],
            reference_position: 0,
            pending: Pending {
                weights: zeros(pending, features),
                values: zeros(pending, stride),
                len: 0,
            },
            started: false,
        }
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        2 * (self.numerator.len() + self.norm.len())
            + self.reference.len()
            + self.pending.weights.len()
            + self.pending.values.len()
    }

    pub(crate) fn reset(&mut self) {
        self.numerator.fill(T::zero());
        self.norm.fill(T::zero());
        self.numerator_rest.fill(T::zero());
        self.norm_rest.fill(T::zero());
        self.reference.fill(T::zero());
        self.reference_position = 0;
        self.pending.weights.fill(T::zero());
        self.pending.values.fill(T::zero());
        self.pending.len = 0;
        self.started = false;
    }

    /// Takes over other sums; without allocating if they are of this shape.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.numerator.clone_from(&from.numerator);
        self.norm.clone_from(&from.norm);
        self.numerator_rest.clone_from(&from.numerator_rest);
        self.norm_rest.clone_from(&from.norm_rest);
        self.reference.clone_from(&from.reference);
        self.reference_position = from.reference_position;
        self.started = from.started;
        self.pending.weights.clone_from(&from.pending.weights);
        self.pending.values.clone_from(&from.pending.values);
        self.pending.len = from.pending.len;
    }

    /// Adds the pending keys to the sums.
    pub(crate) fn settle(&mut self, ops: &Ops<T>) {
        let len = std::mem::take(&mut self.pending.len);
        if len > 0 {
            let (m, stride) = (self.norm.len(), self.stride());
            for row in self.pending.weights.chunks_exact(m).take(len) {
                self.norm_rest.iter_mut().zip(row).for_each(|(rest, &weight)| *rest += weight);
            }
            ops.matmul(
                MatMut::packed(&mut self.numerator_rest, m, stride),
                Accum::Add,
                MatRef::packed(&self.pending.weights, len, m).t(),
                MatRef::packed(&self.pending.values, len, stride),
            );
            self.fold(ops);
        }
    }

    fn fold(&mut self, ops: &Ops<T>) {
        (ops.fold)(&mut self.norm, &mut self.norm_rest);
        (ops.fold)(&mut self.numerator, &mut self.numerator_rest);
    }

    /// λ(position − p₀).
    pub(crate) fn decay(&self, log_decay: f64, position: usize) -> T {
        if log_decay == 0.0 {
            T::zero()
        } else {
            T::from_f64(log_decay * (position as f64 - self.reference_position as f64))
        }
    }

    /// Moves the frame to `position` and to at least the exponents `candidate`.
    pub(crate) fn rebase(
        &mut self,
        ops: &Ops<T>,
        log_decay: f64,
        position: usize,
        candidate: &[T],
    ) {
        self.settle(ops);
        let decay = self.decay(log_decay, position);
        let stride = self.stride();
        for (f, &candidate) in candidate.iter().enumerate() {
            if self.started {
                let current = self.reference[f] + decay;
                self.reference[f] = current.max(candidate);
                let factor = (current - self.reference[f]).exp();
                if factor != T::one() {
                    (ops.scale)(factor, &mut self.numerator[f * stride..(f + 1) * stride]);
                    (ops.scale)(factor, &mut self.numerator_rest[f * stride..(f + 1) * stride]);
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

    /// Moves the frame to the keys of a panel `b` of log-features at `positions`, as
    /// [`rebase`](Self::rebase) does to one; leaves their [`exponents`](Self::exponents) in it in
    /// `column`. `candidate` is scratch.
    pub(crate) fn raise(
        &mut self,
        ops: &Ops<T>,
        log_decay: f64,
        positions: &[Option<usize>],
        b: &[T],
        column: &mut [T],
        candidate: &mut [T],
    ) {
        let last = positions.iter().flatten().max().copied().unwrap_or(0);
        let frame = if self.started { last.max(self.reference_position) } else { last };
        let relative = |position: usize| T::from_f64(-log_decay * (position as f64 - frame as f64));
        for (exponent, position) in column.iter_mut().zip(positions) {
            *exponent = position.map_or(T::NEG_INFINITY, relative);
        }
        (ops.row_max)(b, column, candidate);
        self.rebase(ops, log_decay, frame, candidate);
    }

    /// Adds the sums of another state, one without pending keys. `candidate` is scratch.
    pub(crate) fn join(&mut self, ops: &Ops<T>, log_decay: f64, other: &Self, candidate: &mut [T]) {
        if !other.started {
            return;
        }
        if !self.started {
            return self.copy(other);
        }
        let position = self.reference_position.max(other.reference_position);
        let decay = other.decay(log_decay, position);
        candidate
            .iter_mut()
            .zip(&other.reference)
            .for_each(|(candidate, &c)| *candidate = c + decay);
        self.rebase(ops, log_decay, position, candidate);
        let stride = self.stride();
        for (f, &candidate) in candidate.iter().enumerate() {
            let factor = (candidate - self.reference[f]).exp();
            self.norm_rest[f] += factor * (other.norm[f] + other.norm_rest[f]);
            let row = f * stride..(f + 1) * stride;
            let sums = other.numerator[row.clone()].iter().zip(&other.numerator_rest[row.clone()]);
            self.numerator_rest[row]
                .iter_mut()
                .zip(sums)
                .for_each(|(own, (&sum, &rest))| *own += factor * (sum + rest));
        }
        self.fold(ops);
    }

    /// First token of a panel of log-features whose exponent leaves the frame; `exponents` holds
    /// −λ(p_j − p₀), or −∞ for masked tokens. In an unstarted state every valid token does. `top`
    /// and `negated` are scratch.
    pub(crate) fn first_above(
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

    /// −λ(p_j − p₀) for the tokens of a panel, `position` giving p_j of those that count; −∞ for
    /// the others and for padding.
    pub(crate) fn exponents(
        &self,
        log_decay: f64,
        tokens: usize,
        position: impl Fn(usize) -> Option<usize>,
        out: &mut [T],
    ) {
        for (j, out) in out.iter_mut().enumerate() {
            *out = match Some(j).filter(|&j| j < tokens).and_then(&position) {
                Some(position) => -self.decay(log_decay, position),
                None => T::NEG_INFINITY,
            };
        }
    }

    /// Adds the products of weights `[m, tokens]` and values `[tokens, e_padded]` to the sums;
    /// `row_sums` are those of the weights.
    pub(crate) fn accumulate(
        &mut self,
        ops: &Ops<T>,
        weights: MatRef<'_, T>,
        row_sums: &[T],
        values: MatRef<'_, T>,
        ahead: &mut Ahead<T>,
    ) {
        let (m, stride) = (self.norm.len(), self.stride());
        self.norm_rest.iter_mut().zip(row_sums).for_each(|(rest, &sum)| *rest += sum);
        let sums = MatMut::packed(&mut self.numerator_rest, m, stride);
        (ops.matmul_ahead)(sums, Accum::Add, weights, values, Some(ahead));
        self.fold(ops);
    }

    /// The normalisers are numbers, and so have all weights been that joined the sums.
    pub(crate) fn check(&self) -> Result<(), OutOfRange> {
        if self.norm.iter().all(|&norm| norm < -T::NEG_INFINITY) { Ok(()) } else { Err(OutOfRange) }
    }

    /// The sums hold nothing: no key has joined them, as in the first block of a sequence, or none
    /// that counts in this frame.
    pub(crate) fn is_empty(&self) -> bool {
        self.norm.iter().all(|&norm| norm == T::ZERO)
    }

    /// Reads the sums for a panel `a` of query log-features, which become their weights: on return
    /// `out.numerator` holds wᵀS and `out.total` wᵀz for every token, where
    /// w_f = exp(a_f + c_f + shift).
    pub(crate) fn read(
        &self,
        ops: &Ops<T>,
        a: &mut [T],
        shift: &[T],
        out: Outputs<'_, T>,
        ahead: &mut Ahead<T>,
    ) {
        let (m, stride, width) = (self.norm.len(), self.stride(), shift.len());
        let Outputs { tokens, numerator, total } = out;
        if self.is_empty() {
            (ops.exp_panel)(a, &self.reference, shift);
            total.fill(T::ZERO);
            numerator[..tokens * stride].fill(T::ZERO);
            return;
        }
        (ops.exp_dot)(a, &self.reference, shift, &self.norm, total);
        (ops.matmul_ahead)(
            MatMut::packed(numerator, tokens, stride),
            Accum::Replace,
            MatRef::packed(a, m, width).cols(0..tokens).t(),
            MatRef::packed(&self.numerator, m, stride),
            Some(ahead),
        );
    }

    /// e, padded to whole lane groups.
    pub(crate) fn stride(&self) -> usize {
        self.numerator.len() / self.norm.len()
    }
}
