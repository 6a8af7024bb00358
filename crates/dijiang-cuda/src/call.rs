//! What the kernels are told, as `kernels/common.cu` declares it, and which sequences and segments
//! there are.

use std::ops::Range;

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use dijiang::attention::Window;

use crate::error::{Error, Result};

/// Tokens of a tile.
pub(crate) const TILE: usize = 64;
/// Most sinks.
pub(crate) const SINKS: usize = 16;

#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Head {
    pub(crate) tiles: i32,
    pub(crate) back: i32,
    pub(crate) ring: i32,
    pub(crate) decay: f32,
    pub(crate) state: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(crate) struct Sequence {
    pub(crate) token: i32,
    pub(crate) n: i32,
    pub(crate) position: i32,
    pub(crate) slot: i32,
    pub(crate) tile: i32,
    pub(crate) segment: i32,
    pub(crate) sinks: i32,
    pub(crate) sink: [i32; SINKS],
}

/// Pointers are addresses on the device.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Call {
    pub(crate) q: u64,
    pub(crate) k: u64,
    pub(crate) v: u64,
    pub(crate) out: u64,
    pub(crate) mask: u64,
    pub(crate) heads: u64,
    pub(crate) sequences: u64,
    pub(crate) count: i32,
    pub(crate) kv_heads: i32,
    pub(crate) group: i32,
    pub(crate) tokens: i32,
    pub(crate) segment_tiles: i32,
    pub(crate) envelope: i32,
    pub(crate) scale: f32,
    pub(crate) projections: u64,
    pub(crate) wide: u64,
    pub(crate) rows: u64,
    pub(crate) states: u64,
    pub(crate) state_bytes: u64,
    pub(crate) segment_sums: u64,
    pub(crate) means: u64,
    pub(crate) mean_unit: u64,
    pub(crate) mean_level: u64,
    pub(crate) versions: i32,
    pub(crate) grad_out: u64,
    pub(crate) log_total: u64,
    pub(crate) delta: u64,
}

/// As `Call`, for gradients.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Back {
    pub(crate) dq: u64,
    pub(crate) dk: u64,
    pub(crate) dv: u64,
    pub(crate) sums: u64,
    pub(crate) means: u64,
    pub(crate) mean_unit: u64,
    pub(crate) mean_level: u64,
    pub(crate) mean_delta: u64,
    pub(crate) versions: i32,
    pub(crate) segments: i32,
    pub(crate) shrink: f32,
    pub(crate) sinks: u64,
    pub(crate) sink_totals: u64,
    pub(crate) moments: u64,
    pub(crate) moment_totals: u64,
    pub(crate) decays: u64,
}

// SAFETY: plain numbers, laid out as the kernels' own structs are.
unsafe impl DeviceRepr for Head {}
// SAFETY: as above.
unsafe impl DeviceRepr for Sequence {}
// SAFETY: zeros are numbers.
unsafe impl ValidAsZeroBits for Sequence {}
// SAFETY: as for `Head`.
unsafe impl DeviceRepr for Call {}
// SAFETY: as for `Head`.
unsafe impl DeviceRepr for Back {}

/// Positions of the first unmasked tokens that later queries go on seeing.
pub(crate) type SinkPositions = Vec<i32>;

/// The next tokens of several sequences: where they lie, and in how many tiles and segments.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) sequences: Vec<Sequence>,
    pub(crate) tiles: usize,
    pub(crate) segments: usize,
    pub(crate) segment_tiles: usize,
}

/// What a plan must know of one sequence.
#[derive(Clone)]
pub(crate) struct Part<'a> {
    pub(crate) rows: Range<usize>,
    pub(crate) position: usize,
    pub(crate) slot: Option<usize>,
    pub(crate) sinks: &'a [i32],
}

