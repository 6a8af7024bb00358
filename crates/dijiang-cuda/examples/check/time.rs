//! Times by events on the stream: medians, one line of JSON each.

use std::error::Error;

use dijiang::attention::{LinearConfig, Window};
use dijiang::kernel::DctMapConfig;
use dijiang_cuda::cudarc::driver::{CudaSlice, sys::CUevent_flags};
use dijiang_cuda::{Attention, BackwardWorkspace, Device, InputGradients, Qkv, Workspace};
use half::bf16;
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use crate::normal;

const HEADS: usize = 16;
const TOKENS: usize = 16384;

pub(crate) fn all(device: &Device, only: &str) -> Result<(), Box<dyn Error>> {
    let name = device.stream().context().name()?;
    println!("{{\"device\": \"{name}\"}}");
    for d in [64, 128] {
        if ["", "windowless"].contains(&only) {
            forward(device, d, 0, TOKENS)?;
            decode(device, d, 0, 1024)?;
        }
        for chunk in [64, 128] {
            if only == "short" {
                forward(device, d, chunk, 2048)?;
            }
            for n in [1024, 2048, 4096, 8192, 16384, 32768, 65536] {
                if ["", "forward"].contains(&only) {
                    forward(device, d, chunk, n)?;
                }
                if ["", "backward"].contains(&only) {
                    backward(device, d, chunk, n)?;
                }
            }
            if ["", "decode"].contains(&only) {
                for context in [1024, 32768] {
                    decode(device, d, chunk, context)?;
                }
            }
        }
    }
    Ok(())
}

/// Each kernel, for a profiler to look at.
pub(crate) fn profile(device: &Device) -> Result<(), Box<dyn Error>> {
    for d in [64, 128] {
        let (attention, len) = (operator(device, d, 64)?, HEADS * TOKENS * d);
        let (q, k, v) = (random(device, len)?, random(device, len)?, random(device, len)?);
        let mut out = device.stream().alloc_zeros::<bf16>(len)?;
        let mut workspace = Workspace::default();
        for _ in 0..2 {
            attention.forward(Qkv::new(&q, &k, &v), &mut out, &mut workspace)?;
        }
        let zeros = || device.stream().alloc_zeros::<bf16>(len);
        let (mut dq, mut dk, mut dv) = (zeros()?, zeros()?, zeros()?);
        let gradients = InputGradients { q: &mut dq, k: &mut dk, v: &mut dv };
        let mut scratch = BackwardWorkspace::default();
        attention.backward_with_maps(Qkv::new(&q, &k, &v), &q, gradients, &mut scratch)?;
        let mut pool = attention.new_pool(64)?;
        let all: Vec<usize> = (0..64).collect();
        let offsets: Vec<usize> = (0..=TOKENS).step_by(TOKENS / 64).collect();
        let qkv = Qkv::new(&q, &k, &v).with_offsets(&offsets);
        attention.prefill(&mut pool, &all, qkv, &mut out, &mut workspace)?;
        let len = HEADS * 64 * d;
        let (q, k, v) = (random(device, len)?, random(device, len)?, random(device, len)?);
        let mut out = device.stream().alloc_zeros::<bf16>(len)?;
        for _ in 0..2 {
            attention.step(&mut pool, &all, Qkv::new(&q, &k, &v), &mut out, &mut workspace)?;
        }
    }
    Ok(device.stream().synchronize()?)
}

/// Without windows if `chunk` is 0.
fn operator(device: &Device, d: usize, chunk: usize) -> Result<Attention<bf16>, Box<dyn Error>> {
    let map = |head: usize| DctMapConfig::new().with_seed(head as u64).build::<f64>(d);
    let maps = (0..HEADS).map(map).collect::<Result<Vec<_>, _>>()?;
    let config = match chunk {
        0 => LinearConfig::new(),
        _ => LinearConfig::new().with_window(Window::new(chunk, 1)).with_sinks(4),
    };
    Ok(Attention::new(device, &config.build(maps)?)?)
}

fn random(device: &Device, len: usize) -> Result<CudaSlice<bf16>, Box<dyn Error>> {
    let mut random = ChaCha8Rng::seed_from_u64(len as u64);
    let some: Vec<bf16> =
        (0..len.min(1 << 20)).map(|_| bf16::from_f64(normal(&mut random))).collect();
    let all: Vec<bf16> = some.iter().copied().cycle().take(len).collect();
    Ok(device.stream().clone_htod(&all)?)
}

/// Median over `repeats` of the milliseconds that one of `many` calls takes.
fn median(
    device: &Device,
    repeats: usize,
    many: usize,
    mut call: impl FnMut() -> Result<(), Box<dyn Error>>,
) -> Result<f64, Box<dyn Error>> {
    let stream = device.stream();
    for _ in 0..3 {
        call()?;
    }
    let mut times = Vec::new();
    for _ in 0..repeats {
        let start = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        for _ in 0..many {
            call()?;
        }
        let end = stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT))?;
        end.synchronize()?;
        times.push(f64::from(start.elapsed_ms(&end)?) / many as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[repeats / 2])
}

