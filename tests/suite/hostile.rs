//! What nobody should send, by name: arrays whose axes cost nothing, sizes beyond memory, pipes for
//! files, callbacks that panic. `fuzz` tries everything else.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use dijiang::attention::{KeyMask, LinearConfig, Operator, Qkv, SoftmaxConfig, Storage, Window};
use dijiang::calibrate::CalibrateOptions;
use dijiang::checkpoint::{Checkpoint, Tensors};
use dijiang::kernel::{
    DctMap, DctMapConfig, DctParams, Envelope, FavorConfig, FeatureMap, Mixing, Pairing,
    published_features,
};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Padding,
    PublishedAttention, PublishedWeights, SoftmaxAttention, StatePool,
};
use dijiang::{Error, reference};
use dijiang_testing::stream::Stream;
use dijiang_testing::{argument, assert_same_bits};
use ndarray::{Array1, Array2, Array3, ArrayView2, ArrayView3, Axis, arr0, s};

/// Tokens that nobody can hold, but a view without strides has.
const ENDLESS: usize = 1 << 50;

fn matrix(p: usize, rows: usize, columns: usize) -> Array2<f32> {
    Array2::from_shape_fn((rows, columns), |(i, j)| ((i * 37 + j * p) % 17) as f32 / 17.0 - 0.3)
}

fn softmax() -> SoftmaxAttention<f32> {
    let weights =
        AttentionWeights::new(matrix(5, 8, 8), matrix(7, 8, 8), matrix(11, 8, 8), matrix(13, 8, 8));
    SoftmaxAttention::new(AttentionConfig::new(8, 2), weights).unwrap()
}

fn linear(window: Option<Window>) -> DijiangAttention<f32> {
    DijiangAttention::from_softmax(&softmax(), DijiangOptions::new().with_window(window)).unwrap()
}

fn published() -> PublishedAttention<f32> {
    let (softmax, ones) = (softmax(), Array1::ones(8));
    let weights = PublishedWeights::new(
        vec![1.0; 4],
        PublishedWeights::<f32>::decays(2),
        matrix(3, 8, 8),
        ones.clone(),
        ones,
    );
    PublishedAttention::new(softmax.config().clone(), softmax.weights().clone(), weights).unwrap()
}

fn text(n: usize) -> Array2<f32> {
    Array2::from_shape_fn((n, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f32 / 8.0 - 1.0)
}

#[track_caller]
fn too_large<T>(result: dijiang::Result<T>) {
    let error = result.map(|_| ()).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error:?}");
}

