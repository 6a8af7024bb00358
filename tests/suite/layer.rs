//! The layers: against models run by `transformers`, against the reference, against each other, and
//! against bad input.

use std::ops::ControlFlow;
use std::sync::Arc;

use dijiang::attention::{KeyMask, Operator, Qkv, SoftmaxConfig, Window};
use dijiang::calibrate::{CalibrateOptions, CalibrateProgress};
use dijiang::kernel::{
    DctMap, DctMapConfig, Envelope, FeatureMap, Mixing, Pairing, Points, Radial, Sides,
};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    DijiangState, Rotary, RotaryPairing, RotaryScaling, SoftmaxAttention, SoftmaxState,
};
use dijiang::reference::{self, Pairs};
use dijiang::{Error, Real};
use dijiang_testing::{Random, argument, assert_close, assert_same_bits, cast};
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis, concatenate, s};

/// Random weights whose queries and keys come out with deviation about 1, biases included.
fn random_weights(config: &AttentionConfig, head_dim: usize, seed: u64) -> AttentionWeights<f64> {
    let mut random = Random::new(seed);
    let (model, width, kv_width) =
        (config.model_dim, config.heads * head_dim, config.kv_heads * head_dim);
    let scale = 1.0 / (model as f64).sqrt();
    let mut matrix = |rows, cols| random.normals((rows, cols), scale);
    let weights = AttentionWeights::new(
        matrix(width, model),
        matrix(kv_width, model),
        matrix(kv_width, model),
        matrix(model, width),
    );
    let mut bias = |len| random.normals(len, 0.5);
    weights.with_biases(bias(width), bias(kv_width), bias(kv_width), bias(model))
}

fn cast_weights<T: Real>(weights: &AttentionWeights<f64>) -> AttentionWeights<T> {
    let bias = |bias: &Option<Array1<f64>>| cast(bias.as_ref().unwrap());
    AttentionWeights::new(cast(&weights.q), cast(&weights.k), cast(&weights.v), cast(&weights.o))
        .with_biases(
            bias(&weights.q_bias),
            bias(&weights.k_bias),
            bias(&weights.v_bias),
            bias(&weights.o_bias),
        )
}

/// D = 24, six query heads of 6 on three key-value heads, four of six coordinates rotated.
fn grouped() -> AttentionConfig {
    AttentionConfig::new(24, 6)
        .with_kv_heads(3)
        .with_head_dim(6)
        .with_rotary(Rotary::new(500.0).with_dims(4))
}

fn softmax(config: AttentionConfig, seed: u64) -> SoftmaxAttention<f64> {
    let head_dim = config.head_dim.unwrap_or(config.model_dim / config.heads);
    let weights = random_weights(&config, head_dim, seed);
    SoftmaxAttention::new(config, weights).unwrap()
}

fn linear(config: AttentionConfig, options: DijiangOptions, seed: u64) -> DijiangAttention<f64> {
    DijiangAttention::from_softmax(&softmax(config, seed), options).unwrap()
}

/// Everything at once: local window, decay, antithetic blocks.
fn rich() -> DijiangOptions {
    DijiangOptions::new()
        .with_window(Window::new(8, 1))
        .with_log_decay(-0.01)
        .with_map(DctMapConfig::new().with_blocks(2).with_pairing(Pairing::Antithetic))
}

fn hidden(n: usize, config: &AttentionConfig, seed: u64) -> Array2<f64> {
    Random::new(seed).normals((n, config.model_dim), 1.0)
}

/// The output of `layer` fed with pieces of these lengths, then token by token.
fn streamed<T: Real, A: Attention<T>>(layer: &A, x: &Array2<T>, pieces: &[usize]) -> Array2<T> {
    let (mut state, mut start, mut out) = (layer.new_state(), 0, Array2::zeros(x.raw_dim()));
    for &len in pieces {
        let y =
            layer.prefill(&mut state, &x.slice(s![start..start + len, ..]), KeyMask::All).unwrap();
        out.slice_mut(s![start..start + len, ..]).assign(&y);
        start += len;
    }
    for i in start..x.nrows() {
        layer.step(&mut state, &x.row(i), &mut out.row_mut(i)).unwrap();
    }
    out
}

/// x Wᵀ + b, every head rotated at its position.
fn projected(
    x: &Array2<f64>,
    weight: &Array2<f64>,
    bias: &Option<Array1<f64>>,
    heads: usize,
    rotary: Option<&Rotary>,
) -> Vec<Array2<f64>> {
    let rows = x.dot(&weight.t()) + bias.as_ref().unwrap();
    let d = rows.ncols() / heads;
    let mut heads: Vec<_> =
        (0..heads).map(|h| rows.slice(s![.., h * d..(h + 1) * d]).to_owned()).collect();
    if let Some(rotary) = rotary {
        let r = rotary.dims.unwrap_or(d);
        for head in &mut heads {
            for p in 0..x.nrows() {
                for i in 0..r / 2 {
                    let (a, b) = if rotary.pairing == RotaryPairing::Halves {
                        (i, i + r / 2)
                    } else {
                        (2 * i, 2 * i + 1)
                    };
                    let (sin, cos) =
                        (p as f64 * rotary.base.powf(-2.0 * i as f64 / r as f64)).sin_cos();
                    (head[[p, a]], head[[p, b]]) = (
                        head[[p, a]] * cos - head[[p, b]] * sin,
                        head[[p, b]] * cos + head[[p, a]] * sin,
                    );
                }
            }
        }
    }
    heads
}

/// A whole layer by the formulas; softmax without maps.
fn oracle(
    x: &Array2<f64>,
    config: &AttentionConfig,
    weights: &AttentionWeights<f64>,
    maps: Option<&[DctMap<f64>]>,
    pairs: &Pairs<'_>,
) -> Array2<f64> {
    let root = config.scale.unwrap().sqrt();
    let rotary = config.rotary.as_ref();
    let q = projected(x, &weights.q, &weights.q_bias, config.heads, rotary);
    let k = projected(x, &weights.k, &weights.k_bias, config.kv_heads, rotary);
    let v = projected(x, &weights.v, &weights.v_bias, config.kv_heads, None);
    let heads: Vec<_> = (0..config.heads)
        .map(|h| {
            let kv = h * config.kv_heads / config.heads;
            let (x, y) = (&q[h] * root, &k[kv] * root);
            let scores = reference::scores(&x, &y).unwrap();
            match maps {
                None => reference::softmax_attention(&scores, &v[kv], pairs).unwrap(),
                Some(maps) => {
                    let (a, b) = (
                        maps[kv].query_log_features(&x).unwrap(),
                        maps[kv].key_log_features(&y).unwrap(),
                    );
                    reference::linear_attention(
                        &scores,
                        &reference::log_kernel(&a, &b).unwrap(),
                        &v[kv],
                        pairs,
                    )
                    .unwrap()
                }
            }
        })
        .collect();
    let views: Vec<_> = heads.iter().map(|head| head.view()).collect();
    concatenate(Axis(1), &views).unwrap().dot(&weights.o.t()) + weights.o_bias.as_ref().unwrap()
}

#[test]
fn both_layers_are_their_formulas() {
    let interleaved = Rotary::new(100.0).with_pairing(RotaryPairing::Interleaved);
    let configs = [
        grouped(),
        AttentionConfig::new(24, 6).with_kv_heads(3).with_rotary(interleaved).with_scale(0.9),
        AttentionConfig::new(10, 2).with_kv_heads(1),
    ];
    for (i, config) in configs.into_iter().enumerate() {
        for n in [1, 5, 70, 131] {
            let (x, valid) =
                (hidden(n, &config, 7), (0..n).map(|i| i % 5 != 2).collect::<Vec<_>>());
            let layer = softmax(config.clone(), 3);
            let check = |what: &str, y: Array2<f64>, expected: Array2<f64>| {
                assert_close((what, i, n), &y, &expected, 1e-12)
            };
            let expected = |maps, pairs: Pairs<'_>| {
                oracle(&x, layer.config(), layer.weights(), maps, &pairs.with_valid(&valid))
            };
            let mask = KeyMask::Valid(&valid);
            check("softmax", layer.forward(&x, mask).unwrap(), expected(None, Pairs::causal()));

            let window = layer.clone().with_windows(vec![Window::new(8, 1)], 0).unwrap();
            check(
                "window only",
                window.forward(&x, mask).unwrap(),
                expected(None, Pairs::causal().with_window(8, 1)),
            );

            let linear = DijiangAttention::from_softmax(&layer, rich()).unwrap();
            let pairs =
                Pairs::causal().with_window(8, 1).with_sinks(linear.sinks()).with_log_decay(-0.01);
            check(
                "linear",
                linear.forward(&x, mask).unwrap(),
                expected(Some(linear.maps()), pairs),
            );

            let pure = linear
                .clone()
                .with_windows(Vec::new(), 0)
                .unwrap()
                .with_log_decay(vec![-0.02; layer.config().kv_heads])
                .unwrap();
            check(
                "pure",
                pure.forward(&x, mask).unwrap(),
                expected(Some(pure.maps()), Pairs::causal().with_log_decay(-0.02)),
            );

            let layer = softmax(config.clone().with_causality(Causality::Bidirectional), 3);
            check("full softmax", layer.forward(&x, mask).unwrap(), expected(None, Pairs::full()));
            let linear = DijiangAttention::from_softmax(
                &layer,
                DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(2)),
            )
            .unwrap();
            assert!(linear.windows().is_empty());
            check(
                "full linear",
                linear.forward(&x, mask).unwrap(),
                expected(Some(linear.maps()), Pairs::full()),
            );
        }
    }
}

