//! What linear and softmax attention have in common, so that one test judges both.

use dijiang::attention::{Causality, KeyMask, LinearAttention, Operator, Qkv, Softmax, Workspace};
use dijiang::kernel::FeatureMap;
use dijiang::{Real, Result};
use ndarray::{Array2, Array3, ArrayRef3, Axis};

use crate::Inputs;

/// An operator, given the inputs of a test.
pub trait Stream<T: Real>: Operator<T> + Clone {
    /// `"state"` or `"cache"`: what errors call it.
    const STATE: &'static str;

    /// The same operator, every query of which sees every key.
    fn bidirectional(&self) -> Result<Self>
    where
        Self: Sized;

    fn full_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
        self.bidirectional()?.forward(inputs.qkv().with_mask(mask))
    }

    fn full_packed(
        &self,
        inputs: &Inputs<T>,
        offsets: &[usize],
        key_offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        let qkv = inputs.qkv().with_offsets(offsets).with_key_offsets(key_offsets);
        self.bidirectional()?.forward(qkv.with_mask(mask))
    }

    fn causal_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
        self.forward(inputs.qkv().with_mask(mask))
    }

    fn causal_packed(
        &self,
        inputs: &Inputs<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        self.forward(inputs.qkv().with_offsets(offsets).with_mask(mask))
    }

    fn prefill_of(
        &self,
        state: &mut Self::State,
        inputs: &Inputs<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>> {
        self.prefill(state, inputs.qkv().with_mask(mask))
    }

    fn prefill_packed_into(
        &self,
        states: &mut [&mut Self::State],
        inputs: &Inputs<T>,
        (offsets, mask): (&[usize], KeyMask<'_>),
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        let qkv = inputs.qkv().with_offsets(offsets).with_mask(mask);
        self.prefill_into(states, qkv, out, workspace)
    }

    /// All tokens one by one, outputs `[h, n, e]`.
    fn steps(&self, state: &mut Self::State, inputs: &Inputs<T>) -> Array3<T> {
        let mut out = Array3::from_elem(
            (inputs.q.shape()[0], inputs.tokens(), inputs.v.shape()[2]),
            T::from_f64(f64::NAN),
        );
        let mut workspace = self.workspace();
        for i in 0..inputs.tokens() {
            let [q, k, v] = inputs.token(i);
            let mut row: Array2<T> = out.index_axis(Axis(1), i).to_owned();
            self.step(state, Qkv::token(&q, &k, &v), &mut row, &mut workspace).unwrap();
            out.index_axis_mut(Axis(1), i).assign(&row);
        }
        out
    }
}

impl<T: Real, M: FeatureMap<T> + Clone> Stream<T> for LinearAttention<T, M> {
    const STATE: &'static str = "state";

    fn bidirectional(&self) -> Result<Self> {
        self.clone().with_causality(Causality::Bidirectional)
    }
}

impl<T: Real> Stream<T> for Softmax<T> {
    const STATE: &'static str = "cache";

    fn bidirectional(&self) -> Result<Self> {
        self.config().clone().with_causality(Causality::Bidirectional).build()
    }
}
