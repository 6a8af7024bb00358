//! What nobody should send, by name: arrays whose axes cost nothing, sizes beyond memory, pipes for
//! files, callbacks that panic. `fuzz` tries everything else.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use crate::common::stream::Stream;
use crate::common::{argument, assert_same_bits};
use dijiang::attention::{KeyMask, LinearConfig, Operator, Qkv, SoftmaxConfig, Window};
use dijiang::calibrate::CalibrateOptions;
use dijiang::checkpoint::{Checkpoint, Tensors};
use dijiang::kernel::{
    DctMap, DctMapConfig, DctParams, FavorConfig, FeatureMap, published_features,
};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    PublishedAttention, PublishedWeights, SoftmaxAttention, StatePool,
};
use dijiang::{Error, reference};
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

    let map = DctMapConfig::new(4).build::<f32>().unwrap();
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
    let map = DctMapConfig::new(8).build::<f32>().unwrap();
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
        too_large(DctMapConfig::new(size).params());
        too_large(DctMapConfig::new(4).with_blocks(size).params());
        too_large(FavorConfig::new(size, 1).params());
        too_large(FavorConfig::new(4, size).params());
        assert_eq!(DctParams::new(size), DctParams::new(0));
        assert!(DctMap::<f64>::from_params(DctParams::new(size)).is_err());
        assert!(DctParams::new(size).to_dense().is_err());
        too_large(DijiangAttention::from_softmax(
            &softmax(),
            DijiangOptions::new().with_blocks(size),
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
    let map = DctMapConfig::new(4).build::<f32>().unwrap();
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
        config.build(vec![DctMapConfig::new(4).build::<f32>().unwrap()]).map(|_| ()).unwrap_err()
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
