//! [`Simd`]: one vector register of one element type on one instruction set, and the portable
//! implementation.

use crate::Real;
use crate::simd::LANES;

/// `[value of 0, value of 1, …]` as [`std::array::from_fn`] has it, written out: a closure that the
/// compiler does not inline is compiled without the CPU features, and all its arithmetic becomes
/// calls; an array that a loop fills may stay in memory.
macro_rules! each {
    ([$($index:literal)*], |$i:ident| $value:expr) => {
        [$({
            let $i: usize = $index;
            $value
        }),*]
    };
}
pub(super) use each;

/// Vector arithmetic on one instruction set.
///
/// A value of an implementing type is a token: it is only made where the CPU is known to have the
/// instructions, so having it is the proof that running them is sound. Its methods are inlined into
/// functions compiled for those instructions (see [`x86`](super::x86)).
pub(super) trait Simd: Copy {
    /// Element type.
    type T: Real;
    /// A register of elements.
    type V: Copy;
    /// Elements per register; divides [`LANES`].
    const N: usize;
    /// Registers that the loops may count on: 16 or 32.
    const REGISTERS: usize;

    fn splat(self, x: Self::T) -> Self::V;
    #[inline(always)]
    fn constant(self, x: f64) -> Self::V {
        self.splat(Self::T::from_f64(x))
    }
    /// # Safety
    /// `p` is valid for reading [`N`](Self::N) elements.
    unsafe fn load(self, p: *const Self::T) -> Self::V;
    /// # Safety
    /// `p` is valid for writing [`N`](Self::N) elements.
    unsafe fn store(self, p: *mut Self::T, v: Self::V);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// a·b + c, with one rounding where the CPU has it.
    fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger one, lane by lane; `b` if one of them is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, for magnitudes up to 2^20.
    fn round(self, a: Self::V) -> Self::V;
    /// a·2ⁿ for integral n from −2^20 to the exponent range; zero (or nearly) below it. NaN if both
    /// are.
    fn scale2(self, a: Self::V, n: Self::V) -> Self::V;
    /// Whether every lane is a number of at most this magnitude.
    fn within(self, a: Self::V, limit: Self::V) -> bool;
    /// Sum of all lanes, in one fixed order.
    fn sum(self, a: Self::V) -> Self::T;
    /// Largest lane.
    fn top(self, a: Self::V) -> Self::T;
    /// Asks for the cache line of an address that need not exist.
    #[inline(always)]
    fn prefetch(self, _: *const Self::T) {}

    /// Writes `scale`·rows as columns: `out[i·stride + lane] = scale · rows[lane][i]` for i in
    /// 0..N. Returns the sums of squares of rows[..][i].
    ///
    /// # Safety
    /// Every row is valid for reading N elements; `out` for writing LANES elements at each of N
    /// strides.
    #[inline(always)]
    unsafe fn transpose(
        self,
        rows: &[*const Self::T; LANES],
        scale: Self::V,
        out: *mut Self::T,
        stride: usize,
    ) -> Self::V {
        let mut block = [Self::T::ZERO; LANES * LANES];
        let mut squares = self.splat(Self::T::ZERO);
        for (lane, &row) in rows.iter().enumerate() {
            // SAFETY: the caller's promise; `block` holds LANES rows of N ≤ LANES elements.
            unsafe {
                let x = self.load(row);
                squares = self.mul_add(x, x, squares);
                self.store(block.as_mut_ptr().add(lane * Self::N), self.mul(x, scale));
            }
        }
        for i in 0..Self::N {
            for lane in 0..LANES {
                // SAFETY: the caller's promise.
                unsafe { *out.add(i * stride + lane) = block[lane * Self::N + i] }
            }
        }
        squares
    }
}

/// Plain loops over short arrays: compiled for whatever the target always has (SSE2, NEON, …).
#[derive(Clone, Copy)]
pub(super) struct Portable<T>(pub(super) std::marker::PhantomData<T>);

macro_rules! portable {
    ($t:ty, $n:literal $lanes:tt, $bits:ty, $mantissa:literal, $bias:literal) => {
        impl Simd for Portable<$t> {
            type T = $t;
            type V = [$t; $n];
            const N: usize = $n;
            const REGISTERS: usize = 16;

            #[inline(always)]
            fn splat(self, x: $t) -> Self::V {
                [x; $n]
            }
            #[inline(always)]
            unsafe fn load(self, p: *const $t) -> Self::V {
                // SAFETY: the caller's promise; an array of elements may lie at any element's
                // address.
                unsafe { *p.cast::<[$t; $n]>() }
            }
            #[inline(always)]
            unsafe fn store(self, p: *mut $t, v: Self::V) {
                // SAFETY: the caller's promise.
                unsafe { *p.cast::<[$t; $n]>() = v }
            }
            #[inline(always)]
            fn add(self, a: Self::V, b: Self::V) -> Self::V {
                each!($lanes, |i| a[i] + b[i])
            }
            #[inline(always)]
            fn sub(self, a: Self::V, b: Self::V) -> Self::V {
                each!($lanes, |i| a[i] - b[i])
            }
            #[inline(always)]
            fn mul(self, a: Self::V, b: Self::V) -> Self::V {
                each!($lanes, |i| a[i] * b[i])
            }
            #[inline(always)]
            fn mul_add(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
                // Without the instruction `mul_add` is a library call, fifty times slower than two
                // roundings.
                if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
                    each!($lanes, |i| a[i].mul_add(b[i], c[i]))
                } else {
                    each!($lanes, |i| a[i] * b[i] + c[i])
                }
            }
            #[inline(always)]
            fn max(self, a: Self::V, b: Self::V) -> Self::V {
                each!($lanes, |i| if a[i] > b[i] { a[i] } else { b[i] })
            }
            #[inline(always)]
            fn round(self, a: Self::V) -> Self::V {
                // Adding 1.5·2^mantissa leaves no bits for a fraction; `round` itself does not
                // vectorise.
                const MAGIC: $t = ((3 as $bits) << ($mantissa - 1)) as $t;
                each!($lanes, |i| (a[i] + MAGIC) - MAGIC)
            }
            #[inline(always)]
            fn scale2(self, a: Self::V, n: Self::V) -> Self::V {
                // 2ⁿ by its exponent bits, read from the low bits of 1.5·2^mantissa + n + bias;
                // below the normal range 0.
                const MAGIC: $t = ((3 as $bits) << ($mantissa - 1)) as $t;
                each!($lanes, |i| {
                    let exponent = if n[i] < (1 - $bias) as $t { -$bias as $t } else { n[i] };
                    a[i] * <$t>::from_bits(
                        (exponent + (MAGIC + $bias as $t)).to_bits() << $mantissa,
                    )
                })
            }
            #[inline(always)]
            fn within(self, a: Self::V, limit: Self::V) -> bool {
                a.iter().zip(&limit).fold(true, |all, (x, l)| all & (x.abs() <= *l))
            }
            #[inline(always)]
            fn sum(self, a: Self::V) -> $t {
                a.iter().sum()
            }
            #[inline(always)]
            fn top(self, a: Self::V) -> $t {
                a.iter().fold(<$t>::NEG_INFINITY, |m, &x| if x > m { x } else { m })
            }
        }
    };
}

portable!(f32, 4 [0 1 2 3], u32, 23, 127);
portable!(f64, 2 [0 1], u64, 52, 1023);
