//! Windows and maps for a model: from a text, and from a file.

use std::path::Path;

use candle_core::{Device, Tensor};
use dijiang::attention::Window;
use dijiang::calibrate::{Budget, CalibrateOptions, Plan, Sample};
use dijiang::checkpoint::{Gguf, load_maps};
use dijiang::layer::{AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::Array2;

use crate::Result;
use crate::lm::error::Error;
use crate::lm::plan::{Offers, proceed, samples, shares};
use crate::lm::tokens::Token;
use crate::model::{Body, fault};

/// −log γ · hold: what is as old as the hold weighs e⁻² of what leaves the window. More would let
/// far tokens gather beyond what maps were calibrated with, less would waste what they can hold.
const FADING: f64 = 2.0;

/// How windows are planned and maps calibrated.
pub(crate) struct Choices {
    pub(crate) sinks: usize,
    /// Half of the tokens that a head's window holds, on average.
    pub(crate) average_window: f64,
    /// Position from which on slow pairs of the rotary embedding turn no further, for texts of any
    /// length; old tokens fade then.
    pub(crate) hold: Option<usize>,
    /// Of calibration; none for maps as they are made.
    pub(crate) calibration: Option<CalibrateOptions>,
}

/// Plans windows for the model on `samples` and calibrates the maps. The softmax layers are
/// dequantised one after another, and the layers that come back have no weights but zeros.
/// `tick` is called after every layer of both walks.
pub(crate) fn plan(
    gguf: &Gguf,
    body: &Body,
    samples: &[&[Token]],
    choices: &Choices,
    tick: impl Fn(),
) -> Result<(Plan, Vec<DijiangAttention<f32>>)> {
    let log_decay = choices.hold.map_or(0.0, |hold| -FADING / hold as f64);
    let options = DijiangOptions::new().with_sinks(choices.sinks).with_log_decay(log_decay);
    let mut offers = Offers::new(samples, options.clone(), choices.hold.is_none(), false)?;
    let stand_in = stand_in(gguf, options)?.with_rotary_hold(choices.hold)?;
    let closed_form = || CalibrateOptions::new().with_steps(0);
    let [planning, calibration] = shares(&choices.calibration.clone().unwrap_or_else(closed_form));
    let mut fitted = Vec::new();
    let mut walk = Walk::new(gguf, body, samples, choices.hold)?;
    walk.each_layer(|l, teacher, samples, hidden| {
        let calibrate =
            |layer: &mut DijiangAttention<f32>| layer.calibrate_on(samples, &planning, proceed);
        let measured = offers.measure(teacher, samples, hidden, calibrate);
        fitted.push(measured.map_err(Error::in_layer(l))?.0);
        tick();
        Ok(())
    })?;
    let plan = offers.with_maps.plan(Budget::AverageWindow(choices.average_window))?;
    let planned = |(l, maps)| {
        let layer = plan.apply(l, &stand_in)?;
        if choices.calibration.is_some() { layer.with_maps(maps) } else { Ok(layer) }
    };
    let layers = fitted.into_iter().enumerate().map(planned);
    let mut layers = layers.collect::<dijiang::Result<Vec<_>>>()?;
    // Maps in closed form are as good behind one window as behind another.
    if calibration.steps == 0 {
        return Ok((plan, layers));
    }
    let mut walk = Walk::new(gguf, body, samples, choices.hold)?;
    walk.each_layer(|l, teacher, samples, _| {
        let layer = &layers[l];
        let options = DijiangOptions::new().with_windows(layer.windows().to_vec());
        let mut fitted =
            DijiangAttention::from_softmax(teacher, options.with_sinks(layer.sinks()))?
                .with_maps(layer.maps().to_vec())?
                .with_log_decay(layer.log_decay().to_vec())?;
        fitted.calibrate_on(samples, &calibration, proceed).map_err(Error::in_layer(l))?;
        let (maps, log_decay) = (fitted.maps().to_vec(), fitted.log_decay().to_vec());
        layers[l] = layers[l].clone().with_maps(maps)?.with_log_decay(log_decay)?;
        tick();
        Ok(())
    })?;
    Ok((plan, layers))
}

/// What a file of maps says of this model; the layers have no weights but zeros.
pub(crate) fn load(gguf: &Gguf, path: &Path) -> Result<Vec<DijiangAttention<f32>>> {
    let bytes =
        std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let mut layers = vec![stand_in(gguf, DijiangOptions::new())?; gguf.layers()];
    load_maps(&mut layers, &bytes).map_err(|error| format!("{}: {error}", path.display()))?;
    match layers.iter().position(|layer| layer.output_delta().is_some()) {
        None => Ok(layers),
        Some(l) => {
            let what = format!("layer {l}");
            Err(fault(
                path,
                &what,
                "without a refit of its output projection, which is quantised here",
                "one",
            ))
        }
    }
}

/// A layer of the model's config, to put windows and maps into.
fn stand_in(gguf: &Gguf, options: DijiangOptions) -> Result<DijiangAttention<f32>> {
    let config = gguf.attention_config();
    let d = config.head_dim.unwrap_or(config.model_dim / config.heads);
    let (wide, narrow) = (config.heads * d, config.kv_heads * d);
    let zeros = |rows| Array2::zeros((rows, config.model_dim));
    let output = Array2::zeros((config.model_dim, wide));
    let weights = AttentionWeights::new(zeros(wide), zeros(narrow), zeros(narrow), output);
    let softmax = SoftmaxAttention::new(config.clone(), weights)?;
    Ok(DijiangAttention::from_softmax(&softmax, options.with_window(Window::new(64, 1)))?)
}

/// The hidden states of many windows on their way through the softmax model.
struct Walk<'a> {
    gguf: &'a Gguf,
    body: &'a Body,
    hold: Option<usize>,
    hidden: Vec<Array2<f32>>,
}

