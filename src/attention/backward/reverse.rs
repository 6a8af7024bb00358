//! From the sums' end to their beginning.

use std::ops::Range;

use ndarray::{ArrayView3, Axis};

use super::buffers::Buffers;
use super::pass::{GradientSinks, InputGradients, KEYS, Pass, bands, position_moment};
use super::tape::{Kind, Tape};
use crate::Real;
use crate::attention::rows::{Rows, put_row};
use crate::kernel::{DifferentiableMap, PanelGradients};
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, padded, transpose};

/// From the sums' end to their beginning.
pub(crate) struct Reverse<'p, 'a, 'g, T: Real, M: DifferentiableMap<T>> {
    pub(crate) tape: &'p mut Tape<T>,
    pub(crate) pass: &'p Pass<'a, T, M>,
    /// ȯ, unless the tape holds it.
    pub(crate) output_gradient: Option<ArrayView3<'p, T>>,
    pub(crate) sinks: &'p mut GradientSinks<'g, T, M::Sums>,
    pub(crate) origin: usize,
    /// The frame that R and r are in.
    pub(crate) frame: usize,
    pub(crate) ahead: Ahead<T>,
    /// R and r are wanted of all queries, as gradients of the sums that the pass started from.
    pub(crate) from_state: bool,
    /// R and r hold queries already.
    pub(crate) later: bool,
}

