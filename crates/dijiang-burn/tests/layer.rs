//! The layer by both paths against that of [`dijiang`]: outputs, caches, gradients, conversions.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::Path;

use burn::module::{Module, Param};
use burn::tensor::{Bool, Device, Element, Tensor, TensorData};
use dijiang::Real;
use dijiang::attention::{Causality, KeyMask, Window};
use dijiang::kernel::{DctMap, DctMapConfig, DctParams, Envelope, Mixing, Pairing, Projection};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention as NdLayer, DijiangOptions,
    Rotary, RotaryPairing, SoftmaxAttention,
};
use dijiang_burn::{AttentionPath, DijiangAttention, DijiangCache, DijiangInput};
use dijiang_testing::gradients::{CASES, golden_problem};
use dijiang_testing::{Golden, Random, assert_close, cast};
use ndarray::{Array1, Array2, Array3, ArrayD, Axis, s};

/// A layer, and the batch it is given.
#[derive(Debug, Clone)]
struct Case {
    name: &'static str,
    config: AttentionConfig,
    options: DijiangOptions,
    kind: Kind,
    tokens: usize,
    masked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Drawn,
    Deep,
    Dense,
}

fn cases() -> Vec<Case> {
    let config = |model, heads, kv_heads, dim| {
        AttentionConfig::new(model, heads).with_kv_heads(kv_heads).with_head_dim(dim)
    };
    let options = DijiangOptions::new;
    let interleaved = Rotary::new(100.0).with_pairing(RotaryPairing::Interleaved);
    let case = |name, config, options| Case {
        name,
        config,
        options,
        kind: Kind::Drawn,
        tokens: 197,
        masked: false,
    };
    vec![
        case(
            "window, sinks, grouped queries, padding",
            config(40, 4, 2, 16).with_rotary(Rotary::new(100.0).with_dims(10)),
            options().with_window(Window::new(16, 1)),
        )
        .masked(),
        Case {
            tokens: 53,
            ..case(
                "no window, decay",
                config(12, 2, 2, 8),
                options().with_window(None).with_log_decay(-0.03),
            )
        },
        case(
            "a window for each head, decay, antithetic pairs",
            config(20, 6, 3, 8).with_rotary(interleaved),
            options()
                .with_windows(vec![Window::new(16, 1), Window::new(32, 0), Window::new(16, 1)])
                .with_sinks(3)
                .with_log_decay(-0.05)
                .with_map(DctMapConfig::new().with_pairing(Pairing::Antithetic)),
        )
        .masked(),
        case(
            "odd chunks, mixed, two blocks, Gaussian envelope",
            config(9, 3, 1, 6).with_scale(0.3),
            options().with_window(Window::new(7, 1)).with_sinks(2).with_map(
                DctMapConfig::new()
                    .with_blocks(2)
                    .with_mixing(Mixing::Mixed)
                    .with_envelope(Envelope::Gaussian),
            ),
        ),
        Case {
            kind: Kind::Deep,
            ..case("deep", config(16, 2, 2, 8), options().with_window(Window::new(8, 2)))
        },
        Case {
            kind: Kind::Dense,
            tokens: 65,
            ..case("dense, no window", config(16, 4, 2, 4), options().with_window(None)).masked()
        },
        case(
            "bidirectional",
            config(24, 4, 2, 8).with_causality(Causality::Bidirectional),
            options().with_map(DctMapConfig::new().with_blocks(2)),
        )
        .masked(),
        // More chunks than are summed by one product, twice over, and more tokens than a segment.
        Case {
            tokens: 1201,
            ..case(
                "many chunks",
                config(6, 1, 1, 4),
                options().with_window(Window::new(4, 0)).with_log_decay(-0.01),
            )
        },
    ]
}

impl Case {
    fn masked(self) -> Self {
        Self { masked: true, ..self }
    }