impl<'a> Walk<'a> {
    fn new(
        gguf: &'a Gguf,
        body: &'a Body,
        samples: &[&[Token]],
        hold: Option<usize>,
    ) -> Result<Self> {
        let hidden = samples.iter().map(|sample| array(&body.embed(sample)?));
        Ok(Self { gguf, body, hold, hidden: hidden.collect::<Result<_>>()? })
    }

    /// Calls `visit` for every layer with its index, the layer, what it makes of each window, and
    /// the hidden states that enter the block.
    fn each_layer(
        &mut self,
        mut visit: impl FnMut(
            usize,
            &SoftmaxAttention<f32>,
            &[Sample<f32>],
            &[Array2<f32>],
        ) -> Result<()>,
    ) -> Result<()> {
        for l in 0..self.body.layers() {
            let teacher = self.gguf.softmax_attention(l)?.with_rotary_hold(self.hold)?;
            let input = |x: &Array2<f32>| array(&self.body.attention_input(l, &tensor(x)?)?);
            let inputs = self.hidden.iter().map(input).collect::<Result<Vec<_>>>()?;
            let samples = samples(&teacher, &inputs).map_err(Error::in_layer(l))?;
            visit(l, &teacher, &samples, &self.hidden)?;
            for (x, sample) in self.hidden.iter_mut().zip(&samples) {
                *x += &sample.output(&teacher).map_err(Error::in_layer(l))?;
                *x = array(&self.body.mlp(l, &tensor(x)?)?)?;
            }
        }
        Ok(())
    }
}

fn tensor(x: &Array2<f32>) -> Result<Tensor> {
    Ok(Tensor::from_vec(x.iter().copied().collect(), x.dim(), &Device::Cpu)?)
}

fn array(x: &Tensor) -> Result<Array2<f32>> {
    Ok(Array2::from_shape_vec(x.dims2()?, x.flatten_all()?.to_vec1()?)?)
}
