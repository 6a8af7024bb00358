//! [`Fingerprint`]: what all ranks of a call must have in common, in a few words.

use dijiang::Real;
use dijiang::attention::LinearAttention;
use dijiang::kernel::FeatureMap;
use ndarray::Array2;

/// Options as a hash; maps as what they make of one fixed token, since processors of different
/// kinds round differently; weights as a hash.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct Fingerprint {
    call: u64,
    options: u64,
    maps: f64,
    /// By how much `maps` may differ.
    tolerance: f64,
    weights: u64,
}

/// Words of a fingerprint.
const WORDS: usize = 5;
/// Bits that processors may disagree on, as a multiple of the type's epsilon.
const ROUNDING: f64 = 128.0;

impl Fingerprint {
    /// Of a call by this name, and all options, that of the communication included.
    pub(crate) fn new<T: Real, M: FeatureMap<T>>(
        call: &str,
        scan: impl std::fmt::Debug,
        attention: &LinearAttention<T, M>,
    ) -> dijiang::Result<Self> {
        let sizes: Vec<_> =
            attention.maps().iter().map(|map| (map.dim(), map.features())).collect();
        let options = format!("{:?} {sizes:?} {} {scan:?}", attention.config(), T::NAME);
        Ok(Self {
            call: hash(call.bytes()),
            options: hash(options.bytes()),
            maps: probe(attention.maps())?,
            tolerance: ROUNDING * T::EPSILON.to_f64(),
            weights: 0,
        })
    }

    /// Weights that must be the same too, to the bit.
    pub(crate) fn with_weights<T: Real>(self, weights: impl Iterator<Item = T>) -> Self {
        let bytes = weights.flat_map(|weight| weight.to_f64().to_le_bytes());
        Self { weights: hash(bytes), ..self }
    }

    pub(crate) fn words(self) -> [u64; WORDS] {
        let Self { call, options, maps, tolerance, weights } = self;
        [call, options, maps.to_bits(), tolerance.to_bits(), weights]
    }

    /// What [`words`](Self::words) made.
    pub(crate) fn of_words(words: &[u64]) -> Self {
        Self {
            call: words[0],
            options: words[1],
            maps: f64::from_bits(words[2]),
            tolerance: f64::from_bits(words[3]),
            weights: words[4],
        }
    }

    /// The first rank that differs from rank 0, and in what.
    pub(crate) fn first_different(ranks: &[Self]) -> Option<(usize, &'static str)> {
        let first = ranks.first()?;
        ranks.iter().enumerate().find_map(|(rank, other)| {
            let near = (other.maps - first.maps).abs() <= first.tolerance;
            let checks = [
                ("calls", other.call == first.call),
                ("options", other.options == first.options),
                ("maps", near),
                ("weights", other.weights == first.weights),
            ];
            checks.iter().find(|(_, same)| !same).map(|&(what, _)| (rank, what))
        })
    }
}

/// A weighted mean of all log-features of one token, from −1 to 1: it changes with every feature of
/// every map.
fn probe<T: Real, M: FeatureMap<T>>(maps: &[M]) -> dijiang::Result<f64> {
    let (mut sum, mut size) = (0.0, f64::MIN_POSITIVE);
    for (h, map) in maps.iter().enumerate() {
        let token = |(_, i): (usize, usize)| T::from_f64(((7 * i + 3) % 11) as f64 / 11.0 - 0.4);
        let token = Array2::from_shape_fn((1, map.dim()), token);
        let features = [map.query_log_features(&token)?, map.key_log_features(&token)?];
        for (f, x) in features.iter().flatten().enumerate() {
            // Weights without a pattern, so that exchanged heads or features are noticed.
            sum += ((1 + h) as f64 * 1.7 + f as f64 * 0.9).sin() * x.to_f64();
            size += x.to_f64().abs();
        }
    }
    Ok(sum / size)
}

/// FNV-1a.
fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}
