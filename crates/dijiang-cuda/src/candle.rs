//! Attention on [candle](candle_core)'s CUDA tensors. Feature `candle`, which needs nvcc to build.
//!
//! The kernels run on the context and the stream of candle's own device, behind whatever candle has
//! put there; nothing is waited for.
//!
//! ```no_run
//! use candle_core::Var;
//! use dijiang::attention::{LinearConfig, Window};
//! use dijiang::kernel::DctMapConfig;
//! use dijiang_cuda::candle::CandleAttention;
//! use dijiang_cuda::{Attention, Device};
//!
//! let maps = (0..2).map(|head| DctMapConfig::new().with_seed(head).build::<f64>(64));
//! let maps = maps.collect::<Result<Vec<_>, _>>()?;
//! let config = LinearConfig::new().with_heads(4).with_window(Window::new(64, 1)).with_sinks(4);
//!
//! let gpu = candle_core::Device::new_cuda(0)?;
//! let attention = Attention::<f32>::new(&Device::from_candle(&gpu)?, &config.build(maps)?)?;
//! let attention = CandleAttention::new(attention);
//! let q = Var::randn(0f32, 1.0, (2, 4, 1000, 64), &gpu)?;
//! let k = Var::randn(0f32, 1.0, (2, 2, 1000, 64), &gpu)?;
//! let v = Var::randn(0f32, 1.0, (2, 2, 1000, 64), &gpu)?;
//! let out = attention.forward(&q, &k, &v)?;
//! let gradients = out.sqr()?.sum_all()?.backward()?; // of q, k and v
//! let mut pool = attention.attention().new_pool(2)?;
//! let out = attention.prefill(&mut pool, &[0, 1], &q, &k, &v)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use candle_core::cuda_backend::CudaDType;
use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaDevice, CudaStorage, CustomOp3, Layout, Result, Shape, Storage, Tensor,
    WithDType,
};
use cudarc::driver::CudaSlice;

use crate::attention::{Attention, Qkv, Workspace};
use crate::backward::{BackwardWorkspace, InputGradients};
use crate::device::Device;
use crate::element::Element;
use crate::error::Error;
use crate::pool::Pool;

/// An element type of both libraries: `bf16`, `f16` or `f32`.
pub trait TensorElement: Element + WithDType + CudaDType {}

impl<E: Element + WithDType + CudaDType> TensorElement for E {}

impl Device {
    /// The GPU and the stream of candle's device. The stream belongs to this very device: a second
    /// one of the same number has another.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a device that is no CUDA device, and as
    /// [`from_stream`](Self::from_stream).
    pub fn from_candle(device: &candle_core::Device) -> crate::Result<Self> {
        match device {
            candle_core::Device::Cuda(device) => Self::from_stream(device.cuda_stream()),
            other => Err(elsewhere("device", other)),
        }
    }
}

/// An [`Attention`] that is applied to tensors. Clones share it, and its scratch.
///
/// # Shapes
/// Of [`forward`](Self::forward), [`prefill`](Self::prefill) and [`step`](Self::step):
/// - `q`: `[b, h, n, d]`, `k`: `[b, h_kv, n, d]`, `v`: `[b, h_kv, n, e]`; returns
///   `[b, h, n, e]`; or all of them without the axis b.
///
/// # Conventions
/// Tensors are of the operator's type, on the candle device that [`Device::from_candle`] was given.
/// Those that lie in memory as `[h, b, n, d]` without gaps, as a batch of one usually does, are
/// used where they lie, others copied; the output lies so too. There is no mask of keys here.
///
/// Scratch is one for all calls; before one from another thread than the last, all that the GPU has
/// to do is waited for, since candle's usual stream is another one in each thread.
///
/// # Errors
/// [`Error::Tensor`] for tensors of another rank, type or device, [`Error::Dijiang`] for axes of
/// other lengths and [`Error`]'s others, all of them within a [`candle_core::Error::Wrapped`].
#[derive(Debug, Clone)]
pub struct CandleAttention<E>(Arc<Shared<E>>);

#[derive(Debug)]
struct Shared<E> {
    attention: Attention<E>,
    scratch: Mutex<Scratch<E>>,
}

#[derive(Debug, Default)]
struct Scratch<E> {
    /// That used it last.
    thread: Option<ThreadId>,
    forward: Workspace<E>,
    backward: BackwardWorkspace<E>,
}

impl<E: TensorElement> CandleAttention<E> {
    /// This operator, made for a device that [`Device::from_candle`] gave.
    pub fn new(attention: Attention<E>) -> Self {
        Self(Arc::new(Shared { attention, scratch: Mutex::default() }))
    }

