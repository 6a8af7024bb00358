//! Attention by dijiang's engine, where tensors are on burn's CPU backend `flex`: an operation of
//! its own, with the engine's backward pass under `Autodiff`.

use std::fmt::Debug;
use std::sync::{Arc, Mutex, PoisonError};

use burn::backend::autodiff::NodeId;
use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, Backend, Dispatch, DispatchDevice, Flex, TensorMetadata, backend_extension,
};
use burn::tensor::{DType, Device, Tensor, TensorData};
use dijiang::Real;
use dijiang::attention::{
    AttentionGradients, CausalState, Causality, KeyMask, LinearAttention, LinearConfig, Operator,
    Qkv, Window,
};
use dijiang::kernel::{DctGradients, DctMap};
use ndarray::{ArrayView3, ArrayViewMut3, Axis};

use crate::error::{Error, Result};
use crate::maps::{FeatureMaps, Layout, elements};

/// Whether the engine runs on this device.
pub(crate) fn runs_on(device: &Device) -> bool {
    match device.as_dispatch() {
        DispatchDevice::Flex(_) => true,
        DispatchDevice::Autodiff(device) => matches!(**device, DispatchDevice::Flex(_)),
        #[allow(unreachable_patterns)] // there are others if another backend is built too
        _ => false,
    }
}

/// Everything of a layer's attention that is no tensor.
#[derive(Debug, Clone)]
pub(crate) struct Choices {
    pub(crate) heads: usize,
    pub(crate) causality: Causality,
    pub(crate) scale: f64,
    pub(crate) windows: Vec<Window>,
    pub(crate) sinks: usize,
}

impl Choices {
    /// The operator of the maps that `packed` has the numbers of.
    fn build<T: Real>(
        &self,
        layout: &Layout,
        packed: &[f64],
    ) -> dijiang::Result<LinearAttention<T, DctMap<T>>> {
        let (params, log_decay) = layout.read(packed);
        let maps = params.into_iter().map(DctMap::from_params).collect::<dijiang::Result<_>>()?;
        let config = LinearConfig::new()
            .with_heads(self.heads)
            .with_causality(self.causality)
            .with_scale(self.scale)
            .with_windows(self.windows.clone())
            .with_sinks(self.sinks);
        match self.causality {
            Causality::Causal => config.with_log_decay(log_decay),
            Causality::Bidirectional => config,
        }
        .build(maps)
    }
}

/// One call of the operation.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) choices: Choices,
    pub(crate) layout: Layout,
    /// Which keys may be attended to, sequence by sequence.
    pub(crate) valid: Option<Vec<Vec<bool>>>,
    /// What went wrong: an operation of burn has no other way to say so.
    failure: Mutex<Option<dijiang::Error>>,
}

/// Element types of the engine.
pub(crate) trait Element: Real + burn::tensor::Element + bytemuck::Pod {}
impl Element for f32 {}
impl Element for f64 {}

/// q `[b, n, h, d]`, k and v `[b, n, h_kv, d]`, the numbers of the maps; outputs `[b, n, h, d]`.
pub(crate) fn attend(
    [q, k, v]: [Tensor<4>; 3],
    maps: &FeatureMaps,
    choices: Choices,
    valid: Option<Vec<Vec<bool>>>,
) -> Result<Tensor<4>> {
    let layout = maps.layout()?;
    let call = Arc::new(Call { choices, layout, valid, failure: Mutex::new(None) });
    let [q, k, v] = [q, k, v].map(Tensor::into_dispatch);
    let numbers = maps.pack().into_dispatch();
    let out = Tensor::from_dispatch(<Dispatch as Engine>::dijiang(q, k, v, numbers, call.clone()));
    match call.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
        Some(error) => Err(error.into()),
        None => Ok(out),
    }
}

/// The operation, on the backends that have it.
#[backend_extension(Flex, Autodiff)]
pub(crate) trait Engine: Backend {
    /// Attention of a batch.
    fn dijiang(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        numbers: FloatTensor<Self>,
        call: Arc<Call>,
    ) -> FloatTensor<Self>;
}

