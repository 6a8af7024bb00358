//! Gradients against golden values, finite differences and each other.

use dijiang::attention::{
    BackwardWorkspace, KeyMask, LinearConfig, Operator, Qkv, StateGradients, Window,
};
use dijiang::kernel::{
    DctGradients, DctMap, DctMapConfig, DctParams, DifferentiableMap, Envelope, FavorConfig,
    FeatureMap, Mixing, Pairing, PanelGradients, Projection,
};
use dijiang::{Error, Real};
#[cfg(feature = "rayon")]
use dijiang_testing::assert_same_bits;
use dijiang_testing::gradients::{CASES, Gradients, Problem, golden_problem};
use dijiang_testing::stream::Stream;
use dijiang_testing::{Golden, Inputs, Random, argument, assert_close, on_threads};
use ndarray::{Array1, Array3, ArrayD, Axis, ShapeBuilder, s};

/// A gradient by the names of [`Problem::tensors`].
fn by_name<T: Real>(gradients: &Gradients<T>, h: usize, name: &str) -> Vec<f64> {
    let map = &gradients.maps[h];
    let array = |array: &Array3<T>| array.iter().map(|x| x.to_f64()).collect();
    match name {
        "q" => array(&gradients.q),
        "k" => array(&gradients.k),
        "v" => array(&gradients.v),
        "query_center" => map.query.center.clone(),
        "key_center" => map.key.center.clone(),
        "query_scale" => map.query.scale.clone(),
        "key_scale" => map.key.scale.clone(),
        "query_radii" => map.query.radii.clone(),
        "key_radii" => map.key.radii.clone(),
        "query_projection" => map.query.projection.clone(),
        "key_projection" => map.key.projection.clone(),
        "log_weight" => map.log_weight.clone(),
        "log_mix" => vec![map.log_mix],
        "log_decay" => vec![gradients.log_decay[h]],
        other => panic!("no gradient {other}"),
    }
}

/// Largest error of every golden gradient, relative to the largest element of that gradient.
fn golden_gradients<T: Real>(tolerance: f64) {
    let golden = Golden::open("attention_f64.safetensors");
    let mut worst = (0.0, String::new());
    for tag in ["b1", "b2a"] {
        for case in CASES {
            let mut problem = golden_problem(&golden, tag, case);
            let gradients = problem.gradients::<T>();
            let names: Vec<&str> = problem
                .tensors(0)
                .iter()
                .map(|(name, _)| *name)
                .filter(|name| !name.ends_with("projection"))
                .collect();
            for name in
                names.into_iter().filter(|&name| name != "log_decay" || case.ends_with("decay"))
            {
                let expected: Vec<f64> = golden
                    .array::<ndarray::IxDyn>(&format!("{tag}.{case}.grad.{name}"))
                    .into_iter()
                    .collect();
                let got = by_name(&gradients, 0, name);
                let largest = |x: &[f64]| x.iter().fold(0.0_f64, |top, x| top.max(x.abs()));
                // Without a local window the mix cancels: what is left of its gradient is rounding
                // of sums of this size.
                let scale =
                    if name == "log_mix" { largest(&gradients.maps[0].log_weight) } else { 0.0 };
                let scale = scale.max(largest(&expected));
                let error = got
                    .iter()
                    .zip(&expected)
                    .map(|(got, expected)| (got - expected).abs())
                    .fold(0.0, f64::max)
                    / scale;
                assert_eq!(got.len(), expected.len());
                assert!(
                    error <= tolerance,
                    "{tag}.{case}.grad.{name}: error {error:e} of {scale:e}"
                );
                if error > worst.0 {
                    worst = (error, format!("{tag}.{case}.grad.{name}"));
                }
            }
        }
    }
    println!("{}: largest relative error {:e} in {}", T::NAME, worst.0, worst.1);
}

#[test]
fn golden_gradients_in_f64() {
    golden_gradients::<f64>(1e-9);
}

#[test]
fn golden_gradients_in_f32() {
    golden_gradients::<f32>(2e-3);
}

