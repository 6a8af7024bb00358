//! Calibration by gradient. The closed form is in `layer.rs`.

use std::ops::ControlFlow;
use std::slice;

use dijiang::Error;
use dijiang::attention::{KeyMask, Window};
use dijiang::calibrate::{CalibrateOptions, CalibrateReport, Fit, ProjectionFit, Sample};
use dijiang::kernel::{DctMapConfig, DctParams, Pairing, Projection, Sides};
use dijiang::layer::{
    Attention, AttentionConfig, AttentionWeights, Causality, DijiangAttention, DijiangOptions,
    Rotary, SoftmaxAttention,
};
use dijiang_testing::{Random, argument};
use ndarray::{Array2, ArrayView2};

/// D = 32, four query heads of 8 on two key-value heads, with biases that move queries and keys off
/// the origin.
fn exact(causality: Causality) -> SoftmaxAttention<f64> {
    let mut random = Random::new(61);
    let mut matrix = |rows| random.normals((rows, 32), 1.0 / 32.0_f64.sqrt());
    let weights = AttentionWeights::new(matrix(32), matrix(16), matrix(16), matrix(32));
    let mut bias = |rows, scale| random.normals(rows, scale);
    let weights = weights.with_biases(bias(32, 1.0), bias(16, 1.0), bias(16, 0.5), bias(32, 0.5));
    SoftmaxAttention::new(
        AttentionConfig::new(32, 4).with_kv_heads(2).with_causality(causality),
        weights,
    )
    .unwrap()
}

/// Correlated tokens: a random walk that forgets.
fn text(n: usize, seed: u64) -> Array2<f64> {
    let mut x: Array2<f64> = Random::new(seed).normals((n, 32), 0.6);
    for i in 1..n {
        let previous = x.row(i - 1).mapv(|v| 0.8 * v);
        x.row_mut(i).zip_mut_with(&previous, |v, p| *v += p);
    }
    x
}

fn texts() -> Vec<Array2<f64>> {
    (0..9).map(|i| text(90 + 13 * i, i as u64)).collect()
}

fn layer(options: DijiangOptions) -> DijiangAttention<f64> {
    DijiangAttention::from_softmax(&exact(Causality::Causal), options).unwrap()
}

fn window() -> DijiangOptions {
    DijiangOptions::new().with_window(Some(Window::new(8, 1)))
}

fn calibrate(
    layer: &mut DijiangAttention<f64>,
    samples: &[Array2<f64>],
    options: &CalibrateOptions,
) -> CalibrateReport {
    let views: Vec<ArrayView2<'_, f64>> = samples.iter().map(|sample| sample.view()).collect();
    layer.calibrate(&views, options, |_| ControlFlow::Continue(())).unwrap()
}

/// Everything calibration can change.
fn numbers(layer: &DijiangAttention<f64>) -> (Vec<DctParams>, Vec<f64>) {
    (layer.maps().iter().map(|map| map.params().clone()).collect(), layer.log_decay().to_vec())
}

