//! Whatever a caller can do wrong gives a typed error that names the argument, and changes nothing.

use dijiang::attention::{KeyMask, LinearConfig, Operator, Qkv, SoftmaxConfig, Window, Workspace};
use dijiang::kernel::FeatureMap;
use dijiang::reference::{self, Pairs, PlainMap};
use dijiang::{Error, Real, Result};
use dijiang_testing::linear::{Setup, TestMap};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random, argument, assert_same_bits};
use ndarray::{Array2, Array3, Axis, ShapeBuilder};

fn map(d: usize, m: usize) -> TestMap<f64> {
    TestMap::random(&mut Random::new(1), d, m, 1.0)
}

fn build(config: LinearConfig, maps: Vec<TestMap<f64>>) -> Error {
    config.build::<f64, _>(maps).map(|_| ()).unwrap_err()
}

#[test]
fn no_maps() {
    assert_eq!(build(LinearConfig::new(), Vec::new()), Error::Empty { argument: "maps" });
    assert_eq!(
        build(LinearConfig::new().with_heads(4), Vec::new()),
        Error::Empty { argument: "maps" }
    );
}

#[test]
fn maps_that_differ() {
    let error = build(LinearConfig::new(), vec![map(4, 6), map(4, 6), map(5, 6)]);
    assert!(
        matches!(error, Error::Shape { argument: "maps", expected: 4, got: 5, .. }),
        "{error:?}"
    );
    let error = build(LinearConfig::new(), vec![map(4, 6), map(4, 7)]);
    assert!(
        matches!(error, Error::Shape { argument: "maps", expected: 6, got: 7, .. }),
        "{error:?}"
    );
}

#[test]
fn maps_without_coordinates_or_features() {
    for (d, m) in [(0, 3), (3, 0), (0, 0)] {
        let error = build(LinearConfig::new(), vec![map(d, m)]);
        assert!(
            matches!(error, Error::Value { got: 0.0, .. }) && argument(&error).contains("map"),
            "{error:?}"
        );
    }
}

/// A map that asks for all the memory there is.
#[derive(Debug)]
struct Greedy;

impl FeatureMap<f64> for Greedy {
    fn dim(&self) -> usize {
        4
    }
    fn features(&self) -> usize {
        6
    }
    fn scratch_len(&self, _: usize) -> usize {
        usize::MAX
    }
    fn query_panel(&self, _: usize, _: &[f64], _: &mut [f64], _: &mut [f64]) {}
    fn key_panel(&self, _: usize, _: &[f64], _: &mut [f64], _: &mut [f64]) {}
}

#[test]
fn maps_without_measure() {
    let error = LinearConfig::new().build(vec![Greedy]).map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::TooLarge { got: usize::MAX, .. }), "{error:?}");
}

#[test]
fn heads_that_cannot_be_shared_out() {
    let error = build(LinearConfig::new().with_heads(5), vec![map(4, 6), map(4, 6)]);
    assert!(
        matches!(error, Error::NotDivisible { argument: "heads", divisor_value: 2, got: 5, .. }),
        "{error:?}"
    );
    let error = build(LinearConfig::new().with_heads(1), vec![map(4, 6), map(4, 6)]);
    assert!(
        matches!(error, Error::NotDivisible { argument: "heads", divisor_value: 2, got: 1, .. }),
        "{error:?}"
    );
    let error = build(LinearConfig::new().with_heads(0), vec![map(4, 6)]);
    assert!(matches!(error, Error::Value { argument: "heads", got: 0.0, .. }), "{error:?}");
}

#[test]
fn value_dim_of_zero_or_beyond_memory() {
    let error = build(LinearConfig::new().with_value_dim(0), vec![map(4, 6)]);
    assert!(matches!(error, Error::Value { argument: "value_dim", got: 0.0, .. }), "{error:?}");
    for value_dim in [usize::MAX, usize::MAX / 2, usize::MAX / 64, 1 << 60] {
        let error = build(LinearConfig::new().with_value_dim(value_dim), vec![map(4, 6)]);
        assert!(
            matches!(error, Error::TooLarge { argument: "value_dim", .. }),
            "{value_dim}: {error:?}"
        );
    }
}

