//! [`LinearAttention`]: the door to linear attention over all heads of a layer.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{Array3, ArrayRef2, ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut3, Axis};

use crate::attention::checks::{
    check_scale, check_shapes, check_size, check_state_size, check_tokens,
};
use crate::attention::pages::{Pages, SEGMENT};
use crate::attention::prefill::Stretch;
use crate::attention::state::{HeadState, Shape};
use crate::attention::window::Ring;
use crate::attention::workspace::{BLOCK, Scratch, Sizes};
use crate::attention::{CausalState, KeyMask, Window, Workspace, decode, full};
use crate::error::{
    Error, Result, check_elements, check_finite, check_len, check_positive, check_room, check_shape,
};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ops, padded};
use crate::threads;

/// Largest local window, in tokens: beyond it the ring of keys would be no constant-size state any
/// more.
const MAX_NEAR: usize = 1 << 20;

/// How [`LinearAttention`] is to be built.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct LinearConfig {
    /// Query heads h. Default: one per map. A multiple of the number of maps (grouped queries: one
    /// map, one state and one key-value head serve h / maps consecutive query heads).
    pub heads: Option<usize>,
    /// Value dimension e. Default: the maps' dimension d.
    pub value_dim: Option<usize>,
    /// Softmax scale σ, at most 10⁶/d. Default: 1/√d.
    pub scale: Option<f64>,
    /// The exact local window of causal attention. Default: none.
    pub window: Option<Window>,
    /// log γ ≤ 0 per token (and at least −[`Real::LIMIT`]), one per map, causal attention only.
    /// Default: empty, which stands for zeros (γ = 1).
    pub log_decay: Vec<f64>,
}

impl LinearConfig {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Query heads h, a multiple of the number of maps.
    #[must_use]
    pub fn with_heads(self, heads: usize) -> Self {
        Self { heads: Some(heads), ..self }
    }

    /// Value dimension e.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim: Some(value_dim), ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Exact local window.
    #[must_use]
    pub fn with_window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// log γ per map.
    #[must_use]
    pub fn with_log_decay(self, log_decay: Vec<f64>) -> Self {
        Self { log_decay, ..self }
    }

    /// Checks everything: one map per key-value head.
    ///
    /// # Cost
    /// A pass over the maps. Keeps them; states and workspaces are made when they are asked for.
    ///
    /// # Errors
    /// [`Error::Empty`] without maps, [`Error::Shape`] for maps of different d or m,
    /// [`Error::NotDivisible`] for heads that are no multiple of the maps, [`Error::Value`] and
    /// [`Error::Length`] for the numbers, [`Error::TooLarge`] for dimensions and local windows beyond
    /// 2²⁰ and a state of more than 2³⁰ elements.
    pub fn build<T: Real, M: FeatureMap<T>>(self, maps: Vec<M>) -> Result<LinearAttention<T, M>> {
        let Some(first) = maps.first() else { return Err(Error::Empty { argument: "maps" }) };
        let (dim, features, kv_heads) = (first.dim(), first.features(), maps.len());
        check_size("map dimension", dim)?;
        check_positive("map features", features)?;
        for map in &maps {
            for (axis, expected, got) in [(0, features, map.features()), (1, dim, map.dim())] {
                if got != expected {
                    return Err(Error::Shape { argument: "maps", axis, expected, got });
                }
            }
        }
        let heads = self.heads.unwrap_or(kv_heads);
        check_positive("heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::NotDivisible {
                argument: "heads",
                divisor: "the number of maps",
                divisor_value: kv_heads,
                got: heads,
            });
        }
        let value_dim = self.value_dim.unwrap_or(dim);
        check_size("value_dim", value_dim)?;
        let scale = self.scale.unwrap_or(1.0 / (dim as f64).sqrt());
        check_scale(scale, dim)?;
        if let Some(window) = self.window {
            window.check()?;
        }
        check_state_size(kv_heads, dim, features, value_dim, self.window)?;
        let log_decay =
            if self.log_decay.is_empty() { vec![0.0; kv_heads] } else { self.log_decay };
        check_len("log_decay", kv_heads, log_decay.len())?;
        for &decay in &log_decay {
            check_finite("log_decay", decay)?;
            if decay > 0.0 {
                return Err(Error::Value {
                    argument: "log_decay",
                    expected: "at most 0",
                    got: decay,
                });
            }
            if decay < -T::LIMIT {
                return Err(Error::Value {
                    argument: "log_decay",
                    expected: "at least -Real::LIMIT",
                    got: decay,
                });
            }
        }
        let sizes = Sizes {
            dim,
            features,
            value_dim,
            scores: self.window.map_or(BLOCK, |window| Ring::<T>::scores(window).max(BLOCK)),
            map: maps
                .iter()
                .map(|map| map.scratch_len(BLOCK).max(map.token_scratch_len()))
                .max()
                .unwrap_or(0),
        };
        Ok(LinearAttention {
            maps,
            heads,
            scale,
            window: self.window,
            log_decay,
            sizes,
            element: PhantomData,
        })
    }
}

