//! States as bytes: to put a conversation aside, to move it to another process, to keep the state
//! of a prompt.
//!
//! ```text
//! magic "dijiang\0", then little-endian u32: format version 4, bytes per number of the layer,
//!      storage;
//! u64: heads, d, m, e, windows (none, or one for each head), sinks s, start, position, fingerprint
//! per window u64 chunk, u64 back, u64 kept
//! per head   u64 reference position, u8 started, u8 pending keys; c, z, what rounding kept out of
//!            z; S, what rounding kept out of S; pending weights and values; the window's keys and
//!            values, and one byte each for validity; with sinks u8 how many there are, s times u64
//!            position, keys, values; with kept keys u32 how many there are, R times u64
//!            position, keys, values, R times f64 score
//! CRC-32 of everything before it, u32
//! ```
//!
//! Earlier versions are read too. They had no kept tokens; versions 1 and 2 no fingerprint; version
//! 1 one window for all heads (its chunk and back, 0 and 0 for none, in place of windows and sinks)
//! and no sinks.

use std::sync::Arc;

use half::bf16;

use super::{
    CausalState, HeadState, Kept, MAX_POSITION, PENDING, Pending, Ring, Shape, Sums, Tokens,
    ceiling,
};
use crate::Real;
use crate::attention::Window;
use crate::attention::check::MAX_SCALE;
use crate::attention::linear::LinearAttention;
use crate::error::Result;
use crate::files::{elements, fault};
use crate::kernel::FeatureMap;
use crate::low::simd::padded;

const MAGIC: &[u8; 8] = b"dijiang\0";
const VERSION: u32 = 4;
/// Bytes of the magic and three u32.
const PREFIX: usize = 8 + 3 * 4;
const CHECKSUM: usize = 4;

/// In how many bytes a state's sums, keys and values are kept. Normalisers and exponents always
/// keep the layer's own type: they are few, and everything is relative to them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum Storage {
    /// In the layer's own type: the state continues bit for bit.
    #[default]
    Exact,
    /// In f32. What an f64 layer has beyond its digits is lost, and so is what rounding has kept
    /// out of the sums; keys and values beyond its range become its largest numbers.
    F32,
    /// In bf16, 3 significant digits, else as [`F32`](Self::F32): a quarter of the bytes of an f32
    /// layer's exact state.
    Bf16,
}

impl Storage {
    fn code(self) -> u32 {
        match self {
            Self::Exact => 0,
            Self::F32 => 1,
            Self::Bf16 => 2,
        }
    }

