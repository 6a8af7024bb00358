//! [`Softmax`]: exact softmax attention, tiled, with online softmax, and a cache of keys and values
//! to decode from.

mod cache;

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{Array3, ArrayRef2, ArrayRef3, ArrayViewMut3, Axis};

use crate::Real;
use crate::attention::check::{check_exact_part, check_scale, check_size, each_head};
use crate::attention::operator::Operator;
use crate::attention::qkv::{Dims, HeadQkv, Qkv};
use crate::attention::rows::{OutOfRange, Rows, Valid};
use crate::attention::scratch::{BLOCK, Scratch, Sizes};
use crate::attention::workspace::Workspace;
use crate::attention::{Causality, KeyMask, Window};
use crate::check::{check_room, check_same};
use crate::error::{Error, Result};
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{LANES, padded};
use crate::threads::try_each;

use cache::HeadCache;
pub use cache::KvCache;

/// How [`Softmax`] is to be built.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
#[non_exhaustive]
pub struct SoftmaxConfig {
    /// Query heads h.
    pub heads: usize,
    /// Key-value heads. Default: h.
    pub kv_heads: usize,
    /// Head dimension d.
    pub dim: usize,
    /// Value dimension e. Default: d.
    pub value_dim: usize,
    /// Softmax scale σ. Default: 1/√d.
    pub scale: f64,
    /// Which keys a query sees. Default: [`Causality::Causal`].
    pub causality: Causality,
    /// Causal attention sees local windows alone, and sinks: one window for all key-value heads, or
    /// one for each. Default: none, it sees everything.
    pub windows: Vec<Window>,
    /// The first s unmasked tokens of a sequence, which every later query sees beside the window.
    /// As [`LinearConfig::sinks`](crate::attention::LinearConfig::sinks). Default: 0.
    pub sinks: usize,
}

impl SoftmaxConfig {
    /// `heads` heads of dimension `dim`, everything else by default.
    pub fn new(heads: usize, dim: usize) -> Self {
        Self {
            heads,
            kv_heads: heads,
            dim,
            value_dim: dim,
            scale: 1.0 / (dim as f64).sqrt(),
            causality: Causality::Causal,
            windows: Vec::new(),
            sinks: 0,
        }
    }

    /// Fewer key-value heads than query heads: each serves h / h_kv consecutive query heads.
    #[must_use]
    pub fn with_kv_heads(self, kv_heads: usize) -> Self {
        Self { kv_heads, ..self }
    }

    /// Value dimension e.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim, ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale, ..self }
    }

    /// Which keys a query sees.
    #[must_use]
    pub fn with_causality(self, causality: Causality) -> Self {
        Self { causality, ..self }
    }

    /// Causal attention sees one local window alone.
    #[must_use]
    pub fn with_window(self, window: Window) -> Self {
        self.with_windows(vec![window])
    }

    /// A local window for each key-value head.
    #[must_use]
    pub fn with_windows(self, windows: Vec<Window>) -> Self {
        Self { windows, ..self }
    }

    /// Sinks s.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes of zero and a scale that is not positive, [`Error::NotDivisible`]
    /// for heads that are no multiple of the key-value heads, [`Error::Conflict`] for a window of
    /// bidirectional attention, and for one that keeps keys.
    pub fn build<T: Real>(self) -> Result<Softmax<T>> {
        for (argument, value) in [
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("dim", self.dim),
            ("value_dim", self.value_dim),
        ] {
            check_size(argument, value)?;
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(Error::NotDivisible {
                argument: "heads",
                divisor: "kv_heads",
                divisor_value: self.kv_heads,
                got: self.heads,
            });
        }
        check_scale(self.scale, self.dim)?;
        let windows = each_head("windows", self.windows, self.kv_heads)?;
        check_exact_part(&windows, self.sinks)?;
        if windows.iter().any(|window| window.kept > 0) {
            // Only maps have scores to keep keys by.
            return Err(Error::Conflict { argument: "window kept", other: "softmax attention" });
        }
        if !windows.is_empty() {
            self.causality.check_causal("window")?;
        }
        let config = SoftmaxConfig { windows, ..self };
        Ok(Softmax { config, element: PhantomData })
    }
}