#[test]
fn endless_sequences_are_refused_at_once() {
    let zero = arr0(0.0_f32);
    let rows = |width: usize| -> ArrayView2<'_, f32> { zero.broadcast((ENDLESS, width)).unwrap() };
    let heads = |h: usize, width: usize| -> ArrayView3<'_, f32> {
        zero.broadcast((h, ENDLESS, width)).unwrap()
    };

    let map = DctMapConfig::new().build::<f32>(4).unwrap();
    too_large(map.query_log_features(&rows(4)));
    too_large(map.key_log_features(&rows(4)));
    too_large(published_features(&rows(4), &[1.0; 4]));
    let attention =
        LinearConfig::new().with_window(Window::new(4, 1)).build(vec![map.clone()]).unwrap();
    too_large(attention.forward(Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4))));
    let mut state = attention.new_state();
    too_large(attention.prefill(&mut state, Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4))));
    assert!(state == attention.new_state());
    let attention = LinearConfig::new().build(vec![map]).unwrap();
    too_large(attention.bidirectional().unwrap().forward(Qkv::new(
        &heads(1, 4),
        &heads(1, 4),
        &heads(1, 4),
    )));
    let exact = SoftmaxConfig::new(1, 4).build::<f32>().unwrap();
    too_large(exact.bidirectional().unwrap().forward(Qkv::new(
        &heads(1, 4),
        &heads(1, 4),
        &heads(1, 4),
    )));
    too_large(exact.forward(Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4))));
    too_large(
        exact.prefill(&mut exact.new_state(), Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4))),
    );
    too_large(exact.extend(
        &mut exact.new_state(),
        (&heads(1, 4), &heads(1, 4)),
        KeyMask::All,
        &mut exact.workspace(),
    ));
    too_large(attention.backward(Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4)), &heads(1, 4)));
    too_large(
        attention
            .bidirectional()
            .unwrap()
            .backward(Qkv::new(&heads(1, 4), &heads(1, 4), &heads(1, 4)), &heads(1, 4)),
    );

    fn layer<A: Attention<f32>>(layer: &A, rows: ArrayView2<'_, f32>, batch: ArrayView3<'_, f32>) {
        too_large(layer.forward(&rows, KeyMask::All));
        too_large(layer.prefill(&mut layer.new_state(), &rows, KeyMask::All));
        too_large(layer.forward_batch(&batch, None));
        let whole = [0, ENDLESS];
        too_large(layer.forward_packed(&rows, &whole, KeyMask::All));
        let packed = &mut [&mut layer.new_state()];
        too_large(layer.prefill_packed(packed, &rows, &whole, KeyMask::All));
        // A few tokens of their own, and endless padding.
        for padding in [Padding::Left, Padding::Right] {
            for lengths in [[3, 0, 1], [ENDLESS, 3, 0], [0; 3]] {
                too_large(layer.forward_padded(&batch, &lengths, padding));
                let states = &mut [(); 3].map(|()| layer.new_state());
                too_large(layer.prefill_padded(&mut states.each_mut(), &batch, &lengths, padding));
            }
        }
    }
    layer(&softmax(), rows(8), heads(3, 8));
    layer(&linear(None), rows(8), heads(3, 8));
    layer(&published(), rows(8), heads(3, 8));
    too_large(softmax().project_at(&rows(8), 0));
    too_large(linear(None).backward(&rows(8), KeyMask::All, &rows(8)));
    too_large(
        linear(None).calibrate(&[rows(8)], &CalibrateOptions::new(), |_| ControlFlow::Continue(())),
    );
    let wide = Array2::<f64>::zeros((1 << 40, 0));
    too_large(reference::scores(&wide, &wide));
    too_large(reference::log_kernel(&wide, &wide));
}

/// What may be repeated without strides gives what its copy gives.
#[test]
fn repeated_rows_are_rows() {
    let row = text(1);
    let repeated = row.broadcast((70, 8)).unwrap();
    let copied = repeated.to_owned();
    for window in [None, Some(Window::new(8, 1))] {
        let layer = linear(window);
        let (got, expected) = (
            layer.forward(&repeated, KeyMask::All).unwrap(),
            layer.forward(&copied, KeyMask::All).unwrap(),
        );
        assert_same_bits("repeated", &got, &expected);
    }
    let map = DctMapConfig::new().build::<f32>(8).unwrap();
    let attention = LinearConfig::new().build(vec![map]).unwrap();
    let (views, copies) = (repeated.insert_axis(Axis(0)), copied.clone().insert_axis(Axis(0)));
    let got = attention.forward(Qkv::new(&views, &views, &views)).unwrap();
    assert_same_bits(
        "heads",
        &got,
        &attention.forward(Qkv::new(&copies, &copies, &copies)).unwrap(),
    );
    // Keys and values of one memory, and a column that is one number.
    let column = row.slice(s![.., ..1]).to_owned();
    let flat = column.broadcast((70, 8)).unwrap();
    assert_same_bits(
        "flat",
        &linear(None).forward(&flat, KeyMask::All).unwrap(),
        &linear(None).forward(&flat.to_owned(), KeyMask::All).unwrap(),
    );
}

