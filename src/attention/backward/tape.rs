//! The engine of every backward pass: one head forward and back, block by block.
//!
//! ```text
//! P_ij  = A_ij / D_i                D_i the normaliser, δ_i = ȯ_i·o_i, ȯ the gradient of the outputs
//! window:   ṡ_ij = P_ij (ȯ_i·v_j − δ_i)      v̇_j += P_ij ȯ_i     ẋ_i += Σ_j ṡ_ij y_j     ẏ_j += Σ_i ṡ_ij x_i
//! far:    w_if = exp(a_if + c_f + λ(p_i − p₀)) / D_i           k_jf = exp(b_jf − c_f − λ(p_j − p₀))
//!         ȧ_if = w_if (S_f·ȯ_i − δ_i z_f)                      S, z  = Σ_j k_jf (v_j, 1)    keys before i
//!         ḃ_jf = k_jf (R_f·v_j − r_f)                          R, r  = Σ_i w_if (ȯ_i, δ_i)  queries after j
//!         v̇_j += Σ_f k_jf R_f                                  λ̇     = Σ_i p_i Σ_f ȧ_if − Σ_j p_j Σ_f ḃ_jf
//! ```
//!
//! Forward, the sums S, z grow as in the [attention](crate::attention) itself, and give ȧ;
//! backward, R, r grow, and give ḃ. Features are computed again where they are needed. What is kept
//! from the first to the second pass is two numbers per query, and the *frames* (c, p₀) of the
//! sums, which are constants to differentiate by: going back from one frame to the one before, R is
//! multiplied by exp(c + λ(p₀′ − p₀) − c′) ≤ 1. So w and k are never out of range together.
//!
//! Inside a block of purely causal attention, queries and keys meet in the products of their
//! features, as in the forward pass.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, Axis, s};

use crate::Real;
use crate::attention::linear::state::Sums;
use crate::attention::rows::{Rows, Valid, put_row};
use crate::attention::scratch::{BLOCK, CAUSAL_BLOCK};
use crate::attention::{Causality, Window};
use crate::kernel::DifferentiableMap;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::low::simd::{Ahead, LANES, Ops, padded, transpose};

/// One key-value head, its group of query heads, and a stretch of tokens.
pub(super) struct Stretch<'a, T: 'static, M> {
    pub(super) map: &'a M,
    /// λ = log γ.
    pub(super) log_decay: f64,
    pub(super) causality: Causality,
    pub(super) window: Option<Window>,
    /// `[group, n_q, d]`.
    pub(super) q: ArrayView3<'a, T>,
    /// `[n_k, d]`.
    pub(super) k: ArrayView2<'a, T>,
    /// `[n_k, e]`.
    pub(super) v: ArrayView2<'a, T>,
    pub(super) valid: Valid<'a>,
    /// x = query_scale·q.
    pub(super) query_scale: T,
    /// y = key_scale·k.
    pub(super) key_scale: T,
    /// Position of the first key.
    pub(super) position: usize,
    /// Keys before that of the first query: ones in the window of an earlier state.
    pub(super) lead: usize,
    /// Sums over the window keys, one per query head, to be taken as constants.
    pub(super) given: Option<&'a [WindowSums<T>]>,
}

/// Arrays of an [`Ahead`] whose rows are keys; those of the queries follow.
const KEYS: usize = 4;

impl<T: Real, M> Stretch<'_, T, M> {
    /// Whether key `j` may be attended to.
    fn is_valid(&self, j: usize) -> bool {
        self.valid.is_none_or(|valid| valid[j])
    }

    /// Keys, values and their gradients, then queries and the gradients of their outputs, and in
    /// the forward pass those of the queries themselves.
    fn ahead(
        &self,
        upstream: &Upstream<'_, T>,
        inputs: Option<&InputGradients<'_, T>>,
        forward: bool,
    ) -> Ahead<T> {
        // Blocks are told by their queries in the forward pass, by their keys in the other.
        let first = if forward { self.lead.min(self.k.nrows()) } else { 0 };
        let kv = [self.k, self.v].map(|rows| rows.slice_move(s![first.., ..]));
        let written = inputs.filter(|_| !forward && self.window.is_none());
        let nothing = kv[0].slice(s![..0, ..]);
        let [grad_k, grad_v] =
            written.map_or([nothing, nothing], |inputs| [inputs.k.view(), inputs.v.view()]);
        let grad_q = inputs.filter(|_| forward).map(|inputs| inputs.q.view());
        let grad_out = if let Upstream::Rows(rows) = upstream { Some(*rows) } else { None };
        let of_queries = [Some(self.q), grad_out, grad_q]
            .into_iter()
            .flatten()
            .flat_map(|rows| rows.into_outer_iter());
        Ahead::of(kv.into_iter().chain([grad_k, grad_v]).chain(of_queries))
    }
}

/// exp(x·y)-weighted sums over the window keys of every query.
#[derive(Debug, Clone)]
pub(crate) struct WindowSums<T> {
    /// Σ_j exp(x_i·y_j − top_i) v_j, `[n, e_padded]`.
    pub(super) numerator: Vec<T>,
    /// Σ_j exp(x_i·y_j − top_i), `[n]`.
    pub(super) total: Vec<T>,
    /// max_j x_i·y_j, `[n]`; −∞ without keys.
    pub(super) top: Vec<T>,
}

/// Receives the outputs of a block, (query head, queries, `[tokens, e_padded]`), and writes their
/// gradients in the same shape.
pub(super) type Loss<'u, T> = &'u mut dyn FnMut(usize, Range<usize>, &[T], &mut [T]);

