//! Attention at the edges of its numbers: extreme log-features, growth, strong decay, millions of
//! tokens.

use dijiang::Real;
use dijiang::attention::{KeyMask, LinearAttention, Operator, Qkv};
use dijiang::reference::Pairs;
use dijiang_testing::linear::{Setup, TestMap};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random, assert_close, assert_same_bits, tolerance};
use ndarray::{Array2, Array3, Axis};

/// σ = 1 and the identity as map: q and k are the log-features. With integers as inputs every sum a
/// + b is exact in f32 too, and what remains are the errors of the summation alone.
fn direct(m: usize) -> Setup {
    Setup { scale: Some(1.0), ..Setup::new(0).sizes(m, 3, m) }
}

fn build<T: Real>(setup: &Setup) -> LinearAttention<T, TestMap<T>> {
    let maps = (0..setup.kv_heads).map(|_| TestMap::identity(setup.d).cast()).collect();
    setup.config().build(maps).unwrap()
}

/// Causal by every route, and full, against the reference.
fn check<T: Real>(context: &str, setup: &Setup, inputs: &Inputs<f64>, tolerance: f64) {
    let context = format!("{context}, {setup:?}");
    let maps: Vec<_> = (0..setup.kv_heads).map(|_| TestMap::identity(setup.d)).collect();
    let attention = build::<T>(setup);
    let (n, typed) = (inputs.tokens(), inputs.cast::<T>());
    let expected = setup.linear(&maps, Pairs::causal(), inputs, KeyMask::All);
    assert_close(
        format!("{context}: whole"),
        &attention.causal_of(&typed, KeyMask::All).unwrap(),
        &expected,
        tolerance,
    );
    assert_close(
        format!("{context}: steps"),
        &attention.steps(&mut attention.new_state(), &typed),
        &expected,
        tolerance,
    );
    for piece in [7, 40] {
        let mut state = attention.new_state();
        for start in (0..n).step_by(piece) {
            let range = start..(start + piece).min(n);
            let out =
                attention.prefill_of(&mut state, &typed.part(range.clone()), KeyMask::All).unwrap();
            let expected = expected.slice_axis(Axis(1), range.clone().into()).to_owned();
            assert_close(format!("{context}: tokens {range:?}"), &out, &expected, tolerance);
        }
    }
    if setup.is_pure() {
        let expected = setup.linear(&maps, Pairs::full(), inputs, KeyMask::All);
        assert_close(
            format!("{context}: full"),
            &attention.full_of(&typed, KeyMask::All).unwrap(),
            &expected,
            tolerance,
        );
    }
}

fn check_both(context: &str, setup: &Setup, inputs: &Inputs<f64>) {
    check::<f32>(context, setup, inputs, tolerance::<f32>(8.0, inputs.tokens()));
    // Here the reference's own rounding shows: its log-kernel values are as large as the
    // log-features.
    check::<f64>(context, setup, inputs, 1e-12);
}

/// Log-features by formula: `key(token, feature)` and `query(token, feature)`.
fn inputs(
    setup: &Setup,
    n: usize,
    key: impl Fn(usize, usize) -> f64,
    query: impl Fn(usize, usize) -> f64,
) -> Inputs<f64> {
    Inputs {
        q: Array3::from_shape_fn((setup.heads, n, setup.d), |(_, i, f)| query(i, f)),
        k: Array3::from_shape_fn((setup.kv_heads, n, setup.d), |(_, j, f)| key(j, f)),
        ..setup.inputs(n, n)
    }
}

/// The kinds of attention each pattern is tried on. Window scores are products of log-features of
/// ±600: 360 000 and more, exact in f32 as well.
fn variants(m: usize) -> [Setup; 3] {
    [direct(m), direct(m).heads(4, 2), direct(m).window(8, 1)]
}

#[test]
fn log_features_of_600() {
    for (seed, m) in [(1, 1), (2, 4), (3, 16)] {
        let integer = |random: &mut Random| match random.below(4) {
            0 => 600.0,
            1 => -600.0,
            _ => random.below(1201) as f64 - 600.0,
        };
        for setup in variants(m) {
            let mut random = Random::new(seed);
            let mut inputs = setup.inputs(150, 150);
            inputs.q.mapv_inplace(|_| integer(&mut random));
            inputs.k.mapv_inplace(|_| integer(&mut random));
            check_both("±600", &setup, &inputs);
        }
    }
}

