//! Random operators and inputs, on the GPU and in f64 on the CPU.

use std::error::Error;

use dijiang::attention::{CausalState, KeyMask, LinearAttention, LinearConfig, Operator, Qkv};
use dijiang::attention::{Storage, Window};
use dijiang::kernel::{DctMap, DctMapConfig, DctParams, Envelope, Mixing, Pairing, Radial};
use dijiang_cuda::cudarc::driver::{CudaSlice, DriverError};
use dijiang_cuda::{Attention, Device, Element, Workspace};
use ndarray::{Array2, Array3, s};
use rand::rngs::ChaCha8Rng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};

use crate::normal;

/// d, e and m of all setups.
pub(crate) fn sizes() -> impl Iterator<Item = [usize; 3]> {
    let both = [64, 128];
    both.into_iter()
        .flat_map(move |d| both.map(|e| (d, e)))
        .flat_map(|(d, e)| [d, 2 * d].map(|m| [d, e, m]))
}

/// What an operator and its inputs look like.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    d: usize,
    pub(crate) e: usize,
    pairing: Pairing,
    blocks: usize,
    mixing: Mixing,
    envelope: Envelope,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    windows: Vec<Window>,
    sinks: usize,
    log_decay: Vec<f64>,
    masked: f64,
    /// Tokens of each sequence.
    lengths: Vec<usize>,
    /// Standard deviation of q and k.
    deviation: f64,
    /// What the log-weights are spread over, and the values' size.
    spread: f64,
    pub(crate) size: f64,
    seed: u64,
}

impl Setup {
    pub(crate) fn draw(random: &mut ChaCha8Rng) -> Self {
        let [d, e] = [(); 2].map(|()| if random.random() { 64 } else { 128 });
        let pairing =
            *[Pairing::Single, Pairing::Antithetic].choose(random).unwrap_or(&Pairing::Single);
        let blocks = if pairing == Pairing::Single { random.random_range(1..=2) } else { 1 };
        let kv_heads = random.random_range(1..=3);
        let windows = (0..kv_heads)
            .map(|_| Window::new(64 * random.random_range(1..=3), random.random_range(0..=2)));
        let windows = windows.collect();
        let decay = |random: &mut ChaCha8Rng| match random.random_range(0..3) {
            0 => -0.02 * random.random::<f64>(),
            _ => 0.0,
        };
        let lengths = match random.random_range(0..3) {
            0 => (0..random.random_range(2..5)).map(|_| random.random_range(0..500)).collect(),
            _ => vec![random.random_range(1..1500)],
        };
        let masked = *[0.0, 0.0, 0.1, 0.6].choose(random).unwrap_or(&0.0);
        Self {
            d,
            e,
            pairing,
            blocks,
            mixing: if random.random() { Mixing::Mixed } else { Mixing::None },
            envelope: if random.random() { Envelope::Gaussian } else { Envelope::None },
            kv_heads,
            group: random.random_range(1..=3),
            windows,
            sinks: *[0, 1, 4, 16].choose(random).unwrap_or(&0),
            log_decay: (0..kv_heads).map(|_| decay(random)).collect(),
            masked,
            lengths: if random.random_range(0..20) == 0 { vec![1] } else { lengths },
            deviation: *[1.0, 1.0, 2.0].choose(random).unwrap_or(&1.0),
            spread: *[0.5, 0.5, 300.0].choose(random).unwrap_or(&0.5),
            size: *[1.0, 1e-3, 100.0].choose(random).unwrap_or(&1.0),
            seed: random.random(),
        }
    }

    /// The same attention without windows and sinks.
    pub(crate) fn without_windows(self) -> Self {
        Self { windows: Vec::new(), sinks: 0, ..self }
    }

    /// One sequence of this many tokens; 0 leaves the lengths as they are.
    pub(crate) fn with_tokens(self, tokens: usize) -> Self {
        if tokens == 0 { self } else { Self { lengths: vec![tokens], ..self } }
    }

