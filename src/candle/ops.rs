//! Linear attention on tensors, with gradients.
//!
//! An operation of candle may have three inputs; attention has four, q, k, v and the numbers of its
//! maps. So it is two nodes of the graph: `Bind` takes q, k and v and yields one number, `Attend`
//! takes that and the maps and computes. On the way back `Attend` computes all gradients at once
//! and leaves those of q, k and v in a ledger; the gradient of the number is the page they are on,
//! from which `Bind` picks them up. No copy of q, k or v is made either way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Device, Layout, Result, Shape, Tensor};

use super::maps::{MapTensors, packed_gradients};
use super::tensors::{Element, HeadLayout, Reading, Sizes, check_dtype, mask_rows, working_dtype};
use crate::attention::Causality;
use crate::attention::{KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Window};
use crate::check::check_room;
use crate::error::Error;
use crate::kernel::DctMap;

/// The choices of [`causal`] and [`full`].
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct AttentionOptions<'a> {
    /// Order of the axes of q, k, v and the output. Default: [`HeadLayout::HeadsFirst`].
    pub layout: HeadLayout,
    /// Softmax scale σ. Default: 1/√d.
    pub scale: Option<f64>,
    /// The exact local window of causal attention, per key-value head or one for all. Default:
    /// none.
    pub windows: &'a [Window],
    /// Tokens at the beginning that stay exact for every later query. Default: 0.
    pub sinks: usize,
    /// Keys that may be attended to: `[b, n_k]` of type U8, everything but 0 means yes. Default:
    /// all.
    pub key_mask: Option<&'a Tensor>,
}

