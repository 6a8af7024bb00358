//! The backward pass of [`LinearAttention`]: gradients with respect to queries, keys, values, the
//! maps' parameters, decay and the state a sequence starts from.
//!
//! The equations are in the engine, `tape.rs`.

mod buffers;
mod far;
mod forward;
mod pass;
mod reverse;
mod tape;
mod window_keys;

use ndarray::{
    Array1, Array2, Array3, ArrayRef3, ArrayView1, ArrayView2, ArrayView3, ArrayViewMut2, Axis,
    concatenate, s,
};

use crate::Real;
use crate::attention::KeyMask;
use crate::attention::linear::LinearAttention;
use crate::attention::linear::state::{CausalState, HeadState};
use crate::attention::qkv::{HeadQkv, Qkv, not_finite};
use crate::attention::rows::{OutOfRange, Rows, put_row};
use crate::attention::scratch::Sizes;
use crate::check::{check_elements, check_len, check_room, check_shape};
use crate::error::{Error, Result};
use crate::kernel::DifferentiableMap;
use crate::low::simd::padded;
use crate::threads::{max_threads, try_each};

pub(crate) use far::FarPart;
use pass::{GradientSinks, InputGradients, OutputGradient, Pass};
pub(crate) use tape::Tape;

/// The gradients of a scalar with respect to everything linear attention is computed from.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct AttentionGradients<T, G> {
    /// Of the queries, `[h, n_q, d]`.
    pub q: Array3<T>,
    /// Of the keys, `[h_kv, n_k, d]`; zeros for masked ones.
    pub k: Array3<T>,
    /// Of the values, `[h_kv, n_k, e]`; zeros for masked ones.
    pub v: Array3<T>,
    /// Of every map's parameters.
    pub maps: Vec<G>,
    /// Of log γ of every map.
    pub log_decay: Vec<f64>,
}

/// The gradients with respect to one key-value head of the [`CausalState`] that a sequence was
/// continued from.
///
/// They are taken in the state's own frame, that is with respect to the numbers it holds, its
/// reference exponents being constants. Of a state that has not seen a key S and z are zeros, which
/// no reference exponent gives a scale to: there `sums` and `norm` are zeros.
#[derive(Debug, Clone, PartialEq)]
pub struct StateGradients<T> {
    /// Of the sums S, `[m, e]`.
    pub sums: Array2<T>,
    /// Of the normaliser z, `[m]`.
    pub norm: Array1<T>,
    /// The state's reference exponent c, `[m]`, and the position that decay is counted from there.
    /// `None` of a state that has not seen a key.
    pub frame: Option<(Array1<T>, usize)>,
    /// Positions of the tokens that the state remembers as they are: sinks that have left the
    /// window, kept keys in order, then the window's tokens, the last one being the token before
    /// the first query. Without a local window no tokens.
    pub positions: Vec<usize>,
    /// Of their keys, `[tokens, d]`.
    pub keys: Array2<T>,
    /// Of their values, `[tokens, e]`.
    pub values: Array2<T>,
}

/// Memory for the backward passes of one attention operator.
///
/// It holds 2·n numbers a query head and thread for the longest sequence it was used for, m for
/// every frame of the sums (with decay λ a new one about every 20/|λ| tokens in f32), and O(n·(d +
/// e)) with a local window. Its contents mean nothing before or after a call. Make it once by
/// [`backward_workspace`](LinearAttention::backward_workspace) and use it for every call.
#[derive(Debug, Clone)]
pub struct BackwardWorkspace<T> {
    sizes: Sizes,
    tapes: Vec<Option<Tape<T>>>,
}

/// One head's gradients but for those of its inputs.
struct HeadGradients<T, G> {
    map: G,
    log_decay: f64,
    /// If the sequence was continued from one.
    state: Option<StateGradients<T>>,
}

