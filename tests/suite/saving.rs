//! Layers and maps as safetensors files: the same bits after a round trip, and a typed error for
//! whatever else the bytes say.

use std::collections::{BTreeMap, HashMap};

use dijiang::attention::{KeyMask, Window};
use dijiang::checkpoint::{load_layers, load_maps, save_layers, save_maps};
use dijiang::kernel::{
    DctMap, DctMapConfig, DctParams, Envelope, FeatureMap, Mixing, Pairing, Projection, Sides,
};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    Rotary, RotaryPairing, RotaryScaling, SoftmaxAttention,
};
use dijiang::{Error, Real};
use dijiang_testing::{Random, assert_same_bits, cast};
use ndarray::{Array2, s};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};

#[derive(Clone, Copy, PartialEq)]
enum Biases {
    None,
    Qkv,
    All,
}

fn layer<T: Real>(
    config: AttentionConfig,
    biases: Biases,
    options: DijiangOptions,
    seed: u64,
) -> DijiangAttention<T> {
    let mut random = Random::new(seed);
    let head_dim = config.head_dim.unwrap_or(config.model_dim / config.heads);
    let (model, width, kv_width) =
        (config.model_dim, config.heads * head_dim, config.kv_heads * head_dim);
    let mut matrix = |rows, cols| cast(&random.normals((rows, cols), 1.0 / (model as f64).sqrt()));
    let weights = AttentionWeights::new(
        matrix(width, model),
        matrix(kv_width, model),
        matrix(kv_width, model),
        matrix(model, width),
    );
    let mut bias = |len| cast(&random.normals(len, 0.5));
    let weights = match biases {
        Biases::None => weights,
        Biases::Qkv => weights.with_qkv_biases(bias(width), bias(kv_width), bias(kv_width)),
        Biases::All => {
            weights.with_biases(bias(width), bias(kv_width), bias(kv_width), bias(model))
        }
    };
    let softmax = SoftmaxAttention::new(config, weights).unwrap();
    DijiangAttention::from_softmax(&softmax, options).unwrap()
}

/// Every number of every map as calibration might have left it, with no short decimal form.
fn calibrated<T: Real>(mut layer: DijiangAttention<T>, seed: u64) -> DijiangAttention<T> {
    let mut random = Random::new(seed);
    let mut shift =
        |numbers: &mut [f64]| numbers.iter_mut().for_each(|v| *v += 0.1 * random.normal() / 3.0);
    let maps = layer.maps().iter().map(|map| {
        let mut params = map.params().clone();
        for side in [&mut params.query, &mut params.key] {
            shift(&mut side.center);
            shift(&mut side.scale);
            shift(&mut side.radii);
        }
        if params.sides == Sides::Tied {
            (params.key.scale, params.key.radii) =
                (params.query.scale.clone(), params.query.radii.clone());
        }
        shift(&mut params.log_weight);
        params.log_mix = -1.0 / 3.0;
        DctMap::from_params(params).unwrap()
    });
    let maps = maps.collect();
    layer.set_maps(maps).unwrap();
    layer
}

/// Replaces the maps by dense ones of as many features.
fn dense<T: Real>(mut layer: DijiangAttention<T>, heads: usize) -> DijiangAttention<T> {
    let mut random = Random::new(7);
    let maps = layer.maps().iter().enumerate().map(|(h, map)| {
        let mut params = map.params().clone();
        if h >= heads {
            return map.clone();
        }
        let (dim, rows) = (params.dim(), params.query.radii.len());
        let mut rows_of = || random.normals(rows * dim, 0.3).to_vec();
        params.projection = Projection::Dense { query: rows_of(), key: rows_of() };
        params.query.scale.truncate(dim);
        params.key.scale.truncate(dim);
        DctMap::from_params(params).unwrap()
    });
    let maps = maps.collect();
    layer.set_maps(maps).unwrap();
    layer
}

/// Gives every map two more transforms per block.
fn deep<T: Real>(mut layer: DijiangAttention<T>) -> DijiangAttention<T> {
    let mut random = Random::new(8);
    let maps = layer.maps().iter().map(|map| {
        let mut params = map.params().to_deep();
        let Projection::Deep { query, key } = &mut params.projection else {
            panic!("asked for two more transforms")
        };
        query.iter_mut().chain(key).for_each(|x| *x += 0.3 * random.normal());
        DctMap::from_params(params).unwrap()
    });
    let maps = maps.collect();
    layer.set_maps(maps).unwrap();
    layer
}

/// Window part of two chunks of 8.
fn options() -> DijiangOptions {
    DijiangOptions::new().with_window(Some(Window::new(8, 1)))
}

fn grouped() -> AttentionConfig {
    AttentionConfig::new(24, 6).with_kv_heads(3)
}

/// With norms of queries and keys.
fn normed<T: Real>(config: AttentionConfig, options: DijiangOptions) -> DijiangAttention<T> {
    let mut plain = config.clone();
    plain.qk_norm = None;
    let weights =
        AttentionWeights::clone(layer::<T>(plain, Biases::Qkv, options.clone(), 14).weights());
    let mut random = Random::new(15);
    let mut norm = || (0..4).map(|_| T::from_f64(1.0 + 0.3 * random.normal())).collect();
    let weights = weights.with_qk_norms(norm(), norm());
    DijiangAttention::from_softmax(&SoftmaxAttention::new(config, weights).unwrap(), options)
        .unwrap()
}

