//! Attention against golden values and against the reference, and what must hold whatever the
//! numbers are: causality, threads, scratch, layouts.

use dijiang::Real;
use dijiang::attention::{
    CausalState, KeyMask, KvCache, LinearAttention, LinearConfig, Operator, Qkv, Softmax,
    SoftmaxConfig, Window, Workspace,
};
use dijiang::kernel::{self, DctMap, DctMapConfig, DctParams, FeatureMap, SideParams};
use dijiang::reference::{Envelope, Pairing, Pairs, PlainMap, PlainSide};
use dijiang_testing::linear::{Affine, ReferenceMap, Setup, TestMap};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Golden, Inputs, Random, assert_close, assert_same_bits, cast, tolerance};
use ndarray::{Array1, Array2, Array3, ArrayView3, Axis, s};

/// A case of the golden file: what tools/golden.py calls `kw`.
struct Case {
    name: &'static str,
    causal: bool,
    envelope: Envelope,
    window: Option<(usize, usize)>,
    sinks: usize,
    kept: usize,
    log_decay: f64,
    valid: Option<Vec<bool>>,
}

fn golden_cases(n: usize) -> Vec<Case> {
    let base = || Case {
        name: "causal",
        causal: true,
        envelope: Envelope::None,
        window: None,
        sinks: 0,
        kept: 0,
        log_decay: 0.0,
        valid: None,
    };
    let local = |chunk, back, sinks| Case { window: Some((chunk, back)), sinks, ..base() };
    let masked =
        |keep_first: bool| Some((0..n).map(|j| j % 5 != 2 || (keep_first && j == 0)).collect());
    vec![
        Case { name: "full", causal: false, ..base() },
        base(),
        Case { name: "causal_gaussian", envelope: Envelope::Gaussian, ..base() },
        Case { name: "decay", log_decay: -0.05, ..base() },
        Case { name: "local", ..local(16, 1, 0) },
        Case { name: "local0", ..local(8, 0, 0) },
        Case { name: "local_decay", log_decay: -0.05, ..local(16, 1, 0) },
        Case { name: "full_masked", causal: false, valid: masked(false), ..base() },
        Case { name: "causal_masked", valid: masked(true), ..base() },
        Case { name: "local_sinks", ..local(16, 1, 4) },
        Case { name: "local_sinks_decay", log_decay: -0.05, ..local(8, 0, 3) },
        Case {
            name: "local_sinks_masked",
            valid: Some((0..n).map(|j| j % 5 != 2 && j > 8).collect()),
            ..local(8, 1, 4)
        },
        Case { name: "local_kept", kept: 10, ..local(8, 1, 0) },
        Case { name: "local_kept_decay", kept: 7, log_decay: -0.05, ..local(8, 0, 3) },
        Case {
            name: "local_kept_masked",
            kept: 5,
            valid: Some((0..n).map(|j| j % 5 != 2 && j > 8).collect()),
            ..local(4, 1, 0)
        },
    ]
}

const GOLDEN_MAPS: [(&str, Pairing); 2] = [("b1", Pairing::Single), ("b2a", Pairing::Antithetic)];

fn golden_map(golden: &Golden, tag: &str, pairing: Pairing, envelope: Envelope) -> PlainMap {
    let name = |what: &str| format!("{tag}.{what}");
    let side = |side: &str| PlainSide {
        center: golden.vec(&name(&format!("{side}_center"))),
        scale: golden.array2(&name(&format!("{side}_scale"))),
        radii: golden.vec(&name(&format!("{side}_radii"))),
    };
    PlainMap {
        query: side("query"),
        key: side("key"),
        log_weight: golden.vec(&name("log_weight")),
        log_mix: golden.scalar(&name("log_mix")),
        pairing,
        envelope,
    }
}

/// Calls `check(context, setup, map, causal, mask, inputs, expected)` for every output of the
/// golden file.
fn for_each_golden(check: impl Fn(&str, &Setup, PlainMap, &Case, &Inputs<f64>, &Array3<f64>)) {
    let golden = Golden::open("attention_f64.safetensors");
    let one_head = |name: &str| golden.array2(name).insert_axis(Axis(0));
    let inputs = Inputs { q: one_head("q"), k: one_head("k"), v: one_head("v") };
    let (n, d, e) = (inputs.tokens(), inputs.q.shape()[2], inputs.v.shape()[2]);
    assert!((n, d, e) == (75, 16, 12));
    for (tag, pairing) in GOLDEN_MAPS {
        for case in golden_cases(n) {
            let map = golden_map(&golden, tag, pairing, case.envelope);
            let mut setup = Setup::new(0).sizes(d, e, map.features());
            (setup.window, setup.sinks, setup.kept) = (case.window, case.sinks, case.kept);
            setup.log_decay = case.log_decay;
            let name = format!("{tag}.{}.output", case.name);
            check(&name, &setup, map, &case, &inputs, &one_head(&name));
        }
    }
}

impl Case {
    fn mask(&self) -> KeyMask<'_> {
        self.valid.as_deref().map_or(KeyMask::All, KeyMask::Valid)
    }

    fn run<T: Real, M: FeatureMap<T> + Clone>(
        &self,
        setup: &Setup,
        map: M,
        inputs: &Inputs<f64>,
    ) -> Array3<T> {
        let attention = setup.config().build(vec![map]).unwrap();
        let inputs = inputs.cast();
        let out = if self.causal {
            attention.causal_of(&inputs, self.mask())
        } else {
            attention.full_of(&inputs, self.mask())
        };
        out.unwrap()
    }
}

#[test]
fn golden_outputs_by_the_reference() {
    for_each_golden(|name, setup, map, case, inputs, expected| {
        let pairs = if case.causal { Pairs::causal() } else { Pairs::full() };
        assert_close(name, &setup.linear(&[map], pairs, inputs, case.mask()), expected, 1e-12);
    });
}

#[test]
fn golden_outputs_with_the_references_map() {
    for_each_golden(|name, setup, map, case, inputs, expected| {
        assert_close(
            name,
            &case.run::<f64, _>(setup, ReferenceMap(map.clone()), inputs),
            expected,
            1e-10,
        );
        assert_close(name, &case.run::<f32, _>(setup, ReferenceMap(map), inputs), expected, 1e-4);
    });
}

/// The same parameters, as the crate's own map takes them.
fn dct_params(map: &PlainMap) -> DctParams {
    let side = |params: &mut SideParams, side: &PlainSide| {
        params.center.clone_from(&side.center);
        params.scale = side.scale.iter().copied().collect();
        params.radii.clone_from(&side.radii);
    };
    let mut params = DctParams::new(map.query.center.len());
    side(&mut params.query, &map.query);
    side(&mut params.key, &map.key);
    params.log_weight.clone_from(&map.log_weight);
    params.log_mix = map.log_mix;
    params.pairing = match map.pairing {
        Pairing::Single => kernel::Pairing::Single,
        Pairing::Antithetic => kernel::Pairing::Antithetic,
    };
    params.envelope = match map.envelope {
        Envelope::None => kernel::Envelope::None,
        Envelope::Gaussian => kernel::Envelope::Gaussian,
    };
    params
}

