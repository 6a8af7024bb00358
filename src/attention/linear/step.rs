//! One token at a time: the same sums as [`causal`](super::causal) and [`window`](super::window),
//! with vectors in place of panels.

use ndarray::{ArrayView1, ArrayViewMut3, s};

use crate::Real;
use crate::attention::linear::absorb::retire;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, PENDING, Pending, Ring, Sums, ceiling};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::{OutOfRange, normalise};
use crate::attention::scratch::{FeatureScratch, Scratch};
use crate::low::mat::MatRef;
use crate::low::simd::padded;

/// The next token of one key-value head and its group of query heads, `qkv` being of that token. It
/// may be attended to, and its elements are in range.
pub(crate) fn step<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    qkv: HeadQkv<'_, T>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let (position, key) = (qkv.position, qkv.k.row(0));
    let chunk = state.ring.as_ref().map(Ring::chunk);
    if let Some(chunk) = chunk.filter(|&chunk| position.is_multiple_of(chunk)) {
        retire(head, state, position / chunk, scratch);
    }
    scaled(key, head.scale, &mut scratch.y);
    let values = &mut scratch.v[..head.value_stride];
    values.fill(T::ZERO);
    scaled(qkv.v.row(0), T::ONE, values);
    match &mut state.ring {
        Some(ring) => {
            let key = &scratch.y[..head.dim];
            ring.push(position, key, values);
            if state.sinks.wants_more() {
                state.sinks.push(position, MatRef::packed(key, head.dim, 1), 0, values);
            }
        }
        None => add_key(head, &mut state.sums, position, scratch),
    }
    for h in 0..qkv.q.shape()[0] {
        scaled(qkv.q.slice(s![h, 0, ..]), head.scale, &mut scratch.x);
        let total = match &state.ring {
            Some(ring) => read_window(head, state, ring, position, scratch),
            None => read(head, &state.sums, scratch),
        };
        normalise(&scratch.o, total, out.slice_mut(s![h, 0, ..]))?;
    }
    Ok(())
}

/// `out = scale · row`.
fn scaled<T: Real>(row: ArrayView1<'_, T>, scale: T, out: &mut [T]) {
    match row.as_slice() {
        Some(row) => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * scale),
        None => out.iter_mut().zip(row).for_each(|(out, &x)| *out = x * scale),
    }
}

/// The key `y`, weighted in the sums' frame, and the value `v` join the pending ones.
fn add_key<T: Real>(
    head: &Head<'_, T>,
    sums: &mut Sums<T>,
    position: usize,
    scratch: &mut Scratch<T>,
) {
    let Scratch { y, v, features: FeatureScratch { b, map, feature, .. }, .. } = scratch;
    let (m, padding, stride) = (head.features, padded(head.features), head.value_stride);
    if sums.pending.len == PENDING {
        sums.settle(head.ops);
    }
    head.map.key_token(&y[..head.dim], &mut b[..m], map);
    feature.copy_from_slice(&b[..m]);
    let weigh = |sums: &Sums<T>, b: &mut [T]| {
        let exponent = -sums.decay(head.log_decay, position);
        (head.ops.offset_max)(&mut b[..padding], -T::ONE, &sums.reference, exponent)
    };
    if weigh(sums, b) > ceiling::<T>() || !sums.started {
        sums.rebase(head.ops, head.log_decay, position, feature);
        b[..m].copy_from_slice(feature);
        weigh(sums, b);
    }
    (head.ops.exp_sum)(&mut b[..padding], T::ZERO);
    let Pending { weights, values, len } = &mut sums.pending;
    weights[*len * m..][..m].copy_from_slice(&b[..m]);
    values[*len * stride..][..stride].copy_from_slice(&v[..stride]);
    *len += 1;
}

/// Weighted values of the query `x` over the sums and the pending keys into `o`; returns their
/// normaliser.
fn read<T: Real>(head: &Head<'_, T>, sums: &Sums<T>, scratch: &mut Scratch<T>) -> T {
    let (m, stride) = (head.features, head.value_stride);
    let top = query_exponents(head, sums, scratch);
    let Scratch { o, total: scores, features: FeatureScratch { a, .. }, .. } = scratch;
    let total = (head.ops.exp_weighted)(&mut a[..padded(m)], -top, &sums.norm);
    let a = &a[..m];
    (head.ops.vecmat)(a, &sums.numerator, false, &mut o[..stride]);
    let Pending { weights, values, len } = &sums.pending;
    let scores = &mut scores[..*len];
    scores.fill(T::ZERO);
    // One row for all pending keys to meet, not the other way round: they are added up side by side
    // then.
    (head.ops.matvec)(a, m, &weights[..len * m], scores);
    (head.ops.vecmat)(scores, values, true, &mut o[..stride]);
    scores.iter().fold(total, |sum, &score| sum + score)
}

/// Weighted values of the query `x` over sinks, window and sums into `o`; returns their normaliser.
fn read_window<T: Real>(
    head: &Head<'_, T>,
    state: &HeadState<T>,
    ring: &Ring<T>,
    position: usize,
    scratch: &mut Scratch<T>,
) -> T {
    let HeadState { sums, sinks, .. } = state;
    let (m, stride) = (head.features, head.value_stride);
    let Scratch { x, p, .. } = scratch;
    let x = &x[..head.dim];
    let (count, row) = (sinks.before(ring.first_seen(position)), MatRef::packed(x, 1, head.dim));
    let sink_width = padded(count);
    sinks.score(head.ops, count, row, (&mut *p, sink_width.max(1)), None);
    let width = sink_width + ring.scores_of(head.ops, position, x, &mut p[sink_width..]);
    let mut top = (head.ops.slice_max)(&p[..width]);
    let mut far_total = T::ZERO;
    if sums.started {
        let largest = query_exponents(head, sums, scratch);
        let Scratch { o, features: FeatureScratch { a, .. }, .. } = scratch;
        let far = largest + sums.decay(head.log_decay, position);
        top = top.max(far);
        far_total = (head.ops.exp_weighted)(&mut a[..padded(m)], (far - top) - largest, &sums.norm);
        (head.ops.vecmat)(&a[..m], &sums.numerator, false, &mut o[..stride]);
    } else {
        scratch.o[..stride].fill(T::ZERO);
    }
    // The token's own key is always there, so `top` is a number.
    let Scratch { p, o, .. } = scratch;
    let total = (head.ops.exp_sum)(&mut p[..width], -top) + far_total;
    sinks.add_values(head.ops, count, MatRef::packed(p, 1, count), o, None);
    ring.add_values(head.ops, position, stride, &p[sink_width..], o);
    total
}

/// a_f + c_f of the scaled query `x` into `a`, −∞ in the padding; returns the largest.
fn query_exponents<T: Real>(head: &Head<'_, T>, sums: &Sums<T>, scratch: &mut Scratch<T>) -> T {
    let Scratch { x, features: FeatureScratch { a, map, .. }, .. } = scratch;
    let m = head.features;
    head.map.query_token(&x[..head.dim], &mut a[..m], map);
    (head.ops.offset_max)(&mut a[..padded(m)], T::ONE, &sums.reference, T::ZERO)
}