/// Random parameters and inputs; every choice follows from the seed.
fn random_problem(seed: u64) -> Problem {
    let mut random = Random::new(seed);
    let (d, e) = (random.choose(&[1, 3, 8, 16, 17, 32, 64]), random.choose(&[1, 2, 16, 19]));
    let kv_heads = random.choose(&[1, 1, 2]);
    let heads = kv_heads * random.choose(&[1, 1, 3]);
    let causal = random.chance(0.75);
    let n = random.choose(&[1, 5, 16, 64, 65, 150]);
    let n_k = if causal { n } else { random.choose(&[1, 7, 130]) };
    let windows: Vec<Window> = if causal && random.chance(0.6) {
        let mut window = || {
            let chunk = random.choose(&[1, 4, 16, 48, 64, 100]);
            let back = random.choose(&[0, 1, 2]);
            Window::new(chunk, back).with_kept(random.choose(&[0, 0, 3, 20, 70]))
        };
        (0..kv_heads).map(|_| window()).collect()
    } else {
        Vec::new()
    };
    let shortest = windows.iter().map(|window| window.chunk).min().unwrap_or(0);
    let sinks = random.below(shortest.min(5) + 1);
    let maps = (0..kv_heads).map(|h| random_map(&mut random, d, seed + h as u64)).collect();
    let log_decay = (0..kv_heads)
        .map(|_| if causal && random.chance(0.5) { -0.2 * random.normal().abs() } else { 0.0 })
        .collect();
    let valid = random.chance(0.4).then(|| (0..n_k).map(|_| random.chance(0.7)).collect());
    let inputs = Inputs {
        q: random.normals((heads, n, d), 1.5),
        k: random.normals((kv_heads, n_k, d), 1.5),
        v: random.normals((kv_heads, n_k, e), 1.0),
    };
    let cotangent = random.normals((heads, n, e), 1.0);
    Problem { maps, heads, windows, sinks, log_decay, causal, valid, inputs, cotangent }
}

fn random_map(random: &mut Random, d: usize, seed: u64) -> DctParams {
    // All heads have the same number of features, 2·d.
    let envelope = random.choose(&[Envelope::None, Envelope::Gaussian]);
    let mut map = match random.below(7) {
        0 => DctMapConfig::new().with_blocks(2).params(d).unwrap(),
        1 => DctMapConfig::new().with_pairing(Pairing::Antithetic).params(d).unwrap(),
        2 => DctMapConfig::new()
            .with_blocks(2)
            .with_mixing(Mixing::Mixed)
            .with_seed(seed)
            .params(d)
            .unwrap(),
        3 => DctMapConfig::new().with_blocks(2).params(d).unwrap().to_deep(),
        4 => DctMapConfig::new().with_pairing(Pairing::Antithetic).params(d).unwrap().to_deep(),
        5 => DctMapConfig::new()
            .with_pairing(Pairing::Antithetic)
            .with_mixing(Mixing::Mixed)
            .with_seed(seed)
            .params(d)
            .unwrap(),
        _ => FavorConfig::new(d, 2 * d).with_seed(seed).params().unwrap(),
    };
    map.envelope = envelope;
    for side in [&mut map.query, &mut map.key] {
        side.center.iter_mut().for_each(|x| *x += 0.3 * random.normal());
        side.scale.iter_mut().for_each(|x| *x += 0.3 * random.normal());
        side.radii.iter_mut().for_each(|x| *x += 0.3 * random.normal());
    }
    if let Projection::Deep { query, key } = &mut map.projection {
        query.iter_mut().chain(key).for_each(|x| *x += 0.3 * random.normal());
    }
    map.log_weight.iter_mut().for_each(|x| *x += 0.2 * random.normal());
    map.log_mix = -0.4;
    map
}