impl<T: Real, M: DifferentiableMap<T>> Reverse<'_, '_, '_, T, M> {
    pub(crate) fn run(&mut self) {
        let events = std::mem::take(&mut self.tape.events);
        for (i, event) in events.iter().enumerate().rev() {
            self.move_to(event.frame);
            if let Some(next) = events[..i].last() {
                let arrays = match next.kind {
                    Kind::Read => KEYS..usize::MAX,
                    Kind::Absorb | Kind::Return => 0..KEYS,
                    Kind::Both => 0..usize::MAX,
                };
                self.ahead.aim_some(arrays, next.tokens.start, next.tokens.len());
            }
            let width = padded(event.tokens.len());
            match event.kind {
                Kind::Read => (0..self.pass.q.shape()[0])
                    .for_each(|h| self.collect(h, event.tokens.clone(), 0, true)),
                Kind::Absorb | Kind::Return | Kind::Both => {
                    self.weigh(event.tokens.clone(), event.kind);
                    self.later_queries(event.tokens.clone());
                    if event.kind == Kind::Both {
                        let earlier = self.from_state || i > 0;
                        (0..self.pass.q.shape()[0])
                            .for_each(|h| self.collect(h, event.tokens.clone(), width, earlier));
                    }
                    self.key_gradients(event.tokens.clone());
                    self.write_keys(event.tokens.clone());
                }
            }
        }
        self.move_to(0);
        self.tape.events = events;
    }

    /// Moves R and r from the frame they are in to an earlier one.
    fn move_to(&mut self, frame: usize) {
        if self.frame != usize::MAX && self.frame != frame {
            let (m, stride) = (self.tape.norm.len(), self.tape.sums.len() / self.tape.norm.len());
            let distance = self.tape.positions[self.frame] - self.tape.positions[frame];
            let decay = T::from_f64(self.pass.log_decay * distance as f64);
            for f in 0..m {
                let (to, from) =
                    (self.tape.references[frame * m + f], self.tape.references[self.frame * m + f]);
                let factor = (to + decay - from).exp();
                if factor != T::ONE {
                    (T::ops().scale)(factor, &mut self.tape.sums[f * stride..(f + 1) * stride]);
                    self.tape.norm[f] *= factor;
                }
            }
        }
        self.frame = frame;
    }

    /// The keys' weights into `b`, values into `v_rows` and `v`.
    fn weigh(&mut self, keys: Range<usize>, kind: Kind) {
        let (ops, pass) = (T::ops(), self.pass);
        let (width, dim, stride) = (padded(keys.len()), pass.k.ncols(), padded(pass.v.ncols()));
        let Buffers { x, b, v_rows, v, column, feature, zeros, map, .. } = &mut self.tape.block;
        let (b, column) = (&mut b[..feature.len() * width], &mut column[..width]);
        _ = Rows { array: pass.k, tokens: keys.clone(), valid: pass.valid }.gather(
            ops,
            pass.key_scale,
            x,
            zeros,
        );
        pass.map.key_panel(width, &x[..dim * width], b, map);
        _ = Rows { array: pass.v, tokens: keys.clone(), valid: pass.valid }.copy(ops, v_rows);
        v_rows[keys.len() * stride..width * stride].fill(T::ZERO);
        transpose(ops, stride, &v_rows[..width * stride], T::ONE, v);
        let reference = &self.tape.references[self.frame * feature.len()..][..feature.len()];
        feature.iter_mut().zip(reference).for_each(|(negated, &c)| *negated = -c);
        column.fill(T::NEG_INFINITY);
        let chosen = |j: &usize| self.tape.chosen.binary_search(j).is_ok();
        let joins = |j: &usize| kind == Kind::Return || pass.leaves(*j) && !chosen(j);
        for (exponent, j) in column.iter_mut().zip(keys).filter(|(_, j)| joins(j)) {
            let distance = pass.position(j) as f64 - self.tape.positions[self.frame] as f64;
            *exponent = T::from_f64(-pass.log_decay * distance);
        }
        (ops.exp_panel)(b, feature, column);
    }

    /// What the queries after the block do to its keys: R·v into `df`, r into `feature`, and their
    /// part of v̇.
    fn later_queries(&mut self, keys: Range<usize>) {
        let (ops, ahead) = (T::ops(), &mut self.ahead);
        let (width, stride) = (padded(keys.len()), padded(self.pass.v.ncols()));
        let Buffers { b, df, v, dv_rows, feature, .. } = &mut self.tape.block;
        let m = feature.len();
        feature.copy_from_slice(&self.tape.norm);
        if !self.later {
            df[..m * width].fill(T::ZERO);
            dv_rows[..keys.len() * stride].fill(T::ZERO);
            return;
        }
        (ops.matmul_ahead)(
            MatMut::new(df, m, width, width),
            Accum::Replace,
            MatRef::new(&self.tape.sums, m, stride, stride),
            MatRef::new(v, stride, width, width),
            Some(ahead),
        );
        if self.sinks.inputs.is_some() {
            (ops.matmul_ahead)(
                MatMut::new(dv_rows, keys.len(), stride, stride),
                Accum::Replace,
                MatRef::new(b, m, keys.len(), width).t(),
                MatRef::new(&self.tape.sums, m, stride, stride),
                Some(ahead),
            );
        }
    }

    /// One query head's queries join R and r. With `own` > 0, the width of the panel of their
    /// block's own keys, they meet those first. R and r are left alone unless there are `earlier`
    /// keys to read them.
    fn collect(&mut self, h: usize, queries: Range<usize>, own: usize, earlier: bool) {
        let (ops, pass, ahead) = (T::ops(), self.pass, &mut self.ahead);
        let (tokens, width, dim, stride) =
            (queries.len(), padded(queries.len()), pass.q.shape()[2], padded(pass.v.ncols()));
        let Buffers {
            x_rows,
            a,
            b,
            df,
            s,
            h: products,
            v,
            g_rows,
            dv_rows,
            shift,
            delta,
            feature,
            zeros,
            map,
            ..
        } = &mut self.tape.block;
        let m = feature.len();
        // The keys of the block are in `x`.
        let x = x_rows;
        _ = Rows { array: pass.q.index_axis(Axis(0), h), tokens: queries.clone(), valid: None }
            .gather(ops, pass.query_scale, x, zeros);
        let (a, shift, delta) = (&mut a[..m * width], &mut shift[..width], &mut delta[..width]);
        pass.map.query_panel(width, &x[..dim * width], a, map);
        let at = h * pass.q.shape()[1] + queries.start;
        shift.fill(T::NEG_INFINITY);
        delta.fill(T::ZERO);
        shift[..tokens].copy_from_slice(&self.tape.shifts[at..at + tokens]);
        delta[..tokens].copy_from_slice(&self.tape.deltas[at..at + tokens]);
        (ops.exp_panel)(a, &self.tape.references[self.frame * m..][..m], shift);
        match &self.output_gradient {
            Some(rows) => {
                _ = Rows { array: rows.index_axis(Axis(0), h), tokens: queries, valid: None }
                    .copy(ops, g_rows);
            }
            None => g_rows[..tokens * stride]
                .copy_from_slice(&self.tape.output_gradient[at * stride..(at + tokens) * stride]),
        }
        let g_rows = &g_rows[..tokens * stride];
        if own > 0 {
            if self.sinks.inputs.is_some() {
                for (band, keys) in bands(tokens) {
                    let (a, s) = (&a[band..], &mut s[band * width + band..]);
                    (ops.matmul_ahead)(
                        MatMut::new(s, keys, width - band, width),
                        Accum::Replace,
                        MatRef::new(&b[band..], m, keys, own).t(),
                        MatRef::new(a, m, width - band, width),
                        Some(ahead),
                    );
                }
                (ops.upper_less)(&mut s[..tokens * width], &zeros[..width]);
                for (band, keys) in bands(tokens) {
                    let (s, g, rows) = (
                        &s[band * width + band..],
                        &g_rows[band * stride..],
                        &mut dv_rows[band * stride..],
                    );
                    (ops.matmul_ahead)(
                        MatMut::new(rows, keys, stride, stride),
                        Accum::Add,
                        MatRef::new(s, keys, tokens - band, width),
                        MatRef::new(g, tokens - band, stride, stride),
                        Some(ahead),
                    );
                }
            }
            // Rows are queries here: query i sees the keys up to its own.
            for (band, count) in bands(tokens) {
                let (g, to) = (&g_rows[band * stride..], &mut products[band * own..]);
                (ops.matmul_ahead)(
                    MatMut::new(to, count, padded(band + count), own),
                    Accum::Replace,
                    MatRef::new(g, count, stride, stride),
                    MatRef::new(v, stride, padded(band + count), own),
                    Some(ahead),
                );
            }
            (ops.lower_less)(&mut products[..tokens * own], own, &delta[..tokens]);
            for (band, count) in bands(tokens) {
                let (a, h) = (&a[band..], &products[band * own..]);
                (ops.matmul_ahead)(
                    MatMut::new(df, m, padded(band + count), own),
                    Accum::Add,
                    MatRef::new(a, m, count, width),
                    MatRef::new(h, count, padded(band + count), own),
                    Some(ahead),
                );
            }
        }
        if earlier {
            (ops.matmul_ahead)(
                MatMut::new(&mut self.tape.sums, m, stride, stride),
                Accum::Add,
                MatRef::new(a, m, tokens, width),
                MatRef::new(g_rows, tokens, stride, stride),
                Some(ahead),
            );
            (ops.matvec)(a, width, delta, &mut self.tape.norm);
            self.later = true;
        }
    }

    /// From the gradient of the features to those of the map, λ and the keys.
    fn key_gradients(&mut self, keys: Range<usize>) {
        let (ops, pass) = (T::ops(), self.pass);
        let (width, dim) = (padded(keys.len()), pass.k.ncols());
        let stride = padded(dim);
        let Buffers { x, x_rows, dx, b, df, column, feature, ones, map, .. } = &mut self.tape.block;
        let m = feature.len();
        let (df, column, ones) = (&mut df[..m * width], &mut column[..width], &ones[..width]);
        (ops.log_weight_vjp)(df, &b[..m * width], ones, feature, ones, column);
        let first = pass.position(keys.start) as f64 - self.origin as f64;
        *self.sinks.log_decay -= position_moment(first, &column[..keys.len()]);
        dx[..stride * width].fill(T::ZERO);
        let wanted = self.sinks.inputs.is_some().then(|| &mut dx[..dim * width]);
        let panel = PanelGradients { width, x: &x[..dim * width], grad: df, grad_x: wanted };
        pass.map.key_vjp(panel, self.sinks.sums, map);
        if self.sinks.inputs.is_some() {
            transpose(ops, width, &dx[..stride * width], T::ONE, x_rows);
        }
    }

    /// What `x_rows` and `dv_rows` hold is the block's part of the gradients of keys and values,
    /// all of it without a local window.
    fn write_keys(&mut self, keys: Range<usize>) {
        let (key_stride, value_stride) = (padded(self.pass.k.ncols()), padded(self.pass.v.ncols()));
        let Some(InputGradients { k: out_k, v: out_v, .. }) = &mut self.sinks.inputs else {
            return;
        };
        let Tape {
            keys: all_keys, values: all_values, block: Buffers { x_rows, dv_rows, .. }, ..
        } = &mut *self.tape;
        if all_keys.is_empty() {
            for ((key, x), v) in
                keys.zip(x_rows.chunks_exact(key_stride)).zip(dv_rows.chunks_exact(value_stride))
            {
                put_row(x, self.pass.key_scale, out_k.row_mut(key));
                put_row(v, T::ONE, out_v.row_mut(key));
            }
        } else {
            for (all, stride, block) in
                [(all_keys, key_stride, x_rows), (all_values, value_stride, dv_rows)]
            {
                let rows = &mut all[keys.start * stride..keys.end * stride];
                rows.iter_mut().zip(block.iter()).for_each(|(to, &from)| *to += from);
            }
        }
    }
}
