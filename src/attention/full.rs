//! Full linear attention: every query sees every key.

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut3};

use crate::attention::Head;
use crate::attention::rows::{Valid, copy_rows, gather, normalise};
use crate::attention::workspace::{BLOCK, Scratch};
use crate::kernel::FeatureMap;
use crate::real::Real;
use crate::simd::{Ahead, padded};

/// All keys of one key-value head into the sums, then all queries of its group out of it.
///
/// # Shapes
/// - `q`: `[group, n_q, d]`, `k`: `[n_k, d]`, `v`: `[n_k, e]`, `out`: `[group, n_q, e]`.
pub(super) fn full<T: Real, M: FeatureMap<T>>(
    head: &Head<'_, T, M>,
    q: ArrayView3<'_, T>,
    k: ArrayView2<'_, T>,
    v: ArrayView2<'_, T>,
    valid: Valid<'_>,
    mut out: ArrayViewMut3<'_, T>,
    scratch: &mut Scratch<T>,
) {
    let (mut state, mut values) = (std::mem::take(&mut scratch.sums), std::mem::take(&mut scratch.v));
    state.reset();
    let mut ahead = Ahead::of([k, v]);
    for start in (0..k.nrows()).step_by(BLOCK) {
        let end = k.nrows().min(start + BLOCK);
        gather(head.ops, k, start..end, valid, head.scale, &mut scratch.y, &scratch.zeros);
        copy_rows(head.ops, v, start..end, valid, &mut values);
        ahead.aim(end, BLOCK);
        let valid = valid.map(|valid| &valid[start..end]);
        state.absorb(head, start, end - start, valid, &values, scratch, Some(&mut ahead));
    }
    scratch.v = values;
    if !state.started {
        out.fill(T::zero());
    }
    for (q, mut out) in q.outer_iter().zip(out.outer_iter_mut()).filter(|_| state.started) {
        let mut ahead = Ahead::of([q, out.view()]);
        for start in (0..q.nrows()).step_by(BLOCK) {
            let end = q.nrows().min(start + BLOCK);
            gather(head.ops, q, start..end, None, head.scale, &mut scratch.x, &scratch.zeros);
            let Scratch { x, a, o, column, top, total, map, .. } = scratch;
            let width = padded(end - start);
            let a = &mut a[..head.features * width];
            head.map.query_panel(width, &x[..head.dim * width], a, map);
            (head.ops.column_max)(a, &state.reference, &mut top[..width]);
            column.iter_mut().zip(&top[..width]).for_each(|(shift, &top)| *shift = -top);
            ahead.aim(end, BLOCK);
            state.read(head.ops, a, end - start, &column[..width], &mut total[..width], o, Some(&mut ahead));
            for i in 0..end - start {
                normalise(&o[i * head.value_stride..], total[i], out.row_mut(start + i));
            }
        }
    }
    scratch.sums = state;
}
