//! [`Attention`]: an operator of the CPU crate, on a GPU.

use std::marker::PhantomData;
use std::sync::OnceLock;

use cudarc::driver::{
    CudaFunction, CudaSlice, DevicePtr, DevicePtrMut, DeviceRepr, LaunchConfig, PushKernelArg,
};
use dijiang::attention::{Causality, LinearAttention, Window};
use dijiang::kernel::{DctMap, Envelope, FeatureMap};
use dijiang::{Real, attention::CausalState};

use crate::bytes::{KeySides, Shape, decode, encode, foreign};
use crate::call::{Call, Head, Part, Plan, SINKS, TILE, tiles};
use crate::compile::Program;
use crate::device::{BackwardKernels, Device, Kernels};
use crate::element::Element;
use crate::error::{Error, Result, check_len};
use crate::pool::{Pool, Stream};
use crate::tables::Side;

/// Threads of a block.
pub(crate) const THREADS: u32 = 128;

/// Causal linear attention with windows and sinks, on a GPU: what
/// [`LinearAttention`] computes, with the same maps. Immutable; what changes lives in [`Pool`] and
/// [`Workspace`].
#[derive(Debug)]
pub struct Attention<E> {
    pub(crate) device: Device,
    kernels: Kernels,
    /// Compiled when they are first asked for.
    pub(crate) backward: OnceLock<BackwardKernels>,
    pub(crate) shape: Shape,
    pub(crate) heads: usize,
    /// What gradients of parameters are made with.
    pub(crate) maps: Vec<DctMap<f64>>,
    envelope: bool,
    /// Bytes of a stream's state.
    state_bytes: usize,
    of_heads: CudaSlice<Head>,
    projections: CudaSlice<E>,
    wide: CudaSlice<f32>,
    rows: CudaSlice<f32>,
}

/// Queries, keys and values on the device, with their mask and their sequences.
///
/// # Shapes
/// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, without gaps.
#[derive(Debug, Clone, Copy)]
pub struct Qkv<'a, E> {
    pub(crate) q: &'a CudaSlice<E>,
    pub(crate) k: &'a CudaSlice<E>,
    pub(crate) v: &'a CudaSlice<E>,
    mask: Option<&'a [bool]>,
    offsets: Option<&'a [usize]>,
}

impl<'a, E> Qkv<'a, E> {
    /// One sequence, every key of which takes part.
    pub fn new(q: &'a CudaSlice<E>, k: &'a CudaSlice<E>, v: &'a CudaSlice<E>) -> Self {
        Self { q, k, v, mask: None, offsets: None }
    }

    /// Keys that take part, one entry for each of the n tokens.
    #[must_use]
    pub fn with_mask(self, mask: &'a [bool]) -> Self {
        Self { mask: Some(mask), ..self }
    }

    /// Several sequences, one after the other: sequence i has the tokens `offsets[i]` to
    /// `offsets[i + 1]`.
    #[must_use]
    pub fn with_offsets(self, offsets: &'a [usize]) -> Self {
        Self { offsets: Some(offsets), ..self }
    }
}

/// Scratch on the device; grows with the longest call.
#[derive(Debug, Default)]
pub struct Workspace<E> {
    sequences: Option<CudaSlice<crate::call::Sequence>>,
    mask: Option<CudaSlice<u8>>,
    segment_sums: Option<CudaSlice<f32>>,
    means: Option<CudaSlice<E>>,
    mean_unit: Option<CudaSlice<f32>>,
    mean_level: Option<CudaSlice<f32>>,
}