#[test]
fn scales_that_are_no_positive_number() {
    for scale in [-1.0, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        let error = build(LinearConfig::new().with_scale(scale), vec![map(4, 6)]);
        assert!(matches!(error, Error::Value { argument: "scale", .. }), "{scale}: {error:?}");
        let error = SoftmaxConfig::new(1, 4).with_scale(scale).build::<f32>().unwrap_err();
        assert!(matches!(error, Error::Value { argument: "scale", .. }), "{scale}: {error:?}");
    }
}

#[test]
fn window_parts_of_no_chunk_or_beyond_memory() {
    let linear = |window| build(LinearConfig::new().with_window(window), vec![map(4, 6)]);
    let exact = |window| {
        SoftmaxConfig::new(1, 4).with_window(window).build::<f32>().map(|_| ()).unwrap_err()
    };
    let keeps = Window::new(8, 1).with_kept(3);
    let (argument_of, other) = ("window kept", "softmax attention");
    assert_eq!(exact(keeps), Error::Conflict { argument: argument_of, other });
    let beyond = linear(Window::new(8, 1).with_kept(usize::MAX));
    assert!(matches!(beyond, Error::TooLarge { argument: "window tokens", .. }), "{beyond:?}");
    for back in [0, 1, usize::MAX] {
        for error in [linear(Window::new(0, back)), exact(Window::new(0, back))] {
            assert!(
                matches!(error, Error::Value { .. }) && argument(&error).contains("chunk"),
                "{error:?}"
            );
        }
    }
    for (chunk, back) in [
        (usize::MAX, 0),
        (usize::MAX, usize::MAX),
        (1, usize::MAX),
        (1 << 40, 1 << 40),
        (1 << 62, 1),
    ] {
        let error = linear(Window::new(chunk, back));
        assert!(
            matches!(error, Error::TooLarge { .. }) && argument(&error).contains("window"),
            "{error:?}"
        );
    }
}

#[test]
fn decay_that_grows_or_is_no_number() {
    let config = |log_decay: &[f64]| LinearConfig::new().with_log_decay(log_decay.to_vec());
    for bad in [0.5, 1e-300, f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        for log_decay in [[bad, 0.0], [-0.1, bad]] {
            let error = build(config(&log_decay), vec![map(4, 6), map(4, 6)]);
            assert_eq!(argument(&error), "log_decay", "{error:?}");
            assert!(matches!(error, Error::Value { .. } | Error::NonFinite { .. }), "{error:?}");
        }
    }
    for log_decay in [&[-0.1][..], &[-0.1; 3]] {
        let error = build(config(log_decay), vec![map(4, 6), map(4, 6)]);
        assert_eq!(
            error,
            Error::Length { argument: "log_decay", expected: 2, got: log_decay.len() }
        );
    }
}

#[test]
fn exact_configurations() {
    let build = |config: SoftmaxConfig| config.build::<f64>().map(|_| ()).unwrap_err();
    let zero = |error: Error, name| {
        assert!(
            matches!(error, Error::Value { got: 0.0, .. }) && argument(&error) == name,
            "{error:?}"
        )
    };
    zero(build(SoftmaxConfig::new(0, 4)), "heads");
    zero(build(SoftmaxConfig::new(2, 0).with_scale(1.0)), "dim");
    assert_eq!(argument(&build(SoftmaxConfig::new(2, 0))), "dim");
    zero(build(SoftmaxConfig::new(2, 4).with_kv_heads(0)), "kv_heads");
    zero(build(SoftmaxConfig::new(2, 4).with_value_dim(0)), "value_dim");
    let error = build(SoftmaxConfig::new(6, 4).with_kv_heads(4));
    assert_eq!(
        error,
        Error::NotDivisible { argument: "heads", divisor: "kv_heads", divisor_value: 4, got: 6 }
    );
    for (config, name) in [
        (SoftmaxConfig::new(1, usize::MAX), "dim"),
        (SoftmaxConfig::new(1, 4).with_value_dim(usize::MAX), "value_dim"),
        (SoftmaxConfig::new(1, 1 << 60), "dim"),
    ] {
        let error = build(config);
        assert!(matches!(error, Error::TooLarge { .. }) && argument(&error) == name, "{error:?}");
    }
    // A cache holds something for every key-value head.
    let error = build(SoftmaxConfig::new(1 << 60, 4));
    assert!(
        matches!(error, Error::TooLarge { .. }) && argument(&error).contains("heads"),
        "{error:?}"
    );
}

