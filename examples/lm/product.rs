//! One safe function around the matrix engine that `dijiang` itself uses.

use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use rayon::prelude::*;

/// Elements of a matrix that one thread takes where a vector meets it. Smaller matrices come out
/// of a cache and are not worth sharing.
const SHARE: usize = 1 << 18;

/// y = x·Wᵀ, the product of a linear layer. The outputs of one row are shared among threads;
/// several rows run on the calling thread.
///
/// # Shapes
/// - `x`: `[n, in]`, `weight`: `[out, in]`, `y`: `[n, out]`; any strides.
pub(crate) fn linear(
    x: ArrayView2<'_, f32>,
    weight: ArrayView2<'_, f32>,
    mut y: ArrayViewMut2<'_, f32>,
) {
    let columns = SHARE / x.ncols().max(1);
    if x.nrows() == 1 && columns > 0 && weight.nrows() > 2 * columns {
        let weights = weight.axis_chunks_iter(Axis(0), columns);
        let shares: Vec<_> = weights.zip(y.axis_chunks_iter_mut(Axis(1), columns)).collect();
        shares.into_par_iter().for_each(|(weight, y)| product(x, weight, y));
    } else {
        product(x, weight, y);
    }
}

/// y = x·Wᵀ on the calling thread.
#[allow(unsafe_code, reason = "the engine takes pointers")]
fn product(x: ArrayView2<'_, f32>, weight: ArrayView2<'_, f32>, mut y: ArrayViewMut2<'_, f32>) {
    let ((n, inner), (out, inner_of_weight)) = (x.dim(), weight.dim());
    assert!(
        inner == inner_of_weight && y.dim() == (n, out),
        "linear: [{n}, {inner}] by [{out}, {inner_of_weight}]ᵀ into {:?}",
        y.dim()
    );
    if n == 0 || out == 0 || inner == 0 {
        y.fill(0.0);
        return;
    }
    let strides = |strides: &[isize]| (strides[0], strides[1]);
    let (of_x, of_w, of_y) =
        (strides(x.strides()), strides(weight.strides()), strides(y.strides()));
    // SAFETY: `y` is [n, out] and exclusively ours, `x` is [n, inner] and `weight` [out, inner],
    // each under its own strides, so every element the engine touches lies inside its array.
    unsafe {
        gemm_f32::gemm::f32::get_gemm_fn()(
            n,
            out,
            inner,
            y.as_mut_ptr(),
            of_y.1,
            of_y.0,
            false,
            x.as_ptr(),
            of_x.1,
            of_x.0,
            weight.as_ptr(),
            of_w.0,
            of_w.1,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm_common::Parallelism::None,
        );
    }
}
