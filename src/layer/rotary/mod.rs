//! [`Rotary`] position embedding: pairs of coordinates turned by an angle that grows with the
//! position.
//!
//! ```text
//! (a, b) → (a cos φ − b sin φ, b cos φ + a sin φ),   φ = position · θ_i
//! θ_i = base^(−2i/r),   i = 0..r/2
//! ```
//!
//! r is the number of rotated coordinates. Angles, sines and cosines are computed in `f64`, for any
//! position. With a [hold](Rotary::hold), slow pairs turn no further than its position:
//! φ = min(position, hold) · θ_i where 2π/θ_i > hold.
//! [Su et al. 2021, *RoFormer*, equation 34; the first r coordinates alone: Black et al. 2022,
//! *GPT-NeoX-20B*; hold: this crate]

mod scaling;

use std::f64::consts::TAU;
use std::ops::Range;

use crate::Real;
use crate::check::{check_factor, check_positive, check_room, check_value};
use crate::error::{Error, Result};
pub use scaling::RotaryScaling;

/// Which coordinates are turned together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub enum RotaryPairing {
    /// i and i + r/2: GPT-NeoX, and LLaMA in the Hugging Face layout.
    #[default]
    Halves,
    /// 2i and 2i + 1: GPT-J, and LLaMA in its original layout.
    Interleaved,
}

/// Rotary position embedding of queries and keys. Checked with the
/// [`AttentionConfig`](crate::layer::AttentionConfig) it belongs to: `dims` even, at least 2 and at
/// most d; `base` and every factor finite and positive, and no frequency above 10⁹.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct Rotary {
    /// Base of the frequencies, `rope_theta` in Hugging Face configs. Usual: 10000.
    pub base: f64,
    /// Number r of leading coordinates of each head that are rotated. Default: all d.
    pub dims: Option<usize>,
    /// Which coordinates are turned together. Default: [`RotaryPairing::Halves`].
    pub pairing: RotaryPairing,
    /// Stretching for long contexts. Default: [`RotaryScaling::None`].
    pub scaling: RotaryScaling,
    /// Position from which on slow pairs, those of a wavelength of more tokens than this, turn no
    /// further. Default: none, every pair turns for ever, as softmax attention was trained.
    ///
    /// Within a local window slow pairs hardly turn, so that holding them changes little there. But
    /// no angle arises any more that did not in the first `hold` tokens, however long the sequence:
    /// sinks do not move out of the distances the model was trained for, nor keys and queries out
    /// of what maps were calibrated on.
    pub hold: Option<usize>,
}

impl Default for Rotary {
    /// Base 10000, everything else by default.
    fn default() -> Self {
        Self::new(10_000.0)
    }
}

impl Rotary {
    /// Rotation of all coordinates, in halves, without stretching.
    pub fn new(base: f64) -> Self {
        Self {
            base,
            dims: None,
            pairing: RotaryPairing::Halves,
            scaling: RotaryScaling::None,
            hold: None,
        }
    }

    /// Rotates the first `dims` coordinates of each head only.
    #[must_use]
    pub fn with_dims(self, dims: usize) -> Self {
        Self { dims: Some(dims), ..self }
    }

    /// Which coordinates are turned together.
    #[must_use]
    pub fn with_pairing(self, pairing: RotaryPairing) -> Self {
        Self { pairing, ..self }
    }

    /// Stretching for long contexts.
    #[must_use]
    pub fn with_scaling(self, scaling: RotaryScaling) -> Self {
        Self { scaling, ..self }
    }

    /// The [position](Self::hold) from which on slow pairs turn no further.
    #[must_use]
    pub fn with_hold(self, hold: impl Into<Option<usize>>) -> Self {
        Self { hold: hold.into(), ..self }
    }

    /// (cos φ, sin φ) of every pair at every position, both times the attention factor of the
    /// scaling: what an engine that has tensors of its own turns queries and keys by.
    ///
    /// # Shapes
    /// - returns `[positions, r/2]`, row by row.
    ///
    /// # Errors
    /// [`Error::Value`], [`Error::Length`] and [`Error::TooLarge`] for a rotary embedding that is
    /// impossible for heads of dimension `head_dim`, or for more pairs than there is room for.
    ///
    /// # Examples
    /// ```
    /// use dijiang::layer::Rotary;
    ///
    /// let turns = Rotary::new(100.0).turns(4, 0..3)?;
    /// assert_eq!(turns[..2], [(1.0, 0.0); 2]); // position 0
    /// assert_eq!(turns[4], (2f64.cos(), 2f64.sin())); // position 2, frequency 1
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn turns(&self, head_dim: usize, positions: Range<usize>) -> Result<Vec<(f64, f64)>> {
        self.check(head_dim)?;
        let table = RotaryTable::new(self, head_dim);
        check_room::<(f64, f64)>("positions", &[positions.len(), table.frequencies.len()])?;
        let mut angles = table.angles::<f64>();
        let turns = positions.enumerate().flat_map(|(j, position)| {
            table.turn_to(position, j == 0, &mut angles, 1.0);
            angles.whole.clone()
        });
        Ok(turns.collect())
    }