/// h = 4, h_kv = 2, d = 5, e = 3, m = 8.
fn setups() -> [Setup; 3] {
    [Setup::new(1), Setup::new(2).window(8, 1), Setup::new(3).decay(-0.1)]
        .map(|setup| setup.heads(4, 2))
}

/// A state with a past, and what an undisturbed one yields for the next tokens.
struct Witness<'a, T: Real, A: Stream<T>> {
    attention: &'a A,
    state: A::State,
    before: A::State,
    next: Inputs<T>,
    expected: Array3<T>,
}

impl<'a, T: Real, A: Stream<T>> Witness<'a, T, A> {
    fn new(setup: &Setup, attention: &'a A) -> Self {
        let mut state = attention.new_state();
        attention.prefill_of(&mut state, &setup.inputs(27, 27).cast(), KeyMask::All).unwrap();
        let next: Inputs<T> = Setup { seed: 50, ..setup.clone() }.inputs(12, 12).cast();
        let expected = attention.prefill_of(&mut state.clone(), &next, KeyMask::All).unwrap();
        Self { attention, before: state.clone(), state, next, expected }
    }

    /// `result` is an error, and the state is what it was, now and in what follows from it.
    #[track_caller]
    fn unharmed(&mut self, context: &str, result: Result<()>) -> Error {
        let Err(error) = result else { panic!("{context}: accepted") };
        assert!(self.state == self.before, "{context}: {error} changed the state");
        let out =
            self.attention.prefill_of(&mut self.state.clone(), &self.next, KeyMask::All).unwrap();
        assert_same_bits(format!("{context}, after {error}"), &out, &self.expected);
        error
    }
}

/// Runs `$check::<T>(&setup, &attention)` for linear and exact attention, f32 and f64.
macro_rules! for_all {
    ($check:ident) => {
        for setup in setups() {
            $check(&setup, &setup.build::<f32>());
            $check(&setup, &setup.build::<f64>());
            $check(&setup, &setup.build_exact::<f32>());
            $check(&setup, &setup.build_exact::<f64>());
        }
    };
}

#[test]
fn shapes_of_many_tokens() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let n = 10;
        let mut witness = Witness::new(setup, attention);
        let mut workspace = attention.workspace();
        let shapes = [("q", [4, n, 5]), ("k", [2, n, 5]), ("v", [2, n, 3]), ("out", [4, n, 3])];
        for (i, (name, shape)) in shapes.into_iter().enumerate() {
            for axis in 0..3 {
                // The number of tokens is q's: there is no wrong one for q itself.
                if name == "q" && axis == 1 {
                    continue;
                }
                for got in [0, shape[axis] - 1, shape[axis] + 1, 2 * shape[axis]] {
                    let mut wrong = shapes.map(|(_, shape)| shape);
                    wrong[i][axis] = got;
                    let [q, k, v, mut out] = wrong.map(Array3::<T>::zeros);
                    let expected =
                        Error::Shape { argument: name, axis, expected: shape[axis], got };
                    let context = format!("{name} as {:?}", wrong[i]);
                    let result = attention.prefill_into(
                        &mut [&mut witness.state],
                        Qkv::new(&q, &k, &v),
                        &mut out,
                        &mut workspace,
                    );
                    assert_eq!(witness.unharmed(&context, result), expected, "{context}");
                    if name != "out" {
                        let inputs = Inputs { q: q.clone(), k: k.clone(), v: v.clone() };
                        let result = attention
                            .prefill_of(&mut witness.state, &inputs, KeyMask::All)
                            .map(|_| ());
                        assert_eq!(
                            witness.unharmed(&context, result),
                            expected,
                            "{context}, allocating"
                        );
                        assert_eq!(
                            attention.causal_of(&inputs, KeyMask::All).unwrap_err(),
                            expected,
                            "{context}, causal"
                        );
                    }
                    // Full attention takes any number of keys, of at least one.
                    if setup.is_pure() && !(name == "k" && axis == 1) {
                        let result = attention.bidirectional().unwrap().forward_into(
                            Qkv::new(&q, &k, &v),
                            &mut out,
                            &mut workspace,
                        );
                        assert_eq!(result.unwrap_err(), expected, "{context}, full");
                    }
                }
            }
        }
    }
    for_all!(check);
}

