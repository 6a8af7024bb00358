//! Literal feature maps, random configurations of linear attention, and what the reference says
//! about them.

use std::fmt::Debug;

use dijiang::attention::{KeyMask, LinearAttention, LinearConfig, Softmax, SoftmaxConfig, Window};
use dijiang::kernel::FeatureMap;
use dijiang::reference::{self, Pairs, PlainMap};
use dijiang::{Real, Result};
use ndarray::{Array1, Array2, Array3, ArrayRef2, Axis, s};

use crate::{Inputs, Random, cast, to_f64};

/// Log-features in f64, row by row: what the reference computes attention from.
pub trait Oracle: Debug {
    fn query(&self, x: &ArrayRef2<f64>) -> Array2<f64>;
    fn key(&self, y: &ArrayRef2<f64>) -> Array2<f64>;
}

/// An affine map given by its matrices: a = Wq x + cq, b = Wk y + ck.
#[derive(Debug, Clone)]
pub struct TestMap<T> {
    pub query: Affine<T>,
    pub key: Affine<T>,
}

/// weight `[m, d]`, offset `[m]`.
#[derive(Debug, Clone)]
pub struct Affine<T> {
    pub weight: Array2<T>,
    pub offset: Array1<T>,
}

impl<T: Real> Affine<T> {
    fn panel(&self, width: usize, z: &[T], out: &mut [T], scratch: &mut [T]) {
        let (m, d) = self.weight.dim();
        assert!(width > 0 && width.is_multiple_of(16), "width {width}");
        assert_eq!((z.len(), out.len()), (d * width, m * width), "panels without gaps");
        assert!(scratch.len() >= width, "scratch as large as promised");
        scratch.fill(T::from_f64(f64::NAN));
        let rows = self.weight.as_slice().unwrap().chunks_exact(d);
        for ((out, row), &offset) in out.chunks_exact_mut(width).zip(rows).zip(&self.offset) {
            out.fill(offset);
            for (z, &weight) in z.chunks_exact(width).zip(row) {
                out.iter_mut().zip(z).for_each(|(out, &z)| *out += weight * z);
            }
        }
    }

    fn rows(&self, z: &ArrayRef2<f64>) -> Array2<f64> {
        z.dot(&to_f64(&self.weight).t()) + &to_f64(&self.offset)
    }
}

impl TestMap<f64> {
    /// Random matrices, elements rounded to f32; log-features of standard normal inputs have
    /// deviation `spread`.
    pub fn random(random: &mut Random, d: usize, m: usize, spread: f64) -> Self {
        let mut side = || Affine {
            weight: random.normals((m, d), spread / (d as f64).sqrt()),
            offset: random.normals(m, 0.3),
        };
        Self { query: side(), key: side() }
    }

    /// Log-features are the coordinates themselves: m = d, a = x, b = y.
    pub fn identity(d: usize) -> Self {
        let side = Affine { weight: Array2::eye(d), offset: Array1::zeros(d) };
        Self { query: side.clone(), key: side }
    }

    pub fn cast<T: Real>(&self) -> TestMap<T> {
        let side =
            |side: &Affine<f64>| Affine { weight: cast(&side.weight), offset: cast(&side.offset) };
        TestMap { query: side(&self.query), key: side(&self.key) }
    }
}

impl<T: Real> FeatureMap<T> for TestMap<T> {
    fn dim(&self) -> usize {
        self.query.weight.ncols()
    }
    fn features(&self) -> usize {
        self.query.weight.nrows()
    }
    fn scratch_len(&self, width: usize) -> usize {
        width
    }
    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        self.query.panel(width, x, out, scratch);
    }
    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]) {
        self.key.panel(width, y, out, scratch);
    }
}

impl<T: Real> Oracle for TestMap<T> {
    fn query(&self, x: &ArrayRef2<f64>) -> Array2<f64> {
        self.query.rows(x)
    }
    fn key(&self, y: &ArrayRef2<f64>) -> Array2<f64> {
        self.key.rows(y)
    }
}

/// The reference's map behind the trait: shows that attention needs nothing but the trait.
#[derive(Debug, Clone)]
pub struct ReferenceMap(pub PlainMap);

impl ReferenceMap {
    fn panel<T: Real>(
        &self,
        width: usize,
        z: &[T],
        out: &mut [T],
        map: impl Fn(&Array2<f64>) -> Result<Array2<f64>>,
    ) {
        let d = self.0.query.center.len();
        let rows = Array2::from_shape_fn((width, d), |(j, i)| z[i * width + j].to_f64());
        for ((j, f), &value) in map(&rows).unwrap().indexed_iter() {
            out[f * width + j] = T::from_f64(value);
        }
    }
}

