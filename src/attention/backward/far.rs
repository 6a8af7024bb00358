//! [`FarPart`]: the part of attention that a map's parameters change, for calibration.

use std::ops::Range;

use super::pass::{GradientSinks, OutputGradient, Pass};
use super::tape::Tape;
use super::window_keys::WindowSums;
use crate::Real;
use crate::attention::qkv::HeadQkv;
use crate::attention::{Causality, Window};
use crate::kernel::DifferentiableMap;
use crate::low::simd::padded;

/// One key-value head and its group of query heads on one sequence, with everything computed once
/// that does not depend on the map: the exact sums over the window keys.
///
/// Works on scaled queries and keys, on the calling thread, in a [`Tape`] that serves any number of
/// sequences of the same d, m and e.
#[derive(Debug)]
pub(crate) struct FarPart<'a, T> {
    qkv: HeadQkv<'a, T>,
    causality: Causality,
    window: Option<Window>,
    sinks: Vec<usize>,
    in_window: Option<Vec<WindowSums<T>>>,
}

impl<'a, T: Real> FarPart<'a, T> {
    /// Sums over the window's keys, if there is a window: O(n·c·(d + e)) once.
    ///
    /// `qkv` holds scaled queries and keys. Bidirectional attention allows another number of
    /// queries than of keys.
    pub(crate) fn new(
        qkv: HeadQkv<'a, T>,
        causality: Causality,
        (window, sinks): (Option<Window>, usize),
    ) -> Self {
        let sinks = (0..qkv.k.nrows()).filter(|&j| qkv.is_valid(j)).take(sinks).collect();
        let mut part = Self { qkv, causality, window, sinks, in_window: None };
        if let Some(window) = window {
            let pass = part.pass(&(), 0.0);
            let heads = 0..part.group();
            let sums = heads.map(|h| WindowSums::new(&pass, window, h)).collect();
            part.in_window = Some(sums);
        }
        part
    }

    /// Query heads.
    pub(crate) fn group(&self) -> usize {
        self.qkv.q.shape()[0]
    }

    /// Queries of each head.
    pub(crate) fn queries(&self) -> usize {
        self.qkv.q.shape()[1]
    }

    /// Distance between the rows that [`forward`](Self::forward) and [`backward`](Self::backward)
    /// hand over: e padded.
    pub(crate) fn value_stride(&self) -> usize {
        padded(self.qkv.v.ncols())
    }

    /// Softmax attention's mass on keys beyond the local window, from 0 to 1 for every query,
    /// summed over all of them. Everything, if there is no local window.
    ///
    /// # Cost
    /// O(n²·(d + e)) with a local window.
    pub(crate) fn far_mass(&self) -> f64 {
        let Some(in_window) = &self.in_window else {
            return (self.group() * self.queries()) as f64;
        };
        let everything = Window::new(self.queries().max(1), 0);
        let all = FarPart::new(self.qkv, self.causality, (Some(everything), 0));
        let heads = in_window.iter().zip(all.in_window.iter().flatten());
        let queries = heads.flat_map(|(window, all)| {
            window.total.iter().zip(&window.top).zip(all.total.iter().zip(&all.top))
        });
        let share = |((&window, &window_top), (&all, &all_top)): ((&T, &T), (&T, &T))| {
            let window = window.to_f64() * (window_top.to_f64() - all_top.to_f64()).exp();
            if all > T::ZERO { (1.0 - window / all.to_f64()).clamp(0.0, 1.0) } else { 0.0 }
        };
        queries.map(share).sum()
    }

    /// The exact outputs of a query over its window keys alone: their numerator `[value_stride]`
    /// and normaliser, 0 without keys. `None` if there is no local window.
    pub(crate) fn window(&self, h: usize, query: usize) -> Option<(&[T], T)> {
        let (sums, stride) = (&self.in_window.as_ref()?[h], self.value_stride());
        Some((&sums.numerator[query * stride..][..stride], sums.total[query]))
    }

    /// Memory for passes through maps of this shape.
    pub(crate) fn tape<M: DifferentiableMap<T>>(&self, map: &M) -> Tape<T> {
        Tape::new(map, self.qkv.v.ncols())
    }

    /// The outputs, handed over block by block: query head, its queries, and their outputs
    /// `[queries, value_stride]`.
    pub(crate) fn forward<M: DifferentiableMap<T>>(
        &self,
        map: &M,
        log_decay: f64,
        tape: &mut Tape<T>,
        mut visit: impl FnMut(usize, Range<usize>, &[T]),
    ) {
        let mut loss =
            |h: usize, queries: Range<usize>, out: &[T], _: &mut [T]| visit(h, queries, out);
        tape.run(&self.pass(map, log_decay), None, OutputGradient::Loss(&mut loss), None);
    }

    /// Adds the gradients of a loss with respect to the map's parameters to `sums`, and returns
    /// that with respect to log γ.
    ///
    /// `loss` sees every block's outputs once, as `visit` of [`forward`](Self::forward), and fills
    /// the last argument, of the same shape, with the gradient of the loss with respect to them
    /// (padding included: zeros).
    ///
    /// # Cost
    /// O(n): per 64 queries four matrix products of 64·m·e with a local window, and the map's own
    /// passes, forward and back.
    pub(crate) fn backward<M: DifferentiableMap<T>>(
        &self,
        map: &M,
        log_decay: f64,
        tape: &mut Tape<T>,
        mut loss: impl FnMut(usize, Range<usize>, &[T], &mut [T]),
        sums: &mut M::Sums,
    ) -> f64 {
        let mut gradient = 0.0;
        let sinks = GradientSinks { sums, log_decay: &mut gradient, inputs: None };
        tape.run(&self.pass(map, log_decay), None, OutputGradient::Loss(&mut loss), Some(sinks));
        gradient
    }

