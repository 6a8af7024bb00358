//! What both layers have in common: hidden states → normed and rotated queries, keys and values →
//! (attention) → hidden states.

use std::ops::Range;
use std::sync::Arc;

use ndarray::{
    Array, Array1, Array2, Array3, ArrayRef1, ArrayRef2, ArrayView2, ArrayView3, ArrayViewMut2,
    ArrayViewMut3, Axis, Dimension, s,
};

use crate::Real;
use crate::check::{check_elements, check_len, check_room, check_same, check_shape};
use crate::error::{Error, Result};
use crate::layer::config::AttentionConfig;
use crate::layer::qk_norm::RmsNorm;
use crate::layer::rotary::{Angles, RotaryTable};
use crate::layer::weights::AttentionWeights;
use crate::low::aligned::Aligned;
use crate::simd::product;
use crate::threads::{for_each, max_threads};

/// Rows of one matrix product. Every product has exactly this many (the last one is padded), so
/// that a row's bits depend on that row alone: not on the number of tokens, and not on threads.
pub(super) const ROWS: usize = 64;

/// A checked config with its weights and its rotary table.
#[derive(Debug, Clone)]
pub(crate) struct QkvProj<T> {
    config: AttentionConfig,
    head_dim: usize,
    scale: f64,
    weights: Arc<AttentionWeights<T>>,
    rotary: Option<RotaryTable>,
    delta: Option<OutputDelta<T>>,
}

/// What has been added to the output projection.
#[derive(Debug, Clone)]
struct OutputDelta<T> {
    /// ΔW_o, `[D, h·d]`.
    delta: Arc<Array2<T>>,
    /// The weights without it.
    original: Arc<AttentionWeights<T>>,
}

/// Queries, keys and values of a sequence, rotated: `[n, h·d]`, `[n, h_kv·d]`, `[n, h_kv·d]`.
#[derive(Debug)]
pub(crate) struct ProjectedQkv<T> {
    pub(crate) q: Array2<T>,
    pub(crate) k: Array2<T>,
    pub(crate) v: Array2<T>,
}

/// Rows of several sequences, one after another: rows `offsets[i]..offsets[i + 1]` are those of a
/// sequence from position `starts[i]` on. Checked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Runs<'a> {
    pub(crate) offsets: &'a [usize],
    pub(crate) starts: &'a [usize],
}

/// What a step writes to besides its output. Contents are garbage before and after.
#[derive(Debug, Clone)]
pub(crate) struct StepScratch<T> {
    x: Array1<T>,
    y: Array1<T>,
    /// `[h, d]`
    pub(crate) q: Array2<T>,
    /// `[h_kv, d]`
    pub(crate) k: Array2<T>,
    /// `[h_kv, d]`
    pub(crate) v: Array2<T>,
    /// `[h, d]`
    pub(crate) o: Array2<T>,
    angles: Option<Angles<T>>,
}

impl<T> StepScratch<T> {
    /// Bytes held, but for a few angles.
    pub(crate) fn bytes(&self) -> usize {
        let Self { x, y, q, k, v, o, .. } = self;
        let elements = x.len() + y.len() + q.len() + k.len() + v.len() + o.len();
        elements * size_of::<T>()
    }
}

impl<T: Real> QkvProj<T> {
    pub(crate) fn new(config: AttentionConfig, weights: Arc<AttentionWeights<T>>) -> Result<Self> {
        let (config, head_dim) = config.resolved()?;
        weights.check(&config)?;
        let weights = if weights.is_standard() { weights } else { Arc::new(weights.to_standard()) };
        let rotary = config.rotary.as_ref().map(|rotary| RotaryTable::new(rotary, head_dim));
        let scale = config.scale.unwrap_or(1.0 / (head_dim as f64).sqrt());
        Ok(Self { config, head_dim, scale, weights, rotary, delta: None })
    }

    pub(crate) fn config(&self) -> &AttentionConfig {
        &self.config
    }

    /// Another hold of the rotary embedding, if there is one.
    pub(crate) fn with_rotary_hold(mut self, hold: Option<usize>) -> Result<Self> {
        if let Some(rotary) = &mut self.config.rotary {
            rotary.hold = hold;
            rotary.check(self.head_dim)?;
            self.rotary = Some(RotaryTable::new(rotary, self.head_dim));
        }
        Ok(self)
    }