/// One size beyond memory after the other, each of which must be refused before anything is taken.
#[test]
fn sizes_beyond_memory() {
    for size in [1 << 40, usize::MAX / 2 + 1, usize::MAX] {
        too_large(DctMapConfig::new().params(size));
        too_large(DctMapConfig::new().with_blocks(size).params(4));
        too_large(FavorConfig::new(size, 1).params());
        too_large(FavorConfig::new(4, size).params());
        assert_eq!(DctParams::new(size), DctParams::new(0));
        assert!(DctMap::<f64>::from_params(DctParams::new(size)).is_err());
        assert!(DctParams::new(size).to_dense().is_err());
        too_large(DijiangAttention::from_softmax(
            &softmax(),
            DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(size)),
        ));
        too_large(DijiangAttention::from_softmax(
            &softmax(),
            DijiangOptions::new().with_window(Some(Window::new(size, 1))),
        ));
        too_large(DijiangAttention::from_softmax(
            &softmax(),
            DijiangOptions::new().with_window(Some(Window::new(1, size))),
        ));
        too_large(StatePool::new(&linear(None), size));
        assert!(PublishedWeights::<f32>::decays(size).is_empty());
        too_large(AttentionConfig::new(size, 1).with_head_dim(size).check());
    }
    // Each within its own limit, too much together.
    let map = DctMapConfig::new().build::<f32>(4).unwrap();
    too_large(
        LinearConfig::new()
            .with_window(Window::new(1 << 20, 0))
            .with_value_dim(1 << 20)
            .build(vec![map.clone()]),
    );
    too_large(LinearConfig::new().with_window(Window::new(1 << 20, 0)).build(vec![map; 1 << 10]));
}

/// Scales and decays with which numbers in range would overflow.
#[test]
fn numbers_beyond_sense() {
    let build = |config: LinearConfig| {
        config.build(vec![DctMapConfig::new().build::<f32>(4).unwrap()]).map(|_| ()).unwrap_err()
    };
    for scale in [1e7, 1e30, f64::MAX, 0.0, f64::NAN] {
        assert_eq!(argument(&build(LinearConfig::new().with_scale(scale))), "scale");
        assert_eq!(
            argument(
                &SoftmaxConfig::new(1, 4).with_scale(scale).build::<f32>().map(|_| ()).unwrap_err()
            ),
            "scale"
        );
    }
    for decay in [-1e16, -1e300, f64::NEG_INFINITY, 1e-9] {
        assert_eq!(argument(&build(LinearConfig::new().with_log_decay(vec![decay]))), "log_decay");
    }
}

/// Old keys whose weights no number holds are all there is to see, however large their exponents.
#[test]
fn strongest_decay_over_masked_keys() {
    for (decay, chunk) in [(-1e9, 1), (-1e15, 1), (-1e12, 3)] {
        let mut params = DctParams::new(2);
        params.log_mix = 120.0;
        let map = DctMap::<f32>::from_params(params).unwrap();
        let config =
            LinearConfig::new().with_window(Window::new(chunk, 0)).with_log_decay(vec![decay]);
        let attention = config.build(vec![map]).unwrap();
        let ones = Array3::<f32>::ones((1, 12, 2));
        let valid: Vec<bool> = (0..12).map(|j| j == 0).collect();
        let out = attention
            .forward(Qkv::new(&ones, &ones, &(&ones * 3.0)).with_mask(KeyMask::Valid(&valid)))
            .unwrap();
        assert!(out.iter().all(|&o| (o - 3.0).abs() < 1e-4), "decay {decay}: {out:?}");
    }
}

/// What the published layer's gate makes too large is refused, and its state stays.
#[test]
fn published_gates_beyond_the_range() {
    let base = published();
    let weights = PublishedWeights::new(
        vec![1.0; 4],
        PublishedWeights::<f32>::decays(2),
        matrix(3, 8, 8) * 1e14,
        Array1::from_elem(8, 1e15),
        Array1::ones(8),
    );
    let layer =
        PublishedAttention::new(base.config().clone(), base.weights().clone(), weights).unwrap();
    let mut state = layer.new_state();
    let x = text(5) * 1e12;
    assert!(matches!(layer.prefill(&mut state, &x, KeyMask::All), Err(Error::NonFinite { .. })));
    assert!(matches!(
        layer.step(&mut state, &x.row(0), &mut Array1::zeros(8)),
        Err(Error::NonFinite { .. })
    ));
    assert!(state == layer.new_state());
}

