//! Attention on candle's tensors against golden values, the crate's own types and itself.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use candle_core::{DType, Device, Tensor, Var, WithDType};
use candle_nn::{VarBuilder, VarMap};
use dijiang::Real;
use dijiang::attention::{KeyMask, LinearConfig, Operator, Qkv, Window};
use dijiang::candle::{AttentionOptions, CandleAttention, HeadLayout, MapTensors, causal, full};
use dijiang::kernel::{DctMap, DctMapConfig, DctParams, Envelope, FavorConfig, Mixing, Pairing};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    Rotary, SoftmaxAttention,
};
use dijiang_testing::gradients::{CASES, golden_problem};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Golden, Random, assert_close, cast, to_f64, tolerance};
use ndarray::{Array, Array3, Array4, ArrayD, Axis, Dimension};

fn tensor<T: Real + WithDType, D: Dimension>(array: &Array<T, D>) -> Tensor {
    Tensor::from_vec(array.iter().copied().collect(), array.shape(), &Device::Cpu).unwrap()
}

fn array<T: Real + WithDType>(tensor: &Tensor) -> ArrayD<T> {
    ArrayD::from_shape_vec(tensor.dims(), tensor.flatten_all().unwrap().to_vec1().unwrap()).unwrap()
}

/// The same map with every tensor a variable, and the variables by name.
fn variables(map: &MapTensors) -> (MapTensors, Vec<(&'static str, Var)>) {
    let mut vars = Vec::new();
    let map = map.try_map(|name, tensor| {
        let var = Var::from_tensor(tensor)?;
        vars.push((name, var.clone()));
        Ok(var.into_inner())
    });
    (map.unwrap(), vars)
}

/// The name a map's tensor has in the golden file.
fn golden_name(name: &str) -> String {
    name.replace('.', "_")
}

/// Outputs and gradients of every golden case through candle's graph, in both layouts: two
/// sequences, of which the second has no part in the loss.
#[test]
fn golden_gradients_in_f64() {
    let golden = Golden::open("attention_f64.safetensors");
    for (tag, case, layout) in ["b1", "b2a"]
        .into_iter()
        .flat_map(|tag| CASES.map(|case| (tag, case)))
        .flat_map(|(tag, case)| {
            [HeadLayout::HeadsFirst, HeadLayout::TokensFirst].map(|layout| (tag, case, layout))
        })
    {
        let problem = golden_problem(&golden, tag, case);
        let swap = |x: Tensor| {
            if layout == HeadLayout::TokensFirst { x.transpose(1, 2).unwrap() } else { x }
        };
        let batch = |x: &Array3<f64>| {
            let one = tensor(&x.view().insert_axis(Axis(0)).to_owned());
            swap(Tensor::cat(&[&one, &(&one * 0.7).unwrap()], 0).unwrap())
        };
        let [q, k, v] = [&problem.inputs.q, &problem.inputs.k, &problem.inputs.v]
            .map(|x| Var::from_tensor(&batch(x)).unwrap());
        let (map, vars) =
            variables(&MapTensors::new(&problem.maps[0], problem.log_decay[0]).unwrap());
        let mask = problem.valid.as_ref().map(|valid| {
            let row: Vec<u8> = valid.iter().map(|&valid| u8::from(valid)).collect();
            Tensor::from_vec([row.clone(), row].concat(), (2, valid.len()), &Device::Cpu).unwrap()
        });
        let mut options = AttentionOptions::new().with_layout(layout);
        (options.windows, options.sinks) = (&problem.windows, problem.sinks);
        options.key_mask = mask.as_ref();
        let attention = if problem.causal { causal } else { full };
        let out = attention(&q, &k, &v, &[map], &options).unwrap();
        assert!(out.is_contiguous());

        let one = tensor(&problem.cotangent.view().insert_axis(Axis(0)).to_owned());
        let cotangent = swap(Tensor::cat(&[&one, &one.zeros_like().unwrap()], 0).unwrap());
        let loss = (out * cotangent).unwrap().sum_all().unwrap();
        assert!((loss.to_scalar::<f64>().unwrap() - problem.loss()).abs() < 1e-10);
        let gradients = loss.backward().unwrap();

        let expected =
            |name: &str| golden.array::<ndarray::IxDyn>(&format!("{tag}.{case}.grad.{name}"));
        let context = |name: &str| format!("{tag}.{case}.{name} {layout:?}");
        for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
            let got = swap(gradients.get(var).unwrap().clone());
            let (first, second) = (got.get(0).unwrap().get(0).unwrap(), got.get(1).unwrap());
            assert_close(context(name), &array::<f64>(&first), &expected(name), 1e-9);
            assert_eq!(second.abs().unwrap().max_all().unwrap().to_scalar::<f64>().unwrap(), 0.0);
        }
        for (name, var) in
            vars.iter().filter(|(name, _)| *name != "log_decay" || case.ends_with("decay"))
        {
            let got = array::<f64>(gradients.get(var).unwrap());
            assert_eq!(got.shape(), var.dims());
            if *name == "log_mix" && problem.windows.is_empty() && problem.sinks == 0 {
                // Without a local window the mix cancels, and rounding is all that is left.
                assert!(got.iter().all(|x| x.abs() < 1e-9));
                continue;
            }
            let expected = expected(&golden_name(name)).to_shape(got.shape()).unwrap().to_owned();
            assert_close(context(name), &got, &expected, 1e-9);
        }
    }
}

