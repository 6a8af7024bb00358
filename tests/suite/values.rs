//! What small public methods say of the values they are asked of, and the maps and caches that the
//! other tests do not take.

use dijiang::attention::{LinearConfig, Operator, Qkv, SoftmaxConfig, Window};
use dijiang::kernel::{DctGradients, DctMap, DctMapConfig, FavorConfig, FeatureMap, InputScales};
use dijiang::layer::{
    AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
};
use dijiang_testing::{Inputs, Random, assert_close, assert_same_bits};
use ndarray::{Array2, Array3, Axis, s};

fn inputs(seed: u64, h: usize, n: usize, d: usize) -> Inputs<f64> {
    let mut random = Random::new(seed);
    let mut heads = || random.normals((h, n, d), 1.0);
    Inputs { q: heads(), k: heads(), v: heads() }
}

#[test]
fn scales_and_sizes() {
    let map = DctMapConfig::new().build::<f64>(16).unwrap();
    let attention = LinearConfig::new().build(vec![map.clone()]).unwrap();
    assert_eq!(attention.scale(), 0.25);
    assert_eq!(LinearConfig::new().with_scale(0.5).build(vec![map]).unwrap().scale(), 0.5);
    let mut workspace = attention.workspace();
    let (bytes, of_steps) = (workspace.bytes(), attention.step_workspace().bytes());
    assert!(bytes > of_steps && of_steps > 2 * 8 * 16 * 16, "{bytes} and {of_steps}");
    for n in [100, 500] {
        let Inputs { q, k, v } = inputs(1, 1, n, 16);
        attention
            .prefill_into(
                &mut [&mut attention.new_state()],
                Qkv::new(&q, &k, &v),
                &mut q.clone(),
                &mut workspace,
            )
            .unwrap();
        assert_eq!(workspace.bytes(), bytes);
    }
}

#[test]
fn options_and_windows() {
    let map = DctMapConfig::new().with_scales(InputScales::Ones).with_blocks(3);
    let options = DijiangOptions::new().with_map(map);
    let matrix = |p: usize| {
        Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3)
    };
    let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights).unwrap();
    let layer = DijiangAttention::from_softmax(&softmax, options).unwrap();
    assert!(layer.maps().iter().all(|map| map.params().query.scale == [1.0; 12]));
    let windows = vec![Window::new(4, 1), Window::new(8, 1)];
    assert!(softmax.windows().is_empty());
    assert_eq!(softmax.with_windows(windows.clone(), 2).unwrap().windows(), windows);
}

#[test]
fn gradients_add_up() {
    let map = DctMapConfig::new().build::<f64>(4).unwrap();
    let Inputs { q, k, v } = inputs(2, 1, 20, 4);
    let attention = LinearConfig::new().build(vec![map.clone()]).unwrap();
    let once = attention.backward(Qkv::new(&q, &k, &v), &v).unwrap().maps.remove(0);
    let twice = attention.backward(Qkv::new(&q, &k, &v), &(&v * 2.0)).unwrap().maps.remove(0);
    let mut sum = DctGradients::zeros(map.params());
    sum.add(&once);
    sum.add(&once);
    assert!(sum == twice && sum != once);
}

/// FAVOR+ is a dense DCT map, in its gradients too.
#[test]
fn favor_maps_have_gradients() {
    let config = FavorConfig::new(5, 12);
    let (favor, dense) = (
        config.build::<f64>().unwrap(),
        DctMap::<f64>::from_params(config.params().unwrap()).unwrap(),
    );
    let Inputs { q, k, v } = inputs(3, 1, 90, 5);
    let favor = LinearConfig::new().build(vec![favor]).unwrap();
    let dense = LinearConfig::new().build(vec![dense]).unwrap();
    let [got, expected] = [
        favor.backward(Qkv::new(&q, &k, &v), &v).unwrap(),
        dense.backward(Qkv::new(&q, &k, &v), &v).unwrap(),
    ];
    assert_same_bits("q", &got.q, &expected.q);
    assert_same_bits("k", &got.k, &expected.k);
    assert_eq!(got.maps, expected.maps);
}

/// Heads too wide for a token's own matrix: tokens go through panels, with the same results.
#[test]
fn tokens_of_wide_heads() {
    let d = 256;
    let map = DctMapConfig::new().build::<f64>(d).unwrap();
    assert_eq!(map.features(), d);
    let attention = LinearConfig::new().build(vec![map]).unwrap();
    let Inputs { q, k, v } = inputs(4, 1, 21, d);
    let expected = attention.forward(Qkv::new(&q, &k, &v)).unwrap();
    let (mut state, mut workspace) = (attention.new_state(), attention.step_workspace());
    let mut out = Array3::zeros((1, 21, d));
    for i in 0..21 {
        let [q, k, v] = [&q, &k, &v].map(|x| x.index_axis(Axis(1), i));
        attention
            .step(
                &mut state,
                Qkv::token(&q, &k, &v),
                &mut out.index_axis_mut(Axis(1), i),
                &mut workspace,
            )
            .unwrap();
    }
    assert_close("steps", &out, &expected, 1e-11);
}

#[test]
fn packed_caches_are_those_of_each_sequence() {
    let exact = SoftmaxConfig::new(2, 4).build::<f64>().unwrap();
    let Inputs { q, k, v } = inputs(5, 2, 40, 4);
    let mut caches = [exact.new_state(), exact.new_state(), exact.new_state()];
    let offsets = [0, 13, 13, 40];
    let mut all: Vec<_> = caches.iter_mut().collect();
    let out = exact.prefill_packed(&mut all, Qkv::new(&q, &k, &v).with_offsets(&offsets)).unwrap();
    assert_same_bits(
        "all",
        &out,
        &exact.forward(Qkv::new(&q, &k, &v).with_offsets(&offsets)).unwrap(),
    );
    for (cache, own) in caches.iter().zip([0..13, 13..13, 13..40]) {
        let mut alone = exact.new_state();
        if !own.is_empty() {
            let [q, k, v] = [&q, &k, &v].map(|x| x.slice(s![.., own.clone(), ..]).to_owned());
            let expected = exact.prefill(&mut alone, Qkv::new(&q, &k, &v)).unwrap();
            assert_same_bits("own", &out.slice(s![.., own, ..]).to_owned(), &expected);
        }
        assert!(*cache == alone);
    }
}