impl<E: Element> Attention<E> {
    /// The operator on `device`: its maps are copied there, and the kernels made.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for what these kernels cannot: attention that is bidirectional,
    /// chunks that are no multiple of 64, head and value dimensions other than 64
    /// and 128, features other than 64, 128 and 256, more than 16 sinks, maps of which some have an
    /// envelope and some do not. [`Error::NoCompiler`], [`Error::Compile`], [`Error::Driver`].
    pub fn new<T: Real>(
        device: &Device,
        attention: &LinearAttention<T, DctMap<T>>,
    ) -> Result<Self> {
        let shape = Shape::of(attention)?;
        let (sides, envelope) = sides(attention)?;
        let program = match shape.windowless {
            Some(_) => Program::Windowless,
            None => Program::Forward,
        };
        let kernels = device.kernels::<E>(program, shape.sizes())?;
        let (mut heads, mut state_bytes) = (Vec::new(), 0);
        for (window, decay) in shape.windows.iter().zip(&shape.log_decay) {
            let (tiles, back) = tiles(*window)?;
            let (ring, decay) = (window.tokens() as i32, (decay * std::f64::consts::LOG2_E) as f32);
            heads.push(Head { tiles, back, ring, decay, state: state_bytes as u64 });
            state_bytes += shape.head_bytes::<E>(window.tokens());
        }
        let (mut projections, mut wide, mut rows) = (Vec::new(), Vec::new(), Vec::new());
        for side in &sides {
            let [high, low] = side.split::<E>();
            projections.extend(high);
            if size_of::<E>() == 2 {
                projections.extend(low);
            }
            wide.extend(side.matrix.iter().map(|&w| w as f32));
            rows.extend(side.row.iter().map(|&row| row as f32));
        }
        device.check_shared(shared_bytes::<E>(&shape).max(step_bytes(&shape)))?;
        let maps = attention.maps().iter().map(|map| DctMap::from_params(map.params().clone()));
        let maps = maps.collect::<Result<Vec<_>, _>>()?;
        let stream = device.stream();
        Ok(Self {
            kernels,
            maps,
            backward: OnceLock::new(),
            heads: attention.heads(),
            envelope,
            state_bytes,
            of_heads: stream.clone_htod(&heads)?,
            projections: stream.clone_htod(&projections)?,
            wide: stream.clone_htod(&wide)?,
            rows: stream.clone_htod(&rows)?,
            shape,
            device: device.clone(),
        })
    }

    /// Empty states for this many streams.
    ///
    /// # Errors
    /// [`Error::Driver`] if there is no room for them.
    pub fn new_pool(&self, streams: usize) -> Result<Pool<E>> {
        Ok(Pool {
            states: self.device.stream().alloc_zeros((streams * self.state_bytes).max(1))?,
            streams: vec![Stream::default(); streams],
            fingerprint: self.shape.fingerprint,
            element: PhantomData,
        })
    }

    /// Whole sequences: `out` is `[h, n, e]`. Work is put on the device's stream and not waited
    /// for.
    ///
    /// # Errors
    /// [`Error::Length`], [`Error::Value`], [`Error::Driver`].
    pub fn forward(
        &self,
        qkv: Qkv<'_, E>,
        out: &mut CudaSlice<E>,
        workspace: &mut Workspace<E>,
    ) -> Result<()> {
        let n = self.check(&qkv)?;
        check_len("out", self.heads * n * self.shape.value_dim, out.len())?;
        let plan = self.whole(n, &qkv)?;
        let call = self.call(&plan, &qkv, None, workspace)?;
        let out = out.device_ptr_mut(self.device.stream()).0;
        self.many(&plan, Call { out, ..call })
    }

    /// The next tokens of some streams: sequence i of `qkv` belongs to stream `streams[i]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`Error::Value`] for a stream that is not there, or twice.
    pub fn prefill(
        &self,
        pool: &mut Pool<E>,
        streams: &[usize],
        qkv: Qkv<'_, E>,
        out: &mut CudaSlice<E>,
        workspace: &mut Workspace<E>,
    ) -> Result<()> {
        let n = self.check(&qkv)?;
        check_len("out", self.heads * n * self.shape.value_dim, out.len())?;
        let whole = [0, n];
        let offsets = qkv.offsets.unwrap_or(&whole);
        let plan = self.continued(pool, streams, offsets, &qkv)?;
        let call = self.call(&plan, &qkv, Some(&mut pool.states), workspace)?;
        let out = out.device_ptr_mut(self.device.stream()).0;
        self.many(&plan, Call { out, ..call })?;
        let grid = (self.shape.kv_heads() as u32, plan.sequences.len() as u32, 16);
        self.launch(&self.kernels.keep, grid, THREADS, 0, call)?;
        advance(pool, &plan);
        Ok(())
    }