    /// The layer, with maps that are not those at the beginning.
    fn layer<T: Real>(&self, random: &mut Random) -> NdLayer<T> {
        let (d, model) = (self.config.head_dim.unwrap(), self.config.model_dim);
        let (width, kv_width) = (self.config.heads * d, self.config.kv_heads * d);
        let mut matrix = |rows: usize, columns: usize| {
            cast::<T, _>(&random.normals((rows, columns), 1.0 / (columns as f64).sqrt()))
        };
        let [q, k, v, o] = [(width, model), (kv_width, model), (kv_width, model), (model, width)]
            .map(|(rows, columns)| matrix(rows, columns));
        let mut bias = |len: usize| cast::<T, _>(&random.normals(len, 0.1));
        let weights = AttentionWeights::new(q, k, v, o).with_biases(
            bias(width),
            bias(kv_width),
            bias(kv_width),
            bias(model),
        );
        let softmax = SoftmaxAttention::new(self.config.clone(), weights).unwrap();
        let layer = NdLayer::from_softmax(&softmax, self.options.clone()).unwrap();
        let maps = layer.maps().iter().map(|map| {
            let params = match self.kind {
                Kind::Drawn => map.params().clone(),
                Kind::Deep => map.params().to_deep(),
                Kind::Dense => map.params().to_dense().unwrap(),
            };
            DctMap::from_params(moved(params, random)).unwrap()
        });
        let maps = maps.collect();
        layer.with_maps(maps).unwrap()
    }

    /// Hidden states of two sequences, and which of their keys count.
    fn batch(&self, random: &mut Random) -> (Array3<f64>, Option<Vec<Vec<bool>>>) {
        let n = self.tokens;
        let x = random.normals((2, n, self.config.model_dim), 1.0);
        let padded = (0..n).map(|j| j >= 5 && j % 7 != 6).collect();
        (x, self.masked.then(|| vec![padded, (0..n).map(|j| j < n - 9).collect()]))
    }
}

/// Other numbers, rounded to f32.
fn moved(mut params: DctParams, random: &mut Random) -> DctParams {
    let mut shift = |values: &mut [f64], by: f64| {
        for value in values {
            *value = f64::from((*value + by * random.normal()) as f32);
        }
    };
    for side in [&mut params.query, &mut params.key] {
        shift(&mut side.center, 0.3);
        shift(&mut side.scale, 0.1);
        shift(&mut side.radii, 0.1);
    }
    match &mut params.projection {
        Projection::Deep { query, key } | Projection::Dense { query, key } => {
            shift(query, 0.05);
            shift(key, 0.05);
        }
        Projection::Mixed { .. } | Projection::Dct => {}
    }
    shift(&mut params.log_weight, 0.2);
    params.log_mix = -0.75;
    params
}

fn tensor<T: Real + Element, const D: usize>(x: &ArrayD<f64>, device: &Device) -> Tensor<D> {
    let elements: Vec<T> = x.iter().map(|&x| T::from_f64(x)).collect();
    Tensor::from_data(TensorData::new(elements, x.shape().to_vec()), (device, T::dtype()))
}

fn array<T: Real + Element, const D: usize>(x: Tensor<D>) -> ArrayD<T> {
    let shape = x.dims();
    let elements = x.try_into_vec_as().unwrap();
    ArrayD::from_shape_vec(&shape[..], elements).unwrap()
}

fn mask(valid: &[Vec<bool>], device: &Device) -> Tensor<2, Bool> {
    let masked: Vec<bool> = valid.iter().flatten().map(|&valid| !valid).collect();
    Tensor::from_data(TensorData::new(masked, [valid.len(), valid[0].len()]), device)
}

fn input<T: Real + Element>(
    x: &Array3<f64>,
    valid: Option<&[Vec<bool>]>,
    device: &Device,
) -> DijiangInput {
    let input = DijiangInput::new(tensor::<T, 3>(&x.clone().into_dyn(), device));
    match valid {
        Some(valid) => input.mask_pad(mask(valid, device)),
        None => input,
    }
}

