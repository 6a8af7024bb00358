//! Points in (0, 1), signs and normal numbers, all from an integer seed.
//!
//! The quasi-Monte Carlo points are an Owen-scrambled Sobol sequence (Burley 2020, through
//! `sobol_burley`) at its full 32 bits; n ↦ (n + 1/2)/2³² keeps them off 0 and 1, where quantiles
//! are infinite. The pseudo-random points of the Monte Carlo baseline lie on the same grid.

use rand::rngs::ChaCha12Rng;
use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use sobol_burley::parts::{hash, owen_scramble_rev, sobol_rev};

use super::params::Points;

/// Indices of one Sobol dimension that `sobol_burley` defines.
const SOBOL_INDICES: usize = 1 << 16;
/// Sobol dimensions that `sobol_burley` defines.
const SOBOL_DIMENSIONS: usize = sobol_burley::NUM_DIMENSIONS as usize;
/// Most points a sampler yields.
pub(super) const MAX_POINTS: usize = SOBOL_INDICES * SOBOL_DIMENSIONS;

/// What random numbers are for. Each purpose has its own stream of the same seed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Purpose {
    Radii = 1,
    InputSigns = 2,
    MixingSigns = 3,
    Rows = 4,
}

/// One u in (0, 1) per feature, `[G·d]`.
///
/// Feature f = g·d + i takes Sobol index i·G + g: the G points of one DCT row are then an aligned
/// run of the sequence (for G a power of two), stratified among themselves, and all G·d of them
/// jointly too. Every 65 536 indices the next Sobol dimension takes over.
pub(super) fn unit_points(points: Points, dim: usize, blocks: usize, seed: u64) -> Vec<f64> {
    debug_assert!(dim.checked_mul(blocks).is_some_and(|count| count <= MAX_POINTS));
    match points {
        Points::Sobol => {
            let seed = (stream(seed, Purpose::Radii) >> 32) as u32;
            let point = |g, i| {
                let index = i * blocks + g;
                open_unit(sobol(
                    (index % SOBOL_INDICES) as u32,
                    (index / SOBOL_INDICES) as u32,
                    seed,
                ))
            };
            (0..blocks).flat_map(|g| (0..dim).map(move |i| point(g, i))).collect()
        }
        Points::Random => {
            let mut rng = generator(seed, Purpose::Radii);
            (0..blocks * dim).map(|_| open_unit(rng.next_u32())).collect()
        }
    }
}

/// `count` random signs ±1.
pub(super) fn signs(count: usize, seed: u64, purpose: Purpose) -> Vec<f64> {
    let mut rng = generator(seed, purpose);
    (0..count).map(|_| if rng.next_u32() >> 31 == 0 { 1.0 } else { -1.0 }).collect()
}

/// An endless stream of standard normal numbers.
pub(super) fn normals(seed: u64, purpose: Purpose) -> impl Iterator<Item = f64> {
    let mut rng = generator(seed, purpose);
    std::iter::repeat_with(move || StandardNormal.sample(&mut rng))
}

/// A named generator, so that the stream of a seed does not change with the version of `rand`.
fn generator(seed: u64, purpose: Purpose) -> ChaCha12Rng {
    ChaCha12Rng::seed_from_u64(stream(seed, purpose))
}

/// The seed of one purpose, by two rounds of SplitMix64 (Steele, Lea, Flood 2014).
fn stream(seed: u64, purpose: Purpose) -> u64 {
    split_mix(split_mix(seed) ^ purpose as u64)
}