/// Along a random direction of every tensor, the slope of the loss is the gradient times the
/// direction.
#[test]
fn finite_differences() {
    for seed in 0..60 {
        let mut problem = random_problem(seed);
        let gradients = problem.gradients::<f64>();
        let mut random = Random::new(seed + 1000);
        for h in 0..problem.maps.len() {
            let names: Vec<(&str, usize)> =
                problem.tensors(h).iter().map(|(name, x)| (*name, x.len())).collect();
            for (index, (name, len)) in
                names.into_iter().enumerate().filter(|(_, (_, len))| *len > 0)
            {
                // γ must not exceed one, and full attention takes no decay.
                let fixed = name == "log_decay" && (problem.log_decay[h] > -1e-3);
                if fixed || (h > 0 && ["q", "k", "v"].contains(&name)) {
                    continue;
                }
                let direction: Array1<f64> = random.normals(len, 1.0);
                let gradient = Array1::from(by_name(&gradients, h, name));
                assert_eq!(gradient.len(), len, "{name}");
                let step = 1e-5;
                let at = |step: f64| {
                    let mut moved = problem.clone();
                    moved.tensors(h)[index]
                        .1
                        .iter_mut()
                        .zip(&direction)
                        .for_each(|(x, u)| *x += step * u);
                    moved.loss()
                };
                let slope = (8.0 * (at(step) - at(-step)) - (at(2.0 * step) - at(-2.0 * step)))
                    / (12.0 * step);
                let size = (gradient.dot(&gradient) * direction.dot(&direction)).sqrt();
                let error = (gradient.dot(&direction) - slope).abs();
                let shape = (problem.inputs.q.shape(), problem.inputs.v.shape());
                assert!(
                    error <= 1e-7 * size + 1e-8,
                    "seed {seed} head {h} {name}: {} is not {slope}, error {error:e}, {shape:?} \
                     {:?} decay {:?} causal {} masked {}",
                    gradient.dot(&direction),
                    problem.windows,
                    problem.log_decay,
                    problem.causal,
                    problem.valid.is_some()
                );
            }
        }
    }
}

/// Gradients of the second part of a sequence, continued from the state of the first, are those of
/// the whole sequence with nothing asked of the first part.
#[test]
fn continuing_a_state() {
    for seed in 0..40 {
        let mut problem = random_problem(seed);
        problem.causal = true;
        let n = 150;
        let mut random = Random::new(seed + 77);
        let shape = |x: &Array3<f64>| (x.shape()[0], n, x.shape()[2]);
        problem.inputs = Inputs {
            q: random.normals(shape(&problem.inputs.q), 1.5),
            k: random.normals(shape(&problem.inputs.k), 1.5),
            v: random.normals(shape(&problem.inputs.v), 1.0),
        };
        problem.valid = None;
        let cut = random.choose(&[0, 1, 16, 48, 50, 64, 128, 149]);
        problem.cotangent = random.normals((problem.heads, n, problem.inputs.v.shape()[2]), 1.0);
        problem.cotangent.slice_mut(s![.., ..cut, ..]).fill(0.0);
        let whole = problem.gradients::<f64>();

        let attention = problem.attention::<f64>();
        let (first, second) = (problem.inputs.part(0..cut), problem.inputs.part(cut..n));
        let mut state = attention.new_state();
        if cut > 0 {
            attention.prefill(&mut state, Qkv::new(&first.q, &first.k, &first.v)).unwrap();
        }
        let grad = problem.cotangent.slice(s![.., cut.., ..]).to_owned();
        let (part, states) = attention
            .prefill_backward(&state, Qkv::new(&second.q, &second.k, &second.v), &grad, None)
            .unwrap();
        let context = format!("seed {seed} cut {cut} window {:?}", problem.windows);
        assert_close(&context, &part.q, &whole.q.slice(s![.., cut.., ..]), 1e-10);
        assert_close(&context, &part.k, &whole.k.slice(s![.., cut.., ..]), 1e-10);
        assert_close(&context, &part.v, &whole.v.slice(s![.., cut.., ..]), 1e-10);
        for (h, state) in states.iter().enumerate() {
            let kept = state.keys.nrows();
            assert_eq!(!problem.windows.is_empty() && cut > 0, kept > 0, "{context}");
            let whole_rows =
                |x: &Array3<f64>| x.index_axis(Axis(0), h).select(Axis(0), &state.positions);
            assert_close(&context, &state.keys, &whole_rows(&whole.k), 1e-10);
            assert_close(&context, &state.values, &whole_rows(&whole.v), 1e-10);
        }
    }
}

