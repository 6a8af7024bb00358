//! What must not allocate does not: counted by the global allocator, for each thread by itself.
#![allow(unsafe_code, reason = "a global allocator is unsafe by nature")]
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use dijiang::Real;
use dijiang::attention::{KeyMask, Operator, Qkv};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    SoftmaxAttention, StatePool,
};
use dijiang_testing::linear::Setup;
use dijiang_testing::stream::Stream;
use dijiang_testing::{Inputs, Random};
use ndarray::{Array2, Array3};

/// The system's allocator, with a count of what it was asked for.
struct Counting;

thread_local! {
    static CALLS: Cell<usize> = const { Cell::new(0) };
    static HELD: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn record(calls: usize, bytes: isize) {
    CALLS.set(CALLS.get() + calls);
    HELD.set(HELD.get() + bytes);
    PEAK.set(PEAK.get().max(HELD.get()));
}

// SAFETY: every request goes to the system's allocator unchanged; the counters are thread-local,
// need no allocation and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        record(1, layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        record(1, layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        record(1, size as isize - layout.size() as isize);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        record(0, -(layout.size() as isize));
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Allocations during `work`, and by how many bytes it went above what was held before.
fn measure(work: impl FnOnce()) -> (usize, usize) {
    let (calls, held) = (CALLS.get(), HELD.get());
    PEAK.set(held);
    work();
    (CALLS.get() - calls, (PEAK.get() - held) as usize)
}

/// On one thread, where all work is counted.
fn on_one_thread(work: impl FnOnce() + Send) {
    #[cfg(feature = "rayon")]
    rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap().install(work);
    #[cfg(not(feature = "rayon"))]
    work();
}

fn setups() -> Vec<Setup> {
    vec![
        Setup::new(1),
        Setup::new(2).decay(-0.5),
        Setup::new(3).window(16, 1),
        Setup::new(4).window(100, 0).decay(-0.1),
        Setup::new(5).heads(4, 2).sizes(64, 64, 64).window(64, 1),
        Setup::new(6).heads(4, 2).window(8, 0).uneven().kept(11).decay(-0.05),
        Setup::new(6).heads(4, 2).sizes(64, 64, 128),
    ]
}

#[test]
fn the_allocator_counts() {
    let (calls, peak) = measure(|| drop(std::hint::black_box(vec![0u8; 1000])));
    assert_eq!((calls, peak), (1, 1000));
    assert_eq!(measure(|| ()), (0, 0));
}

#[test]
fn a_step_does_not_allocate() {
    fn check<T: Real>(setup: &Setup) {
        let attention = setup.build::<T>();
        let mut inputs = setup.inputs(300, 300);
        // Growing keys, so that running maxima move.
        inputs
            .k
            .axis_iter_mut(ndarray::Axis(1))
            .enumerate()
            .for_each(|(j, mut k)| k *= 1.0 + 0.1 * (j % 50) as f64);
        let inputs: Inputs<T> = inputs.cast();
        let tokens: Vec<_> = (0..300).map(|i| inputs.token(i)).collect();
        let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
        let mut out = Array2::zeros((setup.heads, setup.e));
        for (i, [q, k, v]) in tokens.iter().enumerate() {
            let (calls, _) = measure(|| {
                attention.step(&mut state, Qkv::token(q, k, v), &mut out, &mut workspace).unwrap()
            });
            assert_eq!(calls, 0, "{setup:?}, {}: token {i}", T::NAME);
        }
        let (calls, _) = measure(|| state.reset());
        assert_eq!(calls, 0);
    }
    on_one_thread(|| {
        for setup in setups() {
            check::<f32>(&setup);
            check::<f64>(&setup);
        }
    });
}

#[test]
fn a_step_does_not_allocate_on_the_main_pool_either() {
    let setup = Setup::new(1).heads(4, 4);
    let attention = setup.build::<f32>();
    let [q, k, v] = setup.inputs(1, 1).cast::<f32>().token(0);
    let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
    let mut out = Array2::zeros((setup.heads, setup.e));
    let (calls, _) = measure(|| {
        (0..100).for_each(|_| {
            attention.step(&mut state, Qkv::token(&q, &k, &v), &mut out, &mut workspace).unwrap()
        })
    });
    assert_eq!(calls, 0);
}

#[test]
fn prefill_into_and_full_into_do_not_allocate() {
    fn check<T: Real>(setup: &Setup) {
        let (linear, exact) = (setup.build::<T>(), setup.build_exact::<T>());
        let n = 300;
        let Inputs { q, k, v }: Inputs<T> = setup.inputs(n, n).cast();
        let mut random = Random::new(1);
        let valid: Vec<bool> = (0..n).map(|_| random.chance(0.7)).collect();
        let mut out = Array3::zeros((setup.heads, n, setup.e));
        let (mut state, mut workspace) = (linear.new_state(), linear.workspace());
        for mask in [KeyMask::All, KeyMask::Valid(&valid), KeyMask::All] {
            let (calls, _) = measure(|| {
                linear
                    .prefill_into(
                        &mut [&mut state],
                        Qkv::new(&q, &k, &v).with_mask(mask),
                        &mut out,
                        &mut workspace,
                    )
                    .unwrap()
            });
            assert_eq!(calls, 0, "{setup:?}, {}: prefill_into", T::NAME);
            if setup.is_pure() {
                let full = linear.bidirectional().unwrap();
                let (calls, _) = measure(|| {
                    full.forward_into(
                        Qkv::new(&q, &k, &v).with_mask(mask),
                        &mut out,
                        &mut workspace,
                    )
                    .unwrap()
                });
                assert_eq!(calls, 0, "{setup:?}, {}: full_into", T::NAME);
            }
        }
        if setup.is_pure() {
            let mut workspace = exact.workspace();
            let full = exact.bidirectional().unwrap();
            let (calls, _) = measure(|| {
                full.forward_into(
                    Qkv::new(&q, &k, &v).with_mask(KeyMask::Valid(&valid)),
                    &mut out,
                    &mut workspace,
                )
                .unwrap()
            });
            assert_eq!(calls, 0, "{setup:?}, {}: exact full_into", T::NAME);
        }
    }
    on_one_thread(|| {
        for setup in setups() {
            check::<f32>(&setup);
            check::<f64>(&setup);
        }
    });
}

#[test]
fn packed_sequences_and_merging_do_not_allocate() {
    fn check<T: Real>(setup: &Setup) {
        let (linear, exact) = (setup.build::<T>(), setup.build_exact::<T>());
        let (n, offsets) = (400, [0, 100, 100, 101, 400]);
        let Inputs { q, k, v }: Inputs<T> = setup.inputs(n, n).cast();
        let mut out = Array3::zeros((setup.heads, n, setup.e));
        let (mut states, mut workspace) = (vec![linear.new_state(); 4], linear.workspace());
        let mut all: Vec<_> = states.iter_mut().collect();
        let mut calls = |what: &str, work: &mut dyn FnMut(&mut Array3<T>)| {
            let (calls, _) = measure(|| work(&mut out));
            assert_eq!(calls, 0, "{setup:?}, {}: {what}", T::NAME);
        };
        calls("prefill_packed_into", &mut |out| {
            linear
                .prefill_into(
                    &mut all,
                    Qkv::new(&q, &k, &v).with_offsets(&offsets),
                    out,
                    &mut workspace,
                )
                .unwrap();
        });
        if setup.is_pure() {
            let full = linear.bidirectional().unwrap();
            calls("full_packed_into", &mut |out| {
                full.forward_into(Qkv::new(&q, &k, &v).with_offsets(&offsets), out, &mut workspace)
                    .unwrap();
            });
        }
        let mut next = linear.new_state_at(100).unwrap();
        calls("extend", &mut |_| {
            linear.extend(&mut next, (&k, &v), KeyMask::All, &mut workspace).unwrap()
        });
        calls("merge", &mut |_| linear.merge(&mut states[0], &next, &mut workspace).unwrap());
        let mut workspace = exact.workspace();
        calls("exact causal_packed_into", &mut |out| {
            exact
                .forward_into(Qkv::new(&q, &k, &v).with_offsets(&offsets), out, &mut workspace)
                .unwrap();
        });
    }
    on_one_thread(|| {
        for setup in setups() {
            check::<f32>(&setup);
            check::<f64>(&setup);
        }
    });
}

/// Rows that are not contiguous are no reason to allocate.
#[test]
fn strided_arguments_do_not_allocate() {
    on_one_thread(|| {
        let setup = Setup::new(1).heads(2, 2).window(16, 1);
        let attention = setup.build::<f32>();
        let Inputs { q, k, v }: Inputs<f32> = setup.inputs(100, 100).cast();
        let transposed = |x: &Array3<f32>| {
            x.view()
                .permuted_axes([0, 2, 1])
                .as_standard_layout()
                .into_owned()
                .permuted_axes([0, 2, 1])
        };
        let (q, k, v) = (transposed(&q), transposed(&k), transposed(&v));
        let mut out = transposed(&Array3::zeros((setup.heads, 100, setup.e)));
        let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
        let (calls, _) = measure(|| {
            attention
                .prefill_into(&mut [&mut state], Qkv::new(&q, &k, &v), &mut out, &mut workspace)
                .unwrap()
        });
        assert_eq!(calls, 0);
    });
}

/// The allocating forms hold the output and scratch, and nothing that grows faster.
#[test]
fn peak_memory_does_not_depend_on_the_number_of_tokens() {
    on_one_thread(|| {
        for setup in setups() {
            let (linear, exact) = (setup.build::<f32>(), setup.build_exact::<f32>());
            let beyond_output = |n: usize, work: &dyn Fn(&Inputs<f32>) -> Array3<f32>| {
                let inputs = setup.inputs(n, n).cast();
                let (_, peak) = measure(|| drop(work(&inputs)));
                peak - setup.heads * n * setup.e * size_of::<f32>()
            };
            let causal = |inputs: &Inputs<f32>| linear.causal_of(inputs, KeyMask::All).unwrap();
            assert_eq!(
                beyond_output(256, &causal),
                beyond_output(4096, &causal),
                "{setup:?}: causal"
            );
            if setup.is_pure() {
                let full = |inputs: &Inputs<f32>| linear.full_of(inputs, KeyMask::All).unwrap();
                assert_eq!(
                    beyond_output(256, &full),
                    beyond_output(4096, &full),
                    "{setup:?}: full"
                );
                let full = |inputs: &Inputs<f32>| exact.full_of(inputs, KeyMask::All).unwrap();
                assert_eq!(
                    beyond_output(256, &full),
                    beyond_output(1024, &full),
                    "{setup:?}: exact, full"
                );
                let causal = |inputs: &Inputs<f32>| exact.causal_of(inputs, KeyMask::All).unwrap();
                assert_eq!(
                    beyond_output(256, &causal),
                    beyond_output(1024, &causal),
                    "{setup:?}: exact, causal"
                );
            }
        }
    });
}

/// A layer of eight query heads of dimension d on one key-value head.
fn softmax(d: usize) -> SoftmaxAttention<f32> {
    let matrix = |rows: usize, columns: usize| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 37 + j * 11) % 19) as f32 / 40.0 - 0.2
        })
    };
    let (wide, narrow) = (8 * d, d);
    let (q, o) = (matrix(wide, wide), matrix(wide, wide));
    let weights = AttentionWeights::new(q, matrix(narrow, wide), matrix(narrow, wide), o);
    SoftmaxAttention::new(AttentionConfig::new(wide, 8).with_kv_heads(1), weights).unwrap()
}