/// The paths there are on a device.
fn paths(device: &Device) -> Vec<AttentionPath> {
    match *device == Device::flex() {
        true => vec![AttentionPath::Tensors, AttentionPath::Automatic],
        false => vec![AttentionPath::Tensors],
    }
}

fn has<T: Element>(device: &Device) -> bool {
    device.supports_dtype(T::dtype())
}

fn outputs<T: Real + Element>(tolerance: f64) {
    let device = Device::default();
    if !has::<T>(&device) {
        return;
    }
    for case in cases() {
        let random = &mut Random::new(7);
        let layer = case.layer::<T>(random);
        let (x, valid) = case.batch(random);
        let key_mask = |i: usize| valid.as_ref().map_or(KeyMask::All, |v| KeyMask::Valid(&v[i]));
        let expected = x.outer_iter().enumerate().map(|(i, x)| {
            dijiang_testing::to_f64(&layer.forward(&cast::<T, _>(&x), key_mask(i)).unwrap())
        });
        let expected: Vec<Array2<f64>> = expected.collect();
        for path in paths(&device) {
            let attention = DijiangAttention::from_layer(&layer, &device).unwrap().with_path(path);
            let out = attention.forward(input::<T>(&x, valid.as_deref(), &device)).unwrap();
            for (i, expected) in expected.iter().enumerate() {
                let got = array::<T, 3>(out.clone()).index_axis_move(Axis(0), i);
                assert_close((case.name, path, i), &got, &expected.clone().into_dyn(), tolerance);
            }
        }
    }
}

#[test]
fn outputs_are_those_of_the_layer_in_f32() {
    outputs::<f32>(1e-5);
}

#[test]
fn outputs_are_those_of_the_layer_in_f64() {
    outputs::<f64>(1e-11);
}

/// Through a cache in parts, single tokens among them, comes what comes of the whole.
#[test]
fn a_cache_in_parts_is_the_whole() {
    let device = Device::default();
    for case in cases().into_iter().filter(|case| case.config.causality == Causality::Causal) {
        let random = &mut Random::new(11);
        let layer = case.layer::<f32>(random);
        let (x, valid) = case.batch(random);
        for path in paths(&device) {
            let attention = DijiangAttention::from_layer(&layer, &device).unwrap().with_path(path);
            let whole = array::<f32, 3>(
                attention.forward(input::<f32>(&x, valid.as_deref(), &device)).unwrap(),
            );
            let mut cache = attention.new_cache(2).unwrap();
            let (mut start, mut snapshot): (usize, Option<DijiangCache>) = (0, None);
            for len in [1, 1, 14, 1, 33, 1, case.tokens - 51] {
                let end = start + len;
                let part = x.slice(s![.., start..end, ..]).to_owned();
                let valid = valid.as_ref().map(|valid| {
                    valid.iter().map(|valid| valid[start..end].to_vec()).collect::<Vec<_>>()
                });
                let input = input::<f32>(&part, valid.as_deref(), &device);
                if start == 16 {
                    snapshot = Some(cache.clone());
                }
                let out = attention.forward_cache(input.clone(), &mut cache).unwrap();
                let out = array::<f32, 3>(out);
                let expected =
                    dijiang_testing::to_f64(&whole.slice(s![.., start..end, ..]).to_owned());
                assert_close((case.name, path, start), &out, &expected.into_dyn(), 2e-5);
                if let Some(cache) = &mut snapshot {
                    let again = attention.forward_cache(input, cache).unwrap();
                    assert_eq!(array::<f32, 3>(again), out, "{}: a snapshot goes on", case.name);
                    snapshot = None;
                }
                start = end;
            }
            assert_eq!(cache.position(), case.tokens);
            let bytes = cache.bytes();
            // As many as are whole chunks of every window here.
            let more = Array3::zeros((2, 7 * 32, case.config.model_dim));
            attention.forward_cache(input::<f32>(&more, None, &device), &mut cache).unwrap();
            assert_eq!(cache.bytes(), bytes, "{}, {path:?}: the state grows", case.name);
        }
    }
}