#[test]
fn golden_outputs_by_the_fast_path() {
    for_each_golden(|name, setup, map, case, inputs, expected| {
        let params = dct_params(&map);
        let double = DctMap::<f64>::from_params(params.clone()).unwrap();
        assert_close(name, &case.run::<f64, _>(setup, double, inputs), expected, 1e-10);
        let single = DctMap::<f32>::from_params(params).unwrap();
        assert_close(name, &case.run::<f32, _>(setup, single, inputs), expected, 1e-4);
    });
}

/// The golden outputs token by token, and in pieces.
#[test]
fn golden_outputs_by_steps() {
    for_each_golden(|name, setup, map, case, inputs, expected| {
        if !case.causal || case.valid.is_some() {
            return;
        }
        let attention = setup
            .config()
            .build(vec![DctMap::<f64>::from_params(dct_params(&map)).unwrap()])
            .unwrap();
        assert_close(name, &attention.steps(&mut attention.new_state(), inputs), expected, 1e-10);
        let attention = setup
            .config()
            .build(vec![DctMap::<f32>::from_params(dct_params(&map)).unwrap()])
            .unwrap();
        assert_close(
            name,
            &attention.steps(&mut attention.new_state(), &inputs.cast()),
            expected,
            1e-4,
        );
    });
}

/// Log-features of the crate's own map, for dimensions of every kind, against the reference.
#[test]
fn dct_map_equals_the_reference() {
    for d in [1, 2, 3, 5, 8, 12, 16, 17, 30, 31, 64, 100, 128] {
        for (blocks, pairing, envelope) in [
            (1, Pairing::Single, Envelope::None),
            (2, Pairing::Antithetic, Envelope::None),
            (3, Pairing::Single, Envelope::Gaussian),
        ] {
            let mut random = Random::new(d as u64);
            let mut side = || PlainSide {
                center: random.normals(d, 0.3).to_vec(),
                scale: random.normals((blocks, d), 1.0),
                radii: random.normals(blocks * d, 1.0).to_vec(),
            };
            let (query, key) = (side(), side());
            let mut map =
                PlainMap { query, key, log_weight: Vec::new(), log_mix: -0.7, pairing, envelope };
            map.log_weight = random.normals(map.features(), 1.0).to_vec();
            let x = random.normals((19, d), 1.0);
            let context = format!("d = {d}, {blocks} blocks, {pairing:?}, {envelope:?}");
            let (a, b) = (map.query_log_features(&x).unwrap(), map.key_log_features(&x).unwrap());
            let fast = DctMap::<f64>::from_params(dct_params(&map)).unwrap();
            assert_close(
                &context,
                &fast.query_log_features(&x).unwrap(),
                &a,
                tolerance::<f64>(16.0, d),
            );
            assert_close(
                &context,
                &fast.key_log_features(&x).unwrap(),
                &b,
                tolerance::<f64>(16.0, d),
            );
            let fast = DctMap::<f32>::from_params(dct_params(&map)).unwrap();
            assert_close(
                &context,
                &fast.query_log_features(&cast(&x)).unwrap(),
                &a,
                tolerance::<f32>(16.0, d),
            );
            assert_close(
                &context,
                &fast.key_log_features(&cast(&x)).unwrap(),
                &b,
                tolerance::<f32>(16.0, d),
            );
        }
    }
}

/// The crate's own map under the properties that matter most.
#[test]
fn dct_map_is_causal_bit_for_bit() {
    for (d, window) in [(16, None), (64, Some((16, 1))), (5, None)] {
        let setup = Setup { window, ..Setup::new(d as u64).heads(4, 2).sizes(d, 3, d) };
        let maps = || (0..2).map(|seed| DctMapConfig::new().with_seed(seed)).collect::<Vec<_>>();
        let inputs = setup.inputs(131, 131);
        let single = maps().into_iter().map(|map| map.build::<f32>(d).unwrap()).collect();
        check_causality(&setup, &setup.config().build::<f32, _>(single).unwrap(), &inputs);
        let double = maps().into_iter().map(|map| map.build::<f64>(d).unwrap()).collect();
        check_causality(&setup, &setup.config().build::<f64, _>(double).unwrap(), &inputs);
    }
}

/// Rounding errors of log-features of a few units, and of the sums over features and tokens.
fn tolerances(setup: &Setup, n: usize) -> (f64, f64) {
    let work = n + setup.m + setup.d;
    (tolerance::<f32>(16.0, work), tolerance::<f64>(16.0, work))
}

fn check_causal(setup: &Setup, n: usize, mask: KeyMask<'_>) {
    let context = format!("{setup:?}, n = {n}, mask {}", matches!(mask, KeyMask::Valid(_)));
    let inputs = setup.inputs(n, n);
    let expected = setup.causal(&inputs, mask);
    let (single, double) = tolerances(setup, n);
    assert_close(
        &context,
        &setup.build::<f64>().causal_of(&inputs, mask).unwrap(),
        &expected,
        double,
    );
    assert_close(
        &context,
        &setup.build::<f32>().causal_of(&inputs.cast(), mask).unwrap(),
        &expected,
        single,
    );
}

fn check_full(setup: &Setup, n_q: usize, n_k: usize, mask: KeyMask<'_>) {
    let context =
        format!("{setup:?}, n_q = {n_q}, n_k = {n_k}, mask {}", matches!(mask, KeyMask::Valid(_)));
    let inputs = setup.inputs(n_q, n_k);
    let expected = setup.full(&inputs, mask);
    let (single, double) = tolerances(setup, n_k);
    assert_close(
        &context,
        &setup.build::<f64>().full_of(&inputs, mask).unwrap(),
        &expected,
        double,
    );
    assert_close(
        &context,
        &setup.build::<f32>().full_of(&inputs.cast(), mask).unwrap(),
        &expected,
        single,
    );
}

