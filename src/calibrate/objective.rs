//! The objective of calibration: what softmax attention makes of the samples, how far the maps are
//! from it, and which way is nearer.

use std::ops::Range;

use ndarray::{Array2, ArrayRef1, ArrayView2, ArrayView3, Axis, s};

use crate::Real;
use crate::attention::{FarPart, HeadQkv, Tape, Window};
use crate::calibrate::Sample;
use crate::kernel::{DctGradients, DctMap, DctParams, DctSums, DifferentiableMap};
use crate::layer::QkvProj;
use crate::threads::{for_each, max_threads};

/// The numbers of one key-value head that calibration may change.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeadParams {
    pub(super) params: DctParams,
    pub(super) log_decay: f64,
}

/// The gradient of a head's error.
#[derive(Debug, Clone)]
pub(super) struct HeadGradient {
    pub(super) params: DctGradients,
    pub(super) log_decay: f64,
}

/// What far keys add to the outputs of a head: o being the softmax outputs, n those over window
/// keys alone, ô the linear ones.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct FarShare {
    /// Σ (ô − n)·(o − n).
    along: f64,
    /// Σ (o − n)², the error without a far part.
    whole: f64,
    /// Σ (ô − o)².
    pub(super) error: f64,
}

impl FarShare {
    /// The multiple of what is added that has the least squared error, Σ (ô − n)·(o − n) / Σ (ô −
    /// n)²; 0 where nothing is added that should be.
    pub(super) fn least_squares(&self) -> f64 {
        let square = self.error + 2.0 * self.along - self.whole;
        if self.along > 0.0 && square > 0.0 { self.along / square } else { 0.0 }
    }
}

impl std::ops::Add for FarShare {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            along: self.along + other.along,
            whole: self.whole + other.whole,
            error: self.error + other.error,
        }
    }
}

/// One key-value head on one sample; the views are `[group, n, d]`.
struct Part<'a, T> {
    far: FarPart<'a, T>,
    x: ArrayView3<'a, T>,
    y: ArrayView2<'a, T>,
    teacher: ArrayView3<'a, T>,
}

impl<T: Real> Part<'_, T> {
    /// Rows of the outputs.
    fn rows(&self) -> usize {
        self.far.group() * self.far.queries()
    }

    /// The softmax outputs of a query.
    fn teacher_row(&self, h: usize, query: usize) -> &[T] {
        let Some(row) = self.teacher.slice_move(s![h, query, ..]).to_slice() else {
            unreachable!("rows of a projection")
        };
        row
    }

    /// Σ (ô − o)², o being the softmax outputs and ô those through `map`.
    fn squared_error(&self, map: &DctMap<T>, log_decay: f64, tape: &mut Tape<T>) -> f64 {
        let (mut sum, stride, dim) = (0.0, self.far.value_stride(), self.teacher.len_of(Axis(2)));
        self.far.forward(map, log_decay, tape, |h, queries, rows| {
            for (i, row) in queries.zip(rows.chunks_exact(stride)) {
                let teacher = self.teacher_row(h, i);
                let [.., error] = (T::ops().shares)(&row[..dim], teacher, T::ZERO, teacher);
                sum += error.to_f64();
            }
        });
        sum
    }

    /// What the far part adds, next to what it should.
    fn far_share(&self, map: &DctMap<T>, log_decay: f64, tape: &mut Tape<T>) -> FarShare {
        let (mut share, stride, dim) =
            (FarShare::default(), self.far.value_stride(), self.teacher.len_of(Axis(2)));
        self.far.forward(map, log_decay, tape, |h, queries, rows| {
            for (i, row) in queries.zip(rows.chunks_exact(stride)) {
                let Some((window, total)) = self.far.window(h, i) else { continue };
                let sums = (T::ops().shares)(
                    &row[..dim],
                    self.teacher_row(h, i),
                    T::ONE / total,
                    &window[..dim],
                );
                let [along, whole, error] = sums.map(Real::to_f64);
                share = share + FarShare { along, whole, error };
            }
        });
        share
    }

    /// The gradient of Σ (ô − o)²·`weight`/2: sums for that of the map's parameters, and that of
    /// log γ.
    fn gradient(
        &self,
        map: &DctMap<T>,
        log_decay: f64,
        weight: T,
        tape: &mut Tape<T>,
    ) -> (DctSums<T>, f64) {
        let (mut sums, stride, dim) =
            (map.new_sums(), self.far.value_stride(), self.teacher.len_of(Axis(2)));
        let loss = |h: usize, queries: Range<usize>, rows: &[T], grad: &mut [T]| {
            for (i, (row, grad)) in
                queries.zip(rows.chunks_exact(stride).zip(grad.chunks_exact_mut(stride)))
            {
                (T::ops().difference)(
                    &row[..dim],
                    self.teacher_row(h, i),
                    weight,
                    &mut grad[..dim],
                );
                grad[dim..].fill(T::ZERO);
            }
        };
        let log_decay = self.far.backward(map, log_decay, tape, loss, &mut sums);
        (sums, log_decay)
    }
}

