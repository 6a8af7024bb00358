//! States of the device to and from the bytes of the CPU crate (written in its version 3, read in
//! its newest).
//!
//! The device keeps exponents in units of log 2, no compensation of rounding, keys as they came and
//! in rows; the bytes have natural logarithms, scaled keys, in columns.

use std::f64::consts::{LN_2, LOG2_E};
use std::ops::Range;

use dijiang::attention::{CausalState, Storage, Window};

use crate::call::{SINKS, TILE};
use crate::element::Element;
use crate::error::{Error, Result};
use crate::pool::Stream;
use crate::tables::Side;

const MAGIC: &[u8; 8] = b"dijiang\0";
/// Keys that wait to join the sums where there are no windows.
const PENDING: usize = 16;

/// What states of one operator share.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shape {
    pub(crate) dim: usize,
    pub(crate) value_dim: usize,
    pub(crate) features: usize,
    pub(crate) scale: f64,
    pub(crate) sinks: usize,
    /// Without windows those that the kernels work with: a tile.
    pub(crate) windows: Vec<Window>,
    pub(crate) windowless: Option<KeySides>,
    pub(crate) log_decay: Vec<f64>,
    /// The operator's.
    pub(crate) fingerprint: u64,
}

impl Shape {
    pub(crate) fn kv_heads(&self) -> usize {
        self.windows.len()
    }

    /// Bytes of one head's part of a state on the device, its window `ring` tokens long; see
    /// `State` in kernels/common.cu.
    pub(crate) fn head_bytes<E: Element>(&self, ring: usize) -> usize {
        let sums = self.features * (self.value_dim + 2) * size_of::<f32>();
        sums + (ring + SINKS) * (self.dim + self.value_dim) * size_of::<E>() + ring
    }

    /// Heads, d, m, e, windows and sinks, as the bytes have them.
    fn sizes_in_bytes(&self) -> [usize; 6] {
        let windows = if self.windowless.is_some() { 0 } else { self.windows.len() };
        [self.kv_heads(), self.dim, self.features, self.value_dim, windows, self.sinks]
    }

    /// Position of the first token that is in no sum; exponents of sums are relative to it.
    fn base(&self, window: Window, position: usize) -> usize {
        position.div_ceil(window.chunk).saturating_sub(window.back + 1) * window.chunk
    }
}

/// Without windows: the key sides of the maps. The device keeps the last keys as they are, but in
/// the bytes every key is in the sums.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct KeySides {
    pub(crate) sides: Vec<Side>,
    pub(crate) envelope: bool,
}

/// One head's part of a state on the device, in f64.
struct HeadState {
    c: Vec<f64>,
    z: Vec<f64>,
    s: Vec<f64>,
    /// `[ring, d]`, unscaled, and `[ring, e]`.
    keys: Vec<f64>,
    values: Vec<f64>,
    sink_keys: Vec<f64>,
    sink_values: Vec<f64>,
    valid: Vec<u8>,
}

impl HeadState {
    fn read<E: Element>(shape: &Shape, ring: usize, bytes: &mut &[u8]) -> Self {
        let floats = |bytes: &mut &[u8], len| {
            elements::<f32>(bytes, len).into_iter().map(f64::from).collect()
        };
        let numbers =
            |bytes: &mut &[u8], len| elements::<E>(bytes, len).into_iter().map(E::to_f64).collect();
        let Shape { dim, value_dim, features, .. } = *shape;
        Self {
            c: floats(bytes, features),
            z: floats(bytes, features),
            s: floats(bytes, features * value_dim),
            keys: numbers(bytes, ring * dim),
            values: numbers(bytes, ring * value_dim),
            sink_keys: numbers(bytes, SINKS * dim),
            sink_values: numbers(bytes, SINKS * value_dim),
            valid: take(bytes, ring).to_vec(),
        }
    }

    /// Keeps these positions of the ring: of others it may hold what the device no longer looks at.
    fn forget(&mut self, kept: Range<usize>, shape: &Shape) {
        let ring = self.valid.len();
        for row in 0..ring {
            let age = (kept.end + ring - 1 - row) % ring;
            if age >= kept.len() {
                self.valid[row] = 0;
                self.keys[row * shape.dim..][..shape.dim].fill(0.0);
                self.values[row * shape.value_dim..][..shape.value_dim].fill(0.0);
            }
        }
    }