    pub(crate) fn weights(&self) -> &Arc<AttentionWeights<T>> {
        &self.weights
    }

    /// The weights without an output delta.
    #[cfg(feature = "safetensors")]
    pub(crate) fn plain_weights(&self) -> &AttentionWeights<T> {
        self.delta.as_ref().map_or(&self.weights, |delta| &delta.original)
    }

    pub(crate) fn with_output_delta(self, delta: Array2<T>) -> Result<Self> {
        let plain = self.without_output_delta();
        let original = plain.weights.clone();
        check_shape("delta", &delta, original.o.shape())?;
        check_elements("delta", &delta)?;
        let o = (&original.o + &delta).as_standard_layout().into_owned();
        check_elements("o", &o)?;
        let weights = Arc::new(AttentionWeights { o, ..(*original).clone() });
        let delta = OutputDelta { delta: Arc::new(delta), original };
        Ok(Self { weights, delta: Some(delta), ..plain })
    }

    pub(crate) fn without_output_delta(mut self) -> Self {
        if let Some(delta) = self.delta.take() {
            self.weights = delta.original;
        }
        self
    }

    pub(crate) fn output_delta(&self) -> Option<&Array2<T>> {
        self.delta.as_ref().map(|delta| &*delta.delta)
    }

    pub(crate) fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// σ
    pub(crate) fn scale(&self) -> f64 {
        self.scale
    }

    /// The layer's outputs `[n, D]` from those of the heads, `[n, h·d]`.
    pub(crate) fn output(&self, o: &Array2<T>) -> Array2<T> {
        let mut y = Array2::zeros((o.nrows(), self.config.model_dim));
        apply(Runs { offsets: &[], starts: &[] }, o.view(), &mut [(self.out_proj(), &mut y)]);
        y
    }

    /// Queries, keys and values of one token at `position`, into `scratch`. Allocates nothing.
    pub(crate) fn project_token(
        &self,
        x: &ArrayRef1<T>,
        position: usize,
        scratch: &mut StepScratch<T>,
    ) -> Result<()> {
        check_len("x", self.config.model_dim, x.len())?;
        check_elements("x", x)?;
        self.check_scratch(scratch)?;
        let StepScratch { x: input, q, k, v, angles, .. } = scratch;
        input.assign(x);
        for (linear, rows) in
            [(self.q_proj(), &mut *q), (self.k_proj(), &mut *k), (self.v_proj(), &mut *v)]
        {
            let row = slice_mut(rows);
            matrix_vector(slice(linear.weight), slice(input), linear.bias, row);
            linear.finish(row, position, angles.as_mut());
        }
        Ok(())
    }

    /// The layer's output from those of the heads in `scratch`. Allocates nothing.
    pub(crate) fn output_token(&self, scratch: &mut StepScratch<T>, out: &mut ArrayRef1<T>) {
        let (weights, StepScratch { y, o, .. }) = (&*self.weights, scratch);
        matrix_vector(slice(&weights.o), slice(o), weights.o_bias.as_ref(), slice_mut(y));
        out.assign(y);
    }

