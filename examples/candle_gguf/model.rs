//! A LLaMA whose weights stay quantised, and whose attention is a type parameter.

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::quantized::gguf_file::Value;
use candle_core::{Device, Tensor};
use candle_nn::ops::{rms_norm, swiglu};
use dijiang::checkpoint::Gguf;
use dijiang::layer::Rotary;

use crate::Result;
use crate::attention::{Attend, Heads, Linear, LinearState, rotate};
use crate::lm::tokens::Token;
use crate::product::Product;

/// Tokens that a stream reads at once: its memory does not depend on the length of a prompt.
pub(crate) const PART: usize = 512;
/// Rows whose logits are held at once.
const LOGITS: usize = 64;

/// All but what stands between the projections of attention.
pub(crate) struct Body {
    pub(crate) heads: Heads,
    epsilon: f32,
    /// `[vocabulary, D]`.
    embedding: Arc<QTensor>,
    blocks: Vec<Block>,
    norm: Tensor,
    head: Product,
}

struct Block {
    attention_norm: Tensor,
    qkv: Product,
    output: Product,
    mlp_norm: Tensor,
    gate_up: Product,
    down: Product,
}

/// A fault of a file, in one line.
pub(crate) fn fault(
    path: &Path,
    what: &str,
    expected: &str,
    found: impl std::fmt::Display,
) -> crate::Error {
    format!("{}: {what} must be {expected}, found {found}", path.display()).into()
}

impl Body {
    /// Reads all weights but keeps them quantised.
    pub(crate) fn load(path: &Path, gguf: &Gguf) -> Result<Self> {
        let heads = Heads::of(gguf.attention_config());
        let hidden = gguf.attention_config().model_dim;
        let content = gguf.content();
        let shape = |name: &str| content.tensor_infos.get(name).map(|info| info.shape.dims());
        let rows = |name: &str| match shape(name) {
            Some(&[rows, columns]) if (1..=1 << 31).contains(&rows) && columns == hidden => {
                Ok(rows)
            }
            Some(found) => Err(fault(
                path,
                name,
                "a matrix with rows of the embedding's length",
                format!("{found:?}"),
            )),
            None => Err(fault(path, name, "a tensor", "nothing")),
        };
        let experts = content.metadata.get("llama.expert_count");
        if experts.is_some_and(|count| count.to_u64().ok() != Some(0)) {
            let expected = "absent or 0: experts are not computed here";
            return Err(fault(path, "llama.expert_count", expected, format!("{experts:?}")));
        }
        const EPSILON: &str = "llama.attention.layer_norm_rms_epsilon";
        let epsilon = match content.metadata.get(EPSILON) {
            Some(Value::F32(epsilon)) if epsilon.is_finite() && *epsilon >= 0.0 => *epsilon,
            other => {
                return Err(fault(path, EPSILON, "a number of at least 0", format!("{other:?}")));
            }
        };
        if let Some(bias) = content.tensor_infos.keys().find(|name| name.ends_with(".bias")) {
            return Err(fault(path, bias, "absent: biases are not computed here", "a tensor"));
        }
        let (vocabulary, inner) = (rows("token_embd.weight")?, rows("blk.0.ffn_gate.weight")?);
        let (wide, narrow) = (heads.heads * heads.dim, heads.kv_heads * heads.dim);
        let vector = |name: &str| -> Result<Tensor> {
            Ok(gguf.tensor(name, &[hidden])?.dequantize(&Device::Cpu)?)
        };
        let product = |matrices: &[(String, [usize; 2])]| -> Result<Product> {
            let matrices =
                matrices.iter().map(|(name, shape)| gguf.tensor(name, shape).map(Arc::new));
            Ok(Product::new(matrices.collect::<dijiang::Result<_>>()?)?)
        };
        let block = |l: usize| -> Result<Block> {
            let weight = |which: &str| format!("blk.{l}.{which}.weight");
            Ok(Block {
                attention_norm: vector(&weight("attn_norm"))?,
                qkv: product(&[
                    (weight("attn_q"), [wide, hidden]),
                    (weight("attn_k"), [narrow, hidden]),
                    (weight("attn_v"), [narrow, hidden]),
                ])?,
                output: product(&[(weight("attn_output"), [hidden, wide])])?,
                mlp_norm: vector(&weight("ffn_norm"))?,
                gate_up: product(&[
                    (weight("ffn_gate"), [inner, hidden]),
                    (weight("ffn_up"), [inner, hidden]),
                ])?,
                down: product(&[(weight("ffn_down"), [hidden, inner])])?,
            })
        };
        let embedding = Arc::new(gguf.tensor("token_embd.weight", &[vocabulary, hidden])?);
        let head = match shape("output.weight") {
            None => Product::new(vec![Arc::clone(&embedding)])?,
            Some(_) => product(&[("output.weight".to_owned(), [vocabulary, hidden])])?,
        };
        Ok(Self {
            heads,
            epsilon,
            embedding,
            blocks: (0..gguf.layers()).map(block).collect::<Result<_>>()?,
            norm: vector("output_norm.weight")?,
            head,
        })
    }

    pub(crate) fn layers(&self) -> usize {
        self.blocks.len()
    }