    /// The keys in the ring join the sums, whose exponents are relative to `kept.start`; `decay` is
    /// the log2 of the decay of a token.
    fn join(&mut self, kept: Range<usize>, shape: &Shape, side: &Side, envelope: bool, decay: f64) {
        let Shape { dim, value_dim, .. } = *shape;
        for p in kept.clone() {
            let row = p % self.valid.len();
            if self.valid[row] == 0 {
                continue;
            }
            let key = &self.keys[row * dim..][..dim];
            let value = &self.values[row * value_dim..][..value_dim];
            let dot = |a: &[f64]| -> f64 { a.iter().zip(key).map(|(a, b)| a * b).sum() };
            let norm = if envelope { 0.5 * LOG2_E * shape.scale * dot(key) } else { 0.0 };
            let common = decay * (kept.start as f64 - p as f64) - norm;
            let features = side.matrix.chunks_exact(dim).zip(&side.row);
            for (f, (weights, constant)) in features.enumerate() {
                let exponent = dot(weights) + constant + common;
                let any = self.z[f] > 0.0;
                let top = if any { self.c[f].max(exponent) } else { exponent };
                let own = if any { (self.c[f] - top).exp2() } else { 0.0 };
                let added = (exponent - top).exp2();
                self.c[f] = top;
                self.z[f] = if any { self.z[f] * own } else { 0.0 } + added;
                let sums = &mut self.s[f * value_dim..][..value_dim];
                for (s, v) in sums.iter_mut().zip(value) {
                    *s = if any { *s * own } else { 0.0 } + added * v;
                }
            }
        }
    }

    fn write<E: Element>(&self, out: &mut Vec<u8>) {
        for numbers in [&self.c, &self.z, &self.s] {
            numbers.iter().for_each(|&x| out.extend((x as f32).to_le_bytes()));
        }
        for numbers in [&self.keys, &self.values, &self.sink_keys, &self.sink_values] {
            for &x in numbers {
                out.extend(&E::from_f64(x).to_bytes()[..size_of::<E>()]);
            }
        }
        out.extend(&self.valid);
    }
}

fn take<'a>(bytes: &mut &'a [u8], len: usize) -> &'a [u8] {
    let (taken, rest) = bytes.split_at(len);
    *bytes = rest;
    taken
}

fn elements<E: Element>(bytes: &mut &[u8], len: usize) -> Vec<E> {
    take(bytes, len * size_of::<E>()).chunks_exact(size_of::<E>()).map(E::from_bytes).collect()
}

/// `[rows, columns]` to `[columns, rows]`.
fn transposed(matrix: &[f64], columns: usize) -> Vec<f64> {
    let rows = matrix.len() / columns.max(1);
    (0..columns).flat_map(|j| (0..rows).map(move |i| matrix[i * columns + j])).collect()
}

