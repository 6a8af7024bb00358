//! The orthonormal discrete cosine transforms, planned once per length.

use std::sync::{Arc, PoisonError, Weak};

use crate::Real;
use crate::low::aligned::Aligned;
use crate::low::real::sealed::RowDct;
use crate::simd::padded;

/// Orthonormal DCT-II of the columns of a panel, and DCT-III of a row.
///
/// ```text
/// C[f,i] = s_f cos(π(2i+1)f / 2d),   s_0 = √(1/d),   otherwise s_f = √(2/d)
/// DCT-II: X = C x        DCT-III: x = Cᵀ X
/// ```
///
/// Any length ≥ 1; O(d log d) per column. Runs column by column through rustdct.
#[derive(Clone)]
pub(super) struct DctPlan<T> {
    len: usize,
    row: RowDct<T>,
    first: T,
    other: T,
}

impl<T: Real> DctPlan<T> {
    /// Plans transforms of `len` ≥ 1 elements.
    pub(super) fn new(len: usize) -> Self {
        let len_f = len as f64;
        Self {
            len,
            row: T::plan_dct(len),
            first: T::from_f64((1.0 / len_f).sqrt()),
            other: T::from_f64((2.0 / len_f).sqrt()),
        }
    }

    /// Scratch elements that [`dct2_panel`](Self::dct2_panel) needs for a panel of that width.
    pub(super) fn scratch_len(&self, _width: usize) -> usize {
        self.len + self.row.scratch_len
    }

    /// Replaces every column of `panel`, `[len, width]`, by its DCT-II. Does not allocate.
    pub(super) fn dct2_panel(&self, width: usize, panel: &mut [T], scratch: &mut [T]) {
        self.columns(width, panel, scratch, |row, scratch| {
            (self.row.dct2)(row, scratch);
            row[0] *= self.first;
            for value in &mut row[1..] {
                *value *= self.other;
            }
        });
    }

    /// Replaces every column of `panel`, `[len, width]`, by its DCT-III, with the scratch of
    /// [`dct2_panel`](Self::dct2_panel). Does not allocate.
    pub(super) fn dct3_panel(&self, width: usize, panel: &mut [T], scratch: &mut [T]) {
        self.columns(width, panel, scratch, |row, scratch| self.dct3_row(row, scratch));
    }

    /// Replaces every column of `panel` by what `transform` makes of it.
    fn columns(
        &self,
        width: usize,
        panel: &mut [T],
        scratch: &mut [T],
        transform: impl Fn(&mut [T], &mut [T]),
    ) {
        debug_assert_eq!(panel.len(), self.len * width);
        let (row, scratch) = scratch.split_at_mut(self.len);
        let scratch = &mut scratch[..self.row.scratch_len];
        for j in 0..width {
            for (value, element) in row.iter_mut().zip(panel[j..].iter().step_by(width)) {
                *value = *element;
            }
            transform(row, scratch);
            for (value, element) in row.iter().zip(panel[j..].iter_mut().step_by(width)) {
                *element = *value;
            }
        }
    }

    /// Scratch elements that [`dct3_row`](Self::dct3_row) needs.
    pub(super) fn row_scratch_len(&self) -> usize {
        self.row.scratch_len
    }

    /// Replaces `row`, `[len]`, by its DCT-III. Does not allocate.
    pub(super) fn dct3_row(&self, row: &mut [T], scratch: &mut [T]) {
        debug_assert_eq!(row.len(), self.len);
        row[0] *= self.first + self.first;
        for value in &mut row[1..] {
            *value *= self.other;
        }
        (self.row.dct3)(row, &mut scratch[..self.row.scratch_len]);
    }
}

/// The halves of the DCT-II matrix that the product with one token works on, see
/// [`Ops::dct_token`](crate::simd::Ops::dct_token): Cᵀ's even columns, then its odd ones, the first
/// half of each; the same ones for all who hold them.
pub(super) fn shared_halves<T: Real>(len: usize) -> Arc<Aligned<T>> {
    let mut shared = T::dct_halves().lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(halves) = shared.get(&len).and_then(Weak::upgrade) {
        return halves;
    }
    let (plan, width) = (DctPlan::<f64>::new(len), padded(len));
    let mut rows = vec![0.0; len * width];
    (0..len).for_each(|i| rows[i * width + i] = 1.0);
    plan.dct2_panel(width, &mut rows, &mut vec![0.0; plan.scratch_len(width)]);
    let stride = padded(len.div_ceil(2));
    let mut halves = Aligned::filled(len * stride, T::ZERO);
    let (even, odd) = halves.split_at_mut(len.div_ceil(2) * stride);
    for (f, row) in rows.chunks_exact(width).enumerate() {
        let half = if f % 2 == 0 { &mut *even } else { &mut *odd };
        half.chunks_exact_mut(stride)
            .zip(row)
            .for_each(|(column, &c)| column[f / 2] = T::from_f64(c));
    }
    let halves = Arc::new(halves);
    shared.retain(|_, halves| halves.strong_count() > 0);
    shared.insert(len, Arc::downgrade(&halves));
    halves
}

