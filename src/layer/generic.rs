//! [`Layer`]: projections around an attention operator.

use std::sync::Arc;

use ndarray::{Array2, Array3, ArrayRef1, ArrayRef2, ArrayRef3, Axis};

use crate::Real;
use crate::attention::{
    KeyMask, Operator, Qkv, SequenceState, Workspace, check_offsets, check_offsets_of,
};
use crate::check::{check_elements, check_len, check_shape};
use crate::error::{Error, Result};
use crate::layer::Attention;
use crate::layer::config::AttentionConfig;
use crate::layer::qkv_proj::{ProjectedQkv, QkvProj, Runs, StepScratch};
use crate::layer::weights::AttentionWeights;
use crate::threads::{max_threads, try_each};

/// An attention layer: projections, rotary embedding and grouped queries around the attention
/// operator `A`.
///
/// [`SoftmaxAttention`](crate::layer::SoftmaxAttention) and
/// [`DijiangAttention`](crate::layer::DijiangAttention) are layers around one operator each.
#[derive(Debug, Clone)]
pub struct Layer<T, A> {
    pub(crate) proj: QkvProj<T>,
    pub(crate) attention: A,
}

/// What one sequence leaves behind for its next tokens, with the scratch memory of a step.
#[derive(Debug, Clone)]
pub struct LayerState<T, S> {
    pub(crate) attention: S,
    pub(crate) workspace: Workspace<T>,
    scratch: StepScratch<T>,
}

/// Equal attention states; the scratch memory means nothing.
impl<T, S: PartialEq> PartialEq for LayerState<T, S> {
    fn eq(&self, other: &Self) -> bool {
        self.attention == other.attention
    }
}

impl<T: Real, S: SequenceState> LayerState<T, S> {
    /// Position of the next token: but for segments that begin later, the number of tokens seen so
    /// far, masked ones included.
    pub fn position(&self) -> usize {
        self.attention.position()
    }

    /// The attention's state, without the scratch memory: what is worth keeping.
    pub fn attention(&self) -> &S {
        &self.attention
    }

    /// Bytes of state. The scratch memory beside it does not grow and is not counted.
    pub fn bytes(&self) -> usize {
        self.attention.bytes()
    }

    /// Bytes of state and scratch memory.
    pub(crate) fn bytes_with_scratch(&self) -> usize {
        self.bytes() + self.workspace.bytes() + self.scratch.bytes()
    }

    /// Back to the empty state, without allocating.
    pub fn reset(&mut self) {
        self.attention.reset();
    }
}

impl<T: Real, A: Operator<T>> Layer<T, A> {
    /// The projection weights.
    pub fn weights(&self) -> &Arc<AttentionWeights<T>> {
        self.proj.weights()
    }

    /// The attention between the projections.
    pub fn operator(&self) -> &A {
        &self.attention
    }

    /// The layer with another [hold](crate::layer::Rotary::hold) of its rotary embedding; one
    /// without rotary embedding stays as it is. States made before belong to another layer then.
    ///
    /// # Errors
    /// [`Error::Value`] for a hold of 0.
    pub fn with_rotary_hold(self, hold: impl Into<Option<usize>>) -> Result<Self> {
        Ok(Self { proj: self.proj.with_rotary_hold(hold.into())?, ..self })
    }

