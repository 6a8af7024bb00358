//! From burn's own attention and from checkpoints; what the layer refuses.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::ops::ControlFlow;
use std::path::Path;

use burn::module::Module;
use burn::nn::Linear;
use burn::nn::attention::{
    MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask,
};
use burn::store::{ModuleSnapshot, PyTorchToBurnAdapter, SafetensorsStore};
use burn::tensor::{Bool, DType, Device, Distribution, Tensor};
use dijiang::Error as Nd;
use dijiang::attention::{Causality, Window};
use dijiang::calibrate::CalibrateOptions;
use dijiang::checkpoint::Checkpoint;
use dijiang::kernel::Pairing;
use dijiang::layer::{DijiangOptions, Rotary};
use dijiang_burn::{
    AttentionPath, DijiangAttention, DijiangAttentionConfig, DijiangInput, Error, softmax_layer,
};

fn device() -> Device {
    let device = Device::default();
    device.seed(5);
    device
}

fn random(batch: usize, n: usize, width: usize, device: &Device) -> Tensor<3> {
    Tensor::random([batch, n, width], Distribution::Normal(0.0, 1.0), device)
}

/// Softmax attention as burn computes it, with causal and padding masks.
fn softmax(mha: &MultiHeadAttention, x: Tensor<3>, mask_pad: Option<Tensor<2, Bool>>) -> Tensor<3> {
    let [batch, n, _] = x.dims();
    let causal = generate_autoregressive_mask(batch, n, &x.device());
    let input = MhaInput::self_attn(x).mask_attn(causal);
    let input = match mask_pad {
        Some(mask) => input.mask_pad(mask),
        None => input,
    };
    mha.forward(input).context
}

fn largest(x: Tensor<3>) -> f32 {
    x.abs().max().into_scalar()
}

/// Within the window both attentions are the same function of the same weights and masks.
#[test]
fn within_the_window_it_is_burns_own_attention() {
    let device = device();
    let mha = MultiHeadAttentionConfig::new(24, 3).with_dropout(0.0).init(&device);
    let x = random(2, 60, 24, &device);
    // Padding at the end, so that no query is without a key.
    let masked: Vec<bool> = (0..120).map(|i| i % 60 >= 60 - i / 60 * 9).collect();
    let mask =
        Tensor::<2, Bool>::from_data(burn::tensor::TensorData::new(masked, [2, 60]), &device);
    for path in [AttentionPath::Automatic, AttentionPath::Tensors] {
        let linear = DijiangAttention::from_mha(&mha, Causality::Causal, DijiangOptions::new());
        let linear = linear.unwrap().with_path(path);
        let difference = linear.forward(x.clone()).unwrap() - softmax(&mha, x.clone(), None);
        assert!(largest(difference) < 1e-5, "{path:?}");
        let padded = DijiangInput::new(x.clone()).mask_pad(mask.clone());
        let difference =
            linear.forward(padded).unwrap() - softmax(&mha, x.clone(), Some(mask.clone()));
        assert!(largest(difference) < 1e-5, "{path:?}, padded");
    }
}

/// Calibration brings the outputs nearer to softmax's, and nothing but maps changes.
#[test]
fn calibration_brings_it_nearer() {
    let device = device();
    let mha = MultiHeadAttentionConfig::new(32, 2).with_dropout(0.0).init(&device);
    let x = random(3, 200, 32, &device) * 2.0;
    let options = DijiangOptions::new().with_window(Window::new(16, 1));
    let before = DijiangAttention::from_mha(&mha, Causality::Causal, options).unwrap();
    let mut after = before.clone();
    let calibrate = CalibrateOptions::new().with_steps(20);
    let report = after.calibrate(x.clone(), &calibrate, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report.heads.len(), 2);
    let expected = softmax(&mha, x.clone(), None);
    let error = |attention: &DijiangAttention| -> f32 {
        let out = attention.forward(x.clone()).unwrap();
        (out - expected.clone()).square().mean().into_scalar()
    };
    let (before_error, after_error) = (error(&before), error(&after));
    assert!(after_error < 0.8 * before_error, "{before_error} to {after_error}");
    let weights = [&before, &after].map(|attention| attention.query.weight.val().into_data());
    assert_eq!(weights[0], weights[1]);

    let stopped = after.calibrate(x, &calibrate, |_| ControlFlow::Break(())).unwrap_err();
    assert_eq!(stopped, Error::Dijiang(Nd::Cancelled));
}