/// Exact softmax attention over all heads of a layer, tiled with online softmax.
///
/// ```text
/// o_i = Σ_j exp(x_i·y_j) v_j / Σ_j exp(x_i·y_j)
/// ```
///
/// The thing [`LinearAttention`](crate::attention::LinearAttention) replaces, with the same
/// methods: its judge, its baseline, and what to use below about a hundred tokens.
#[derive(Debug, Clone)]
pub struct Softmax<T> {
    config: SoftmaxConfig,
    element: PhantomData<T>,
}

/// Keys that a query sees: those before `sinks`, and those of the window, which begins no earlier.
struct Visible {
    sinks: usize,
    window: Range<usize>,
}

/// Where the key blocks of a pass come from: a cache, or the caller's arrays on the fly.
#[derive(Clone, Copy)]
enum Keys<'k, 'a, T> {
    Cached(&'k HeadCache<T>),
    Given(&'k HeadQkv<'a, T>),
}

impl<T: Real> Softmax<T> {
    /// What it was built from.
    pub fn config(&self) -> &SoftmaxConfig {
        &self.config
    }

    fn sizes(&self) -> Sizes {
        let SoftmaxConfig { dim, value_dim, .. } = self.config;
        Sizes { dim, features: 0, value_dim, window: None, sinks: 0, map: 0 }
    }

    fn dims(&self) -> Dims {
        let SoftmaxConfig { heads, kv_heads, dim, value_dim, causality, .. } = self.config;
        Dims { heads, kv_heads, dim, value_dim, causal: causality == Causality::Causal }
    }

    /// Caches need a direction, and to be of this operator.
    fn check_caches(&self, method: &'static str, caches: &[&mut KvCache<T>]) -> Result<()> {
        self.config.causality.check_causal(method)?;
        caches.iter().try_for_each(|cache| self.check_state(cache))
    }

    /// √σ.
    fn root_scale(&self) -> T {
        T::from_f64(self.config.scale.sqrt())
    }

    /// One query head over the caller's keys and values.
    fn pass(
        &self,
        qkv: HeadQkv<'_, T>,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), OutOfRange> {
        let (n, keys) = (qkv.q.shape()[1], qkv.k.nrows());
        let sinks = self.sink_end((0..keys).map(|j| qkv.is_valid(j)));
        let visible = |i: usize| match self.config.causality {
            Causality::Causal => self.visible(qkv.head, i, sinks),
            Causality::Bidirectional => Visible { sinks: 0, window: 0..keys },
        };
        for start in (0..n).step_by(BLOCK) {
            let queries = qkv.query_rows(0, start..n.min(start + BLOCK));
            self.tiles(Keys::Given(&qkv), queries.clone(), visible, scratch)?;
            let out = out.index_axis_mut(Axis(0), 0);
            scratch.put_outputs(padded(self.config.value_dim), queries.tokens, out)?;
        }
        Ok(())
    }

    /// The next tokens of one key-value head and its group of query heads, through the cache.
    fn continue_head(
        &self,
        cache: &mut HeadCache<T>,
        qkv: HeadQkv<'_, T>,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) -> Result<(), OutOfRange> {
        cache.append(T::ops(), self.root_scale(), &qkv, scratch)?;
        let n = qkv.k.nrows();
        let sinks = self.sink_end(cache.valid.iter().copied());
        for h in 0..qkv.q.shape()[0] {
            for start in (0..n).step_by(BLOCK) {
                let queries = qkv.query_rows(h, start..n.min(start + BLOCK));
                let visible = |i: usize| self.visible(qkv.head, qkv.position + i, sinks);
                self.tiles(Keys::Cached(cache), queries.clone(), visible, scratch)?;
                let out = out.index_axis_mut(Axis(0), h);
                scratch.put_outputs(padded(self.config.value_dim), queries.tokens, out)?;
            }
        }
        Ok(())
    }

    /// Where the sinks of a sequence end.
    fn sink_end(&self, valid: impl Iterator<Item = bool>) -> usize {
        let sinks = valid.enumerate().filter(|&(_, valid)| valid).take(self.config.sinks);
        sinks.last().map_or(0, |(j, _)| j + 1)
    }

    /// Keys that the causal query at position i sees, the sinks ending at `sinks`.
    fn visible(&self, head: usize, i: usize, sinks: usize) -> Visible {
        let window = self.config.windows.get(head);
        let first = window
            .map_or(0, |window| (i / window.chunk).saturating_sub(window.back) * window.chunk);
        Visible { sinks: sinks.min(first), window: first..i + 1 }
    }