    /// Queries, keys and values of the tokens `x`, the first of them at `position`: normed and
    /// rotated, what [`operator`](Self::operator) is given. With [`output`](Self::output), for
    /// those who run the attention themselves.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`; returns `[h, n, d]`, `[h_kv, n, d]` and `[h_kv, n, d]`.
    ///
    /// # Errors
    /// As [`forward`](Attention::forward) for `x`.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{KeyMask, Operator, Qkv};
    /// use dijiang::layer::{
    ///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    ///     SoftmaxAttention,
    /// };
    /// use ndarray::Array2;
    ///
    /// let eye = || Array2::<f32>::eye(8);
    /// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    ///
    /// let x = Array2::from_shape_fn((200, 8), |(i, j)| ((i * 3 + j) % 7) as f32 - 3.0);
    /// let [q, k, v] = layer.project_at(&x, 0)?;
    /// let heads = layer.operator().forward(Qkv::new(&q, &k, &v))?;
    /// assert_eq!(layer.output(&heads)?, layer.forward(&x, KeyMask::All)?);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn project_at(&self, x: &ArrayRef2<T>, position: usize) -> Result<[Array3<T>; 3]> {
        self.proj.check_sequence("x", x)?;
        let ProjectedQkv { q, k, v } = self.proj.project(x, position);
        for (argument, rows) in [("q", &q), ("k", &k), ("v", &v)] {
            check_elements(argument, rows)?;
        }
        Ok([q, k, v].map(|rows| self.proj.owned_heads(rows)))
    }

    /// The layer's outputs from those of the heads.
    ///
    /// # Shapes
    /// - `heads`: `[h, n, d]`; returns `[n, D]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for `heads` of another shape.
    pub fn output(&self, heads: &ArrayRef3<T>) -> Result<Array2<T>> {
        let (h, n, d) = (self.config().heads, heads.shape()[1], self.proj.head_dim());
        check_shape("heads", heads, &[h, n, d])?;
        let mut rows = Array2::zeros((n, h * d));
        self.proj.heads_mut(&mut rows).assign(heads);
        Ok(self.proj.output(&rows))
    }

    /// Hidden states of one or, by `offsets`, several sequences that go on from `states`, or are
    /// whole.
    fn run(
        &self,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
        offsets: Option<&[usize]>,
        states: Option<&mut [&mut A::State]>,
    ) -> Result<Array2<T>> {
        self.proj.check_sequence("x", x)?;
        if let KeyMask::Valid(valid) = mask {
            check_len("mask", x.nrows(), valid.len())?;
        }
        let whole = [0, x.nrows()];
        let runs = offsets.unwrap_or(&whole);
        let starts = match &states {
            Some(states) => states.iter().map(|state| state.position()).collect(),
            None => vec![0; runs.len() - 1],
        };
        let projected = self.proj.project_packed(x, Runs { offsets: runs, starts: &starts });
        let ProjectedQkv { q, k, v } = &projected;
        let (q, k, v) = (self.proj.heads(q), self.proj.heads(k), self.proj.heads(v));
        let mut qkv = Qkv::new(&q, &k, &v).with_mask(mask);
        if let Some(offsets) = offsets {
            qkv = qkv.with_offsets(offsets);
        }
        let mut o = Array2::zeros(projected.q.raw_dim());
        let (mut out, mut workspace) = (self.proj.heads_mut(&mut o), self.attention.workspace());
        match states {
            Some(states) => self.attention.prefill_into(states, qkv, &mut out, &mut workspace)?,
            None => self.attention.forward_into(qkv, &mut out, &mut workspace)?,
        }
        drop(projected);
        Ok(self.proj.output(&o))
    }

    /// Whether a state is one of a layer of this shape, its query heads among it.
    fn check_state(&self, state: &LayerState<T, A::State>) -> Result<()> {
        self.attention.check_state(&state.attention)?;
        self.proj.check_scratch(&state.scratch)
    }

    /// The layer's state with this state of its attention, put aside by
    /// [`LayerState::attention`].
    pub(crate) fn state_of(&self, attention: A::State) -> LayerState<T, A::State> {
        let workspace = self.attention.step_workspace();
        LayerState { attention, workspace, scratch: self.proj.step_scratch() }
    }

    /// The next token of each of several sequences: what [`step`](Attention::step) gives for each
    /// alone, bit for bit, but every weight is read once for all of them.
    ///
    /// # Shapes
    /// - `states`: b of them; `x` and `out`: `[b, D]`, a row per state.
    ///
    /// # Cost
    /// The matrix products of b tokens by the projections, one thread; attention of the sequences
    /// on all threads. Allocates for the batch.
    ///
    /// # Errors
    /// As [`step`](Attention::step), for any of the tokens and states. After an error no state is
    /// changed, nor `out`.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::KeyMask;
    /// use dijiang::layer::{
    ///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    ///     SoftmaxAttention,
    /// };
    /// use ndarray::Array2;
    ///
    /// let eye = || Array2::<f32>::eye(8);
    /// let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
    /// let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    ///
    /// // Two sequences of different lengths go on together.
    /// let mut states = [layer.new_state(), layer.new_state()];
    /// layer.prefill(&mut states[1], &Array2::ones((5, 8)), KeyMask::All)?;
    /// let (x, mut out) = (Array2::ones((2, 8)), Array2::zeros((2, 8)));
    /// layer.step_batch(&mut states.each_mut(), &x, &mut out)?;
    /// assert_eq!((states[0].position(), states[1].position()), (1, 6));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn step_batch(
        &self,
        states: &mut [&mut LayerState<T, A::State>],
        x: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
    ) -> Result<()> {
        if states.is_empty() {
            return Err(Error::Empty { argument: "states" });
        }
        states.iter().try_for_each(|state| self.check_state(state))?;
        check_shape("out", out, &[states.len(), self.config().model_dim])?;
        let positions: Vec<usize> = states.iter().map(|state| state.position()).collect();
        let ProjectedQkv { q, k, v } = self.proj.project_tokens(x, &positions)?;
        for (argument, rows) in [("q", &q), ("k", &k), ("v", &v)] {
            check_elements(argument, rows)?;
        }
        let mut o = Array2::zeros(q.raw_dim());
        let [q, k, v] = [&q, &k, &v].map(|rows| self.proj.heads(rows));
        let mut heads = self.proj.heads_mut(&mut o);
        let keys = k.axis_iter(Axis(1)).zip(v.axis_iter(Axis(1)));
        let tokens = q.axis_iter(Axis(1)).zip(keys).zip(heads.axis_iter_mut(Axis(1)));
        let threads = &mut vec![(); max_threads().min(states.len())];
        try_each(threads, states.iter_mut().zip(tokens), |(), (state, token)| {
            let ((q, (k, v)), mut out) = token;
            let LayerState { attention, workspace, .. } = &mut **state;
            self.attention.step(attention, Qkv::token(&q, &k, &v), &mut out, workspace)
        })?;
        out.assign(&self.proj.output_tokens(&o));
        Ok(())
    }
}