/// The output must not be allocated before the shapes are known to be right.
#[test]
fn shapes_beyond_memory() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let n = 1 << 60;
        let empty = |h: usize| Array3::<T>::zeros((h, n, 0));
        let inputs = Inputs { q: empty(4), k: empty(2), v: empty(2) };
        let result = attention.prefill_of(&mut witness.state, &inputs, KeyMask::All).map(|_| ());
        let error = witness.unharmed("2^60 tokens of no coordinates", result);
        assert!(matches!(error, Error::Shape { axis: 2, got: 0, .. }), "{error:?}");
        let error = attention.causal_of(&inputs, KeyMask::All).unwrap_err();
        assert!(matches!(error, Error::Shape { axis: 2, got: 0, .. }), "{error:?}");
        if setup.is_pure() {
            let error = attention.full_of(&inputs, KeyMask::All).unwrap_err();
            assert!(matches!(error, Error::Shape { axis: 2, got: 0, .. }), "{error:?}");
        }
    }
    for_all!(check);
    let attention =
        LinearConfig::new().with_heads(1 << 60).with_value_dim(3).build(vec![map(5, 8)]).unwrap();
    let inputs = Setup::new(1).inputs(9, 9);
    let expected = Error::Shape { argument: "q", axis: 0, expected: 1 << 60, got: 1 };
    assert_eq!(attention.causal_of(&inputs, KeyMask::All).unwrap_err(), expected);
    assert_eq!(attention.full_of(&inputs, KeyMask::All).unwrap_err(), expected);
}

#[test]
fn shapes_of_one_token() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let mut workspace = attention.workspace();
        let shapes = [("q", [4, 5]), ("k", [2, 5]), ("v", [2, 3]), ("out", [4, 3])];
        for (i, (name, shape)) in shapes.into_iter().enumerate() {
            for axis in 0..2 {
                for got in [0, shape[axis] - 1, shape[axis] + 1, 2 * shape[axis]] {
                    let mut wrong = shapes.map(|(_, shape)| shape);
                    wrong[i][axis] = got;
                    let [q, k, v, mut out] = wrong.map(Array2::<T>::zeros);
                    let result = attention.step(
                        &mut witness.state,
                        Qkv::token(&q, &k, &v),
                        &mut out,
                        &mut workspace,
                    );
                    let error = witness.unharmed(&format!("{name} as {:?}", wrong[i]), result);
                    assert_eq!(
                        error,
                        Error::Shape { argument: name, axis, expected: shape[axis], got }
                    );
                }
            }
        }
    }
    for_all!(check);
}

#[test]
fn empty_sequences() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let none: Inputs<T> = setup.inputs(0, 0).cast();
        let result = attention.prefill_of(&mut witness.state, &none, KeyMask::All).map(|_| ());
        let error = witness.unharmed("no tokens", result);
        assert_eq!(error, Error::Empty { argument: "q" });
        let result =
            attention.prefill_of(&mut witness.state, &none, KeyMask::Valid(&[])).map(|_| ());
        assert_eq!(witness.unharmed("no tokens, no mask", result), Error::Empty { argument: "q" });
        assert_eq!(
            attention.causal_of(&none, KeyMask::All).unwrap_err(),
            Error::Empty { argument: "q" }
        );
        if setup.is_pure() {
            let queries: Inputs<T> = setup.inputs(5, 0).cast();
            assert_eq!(
                attention.full_of(&queries, KeyMask::All).unwrap_err(),
                Error::Empty { argument: "k" }
            );
            let keys: Inputs<T> = setup.inputs(0, 5).cast();
            assert_eq!(
                attention.full_of(&keys, KeyMask::All).unwrap_err(),
                Error::Empty { argument: "q" }
            );
        }
    }
    for_all!(check);
}

#[test]
fn masks_of_the_wrong_length() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let inputs: Inputs<T> = setup.inputs(10, 10).cast();
        for got in [0, 1, 9, 11, 20] {
            let valid = vec![true; got];
            let mask = KeyMask::Valid(&valid);
            let expected = Error::Length { argument: "mask", expected: 10, got };
            let result = attention.prefill_of(&mut witness.state, &inputs, mask).map(|_| ());
            assert_eq!(witness.unharmed("mask", result), expected);
            assert_eq!(attention.causal_of(&inputs, mask).unwrap_err(), expected);
            if setup.is_pure() {
                // The mask is one of keys.
                let inputs: Inputs<T> = setup.inputs(got.max(1), 10).cast();
                assert_eq!(attention.full_of(&inputs, mask).unwrap_err(), expected);
            }
        }
    }
    for_all!(check);
}