/// D = 4, one head: small enough to damage every byte.
fn small() -> DijiangAttention<f32> {
    calibrated(
        layer(AttentionConfig::new(4, 1).with_rotary(Rotary::new(1e4)), Biases::Qkv, options(), 3),
        4,
    )
}

fn kinds<T: Real>() -> Vec<(&'static str, DijiangAttention<T>)> {
    let llama3 = RotaryScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.1,
        original_context: 8192,
    };
    let rotary = || Rotary::new(1e4 / 3.0);
    let plain = |config, options| layer::<T>(config, Biases::None, options, 11);
    let bidirectional = grouped().with_causality(Causality::Bidirectional);
    vec![
        ("plain", plain(AttentionConfig::new(8, 2), options())),
        ("one coordinate", plain(AttentionConfig::new(3, 3), options())),
        ("grouped", plain(grouped(), options().with_map(DctMapConfig::new().with_blocks(2)))),
        ("q, k and v biases", layer(grouped(), Biases::Qkv, options(), 12)),
        ("all biases", layer(grouped(), Biases::All, options(), 13)),
        ("head_dim, scale", plain(grouped().with_head_dim(6).with_scale(0.1 + 0.2), options())),
        ("rotary", plain(grouped().with_rotary(rotary()), options())),
        (
            "interleaved",
            plain(
                grouped()
                    .with_rotary(rotary().with_dims(2).with_pairing(RotaryPairing::Interleaved)),
                options(),
            ),
        ),
        ("held", plain(grouped().with_rotary(rotary().with_hold(3)), options())),
        (
            "linear scaling",
            plain(
                grouped().with_rotary(rotary().with_scaling(RotaryScaling::Linear { factor: 1.7 })),
                options(),
            ),
        ),
        ("llama 3", plain(grouped().with_rotary(rotary().with_scaling(llama3)), options())),
        (
            "dynamic",
            plain(
                grouped().with_rotary(rotary().with_scaling(RotaryScaling::Dynamic {
                    factor: 4.1,
                    original_context: 16,
                    length: 40,
                })),
                options(),
            ),
        ),
        (
            "YaRN",
            plain(
                grouped().with_rotary(rotary().with_scaling(RotaryScaling::Yarn {
                    factor: 4.1,
                    original_context: 16,
                    beta_fast: 31.9,
                    beta_slow: 1.1,
                    attention_factor: 1.1 + 0.1,
                })),
                options(),
            ),
        ),
        (
            "LongRoPE",
            plain(
                grouped().with_rotary(rotary().with_scaling(RotaryScaling::LongRope {
                    factors: vec![1.1, 1.0 / 3.0],
                    attention_factor: 1.1,
                })),
                options(),
            ),
        ),
        ("norms", normed(grouped().with_rotary(rotary()).with_qk_norm(1e-6 / 3.0), options())),
        ("no local window", plain(grouped(), options().with_window(None))),
        (
            "decay",
            plain(grouped(), options()).with_log_decay(vec![-0.01, 0.0, -1.0 / 7.0]).unwrap(),
        ),
        (
            "antithetic",
            plain(
                grouped(),
                options().with_map(
                    DctMapConfig::new().with_pairing(Pairing::Antithetic).with_sides(Sides::Tied),
                ),
            ),
        ),
        (
            "mixed",
            plain(
                grouped(),
                options().with_map(DctMapConfig::new().with_blocks(3).with_mixing(Mixing::Mixed)),
            ),
        ),
        (
            "Gaussian",
            plain(
                grouped(),
                options().with_map(DctMapConfig::new().with_envelope(Envelope::Gaussian)),
            ),
        ),
        ("deep", deep(plain(grouped(), options().with_map(DctMapConfig::new().with_blocks(2))))),
        (
            "dense",
            dense(plain(grouped(), options().with_map(DctMapConfig::new().with_blocks(2))), 3),
        ),
        (
            "dense beside mixed",
            dense(
                plain(
                    grouped(),
                    options()
                        .with_map(DctMapConfig::new().with_blocks(2).with_mixing(Mixing::Mixed)),
                ),
                1,
            ),
        ),
        ("bidirectional", plain(bidirectional, options())),
        ("kept keys", plain(grouped(), options().with_window(Window::new(4, 1).with_kept(5)))),
    ]
}

/// Equal in every part, and the same bits in forward, prefill and steps.
fn assert_same<T: Real>(name: &str, got: &DijiangAttention<T>, expected: &DijiangAttention<T>) {
    assert_eq!(got.config(), expected.config(), "{name}");
    assert_eq!(got.weights(), expected.weights(), "{name}");
    assert_eq!(
        (got.windows(), got.sinks(), got.log_decay()),
        (expected.windows(), expected.sinks(), expected.log_decay()),
        "{name}"
    );
    let params = |layer: &DijiangAttention<T>| {
        layer.maps().iter().map(|map| map.params().clone()).collect::<Vec<DctParams>>()
    };
    assert_eq!(params(got), params(expected), "{name}");

    let x: Array2<T> = cast(&Random::new(1).normals((40, expected.config().model_dim), 1.0));
    let run = |layer: &DijiangAttention<T>| {
        let whole = layer.forward(&x, KeyMask::All).unwrap();
        if layer.config().causality == Causality::Bidirectional {
            return (whole.clone(), whole);
        }
        let (mut state, mut out) = (layer.new_state(), Array2::zeros(x.raw_dim()));
        out.slice_mut(s![..29, ..])
            .assign(&layer.prefill(&mut state, &x.slice(s![..29, ..]), KeyMask::All).unwrap());
        for i in 29..40 {
            layer.step(&mut state, &x.row(i), &mut out.row_mut(i)).unwrap();
        }
        (whole, out)
    };
    let (got, expected) = (run(got), run(expected));
    assert_same_bits((name, "forward"), &got.0, &expected.0);
    assert_same_bits((name, "prefill and steps"), &got.1, &expected.1);
}

