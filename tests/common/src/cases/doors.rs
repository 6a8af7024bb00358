//! Every public door with shapes, numbers and masks of any kind. What is refused changes nothing;
//! what is accepted gives finite numbers.

use std::ops::ControlFlow;

use dijiang::attention::{Causality, KeyMask, LinearConfig, Operator, Qkv, SoftmaxConfig, Window};
use dijiang::calibrate::{CalibrateOptions, Fit};
use dijiang::kernel::{
    DctMap, DctMapConfig, DctParams, Envelope, FavorConfig, FeatureMap, Mixing, Pairing,
    Projection, Radial,
};
use dijiang::kernel::{InputScales, Points, published_features};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    PublishedAttention, PublishedWeights, Rotary, RotaryScaling, SoftmaxAttention, StatePool,
};
use dijiang::reference::{self, Pairs, PlainMap};
use dijiang::{Real, Result};
use ndarray::{Array, Array1, Array2, Array3, ArrayRef, Dimension, ShapeBuilder};

use super::{Source, Tally};

pub fn run(source: &mut Source<'_>, tally: &mut Tally) {
    match source.chance(0.5) {
        true => check::<f32>(source, tally),
        false => check::<f64>(source, tally),
    }
}

fn check<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    match source.below(7) {
        0 => configs::<T>(source, tally),
        1 => maps::<T>(source, tally),
        2 | 3 => attention::<T>(source, tally),
        4 => softmax::<T>(source, tally),
        5 => layers::<T>(source, tally),
        _ => oracles(source, tally),
    }
}

/// An axis that is mostly as long as it should be.
fn axis(source: &mut Source<'_>, right: usize) -> usize {
    if source.chance(0.04) {
        source.choose(&[0, 1, right + 1, right.saturating_sub(1), 2 * right])
    } else {
        right
    }
}

/// Numbers of a scale that doors take, with a few that they do not.
fn tensor<T: Real, D: Dimension, S: ShapeBuilder<Dim = D>>(
    source: &mut Source<'_>,
    shape: S,
) -> Array<T, D> {
    let scale = source.choose(&[1.0, 1.0, 30.0, 1e-3, 1e-40, T::LIMIT / 8.0, 0.0]);
    let mut array = Array::from_shape_simple_fn(shape, || T::from_f64(scale * source.normal()));
    if source.chance(0.15) && !array.is_empty() {
        let at = source.below(array.len());
        array.iter_mut().nth(at).into_iter().for_each(|x| *x = T::from_f64(source.number()));
    }
    array
}

fn mask(source: &mut Source<'_>, tokens: usize) -> Option<Vec<bool>> {
    match source.below(5) {
        0 => Some(vec![false; tokens]),
        1 => Some((0..axis(source, tokens)).map(|_| source.chance(0.5)).collect()),
        _ => None,
    }
}

fn key_mask(valid: &Option<Vec<bool>>) -> KeyMask<'_> {
    valid.as_deref().map_or(KeyMask::All, KeyMask::Valid)
}

#[track_caller]
fn assert_finite<T: Real, D: Dimension>(array: &ArrayRef<T, D>) {
    assert!(array.iter().all(|x| x.to_f64().is_finite()), "{array:?}");
}