/// A random problem of grouped queries: q `[b, h, n, d]`, k and v `[b, h_kv, n, ·]`, and the maps.
fn random_problem(seed: u64) -> ([Array4<f64>; 3], Vec<DctParams>) {
    let mut random = Random::new(seed);
    let (b, kv_heads, group, n) = (
        random.choose(&[1, 3]),
        random.choose(&[1, 2]),
        random.choose(&[1, 3]),
        random.choose(&[1, 17, 70]),
    );
    let (d, e) = (random.choose(&[3, 8, 16]), random.choose(&[1, 5, 16]));
    let map = |h: usize| match seed % 3 {
        0 => DctMapConfig::new()
            .with_blocks(2)
            .with_mixing(Mixing::Mixed)
            .with_seed(h as u64)
            .params(d)
            .unwrap(),
        1 => FavorConfig::new(d, 2 * d).with_seed(h as u64).params().unwrap(),
        _ => DctMapConfig::new()
            .with_pairing(Pairing::Antithetic)
            .with_envelope(Envelope::Gaussian)
            .params(d)
            .unwrap(),
    };
    let maps = (0..kv_heads).map(map).collect();
    let q = random.normals((b, kv_heads * group, n, d), 1.0);
    ([q, random.normals((b, kv_heads, n, d), 1.0), random.normals((b, kv_heads, n, e), 1.0)], maps)
}

fn tensors_of(maps: &[DctParams], log_decay: f64) -> Vec<MapTensors> {
    maps.iter().map(|map| MapTensors::new(map, log_decay).unwrap()).collect()
}

/// The functions give the bits of the crate's own operator, whatever the strides, with gradients
/// and without.
fn bits_of_the_operator<T: Real + WithDType>() {
    for seed in 0..30 {
        let (inputs, maps) = random_problem(seed);
        let kept = if seed % 3 == 0 { 5 } else { 0 };
        let windows =
            if seed % 2 == 0 { vec![Window::new(16, 1).with_kept(kept)] } else { Vec::new() };
        let sinks = 3 * windows.len();
        let causally = !windows.is_empty() || seed % 4 == 1;
        let log_decay = if causally { -0.01 } else { 0.0 };
        let [q, k, v] = inputs.map(|x| cast::<T, _>(&x));
        let mut config = LinearConfig::new().with_heads(q.shape()[1]).with_value_dim(v.shape()[3]);
        (config.windows, config.sinks) = (windows.clone(), sinks);
        config.log_decay = vec![log_decay; maps.len()];
        let operator = config
            .build(
                maps.iter()
                    .map(|map| DctMap::<T>::from_params(map.clone()).unwrap())
                    .collect::<Vec<_>>(),
            )
            .unwrap();
        let expected: Vec<_> = (q.outer_iter().zip(k.outer_iter()).zip(v.outer_iter()))
            .flat_map(|((q, k), v)| {
                let out = if causally {
                    operator.forward(Qkv::new(&q, &k, &v))
                } else {
                    operator.bidirectional().unwrap().forward(Qkv::new(&q, &k, &v))
                };
                to_f64(&out.unwrap()).into_iter()
            })
            .collect();

        let attention = if causally { causal } else { full };
        let tensors = [tensor(&q), tensor(&k), tensor(&v)];
        // The same elements with other strides.
        let strided =
            |x: &Tensor| x.transpose(1, 2).unwrap().contiguous().unwrap().transpose(1, 2).unwrap();
        let [q, k, v] = &tensors;
        let maps = tensors_of(&maps, log_decay);
        let mut options = AttentionOptions::new();
        (options.windows, options.sinks) = (&windows, sinks);
        let plain = attention(q, k, v, &maps, &options).unwrap();
        let other = attention(&strided(q), &strided(k), &strided(v), &maps, &options).unwrap();
        let tracked =
            attention(Var::from_tensor(q).unwrap().as_tensor(), k, v, &maps, &options).unwrap();
        let swapped = [q, k, v].map(|x| x.transpose(1, 2).unwrap());
        let options = options.with_layout(HeadLayout::TokensFirst);
        let swapped = attention(&swapped[0], &swapped[1], &swapped[2], &maps, &options)
            .unwrap()
            .transpose(1, 2)
            .unwrap();
        for out in [plain, other, tracked, swapped] {
            let got: Vec<_> = to_f64(&array::<T>(&out)).into_iter().collect();
            assert_eq!(got, expected, "seed {seed}");
        }
    }
}

