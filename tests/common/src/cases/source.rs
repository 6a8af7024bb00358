//! [`Source`]: where a case's numbers come from.

/// Numbers from a fuzzer's bytes as long as they last, and from SplitMix64 after that [Steele, Lea,
/// Flood 2014].
#[derive(Debug, Clone)]
pub struct Source<'a> {
    bytes: &'a [u8],
    state: u64,
}

impl<'a> Source<'a> {
    /// The numbers of a seed.
    pub fn seeded(seed: u64) -> Self {
        Self { bytes: &[], state: seed.wrapping_mul(0x2545_f491_4f6c_dd1d) }
    }

    /// The numbers of a fuzzer's input.
    pub fn of_bytes(bytes: &'a [u8]) -> Self {
        let state = bytes
            .iter()
            .fold(0, |hash: u64, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        Self { bytes, state }
    }

    pub fn bits(&mut self) -> u64 {
        if let Some((first, rest)) = self.bytes.split_first_chunk() {
            self.bytes = rest;
            return u64::from_le_bytes(*first);
        }
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// An integer in 0..limit.
    pub fn below(&mut self, limit: usize) -> usize {
        ((u128::from(self.bits()) * limit as u128) >> 64) as usize
    }

    /// An integer in 1..=limit.
    pub fn upto(&mut self, limit: usize) -> usize {
        1 + self.below(limit)
    }

    pub fn choose<T: Clone>(&mut self, options: &[T]) -> T {
        options[self.below(options.len())].clone()
    }

    /// True with this probability.
    pub fn chance(&mut self, probability: f64) -> bool {
        ((self.bits() >> 11) as f64) < probability * (1_u64 << 53) as f64
    }

    /// A number of mean 0 and variance 1, nearly normal, that `f32` holds exactly: the sum of four
    /// uniform ones.
    pub fn normal(&mut self) -> f64 {
        let bits = self.bits();
        let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
        f64::from(((sum as f64 / 65_536.0 - 2.0) * 3_f64.sqrt()) as f32)
    }

    pub fn normals(&mut self, count: usize, scale: f64) -> Vec<f64> {
        (0..count).map(|_| f64::from((scale * self.normal()) as f32)).collect()
    }

    /// A size that nobody should ask for.
    pub fn size(&mut self) -> usize {
        let huge = 1 << self.below(usize::BITS as usize);
        self.choose(&[
            0,
            1,
            2,
            3,
            1 << 20,
            1 << 31,
            1 << 40,
            usize::MAX / 2 + 1,
            usize::MAX,
            huge,
            huge - 1,
        ])
    }

    /// A number that nobody should send.
    pub fn number(&mut self) -> f64 {
        let normal = self.normal();
        let numbers = [
            f64::NAN,
            f64::INFINITY,
            f64::NEG_INFINITY,
            1e30,
            -1e30,
            1e-42,
            -1e-310,
            0.0,
            -0.0,
            1e15,
            -1e15,
            1e100,
            1e300,
            -1e300,
        ];
        if self.chance(0.7) { self.choose(&numbers) } else { normal }
    }
}
