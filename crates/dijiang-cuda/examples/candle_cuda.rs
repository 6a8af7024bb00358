//! Attention of candle's CUDA tensors against the CPU engine in f64: outputs, gradients, and
//! streams that are fed in parts.

use std::error::Error;

use candle_core::{Tensor, Var};
use dijiang::attention::{LinearAttention, LinearConfig, Operator, Qkv, Window};
use dijiang::kernel::{DctMap, DctMapConfig};
use dijiang_cuda::candle::{CandleAttention, TensorElement};
use dijiang_cuda::{Attention, Device, Element};
use half::{bf16, f16};
use ndarray::Array3;
use rand::rngs::ChaCha8Rng;
use rand::{RngExt, SeedableRng};

/// Heads, key-value heads, d, e, m, chunk, tokens, sequences.
const SHAPES: [[usize; 8]; 3] = [
    [4, 2, 64, 64, 64, 64, 300, 2],
    [2, 2, 64, 128, 128, 128, 1000, 1],
    [4, 1, 128, 128, 128, 64, 517, 3],
];

fn main() -> Result<(), Box<dyn Error>> {
    let gpu = candle_core::Device::new_cuda(0)?;
    let device = Device::from_candle(&gpu)?;
    let mut within = true;
    println!("type  h h_kv d e m chunk n b: out, parts, gradients of q, k, v");
    for shape in SHAPES {
        within &= compare::<bf16>(&device, &gpu, shape, [2e-3, 8e-3])?;
        within &= compare::<f16>(&device, &gpu, shape, [5e-4, 2e-3])?;
        within &= compare::<f32>(&device, &gpu, shape, [2e-5, 1e-4])?;
    }
    if within { Ok(()) } else { Err("errors beyond the limit".into()) }
}

fn compare<E: TensorElement>(
    device: &Device,
    gpu: &candle_core::Device,
    shape: [usize; 8],
    [limit, gradient_limit]: [f64; 2],
) -> Result<bool, Box<dyn Error>> {
    let [heads, kv_heads, d, e, m, chunk, n, batch] = shape;
    let map = |seed| DctMapConfig::new().with_blocks(m / d).with_seed(seed).build::<f64>(d);
    let maps = (0..kv_heads as u64).map(map).collect::<Result<Vec<_>, _>>()?;
    let config = LinearConfig::new().with_heads(heads).with_value_dim(e);
    let cpu = config.with_window(Window::new(chunk, 1)).with_sinks(4).build(maps)?;
    let attention = CandleAttention::new(Attention::<E>::new(device, &cpu)?);

    let mut random = ChaCha8Rng::seed_from_u64(1);
    let mut draw = |heads, width| Batch::draw::<E>(&mut random, [batch, heads, n, width]);
    let (q, k, v, grad) = (draw(heads, d), draw(kv_heads, d), draw(kv_heads, e), draw(heads, e));
    let [tq, tk, tv] = [&q, &k, &v].map(|x| x.tensor::<E>(gpu));
    let [tq, tk, tv] = [Var::from_tensor(&tq?)?, Var::from_tensor(&tk?)?, Var::from_tensor(&tv?)?];
    let out = attention.forward(&tq, &tk, &tv)?;
    let gradients = (&out * grad.tensor::<E>(gpu)?)?.sum_all()?.backward()?;
    let of = |x: &Var| gradients.get(x).ok_or("a variable has a gradient").cloned();
    let parts = in_parts(&attention, [&tq, &tk, &tv])?;
    let expected = expected(&cpu, [&q, &k, &v, &grad])?;
    let errors = [
        error(&out, &expected[0])?,
        error(&parts, &expected[0])?,
        error(&of(&tq)?, &expected[1])?,
        error(&of(&tk)?, &expected[2])?,
        error(&of(&tv)?, &expected[3])?,
    ];
    let shown = errors.map(|error| format!("{error:.1e}")).join(" ");
    println!("{:5} {shape:?}: {shown}", <E as Element>::NAME);
    let limits = [limit, limit, gradient_limit, gradient_limit, gradient_limit];
    // NaN must not pass.
    Ok(errors.iter().zip(limits).all(|(&error, limit)| error <= limit))
}

/// Outputs of a prefill of half the tokens, one of most of the others, and single steps.
fn in_parts<E: TensorElement>(
    attention: &CandleAttention<E>,
    qkv: [&Var; 3],
) -> candle_core::Result<Tensor> {
    let (batch, _, n, _) = qkv[0].dims4()?;
    let mut pool = attention.attention().new_pool(batch)?;
    let streams: Vec<usize> = (0..batch).rev().collect();
    let mut outs = Vec::new();
    for (from, to) in [(0, n / 2), (n / 2, n - 9)] {
        let [q, k, v] = qkv.map(|x| x.narrow(2, from, to - from));
        outs.push(attention.prefill(&mut pool, &streams, &q?, &k?, &v?)?);
    }
    for i in n - 9..n {
        let [q, k, v] = qkv.map(|x| x.narrow(2, i, 1));
        outs.push(attention.step(&mut pool, &streams, &q?, &k?, &v?)?);
    }
    Tensor::cat(&outs, 2)
}

/// Sequences of numbers that the element type has.
struct Batch(Vec<Array3<f64>>);

impl Batch {
    fn draw<E: Element>(random: &mut ChaCha8Rng, [batch, h, n, width]: [usize; 4]) -> Self {
        let mut number = || {
            let (radius, angle): (f64, f64) = (random.random(), random.random());
            let normal =
                (-2.0 * (1.0 - radius).ln()).sqrt() * (std::f64::consts::TAU * angle).cos();
            <E as Element>::to_f64(<E as Element>::from_f64(normal))
        };
        Self((0..batch).map(|_| Array3::from_shape_simple_fn((h, n, width), &mut number)).collect())
    }

    fn tensor<E: TensorElement>(&self, gpu: &candle_core::Device) -> candle_core::Result<Tensor> {
        let numbers = self.0.iter().flatten().map(|&x| <E as Element>::from_f64(x));
        let (h, n, width) = self.0[0].dim();
        Tensor::from_vec(numbers.collect::<Vec<E>>(), (self.0.len(), h, n, width), gpu)
    }
}

/// Outputs and the gradients of q, k and v, one sequence after the other.
fn expected(
    cpu: &LinearAttention<f64, DctMap<f64>>,
    [q, k, v, grad]: [&Batch; 4],
) -> dijiang::Result<[Vec<f64>; 4]> {
    let mut all = [const { Vec::new() }; 4];
    for (((q, k), v), grad) in q.0.iter().zip(&k.0).zip(&v.0).zip(&grad.0) {
        let out = cpu.forward(Qkv::new(q, k, v))?;
        let gradients = cpu.backward(Qkv::new(q, k, v), grad)?;
        let arrays = [out, gradients.q, gradients.k, gradients.v];
        all.iter_mut().zip(arrays).for_each(|(all, one)| all.extend(one));
    }
    Ok(all)
}

/// ‖out − expected‖ / ‖expected‖.
fn error(out: &Tensor, expected: &[f64]) -> candle_core::Result<f64> {
    let out = out.flatten_all()?.to_dtype(candle_core::DType::F64)?.to_vec1::<f64>()?;
    let pairs = || out.iter().zip(expected);
    let difference = pairs().map(|(out, expected)| (out - expected).powi(2)).sum::<f64>();
    Ok((difference / pairs().map(|(_, expected)| expected.powi(2)).sum::<f64>()).sqrt())
}
