//! The measurements.

use std::ops::ControlFlow;
use std::time::Instant;

use dijiang::calibrate::CalibrateOptions;
use dijiang::kernel::{DctMap, DctMapConfig, DctParams, FeatureMap};
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions, SoftmaxAttention};
use ndarray::{Array1, Array2, Array3, ArrayView2, Axis};
use rayon::prelude::*;
use serde::Serialize;

use crate::inputs::{self, Input, Layer};
use crate::lm::progress::Progress;
use crate::maps::{Kind, Moments};
use crate::weights::{Distance, Exact, log_kernel};
use crate::{Args, Result};

/// Everything one run measured.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    /// d.
    pub(crate) dim: usize,
    /// Tokens per window.
    pub(crate) tokens: usize,
    pub(crate) windows: usize,
    pub(crate) calibration_windows: usize,
    /// Of every map but the calibrated one, which has one seed.
    pub(crate) seeds: usize,
    /// Of calibration.
    pub(crate) steps: usize,
    pub(crate) inputs: Vec<InputReport>,
    /// What it all took.
    pub(crate) seconds: f64,
}

/// One kind of queries, keys and values.
#[derive(Debug, Serialize)]
pub(crate) struct InputReport {
    pub(crate) name: String,
    /// Heads averaged over.
    pub(crate) heads: usize,
    pub(crate) rows: Vec<Row>,
    /// The same weight for every key: what a map has to beat.
    pub(crate) equal_weights: Figures,
}

/// One map.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) map: &'static str,
    pub(crate) points: Vec<Point>,
}

/// One map with one number of features.
#[derive(Debug, Serialize)]
pub(crate) struct Point {
    /// m.
    pub(crate) features: usize,
    #[serde(flatten)]
    pub(crate) figures: Figures,
}

/// Means over heads and seeds.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Figures {
    /// Relative output error.
    pub(crate) error: f64,
    /// Attention KL, nats.
    pub(crate) kl: f64,
}

/// Heads of the Gaussian input.
const GAUSSIAN_HEADS: usize = 4;

pub(crate) fn all(args: &Args) -> Result<Report> {
    let start = Instant::now();
    let progress = Progress::new();
    progress.stage("reading the model", 1);
    let model = inputs::language_model(args)?;
    let dim = model
        .layers
        .first()
        .and_then(|layer| layer.softmax.config().head_dim)
        .ok_or("the model has no layers")?;
    let windows = model
        .layers
        .first()
        .map_or((0, 0), |layer| (layer.measured.len(), layer.calibration.len()));
    let gaussian = inputs::gaussian(args, GAUSSIAN_HEADS, dim)?;
    let inputs = [model, gaussian]
        .into_iter()
        .map(|input| measure(args, dim, input, &progress))
        .collect::<Result<_>>()?;
    progress.finish();
    let seconds = start.elapsed().as_secs_f64();
    let (windows, calibration_windows) = windows;
    let Args { tokens, seeds, steps, .. } = *args;
    Ok(Report { dim, tokens, windows, calibration_windows, seeds, steps, inputs, seconds })
}

/// One query head: what its maps are told, and what they are measured on.
struct Head {
    moments: Moments,
    /// Scaled queries and keys of every window, and softmax attention from them.
    windows: Vec<(Array2<f64>, Array2<f64>, Exact)>,
    /// Σ |o − ō|² over all windows.
    variance: f64,
    /// Parameters of the calibrated maps, one per number of features.
    calibrated: Vec<DctParams>,
}

fn measure(args: &Args, dim: usize, input: Input, progress: &Progress) -> Result<InputReport> {
    progress.stage("calibrating", input.layers.len() * args.features.len());
    let mut heads = Vec::new();
    for layer in &input.layers {
        let mut maps = vec![Vec::new(); layer.softmax.config().kv_heads];
        for &blocks in &args.features {
            let calibrated = calibrate(args, layer, blocks)?;
            maps.iter_mut()
                .zip(calibrated.maps())
                .for_each(|(maps, map)| maps.push(map.params().clone()));
            progress.tick();
        }
        heads.extend(capture(layer, &maps)?);
    }
    progress.stage("measuring", heads.len() * Kind::ALL.len());
    let items: Vec<_> = Kind::ALL
        .into_iter()
        .flat_map(|kind| heads.iter().enumerate().map(move |head| (kind, head)))
        .collect();
    let figures: Vec<Vec<Figures>> = items
        .into_par_iter()
        .map(|(kind, (index, head))| {
            let figures = args.features.iter().enumerate().map(|(i, &blocks)| match kind {
                Kind::Calibrated => head.figures(&DctMap::from_params(head.calibrated[i].clone())?),
                _ => {
                    let seeds = (0..args.seeds).map(|seed| {
                        let seed = (seed * heads.len() + index) as u64;
                        head.figures(&DctMap::from_params(kind.params(
                            dim,
                            blocks,
                            seed,
                            &head.moments,
                        )?)?)
                    });
                    Ok(mean(&seeds.collect::<dijiang::Result<Vec<_>>>()?))
                }
            });
            let figures = figures.collect::<dijiang::Result<_>>();
            progress.tick();
            figures
        })
        .collect::<dijiang::Result<_>>()?;
    let rows = Kind::ALL.iter().zip(figures.chunks(heads.len())).map(|(kind, of_heads)| {
        let point = |(i, blocks): (usize, &usize)| {
            let figures: Vec<Figures> = of_heads.iter().map(|figures| figures[i]).collect();
            Point { features: blocks * dim, figures: mean(&figures) }
        };
        Row { map: kind.name(), points: args.features.iter().enumerate().map(point).collect() }
    });
    let equal: Vec<Figures> = heads
        .iter()
        .map(|head| head.sum(|x, _| Ok(Array2::zeros((x.nrows(), x.nrows())))))
        .collect::<dijiang::Result<_>>()?;
    Ok(InputReport {
        name: input.name,
        heads: heads.len(),
        rows: rows.collect(),
        equal_weights: mean(&equal),
    })
}