    /// The operator, which makes pools and reads and writes their states.
    pub fn attention(&self) -> &Attention<E> {
        &self.0.attention
    }

    /// Whole sequences. An operation of candle's graph: the output has gradients with respect to
    /// q, k and v, where the operator has windows. Those of maps and decays are no tensors, see
    /// [`Attention::backward_with_maps`].
    ///
    /// # Errors
    /// As the type says.
    pub fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (sizes, [q, k, v]) = self.inputs(q, k, v)?;
        let op = Attend { shared: Arc::clone(&self.0), offsets: sizes.offsets() };
        sizes.batch_first(q.apply_op3(&k, &v, op)?)
    }

    /// The next tokens of some streams, sequence i of the batch for stream `streams[i]`. The
    /// output has no gradients.
    ///
    /// # Errors
    /// As the type says; [`Error::Length`] and [`Error::Value`] for `streams`.
    pub fn prefill(
        &self,
        pool: &mut Pool<E>,
        streams: &[usize],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        self.continued(self.inputs(q, k, v)?, |qkv, out, workspace| {
            self.0.attention.prefill(pool, streams, qkv, out, workspace)
        })
    }

    /// The next token of some streams, in one kernel: as [`prefill`](Self::prefill) with n = 1.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn step(
        &self,
        pool: &mut Pool<E>,
        streams: &[usize],
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor> {
        let (sizes, inputs) = self.inputs(q, k, v)?;
        if sizes.tokens != 1 {
            let axis = q.rank() - 2;
            return Err(wrong_axis("q", axis, 1, sizes.tokens).into());
        }
        self.continued((sizes, inputs), |qkv, out, workspace| {
            self.0.attention.step(pool, streams, qkv, out, workspace)
        })
    }

    fn continued(
        &self,
        (sizes, inputs): (Sizes, [Tensor; 3]),
        work: impl FnOnce(Qkv<'_, E>, &mut CudaSlice<E>, &mut Workspace<E>) -> crate::Result<()>,
    ) -> Result<Tensor> {
        let locks = inputs.each_ref().map(|x| x.storage_and_layout().0);
        let [q, k, v] = [on_gpu("q", &locks[0])?, on_gpu("k", &locks[1])?, on_gpu("v", &locks[2])?];
        let out = self.0.run([q, k, v], inputs[0].dims(), &sizes.offsets(), work)?;
        sizes.batch_first(Tensor::from_storage(
            Storage::Cuda(out.0),
            out.1,
            BackpropOp::none(),
            false,
        ))
    }

    /// Checked, and as the kernels want them: `[h, b, n, d]` without gaps.
    fn inputs(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Sizes, [Tensor; 3])> {
        let Attention { device, shape, heads, .. } = &self.0.attention;
        for (argument, x) in [("q", q), ("k", k), ("v", v)] {
            match x.device() {
                candle_core::Device::Cuda(of)
                    if Arc::ptr_eq(&of.cuda_stream(), device.stream()) => {}
                other => return Err(elsewhere(argument, other).into()),
            }
            if x.dtype() != E::DTYPE {
                let (expected, got) = (format!("of type {}", E::NAME), format!("{:?}", x.dtype()));
                return Err(Error::Tensor { argument, expected, got }.into());
            }
        }
        let kv_heads = shape.kv_heads();
        let sizes = Sizes::of(
            [("q", q.dims()), ("k", k.dims()), ("v", v.dims())],
            [[*heads, shape.dim], [kv_heads, shape.dim], [kv_heads, shape.value_dim]],
        )?;
        let heads_first = |x: &Tensor| match sizes.batch {
            Some(_) => whole::<E>(&x.transpose(0, 1)?),
            None => whole::<E>(x),
        };
        Ok((sizes, [heads_first(q)?, heads_first(k)?, heads_first(v)?]))
    }
}