fn split_mix(seed: u64) -> u64 {
    let z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// All 32 bits of the point of which `sobol_burley::sample` returns 23; its scrambling constants,
/// hence its stream.
fn sobol(index: u32, dimension: u32, seed: u32) -> u32 {
    const PER_DIMENSION: [u32; 4] = [0x912f_69ba, 0x174f_18ab, 0x691e_72ca, 0xb40c_c1b8];
    debug_assert!((index as usize) < SOBOL_INDICES && (dimension as usize) < SOBOL_DIMENSIONS);
    let shuffled = owen_scramble_rev(index.reverse_bits(), hash(seed ^ 0x79c6_8e4a));
    let scramble =
        (dimension >> 2) ^ seed.wrapping_mul(0x9c8f_2d3b) ^ PER_DIMENSION[(dimension & 3) as usize];
    owen_scramble_rev(sobol_rev(shuffled, dimension), hash(scramble)).reverse_bits()
}

/// The middle of cell n of 2³² cells of (0, 1).
fn open_unit(n: u32) -> f64 {
    (f64::from(n) + 0.5) / 4_294_967_296.0
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernel::params::Radial;
    use crate::kernel::quantile::Quantile;

    #[test]
    fn sobol_refines_the_samples_of_the_crate() {
        for (dimension, seed) in [(0, 0), (1, 7), (17, 99), (255, u32::MAX)] {
            for index in (0..65_536).step_by(13) {
                let coarse = (sobol(index, dimension, seed) >> 9) as f32 / 8_388_608.0;
                assert_eq!(
                    coarse,
                    sobol_burley::sample(index, dimension, seed),
                    "index {index} dimension {dimension} seed {seed}"
                );
            }
        }
    }

    #[test]
    fn points_stay_inside_and_radii_are_finite() {
        assert!(open_unit(0) > 0.0 && open_unit(u32::MAX) < 1.0);
        let laws =
            [Quantile::new(Radial::Normal, 16).unwrap(), Quantile::new(Radial::Chi, 16).unwrap()];
        for seed in 0..300 {
            for points in [Points::Sobol, Points::Random] {
                for u in unit_points(points, 16, 4, seed) {
                    assert!(u > 0.0 && u < 1.0, "seed {seed}: {u}");
                    assert!(laws.iter().all(|law| law.at(u).is_finite()), "seed {seed}: {u}");
                }
            }
        }
    }

    /// Points per cell when (0, 1) is cut into as many cells as there are points.
    fn fullest_cell(points: &[f64]) -> usize {
        let mut cells = vec![0; points.len()];
        for u in points {
            cells[(u * points.len() as f64) as usize] += 1;
        }
        cells.into_iter().max().unwrap_or(0)
    }

    #[test]
    fn sobol_points_are_stratified_per_row_and_jointly() {
        let (dim, blocks) = (8, 16);
        for seed in 0..50 {
            let points = unit_points(Points::Sobol, dim, blocks, seed);
            assert_eq!(fullest_cell(&points), 1, "seed {seed}, jointly");
            for i in 0..dim {
                let row: Vec<f64> = (0..blocks).map(|g| points[g * dim + i]).collect();
                assert_eq!(fullest_cell(&row), 1, "seed {seed}, row {i}");
            }
            assert!(
                fullest_cell(&unit_points(Points::Random, dim, blocks, seed)) > 1,
                "pseudo-random points are not"
            );
        }
    }

    #[test]
    fn a_further_sobol_dimension_takes_over() {
        let points = unit_points(Points::Sobol, 1, 2 * SOBOL_INDICES, 5);
        assert_eq!(fullest_cell(&points[..SOBOL_INDICES]), 1);
        assert_eq!(fullest_cell(&points[SOBOL_INDICES..]), 1);
        assert_ne!(points[..64], points[SOBOL_INDICES..SOBOL_INDICES + 64]);
        assert_eq!(points[0], unit_points(Points::Sobol, 1, 1, 5)[0]);
    }

    #[test]
    fn streams_differ_by_seed_and_purpose() {
        let purposes = [Purpose::Radii, Purpose::InputSigns, Purpose::MixingSigns, Purpose::Rows];
        let mut seen: Vec<Vec<f64>> = Vec::new();
        for purpose in purposes {
            for seed in [0, 1, u64::MAX] {
                let signs = signs(128, seed, purpose);
                let sum: f64 = signs.iter().sum();
                assert!(signs.iter().all(|s| s.abs() == 1.0) && sum.abs() < 45.0, "sum {sum}");
                assert!(!seen.contains(&signs));
                seen.push(signs);
            }
        }
        for points in [Points::Sobol, Points::Random] {
            assert_eq!(unit_points(points, 8, 2, 3), unit_points(points, 8, 2, 3));
            assert_ne!(unit_points(points, 8, 2, 3), unit_points(points, 8, 2, 4));
        }
    }
}
