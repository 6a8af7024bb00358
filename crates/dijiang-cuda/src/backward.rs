//! Gradients: of q, k and v on the device, of the maps' parameters and decays from sums over the
//! tokens that the device makes.

use std::ops::Range;
use std::thread;

use cudarc::driver::{
    CudaFunction, CudaSlice, DevicePtr, DevicePtrMut, LaunchConfig, PushKernelArg,
};
use dijiang::kernel::{DctGradients, DctMap, DifferentiableMap, FeatureMap, PanelGradients};
use half::bf16;

use crate::attention::{Attention, Qkv, THREADS, Workspace, room};
use crate::bytes::Shape;
use crate::call::{Back, Call, Plan, SINKS, TILE};
use crate::device::BackwardKernels;
use crate::element::Element;
use crate::error::{Error, Result, check_len};

/// Where the gradients of q, k and v go; all of it is overwritten.
///
/// # Shapes
/// - `q`: `[h, n, d]`, `k`: `[h_kv, n, d]`, `v`: `[h_kv, n, e]`, as those of [`Qkv`]; zeros for
///   masked keys and their values.
#[derive(Debug)]
pub struct InputGradients<'a, E> {
    /// Of the queries.
    pub q: &'a mut CudaSlice<E>,
    /// Of the keys.
    pub k: &'a mut CudaSlice<E>,
    /// Of the values.
    pub v: &'a mut CudaSlice<E>,
}

/// The gradients of what every key-value head's kernel is made of.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct MapGradients {
    /// Of the maps' parameters.
    pub maps: Vec<DctGradients>,
    /// Of log γ.
    pub log_decay: Vec<f64>,
}

/// Scratch on the device for gradients; grows with the longest call.
#[derive(Debug, Default)]
pub struct BackwardWorkspace<E> {
    forward: Workspace<E>,
    log_total: Option<CudaSlice<f32>>,
    delta: Option<CudaSlice<f32>>,
    sums: Option<CudaSlice<f32>>,
    means: Option<CudaSlice<E>>,
    mean_unit: Option<CudaSlice<f32>>,
    mean_level: Option<CudaSlice<f32>>,
    mean_delta: Option<CudaSlice<f32>>,
    sinks: Option<CudaSlice<f32>>,
    sink_totals: Option<CudaSlice<f32>>,
    moments: Option<CudaSlice<f32>>,
    moment_totals: Option<CudaSlice<f64>>,
    decays: Option<CudaSlice<f64>>,
}

impl<E: Element> Attention<E> {
    /// Gradients of a scalar through [`forward`](Self::forward), from its gradient with respect to
    /// the outputs. The forward pass is computed again on the way. Work is put on the device's
    /// stream and not waited for.
    ///
    /// Gradients of f16 end at 65504 and lose digits below 6e-5: scale the loss, as ever with f16.
    ///
    /// # Shapes
    /// - `grad_out`: `[h, n, e]`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward); [`NoCompiler`](crate::Error::NoCompiler) and
    /// [`Compile`](crate::Error::Compile) at first use; [`Unsupported`](crate::Error::Unsupported)
    /// without windows, and on a GPU with too little shared memory for these sizes.
    pub fn backward(
        &self,
        qkv: Qkv<'_, E>,
        grad_out: &CudaSlice<E>,
        gradients: InputGradients<'_, E>,
        workspace: &mut BackwardWorkspace<E>,
    ) -> Result<()> {
        self.run_backward(qkv, grad_out, gradients, workspace, false).map(drop)
    }