    /// One token of each of several sequences, at `positions`: q `[b, h·d]`, k and v `[b, h_kv·d]`.
    /// Row i is what [`project_token`](Self::project_token) gives for it alone, bit for bit.
    pub(crate) fn project_tokens(
        &self,
        x: &ArrayRef2<T>,
        positions: &[usize],
    ) -> Result<ProjectedQkv<T>> {
        check_shape("x", x, &[positions.len(), self.config.model_dim])?;
        check_elements("x", x)?;
        let input = x.as_standard_layout();
        let mut angles = self.rotary.as_ref().map(RotaryTable::angles);
        let mut project = |linear: Linear<'_, T>| {
            let mut rows = matrix_vectors(linear.weight, input.view(), linear.bias);
            let width = linear.weight.nrows();
            for (row, &position) in slice_mut(&mut rows).chunks_exact_mut(width).zip(positions) {
                linear.finish(row, position, angles.as_mut());
            }
            rows
        };
        let (q, k, v) = (project(self.q_proj()), project(self.k_proj()), project(self.v_proj()));
        Ok(ProjectedQkv { q, k, v })
    }

    /// As [`output_token`](Self::output_token), for a row per token.
    pub(crate) fn output_tokens(&self, o: &Array2<T>) -> Array2<T> {
        matrix_vectors(&self.weights.o, o.view(), self.weights.o_bias.as_ref())
    }

    pub(crate) fn step_scratch(&self) -> StepScratch<T> {
        let (model, heads, kv_heads, d) =
            (self.config.model_dim, self.config.heads, self.config.kv_heads, self.head_dim);
        StepScratch {
            x: Array1::zeros(model),
            y: Array1::zeros(model),
            q: Array2::zeros((heads, d)),
            k: Array2::zeros((kv_heads, d)),
            v: Array2::zeros((kv_heads, d)),
            o: Array2::zeros((heads, d)),
            angles: self.rotary.as_ref().map(RotaryTable::angles),
        }
    }

    /// The scratch was made by a layer of this shape.
    pub(crate) fn check_scratch(&self, scratch: &StepScratch<T>) -> Result<()> {
        let rotated = scratch.angles.as_ref().map_or(0, Angles::dims);
        let pairs = [
            ("model dimension", self.config.model_dim, scratch.x.len()),
            ("number of query heads", self.config.heads, scratch.q.nrows()),
            ("number of key-value heads", self.config.kv_heads, scratch.k.nrows()),
            ("head dimension", self.head_dim, scratch.q.ncols()),
            (
                "number of rotated coordinates",
                self.rotary.as_ref().map_or(0, RotaryTable::dims),
                rotated,
            ),
        ];
        check_same("state", pairs)
    }

    /// x is a sequence of hidden states of this model: `[n ≥ 1, D]`, finite, and there is room for
    /// its projections.
    pub(crate) fn check_sequence(&self, argument: &'static str, x: &ArrayRef2<T>) -> Result<()> {
        check_shape(argument, x, &[x.nrows(), self.config.model_dim])?;
        if x.nrows() == 0 {
            return Err(Error::Empty { argument });
        }
        let Self { config, head_dim, .. } = self;
        let heads = 2 * (config.heads + config.kv_heads);
        check_room::<T>(
            "hidden states and what is made of them",
            &[x.nrows(), heads * head_dim + config.model_dim],
        )?;
        check_elements(argument, x)
    }

    /// The three projections of checked hidden states whose first row is at position `start`.
    pub(crate) fn project(&self, x: &ArrayRef2<T>, start: usize) -> ProjectedQkv<T> {
        self.project_packed(x, Runs { offsets: &[0, x.nrows()], starts: &[start] })
    }

    /// [`project`](Self::project) of several sequences at once.
    pub(crate) fn project_packed(&self, x: &ArrayRef2<T>, runs: Runs<'_>) -> ProjectedQkv<T> {
        let weights = &*self.weights;
        let zeros = |weight: &Array2<T>| Array2::zeros((x.nrows(), weight.nrows()));
        let mut projected =
            ProjectedQkv { q: zeros(&weights.q), k: zeros(&weights.k), v: zeros(&weights.v) };
        let x = x.as_standard_layout();
        let outputs = &mut [
            (self.q_proj(), &mut projected.q),
            (self.k_proj(), &mut projected.k),
            (self.v_proj(), &mut projected.v),
        ];
        apply(runs, x.view(), outputs);
        projected
    }

    /// The projections of checked hidden states that others query: k and v of
    /// [`project`](Self::project).
    pub(crate) fn project_keys(&self, x: &ArrayRef2<T>, start: usize) -> (Array2<T>, Array2<T>) {
        let (weights, x) = (&*self.weights, x.as_standard_layout());
        let zeros = |weight: &Array2<T>| Array2::zeros((x.nrows(), weight.nrows()));
        let (mut k, mut v) = (zeros(&weights.k), zeros(&weights.v));
        apply(
            Runs { offsets: &[0, x.nrows()], starts: &[start] },
            x.view(),
            &mut [(self.k_proj(), &mut k), (self.v_proj(), &mut v)],
        );
        (k, v)
    }

    /// Takes the gradients of normed queries and keys `[n, h·d]` of the sequence `x` back through
    /// the norms, and returns those of the norms' weights, `[d]` each. None without norms.
    pub(super) fn unnorm(
        &self,
        x: &ArrayRef2<T>,
        grad_q: &mut Array2<T>,
        grad_k: &mut Array2<T>,
    ) -> Option<(Array1<T>, Array1<T>)> {
        let x = x.as_standard_layout();
        let back = |linear: Linear<'_, T>, grad: &mut Array2<T>| {
            let (norm, mut raw) = (linear.norm?, Array2::zeros(grad.raw_dim()));
            let plain = Linear { norm: None, rotary: None, ..linear };
            apply(Runs { offsets: &[], starts: &[] }, x.view(), &mut [(plain, &mut raw)]);
            let mut grad_weight = vec![0.0; norm.weight.len()];
            norm.backward(slice(&raw), slice_mut(grad), &mut grad_weight);
            Some(grad_weight.into_iter().map(T::from_f64).collect())
        };
        Some((back(self.q_proj(), grad_q)?, back(self.k_proj(), grad_k)?))
    }

    fn q_proj(&self) -> Linear<'_, T> {
        let weights = &*self.weights;
        let (bias, norm) = (weights.q_bias.as_ref(), self.norm(&weights.q_norm));
        Linear { weight: &weights.q, bias, norm, rotary: self.rotary.as_ref() }
    }

    fn k_proj(&self) -> Linear<'_, T> {
        let weights = &*self.weights;
        let (bias, norm) = (weights.k_bias.as_ref(), self.norm(&weights.k_norm));
        Linear { weight: &weights.k, bias, norm, rotary: self.rotary.as_ref() }
    }

    fn v_proj(&self) -> Linear<'_, T> {
        let bias = self.weights.v_bias.as_ref();
        Linear { weight: &self.weights.v, bias, norm: None, rotary: None }
    }

    fn out_proj(&self) -> Linear<'_, T> {
        let bias = self.weights.o_bias.as_ref();
        Linear { weight: &self.weights.o, bias, norm: None, rotary: None }
    }

    /// The norm with these weights, if the layer has one.
    fn norm<'a>(&self, weight: &'a Option<Array1<T>>) -> Option<RmsNorm<'a, T>> {
        let weight = weight.as_ref()?.as_slice()?;
        Some(RmsNorm { weight, epsilon: self.config.qk_norm? })
    }

    /// The transpose of the rotary embedding of a whole sequence, on rows `[n, h·d]`.
    pub(crate) fn unrotate(&self, rows: &mut Array2<T>) {
        let width = rows.ncols();
        if let Some(rotary) = &self.rotary {
            rotary.unrotate(slice_mut(rows), width, 0);
        }
    }

    /// `[n, h·d]` seen as `[h, n, d]`.
    pub(crate) fn heads<'a>(&self, rows: &'a Array2<T>) -> ArrayView3<'a, T> {
        let (n, width) = rows.dim();
        match rows.view().into_shape_with_order((n, width / self.head_dim, self.head_dim)) {
            Ok(heads) => heads.permuted_axes([1, 0, 2]),
            Err(_) => unreachable!("projections lie row after row"),
        }
    }

    /// As [`heads`](Self::heads), without a copy.
    pub(crate) fn owned_heads(&self, rows: Array2<T>) -> Array3<T> {
        let (n, width) = rows.dim();
        match rows.into_shape_with_order((n, width / self.head_dim, self.head_dim)) {
            Ok(heads) => heads.permuted_axes([1, 0, 2]),
            Err(_) => unreachable!("projections lie row after row"),
        }
    }

    /// As [`heads`](Self::heads).
    pub(crate) fn heads_mut<'a>(&self, rows: &'a mut Array2<T>) -> ArrayViewMut3<'a, T> {
        let (n, width) = rows.dim();
        match rows.view_mut().into_shape_with_order((n, width / self.head_dim, self.head_dim)) {
            Ok(heads) => heads.permuted_axes([1, 0, 2]),
            Err(_) => unreachable!("projections lie row after row"),
        }
    }
}

