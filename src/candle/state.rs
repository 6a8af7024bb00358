//! [`CandleState`]: what a batch of sequences leaves behind for its next tokens.

use std::fmt::Debug;
use std::sync::Arc;

use candle_core::{DType, Device, Result, Tensor, TensorId};
use ndarray::Axis;

use super::tensors::{Element, HeadLayout, Reading, check_dtype, mask_rows};
use crate::attention::{CausalState, KeyMask, LinearAttention, Operator, Qkv, Workspace};
use crate::check::{check_elements, check_room};
use crate::error::Error;
use crate::kernel::DctMap;

/// What a batch of sequences leaves behind in one layer, in place of a key-value cache: constant
/// size at any length.
///
/// A clone is a snapshot to return to.
#[derive(Debug, Clone)]
pub struct CandleState {
    sequences: Typed,
    /// The radii of the maps it was made for.
    maps: Vec<TensorId>,
}

#[derive(Debug, Clone)]
pub(super) enum Typed {
    F32(Sequences<f32>),
    F64(Sequences<f64>),
}

/// The sequences, with the operator they are states of.
#[derive(Debug, Clone)]
pub(super) struct Sequences<T> {
    attention: Arc<LinearAttention<T, DctMap<T>>>,
    states: Vec<CausalState<T>>,
    /// For single tokens.
    workspace: Workspace<T>,
}

/// A type with a variant of [`CandleState`].
pub(super) trait Stateful: Element {
    fn typed(sequences: Sequences<Self>) -> Typed;
}

impl Stateful for f32 {
    fn typed(sequences: Sequences<Self>) -> Typed {
        Typed::F32(sequences)
    }
}

impl Stateful for f64 {
    fn typed(sequences: Sequences<Self>) -> Typed {
        Typed::F64(sequences)
    }
}

impl CandleState {
    pub(super) fn new<T: Stateful>(
        attention: LinearAttention<T, DctMap<T>>,
        maps: Vec<TensorId>,
        batch: usize,
    ) -> crate::Result<Self> {
        if batch == 0 {
            return Err(Error::Empty { argument: "batch" });
        }
        let state = attention.new_state();
        check_room::<u8>("states", &[batch, state.bytes().max(size_of::<CausalState<T>>())])?;
        let (states, workspace) = (vec![state; batch], attention.step_workspace());
        let sequences = T::typed(Sequences { attention: Arc::new(attention), states, workspace });
        Ok(Self { sequences, maps })
    }

    /// Tokens each sequence has seen.
    pub fn position(&self) -> usize {
        match &self.sequences {
            Typed::F32(sequences) => sequences.states.first().map_or(0, CausalState::position),
            Typed::F64(sequences) => sequences.states.first().map_or(0, CausalState::position),
        }
    }

    /// Sequences.
    pub fn batch(&self) -> usize {
        match &self.sequences {
            Typed::F32(sequences) => sequences.states.len(),
            Typed::F64(sequences) => sequences.states.len(),
        }
    }

    /// Bytes of all sequences' states; they do not grow.
    pub fn bytes(&self) -> usize {
        match &self.sequences {
            Typed::F32(sequences) => sequences.states.iter().map(CausalState::bytes).sum(),
            Typed::F64(sequences) => sequences.states.iter().map(CausalState::bytes).sum(),
        }
    }

    /// Back to the empty state, without allocating.
    pub fn reset(&mut self) {
        match &mut self.sequences {
            Typed::F32(sequences) => sequences.states.iter_mut().for_each(CausalState::reset),
            Typed::F64(sequences) => sequences.states.iter_mut().for_each(CausalState::reset),
        }
    }

    /// The next tokens are those of as many sequences, at this position, of a layer with these
    /// maps.
    pub(super) fn check(
        &self,
        maps: &[TensorId],
        batch: usize,
        position: usize,
    ) -> crate::Result<()> {
        if maps != self.maps {
            return Err(Error::Conflict { argument: "state", other: "the maps of another layer" });
        }
        if batch != self.batch() {
            return Err(Error::Foreign {
                argument: "state",
                what: "batch",
                expected: batch,
                got: self.batch(),
            });
        }
        if position != self.position() {
            return Err(Error::Value {
                argument: "index_pos",
                expected: "the position of the state",
                got: position as f64,
            });
        }
        Ok(())
    }

    /// The next tokens of every sequence: `[b, n, h, d]`, `[b, n, h_kv, d]` twice, and a mask `[b,
    /// n]`; returns `[b, n, h, d]`.
    pub(super) fn extend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        key_mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        let expected = match self.sequences {
            Typed::F32(_) => DType::F32,
            Typed::F64(_) => DType::F64,
        };
        check_dtype("x", q, expected, "of the type of the state")?;
        let &[batch, tokens, ..] = q.dims() else {
            return Err(Error::Empty { argument: "x" }.into());
        };
        let valid = match key_mask {
            Some(mask) => Some(mask_rows(mask, batch, tokens)?),
            None => None,
        };
        match &mut self.sequences {
            Typed::F32(sequences) => sequences.extend(q, k, v, valid.as_deref()),
            Typed::F64(sequences) => sequences.extend(q, k, v, valid.as_deref()),
        }
    }
}

impl<T: Element> Sequences<T> {
    fn extend(
        &mut self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        valid: Option<&[Vec<bool>]>,
    ) -> Result<Tensor> {
        let (batch, tokens, heads, dim) = q.dims4()?;
        let layout = HeadLayout::TokensFirst;
        let mut out = vec![T::ZERO; q.elem_count()];
        let [readings_q, readings_k, readings_v] =
            [("q", q), ("k", k), ("v", v)].map(|(name, x)| Reading::new(name, x, layout));
        let outputs = out.chunks_exact_mut((tokens * heads * dim).max(1)).enumerate();
        let single = tokens == 1 && valid.is_none();
        // What fails for one sequence must not have changed another: single tokens are looked at
        // first, and for many there is a copy.
        let before = if single || batch == 1 { Vec::new() } else { self.states.clone() };
        if single {
            for (name, reading) in [("q", &readings_q), ("k", &readings_k), ("v", &readings_v)] {
                (0..batch).try_for_each(|i| {
                    Ok::<_, candle_core::Error>(check_elements(name, &reading.sequence::<T>(i)?)?)
                })?;
            }
        }
        let mut workspace = if single { None } else { Some(self.attention.workspace()) };
        for ((i, out), state) in outputs.zip(&mut self.states) {
            let mut out = layout.split(out, [heads, tokens, dim])?;
            let (q, k, v) =
                (readings_q.sequence(i)?, readings_k.sequence(i)?, readings_v.sequence(i)?);
            let result = match &mut workspace {
                None => {
                    let [q, k, v] = [q, k, v].map(|x| x.index_axis_move(Axis(1), 0));
                    self.attention.step(
                        state,
                        Qkv::token(&q, &k, &v),
                        &mut out.index_axis_mut(Axis(1), 0),
                        &mut self.workspace,
                    )
                }
                Some(workspace) => {
                    let mask = valid.map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[i]));
                    self.attention.prefill_into(
                        &mut [state],
                        Qkv::new(&q, &k, &v).with_mask(mask),
                        &mut out,
                        workspace,
                    )
                }
            };
            if let Err(error) = result {
                if !before.is_empty() {
                    self.states = before;
                }
                return Err(error.into());
            }
        }
        Tensor::from_vec(out, (batch, tokens, heads, dim), &Device::Cpu)
    }
}
