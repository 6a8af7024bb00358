//! Sequences packed one after another: each as if it were alone.

use dijiang::attention::KeyMask;
use dijiang::{Error, Real};
use dijiang_testing::linear::Setup;
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random, argument, assert_same_bits, on_threads};
use ndarray::{Array3, s};

fn setups() -> Vec<Setup> {
    [&Setup::typical()[..], &[Setup::new(6).heads(1, 1).window(64, 1)]].concat()
}

/// Lengths of sequences: none, one, primes, and one that is checked in pieces.
const LENGTHS: [usize; 8] = [5, 0, 1, 67, 301, 64, 0, 13];

fn offsets(lengths: &[usize]) -> Vec<usize> {
    lengths
        .iter()
        .scan(0, |end, len| Some(std::mem::replace(end, *end + len)))
        .chain([lengths.iter().sum()])
        .collect()
}

fn mask(valid: &Option<Vec<bool>>, tokens: std::ops::Range<usize>) -> KeyMask<'_> {
    valid.as_ref().map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[tokens]))
}

fn masks(n: usize) -> [Option<Vec<bool>>; 2] {
    let mut random = Random::new(n as u64);
    [None, Some((0..n).map(|_| random.chance(0.6)).collect())]
}

#[test]
fn packed_prefills_are_those_of_each_sequence() {
    fn check<T: Real, A: Stream<T>>(attention: &A, setup: &Setup, threads: usize) {
        let (offsets, n) = (offsets(&LENGTHS), LENGTHS.iter().sum());
        for valid in masks(n) {
            // Sequences that have just begun, and others that go on.
            let mut states: Vec<_> = LENGTHS.iter().map(|_| attention.new_state()).collect();
            let earlier = setup.inputs(200, 200).cast();
            for (i, state) in states.iter_mut().enumerate().skip(2) {
                attention
                    .prefill_of(state, &earlier.part(0..67 * i % 200 + 1), KeyMask::All)
                    .unwrap();
            }
            let (inputs, mut alone) = (setup.inputs(n, n).cast::<T>(), states.clone());
            let mut out = Array3::from_elem((setup.heads, n, setup.e), T::from_f64(f64::NAN));
            on_threads(threads, || {
                let mut states: Vec<_> = states.iter_mut().collect();
                attention.prefill_packed_into(
                    &mut states,
                    &inputs,
                    (&offsets, mask(&valid, 0..n)),
                    &mut out,
                    &mut attention.workspace(),
                )
            })
            .unwrap();
            for (i, state) in alone.iter_mut().enumerate().filter(|(i, _)| LENGTHS[*i] > 0) {
                let tokens = offsets[i]..offsets[i + 1];
                let expected = attention
                    .prefill_of(state, &inputs.part(tokens.clone()), mask(&valid, tokens.clone()))
                    .unwrap();
                assert_same_bits(
                    format!("{setup:?}, sequence {i}"),
                    &out.slice(s![.., tokens, ..]).to_owned(),
                    &expected,
                );
            }
            assert!(states == alone, "{setup:?}");
        }
    }
    for setup in setups() {
        for threads in [1, 2, 5] {
            check::<f32, _>(&setup.build::<f32>(), &setup, threads);
            check::<f32, _>(&setup.build_exact::<f32>(), &setup, threads);
        }
        check::<f64, _>(&setup.build::<f64>(), &setup, 3);
    }
}

/// One long sequence of one head has all threads to itself, among others or not.
#[test]
fn few_sequences_share_many_threads() {
    let setup = Setup::new(7).heads(1, 1).window(16, 1);
    let attention = setup.build::<f32>();
    let (lengths, n) = ([0, 700, 30], 730);
    let (offsets, inputs) = (offsets(&lengths), setup.inputs(n, n).cast());
    let prefill = |threads| {
        on_threads(threads, || {
            Stream::causal_packed(&attention, &inputs, &offsets, KeyMask::All).unwrap()
        })
    };
    assert_same_bits("8 threads", &prefill(8), &prefill(1));
}

#[test]
fn packed_causal_is_that_of_each_sequence() {
    fn check<A: Stream<f32>>(attention: &A, setup: &Setup) {
        let (offsets, n) = (offsets(&LENGTHS), LENGTHS.iter().sum());
        let inputs = setup.inputs(n, n).cast();
        for valid in masks(n) {
            let out = attention.causal_packed(&inputs, &offsets, mask(&valid, 0..n)).unwrap();
            for tokens in
                offsets.windows(2).map(|pair| pair[0]..pair[1]).filter(|tokens| !tokens.is_empty())
            {
                let expected = attention
                    .causal_of(&inputs.part(tokens.clone()), mask(&valid, tokens.clone()))
                    .unwrap();
                assert_same_bits(
                    format!("{setup:?}"),
                    &out.slice(s![.., tokens, ..]).to_owned(),
                    &expected,
                );
            }
        }
    }
    for setup in setups() {
        check(&setup.build::<f32>(), &setup);
        check(&setup.build_exact::<f32>(), &setup);
    }
}

