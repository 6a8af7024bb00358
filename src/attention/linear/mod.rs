//! [`LinearAttention`]: attention through feature maps, in O(n).
//!
//! ```text
//! config                          how it is built
//! head      state/{ring,sums}     one head's map and numbers; what it remembers
//! absorb                          keys join the sums
//! causal    window    full        many tokens at once: without a window, with one, bidirectional
//! pipeline                        one head on several threads
//! step      merge                 one token; the states of two segments
//! ```

mod absorb;
mod causal;
mod config;
mod full;
mod head;
mod merge;
pub(crate) mod pipeline;
pub(crate) mod state;
mod step;
mod window;

use std::marker::PhantomData;

use ndarray::{Array3, ArrayRef2, ArrayRef3, ArrayViewMut3, Axis, s};

use crate::Real;
use crate::attention::operator::{Operator, SequenceState};
use crate::attention::qkv::{Dims, HeadQkv, Qkv, not_finite};
use crate::attention::rows::OutOfRange;
use crate::attention::scratch::{SEGMENT, Sizes};
use crate::attention::workspace::Workspace;
use crate::attention::{Causality, KeyMask, Window};
use crate::check::check_room;
use crate::error::{Error, Result};
use crate::kernel::FeatureMap;
use crate::threads::try_each;
use pipeline::Pipeline;
use state::{HeadState, Shape};

pub use config::LinearConfig;
pub(crate) use config::largest as largest_window;
pub(crate) use head::Head;
pub use state::CausalState;
#[cfg(feature = "candle")]
pub(crate) use state::MAX_POSITION;
#[cfg(feature = "states")]
pub use state::Storage;

/// DCT-kernelized linear attention over all heads of a layer.
///
/// O(n) time, a state of constant size, the same results whichever way the tokens arrive: at once,
/// in pieces, or one by one. Immutable and shared freely between threads; what changes lives in
/// [`CausalState`] and [`Workspace`].
///
/// # Examples
/// ```
/// use dijiang::attention::{LinearConfig, Operator, Qkv};
/// use dijiang::kernel::DctMapConfig;
/// use ndarray::{Array, Array3};
///
/// let (heads, n, d) = (2, 100, 16);
/// let map = |head: usize| DctMapConfig::new().with_seed(head as u64).build::<f32>(d);
/// let maps = (0..heads).map(map).collect::<Result<Vec<_>, _>>()?;
/// let attention = LinearConfig::new().build(maps)?;
/// let element = |(h, i, j)| ((h + 3 * i + 5 * j) % 7) as f32 / 7.0;
/// let q: Array3<f32> = Array::from_shape_fn((heads, n, d), element);
/// let v = Array::ones((heads, n, d));
/// let out = attention.forward(Qkv::new(&q, &q, &v))?;
/// assert!(out.iter().all(|&o: &f32| (o - 1.0).abs() < 1e-5), "a weighted mean of ones is one");
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct LinearAttention<T, M> {
    maps: Vec<M>,
    heads: usize,
    causality: Causality,
    scale: f64,
    log_decay: Vec<f64>,
    sizes: Sizes,
    /// Of its states.
    shape: Shape,
    element: PhantomData<T>,
}

impl<T: Real, M: FeatureMap<T>> LinearAttention<T, M> {
    /// The maps, one per key-value head.
    pub fn maps(&self) -> &[M] {
        &self.maps
    }

    pub(crate) fn into_maps(self) -> Vec<M> {
        self.maps
    }

    /// Query heads h.
    pub fn heads(&self) -> usize {
        self.heads
    }

    /// Value dimension e.
    pub fn value_dim(&self) -> usize {
        self.sizes.value_dim
    }

    /// Which keys a query sees.
    pub fn causality(&self) -> Causality {
        self.causality
    }

    /// The same maps for queries that see other keys.
    ///
    /// # Errors
    /// [`Error::Conflict`](crate::Error::Conflict) for bidirectional attention with a local window
    /// or decay.
    pub fn with_causality(self, causality: Causality) -> Result<Self> {
        if !self.shape.windows.is_empty() {
            causality.check_causal("window")?;
        }
        if self.log_decay.iter().any(|&decay| decay != 0.0) {
            causality.check_causal("log_decay")?;
        }
        Ok(Self { causality, ..self })
    }

    /// The local windows, one for each key-value head, or none.
    pub fn windows(&self) -> &[Window] {
        &self.shape.windows
    }

    /// Sinks s.
    pub fn sinks(&self) -> usize {
        self.sizes.sinks
    }

    /// log γ, one per map.
    pub fn log_decay(&self) -> &[f64] {
        &self.log_decay
    }

