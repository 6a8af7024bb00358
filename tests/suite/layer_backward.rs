//! Gradients through whole layers, against finite differences.

use dijiang::Error;
use dijiang::attention::{KeyMask, Window};
use dijiang::kernel::{DctMap, DctMapConfig};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    LayerGradients, Rotary, RotaryPairing, RotaryScaling, SoftmaxAttention,
};
use dijiang_testing::{Random, argument};
use ndarray::{Array1, Array2};

const MODEL: usize = 12;
const TOKENS: usize = 37;

/// D = 12, four query heads of 4.
fn layer(
    seed: u64,
    config: AttentionConfig,
    biases: bool,
    options: DijiangOptions,
) -> DijiangAttention<f64> {
    let mut random = Random::new(seed);
    let kv = config.kv_heads * 4;
    let mut matrix = |rows, columns| random.normals((rows, columns), 1.0 / 3.0);
    let weights = AttentionWeights::new(
        matrix(16, MODEL),
        matrix(kv, MODEL),
        matrix(kv, MODEL),
        matrix(MODEL, 16),
    );
    let mut bias = |len| random.normals(len, 0.3);
    let weights = if biases {
        weights.with_biases(bias(16), bias(kv), bias(kv), bias(MODEL))
    } else {
        weights
    };
    let weights = match config.qk_norm {
        Some(_) => weights.with_qk_norms(bias(4) + 1.0, bias(4) + 1.0),
        None => weights,
    };
    let softmax = SoftmaxAttention::new(config.with_head_dim(4), weights).unwrap();
    DijiangAttention::from_softmax(&softmax, options).unwrap()
}

fn config() -> AttentionConfig {
    AttentionConfig::new(MODEL, 4)
}

/// Name, layer, and whether keys are masked.
fn cases() -> Vec<(&'static str, DijiangAttention<f64>, bool)> {
    let window = || DijiangOptions::new().with_window(Some(Window::new(5, 1)));
    let pure = || window().with_window(None);
    let interleaved = Rotary::new(50.0).with_pairing(RotaryPairing::Interleaved).with_dims(2);
    vec![
        ("window", layer(1, config(), true, window()), false),
        (
            "window, masked",
            layer(2, config().with_kv_heads(2).with_rotary(Rotary::new(100.0)), false, window()),
            true,
        ),
        (
            "decay",
            layer(
                3,
                config().with_kv_heads(1).with_rotary(interleaved),
                true,
                pure().with_log_decay(-0.1),
            ),
            false,
        ),
        (
            "norms, YaRN",
            layer(
                6,
                config()
                    .with_kv_heads(2)
                    .with_rotary(Rotary::new(100.0).with_scaling(RotaryScaling::Yarn {
                        factor: 4.0,
                        original_context: 16,
                        beta_fast: 8.0,
                        beta_slow: 1.0,
                        attention_factor: 1.2,
                    }))
                    .with_qk_norm(0.1),
                true,
                window(),
            ),
            true,
        ),
        (
            "pure, masked",
            layer(4, config(), false, pure().with_map(DctMapConfig::new().with_blocks(2))),
            true,
        ),
        (
            "bidirectional",
            layer(
                5,
                config().with_kv_heads(2).with_causality(Causality::Bidirectional),
                true,
                window(),
            ),
            true,
        ),
    ]
}

/// One number of a layer or its input, and its gradient.
type Number = (
    String,
    Box<dyn Fn(&DijiangAttention<f64>, &Array2<f64>, f64) -> (DijiangAttention<f64>, Array2<f64>)>,
    f64,
);