/// y = x Wᵀ + b, then normed and rotated.
#[derive(Clone, Copy)]
struct Linear<'a, T> {
    weight: &'a Array2<T>,
    bias: Option<&'a Array1<T>>,
    norm: Option<RmsNorm<'a, T>>,
    rotary: Option<&'a RotaryTable>,
}

impl<T: Real> Linear<'_, T> {
    /// Norms and rotates one row, of the token at `position`.
    fn finish(&self, row: &mut [T], position: usize, angles: Option<&mut Angles<T>>) {
        if let Some(norm) = self.norm {
            norm.apply(row);
        }
        if let (Some(rotary), Some(angles)) = (self.rotary, angles) {
            rotary.rotate(row, row.len(), position, angles);
        }
    }

    /// At most [`ROWS`] of the rows of `runs`, the first of them being row `first`.
    fn block(
        &self,
        runs: Runs<'_>,
        first: usize,
        x: ArrayView2<'_, T>,
        mut y: ArrayViewMut2<'_, T>,
    ) {
        let n = x.nrows();
        if n == ROWS {
            product(x, self.weight.t(), y.view_mut(), false);
        } else {
            let (mut padded_x, mut padded_y) =
                (Array2::zeros((ROWS, x.ncols())), Array2::zeros((ROWS, y.ncols())));
            padded_x.slice_mut(s![..n, ..]).assign(&x);
            product(padded_x.view(), self.weight.t(), padded_y.view_mut(), false);
            y.assign(&padded_y.slice(s![..n, ..]));
        }
        if let Some(bias) = self.bias {
            y += bias;
        }
        if let (Some(norm), Some(rows)) = (self.norm, y.as_slice_mut()) {
            norm.apply(rows);
        }
        if let (Some(rotary), width, Some(rows)) = (self.rotary, y.ncols(), y.as_slice_mut()) {
            let mut angles = rotary.angles();
            for (own, position) in runs.within(first..first + n) {
                rotary.rotate(
                    &mut rows[own.start * width..own.end * width],
                    width,
                    position,
                    &mut angles,
                );
            }
        }
    }
}

