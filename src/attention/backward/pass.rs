//! [`Pass`]: what a backward pass is given, and where its results go.

use std::ops::Range;

use ndarray::{ArrayView2, ArrayView3, ArrayViewMut2, ArrayViewMut3, s};

use super::StateGradients;
use super::window_keys::WindowSums;
use crate::Real;
use crate::attention::rows::Valid;
use crate::attention::{Causality, Window};
use crate::low::simd::{Ahead, LANES};

/// One key-value head, its group of query heads, and a pass of tokens.
pub(crate) struct Pass<'a, T: 'static, M> {
    pub(crate) map: &'a M,
    /// λ = log γ.
    pub(crate) log_decay: f64,
    pub(crate) causality: Causality,
    pub(crate) window: Option<Window>,
    /// `[group, n_q, d]`.
    pub(crate) q: ArrayView3<'a, T>,
    /// `[n_k, d]`.
    pub(crate) k: ArrayView2<'a, T>,
    /// `[n_k, e]`.
    pub(crate) v: ArrayView2<'a, T>,
    pub(crate) valid: Valid<'a>,
    /// Which keys are sinks, in ascending order.
    pub(crate) sinks: &'a [usize],
    /// x = query_scale·q.
    pub(crate) query_scale: T,
    /// y = key_scale·k.
    pub(crate) key_scale: T,
    /// Position of the first key, if all keys but the `single` ones are in a row.
    pub(crate) position: usize,
    /// Positions of the first keys: tokens that an earlier state remembers beyond its window.
    pub(crate) single: &'a [usize],
    /// Scores of the last ones of them, which the state has kept.
    pub(crate) scores: &'a [f64],
    /// Keys before that of the first query: those, and ones in the window of the state.
    pub(crate) lead: usize,
    /// Sums over the window keys, one per query head, to be taken as constants.
    pub(crate) given: Option<&'a [WindowSums<T>]>,
    /// The gradients with respect to the sums behind the pass, of those who read them later.
    pub(crate) after: Option<&'a StateGradients<T>>,
}

/// Arrays of an [`Ahead`] whose rows are keys; those of the queries follow.
pub(crate) const KEYS: usize = 4;

impl<T: Real, M> Pass<'_, T, M> {
    /// Whether key `j` may be attended to.
    pub(crate) fn is_valid(&self, j: usize) -> bool {
        self.valid.is_none_or(|valid| valid[j])
    }

    /// Position of key `j`.
    pub(crate) fn position(&self, j: usize) -> usize {
        self.single.get(j).copied().unwrap_or(self.position + j)
    }

    /// Whether key `j` joins the sums, or is kept, once it has left the window.
    pub(crate) fn leaves(&self, j: usize) -> bool {
        self.is_valid(j) && self.sinks.binary_search(&j).is_err()
    }

    /// Keys, values and their gradients, then queries and the gradients of their outputs, and in
    /// the forward pass those of the queries themselves.
    pub(crate) fn ahead(
        &self,
        output_gradient: &OutputGradient<'_, T>,
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
        let grad_out =
            if let OutputGradient::Rows(rows) = output_gradient { Some(*rows) } else { None };
        let of_queries = [Some(self.q), grad_out, grad_q]
            .into_iter()
            .flatten()
            .flat_map(|rows| rows.into_outer_iter());
        Ahead::of(kv.into_iter().chain([grad_k, grad_v]).chain(of_queries))
    }
}

/// Receives the outputs of a block, (query head, queries, `[tokens, e_padded]`), and writes their
/// gradients in the same shape.
pub(crate) type Loss<'u, T> = &'u mut dyn FnMut(usize, Range<usize>, &[T], &mut [T]);

/// Where the gradient of the outputs comes from.
pub(crate) enum OutputGradient<'u, T> {
    /// It is known, `[group, n_q, e]`.
    Rows(ArrayView3<'u, T>),
    /// It depends on the outputs.
    Loss(Loss<'u, T>),
}

/// Where gradients go.
pub(crate) struct GradientSinks<'g, T, S> {
    /// Of the map's parameters.
    pub(crate) sums: &'g mut S,
    /// Of λ, added to.
    pub(crate) log_decay: &'g mut f64,
    /// Of queries, keys and values, if anybody wants them.
    pub(crate) inputs: Option<InputGradients<'g, T>>,
}

/// Where gradients of queries, keys and values go.
///
/// With a local window, whose keys are met in more than one block, `k` and `v` are left alone, and
/// [`Tape::keys`] and [`Tape::values`] filled instead.
pub(crate) struct InputGradients<'g, T> {
    /// `[group, n_q, d]`
    pub(crate) q: ArrayViewMut3<'g, T>,
    /// `[n_k, d]`
    pub(crate) k: ArrayViewMut2<'g, T>,
    /// `[n_k, e]`
    pub(crate) v: ArrayViewMut2<'g, T>,
}

/// Bands of LANES keys of a block of `tokens`: first key, keys. No query before the first key sees
/// any of them.
pub(crate) fn bands(tokens: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..tokens).step_by(LANES).map(move |band| (band, LANES.min(tokens - band)))
}

/// Σ_i (first + i)·x_i
pub(crate) fn position_moment<T: Real>(first: f64, x: &[T]) -> f64 {
    x.iter().enumerate().map(|(i, x)| (first + i as f64) * x.to_f64()).sum()
}