#[test]
fn the_gradient_goes_far_beyond_the_closed_form() {
    let cases = [
        (Causality::Causal, window(), Fit::Keep, 0.8),
        (
            Causality::Causal,
            window().with_map(DctMapConfig::new().with_pairing(Pairing::Antithetic)),
            Fit::Keep,
            0.8,
        ),
        (Causality::Causal, window().with_window(None), Fit::Keep, 0.8),
        (Causality::Causal, window().with_window(None), Fit::Train, 0.8),
        (Causality::Bidirectional, window(), Fit::Keep, 0.85),
    ];
    for (causality, options, decay, gain) in cases {
        let mut layer = DijiangAttention::from_softmax(&exact(causality), options.clone()).unwrap();
        let options = (options, CalibrateOptions::new().with_steps(100).with_decay(decay));
        let mut told = Vec::new();
        let samples = texts();
        let views: Vec<_> = samples.iter().map(|sample| sample.view()).collect();
        let report = layer.calibrate(&views, &options.1, |progress| {
            told.push(progress);
            ControlFlow::Continue(())
        });
        let report = report.unwrap();
        let closed: f64 = report.heads.iter().map(|head| head.closed_form).sum::<f64>() / 2.0;
        assert!(
            report.after() < gain * closed && report.after() < report.before(),
            "{causality:?} {options:?}: {report:?}"
        );
        assert!(report.heads.iter().all(|head| head.after <= head.before));
        assert_eq!(
            (report.held_out, report.tokens),
            (samples[8].nrows(), samples[..8].iter().map(Array2::nrows).sum())
        );
        let all_far = options.0.windows.is_empty() || causality == Causality::Bidirectional;
        let mass = |mass: f64| if all_far { mass == 1.0 } else { mass > 0.1 && mass < 0.95 };
        assert!(report.heads.iter().all(|head| mass(head.far_mass)), "{report:?}");
        assert!(
            told.iter().enumerate().all(|(i, told)| told.done == i + 1 && told.done <= told.total)
        );
        assert!(
            told.windows(2)
                .all(|pair| pair[1].error <= pair[0].error && pair[1].total == pair[0].total)
        );
        let last = told[told.len() - 1];
        assert_eq!((last.done, last.error), (last.total, report.after()));
        for (head, (params, log_decay)) in
            report.heads.iter().zip(numbers(&layer).0.into_iter().zip(layer.log_decay()))
        {
            assert_eq!((head.log_mix, head.log_decay), (params.log_mix, *log_decay));
            assert_eq!(decay == Fit::Train, *log_decay < 0.0);
        }
    }
}

#[test]
fn tied_sides_stay_tied() {
    let mut layer = layer(window().with_map(DctMapConfig::new().with_sides(Sides::Tied)));
    let before = numbers(&layer).0;
    let report = calibrate(&mut layer, &texts(), &CalibrateOptions::new());
    assert!(report.heads.iter().all(|head| head.after < head.closed_form), "{report:?}");
    let after = numbers(&layer).0;
    for params in &after {
        assert_eq!(
            (&params.query.scale, &params.query.radii),
            (&params.key.scale, &params.key.radii)
        );
    }
    // A head that nothing made better keeps its numbers; not all of them do.
    let moved = |(params, before): (&DctParams, &DctParams)| {
        params.query.scale != before.query.scale && params.query.radii != before.query.radii
    };
    assert!(after.iter().zip(&before).any(moved), "{report:?}");
}

#[test]
fn centres_move_only_when_asked() {
    let samples = texts();
    let center = |options: &CalibrateOptions| {
        let mut layer = layer(window());
        calibrate(&mut layer, &samples, options);
        numbers(&layer).0.remove(0).key.center
    };
    let plain = CalibrateOptions::new();
    assert_eq!(center(&plain), center(&plain.clone().with_steps(20)));
    assert_ne!(center(&plain), center(&plain.clone().with_centers(Fit::Train)));
}

#[test]
fn projections_change_only_when_asked() {
    let samples = texts();
    let options = CalibrateOptions::new().with_steps(100);
    let fitted = |fit| {
        let mut layer = layer(window());
        let report = calibrate(&mut layer, &samples, &options.clone().with_projection(fit));
        (layer, report)
    };
    let all = |layer: &DijiangAttention<f64>, fits: fn(&Projection) -> bool| {
        layer.maps().iter().all(|map| fits(&map.params().projection))
    };
    let (layer, plain) = fitted(ProjectionFit::Keep);
    assert!(all(&layer, |projection| *projection == Projection::Dct));
    let (layer, deep) = fitted(ProjectionFit::Deep);
    assert!(all(&layer, |projection| matches!(projection, Projection::Deep { .. })));
    let (layer, dense) = fitted(ProjectionFit::Dense);
    assert!(all(&layer, |projection| matches!(projection, Projection::Dense { .. })));
    assert_eq!((deep.before(), dense.before()), (plain.before(), plain.before()));
    for better in [deep, dense] {
        assert!(better.after() < 0.97 * plain.after(), "{better:?}, {plain:?}");
    }
}

