//! The exponential function, as plain operations that a compiler turns into vector instructions.

/// exp(x) to about one unit in the last place; for x below −87 it is exp(−87), above 88 exp(88).
/// NaN stays NaN.
///
/// ```text
/// exp(x) = 2ⁿ·exp(r),  n = round(x / ln 2),  |r| ≤ ln(2)/2,  exp(r) by its series up to r⁷
/// ```
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    /// Added to a number it rounds it to an integer, which then stands in the lowest bits.
    const ROUND: f32 = 1.5 * (1 << 23) as f32;
    /// ln 2 in two parts; the first has so few bits that n times it is exact.
    const LN_2: [f32; 2] = [355.0 / 512.0, -2.121_944_4e-4];
    /// 1/k! for k from 7 down to 0.
    const SERIES: [f32; 8] =
        [1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let x = x.clamp(-87.0, 88.0);
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let series = SERIES.iter().fold(0.0, |sum, factor| sum * r + factor);
    let power = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_shl(23);
    series * f32::from_bits(power.wrapping_add(1.0_f32.to_bits()))
}