/// Measures how far heads' linear attention is from softmax attention, on some of the samples.
pub(super) struct Objective<'a, T> {
    /// `[heads][samples]`.
    parts: Vec<Vec<Part<'a, T>>>,
    tapes: Vec<Option<Tape<T>>>,
}

impl<'a, T: Real> Objective<'a, T> {
    pub(super) fn new(
        projections: &QkvProj<T>,
        exact_keys: (&[Window], usize),
        samples: &[&'a Sample<T>],
    ) -> Self {
        let (config, (windows, sinks)) = (projections.config(), exact_keys);
        let (heads, group, d) =
            (config.kv_heads, config.heads / config.kv_heads, projections.head_dim());
        let mut slots: Vec<Option<Part<'a, T>>> =
            (0..heads * samples.len()).map(|_| None).collect();
        for_each(
            &mut vec![(); max_threads().min(slots.len())],
            slots.iter_mut().enumerate(),
            |(), (i, slot)| {
                let (head, sample) = (i / samples.len(), samples[i % samples.len()]);
                let own = s![.., head * d..(head + 1) * d];
                let queries = |rows: &'a Array2<T>| {
                    let heads = head * group..(head + 1) * group;
                    projections.heads(rows).slice_move(s![heads, .., ..])
                };
                let (x, y, v) = (queries(&sample.x), sample.y.slice(own), sample.v.slice(own));
                let qkv = HeadQkv { head, position: 0, q: x, k: y, v, valid: None };
                // Maps are for all keys beyond the window, whether they will be kept or not.
                let window = windows.get(head).map(|window| window.with_kept(0));
                let far = FarPart::new(qkv, config.causality, (window, sinks));
                *slot = Some(Part { far, x, y, teacher: queries(&sample.teacher) });
            },
        );
        let mut slots = slots.into_iter().flatten();
        let parts = (0..heads).map(|_| slots.by_ref().take(samples.len()).collect()).collect();
        let tapes = (0..max_threads()).map(|_| None).collect();
        Self { parts, tapes }
    }

    /// `params` of head `head` with the centres of these samples.
    pub(super) fn centred(&self, head: usize, params: &DctParams, set: Range<usize>) -> DctParams {
        let parts = &self.parts[head][set];
        let mut params = params.clone();
        params.query.center = mean_row(parts.iter().map(|part| part.x));
        params.key.center = mean_row(parts.iter().map(|part| part.y.insert_axis(Axis(0))));
        params
    }

    /// Σ (o − ō)² of the softmax outputs of a head, each query head with its own mean; at least
    /// what rounding makes of constant ones, and never 0.
    pub(super) fn variance(&self, head: usize, set: Range<usize>) -> f64 {
        let parts = &self.parts[head][set];
        let (mut variance, mut square) = (0.0, 0.0);
        for i in 0..parts.first().map_or(0, |part| part.far.group()) {
            let outputs = || parts.iter().map(|part| part.teacher.slice_move(s![i..i + 1, .., ..]));
            let mean = mean_row(outputs());
            let zero = vec![0.0; mean.len()];
            for o in outputs() {
                variance +=
                    o.rows().into_iter().map(|row| squared_difference(&row, &mean)).sum::<f64>();
                square +=
                    o.rows().into_iter().map(|row| squared_difference(&row, &zero)).sum::<f64>();
            }
        }
        let variance = variance.max(T::EPSILON.to_f64() * square);
        if variance > 0.0 { variance } else { 1.0 }
    }

    /// Σ (o − ō)² per row of the outputs.
    pub(super) fn row_variance(&self, head: usize, set: Range<usize>) -> f64 {
        let rows: usize = self.parts[head][set.clone()].iter().map(Part::rows).sum();
        self.variance(head, set) / rows.max(1) as f64
    }

    /// Softmax attention's mass on far keys in one sample, as a share of all of it, of every head.
    pub(super) fn far_mass(&mut self, sample: usize) -> Vec<f64> {
        let mut shares = vec![0.0; self.parts.len()];
        let parts = self.parts.iter().map(|parts| &parts[sample]).zip(&mut shares);
        for_each(&mut self.tapes, parts, |_, (part, share)| {
            *share = part.far.far_mass() / part.rows().max(1) as f64;
        });
        shares
    }