fn check_exact(setup: &Setup, n_q: usize, n_k: usize, mask: KeyMask<'_>) {
    let context = format!(
        "exact, {setup:?}, n_q = {n_q}, n_k = {n_k}, mask {}",
        matches!(mask, KeyMask::Valid(_))
    );
    let (single, double) = tolerances(setup, n_k);
    let (fast, fast32) = (setup.build_exact::<f64>(), setup.build_exact::<f32>());
    if setup.window.is_none() {
        let inputs = setup.inputs(n_q, n_k);
        let expected = setup.exact(Pairs::full(), &inputs, mask);
        assert_close(&context, &fast.full_of(&inputs, mask).unwrap(), &expected, double);
        assert_close(&context, &fast32.full_of(&inputs.cast(), mask).unwrap(), &expected, single);
    }
    let inputs = setup.inputs(n_k, n_k);
    let expected = setup.exact(Pairs::causal(), &inputs, mask);
    assert_close(&context, &fast.causal_of(&inputs, mask).unwrap(), &expected, double);
    assert_close(&context, &fast32.causal_of(&inputs.cast(), mask).unwrap(), &expected, single);
    // Through the cache.
    assert_close(
        &context,
        &fast.prefill_of(&mut fast.new_state(), &inputs, mask).unwrap(),
        &expected,
        double,
    );
    assert_close(
        &context,
        &fast32.prefill_of(&mut fast32.new_state(), &inputs.cast(), mask).unwrap(),
        &expected,
        single,
    );
}

const LENGTHS: [usize; 10] = [1, 2, 3, 63, 64, 65, 127, 129, 200, 257];
const SIZES: [usize; 6] = [1, 3, 5, 16, 17, 64];
const CHUNKS: [usize; 6] = [1, 3, 8, 16, 64, 100];

fn random_setup(random: &mut Random, seed: u64) -> Setup {
    let (heads, kv_heads) = random.choose(&[(1, 1), (1, 1), (2, 2), (2, 1), (6, 2), (3, 3)]);
    let mut setup = Setup::new(seed).heads(heads, kv_heads);
    setup = setup.sizes(random.choose(&SIZES), random.choose(&SIZES), random.choose(&SIZES));
    setup.scale = random.choose(&[None, None, Some(1.0), Some(0.09)]);
    setup.spread = random.choose(&[0.1, 1.5, 3.0]);
    setup
}

/// No mask, a random one, an all-masked prefix, or everything masked.
fn random_mask(random: &mut Random, n: usize) -> Option<Vec<bool>> {
    match random.below(8) {
        0..=2 => None,
        3..=4 => Some((0..n).map(|_| random.chance(0.7)).collect()),
        5 => Some((0..n).map(|_| random.chance(0.05)).collect()),
        6 => {
            let first = random.below(n + 1);
            Some((0..n).map(|j| j >= first && random.chance(0.9)).collect())
        }
        _ => Some(vec![false; n]),
    }
}

fn key_mask(valid: &Option<Vec<bool>>) -> KeyMask<'_> {
    valid.as_deref().map_or(KeyMask::All, KeyMask::Valid)
}

#[test]
fn causal_equals_the_reference_on_random_configurations() {
    for seed in 0..120 {
        let mut random = Random::new(seed);
        let mut setup = random_setup(&mut random, seed);
        if random.chance(0.6) {
            let chunk = random.choose(&CHUNKS);
            setup = setup.window(chunk, random.below(4)).sinks(random.below(chunk.min(9) + 1));
            setup.uneven = random.chance(0.5);
            setup.kept = random.choose(&[0, 0, 1, 5, 40]);
        }
        if random.chance(0.5) {
            setup = setup.decay(random.choose(&[-0.001, -0.05, -0.7]));
        }
        let n = random.choose(&LENGTHS);
        let valid = random_mask(&mut random, n);
        check_causal(&setup, n, key_mask(&valid));
    }
}

#[test]
fn full_equals_the_reference_on_random_configurations() {
    for seed in 1000..1060 {
        let mut random = Random::new(seed);
        let setup = random_setup(&mut random, seed);
        let (n_q, n_k) = (random.choose(&LENGTHS), random.choose(&LENGTHS));
        let valid = random_mask(&mut random, n_k);
        check_full(&setup, n_q, n_k, key_mask(&valid));
    }
}

/// Cross attention whose queries come one by one: the keys once into a state, then every query with
/// a masked key of its own.
#[test]
fn a_state_of_keys_answers_queries_and_stays_as_it_is() {
    let (n_q, n_k) = (19, 77);
    let setup = Setup::new(41).heads(4, 2).sizes(16, 12, 24);
    let inputs = setup.inputs(n_q, n_k);
    let valid: Vec<bool> = (0..n_k).map(|j| j % 7 != 3).collect();
    let (linear, exact) = (setup.build::<f64>(), setup.build_exact::<f64>());
    let (mut state, mut cache) = (linear.new_state(), exact.new_state());
    let nobody = Array3::zeros((4, n_k, 16));
    linear
        .prefill(
            &mut state,
            Qkv::new(&nobody, &inputs.k, &inputs.v).with_mask(KeyMask::Valid(&valid)),
        )
        .unwrap();
    exact
        .prefill(
            &mut cache,
            Qkv::new(&nobody, &inputs.k, &inputs.v).with_mask(KeyMask::Valid(&valid)),
        )
        .unwrap();
    let all = linear
        .bidirectional()
        .unwrap()
        .forward(Qkv::new(&inputs.q, &inputs.k, &inputs.v).with_mask(KeyMask::Valid(&valid)))
        .unwrap();
    let all_exact = exact
        .bidirectional()
        .unwrap()
        .forward(Qkv::new(&inputs.q, &inputs.k, &inputs.v).with_mask(KeyMask::Valid(&valid)))
        .unwrap();
    let (key, value) = (Array3::from_elem((2, 1, 16), 9.0), Array3::from_elem((2, 1, 12), 9.0));
    for i in 0..n_q {
        let query = inputs.q.slice(s![.., i..i + 1, ..]);
        let found = linear
            .prefill(&mut state, Qkv::new(&query, &key, &value).with_mask(KeyMask::Valid(&[false])))
            .unwrap();
        assert_close(("linear", i), &found, &all.slice(s![.., i..i + 1, ..]), 1e-11);
        let found = exact
            .prefill(&mut cache, Qkv::new(&query, &key, &value).with_mask(KeyMask::Valid(&[false])))
            .unwrap();
        assert_close(("exact", i), &found, &all_exact.slice(s![.., i..i + 1, ..]), 1e-11);
    }
}

#[test]
fn exact_equals_the_reference_on_random_configurations() {
    for seed in 2000..2100 {
        let mut random = Random::new(seed);
        let mut setup = random_setup(&mut random, seed);
        setup.m = 0;
        if random.chance(0.4) {
            let chunk = random.choose(&CHUNKS);
            setup = setup.window(chunk, random.below(4)).sinks(random.below(chunk.min(9) + 1));
            setup.uneven = random.chance(0.5);
        }
        let (n_q, n_k) = (random.choose(&LENGTHS), random.choose(&LENGTHS));
        let valid = random_mask(&mut random, n_k);
        check_exact(&setup, n_q, n_k, key_mask(&valid));
    }
}

