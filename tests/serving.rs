//! Many sequences at once: each as if it were alone.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::{Random, argument, assert_same_bits, cast};
use dijiang::attention::{KeyMask, Near};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions, Rotary, SoftmaxAttention, StatePool,
};
use dijiang::{Error, Real};
use ndarray::{Array1, Array2, Axis, s};

/// Four query heads of 5 on two key-value heads, in a model of width 23.
fn layer<T: Real>(near: Option<Near>, causality: Causality) -> DijiangAttention<T> {
    let mut random = Random::new(3);
    let mut matrix = |rows, columns| cast::<T, _>(&random.normals((rows, columns), 0.3));
    let weights = AttentionWeights::new(matrix(24, 23), matrix(12, 23), matrix(12, 23), matrix(23, 24));
    let bias = |len| cast::<T, _>(&Random::new(len as u64).normals(len, 0.3));
    let weights = weights.with_biases(bias(24), bias(12), bias(12), bias(23));
    let config = AttentionConfig::new(23, 4).with_kv_heads(2).with_head_dim(6).with_rotary(Rotary::new(100.0)).with_causality(causality);
    let softmax = SoftmaxAttention::new(config, weights).unwrap();
    DijiangAttention::from_softmax(&softmax, DijiangOptions::new().with_near(near)).unwrap()
}

fn text<T: Real>(n: usize, seed: u64) -> Array2<T> {
    cast(&Random::new(seed).normals((n, 23), 1.0))
}

fn nears() -> [Option<Near>; 2] {
    [None, Some(Near::new(5, 1))]
}

#[test]
fn a_batch_is_its_sequences_bit_for_bit() {
    fn check<T: Real>(near: Option<Near>, threads: usize) {
        let layer = layer::<T>(near, Causality::Causal);
        for b in [1, 2, 3, 4, 5, 9] {
            let mut states: Vec<_> = (0..b).map(|_| layer.new_state()).collect();
            for (i, state) in states.iter_mut().enumerate().skip(1) {
                layer.prefill(state, &text(7 * i, i as u64), KeyMask::All).unwrap();
            }
            let mut alone = states.clone();
            for t in 0..20 {
                let x = text::<T>(b, 100 + t);
                let mut expected = Array2::from_elem((b, 23), T::from_f64(f64::NAN));
                for (i, state) in alone.iter_mut().enumerate() {
                    layer.step(state, &x.row(i), &mut expected.row_mut(i)).unwrap();
                }
                let mut out = Array2::from_elem((b, 23), T::from_f64(f64::NAN));
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| layer.step_batch(&mut states.iter_mut().collect::<Vec<_>>(), &x, &mut out)).unwrap();
                assert_same_bits(format!("{near:?}, {b} sequences, token {t}"), &out, &expected);
                assert!(states == alone);
            }
        }
    }
    for near in nears() {
        check::<f32>(near, 1);
        check::<f32>(near, 3);
        check::<f64>(near, 2);
    }
}

/// Requests join and leave, fork and go back; every one of them reads what it would alone.
#[test]
fn a_pool_of_requests() {
    for near in nears() {
        let layer = layer::<f32>(near, Causality::Causal);
        let mut pool = StatePool::new(&layer, 5).unwrap();
        let (mut random, mut live) = (Random::new(8), Vec::new());
        for round in 0..200 {
            match random.below(4) {
                0 => {
                    let slot = pool.take();
                    assert_eq!(slot.is_some(), live.len() < 5);
                    live.extend(slot.map(|slot| (slot, layer.new_state())));
                }
                1 if !live.is_empty() => {
                    let (slot, _) = live.swap_remove(random.below(live.len()));
                    pool.release(slot).unwrap();
                    assert!(pool.get(slot).is_err() && pool.release(slot).is_err(), "released");
                }
                2 if !live.is_empty() => {
                    let at = random.below(live.len());
                    let (from, state) = (live[at].0, live[at].1.clone());
                    live.extend(pool.fork(from).unwrap().map(|slot| (slot, state)));
                }
                3 if live.len() > 1 => {
                    let ((kept, state), at) = (live.pop().unwrap(), random.below(live.len()));
                    pool.replace(live[at].0, kept).unwrap();
                    live[at].1 = state;
                }
                _ => {}
            }
            assert_eq!((pool.taken(), pool.capacity()), (live.len(), 5));
            if live.is_empty() {
                continue;
            }
            let x = text::<f32>(live.len(), round);
            let mut out = Array2::zeros((live.len(), 23));
            pool.step(&layer, &live.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(), &x, &mut out).unwrap();
            for (i, (slot, state)) in live.iter_mut().enumerate() {
                let mut expected = Array1::zeros(23);
                layer.step(state, &x.row(i), &mut expected).unwrap();
                assert_same_bits(format!("round {round}"), &out.row(i).to_owned(), &expected);
                assert!(pool.get(*slot).unwrap() == state && slot.index() < 5);
            }
        }
    }
}