/// Whatever the steps are like, the layer is never worse than it was given.
#[test]
fn never_worse_than_given() {
    let samples = texts();
    for rate in [5.0, 1e3, 1e300] {
        let mut layer = layer(window());
        let report = calibrate(
            &mut layer,
            &samples,
            &CalibrateOptions::new().with_learning_rate(rate).with_decay(Fit::Train),
        );
        assert!(
            report.heads.iter().all(|head| head.after.is_finite() && head.after <= head.before),
            "{report:?}"
        );
    }
    // A second calibration starts from the first one's end.
    let mut layer = layer(window());
    let first = calibrate(&mut layer, &samples, &CalibrateOptions::new());
    let given = numbers(&layer);
    let second = calibrate(&mut layer, &samples, &CalibrateOptions::new().with_learning_rate(1e3));
    assert_eq!(second.before(), first.after());
    assert!(second.after() <= first.after());
    let after = numbers(&layer);
    let mut kept = second.heads.iter().zip(given.0.iter().zip(&after.0));
    assert!(kept.all(|(head, (old, new))| head.after < head.before || old == new));
}

#[test]
fn a_single_sample_serves_for_both() {
    let mut layer = layer(window());
    let report = calibrate(&mut layer, &[text(200, 1)], &CalibrateOptions::new());
    assert_eq!((report.tokens, report.held_out), (200, 0));
    assert!(report.heads.iter().all(|head| head.after < head.closed_form), "{report:?}");
}

#[test]
fn cancelled_calibrations_change_nothing() {
    let mut layer = layer(window().with_window(None));
    let before = numbers(&layer);
    let samples = [text(60, 1), text(50, 2)];
    for stop in [1, 14, 15, 40, 74] {
        let options = CalibrateOptions::new().with_decay(Fit::Train);
        let result =
            layer.calibrate(&[samples[0].view(), samples[1].view()], &options, |progress| {
                match progress.done == stop {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            });
        assert_eq!(result, Err(Error::Cancelled), "{stop}");
        assert_eq!(numbers(&layer), before);
    }
}

#[test]
fn a_limit_of_time_ends_it() {
    let mut layer = layer(window());
    let mut last = None;
    let samples = [text(60, 1), text(50, 2)];
    let options = CalibrateOptions::new().with_steps(1 << 24).with_seconds(Some(0.2));
    let report = layer.calibrate(&[samples[0].view(), samples[1].view()], &options, |progress| {
        last = Some((progress.done, progress.total));
        ControlFlow::Continue(())
    });
    assert!(report.unwrap().after() > 0.0);
    assert!(last.is_some_and(|(done, total)| done == total));
}

#[cfg(feature = "rayon")]
#[test]
fn threads_change_no_bit() {
    let samples = texts();
    let options =
        CalibrateOptions::new().with_steps(15).with_batch(3).with_decay(Fit::Train).with_seed(5);
    let run = |threads| {
        dijiang_testing::on_threads(threads, || {
            let mut layer = layer(window());
            (calibrate(&mut layer, &samples, &options), numbers(&layer))
        })
    };
    let one = run(1);
    assert_eq!(one, run(3));
    assert_eq!(one, run(8));
    let mut layer = layer(window());
    calibrate(&mut layer, &samples, &options.with_seed(6));
    assert_ne!(one.1, numbers(&layer), "the seed means nothing");
}

/// What softmax attention makes of the samples may be known already; it must be of such a layer.
#[test]
fn samples_made_before() {
    let options = CalibrateOptions::new().with_steps(10);
    let (softmax, texts) = (exact(Causality::Causal), texts());
    let samples: Vec<_> = texts.iter().map(|x| Sample::new(&softmax, x).unwrap()).collect();
    let (mut with, mut without) = (layer(window()), layer(window()));
    let report = with.calibrate_on(&samples, &options, |_| ControlFlow::Continue(())).unwrap();
    assert_eq!(report, calibrate(&mut without, &texts, &options));
    assert_eq!(numbers(&with), numbers(&without));
    let expected = softmax.forward(&texts[0], KeyMask::All).unwrap();
    assert_eq!(samples[0].output(&softmax).unwrap(), expected);

    let weights = AttentionWeights::new(
        Array2::eye(8),
        Array2::eye(8),
        Array2::eye(8),
        Array2::<f64>::eye(8),
    );
    let other = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights).unwrap();
    let foreign = Sample::new(&other, &Array2::ones((100, 8))).unwrap();
    let result =
        with.calibrate_on(slice::from_ref(&foreign), &options, |_| panic!("nothing to tell"));
    assert_eq!(argument(&result.unwrap_err()), "sample");
    assert_eq!(argument(&foreign.output(&softmax).unwrap_err()), "sample");
    assert_eq!(
        Sample::new(&softmax, &Array2::zeros((0, texts[0].ncols()))).unwrap_err(),
        Error::Empty { argument: "samples" }
    );
}