/// The state of a stream as the CPU crate's bytes.
pub(crate) fn encode<E: Element>(shape: &Shape, stream: &Stream, mut state: &[u8]) -> Vec<u8> {
    let (dim, value_dim, features) = (shape.dim, shape.value_dim, shape.features);
    let mut out = MAGIC.to_vec();
    [3u32, 4, 0].iter().for_each(|word| out.extend(word.to_le_bytes()));
    let sizes = shape.sizes_in_bytes();
    let places = [0, stream.position];
    let windows =
        shape.windows.iter().take(sizes[4]).flat_map(|window| [window.chunk, window.back]);
    let numbers = sizes.into_iter().chain(places).map(|number| number as u64);
    let windows = windows.map(|number| number as u64);
    let numbers = numbers.chain([shape.fingerprint]).chain(windows);
    numbers.for_each(|number| out.extend(number.to_le_bytes()));
    for (h, window) in shape.windows.iter().enumerate() {
        let mut head = HeadState::read::<E>(shape, window.tokens(), &mut state);
        let base = shape.base(*window, stream.position);
        head.forget(base..stream.position, shape);
        let mut any = base > 0;
        if let Some(KeySides { sides, envelope }) = &shape.windowless {
            let decay = LOG2_E * shape.log_decay[h];
            head.join(base..stream.position, shape, &sides[h], *envelope, decay);
            any = stream.position > 0;
        }
        let started = any && head.z.iter().any(|&z| z > 0.0);
        out.extend((base as u64).to_le_bytes());
        out.extend([u8::from(started), 0]);
        let kept = |x: f64| if started { x } else { 0.0 };
        // What rounding the exponent changes goes to the sums.
        let c: Vec<f32> = head.c.iter().map(|c| kept(c * LN_2) as f32).collect();
        let factor: Vec<f64> = head
            .c
            .iter()
            .zip(&c)
            .map(|(own, c)| kept((own * LN_2 - f64::from(*c)).exp()))
            .collect();
        let mut put = |numbers: &mut dyn Iterator<Item = f64>| {
            numbers.for_each(|x| out.extend((x as f32).to_le_bytes()));
        };
        let scaled = |f: usize, x: f64| if started { x * factor[f] } else { 0.0 };
        put(&mut c.iter().map(|&c| f64::from(c)));
        put(&mut head.z.iter().enumerate().map(|(f, z)| scaled(f, *z)));
        put(&mut vec![0.0; features].into_iter());
        put(&mut head.s.iter().enumerate().map(|(i, s)| scaled(i / value_dim, *s)));
        put(&mut vec![0.0; features * value_dim].into_iter());
        if shape.windowless.is_some() {
            put(&mut vec![0.0; PENDING * (features + value_dim)].into_iter());
            continue;
        }
        let scale = shape.scale.sqrt();
        let keys: Vec<f64> = head.keys.iter().map(|x| x * scale).collect();
        let slots = keys.chunks_exact(window.chunk * dim);
        for (keys, values) in slots.zip(head.values.chunks_exact(window.chunk * value_dim)) {
            put(&mut transposed(keys, dim).into_iter());
            put(&mut values.iter().copied());
        }
        out.extend(&head.valid);
        if shape.sinks > 0 {
            let known = stream.sinks.len();
            out.push(known as u8);
            for i in 0..shape.sinks {
                let position = stream.sinks.get(i).copied().unwrap_or(0);
                out.extend((position as u64).to_le_bytes());
            }
            let stride = shape.sinks.next_multiple_of(16);
            let mut keys = vec![0.0; stride * dim];
            let rows = head.sink_keys.iter().take(known * dim).zip(&mut keys);
            rows.for_each(|(key, to)| *to = key * scale);
            let values = head.sink_values.iter().copied().enumerate();
            let values = values.take(shape.sinks * value_dim);
            let values = values.map(|(i, x)| if i < known * value_dim { x } else { 0.0 });
            let mut put = |numbers: &mut dyn Iterator<Item = f64>| {
                numbers.for_each(|x| out.extend((x as f32).to_le_bytes()));
            };
            put(&mut transposed(&keys, dim).into_iter());
            put(&mut { values });
        }
    }
    let checksum = crc32fast::hash(&out);
    out.extend(checksum.to_le_bytes());
    out
}

/// A state or pool of an operator with other maps.
pub(crate) fn foreign(argument: &'static str, expected: u64, got: u64) -> Error {
    let (what, expected, got) = ("fingerprint", expected as usize, got as usize);
    Error::Dijiang(dijiang::Error::Foreign { argument, what, expected, got })
}

