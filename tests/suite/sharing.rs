//! One layer for many threads, and every public type across them.

use dijiang::attention::*;
use dijiang::calibrate::*;
use dijiang::checkpoint::{Checkpoint, CheckpointOptions, Family, Tensors};
use dijiang::kernel::*;
use dijiang::layer::*;
use dijiang::{Error, reference};
use dijiang_testing::assert_same_bits;
use ndarray::{Array1, Array2, s};

/// Every public type, those of every feature among them.
#[test]
fn every_public_type_is_send_and_sync() {
    fn shared<A: Send + Sync + 'static>() {}
    fn generic<T: dijiang::Real>() {
        shared::<CausalState<T>>();
        shared::<Softmax<T>>();
        shared::<KvCache<T>>();
        shared::<LinearAttention<T, DctMap<T>>>();
        shared::<LinearAttention<T, FavorMap<T>>>();
        shared::<Workspace<T>>();
        shared::<AttentionGradients<T, DctGradients>>();
        shared::<BackwardWorkspace<T>>();
        shared::<StateGradients<T>>();
        shared::<DctMap<T>>();
        shared::<DctSums<T>>();
        shared::<FavorMap<T>>();
        shared::<AttentionWeights<T>>();
        shared::<DijiangAttention<T>>();
        shared::<DijiangState<T>>();
        shared::<LayerGradients<T>>();
        shared::<PublishedAttention<T>>();
        shared::<PublishedState<T>>();
        shared::<PublishedWeights<T>>();
        shared::<SoftmaxAttention<T>>();
        shared::<SoftmaxState<T>>();
        shared::<StatePool<T>>();
    }
    generic::<f32>();
    generic::<f64>();
    shared::<Error>();
    shared::<KeyMask<'static>>();
    shared::<Window>();
    shared::<LinearConfig>();
    shared::<SoftmaxConfig>();
    shared::<Storage>();
    shared::<Checkpoint>();
    shared::<CheckpointOptions>();
    shared::<Family>();
    shared::<Tensors>();
    shared::<(DctGradients, SideGradients, DctMapConfig, DctParams, SideParams, Projection)>();
    shared::<(Envelope, InputScales, Mixing, Pairing, Points, Radial, Sides)>();
    shared::<(FavorConfig, FavorRows)>();
    shared::<(
        AttentionConfig,
        Causality,
        Rotary,
        RotaryPairing,
        RotaryScaling,
        DijiangOptions,
        Slot,
    )>();
    shared::<(CalibrateOptions, CalibrateProgress, CalibrateReport, Fit, HeadReport)>();
    shared::<(
        reference::Pairing,
        reference::Envelope,
        reference::Order,
        reference::PlainSide,
        reference::PlainMap,
    )>();
    shared::<reference::Pairs<'static>>();
}

/// 16 threads, each with states of its own, on one layer: what each gets is what it would get
/// alone, bit for bit.
#[test]
fn sixteen_threads_share_a_layer() {
    const THREADS: usize = 16;
    let matrix = |p: usize| {
        Array2::from_shape_fn((16, 16), |(i, j)| ((i * 37 + j * p) % 17) as f32 / 17.0 - 0.3)
    };
    let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    let config = AttentionConfig::new(16, 4).with_rotary(Rotary::new(1e4));
    let softmax = SoftmaxAttention::new(config.clone(), weights.clone()).unwrap();
    let window = DijiangAttention::from_softmax(
        &softmax,
        DijiangOptions::new().with_window(Some(Window::new(8, 1))),
    )
    .unwrap();
    let pure = DijiangAttention::from_softmax(
        &softmax,
        DijiangOptions::new().with_window(None).with_log_decay(-0.01),
    )
    .unwrap();
    let ones = Array1::ones(16);
    let published = PublishedWeights::new(
        vec![1.0; 4],
        PublishedWeights::<f32>::decays(4),
        matrix(3),
        ones.clone(),
        ones,
    );
    let published = PublishedAttention::new(config, weights, published).unwrap();

    fn check<A: Attention<f32>>(layer: &A) {
        let text = |seed: usize| {
            Array2::from_shape_fn((330, 16), |(i, j)| {
                ((i * (13 + seed) + j * 29) % 23) as f32 / 8.0 - 1.0
            })
        };
        let stream = |seed: usize| {
            let (x, mut state) = (text(seed), layer.new_state());
            let mut out = layer.prefill(&mut state, &x.slice(s![..300, ..]), KeyMask::All).unwrap();
            let mut token = Array1::zeros(16);
            for i in 300..330 {
                layer.step(&mut state, &x.row(i), &mut token).unwrap();
                out.push_row(token.view()).unwrap();
            }
            out
        };
        let alone: Vec<Array2<f32>> = (0..THREADS).map(stream).collect();
        let together: Vec<Array2<f32>> = std::thread::scope(|scope| {
            let stream = &stream;
            let threads: Vec<_> =
                (0..THREADS).map(|seed| scope.spawn(move || stream(seed))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        for (seed, (got, expected)) in together.iter().zip(&alone).enumerate() {
            assert_same_bits(format!("thread {seed}"), got, expected);
        }
    }
    check(&window);
    check(&pure);
    check(&published);
    check(&softmax);
}
