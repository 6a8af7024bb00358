//! Least squares on one layer's outputs, by Adam on its projections.

use dijiang::attention::KeyMask;
use dijiang::layer::{Attention, AttentionWeights, DijiangAttention};
use dijiang::{Error, Result};
use ndarray::Array2;
use rayon::prelude::*;

/// One of so many samples is held out.
const HELD_OUT: usize = 8;
/// Steps between two looks at the held-out samples.
const LOOK: usize = 10;
const BETA: (f32, f32) = (0.9, 0.99);

pub(crate) struct Options {
    pub(crate) steps: usize,
    pub(crate) batch: usize,
    /// Of the root mean square of a matrix's elements.
    pub(crate) learning_rate: f64,
}

/// `layer` with the weights that bring its outputs nearest to the wanted ones: those with the
/// smallest error on held-out samples, or its own. A pair is an input `[n, D]` and the wanted
/// output `[n, D]`.
pub(crate) fn fit(
    layer: &DijiangAttention<f32>,
    pairs: &[(Array2<f32>, Array2<f32>)],
    options: &Options,
    tick: &(impl Fn() + Sync),
) -> Result<DijiangAttention<f32>> {
    let (train, held): (Vec<_>, Vec<_>) =
        pairs.iter().enumerate().partition(|(i, _)| i % HELD_OUT != HELD_OUT - 1);
    let train: Vec<_> = train.into_iter().map(|(_, pair)| pair).collect();
    let held: Vec<_> = held.into_iter().map(|(_, pair)| pair).collect();
    if train.is_empty() || held.is_empty() {
        return Err(Error::Value {
            argument: "samples",
            expected: "at least 8",
            got: pairs.len() as f64,
        });
    }
    let (mut layer, mut best) = (layer.clone(), layer.clone());
    let mut least = error(&layer, &held)?;
    let mut moments = Moments::new(layer.weights());
    for step in 0..options.steps {
        let batch: Vec<_> =
            (0..options.batch).map(|i| train[(step * options.batch + i) % train.len()]).collect();
        let gradients = batch.par_iter().map(|(x, wanted)| {
            Ok(layer.backward_with(x, KeyMask::All, |out| out - wanted)?.weights)
        });
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        let decay = 0.5 * (1.0 + (std::f64::consts::PI * step as f64 / options.steps as f64).cos());
        let mut weights = AttentionWeights::clone(layer.weights());
        moments.step(&mut weights, &gradients, (options.learning_rate * decay) as f32);
        layer = layer.with_weights(weights)?;
        if (step + 1) % LOOK == 0 || step + 1 == options.steps {
            let found = error(&layer, &held)?;
            if found < least {
                (least, best) = (found, layer.clone());
            }
        }
        tick();
    }
    Ok(best)
}

/// Σ (ŷ − y)² over all samples.
fn error(layer: &DijiangAttention<f32>, pairs: &[&(Array2<f32>, Array2<f32>)]) -> Result<f64> {
    let errors = pairs.par_iter().map(|(x, wanted)| {
        let difference = layer.forward(x, KeyMask::All)? - wanted;
        Ok(difference.iter().map(|d| f64::from(d * d)).sum())
    });
    Ok(errors.collect::<Result<Vec<f64>>>()?.into_iter().sum())
}

/// Adam's means of gradients and of their squares, one of each per array of weights.
struct Moments {
    mean: Vec<Vec<f32>>,
    square: Vec<Vec<f32>>,
    steps: i32,
}

impl Moments {
    fn new(weights: &AttentionWeights<f32>) -> Self {
        let zeros: Vec<Vec<f32>> =
            arrays(weights).iter().map(|array| vec![0.0; array.len()]).collect();
        Self { mean: zeros.clone(), square: zeros, steps: 0 }
    }

    /// One step of `rate` times the size of each array's elements.
    fn step(
        &mut self,
        weights: &mut AttentionWeights<f32>,
        gradients: &[AttentionWeights<f32>],
        rate: f32,
    ) {
        self.steps += 1;
        let (first, second) = (1.0 - BETA.0.powi(self.steps), 1.0 - BETA.1.powi(self.steps));
        let gradients: Vec<_> = gradients.iter().map(arrays).collect();
        for (a, array) in arrays_mut(weights).into_iter().enumerate() {
            let size = (array.iter().map(|w| w * w).sum::<f32>() / array.len() as f32).sqrt();
            let moments = self.mean[a].iter_mut().zip(&mut self.square[a]);
            for (i, (weight, (mean, square))) in array.iter_mut().zip(moments).enumerate() {
                let gradient: f32 = gradients.iter().map(|gradients| gradients[a][i]).sum();
                *mean = BETA.0 * *mean + (1.0 - BETA.0) * gradient;
                *square = BETA.1 * *square + (1.0 - BETA.1) * gradient * gradient;
                *weight -=
                    rate * size * (*mean / first) / ((*square / second).sqrt() + f32::MIN_POSITIVE);
            }
        }
    }
}

/// Everything there is to train, array after array.
fn arrays(weights: &AttentionWeights<f32>) -> Vec<&[f32]> {
    let matrices = [&weights.q, &weights.k, &weights.v, &weights.o]
        .into_iter()
        .filter_map(|matrix| matrix.as_slice());
    let biases =
        [&weights.q_bias, &weights.k_bias, &weights.v_bias, &weights.o_bias].into_iter().flatten();
    matrices.chain(biases.filter_map(|bias| bias.as_slice())).collect()
}

/// As [`arrays`].
fn arrays_mut(weights: &mut AttentionWeights<f32>) -> Vec<&mut [f32]> {
    let AttentionWeights { q, k, v, o, q_bias, k_bias, v_bias, o_bias, .. } = weights;
    let matrices = [q, k, v, o].into_iter().filter_map(|matrix| matrix.as_slice_mut());
    let biases = [q_bias, k_bias, v_bias, o_bias].into_iter().flatten();
    matrices.chain(biases.filter_map(|bias| bias.as_slice_mut())).collect()
}
