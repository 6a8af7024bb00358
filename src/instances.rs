//! What most programs use of this crate, compiled here for both element types, so that programs and
//! tests built without optimisation share it in place of compiling it again.

use std::ops::ControlFlow;

use ndarray::{Array1, Array2, ArrayView2};

use crate::Real;
use crate::attention::{KeyMask, Operator};
use crate::calibrate::{CalibrateOptions, Planner, Refit, Sample};
use crate::error::Result;
use crate::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Padding,
    SoftmaxAttention, StatePool,
};

/// Nobody calls these; that they are kept is what has them compiled.
#[used]
static INSTANCES: [fn() -> Result<()>; 2] = [everything::<f32>, everything::<f64>];

fn everything<T: Real>() -> Result<()> {
    let eye = || Array2::<T>::eye(2);
    let weights = AttentionWeights::new(eye(), eye(), eye(), eye());
    let softmax = SoftmaxAttention::new(AttentionConfig::new(2, 1), weights)?;
    let mut linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?;
    let x: ArrayView2<'_, T> = softmax.weights().q.view();
    linear.calibrate(&[x], &CalibrateOptions::new(), |_| ControlFlow::Continue(()))?;
    let sample = Sample::new(&softmax, &x)?;
    Planner::new(crate::calibrate::PlanOptions::new())?.measure(&linear, &[(&sample, x)])?;
    Refit::new(&linear).add(&linear, x, x, x)?;
    linear.backward(&x, KeyMask::All, &x)?;
    StatePool::new(&linear, 1)?;
    #[cfg(feature = "states")]
    linear.state_from_bytes(&linear.new_state().to_bytes(crate::attention::Storage::Exact))?;
    #[cfg(feature = "safetensors")]
    files(&mut linear)?;
    layer(&softmax)?;
    layer(&linear)
}

fn layer<T: Real, A: Operator<T>>(layer: &crate::layer::Layer<T, A>) -> Result<()> {
    let x = layer.weights().q.view();
    let mut state = layer.new_state();
    layer.forward(&x, KeyMask::All)?;
    layer.prefill(&mut state, &x, KeyMask::All)?;
    layer.prefill_packed(&mut [&mut state], &x, &[0, 2], KeyMask::All)?;
    layer.forward_padded(&x.insert_axis(ndarray::Axis(0)), &[2], Padding::Left)?;
    layer.step(&mut state, &x.row(0), &mut Array1::zeros(2))?;
    layer.step_batch(&mut [&mut state], &x, &mut Array2::zeros((2, 2)))
}

#[cfg(feature = "safetensors")]
fn files<T: Real>(layer: &mut DijiangAttention<T>) -> Result<()> {
    use crate::checkpoint::{Checkpoint, load_layers, load_maps, save_layers, save_maps};
    let files = Checkpoint::open("")?;
    files.softmax_attention::<T>(0)?;
    files.tensors().matrix::<T>("", 0, 0)?;
    files.tensors().vector::<T>("", 0)?;
    load_layers::<T>(&save_layers([&*layer])?)?;
    let maps = save_maps([&*layer])?;
    load_maps([layer], &maps)
}