    /// [`backward`](Self::backward), and the gradients of the maps and decays, which are waited
    /// for.
    ///
    /// # Errors
    /// As [`backward`](Self::backward).
    pub fn backward_with_maps(
        &self,
        qkv: Qkv<'_, E>,
        grad_out: &CudaSlice<E>,
        gradients: InputGradients<'_, E>,
        workspace: &mut BackwardWorkspace<E>,
    ) -> Result<MapGradients> {
        let tiles = self.run_backward(qkv, grad_out, gradients, workspace, true)?;
        let Shape { dim, features, .. } = self.shape;
        let (kv_heads, size) = (self.shape.kv_heads(), features * (dim + 1));
        let stream = self.device.stream();
        let read = |slice: &Option<CudaSlice<f64>>, len: usize| match slice {
            Some(slice) => stream.clone_dtoh(&slice.slice(..len)),
            None => Ok(vec![0.0; len]),
        };
        let moments = read(&workspace.moment_totals, 2 * kv_heads * size)?;
        let decays = read(&workspace.decays, (self.heads + kv_heads) * tiles)?;
        let (queries, keys) = moments.split_at(kv_heads * size);
        let scale = self.shape.scale;
        let mut maps: Vec<DctGradients> =
            self.maps.iter().map(|map| DctGradients::zeros(map.params())).collect();
        let sides = queries.chunks_exact(size).zip(keys.chunks_exact(size));
        thread::scope(|scope| {
            for ((to, map), (query, key)) in maps.iter_mut().zip(&self.maps).zip(sides) {
                scope.spawn(move || *to = of_map(map, scale, query, key));
            }
        });
        let sum = |heads: Range<usize>| -> f64 {
            decays[heads.start * tiles..heads.end * tiles].iter().sum()
        };
        let group = self.heads / kv_heads;
        let of_keys = |kv| sum(self.heads + kv..self.heads + kv + 1);
        let log_decay = (0..kv_heads).map(|kv| sum(kv * group..(kv + 1) * group) - of_keys(kv));
        Ok(MapGradients { maps, log_decay: log_decay.collect() })
    }

    /// How many tiles there are.
    fn run_backward(
        &self,
        qkv: Qkv<'_, E>,
        grad_out: &CudaSlice<E>,
        gradients: InputGradients<'_, E>,
        workspace: &mut BackwardWorkspace<E>,
        maps: bool,
    ) -> Result<usize> {
        let n = self.check(&qkv)?;
        check_len("grad_out", self.heads * n * self.shape.value_dim, grad_out.len())?;
        check_len("gradients.q", qkv.q.len(), gradients.q.len())?;
        check_len("gradients.k", qkv.k.len(), gradients.k.len())?;
        check_len("gradients.v", qkv.v.len(), gradients.v.len())?;
        if self.shape.windowless.is_some() {
            return Err(Error::Unsupported {
                argument: "the number of windows",
                expected: "one for each head where gradients are asked for",
                got: 0,
            });
        }
        let bytes = backward_bytes::<E>(&self.shape);
        self.device.check_shared(bytes)?;
        let kernels = match self.backward.get() {
            Some(kernels) => kernels,
            None => {
                let kernels = self.device.backward_kernels::<E>(self.shape.sizes())?;
                self.backward.get_or_init(|| kernels)
            }
        };
        let plan = self.whole(n, &qkv)?;
        let stream = self.device.stream();
        let call = self.call(&plan, &qkv, None, &mut workspace.forward)?;
        let call = Call {
            grad_out: grad_out.device_ptr(stream).0,
            log_total: room(&self.device, &mut workspace.log_total, self.heads * n)?,
            delta: room(&self.device, &mut workspace.delta, self.heads * n)?,
            ..call
        };
        let back = self.back(&plan, n, gradients, workspace, maps)?;
        self.many(&plan, call)?;
        self.launch_backward(kernels, &plan, bytes as u32, call, back)?;
        Ok(plan.tiles)
    }

    /// Where everything is.
    fn back(
        &self,
        plan: &Plan,
        n: usize,
        gradients: InputGradients<'_, E>,
        workspace: &mut BackwardWorkspace<E>,
        maps: bool,
    ) -> Result<Back> {
        let (device, stream) = (&self.device, self.device.stream());
        let Shape { dim, value_dim, features, .. } = self.shape;
        let kv_heads = self.shape.kv_heads();
        let segments = plan.segments * kv_heads;
        let versions = segments * plan.segment_tiles;
        let (sums, sinks) = (features * (value_dim + 3), SINKS * (dim + value_dim));
        let means = features * value_dim;
        let of_sequences = plan.sequences.len() * kv_heads * sinks;
        let weights = (n * self.heads / kv_heads) as f32;
        let mut back = Back {
            dq: gradients.q.device_ptr_mut(stream).0,
            dk: gradients.k.device_ptr_mut(stream).0,
            dv: gradients.v.device_ptr_mut(stream).0,
            sums: room(device, &mut workspace.sums, segments * sums)?,
            means: room(device, &mut workspace.means, versions * means)?,
            mean_unit: room(device, &mut workspace.mean_unit, versions * features / TILE)?,
            mean_level: room(device, &mut workspace.mean_level, versions * features)?,
            mean_delta: room(device, &mut workspace.mean_delta, versions * features)?,
            segments: plan.segments as i32,
            shrink: (weights.log2().ceil() - 14.0).max(0.0),
            sinks: room(device, &mut workspace.sinks, 4 * segments * sinks)?,
            sink_totals: room(device, &mut workspace.sink_totals, of_sequences)?,
            ..Back::default()
        };
        if maps {
            let moments = 2 * features * (dim + 1);
            let decays = (self.heads + kv_heads) * plan.tiles;
            back.moments = room(device, &mut workspace.moments, segments * moments)?;
            back.moment_totals = room(device, &mut workspace.moment_totals, kv_heads * moments)?;
            back.decays = room(device, &mut workspace.decays, decays)?;
        }
        Ok(back)
    }