/// Sizes and numbers before anything is built of them.
fn configs<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let mut size = |right: usize| if source.chance(0.4) { source.size() } else { right };
    let (dim, blocks, features, heads, value_dim, chunk, back) =
        (size(4), size(2), size(9), size(2), size(3), size(4), size(1));
    let (kv_heads, model_dim, capacity) = (size(1), size(8), size(3));
    // Sizes within the limits may still be too large to be built here in reasonable time.
    let small = |sizes: &[usize]| {
        sizes
            .iter()
            .try_fold(1_usize, |product, &size| product.checked_mul(size))
            .is_none_or(|n| n <= 1 << 12)
    };
    let refused = |sizes: &[usize]| sizes.iter().any(|&size| size == 0 || size > 1 << 27);
    if small(&[dim, blocks]) || refused(&[dim, blocks]) {
        let config = DctMapConfig::new()
            .with_blocks(blocks)
            .with_radial(source.choose(&[Radial::Normal, Radial::Chi]));
        let config = config
            .with_points(source.choose(&[Points::Sobol, Points::Random]))
            .with_scales(InputScales::Ones);
        tally.record(
            config.with_mixing(source.choose(&[Mixing::None, Mixing::Mixed])).build::<T>(dim),
        );
    }
    if small(&[dim, features]) || refused(&[dim, features]) {
        tally.record(FavorConfig::new(dim, features).with_oprf(source.number()).build::<T>());
    }
    if dim <= 1 << 12 || dim > 1 << 27 {
        tally.record(DctMap::<T>::from_params(DctParams::new(dim)));
    }
    let mut config = LinearConfig::new()
        .with_heads(heads)
        .with_value_dim(value_dim)
        .with_window(Window::new(chunk, back).with_kept(source.choose(&[0, 3, usize::MAX])));
    (config.scale, config.log_decay) = (Some(source.number()), vec![source.number()]);
    let map = DctMapConfig::new().build::<T>(4).unwrap_or_else(|error| panic!("{error}"));
    tally.record(config.build::<T, _>(vec![map]));
    tally.record(
        SoftmaxConfig::new(heads, dim)
            .with_kv_heads(kv_heads)
            .with_window(Window::new(chunk, back))
            .build::<T>(),
    );
    let mut rotary = Rotary::new(source.number());
    rotary.dims = source.chance(0.5).then(|| source.size());
    rotary.hold = source.chance(0.5).then(|| source.size());
    let (factor, low_freq_factor, high_freq_factor, original_context) =
        (source.number(), source.number(), source.number(), source.size());
    let (beta_fast, beta_slow, attention_factor, length) =
        (source.number(), source.number(), source.number(), source.size());
    rotary.scaling = source.choose(&[
        RotaryScaling::None,
        RotaryScaling::Linear { factor },
        RotaryScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context },
        RotaryScaling::Dynamic { factor, original_context, length },
        RotaryScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor },
        RotaryScaling::LongRope { factors: vec![factor; length.min(2)], attention_factor },
    ]);
    let mut config = AttentionConfig::new(model_dim, heads)
        .with_kv_heads(kv_heads)
        .with_scale(source.number())
        .with_rotary(rotary);
    config.sliding_window = source.chance(0.3).then(|| source.size());
    config.qk_norm = source.chance(0.2).then(|| source.number());
    tally.record(config.check());
    tally.record(SoftmaxAttention::<T>::new(config, weights(source, 8, 2, 2, 4)));
    assert!(Window::for_dim(dim).chunk >= 64);
    assert!(
        PublishedWeights::<T>::decays(heads.min(1 << 10).max(heads >> 21 << 21)).len() <= 1 << 20
    );
    let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), steady::<T>(8, 8));
    let softmax = softmax.unwrap_or_else(|error| panic!("{error}"));
    if small(&[blocks]) || blocks > 1 << 27 {
        let options = DijiangOptions::new()
            .with_map(DctMapConfig::new().with_blocks(blocks))
            .with_window(Some(Window::new(chunk, back)))
            .with_log_decay(source.number());
        tally.record(DijiangAttention::from_softmax(&softmax, options));
    }
    let layer = DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_window(None))
        .unwrap_or_else(|error| panic!("{error}"));
    if capacity <= 64 || capacity > 1 << 20 {
        tally.record(StatePool::new(&layer, capacity));
    }
    let samples =
        [Array2::from_shape_fn((12, 8), |(i, j)| T::from_f64(((3 * i + 5 * j) % 7) as f64 - 3.0))];
    let mut options =
        CalibrateOptions::new().with_steps(if source.chance(0.5) { 1 } else { usize::MAX });
    (options.learning_rate, options.batch, options.seconds) =
        (source.number(), source.choose(&[0, 1, usize::MAX]), Some(source.number()));
    options.decay = source.choose(&[Fit::Keep, Fit::Train]);
    tally.record(layer.clone().calibrate(&[samples[0].view()], &options, |_| {
        source.choose(&[ControlFlow::Continue(()), ControlFlow::Break(())])
    }));
}

