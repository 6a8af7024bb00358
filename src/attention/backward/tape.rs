//! The engine of every backward pass: one head forward and back, block by block.
//!
//! ```text
//! P_ij = A_ij / D_i     D_i the normaliser, δ_i = ȯ_i·o_i, ȯ the gradient of the outputs
//! window:  ṡ_ij = P_ij (ȯ_i·v_j − δ_i)           v̇_j += P_ij ȯ_i
//!          ẋ_i += Σ_j ṡ_ij y_j                   ẏ_j += Σ_i ṡ_ij x_i
//! far:     w_if = exp(a_if + c_f + λ(p_i − p₀)) / D_i
//!          k_jf = exp(b_jf − c_f − λ(p_j − p₀))
//!          S, z = Σ_j k_jf (v_j, 1)              keys before i
//!          R, r = Σ_i w_if (ȯ_i, δ_i)            queries after j
//!          ȧ_if = w_if (S_f·ȯ_i − δ_i z_f)       ḃ_jf = k_jf (R_f·v_j − r_f)
//!          v̇_j += Σ_f k_jf R_f                   λ̇ = Σ_i p_i Σ_f ȧ_if − Σ_j p_j Σ_f ḃ_jf
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

use ndarray::{ArrayView1, s};

use super::buffers::Buffers;
use super::forward::Forward;
use super::pass::{GradientSinks, OutputGradient, Pass};
use super::reverse::Reverse;
use super::window_keys::WindowBuffers;
use crate::Real;
use crate::attention::linear::state::Sums;
use crate::attention::scratch::BLOCK;
use crate::kernel::DifferentiableMap;
use crate::low::aligned::Aligned;
use crate::low::simd::padded;

#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Kind {
    /// Keys join the sums as they leave the window.
    Absorb,
    /// A key that was kept joins the sums.
    Return,
    /// Queries read the sums.
    Read,
    /// Queries read the sums and the keys of their own block, which then join.
    Both,
}

/// What happened to the sums, in order.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    pub(crate) kind: Kind,
    pub(crate) tokens: Range<usize>,
    pub(crate) frame: usize,
}

/// What the forward pass leaves for the backward one, and the memory of both. Made once, used for
/// many passes.
#[derive(Debug, Clone)]
pub(crate) struct Tape<T> {
    pub(crate) events: Vec<Event>,
    /// c of every frame, `[frames, m]`.
    pub(crate) references: Vec<T>,
    /// p₀ of every frame.
    pub(crate) positions: Vec<usize>,
    /// λ(p_i − p₀) − log D_i, `[group, n_q]`.
    pub(crate) shifts: Aligned<T>,
    /// Whether all normalisers have been numbers.
    pub(crate) finite: bool,
    /// δ_i, `[group, n_q]`.
    pub(crate) deltas: Aligned<T>,
    /// ȯ, if it came from a loss, `[group, n_q, e_padded]`.
    pub(crate) output_gradient: Aligned<T>,
    /// ẏ with a local window, `[n_k, d_padded]`.
    pub(crate) keys: Aligned<T>,
    /// v̇ with a local window, `[n_k, e_padded]`.
    pub(crate) values: Aligned<T>,
    /// R, `[m, e_padded]`: at the end the gradient of the S the pass started from.
    pub(crate) sums: Aligned<T>,
    /// r, `[m]`: at the end minus the gradient of the z the pass started from.
    pub(crate) norm: Vec<T>,
    pub(crate) state: Sums<T>,
    /// Keys that are kept beyond the window, and their scores.
    pub(crate) kept: Vec<usize>,
    pub(crate) scores: Vec<f64>,
    /// All that ever were, in ascending order.
    pub(crate) chosen: Vec<usize>,
    pub(crate) window: WindowBuffers<T>,
    pub(crate) block: Buffers<T>,
}

impl<T: Real> Tape<T> {
    pub(crate) fn new<M: DifferentiableMap<T>>(map: &M, value_dim: usize) -> Self {
        let (dim, features) = (map.dim(), map.features());
        Self {
            events: Vec::new(),
            references: Vec::new(),
            positions: Vec::new(),
            shifts: Aligned::default(),
            finite: true,
            deltas: Aligned::default(),
            output_gradient: Aligned::default(),
            keys: Aligned::default(),
            values: Aligned::default(),
            sums: Aligned::filled(features * padded(value_dim), T::ZERO),
            norm: vec![T::ZERO; features],
            state: Sums::new(features, value_dim, 0),
            kept: Vec::new(),
            scores: Vec::new(),
            chosen: Vec::new(),
            window: WindowBuffers::default(),
            block: Buffers::new(dim, features, value_dim),
        }
    }