fn numbers(layer: &DijiangAttention<f64>, gradients: &LayerGradients<f64>) -> Vec<Number> {
    type Matrix = fn(&mut AttentionWeights<f64>) -> &mut Array2<f64>;
    type Bias = fn(&mut AttentionWeights<f64>) -> &mut Option<Array1<f64>>;
    let mut numbers: Vec<Number> = Vec::new();
    for at in [[0, 0], [7, 3], [36, 11], [20, 5]] {
        let moved = move |layer: &DijiangAttention<f64>, x: &Array2<f64>, by: f64| {
            let mut x = x.clone();
            x[at] += by;
            (layer.clone(), x)
        };
        numbers.push((format!("x {at:?}"), Box::new(moved), gradients.x[at]));
    }
    let matrices: [(&str, Matrix); 4] =
        [("q", |w| &mut w.q), ("k", |w| &mut w.k), ("v", |w| &mut w.v), ("o", |w| &mut w.o)];
    for (name, matrix) in matrices {
        let mut found = gradients.weights.clone();
        for at in [[0, 0], [3, 11], [2, 7]] {
            let moved = move |layer: &DijiangAttention<f64>, x: &Array2<f64>, by: f64| {
                let mut weights = AttentionWeights::clone(layer.weights());
                matrix(&mut weights)[at] += by;
                (layer.clone().with_weights(weights).unwrap(), x.clone())
            };
            numbers.push((format!("{name} {at:?}"), Box::new(moved), matrix(&mut found)[at]));
        }
    }
    let biases: [(&str, Bias); 6] = [
        ("q_norm", |w| &mut w.q_norm),
        ("k_norm", |w| &mut w.k_norm),
        ("q_bias", |w| &mut w.q_bias),
        ("k_bias", |w| &mut w.k_bias),
        ("v_bias", |w| &mut w.v_bias),
        ("o_bias", |w| &mut w.o_bias),
    ];
    for (name, bias) in biases {
        let mut found = gradients.weights.clone();
        let own = &mut AttentionWeights::clone(layer.weights());
        assert_eq!(bias(&mut found).is_some(), bias(own).is_some(), "{name}");
        let Some(found) = bias(&mut found).clone() else { continue };
        for at in [0, 3] {
            let moved = move |layer: &DijiangAttention<f64>, x: &Array2<f64>, by: f64| {
                let mut weights = AttentionWeights::clone(layer.weights());
                bias(&mut weights).as_mut().unwrap()[at] += by;
                (layer.clone().with_weights(weights).unwrap(), x.clone())
            };
            numbers.push((format!("{name} {at}"), Box::new(moved), found[at]));
        }
    }
    for (h, map) in gradients.maps.iter().enumerate() {
        let moved = move |layer: &DijiangAttention<f64>, x: &Array2<f64>, by: f64| {
            let mut maps = layer.maps().to_vec();
            let mut params = maps[h].params().clone();
            params.key.radii[1] += by;
            maps[h] = DctMap::from_params(params).unwrap();
            (layer.clone().with_maps(maps).unwrap(), x.clone())
        };
        numbers.push((format!("radii of map {h}"), Box::new(moved), map.key.radii[1]));
    }
    if layer.log_decay()[0] != 0.0 {
        let moved = |layer: &DijiangAttention<f64>, x: &Array2<f64>, by: f64| {
            let mut log_decay = layer.log_decay().to_vec();
            log_decay[0] += by;
            (layer.clone().with_log_decay(log_decay).unwrap(), x.clone())
        };
        numbers.push(("log_decay".to_owned(), Box::new(moved), gradients.log_decay[0]));
    }
    numbers
}

#[test]
fn finite_differences() {
    for (name, layer, masked) in cases() {
        let mut random = Random::new(9);
        let (x, grad_out): (Array2<f64>, Array2<f64>) =
            (random.normals((TOKENS, MODEL), 1.0), random.normals((TOKENS, MODEL), 1.0));
        let valid: Vec<bool> = (0..TOKENS).map(|j| !masked || j % 4 != 1).collect();
        let mask = if masked { KeyMask::Valid(&valid) } else { KeyMask::All };
        let gradients = layer.backward(&x, mask, &grad_out).unwrap();
        let loss = |(layer, x): (DijiangAttention<f64>, Array2<f64>)| {
            (layer.forward(&x, mask).unwrap() * &grad_out).sum()
        };
        // A gradient made from the outputs on the way is the same.
        let out = layer.forward(&x, mask).unwrap();
        let with = layer.backward_with(&x, mask, |y| &grad_out + (y - &out)).unwrap();
        assert_eq!(with, gradients, "{name}");
        for (number, moved, found) in numbers(&layer, &gradients) {
            let step = 1e-5;
            let expected =
                (loss(moved(&layer, &x, step)) - loss(moved(&layer, &x, -step))) / (2.0 * step);
            assert!(
                (found - expected).abs() < 1e-6 * expected.abs().max(1.0),
                "{name}, {number}: {found}, not {expected}"
            );
        }
    }
}

#[cfg(feature = "rayon")]
#[test]
fn threads_change_no_bit() {
    let (_, layer, _) = cases().remove(2);
    let mut random = Random::new(10);
    let (x, grad_out): (Array2<f64>, Array2<f64>) =
        (random.normals((300, MODEL), 1.0), random.normals((300, MODEL), 1.0));
    let run = |threads| {
        dijiang_testing::on_threads(threads, || {
            layer.backward(&x, KeyMask::All, &grad_out).unwrap()
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(5));
}

#[test]
fn bad_input() {
    let (_, layer, _) = cases().remove(0);
    let good = Array2::<f64>::ones((5, MODEL));
    let mut bad = good.clone();
    bad[[2, 1]] = f64::NAN;
    let refused = |x: &Array2<f64>, mask: KeyMask<'_>, grad: &Array2<f64>| {
        layer.backward(x, mask, grad).unwrap_err()
    };
    assert_eq!(argument(&refused(&bad, KeyMask::All, &good)), "x");
    assert_eq!(argument(&refused(&good, KeyMask::All, &bad)), "grad_out");
    assert_eq!(
        refused(&good, KeyMask::All, &Array2::ones((4, MODEL))),
        Error::Shape { argument: "grad_out", axis: 0, expected: 5, got: 4 }
    );
    let other = layer.backward_with(&good, KeyMask::All, |_| Array2::ones((4, MODEL))).unwrap_err();
    assert_eq!(other, Error::Shape { argument: "grad_out", axis: 0, expected: 5, got: 4 });
    assert_eq!(
        refused(&good, KeyMask::Valid(&[true; 4]), &good),
        Error::Length { argument: "mask", expected: 5, got: 4 }
    );
    assert_eq!(
        refused(&Array2::zeros((0, MODEL)), KeyMask::All, &good),
        Error::Empty { argument: "x" }
    );
}