    fn launch_backward(
        &self,
        kernels: &BackwardKernels,
        plan: &Plan,
        bytes: u32,
        call: Call,
        back: Back,
    ) -> Result<()> {
        let Shape { dim, value_dim, features, sinks, .. } = self.shape;
        let (segments, tiles) = (plan.segments as u32, plan.tiles as u32);
        let (kv_heads, sequences) = (self.shape.kv_heads() as u32, plan.sequences.len() as u32);
        let blocks = (features / TILE) as u32;
        let launch = |kernel: &CudaFunction, grid, threads, bytes, back: Back| -> Result<()> {
            let block_dim = (threads, 1, 1);
            let config = LaunchConfig { grid_dim: grid, block_dim, shared_mem_bytes: bytes };
            let mut builder = self.device.stream().launch_builder(kernel);
            // SAFETY: the kernels take these two; all they point to is as long as the plan says,
            // and the stream keeps the order in which it is used.
            unsafe { builder.arg(&call).arg(&back).launch(config) }?;
            Ok(())
        };
        let gathers = (segments * blocks, kv_heads, 1);
        if plan.is_split() {
            launch(&kernels.gather, gathers, THREADS, bytes, back)?;
            let rows = (features * value_dim / 256) as u32;
            launch(&kernels.scan_back, (rows, kv_heads, sequences), 256, 0, back)?;
        }
        launch(&kernels.gather, gathers, THREADS, bytes, Back { versions: 1, ..back })?;
        let queries = (tiles, self.heads as u32, 1);
        launch(&kernels.query_gradients, queries, THREADS, bytes, back)?;
        if sinks > 0 {
            launch(&kernels.sink_gradients, (segments, kv_heads, 1), THREADS, bytes, back)?;
            let elements = (SINKS * (dim + value_dim) / 256) as u32;
            launch(&kernels.sink_totals, (elements, kv_heads, sequences), 256, 0, back)?;
        }
        launch(&kernels.key_gradients, (tiles, kv_heads, 1), THREADS, bytes, back)?;
        if back.moments != 0 {
            launch(&kernels.moments, (segments * blocks, kv_heads, 2), THREADS, bytes, back)?;
            let elements = (features * (dim + 1)).div_ceil(256) as u32;
            launch(&kernels.moment_totals, (elements, kv_heads, 2), 256, 0, back)?;
        }
        Ok(())
    }
}

/// Shared memory of a block, as `Places` in kernels/backward.cu.
fn backward_bytes<E: Element>(shape: &Shape) -> usize {
    let pack = 16 / size_of::<E>();
    let (key, value) = (shape.dim + pack, shape.value_dim + pack);
    let rest = match E::CODE {
        code if code == bf16::CODE => key + value,
        code if code == f32::CODE => TILE + 4,
        _ => key,
    };
    TILE * (2 * key + 2 * value + rest) * size_of::<E>()
}