impl Window {
    /// Chunks of at least one token, and not too many of them.
    pub(super) fn check(self) -> Result<()> {
        check_positive("window chunk", self.chunk)?;
        let tokens = self.back.saturating_add(1).saturating_mul(self.chunk);
        if tokens > MAX_NEAR {
            Err(Error::TooLarge { argument: "window tokens", limit: MAX_NEAR, got: tokens })
        } else {
            Ok(())
        }
    }
}

/// DCT-kernelized linear attention over all heads of a layer.
///
/// O(n) time, a state of constant size, the same results whichever way the tokens arrive: at once,
/// in pieces, or one by one. Immutable and shared freely between threads; what changes lives in
/// [`CausalState`] and [`Workspace`].
///
/// # Examples
/// ```
/// use dijiang::attention::{KeyMask, LinearConfig};
/// use dijiang::kernel::DctMapConfig;
/// use ndarray::{Array, Array3};
///
/// let (heads, n, d) = (2, 100, 16);
/// let maps = (0..heads).map(|h| DctMapConfig::new(d).with_seed(h as u64).build::<f32>()).collect::<Result<Vec<_>, _>>()?;
/// let attention = LinearConfig::new().build(maps)?;
/// let q: Array3<f32> = Array::from_shape_fn((heads, n, d), |(h, i, j)| ((h + 3 * i + 5 * j) % 7) as f32 / 7.0);
/// let v = Array::ones((heads, n, d));
/// let out = attention.causal(&q, &q, &v, KeyMask::All)?;
/// assert!(out.iter().all(|&o: &f32| (o - 1.0).abs() < 1e-5), "a weighted mean of ones is one");
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LinearAttention<T, M> {
    maps: Vec<M>,
    heads: usize,
    scale: f64,
    window: Option<Window>,
    log_decay: Vec<f64>,
    pub(super) sizes: Sizes,
    element: PhantomData<T>,
}