/// A parameter's gradient as an array.
fn gradient<T: Real + Element, const D: usize>(
    param: &Param<Tensor<D>>,
    gradients: &burn::tensor::Gradients,
) -> ArrayD<T> {
    array::<T, D>(param.val().grad(gradients).expect("a gradient"))
}

fn gradients<T: Real + Element>(tolerance: f64) {
    let device = Device::default();
    if !has::<T>(&device) {
        return;
    }
    for case in cases() {
        let random = &mut Random::new(13);
        let layer = case.layer::<T>(random);
        let (x, valid) = case.batch(random);
        let cotangent = random.normals(x.raw_dim(), 1.0);
        let of_layer: Vec<_> = (0..2)
            .map(|i| {
                let mask = valid.as_ref().map_or(KeyMask::All, |v| KeyMask::Valid(&v[i]));
                let x = cast::<T, _>(&x.index_axis(Axis(0), i));
                let cotangent = cast::<T, _>(&cotangent.index_axis(Axis(0), i));
                layer.backward(&x, mask, &cotangent).unwrap()
            })
            .collect();
        for path in paths(&device) {
            let device = device.clone().autodiff();
            let attention = DijiangAttention::from_layer(&layer, &device).unwrap().with_path(path);
            let tracked = tensor::<T, 3>(&x.clone().into_dyn(), &device).require_grad();
            let input = match &valid {
                Some(valid) => DijiangInput::new(tracked.clone()).mask_pad(mask(valid, &device)),
                None => tracked.clone().into(),
            };
            let out = attention.forward(input).unwrap();
            let loss = (out * tensor::<T, 3>(&cotangent.clone().into_dyn(), &device)).sum();
            let grads = loss.backward();

            let check = |what: &str, got: ArrayD<T>, expected: Array1<f64>| {
                let got = Array1::from_iter(got.iter().copied());
                assert_close((case.name, path, what), &got, &expected, tolerance);
            };
            let got = array::<T, 3>(tracked.grad(&grads).unwrap());
            let expected = of_layer.iter().flat_map(|g| dijiang_testing::to_f64(&g.x));
            check("x", got, expected.collect());
            let projections = [
                (&attention.query, "q"),
                (&attention.key, "k"),
                (&attention.value, "v"),
                (&attention.output, "o"),
            ];
            for (linear, name) in projections {
                let mut weight = Array2::zeros(linear.weight.val().dims());
                let mut bias = Array1::zeros(weight.ncols());
                for g in &of_layer {
                    let (w, b) = match name {
                        "q" => (&g.weights.q, &g.weights.q_bias),
                        "k" => (&g.weights.k, &g.weights.k_bias),
                        "v" => (&g.weights.v, &g.weights.v_bias),
                        _ => (&g.weights.o, &g.weights.o_bias),
                    };
                    weight += &dijiang_testing::to_f64(w).reversed_axes();
                    bias += &dijiang_testing::to_f64(b.as_ref().unwrap());
                }
                let weight = weight.as_standard_layout().iter().copied().collect();
                check(name, gradient(&linear.weight, &grads), weight);
                check(name, gradient(linear.bias.as_ref().unwrap(), &grads), bias);
            }
            let sum = |of: &dyn Fn(usize, usize) -> Vec<f64>| -> Array1<f64> {
                let heads = 0..case.config.kv_heads;
                heads
                    .flat_map(|h| {
                        let (a, b) = (of(0, h), of(1, h));
                        a.into_iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>()
                    })
                    .collect()
            };
            let map = |i: usize, h: usize| &of_layer[i].maps[h];
            let maps = &attention.maps;
            for (side, name) in [(&maps.query, "query"), (&maps.key, "key")] {
                let of = |i, h| if name == "query" { &map(i, h).query } else { &map(i, h).key };
                check(name, gradient(&side.center, &grads), sum(&|i, h| of(i, h).center.clone()));
                check(name, gradient(&side.scale, &grads), sum(&|i, h| of(i, h).scale.clone()));
                check(name, gradient(&side.radii, &grads), sum(&|i, h| of(i, h).radii.clone()));
                if let Some(projection) = &side.projection {
                    let expected = sum(&|i, h| of(i, h).projection.clone());
                    check(name, gradient(projection, &grads), expected);
                }
            }
            let expected = sum(&|i, h| map(i, h).log_weight.clone());
            check("log_weight", gradient(&maps.log_weight, &grads), expected);
            // Without another part beside it the mix cancels, to no more than roundings.
            if case.config.causality == Causality::Causal && !layer.windows().is_empty() {
                let expected = sum(&|i, h| vec![map(i, h).log_mix]);
                check("log_mix", gradient(&maps.log_mix, &grads), expected);
            }
            if case.options.log_decay < 0.0 {
                let expected = sum(&|i, h| vec![of_layer[i].log_decay[h]]);
                check("log_decay", gradient(&maps.log_decay, &grads), expected);
            }
        }
    }
}