/// Cross attention: every sequence has its own numbers of queries and of keys, and either may be
/// none.
#[test]
fn packed_full_attention_is_that_of_each_sequence() {
    fn check<A: Stream<f32>>(attention: &A, setup: &Setup) {
        let key_lengths = [9, 4, 0, 130, 1, 64, 0, 3];
        let (queries, keys) = (offsets(&LENGTHS), offsets(&key_lengths));
        let (n_q, n_k) = (LENGTHS.iter().sum(), key_lengths.iter().sum());
        let inputs: Inputs<f32> = setup.inputs(n_q, n_k).cast();
        for valid in masks(n_k) {
            let out =
                attention.full_packed(&inputs, &queries, &keys, mask(&valid, 0..n_k)).unwrap();
            for i in (0..8).filter(|&i| LENGTHS[i] > 0) {
                let (own_q, own_k) = (queries[i]..queries[i + 1], keys[i]..keys[i + 1]);
                let got = out.slice(s![.., own_q.clone(), ..]).to_owned();
                if own_k.is_empty() {
                    assert!(got.iter().all(|&x| x == 0.0), "queries without keys");
                    continue;
                }
                let Inputs { k, v, .. } = inputs.part(own_k.clone());
                let own = Inputs { q: inputs.q.slice(s![.., own_q, ..]).to_owned(), k, v };
                assert_same_bits(
                    format!("{setup:?}, {i}"),
                    &got,
                    &attention.full_of(&own, mask(&valid, own_k)).unwrap(),
                );
            }
        }
    }
    for setup in [Setup::new(1), Setup::new(5).heads(6, 3).sizes(16, 17, 5)] {
        check(&setup.build::<f32>(), &setup);
        check(&setup.build_exact::<f32>(), &setup);
    }
}

#[test]
fn bad_offsets_change_nothing() {
    fn check<A: Stream<f64>>(attention: &A, setup: &Setup) {
        let inputs = setup.inputs(6, 6).cast::<f64>();
        let mut states = [attention.new_state(), attention.new_state()];
        let prefill =
            |states: &mut [A::State], inputs: &Inputs<f64>, offsets: &[usize], valid: &[bool]| {
                let mut out = Array3::from_elem((setup.heads, inputs.q.shape()[1], setup.e), 7.0);
                let mut states: Vec<_> = states.iter_mut().collect();
                let mask = KeyMask::Valid(valid);
                let error = attention
                    .prefill_packed_into(
                        &mut states,
                        inputs,
                        (offsets, mask),
                        &mut out,
                        &mut attention.workspace(),
                    )
                    .unwrap_err();
                assert!(out.iter().all(|&x| x == 7.0), "an error wrote");
                error
            };
        let valid = [true; 6];
        for offsets in [&[1, 3, 6][..], &[0, 7, 6], &[0, 3, 5], &[0, 3, 7], &[0, usize::MAX, 6]] {
            let error = prefill(&mut states, &inputs, offsets, &valid);
            assert!(
                matches!(error, Error::Value { argument: "offsets", .. }),
                "{offsets:?}: {error:?}"
            );
        }
        for offsets in [&[][..], &[0], &[0, 6], &[0, 2, 4, 6]] {
            let error = prefill(&mut states, &inputs, offsets, &valid);
            assert!(
                matches!(error, Error::Length { argument: "offsets", expected: 3, .. }),
                "{offsets:?}: {error:?}"
            );
        }
        assert_eq!(argument(&prefill(&mut states, &inputs, &[0, 3, 6], &valid[1..])), "mask");
        assert_eq!(argument(&prefill(&mut [], &inputs.part(0..0), &[0], &[])), "q");
        assert_eq!(argument(&prefill(&mut states, &inputs.part(0..0), &[0, 0, 0], &[])), "q");
        let mut bad = inputs.clone();
        bad.v[[0, 5, 0]] = f64::NAN;
        assert!(matches!(
            prefill(&mut states, &bad, &[0, 3, 6], &valid),
            Error::NonFinite { argument: "v", .. }
        ));
        let foreign = Setup { d: setup.d + 1, ..setup.clone() };
        assert_eq!(
            argument(&prefill(&mut states, &foreign.inputs(6, 6).cast(), &[0, 3, 6], &valid)),
            "q"
        );
        assert!(states.iter().all(|state| *state == attention.new_state()));

        assert_eq!(
            argument(&attention.causal_packed(&inputs, &[], KeyMask::All).unwrap_err()),
            "offsets"
        );
        let full = |q: &[usize], k: &[usize]| {
            attention.full_packed(&inputs, q, k, KeyMask::All).unwrap_err()
        };
        assert_eq!(argument(&full(&[0, 5], &[0, 6])), "offsets");
        assert_eq!(argument(&full(&[0, 6], &[0, 5])), "key_offsets");
        assert!(matches!(
            full(&[0, 6], &[0, 3, 6]),
            Error::Length { argument: "key_offsets", expected: 2, got: 3 }
        ));
    }
    let setup = Setup::new(1);
    check(&setup.build::<f64>(), &setup);
    check(&setup.build_exact::<f64>(), &setup);
    let window = Setup::new(1).window(4, 1);
    assert!(matches!(window.build::<f64>().bidirectional(), Err(Error::Conflict { .. })));
    assert!(matches!(window.build_exact::<f64>().bidirectional(), Err(Error::Conflict { .. })));
}