#[test]
fn projected_heads_are_what_attention_is_computed_from() {
    let (config, layer) = (grouped(), softmax(grouped(), 3));
    let (x, weights) = (hidden(70, &config, 7), layer.weights());
    let [q, k, v] = layer.project_at(&x, 0).unwrap();
    let rotary = config.rotary.as_ref();
    for (what, heads, weight, bias, count, rotary) in [
        ("q", &q, &weights.q, &weights.q_bias, 6, rotary),
        ("k", &k, &weights.k, &weights.k_bias, 3, rotary),
        ("v", &v, &weights.v, &weights.v_bias, 3, None),
    ] {
        assert_eq!(heads.dim(), (count, 70, 6), "{what}");
        let expected = projected(&x, weight, bias, count, rotary);
        heads
            .outer_iter()
            .zip(&expected)
            .for_each(|(head, expected)| assert_close(what, &head.to_owned(), expected, 1e-12));
    }

    let exact = SoftmaxConfig::new(6, 6).with_kv_heads(3).build().unwrap();
    let heads = exact.forward(Qkv::new(&q, &k, &v)).unwrap();
    let views: Vec<_> = heads.outer_iter().collect();
    let y = concatenate(Axis(1), &views).unwrap().dot(&weights.o.t())
        + weights.o_bias.as_ref().unwrap();
    assert_close("outputs", &y, &layer.forward(&x, KeyMask::All).unwrap(), 1e-12);

    assert_eq!(
        layer.project_at(&x.slice(s![.., ..23]), 0).unwrap_err(),
        Error::Shape { argument: "x", axis: 1, expected: 24, got: 23 }
    );
    assert_eq!(
        layer.project_at(&x.slice(s![..0, ..]), 0).unwrap_err(),
        Error::Empty { argument: "x" }
    );
    let huge = x.mapv(|v| v.signum() * 9e99);
    assert!(matches!(
        layer.project_at(&huge, 0),
        Err(Error::NonFinite { argument: "q" | "k" | "v", .. })
    ));
}

/// With norms of queries and keys and a sliding window of 9 tokens.
fn normed() -> SoftmaxAttention<f64> {
    let (plain, mut random) = (softmax(grouped(), 3), Random::new(19));
    let mut norm = || random.normals(6, 0.4) + 1.0;
    let weights = AttentionWeights::clone(plain.weights()).with_qk_norms(norm(), norm());
    let config = grouped().with_qk_norm(0.01).with_sliding_window(Some(9));
    SoftmaxAttention::new(config, weights).unwrap()
}

#[test]
fn norms_and_sliding_windows() {
    let layer = normed();
    let (x, weights) = (hidden(70, layer.config(), 7), layer.weights());
    let [q, k, v] = layer.project_at(&x, 0).unwrap();
    for (what, heads, weight, bias, norm) in [
        ("q", &q, &weights.q, &weights.q_bias, &weights.q_norm),
        ("k", &k, &weights.k, &weights.k_bias, &weights.k_norm),
    ] {
        let norm = norm.as_ref().unwrap();
        // The norm of a head is a linear map of its own for every row, and so can be taken to the
        // weights of that row.
        for (h, head) in heads.outer_iter().enumerate() {
            for (p, row) in head.outer_iter().enumerate() {
                let own = s![h * 6..(h + 1) * 6, ..];
                let bias = bias.as_ref().unwrap().slice(s![h * 6..(h + 1) * 6]);
                let raw = weight.slice(own).dot(&x.row(p)) + bias;
                let root = (raw.dot(&raw) / 6.0 + 0.01).sqrt();
                let normed = &raw / root * norm;
                for i in 0..2 {
                    let angle = p as f64 * 500f64.powf(-2.0 * i as f64 / 4.0);
                    let (sin, cos) = angle.sin_cos();
                    let (a, b) = (normed[i], normed[i + 2]);
                    let difference = (row[i] - (a * cos - b * sin)).abs()
                        + (row[i + 2] - (b * cos + a * sin)).abs()
                        + (row[i + 4] - normed[i + 4]).abs();
                    assert!(difference < 1e-12, "{what} of head {h} at {p}: {difference}");
                }
            }
        }
    }
    // Keys of the last 9 tokens.
    let heads: Vec<_> = (0..6)
        .map(|h| {
            let root = layer.config().scale.unwrap().sqrt();
            let of = |heads: &Array3<f64>, h: usize| heads.index_axis(Axis(0), h).to_owned() * root;
            let scores = reference::scores(&of(&q, h), &of(&k, h / 2)).unwrap();
            let v = v.index_axis(Axis(0), h / 2).to_owned();
            let seen = |i: usize, j: usize| j <= i && i < j + 9;
            let e = Array2::from_shape_fn(scores.dim(), |(i, j)| {
                if seen(i, j) { scores[[i, j]].exp() } else { 0.0 }
            });
            let totals = e.sum_axis(Axis(1)).insert_axis(Axis(1));
            e.dot(&v) / totals
        })
        .collect();
    let views: Vec<_> = heads.iter().map(|head| head.view()).collect();
    let expected = concatenate(Axis(1), &views).unwrap().dot(&weights.o.t())
        + weights.o_bias.as_ref().unwrap();
    assert_close("outputs", &layer.forward(&x, KeyMask::All).unwrap(), &expected, 1e-12);
    streams_like_forward("normed", &layer);
    batches_are_sequences(&layer);

    // A linear layer has the norms, and no sliding window.
    let conflict = |argument, other| Error::Conflict { argument, other };
    let error = DijiangAttention::from_softmax(&layer, rich()).map(|_| ()).unwrap_err();
    assert_eq!(error, conflict("sliding_window", "linear attention"));
    let error = layer.clone().with_windows(vec![Window::new(8, 1)], 0).map(|_| ()).unwrap_err();
    assert_eq!(error, conflict("windows", "a sliding window"));
    let config = layer.config().clone();
    assert_eq!(
        config.clone().with_causality(Causality::Bidirectional).check().unwrap_err(),
        conflict("sliding_window", "bidirectional attention")
    );
    let whole =
        SoftmaxAttention::new(config.with_sliding_window(None), layer.weights().clone()).unwrap();
    let linear = DijiangAttention::from_softmax(&whole, DijiangOptions::new()).unwrap();
    let (near, far) = (hidden(60, linear.config(), 8), hidden(150, linear.config(), 8));
    let softmax = whole.forward(&near, KeyMask::All).unwrap();
    assert_close(
        "within the window",
        &linear.forward(&near, KeyMask::All).unwrap(),
        &softmax,
        1e-12,
    );
    streams_like_forward("normed, linear", &linear);
    let mut states = [linear.new_state(), linear.new_state()];
    let mut out = Array2::zeros((2, 24));
    let [first, second] = &mut states;
    linear.step_batch(&mut [first, second], &far.slice(s![..2, ..]), &mut out).unwrap();
    for i in 0..2 {
        let mut alone = Array1::zeros(24);
        linear.step(&mut linear.new_state(), &far.row(i), &mut alone).unwrap();
        assert_same_bits("a batched step", &out.row(i), &alone);
    }
}

