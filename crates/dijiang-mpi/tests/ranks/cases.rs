//! Many ranks against one process.

use dijiang::Real;
use dijiang::attention::{KeyMask, Operator, Window};
use dijiang::kernel::DctGradients;
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use dijiang_mpi::Ranks;
use mpi::collective::SystemOperation;
use mpi::topology::SimpleCommunicator;
use mpi::traits::CommunicatorCollectives;
use ndarray::{Array2, Array3, Axis, s};

use crate::random::{Random, Sequence};

/// Random options and lengths that are tried.
const TRIES: u64 = 24;
/// Tokens before the call, and after it.
const BEFORE: usize = 90;
const AFTER: usize = 40;

/// Outputs, states and gradients of many ranks are those of one.
pub(crate) fn equal(ranks: &Ranks, world: &SimpleCommunicator) {
    for seed in 0..TRIES {
        attention::<f64>(ranks, seed, 1e-12);
        attention::<f32>(ranks, seed, 1e-5);
        backward::<f64>(ranks, world, seed, 1e-12);
        backward::<f32>(ranks, world, seed, 1e-5);
    }
    for seed in 0..4 {
        layer::<f64>(ranks, seed, 1e-12);
        layer::<f32>(ranks, seed, 1e-5);
    }
}

fn attention<T: Real>(ranks: &Ranks, seed: u64, tolerance: f64) {
    let random = &mut Random(seed);
    let attention = random.attention::<T>(true);
    let lengths = random.lengths(ranks.size());
    let (before, n) = (random.pick(&[0, BEFORE]), lengths.iter().sum::<usize>());
    let sequence = Sequence::new(random, &attention, before + n + AFTER);

    let mut alone = attention.new_state();
    let whole = sequence.piece(0..before + n + AFTER);
    let expected = attention.prefill(&mut alone, whole.qkv()).expect("sound arguments");

    let mut state = attention.new_state();
    if before > 0 && ranks.rank() == 0 {
        attention.prefill(&mut state, sequence.piece(0..before).qkv()).expect("sound arguments");
    }
    let start = before + lengths[..ranks.rank()].iter().sum::<usize>();
    let end = start + lengths[ranks.rank()];
    let piece = sequence.piece(start..end);
    let mut again = state.clone();
    let out = ranks.prefill(&attention, &mut state, piece.qkv()).expect("sound arguments");
    let context = format!("seed {seed}, {ranks:?}, {lengths:?}, {:?}", attention.config());
    close(&out, &expected.slice(s![.., start..end, ..]).to_owned(), tolerance, &context);
    assert_eq!((state.start(), state.position()), (0, end), "{context}");

    let out_again = ranks.prefill(&attention, &mut again, piece.qkv()).expect("sound arguments");
    assert!(out == out_again && state == again, "other bits: {context}");

    // Every rank's state goes on as that of one process does: decoding, and by a prefill.
    let (mut decoding, mut workspace) = (state.clone(), attention.step_workspace());
    let mut row = Array2::zeros((attention.heads(), attention.value_dim()));
    for t in end..end + 3 {
        let token = sequence.piece(t..t + 1);
        attention.step(&mut decoding, token.qkv(), &mut row, &mut workspace).expect("a token");
        let expected = expected.slice(s![.., t..t + 1, ..]).to_owned();
        close(&row.clone().insert_axis(Axis(1)), &expected, tolerance, &context);
    }
    let rest = sequence.piece(end..before + n + AFTER);
    let out = attention.prefill(&mut state, rest.qkv()).expect("sound arguments");
    close(&out, &expected.slice(s![.., end.., ..]).to_owned(), tolerance, &context);
}