/// The layer with maps of `blocks`·d features fitted to its calibration windows; no local window,
/// no decay.
fn calibrate(args: &Args, layer: &Layer, blocks: usize) -> Result<DijiangAttention<f32>> {
    let mut linear = DijiangAttention::from_softmax(
        &layer.softmax,
        DijiangOptions::new().with_window(None).with_map(DctMapConfig::new().with_blocks(blocks)),
    )?;
    let samples: Vec<_> = layer.calibration.iter().map(|x| x.view()).collect();
    linear.calibrate(&samples, &CalibrateOptions::new().with_steps(args.steps), |_| {
        ControlFlow::Continue(())
    })?;
    Ok(linear)
}

/// Every query head of a layer, given the calibrated maps of every key-value head.
fn capture(layer: &Layer, maps: &[Vec<DctParams>]) -> Result<Vec<Head>> {
    let config = layer.softmax.config();
    let group = config.heads / config.kv_heads;
    let root = config.scale.unwrap_or(1.0).sqrt();
    let project = |x: &Array2<f32>| scaled(&layer.softmax, root, x);
    let calibration = layer.calibration.iter().map(project).collect::<dijiang::Result<Vec<_>>>()?;
    let measured = layer.measured.iter().map(project).collect::<dijiang::Result<Vec<_>>>()?;
    let head = |h: usize| {
        let kv = h / group;
        let of = |rows: &Array3<f64>, h| rows.index_axis(Axis(0), h).to_owned();
        let windows: Vec<_> = measured
            .iter()
            .map(|(x, y, v)| {
                let (x, y) = (of(x, h), of(y, kv));
                let exact = Exact::new(x.view(), y.view(), of(v, kv));
                (x, y, exact)
            })
            .collect();
        let (_, variance) = spread(windows.iter().map(|(_, _, exact)| exact.outputs().view()));
        let sharing = || kv * group..(kv + 1) * group;
        let queries = calibration
            .iter()
            .flat_map(|(x, _, _)| sharing().map(move |h| x.index_axis(Axis(0), h)));
        let keys = calibration.iter().map(|(_, y, _)| y.index_axis(Axis(0), kv));
        let tokens: usize = layer.calibration.iter().map(Array2::nrows).sum();
        let ((query, query_spread), (key, key_spread)) = (spread(queries), spread(keys));
        let phi = query_spread / (tokens * group) as f64 + key_spread / tokens as f64;
        let moments = Moments { query: query.to_vec(), key: key.to_vec(), phi };
        Head { moments, windows, variance, calibrated: maps[kv].clone() }
    };
    Ok((0..config.heads).into_par_iter().map(head).collect())
}

/// x = √σ·q, y = √σ·k and v of all heads.
fn scaled(
    softmax: &SoftmaxAttention<f32>,
    root: f64,
    hidden: &Array2<f32>,
) -> dijiang::Result<(Array3<f64>, Array3<f64>, Array3<f64>)> {
    let [q, k, v] = softmax.project_at(hidden, 0)?;
    Ok((q.mapv(|q| root * f64::from(q)), k.mapv(|k| root * f64::from(k)), v.mapv(f64::from)))
}

/// The mean row of all arrays, and the sum of squared distances from it.
fn spread<'a>(arrays: impl Iterator<Item = ArrayView2<'a, f64>>) -> (Array1<f64>, f64) {
    let (mut sum, mut squares, mut rows) = (Array1::zeros(0), 0.0, 0);
    for array in arrays {
        if rows == 0 {
            sum = Array1::zeros(array.ncols());
        }
        sum += &array.sum_axis(Axis(0));
        squares += array.fold(0.0, |squares, value| squares + value * value);
        rows += array.nrows();
    }
    let mean = sum / rows.max(1) as f64;
    let spread = squares - rows as f64 * mean.dot(&mean);
    (mean, spread.max(f64::MIN_POSITIVE))
}

impl Head {
    fn figures(&self, map: &DctMap<f64>) -> dijiang::Result<Figures> {
        self.sum(|x, y| Ok(log_kernel(&map.query_log_features(x)?, &map.key_log_features(y)?)))
    }

    /// Over all windows, with the kernel whose logarithm `log_kernel` gives.
    fn sum(
        &self,
        log_kernel: impl Fn(&Array2<f64>, &Array2<f64>) -> dijiang::Result<Array2<f64>>,
    ) -> dijiang::Result<Figures> {
        let (mut total, mut queries) = (Distance::default(), 0);
        for (x, y, exact) in &self.windows {
            let distance = exact.distance(log_kernel(x, y)?);
            total.squared += distance.squared;
            total.divergence += distance.divergence;
            queries += x.nrows();
        }
        Ok(Figures {
            error: total.squared / self.variance,
            kl: total.divergence / queries.max(1) as f64,
        })
    }
}

fn mean(figures: &[Figures]) -> Figures {
    let count = figures.len().max(1) as f64;
    let sum = figures.iter().fold(Figures::default(), |sum, f| Figures {
        error: sum.error + f.error,
        kl: sum.kl + f.kl,
    });
    Figures { error: sum.error / count, kl: sum.kl / count }
}