/// Where the gradient of the outputs comes from.
pub(super) enum Upstream<'u, T> {
    /// It is known, `[group, n_q, e]`.
    Rows(ArrayView3<'u, T>),
    /// It depends on the outputs.
    Loss(Loss<'u, T>),
}

/// Where gradients go.
pub(super) struct Targets<'g, T, S> {
    /// Of the map's parameters.
    pub(super) sums: &'g mut S,
    /// Of λ, added to.
    pub(super) log_decay: &'g mut f64,
    /// Of queries, keys and values, if anybody wants them.
    pub(super) inputs: Option<InputGradients<'g, T>>,
}

/// Where gradients of queries, keys and values go.
///
/// With a local window, whose keys are met in more than one block, `k` and `v` are left alone, and
/// [`Tape::keys`] and [`Tape::values`] filled instead.
pub(super) struct InputGradients<'g, T> {
    /// `[group, n_q, d]`
    pub(super) q: ArrayViewMut3<'g, T>,
    /// `[n_k, d]`
    pub(super) k: ArrayViewMut2<'g, T>,
    /// `[n_k, e]`
    pub(super) v: ArrayViewMut2<'g, T>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    /// Keys join the sums.
    Absorb,
    /// Queries read the sums.
    Read,
    /// Queries read the sums and the keys of their own block, which then join.
    Both,
}

/// What happened to the sums, in order.
#[derive(Debug, Clone)]
struct Event {
    kind: Kind,
    tokens: Range<usize>,
    frame: usize,
}

/// What the forward pass leaves for the backward one, and the memory of both. Made once, used for
/// many passes.
#[derive(Debug, Clone)]
pub(crate) struct Tape<T> {
    events: Vec<Event>,
    /// c of every frame, `[frames, m]`.
    references: Vec<T>,
    /// p₀ of every frame.
    positions: Vec<usize>,
    /// λ(p_i − p₀) − log D_i, `[group, n_q]`.
    shifts: Vec<T>,
    /// δ_i, `[group, n_q]`.
    deltas: Vec<T>,
    /// ȯ, if it came from a loss, `[group, n_q, e_padded]`.
    upstream: Vec<T>,
    /// ẏ with a local window, `[n_k, d_padded]`.
    pub(super) keys: Vec<T>,
    /// v̇ with a local window, `[n_k, e_padded]`.
    pub(super) values: Vec<T>,
    /// R, `[m, e_padded]`: at the end the gradient of the S the stretch started from.
    pub(super) sums: Vec<T>,
    /// r, `[m]`: at the end minus the gradient of the z the stretch started from.
    pub(super) norm: Vec<T>,
    state: Sums<T>,
    window: WindowBuffers<T>,
    block: Buffers<T>,
}

/// The window keys of a block.
#[derive(Debug, Clone, Default)]
struct WindowBuffers<T> {
    /// Scaled keys: panels `[d, BLOCK]`, one after the other.
    y: Vec<T>,
    /// Values `[keys, e_padded]`.
    v: Vec<T>,
    /// Scores, then weights, `[keys, width]`.
    p: Vec<T>,
    /// ȯ·v, then gradients of scores, `[keys, width]`.
    dp: Vec<T>,
    ones: Vec<T>,
    zeros: Vec<T>,
}

/// Panels and vectors of a block; contents are garbage between steps.
#[derive(Debug, Clone)]
struct Buffers<T> {
    /// Scaled queries or keys `[d_padded, width]`, rows beyond d zero.
    x: Vec<T>,
    /// Their transpose.
    x_rows: Vec<T>,
    /// Their gradient `[d_padded, width]`, rows beyond d zero.
    dx: Vec<T>,
    /// Query features `[m, width]`.
    a: Vec<T>,
    /// Key features `[m, width]`.
    b: Vec<T>,
    /// Gradient of features `[m, width]`.
    df: Vec<T>,
    /// Values `[width, e_padded]`.
    v_rows: Vec<T>,
    /// Values, or ȯ, `[e_padded, width]`.
    v: Vec<T>,
    /// ȯ `[width, e_padded]`.
    g_rows: Vec<T>,
    /// v̇ `[width, e_padded]`.
    dv_rows: Vec<T>,
    /// Outputs, or ȯ/D, `[width, e_padded]`.
    o: Vec<T>,
    /// Products of features `[width, width]`.
    s: Vec<T>,
    /// Products ȯ·v `[width, width]`.
    h: Vec<T>,
    top: Vec<T>,
    shift: Vec<T>,
    total: Vec<T>,
    inverse: Vec<T>,
    delta: Vec<T>,
    column: Vec<T>,
    feature: Vec<T>,
    ones: Vec<T>,
    zeros: Vec<T>,
    map: Vec<T>,
}

impl<T: Real> Buffers<T> {
    fn new(dim: usize, features: usize, value_dim: usize) -> Self {
        let (x, f, v) = (padded(dim) * BLOCK, features * BLOCK, padded(value_dim) * BLOCK);
        let zeros = |len| vec![T::ZERO; len];
        Self {
            x: zeros(x),
            x_rows: zeros(x),
            dx: zeros(x),
            a: zeros(f),
            b: zeros(f),
            df: zeros(f),
            v_rows: zeros(v),
            v: zeros(v),
            g_rows: zeros(v),
            dv_rows: zeros(v),
            o: zeros(v),
            s: zeros(BLOCK * BLOCK),
            h: zeros(BLOCK * BLOCK),
            top: zeros(BLOCK),
            shift: zeros(BLOCK),
            total: zeros(BLOCK),
            inverse: zeros(BLOCK),
            delta: zeros(BLOCK),
            column: zeros(BLOCK),
            feature: zeros(features),
            ones: vec![T::ONE; BLOCK],
            zeros: zeros(dim.max(BLOCK)),
            map: Vec::new(),
        }
    }
}

