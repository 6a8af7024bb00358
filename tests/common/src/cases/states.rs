//! Bytes that say they are a state.

use dijiang::Real;
use dijiang::attention::{LinearAttention, LinearConfig, Operator, Qkv, Storage, Window};
use dijiang::kernel::{DctMap, DctMapConfig};
use ndarray::{Array2, Array3};

use super::{Source, Tally};

/// Bytes of magic, three u32 and nine u64.
const HEADER: usize = 92;

pub fn run(source: &mut Source<'_>, tally: &mut Tally) {
    match source.chance(0.5) {
        true => check::<f32>(source, tally),
        false => check::<f64>(source, tally),
    }
}

fn check<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let window = source
        .chance(0.5)
        .then(|| Window::new(source.upto(3), source.below(2)).with_kept(source.below(3)));
    let dim = source.upto(3);
    let attention = operator::<T>(dim, window);
    let bytes = forged(source, &attention);
    let Some(mut state) = tally.record(attention.state_from_bytes(&bytes)) else { return };
    // Whatever was accepted can be used. A forger may have made its exponents as large as they get:
    // then nobody can go on from it, and is told so.
    let position = state.position();
    assert!(
        attention
            .state_from_bytes(&state.to_bytes(Storage::Exact))
            .is_ok_and(|again| again == state)
    );
    let (token, mut out) = (Array2::from_elem((1, dim), T::ONE), Array2::zeros((1, dim)));
    let stepped = tally.record(attention.step(
        &mut state,
        Qkv::token(&token, &token, &token),
        &mut out,
        &mut attention.workspace(),
    ));
    let prefilled = tally.record(
        attention.prefill(&mut state, Qkv::new(&text(5, dim), &text(5, dim), &text(5, dim))),
    );
    assert!(stepped.is_none() || out.iter().all(|x| x.to_f64().is_finite()), "{out:?}");
    if let Some(out) = prefilled {
        assert!(out.iter().all(|x| x.to_f64().is_finite()), "{out:?}");
        assert_eq!(state.position(), position + 6);
    }
}

fn operator<T: Real>(dim: usize, window: Option<Window>) -> LinearAttention<T, DctMap<T>> {
    let mut config = LinearConfig::new().with_log_decay(vec![-0.1]);
    config.windows = window.into_iter().collect();
    let map = DctMapConfig::new().build(dim).unwrap_or_else(|error| panic!("{error}"));
    config.build(vec![map]).unwrap_or_else(|error| panic!("{error}"))
}

fn text<T: Real>(n: usize, dim: usize) -> Array3<T> {
    Array3::from_shape_fn((1, n, dim), |(_, i, j)| {
        T::from_f64(((3 * i + 5 * j) % 7) as f64 / 4.0 - 0.7)
    })
}

/// The bytes of a state, damaged, mostly with a checksum that fits.
fn forged<T: Real>(source: &mut Source<'_>, attention: &LinearAttention<T, DctMap<T>>) -> Vec<u8> {
    let (mut state, dim, n) =
        (attention.new_state(), attention.maps()[0].params().dim(), source.below(20));
    if n > 0 {
        let fed =
            attention.prefill(&mut state, Qkv::new(&text(n, dim), &text(n, dim), &text(n, dim)));
        fed.unwrap_or_else(|error| panic!("{error}"));
    }
    let mut bytes = state.to_bytes(source.choose(&[Storage::Exact, Storage::F32, Storage::Bf16]));
    bytes.truncate(bytes.len() - 4);
    for _ in 0..source.below(4) {
        let at = source.below(bytes.len());
        match source.below(6) {
            0 => bytes[at] ^= 1 << source.below(8),
            // A number of the header, or one anywhere.
            1 => put(&mut bytes, 20 + 8 * source.below(9), &(source.size() as u64).to_le_bytes()),
            2 => put(&mut bytes, 8 + 4 * source.below(3), &(source.below(9) as u32).to_le_bytes()),
            3 => put(&mut bytes, at, &source.number().to_le_bytes()),
            4 => put(&mut bytes, HEADER, &(source.size() as u64).to_le_bytes()),
            _ => put(&mut bytes, at, &(source.number() as f32).to_le_bytes()),
        }
    }
    match source.below(12) {
        0 => bytes.truncate(source.below(bytes.len() + 1)),
        1 => bytes.extend((0..source.below(64)).map(|_| 0)),
        _ => {}
    }
    let checksum = if source.chance(0.9) { crc32fast::hash(&bytes) } else { source.bits() as u32 };
    bytes.extend(checksum.to_le_bytes());
    bytes
}

fn put(bytes: &mut [u8], at: usize, new: &[u8]) {
    let end = bytes.len().min(at + new.len());
    if at < end {
        bytes[at..end].copy_from_slice(&new[..end - at]);
    }
}