    /// Bytes of a number of a layer of type `T`.
    fn width<T>(self) -> usize {
        match self {
            Self::Exact => size_of::<T>(),
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl<T: Real> CausalState<T> {
    /// The state as bytes, versioned and with a checksum that finds every flipped bit.
    /// [`LinearAttention::state_from_bytes`] reads them, and [`from_bytes`](Self::from_bytes).
    ///
    /// # Cost
    /// One pass over the state; one allocation of its size, or less of it with another storage than
    /// [`Storage::Exact`].
    pub fn to_bytes(&self, storage: Storage) -> Vec<u8> {
        let Shape { heads, dim, features, value_dim, ref windows, sinks, fingerprint } = self.shape;
        let mut out = Vec::with_capacity(length::<T>(&self.shape, storage, VERSION) as usize);
        out.extend_from_slice(MAGIC);
        for number in [VERSION, size_of::<T>() as u32, storage.code()] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        let numbers =
            [heads, dim, features, value_dim, windows.len(), sinks, self.start, self.position];
        let windows = windows.iter().flat_map(|window| [window.chunk, window.back, window.kept]);
        let words = |number: usize| number as u64;
        let numbers = numbers.into_iter().map(words).chain([fingerprint]);
        for number in numbers.chain(windows.map(words)) {
            out.extend_from_slice(&number.to_le_bytes());
        }
        for head in &self.heads {
            match storage {
                Storage::Exact => write_head(head, storage, &mut out),
                _ => {
                    let mut head = head.clone();
                    head.sums.settle(T::ops());
                    if size_of::<T>() == 8 {
                        raise_frame(&mut head.sums);
                    }
                    write_head(&head, storage, &mut out);
                }
            }
        }
        let checksum = crc32fast::hash(&out);
        out.extend_from_slice(&checksum.to_le_bytes());
        out
    }

    /// The state that [`to_bytes`](Self::to_bytes) wrote, of whatever shape it is: an operator
    /// finds out whether it is its own when it is used. [`LinearAttention::state_from_bytes`] finds
    /// out at once.
    ///
    /// # Cost
    /// One pass over the bytes. Memory is taken for a state of these bytes only, at most four times
    /// their number, after length, header and checksum have been found to be right.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) for bytes that are no state, of another version or
    /// element type, cut short, too long or damaged.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let header = Header::read::<T>(bytes)?;
        let Shape { heads, dim, features, value_dim, ref windows, sinks, .. } = header.shape;
        let windows = windows
            .iter()
            .flat_map(|window| [window.chunk, window.back.max(1), window.kept.max(1)]);
        let sizes = [heads, dim, features, value_dim, sinks.max(1)].into_iter().chain(windows);
        match { sizes }.find(|size| !(1..=bytes.len()).contains(size)) {
            Some(size) => Err(fault("state size", format!("from 1 to {}", bytes.len()), size)),
            None => header.state(bytes),
        }
    }
}

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// The state that [`CausalState::to_bytes`] wrote, of an operator of this shape and with these
    /// maps. Earlier versions of this crate wrote nothing of the maps: their states are taken for
    /// this operator's.
    ///
    /// # Cost
    /// One pass over the bytes. Memory is taken for this operator's state only, after length,
    /// header and checksum have been found to be right.
    ///
    /// # Errors
    /// [`Error::Foreign`](crate::Error::Foreign) for the state of an operator of another shape or
    /// with other maps, [`Error::Format`](crate::Error::Format) for bytes that are no state, of
    /// another version or element type, cut short, too long or damaged.
    pub fn state_from_bytes(&self, bytes: &[u8]) -> Result<CausalState<T>> {
        let header = Header::read::<T>(bytes)?;
        self.shape().check(&header.shape)?;
        Header { shape: self.shape().clone(), ..header }.state(bytes)
    }
}

/// What bytes say of themselves, not believed yet.
struct Header {
    version: u32,
    storage: Storage,
    shape: Shape,
    start: u64,
    position: u64,
}

impl Header {
    fn read<T: Real>(bytes: &[u8]) -> Result<Self> {
        let short = || fault("state", "at least a header", format!("{} bytes", bytes.len()));
        let (prefix, rest) = bytes.split_at_checked(PREFIX).ok_or_else(short)?;
        if prefix[..8] != MAGIC[..] {
            return Err(fault("state", "to begin with \"dijiang\"", "something else"));
        }
        let words: Vec<u32> = elements(&prefix[8..], u32::from_le_bytes);
        let version = words[0];
        if !(1..=VERSION).contains(&version) {
            return Err(fault("state version", format!("1 to {VERSION}"), version));
        }
        if words[1] as usize != size_of::<T>() {
            return Err(fault(
                "state type",
                format!("{} bytes per number", size_of::<T>()),
                words[1],
            ));
        }
        let storage = [Storage::Exact, Storage::F32, Storage::Bf16]
            .into_iter()
            .find(|storage| storage.code() == words[2]);
        let storage = storage.ok_or_else(|| fault("state storage", "0, 1 or 2", words[2]))?;
        let (numbers, rest) = rest.split_at_checked(numbers_len(version)).ok_or_else(short)?;
        let numbers: Vec<u64> = elements(numbers, u64::from_le_bytes);
        let size = |i: usize| usize::try_from(numbers[i]).unwrap_or(usize::MAX);
        let (windows, sinks) = match version {
            1 if numbers[4..6] == [0, 0] => (Vec::new(), 0),
            // A state takes more bytes than it has heads.
            1 => (vec![Window::new(size(4), size(5)); size(0).min(bytes.len())], 0),
            _ => (read_windows(rest, size(4), version)?, size(5)),
        };
        let (heads, windows): (_, Arc<[Window]>) = (size(0), windows.into());
        if !windows.is_empty() && windows.len() != heads {
            return Err(fault("state windows", format!("none, or {heads}"), windows.len()));
        }
        let [dim, features, value_dim] = [1, 2, 3].map(size);
        let fingerprint = numbers.get(8).copied().unwrap_or(0);
        let shape = Shape { heads, dim, features, value_dim, windows, sinks, fingerprint };
        Ok(Self { version, storage, shape, start: numbers[6], position: numbers[7] })
    }