    pub(crate) fn operator<T: dijiang::Real>(
        &self,
    ) -> Result<LinearAttention<T, DctMap<T>>, Box<dyn Error>> {
        let map = |head: usize| -> Result<DctParams, dijiang::Error> {
            let mut params = DctMapConfig::new()
                .with_blocks(self.blocks)
                .with_pairing(self.pairing)
                .with_mixing(self.mixing)
                .with_radial(Radial::Normal)
                .with_envelope(self.envelope)
                .with_seed(head as u64)
                .params(self.d)?;
            let mut random = ChaCha8Rng::seed_from_u64(self.seed + head as u64);
            let mut number = |size: f64| size * normal(&mut random);
            params.query.center.iter_mut().for_each(|x| *x = number(0.2));
            params.key.center.iter_mut().for_each(|x| *x = number(0.2));
            params.query.scale.iter_mut().for_each(|x| *x *= 1.0 + number(0.1));
            params.key.radii.iter_mut().for_each(|x| *x *= 1.0 + number(0.1));
            // As far apart as the sizes say: what the queries' side cannot make up for.
            let spread = self.spread;
            params.log_weight.iter_mut().for_each(|x| *x += spread * (2.0 * number(0.3)).tanh());
            params.log_mix = number(0.5);
            Ok(params)
        };
        let maps = (0..self.kv_heads).map(|head| DctMap::from_params(map(head)?));
        let maps = maps.collect::<Result<Vec<_>, _>>()?;
        Ok(LinearConfig::new()
            .with_heads(self.kv_heads * self.group)
            .with_value_dim(self.e)
            .with_windows(self.windows.clone())
            .with_sinks(self.sinks)
            .with_log_decay(self.log_decay.clone())
            .build(maps)?)
    }

    fn tokens(&self) -> usize {
        self.lengths.iter().sum::<usize>().max(1)
    }

    pub(crate) fn offsets(&self) -> Vec<usize> {
        let ends = self.lengths.iter().scan(0, |end, n| {
            *end += n;
            Some(*end)
        });
        let mut offsets: Vec<usize> = std::iter::once(0).chain(ends).collect();
        if let Some(last) = offsets.last_mut().filter(|last| **last == 0) {
            *last = 1;
        }
        offsets
    }

    /// Numbers that the element type holds exactly.
    pub(crate) fn inputs<E: Element>(&self, seed: u64) -> Inputs {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let n = self.tokens();
        let mut array = |heads: usize, width: usize, size: f64| {
            let mut mean = Array2::zeros((heads, width));
            mean.iter_mut().for_each(|x| *x = 0.3 * size * normal(&mut random));
            Array3::from_shape_fn((heads, n, width), |(h, _, i)| {
                E::from_f64(mean[[h, i]] + size * normal(&mut random)).to_f64()
            })
        };
        let q = array(self.kv_heads * self.group, self.d, self.deviation);
        let k = array(self.kv_heads, self.d, self.deviation);
        let v = array(self.kv_heads, self.e, self.size);
        let mask = (0..n).map(|_| random.random::<f64>() >= self.masked).collect();
        Inputs { q, k, v, mask }
    }
}

/// One call's arrays, in f64.
pub(crate) struct Inputs {
    pub(crate) q: Array3<f64>,
    pub(crate) k: Array3<f64>,
    pub(crate) v: Array3<f64>,
    pub(crate) mask: Vec<bool>,
}

impl Inputs {
    /// q, k and v; keys that the mask hides may be anything.
    pub(crate) fn upload<E: Element>(
        &self,
        device: &Device,
    ) -> Result<[CudaSlice<E>; 3], DriverError> {
        let upload = |array: &Array3<f64>, masked: bool| {
            let (n, width) = (self.mask.len(), array.shape()[2]);
            let of = |(i, &x): (usize, &f64)| {
                let hidden = masked && !self.mask[i / width % n];
                E::from_f64(if hidden { f64::NAN } else { x })
            };
            device.stream().clone_htod(&array.iter().enumerate().map(of).collect::<Vec<E>>())
        };
        Ok([upload(&self.q, false)?, upload(&self.k, true)?, upload(&self.v, true)?])
    }