impl<'a> AttentionOptions<'a> {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Order of the axes.
    #[must_use]
    pub fn with_layout(self, layout: HeadLayout) -> Self {
        Self { layout, ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Exact local windows, and how many tokens at the beginning stay exact.
    #[must_use]
    pub fn with_windows(self, windows: &'a [Window], sinks: usize) -> Self {
        Self { windows, sinks, ..self }
    }

    /// Keys that may be attended to.
    #[must_use]
    pub fn with_key_mask(self, key_mask: &'a Tensor) -> Self {
        Self { key_mask: Some(key_mask), ..self }
    }
}

/// Causal linear attention: [`Operator::forward`] of every sequence of a batch.
///
/// # Shapes
/// In the order of [`HeadLayout`], here `[b, h, n, d]`:
/// - `q`: `[b, h, n, d]`, `k`: `[b, h_kv, n, d]`, `v`: `[b, h_kv, n, e]`; `maps`: h_kv; returns
///   `[b, h, n, e]`, without gaps.
///
/// # Conventions
/// q, k and v of type f32 or f64, with any strides, also those of a broadcast; f16 and bf16 are
/// computed in f32. σ is applied here. The output has gradients with respect to q, k, v and every
/// tensor of `maps` but the signs; a gradient of a gradient it has not.
///
/// # Cost
/// O(n), heads in parallel. Forward and backward build the maps' tables, at most O(m·d·log d) per
/// head; backward takes about three times the time of forward. Nothing is kept for it but q, k and
/// v themselves.
///
/// # Errors
/// [`Error::Tensor`] for tensors of another rank, type or device, [`Error::Shape`] for sizes that
/// do not fit, [`Error::Empty`] for an empty batch, [`Error::TooLarge`] for tensors and outputs
/// there is no room for, broadcast ones counted whole, and those of [`Operator::forward`] and
/// [`DctMap::from_params`], all of them within a [`candle_core::Error::Wrapped`].
pub fn causal(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    maps: &[MapTensors],
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    attention(Causality::Causal, q, k, v, maps, options)
}

/// Full linear attention, bidirectional or cross: [`Operator::forward`] of every sequence of a
/// batch.
///
/// # Shapes
/// As for [`causal`], where k and v may have another number of tokens than q.
///
/// # Errors
/// As [`causal`]; [`Error::Conflict`] with a local window, sinks or decay.
pub fn full(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    maps: &[MapTensors],
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    attention(Causality::Bidirectional, q, k, v, maps, options)
}

fn attention(
    causality: Causality,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    maps: &[MapTensors],
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    let dtype = q.dtype();
    let working = working_dtype("q", dtype)?;
    check_dtype("k", k, dtype, "of the type of q")?;
    check_dtype("v", v, dtype, "of the type of q")?;
    let sizes = check_shapes(causality, q, k, v, maps, options)?;
    for (argument, x) in [("q", q), ("k", k), ("v", v)] {
        match working {
            DType::F64 => check_room::<f64>(argument, x.dims())?,
            _ => check_room::<f32>(argument, x.dims())?,
        }
    }
    let [q, k, v] = [q.to_dtype(working)?, k.to_dtype(working)?, v.to_dtype(working)?];
    let out = match working {
        DType::F64 => run::<f64>(causality, sizes, q, k, v, maps, options),
        _ => run::<f32>(causality, sizes, q, k, v, maps, options),
    };
    out?.to_dtype(dtype)
}

/// Sizes of q, and e.
fn check_shapes(
    causality: Causality,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    maps: &[MapTensors],
    options: &AttentionOptions<'_>,
) -> crate::Result<(Sizes, usize)> {
    let layout = options.layout;
    let sizes = Sizes::of("q", q, layout)?;
    if sizes.batch == 0 || sizes.tokens == 0 {
        return Err(Error::Empty { argument: "q" });
    }
    let Some(map) = maps.first() else { return Err(Error::Empty { argument: "maps" }) };
    sizes.check("q", Sizes { dim: map.query.center.elem_count(), ..sizes }, layout)?;
    let keys = Sizes::of("k", k, layout)?;
    if keys.tokens == 0 {
        return Err(Error::Empty { argument: "k" });
    }
    let tokens = if causality == Causality::Causal { sizes.tokens } else { keys.tokens };
    keys.check("k", Sizes { heads: maps.len(), tokens, ..sizes }, layout)?;
    let values = Sizes::of("v", v, layout)?;
    values.check("v", Sizes { dim: values.dim, ..keys }, layout)?;
    Ok((sizes, values.dim))
}

fn run<T: Element>(
    causality: Causality,
    (sizes, value_dim): (Sizes, usize),
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: &[MapTensors],
    options: &AttentionOptions<'_>,
) -> Result<Tensor> {
    let params = MapTensors::pack(maps)?;
    let config = LinearConfig {
        causality,
        scale: options.scale,
        windows: options.windows.to_vec(),
        sinks: options.sinks,
        ..LinearConfig::new()
    };
    let attention =
        build::<T>(config.with_heads(sizes.heads).with_value_dim(value_dim), maps, &params)?;
    let valid = match options.key_mask {
        Some(mask) => Some(mask_rows(mask, sizes.batch, k.dim(options.layout.axes().1)?)?),
        None => None,
    };
    let problem = Problem { attention, layout: options.layout, valid };
    if [&q, &k, &v, &params].iter().all(|tensor| !tensor.track_op()) {
        let (out, shape) = problem.forward(&q, &k, &v)?;
        return Tensor::from_vec(out, shape, &Device::Cpu);
    }
    let ledger = Arc::new(Ledger::default());
    let bound = q.apply_op3(&k, &v, Bind(Arc::clone(&ledger)))?;
    params
        .apply_op2(&bound, Attend { problem, inputs: [q.detach(), k.detach(), v.detach()], ledger })
}

/// The operator of these maps; `params` is what [`MapTensors::pack`] made of them.
pub(super) fn build<T: Element>(
    config: LinearConfig,
    maps: &[MapTensors],
    params: &Tensor,
) -> Result<LinearAttention<T, DctMap<T>>> {
    let values = params.to_vec1::<f64>()?;
    let mut rest = &values[..];
    let (mut built, mut log_decay) =
        (Vec::with_capacity(maps.len()), Vec::with_capacity(maps.len()));
    for map in maps {
        let (params, decay) = map.read(&mut rest)?;
        built.push(DctMap::from_params(params)?);
        log_decay.push(decay);
    }
    Ok(config.with_log_decay(log_decay).build(built)?)
}

/// Attention of a batch, whatever its tensors.
struct Problem<T> {
    attention: LinearAttention<T, DctMap<T>>,
    layout: HeadLayout,
    /// `[b, n_k]`.
    valid: Option<Vec<Vec<bool>>>,
}

/// Gradients of one backward pass.
struct Gradients<T> {
    /// In the order `[b, h, n, d]`, with h, n and d of each.
    inputs: [(Vec<T>, [usize; 3]); 3],
    /// As [`MapTensors::pack`].
    params: Vec<f64>,
}

impl<T: Element> Problem<T> {
    fn mask(&self, sequence: usize) -> KeyMask<'_> {
        self.valid.as_ref().map_or(KeyMask::All, |valid| KeyMask::Valid(&valid[sequence]))
    }

    fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Vec<T>, Shape)> {
        let Sizes { batch, heads, tokens, .. } = Sizes::of("q", q, self.layout)?;
        let value_dim = v.dim(3)?;
        check_room::<T>("outputs", &[batch, heads, tokens, value_dim])?;
        let mut out = vec![T::ZERO; batch * heads * tokens * value_dim];
        let [q, k, v] =
            [("q", q), ("k", k), ("v", v)].map(|(name, x)| Reading::new(name, x, self.layout));
        let mut workspace = self.attention.workspace();
        for (i, out) in out.chunks_exact_mut((heads * tokens * value_dim).max(1)).enumerate() {
            let mut out = self.layout.split(out, [heads, tokens, value_dim])?;
            let (q, k, v) = (q.sequence(i)?, k.sequence(i)?, v.sequence(i)?);
            let qkv = Qkv::new(&q, &k, &v).with_mask(self.mask(i));
            self.attention.forward_into(qkv, &mut out, &mut workspace)?;
        }
        Ok((out, self.layout.shape([batch, heads, tokens, value_dim])))
    }