/// Parameters that do not fit each other, and numbers that are none.
fn maps<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let d = source.upto(9);
    let mut params =
        DctMapConfig::new().with_blocks(2).params(d).unwrap_or_else(|error| panic!("{error}"));
    (params.envelope, params.pairing) = (
        source.choose(&[Envelope::None, Envelope::Gaussian]),
        source.choose(&[Pairing::Single, Pairing::Single, Pairing::Antithetic]),
    );
    params = match source.below(3) {
        0 => params.to_dense().unwrap_or(params),
        1 => params.to_deep(),
        _ => params,
    };
    for _ in 0..source.below(3) {
        let number = source.number();
        let (mut none, mut rows) = (Vec::new(), Vec::new());
        let DctParams { query, key, log_weight, projection, log_mix, .. } = &mut params;
        let of_projection = match projection {
            Projection::Dct => &mut none,
            Projection::Mixed { signs } => signs,
            Projection::Deep { query, key } | Projection::Dense { query, key } => {
                if source.chance(0.5) { query } else { key }
            }
        };
        let lists = [
            &mut query.center,
            &mut query.scale,
            &mut query.radii,
            &mut key.center,
            &mut key.scale,
            &mut key.radii,
            log_weight,
            of_projection,
            &mut rows,
        ];
        let which = source.below(lists.len());
        let list = &mut *lists[which];
        match source.below(4) {
            0 => list.truncate(source.below(list.len() + 1)),
            1 => list.push(number),
            2 if !list.is_empty() => {
                let at = source.below(list.len());
                list[at] = number;
            }
            _ => *log_mix = number,
        }
    }
    tally.record(params.to_dense());
    tally.record(params.clone().with_oprf(source.number()));
    let Some(map) = tally.record(DctMap::<T>::from_params(params)) else { return };
    let (n, width) = (source.below(70), axis(source, d));
    let x = tensor::<T, _, _>(source, (n, width));
    tally.record(map.query_log_features(&x));
    tally.record(map.key_log_features(&x));
    let radii: Vec<f64> = (0..d)
        .map(|_| if source.chance(0.1) { source.number() } else { source.normal() })
        .collect();
    if let Some(features) = tally.record(published_features(&x, &radii)) {
        assert!(
            x.iter().any(|x| x.abs().to_f64() > 1e10)
                || radii.iter().any(|t| t.abs() > 1e10)
                || features.iter().all(|x| x.to_f64().is_finite())
        );
    }
}

