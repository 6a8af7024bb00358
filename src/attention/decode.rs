//! One token at a time: the same sums as [`causal`](super::causal) and [`near`](super::near), with vectors in place of
//! panels.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use crate::attention::Head;
use crate::attention::near::{Ring, retire};
use crate::attention::rows::normalise;
use crate::attention::state::{HeadState, ceiling};
use crate::attention::workspace::Scratch;
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Product, padded};

/// The next token of one key-value head and its group of query heads.
///
/// # Shapes
/// - `q`: `[group, d]`, `k`: `[d]`, `v`: `[e]`, `out`: `[group, e]`.
pub(super) fn step<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    position: usize,
    q: ArrayView2<'_, T>,
    k: ArrayView1<'_, T>,
    v: ArrayView1<'_, T>,
    mut out: ArrayViewMut2<'_, T>,
    scratch: &mut Scratch<T>,
) {
    scaled(k, head.scale, &mut scratch.y);
    let values = &mut scratch.v[..head.value_stride];
    values.fill(T::ZERO);
    values.iter_mut().zip(v).for_each(|(to, &from)| *to = from);
    let mut ring = state.ring.take();
    match &mut ring {
        Some(ring) => {
            if position.is_multiple_of(ring.chunk()) {
                // Retiring works in the scratch that holds the token.
                retire(head, state, ring, position / ring.chunk(), scratch);
                scaled(k, head.scale, &mut scratch.y);
            }
            let values = &scratch.v[..head.value_stride];
            ring.push(position, &scratch.y[..head.dim], values);
        }
        None => weigh_key(head, state, position, scratch),
    }
    for (i, (q, out)) in q.outer_iter().zip(out.outer_iter_mut()).enumerate() {
        scaled(q, head.scale, &mut scratch.x);
        let total = match &ring {
            Some(ring) => read_near(head, state, ring, position, scratch),
            // The first query's pass over the sums adds the key as well.
            None => read(head, state, i == 0, scratch),
        };
        normalise(&scratch.o, total, out);
    }
    state.ring = ring;
}

/// `out = scale · row`.
fn scaled<T: Real>(row: ArrayView1<'_, T>, scale: T, out: &mut [T]) {
    out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * scale);
}

/// The weights of the key `scratch.y` in the state's frame, into `scratch.b`, and into the normaliser.
fn weigh_key<T: Real, M: FeatureMap<T>>(head: &Head<'_, T, M>, state: &mut HeadState<T>, position: usize, scratch: &mut Scratch<T>) {
    let Scratch { y, b, map, feature, .. } = scratch;
    let (m, padding) = (head.features, padded(head.features));
    head.map.key_token(&y[..head.dim], &mut b[..m], map);
    let mut exponent = -state.decay(head.log_decay, position);
    let ceiling = ceiling::<T>();
    if !state.started || b.iter().zip(&state.reference).any(|(&b, &c)| b - c + exponent > ceiling) {
        feature.copy_from_slice(&b[..m]);
        state.rebase(head.ops, head.log_decay, position, feature);
        exponent = T::ZERO;
    }
    b.iter_mut().zip(&state.reference).for_each(|(b, &c)| *b = *b - c + exponent);
    b[m..padding].fill(T::NEG_INFINITY);
    (head.ops.exp_sum)(&mut b[..padding], T::ZERO);
    state.norm_rest.iter_mut().zip(&b[..m]).for_each(|(rest, &weight)| *rest += weight);
    (head.ops.fold)(&mut state.norm, &mut state.norm_rest);
}

/// Sums of the query `scratch.x` over the state into `scratch.o`; returns their normaliser. With `add_key` the weighted
/// key `scratch.b` and its value `scratch.v` join the sums first, in the same pass.
fn read<T: Real, M: FeatureMap<T>>(head: &Head<'_, T, M>, state: &mut HeadState<T>, add_key: bool, scratch: &mut Scratch<T>) -> T {
    let Scratch { x, a, b, v, o, map, .. } = scratch;
    let m = head.features;
    query_exponents(head, state, x, a, map);
    let top = (head.ops.slice_max)(&a[..padded(m)]);
    (head.ops.exp_sum)(&mut a[..padded(m)], -top);
    let (stride, a) = (head.value_stride, &a[..m]);
    if add_key {
        (head.ops.add_and_read)(&mut state.sums, &mut state.sums_rest, &b[..m], &v[..stride], a, &mut o[..stride]);
    } else {
        read_sums(head, state, a, o);
    }
    normaliser(head, state, a)
}

/// Sums of the query `scratch.x` over the near keys and the state into `scratch.o`; returns their normaliser.
fn read_near<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    ring: &Ring<T>,
    position: usize,
    scratch: &mut Scratch<T>,
) -> T {
    let Scratch { x, a, p, o, map, .. } = scratch;
    let (m, stride) = (head.features, head.value_stride);
    let width = ring.scores_of(head.ops, position, &x[..head.dim], p);
    let mut top = (head.ops.slice_max)(&p[..width]);
    if state.started {
        query_exponents(head, state, x, a, map);
        let decay = state.decay(head.log_decay, position);
        top = top.max((head.ops.slice_max)(&a[..padded(m)]) + decay);
        (head.ops.exp_sum)(&mut a[..padded(m)], decay - top);
        read_sums(head, state, &a[..m], o);
    } else {
        o[..stride].fill(T::ZERO);
    }
    // The token's own key is always there, so `top` is a number.
    let mut total = (head.ops.exp_sum)(&mut p[..width], -top);
    if state.started {
        total += normaliser(head, state, &a[..m]);
    }
    ring.add_values(head.ops, position, stride, p, o);
    total
}

/// a_f + c_f of the scaled query `x`, −∞ in the padding.
fn query_exponents<T: Real, M: FeatureMap<T>>(head: &Head<'_, T, M>, state: &HeadState<T>, x: &[T], a: &mut [T], map: &mut [T]) {
    let m = head.features;
    head.map.query_token(&x[..head.dim], &mut a[..m], map);
    a.iter_mut().zip(&state.reference).for_each(|(a, &c)| *a += c);
    a[m..padded(m)].fill(T::NEG_INFINITY);
}

/// o = wᵀS.
fn read_sums<T: Real, M>(head: &Head<'_, T, M>, state: &HeadState<T>, weights: &[T], o: &mut [T]) {
    let (m, stride) = (weights.len(), head.value_stride);
    let product = Product { m: 1, n: stride, k: m, a_row: m, a_col: 1, b_row: stride, c_row: stride, accumulate: false };
    (head.ops.matmul)(product, weights, &state.sums, o);
}

/// wᵀz.
fn normaliser<T: Real, M>(head: &Head<'_, T, M>, state: &HeadState<T>, weights: &[T]) -> T {
    let mut total = [T::ZERO];
    (head.ops.matvec)(&state.norm, weights, &mut total);
    total[0]
}