/// What the host must know of a state, and the state as the device keeps it.
pub(crate) fn decode<E: Element>(
    shape: &Shape,
    state: &CausalState<f32>,
) -> Result<(Stream, Vec<u8>)> {
    // Written anew, so that it is of the newest version and nothing is pending but what is said.
    let bytes = state.to_bytes(Storage::Exact);
    let mut rest = &bytes[..];
    let number = |rest: &mut &[u8]| {
        let mut word = [0; 8];
        word.copy_from_slice(take(rest, 8));
        u64::from_le_bytes(word) as usize
    };
    take(&mut rest, 20);
    let mut header = || number(&mut rest);
    let sizes = [(); 6].map(|()| header());
    let places = [(); 2].map(|()| header());
    let fingerprint = header();
    let (dim, value_dim, features) = (shape.dim, shape.value_dim, shape.features);
    let own = shape.sizes_in_bytes();
    let windows = shape.windows.iter().take(own[4]).all(|window| {
        let mut is = |size| number(&mut rest) == size;
        sizes == own && is(window.chunk) && is(window.back) && is(window.kept)
    });
    if !windows || sizes != own {
        let what = "the state's shape";
        let different = (0..6).find(|&i| sizes[i] != own[i]);
        let (expected, got) = different.map_or((0, 1), |i| (own[i], sizes[i]));
        let error = dijiang::Error::Foreign { argument: "state", what, expected, got };
        return Err(Error::Dijiang(error));
    }
    if ![0, shape.fingerprint as usize].contains(&fingerprint) {
        return Err(foreign("state", shape.fingerprint, fingerprint as u64));
    }
    let [start, position] = places;
    if start != 0 {
        let expected = "a state that begins at 0";
        return Err(Error::Value { argument: "state", expected, got: start });
    }
    let (mut out, mut sinks) = (Vec::new(), Vec::new());
    for (window, log_decay) in shape.windows.iter().zip(&shape.log_decay) {
        let reference = number(&mut rest);
        let (started, pending) = match take(&mut rest, 2) {
            [started, pending] => (*started == 1, usize::from(*pending)),
            _ => unreachable!("two bytes were taken"),
        };
        let mut floats = |len: usize| -> Vec<f64> {
            elements::<f32>(&mut rest, len).into_iter().map(f64::from).collect()
        };
        let c = floats(features);
        let both = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).map(|(a, b)| a + b).collect();
        let mut z: Vec<f64> = both(floats(features), floats(features));
        let elements = features * value_dim;
        let mut s: Vec<f64> = both(floats(elements), floats(elements));
        if shape.windowless.is_some() {
            let (weights, values) = (floats(PENDING * features), floats(PENDING * value_dim));
            let keys = weights.chunks_exact(features).zip(values.chunks_exact(value_dim));
            for (weights, values) in keys.take(pending) {
                for (f, weight) in weights.iter().enumerate() {
                    z[f] += weight;
                    let sums = &mut s[f * value_dim..][..value_dim];
                    sums.iter_mut().zip(values).for_each(|(s, v)| *s += weight * v);
                }
            }
        }
        let shift = log_decay * (shape.base(*window, position) as f64 - reference as f64);
        let exact = |c: &f64| if started { (c + shift) * LOG2_E } else { 0.0 };
        let exact: Vec<f64> = c.iter().map(exact).collect();
        for (f, exact) in exact.iter().enumerate() {
            let factor = (exact - f64::from(*exact as f32)).exp2();
            z[f] *= factor;
            s[f * value_dim..][..value_dim].iter_mut().for_each(|s| *s *= factor);
        }
        let (mut keys, mut values, mut valid) = (Vec::new(), Vec::new(), vec![0; window.tokens()]);
        if shape.windowless.is_some() {
            keys.resize(window.tokens() * dim, 0.0);
            values.resize(window.tokens() * value_dim, 0.0);
        } else {
            for _ in 0..=window.back {
                keys.extend(transposed(&floats(dim * window.chunk), window.chunk));
                values.extend(floats(window.chunk * value_dim));
            }
            valid = take(&mut rest, window.tokens()).to_vec();
        }
        let (mut sink_keys, mut sink_values) =
            (vec![0.0; SINKS * dim], vec![0.0; SINKS * value_dim]);
        if shape.sinks > 0 {
            let known = usize::from(take(&mut rest, 1)[0]);
            let positions: Vec<i32> = (0..shape.sinks).map(|_| number(&mut rest) as i32).collect();
            sinks = positions[..known].to_vec();
            let mut floats = |len: usize| -> Vec<f64> {
                crate::bytes::elements::<f32>(&mut rest, len).into_iter().map(f64::from).collect()
            };
            let stride = shape.sinks.next_multiple_of(16);
            let rows = transposed(&floats(dim * stride), stride);
            sink_keys[..shape.sinks * dim].copy_from_slice(&rows[..shape.sinks * dim]);
            sink_values[..shape.sinks * value_dim]
                .copy_from_slice(&floats(shape.sinks * value_dim));
        }
        let unscaled = |keys: Vec<f64>| keys.iter().map(|x| x / shape.scale.sqrt()).collect();
        let head = HeadState {
            c: exact,
            z,
            s,
            keys: unscaled(keys),
            values,
            sink_keys: unscaled(sink_keys),
            sink_values,
            valid,
        };
        head.write::<E>(&mut out);
    }
    if i32::try_from(position).is_err() {
        let expected = "a position below 2^31";
        return Err(Error::Value { argument: "state", expected, got: position });
    }
    Ok((Stream { position, sinks }, out))
}

