//! Feature maps that fail at any one of their calls: with a panic, or with log-features that are no
//! numbers. Nobody gets numbers that mean nothing, and no state is half changed and says nothing.

use std::fmt::Debug;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};

use dijiang::attention::{
    CausalState, Causality, KeyMask, LinearAttention, LinearConfig, Operator, Qkv, Window,
};
use dijiang::kernel::{
    DctGradients, DctMap, DctMapConfig, DctSums, DifferentiableMap, FeatureMap, PanelGradients,
};
use dijiang::{Error, Real, Result};
use dijiang_testing::{argument, cast};
use ndarray::{Array2, Array3, Axis};

#[derive(Debug, Clone, Copy)]
enum Fault {
    Panic,
    /// This feature of every token is this.
    Value(usize, f64),
}

/// A DCT map that fails once, after `left` more calls.
#[derive(Debug)]
struct Faulty<'a, T> {
    map: DctMap<T>,
    left: &'a AtomicUsize,
    fault: Fault,
}

/// What `left` counts from when nothing shall fail: it never gets to 0.
const NEVER: usize = usize::MAX / 2;
const FEATURES: usize = 4;

impl<T: Real> Faulty<'_, T> {
    fn fail(&self, width: usize, out: &mut [T]) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 0 {
            match self.fault {
                // Without the message of a panic that nobody expects.
                Fault::Panic => resume_unwind(Box::new("as told")),
                Fault::Value(feature, value) => {
                    out[feature * width..][..width].fill(T::from_f64(value));
                }
            }
        }
    }
}

impl<T: Real> FeatureMap<T> for Faulty<'_, T> {
    fn dim(&self) -> usize {
        self.map.dim()
    }
    fn features(&self) -> usize {
        self.map.features()
    }
    fn scratch_len(&self, width: usize) -> usize {
        self.map.scratch_len(width)
    }
    fn query_panel(&self, width: usize, x: &[T], out: &mut [T], scratch: &mut [T]) {
        self.map.query_panel(width, x, out, scratch);
        self.fail(width, out);
    }
    fn key_panel(&self, width: usize, y: &[T], out: &mut [T], scratch: &mut [T]) {
        self.map.key_panel(width, y, out, scratch);
        self.fail(width, out);
    }
}

impl<T: Real> DifferentiableMap<T> for Faulty<'_, T> {
    type Gradients = DctGradients;
    type Sums = DctSums<T>;

    fn new_sums(&self) -> Self::Sums {
        self.map.new_sums()
    }
    fn vjp_scratch_len(&self, width: usize) -> usize {
        self.map.vjp_scratch_len(width)
    }
    fn query_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut Self::Sums, scratch: &mut [T]) {
        self.map.query_vjp(panel, sums, scratch);
    }
    fn key_vjp(&self, panel: PanelGradients<'_, T>, sums: &mut Self::Sums, scratch: &mut [T]) {
        self.map.key_vjp(panel, sums, scratch);
    }
    fn gradients(&self, sums: &Self::Sums) -> Self::Gradients {
        self.map.gradients(sums)
    }
}

type Attention<'a, T> = LinearAttention<T, Faulty<'a, T>>;

fn attention<'a, T: Real>(
    window: Option<Window>,
    fault: Fault,
    left: &'a AtomicUsize,
) -> Attention<'a, T> {
    let map = DctMapConfig::new().with_seed(3).build(FEATURES).unwrap();
    let config = LinearConfig::new().with_windows(window.into_iter().collect());
    let sinks = if window.is_some() { 1 } else { 0 };
    let maps = vec![Faulty { map, left, fault }];
    config.with_heads(2).with_sinks(sinks).with_log_decay(vec![-0.01]).build(maps).unwrap()
}

fn tokens<T: Real>(heads: usize, from: usize, n: usize) -> Array3<T> {
    let element = |(h, i, j)| ((7 * h + 13 * (from + i) + 5 * j) as f64).sin();
    cast(&Array3::from_shape_fn((heads, n, FEATURES), element))
}

