//! [`Qkv`]: the queries, keys and values of one call, with their mask and their sequences.

use std::ops::Range;

use ndarray::{
    Array3, ArrayRef2, ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut3, Axis, Slice, s,
};

use crate::Real;
use crate::attention::KeyMask;
use crate::attention::check::check_all;
use crate::attention::rows::{OutOfRange, Rows, Valid};
use crate::check::{check_elements, check_len, check_room, check_shape};
use crate::error::{Error, Result};

/// Queries, keys and values of all heads: what every attention operator computes its outputs from.
///
/// One sequence, unless [`with_offsets`](Self::with_offsets) says where several begin: their tokens
/// lie one after another in the same arrays, without padding (`cu_seqlens` elsewhere). Each
/// sequence is computed as it would be alone, bit for bit, whatever its neighbours.
///
/// Copying one costs nothing: it holds views. The operator it is given to checks it, once.
///
/// # Shapes
/// - `q`: `[h, n_q, d]`, `k`: `[h_kv, n_k, d]`, `v`: `[h_kv, n_k, e]`; for causal attention n_k is
///   n_q. Rows are tokens, in any memory layout.
///
/// # Examples
/// ```
/// use dijiang::attention::{LinearConfig, Operator, Qkv};
/// use dijiang::kernel::DctMapConfig;
/// use ndarray::{Array, Array3, s};
///
/// let attention = LinearConfig::new().build(vec![DctMapConfig::new().build::<f32>(8)?])?;
/// let x: Array3<f32> = Array::from_shape_fn((1, 30, 8), |(_, i, j)| (3 * i + 5 * j) as f32 % 7.0);
///
/// // Two sequences, of 10 and 20 tokens.
/// let out = attention.forward(Qkv::new(&x, &x, &x).with_offsets(&[0, 10, 30]))?;
///
/// let last = x.slice(s![.., 10.., ..]);
/// assert_eq!(out.slice(s![.., 10.., ..]), attention.forward(Qkv::new(&last, &last, &last))?);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Qkv<'a, T> {
    pub(crate) q: ArrayView3<'a, T>,
    pub(crate) k: ArrayView3<'a, T>,
    pub(crate) v: ArrayView3<'a, T>,
    pub(crate) mask: KeyMask<'a>,
    offsets: Option<&'a [usize]>,
    key_offsets: Option<&'a [usize]>,
}

impl<'a, T> Qkv<'a, T> {
    /// One sequence, every key of which may be attended to.
    pub fn new(q: &'a ArrayRef3<T>, k: &'a ArrayRef3<T>, v: &'a ArrayRef3<T>) -> Self {
        Self {
            q: q.view(),
            k: k.view(),
            v: v.view(),
            mask: KeyMask::All,
            offsets: None,
            key_offsets: None,
        }
    }

    /// One token.
    ///
    /// # Shapes
    /// - `q`: `[h, d]`, `k`: `[h_kv, d]`, `v`: `[h_kv, e]`.
    pub fn token(q: &'a ArrayRef2<T>, k: &'a ArrayRef2<T>, v: &'a ArrayRef2<T>) -> Self {
        let [q, k, v] = [q, k, v].map(|rows| rows.view().insert_axis(Axis(1)));
        Self { q, k, v, mask: KeyMask::All, offsets: None, key_offsets: None }
    }

    /// Which keys may be attended to; n_k entries.
    #[must_use]
    pub fn with_mask(self, mask: KeyMask<'a>) -> Self {
        Self { mask, ..self }
    }

    /// Several sequences: sequence i is tokens `offsets[i]..offsets[i + 1]`, which may be none. The
    /// first offset is 0, the last one the number of tokens.
    #[must_use]
    pub fn with_offsets(self, offsets: &'a [usize]) -> Self {
        Self { offsets: Some(offsets), key_offsets: None, ..self }
    }

    /// Offsets of the keys, where they are not those of the queries (cross attention); as many.
    #[must_use]
    pub fn with_key_offsets(self, key_offsets: &'a [usize]) -> Self {
        Self { key_offsets: Some(key_offsets), ..self }
    }