/// Panics of a callback go through, and leave the layer as it was.
#[test]
fn callbacks_that_panic() {
    let sample = text(60);
    for at in [1, 2, 5, 8, 10] {
        let mut layer = linear(Some(Window::new(8, 1)));
        let before = layer.forward(&sample, KeyMask::All).unwrap();
        let mut calls = 0;
        let options = CalibrateOptions::new().with_steps(2);
        let run = catch_unwind(AssertUnwindSafe(|| {
            layer.calibrate(&[sample.view()], &options, |_| {
                calls += 1;
                assert!(calls < at, "the callback's own");
                ControlFlow::Continue(())
            })
        }));
        assert!(run.is_err(), "call {at}");
        assert_same_bits("after a panic", &layer.forward(&sample, KeyMask::All).unwrap(), &before);
        layer.calibrate(&[sample.view()], &options, |_| ControlFlow::Continue(())).unwrap();
    }
    // So does the panic of a loss, and threads go on working.
    let layer = linear(None);
    let run = catch_unwind(AssertUnwindSafe(|| {
        layer.backward_with(&sample, KeyMask::All, |_| panic!("the loss's own"))
    }));
    assert!(run.is_err());
    layer.forward(&sample, KeyMask::All).unwrap();
}

/// States, caches, slots and scratch of another layer.
#[test]
fn foreign_states() {
    let (layer, other) = (linear(None), linear(Some(Window::new(8, 1))));
    let x = text(3);
    let foreign = |error: Error| assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
    foreign(layer.prefill(&mut other.new_state(), &x, KeyMask::All).unwrap_err());
    foreign(layer.step(&mut other.new_state(), &x.row(0), &mut Array1::zeros(8)).unwrap_err());
    foreign(
        layer
            .step_batch(
                &mut [&mut other.new_state()],
                &x.slice(s![..1, ..]),
                &mut Array2::zeros((1, 8)),
            )
            .unwrap_err(),
    );
    foreign(layer.new_state().copy_from(&other.new_state()).unwrap_err());
    // The same key-value heads, and more query heads.
    let more = {
        let (wide, narrow) = (|p| matrix(p, 16, 8), |p| matrix(p, 8, 8));
        let weights = AttentionWeights::new(wide(3), narrow(5), narrow(7), matrix(9, 8, 16));
        let config = AttentionConfig::new(8, 4).with_kv_heads(2).with_head_dim(4);
        let softmax = SoftmaxAttention::new(config, weights).unwrap();
        DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_window(None)).unwrap()
    };
    foreign(more.prefill(&mut layer.new_state(), &x, KeyMask::All).unwrap_err());
    foreign(
        more.prefill_packed(&mut [&mut layer.new_state()], &x, &[0, 3], KeyMask::All).unwrap_err(),
    );
    let mut pool = StatePool::new(&other, 2).unwrap();
    let slot = pool.take().unwrap();
    let mut another = StatePool::new(&other, 2).unwrap();
    another.take().unwrap();
    assert!(matches!(another.get(slot), Err(Error::Value { argument: "slot", .. })));
    assert!(pool.clone().get(slot).is_ok());
    foreign(
        pool.step(&layer, &[slot], &x.slice(s![..1, ..]), &mut Array2::zeros((1, 8))).unwrap_err(),
    );
    let small = {
        let eye = || Array2::<f32>::eye(4);
        let softmax = SoftmaxAttention::new(
            AttentionConfig::new(4, 1),
            AttentionWeights::new(eye(), eye(), eye(), eye()),
        )
        .unwrap();
        softmax.new_state()
    };
    foreign(softmax().prefill(&mut small.clone(), &x, KeyMask::All).unwrap_err());
}