#[test]
fn the_operators_bits_in_f32() {
    bits_of_the_operator::<f32>();
}

#[test]
fn the_operators_bits_in_f64() {
    bits_of_the_operator::<f64>();
}

/// Keys shared by a broadcast get the sum of their gradients, and one map's tensors given to two
/// heads as well.
#[test]
fn shared_tensors_get_all_their_gradients() {
    let (inputs, maps) = random_problem(2);
    let [q, k, v] = inputs.map(|x| tensor(&x));
    let (b, h, n, d) = q.dims4().unwrap();
    let k = Var::from_tensor(&k.narrow(1, 0, 1).unwrap()).unwrap();
    let v = v.narrow(1, 0, 1).unwrap().broadcast_as((b, h, n, v.dim(3).unwrap())).unwrap();
    let (map, vars) = variables(&MapTensors::new(&maps[0], 0.0).unwrap());
    let loss = |out: Tensor| (out.sqr().unwrap() * 0.5).unwrap().sum_all().unwrap();
    let broadcast = causal(
        &q,
        &k.broadcast_as((b, h, n, d)).unwrap(),
        &v,
        &vec![map.clone(); h],
        &AttentionOptions::new(),
    )
    .unwrap();
    let grouped =
        causal(&q, &k, &v.narrow(1, 0, 1).unwrap(), &[map], &AttentionOptions::new()).unwrap();
    let [broadcast, grouped] = [broadcast, grouped].map(|out| loss(out).backward().unwrap());
    for var in vars.iter().map(|(_, var)| var).chain([&k]) {
        let [a, b] =
            [&broadcast, &grouped].map(|gradients| array::<f64>(gradients.get(var).unwrap()));
        // Gradients that are nothing but rounding.
        let noise = b.iter().all(|x| x.abs() < 1e-10);
        assert!(
            noise || {
                assert_close("shared", &a, &b, 1e-10);
                true
            }
        );
    }
}

/// A graph may be gone back through twice, and two uses of one output add up.
#[test]
fn backward_twice_gives_the_same() {
    let (inputs, maps) = random_problem(5);
    let [q, k, v] = inputs.map(|x| Var::from_tensor(&tensor(&x)).unwrap());
    let out = full(&q, &k, &v, &tensors_of(&maps, 0.0), &AttentionOptions::new()).unwrap();
    let (once, twice) =
        (out.sqr().unwrap().sum_all().unwrap(), (&out * &out).unwrap().sum_all().unwrap());
    let [a, b, c] =
        [&once, &once, &twice].map(|loss| array::<f64>(loss.backward().unwrap().get(&k).unwrap()));
    assert_eq!(a, b);
    assert_close("two uses", &c, &a, 1e-14);
}

/// f16 and bf16 are what f32 gives for their numbers, rounded.
#[test]
fn half_precision_is_computed_in_f32() {
    let (inputs, maps) = random_problem(2);
    for dtype in [DType::F16, DType::BF16] {
        let half = inputs.each_ref().map(|x| tensor(x).to_dtype(dtype).unwrap());
        let [q, k, v] = half.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let [q32, k32, v32] = half.each_ref().map(|x| x.to_dtype(DType::F32).unwrap());
        let maps = tensors_of(&maps, -0.01);
        let out = causal(&q, &k, &v, &maps, &AttentionOptions::new()).unwrap();
        let expected = causal(&q32, &k32, &v32, &maps, &AttentionOptions::new()).unwrap();
        assert_eq!(out.dtype(), dtype);
        assert_eq!(
            array::<f32>(&out.to_dtype(DType::F32).unwrap()),
            array::<f32>(&expected.to_dtype(dtype).unwrap().to_dtype(DType::F32).unwrap())
        );
        let gradients = out.sum_all().unwrap().backward().unwrap();
        assert_eq!(gradients.get(&v).unwrap().dtype(), dtype);
    }
}

