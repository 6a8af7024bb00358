//! How long the pieces should be.

use std::time::Instant;

use dijiang::Real;
use dijiang::attention::{LinearAttention, Operator, Qkv};
use dijiang::kernel::FeatureMap;

use crate::attention::Partial;

/// Tries of a measurement; the fastest one counts.
const TRIES: usize = 3;

/// What parts of the work on a token cost, all of it in a [`prefill`](crate::Ranks::prefill) on one
/// rank being 1.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Cost {
    /// Its key joining the state, κ. Default: 0.35.
    pub keys: f64,
    /// Its query reading a state by itself, and what it finds joining the rest, ρ. Default: 0.35.
    pub queries: f64,
}

impl Default for Cost {
    fn default() -> Self {
        Self { keys: 0.35, queries: 0.35 }
    }
}

impl Cost {
    /// Of a key that joins the state, and of a query that reads it by itself, each as a share of a
    /// token's whole cost: numbers from 0 to 1, others are taken for the nearest of these.
    pub fn new(keys: f64, queries: f64) -> Self {
        let share = |share: f64| if share > 0.0 { share.min(1.0) } else { 0.0 };
        let (keys, queries) = (share(keys), share(queries));
        Self { keys, queries }
    }

    /// What a process finds by itself: see [`Ranks::measure`](crate::Ranks::measure).
    pub(crate) fn measure<T: Real, M: FeatureMap<T>>(
        attention: &LinearAttention<T, M>,
        sample: Qkv<'_, T>,
    ) -> dijiang::Result<Self> {
        let [_, k, v] = sample.arrays();
        let (n, mut workspace) = (k.shape()[1], attention.workspace());
        let mut best = [f64::INFINITY; 3];
        let mut timed = |i: usize, begun: Instant| {
            best[i] = best[i].min(begun.elapsed().as_secs_f64());
        };
        for _ in 0..TRIES {
            let mut state = attention.new_state();
            let begun = Instant::now();
            attention.extend(&mut state, (&k, &v), sample.mask(), &mut workspace)?;
            timed(0, begun);
            let begun = Instant::now();
            let mut all = Partial::new(attention, n, 0);
            let next = &mut attention.new_state();
            attention.prefill_into(&mut [next], sample, &mut all.out, &mut workspace)?;
            timed(1, begun);
            let mut own = attention.new_state_past_sinks(state.position())?;
            let begun = Instant::now();
            let mut twice = Partial::new(attention, n, n);
            twice.over_own_keys(attention, &mut own, sample, &mut workspace)?;
            twice.over_earlier_keys(attention, state, sample, &mut workspace)?;
            timed(2, begun);
        }
        let [keys, all, twice] = best;
        Ok(Self::new(keys / all, twice / all - 1.0))
    }
}

/// Lengths of the pieces of n tokens with which all ranks finish together; they add up to n.
///
/// ```text
/// T = n_i (1 + κ)                 a rank before the last: its keys, and then all of its tokens
/// T = n_P + ρ·κ n_i               the last one: all of its tokens, and again the queries of those
///                                 that it computed while the others went through their keys
/// ```
///
/// # Examples
/// ```
/// use dijiang_mpi::{Cost, pieces};
///
/// assert_eq!(pieces(1000, 2, Cost::new(0.4, 0.4)), [446, 554]);
/// assert_eq!(pieces(1000, 3, Cost::new(0.0, 0.0)), [333, 333, 334]);
/// ```
pub fn pieces(n: usize, ranks: usize, cost: Cost) -> Vec<usize> {
    let Some(before) = ranks.checked_sub(1) else { return Vec::new() };
    let last = 1.0 + cost.keys - cost.queries * cost.keys;
    let piece = (n as f64 / (before as f64 + last)) as usize;
    let mut lengths = vec![piece; before];
    lengths.push(n - before * piece);
    lengths
}
