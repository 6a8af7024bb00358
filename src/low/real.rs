//! [`Real`]: the two element types, `f32` and `f64`, as a sealed trait.

use std::fmt::{Debug, Display};
use std::ops::{AddAssign, DivAssign, MulAssign, Neg, SubAssign};
use std::sync::LazyLock;

use ndarray::{LinalgScalar, ScalarOperand};

/// Element type of every array in this crate: `f32` or `f64`.
///
/// The trait is sealed. Tables are computed in `f64` and cast once, sums run in the type itself.
pub trait Real:
    sealed::Sealed
    + LinalgScalar
    + ScalarOperand
    + Neg<Output = Self>
    + AddAssign
    + SubAssign
    + MulAssign
    + DivAssign
    + PartialOrd
    + Default
    + Debug
    + Display
    + Send
    + Sync
{
    /// 0
    const ZERO: Self;
    /// 1
    const ONE: Self;
    /// Distance from one to the next larger number.
    const EPSILON: Self;
    /// Minus infinity, the log of a weight of zero.
    const NEG_INFINITY: Self;
    /// Largest magnitude accepted for an element of q, k, v or a hidden state: 1e15 for `f32`,
    /// 1e100 for `f64`.
    ///
    /// Below it no intermediate of this crate can overflow; a trained model stays far below.
    const LIMIT: f64;
    /// `"f32"` or `"f64"`.
    const NAME: &'static str;

    /// The instructions that the inner loops of this type run on here: `"avx512"`, `"avx2"` or
    /// `"portable"`.
    fn instruction_set() -> &'static str {
        Self::ops().name
    }

    /// Rounds to the nearest representable number.
    fn from_f64(value: f64) -> Self;
    /// Exact for both types.
    fn to_f64(self) -> f64;
    /// |self|.
    fn abs(self) -> Self;
    /// The standard library's exponential.
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
    /// Square root.
    fn sqrt(self) -> Self;
    /// The larger of the two; the other one if one of them is NaN.
    fn max(self, other: Self) -> Self;
}

// Types in a sealed trait must be `pub`, though no path leads to them.
#[allow(unreachable_pub)]
pub(crate) mod sealed {
    use std::collections::HashMap;
    use std::sync::{Arc, Mutex, Weak};

    use rustdct::algorithm::type2and3_butterflies::{
        Type2And3Butterfly2, Type2And3Butterfly4, Type2And3Butterfly8, Type2And3Butterfly16,
    };
    use rustdct::algorithm::{Type2And3ConvertToFft, Type2And3SplitRadix};
    use rustdct::rustfft::FftPlannerScalar;
    use rustdct::{DctNum, TransformType2And3};

    use crate::low::aligned::Aligned;

    /// Tables by the length they belong to, for as long as somebody uses them.
    pub type Shared<T> = Mutex<HashMap<usize, Weak<Aligned<T>>>>;

    /// Runs an unnormalised transform of one row in place, with scratch.
    pub type RowTransform<T> = Arc<dyn Fn(&mut [T], &mut [T]) + Send + Sync>;

    /// DCT-II and DCT-III of rows of one length.
    #[derive(Clone)]
    pub struct RowDct<T> {
        /// X_f = Σ_i x_i cos(π(2i+1)f / 2d), in place.
        pub dct2: RowTransform<T>,
        /// x_i = X_0/2 + Σ_{f≥1} X_f cos(π(2i+1)f / 2d), in place.
        pub dct3: RowTransform<T>,
        /// Scratch elements either needs.
        pub scratch_len: usize,
    }

    /// As rustdct's own planner, which would have rustfft's loops for every CPU compiled into this
    /// crate: two thirds of its code, for lengths that are no power of two and beyond 128.
    fn transform<T: DctNum>(len: usize) -> Arc<dyn TransformType2And3<T>> {
        match len {
            2 => Arc::new(Type2And3Butterfly2::new()),
            4 => Arc::new(Type2And3Butterfly4::new()),
            8 => Arc::new(Type2And3Butterfly8::new()),
            16 => Arc::new(Type2And3Butterfly16::new()),
            _ if len.is_power_of_two() && len > 2 => {
                Arc::new(Type2And3SplitRadix::new(transform(len / 2), transform(len / 4)))
            }
            _ => {
                Arc::new(Type2And3ConvertToFft::new(FftPlannerScalar::new().plan_fft_forward(len)))
            }
        }
    }

    pub(super) fn plan<T: DctNum>(len: usize) -> RowDct<T> {
        let plan = transform(len);
        let scratch_len = plan.get_scratch_len();
        let second = Arc::clone(&plan);
        RowDct {
            dct2: Arc::new(move |row, scratch| plan.process_dct2_with_scratch(row, scratch)),
            dct3: Arc::new(move |row, scratch| second.process_dct3_with_scratch(row, scratch)),
            scratch_len,
        }
    }

    /// The private half: what the crate needs of an element type and no caller should see.
    pub trait Sealed: Sized {
        /// Plans DCTs of rows of `len` ≥ 1 elements.
        fn plan_dct(len: usize) -> RowDct<Self>;
        /// Halves of the DCT matrices that maps of one dimension share: together they stay in the
        /// fastest cache.
        fn dct_halves() -> &'static Shared<Self>;
        /// The fastest loops this CPU can run, chosen once.
        fn ops() -> &'static crate::simd::Ops<Self>;
        /// The general matrix product of this type.
        fn gemm() -> crate::simd::Gemm<Self>;
    }
}

macro_rules! real {
    ($t:ident, $limit:literal, $select:path, $engine:path) => {
        impl Real for $t {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            const EPSILON: Self = $t::EPSILON;
            const NEG_INFINITY: Self = $t::NEG_INFINITY;
            const LIMIT: f64 = $limit;
            const NAME: &'static str = stringify!($t);

            fn from_f64(value: f64) -> Self {
                value as $t
            }
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            fn abs(self) -> Self {
                self.abs()
            }
            fn exp(self) -> Self {
                self.exp()
            }
            fn ln(self) -> Self {
                self.ln()
            }
            fn sqrt(self) -> Self {
                self.sqrt()
            }
            fn max(self, other: Self) -> Self {
                self.max(other)
            }
        }

        impl sealed::Sealed for $t {
            fn plan_dct(len: usize) -> sealed::RowDct<Self> {
                sealed::plan(len)
            }
            fn dct_halves() -> &'static sealed::Shared<Self> {
                static HALVES: LazyLock<sealed::Shared<$t>> = LazyLock::new(Default::default);
                &HALVES
            }
            fn ops() -> &'static crate::simd::Ops<Self> {
                $select()
            }
            fn gemm() -> crate::simd::Gemm<Self> {
                $engine()
            }
        }
    };
}

real!(f32, 1e15, crate::simd::ops_f32, gemm_f32::gemm::f32::get_gemm_fn);
real!(f64, 1e100, crate::simd::ops_f64, gemm_f64::gemm::f64::get_gemm_fn);