impl Plan {
    /// `blocks` is how many blocks a segment takes, `at_once` how many there is room for.
    pub(crate) fn new<'a>(
        parts: impl Iterator<Item = Part<'a>> + Clone,
        mask: Option<&[bool]>,
        sinks: usize,
        blocks: usize,
        at_once: usize,
    ) -> Result<Self> {
        let tiles_of = |part: &Part<'_>| match part.rows.len() {
            0 => 0,
            n => (part.position + n - 1) / TILE - part.position / TILE + 1,
        };
        let tiles: usize = parts.clone().map(|part| tiles_of(&part)).sum();
        // As long as may be while all multiprocessors have work.
        let segment_tiles = (tiles * blocks / at_once).next_power_of_two().clamp(2, 32);
        let mut plan = Self { segment_tiles, ..Self::default() };
        for part in parts {
            let n = part.rows.len();
            let end = part.position + n;
            if i32::try_from(end).is_err() || i32::try_from(part.rows.end).is_err() {
                return Err(Error::Unsupported {
                    argument: "the number of tokens",
                    expected: "less than 2^31",
                    got: end.max(part.rows.end),
                });
            }
            if n == 0 {
                continue;
            }
            let mut sequence = Sequence {
                token: part.rows.start as i32,
                n: n as i32,
                position: part.position as i32,
                slot: part.slot.map_or(-1, |slot| slot as i32),
                tile: plan.tiles as i32,
                segment: plan.segments as i32,
                ..Sequence::default()
            };
            let known = part.sinks.iter().copied();
            let joins = |row: &usize| mask.is_none_or(|mask| mask[*row]);
            let new = part.rows.clone().filter(joins);
            let new = new.map(|row| (part.position + row - part.rows.start) as i32);
            for (to, position) in sequence.sink.iter_mut().zip(known.chain(new).take(sinks)) {
                *to = position;
                sequence.sinks += 1;
            }
            let tiles = tiles_of(&part);
            plan.tiles += tiles;
            plan.segments += tiles.div_ceil(segment_tiles);
            plan.sequences.push(sequence);
        }
        Ok(plan)
    }
}

impl Plan {
    /// Whether any segment comes behind another one of its sequence.
    pub(crate) fn is_split(&self) -> bool {
        self.segments > self.sequences.len()
    }
}

/// The window in the kernels' units, or what is wrong with it.
pub(crate) fn tiles(window: Window) -> Result<(i32, i32)> {
    let unsupported = |argument, expected, got| Err(Error::Unsupported { argument, expected, got });
    if !window.chunk.is_multiple_of(TILE) {
        return unsupported("window chunk", "a multiple of 64", window.chunk);
    }
    if window.kept > 0 {
        return unsupported("window kept", "0", window.kept);
    }
    if window.tokens() > MAX_WINDOW {
        return unsupported("window tokens", "at most 32768", window.tokens());
    }
    Ok(((window.chunk / TILE) as i32, window.back as i32))
}

/// So that the weights of a decoded token fit a block's shared memory.
const MAX_WINDOW: usize = 32768;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sinks_are_the_first_unmasked_tokens() {
        let mask = [true, false, true, true, false, false, true, true];
        let parts = [
            Part { rows: 0..4, position: 0, slot: None, sinks: &[] },
            Part { rows: 4..4, position: 9, slot: Some(7), sinks: &[3] },
            Part { rows: 4..8, position: 126, slot: Some(2), sinks: &[5] },
        ];
        let plan = Plan::new(parts.iter().map(Part::clone), Some(&mask), 2, 16, 512);
        let plan = plan.expect("it is small");
        assert_eq!(plan.sequences.len(), 2, "a sequence without tokens has no work");
        assert_eq!((plan.tiles, plan.segments, plan.segment_tiles), (3, 2, 2));
        assert!(!plan.is_split());
        let [first, second] = [plan.sequences[0], plan.sequences[1]];
        assert_eq!((first.sinks, &first.sink[..2]), (2, &[0, 2][..]));
        assert_eq!((second.sinks, &second.sink[..2]), (2, &[5, 128][..]));
        assert_eq!((second.token, second.tile, second.segment), (4, 1, 1));
    }

    #[test]
    fn windows_are_whole_tiles() {
        assert!(matches!(tiles(Window::new(128, 1)), Ok((2, 1))));
        assert!(matches!(tiles(Window::new(65, 1)), Err(Error::Unsupported { got: 65, .. })));
    }
}
