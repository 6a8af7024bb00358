//! Plans and refits: what they measure, what they choose, and what they refuse.

use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{Budget, Plan, PlanOptions, Planner, Refit, Sample};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
    SoftmaxAttention,
};
use dijiang::{Error, Result};
use dijiang_testing::{Random, argument, assert_close};
use ndarray::{Array1, Array2, Axis, s};

const D: usize = 12;
const CHUNKS: [usize; 4] = [4, 8, 16, 32];

/// Heads of 4 on as many key-value heads as are asked for.
fn softmax(heads: usize, kv_heads: usize, seed: u64) -> SoftmaxAttention<f64> {
    let mut random = Random::new(seed);
    let mut matrix = |rows, cols| random.normals((rows, cols), 1.3 / (D as f64).sqrt());
    let (width, kv_width) = (4 * heads, 4 * kv_heads);
    let weights = AttentionWeights::new(
        matrix(width, D),
        matrix(kv_width, D),
        matrix(kv_width, D),
        matrix(D, width),
    );
    let config = AttentionConfig::new(D, heads).with_kv_heads(kv_heads).with_head_dim(4);
    SoftmaxAttention::new(config, weights).unwrap()
}

fn linear(softmax: &SoftmaxAttention<f64>) -> DijiangAttention<f64> {
    DijiangAttention::from_softmax(softmax, DijiangOptions::new()).unwrap()
}

fn planner(sinks: usize) -> Planner {
    let windows = CHUNKS.map(|chunk| Window::new(chunk, 1)).to_vec();
    Planner::new(PlanOptions::new().with_windows(windows).with_sinks(sinks)).unwrap()
}

/// What a layer is given and the hidden states that enter its block.
fn text(n: usize, seed: u64) -> (Array2<f64>, Array2<f64>) {
    let mut random = Random::new(seed);
    (random.normals((n, D), 1.0), random.normals((n, D), 2.0))
}

/// A model of three layers, measured on two texts.
fn measured() -> (Planner, Vec<DijiangAttention<f64>>) {
    let (mut planner, mut model) = (planner(3), Vec::new());
    for l in 0..3 {
        let softmax = softmax(6, 3, l);
        let texts = [text(101, 10 + l), text(160, 20 + l)];
        let samples = texts.each_ref().map(|(x, _)| Sample::new(&softmax, x).unwrap());
        let hidden = texts.iter().map(|(_, hidden)| hidden.view());
        let samples: Vec<_> = samples.iter().zip(hidden).collect();
        model.push(linear(&softmax));
        planner.measure(&model[model.len() - 1], &samples).unwrap();
    }
    (planner, model)
}

fn error(plan: &Plan) -> f64 {
    plan.layers().iter().flatten().map(|head| head.error).sum()
}

/// ε by its formula: of a layer with one key-value head it is the difference of two outputs.
#[test]
fn the_measure_is_its_formula() {
    let softmax = softmax(2, 1, 1);
    let (x, hidden) = text(150, 2);
    let mut planner = planner(2);
    let sample = Sample::new(&softmax, &x).unwrap();
    planner.measure(&linear(&softmax), &[(&sample, hidden.view())]).unwrap();
    for chunk in CHUNKS {
        let window = Window::new(chunk, 1);
        let layer = linear(&softmax).with_windows(vec![window], 2).unwrap();
        let wrong =
            layer.forward(&x, KeyMask::All).unwrap() - softmax.forward(&x, KeyMask::All).unwrap();
        let squares = |rows: &Array2<f64>| (rows * rows).sum_axis(Axis(1));
        let expected = (squares(&wrong) / squares(&hidden)).mean().unwrap();
        let plan = planner.plan(Budget::AverageWindow(chunk as f64)).unwrap();
        // More is not always better: the plan may stay below what it could spend.
        if let [head] = plan.layers()[0][..]
            && head.window == window
        {
            assert_close(
                chunk,
                &Array1::from(vec![head.error]),
                &Array1::from(vec![expected]),
                1e-9,
            );
        }
    }
    let longest = planner.plan(Budget::AverageWindow(32.0)).unwrap();
    assert_eq!(longest.windows(0).unwrap(), [Window::new(32, 1)]);
}

