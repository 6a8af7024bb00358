//! The feature maps: against formulas written out here, against the code published with the paper,
//! and their statistics.

use std::f64::consts::PI;

use dijiang::kernel::{
    DctMap, DctMapConfig, DctParams, Envelope, FavorConfig, FavorMap, FavorRows, FeatureMap,
    InputScales, Mixing, Pairing, Points, Projection, Radial, SideParams, Sides,
    published_features,
};
use dijiang::{Error, Real};
use ndarray::{Array2, ArrayView2, Axis, array, concatenate, s};
use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

fn normals(count: usize, seed: u64) -> Vec<f64> {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    (0..count).map(|_| StandardNormal.sample(&mut rng)).collect()
}

fn normal_rows(n: usize, d: usize, seed: u64) -> Array2<f64> {
    Array2::from_shape_vec((n, d), normals(n * d, seed)).unwrap()
}

fn cast<T: Real>(x: &Array2<f64>) -> Array2<T> {
    x.mapv(T::from_f64)
}

/// C[f,i] of the orthonormal DCT-II.
fn cosine(d: usize, f: usize, i: usize) -> f64 {
    let scale = if f == 0 { (1.0 / d as f64).sqrt() } else { (2.0 / d as f64).sqrt() };
    scale * (PI * ((2 * i + 1) * f) as f64 / (2 * d) as f64).cos()
}

fn dct(x: &[f64]) -> Vec<f64> {
    let d = x.len();
    (0..d).map(|f| (0..d).map(|i| cosine(d, f, i) * x[i]).sum()).collect()
}

/// DCT-III, its transpose.
fn dct3(x: &[f64]) -> Vec<f64> {
    (0..x.len()).map(|i| (0..x.len()).map(|f| cosine(x.len(), f, i) * x[f]).sum()).collect()
}

fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a * b).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// u_f of one vector, both signs if paired; `own` is what only this side has of the projection.
fn literal_u(params: &DctParams, side: &SideParams, own: &[f64], z: &[f64]) -> Vec<f64> {
    let d = z.len();
    let mut u = Vec::new();
    match &params.projection {
        Projection::Dct => side.scale.chunks(d).for_each(|scale| u.extend(dct(&times(scale, z)))),
        Projection::Mixed { signs } => {
            for (scale, signs) in side.scale.chunks(d).zip(signs.chunks(3 * d)) {
                let (d1, d2, d3) = (&signs[..d], &signs[d..2 * d], &signs[2 * d..]);
                u.extend(dct(&times(d1, &dct(&times(d2, &dct(&times(d3, &times(scale, z))))))));
            }
        }
        Projection::Deep { .. } => {
            for (s, outer) in side.scale.chunks(d).zip(own.chunks(2 * d)) {
                let (p, r) = outer.split_at(d);
                u.extend(dct(&times(s, &dct3(&times(r, &dct(&times(p, z)))))));
            }
        }
        Projection::Dense { .. } => {
            u.extend(own.chunks(d).map(|row| dot(row, &times(&side.scale, z))))
        }
    }
    let mut u = times(&side.radii, &u);
    if params.pairing == Pairing::Antithetic {
        u.extend(u.clone().iter().map(|u| -u));
    }
    u
}

fn literal_envelope(params: &DctParams, z: &[f64]) -> f64 {
    match params.envelope {
        Envelope::None => 0.0,
        Envelope::Gaussian => -dot(z, z) / 2.0,
    }
}

/// a_f(x), including the mix.
fn literal_query(params: &DctParams, x: &[f64]) -> Vec<f64> {
    let (mu_q, mu_k) = (&params.query.center, &params.key.center);
    let z: Vec<f64> = x.iter().zip(mu_q).map(|(x, mu)| x - mu).collect();
    let own = if let Projection::Dense { query, .. } | Projection::Deep { query, .. } =
        &params.projection
    {
        &query[..]
    } else {
        &[]
    };
    let rest = literal_envelope(params, &z) + dot(x, mu_k) - dot(mu_q, mu_k) + params.log_mix;
    literal_u(params, &params.query, own, &z).iter().map(|u| u + rest).collect()
}

/// b_f(y).
fn literal_key(params: &DctParams, y: &[f64]) -> Vec<f64> {
    let (mu_q, mu_k) = (&params.query.center, &params.key.center);
    let z: Vec<f64> = y.iter().zip(mu_k).map(|(y, mu)| y - mu).collect();
    let own =
        if let Projection::Dense { key, .. } | Projection::Deep { key, .. } = &params.projection {
            &key[..]
        } else {
            &[]
        };
    let rest = literal_envelope(params, &z) + dot(mu_q, y);
    literal_u(params, &params.key, own, &z)
        .iter()
        .zip(&params.log_weight)
        .map(|(u, w)| u + w + rest)
        .collect()
}

/// K(x_0, y_0) of a map.
fn kernel<T: Real>(map: &impl FeatureMap<T>, x: &Array2<T>, y: &Array2<T>) -> f64 {
    let (a, b) = (map.query_log_features(x).unwrap(), map.key_log_features(y).unwrap());
    a.row(0).iter().zip(b.row(0)).map(|(a, b)| (a.to_f64() + b.to_f64()).exp()).sum()
}

/// x and y with x = (x+y)/2 + h, y = (x+y)/2 − h, |x+y| = `sum` and |h| = `half`.
fn pair(d: usize, sum: f64, half: f64, seed: u64) -> (Array2<f64>, Array2<f64>) {
    let unit = |seed| {
        let v = normal_rows(1, d, seed);
        let length = v.mapv(|v| v * v).sum().sqrt();
        v / length
    };
    let (s, h) = (unit(seed) * (sum / 2.0), unit(seed + 1000) * half);
    (&s + &h, s - h)
}

fn exact(x: &Array2<f64>, y: &Array2<f64>) -> f64 {
    (x * y).sum().exp()
}