impl Engine for Flex {
    fn dijiang(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        numbers: FlexTensor,
        call: Arc<Call>,
    ) -> FlexTensor {
        match q.dtype() {
            DType::F64 => call.forward::<f64>([q, k, v, numbers]),
            _ => call.forward::<f32>([q, k, v, numbers]),
        }
    }
}

impl<C: CheckpointStrategy> Engine for Autodiff<Flex, C> {
    fn dijiang(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        numbers: FloatTensor<Self>,
        call: Arc<Call>,
    ) -> FloatTensor<Self> {
        let inputs = [q, k, v, numbers];
        let nodes = inputs.each_ref().map(|input| input.node());
        match EngineBackward.prepare::<C>(nodes).compute_bound().stateful() {
            OpsKind::Tracked(mut prep) => {
                let kept = inputs.each_ref().map(|input| prep.checkpoint(input));
                let [q, k, v, numbers] = inputs.map(|input| input.into_primitive());
                let out = Flex::dijiang(q, k, v, numbers, call.clone());
                prep.finish((kept, call), out)
            }
            OpsKind::UnTracked(prep) => {
                let [q, k, v, numbers] = inputs.map(|input| input.into_primitive());
                prep.finish(Flex::dijiang(q, k, v, numbers, call))
            }
        }
    }
}

/// The backward pass of [`Engine::dijiang`].
#[derive(Debug)]
struct EngineBackward;

impl Backward<Flex, 4> for EngineBackward {
    type State = ([NodeId; 4], Arc<Call>);

    fn backward(
        self,
        ops: Ops<Self::State, 4>,
        grads: &mut Gradients,
        checkpointer: &mut Checkpointer,
    ) {
        let gradient = grads.consume::<Flex>(&ops.node);
        let (kept, call) = ops.state;
        let inputs = kept.map(|id| checkpointer.retrieve_node_output::<FlexTensor>(id));
        let gradients = match gradient.dtype() {
            DType::F64 => call.backward::<f64>(inputs, gradient),
            _ => call.backward::<f32>(inputs, gradient),
        };
        for (parent, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = parent {
                grads.register::<Flex>(node.id, gradient);
            }
        }
    }
}

/// `[b, n, h, d]` of a tensor without gaps.
struct Batch<'a, T> {
    name: &'static str,
    elements: &'a [T],
    shape: [usize; 3],
}

impl<'a, T: Element> Batch<'a, T> {
    fn of(name: &'static str, tensor: &'a FlexTensor) -> Self {
        let shape = tensor.shape();
        let elements = tensor.as_slice().unwrap_or_default();
        Self { name, elements, shape: [shape[1], shape[2], shape[3]] }
    }

    /// One sequence, `[h, n, d]`.
    fn sequence(&self, i: usize) -> dijiang::Result<ArrayView3<'a, T>> {
        let [n, h, d] = self.shape;
        let (len, got) = (n * h * d, self.elements.len());
        let elements = self.elements.get(i * len..(i + 1) * len);
        let view = elements.and_then(|x| ArrayView3::from_shape((n, h, d), x).ok());
        let view = view.map(|view| view.permuted_axes([1, 0, 2]));
        view.ok_or(dijiang::Error::Length { argument: self.name, expected: (i + 1) * len, got })
    }
}

/// The outputs of one sequence, `[h, n, d]` of `[n, h, d]` in memory.
fn heads_of<T>(elements: &mut [T], [n, h, d]: [usize; 3]) -> dijiang::Result<ArrayViewMut3<'_, T>> {
    let got = elements.len();
    let view = ArrayViewMut3::from_shape((n, h, d), elements);
    let length = |_| dijiang::Error::Length { argument: "outputs", expected: n * h * d, got };
    Ok(view.map_err(length)?.permuted_axes([1, 0, 2]))
}

/// A tensor `[b, …]` of the sequences' elements.
fn tensor<T: Element>(elements: Vec<T>, shape: &[usize]) -> FlexTensor {
    FlexTensor::from_data(TensorData::new(elements, shape.to_vec()))
}