impl<T: Real> Tape<T> {
    pub(super) fn new<M: DifferentiableMap<T>>(map: &M, value_dim: usize) -> Self {
        let (dim, features) = (map.dim(), map.features());
        Self {
            events: Vec::new(),
            references: Vec::new(),
            positions: Vec::new(),
            shifts: Vec::new(),
            deltas: Vec::new(),
            upstream: Vec::new(),
            keys: Vec::new(),
            values: Vec::new(),
            sums: vec![T::ZERO; features * padded(value_dim)],
            norm: vec![T::ZERO; features],
            state: Sums::new(features, value_dim, 0),
            window: WindowBuffers::default(),
            block: Buffers::new(dim, features, value_dim),
        }
    }

    /// Forward from `start` (or from nothing), and back if there are `targets`.
    pub(super) fn run<M: DifferentiableMap<T>>(
        &mut self,
        stretch: &Stretch<'_, T, M>,
        start: Option<&Sums<T>>,
        mut upstream: Upstream<'_, T>,
        mut targets: Option<Targets<'_, T, M::Sums>>,
    ) {
        let scratch = stretch.map.scratch_len(BLOCK).max(stretch.map.vjp_scratch_len(BLOCK));
        if self.block.map.len() < scratch {
            self.block.map.resize(scratch, T::ZERO);
        }
        let mut state = std::mem::take(&mut self.state);
        match start {
            Some(start) => {
                state.copy(start);
                state.settle(T::ops());
            }
            None => state.reset(),
        }
        self.events.clear();
        self.references.clear();
        self.positions.clear();
        if state.started {
            self.push_frame(&state);
        }
        let origin = if state.started { state.reference_position } else { stretch.position };
        let inputs = targets.as_ref().is_some_and(|targets| targets.inputs.is_some());
        if targets.is_some() {
            let queries = stretch.q.shape()[0] * stretch.q.shape()[1];
            refill(&mut self.shifts, queries, T::NEG_INFINITY);
            refill(&mut self.deltas, queries, T::ZERO);
            let stored = if matches!(upstream, Upstream::Loss(_)) {
                queries * padded(stretch.v.ncols())
            } else {
                0
            };
            refill(&mut self.upstream, stored, T::ZERO);
            let keys = if inputs && stretch.window.is_some() { stretch.k.nrows() } else { 0 };
            refill(&mut self.keys, keys * padded(stretch.k.ncols()), T::ZERO);
            refill(&mut self.values, keys * padded(stretch.v.ncols()), T::ZERO);
        }
        let ahead = stretch.ahead(
            &upstream,
            targets.as_ref().and_then(|targets| targets.inputs.as_ref()),
            true,
        );
        let (target, from) = (targets.as_mut(), &mut upstream);
        Forward {
            tape: self,
            stretch,
            state: &mut state,
            upstream: from,
            targets: target,
            origin,
            ahead,
        }
        .run();
        if let Some(targets) = &mut targets {
            let ahead = stretch.ahead(&upstream, targets.inputs.as_ref(), false);
            let upstream = if let Upstream::Rows(rows) = upstream { Some(rows) } else { None };
            let frame = usize::MAX;
            let from_state = start.is_some_and(|start| start.started);
            Backward {
                tape: self,
                stretch,
                upstream,
                targets,
                origin,
                frame,
                ahead,
                from_state,
                later: false,
            }
            .run();
            let first_absorbed = self
                .events
                .iter()
                .find(|event| event.kind != Kind::Read)
                .map_or(stretch.k.nrows(), |event| event.tokens.start);
            if let (Some(inputs), true) = (&mut targets.inputs, self.keys.is_empty()) {
                // Masked keys before the first other one, which joined no sums.
                inputs.k.slice_mut(s![..first_absorbed, ..]).fill(T::ZERO);
                inputs.v.slice_mut(s![..first_absorbed, ..]).fill(T::ZERO);
            }
        }
        self.state = state;
    }

    fn push_frame(&mut self, state: &Sums<T>) {
        self.references.extend_from_slice(&state.reference);
        self.positions.push(state.reference_position);
    }
}

/// Exactly `len` elements of `value`.
fn refill<T: Copy>(vector: &mut Vec<T>, len: usize, value: T) {
    vector.clear();
    vector.resize(len, value);
}

/// Bands of LANES keys of a block of `tokens`: first key, keys. No query before the first key sees
/// any of them.
fn bands(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..tokens).step_by(LANES).map(move |band| (band, LANES.min(tokens - band)))
}

/// From the sums' beginning to their end.
struct Forward<'p, 'a, 'u, 'g, T: Real, M: DifferentiableMap<T>> {
    tape: &'p mut Tape<T>,
    stretch: &'p Stretch<'a, T, M>,
    state: &'p mut Sums<T>,
    upstream: &'p mut Upstream<'u, T>,
    targets: Option<&'p mut Targets<'g, T, M::Sums>>,
    /// Position that positions are counted from.
    origin: usize,
    ahead: Ahead<T>,
}