const _: () = assert!(TILE.is_multiple_of(16), "chunks have no padding in the CPU's bytes");

#[cfg(test)]
mod tests {
    use dijiang::attention::{KeyMask, LinearAttention, LinearConfig, Operator, Qkv};
    use dijiang::kernel::{DctMap, DctMapConfig};
    use ndarray::{Array3, s};

    use super::*;

    fn operator() -> LinearAttention<f32, DctMap<f32>> {
        let map = |seed| DctMapConfig::new().with_seed(seed).build(64);
        let maps = vec![map(0).expect("sizes are right"), map(1).expect("sizes are right")];
        LinearConfig::new()
            .with_windows(vec![Window::new(64, 2), Window::new(192, 0)])
            .with_sinks(3)
            .with_log_decay(vec![0.0, -0.01])
            .build(maps)
            .expect("sizes are right")
    }

    fn tokens(from: usize, n: usize) -> Array3<f32> {
        let element = |(h, i, j)| ((7 * h + 13 * (from + i) + 5 * j) as f32).sin();
        Array3::from_shape_fn((2, n, 64), element)
    }

    fn prefill(
        operator: &LinearAttention<f32, DctMap<f32>>,
        from: usize,
        n: usize,
        state: &mut CausalState<f32>,
    ) -> Array3<f32> {
        let x = tokens(from, n);
        let valid: Vec<bool> = (from..from + n).map(|i| i * i % 7 < 2).collect();
        let qkv = Qkv::new(&x, &x, &x).with_mask(KeyMask::Valid(&valid));
        operator.prefill(state, qkv).expect("sizes are right")
    }

    /// From the CPU's bytes to the device's and back, at every kind of position: the state goes on
    /// as it would have.
    #[test]
    fn states_come_back_as_they_went() {
        let operator = operator();
        let shape = Shape::of(&operator).expect("the kernels can do it");
        for n in [1, 5, 64, 127, 128, 129, 233, 300, 466, 576, 577, 640, 699] {
            let mut state = operator.new_state();
            prefill(&operator, 0, n, &mut state);
            let (stream, device) = decode::<f32>(&shape, &state).expect("it is of this shape");
            assert_eq!(stream.position, n);
            let bytes = encode::<f32>(&shape, &stream, &device);
            let mut back = operator.state_from_bytes(&bytes).expect("they are a state");
            let expected = prefill(&operator, n, 150, &mut state);
            let got = prefill(&operator, n, 150, &mut back);
            let error = (&got - &expected).iter().fold(0.0, |most: f32, x| most.max(x.abs()));
            assert!(error < 1e-5, "{n} tokens: off by {error:e}");
            assert!(got.slice(s![.., ..1, ..]).iter().all(|x| x.is_finite()));
        }
    }

    /// The same without windows, where states hold no keys; and keys that the device still has join
    /// the sums.
    #[test]
    fn states_without_windows_come_and_go() {
        let config = operator().config().with_windows(vec![]).with_sinks(0);
        let operator = config.build(operator().maps().to_vec()).expect("sizes are right");
        let shape = Shape::of(&operator).expect("the kernels can do it");
        for n in [1, 5, 64, 127, 128, 129, 233, 300, 466, 576, 577, 640, 699] {
            let base = shape.base(shape.windows[0], n);
            let mut state = operator.new_state();
            prefill(&operator, 0, n, &mut state);
            let expected = prefill(&operator, n, 150, &mut state);
            for kept in [n, base] {
                let mut state = operator.new_state();
                if kept > 0 {
                    prefill(&operator, 0, kept, &mut state);
                }
                let (mut stream, mut device) = decode::<f32>(&shape, &state).expect("it is ours");
                if kept < n {
                    device = with_keys(&shape, base..n, &device);
                }
                stream.position = n;
                let bytes = encode::<f32>(&shape, &stream, &device);
                let mut back = operator.state_from_bytes(&bytes).expect("they are a state");
                let got = prefill(&operator, n, 150, &mut back);
                let error = (&got - &expected).iter().fold(0.0, |most: f32, x| most.max(x.abs()));
                assert!(error < 1e-5, "{n} tokens, {kept} in the sums: off by {error:e}");
            }
        }
    }