#[test]
fn a_plan_spends_what_it_may_where_it_helps() {
    let (planner, model) = measured();
    let bytes = |plan: &Plan| -> usize {
        let layers = model.iter().enumerate();
        layers.map(|(l, layer)| plan.apply(l, layer).unwrap().new_state().bytes()).sum()
    };
    let mut before = f64::INFINITY;
    for average in [4.0, 5.0, 8.0, 13.0, 20.0, 32.0] {
        let plan = planner.plan(Budget::AverageWindow(average)).unwrap();
        assert!(plan.average_window() <= average && plan.sinks() == 3);
        assert_eq!(plan.bytes(), bytes(&plan), "a plan's bytes are those of the states");
        assert!(error(&plan) <= before, "{average}");
        before = error(&plan);
        assert_eq!(plan, planner.plan(Budget::AverageWindow(average)).unwrap());
        // The same bytes buy no less.
        let same = planner.plan(Budget::Bytes(plan.bytes())).unwrap();
        assert!(same.bytes() <= plan.bytes());

        let frontier = plan.frontier();
        let last = frontier[frontier.len() - 1];
        assert_eq!((last.bytes, last.average_window), (plan.bytes(), plan.average_window()));
        assert!(
            frontier
                .windows(2)
                .all(|pair| { pair[1].bytes > pair[0].bytes && pair[1].error < pair[0].error })
        );
    }
    // Heads differ, and so do their windows.
    let plan = planner.plan(Budget::AverageWindow(13.0)).unwrap();
    let windows: Vec<_> = plan.layers().iter().flatten().map(|head| head.window.chunk).collect();
    assert!(windows.iter().any(|chunk| *chunk != windows[0]), "{windows:?}");
    let work = planner.plan(Budget::Work(usize::MAX)).unwrap();
    assert_eq!(error(&work), before);
}

/// Of two windows of the same bytes a head has the one with the smaller error.
#[test]
fn rooms_of_the_same_size_compete() {
    let softmax = softmax(6, 3, 0);
    let (x, hidden) = text(200, 30);
    let sample = Sample::new(&softmax, &x).unwrap();
    let error_of = |windows: &[Window]| {
        let options = PlanOptions::new().with_windows(windows.to_vec()).with_sinks(0);
        let mut planner = Planner::new(options).unwrap();
        planner.measure(&linear(&softmax), &[(&sample, hidden.view())]).unwrap();
        let plan = planner.plan(Budget::AverageWindow(16.0)).unwrap();
        (plan.layers()[0].clone(), plan.bytes())
    };
    let (small, whole) = (Window::new(16, 0), Window::new(16, 1));
    let keeps = Window::new(16, 0).with_kept(16);
    let (of_whole, bytes) = error_of(&[small, whole]);
    let (of_keeps, same) = error_of(&[small, keeps]);
    assert_eq!(bytes, same);
    for offers in [[small, whole, keeps], [small, keeps, whole]] {
        for (h, head) in error_of(&offers).0.iter().enumerate() {
            let (window, error) = match of_keeps[h].error < of_whole[h].error {
                true => (keeps, of_keeps[h].error),
                false => (whole, of_whole[h].error),
            };
            assert_eq!((head.window, head.error), (window, error), "head {h}");
        }
    }
    let offers = PlanOptions::new().windows;
    assert!(offers.contains(&Window::new(16, 5).with_kept(32)), "{offers:?}");
    assert!(offers.iter().all(|window| window.kept == 0 || window.tokens() < 1024), "{offers:?}");
}

#[test]
fn impossible_plans() {
    let windows = |chunks: &[usize]| {
        let windows = chunks.iter().map(|&chunk| Window::new(chunk, 1)).collect();
        Planner::new(PlanOptions::new().with_windows(windows)).map(|_| ()).unwrap_err()
    };
    assert_eq!(windows(&[]), Error::Empty { argument: "windows" });
    for chunks in [&[16, 8][..], &[0], &[2, 64], &[usize::MAX]] {
        windows(chunks); // no panic
    }
    let (planner, model) = measured();
    for budget in [
        Budget::AverageWindow(3.9),
        Budget::AverageWindow(f64::NAN),
        Budget::Bytes(1),
        Budget::Work(1),
    ] {
        assert!(matches!(planner.plan(budget), Err(Error::Value { .. })), "{budget:?}");
    }
    let nothing = self::planner(0).plan(Budget::Bytes(usize::MAX));
    assert_eq!(nothing.unwrap_err(), Error::Empty { argument: "layers measured" });

    let plan = planner.plan(Budget::AverageWindow(8.0)).unwrap();
    assert_eq!(argument(&plan.windows(3).unwrap_err()), "layer");
    assert_eq!(
        argument(&plan.apply(0, &linear(&softmax(6, 2, 1))).unwrap_err()),
        "heads of the plan"
    );

    let mut planner = planner;
    let (x, hidden) = text(50, 1);
    let [own, other] = [3, 2].map(|kv_heads| Sample::new(&softmax(6, kv_heads, 1), &x).unwrap());
    let short = hidden.slice(s![..49, ..]);
    let mut measure = |samples: &[_]| planner.measure(&model[0], samples).unwrap_err();
    assert_eq!(argument(&measure(&[])), "samples");
    assert_eq!(argument(&measure(&[(&own, short)])), "hidden states");
    assert_eq!(argument(&measure(&[(&other, hidden.view())])), "sample");
    assert_eq!(plan, planner.plan(Budget::AverageWindow(8.0)).unwrap(), "nothing was added");
}