    /// Tokens `from` to `to`, as another call.
    pub(crate) fn part(&self, from: usize, to: usize) -> Self {
        let cut = |array: &Array3<f64>| array.slice(s![.., from..to, ..]).to_owned();
        let mask = self.mask[from..to].to_vec();
        Self { q: cut(&self.q), k: cut(&self.k), v: cut(&self.v), mask }
    }
}

/// An operator on the device with its scratch.
struct Gpu<'d, E> {
    device: &'d Device,
    attention: Attention<E>,
    workspace: Workspace<E>,
}

impl<'d, E: Element> Gpu<'d, E> {
    fn new(device: &'d Device, setup: &Setup) -> Result<Self, Box<dyn Error>> {
        let attention = Attention::new(device, &setup.operator::<f64>()?)?;
        Ok(Self { device, attention, workspace: Workspace::default() })
    }

    /// What `run` makes of the inputs; every output must have been written.
    fn run(
        &mut self,
        inputs: &Inputs,
        heads_and_width: (usize, usize),
        run: impl FnOnce(
            &Attention<E>,
            dijiang_cuda::Qkv<'_, E>,
            &mut CudaSlice<E>,
            &mut Workspace<E>,
        ) -> dijiang_cuda::Result<()>,
    ) -> Result<Array3<f64>, Box<dyn Error>> {
        let (stream, n) = (self.device.stream(), inputs.mask.len());
        let [q, k, v] = inputs.upload(self.device)?;
        let (heads, width) = heads_and_width;
        let mut out = stream.clone_htod(&vec![E::from_f64(f64::NAN); heads * n * width])?;
        let qkv = dijiang_cuda::Qkv::new(&q, &k, &v).with_mask(&inputs.mask);
        let qkv = if inputs.mask.iter().all(|&valid| valid) {
            dijiang_cuda::Qkv::new(&q, &k, &v)
        } else {
            qkv
        };
        run(&self.attention, qkv, &mut out, &mut self.workspace)?;
        let out: Vec<E> = stream.clone_dtoh(&out)?;
        let out = out.into_iter().map(E::to_f64).collect();
        Ok(Array3::from_shape_vec((heads, n, width), out)?)
    }
}

/// Relative errors of: rounding exact outputs to the element type; the forward pass; prefill in
/// parts, then token by token; states that go to the CPU and come back.
pub(crate) fn compare<E: Element>(
    device: &Device,
    setup: &Setup,
    seed: u64,
) -> Result<[f64; 4], Box<dyn Error>> {
    let (cpu, inputs, offsets) =
        (setup.operator::<f64>()?, setup.inputs::<E>(seed), setup.offsets());
    let qkv = Qkv::new(&inputs.q, &inputs.k, &inputs.v)
        .with_offsets(&offsets)
        .with_mask(KeyMask::Valid(&inputs.mask));
    let expected = cpu.forward(qkv)?;
    let shape = (setup.kv_heads * setup.group, setup.e);
    let mut gpu = Gpu::<E>::new(device, setup)?;
    let out = gpu.run(&inputs, shape, |attention, qkv, out, workspace| {
        attention.forward(qkv.with_offsets(&offsets), out, workspace)
    })?;
    let forward = error(&out, &expected);

    // All sequences as streams side by side: a third each, then a few tokens by steps.
    let streams: Vec<usize> = (0..offsets.len() - 1).rev().collect();
    let mut pool = gpu.attention.new_pool(streams.len())?;
    let mut parts = Distance::default();
    let longest = offsets.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0);
    let mut cuts: Vec<usize> = vec![0, longest / 3, longest / 3 * 2];
    cuts.extend((longest.saturating_sub(70).max(longest / 3 * 2)..=longest).skip(1));
    for cut in cuts.windows(2) {
        let of = |i: usize| {
            let range = offsets[i]..offsets[i + 1];
            [cut[0], cut[1]].map(|at| (range.start + at).min(range.end))
        };
        let own: Vec<[usize; 2]> = (0..streams.len()).map(of).collect();
        let step = cut[1] - cut[0] == 1;
        let live: Vec<usize> = (0..own.len()).filter(|&i| !step || own[i][1] > own[i][0]).collect();
        let rows: Vec<usize> = live.iter().flat_map(|&i| own[i][0]..own[i][1]).collect();
        if rows.is_empty() {
            continue;
        }
        let pick = |array: &Array3<f64>| array.select(ndarray::Axis(1), &rows);
        let part = Inputs {
            q: pick(&inputs.q),
            k: pick(&inputs.k),
            v: pick(&inputs.v),
            mask: rows.iter().map(|&row| inputs.mask[row]).collect(),
        };
        let mut part_offsets = vec![0];
        live.iter().for_each(|&i| {
            part_offsets.push(part_offsets[part_offsets.len() - 1] + own[i][1] - own[i][0]);
        });
        let of_streams: Vec<usize> = live.iter().map(|&i| streams[i]).collect();
        let out = gpu.run(&part, shape, |attention, qkv, out, workspace| {
            if step {
                attention.step(&mut pool, &of_streams, qkv, out, workspace)
            } else {
                let qkv = qkv.with_offsets(&part_offsets);
                attention.prefill(&mut pool, &of_streams, qkv, out, workspace)
            }
        })?;
        parts.add(&out, &pick(&expected));
    }
    let rounded = expected.mapv(|x| E::from_f64(x).to_f64());
    let rounding = error(&rounded, &expected);
    Ok([
        rounding,
        forward,
        parts.relative(),
        states::<E>(&mut gpu, setup, &inputs, &offsets, &expected)?,
    ])
}