#[test]
fn causal_equals_the_reference_for_every_length_and_chunk() {
    for n in LENGTHS {
        check_causal(&Setup::new(n as u64), n, KeyMask::All);
        check_causal(&Setup::new(n as u64).decay(-0.3), n, KeyMask::All);
        for chunk in CHUNKS {
            for back in 0..4 {
                check_causal(
                    &Setup::new(n as u64).sizes(4, 2, 3).window(chunk, back),
                    n,
                    KeyMask::All,
                );
            }
        }
    }
}

#[test]
fn every_head_and_value_size() {
    for (i, &d) in SIZES.iter().enumerate() {
        for (j, &e) in SIZES.iter().enumerate() {
            let setup = Setup::new((i * 10 + j) as u64).sizes(d, e, SIZES[(i + j) % SIZES.len()]);
            check_causal(&setup, 67, KeyMask::All);
            check_causal(&setup.clone().window(8, 1), 67, KeyMask::All);
            check_full(&setup, 19, 67, KeyMask::All);
            check_exact(&setup, 19, 67, KeyMask::All);
        }
    }
}

#[test]
fn rows_without_an_allowed_key_are_zeros() {
    let n = 90;
    let first = 70;
    let masks = [vec![false; n], (0..n).map(|j| j >= first).collect()];
    for setup in [
        Setup::new(1),
        Setup::new(2).decay(-0.1),
        Setup::new(3).window(16, 1),
        Setup::new(4).window(64, 0).decay(-2.0),
    ] {
        let setup = setup.heads(4, 2);
        let inputs: Inputs<f32> = setup.inputs(n, n).cast();
        for (valid, first) in masks.iter().zip([n, first]) {
            let out = setup.build::<f32>().causal_of(&inputs, KeyMask::Valid(valid)).unwrap();
            assert!(out.slice(s![.., ..first, ..]).iter().all(|&o| o == 0.0), "{setup:?}");
            assert!(
                out.slice(s![.., first.., ..]).iter().all(|o| o.is_finite() && *o != 0.0),
                "{setup:?}"
            );
            let exact =
                setup.build_exact::<f32>().causal_of(&inputs, KeyMask::Valid(valid)).unwrap();
            assert!(exact.slice(s![.., ..first, ..]).iter().all(|&o| o == 0.0), "{setup:?}");
            assert!(
                exact.slice(s![.., first.., ..]).iter().all(|o| o.is_finite() && *o != 0.0),
                "{setup:?}"
            );
        }
        if setup.window.is_none() {
            let exact =
                setup.build_exact::<f32>().full_of(&inputs, KeyMask::Valid(&masks[0])).unwrap();
            assert!(exact.iter().all(|&o| o == 0.0));
        }
    }
    let setup = Setup::new(5);
    let out = setup.build::<f64>().full_of(&setup.inputs(7, n), KeyMask::Valid(&masks[0])).unwrap();
    assert!(out.iter().all(|&o| o == 0.0));
}

#[test]
fn masked_keys_are_never_looked_at() {
    let n = 100;
    let mut random = Random::new(11);
    let valid: Vec<bool> = (0..n).map(|_| random.chance(0.6)).collect();
    let mask = KeyMask::Valid(&valid);
    fn check<T: Real>(
        attention: &impl Stream<T>,
        inputs: &Inputs<f64>,
        valid: &[bool],
        full: bool,
    ) {
        let mask = KeyMask::Valid(valid);
        let clean: Inputs<T> = inputs.cast();
        let mut dirty = clean.clone();
        for (j, _) in valid.iter().enumerate().filter(|(_, valid)| !**valid) {
            let value = T::from_f64([f64::NAN, f64::INFINITY, 1e300][j % 3]);
            dirty.k.index_axis_mut(Axis(1), j).fill(value);
            dirty.v.index_axis_mut(Axis(1), j).fill(value);
        }
        let run = |inputs| {
            if full { attention.full_of(inputs, mask) } else { attention.causal_of(inputs, mask) }
        };
        assert_same_bits(format!("{attention:?}"), &run(&dirty).unwrap(), &run(&clean).unwrap());
    }
    for setup in [Setup::new(1), Setup::new(2).decay(-0.1), Setup::new(3).window(16, 1)] {
        let inputs = setup.inputs(n, n);
        check(&setup.build::<f32>(), &inputs, &valid, false);
        check(&setup.build::<f64>(), &inputs, &valid, false);
        check(&setup.build_exact::<f32>(), &inputs, &valid, false);
    }
    let setup = Setup::new(4);
    check(&setup.build::<f32>(), &setup.inputs(9, n), &valid, true);
    check(&setup.build_exact::<f64>(), &setup.inputs(9, n), &valid, true);

    // The cache and the state do not keep them either: what follows is the same.
    let setup = Setup::new(5).window(8, 1);
    let attention = setup.build::<f64>();
    let inputs = setup.inputs(n, n);
    let mut dirty = inputs.clone();
    for j in (0..n).filter(|&j| !valid[j]) {
        dirty.v.index_axis_mut(Axis(1), j).fill(f64::NAN);
    }
    let (mut one, mut two) = (attention.new_state(), attention.new_state());
    attention.prefill_of(&mut one, &inputs, mask).unwrap();
    attention.prefill_of(&mut two, &dirty, mask).unwrap();
    assert_eq!(one, two);
    let next = Setup::new(6).inputs(30, 30);
    assert_same_bits("after", &attention.steps(&mut one, &next), &attention.steps(&mut two, &next));
}

/// Log-features of ±600, values of 1e14: as far from the prefix as finite input gets in this suite.
fn huge(inputs: &mut Inputs<f64>, from: usize, kind: usize) {
    let sign = |i: usize, l: usize| {
        if kind == 0 || (kind == 1 && (i + l).is_multiple_of(2)) { 1.0 } else { -1.0 }
    };
    let n = inputs.tokens();
    for (x, size) in [(&mut inputs.q, 600.0), (&mut inputs.k, 600.0), (&mut inputs.v, 1e14)] {
        for ((_, i, l), value) in x.slice_mut(s![.., from..n, ..]).indexed_iter_mut() {
            *value = sign(i, l) * size;
        }
    }
}

fn mask(masked: bool, valid: &[bool]) -> KeyMask<'_> {
    if masked { KeyMask::Valid(valid) } else { KeyMask::All }
}