    /// The error of every head, relative to `variance`; infinite where it is not a number, or
    /// numbers that make no map.
    pub(super) fn errors(
        &mut self,
        heads: &[HeadParams],
        set: Range<usize>,
        variance: &[f64],
    ) -> Vec<f64> {
        let len = set.len();
        let sums = self.passes(heads, set, |part, map, log_decay, tape| {
            part.squared_error(map, log_decay, tape)
        });
        let sums = sums
            .chunks(len)
            .map(|sums| sums.iter().map(|sum| sum.unwrap_or(f64::INFINITY)).sum::<f64>());
        let errors = sums.zip(variance).map(|(sum, variance)| sum / variance);
        errors.map(|error| if error.is_nan() { f64::INFINITY } else { error }).collect()
    }

    /// What the far part of every head adds; `None` for numbers that make no map.
    pub(super) fn far_shares(
        &mut self,
        heads: &[HeadParams],
        set: Range<usize>,
    ) -> Vec<Option<FarShare>> {
        let len = set.len();
        let shares = self
            .passes(heads, set, |part, map, log_decay, tape| part.far_share(map, log_decay, tape));
        let sum = |shares: &[Option<FarShare>]| {
            shares.iter().copied().try_fold(FarShare::default(), |sum, share| Some(sum + share?))
        };
        shares.chunks(len).map(sum).collect()
    }

    /// `pass` over every head and sample, `[heads][set]`; `None` where numbers make no map.
    fn passes<R: Send + Clone>(
        &mut self,
        heads: &[HeadParams],
        set: Range<usize>,
        pass: impl Fn(&Part<'_, T>, &DctMap<T>, f64, &mut Tape<T>) -> R + Sync,
    ) -> Vec<Option<R>> {
        let maps = maps(heads);
        let mut results = vec![None; heads.len() * set.len()];
        let parts = self.parts.iter().zip(heads.iter().zip(&maps));
        let items =
            parts.flat_map(|(parts, head)| parts[set.clone()].iter().map(move |part| (part, head)));
        for_each(
            &mut self.tapes,
            items.zip(&mut results),
            |tape, ((part, (head, map)), result)| {
                *result = map.as_ref().map(|map| {
                    pass(part, map, head.log_decay, tape.get_or_insert_with(|| part.far.tape(map)))
                });
            },
        );
        results
    }

    /// The gradient of half the mean error per row over the samples `batch`, for every head; `None`
    /// where numbers make no map.
    pub(super) fn gradients(
        &mut self,
        heads: &[HeadParams],
        batch: &[usize],
        row_variance: &[f64],
    ) -> Vec<Option<HeadGradient>> {
        let maps = maps(heads);
        let mut gradients: Vec<Option<(DctSums<T>, f64)>> =
            (0..heads.len() * batch.len()).map(|_| None).collect();
        let parts = &self.parts;
        for_each(&mut self.tapes, gradients.iter_mut().enumerate(), |tape, (i, gradient)| {
            let h = i / batch.len();
            let (part, log_decay) = (&parts[h][batch[i % batch.len()]], heads[h].log_decay);
            if let Some(map) = &maps[h] {
                let tape = tape.get_or_insert_with(|| part.far.tape(map));
                *gradient =
                    Some(part.gradient(map, log_decay, T::from_f64(1.0 / row_variance[h]), tape));
            }
        });
        let mut gradients = gradients.into_iter();
        let sum = |map: &Option<DctMap<T>>| {
            // Always in the order of the batch: the sum does not depend on threads.
            let sum = gradients.by_ref().take(batch.len()).reduce(|sum, gradient| {
                let ((mut sums, log_decay), (others, other)) = (sum?, gradient?);
                sums.add(&others);
                Some((sums, log_decay + other))
            });
            let ((sums, log_decay), map) = (sum??, map.as_ref()?);
            Some(HeadGradient { params: map.gradients(&sums), log_decay })
        };
        maps.iter().map(sum).collect()
    }
}

fn maps<T: Real>(heads: &[HeadParams]) -> Vec<Option<DctMap<T>>> {
    heads.iter().map(|head| DctMap::from_params(head.params.clone()).ok()).collect()
}

/// Mean over all rows of all arrays, which end in the same axis.
fn mean_row<'s, T: Real>(arrays: impl Iterator<Item = ArrayView3<'s, T>>) -> Vec<f64> {
    let (mut sums, mut rows) = (Vec::new(), 0);
    for array in arrays {
        sums.resize(array.len_of(Axis(2)), 0.0);
        for row in array.rows() {
            sums.iter_mut().zip(row).for_each(|(sum, value)| *sum += value.to_f64());
            rows += 1;
        }
    }
    sums.into_iter().map(|sum| sum / rows as f64).collect()
}

fn squared_difference<T: Real>(row: &ArrayRef1<T>, mean: &[f64]) -> f64 {
    row.iter().zip(mean).map(|(value, mean)| (value.to_f64() - mean).powi(2)).sum()
}