/// A held layer is fitted to softmax as it was trained, with its own queries and keys.
#[test]
fn samples_of_a_held_layer() {
    let options = CalibrateOptions::new().with_steps(3);
    let (softmax, texts) = (exact(Causality::Causal), texts());
    let config = softmax.config().clone().with_rotary(Rotary::new(50.0));
    let softmax = SoftmaxAttention::new(config, softmax.weights().as_ref().clone()).unwrap();
    let held = softmax.clone().with_rotary_hold(20).unwrap();
    let of = |softmax| texts.iter().map(|x| Sample::new(softmax, x).unwrap()).collect::<Vec<_>>();
    let (samples, plain) = (of(&held), of(&softmax));
    let expected = softmax.forward(&texts[0], KeyMask::All).unwrap();
    assert_eq!(samples[0].output(&softmax).unwrap(), expected);

    let layer = DijiangAttention::from_softmax(&held, window()).unwrap();
    let [mut own, mut on_samples, mut on_plain] = [layer.clone(), layer.clone(), layer];
    let report = calibrate(&mut own, &texts, &options);
    let on = |layer: &mut DijiangAttention<f64>, samples: &[Sample<f64>]| {
        layer.calibrate_on(samples, &options, |_| ControlFlow::Continue(())).unwrap()
    };
    assert_eq!(on(&mut on_samples, &samples), report);
    assert_eq!(numbers(&on_samples), numbers(&own));
    assert_ne!(on(&mut on_plain, &plain), report);
}

/// Samples within the local window are left out; with no others there is nothing to learn from.
#[test]
fn short_samples() {
    let options = CalibrateOptions::new().with_steps(10);
    let mut with = layer(window());
    let mut without = with.clone();
    let long = texts();
    let short = [vec![text(16, 30)], long.clone(), vec![text(5, 31), text(1, 32)]].concat();
    assert_eq!(calibrate(&mut with, &short, &options), calibrate(&mut without, &long, &options));
    assert_eq!(numbers(&with), numbers(&without));

    let before = numbers(&with);
    let (a, b) = (text(16, 1), text(3, 2));
    let result = with.calibrate(&[b.view(), a.view()], &options, |_| ControlFlow::Continue(()));
    assert_eq!(
        result,
        Err(Error::Value {
            argument: "samples",
            expected: "longer than the shortest local window",
            got: 16.0
        })
    );
    assert_eq!(numbers(&with), before);
}

#[test]
fn impossible_options() {
    let mut layer = layer(window());
    let (before, sample) = (numbers(&layer), text(60, 1));
    let mut refused = |options: CalibrateOptions| {
        let error =
            layer.calibrate(&[sample.view()], &options, |_| panic!("nothing to tell")).unwrap_err();
        assert_eq!(numbers(&layer), before);
        argument(&error)
    };
    let plain = CalibrateOptions::new;
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(refused(plain().with_learning_rate(bad)), "learning_rate");
        assert_eq!(refused(plain().with_seconds(Some(bad))), "seconds");
    }
    assert_eq!(refused(plain().with_batch(0)), "batch");
    assert_eq!(refused(plain().with_steps(usize::MAX)), "steps");

    let mut layer =
        DijiangAttention::from_softmax(&exact(Causality::Bidirectional), window()).unwrap();
    let result = layer.calibrate(&[sample.view()], &plain().with_decay(Fit::Train), |_| {
        ControlFlow::Continue(())
    });
    assert_eq!(
        result,
        Err(Error::Conflict { argument: "decay", other: "bidirectional attention" })
    );
}
