//! candle-nn's flash attention on the CPU: another softmax attention to compare with, with the
//! feature `candle`.

use std::error::Error;

use dijiang::Real;
use ndarray::Array3;

/// Seconds of causal attention over q, k, v `[h, n, d]` in f32; none for other types, or without
/// the feature.
#[cfg(feature = "candle")]
pub(crate) fn causal<T: Real>(
    inputs: [&Array3<T>; 3],
    budget: f64,
) -> Result<Option<f64>, Box<dyn Error + Send + Sync>> {
    use candle_core::{Device, Tensor};
    use candle_nn::attention::{AttnMask, flash_attn};

    if T::NAME != "f32" {
        return Ok(None);
    }
    // It takes [b, n, h, d].
    let tensor = |x: &Array3<T>| {
        let (h, n, d) = x.dim();
        let values = x.view().permuted_axes([1, 0, 2]).iter().map(|x| x.to_f64() as f32).collect();
        Tensor::from_vec(values, (1, n, h, d), &Device::Cpu)
    };
    let [q, k, v] = inputs.map(tensor);
    let (q, k, v) = (q?, k?, v?);
    let scale = 1.0 / (inputs[0].dim().2 as f32).sqrt();
    let run = || flash_attn::<f32>(&q, &k, &v, scale, AttnMask::causal(), None, None);
    let mut check = Ok(());
    let seconds = crate::measure::shortest(budget, || check = run().map(|_| ()));
    check?;
    Ok(Some(seconds))
}

#[cfg(not(feature = "candle"))]
pub(crate) fn causal<T: Real>(
    _: [&Array3<T>; 3],
    _: f64,
) -> Result<Option<f64>, Box<dyn Error + Send + Sync>> {
    Ok(None)
}