struct Moments {
    mean: f64,
    /// Standard error of the mean.
    error: f64,
    /// Root mean square distance from one.
    rms: f64,
}

/// Moments of K/`target` over seeds.
fn moments(seeds: u64, target: f64, kernel: impl Fn(u64) -> f64) -> Moments {
    let ratios: Vec<f64> = (0..seeds).map(|seed| kernel(seed) / target).collect();
    let n = seeds as f64;
    let mean = ratios.iter().sum::<f64>() / n;
    let variance = ratios.iter().map(|r| (r - mean).powi(2)).sum::<f64>() / (n - 1.0);
    Moments {
        mean,
        error: (variance / n).sqrt(),
        rms: (ratios.iter().map(|r| (r - 1.0).powi(2)).sum::<f64>() / n).sqrt(),
    }
}

/// Every parameter of its own: radii, scales, centres, weights, mix.
fn shaken(mut params: DctParams, seed: u64) -> DctParams {
    let d = params.dim();
    let shake = |values: &mut [f64], scale: f64, seed: u64| {
        for (v, noise) in values.iter_mut().zip(normals(1 << 12, seed)) {
            *v += scale * noise;
        }
    };
    shake(&mut params.query.center, 0.4, seed + 1);
    shake(&mut params.key.center, 0.4, seed + 2);
    shake(&mut params.query.scale, 0.3, seed + 3);
    shake(&mut params.query.radii, 0.3, seed + 4);
    shake(&mut params.log_weight, 0.2, seed + 5);
    if params.sides == Sides::Tied {
        params.key.scale.clone_from(&params.query.scale);
        params.key.radii.clone_from(&params.query.radii);
    } else {
        shake(&mut params.key.scale, 0.3, seed + 6);
        shake(&mut params.key.radii, 0.3, seed + 7);
    }
    match &mut params.projection {
        Projection::Mixed { signs } => shake(signs, 0.2, seed + 8),
        Projection::Deep { query, key } => {
            shake(query, 0.3, seed + 9);
            let own = if params.sides == Sides::Tied { seed + 9 } else { seed + 10 };
            shake(key, 0.3, own);
        }
        Projection::Dct | Projection::Dense { .. } => {}
    }
    params.log_mix = -0.3 - 0.01 * d as f64;
    params
}

fn dense(params: &DctParams, rows: usize, seed: u64) -> DctParams {
    let d = params.dim();
    let mut params = params.clone();
    params.projection =
        Projection::Dense { query: normals(rows * d, seed), key: normals(rows * d, seed + 1) };
    for side in [&mut params.query, &mut params.key] {
        side.scale = vec![1.0; d];
        side.radii = vec![0.8; rows];
    }
    let m = if params.pairing == Pairing::Antithetic { 2 * rows } else { rows };
    params.log_weight = vec![-(m as f64).ln(); m];
    params
}

fn every_combination(dims: &[usize]) -> Vec<DctParams> {
    let mut all = Vec::new();
    for &d in dims {
        for blocks in [1, 3] {
            for mixing in [Mixing::None, Mixing::Mixed] {
                for pairing in [Pairing::Single, Pairing::Antithetic] {
                    for envelope in [Envelope::None, Envelope::Gaussian] {
                        for sides in [Sides::Untied, Sides::Tied] {
                            let config = DctMapConfig::new()
                                .with_blocks(blocks)
                                .with_mixing(mixing)
                                .with_pairing(pairing);
                            let params = config
                                .with_envelope(envelope)
                                .with_sides(sides)
                                .with_radial(Radial::Chi)
                                .params(d)
                                .unwrap();
                            let seed = all.len() as u64;
                            if sides == Sides::Untied && mixing == Mixing::None {
                                all.push(shaken(dense(&params, blocks * d + 1, seed), seed));
                            }
                            if mixing == Mixing::None {
                                all.push(shaken(params.to_deep(), seed));
                            }
                            all.push(shaken(params.clone(), seed));
                            all.push(params);
                        }
                    }
                }
            }
        }
    }
    // One centre at zero and the other not.
    for zero_query in [true, false] {
        let mut params =
            shaken(DctMapConfig::new().with_envelope(Envelope::Gaussian).params(6).unwrap(), 1);
        if zero_query {
            params.query.center.fill(0.0)
        } else {
            params.key.center.fill(0.0)
        }
        all.push(dense(&params, 4, 9));
        all.push(params);
    }
    all
}

fn log_features_follow_the_formula<T: Real>(dims: &[usize]) {
    for (case, params) in every_combination(dims).into_iter().enumerate() {
        let d = params.dim();
        let (x, y) = (normal_rows(19, d, 2 * case as u64), normal_rows(19, d, 2 * case as u64 + 1));
        let map = DctMap::<T>::from_params(params.clone()).unwrap();
        assert_eq!((map.dim(), map.features()), (d, params.features()));
        let (a, b) =
            (map.query_log_features(&cast(&x)).unwrap(), map.key_log_features(&cast(&y)).unwrap());
        assert_eq!(a.dim(), (19, params.features()));
        for j in 0..19 {
            let sides = [
                ("query", literal_query(&params, x.row(j).as_slice().unwrap()), a.row(j)),
                ("key", literal_key(&params, y.row(j).as_slice().unwrap()), b.row(j)),
            ];
            for (side, expected, got) in sides {
                for (f, (expected, got)) in expected.iter().zip(got).enumerate() {
                    // The sums run over d terms; log-features here are of order (1 + |z|)·√d.
                    let tolerance = 16.0
                        * T::EPSILON.to_f64()
                        * (d as f64).sqrt()
                        * (3.0 + expected.abs() + d as f64);
                    let error = (got.to_f64() - expected).abs();
                    assert!(
                        error <= tolerance,
                        "{} case {case} d {d} {side} token {j} feature {f}: {got} for {expected}",
                        T::NAME
                    );
                }
            }
        }
    }
}

#[test]
fn log_features_follow_the_formula_f64() {
    log_features_follow_the_formula::<f64>(&[1, 2, 5, 7, 16]);
}

