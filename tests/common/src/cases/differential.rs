//! The fast paths against the reference, on random small configurations.
//!
//! The two may differ by [`tolerance`]: a constant, times the type's epsilon, times the largest
//! exponent and the root of the number of additions, times the largest value. An exponent's
//! rounding error is a weight's relative error, and an output is a weighted mean of values.

use std::fmt::Debug;

use dijiang::Real;
use dijiang::attention::{
    Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, SoftmaxConfig, Storage,
    Window, Workspace,
};
use dijiang::kernel::{DctMap, DctParams, Envelope, FavorConfig, Pairing, Projection};
use dijiang::reference::{self, Pairs, PlainMap};
use ndarray::{Array2, Array3, ArrayRef3, Axis, s};

use super::arrays::{LAYOUTS, Laid, Layout};
use super::{Source, Tally};

/// Everything but the element type.
#[derive(Debug)]
struct Case {
    heads: usize,
    value_dim: usize,
    scale: f64,
    windows: Vec<Window>,
    sinks: usize,
    log_decay: Vec<f64>,
    maps: Vec<DctParams>,
    /// `[h, n, d]`, `[h_kv, n, d]`, `[h_kv, n, e]`.
    q: Array3<f64>,
    k: Array3<f64>,
    v: Array3<f64>,
    valid: Option<Vec<bool>>,
    layout: Layout,
    /// Lengths of the pieces the tokens arrive in.
    pieces: Vec<usize>,
    /// Whether the state goes through bytes between the pieces.
    carried: bool,
}

pub fn run(source: &mut Source<'_>, tally: &mut Tally) {
    let case = Case::new(source);
    let (causal, full, exact) = case.expected();
    case.check::<f64>(&causal, full.as_ref(), &exact, tally);
    case.check::<f32>(&causal, full.as_ref(), &exact, tally);
}

impl Case {
    fn new(source: &mut Source<'_>) -> Self {
        let (kv_heads, group) = source.choose(&[(1, 1), (1, 1), (1, 1), (1, 2), (2, 1), (2, 3)]);
        let dim = source.choose(&[1, 2, 3, 4, 5, 7, 8, 8, 8, 16]);
        let value_dim = source.choose(&[1, 2, 3, 5, 8, 17]);
        let tokens = match source.below(64) {
            0 => 64 + source.below(80),
            1..=6 => source.upto(48),
            _ => source.upto(14),
        };
        let windows: Vec<Window> = if source.chance(0.5) {
            let mut window = || {
                let chunk = source.choose(&[1, 2, 3, 4, 8, 8, 16, 64]);
                let kept = source.choose(&[0, 0, 0, 1, 2, 5, 17]);
                Window::new(chunk, source.below(3)).with_kept(kept)
            };
            (0..kv_heads).map(|_| window()).collect()
        } else {
            Vec::new()
        };
        let shortest = windows.iter().map(|window| window.chunk).min().unwrap_or(0);
        let sinks = if source.chance(0.5) { source.below(shortest.min(6) + 1) } else { 0 };
        let decays = source.chance(0.4);
        let log_decay = (0..kv_heads).map(|_| {
            if decays { source.choose(&[0.0, -0.001, -0.1, -1.0, -30.0, -1e9, -1e15]) } else { 0.0 }
        });
        let log_decay = log_decay.collect();
        let (maps, reach) = maps(source, kv_heads, dim);
        let mut tensor = |heads: usize, width: usize, scale: f64| {
            let numbers = source.normals(heads * tokens * width, scale);
            Array3::from_shape_vec((heads, tokens, width), numbers)
                .unwrap_or_else(|error| panic!("{error}"))
        };
        let (q, k, v) = (
            tensor(kv_heads * group, dim, reach),
            tensor(kv_heads, dim, reach),
            tensor(kv_heads, value_dim, 1.0),
        );
        let valid = match source.below(8) {
            0 | 1 => Some((0..tokens).map(|_| source.chance(0.7)).collect()),
            2 => Some((0..tokens).map(|_| source.chance(0.05)).collect()),
            3 => Some(vec![false; tokens]),
            _ => None,
        };
        let mut pieces = Vec::new();
        let most = source.choose(&[1, 3, 16, 200]);
        while pieces.iter().sum::<usize>() < tokens {
            pieces.push(source.upto(most.min(tokens - pieces.iter().sum::<usize>())));
        }
        let scale = source.choose(&[1.0 / (dim as f64).sqrt(), 1.0, 0.07]);
        let (layout, carried) = (source.choose(&LAYOUTS), source.chance(0.1));
        let mut case = Self {
            heads: kv_heads * group,
            value_dim,
            scale,
            windows,
            sinks,
            log_decay,
            maps,
            q,
            k,
            v,
            valid,
            layout,
            pieces,
            carried,
        };
        for h in 0..kv_heads {
            if case.has_tied_scores(h) && !case.windows.is_empty() {
                case.windows[h].kept = 0;
            }
        }
        case
    }

