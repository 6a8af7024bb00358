//! Drop-in attention layers: projections, rotary embedding and grouped queries around either
//! attention.
//!
//! [`SoftmaxAttention`] is the layer as trained; [`DijiangAttention::from_softmax`] makes the
//! linear one from it, keeping every weight. Both are an [`Attention`], so that exchanging them in
//! a model is one type and one line:
//!
//! ```
//! use dijiang::attention::KeyMask;
//! use dijiang::layer::{
//!     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
//!     SoftmaxAttention,
//! };
//! use ndarray::{Array1, Array2};
//!
//! // The weights of a trained layer: D = 16, four query heads of 4 sharing two key-value heads.
//! let element = |(i, j)| ((i * 7 + j * 5) % 11) as f32 / 20.0 - 0.25;
//! let matrix = |rows: usize, cols: usize| Array2::from_shape_fn((rows, cols), element);
//! let config = AttentionConfig::new(16, 4).with_kv_heads(2).with_rotary(Rotary::new(10_000.0));
//! let (q, k, v, o) = (matrix(16, 16), matrix(8, 16), matrix(8, 16), matrix(16, 16));
//! let weights = AttentionWeights::new(q, k, v, o);
//!
//! let softmax = SoftmaxAttention::new(config, weights)?;
//! let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new())?; // the exchange
//!
//! let x = Array2::from_shape_fn((20, 16), |(i, j)| ((i * 3 + j) % 7) as f32 - 3.0);
//! let whole = linear.forward(&x, KeyMask::All)?;
//!
//! // The same by a stream: a prompt of 19 tokens, then one token.
//! let mut state = linear.new_state();
//! let prompt = linear.prefill(&mut state, &x.slice(ndarray::s![..19, ..]), KeyMask::All)?;
//! let mut last = Array1::zeros(16);
//! linear.step(&mut state, &x.row(19), &mut last)?;
//! assert!(prompt.iter().chain(&last).zip(&whole).all(|(a, b)| (a - b).abs() < 1e-4));
//! assert_eq!(state.position(), 20);
//! # Ok::<(), dijiang::Error>(())
//! ```
//!
//! 20 tokens lie within the exact local window of the linear layer (two chunks of 64), so here it
//! equals softmax attention; older tokens go through its DCT maps, which
//! [`DijiangAttention::calibrate`] fits to your own hidden states.
//!
//! Many sequences at once, each with the bits it has alone: [`Attention::prefill_packed`] and
//! [`Attention::prefill_padded`] for prompts, [`StatePool`] and [`DijiangAttention::step_batch`]
//! for the tokens after them. A clone of a state is a prefix to continue many times, or the way
//! back from a rejected draft. [`DijiangAttention::merge`] puts the states of a sequence's segments
//! together.
//!
//! With the feature `safetensors`, layers and calibrated maps go to files and come back with the
//! same bits: `DijiangAttention::{to_safetensors, from_safetensors}` and `{save_maps, load_maps}`
//! for one layer; [`checkpoint`](crate::guide::checkpoints) has them for a model.

mod backward;
mod config;
mod dijiang;
mod generic;
mod packed;
mod pool;
mod published;
mod qk_norm;
mod qkv_proj;
mod rotary;
mod softmax;
mod weights;

pub use crate::attention::Causality;
pub use backward::LayerGradients;
pub use config::AttentionConfig;
#[cfg(feature = "candle")]
pub(crate) use config::check_no_sliding;
pub use dijiang::{DijiangAttention, DijiangOptions, DijiangState};
pub use generic::{Layer, LayerState};
pub use packed::Padding;
pub use pool::{Slot, StatePool};
pub use published::{PublishedAttention, PublishedState, PublishedWeights};
pub(crate) use qkv_proj::{ProjectedQkv, QkvProj};
#[cfg(feature = "candle")]
pub(crate) use rotary::RotaryTable;
pub use rotary::{Rotary, RotaryPairing, RotaryScaling};
pub(crate) use softmax::softmax_of;
pub use softmax::{SoftmaxAttention, SoftmaxState};
pub use weights::AttentionWeights;

use ndarray::{Array2, Array3, ArrayRef1, ArrayRef2, ArrayRef3};

