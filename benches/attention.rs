//! Whole sequences, one thread, 8 heads: linear (pure, with a local window, full; forward and
//! backward) against softmax (tiled, and the literal formula while it is bearable).
#![allow(missing_docs)]

mod common;

use std::hint::black_box;

use common::{gaussian, id, linear};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dijiang::attention::{Causality, Operator, Qkv, SoftmaxConfig};
use dijiang::{Real, reference};
use ndarray::{Array3, Axis};

const HEADS: usize = 8;

fn sequences<T: Real>(c: &mut Criterion, n: usize, d: usize) {
    let shape = (HEADS, n, d);
    let (q, k, v) = (gaussian::<T>(1, shape), gaussian::<T>(2, shape), gaussian::<T>(3, shape));
    let (grad, mut out) = (gaussian::<T>(4, shape), Array3::<T>::zeros(shape));
    let name = id::<T>(n, d, d);
    let (pure, window, exact) = (
        linear::<T>(HEADS, d, false),
        linear::<T>(HEADS, d, true),
        SoftmaxConfig::new(HEADS, d).build::<T>(),
    );
    let exact = exact.expect("a valid operator");

    // Within the local window the linear operator is softmax attention: both must agree there
    // before anything is timed.
    let (short, softmax) =
        (window.forward(Qkv::new(&q, &k, &v)), exact.forward(Qkv::new(&q, &k, &v)));
    let (short, softmax) = (short.expect("valid input"), softmax.expect("valid input"));
    let rows = n.min(2 * common::CHUNK);
    for (a, b) in short
        .slice_axis(Axis(1), (..rows).into())
        .iter()
        .zip(softmax.slice_axis(Axis(1), (..rows).into()))
    {
        assert!((a.to_f64() - b.to_f64()).abs() < 1e-4, "{a} is not {b}");
    }

    let mut group = c.benchmark_group("causal");
    group.throughput(Throughput::Elements((HEADS * n) as u64)).sample_size(10);
    let (mut ws, mut state) = (pure.workspace(), pure.new_state());
    group.bench_function(format!("pure/{name}"), |b| {
        b.iter(|| {
            state.reset();
            pure.prefill_into(&mut [&mut state], Qkv::new(black_box(&q), &k, &v), &mut out, &mut ws)
        });
    });
    let (mut ws, mut state) = (window.workspace(), window.new_state());
    group.bench_function(format!("window/{name}"), |b| {
        b.iter(|| {
            state.reset();
            window.prefill_into(
                &mut [&mut state],
                Qkv::new(black_box(&q), &k, &v),
                &mut out,
                &mut ws,
            )
        });
    });
    for (mode, linear) in [("pure", &pure), ("window", &window)] {
        let (mut gradients, mut ws) =
            (linear.new_gradients(n, n).expect("room for them"), linear.backward_workspace());
        group.bench_function(format!("{mode}_backward/{name}"), |b| {
            b.iter(|| {
                linear.backward_into(
                    Qkv::new(black_box(&q), &k, &v),
                    &grad,
                    &mut gradients,
                    &mut ws,
                )
            });
        });
    }
    let mut ws = exact.workspace();
    group.bench_function(format!("softmax_tiled/{name}"), |b| {
        b.iter(|| exact.forward_into(Qkv::new(black_box(&q), &k, &v), &mut out, &mut ws));
    });
    if n <= 512 && T::NAME == "f64" {
        let root_scale = (d as f64).powf(-0.25);
        let [x, y, v] = [(&q, root_scale), (&k, root_scale), (&v, 1.0)]
            .map(|(x, scale)| x.mapv(|x| x.to_f64() * scale));
        group.bench_function(format!("softmax_naive/{name}"), |b| {
            b.iter(|| {
                for ((x, y), v) in x.outer_iter().zip(y.outer_iter()).zip(v.outer_iter()) {
                    let scores = reference::scores(&x, &y).expect("valid input");
                    black_box(
                        reference::softmax_attention(&scores, &v, &reference::Pairs::causal())
                            .expect("valid input"),
                    );
                }
            });
        });
    }
    group.finish();

    let pure = pure.with_causality(Causality::Bidirectional).expect("a valid operator");
    let exact = SoftmaxConfig::new(HEADS, d).with_causality(Causality::Bidirectional).build::<T>();
    let exact = exact.expect("a valid operator");
    let mut group = c.benchmark_group("full");
    group.throughput(Throughput::Elements((HEADS * n) as u64)).sample_size(10);
    let mut ws = pure.workspace();
    group.bench_function(format!("linear/{name}"), |b| {
        b.iter(|| pure.forward_into(Qkv::new(black_box(&q), &k, &v), &mut out, &mut ws));
    });
    let (mut gradients, mut ws) =
        (pure.new_gradients(n, n).expect("room for them"), pure.backward_workspace());
    group.bench_function(format!("linear_backward/{name}"), |b| {
        b.iter(|| {
            pure.backward_into(Qkv::new(black_box(&q), &k, &v), &grad, &mut gradients, &mut ws)
        });
    });
    let mut ws = exact.workspace();
    group.bench_function(format!("softmax_tiled/{name}"), |b| {
        b.iter(|| exact.forward_into(Qkv::new(black_box(&q), &k, &v), &mut out, &mut ws));
    });
    group.finish();
}

fn attention(c: &mut Criterion) {
    rayon::ThreadPoolBuilder::new()
        .num_threads(1)
        .build_global()
        .expect("the first to ask for a pool");
    // In test mode (`-- --test`) the long sequences would only cost time.
    let longest = if std::env::args().any(|arg| arg == "--test") || cfg!(debug_assertions) {
        256
    } else {
        8192
    };
    for n in [64, 128, 256, 512, 1024, 2048, 4096, 8192].into_iter().filter(|&n| n <= longest) {
        sequences::<f32>(c, n, 64);
    }
    for d in [32, 80, 96, 128] {
        sequences::<f32>(c, longest.min(1024), d);
    }
    sequences::<f64>(c, longest.min(512), 64);
}

criterion_group!(benches, attention);
criterion_main!(benches);