/// Values no element may have: NaN, infinite, beyond the limit.
fn bad<T: Real>() -> [T; 6] {
    [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, T::LIMIT * 1.01, -T::LIMIT * 1.01, T::LIMIT * 1e20]
        .map(T::from_f64)
}

#[track_caller]
fn assert_non_finite<T: Real>(error: &Error, name: &str, index: usize, got: T) {
    let Error::NonFinite { argument, index: found, limit, got: value } = *error else {
        panic!("{error:?}")
    };
    assert_eq!((argument, found, limit), (name, index, T::LIMIT), "{error:?}");
    assert!(
        value == got.to_f64() || (value.is_nan() && got.to_f64().is_nan()),
        "{error:?}, not {got}"
    );
}

/// Long sequences are read while they are checked: what was read before the bad element is taken
/// back.
#[test]
fn elements_beyond_the_limit_far_into_a_sequence() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let n = 700;
        let mut witness = Witness::new(setup, attention);
        let clean: Inputs<T> = setup.inputs(n, n).cast();
        for (name, heads, width) in [("q", 4, 5), ("k", 2, 5), ("v", 2, 3)] {
            for (h, i) in [(0, 255), (heads - 1, 256), (heads - 1, 699), (0, 600)] {
                let mut inputs = clean.clone();
                let x = match name {
                    "q" => &mut inputs.q,
                    "k" => &mut inputs.k,
                    _ => &mut inputs.v,
                };
                x[(h, i, 1)] = T::from_f64(f64::NAN);
                let result =
                    attention.prefill_of(&mut witness.state, &inputs, KeyMask::All).map(|_| ());
                let error = witness.unharmed(&format!("{name} {h} {i}"), result);
                assert_non_finite(&error, name, (h * n + i) * width + 1, T::from_f64(f64::NAN));
                let mut mask = vec![true; n];
                mask[i] = false;
                let masked = attention.causal_of(&inputs, KeyMask::Valid(&mask));
                assert_eq!(masked.is_ok(), name != "q", "{name}");
            }
        }
    }
    for_all!(check);
}

#[test]
fn elements_beyond_the_limit() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let n = 10;
        let mut witness = Witness::new(setup, attention);
        let clean: Inputs<T> = setup.inputs(n, n).cast();
        for (name, heads, width) in [("q", 4, 5), ("k", 2, 5), ("v", 2, 3)] {
            for (b, value) in bad::<T>().into_iter().enumerate() {
                let last = heads * n * width - 1;
                for index in [0, width - 1, width, 7 * width + 1, last - n * width, last] {
                    let position = (index / width / n, index / width % n, index % width);
                    let mut inputs = clean.clone();
                    let x = match name {
                        "q" => &mut inputs.q,
                        "k" => &mut inputs.k,
                        _ => &mut inputs.v,
                    };
                    x[position] = value;
                    x[(heads - 1, n - 1, width - 1)] = value; // The first one is reported.
                    // The same array in another memory order is read in the same logical order.
                    if b % 2 == 1 {
                        let mut swapped = Array3::zeros((heads, n, width).f());
                        swapped.assign(x);
                        *x = swapped;
                    }
                    let context = format!("{name}[{position:?}] = {value}");
                    let result =
                        attention.prefill_of(&mut witness.state, &inputs, KeyMask::All).map(|_| ());
                    assert_non_finite(&witness.unharmed(&context, result), name, index, value);
                    assert_non_finite(
                        &attention.causal_of(&inputs, KeyMask::All).unwrap_err(),
                        name,
                        index,
                        value,
                    );
                    if setup.is_pure() {
                        assert_non_finite(
                            &attention.full_of(&inputs, KeyMask::All).unwrap_err(),
                            name,
                            index,
                            value,
                        );
                    }
                    // A masked key or value is not looked at; a query always is.
                    let valid: Vec<bool> = (0..n).map(|j| j != position.1 && j != n - 1).collect();
                    let result = attention
                        .prefill_of(&mut witness.state.clone(), &inputs, KeyMask::Valid(&valid))
                        .map(|_| ());
                    if name == "q" {
                        assert_non_finite(&witness.unharmed(&context, result), name, index, value);
                    } else {
                        result.unwrap();
                        // Only the masked ones are excused.
                        let result = attention
                            .prefill_of(
                                &mut witness.state,
                                &inputs,
                                KeyMask::Valid(&vec![position.1 != n - 1; n]),
                            )
                            .map(|_| ());
                        if position.1 != n - 1 {
                            assert_non_finite(
                                &witness.unharmed(&context, result),
                                name,
                                index,
                                value,
                            );
                        } else {
                            result.unwrap();
                            witness = Witness::new(setup, attention);
                        }
                    }
                }
            }
        }
    }
    for_all!(check);
}