    pub(crate) fn check(&self, head_dim: usize) -> Result<()> {
        let dims = self.dims.unwrap_or(head_dim);
        if dims == 0 || !dims.is_multiple_of(2) {
            return Err(Error::Value {
                argument: "rotary.dims",
                expected: "even and at least 2",
                got: dims as f64,
            });
        }
        if dims > head_dim {
            return Err(Error::TooLarge { argument: "rotary.dims", limit: head_dim, got: dims });
        }
        check_factor("rotary.base", self.base)?;
        self.hold.map_or(Ok(()), |hold| check_positive("rotary.hold", hold))?;
        self.scaling.check(dims, self.base)?;
        // Beyond it the angle of a token far out is a number of no meaning, or of no end.
        let got = self.scaling.largest(self.base, dims);
        check_value(got <= 1e9, "rotary.frequencies", "at most 10⁹ each", got)
    }

    /// θ_i, stretched.
    fn frequencies(&self, dims: usize) -> Vec<f64> {
        let base = self.base * self.scaling.base_growth(dims);
        let plain = (0..dims / 2).map(|i| base.powf(-2.0 * i as f64 / dims as f64));
        plain
            .enumerate()
            .map(|(i, theta)| self.scaling.stretched(i, theta, dims, self.base))
            .collect()
    }
}

/// Positions that share their coarse angle.
const SPAN: usize = 64;

/// A planned [`Rotary`]. A position p = 64·⌊p/64⌋ + b is turned by the coarse angle and by one of
/// 64 tabled fine ones, so that a run of tokens needs a sine only every 64 of them; the result
/// depends on p alone.
#[derive(Debug, Clone)]
pub(crate) struct RotaryTable {
    head_dim: usize,
    pairing: RotaryPairing,
    /// θ, `[r/2]`.
    frequencies: Vec<f64>,
    /// What every rotated coordinate is multiplied by.
    attention_factor: f64,
    /// (cos bθ, sin bθ), `[64, r/2]`.
    fine: Vec<(f64, f64)>,
    /// Position from which on slow pairs turn no further.
    hold: usize,
    /// (cos, sin) of each slow pair at that position, `[r/2]`.
    held: Vec<Option<(f64, f64)>>,
}

/// Scratch: the angles of one position.
#[derive(Debug, Clone)]
pub(crate) struct Angles<T> {
    /// (cos, sin) of the coarse angle, `[r/2]`.
    coarse: Vec<(f64, f64)>,
    /// (cos, sin) of the whole angle, `[r/2]`.
    whole: Vec<(T, T)>,
}

impl<T> Angles<T> {
    pub(crate) fn dims(&self) -> usize {
        2 * self.whole.len()
    }
}

impl RotaryTable {
    pub(crate) fn dims(&self) -> usize {
        2 * self.frequencies.len()
    }

    /// `rotary` has been checked.
    pub(crate) fn new(rotary: &Rotary, head_dim: usize) -> Self {
        let frequencies = rotary.frequencies(rotary.dims.unwrap_or(head_dim));
        let fine =
            (0..SPAN).flat_map(|b| frequencies.iter().map(move |&theta| turn(b, theta))).collect();
        let hold = rotary.hold.unwrap_or(usize::MAX);
        let held = |&theta: &f64| (TAU / theta > hold as f64).then(|| turn(hold, theta));
        Self {
            head_dim,
            pairing: rotary.pairing,
            attention_factor: rotary.scaling.attention_factor(),
            fine,
            hold,
            held: frequencies.iter().map(held).collect(),
            frequencies,
        }
    }

    pub(crate) fn angles<T: Real>(&self) -> Angles<T> {
        let half = self.frequencies.len();
        Angles { coarse: vec![(1.0, 0.0); half], whole: vec![(T::one(), T::zero()); half] }
    }

    /// Turns every head of every row; row j (`row_len` elements) is the token at `start` + j.
    pub(crate) fn rotate<T: Real>(
        &self,
        rows: &mut [T],
        row_len: usize,
        start: usize,
        angles: &mut Angles<T>,
    ) {
        self.turn_rows(rows, row_len, start, angles, 1.0);
    }

    /// The transpose of [`rotate`](Self::rotate), which turns back everything it turned.
    pub(crate) fn unrotate<T: Real>(&self, rows: &mut [T], row_len: usize, start: usize) {
        self.turn_rows(rows, row_len, start, &mut self.angles(), -1.0);
    }

