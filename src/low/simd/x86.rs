//! The loops of [`body`](super::body) compiled for AVX2 with FMA and for AVX-512.

use std::arch::x86_64::*;

use super::lane::{Simd, each};
use crate::simd::LANES;

/// AVX-512, 16 × f32.
#[derive(Clone, Copy)]
pub(super) struct Avx512F32(pub(super) ());

/// AVX-512, 8 × f64.
#[derive(Clone, Copy)]
pub(super) struct Avx512F64(pub(super) ());

/// AVX2 and FMA, 8 × f32.
#[derive(Clone, Copy)]
pub(super) struct Avx2F32(pub(super) ());

/// AVX2 and FMA, 4 × f64.
#[derive(Clone, Copy)]
pub(super) struct Avx2F64(pub(super) ());

macro_rules! arithmetic {
    (
        $t:ty, $v:ty, $n:literal, $registers:literal, $splat:ident, $load:ident, $store:ident,
        $add:ident, $sub:ident, $mul:ident, $fma:ident, $max:ident
    ) => {
        type T = $t;
        type V = $v;
        const N: usize = $n;
        const REGISTERS: usize = $registers;

        #[inline(always)]
        fn splat(self, x: $t) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $splat(x) }
        }
        #[inline(always)]
        unsafe fn load(self, p: *const $t) -> $v {
            // SAFETY: the token proves the instruction set, the caller the pointer.
            unsafe { $load(p) }
        }
        #[inline(always)]
        unsafe fn store(self, p: *mut $t, v: $v) {
            // SAFETY: the token proves the instruction set, the caller the pointer.
            unsafe { $store(p, v) }
        }
        #[inline(always)]
        fn add(self, a: $v, b: $v) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $add(a, b) }
        }
        #[inline(always)]
        fn sub(self, a: $v, b: $v) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $sub(a, b) }
        }
        #[inline(always)]
        fn mul(self, a: $v, b: $v) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $mul(a, b) }
        }
        #[inline(always)]
        fn mul_add(self, a: $v, b: $v, c: $v) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $fma(a, b, c) }
        }
        #[inline(always)]
        fn max(self, a: $v, b: $v) -> $v {
            // SAFETY: the token proves the instruction set.
            unsafe { $max(a, b) }
        }
        #[inline(always)]
        fn prefetch(self, p: *const $t) {
            // SAFETY: a hint; no address is accessed.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(p.cast()) }
        }
    };
}

/// Nearest, ties to even, no exceptions.
const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

impl Simd for Avx512F32 {
    arithmetic!(
        f32,
        __m512,
        16,
        32,
        _mm512_set1_ps,
        _mm512_loadu_ps,
        _mm512_storeu_ps,
        _mm512_add_ps,
        _mm512_sub_ps,
        _mm512_mul_ps,
        _mm512_fmadd_ps,
        _mm512_max_ps
    );

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_roundscale_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m512, n: __m512) -> __m512 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            // Lanes whose result would be no normal number are left out: they cost a hundred times
            // the others.
            let normal = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(n, _mm512_set1_ps(-126.0));
            _mm512_maskz_scalef_ps(normal, a, n)
        }
    }
    #[inline(always)]
    fn within(self, a: __m512, limit: __m512) -> bool {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_cmp_ps_mask::<_CMP_LE_OQ>(_mm512_abs_ps(a), limit) == 0xffff }
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_reduce_add_ps(a) }
    }
    #[inline(always)]
    fn top(self, a: __m512) -> f32 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_reduce_max_ps(a) }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        rows: &[*const f32; LANES],
        scale: __m512,
        out: *mut f32,
        stride: usize,
    ) -> __m512 {
        // SAFETY: the token proves the instruction set, the caller the pointers.
        unsafe {
            // Pairs of rows, then fours: b[4i + c] holds in its 128-bit lane l column 4l + c of
            // rows 4i..4i + 4.
            let mut a = [_mm512_setzero_ps(); LANES];
            let mut b = [_mm512_setzero_pd(); LANES];
            let mut squares = [_mm512_setzero_ps(); 2];
            for i in 0..8 {
                let (even, odd) = (_mm512_loadu_ps(rows[2 * i]), _mm512_loadu_ps(rows[2 * i + 1]));
                squares = [
                    _mm512_fmadd_ps(even, even, squares[0]),
                    _mm512_fmadd_ps(odd, odd, squares[1]),
                ];
                let (even, odd) = (_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale));
                a[2 * i] = _mm512_unpacklo_ps(even, odd);
                a[2 * i + 1] = _mm512_unpackhi_ps(even, odd);
            }
            for i in 0..4 {
                for half in 0..2 {
                    let (low, high) =
                        (_mm512_castps_pd(a[4 * i + half]), _mm512_castps_pd(a[4 * i + 2 + half]));
                    b[4 * i + 2 * half] = _mm512_unpacklo_pd(low, high);
                    b[4 * i + 2 * half + 1] = _mm512_unpackhi_pd(low, high);
                }
            }
            // Gather lane l of the four groups of rows.
            for c in 0..4 {
                let (top, upper) = (_mm512_castpd_ps(b[c]), _mm512_castpd_ps(b[4 + c]));
                let (lower, bottom) = (_mm512_castpd_ps(b[8 + c]), _mm512_castpd_ps(b[12 + c]));
                let even = (
                    _mm512_shuffle_f32x4::<0x88>(top, upper),
                    _mm512_shuffle_f32x4::<0x88>(lower, bottom),
                );
                let odd = (
                    _mm512_shuffle_f32x4::<0xdd>(top, upper),
                    _mm512_shuffle_f32x4::<0xdd>(lower, bottom),
                );
                _mm512_storeu_ps(out.add(c * stride), _mm512_shuffle_f32x4::<0x88>(even.0, even.1));
                _mm512_storeu_ps(
                    out.add((4 + c) * stride),
                    _mm512_shuffle_f32x4::<0x88>(odd.0, odd.1),
                );
                _mm512_storeu_ps(
                    out.add((8 + c) * stride),
                    _mm512_shuffle_f32x4::<0xdd>(even.0, even.1),
                );
                _mm512_storeu_ps(
                    out.add((12 + c) * stride),
                    _mm512_shuffle_f32x4::<0xdd>(odd.0, odd.1),
                );
            }
            _mm512_add_ps(squares[0], squares[1])
        }
    }
}