    /// Forward from `start` (or from nothing), and back if there are `sinks`.
    pub(crate) fn run<M: DifferentiableMap<T>>(
        &mut self,
        pass: &Pass<'_, T, M>,
        start: Option<&Sums<T>>,
        mut output_gradient: OutputGradient<'_, T>,
        mut sinks: Option<GradientSinks<'_, T, M::Sums>>,
    ) {
        let scratch = pass.map.scratch_len(BLOCK).max(pass.map.vjp_scratch_len(BLOCK));
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
        self.finite = true;
        self.events.clear();
        let kept = pass.single.len() - pass.scores.len()..pass.single.len();
        self.kept.clear();
        self.kept.extend(kept.clone());
        self.chosen.clear();
        self.chosen.extend(kept);
        self.scores.clear();
        self.scores.extend(pass.scores);
        self.references.clear();
        self.positions.clear();
        if state.started {
            self.push_frame(&state);
        }
        let origin = if state.started { state.reference_position } else { pass.position };
        let inputs = sinks.as_ref().is_some_and(|sinks| sinks.inputs.is_some());
        if sinks.is_some() {
            let queries = pass.q.shape()[0] * pass.q.shape()[1];
            refill(&mut self.shifts, queries, T::NEG_INFINITY);
            refill(&mut self.deltas, queries, T::ZERO);
            let stored = if matches!(output_gradient, OutputGradient::Loss(_)) {
                queries * padded(pass.v.ncols())
            } else {
                0
            };
            refill(&mut self.output_gradient, stored, T::ZERO);
            let keys = if inputs && pass.window.is_some() { pass.k.nrows() } else { 0 };
            refill(&mut self.keys, keys * padded(pass.k.ncols()), T::ZERO);
            refill(&mut self.values, keys * padded(pass.v.ncols()), T::ZERO);
        }
        let ahead = pass.ahead(
            &output_gradient,
            sinks.as_ref().and_then(|sinks| sinks.inputs.as_ref()),
            true,
        );
        let (sinks_of, from) = (sinks.as_mut(), &mut output_gradient);
        Forward {
            tape: self,
            pass,
            state: &mut state,
            output_gradient: from,
            sinks: sinks_of,
            origin,
            ahead,
        }
        .run();
        if let Some(sinks) = &mut sinks {
            let ahead = pass.ahead(&output_gradient, sinks.inputs.as_ref(), false);
            let output_gradient =
                if let OutputGradient::Rows(rows) = output_gradient { Some(rows) } else { None };
            let later = self.read_later(pass, &state, origin, sinks.log_decay);
            let frame = if later { self.positions.len() - 1 } else { usize::MAX };
            let from_state = start.is_some_and(|start| start.started);
            Reverse {
                tape: self,
                pass,
                output_gradient,
                sinks,
                origin,
                frame,
                ahead,
                from_state,
                later,
            }
            .run();
            let first_absorbed = self
                .events
                .iter()
                .find(|event| event.kind != Kind::Read)
                .map_or(pass.k.nrows(), |event| event.tokens.start);
            if let (Some(inputs), true) = (&mut sinks.inputs, self.keys.is_empty()) {
                // Masked keys before the first other one, which joined no sums.
                inputs.k.slice_mut(s![..first_absorbed, ..]).fill(T::ZERO);
                inputs.v.slice_mut(s![..first_absorbed, ..]).fill(T::ZERO);
            }
        }
        self.state = state;
    }

    /// R and r of those who read the sums behind the pass, whose last frame they are in now, and
    /// what λ̇ has of them that the keys' positions do not say. Whether there are any.
    fn read_later<M>(
        &mut self,
        pass: &Pass<'_, T, M>,
        state: &Sums<T>,
        origin: usize,
        log_decay: &mut f64,
    ) -> bool {
        self.sums.fill(T::ZERO);
        self.norm.fill(T::ZERO);
        let Some(after) = pass.after.filter(|_| state.started) else { return false };
        let Some((_, position)) = after.frame else { return false };
        let reference = ArrayView1::from(&state.reference);
        let (sums, norm) = after.sums_at(reference, state.reference_position, pass.log_decay);
        let stride = state.stride();
        let mut product = 0.0;
        for (f, (row, &z)) in sums.rows().into_iter().zip(&norm).enumerate() {
            let s = &state.numerator[f * stride..];
            product += (z * state.norm[f]).to_f64();
            product += row.iter().zip(s).map(|(&r, &s)| (r * s).to_f64()).sum::<f64>();
            self.norm[f] = -z;
            self.sums[f * stride..].iter_mut().zip(row).for_each(|(to, &r)| *to = r);
        }
        // Keys count from the origin, later readers from the frame of theirs.
        *log_decay += product * (position as f64 - origin as f64);
        true
    }

    pub(crate) fn push_frame(&mut self, state: &Sums<T>) {
        self.references.extend_from_slice(&state.reference);
        self.positions.push(state.reference_position);
    }
}

/// Exactly `len` elements of `value`.
fn refill<T: Real>(vector: &mut Aligned<T>, len: usize, value: T) {
    vector.resize(0, value);
    vector.resize(len, value);
}
