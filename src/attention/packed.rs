//! Many sequences in one call: their tokens one after another in the same arrays, told apart by
//! offsets.
//!
//! ```text
//! sequence i = tokens offsets[i] .. offsets[i+1],   offsets = [0, …, total]        (`cu_seqlens` elsewhere)
//! ```
//!
//! Every sequence is walked as it would be alone, so its results and states are the same, bit for
//! bit, whatever its neighbours and however many threads there are. A sequence without tokens is
//! allowed: it has no outputs, and its state stays as it is.

use std::ops::Range;

use ndarray::{Array3, ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut3, Axis, s};

use crate::attention::pages::Pages;
use crate::attention::prefill::Stretch;
use crate::attention::workspace::Scratch;
use crate::attention::{CausalState, KeyMask, KvCache, LinearAttention, Softmax, Workspace, full};
use crate::check::{check_len, check_shape};
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::Real;
use crate::threads;

/// Offsets begin with 0, never fall, and end with the number of tokens; returns how many sequences
/// there are.
pub(crate) fn check_offsets(
    argument: &'static str,
    offsets: &[usize],
    tokens: usize,
) -> Result<usize> {
    let (Some(&first), Some(&last)) = (offsets.first(), offsets.last()) else {
        return Err(Error::Empty { argument });
    };
    let wrong = |expected, got: usize| Err(Error::Value { argument, expected, got: got as f64 });
    if first != 0 {
        return wrong("0 at first", first);
    }
    if let Some(pair) = offsets.windows(2).find(|pair| pair[1] < pair[0]) {
        return wrong("in ascending order", pair[1]);
    }
    if last != tokens {
        return wrong("the number of tokens at last", last);
    }
    Ok(offsets.len() - 1)
}

/// As [`check_offsets`], for as many sequences as there are states.
pub(crate) fn check_offsets_of(states: usize, offsets: &[usize], tokens: usize) -> Result<()> {
    check_len("offsets", states + 1, offsets.len())?;
    check_offsets("offsets", offsets, tokens).map(|_| ())
}

/// As [`check_offsets`], for queries and keys of as many sequences.
fn check_both_offsets<T>(
    q_offsets: &[usize],
    k_offsets: &[usize],
    q: &ArrayRef3<T>,
    k: &ArrayRef3<T>,
) -> Result<()> {
    let sequences = check_offsets("q_offsets", q_offsets, q.shape()[1])?;
    check_len("k_offsets", sequences + 1, k_offsets.len())?;
    check_offsets("k_offsets", k_offsets, k.shape()[1]).map(|_| ())
}

/// The tokens of each sequence.
pub(crate) fn ranges(offsets: &[usize]) -> impl Iterator<Item = Range<usize>> + Send {
    offsets.windows(2).map(|pair| pair[0]..pair[1])
}

/// Packed arguments that have been checked.
#[derive(Clone, Copy)]
struct Packed<'a, T> {
    q: &'a ArrayRef3<T>,
    k: &'a ArrayRef3<T>,
    v: &'a ArrayRef3<T>,
    q_offsets: &'a [usize],
    k_offsets: &'a [usize],
    mask: KeyMask<'a>,
}

/// One key-value head of one sequence, and its group of query heads.
struct Part<'a, T> {
    head: usize,
    q: ArrayView3<'a, T>,
    k: ArrayView2<'a, T>,
    v: ArrayView2<'a, T>,
    mask: KeyMask<'a>,
    out: ArrayViewMut3<'a, T>,
}