/// The gradients of a whole sequence from those of its segments, the last one first: each is told
/// what those behind it found of the state between them. Either at once, or, as sequence
/// parallelism does it, of a segment's own outputs first and of its later readers when they are
/// known.
#[test]
fn segments_are_told_of_their_later_readers() {
    for seed in 0..60 {
        let mut problem = random_problem(seed);
        problem.causal = true;
        let n = 170;
        let mut random = Random::new(seed + 177);
        let shape = |x: &Array3<f64>| (x.shape()[0], n, x.shape()[2]);
        problem.inputs = Inputs {
            q: random.normals(shape(&problem.inputs.q), 1.5),
            k: random.normals(shape(&problem.inputs.k), 1.5),
            v: random.normals(shape(&problem.inputs.v), 1.0),
        };
        problem.valid =
            random.chance(0.3).then(|| (0..n).map(|_| random.chance(0.7)).collect::<Vec<_>>());
        problem.cotangent = random.normals((problem.heads, n, problem.inputs.v.shape()[2]), 1.0);
        let whole = problem.gradients::<f64>();
        let attention = problem.attention::<f64>();
        let mut cuts = [random.below(n + 1), random.below(n + 1), 0, n];
        cuts.sort();
        let segments: Vec<_> = cuts.windows(2).map(|cut| cut[0]..cut[1]).collect();
        let segments: Vec<_> = segments.into_iter().filter(|segment| !segment.is_empty()).collect();
        let part = |tokens: &std::ops::Range<usize>| {
            let grad = problem.cotangent.slice(s![.., tokens.clone(), ..]).to_owned();
            let valid = problem.valid.as_ref().map(|valid| valid[tokens.clone()].to_vec());
            (problem.inputs.part(tokens.clone()), valid, grad)
        };
        let mut states = vec![attention.new_state()];
        for segment in &segments {
            let (Inputs { q, k, v }, valid, _) = part(segment);
            let mask = valid.as_deref().map_or(KeyMask::All, KeyMask::Valid);
            let mut state = states[states.len() - 1].clone();
            attention.prefill(&mut state, Qkv::new(&q, &k, &v).with_mask(mask)).unwrap();
            states.push(state);
        }
        for at_once in [true, false] {
            let mut after: Option<Vec<StateGradients<f64>>> = None;
            let mut maps: Vec<_> = problem.maps.iter().map(DctGradients::zeros).collect();
            let mut log_decay = vec![0.0; maps.len()];
            let context =
                format!("seed {seed} {segments:?} {:?} at once {at_once}", problem.windows);
            for (segment, state) in segments.iter().zip(&states).rev() {
                let (Inputs { q, k, v }, valid, grad) = part(segment);
                let mask = valid.as_deref().map_or(KeyMask::All, KeyMask::Valid);
                let qkv = Qkv::new(&q, &k, &v).with_mask(mask);
                let told = after.as_deref().filter(|_| at_once);
                let (mut own, mut before) =
                    attention.prefill_backward(state, qkv, &grad, told).unwrap();
                let mut passes = vec![(own.maps.clone(), own.log_decay.clone())];
                if let (false, Some(after)) = (at_once, &after) {
                    let (later, through) =
                        attention.extend_backward(state, (&k, &v), mask, after).unwrap();
                    assert_eq!(later.q.dim(), (0, segment.len(), k.shape()[2]));
                    own.k += &later.k;
                    own.v += &later.v;
                    for (before, through) in before.iter_mut().zip(&through) {
                        assert_eq!(before.positions, through.positions);
                        before.sums += &through.sums;
                        before.norm += &through.norm;
                        before.keys += &through.keys;
                        before.values += &through.values;
                    }
                    passes.push((later.maps, later.log_decay));
                }
                for (found, decays) in passes {
                    maps.iter_mut().zip(&found).for_each(|(sum, found)| sum.add(found));
                    log_decay.iter_mut().zip(decays).for_each(|(sum, found)| *sum += found);
                }
                let rows = |x: &Array3<f64>| x.slice(s![.., segment.clone(), ..]).to_owned();
                assert_close(&context, &own.q, &rows(&whole.q), 1e-10);
                assert_close(&context, &own.k, &rows(&whole.k), 1e-10);
                assert_close(&context, &own.v, &rows(&whole.v), 1e-10);
                after = Some(before);
            }
            let mut sum = whole.clone();
            (sum.maps, sum.log_decay) = (maps, log_decay);
            for h in 0..problem.maps.len() {
                for name in ["query_scale", "key_scale", "key_radii", "log_weight", "log_decay"] {
                    let array = |x: Vec<f64>| ArrayD::from_shape_vec(vec![x.len()], x).unwrap();
                    let (found, expected) = (by_name(&sum, h, name), by_name(&whole, h, name));
                    assert_close((&context, name), &array(found), &array(expected), 1e-9);
                }
            }
        }
    }
}