#[test]
fn single_precision_follows_double() {
    let (config, layer) = (grouped(), softmax(grouped(), 3));
    let x = hidden(131, &config, 5);
    let single = SoftmaxAttention::<f32>::new(config, cast_weights(layer.weights())).unwrap();
    assert_close(
        "softmax",
        &single.forward(&cast(&x), KeyMask::All).unwrap(),
        &layer.forward(&x, KeyMask::All).unwrap(),
        1e-5,
    );
    let (linear, expected) = (
        DijiangAttention::from_softmax(&single, rich()),
        DijiangAttention::from_softmax(&layer, rich()),
    );
    let (linear, expected) =
        (linear.unwrap(), expected.unwrap().forward(&x, KeyMask::All).unwrap());
    assert_close("linear", &linear.forward(&cast(&x), KeyMask::All).unwrap(), &expected, 1e-4);
    assert_close("linear, streamed", &streamed(&linear, &cast(&x), &[70, 3]), &expected, 1e-4);
}

fn streams_like_forward<A: Attention<f64>>(context: &str, layer: &A) {
    let x = hidden(150, layer.config(), 11);
    let expected = layer.forward(&x, KeyMask::All).unwrap();
    for pieces in [&[150][..], &[], &[1, 1, 62], &[64, 64], &[7, 13, 40, 90], &[149]] {
        assert_close((context, pieces), &streamed(layer, &x, pieces), &expected, 1e-12);
    }
    // Rows that lie elsewhere in memory are the same rows.
    let columns = x.t().as_standard_layout().into_owned();
    assert_same_bits(context, &layer.forward(&columns.t(), KeyMask::All).unwrap(), &expected);
    let (mut state, mut a, mut b) =
        (layer.new_state(), Array1::zeros(x.ncols()), Array2::zeros((x.ncols(), 2)));
    layer.step(&mut state, &x.row(0), &mut a).unwrap();
    layer.step(&mut layer.new_state(), &columns.column(0), &mut b.column_mut(1)).unwrap();
    assert_same_bits(context, &b.column(1), &a);
}

#[test]
fn prefill_in_pieces_and_steps_are_forward() {
    let interleaved =
        grouped().with_rotary(Rotary::new(100.0).with_pairing(RotaryPairing::Interleaved));
    for config in [grouped(), interleaved, AttentionConfig::new(10, 2)] {
        streams_like_forward("softmax", &softmax(config.clone(), 1));
        streams_like_forward(
            "window only",
            &softmax(config.clone(), 1).with_windows(vec![Window::new(8, 1)], 0).unwrap(),
        );
        streams_like_forward("linear", &linear(config.clone(), rich(), 1));
        streams_like_forward(
            "pure",
            &linear(config.clone(), DijiangOptions::new().with_window(None), 1),
        );
        streams_like_forward("default", &linear(config.clone(), DijiangOptions::new(), 1));
    }
}

fn later_tokens_do_not_matter<A: Attention<f64>>(context: &str, layer: &A) {
    let x = hidden(150, layer.config(), 13);
    let whole = layer.forward(&x, KeyMask::All).unwrap();
    for n in [1, 2, 63, 64, 65, 130] {
        let mut changed = x.clone();
        changed.slice_mut(s![n.., ..]).mapv_inplace(|v| 5.0 - 3.0 * v);
        let prefix = s![..n, ..];
        assert_same_bits(
            (context, n),
            &layer.forward(&changed, KeyMask::All).unwrap().slice(prefix),
            &whole.slice(prefix),
        );
        assert_same_bits(
            (context, n),
            &layer.forward(&x.slice(prefix), KeyMask::All).unwrap(),
            &whole.slice(prefix),
        );
    }
}

#[test]
fn later_tokens_change_no_bit() {
    later_tokens_do_not_matter("softmax", &softmax(grouped(), 1));
    later_tokens_do_not_matter("linear", &linear(grouped(), rich(), 1));
    later_tokens_do_not_matter(
        "pure",
        &linear(grouped(), DijiangOptions::new().with_window(None), 1),
    );
}

fn clones_and_resets<A: Attention<f64>>(layer: &A, reset: impl Fn(&mut A::State)) {
    let x = hidden(40, layer.config(), 17);
    let (mut state, rest) = (layer.new_state(), x.slice(s![20.., ..]));
    let first = layer.prefill(&mut state, &x.slice(s![..20, ..]), KeyMask::All).unwrap();
    let mut snapshot = state.clone();
    let expected = layer.prefill(&mut state, &rest, KeyMask::All).unwrap();
    assert_same_bits(
        "snapshot",
        &layer.prefill(&mut snapshot, &rest, KeyMask::All).unwrap(),
        &expected,
    );
    reset(&mut state);
    assert_same_bits(
        "reset",
        &layer.prefill(&mut state, &x.slice(s![..20, ..]), KeyMask::All).unwrap(),
        &first,
    );
}

#[test]
fn a_clone_is_a_snapshot_and_reset_forgets() {
    clones_and_resets(&softmax(grouped(), 1), SoftmaxState::reset);
    clones_and_resets(&linear(grouped(), rich(), 1), DijiangState::reset);
}

#[test]
fn state_size_is_constant_for_linear_and_grows_for_softmax() {
    let (exact, linear) = (softmax(grouped(), 1), linear(grouped(), rich(), 1));
    let (mut cache, mut state) = (exact.new_state(), linear.new_state());
    let x = hidden(200, exact.config(), 19);
    let mut sizes = Vec::new();
    for _ in 0..3 {
        exact.prefill(&mut cache, &x, KeyMask::All).unwrap();
        linear.prefill(&mut state, &x, KeyMask::All).unwrap();
        sizes.push((cache.bytes(), state.bytes()));
    }
    assert_eq!((cache.position(), state.position()), (600, 600));
    assert!(sizes[0].0 < sizes[1].0 && sizes[1].0 < sizes[2].0, "{sizes:?}");
    assert!(sizes[0].0 >= 200 * 2 * 3 * 6 * 8, "{sizes:?}");
    assert!(sizes.iter().all(|size| size.1 == sizes[0].1 && size.1 > 0), "{sizes:?}");
}

fn batches_are_sequences<A: Attention<f64>>(layer: &A) {
    let x: Array3<f64> = Random::new(23).normals((5, 70, layer.config().model_dim), 1.0);
    let masks = Array2::from_shape_fn((5, 70), |(b, i)| (b + 3) * i % 7 != 1);
    let (plain, masked) =
        (layer.forward_batch(&x, None).unwrap(), layer.forward_batch(&x, Some(&masks)).unwrap());
    let (columns, strided) = (
        masks.t().as_standard_layout().into_owned(),
        layer.forward_batch(&x, Some(&masks.t().t())).unwrap(),
    );
    assert_same_bits(
        "mask layout",
        &layer.forward_batch(&x, Some(&columns.t())).unwrap(),
        &strided,
    );
    for (b, x) in x.outer_iter().enumerate() {
        assert_same_bits(
            b,
            &plain.index_axis(Axis(0), b),
            &layer.forward(&x, KeyMask::All).unwrap(),
        );
        let mask = masks.row(b).to_vec();
        assert_same_bits(
            b,
            &masked.index_axis(Axis(0), b),
            &layer.forward(&x, KeyMask::Valid(&mask)).unwrap(),
        );
    }
    assert_ne!(plain, masked);
}

#[test]
fn a_batch_is_each_sequence_alone() {
    batches_are_sequences(&softmax(grouped(), 1));
    batches_are_sequences(&linear(grouped(), rich(), 1));
    let encoder = grouped().with_causality(Causality::Bidirectional);
    batches_are_sequences(&softmax(encoder.clone(), 1));
    batches_are_sequences(&linear(encoder, DijiangOptions::new(), 1));
}

#[cfg(feature = "rayon")]
#[test]
fn threads_change_no_bit() {
    let (exact, linear) = (softmax(grouped(), 1), linear(grouped(), rich(), 1));
    let x: Array3<f64> = Random::new(29).normals((3, 300, 24), 1.0);
    let run = |threads| {
        dijiang_testing::on_threads(threads, || {
            let (mut linear, samples) =
                (linear.clone(), [x.index_axis(Axis(0), 0), x.index_axis(Axis(0), 1)]);
            let batches =
                [exact.forward_batch(&x, None).unwrap(), linear.forward_batch(&x, None).unwrap()];
            let report = linear
                .calibrate(&samples, &CalibrateOptions::new(), |_| ControlFlow::Continue(()))
                .unwrap();
            (batches, report, linear.forward(&x.index_axis(Axis(0), 2), KeyMask::All).unwrap())
        })
    };
    let (expected, expected_report, expected_after) = run(1);
    for threads in [2, 3, 8] {
        let (batches, report, after) = run(threads);
        assert_same_bits(threads, &batches[0], &expected[0]);
        assert_same_bits(threads, &batches[1], &expected[1]);
        assert_same_bits(threads, &after, &expected_after);
        assert_eq!(report, expected_report);
    }
}

