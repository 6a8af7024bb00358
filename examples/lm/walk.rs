//! [`Walk`]: a model's blocks one after another, with the hidden states of many windows.

use dijiang::attention::KeyMask;
use dijiang::layer::Attention;
use ndarray::Array2;
use rayon::prelude::*;

use super::body::Body;
use super::error::Result;
use super::tokens::Token;

/// The hidden states of many windows on their way through the blocks of a model, those of one block
/// at a time.
///
/// At each block the caller says which attention layer takes them on: the model's own (the
/// *teacher's* hidden states), or the one that takes its place (the *student's*). Two walks side by
/// side have both.
///
/// ```ignore
/// let mut walk = model.walk(&windows);
/// while let Some(l) = walk.layer() {
///     let inputs = walk.inputs(); // what attention layer `l` is given, `[n, D]` for each window
///     let layer = fit(&model.attention()[l], &inputs, walk.hidden())?;
///     walk.advance(&layer)?;
/// }
/// let nats = walk.surprises(&targets);
/// ```
pub(crate) struct Walk<'a> {
    body: &'a Body,
    layer: usize,
    hidden: Vec<Array2<f32>>,
}

impl<'a> Walk<'a> {
    pub(crate) fn new(body: &'a Body, windows: &[&[Token]]) -> Self {
        let hidden = windows.iter().map(|window| body.embed(window)).collect();
        Self { body, layer: 0, hidden }
    }

    /// The block before which the hidden states are; none behind the last.
    pub(crate) fn layer(&self) -> Option<usize> {
        Some(self.layer).filter(|&layer| layer < self.body.layers())
    }

    /// The residual stream: for each window the hidden states h `[n, D]` that enter the block.
    pub(crate) fn hidden(&self) -> &[Array2<f32>] {
        &self.hidden
    }

    /// For each window what the block's attention layer is given, norm(h) `[n, D]`. Nothing behind
    /// the last block.
    pub(crate) fn inputs(&self) -> Vec<Array2<f32>> {
        let Some(l) = self.layer() else { return Vec::new() };
        self.hidden.par_iter().map(|x| self.body.attention_input(l, x)).collect()
    }

    /// Through the block, with this attention layer. Does nothing behind the last block.
    pub(crate) fn advance(&mut self, attention: &impl Attention<f32>) -> Result<()> {
        self.advance_with(|_, input| attention.forward(input, KeyMask::All))
    }

    /// Through the block; `attend` makes attention's output `[n, D]` from the index of the window
    /// and what the layer is given. Windows are shared among threads. Does nothing behind the last
    /// block.
    pub(crate) fn advance_with(
        &mut self,
        attend: impl Fn(usize, &Array2<f32>) -> dijiang::Result<Array2<f32>> + Sync,
    ) -> Result<()> {
        let Some(l) = self.layer() else { return Ok(()) };
        let windows = self.hidden.par_iter_mut().enumerate();
        windows.try_for_each(|(window, x)| self.body.block(l, x, |input| attend(window, input)))?;
        self.layer += 1;
        Ok(())
    }

    /// For each window −ln of the likelihoods of `targets`, behind the last block.
    pub(crate) fn surprises(&self, targets: &[&[Token]]) -> Vec<Vec<f64>> {
        let windows = self.hidden.par_iter().zip(targets);
        windows.map(|(x, targets)| self.body.surprises(x, targets)).collect()
    }
}
