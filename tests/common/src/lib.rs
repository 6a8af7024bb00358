//! What the tests share: golden values, seeded inputs, comparisons, literal stand-ins for the fast
//! paths, and the cases of the fuzz targets. A library, so that it is compiled once, and optimised,
//! which the tests themselves are not.
#![allow(missing_docs, reason = "its readers have the source")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

pub mod cases;
pub mod gradients;
#[cfg(debug_assertions)]
mod instances;
pub mod linear;
pub mod models;
pub mod stream;

use std::collections::HashMap;
use std::fmt::Debug;
use std::path::Path;

use approx::abs_diff_eq;
use dijiang::attention::Qkv;
use dijiang::{Error, Real};
use ndarray::{
    Array, Array1, Array2, Array3, ArrayD, ArrayRef, Axis, Dimension, IxDyn, ShapeBuilder,
};
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use safetensors::{Dtype, SafeTensors};

/// The tensors of a golden file, as f64.
pub struct Golden {
    file: String,
    tensors: HashMap<String, ArrayD<f64>>,
}

impl Golden {
    /// Reads `tests/golden/<file>`.
    pub fn open(file: &str) -> Self {
        Self::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden"), file)
    }

    /// Reads `<directory>/<file>`.
    pub fn read(directory: &Path, file: &str) -> Self {
        let path = directory.join(file);
        let bytes =
            std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let tensors =
            SafeTensors::deserialize(&bytes).unwrap_or_else(|error| panic!("{file}: {error}"));
        let tensors = tensors.iter().map(|(name, tensor)| {
            let data = tensor.data();
            let values: Vec<f64> = match tensor.dtype() {
                Dtype::F64 => {
                    data.as_chunks().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect()
                }
                Dtype::F32 => data
                    .as_chunks()
                    .0
                    .iter()
                    .map(|&bytes| f64::from(f32::from_le_bytes(bytes)))
                    .collect(),
                other => panic!("{file}: {name} is {other:?}"),
            };
            (name.to_owned(), ArrayD::from_shape_vec(tensor.shape(), values).unwrap())
        });
        Self { tensors: tensors.collect(), file: file.to_owned() }
    }

    /// A tensor of as many axes as `D` has.
    pub fn array<D: Dimension>(&self, name: &str) -> Array<f64, D> {
        let tensor =
            self.tensors.get(name).unwrap_or_else(|| panic!("{}: no tensor {name}", self.file));
        tensor
            .clone()
            .into_dimensionality()
            .unwrap_or_else(|_| panic!("{}: {name} is {:?}", self.file, tensor.shape()))
    }

    /// A vector.
    pub fn array1(&self, name: &str) -> Array1<f64> {
        self.array(name)
    }

    /// A matrix.
    pub fn array2(&self, name: &str) -> Array2<f64> {
        self.array(name)
    }

    /// A vector's elements.
    pub fn vec(&self, name: &str) -> Vec<f64> {
        self.array1(name).to_vec()
    }

    /// The single element of a tensor without axes.
    pub fn scalar(&self, name: &str) -> f64 {
        self.array::<ndarray::Ix0>(name).into_scalar()
    }
}

/// Seeded source of inputs.
pub struct Random(ChaCha12Rng);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(ChaCha12Rng::seed_from_u64(seed))
    }

    /// A standard normal number that `f32` holds exactly, so that f32, f64 and the reference work
    /// on the same input.
    pub fn normal(&mut self) -> f64 {
        let x: f64 = StandardNormal.sample(&mut self.0);
        f64::from(x as f32)
    }

    /// Standard normal numbers times `scale`, rounded to `f32`.
    pub fn normals<D: Dimension, S: ShapeBuilder<Dim = D>>(
        &mut self,
        shape: S,
        scale: f64,
    ) -> Array<f64, D> {
        Array::from_shape_simple_fn(shape, || f64::from((scale * self.normal()) as f32))
    }

    /// An integer in 0..limit.
    pub fn below(&mut self, limit: usize) -> usize {
        self.0.random_range(0..limit)
    }

    /// One of the elements.
    pub fn choose<A: Clone>(&mut self, options: &[A]) -> A {
        options[self.below(options.len())].clone()
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        self.0.random_bool(probability)
    }
}

/// Rounds (or converts exactly) to T.
pub fn cast<T: Real, D: Dimension>(array: &ArrayRef<f64, D>) -> Array<T, D> {
    array.map(|&x| T::from_f64(x))
}

/// The exact value of every element.
pub fn to_f64<T: Real, D: Dimension>(array: &ArrayRef<T, D>) -> Array<f64, D> {
    array.map(|&x| x.to_f64())
}