impl<E: TensorElement> Shared<E> {
    /// Outputs of tokens that lie at these places, and their shape.
    fn run(
        &self,
        [q, k, v]: [&CudaStorage; 3],
        dims: &[usize],
        offsets: &[usize],
        work: impl FnOnce(Qkv<'_, E>, &mut CudaSlice<E>, &mut Workspace<E>) -> crate::Result<()>,
    ) -> Result<(CudaStorage, Shape)> {
        let mut dims = dims.to_vec();
        if let Some(width) = dims.last_mut() {
            *width = self.attention.shape.value_dim;
        }
        let shape = Shape::from(dims);
        let qkv = Qkv::new(q.as_cuda_slice()?, k.as_cuda_slice()?, v.as_cuda_slice()?);
        let mut out = self.alloc(shape.elem_count())?;
        work(qkv.with_offsets(offsets), &mut out, &mut self.scratch()?.forward)?;
        Ok((CudaStorage::wrap_cuda_slice(out, q.device.clone()), shape))
    }

    /// Room for what the kernels write.
    fn alloc(&self, len: usize) -> crate::Result<CudaSlice<E>> {
        // SAFETY: outputs and gradients are written, all of them, before anybody reads them.
        Ok(unsafe { self.attention.device.stream().alloc(len) }?)
    }

    /// candle's usual stream is another one in each thread, and does not wait for the others.
    fn scratch(&self) -> crate::Result<MutexGuard<'_, Scratch<E>>> {
        let mut scratch = self.scratch.lock().unwrap_or_else(PoisonError::into_inner);
        let thread = Some(thread::current().id());
        if scratch.thread != thread {
            self.attention.device.stream().context().synchronize()?;
            scratch.thread = thread;
        }
        Ok(scratch)
    }
}

/// Attention of tensors that are `[h, b, n, d]`, or `[h, n, d]`, each the whole of its memory.
struct Attend<E> {
    shared: Arc<Shared<E>>,
    offsets: Vec<usize>,
}

impl<E: TensorElement> CustomOp3 for Attend<E> {
    fn name(&self) -> &'static str {
        "dijiang-cuda-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        Err(elsewhere("q", &candle_core::Device::Cpu).into())
    }

    fn cuda_fwd(
        &self,
        q: &CudaStorage,
        layout: &Layout,
        k: &CudaStorage,
        _: &Layout,
        v: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        let Self { shared, offsets } = self;
        shared.run([q, k, v], layout.dims(), offsets, |qkv, out, workspace| {
            shared.attention.forward(qkv, out, workspace)
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad_out: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad_out = whole::<E>(grad_out)?;
        let locks = [q, k, v, &grad_out].map(|x| x.storage_and_layout().0);
        let [of_q, of_k, of_v] =
            [on_gpu("q", &locks[0])?, on_gpu("k", &locks[1])?, on_gpu("v", &locks[2])?];
        let grad = on_gpu("grad_out", &locks[3])?.as_cuda_slice()?;
        let qkv = Qkv::new(of_q.as_cuda_slice()?, of_k.as_cuda_slice()?, of_v.as_cuda_slice()?);
        let [mut dq, mut dk, mut dv] = [
            self.shared.alloc(q.elem_count())?,
            self.shared.alloc(k.elem_count())?,
            self.shared.alloc(v.elem_count())?,
        ];
        let gradients = InputGradients { q: &mut dq, k: &mut dk, v: &mut dv };
        let workspace = &mut self.shared.scratch()?.backward;
        let qkv = qkv.with_offsets(&self.offsets);
        self.shared.attention.backward(qkv, grad, gradients, workspace)?;
        let like = |x: &Tensor, slice| Some(tensor(slice, &of_q.device, x.shape()));
        Ok((like(q, dq), like(k, dk), like(v, dv)))
    }
}

/// A tensor of what was just computed.
fn tensor<E: TensorElement>(slice: CudaSlice<E>, device: &CudaDevice, shape: &Shape) -> Tensor {
    let storage = CudaStorage::wrap_cuda_slice(slice, device.clone());
    Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false)
}

/// The tensor, copied if its memory has gaps or more than the tensor in it.
fn whole<E: TensorElement>(x: &Tensor) -> Result<Tensor> {
    let is_whole = {
        let (storage, layout) = x.storage_and_layout();
        let len = on_gpu("tensor", &storage)?.as_cuda_slice::<E>()?.len();
        layout.contiguous_offsets() == Some((0, len))
    };
    if is_whole { Ok(x.clone()) } else { x.force_contiguous() }
}

fn on_gpu<'a>(argument: &'static str, storage: &'a Storage) -> crate::Result<&'a CudaStorage> {
    match storage {
        Storage::Cuda(storage) => Ok(storage),
        other => Err(elsewhere(argument, &other.device())),
    }
}

fn elsewhere(argument: &'static str, device: &candle_core::Device) -> Error {
    let place = "on the CUDA device that the operator shares its stream with; ";
    let other = "attention of CPU tensors is in the crate dijiang, feature candle";
    let (expected, got) = (format!("{place}{other}"), format!("{:?}", device.location()));
    Error::Tensor { argument, expected, got }
}

fn wrong_axis(argument: &'static str, axis: usize, expected: usize, got: usize) -> Error {
    dijiang::Error::Shape { argument, axis, expected, got }.into()
}

