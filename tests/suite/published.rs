//! The layer of the code published with the paper.

use std::path::Path;

use dijiang::attention::KeyMask;
use dijiang::checkpoint::Tensors;
use dijiang::kernel::published_features;
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, PublishedAttention, PublishedWeights,
    Rotary,
};
use dijiang::{Error, Real};
use dijiang_testing::{Random, argument, assert_close, cast};
use ndarray::{Array1, Array2, Array3, Axis, s};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

fn golden() -> Tensors {
    Tensors::open_file(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden/official_neox_attention_f64.safetensors"),
    )
    .unwrap()
}

/// A quarter of each head's 16 coordinates is rotated.
fn config() -> AttentionConfig {
    AttentionConfig::new(64, 4).with_rotary(Rotary::new(10_000.0).with_dims(4))
}

fn layer<T: Real>() -> PublishedAttention<T> {
    PublishedAttention::from_tensors(&golden(), "", config()).unwrap()
}

fn sequences<T: Real>(name: &str) -> Array3<T> {
    Array3::from_shape_vec((2, 33, 64), golden().numbers(name, &[2, 33, 64]).unwrap()).unwrap()
}

#[test]
fn the_published_code_gave_the_same() {
    let expected = sequences::<f64>("output");
    let top = expected.iter().fold(0.0_f64, |top, x| top.max(x.abs()));
    assert_close(
        "f64",
        &layer::<f64>().forward_batch(&sequences("input"), None).unwrap(),
        &expected,
        1e-6 * top,
    );
    assert_close(
        "f32",
        &layer::<f32>().forward_batch(&sequences("input"), None).unwrap(),
        &expected,
        1e-4 * top,
    );
    // Its decays are those that all its layers have.
    let weights = layer::<f64>().published_weights().clone();
    for (found, expected) in weights.log_decay.iter().zip(PublishedWeights::<f64>::decays(4)) {
        assert!((found - expected).abs() < 1e-7, "{found} is not {expected}");
    }
    let radii: Vec<f64> = golden().numbers("radii", &[16]).unwrap();
    assert!(weights.radii.iter().zip(&radii).all(|(found, t)| (found - t).abs() < 1e-6));
}

/// Long tables of powers end in zeros, which say nothing about the decay.
#[test]
fn decays_from_powers_that_vanish() {
    let positions = 6_000_usize;
    let decays = PublishedWeights::<f64>::decays(4);
    let powers = decays
        .iter()
        .flat_map(|&decay| (0..positions).map(move |j| (decay * j as f64).exp() as f32));
    let powers: Vec<u8> = powers.flat_map(f32::to_le_bytes).collect();
    let bytes = std::fs::read(
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("golden/official_neox_attention_f64.safetensors"),
    )
    .unwrap();
    let stored = SafeTensors::deserialize(&bytes).unwrap();
    let with_powers = |shape: Vec<usize>, powers: &[u8]| {
        let powers = TensorView::new(Dtype::F32, shape, powers).unwrap();
        let views = stored.iter().filter(|(name, _)| *name != "D1").chain([("D1", powers)]);
        let path = std::env::temp_dir()
            .join(format!("dijiang-published-{}.safetensors", std::process::id()));
        std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
        let layer = PublishedAttention::<f64>::from_tensors(
            &Tensors::open_file(&path).unwrap(),
            "",
            config(),
        );
        std::fs::remove_file(path).unwrap();
        layer
    };
    let layer = with_powers(vec![1, 4, positions, 1], &powers).unwrap();
    for (found, expected) in layer.published_weights().log_decay.iter().zip(decays) {
        assert!((found - expected).abs() < 1e-8, "{found} is not {expected}");
    }
    // One number that is no power, and all powers times one.
    for (at, factor) in [(1, 1.02), (700, 0.9), (0, 2.0)] {
        let mut table = powers.clone();
        let at = 4 * (positions + at);
        let power = f32::from_le_bytes(*table[at..].first_chunk().unwrap());
        table[at..at + 4].copy_from_slice(&(factor * power).to_le_bytes());
        let error = with_powers(vec![1, 4, positions, 1], &table).unwrap_err();
        assert!(matches!(&error, Error::Format { name, .. } if name == "D1"), "{error}");
    }
    let zeros = [1.0_f32, 0.0].repeat(4).into_iter().flat_map(f32::to_le_bytes).collect::<Vec<_>>();
    assert!(matches!(
        with_powers(vec![1, 4, 2, 1], &zeros),
        Err(Error::Format { name, .. }) if name == "D1"
    ));
}

