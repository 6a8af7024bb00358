//! One head on several threads: whoever finds an empty page walks the next block of keys and leaves on the page what the
//! block's queries need; the others answer the queries of the pages that are full.
//!
//! Blocks, their frames and the order of every sum are those of the walk on one thread, so the results are too, bit for
//! bit, on any number of threads. The walk over the keys is about 40 % of the work: more than [`WORKERS`] threads would wait.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use ndarray::{ArrayView3, ArrayViewMut3, Axis, s};

use crate::attention::state::{HeadState, Shape};
use crate::attention::workspace::{BLOCK, Scratch, Sizes};
use crate::real::Real;
use crate::simd::padded;
use crate::threads::{for_each, max_threads};

/// Threads that share one head at most.
const WORKERS: usize = 4;

/// What the queries of one block need.
#[derive(Debug, Clone)]
pub(super) struct Page<T> {
    /// Where the block begins.
    pub(super) position: usize,
    /// Columns of the key panel.
    pub(super) key_width: usize,
    /// Key weights `[m, key_width]`.
    b: Vec<T>,
    /// Values `[tokens, e_padded]`.
    v: Vec<T>,
    /// The state that the block's queries read.
    pub(super) state: HeadState<T>,
}

impl<T> Page<T> {
    /// Puts the page's keys and values in their place in `scratch`, or takes them out of it.
    fn exchange(&mut self, scratch: &mut Scratch<T>) {
        std::mem::swap(&mut self.b, &mut scratch.b);
        std::mem::swap(&mut self.v, &mut scratch.v);
    }
}

/// The memory for several threads to share one head.
#[derive(Debug, Clone)]
pub(super) struct Pages<T> {
    scratches: Vec<Scratch<T>>,
    empty: Vec<Page<T>>,
}

/// Pages on their way, and how far the walk over the keys has come.
struct Desk<'a, T> {
    empty: Vec<Page<T>>,
    full: Vec<(Page<T>, usize, ArrayViewMut3<'a, T>)>,
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
        let state = HeadState::new(shape);
        let (b, v) = (vec![T::zero(); sizes.features * BLOCK], vec![T::zero(); BLOCK * padded(sizes.value_dim)]);
        let page = Page { position: 0, key_width: 0, b, v, state };
        Self { scratches: vec![Scratch::new(sizes); workers], empty: vec![page; 2 * workers] }
    }

    /// Whether heads are too few to keep the threads busy by themselves.
    pub(super) fn pay(heads: usize) -> bool {
        2 * heads <= max_threads()
    }

    /// Elements held.
    pub(super) fn len(&self) -> usize {
        let pages = self.empty.iter().map(|page| page.b.len() + page.v.len() + page.state.len());
        pages.chain(self.scratches.iter().map(Scratch::len)).sum()
    }

    /// Runs `keys` for block after block, each from where the last one ended: it leaves keys and values in the scratch and
    /// the state on the page, and returns where the block ends, `None` to give up. And `queries` for every page, with keys
    /// and values in the scratch, and the block's share of `q` and `out`.
    ///
    /// # Shapes
    /// - `q`: `[group, n, d]`, `out`: `[group, n, e]`.
    pub(super) fn run(
        &mut self,
        q: ArrayView3<'_, T>,
        out: ArrayViewMut3<'_, T>,
        keys: impl FnMut(usize, &mut Page<T>, &mut Scratch<T>) -> Option<usize> + Send,
        queries: impl Fn(&Page<T>, ArrayView3<'_, T>, ArrayViewMut3<'_, T>, &mut Scratch<T>) + Sync,
    ) {
        let (n, pages) = (q.shape()[1], self.empty.len());
        let empty = std::mem::take(&mut self.empty);
        let walk = Some(Walk { start: 0, out });
        let desk = Mutex::new(Desk { empty, full: Vec::with_capacity(pages), walk, more: true });
        // Only who has the walk locks the keys.
        let (keys, changed) = (Mutex::new(keys), Condvar::new());
        let work = |scratch: &mut Scratch<T>| {
            let _alarm = Alarm { desk: &desk, changed: &changed };
            let mut at = lock(&desk);
            loop {
                if let Some((page, walk)) = at.next_to_write() {
                    drop(at);
                    let (mut page, Walk { start, out }) = (page, walk);
                    let end = (lock(&keys))(start, &mut page, scratch);
                    page.exchange(scratch);
                    at = lock(&desk);
                    match end {
                        Some(end) => {
                            let (share, out) = out.split_at(Axis(1), end - start);
                            at.full.push((page, start, share));
                            at.more = end < n;
                            at.walk = at.more.then_some(Walk { start: end, out });
                        }
                        None => {
                            at.empty.push(page);
                            at.more = false;
                        }
                    }
                    changed.notify_all();
                } else if let Some((mut page, start, out)) = at.full.pop() {
                    drop(at);
                    page.exchange(scratch);
                    queries(&page, q.slice(s![.., start..start + out.shape()[1], ..]), out, scratch);
                    page.exchange(scratch);
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
    fn next_to_write(&mut self) -> Option<(Page<T>, Walk<'a, T>)> {
        let walk = self.walk.take_if(|_| !self.empty.is_empty())?;
        self.empty.pop().zip(Some(walk))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