#[test]
fn errors_name_the_argument() {
    let (q, k) = (
        Tensor::zeros((1, 4, 5, 8), DType::F32, &Device::Cpu).unwrap(),
        Tensor::zeros((1, 2, 5, 8), DType::F32, &Device::Cpu).unwrap(),
    );
    let maps = tensors_of(
        &[DctMapConfig::new().params(8).unwrap(), DctMapConfig::new().params(8).unwrap()],
        0.0,
    );
    let options = AttentionOptions::new();
    let fails = |result: candle_core::Result<Tensor>, expected: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?} does not say {expected:?}");
    };
    let run = |q: &Tensor, k: &Tensor, v: &Tensor, options: &AttentionOptions<'_>| {
        causal(q, k, v, &maps, options)
    };
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &Device::Cpu).unwrap();
    fails(
        run(&zeros(&[4, 5, 8], DType::F32), &k, &k, &options),
        "q must be of four axes, got [4, 5, 8]",
    );
    fails(
        run(&zeros(&[1, 4, 5, 8], DType::I64), &k, &k, &options),
        "q must be of type F64, F32, F16 or BF16, got I64",
    );
    fails(
        run(&q, &zeros(&[1, 2, 5, 8], DType::F64), &k, &options),
        "k must be of the type of q, got F64",
    );
    fails(
        run(&q, &zeros(&[1, 2, 6, 8], DType::F32), &k, &options),
        "k: axis 2 must have length 5, got 6",
    );
    fails(
        run(&q, &zeros(&[1, 3, 5, 8], DType::F32), &k, &options),
        "k: axis 1 must have length 2, got 3",
    );
    fails(
        run(&q, &k, &zeros(&[2, 2, 5, 8], DType::F32), &options),
        "v: axis 0 must have length 1, got 2",
    );
    fails(
        run(&zeros(&[1, 4, 5, 9], DType::F32), &k, &k, &options),
        "q: axis 3 must have length 8, got 9",
    );
    fails(run(&zeros(&[1, 3, 5, 8], DType::F32), &k, &k, &options), "heads must be a multiple of");
    fails(run(&zeros(&[0, 4, 5, 8], DType::F32), &k, &k, &options), "q must not be empty");
    fails(run(&zeros(&[1, 4, 0, 8], DType::F32), &k, &k, &options), "q must not be empty");
    fails(full(&q, &zeros(&[1, 2, 0, 8], DType::F32), &k, &maps, &options), "k must not be empty");
    let swapped = options.with_layout(HeadLayout::TokensFirst);
    fails(
        run(&zeros(&[1, 5, 4, 8], DType::F32), &zeros(&[1, 6, 2, 8], DType::F32), &k, &swapped),
        "k: axis 1 must have length 5, got 6",
    );
    let mask = zeros(&[1, 4], DType::U8);
    fails(
        run(&q, &k, &k, &options.with_key_mask(&mask)),
        "key_mask: axis 1 must have length 5, got 4",
    );
    let mask = zeros(&[1, 5], DType::F32);
    fails(run(&q, &k, &k, &options.with_key_mask(&mask)), "key_mask must be of type U8, got F32");
    fails(run(&(&q + f64::NAN).unwrap(), &k, &k, &options), "q[0] must be finite");
    fails(
        full(&q, &k, &k, &maps, &options.with_windows(&[Window::new(4, 1)], 0)),
        "window cannot be combined with bidirectional attention",
    );
    fails(
        full(&q, &k, &k, &tensors_of(&[maps[0].params().unwrap().0], -0.1), &options),
        "k: axis 1 must have length 1, got 2",
    );
    fails(causal(&q, &k, &k, &[], &options), "maps must not be empty");
    let mut wrong = maps.clone();
    wrong[1].query.scale = zeros(&[7], DType::F64);
    fails(causal(&q, &k, &k, &wrong, &options), "query.scale must have 8 elements, got 7");
    wrong[1].query.scale = zeros(&[8], DType::U8);
    fails(causal(&q, &k, &k, &wrong, &options), "query.scale must be of floating-point numbers");
}

