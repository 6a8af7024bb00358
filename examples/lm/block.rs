//! What a model holds beside its attention layers: norms, SwiGLU blocks and the output projection.

use dijiang::checkpoint::Tensors;
use ndarray::{Array1, Array2, ArrayRef2, ArrayView2, Axis, Zip};
use rayon::prelude::*;

use super::config::LlamaConfig;
use super::error::Result;
use super::exp::exp;
use super::product::linear;

/// Rows that go through a block or the output projection at once. Fixed, so that the bits of a row
/// do not depend on the number of threads.
pub(crate) const ROWS: usize = 128;

/// What a block holds beside its attention layer.
pub(crate) struct Block {
    attention_norm: Norm,
    mlp_norm: Norm,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// x / √(mean(x²) + ε) · weight, for every row.
pub(crate) struct Norm {
    weight: Array1<f32>,
    epsilon: f32,
}

struct Linear {
    weight: Array2<f32>,
    bias: Option<Array1<f32>>,
}

impl Block {
    /// Reads the block with index `l`; `place` stands before the names of all tensors.
    pub(crate) fn load(
        files: &Tensors,
        config: &LlamaConfig,
        place: &str,
        l: usize,
    ) -> Result<Self> {
        let (hidden, inner) = (config.hidden, config.intermediate);
        let norm = |which: &str| {
            Norm::load(files, &format!("{place}layers.{l}.{which}_layernorm.weight"), config)
        };
        let linear = |which: &str, rows: usize, columns: usize| -> Result<Linear> {
            let name = |what: &str| format!("{place}layers.{l}.mlp.{which}_proj.{what}");
            Ok(Linear {
                weight: files.matrix(&name("weight"), rows, columns)?,
                bias: config.mlp_bias.then(|| files.vector(&name("bias"), rows)).transpose()?,
            })
        };
        Ok(Self {
            attention_norm: norm("input")?,
            mlp_norm: norm("post_attention")?,
            gate: linear("gate", inner, hidden)?,
            up: linear("up", inner, hidden)?,
            down: linear("down", hidden, inner)?,
        })
    }

    /// What the attention layer is given when `x` enters the block.
    pub(crate) fn attention_input(&self, x: &ArrayRef2<f32>) -> Array2<f32> {
        self.attention_norm.forward(x)
    }

    /// The rest of the block, for the hidden states `x` that attention's output has been added to.
    pub(crate) fn mlp(&self, x: &mut Array2<f32>) {
        let parts: Vec<_> = x.axis_chunks_iter_mut(Axis(0), ROWS).collect();
        parts.into_par_iter().for_each(|mut x| {
            let h = self.mlp_norm.forward(&x);
            let mut inner = self.gate.forward(h.view());
            Zip::from(&mut inner)
                .and(&self.up.forward(h.view()))
                .for_each(|gate, &up| *gate *= up / (1.0 + exp(-*gate)));
            x += &self.down.forward(inner.view());
        });
    }
}

impl Norm {
    pub(crate) fn load(files: &Tensors, name: &str, config: &LlamaConfig) -> Result<Self> {
        Ok(Self { weight: files.vector(name, config.hidden)?, epsilon: config.norm_epsilon })
    }

    pub(crate) fn forward(&self, x: &ArrayRef2<f32>) -> Array2<f32> {
        let mut y = x.to_owned();
        for mut row in y.rows_mut() {
            let mean = row.dot(&row) / row.len() as f32;
            let scale = 1.0 / (mean + self.epsilon).sqrt();
            Zip::from(&mut row).and(&self.weight).for_each(|y, &w| *y *= scale * w);
        }
        y
    }
}

impl Linear {
    fn forward(&self, x: ArrayView2<'_, f32>) -> Array2<f32> {
        let mut y = Array2::zeros((x.nrows(), self.weight.nrows()));
        linear(x, self.weight.view(), y.view_mut());
        match &self.bias {
            Some(bias) => y + bias,
            None => y,
        }
    }
}