#[test]
fn a_masked_token_is_never_attended_to() {
    let (exact, linear) = (softmax(grouped(), 1), linear(grouped(), rich(), 1));
    let mut x = hidden(60, exact.config(), 31);
    let valid: Vec<bool> = (0..60).map(|i| i % 4 != 1).collect();
    let run = |x: &Array2<f64>| {
        [
            exact.forward(x, KeyMask::Valid(&valid)).unwrap(),
            linear.forward(x, KeyMask::Valid(&valid)).unwrap(),
        ]
    };
    let before = run(&x);
    (0..60).filter(|i| !valid[*i]).for_each(|i| x.row_mut(i).fill(9.0));
    for (before, after) in before.iter().zip(run(&x)) {
        for i in (0..60).filter(|i| valid[*i]) {
            assert_same_bits(i, &after.row(i), &before.row(i));
        }
    }
}

#[test]
fn a_window_part_over_everything_is_softmax() {
    for config in [grouped(), AttentionConfig::new(10, 2)] {
        let exact = softmax(config.clone(), 1);
        let linear = DijiangAttention::from_softmax(
            &exact,
            DijiangOptions::new().with_window(Window::new(50, 2)),
        )
        .unwrap();
        let x = hidden(150, exact.config(), 37);
        assert_close(
            "window",
            &linear.forward(&x, KeyMask::All).unwrap(),
            &exact.forward(&x, KeyMask::All).unwrap(),
            1e-12,
        );
        let y = streamed(&linear, &hidden(151, exact.config(), 37), &[]);
        let exact = exact.forward(&hidden(151, exact.config(), 37), KeyMask::All).unwrap();
        assert_close("covered", &y.slice(s![..150, ..]), &exact.slice(s![..150, ..]), 1e-12);
        let difference = (&y.row(150) - &exact.row(150)).mapv(f64::abs).sum();
        assert!(difference > 1e-6, "token 150 looks beyond the local window");
    }
}

#[test]
fn grouped_queries_are_repeated_key_value_heads() {
    let (few, config) = (softmax(grouped(), 1), grouped().with_kv_heads(6));
    let repeat = |rows: &Array2<f64>| {
        let heads: Vec<ArrayView2<'_, f64>> =
            (0..6).map(|h| rows.slice(s![h / 2 * 6..(h / 2 + 1) * 6, ..])).collect();
        concatenate(Axis(0), &heads).unwrap()
    };
    let repeat_bias = |bias: &Option<Array1<f64>>| {
        repeat(&bias.clone().unwrap().insert_axis(Axis(1))).remove_axis(Axis(1))
    };
    let w = few.weights();
    let weights = AttentionWeights::new(w.q.clone(), repeat(&w.k), repeat(&w.v), w.o.clone())
        .with_biases(
            w.q_bias.clone().unwrap(),
            repeat_bias(&w.k_bias),
            repeat_bias(&w.v_bias),
            w.o_bias.clone().unwrap(),
        );
    let many = SoftmaxAttention::new(config, weights).unwrap();
    let x = hidden(90, few.config(), 41);
    let expected = many.forward(&x, KeyMask::All).unwrap();
    assert_close("softmax", &few.forward(&x, KeyMask::All).unwrap(), &expected, 1e-12);

    let few = DijiangAttention::from_softmax(&few, rich()).unwrap();
    let maps = (0..6).map(|h| few.maps()[h / 2].clone()).collect();
    let many = DijiangAttention::from_softmax(&many, rich()).unwrap().with_maps(maps).unwrap();
    let expected = many.forward(&x, KeyMask::All).unwrap();
    assert_close("linear", &few.forward(&x, KeyMask::All).unwrap(), &expected, 1e-12);
    assert_close("linear, streamed", &streamed(&few, &x, &[33]), &expected, 1e-12);
}

/// Attention depends on distances only: tokens after a masked stretch attend as they would at the
/// start.
#[test]
fn rotary_angles_are_relative() {
    for pairing in [RotaryPairing::Halves, RotaryPairing::Interleaved] {
        let layer = softmax(grouped().with_rotary(Rotary::new(50.0).with_pairing(pairing)), 1);
        let x = hidden(30, layer.config(), 43);
        let expected = layer.forward(&x, KeyMask::All).unwrap();
        for shift in [1, 63, 64, 1000] {
            let mut state = layer.new_state();
            layer
                .prefill(
                    &mut state,
                    &hidden(shift, layer.config(), 47),
                    KeyMask::Valid(&vec![false; shift]),
                )
                .unwrap();
            assert_close(
                (pairing, shift),
                &layer.prefill(&mut state, &x, KeyMask::All).unwrap(),
                &expected,
                1e-11,
            );
        }
    }
}

/// A prefill in parts and steps beyond the hold, for both layers; a sequence that ends before it is
/// as it would be without.
#[test]
fn held_positions() {
    let rotary = || Rotary::new(500.0).with_dims(4);
    let held = |hold| grouped().with_rotary(rotary().with_hold(hold));
    let (softmax, linear) = (softmax(held(20), 1), linear(held(20), rich(), 1));
    let x = hidden(90, softmax.config(), 43);
    let expected = softmax.forward(&x, KeyMask::All).unwrap();
    assert_close("softmax", &streamed(&softmax, &x, &[33, 27]), &expected, 1e-12);
    let outputs = linear.forward(&x, KeyMask::All).unwrap();
    assert_close("linear", &streamed(&linear, &x, &[33, 27]), &outputs, 1e-12);

    let plain = softmax.clone().with_rotary_hold(None).unwrap();
    let difference = &plain.forward(&x, KeyMask::All).unwrap() - &expected;
    assert!(difference.slice(s![..21, ..]).iter().all(|&d| d == 0.0), "up to the hold");
    assert!(difference.slice(s![21.., ..]).iter().any(|d| d.abs() > 1e-3), "beyond it");
    let again = plain.with_rotary_hold(20).unwrap();
    assert_eq!(again.forward(&x, KeyMask::All).unwrap(), expected);
    assert_eq!(again.config(), softmax.config());
    let error = softmax.with_rotary_hold(0).unwrap_err();
    assert_eq!(error, Error::Value { argument: "rotary.hold", expected: "at least 1", got: 0.0 });
}

/// Interleaved pairs are halves with the rows of q and k in another order.
#[test]
fn pairings_are_permutations_of_each_other() {
    let rotary = Rotary::new(50.0).with_dims(4);
    let halves = softmax(grouped().with_rotary(rotary.clone()), 1);
    // Coordinate c of an interleaved head is coordinate order[c] of a halved one.
    let order = [0, 2, 1, 3, 4, 5];
    let permute = |rows: &Array2<f64>| {
        Array2::from_shape_fn(rows.raw_dim(), |(i, j)| rows[[i / 6 * 6 + order[i % 6], j]])
    };
    let permute_bias = |bias: &Option<Array1<f64>>| {
        permute(&bias.clone().unwrap().insert_axis(Axis(1))).remove_axis(Axis(1))
    };
    let w = halves.weights();
    let weights = AttentionWeights::new(permute(&w.q), permute(&w.k), w.v.clone(), w.o.clone())
        .with_biases(
            permute_bias(&w.q_bias),
            permute_bias(&w.k_bias),
            w.v_bias.clone().unwrap(),
            w.o_bias.clone().unwrap(),
        );
    let config = grouped().with_rotary(rotary.with_pairing(RotaryPairing::Interleaved));
    let interleaved = SoftmaxAttention::new(config, weights).unwrap();
    let x = hidden(50, halves.config(), 53);
    let expected = halves.forward(&x, KeyMask::All).unwrap();
    assert_close("interleaved", &interleaved.forward(&x, KeyMask::All).unwrap(), &expected, 1e-12);
}

#[test]
fn weights_are_shared_and_their_layout_does_not_matter() {
    let layer = softmax(grouped(), 1);
    let linear = DijiangAttention::from_softmax(&layer, DijiangOptions::new()).unwrap();
    assert!(Arc::ptr_eq(layer.weights(), linear.weights()));
    let again = SoftmaxAttention::new(grouped(), Arc::clone(layer.weights())).unwrap();
    assert!(Arc::ptr_eq(layer.weights(), again.weights()));

    let mut turned = AttentionWeights::clone(layer.weights());
    let turn = |matrix: &Array2<f64>| matrix.t().as_standard_layout().into_owned().reversed_axes();
    (turned.q, turned.k, turned.v, turned.o) =
        (turn(&turned.q), turn(&turned.k), turn(&turned.v), turn(&turned.o));
    assert!(!turned.q.is_standard_layout());
    let turned = SoftmaxAttention::new(grouped(), turned).unwrap();
    let x = hidden(20, layer.config(), 59);
    assert_same_bits(
        "forward",
        &turned.forward(&x, KeyMask::All).unwrap(),
        &layer.forward(&x, KeyMask::All).unwrap(),
    );
    assert_same_bits("streamed", &streamed(&turned, &x, &[]), &streamed(&layer, &x, &[]));
}