impl Runs<'_> {
    /// The sequences of these rows: which of `rows` are theirs, counted from the first one, and its
    /// position.
    fn within(&self, rows: Range<usize>) -> impl Iterator<Item = (Range<usize>, usize)> {
        let skipped =
            self.offsets.partition_point(|&offset| offset <= rows.start).saturating_sub(1);
        let runs = self.offsets.windows(2).zip(self.starts).skip(skipped);
        runs.take_while(move |(pair, _)| pair[0] < rows.end).map(move |(pair, start)| {
            let (first, end) = (pair[0].max(rows.start), pair[1].clamp(rows.start, rows.end));
            (first - rows.start..end.max(first) - rows.start, start + first - pair[0])
        })
    }
}

/// Applies every linear map to `x` (rows one after another), on all threads.
fn apply<T: Real>(
    runs: Runs<'_>,
    x: ArrayView2<'_, T>,
    outputs: &mut [(Linear<'_, T>, &mut Array2<T>)],
) {
    let blocks: Vec<_> = outputs
        .iter_mut()
        .flat_map(|(linear, y)| {
            let pairs =
                x.axis_chunks_iter(Axis(0), ROWS).zip(y.axis_chunks_iter_mut(Axis(0), ROWS));
            pairs.enumerate().map(|(i, (x, y))| (&*linear, i * ROWS, x, y))
        })
        .collect();
    let mut threads = vec![(); max_threads().min(blocks.len())];
    for_each(&mut threads, blocks.into_iter(), |(), (linear, first, x, y)| {
        linear.block(runs, first, x, y)
    });
}

/// y = W x + b for W `[out, in]`, row after row. Allocates nothing.
fn matrix_vector<T: Real>(weight: &[T], x: &[T], bias: Option<&Array1<T>>, y: &mut [T]) {
    match bias {
        Some(bias) => y.iter_mut().zip(bias).for_each(|(y, &b)| *y = b),
        None => y.fill(T::zero()),
    }
    (T::ops().matvec)(weight, x.len(), x, y);
}

/// [`matrix_vector`] of every row of `x`, `[b, in]` to `[b, out]`; W is read once, and `x` so often
/// that a copy at a cache line pays.
fn matrix_vectors<T: Real>(
    weight: &Array2<T>,
    x: ArrayView2<'_, T>,
    bias: Option<&Array1<T>>,
) -> Array2<T> {
    let mut out = Array2::zeros((x.nrows(), weight.nrows()));
    let x = Aligned::from(x.as_standard_layout().as_slice().unwrap_or_default());
    if let Some(bias) = bias {
        out += bias;
    }
    (T::ops().matvec)(slice(weight), weight.ncols(), &x, slice_mut(&mut out));
    out
}

fn slice<T, D: Dimension>(array: &Array<T, D>) -> &[T] {
    array.as_slice().unwrap_or_else(|| unreachable!("laid out row after row by the constructors"))
}

fn slice_mut<T, D: Dimension>(array: &mut Array<T, D>) -> &mut [T] {
    array
        .as_slice_mut()
        .unwrap_or_else(|| unreachable!("laid out row after row by the constructors"))
}