/// Sizes of q, k and v that fit each other.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Sizes {
    /// If there is such an axis.
    batch: Option<usize>,
    tokens: usize,
}

impl Sizes {
    /// From q's, the first; each has so many heads, and so many elements in a row.
    fn of(
        tensors: [(&'static str, &[usize]); 3],
        expected: [[usize; 2]; 3],
    ) -> crate::Result<Self> {
        let (_, dims) = tensors[0];
        let sizes = match *dims {
            [_, tokens, _] => Self { batch: None, tokens },
            [batch, _, tokens, _] => Self { batch: Some(batch), tokens },
            _ => {
                let expected = "of three or four axes".to_owned();
                let got = format!("{dims:?}");
                return Err(Error::Tensor { argument: "q", expected, got });
            }
        };
        for ((argument, dims), [heads, width]) in tensors.into_iter().zip(expected) {
            let expected = sizes.batch.into_iter().chain([heads, sizes.tokens, width]);
            let expected = expected.collect::<Vec<_>>();
            if dims.len() != expected.len() {
                let (expected, got) =
                    (format!("of {} axes, as q", expected.len()), format!("{dims:?}"));
                return Err(Error::Tensor { argument, expected, got });
            }
            for (axis, (&got, expected)) in dims.iter().zip(expected).enumerate() {
                if got != expected {
                    return Err(wrong_axis(argument, axis, expected, got));
                }
            }
        }
        if sizes.batch == Some(0) || sizes.tokens == 0 {
            return Err(dijiang::Error::Empty { argument: "q" }.into());
        }
        Ok(sizes)
    }

    /// Where the sequences begin, and where the last one ends.
    fn offsets(&self) -> Vec<usize> {
        (0..=self.batch.unwrap_or(1)).map(|i| i * self.tokens).collect()
    }

    /// From the kernels' order of axes to the caller's.
    fn batch_first(&self, out: Tensor) -> Result<Tensor> {
        if self.batch.is_some() { out.transpose(0, 1) } else { Ok(out) }
    }
}

/// candle's functions return candle's errors; ours keep their message.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sizes(q: &[usize], k: &[usize], v: &[usize]) -> crate::Result<Sizes> {
        Sizes::of([("q", q), ("k", k), ("v", v)], [[4, 64], [2, 64], [2, 128]])
    }

    #[test]
    fn sequences_of_a_batch_lie_one_after_the_other() {
        let batch = sizes(&[3, 4, 10, 64], &[3, 2, 10, 64], &[3, 2, 10, 128]).expect("they fit");
        assert_eq!(batch, Sizes { batch: Some(3), tokens: 10 });
        assert_eq!(batch.offsets(), [0, 10, 20, 30]);
        let one = sizes(&[4, 10, 64], &[2, 10, 64], &[2, 10, 128]).expect("they fit");
        assert_eq!(one.offsets(), [0, 10]);
    }

    #[test]
    fn errors_name_the_tensor_and_the_axis() {
        let [q, k, v] = [[3, 4, 10, 64], [3, 2, 10, 64], [3, 2, 10, 128]];
        let said = |sizes: crate::Result<Sizes>| sizes.map_err(|error| error.to_string());
        let axis = |argument, axis, expected, got| {
            Err(format!("{argument}: axis {axis} must have length {expected}, got {got}"))
        };
        assert_eq!(said(sizes(&[3, 2, 10, 64], &k, &v)), axis("q", 1, 4, 2));
        assert_eq!(said(sizes(&q, &[3, 2, 11, 64], &v)), axis("k", 2, 10, 11));
        assert_eq!(said(sizes(&q, &k, &k)), axis("v", 3, 128, 64));
        assert_eq!(said(sizes(&q, &k, &[1, 2, 10, 128])), axis("v", 0, 3, 1));
        let rank = "v must be of 4 axes, as q, got [2, 10, 128]";
        assert_eq!(said(sizes(&q, &k, &v[1..])), Err(rank.into()));
        let rank = "q must be of three or four axes, got [10, 64]";
        assert_eq!(said(sizes(&q[2..], &k, &v)), Err(rank.into()));
        let [q, k, v] = [[3, 4, 0, 64], [3, 2, 0, 64], [3, 2, 0, 128]];
        assert_eq!(said(sizes(&q, &k, &v)), Err("q must not be empty".into()));
    }

    #[test]
    fn the_cpu_is_elsewhere() {
        let error = Device::from_candle(&candle_core::Device::Cpu).expect_err("it is no GPU");
        assert!(error.to_string().contains("in the crate dijiang, feature candle"), "{error}");
    }
}
