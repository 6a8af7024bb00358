//! The backward pass of [`LinearAttention`]: gradients with respect to queries, keys, values, the
//! maps' parameters, decay and the state a sequence starts from.
//!
//! The equations are in the engine, `tape.rs`.

use std::sync::atomic::{AtomicBool, Ordering};

use ndarray::{
    Array1, Array2, Array3, ArrayRef3, ArrayView2, ArrayView3, ArrayViewMut2, Axis, concatenate,
};

use crate::attention::checks::{check_shapes, check_tokens};
use crate::attention::rows::{Valid, is_valid, put_row, tokens_fit};
use crate::attention::state::HeadState;
use crate::attention::tape::{InputGradients, Order, Stretch, Tape, Targets, Upstream};
use crate::attention::workspace::Sizes;
use crate::attention::{CausalState, KeyMask, LinearAttention};
use crate::error::{Result, check_elements, check_room, check_shape};
use crate::kernel::DifferentiableMap;
use crate::real::Real;
use crate::simd::padded;
use crate::threads;

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
#[non_exhaustive]
pub struct StateGradients<T> {
    /// Of the sums S, `[m, e]`.
    pub sums: Array2<T>,
    /// Of the normaliser z, `[m]`.
    pub norm: Array1<T>,
    /// Of the keys of the local window, `[tokens, d]`: those that have not joined the sums yet, the
    /// last one being that of the token before the first query. Without a local window no tokens.
    pub keys: Array2<T>,
    /// Of the values of the local window, `[tokens, e]`.
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

/// One key-value head's inputs, `[group, n_q, d]`, `[n_k, d]`, `[n_k, e]` and `[group, n_q, e]`.
#[derive(Clone, Copy)]
struct Inputs<'a, T> {
    q: ArrayView3<'a, T>,
    k: ArrayView2<'a, T>,
    v: ArrayView2<'a, T>,
    grad_out: ArrayView3<'a, T>,
    valid: Valid<'a>,
}

impl<T: Real> Inputs<'_, T> {
    /// Whether every element is in range.
    fn fit(&self) -> bool {
        let of_queries =
            self.q.outer_iter().chain(self.grad_out.outer_iter()).map(|rows| (rows, None));
        let of_keys = [self.k, self.v].into_iter().map(|rows| (rows, self.valid));
        of_queries.chain(of_keys).all(|(rows, valid)| tokens_fit(rows, 0..rows.nrows(), valid))
    }
}

/// The rest of its gradients.
struct HeadGradients<T, G> {
    map: G,
    log_decay: f64,
    /// If the sequence was continued from one.
    state: Option<StateGradients<T>>,
}

impl<T: Real, M: DifferentiableMap<T>> LinearAttention<T, M> {
    /// Gradients of a scalar through [`causal`](Self::causal), from its gradient with respect to
    /// the output.
    ///
    /// # Shapes
    /// - `q`, `k`, `v`, `mask` as for [`causal`](Self::causal); `grad_out`: `[h, n, e]`.
    ///
    /// # Cost
    /// O(n) time: about 3 times that of the forward pass, which is computed again on the way.
    /// Besides the results it allocates what a [`BackwardWorkspace`] holds. Heads in parallel; the
    /// same bits on any number of threads.
    ///
    /// # Errors
    /// As [`prefill_into`](Self::prefill_into), `grad_out` being checked like the other arguments,
    /// and [`Error::TooLarge`](crate::Error::TooLarge) for gradients there is no room for.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::{KeyMask, LinearConfig};
    /// use dijiang::kernel::DctMapConfig;
    /// use ndarray::{Array, Array3};
    ///
    /// let attention = LinearConfig::new().build(vec![DctMapConfig::new(8).build::<f64>()?])?;
    /// let q: Array3<f64> = Array::from_shape_fn((1, 50, 8), |(_, i, j)| ((3 * i + 5 * j) % 7) as f64 / 7.0);
    /// let v = q.mapv(|x| x - 0.5);
    /// // The loss is the sum of all outputs. Adding 1 to every value adds 1 to every output.
    /// let grad_out = Array3::ones((1, 50, 8));
    /// let gradients = attention.causal_backward(&q, &q, &v, KeyMask::All, &grad_out)?;
    /// assert!((gradients.v.sum() - 50.0 * 8.0).abs() < 1e-9);
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn causal_backward(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<AttentionGradients<T, M::Gradients>> {
        Ok(self.prefill_backward(&self.new_state(), q, k, v, mask, grad_out)?.0)
    }

    /// [`causal_backward`](Self::causal_backward) into `gradients`, all of which it overwrites. For
    /// a loop of training: at a few thousand tokens memory that is used again saves a quarter of
    /// the time. The gradients of maps and decay are allocated anew, m·d numbers or fewer per head.
    ///
    /// # Shapes
    /// - as for [`causal_backward`](Self::causal_backward); `gradients`:
    ///   [`new_gradients`](Self::new_gradients) of n queries and keys.
    ///
    /// # Errors
    /// As [`causal_backward`](Self::causal_backward), with [`Error::Shape`](crate::Error::Shape)
    /// for gradients of other shapes and [`Error::Foreign`](crate::Error::Foreign) for a workspace
    /// of another operator's shape. After [`Error::NonFinite`](crate::Error::NonFinite) the
    /// contents of `gradients` mean nothing.
    pub fn causal_backward_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        ws: &mut BackwardWorkspace<T>,
    ) -> Result<()> {
        self.backward_into(self.causal_order(), q, k, v, mask, grad_out, gradients, ws)
    }