#[test]
fn gradients_are_those_of_the_layer_in_f32() {
    gradients::<f32>(1e-4);
}

#[test]
fn gradients_are_those_of_the_layer_in_f64() {
    gradients::<f64>(1e-10);
}

/// The cases of the golden file through projections that hand queries, keys and values on as they
/// are, side by side in the hidden states; values are filled up with zeros to the head dimension.
fn golden<T: Real + Element>(tolerance: f64) {
    let device = Device::default();
    if !has::<T>(&device) {
        return;
    }
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden");
    let golden = Golden::read(&directory, "attention_f64.safetensors");
    let cases = ["b1", "b2a"].into_iter().flat_map(|tag| CASES.map(|case| (tag, case)));
    for (tag, case) in cases {
        let problem = golden_problem(&golden, tag, case);
        let (d, n) = (problem.inputs.q.shape()[2], problem.inputs.tokens());
        let at = |place: usize| {
            Array2::from_shape_fn((d, 3 * d), |(i, j)| T::from_f64(f64::from(j == place * d + i)))
        };
        let weights = AttentionWeights::new(at(0), at(1), at(2), at(0).reversed_axes());
        let causality = match problem.causal {
            true => Causality::Causal,
            false => Causality::Bidirectional,
        };
        let config = AttentionConfig::new(3 * d, 1).with_head_dim(d).with_causality(causality);
        let options = DijiangOptions::new()
            .with_windows(problem.windows.clone())
            .with_sinks(problem.sinks)
            .with_map(
                DctMapConfig::new()
                    .with_blocks(problem.maps[0].blocks())
                    .with_pairing(problem.maps[0].pairing),
            )
            .with_log_decay(problem.log_decay[0]);
        let softmax = SoftmaxAttention::new(config, weights).unwrap();
        let map = DctMap::from_params(problem.maps[0].clone()).unwrap();
        let layer = NdLayer::from_softmax(&softmax, options).unwrap().with_maps(vec![map]).unwrap();
        if layer.windows().iter().any(|window| window.kept > 0) {
            let error = DijiangAttention::from_layer(&layer, &device).map(|_| ()).unwrap_err();
            assert!(error.to_string().contains("window kept"), "{error}");
            continue;
        }

        let mut x = Array3::zeros((1, n, 3 * d));
        let mut cotangent = Array3::zeros((1, n, 3 * d));
        for (place, part) in
            [&problem.inputs.q, &problem.inputs.k, &problem.inputs.v].into_iter().enumerate()
        {
            let width = part.shape()[2];
            x.slice_mut(s![.., .., place * d..place * d + width]).assign(part);
        }
        let e = problem.inputs.v.shape()[2];
        cotangent.slice_mut(s![.., .., ..e]).assign(&problem.cotangent);
        for path in paths(&device) {
            let device = device.clone().autodiff();
            let attention = DijiangAttention::from_layer(&layer, &device).unwrap().with_path(path);
            let tracked = tensor::<T, 3>(&x.clone().into_dyn(), &device).require_grad();
            let input = match &problem.valid {
                Some(valid) => {
                    let valid = [valid.clone()];
                    DijiangInput::new(tracked.clone()).mask_pad(mask(&valid, &device))
                }
                None => tracked.clone().into(),
            };
            let out = attention.forward(input).unwrap();
            let loss = (out.clone() * tensor::<T, 3>(&cotangent.clone().into_dyn(), &device)).sum();
            let grads = loss.backward();
            let check = |what: &str, got: ArrayD<T>| {
                let name = format!("{tag}.{case}.{what}");
                let expected = golden.array::<ndarray::IxDyn>(&name);
                let got = Array1::from_iter(got.iter().copied());
                let expected = Array1::from_iter(expected.iter().copied());
                assert_close((name, path), &got, &expected, tolerance);
            };
            let out = array::<T, 3>(out);
            check("output", out.slice(s![0, .., ..e]).to_owned().into_dyn());
            let of_x = array::<T, 3>(tracked.grad(&grads).unwrap());
            let part = |start: usize, width: usize| {
                of_x.slice(s![0, .., start..start + width]).to_owned().into_dyn()
            };
            check("grad.q", part(0, d));
            check("grad.k", part(d, d));
            check("grad.v", part(2 * d, e));
            let maps = &attention.maps;
            for (side, name) in [(&maps.query, "query"), (&maps.key, "key")] {
                check(&format!("grad.{name}_center"), gradient(&side.center, &grads));
                check(&format!("grad.{name}_scale"), gradient(&side.scale, &grads));
                check(&format!("grad.{name}_radii"), gradient(&side.radii, &grads));
            }
            check("grad.log_weight", gradient(&maps.log_weight, &grads));
            if !problem.windows.is_empty() {
                check("grad.log_mix", gradient(&maps.log_mix, &grads));
            }
            if case.ends_with("decay") {
                check("grad.log_decay", gradient(&maps.log_decay, &grads));
            }
        }
    }
}