    /// The state of a device that has these tokens in its rings, from one that has them not.
    fn with_keys(shape: &Shape, tokens_kept: Range<usize>, mut state: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        let x = tokens(tokens_kept.start, tokens_kept.len());
        for h in 0..shape.kv_heads() {
            let mut head = HeadState::read::<f32>(shape, TILE, &mut state);
            // Exponents were relative to the tile before.
            let moved = if tokens_kept.start > 0 { TILE as f64 } else { 0.0 };
            head.c.iter_mut().for_each(|c| *c += LOG2_E * shape.log_decay[h] * moved);
            for (i, p) in tokens_kept.clone().enumerate() {
                let row = x.slice(s![h, i, ..]).mapv(f64::from).to_vec();
                head.valid[p % TILE] = u8::from(p * p % 7 < 2);
                head.keys[p % TILE * 64..][..64].copy_from_slice(&row);
                head.values[p % TILE * 64..][..64].copy_from_slice(&row);
            }
            head.write::<f32>(&mut out);
        }
        out
    }

    /// Rows of a ring that the device has left as they were, of an earlier chunk or sequence.
    #[test]
    fn rows_behind_the_last_token_are_empty() {
        let operator = operator();
        let shape = Shape::of(&operator).expect("the kernels can do it");
        for n in [10, 233, 576, 699] {
            let mut state = operator.new_state();
            prefill(&operator, 0, n, &mut state);
            let (stream, device) = decode::<f32>(&shape, &state).expect("it is of this shape");
            let (mut rest, mut dirty) = (&device[..], Vec::new());
            for window in &shape.windows {
                let ring = window.tokens();
                let mut head = HeadState::read::<f32>(&shape, ring, &mut rest);
                let seen = shape.base(*window, n)..n;
                for row in (0..ring).filter(|row| !seen.clone().any(|p| p % ring == *row)) {
                    head.valid[row] = 1;
                    head.keys[row * shape.dim..][..shape.dim].fill(3.0);
                    head.values[row * shape.value_dim..][..shape.value_dim].fill(3.0);
                }
                head.write::<f32>(&mut dirty);
            }
            let clean = encode::<f32>(&shape, &stream, &device);
            assert!(encode::<f32>(&shape, &stream, &dirty) == clean, "{n} tokens");
        }
    }

    #[test]
    fn states_of_other_operators_are_refused() {
        let operator = operator();
        let shape = Shape::of(&operator).expect("the kernels can do it");
        let other = operator.config().with_sinks(2).build(operator.maps().to_vec());
        let other = other.expect("sizes are right");
        assert!(matches!(decode::<f32>(&shape, &other.new_state()), Err(Error::Dijiang(_))));
        let other = operator.config().with_log_decay(vec![-0.02; 2]);
        let other = other.build(operator.maps().to_vec()).expect("sizes are right");
        let of_others = decode::<f32>(&shape, &other.new_state());
        let fingerprint = |error: &Error| error.to_string().contains("fingerprint");
        assert!(of_others.is_err_and(|error| fingerprint(&error)));
        let later = operator.new_state_at(64).expect("it is small");
        assert!(matches!(decode::<f32>(&shape, &later), Err(Error::Value { got: 64, .. })));
    }

    #[test]
    fn what_the_kernels_cannot_do_is_said() {
        let operator = operator();
        let of = |config: LinearConfig| {
            Shape::of(&config.build::<f32, _>(operator.maps().to_vec()).expect("the CPU can"))
        };
        let config = operator.config();
        let unsupported = [
            (of(config.clone().with_window(Window::new(65, 1))), 65),
            (of(config.clone().with_window(Window::new(65536, 1))), 131072),
            (of(config.clone().with_value_dim(32)), 32),
            (of(config.with_sinks(17)), 17),
        ];
        for (shape, expected) in unsupported {
            match shape {
                Err(Error::Unsupported { got, .. }) => assert_eq!(got, expected),
                other => panic!("{other:?}"),
            }
        }
    }
}
