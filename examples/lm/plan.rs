//! What every window is worth to every head of a model.

use std::ops::ControlFlow;

use dijiang::attention::Window;
use dijiang::calibrate::{CalibrateOptions, PlanOptions, Planner};
use dijiang::layer::{DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::{Array2, ArrayView2};

use super::tokens::Token;

/// Windows of text that a plan is measured on, at most.
pub(crate) const PLAN_WINDOWS: usize = 4;

/// The windows on offer, measured layer after layer with maps in closed form.
pub(crate) struct Offers {
    pub(crate) planner: Planner,
    options: DijiangOptions,
}

impl Offers {
    /// Without a layer yet. `samples` is the text that layers will be measured on; `options` says
    /// what maps and how many sinks there are.
    pub(crate) fn new(samples: &[&[Token]], options: DijiangOptions) -> dijiang::Result<Self> {
        let longest = samples.iter().map(|sample| sample.len()).max().unwrap_or(0);
        let mut offers = PlanOptions::new().with_sinks(options.sinks);
        // A window that holds all of a sample is no window.
        offers.windows.retain(|window| window.tokens() < longest);
        let window = Window::new(64.min(longest.div_ceil(4)), 1);
        Ok(Self { planner: Planner::new(offers)?, options: options.with_window(window) })
    }

    /// Measures the model's next layer, which is given `inputs` where `hidden` enter the block, both
    /// `[n, D]` for each sample.
    pub(crate) fn measure(
        &mut self,
        teacher: &SoftmaxAttention<f32>,
        inputs: &[Array2<f32>],
        hidden: &[Array2<f32>],
    ) -> dijiang::Result<()> {
        let views: Vec<ArrayView2<'_, f32>> = inputs.iter().map(|input| input.view()).collect();
        let hidden = hidden.iter().map(|hidden| hidden.view());
        let samples: Vec<_> = views.iter().copied().zip(hidden).collect();
        let mut layer = DijiangAttention::from_softmax(teacher, self.options.clone())?;
        layer.calibrate(&views, &CalibrateOptions::new().with_steps(0), proceed)?;
        self.planner.measure(teacher, &layer, &samples)
    }
}

/// Nobody stops a calibration here.
pub(crate) fn proceed<P>(_: P) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