#[test]
fn log_features_follow_the_formula_f32() {
    log_features_follow_the_formula::<f32>(&[1, 3, 8, 31]);
}

/// Splits a panel at every lane group: the columns must keep their bits.
fn columns_do_not_depend_on_width<T: Real>() {
    // Dense rows by the extremes: a single one, and sums longer than one pass of the matrix
    // product.
    let mut cases = every_combination(&[1, 7, 48]);
    cases.extend(
        [(5, 1), (16, 1), (700, 3), (1100, 40)]
            .map(|(d, rows)| shaken(dense(&DctParams::new(d), rows, 1), 2)),
    );
    for (case, params) in cases.into_iter().enumerate() {
        let (d, m) = (params.dim(), params.features());
        let map = DctMap::<T>::from_params(params).unwrap();
        let wide = 112;
        let tokens = cast::<T>(&normal_rows(d, wide, case as u64));
        let run = |x: ArrayView2<'_, T>, query: bool| {
            let width = x.ncols();
            let x = x.as_standard_layout().into_owned();
            let (mut out, mut scratch) = (
                Array2::<T>::zeros((m, width)),
                vec![T::from_f64(f64::NAN); map.scratch_len(width)],
            );
            out.fill(T::from_f64(f64::NAN));
            let (x, o) = (x.as_slice().unwrap(), out.as_slice_mut().unwrap());
            if query {
                map.query_panel(width, x, o, &mut scratch)
            } else {
                map.key_panel(width, x, o, &mut scratch)
            }
            out
        };
        for query in [true, false] {
            let whole = run(tokens.view(), query);
            let cuts = [0, 16, 32, 80, 112];
            let parts: Vec<_> = cuts
                .windows(2)
                .map(|cut| run(tokens.slice(s![.., cut[0]..cut[1]]), query))
                .collect();
            let parts =
                concatenate(Axis(1), &parts.iter().map(|p| p.view()).collect::<Vec<_>>()).unwrap();
            assert!(whole == parts, "{} case {case} d {d} m {m} query {query}", T::NAME);
            // Other columns become other tokens: column 5 keeps its bits.
            let mut others = tokens.mapv(|v| -v - T::one());
            others.column_mut(5).assign(&tokens.column(5));
            assert!(
                run(others.view(), query).column(5) == whole.column(5),
                "{} case {case} d {d} m {m} query {query}",
                T::NAME
            );
        }
    }
}

#[test]
fn columns_do_not_depend_on_width_or_neighbours() {
    columns_do_not_depend_on_width::<f32>();
    columns_do_not_depend_on_width::<f64>();
}

#[test]
fn a_projection_written_out_is_the_same_map() {
    let x = Array2::from_shape_vec((9, 12), normals(9 * 12, 77)).unwrap();
    for (mixing, deep) in [(Mixing::None, false), (Mixing::None, true), (Mixing::Mixed, false)] {
        let config = DctMapConfig::new()
            .with_blocks(3)
            .with_mixing(mixing)
            .with_pairing(Pairing::Antithetic);
        let mut params = config.with_envelope(Envelope::Gaussian).params(12).unwrap();
        for (side, seed) in [(&mut params.query, 78), (&mut params.key, 79)] {
            side.center
                .iter_mut()
                .chain(&mut side.scale)
                .zip(normals(48, seed))
                .for_each(|(number, by)| *number += by);
        }
        if deep {
            params = shaken(params.to_deep(), 80);
        }
        let dense = params.to_dense().unwrap();
        assert!(matches!(dense.projection, Projection::Dense { .. }));
        assert_eq!(dense.to_dense().unwrap(), dense);
        let (plain, dense) = (
            DctMap::<f64>::from_params(params).unwrap(),
            DctMap::<f64>::from_params(dense).unwrap(),
        );
        let close = |a: Array2<f64>, b: Array2<f64>| {
            a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-11 * b.abs().max(1.0))
        };
        assert!(
            close(dense.query_log_features(&x).unwrap(), plain.query_log_features(&x).unwrap()),
            "{mixing:?}"
        );
        assert!(
            close(dense.key_log_features(&x).unwrap(), plain.key_log_features(&x).unwrap()),
            "{mixing:?}"
        );
    }
}

/// Two transforms that undo each other, whichever way they are computed.
#[test]
fn a_deep_projection_starts_as_the_plain_one() {
    for d in [1, 8, 12, 64, 300] {
        let x = Array2::from_shape_vec((5, d), normals(5 * d, 81)).unwrap();
        let params = shaken(DctMapConfig::new().with_blocks(2).params(d).unwrap(), 82);
        let deep = params.to_deep();
        assert!(matches!(deep.projection, Projection::Deep { .. }));
        assert_eq!(deep.to_deep(), deep);
        let (plain, deep) = (
            DctMap::<f64>::from_params(params).unwrap(),
            DctMap::<f64>::from_params(deep).unwrap(),
        );
        let close = |a: Array2<f64>, b: Array2<f64>| {
            a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-11 * b.abs().max(1.0))
        };
        assert!(
            close(deep.query_log_features(&x).unwrap(), plain.query_log_features(&x).unwrap()),
            "d {d}"
        );
        assert!(
            close(deep.key_log_features(&x).unwrap(), plain.key_log_features(&x).unwrap()),
            "d {d}"
        );
    }
}