    /// The state in `bytes`, of a shape whose sizes are those of something in memory.
    fn state<T: Real>(self, bytes: &[u8]) -> Result<CausalState<T>> {
        let Self { version, storage, shape, start, position } = self;
        let place = |position: u64| {
            usize::try_from(position).ok().filter(|&position| position <= MAX_POSITION)
        };
        let (Some(start), Some(position)) =
            (place(start), place(position).filter(|_| start <= position))
        else {
            return Err(fault(
                "state position",
                format!("from its start to {MAX_POSITION}"),
                format!("{start} to {position}"),
            ));
        };
        let whole = length::<T>(&shape, storage, version);
        if bytes.len() as u128 != whole {
            return Err(fault("state", format!("{whole} bytes"), bytes.len()));
        }
        let (body, checksum) = bytes.split_at(bytes.len() - CHECKSUM);
        if checksum != crc32fast::hash(body).to_le_bytes() {
            return Err(fault("state checksum", "that of the bytes", "another"));
        }
        let mut state = CausalState { start, position, ..CausalState::new(&shape) };
        let body = &body[header_len(&shape, version)..];
        let mut reader = Reader { bytes: body, storage, sound: true };
        for head in &mut state.heads {
            read_head(head, &mut reader);
            let positions = &head.sinks.positions;
            reader.sound &= positions.is_sorted_by(|a, b| a < b);
            reader.sound &= positions.iter().all(|sink| (start..position).contains(sink));
            // The frame is that of a key that has left the window.
            let next = head.ring.as_ref().map_or(position, |ring: &Ring<T>| ring.first(position));
            let mut kept = head.kept.tokens.positions.clone();
            kept.sort_unstable();
            reader.sound &= kept.is_sorted_by(|a, b| a < b);
            let left = |at: &usize| (start..next).contains(at) && !positions.contains(at);
            reader.sound &= kept.iter().all(left);
            reader.sound &=
                head.sums.reference_position <= next && head.sums.pending.len <= PENDING;
            // Without a token there is nothing in the sums.
            reader.sound &= next > start || !head.sums.started && head.sums.pending.len == 0;
            reader.sound &= is_possible(head, shape.dim, position - start);
        }
        if reader.sound {
            Ok(state)
        } else {
            Err(fault("state", "made of numbers and counts that tokens leave behind", "others"))
        }
    }
}

/// Bytes of the header's u64.
fn numbers_len(version: u32) -> usize {
    8 * if version < 3 { 8 } else { 9 }
}

/// Bytes before the first head.
fn header_len(shape: &Shape, version: u32) -> usize {
    let table = if version == 1 { 0 } else { shape.windows.len() * window_len(version) };
    PREFIX + numbers_len(version) + table
}

/// Bytes of what is told of a window.
fn window_len(version: u32) -> usize {
    8 * if version < 4 { 2 } else { 3 }
}

/// The table of `count` windows at the beginning of `bytes`.
fn read_windows(bytes: &[u8], count: usize, version: u32) -> Result<Vec<Window>> {
    let table = count.checked_mul(window_len(version)).and_then(|len| bytes.get(..len));
    let table = table.ok_or_else(|| fault("state windows", "as many as are told", "fewer"))?;
    let numbers: Vec<u64> = elements(table, u64::from_le_bytes);
    let size = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
    let window = |numbers: &[u64]| {
        let kept = numbers.get(2).map_or(0, |&kept| size(kept));
        Window::new(size(numbers[0]), size(numbers[1])).with_kept(kept)
    };
    Ok(numbers.chunks_exact(window_len(version) / 8).map(window).collect())
}

/// Bytes of a state of this shape, whose sizes are those of something in memory.
fn length<T: Real>(shape: &Shape, storage: Storage, version: u32) -> u128 {
    let [heads, dim, features] = [shape.heads, shape.dim, shape.features].map(|size| size as u128);
    let (row, sinks) = (padded(shape.value_dim) as u128, shape.sinks as u128);
    let width = storage.width::<T>() as u128;
    let token_bytes = |tokens: usize| (dim * padded(tokens) as u128 + tokens as u128 * row) * width;
    let sink_bytes = match shape.sinks {
        0 => 0,
        _ => 1 + 8 * sinks + token_bytes(shape.sinks),
    };
    let window_bytes = |window: &Window| {
        let (chunk, slots) = (window.chunk as u128, window.back as u128 + 1);
        let kept = match window.kept {
            0 => 0,
            kept => 4 + 16 * kept as u128 + token_bytes(kept),
        };
        slots * (token_bytes(window.chunk) + chunk) + kept
    };
    let exact = match shape.windows.len() {
        0 => heads * PENDING as u128 * (features + row) * width,
        _ => shape.windows.iter().map(window_bytes).sum(),
    };
    let sums = 8 + 2 + 3 * features * size_of::<T>() as u128 + 2 * features * row * width;
    (header_len(shape, version) + CHECKSUM) as u128 + heads * (sums + sink_bytes) + exact
}

/// Moves the frame up to where no feature's weights sum up to more than one, which in `f64` may be
/// e^200, so that the sums of values are no larger than the values.
fn raise_frame<T: Real>(sums: &mut Sums<T>) {
    let raised = |(&c, &norm): (&T, &T)| if norm > T::ONE { c + norm.ln() } else { c };
    let candidate: Vec<T> = sums.reference.iter().zip(&sums.norm).map(raised).collect();
    if sums.started {
        sums.rebase(T::ops(), 0.0, sums.reference_position, &candidate);
    }
}

/// Whether a head's numbers are such as `tokens` tokens in range may have left: then outputs are
/// finite, unless the map's features are not.
fn is_possible<T: Real>(head: &HeadState<T>, dim: usize, tokens: usize) -> bool {
    let HeadState { sums, ring, sinks, kept } = head;
    // Numbers kept in bf16 may have been rounded up.
    let limit = 1.01 * T::LIMIT;
    let within = |numbers: &[T], limit: f64| numbers.iter().all(|x| x.abs().to_f64() <= limit);
    let key_limit = limit * (MAX_SCALE / dim as f64).sqrt();
    let mut exact = kept.scores.iter().all(|score| score.is_finite());
    for tokens in [sinks, &kept.tokens] {
        exact &= within(&tokens.keys, key_limit) && within(&tokens.values, limit);
    }
    for (i, numbers) in ring.iter().flat_map(Ring::numbers).enumerate() {
        exact &= within(numbers, if i % 2 == 0 { key_limit } else { limit });
    }
    let weight = 1.01 * ceiling::<T>().to_f64().exp();
    let Pending { weights, values, .. } = &sums.pending;
    let pending = within(values, limit) && weights.iter().all(|&w| w >= T::ZERO);
    let pending = pending && within(weights, weight) && (sums.started || sums.pending.len == 0);
    let (m, stride) = (sums.norm.len(), sums.stride());
    let rows = sums.numerator.chunks_exact(stride).zip(sums.numerator_rest.chunks_exact(stride));
    let norms = sums.norm.iter().zip(&sums.norm_rest);
    // Weights are relative to one of them, so with those that are pending their sum is about 1 at
    // least; there is room for 10¹² tokens; and a frame that moved may have left anything tiny.
    let waiting = |f: usize| -> f64 {
        let rows = weights.chunks_exact(m).take(sums.pending.len);
        rows.map(|row| row[f].to_f64()).sum()
    };
    let (least, most, tiny) = match sums.started {
        true => (1e-9, weight * tokens.min(1 << 40) as f64, 1e-30),
        false => (0.0, 0.0, 0.0),
    };
    let mut features = norms.zip(rows).enumerate();
    exact
        && pending
        && features.all(|(f, ((&norm, &rest), (sums, rests)))| {
            let norm = norm.to_f64();
            let limit = limit * (norm + tiny);
            (0.0..=most).contains(&norm)
                && norm + waiting(f) >= least
                && rest.abs().to_f64() <= 0.01 * norm + tiny
                && within(sums, limit)
                && within(rests, limit)
        })
}

fn write_head<T: Real>(head: &HeadState<T>, storage: Storage, out: &mut Vec<u8>) {
    let HeadState { sums, ring, sinks, kept } = head;
    out.extend_from_slice(&(sums.reference_position as u64).to_le_bytes());
    out.extend([u8::from(sums.started), sums.pending.len as u8]);
    for numbers in [&sums.reference, &sums.norm, &sums.norm_rest] {
        write(numbers, Storage::Exact, out);
    }
    let Pending { weights, values, .. } = &sums.pending;
    for numbers in [&sums.numerator, &sums.numerator_rest, weights, values] {
        write(numbers, storage, out);
    }
    if let Some(ring) = ring {
        ring.numbers().for_each(|numbers| write(numbers, storage, out));
        ring.valid().for_each(|valid| out.extend(valid.iter().map(|&valid| u8::from(valid))));
    }
    if sinks.room() > 0 {
        out.push(sinks.positions.len() as u8);
        write_tokens(sinks, storage, out);
    }
    let Kept { tokens, scores } = kept;
    if tokens.room() > 0 {
        out.extend_from_slice(&(scores.len() as u32).to_le_bytes());
        write_tokens(tokens, storage, out);
        write_words(scores.iter().map(|score| score.to_bits()), tokens.room(), out);
    }
}

/// Positions, keys and values.
fn write_tokens<T: Real>(tokens: &Tokens<T>, storage: Storage, out: &mut Vec<u8>) {
    write_words(tokens.positions.iter().map(|&at| at as u64), tokens.room(), out);
    write(&tokens.keys, storage, out);
    write(&tokens.values, storage, out);
}

/// So many words: those given, then zeros.
fn write_words(words: impl Iterator<Item = u64>, room: usize, out: &mut Vec<u8>) {
    let words = words.chain(std::iter::repeat(0)).take(room);
    out.extend(words.flat_map(u64::to_le_bytes));
}

fn write<T: Real>(numbers: &[T], storage: Storage, out: &mut Vec<u8>) {
    let numbers = numbers.iter().map(|x| x.to_f64());
    let within = |x: f64, most: f64| x.clamp(-most, most);
    match (storage, size_of::<T>()) {
        (Storage::Bf16, _) => numbers
            .for_each(|x| out.extend(bf16::from_f64(within(x, bf16::MAX.to_f64())).to_le_bytes())),
        (Storage::Exact, 8) => numbers.for_each(|x| out.extend(x.to_le_bytes())),
        _ => numbers.for_each(|x| out.extend((within(x, f32::MAX.into()) as f32).to_le_bytes())),
    }
}

/// What is left of the bytes. Their number has been checked.
struct Reader<'a> {
    bytes: &'a [u8],
    storage: Storage,
    /// Whether everything read so far makes sense.
    sound: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.bytes.split_at(len.min(self.bytes.len()));
        self.bytes = rest;
        taken
    }

    fn numbers<T: Real>(&mut self, storage: Storage, out: &mut [T]) {
        let bytes = self.take(out.len() * storage.width::<T>());
        let values: Vec<f64> = match storage.width::<T>() {
            2 => elements(bytes, |bytes| f64::from(bf16::from_le_bytes(bytes))),
            4 => elements(bytes, |bytes| f64::from(f32::from_le_bytes(bytes))),
            _ => elements(bytes, f64::from_le_bytes),
        };
        self.sound &= values.iter().all(|x| x.is_finite());
        out.iter_mut().zip(values).for_each(|(out, x)| *out = T::from_f64(x));
    }

    /// `count` tokens.
    fn tokens<T: Real>(&mut self, tokens: &mut Tokens<T>, count: usize) {
        let room = tokens.room();
        let positions: Vec<u64> = elements(self.take(8 * room), u64::from_le_bytes);
        let positions = positions.into_iter().map(|at| usize::try_from(at).unwrap_or(usize::MAX));
        tokens.positions.clear();
        tokens.positions.extend(positions.take(count));
        self.sound &= count <= room;
        self.numbers(self.storage, &mut tokens.keys);
        self.numbers(self.storage, &mut tokens.values);
    }

    fn flags(&mut self, out: &mut [bool]) {
        let bytes = self.take(out.len());
        self.sound &= bytes.iter().all(|&byte| byte <= 1);
        out.iter_mut().zip(bytes).for_each(|(out, &byte)| *out = byte == 1);
    }
}

