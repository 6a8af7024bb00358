//! Segments of a sequence, fed by themselves and merged: the state of the whole.

use dijiang::attention::{CausalState, KeyMask, LinearAttention, Operator, Window};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    Rotary, SoftmaxAttention,
};
use dijiang::{Error, Real};
use dijiang_testing::linear::{Setup, TestMap};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random, argument, assert_close, assert_same_bits, tolerance};
use ndarray::{Array2, Array3, s};

fn setups() -> Vec<Setup> {
    [
        &Setup::typical()[..],
        &[Setup::new(6).heads(2, 1).window(4, 0).decay(-0.3), Setup::new(7).window(150, 1)],
    ]
    .concat()
}

const TOKENS: usize = 331;

type Segmented<T> = LinearAttention<T, TestMap<T>>;

/// The state of tokens `range`, fed in one piece.
fn segment<T: Real>(
    attention: &Segmented<T>,
    inputs: &Inputs<T>,
    valid: &[bool],
    range: std::ops::Range<usize>,
) -> CausalState<T> {
    let mut state = attention.new_state_at(range.start).unwrap();
    if !range.is_empty() {
        let (own, mask) = (inputs.part(range.clone()), KeyMask::Valid(&valid[range]));
        attention.extend(&mut state, (&own.k, &own.v), mask, &mut attention.workspace()).unwrap();
    }
    state
}

fn merged<T: Real>(
    attention: &Segmented<T>,
    first: &CausalState<T>,
    next: &CausalState<T>,
) -> CausalState<T> {
    let mut state = first.clone();
    attention.merge(&mut state, next, &mut attention.workspace()).unwrap();
    assert_eq!((state.start(), state.position()), (first.start(), next.position()));
    state
}

/// What later queries read from a state is what they read from that of the whole: at once, and long
/// after.
fn assert_equal<T: Real>(
    context: &str,
    attention: &Segmented<T>,
    later: &Inputs<T>,
    got: &CausalState<T>,
    expected: &CausalState<T>,
) {
    let outputs = |state: &CausalState<T>| {
        attention.prefill_of(&mut state.clone(), later, KeyMask::All).unwrap()
    };
    let expected = outputs(expected).mapv(Real::to_f64);
    assert_close(context, &outputs(got), &expected, tolerance::<T>(20.0, TOKENS));
    let steps = attention.steps(&mut got.clone(), later);
    assert_close(context, &steps, &expected, tolerance::<T>(20.0, TOKENS));
}

#[test]
fn extending_is_prefilling_without_queries() {
    for setup in setups() {
        let attention = setup.build::<f32>();
        let (inputs, mut random) = (setup.inputs(TOKENS, TOKENS).cast::<f32>(), Random::new(4));
        let valid: Vec<bool> = (0..TOKENS).map(|_| random.chance(0.7)).collect();
        let mut expected = attention.new_state();
        attention.prefill_of(&mut expected, &inputs, KeyMask::Valid(&valid)).unwrap();
        let mut state = attention.new_state();
        attention
            .extend(
                &mut state,
                (&inputs.k, &inputs.v),
                KeyMask::Valid(&valid),
                &mut attention.workspace(),
            )
            .unwrap();
        assert!(state == expected, "{setup:?}");
    }
}

#[test]
fn two_segments_are_the_whole() {
    fn check<T: Real>(setup: &Setup) {
        let attention = setup.build::<T>();
        let (inputs, later) =
            (setup.inputs(TOKENS, TOKENS).cast::<T>(), setup.inputs(40, 40).cast::<T>());
        let mut random = Random::new(setup.seed);
        for valid in [
            vec![true; TOKENS],
            (0..TOKENS).map(|_| random.chance(0.4)).collect(),
            (0..TOKENS).map(|j| j >= 160).collect(),
        ] {
            // At the edges of chunks and within them, near the beginning and the end.
            for cut in [0, 1, 3, 4, 70, 99, 140, 150, 299, 328, 330, TOKENS] {
                for end in [cut, (cut + 2).min(TOKENS), TOKENS] {
                    let whole = segment(&attention, &inputs, &valid, 0..end);
                    let (first, next) = (
                        segment(&attention, &inputs, &valid, 0..cut),
                        segment(&attention, &inputs, &valid, cut..end),
                    );
                    let context = format!("{setup:?}, {cut} and {} tokens", end - cut);
                    let got = merged(&attention, &first, &next);
                    assert_equal(&context, &attention, &later, &got, &whole);
                    if cut == 0 || cut == end {
                        assert!(got == whole, "{context}: nothing is neutral");
                    }
                }
            }
        }
    }
    for setup in setups() {
        check::<f64>(&setup);
        check::<f32>(&setup);
    }
}

