//! Many sequences at once: each as if it were alone.

use dijiang::attention::{KeyMask, Window};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    DijiangState, Padding, Rotary, SoftmaxAttention, StatePool,
};
use dijiang::{Error, Real};
use dijiang_testing::{Random, argument, assert_same_bits, cast, on_threads};
use ndarray::{Array1, Array2, Array3, ArrayRef1, ArrayRef2, Axis, s};

/// Four query heads of 5 on two key-value heads, in a model of width 23.
fn layer<T: Real>(window: Option<Window>, causality: Causality) -> DijiangAttention<T> {
    DijiangAttention::from_softmax(&softmax(causality), DijiangOptions::new().with_window(window))
        .unwrap()
}

fn softmax<T: Real>(causality: Causality) -> SoftmaxAttention<T> {
    let mut random = Random::new(3);
    let mut matrix = |rows, columns| cast::<T, _>(&random.normals((rows, columns), 0.3));
    let weights =
        AttentionWeights::new(matrix(24, 23), matrix(12, 23), matrix(12, 23), matrix(23, 24));
    let bias = |len| cast::<T, _>(&Random::new(len as u64).normals(len, 0.3));
    let weights = weights.with_biases(bias(24), bias(12), bias(12), bias(23));
    let config = AttentionConfig::new(23, 4)
        .with_kv_heads(2)
        .with_head_dim(6)
        .with_rotary(Rotary::new(100.0))
        .with_causality(causality);
    SoftmaxAttention::new(config, weights).unwrap()
}

fn text<T: Real>(n: usize, seed: u64) -> Array2<T> {
    cast(&Random::new(seed).normals((n, 23), 1.0))
}

fn nears() -> [Option<Window>; 2] {
    [None, Some(Window::new(5, 1))]
}

#[test]
fn a_batch_is_its_sequences_bit_for_bit() {
    fn check<T: Real>(window: Option<Window>, threads: usize) {
        let layer = layer::<T>(window, Causality::Causal);
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
                on_threads(threads, || {
                    layer.step_batch(&mut states.iter_mut().collect::<Vec<_>>(), &x, &mut out)
                })
                .unwrap();
                assert_same_bits(format!("{window:?}, {b} sequences, token {t}"), &out, &expected);
                assert!(states == alone);
            }
        }
    }
    for window in nears() {
        check::<f32>(window, 1);
        check::<f32>(window, 3);
        check::<f64>(window, 2);
    }
}

/// Requests join and leave, fork and go back; every one of them reads what it would alone.
#[test]
fn a_pool_of_requests() {
    for window in nears() {
        let layer = layer::<f32>(window, Causality::Causal);
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
            pool.step(
                &layer,
                &live.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(),
                &x,
                &mut out,
            )
            .unwrap();
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
    let layer = layer::<f64>(Some(Window::new(4, 1)), Causality::Causal);
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
    let error = layer
        .step_batch(&mut [&mut own, &mut foreign], &text(2, 1), &mut Array2::zeros((2, 23)))
        .unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }));
    assert!(own == layer.new_state());
    assert!(matches!(own.copy_from(&foreign), Err(Error::Foreign { .. })));
    assert_eq!(argument(&StatePool::new(&layer, 0).unwrap_err()), "capacity");
    assert_eq!(argument(&StatePool::new(&layer, usize::MAX).unwrap_err()), "capacity");
    assert!(matches!(
        StatePool::new(&self::layer::<f64>(None, Causality::Bidirectional), 1),
        Err(Error::Conflict { .. })
    ));
}