/// Liwindow attention, its state and its gradients.
fn attention<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let (kv_heads, group, d, e) = (source.upto(2), source.upto(2), source.upto(9), source.upto(5));
    let mut config = LinearConfig::new().with_heads(kv_heads * group).with_value_dim(e);
    config.windows = source
        .chance(0.5)
        .then(|| Window::new(source.upto(9), source.below(3)).with_kept(source.below(4)))
        .into_iter()
        .collect();
    let decays = source.chance(0.4);
    if decays {
        config.log_decay =
            (0..kv_heads).map(|_| source.choose(&[0.0, -0.1, -1e3, -1e15])).collect();
    }
    let build = |config: LinearConfig, d: usize| -> Result<_> {
        config.build(
            (0..kv_heads)
                .map(|h| DctMapConfig::new().with_seed(h as u64).build::<T>(d))
                .collect::<Result<Vec<_>>>()?,
        )
    };
    let attention = build(config.clone(), d).unwrap_or_else(|error| panic!("{error}"));
    let other = build(config, d + 1).unwrap_or_else(|error| panic!("{error}"));
    let (n, h) = (source.choose(&[0, 1, 1, 2, 7, 20, 65]), kv_heads * group);
    let shape = |source: &mut Source<'_>, heads: usize, width: usize| {
        (axis(source, heads), axis(source, n), axis(source, width))
    };
    let (q, k, v) = (shape(source, h, d), shape(source, kv_heads, d), shape(source, kv_heads, e));
    let (q, k, v) =
        (tensor::<T, _, _>(source, q), tensor::<T, _, _>(source, k), tensor::<T, _, _>(source, v));
    let valid = mask(source, k.shape()[1]);
    // The documented exception: exponents so large that their rounding is more than a decay over a
    // block.
    let tame = !decays || q.iter().chain(&k).all(|x| x.abs().to_f64() < 1e4);
    let (mut state, mut foreign) = (attention.new_state(), other.new_state());
    for _ in 0..2 {
        let before = state.clone();
        match tally
            .record(attention.prefill(&mut state, Qkv::new(&q, &k, &v).with_mask(key_mask(&valid))))
        {
            Some(out) if tame => assert_finite(&out),
            Some(_) => {}
            None => assert!(state == before || !tame, "a refused call changed the state"),
        }
        if state != before {
            let flat = |x: &Array3<T>, i: usize| x.index_axis(ndarray::Axis(1), i).to_owned();
            let before = state.clone();
            let mut out = Array2::zeros((axis(source, h), axis(source, e)));
            match tally.record(attention.step(
                &mut state,
                Qkv::token(&flat(&q, 0), &flat(&k, 0), &flat(&v, 0)),
                &mut out,
                &mut attention.step_workspace(),
            )) {
                Some(()) if tame => assert_finite(&out),
                Some(()) => {}
                None => assert!(state == before || !tame, "a refused step changed the state"),
            }
        }
    }
    tally.record(attention.prefill(&mut foreign, Qkv::new(&q, &k, &v).with_mask(key_mask(&valid))));
    tally.record(state.copy_from(&foreign));
    let mut out = Array3::zeros((h, n, e));
    tally.record(attention.prefill_into(
        &mut [&mut state],
        Qkv::new(&q, &k, &v).with_mask(key_mask(&valid)),
        &mut out,
        &mut other.workspace(),
    ));
    let full = attention.clone().with_causality(Causality::Bidirectional);
    let qkv = Qkv::new(&q, &k, &v).with_mask(key_mask(&valid));
    if let Some(out) = tally.record(full.clone().and_then(|full| full.forward(qkv))) {
        assert_finite(&out);
    }
    let width = axis(source, e);
    let grad = tensor::<T, _, _>(source, (h, q.shape()[1], width));
    tally.record(
        attention
            .prefill_backward(
                &attention.new_state(),
                Qkv::new(&q, &k, &v).with_mask(key_mask(&valid)),
                &grad,
                None,
            )
            .map(|_| ()),
    );
    tally.record(full.clone().and_then(|full| full.backward(qkv, &grad)).map(|_| ()));
    if let Some(mut gradients) = tally.record(attention.new_gradients(source.upto(9), k.shape()[1]))
    {
        let (mut ws, mut foreign) = (attention.backward_workspace(), other.backward_workspace());
        for ws in [&mut ws, &mut foreign] {
            tally.record(attention.backward_into(
                Qkv::new(&q, &k, &v).with_mask(key_mask(&valid)),
                &grad,
                &mut gradients,
                ws,
            ));
            let result = full
                .as_ref()
                .map_err(Clone::clone)
                .and_then(|full| full.backward_into(qkv, &grad, &mut gradients, ws));
            tally.record(result);
        }
    }
    state.reset();
    assert!(state == attention.new_state());
}

