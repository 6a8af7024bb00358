//! [`Pipeline`]: several threads share the prefill of one head.
//!
//! The sequence is cut into segments. The sums that a segment's queries need are those of all keys
//! before it, so somebody has to go through the keys in order; the queries can follow at any
//! distance, from a *snapshot* of the state before their segment.
//!
//! ```text
//! segments    0          1          2          3          4          5
//! keys     ├─k────────┼─k────────┼─k────────┤   in order, one thread at a time
//!          │snapshot  │snapshot  │snapshot
//! queries  └──────► k,q          └──────► k,q   any thread, any order
//!                     └──────► k,q
//! ```
//!
//! A thread takes the *key stage* if nobody is on it: it copies the state into a free snapshot,
//! lets the next segment's keys join the state, and queues the snapshot. Otherwise it takes a
//! queued snapshot, and computes the segment's outputs from it, for which its keys are met a second
//! time. Once there are queued snapshots for everybody, the thread on the key stage takes the
//! queries of the next segment along, which then needs no snapshot.
//!
//! Segments, the blocks within and the order of every sum are those of one thread, so the results
//! are too, bit for bit, on any number of threads. With κ the keys' share of the work (two fifths;
//! three tenths with a local window) two threads are 2 − κ times as fast as one; more than
//! [`WORKERS`] would wait for the key stage.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ndarray::{ArrayViewMut3, Axis, s};

use crate::Real;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, Shape};
use crate::attention::linear::{causal, window};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::{SEGMENT, Scratch, Sizes};
use crate::threads::{for_each, max_threads};

/// Threads that share one head at most.
const WORKERS: usize = 4;

/// The next tokens of one head on the calling thread. After an error the state holds anything.
///
/// Keys whose log-features are no numbers are found in the sums, whoever reads them or not.
pub(crate) fn prefill<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    qkv: HeadQkv<'_, T>,
    out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    match state.ring {
        Some(_) => window::prefill(head, state, qkv, out, scratch)?,
        None => causal::prefill(head, &mut state.sums, qkv, out, scratch)?,
    }
    state.sums.check()
}

/// The memory for several threads to share one head.
#[derive(Debug, Clone)]
pub(crate) struct Pipeline<T> {
    scratches: Vec<Scratch<T>>,
    snapshots: Vec<HeadState<T>>,
}

/// What the threads of a pipeline hand to each other.
struct Queue<'o, 's, T> {
    free: Vec<&'s mut HeadState<T>>,
    ready: Vec<Snapshot<'o, 's, T>>,
    /// `None` while somebody is on it, and after the last key.
    key_stage: Option<KeyStage<'o, 's, T>>,
    /// Whether there are more keys to come.
    more: bool,
    result: Result<(), OutOfRange>,
}

/// The state before the segment that begins at token `start`, and where its outputs go.
struct Snapshot<'o, 's, T> {
    state: &'s mut HeadState<T>,
    start: usize,
    out: ArrayViewMut3<'o, T>,
}

/// How far the keys have joined the state, and where the outputs from there on go.
struct KeyStage<'o, 's, T> {
    state: &'s mut HeadState<T>,
    start: usize,
    out: ArrayViewMut3<'o, T>,
}

impl<T: Real> Pipeline<T> {
    /// For head `h` and a pool of as many threads as the current one.
    pub(crate) fn new(sizes: Sizes, shape: &Shape, h: usize) -> Self {
        let workers = (max_threads() / shape.heads).clamp(2, WORKERS);
        Self {
            scratches: vec![Scratch::new(sizes); workers],
            snapshots: vec![HeadState::new(shape.head(h)); 2 * workers - 1],
        }
    }

    /// Whether heads are too few to keep the threads busy by themselves.
    pub(crate) fn pays(heads: usize) -> bool {
        2 * heads <= max_threads()
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        let states = self.snapshots.iter().map(HeadState::len);
        states.chain(self.scratches.iter().map(Scratch::len)).sum()
    }

