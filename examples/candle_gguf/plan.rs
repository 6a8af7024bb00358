//! Windows and maps for a model: from a text, and from a file.

use std::path::Path;

use candle_core::{Device, Tensor};
use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{Budget, CalibrateOptions, Plan};
use dijiang::checkpoint::{Gguf, load_maps};
use dijiang::layer::{
    Attention, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
};
use ndarray::{Array2, ArrayView2};

use crate::Result;
use crate::lm::error::Error;
use crate::lm::plan::{Offers, PLAN_WINDOWS, proceed};
use crate::lm::tokens::Token;
use crate::model::{Body, fault};

/// How windows are planned and maps calibrated.
pub(crate) struct Choices {
    pub(crate) sinks: usize,
    /// Chunk length of a head's window, on average.
    pub(crate) average_window: f64,
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
    let options = DijiangOptions::new().with_sinks(choices.sinks);
    let few = &samples[..samples.len().min(PLAN_WINDOWS)];
    let mut offers = Offers::new(few, options.clone())?;
    let mut walk = Walk::new(gguf, body, few)?;
    walk.each_layer(|l, teacher, inputs, hidden| {
        offers.measure(teacher, inputs, hidden).map_err(Error::in_layer(l))?;
        tick();
        Ok(())
    })?;
    let plan = offers.planner.plan(Budget::AverageWindow(choices.average_window))?;

    let stand_in = stand_in(gguf, options)?;
    let planned = |l: usize| plan.apply(l, &stand_in).map_err(Error::in_layer(l));
    let mut layers = (0..gguf.layers()).map(planned).collect::<Result<Vec<_>, _>>()?;
    let Some(calibration) = &choices.calibration else { return Ok((plan, layers)) };
    let mut walk = Walk::new(gguf, body, samples)?;
    walk.each_layer(|l, teacher, inputs, _| {
        let (windows, sinks) = (layers[l].windows().to_vec(), layers[l].sinks());
        let options = DijiangOptions::new().with_windows(windows).with_sinks(sinks);
        let views: Vec<ArrayView2<'_, f32>> = inputs.iter().map(|input| input.view()).collect();
        let mut layer =
            DijiangAttention::from_softmax(teacher, options).map_err(Error::in_layer(l))?;
        layer.calibrate(&views, calibration, proceed).map_err(Error::in_layer(l))?;
        let (maps, log_decay) = (layer.maps().to_vec(), layer.log_decay().to_vec());
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
    hidden: Vec<Array2<f32>>,
}

impl<'a> Walk<'a> {
    fn new(gguf: &'a Gguf, body: &'a Body, samples: &[&[Token]]) -> Result<Self> {
        let hidden = samples.iter().map(|sample| array(&body.embed(sample)?));
        Ok(Self { gguf, body, hidden: hidden.collect::<Result<_>>()? })
    }

    /// Calls `visit` for every layer with its index, the layer, what it is given for each window,
    /// and the hidden states that enter the block.
    fn each_layer(
        &mut self,
        mut visit: impl FnMut(
            usize,
            &SoftmaxAttention<f32>,
            &[Array2<f32>],
            &[Array2<f32>],
        ) -> Result<()>,
    ) -> Result<()> {
        for l in 0..self.body.layers() {
            let teacher = self.gguf.softmax_attention(l)?;
            let input = |x: &Array2<f32>| array(&self.body.attention_input(l, &tensor(x)?)?);
            let inputs = self.hidden.iter().map(input).collect::<Result<Vec<_>>>()?;
            visit(l, &teacher, &inputs, &self.hidden)?;
            for (x, input) in self.hidden.iter_mut().zip(&inputs) {
                *x += &teacher.forward(input, KeyMask::All).map_err(Error::in_layer(l))?;
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