impl<T: Real> FeatureMap<T> for ReferenceMap {
    fn dim(&self) -> usize {
        self.0.query.center.len()
    }
    fn features(&self) -> usize {
        self.0.features()
    }
    fn scratch_len(&self, _: usize) -> usize {
        0
    }
    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], _: &mut [T]) {
        self.panel(width, x, out, |x| self.0.query_log_features(x));
    }
    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], _: &mut [T]) {
        self.panel(width, y, out, |y| self.0.key_log_features(y));
    }
}

impl Oracle for PlainMap {
    fn query(&self, x: &ArrayRef2<f64>) -> Array2<f64> {
        self.query_log_features(x).unwrap()
    }
    fn key(&self, y: &ArrayRef2<f64>) -> Array2<f64> {
        self.key_log_features(y).unwrap()
    }
}

/// A configuration of attention: everything but the maps and the inputs, which follow from the
/// seed.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    pub seed: u64,
    pub heads: usize,
    pub kv_heads: usize,
    pub d: usize,
    pub e: usize,
    pub m: usize,
    pub scale: Option<f64>,
    /// Of the first head; the chunks of each further one are longer by half if they are uneven.
    pub window: Option<(usize, usize)>,
    pub uneven: bool,
    pub sinks: usize,
    /// Keys that each window keeps beyond itself.
    pub kept: usize,
    /// log γ of the first head; each further one decays a little faster.
    pub log_decay: f64,
    /// Deviation of the log-features.
    pub spread: f64,
}

impl Setup {
    /// Pure, with decay, with local windows short and long, with grouped heads of odd sizes.
    pub fn typical() -> Vec<Self> {
        vec![
            Self::new(1),
            Self::new(2).decay(-0.05),
            Self::new(3).window(3, 2),
            Self::new(4).window(70, 1).decay(-0.1),
            Self::new(5).heads(6, 3).sizes(16, 17, 5),
            Self::new(6).window(4, 1).sinks(3),
            Self::new(7).heads(4, 2).window(5, 1).uneven().sinks(2).decay(-0.02),
            Self::new(8).window(4, 0).kept(7),
            Self::new(10).heads(2, 1).window(16, 0).kept(70).decay(-0.001),
            Self::new(9).heads(4, 2).window(6, 1).uneven().kept(17).sinks(3).decay(-0.03),
        ]
    }