/// A layer with grouped queries, partial rotary embedding, biases and maps off their beginnings.
fn layer<T: Real>(seed: u64, causality: Causality) -> DijiangAttention<T> {
    let mut random = Random::new(seed);
    let (model, heads, kv_heads, d) = (24, 4, 2, 8);
    let config = AttentionConfig::new(model, heads)
        .with_kv_heads(kv_heads)
        .with_head_dim(d)
        .with_causality(causality);
    let config = config.with_rotary(Rotary::new(100.0).with_dims(6));
    let mut matrix = |rows, columns| cast::<T, _>(&random.normals((rows, columns), 0.2));
    let weights = AttentionWeights::new(
        matrix(heads * d, model),
        matrix(kv_heads * d, model),
        matrix(kv_heads * d, model),
        matrix(model, heads * d),
    );
    let mut vector = |len: usize| cast::<T, _>(&random.normals(len, 0.2));
    let weights =
        weights.with_qkv_biases(vector(heads * d), vector(kv_heads * d), vector(kv_heads * d));
    let softmax = SoftmaxAttention::new(config, weights).unwrap();
    let layer = DijiangAttention::from_softmax(
        &softmax,
        DijiangOptions::new().with_window(seed.is_multiple_of(2).then(|| Window::new(8, 1))),
    )
    .unwrap();
    let maps = layer.maps().iter().map(|map| {
        let mut params = map.params().clone();
        params
            .query
            .center
            .iter_mut()
            .chain(&mut params.key.radii)
            .for_each(|x| *x += 0.2 * random.normal());
        params.log_mix = -0.3;
        DctMap::from_params(params).unwrap()
    });
    let maps = maps.collect();
    let layer = layer.with_maps(maps).unwrap();
    if causality == Causality::Causal {
        layer.with_log_decay(vec![-0.02, 0.0]).unwrap()
    } else {
        layer
    }
}

fn same_numbers<T: Real + WithDType>(tolerance: f64) {
    for (seed, causality) in
        [(0, Causality::Causal), (1, Causality::Causal), (3, Causality::Bidirectional)]
    {
        let layer = layer::<T>(seed, causality);
        let module = CandleAttention::from_layer(&layer, T::DTYPE).unwrap();
        let x: Array3<f64> = Random::new(seed + 50).normals((2, 100, 24), 1.0);
        let expected = layer.forward_batch(&cast::<T, _>(&x), None).unwrap();
        let got = array::<T>(&module.forward(&tensor(&cast::<T, _>(&x)), 0, None).unwrap());
        assert_close((seed, causality), &got, &to_f64(&expected).into_dyn(), tolerance);

        let mask: Vec<u8> = (0..200).map(|j| u8::from(j % 7 != 3)).collect();
        let valid =
            ndarray::Array2::from_shape_vec((2, 100), mask.iter().map(|&key| key != 0).collect())
                .unwrap();
        let mask = Tensor::from_vec(mask, (2, 100), &Device::Cpu).unwrap();
        let expected = layer.forward_batch(&cast::<T, _>(&x), Some(&valid)).unwrap();
        let got =
            array::<T>(&module.forward_masked(&tensor(&cast::<T, _>(&x)), 0, &mask, None).unwrap());
        assert_close((seed, causality, "masked"), &got, &to_f64(&expected).into_dyn(), tolerance);

        let back = module.to_layer::<T>().unwrap();
        assert_eq!(back.config(), layer.config());
        assert_eq!(back.weights(), layer.weights());
        assert_eq!((back.windows(), back.sinks()), (layer.windows(), layer.sinks()));
        assert_eq!(back.log_decay(), layer.log_decay());
        let params = |layer: &DijiangAttention<T>| {
            layer.maps().iter().map(|map| map.params().clone()).collect::<Vec<_>>()
        };
        assert_eq!(params(&back), params(&layer));
    }
}

#[test]
fn the_ndarray_layers_numbers_in_f32() {
    same_numbers::<f32>(1e-6);
}

#[test]
fn the_ndarray_layers_numbers_in_f64() {
    same_numbers::<f64>(1e-13);
}

/// What the module does not compute it refuses to be made of.
#[test]
fn norms_and_sliding_windows_are_refused() {
    let plain = layer::<f32>(0, Causality::Causal);
    let mut config = plain.config().clone();
    config.qk_norm = Some(1e-6);
    let ones = || ndarray::Array1::ones(config.head_dim.unwrap());
    let weights = AttentionWeights::clone(plain.weights()).with_qk_norms(ones(), ones());
    let softmax = SoftmaxAttention::new(config.clone(), weights).unwrap();
    let normed = DijiangAttention::from_softmax(&softmax, DijiangOptions::new()).unwrap();
    let error = CandleAttention::from_layer(&normed, DType::F32).unwrap_err().to_string();
    assert!(error.contains("qk_norm cannot be combined with candle's layer"), "{error}");

    let windowed = plain.config().clone().with_sliding_window(Some(8));
    let variables = VarMap::new();
    let builder = VarBuilder::from_varmap(&variables, DType::F32, &Device::Cpu);
    let error = CandleAttention::new(&windowed, &DijiangOptions::new(), builder).unwrap_err();
    assert!(error.to_string().contains("sliding_window"), "{error}");
}