impl Call {
    /// The numbers of the maps in f64, and the operator of them.
    fn operator<T: Element>(
        &self,
        packed: &FlexTensor,
    ) -> dijiang::Result<LinearAttention<T, DctMap<T>>> {
        let packed: Vec<f64> =
            packed.as_slice::<T>().unwrap_or_default().iter().map(|x| x.to_f64()).collect();
        self.choices.build(&self.layout, &packed)
    }

    fn mask(&self, sequence: usize) -> KeyMask<'_> {
        self.valid.as_ref().map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[sequence]))
    }

    fn forward<T: Element>(&self, inputs: [FlexTensor; 4]) -> FlexTensor {
        let shape = inputs[0].shape();
        let mut out = vec![T::zero(); shape.num_elements()];
        let inputs = inputs.map(|input| input.to_contiguous());
        if let Err(error) = self.try_forward(&inputs, &mut out) {
            *self.failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        tensor(out, shape.as_slice())
    }

    fn try_forward<T: Element>(
        &self,
        [q, k, v, packed]: &[FlexTensor; 4],
        out: &mut [T],
    ) -> dijiang::Result<()> {
        let attention = self.operator::<T>(packed)?;
        let mut workspace = attention.workspace();
        let [q, k, v] = [("q", q), ("k", k), ("v", v)].map(|(name, x)| Batch::<T>::of(name, x));
        let len: usize = q.shape.iter().product();
        for (i, out) in out.chunks_exact_mut(len.max(1)).enumerate() {
            let (queries, keys, values) = (q.sequence(i)?, k.sequence(i)?, v.sequence(i)?);
            let qkv = Qkv::new(&queries, &keys, &values).with_mask(self.mask(i));
            attention.forward_into(qkv, &mut heads_of(out, q.shape)?, &mut workspace)?;
        }
        Ok(())
    }

    fn backward<T: Element>(
        &self,
        inputs: [FlexTensor; 4],
        gradient: FlexTensor,
    ) -> [FlexTensor; 4] {
        let shapes = inputs.each_ref().map(|input| input.shape());
        let inputs = inputs.map(|input| input.to_contiguous());
        let gradients = self.try_backward::<T>(&inputs, &gradient.to_contiguous());
        let gradients = gradients.unwrap_or_else(|_| {
            shapes.each_ref().map(|shape| vec![T::from_f64(f64::NAN); shape.num_elements()])
        });
        let mut shapes = shapes.iter();
        gradients.map(|elements| {
            tensor(elements, shapes.next().map(|shape| shape.as_slice()).unwrap_or_default())
        })
    }

    fn try_backward<T: Element>(
        &self,
        [q, k, v, packed]: &[FlexTensor; 4],
        gradient: &FlexTensor,
    ) -> dijiang::Result<[Vec<T>; 4]> {
        let attention = self.operator::<T>(packed)?;
        let batch = q.shape()[0];
        let of = |x: &FlexTensor| Vec::<T>::with_capacity(x.shape().num_elements());
        let mut inputs = [of(q), of(k), of(v)];
        let mut numbers = vec![0.0; packed.shape().num_elements()];
        let [q, k, v, gradient] = [("q", q), ("k", k), ("v", v), ("gradient", gradient)]
            .map(|(name, x)| Batch::<T>::of(name, x));
        for i in 0..batch {
            let (queries, keys, values) = (q.sequence(i)?, k.sequence(i)?, v.sequence(i)?);
            let qkv = Qkv::new(&queries, &keys, &values).with_mask(self.mask(i));
            let AttentionGradients { q, k, v, maps, log_decay, .. } =
                attention.backward(qkv, &gradient.sequence(i)?)?;
            for (all, one) in inputs.iter_mut().zip([q, k, v]) {
                all.extend(one.permuted_axes([1, 0, 2]).iter());
            }
            let of_heads: Vec<_> = maps.iter().zip(&log_decay).map(parts).collect();
            let sum = numbers.iter_mut().zip(self.layout.write(&of_heads));
            sum.for_each(|(sum, gradient)| *sum += gradient);
        }
        let [q, k, v] = inputs;
        Ok([q, k, v, numbers.into_iter().map(T::from_f64).collect()])
    }
}