#[test]
fn elements_of_one_token_beyond_the_limit() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let mut workspace = attention.workspace();
        let mut out = Array2::zeros((4, 3));
        let clean: Inputs<T> = setup.inputs(1, 1).cast();
        for (i, (name, elements)) in [("q", 20), ("k", 10), ("v", 6)].into_iter().enumerate() {
            for value in bad::<T>() {
                for index in [0, elements / 2, elements - 1] {
                    let mut token = clean.token(0);
                    *token[i].iter_mut().nth(index).unwrap() = value;
                    let [q, k, v] = token;
                    let result = attention.step(
                        &mut witness.state,
                        Qkv::token(&q, &k, &v),
                        &mut out,
                        &mut workspace,
                    );
                    assert_non_finite(
                        &witness.unharmed(&format!("{name}[{index}] = {value}"), result),
                        name,
                        index,
                        value,
                    );
                }
            }
        }
    }
    for_all!(check);
}

/// The limit itself is accepted.
#[test]
fn elements_at_the_limit_are_accepted() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut inputs: Inputs<T> = setup.inputs(9, 9).cast();
        inputs.v.fill(T::from_f64(T::LIMIT));
        let out = attention.causal_of(&inputs, KeyMask::All).unwrap();
        assert!(out.iter().all(|o| (o.to_f64() / T::LIMIT - 1.0).abs() < 1e-5));
    }
    for_all!(check);
}

#[test]
fn states_of_another_layer() {
    let home = Setup::new(1).heads(4, 2).window(8, 1);
    let others = [
        home.clone().heads(4, 4),
        home.clone().sizes(6, 3, 8),
        home.clone().sizes(5, 4, 8),
        home.clone().sizes(5, 3, 9),
        home.clone().window(9, 1),
        home.clone().window(8, 2),
        home.clone().window(4, 3),
        Setup { window: None, ..home.clone() },
    ];
    let attention = home.build::<f32>();
    let inputs: Inputs<f32> = home.inputs(5, 5).cast();
    for other in others {
        let foreign = other.build::<f32>();
        let mut witness = Witness::new(&other, &foreign);
        let result = attention.prefill_of(&mut witness.state, &inputs, KeyMask::All).map(|_| ());
        let error = witness.unharmed(&format!("{other:?}"), result);
        assert!(
            matches!(
                error,
                Error::Foreign { argument: "state", expected, got, .. } if expected != got
            ),
            "{other:?}: {error:?}"
        );
        let [q, k, v] = inputs.token(0);
        let result = attention.step(
            &mut witness.state,
            Qkv::token(&q, &k, &v),
            &mut Array2::zeros((4, 3)),
            &mut attention.workspace(),
        );
        let error = witness.unharmed(&format!("{other:?}"), result);
        assert!(
            matches!(
                error,
                Error::Foreign { argument: "state", expected, got, .. } if expected != got
            ),
            "{other:?}: {error:?}"
        );
    }
    // An equal layer built anew is no stranger; one of the same shape with other maps is.
    let mut twin = home.build::<f32>().new_state();
    attention.prefill_of(&mut twin, &inputs, KeyMask::All).unwrap();
    let mut other = Setup { seed: 9, ..home.clone() }.build::<f32>().new_state();
    let error = attention.prefill_of(&mut other, &inputs, KeyMask::All).unwrap_err();
    assert!(matches!(error, Error::Foreign { what: "fingerprint", .. }), "{error:?}");
}