    /// Scaled queries or keys of a head.
    fn scaled(&self, rows: &Array3<f64>, h: usize) -> Array2<f64> {
        rows.index_axis(Axis(0), h).mapv(|x| x * self.scale.sqrt())
    }

    /// Two keys of key-value head `h` are so close in score that rounding may decide between them.
    fn has_tied_scores(&self, h: usize) -> bool {
        let y = self.scaled(&self.k, h);
        let (_, b) = log_features(&self.maps[h], &y, &y);
        let scores = reference::key_scores(&b);
        let mut scores: Vec<f64> =
            scores.iter().enumerate().map(|(j, s)| s - self.log_decay[h] * j as f64).collect();
        scores.sort_unstable_by(f64::total_cmp);
        let tolerance = 1e-4 * (1.0 + largest(&b) + hidden(&self.maps[h], &y, &y));
        scores.windows(2).any(|pair| pair[1] - pair[0] <= tolerance.max(1e-12 * pair[1].abs()))
    }

    fn mask(&self) -> KeyMask<'_> {
        self.valid.as_deref().map_or(KeyMask::All, KeyMask::Valid)
    }

    fn is_pure(&self) -> bool {
        self.windows.is_empty() && self.log_decay.iter().all(|&decay| decay == 0.0)
    }

    /// What the reference says: causal, full if there is neither local window nor decay, and exact
    /// softmax.
    fn expected(&self) -> (Expected, Option<Expected>, Expected) {
        let mut causal = Expected::new(self);
        let mut full = self.is_pure().then(|| Expected::new(self));
        let mut exact = Expected::new(self);
        for h in 0..self.heads {
            let of = h / (self.heads / self.maps.len());
            let (x, y) = (self.scaled(&self.q, h), self.scaled(&self.k, of));
            let v = self.v.index_axis(Axis(0), of).to_owned();
            let (a, b) = log_features(&self.maps[of], &x, &y);
            let says = |result: dijiang::Result<Array2<f64>>| {
                result.unwrap_or_else(|error| panic!("{error}"))
            };
            let (scores, kernel) =
                (says(reference::scores(&x, &y)), says(reference::log_kernel(&a, &b)));
            let key_scores = reference::key_scores(&b);
            let pairs = Pairs {
                window: self.windows.get(of).map(|window| (window.chunk, window.back)),
                kept: self.windows.get(of).map_or(0, |window| window.kept),
                scores: &key_scores,
                sinks: self.sinks,
                log_decay: self.log_decay[of],
                valid: self.valid.as_deref(),
                ..Pairs::causal()
            };
            let exponent = largest(&a)
                + largest(&b)
                + largest(&x).powi(2) * x.ncols() as f64
                + hidden(&self.maps[of], &x, &y);
            let decay = (-self.log_decay[of] * x.nrows() as f64).min(1000.0);
            causal.set(
                h,
                &says(reference::linear_attention(&scores, &kernel, &v, &pairs)),
                exponent + decay + largest(&scores),
            );
            exact.set(
                h,
                &says(reference::softmax_attention(&scores, &v, &pairs)),
                2.0 * largest(&scores),
            );
            if let Some(full) = &mut full {
                let pairs = Pairs { valid: self.valid.as_deref(), ..Pairs::full() };
                full.set(
                    h,
                    &says(reference::linear_attention(&scores, &kernel, &v, &pairs)),
                    exponent,
                );
            }
        }
        (causal, full, exact)
    }

    fn check<T: Real>(
        &self,
        causal: &Expected,
        full: Option<&Expected>,
        exact: &Expected,
        tally: &mut Tally,
    ) {
        let cast = |array: &Array3<f64>| Laid::new(self.layout, &array.mapv(T::from_f64));
        let (q, k, v) = (cast(&self.q), cast(&self.k), cast(&self.v));
        let (q, k, v) = (q.view(), k.view(), v.view());
        let mut config = LinearConfig::new()
            .with_heads(self.heads)
            .with_value_dim(self.value_dim)
            .with_scale(self.scale);
        config = config.with_log_decay(self.log_decay.clone());
        (config.windows, config.sinks) = (self.windows.clone(), self.sinks);
        let maps = self.maps.iter().map(|map| DctMap::<T>::from_params(map.clone()));
        let maps = maps
            .collect::<dijiang::Result<Vec<_>>>()
            .unwrap_or_else(|error| panic!("{error}: {self:?}"));
        let attention = config.build(maps).unwrap_or_else(|error| panic!("{error}: {self:?}"));

        // The same scratch for everything, with whatever the last call left in it.
        let mut workspace = attention.workspace();
        let out = self.streamed(&attention, &q, &k, &v, &mut workspace, tally);
        self.compare("streamed", &out, causal);
        if let Some(full) = full {
            let mut out = Array3::from_elem(out.raw_dim(), T::from_f64(f64::NAN));
            tally.record(
                attention
                    .clone()
                    .with_causality(Causality::Bidirectional)
                    .expect("no window")
                    .forward_into(
                        Qkv::new(&q, &k, &v).with_mask(self.mask()),
                        &mut out,
                        &mut workspace,
                    ),
            );
            self.compare("full", &out, full);
        }
        let (kv_heads, dim) = (self.maps.len(), self.maps[0].dim());
        let mut config = SoftmaxConfig::new(self.heads, dim)
            .with_kv_heads(kv_heads)
            .with_value_dim(self.value_dim)
            .with_scale(self.scale);
        let windows = self.windows.iter().map(|window| window.with_kept(0));
        (config.windows, config.sinks) = (windows.collect(), self.sinks);
        let softmax = config.build::<T>().unwrap_or_else(|error| panic!("{error}: {self:?}"));
        let out = tally
            .record(softmax.forward(Qkv::new(&q, &k, &v).with_mask(self.mask())))
            .unwrap_or_else(|| panic!("refused: {self:?}"));
        self.compare("softmax", &out, exact);
    }

    /// All tokens in their pieces, single ones by steps.
    fn streamed<T: Real>(
        &self,
        attention: &LinearAttention<T, DctMap<T>>,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        workspace: &mut Workspace<T>,
        tally: &mut Tally,
    ) -> Array3<T> {
        let mut state = attention.new_state();
        let mut out =
            Array3::from_elem((self.heads, q.shape()[1], self.value_dim), T::from_f64(f64::NAN));
        let mut start = 0;
        for &len in &self.pieces {
            let valid = self.valid.as_ref().map(|valid| &valid[start..start + len]);
            let tokens = s![.., start..start + len, ..];
            let mut out = out.slice_mut(tokens);
            let result = match valid {
                None | Some([true]) if len == 1 => {
                    let token = |x: &ArrayRef3<T>| x.index_axis(Axis(1), start).to_owned();
                    attention.step(
                        &mut state,
                        Qkv::token(&token(q), &token(k), &token(v)),
                        &mut out.index_axis_mut(Axis(1), 0),
                        workspace,
                    )
                }
                _ => {
                    let mask = valid.map_or(KeyMask::All, KeyMask::Valid);
                    attention.prefill_into(
                        &mut [&mut state],
                        Qkv::new(&q.slice(tokens), &k.slice(tokens), &v.slice(tokens))
                            .with_mask(mask),
                        &mut out,
                        workspace,
                    )
                }
            };
            tally.record(result);
            if self.carried {
                state = attention
                    .state_from_bytes(&state.to_bytes(Storage::Exact))
                    .unwrap_or_else(|error| panic!("{error}: {self:?}"));
            }
            start += len;
        }
        assert_eq!(state.position(), start, "{self:?}");
        out
    }

    fn compare<T: Real>(&self, path: &str, got: &Array3<T>, expected: &Expected) {
        let (heads, tokens, _) = got.dim();
        let most = largest(&self.v);
        for h in 0..heads {
            let tolerance = most
                * tolerance::<T>(
                    expected.exponents[h],
                    tokens + self.maps[0].features() + self.maps[0].dim(),
                );
            for ((i, l), &expected) in expected.out.index_axis(Axis(0), h).indexed_iter() {
                let got = got[[h, i, l]].to_f64();
                let close = (got - expected).abs() <= tolerance; // false for NaN
                assert!(
                    close,
                    "{path}, {}: [{h}, {i}, {l}] is {got:e}, not {expected:e}; tolerance \
                     {tolerance:e}; {self:?}",
                    T::NAME
                );
            }
        }
    }
}

