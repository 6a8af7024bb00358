//! A brief training of the softmax model, in a loop of its own.

use burn::grad_clipping::GradientClippingConfig;
use burn::module::Module;
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};

use super::Result;
use super::model::Model;
use super::text::Loader;

/// burn's AdamW with clipped gradients.
pub(crate) fn optimizer() -> ModuleOptimizer {
    AdamWConfig::new().with_grad_clipping(Some(GradientClippingConfig::Norm(1.0))).init()
}

/// Trains for so many steps, over the loader's windows as often as it takes.
pub(crate) fn pretrain(model: Model, loader: &Loader, steps: usize, rate: f64) -> Result<Model> {
    let (mut model, mut optimizer) = (model.train(), optimizer());
    let mut step = 0;
    while step < steps {
        for batch in loader.iter().take(steps - step) {
            let loss = model.loss(batch?)?.0;
            if step % 50 == 0 {
                let nats = loss.clone().try_into_scalar::<f64>()?;
                let bits = nats / std::f64::consts::LN_2;
                eprintln!("step {step} of {steps}: {bits:.3} bits per byte");
            }
            let gradients = GradientsParams::from_grads(loss.backward(), &model);
            let half_cosine = (std::f64::consts::PI * step as f64 / steps as f64).cos() / 2.0 + 0.5;
            model = optimizer.step(rate * half_cosine, model, gradients);
            step += 1;
        }
    }
    Ok(model.valid())
}