    /// The next token of each of some streams, in one kernel: token i of `qkv` belongs to stream
    /// `streams[i]`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill).
    pub fn step(
        &self,
        pool: &mut Pool<E>,
        streams: &[usize],
        qkv: Qkv<'_, E>,
        out: &mut CudaSlice<E>,
        workspace: &mut Workspace<E>,
    ) -> Result<()> {
        let n = self.check(&qkv)?;
        check_len("out", self.heads * n * self.shape.value_dim, out.len())?;
        check_len("streams", n, streams.len())?;
        let offsets: Vec<usize> = (0..=n).collect();
        let plan = self.continued(pool, streams, &offsets, &qkv)?;
        let call = self.call(&plan, &qkv, Some(&mut pool.states), workspace)?;
        let call = Call { out: out.device_ptr_mut(self.device.stream()).0, ..call };
        let grid = (self.shape.kv_heads() as u32, plan.sequences.len() as u32, 1);
        let bytes = shared_bytes::<E>(&self.shape).max(step_bytes(&self.shape));
        self.launch(&self.kernels.step, grid, THREADS, bytes, call)?;
        advance(pool, &plan);
        Ok(())
    }

    /// The state of a stream as [`CausalState::to_bytes`] writes it.
    ///
    /// # Errors
    /// [`Error::Value`] for a stream that is not there; [`Error::Driver`].
    pub fn state_to_bytes(&self, pool: &Pool<E>, stream: usize) -> Result<Vec<u8>> {
        self.check_pool(pool)?;
        let of_stream = pool.streams.get(stream).ok_or(no_stream(stream))?;
        let from = stream * self.state_bytes;
        let view = pool.states.slice(from..from + self.state_bytes);
        let state = self.device.stream().clone_dtoh(&view)?;
        Ok(encode::<E>(&self.shape, of_stream, &state))
    }

    /// A stream goes on from the state in `bytes`, of an f32 operator of this shape and with these
    /// maps.
    ///
    /// # Errors
    /// [`Error::Dijiang`] for bytes that are no such state, [`Error::Value`] for a stream that is
    /// not there or a state that does not begin at position 0; [`Error::Driver`].
    pub fn state_from_bytes(&self, pool: &mut Pool<E>, stream: usize, bytes: &[u8]) -> Result<()> {
        self.check_pool(pool)?;
        let of_stream = pool.streams.get_mut(stream).ok_or(no_stream(stream))?;
        let state = CausalState::<f32>::from_bytes(bytes)?;
        let (known, state) = decode::<E>(&self.shape, &state)?;
        let from = stream * self.state_bytes;
        let mut view = pool.states.slice_mut(from..from + self.state_bytes);
        self.device.stream().memcpy_htod(&state, &mut view)?;
        *of_stream = known;
        Ok(())
    }

    /// Whether a pool is of this operator.
    fn check_pool(&self, pool: &Pool<E>) -> Result<()> {
        check_len("states", pool.streams.len() * self.state_bytes, pool.states.len())?;
        match self.shape.fingerprint == pool.fingerprint {
            true => Ok(()),
            false => Err(foreign("pool", self.shape.fingerprint, pool.fingerprint)),
        }
    }

