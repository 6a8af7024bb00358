//! What linear and exact attention have in common, so that one test judges both.

use std::fmt::Debug;

use dijiang::attention::{CausalState, KeyMask, KvCache, LinearAttention, Softmax, Workspace};
use dijiang::kernel::FeatureMap;
use dijiang::{Real, Result};
use ndarray::{Array2, Array3, ArrayRef2, ArrayRef3, Axis};

use super::Inputs;

/// Attention with a state.
pub trait Stream<T: Real>: Debug + Sync {
    type State: Clone + PartialEq + Debug + Send;

    /// `"state"` or `"cache"`: what errors call it.
    const STATE: &'static str;

    fn empty(&self) -> Self::State;
    fn position(state: &Self::State) -> usize;
    fn reset(state: &mut Self::State);
    fn scratch(&self) -> Workspace<T>;
    fn full_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>>;
    fn full_into(
        &self,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;
    fn causal_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>>;
    fn prefill_of(
        &self,
        state: &mut Self::State,
        inputs: &Inputs<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>>;
    fn prefill_into(
        &self,
        state: &mut Self::State,
        q: &ArrayRef3<T>,
        k: &ArrayRef3<T>,
        v: &ArrayRef3<T>,
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;
    fn step(
        &self,
        state: &mut Self::State,
        q: &ArrayRef2<T>,
        k: &ArrayRef2<T>,
        v: &ArrayRef2<T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;
    fn full_packed(
        &self,
        inputs: &Inputs<T>,
        q_offsets: &[usize],
        k_offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>>;
    fn causal_packed(
        &self,
        inputs: &Inputs<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
    ) -> Result<Array3<T>>;
    fn prefill_packed_into(
        &self,
        states: &mut [&mut Self::State],
        inputs: &Inputs<T>,
        offsets: &[usize],
        mask: KeyMask<'_>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()>;

    /// All tokens one by one, outputs `[h, n, e]`.
    fn steps(&self, state: &mut Self::State, inputs: &Inputs<T>) -> Array3<T> {
        let mut out = Array3::from_elem(
            (inputs.q.shape()[0], inputs.tokens(), inputs.v.shape()[2]),
            T::from_f64(f64::NAN),
        );
        let mut workspace = self.scratch();
        for i in 0..inputs.tokens() {
            let [q, k, v] = inputs.token(i);
            let mut row: Array2<T> = out.index_axis(Axis(1), i).to_owned();
            self.step(state, &q, &k, &v, &mut row, &mut workspace).unwrap();
            out.index_axis_mut(Axis(1), i).assign(&row);
        }
        out
    }
}

macro_rules! stream {
    ($state:ident, $name:literal, $empty:ident, [$($generics:tt)*], $attention:ty) => {
        impl<$($generics)*> Stream<T> for $attention {
            type State = $state<T>;
            const STATE: &'static str = $name;

            fn empty(&self) -> $state<T> {
                self.$empty()
            }
            fn position(state: &$state<T>) -> usize {
                state.position()
            }
            fn reset(state: &mut $state<T>) {
                state.reset();
            }
            fn scratch(&self) -> Workspace<T> {
                self.workspace()
            }
            fn full_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
                self.full(&inputs.q, &inputs.k, &inputs.v, mask)
            }
            fn full_into(
                &self,
                q: &ArrayRef3<T>,
                k: &ArrayRef3<T>,
                v: &ArrayRef3<T>,
                mask: KeyMask<'_>,
                out: &mut ArrayRef3<T>,
                workspace: &mut Workspace<T>,
            ) -> Result<()> {
                self.full_into(q, k, v, mask, out, workspace)
            }
            fn causal_of(&self, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
                self.causal(&inputs.q, &inputs.k, &inputs.v, mask)
            }
            fn prefill_of(&self, state: &mut $state<T>, inputs: &Inputs<T>, mask: KeyMask<'_>) -> Result<Array3<T>> {
                self.prefill(state, &inputs.q, &inputs.k, &inputs.v, mask)
            }
            fn prefill_into(
                &self,
                state: &mut $state<T>,
                q: &ArrayRef3<T>,
                k: &ArrayRef3<T>,
                v: &ArrayRef3<T>,
                mask: KeyMask<'_>,
                out: &mut ArrayRef3<T>,
                workspace: &mut Workspace<T>,
            ) -> Result<()> {
                self.prefill_into(state, q, k, v, mask, out, workspace)
            }
            fn step(
                &self,
                state: &mut $state<T>,
                q: &ArrayRef2<T>,
                k: &ArrayRef2<T>,
                v: &ArrayRef2<T>,
                out: &mut ArrayRef2<T>,
                workspace: &mut Workspace<T>,
            ) -> Result<()> {
                self.step(state, q, k, v, out, workspace)
            }
            fn full_packed(&self, inputs: &Inputs<T>, q_offsets: &[usize], k_offsets: &[usize], mask: KeyMask<'_>) -> Result<Array3<T>> {
                self.full_packed(&inputs.q, &inputs.k, &inputs.v, q_offsets, k_offsets, mask)
            }
            fn causal_packed(&self, inputs: &Inputs<T>, offsets: &[usize], mask: KeyMask<'_>) -> Result<Array3<T>> {
                self.causal_packed(&inputs.q, &inputs.k, &inputs.v, offsets, mask)
            }
            fn prefill_packed_into(
                &self,
                states: &mut [&mut $state<T>],
                inputs: &Inputs<T>,
                offsets: &[usize],
                mask: KeyMask<'_>,
                out: &mut ArrayRef3<T>,
                workspace: &mut Workspace<T>,
            ) -> Result<()> {
                self.prefill_packed_into(states, &inputs.q, &inputs.k, &inputs.v, offsets, mask, out, workspace)
            }
        }
    };
}

stream!(CausalState, "state", new_state, [T: Real, M: FeatureMap<T>], LinearAttention<T, M>);
stream!(KvCache, "cache", new_cache, [T: Real], Softmax<T>);