#[test]
fn caches_of_another_layer() {
    let home = Setup::new(1).heads(4, 2);
    let attention = home.build_exact::<f64>();
    let inputs = home.inputs(5, 5);
    for other in
        [home.clone().heads(4, 4), home.clone().sizes(6, 3, 8), home.clone().sizes(5, 4, 8)]
    {
        let foreign = other.build_exact::<f64>();
        let mut witness = Witness::new(&other, &foreign);
        let result = attention.prefill_of(&mut witness.state, &inputs, KeyMask::All).map(|_| ());
        let error = witness.unharmed(&format!("{other:?}"), result);
        assert!(
            matches!(
                error,
                Error::Foreign { argument: "cache", expected, got, .. } if expected != got
            ),
            "{other:?}: {error:?}"
        );
        let [q, k, v] = inputs.token(0);
        let result = attention.step(
            &mut witness.state,
            Qkv::token(&q, &k, &v),
            &mut Array2::zeros((4, 3)),
            &mut attention.workspace(),
        );
        let error = witness.unharmed(&format!("{other:?}"), result);
        assert!(matches!(error, Error::Foreign { argument: "cache", .. }), "{other:?}: {error:?}");
    }
}

#[test]
fn workspaces_of_another_layer() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let mut witness = Witness::new(setup, attention);
        let Inputs { q, k, v }: Inputs<T> = setup.inputs(5, 5).cast();
        let mut out = Array3::zeros((4, 5, 3));
        let foreign = |other: Setup| -> [Workspace<T>; 2] {
            [other.build::<T>().workspace(), other.build_exact::<T>().workspace()]
        };
        let others = [setup.clone().sizes(6, 3, 8), setup.clone().sizes(5, 30, 8)].map(foreign);
        for mut workspace in others.into_iter().flatten() {
            let result = attention.prefill_into(
                &mut [&mut witness.state],
                Qkv::new(&q, &k, &v),
                &mut out,
                &mut workspace,
            );
            let error = witness.unharmed("workspace", result);
            assert!(
                matches!(
                    error,
                    Error::Foreign { argument: "workspace", expected, got, .. } if expected != got
                ),
                "{error:?}"
            );
            let token = [&q, &k, &v].map(|x| x.index_axis(Axis(1), 0).to_owned());
            let result = attention.step(
                &mut witness.state,
                Qkv::token(&token[0], &token[1], &token[2]),
                &mut Array2::zeros((4, 3)),
                &mut workspace,
            );
            let error = witness.unharmed("workspace", result);
            assert!(matches!(error, Error::Foreign { argument: "workspace", .. }), "{error:?}");
            if setup.is_pure() {
                let error = attention
                    .bidirectional()
                    .unwrap()
                    .forward_into(Qkv::new(&q, &k, &v), &mut out, &mut workspace)
                    .unwrap_err();
                assert!(matches!(error, Error::Foreign { argument: "workspace", .. }), "{error:?}");
            }
        }
    }
    for_all!(check);
    // One that is larger in what only linear attention needs: refused, or of no consequence.
    let setup = Setup::new(1).window(300, 3);
    let attention = setup.build::<f32>();
    let mut small = Setup::new(1).window(8, 1).build::<f32>().workspace();
    let Inputs { q, k, v }: Inputs<f32> = setup.inputs(5, 5).cast();
    let mut out = Array3::zeros((1, 5, 3));
    let error = attention
        .prefill_into(&mut [&mut attention.new_state()], Qkv::new(&q, &k, &v), &mut out, &mut small)
        .unwrap_err();
    assert!(matches!(error, Error::Foreign { argument: "workspace", .. }), "{error:?}");
}

#[test]
fn full_attention_with_a_window_part_or_decay() {
    for setup in [
        Setup::new(1).window(8, 1),
        Setup::new(1).decay(-0.1),
        Setup::new(1).window(8, 1).decay(-0.1),
    ] {
        let attention = setup.build::<f32>();
        let inputs: Inputs<f32> = setup.inputs(5, 7).cast();
        let error = attention.full_of(&inputs, KeyMask::All).unwrap_err();
        let other = if setup.window.is_some() { "window" } else { "decay" };
        assert!(
            matches!(error, Error::Conflict { argument, .. } if argument.contains(other)),
            "{error:?}"
        );
    }
    let setup = Setup::new(1).window(8, 1);
    let error =
        setup.build_exact::<f32>().full_of(&setup.inputs(5, 7).cast(), KeyMask::All).unwrap_err();
    assert!(matches!(error, Error::Conflict { .. }), "{error:?}");
}