    /// Queries, keys and values as they were given.
    pub fn arrays(&self) -> [ArrayView3<'a, T>; 3] {
        [self.q, self.k, self.v]
    }

    /// Which keys may be attended to.
    pub fn mask(&self) -> KeyMask<'a> {
        self.mask
    }

    /// Number of queries, all sequences together.
    pub(crate) fn queries(&self) -> usize {
        self.q.shape()[1]
    }

    /// Number of keys, all sequences together.
    pub(crate) fn keys(&self) -> usize {
        self.k.shape()[1]
    }

    /// Number of sequences.
    pub(crate) fn sequences(&self) -> usize {
        self.offsets.map_or(1, |offsets| offsets.len().saturating_sub(1))
    }

    /// Tokens of the longest sequence, its queries or its keys.
    pub(crate) fn longest(&self) -> usize {
        self.ranges().map(|(queries, keys)| queries.len().max(keys.len())).max().unwrap_or(0)
    }

    /// Whether several sequences were given, or one by its offsets.
    pub(crate) fn is_packed(&self) -> bool {
        self.offsets.is_some()
    }

    /// Queries and keys of each sequence.
    pub(crate) fn ranges(
        &self,
    ) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + Send + use<'a, T> {
        let whole = [self.queries(), self.keys()];
        let (queries, keys) = (self.offsets, self.key_offsets.or(self.offsets));
        let range = |offsets: Option<&'a [usize]>, n: usize, i: usize| {
            offsets.map_or(0..n, |offsets| offsets[i]..offsets[i + 1])
        };
        (0..self.sequences()).map(move |i| (range(queries, whole[0], i), range(keys, whole[1], i)))
    }
}

/// What an operator expects of its arguments: numbers of heads and dimensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dims {
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    /// d.
    pub(crate) dim: usize,
    /// e.
    pub(crate) value_dim: usize,
    /// Whether query i belongs to key i.
    pub(crate) causal: bool,
}

impl Dims {
    /// Queries and outputs where nobody asks of `n` keys: of no heads.
    pub(crate) fn nobody<T: Real>(self, n: usize) -> (Array3<T>, Array3<T>) {
        (Array3::zeros((0, n, self.dim)), Array3::zeros((0, n, self.value_dim)))
    }
}