/// Operators of one shape that differ in one number or choice only: each takes the states of an
/// equal one built anew, and of no other, in every method.
#[test]
fn states_of_other_maps() {
    let config = || DctMapConfig::new().with_blocks(2);
    let params = || config().params(4).unwrap();
    let changed = |change: fn(&mut DctParams)| {
        let mut params = params();
        change(&mut params);
        params
    };
    let maps: Vec<DctParams> = vec![
        params(),
        config().with_seed(1).params(4).unwrap(),
        config().with_mixing(Mixing::Mixed).params(4).unwrap(),
        params().to_deep(),
        params().to_dense().unwrap(),
        DctMapConfig::new().with_pairing(Pairing::Antithetic).params(4).unwrap(),
        changed(|params| params.envelope = Envelope::Gaussian),
        changed(|params| params.query.center[3] = 1e-3),
        changed(|params| params.key.center[3] = 1e-3),
        changed(|params| params.query.scale[7] *= 1.001),
        changed(|params| params.key.scale[7] *= 1.001),
        changed(|params| params.query.radii[7] *= 1.001),
        changed(|params| params.key.radii[7] *= 1.001),
        changed(|params| params.log_weight[7] += 1e-3),
        changed(|params| params.log_mix = 1e-3),
    ];
    let window = || LinearConfig::new().with_window(Window::new(2, 1)).with_sinks(1);
    let build = |config: LinearConfig, params: &DctParams| {
        config.build(vec![DctMap::<f32>::from_params(params.clone()).unwrap()]).unwrap()
    };
    let all = || {
        let others = [window().with_log_decay(vec![-0.1]), window().with_scale(0.25)];
        let others = others.map(|config| build(config, &params()));
        maps.iter().map(|params| build(window(), params)).chain(others).collect::<Vec<_>>()
    };
    let x = text(5).insert_axis(Axis(0)).slice_move(s![.., .., ..4]);
    let token = x.slice(s![.., 0, ..]);
    for (i, own) in all().iter().enumerate() {
        for (j, attention) in all().iter().enumerate() {
            let mut fed = own.new_state();
            own.prefill(&mut fed, Qkv::new(&x, &x, &x)).unwrap();
            let (state, workspace) = (|| fed.clone(), &mut attention.workspace());
            let (mut a, mut b, mut out) = (state(), state(), Array2::zeros((1, 4)));
            let mut next = attention.new_state_at(5).unwrap();
            let results = [
                attention.check_state(&fed),
                attention.prefill(&mut state(), Qkv::new(&x, &x, &x)).map(|_| ()),
                attention
                    .prefill_packed(
                        &mut [&mut a, &mut b],
                        Qkv::new(&x, &x, &x).with_offsets(&[0, 2, 5]),
                    )
                    .map(|_| ()),
                attention
                    .prefill_partial(&mut state(), Qkv::new(&x, &x, &x), workspace)
                    .map(|_| ()),
                attention.extend(&mut state(), (&x, &x), KeyMask::All, workspace),
                attention.step(
                    &mut state(),
                    Qkv::token(&token, &token, &token),
                    &mut out,
                    workspace,
                ),
                attention.prefill_backward(&fed, Qkv::new(&x, &x, &x), &x, None).map(|_| ()),
                attention.merge(&mut state(), &next, workspace),
                attention.merge(&mut attention.new_state(), &own.new_state(), workspace),
                next.copy_from(&fed),
                attention.state_from_bytes(&fed.to_bytes(Storage::Exact)).map(|_| ()),
            ];
            for (method, result) in results.into_iter().enumerate() {
                let refused = matches!(result, Err(Error::Foreign { what: "fingerprint", .. }));
                let right = if i == j { result.is_ok() } else { refused };
                assert!(right, "state of {i} in {j}, method {method}: {result:?}");
            }
        }
    }
}