/// Prefill in pieces and steps agree with the whole; a clone is a snapshot, and a wrong position is
/// refused.
#[test]
fn steps_agree_with_the_whole() {
    for seed in 0..2 {
        let layer = layer::<f32>(seed, Causality::Causal);
        let module = CandleAttention::from_layer(&layer, DType::F32).unwrap();
        let x: Array3<f64> = Random::new(seed + 9).normals((3, 60, 24), 1.0);
        let x = tensor(&cast::<f32, _>(&x));
        let whole = module.forward(&x, 0, None).unwrap();
        let mut state = module.new_state(3).unwrap();
        let bytes = state.bytes();
        let mut parts =
            vec![module.forward(&x.narrow(1, 0, 21).unwrap(), 0, Some(&mut state)).unwrap()];
        parts.push(module.forward(&x.narrow(1, 21, 12).unwrap(), 21, Some(&mut state)).unwrap());
        let snapshot = state.clone();
        let mut again = snapshot.clone();
        for i in 33..60 {
            parts.push(module.forward(&x.narrow(1, i, 1).unwrap(), i, Some(&mut state)).unwrap());
        }
        assert_eq!((state.position(), state.batch(), state.bytes()), (60, 3, bytes));
        let streamed = Tensor::cat(&parts, 1).unwrap();
        let expected = array::<f32>(&whole).mapv(f64::from);
        assert_close(seed, &array::<f32>(&streamed), &expected, tolerance::<f32>(8.0, 60));

        let next = |state: &mut _| {
            array::<f32>(&module.forward(&x.narrow(1, 33, 1).unwrap(), 33, Some(state)).unwrap())
        };
        let first = next(&mut again);
        assert_eq!(first, array::<f32>(&parts[2]));
        let fails = |result: candle_core::Result<Tensor>, expected: &str| {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        };
        let token = x.narrow(1, 34, 1).unwrap();
        fails(
            module.forward(&token, 33, Some(&mut again)),
            "index_pos must be the position of the state, got 33",
        );
        let other = CandleAttention::from_layer(&layer, DType::F32).unwrap();
        fails(
            other.forward(&token, 34, Some(&mut again)),
            "state cannot be combined with the maps of another layer",
        );
        fails(
            module.forward(&token.narrow(0, 0, 2).unwrap(), 34, Some(&mut again)),
            "batch is 3, this layer's is 2",
        );
        fails(
            module.forward(&token.to_dtype(DType::F64).unwrap(), 34, Some(&mut again)),
            "x must be of the type of the weights, got F64",
        );
        fails(
            module.forward(&token.narrow(2, 0, 23).unwrap(), 34, Some(&mut again)),
            "x: axis 2 must have length 24, got 23",
        );
        fails(
            module.forward(&token.narrow(1, 0, 0).unwrap(), 34, Some(&mut again)),
            "x must not be empty",
        );
        // The last sequence is at fault; the others must not have moved on.
        let mut bad = array::<f32>(&x.narrow(1, 34, 2).unwrap());
        bad[[2, 0, 0]] = f32::NAN;
        let bad = Tensor::from_vec(bad.into_iter().collect::<Vec<_>>(), (3, 2, 24), &Device::Cpu)
            .unwrap();
        for tokens in [1, 2] {
            fails(
                module.forward(&bad.narrow(1, 0, tokens).unwrap(), 34, Some(&mut again)),
                "must be finite",
            );
        }
        assert_eq!(again.position(), 34);
        again.reset();
        assert_eq!(again.position(), 0);
    }
    // In f64, from the same numbers.
    let module =
        CandleAttention::from_layer(&layer::<f64>(0, Causality::Causal), DType::F64).unwrap();
    assert_eq!(
        (module.config().heads, module.windows(), module.maps().len()),
        (4, &[Window::new(8, 1); 2][..], 2)
    );
    let x = tensor(&Random::new(9).normals((2, 30, 24), 1.0));
    let mut state = module.new_state(2).unwrap();
    assert!(module.new_state(0).is_err());
    let whole = module.forward(&x, 0, Some(&mut state)).unwrap();
    assert_eq!((state.position(), state.batch(), state.bytes() > 0), (30, 2, true));
    state.reset();
    assert_eq!(state.position(), 0);
    let again = module.forward(&x, 0, Some(&mut state)).unwrap();
    assert_eq!(array::<f64>(&again), array::<f64>(&whole));
    let encoder =
        CandleAttention::from_layer(&layer::<f32>(3, Causality::Bidirectional), DType::F32)
            .unwrap();
    assert!(encoder.new_state(1).is_err());
}