    /// [`prefill`] on several threads.
    pub(crate) fn prefill(
        &mut self,
        head: &Head<'_, T>,
        state: &mut HeadState<T>,
        qkv: HeadQkv<'_, T>,
        out: ArrayViewMut3<'_, T>,
    ) -> Result<(), OutOfRange> {
        let workers = self.scratches.len();
        let queue = Queue {
            free: self.snapshots.iter_mut().collect(),
            ready: Vec::with_capacity(workers),
            key_stage: Some(KeyStage { state, start: 0, out }),
            more: true,
            result: Ok(()),
        };
        let shared =
            Shared { head, qkv, workers, queue: Mutex::new(queue), changed: Condvar::new() };
        for_each(&mut self.scratches, std::iter::repeat_n((), workers), |scratch, ()| {
            shared.work(scratch);
        });
        shared.queue.into_inner().unwrap_or_else(PoisonError::into_inner).result
    }
}

/// One head's prefill, seen by all of its threads.
struct Shared<'p, 'm, 'a, 'o, 's, T: 'static> {
    head: &'p Head<'m, T>,
    qkv: HeadQkv<'a, T>,
    workers: usize,
    queue: Mutex<Queue<'o, 's, T>>,
    changed: Condvar,
}

impl<'o, 's, T: Real> Shared<'_, '_, '_, 'o, 's, T> {
    /// What one thread does until there is nothing left.
    fn work(&self, scratch: &mut Scratch<T>) {
        let _wake = WakeOthers { queue: &self.queue, changed: &self.changed };
        let mut queue = lock(&self.queue);
        loop {
            if let Some(stage) = queue.key_stage.take() {
                // So that the others have something to do for as long as the queries take. Each of
                // them holds one snapshot at most: one is left.
                let busy = queue.ready.len() >= self.workers;
                let snapshot = if busy { None } else { queue.free.pop() };
                drop(queue);
                queue = self.advance(stage, snapshot, scratch);
                self.changed.notify_all();
            } else if let Some(Snapshot { state, start, out }) = queue.ready.pop() {
                drop(queue);
                let segment = start..start + out.shape()[1];
                let qkv = self.qkv.segment(segment, self.qkv.q.shape()[0]);
                let result = prefill(self.head, state, qkv, out, scratch);
                queue = lock(&self.queue);
                queue.result = queue.result.and(result);
                queue.free.push(state);
            } else if queue.more {
                // Somebody is on the key stage and will leave something to do.
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            } else {
                return;
            }
        }
    }

    /// The next segment's keys join the state; its queries wait in the snapshot, or are computed
    /// along the way if there is none.
    fn advance<'q>(
        &'q self,
        stage: KeyStage<'o, 's, T>,
        snapshot: Option<&'s mut HeadState<T>>,
        scratch: &mut Scratch<T>,
    ) -> MutexGuard<'q, Queue<'o, 's, T>> {
        let KeyStage { state, start, out } = stage;
        let n = self.qkv.k.nrows();
        let (mut own, out) = out.split_at(Axis(1), n.min(start + SEGMENT) - start);
        let tokens = start..start + own.shape()[1];
        let group = if snapshot.is_some() { 0 } else { self.qkv.q.shape()[0] };
        let mut snapshot = snapshot;
        if let Some(snapshot) = &mut snapshot {
            snapshot.copy(state);
        }
        let qkv = self.qkv.segment(tokens.clone(), group);
        let result = prefill(self.head, state, qkv, own.slice_mut(s![..group, .., ..]), scratch);
        let mut queue = lock(&self.queue);
        queue.result = queue.result.and(result);
        queue.more = result.is_ok() && tokens.end < n;
        queue.key_stage = queue.more.then_some(KeyStage { state, start: tokens.end, out });
        match snapshot {
            Some(state) if result.is_ok() => {
                queue.ready.push(Snapshot { state, start, out: own });
            }
            snapshot => queue.free.extend(snapshot),
        }
        queue
    }
}

/// Lets the others go if the one on the key stage panics: nobody else would end their wait.
struct WakeOthers<'q, 'o, 's, T> {
    queue: &'q Mutex<Queue<'o, 's, T>>,
    changed: &'q Condvar,
}

impl<T> Drop for WakeOthers<'_, '_, '_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(self.queue).more = false;
            self.changed.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