impl<T: Real, M: DifferentiableMap<T>> LinearAttention<T, M> {
    /// Gradients of a scalar through [`forward`](crate::attention::Operator::forward), from its
    /// gradient with respect to the output.
    ///
    /// # Shapes
    /// - `qkv` as for [`forward`](crate::attention::Operator::forward), one sequence; `grad_out`:
    ///   `[h, n_q, e]`.
    ///
    /// # Cost
    /// O(n) time: about 3 times that of the forward pass, which is computed again on the way.
    /// Besides the results it allocates what a [`BackwardWorkspace`] holds. Heads in parallel; the
    /// same bits on any number of threads.
    ///
    /// # Errors
    /// As [`forward`](crate::attention::Operator::forward), `grad_out` being checked like the other
    /// arguments, [`Error::Conflict`] for several sequences, and [`Error::TooLarge`] for gradients
    /// there is no room for.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{LinearConfig, Qkv};
    /// use dijiang::kernel::DctMapConfig;
    /// use ndarray::{Array, Array3};
    ///
    /// let attention = LinearConfig::new().build(vec![DctMapConfig::new().build::<f64>(8)?])?;
    /// let element = |(_, i, j)| ((3 * i + 5 * j) % 7) as f64 / 7.0;
    /// let q: Array3<f64> = Array::from_shape_fn((1, 50, 8), element);
    /// let v = q.mapv(|x| x - 0.5);
    /// // The loss is the sum of all outputs. Adding 1 to every value adds 1 to every output.
    /// let grad_out = Array3::ones((1, 50, 8));
    /// let gradients = attention.backward(Qkv::new(&q, &q, &v), &grad_out)?;
    /// assert!((gradients.v.sum() - 50.0 * 8.0).abs() < 1e-9);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn backward(
        &self,
        qkv: Qkv<'_, T>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<AttentionGradients<T, M::Gradients>> {
        self.check_backward(qkv, grad_out)?;
        let mut gradients = self.new_gradients(qkv.queries(), qkv.keys())?;
        self.run_backward(None, qkv, grad_out, &mut gradients, &mut self.backward_workspace())?;
        Ok(gradients)
    }

    /// [`backward`](Self::backward) into `gradients`, all of which it overwrites. For a loop of
    /// training: at a few thousand tokens memory that is used again saves a quarter of the time.
    /// The gradients of maps and decay are allocated anew, m·d numbers or fewer per head.
    ///
    /// # Shapes
    /// - as for [`backward`](Self::backward); `gradients`: [`new_gradients`](Self::new_gradients)
    ///   of n_q queries and n_k keys.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), with [`Error::Shape`] for gradients of other shapes and
    /// [`Error::Foreign`] for a workspace of another operator's shape. After [`Error::NonFinite`],
    /// and [`Error::Value`] for a map, the contents of `gradients` mean nothing.
    pub fn backward_into(
        &self,
        qkv: Qkv<'_, T>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        workspace: &mut BackwardWorkspace<T>,
    ) -> Result<()> {
        self.check_backward(qkv, grad_out)?;
        check_shape("gradients.q", &gradients.q, qkv.q.shape())?;
        check_shape("gradients.k", &gradients.k, qkv.k.shape())?;
        check_shape("gradients.v", &gradients.v, qkv.v.shape())?;
        self.sizes().check_workspace(workspace.sizes)?;
        self.run_backward(None, qkv, grad_out, gradients, workspace).map(drop)
    }

    /// Gradients through [`prefill`](crate::attention::Operator::prefill), and those with respect
    /// to the state it starts from, one per key-value head. `state` is the state *before* the
    /// prefill.
    ///
    /// `after` are the gradients with respect to the state *after* it, if somebody goes on from
    /// there: what this function returns for the next tokens. They may leave out tokens.
    ///
    /// # Shapes
    /// - as for [`backward`](Self::backward).
    ///
    /// # Errors
    /// As [`backward`](Self::backward) and [`prefill`](crate::attention::Operator::prefill);
    /// [`Error::Shape`], [`Error::Length`] and [`Error::NonFinite`] for gradients `after` of
    /// another shape or not in range, [`Error::Value`] for tokens in them that are not those of the
    /// state after.
    pub fn prefill_backward(
        &self,
        state: &CausalState<T>,
        qkv: Qkv<'_, T>,
        grad_out: &ArrayRef3<T>,
        after: Option<&[StateGradients<T>]>,
    ) -> Result<(AttentionGradients<T, M::Gradients>, Vec<StateGradients<T>>)> {
        self.causality().check_causal("prefill_backward")?;
        state.check(self.shape())?;
        self.check_backward(qkv, grad_out)?;
        if let Some(after) = after {
            self.check_after(state, qkv.keys(), after)?;
        }
        let mut gradients = self.new_gradients(qkv.queries(), qkv.keys())?;
        let (mut workspace, ends) = (self.backward_workspace(), Some((state, after)));
        let states = self.run_backward(ends, qkv, grad_out, &mut gradients, &mut workspace)?;
        Ok((gradients, states))
    }

    /// Gradients through [`extend`](crate::attention::Operator::extend), of the keys' later readers
    /// alone: what [`prefill_backward`](Self::prefill_backward) gives with `after` is the sum of
    /// this and of what it gives without. So a segment's own outputs can be dealt with before its
    /// later readers are known, as sequence parallelism does. `q` is empty in the result.
    ///
    /// # Shapes
    /// - `kv`: keys `[h_kv, n, d]` and values `[h_kv, n, e]`.
    ///
    /// # Cost
    /// The keys' part of the backward pass, less than half of it.
    ///
    /// # Errors
    /// As [`prefill_backward`](Self::prefill_backward).
    pub fn extend_backward(
        &self,
        state: &CausalState<T>,
        (k, v): (&ArrayRef3<T>, &ArrayRef3<T>),
        mask: KeyMask<'_>,
        after: &[StateGradients<T>],
    ) -> Result<(AttentionGradients<T, M::Gradients>, Vec<StateGradients<T>>)> {
        self.causality().check_causal("extend_backward")?;
        state.check(self.shape())?;
        let n = k.shape()[1];
        let (q, grad_out) = self.dims().nobody(n);
        let qkv = Qkv::new(&q, k, v).with_mask(mask);
        qkv.check_keys(self.dims(), n)?;
        self.check_after(state, n, after)?;
        let mut gradients = self.new_gradients(0, n)?;
        gradients.q = Array3::zeros((0, n, self.sizes().dim));
        let (mut workspace, ends) = (self.backward_workspace(), Some((state, Some(after))));
        let states = self.run_backward(ends, qkv, &grad_out, &mut gradients, &mut workspace)?;
        Ok((gradients, states))
    }

    /// Zeros, for [`backward_into`](Self::backward_into) to overwrite: those of `queries` queries
    /// and `keys` keys. Map gradients are empty until then.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more memory than there can be.
    pub fn new_gradients(
        &self,
        queries: usize,
        keys: usize,
    ) -> Result<AttentionGradients<T, M::Gradients>> {
        let (kv_heads, Sizes { dim, value_dim, .. }) = (self.maps().len(), self.sizes());
        check_room::<T>(
            "gradients",
            &[self.heads() + 2 * kv_heads, queries.max(keys), dim + value_dim],
        )?;
        Ok(AttentionGradients {
            q: Array3::zeros((self.heads(), queries, dim)),
            k: Array3::zeros((kv_heads, keys, dim)),
            v: Array3::zeros((kv_heads, keys, value_dim)),
            maps: Vec::new(),
            log_decay: Vec::new(),
        })
    }

    /// Zeros: the gradients with respect to a state that nobody reads.
    ///
    /// # Errors
    /// [`Error::Foreign`] for a state of another operator, [`Error::Poisoned`] for one that was
    /// left half changed.
    pub fn new_state_gradients(&self, state: &CausalState<T>) -> Result<Vec<StateGradients<T>>> {
        state.check(self.shape())?;
        let heads = state.heads.iter();
        Ok(heads.map(|head| StateGradients::zeros(head, state.position, self.sizes())).collect())
    }

    /// Memory for the backward passes, empty: it grows to what the longest of them needs.
    pub fn backward_workspace(&self) -> BackwardWorkspace<T> {
        BackwardWorkspace { sizes: self.sizes(), tapes: Vec::new() }
    }

    /// Whether everything has the shape it should; elements are looked at head by head, while they
    /// are in the cache.
    fn check_backward(&self, qkv: Qkv<'_, T>, grad_out: &ArrayRef3<T>) -> Result<()> {
        if qkv.is_packed() {
            return Err(Error::Conflict { argument: "offsets", other: "the backward pass" });
        }
        let shape = [self.heads(), qkv.queries(), self.sizes().value_dim];
        check_shape("grad_out", grad_out, &shape)?;
        qkv.check(self.dims(), grad_out)
    }

    /// Whether `after` can be the gradients with respect to the state `n` tokens after `state`.
    fn check_after(
        &self,
        state: &CausalState<T>,
        n: usize,
        after: &[StateGradients<T>],
    ) -> Result<()> {
        check_len("after", self.maps().len(), after.len())?;
        let Sizes { dim, features, value_dim, .. } = self.sizes();
        let end = state.position + n;
        for (after, head) in after.iter().zip(&state.heads) {
            let tokens = after.positions.len();
            after.check_sums("after", (features, value_dim))?;
            check_shape("after.keys", &after.keys, &[tokens, dim])?;
            check_shape("after.values", &after.values, &[tokens, value_dim])?;
            check_elements("after.sums", &after.sums)?;
            check_elements("after.norm", &after.norm)?;
            check_elements("after.keys", &after.keys)?;
            check_elements("after.values", &after.values)?;
            if let Some((reference, _)) = &after.frame {
                check_elements("after.frame", reference)?;
            }
            let earlier = head.remembered(state.position);
            let known =
                |&&at: &&usize| earlier.contains(&at) || (state.position..end).contains(&at);
            if let Some(&at) = after.positions.iter().find(|at| !known(at)) {
                return Err(Error::Value {
                    argument: "after.positions",
                    expected: "tokens that the state after remembers",
                    got: at as f64,
                });
            }
        }
        Ok(())
    }

    /// `ends` are the state before, and the gradients with respect to the one after.
    fn run_backward(
        &self,
        ends: Option<(&CausalState<T>, Option<&[StateGradients<T>]>)>,
        qkv: Qkv<'_, T>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        workspace: &mut BackwardWorkspace<T>,
    ) -> Result<Vec<StateGradients<T>>> {
        let (kv_heads, group) = (self.maps().len(), qkv.q.shape()[0] / self.maps().len());
        let mut results: Vec<Option<HeadGradients<T, M::Gradients>>> =
            (0..kv_heads).map(|_| None).collect();
        let threads = max_threads().min(kv_heads);
        if workspace.tapes.len() < threads {
            workspace.tapes.resize(threads, None);
        }
        let AttentionGradients { q, k, v, .. } = &mut *gradients;
        let sinks = k.outer_iter_mut().zip(v.outer_iter_mut()).zip(&mut results);
        let of_group = |h: usize| grad_out.slice(s![h * group..(h + 1) * group, .., ..]);
        let inputs = qkv.heads(q.view_mut()).zip((0..kv_heads).map(of_group));
        let items = inputs.zip(sinks);
        let result = try_each(&mut workspace.tapes, items, |tape, (inputs, sinks)| {
            let (((qkv, q), grad_out), ((k, v), result)) = (inputs, sinks);
            check_head(&qkv, grad_out)?;
            let tape = tape
                .get_or_insert_with(|| Tape::new(&self.maps()[qkv.head], self.sizes().value_dim));
            let position = ends.map_or(0, |(state, _)| state.position);
            let ends = ends.map(|(state, after)| {
                (&state.heads[qkv.head], after.map(|after| &after[qkv.head]))
            });
            let qkv = HeadQkv { position, ..qkv };
            *result =
                Some(self.head_backward(ends, qkv, grad_out, InputGradients { q, k, v }, tape));
            if tape.finite { Ok(()) } else { Err(OutOfRange) }
        });
        if let Err(OutOfRange) = result {
            qkv.check_elements()?;
            check_elements("grad_out", grad_out)?;
            return Err(not_finite());
        }
        gradients.maps.clear();
        gradients.log_decay.clear();
        let mut states = Vec::with_capacity(kv_heads);
        for result in results.into_iter().flatten() {
            gradients.maps.push(result.map);
            gradients.log_decay.push(result.log_decay);
            states.extend(result.state);
        }
        Ok(states)
    }

    /// One head's gradients; `qkv` is at the position of its first token.
    fn head_backward(
        &self,
        ends: Option<(&HeadState<T>, Option<&StateGradients<T>>)>,
        qkv: HeadQkv<'_, T>,
        grad_out: ArrayView3<'_, T>,
        outputs: InputGradients<'_, T>,
        tape: &mut Tape<T>,
    ) -> HeadGradients<T, M::Gradients> {
        let (state, after) = (ends.map(|(state, _)| state), ends.and_then(|(_, after)| after));
        let HeadQkv { position, q, k, v, valid, .. } = qkv;
        let (head, map) = (self.head(qkv.head), &self.maps()[qkv.head]);
        let value_dim = self.sizes().value_dim;
        // What the state remembers as it is comes first, as tokens like the others.
        let earlier = state.and_then(|state| Earlier::of(state, position, value_dim));
        let joined = earlier.as_ref().map(|earlier| {
            let scaled = k.mapv(|x| x * head.scale);
            let later = (0..k.nrows()).map(|j| qkv.is_valid(j));
            let valid = earlier.valid.iter().copied().chain(later);
            let join = |a: &Array2<T>, b: ArrayView2<'_, T>| concatenate![Axis(0), a.view(), b];
            (
                join(&earlier.keys, scaled.view()),
                join(&earlier.values, v),
                valid.collect::<Vec<bool>>(),
            )
        });
        let lead = earlier.as_ref().map_or(0, |earlier| earlier.keys.nrows());
        let (mut sinks, single, scores) = earlier.map_or_else(Default::default, |earlier| {
            (earlier.sinks, earlier.single, earlier.scores)
        });
        for j in (0..k.nrows()).filter(|&j| qkv.is_valid(j)) {
            if sinks.len() >= self.sinks() {
                break;
            }
            sinks.push(lead + j);
        }
        let (mut sums, mut log_decay) = (map.new_sums(), 0.0);
        let pass = Pass {
            map,
            log_decay: head.log_decay,
            causality: self.causality(),
            window: self.windows().get(qkv.head).copied(),
            q,
            k: joined.as_ref().map_or(k, |(k, ..)| k.view()),
            v: joined.as_ref().map_or(v, |(_, v, _)| v.view()),
            valid: joined.as_ref().map_or(valid, |(.., valid)| Some(valid)),
            sinks: &sinks,
            query_scale: head.scale,
            key_scale: if joined.is_some() { T::ONE } else { head.scale },
            position: position - lead,
            single: &single,
            scores: &scores,
            lead,
            given: None,
            after,
        };
        let InputGradients { q: grad_q, k: mut grad_k, v: mut grad_v } = outputs;
        let inputs = InputGradients { q: grad_q, k: grad_k.view_mut(), v: grad_v.view_mut() };
        let sinks =
            GradientSinks { sums: &mut sums, log_decay: &mut log_decay, inputs: Some(inputs) };
        let start = state.map(|state| &state.sums);
        tape.run(&pass, start, OutputGradient::Rows(grad_out), Some(sinks));

        let (key_stride, value_stride) = (padded(head.dim), padded(value_dim));
        let (lead_keys, keys) = tape.keys.split_at(lead * key_stride);
        let (lead_values, values) = tape.values.split_at(lead * value_stride);
        if !self.windows().is_empty() {
            copy_scaled(keys, head.scale, grad_k.view_mut());
            copy_scaled(values, T::ONE, grad_v.view_mut());
        }
        let rows = |from: &[T], dim: usize, scale: T| {
            let mut rows = Array2::zeros((from.len() / padded(dim), dim));
            copy_scaled(from, scale, rows.view_mut());
            rows
        };
        let mut state = state.map(|state| {
            let mut gradients = StateGradients::zeros(state, position, self.sizes());
            if state.sums.started {
                gradients.sums = rows(&tape.sums, value_dim, T::ONE);
                gradients.norm = tape.norm.iter().map(|&r| -r).collect();
            }
            gradients.keys = rows(lead_keys, head.dim, head.scale);
            gradients.values = rows(lead_values, value_dim, T::ONE);
            gradients
        });
        if let (Some(after), Some(state)) = (after, &mut state) {
            state.take_tokens(after, position, grad_k, grad_v);
        }
        HeadGradients { map: map.gradients(&sums), log_decay, state }
    }
}

