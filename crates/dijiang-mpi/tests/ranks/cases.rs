//! Many ranks against one process.

use dijiang::Real;
use dijiang::attention::{KeyMask, Operator, Window};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, Rotary,
    SoftmaxAttention,
};
use dijiang_mpi::Ranks;
use ndarray::{Array2, Array3, Axis, s};

use crate::random::{Random, Sequence};

/// Random options and lengths that are tried.
const TRIES: u64 = 40;
/// Tokens before the call, and after it.
const BEFORE: usize = 90;
const AFTER: usize = 40;

/// Outputs and states of many ranks are those of one.
pub(crate) fn equal(ranks: &Ranks) {
    for seed in 0..TRIES {
        attention::<f64>(ranks, seed, 1e-12);
        attention::<f32>(ranks, seed, 1e-5);
    }
    for seed in 0..4 {
        layer::<f64>(ranks, seed, 1e-12);
        layer::<f32>(ranks, seed, 1e-5);
    }
}

fn attention<T: Real>(ranks: &Ranks, seed: u64, tolerance: f64) {
    let random = &mut Random(seed);
    let attention = random.attention::<T>();
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
    assert_eq!(found.shape(), expected.shape(), "{context}");
    let largest = expected.iter().fold(0.0, |top: f64, x| top.max(x.to_f64().abs()));
    for (at, x) in found.indexed_iter() {
        let difference = (x.to_f64() - expected[at].to_f64()).abs();
        assert!(
            difference <= tolerance * largest,
            "{at:?}: {difference:e} of {largest}; {context}"
        );
    }
}