    fn backward(&self, [q, k, v]: &[Tensor; 3], grad: &Tensor) -> Result<Gradients<T>> {
        let batch = q.dim(0)?;
        let mut inputs = [(); 3].map(|()| (Vec::new(), [0; 3]));
        let mut params: Vec<f64> = Vec::new();
        let [q, k, v, grad] = [("q", q), ("k", k), ("v", v), ("grad_out", grad)]
            .map(|(name, x)| Reading::new(name, x, self.layout));
        for i in 0..batch {
            let (q, k, v, grad) =
                (q.sequence(i)?, k.sequence(i)?, v.sequence(i)?, grad.sequence(i)?);
            let qkv = Qkv::new(&q, &k, &v).with_mask(self.mask(i));
            let gradients = self.attention.backward(qkv, &grad)?;
            for ((all, shape), one) in
                inputs.iter_mut().zip([gradients.q, gradients.k, gradients.v])
            {
                *shape = one.dim().into();
                let (one, _) = one.into_raw_vec_and_offset();
                if all.is_empty() { *all = one } else { all.extend(one) }
            }
            let heads = gradients.maps.iter().zip(gradients.log_decay);
            let heads = heads.flat_map(|(map, log_decay)| packed_gradients(map, log_decay));
            if params.is_empty() {
                params.extend(heads)
            } else {
                params.iter_mut().zip(heads).for_each(|(sum, x)| *sum += x)
            }
        }
        Ok(Gradients { inputs, params })
    }

    /// A gradient as a tensor of the shape of its input.
    fn tensor(&self, (values, [h, n, d]): (Vec<T>, [usize; 3])) -> Result<Tensor> {
        let batch = values.len() / (h * n * d).max(1);
        let tensor = Tensor::from_vec(values, (batch, h, n, d), &Device::Cpu)?;
        match self.layout {
            HeadLayout::HeadsFirst => Ok(tensor),
            HeadLayout::TokensFirst => tensor.transpose(1, 2),
        }
    }
}

/// Gradients of q, k and v that wait to be picked up, by page number.
#[derive(Default)]
struct Ledger(Mutex<Pages>);

#[derive(Default)]
struct Pages {
    next: u64,
    waiting: HashMap<u64, [Tensor; 3]>,
}

impl Ledger {
    fn write(&self, gradients: [Tensor; 3]) -> f64 {
        let mut pages = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pages.next += 1;
        let page = pages.next;
        pages.waiting.insert(page, gradients);
        page as f64
    }

    fn take(&self, page: f64) -> Option<[Tensor; 3]> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).waiting.remove(&(page as u64))
    }
}

/// q, k, v to one number, which stands for all three of them.
struct Bind(Arc<Ledger>);

impl CustomOp3 for Bind {
    fn name(&self) -> &'static str {
        "dijiang-bind"
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
        Ok((CpuStorage::F64(vec![0.0]), Shape::from(1)))
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        page: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let page = page.to_vec1::<f64>()?.iter().sum();
        match self.0.take(page) {
            Some([q, k, v]) => Ok((Some(q), Some(k), Some(v))),
            None => Err(candle_core::Error::BackwardNotSupported { op: "dijiang-bind" }),
        }
    }
}

/// The numbers of the maps, and what stands for q, k and v, to the output.
struct Attend<T> {
    problem: Problem<T>,
    inputs: [Tensor; 3],
    ledger: Arc<Ledger>,
}

impl<T: Element> CustomOp2 for Attend<T> {
    fn name(&self) -> &'static str {
        "dijiang-attention"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let [q, k, v] = &self.inputs;
        let (out, shape) = self.problem.forward(q, k, v)?;
        Ok((T::to_cpu_storage_owned(out), shape))
    }

    fn bwd(
        &self,
        params: &Tensor,
        bound: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Gradients { inputs, params: grad_params } =
            self.problem.backward(&self.inputs, grad)?;
        let grad_params = params
            .track_op()
            .then(|| Tensor::from_vec(grad_params, params.shape(), &Device::Cpu))
            .transpose()?;
        if !bound.track_op() {
            return Ok((grad_params, None));
        }
        let [q, k, v] = inputs.map(|gradient| self.problem.tensor(gradient));
        let page = self.ledger.write([q?, k?, v?]);
        Ok((grad_params, Some(Tensor::new(&[page], &Device::Cpu)?)))
    }
}
