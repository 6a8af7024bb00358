//! AdamW whose moments can be saved: candle-nn's cannot.
//!
//! ```text
//! m ← β₁m + (1−β₁)g    v ← β₂v + (1−β₂)g²    θ ← (1 − ηλ)θ − η · (m/(1−β₁ᵗ)) / (√(v/(1−β₂ᵗ)) + ε)
//! ```
//! [Loshchilov, Hutter 2019]
//!
//! λ decays matrices of the model only: neither norms nor the numbers of maps want to be small.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

const BETA: (f64, f64) = (0.9, 0.99);
const EPSILON: f64 = 1e-8;
const WEIGHT_DECAY: f64 = 0.01;
/// Longest gradient of all parameters together; longer ones are shortened to it.
const LONGEST: f64 = 1.0;

pub(crate) struct AdamW {
    parameters: Vec<Parameter>,
    /// Steps taken.
    pub(crate) step: usize,
}

struct Parameter {
    name: String,
    /// What the length of a step is multiplied by.
    factor: f64,
    var: Var,
    first: Tensor,
    second: Tensor,
}

impl AdamW {
    /// Steps of the maps' numbers are `map_factor` times as long as those of the weights.
    pub(crate) fn new(vars: Vec<(String, Var)>, map_factor: f64) -> Result<Self> {
        let parameter = |(name, var): (String, Var)| {
            let factor = if is_map(&name) { map_factor } else { 1.0 };
            Ok(Parameter { name, factor, first: var.zeros_like()?, second: var.zeros_like()?, var })
        };
        Ok(Self { parameters: vars.into_iter().map(parameter).collect::<Result<_>>()?, step: 0 })
    }

    /// One step of length `rate`, shorter or longer where a parameter has a factor.
    pub(crate) fn step(&mut self, gradients: &GradStore, rate: f64) -> Result<()> {
        self.step += 1;
        let mut squares = 0.0;
        for gradient in self.parameters.iter().filter_map(|parameter| gradients.get(&parameter.var))
        {
            squares += gradient.sqr()?.sum_all()?.to_dtype(DType::F64)?.to_scalar::<f64>()?;
        }
        let shrink = (LONGEST / squares.sqrt()).min(1.0);
        let bias = |beta: f64| 1.0 / (1.0 - beta.powf(self.step as f64));
        for parameter in &mut self.parameters {
            let Some(gradient) = gradients.get(&parameter.var) else { continue };
            let gradient = (gradient * shrink)?;
            parameter.first = ((&parameter.first * BETA.0)? + (&gradient * (1.0 - BETA.0))?)?;
            parameter.second =
                ((&parameter.second * BETA.1)? + (gradient.sqr()? * (1.0 - BETA.1))?)?;
            let step = ((&parameter.first * bias(BETA.0))?
                / ((&parameter.second * bias(BETA.1))?.sqrt()? + EPSILON)?)?;
            let (rate, matrix) =
                (rate * parameter.factor, parameter.var.rank() == 2 && !is_map(&parameter.name));
            let kept = if matrix { 1.0 - rate * WEIGHT_DECAY } else { 1.0 };
            parameter.var.set(&((parameter.var.as_tensor() * kept)? - (step * rate)?)?)?;
        }
        Ok(())
    }

    /// Everything a run goes on from: parameters by their names, moments below `adam.`.
    pub(crate) fn tensors(&self) -> HashMap<String, Tensor> {
        let all =
            self.parameters.iter().flat_map(|Parameter { name, var, first, second, .. }| {
                [
                    (name.clone(), var.as_tensor().clone()),
                    (moment(name, 1), first.clone()),
                    (moment(name, 2), second.clone()),
                ]
            });
        all.collect()
    }

    /// Goes on from what [`tensors`](Self::tensors) gave after `step` steps.
    pub(crate) fn resume(&mut self, tensors: &HashMap<String, Tensor>, step: usize) -> Result<()> {
        let found = |name: &str, like: &Tensor| match tensors.get(name) {
            Some(tensor) if tensor.shape() == like.shape() && tensor.dtype() == like.dtype() => {
                Ok(tensor.clone())
            }
            Some(tensor) => {
                candle_core::bail!("{name} must be {:?}, found {:?}", like.shape(), tensor.shape())
            }
            None => candle_core::bail!("no tensor {name}"),
        };
        for Parameter { name, var, first, second, .. } in &mut self.parameters {
            *first = found(&moment(name, 1), first)?;
            *second = found(&moment(name, 2), second)?;
            var.set(&found(name, var)?)?;
        }
        self.step = step;
        Ok(())
    }
}

fn is_map(name: &str) -> bool {
    name.contains(".dijiang.")
}

fn moment(name: &str, which: usize) -> String {
    format!("adam.{which}.{name}")
}