fn round_trips<T: Real>() {
    for (name, layer) in kinds::<T>() {
        for layer in [layer.clone(), calibrated(layer, 5)] {
            let file = layer.to_safetensors().unwrap();
            assert_same(name, &DijiangAttention::from_safetensors(&file).unwrap(), &layer);
            assert_eq!(
                layer.to_safetensors().unwrap(),
                file,
                "{name}: the same layer gives the same bytes"
            );
        }
    }
}

#[test]
fn round_trips_f32() {
    round_trips::<f32>();
}

#[test]
fn round_trips_f64() {
    round_trips::<f64>();
}

#[test]
fn numbers_at_the_ends_of_their_range() {
    let mut params = DctParams::new(2);
    params.query.center = vec![-0.0, 5e-324];
    params.log_weight = vec![1e15, -1e15];
    params.log_mix = -0.0;
    let one = layer::<f32>(
        AttentionConfig::new(2, 1).with_scale(f64::MIN_POSITIVE),
        Biases::None,
        options(),
        1,
    );
    let one = one
        .with_maps(vec![DctMap::from_params(params.clone()).unwrap()])
        .unwrap()
        .with_log_decay(vec![-f32::LIMIT])
        .unwrap();
    let loaded = DijiangAttention::<f32>::from_safetensors(&one.to_safetensors().unwrap()).unwrap();
    let got = loaded.maps()[0].params();
    assert_eq!(*got, params);
    assert_eq!(
        (got.query.center[0].to_bits(), got.log_mix.to_bits()),
        ((-0.0_f64).to_bits(), (-0.0_f64).to_bits())
    );
    assert_eq!(
        (loaded.config().scale, loaded.log_decay()),
        (Some(f64::MIN_POSITIVE), &[-1e15][..])
    );
}

#[test]
fn weights_in_any_memory_layout() {
    let reversed = |rows, cols| {
        let mut matrix: Array2<f64> = Random::new(9).normals((cols, rows), 1.0).reversed_axes();
        matrix.invert_axis(ndarray::Axis(0));
        matrix
    };
    let mut bias = Random::new(10).normals(8, 1.0);
    bias.invert_axis(ndarray::Axis(0));
    let weights =
        AttentionWeights::new(reversed(8, 8), reversed(8, 8), reversed(8, 8), reversed(8, 8));
    let weights = weights.with_biases(bias.clone(), bias.clone(), bias.clone(), bias);
    let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights).unwrap();
    let layer = DijiangAttention::from_softmax(&softmax, options()).unwrap();
    assert_same(
        "reversed",
        &DijiangAttention::from_safetensors(&layer.to_safetensors().unwrap()).unwrap(),
        &layer,
    );
}

/// The format, version 2: names, types, shapes and metadata. A change here needs another version.
#[test]
fn the_format_in_full() {
    let config =
        AttentionConfig::new(4, 2).with_kv_heads(1).with_scale(0.1).with_rotary(Rotary::new(1e4));
    let layer = layer::<f32>(
        config,
        Biases::Qkv,
        options().with_map(DctMapConfig::new().with_blocks(2).with_mixing(Mixing::Mixed)),
        1,
    );
    let parts = Parts::open(&layer.to_safetensors().unwrap());
    let notes: BTreeMap<_, _> =
        parts.notes.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let expected = [
        ("dijiang.crc32", notes["dijiang.crc32"]),
        ("dijiang.version", "2"),
        ("self_attn.dijiang.0.envelope", "none"),
        ("self_attn.dijiang.0.pairing", "single"),
        ("self_attn.dijiang.0.projection", "mixed"),
        ("self_attn.dijiang.0.sides", "untied"),
        ("self_attn.dijiang.biases", "qkv"),
        ("self_attn.dijiang.causality", "causal"),
        ("self_attn.dijiang.head_dim", "2"),
        ("self_attn.dijiang.heads", "2"),
        ("self_attn.dijiang.kv_heads", "1"),
        ("self_attn.dijiang.model_dim", "4"),
        ("self_attn.dijiang.qk_norm", "none"),
        ("self_attn.dijiang.rotary", "halves"),
        ("self_attn.dijiang.rotary.base", "10000.0"),
        ("self_attn.dijiang.rotary.dims", "all"),
        ("self_attn.dijiang.rotary.scaling", "none"),
        ("self_attn.dijiang.scale", "0.1"),
        ("self_attn.dijiang.sinks", "4"),
        ("self_attn.dijiang.windows", "8 1"),
    ];
    assert_eq!(notes.into_iter().collect::<Vec<_>>(), expected);
    let tensors: Vec<_> = parts
        .tensors
        .iter()
        .map(|(name, (dtype, shape, _))| (name.as_str(), *dtype, shape.as_slice()))
        .collect();
    let expected: [(&str, Dtype, &[usize]); 17] = [
        ("self_attn.dijiang.0.key.center", Dtype::F64, &[2]),
        ("self_attn.dijiang.0.key.radii", Dtype::F64, &[4]),
        ("self_attn.dijiang.0.key.scale", Dtype::F64, &[4]),
        ("self_attn.dijiang.0.log_decay", Dtype::F64, &[]),
        ("self_attn.dijiang.0.log_mix", Dtype::F64, &[]),
        ("self_attn.dijiang.0.log_weight", Dtype::F64, &[4]),
        ("self_attn.dijiang.0.query.center", Dtype::F64, &[2]),
        ("self_attn.dijiang.0.query.radii", Dtype::F64, &[4]),
        ("self_attn.dijiang.0.query.scale", Dtype::F64, &[4]),
        ("self_attn.dijiang.0.signs", Dtype::F64, &[2, 3, 2]),
        ("self_attn.k_proj.bias", Dtype::F32, &[2]),
        ("self_attn.k_proj.weight", Dtype::F32, &[2, 4]),
        ("self_attn.o_proj.weight", Dtype::F32, &[4, 4]),
        ("self_attn.q_proj.bias", Dtype::F32, &[4]),
        ("self_attn.q_proj.weight", Dtype::F32, &[4, 4]),
        ("self_attn.v_proj.bias", Dtype::F32, &[2]),
        ("self_attn.v_proj.weight", Dtype::F32, &[2, 4]),
    ];
    assert_eq!(tensors, expected);
}