impl<T: Real> Qkv<'_, T> {
    /// Everything but the elements: shapes, mask and offsets, and the outputs' shape.
    pub(crate) fn check(&self, dims: Dims, out: &ArrayRef3<T>) -> Result<()> {
        let n = self.queries();
        check_shape("q", &self.q, &[dims.heads, n, dims.dim])?;
        check_shape("out", out, &[dims.heads, n, dims.value_dim])?;
        if n == 0 {
            return Err(Error::Empty { argument: "q" });
        }
        let keys = if dims.causal { n } else { self.keys() };
        self.check_keys(dims, keys)?;
        match (self.offsets, self.key_offsets) {
            (None, None) => Ok(()),
            (None, Some(key_offsets)) => check_len("key_offsets", 0, key_offsets.len()),
            (Some(offsets), None) if keys == n => check_offsets("offsets", offsets, n),
            (Some(offsets), None) => {
                check_offsets("offsets", offsets, n)?;
                check_offsets("key_offsets", offsets, keys)
            }
            (Some(offsets), Some(key_offsets)) => {
                check_offsets("offsets", offsets, n)?;
                check_len("key_offsets", offsets.len(), key_offsets.len())?;
                check_offsets("key_offsets", key_offsets, keys)
            }
        }
    }

    /// One sequence for every state.
    pub(crate) fn check_states(&self, states: usize) -> Result<()> {
        match self.offsets {
            Some(offsets) => check_offsets_of(states, offsets, self.queries()),
            None => check_len("states", 1, states),
        }
    }

    /// As [`check`](Self::check), for `n` keys and values without queries.
    pub(crate) fn check_keys(&self, dims: Dims, n: usize) -> Result<()> {
        check_shape("k", &self.k, &[dims.kv_heads, n, dims.dim])?;
        check_shape("v", &self.v, &[dims.kv_heads, n, dims.value_dim])?;
        if n == 0 {
            return Err(Error::Empty { argument: "k" });
        }
        self.mask.valid().map_or(Ok(()), |valid| check_len("mask", n, valid.len()))
    }

    /// Whether there is room for the outputs, `[h, n_q, e]`; returns their shape.
    pub(crate) fn output_shape(&self, dims: Dims) -> Result<(usize, usize, usize)> {
        check_shape("q", &self.q, &[dims.heads, self.queries(), dims.dim])?;
        let shape = [dims.heads, self.queries(), dims.value_dim];
        check_room::<T>("outputs", &shape)?;
        Ok(shape.into())
    }

    /// One token, every element of it in range; `out`: `[h, e]`.
    pub(crate) fn check_token(&self, dims: Dims, out: &ArrayRef2<T>) -> Result<()> {
        let Dims { heads, kv_heads, dim, value_dim, .. } = dims;
        check_len("token", 1, self.queries())?;
        check_len("token", 1, self.keys())?;
        check_len("token", 1, self.v.shape()[1])?;
        let [q, k, v] = [self.q, self.k, self.v].map(|array| array.index_axis_move(Axis(1), 0));
        check_shape("q", &q, &[heads, dim])?;
        check_shape("k", &k, &[kv_heads, dim])?;
        check_shape("v", &v, &[kv_heads, value_dim])?;
        check_shape("out", out, &[heads, value_dim])?;
        check_elements("q", &q)?;
        match self.mask.valid() {
            Some(valid) => {
                check_len("mask", 1, valid.len())?;
                self.check_elements()
            }
            None => {
                check_elements("k", &k)?;
                check_elements("v", &v)
            }
        }
    }

    /// What [`OutOfRange`] was: an element, or what a feature map made of those in range.
    pub(crate) fn out_of_range(&self) -> Error {
        self.check_elements().err().unwrap_or_else(not_finite)
    }

    /// Every element that is looked at is in range.
    pub(crate) fn check_elements(&self) -> Result<()> {
        check_all("q", &self.q, None)?;
        check_all("k", &self.k, self.mask.valid())?;
        check_all("v", &self.v, self.mask.valid())
    }
}

impl<'a, T> Qkv<'a, T> {
    /// The shares of the key-value heads and of their outputs `[h, n_q, e]`: all of the first
    /// sequence, then of the next one.
    pub(crate) fn heads<'o>(
        self,
        out: ArrayViewMut3<'o, T>,
    ) -> impl Iterator<Item = (HeadQkv<'a, T>, ArrayViewMut3<'o, T>)> + Send
    where
        T: Real,
    {
        let (kv_heads, group) = (self.k.shape()[0], self.q.shape()[0] / self.k.shape()[0]);
        let sequences = self.ranges().scan(Some(out), |rest, (queries, keys)| {
            let (own, later) = rest.take()?.split_at(Axis(1), queries.len());
            *rest = Some(later);
            Some((queries, keys, own))
        });
        sequences.flat_map(move |(queries, keys, out)| {
            let valid = self.mask.valid().map(|valid| &valid[keys.clone()]);
            let (k, v) = (of_tokens(self.k, keys.clone()), of_tokens(self.v, keys));
            let queries = of_tokens(self.q, queries);
            (0..kv_heads).scan(Some((queries, out)), move |rest, head| {
                let (queries, out) = rest.take()?;
                let (q, later_queries) = queries.split_at(Axis(0), group);
                let (own, later) = out.split_at(Axis(0), group);
                *rest = Some((later_queries, later));
                let [k, v] = [k, v].map(|array| array.index_axis_move(Axis(0), head));
                let qkv = HeadQkv { head, position: 0, q, k, v, valid };
                Some((qkv, own))
            })
        })
    }
}