#[test]
fn bad_batches_change_nothing() {
    let layer = layer::<f64>(Some(Near::new(4, 1)), Causality::Causal);
    let mut pool = StatePool::new(&layer, 3).unwrap();
    let slots = [pool.take().unwrap(), pool.take().unwrap()];
    layer.prefill(pool.get_mut(slots[1]).unwrap(), &text(30, 1), KeyMask::All).unwrap();
    let before = pool.clone();
    let mut bad = text::<f64>(2, 1);
    bad[[1, 2]] = f64::INFINITY;
    let gone = pool.take().unwrap();
    pool.release(gone).unwrap();
    let mut step = |slots: &[_], x: &Array2<f64>, rows| {
        let mut out = Array2::from_elem((rows, 23), 7.0);
        let error = pool.step(&layer, slots, x, &mut out).unwrap_err();
        assert!(out.iter().all(|&x| x == 7.0), "an error wrote");
        argument(&error).to_owned()
    };
    assert_eq!(step(&slots, &bad, 2), "x");
    assert_eq!(step(&slots, &text(3, 1), 2), "x");
    assert_eq!(step(&slots, &text(2, 1), 3), "out");
    assert_eq!(step(&[], &text(0, 1), 0), "states");
    assert_eq!(step(&[slots[0], slots[0]], &text(2, 1), 2), "slots");
    assert_eq!(step(&[slots[0], gone], &text(2, 1), 2), "slot");
    assert!(slots.iter().all(|&slot| pool.get(slot).unwrap() == before.get(slot).unwrap()));
    assert_eq!(argument(&pool.replace(slots[0], slots[0]).unwrap_err()), "by");

    let other = self::layer::<f64>(None, Causality::Causal);
    let mut foreign = other.new_state();
    let mut own = layer.new_state();
    let error = layer.step_batch(&mut [&mut own, &mut foreign], &text(2, 1), &mut Array2::zeros((2, 23))).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }));
    assert!(own == layer.new_state());
    assert!(matches!(own.copy_from(&foreign), Err(Error::Foreign { .. })));
    assert_eq!(argument(&StatePool::new(&layer, 0).unwrap_err()), "capacity");
    assert_eq!(argument(&StatePool::new(&layer, usize::MAX).unwrap_err()), "capacity");
    assert!(matches!(StatePool::new(&self::layer::<f64>(None, Causality::Bidirectional), 1), Err(Error::Conflict { .. })));
}

/// A prompt is read once and continued many times.
#[test]
fn a_prefix_serves_many() {
    let layer = layer::<f32>(Some(Near::new(5, 1)), Causality::Causal);
    let x = text::<f32>(60, 2);
    let whole = layer.forward(&x, KeyMask::All).unwrap();
    let mut prefix = layer.new_state();
    layer.prefill(&mut prefix, &x.slice(s![..40, ..]), KeyMask::All).unwrap();
    let mut states: Vec<_> = (0..3).map(|_| layer.new_state()).collect();
    for state in &mut states {
        state.copy_from(&prefix).unwrap();
    }
    for i in 40..60 {
        let rows = x.row(i).insert_axis(Axis(0)).broadcast((3, 23)).unwrap().to_owned();
        let mut out = Array2::zeros((3, 23));
        layer.step_batch(&mut states.iter_mut().collect::<Vec<_>>(), &rows, &mut out).unwrap();
        assert!(out.outer_iter().all(|row| (&row - &whole.row(i)).iter().all(|d| d.abs() < 1e-4)));
    }
}