/// A layer with numbers of its own, and h channels to a group that is no whole head.
fn random<T: Real>(seed: u64) -> PublishedAttention<T> {
    let mut random = Random::new(seed);
    let (heads, d, channels) = (3, 8, 24);
    let mut matrix = |rows, scale: f64| cast::<T, _>(&random.normals((rows, channels), scale));
    let weights =
        AttentionWeights::new(matrix(24, 0.4), matrix(24, 0.4), matrix(24, 0.4), matrix(24, 0.4));
    let gate = matrix(24, 0.4);
    let (scale, shift) = (matrix(1, 1.0).row(0).to_owned(), matrix(1, 1.0).row(0).to_owned());
    let radii = random.normals(d, 1.0).to_vec();
    let published =
        PublishedWeights::new(radii, PublishedWeights::<T>::decays(heads), gate, scale, shift);
    PublishedAttention::new(
        AttentionConfig::new(channels, heads).with_rotary(Rotary::new(100.0)),
        weights,
        published,
    )
    .unwrap()
}

fn text<T: Real>(n: usize) -> Array2<T> {
    cast(&Random::new(5).normals((n, 24), 1.0))
}

/// The formula, by n×n scores.
#[test]
fn the_formula_on_long_sequences() {
    let (layer, n) = (random::<f64>(1), 333);
    let (x, valid): (Array2<f64>, Vec<bool>) = (text(n), (0..n).map(|j| j % 5 != 1).collect());
    let softmax =
        dijiang::layer::SoftmaxAttention::new(layer.config().clone(), layer.weights().clone())
            .unwrap();
    let [q, k, v] = softmax.project_at(&x, 0).unwrap();
    let published = layer.published_weights();
    let mut heads = Array2::zeros((n, 24));
    for h in 0..3 {
        let features = |x: &Array3<f64>| {
            published_features(&x.index_axis(Axis(0), h), &published.radii).unwrap()
        };
        let mut scores = features(&q).dot(&features(&k).t());
        for ((i, j), score) in scores.indexed_iter_mut() {
            *score *= if j <= i && valid[j] {
                (published.log_decay[h] * (i - j) as f64).exp()
            } else {
                0.0
            };
        }
        heads.slice_mut(s![.., h * 8..(h + 1) * 8]).assign(&scores.dot(&v.index_axis(Axis(0), h)));
    }
    for mut row in heads.outer_iter_mut() {
        for mut group in row.exact_chunks_mut(3) {
            let mean = group.sum() / 3.0;
            let variance = group.fold(0.0, |sum, x| sum + (x - mean).powi(2)) / 3.0;
            group.mapv_inplace(|x| (x - mean) / (variance + 1e-5).sqrt());
        }
    }
    let gates = x.dot(&published.gate).mapv(|g| g / (1.0 + (-g).exp()));
    let expected = ((heads * &published.norm_scale + &published.norm_shift) * gates)
        .dot(&layer.weights().o.t());
    assert_close("formula", &layer.forward(&x, KeyMask::Valid(&valid)).unwrap(), &expected, 1e-10);
}