    /// Softmax scale σ.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// A number that tells its maps, decay and scale from others: the same for the same ones. Its
    /// states know it, in their bytes too.
    pub fn fingerprint(&self) -> u64 {
        self.shape.fingerprint
    }

    /// What it was built from, every default filled in.
    pub fn config(&self) -> LinearConfig {
        LinearConfig {
            heads: Some(self.heads),
            value_dim: Some(self.sizes.value_dim),
            scale: Some(self.scale),
            causality: self.causality,
            windows: self.windows().to_vec(),
            sinks: self.sizes.sinks,
            log_decay: self.log_decay.clone(),
        }
    }

    /// The empty state of a segment that begins at `position` of its sequence, to be
    /// [merged](Self::merge) with the state of what comes before. Fed with the segment's tokens, it
    /// knows nothing of earlier ones: outputs computed from it see this segment only.
    ///
    /// # Errors
    /// [`Error::TooLarge`](crate::Error::TooLarge) for a position beyond 2⁵².
    pub fn new_state_at(&self, position: usize) -> Result<CausalState<T>> {
        CausalState::at(&self.shape, position)
    }

    /// As [`new_state_at`](Self::new_state_at), for a segment that has all sinks of its sequence
    /// before it: none of its tokens becomes one. Such a state has no bytes to be read again.
    ///
    /// # Errors
    /// As [`new_state_at`](Self::new_state_at).
    pub fn new_state_past_sinks(&self, position: usize) -> Result<CausalState<T>> {
        let mut state = self.new_state_at(position)?;
        state.heads.iter_mut().for_each(|head| head.sinks.close());
        Ok(state)
    }

    /// [`prefill`](Operator::prefill) of one sequence whose outputs are to be put together with
    /// those of the same queries over other keys: with every output o the exponent s and the
    /// normaliser z by which the sum of its weights is z·exp(s). Outputs over both sets of keys are
    /// then
    ///
    /// ```text
    /// o = (w₁ o₁ + w₂ o₂) / (w₁ + w₂)      w = z·exp(s)
    /// ```
    ///
    /// A query without a key has zeros. For queries over a state alone, mask all keys: that costs
    /// little.
    ///
    /// # Shapes
    /// - `qkv` as for [`prefill`](Operator::prefill); returns `[h, n, e + 2]`: o, s, z.
    ///
    /// # Errors
    /// As [`prefill`](Operator::prefill); [`Error::Conflict`](crate::Error::Conflict) for windows
    /// that keep keys, which are others in the parts than in the whole.
    pub fn prefill_partial(
        &self,
        state: &mut CausalState<T>,
        qkv: Qkv<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> Result<Array3<T>> {
        if self.windows().iter().any(|window| window.kept > 0) {
            let (argument, other) = ("window kept", "partial outputs");
            return Err(Error::Conflict { argument, other });
        }
        let (h, n, e) = qkv.output_shape(self.dims())?;
        check_room::<T>("outputs", &[h, n, e + 2])?;
        let mut out = Array3::zeros((h, n, e + 2));
        self.check_prefill(&[&mut *state], qkv, &out.slice(s![.., .., ..e]), workspace)?;
        self.run_prefill(&mut [state], qkv, out.view_mut(), workspace)?;
        Ok(out)
    }

    fn check_prefill(
        &self,
        states: &[&mut CausalState<T>],
        qkv: Qkv<'_, T>,
        out: &ArrayRef3<T>,
        workspace: &Workspace<T>,
    ) -> Result<()> {
        self.check_states("prefill", states)?;
        workspace.check(self.sizes)?;
        qkv.check_states(states.len())?;
        qkv.check(self.dims(), out)
    }

    /// Checked tokens into their states and `out`.
    fn run_prefill(
        &self,
        states: &mut [&mut CausalState<T>],
        qkv: Qkv<'_, T>,
        out: ArrayViewMut3<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        if let ([state], false) = (&mut *states, qkv.is_packed()) {
            self.begin(state, qkv, workspace)?;
            let position = state.position;
            let heads = state.change().iter_mut().map(|head| Some((position, head)));
            let result = self.causal(qkv, out, heads, workspace);
            return self.end(state, result, qkv, workspace);
        }
        qkv.check_elements()?;
        let heads = states.iter_mut().flat_map(|state| {
            let position = state.position;
            state.change().iter_mut().map(move |head| Some((position, head)))
        });
        let result = self.causal(qkv, out, heads, workspace);
        result.map_err(|OutOfRange| not_finite())?;
        states.iter_mut().zip(qkv.ranges()).for_each(|(state, (queries, _))| {
            state.changed(queries.len());
        });
        Ok(())
    }

    pub(crate) fn sizes(&self) -> Sizes {
        self.sizes
    }

    pub(crate) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(crate) fn dims(&self) -> Dims {
        let Sizes { dim, value_dim, .. } = self.sizes;
        let causal = self.causality == Causality::Causal;
        Dims { heads: self.heads, kv_heads: self.maps.len(), dim, value_dim, causal }
    }

    pub(crate) fn head(&self, h: usize) -> Head<'_, T> {
        Head::new(&self.maps[h], self.sizes.value_dim, self.scale, self.log_decay[h])
    }