fn check_causality<T: Real>(context: &Setup, attention: &impl Stream<T>, inputs: &Inputs<f64>) {
    let n = inputs.tokens();
    let mut random = Random::new(99);
    let valid: Vec<bool> = (0..n).map(|_| random.chance(0.8)).collect();
    let whole: Inputs<T> = inputs.cast();
    for masked in [false, true] {
        let base = attention.causal_of(&whole, mask(masked, &valid)).unwrap();
        let mut state = attention.new_state();
        let through_state = attention.prefill_of(&mut state, &whole, mask(masked, &valid)).unwrap();
        for prefix in [1, 2, 15, 16, 17, 33, 63, 64, 65, 100, n - 1] {
            let context = format!("{context:?}, prefix {prefix}, masked {masked}");
            for kind in 0..4 {
                let mut changed = inputs.clone();
                if kind < 3 {
                    huge(&mut changed, prefix, kind);
                } else {
                    let other = Random::new(7).normals(changed.k.raw_dim(), 2.0);
                    changed.k.slice_mut(s![.., prefix.., ..]).assign(&other.slice(s![
                        ..,
                        prefix..,
                        ..
                    ]));
                }
                let mut later = valid.clone();
                later[prefix..].iter_mut().for_each(|valid| *valid ^= kind % 2 == 1);
                let out = attention.causal_of(&changed.cast(), mask(masked, &later)).unwrap();
                assert!(
                    out.iter().all(|o| o.to_f64().is_finite()),
                    "{context}, change {kind}: not finite"
                );
                let cut = s![.., ..prefix, ..];
                assert_same_bits(
                    format!("{context}, change {kind}"),
                    &out.slice(cut),
                    &base.slice(cut),
                );
                let out = attention
                    .prefill_of(&mut attention.new_state(), &changed.cast(), mask(masked, &later))
                    .unwrap();
                assert_same_bits(
                    format!("{context}, change {kind}, prefill"),
                    &out.slice(cut),
                    &through_state.slice(cut),
                );
            }
            let shorter = attention
                .causal_of(&whole.part(0..prefix), mask(masked, &valid[..prefix]))
                .unwrap();
            assert_same_bits(
                format!("{context}, shorter"),
                &shorter,
                &base.slice(s![.., ..prefix, ..]),
            );
        }
    }
}

#[test]
fn nothing_later_changes_a_bit_of_an_output() {
    let n = 131;
    let setups = [
        Setup::new(1).sizes(4, 3, 4),
        Setup::new(2).sizes(5, 17, 24),
        Setup::new(3).decay(-0.05),
        Setup::new(4).decay(-3.0),
        Setup::new(5).window(16, 1),
        Setup::new(6).window(24, 0),
        Setup::new(7).window(100, 1).decay(-0.1),
        Setup::new(8).window(3, 2),
        Setup::new(9).heads(4, 2).decay(-0.02),
        Setup::new(10).heads(4, 2).window(16, 2),
    ];
    for setup in setups {
        let inputs = setup.inputs(n, n);
        check_causality(&setup, &setup.build::<f32>(), &inputs);
        check_causality(&setup, &setup.build::<f64>(), &inputs);
    }
    for setup in [Setup::new(11), Setup::new(12).heads(4, 2), Setup::new(13).window(16, 1)] {
        let inputs = setup.inputs(n, n);
        check_causality(&setup, &setup.build_exact::<f32>(), &inputs);
        check_causality(&setup, &setup.build_exact::<f64>(), &inputs);
    }
}

/// The same with log-features that are the coordinates, so that later ones are exactly ±600.
#[test]
fn nothing_later_changes_a_bit_with_log_features_of_600() {
    let setup = Setup { scale: Some(1.0), ..Setup::new(21).sizes(4, 3, 4) };
    for setup in [setup.clone(), setup.clone().decay(-0.5), setup.clone().window(8, 1)] {
        let inputs = setup.inputs(131, 131);
        check_causality(
            &setup,
            &setup.config().build(vec![TestMap::identity(4).cast::<f32>()]).unwrap(),
            &inputs,
        );
        check_causality(
            &setup,
            &setup.config().build(vec![TestMap::identity(4)]).unwrap(),
            &inputs,
        );
    }
}

#[cfg(feature = "rayon")]
#[test]
fn one_thread_and_many_agree_bit_for_bit() {
    fn runs<T: Real>(setup: &Setup, inputs: &Inputs<f64>) -> Vec<Array3<T>> {
        let inputs: Inputs<T> = inputs.cast();
        let (linear, exact) = (setup.build::<T>(), setup.build_exact::<T>());
        let mut outs = vec![
            linear.causal_of(&inputs, KeyMask::All).unwrap(),
            exact.causal_of(&inputs, KeyMask::All).unwrap(),
            linear.steps(&mut linear.new_state(), &inputs.part(0..40)),
            exact.prefill_of(&mut exact.new_state(), &inputs, KeyMask::All).unwrap(),
        ];
        if setup.is_pure() {
            outs.push(linear.full_of(&inputs, KeyMask::All).unwrap());
            outs.push(exact.full_of(&inputs, KeyMask::All).unwrap());
        }
        outs
    }
    fn check<T: Real>(setup: &Setup) {
        let inputs = setup.inputs(300, 300);
        let run = |threads| dijiang_testing::on_threads(threads, || runs::<T>(setup, &inputs));
        let expected = run(1);
        for threads in [2, 3, 5] {
            for (i, (got, expected)) in run(threads).iter().zip(&expected).enumerate() {
                assert_same_bits(format!("{setup:?}, {threads} threads, run {i}"), got, expected);
            }
        }
        // A workspace made for another number of threads serves as well.
        let (linear, inputs) = (setup.build::<T>(), inputs.cast());
        for (made, used) in [(1, 5), (5, 1), (2, 3)] {
            let mut workspace = dijiang_testing::on_threads(made, || linear.workspace());
            let mut out = expected[0].clone();
            out.fill(T::from_f64(f64::NAN));
            dijiang_testing::on_threads(used, || {
                linear.prefill_into(
                    &mut [&mut linear.new_state()],
                    Qkv::new(&inputs.q, &inputs.k, &inputs.v),
                    &mut out,
                    &mut workspace,
                )
            })
            .unwrap();
            assert_same_bits(
                format!("{setup:?}, made for {made}, used by {used}"),
                &out,
                &expected[0],
            );
        }
    }
    for setup in [
        Setup::new(1),
        Setup::new(2).window(16, 1),
        Setup::new(3).heads(6, 3).decay(-0.05),
        Setup::new(4).window(64, 1),
    ] {
        let setup = Setup { heads: 6, kv_heads: 3, ..setup };
        check::<f32>(&setup);
        check::<f64>(&setup);
    }
}