/// Gradients of later readers that cannot be those of the state after the tokens.
#[test]
fn later_readers_are_checked() {
    let map = || DctMapConfig::new().build::<f64>(4).unwrap();
    let attention = LinearConfig::new().with_window(Window::new(8, 1)).build(vec![map()]).unwrap();
    let x = Random::new(5).normals((1, 40, 4), 1.0);
    let mut state = attention.new_state();
    attention.prefill(&mut state, Qkv::new(&x, &x, &x)).unwrap();
    let sound = attention.new_state_gradients(&state).unwrap();
    let start = attention.new_state();
    let found = |after: &[StateGradients<f64>]| {
        let by_keys = attention.extend_backward(&start, (&x, &x), KeyMask::All, after);
        let whole = attention.prefill_backward(&start, Qkv::new(&x, &x, &x), &x, Some(after));
        assert_eq!(by_keys.as_ref().err(), whole.as_ref().err());
        by_keys.map(|_| ()).err()
    };
    assert_eq!(found(&sound), None);
    assert!(matches!(found(&[]), Some(Error::Length { argument: "after", .. })));
    let changed = |change: &dyn Fn(&mut StateGradients<f64>)| {
        let mut after = sound.clone();
        change(&mut after[0]);
        found(&after)
    };
    let shapes: [&dyn Fn(&mut StateGradients<f64>); 3] = [
        &|after| after.norm = Array1::zeros(5),
        &|after| after.frame = Some((Array1::zeros(3), 0)),
        &|after| after.positions.truncate(2),
    ];
    for shape in shapes {
        assert!(matches!(changed(shape), Some(Error::Shape { .. })));
    }
    let infinite = changed(&|after| after.keys[[3, 1]] = f64::INFINITY);
    assert!(matches!(infinite, Some(Error::NonFinite { argument: "after.keys", .. })));
    let later = changed(&|after| after.positions[0] = 40);
    assert!(matches!(later, Some(Error::Value { argument: "after.positions", got: 40.0, .. })));
    let mut own = sound[0].clone();
    own.frame = Some((Array1::zeros(3), 0));
    assert!(matches!(own.add_later(&sound[0], 0.0), Err(Error::Shape { .. })));
}