    /// `direction` is 1 or −1.
    fn turn_rows<T: Real>(
        &self,
        rows: &mut [T],
        row_len: usize,
        start: usize,
        angles: &mut Angles<T>,
        direction: f64,
    ) {
        for (j, row) in rows.chunks_exact_mut(row_len).enumerate() {
            self.turn_to(start + j, j == 0, angles, direction);
            for head in row.chunks_exact_mut(self.head_dim) {
                self.rotate_head(head, &angles.whole);
            }
        }
    }

    /// The angles of `position`: the first one, or that after the one they are of.
    fn turn_to<T: Real>(
        &self,
        position: usize,
        first: bool,
        angles: &mut Angles<T>,
        direction: f64,
    ) {
        if first || position.is_multiple_of(SPAN) {
            for (coarse, &theta) in angles.coarse.iter_mut().zip(&self.frequencies) {
                *coarse = turn(position - position % SPAN, theta);
            }
        }
        let fine = &self.fine[position % SPAN * self.frequencies.len()..];
        for ((whole, &(c, s)), &(cb, sb)) in angles.whole.iter_mut().zip(&angles.coarse).zip(fine) {
            *whole = (T::from_f64(c * cb - s * sb), T::from_f64(direction * (s * cb + c * sb)));
        }
        if position > self.hold {
            for (whole, held) in angles.whole.iter_mut().zip(&self.held) {
                if let Some((c, s)) = *held {
                    *whole = (T::from_f64(c), T::from_f64(direction * s));
                }
            }
        }
        if self.attention_factor != 1.0 {
            let factor = T::from_f64(self.attention_factor);
            for (c, s) in &mut angles.whole {
                (*c, *s) = (*c * factor, *s * factor);
            }
        }
    }