#[test]
fn centring_changes_the_error_only() {
    // Far from the origin: without centres the estimate is useless, with them it is exp(x·y).
    let d = 8;
    let (mu_q, mu_k) = (normal_rows(1, d, 1) * 2.0, normal_rows(1, d, 2) * 2.0);
    let (x, y) = (&mu_q + normal_rows(1, d, 3) * 0.3, &mu_k + normal_rows(1, d, 4) * 0.3);
    let config =
        DctMapConfig::new().with_blocks(512).with_mixing(Mixing::Mixed).with_radial(Radial::Chi);
    let plain = config.with_envelope(Envelope::Gaussian).params(d).unwrap();
    let mut centred = plain.clone();
    centred.query.center = mu_q.into_raw_vec_and_offset().0;
    centred.key.center = mu_k.into_raw_vec_and_offset().0;
    let error = |params| {
        (kernel(&DctMap::<f64>::from_params(params).unwrap(), &x, &y) / exact(&x, &y) - 1.0).abs()
    };
    let (plain, centred) = (error(plain), error(centred));
    println!("relative error without centres {plain:.2e}, with {centred:.2e}");
    assert!(centred < 0.02 && plain > 10.0 * centred, "without {plain}, with {centred}");
}

/// (1/d) Σ_f exp((c_f·(x+y))²/2).
fn additive(x: &Array2<f64>, y: &Array2<f64>) -> f64 {
    let projected = dct((x + y).as_slice().unwrap());
    projected.iter().map(|p| (p * p / 2.0).exp()).sum::<f64>() / projected.len() as f64
}

fn plain_map(blocks: usize, points: Points, seed: u64) -> DctMap<f64> {
    let config =
        DctMapConfig::new().with_blocks(blocks).with_points(points).with_scales(InputScales::Ones);
    config.with_seed(seed).build(8).unwrap()
}

#[test]
fn plain_map_converges_to_the_additive_kernel_and_not_to_softmax() {
    let pairs = [pair(8, 2.0, 0.2, 1), pair(8, 1.5, 0.8, 2), pair(8, 0.5, 0.1, 3)];
    let mut ratios = Vec::new();
    for (x, y) in &pairs {
        let errors = [4, 64, 1024].map(|blocks| {
            moments(20, additive(x, y), |seed| {
                kernel(&plain_map(blocks, Points::Sobol, seed), x, y)
            })
            .rms
        });
        let last = kernel(&plain_map(1024, Points::Sobol, 0), x, y);
        println!(
            "rms relative error to the additive kernel {errors:.5?}; K / exp(x·y) = {:.3}",
            last / exact(x, y)
        );
        assert!(
            errors[1] < errors[0] / 1.5 && errors[2] < errors[1] / 1.5 && errors[2] < 2e-3,
            "{errors:?}"
        );
        ratios.push(last / exact(x, y));
    }
    // Neither exp(x·y) nor a multiple of it.
    assert!(ratios.iter().any(|r| (r - 1.0).abs() > 0.3), "{ratios:?}");
    assert!((ratios[0] / ratios[1] - 1.0).abs() > 0.3, "{ratios:?}");
}

#[test]
fn sobol_radii_beat_random_ones() {
    let (x, y) = pair(8, 2.0, 0.2, 5);
    // Measured ratios: 2.6, 3.9, 7.3.
    for (blocks, margin) in [(64, 2.0), (256, 3.0), (1024, 5.0)] {
        let rms = |points| {
            moments(40, additive(&x, &y), |seed| kernel(&plain_map(blocks, points, seed), &x, &y))
                .rms
        };
        let (sobol, random) = (rms(Points::Sobol), rms(Points::Random));
        println!(
            "G {blocks}: rms relative error Sobol {sobol:.2e}, random {random:.2e}, ratio {:.1}",
            random / sobol
        );
        assert!(sobol * margin < random, "blocks {blocks}: Sobol {sobol}, random {random}");
    }
}

fn mixed_map(d: usize, blocks: usize, seed: u64) -> DctMap<f64> {
    let config =
        DctMapConfig::new().with_blocks(blocks).with_mixing(Mixing::Mixed).with_radial(Radial::Chi);
    config.with_envelope(Envelope::Gaussian).with_seed(seed).build(d).unwrap()
}

#[test]
fn mixed_map_is_unbiased_for_softmax() {
    for (d, sum) in [(16, 1.5), (64, 2.0)] {
        let (x, y) = pair(d, sum, 0.5, 7);
        let Moments { mean, error, .. } =
            moments(500, exact(&x, &y), |seed| kernel(&mixed_map(d, 2, seed), &x, &y));
        println!("mixed, d {d}: mean ratio {mean:.4} ± {error:.4}");
        assert!((mean - 1.0).abs() < 3.3 * error && error < 0.05, "d {d}: {mean} ± {error}");
    }
}

#[test]
fn mixed_error_falls_with_features() {
    let (x, y) = pair(16, 2.0, 0.5, 8);
    let rms = [1, 8, 64].map(|blocks| {
        moments(150, exact(&x, &y), |seed| kernel(&mixed_map(16, blocks, seed), &x, &y)).rms
    });
    println!("mixed: rms relative error at 1, 8, 64 blocks {rms:.3?}");
    for step in rms.windows(2) {
        // Eight times the features: the error falls by √8 = 2.8.
        assert!((1.9..4.2).contains(&(step[0] / step[1])), "{rms:?}");
    }
}

fn favor(d: usize, m: usize, rows: FavorRows, oprf: Option<f64>, seed: u64) -> FavorMap<f64> {
    let config = FavorConfig::new(d, m).with_rows(rows).with_seed(seed);
    let config = oprf.map_or(config.clone(), |phi| config.with_oprf(phi));
    config.build().unwrap()
}

#[test]
fn favor_is_unbiased() {
    // A partial last block of rows.
    let (d, m) = (16, 40);
    let (x, y) = pair(d, 1.2, 0.5, 9);
    for rows in [FavorRows::Iid, FavorRows::Orthogonal] {
        let Moments { mean, error, .. } =
            moments(800, exact(&x, &y), |seed| kernel(&favor(d, m, rows, None, seed), &x, &y));
        println!("FAVOR+ {rows:?}: mean ratio {mean:.4} ± {error:.4}");
        assert!((mean - 1.0).abs() < 3.3 * error && error < 0.02, "{rows:?}: {mean} ± {error}");
    }
}