/// The gradients of a map's parameters from what the device has summed over queries and keys:
/// gradients of log-features times tokens, `[m, d]`, and without them, `[m]`.
///
/// They depend on the tokens by these sums only, so a few made-up tokens that have the same ones
/// stand for all: the centre μ moved by one in each direction, and the centre itself.
fn of_map(map: &DctMap<f64>, scale: f64, query: &[f64], key: &[f64]) -> DctGradients {
    let (dim, features) = (map.dim(), map.features());
    let width = (dim + 1).next_multiple_of(16);
    let mut scratch = vec![0.0; map.vjp_scratch_len(width)];
    let mut sums = map.new_sums();
    let params = map.params();
    for (is_query, moments, center) in
        [(true, query, &params.query.center), (false, key, &params.key.center)]
    {
        let (products, totals) = moments.split_at(features * dim);
        let (mut x, mut grad) = (vec![0.0; dim * width], vec![0.0; features * width]);
        for (i, (row, mu)) in x.chunks_exact_mut(width).zip(center).enumerate() {
            row.fill(*mu);
            row[i] += 1.0;
        }
        let rows = products.chunks_exact(dim).zip(totals).zip(grad.chunks_exact_mut(width));
        for ((products, total), row) in rows {
            row[dim] = *total;
            for (i, (product, mu)) in products.iter().zip(center).enumerate() {
                row[i] = scale.sqrt() * product - mu * total;
                row[dim] -= row[i];
            }
        }
        let panel = PanelGradients { width, x: &x, grad: &grad, grad_x: None };
        if is_query {
            map.query_vjp(panel, &mut sums, &mut scratch);
        } else {
            map.key_vjp(panel, &mut sums, &mut scratch);
        }
    }
    map.gradients(&sums)
}

#[cfg(test)]
mod tests {
    use dijiang::kernel::{DctMapConfig, Envelope, Mixing, Pairing};

    use super::*;

    fn numbers(gradients: &DctGradients) -> Vec<f64> {
        let sides = [&gradients.query, &gradients.key];
        let of_sides = sides
            .map(|side| [&side.center[..], &side.scale, &side.radii, &side.projection].concat());
        [of_sides.concat(), gradients.log_weight.clone(), vec![gradients.log_mix]].concat()
    }

    /// Of every kind of map: made-up tokens have the gradients of those that they stand for.
    #[test]
    fn sums_are_all_that_a_maps_gradients_need() {
        let (d, n, scale) = (16, 48, 0.3f64);
        let config = DctMapConfig::new().with_blocks(2);
        let configs = [
            config.clone(),
            config.clone().with_mixing(Mixing::Mixed).with_envelope(Envelope::Gaussian),
            config.with_pairing(Pairing::Antithetic),
        ];
        let number = |i: usize, side: usize| (0.7 * (i * i + 3 * side) as f64).sin();
        for (config, kind) in configs.iter().flat_map(|config| [0, 1, 2].map(|i| (config, i))) {
            let mut params = config.params(d).expect("sizes are right");
            for i in 0..d {
                (params.query.center[i], params.key.center[i]) = (number(i, 5), number(i, 6));
            }
            let params = match kind {
                0 => params,
                1 => params.to_deep(),
                _ => params.to_dense().expect("it is small"),
            };
            let map = DctMap::<f64>::from_params(params).expect("sizes are right");
            let m = map.features();
            let mut sums = map.new_sums();
            let mut scratch = vec![0.0; map.vjp_scratch_len(n)];
            let mut moments = [vec![0.0; m * (d + 1)], vec![0.0; m * (d + 1)]];
            for (side, moments) in moments.iter_mut().enumerate() {
                let x: Vec<f64> = (0..d * n).map(|i| number(i, side)).collect();
                let grad: Vec<f64> = (0..m * n).map(|i| number(i, side + 2)).collect();
                let panel = PanelGradients { width: n, x: &x, grad: &grad, grad_x: None };
                match side {
                    0 => map.query_vjp(panel, &mut sums, &mut scratch),
                    _ => map.key_vjp(panel, &mut sums, &mut scratch),
                }
                for (f, grad) in grad.chunks_exact(n).enumerate() {
                    for (i, x) in x.chunks_exact(n).enumerate() {
                        let product: f64 = grad.iter().zip(x).map(|(a, b)| a * b).sum();
                        moments[f * d + i] = product / scale.sqrt();
                    }
                    moments[m * d + f] = grad.iter().sum();
                }
            }
            let expected = numbers(&map.gradients(&sums));
            let got = numbers(&of_map(&map, scale, &moments[0], &moments[1]));
            for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                let error = (got - expected).abs();
                assert!(error < 1e-9 * (1.0 + expected.abs()), "{i}: {got} {expected}");
            }
        }
    }
}