    /// How many tokens there are.
    pub(crate) fn check(&self, qkv: &Qkv<'_, E>) -> Result<usize> {
        let Shape { dim, value_dim, .. } = self.shape;
        let n = qkv.q.len() / (self.heads * dim);
        if n == 0 {
            return Err(Error::Length { argument: "q", expected: self.heads * dim, got: 0 });
        }
        check_len("q", self.heads * n * dim, qkv.q.len())?;
        check_len("k", self.shape.kv_heads() * n * dim, qkv.k.len())?;
        check_len("v", self.shape.kv_heads() * n * value_dim, qkv.v.len())?;
        qkv.mask.map_or(Ok(()), |mask| check_len("mask", n, mask.len()))?;
        if let Some(offsets) = qkv.offsets {
            let wrong = |expected, got| Err(Error::Value { argument: "offsets", expected, got });
            match (offsets.first(), offsets.last()) {
                (Some(&first), _) if first != 0 => return wrong("0 at first", first),
                (_, Some(&last)) if last == n => {}
                _ => return wrong("the number of tokens at last", offsets.len()),
            }
            if let Some(pair) = offsets.windows(2).find(|pair| pair[1] < pair[0]) {
                return wrong("in ascending order", pair[1]);
            }
        }
        Ok(n)
    }

    /// Sequences from their beginning.
    pub(crate) fn whole(&self, n: usize, qkv: &Qkv<'_, E>) -> Result<Plan> {
        let whole = [0, n];
        let offsets = qkv.offsets.unwrap_or(&whole);
        let part = |pair: &[usize]| {
            let rows = pair[0]..pair[1];
            Part { rows, position: 0, slot: None, sinks: &[] }
        };
        self.plan(offsets.windows(2).map(part), qkv)
    }