#[test]
fn orthogonal_rows_err_less() {
    // The rows' signs are independent either way: what orthogonality removes is the error of the
    // even terms, most of it where antithetic pairs leave no others.
    let (d, m) = (8, 16);
    let (x, y) = pair(d, 1.0, 0.5, 9);
    let rms = |rows, pairing| {
        let one = |seed| {
            let mut params =
                FavorConfig::new(d, m).with_rows(rows).with_seed(seed).params().unwrap();
            if pairing == Pairing::Antithetic {
                params.pairing = pairing;
                params.log_weight = vec![-(2.0 * m as f64).ln(); 2 * m];
            }
            kernel(&DctMap::<f64>::from_params(params).unwrap(), &x, &y)
        };
        moments(4000, exact(&x, &y), one).rms
    };
    for (pairing, margin) in [(Pairing::Single, 1.05), (Pairing::Antithetic, 1.3)] {
        let (iid, orthogonal) = (rms(FavorRows::Iid, pairing), rms(FavorRows::Orthogonal, pairing));
        println!(
            "FAVOR+ {pairing:?}: rms orthogonal {orthogonal:.4}, iid {iid:.4}, ratio {:.2}",
            iid / orthogonal
        );
        assert!(orthogonal * margin < iid, "{pairing:?}: orthogonal {orthogonal}, iid {iid}");
    }
}

#[test]
fn oprf_weights_are_unbiased_and_err_less() {
    let (d, m, sum) = (8, 64, 2.0);
    let (x, y) = pair(d, sum, 0.5, 10);
    for rows in [FavorRows::Iid, FavorRows::Orthogonal] {
        let run =
            |phi| moments(800, exact(&x, &y), |seed| kernel(&favor(d, m, rows, phi, seed), &x, &y));
        let (plain, weighted) = (run(None), run(Some(sum * sum)));
        let Moments { mean, error, rms } = weighted;
        println!(
            "OPRF {rows:?}: mean ratio {mean:.4} ± {error:.4}, rms {rms:.3} instead of {:.3}",
            plain.rms
        );
        assert!((mean - 1.0).abs() < 3.3 * error && error < 0.03, "{rows:?}: {mean} ± {error}");
        assert!(rms < plain.rms / 1.5, "{rows:?}: {rms} instead of {}", plain.rms);
    }
}

#[test]
fn oprf_weights_follow_the_formula() {
    let phi = 5.0;
    for params in
        every_combination(&[1, 6]).into_iter().filter(|p| p.envelope == Envelope::Gaussian)
    {
        let d = params.dim() as f64;
        let a = (d - 2.0 * phi - ((2.0 * phi + d).powi(2) + 8.0 * d * phi).sqrt()) / (16.0 * d);
        let weighted = params.clone().with_oprf(phi).unwrap();
        assert_eq!(
            (&weighted.query.center, &weighted.query.scale),
            (&params.query.center, &params.query.scale)
        );
        // |ω_f|² by projecting unit vectors.
        let mut norms = vec![0.0; params.features()];
        for i in 0..params.dim() {
            let mut unit = vec![0.0; params.dim()];
            unit[i] = 1.0;
            let (q, k) = match &params.projection {
                Projection::Dense { query, key } | Projection::Deep { query, key } => {
                    (&query[..], &key[..])
                }
                _ => (&[][..], &[][..]),
            };
            let sides = [
                literal_u(&params, &params.query, q, &unit),
                literal_u(&params, &params.key, k, &unit),
            ];
            sides.iter().for_each(|u| norms.iter_mut().zip(u).for_each(|(n, u)| *n += u * u));
        }
        for (f, norm) in norms.iter().enumerate() {
            let expected = params.log_weight[f] + a * norm + d / 2.0 * (1.0 - 4.0 * a).ln();
            assert!(
                (weighted.log_weight[f] - expected).abs() < 1e-11 * (1.0 + expected.abs()),
                "feature {f}"
            );
        }
        for (got, t) in weighted.key.radii.iter().zip(&params.key.radii) {
            assert!((got - t * (1.0 - 4.0 * a).sqrt()).abs() < 1e-12 * (1.0 + t.abs()));
        }
    }
}

#[test]
fn orthogonal_rows_are_orthogonal_with_gaussian_lengths() {
    let (d, m) = (24, 60);
    let mut squares = 0.0;
    for seed in 0..20 {
        let map = favor(d, m, FavorRows::Orthogonal, None, seed);
        let Projection::Dense { query, key } = &map.params().projection else {
            panic!("FAVOR+ is dense")
        };
        assert_eq!(query, key);
        let rows: Vec<&[f64]> = query.chunks(d).collect();
        assert_eq!(rows.len(), m);
        squares += rows.iter().map(|row| dot(row, row)).sum::<f64>() / m as f64;
        for block in rows.chunks(d) {
            for (i, a) in block.iter().enumerate() {
                for b in &block[..i] {
                    assert!(dot(a, b).abs() < 1e-13 * dot(a, a), "seed {seed}");
                }
            }
        }
        let lengths: Vec<f64> = rows.iter().map(|row| dot(row, row)).collect();
        assert!(
            lengths.iter().any(|l| (l - lengths[0]).abs() > 1.0),
            "lengths are drawn, not fixed"
        );
    }
    // E|ω|² = d; the standard error over 1200 rows is √(2d/1200) = 0.2.
    assert!((squares / 20.0 - d as f64).abs() < 0.7, "mean squared length {}", squares / 20.0);
}