/// The refit's normal equations hold, and it does what it is for.
#[test]
fn a_refit_leads_back() -> Result<()> {
    let exact = softmax(6, 3, 5);
    let mut layer = linear(&exact).with_windows(vec![Window::new(4, 1)], 2)?;
    let texts = [text(90, 1), text(133, 2)];
    let mut refit = Refit::new(&layer);
    let (mut gram, mut moments) = (Array2::<f64>::zeros((24, 24)), Array2::<f64>::zeros((24, D)));
    let heads = |layer: &DijiangAttention<f64>, x: &Array2<f64>| -> Result<Array2<f64>> {
        // Head outputs through an output projection that is the identity.
        let mut weights = AttentionWeights::clone(layer.weights());
        let mut outputs = Array2::zeros((x.nrows(), 24));
        for half in 0..2 {
            weights.o = Array2::zeros((D, 24));
            (0..D).for_each(|i| weights.o[[i, half * D + i]] = 1.0);
            let part = layer.clone().with_weights(weights.clone())?.forward(x, KeyMask::All)?;
            outputs.slice_mut(s![.., half * D..(half + 1) * D]).assign(&part);
        }
        Ok(outputs)
    };
    for (x, hidden) in &texts {
        let target = exact.forward(x, KeyMask::All)?;
        refit.add(&layer, x.view(), target.view(), hidden.view())?;
        let outputs = heads(&layer, x)?;
        let rest = &target - &layer.forward(x, KeyMask::All)?;
        let weight = 1.0 / (hidden * hidden).sum_axis(Axis(1)).insert_axis(Axis(1));
        gram += &outputs.t().dot(&(&outputs * &weight));
        moments += &outputs.t().dot(&(&rest * &weight));
    }
    let delta: Array2<f64> = refit.solve()?;
    let ridge = 0.1 * gram.diag().mean().unwrap();
    assert_close("normal equations", &(gram.dot(&delta.t()) + &delta.t() * ridge), &moments, 1e-9);

    let plain = layer.clone();
    let error = |layer: &DijiangAttention<f64>| -> Result<f64> {
        let wrong =
            layer.forward(&texts[0].0, KeyMask::All)? - exact.forward(&texts[0].0, KeyMask::All)?;
        Ok((&wrong * &wrong).sum())
    };
    layer = layer.with_output_delta(delta.clone())?;
    assert!(error(&layer)? < 0.9 * error(&plain)?);
    assert_eq!(layer.weights().o, &plain.weights().o + &delta);
    // Another refit starts from the weights there were.
    let twice = layer.with_output_delta(&delta * 2.0)?;
    assert_eq!(twice.without_output_delta().weights().o, plain.weights().o);
    Ok(())
}

#[test]
fn impossible_refits() {
    let layer = linear(&softmax(6, 3, 6));
    let (x, hidden) = text(30, 7);
    let mut refit = Refit::new(&layer);
    assert!(matches!(refit.solve::<f64>(), Err(Error::Empty { .. })));
    let short = x.slice(s![..29, ..]);
    for (target, hidden, name) in
        [(short, hidden.view(), "target"), (x.view(), short, "hidden states")]
    {
        assert_eq!(argument(&refit.add(&layer, x.view(), target, hidden).unwrap_err()), name);
    }
    assert!(matches!(refit.solve::<f64>(), Err(Error::Empty { .. })), "nothing was added");
    for (delta, name) in
        [(Array2::zeros((D, 23)), "delta"), (Array2::from_elem((D, 24), f64::NAN), "delta")]
    {
        assert_eq!(argument(&layer.clone().with_output_delta(delta).unwrap_err()), name);
    }
}
