//! States as bytes: they continue bit for bit, and nothing else is taken for one.

use dijiang::attention::Operator;
use dijiang::attention::{CausalState, KeyMask, Storage};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    SoftmaxAttention,
};
use dijiang::{Error, Real};
use dijiang_testing::linear::Setup;
use dijiang_testing::stream::Stream;
use dijiang_testing::{assert_close, assert_same_bits};
use ndarray::{Array1, Array2, s};

/// The empty state, one with pending keys, one after a prefill.
fn states<T: Real, A: Stream<T>>(attention: &A, setup: &Setup) -> Vec<A::State> {
    let (inputs, mut state) = (setup.inputs(83, 83).cast(), attention.new_state());
    let mut states = vec![state.clone()];
    attention.prefill_of(&mut state, &inputs.part(0..70), KeyMask::All).unwrap();
    states.push(state.clone());
    attention.steps(&mut state, &inputs.part(70..83));
    states.push(state);
    states
}

#[test]
fn exact_bytes_continue_bit_for_bit() {
    fn check<T: Real>(setup: &Setup) {
        let attention = setup.build::<T>();
        let later = setup.inputs(99, 99).cast();
        for mut state in states(&attention, setup) {
            let mut read = attention.state_from_bytes(&state.to_bytes(Storage::Exact)).unwrap();
            assert!(read == state, "{setup:?}");
            assert!(CausalState::from_bytes(&state.to_bytes(Storage::Exact)).unwrap() == state);
            let [expected, got] = [&mut state, &mut read].map(|state| {
                let mut outs = vec![attention.steps(state, &later.part(0..5))];
                outs.push(attention.prefill_of(state, &later.part(5..99), KeyMask::All).unwrap());
                outs
            });
            for (got, expected) in got.iter().zip(&expected) {
                assert_same_bits(format!("{setup:?}"), got, expected);
            }
            assert!(read == state);
        }
    }
    for setup in Setup::typical() {
        check::<f32>(&setup);
        check::<f64>(&setup);
    }
}

#[test]
fn short_numbers_are_window() {
    fn check<T: Real>(setup: &Setup, storage: Storage, tolerance: f64) {
        let attention = setup.build::<T>();
        let later = setup.inputs(9, 9).cast();
        let mut state = states(&attention, setup).remove(2);
        let bytes = state.to_bytes(storage);
        assert!(bytes.len() < state.to_bytes(Storage::Exact).len());
        let mut read = attention.state_from_bytes(&bytes).unwrap();
        let expected = attention.steps(&mut state, &later).mapv(Real::to_f64);
        assert_close(
            format!("{setup:?}"),
            &attention.steps(&mut read, &later),
            &expected,
            tolerance,
        );
    }
    for setup in Setup::typical() {
        check::<f64>(&setup, Storage::F32, 1e-6);
        check::<f64>(&setup, Storage::Bf16, 0.05);
        check::<f32>(&setup, Storage::Bf16, 0.05);
    }
}

/// Weights and values of f64 may be far out of f32's range.
#[test]
fn short_numbers_of_large_ones() {
    let cases = [
        (Setup::new(31).heads(2, 1), Storage::F32, 1e-6),
        (Setup::new(32).heads(2, 1), Storage::Bf16, 0.05),
        (Setup::new(33).heads(2, 1).window(4, 1), Storage::F32, 1e-6),
    ];
    for ((setup, storage, tolerance), size) in
        cases.iter().flat_map(|case| [100.0, 200.0, 400.0].map(|size| (case, size)))
    {
        let attention = setup.build::<f64>();
        let mut inputs = setup.inputs(40, 40);
        // The frame is that of the first key; weights of up to e^200 keep to it.
        inputs.k.slice_mut(s![.., 0, ..]).fill(0.0);
        let far = inputs.k.slice(s![.., 1.., ..]).iter().fold(0.0_f64, |top, x| top.max(x.abs()));
        inputs.k.slice_mut(s![.., 1.., ..]).mapv_inplace(|x| x * size / far);
        let (mut state, later) = (attention.new_state(), setup.inputs(9, 9));
        attention.prefill_of(&mut state, &inputs, KeyMask::All).unwrap();
        let mut read = attention.state_from_bytes(&state.to_bytes(*storage)).unwrap();
        let expected = attention.steps(&mut state.clone(), &later);
        assert_close(
            format!("{setup:?}, size {size}"),
            &attention.steps(&mut read, &later),
            &expected,
            *tolerance,
        );

        // Values near the end of the range, whatever their weights.
        let (mut state, mut large) = (attention.new_state(), inputs.clone());
        large.v *= 1e30;
        attention.prefill_of(&mut state, &large, KeyMask::All).unwrap();
        let mut read = attention.state_from_bytes(&state.to_bytes(*storage)).unwrap();
        let expected = attention.steps(&mut state, &later);
        assert_close(
            format!("{setup:?}, size {size}, large"),
            &attention.steps(&mut read, &later),
            &expected,
            *tolerance,
        );

        inputs.v.fill(1e60);
        attention.prefill_of(&mut state, &inputs, KeyMask::All).unwrap();
        let mut read = attention.state_from_bytes(&state.to_bytes(*storage)).unwrap();
        assert!(attention.steps(&mut read, &later).iter().all(|x| x.is_finite()));
    }
}

