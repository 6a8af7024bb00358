//! Whatever is wrong on one rank: all return the same error, no state is changed, and the next call
//! is as good as any.

use std::panic::PanicHookInfo;
use std::time::{Duration, Instant};

use dijiang::attention::{KeyMask, LinearAttention, LinearConfig, Operator, Window};
use dijiang::kernel::{DctMap, DctMapConfig, FeatureMap};
use dijiang::layer::Attention;
use dijiang_mpi::{Error, Ranks, Scan};
use ndarray::s;

use crate::cases::random_layer;
use crate::random::{Random, Sequence};

/// The message of the panic that [`Panicking`] is there for.
const PANIC: &str = "a map of the caller's panics";

/// Whether a panic is part of a test.
pub(crate) fn is_wanted(info: &PanicHookInfo<'_>) -> bool {
    info.payload().downcast_ref() == Some(&PANIC)
}

/// In this time a fault must have ended with an error on all ranks.
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) fn all(ranks: &Ranks) {
    for culprit in 0..ranks.size() {
        let begun = Instant::now();
        inputs(ranks, culprit);
        panics(ranks, culprit);
        if culprit > 0 {
            differences(ranks, culprit);
        }
        assert!(begun.elapsed() < LIMIT, "errors must come at once");
    }
}

/// Elements and shapes that one rank's call refuses.
fn inputs(ranks: &Ranks, culprit: usize) {
    let random = &mut Random(5);
    let attention = random.attention::<f64>(false);
    let own = ranks.rank() == culprit;
    let mut state = attention.new_state();
    let kept = state.clone();
    for what in ["q", "k", "v", "state", "shape"] {
        let mut sequence = Sequence::new(random, &attention, 50);
        sequence.valid.fill(true);
        let mut foreign = LinearConfig::new().build(attention.maps()[..1].to_vec());
        let other = foreign.as_mut().expect("a smaller one").new_state();
        match what {
            "q" if own => sequence.q[[0, 49, 0]] = f64::NAN,
            "k" if own => sequence.k[[0, 30, 1]] = f64::INFINITY,
            "v" if own => sequence.v[[0, 0, 2]] = 1e300,
            "state" if own => state = other,
            "shape" if own => sequence.v = sequence.v.slice(s![.., ..49, ..]).to_owned(),
            _ => {}
        }
        let tokens = if what == "shape" && own { 0..49 } else { 0..50 };
        let piece = sequence.piece(tokens);
        let error = match what {
            "shape" if own => {
                let [q, k, v] = [&sequence.q, &sequence.k, &sequence.v];
                let qkv = dijiang::attention::Qkv::new(q, k, v);
                ranks.prefill(&attention, &mut state, qkv).expect_err("a shape that does not fit")
            }
            _ => ranks.prefill(&attention, &mut state, piece.qkv()).expect_err("a bad argument"),
        };
        let Error::Rank { rank, message } = &error else { panic!("{error} for {what}") };
        let told = message.contains(what) || what == "shape" && message.starts_with("v: axis 1");
        assert!(*rank == culprit && told, "{error} for {what} of {culprit}");
        if what == "state" {
            state = kept.clone();
        }
        assert!(state == kept, "a failed call must change nothing");
    }
    sound(ranks, &attention);
}

/// Options, maps, weights and calls that are not those of rank 0.
fn differences(ranks: &Ranks, culprit: usize) {
    let own = ranks.rank() == culprit;
    let map = |seed: u64| DctMapConfig::new().with_seed(seed).build::<f32>(8).expect("a map");
    let attention = |sinks: usize, seed: u64| {
        let config = LinearConfig::new().with_window(Window::new(8, 1)).with_sinks(sinks);
        config.build(vec![map(1), map(2), map(seed)]).expect("sound options")
    };
    let expect = |what: &'static str, found: Option<Error>| {
        assert_eq!(found, Some(Error::Differ { rank: culprit, what }));
    };
    let call = |ranks: &Ranks, attention: LinearAttention<f32, DctMap<f32>>| {
        let sequence = Sequence::new(&mut Random(3), &attention, 30);
        let piece = sequence.piece(0..30);
        ranks.prefill(&attention, &mut attention.new_state(), piece.qkv()).err()
    };
    expect("options", call(ranks, attention(if own { 2 } else { 3 }, 3)));
    expect("maps", call(ranks, attention(2, if own { 4 } else { 3 })));
    assert_eq!(call(ranks, attention(2, 3)), None);

    let layer = random_layer::<f32>(&mut Random(if own { 8 } else { 9 }));
    let x = Random(1).array([1, 20, 24], 1.0).remove_axis(ndarray::Axis(0));
    let mut state = layer.new_state();
    expect("weights", ranks.prefill_layer(&layer, &mut state, &x, KeyMask::All).err());

    let (layer, attention) = (random_layer::<f32>(&mut Random(9)), attention(2, 3));
    let mut state = layer.new_state();
    expect(
        "calls",
        match own {
            true => call(ranks, attention),
            false => ranks.prefill_layer(&layer, &mut state, &x, KeyMask::All).err(),
        },
    );
}

/// A feature map of one rank panics.
fn panics(ranks: &Ranks, culprit: usize) {
    let map = DctMapConfig::new().build::<f32>(8).expect("a map");
    let attention =
        |panics| LinearConfig::new().build(vec![Panicking { map: map.clone(), panics }]);
    let attention = attention(ranks.rank() == culprit).expect("sound options");
    let random = &mut Random(4);
    let arrays = [(); 3].map(|()| random.array::<f32>([1, 40, 8], 1.0));
    let qkv = dijiang::attention::Qkv::new(&arrays[0], &arrays[1], &arrays[2]);
    let mut state = attention.new_state();
    let error = ranks.prefill(&attention, &mut state, qkv).expect_err("a panic is an error");
    assert_eq!(error, Error::Rank { rank: culprit, message: "panicked".into() });
    assert!(state == attention.new_state(), "a failed call must change nothing");
}

/// A call after one that failed.
fn sound(ranks: &Ranks, attention: &LinearAttention<f64, DctMap<f64>>) {
    let sequence = Sequence::new(&mut Random(6), attention, 20);
    let piece = sequence.piece(0..20);
    let mut state = attention.new_state();
    ranks.prefill(attention, &mut state, piece.qkv()).expect("sound arguments");
    assert_eq!(state.position(), 20 * (ranks.rank() + 1));
    assert!(matches!(ranks.scan(), Scan::Rounds | Scan::Gather));
}

/// A map that panics on long panels.
#[derive(Debug)]
struct Panicking {
    map: DctMap<f32>,
    panics: bool,
}

impl FeatureMap<f32> for Panicking {
    fn dim(&self) -> usize {
        self.map.dim()
    }

    fn features(&self) -> usize {
        self.map.features()
    }

    fn scratch_len(&self, width: usize) -> usize {
        self.map.scratch_len(width)
    }

    fn query_panel(&self, width: usize, x: &[f32], out: &mut [f32], scratch: &mut [f32]) {
        self.map.query_panel(width, x, out, scratch);
    }

    fn key_panel(&self, width: usize, y: &[f32], out: &mut [f32], scratch: &mut [f32]) {
        if self.panics && width > 16 {
            std::panic::panic_any(PANIC);
        }
        self.map.key_panel(width, y, out, scratch);
    }
}