/// The segments' states may have been made in any way: by prefill, by steps with keys that have not
/// joined the sums, by merging.
#[test]
fn merging_is_associative() {
    for setup in setups() {
        let attention = setup.build::<f64>();
        let (inputs, later) =
            (setup.inputs(TOKENS, TOKENS).cast::<f64>(), setup.inputs(40, 40).cast::<f64>());
        let (valid, mut random) = (vec![true; TOKENS], Random::new(5));
        let whole = segment(&attention, &inputs, &valid, 0..TOKENS);
        for _ in 0..6 {
            let mut cuts =
                [0, random.below(TOKENS), random.below(TOKENS), random.below(TOKENS), TOKENS];
            cuts.sort_unstable();
            let mut parts: Vec<_> = cuts
                .windows(2)
                .map(|cut| segment(&attention, &inputs, &valid, cut[0]..cut[1]))
                .collect();
            parts[1] = attention.new_state_at(cuts[1]).unwrap();
            attention.steps(&mut parts[1], &inputs.part(cuts[1]..cuts[2]));
            let join = |first: &_, next: &_| merged(&attention, first, next);
            let left = join(&join(&join(&parts[0], &parts[1]), &parts[2]), &parts[3]);
            let right = join(&parts[0], &join(&parts[1], &join(&parts[2], &parts[3])));
            let pairs = join(&join(&parts[0], &parts[1]), &join(&parts[2], &parts[3]));
            for (name, state) in [("left", left), ("right", right), ("pairs", pairs)] {
                assert_equal(
                    &format!("{setup:?}, {cuts:?}, {name}"),
                    &attention,
                    &later,
                    &state,
                    &whole,
                );
            }
        }
    }
}

/// Outputs over a segment's own keys, and over the state before it alone, are those over all keys.
#[test]
fn partial_outputs_are_parts_of_the_whole() {
    fn check<T: Real>(setup: &Setup) {
        let (attention, mut random) = (setup.build::<T>(), Random::new(setup.seed));
        let inputs = setup.inputs(TOKENS, TOKENS).cast::<T>();
        let valid: Vec<bool> = (0..TOKENS).map(|j| j < 20 || random.chance(0.6)).collect();
        let mut workspace = attention.workspace();
        let mut state = attention.new_state();
        let mask = KeyMask::Valid(&valid);
        let expected = attention.prefill_of(&mut state, &inputs, mask).unwrap();
        for cut in [20, 64, 101, 300] {
            let mut before = segment(&attention, &inputs, &valid, 0..cut);
            let own = inputs.part(cut..TOKENS);
            let mask = KeyMask::Valid(&valid[cut..]);
            let mut state = attention.new_state_past_sinks(cut).unwrap();
            let a =
                attention.prefill_partial(&mut state, own.qkv().with_mask(mask), &mut workspace);
            let nobody = vec![false; TOKENS - cut];
            let masked = own.qkv().with_mask(KeyMask::Valid(&nobody));
            let kept = before.clone();
            let b = attention.prefill_partial(&mut before, masked, &mut workspace).unwrap();
            let (a, e) = (a.unwrap().mapv(Real::to_f64), attention.value_dim());
            let b = b.mapv(Real::to_f64);
            let found = Array3::from_shape_fn((attention.heads(), TOKENS - cut, e), |(h, i, j)| {
                let weight = |x: &Array3<f64>| x[[h, i, e + 1]] * x[[h, i, e]].exp();
                let (w_a, w_b) = (weight(&a), weight(&b));
                (w_a * a[[h, i, j]] + w_b * b[[h, i, j]]) / (w_a + w_b)
            });
            let context = format!("{setup:?} at {cut}");
            let expected = expected.slice(s![.., cut.., ..]).mapv(Real::to_f64);
            assert_close(&context, &found, &expected, tolerance::<T>(20.0, TOKENS));
            let whole = merged(&attention, &kept, &state);
            let later = setup.inputs(40, 40).cast::<T>();
            let of_whole = segment(&attention, &inputs, &valid, 0..TOKENS);
            assert_equal(&context, &attention, &later, &whole, &of_whole);
        }
    }
    for setup in setups() {
        if setup.kept == 0 {
            check::<f64>(&setup);
            check::<f32>(&setup);
            continue;
        }
        let (attention, inputs) = (setup.build::<f64>(), setup.inputs(3, 3));
        let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
        let result = attention.prefill_partial(&mut state, inputs.qkv(), &mut workspace);
        let other = "partial outputs";
        assert_eq!(result, Err(Error::Conflict { argument: "window kept", other }));
    }
}

