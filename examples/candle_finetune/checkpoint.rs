//! The state of a run in one safetensors file: parameters, moments, how far it came, and what it
//! must be continued with.

use std::path::Path;

use candle_core::{Device, Tensor, safetensors};

use crate::adamw::AdamW;
use crate::common::llama::Result;

const STEP: &str = "finetune.step";
const SETTINGS: &str = "finetune.settings";

/// Writes the file, whole or not at all. `settings` are numbers that a continued run must have in
/// common with this one.
pub(crate) fn save(path: &Path, optimizer: &AdamW, settings: &[f64]) -> Result<()> {
    let mut tensors = optimizer.tensors();
    tensors.insert(STEP.to_owned(), Tensor::new(&[optimizer.step as f64], &Device::Cpu)?);
    tensors.insert(SETTINGS.to_owned(), Tensor::new(settings, &Device::Cpu)?);
    let partial = path.with_extension("partial");
    safetensors::save(&tensors, &partial)?;
    std::fs::rename(&partial, path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(())
}

/// Takes over what [`save`] wrote.
pub(crate) fn resume(path: &Path, optimizer: &mut AdamW, settings: &[f64]) -> Result<()> {
    let tensors = safetensors::load(path, &Device::Cpu)
        .map_err(|error| format!("{}: {error}", path.display()))?;
    let numbers = |name: &str| -> Result<Vec<f64>> {
        match tensors.get(name) {
            Some(tensor) => Ok(tensor.flatten_all()?.to_vec1::<f64>()?),
            None => Err(format!(
                "{}: no tensor {name}: not a checkpoint of candle_finetune",
                path.display()
            )
            .into()),
        }
    };
    let found = numbers(SETTINGS)?;
    if found != settings {
        return Err(format!(
            "{}: made with other options: {found:?}, these are {settings:?}",
            path.display()
        )
        .into());
    }
    let step = numbers(STEP)?.first().map_or(0, |&step| step as usize);
    Ok(optimizer.resume(&tensors, step)?)
}
