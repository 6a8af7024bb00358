//! What every window is worth to every head of a model.

use std::ops::ControlFlow;

use dijiang::attention::Window;
use dijiang::calibrate::{CalibrateOptions, CalibrateReport, PlanOptions, Planner, Sample};
use dijiang::kernel::DctMap;
use dijiang::layer::{DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::Array2;

use super::tokens::Token;

/// Windows of text that a plan is measured on, at most.
const PLAN_WINDOWS: usize = 4;
/// Share of the steps by gradient that fit the maps a plan is measured with.
const PLANNING_SHARE: f64 = 0.4;
/// A mix with which a map weighs nothing.
const SILENT: f64 = -60.0;

/// The maps of a layer, and what calibration did to them.
pub(crate) type Fitted = (Vec<DctMap<f32>>, CalibrateReport);

/// The windows on offer, measured layer after layer.
pub(crate) struct Offers {
    /// With maps behind the windows.
    pub(crate) with_maps: Planner,
    /// Without kept keys and with nothing behind them, where that was asked for.
    pub(crate) alone: Option<Planner>,
    options: DijiangOptions,
}

impl Offers {
    /// Without a layer yet. `samples` is the text that layers will be measured on; `options` says
    /// what maps and how many sinks there are; `keeps` whether windows may keep keys, which does
    /// not help beyond a hold; `alone` whether windows are measured with nothing behind them too.
    pub(crate) fn new(
        samples: &[&[Token]],
        options: DijiangOptions,
        keeps: bool,
        alone: bool,
    ) -> dijiang::Result<Self> {
        let longest = samples.iter().map(|sample| sample.len()).max().unwrap_or(0);
        let mut offers = PlanOptions::new().with_sinks(options.sinks);
        // A window that holds all of a sample is no window.
        offers.windows.retain(|window| window.tokens() < longest);
        let mut plain = offers.clone();
        plain.windows.retain(|window| window.kept == 0);
        let with_maps = Planner::new(if keeps { offers } else { plain.clone() })?;
        let alone = alone.then(|| Planner::new(plain)).transpose()?;
        let window = Window::new(16.min(longest.div_ceil(16)), 7);
        Ok(Self { with_maps, alone, options: options.with_window(window) })
    }

    /// Fits the maps of the model's next layer behind a small window by `calibrate`, and measures
    /// the windows with them on some of the samples; `hidden` are the hidden states that enter the
    /// block, `[n, D]` for each sample.
    pub(crate) fn measure(
        &mut self,
        teacher: &SoftmaxAttention<f32>,
        samples: &[Sample<f32>],
        hidden: &[Array2<f32>],
        calibrate: impl FnOnce(&mut DijiangAttention<f32>) -> dijiang::Result<CalibrateReport>,
    ) -> dijiang::Result<Fitted> {
        let mut layer = DijiangAttention::from_softmax(teacher, self.options.clone())?;
        let report = calibrate(&mut layer)?;
        let spread = samples.len().div_ceil(PLAN_WINDOWS).max(1);
        let hidden = hidden.iter().map(|hidden| hidden.view());
        let measured: Vec<_> = samples.iter().zip(hidden).step_by(spread).collect();
        self.with_maps.measure(&layer, &measured)?;
        let maps = layer.maps().to_vec();
        if let Some(alone) = &mut self.alone {
            alone.measure(&silenced(layer)?, &measured)?;
        }
        Ok((maps, report))
    }
}

/// Planned maps are fitted twice: for the plan, and behind the windows it gives. The steps of each.
pub(crate) fn shares(options: &CalibrateOptions) -> [CalibrateOptions; 2] {
    let planning = (PLANNING_SHARE * options.steps as f64) as usize;
    [planning, options.steps - planning].map(|steps| options.clone().with_steps(steps))
}

/// The layer with maps that weigh nothing beside what is exact.
pub(crate) fn silenced(layer: DijiangAttention<f32>) -> dijiang::Result<DijiangAttention<f32>> {
    let silent = |map: &DctMap<f32>| {
        let mut params = map.params().clone();
        params.log_mix = SILENT;
        DctMap::from_params(params)
    };
    let maps = layer.maps().iter().map(silent).collect::<dijiang::Result<_>>()?;
    layer.with_maps(maps)
}

/// What softmax attention makes of what a layer is given, `[n, D]` for each window of text.
pub(crate) fn samples(
    teacher: &SoftmaxAttention<f32>,
    inputs: &[Array2<f32>],
) -> dijiang::Result<Vec<Sample<f32>>> {
    inputs.iter().map(|input| Sample::new(teacher, input)).collect()
}

/// Nobody stops a calibration here.
pub(crate) fn proceed<P>(_: P) -> ControlFlow<()> {
    ControlFlow::Continue(())
}