/// Log-features of ±600 in f32: finite, and what f64 says.
#[test]
fn extreme_log_features() {
    for seed in 0..12 {
        let mut random = Random::new(seed);
        let (d, n) = (16, 200);
        let mut map = DctMapConfig::new().with_pairing(Pairing::Antithetic).params(d).unwrap();
        for side in [&mut map.query, &mut map.key] {
            side.radii.fill(250.0);
        }
        let inputs = Inputs {
            q: random.normals((1, n, d), 2.0),
            k: random.normals((1, n, d), 2.0),
            v: random.normals((1, n, d), 1.0),
        };
        let problem = Problem {
            maps: vec![map],
            heads: 1,
            windows: (seed % 3 == 1).then(|| Window::new(16, 1)).into_iter().collect(),
            sinks: if seed % 6 == 1 { 3 } else { 0 },
            log_decay: vec![if seed % 2 == 0 { -0.1 } else { 0.0 }],
            causal: true,
            valid: None,
            inputs,
            cotangent: random.normals((1, n, d), 1.0),
        };
        let map = DctMap::<f64>::from_params(problem.maps[0].clone()).unwrap();
        let x = problem.inputs.k.index_axis(Axis(0), 0).mapv(|x| x * 0.5);
        let features = dijiang::kernel::FeatureMap::key_log_features(&map, &x).unwrap();
        assert!(
            features.iter().any(|&b| b > 600.0) && features.iter().any(|&b| b < -600.0),
            "as extreme as promised"
        );
        let (single, double) = (problem.gradients::<f32>(), problem.gradients::<f64>());
        for (name, single, double) in
            [("q", &single.q, &double.q), ("k", &single.k, &double.k), ("v", &single.v, &double.v)]
        {
            assert_close((seed, name), single, double, 2e-2);
        }
        for name in ["query_scale", "key_radii", "log_weight", "log_decay"] {
            let array = |x: Vec<f64>| ArrayD::from_shape_vec(vec![x.len()], x).unwrap();
            assert_close(
                (seed, name),
                &array(by_name(&single, 0, name)),
                &array(by_name(&double, 0, name)),
                2e-2,
            );
        }
    }
}

#[test]
#[cfg(feature = "rayon")]
fn threads_change_no_bit() {
    for seed in 0..12 {
        let mut problem = random_problem(seed);
        let (kv_heads, group) = (5, problem.heads / problem.maps.len());
        problem.maps = vec![problem.maps[0].clone(); kv_heads];
        problem.windows.truncate(1);
        problem.log_decay = vec![problem.log_decay[0]; kv_heads];
        problem.heads = kv_heads * group;
        let mut random = Random::new(seed + 5);
        let mut heads =
            |x: &Array3<f64>, h: usize| random.normals((h, x.shape()[1], x.shape()[2]), 1.0);
        problem.inputs = Inputs {
            q: heads(&problem.inputs.q, problem.heads),
            k: heads(&problem.inputs.k, kv_heads),
            v: heads(&problem.inputs.v, kv_heads),
        };
        problem.cotangent = heads(&problem.cotangent, problem.heads);
        let on = |threads| on_threads(threads, || problem.gradients::<f32>());
        let (one, three) = (on(1), on(3));
        assert_same_bits(seed, &one.q, &three.q);
        assert_same_bits(seed, &one.k, &three.k);
        assert_same_bits(seed, &one.v, &three.v);
        assert_eq!((&one.maps, &one.log_decay), (&three.maps, &three.log_decay));
    }
}

/// The gradients of `problem`, in memory that is full of NaN.
fn gradients_into(
    problem: &Problem,
    gradients: &mut Gradients<f64>,
    ws: &mut BackwardWorkspace<f64>,
) -> dijiang::Result<()> {
    let (attention, Inputs { q, k, v }) = (problem.attention::<f64>(), &problem.inputs);
    for array in [&mut gradients.q, &mut gradients.k, &mut gradients.v] {
        array.fill(f64::NAN);
    }
    match problem.causal {
        true => attention.backward_into(
            Qkv::new(q, k, v).with_mask(problem.mask()),
            &problem.cotangent,
            gradients,
            ws,
        ),
        false => attention.bidirectional().unwrap().backward_into(
            Qkv::new(q, k, v).with_mask(problem.mask()),
            &problem.cotangent,
            gradients,
            ws,
        ),
    }
}