#[test]
fn every_flipped_bit_is_found() {
    let setup = Setup::new(6).sizes(2, 2, 1).window(2, 0);
    let attention = setup.build::<f32>();
    let bytes = states(&attention, &setup).remove(2).to_bytes(Storage::Exact);
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(attention.state_from_bytes(&flipped).is_err(), "bit {bit}");
        assert!(CausalState::<f32>::from_bytes(&flipped).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(
            matches!(CausalState::<f32>::from_bytes(&bytes[..len]), Err(Error::Format { .. })),
            "{len} bytes"
        );
        assert!(
            matches!(attention.state_from_bytes(&bytes[..len]), Err(Error::Format { .. })),
            "{len} bytes"
        );
    }
    let longer = [&bytes[..], &[0; 4]].concat();
    assert!(matches!(attention.state_from_bytes(&longer), Err(Error::Format { .. })));
}

/// A checksum is easily made to fit; what it covers must still make sense.
#[test]
fn forged_bytes_are_refused() {
    let setup = Setup::new(7).sizes(2, 2, 1);
    let attention = setup.build::<f64>();
    let state = states(&attention, &setup).remove(2);
    let bytes_of = |state: &CausalState<f64>| state.to_bytes(Storage::Exact);
    let bytes = bytes_of(&state);
    let forged = |at: usize, new: &[u8]| {
        let mut bytes = bytes[..bytes.len() - 4].to_vec();
        bytes[at..at + new.len()].copy_from_slice(new);
        let checksum = crc32fast::hash(&bytes);
        bytes.extend(checksum.to_le_bytes());
        attention.state_from_bytes(&bytes)
    };
    assert!(forged(0, b"dijiang\0").is_ok());
    let payload = 8 + 12 + 72;
    let cases: [(&str, usize, &[u8]); 13] = [
        ("magic", 0, b"DIJIANG\0"),
        ("version", 8, &[5]),
        ("type", 12, &[4]),
        ("storage", 16, &[9]),
        ("heads", 20, &[0xff; 8]),
        ("a start after the position", 68, &[0xff, 0]),
        ("sums of no tokens", 76, &[0; 8]),
        ("a position that cannot be counted on", 76, &[0xff; 8]),
        ("other maps", 84, &[0xff]),
        ("a frame after the position", payload, &[0xff; 8]),
        ("started", payload + 8, &[2]),
        ("pending keys", payload + 9, &[17]),
        ("a number", payload + 10, &f64::NAN.to_le_bytes()),
    ];
    for (what, at, new) in cases {
        assert!(
            matches!(forged(at, new), Err(Error::Format { .. } | Error::Foreign { .. })),
            "{what}"
        );
    }
    // A checksum that fits bytes of another length.
    for body in [&bytes[..bytes.len() - 5], &bytes[..100], &[&bytes[..], &[0; 8]].concat()] {
        let forged = [body, &crc32fast::hash(body).to_le_bytes()].concat();
        assert!(
            matches!(attention.state_from_bytes(&forged), Err(Error::Format { .. })),
            "{} bytes",
            forged.len()
        );
        assert!(
            matches!(CausalState::<f64>::from_bytes(&forged), Err(Error::Format { .. })),
            "{} bytes",
            forged.len()
        );
    }
    // Without an operator to compare with, sizes are believed only as far as the bytes go.
    for at in (20..68).step_by(8) {
        for size in [0, 1, 1 << 20, 1 << 40, u64::MAX] {
            let mut bytes = bytes[..bytes.len() - 4].to_vec();
            bytes[at..at + 8].copy_from_slice(&size.to_le_bytes());
            bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
            // A size that takes no room, such as d without a local window, may be another
            // operator's.
            match CausalState::<f64>::from_bytes(&bytes) {
                Ok(read) => assert!(size <= 1 && bytes_of(&read) == bytes, "{size} at {at}"),
                Err(error) => assert!(matches!(error, Error::Format { .. }), "{size} at {at}"),
            }
        }
    }
    for other in [
        Setup::new(7).sizes(3, 2, 1),
        Setup::new(7).sizes(2, 3, 1),
        Setup::new(7).sizes(2, 2, 2),
        Setup::new(7).sizes(2, 2, 1).window(4, 1),
    ] {
        assert!(
            matches!(other.build::<f64>().state_from_bytes(&bytes), Err(Error::Foreign { .. })),
            "{other:?}"
        );
    }
    assert!(setup.build::<f32>().state_from_bytes(&bytes).is_err());
}

