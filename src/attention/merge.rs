//! Segments of one sequence, each fed by itself, put together: what sequence parallelism over
//! threads or processes needs.
//!
//! ```text
//! c = max(c₁ + λ(p₂ − p₁), c₂)      S = exp(c₁ + λ(p₂ − p₁) − c)·S₁ + exp(c₂ − c)·S₂      (z likewise)
//! ```
//!
//! with the frames (c, p) of both states, λ = log γ. Keys that lie in the first segment's near
//! part, but no more in that of the end, are absorbed before; the others stay near.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{Array3, ArrayRef3};

use crate::attention::checks::{check_key_shapes, check_keys};
use crate::attention::{CausalState, KeyMask, LinearAttention, Workspace, window};
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::threads;

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// The empty state of a segment that begins at `position` of its sequence, to be
    /// [merged](Self::merge) with the state of what comes before. Fed with the segment's tokens, it
    /// knows nothing of earlier ones: outputs computed from it see this segment only.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for a position beyond 2⁵².
    pub fn new_state_at(&self, position: usize) -> Result<CausalState<T>> {
        CausalState::at(self.shape(), position)
    }

    /// Tokens that nobody queries join a state: [`prefill_into`](Self::prefill_into) without its
    /// queries and outputs, at less than half the cost. The state becomes the same, bit for bit.
    ///
    /// # Shapes
    /// - `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries.
    ///
    /// # Cost
    /// O(n) time, no allocation. Key-value heads are shared out among the threads of the current
    /// pool.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into); after an error the state is unchanged.
    pub fn extend(
        &self,
        state: &mut CausalState<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_step(state, workspace)?;
        check_key_shapes(self.maps().len(), self.sizes, k, v, mask)?;
        let n = k.shape()[1];
        // Of no query heads.
        let nobody = |dim: usize| Array3::zeros((0, n, dim));
        let queries = nobody(self.sizes.dim);
        self.advance(
            state,
            mask,
            n,
            workspace,
            || check_keys(k, v, mask),
            |stretch, heads, workspace| {
                let clean = AtomicBool::new(true);
                let heads = heads.iter_mut().zip(k.outer_iter().zip(v.outer_iter())).enumerate();
                threads::for_each(
                    &mut workspace.scratches,
                    heads,
                    |scratch, (h, (state, (k, v)))| {
                        let mut nothing = nobody(self.sizes.value_dim);
                        let fits = stretch.prefill(
                            &self.head(h),
                            state,
                            queries.view(),
                            k,
                            v,
                            nothing.view_mut(),
                            scratch,
                        );
                        clean.fetch_and(fits, Ordering::Relaxed);
                    },
                );
                clean.into_inner()
            },
        )
    }

    /// `state` becomes that of its own segment and the next one, `next`: what feeding it the next
    /// segment's tokens would have made of it, up to rounding. Any cut will do, within a window chunk
    /// too.
    ///
    /// Merging is associative up to rounding, and the empty state of a position is neutral, so that
    /// any scan or reduction over segments gives the states that sequence parallelism needs:
    ///
    /// 1. every worker [extends](Self::extend) a [`new_state_at`](Self::new_state_at) the beginning
    ///    of its segment by its tokens;
    /// 2. an *exclusive* scan with `merge` gives every worker the state of everything before its
    ///    segment;
    /// 3. every worker prefills its tokens from that state, which gives its outputs: those of one
    ///    worker over the whole, up to rounding.
    ///
    /// Workers may be threads, or processes that exchange `CausalState::to_bytes` (feature
    /// `states`): with MPI, `MPI_Exscan` over a user-defined operation that reads two states,
    /// merges and writes one; with a library that only gathers (NCCL), an all-gather of the bytes,
    /// whose number is the same for all, and a merge of those before one's own. What travels does
    /// not grow with the number of tokens. The example `sequence_parallel` shows it.
    ///
    /// # Cost
    /// O(m·e) per head, and O(chunk · back) keys through the map with a local window. On the calling
    /// thread, no allocation.
    ///
    /// # Errors
    /// [`Error::Value`] unless `next` begins where `state` ends, [`Error::Foreign`] for states and
    /// a workspace of another shape; nothing is changed then.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{KeyMask, LinearConfig, Window};
    /// use dijiang::kernel::DctMapConfig;
    /// use ndarray::{Array, Array3, s};
    ///
    /// let attention = LinearConfig::new().with_window(Window::new(4, 1)).build(vec![DctMapConfig::new(8).build::<f64>()?])?;
    /// let k: Array3<f64> = Array::from_shape_fn((1, 30, 8), |(_, i, j)| ((3 * i + 5 * j) % 7) as f64 / 7.0);
    ///
    /// let mut workspace = attention.workspace();
    /// let (first, last) = (k.slice(s![.., ..10, ..]), k.slice(s![.., 10.., ..]));
    /// let (mut state, mut next) = (attention.new_state(), attention.new_state_at(10)?);
    /// attention.extend(&mut state, &first, &first, KeyMask::All, &mut workspace)?;
    /// attention.extend(&mut next, &last, &last, KeyMask::All, &mut workspace)?;
    /// attention.merge(&mut state, &next, &mut workspace)?;
    /// assert_eq!((state.start(), state.position()), (0, 30));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn merge(
        &self,
        state: &mut CausalState<T>,
        next: &CausalState<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_step(state, workspace)?;
        next.check(self.shape())?;
        if next.start() != state.position {
            return Err(Error::Value {
                argument: "the next segment",
                expected: "one that begins where the other ends",
                got: next.start() as f64,
            });
        }
        if next.position == next.start() {
            return Ok(());
        }
        let scratch = workspace.first();
        for (h, (own, next_head)) in state.heads.iter_mut().zip(&next.heads).enumerate() {
            let head = self.head(h);
            if let (Some(mut ring), Some(next_ring)) = (own.ring.take(), &next_head.ring) {
                window::hand_over(
                    &head,
                    own,
                    &mut ring,
                    state.position,
                    next_ring,
                    next.position,
                    scratch,
                );
                own.ring = Some(ring);
            }
            let mut sums = std::mem::take(&mut scratch.sums);
            sums.copy_sums(head.ops, next_head);
            own.join(head.ops, head.log_decay, &sums, &mut scratch.feature);
            scratch.sums = sums;
        }
        state.position = next.position;
        Ok(())
    }
}