impl<T: Real> StateGradients<T> {
    fn zeros(state: &HeadState<T>, position: usize, sizes: Sizes) -> Self {
        let Sizes { dim, features, value_dim, .. } = sizes;
        let positions = state.remembered(position);
        let frame = || {
            let reference = Array1::from_vec(state.sums.reference.clone());
            (reference, state.sums.reference_position)
        };
        Self {
            sums: Array2::zeros((features, value_dim)),
            norm: Array1::zeros(features),
            frame: state.sums.started.then(frame),
            keys: Array2::zeros((positions.len(), dim)),
            values: Array2::zeros((positions.len(), value_dim)),
            positions,
        }
    }

    /// S and z, and the frame they are in, are of m and e.
    fn check_sums(&self, argument: &'static str, (m, e): (usize, usize)) -> Result<()> {
        check_shape(argument, &self.sums, &[m, e])?;
        check_shape(argument, &self.norm, &[m])?;
        match &self.frame {
            Some((reference, _)) => check_shape(argument, reference, &[m]),
            None => Ok(()),
        }
    }

    /// Adds the gradients of readers of a later state: `later` is with respect to that one, and
    /// what is between the two adds to its sums alone. Only `sums` and `norm` change, or nothing if
    /// one of the states has not seen a key. `log_decay` is log γ.
    ///
    /// # Errors
    /// [`Error::Shape`] for gradients of another shape; nothing is changed then.
    pub fn add_later(&mut self, later: &Self, log_decay: f64) -> Result<()> {
        self.check_sums("self", self.sums.dim())?;
        later.check_sums("later", self.sums.dim())?;
        if let Some((reference, position)) = &self.frame {
            let (sums, norm) = later.sums_at(reference.view(), *position, log_decay);
            self.sums += &sums;
            self.norm += &norm;
        }
        Ok(())
    }