/// By how much outputs for values of at most 1 may differ from the reference: `exponent` is the
/// largest sum of exponents that a weight is computed from, `work` the number of additions.
fn tolerance<T: Real>(exponent: f64, work: usize) -> f64 {
    16.0 * T::EPSILON.to_f64() * (exponent + (work as f64).sqrt())
}

/// Outputs `[h, n, e]`, and for each head the largest sum of exponents.
#[derive(Debug)]
struct Expected {
    out: Array3<f64>,
    exponents: Vec<f64>,
}

impl Expected {
    fn new(case: &Case) -> Self {
        Self {
            out: Array3::zeros((case.heads, case.q.shape()[1], case.value_dim)),
            exponents: vec![0.0; case.heads],
        }
    }

    fn set(&mut self, h: usize, out: &Array2<f64>, exponent: f64) {
        self.out.index_axis_mut(Axis(0), h).assign(out);
        self.exponents[h] = exponent;
    }
}

fn largest<'a>(numbers: impl IntoIterator<Item = &'a f64>) -> f64 {
    numbers.into_iter().fold(0.0, |top: f64, x| top.max(x.abs()))
}

/// What may cancel within an exponent: centres and the terms that make up for them.
fn hidden(map: &DctParams, x: &Array2<f64>, y: &Array2<f64>) -> f64 {
    let d = map.dim() as f64;
    let center = largest(map.query.center.iter().chain(&map.key.center));
    let z = largest(x).max(largest(y)) + center;
    let slope = largest(map.query.radii.iter().chain(&map.key.radii))
        * largest(map.query.scale.iter().chain(&map.key.scale))
        * d.sqrt();
    let rows = match &map.projection {
        Projection::Dense { query, key } => largest(query.iter().chain(key)) * d.sqrt(),
        _ => 1.0,
    };
    2.0 * z * slope * rows + d * z * z + 2.0 * d * z * center
}