#[test]
fn options_reach_the_maps() {
    let options = DijiangOptions::new().with_map(
        DctMapConfig::new()
            .with_blocks(3)
            .with_pairing(Pairing::Antithetic)
            .with_envelope(Envelope::Gaussian)
            .with_radial(Radial::Chi)
            .with_points(Points::Random)
            .with_mixing(Mixing::Mixed)
            .with_sides(Sides::Tied)
            .with_seed(5),
    );
    let layer = linear(grouped(), options.clone(), 1);
    assert_eq!(layer.maps().len(), 3);
    for map in layer.maps() {
        let params = map.params();
        assert_eq!((params.dim(), params.features(), params.blocks()), (6, 36, 3));
        assert_eq!(
            (params.pairing, params.envelope, params.sides),
            (Pairing::Antithetic, Envelope::Gaussian, Sides::Tied)
        );
        assert!(matches!(params.projection, dijiang::kernel::Projection::Mixed { .. }));
    }
    let radii = |layer: &DijiangAttention<f64>, head: usize| {
        layer.maps()[head].params().query.radii.clone()
    };
    assert_ne!(radii(&layer, 0), radii(&layer, 1), "every head has its own points");
    assert_eq!(
        radii(&layer, 1),
        radii(&linear(grouped(), options.clone(), 2), 1),
        "same seed, same maps"
    );
    assert_ne!(
        radii(&layer, 1),
        radii(&linear(grouped(), options.clone().with_map(options.map.with_seed(6)), 1), 1)
    );
}

/// A layer whose queries and keys lie far from zero, as those of trained models do.
fn off_centre(causality: Causality) -> SoftmaxAttention<f64> {
    let config = AttentionConfig::new(32, 4).with_kv_heads(2).with_causality(causality);
    let mut weights = random_weights(&config, 8, 61);
    weights.q_bias = Some(Random::new(67).normals(32, 1.5));
    weights.k_bias = Some(Random::new(71).normals(16, 1.5));
    SoftmaxAttention::new(config, weights).unwrap()
}

/// Correlated tokens: a random walk that forgets.
fn correlated(n: usize, seed: u64) -> Array2<f64> {
    let mut x: Array2<f64> = Random::new(seed).normals((n, 32), 0.6);
    for i in 1..n {
        let previous = x.row(i - 1).mapv(|v| 0.8 * v);
        x.row_mut(i).zip_mut_with(&previous, |v, p| *v += p);
    }
    x
}

fn distance<A: Attention<f64>, B: Attention<f64>>(a: &A, b: &B, x: &Array2<f64>) -> f64 {
    (a.forward(x, KeyMask::All).unwrap() - b.forward(x, KeyMask::All).unwrap())
        .mapv(|d| d * d)
        .sum()
}

#[test]
fn calibration_brings_the_layers_together() {
    let cases = [
        (Causality::Causal, Some(Window::new(16, 1)), 0.7),
        (Causality::Causal, Some(Window::new(16, 0)), 0.8),
        (Causality::Causal, None, 0.85),
        (Causality::Bidirectional, None, 0.85),
    ];
    for (causality, window, gain) in cases {
        let exact = off_centre(causality);
        let mut layer = DijiangAttention::from_softmax(
            &exact,
            DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(2)).with_window(window),
        )
        .unwrap();
        let (samples, unseen) = ([correlated(200, 1), correlated(150, 2)], correlated(200, 3));
        let before = distance(&exact, &layer, &unseen);
        let mut told: Vec<CalibrateProgress> = Vec::new();
        let views = samples.each_ref().map(|sample| sample.view());
        let report = layer.calibrate(&views, &CalibrateOptions::new().with_steps(0), |progress| {
            told.push(progress);
            ControlFlow::Continue(())
        });
        let report = report.unwrap();
        assert_eq!(report.heads.len(), 2);
        assert!(report.heads.iter().all(|head| head.after <= head.before), "{report:?}");
        assert!(report.after() < gain * report.before(), "{causality:?} {window:?}: {report:?}");
        let after = distance(&exact, &layer, &unseen);
        assert!(
            after < (gain + 0.1) * before,
            "{causality:?} {window:?}: unseen text: {after} against {before}"
        );

        assert!(
            told.iter()
                .enumerate()
                .all(|(i, progress)| progress.done == i + 1 && progress.total == told.len())
        );
        assert!(told.windows(2).all(|pair| pair[1].error <= pair[0].error));
        assert_eq!((told[0].error, told[told.len() - 1].error), (report.before(), report.after()));
        assert_eq!(told.len(), if window.is_some() { 1 + 6 + 1 } else { 2 });

        // A second time starts where the first ended, and loses nothing.
        let again =
            layer
                .calibrate(&views, &CalibrateOptions::new().with_steps(0), |_| {
                    ControlFlow::Continue(())
                })
                .unwrap();
        assert_eq!(again.before(), report.after());
        assert!(
            again.after() <= report.after()
                && (window.is_some() || again.after() == report.after())
        );
    }
}

/// The report is the error by its definition, and the centres are the means.
#[test]
fn calibration_reports_what_it_says() {
    let exact = off_centre(Causality::Causal);
    let mut layer = DijiangAttention::from_softmax(
        &exact,
        DijiangOptions::new().with_window(Window::new(16, 1)),
    )
    .unwrap();
    let samples = [correlated(60, 1), correlated(90, 2)];
    let views = samples.each_ref().map(|sample| sample.view());
    let config = exact.config().clone();
    // Without an output projection a layer's output is its heads' outputs.
    let headless = |maps: Option<Vec<DctMap<f64>>>, x: &Array2<f64>| {
        let mut weights = AttentionWeights::clone(exact.weights());
        (weights.o, weights.o_bias) = (Array2::eye(32), None);
        let softmax = SoftmaxAttention::new(config.clone(), weights).unwrap();
        match maps {
            None => softmax.forward(x, KeyMask::All).unwrap(),
            Some(maps) => {
                let options = DijiangOptions::new().with_window(Window::new(16, 1));
                let layer = DijiangAttention::from_softmax(&softmax, options)
                    .unwrap()
                    .with_maps(maps)
                    .unwrap();
                layer.forward(x, KeyMask::All).unwrap()
            }
        }
    };
    let stacked = |maps: Option<&[DctMap<f64>]>| {
        let outputs = samples.each_ref().map(|x| headless(maps.map(<[_]>::to_vec), x));
        concatenate(Axis(0), &[outputs[0].view(), outputs[1].view()]).unwrap()
    };
    let errors = |maps: &[DctMap<f64>]| {
        let (teacher, got) = (stacked(None), stacked(Some(maps)));
        let spread = &teacher - &teacher.mean_axis(Axis(0)).unwrap();
        let sum = |rows: &Array2<f64>, head: usize| {
            rows.slice(s![.., head * 16..(head + 1) * 16]).mapv(|v| v * v).sum()
        };
        [0, 1].map(|head| sum(&(&got - &teacher), head) / sum(&spread, head))
    };
    let before = errors(layer.maps());
    let report = layer
        .calibrate(&views, &CalibrateOptions::new().with_steps(0), |_| ControlFlow::Continue(()))
        .unwrap();
    let after = errors(layer.maps());
    let all = concatenate(Axis(0), &[samples[0].view(), samples[1].view()]).unwrap();
    for (h, head) in report.heads.iter().enumerate() {
        assert!(
            (head.before / before[h] - 1.0).abs() < 1e-10
                && (head.after / after[h] - 1.0).abs() < 1e-10,
            "{head:?}"
        );
        let params = layer.maps()[h].params();
        assert_eq!(params.log_mix, head.log_mix);
        let root = config.scale.unwrap().sqrt();
        let mean = |weight: &Array2<f64>, bias: &Option<Array1<f64>>, heads: usize| {
            let rows = all.dot(&weight.t()) + bias.as_ref().unwrap();
            let mean = rows.mean_axis(Axis(0)).unwrap() * root;
            let part = mean.slice(s![h * heads * 8..(h + 1) * heads * 8]).to_owned();
            part.into_shape_with_order((heads, 8)).unwrap().mean_axis(Axis(0)).unwrap()
        };
        let weights = exact.weights();
        assert_close(
            "μq",
            &Array1::from(params.query.center.clone()),
            &mean(&weights.q, &weights.q_bias, 2),
            1e-12,
        );
        assert_close(
            "μk",
            &Array1::from(params.key.center.clone()),
            &mean(&weights.k, &weights.k_bias, 1),
            1e-12,
        );
    }
}