#[test]
fn parameters_are_what_the_config_says() {
    let d = 10;
    let params =
        DctMapConfig::new().with_blocks(4).with_pairing(Pairing::Antithetic).params(d).unwrap();
    assert_eq!((params.dim(), params.blocks(), params.features()), (d, 4, 80));
    assert!(params.query.scale[..d].iter().all(|&s| s == 1.0));
    assert!(
        params.query.scale[d..].iter().all(|&s| s.abs() == 1.0)
            && params.query.scale[d..].contains(&-1.0)
    );
    assert_eq!(params.query, params.key);
    assert_eq!((params.log_weight[79], params.log_mix), (-80.0_f64.ln(), 0.0));
    assert!(params.query.radii.iter().any(|&t| t < 0.0));

    let chi = DctMapConfig::new()
        .with_blocks(4)
        .with_radial(Radial::Chi)
        .with_scales(InputScales::Ones)
        .params(d)
        .unwrap();
    assert!(chi.query.scale.iter().all(|&s| s == 1.0));
    let mean_square = dot(&chi.query.radii, &chi.query.radii) / 40.0;
    assert!((mean_square - d as f64).abs() < 0.5, "E t² = d, got {mean_square}");

    let mixed = DctMapConfig::new()
        .with_blocks(2)
        .with_mixing(Mixing::Mixed)
        .with_scales(InputScales::Ones)
        .params(d)
        .unwrap();
    let Projection::Mixed { signs } = &mixed.projection else { panic!("asked for mixing") };
    assert!(
        signs.len() == 60
            && signs.iter().all(|s| s.abs() == 1.0)
            && signs.contains(&-1.0)
            && signs.contains(&1.0)
    );

    let plain = DctParams::new(d);
    assert_eq!((plain.blocks(), plain.features(), plain.log_weight[3]), (1, d, -10.0_f64.ln()));
    assert!(DctMap::<f32>::from_params(plain).is_ok());
}

#[test]
fn same_seed_same_bits_other_seed_other_bits() {
    let config =
        DctMapConfig::new().with_blocks(3).with_mixing(Mixing::Mixed).with_radial(Radial::Chi);
    for config in [config.clone().with_points(Points::Random), config] {
        assert_eq!(config.params(12).unwrap(), config.params(12).unwrap());
        let other = config.clone().with_seed(1).params(12).unwrap();
        let first = config.params(12).unwrap();
        assert_ne!(first.query.radii, other.query.radii);
        assert_ne!(first.query.scale, other.query.scale);
        assert_ne!(first.projection, other.projection);
        let map = config.build::<f32>(12).unwrap();
        assert_eq!(map.params(), &first);
        let x = cast::<f32>(&normal_rows(3, 12, 1));
        assert_eq!(map.query_log_features(&x), map.clone().query_log_features(&x));
        assert_eq!(map.key_log_features(&x), config.build::<f32>(12).unwrap().key_log_features(&x));
    }
    let favor = |seed| FavorConfig::new(5, 7).with_seed(seed).params().unwrap();
    assert_eq!(favor(2), favor(2));
    assert_ne!(favor(2), favor(3));
}

#[test]
fn empty_and_strided_inputs() {
    let map = DctMapConfig::new()
        .with_blocks(2)
        .with_envelope(Envelope::Gaussian)
        .build::<f64>(6)
        .unwrap();
    assert_eq!(map.query_log_features(&Array2::zeros((0, 6))).unwrap().dim(), (0, 12));
    let wide = normal_rows(40, 12, 3);
    let view = wide.slice(s![..;2, ..;-2]);
    assert_eq!(
        map.key_log_features(&view).unwrap(),
        map.key_log_features(&view.to_owned()).unwrap()
    );
}

fn golden(name: &str) -> (Vec<usize>, Vec<f64>) {
    let path =
        concat!(env!("CARGO_MANIFEST_DIR"), "/golden/official_neox_attention_f64.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
    let values =
        tensor.data().chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap())).collect();
    (tensor.shape().to_vec(), values)
}

#[test]
fn published_features_are_those_of_the_published_code() {
    let (shape, input) = golden("feature_input");
    let (_, output) = golden("feature_output");
    let (_, radii) = golden("radii");
    let x = Array2::from_shape_vec((shape[0] * shape[1], shape[2]), input).unwrap();
    let expected = Array2::from_shape_vec(x.dim(), output).unwrap();
    let worst =
        |got: Array2<f64>| (got - &expected).iter().fold(0.0_f64, |worst, e| worst.max(e.abs()));
    let double = worst(published_features(&x, &radii).unwrap());
    let single = worst(published_features(&cast::<f32>(&x), &radii).unwrap().mapv(f64::from));
    println!("published features: off by {double:.1e} in f64, {single:.1e} in f32");
    assert!(double < 1e-6, "{double}");
    assert!(single < 2e-6, "{single}");
}

/// ProjectedQkv by other means than a panel of them, for every d alike.
#[test]
fn a_token_has_the_features_of_its_row() {
    fn check<T: Real>(map: DctMap<T>, label: &str) {
        let d = map.dim();
        let x = cast::<T>(&normal_rows(3, d, 5));
        let mut scratch = vec![T::from_f64(f64::NAN); map.token_scratch_len()];
        let panels = [map.query_log_features(&x).unwrap(), map.key_log_features(&x).unwrap()];
        for (rows, key) in panels.iter().zip([false, true]) {
            for (x, row) in x.outer_iter().zip(rows.outer_iter()) {
                let (x, mut out) = (x.to_vec(), vec![T::from_f64(f64::NAN); map.features()]);
                if key {
                    map.key_token(&x, &mut out, &mut scratch)
                } else {
                    map.query_token(&x, &mut out, &mut scratch)
                }
                let top = row.iter().fold(1.0, |top: f64, x| top.max(x.to_f64().abs()));
                let window = |(a, b): (&T, &T)| {
                    (a.to_f64() - b.to_f64()).abs() <= 200.0 * T::EPSILON.to_f64() * top
                };
                assert!(out.iter().zip(row).all(window), "{label}, d {d}, key {key}");
            }
        }
    }
    for d in [1, 2, 3, 7, 8, 20, 24, 31, 40, 64, 80, 96, 100, 160, 192, 256, 300] {
        for (blocks, pairing, mixing) in [
            (1, Pairing::Single, Mixing::None),
            (2, Pairing::Antithetic, Mixing::None),
            (1, Pairing::Antithetic, Mixing::Mixed),
        ] {
            let config =
                DctMapConfig::new().with_blocks(blocks).with_pairing(pairing).with_mixing(mixing);
            let params = shaken(config.params(d).unwrap(), 6);
            let label = format!("{blocks} blocks, {pairing:?}, {mixing:?}");
            check(DctMap::<f64>::from_params(params.clone()).unwrap(), &label);
            check(DctMap::<f32>::from_params(params).unwrap(), &label);
        }
    }
}