    /// States need a direction, to be of this operator, and whole.
    fn check_states(&self, method: &'static str, states: &[&mut CausalState<T>]) -> Result<()> {
        self.causality.check_causal(method)?;
        states.iter().try_for_each(|state| state.check(&self.shape))
    }

    /// All heads of causal attention; `states` yields for every sequence and head its state, or
    /// `None` for one that begins and ends here.
    fn causal<'s>(
        &self,
        qkv: Qkv<'_, T>,
        out: ArrayViewMut3<'_, T>,
        states: impl Iterator<Item = Option<(usize, &'s mut HeadState<T>)>> + Send,
        workspace: &mut Workspace<T>,
    ) -> Result<(), OutOfRange> {
        let (heads, longest, shape) = (self.maps.len(), qkv.longest(), &self.shape);
        let mut items = qkv.heads(out).zip(states);
        if !Pipeline::<T>::pays(qkv.sequences() * heads) || longest <= SEGMENT {
            return try_each(&mut workspace.workers, items, |worker, ((qkv, out), state)| {
                let (scratch, whole) = worker.all();
                let (qkv, state) = continued(qkv, state, &mut whole.state, shape);
                pipeline::prefill(&self.head(qkv.head), state, qkv, out, scratch)
            });
        }
        workspace.share_heads(shape);
        let Workspace { workers, pipelines, .. } = workspace;
        for _ in 0..qkv.sequences() {
            let items = items.by_ref().take(heads).zip(&mut *pipelines);
            try_each(workers, items, |worker, (((qkv, out), state), pipeline)| {
                let (scratch, whole) = worker.all();
                let (qkv, state) = continued(qkv, state, &mut whole.state, shape);
                let head = self.head(qkv.head);
                if qkv.k.nrows() > SEGMENT {
                    pipeline.prefill(&head, state, qkv, out)
                } else {
                    pipeline::prefill(&head, state, qkv, out, scratch)
                }
            })?;
        }
        Ok(())
    }

    /// All heads of bidirectional attention.
    fn full(
        &self,
        qkv: Qkv<'_, T>,
        out: ArrayViewMut3<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> Result<(), OutOfRange> {
        let heads = self.maps.len();
        if !qkv.is_packed() && Pipeline::<T>::pays(heads) && qkv.longest() > SEGMENT {
            workspace.share_keys(heads * full::PARTS);
            let Workspace { parts, workers, .. } = workspace;
            let all: Vec<_> = (0..heads).map(|h| self.head(h)).collect();
            return full::attend_shared(&all, qkv.heads(out).collect(), parts, workers);
        }
        try_each(&mut workspace.workers, qkv.heads(out), |worker, (qkv, out)| {
            full::attend(&self.head(qkv.head), qkv, out, worker)
        })
    }

    /// Before `state` changes: it must keep what it was if elements turn out to be out of range.
    /// For a few tokens they are looked at now; to keep the state would cost more.
    fn begin(
        &self,
        state: &CausalState<T>,
        qkv: Qkv<'_, T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        if state.is_fresh() {
            return Ok(());
        }
        if qkv.keys() > SEGMENT {
            workspace.keep(&state.heads)
        } else {
            qkv.check_elements()?
        }
        Ok(())
    }

    /// After it changed: back to what it was, if elements were out of range. If the map's features
    /// were, it stays poisoned.
    fn end(
        &self,
        state: &mut CausalState<T>,
        result: Result<(), OutOfRange>,
        qkv: Qkv<'_, T>,
        workspace: &Workspace<T>,
    ) -> Result<()> {
        let Err(OutOfRange) = result else {
            state.changed(qkv.keys());
            return Ok(());
        };
        let Err(error) = qkv.check_elements() else { return Err(not_finite()) };
        if state.is_fresh() {
            state.change().iter_mut().for_each(HeadState::reset);
        } else {
            let heads = state.change().iter_mut().zip(&workspace.snapshot);
            heads.for_each(|(head, kept)| head.copy(kept));
        }
        state.changed(0);
        Err(error)
    }
}