/// States are made for the sequences in work, not for all.
#[test]
fn short_sequences_share_one_state() {
    on_one_thread(|| {
        let softmax = softmax(16);
        let linear = DijiangAttention::from_softmax(&softmax, DijiangOptions::new()).unwrap();
        let n = 10_000;
        let x = Array2::from_shape_fn((n, 128), |(i, j)| ((i * 13 + j * 29) % 23) as f32 / 8.0);
        let (each, all): (Vec<usize>, _) = ((0..=n).collect(), [0, n]);
        let exact = measure(|| drop(softmax.forward_packed(&x, &each, KeyMask::All).unwrap())).1;
        let peak = |offsets: &[usize]| {
            measure(|| drop(linear.forward_packed(&x, offsets, KeyMask::All).unwrap())).1
        };
        let (short, long) = (peak(&each), peak(&all));
        assert!(2 * short <= 3 * exact, "{short} bytes, softmax attention {exact}");
        assert!(short < long + 3 * size_of_val(&each[..]), "{short} bytes, one sequence {long}");

        let one = x.slice(ndarray::s![..1, ..]);
        let empty: Vec<usize> = std::iter::repeat_n(0, 30_000).chain([1]).collect();
        let many = measure(|| drop(linear.forward_packed(&one, &empty, KeyMask::All).unwrap())).1;
        let none = measure(|| drop(linear.forward_packed(&one, &[0, 1], KeyMask::All).unwrap())).1;
        assert!(many < none + 3 * size_of_val(&empty[..]), "{many} bytes, of one {none}");
    });
}

/// What a pool says it takes is what it takes.
#[test]
fn a_pool_takes_what_it_says() {
    let layer = DijiangAttention::from_softmax(&softmax(64), DijiangOptions::new()).unwrap();
    let mut pool = None;
    let (_, peak) = measure(|| pool = Some(StatePool::new(&layer, 20).unwrap()));
    let pool = pool.unwrap();
    assert!((pool.bytes()..pool.bytes() / 10 * 11).contains(&peak), "{peak} bytes");
    // Of which the state is 99 072.
    assert!(pool.bytes() / 20 < 270_000, "{} bytes a slot", pool.bytes() / 20);
}