    /// One head, d = 5, e = 3, m = 8, pure, without decay.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            heads: 1,
            kv_heads: 1,
            d: 5,
            e: 3,
            m: 8,
            scale: None,
            window: None,
            uneven: false,
            sinks: 0,
            kept: 0,
            log_decay: 0.0,
            spread: 1.5,
        }
    }

    pub fn heads(self, heads: usize, kv_heads: usize) -> Self {
        Self { heads, kv_heads, ..self }
    }

    pub fn sizes(self, d: usize, e: usize, m: usize) -> Self {
        Self { d, e, m, ..self }
    }

    pub fn window(self, chunk: usize, back: usize) -> Self {
        Self { window: Some((chunk, back)), ..self }
    }

    pub fn uneven(self) -> Self {
        Self { uneven: true, ..self }
    }

    pub fn sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    pub fn kept(self, kept: usize) -> Self {
        Self { kept, ..self }
    }

    /// The window of one kv head.
    pub fn head_window(&self, h: usize) -> Option<(usize, usize)> {
        let longer = |chunk: usize| if self.uneven { chunk + h * chunk.div_ceil(2) } else { chunk };
        self.window.map(|(chunk, back)| (longer(chunk), back))
    }

    fn windows(&self) -> Vec<Window> {
        let windows = (0..self.kv_heads).filter_map(|h| self.head_window(h));
        windows.map(|(chunk, back)| Window::new(chunk, back).with_kept(self.kept)).collect()
    }

    pub fn decay(self, log_decay: f64) -> Self {
        Self { log_decay, ..self }
    }

    /// log γ of one kv head.
    pub fn head_decay(&self, h: usize) -> f64 {
        self.log_decay * (1.0 + 0.5 * h as f64)
    }

    /// Neither a local window nor decay: what full attention takes.
    pub fn is_pure(&self) -> bool {
        self.window.is_none() && self.log_decay == 0.0
    }

    /// σ, the default made explicit.
    pub fn softmax_scale(&self) -> f64 {
        self.scale.unwrap_or(1.0 / (self.d as f64).sqrt())
    }

    pub fn maps(&self) -> Vec<TestMap<f64>> {
        let mut random = Random::new(self.seed);
        // x = √σ·q: undone, so that the spread is that of the log-features.
        let spread = self.spread / self.softmax_scale().sqrt();
        (0..self.kv_heads).map(|_| TestMap::random(&mut random, self.d, self.m, spread)).collect()
    }

    pub fn config(&self) -> LinearConfig {
        let mut config = LinearConfig::new().with_heads(self.heads).with_value_dim(self.e);
        if self.log_decay != 0.0 {
            config =
                config.with_log_decay((0..self.kv_heads).map(|h| self.head_decay(h)).collect());
        }
        config.scale = self.scale;
        (config.windows, config.sinks) = (self.windows(), self.sinks);
        config
    }

    pub fn build<T: Real>(&self) -> LinearAttention<T, TestMap<T>> {
        let maps = self.maps().iter().map(TestMap::cast).collect();
        self.config().build(maps).unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }

    /// Exact attention of the same shape; `window` is its window.
    pub fn build_exact<T: Real>(&self) -> Softmax<T> {
        let mut config = SoftmaxConfig::new(self.heads, self.d)
            .with_kv_heads(self.kv_heads)
            .with_value_dim(self.e)
            .with_scale(self.softmax_scale());
        let windows = self.windows().into_iter().map(|window| window.with_kept(0));
        (config.windows, config.sinks) = (windows.collect(), self.sinks);
        config.build().unwrap_or_else(|error| panic!("{self:?}: {error}"))
    }

    /// Values have mean one, so that no mean of them is small by accident and a relative error
    /// means something.
    pub fn inputs(&self, n_q: usize, n_k: usize) -> Inputs<f64> {
        let mut random = Random::new(self.seed ^ 0x5eed);
        let v = random.normals((self.kv_heads, n_k, self.e), 1.0) + 1.0;
        Inputs {
            q: random.normals((self.heads, n_q, self.d), 1.0),
            k: random.normals((self.kv_heads, n_k, self.d), 1.0),
            v: v.mapv(|v| f64::from(v as f32)),
        }
    }

    /// What the reference says, every query seeing every key.
    pub fn full(&self, inputs: &Inputs<f64>, mask: KeyMask<'_>) -> Array3<f64> {
        self.linear(&self.maps(), Pairs::full(), inputs, mask)
    }

    /// What the reference says, causal.
    pub fn causal(&self, inputs: &Inputs<f64>, mask: KeyMask<'_>) -> Array3<f64> {
        self.linear(&self.maps(), Pairs::causal(), inputs, mask)
    }

    /// What the reference says with these maps.
    pub fn linear(
        &self,
        maps: &[impl Oracle],
        pairs: Pairs<'_>,
        inputs: &Inputs<f64>,
        mask: KeyMask<'_>,
    ) -> Array3<f64> {
        self.each_head(inputs, |h, x, y, v| {
            let b = maps[h].key(y);
            let (kernel, scores) =
                (reference::log_kernel(&maps[h].query(x), &b).unwrap(), reference::key_scores(&b));
            let pairs = Pairs {
                window: self.head_window(h),
                sinks: self.sinks,
                kept: self.kept,
                scores: &scores,
                log_decay: self.head_decay(h),
                valid: entries(mask),
                ..pairs
            };
            reference::linear_attention(&reference::scores(x, y).unwrap(), &kernel, v, &pairs)
                .unwrap()
        })
    }

    /// What the reference says of exact attention.
    pub fn exact(&self, pairs: Pairs<'_>, inputs: &Inputs<f64>, mask: KeyMask<'_>) -> Array3<f64> {
        self.each_head(inputs, |h, x, y, v| {
            let (window, sinks) = (self.head_window(h), self.sinks);
            let pairs = Pairs { window, sinks, valid: entries(mask), ..pairs };
            reference::softmax_attention(&reference::scores(x, y).unwrap(), v, &pairs).unwrap()
        })
    }

    /// Runs `head(kv head, x, y, v)` for every query head.
    fn each_head(
        &self,
        inputs: &Inputs<f64>,
        head: impl Fn(usize, &Array2<f64>, &Array2<f64>, &Array2<f64>) -> Array2<f64>,
    ) -> Array3<f64> {
        let root = self.softmax_scale().sqrt();
        let mut out = Array3::zeros((self.heads, inputs.q.shape()[1], self.e));
        for h in 0..self.heads {
            let of = h / (self.heads / self.kv_heads);
            let (x, y) = (
                inputs.q.index_axis(Axis(0), h).mapv(|q| q * root),
                inputs.k.index_axis(Axis(0), of).mapv(|k| k * root),
            );
            let v = inputs.v.index_axis(Axis(0), of).to_owned();
            out.slice_mut(s![h, .., ..]).assign(&head(of, &x, &y, &v));
        }
        out
    }
}

/// The entries of a mask, if it has any.
pub fn entries(mask: KeyMask<'_>) -> Option<&[bool]> {
    match mask {
        KeyMask::Valid(valid) => Some(valid),
        _ => None,
    }
}