/// A method that changes a state, which has seen nine tokens.
type Work<T> = fn(&Attention<'_, T>, &mut CausalState<T>) -> Result<Vec<T>>;

fn prefill<T: Real>(
    attention: &Attention<'_, T>,
    state: &mut CausalState<T>,
    n: usize,
) -> Result<Vec<T>> {
    let (q, k) = (tokens(2, state.position(), n), tokens(1, state.position(), n));
    Ok(attention.prefill(state, Qkv::new(&q, &k, &k))?.into_raw_vec_and_offset().0)
}

fn step<T: Real>(attention: &Attention<'_, T>, state: &mut CausalState<T>) -> Result<Vec<T>> {
    let [q, k] = [2, 1].map(|h| tokens(h, state.position(), 1).index_axis_move(Axis(1), 0));
    let mut out = Array2::zeros((2, FEATURES));
    let token = Qkv::token(&q, &k, &k);
    attention.step(state, token, &mut out, &mut attention.step_workspace())?;
    Ok(out.into_raw_vec_and_offset().0)
}

fn works<T: Real>() -> [(&'static str, Work<T>); 8] {
    [
        ("prefill", |attention, state| prefill(attention, state, 11)),
        ("long prefill", |attention, state| prefill(attention, state, 530)),
        ("prefill of a new sequence", |attention, state| {
            state.reset();
            prefill(attention, state, 11)
        }),
        ("step", step),
        ("masked step", |attention, state| {
            let (q, k) = (tokens(2, 0, 1), tokens(1, 0, 1));
            let qkv = Qkv::new(&q, &k, &k).with_mask(KeyMask::Valid(&[false]));
            let mut out = Array2::zeros((2, FEATURES));
            attention.step(state, qkv, &mut out, &mut attention.step_workspace())?;
            Ok(out.into_raw_vec_and_offset().0)
        }),
        ("packed prefill", |attention, state| {
            let (q, k) = (tokens(2, 0, 12), tokens(1, 0, 12));
            let mut other = attention.new_state();
            let qkv = Qkv::new(&q, &k, &k).with_offsets(&[0, 5, 12]);
            let out = attention.prefill_packed(&mut [state, &mut other], qkv)?;
            Ok(out.into_raw_vec_and_offset().0)
        }),
        ("extend", |attention, state| {
            let k = tokens(1, state.position(), 11);
            let workspace = &mut attention.workspace();
            attention.extend(state, (&k, &k), KeyMask::All, workspace).map(|()| Vec::new())
        }),
        ("merge", |attention, state| {
            let mut next = attention.new_state_at(state.position())?;
            prefill(attention, &mut next, 11)?;
            let workspace = &mut attention.workspace();
            attention.merge(state, &next, workspace).map(|()| Vec::new())
        }),
    ]
}

fn windows() -> [Option<Window>; 4] {
    let keeps = Window::new(2, 0).with_kept(3);
    [None, Some(Window::new(2, 0)), Some(Window::new(4, 1)), Some(keeps)]
}

fn faults() -> Vec<Fault> {
    let values = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
    let value = |value: f64| [0, FEATURES - 1].map(|feature| Fault::Value(feature, value));
    std::iter::once(Fault::Panic).chain(values.into_iter().flat_map(value)).collect()
}

/// Every window with every fault.
fn kinds() -> impl Iterator<Item = (Option<Window>, Fault)> {
    windows().into_iter().flat_map(|window| faults().into_iter().map(move |fault| (window, fault)))
}

/// Whether a result of some work, at the call that failed, is what it should be; whether it failed.
fn judge<T: Real>(
    what: impl Debug,
    fault: Fault,
    result: std::thread::Result<Result<Vec<T>>>,
) -> bool {
    match (fault, result) {
        (Fault::Panic, Err(_)) => true,
        (Fault::Value(..), Ok(Err(error))) => {
            assert_eq!(argument(&error), "log-features of a map", "{what:?}: {error}");
            true
        }
        // A weight of zero is none that is missing.
        (Fault::Value(_, value), Ok(Ok(out))) if value == f64::NEG_INFINITY => {
            assert!(out.iter().all(|x| x.to_f64().is_finite()), "{what:?}: {out:?}");
            false
        }
        (_, result) => panic!("{what:?}: {result:?}"),
    }
}

fn check<T: Real>(window: Option<Window>, fault: Fault) {
    let left = AtomicUsize::new(NEVER);
    let attention = attention::<T>(window, fault, &left);
    let mut before = attention.new_state();
    prefill(&attention, &mut before, 9).unwrap();
    let expected = step(&attention, &mut before.clone()).unwrap();
    for (name, work) in works::<T>() {
        // All calls, or some of many.
        let calls = (0..12).chain((12..).step_by(37));
        for at in calls {
            let what = (name, window, fault, at, T::NAME);
            let mut state = before.clone();
            left.store(at, Ordering::Relaxed);
            let result = catch_unwind(AssertUnwindSafe(|| work(&attention, &mut state)));
            if left.swap(NEVER, Ordering::Relaxed) <= at {
                assert!(result.unwrap().is_ok(), "{what:?}: without a fault");
                break;
            }
            if judge(what, fault, result) {
                if state == before {
                    assert_eq!(step(&attention, &mut state).unwrap(), expected, "{what:?}");
                } else if state != attention.new_state() {
                    // It says so to everybody, until it is whole again.
                    let poisoned = Error::Poisoned { argument: "state" };
                    assert_eq!(attention.check_state(&state), Err(poisoned.clone()), "{what:?}");
                    for (method, work) in works::<T>().into_iter().filter(|w| !w.0.contains("new"))
                    {
                        let error = work(&attention, &mut state).unwrap_err();
                        assert_eq!(error, poisoned, "{what:?}: {method}");
                    }
                }
            }
            state.copy_from(&before).unwrap();
            assert_eq!(step(&attention, &mut state).unwrap(), expected, "{what:?}: copied over");
        }
    }
}

#[test]
fn whichever_call_fails() {
    for (window, fault) in kinds() {
        check::<f32>(window, fault);
        check::<f64>(window, fault);
    }
}

/// Whole sequences, which leave no state: the same operator works on.
#[test]
fn whole_sequences() {
    fn check<T: Real>(window: Option<Window>, fault: Fault) {
        let left = AtomicUsize::new(NEVER);
        let causal = attention::<T>(window, fault, &left);
        let (q, k) = (tokens(2, 0, 150), tokens(1, 0, 150));
        let forward = |attention: &Attention<'_, T>, offsets: &[usize]| {
            let out = attention.forward(Qkv::new(&q, &k, &k).with_offsets(offsets))?;
            Ok(out.into_raw_vec_and_offset().0)
        };
        let full = LinearConfig::new().with_heads(2).with_causality(Causality::Bidirectional);
        let map = DctMapConfig::new().build(FEATURES).unwrap();
        let full = full.build(vec![Faulty { map, left: &left, fault }]).unwrap();
        for (attention, offsets) in [
            (&causal, &[0, 150][..]),
            (&causal, &[0, 1, 1, 50, 150]),
            (&full, &[0, 150]),
            (&full, &[0, 1, 50, 150]),
        ] {
            let expected = forward(attention, offsets).unwrap();
            for at in (0..6).chain((6..).step_by(13)) {
                let what = (window, fault, offsets, at, T::NAME);
                left.store(at, Ordering::Relaxed);
                let result = catch_unwind(AssertUnwindSafe(|| forward(attention, offsets)));
                if left.swap(NEVER, Ordering::Relaxed) <= at {
                    break;
                }
                judge(what, fault, result);
                assert_eq!(forward(attention, offsets).unwrap(), expected, "{what:?}: again");
            }
        }
    }
    for (window, fault) in kinds() {
        check::<f32>(window, fault);
        check::<f64>(window, fault);
    }
}

/// The first keys, and the first queries of both heads.
#[test]
fn backward_passes() {
    let (q, k) = (tokens::<f32>(2, 0, 150), tokens(1, 0, 150));
    for (window, value) in windows().into_iter().flat_map(|w| [(w, f64::NAN), (w, f64::INFINITY)]) {
        let left = AtomicUsize::new(NEVER);
        let attention = attention::<f32>(window, Fault::Value(1, value), &left);
        let mut state = attention.new_state();
        prefill(&attention, &mut state, 9).unwrap();
        for at in 0..3 {
            let what = (window, value, at);
            left.store(at, Ordering::Relaxed);
            let error = attention.backward(Qkv::new(&q, &k, &k), &q).unwrap_err();
            assert_eq!(argument(&error), "log-features of a map", "{what:?}");
            left.store(at, Ordering::Relaxed);
            let error =
                attention.prefill_backward(&state, Qkv::new(&q, &k, &k), &q, None).unwrap_err();
            assert_eq!(argument(&error), "log-features of a map", "{what:?}");
            left.store(NEVER, Ordering::Relaxed);
            attention.prefill_backward(&state, Qkv::new(&q, &k, &k), &q, None).unwrap();
        }
    }
}