#[test]
fn published_features_follow_the_formula() {
    for d in [1, 2, 7, 48] {
        let (x, radii) = (normal_rows(4, d, 1) * 20.0, normals(d, 2));
        let got = published_features(&x, &radii).unwrap();
        for (x, got) in x.rows().into_iter().zip(got.rows()) {
            let logits: Vec<f64> = (0..d)
                .map(|f| radii[f] * (0..d).map(|i| cosine(d, i, f) * x[i]).sum::<f64>())
                .collect();
            let max = logits.iter().fold(f64::NEG_INFINITY, |a, &b| a.max(b));
            let sum: f64 = logits.iter().map(|l| (l - max).exp()).sum();
            for f in 0..d {
                assert!((got[f] - (logits[f] - max).exp() / sum).abs() < 1e-12, "d {d} f {f}");
            }
        }
    }
}

fn refused(change: impl FnOnce(&mut DctParams)) -> Error {
    let mut params =
        DctMapConfig::new().with_blocks(2).with_mixing(Mixing::Mixed).params(4).unwrap();
    change(&mut params);
    DctMap::<f64>::from_params(params).unwrap_err()
}

#[test]
fn impossible_configs_are_refused() {
    let least = |argument| Error::Value { argument, expected: "at least 1", got: 0.0 };
    assert_eq!(DctMapConfig::new().build::<f32>(0).unwrap_err(), least("dim"));
    assert_eq!(DctMapConfig::new().with_blocks(0).build::<f32>(4).unwrap_err(), least("blocks"));
    assert_eq!(FavorConfig::new(0, 4).build::<f32>().unwrap_err(), least("dim"));
    assert_eq!(FavorConfig::new(4, 0).build::<f32>().unwrap_err(), least("features"));

    let limit = 65_536 * 256;
    let too_large = |argument, limit, got| Error::TooLarge { argument, limit, got };
    assert_eq!(
        DctMapConfig::new().params(usize::MAX).unwrap_err(),
        too_large("dim", limit, usize::MAX)
    );
    assert_eq!(
        DctMapConfig::new().with_blocks(limit + 1).params(1).unwrap_err(),
        too_large("blocks", limit, limit + 1)
    );
    assert_eq!(
        DctMapConfig::new().with_blocks(usize::MAX).params(8).unwrap_err(),
        too_large("blocks", limit / 8, usize::MAX)
    );
    assert_eq!(
        FavorConfig::new(usize::MAX, 1).params().unwrap_err(),
        too_large("dim", limit, usize::MAX)
    );
    assert_eq!(
        FavorConfig::new(64, usize::MAX).params().unwrap_err(),
        too_large("features", 1 << 21, usize::MAX)
    );
}

#[test]
fn wrong_lengths_are_refused() {
    let length = |argument, expected, got| Error::Length { argument, expected, got };
    assert_eq!(refused(|p| p.query.center.clear()), Error::Empty { argument: "query.center" });
    assert_eq!(refused(|p| p.query.radii.clear()), Error::Empty { argument: "query.radii" });
    let not_divisible =
        Error::NotDivisible { argument: "query.radii", divisor: "dim", divisor_value: 4, got: 7 };
    assert_eq!(refused(|p| p.query.radii.truncate(7)), not_divisible);
    assert_eq!(refused(|p| p.query.scale.truncate(4)), length("query.scale", 8, 4));
    assert_eq!(refused(|p| p.key.center.push(0.0)), length("key.center", 4, 5));
    assert_eq!(refused(|p| p.key.scale.truncate(7)), length("key.scale", 8, 7));
    assert_eq!(refused(|p| p.key.radii.truncate(4)), length("key.radii", 8, 4));
    assert_eq!(refused(|p| p.log_weight.push(0.0)), length("log_weight", 8, 9));
    assert_eq!(refused(|p| p.pairing = Pairing::Antithetic), length("log_weight", 16, 8));
    assert_eq!(
        refused(|p| p.projection = Projection::Mixed { signs: vec![1.0; 23] }),
        length("projection.signs", 24, 23)
    );
    let deep = |query, key| {
        refused(move |p| {
            p.projection = Projection::Deep { query: vec![1.0; query], key: vec![1.0; key] }
        })
    };
    assert_eq!(deep(15, 16), length("projection.query", 16, 15));
    assert_eq!(deep(16, 17), length("projection.key", 16, 17));
    let dense = |query, key| {
        refused(move |p| {
            p.projection = Projection::Dense { query: vec![0.0; query], key: vec![0.0; key] };
            p.query.scale.truncate(4);
            p.key.scale.truncate(4);
        })
    };
    assert_eq!(dense(31, 32), length("projection.query", 32, 31));
    assert_eq!(dense(32, 33), length("projection.key", 32, 33));
    let wide =
        refused(|p| p.projection = Projection::Dense { query: vec![0.0; 32], key: vec![0.0; 32] });
    assert_eq!(wide, length("query.scale", 4, 8));
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    type Change = fn(&mut DctParams, f64);
    let places: [(&str, usize, Change); 9] = [
        ("query.center", 1, |p, v| p.query.center[1] = v),
        ("query.scale", 5, |p, v| p.query.scale[5] = v),
        ("query.radii", 7, |p, v| p.query.radii[7] = v),
        ("key.center", 0, |p, v| p.key.center[0] = v),
        ("key.scale", 2, |p, v| p.key.scale[2] = v),
        ("key.radii", 3, |p, v| p.key.radii[3] = v),
        ("log_weight", 6, |p, v| p.log_weight[6] = v),
        ("log_mix", 0, |p, v| p.log_mix = v),
        ("projection.signs", 4, |p, v| {
            let mut signs = vec![1.0; 24];
            signs[4] = v;
            p.projection = Projection::Mixed { signs };
        }),
    ];
    for (name, at, change) in places {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 1e101] {
            let Error::NonFinite { argument, index, limit, got } = refused(|p| change(p, value))
            else {
                panic!("{name}")
            };
            assert_eq!((argument, index, limit, got.to_bits()), (name, at, 1e100, value.to_bits()));
        }
    }
    for key in [false, true] {
        let mut params = FavorConfig::new(3, 2).params().unwrap();
        let Projection::Dense { query, key: keys } = &mut params.projection else {
            panic!("dense")
        };
        (if key { keys } else { query })[5] = f64::NAN;
        let Error::NonFinite { argument, index: 5, .. } =
            DctMap::<f64>::from_params(params).unwrap_err()
        else {
            panic!("dense")
        };
        assert_eq!(argument, if key { "projection.key" } else { "projection.query" });
    }
    // What f64 holds, f32 may not.
    let mut params = DctParams::new(3);
    params.key.radii[2] = 1e40;
    assert!(DctMap::<f64>::from_params(params.clone()).is_ok());
    let error = Error::NonFinite { argument: "key.radii", index: 2, limit: 1e15, got: 1e40 };
    assert_eq!(DctMap::<f32>::from_params(params).unwrap_err(), error);
}