#[test]
fn a_cancelled_calibration_changes_nothing() {
    let mut layer = DijiangAttention::from_softmax(&off_centre(Causality::Causal), rich()).unwrap();
    let (sample, before) = (
        correlated(100, 1),
        layer.maps().iter().map(|map| map.params().clone()).collect::<Vec<_>>(),
    );
    for stop in [1, 2, 7, 8] {
        let mut calls = 0;
        let result =
            layer.calibrate(&[sample.view()], &CalibrateOptions::new().with_steps(0), |progress| {
                calls += 1;
                if progress.done == stop {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
        assert_eq!((result, calls), (Err(Error::Cancelled), stop));
        assert!(layer.maps().iter().map(DctMap::params).eq(&before));
    }
}

/// Constant values have no variance: nothing to divide by, and nothing to gain.
#[test]
fn calibration_on_constant_values() {
    let exact = off_centre(Causality::Causal);
    let mut weights = AttentionWeights::clone(exact.weights());
    weights.v.fill(0.0);
    let exact = SoftmaxAttention::new(exact.config().clone(), weights).unwrap();
    let mut layer = DijiangAttention::from_softmax(&exact, rich()).unwrap();
    let report = layer
        .calibrate(&[correlated(70, 1).view()], &CalibrateOptions::new(), |_| {
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(
        report.heads.iter().all(|head| head.before < 1e-12 && head.after <= head.before),
        "{report:?}"
    );
}

#[test]
fn impossible_configs() {
    let config = |model_dim, heads| AttentionConfig::new(model_dim, heads);
    let rotary = |rotary| config(24, 4).with_rotary(rotary);
    let llama3 = |factor, low_freq_factor, high_freq_factor, original_context| {
        let scaling =
            RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context };
        rotary(Rotary::new(1e4).with_scaling(scaling))
    };
    let scaled = |base, scaling| rotary(Rotary::new(base).with_scaling(scaling));
    let dynamic = |factor, original_context, length| {
        scaled(1e4, RotaryScaling::Dynamic { factor, original_context, length })
    };
    let yarn = |base, factor, beta_fast, beta_slow, attention_factor| {
        let original_context = 16;
        let scaling = RotaryScaling::Yarn {
            factor,
            original_context,
            beta_fast,
            beta_slow,
            attention_factor,
        };
        scaled(base, scaling)
    };
    let longrope = |factors, attention_factor| {
        scaled(1e4, RotaryScaling::LongRope { factors, attention_factor })
    };
    let value = |argument, got: f64| (argument, "value", got);
    let cases = [
        (config(0, 4), value("model_dim", 0.0)),
        (config(24, 0), value("heads", 0.0)),
        (config(24, 4).with_kv_heads(0), value("kv_heads", 0.0)),
        (config(24, 4).with_head_dim(0), value("head_dim", 0.0)),
        (config(24, 4).with_kv_heads(3), ("heads", "divisible", 4.0)),
        (config(24, 4).with_kv_heads(8), ("heads", "divisible", 4.0)),
        (config(26, 4), ("model_dim", "divisible", 26.0)),
        (
            config(24, 4).with_head_dim(usize::MAX / 2),
            ("model_dim · heads · head_dim", "large", usize::MAX as f64),
        ),
        (config(24, 4).with_scale(0.0), value("scale", 0.0)),
        (config(24, 4).with_scale(-1.0), value("scale", -1.0)),
        (config(24, 4).with_scale(f64::NAN), value("scale", f64::NAN)),
        (config(24, 4).with_scale(f64::INFINITY), value("scale", f64::INFINITY)),
        (rotary(Rotary::new(0.0)), value("rotary.base", 0.0)),
        (rotary(Rotary::new(f64::NAN)), value("rotary.base", f64::NAN)),
        (rotary(Rotary::new(1e4).with_dims(0)), value("rotary.dims", 0.0)),
        (rotary(Rotary::new(1e4).with_dims(3)), value("rotary.dims", 3.0)),
        (rotary(Rotary::new(1e4).with_dims(8)), ("rotary.dims", "large", 8.0)),
        (config(20, 4).with_rotary(Rotary::new(1e4)), value("rotary.dims", 5.0)),
        (
            rotary(Rotary::new(1e4).with_scaling(RotaryScaling::Linear { factor: 0.0 })),
            value("rotary.factor", 0.0),
        ),
        (llama3(-8.0, 1.0, 4.0, 8192), value("rotary.factor", -8.0)),
        (llama3(8.0, f64::NAN, 4.0, 8192), value("rotary.low_freq_factor", f64::NAN)),
        (llama3(8.0, 1.0, 0.0, 8192), value("rotary.high_freq_factor", 0.0)),
        (llama3(8.0, 4.0, 4.0, 8192), value("rotary.high_freq_factor", 4.0)),
        (llama3(8.0, 1.0, 4.0, 0), value("rotary.original_context", 0.0)),
        (
            rotary(Rotary::new(1e4).with_scaling(RotaryScaling::Linear { factor: 1e-320 })),
            value("rotary.frequencies", f64::INFINITY),
        ),
        (rotary(Rotary::new(1e-30)), value("rotary.frequencies", 1e-30f64.powf(-4.0 / 6.0))),
        (
            AttentionConfig::new(1, 1)
                .with_head_dim(1 << 50)
                .with_rotary(Rotary::new(1e-30).with_dims(1 << 50)),
            value("rotary.frequencies", 1e-30f64.powf(-2.0 * (0.5 - 2f64.powi(-50)))),
        ),
        (dynamic(0.5, 16, 20), value("rotary.factor", 0.5)),
        (dynamic(f64::INFINITY, 16, 20), value("rotary.factor", f64::INFINITY)),
        (dynamic(2.0, 0, 20), value("rotary.original_context", 0.0)),
        (dynamic(2.0, 16, 0), value("rotary.length", 0.0)),
        (
            dynamic(2.0, 16, 20).with_rotary(Rotary::new(1e4).with_dims(2).with_scaling(
                RotaryScaling::Dynamic { factor: 2.0, original_context: 16, length: 20 },
            )),
            value("rotary.dims", 2.0),
        ),
        (yarn(1e4, 0.0, 32.0, 1.0, 1.0), value("rotary.factor", 0.0)),
        (yarn(1e4, 4.0, 0.5, 1.0, 1.0), value("rotary.beta_fast", 0.5)),
        (yarn(1e4, 4.0, 32.0, 0.0, 1.0), value("rotary.beta_slow", 0.0)),
        (yarn(1.0, 4.0, 32.0, 1.0, 1.0), value("rotary.base", 1.0)),
        (yarn(1e4, 4.0, 32.0, 1.0, 0.0), value("rotary.attention_factor", 0.0)),
        (yarn(1e4, 4.0, 32.0, 1.0, f64::NAN), value("rotary.attention_factor", f64::NAN)),
        (longrope(vec![1.0, 0.0, 1.0], 1.0), value("rotary.factors", 0.0)),
        (
            longrope(vec![1.0, 1e-30, 1.0], 1.0),
            value("rotary.frequencies", 1e4f64.powf(-2.0 / 6.0) / 1e-30),
        ),
        (longrope(vec![1.0; 3], 1e7), value("rotary.attention_factor", 1e7)),
        (config(24, 4).with_qk_norm(-1e-6), value("qk_norm", -1e-6)),
        (config(24, 4).with_qk_norm(f64::NAN), value("qk_norm", f64::NAN)),
        (config(24, 4).with_sliding_window(Some(0)), value("sliding_window", 0.0)),
    ];
    let good = softmax(AttentionConfig::new(24, 4), 1);
    for (config, (name, kind, wrong)) in cases {
        let error = config.check().unwrap_err();
        let (got_kind, got) = match &error {
            Error::Value { got, .. } => ("value", *got),
            Error::NotDivisible { got, .. } => ("divisible", *got as f64),
            Error::TooLarge { got, .. } => ("large", *got as f64),
            other => panic!("{other:?}"),
        };
        assert_eq!((argument(&error), got_kind), (name, kind));
        assert!(got == wrong || got.is_nan() && wrong.is_nan(), "{error}");
        let message = error.to_string();
        assert!(message.contains(name), "{message}");
        let layer = SoftmaxAttention::new(config, Arc::clone(good.weights()));
        assert_eq!(
            layer.map(|_| ()).unwrap_err().to_string(),
            message,
            "the constructor says the same"
        );
    }
    assert_eq!(config(24, 4).check(), Ok(()));
    assert_eq!(config(26, 4).with_head_dim(6).check(), Ok(()));
}

#[test]
fn impossible_weights() {
    let (config, good) = (grouped(), AttentionWeights::clone(softmax(grouped(), 1).weights()));
    let refused = |change: &dyn Fn(&mut AttentionWeights<f64>)| {
        let mut weights = good.clone();
        change(&mut weights);
        let error = SoftmaxAttention::new(config.clone(), weights.clone()).map(|_| ()).unwrap_err();
        assert_eq!(weights.check(&config).unwrap_err().to_string(), error.to_string());
        error
    };
    let shape = |argument, axis, expected, got| Error::Shape { argument, axis, expected, got };
    assert_eq!(refused(&|w| w.q = Array2::zeros((35, 24))), shape("q", 0, 36, 35));
    assert_eq!(refused(&|w| w.k = Array2::zeros((36, 24))), shape("k", 0, 18, 36));
    assert_eq!(refused(&|w| w.v = Array2::zeros((18, 23))), shape("v", 1, 24, 23));
    assert_eq!(refused(&|w| w.o = Array2::zeros((36, 24))), shape("o", 0, 24, 36));
    let length = |argument, expected, got| Error::Length { argument, expected, got };
    assert_eq!(refused(&|w| w.q_bias = Some(Array1::zeros(24))), length("q_bias", 36, 24));
    assert_eq!(refused(&|w| w.k_bias = Some(Array1::zeros(36))), length("k_bias", 18, 36));
    assert_eq!(refused(&|w| w.v_bias = Some(Array1::zeros(0))), length("v_bias", 18, 0));
    assert_eq!(refused(&|w| w.o_bias = Some(Array1::zeros(36))), length("o_bias", 24, 36));
    let conflict = |argument, other| Error::Conflict { argument, other };
    assert_eq!(
        refused(&|w| w.k_norm = Some(Array1::zeros(6))),
        conflict("k_norm", "a config without qk_norm")
    );
    let (normed, config) = (good.clone(), config.clone().with_qk_norm(1e-6));
    assert_eq!(
        normed.check(&config).unwrap_err(),
        conflict("qk_norm", "weights without q_norm and k_norm")
    );
    let ones = || Array1::ones(6);
    assert_eq!(
        normed.clone().with_qk_norms(Array1::ones(5), ones()).check(&config).unwrap_err(),
        length("q_norm", 6, 5)
    );
    let nan = normed.with_qk_norms(ones(), Array1::from_elem(6, f64::NAN)).check(&config);
    assert!(matches!(nan, Err(Error::NonFinite { argument: "k_norm", .. })));
    let elements: [(&str, &dyn Fn(&mut AttentionWeights<f64>)); 8] = [
        ("q", &|w| w.q[[1, 2]] = f64::NAN),
        ("k", &|w| w.k[[1, 2]] = f64::INFINITY),
        ("v", &|w| w.v[[1, 2]] = f64::NEG_INFINITY),
        ("o", &|w| w.o[[1, 2]] = 1e101),
        ("q_bias", &|w| w.q_bias.as_mut().unwrap()[3] = f64::NAN),
        ("k_bias", &|w| w.k_bias.as_mut().unwrap()[3] = f64::NAN),
        ("v_bias", &|w| w.v_bias.as_mut().unwrap()[3] = f64::NAN),
        ("o_bias", &|w| w.o_bias.as_mut().unwrap()[3] = f64::NAN),
    ];
    for (name, change) in elements {
        let error = refused(change);
        assert!(
            matches!(error, Error::NonFinite { argument, .. } if argument == name),
            "{error:?}"
        );
    }
}

#[test]
fn impossible_options() {
    let exact = softmax(grouped(), 1);
    let refused = |options: DijiangOptions| {
        DijiangAttention::from_softmax(&exact, options).map(|_| ()).unwrap_err()
    };
    assert_eq!(
        argument(&refused(DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(0)))),
        "blocks"
    );
    assert!(matches!(
        refused(DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(usize::MAX))),
        Error::TooLarge { argument: "blocks", .. }
    ));
    assert_eq!(
        argument(&refused(DijiangOptions::new().with_window(Window::new(0, 1)))),
        "window chunk"
    );
    assert!(matches!(
        refused(DijiangOptions::new().with_window(Some(Window::new(64, usize::MAX)))),
        Error::TooLarge { .. }
    ));
    assert_eq!(argument(&refused(DijiangOptions::new().with_log_decay(0.1))), "log_decay");
    assert_eq!(argument(&refused(DijiangOptions::new().with_log_decay(f64::NAN))), "log_decay");

    let encoder = softmax(grouped().with_causality(Causality::Bidirectional), 1);
    let conflict = |argument| Error::Conflict { argument, other: "bidirectional attention" };
    let error =
        DijiangAttention::from_softmax(&encoder, DijiangOptions::new().with_log_decay(-0.1))
            .map(|_| ())
            .unwrap_err();
    assert_eq!(error, conflict("log_decay"));
    let linear = DijiangAttention::from_softmax(&encoder, DijiangOptions::new()).unwrap();
    assert_eq!(
        linear.clone().with_windows(vec![Window::new(8, 1)], 0).map(|_| ()).unwrap_err(),
        conflict("window")
    );
    assert_eq!(
        linear.with_log_decay(vec![-0.1; 3]).map(|_| ()).unwrap_err(),
        conflict("log_decay")
    );
    assert_eq!(
        encoder.with_windows(vec![Window::new(8, 1)], 0).map(|_| ()).unwrap_err(),
        conflict("window")
    );
    assert_eq!(
        argument(&exact.with_windows(vec![Window::new(0, 1)], 0).map(|_| ()).unwrap_err()),
        "window chunk"
    );
}

#[test]
fn maps_of_another_layer() {
    let mut layer = linear(grouped(), rich(), 1);
    let before = layer.forward(&hidden(40, layer.config(), 1), KeyMask::All).unwrap();
    let maps = |dims: &[usize]| {
        dims.iter().map(|&d| DctMapConfig::new().build::<f64>(d).unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(
        layer.set_maps(maps(&[6, 6])),
        Err(Error::Length { argument: "maps", expected: 3, got: 2 })
    );
    let foreign = Error::Foreign { argument: "map", what: "head dimension", expected: 6, got: 8 };
    assert_eq!(layer.set_maps(maps(&[6, 8, 6])), Err(foreign.clone()));
    assert_eq!(layer.set_maps(maps(&[8, 8, 8])), Err(foreign));
    let mut mixed = maps(&[6, 6]);
    mixed.push(DctMapConfig::new().with_blocks(2).build(6).unwrap());
    assert_eq!(argument(&layer.set_maps(mixed).unwrap_err()), "maps");
    let error = layer.clone().with_log_decay(vec![0.0; 2]).map(|_| ()).unwrap_err();
    assert_eq!(error, Error::Length { argument: "log_decay", expected: 3, got: 2 });
    assert_same_bits(
        "unchanged",
        &layer.forward(&hidden(40, layer.config(), 1), KeyMask::All).unwrap(),
        &before,
    );
}

/// Every refusal leaves the state as it was: the rest of the sequence comes out the same.
fn refuses_and_stays<A: Attention<f64>>(layer: &A, foreign: A::State)
where
    A::State: PartialEq + std::fmt::Debug,
{
    let x = hidden(30, layer.config(), 73);
    let mut state = layer.new_state();
    layer.prefill(&mut state, &x, KeyMask::All).unwrap();
    let (mut before, mut out) = (state.clone(), Array1::from_elem(24, 0.5));
    let bad = |value: f64| {
        let mut bad = x.clone();
        bad[[3, 4]] = value;
        bad
    };
    let narrow = Array2::zeros((30, 23));
    let empty = Array2::zeros((0, 24));
    let short = [true; 29];
    let sequences: [(&Array2<f64>, KeyMask<'_>, Error); 6] = [
        (&narrow, KeyMask::All, Error::Shape { argument: "x", axis: 1, expected: 24, got: 23 }),
        (&empty, KeyMask::All, Error::Empty { argument: "x" }),
        (&x, KeyMask::Valid(&short), Error::Length { argument: "mask", expected: 30, got: 29 }),
        (
            &bad(f64::INFINITY),
            KeyMask::All,
            Error::NonFinite { argument: "x", index: 76, limit: 1e100, got: f64::INFINITY },
        ),
        (
            &bad(-1e101),
            KeyMask::All,
            Error::NonFinite { argument: "x", index: 76, limit: 1e100, got: -1e101 },
        ),
        (&empty, KeyMask::Valid(&short), Error::Empty { argument: "x" }),
    ];
    for (x, mask, expected) in sequences {
        assert_eq!(layer.forward(x, mask), Err(expected.clone()));
        assert_eq!(layer.prefill(&mut state, x, mask), Err(expected));
        assert_eq!(state, before);
    }
    assert!(matches!(
        layer.prefill(&mut state, &bad(f64::NAN), KeyMask::All),
        Err(Error::NonFinite { argument: "x", index: 76, .. })
    ));
    // Finite, but no longer once projected.
    let huge = x.mapv(|v| v.signum() * 9e99);
    let error = layer.prefill(&mut state, &huge, KeyMask::All).unwrap_err();
    assert!(matches!(error, Error::NonFinite { argument: "q" | "k" | "v", .. }), "{error:?}");
    assert_eq!(state, before);

    let steps: [(Array1<f64>, usize, Error); 3] = [
        (Array1::zeros(23), 24, Error::Length { argument: "x", expected: 24, got: 23 }),
        (Array1::zeros(24), 25, Error::Length { argument: "out", expected: 24, got: 25 }),
        (
            bad(f64::INFINITY).row(3).to_owned(),
            24,
            Error::NonFinite { argument: "x", index: 4, limit: 1e100, got: f64::INFINITY },
        ),
    ];
    for (x, len, expected) in steps {
        let mut out = Array1::from_elem(len, 0.5);
        assert_eq!(layer.step(&mut state, &x, &mut out), Err(expected));
        assert_eq!((&state, out), (&before, Array1::from_elem(len, 0.5)));
    }
    let error = layer.step(&mut state, &huge.row(0), &mut out).unwrap_err();
    assert!(matches!(error, Error::NonFinite { argument: "q" | "k" | "v", .. }), "{error:?}");
    assert_eq!((&state, &out), (&before, &Array1::from_elem(24, 0.5)));

    let mut other = foreign.clone();
    assert!(matches!(layer.prefill(&mut other, &x, KeyMask::All), Err(Error::Foreign { .. })));
    assert!(matches!(layer.step(&mut other, &x.row(0), &mut out), Err(Error::Foreign { .. })));
    assert_eq!((other, &out), (foreign, &Array1::from_elem(24, 0.5)));

    let expected = layer.prefill(&mut before, &x, KeyMask::All).unwrap();
    assert_same_bits(
        "after errors",
        &layer.prefill(&mut state, &x, KeyMask::All).unwrap(),
        &expected,
    );

    let batch = |b, n, width| Array3::<f64>::zeros((b, n, width));
    assert_eq!(
        layer.forward_batch(&batch(2, 3, 23), None),
        Err(Error::Shape { argument: "x", axis: 2, expected: 24, got: 23 })
    );
    assert_eq!(layer.forward_batch(&batch(0, 3, 24), None), Err(Error::Empty { argument: "x" }));
    assert_eq!(layer.forward_batch(&batch(2, 0, 24), None), Err(Error::Empty { argument: "x" }));
    let masks = Array2::from_elem((2, 4), true);
    let error = layer.forward_batch(&batch(2, 3, 24), Some(&masks));
    assert_eq!(error, Err(Error::Shape { argument: "masks", axis: 1, expected: 3, got: 4 }));
    let mut x = batch(2, 3, 24);
    x[[1, 2, 3]] = f64::NEG_INFINITY;
    let error = layer.forward_batch(&x, None);
    assert_eq!(
        error,
        Err(Error::NonFinite { argument: "x", index: 123, limit: 1e100, got: f64::NEG_INFINITY })
    );
    x.index_axis_mut(Axis(0), 1).assign(&huge.slice(s![..3, ..]));
    assert!(matches!(
        layer.forward_batch(&x, None),
        Err(Error::NonFinite { argument: "q" | "k" | "v", .. })
    ));
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let narrow = grouped().with_head_dim(4);
    let (exact, linear_layer) = (softmax(grouped(), 1), linear(grouped(), rich(), 1));
    refuses_and_stays(&exact, softmax(narrow.clone(), 1).new_state());
    refuses_and_stays(&linear_layer, linear(narrow, rich(), 1).new_state());
    refuses_and_stays(
        &linear_layer,
        linear_layer.clone().with_windows(Vec::new(), 0).unwrap().new_state(),
    );
    refuses_and_stays(&linear_layer, linear(grouped().with_kv_heads(6), rich(), 1).new_state());
}

#[test]
fn a_state_of_another_shape_names_the_difference() {
    let x = Array1::zeros(24);
    let step = |layer: &SoftmaxAttention<f64>, other: AttentionConfig| {
        layer.step(&mut softmax(other, 1).new_state(), &x, &mut Array1::zeros(24)).unwrap_err()
    };
    let foreign = |what, expected, got| Error::Foreign { argument: "state", what, expected, got };
    let layer = softmax(grouped(), 1);
    let changed = |change: &dyn Fn(&mut AttentionConfig)| {
        let mut config = grouped();
        change(&mut config);
        config
    };
    assert_eq!(
        step(&layer, changed(&|config| config.model_dim = 12)),
        foreign("model dimension", 24, 12)
    );
    assert_eq!(
        step(&layer, changed(&|config| config.heads = 3)),
        foreign("number of query heads", 6, 3)
    );
    assert_eq!(
        step(&layer, grouped().with_kv_heads(1)),
        foreign("number of key-value heads", 3, 1)
    );
    assert_eq!(step(&layer, grouped().with_head_dim(4)), foreign("head dimension", 6, 4));
    assert_eq!(
        step(&layer, changed(&|config| config.rotary = None)),
        foreign("number of rotated coordinates", 4, 0)
    );
}

#[test]
fn bidirectional_layers_do_not_stream() {
    let config = grouped().with_causality(Causality::Bidirectional);
    let (exact, linear) = (softmax(config.clone(), 1), linear(config, DijiangOptions::new(), 1));
    let x = hidden(5, exact.config(), 1);
    let conflict = |argument| Error::Conflict { argument, other: "bidirectional attention" };
    let mut state = exact.new_state();
    assert_eq!(exact.prefill(&mut state, &x, KeyMask::All), Err(conflict("prefill")));
    assert_eq!(exact.step(&mut state, &x.row(0), &mut Array1::zeros(24)), Err(conflict("step")));
    assert_eq!(state, exact.new_state());
    let mut state = linear.new_state();
    assert_eq!(linear.prefill(&mut state, &x, KeyMask::All), Err(conflict("prefill")));
    assert_eq!(linear.step(&mut state, &x.row(0), &mut Array1::zeros(24)), Err(conflict("step")));
    assert_eq!(state, linear.new_state());
}

#[test]
fn impossible_calibrations() {
    let mut layer = DijiangAttention::from_softmax(&off_centre(Causality::Causal), rich()).unwrap();
    let before: Vec<_> = layer.maps().iter().map(|map| map.params().clone()).collect();
    let mut refused = |samples: &[ArrayView2<'_, f64>], options: CalibrateOptions| {
        let result = layer.calibrate(samples, &options, |_| panic!("nothing to tell"));
        assert!(layer.maps().iter().map(DctMap::params).eq(&before));
        result.unwrap_err()
    };
    let (good, plain) = (correlated(10, 1), CalibrateOptions::new);
    let mut bad = good.clone();
    bad[[2, 3]] = f64::INFINITY;
    assert_eq!(refused(&[], plain()), Error::Empty { argument: "samples" });
    assert_eq!(
        refused(&[good.view(), Array2::zeros((0, 32)).view()], plain()),
        Error::Empty { argument: "samples" }
    );
    let narrow = Error::Shape { argument: "samples", axis: 1, expected: 32, got: 31 };
    assert_eq!(refused(&[good.view(), Array2::zeros((5, 31)).view()], plain()), narrow);
    let infinite =
        Error::NonFinite { argument: "samples", index: 67, limit: 1e100, got: f64::INFINITY };
    assert_eq!(refused(&[good.view(), bad.view()], plain()), infinite);
    bad.mapv_inplace(|v| v.signum() * 9e99);
    assert!(matches!(
        refused(&[bad.view()], plain()),
        Error::NonFinite { argument: "q" | "k" | "v", .. }
    ));
}

#[test]
fn layers_and_states_cross_threads() {
    fn crosses<T: Send + Sync>() {}
    crosses::<SoftmaxAttention<f32>>();
    crosses::<DijiangAttention<f32>>();
    crosses::<SoftmaxState<f32>>();
    crosses::<DijiangState<f32>>();
    crosses::<AttentionWeights<f32>>();
}