#[test]
fn files_are_standard_and_rewritten_ones_load() {
    let layer = small();
    let file = layer.to_safetensors().unwrap();
    let tensors = SafeTensors::deserialize(&file).unwrap();
    let q: Vec<f32> = tensors
        .tensor("self_attn.q_proj.weight")
        .unwrap()
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect();
    assert_eq!(q, layer.weights().q.iter().copied().collect::<Vec<_>>());
    for (name, tensor) in tensors.iter() {
        let offset = tensor.data().as_ptr() as usize - file.as_ptr() as usize;
        assert_eq!(offset % (tensor.dtype().bitsize() / 8), 0, "{name} is aligned");
    }

    let mut parts = Parts::open(&file);
    parts.notes.insert(
        "comment".to_owned(),
        "digits in strings are of no concern: 123456789012345678901234567890 \"\\".to_owned(),
    );
    parts.tensors.insert("lm_head.weight".to_owned(), (Dtype::BF16, vec![3, 0], Vec::new()));
    assert_same("rewritten", &DijiangAttention::from_safetensors(&parts.bytes()).unwrap(), &layer);
}

#[test]
fn many_layers() {
    let layers: Vec<_> =
        kinds::<f32>().into_iter().map(|(_, layer)| calibrated(layer, 6)).collect();
    let file = save_layers(&layers).unwrap();
    assert!(
        Parts::open(&file).tensors.contains_key("model.layers.10.self_attn.dijiang.2.query.center")
    );
    let loaded = load_layers::<f32>(&file).unwrap();
    assert_eq!(loaded.len(), layers.len());
    for ((name, _), (got, expected)) in kinds::<f32>().iter().zip(loaded.iter().zip(&layers)) {
        assert_same(name, got, expected);
    }
    assert_eq!(save_layers::<f32>(&[]).unwrap_err(), Error::Empty { argument: "layers" });
    assert_eq!(save_maps::<f32>(&[]).unwrap_err(), Error::Empty { argument: "layers" });
}

#[test]
fn maps_alone() {
    for (name, saved) in kinds::<f64>() {
        let saved = calibrated(saved, 7);
        let softmax =
            SoftmaxAttention::new(saved.config().clone(), saved.weights().clone()).unwrap();
        let fresh = DijiangAttention::from_softmax(
            &softmax,
            DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(3)),
        )
        .unwrap();
        let maps = saved.save_maps().unwrap();
        assert!(
            Parts::open(&maps)
                .tensors
                .keys()
                .all(|tensor| tensor.starts_with("self_attn.dijiang.")),
            "{name}: no weights"
        );
        for file in [&maps, &saved.to_safetensors().unwrap()] {
            let mut layer = fresh.clone();
            layer.load_maps(file).unwrap();
            assert_same(name, &layer, &saved);
            assert!(
                std::sync::Arc::ptr_eq(layer.weights(), fresh.weights()),
                "{name}: the weights are shared, not copied"
            );
        }
    }
}

#[test]
fn maps_of_a_model() {
    let model = |seed: u64| -> Vec<DijiangAttention<f32>> {
        (0..3)
            .map(|l| {
                calibrated(
                    layer(
                        grouped(),
                        Biases::None,
                        options().with_map(DctMapConfig::new().with_seed(seed)),
                        20 + l,
                    ),
                    seed + l,
                )
            })
            .collect()
    };
    let saved = model(30);
    for file in [save_maps(&saved).unwrap(), save_layers(&saved).unwrap()] {
        let mut loaded = model(40);
        load_maps(&mut loaded, &file).unwrap();
        loaded.iter().zip(&saved).for_each(|(got, expected)| assert_same("model", got, expected));
    }

    // One fault in the last layer: none is changed.
    let mut parts = Parts::open(&save_maps(&saved).unwrap());
    parts.notes.insert("model.layers.2.self_attn.dijiang.1.sides".to_owned(), "apart".to_owned());
    let mut loaded = model(40);
    let error = load_maps(&mut loaded, &parts.bytes()).unwrap_err();
    assert_eq!(named(&error), "model.layers.2.self_attn.dijiang.1.sides");
    loaded
        .iter()
        .zip(&model(40))
        .for_each(|(got, expected)| assert_same("unchanged", got, expected));

    let error = load_maps(&mut loaded[..2], &save_maps(&saved).unwrap()).unwrap_err();
    assert_eq!(error.to_string(), "dijiang.layers must be 2, got 3");
    assert_eq!(
        named(&load_layers::<f32>(&save_maps(&saved).unwrap()).unwrap_err()),
        "model.layers.0.self_attn.q_proj.weight"
    );
}