#[test]
fn golden_gradients_in_f32() {
    golden::<f32>(1e-4);
}

#[test]
fn golden_gradients_in_f64() {
    golden::<f64>(1e-9);
}

/// There and back: the same weights, maps and choices.
#[test]
fn a_layer_comes_back_as_it_was() {
    let device = Device::default();
    for case in cases() {
        let layer = case.layer::<f32>(&mut Random::new(17));
        let attention = DijiangAttention::from_layer(&layer, &device).unwrap();
        let back = attention.to_layer::<f32>().unwrap();
        assert_eq!(back.weights(), layer.weights(), "{}", case.name);
        assert_eq!(back.config(), layer.config(), "{}", case.name);
        assert_eq!(back.windows(), layer.windows(), "{}", case.name);
        assert_eq!(back.sinks(), layer.sinks(), "{}", case.name);
        for (back, map) in back.maps().iter().zip(layer.maps()) {
            let exact = |params: &DctParams| {
                let mut params = params.clone();
                for side in [&mut params.query, &mut params.key] {
                    side.scale.iter_mut().for_each(|x| *x = f64::from(*x as f32));
                }
                params
            };
            assert_eq!(exact(back.params()), exact(map.params()), "{}", case.name);
        }
        // A layer made by its config takes its records.
        let record = attention.clone().into_record();
        let made = attention.config().init(&device).unwrap().load_record(record);
        let x = Random::new(3).normals((1, 70, case.config.model_dim), 1.0);
        let [a, b] = [&attention, &made].map(|attention| {
            array::<f32, 3>(attention.forward(input::<f32>(&x, None, &device)).unwrap())
        });
        assert_eq!(a, b, "{}", case.name);
    }
}
