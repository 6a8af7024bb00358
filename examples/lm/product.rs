//! One safe function around the matrix engine that `dijiang` itself uses.

use ndarray::{Array2, ArrayView2};

/// x·Wᵀ, the product of a linear layer, on the calling thread.
///
/// # Shapes
/// - `x`: `[n, in]`, `weight`: `[out, in]`, returns `[n, out]`; any strides.
#[allow(unsafe_code)]
pub(crate) fn linear(x: ArrayView2<'_, f32>, weight: ArrayView2<'_, f32>) -> Array2<f32> {
    let ((n, inner), (out, inner_of_weight)) = (x.dim(), weight.dim());
    assert_eq!(inner, inner_of_weight, "linear: [{n}, {inner}] by [{out}, {inner_of_weight}]ᵀ");
    let mut y = Array2::zeros((n, out));
    if n == 0 || out == 0 || inner == 0 {
        return y;
    }
    let (x_strides, w_strides) = (x.strides(), weight.strides());
    // SAFETY: `y` is [n, out] without gaps and exclusively ours, `x` is [n, inner] and `weight`
    // [out, inner] under their own strides, so every element the engine touches lies inside its
    // array.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            out,
            inner,
            y.as_mut_ptr(),
            1,
            out as isize,
            false,
            x.as_ptr(),
            x_strides[1],
            x_strides[0],
            weight.as_ptr(),
            w_strides[0],
            w_strides[1],
            1.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
    y
}