/// Full attention over keys in several parts, by one thread and by many: the same bits, and the
/// last query sees what it sees in a causal pass.
#[cfg(feature = "rayon")]
#[test]
fn full_attention_shares_keys_and_queries() {
    fn check<T: Real>(setup: &Setup, (queries, keys): (usize, usize), first: usize) {
        let linear = setup.build::<T>();
        let mut inputs = setup.inputs(queries, keys);
        // Frames differ between parts.
        for (at, size) in [(keys / 40, 9.0), (keys / 2, 90.0), (keys - 1, 30.0)] {
            inputs.k.slice_mut(s![.., at, ..]).mapv_inplace(|x| x * size);
        }
        let inputs: Inputs<T> = inputs.cast();
        let valid: Vec<bool> = (0..keys).map(|j| j >= first && j % 7 != 3).collect();
        let run = |threads: usize| {
            let mut workspace = linear.workspace();
            dijiang_testing::on_threads(threads, || {
                let mut out =
                    Array3::from_elem((setup.heads, queries, setup.e), T::from_f64(f64::NAN));
                let Inputs { q, k, v } = &inputs;
                linear
                    .bidirectional()
                    .unwrap()
                    .forward_into(
                        Qkv::new(q, k, v).with_mask(KeyMask::Valid(&valid)),
                        &mut out,
                        &mut workspace,
                    )
                    .unwrap();
                out
            })
        };
        let expected = run(1);
        for threads in [2, 4, 7] {
            assert_same_bits(
                format!("{setup:?}, {queries} by {keys}, {threads} threads"),
                &run(threads),
                &expected,
            );
        }
        if queries == keys {
            let causal = linear.causal_of(&inputs, KeyMask::Valid(&valid)).unwrap();
            let last = |out: &Array3<T>| out.slice(s![.., queries - 1.., ..]).mapv(Real::to_f64);
            assert_close(
                format!("{setup:?}"),
                &last(&expected),
                &last(&causal),
                tolerance::<T>(50.0, keys),
            );
        }
    }
    for setup in
        [Setup::new(1).heads(3, 1), Setup::new(2).sizes(16, 5, 7), Setup::new(3).heads(4, 2)]
    {
        for (shape, first) in [
            ((4242, 4242), 0),
            ((4242, 4242), 2100),
            ((1, 5000), 30),
            ((777, 3), 0),
            ((600, 37_000), 0),
        ] {
            check::<f32>(&setup, shape, first);
            check::<f64>(&setup, shape, first);
        }
    }
}

/// Heads too few for the threads are worked on by several: the same bits in outputs and state, the
/// same errors, and nothing changed by them.
#[cfg(feature = "rayon")]
#[test]
fn threads_share_a_head_bit_for_bit() {
    fn check<T: Real>(setup: &Setup, masked: bool) {
        let n = 7919;
        let linear = setup.build::<T>();
        let mut inputs = setup.inputs(n, n);
        // Frames move in the middle of blocks.
        for (at, size) in [(70, 9.0), (700, 30.0), (1301, 90.0)] {
            inputs.k.slice_mut(s![.., at, ..]).mapv_inplace(|x| x * size);
        }
        let inputs: Inputs<T> = inputs.cast();
        let valid: Vec<bool> = (0..n).map(|j| j > 600 && j % 7 != 3).collect();
        let run = |threads: usize| {
            let mut workspace = linear.workspace();
            dijiang_testing::on_threads(threads, || {
                let mut state = linear.new_state();
                let mut outs = Vec::new();
                for tokens in [0..29, 29..1000, 1000..n] {
                    let part = inputs.part(tokens.clone());
                    let mut out = Array3::from_elem(
                        (setup.heads, tokens.len(), setup.e),
                        T::from_f64(f64::NAN),
                    );
                    let mask = mask(masked, &valid[tokens]);
                    linear
                        .prefill_into(
                            &mut [&mut state],
                            Qkv::new(&part.q, &part.k, &part.v).with_mask(mask),
                            &mut out,
                            &mut workspace,
                        )
                        .unwrap();
                    outs.push(out);
                }
                let before = state.clone();
                for (which, at) in [(0, 1100), (1, 260), (2, n - 1)] {
                    let mut bad = inputs.clone();
                    let array =
                        [&mut bad.q, &mut bad.k, &mut bad.v].into_iter().nth(which).unwrap();
                    array[[0, at, 0]] = T::from_f64(f64::NAN);
                    let mut out = Array3::zeros((setup.heads, n, setup.e));
                    let error = linear.prefill_into(
                        &mut [&mut state],
                        Qkv::new(&bad.q, &bad.k, &bad.v),
                        &mut out,
                        &mut workspace,
                    );
                    assert!(matches!(error, Err(dijiang::Error::NonFinite { .. })), "{error:?}");
                    assert!(
                        state == before,
                        "{setup:?}, {threads} threads: an error changed the state"
                    );
                }
                (outs, state)
            })
        };
        let (expected, expected_state) = run(1);
        for threads in [2, 4, 7] {
            let (outs, state) = run(threads);
            for (got, expected) in outs.iter().zip(&expected) {
                assert_same_bits(format!("{setup:?}, {threads} threads"), got, expected);
            }
            assert!(state == expected_state, "{setup:?}, {threads} threads");
        }
    }
    let pure = Setup::new(1).heads(3, 1);
    for setup in [
        pure.clone(),
        pure.clone().decay(-0.03),
        pure.clone().window(16, 1),
        pure.window(64, 1).decay(-0.02),
    ] {
        for masked in [false, true] {
            check::<f32>(&setup, masked);
            check::<f64>(&setup, masked);
        }
    }
}

/// Leaves the traces of unrelated work in a workspace: large numbers, other lengths, masks, steps.
fn dirty<T: Real>(attention: &impl Stream<T>, setup: &Setup, workspace: &mut Workspace<T>) {
    for (n, seed) in [(200, 5), (1, 6), (37, 7)] {
        let mut inputs = Setup { seed, ..setup.clone() }.inputs(n, n);
        if n > 100 {
            huge(&mut inputs, 20, 1);
        }
        let Inputs { q, k, v }: Inputs<T> = inputs.cast();
        let mut out = Array3::zeros((setup.heads, n, setup.e));
        let valid: Vec<bool> = (0..n).map(|j| j % 3 != 1).collect();
        let mut state = attention.new_state();
        attention
            .prefill_into(
                &mut [&mut state],
                Qkv::new(&q, &k, &v).with_mask(KeyMask::Valid(&valid)),
                &mut out,
                workspace,
            )
            .unwrap();
        attention
            .prefill_into(&mut [&mut state], Qkv::new(&q, &k, &v), &mut out, workspace)
            .unwrap();
        if setup.is_pure() {
            attention
                .bidirectional()
                .unwrap()
                .forward_into(Qkv::new(&q, &k, &v), &mut out, workspace)
                .unwrap();
        }
    }
}