/// The gradients of one head in the order of [`FeatureMaps::pack`].
fn parts<'a>((map, log_decay): (&'a DctGradients, &'a f64)) -> [&'a [f64]; 11] {
    let (query, key) = (&map.query, &map.key);
    [
        &query.center,
        &query.scale,
        &query.radii,
        &query.projection,
        &key.center,
        &key.scale,
        &key.radii,
        &key.projection,
        &map.log_weight,
        std::slice::from_ref(&map.log_mix),
        std::slice::from_ref(log_decay),
    ]
}

/// What a batch of sequences leaves behind for its next tokens, in the engine.
#[derive(Debug, Clone)]
pub(crate) struct EngineState<T> {
    attention: Arc<LinearAttention<T, DctMap<T>>>,
    states: Vec<CausalState<T>>,
}

impl<T: Element> EngineState<T> {
    pub(crate) fn new(maps: &FeatureMaps, choices: &Choices, batch: usize) -> Result<Self> {
        let attention = choices.build(&maps.layout()?, &elements(maps.pack())?)?;
        let states = vec![attention.new_state(); batch];
        Ok(Self { attention: Arc::new(attention), states })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.states.iter().map(CausalState::bytes).sum()
    }

    /// The next tokens: q `[b, n, h, d]`, k and v `[b, n, h_kv, d]`; returns `[b, n, h, d]`. After
    /// an error the states are as before.
    pub(crate) fn extend(
        &mut self,
        inputs: [Tensor<4>; 3],
        valid: Option<&[Vec<bool>]>,
    ) -> Result<Tensor<4>> {
        let (dims, device) = (inputs[0].dims(), inputs[0].device());
        let inputs = inputs.map(|x| x.try_into_primitive::<Flex>());
        let [Ok(q), Ok(k), Ok(v)] = inputs.map(|x| x.map(|x| x.to_contiguous())) else {
            return Err(Error::Tensor {
                argument: "x",
                expected: "on the backend of the cache",
                got: format!("{device:?}"),
            });
        };
        let mut out = vec![T::zero(); dims.iter().product()];
        let before = if self.states.len() > 1 { self.states.clone() } else { Vec::new() };
        if let Err(error) = self.try_extend([&q, &k, &v], valid, &mut out) {
            if !before.is_empty() {
                self.states = before;
            }
            return Err(error.into());
        }
        Ok(Tensor::from_data(TensorData::new(out, dims), (&device, T::dtype())))
    }

    fn try_extend(
        &mut self,
        [q, k, v]: [&FlexTensor; 3],
        valid: Option<&[Vec<bool>]>,
        out: &mut [T],
    ) -> dijiang::Result<()> {
        let [q, k, v] = [("q", q), ("k", k), ("v", v)].map(|(name, x)| Batch::<T>::of(name, x));
        let mut workspace = match q.shape {
            [1, ..] => self.attention.step_workspace(),
            _ => self.attention.workspace(),
        };
        let outputs = out.chunks_exact_mut(q.shape.iter().product::<usize>().max(1));
        for ((i, out), state) in outputs.enumerate().zip(&mut self.states) {
            let (queries, keys, values) = (q.sequence(i)?, k.sequence(i)?, v.sequence(i)?);
            let mask = valid.map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[i]));
            let qkv = Qkv::new(&queries, &keys, &values).with_mask(mask);
            let mut out = heads_of(out, q.shape)?;
            if q.shape[0] == 1 {
                let mut out = out.index_axis_mut(Axis(1), 0);
                self.attention.step(state, qkv, &mut out, &mut workspace)?;
            } else {
                self.attention.prefill_into(&mut [state], qkv, &mut out, &mut workspace)?;
            }
        }
        Ok(())
    }
}