/// Keys that grow or shrink by orders of magnitude from segment to segment move the frames of the
/// states.
#[test]
fn frames_of_any_size_merge() {
    for (setup, growth) in [
        (Setup::new(1), 40.0),
        (Setup::new(2).decay(-2.0), -40.0),
        (Setup::new(3).window(4, 1).decay(-9.0), 40.0),
    ] {
        let attention = setup.build::<f32>();
        let (mut inputs, later) = (setup.inputs(200, 200), setup.inputs(20, 20).cast());
        let scale = |j: usize| if growth > 0.0 { j as f64 / 200.0 } else { 1.0 - j as f64 / 200.0 };
        inputs
            .k
            .axis_iter_mut(ndarray::Axis(1))
            .enumerate()
            .for_each(|(j, mut k)| k *= 1.0 + f64::abs(growth) * scale(j));
        let (inputs, valid) = (inputs.cast(), [true; 200]);
        let whole = segment(&attention, &inputs, &valid, 0..200);
        let (first, next) = (
            segment(&attention, &inputs, &valid, 0..90),
            segment(&attention, &inputs, &valid, 90..200),
        );
        let outputs = |state: &CausalState<f32>| {
            attention.prefill_of(&mut state.clone(), &later, KeyMask::All).unwrap()
        };
        // Exponents of hundreds in f32: their rounding is what differs.
        assert_close(
            format!("{setup:?}"),
            &outputs(&merged(&attention, &first, &next)),
            &outputs(&whole).mapv(f64::from),
            2e-3,
        );
    }
}

#[test]
fn strangers_do_not_merge() {
    let setup = Setup::new(3).window(3, 2);
    let (attention, inputs) = (setup.build::<f64>(), setup.inputs(20, 20).cast::<f64>());
    let valid = [true; 20];
    let mut state = segment(&attention, &inputs, &valid, 0..10);
    let before = state.clone();
    let mut workspace = attention.workspace();
    for next in [
        segment(&attention, &inputs, &valid, 11..20),
        segment(&attention, &inputs, &valid, 9..20),
        attention.new_state(),
    ] {
        let error = attention.merge(&mut state, &next, &mut workspace).unwrap_err();
        assert!(matches!(error, Error::Value { argument: "the next segment", .. }), "{error:?}");
    }
    let other = Setup::new(3).window(3, 1).build::<f64>();
    let foreign = other.new_state_at(10).unwrap();
    assert!(matches!(
        attention.merge(&mut state, &foreign, &mut workspace),
        Err(Error::Foreign { argument: "state", .. })
    ));
    assert!(matches!(
        other.merge(&mut state, &foreign, &mut workspace),
        Err(Error::Foreign { .. })
    ));
    let next = attention.new_state_at(10).unwrap();
    assert_eq!(
        argument(
            &attention
                .merge(&mut state, &next, &mut Setup::new(1).sizes(6, 3, 8).build().workspace())
                .unwrap_err()
        ),
        "workspace"
    );
    assert!(state == before);
    assert!(matches!(
        attention.new_state_at(usize::MAX),
        Err(Error::TooLarge { argument: "position", .. })
    ));

    let mut bad = inputs.clone();
    bad.v[[0, 7, 1]] = f64::INFINITY;
    assert_eq!(
        argument(
            &attention
                .extend(&mut state, (&bad.k, &bad.v), KeyMask::All, &mut workspace)
                .unwrap_err()
        ),
        "v"
    );
    assert_eq!(
        argument(
            &attention
                .extend(&mut state, (&bad.k, &bad.v), KeyMask::Valid(&valid[1..]), &mut workspace)
                .unwrap_err()
        ),
        "mask"
    );
    assert_eq!(
        argument(
            &attention
                .extend(&mut state, (&bad.v, &bad.v), KeyMask::All, &mut workspace)
                .unwrap_err()
        ),
        "k"
    );
    assert!(state == before);
}