/// Softmax attention and its cache.
fn softmax<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let (kv_heads, group, d, e) = (source.upto(2), source.upto(2), source.upto(9), source.upto(5));
    let mut config =
        SoftmaxConfig::new(kv_heads * group, d).with_kv_heads(kv_heads).with_value_dim(e);
    config.windows = source
        .chance(0.3)
        .then(|| Window::new(source.upto(9), source.below(3)))
        .into_iter()
        .collect();
    let attention = config.clone().build::<T>().unwrap_or_else(|error| panic!("{error}"));
    let (n, h) = (source.choose(&[0, 1, 2, 7, 20, 65]), kv_heads * group);
    let shape = |source: &mut Source<'_>, heads: usize, width: usize| {
        (axis(source, heads), axis(source, n), axis(source, width))
    };
    let (q, k, v) = (shape(source, h, d), shape(source, kv_heads, d), shape(source, kv_heads, e));
    let (q, k, v) =
        (tensor::<T, _, _>(source, q), tensor::<T, _, _>(source, k), tensor::<T, _, _>(source, v));
    let valid = mask(source, k.shape()[1]);
    let mut cache = attention.new_state();
    for _ in 0..2 {
        let before = cache.clone();
        match tally
            .record(attention.prefill(&mut cache, Qkv::new(&q, &k, &v).with_mask(key_mask(&valid))))
        {
            Some(out) => assert_finite(&out),
            None => assert!(cache == before, "a refused call changed the cache"),
        }
    }
    tally.record(attention.extend(
        &mut cache,
        (&k, &v),
        key_mask(&valid),
        &mut attention.workspace(),
    ));
    for out in [
        config
            .with_causality(Causality::Bidirectional)
            .build::<T>()
            .and_then(|full| full.forward(Qkv::new(&q, &k, &v).with_mask(key_mask(&valid)))),
        attention.forward(Qkv::new(&q, &k, &v).with_mask(key_mask(&valid))),
    ] {
        if let Some(out) = tally.record(out) {
            assert_finite(&out);
        }
    }
}

/// Weights of any numbers, mostly of the right shapes.
fn weights<T: Real>(
    source: &mut Source<'_>,
    model: usize,
    heads: usize,
    kv_heads: usize,
    d: usize,
) -> AttentionWeights<T> {
    let mut matrix = |rows: usize, columns: usize| {
        let shape = (axis(source, rows), axis(source, columns));
        tensor(source, shape)
    };
    let (q, k, v, o) = (
        matrix(heads * d, model),
        matrix(kv_heads * d, model),
        matrix(kv_heads * d, model),
        matrix(model, heads * d),
    );
    let weights = AttentionWeights::new(q, k, v, o);
    if source.chance(0.8) {
        return weights;
    }
    let mut bias = |len: usize| {
        let len = axis(source, len);
        tensor(source, len)
    };
    weights.with_biases(bias(heads * d), bias(kv_heads * d), bias(kv_heads * d), bias(model))
}

/// Weights that any layer takes.
fn steady<T: Real>(width: usize, model: usize) -> AttentionWeights<T> {
    let matrix = |p: usize, rows: usize, columns: usize| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            T::from_f64(((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3)
        })
    };
    AttentionWeights::new(
        matrix(5, width, model),
        matrix(7, width, model),
        matrix(11, width, model),
        matrix(13, model, width),
    )
}

/// The layers, streams, batches and pools.
fn layers<T: Real>(source: &mut Source<'_>, tally: &mut Tally) {
    let mut config = AttentionConfig::new(8, 2).with_kv_heads(source.upto(2));
    if source.chance(0.5) {
        config = config.with_rotary(Rotary::new(source.choose(&[1e4, 1e-300, 1e300, 3.0])));
    }
    if source.chance(0.2) {
        config = config.with_causality(Causality::Bidirectional);
    }
    let weights = weights::<T>(source, 8, 2, config.kv_heads, 4);
    let Some(softmax) = tally.record(SoftmaxAttention::new(config.clone(), weights.clone())) else {
        return;
    };
    let window = source.chance(0.5).then(|| Window::new(source.upto(5), 1));
    let Some(linear) = tally.record(DijiangAttention::from_softmax(
        &softmax,
        DijiangOptions::new().with_window(window),
    )) else {
        return;
    };
    layer(&softmax, source, tally);
    layer(&linear, source, tally);
    let ones = |len: usize| Array1::from_elem(len, T::ONE);
    let published = PublishedWeights::new(
        vec![1.0; 4],
        PublishedWeights::<T>::decays(2),
        tensor(source, (8, 8)),
        ones(8),
        ones(8),
    );
    if let Some(published) = tally.record(PublishedAttention::new(config, weights, published)) {
        layer(&published, source, tally);
    }
    if let Some(mut pool) = tally.record(StatePool::new(&linear, 3)) {
        let slots: Vec<_> = (0..3).map_while(|_| pool.take()).collect();
        let chosen: Vec<_> = (0..source.below(4)).map(|_| source.choose(&slots)).collect();
        if source.chance(0.3) {
            tally.record(pool.release(source.choose(&slots)));
        }
        tally.record(pool.fork(source.choose(&slots)));
        tally.record(pool.replace(source.choose(&slots), source.choose(&slots)));
        let shape = (axis(source, chosen.len()), axis(source, 8));
        let (x, mut out) = (tensor(source, shape), Array2::zeros((chosen.len(), 8)));
        tally.record(pool.step(&linear, &chosen, &x, &mut out));
    }
    let shape = (source.below(9), axis(source, 8));
    let (x, grad) = (tensor(source, shape), tensor(source, shape));
    tally.record(linear.backward(&x, KeyMask::All, &grad));
}

