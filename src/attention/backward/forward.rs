//! From the sums' beginning to their end.

use std::ops::Range;

use ndarray::Axis;

use super::buffers::Buffers;
use super::pass::{GradientSinks, KEYS, OutputGradient, Pass, bands, position_moment};
use super::tape::{Event, Kind, Tape};
use super::window_keys::window_block;
use crate::Real;
use crate::attention::Causality;
use crate::attention::linear::state::{Sums, key_scores, last_place, wins};
use crate::attention::rows::{Rows, put_row};
use crate::attention::scratch::{BLOCK, CAUSAL_BLOCK};
use crate::kernel::{DifferentiableMap, PanelGradients};
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, padded, transpose};

/// From the sums' beginning to their end.
pub(crate) struct Forward<'p, 'a, 'u, 'g, T: Real, M: DifferentiableMap<T>> {
    pub(crate) tape: &'p mut Tape<T>,
    pub(crate) pass: &'p Pass<'a, T, M>,
    pub(crate) state: &'p mut Sums<T>,
    pub(crate) output_gradient: &'p mut OutputGradient<'u, T>,
    pub(crate) sinks: Option<&'p mut GradientSinks<'g, T, M::Sums>>,
    /// Position that positions are counted from.
    pub(crate) origin: usize,
    pub(crate) ahead: Ahead<T>,
}

impl<T: Real, M: DifferentiableMap<T>> Forward<'_, '_, '_, '_, T, M> {
    pub(crate) fn run(&mut self) {
        let (queries, keys) = (self.pass.q.shape()[1], self.pass.k.nrows());
        let mut start = 0;
        match (self.pass.causality, self.pass.window) {
            (Causality::Bidirectional, _) => {
                for start in (0..keys).step_by(BLOCK) {
                    self.ahead.aim_some(0..KEYS, start + BLOCK, BLOCK);
                    self.absorb(start..keys.min(start + BLOCK));
                }
                for start in (0..queries).step_by(BLOCK) {
                    self.ahead.aim_some(KEYS..usize::MAX, start + BLOCK, BLOCK);
                    self.read(start..queries.min(start + BLOCK), 0..0);
                }
            }
            (Causality::Causal, None) => {
                while start < queries {
                    start = self.both(start..queries.min(start + CAUSAL_BLOCK));
                }
            }
            (Causality::Causal, Some(window)) => {
                let mut absorbed = self.pass.single.len();
                while start < queries {
                    let (end, first) = window_block(self.pass, window, start);
                    self.ahead.aim(end, BLOCK);
                    self.absorb(absorbed..first.max(absorbed));
                    absorbed = first.max(absorbed);
                    self.read(start..end, first..self.pass.lead + end);
                    start = end;
                }
            }
        }
    }

    /// The keys' log-features into `b`, their values into `v_rows`.
    fn log_features(&mut self, keys: Range<usize>) {
        let (ops, pass, width) = (T::ops(), self.pass, padded(keys.len()));
        let dim = pass.k.ncols();
        let Buffers { x, b, v_rows, feature, zeros, map, .. } = &mut self.tape.block;
        let b = &mut b[..feature.len() * width];
        _ = Rows { array: pass.k, tokens: keys.clone(), valid: pass.valid }.gather(
            ops,
            pass.key_scale,
            x,
            zeros,
        );
        _ = Rows { array: pass.v, tokens: keys, valid: pass.valid }.copy(ops, v_rows);
        pass.map.key_panel(width, &x[..dim * width], b, map);
    }

