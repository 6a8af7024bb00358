//! One head on several threads: whoever finds nobody on the walk over the keys walks the next
//! segment of them and leaves on a page the state before it; the others take the pages that are
//! full, and the segment's queries from there. Once there are full pages for everybody, who is at
//! the head of the walk takes the queries of the next segment along, which then needs no page.
//!
//! Segments, the blocks within and the order of every sum are those of the walk on one thread, so
//! the results are too, bit for bit, on any number of threads. The keys of a segment with a page
//! are met twice. With κ the keys' share of the work (two fifths; three tenths with a local window)
//! two threads are 2 − κ times as fast as one; more than [`WORKERS`] would wait for the walk.

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
        Self {
            scratches: vec![Scratch::new(sizes); workers],
            empty: vec![HeadState::new(shape); 2 * workers - 1],
        }
    }

    /// Whether heads are too few to keep the threads busy by themselves.
    pub(super) fn pay(heads: usize) -> bool {
        2 * heads <= max_threads()
    }

    /// Elements held.
    pub(super) fn len(&self) -> usize {
        self.empty.iter().map(HeadState::len).chain(self.scratches.iter().map(Scratch::len)).sum()
    }

    /// Runs `walk` for segment after segment, with its share of `q` and `out`, or with no heads of
    /// them and a page to leave the state before the segment on; it returns false to give up. And
    /// `read` for every segment with a page.
    ///
    /// # Shapes
    /// - `q`: `[group, n, d]`, `out`: `[group, n, e]`.
    pub(super) fn run(
        &mut self,
        q: ArrayView3<'_, T>,
        out: ArrayViewMut3<'_, T>,
        walk: impl FnMut(
            Range<usize>,
            Option<&mut HeadState<T>>,
            ArrayView3<'_, T>,
            ArrayViewMut3<'_, T>,
            &mut Scratch<T>,
        ) -> bool
        + Send,
        read: impl Fn(
            Range<usize>,
            &mut HeadState<T>,
            ArrayView3<'_, T>,
            ArrayViewMut3<'_, T>,
            &mut Scratch<T>,
        ) + Sync,
    ) {
        let (n, pages, workers) = (q.shape()[1], self.empty.len(), self.scratches.len());
        let empty = std::mem::take(&mut self.empty);
        let desk = Desk {
            empty,
            full: Vec::with_capacity(pages),
            walk: Some(Walk { start: 0, out }),
            more: true,
        };
        // Only who has the walk locks the keys.
        let (desk, keys, changed) = (Mutex::new(desk), Mutex::new(walk), Condvar::new());
        let work = |scratch: &mut Scratch<T>| {
            let _alarm = Alarm { desk: &desk, changed: &changed };
            let mut at = lock(&desk);
            loop {
                if let Some((mut page, Walk { start, out })) = at.next_to_walk(workers) {
                    drop(at);
                    let (mut share, out) = out.split_at(Axis(1), n.min(start + SEGMENT) - start);
                    let tokens = start..start + share.shape()[1];
                    let heads = if page.is_some() { 0 } else { q.shape()[0] };
                    let of_heads = s![..heads, tokens.clone(), ..];
                    let goes_on = (lock(&keys))(
                        tokens.clone(),
                        page.as_mut(),
                        q.slice(of_heads),
                        share.slice_mut(s![..heads, .., ..]),
                        scratch,
                    );
                    at = lock(&desk);
                    at.more = goes_on && tokens.end < n;
                    at.walk = at.more.then_some(Walk { start: tokens.end, out });
                    match page {
                        Some(page) if goes_on => at.full.push((page, start, share)),
                        page => at.empty.extend(page),
                    }
                    changed.notify_all();
                } else if let Some((mut page, start, out)) = at.full.pop() {
                    drop(at);
                    let tokens = start..start + out.shape()[1];
                    read(tokens.clone(), &mut page, q.slice(s![.., tokens, ..]), out, scratch);
                    at = lock(&desk);
                    at.empty.push(page);
                } else if at.more {
                    // Somebody is on the walk and will leave something to do.
                    at = changed.wait(at).unwrap_or_else(PoisonError::into_inner);
                } else {
                    return;
                }
            }
        };
        for_each(&mut self.scratches, std::iter::repeat_n((), workers), |scratch, ()| {
            work(scratch)
        });
        self.empty = desk.into_inner().unwrap_or_else(PoisonError::into_inner).empty;
    }
}

/// Lets the others go if the one on the walk panics: nobody else would end their wait.
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
    /// The walk, if it is to be had, and a page for it unless there are full ones for all
    /// `workers`, so that the others have something to read for as long as the queries take. Each
    /// of the others reads one page at most: one is left.
    fn next_to_walk(&mut self, workers: usize) -> Option<(Option<HeadState<T>>, Walk<'a, T>)> {
        let walk = self.walk.take()?;
        Some((if self.full.len() < workers { self.empty.pop() } else { None }, walk))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
