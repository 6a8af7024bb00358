//! From the directory of a softmax model to a candle model with linear attention.

use std::ops::ControlFlow;
use std::path::Path;

use candle_core::DType;
use dijiang::calibrate::CalibrateOptions;
use dijiang::candle::CandleAttention;
use dijiang::layer::{DijiangAttention, DijiangOptions, SoftmaxAttention};

use super::llama::{Llama, Result};
use crate::lm::error::Error;
use crate::lm::llama::{self, Forcing};
use crate::lm::tokens::Token;

/// Reads the model, exchanges every attention layer, and fits the maps to `samples`; `tick` is
/// called after every layer. The maps see what the softmax model's layers see.
pub(crate) fn linear(
    directory: &Path,
    softmax: &llama::Llama<SoftmaxAttention<f32>>,
    samples: &[&[Token]],
    steps: usize,
    tick: impl Fn(),
) -> Result<Llama<CandleAttention>> {
    let options = CalibrateOptions::new().with_steps(steps);
    let calibrated = softmax.exchange_on(samples, Forcing::Teacher, |l, layer, inputs| {
        let exchanged = DijiangAttention::from_softmax(layer, DijiangOptions::new());
        let mut linear = exchanged.map_err(Error::in_layer(l))?;
        linear
            .calibrate(inputs, &options, |_| ControlFlow::Continue(()))
            .map_err(Error::in_layer(l))?;
        tick();
        Ok(linear)
    })?;
    let layers = calibrated.attention();
    Llama::load(directory, softmax.config().clone(), |l, _| {
        Ok(CandleAttention::from_layer(&layers[l], DType::F32)?)
    })
}