    /// The weights of a block's keys in the sums' frame, from their log-features in `b`; those at
    /// no position do not count. Moves the frame where they leave it. Returns how many of them keep
    /// to it: all, unless `causal`, when the frame must not depend on later tokens.
    fn weigh(&mut self, positions: &[Option<usize>], causal: bool) -> usize {
        let (ops, pass) = (T::ops(), self.pass);
        let (width, mut tokens) = (padded(positions.len()), positions.len());
        let Buffers { b, column, top, feature, .. } = &mut self.tape.block;
        let b = &mut b[..feature.len() * width];
        let (column, top) = (&mut column[..width], &mut top[..width]);
        let exponents = |state: &Sums<T>, column: &mut [T]| {
            state.exponents(pass.log_decay, tokens, |j| positions[j], column);
        };
        exponents(self.state, column);
        let mut above = self.state.first_above(ops, b, column, top, feature);
        let moved = if causal { above == Some(0) } else { above.is_some() };
        if moved {
            if causal {
                feature
                    .iter_mut()
                    .zip(b.chunks_exact(width))
                    .for_each(|(candidate, b)| *candidate = b[0]);
                let position = positions[0].unwrap_or(0);
                self.state.rebase(ops, pass.log_decay, position, feature);
                exponents(self.state, column);
                above = self.state.first_above(ops, b, column, top, feature);
            } else {
                self.state.raise(ops, pass.log_decay, positions, b, column, feature);
            }
        }
        if causal {
            tokens = above.unwrap_or(tokens);
            column[tokens..].fill(T::NEG_INFINITY);
        }
        if self.state.started {
            feature.iter_mut().zip(&self.state.reference).for_each(|(negated, &c)| *negated = -c);
            (ops.exp_panel)(b, feature, column);
        }
        if moved {
            self.tape.push_frame(self.state);
        }
        tokens
    }

    fn push_event(&mut self, kind: Kind, tokens: Range<usize>) {
        if self.state.started && self.sinks.is_some() {
            self.tape.events.push(Event { kind, tokens, frame: self.tape.positions.len() - 1 });
        }
    }

    /// Keys join the sums, but for those that are kept.
    fn absorb(&mut self, keys: Range<usize>) {
        for start in keys.clone().step_by(BLOCK) {
            let keys = start..keys.end.min(start + BLOCK);
            self.log_features(keys.clone());
            let mut positions = self.positions(keys.clone());
            let positions = &mut positions[..keys.len()];
            let gone = self.keep(keys.clone(), positions);
            // Without a window masked keys have gradients written too.
            if self.pass.window.is_none() || positions.iter().any(Option::is_some) {
                self.add(Kind::Absorb, keys, positions);
            }
            for key in gone {
                self.log_features(key..key + 1);
                self.add(Kind::Return, key..key + 1, &[Some(self.pass.position(key))]);
            }
        }
    }

    /// Positions of those of the keys that leave the window.
    fn positions(&self, keys: Range<usize>) -> [Option<usize>; BLOCK] {
        let mut positions = [None; BLOCK];
        for (position, j) in positions.iter_mut().zip(keys) {
            *position = self.pass.leaves(j).then_some(self.pass.position(j));
        }
        positions
    }

    /// The keys of the largest scores are kept, and lose their position here; those are returned
    /// whose place was taken.
    fn keep(&mut self, keys: Range<usize>, positions: &mut [Option<usize>]) -> Vec<usize> {
        let mut gone = Vec::new();
        let room = self.pass.window.map_or(0, |window| window.kept);
        if room == 0 {
            return gone;
        }
        let Tape { kept, scores, chosen, block: Buffers { b, column, feature, .. }, .. } =
            &mut *self.tape;
        let (width, m) = (padded(keys.len()), feature.len());
        let column = &mut column[..width];
        key_scores(&b[..m * width], column, feature);
        let mut place = last_place(room, (scores, kept));
        for ((key, position), &score) in keys.zip(positions).zip(&*column) {
            let Some(at) = *position else { continue };
            let score = score.to_f64() - self.pass.log_decay * at as f64 + 0.0;
            if !wins(place, (scores, kept), (score, key)) {
                continue;
            }
            if place == kept.len() {
                kept.push(key);
                scores.push(score);
            } else {
                gone.push(std::mem::replace(&mut kept[place], key));
                scores[place] = score;
            }
            chosen.push(key);
            *position = None;
            place = last_place(room, (scores, kept));
        }
        gone
    }

    /// Keys at `positions`, whose log-features are in `b`, join the sums.
    fn add(&mut self, kind: Kind, keys: Range<usize>, positions: &[Option<usize>]) {
        self.weigh(positions, false);
        self.push_event(kind, keys.clone());
        self.join(keys.len(), padded(keys.len()));
    }

    /// The weighed keys of a block join the sums.
    fn join(&mut self, tokens: usize, width: usize) {
        if self.state.started {
            let Buffers { b, v_rows, feature, .. } = &mut self.tape.block;
            let b = &b[..feature.len() * width];
            feature.fill(T::ZERO);
            (T::ops().add_row_sums)(b, feature);
            let weights = MatRef::new(b, feature.len(), tokens, width);
            let values = MatRef::packed(v_rows, tokens, self.state.stride());
            self.state.accumulate(T::ops(), weights, feature, values, &mut self.ahead);
        }
    }

