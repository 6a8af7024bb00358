//! [`StatePool`]: the states of many sequences that come and go.

use std::sync::atomic::{AtomicU64, Ordering};

use ndarray::ArrayRef2;

use crate::Real;
use crate::check::{check_positive, check_room};
use crate::error::{Error, Result};
use crate::layer::Attention;
use crate::layer::dijiang::{DijiangAttention, DijiangState};

/// Most states of one pool.
const MOST: usize = 1 << 20;

/// Pools made so far: what tells them apart.
static POOLS: AtomicU64 = AtomicU64::new(0);

/// A place in a [`StatePool`]. It means one sequence: after [`release`](StatePool::release) it is
/// refused, also when another sequence has taken its place, and so it is by every other pool but
/// clones of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot {
    pool: u64,
    index: usize,
    generation: u64,
}

impl Slot {
    /// The place, below the pool's capacity. Places of released slots are given out again.
    pub fn index(self) -> usize {
        self.index
    }
}

/// The states of up to `capacity` sequences in one layer, all memory taken at the beginning.
///
/// Requests join and leave between steps; a slot stays where it is while it lives.
///
/// # Examples
/// ```
/// use dijiang::attention::KeyMask;
/// use dijiang::layer::{
///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
///     SoftmaxAttention, StatePool,
/// };
/// use ndarray::Array2;
///
/// let eye = || Array2::<f32>::eye(8);
/// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
/// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
///
/// let mut pool = StatePool::new(&layer, 4)?;
/// let prompt = pool.take().expect("an empty pool");
/// layer.prefill(pool.get_mut(prompt)?, &Array2::ones((100, 8)), KeyMask::All)?;
///
/// // Two continuations of one prompt, stepped together.
/// let other = pool.fork(prompt)?.expect("a free slot");
/// let mut out = Array2::zeros((2, 8));
/// pool.step(&layer, &[prompt, other], &Array2::ones((2, 8)), &mut out)?;
/// assert_eq!(out.row(0), out.row(1));
///
/// // Speculative decoding: keep the state, step, and go back.
/// let kept = pool.fork(other)?.expect("a free slot");
/// pool.step(&layer, &[other], &Array2::ones((1, 8)), &mut Array2::zeros((1, 8)))?;
/// pool.replace(other, kept)?;
/// assert_eq!(pool.get(other)?.position(), 101);
///
/// pool.release(prompt)?;
/// assert!(pool.get(prompt).is_err());
/// assert_eq!(pool.taken(), 1);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StatePool<T> {
    id: u64,
    states: Vec<DijiangState<T>>,
    /// Of each place: odd while it is taken.
    generations: Vec<u64>,
    free: Vec<usize>,
}

impl<T: Real> StatePool<T> {
    /// Room for `capacity` sequences in `layer`.
    ///
    /// # Cost
    /// `capacity` times the bytes of a state and of the scratch memory of a step: see
    /// [`bytes`](Self::bytes).
    ///
    /// # Errors
    /// [`Error::Value`] for a capacity of 0, [`Error::TooLarge`] for one beyond 2²⁰ or without room
    /// for it, [`Error::Conflict`] for a bidirectional layer.
    pub fn new(layer: &DijiangAttention<T>, capacity: usize) -> Result<Self> {
        check_positive("capacity", capacity)?;
        if capacity > MOST {
            return Err(Error::TooLarge { argument: "capacity", limit: MOST, got: capacity });
        }
        layer.config().causality.check_causal("a pool of states")?;
        let state = layer.new_state();
        check_room::<u8>("bytes of a pool", &[capacity, state.bytes_with_scratch()])?;
        Ok(Self {
            id: POOLS.fetch_add(1, Ordering::Relaxed),
            states: vec![state; capacity],
            generations: vec![0; capacity],
            free: (0..capacity).rev().collect(),
        })
    }

    /// Sequences there is room for.
    pub fn capacity(&self) -> usize {
        self.states.len()
    }

    /// Bytes of all slots: of each a state, and the scratch memory of a step.
    pub fn bytes(&self) -> usize {
        self.states.iter().map(DijiangState::bytes_with_scratch).sum()
    }