fn check_scratch<T: Real>(attention: &impl Stream<T>, setup: &Setup) {
    let Inputs { q, k, v }: Inputs<T> = setup.inputs(83, 83).cast();
    let nan = || Array3::from_elem((setup.heads, 83, setup.e), T::from_f64(f64::NAN));
    let mut used = attention.workspace();
    dirty(attention, setup, &mut used);
    let (mut fresh_out, mut used_out) = (nan(), nan());
    let (mut fresh_state, mut used_state) = (attention.new_state(), attention.new_state());
    for _ in 0..2 {
        attention
            .prefill_into(
                &mut [&mut fresh_state],
                Qkv::new(&q, &k, &v),
                &mut fresh_out,
                &mut attention.workspace(),
            )
            .unwrap();
        attention
            .prefill_into(&mut [&mut used_state], Qkv::new(&q, &k, &v), &mut used_out, &mut used)
            .unwrap();
        assert_same_bits(setup, &used_out, &fresh_out);
        assert!(used_state == fresh_state, "{setup:?}");
        dirty(attention, setup, &mut used);
    }
    let (q2, k2, v2) =
        (q.index_axis(Axis(1), 0), k.index_axis(Axis(1), 0), v.index_axis(Axis(1), 0));
    let (mut one, mut two) = (
        Array2::zeros((setup.heads, setup.e)),
        Array2::from_elem((setup.heads, setup.e), T::from_f64(f64::NAN)),
    );
    attention
        .step(&mut fresh_state, Qkv::token(&q2, &k2, &v2), &mut one, &mut attention.workspace())
        .unwrap();
    attention.step(&mut used_state, Qkv::token(&q2, &k2, &v2), &mut two, &mut used).unwrap();
    assert_same_bits(setup, &two, &one);
    if setup.is_pure() {
        attention
            .bidirectional()
            .unwrap()
            .forward_into(Qkv::new(&q, &k, &v), &mut fresh_out, &mut attention.workspace())
            .unwrap();
        attention
            .bidirectional()
            .unwrap()
            .forward_into(Qkv::new(&q, &k, &v), &mut used_out, &mut used)
            .unwrap();
        assert_same_bits(setup, &used_out, &fresh_out);
    }
}

#[test]
fn what_a_workspace_was_used_for_before_changes_nothing() {
    for setup in [
        Setup::new(1),
        Setup::new(2).decay(-0.2),
        Setup::new(3).window(16, 1),
        Setup::new(4).heads(4, 2).window(100, 0),
    ] {
        check_scratch(&setup.build::<f32>(), &setup);
        check_scratch(&setup.build::<f64>(), &setup);
        check_scratch(&setup.build_exact::<f32>(), &setup);
        check_scratch(&setup.build_exact::<f64>(), &setup);
    }
}

/// The same array, `[h, n, x]`, laid out in several ways.
fn layouts<T: Real>(x: &Array3<T>) -> Vec<(&'static str, Array3<T>)> {
    let (h, n, l) = x.dim();
    let permuted = |order: [usize; 3], back: [usize; 3]| {
        let copy = x.view().permuted_axes(order).as_standard_layout().into_owned();
        copy.permuted_axes(back)
    };
    let mut spread = Array3::from_elem((h, 2 * n, 3 * l), T::from_f64(f64::NAN));
    spread.slice_mut(s![.., ..;2, ..;3]).assign(x);
    let mut reversed = Array3::from_elem((h, n, l), T::from_f64(f64::NAN));
    reversed.slice_mut(s![..;-1, ..;-1, ..;-1]).assign(x);
    vec![
        ("tokens outermost", permuted([1, 0, 2], [1, 0, 2])),
        ("tokens innermost", permuted([0, 2, 1], [0, 2, 1])),
        ("strided", spread.slice_move(s![.., ..;2, ..;3])),
        ("reversed", reversed.slice_move(s![..;-1, ..;-1, ..;-1])),
    ]
}

fn check_layouts<T: Real>(attention: &impl Stream<T>, setup: &Setup) {
    let Inputs { q, k, v }: Inputs<T> = setup.inputs(71, 71).cast();
    let valid: Vec<bool> = (0..71).map(|j| j % 7 != 3).collect();
    for mask in [KeyMask::All, KeyMask::Valid(&valid)] {
        let run = |full: bool,
                   q: &ArrayView3<'_, T>,
                   k: &ArrayView3<'_, T>,
                   v: &ArrayView3<'_, T>,
                   out: &mut Array3<T>| {
            let mut workspace = attention.workspace();
            if full {
                attention
                    .bidirectional()
                    .unwrap()
                    .forward_into(Qkv::new(q, k, v).with_mask(mask), out, &mut workspace)
                    .unwrap();
            } else {
                attention
                    .prefill_into(
                        &mut [&mut attention.new_state()],
                        Qkv::new(q, k, v).with_mask(mask),
                        out,
                        &mut workspace,
                    )
                    .unwrap();
            }
        };
        for full in [false, true] {
            if full && !setup.is_pure() {
                continue;
            }
            let mut expected = Array3::zeros((setup.heads, 71, setup.e));
            run(full, &q.view(), &k.view(), &v.view(), &mut expected);
            for (name, mut out) in layouts(&expected) {
                out.fill(T::from_f64(f64::NAN));
                run(full, &q.view(), &k.view(), &v.view(), &mut out);
                assert_same_bits(format!("{setup:?}: output {name}"), &out, &expected);
            }
            for (((name, q), (_, k)), (_, v)) in
                layouts(&q).into_iter().zip(layouts(&k)).zip(layouts(&v))
            {
                let mut out = expected.clone();
                out.fill(T::from_f64(f64::NAN));
                run(full, &q.view(), &k.view(), &v.view(), &mut out);
                assert_same_bits(format!("{setup:?}: inputs {name}"), &out, &expected);
            }
        }
    }
    // A step.
    let expected = attention
        .steps(&mut attention.new_state(), &Inputs { q: q.clone(), k: k.clone(), v: v.clone() });
    for (((name, q), (_, k)), (_, v)) in layouts(&q).into_iter().zip(layouts(&k)).zip(layouts(&v)) {
        let mut out =
            Array3::from_elem((setup.e, 71, setup.heads), T::from_f64(f64::NAN)).reversed_axes();
        let (mut state, mut workspace) = (attention.new_state(), attention.workspace());
        for i in 0..71 {
            let (q, k, v) =
                (q.index_axis(Axis(1), i), k.index_axis(Axis(1), i), v.index_axis(Axis(1), i));
            attention
                .step(
                    &mut state,
                    Qkv::token(&q, &k, &v),
                    &mut out.index_axis_mut(Axis(1), i),
                    &mut workspace,
                )
                .unwrap();
        }
        assert_same_bits(format!("{setup:?}: step {name}"), &out, &expected);
    }
}

#[test]
fn memory_layout_changes_nothing() {
    for setup in
        [Setup::new(1), Setup::new(2).sizes(17, 16, 5), Setup::new(3).heads(4, 2).window(16, 1)]
    {
        check_layouts(&setup.build::<f32>(), &setup);
        check_layouts(&setup.build::<f64>(), &setup);
        check_layouts(&setup.build_exact::<f32>(), &setup);
        check_layouts(&setup.build_exact::<f64>(), &setup);
    }
    // The same keys and values for all heads, by a stride of zero.
    let setup = Setup::new(4).heads(3, 3);
    let attention = setup.build::<f64>();
    let Inputs { q, k, v } = setup.inputs(40, 40);
    let (k, v) = (k.slice(s![..1, .., ..]), v.slice(s![..1, .., ..]));
    let (k, v) = (k.broadcast((3, 40, setup.d)).unwrap(), v.broadcast((3, 40, setup.e)).unwrap());
    let expected = attention.forward(Qkv::new(&q, &k.to_owned(), &v.to_owned())).unwrap();
    assert_same_bits("broadcast", &attention.forward(Qkv::new(&q, &k, &v)).unwrap(), &expected);
}

