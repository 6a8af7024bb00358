//! Feature maps: the batched DCT against the product with a matrix of the same shape (FAVOR+ has
//! one).
#![allow(missing_docs)]

mod common;

use std::hint::black_box;

use common::{gaussian, id};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dijiang::Real;
use dijiang::kernel::{DctMapConfig, FavorConfig, FeatureMap, Mixing, Pairing};
use ndarray::Axis;

/// Tokens in a panel, as attention uses it.
const WIDTH: usize = 64;

fn panel<T: Real>(c: &mut Criterion, name: &str, d: usize, map: &impl FeatureMap<T>) {
    let x = gaussian::<T>(1, (1, d, WIDTH));
    let x = x.as_slice().expect("standard layout");
    let mut out = vec![T::from_f64(f64::NAN); map.features() * WIDTH];
    let mut scratch = vec![T::from_f64(f64::NAN); map.scratch_len(WIDTH)];
    map.query_panel(WIDTH, x, &mut out, &mut scratch);
    // The panel agrees with the row-wise method, so what is timed is right.
    let rows =
        ndarray::ArrayView2::from_shape((d, WIDTH), x).expect("a panel").reversed_axes().to_owned();
    let expected = map.query_log_features(&rows).expect("valid rows");
    for (f, row) in out.chunks_exact(WIDTH).enumerate() {
        for (got, expected) in row.iter().zip(expected.index_axis(Axis(1), f)) {
            assert!(got == expected, "{got} is not {expected}");
        }
    }
    let mut group = c.benchmark_group(format!("feature_map/{name}"));
    group.throughput(Throughput::Elements(WIDTH as u64));
    group.bench_function(id::<T>(WIDTH, d, map.features()), |b| {
        b.iter(|| map.query_panel(WIDTH, black_box(x), black_box(&mut out), &mut scratch));
    });
    group.finish();
}

fn maps<T: Real>(c: &mut Criterion) {
    for d in [32, 64, 80, 96, 128, 256] {
        panel::<T>(c, "dct", d, &DctMapConfig::new().build(d).expect("a valid map"));
        panel::<T>(c, "matrix", d, &FavorConfig::new(d, d).build().expect("a valid map"));
    }
    let antithetic = DctMapConfig::new().with_blocks(2).with_pairing(Pairing::Antithetic);
    panel::<T>(c, "antithetic", 64, &antithetic.build(64).expect("a valid map"));
    panel::<T>(
        c,
        "mixed",
        64,
        &DctMapConfig::new().with_mixing(Mixing::Mixed).build(64).expect("a valid map"),
    );
}

fn kernel(c: &mut Criterion) {
    maps::<f32>(c);
    maps::<f64>(c);
}

criterion_group!(benches, kernel);
criterion_main!(benches);
