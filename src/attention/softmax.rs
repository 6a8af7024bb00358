//! Exact softmax attention: tiled, with online softmax, and a cache of keys and values to decode
//! from.

use std::marker::PhantomData;
use std::ops::Range;

use ndarray::{
    Array3, ArrayRef2, ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis,
};

use crate::attention::checks::{
    check_key_shapes, check_keys, check_scale, check_shapes, check_size, check_tokens,
};
use crate::attention::rows::{Valid, copy_rows, gather, is_valid, normalise};
use crate::attention::workspace::{BLOCK, Scratch, Sizes};
use crate::attention::{KeyMask, Window, Workspace};
use crate::error::{Error, Result, check_elements, check_room, check_shape};
use crate::real::Real;
use crate::simd::{LANES, Ops, Product, padded};
use crate::threads;

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
    /// Causal attention sees the local window alone: the query's own chunk and `back` chunks before
    /// it. Default: none.
    pub window: Option<Window>,
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
            window: None,
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

    /// Causal attention sees the local window alone.
    #[must_use]
    pub fn with_window(self, window: Window) -> Self {
        Self { window: Some(window), ..self }
    }

    /// Checks everything.
    ///
    /// # Errors
    /// [`Error::Value`] for sizes of zero and a scale that is not positive, [`Error::NotDivisible`]
    /// for heads that are no multiple of the key-value heads.
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
        if let Some(window) = self.window {
            window.check()?;
        }
        Ok(Softmax { config: self, element: PhantomData })
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

/// The keys and values of every token so far: what [`Softmax`] needs to decode. Grows with
/// every token.
#[derive(Debug, Clone, PartialEq)]
pub struct KvCache<T> {
    pub(super) heads: Vec<HeadCache<T>>,
    pub(super) position: usize,
    dim: usize,
    value_dim: usize,
}

/// Keys and values of one key-value head, in blocks of BLOCK tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeadCache<T> {
    /// Scaled keys, `[blocks, d, BLOCK]`: a panel per block.
    keys: Vec<T>,
    /// Values, `[blocks, BLOCK, e_padded]`.
    values: Vec<T>,
    /// Tokens that may be attended to, `[blocks, BLOCK]`.
    valid: Vec<bool>,
}

impl<T: Real> KvCache<T> {
    /// Tokens seen so far, masked ones included.
    pub fn position(&self) -> usize {
        self.position
    }

    /// Bytes in use.
    pub fn bytes(&self) -> usize {
        self.heads.iter().map(|head| (head.keys.len() + head.values.len()) * size_of::<T>()).sum()
    }

    /// Back to the empty cache; keeps its memory.
    pub fn reset(&mut self) {
        self.position = 0;
        for head in &mut self.heads {
            head.keys.clear();
            head.values.clear();
            head.valid.clear();
        }
    }
}

