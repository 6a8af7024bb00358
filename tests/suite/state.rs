//! The state: it does not matter in which pieces a sequence arrives, and a state can be copied,
//! rolled back and reset.

use dijiang::Real;
use dijiang::attention::{KeyMask, Operator, Qkv, SequenceState};
use dijiang_testing::linear::Setup;
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random, assert_close, assert_same_bits, to_f64};
use ndarray::{Array2, Array3, Axis, concatenate, s};

fn setups() -> Vec<Setup> {
    vec![
        Setup::new(1),
        Setup::new(2).decay(-0.05),
        Setup::new(3).decay(-3.0),
        Setup::new(4).window(1, 0),
        Setup::new(5).window(3, 2),
        Setup::new(6).window(16, 1),
        Setup::new(7).window(100, 0),
        Setup::new(8).window(70, 1).decay(-0.1),
        Setup::new(9).heads(4, 2).sizes(16, 17, 5),
        Setup::new(10).heads(6, 2).window(8, 1).decay(-0.02),
        // More query heads than read a window together.
        Setup::new(15).heads(11, 1).window(5, 2).sinks(2),
    ]
}

/// Exact attention, without and with a window.
fn exact_setups() -> Vec<Setup> {
    vec![
        Setup::new(11),
        Setup::new(12).heads(4, 2).sizes(16, 17, 1),
        Setup::new(13).window(16, 1),
        Setup::new(14).window(70, 0),
    ]
}

/// Runs `$check::<T>(&setup, &attention)` for every setup, linear and exact, f32 and f64.
macro_rules! for_all {
    ($check:ident) => {
        for setup in setups() {
            $check(&setup, &setup.build::<f32>());
            $check(&setup, &setup.build::<f64>());
        }
        for setup in exact_setups() {
            $check(&setup, &setup.build_exact::<f32>());
            $check(&setup, &setup.build_exact::<f64>());
        }
    };
}

/// 1e-12 relative in f64, and as many roundings in f32.
fn tolerance<T: Real>() -> f64 {
    1e-12 / f64::EPSILON * T::EPSILON.to_f64() / if size_of::<T>() == 4 { 50.0 } else { 1.0 }
}

/// The pieces of a sequence one after the other.
fn pieces<T: Real, A: Stream<T>>(
    attention: &A,
    state: &mut A::State,
    inputs: &Inputs<T>,
    valid: Option<&[bool]>,
    ends: &[usize],
) -> Array3<T> {
    let mut outs = Vec::new();
    let mut start = 0;
    let mut workspace = attention.workspace();
    for &end in ends {
        let mask = valid.map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[start..end]));
        let shape = (inputs.q.shape()[0], end - start, inputs.v.shape()[2]);
        let (part, mut out) =
            (inputs.part(start..end), Array3::from_elem(shape, T::from_f64(f64::NAN)));
        let qkv = part.qkv().with_mask(mask);
        attention.prefill_into(&mut [&mut *state], qkv, &mut out, &mut workspace).unwrap();
        outs.push(out);
        start = end;
    }
    concatenate(Axis(1), &outs.iter().map(|out| out.view()).collect::<Vec<_>>()).unwrap()
}

/// Prefill at once = in two pieces at every split = token by token, with what follows agreeing as
/// well.
#[test]
fn prefill_equals_any_pieces_equals_steps() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let (n, more) = (150, 20);
        let all: Inputs<T> = setup.inputs(n + more, n + more).cast();
        let (inputs, next) = (all.part(0..n), all.part(n..n + more));
        let mut state = attention.new_state();
        let whole = to_f64(&attention.prefill_of(&mut state, &inputs, KeyMask::All).unwrap());
        let after = to_f64(&attention.prefill_of(&mut state, &next, KeyMask::All).unwrap());
        assert_close(
            setup,
            &attention.causal_of(&inputs, KeyMask::All).unwrap(),
            &whole,
            tolerance::<T>(),
        );
        for split in 1..n {
            let context = format!("{setup:?}, split at {split}");
            let mut state = attention.new_state();
            assert_close(
                &context,
                &pieces(attention, &mut state, &inputs, None, &[split, n]),
                &whole,
                tolerance::<T>(),
            );
            if split % 10 == 0 {
                let out = attention.prefill_of(&mut state, &next, KeyMask::All).unwrap();
                assert_close(format!("{context}, after"), &out, &after, tolerance::<T>());
            }
        }
        let mut state = attention.new_state();
        assert_close(
            format!("{setup:?}, steps"),
            &attention.steps(&mut state, &inputs),
            &whole,
            tolerance::<T>(),
        );
        assert_close(
            format!("{setup:?}, steps on"),
            &attention.steps(&mut state, &next),
            &after,
            tolerance::<T>(),
        );
        assert_eq!(state.position(), n + more);
        // Prefill after steps, and steps after prefill.
        let mut state = attention.new_state();
        attention.steps(&mut state, &inputs.part(0..21));
        let out = attention.prefill_of(&mut state, &inputs.part(21..90), KeyMask::All).unwrap();
        assert_close(
            format!("{setup:?}, prefill after steps"),
            &out,
            &whole.slice(s![.., 21..90, ..]).to_owned(),
            tolerance::<T>(),
        );
        let out = attention.steps(&mut state, &inputs.part(90..n));
        assert_close(
            format!("{setup:?}, steps after prefill"),
            &out,
            &whole.slice(s![.., 90.., ..]).to_owned(),
            tolerance::<T>(),
        );
    }
    for_all!(check);
}

