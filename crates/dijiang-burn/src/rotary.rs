//! Rotary embedding by operations of tensors.

use burn::tensor::{Tensor, TensorData};
use dijiang::layer::{Rotary, RotaryPairing};

use crate::error::Result;

/// Turns every head of every row of `x` `[b, n, h, d]`, row j of each sequence being the token at
/// `start` + j.
pub(crate) fn rotate(x: Tensor<4>, rotary: &Rotary, start: usize) -> Result<Tensor<4>> {
    let [batch, tokens, heads, dim] = x.dims();
    let turns = rotary.turns(dim, start..start + tokens)?;
    let pairs = turns.len() / tokens.max(1);
    let (device, dtype) = (x.device(), x.dtype());
    let table = |values: Vec<f64>| {
        Tensor::<2>::from_data(TensorData::new(values, [tokens, pairs]), (&device, dtype))
    };
    let (cos, sin) = turns.into_iter().unzip();
    let (cos, sin) = (table(cos), table(sin));
    let rest = (2 * pairs < dim).then(|| x.clone().narrow(3, 2 * pairs, dim - 2 * pairs));
    let turned = match rotary.pairing {
        RotaryPairing::Halves => {
            let shape = [1, tokens, 1, pairs];
            let (cos, sin) = (cos.reshape(shape), sin.reshape(shape));
            let (a, b) = (x.clone().narrow(3, 0, pairs), x.narrow(3, pairs, pairs));
            let first = a.clone() * cos.clone() - b.clone() * sin.clone();
            Tensor::cat(vec![first, b * cos + a * sin], 3)
        }
        RotaryPairing::Interleaved => {
            let (cos, sin) =
                (cos.reshape([1, tokens, 1, pairs, 1]), sin.reshape([1, tokens, 1, pairs, 1]));
            let x = x.narrow(3, 0, 2 * pairs).reshape([batch, tokens, heads, pairs, 2]);
            let (a, b) = (x.clone().narrow(4, 0, 1), x.narrow(4, 1, 1));
            let first = a.clone() * cos.clone() - b.clone() * sin.clone();
            Tensor::cat(vec![first, b * cos + a * sin], 4).reshape([
                batch,
                tokens,
                heads,
                2 * pairs,
            ])
        }
    };
    Ok(match rest {
        Some(rest) => Tensor::cat(vec![turned, rest], 3),
        None => turned,
    })
}
