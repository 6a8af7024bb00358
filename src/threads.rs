//! Work shared among threads: the only place that knows rayon.

use std::sync::{Mutex, PoisonError};

/// Threads that [`for_each`] can use at most.
pub(crate) fn max_threads() -> usize {
    #[cfg(feature = "rayon")]
    return rayon::current_num_threads();
    #[cfg(not(feature = "rayon"))]
    1
}

/// Calls `work` once for every item, on as many threads as there are scratches (and the pool has);
/// each call has one scratch to itself. Which scratch and thread an item meets is left open, so
/// results must not depend on it.
pub(crate) fn for_each<S: Send, I: Send>(
    scratches: &mut [S],
    items: impl Iterator<Item = I> + Send,
    work: impl Fn(&mut S, I) + Sync,
) {
    let threads = scratches.len();
    let mut items = items.fuse();
    let (first, second) = (items.next(), items.next());
    // One item is worked on here: to wake another thread takes longer than many a short sequence.
    let threads = if second.is_some() { threads } else { threads.min(1) };
    let items = first.into_iter().chain(second).chain(items);
    let (scratches, items) = (Mutex::new(scratches.iter_mut()), Mutex::new(items));
    at_once(threads, &|| {
        let Some(scratch) = next(&scratches) else { return };
        while let Some(item) = next(&items) {
            work(scratch, item);
        }
    });
}

fn next<I: Iterator>(items: &Mutex<I>) -> Option<I::Item> {
    items.lock().unwrap_or_else(PoisonError::into_inner).next()
}

/// Calls `work` `times` times if threads can share that, else once. Not generic, so that a program
/// has rayon's machinery once.
fn at_once(times: usize, work: &(dyn Fn() + Sync)) {
    #[cfg(feature = "rayon")]
    if times > 1 && max_threads() > 1 {
        use rayon::prelude::*;
        (0..times).into_par_iter().for_each(|_| work());
        return;
    }
    if times > 0 {
        work();
    }
}

/// [`for_each`] of work that may fail; returns one of the errors. The other items are worked on all
/// the same.
pub(crate) fn try_each<S: Send, I: Send, E: Send>(
    scratches: &mut [S],
    items: impl Iterator<Item = I> + Send,
    work: impl Fn(&mut S, I) -> Result<(), E> + Sync,
) -> Result<(), E> {
    let failed = Mutex::new(Ok(()));
    for_each(scratches, items, |scratch, item| {
        if let Err(error) = work(scratch, item) {
            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
        }
    });
    failed.into_inner().unwrap_or_else(PoisonError::into_inner)
}