    /// Queries read the sums, sinks, and the `keys` in the window.
    fn read(&mut self, queries: Range<usize>, keys: Range<usize>) {
        if keys.is_empty() || self.pass.given.is_some() {
            self.tape.window.clear();
        } else {
            let Tape { window, kept, block, .. } = &mut *self.tape;
            window.load(self.pass, kept, keys, &block.zeros);
        }
        self.push_event(Kind::Read, queries.clone());
        for h in 0..self.pass.q.shape()[0] {
            self.query(h, queries.clone(), 0);
        }
    }

    /// Queries read the sums and the keys of their own block; returns where the block ends.
    fn both(&mut self, block: Range<usize>) -> usize {
        let width = padded(block.len());
        self.tape.window.clear();
        self.log_features(block.clone());
        let tokens = self.weigh(&self.positions(block.clone())[..block.len()], true);
        let block = block.start..block.start + tokens;
        self.ahead.aim(block.end, CAUSAL_BLOCK);
        self.push_event(Kind::Both, block.clone());
        for h in 0..self.pass.q.shape()[0] {
            self.query(h, block.clone(), width);
        }
        // Nobody in the pass reads the last block's keys.
        if block.end < self.pass.q.shape()[1] || self.pass.after.is_some() {
            self.join(tokens, width);
        }
        block.end
    }

    /// One query head's queries of a block; `own` is the width of the panel of the block's own
    /// keys, 0 for none.
    fn query(&mut self, h: usize, queries: Range<usize>, own: usize) {
        let own = if self.state.started { own } else { 0 };
        self.weights(h, queries.clone(), own);
        let width = padded(queries.len());
        if let OutputGradient::Loss(_) = self.output_gradient {
            self.output(h, queries.clone(), own);
        }
        let stride = padded(self.pass.v.ncols());
        let Buffers { g_rows, o, .. } = &mut self.tape.block;
        match &mut self.output_gradient {
            OutputGradient::Rows(rows) => {
                _ = Rows {
                    array: rows.index_axis(Axis(0), h),
                    tokens: queries.clone(),
                    valid: None,
                }
                .copy(T::ops(), g_rows);
            }
            OutputGradient::Loss(loss) => {
                loss(
                    h,
                    queries.clone(),
                    &o[..queries.len() * stride],
                    &mut g_rows[..queries.len() * stride],
                );
            }
        }
        if self.sinks.is_none() {
            return;
        }
        g_rows[queries.len() * stride..width * stride].fill(T::ZERO);
        if !self.tape.output_gradient.is_empty() {
            let at = (h * self.pass.q.shape()[1] + queries.start) * stride;
            self.tape.output_gradient[at..at + queries.len() * stride]
                .copy_from_slice(&g_rows[..queries.len() * stride]);
        }
        self.deltas(h, queries.clone(), own);
        self.feature_gradients(queries.clone(), own);
        if self.sinks.as_ref().is_some_and(|sinks| sinks.inputs.is_some()) {
            self.window_gradients(queries.len());
            self.write_queries(h, queries);
        }
    }