#[test]
fn rows_beyond_the_tokens_of_an_output_are_left_alone() {
    let setup = Setup::new(1).window(8, 1);
    let attention = setup.build::<f32>();
    let Inputs { q, k, v }: Inputs<f32> = setup.inputs(20, 20).cast();
    let mut out = Array3::from_elem((1, 30, 2 * setup.e), 7.0);
    attention
        .prefill_into(
            &mut [&mut attention.new_state()],
            Qkv::new(&q, &k, &v),
            &mut out.slice_mut(s![.., 5..25, ..;2]),
            &mut attention.workspace(),
        )
        .unwrap();
    let expected = attention.forward(Qkv::new(&q, &k, &v)).unwrap();
    assert_same_bits("inside", &out.slice(s![.., 5..25, ..;2]), &expected);
    out.slice_mut(s![.., 5..25, ..;2]).fill(7.0);
    assert!(out.iter().all(|&o| o == 7.0));
}

/// Outputs are weighted means: inside the range of the values, and exactly them if they are all the
/// same.
#[test]
fn outputs_are_weighted_means() {
    for seed in 300..340 {
        let mut random = Random::new(seed);
        let mut setup = random_setup(&mut random, seed);
        if random.chance(0.5) {
            setup = setup.window(random.choose(&CHUNKS), random.below(3));
        }
        if random.chance(0.5) {
            setup = setup.decay(-0.1);
        }
        let n = random.choose(&LENGTHS);
        let attention = setup.build::<f32>();
        let mut inputs: Inputs<f32> = setup.inputs(n, n).cast();
        let out = attention.causal_of(&inputs, KeyMask::All).unwrap();
        for h in 0..setup.heads {
            let values =
                inputs.v.index_axis(Axis(0), h / (setup.heads / setup.kv_heads)).to_owned();
            for l in 0..setup.e {
                let (mut low, mut high) = (f32::INFINITY, f32::NEG_INFINITY);
                for i in 0..n {
                    (low, high) = (low.min(values[[i, l]]), high.max(values[[i, l]]));
                    let o = out[[h, i, l]];
                    assert!(
                        low - 1e-5 <= o && o <= high + 1e-5,
                        "{setup:?}: {o} at token {i} outside {low}..{high}"
                    );
                }
            }
        }
        inputs.v.fill(0.7);
        let out = attention.causal_of(&inputs, KeyMask::All).unwrap();
        assert_close(&setup, &out, &Array3::from_elem(out.raw_dim(), f64::from(0.7f32)), 2e-6);
    }
}

/// With the kernel being a constant, linear attention is the running mean.
#[test]
fn a_constant_kernel_gives_the_running_mean() {
    let (n, d) = (150, 3);
    let flat = Affine { weight: Array2::zeros((2, d)), offset: Array1::from(vec![0.5, -1.0]) };
    let attention = LinearConfig::new()
        .with_value_dim(1)
        .build(vec![TestMap { query: flat.clone(), key: flat }])
        .unwrap();
    let x = Random::new(1).normals((1, n, d), 1.0);
    let v = Array3::from_shape_fn((1, n, 1), |(_, i, _)| i as f64);
    let out = attention.forward(Qkv::new(&x, &x, &v)).unwrap();
    assert_close(
        "mean",
        &out,
        &Array3::from_shape_fn((1, n, 1), |(_, i, _)| i as f64 / 2.0),
        1e-14,
    );
}

/// A local window that reaches back to the start is softmax attention, whatever the map.
#[test]
fn a_window_part_of_everything_is_softmax_attention() {
    let setup = Setup::new(1).heads(4, 2).window(100, 2);
    let inputs = setup.inputs(300, 300);
    let exact =
        Setup { window: None, ..setup.clone() }.exact(Pairs::causal(), &inputs, KeyMask::All);
    assert_close(
        "window",
        &setup.build::<f64>().causal_of(&inputs, KeyMask::All).unwrap(),
        &exact,
        1e-13,
    );
    let setup = setup.window(1, 299);
    assert_close(
        "chunks of one",
        &setup.build::<f64>().causal_of(&inputs, KeyMask::All).unwrap(),
        &exact,
        1e-13,
    );
}

/// What a configuration leaves open has its documented default.
#[test]
fn defaults() {
    let (h, n, d) = (2, 20, 4);
    let maps = || {
        (0..h).map(|seed| TestMap::random(&mut Random::new(seed), d, 6, 1.0)).collect::<Vec<_>>()
    };
    let mut random = Random::new(3);
    let mut next = || random.normals((h as usize, n, d), 1.0);
    let (q, k, v) = (next(), next(), next());
    let plain = LinearConfig::new().build(maps()).unwrap();
    let explicit = LinearConfig::new()
        .with_heads(2)
        .with_value_dim(4)
        .with_scale(0.5)
        .with_log_decay(vec![0.0; 2]);
    let expected = explicit.build(maps()).unwrap().forward(Qkv::new(&q, &k, &v)).unwrap();
    assert_same_bits("linear", &plain.forward(Qkv::new(&q, &k, &v)).unwrap(), &expected);
    assert_eq!(plain.maps().len(), 2);
    let plain = SoftmaxConfig::new(2, d).build::<f64>().unwrap();
    let explicit = SoftmaxConfig::new(2, d)
        .with_kv_heads(2)
        .with_value_dim(4)
        .with_scale(0.5)
        .build::<f64>()
        .unwrap();
    let expected = explicit.forward(Qkv::new(&q, &k, &v)).unwrap();
    assert_same_bits("exact", &plain.forward(Qkv::new(&q, &k, &v)).unwrap(), &expected);
    assert_eq!(KeyMask::default(), KeyMask::All);
    assert_eq!((Window::new(8, 2).chunk, Window::new(8, 2).back), (8, 2));
}

#[test]
fn public_types_are_send_and_sync() {
    fn check<A: Send + Sync + 'static>() {}
    check::<LinearConfig>();
    check::<LinearAttention<f32, TestMap<f32>>>();
    check::<CausalState<f32>>();
    check::<Workspace<f32>>();
    check::<SoftmaxConfig>();
    check::<Softmax<f64>>();
    check::<KvCache<f64>>();
    check::<Window>();
    check::<KeyMask<'static>>();
    check::<dijiang::Error>();
    check::<PlainMap>();
    check::<Pairs<'static>>();
}