/// The same bits in memory that was used for other inputs before, on another number of threads, and
/// in another layout; also after an error.
#[test]
fn memory_that_is_used_again() {
    for seed in 0..30 {
        let problem = random_problem(seed);
        let (attention, expected) = (problem.attention::<f64>(), problem.gradients::<f64>());
        let [n, n_k] = [&problem.inputs.q, &problem.inputs.k].map(|x| x.shape()[1]);
        let mut gradients = attention.new_gradients(n, n_k).unwrap();
        for array in [&mut gradients.q, &mut gradients.k, &mut gradients.v] {
            *array = Array3::zeros(array.raw_dim().f());
        }
        let mut ws = attention.backward_workspace();
        let mut other = problem.clone();
        (other.inputs.q, other.valid) = (&problem.inputs.q * 30.0, None);
        let mut bad = problem.clone();
        let at = [problem.maps.len() - 1, n_k - 1, 0];
        bad.inputs.v[at] = f64::NAN;
        bad.valid = None;
        for threads in [1, 5, 2] {
            on_threads(threads, || {
                gradients_into(&other, &mut gradients, &mut ws).unwrap();
                let error = gradients_into(&bad, &mut gradients, &mut ws).unwrap_err();
                let index = (at[0] * n_k + at[1]) * problem.inputs.v.shape()[2];
                assert!(
                    matches!(
                        error,
                        Error::NonFinite { argument: "v", index: got, .. } if got == index
                    ),
                    "{error:?}"
                );
                gradients_into(&problem, &mut gradients, &mut ws).unwrap();
            });
            assert!(gradients == expected, "seed {seed}, {threads} threads");
        }
    }
}

/// What a map's parameters need does not depend on whether the inputs' gradients are wanted, nor on
/// what the scratch held.
#[test]
fn panels_of_a_map() {
    fn check<T: Real>(random: &mut Random, d: usize) {
        let map = DctMap::<T>::from_params(random_map(random, d, 3)).unwrap();
        let width = 48;
        let mut panel = |rows: usize| -> Vec<T> {
            (0..rows * width).map(|_| T::from_f64(random.normal())).collect()
        };
        let (x, grad, start) = (panel(d), panel(map.features()), panel(d));
        let run = |fill: f64, wanted: bool| {
            let (mut sums, mut grad_x) = (map.new_sums(), start.clone());
            let mut scratch = vec![T::from_f64(fill); map.vjp_scratch_len(width)];
            for vjp in [DctMap::query_vjp, DctMap::key_vjp] {
                let grad_x = wanted.then_some(&mut grad_x[..]);
                vjp(
                    &map,
                    PanelGradients { width, x: &x, grad: &grad, grad_x },
                    &mut sums,
                    &mut scratch,
                );
            }
            (map.gradients(&sums), grad_x)
        };
        let (gradients, grad_x) = run(f64::NAN, true);
        assert!(gradients == run(0.0, true).0 && gradients == run(f64::NAN, false).0, "{map:?}");
        assert!(grad_x == run(0.0, true).1 && start == run(f64::NAN, false).1, "{map:?}");
    }
    let mut random = Random::new(8);
    for d in [1, 5, 8, 16, 32, 64].repeat(6) {
        check::<f32>(&mut random, d);
        check::<f64>(&mut random, d);
    }
}

/// Masked keys before the first other one, more than a block of them, are as if they were not
/// there, and so are their queries.
#[test]
fn masked_beginnings() {
    let mut random = Random::new(3);
    for (causal, first, n) in
        [(true, 70, 150), (true, 150, 150), (false, 70, 150), (false, 131, 131)]
    {
        let (h, d, e) = (2, 8, 5);
        let mut problem = Problem {
            maps: vec![random_map(&mut random, d, 1)],
            heads: h,
            windows: Vec::new(),
            sinks: 0,
            log_decay: vec![if causal { -0.02 } else { 0.0 }],
            causal,
            valid: Some((0..n).map(|j| j >= first).collect()),
            inputs: Inputs {
                q: random.normals((h, n, d), 1.0),
                k: random.normals((1, n, d), 1.0),
                v: random.normals((1, n, e), 1.0),
            },
            cotangent: random.normals((h, n, e), 1.0),
        };
        // Nobody looks at them.
        problem.inputs.k.slice_mut(s![.., ..first, ..]).fill(f64::NAN);
        problem.inputs.v.slice_mut(s![.., ..first, ..]).fill(f64::NAN);
        let attention = problem.attention::<f64>();
        let mut gradients = attention.new_gradients(n, n).unwrap();
        gradients_into(&problem, &mut gradients, &mut attention.backward_workspace()).unwrap();
        let zeros = |part: ndarray::ArrayView3<'_, f64>| part.iter().all(|&x| x == 0.0);
        assert!(
            zeros(gradients.k.slice(s![.., ..first, ..]))
                && zeros(gradients.v.slice(s![.., ..first, ..])),
            "{causal} {first}"
        );
        let queries = if causal || first == n { first } else { 0 };
        assert!(zeros(gradients.q.slice(s![.., ..queries, ..])), "{causal} {first}");
        if first == n {
            continue;
        }
        let mut rest = problem.clone();
        rest.valid = None;
        let part = |x: &Array3<f64>, first: usize| x.slice(s![.., first.., ..]).to_owned();
        rest.inputs = Inputs {
            q: part(&problem.inputs.q, queries),
            k: part(&problem.inputs.k, first),
            v: part(&problem.inputs.v, first),
        };
        rest.cotangent = part(&problem.cotangent, queries);
        let expected = rest.gradients::<f64>();
        assert_close("q", &part(&gradients.q, queries), &expected.q, 1e-12);
        assert_close("k", &part(&gradients.k, first), &expected.k, 1e-12);
        assert_close("v", &part(&gradients.v, first), &expected.v, 1e-12);
    }
}