/// Any number of a state made another one, with a checksum that fits: it is refused, or whoever
/// goes on from it gets finite numbers, or an error.
#[test]
fn forged_numbers_do_no_harm() {
    fn check<T: Real>(setup: &Setup) {
        let attention = setup.build::<T>();
        let later = setup.inputs(20, 20).cast();
        let (mut read, mut refused) = (0, 0);
        let bytes = states(&attention, setup).remove(2).to_bytes(Storage::Exact);
        let payload = 92 + if setup.window.is_some() { 24 * setup.kv_heads } else { 0 };
        let values = [-1.0, -1e-3, 0.0, 1e-38, 1e20, 1e38, -3e38, 1e300].map(T::from_f64);
        for value in values.into_iter().filter(|x| x.to_f64().is_finite()) {
            let number = match size_of::<T>() {
                4 => (value.to_f64() as f32).to_le_bytes().to_vec(),
                _ => value.to_f64().to_le_bytes().to_vec(),
            };
            // An odd step: on numbers and across them.
            for at in (payload..bytes.len() - 4).step_by(5) {
                let mut forged = bytes[..bytes.len() - 4].to_vec();
                let end = forged.len().min(at + number.len());
                forged[at..end].copy_from_slice(&number[..end - at]);
                forged.extend(crc32fast::hash(&forged).to_le_bytes());
                let Ok(mut state) = attention.state_from_bytes(&forged) else {
                    refused += 1;
                    continue;
                };
                read += 1;
                let mut other = state.clone();
                for out in [
                    attention.prefill_of(&mut state, &later, KeyMask::All),
                    attention.prefill_of(&mut other, &later.part(0..1), KeyMask::All),
                ] {
                    let finite = out.map_or(true, |out| out.iter().all(|x| x.to_f64().is_finite()));
                    assert!(finite, "{setup:?}, {}: {value} at {at}", T::NAME);
                }
            }
        }
        assert!(read > 0 && refused > 0, "{setup:?}: {read} read, {refused} refused");
    }
    let small = |seed| Setup::new(seed).sizes(2, 2, 1);
    for setup in [small(7), small(8).window(2, 1), small(9).window(2, 0).kept(3)] {
        check::<f32>(&setup);
        check::<f64>(&setup);
    }
}

/// Versions 1 to 3, which knew of no kept keys, and 1 and 2, which said nothing of the maps.
#[test]
fn earlier_versions_are_read() {
    for setup in [Setup::new(7).sizes(2, 2, 1), Setup::new(8).sizes(2, 2, 1).window(2, 1)] {
        let attention = setup.build::<f64>();
        let stranger = Setup { seed: 99, ..setup.clone() }.build::<f64>();
        for state in states(&attention, &setup) {
            let bytes = state.to_bytes(Storage::Exact);
            assert!(matches!(
                stranger.state_from_bytes(&bytes),
                Err(Error::Foreign { what: "fingerprint", .. })
            ));
            let head = 92 + setup.window.map_or(0, |_| 24 * setup.kv_heads);
            let (windows, rest) = (&bytes[92..head], &bytes[head..bytes.len() - 4]);
            let windows: Vec<u8> =
                windows.chunks_exact(24).flat_map(|window| &window[..16]).copied().collect();
            let (window, first) = (&windows[..], windows.get(..16).unwrap_or(&[0; 16]));
            let versions: [(u32, Vec<&[u8]>); 3] = [
                (3, vec![&bytes[12..92], window, rest]),
                (2, vec![&bytes[12..84], window, rest]),
                (1, vec![&bytes[12..52], first, &bytes[68..84], rest]),
            ];
            for (version, parts) in versions {
                let mut old = [&bytes[..8], &version.to_le_bytes(), &parts.concat()].concat();
                old.extend(crc32fast::hash(&old).to_le_bytes());
                assert!(attention.state_from_bytes(&old).unwrap() == state, "version {version}");
                // Before version 3 nobody can tell whose they are.
                let read = CausalState::from_bytes(&old).unwrap();
                attention.check_state(&read).unwrap();
                assert_eq!(stranger.check_state(&read).is_ok(), version < 3);
            }
        }
    }
}

#[test]
fn layers_have_them_too() {
    let matrix = |p: usize| {
        Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f32 / 17.0 - 0.3)
    };
    let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights).unwrap();
    let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new()).unwrap();
    let x = Array2::from_shape_fn((300, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f32 / 8.0 - 1.0);
    let mut state = layer.new_state();
    layer.prefill(&mut state, &x.slice(s![..299, ..]), KeyMask::All).unwrap();
    let mut read = layer.state_from_bytes(&state.to_bytes(Storage::Exact)).unwrap();
    let [expected, got] = [&mut state, &mut read].map(|state| {
        let mut out = Array1::zeros(8);
        layer.step(state, &x.row(299), &mut out).unwrap();
        out
    });
    assert_same_bits("step", &got, &expected);
    assert!(layer.state_from_bytes(&[]).is_err());
    assert!(
        layer.resume(CausalState::from_bytes(&state.to_bytes(Storage::Exact)).unwrap()).unwrap()
            == state
    );
    let other =
        DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_window(None)).unwrap();
    assert!(matches!(
        other.resume(state.attention().clone()),
        Err(Error::Foreign { argument: "state", .. })
    ));
}
