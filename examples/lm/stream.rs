//! [`Stream`]: one sequence, token by token.

use dijiang::attention::KeyMask;
use dijiang::layer::Attention;
use ndarray::{Array1, Array2, Axis, s};

use super::body::Body;
use super::error::Result;
use super::tokens::Token;

/// Tokens that a stream reads at once: its memory does not depend on the length of a prompt.
const PART: usize = 512;

/// One sequence being read or written token by token.
pub(crate) struct Stream<'a, A: Attention<f32>> {
    body: &'a Body,
    attention: &'a [A],
    states: Vec<A::State>,
}

impl<'a, A: Attention<f32>> Stream<'a, A> {
    /// A stream that has seen no token yet.
    pub(crate) fn new(body: &'a Body, attention: &'a [A]) -> Self {
        Self { body, attention, states: attention.iter().map(Attention::new_state).collect() }
    }

    /// One state per layer.
    pub(crate) fn states(&self) -> &[A::State] {
        &self.states
    }

    /// Reads at least one token; returns the logits `[vocabulary]` after the last.
    pub(crate) fn prefill(&mut self, tokens: &[Token]) -> Result<Array1<f32>> {
        let body = self.body;
        let mut last = Array2::zeros((0, body.config().hidden));
        for part in tokens.chunks(PART) {
            let mut x = body.embed(part);
            for (l, (layer, state)) in self.attention.iter().zip(&mut self.states).enumerate() {
                body.block(l, &mut x, |h| layer.prefill(state, h, KeyMask::All))?;
            }
            last = x.slice(s![-1.., ..]).to_owned();
        }
        Ok(body.logits(&last).remove_axis(Axis(0)))
    }

    /// Reads one token; returns the logits `[vocabulary]` after it.
    pub(crate) fn step(&mut self, token: Token) -> Result<Array1<f32>> {
        let body = self.body;
        let mut x = body.embed(&[token]);
        for (l, (layer, state)) in self.attention.iter().zip(&mut self.states).enumerate() {
            body.block(l, &mut x, |h| {
                let mut out = Array2::zeros(h.dim());
                layer.step(state, &h.row(0), &mut out.row_mut(0))?;
                Ok(out)
            })?;
        }
        Ok(body.logits(&x).remove_axis(Axis(0)))
    }
}