    /// S and z's gradients in another frame: those of S·exp(c + λ(p₀′ − p₀) − c′), so that the
    /// product of a number and its gradient is the same in all frames. Zeros without a frame.
    fn sums_at(
        &self,
        reference: ArrayView1<'_, T>,
        position: usize,
        log_decay: f64,
    ) -> (Array2<T>, Array1<T>) {
        let Some((own, own_position)) = &self.frame else {
            return (Array2::zeros(self.sums.dim()), Array1::zeros(self.norm.dim()));
        };
        let decay = T::from_f64(log_decay * (*own_position as f64 - position as f64));
        let factor = |(&to, &from): (&T, &T)| (to + decay - from).exp();
        let factors: Array1<T> = reference.iter().zip(own).map(factor).collect();
        (&self.sums * &factors.view().insert_axis(Axis(1)), &self.norm * &factors)
    }

    /// The tokens' part of `after`, whose tokens are ours or those from `position` on, of which `k`
    /// and `v` are the gradients.
    fn take_tokens(
        &mut self,
        after: &Self,
        position: usize,
        mut k: ArrayViewMut2<'_, T>,
        mut v: ArrayViewMut2<'_, T>,
    ) {
        for (&at, (key, value)) in
            after.positions.iter().zip(after.keys.rows().into_iter().zip(after.values.rows()))
        {
            let own = self.positions.iter().position(|&own| own == at);
            let (mut to_key, mut to_value) = match own {
                Some(row) => (self.keys.row_mut(row), self.values.row_mut(row)),
                None => (k.row_mut(at - position), v.row_mut(at - position)),
            };
            to_key += &key;
            to_value += &value;
        }
    }
}