impl<T: Real, M: DifferentiableMap<T>> Forward<'_, '_, '_, '_, T, M> {
    fn run(&mut self) {
        let (queries, keys) = (self.stretch.q.shape()[1], self.stretch.k.nrows());
        let mut start = 0;
        match (self.stretch.causality, self.stretch.window) {
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
                let mut absorbed = 0;
                while start < queries {
                    let (end, first) = window_block(self.stretch, window, start);
                    self.ahead.aim(end, BLOCK);
                    self.absorb(absorbed..first.max(absorbed));
                    absorbed = first.max(absorbed);
                    self.read(start..end, first..self.stretch.lead + end);
                    start = end;
                }
            }
        }
    }

    /// The keys' weights in the sums' frame, into `b`, their values into `v_rows`; moves the frame
    /// where they leave it. Returns how many of them keep to it: all, unless `causal`, when the
    /// frame must not depend on later tokens.
    fn weigh(&mut self, keys: Range<usize>, causal: bool) -> usize {
        let (ops, stretch) = (T::ops(), self.stretch);
        let (start, width, mut tokens) = (keys.start, padded(keys.len()), keys.len());
        let dim = stretch.k.ncols();
        let Buffers { x, b, v_rows, column, top, feature, zeros, map, .. } = &mut self.tape.block;
        let b = &mut b[..feature.len() * width];
        let (column, top) = (&mut column[..width], &mut top[..width]);
        _ = Rows { array: stretch.k, tokens: keys.clone(), valid: stretch.valid }.gather(
            ops,
            stretch.key_scale,
            x,
            zeros,
        );
        _ = Rows { array: stretch.v, tokens: keys, valid: stretch.valid }.copy(ops, v_rows);
        stretch.map.key_panel(width, &x[..dim * width], b, map);

        let position = stretch.position + start;
        let exponents = |state: &Sums<T>, column: &mut [T]| {
            state.exponents(
                stretch.log_decay,
                position,
                tokens,
                |j| stretch.is_valid(start + j),
                column,
            );
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
            } else {
                for (j, exponent) in column
                    .iter_mut()
                    .enumerate()
                    .filter(|(_, exponent)| **exponent > T::NEG_INFINITY)
                {
                    *exponent = T::from_f64(-stretch.log_decay * j as f64);
                }
                (ops.row_max)(b, column, feature);
            }
            self.state.rebase(ops, stretch.log_decay, position, feature);
            exponents(self.state, column);
            above = self.state.first_above(ops, b, column, top, feature);
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
        if self.state.started && self.targets.is_some() {
            self.tape.events.push(Event { kind, tokens, frame: self.tape.positions.len() - 1 });
        }
    }

    /// Keys join the sums.
    fn absorb(&mut self, keys: Range<usize>) {
        for start in keys.clone().step_by(BLOCK) {
            let end = keys.end.min(start + BLOCK);
            self.weigh(start..end, false);
            self.push_event(Kind::Absorb, start..end);
            self.join(end - start, padded(end - start));
        }
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

    /// Queries read the sums, and the near `keys`.
    fn read(&mut self, queries: Range<usize>, keys: Range<usize>) {
        let keys = if self.stretch.given.is_some() { 0..0 } else { keys };
        if !keys.is_empty() {
            load_window(self.stretch, keys.clone(), &mut self.tape.window, &self.tape.block.zeros);
        }
        self.push_event(Kind::Read, queries.clone());
        for h in 0..self.stretch.q.shape()[0] {
            self.query(h, queries.clone(), keys.clone(), 0);
        }
    }

    /// Queries read the sums and the keys of their own block; returns where the block ends.
    fn both(&mut self, block: Range<usize>) -> usize {
        let width = padded(block.len());
        let tokens = self.weigh(block.clone(), true);
        let block = block.start..block.start + tokens;
        self.ahead.aim(block.end, CAUSAL_BLOCK);
        self.push_event(Kind::Both, block.clone());
        for h in 0..self.stretch.q.shape()[0] {
            self.query(h, block.clone(), 0..0, width);
        }
        // Nobody reads the last block's keys.
        if block.end < self.stretch.q.shape()[1] {
            self.join(tokens, width);
        }
        block.end
    }

    /// One query head's queries of a block; `own` is the width of the panel of the block's own
    /// keys, 0 for none.
    fn query(&mut self, h: usize, queries: Range<usize>, keys: Range<usize>, own: usize) {
        let own = if self.state.started { own } else { 0 };
        self.weights(h, queries.clone(), keys.clone(), own);
        let width = padded(queries.len());
        if let Upstream::Loss(_) = self.upstream {
            self.output(h, queries.clone(), keys.clone(), own);
        }
        let stride = padded(self.stretch.v.ncols());
        let Buffers { g_rows, o, .. } = &mut self.tape.block;
        match &mut self.upstream {
            Upstream::Rows(rows) => {
                _ = Rows {
                    array: rows.index_axis(Axis(0), h),
                    tokens: queries.clone(),
                    valid: None,
                }
                .copy(T::ops(), g_rows);
            }
            Upstream::Loss(loss) => {
                loss(
                    h,
                    queries.clone(),
                    &o[..queries.len() * stride],
                    &mut g_rows[..queries.len() * stride],
                );
            }
        }
        if self.targets.is_none() {
            return;
        }
        g_rows[queries.len() * stride..width * stride].fill(T::ZERO);
        if !self.tape.upstream.is_empty() {
            let at = (h * self.stretch.q.shape()[1] + queries.start) * stride;
            self.tape.upstream[at..at + queries.len() * stride]
                .copy_from_slice(&g_rows[..queries.len() * stride]);
        }
        self.deltas(h, queries.clone(), keys.clone(), own);
        self.feature_gradients(queries.clone(), own);
        if self.targets.as_ref().is_some_and(|targets| targets.inputs.is_some()) {
            self.window_gradients(&queries, keys);
            self.write_queries(h, queries);
        }
    }

    /// Weights of the far part into `a`, of the window keys into `near.p`, of the block's own keys
    /// into `s`, and their sum into `total`; all of them scaled by e^−top.
    fn weights(&mut self, h: usize, queries: Range<usize>, keys: Range<usize>, own: usize) {
        let (ops, stretch, state, ahead) = (T::ops(), self.stretch, &*self.state, &mut self.ahead);
        let (tokens, width, dim) = (queries.len(), padded(queries.len()), stretch.q.shape()[2]);
        let position = stretch.position + stretch.lead + queries.start;
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
        _ = Rows { array: stretch.q.index_axis(Axis(0), h), tokens: queries.clone(), valid: None }
            .gather(ops, stretch.query_scale, x, zeros);
        x[dim * width..padded(dim) * width].fill(T::ZERO);
        let a = &mut a[..feature.len() * width];
        total.fill(T::ZERO);
        top.fill(T::NEG_INFINITY);
        if state.started {
            stretch.map.query_panel(width, &x[..dim * width], a, map);
            (ops.column_max)(a, &state.reference, top);
            for (i, (top, shift)) in top.iter_mut().zip(shift.iter_mut()).enumerate() {
                *shift = state.decay(stretch.log_decay, position + i);
                *top += *shift;
            }
        } else {
            shift.fill(T::ZERO);
        }
        if !keys.is_empty() {
            window_scores(
                ops,
                stretch,
                keys.clone(),
                stretch.lead + queries.start,
                width,
                x,
                window,
                ahead,
            );
            (ops.column_max)(&window.p[..keys.len() * width], &window.zeros[..keys.len()], column);
            top.iter_mut().zip(column.iter()).for_each(|(top, &window)| *top = top.max(window));
        }
        let given = stretch.given.map(|given| &given[h]);
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
        if !keys.is_empty() {
            column.iter_mut().zip(top.iter()).for_each(|(column, &top)| *column = -top);
            let (p, zeros, ones) = (
                &mut window.p[..keys.len() * width],
                &window.zeros[..keys.len()],
                &window.ones[..keys.len()],
            );
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
    fn output(&mut self, h: usize, queries: Range<usize>, keys: Range<usize>, own: usize) {
        let (ops, stretch, ahead) = (T::ops(), self.stretch, &mut self.ahead);
        let (tokens, width, stride) =
            (queries.len(), padded(queries.len()), padded(stretch.v.ncols()));
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
        if !keys.is_empty() {
            (ops.matmul_ahead)(
                MatMut::new(o, tokens, stride, stride),
                Accum::Add,
                MatRef::new(&window.p, keys.len(), tokens, width).t(),
                MatRef::new(&window.v, keys.len(), stride, stride),
                Some(ahead),
            );
        }
        for (i, (o, query)) in o.chunks_exact_mut(stride).zip(queries).enumerate() {
            if let Some(given) = stretch.given.map(|given| &given[h]) {
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

    /// δ, and what is kept of the queries for the pass back. Leaves S·ȯ in `df`, ȯ·v in `near.dp`
    /// and `h`.
    fn deltas(&mut self, h: usize, queries: Range<usize>, keys: Range<usize>, own: usize) {
        let (ops, stretch, state, ahead) = (T::ops(), self.stretch, &*self.state, &mut self.ahead);
        let (tokens, width, stride) =
            (queries.len(), padded(queries.len()), padded(stretch.v.ncols()));
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
        if !keys.is_empty() {
            let dp = &mut window.dp[..keys.len() * width];
            (ops.matmul_ahead)(
                MatMut::new(dp, keys.len(), width, width),
                Accum::Replace,
                MatRef::new(&window.v, keys.len(), stride, stride),
                MatRef::new(v, stride, width, width),
                Some(ahead),
            );
            (ops.column_dot)(&window.p[..keys.len() * width], dp, delta);
        }
        for (i, query) in queries.clone().enumerate() {
            if let Some(given) = stretch.given.map(|given| &given[h]) {
                let numerator = &given.numerator[query * stride..(query + 1) * stride];
                let mut dot = [T::ZERO];
                (ops.matvec)(numerator, stride, &g_rows[i * stride..(i + 1) * stride], &mut dot);
                delta[i] += dot[0] * (given.top[query] - top[i]).exp();
            }
        }
        let at = h * stretch.q.shape()[1] + queries.start;
        for i in 0..width {
            inverse[i] = if total[i] > T::ZERO { T::ONE / total[i] } else { T::ZERO };
            delta[i] *= inverse[i];
            if i < tokens && total[i] > T::ZERO {
                self.tape.shifts[at + i] = shift[i] - total[i].ln();
                self.tape.deltas[at + i] = delta[i];
            }
        }
    }

    /// From the gradient of the features to those of the map, λ and (into `dx`) the queries.
    fn feature_gradients(&mut self, queries: Range<usize>, own: usize) {
        let (ops, stretch, state, ahead) = (T::ops(), self.stretch, &*self.state, &mut self.ahead);
        let (tokens, width, dim) = (queries.len(), padded(queries.len()), stretch.q.shape()[2]);
        let Some(targets) = &mut self.targets else { return };
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
        let position = stretch.position + stretch.lead + queries.start;
        *targets.log_decay +=
            position_moment(position as f64 - self.origin as f64, &column[..tokens]);
        let dx = targets.inputs.is_some().then(|| &mut dx[..dim * width]);
        stretch.map.query_vjp(width, &x[..dim * width], df, dx, targets.sums, map);
    }

    /// The window keys' part of the gradients of queries, keys and values.
    fn window_gradients(&mut self, queries: &Range<usize>, keys: Range<usize>) {
        if keys.is_empty() {
            return;
        }
        let (ops, stretch, ahead) = (T::ops(), self.stretch, &mut self.ahead);
        let (tokens, width, dim, stride) =
            (queries.len(), padded(queries.len()), stretch.k.ncols(), padded(stretch.v.ncols()));
        let dim_stride = padded(dim);
        let WindowBuffers { y, p, dp, ones, .. } = &mut self.tape.window;
        let Buffers { x, x_rows, dx, g_rows, o, inverse, delta, column, .. } = &mut self.tape.block;
        let (p, dp) = (&p[..keys.len() * width], &mut dp[..keys.len() * width]);
        (ops.log_weight_vjp)(
            dp,
            p,
            &inverse[..width],
            &ones[..keys.len()],
            &delta[..width],
            &mut column[..width],
        );
        for (tile, (start, y)) in
            (0..keys.len()).step_by(BLOCK).zip(y.chunks(dim * BLOCK)).enumerate()
        {
            let (count, y_width) =
                (BLOCK.min(keys.len() - start), padded(BLOCK.min(keys.len() - start)));
            debug_assert_eq!(start, tile * BLOCK);
            (ops.matmul_ahead)(
                MatMut::new(&mut dx[..], dim, width, width),
                Accum::Add,
                MatRef::new(y, dim, count, y_width),
                MatRef::new(&dp[start * width..], count, width, width),
                Some(ahead),
            );
        }
        transpose(ops, width, &x[..dim_stride * width], T::ONE, x_rows);
        let rows = &mut self.tape.keys[keys.start * dim_stride..];
        (ops.matmul_ahead)(
            MatMut::new(rows, keys.len(), dim_stride, dim_stride),
            Accum::Add,
            MatRef::new(dp, keys.len(), tokens, width),
            MatRef::new(x_rows, tokens, dim_stride, dim_stride),
            Some(ahead),
        );
        for ((to, from), &inverse) in
            o.chunks_exact_mut(stride).zip(g_rows.chunks_exact(stride)).zip(&inverse[..tokens])
        {
            to.iter_mut().zip(from).for_each(|(to, &from)| *to = from * inverse);
        }
        let rows = &mut self.tape.values[keys.start * stride..];
        (ops.matmul_ahead)(
            MatMut::new(rows, keys.len(), stride, stride),
            Accum::Add,
            MatRef::new(p, keys.len(), tokens, width),
            MatRef::new(o, tokens, stride, stride),
            Some(ahead),
        );
    }

    /// `dx` becomes rows of the queries' gradient.
    fn write_queries(&mut self, h: usize, queries: Range<usize>) {
        let (width, dim) = (padded(queries.len()), self.stretch.q.shape()[2]);
        let stride = padded(dim);
        let Buffers { dx, x_rows, .. } = &mut self.tape.block;
        transpose(T::ops(), width, &dx[..stride * width], T::ONE, x_rows);
        if let Some(inputs) = self.targets.as_mut().and_then(|targets| targets.inputs.as_mut()) {
            let mut out = inputs.q.index_axis_mut(Axis(0), h);
            for (query, row) in queries.zip(x_rows.chunks_exact(stride)) {
                put_row(row, self.stretch.query_scale, out.row_mut(query));
            }
        }
    }
}

/// Σ_i (first + i)·x_i
fn position_moment<T: Real>(first: f64, x: &[T]) -> f64 {
    x.iter().enumerate().map(|(i, x)| (first + i as f64) * x.to_f64()).sum()
}

/// Where the block of queries beginning at `start` ends, and the first key that is near to it.
fn window_block<T, M>(stretch: &Stretch<'_, T, M>, window: Window, start: usize) -> (usize, usize) {
    let position = stretch.position + stretch.lead + start;
    let (chunk, within) = (position / window.chunk, position % window.chunk);
    let end = stretch.q.shape()[1].min(start + BLOCK.min(window.chunk - within));
    (end, (chunk.saturating_sub(window.back) * window.chunk).saturating_sub(stretch.position))
}

/// The window keys of a block of queries, whichever query head they are for.
fn load_window<T: Real, M>(
    stretch: &Stretch<'_, T, M>,
    keys: Range<usize>,
    window: &mut WindowBuffers<T>,
    zeros: &[T],
) {
    let (dim, stride, count) = (stretch.k.ncols(), padded(stretch.v.ncols()), keys.len());
    if window.ones.len() < count {
        window.y.resize(count.next_multiple_of(BLOCK) * dim, T::ZERO);
        window.v.resize(count * stride, T::ZERO);
        window.p.resize(count * BLOCK, T::ZERO);
        window.dp.resize(count * BLOCK, T::ZERO);
        window.ones.resize(count, T::ONE);
        window.zeros.resize(count, T::ZERO);
    }
    for (start, panel) in keys.clone().step_by(BLOCK).zip(window.y.chunks_exact_mut(dim * BLOCK)) {
        _ = Rows {
            array: stretch.k,
            tokens: start..keys.end.min(start + BLOCK),
            valid: stretch.valid,
        }
        .gather(T::ops(), stretch.key_scale, panel, zeros);
    }
    _ = Rows { array: stretch.v, tokens: keys, valid: stretch.valid }.copy(T::ops(), &mut window.v);
}

/// Scores of the window keys (rows) for the queries (columns) of the panel `x`, whose first one
/// belongs to key `query`; −∞ where a query must not look.
fn window_scores<T: Real, M>(
    ops: &Ops<T>,
    stretch: &Stretch<'_, T, M>,
    keys: Range<usize>,
    query: usize,
    width: usize,
    x: &[T],
    window: &mut WindowBuffers<T>,
    ahead: &mut Ahead<T>,
) {
    let dim = stretch.k.ncols();
    for (start, y) in (0..keys.len()).step_by(BLOCK).zip(window.y.chunks_exact(dim * BLOCK)) {
        let count = BLOCK.min(keys.len() - start);
        let p = &mut window.p[start * width..];
        (ops.matmul_ahead)(
            MatMut::new(p, count, width, width),
            Accum::Replace,
            MatRef::new(y, dim, count, padded(count)).t(),
            MatRef::new(x, dim, width, width),
            Some(ahead),
        );
    }
    for (key, row) in keys.zip(window.p.chunks_exact_mut(width)) {
        let hidden =
            if stretch.is_valid(key) { key.saturating_sub(query).min(width) } else { width };
        row[..hidden].fill(T::NEG_INFINITY);
    }
}

impl<T: Real> WindowSums<T> {
    /// Sums over the window keys of query head `h`, the stretch having a window.
    pub(super) fn new<M>(stretch: &Stretch<'_, T, M>, window: Window, h: usize) -> Self {
        let ops = T::ops();
        let (queries, dim, stride) =
            (stretch.q.shape()[1], stretch.q.shape()[2], padded(stretch.v.ncols()));
        let zeros = |len| vec![T::ZERO; len];
        let mut sums = Self {
            numerator: zeros(queries * stride),
            total: zeros(queries),
            top: vec![T::NEG_INFINITY; queries],
        };
        let mut ahead = Ahead::of([stretch.k, stretch.v, stretch.q.index_axis_move(Axis(0), h)]);
        let mut buffers = WindowBuffers::default();
        let (mut x, no_token) = (zeros(dim * BLOCK), zeros(dim.max(LANES)));
        let (mut column, mut total) = (zeros(BLOCK), zeros(BLOCK));
        let mut start = 0;
        while start < queries {
            let (end, first) = window_block(stretch, window, start);
            ahead.aim(end, BLOCK);
            let keys = first..stretch.lead + end;
            let (tokens, width) = (end - start, padded(end - start));
            let (column, total) = (&mut column[..width], &mut total[..width]);
            load_window(stretch, keys.clone(), &mut buffers, &no_token);
            _ = Rows { array: stretch.q.index_axis(Axis(0), h), tokens: start..end, valid: None }
                .gather(ops, stretch.query_scale, &mut x, &no_token);
            window_scores(
                ops,
                stretch,
                keys.clone(),
                stretch.lead + start,
                width,
                &x,
                &mut buffers,
                &mut ahead,
            );
            let WindowBuffers { v, p, ones, zeros, .. } = &mut buffers;
            let p = &mut p[..keys.len() * width];
            (ops.column_max)(p, &zeros[..keys.len()], column);
            sums.top[start..end].copy_from_slice(&column[..tokens]);
            column
                .iter_mut()
                .for_each(|top| *top = if *top > T::NEG_INFINITY { -*top } else { T::ZERO });
            (ops.exp_dot)(p, &zeros[..keys.len()], column, &ones[..keys.len()], total);
            sums.total[start..end].copy_from_slice(&total[..tokens]);
            let out = &mut sums.numerator[start * stride..end * stride];
            (ops.matmul_ahead)(
                MatMut::new(out, tokens, stride, stride),
                Accum::Replace,
                MatRef::new(p, keys.len(), tokens, width).t(),
                MatRef::new(v, keys.len(), stride, stride),
                Some(&mut ahead),
            );
            start = end;
        }
        sums
    }
}

/// From the sums' end to their beginning.
struct Backward<'p, 'a, 'g, T: Real, M: DifferentiableMap<T>> {
    tape: &'p mut Tape<T>,
    stretch: &'p Stretch<'a, T, M>,
    /// ȯ, unless the tape holds it.
    upstream: Option<ArrayView3<'p, T>>,
    targets: &'p mut Targets<'g, T, M::Sums>,
    origin: usize,
    /// The frame that R and r are in.
    frame: usize,
    ahead: Ahead<T>,
    /// R and r are wanted of all queries, as gradients of the sums that the stretch started from.
    from_state: bool,
    /// R and r hold queries already.
    later: bool,
}

impl<T: Real, M: DifferentiableMap<T>> Backward<'_, '_, '_, T, M> {
    fn run(&mut self) {
        self.tape.sums.fill(T::ZERO);
        self.tape.norm.fill(T::ZERO);
        let events = std::mem::take(&mut self.tape.events);
        for (i, event) in events.iter().enumerate().rev() {
            self.move_to(event.frame);
            if let Some(next) = events[..i].last() {
                let arrays = match next.kind {
                    Kind::Read => KEYS..usize::MAX,
                    Kind::Absorb => 0..KEYS,
                    Kind::Both => 0..usize::MAX,
                };
                self.ahead.aim_some(arrays, next.tokens.start, next.tokens.len());
            }
            let width = padded(event.tokens.len());
            match event.kind {
                Kind::Read => (0..self.stretch.q.shape()[0])
                    .for_each(|h| self.collect(h, event.tokens.clone(), 0, true)),
                Kind::Absorb | Kind::Both => {
                    self.weigh(event.tokens.clone());
                    self.later_queries(event.tokens.clone());
                    if event.kind == Kind::Both {
                        let earlier = self.from_state || i > 0;
                        (0..self.stretch.q.shape()[0])
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
            let decay = T::from_f64(self.stretch.log_decay * distance as f64);
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
    fn weigh(&mut self, keys: Range<usize>) {
        let (ops, stretch) = (T::ops(), self.stretch);
        let (width, dim, stride) =
            (padded(keys.len()), stretch.k.ncols(), padded(stretch.v.ncols()));
        let Buffers { x, b, v_rows, v, column, feature, zeros, map, .. } = &mut self.tape.block;
        let (b, column) = (&mut b[..feature.len() * width], &mut column[..width]);
        _ = Rows { array: stretch.k, tokens: keys.clone(), valid: stretch.valid }.gather(
            ops,
            stretch.key_scale,
            x,
            zeros,
        );
        stretch.map.key_panel(width, &x[..dim * width], b, map);
        _ = Rows { array: stretch.v, tokens: keys.clone(), valid: stretch.valid }.copy(ops, v_rows);
        v_rows[keys.len() * stride..width * stride].fill(T::ZERO);
        transpose(ops, stride, &v_rows[..width * stride], T::ONE, v);
        let reference = &self.tape.references[self.frame * feature.len()..][..feature.len()];
        feature.iter_mut().zip(reference).for_each(|(negated, &c)| *negated = -c);
        column.fill(T::NEG_INFINITY);
        for (exponent, j) in column.iter_mut().zip(keys).filter(|(_, j)| stretch.is_valid(*j)) {
            *exponent = T::from_f64(-decay(stretch, j, self.tape.positions[self.frame]));
        }
        (ops.exp_panel)(b, feature, column);
    }

    /// What the queries after the block do to its keys: R·v into `df`, r into `feature`, and their
    /// part of v̇.
    fn later_queries(&mut self, keys: Range<usize>) {
        let (ops, ahead) = (T::ops(), &mut self.ahead);
        let (width, stride) = (padded(keys.len()), padded(self.stretch.v.ncols()));
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
        if self.targets.inputs.is_some() {
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
        let (ops, stretch, ahead) = (T::ops(), self.stretch, &mut self.ahead);
        let (tokens, width, dim, stride) =
            (queries.len(), padded(queries.len()), stretch.q.shape()[2], padded(stretch.v.ncols()));
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
        _ = Rows { array: stretch.q.index_axis(Axis(0), h), tokens: queries.clone(), valid: None }
            .gather(ops, stretch.query_scale, x, zeros);
        let (a, shift, delta) = (&mut a[..m * width], &mut shift[..width], &mut delta[..width]);
        stretch.map.query_panel(width, &x[..dim * width], a, map);
        let at = h * stretch.q.shape()[1] + queries.start;
        shift.fill(T::NEG_INFINITY);
        delta.fill(T::ZERO);
        shift[..tokens].copy_from_slice(&self.tape.shifts[at..at + tokens]);
        delta[..tokens].copy_from_slice(&self.tape.deltas[at..at + tokens]);
        (ops.exp_panel)(a, &self.tape.references[self.frame * m..][..m], shift);
        match &self.upstream {
            Some(rows) => {
                _ = Rows { array: rows.index_axis(Axis(0), h), tokens: queries, valid: None }
                    .copy(ops, g_rows);
            }
            None => g_rows[..tokens * stride]
                .copy_from_slice(&self.tape.upstream[at * stride..(at + tokens) * stride]),
        }
        let g_rows = &g_rows[..tokens * stride];
        if own > 0 {
            if self.targets.inputs.is_some() {
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
        let (ops, stretch) = (T::ops(), self.stretch);
        let (width, dim) = (padded(keys.len()), stretch.k.ncols());
        let stride = padded(dim);
        let Buffers { x, x_rows, dx, b, df, column, feature, ones, map, .. } = &mut self.tape.block;
        let m = feature.len();
        let (df, column, ones) = (&mut df[..m * width], &mut column[..width], &ones[..width]);
        (ops.log_weight_vjp)(df, &b[..m * width], ones, feature, ones, column);
        let first = (stretch.position + keys.start) as f64 - self.origin as f64;
        *self.targets.log_decay -= position_moment(first, &column[..keys.len()]);
        dx[..stride * width].fill(T::ZERO);
        let wanted = self.targets.inputs.is_some().then(|| &mut dx[..dim * width]);
        stretch.map.key_vjp(width, &x[..dim * width], df, wanted, self.targets.sums, map);
        if self.targets.inputs.is_some() {
            transpose(ops, width, &dx[..stride * width], T::ONE, x_rows);
        }
    }

    /// What `x_rows` and `dv_rows` hold is the block's part of the gradients of keys and values,
    /// all of it without a local window.
    fn write_keys(&mut self, keys: Range<usize>) {
        let (key_stride, value_stride) =
            (padded(self.stretch.k.ncols()), padded(self.stretch.v.ncols()));
        let Some(InputGradients { k: out_k, v: out_v, .. }) = &mut self.targets.inputs else {
            return;
        };
        let Tape {
            keys: all_keys, values: all_values, block: Buffers { x_rows, dv_rows, .. }, ..
        } = &mut *self.tape;
        if all_keys.is_empty() {
            for ((key, x), v) in
                keys.zip(x_rows.chunks_exact(key_stride)).zip(dv_rows.chunks_exact(value_stride))
            {
                put_row(x, self.stretch.key_scale, out_k.row_mut(key));
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

/// λ(p_j − p₀) of key `j` in a frame taken at `p0`.
fn decay<T, M>(stretch: &Stretch<'_, T, M>, j: usize, p0: usize) -> f64 {
    if stretch.log_decay == 0.0 {
        0.0
    } else {
        stretch.log_decay * (stretch.position + j - p0) as f64
    }
}