    /// Weights of the far part into `a`, of exact keys into `window.p`, of the block's own
    /// keys into `s`, and their sum into `total`; all of them scaled by e^−top.
    fn weights(&mut self, h: usize, queries: Range<usize>, own: usize) {
        let (ops, pass, state, ahead) = (T::ops(), self.pass, &*self.state, &mut self.ahead);
        let (tokens, width, dim) = (queries.len(), padded(queries.len()), pass.q.shape()[2]);
        let position = pass.position + pass.lead + queries.start;
        let window = &mut self.tape.window;
        let Buffers {
            x,
            a,
            b,
            s,
            top,
            shift,
            total,
            inverse,
            column,
            feature,
            ones,
            zeros,
            map,
            ..
        } = &mut self.tape.block;
        let (top, shift, total, column) =
            (&mut top[..width], &mut shift[..width], &mut total[..width], &mut column[..width]);
        _ = Rows { array: pass.q.index_axis(Axis(0), h), tokens: queries.clone(), valid: None }
            .gather(ops, pass.query_scale, x, zeros);
        x[dim * width..padded(dim) * width].fill(T::ZERO);
        let a = &mut a[..feature.len() * width];
        total.fill(T::ZERO);
        top.fill(T::NEG_INFINITY);
        if state.started {
            pass.map.query_panel(width, &x[..dim * width], a, map);
            (ops.column_max)(a, &state.reference, top);
            for (i, (top, shift)) in top.iter_mut().zip(shift.iter_mut()).enumerate() {
                *shift = state.decay(pass.log_decay, position + i);
                *top += *shift;
            }
        } else {
            shift.fill(T::ZERO);
        }
        let rows = window.rows;
        if rows > 0 {
            let x = MatRef::packed(x, dim, width);
            window.score(pass, pass.lead + queries.start, x, ahead);
            (ops.column_max)(&window.p[..rows * width], &window.zeros[..rows], column);
            top.iter_mut().zip(column.iter()).for_each(|(top, &window)| *top = top.max(window));
        }
        let given = pass.given.map(|given| &given[h]);
        if let Some(given) = given {
            top.iter_mut()
                .zip(&given.top[queries.clone()])
                .for_each(|(top, &window)| *top = top.max(window));
        }
        for (top, shift) in top.iter_mut().zip(shift.iter_mut()) {
            *top = if *top > T::NEG_INFINITY { *top } else { T::ZERO };
            *shift -= *top;
        }
        if state.started {
            (ops.exp_dot)(a, &state.reference, shift, &state.norm, total);
        }
        if rows > 0 {
            column.iter_mut().zip(top.iter()).for_each(|(column, &top)| *column = -top);
            let p = &mut window.p[..rows * width];
            let (zeros, ones) = (&window.zeros[..rows], &window.ones[..rows]);
            // `inverse` is not needed yet.
            let sums = &mut inverse[..width];
            (ops.exp_dot)(p, zeros, column, ones, sums);
            total.iter_mut().zip(sums.iter()).for_each(|(total, &sum)| *total += sum);
        }
        if let Some(given) = given {
            for (i, query) in queries.enumerate() {
                total[i] += given.total[query] * (given.top[query] - top[i]).exp();
            }
        }
        if own > 0 {
            for (band, keys) in bands(tokens) {
                let (a, s) = (&a[band..], &mut s[band * width + band..]);
                (ops.matmul_ahead)(
                    MatMut::new(s, keys, width - band, width),
                    Accum::Replace,
                    MatRef::new(&b[band..], feature.len(), keys, own).t(),
                    MatRef::new(a, feature.len(), width - band, width),
                    Some(ahead),
                );
            }
            (ops.upper_less)(&mut s[..tokens * width], &zeros[..width]);
            (ops.matmul_ahead)(
                MatMut::new(total, 1, width, width),
                Accum::Add,
                MatRef::new(ones, 1, tokens, tokens),
                MatRef::new(s, tokens, width, width),
                Some(ahead),
            );
        }
    }

    /// Outputs of the block, into `o`.
    fn output(&mut self, h: usize, queries: Range<usize>, own: usize) {
        let (ops, pass, ahead) = (T::ops(), self.pass, &mut self.ahead);
        let (tokens, width, stride) =
            (queries.len(), padded(queries.len()), padded(pass.v.ncols()));
        let window = &self.tape.window;
        let Buffers { a, s, o, v_rows, top, total, feature, .. } = &mut self.tape.block;
        let o = &mut o[..tokens * stride];
        if self.state.started {
            (ops.matmul_ahead)(
                MatMut::new(o, tokens, stride, stride),
                Accum::Replace,
                MatRef::new(a, feature.len(), tokens, width).t(),
                MatRef::new(&self.state.numerator, feature.len(), stride, stride),
                Some(ahead),
            );
        } else {
            o.fill(T::ZERO);
        }
        if own > 0 {
            for (band, keys) in bands(tokens) {
                let (s, v, rows) =
                    (&s[band * width + band..], &v_rows[band * stride..], &mut o[band * stride..]);
                (ops.matmul_ahead)(
                    MatMut::new(rows, tokens - band, stride, stride),
                    Accum::Add,
                    MatRef::new(s, keys, tokens - band, width).t(),
                    MatRef::new(v, keys, stride, stride),
                    Some(ahead),
                );
            }
        }
        if window.rows > 0 {
            (ops.matmul_ahead)(
                MatMut::packed(o, tokens, stride),
                Accum::Add,
                MatRef::new(&window.p, window.rows, tokens, width).t(),
                MatRef::packed(&window.v, window.rows, stride),
                Some(ahead),
            );
        }
        for (i, (o, query)) in o.chunks_exact_mut(stride).zip(queries).enumerate() {
            if let Some(given) = pass.given.map(|given| &given[h]) {
                let factor = (given.top[query] - top[i]).exp();
                let row = &given.numerator[query * stride..(query + 1) * stride];
                (ops.matmul_ahead)(
                    MatMut::new(o, 1, stride, stride),
                    Accum::Add,
                    MatRef::new(&[factor], 1, 1, 1),
                    MatRef::new(row, 1, stride, stride),
                    Some(ahead),
                );
            }
            (ops.scale)(if total[i] > T::ZERO { T::ONE / total[i] } else { T::ZERO }, o);
        }
    }

