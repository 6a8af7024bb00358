//! [`Workspace`]: the scratch memory of an attention operator.

use crate::Real;
use crate::attention::linear::pipeline::Pipeline;
use crate::attention::linear::state::{HeadState, Shape, Sums};
use crate::attention::scratch::{Sizes, Worker};
use crate::error::Result;
use crate::threads::max_threads;

/// Scratch memory for the methods of one attention operator.
///
/// Its size depends on the operator and the number of threads, never on the number of tokens. Its
/// contents mean nothing before or after a call. Make it once by the operator's `workspace` and use
/// it for every call; another operator of the same shape may share it.
#[derive(Debug, Clone)]
pub struct Workspace<T> {
    sizes: Sizes,
    pub(crate) workers: Vec<Worker<T>>,
    /// Where a long prefill keeps the state it started from, until all its arguments are known to
    /// be good.
    pub(crate) snapshot: Vec<HeadState<T>>,
    /// One for each head, once heads were too few for the threads.
    pub(crate) pipelines: Vec<Pipeline<T>>,
    /// Sums over parts of the keys, once heads of full attention were too few for the threads.
    pub(crate) parts: Vec<Sums<T>>,
}

impl<T: Real> Workspace<T> {
    /// For as many threads as the current pool has.
    pub(crate) fn new(sizes: Sizes) -> Self {
        Self::of(sizes, vec![Worker::new(sizes); max_threads()])
    }

    /// For one thread, and no more than steps need.
    pub(crate) fn for_steps(sizes: Sizes) -> Self {
        Self::of(sizes, vec![Worker::for_steps(sizes)])
    }

    fn of(sizes: Sizes, workers: Vec<Worker<T>>) -> Self {
        Self { sizes, workers, snapshot: Vec::new(), pipelines: Vec::new(), parts: Vec::new() }
    }

    /// Room for a state of this shape to go back to.
    #[must_use]
    pub(crate) fn with_snapshot(mut self, shape: &Shape) -> Self {
        self.snapshot = (0..shape.heads).map(|h| HeadState::new(shape.head(h))).collect();
        self
    }

    /// Keeps `states` in the snapshot.
    pub(crate) fn keep(&mut self, states: &[HeadState<T>]) {
        if self.snapshot.len() != states.len() {
            self.snapshot = states.to_vec();
        }
        self.snapshot.iter_mut().zip(states).for_each(|(kept, state)| kept.copy(state));
    }

    /// Makes room for every head to be worked on by several threads.
    pub(crate) fn share_heads(&mut self, shape: &Shape) {
        if self.pipelines.len() != shape.heads {
            let heads = 0..shape.heads;
            self.pipelines = heads.map(|h| Pipeline::new(self.sizes, shape, h)).collect();
        }
    }

    /// Makes room for the sums of as many parts of full attention's keys.
    pub(crate) fn share_keys(&mut self, parts: usize) {
        if self.parts.len() != parts {
            self.parts = vec![self.workers[0].all().1.part.clone(); parts];
        }
    }

    /// The one worker of what stays on the calling thread.
    pub(crate) fn first(&mut self) -> &mut Worker<T> {
        &mut self.workers[0]
    }

    /// Whether this workspace was made for these sizes.
    pub(crate) fn check(&self, sizes: Sizes) -> Result<()> {
        sizes.check_workspace(self.sizes)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let workers = self.workers.iter().map(Worker::len);
        let states = self.snapshot.iter().map(HeadState::len);
        let sums = self.parts.iter().map(Sums::len);
        let pipelines = self.pipelines.iter().map(Pipeline::len);
        workers.chain(states).chain(sums).chain(pipelines).sum::<usize>() * size_of::<T>()
    }
}