/// Some tokens of all heads.
fn of_tokens<T>(mut array: ArrayView3<'_, T>, tokens: Range<usize>) -> ArrayView3<'_, T> {
    array.slice_axis_inplace(Axis(1), Slice::from(tokens));
    array
}

/// One key-value head of one sequence, with its group of query heads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadQkv<'a, T> {
    /// Which key-value head.
    pub(crate) head: usize,
    /// Position of the first token.
    pub(crate) position: usize,
    /// `[group, n_q, d]`
    pub(crate) q: ArrayView3<'a, T>,
    /// `[n_k, d]`
    pub(crate) k: ArrayView2<'a, T>,
    /// `[n_k, e]`
    pub(crate) v: ArrayView2<'a, T>,
    /// n_k entries.
    pub(crate) valid: Valid<'a>,
}

impl<'a, T: Real> HeadQkv<'a, T> {
    /// Some of the tokens' keys.
    pub(crate) fn key_rows(&self, tokens: Range<usize>) -> Rows<'a, T> {
        Rows { array: self.k, tokens, valid: self.valid }
    }

    /// Some of the tokens' values.
    pub(crate) fn value_rows(&self, tokens: Range<usize>) -> Rows<'a, T> {
        Rows { array: self.v, tokens, valid: self.valid }
    }

    /// Some of one query head's queries.
    pub(crate) fn query_rows(&self, h: usize, tokens: Range<usize>) -> Rows<'a, T> {
        Rows::all_valid(self.q.index_axis_move(Axis(0), h), tokens)
    }

    /// Whether token `j` may be attended to.
    pub(crate) fn is_valid(&self, j: usize) -> bool {
        self.valid.is_none_or(|valid| valid[j])
    }

    /// The query heads one by one, with their outputs.
    pub(crate) fn split_group<'o>(
        self,
        out: ArrayViewMut3<'o, T>,
    ) -> impl Iterator<Item = (Self, ArrayViewMut3<'o, T>)> + Send {
        (0..self.q.shape()[0]).scan(Some(out), move |rest, h| {
            let (out, later) = rest.take()?.split_at(Axis(0), 1);
            *rest = Some(later);
            Some((self.with_query_head(h), out))
        })
    }

    fn with_query_head(self, h: usize) -> Self {
        Self { q: self.q.slice_move(s![h..h + 1, .., ..]), ..self }
    }

    /// Whether some token of a block may be attended to.
    pub(crate) fn any_valid(&self, tokens: Range<usize>) -> bool {
        self.valid.is_none_or(|valid| valid[tokens].contains(&true))
    }

    /// Some of the tokens, of the first `group` query heads.
    pub(crate) fn segment(self, tokens: Range<usize>, group: usize) -> Self {
        Self {
            head: self.head,
            position: self.position + tokens.start,
            q: self.q.slice_move(s![..group, tokens.clone(), ..]),
            k: self.k.slice_move(s![tokens.clone(), ..]),
            v: self.v.slice_move(s![tokens.clone(), ..]),
            valid: self.valid.map(|valid| &valid[tokens]),
        }
    }

    /// Whether every query is in range, for those who have nothing to read.
    pub(crate) fn check_queries(&self, tokens: Range<usize>) -> Result<(), OutOfRange> {
        (0..self.q.shape()[0]).try_for_each(|h| self.query_rows(h, tokens.clone()).check())
    }
}

/// A feature map made no numbers of elements in range.
pub(crate) fn not_finite() -> Error {
    Error::Value { argument: "log-features of a map", expected: "finite", got: f64::NAN }
}

/// Offsets begin with 0, never fall, and end with the number of tokens.
pub(crate) fn check_offsets(
    argument: &'static str,
    offsets: &[usize],
    tokens: usize,
) -> Result<()> {
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
    Ok(())
}

/// As [`check_offsets`], for as many sequences as there are states.
pub(crate) fn check_offsets_of(states: usize, offsets: &[usize], tokens: usize) -> Result<()> {
    check_len("offsets", states + 1, offsets.len())?;
    check_offsets("offsets", offsets, tokens)
}

/// The tokens of each sequence.
pub(crate) fn ranges(offsets: &[usize]) -> impl Iterator<Item = Range<usize>> + Send {
    offsets.windows(2).map(|pair| pair[0]..pair[1])
}