impl<'a, T: Real> Packed<'a, T> {
    /// All heads of the first sequence, then of the next one.
    fn parts(self, out: &'a mut ArrayRef3<T>) -> impl Iterator<Item = Part<'a, T>> + Send {
        let Self { q, k, v, q_offsets, k_offsets, mask } = self;
        let (kv_heads, group) = (k.shape()[0], q.shape()[0] / k.shape()[0]);
        let sequences = ranges(q_offsets).zip(ranges(k_offsets)).scan(
            Some(out.view_mut()),
            |rest, (queries, keys)| {
                let (own, later) = rest.take()?.split_at(Axis(1), queries.len());
                *rest = Some(later);
                Some((queries, keys, own))
            },
        );
        sequences.flat_map(move |(queries, keys, out)| {
            let mask = mask.of(keys.clone());
            (0..kv_heads).scan(Some(out), move |rest, head| {
                let (own, later) = rest.take()?.split_at(Axis(0), group);
                *rest = Some(later);
                Some(Part {
                    head,
                    q: q.slice(s![head * group..(head + 1) * group, queries.clone(), ..]),
                    k: k.slice(s![head, keys.clone(), ..]),
                    v: v.slice(s![head, keys.clone(), ..]),
                    mask,
                    out: own,
                })
            })
        })
    }
}

/// Runs `work` for every part, with its own of `states`, on all threads.
fn for_each_part<'a, T: Real, S: Send>(
    packed: Packed<'a, T>,
    out: &'a mut ArrayRef3<T>,
    scratches: &mut [Scratch<T>],
    states: impl Iterator<Item = S> + Send,
    work: impl Fn(Part<'a, T>, S, &mut Scratch<T>) + Sync,
) {
    threads::for_each(scratches, packed.parts(out).zip(states), |scratch, (part, state)| {
        work(part, state, scratch)
    });
}

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// [`full`](Self::full) of several sequences, each one's queries seeing its own keys only.
    /// Allocates.
    ///
    /// # Shapes
    /// - `q`: `[h, n_q, d]`, `k`: `[h_kv, n_k, d]`, `v`: `[h_kv, n_k, e]` with all sequences'
    ///   tokens one after another, `q_offsets` and `k_offsets`: b + 1 each, `mask`: n_k entries;
    ///   returns `[h, n_q, e]`.
    ///
    /// # Errors
    /// As [`full_packed_into`](Self::full_packed_into).
    pub fn full_packed(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        q_offsets: &[usize],
        k_offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.full_packed_into(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            mask,
            &mut out,
            &mut self.workspace(),
        )?;
        Ok(out)
    }