    /// Hidden states `[n, D]` that enter the first block.
    pub(crate) fn embed(&self, tokens: &[Token]) -> Result<Tensor> {
        Ok(self.embedding.embedding(&Tensor::new(tokens, &Device::Cpu)?)?)
    }

    /// What the attention layer of block `l` is given when `x` enters that block.
    pub(crate) fn attention_input(&self, l: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        rms_norm(x, &self.blocks[l].attention_norm, self.epsilon)
    }

    /// The rest of block `l`, for hidden states `x` that attention's output has been added to.
    pub(crate) fn mlp(&self, l: usize, x: &Tensor) -> candle_core::Result<Tensor> {
        let block = &self.blocks[l];
        let h = rms_norm(x, &block.mlp_norm, self.epsilon)?;
        x + block.down.forward(&swiglu(&block.gate_up.forward(&h)?)?)?
    }

    /// Logits of each row of hidden states `[n, D]` behind the last block.
    fn logits(&self, x: &Tensor) -> Result<Vec<Vec<f32>>> {
        let logits = self.head.forward(&rms_norm(x, &self.norm, self.epsilon)?)?;
        let logits = logits.to_vec2::<f32>()?;
        // Quantised bytes have no checksum: this is how damaged ones show.
        match logits.iter().flatten().all(|logit| logit.is_finite()) {
            true => Ok(logits),
            false => Err("logits are not finite: the file's weights are damaged".into()),
        }
    }
}

/// A model: its body, and attention for each block.
pub(crate) struct Model<'a, A> {
    pub(crate) body: &'a Body,
    pub(crate) rotary: Rotary,
    pub(crate) attention: Vec<A>,
}

/// One sequence being read or written.
pub(crate) struct Stream<'a, A: Attend> {
    model: &'a Model<'a, A>,
    pub(crate) states: Vec<A::State>,
    position: usize,
}

impl<A: Attend> Model<'_, A> {
    /// A stream that has seen no token yet.
    pub(crate) fn stream(&self) -> Stream<'_, A> {
        let states = self.attention.iter().map(A::new_state).collect();
        Stream { model: self, states, position: 0 }
    }
}

impl Model<'_, Linear> {
    /// A stream that goes on from these states at `position`.
    pub(crate) fn resume(&self, states: Vec<LinearState>, position: usize) -> Stream<'_, Linear> {
        Stream { model: self, states, position }
    }
}

impl<A: Attend> Stream<'_, A> {
    /// Reads at least one token; returns the logits `[vocabulary]` after the last.
    pub(crate) fn read(&mut self, tokens: &[Token]) -> Result<Vec<f32>> {
        let mut last = None;
        for part in tokens.chunks(PART) {
            last = Some(self.hidden(part)?);
        }
        let Some(last) = last else { return Err("there must be a token to read".into()) };
        let last = last.narrow(0, last.dim(0)? - 1, 1)?;
        Ok(self.model.body.logits(&last)?.swap_remove(0))
    }

    /// Reads tokens; returns −ln of the likelihood of each of `targets`, which follow them.
    pub(crate) fn surprises(&mut self, tokens: &[Token], targets: &[Token]) -> Result<Vec<f64>> {
        let mut surprises = Vec::with_capacity(targets.len());
        for (part, targets) in tokens.chunks(PART).zip(targets.chunks(PART)) {
            let x = self.hidden(part)?;
            for (i, targets) in targets.chunks(LOGITS).enumerate() {
                let logits = self.model.body.logits(&x.narrow(0, i * LOGITS, targets.len())?)?;
                for (row, &target) in logits.iter().zip(targets) {
                    surprises.push(surprise(row, target));
                }
            }
        }
        Ok(surprises)
    }

    /// Hidden states `[n, D]` behind the last block.
    fn hidden(&mut self, tokens: &[Token]) -> Result<Tensor> {
        let Model { body, rotary, attention } = self.model;
        let Heads { heads, kv_heads, dim } = body.heads;
        let turns = rotary.turns(dim, self.position..self.position + tokens.len())?;
        let table = |part: fn(&(f64, f64)) -> f64| {
            let values = turns.iter().map(|turn| part(turn) as f32).collect();
            Tensor::from_vec(values, (tokens.len(), dim / 2), &Device::Cpu)
        };
        let (cos, sin) = (table(|turn| turn.0)?, table(|turn| turn.1)?);
        let rotated = (heads + kv_heads) * dim;
        let mut x = body.embed(tokens)?;
        for (l, (attention, state)) in attention.iter().zip(&mut self.states).enumerate() {
            let block = &body.blocks[l];
            let qkv = block.qkv.forward(&body.attention_input(l, &x)?)?;
            let qk = rotate(&qkv.narrow(1, 0, rotated)?, &cos, &sin)?;
            let out = attention.attend(&qk, &qkv.narrow(1, rotated, kv_heads * dim)?, state)?;
            x = body.mlp(l, &(x + block.output.forward(&out)?)?)?;
        }
        self.position += tokens.len();
        Ok(x)
    }

    /// Tokens seen.
    pub(crate) fn position(&self) -> usize {
        self.position
    }

    /// Bytes of all layers' states.
    pub(crate) fn bytes(&self) -> usize {
        self.states.iter().map(A::bytes).sum()
    }
}

/// −ln softmax(logits)[target].
fn surprise(logits: &[f32], target: Token) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    sum.ln() + f64::from(max) - f64::from(logits[target as usize])
}