/// The first `dim` columns of `rows` `[P, row_len]` as rows padded to whole lane groups, `[dim,
/// P_padded]`.
pub(super) fn transposed<T: Real>(rows: &[f64], row_len: usize, dim: usize) -> Aligned<T> {
    let stride = padded(rows.len() / row_len);
    let mut columns = Aligned::filled(dim * stride, T::ZERO);
    for (f, row) in rows.chunks_exact(row_len).enumerate() {
        row[..dim].iter().enumerate().for_each(|(i, &w)| columns[i * stride + f] = T::from_f64(w));
    }
    columns
}

#[cfg(test)]
mod tests {
    use std::f64::consts::PI;

    use super::*;
    use crate::simd::LANES;

    const LENGTHS: [usize; 14] = [1, 2, 3, 5, 7, 8, 16, 31, 48, 64, 100, 127, 128, 256];

    fn cosine(d: usize, f: usize, i: usize) -> f64 {
        // The angle is reduced first: (2i+1)f counts quarter periods of 4d.
        let angle = PI * (((2 * i + 1) * f) % (4 * d)) as f64 / (2 * d) as f64;
        angle.cos() * (if f == 0 { 1.0 } else { 2.0 } / d as f64).sqrt()
    }

    fn input(i: usize, j: usize) -> f64 {
        (1.3 * i as f64 + 0.7 * j as f64 + 0.1 * (i * j) as f64).sin() + 0.25
    }

    fn columns_against_the_cosine_matrix<T: Real>() {
        for d in LENGTHS {
            for width in [LANES, 3 * LANES] {
                let plan = DctPlan::<T>::new(d);
                let mut panel: Vec<T> =
                    (0..d * width).map(|k| T::from_f64(input(k / width, k % width))).collect();
                let mut scratch = vec![T::from_f64(f64::NAN); plan.scratch_len(width)];
                plan.dct2_panel(width, &mut panel, &mut scratch);
                for j in 0..width {
                    let norm = (0..d).map(|i| input(i, j).powi(2)).sum::<f64>().sqrt();
                    for f in 0..d {
                        let expected: f64 = (0..d)
                            .map(|i| cosine(d, f, i) * T::from_f64(input(i, j)).to_f64())
                            .sum();
                        let error = (panel[f * width + j].to_f64() - expected).abs();
                        let tolerance = 10.0 * T::EPSILON.to_f64() * norm;
                        assert!(
                            error <= tolerance,
                            "{} d {d} width {width} f {f} j {j}: off by {error:e}",
                            T::NAME
                        );
                    }
                }
            }
        }
    }

    fn rows_against_the_transposed_matrix<T: Real>() {
        for d in LENGTHS {
            let plan = DctPlan::<T>::new(d);
            let mut row: Vec<T> = (0..d).map(|i| T::from_f64(input(i, 3))).collect();
            plan.dct3_row(&mut row, &mut vec![T::from_f64(f64::NAN); plan.row_scratch_len()]);
            let norm = (0..d).map(|i| input(i, 3).powi(2)).sum::<f64>().sqrt();
            for (f, got) in row.iter().enumerate() {
                let expected: f64 =
                    (0..d).map(|i| cosine(d, i, f) * T::from_f64(input(i, 3)).to_f64()).sum();
                let error = (got.to_f64() - expected).abs();
                assert!(
                    error <= 10.0 * T::EPSILON.to_f64() * norm,
                    "{} d {d} f {f}: off by {error:e}",
                    T::NAME
                );
            }
        }
    }

    #[test]
    fn dct2_is_the_cosine_matrix() {
        columns_against_the_cosine_matrix::<f64>();
        columns_against_the_cosine_matrix::<f32>();
    }

    #[test]
    fn dct3_is_its_transpose() {
        rows_against_the_transposed_matrix::<f64>();
        rows_against_the_transposed_matrix::<f32>();
    }
}