    /// [`full_packed`](Self::full_packed) into the caller's memory, without allocating. Sequence i
    /// is tokens `offsets[i]..offsets[i + 1]`, and gets what [`full_into`](Self::full_into) gives
    /// for it alone, bit for bit; zeros, if it has queries and no keys.
    ///
    /// # Errors
    /// As [`full_into`](Self::full_into). [`Error::Value`] for offsets that do not begin with 0,
    /// fall, or do not end with the number of tokens, [`Error::Length`] for different numbers of
    /// both.
    pub fn full_packed_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        q_offsets: &[usize],
        k_offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_full()?;
        workspace.check(self.sizes)?;
        check_both_offsets(q_offsets, k_offsets, q, k)?;
        self.check(q, k, v, mask, out)?;
        let packed = Packed { q, k, v, q_offsets, k_offsets, mask };
        for_each_part(
            packed,
            out,
            &mut workspace.scratches,
            std::iter::repeat(()),
            |part, (), scratch| {
                full::full(
                    &self.head(part.head),
                    part.q,
                    part.k,
                    part.v,
                    part.mask.valid(),
                    part.out,
                    scratch,
                );
            },
        );
        Ok(())
    }

    /// Whole sequences, each from the empty state: [`causal`](Self::causal) of each. Allocates.
    ///
    /// # Errors
    /// As [`prefill_packed_into`](Self::prefill_packed_into).
    pub fn causal_packed(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let sequences = check_offsets("offsets", offsets, q.shape()[1])?;
        let mut states = vec![self.new_state(); sequences];
        self.prefill_packed(&mut states.iter_mut().collect::<Vec<_>>(), q, k, v, offsets, mask)
    }

    /// The next tokens of several sequences; returns `[h, n, e]`. Allocates.
    ///
    /// # Errors
    /// As [`prefill_packed_into`](Self::prefill_packed_into).
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{KeyMask, LinearConfig};
    /// use dijiang::kernel::DctMapConfig;
    /// use ndarray::{Array, Array3, s};
    ///
    /// let attention = LinearConfig::new().build(vec![DctMapConfig::new(8).build::<f32>()?])?;
    /// let q: Array3<f32> = Array::from_shape_fn((1, 30, 8), |(_, i, j)| ((3 * i + 5 * j) % 7) as f32 / 7.0);
    ///
    /// // Three sequences of 10, 0 and 20 tokens.
    /// let mut states = vec![attention.new_state(); 3];
    /// let mut all: Vec<_> = states.iter_mut().collect();
    /// let out = attention.prefill_packed(&mut all, &q, &q, &q, &[0, 10, 10, 30], KeyMask::All)?;
    /// assert_eq!(states.iter().map(|state| state.position()).collect::<Vec<_>>(), [10, 0, 20]);
    ///
    /// let last = q.slice(s![.., 10.., ..]).to_owned();
    /// assert_eq!(out.slice(s![.., 10.., ..]), attention.causal(&last, &last, &last, KeyMask::All)?);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn prefill_packed(
        &self,
        states: &mut [&mut CausalState<T>],
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.prefill_packed_into(states, q, k, v, offsets, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// The next tokens of several sequences, into the caller's memory, without allocating. Sequence
    /// i is tokens `offsets[i]..offsets[i + 1]` and continues `states[i]`, as
    /// [`prefill_into`](Self::prefill_into) would with it alone, bit for bit. A sequence without
    /// tokens leaves its state as it is.
    ///
    /// # Shapes
    /// - `states`: b, `offsets`: b + 1; `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`,
    ///   `mask`: n entries, `out`: `[h, n, e]` with all sequences' tokens one after another.
    ///
    /// # Cost
    /// That of the sequences, and one look at all elements before. Sequences and heads are shared
    /// out among the threads of the current pool; where they are at most half as many as threads,
    /// threads share them as in `prefill_into`.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into), for any of the sequences. [`Error::Length`] unless
    /// there is one offset more than states, [`Error::Value`] for offsets that do not begin with 0,
    /// fall, or do not end with n. After an error no state is changed.
    pub fn prefill_packed_into(
        &self,
        states: &mut [&mut CausalState<T>],
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        let (n, kv_heads) = (q.shape()[1], self.maps().len());
        states.iter().try_for_each(|state| state.check(self.shape()))?;
        workspace.check(self.sizes)?;
        check_offsets_of(states.len(), offsets, n)?;
        check_shape("k", k, &[kv_heads, n, self.sizes.dim])?;
        self.check(q, k, v, mask, out)?;
        if Pages::<T>::pay(states.len() * kv_heads) {
            for (state, tokens) in
                states.iter_mut().zip(ranges(offsets)).filter(|(_, tokens)| !tokens.is_empty())
            {
                let (mask, own) = (mask.of(tokens.clone()), s![.., tokens, ..]);
                self.prefill_into(
                    state,
                    &q.slice(own),
                    &k.slice(own),
                    &v.slice(own),
                    mask,
                    &mut out.slice_mut(own),
                    workspace,
                )?;
            }
            return Ok(());
        }
        let packed = Packed { q, k, v, q_offsets: offsets, k_offsets: offsets, mask };
        let heads = states.iter_mut().flat_map(|state| {
            let position = state.position;
            state.heads.iter_mut().map(move |head| (position, head))
        });
        for_each_part(
            packed,
            out,
            &mut workspace.scratches,
            heads,
            |part, (position, state), scratch| {
                let stretch = Stretch { position, mask: part.mask, window: self.window() };
                stretch.prefill(
                    &self.head(part.head),
                    state,
                    part.q,
                    part.k,
                    part.v,
                    part.out,
                    scratch,
                );
            },
        );
        states
            .iter_mut()
            .zip(ranges(offsets))
            .for_each(|(state, tokens)| state.position += tokens.len());
        Ok(())
    }
}

impl<T: Real> Softmax<T> {
    /// [`full`](Self::full) of several sequences, each one's queries seeing its own keys only.
    /// Allocates.
    ///
    /// # Shapes
    /// As [`LinearAttention::full_packed`].
    ///
    /// # Errors
    /// As [`LinearAttention::full_packed_into`].
    pub fn full_packed(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        q_offsets: &[usize],
        k_offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.full_packed_into(
            q,
            k,
            v,
            q_offsets,
            k_offsets,
            mask,
            &mut out,
            &mut self.workspace(),
        )?;
        Ok(out)
    }