/// Layers of one shape, and what is made of their states.
#[test]
fn states_of_layers_with_other_maps() {
    let layer = |seed: u64| {
        let options = DijiangOptions::new()
            .with_window(Window::new(8, 1))
            .with_map(DctMapConfig::new().with_seed(seed));
        DijiangAttention::from_softmax(&softmax(), options).unwrap()
    };
    let (own, twin, other, x) = (layer(0), layer(0), layer(1), text(3));
    let row = x.slice(s![..1, ..]);
    let mut pool = StatePool::new(&own, 2).unwrap();
    let slot = pool.take().unwrap();
    pool.step(&twin, &[slot], &row, &mut Array2::zeros((1, 8))).unwrap();
    let state = pool.get(slot).unwrap().clone();
    let mut out = Array2::zeros((1, 8));
    for result in [
        pool.step(&other, &[slot], &row, &mut out),
        other.step_batch(&mut [&mut state.clone()], &row, &mut out),
        other.step(&mut state.clone(), &x.row(0), &mut Array1::zeros(8)),
        other.prefill(&mut state.clone(), &x, KeyMask::All).map(|_| ()),
        other.prefill_packed(&mut [&mut state.clone()], &x, &[0, 3], KeyMask::All).map(|_| ()),
        other.extend(&mut state.clone(), &x, KeyMask::All),
        other.merge(&mut state.clone(), &other.new_state_at(1).unwrap()),
        other.resume(state.attention().clone()).map(|_| ()),
        other.state_from_bytes(&state.to_bytes(Storage::Exact)).map(|_| ()),
        // Maps that were exchanged.
        own.clone()
            .with_maps(other.maps().to_vec())
            .unwrap()
            .resume(state.attention().clone())
            .map(|_| ()),
        own.clone()
            .with_log_decay(vec![-0.1; 2])
            .unwrap()
            .resume(state.attention().clone())
            .map(|_| ()),
    ] {
        assert!(matches!(result, Err(Error::Foreign { what: "fingerprint", .. })), "{result:?}");
    }
    twin.step(&mut state.clone(), &x.row(0), &mut Array1::zeros(8)).unwrap();
    let mut moved = twin.state_from_bytes(&state.to_bytes(Storage::Exact)).unwrap();
    twin.with_weights(softmax().weights().as_ref().clone())
        .unwrap()
        .prefill(&mut moved, &x, KeyMask::All)
        .unwrap();

    let published = |radius: f64, decay: f64| {
        let base = published();
        let mut weights = base.published_weights().as_ref().clone();
        (weights.radii[1], weights.log_decay[0]) = (radius, decay);
        PublishedAttention::new(base.config().clone(), base.weights().clone(), weights).unwrap()
    };
    let own = published(1.0, -0.1);
    let mut state = own.new_state();
    published(1.0, -0.1).prefill(&mut state, &x, KeyMask::All).unwrap();
    for other in [published(1.5, -0.1), published(1.0, -0.2)] {
        let results = [
            other.prefill(&mut state, &x, KeyMask::All).map(|_| ()),
            other.step(&mut state, &x.row(0), &mut Array1::zeros(8)),
        ];
        for result in results {
            assert!(
                matches!(result, Err(Error::Foreign { what: "fingerprint", .. })),
                "{result:?}"
            );
        }
    }
}

/// A directory of its own, gone at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path =
            std::env::temp_dir().join(format!("dijiang-hostile-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Files that are none: directories, and on Unix endless devices and pipes nobody writes to.
#[test]
fn files_that_are_none() {
    let directory = Directory::new("none");
    let refused = |directory: &Path| {
        let error = Checkpoint::open(directory).map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::Io { .. } | Error::Format { .. }), "{error:?}");
    };
    refused(&directory.0);
    let config = directory.0.join("config.json");
    std::fs::create_dir(&config).unwrap();
    refused(&directory.0);
    std::fs::remove_dir(&config).unwrap();
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("/dev/zero", &config).unwrap();
        refused(&directory.0);
        std::fs::remove_file(&config).unwrap();
        let pipe = directory.0.join("model.safetensors");
        if std::process::Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .is_ok_and(|status| status.success())
        {
            let error = Tensors::open_file(&pipe).map(|_| ()).unwrap_err();
            assert!(matches!(error, Error::Io { .. }), "{error:?}");
        }
        std::os::unix::fs::symlink(&pipe, &config).unwrap();
        refused(&directory.0);
    }
    // A file of no bytes, and one that is all header.
    let file = directory.0.join("empty");
    for bytes in [&[][..], &[0; 8], &u64::MAX.to_le_bytes(), &[2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}']]
    {
        std::fs::write(&file, bytes).unwrap();
        if let Ok(tensors) = Tensors::open_file(&file) {
            assert!(tensors.matrix::<f32>("q", usize::MAX, usize::MAX).is_err());
        }
    }
}
