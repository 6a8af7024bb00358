//! Decoding with a linear layer asks the allocator for nothing, at any position.

#![allow(clippy::unwrap_used, unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dijiang::Real;
use dijiang::attention::{KeyMask, Window};
use dijiang::kernel::{DctMapConfig, Pairing};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use ndarray::{Array1, Array2, s};

/// Counts what this thread asks for.
struct Counting;

thread_local! {
    static REQUESTS: Cell<usize> = const { Cell::new(0) };
}

fn count() {
    // A thread that is going away has nothing to count any more.
    let _ = REQUESTS.try_with(|requests| requests.set(requests.get() + 1));
}

// SAFETY: everything is handed to the system allocator as it comes.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's obligations are those of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn requests(work: impl FnOnce()) -> usize {
    let before = REQUESTS.get();
    work();
    REQUESTS.get() - before
}

fn steps_do_not_allocate<T: Real>() {
    let matrix = |rows, cols| {
        Array2::from_shape_fn((rows, cols), |(i, j)| {
            T::from_f64(((i * 37 + j * 11) % 19) as f64 / 40.0 - 0.2)
        })
    };
    let bias = |len| Array1::from_shape_fn(len, |i| T::from_f64((i % 5) as f64 / 5.0));
    let weights =
        AttentionWeights::new(matrix(40, 24), matrix(20, 24), matrix(20, 24), matrix(24, 40));
    let weights = weights.with_biases(bias(40), bias(20), bias(20), bias(24));
    let config = AttentionConfig::new(24, 4)
        .with_kv_heads(2)
        .with_head_dim(10)
        .with_rotary(Rotary::new(100.0).with_dims(6));
    let softmax = SoftmaxAttention::new(config, weights).unwrap();
    let windows = [Window::new(8, 1), Window::new(64, 1), Window::new(8, 1).with_kept(9)];
    for window in [None].into_iter().chain(windows.map(Some)) {
        let options = DijiangOptions::new()
            .with_window(window)
            .with_map(DctMapConfig::new().with_pairing(Pairing::Antithetic))
            .with_log_decay(-0.01);
        let layer = DijiangAttention::from_softmax(&softmax, options).unwrap();
        let x = matrix(300, 24);
        let (mut state, mut out) = (layer.new_state(), Array1::zeros(24));
        layer.prefill(&mut state, &x.slice(s![..50, ..]), KeyMask::All).unwrap();
        let allocated = requests(|| {
            for row in x.outer_iter() {
                layer.step(&mut state, &row, &mut out).unwrap();
            }
            for row in strided(&x) {
                layer.step(&mut state, &row, &mut out).unwrap();
            }
            state.reset();
            layer.step(&mut state, &x.row(0), &mut out).unwrap();
        });
        assert_eq!(allocated, 0, "{} {window:?}", T::NAME);
        assert!(requests(|| drop(layer.new_state())) > 0, "the counter counts");
    }
}

/// Rows of a transposed matrix: elements that do not lie one after another.
fn strided<T: Real>(x: &Array2<T>) -> impl Iterator<Item = ndarray::ArrayView1<'_, T>> {
    x.columns().into_iter().map(|column| column.slice_move(s![..24]))
}

#[test]
fn single_precision() {
    steps_do_not_allocate::<f32>();
}

#[test]
fn double_precision() {
    steps_do_not_allocate::<f64>();
}
