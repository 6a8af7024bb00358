//! One suite, run on every table this CPU has, against formulas in `f64`.

use rand::SeedableRng;
use rand::rngs::ChaCha12Rng;
use rand_distr::{Distribution, StandardNormal};

use super::*;
use crate::Real;
use crate::low::mat::{Accum, MatMut, MatRef};

/// Lengths around every register width, and their padded panels.
const LENGTHS: [usize; 12] = [1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 64, 67];

struct Suite<T: 'static> {
    ops: &'static Ops<T>,
    rng: ChaCha12Rng,
}

impl<T: Real> Suite<T> {
    fn random(&mut self, len: usize, spread: f64) -> Vec<T> {
        (0..len)
            .map(|_| {
                let x: f64 = StandardNormal.sample(&mut self.rng);
                T::from_f64(x * spread)
            })
            .collect()
    }

    fn close(&self, what: &str, got: &[T], expected: &[f64], work: usize) {
        let top = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
        self.close_at(what, got, expected, top, work);
    }

    /// Against the size of the terms, where they may cancel.
    fn close_at(&self, what: &str, got: &[T], expected: &[f64], top: f64, work: usize) {
        assert_eq!(got.len(), expected.len(), "{what}: length");
        let tolerance = 8.0 * T::EPSILON.to_f64() * (work as f64).sqrt() * top;
        for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
            let error = (got.to_f64() - expected).abs();
            assert!(
                error <= tolerance,
                "{} {} {what}[{i}]: {got} is not {expected} ± {tolerance:e}",
                self.ops.name,
                T::NAME
            );
        }
    }

    fn run(&mut self) {
        self.products();
        self.exponentials();
        self.reductions();
        self.vectors();
        self.door();
        self.rows_become_columns();
        self.transforms();
        self.tokens();
    }

    fn cosine(d: usize, f: usize, i: usize) -> f64 {
        let angle = std::f64::consts::PI * (((2 * i + 1) * f) % (4 * d)) as f64 / (2 * d) as f64;
        angle.cos() * (if f == 0 { 1.0 } else { 2.0 } / d as f64).sqrt()
    }

    fn tokens(&mut self) {
        for d in LENGTHS {
            let (half, stride) = (d.div_ceil(2), padded(d.div_ceil(2)));
            let mut halves = vec![T::ZERO; d * stride];
            for (f, i) in
                (0..d).flat_map(|f| (0..if f % 2 == 0 { half } else { d / 2 }).map(move |i| (f, i)))
            {
                halves[(f % 2 * half + i) * stride + f / 2] = T::from_f64(Self::cosine(d, f, i));
            }
            let (x, pre, post) = (self.random(d, 1.0), self.random(d, 1.0), self.random(d, 1.0));
            let (row, offset) = (self.random(2 * d, 1.0), self.random(1, 1.0)[0]);
            let u = |f: usize| {
                post[f].to_f64()
                    * (0..d).map(|i| Self::cosine(d, f, i) * (pre[i] * x[i]).to_f64()).sum::<f64>()
            };
            for mirrored in [false, true] {
                let mut out = vec![T::from_f64(f64::NAN); 2 * d];
                let (plus, minus) = out.split_at_mut(d);
                let (plus_row, minus_row) = row.split_at(d);
                let mut scratch = vec![T::from_f64(f64::NAN); 4 * stride];
                let minus = if mirrored { minus } else { &mut [] };
                (self.ops.dct_token)(
                    &halves,
                    &x,
                    &pre,
                    &post,
                    offset,
                    plus_row,
                    plus,
                    minus_row,
                    minus,
                    &mut scratch,
                );
                let expected: Vec<f64> =
                    (0..d).map(|f| u(f) + row[f].to_f64() + offset.to_f64()).collect();
                self.close(&format!("dct_token {d}"), &out[..d], &expected, 16 * d);
                let expected: Vec<f64> =
                    (0..d).map(|f| row[d + f].to_f64() + offset.to_f64() - u(f)).collect();
                if mirrored {
                    self.close(&format!("dct_token {d} mirrored"), &out[d..], &expected, 16 * d);
                }
            }
        }
    }

    fn transforms(&mut self) {
        for d in [8_usize, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256] {
            let random = |suite: &mut Self| {
                suite.random(d, 1.0).iter().map(|x| x.to_f64()).collect::<Vec<f64>>()
            };
            let (pre, shift, post) = (random(self), random(self), random(self));
            let tables = DctTables::<T>::new(&pre, &shift, &post);
            for width in [16, 48] {
                let (x, column) = (self.random(d * width, 1.0), self.random(width, 1.0));
                for rows in [d, 2 * d] {
                    let row = self.random(rows, 1.0);
                    let mut out = vec![T::from_f64(f64::NAN); rows * width];
                    let (plus, minus) = out.split_at_mut(d * width);
                    (self.ops.dct)(&tables, &x, &column, &row[..d], plus, &row[d..], minus);
                    let expected: Vec<f64> = (0..rows * width)
                        .map(|at| {
                            let (f, j) = (at / width, at % width);
                            let z = |i: usize| pre[i] * x[i * width + j].to_f64() + shift[i];
                            let sum: f64 = (0..d).map(|i| Self::cosine(d, f % d, i) * z(i)).sum();
                            let sign = if f < d { 1.0 } else { -1.0 };
                            sign * post[f % d] * sum + row[f].to_f64() + column[j].to_f64()
                        })
                        .collect();
                    self.close(&format!("dct {d}"), &out, &expected, 16);

                    let (grad, minus) =
                        (self.random(d * width, 1.0), self.random((rows - d) * width, 1.0));
                    let mut back = vec![T::from_f64(f64::NAN); d * width];
                    (self.ops.dct_transposed)(&tables, width, &grad, &minus, &mut back);
                    let difference =
                        |at: usize| grad[at].to_f64() - minus.get(at).map_or(0.0, |x| x.to_f64());
                    let expected: Vec<f64> = (0..d * width)
                        .map(|at| {
                            let (i, j) = (at / width, at % width);
                            pre[i]
                                * (0..d)
                                    .map(|f| {
                                        Self::cosine(d, f, i) * post[f] * difference(f * width + j)
                                    })
                                    .sum::<f64>()
                        })
                        .collect();
                    // Its last step divides by cosines as small as π/2d.
                    self.close(&format!("dct {d} transposed"), &back, &expected, 2 * d);
                }
            }
        }
    }

    fn products(&mut self) {
        for (m, k, n) in [
            (1, 1, 16),
            (1, 7, 208),
            (2, 0, 16),
            (3, 5, 48),
            (7, 64, 64),
            (8, 3, 80),
            (9, 17, 16),
            (16, 64, 32),
            (61, 67, 112),
            (4, 9, 64),
        ] {
            for (a_row, a_col) in [(k + 2, 1), (1, m + 3)] {
                let (b_row, c_row) = (n + 5, n + 1);
                let a = self.random(m * a_row + k * a_col + 1, 1.0);
                let b = self.random(k * b_row + n, 1.0);
                let before = self.random(m * c_row, 1.0);
                for accumulate in [false, true] {
                    let mut c = before.clone();
                    if !accumulate {
                        c.iter_mut().for_each(|c| *c = T::from_f64(f64::NAN));
                    }
                    let lhs = match a_col {
                        1 => MatRef::new(&a, m, k, a_row),
                        _ => MatRef::new(&a, k, m, a_col).t(),
                    };
                    self.ops.matmul(
                        MatMut::new(&mut c, m, n, c_row),
                        if accumulate { Accum::Add } else { Accum::Replace },
                        lhs,
                        MatRef::new(&b, k, n, b_row),
                    );
                    for i in 0..m {
                        let start = |j: usize| {
                            if accumulate { before[i * c_row + j].to_f64() } else { 0.0 }
                        };
                        let sum = |j: usize| {
                            (0..k)
                                .map(|l| {
                                    a[i * a_row + l * a_col].to_f64() * b[l * b_row + j].to_f64()
                                })
                                .sum::<f64>()
                        };
                        let expected: Vec<f64> = (0..n).map(|j| start(j) + sum(j)).collect();
                        self.close(
                            &format!("product {m}x{k}x{n}"),
                            &c[i * c_row..][..n],
                            &expected,
                            k + 1,
                        );
                    }
                }
            }
        }
    }

    /// exp over the whole range in use, relative error element by element, and exact zeros below
    /// it.
    fn exponentials(&mut self) {
        let (low, high) = if T::NAME == "f32" { (-87.0, 80.0) } else { (-700.0, 600.0) };
        let width = 64;
        let steps = 1000 * width;
        let x: Vec<T> =
            (0..steps).map(|i| T::from_f64(low + (high - low) * i as f64 / steps as f64)).collect();
        for part in x.chunks_exact(width) {
            let mut row = part.to_vec();
            (self.ops.exp_panel)(&mut row, &[T::ZERO], &vec![T::ZERO; width]);
            for (got, x) in row.iter().zip(part) {
                let expected = x.to_f64().exp();
                let error = (got.to_f64() - expected).abs() / expected;
                assert!(
                    error < 2.0 * T::EPSILON.to_f64(),
                    "{} exp({x}) = {got}, error {error:e}",
                    self.ops.name
                );
            }
        }
        let mut far =
            [T::NEG_INFINITY, T::from_f64(-1e30), T::from_f64(-1200.0), T::from_f64(-T::LIMIT)]
                .repeat(4);
        (self.ops.exp_panel)(&mut far, &[T::ZERO], &[T::ZERO; 16]);
        assert!(far.iter().all(|&x| x == T::ZERO), "{} {far:?}", self.ops.name);
        assert_eq!((self.ops.exp_sum)(&mut [T::ZERO; 16], T::ZERO).to_f64(), 16.0);
        // What is no number stays none, and is found in the sum.
        for at in 0..16 {
            let mut row = [T::ZERO; 16];
            row[at] = T::from_f64(f64::NAN);
            assert!((self.ops.exp_sum)(&mut row, T::ZERO).to_f64().is_nan(), "{}", self.ops.name);
            assert!(row.iter().enumerate().all(|(i, x)| x.to_f64().is_nan() == (i == at)));
        }
    }

    fn reductions(&mut self) {
        for m in LENGTHS {
            for width in [16, 32, 64] {
                let panel = self.random(m * width, 3.0);
                let (offset, weight) = (self.random(m, 2.0), self.random(m, 1.0));
                let mut column = self.random(width, 2.0);
                column[width - 1] = T::NEG_INFINITY;
                let at = |f: usize, j: usize| panel[f * width + j].to_f64();
                let sum = |f: usize, j: usize| at(f, j) + offset[f].to_f64() + column[j].to_f64();

                let mut top = vec![T::ZERO; width];
                (self.ops.column_max)(&panel, &offset, &mut top);
                let expected: Vec<f64> = (0..width)
                    .map(|j| {
                        (0..m)
                            .map(|f| at(f, j) + offset[f].to_f64())
                            .fold(f64::NEG_INFINITY, f64::max)
                    })
                    .collect();
                self.close("column_max", &top, &expected, 4);

                let mut top = vec![T::ZERO; m];
                (self.ops.row_max)(&panel, &column, &mut top);
                let expected: Vec<f64> = (0..m)
                    .map(|f| {
                        (0..width)
                            .map(|j| at(f, j) + column[j].to_f64())
                            .fold(f64::NEG_INFINITY, f64::max)
                    })
                    .collect();
                self.close("row_max", &top, &expected, 4);

                let exps: Vec<f64> =
                    (0..m * width).map(|i| sum(i / width, i % width).exp()).collect();
                let (mut e, mut dot) = (panel.clone(), vec![T::ZERO; width]);
                (self.ops.exp_dot)(&mut e, &offset, &column, &weight, &mut dot);
                self.close("exp_dot", &e, &exps, 16);
                let expected: Vec<f64> = (0..width)
                    .map(|j| (0..m).map(|f| exps[f * width + j] * weight[f].to_f64()).sum())
                    .collect();
                self.close("exp_dot sums", &dot, &expected, 16 * m);

                let mut e = panel.clone();
                (self.ops.exp_panel)(&mut e, &offset, &column);
                self.close("exp_panel", &e, &exps, 16);

                let (mut e, mut sums) = (panel.clone(), vec![T::from_f64(f64::NAN); m]);
                let negated: Vec<T> = offset.iter().map(|&offset| -offset).collect();
                (self.ops.weigh)(&mut e, &negated, &column, &mut sums);
                self.close("weigh", &e, &exps, 16);
                let expected: Vec<f64> =
                    (0..m).map(|f| exps[f * width..(f + 1) * width].iter().sum()).collect();
                self.close("weigh sums", &sums, &expected, 16 * width);

                let mut sums = weight.clone();
                (self.ops.add_row_sums)(&panel, &mut sums);
                let expected: Vec<f64> = (0..m)
                    .map(|f| weight[f].to_f64() + (0..width).map(|j| at(f, j)).sum::<f64>())
                    .collect();
                self.close("add_row_sums", &sums, &expected, 16 * width);

                let (other, before, factor) =
                    (self.random(m * width, 1.0), self.random(width, 1.0), self.random(width, 1.0));
                let mut sums = before.clone();
                (self.ops.column_dot)(&panel, &other, &mut sums);
                let dot = |j: usize| {
                    (0..m).map(|f| at(f, j) * other[f * width + j].to_f64()).sum::<f64>()
                };
                let expected: Vec<f64> = (0..width).map(|j| before[j].to_f64() + dot(j)).collect();
                self.close("column_dot", &sums, &expected, 16 * m);

                let (mut p, mut sums) = (panel.clone(), vec![T::from_f64(f64::NAN); width]);
                (self.ops.log_weight_vjp)(&mut p, &other, &factor, &weight, &before, &mut sums);
                let value = |f: usize, j: usize| {
                    other[f * width + j].to_f64()
                        * factor[j].to_f64()
                        * (at(f, j) - weight[f].to_f64() * before[j].to_f64())
                };
                let expected: Vec<f64> =
                    (0..m * width).map(|i| value(i / width, i % width)).collect();
                self.close("log_weight_vjp", &p, &expected, 16);
                let expected: Vec<f64> =
                    (0..width).map(|j| (0..m).map(|f| value(f, j)).sum()).collect();
                self.close("log_weight_vjp sums", &sums, &expected, 64 * m);

                let spread = |sums: &[T]| -> Vec<T> {
                    sums.iter()
                        .flat_map(|&sum| [T::ZERO; LANES - 1].into_iter().chain([sum]))
                        .collect()
                };
                let gathered = |lanes: &[T]| -> Vec<T> {
                    lanes
                        .chunks_exact(LANES)
                        .map(|lanes| T::from_f64(lanes.iter().map(|x| x.to_f64()).sum()))
                        .collect()
                };
                // Every sum starts from something, in its last lane.
                let (mut sums, mut products) = (spread(&weight), spread(&offset));
                (self.ops.lane_sums)(&panel, &other, &weight, &mut sums, &mut products);
                let expected: Vec<f64> = (0..m)
                    .map(|f| weight[f].to_f64() + (0..width).map(|j| at(f, j)).sum::<f64>())
                    .collect();
                self.close("lane_sums", &gathered(&sums), &expected, 16 * width);
                let moved = |f: usize, j: usize| other[f * width + j].to_f64() - weight[f].to_f64();
                let expected: Vec<f64> = (0..m)
                    .map(|f| {
                        offset[f].to_f64() + (0..width).map(|j| at(f, j) * moved(f, j)).sum::<f64>()
                    })
                    .collect();
                self.close_at(
                    "lane_sums products",
                    &gathered(&products),
                    &expected,
                    3.0 * width as f64,
                    16,
                );

                let (start, tilt) = (self.random(m * width, 1.0), self.random(m, 1.0));
                for grad in [&start[..], &[]] {
                    let (mut grad, mut sums) = (grad.to_vec(), spread(&tilt));
                    let envelope = T::from_f64(0.5);
                    (self.ops.input_vjp)(
                        &other, &weight, &panel, &offset, &before, &tilt, envelope, &mut grad,
                        &mut sums,
                    );
                    let expected: Vec<f64> = (0..m)
                        .map(|f| {
                            tilt[f].to_f64()
                                + (0..width).map(|j| moved(f, j) * before[j].to_f64()).sum::<f64>()
                        })
                        .collect();
                    self.close_at(
                        "input_vjp sums",
                        &gathered(&sums),
                        &expected,
                        3.0 * width as f64,
                        16,
                    );
                    let value = |f: usize, j: usize| {
                        let common = (tilt[f].to_f64() - 0.5 * moved(f, j)) * before[j].to_f64();
                        start[f * width + j].to_f64() + offset[f].to_f64() * at(f, j) + common
                    };
                    let expected: Vec<f64> =
                        (0..grad.len()).map(|i| value(i / width, i % width)).collect();
                    self.close("input_vjp", &grad, &expected, 16);
                }

                let (mut p, mut sums) = (panel.clone(), weight.clone());
                (self.ops.mask_triangle)(&mut p, width, 3, &mut sums);
                let kept: Vec<f64> = (0..m * width)
                    .map(|i| if i % width <= i / width + 3 { panel[i].to_f64() } else { 0.0 })
                    .collect();
                self.close("mask_triangle", &p, &kept, 1);
                let expected: Vec<f64> = (0..m)
                    .map(|i| {
                        weight[i].to_f64() + kept[i * width..(i + 1) * width].iter().sum::<f64>()
                    })
                    .collect();
                self.close("mask_triangle sums", &sums, &expected, 16 * width);

                let mut p = panel.clone();
                (self.ops.lower_less)(&mut p, width, &weight);
                let lower =
                    |i: usize, j: usize| if j <= i { at(i, j) - weight[i].to_f64() } else { 0.0 };
                self.close(
                    "lower_less",
                    &p,
                    &(0..m * width).map(|i| lower(i / width, i % width)).collect::<Vec<_>>(),
                    4,
                );
                let mut p = panel.clone();
                // What is left of the diagonal's lane group may be anything.
                (0..m).for_each(|i| {
                    p[i * width..][..(i / LANES * LANES).min(width)].fill(T::from_f64(f64::NAN))
                });
                (self.ops.upper_less)(&mut p, &before);
                let upper =
                    |i: usize, j: usize| if j >= i { at(i, j) - before[j].to_f64() } else { 0.0 };
                self.close(
                    "upper_less",
                    &p,
                    &(0..m * width).map(|i| upper(i / width, i % width)).collect::<Vec<_>>(),
                    4,
                );
            }
        }
    }

    fn vectors(&mut self) {
        for len in LENGTHS {
            let (x, y) = (self.random(len, 1.0), self.random(len, 1.0));
            let mut scaled = x.clone();
            (self.ops.scale)(T::from_f64(0.7), &mut scaled);
            self.close(
                "scale",
                &scaled,
                &x.iter().map(|x| x.to_f64() * 0.7).collect::<Vec<_>>(),
                4,
            );
            for rows in LENGTHS {
                let (a, before) = (self.random(rows * len, 1.0), self.random(rows, 1.0));
                let mut out = before.clone();
                (self.ops.matvec)(&a, len, &y, &mut out);
                let dot = |i: usize| {
                    (0..len).map(|j| a[i * len + j].to_f64() * y[j].to_f64()).sum::<f64>()
                };
                let expected: Vec<f64> = (0..rows).map(|i| before[i].to_f64() + dot(i)).collect();
                self.close_at("matvec", &out, &expected, 1.0, 16 * len);
                // Other tokens at the same time change no bit.
                for tokens in [1, 3, 4, 9] {
                    let others = self.random(tokens * len, 1.0);
                    let mut x = [&y[..], &others].concat();
                    x.rotate_right(tokens / 2 * len);
                    let mut all = before.repeat(tokens + 1);
                    (self.ops.matvec)(&a, len, &x, &mut all);
                    assert!(
                        all[tokens / 2 * rows..][..rows] == out,
                        "{}: {tokens} others, {rows} by {len}",
                        self.ops.name
                    );
                }
            }
            for n in [16, 32, 64, 80, 208] {
                let (a, before) = (self.random(len * n, 1.0), self.random(n, 1.0));
                for accumulate in [false, true] {
                    let mut out =
                        if accumulate { before.clone() } else { vec![T::from_f64(f64::NAN); n] };
                    (self.ops.vecmat)(&x, &a, accumulate, &mut out);
                    let start = |j: usize| if accumulate { before[j].to_f64() } else { 0.0 };
                    let expected = |j| {
                        start(j)
                            + (0..len).map(|f| x[f].to_f64() * a[f * n + j].to_f64()).sum::<f64>()
                    };
                    self.close("vecmat", &out, &(0..n).map(expected).collect::<Vec<_>>(), 16 * len);
                }
            }
            // A large sum and small additions, all alike: without the rest none of them would
            // count.
            let (mut sums, mut rest) = (vec![T::ONE; len], vec![T::ZERO; len]);
            for _ in 0..64 {
                rest.iter_mut().for_each(|rest| *rest += T::EPSILON / T::from_f64(4.0));
                (self.ops.fold)(&mut sums, &mut rest);
            }
            assert!(
                sums.iter().all(|&sum| sum == T::ONE + T::from_f64(16.0) * T::EPSILON),
                "{} {sums:?}",
                self.ops.name
            );
            let (base, factor) = (self.random(len, 1.0), T::from_f64(0.75));
            let mut out = vec![T::from_f64(f64::NAN); len];
            (self.ops.difference)(&x, &y, factor, &mut out);
            let difference = |i: usize| x[i].to_f64() - y[i].to_f64();
            self.close_at(
                "difference",
                &out,
                &(0..len).map(|i| 0.75 * difference(i)).collect::<Vec<_>>(),
                1.0,
                4,
            );
            let shares = (self.ops.shares)(&x, &y, factor, &base);
            let (u, w) = (
                |i: usize| x[i].to_f64() - 0.75 * base[i].to_f64(),
                |i: usize| y[i].to_f64() - 0.75 * base[i].to_f64(),
            );
            let sum = |term: &dyn Fn(usize) -> f64| (0..len).map(term).sum::<f64>();
            let squares = sum(&|i| difference(i).powi(2));
            let expected = [sum(&|i| u(i) * w(i)), sum(&|i| w(i) * w(i)), squares];
            self.close_at("shares", &shares, &expected, expected[1] + squares + 1.0, 16 * len);
            let width = padded(len);
            let mut row = self.random(width, 3.0);
            let top = row.iter().map(|x| x.to_f64()).fold(f64::NEG_INFINITY, f64::max);
            assert_eq!((self.ops.slice_max)(&row).to_f64(), top);
            let exps: Vec<f64> = row.iter().map(|x| (x.to_f64() - 0.5).exp()).collect();
            let sum = (self.ops.exp_sum)(&mut row, T::from_f64(-0.5));
            self.close("exp_sum", &row, &exps, 16);
            self.close("exp_sum total", &[sum], &[exps.iter().sum()], 16 * width);

            let mut offset = vec![T::from_f64(f64::NAN); width];
            offset[..len].copy_from_slice(&x);
            let top = (self.ops.offset_max)(&mut offset, T::from_f64(-2.0), &y, T::from_f64(0.25));
            let expected: Vec<f64> =
                x.iter().zip(&y).map(|(x, y)| x.to_f64() - 2.0 * y.to_f64() + 0.25).collect();
            self.close("offset_max", &offset[..len], &expected, 4);
            assert!(offset[len..].iter().all(|&x| x == T::NEG_INFINITY));
            assert_eq!(
                top,
                offset.iter().copied().fold(T::NEG_INFINITY, T::max),
                "{} of {len}",
                self.ops.name
            );
            let sum = (self.ops.exp_weighted)(&mut offset, -top, &y);
            let exps: Vec<f64> = expected.iter().map(|x| (x - top.to_f64()).exp()).collect();
            self.close("exp_weighted", &offset[..len], &exps, 16);
            assert!(offset[len..].iter().all(|&x| x == T::ZERO));
            let expected = exps.iter().zip(&y).map(|(e, y)| e * y.to_f64()).sum();
            self.close_at("exp_weighted sum", &[sum], &[expected], 1.0, 16 * len);
        }
    }

    fn door(&mut self) {
        let limit = T::from_f64(100.0);
        for len in LENGTHS {
            let clean = self.random(len, 1.0);
            assert!((self.ops.all_within)(&clean, limit) && (self.ops.all_within)(&[], limit));
            let (mut copied, squares) = (
                vec![T::from_f64(f64::NAN); len],
                clean.iter().map(|x| x.to_f64() * x.to_f64()).sum(),
            );
            let got = (self.ops.copy)(&clean, &mut copied);
            assert_eq!(copied, clean);
            self.close("copy squares", &[got], &[squares], 16 * len);
            for i in 0..len {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, 101.0, -101.0] {
                    let mut x = clean.clone();
                    x[i] = T::from_f64(bad);
                    assert!(
                        !(self.ops.all_within)(&x, limit),
                        "{} {bad} at {i} of {len}",
                        self.ops.name
                    );
                    let copied = (self.ops.copy)(&x, &mut copied);
                    let mut rows = [&clean[..]; LANES];
                    rows[i % LANES] = &x;
                    let gathered =
                        (self.ops.gather)(&rows, T::ONE, &mut vec![T::ZERO; len * LANES], LANES);
                    for squares in [copied, gathered] {
                        let proves = squares <= limit * limit;
                        assert!(!proves, "{} {bad} at {i} of {len}: {squares}", self.ops.name);
                    }
                }
            }
        }
    }

    fn rows_become_columns(&mut self) {
        for d in LENGTHS {
            let width = 48;
            let rows: Vec<Vec<T>> = (0..LANES).map(|_| self.random(d, 1.0)).collect();
            let mut panel = vec![T::from_f64(f64::NAN); d * width];
            let squares = (self.ops.gather)(
                &std::array::from_fn(|lane| &rows[lane][..]),
                T::from_f64(2.0),
                &mut panel[16..],
                width,
            );
            let expected: f64 = rows.iter().flatten().map(|x| x.to_f64() * x.to_f64()).sum();
            self.close("gather squares", &[squares], &[expected], 16 * d);
            for (i, columns) in panel.chunks_exact(width).enumerate() {
                assert!(
                    (0..LANES).all(|lane| columns[16 + lane] == rows[lane][i] + rows[lane][i]),
                    "{} d = {d}",
                    self.ops.name
                );
                assert!(
                    columns[..16].iter().chain(&columns[32..]).all(|x| x.to_f64().is_nan()),
                    "outside its columns"
                );
            }
        }
    }
}

#[test]
fn every_table_of_f32() {
    for ops in single::all() {
        Suite { ops, rng: ChaCha12Rng::seed_from_u64(5) }.run();
    }
}

#[test]
fn every_table_of_f64() {
    for ops in double::all() {
        Suite { ops, rng: ChaCha12Rng::seed_from_u64(6) }.run();
    }
}