fn backward<T: Real>(ranks: &Ranks, world: &SimpleCommunicator, seed: u64, tolerance: f64) {
    let random = &mut Random(1000 + seed);
    let attention = random.attention::<T>(false);
    let lengths = random.lengths(ranks.size());
    let (before, n) = (random.pick(&[0, BEFORE]), lengths.iter().sum::<usize>());
    if n == 0 {
        return;
    }
    let sequence = Sequence::new(random, &attention, before + n);
    let grad_out = random.array::<T>([attention.heads(), n, attention.value_dim()], 1.0);
    let mut state = attention.new_state();
    if before > 0 {
        attention.prefill(&mut state, sequence.piece(0..before).qkv()).expect("sound arguments");
    }
    let whole = sequence.piece(before..before + n);
    let (expected, of_state) =
        attention.prefill_backward(&state, whole.qkv(), &grad_out, None).expect("sound arguments");

    let start = lengths[..ranks.rank()].iter().sum::<usize>();
    let end = start + lengths[ranks.rank()];
    let piece = sequence.piece(before + start..before + end);
    let grad_out = grad_out.slice(s![.., start..end, ..]).to_owned();
    let given = if ranks.rank() == 0 { state } else { attention.new_state() };
    let call = || ranks.backward(&attention, &given, piece.qkv(), &grad_out);
    let found = call().expect("sound arguments");
    assert!(found == call().expect("sound arguments"), "other bits");
    let (gradients, found_of_state) = found;
    let context =
        format!("backward, seed {seed}, {ranks:?}, {lengths:?}, {:?}", attention.config());
    // Relative to the largest of the whole sequence, which a piece need not have.
    let arrays = [
        ("q", &gradients.q, &expected.q),
        ("k", &gradients.k, &expected.k),
        ("v", &gradients.v, &expected.v),
    ];
    for (name, found, expected) in arrays {
        let expected_rows = expected.slice(s![.., start..end, ..]).to_owned();
        let scale = largest(expected);
        near(found, &expected_rows, scale, tolerance, &format!("{name} of {context}"));
    }
    let known = if ranks.rank() == 0 { of_state.len() } else { 0 };
    assert_eq!(found_of_state.len(), known);
    for (found, expected) in found_of_state.iter().zip(&of_state) {
        assert_eq!(found.positions, expected.positions, "{context}");
        for (found, expected) in [
            (&found.sums, &expected.sums),
            (&found.keys, &expected.keys),
            (&found.values, &expected.values),
        ] {
            let [found, expected] = [found, expected].map(|x| x.clone().insert_axis(Axis(0)));
            close(&found, &expected, 10.0 * tolerance, &context);
        }
    }
    for (h, (map, expected_map)) in gradients.maps.iter().zip(&expected.maps).enumerate() {
        // Sums of many numbers of either sign: the largest of a kind says how exact they can be.
        let kinds = parameters(map, gradients.log_decay[h]);
        let expected_kinds = parameters(expected_map, expected.log_decay[h]);
        for ((name, share), (_, expected)) in kinds.into_iter().zip(expected_kinds) {
            let mut sum = vec![0.0; share.len()];
            world.all_reduce_into(&share[..], &mut sum[..], SystemOperation::sum());
            let shape = (1, 1, sum.len());
            let array = |x| Array3::<f64>::from_shape_vec(shape, x).expect("of this shape");
            let scale = n as f64 * if name == "log_decay" { n as f64 } else { 1.0 };
            let context = format!("{name} of {context}");
            near(&array(sum), &array(expected), scale, 10.0 * tolerance, &context);
        }
    }
}

/// A map's gradients and its decay's, by kind.
fn parameters(map: &DctGradients, log_decay: f64) -> Vec<(&'static str, Vec<f64>)> {
    let mut kinds = vec![
        ("log_weight", map.log_weight.clone()),
        ("log_mix", vec![map.log_mix]),
        ("log_decay", vec![log_decay]),
    ];
    for side in [&map.query, &map.key] {
        kinds.push(("center", side.center.clone()));
        kinds.push(("scale", side.scale.clone()));
        kinds.push(("radii", side.radii.clone()));
    }
    kinds
}

fn layer<T: Real>(ranks: &Ranks, seed: u64, tolerance: f64) {
    let random = &mut Random(seed);
    let layer = random_layer::<T>(random);
    let lengths = random.lengths(ranks.size());
    let n = lengths.iter().sum::<usize>();
    let x = random.array([1, n + AFTER, 24], 1.0).remove_axis(Axis(0));
    let expected = layer.forward(&x, KeyMask::All).expect("sound arguments");
    let start = lengths[..ranks.rank()].iter().sum::<usize>();
    let end = start + lengths[ranks.rank()];
    let mut state = layer.new_state();
    let piece = x.slice(s![start..end, ..]);
    let y = ranks.prefill_layer(&layer, &mut state, &piece, KeyMask::All).expect("sound arguments");
    let rest = layer.prefill(&mut state, &x.slice(s![end.., ..]), KeyMask::All).expect("a state");
    let context = format!("layer, seed {seed}, {ranks:?}, {lengths:?}");
    for (found, tokens) in [(y, start..end), (rest, end..n + AFTER)] {
        let expected = expected.slice(s![tokens, ..]).to_owned();
        close(&found.insert_axis(Axis(0)), &expected.insert_axis(Axis(0)), tolerance, &context);
    }
}

/// D = 24, four query heads of 6 on two key-value heads, rotary embedding.
pub(crate) fn random_layer<T: Real>(random: &mut Random) -> DijiangAttention<T> {
    let mut matrix = |rows: usize| random.array([1, rows, 24], 0.5).remove_axis(Axis(0));
    let weights = AttentionWeights::new(matrix(24), matrix(12), matrix(12), matrix(24));
    let config = AttentionConfig::new(24, 4).with_kv_heads(2).with_rotary(Rotary::new(10_000.0));
    let softmax = SoftmaxAttention::new(config, weights).expect("weights of this config");
    let windows = vec![Window::new(16, 1), Window::new(32, 1)];
    let options = DijiangOptions::new().with_windows(windows);
    DijiangAttention::from_softmax(&softmax, options).expect("options of this layer")
}

/// Equal relative to the largest expected number.
fn close<T: Real>(found: &Array3<T>, expected: &Array3<T>, tolerance: f64, context: &str) {
    near(found, expected, largest(expected), tolerance, context);
}

fn largest<T: Real>(of: &Array3<T>) -> f64 {
    of.iter().fold(0.0, |top: f64, x| top.max(x.to_f64().abs()))
}

fn near<T: Real>(
    found: &Array3<T>,
    expected: &Array3<T>,
    scale: f64,
    tolerance: f64,
    context: &str,
) {
    assert_eq!(found.shape(), expected.shape(), "{context}");
    for (at, x) in found.indexed_iter() {
        let difference = (x.to_f64() - expected[at].to_f64()).abs();
        assert!(difference <= tolerance * scale, "{at:?}: {difference:e} of {scale}; {context}");
    }
}