    /// Online softmax of the query rows `rows` of `q` over the key blocks that any of them sees:
    /// sums into `scratch.o`, normalisers into `scratch.total`. `visible` tells the keys that a
    /// row sees, which only move upwards.
    fn tiles(
        &self,
        keys: Keys<'_, '_, T>,
        queries: Rows<'_, T>,
        visible: impl Fn(usize) -> Visible,
        scratch: &mut Scratch<T>,
    ) -> Result<(), OutOfRange> {
        let rows = queries.tokens.clone();
        let ops = T::ops();
        let Scratch { x, y, v: values, p, o, total, zeros, features, .. } = scratch;
        let top = &mut features.top;
        let (d, stride, tokens) = (self.config.dim, padded(self.config.value_dim), rows.len());
        let width = padded(tokens);
        queries.gather(ops, self.root_scale(), x, zeros)?;
        o[..tokens * stride].fill(T::zero());
        top[..tokens].fill(T::NEG_INFINITY);
        total[..tokens].fill(T::zero());
        let (low, high) = (visible(rows.start), visible(rows.end - 1));
        let (first, last) = (low.window.start / BLOCK, high.window.end);
        let sinks = 0..high.sinks.div_ceil(BLOCK).min(first);
        for block in sinks.chain(first..last.div_ceil(BLOCK)) {
            let base = block * BLOCK;
            // Keys of this block that any row sees; a partial block is as wide as its tokens need.
            let count = (last - base).min(BLOCK);
            let (keys, key_width, values, valid): (&[T], usize, &[T], Valid<'_>) = match keys {
                Keys::Cached(cache) => cache.block(block, d, stride),
                Keys::Given(qkv) => {
                    let tokens = base..base + count;
                    qkv.key_rows(tokens.clone()).gather(ops, self.root_scale(), y, zeros)?;
                    qkv.value_rows(tokens.clone()).copy(ops, values)?;
                    (y, padded(count), values, qkv.valid.map(|valid| &valid[tokens]))
                }
            };
            let columns = padded(count);
            for band in (0..tokens).step_by(LANES) {
                let height = LANES.min(tokens - band);
                let (low, high) =
                    (visible(rows.start + band), visible(rows.start + band + height - 1));
                let before = low.window.start >= base + BLOCK && high.sinks <= base;
                if before || high.window.end <= base {
                    continue;
                }
                let scores = &mut p[band * BLOCK..];
                ops.matmul(
                    MatMut::new(scores, height, columns, BLOCK),
                    Accum::Replace,
                    MatRef::packed(x, d, width).cols(band..band + height).t(),
                    MatRef::new(keys, d, columns, key_width),
                );
                let whole = valid.is_none()
                    && high.window.start <= base
                    && low.window.end >= base + count
                    && count == columns;
                for i in 0..height {
                    let row = &mut scores[i * BLOCK..i * BLOCK + columns];
                    let row_index = band + i;
                    if !whole {
                        let seen = visible(rows.start + row_index);
                        let column = |key: usize| key.saturating_sub(base).min(count);
                        row[column(seen.sinks)..column(seen.window.start)].fill(T::NEG_INFINITY);
                        row[column(seen.window.end)..].fill(T::NEG_INFINITY);
                        for (score, _) in row
                            .iter_mut()
                            .zip(valid.unwrap_or_default())
                            .filter(|(_, valid)| !**valid)
                        {
                            *score = T::NEG_INFINITY;
                        }
                    }
                    let new_top = top[row_index].max((ops.slice_max)(row));
                    if new_top == T::NEG_INFINITY {
                        row.fill(T::zero());
                        continue;
                    }
                    if new_top != top[row_index] {
                        let factor = (top[row_index] - new_top).exp();
                        total[row_index] *= factor;
                        (ops.scale)(factor, &mut o[row_index * stride..(row_index + 1) * stride]);
                        top[row_index] = new_top;
                    }
                    total[row_index] += (ops.exp_sum)(row, -new_top);
                }
                ops.matmul(
                    MatMut::packed(&mut o[band * stride..], height, stride),
                    Accum::Add,
                    MatRef::new(scores, height, count, BLOCK),
                    MatRef::packed(values, count, stride),
                );
            }
        }
        Ok(())
    }
}

impl<T: Real> Operator<T> for Softmax<T> {
    type State = KvCache<T>;