#[test]
fn tied_sides_that_differ_are_refused() {
    for change in [(|p| p.key.scale[1] = 0.5) as fn(&mut DctParams), |p| p.key.radii[1] = 0.5] {
        let error = refused(|p| {
            p.sides = Sides::Tied;
            change(p);
        });
        assert!(matches!(error, Error::Conflict { argument: "Sides::Tied", .. }), "{error}");
    }
    let mut params = FavorConfig::new(3, 2).params().unwrap();
    params.sides = Sides::Tied;
    assert!(DctMap::<f64>::from_params(params.clone()).is_ok());
    let Projection::Dense { key, .. } = &mut params.projection else { panic!("dense") };
    key[0] += 1.0;
    assert!(matches!(
        DctMap::<f64>::from_params(params),
        Err(Error::Conflict { argument: "Sides::Tied", .. })
    ));
}

#[test]
fn oprf_needs_an_envelope_and_a_sensible_phi() {
    let plain = DctMapConfig::new();
    let gaussian = plain.clone().with_envelope(Envelope::Gaussian).params(4).unwrap();
    let conflict = plain.params(4).unwrap().with_oprf(1.0).unwrap_err();
    assert_eq!(conflict, Error::Conflict { argument: "OPRF weights", other: "Envelope::None" });
    for phi in [-1e-9, f64::NAN, f64::INFINITY] {
        let Error::Value { argument: "phi", expected, got } =
            gaussian.clone().with_oprf(phi).unwrap_err()
        else {
            panic!("{phi}")
        };
        assert_eq!((expected, got.to_bits()), ("finite and at least 0", phi.to_bits()));
        assert!(matches!(
            FavorConfig::new(4, 4).with_oprf(phi).build::<f64>(),
            Err(Error::Value { argument: "phi", .. })
        ));
    }
    let unchanged = gaussian.clone().with_oprf(0.0).unwrap();
    assert_eq!(unchanged.query, gaussian.query);
    assert!(matches!(gaussian.with_oprf(1e300), Err(Error::NonFinite { .. })));
}

#[test]
fn wrong_inputs_are_refused() {
    let map = DctMapConfig::new().build::<f32>(4).unwrap();
    let shape = |argument, got| Error::Shape { argument, axis: 1, expected: 4, got };
    assert_eq!(map.query_log_features(&Array2::zeros((2, 3))).unwrap_err(), shape("x", 3));
    assert_eq!(map.key_log_features(&Array2::zeros((2, 5))).unwrap_err(), shape("y", 5));
    let mut x = Array2::zeros((2, 4));
    x[[1, 2]] = 2e15;
    assert_eq!(
        map.key_log_features(&x).unwrap_err(),
        Error::NonFinite { argument: "y", index: 6, limit: 1e15, got: f64::from(2e15_f32) }
    );
    x[[1, 2]] = f32::NAN;
    assert!(matches!(
        map.query_log_features(&x),
        Err(Error::NonFinite { argument: "x", index: 6, .. })
    ));

    assert_eq!(
        published_features(&array![[1.0_f64, 2.0]], &[]).unwrap_err(),
        Error::Empty { argument: "radii" }
    );
    assert_eq!(
        published_features(&array![[1.0_f64, 2.0, 3.0]], &[1.0; 4]).unwrap_err(),
        shape("x", 3)
    );
    let radii = [1.0, f64::INFINITY];
    assert!(matches!(
        published_features(&array![[1.0, 2.0]], &radii),
        Err(Error::NonFinite { argument: "radii", index: 1, .. })
    ));
    assert!(matches!(
        published_features(&array![[1.0, f64::NAN]], &[1.0; 2]),
        Err(Error::NonFinite { argument: "x", index: 1, .. })
    ));
}

#[test]
fn public_types_cross_threads() {
    fn check<S: Send + Sync + Clone + std::fmt::Debug>() {}
    check::<DctMap<f32>>();
    check::<DctMap<f64>>();
    check::<FavorMap<f32>>();
    check::<FavorMap<f64>>();
    check::<DctMapConfig>();
    check::<FavorConfig>();
    check::<DctParams>();
    check::<Projection>();
    check::<SideParams>();
    let map = FavorConfig::new(3, 5).build::<f32>().unwrap();
    assert_eq!(
        format!("{:?}", DctMap::from(map)),
        "DctMap { dim: 3, features: 5, blocks: 1, envelope: Gaussian, pairing: Single, .. }"
    );
}
