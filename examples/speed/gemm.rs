//! The yardstick: the general matrix product of the `gemm` engine.

use dijiang::Real;
use gemm_common::Parallelism;
use ndarray::{Array2, ArrayView2};

/// An element type with its engine.
pub(crate) trait Gemm: Real {
    /// C = A·B on the calling thread, square and contiguous.
    fn product(a: ArrayView2<'_, Self>, b: ArrayView2<'_, Self>, c: &mut Array2<Self>);
}

macro_rules! gemm {
    ($t:ty, $engine:path) => {
        impl Gemm for $t {
            #[allow(unsafe_code)]
            fn product(a: ArrayView2<'_, Self>, b: ArrayView2<'_, Self>, c: &mut Array2<Self>) {
                let n = c.nrows();
                assert!(
                    a.dim() == (n, n)
                        && b.dim() == (n, n)
                        && c.dim() == (n, n)
                        && a.is_standard_layout()
                        && b.is_standard_layout()
                );
                let row = n as isize;
                // SAFETY: three contiguous n × n matrices, and C is borrowed exclusively.
                unsafe {
                    $engine()(
                        n,
                        n,
                        n,
                        c.as_mut_ptr(),
                        1,
                        row,
                        false,
                        a.as_ptr(),
                        1,
                        row,
                        b.as_ptr(),
                        1,
                        row,
                        1.0,
                        1.0,
                        false,
                        false,
                        false,
                        Parallelism::None,
                    );
                }
            }
        }
    };
}

gemm!(f32, gemm_f32::gemm::f32::get_gemm_fn);
gemm!(f64, gemm_f64::gemm::f64::get_gemm_fn);
