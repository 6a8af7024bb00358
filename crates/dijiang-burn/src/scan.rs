//! The running sums before every chunk, without a loop over the chunks.

use burn::tensor::{Tensor, TensorData};

/// An exponent that stands for −∞: what is added to hide something. Its exponential is 0 next to
/// any exponent that is at least [`FLOOR`], and it has no NaN in its neighbourhood.
pub(crate) const HIDDEN: f64 = -1e30;

/// The exponent of sums over nothing.
pub(crate) const FLOOR: f64 = -1e20;

/// Chunks that are summed by one matrix product.
const RADIX: usize = 16;

/// Sums over keys in the frame of their exponent: Σ exp(b − top)·(v, 1).
#[derive(Debug, Clone)]
pub(crate) struct Sums {
    /// `[B, N, m, e + 1]`.
    pub(crate) values: Tensor<4>,
    /// The frame, `[B, N, m]`; it has no gradient, as it cancels.
    pub(crate) top: Tensor<3>,
}

/// The sums before each of N chunks and after the last one, `[B, N + 1, …]`, from those of each
/// chunk alone, `[B, N, …]` with N ≥ 1, and those before all, `[B, 1, …]`. `decay` is what an
/// exponent loses over a chunk, `[B, 1, 1]`.
///
/// Blocks of [`RADIX`] chunks: within each, one matrix of exponents per feature says how much of
/// each chunk is left before each other; what came before a block is this same function of the
/// sums of whole blocks. Time and memory O(N).
pub(crate) fn running(chunks: Sums, before: Sums, decay: &Tensor<3>) -> Sums {
    let [batch, n, m, width] = chunks.values.dims();
    let (device, dtype) = (chunks.values.device(), chunks.values.dtype());
    let blocks = n / RADIX + 1;
    let fill = blocks * RADIX - n;
    let values = Tensor::cat(
        vec![chunks.values, Tensor::zeros([batch, fill, m, width], (&device, dtype))],
        1,
    );
    let top =
        Tensor::cat(vec![chunks.top, Tensor::full([batch, fill, m], HIDDEN, (&device, dtype))], 1);

    // In block b, before its chunk i: what its chunk j < i holds has lost (i − 1 − j)·decay.
    let in_blocks = |x: Tensor<3>| {
        x.reshape([batch, blocks, RADIX, m]).swap_dims(2, 3).reshape([batch, blocks * m, 1, RADIX])
    };
    let rows = RADIX + 1;
    let pairs = |of: &dyn Fn(usize, usize) -> f64| {
        let values: Vec<f64> = (0..rows)
            .flat_map(|i| (0..RADIX).map(move |j| (i, j)))
            .map(|(i, j)| of(i, j))
            .collect();
        Tensor::<4>::from_data(TensorData::new(values, [1, 1, rows, RADIX]), (&device, dtype))
    };
    let steps = pairs(&|i, j| if j < i { (i - 1 - j) as f64 } else { 0.0 });
    let later = pairs(&|i, j| if j < i { 0.0 } else { HIDDEN });
    let exponents = in_blocks(top) + steps * decay.clone().reshape([batch, 1, 1, 1]) + later;
    let local = exponents.clone().detach().max_dim(3).clamp_min(FLOOR);
    let values = values.reshape([batch * blocks, RADIX, m, width]).swap_dims(1, 2).reshape([
        batch,
        blocks * m,
        RADIX,
        width,
    ]);
    // [B, blocks·m, rows, width]
    let within = (exponents - local.clone()).exp().matmul(values);

    let earlier = if blocks == 1 {
        before
    } else {
        let (values, top) = (within.clone().narrow(2, RADIX, 1), local.clone().narrow(2, RADIX, 1));
        let whole = Sums {
            values: values.reshape([batch, blocks, m, width]).narrow(1, 0, blocks - 1),
            top: top.reshape([batch, blocks, m]).narrow(1, 0, blocks - 1),
        };
        running(whole, before, &(decay.clone() * RADIX as f64))
    };

    let (within, local) = (within.narrow(2, 0, RADIX), local.narrow(2, 0, RADIX));
    let steps: Vec<f64> = (0..RADIX).map(|i| i as f64).collect();
    let steps = Tensor::<4>::from_data(TensorData::new(steps, [1, 1, RADIX, 1]), (&device, dtype));
    let carried = earlier.top.reshape([batch, blocks * m, 1, 1])
        + steps * decay.clone().reshape([batch, 1, 1, 1]);
    let top = local.clone().max_pair(carried.clone().detach());
    let values = within * (local - top.clone()).exp()
        + earlier.values.reshape([batch, blocks * m, 1, width]) * (carried - top.clone()).exp();
    let by_chunk = |x: Tensor<4>, width: usize| {
        x.reshape([batch * blocks, m, RADIX, width])
            .swap_dims(1, 2)
            .reshape([batch, blocks * RADIX, m, width])
            .narrow(1, 0, n + 1)
    };
    Sums { values: by_chunk(values, width), top: by_chunk(top, 1).reshape([batch, n + 1, m]) }
}