/// The first sequence by turns on the CPU in f32 and on the GPU, its state handed over as bytes.
fn states<E: Element>(
    gpu: &mut Gpu<'_, E>,
    setup: &Setup,
    inputs: &Inputs,
    offsets: &[usize],
    expected: &Array3<f64>,
) -> Result<f64, Box<dyn Error>> {
    let (n, shape) = (offsets[1], (setup.kv_heads * setup.group, setup.e));
    if n < 8 {
        return Ok(0.0);
    }
    let cpu = setup.operator::<f32>()?;
    let mut pool = gpu.attention.new_pool(2)?;
    let mut bytes = cpu.new_state().to_bytes(Storage::Exact);
    let mut distance = Distance::default();
    for (i, cut) in [0, n / 4, n / 2, n / 4 * 3, n].windows(2).enumerate() {
        let part = inputs.part(cut[0], cut[1]);
        let out = if i % 2 == 0 {
            gpu.attention.state_from_bytes(&mut pool, 1, &bytes)?;
            let out = gpu.run(&part, shape, |attention, qkv, out, workspace| {
                attention.prefill(&mut pool, &[1], qkv, out, workspace)
            })?;
            bytes = gpu.attention.state_to_bytes(&pool, 1)?;
            out
        } else {
            let mut state: CausalState<f32> = cpu.state_from_bytes(&bytes)?;
            let [q, k, v] = [&part.q, &part.k, &part.v].map(|array| array.mapv(|x| x as f32));
            let qkv = Qkv::new(&q, &k, &v).with_mask(KeyMask::Valid(&part.mask));
            let out = cpu.prefill(&mut state, qkv)?;
            bytes = state.to_bytes(Storage::Exact);
            out.mapv(f64::from)
        };
        distance.add(&out, &expected.slice(s![.., cut[0]..cut[1], ..]).to_owned());
    }
    Ok(distance.relative())
}

/// ‖out − expected‖ / ‖expected‖ of outputs that come in parts.
#[derive(Default, Clone, Copy)]
pub(crate) struct Distance {
    difference: f64,
    size: f64,
}

impl Distance {
    fn add(&mut self, out: &Array3<f64>, expected: &Array3<f64>) {
        self.numbers(out.iter().copied(), expected.iter().copied());
    }

    pub(crate) fn numbers(
        &mut self,
        out: impl Iterator<Item = f64>,
        expected: impl Iterator<Item = f64>,
    ) {
        for (out, expected) in out.zip(expected) {
            self.difference += (out - expected).powi(2);
            self.size += expected.powi(2);
        }
    }