    /// Slots taken.
    pub fn taken(&self) -> usize {
        self.capacity() - self.free.len()
    }

    /// A slot with the empty state; `None` if all are taken. Does not allocate.
    pub fn take(&mut self) -> Option<Slot> {
        let index = self.free.pop()?;
        self.states[index].reset();
        self.generations[index] += 1;
        Some(Slot { pool: self.id, index, generation: self.generations[index] })
    }

    /// Gives a slot back.
    ///
    /// # Errors
    /// [`Error::Value`] for a slot that is not taken.
    pub fn release(&mut self, slot: Slot) -> Result<()> {
        let index = self.index(slot)?;
        self.generations[index] += 1;
        self.free.push(index);
        Ok(())
    }

    /// The state in a slot.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    pub fn get(&self, slot: Slot) -> Result<&DijiangState<T>> {
        Ok(&self.states[self.index(slot)?])
    }

    /// The state in a slot, to prefill, step or [reset](DijiangState::reset) it.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    pub fn get_mut(&mut self, slot: Slot) -> Result<&mut DijiangState<T>> {
        let index = self.index(slot)?;
        Ok(&mut self.states[index])
    }

    /// The states in several slots, to prefill them [packed](Attention::prefill_packed) or
    /// [padded](Attention::prefill_padded).
    ///
    /// # Errors
    /// [`Error::Value`] for slots that are not taken or not all different.
    pub fn get_each_mut(&mut self, slots: &[Slot]) -> Result<Vec<&mut DijiangState<T>>> {
        let indices = slots.iter().map(|&slot| self.index(slot)).collect::<Result<Vec<usize>>>()?;
        let mut all: Vec<Option<&mut DijiangState<T>>> = self.states.iter_mut().map(Some).collect();
        let repeated = |index: usize| Error::Value {
            argument: "slots",
            expected: "all different",
            got: index as f64,
        };
        indices.into_iter().map(|index| all[index].take().ok_or_else(|| repeated(index))).collect()
    }

    /// A further slot with a copy of the state in `slot`; `None` if all are taken. Does not
    /// allocate.
    ///
    /// # Errors
    /// As [`release`](Self::release).
    pub fn fork(&mut self, slot: Slot) -> Result<Option<Slot>> {
        let from = self.index(slot)?;
        let Some(copy) = self.take() else { return Ok(None) };
        if let Ok([to, from]) = self.states.get_disjoint_mut([copy.index, from]) {
            to.copy_from(from)?;
        }
        Ok(Some(copy))
    }

    /// `slot` gets the state in `by`, whose slot is released: back to a state kept by
    /// [`fork`](Self::fork). Copies nothing.
    ///
    /// # Errors
    /// As [`release`](Self::release), and [`Error::Value`] if both are the same slot.
    pub fn replace(&mut self, slot: Slot, by: Slot) -> Result<()> {
        let (to, from) = (self.index(slot)?, self.index(by)?);
        if to == from {
            return Err(Error::Value {
                argument: "by",
                expected: "another slot",
                got: from as f64,
            });
        }
        self.states.swap(to, from);
        self.release(by)
    }

    /// The next token of every sequence in `slots`: [`DijiangAttention::step_batch`].
    ///
    /// # Shapes
    /// - `slots`: b different ones; `x` and `out`: `[b, D]`.
    ///
    /// # Cost
    /// As [`DijiangAttention::step_batch`], and a pointer per slot of the pool.
    ///
    /// # Errors
    /// [`Error::Value`] for slots that are not taken or not all different, and those of
    /// [`DijiangAttention::step_batch`]. After an error no state is changed.
    pub fn step(
        &mut self,
        layer: &DijiangAttention<T>,
        slots: &[Slot],
        x: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
    ) -> Result<()> {
        layer.step_batch(&mut self.get_each_mut(slots)?, x, out)
    }

    /// The place of a slot that is taken.
    fn index(&self, slot: Slot) -> Result<usize> {
        match self.generations.get(slot.index) {
            Some(&generation) if slot.pool == self.id && generation == slot.generation => {
                Ok(slot.index)
            }
            _ => Err(Error::Value {
                argument: "slot",
                expected: "one of this pool that is taken",
                got: slot.index as f64,
            }),
        }
    }
}