    fn pass<'s, M>(&'s self, map: &'s M, log_decay: f64) -> Pass<'s, T, M> {
        Pass {
            map,
            log_decay,
            causality: self.causality,
            window: self.window,
            q: self.qkv.q,
            k: self.qkv.k,
            v: self.qkv.v,
            valid: self.qkv.valid,
            sinks: &self.sinks,
            query_scale: T::ONE,
            key_scale: T::ONE,
            position: 0,
            single: &[],
            scores: &[],
            lead: 0,
            given: self.in_window.as_deref(),
            after: None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use ndarray::{Array3, Axis};
    use rand::SeedableRng;
    use rand::rngs::ChaCha12Rng;
    use rand_distr::{Distribution, StandardNormal};

    use super::*;
    use crate::attention::{KeyMask, LinearConfig, Operator, Qkv};
    use crate::kernel::{DctMap, DctMapConfig, DctParams};

    pub(super) fn random(rng: &mut ChaCha12Rng, shape: (usize, usize, usize)) -> Array3<f64> {
        Array3::from_shape_simple_fn(shape, || StandardNormal.sample(rng))
    }

    fn map(rng: &mut ChaCha12Rng, d: usize) -> DctParams {
        let mut params = DctMapConfig::new().with_blocks(2).params(d).unwrap();
        for side in [&mut params.query, &mut params.key] {
            side.center
                .iter_mut()
                .for_each(|x| *x = 0.3 * Distribution::<f64>::sample(&StandardNormal, rng));
        }
        params
    }

    /// The same gradients and outputs as the general pass, whose loss is known beforehand.
    #[test]
    fn equals_the_general_pass() {
        let mut rng = ChaCha12Rng::seed_from_u64(1);
        let window = |chunk, back| (Causality::Causal, Some(Window::new(chunk, back)));
        let cases = [
            (Causality::Bidirectional, None),
            (Causality::Causal, None),
            window(16, 1),
            window(100, 0),
            window(8, 2),
        ];
        for (case, masked) in cases.into_iter().flat_map(|case| [(case, false), (case, true)]) {
            let (causality, window) = case;
            let (group, n, d, e) = (2, 210, 8, 5);
            let params = map(&mut rng, d);
            let map = DctMap::<f64>::from_params(params).unwrap();
            let (x, y, v) = (
                random(&mut rng, (group, n, d)),
                random(&mut rng, (1, n, d)),
                random(&mut rng, (1, n, e)),
            );
            let target = random(&mut rng, (group, n, e));
            let valid: Vec<bool> = (0..n).map(|j| j % 3 != 1).collect();
            let mask = if masked { KeyMask::Valid(&valid) } else { KeyMask::All };
            let full = causality == Causality::Bidirectional;
            let log_decay = if full { 0.0 } else { -0.02 };

            let mut config = LinearConfig::new()
                .with_heads(group)
                .with_value_dim(e)
                .with_scale(1.0)
                .with_log_decay(vec![log_decay])
                .with_causality(causality);
            config.windows = window.into_iter().collect();
            let attention = config.build(vec![map.clone()]).unwrap();
            let qkv = Qkv::new(&x, &y, &v).with_mask(mask);
            let out = attention.forward(qkv).unwrap();
            let grad = &out - &target;
            let general = attention.backward(qkv, &grad).unwrap();

            let qkv = HeadQkv {
                head: 0,
                position: 0,
                q: x.view(),
                k: y.index_axis(Axis(0), 0),
                v: v.index_axis(Axis(0), 0),
                valid: masked.then_some(&valid[..]),
            };
            let part = FarPart::new(qkv, causality, (window, 0));
            assert_eq!((part.group(), part.queries()), (group, n));
            let stride = part.value_stride();
            let mut tape = part.tape(&map);
            let mut seen = Array3::from_elem((group, n, e), f64::NAN);
            part.forward(&map, log_decay, &mut tape, |h, queries, rows| {
                for (i, row) in queries.zip(rows.chunks_exact(stride)) {
                    (0..e).for_each(|j| seen[[h, i, j]] = row[j]);
                }
            });
            assert!((&seen - &out).iter().all(|error| error.abs() < 1e-12), "{case:?}");
            for _ in 0..2 {
                let mut sums = map.new_sums();
                let loss = |h: usize, queries: Range<usize>, rows: &[f64], grad: &mut [f64]| {
                    grad.fill(0.0);
                    for (i, (row, grad)) in
                        queries.zip(rows.chunks_exact(stride).zip(grad.chunks_exact_mut(stride)))
                    {
                        (0..e).for_each(|j| grad[j] = row[j] - target[[h, i, j]]);
                    }
                };
                let log_decay = part.backward(&map, log_decay, &mut tape, loss, &mut sums);
                let (got, expected) = (map.gradients(&sums), &general.maps[0]);
                let close = |name: &str, got: &[f64], expected: &[f64]| {
                    let top = expected.iter().fold(0.0_f64, |top, x| top.max(x.abs()));
                    assert!(
                        got.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 1e-10 * top),
                        "{case:?} {name}"
                    );
                };
                close("radii", &got.query.radii, &expected.query.radii);
                close("scale", &got.key.scale, &expected.key.scale);
                close("center", &got.key.center, &expected.key.center);
                close("log_weight", &got.log_weight, &expected.log_weight);
                close("log_decay", &[log_decay], &general.log_decay);
            }
        }
    }
}