#[test]
fn pieces_and_steps_are_the_whole() {
    fn check<T: Real>(tolerance: f64) {
        let (layer, n) = (random::<T>(2), 200);
        let x = text::<T>(n);
        let whole = layer.forward(&x, KeyMask::All).unwrap().mapv(Real::to_f64);
        let mut state = layer.new_state();
        let bytes = state.bytes();
        for tokens in [0..1, 1..65, 65..130] {
            let part =
                layer.prefill(&mut state, &x.slice(s![tokens.clone(), ..]), KeyMask::All).unwrap();
            assert_close("pieces", &part, &whole.slice(s![tokens, ..]), tolerance);
        }
        let snapshot = state.clone();
        for i in 130..n {
            let mut out = Array1::zeros(24);
            layer.step(&mut state, &x.row(i), &mut out).unwrap();
            assert_close("steps", &out, &whole.row(i), tolerance);
        }
        assert_eq!((state.position(), state.bytes()), (n, bytes));
        let mut again = snapshot;
        layer.prefill(&mut again, &x.slice(s![130.., ..]), KeyMask::All).unwrap();
        assert_eq!(again.position(), n);
        state.reset();
        assert!(state == layer.new_state());
        // Later tokens change nothing, not by a bit.
        let short = layer.forward(&x.slice(s![..77, ..]), KeyMask::All).unwrap();
        assert_close("prefix", &short, &whole.slice(s![..77, ..]), tolerance);
    }
    check::<f64>(1e-11);
    check::<f32>(2e-3);
}

#[test]
fn bad_input() {
    let layer = random::<f64>(3);
    let weights = || layer.weights().clone();
    let published = || PublishedWeights::clone(layer.published_weights());
    let config = || layer.config().clone();
    let refused = |config: AttentionConfig, published: PublishedWeights<f64>| {
        argument(&PublishedAttention::new(config, weights(), published).unwrap_err()).to_owned()
    };
    assert_eq!(
        refused(config().with_causality(Causality::Bidirectional), published()),
        "the published layer"
    );
    assert_eq!(refused(config().with_sliding_window(Some(8)), published()), "sliding_window");
    for (name, change) in [
        ("radii", (|w| w.radii.push(1.0)) as fn(&mut PublishedWeights<f64>)),
        ("radii", |w| w.radii[2] = f64::NAN),
        ("log_decay", |w| w.log_decay.clear()),
        ("log_decay", |w| w.log_decay[1] = 0.1),
        ("log_decay", |w| w.log_decay[1] = f64::NEG_INFINITY),
        ("gate", |w| w.gate = Array2::zeros((24, 23))),
        ("gate", |w| w.gate[[1, 1]] = f64::INFINITY),
        ("norm_scale", |w| w.norm_scale = Array1::zeros(1)),
        ("norm_shift", |w| w.norm_shift[0] = f64::NAN),
        ("groups", |w| w.groups = 0),
        ("groups", |w| w.groups = 5),
        ("epsilon", |w| w.epsilon = 0.0),
    ] {
        let mut weights = published();
        change(&mut weights);
        assert_eq!(refused(config(), weights), name);
    }
    let mut state = layer.new_state();
    layer.prefill(&mut state, &text(10), KeyMask::All).unwrap();
    let before = state.clone();
    let mut bad = text(10);
    bad[[3, 3]] = f64::NAN;
    assert_eq!(argument(&layer.prefill(&mut state, &bad, KeyMask::All).unwrap_err()), "x");
    assert_eq!(
        argument(&layer.prefill(&mut state, &text(10), KeyMask::Valid(&[true])).unwrap_err()),
        "mask"
    );
    assert!(layer.step(&mut state, &bad.row(3), &mut Array1::zeros(24)).is_err());
    assert!(state == before);
    assert!(matches!(self::layer::<f64>().forward(&bad, KeyMask::All), Err(Error::Shape { .. })));
    let missing = PublishedAttention::<f64>::from_tensors(
        &golden(),
        "gpt_neox.layers.0.attention.",
        config(),
    );
    assert!(matches!(missing, Err(Error::Format { .. })));
    assert!(matches!(
        PublishedAttention::<f64>::from_tensors(&golden(), "", AttentionConfig::new(32, 2)),
        Err(Error::Format { .. })
    ));
}