/// Names are those of the crate's own files: what it saves, a `VarBuilder` loads.
#[test]
fn a_var_builder_reads_the_crates_files() {
    let layer = layer::<f32>(0, Causality::Causal);
    let options = DijiangOptions::new().with_window(layer.windows().first().copied());
    let file = layer.to_safetensors().unwrap();
    let vb = VarBuilder::from_buffered_safetensors(file, DType::F32, &Device::Cpu).unwrap();
    let loaded = CandleAttention::new(layer.config(), &options, vb.pp("self_attn")).unwrap();
    let made = CandleAttention::from_layer(&layer, DType::F32).unwrap();
    let x = tensor(&cast::<f32, _>(&Random::new(4).normals((1, 40, 24), 1.0)));
    let [a, b] = [&loaded, &made].map(|module| array::<f32>(&module.forward(&x, 0, None).unwrap()));
    assert_eq!(a, b);
    let names = |module: &CandleAttention| {
        module.named().into_iter().map(|(name, _)| name).collect::<Vec<_>>()
    };
    assert_eq!(names(&loaded), names(&made));

    let other = DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(2));
    let vb = VarBuilder::from_buffered_safetensors(
        layer.to_safetensors().unwrap(),
        DType::F32,
        &Device::Cpu,
    )
    .unwrap();
    assert!(CandleAttention::new(layer.config(), &other, vb.pp("self_attn")).is_err());

    // A VarMap makes what is not there; all of it learns.
    let vars = VarMap::new();
    let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
    let fresh = CandleAttention::new(
        layer.config(),
        &other
            .clone()
            .with_map(other.map.with_mixing(Mixing::Mixed))
            .with_window(Some(Window::new(8, 0))),
        vb,
    )
    .unwrap();
    let gradients =
        fresh.forward(&x, 0, None).unwrap().sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let tensors = fresh.named();
    assert_eq!(tensors.len(), vars.all_vars().len());
    for (name, tensor) in tensors.iter().filter(|(name, _)| !name.ends_with("signs")) {
        let gradient = gradients.get(tensor).unwrap_or_else(|| panic!("no gradient of {name}"));
        assert!(
            gradient
                .to_dtype(DType::F64)
                .unwrap()
                .abs()
                .unwrap()
                .max_all()
                .unwrap()
                .to_scalar::<f64>()
                .unwrap()
                > 0.0,
            "{name}"
        );
    }
}

/// Sizes, positions and batches that nobody can hold are refused before anything is taken.
#[test]
fn what_nobody_can_hold() {
    fn too_large<T>(result: candle_core::Result<T>) {
        let error = result.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("must be at most"), "{error}");
    }
    let map = MapTensors::new(&DctMapConfig::new().params(4).unwrap(), 0.0).unwrap();
    for dtype in [DType::F32, DType::F16, DType::F64] {
        let one = Tensor::zeros((1, 1, 1, 4), dtype, &Device::Cpu).unwrap();
        for layout in [HeadLayout::HeadsFirst, HeadLayout::TokensFirst] {
            let shape = match layout {
                HeadLayout::HeadsFirst => (1, 1, 1 << 50, 4),
                HeadLayout::TokensFirst => (1, 1 << 50, 1, 4),
            };
            let endless = one.broadcast_as(shape).unwrap();
            let options = AttentionOptions::new().with_layout(layout);
            too_large(causal(&endless, &endless, &endless, std::slice::from_ref(&map), &options));
            too_large(full(&endless, &one, &one, std::slice::from_ref(&map), &options));
            too_large(full(&one, &endless, &endless, std::slice::from_ref(&map), &options));
        }
    }
    let layer = layer::<f32>(0, Causality::Causal);
    let module = CandleAttention::from_layer(&layer, DType::F32).unwrap();
    for batch in [1 << 40, usize::MAX / 2, usize::MAX] {
        too_large(module.new_state(batch));
    }
    let x = Tensor::zeros((1, 2, 24), DType::F32, &Device::Cpu).unwrap();
    for position in [(1 << 52) + 1, usize::MAX - 1, usize::MAX] {
        too_large(module.forward(&x, position, None));
    }
    module.forward(&x, 1 << 52, None).unwrap();
    for blocks in [1 << 40, usize::MAX] {
        let vars = VarMap::new();
        let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let options = DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(blocks));
        too_large(CandleAttention::new(layer.config(), &options, vb));
    }
}