/// Tokens that a state remembers as they are: sinks that have left the window, kept ones, then the
/// window.
struct Earlier<T> {
    /// Scaled, `[tokens, d]`.
    keys: Array2<T>,
    /// `[tokens, e]`
    values: Array2<T>,
    valid: Vec<bool>,
    /// Which of them are sinks.
    sinks: Vec<usize>,
    /// Positions of those before the window, and the kept ones' scores.
    single: Vec<usize>,
    scores: Vec<f64>,
}

impl<T: Real> Earlier<T> {
    /// `None` if there are none.
    fn of(state: &HeadState<T>, position: usize, value_dim: usize) -> Option<Self> {
        let (first, keys, values, valid) = state.ring.as_ref()?.tokens(position, value_dim);
        let (sinks, kept) = (&state.sinks, &state.kept);
        let (outside, order) = (sinks.before(first), kept.in_order());
        let (sink_keys, sink_values) = sinks.rows(0..outside, keys.ncols(), value_dim);
        let (kept_keys, kept_values) =
            kept.tokens.rows(order.iter().copied(), keys.ncols(), value_dim);
        let alone = outside + order.len();
        let valid: Vec<bool> = std::iter::repeat_n(true, alone).chain(valid).collect();
        let inside = sinks.positions[outside..].iter().map(|&position| alone + (position - first));
        let places = order.iter().map(|&place| kept.tokens.positions[place]);
        (!valid.is_empty()).then(|| Self {
            keys: concatenate![Axis(0), sink_keys, kept_keys, keys],
            values: concatenate![Axis(0), sink_values, kept_values, values],
            valid,
            sinks: (0..outside).chain(inside).collect(),
            single: sinks.positions[..outside].iter().copied().chain(places).collect(),
            scores: order.iter().map(|&place| kept.scores[place]).collect(),
        })
    }
}

