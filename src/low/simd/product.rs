//! General matrix product on strided views, by the `gemm` engine.

use gemm_common::Parallelism;
use ndarray::{ArrayView2, ArrayViewMut2};

use crate::Real;

/// The engine's entry point: m, n, k, then (pointer, column stride, row stride) of C, whether to
/// read C, the same of A and B, the factors of C and of A·B, three conjugation flags, threads.
#[allow(unreachable_pub)]
pub type Gemm<T> = unsafe fn(
    usize,
    usize,
    usize,
    *mut T,
    isize,
    isize,
    bool,
    *const T,
    isize,
    isize,
    *const T,
    isize,
    isize,
    T,
    T,
    bool,
    bool,
    bool,
    Parallelism,
);

/// C = A·B, or C += A·B with `accumulate`, on one thread.
///
/// # Shapes
/// - `a`: `[m, k]`, `b`: `[k, n]`, `c`: `[m, n]`; any strides.
pub(crate) fn product<T: Real>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    mut c: ArrayViewMut2<'_, T>,
    accumulate: bool,
) {
    let ((m, k), (kb, n)) = (a.dim(), b.dim());
    assert!(k == kb && c.dim() == (m, n), "product: [{m}, {k}] by [{kb}, {n}] into {:?}", c.dim());
    if m == 0 || n == 0 {
        return;
    }
    if k == 0 {
        if !accumulate {
            c.fill(T::zero());
        }
        return;
    }
    let (cs, as_, bs) = (
        <[isize; 2]>::try_from(c.strides()),
        <[isize; 2]>::try_from(a.strides()),
        <[isize; 2]>::try_from(b.strides()),
    );
    let (Ok([c_row, c_col]), Ok([a_row, a_col]), Ok([b_row, b_col])) = (cs, as_, bs) else {
        unreachable!("two axes")
    };
    // SAFETY: shapes agree, every (row, column) lies inside its view, and C is borrowed
    // exclusively.
    unsafe {
        T::gemm()(
            m,
            n,
            k,
            c.as_mut_ptr(),
            c_col,
            c_row,
            accumulate,
            a.as_ptr(),
            a_col,
            a_row,
            b.as_ptr(),
            b_col,
            b_row,
            T::one(),
            T::one(),
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Array2, s};

    use super::*;

    fn naive(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Array2<f64> {
        Array2::from_shape_fn((a.nrows(), b.ncols()), |(i, j)| {
            (0..a.ncols()).map(|k| a[[i, k]] * b[[k, j]]).sum()
        })
    }

    #[test]
    fn strided_operands_and_accumulation() {
        for (m, k, n) in [(1, 1, 1), (1, 7, 5), (13, 3, 1), (17, 31, 29), (64, 64, 64), (3, 0, 2)] {
            let a = Array2::from_shape_fn((m, k), |(i, j)| ((i * 7 + j * 3) % 11) as f64 - 5.0);
            let bt =
                Array2::from_shape_fn((2 * n, k), |(i, j)| ((i * 5 + j * 2) % 13) as f64 - 6.0);
            let b = bt.slice(s![..;2, ..]).reversed_axes();
            let mut c = Array2::from_elem((m, n), f64::NAN);
            product(a.view(), b, c.view_mut(), false);
            assert_eq!(c, naive(a.view(), b));
            product(a.view(), b, c.view_mut(), true);
            assert_eq!(c, naive(a.view(), b) * 2.0);
        }
    }
}