    /// Zeros, for [`causal_backward_into`](Self::causal_backward_into) and
    /// [`full_backward_into`](Self::full_backward_into) to overwrite: those of `queries` queries
    /// and `keys` keys. Map gradients are empty until then.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) for more memory than there can be.
    pub fn new_gradients(
        &self,
        queries: usize,
        keys: usize,
    ) -> Result<AttentionGradients<T, M::Gradients>> {
        let (kv_heads, dim, value_dim) = (self.maps().len(), self.sizes.dim, self.sizes.value_dim);
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

    /// Memory for the backward passes, empty: it grows to what the longest of them needs.
    pub fn backward_workspace(&self) -> BackwardWorkspace<T> {
        BackwardWorkspace { sizes: self.sizes, tapes: Vec::new() }
    }

    fn causal_order(&self) -> Order {
        self.window().map_or(Order::Causal, Order::Window)
    }

    /// Gradients through [`prefill`](Self::prefill), and those with respect to the state it starts
    /// from, one per key-value head. `state` is the state *before* the prefill.
    ///
    /// The output's gradient is all there is: the state *after* the prefill is taken to have no
    /// further readers.
    ///
    /// # Shapes
    /// - as for [`causal_backward`](Self::causal_backward).
    ///
    /// # Errors
    /// As [`causal_backward`](Self::causal_backward), and [`Error::Foreign`](crate::Error::Foreign)
    /// for a state of another shape.
    pub fn prefill_backward(
        &self,
        state: &CausalState<T>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<(AttentionGradients<T, M::Gradients>, Vec<StateGradients<T>>)> {
        state.check(self.shape())?;
        self.check_gradient(self.causal_order(), q, k, v, mask, grad_out)?;
        let (mut gradients, mut ws) =
            (self.new_gradients(q.shape()[1], k.shape()[1])?, self.backward_workspace());
        let states = self.backward(
            self.causal_order(),
            Some(state),
            q,
            k,
            v,
            mask,
            grad_out,
            &mut gradients,
            &mut ws,
        )?;
        Ok((gradients, states))
    }

    /// Gradients through [`full`](Self::full).
    ///
    /// # Shapes
    /// - `q`, `k`, `v`, `mask` as for [`full`](Self::full); `grad_out`: `[h, n_q, e]`.
    ///
    /// # Cost
    /// As [`causal_backward`](Self::causal_backward).
    ///
    /// # Errors
    /// As [`full`](Self::full), `grad_out` being checked like the other arguments.
    pub fn full_backward(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<AttentionGradients<T, M::Gradients>> {
        self.check_gradient(Order::Full, q, k, v, mask, grad_out)?;
        let mut gradients = self.new_gradients(q.shape()[1], k.shape()[1])?;
        self.backward(
            Order::Full,
            None,
            q,
            k,
            v,
            mask,
            grad_out,
            &mut gradients,
            &mut self.backward_workspace(),
        )?;
        Ok(gradients)
    }

    /// [`full_backward`](Self::full_backward) into `gradients`, all of which it overwrites, as
    /// [`causal_backward_into`](Self::causal_backward_into) does.
    ///
    /// # Shapes
    /// - as for [`full_backward`](Self::full_backward); `gradients`:
    ///   [`new_gradients`](Self::new_gradients) of n_q queries and n_k keys.
    ///
    /// # Errors
    /// As [`full_backward`](Self::full_backward) and
    /// [`causal_backward_into`](Self::causal_backward_into).
    pub fn full_backward_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        ws: &mut BackwardWorkspace<T>,
    ) -> Result<()> {
        self.backward_into(Order::Full, q, k, v, mask, grad_out, gradients, ws)
    }

    /// Whether everything has the shape it should; elements are looked at head by head, while they
    /// are in the cache.
    fn check_gradient(
        &self,
        order: Order,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
    ) -> Result<()> {
        match order {
            Order::Full => self.check_full()?,
            Order::Causal | Order::Window(_) => {
                check_shape("k", k, &[self.maps().len(), q.shape()[1], self.sizes.dim])?
            }
        }
        check_shape("grad_out", grad_out, &[self.heads(), q.shape()[1], self.sizes.value_dim])?;
        check_shapes(self.heads(), self.maps().len(), self.sizes, q, k, v, mask, grad_out)
    }

    /// From no state, into results that are still to be checked.
    fn backward_into(
        &self,
        order: Order,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        ws: &mut BackwardWorkspace<T>,
    ) -> Result<()> {
        self.check_gradient(order, q, k, v, mask, grad_out)?;
        check_shape("gradients.q", &gradients.q, q.shape())?;
        check_shape("gradients.k", &gradients.k, k.shape())?;
        check_shape("gradients.v", &gradients.v, v.shape())?;
        self.sizes.check_workspace(ws.sizes)?;
        self.backward(order, None, q, k, v, mask, grad_out, gradients, ws).map(drop)
    }

    fn backward(
        &self,
        order: Order,
        state: Option<&CausalState<T>>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef3<T>,
        gradients: &mut AttentionGradients<T, M::Gradients>,
        ws: &mut BackwardWorkspace<T>,
    ) -> Result<Vec<StateGradients<T>>> {
        let (kv_heads, group) = (self.maps().len(), self.heads() / self.maps().len());
        let mut results: Vec<Option<HeadGradients<T, M::Gradients>>> =
            (0..kv_heads).map(|_| None).collect();
        if ws.tapes.len() < threads::max_threads().min(kv_heads) {
            ws.tapes.resize(threads::max_threads().min(kv_heads), None);
        }
        let inputs =
            q.axis_chunks_iter(Axis(0), group).zip(grad_out.axis_chunks_iter(Axis(0), group));
        let inputs = inputs.zip(k.outer_iter().zip(v.outer_iter()));
        let inputs =
            inputs.map(|((q, grad_out), (k, v))| Inputs { q, k, v, grad_out, valid: mask.valid() });
        let outputs = gradients.k.outer_iter_mut().zip(gradients.v.outer_iter_mut());
        let outputs = outputs
            .zip(gradients.q.axis_chunks_iter_mut(Axis(0), group))
            .map(|((k, v), q)| InputGradients { q, k, v });
        let items = inputs.zip(outputs).zip(&mut results).enumerate();
        let clean = AtomicBool::new(true);
        threads::for_each(&mut ws.tapes, items, |tape, (h, ((inputs, outputs), result))| {
            if !inputs.fit() {
                return clean.store(false, Ordering::Relaxed);
            }
            let tape = tape.get_or_insert_with(|| Tape::new(&self.maps()[h], self.sizes.value_dim));
            let state = state.map(|state| (&state.heads[h], state.position));
            *result = Some(self.head_backward(h, order, state, inputs, outputs, tape));
        });
        if !clean.into_inner() {
            check_tokens(q, k, v, mask)?;
            check_elements("grad_out", grad_out)?;
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

    fn head_backward(
        &self,
        h: usize,
        order: Order,
        state: Option<(&HeadState<T>, usize)>,
        inputs: Inputs<'_, T>,
        outputs: InputGradients<'_, T>,
        tape: &mut Tape<T>,
    ) -> HeadGradients<T, M::Gradients> {
        let Inputs { q, k, v, grad_out, valid } = inputs;
        let head = self.head(h);
        let (position, value_dim) =
            (state.map_or(0, |(_, position)| position), self.sizes.value_dim);
        // The local window that the state holds comes first, as tokens like the others.
        let ring = state.and_then(|(state, position)| {
            state.ring.as_ref().map(|ring| ring.tokens(position, value_dim))
        });
        let ring = ring.filter(|(_, keys, ..)| keys.nrows() > 0);
        let joined = ring.as_ref().map(|(_, keys, values, earlier)| {
            let scaled = k.mapv(|x| x * head.scale);
            let valid = earlier.iter().copied().chain((0..k.nrows()).map(|j| is_valid(valid, j)));
            let join = |a: &Array2<T>, b: ArrayView2<'_, T>| concatenate![Axis(0), a.view(), b];
            (join(keys, scaled.view()), join(values, v), valid.collect::<Vec<bool>>())
        });
        let lead = ring.as_ref().map_or(0, |(_, keys, ..)| keys.nrows());
        let (mut sums, mut log_decay) = (head.map.new_sums(), 0.0);
        let stretch = Stretch {
            map: head.map,
            log_decay: head.log_decay,
            order,
            q,
            k: joined.as_ref().map_or(k, |(k, ..)| k.view()),
            v: joined.as_ref().map_or(v, |(_, v, _)| v.view()),
            valid: joined.as_ref().map_or(valid, |(.., valid)| Some(valid)),
            query_scale: head.scale,
            key_scale: if joined.is_some() { T::ONE } else { head.scale },
            position: position - lead,
            lead,
            given: None,
        };
        let InputGradients { q: grad_q, k: mut grad_k, v: mut grad_v } = outputs;
        let inputs = InputGradients { q: grad_q, k: grad_k.view_mut(), v: grad_v.view_mut() };
        let targets = Targets { sums: &mut sums, log_decay: &mut log_decay, inputs: Some(inputs) };
        tape.run(&stretch, state.map(|(state, _)| state), Upstream::Rows(grad_out), Some(targets));

        let (key_stride, value_stride) = (padded(head.dim), padded(value_dim));
        let (lead_keys, keys) = tape.keys.split_at(lead * key_stride);
        let (lead_values, values) = tape.values.split_at(lead * value_stride);
        if let Order::Window(_) = order {
            copy_scaled(keys, head.scale, grad_k);
            copy_scaled(values, T::ONE, grad_v);
        }
        let rows = |from: &[T], dim: usize, scale: T| {
            let mut rows = Array2::zeros((from.len() / padded(dim), dim));
            copy_scaled(from, scale, rows.view_mut());
            rows
        };
        // The sums of a state that has seen no key are in no frame.
        let seen = if state.is_some_and(|(state, _)| state.started) { T::ONE } else { T::ZERO };
        HeadGradients {
            map: head.map.gradients(&sums),
            log_decay,
            state: state.is_some().then(|| StateGradients {
                sums: rows(&tape.sums, value_dim, seen),
                norm: tape.norm.iter().map(|&r| -r * seen).collect(),
                keys: rows(lead_keys, head.dim, head.scale),
                values: rows(lead_values, value_dim, T::ONE),
            }),
        }
    }
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
    use crate::attention::{LinearConfig, Window};
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
            config.window = window;
            let attention =
                config.build(vec![DctMapConfig::new(d).build::<f64>().unwrap()]).unwrap();
            let mut state = attention.new_state();
            attention
                .prefill(
                    &mut state,
                    &random((h, 50, d)),
                    &random((1, 50, d)),
                    &random((1, 50, e)),
                    KeyMask::All,
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
                attention.prefill_backward(&state, &q, &k, &v, KeyMask::All, &grad).unwrap();
            let loss = |state: &CausalState<f64>| {
                (attention.prefill(&mut state.clone(), &q, &k, &v, KeyMask::All).unwrap() * &grad)
                    .sum()
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
                check(gradients[0].norm[f], &|state, step| state.heads[0].norm[f] += step);
                (0..e).for_each(|i| {
                    check(gradients[0].sums[[f, i]], &|state, step| {
                        state.heads[0].sums[f * padded(e) + i] += step
                    })
                });
            }
        }
    }
}
