//! Softmax attention out, linear attention in.

use std::ops::ControlFlow;

use burn::tensor::Tensor;
use dijiang::attention::{Causality, Window};
use dijiang::calibrate::CalibrateOptions;
use dijiang::layer::DijiangOptions;
use dijiang_burn::DijiangAttention;

use super::Result;
use super::model::{Attention, Model};
use super::text::Batch;

/// The model with the attention of every block exchanged. Its maps are as they are drawn, or fitted
/// to what each layer is given on `texts` in the softmax model: in closed form, then by so many
/// `steps`.
pub(crate) fn exchange(
    softmax: &Model,
    texts: &Batch,
    window: usize,
    steps: Option<usize>,
) -> Result<Model> {
    let (_, hidden) = softmax.forward(texts.inputs.clone())?;
    let mut model = softmax.clone();
    for (block, hidden) in model.blocks.iter_mut().zip(hidden) {
        if let Attention::Softmax(softmax) = &block.attention {
            let options = DijiangOptions::new().with_window(Window::new(window, 1));
            let linear = DijiangAttention::from_mha(softmax, Causality::Causal, options)?;
            block.attention = Attention::Linear(fit(linear, hidden, steps)?);
        }
    }
    Ok(model)
}

fn fit(
    mut linear: DijiangAttention,
    hidden: Tensor<3>,
    steps: Option<usize>,
) -> Result<DijiangAttention> {
    if let Some(steps) = steps {
        let options = CalibrateOptions::new().with_steps(steps);
        linear.calibrate(hidden, &options, |_| ControlFlow::Continue(()))?;
    }
    Ok(linear)
}