impl Simd for Avx512F64 {
    arithmetic!(
        f64,
        __m512d,
        8,
        32,
        _mm512_set1_pd,
        _mm512_loadu_pd,
        _mm512_storeu_pd,
        _mm512_add_pd,
        _mm512_sub_pd,
        _mm512_mul_pd,
        _mm512_fmadd_pd,
        _mm512_max_pd
    );

    #[inline(always)]
    fn round(self, a: __m512d) -> __m512d {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_roundscale_pd::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m512d, n: __m512d) -> __m512d {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let normal = _mm512_cmp_pd_mask::<_CMP_NLT_UQ>(n, _mm512_set1_pd(-1022.0));
            _mm512_maskz_scalef_pd(normal, a, n)
        }
    }
    #[inline(always)]
    fn within(self, a: __m512d, limit: __m512d) -> bool {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_cmp_pd_mask::<_CMP_LE_OQ>(_mm512_abs_pd(a), limit) == 0xff }
    }
    #[inline(always)]
    fn sum(self, a: __m512d) -> f64 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_reduce_add_pd(a) }
    }
    #[inline(always)]
    fn top(self, a: __m512d) -> f64 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm512_reduce_max_pd(a) }
    }
}

impl Simd for Avx2F32 {
    arithmetic!(
        f32,
        __m256,
        8,
        16,
        _mm256_set1_ps,
        _mm256_loadu_ps,
        _mm256_storeu_ps,
        _mm256_add_ps,
        _mm256_sub_ps,
        _mm256_mul_ps,
        _mm256_fmadd_ps,
        _mm256_max_ps
    );

    #[inline(always)]
    fn round(self, a: __m256) -> __m256 {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm256_round_ps::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m256, n: __m256) -> __m256 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            // 2ⁿ by its exponent bits; n below the normal range becomes the exponent of zero.
            let n = _mm256_max_ps(n, _mm256_set1_ps(-127.0));
            let bits = _mm256_slli_epi32::<23>(_mm256_add_epi32(
                _mm256_cvtps_epi32(n),
                _mm256_set1_epi32(127),
            ));
            _mm256_mul_ps(a, _mm256_castsi256_ps(bits))
        }
    }
    #[inline(always)]
    fn within(self, a: __m256, limit: __m256) -> bool {
        // SAFETY: the token proves the instruction set.
        unsafe {
            _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_LE_OQ>(
                _mm256_andnot_ps(_mm256_set1_ps(-0.0), a),
                limit,
            )) == 0xff
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)))
        }
    }
    #[inline(always)]
    fn top(self, a: __m256) -> f32 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let half = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
            _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        rows: &[*const f32; LANES],
        scale: __m256,
        out: *mut f32,
        stride: usize,
    ) -> __m256 {
        let mut squares = [self.splat(0.0); 2];
        // SAFETY: the token proves the instruction set, the caller the pointers.
        unsafe {
            for (half, column) in [(0, 0), (0, 4), (8, 0), (8, 4)] {
                // Four columns of rows i and i + 4 of eight, in two lanes.
                let x = each!([0 1 2 3], |i| {
                    let (low, high) = (rows[half + i].add(column), rows[half + i + 4].add(column));
                    _mm256_insertf128_ps::<1>(
                        _mm256_castps128_ps256(_mm_loadu_ps(low)),
                        _mm_loadu_ps(high),
                    )
                });
                squares =
                    [self.mul_add(x[0], x[0], squares[0]), self.mul_add(x[1], x[1], squares[1])];
                squares =
                    [self.mul_add(x[2], x[2], squares[0]), self.mul_add(x[3], x[3], squares[1])];
                let x = each!([0 1 2 3], |i| self.mul(x[i], scale));
                let low = each!([0 1], |i| {
                    _mm256_castps_pd(_mm256_unpacklo_ps(x[2 * i], x[2 * i + 1]))
                });
                let high = each!([0 1], |i| {
                    _mm256_castps_pd(_mm256_unpackhi_ps(x[2 * i], x[2 * i + 1]))
                });
                let columns = [
                    _mm256_unpacklo_pd(low[0], low[1]),
                    _mm256_unpackhi_pd(low[0], low[1]),
                    _mm256_unpacklo_pd(high[0], high[1]),
                    _mm256_unpackhi_pd(high[0], high[1]),
                ];
                for i in 0..4 {
                    let at = out.add(half + (column + i) * stride);
                    self.store(at, _mm256_castpd_ps(columns[i]));
                }
            }
        }
        self.add(squares[0], squares[1])
    }
}

