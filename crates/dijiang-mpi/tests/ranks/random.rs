//! Random numbers, the same on all ranks, and sequences made of them.

use dijiang::Real;
use dijiang::attention::{KeyMask, LinearAttention, LinearConfig, Qkv, Window};
use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap};
use ndarray::{Array3, ArrayView3, s};

/// SplitMix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub(crate) fn pick<X: Copy>(&mut self, of: &[X]) -> X {
        of[self.below(of.len())]
    }

    /// From −1 to 1.
    pub(crate) fn number<T: Real>(&mut self) -> T {
        T::from_f64(self.next() as f64 / u64::MAX as f64 * 2.0 - 1.0)
    }

    pub(crate) fn array<T: Real>(&mut self, shape: [usize; 3], scale: f64) -> Array3<T> {
        Array3::from_shape_simple_fn(shape, || self.number::<T>() * T::from_f64(scale))
    }

    /// Lengths of pieces: often none or one token, sometimes hundreds.
    pub(crate) fn lengths(&mut self, ranks: usize) -> Vec<usize> {
        (0..ranks)
            .map(|_| {
                let most = self.pick(&[1, 2, 20, 150, 400]);
                self.below(most + 1)
            })
            .collect()
    }

    /// Any options: windows of several lengths, that keep keys if they may, sinks, decay, grouped
    /// queries.
    pub(crate) fn attention<T: Real>(&mut self, keeps: bool) -> LinearAttention<T, DctMap<T>> {
        let (kv_heads, group, d) = (self.pick(&[1, 3]), self.pick(&[1, 2]), self.pick(&[4, 8]));
        let mut config = LinearConfig::new().with_heads(kv_heads * group).with_value_dim(6);
        if self.below(3) > 0 {
            let kept = if keeps { self.pick(&[0, 5, 40]) } else { 0 };
            let window =
                |_| Window::new(self.pick(&[4, 7, 16, 64]), self.pick(&[1, 1, 2])).with_kept(kept);
            config = config.with_windows((0..kv_heads).map(window).collect());
            config = config.with_sinks(self.pick(&[0, 1, 4]));
        }
        if self.below(2) == 0 {
            let decay = (0..kv_heads).map(|_| -0.05 * self.below(3) as f64).collect();
            config = config.with_log_decay(decay);
        }
        let maps = (0..kv_heads).map(|_| DctMapConfig::new().with_seed(self.next()).build(d));
        let maps = maps.collect::<Result<Vec<_>, _>>().expect("a map of these options");
        config.build(maps).expect("attention of these options")
    }
}

/// One sequence, known to all ranks as a whole.
pub(crate) struct Sequence<T> {
    pub(crate) q: Array3<T>,
    pub(crate) k: Array3<T>,
    pub(crate) v: Array3<T>,
    pub(crate) valid: Vec<bool>,
}

impl<T: Real> Sequence<T> {
    pub(crate) fn new(
        random: &mut Random,
        attention: &LinearAttention<T, DctMap<T>>,
        n: usize,
    ) -> Self {
        let d = attention.maps()[0].dim();
        let (h, kv, e) = (attention.heads(), attention.maps().len(), attention.value_dim());
        let masked = random.pick(&[usize::MAX, 5, 2]);
        Self {
            q: random.array([h, n, d], 3.0),
            k: random.array([kv, n, d], 3.0),
            v: random.array([kv, n, e], 1.0),
            valid: (0..n).map(|_| random.below(masked) > 0).collect(),
        }
    }

    /// Some of the tokens.
    pub(crate) fn piece(&self, tokens: std::ops::Range<usize>) -> Piece<'_, T> {
        let of = |array| ArrayView3::slice_move(array, s![.., tokens.clone(), ..]);
        let [q, k, v] = [self.q.view(), self.k.view(), self.v.view()].map(of);
        Piece { q, k, v, valid: &self.valid[tokens] }
    }
}

/// Some tokens of a [`Sequence`].
pub(crate) struct Piece<'a, T> {
    q: ArrayView3<'a, T>,
    k: ArrayView3<'a, T>,
    v: ArrayView3<'a, T>,
    valid: &'a [bool],
}

impl<T: Real> Piece<'_, T> {
    pub(crate) fn qkv(&self) -> Qkv<'_, T> {
        Qkv::new(&self.q, &self.k, &self.v).with_mask(KeyMask::Valid(self.valid))
    }
}
