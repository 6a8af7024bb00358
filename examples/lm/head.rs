//! From hidden states to logits, and to likelihoods without holding all logits.

use ndarray::{Array2, ArrayRef2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::block::ROWS;
use super::exp::exp;
use super::product::linear;
use super::tokens::Token;

/// Entries of the vocabulary whose logits are made at once: with [`ROWS`] rows they stay in a
/// cache.
pub(crate) const ENTRIES: usize = 1024;

/// Logits `[n, vocabulary]` of normed hidden states `[n, D]`, by output weights `[vocabulary, D]`.
pub(crate) fn logits(x: &ArrayRef2<f32>, weight: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut y = Array2::zeros((x.nrows(), weight.nrows()));
    let rows = x.axis_chunks_iter(Axis(0), ROWS).zip(y.axis_chunks_iter_mut(Axis(0), ROWS));
    let parts: Vec<(ArrayView2<'_, f32>, ArrayViewMut2<'_, f32>)> = rows.collect();
    parts.into_par_iter().for_each(|(x, y)| linear(x, weight, y));
    y
}

/// −ln softmax(logits)[target] of every row.
///
/// # Shapes
/// - `x`: `[n, D]`, `weight`: `[vocabulary, D]`, `targets`: n; returns n numbers.
///
/// # Cost
/// As [`logits`] in time; memory for [`ROWS`] × [`ENTRIES`] logits in each thread.
pub(crate) fn surprises(
    x: &ArrayRef2<f32>,
    weight: ArrayView2<'_, f32>,
    targets: &[Token],
) -> Vec<f64> {
    let rows = x.axis_chunks_iter(Axis(0), ROWS).zip(targets.chunks(ROWS));
    let parts: Vec<(ArrayView2<'_, f32>, &[Token])> = rows.collect();
    parts
        .into_par_iter()
        .flat_map_iter(|(x, targets)| surprises_of_part(x, weight, targets))
        .collect()
}

/// [`surprises`] of a few rows.
fn surprises_of_part(
    x: ArrayView2<'_, f32>,
    weight: ArrayView2<'_, f32>,
    targets: &[Token],
) -> Vec<f64> {
    let mut sums = vec![LogSum::default(); x.nrows()];
    let mut of_targets = vec![f32::NAN; x.nrows()];
    let mut block = Array2::zeros((x.nrows(), ENTRIES.min(weight.nrows())));
    for (i, weight) in weight.axis_chunks_iter(Axis(0), ENTRIES).enumerate() {
        let mut block = block.slice_mut(s![.., ..weight.nrows()]);
        linear(x, weight, block.view_mut());
        for (row, logits) in block.rows().into_iter().enumerate() {
            let Some(logits) = logits.to_slice() else { unreachable!("rows have no gaps") };
            sums[row].add(logits);
            let entry = (targets[row] as usize).checked_sub(i * ENTRIES);
            if let Some(&logit) = entry.and_then(|entry| logits.get(entry)) {
                of_targets[row] = logit;
            }
        }
    }
    sums.iter().zip(of_targets).map(|(sum, target)| sum.value() - f64::from(target)).collect()
}

/// ln Σ exp of numbers that come in portions.
#[derive(Debug, Clone, Copy)]
struct LogSum {
    max: f32,
    /// Σ exp(x − max).
    sum: f64,
}

impl Default for LogSum {
    fn default() -> Self {
        Self { max: f32::NEG_INFINITY, sum: 0.0 }
    }
}

impl LogSum {
    fn add(&mut self, numbers: &[f32]) {
        const LANES: usize = 16;
        let (whole, rest) = numbers.as_chunks::<LANES>();
        let mut maxima = [self.max; LANES];
        let mut sums = [0.0_f32; LANES];
        let max_with = |max: &mut f32, x: f32| *max = if x > *max { x } else { *max };
        for numbers in whole {
            maxima.iter_mut().zip(numbers).for_each(|(max, &x)| max_with(max, x));
        }
        maxima.iter_mut().zip(rest).for_each(|(max, &x)| max_with(max, x));
        let max = maxima.into_iter().fold(self.max, f32::max);
        for numbers in whole {
            sums.iter_mut().zip(numbers).for_each(|(sum, x)| *sum += exp(x - max));
        }
        sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += exp(x - max));
        let added: f64 = sums.into_iter().map(f64::from).sum();
        self.sum = self.sum * f64::from(self.max - max).exp() + added;
        self.max = max;
    }

    fn value(&self) -> f64 {
        f64::from(self.max) + self.sum.ln()
    }
}