/// Every token's log-features exceed all earlier ones, fall below them, or alternate; features do
/// so together or against each other.
#[test]
fn adversarial_sequences() {
    type Pattern = fn(usize, usize) -> f64;
    let keys: [(&str, Pattern); 8] = [
        ("growing by 30", |j, _| 30.0 * j as f64),
        ("growing by 30 from -600, against each other", |j, f| {
            (30.0 * j as f64 - 600.0) * if f % 2 == 0 { 1.0 } else { -1.0 }
        }),
        ("growing by 19, below any rescaling threshold of 20", |j, f| 19.0 * (j + f) as f64),
        ("growing by 1", |j, f| j as f64 - 3.0 * f as f64),
        ("falling by 30", |j, f| 600.0 - 30.0 * j as f64 - f as f64),
        ("alternating", |j, _| if j % 2 == 0 { 600.0 } else { -600.0 }),
        ("alternating against each other", |j, f| if (j + f) % 2 == 0 { 600.0 } else { -600.0 }),
        ("one outlier late", |j, f| if j == 50 && f == 0 { 600.0 } else { -600.0 - f as f64 }),
    ];
    let queries: [(&str, Pattern); 4] = [
        ("none", |_, _| 0.0),
        ("one feature at a time", |i, f| if i % 4 == f { 600.0 } else { -600.0 }),
        ("growing", |i, f| 7.0 * (i + f) as f64),
        ("against the keys", |i, f| -30.0 * i as f64 - f as f64),
    ];
    for (key_name, key) in keys {
        for (query_name, query) in queries {
            for setup in variants(4) {
                check_both(
                    &format!("keys {key_name}, queries {query_name}"),
                    &setup,
                    &inputs(&setup, 131, key, query),
                );
            }
        }
    }
}

/// Real-valued log-features of ±600: the sums a + b themselves are rounded, to 1200·eps, and
/// nothing is worse than that.
#[test]
fn real_log_features_of_600() {
    for setup in variants(8) {
        let mut random = Random::new(4);
        let mut inputs = setup.inputs(150, 150);
        inputs.q.mapv_inplace(|x| f64::from((x * 200.0).clamp(-600.0, 600.0) as f32));
        inputs.k.mapv_inplace(|_| f64::from((random.normal() * 200.0).clamp(-600.0, 600.0) as f32));
        if setup.window.is_some() {
            // Scores of 1e5 are rounded to 1e5·eps as well: keep them moderate.
            inputs.k.slice_axis_mut(Axis(2), (1..).into()).fill(0.0);
            inputs.q.mapv_inplace(|x| x / 600.0);
        }
        check::<f32>("real ±600", &setup, &inputs, 4.0 * 1200.0 * f64::from(f32::EPSILON));
        check::<f64>("real ±600", &setup, &inputs, 4.0 * 1200.0 * f64::EPSILON);
    }
}

#[test]
fn strong_decay() {
    for log_decay in [-30.0, -0.5, -300.0, -1e6, -1e-9] {
        for setup in
            [direct(4), direct(4).heads(4, 2), direct(4).window(16, 1), direct(4).window(100, 0)]
        {
            let setup = setup.decay(log_decay);
            let inputs = setup.inputs(300, 300);
            // Far weights are exp of sums as large as the decay over a chunk; only they are rounded
            // that coarsely, but the oldest near token may be of no weight at all.
            let reach = 1.0 + log_decay.abs().min(40.0);
            check::<f32>("decay", &setup, &inputs, reach * tolerance::<f32>(8.0, 300));
            check::<f64>("decay", &setup, &inputs, reach * tolerance::<f64>(8.0, 300));
        }
    }
    // Keys that grow as fast as the decay takes away, and faster.
    for growth in [10.0, 30.0, 40.0] {
        for setup in [direct(4).decay(-30.0), direct(4).window(16, 1).decay(-30.0)] {
            let queries = |i: usize, f: usize| ((i * 5 + f * 3) % 7) as f64 - 3.0;
            let mut inputs =
                inputs(&setup, 200, |j, f| growth * (j % 20) as f64 + f as f64, queries);
            if setup.window.is_some() {
                inputs.q.mapv_inplace(|q| q / 8.0);
            }
            check::<f32>("growth against decay", &setup, &inputs, 1e-3);
            check::<f64>("growth against decay", &setup, &inputs, 1e-11);
        }
    }
}