/// Where the key blocks of a pass come from: a cache, or the caller's arrays on the fly.
#[derive(Clone, Copy)]
enum Keys<'a, T> {
    Cached(&'a HeadCache<T>),
    Rows { k: ArrayView2<'a, T>, v: ArrayView2<'a, T>, valid: Valid<'a> },
}

impl<T: Real> Softmax<T> {
    /// What it was built from.
    pub fn config(&self) -> &SoftmaxConfig {
        &self.config
    }

    /// Scratch for every method below.
    pub fn workspace(&self) -> Workspace<T> {
        Workspace::new(self.sizes(), Vec::new())
    }

    /// The empty cache of a new sequence.
    pub fn new_cache(&self) -> KvCache<T> {
        let head = HeadCache { keys: Vec::new(), values: Vec::new(), valid: Vec::new() };
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        KvCache { heads: vec![head; kv_heads], position: 0, dim, value_dim }
    }

    /// Every query sees every allowed key. Allocates.
    ///
    /// # Shapes
    /// - `q`: `[h, n_q, d]`, `k`: `[h_kv, n_k, d]`, `v`: `[h_kv, n_k, e]`, `mask`: n_k entries;
    ///   returns `[h, n_q, e]`.
    ///
    /// # Errors
    /// As [`LinearAttention::full`](crate::attention::LinearAttention::full).
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

    /// [`full`](Self::full) into the caller's memory, without allocating.
    ///
    /// # Shapes
    /// - as [`full`](Self::full), `out`: `[h, n_q, e]`.
    ///
    /// # Cost
    /// O(n_q·n_k) time, memory independent of both.
    ///
    /// # Errors
    /// As [`full`](Self::full).
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
        self.check(q, k, v, mask, out, workspace)?;
        self.pass(q, k, v, mask, false, out, workspace);
        Ok(())
    }

    /// A whole sequence, each query seeing the keys up to its own. Allocates the output and
    /// scratch, no cache.
    ///
    /// # Shapes
    /// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries; returns
    ///   `[h, n, e]`.
    ///
    /// # Errors
    /// As [`causal_into`](Self::causal_into).
    pub fn causal(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.causal_into(q, k, v, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// [`causal`](Self::causal) into the caller's memory, without allocating: O(n²) time, memory
    /// independent of n.
    ///
    /// # Shapes
    /// - as [`causal`](Self::causal), `out`: `[h, n, e]`.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into).
    pub fn causal_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        check_shape("k", k, &[self.config.kv_heads, q.shape()[1], self.config.dim])?;
        self.check(q, k, v, mask, out, workspace)?;
        self.pass(q, k, v, mask, true, out, workspace);
        Ok(())
    }

    /// The next n tokens of a sequence; returns `[h, n, e]`. Allocates.
    ///
    /// # Shapes
    /// - as [`prefill_into`](Self::prefill_into).
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into).
    pub fn prefill(
        &self,
        cache: &mut KvCache<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.prefill_into(cache, q, k, v, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// The next n tokens of a sequence, into the caller's memory; the cache grows by n tokens.
    ///
    /// # Shapes
    /// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries, `out`: `[h,
    ///   n, e]`.
    ///
    /// # Errors
    /// As [`LinearAttention::prefill_into`](crate::attention::LinearAttention::prefill_into); after
    /// an error the cache is unchanged.
    pub fn prefill_into(
        &self,
        cache: &mut KvCache<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_cache(cache)?;
        let n = q.shape()[1];
        check_shape("k", k, &[self.config.kv_heads, n, self.config.dim])?;
        self.check(q, k, v, mask, out, workspace)?;
        let (position, group) = (cache.position, self.config.heads / self.config.kv_heads);
        let parts =
            q.axis_chunks_iter(Axis(0), group).zip(out.axis_chunks_iter_mut(Axis(0), group));
        let items = cache.heads.iter_mut().zip(k.outer_iter().zip(v.outer_iter())).zip(parts);
        threads::for_each(
            &mut workspace.scratches,
            items,
            |scratch, ((cache, (k, v)), (q, out))| {
                self.continue_head(cache, position, q, k, v, mask.valid(), out, scratch);
            },
        );
        cache.position += n;
        Ok(())
    }

    /// Appends tokens to the cache that nobody queries: the keys and values of a context to be
    /// attended to later.
    ///
    /// # Shapes
    /// - `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, `mask`: n entries.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into); after an error the cache is unchanged.
    pub fn extend(
        &self,
        cache: &mut KvCache<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_cache(cache)?;
        workspace.check(self.sizes())?;
        check_key_shapes(self.config.kv_heads, self.sizes(), k, v, mask)?;
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        check_room::<T>("the cache", &[kv_heads, k.shape()[1], dim + padded(value_dim)])?;
        check_keys(k, v, mask)?;
        let (position, scale) = (cache.position, self.root_scale());
        let items = cache.heads.iter_mut().zip(k.outer_iter().zip(v.outer_iter()));
        threads::for_each(&mut workspace.scratches, items, |scratch, (cache, (k, v))| {
            cache.append(T::ops(), position, scale, k, v, mask.valid(), scratch);
        });
        cache.position += k.shape()[1];
        Ok(())
    }

    /// The next token of a sequence.
    ///
    /// # Shapes
    /// - `q`: `[h, d]`, `k`: `[h_kv, d]`, `v`: `[h_kv, e]`, `out`: `[h, e]`.
    ///
    /// # Cost
    /// O(position) time; allocates when the cache grows.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into).
    pub fn step(
        &self,
        cache: &mut KvCache<T>,
        q: &ArrayRef2<T>,
        k: &ArrayRef2<T>,
        v: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_cache(cache)?;
        workspace.check(self.sizes())?;
        let SoftmaxConfig { heads, kv_heads, dim, value_dim, .. } = self.config;
        check_shape("q", q, &[heads, dim])?;
        check_shape("k", k, &[kv_heads, dim])?;
        check_shape("v", v, &[kv_heads, value_dim])?;
        check_shape("out", out, &[heads, value_dim])?;
        check_elements("q", q)?;
        check_elements("k", k)?;
        check_elements("v", v)?;
        let group = heads / kv_heads;
        let (q, k, v) = (
            q.view().insert_axis(Axis(1)),
            k.view().insert_axis(Axis(1)),
            v.view().insert_axis(Axis(1)),
        );
        let mut out = out.view_mut().insert_axis(Axis(1));
        let position = cache.position;
        for (h, cache) in cache.heads.iter_mut().enumerate() {
            let group = h * group..(h + 1) * group;
            let q = q.slice_axis(Axis(0), group.clone().into());
            let (k, v) = (k.index_axis(Axis(0), h), v.index_axis(Axis(0), h));
            let out = out.slice_axis_mut(Axis(0), group.into());
            self.continue_head(cache, position, q, k, v, None, out, workspace.first());
        }
        cache.position += 1;
        Ok(())
    }

    fn sizes(&self) -> Sizes {
        let SoftmaxConfig { dim, value_dim, .. } = self.config;
        Sizes { dim, features: 0, value_dim, scores: BLOCK, map: 0 }
    }

    /// Memory for the outputs, once the queries are known to fit.
    pub(super) fn output(&self, q: &ArrayRef3<T>) -> Result<Array3<T>> {
        let n = q.shape()[1];
        check_shape("q", q, &[self.config.heads, n, self.config.dim])?;
        check_room::<T>("outputs", &[self.config.heads, n, self.config.value_dim])?;
        Ok(Array3::zeros((self.config.heads, n, self.config.value_dim)))
    }

    /// Full attention has no local window.
    pub(super) fn check_full(&self) -> Result<()> {
        match self.config.window {
            Some(_) => Err(Error::Conflict { argument: "full attention", other: "a local window" }),
            None => Ok(()),
        }
    }

    pub(super) fn check(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        workspace.check(self.sizes())?;
        check_shapes(self.config.heads, self.config.kv_heads, self.sizes(), q, k, v, mask, out)?;
        check_tokens(q, k, v, mask)
    }

    pub(super) fn check_cache(&self, cache: &KvCache<T>) -> Result<()> {
        let SoftmaxConfig { kv_heads, dim, value_dim, .. } = self.config;
        let pairs = [
            ("number of heads", kv_heads, cache.heads.len()),
            ("head dimension", dim, cache.dim),
            ("value dimension", value_dim, cache.value_dim),
        ];
        match pairs.into_iter().find(|(_, expected, got)| expected != got) {
            Some((what, expected, got)) => {
                Err(Error::Foreign { argument: "cache", what, expected, got })
            }
            None => Ok(()),
        }
    }

    /// √σ.
    fn root_scale(&self) -> T {
        T::from_f64(self.config.scale.sqrt())
    }

    /// All heads over the caller's keys and values.
    fn pass(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        causal: bool,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) {
        let group = self.config.heads / self.config.kv_heads;
        let items = q.outer_iter().zip(out.outer_iter_mut()).enumerate();
        threads::for_each(&mut workspace.scratches, items, |scratch, (h, (q, out))| {
            let (k, v) = (k.index_axis(Axis(0), h / group), v.index_axis(Axis(0), h / group));
            self.pass_head(q, k, v, mask.valid(), causal, out, scratch);
        });
    }

    /// One query head of [`pass`](Self::pass).
    pub(super) fn pass_head(
        &self,
        q: ArrayView2<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        valid: Valid<'_>,
        causal: bool,
        mut out: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch<T>,
    ) {
        for start in (0..q.nrows()).step_by(BLOCK) {
            let rows = start..(start + BLOCK).min(q.nrows());
            let visible = |i: usize| if causal { self.window(i) } else { 0..k.nrows() };
            self.tiles(Keys::Rows { k, v, valid }, q, rows.clone(), visible, scratch);
            for i in rows.clone() {
                let sums = &scratch.o[(i - start) * padded(self.config.value_dim)..];
                normalise(sums, scratch.total[i - start], out.row_mut(i));
            }
        }
    }

    /// Keys that the causal query at position i sees.
    fn window(&self, i: usize) -> Range<usize> {
        let first = self
            .config
            .window
            .map_or(0, |window| (i / window.chunk).saturating_sub(window.back) * window.chunk);
        first..i + 1
    }

    /// The next tokens of one key-value head and its group of query heads, through the cache.
    pub(super) fn continue_head(
        &self,
        cache: &mut HeadCache<T>,
        position: usize,
        q: ArrayView3<'_, T>,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        valid: Valid<'_>,
        mut out: ArrayViewMut3<'_, T>,
        scratch: &mut Scratch<T>,
    ) {
        let (n, stride) = (k.nrows(), padded(self.config.value_dim));
        cache.append(T::ops(), position, self.root_scale(), k, v, valid, scratch);
        for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()) {
            for start in (0..n).step_by(BLOCK) {
                let rows = start..(start + BLOCK).min(n);
                self.tiles(
                    Keys::Cached(cache),
                    q,
                    rows.clone(),
                    |i| self.window(position + i),
                    scratch,
                );
                for i in rows {
                    normalise(
                        &scratch.o[(i - start) * stride..],
                        scratch.total[i - start],
                        out.row_mut(i),
                    );
                }
            }
        }
    }

    /// Online softmax of the query rows `rows` of `q` over the key blocks that any of them sees:
    /// sums into `scratch.o`, normalisers into `scratch.total`. `visible` tells the range of keys
    /// that a row sees, which only moves upwards.
    fn tiles(
        &self,
        keys: Keys<'_, T>,
        q: ArrayView2<'_, T>,
        rows: Range<usize>,
        visible: impl Fn(usize) -> Range<usize>,
        scratch: &mut Scratch<T>,
    ) {
        let ops = T::ops();
        let Scratch { x, y, v: values, p, o, top, total, zeros, .. } = scratch;
        let (d, stride, tokens) = (self.config.dim, padded(self.config.value_dim), rows.len());
        let width = padded(tokens);
        gather(ops, q, rows.clone(), None, self.root_scale(), x, zeros);
        o[..tokens * stride].fill(T::zero());
        top[..tokens].fill(T::NEG_INFINITY);
        total[..tokens].fill(T::zero());
        let (first, last) = (visible(rows.start).start, visible(rows.end - 1).end);
        for block in first / BLOCK..last.div_ceil(BLOCK) {
            let base = block * BLOCK;
            // Keys of this block that any row sees; a partial block is as wide as its tokens need.
            let count = (last - base).min(BLOCK);
            let (keys, key_width, values, valid): (&[T], usize, &[T], Valid<'_>) = match keys {
                Keys::Cached(cache) => cache.block(block, d, stride),
                Keys::Rows { k, v, valid } => {
                    gather(ops, k, base..base + count, valid, self.root_scale(), y, zeros);
                    copy_rows(ops, v, base..base + count, valid, values);
                    (y, padded(count), values, valid.map(|valid| &valid[base..base + count]))
                }
            };
            let columns = padded(count);
            for band in (0..tokens).step_by(LANES) {
                let height = LANES.min(tokens - band);
                let (low, high) =
                    (visible(rows.start + band), visible(rows.start + band + height - 1));
                if low.start >= base + BLOCK || high.end <= base {
                    continue;
                }
                let scores = &mut p[band * BLOCK..];
                let product = Product {
                    m: height,
                    n: columns,
                    k: d,
                    a_row: 1,
                    a_col: width,
                    b_row: key_width,
                    c_row: BLOCK,
                    accumulate: false,
                };
                ops.matmul(product, &x[band..], keys, scores);
                let whole = valid.is_none()
                    && high.start <= base
                    && low.end >= base + count
                    && count == columns;
                for i in 0..height {
                    let row = &mut scores[i * BLOCK..i * BLOCK + columns];
                    let row_index = band + i;
                    if !whole {
                        let seen = visible(rows.start + row_index);
                        for (j, score) in row.iter_mut().enumerate() {
                            if !seen.contains(&(base + j)) || j >= count || !is_valid(valid, j) {
                                *score = T::NEG_INFINITY;
                            }
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
                let product = Product {
                    m: height,
                    n: stride,
                    k: count,
                    a_row: BLOCK,
                    a_col: 1,
                    b_row: stride,
                    c_row: stride,
                    accumulate: true,
                };
                ops.matmul(product, scores, values, &mut o[band * stride..]);
            }
        }
    }
}

impl<T: Real> HeadCache<T> {
    /// Appends tokens, the first at `position`.
    fn append(
        &mut self,
        ops: &Ops<T>,
        position: usize,
        scale: T,
        k: ArrayView2<'_, T>,
        v: ArrayView2<'_, T>,
        valid: Valid<'_>,
        scratch: &mut Scratch<T>,
    ) {
        let (n, d, stride) = (k.nrows(), k.ncols(), padded(v.ncols()));
        let blocks = (position + n).div_ceil(BLOCK);
        self.keys.resize(blocks * d * BLOCK, T::zero());
        self.values.resize(blocks * BLOCK * stride, T::zero());
        self.valid.resize(blocks * BLOCK, false);
        let mut start = 0;
        while start < n {
            let (block, within) = ((position + start) / BLOCK, (position + start) % BLOCK);
            let end = n.min(start + BLOCK - within);
            let width = padded(end - start);
            gather(ops, k, start..end, valid, scale, &mut scratch.y, &scratch.zeros);
            let panel = &mut self.keys[block * d * BLOCK..(block + 1) * d * BLOCK];
            for (keys, y) in panel.chunks_exact_mut(BLOCK).zip(scratch.y.chunks_exact(width)) {
                keys[within..within + end - start].copy_from_slice(&y[..end - start]);
            }
            let first = position + start;
            copy_rows(
                ops,
                v,
                start..end,
                valid,
                &mut self.values[first * stride..(first + end - start) * stride],
            );
            for j in start..end {
                self.valid[position + j] = is_valid(valid, j);
            }
            start = end;
        }
    }

    /// Keys, their row stride, values and validity of one block.
    fn block(&self, block: usize, d: usize, stride: usize) -> (&[T], usize, &[T], Valid<'_>) {
        let valid = &self.valid[block * BLOCK..(block + 1) * BLOCK];
        let all = valid.iter().all(|&valid| valid);
        (
            &self.keys[block * d * BLOCK..(block + 1) * d * BLOCK],
            BLOCK,
            &self.values[block * BLOCK * stride..(block + 1) * BLOCK * stride],
            (!all).then_some(valid),
        )
    }
}
