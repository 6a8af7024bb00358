//! One token at a time: the same sums as [`causal`](super::causal) and [`window`](super::window), with
//! vectors in place of panels.

use ndarray::{ArrayView1, ArrayView2, ArrayViewMut2};

use crate::attention::Head;
use crate::attention::rows::normalise;
use crate::attention::state::{HeadState, PENDING, Pending, ceiling};
use crate::attention::window::{Ring, retire};
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
            Some(ring) => read_window(head, state, ring, position, scratch),
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

/// The key `scratch.y`, weighted in the state's frame, and the value `scratch.v` join the pending
/// ones.
fn add_key<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &mut HeadState<T>,
    position: usize,
    scratch: &mut Scratch<T>,
) {
    let Scratch { y, b, v, map, feature, .. } = scratch;
    let (m, padding, stride) = (head.features, padded(head.features), head.value_stride);
    if state.pending.len == PENDING {
        state.settle(head.ops);
    }
    head.map.key_token(&y[..head.dim], &mut b[..m], map);
    feature.copy_from_slice(&b[..m]);
    let weigh = |state: &HeadState<T>, b: &mut [T]| {
        let exponent = -state.decay(head.log_decay, position);
        (head.ops.offset_max)(&mut b[..padding], -T::ONE, &state.reference, exponent)
    };
    if weigh(state, b) > ceiling::<T>() || !state.started {
        state.rebase(head.ops, head.log_decay, position, feature);
        b[..m].copy_from_slice(feature);
        weigh(state, b);
    }
    (head.ops.exp_sum)(&mut b[..padding], T::ZERO);
    let Pending { weights, values, len } = &mut state.pending;
    weights[*len * m..][..m].copy_from_slice(&b[..m]);
    values[*len * stride..][..stride].copy_from_slice(&v[..stride]);
    *len += 1;
}

/// Sums of the query `scratch.x` over the state and the pending keys into `scratch.o`; returns
/// their normaliser.
fn read<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    scratch: &mut Scratch<T>,
) -> T {
    let Scratch { x, a, o, total: scores, map, .. } = scratch;
    let (m, stride) = (head.features, head.value_stride);
    let top = query_exponents(head, state, x, a, map);
    let total = (head.ops.exp_weighted)(&mut a[..padded(m)], -top, &state.norm);
    let a = &a[..m];
    (head.ops.vecmat)(a, &state.sums, false, &mut o[..stride]);
    let Pending { weights, values, len } = &state.pending;
    let scores = &mut scores[..*len];
    scores.fill(T::ZERO);
    // One row for all pending keys to meet, not the other way round: they are added up side by side
    // then.
    (head.ops.matvec)(a, m, &weights[..len * m], scores);
    (head.ops.vecmat)(scores, values, true, &mut o[..stride]);
    scores.iter().fold(total, |sum, &score| sum + score)
}

/// Sums of the query `scratch.x` over the window keys and the state into `scratch.o`; returns their
/// normaliser.
fn read_window<T: Real, M: FeatureMap<T>>(
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
    let mut far_total = T::ZERO;
    if state.started {
        let largest = query_exponents(head, state, x, a, map);
        let far = largest + state.decay(head.log_decay, position);
        top = top.max(far);
        far_total =
            (head.ops.exp_weighted)(&mut a[..padded(m)], (far - top) - largest, &state.norm);
        (head.ops.vecmat)(&a[..m], &state.sums, false, &mut o[..stride]);
    } else {
        o[..stride].fill(T::ZERO);
    }
    // The token's own key is always there, so `top` is a number.
    let total = (head.ops.exp_sum)(&mut p[..width], -top) + far_total;
    ring.add_values(head.ops, position, stride, p, o);
    total
}

/// a_f + c_f of the scaled query `x`, −∞ in the padding; returns the largest.
fn query_exponents<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    state: &HeadState<T>,
    x: &[T],
    a: &mut [T],
    map: &mut [T],
) -> T {
    let m = head.features;
    head.map.query_token(&x[..head.dim], &mut a[..m], map);
    (head.ops.offset_max)(&mut a[..padded(m)], T::ONE, &state.reference, T::ZERO)
}