/// A prompt is read once and continued many times.
#[test]
fn a_prefix_serves_many() {
    let layer = layer::<f32>(Some(Window::new(5, 1)), Causality::Causal);
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

const LENGTHS: [usize; 6] = [3, 0, 70, 1, 129, 64];

/// The tokens of each sequence, and each one by itself, as many as `LENGTHS` says.
fn sequences<T: Real>(seed: u64) -> Vec<Array2<T>> {
    LENGTHS.iter().enumerate().map(|(i, &n)| text(n, seed + i as u64)).collect()
}

/// All rows, one sequence after another, and where each begins.
fn pack<T: Real>(sequences: &[Array2<T>]) -> (Array2<T>, Vec<usize>) {
    let mut offsets = vec![0];
    offsets.extend(sequences.iter().scan(0, |end, x| {
        *end += x.nrows();
        Some(*end)
    }));
    let views: Vec<_> = sequences.iter().map(|x| x.view()).collect();
    (ndarray::concatenate(Axis(0), &views).unwrap(), offsets)
}

/// `[b, n, D]` with NaN in the padding.
fn pad(sequences: &[Array2<f32>], n: usize, padding: Padding) -> Array3<f32> {
    let mut padded = Array3::from_elem((sequences.len(), n, 23), f32::NAN);
    for (x, mut padded) in sequences.iter().zip(padded.outer_iter_mut()) {
        padded.slice_mut(s![place(x.nrows(), n, padding), ..]).assign(x);
    }
    padded
}

fn place(length: usize, n: usize, padding: Padding) -> std::ops::Range<usize> {
    if padding == Padding::Left { n - length..n } else { 0..length }
}

fn check_packed<T: Real, L: Attention<T>>(layer: &L)
where
    L::State: PartialEq,
{
    let (earlier, now) = (sequences::<T>(40), sequences::<T>(50));
    let mut states: Vec<_> = LENGTHS.iter().map(|_| layer.new_state()).collect();
    for (state, x) in states.iter_mut().zip(&earlier).filter(|(_, x)| x.nrows() > 0).take(3) {
        layer.prefill(state, x, KeyMask::All).unwrap();
    }
    let (x, offsets) = pack(&now);
    let valid: Vec<bool> = (0..x.nrows()).map(|i| i % 5 != 2).collect();
    for masked in [false, true] {
        let mask = |tokens: std::ops::Range<usize>| {
            if masked { KeyMask::Valid(&valid[tokens]) } else { KeyMask::All }
        };
        let mut alone = states.clone();
        let out = layer
            .prefill_packed(
                &mut states.iter_mut().collect::<Vec<_>>(),
                &x,
                &offsets,
                mask(0..x.nrows()),
            )
            .unwrap();
        let whole = layer.forward_packed(&x, &offsets, mask(0..x.nrows())).unwrap();
        for (i, (x, state)) in
            now.iter().zip(&mut alone).enumerate().filter(|(_, (x, _))| x.nrows() > 0)
        {
            let tokens = offsets[i]..offsets[i + 1];
            let expected = layer.prefill(state, x, mask(tokens.clone())).unwrap();
            assert_same_bits(
                format!("prefill, {i}"),
                &out.slice(s![tokens.clone(), ..]).to_owned(),
                &expected,
            );
            let expected = layer.forward(x, mask(tokens.clone())).unwrap();
            assert_same_bits(
                format!("forward, {i}"),
                &whole.slice(s![tokens, ..]).to_owned(),
                &expected,
            );
        }
        assert!(states == alone);
    }
}

#[test]
fn packed_sequences_are_each_alone() {
    for window in nears() {
        let layer = layer::<f32>(window, Causality::Causal);
        check_packed(&layer);
        check_packed(&Plain(layer));
    }
    check_packed(&self::layer::<f64>(Some(Window::new(5, 1)), Causality::Causal));
    check_packed(&softmax::<f32>(Causality::Causal));
}

/// A layer with nothing of its own: what the trait provides.
#[derive(Clone)]
struct Plain<L>(L);

impl<T: Real, L: Attention<T>> Attention<T> for Plain<L> {
    type State = L::State;

    fn config(&self) -> &AttentionConfig {
        self.0.config()
    }
    fn new_state(&self) -> L::State {
        self.0.new_state()
    }
    fn forward(&self, x: &ArrayRef2<T>, mask: KeyMask<'_>) -> dijiang::Result<Array2<T>> {
        self.0.forward(x, mask)
    }
    fn prefill(
        &self,
        state: &mut L::State,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> dijiang::Result<Array2<T>> {
        self.0.prefill(state, x, mask)
    }
    fn step(
        &self,
        state: &mut L::State,
        x: &ArrayRef1<T>,
        out: &mut ArrayRef1<T>,
    ) -> dijiang::Result<()> {
        self.0.step(state, x, out)
    }
}

/// New requests' prompts are read together, in whatever slots they have.
#[test]
fn a_pool_reads_prompts_together() {
    let layer = layer::<f32>(Some(Window::new(5, 1)), Causality::Causal);
    let mut pool = StatePool::new(&layer, 9).unwrap();
    let mut slots: Vec<_> = LENGTHS.iter().map(|_| pool.take().unwrap()).collect();
    slots.reverse();
    let prompts = sequences(20);
    let x = pad(&prompts, 129, Padding::Right);
    layer
        .prefill_padded(&mut pool.get_each_mut(&slots).unwrap(), &x, &LENGTHS, Padding::Right)
        .unwrap();
    for (slot, prompt) in slots.iter().zip(&prompts) {
        let mut state = layer.new_state();
        if prompt.nrows() > 0 {
            layer.prefill(&mut state, prompt, KeyMask::All).unwrap();
        }
        assert!(*pool.get(*slot).unwrap() == state);
    }
    slots.push(slots[0]);
    assert_eq!(argument(&pool.get_each_mut(&slots).unwrap_err()), "slots");
    pool.release(slots[0]).unwrap();
    assert_eq!(argument(&pool.get_each_mut(&slots[..1]).unwrap_err()), "slot");
}

#[test]
fn bidirectional_layers_pack_too() {
    fn check<L: Attention<f32>>(layer: &L) {
        let sequences = sequences(60);
        let (x, offsets) = pack(&sequences);
        let out = layer.forward_packed(&x, &offsets, KeyMask::All).unwrap();
        for (i, x) in sequences.iter().enumerate().filter(|(_, x)| x.nrows() > 0) {
            let expected = layer.forward(x, KeyMask::All).unwrap();
            assert_same_bits(
                i,
                &out.slice(s![offsets[i]..offsets[i + 1], ..]).to_owned(),
                &expected,
            );
        }
        let error = layer
            .prefill_packed(&mut [&mut layer.new_state()], &x, &[0, x.nrows()], KeyMask::All)
            .unwrap_err();
        assert!(matches!(error, Error::Conflict { .. }));
    }
    check(&layer::<f32>(None, Causality::Bidirectional));
    check(&softmax::<f32>(Causality::Bidirectional));
}

/// The same whichever side the padding is on, and whatever it holds; and the states go on as if
/// there had been none.
#[test]
fn padded_sequences_are_each_alone() {
    fn check<L: Attention<f32>>(layer: &L)
    where
        L::State: PartialEq,
    {
        for padding in [Padding::Left, Padding::Right] {
            let (first, next) = (sequences(70), sequences(80));
            let mut states: Vec<_> = LENGTHS.iter().map(|_| layer.new_state()).collect();
            let mut alone = states.clone();
            for (n, sequences) in [(129, &first), (140, &next)] {
                let x = pad(sequences, n, padding);
                let out = layer
                    .prefill_padded(
                        &mut states.iter_mut().collect::<Vec<_>>(),
                        &x,
                        &LENGTHS,
                        padding,
                    )
                    .unwrap();
                let whole = layer.forward_padded(&x, &LENGTHS, padding).unwrap();
                for (i, (x, state)) in sequences.iter().zip(&mut alone).enumerate() {
                    let mut expected = [Array2::zeros((n, 23)), Array2::zeros((n, 23))];
                    if x.nrows() > 0 {
                        let own = s![place(x.nrows(), n, padding), ..];
                        expected[0]
                            .slice_mut(own)
                            .assign(&layer.prefill(state, x, KeyMask::All).unwrap());
                        expected[1].slice_mut(own).assign(&layer.forward(x, KeyMask::All).unwrap());
                    }
                    for (out, expected) in [&out, &whole].into_iter().zip(&expected) {
                        assert_same_bits(
                            format!("{padding:?}, {i}"),
                            &out.index_axis(Axis(0), i).to_owned(),
                            expected,
                        );
                    }
                }
                assert!(states == alone);
            }
        }
    }
    for window in nears() {
        check(&layer::<f32>(window, Causality::Causal));
    }
    check(&softmax::<f32>(Causality::Causal));
}

#[test]
fn bad_packs_change_nothing() {
    fn check<L: Attention<f32>>(layer: &L)
    where
        L::State: PartialEq,
    {
        let x = text::<f32>(6, 1);
        let mut states = [layer.new_state(), layer.new_state()];
        let mut prefill = |x: &Array2<f32>, offsets: &[usize], mask| {
            let error = layer.prefill_packed(&mut states.each_mut(), x, offsets, mask).unwrap_err();
            assert!(states.iter().all(|state| *state == layer.new_state()), "{error:?}");
            argument(&error).to_owned()
        };
        for offsets in [&[0, 6][..], &[], &[1, 3, 6], &[0, 7, 6], &[0, 3, 7], &[0, 3, 5]] {
            assert_eq!(prefill(&x, offsets, KeyMask::All), "offsets", "{offsets:?}");
        }
        assert_eq!(prefill(&x, &[0, 3, 6], KeyMask::Valid(&[true; 5])), "mask");
        assert_eq!(prefill(&text(0, 1), &[0, 0, 0], KeyMask::All), "x");
        let mut bad = x.clone();
        bad[[5, 2]] = f32::NAN;
        assert_eq!(prefill(&bad, &[0, 3, 6], KeyMask::All), "x");
        assert_eq!(
            argument(&layer.forward_packed(&x, &[0, 5], KeyMask::All).unwrap_err()),
            "offsets"
        );
        assert_eq!(argument(&layer.forward_packed(&x, &[], KeyMask::All).unwrap_err()), "offsets");

        let x = Array3::zeros((2, 4, 23));
        let padded = |x: &Array3<f32>, lengths: &[usize]| {
            argument(&layer.forward_padded(x, lengths, Padding::Left).unwrap_err())
        };
        assert_eq!(padded(&x, &[4]), "lengths");
        assert_eq!(padded(&x, &[4, 5]), "lengths");
        assert_eq!(padded(&x, &[4, usize::MAX]), "lengths");
        assert_eq!(padded(&x, &[0, 0]), "x");
        assert_eq!(padded(&Array3::zeros((2, 4, 22)), &[4, 4]), "x");
        assert_eq!(padded(&Array3::zeros((0, 4, 23)), &[]), "x");
        let error = layer.prefill_padded(&mut [], &x, &[4, 4], Padding::Right).unwrap_err();
        assert_eq!(argument(&error), "lengths");
    }
    let window = layer::<f32>(Some(Window::new(4, 1)), Causality::Causal);
    check(&window);
    check(&softmax::<f32>(Causality::Causal));
    check(&Plain(window));
}

/// Drafted tokens are tried out in one call and taken back; the state goes on as if they had never
/// been.
#[test]
fn speculation_leaves_no_trace() {
    for window in nears() {
        let layer = layer::<f32>(window, Causality::Causal);
        let (x, draft) = (text::<f32>(60, 4), text::<f32>(9, 5));
        let (mut state, mut plain) = (layer.new_state(), layer.new_state());
        let mut kept = layer.new_state();
        let step = |state: &mut DijiangState<f32>, x: &ArrayRef1<f32>| {
            let mut out = Array1::zeros(23);
            layer.step(state, x, &mut out).unwrap();
            out
        };
        for (t, x) in x.outer_iter().enumerate() {
            // Rejected drafts of every length, by steps and at once.
            kept.copy_from(&state).unwrap();
            let mut tried = state.clone();
            for draft in draft.outer_iter().take(t % 9) {
                step(&mut state, &draft);
            }
            layer.prefill(&mut tried, &draft.slice(s![..t % 8 + 1, ..]), KeyMask::All).unwrap();
            state.copy_from(&kept).unwrap();
            assert_same_bits(
                format!("{window:?}, token {t}"),
                &step(&mut state, &x),
                &step(&mut plain, &x),
            );
            assert!(state == plain);
        }
    }
}

/// One state of a prompt, continued many times by clones of it: what the prompt and the
/// continuation give from the beginning.
#[test]
fn a_cached_prefix_is_the_prefix_itself() {
    for window in nears() {
        let layer = layer::<f32>(window, Causality::Causal);
        let prompt = text::<f32>(37, 6);
        let fresh = || {
            let mut state = layer.new_state();
            layer.prefill(&mut state, &prompt, KeyMask::All).unwrap();
            state
        };
        let cached = fresh();
        for seed in 0..5 {
            let tail = text::<f32>(20 + seed as usize, 90 + seed);
            let (mut clone, mut own) = (cached.clone(), fresh());
            let expected = layer.prefill(&mut own, &tail, KeyMask::All).unwrap();
            assert_same_bits(
                seed,
                &layer.prefill(&mut clone, &tail, KeyMask::All).unwrap(),
                &expected,
            );
            assert!(clone == own && cached == fresh(), "the cached state stays");
        }
    }
}
