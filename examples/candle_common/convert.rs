//! From the directory of a softmax model to a candle model with linear attention.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::DType;
use dijiang::candle::CandleAttention;
use dijiang::layer::{CalibrateOptions, DijiangAttention, DijiangOptions, SoftmaxAttention};

use super::llama::{Llama, Result};
use crate::lm::error::Error;
use crate::lm::llama;

/// Reads the model, exchanges every attention layer, and fits the maps to `samples`; `tick` is
/// called after every layer. The maps see what the softmax model's layers see.
pub(crate) fn linear(
    directory: &Path,
    softmax: &llama::Llama<SoftmaxAttention<f32>>,
    samples: &[&[u8]],
    steps: usize,
    tick: impl Fn(),
) -> Result<Llama<CandleAttention>> {
    let exchanged =
        softmax.exchange(|layer| DijiangAttention::from_softmax(layer, DijiangOptions::new()));
    let mut calibrated = exchanged?;
    let options = CalibrateOptions::new().with_steps(steps);
    softmax.each_attention_input(samples, |l, inputs| {
        let layer = &mut calibrated.attention_mut()[l];
        layer
            .calibrate(inputs, &options, |_| ControlFlow::Continue(()))
            .map_err(Error::in_layer(l))?;
        tick();
        Ok(())
    })?;
    let layers = calibrated.attention();
    Llama::load(directory, softmax.config().clone(), |l, _| {
        Ok(CandleAttention::from_layer(&layers[l], DType::F32)?)
    })
}