    /// What is smaller counts as this much: the square of a norm.
    pub(crate) fn at_least(&mut self, size: f64) {
        self.size = self.size.max(size);
    }

    pub(crate) fn relative(&self) -> f64 {
        if self.difference == 0.0 { 0.0 } else { (self.difference / self.size).sqrt() }
    }
}

fn error(out: &Array3<f64>, expected: &Array3<f64>) -> f64 {
    let mut distance = Distance::default();
    distance.add(out, expected);
    distance.relative()
}

/// Many tokens one by one, compared with the CPU's forward pass in f64.
pub(crate) fn long_decode(device: &Device, tokens: usize) -> Result<(), Box<dyn Error>> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let setup = Setup {
        d: 64,
        e: 64,
        pairing: Pairing::Single,
        blocks: 1,
        mixing: Mixing::None,
        envelope: Envelope::None,
        kv_heads: 1,
        group: 1,
        windows: vec![Window::new(64, 1)],
        sinks: 4,
        log_decay: vec![0.0],
        masked: 0.0,
        lengths: vec![tokens],
        deviation: 1.0,
        spread: 0.5,
        size: 1.0,
        seed: random.random(),
    };
    let within = [
        long_decode_of::<half::bf16>(device, &setup, 2e-3)?,
        long_decode_of::<half::f16>(device, &setup, 5e-4)?,
        long_decode_of::<f32>(device, &setup, 2e-5)?,
    ];
    if within == [true; 3] { Ok(()) } else { Err("errors beyond the limit".into()) }
}

fn long_decode_of<E: Element>(
    device: &Device,
    setup: &Setup,
    limit: f64,
) -> Result<bool, Box<dyn Error>> {
    let (n, inputs) = (setup.tokens(), setup.inputs::<E>(7));
    let cpu = setup.operator::<f64>()?;
    let expected = cpu.forward(Qkv::new(&inputs.q, &inputs.k, &inputs.v))?;
    let mut gpu = Gpu::<E>::new(device, setup)?;
    let mut pool = gpu.attention.new_pool(1)?;
    let stream = device.stream();
    let upload = |array: &Array3<f64>| {
        stream.clone_htod(&array.iter().map(|&x| E::from_f64(x)).collect::<Vec<E>>())
    };
    let (q, k, v) = (upload(&inputs.q)?, upload(&inputs.k)?, upload(&inputs.v)?);
    let mut out = stream.alloc_zeros::<E>(n * setup.e)?;
    let [mut q1, mut k1] = [stream.alloc_zeros::<E>(setup.d)?, stream.alloc_zeros::<E>(setup.d)?];
    let [mut v1, mut o1] = [stream.alloc_zeros::<E>(setup.e)?, stream.alloc_zeros::<E>(setup.e)?];
    for i in 0..n {
        let [row, value_row] = [setup.d, setup.e].map(|width| i * width..(i + 1) * width);
        stream.memcpy_dtod(&q.slice(row.clone()), &mut q1)?;
        stream.memcpy_dtod(&k.slice(row), &mut k1)?;
        stream.memcpy_dtod(&v.slice(value_row.clone()), &mut v1)?;
        let qkv = dijiang_cuda::Qkv::new(&q1, &k1, &v1);
        gpu.attention.step(&mut pool, &[0], qkv, &mut o1, &mut gpu.workspace)?;
        stream.memcpy_dtod(&o1, &mut out.slice_mut(value_row))?;
    }
    let out: Vec<E> = stream.clone_dtoh(&out)?;
    let out = Array3::from_shape_vec((1, n, setup.e), out.into_iter().map(E::to_f64).collect())?;
    let last = s![.., n - 1000.min(n).., ..];
    let found = error(&out.slice(last).to_owned(), &expected.slice(last).to_owned());
    let whole = error(&out, &expected);
    println!(
        "{:5} {n} tokens decoded: last 1000 {found:.1e}, all {whole:.1e}, limit {limit:.0e}",
        E::NAME
    );
    Ok(found <= limit && whole <= limit)
}