/// Every element of a head and of its outputs' gradient is in range.
fn check_head<T: Real>(
    qkv: &HeadQkv<'_, T>,
    grad_out: ArrayView3<'_, T>,
) -> Result<(), OutOfRange> {
    qkv.check_queries(0..qkv.q.shape()[1])?;
    for rows in grad_out.outer_iter() {
        Rows::all_valid(rows, 0..rows.nrows()).check()?;
    }
    let keys = 0..qkv.k.nrows();
    qkv.key_rows(keys.clone()).check()?;
    qkv.value_rows(keys).check()
}

/// Rows padded to whole lane groups, times `scale`, without their padding.
fn copy_scaled<T: Real>(rows: &[T], scale: T, mut out: ArrayViewMut2<'_, T>) {
    let stride = padded(out.ncols());
    rows.chunks_exact(stride)
        .zip(out.outer_iter_mut())
        .for_each(|(row, out)| put_row(row, scale, out));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ndarray::Array3;
    use rand::SeedableRng;
    use rand::rngs::ChaCha12Rng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;
    use crate::attention::{LinearConfig, Operator, Qkv, Window};
    use crate::kernel::DctMapConfig;

    /// The gradient with respect to S and z, by moving every one of them.
    #[test]
    fn sums_of_the_first_state() {
        let mut rng = ChaCha12Rng::seed_from_u64(3);
        let mut random = |shape: (usize, usize, usize)| -> Array3<f64> {
            Array3::from_shape_simple_fn(shape, || StandardNormal.sample(&mut rng))
        };
        for window in [None, Some(Window::new(8, 1))] {
            let (h, n, d, e) = (2, 150, 8, 3);
            let mut config =
                LinearConfig::new().with_heads(h).with_value_dim(e).with_log_decay(vec![-0.01]);
            config.windows = window.into_iter().collect();
            let attention =
                config.build(vec![DctMapConfig::new().build::<f64>(d).unwrap()]).unwrap();
            let mut state = attention.new_state();
            attention
                .prefill(
                    &mut state,
                    Qkv::new(&random((h, 50, d)), &random((1, 50, d)), &random((1, 50, e))),
                )
                .unwrap();
            // Keys that leave the frame.
            let (q, k, v, grad) = (
                random((h, n, d)),
                random((1, n, d)) * 300.0,
                random((1, n, e)),
                random((h, n, e)),
            );
            let (_, gradients) =
                attention.prefill_backward(&state, Qkv::new(&q, &k, &v), &grad, None).unwrap();
            let loss = |state: &CausalState<f64>| {
                (attention.prefill(&mut state.clone(), Qkv::new(&q, &k, &v)).unwrap() * &grad).sum()
            };
            let check = |got: f64, change: &dyn Fn(&mut CausalState<f64>, f64)| {
                let at = |step: f64| {
                    let mut moved = state.clone();
                    change(&mut moved, step);
                    loss(&moved)
                };
                let slope = (at(1e-5) - at(-1e-5)) / 2e-5;
                assert!(
                    (got - slope).abs() < 1e-6 * (1.0 + slope.abs()),
                    "{window:?}: {got} is not {slope}"
                );
            };
            for f in 0..d {
                check(gradients[0].norm[f], &|state, step| state.heads[0].sums.norm[f] += step);
                (0..e).for_each(|i| {
                    check(gradients[0].sums[[f, i]], &|state, step| {
                        state.heads[0].sums.numerator[f * padded(e) + i] += step
                    })
                });
            }
        }
    }
}