impl<T: Real, A: Operator<T>> Attention<T> for Layer<T, A> {
    type State = LayerState<T, A::State>;

    fn config(&self) -> &AttentionConfig {
        self.proj.config()
    }

    fn new_state(&self) -> Self::State {
        self.state_of(self.attention.new_state())
    }

    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> Result<Array2<T>> {
        self.run(x, mask, None, None)
    }

    fn prefill(
        &self,
        state: &mut Self::State,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        self.check_state(state)?;
        self.run(x, mask, None, Some(&mut [&mut state.attention]))
    }

    fn forward_packed(
        &self,
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets("offsets", offsets, x.nrows())?;
        self.run(x, mask, Some(offsets), None)
    }

    fn prefill_packed(
        &self,
        states: &mut [&mut Self::State],
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets_of(states.len(), offsets, x.nrows())?;
        states.iter().try_for_each(|state| self.check_state(state))?;
        let mut states: Vec<_> = states.iter_mut().map(|state| &mut state.attention).collect();
        self.run(x, mask, Some(offsets), Some(&mut states))
    }

    /// As [`Attention::step`]. Linear attention never allocates; a key-value cache grows now and
    /// then.
    fn step(
        &self,
        state: &mut Self::State,
        x: &ArrayRef1<T>,
        out: &mut ArrayRef1<T>,
    ) -> Result<()> {
        let LayerState { attention, workspace, scratch } = state;
        check_len("out", self.config().model_dim, out.len())?;
        self.proj.project_token(x, attention.position(), scratch)?;
        let StepScratch { q, k, v, o, .. } = &mut *scratch;
        self.attention.step(attention, Qkv::token(q, k, v), o, workspace)?;
        self.proj.output_token(scratch, out);
        Ok(())
    }
}
