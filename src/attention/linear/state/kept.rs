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

    /// None, with room for at most as many as before without allocating.
    pub(crate) fn reshape(&mut self, room: usize, dim: usize, value_dim: usize) {
        self.scores.clear();
        self.tokens.reshape(room, dim, value_dim);
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
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

    /// [`place`] of a token of this score.
    pub(crate) fn place(&self, score: f64) -> Option<usize> {
        place(self.tokens.room(), (&self.scores, &self.tokens.positions), score)
    }

    /// Their places, in order of their positions.
    pub(crate) fn in_order(&self) -> Vec<usize> {
        let mut places: Vec<usize> = (0..self.scores.len()).collect();
        places.sort_unstable_by_key(|&place| self.tokens.positions[place]);
        places
    }

    /// A token takes the place [`place`](Self::place) gave.
    pub(crate) fn put(
        &mut self,
        place: usize,
        (position, score): (usize, f64),
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

/// The place of a token of this score among at most `room` others, of which `scores` and their
/// order are told: a new place or that of the token that has to go; none if there is no room for
/// it. Of equal scores the earlier token stays.
pub(crate) fn place(room: usize, (scores, order): (&[f64], &[usize]), score: f64) -> Option<usize> {
    if !score.is_finite() {
        return None;
    }
    if scores.len() < room {
        return Some(scores.len());
    }
    let last =
        (0..room).min_by(|&a, &b| scores[a].total_cmp(&scores[b]).then(order[b].cmp(&order[a])));
    last.filter(|&last| score > scores[last])
}

/// Scores of keys, their largest log-feature, into `scores`: the exponent that the sums' frame
/// would be raised to for them. `b` are their log-features `[m, width]`, `feature` is scratch for m
/// numbers.
pub(crate) fn key_scores<T: Real>(b: &[T], scores: &mut [T], feature: &mut [T]) {
    feature.fill(T::ZERO);
    (T::ops().column_max)(b, feature, scores);
}
