//! One head on several threads: whoever finds an empty page walks the next segment of keys and leaves on the page the state
//! before them; the others take the pages that are full, and the segment's queries from there.
//!
//! Segments, the blocks within and the order of every sum are those of the walk on one thread, so the results are too, bit for
//! bit, on any number of threads. The keys of a segment are met twice, which is a quarter of the work (a fifth with a near
//! part): more than [`WORKERS`] threads would wait for the walk.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ndarray::{ArrayView3, ArrayViewMut3, Axis, s};

use crate::attention::state::{HeadState, Shape};
use crate::attention::workspace::{Scratch, Sizes};
use crate::real::Real;
use crate::threads::{for_each, max_threads};

/// Threads that share one head at most.
const WORKERS: usize = 4;

/// Tokens of a segment, counted from the first of a prefill: no block of work goes beyond one.
pub(super) const SEGMENT: usize = 512;

/// The memory for several threads to share one head.
#[derive(Debug, Clone)]
pub(super) struct Pages<T> {
    scratches: Vec<Scratch<T>>,
    empty: Vec<HeadState<T>>,
}

/// Pages on their way, and how far the walk over the keys has come.
struct Desk<'a, T> {
    empty: Vec<HeadState<T>>,
    full: Vec<(HeadState<T>, usize, ArrayViewMut3<'a, T>)>,
    /// The walk itself; `None` while somebody is on it, and at its end.
    walk: Option<Walk<'a, T>>,
    /// Whether there are more keys to come.
    more: bool,
}

struct Walk<'a, T> {
    start: usize,
    /// Outputs from `start` on.
    out: ArrayViewMut3<'a, T>,
}

impl<T: Real> Pages<T> {
    /// For a pool of as many threads as the current one.
    pub(super) fn new(sizes: Sizes, shape: Shape) -> Self {
        let workers = (max_threads() / shape.heads).clamp(2, WORKERS);
        Self { scratches: vec![Scratch::new(sizes); workers], empty: vec![HeadState::new(shape); 2 * workers] }
    }

    /// Whether heads are too few to keep the threads busy by themselves.
    pub(super) fn pay(heads: usize) -> bool {
        2 * heads <= max_threads()
    }

    /// Elements held.
    pub(super) fn len(&self) -> usize {
        self.empty.iter().map(HeadState::len).chain(self.scratches.iter().map(Scratch::len)).sum()
    }

    /// Runs `walk` for segment after segment: it leaves the state before the segment on the page, and returns false to give up. And
    /// `read` for every segment, with its page and its share of `q` and `out`.
    ///
    /// # Shapes
    /// - `q`: `[group, n, d]`, `out`: `[group, n, e]`.
    pub(super) fn run(
        &mut self,
        q: ArrayView3<'_, T>,
        out: ArrayViewMut3<'_, T>,
        walk: impl FnMut(Range<usize>, &mut HeadState<T>, &mut Scratch<T>) -> bool + Send,
        read: impl Fn(Range<usize>, &mut HeadState<T>, ArrayView3<'_, T>, ArrayViewMut3<'_, T>, &mut Scratch<T>) + Sync,
    ) {
        let (n, pages) = (q.shape()[1], self.empty.len());
        let empty = std::mem::take(&mut self.empty);
        let desk = Desk { empty, full: Vec::with_capacity(pages), walk: Some(Walk { start: 0, out }), more: true };
        // Only who has the walk locks the keys.
        let (desk, keys, changed) = (Mutex::new(desk), Mutex::new(walk), Condvar::new());
        let work = |scratch: &mut Scratch<T>| {
            let _alarm = Alarm { desk: &desk, changed: &changed };
            let mut at = lock(&desk);
            loop {
                if let Some((mut page, Walk { start, out })) = at.next_to_write() {
                    drop(at);
                    let end = n.min(start + SEGMENT);
                    let goes_on = (lock(&keys))(start..end, &mut page, scratch);
                    at = lock(&desk);
                    if goes_on {
                        let (share, out) = out.split_at(Axis(1), end - start);
                        at.full.push((page, start, share));
                        at.more = end < n;
                        at.walk = at.more.then_some(Walk { start: end, out });
                    } else {
                        at.empty.push(page);
                        at.more = false;
                    }
                    changed.notify_all();
                } else if let Some((mut page, start, out)) = at.full.pop() {
                    drop(at);
                    let tokens = start..start + out.shape()[1];
                    read(tokens.clone(), &mut page, q.slice(s![.., tokens, ..]), out, scratch);
                    at = lock(&desk);
                    at.empty.push(page);
                    changed.notify_one();
                } else if at.more {
                    // Somebody is on the walk, or all pages are being read: either will leave something to do.
                    at = changed.wait(at).unwrap_or_else(PoisonError::into_inner);
                } else {
                    return;
                }
            }
        };
        let workers = self.scratches.len();
        for_each(&mut self.scratches, std::iter::repeat_n((), workers), |scratch, ()| work(scratch));
        self.empty = desk.into_inner().unwrap_or_else(PoisonError::into_inner).empty;
    }
}

/// Lets the others go if a worker panics.
struct Alarm<'d, 'a, T> {
    desk: &'d Mutex<Desk<'a, T>>,
    changed: &'d Condvar,
}

impl<T> Drop for Alarm<'_, '_, T> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            lock(self.desk).more = false;
            self.changed.notify_all();
        }
    }
}

impl<'a, T> Desk<'a, T> {
    /// The walk and a page for it, if both are to be had.
    fn next_to_write(&mut self) -> Option<(HeadState<T>, Walk<'a, T>)> {
        let walk = self.walk.take_if(|_| !self.empty.is_empty())?;
        self.empty.pop().zip(Some(walk))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
