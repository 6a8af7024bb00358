//! One token at a time: the same sums as [`causal`](super::causal) and [`window`](super::window),
//! with vectors in place of panels.

use ndarray::{ArrayView1, ArrayViewMut3, Axis};

use crate::Real;
use crate::attention::linear::absorb::retire;
use crate::attention::linear::head::Head;
use crate::attention::linear::state::{HeadState, PENDING, Pending, Ring, Sums, ceiling};
use crate::attention::qkv::HeadQkv;
use crate::attention::rows::{OutOfRange, normalise};
use crate::attention::scratch::{FeatureScratch, Scratch};
use crate::low::mat::MatRef;
use crate::low::simd::padded;

/// Query heads that read the window's keys and values together.
const QUERIES: usize = 8;

/// The next token of one key-value head and its group of query heads, `qkv` being of that token. It
/// may be attended to, and its elements are in range.
pub(crate) fn step<T: Real>(
    head: &Head<'_, T>,
    state: &mut HeadState<T>,
    qkv: HeadQkv<'_, T>,
    out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) -> Result<(), OutOfRange> {
    let (queries, mut out) = (qkv.q.index_axis_move(Axis(1), 0), out.index_axis_move(Axis(1), 0));
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
    let heads = queries.nrows();
    for first in (0..heads).step_by(QUERIES) {
        let group = first..heads.min(first + QUERIES);
        for (h, x) in group.clone().zip(scratch.x.chunks_exact_mut(head.dim)) {
            scaled(queries.row(h), head.scale, x);
        }
        match &state.ring {
            Some(ring) => read_window(head, state, ring, position, group.len(), scratch),
            None => (0..group.len()).for_each(|row| read(head, &state.sums, row, scratch)),
        }
        let rows = scratch.o.chunks_exact(head.value_stride).zip(&*scratch.total);
        for (h, (sums, &total)) in group.zip(rows) {
            normalise(sums, total, out.row_mut(h))?;
        }
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

/// Weighted values of the query in row `row` of `x` over the sums and the pending keys into that
/// row of `o`, their normaliser into that of `total`.
fn read<T: Real>(head: &Head<'_, T>, sums: &Sums<T>, row: usize, scratch: &mut Scratch<T>) {
    let (m, stride) = (head.features, head.value_stride);
    let top = query_exponents(head, sums, row, scratch);
    let Scratch { o, p, total, features: FeatureScratch { a, .. }, .. } = scratch;
    let o = &mut o[row * stride..][..stride];
    let far_total = (head.ops.exp_weighted)(&mut a[..padded(m)], -top, &sums.norm);
    let a = &a[..m];
    (head.ops.vecmat)(a, &sums.numerator, false, o);
    let Pending { weights, values, len } = &sums.pending;
    let scores = &mut p[..*len];
    scores.fill(T::ZERO);
    // One row for all pending keys to meet, not the other way round: they are added up side by side
    // then.
    (head.ops.matvec)(a, m, &weights[..len * m], scores);
    (head.ops.vecmat)(scores, values, true, o);
    total[row] = scores.iter().fold(far_total, |sum, &score| sum + score);
}

/// Weighted values of the queries in the first rows of `x` over what the state remembers into the
/// rows of `o`, their normalisers into `total`.
fn read_window<T: Real>(
    head: &Head<'_, T>,
    state: &HeadState<T>,
    ring: &Ring<T>,
    position: usize,
    rows: usize,
    scratch: &mut Scratch<T>,
) {
    let (sums, single) = (&state.sums, state.single(ring.first_seen(position)));
    let (m, stride) = (head.features, head.value_stride);
    let at = single.width();
    let width = at + ring.columns(position);
    let Scratch { x, p, .. } = scratch;
    let x = MatRef::packed(x, rows, head.dim);
    single.score(head.ops, x, (&mut *p, width), None);
    ring.score(head.ops, position, x, (&mut p[at..], width));
    for row in 0..rows {
        let mut top = (head.ops.slice_max)(&scratch.p[row * width..][..width]);
        let mut far_total = T::ZERO;
        if sums.started {
            let largest = query_exponents(head, sums, row, scratch);
            let Scratch { o, features: FeatureScratch { a, .. }, .. } = scratch;
            let far = largest + sums.decay(head.log_decay, position);
            top = top.max(far);
            let shift = (far - top) - largest;
            far_total = (head.ops.exp_weighted)(&mut a[..padded(m)], shift, &sums.norm);
            (head.ops.vecmat)(&a[..m], &sums.numerator, false, &mut o[row * stride..][..stride]);
        } else {
            scratch.o[row * stride..][..stride].fill(T::ZERO);
        }
        // The token's own key is always there, so `top` is a number.
        let Scratch { p, total, .. } = scratch;
        total[row] = (head.ops.exp_sum)(&mut p[row * width..][..width], -top) + far_total;
    }
    let Scratch { p, o, .. } = scratch;
    single.add_values(head.ops, (p, rows, width), o, None);
    let p = MatRef::new(p, rows, width, width).cols(at..width);
    ring.add_values(head.ops, position, p, o);
}

/// a_f + c_f of the scaled query in row `row` of `x` into `a`, −∞ in the padding; returns the
/// largest.
fn query_exponents<T: Real>(
    head: &Head<'_, T>,
    sums: &Sums<T>,
    row: usize,
    scratch: &mut Scratch<T>,
) -> T {
    let Scratch { x, features: FeatureScratch { a, map, .. }, .. } = scratch;
    let m = head.features;
    head.map.query_token(&x[row * head.dim..][..head.dim], &mut a[..m], map);
    (head.ops.offset_max)(&mut a[..padded(m)], T::ONE, &sums.reference, T::ZERO)
}