fn read_head<T: Real>(head: &mut HeadState<T>, reader: &mut Reader<'_>) {
    let HeadState { sums, ring, sinks, kept } = head;
    let position: Vec<u64> = elements(reader.take(8), u64::from_le_bytes);
    sums.reference_position =
        position.first().and_then(|&position| usize::try_from(position).ok()).unwrap_or(usize::MAX);
    let mut started = [false];
    reader.flags(&mut started);
    sums.started = started[0];
    sums.pending.len = reader.take(1).first().copied().unwrap_or_default().into();
    reader.sound &= sums.pending.len == 0 || !sums.pending.weights.is_empty();
    for numbers in [&mut sums.reference, &mut sums.norm, &mut sums.norm_rest] {
        reader.numbers(Storage::Exact, numbers);
    }
    let (storage, Pending { weights, values, .. }) = (reader.storage, &mut sums.pending);
    for numbers in [&mut sums.numerator, &mut sums.numerator_rest, weights, values] {
        reader.numbers(storage, numbers);
    }
    if let Some(ring) = ring {
        ring.numbers_mut().for_each(|numbers| reader.numbers(storage, numbers));
        ring.valid_mut().for_each(|valid| reader.flags(valid));
    }
    if sinks.room() > 0 {
        let count = usize::from(reader.take(1).first().copied().unwrap_or_default());
        reader.tokens(sinks, count);
    }
    let room = kept.tokens.room();
    if room > 0 {
        let count: Vec<u32> = elements(reader.take(4), u32::from_le_bytes);
        let count = count.first().map_or(0, |&count| count as usize);
        reader.tokens(&mut kept.tokens, count);
        kept.scores = elements(reader.take(8 * room), f64::from_le_bytes);
        kept.scores.truncate(count);
    }
}
