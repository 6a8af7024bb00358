//! One token at a time: the same sums as [`causal`](super::causal) and [`near`](super::near), with vectors in place of
//! panels.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use crate::attention::Head;
use crate::attention::near::{Ring, retire};
use crate::attention::rows::normalise;
use crate::attention::state::{HeadState, PENDING, Pending, ceiling};
use crate::attention::workspace::Scratch;
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::padded;

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
    scaled(v, T::ONE, values);
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
        None => add_key(head, state, position, scratch),
    }
    for (q, out) in q.outer_iter().zip(out.outer_iter_mut()) {
        scaled(q, head.scale, &mut scratch.x);
        let total = match &ring {
            Some(ring) => read_near(head, state, ring, position, scratch),
            None => read(head, state, scratch),
        };
        normalise(&scratch.o, total, out);
    }
    state.ring = ring;
}

/// `out = scale · row`.
fn scaled<T: Real>(row: ArrayView1<'_, T>, scale: T, out: &mut [T]) {
    match row.as_slice() {
        Some(row) => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * scale),
        None => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * scale),
    }
}

/// The key `scratch.y`, weighted in the state's frame, and the value `scratch.v` join the pending ones.
fn add_key<T: Real, M: FeatureMap<T>>(head: &Head<'_, T, M>, state: &mut HeadState<T>, position: usize, scratch: &mut Scratch<T>) {
    let Scratch { y, b, v, map, feature, .. } = scratch;
    let (m, padding, stride) = (head.features, padded(head.features), head.value_stride);
    if state.pending.len == PENDING {
        state.settle(head.ops);
    }
    head.map.key_token(&y[..head.dim], &mut b[..m], map);
    feature.copy_from_slice(&b[..m]);
    b[m..padding].fill(T::NEG_INFINITY);
    let weigh = |state: &HeadState<T>, feature: &[T], b: &mut [T]| {
        let exponent = -state.decay(head.log_decay, position);
        b.iter_mut().zip(feature.iter().zip(&state.reference)).for_each(|(b, (&feature, &c))| *b = feature - c + exponent);
    };
    weigh(state, feature, b);
    if !state.started || (head.ops.slice_max)(&b[..padding]) > ceiling::<T>() {
        state.rebase(head.ops, head.log_decay, position, feature);
        weigh(state, feature, b);
    }
    (head.ops.exp_sum)(&mut b[..padding], T::ZERO);
    let Pending { weights, values, len } = &mut state.pending;
    weights[*len * m..][..m].copy_from_slice(&b[..m]);
    values[*len * stride..][..stride].copy_from_slice(&v[..stride]);
    *len += 1;
}

/// Sums of the query `scratch.x` over the state and the pending keys into `scratch.o`; returns their normaliser.
fn read<T: Real, M: FeatureMap<T>>(head: &Head<'_, T, M>, state: &HeadState<T>, scratch: &mut Scratch<T>) -> T {
    let Scratch { x, a, o, total, map, .. } = scratch;
    let (m, stride) = (head.features, head.value_stride);
    query_exponents(head, state, x, a, map);
    let top = (head.ops.slice_max)(&a[..padded(m)]);
    (head.ops.exp_sum)(&mut a[..padded(m)], -top);
    let a = &a[..m];
    (head.ops.vecmat)(a, &state.sums, false, &mut o[..stride]);
    let Pending { weights, values, len } = &state.pending;
    let scores = &mut total[..*len];
    scores.fill(T::ZERO);
    (head.ops.matvec)(&weights[..len * m], m, a, scores);
    (head.ops.vecmat)(scores, values, true, &mut o[..stride]);
    scores.iter().fold(normaliser(head, state, a), |sum, &score| sum + score)
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
        let largest = (head.ops.slice_max)(&a[..padded(m)]);
        let far = largest + decay;
        top = top.max(far);
        (head.ops.exp_sum)(&mut a[..padded(m)], (far - top) - largest);
        (head.ops.vecmat)(&a[..m], &state.sums, false, &mut o[..stride]);
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

/// wᵀz.
fn normaliser<T: Real, M>(head: &Head<'_, T, M>, state: &HeadState<T>, weights: &[T]) -> T {
    let mut total = [T::ZERO];
    (head.ops.matvec)(&state.norm, head.features, weights, &mut total);
    total[0]
}