    fn rotate_head<T: Real>(&self, head: &mut [T], angles: &[(T, T)]) {
        let half = self.frequencies.len();
        match self.pairing {
            RotaryPairing::Halves => {
                let (first, second) = head.split_at_mut(half);
                for ((a, b), &(c, s)) in first.iter_mut().zip(second).zip(angles) {
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
            RotaryPairing::Interleaved => {
                for (pair, &(c, s)) in head.chunks_exact_mut(2).zip(angles) {
                    (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[1] * c + pair[0] * s);
                }
            }
        }
    }
}

fn turn(position: usize, theta: f64) -> (f64, f64) {
    let (sin, cos) = (position as f64 * theta).sin_cos();
    (cos, sin)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One row of two heads, turned at `position`.
    fn turned<T: Real>(rotary: &Rotary, head: &[f64], position: usize) -> Vec<f64> {
        let table = RotaryTable::new(rotary, head.len());
        let mut row: Vec<T> = head.iter().chain(head).map(|&x| T::from_f64(x)).collect();
        table.rotate(&mut row, 2 * head.len(), position, &mut table.angles());
        let (first, second) = row.split_at(head.len());
        assert_eq!(first, second, "every head is turned alike");
        first.iter().map(|x| x.to_f64()).collect()
    }

    fn direct(rotary: &Rotary, head: &[f64], position: usize) -> Vec<f64> {
        let (r, mut out) = (rotary.dims.unwrap_or(head.len()), head.to_vec());
        for i in 0..r / 2 {
            let (a, b) = if rotary.pairing == RotaryPairing::Halves {
                (i, i + r / 2)
            } else {
                (2 * i, 2 * i + 1)
            };
            let (sin, cos) =
                (position as f64 * rotary.base.powf(-2.0 * i as f64 / r as f64)).sin_cos();
            (out[a], out[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
        }
        out
    }

    /// An angle of position · θ ≤ 10^7 is known to 10^7 · 2^-52; in `f32` that is lost in the
    /// rounding of the result.
    #[test]
    fn any_position_is_exact() {
        let head: Vec<f64> = (0..64).map(|i| f64::from(i * 29 % 17 - 8) / 8.0).collect();
        for pairing in [RotaryPairing::Halves, RotaryPairing::Interleaved] {
            for rotary in [Rotary::new(1e4), Rotary::new(5e5).with_dims(20), Rotary::new(0.5)] {
                let rotary = rotary.with_pairing(pairing);
                for position in [0, 1, 63, 64, 65, 1000, 1_000_000, 1_000_063, 10_000_000] {
                    let expected = direct(&rotary, &head, position);
                    let worst = |got: Vec<f64>| {
                        got.iter().zip(&expected).map(|(g, e)| (g - e).abs()).fold(0.0, f64::max)
                    };
                    let angle = 4e-16 * (10 + position) as f64 * (1.0 / rotary.base).max(1.0);
                    assert!(
                        worst(turned::<f64>(&rotary, &head, position)) <= angle,
                        "{rotary:?} at {position}"
                    );
                    assert!(
                        worst(turned::<f32>(&rotary, &head, position)) <= angle + 4e-7,
                        "{rotary:?} at {position}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_run_of_rows_is_each_row_alone() {
        let rotary = Rotary::new(100.0).with_dims(6);
        let table = RotaryTable::new(&rotary, 8);
        let head: Vec<f64> = (0..8).map(|i| f64::from(i) - 3.0).collect();
        let mut rows: Vec<f64> = head.repeat(200);
        table.rotate(&mut rows, 8, 1021, &mut table.angles());
        for (j, row) in rows.chunks(8).enumerate() {
            assert_eq!(row, turned::<f64>(&rotary, &head, 1021 + j), "row {j}");
            assert_eq!(row[6..], head[6..], "the rest is not turned");
        }
    }

    /// Beyond the hold slow pairs stay where they were there, fast ones go on; up to it nothing is
    /// another bit.
    #[test]
    fn slow_pairs_are_held() {
        let rotary = Rotary::new(100.0).with_dims(6).with_scaling(RotaryScaling::LongRope {
            factors: vec![1.0, 2.0, 1.0],
            attention_factor: 1.5,
        });
        // Wavelengths of 6, 58 and 135 tokens.
        let held = rotary.clone().with_hold(90);
        let (plain, held) = (rotary.turns(8, 0..300), held.turns(8, 0..300));
        let (plain, held) = (plain.expect("turns"), held.expect("turns"));
        for (position, (plain, held)) in plain.chunks(3).zip(held.chunks(3)).enumerate() {
            assert_eq!(plain[..2], held[..2], "fast pairs at {position}");
            if position <= 90 {
                assert_eq!(plain[2], held[2], "the slow pair at {position}");
            } else {
                assert_ne!(plain[2], held[2], "the slow pair at {position}");
                let difference = |one: f64, other: f64| (one - other).abs();
                let at_hold = 1.5 * (90.0 * 100f64.powf(-2.0 / 3.0)).cos();
                assert!(difference(held[2].0, at_hold) < 1e-14, "the slow pair at {position}");
            }
        }
    }

    /// What others turn by is what this crate turns by, scaling and attention factor included.
    #[test]
    fn turns_are_those_of_the_table() {
        let scaling =
            RotaryScaling::LongRope { factors: vec![1.0, 2.5, 7.0], attention_factor: 1.5 };
        let rotary = Rotary::new(100.0).with_dims(6).with_scaling(scaling);
        let turns = rotary.turns(8, 61..131).expect("a rotary embedding");
        let head: Vec<f64> = (0..8).map(|i| f64::from(i) - 3.0).collect();
        for (position, turns) in (61..131).zip(turns.chunks(3)) {
            let mut expected = head.clone();
            for (i, (c, s)) in turns.iter().enumerate() {
                expected[i] = head[i] * c - head[i + 3] * s;
                expected[i + 3] = head[i + 3] * c + head[i] * s;
            }
            assert_eq!(turned::<f64>(&rotary, &head, position), expected, "position {position}");
        }
        assert_eq!(
            rotary.turns(4, 0..1),
            Err(Error::TooLarge { argument: "rotary.dims", limit: 4, got: 6 })
        );
    }

    /// The rule as Hugging Face writes it, by cases.
    #[test]
    fn llama_3_and_linear_scaling() {
        let (factor, low, high, context) = (8.0, 1.0, 4.0, 8192.0);
        let by_cases = |theta: f64| {
            let wavelength = TAU / theta;
            if wavelength < context / high {
                theta
            } else if wavelength > context / low {
                theta / factor
            } else {
                let smooth = (context / wavelength - low) / (high - low);
                (1.0 - smooth) * theta / factor + smooth * theta
            }
        };
        let scaling = RotaryScaling::Llama3 {
            factor,
            low_freq_factor: low,
            high_freq_factor: high,
            original_context: 8192,
        };
        let (plain, scaled) = (Rotary::new(5e5), Rotary::new(5e5).with_scaling(scaling));
        let (plain, scaled) = (plain.frequencies(128), scaled.frequencies(128));
        assert!(
            plain
                .iter()
                .zip(&scaled)
                .all(|(&theta, &got)| (got / by_cases(theta) - 1.0).abs() < 1e-14)
        );
        let kept = plain.iter().zip(&scaled).filter(|(a, b)| a == b).count();
        let stretched = plain.iter().zip(&scaled).filter(|(a, b)| *a / factor == **b).count();
        assert!(
            kept > 20 && stretched > 20 && kept + stretched < 64,
            "{kept} kept, {stretched} stretched"
        );

        let linear =
            Rotary::new(5e5).with_scaling(RotaryScaling::Linear { factor: 4.0 }).frequencies(128);
        assert!(plain.iter().zip(&linear).all(|(theta, got)| *theta == 4.0 * got));
    }
}