/// Four workers, each with a quarter of the tokens: local states, an exclusive scan, and outputs
/// from the states it gives. Elements are looked at as they are read, and what they were read into
/// is put back: an empty state, short and long stretches.
#[test]
fn refused_tokens_change_no_state() {
    for setup in [Setup::new(1), Setup::new(2).window(16, 1), Setup::new(3).decay(-0.1).heads(2, 2)]
    {
        let attention = setup.build::<f64>();
        let mut workspace = attention.workspace();
        let mut used = attention.new_state();
        let before = setup.inputs(90, 90);
        attention.extend(&mut used, (&before.k, &before.v), KeyMask::All, &mut workspace).unwrap();
        for (mut state, n) in [
            (attention.new_state_at(33).unwrap(), 200),
            (attention.new_state(), 700),
            (used.clone(), 20),
            (used, 700),
        ] {
            let (good, kept) = (setup.inputs(n, n), state.clone());
            let mut bad = good.clone();
            bad.v[[setup.kv_heads - 1, n - 1, 0]] = f64::INFINITY;
            let error = attention
                .extend(&mut state, (&bad.k, &bad.v), KeyMask::All, &mut workspace)
                .unwrap_err();
            assert_eq!(argument(&error), "v");
            assert!(state == kept, "{setup:?}: {n} tokens by extend");
            assert_eq!(
                argument(&attention.prefill_of(&mut state, &bad, KeyMask::All).unwrap_err()),
                "v"
            );
            assert!(state == kept, "{setup:?}: {n} tokens by prefill");
            attention.extend(&mut state, (&good.k, &good.v), KeyMask::All, &mut workspace).unwrap();
            assert_eq!(state.position(), kept.position() + n);
        }
    }
}

#[test]
fn a_layer_in_parallel_over_the_sequence() {
    let mut random = Random::new(11);
    let mut matrix = || random.normals((24, 24), 0.3);
    let config = AttentionConfig::new(24, 4).with_rotary(Rotary::new(100.0));
    let softmax = SoftmaxAttention::new(
        config,
        AttentionWeights::new(matrix(), matrix(), matrix(), matrix()),
    )
    .unwrap();
    let x: Array2<f64> = random.normals((203, 24), 1.0);
    for window in [None, Some(Window::new(8, 1))] {
        let layer = DijiangAttention::from_softmax(
            &softmax,
            DijiangOptions::new().with_window(window).with_log_decay(-0.01),
        )
        .unwrap();
        let expected = layer.forward(&x, KeyMask::All).unwrap();
        let cuts = [0, 50, 101, 150, 203];
        let parts: Vec<_> =
            cuts.windows(2).map(|cut| (cut[0], x.slice(s![cut[0]..cut[1], ..]))).collect();
        let local: Vec<_> = std::thread::scope(|scope| {
            let work = |&(start, x): &(usize, ndarray::ArrayView2<'_, f64>)| {
                let mut state = layer.new_state_at(start).unwrap();
                layer.extend(&mut state, &x, KeyMask::All).unwrap();
                state
            };
            let workers: Vec<_> =
                parts.iter().map(|part| scope.spawn(move || work(part))).collect();
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let mut before = layer.new_state();
        let outputs: Vec<_> = std::thread::scope(|scope| {
            let mut workers = Vec::new();
            for ((_, x), local) in parts.iter().zip(&local) {
                let (mut state, layer) = (before.clone(), &layer);
                workers
                    .push(scope.spawn(move || layer.prefill(&mut state, x, KeyMask::All).unwrap()));
                layer.merge(&mut before, local).unwrap();
            }
            workers.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        let views: Vec<_> = outputs.iter().map(|rows| rows.view()).collect();
        let got = ndarray::concatenate(ndarray::Axis(0), &views).unwrap();
        assert_close(format!("{window:?}"), &got, &expected, 1e-12);
        assert_same_bits(
            "the first segment",
            &outputs[0],
            &layer.forward(&parts[0].1, KeyMask::All).unwrap(),
        );
    }
    let config = AttentionConfig::new(24, 4).with_causality(Causality::Bidirectional);
    let softmax = SoftmaxAttention::new(config, softmax.weights().clone()).unwrap();
    let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new()).unwrap();
    assert!(matches!(
        layer.extend(&mut layer.new_state(), &x, KeyMask::All),
        Err(Error::Conflict { .. })
    ));
}