    fn plan<'p>(
        &self,
        parts: impl Iterator<Item = Part<'p>> + Clone,
        qkv: &Qkv<'_, E>,
    ) -> Result<Plan> {
        let blocks = self.shape.kv_heads() * self.shape.features / TILE;
        // Of 132 multiprocessors, as BLOCKS in kernels/softmax.cu.
        let small = self.shape.dim == 64 && self.shape.value_dim == 64 && size_of::<E>() == 2;
        let at_once = if small { 512 } else { 256 };
        Plan::new(parts, qkv.mask, self.shape.sinks, blocks, at_once)
    }

    fn continued(
        &self,
        pool: &Pool<E>,
        streams: &[usize],
        offsets: &[usize],
        qkv: &Qkv<'_, E>,
    ) -> Result<Plan> {
        check_len("streams", offsets.len() - 1, streams.len())?;
        self.check_pool(pool)?;
        let mut used = vec![false; pool.streams.len()];
        for &stream in streams {
            match used.get_mut(stream) {
                Some(used) if !*used => *used = true,
                Some(_) => {
                    let expected = "each stream once";
                    return Err(Error::Value { argument: "streams", expected, got: stream });
                }
                None => return Err(no_stream(stream)),
            }
        }
        let parts = streams.iter().zip(offsets.windows(2)).map(|(&stream, pair)| Part {
            rows: pair[0]..pair[1],
            position: pool.streams[stream].position,
            slot: Some(stream),
            sinks: &pool.streams[stream].sinks,
        });
        self.plan(parts, qkv)
    }

    /// Sums of segments, scan, means, outputs.
    pub(crate) fn many(&self, plan: &Plan, call: Call) -> Result<()> {
        let Shape { value_dim, features, .. } = self.shape;
        let (segments, tiles) = (plan.segments as u32, plan.tiles as u32);
        let (kv_heads, sequences) = (self.shape.kv_heads() as u32, plan.sequences.len() as u32);
        let (blocks, rows) = ((features / TILE) as u32, (features * value_dim / 256) as u32);
        let bytes = shared_bytes::<E>(&self.shape);
        let Kernels { absorb, scan, outputs, .. } = &self.kernels;
        let versions = Call { versions: 1, ..call };
        if plan.is_split() || call.states != 0 {
            self.launch(absorb, (segments * blocks, kv_heads, 1), THREADS, bytes, call)?;
            self.launch(scan, (rows, kv_heads, sequences), 256, 0, call)?;
        }
        self.launch(absorb, (segments * blocks, kv_heads, 1), THREADS, bytes, versions)?;
        self.launch(outputs, (tiles, self.heads as u32, 1), THREADS, bytes, call)
    }

    /// What the kernels are told, but for where the outputs go.
    pub(crate) fn call(
        &self,
        plan: &Plan,
        qkv: &Qkv<'_, E>,
        states: Option<&mut CudaSlice<u8>>,
        workspace: &mut Workspace<E>,
    ) -> Result<Call> {
        let stream = self.device.stream();
        let Shape { value_dim, features, scale, .. } = self.shape;
        let segments = plan.segments * self.shape.kv_heads();
        let versions = segments * plan.segment_tiles;
        let (sums, elements) = (features * (value_dim + 2), features * value_dim);
        let bytes = |mask: &[bool]| mask.iter().map(|&valid| u8::from(valid)).collect::<Vec<u8>>();
        let mask = match qkv.mask {
            Some(mask) => upload(&self.device, &mut workspace.mask, &bytes(mask))?,
            None => 0,
        };
        Ok(Call {
            q: qkv.q.device_ptr(stream).0,
            k: qkv.k.device_ptr(stream).0,
            v: qkv.v.device_ptr(stream).0,
            mask,
            heads: self.of_heads.device_ptr(stream).0,
            sequences: upload(&self.device, &mut workspace.sequences, &plan.sequences)?,
            count: plan.sequences.len() as i32,
            kv_heads: self.shape.kv_heads() as i32,
            group: (self.heads / self.shape.kv_heads()) as i32,
            tokens: (qkv.q.len() / (self.heads * self.shape.dim)) as i32,
            segment_tiles: plan.segment_tiles as i32,
            envelope: i32::from(self.envelope),
            scale: (scale * std::f64::consts::LOG2_E) as f32,
            projections: self.projections.device_ptr(stream).0,
            wide: self.wide.device_ptr(stream).0,
            rows: self.rows.device_ptr(stream).0,
            states: states.map_or(0, |states| states.device_ptr_mut(stream).0),
            state_bytes: self.state_bytes as u64,
            segment_sums: room(&self.device, &mut workspace.segment_sums, segments * sums)?,
            means: room(&self.device, &mut workspace.means, versions * elements)?,
            mean_unit: room(&self.device, &mut workspace.mean_unit, versions * features / TILE)?,
            mean_level: room(&self.device, &mut workspace.mean_level, versions * features)?,
            ..Call::default()
        })
    }

    fn launch(
        &self,
        kernel: &CudaFunction,
        grid: (u32, u32, u32),
        threads: u32,
        shared: usize,
        call: Call,
    ) -> Result<()> {
        let config = LaunchConfig {
            grid_dim: grid,
            block_dim: (threads, 1, 1),
            shared_mem_bytes: shared as u32,
        };
        // SAFETY: the kernels take one `Call`; `check` and `call` have made sure that all it points
        // to is as long as the plan says, and the stream keeps the order in which it is used.
        unsafe { self.device.stream().launch_builder(kernel).arg(&call).launch(config) }?;
        Ok(())
    }
}

/// Shared memory of a block, as `Tiles` in kernels/softmax.cu and `weights_at` in kernels/own.cu.
fn shared_bytes<E>(shape: &Shape) -> usize {
    let wide = size_of::<E>() == 4;
    let pack = if wide { 4 } else { 0 };
    let (key, value) = (shape.dim + pack, shape.value_dim + pack);
    let fixed = if wide { TILE + 4 + key } else { 0 };
    // Weights of two tiles, in 16 bits the sums of two.
    let weights = match shape.windowless {
        Some(_) => TILE * if wide { 2 * (TILE + pack) } else { 4 * TILE },
        None => 0,
    };
    (TILE * (2 * key + 2 * value + fixed) + weights) * size_of::<E>()
}

/// Shared memory for the weights of a decoded token over window, sinks and features.
fn step_bytes(shape: &Shape) -> usize {
    let longest = shape.windows.iter().map(|window| window.tokens()).max().unwrap_or(0);
    (longest + SINKS + shape.features) * size_of::<f32>()
}

fn no_stream(got: usize) -> Error {
    Error::Value { argument: "stream", expected: "less than the streams of the pool", got }
}