    /// δ, and what is kept of the queries for the pass back. Leaves S·ȯ in `df`, ȯ·v in `window.dp`
    /// and `h`.
    fn deltas(&mut self, h: usize, queries: Range<usize>, own: usize) {
        let (ops, pass, state, ahead) = (T::ops(), self.pass, &*self.state, &mut self.ahead);
        let (tokens, width, stride) =
            (queries.len(), padded(queries.len()), padded(pass.v.ncols()));
        let window = &mut self.tape.window;
        let Buffers {
            a,
            df,
            s,
            h: products,
            v_rows,
            v,
            g_rows,
            top,
            shift,
            total,
            inverse,
            delta,
            feature,
            zeros,
            ..
        } = &mut self.tape.block;
        let (delta, inverse) = (&mut delta[..width], &mut inverse[..width]);
        transpose(ops, stride, &g_rows[..width * stride], T::ONE, v);
        delta.fill(T::ZERO);
        if state.started {
            let df = &mut df[..feature.len() * width];
            if state.is_empty() {
                df.fill(T::ZERO);
            } else {
                (ops.matmul_ahead)(
                    MatMut::new(df, feature.len(), width, width),
                    Accum::Replace,
                    MatRef::new(&state.numerator, feature.len(), stride, stride),
                    MatRef::new(v, stride, width, width),
                    Some(ahead),
                );
                (ops.column_dot)(&a[..feature.len() * width], df, delta);
            }
        }
        if own > 0 {
            for (band, keys) in bands(tokens) {
                let (rows, to) = (&v_rows[band * stride..], &mut products[band * width + band..]);
                (ops.matmul_ahead)(
                    MatMut::new(to, keys, width - band, width),
                    Accum::Replace,
                    MatRef::new(rows, keys, stride, stride),
                    MatRef::new(&v[band..], stride, width - band, width),
                    Some(ahead),
                );
            }
            (ops.upper_less)(&mut products[..tokens * width], &zeros[..width]);
            (ops.column_dot)(&s[..tokens * width], &products[..tokens * width], delta);
        }
        if window.rows > 0 {
            let dp = &mut window.dp[..window.rows * width];
            (ops.matmul_ahead)(
                MatMut::packed(dp, window.rows, width),
                Accum::Replace,
                MatRef::packed(&window.v, window.rows, stride),
                MatRef::packed(v, stride, width),
                Some(ahead),
            );
            (ops.column_dot)(&window.p[..window.rows * width], dp, delta);
        }
        for (i, query) in queries.clone().enumerate() {
            if let Some(given) = pass.given.map(|given| &given[h]) {
                let numerator = &given.numerator[query * stride..(query + 1) * stride];
                let mut dot = [T::ZERO];
                (ops.matvec)(numerator, stride, &g_rows[i * stride..(i + 1) * stride], &mut dot);
                delta[i] += dot[0] * (given.top[query] - top[i]).exp();
            }
        }
        let at = h * pass.q.shape()[1] + queries.start;
        for i in 0..width {
            inverse[i] = if total[i] > T::ZERO { T::ONE / total[i] } else { T::ZERO };
            delta[i] *= inverse[i];
            self.tape.finite &= i >= tokens || total[i] < -T::NEG_INFINITY;
            if i < tokens && total[i] > T::ZERO {
                self.tape.shifts[at + i] = shift[i] - total[i].ln();
                self.tape.deltas[at + i] = delta[i];
            }
        }
    }