#[test]
fn maps_of_another_element_type() {
    let saved = calibrated(layer::<f64>(grouped(), Biases::All, options(), 1), 2);
    let mut single = layer::<f32>(grouped(), Biases::All, options(), 1);
    single.load_maps(&saved.save_maps().unwrap()).unwrap();
    assert_eq!(single.maps()[2].params(), saved.maps()[2].params());

    // A number that only f64 can work with.
    let mut params = saved.maps()[0].params().clone();
    params.key.center[1] = 1e20;
    let mut maps = saved.maps().to_vec();
    maps[0] = DctMap::from_params(params).unwrap();
    let error = single.load_maps(&saved.with_maps(maps).unwrap().save_maps().unwrap()).unwrap_err();
    let expected = "self_attn.dijiang.0.key.center must be finite and at most 1e15 in magnitude, \
                    got 1e20 at index 1";
    assert_eq!(error.to_string(), expected);
}

/// A file taken apart.
#[derive(Clone)]
struct Parts {
    notes: HashMap<String, String>,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Parts {
    fn open(file: &[u8]) -> Self {
        let (_, metadata) = SafeTensors::read_metadata(file).unwrap();
        let tensors = SafeTensors::deserialize(file).unwrap();
        let tensors = tensors
            .iter()
            .map(|(name, t)| (name.to_owned(), (t.dtype(), t.shape().to_vec(), t.data().to_vec())));
        Self { notes: metadata.metadata().clone().unwrap(), tensors: tensors.collect() }
    }

    /// The file, its checksum that of what is in it.
    fn bytes(&self) -> Vec<u8> {
        let own = |name: &str| {
            name.starts_with("dijiang.")
                || name.starts_with("self_attn.")
                || name.starts_with("model.layers.")
        };
        let mut notes: BTreeMap<_, _> = self.notes.clone().into_iter().collect();
        notes.remove("dijiang.crc32");
        let mut covered = Vec::new();
        let mut add = |name: &str, value: &[u8]| {
            covered.extend([name.as_bytes(), b"\0", value, b"\0"].concat());
        };
        notes
            .iter()
            .filter(|(name, _)| own(name))
            .for_each(|(name, value)| add(name, value.as_bytes()));
        self.tensors
            .iter()
            .filter(|(name, _)| own(name))
            .for_each(|(name, (_, _, data))| add(name, data));
        notes.insert("dijiang.crc32".to_owned(), format!("{:08x}", crc32fast::hash(&covered)));
        let tensors = self.tensors.iter().map(|(name, (dtype, shape, data))| {
            (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
        });
        serialize(tensors, Some(notes.into_iter().collect())).unwrap()
    }

    /// The first 64-bit number of a tensor of the small layer, or the first two of 32 bits.
    fn with_number(mut self, name: &str, number: f64) -> Self {
        let (dtype, _, data) = self.tensors.get_mut(name).unwrap();
        match dtype {
            Dtype::F64 => data[..8].copy_from_slice(&number.to_le_bytes()),
            _ => data[..4].copy_from_slice(&(number as f32).to_le_bytes()),
        }
        self
    }
}

/// What a [`Error::Format`] is about.
#[track_caller]
fn named(error: &Error) -> &str {
    let Error::Format { name, .. } = error else { panic!("no error of format: {error:?}") };
    name
}

/// The error of loading `bytes` as an `f32` layer.
#[track_caller]
fn refused(bytes: &[u8]) -> Error {
    DijiangAttention::<f32>::from_safetensors(bytes).map(|_| ()).unwrap_err()
}

#[test]
fn every_truncation() {
    let (layer, mut other) = (small(), small());
    let (file, maps) = (layer.to_safetensors().unwrap(), layer.save_maps().unwrap());
    for len in 0..file.len() {
        assert_eq!(named(&refused(&file[..len])), "file", "{len} of {} bytes", file.len());
    }
    for len in 0..maps.len() {
        assert_eq!(named(&other.load_maps(&maps[..len]).unwrap_err()), "file");
    }
    assert_eq!(other.to_safetensors().unwrap(), file, "unchanged");
    let mut longer = file.clone();
    longer.push(0);
    assert_eq!(named(&refused(&longer)), "file");
}

#[test]
fn every_flipped_bit() {
    let layer = small();
    let (mut file, mut by_checksum) = (layer.to_safetensors().unwrap(), 0);
    let mut other = layer.clone();
    for index in 0..file.len() {
        for bit in 0..8 {
            file[index] ^= 1 << bit;
            by_checksum += usize::from(named(&refused(&file)) == "dijiang.crc32");
            named(&other.load_maps(&file).unwrap_err());
            file[index] ^= 1 << bit;
        }
    }
    assert_same("unchanged", &other, &layer);
    assert!(by_checksum > 0, "flips in numbers");
}

#[test]
fn garbage() {
    let mut random = Random::new(8);
    for len in [0, 1, 7, 8, 9, 100, 5000] {
        let mut bytes: Vec<u8> = (0..len).map(|_| random.below(256) as u8).collect();
        assert_eq!(named(&refused(&bytes)), "file");
        if len > 8 {
            bytes[..8].copy_from_slice(&(len as u64 - 8).to_le_bytes()); // all of it header
            assert_eq!(named(&refused(&bytes)), "file");
        }
    }
    let nothing = serialize(Vec::<(String, TensorView<'_>)>::new(), None).unwrap();
    assert_eq!(
        refused(&nothing).to_string(),
        "dijiang.version must be in the metadata, got nothing"
    );
}

/// Sizes that no memory holds, and offsets whose sum overflows in the parser.
#[test]
fn absurd_sizes() {
    let with_header =
        |header: &str| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let (eighth, mut end) = ((1_u64 << 61) - 1, 0_u64);
    let mut many = String::from("{");
    for i in 0..9 {
        let len = eighth.min(u64::MAX - end);
        many += &format!(
            r#""t{i}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{end},{}]}},"#,
            end + len
        );
        end += len;
    }
    many.pop();
    for header in [
        many + "}",
        format!(r#"{{"a":{{"dtype":"F64","shape":[{0},{0}],"data_offsets":[0,{0}]}}}}"#, u64::MAX),
        r#"{"a":{"dtype":"F64","shape":[1000000000000],"data_offsets":[0,8000000000000]}}"#
            .to_owned(),
        "[".repeat(100_000),
    ] {
        assert_eq!(named(&refused(&with_header(&header))), "file");
    }
    for len in [u64::MAX, u64::MAX - 7, 1 << 40, 100_000_001] {
        assert_eq!(named(&refused(&[&len.to_le_bytes()[..], b"{}"].concat())), "file");
    }

    // Counts in the metadata are compared with tensors before memory is taken.
    let parts = Parts::open(&small().to_safetensors().unwrap());
    for name in ["model_dim", "heads", "kv_heads", "head_dim", "rotary.dims", "sinks", "windows"] {
        for value in [
            "0",
            "18446744073709551615",
            "9223372036854775807",
            "4611686018427387904",
            "1000000000",
            "-1",
            "",
            "3.5",
        ] {
            let mut parts = parts.clone();
            parts.notes.insert(format!("self_attn.dijiang.{name}"), value.to_owned());
            let result = DijiangAttention::<f32>::from_safetensors(&parts.bytes());
            let fits = (name, value) == ("sinks", "0");
            assert_eq!(result.is_ok(), fits, "{name} = {value}");
            result
                .err()
                .iter()
                .for_each(|error| assert!(named(error).starts_with("self_attn."), "{error}"));
        }
    }
    let mut parts = Parts::open(&save_layers([&small()]).unwrap());
    for (layers, name) in [
        ("18446744073709551615", "model.layers.1.self_attn.dijiang.model_dim"),
        ("0", "dijiang.layers"),
    ] {
        parts.notes.insert("dijiang.layers".to_owned(), layers.to_owned());
        assert_eq!(named(&load_layers::<f32>(&parts.bytes()).unwrap_err()), name);
    }
}

#[test]
fn whatever_is_missing() {
    let config = AttentionConfig::new(4, 1).with_rotary(Rotary::new(1e4).with_scaling(
        RotaryScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context: 64,
        },
    ));
    for layer in [
        layer::<f32>(
            config.clone(),
            Biases::All,
            options().with_map(DctMapConfig::new().with_mixing(Mixing::Mixed)),
            1,
        ),
        dense(layer::<f32>(config, Biases::All, options(), 1), 1),
    ] {
        let parts = Parts::open(&layer.to_safetensors().unwrap());
        for name in parts.tensors.keys() {
            let mut parts = parts.clone();
            parts.tensors.remove(name);
            let error = refused(&parts.bytes());
            assert!(
                matches!(
                    &error,
                    Error::Format { name: missing, got, .. } if missing == name && got == "nothing"
                ),
                "{name}: {error}"
            );
        }
        for name in parts.notes.keys().filter(|name| *name != "dijiang.crc32") {
            let mut parts = parts.clone();
            parts.notes.remove(name);
            assert_eq!(
                refused(&parts.bytes()).to_string(),
                format!("{name} must be in the metadata, got nothing")
            );
        }
    }
}

#[test]
fn other_shapes_and_types() {
    let parts = Parts::open(&small().to_safetensors().unwrap());
    for (name, (dtype, shape, data)) in &parts.tensors {
        let mut faults = vec![
            (*dtype, [shape.as_slice(), &[1]].concat(), data.clone()),
            (Dtype::F16, vec![data.len() / 2], data.clone()),
        ];
        faults.push((*dtype, vec![0], Vec::new()));
        if let [.., last] = shape[..] {
            let longer = [&shape[..shape.len() - 1], &[2 * last]].concat();
            faults.push((*dtype, longer, data.repeat(2)));
        }
        for fault in faults {
            let mut parts = parts.clone();
            let told = format!("{:?} {:?}", fault.0, fault.1);
            parts.tensors.insert(name.clone(), fault);
            let error = refused(&parts.bytes());
            // The radii say how many rows there are: they are believed, and what follows them is
            // not.
            let about = if name.ends_with("query.radii") {
                named(&error).starts_with("self_attn.dijiang.0")
            } else {
                named(&error) == name
            };
            assert!(about, "{name} as {told}: {error}");
        }
    }
    let error = DijiangAttention::<f64>::from_safetensors(&parts.bytes()).map(|_| ()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "self_attn.q_proj.weight must be F64 [4, 4], got F32 [4, 4]",
        "never converted"
    );
    let double = layer::<f64>(AttentionConfig::new(4, 1), Biases::None, options(), 1)
        .to_safetensors()
        .unwrap();
    assert_eq!(
        refused(&double).to_string(),
        "self_attn.q_proj.weight must be F32 [4, 4], got F64 [4, 4]"
    );
}

#[test]
fn numbers_out_of_range() {
    let parts = Parts::open(&small().to_safetensors().unwrap());
    for name in parts.tensors.keys() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 2e15] {
            let error = refused(&parts.clone().with_number(name, number).bytes());
            let about = if name.ends_with("log_decay") && number == 2e15 {
                "self_attn.dijiang"
            } else {
                name
            };
            assert_eq!(named(&error), about, "{number}: {error}");
        }
    }
    let error =
        refused(&parts.clone().with_number("self_attn.dijiang.0.query.center", f64::NAN).bytes());
    let expected = "self_attn.dijiang.0.query.center must be finite and at most 1e15 in \
                    magnitude, got NaN at index 0";
    assert_eq!(error.to_string(), expected);
    for (name, value) in [
        ("scale", "NaN"),
        ("scale", "-1.0"),
        ("scale", "inf"),
        ("rotary.base", "0"),
        ("rotary.base", "1e"),
    ] {
        let mut parts = parts.clone();
        parts.notes.insert(format!("self_attn.dijiang.{name}"), value.to_owned());
        assert!(
            named(&refused(&parts.bytes())).starts_with("self_attn.dijiang"),
            "{name} = {value}"
        );
    }
}

#[test]
fn other_versions_and_unknown_words() {
    let parts = Parts::open(&small().to_safetensors().unwrap());
    let refused_note = |name: &str, value: &str| {
        let mut parts = parts.clone();
        parts.notes.insert(name.to_owned(), value.to_owned()).unwrap();
        let error = refused(&parts.bytes());
        assert_eq!(named(&error), name, "{error}");
        error.to_string()
    };
    assert_eq!(refused_note("dijiang.version", "3"), r#"dijiang.version must be 1 or 2, got "3""#);
    assert!(
        refused_note("dijiang.version", &"µ\u{1b}".repeat(100_000)).len() < 500,
        "a message stays readable"
    );
    let envelope = refused_note("self_attn.dijiang.0.envelope", "Gauss");
    assert_eq!(envelope, r#"self_attn.dijiang.0.envelope must be none or gaussian, got "Gauss""#);
    for name in [
        "causality",
        "windows",
        "biases",
        "rotary",
        "rotary.scaling",
        "0.projection",
        "0.pairing",
        "0.sides",
    ] {
        for word in ["unheard of", "", "None"] {
            if !matches!((name, word), ("biases" | "windows", "")) {
                refused_note(&format!("self_attn.dijiang.{name}"), word);
            }
        }
    }
}

/// Parts that are sound each for itself.
#[test]
fn parts_that_do_not_fit_each_other() {
    let parts = Parts::open(&small().to_safetensors().unwrap());
    for (name, value, about, says) in [
        ("heads", "3", "self_attn.q_proj.weight", "F32 [12, 4]"),
        ("kv_heads", "2", "self_attn.dijiang", "multiple of kv_heads"),
        ("rotary.dims", "3", "self_attn.dijiang", "even"),
        (
            "causality",
            "bidirectional",
            "self_attn.dijiang",
            "window cannot be combined with bidirectional",
        ),
        ("windows", "0 1", "self_attn.dijiang", "window chunk"),
        ("kept", "1 2 3", "self_attn.dijiang.kept", "1 numbers"),
        ("kept", "-1", "self_attn.dijiang.kept", "numbers with spaces between them"),
        ("0.sides", "tied", "self_attn.dijiang.0", "Sides::Tied"),
        ("0.pairing", "antithetic", "self_attn.dijiang.0.log_weight", "F64 [8]"),
        ("0.projection", "mixed", "self_attn.dijiang.0.signs", "F64 [1, 3, 4]"),
    ] {
        let mut parts = parts.clone();
        parts.notes.insert(format!("self_attn.dijiang.{name}"), value.to_owned());
        let error = refused(&parts.bytes());
        assert_eq!(named(&error), about, "{name} = {value}: {error}");
        assert!(error.to_string().contains(says), "{name} = {value}: {error}");
    }
    let decay = refused(&parts.with_number("self_attn.dijiang.0.log_decay", 0.5).bytes());
    assert_eq!(named(&decay), "self_attn.dijiang");
    assert!(decay.to_string().contains("log_decay must be at most 0, got 0.5"), "{decay}");
}

#[test]
fn maps_of_another_layer() {
    let sized = |model, heads| AttentionConfig::new(model, heads).with_kv_heads(3).with_head_dim(4);
    let config = || sized(24, 6).with_rotary(Rotary::new(1e4));
    let mut own = calibrated(layer::<f32>(config(), Biases::None, options(), 1), 2);
    let before = own.clone();
    let foreign = [
        (sized(48, 6).with_rotary(Rotary::new(1e4)), "model_dim"),
        (sized(24, 3).with_rotary(Rotary::new(1e4)), "heads"),
        (config().with_kv_heads(6), "kv_heads"),
        (config().with_head_dim(8), "head_dim"),
        (config().with_scale(0.25), "scale"),
        (config().with_causality(Causality::Bidirectional), "causality"),
        (sized(24, 6), "rotary"),
        (config().with_rotary(Rotary::new(2e4)), "rotary.base"),
        (config().with_rotary(Rotary::new(1e4).with_dims(2)), "rotary.dims"),
        (
            config()
                .with_rotary(Rotary::new(1e4).with_scaling(RotaryScaling::Linear { factor: 2.0 })),
            "rotary.scaling",
        ),
    ];
    for (config, what) in foreign {
        let other = layer::<f32>(config, Biases::None, options(), 3);
        let error = own.load_maps(&other.save_maps().unwrap()).unwrap_err();
        assert_eq!(named(&error), format!("self_attn.dijiang.{what}"), "{error}");
        assert_same(what, &own, &before);
    }
    let error = own.load_maps(&save_maps([&before]).unwrap()).unwrap_err();
    assert_eq!(named(&error), "self_attn.dijiang.model_dim", "a file of several layers: {error}");

    // The hold comes with the maps.
    for hold in [Some(40), None] {
        let held = |hold| config().with_rotary(Rotary::new(1e4).with_hold(hold));
        let saved = layer::<f32>(held(hold), Biases::None, options(), 3);
        let mut loaded = layer::<f32>(held(Some(7)), Biases::None, options(), 4);
        loaded.load_maps(&saved.save_maps().unwrap()).unwrap();
        assert_eq!(loaded.config().rotary, held(hold).rotary);
        let loaded = loaded.with_weights(saved.weights().as_ref().clone()).unwrap();
        assert_same("held", &loaded, &saved);
    }

    // All coordinates by number are all coordinates.
    let all = layer::<f32>(
        config().with_rotary(Rotary::new(1e4).with_dims(4)),
        Biases::None,
        options(),
        4,
    );
    own.load_maps(&all.save_maps().unwrap()).unwrap();
    assert_eq!(own.maps()[1].features(), all.maps()[1].features());
    assert_eq!(own.maps()[1].params(), all.maps()[1].params());
}

/// A fault found late, in the last head, changes nothing.
#[test]
fn a_failed_load_changes_nothing() {
    let saved = calibrated(layer::<f32>(grouped(), Biases::None, options(), 1), 2);
    let mut own = calibrated(
        layer::<f32>(
            grouped(),
            Biases::None,
            options().with_map(DctMapConfig::new().with_blocks(2)).with_window(None),
            1,
        ),
        3,
    );
    let before = own.clone();
    let maps = Parts::open(&saved.save_maps().unwrap());
    for name in maps.tensors.keys().filter(|name| name.contains(".2.")) {
        let error = own.load_maps(&maps.clone().with_number(name, f64::NAN).bytes()).unwrap_err();
        assert_eq!(named(&error), name);
        assert_same(name, &own, &before);
    }
}

/// Files from before there were sinks and windows per head.
#[test]
fn files_of_version_one() {
    let layer =
        layer::<f32>(grouped(), Biases::None, options().with_window(Some(Window::new(8, 1))), 1)
            .with_windows(vec![Window::new(8, 1)], 0)
            .unwrap();
    let mut parts = Parts::open(&layer.to_safetensors().unwrap());
    for name in ["windows", "sinks"] {
        parts.notes.remove(&format!("self_attn.dijiang.{name}")).unwrap();
    }
    parts.notes.insert("dijiang.version".to_owned(), "1".to_owned());
    for (name, value) in [("near", "chunks"), ("near.chunk", "8"), ("near.back", "1")] {
        parts.notes.insert(format!("self_attn.dijiang.{name}"), value.to_owned());
    }
    let read = DijiangAttention::<f32>::from_safetensors(&parts.bytes()).unwrap();
    assert_eq!((read.windows(), read.sinks()), (layer.windows(), 0));
    parts.notes.insert("self_attn.dijiang.near".to_owned(), "none".to_owned());
    for name in ["near.chunk", "near.back"] {
        parts.notes.remove(&format!("self_attn.dijiang.{name}")).unwrap();
    }
    let read = DijiangAttention::<f32>::from_safetensors(&parts.bytes()).unwrap();
    assert_eq!((read.windows(), read.sinks()), (&[][..], 0));
}

/// A refitted output projection goes with the maps, and the weights there were come back.
#[test]
fn output_deltas() {
    let plain = calibrated(layer::<f32>(grouped(), Biases::All, options(), 1), 2);
    let delta: Array2<f32> = cast(&Random::new(3).normals((24, 24), 0.1));
    let refitted = plain.clone().with_output_delta(delta.clone()).unwrap();
    let x = cast(&Random::new(4).normals((40, 24), 1.0));
    let outputs = |layer: &DijiangAttention<f32>| layer.forward(&x, KeyMask::All).unwrap();
    assert_ne!(outputs(&refitted), outputs(&plain));

    let whole =
        DijiangAttention::<f32>::from_safetensors(&refitted.to_safetensors().unwrap()).unwrap();
    let mut loaded = plain.clone();
    loaded.load_maps(&refitted.save_maps().unwrap()).unwrap();
    for layer in [whole, loaded.clone()] {
        assert_eq!(layer.output_delta(), Some(&delta));
        assert_eq!(outputs(&layer), outputs(&refitted));
        assert_eq!(layer.without_output_delta().weights().o, plain.weights().o);
    }
    loaded.load_maps(&plain.save_maps().unwrap()).unwrap();
    assert_eq!((loaded.output_delta(), outputs(&loaded)), (None, outputs(&plain)));

    let name = "self_attn.dijiang.output_delta";
    let file = Parts::open(&refitted.save_maps().unwrap());
    let nan = file.clone().with_number(name, f64::NAN).bytes();
    assert_eq!(named(&loaded.load_maps(&nan).unwrap_err()), name);
    let mut other = layer::<f64>(grouped(), Biases::All, options(), 1);
    assert_eq!(named(&other.load_maps(&file.bytes()).unwrap_err()), name, "of another type");
}