use crate::Real;
use crate::attention::{KeyMask, check_offsets, check_offsets_of};
use crate::check::{check_elements, check_len, check_room, check_shape};
use crate::error::{Error, Result};
use crate::threads::{for_each, max_threads};

/// A self-attention layer: hidden states in, hidden states out. What both layers offer, so that a
/// model can be generic over its attention.
///
/// # Conventions
/// Rows are tokens. Positions count from 0 at the first token of a sequence and include masked
/// tokens. A masked token is never attended to, but still has a query and an output of its own; its
/// hidden state must be finite like any other.
pub trait Attention<T: Real>: Send + Sync {
    /// What one sequence leaves behind for its next tokens. A clone is a snapshot to return to.
    type State: Clone + Send;

    /// The checked config, head dimension and scale filled in.
    fn config(&self) -> &AttentionConfig;

    /// The empty state of a new sequence. Of a bidirectional layer it is of no use: see
    /// [`prefill`](Self::prefill).
    fn new_state(&self) -> Self::State;

    /// A whole sequence, causal or not as configured.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: n keys; returns `[n, D]`.
    ///
    /// # Cost
    /// O(n) memory for projections and output. Runs on all threads; the result does not depend on
    /// their number.
    ///
    /// # Errors
    /// - [`Error::Empty`] for n = 0, [`Error::Shape`] unless `x` has D columns, [`Error::Length`]
    ///   for a mask of another length;
    /// - [`Error::NonFinite`] for elements of `x`, or of the queries, keys and values made from it,
    ///   beyond [`Real::LIMIT`];
    /// - [`Error::TooLarge`] for more tokens than there is room for.
    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> Result<Array2<T>>;