/// The only keys lie thousands of tokens back, at weights no number can hold: they still are all
/// there is.
#[test]
fn decay_over_long_masked_gaps() {
    fn run<T: Real>(setup: &Setup, tolerance: f64) {
        let attention = build::<T>(setup);
        let n = 5000;
        let inputs = setup.inputs(n, n);
        let valid: Vec<bool> =
            (0..n).map(|j| (3..6).contains(&j) || (4000..4002).contains(&j)).collect();
        let mut state = attention.new_state();
        for start in (0..n).step_by(250) {
            let range = start..start + 250;
            let part = inputs.part(range.clone());
            let out = attention
                .prefill_of(&mut state, &part.cast(), KeyMask::Valid(&valid[range.clone()]))
                .unwrap();
            // The reference at a few rows only: it is quadratic.
            let last = inputs.part(range.end - 1..range.end);
            let keys: Vec<usize> = (0..range.end).filter(|&j| valid[j]).collect();
            let root = setup.softmax_scale().sqrt();
            for l in 0..setup.e {
                let weight = |j: usize| {
                    let sums = (0..setup.d)
                        .map(|f| ((last.q[[0, 0, f]] + inputs.k[[0, j, f]]) * root).exp());
                    sums.sum::<f64>().ln() + setup.log_decay * (range.end - 1 - j) as f64
                };
                let top = keys.iter().map(|&j| weight(j)).fold(f64::NEG_INFINITY, f64::max);
                let (mut sum, mut norm) = (0.0, 0.0);
                for &j in &keys {
                    sum += (weight(j) - top).exp() * inputs.v[[0, j, l]];
                    norm += (weight(j) - top).exp();
                }
                let (got, expected) =
                    (out[[0, 249, l]].to_f64(), if norm > 0.0 { sum / norm } else { 0.0 });
                assert!(
                    (got - expected).abs() <= tolerance,
                    "{setup:?}, {}: token {}: {got}, not {expected}",
                    T::NAME,
                    range.end
                );
            }
        }
    }
    for setup in [
        direct(4).decay(-30.0),
        direct(4).decay(-0.5),
        direct(4).window(16, 1).decay(-30.0),
        direct(4).window(16, 1).decay(-0.01),
    ] {
        run::<f32>(&setup, 1e-4 * (1.0 + setup.log_decay.abs()));
        run::<f64>(&setup, 1e-12 * (1.0 + setup.log_decay.abs()));
    }
}

/// Inputs at the limit of what is accepted: finite outputs within the range of the values.
#[test]
fn inputs_at_the_limit() {
    fn run<T: Real>(setup: &Setup) {
        let mut random = Random::new(8);
        let mut inputs = setup.inputs(100, 100);
        for x in [&mut inputs.q, &mut inputs.k, &mut inputs.v] {
            x.mapv_inplace(|_| T::LIMIT * random.choose(&[1.0, -1.0, 1.0, 0.5, 0.0, 1e-30]));
        }
        let check = |out: Array3<T>| {
            let bound = T::LIMIT * (1.0 + tolerance::<T>(8.0, 100));
            assert!(out.iter().all(|o| o.to_f64().abs() <= bound), "{setup:?}, {}", T::NAME);
        };
        let inputs = inputs.cast::<T>();
        let (linear, exact) = (build::<T>(setup), setup.build_exact::<T>());
        check(linear.causal_of(&inputs, KeyMask::All).unwrap());
        check(linear.steps(&mut linear.new_state(), &inputs));
        check(exact.causal_of(&inputs, KeyMask::All).unwrap());
        check(exact.steps(&mut exact.new_state(), &inputs));
        if setup.is_pure() {
            check(linear.full_of(&inputs, KeyMask::All).unwrap());
            check(exact.full_of(&inputs, KeyMask::All).unwrap());
        }
    }
    for setup in [
        direct(4),
        direct(16).heads(4, 2),
        direct(4).window(8, 1),
        direct(64).window(64, 1),
        direct(4).decay(-0.1),
    ] {
        run::<f32>(&setup);
        run::<f64>(&setup);
        run::<f32>(&Setup { scale: None, ..setup.clone() });
    }
}

/// Tokens of a stream, repeated every 1000: deterministic, and cheap enough for a million.
fn stream(setup: &Setup, spread: f64) -> Vec<[Array2<f32>; 3]> {
    let mut inputs: Inputs<f32> = setup.inputs(1000, 1000).cast();
    inputs.k.mapv_inplace(|k| k * spread as f32);
    inputs.v.fill(0.7);
    (0..1000).map(|i| inputs.token(i)).collect()
}

const MILLION: usize = 1_000_000;