/// The projections of a Hugging Face checkpoint through burn's store, as the README says, are those
/// that `dijiang` reads.
#[test]
fn a_checkpoint_through_burns_store() {
    let device = device();
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hf-llama");
    let softmax = Checkpoint::open(&directory).unwrap().softmax_attention::<f32>(1).unwrap();
    let expected =
        dijiang::layer::DijiangAttention::from_softmax(&softmax, DijiangOptions::new()).unwrap();
    let expected = DijiangAttention::from_layer(&expected, &device).unwrap();

    let config = DijiangAttentionConfig::new(64, 8).with_n_kv_heads(Some(2));
    let config = config.with_qkv_bias(false).with_output_bias(false);
    let mut attention = config.with_rotary(Some(Rotary::new(10_000.0))).init(&device).unwrap();
    let mut store = SafetensorsStore::from_file(directory.join("model.safetensors"))
        .with_from_adapter(PyTorchToBurnAdapter)
        .with_key_remapping(r"^model\.layers\.1\.self_attn\.q_proj\.", "query.")
        .with_key_remapping(r"^model\.layers\.1\.self_attn\.k_proj\.", "key.")
        .with_key_remapping(r"^model\.layers\.1\.self_attn\.v_proj\.", "value.")
        .with_key_remapping(r"^model\.layers\.1\.self_attn\.o_proj\.", "output.")
        .allow_partial(true);
    let result = attention.load_from(&mut store).unwrap();
    assert_eq!(result.applied.len(), 4, "{result:?}");
    let x = random(1, 300, 64, &device);
    let difference = attention.forward(x.clone()).unwrap() - expected.forward(x).unwrap();
    assert_eq!(largest(difference), 0.0);
}

/// Everything that trains is in a record, the maps too, and comes back.
#[test]
fn records_hold_the_maps() {
    let device = device();
    let config = DijiangAttentionConfig::new(16, 2)
        .with_windows(vec![Window::new(8, 1), Window::new(16, 1)])
        .with_features(Some(16));
    let attention = config.init(&device).unwrap();
    let mut moved = attention.clone();
    moved.maps.log_mix = moved.maps.log_mix.map(|x| x - 1.0);
    moved.maps.key.radii = moved.maps.key.radii.map(|x| x * 0.5);
    let loaded = moved.config().init(&device).unwrap().load_record(moved.clone().into_record());
    let x = random(1, 90, 16, &device);
    let [a, b, c] = [&attention, &moved, &loaded].map(|layer| layer.forward(x.clone()).unwrap());
    assert_eq!(largest(b.clone() - c), 0.0);
    assert!(largest(a - b) > 1e-4, "the maps count");
}

/// Attention alone between a layer's own projections is the layer, padding and all.
#[test]
fn attention_alone() {
    let device = device();
    let config = DijiangAttentionConfig::new(24, 4).with_n_kv_heads(Some(2)).with_head_dim(Some(8));
    let layer = config.with_windows(vec![Window::new(8, 1)]).init(&device).unwrap();
    let x = random(2, 70, 24, &device);
    let masked: Vec<bool> = (0..140).map(|i| i % 70 < 3 || i % 11 == 5).collect();
    let mask =
        Tensor::<2, Bool>::from_data(burn::tensor::TensorData::new(masked, [2, 70]), &device);
    for path in [AttentionPath::Automatic, AttentionPath::Tensors] {
        let layer = layer.clone().with_path(path);
        let expected = layer.forward(DijiangInput::new(x.clone()).mask_pad(mask.clone())).unwrap();
        let heads = |linear: &Linear, heads| linear.forward(x.clone()).reshape([2, 70, heads, 8]);
        let [q, k, v] = [heads(&layer.query, 4), heads(&layer.key, 2), heads(&layer.value, 2)];
        let out = layer.attend(q, k, v, Some(mask.clone())).unwrap();
        let out = layer.output.forward(out.reshape([2, 70, 32]));
        assert_eq!(largest(out - expected), 0.0, "{path:?}");
    }
}

/// Elements of half width are computed in f32 by tensor operations.
#[test]
fn half_width() {
    let device = device();
    if !device.supports_dtype(DType::F16) {
        return;
    }
    let attention = DijiangAttentionConfig::new(16, 2).init(&device).unwrap();
    let x = random(1, 150, 16, &device);
    struct Half;
    impl burn::module::ModuleMapper for Half {
        fn map_float<const D: usize>(
            &mut self,
            param: burn::module::Param<Tensor<D>>,
        ) -> burn::module::Param<Tensor<D>> {
            param.map(|x| x.cast(DType::F16))
        }
    }
    let half = attention.clone().map(&mut Half);
    let out = half.forward(x.clone().cast(DType::F16)).unwrap();
    assert_eq!(out.dtype(), DType::F16);
    let difference = out.cast(DType::F32) - attention.forward(x).unwrap();
    assert!(largest(difference) < 0.02);
}