impl Simd for Avx2F64 {
    arithmetic!(
        f64,
        __m256d,
        4,
        16,
        _mm256_set1_pd,
        _mm256_loadu_pd,
        _mm256_storeu_pd,
        _mm256_add_pd,
        _mm256_sub_pd,
        _mm256_mul_pd,
        _mm256_fmadd_pd,
        _mm256_max_pd
    );

    #[inline(always)]
    fn round(self, a: __m256d) -> __m256d {
        // SAFETY: the token proves the instruction set.
        unsafe { _mm256_round_pd::<NEAREST>(a) }
    }
    #[inline(always)]
    fn scale2(self, a: __m256d, n: __m256d) -> __m256d {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let n = _mm256_max_pd(n, _mm256_set1_pd(-1023.0));
            let bits = _mm256_slli_epi64::<52>(_mm256_cvtepi32_epi64(_mm_add_epi32(
                _mm256_cvtpd_epi32(n),
                _mm_set1_epi32(1023),
            )));
            _mm256_mul_pd(a, _mm256_castsi256_pd(bits))
        }
    }
    #[inline(always)]
    fn within(self, a: __m256d, limit: __m256d) -> bool {
        // SAFETY: the token proves the instruction set.
        unsafe {
            _mm256_movemask_pd(_mm256_cmp_pd::<_CMP_LE_OQ>(
                _mm256_andnot_pd(_mm256_set1_pd(-0.0), a),
                limit,
            )) == 0xf
        }
    }
    #[inline(always)]
    fn sum(self, a: __m256d) -> f64 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let half = _mm_add_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_add_sd(half, _mm_unpackhi_pd(half, half)))
        }
    }
    #[inline(always)]
    fn top(self, a: __m256d) -> f64 {
        // SAFETY: the token proves the instruction set.
        unsafe {
            let half = _mm_max_pd(_mm256_castpd256_pd128(a), _mm256_extractf128_pd::<1>(a));
            _mm_cvtsd_f64(_mm_max_sd(half, _mm_unpackhi_pd(half, half)))
        }
    }

    #[inline(always)]
    unsafe fn transpose(
        self,
        rows: &[*const f64; LANES],
        scale: __m256d,
        out: *mut f64,
        stride: usize,
    ) -> __m256d {
        let mut squares = [self.splat(0.0); 2];
        // SAFETY: the token proves the instruction set, the caller the pointers.
        unsafe {
            for group in (0..LANES).step_by(4) {
                let x = each!([0 1 2 3], |i| self.load(rows[group + i]));
                squares =
                    [self.mul_add(x[0], x[0], squares[0]), self.mul_add(x[1], x[1], squares[1])];
                squares =
                    [self.mul_add(x[2], x[2], squares[0]), self.mul_add(x[3], x[3], squares[1])];
                let x = each!([0 1 2 3], |i| self.mul(x[i], scale));
                let low = each!([0 1], |i| _mm256_unpacklo_pd(x[2 * i], x[2 * i + 1]));
                let high = each!([0 1], |i| _mm256_unpackhi_pd(x[2 * i], x[2 * i + 1]));
                let at = out.add(group);
                self.store(at, _mm256_permute2f128_pd::<0x20>(low[0], low[1]));
                self.store(at.add(stride), _mm256_permute2f128_pd::<0x20>(high[0], high[1]));
                self.store(at.add(2 * stride), _mm256_permute2f128_pd::<0x31>(low[0], low[1]));
                self.store(at.add(3 * stride), _mm256_permute2f128_pd::<0x31>(high[0], high[1]));
            }
        }
        self.add(squares[0], squares[1])
    }
}