/// One map per key-value head, and how large queries and keys may be.
fn maps(source: &mut Source<'_>, kv_heads: usize, dim: usize) -> (Vec<DctParams>, f64) {
    let kind = source.below(4);
    let blocks = source.choose(&[1, 1, 1, 2, 3]);
    let (pairing, envelope) = (
        source.choose(&[Pairing::Single, Pairing::Antithetic]),
        source.choose(&[Envelope::None, Envelope::None, Envelope::Gaussian]),
    );
    let favor_features = source.upto(20);
    let reach = source.choose(&[0.3, 1.0, 1.0, 3.0, 30.0]);
    let spread = source.choose(&[0.3, 1.0, 2.0]);
    let map = |source: &mut Source<'_>| {
        let mut params = match kind {
            0 => FavorConfig::new(dim, favor_features)
                .with_seed(source.bits())
                .params()
                .unwrap_or_else(|error| panic!("{error}")),
            _ => {
                let mut params = DctParams::new(dim);
                (params.pairing, params.envelope) = (pairing, envelope);
                let rows = blocks * dim;
                for side in [&mut params.query, &mut params.key] {
                    (side.scale, side.radii) =
                        (source.normals(rows, 1.0), source.normals(rows, spread));
                }
                let features = if pairing == Pairing::Single { rows } else { 2 * rows };
                params.log_weight = source.normals(features, 1.0);
                if kind == 1 {
                    params.projection = Projection::Mixed {
                        signs: (0..3 * rows).map(|_| source.choose(&[1.0, -1.0])).collect(),
                    };
                } else if kind == 2 {
                    params.projection = Projection::Deep {
                        query: source.normals(2 * rows, 1.0),
                        key: source.normals(2 * rows, 1.0),
                    };
                }
                params
            }
        };
        params.log_mix = source.choose(&[0.0, -4.0, 2.0]);
        for side in [&mut params.query, &mut params.key] {
            let far = source.choose(&[0.0, spread]);
            side.center = source.normals(dim, far);
        }
        params
    };
    ((0..kv_heads).map(|_| map(source)).collect(), reach)
}