/// Constant values in, the same constant out, after a million single tokens.
fn check_million_steps(setup: &Setup, spread: f64) {
    let (attention, tokens) = (build::<f32>(setup), stream(setup, spread));
    let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
    let mut out = Array2::zeros((setup.heads, setup.e));
    let mut worst = (0.0, 0);
    for i in 0..MILLION {
        let [q, k, v] = &tokens[i % 1000];
        attention.step(&mut state, Qkv::token(q, k, v), &mut out, &mut workspace).unwrap();
        for &o in &out {
            let error = (o - 0.7).abs();
            assert!(error.is_finite(), "{setup:?}, spread {spread}: {o} at token {i}");
            if error > worst.0 {
                worst = (error, i);
            }
        }
    }
    assert_eq!(attention.new_state().position() + MILLION, state.position());
    assert!(
        worst.0 <= 1e-5,
        "{setup:?}, spread {spread}: off by {:e} at token {}",
        worst.0,
        worst.1
    );
}

#[test]
fn a_million_steps_of_constant_values() {
    check_million_steps(&direct(4), 1.0);
}

/// All keys the same: every addition rounds the same way.
#[test]
fn a_million_steps_of_constant_values_and_keys() {
    check_million_steps(&direct(4), 0.0);
}

#[test]
fn a_million_steps_of_constant_values_window_and_far() {
    check_million_steps(&direct(4).window(8, 1), 1.0);
    check_million_steps(&direct(4).window(8, 1), 0.0);
}

#[test]
fn a_million_steps_of_constant_values_with_decay() {
    check_million_steps(&direct(4).decay(-1e-5), 0.0);
    check_million_steps(&direct(4).decay(-0.01), 1.0);
}

#[test]
fn a_million_tokens_of_constant_values_by_prefill() {
    for (setup, spread) in [
        (direct(4), 1.0),
        (direct(4), 0.0),
        (direct(4).window(64, 1), 0.0),
        (direct(4).decay(-1e-5), 1.0),
    ] {
        for piece in [1000, 37] {
            let attention = build::<f32>(&setup);
            let mut inputs: Inputs<f32> = setup.inputs(piece, piece).cast();
            inputs.k.mapv_inplace(|k| k * spread);
            inputs.v.fill(0.7);
            let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
            let mut out = Array3::zeros((setup.heads, piece, setup.e));
            for start in (0..MILLION).step_by(piece) {
                let Inputs { q, k, v } = &inputs;
                attention
                    .prefill_into(&mut [&mut state], Qkv::new(q, k, v), &mut out, &mut workspace)
                    .unwrap();
                for &o in &out {
                    assert!(
                        (o - 0.7).abs() <= 1e-5,
                        "{setup:?}, spread {spread}, pieces of {piece}: {o} after token {start}"
                    );
                }
            }
        }
    }
}

/// A mean over a million tokens is as good as its terms: values 0 and 1 in turn give one half.
#[test]
fn the_mean_of_a_million_values() {
    for setup in [direct(2), direct(2).window(8, 1)] {
        let attention = build::<f32>(&setup);
        let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
        let zeros = Array2::zeros((1, 2));
        let values = [Array2::from_elem((1, setup.e), 0.0), Array2::from_elem((1, setup.e), 1.0)];
        let mut out = Array2::zeros((1, setup.e));
        for i in 0..MILLION {
            attention
                .step(
                    &mut state,
                    Qkv::token(&zeros, &zeros, &values[i % 2]),
                    &mut out,
                    &mut workspace,
                )
                .unwrap();
        }
        assert!(out.iter().all(|&o| (o - 0.5f32).abs() <= 1e-5), "{setup:?}: {out}");
    }
}

/// The same numbers added to every log-feature of a token change nothing about any other output
/// than rounding.
#[test]
fn shifting_all_log_features_changes_nothing() {
    let setup = direct(4);
    let attention = build::<f64>(&setup);
    let base = setup.inputs(100, 100);
    let expected = attention.causal_of(&base, KeyMask::All).unwrap();
    let mut shifted = base.clone();
    shifted.q.axis_iter_mut(Axis(1)).enumerate().for_each(|(i, mut q)| q += 100.0 * (i % 5) as f64);
    shifted.k += 512.0;
    assert_close(
        "shifted",
        &attention.causal_of(&shifted, KeyMask::All).unwrap(),
        &expected,
        1e-11,
    );
    // By an amount that is exact: the same bits, since only differences to the running maximum
    // enter.
    let mut shifted = base.clone();
    shifted.q.fill(0.0);
    let zero = attention.causal_of(&shifted, KeyMask::All).unwrap();
    shifted.q.fill(256.0);
    assert_same_bits("exact shift", &attention.causal_of(&shifted, KeyMask::All).unwrap(), &zero);
}