fn layer<T: Real, A: Attention<T, State: PartialEq>>(
    layer: &A,
    source: &mut Source<'_>,
    tally: &mut Tally,
) {
    let shape = (source.choose(&[0, 1, 2, 9]), axis(source, 8));
    let x: Array2<T> = tensor(source, shape);
    let valid = mask(source, shape.0);
    if let Some(out) = tally.record(layer.forward(&x, key_mask(&valid))) {
        assert_finite(&out);
    }
    let mut state = layer.new_state();
    for _ in 0..2 {
        let before = state.clone();
        if tally.record(layer.prefill(&mut state, &x, key_mask(&valid))).is_none() {
            assert!(state == before, "a refused call changed the state");
        }
        let before = state.clone();
        let (len, out_len) = (axis(source, 8), axis(source, 8));
        let (token, mut out) = (tensor(source, len), Array1::zeros(out_len));
        match tally.record(layer.step(&mut state, &token, &mut out)) {
            Some(()) => assert_finite(&out),
            None => assert!(
                state == before && out.iter().all(|&x| x == T::ZERO),
                "a refused step changed something"
            ),
        }
    }
    let shape = (source.below(3), source.below(5), axis(source, 8));
    let (x, masks) = (
        tensor(source, shape),
        Array2::from_elem((shape.0, axis(source, shape.1)), source.chance(0.5)),
    );
    tally.record(layer.forward_batch(&x, source.chance(0.5).then_some(&masks)));
}

/// The reference has doors too.
fn oracles(source: &mut Source<'_>, tally: &mut Tally) {
    let d = source.upto(5);
    let mut shape = |rows: usize, columns: usize| (axis(source, rows), axis(source, columns));
    let (x, y, v) = (shape(4, d), shape(5, d), shape(5, 3));
    let (x, y, v) = (
        tensor::<f64, _, _>(source, x),
        tensor::<f64, _, _>(source, y),
        tensor::<f64, _, _>(source, v),
    );
    let valid = mask(source, 5).unwrap_or_else(|| vec![true; 5]);
    let mut pairs = source
        .choose(&[Pairs::full(), Pairs::causal()])
        .with_valid(&valid)
        .with_log_decay(source.number());
    pairs.window = source.chance(0.5).then(|| (source.size(), source.below(3)));
    let mut map = PlainMap::new(d);
    if source.chance(0.2) {
        map.key.radii.push(1.0);
    }
    let (a, b) = (tally.record(map.query_log_features(&x)), tally.record(map.key_log_features(&y)));
    let (Some(a), Some(b), Some(scores)) = (a, b, tally.record(reference::scores(&x, &y))) else {
        return;
    };
    let Some(kernel) = tally.record(reference::log_kernel(&a, &b)) else { return };
    tally.record(reference::linear_attention(&scores, &kernel, &v, &pairs));
    tally.record(reference::softmax_attention(&scores, &v, &pairs));
    tally.record(reference::published_features(&x, &vec![1.0; d]));
    // Axes that cost nothing.
    let wide = Array2::<f64>::zeros((1 << 40, 0));
    tally.record(reference::scores(&wide, &wide));
    tally.record(reference::log_kernel(&wide, &wide));
}