/// A head's tokens at their position, and the state they join: one of a sequence that goes on, or
/// `own`, empty.
fn continued<'q, 's, T: Real>(
    qkv: HeadQkv<'q, T>,
    state: Option<(usize, &'s mut HeadState<T>)>,
    own: &'s mut HeadState<T>,
    shape: &Shape,
) -> (HeadQkv<'q, T>, &'s mut HeadState<T>) {
    match state {
        Some((position, state)) => (HeadQkv { position, ..qkv }, state),
        None => {
            own.reshape(shape.head(qkv.head));
            (qkv, own)
        }
    }
}

impl<T: Real> SequenceState for CausalState<T> {
    fn position(&self) -> usize {
        self.position()
    }

    fn bytes(&self) -> usize {
        self.bytes()
    }

    fn reset(&mut self) {
        self.reset();
    }
}

impl<T: Real, M: FeatureMap<T>> Operator<T> for LinearAttention<T, M> {
    type State = CausalState<T>;

    fn check_state(&self, state: &CausalState<T>) -> Result<()> {
        state.check(&self.shape)
    }

    fn new_state(&self) -> CausalState<T> {
        CausalState::new(&self.shape)
    }

    fn workspace(&self) -> Workspace<T> {
        Workspace::new(self.sizes).with_snapshot(&self.shape)
    }

    fn step_workspace(&self) -> Workspace<T> {
        Workspace::for_steps(self.sizes)
    }

    fn forward(&self, qkv: Qkv<'_, T>) -> Result<Array3<T>> {
        let mut out = Array3::zeros(qkv.output_shape(self.dims())?);
        self.forward_into(qkv, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    fn forward_into(
        &self,
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        workspace.check(self.sizes)?;
        qkv.check(self.dims(), out)?;
        let out = out.view_mut();
        let result = match self.causality {
            Causality::Causal => self.causal(qkv, out, std::iter::repeat_with(|| None), workspace),
            Causality::Bidirectional => self.full(qkv, out, workspace),
        };
        result.map_err(|OutOfRange| qkv.out_of_range())
    }

    fn prefill_packed(
        &self,
        states: &mut [&mut CausalState<T>],
        qkv: Qkv<'_, T>,
    ) -> Result<Array3<T>> {
        let mut out = Array3::zeros(qkv.output_shape(self.dims())?);
        self.prefill_into(states, qkv, &mut out, &mut self.workspace())?;
        Ok(out)
    }

    fn prefill_into(
        &self,
        states: &mut [&mut CausalState<T>],
        qkv: Qkv<'_, T>,
        out: &mut ArrayRef3<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_prefill(states, qkv, out, workspace)?;
        self.run_prefill(states, qkv, out.view_mut(), workspace)
    }

    fn extend(
        &self,
        state: &mut CausalState<T>,
        (k, v): (&ArrayRef3<T>, &ArrayRef3<T>),
        mask: KeyMask<'_>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_states("extend", &[&mut *state])?;
        workspace.check(self.sizes)?;
        let (nobody, mut out) = self.dims().nobody(k.shape()[1]);
        let qkv = Qkv::new(&nobody, k, v).with_mask(mask);
        qkv.check_keys(self.dims(), k.shape()[1])?;
        self.begin(state, qkv, workspace)?;
        let position = state.position;
        let heads = qkv.heads(out.view_mut()).zip(state.change());
        let result = try_each(&mut workspace.workers, heads, |worker, ((qkv, out), head)| {
            let qkv = HeadQkv { position, ..qkv };
            pipeline::prefill(&self.head(qkv.head), head, qkv, out, &mut worker.scratch)
        });
        self.end(state, result, qkv, workspace)
    }

    fn step(
        &self,
        state: &mut CausalState<T>,
        token: Qkv<'_, T>,
        out: &mut ArrayRef2<T>,
        workspace: &mut Workspace<T>,
    ) -> Result<()> {
        self.check_states("step", &[&mut *state])?;
        workspace.check(self.sizes)?;
        token.check_token(self.dims(), out)?;
        let position = state.position;
        let heads = token.heads(out.view_mut().insert_axis(Axis(1)));
        for ((qkv, out), head_state) in heads.zip(state.change()) {
            let (head, qkv) = (self.head(qkv.head), HeadQkv { position, ..qkv });
            let scratch = &mut workspace.first().scratch;
            let result = if qkv.is_valid(0) {
                step::step(&head, head_state, qkv, out, scratch)
            } else {
                pipeline::prefill(&head, head_state, qkv, out, scratch)
            };
            result.map_err(|OutOfRange| not_finite())?;
        }
        state.changed(1);
        Ok(())
    }
}