/// The gradients of every weight and of the input, against those of the ndarray layer.
#[test]
fn the_ndarray_layers_gradients() {
    let layer = layer::<f64>(0, Causality::Causal);
    let mut vars = std::collections::HashMap::new();
    let module =
        CandleAttention::from_layer(&layer, DType::F64).unwrap().try_map(|name, tensor| {
            let var = Var::from_tensor(tensor)?;
            vars.insert(name.to_owned(), var.clone());
            Ok(var.into_inner())
        });
    let (x, cotangent): (Array3<f64>, Array3<f64>) =
        (Random::new(1).normals((1, 70, 24), 1.0), Random::new(2).normals((1, 70, 24), 1.0));
    let input = Var::from_tensor(&tensor(&x)).unwrap();
    let out = module.unwrap().forward(&input, 0, None).unwrap();
    let gradients = (out * tensor(&cotangent)).unwrap().sum_all().unwrap().backward().unwrap();
    let expected = layer
        .backward(&x.index_axis(Axis(0), 0), KeyMask::All, &cotangent.index_axis(Axis(0), 0))
        .unwrap();
    let weights = &expected.weights;
    let check = |name: &str, var: &Var, expected: ArrayD<f64>| {
        let got =
            array::<f64>(gradients.get(var).unwrap_or_else(|| panic!("no gradient of {name}")));
        assert_close(name, &got.to_shape(expected.shape()).unwrap().to_owned(), &expected, 1e-10);
    };
    check("x", &input, expected.x.clone().into_dyn());
    for (name, matrix) in
        [("q", &weights.q), ("k", &weights.k), ("v", &weights.v), ("o", &weights.o)]
    {
        check(name, &vars[&format!("{name}_proj.weight")], matrix.clone().into_dyn());
    }
    for (name, bias) in [("q", &weights.q_bias), ("k", &weights.k_bias), ("v", &weights.v_bias)] {
        check(name, &vars[&format!("{name}_proj.bias")], bias.clone().unwrap().into_dyn());
    }
    for (h, map) in expected.maps.iter().enumerate() {
        for (name, values) in [
            ("query.scale", &map.query.scale),
            ("key.center", &map.key.center),
            ("log_weight", &map.log_weight),
        ] {
            check(
                name,
                &vars[&format!("dijiang.{h}.{name}")],
                ArrayD::from_shape_vec(vec![values.len()], values.clone()).unwrap(),
            );
        }
    }
}

/// A layer in half precision: rounded weights and states, attention in f32.
#[test]
fn a_module_in_half_precision() {
    let layer = layer::<f32>(0, Causality::Causal);
    let x = tensor(&cast::<f32, _>(&Random::new(4).normals((1, 30, 24), 1.0)));
    let expected = array::<f32>(
        &CandleAttention::from_layer(&layer, DType::F32).unwrap().forward(&x, 0, None).unwrap(),
    )
    .mapv(f64::from);
    for (dtype, tolerance) in [(DType::F16, 5e-3), (DType::BF16, 3e-2)] {
        let module = CandleAttention::from_layer(&layer, dtype).unwrap();
        let (x, mut state) = (x.to_dtype(dtype).unwrap(), module.new_state(1).unwrap());
        let whole = module.forward(&x, 0, None).unwrap();
        let last = module.forward(&x, 0, Some(&mut state)).unwrap();
        assert_eq!((whole.dtype(), last.dtype()), (dtype, dtype));
        for out in [whole, last] {
            assert_close(
                dtype,
                &array::<f32>(&out.to_dtype(DType::F32).unwrap()),
                &expected,
                tolerance,
            );
        }
    }
    assert!(CandleAttention::from_layer(&layer, DType::U32).is_err());
}

/// An optimizer may push a decay above 0: it counts as 0, until the gradient brings it back.
#[test]
fn decays_above_zero_count_as_zero() {
    let layer = layer::<f32>(0, Causality::Causal).with_log_decay(vec![0.0; 2]).unwrap();
    let module = CandleAttention::from_layer(&layer, DType::F32).unwrap();
    let pushed = module
        .try_map(
            |name, tensor| {
                if name.ends_with("log_decay") { tensor + 0.1 } else { Ok(tensor.clone()) }
            },
        )
        .unwrap();
    let x = tensor(&cast::<f32, _>(&Random::new(4).normals((1, 40, 24), 1.0)));
    let [a, b] =
        [&module, &pushed].map(|module| array::<f32>(&module.forward(&x, 0, None).unwrap()));
    assert_eq!(a, b);
    assert_eq!(pushed.to_layer::<f32>().unwrap().log_decay(), [0.0, 0.0]);
}