    /// [`full_packed`](Self::full_packed) into the caller's memory, without allocating; each
    /// sequence as [`full_into`](Self::full_into) of it alone, bit for bit.
    ///
    /// # Errors
    /// As [`LinearAttention::full_packed_into`].
    pub fn full_packed_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        q_offsets: &[usize],
        k_offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_full()?;
        check_both_offsets(q_offsets, k_offsets, q, k)?;
        self.check(q, k, v, mask, out, workspace)?;
        self.pass_packed(Packed { q, k, v, q_offsets, k_offsets, mask }, false, out, workspace);
        Ok(())
    }

    /// Whole sequences: [`causal`](Self::causal) of each. Allocates the output and scratch, no
    /// cache.
    ///
    /// # Errors
    /// As [`causal_packed_into`](Self::causal_packed_into).
    pub fn causal_packed(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.causal_packed_into(q, k, v, offsets, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// [`causal_packed`](Self::causal_packed) into the caller's memory, without allocating; each
    /// sequence as [`causal_into`](Self::causal_into) of it alone, bit for bit.
    ///
    /// # Errors
    /// As [`causal_into`](Self::causal_into), and for offsets as
    /// [`LinearAttention::prefill_packed_into`].
    pub fn causal_packed_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        check_offsets("offsets", offsets, q.shape()[1])?;
        check_shape("k", k, &[self.config().kv_heads, q.shape()[1], self.config().dim])?;
        self.check(q, k, v, mask, out, workspace)?;
        self.pass_packed(
            Packed { q, k, v, q_offsets: offsets, k_offsets: offsets, mask },
            true,
            out,
            workspace,
        );
        Ok(())
    }

    /// The next tokens of several sequences; returns `[h, n, e]`. Allocates.
    ///
    /// # Errors
    /// As [`LinearAttention::prefill_packed_into`].
    pub fn prefill_packed(
        &self,
        caches: &mut [&mut KvCache<T>],
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let mut out = self.output(q)?;
        self.prefill_packed_into(caches, q, k, v, offsets, mask, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    /// The next tokens of several sequences, into the caller's memory; sequence i continues
    /// `caches[i]` as [`prefill_into`](Self::prefill_into) would with it alone, bit for bit.
    /// Allocates where a cache grows.
    ///
    /// # Shapes
    /// As [`LinearAttention::prefill_packed_into`], with caches for states.
    ///
    /// # Errors
    /// As [`LinearAttention::prefill_packed_into`]; after an error no cache is changed.
    pub fn prefill_packed_into(
        &self,
        caches: &mut [&mut KvCache<T>],
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        caches.iter().try_for_each(|cache| self.check_cache(cache))?;
        check_offsets_of(caches.len(), offsets, q.shape()[1])?;
        check_shape("k", k, &[self.config().kv_heads, q.shape()[1], self.config().dim])?;
        self.check(q, k, v, mask, out, workspace)?;
        let packed = Packed { q, k, v, q_offsets: offsets, k_offsets: offsets, mask };
        let heads = caches.iter_mut().flat_map(|cache| {
            let position = cache.position;
            cache.heads.iter_mut().map(move |head| (position, head))
        });
        for_each_part(
            packed,
            out,
            &mut workspace.scratches,
            heads,
            |part, (position, cache), scratch| {
                self.continue_head(
                    cache,
                    position,
                    part.q,
                    part.k,
                    part.v,
                    part.mask.valid(),
                    part.out,
                    scratch,
                );
            },
        );
        caches
            .iter_mut()
            .zip(ranges(offsets))
            .for_each(|(cache, tokens)| cache.position += tokens.len());
        Ok(())
    }

    fn pass_packed(
        &self,
        packed: Packed<'_, T>,
        causal: bool,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) {
        for_each_part(
            packed,
            out,
            &mut workspace.scratches,
            std::iter::repeat(()),
            |part, (), scratch| {
                let Part { q, k, v, mask, mut out, .. } = part;
                for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
                    self.pass_head(q, k, v, mask.valid(), causal, out, scratch);
                }
            },
        );
    }
}
