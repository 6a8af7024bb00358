//! Gradients against the CPU engine's in f64.

use std::error::Error;

use dijiang::attention::{KeyMask, Qkv};
use dijiang::kernel::{DctGradients, SideGradients};
use dijiang_cuda::{Attention, BackwardWorkspace, Device, Element, InputGradients};
use half::{bf16, f16};
use ndarray::{Array3, s};
use rand::SeedableRng;
use rand::rngs::ChaCha8Rng;

use crate::errors::{self, Compare, Draws};
use crate::normal;
use crate::setup::{Distance, Setup};

/// Gradients of all that has some. A decay's is one number, a sum of many of either sign.
pub(crate) fn check(device: &Device, draws: Draws) -> Result<(), Box<dyn Error>> {
    let columns = [("q", 1.0), ("k", 1.0), ("v", 1.0), ("maps", 1.0), ("decay", 20.0)];
    let types: [(Compare<5>, f64); 3] =
        [(compare::<bf16>, 8e-3), (compare::<f16>, 2e-3), (compare::<f32>, 1e-4)];
    errors::check(device, draws, columns, types)
}

/// Relative errors of the gradients of q, k, v, of the maps' parameters and of the decays.
fn compare<E: Element>(
    device: &Device,
    setup: &Setup,
    seed: u64,
) -> Result<[f64; 5], Box<dyn Error>> {
    let (cpu, inputs, offsets) =
        (setup.operator::<f64>()?, setup.inputs::<E>(seed), setup.offsets());
    let (heads, n) = (setup.kv_heads * setup.group, inputs.mask.len());
    let mut random = ChaCha8Rng::seed_from_u64(seed ^ 1);
    let grad_out = Array3::from_shape_fn((heads, n, setup.e), |_| {
        E::from_f64(normal(&mut random) / setup.size).to_f64()
    });

    let attention = Attention::<E>::new(device, &cpu)?;
    let stream = device.stream();
    let [q, k, v] = inputs.upload::<E>(device)?;
    let grad: Vec<E> = grad_out.iter().map(|&x| E::from_f64(x)).collect();
    let grad = stream.clone_htod(&grad)?;
    let poisoned = |len: usize| stream.clone_htod(&vec![E::from_f64(f64::NAN); len]);
    let (mut dq, mut dk, mut dv) = (poisoned(q.len())?, poisoned(k.len())?, poisoned(v.len())?);
    let qkv = dijiang_cuda::Qkv::new(&q, &k, &v).with_offsets(&offsets);
    let qkv = match inputs.mask.iter().all(|&valid| valid) {
        true => qkv,
        false => qkv.with_mask(&inputs.mask),
    };
    let gradients = InputGradients { q: &mut dq, k: &mut dk, v: &mut dv };
    let of_maps =
        attention.backward_with_maps(qkv, &grad, gradients, &mut BackwardWorkspace::default())?;
    let download = |slice, heads: usize, width: usize| -> Result<Array3<f64>, Box<dyn Error>> {
        let numbers: Vec<E> = stream.clone_dtoh(slice)?;
        let numbers = numbers.into_iter().map(E::to_f64).collect();
        Ok(Array3::from_shape_vec((heads, n, width), numbers)?)
    };
    let d = inputs.q.shape()[2];
    let out = [
        download(&dq, heads, d)?,
        download(&dk, setup.kv_heads, d)?,
        download(&dv, setup.kv_heads, setup.e)?,
    ];

    let mut distances = [Distance::default(); 5];
    let mut maps: Vec<DctGradients> = Vec::new();
    let mut decays = vec![0.0; setup.kv_heads];
    for pair in offsets.windows(2).filter(|pair| pair[1] > pair[0]) {
        let part = inputs.part(pair[0], pair[1]);
        let grad_out = grad_out.slice(s![.., pair[0]..pair[1], ..]).to_owned();
        let qkv = Qkv::new(&part.q, &part.k, &part.v).with_mask(KeyMask::Valid(&part.mask));
        let expected = cpu.backward(qkv, &grad_out)?;
        let inputs = [&expected.q, &expected.k, &expected.v];
        for ((distance, out), expected) in distances.iter_mut().zip(&out).zip(inputs) {
            let out = out.slice(s![.., pair[0]..pair[1], ..]);
            distance.numbers(out.iter().copied(), expected.iter().copied());
        }
        decays.iter_mut().zip(&expected.log_decay).for_each(|(sum, x)| *sum += x);
        if maps.is_empty() {
            maps = expected.maps;
        } else {
            maps.iter_mut().zip(&expected.maps).for_each(|(sum, more)| sum.add(more));
        }
    }
    for (got, expected) in of_maps.maps.iter().zip(&maps) {
        distances[3].numbers(numbers(got), numbers(expected));
    }
    distances[4].numbers(of_maps.log_decay.into_iter(), decays.into_iter());
    // By the way they were drawn, gradients of q and k are numbers about 1, unless they cancel.
    let elements = [out[0].len(), out[1].len()].map(|len| len as f64);
    distances.iter_mut().zip(elements).for_each(|(distance, len)| distance.at_least(0.01 * len));
    Ok(distances.map(|distance| distance.relative()))
}

/// All numbers of a map's gradients, one after the other.
fn numbers(gradients: &DctGradients) -> impl Iterator<Item = f64> {
    let side = |side: &SideGradients| {
        [&side.center[..], &side.scale, &side.radii, &side.projection].concat()
    };
    let all = [side(&gradients.query), side(&gradients.key), gradients.log_weight.clone()];
    all.concat().into_iter().chain([gradients.log_mix])
}
