//! [`Aligned`]: numbers that begin with a cache line.

use std::ops::{Deref, DerefMut};

/// Bytes of a cache line, and of the widest register.
pub(crate) const LINE: usize = 64;

/// A vector whose first number begins a cache line. From the 16 bytes that an allocator promises,
/// every register of 64 bytes would lie in two lines: panels of attention cost a tenth more then
/// (512 tokens, 8 heads of 64 in f32, measured 2026-11 with AVX-512 on an Intel Xeon).
#[derive(Debug)]
#[allow(unreachable_pub, reason = "in the signatures of a sealed trait")]
pub struct Aligned<T> {
    /// The numbers, after as many others as it takes.
    memory: Vec<T>,
    start: usize,
}

impl<T: Clone> Aligned<T> {
    /// `len` times `value`.
    pub(crate) fn filled(len: usize, value: T) -> Self {
        let mut filled = Self::default();
        filled.resize(len, value);
        filled
    }

    /// As [`Vec::resize`].
    pub(crate) fn resize(&mut self, len: usize, value: T) {
        self.reserve(len, &value);
        self.memory.resize(self.start + len, value);
    }

    /// Copies of these, instead of what there is; without allocating if there is room.
    fn copy(&mut self, from: &[T]) {
        self.memory.truncate(self.start);
        if let Some(any) = from.first() {
            self.reserve(from.len(), any);
            self.memory.extend_from_slice(from);
        }
    }

    /// Room for `len` numbers in all, behind copies of `any`.
    fn reserve(&mut self, len: usize, any: &T) {
        if self.start + len > self.memory.capacity() {
            let most = LINE / size_of::<T>() - 1;
            let mut memory: Vec<T> = Vec::with_capacity(len.max(2 * self.len()) + most);
            let start = memory.as_ptr().align_offset(LINE).min(most);
            memory.resize(start, any.clone());
            memory.extend_from_slice(self);
            *self = Self { memory, start };
        }
    }
}

impl<T> Default for Aligned<T> {
    fn default() -> Self {
        Self { memory: Vec::new(), start: 0 }
    }
}

impl<T: Clone> From<&[T]> for Aligned<T> {
    fn from(numbers: &[T]) -> Self {
        let mut copy = Self::default();
        copy.copy(numbers);
        copy
    }
}

impl<T: Clone> Clone for Aligned<T> {
    fn clone(&self) -> Self {
        Self::from(&**self)
    }

    fn clone_from(&mut self, from: &Self) {
        self.copy(from);
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.memory[self.start..]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.memory[self.start..]
    }
}

impl<T: PartialEq> PartialEq for Aligned<T> {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Real;

    fn check<T: Real>() {
        let begins = |numbers: &Aligned<T>| assert_eq!(numbers.as_ptr().addr() % LINE, 0);
        let (mut grown, mut copy) = (Aligned::filled(0, T::ONE), Aligned::filled(1, T::ZERO));
        for len in [1, 2, 17, 1000, 5, 999, 100_000] {
            let before = grown.to_vec();
            grown.resize(len, T::from_f64(len as f64));
            begins(&grown);
            let (old, new) = grown.split_at(len.min(before.len()));
            assert!(*old == before[..old.len()] && new.iter().all(|x| x.to_f64() == len as f64));
            copy.clone_from(&grown);
            let clone = copy.clone();
            begins(&copy);
            begins(&clone);
            assert!(clone == grown && copy == grown);
        }
    }

    #[test]
    fn it_begins_a_line_after_growth_and_in_a_clone() {
        check::<f32>();
        check::<f64>();
    }
}