/// What the loops need to know of one key-value head.
pub(super) struct Head<'a, T: 'static, M> {
    pub(super) map: &'a M,
    pub(super) ops: &'static Ops<T>,
    /// d.
    pub(super) dim: usize,
    /// m.
    pub(super) features: usize,
    /// e, padded to whole lane groups.
    pub(super) value_stride: usize,
    /// √σ.
    pub(super) scale: T,
    /// λ = log γ.
    pub(super) log_decay: f64,
}

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[M] {
        &self.maps
    }

    /// Query heads h.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// The exact local window.
    pub fn window(&self) -> Option<Window> {
        self.window
    }

    /// log γ, one per map.
    pub fn log_decay(&self) -> &[f64] {
        &self.log_decay
    }

    /// Softmax scale σ.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Scratch for every method below, for as many threads as the current pool has.
    pub fn workspace(&self) -> Workspace<T> {
        Workspace::new(self.sizes, self.new_state().heads)
    }

    /// Scratch for [`step`](Self::step), smaller: for one thread, and without room for long
    /// prefills.
    pub fn step_workspace(&self) -> Workspace<T> {
        Workspace::for_steps(self.sizes)
    }

    /// The empty state of a new sequence.
    pub fn new_state(&self) -> CausalState<T> {
        CausalState::new(self.shape())
    }

    /// Every query sees every allowed key (bidirectional and cross attention). Allocates.
    ///
    /// Where queries come one by one over the same keys, [`prefill`](Self::prefill) a state with
    /// the keys once, and then with each query and a masked key: that reads the state, leaves it as
    /// it is, and costs the same at any number of keys.
    ///
    /// ```text
    /// o_i = Σ_j K(x_i, y_j) v_j / Σ_j K(x_i, y_j)
    /// ```
    ///
    /// # Shapes
    /// - `q`: `[h, n_q, d]`, `k`: `[h_kv, n_k, d]`, `v`: `[h_kv, n_k, e]`, `mask`: n_k entries;
    ///   returns `[h, n_q, e]`.
    ///
    /// # Cost
    /// O(n_q + n_k) time, memory beyond the arguments independent of both.
    ///
    /// # Errors
    /// [`Error::Conflict`] with a local window or decay, [`Error::Shape`] and [`Error::Length`] for
    /// arguments that do not fit, [`Error::Empty`] without queries or keys, [`Error::TooLarge`] for
    /// outputs there is no room for, [`Error::NonFinite`] for elements beyond [`Real::LIMIT`]
    /// (masked keys and their values are not looked at).
    pub fn full(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.full_into(q, k, v, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// [`full`](Self::full) into the caller's memory, without allocating. Heads are shared out
    /// among the threads of the current pool; if there are at most half as many key-value heads as
    /// threads, several threads share a long one, in room that the workspace makes at the first
    /// such call. The bits do not depend on it.
    ///
    /// # Shapes
    /// - as [`full`](Self::full), `out`: `[h, n_q, e]`.
    ///
    /// # Errors
    /// As [`full`](Self::full), and [`Error::Foreign`] for a workspace of another shape.
    pub fn full_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_full()?;
        workspace.check(self.sizes)?;
        self.check(q, k, v, mask, out)?;
        if Pages::<T>::pay(self.maps.len()) && q.shape()[1].max(k.shape()[1]) > SEGMENT {
            workspace.share_keys(self.maps.len() * full::PARTS);
            let Workspace { parts, scratches, .. } = workspace;
            let queries = self.head_parts(q, k, v, out).map(|(q, _, _, out)| (q, out));
            full::full_shared(|h| self.head(h), k, v, mask.valid(), queries, parts, scratches);
            return Ok(());
        }
        self.for_each_head(
            q,
            k,
            v,
            out,
            workspace,
            (0..).map(|h| (h, ())),
            |head, (), q, k, v, out, scratch| {
                full::full(head, q, k, v, mask.valid(), out, scratch);
            },
        );
        Ok(())
    }

    /// A whole sequence, each query seeing the keys up to its own: [`prefill`](Self::prefill) from
    /// the empty state.
    ///
    /// # Shapes
    /// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries; returns
    ///   `[h, n, e]`.
    ///
    /// # Cost
    /// As [`prefill_into`](Self::prefill_into), and allocates the output, a state and a workspace.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into).
    pub fn causal(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        self.prefill(&mut self.new_state(), q, k, v, mask)
    }

    /// The next n tokens of a sequence. Allocates the output and a workspace.
    ///
    /// # Shapes
    /// - as [`prefill_into`](Self::prefill_into); returns `[h, n, e]`.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into).
    pub fn prefill(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.prefill_into(state, q, k, v, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// The next n tokens of a sequence, into the caller's memory.
    ///
    /// ```text
    /// o_i = Σ_{j≤i} A_ij v_j / Σ_{j≤i} A_ij
    /// ```
    ///
    /// with A as in the [module's](crate::attention) equation.
    ///
    /// # Shapes
    /// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries, `out`: `[h,
    ///   n, e]`.
    ///
    /// # Cost
    /// O(n) time, memory beyond the arguments independent of n; no allocation. Heads are shared out
    /// among the threads of the current pool; if there are at most half as many key-value heads as
    /// threads, several threads share a head of a long stretch, in room that the workspace makes at
    /// the first such call. The bits do not depend on it.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Length`] and [`Error::Foreign`] for arguments that do not fit,
    /// [`Error::Empty`] without tokens, [`Error::NonFinite`] for elements beyond [`Real::LIMIT`]
    /// (masked keys and their values are not looked at). After an error the state is unchanged.
    pub fn prefill_into(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        state.check(self.shape())?;
        workspace.check(self.sizes)?;
        let n = q.shape()[1];
        check_shape("k", k, &[self.maps.len(), n, self.sizes.dim])?;
        check_shapes(self.heads, self.maps.len(), self.sizes, q, k, v, mask, out)?;
        let check = || check_tokens(q, k, v, mask);
        self.advance(state, mask, n, workspace, check, |stretch, heads, workspace| {
            let long = n > SEGMENT;
            if long && Pages::<T>::pay(self.maps.len()) {
                workspace.share_heads(self.shape());
            }
            let clean = AtomicBool::new(true);
            let mut pages = std::mem::take(&mut workspace.pages);
            let shared =
                pages.iter_mut().filter(|_| long).map(Some).chain(std::iter::repeat_with(|| None));
            let states = heads.iter_mut().zip(shared).enumerate();
            self.for_each_head(
                q,
                k,
                v,
                out,
                workspace,
                states,
                |head, (state, pages), q, k, v, out, scratch| {
                    let fits = match pages {
                        Some(pages) => stretch.prefill_shared(head, state, q, k, v, out, pages),
                        None => stretch.prefill(head, state, q, k, v, out, scratch),
                    };
                    clean.fetch_and(fits, Ordering::Relaxed);
                },
            );
            workspace.pages = pages;
            clean.into_inner()
        })
    }

    /// `n` tokens join `state` by `walk`, which looks at elements as it reads them and returns
    /// whether all were in range: to do so first, by `check`, would take them through the cache
    /// twice. There must be a state to go back to; for a few tokens to keep it would cost more than
    /// it saves.
    pub(super) fn advance(
        &self,
        state: &mut CausalState<T>,
        mask: KeyMask<'_>,
        n: usize,
        workspace: &mut Workspace<T>,
        check: impl Fn() -> Result<()>,
        walk: impl FnOnce(Stretch<'_>, &mut [HeadState<T>], &mut Workspace<T>) -> bool,
    ) -> Result<()> {
        let (fresh, long) = (state.position == state.start(), n > SEGMENT);
        if !fresh && long {
            workspace.keep(&state.heads);
        } else if !fresh {
            check()?;
        }
        let stretch = Stretch { position: state.position, mask, window: self.window };
        if !walk(stretch, &mut state.heads, workspace) {
            if fresh {
                state.heads.iter_mut().for_each(HeadState::reset);
            } else {
                state
                    .heads
                    .iter_mut()
                    .zip(&workspace.snapshot)
                    .for_each(|(state, kept)| state.copy(kept));
            }
            return check();
        }
        state.position += n;
        Ok(())
    }

    /// The next token of a sequence.
    ///
    /// # Shapes
    /// - `q`: `[h, d]`, `k`: `[h_kv, d]`, `v`: `[h_kv, e]`, `out`: `[h, e]`.
    ///
    /// # Cost
    /// Constant: O(m·e) per head, and O(chunk · (d + e)) with a local window. Never allocates, runs on
    /// the calling thread.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into); after an error the state is unchanged.
    pub fn step(
        &self,
        state: &mut CausalState<T>,
        q: &ArrayRef2<T>,
        k: &ArrayRef2<T>,
        v: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_step(state, workspace)?;
        let (kv_heads, Sizes { dim, value_dim, .. }) = (self.maps.len(), self.sizes);
        check_shape("q", q, &[self.heads, dim])?;
        check_shape("k", k, &[kv_heads, dim])?;
        check_shape("v", v, &[kv_heads, value_dim])?;
        check_shape("out", out, &[self.heads, value_dim])?;
        check_elements("q", q)?;
        check_elements("k", k)?;
        check_elements("v", v)?;
        let group = self.heads / kv_heads;
        let parts =
            q.axis_chunks_iter(Axis(0), group).zip(out.axis_chunks_iter_mut(Axis(0), group));
        let rows = k.outer_iter().zip(v.outer_iter()).zip(parts);
        for ((h, head_state), ((k, v), (q, out))) in state.heads.iter_mut().enumerate().zip(rows) {
            decode::step(
                &self.head(h),
                head_state,
                state.position,
                q,
                k,
                v,
                out,
                workspace.first(),
            );
        }
        state.position += 1;
        Ok(())
    }

    /// Whether state and workspace are those of an operator of this shape.
    pub(crate) fn check_step(
        &self,
        state: &CausalState<T>,
        workspace: &Workspace<T>,
    ) -> Result<()> {
        state.check(self.shape())?;
        workspace.check(self.sizes)
    }

    /// Full attention has neither a local window nor decay.
    pub(super) fn check_full(&self) -> Result<()> {
        if self.window.is_some() {
            return Err(Error::Conflict { argument: "full attention", other: "a local window" });
        }
        if self.log_decay.iter().any(|&decay| decay != 0.0) {
            return Err(Error::Conflict { argument: "full attention", other: "decay" });
        }
        Ok(())
    }

    pub(super) fn shape(&self) -> Shape {
        let Sizes { dim, features, value_dim, .. } = self.sizes;
        Shape { heads: self.maps.len(), dim, features, value_dim, window: self.window }
    }

    /// Memory for the outputs, once the queries are known to fit.
    pub(super) fn output(&self, q: &ArrayRef3<T>) -> Result<Array3<T>> {
        let n = q.shape()[1];
        check_shape("q", q, &[self.heads, n, self.sizes.dim])?;
        check_room::<T>("outputs", &[self.heads, n, self.sizes.value_dim])?;
        Ok(Array3::zeros((self.heads, n, self.sizes.value_dim)))
    }

    pub(super) fn head(&self, h: usize) -> Head<'_, T, M> {
        Head {
            map: &self.maps[h],
            ops: T::ops(),
            dim: self.sizes.dim,
            features: self.sizes.features,
            value_stride: padded(self.sizes.value_dim),
            scale: T::from_f64(self.scale.sqrt()),
            log_decay: self.log_decay[h],
        }
    }

    pub(super) fn check(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &ArrayRef3<T>,
    ) -> Result<()> {
        check_shapes(self.heads, self.maps.len(), self.sizes, q, k, v, mask, out)?;
        check_tokens(q, k, v, mask)
    }

    /// Runs `work` once per key-value head, with the head's own of `states` and its share of every
    /// argument.
    fn for_each_head<S: Send>(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
        states: impl Iterator<Item = (usize, S)> + Send,
        work: impl Fn(
            &Head<'_, T, M>,
            S,
            ArrayView3<'_, T>,
            ArrayView2<'_, T>,
            ArrayView2<'_, T>,
            ArrayViewMut3<'_, T>,
            &mut Scratch<T>,
        ) + Sync,
    ) {
        let items = self.head_parts(q, k, v, out).zip(states);
        threads::for_each(
            &mut workspace.scratches,
            items,
            |scratch, ((q, k, v, out), (h, state))| {
                work(&self.head(h), state, q, k, v, out, scratch);
            },
        );
    }

    /// Every key-value head's share of the arguments: `[group, n_q, d]`, `[n_k, d]`, `[n_k, e]`,
    /// `[group, n_q, e]`.
    fn head_parts<'a>(
        &self,
        q: &'a ArrayRef3<T>,
        k: &'a ArrayRef3<T>,
        v: &'a ArrayRef3<T>,
        out: &'a mut ArrayRef3<T>,
    ) -> impl Iterator<
        Item = (ArrayView3<'a, T>, ArrayView2<'a, T>, ArrayView2<'a, T>, ArrayViewMut3<'a, T>),
    > + Send {
        let group = self.heads / self.maps.len();
        let parts =
            q.axis_chunks_iter(Axis(0), group).zip(out.axis_chunks_iter_mut(Axis(0), group));
        k.outer_iter().zip(v.outer_iter()).zip(parts).map(|((k, v), (q, out))| (q, k, v, out))
    }
}
