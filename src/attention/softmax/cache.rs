//! [`KvCache`]: the keys and values to decode from.

use crate::Real;
use crate::attention::operator::SequenceState;
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::{OutOfRange, Valid};
use crate::attention::scratch::{BLOCK, Scratch};
use crate::low::aligned::Aligned;
use crate::low::simd::{Ops, padded};

/// The keys and values of every token so far: what [`Softmax`](crate::attention::Softmax) needs to
/// decode. Grows with every token.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCache<T> {
    pub(crate) heads: Vec<HeadCache<T>>,
    pub(crate) position: usize,
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
}

impl<T: Real> SequenceState for KvCache<T> {
    fn position(&self) -> usize {
        self.position()
    }

    fn bytes(&self) -> usize {
        self.bytes()
    }

    fn reset(&mut self) {
        self.reset();
    }
}

/// Keys and values of one key-value head, in blocks of BLOCK tokens.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct HeadCache<T> {
    /// Scaled keys, `[blocks, d, BLOCK]`: a panel per block.
    keys: Aligned<T>,
    /// Values, `[blocks, BLOCK, e_padded]`.
    values: Aligned<T>,
    /// Tokens that may be attended to, `[blocks, BLOCK]`.
    pub(crate) valid: Vec<bool>,
}

impl<T: Real> KvCache<T> {
    /// The empty cache of a new sequence.
    pub(crate) fn new(kv_heads: usize, dim: usize, value_dim: usize) -> Self {
        let head =
            HeadCache { keys: Aligned::default(), values: Aligned::default(), valid: Vec::new() };
        Self { heads: vec![head; kv_heads], position: 0, dim, value_dim }
    }

    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(|head| (head.keys.len() + head.values.len()) * size_of::<T>()).sum()
    }

    /// Back to the empty cache; keeps its memory.
    pub fn reset(&mut self) {
        self.position = 0;
        for head in &mut self.heads {
            head.keys.resize(0, T::ZERO);
            head.values.resize(0, T::ZERO);
            head.valid.clear();
        }
    }
}

impl<T: Real> HeadCache<T> {
    /// Appends tokens, the first at their position; keys are scaled by `scale`.
    pub(crate) fn append(
        &mut self,
        ops: &Ops<T>,
        scale: T,
        qkv: &HeadQkv<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), OutOfRange> {
        let (n, d, stride) = (qkv.k.nrows(), qkv.k.ncols(), padded(qkv.v.ncols()));
        let position = qkv.position;
        let blocks = (position + n).div_ceil(BLOCK);
        self.keys.resize(blocks * d * BLOCK, T::zero());
        self.values.resize(blocks * BLOCK * stride, T::zero());
        self.valid.resize(blocks * BLOCK, false);
        let mut start = 0;
        while start < n {
            let (block, within) = ((position + start) / BLOCK, (position + start) % BLOCK);
            let end = n.min(start + BLOCK - within);
            let width = padded(end - start);
            qkv.key_rows(start..end).gather(ops, scale, &mut scratch.y, &scratch.zeros)?;
            let panel = &mut self.keys[block * d * BLOCK..(block + 1) * d * BLOCK];
            for (keys, y) in panel.chunks_exact_mut(BLOCK).zip(scratch.y.chunks_exact(width)) {
                keys[within..within + end - start].copy_from_slice(&y[..end - start]);
            }
            let first = position + start;
            let values = &mut self.values[first * stride..(first + end - start) * stride];
            qkv.value_rows(start..end).copy(ops, values)?;
            for j in start..end {
                self.valid[position + j] = qkv.is_valid(j);
            }
            start = end;
        }
        Ok(())
    }

    /// Keys, their row stride, values and validity of one block.
    pub(crate) fn block(
        &self,
        block: usize,
        d: usize,
        stride: usize,
    ) -> (&[T], usize, &[T], Valid<'_>) {
        let valid = &self.valid[block * BLOCK..(block + 1) * BLOCK];
        let all = valid.iter().all(|&valid| valid);
        (
            &self.keys[block * d * BLOCK..(block + 1) * d * BLOCK],
            BLOCK,
            &self.values[block * BLOCK * stride..(block + 1) * BLOCK * stride],
            (!all).then_some(valid),
        )
    }
}