fn forward(device: &Device, d: usize, chunk: usize, n: usize) -> Result<(), Box<dyn Error>> {
    let (total, attention) = (TOKENS.max(n), operator(device, d, chunk)?);
    let len = HEADS * total * d;
    let (q, k, v) = (random(device, len)?, random(device, len + 1)?, random(device, len)?);
    let k = device.stream().clone_dtod(&k.slice(1..))?;
    let mut out = device.stream().alloc_zeros::<bf16>(len)?;
    let offsets: Vec<usize> = (0..=total).step_by(n).collect();
    let mut workspace = Workspace::default();
    let ms = median(device, 21, 10, || {
        let qkv = Qkv::new(&q, &k, &v).with_offsets(&offsets);
        Ok(attention.forward(qkv, &mut out, &mut workspace)?)
    })?;
    // What the layer is: features of both sides, sums in and out, the average query's window.
    let per_token = (2 * d * d * 4 + 4 * d * (chunk + chunk / 2)) as f64;
    let (tokens, bytes) = ((HEADS * total) as f64, (8 * len) as f64);
    println!(
        "{{\"what\": \"forward\", \"d\": {d}, \"chunk\": {chunk}, \"n\": {n}, \"tokens\": {total}, \
         \"ms\": {ms:.4}, \"tflops\": {:.1}, \"gbytes_per_s\": {:.0}}}",
        per_token * tokens / ms / 1e9,
        bytes / ms / 1e6,
    );
    Ok(())
}

fn backward(device: &Device, d: usize, chunk: usize, n: usize) -> Result<(), Box<dyn Error>> {
    let (total, attention) = (TOKENS.max(n), operator(device, d, chunk)?);
    let len = HEADS * total * d;
    let (q, k, v) = (random(device, len)?, random(device, len + 1)?, random(device, len)?);
    let k = device.stream().clone_dtod(&k.slice(1..))?;
    let grad = device.stream().clone_dtod(&v)?;
    let zeros = || device.stream().alloc_zeros::<bf16>(len);
    let (mut dq, mut dk, mut dv) = (zeros()?, zeros()?, zeros()?);
    let offsets: Vec<usize> = (0..=total).step_by(n).collect();
    let mut workspace = BackwardWorkspace::default();
    let mut times = [0.0; 2];
    for (time, maps) in times.iter_mut().zip([false, true]) {
        *time = median(device, 11, 3, || {
            let qkv = Qkv::new(&q, &k, &v).with_offsets(&offsets);
            let gradients = InputGradients { q: &mut dq, k: &mut dk, v: &mut dv };
            if maps {
                attention.backward_with_maps(qkv, &grad, gradients, &mut workspace)?;
            } else {
                attention.backward(qkv, &grad, gradients, &mut workspace)?;
            }
            Ok(())
        })?;
    }
    let [ms, with_maps] = times;
    println!(
        "{{\"what\": \"backward\", \"d\": {d}, \"chunk\": {chunk}, \"n\": {n}, \
         \"tokens\": {total}, \
         \"ms\": {ms:.4}, \"with_maps_ms\": {with_maps:.4}}}"
    );
    Ok(())
}

fn decode(device: &Device, d: usize, chunk: usize, context: usize) -> Result<(), Box<dyn Error>> {
    let (streams, attention) = (64, operator(device, d, chunk)?);
    let mut pool = attention.new_pool(streams)?;
    let mut workspace = Workspace::default();
    let len = HEADS * context * d;
    let (q, k, v) = (random(device, len)?, random(device, len)?, random(device, len)?);
    let mut out = device.stream().alloc_zeros::<bf16>(len)?;
    for stream in 0..streams {
        let qkv = Qkv::new(&q, &k, &v);
        attention.prefill(&mut pool, &[stream], qkv, &mut out, &mut workspace)?;
    }
    drop((q, k, v, out));
    let len = HEADS * streams * d;
    let (q, k, v) = (random(device, len)?, random(device, len)?, random(device, len)?);
    let mut out = device.stream().alloc_zeros::<bf16>(len)?;
    let all: Vec<usize> = (0..streams).collect();
    // A whole chunk at a time: one of its tokens moves the window.
    let ms = median(device, 11, chunk.max(64), || {
        let qkv = Qkv::new(&q, &k, &v);
        Ok(attention.step(&mut pool, &all, qkv, &mut out, &mut workspace)?)
    })?;
    let bytes = pool.bytes() as f64;
    println!(
        "{{\"what\": \"decode\", \"d\": {d}, \"chunk\": {chunk}, \"context\": {context}, \
         \"streams\": {streams}, \"ms\": {ms:.4}, \"state_mb\": {:.1}, \"gbytes_per_s\": {:.0}}}",
        bytes / 1e6,
        bytes / ms / 1e6,
    );
    Ok(())
}