/// `c · eps(T) · sqrt(work)`: what `work` roundings add up to, with a constant to spare.
pub fn tolerance<T: Real>(c: f64, work: usize) -> f64 {
    c * T::EPSILON.to_f64() * (work.max(1) as f64).sqrt()
}

/// Every element of `got` is within `tolerance · max|expected|` of `expected`; NaN never is.
#[track_caller]
pub fn assert_close<T: Real, D: Dimension>(
    context: impl Debug,
    got: &ArrayRef<T, D>,
    expected: &ArrayRef<f64, D>,
    tolerance: f64,
) {
    assert_eq!(got.shape(), expected.shape(), "{context:?}: shape");
    let scale = expected.iter().fold(0.0, |top: f64, x| top.max(x.abs()));
    let scale = if scale > 0.0 { scale } else { 1.0 };
    let epsilon = tolerance * scale;
    if got.iter().zip(expected).all(|(got, x)| abs_diff_eq!(got.to_f64(), x, epsilon = epsilon)) {
        return;
    }
    let mut worst: Option<(IxDyn, f64, f64, f64)> = None;
    for ((index, got), &expected) in got.view().into_dyn().indexed_iter().zip(expected) {
        let got = got.to_f64();
        let error = if got == expected { 0.0 } else { (got - expected).abs() / scale };
        let error = if error.is_nan() { f64::INFINITY } else { error };
        if worst.as_ref().is_none_or(|worst| error > worst.1) {
            worst = Some((index, error, got, expected));
        }
    }
    let (index, error, got_value, expected) = worst.unwrap();
    panic!(
        "{context:?}: {} {:?} differs most at {:?}: got {got_value:e}, expected {expected:e}, \
         error {error:.3e} of the largest element {scale:e}, tolerance {tolerance:.3e}",
        T::NAME,
        got.shape(),
        index.as_array_view().to_vec(),
    );
}

/// Every element has the same bits.
#[track_caller]
pub fn assert_same_bits<T: Real, D: Dimension>(
    context: impl Debug,
    got: &ArrayRef<T, D>,
    expected: &ArrayRef<T, D>,
) {
    assert_eq!(got.shape(), expected.shape(), "{context:?}: shape");
    for ((index, got), &expected) in got.view().into_dyn().indexed_iter().zip(expected) {
        let (a, b) = (got.to_f64(), expected.to_f64());
        assert!(
            a.to_bits() == b.to_bits(),
            "{context:?}: {} differs first at {:?}: {a:e} and {b:e}, difference {:e}",
            T::NAME,
            index.as_array_view().to_vec(),
            a - b,
        );
    }
}

/// `work` in a pool of that many threads.
pub fn on_threads<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> R {
    rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(work)
}

/// The argument an error names.
pub fn argument(error: &Error) -> &'static str {
    match error {
        Error::Shape { argument, .. }
        | Error::Length { argument, .. }
        | Error::Empty { argument }
        | Error::Value { argument, .. }
        | Error::NonFinite { argument, .. }
        | Error::NotDivisible { argument, .. }
        | Error::TooLarge { argument, .. }
        | Error::Foreign { argument, .. }
        | Error::Conflict { argument, .. } => argument,
        other => panic!("an error this suite does not know: {other:?}"),
    }
}

/// One sequence's queries `[h, n_q, d]`, keys `[h_kv, n_k, d]` and values `[h_kv, n_k, e]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Inputs<T> {
    pub q: Array3<T>,
    pub k: Array3<T>,
    pub v: Array3<T>,
}

impl<T: Real> Inputs<T> {
    /// One sequence, without a mask.
    pub fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(&self.q, &self.k, &self.v)
    }

    pub fn tokens(&self) -> usize {
        self.k.shape()[1]
    }

    /// Tokens `range` of a sequence with as many queries as keys.
    pub fn part(&self, range: std::ops::Range<usize>) -> Self {
        let cut = |x: &Array3<T>| x.slice_axis(Axis(1), range.clone().into()).to_owned();
        Self { q: cut(&self.q), k: cut(&self.k), v: cut(&self.v) }
    }

    /// Token `i` as the arguments of a step.
    pub fn token(&self, i: usize) -> [Array2<T>; 3] {
        [&self.q, &self.k, &self.v].map(|x| x.index_axis(Axis(1), i).to_owned())
    }

    pub fn to_f64(&self) -> Inputs<f64> {
        Inputs { q: to_f64(&self.q), k: to_f64(&self.k), v: to_f64(&self.v) }
    }
}

impl Inputs<f64> {
    pub fn cast<T: Real>(&self) -> Inputs<T> {
        Inputs { q: cast(&self.q), k: cast(&self.k), v: cast(&self.v) }
    }
}