/// The streams have seen what the plan says.
fn advance<E>(pool: &mut Pool<E>, plan: &Plan) {
    for sequence in &plan.sequences {
        let stream = &mut pool.streams[sequence.slot as usize];
        stream.position = (sequence.position + sequence.n) as usize;
        stream.sinks = sequence.sink[..sequence.sinks as usize].to_vec();
    }
}

impl KeySides {
    fn of<T: Real>(attention: &LinearAttention<T, DctMap<T>>) -> Result<Self> {
        let (sides, envelope) = sides(attention)?;
        Ok(Self { sides: sides.into_iter().skip(1).step_by(2).collect(), envelope })
    }
}

/// Query and key side of every head, and whether the maps have an envelope.
fn sides<T: Real>(attention: &LinearAttention<T, DctMap<T>>) -> Result<(Vec<Side>, bool)> {
    let (mut sides, mut envelopes) = (Vec::new(), 0);
    for map in attention.maps() {
        envelopes += usize::from(map.params().envelope == Envelope::Gaussian);
        sides.extend(Side::both(map.params(), attention.scale())?);
    }
    if envelopes != 0 && envelopes != attention.maps().len() {
        return Err(Error::Unsupported {
            argument: "the number of maps with an envelope",
            expected: "none or all",
            got: envelopes,
        });
    }
    Ok((sides, envelopes > 0))
}

impl Shape {
    /// d, e and m.
    pub(crate) fn sizes(&self) -> [usize; 3] {
        [self.dim, self.value_dim, self.features]
    }

    /// The shape of an operator, if the kernels can do it.
    pub(crate) fn of<T: Real>(attention: &LinearAttention<T, DctMap<T>>) -> Result<Self> {
        let unsupported =
            |argument, expected, got| Err(Error::Unsupported { argument, expected, got });
        let (windows, windowless) = match attention.windows() {
            // A tile's keys are kept until it is full.
            [] => (vec![Window::new(TILE, 0); attention.maps().len()], Some(attention)),
            windows => (windows.to_vec(), None),
        };
        let shape = Self {
            dim: attention.maps()[0].dim(),
            value_dim: attention.value_dim(),
            features: attention.maps()[0].features(),
            scale: attention.scale(),
            sinks: attention.sinks(),
            windows,
            windowless: windowless.map(KeySides::of).transpose()?,
            log_decay: attention.log_decay().to_vec(),
            fingerprint: attention.fingerprint(),
        };
        if attention.causality() != Causality::Causal {
            return unsupported("the number of directions", "1 (causal attention)", 2);
        }
        for (argument, size) in [("dim", shape.dim), ("value_dim", shape.value_dim)] {
            if ![64, 128].contains(&size) {
                return unsupported(argument, "64 or 128", size);
            }
        }
        if ![64, 128, 256].contains(&shape.features) {
            return unsupported("features", "64, 128 or 256", shape.features);
        }
        if shape.sinks > SINKS {
            return unsupported("sinks", "at most 16", shape.sinks);
        }
        shape.windows.iter().try_for_each(|window| tiles(*window).map(drop))?;
        Ok(shape)
    }
}

/// The address of at least `len` elements.
pub(crate) fn room<T: DeviceRepr>(
    device: &Device,
    slice: &mut Option<CudaSlice<T>>,
    len: usize,
) -> Result<u64> {
    if slice.as_ref().is_none_or(|slice| slice.len() < len) {
        *slice = None;
        // SAFETY: the kernels write before they read.
        *slice = Some(unsafe { device.stream().alloc(len) }?);
    }
    Ok(slice.as_mut().map_or(0, |slice| slice.device_ptr_mut(device.stream()).0))
}

/// The address of a copy of `from`.
fn upload<T: DeviceRepr>(
    device: &Device,
    slice: &mut Option<CudaSlice<T>>,
    from: &[T],
) -> Result<u64> {
    let address = room(device, slice, from.len())?;
    if let Some(slice) = slice {
        device.stream().memcpy_htod(from, &mut slice.slice_mut(..from.len()))?;
    }
    Ok(address)
}