/// Log-features `[n, m]` of queries and keys: by the reference's own map where it has one,
/// otherwise by literal matrices.
fn log_features(
    params: &DctParams,
    x: &Array2<f64>,
    y: &Array2<f64>,
) -> (Array2<f64>, Array2<f64>) {
    let says =
        |result: dijiang::Result<Array2<f64>>| result.unwrap_or_else(|error| panic!("{error}"));
    if params.projection == Projection::Dct {
        let map = plain(params);
        return (says(map.query_log_features(x)), says(map.key_log_features(y)));
    }
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let (mu_q, mu_k) = (&params.query.center, &params.key.center);
    let rest = |token: &[f64], f: usize, query: bool| match query {
        true => dot(token, mu_k) - dot(mu_q, mu_k) + params.log_mix,
        false => params.log_weight[f] + dot(mu_q, token),
    };
    let side = |z: &Array2<f64>, query: bool| {
        let (center, rows) = (if query { mu_q } else { mu_k }, rows(params, query));
        Array2::from_shape_fn((z.nrows(), params.features()), |(j, f)| {
            let token = z.row(j).to_vec();
            let centred: Vec<f64> = token.iter().zip(center).map(|(z, mu)| z - mu).collect();
            let u = dot(&rows.row(f % rows.nrows()).to_vec(), &centred)
                * if f < rows.nrows() { 1.0 } else { -1.0 };
            let p = if params.envelope == Envelope::Gaussian {
                -0.5 * dot(&centred, &centred)
            } else {
                0.0
            };
            u + p + rest(&token, f, query)
        })
    };
    (side(x, true), side(y, false))
}

/// The rows of one side's projection, scales and radii included, `[P, d]`.
fn rows(params: &DctParams, query: bool) -> Array2<f64> {
    let side = if query { &params.query } else { &params.key };
    let (d, count) = (params.dim(), side.radii.len());
    let mut rows = match &params.projection {
        Projection::Dense { query: of_query, key } => {
            let rows = if query { of_query } else { key };
            Array2::from_shape_fn((count, d), |(f, i)| rows[f * d + i] * side.scale[i])
        }
        Projection::Mixed { .. } | Projection::Deep { .. } => {
            let c = reference::dct_matrix(d);
            let scaled = |c: &Array2<f64>, diagonal: &[f64]| {
                Array2::from_shape_fn((d, d), |(f, i)| c[[f, i]] * diagonal[i])
            };
            let mut rows = Array2::zeros((count, d));
            for g in 0..count / d {
                let s = &side.scale[g * d..][..d];
                let block = match &params.projection {
                    Projection::Mixed { signs } => {
                        let [first, second, third] =
                            [0, 1, 2].map(|i| scaled(&c, &signs[(3 * g + i) * d..][..d]));
                        scaled(&first.dot(&second).dot(&third), s)
                    }
                    Projection::Deep { query: of_query, key } => {
                        let scales = &(if query { of_query } else { key })[2 * g * d..];
                        scaled(&c, s)
                            .dot(&scaled(&c.t().to_owned(), &scales[d..2 * d]))
                            .dot(&scaled(&c, &scales[..d]))
                    }
                    Projection::Dct | Projection::Dense { .. } => unreachable!("other arms"),
                };
                rows.slice_mut(s![g * d..(g + 1) * d, ..]).assign(&block);
            }
            rows
        }
        Projection::Dct => unreachable!("the reference has it"),
    };
    rows.rows_mut().into_iter().zip(&side.radii).for_each(|(mut row, &t)| row *= t);
    rows
}

/// The same parameters, as the reference takes them.
fn plain(params: &DctParams) -> PlainMap {
    let mut map = PlainMap::new(params.dim());
    for (to, from) in [(&mut map.query, &params.query), (&mut map.key, &params.key)] {
        to.center.clone_from(&from.center);
        to.radii.clone_from(&from.radii);
        let scale = Array2::from_shape_vec((params.blocks(), params.dim()), from.scale.clone());
        to.scale = scale.unwrap_or_else(|error| panic!("{error}"));
    }
    map.log_weight.clone_from(&params.log_weight);
    map.log_mix = params.log_mix;
    map.pairing = match params.pairing {
        Pairing::Single => reference::Pairing::Single,
        Pairing::Antithetic => reference::Pairing::Antithetic,
    };
    map.envelope = match params.envelope {
        Envelope::None => reference::Envelope::None,
        Envelope::Gaussian => reference::Envelope::Gaussian,
    };
    map
}