/// Every message names the argument, and numbers where there are any.
#[test]
fn messages() {
    let setup = Setup::new(1);
    let attention = setup.build::<f32>();
    let mut inputs: Inputs<f32> = setup.inputs(4, 4).cast();
    let message =
        |inputs: &Inputs<f32>, mask| attention.causal_of(inputs, mask).unwrap_err().to_string();
    assert_eq!(message(&inputs, KeyMask::Valid(&[true; 3])), "mask must have 4 elements, got 3");
    inputs.q[[0, 1, 2]] = f32::NAN;
    assert_eq!(
        message(&inputs, KeyMask::All),
        "q[7] must be finite and at most 1e15 in magnitude, got NaN"
    );
    inputs.q[[0, 1, 2]] = 1e30;
    assert_eq!(
        message(&inputs, KeyMask::All),
        format!("q[7] must be finite and at most 1e15 in magnitude, got {:e}", f64::from(1e30_f32))
    );
    let scale = |got: f64| Error::Value { argument: "scale", expected: "one", got }.to_string();
    let ends = [0.0, -2.5, 4096.0, 1e300, 1e-300, f64::NAN, f64::NEG_INFINITY];
    let texts = ends.map(|got| scale(got).replace("scale must be one, got ", ""));
    assert_eq!(texts, ["0", "-2.5", "4096", "1e300", "1e-300", "NaN", "-inf"]);
    inputs.k = Array3::zeros((1, 5, 5));
    assert_eq!(message(&inputs, KeyMask::All), "k: axis 1 must have length 4, got 5");
}

#[test]
fn the_reference_checks_its_arguments_too() {
    let zeros = |rows, columns| Array2::<f64>::zeros((rows, columns));
    let shape = |argument, axis, expected, got| Error::Shape { argument, axis, expected, got };
    let map = PlainMap::new(4);
    assert_eq!(map.query_log_features(&zeros(3, 5)).unwrap_err(), shape("x", 1, 4, 5));
    assert_eq!(map.key_log_features(&zeros(3, 3)).unwrap_err(), shape("y", 1, 4, 3));
    for (name, broken) in [
        ("log_weight", PlainMap { log_weight: vec![0.0; 3], ..map.clone() }),
        (
            "scale",
            PlainMap {
                key: reference::PlainSide { scale: zeros(2, 4), ..map.key.clone() },
                ..map.clone()
            },
        ),
        (
            "center",
            PlainMap {
                key: reference::PlainSide { center: vec![], ..map.key.clone() },
                ..map.clone()
            },
        ),
        (
            "radii",
            PlainMap {
                query: reference::PlainSide { radii: vec![1.0; 5], ..map.query.clone() },
                ..map.clone()
            },
        ),
    ] {
        assert_eq!(argument(&broken.query_log_features(&zeros(3, 4)).unwrap_err()), name);
        assert_eq!(argument(&broken.key_log_features(&zeros(3, 4)).unwrap_err()), name);
    }
    assert_eq!(reference::scores(&zeros(2, 4), &zeros(3, 5)).unwrap_err(), shape("y", 1, 4, 5));
    assert_eq!(reference::log_kernel(&zeros(2, 4), &zeros(3, 5)).unwrap_err(), shape("b", 1, 4, 5));
    let linear = |kernel: Array2<f64>, v: Array2<f64>, pairs: &Pairs<'_>| {
        reference::linear_attention(&zeros(2, 3), &kernel, &v, pairs).unwrap_err()
    };
    assert_eq!(linear(zeros(2, 4), zeros(3, 1), &Pairs::full()), shape("log_kernel", 1, 3, 4));
    assert_eq!(linear(zeros(2, 3), zeros(2, 1), &Pairs::full()), shape("v", 0, 3, 2));
    assert_eq!(
        argument(&linear(zeros(2, 3), zeros(3, 1), &Pairs::full().with_window(0, 1))),
        "chunk"
    );
    assert_eq!(
        argument(&linear(zeros(2, 3), zeros(3, 1), &Pairs::full().with_valid(&[true]))),
        "valid"
    );
    let softmax = |v: Array2<f64>, pairs: &Pairs<'_>| {
        reference::softmax_attention(&zeros(2, 3), &v, pairs).unwrap_err()
    };
    assert_eq!(softmax(zeros(2, 1), &Pairs::full()), shape("v", 0, 3, 2));
    assert_eq!(argument(&softmax(zeros(3, 1), &Pairs::causal().with_window(0, 1))), "chunk");
    assert_eq!(argument(&softmax(zeros(3, 1), &Pairs::causal().with_valid(&[]))), "valid");
    assert_eq!(
        argument(&reference::published_features(&zeros(2, 3), &[1.0]).unwrap_err()),
        "radii"
    );
}