#[test]
fn random_pieces_with_masks() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let n = 200;
        let inputs: Inputs<T> = setup.inputs(n, n).cast();
        for seed in 0..12 {
            let mut random = Random::new(seed);
            let density = random.choose(&[0.05, 0.5, 0.9]);
            let first = random.below(90);
            let valid: Vec<bool> = (0..n).map(|j| j >= first && random.chance(density)).collect();
            let whole = to_f64(&attention.causal_of(&inputs, KeyMask::Valid(&valid)).unwrap());
            let mut ends: Vec<usize> =
                (0..random.below(12)).map(|_| 1 + random.below(n - 1)).chain([n]).collect();
            ends.sort_unstable();
            ends.dedup();
            let out = pieces(attention, &mut attention.new_state(), &inputs, Some(&valid), &ends);
            assert_close(
                format!("{setup:?}, pieces {ends:?}, seed {seed}"),
                &out,
                &whole,
                tolerance::<T>(),
            );
            let single: Vec<usize> = (1..=n).collect();
            let out = pieces(attention, &mut attention.new_state(), &inputs, Some(&valid), &single);
            assert_close(
                format!("{setup:?}, pieces of one, seed {seed}"),
                &out,
                &whole,
                tolerance::<T>(),
            );
        }
    }
    for_all!(check);
}

/// A snapshot continues as the original does, whatever happened to the original in the meantime.
#[test]
fn a_clone_is_a_snapshot() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        for prefix in [1, 16, 37, 64, 100] {
            let inputs: Inputs<T> = setup.inputs(prefix + 60, prefix + 60).cast();
            let (head, tail) = (inputs.part(0..prefix), inputs.part(prefix..prefix + 60));
            let mut state = attention.new_state();
            attention.prefill_of(&mut state, &head, KeyMask::All).unwrap();
            let snapshot = state.clone();
            assert!(snapshot == state);
            let expected = attention.prefill_of(&mut state, &tail, KeyMask::All).unwrap();
            assert!(snapshot != state, "{setup:?}: a longer state is another one");
            assert_eq!((snapshot.position(), state.position()), (prefix, prefix + 60));
            // A draft that is thrown away, then the real continuation; twice.
            let draft: Inputs<T> = Setup { seed: 77, ..setup.clone() }.inputs(50, 50).cast();
            for _ in 0..2 {
                let mut drafted = snapshot.clone();
                attention.steps(&mut drafted, &draft);
                let mut rolled_back = snapshot.clone();
                let out = attention.prefill_of(&mut rolled_back, &tail, KeyMask::All).unwrap();
                assert_same_bits(format!("{setup:?}, snapshot after {prefix}"), &out, &expected);
                assert!(rolled_back == state);
                let mut stepped = snapshot.clone();
                let out = attention.steps(&mut stepped, &tail);
                assert_close(
                    format!("{setup:?}, steps after {prefix}"),
                    &out,
                    &to_f64(&expected),
                    tolerance::<T>(),
                );
            }
        }
    }
    for_all!(check);
}

#[test]
fn a_reset_state_is_a_fresh_one() {
    fn check<T: Real, A: Stream<T>>(setup: &Setup, attention: &A) {
        let inputs: Inputs<T> = setup.inputs(150, 150).cast();
        let large: Inputs<T> = {
            let mut large = setup.inputs(80, 80);
            large.k *= 300.0;
            large.v *= 1e6;
            large.cast()
        };
        let mut fresh = attention.new_state();
        let expected = attention.prefill_of(&mut fresh, &inputs, KeyMask::All).unwrap();
        let mut used = attention.new_state();
        attention.prefill_of(&mut used, &large, KeyMask::All).unwrap();
        attention.steps(&mut used, &large.part(0..3));
        used.reset();
        assert_eq!(used.position(), 0);
        assert!(used == attention.new_state(), "{setup:?}");
        let out = attention.prefill_of(&mut used, &inputs, KeyMask::All).unwrap();
        assert_same_bits(setup, &out, &expected);
        assert!(used == fresh, "{setup:?}");
        used.reset();
        fresh.reset();
        assert_same_bits(
            setup,
            &attention.steps(&mut used, &inputs),
            &attention.steps(&mut attention.new_state(), &inputs),
        );
    }
    for_all!(check);
}

