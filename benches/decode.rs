//! One more token after n: a state of constant size against a cache of keys and values. Time is for
//! all 8 heads. And one more token of each of many sequences, and short prompts of many.
#![allow(missing_docs)]

mod common;

use std::hint::black_box;

use common::{gaussian, id, linear};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use dijiang::Real;
use dijiang::attention::{KeyMask, Operator, Qkv, SoftmaxConfig, Window};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    SoftmaxAttention,
};
use ndarray::{Array2, Axis};

const HEADS: usize = 8;

fn token<T: Real>(c: &mut Criterion, n: usize, d: usize) {
    let shape = (HEADS, n, d);
    let (q, k, v) = (gaussian::<T>(1, shape), gaussian::<T>(2, shape), gaussian::<T>(3, shape));
    let one = |x: &ndarray::Array3<T>| x.index_axis(Axis(1), n / 2).to_owned();
    let (q1, k1, v1) = (one(&q), one(&k), one(&v));
    let mut out = Array2::<T>::zeros((HEADS, d));
    let mut group = c.benchmark_group("decode");
    for (name, window) in [("pure", false), ("window", true)] {
        let operator = linear::<T>(HEADS, d, window);
        let (mut state, mut ws) = (operator.new_state(), operator.workspace());
        operator.prefill(&mut state, Qkv::new(&q, &k, &v)).expect("valid input");
        operator
            .step(&mut state, Qkv::token(&q1, &k1, &v1), &mut out, &mut ws)
            .expect("valid input");
        assert!(out.iter().all(|x| x.to_f64().is_finite()));
        group.bench_function(format!("{name}/{}", id::<T>(n, d, d)), |b| {
            b.iter(|| {
                operator.step(&mut state, Qkv::token(black_box(&q1), &k1, &v1), &mut out, &mut ws)
            });
        });
    }
    let exact = SoftmaxConfig::new(HEADS, d).build::<T>().expect("a valid operator");
    let (mut cache, mut ws) = (exact.new_state(), exact.workspace());
    exact.extend(&mut cache, (&k, &v), KeyMask::All, &mut ws).expect("valid input");
    group.bench_function(format!("softmax/{}", id::<T>(n, d, d)), |b| {
        b.iter_batched_ref(
            || cache.clone(),
            |cache| exact.step(cache, Qkv::token(black_box(&q1), &k1, &v1), &mut out, &mut ws),
            BatchSize::LargeInput,
        );
    });
    group.finish();
}

fn decode(c: &mut Criterion) {
    let longest = if std::env::args().any(|arg| arg == "--test") || cfg!(debug_assertions) {
        256
    } else {
        8192
    };
    for n in [64, 256, 1024, 8192].into_iter().filter(|&n| n <= longest) {
        token::<f32>(c, n, 64);
    }
    token::<f64>(c, 256, 64);
}

/// A layer of [`HEADS`] heads of 64.
fn layer(window: Option<Window>) -> DijiangAttention<f32> {
    let width = 64 * HEADS;
    let matrix = |seed| {
        gaussian::<f32>(seed, (1, width, width)).index_axis_move(Axis(0), 0) / (width as f32).sqrt()
    };
    let weights = AttentionWeights::new(matrix(1), matrix(2), matrix(3), matrix(4));
    let softmax =
        SoftmaxAttention::new(AttentionConfig::new(width, HEADS), weights).expect("valid weights");
    DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_window(window))
        .expect("a causal layer")
}

/// A token of each of 32 sequences, through the layer: together, and one sequence after another. On
/// one thread.
fn batch(c: &mut Criterion) {
    const SLOTS: usize = 32;
    let width = 64 * HEADS;
    let x = gaussian::<f32>(5, (1, SLOTS, width)).index_axis_move(Axis(0), 0);
    let mut out = Array2::zeros((SLOTS, width));
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let mut group = c.benchmark_group("step_batch");
    for (name, window) in [("pure", None), ("window", Some(Window::new(64, 1)))] {
        let layer = layer(window);
        let mut states: Vec<_> = (0..SLOTS).map(|_| layer.new_state()).collect();
        group.bench_function(format!("{name}/separate/{SLOTS}"), |b| {
            b.iter(|| {
                for (i, state) in states.iter_mut().enumerate() {
                    layer
                        .step(state, black_box(&x.row(i)), &mut out.row_mut(i))
                        .expect("valid input");
                }
            });
        });
        group.bench_function(format!("{name}/together/{SLOTS}"), |b| {
            let mut states: Vec<_> = states.iter_mut().collect();
            one_thread.install(|| {
                b.iter(|| {
                    layer.step_batch(&mut states, black_box(&x), &mut out).expect("valid input")
                })
            });
        });
    }
    group.finish();
}

/// Prompts of 20 tokens of 32 sequences, through the layer: packed, and one after another. On one
/// thread.
fn packed(c: &mut Criterion) {
    const SLOTS: usize = 32;
    const TOKENS: usize = 20;
    let layer = layer(Some(Window::new(64, 1)));
    let x = gaussian::<f32>(6, (1, SLOTS * TOKENS, 64 * HEADS)).index_axis_move(Axis(0), 0);
    let offsets: Vec<usize> = (0..=SLOTS).map(|i| i * TOKENS).collect();
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread");
    let mut group = c.benchmark_group("forward_packed");
    group.bench_function(format!("separate/{SLOTS}x{TOKENS}"), |b| {
        one_thread.install(|| {
            b.iter(|| {
                for x in x.axis_chunks_iter(Axis(0), TOKENS) {
                    black_box(layer.forward(&x, KeyMask::All).expect("valid input"));
                }
            });
        });
    });
    group.bench_function(format!("together/{SLOTS}x{TOKENS}"), |b| {
        one_thread.install(|| {
            b.iter(|| {
                layer.forward_packed(black_box(&x), &offsets, KeyMask::All).expect("valid input")
            })
        });
    });
    group.finish();
}

criterion_group!(benches, decode, batch, packed);
criterion_main!(benches);
