//! The next tokens of a sequence, head by head.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut3, s};

use crate::attention::linear::Head;
use crate::attention::pages::Pages;
use crate::attention::state::HeadState;
use crate::attention::workspace::Scratch;
use crate::attention::{KeyMask, Window, causal, window};
use crate::kernel::FeatureMap;
use crate::real::Real;

/// What the heads of a prefill have in common.
#[derive(Clone, Copy)]
pub(super) struct Stretch<'a> {
    /// Tokens seen before.
    pub(super) position: usize,
    pub(super) mask: KeyMask<'a>,
    pub(super) window: Option<Window>,
}

impl Stretch<'_> {
    /// One head on the calling thread; returns whether all elements were in range. If not, the
    /// state is anything.
    pub(super) fn prefill<T: Real, M: FeatureMap<T>>(
        &self,
        head: &Head<'_, T, M>,
        state: &mut HeadState<T>,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> bool {
        match self.window {
            Some(_) => {
                window::window(head, state, self.position, q, k, v, self.mask.valid(), out, scratch)
            }
            None => {
                causal::causal(head, state, self.position, q, k, v, self.mask.valid(), out, scratch)
            }
        }
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
        let segment = |tokens: Range<usize>,
                       state: &mut HeadState<T>,
                       q: ArrayView3<'_, T>,
                       out: ArrayViewMut3<'_, T>,
                       scratch: &mut Scratch<T>| {
            let mask = self
                .mask
                .valid()
                .map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[tokens.clone()]));
            let stretch = Stretch { position: self.position + tokens.start, mask, ..*self };
            let rows = s![tokens, ..];
            let fits = stretch.prefill(head, state, q, k.slice(rows), v.slice(rows), out, scratch);
            clean.fetch_and(fits, Ordering::Relaxed);
            fits
        };
        pages.run(
            q,
            out,
            |tokens, page, q, out, scratch| {
                if let Some(page) = page {
                    page.copy(state);
                }
                segment(tokens, state, q, out, scratch)
            },
            |tokens, page, q, out, scratch| {
                segment(tokens, page, q, out, scratch);
            },
        );
        clean.into_inner()
    }
}