/// Masked tokens change nothing but the position.
#[test]
fn masked_tokens_leave_the_sums_alone() {
    let setup = Setup::new(1);
    let attention = setup.build::<f64>();
    let (inputs, masked) = (setup.inputs(50, 50), Setup::new(2).inputs(30, 30));
    let (mut plain, mut interrupted) = (attention.new_state(), attention.new_state());
    let mut expected = Vec::new();
    let mut got = Vec::new();
    for half in [0..25, 25..50] {
        expected.push(
            attention.prefill_of(&mut plain, &inputs.part(half.clone()), KeyMask::All).unwrap(),
        );
        attention.prefill_of(&mut interrupted, &masked, KeyMask::Valid(&[false; 30])).unwrap();
        got.push(attention.prefill_of(&mut interrupted, &inputs.part(half), KeyMask::All).unwrap());
    }
    for (got, expected) in got.iter().zip(&expected) {
        assert_same_bits("without decay, masked tokens are no tokens", got, expected);
    }
    assert_eq!((plain.position(), interrupted.position()), (50, 110));
    // What a masked query sees is what an unmasked one at its place would see of the valid keys.
    let out =
        attention.prefill_of(&mut interrupted, &masked, KeyMask::Valid(&[false; 30])).unwrap();
    let query = Inputs { q: masked.q.clone(), k: inputs.k.clone(), v: inputs.v.clone() };
    assert_close(
        "queries of masked tokens",
        &out,
        &to_f64(&attention.full_of(&query, KeyMask::All).unwrap()),
        1e-13,
    );
}

/// The state never grows; the cache does.
#[test]
fn the_state_has_a_constant_size() {
    for setup in setups() {
        let attention = setup.build::<f32>();
        let mut state = attention.new_state();
        let bytes = state.bytes();
        let sums = setup.kv_heads * setup.m * (setup.e + 1) * size_of::<f32>();
        assert!(bytes >= sums, "{setup:?}: {bytes} bytes cannot hold sums of {sums}");
        for n in [1, 50, 500] {
            attention.prefill_of(&mut state, &setup.inputs(n, n).cast(), KeyMask::All).unwrap();
            assert_eq!(state.bytes(), bytes, "{setup:?}");
        }
        assert_eq!(state.position(), 551);
        assert_eq!(state.clone().bytes(), bytes);
    }
    let setup = Setup::new(1);
    let attention = setup.build_exact::<f32>();
    let mut cache = attention.new_state();
    attention.prefill_of(&mut cache, &setup.inputs(1000, 1000).cast(), KeyMask::All).unwrap();
    assert!(cache.bytes() >= 1000 * (setup.d + setup.e) * size_of::<f32>());
    cache.reset();
    assert_eq!(cache.position(), 0);
}

/// Several states of one operator do not know of each other.
#[test]
fn states_are_independent() {
    let setup = Setup::new(1).window(8, 1);
    let attention = setup.build::<f32>();
    let sequences: Vec<Inputs<f32>> =
        (0..3).map(|seed| Setup { seed, ..setup.clone() }.inputs(60, 60).cast()).collect();
    let expected: Vec<_> = sequences
        .iter()
        .map(|inputs| attention.steps(&mut attention.new_state(), inputs))
        .collect();
    let mut states: Vec<_> = sequences.iter().map(|_| attention.new_state()).collect();
    let mut workspace = attention.workspace();
    let mut out = Array2::zeros((setup.heads, setup.e));
    for i in 0..60 {
        for (s, (state, inputs)) in states.iter_mut().zip(&sequences).enumerate() {
            let [q, k, v] = inputs.token(i);
            attention.step(state, Qkv::token(&q, &k, &v), &mut out, &mut workspace).unwrap();
            assert_same_bits(
                format!("sequence {s}, token {i}"),
                &out,
                &expected[s].index_axis(Axis(1), i),
            );
        }
    }
}

/// What the reference says of sequences that arrive in pieces, for positions far from the start of
/// a chunk.
#[test]
fn pieces_against_the_reference() {
    for setup in setups() {
        let n = 133;
        let inputs = setup.inputs(n, n);
        let expected = setup.causal(&inputs, KeyMask::All);
        let attention = setup.build::<f64>();
        let out =
            pieces(&attention, &mut attention.new_state(), &inputs, None, &[5, 6, 70, 71, 133]);
        assert_close(&setup, &out, &expected, 1e-12);
        assert_close(
            &setup,
            &attention.steps(&mut attention.new_state(), &inputs),
            &expected,
            1e-12,
        );
    }
}