    /// The next n tokens of a sequence. Calling it for pieces of a sequence gives what
    /// [`forward`](Self::forward) gives for the whole.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: these n keys; returns `[n, D]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Conflict`] if the layer is bidirectional;
    /// [`Error::Foreign`] for the state of a layer of another shape or with other maps. After an
    /// error the state is unchanged; after an [`Error::Value`] for maps whose numbers overflow it
    /// is poisoned.
    fn prefill(
        &self,
        state: &mut Self::State,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>>;

    /// The next token. There is no mask: where a batch of sequences steps and some of them have
    /// ended, leave those out.
    ///
    /// # Shapes
    /// - `x`: `[D]`, `out`: `[D]`
    ///
    /// # Cost
    /// Runs on the calling thread. Needs no scratch but the state's own.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), [`Error::Length`] for `x` and `out`. After an error neither
    /// state nor `out` is changed.
    fn step(&self, state: &mut Self::State, x: &ArrayRef1<T>, out: &mut ArrayRef1<T>)
    -> Result<()>;

    /// [`forward`](Self::forward) of several sequences of one length; sequence i is what `forward`
    /// gives for it alone, bit for bit.
    ///
    /// # Shapes
    /// - `x`: `[b, n, D]`, `masks`: `[b, n]`, `true` for the keys that may be attended to; returns
    ///   `[b, n, D]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Shape`] for `masks`.
    fn forward_batch(
        &self,
        x: &ArrayRef3<T>,
        masks: Option<&ArrayRef2<bool>>,
    ) -> Result<Array3<T>> {
        let (b, n, _) = x.dim();
        check_shape("x", x, &[b, n, self.config().model_dim])?;
        if b == 0 || n == 0 {
            return Err(Error::Empty { argument: "x" });
        }
        check_room::<T>("hidden states", &[b, n, self.config().model_dim])?;
        check_elements("x", x)?;
        let valid = match masks {
            Some(masks) => {
                check_shape("masks", masks, &[b, n])?;
                masks.iter().copied().collect()
            }
            None => Vec::new(),
        };
        let mask = |i: usize| {
            if masks.is_some() { KeyMask::Valid(&valid[i * n..(i + 1) * n]) } else { KeyMask::All }
        };
        let mut out = Array3::zeros(x.raw_dim());
        let mut results = vec![Ok(()); b];
        let sequences = x.outer_iter().zip(out.outer_iter_mut()).zip(&mut results).enumerate();
        let sequences: Vec<_> =
            sequences.map(|(i, ((x, out), result))| (i, x, out, result)).collect();
        for_each(
            &mut vec![(); max_threads().min(b)],
            sequences.into_iter(),
            |(), (i, x, mut out, result)| {
                *result = self.forward(&x, mask(i)).map(|y| out.assign(&y));
            },
        );
        results.into_iter().collect::<Result<()>>()?;
        Ok(out)
    }

    /// [`forward`](Self::forward) of several sequences, packed one after another; each one is what
    /// `forward` gives for it alone, bit for bit. Sequence i is tokens `offsets[i]..offsets[i + 1]`
    /// and may have none.
    ///
    /// # Shapes
    /// - `x`: `[n, D]` with all sequences' tokens, `offsets`: one more than sequences, `mask`: n
    ///   keys; returns `[n, D]`.
    ///
    /// # Cost
    /// The layers of this crate project all tokens in one matrix product.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Value`] for offsets that do not begin with 0, fall,
    /// or do not end with n.
    fn forward_packed(
        &self,
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets("offsets", offsets, x.nrows())?;
        packed::each(x, offsets, mask, |_, x, mask| self.forward(x, mask))
    }

    /// The next tokens of several sequences, packed one after another: [`prefill`](Self::prefill)
    /// of each, bit for bit. Sequence i is tokens `offsets[i]..offsets[i + 1]`; if it has none, its
    /// state stays as it is.
    ///
    /// # Shapes
    /// - `states`: b, `offsets`: b + 1; `x`: `[n, D]` with all sequences' tokens, `mask`: n keys;
    ///   returns `[n, D]`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), for any of the sequences, and for offsets as
    /// [`forward_packed`](Self::forward_packed); [`Error::Length`] unless there is one offset more
    /// than states. After an error no state is changed.
    fn prefill_packed(
        &self,
        states: &mut [&mut Self::State],
        x: &ArrayRef2<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        check_offsets_of(states.len(), offsets, x.nrows())?;
        let mut next: Vec<Self::State> = states.iter().map(|state| (*state).clone()).collect();
        let out = packed::each(x, offsets, mask, |i, x, mask| self.prefill(&mut next[i], x, mask))?;
        states.iter_mut().zip(next).for_each(|(state, next)| **state = next);
        Ok(out)
    }

    /// [`forward`](Self::forward) of several sequences of different lengths, padded to one; each is
    /// what `forward` gives for it alone, bit for bit, whichever side the padding is on: positions
    /// count from a sequence's first own token.
    ///
    /// # Shapes
    /// - `x`: `[b, n, D]`, `lengths`: b numbers of at most n; returns `[b, n, D]`, zeros in the
    ///   padding. What `x` holds there is never looked at.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Length`] for another number of lengths,
    /// [`Error::TooLarge`] for one beyond n, [`Error::Empty`] if all are 0.
    fn forward_padded(
        &self,
        x: &ArrayRef3<T>,
        lengths: &[usize],
        padding: Padding,
    ) -> Result<Array3<T>> {
        packed::padded(self.config().model_dim, x, lengths, padding, |x, offsets| {
            self.forward_packed(x, offsets, KeyMask::All)
        })
    }

    /// The next tokens of several sequences, as many as `lengths` says, padded to one length:
    /// [`prefill`](Self::prefill) of each, bit for bit. The padding leaves no trace in the states,
    /// which afterwards step together, say.
    ///
    /// # Shapes
    /// As [`forward_padded`](Self::forward_padded); `states`: b.
    ///
    /// # Errors
    /// As [`prefill_packed`](Self::prefill_packed) and [`forward_padded`](Self::forward_padded).
    /// After an error no state is changed.
    fn prefill_padded(
        &self,
        states: &mut [&mut Self::State],
        x: &ArrayRef3<T>,
        lengths: &[usize],
        padding: Padding,
    ) -> Result<Array3<T>> {
        check_len("lengths", states.len(), lengths.len())?;
        packed::padded(self.config().model_dim, x, lengths, padding, |x, offsets| {
            self.prefill_packed(states, x, offsets, KeyMask::All)
        })
    }
}