/// One case per error.
#[test]
fn what_it_refuses() {
    let device = device();
    let config = || DijiangAttentionConfig::new(16, 4);
    let refused = |config: DijiangAttentionConfig| config.init(&device).unwrap_err();
    let not_divisible = |argument, divisor, divisor_value, got| {
        Error::Dijiang(Nd::NotDivisible { argument, divisor, divisor_value, got })
    };
    assert_eq!(
        refused(DijiangAttentionConfig::new(18, 4)),
        not_divisible("model_dim", "heads", 4, 18)
    );
    assert_eq!(
        refused(config().with_n_kv_heads(Some(3))),
        not_divisible("heads", "kv_heads", 3, 4)
    );
    let antithetic = config().with_pairing(Pairing::Antithetic).with_features(Some(12));
    assert_eq!(
        refused(antithetic),
        not_divisible("features", "the least number of features", 8, 12)
    );
    assert_eq!(
        refused(config().with_windows(vec![Window::new(16, 1); 3])),
        Error::Dijiang(Nd::Length { argument: "windows", expected: 4, got: 3 })
    );
    assert!(matches!(
        refused(config().with_log_decay(0.5)),
        Error::Dijiang(Nd::Value { argument: "log_decay", .. })
    ));

    let attention = config().init(&device).unwrap();
    let zeros = |shape: [usize; 3]| Tensor::<3>::zeros(shape, &device);
    let shape =
        |argument, axis, expected, got| Error::Dijiang(Nd::Shape { argument, axis, expected, got });
    let error = |input: DijiangInput| attention.forward(input).unwrap_err();
    assert_eq!(error(zeros([1, 5, 17]).into()), shape("x", 2, 16, 17));
    let empty = Error::Dijiang(Nd::Empty { argument: "x" });
    assert_eq!(error(zeros([1, 0, 16]).into()), empty);
    let mask = Tensor::<2, Bool>::full([1, 4], true, &device);
    let masked = DijiangInput::new(zeros([1, 5, 16])).mask_pad(mask);
    assert_eq!(error(masked), shape("mask_pad", 1, 5, 4));
    if device.supports_dtype(DType::F64) {
        let wide = zeros([1, 5, 16]).cast(DType::F64);
        assert!(matches!(error(wide.into()), Error::Tensor { argument: "x", .. }));
    }

    let heads = |n, heads| Tensor::<4>::zeros([1, n, heads, 4], &device);
    let error = |q, k, v, mask_pad| attention.attend(q, k, v, mask_pad).unwrap_err();
    assert_eq!(error(heads(5, 3), heads(5, 4), heads(5, 4), None), shape("q", 2, 4, 3));
    assert_eq!(error(heads(5, 4), heads(6, 4), heads(5, 4), None), shape("k", 1, 5, 6));
    assert_eq!(error(heads(5, 4), heads(5, 4), heads(5, 2), None), shape("v", 2, 4, 2));
    let empty = Error::Dijiang(Nd::Empty { argument: "q" });
    assert_eq!(error(heads(0, 4), heads(0, 4), heads(0, 4), None), empty);
    let mask = Tensor::<2, Bool>::full([2, 5], true, &device);
    assert_eq!(
        error(heads(5, 4), heads(5, 4), heads(5, 4), Some(mask)),
        shape("mask_pad", 0, 1, 2)
    );
    let half = heads(5, 4).cast(DType::F16);
    assert!(matches!(
        error(heads(5, 4), heads(5, 4), half, None),
        Error::Tensor { argument: "v", .. }
    ));

    assert_eq!(
        attention.new_cache(0).unwrap_err(),
        Error::Dijiang(Nd::Empty { argument: "batch" })
    );
    let mut cache = attention.new_cache(2).unwrap();
    let foreign = Nd::Foreign { argument: "cache", what: "batch", expected: 1, got: 2 };
    assert_eq!(
        attention.forward_cache(zeros([1, 5, 16]), &mut cache).unwrap_err(),
        Error::Dijiang(foreign)
    );
    let other = DijiangAttentionConfig::new(16, 2).init(&device).unwrap();
    assert!(matches!(
        other.forward_cache(zeros([2, 5, 16]), &mut cache).unwrap_err(),
        Error::Dijiang(Nd::Conflict { argument: "layer", .. })
    ));
    assert_eq!(cache.position(), 0);
    let both_ways = config().with_causality(Causality::Bidirectional).init(&device).unwrap();
    assert!(matches!(
        both_ways.new_cache(1).unwrap_err(),
        Error::Dijiang(Nd::Conflict { argument: "cache", .. })
    ));

    let quiet = MultiHeadAttentionConfig::new(16, 2).with_quiet_softmax(true).init(&device);
    assert!(matches!(
        softmax_layer::<f32>(&quiet, Causality::Causal).unwrap_err(),
        Error::Dijiang(Nd::Conflict { argument: "quiet_softmax", .. })
    ));
}

/// The engine says what it cannot work with, and a cache is as it was; a NaN that is masked is not
/// looked at as a key.
#[test]
fn the_engine_refuses_what_is_not_finite() {
    let device = Device::flex();
    let attention = DijiangAttentionConfig::new(16, 2).init(&device).unwrap();
    let x = random(2, 20, 16, &device);
    let broken = x.clone().slice_fill([1..2, 3..4, 0..1], f32::NAN);
    let error = attention.forward(broken.clone()).unwrap_err();
    assert!(matches!(error, Error::Dijiang(Nd::NonFinite { argument: "q", .. })), "{error:?}");
    let mut cache = attention.new_cache(2).unwrap();
    attention.forward_cache(x.clone(), &mut cache).unwrap();
    let mut untouched = cache.clone();
    attention.forward_cache(broken, &mut cache).unwrap_err();
    let [a, b] = [&mut cache, &mut untouched]
        .map(|cache| attention.forward_cache(x.clone(), cache).unwrap().into_data());
    assert_eq!(a, b);
}