    fn check_state(&self, cache: &KvCache<T>) -> Result<()> {
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        let pairs = [
            ("number of heads", kv_heads, cache.heads.len()),
            ("head dimension", dim, cache.dim),
            ("value dimension", value_dim, cache.value_dim),
        ];
        check_same("cache", pairs)
    }

    fn new_state(&self) -> KvCache<T> {
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        KvCache::new(kv_heads, dim, value_dim)
    }

    fn workspace(&self) -> Workspace<T> {
        Workspace::new(self.sizes())
    }

    fn step_workspace(&self) -> Workspace<T> {
        Workspace::for_steps(self.sizes())
    }

    fn forward(&self, qkv: Qkv<'_, T>) -> Result<Array3<T>> {
        let mut out = Array3::zeros(qkv.output_shape(self.dims())?);
        self.forward_into(qkv, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    fn forward_into(
        &self,
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        workspace.check(self.sizes())?;
        qkv.check(self.dims(), out)?;
        qkv.check_elements()?;
        let items = qkv.heads(out.view_mut()).flat_map(|(qkv, out)| qkv.split_group(out));
        let result = try_each(&mut workspace.workers, items, |worker, (qkv, out)| {
            self.pass(qkv, out, &mut worker.scratch)
        });
        result.or_else(|OutOfRange| qkv.check_elements())
    }

    fn prefill_packed(&self, caches: &mut [&mut KvCache<T>], qkv: Qkv<'_, T>) -> Result<Array3<T>> {
        let mut out = Array3::zeros(qkv.output_shape(self.dims())?);
        self.prefill_into(caches, qkv, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    fn prefill_into(
        &self,
        caches: &mut [&mut KvCache<T>],
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_caches("prefill", caches)?;
        workspace.check(self.sizes())?;
        qkv.check_states(caches.len())?;
        qkv.check(self.dims(), out)?;
        qkv.check_elements()?;
        let heads = caches.iter_mut().flat_map(|cache| {
            let position = cache.position;
            cache.heads.iter_mut().map(move |head| (position, head))
        });
        let items = qkv.heads(out.view_mut()).zip(heads);
        let result = try_each(&mut workspace.workers, items, |worker, ((qkv, out), head)| {
            let (position, cache) = head;
            let qkv = HeadQkv { position, ..qkv };
            self.continue_head(cache, qkv, out, &mut worker.scratch)
        });
        debug_assert!(result.is_ok(), "all elements have been looked at");
        caches.iter_mut().zip(qkv.ranges()).for_each(|(cache, (queries, _))| {
            cache.position += queries.len();
        });
        Ok(())
    }

    fn extend(
        &self,
        cache: &mut KvCache<T>,
        (k, v): (&ArrayRef3<T>, &ArrayRef3<T>),
        mask: KeyMask<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_caches("extend", &[&mut *cache])?;
        workspace.check(self.sizes())?;
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        let n = k.shape()[1];
        let (nobody, mut out) = self.dims().nobody(n);
        let qkv = Qkv::new(&nobody, k, v).with_mask(mask);
        qkv.check_keys(self.dims(), n)?;
        check_room::<T>("the cache", &[kv_heads, n, dim + padded(value_dim)])?;
        qkv.check_elements()?;
        let (position, scale) = (cache.position, self.root_scale());
        let items = qkv.heads(out.view_mut()).zip(&mut cache.heads);
        let result = try_each(&mut workspace.workers, items, |worker, ((qkv, _), cache)| {
            cache.append(T::ops(), scale, &HeadQkv { position, ..qkv }, &mut worker.scratch)
        });
        debug_assert!(result.is_ok(), "all elements have been looked at");
        cache.position += n;
        Ok(())
    }

    fn step(
        &self,
        cache: &mut KvCache<T>,
        token: Qkv<'_, T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_caches("step", &[&mut *cache])?;
        workspace.check(self.sizes())?;
        token.check_token(self.dims(), out)?;
        let position = cache.position;
        let heads = token.heads(out.view_mut().insert_axis(Axis(1)));
        for ((qkv, out), cache) in heads.zip(&mut cache.heads) {
            let qkv = HeadQkv { position, ..qkv };
            let result = self.continue_head(cache, qkv, out, &mut workspace.first().scratch);
            debug_assert!(result.is_ok(), "all elements have been looked at");
        }
        cache.position += 1;
        Ok(())
    }
}