    /// From the gradient of the features to those of the map, λ and (into `dx`) the queries.
    fn feature_gradients(&mut self, queries: Range<usize>, own: usize) {
        let (ops, pass, state, ahead) = (T::ops(), self.pass, &*self.state, &mut self.ahead);
        let (tokens, width, dim) = (queries.len(), padded(queries.len()), pass.q.shape()[2]);
        let Some(sinks) = &mut self.sinks else { return };
        let Buffers { x, dx, a, b, df, h, inverse, delta, column, feature, map, .. } =
            &mut self.tape.block;
        dx[..padded(dim) * width].fill(T::ZERO);
        if !state.started {
            return;
        }
        let df = &mut df[..feature.len() * width];
        if own > 0 {
            (ops.upper_less)(&mut h[..tokens * width], &delta[..width]);
            for (band, keys) in bands(tokens) {
                let (h, df) = (&h[band * width + band..], &mut df[band..]);
                (ops.matmul_ahead)(
                    MatMut::new(df, feature.len(), width - band, width),
                    Accum::Add,
                    MatRef::new(&b[band..], feature.len(), keys, own),
                    MatRef::new(h, keys, width - band, width),
                    Some(ahead),
                );
            }
        }
        let (inverse, delta, column) = (&inverse[..width], &delta[..width], &mut column[..width]);
        (ops.log_weight_vjp)(df, &a[..feature.len() * width], inverse, &state.norm, delta, column);
        let position = pass.position + pass.lead + queries.start;
        *sinks.log_decay +=
            position_moment(position as f64 - self.origin as f64, &column[..tokens]);
        let dx = sinks.inputs.is_some().then(|| &mut dx[..dim * width]);
        let panel = PanelGradients { width, x: &x[..dim * width], grad: df, grad_x: dx };
        pass.map.query_vjp(panel, sinks.sums, map);
    }

    /// The part of exact keys in the gradients of queries, keys and values.
    fn window_gradients(&mut self, tokens: usize) {
        let rows = self.tape.window.rows;
        if rows == 0 {
            return;
        }
        let (ops, pass, ahead) = (T::ops(), self.pass, &mut self.ahead);
        let (width, dim, stride) = (padded(tokens), pass.k.ncols(), padded(pass.v.ncols()));
        let dim_stride = padded(dim);
        let Tape { window, block, keys, values, .. } = &mut *self.tape;
        let Buffers { x, x_rows, dx, g_rows, o, inverse, delta, column, .. } = block;
        (ops.log_weight_vjp)(
            &mut window.dp[..rows * width],
            &window.p[..rows * width],
            &inverse[..width],
            &window.ones[..rows],
            &delta[..width],
            &mut column[..width],
        );
        for (row, count, y) in window.panels(dim) {
            (ops.matmul_ahead)(
                MatMut::packed(&mut dx[..], dim, width),
                Accum::Add,
                MatRef::new(y, dim, count, padded(count)),
                MatRef::packed(&window.dp[row * width..], count, width),
                Some(&mut *ahead),
            );
        }
        transpose(ops, width, &x[..dim_stride * width], T::ONE, x_rows);
        for ((to, from), &inverse) in
            o.chunks_exact_mut(stride).zip(g_rows.chunks_exact(stride)).zip(&inverse[..tokens])
        {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * inverse);
        }
        let mut row = 0;
        for run in &window.runs {
            let weights = row * width;
            (ops.matmul_ahead)(
                MatMut::packed(&mut keys[run.start * dim_stride..], run.len(), dim_stride),
                Accum::Add,
                MatRef::new(&window.dp[weights..], run.len(), tokens, width),
                MatRef::packed(x_rows, tokens, dim_stride),
                Some(&mut *ahead),
            );
            (ops.matmul_ahead)(
                MatMut::packed(&mut values[run.start * stride..], run.len(), stride),
                Accum::Add,
                MatRef::new(&window.p[weights..], run.len(), tokens, width),
                MatRef::packed(o, tokens, stride),
                Some(&mut *ahead),
            );
            row += run.len();
        }
    }

    /// `dx` becomes rows of the queries' gradient.
    fn write_queries(&mut self, h: usize, queries: Range<usize>) {
        let (width, dim) = (padded(queries.len()), self.pass.q.shape()[2]);
        let stride = padded(dim);
        let Buffers { dx, x_rows, .. } = &mut self.tape.block;
        transpose(T::ops(), width, &dx[..stride * width], T::ONE, x_rows);
        if let Some(inputs) = self.sinks.as_mut().and_then(|sinks| sinks.inputs.as_mut()) {
            let mut out = inputs.q.index_axis_mut(Axis(0), h);
            for (query, row) in queries.zip(x_rows.chunks_exact(stride)) {
                put_row(row, self.pass.query_scale, out.row_mut(query));
            }
        }
    }
}
