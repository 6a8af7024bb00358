//! [`Kept`]: tokens that have left the window, and stay as they are for their keys' scores.

use crate::Real;
use crate::attention::linear::state::tokens::{Tokens, roomy};
use crate::low::mat::MatRef;

/// The tokens of the R largest scores among those that have left the window. A token's score is
/// settled when it leaves, so that the largest of two parts of a sequence are among the largest of
/// each.
#[derive(Debug, PartialEq)]
pub(crate) struct Kept<T> {
    pub(crate) tokens: Tokens<T>,
    /// Of each token.
    pub(crate) scores: Vec<f64>,
}

impl<T: Clone> Clone for Kept<T> {
    fn clone(&self) -> Self {
        let tokens = self.tokens.clone();
        let scores = roomy(&self.scores, tokens.positions.capacity());
        Self { tokens, scores }
    }
}

impl<T: Real> Kept<T> {
    /// None yet, with room for so many.
    pub(crate) fn new(room: usize, dim: usize, value_dim: usize) -> Self {
        Self { tokens: Tokens::new(room, dim, value_dim), scores: Vec::with_capacity(room) }
    }

    /// Back to none.
    pub(crate) fn reset(&mut self) {
        self.tokens.reset();
        self.scores.clear();
    }

    /// Takes over others of this shape, without allocating.
    pub(crate) fn copy(&mut self, from: &Self) {
        self.tokens.copy(&from.tokens);
        self.scores.clone_from(&from.scores);
    }

    /// [`last_place`] among these.
    pub(crate) fn last_place(&self) -> usize {
        last_place(self.tokens.room(), (&self.scores, &self.tokens.positions))
    }

    /// [`wins`] among these.
    pub(crate) fn wins(&self, place: usize, token: (f64, usize)) -> bool {
        wins(place, (&self.scores, &self.tokens.positions), token)
    }

    /// Their places, in order of their positions.
    pub(crate) fn in_order(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.scores.len()).collect();
        places.sort_unstable_by_key(|&place| self.tokens.positions[place]);
        places
    }

    /// A token takes a place that it wins.
    pub(crate) fn put(
        &mut self,
        place: usize,
        (score, position): (f64, usize),
        panel: MatRef<'_, T>,
        column: usize,
        v: &[T],
    ) {
        if place == self.scores.len() {
            self.tokens.push(position, panel, column, v);
            self.scores.push(score);
        } else {
            self.tokens.replace(place, position, panel, column, v);
            self.scores[place] = score;
        }
    }
}

/// The place that is to be won next among at most `room` tokens, of which scores and order are
/// told: a new one, or that of the last token.
pub(crate) fn last_place(room: usize, (scores, order): (&[f64], &[usize])) -> usize {
    if scores.len() < room {
        return scores.len();
    }
    let rank =
        |&a: &usize, &b: &usize| scores[a].total_cmp(&scores[b]).then(order[b].cmp(&order[a]));
    (0..room).min_by(rank).unwrap_or(0)
}

/// Whether a token of this score and order wins `place`, the [`last_place`]. Of equal scores the
/// earlier token does; one whose score is no number never.
pub(crate) fn wins(
    place: usize,
    (scores, order): (&[f64], &[usize]),
    (score, at): (f64, usize),
) -> bool {
    let better = |&last: &f64| score > last || score == last && at < order[place];
    score.is_finite() && scores.get(place).is_none_or(better)
}

/// Scores of keys, their largest log-feature, into `scores`: the exponent that the sums' frame
/// would be raised to for them. `b` are their log-features `[m, width]`, `feature` is scratch for m
/// numbers. If any is no number all keys have none, so that they join the sums, which find out.
pub(crate) fn key_scores<T: Real>(b: &[T], scores: &mut [T], feature: &mut [T]) {
    feature.fill(T::ZERO);
    (T::ops().column_max)(b, feature, scores);
    if !b.iter().all(|&b| b < -T::NEG_INFINITY) {
        scores.fill(-T::NEG_INFINITY);
    }
}
