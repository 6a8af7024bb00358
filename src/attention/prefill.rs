//! The next tokens of a sequence, head by head: elements are looked at segment by segment, just before they are used.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut3, s};

use crate::attention::checks::tokens_fit;
use crate::attention::linear::Head;
use crate::attention::pages::Pages;
use crate::attention::rows::Valid;
use crate::attention::state::HeadState;
use crate::attention::workspace::Scratch;
use crate::attention::{KeyMask, Near, causal, near};
use crate::kernel::FeatureMap;
use crate::real::Real;

/// Tokens of a head that a prefill checks, then reads: they stay in the cache in between. A multiple of any block.
pub(super) const SEGMENT: usize = 256;

/// What the heads of a prefill have in common.
#[derive(Clone, Copy)]
pub(super) struct Stretch<'a> {
    /// Tokens seen before.
    pub(super) position: usize,
    pub(super) mask: KeyMask<'a>,
    pub(super) near: Option<Near>,
    /// Whether elements are yet to be looked at.
    pub(super) unchecked: bool,
}

impl<'a> Stretch<'a> {
    /// Keys, values and mask of the segment at `start`; `None` if one is out of range.
    fn keys<'v, T: Real>(
        &self,
        start: usize,
        k: ArrayView2<'v, T>,
        v: ArrayView2<'v, T>,
    ) -> Option<(ArrayView2<'v, T>, ArrayView2<'v, T>, Valid<'a>)> {
        let tokens = start..k.nrows().min(start + SEGMENT);
        let (k, v) = (k.slice_move(s![tokens.clone(), ..]), v.slice_move(s![tokens.clone(), ..]));
        let valid = self.mask.valid().map(|valid| &valid[tokens]);
        let fits = !self.unchecked || tokens_fit(k, valid) && tokens_fit(v, valid);
        fits.then_some((k, v, valid))
    }

    fn queries_fit<T: Real>(&self, q: ArrayView3<'_, T>) -> bool {
        !self.unchecked || q.outer_iter().all(|q| tokens_fit(q, None))
    }

    /// One head on the calling thread; returns whether all elements were in range.
    pub(super) fn prefill<T: Real, M: FeatureMap<T>>(
        &self,
        head: &Head<'_, T, M>,
        state: &mut HeadState<T>,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> bool {
        for start in (0..k.nrows()).step_by(SEGMENT) {
            let Some((k, v, valid)) = self.keys(start, k, v) else { return false };
            let tokens = s![.., start..start + k.nrows(), ..];
            let (q, out) = (q.slice(tokens), out.slice_mut(tokens));
            if !self.queries_fit(q) {
                return false;
            }
            match self.near {
                Some(_) => near::near(head, state, self.position + start, q, k, v, valid, out, scratch),
                None => causal::causal(head, state, self.position + start, q, k, v, valid, out, scratch),
            }
        }
        true
    }

    /// [`prefill`](Self::prefill) on several threads.
    pub(super) fn prefill_shared<T: Real, M: FeatureMap<T>>(
        &self,
        head: &Head<'_, T, M>,
        state: &mut HeadState<T>,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut3<'_, T>,
        pages: &mut Pages<T>,
    ) -> bool {
        let clean = AtomicBool::new(true);
        let mut keys = None;
        pages.run(
            q,
            out,
            |start, page, scratch| {
                let within = start % SEGMENT;
                if within == 0 {
                    keys = self.keys(start, k, v);
                }
                let Some((k, v, valid)) = keys else {
                    clean.store(false, Ordering::Relaxed);
                    return None;
                };
                let first = start - within;
                let end = match self.near {
                    Some(_) => near::write_page(head, state, self.position + first, k, v, valid, within, page, scratch),
                    None => causal::write_page(head, state, self.position + first, k, v, valid, within, page, scratch),
                };
                Some(first + end)
            },
            |page, q, out, scratch| match self.near {
                _ if !self.queries_fit(q) => clean.store(false, Ordering::Relaxed),
                Some(_) => near::read_page(head, page, q, out, scratch),
                None => causal::read_page(head, page, q, out, scratch),
            },
        );
        clean.into_inner()
    }
}