#[test]
fn results_and_memory_of_another_shape() {
    let problem = random_problem(1);
    let (attention, Inputs { q, k, v }, grad) =
        (problem.attention::<f64>(), &problem.inputs, &problem.cotangent);
    let n = q.shape()[1];
    let run = |gradients: &mut Gradients<f64>, ws: &mut BackwardWorkspace<f64>| {
        attention.backward_into(Qkv::new(q, k, v), grad, gradients, ws).unwrap_err()
    };
    for (name, queries, keys) in [("gradients.q", n + 1, n), ("gradients.k", n, n - 1)] {
        let error = run(
            &mut attention.new_gradients(queries, keys).unwrap(),
            &mut attention.backward_workspace(),
        );
        assert_eq!(argument(&error), name);
    }
    let mut narrow = attention.new_gradients(n, n).unwrap();
    narrow.v = Array3::zeros((narrow.v.shape()[0], n, narrow.v.shape()[2] + 1));
    assert_eq!(argument(&run(&mut narrow, &mut attention.backward_workspace())), "gradients.v");
    let other = LinearConfig::new()
        .build(vec![DctMapConfig::new().build::<f64>(q.shape()[2] + 1).unwrap()])
        .unwrap();
    assert_eq!(
        argument(&run(
            &mut attention.new_gradients(n, n).unwrap(),
            &mut other.backward_workspace()
        )),
        "workspace"
    );
    assert!(matches!(attention.new_gradients(1 << 60, 1), Err(Error::TooLarge { .. })));
}

#[test]
fn errors_name_the_argument() {
    let problem = random_problem(1);
    let attention = problem.attention::<f64>();
    let Inputs { q, k, v } = &problem.inputs;
    let n = q.shape()[1];
    let run = |grad: &Array3<f64>| attention.backward(Qkv::new(q, k, v), grad).unwrap_err();
    let shape = problem.cotangent.raw_dim();
    assert_eq!(argument(&run(&Array3::zeros((shape[0], n + 1, shape[2])))), "grad_out");
    assert_eq!(argument(&run(&Array3::zeros((shape[0], n, shape[2] + 1)))), "grad_out");
    let mut bad = problem.cotangent.clone();
    bad[[0, n - 1, 0]] = f64::NAN;
    assert_eq!(argument(&run(&bad)), "grad_out");
    let mut decaying = problem.clone();
    (decaying.windows, decaying.log_decay) =
        (vec![Window::new(4, 0)], vec![0.0; problem.maps.len()]);
    let full = |problem: &Problem| problem.attention::<f64>().bidirectional().unwrap_err();
    assert_eq!(argument(&full(&decaying)), "window");
    (decaying.windows, decaying.log_decay) = (Vec::new(), vec![-0.1; problem.maps.len()]);
    assert_eq!(argument(&full(&decaying)), "log_decay");
}
