//! The vector loops, once, for every instruction set. Safe functions on slices; lengths are checked
//! at the top.
//!
//! A *panel* is `[rows, width]`, row-major without gaps, column = token, `width` a multiple of
//! [`LANES`]. Every column is computed from that column alone and in the same order whatever the
//! width, so that a token's result never depends on its neighbours, not by one bit.

use super::ahead::Ahead;
pub(super) use super::dct::{transform as dct, transposed as dct_transposed};
use super::lane::{Simd, each};
use crate::Real;
use crate::low::mat::{Accum, MatMut, MatRef};
use crate::simd::{LANES, padded};

/// C (+)= A·B for operands that stay in the cache: no packing, no allocation. Every element of C is
/// one chain of multiply-adds in the order of k. Between tiles it asks for some of the cache lines
/// `ahead`.
#[inline(always)]
pub(super) fn matmul_ahead<S: Simd>(
    simd: S,
    c: MatMut<'_, S::T>,
    accum: Accum,
    a: MatRef<'_, S::T>,
    b: MatRef<'_, S::T>,
    mut ahead: Option<&mut Ahead<S::T>>,
) {
    let p = Product::of(&c, accum, a, b);
    let (a, b, c) = (a.data, b.data, c.data);
    if p.m == 0 || p.n == 0 {
        return;
    }
    assert!(
        p.n.is_multiple_of(LANES) && c.len() >= (p.m - 1) * p.c_row + p.n,
        "C holds [{}, {}]",
        p.m,
        p.n
    );
    assert!(
        p.k == 0
            || (a.len() > (p.m - 1) * p.a_row + (p.k - 1) * p.a_col
                && b.len() >= (p.k - 1) * p.b_row + p.n),
        "A and B"
    );
    let vectors = p.n / S::N;
    let mut column = 0;
    while column < vectors {
        // Few rows leave registers free for more columns, and need them to hide the latency of the
        // additions.
        let width = match (vectors - column, p.m) {
            (1, _) => 1,
            (8.., 1) => 8,
            (4.., ..=4) => 4,
            _ => 2,
        };
        let mut row = 0;
        while row < p.m {
            // The largest power of two that fits: few tiles to compile, and a chain per element is
            // the same in each.
            let height = 1 << (p.m - row).min(S::REGISTERS / 4).ilog2();
            // SAFETY: the tile [row..row + height, column·N..(column + width)·N] lies inside C, and
            // with it the rows of A and the columns of B, whose lengths were checked above.
            unsafe {
                let a = a.as_ptr().wrapping_add(row * p.a_row);
                let b = b.as_ptr().wrapping_add(column * S::N);
                let c = c.as_mut_ptr().add(row * p.c_row + column * S::N);
                match width {
                    8 => tile::<S, 1, 8>(simd, p, a, b, c),
                    4 => rows::<S, 4>(simd, height, p, a, b, c),
                    2 => rows::<S, 2>(simd, height, p, a, b, c),
                    _ => rows::<S, 1>(simd, height, p, a, b, c),
                }
            }
            if let Some(ahead) = &mut ahead {
                ahead.fetch(simd);
            }
            row += height;
        }
        column += width;
    }
}

/// The sizes and strides of a product, in elements, as the tiles need them.
#[derive(Clone, Copy)]
struct Product {
    /// Rows of A and C.
    m: usize,
    /// Columns of B and C, a multiple of [`LANES`].
    n: usize,
    /// Columns of A, rows of B.
    k: usize,
    a_row: usize,
    a_col: usize,
    b_row: usize,
    c_row: usize,
    accumulate: bool,
}

impl Product {
    #[inline(always)]
    fn of<T>(c: &MatMut<'_, T>, accum: Accum, a: MatRef<'_, T>, b: MatRef<'_, T>) -> Self {
        assert!(a.rows == c.rows && a.cols == b.rows && b.cols == c.cols, "shapes of a product");
        assert!(b.col_stride == 1, "rows of B are contiguous");
        Self {
            m: c.rows,
            n: c.cols,
            k: a.cols,
            a_row: a.row_stride,
            a_col: a.col_stride,
            b_row: b.row_stride,
            c_row: c.row_stride,
            accumulate: accum == Accum::Add,
        }
    }
}

/// Chooses the tile for the number of rows.
///
/// # Safety
/// As [`tile`], with `height` rows; a power of two.
#[inline(always)]
unsafe fn rows<S: Simd, const C: usize>(
    simd: S,
    height: usize,
    p: Product,
    a: *const S::T,
    b: *const S::T,
    c: *mut S::T,
) {
    // SAFETY: the caller's promise.
    unsafe {
        match height {
            1 => tile::<S, 1, C>(simd, p, a, b, c),
            2 => tile::<S, 2, C>(simd, p, a, b, c),
            4 => tile::<S, 4, C>(simd, p, a, b, c),
            8 if C < 4 && S::REGISTERS == 32 => tile::<S, 8, C>(simd, p, a, b, c),
            _ => unreachable!("heights are powers of two up to the tile's"),
        }
    }
}

/// R rows by C registers of the product, held in registers.
///
/// # Safety
/// `a` is valid at r·a_row + k·a_col, `b` for C·N elements at k·b_row, `c` for C·N elements at
/// r·c_row.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const C: usize>(
    simd: S,
    p: Product,
    a: *const S::T,
    b: *const S::T,
    c: *mut S::T,
) {
    let mut sums = [[simd.splat(S::T::ZERO); C]; R];
    for k in 0..p.k {
        // SAFETY: the caller's promise.
        unsafe {
            let mut row = [sums[0][0]; C];
            for j in 0..C {
                row[j] = simd.load(b.add(k * p.b_row + j * S::N));
            }
            for r in 0..R {
                let a = simd.splat(*a.add(r * p.a_row + k * p.a_col));
                for j in 0..C {
                    sums[r][j] = simd.mul_add(a, row[j], sums[r][j]);
                }
            }
        }
    }
    for r in 0..R {
        for j in 0..C {
            // SAFETY: the caller's promise.
            unsafe {
                let at = c.add(r * p.c_row + j * S::N);
                let sum =
                    if p.accumulate { simd.add(simd.load(at), sums[r][j]) } else { sums[r][j] };
                simd.store(at, sum);
            }
        }
    }
}

/// exp(x) for x ≤ 88; zero far below the range of the type. NaN for NaN.
#[inline(always)]
fn exp<S: Simd>(simd: S, x: S::V) -> S::V {
    let single = size_of::<S::T>() == 4;
    // Below this 2ⁿ is zero, and −∞ must not reach the subtraction. NaN stays, coming second.
    let x = simd.max(simd.constant(if single { -150.0 } else { -1100.0 }), x);
    let n = simd.round(simd.mul(x, simd.constant(std::f64::consts::LOG2_E)));
    // ln 2 in two parts, the first with enough trailing zeros that n·HIGH is exact (Cody and
    // Waite).
    let (high, low) = if single {
        (0.693_359_375, -2.121_944_400_546_905_8e-4)
    } else {
        (0.693_147_180_369_123_8, 1.908_214_929_270_587_7e-10)
    };
    let f = simd.mul_add(n, simd.constant(-high), x);
    let f = simd.mul_add(n, simd.constant(-low), f);
    // Taylor polynomials on |f| ≤ ln 2 / 2: remainder 5e-9 at degree 7, 4e-18 at degree 13.
    let degree = if single { 7 } else { 13 };
    let mut p = simd.constant(INVERSE_FACTORIAL[degree]);
    for i in (0..degree).rev() {
        p = simd.mul_add(p, f, simd.constant(INVERSE_FACTORIAL[i]));
    }
    simd.scale2(p, n)
}

/// 1/i!
const INVERSE_FACTORIAL: [f64; 14] = {
    let mut table = [1.0; 14];
    let mut i = 1;
    while i < 14 {
        table[i] = table[i - 1] / i as f64;
        i += 1;
    }
    table
};

/// Every element is a number of at most this magnitude.
#[inline(always)]
pub(super) fn all_within<S: Simd>(simd: S, x: &[S::T], limit: S::T) -> bool {
    let limits = simd.splat(limit);
    let (body, tail) = x.split_at(x.len() / S::N * S::N);
    let mut all = true;
    for part in body.chunks_exact(S::N) {
        // SAFETY: the part holds N elements.
        all &= simd.within(unsafe { simd.load(part.as_ptr()) }, limits);
    }
    all && tail.iter().all(|x| x.abs() <= limit)
}

/// `panel[i, lane] = scale · rows[lane][i]` for one group of LANES tokens of a panel `width` wide,
/// starting at the group's first column. Returns the sum of squares of the rows.
#[inline(always)]
pub(super) fn gather<S: Simd>(
    simd: S,
    rows: &[&[S::T]; LANES],
    scale: S::T,
    panel: &mut [S::T],
    width: usize,
) -> S::T {
    let d = rows[0].len();
    assert!(rows.iter().all(|row| row.len() == d), "rows of one length");
    assert!(d == 0 || panel.len() >= (d - 1) * width + LANES, "panel");
    let mut pointers = [rows[0].as_ptr(); LANES];
    for lane in 0..LANES {
        pointers[lane] = rows[lane].as_ptr();
    }
    let whole = d / S::N * S::N;
    let mut squares = simd.splat(S::T::ZERO);
    let mut i = 0;
    while i < whole {
        // SAFETY: the pointers are i elements into their rows, i + N ≤ d, and the panel holds LANES
        // elements in each of rows 0..d.
        unsafe {
            let to = panel.as_mut_ptr().add(i * width);
            squares = simd.add(squares, simd.transpose(&pointers, simd.splat(scale), to, width));
        }
        i += S::N;
        for lane in 0..LANES {
            pointers[lane] = pointers[lane].wrapping_add(S::N);
        }
    }
    let mut rest = S::T::ZERO;
    for i in whole..d {
        for lane in 0..LANES {
            let x = rows[lane][i];
            rest += x * x;
            panel[i * width + lane] = x * scale;
        }
    }
    simd.sum(squares) + rest
}

/// `to = from`. Returns the sum of squares.
#[inline(always)]
pub(super) fn copy<S: Simd>(simd: S, from: &[S::T], to: &mut [S::T]) -> S::T {
    assert!(from.len() == to.len(), "lengths");
    let whole = from.len() / S::N * S::N;
    let mut squares = [simd.splat(S::T::ZERO); 2];
    for i in (0..whole).step_by(S::N) {
        // SAFETY: i + N ≤ len.
        unsafe {
            let x = simd.load(from.as_ptr().add(i));
            squares = [squares[1], simd.mul_add(x, x, squares[0])];
            simd.store(to.as_mut_ptr().add(i), x);
        }
    }
    let mut rest = S::T::ZERO;
    for (to, &x) in to[whole..].iter_mut().zip(&from[whole..]) {
        rest += x * x;
        *to = x;
    }
    simd.sum(simd.add(squares[0], squares[1])) + rest
}

/// `out[j] = max_f (panel[f, j] + offset[f])`, −∞ for no rows.
#[inline(always)]
pub(super) fn column_max<S: Simd>(simd: S, panel: &[S::T], offset: &[S::T], out: &mut [S::T]) {
    let (m, width) = (offset.len(), out.len());
    assert!(width.is_multiple_of(LANES) && panel.len() == m * width, "panel");
    for j in (0..width).step_by(S::N) {
        // SAFETY: j + N ≤ width, in `out` and in every row of the panel.
        unsafe {
            // Two chains, to hide the latency of the comparisons.
            let mut top = [simd.splat(S::T::NEG_INFINITY); 2];
            for f in 0..m {
                let sum =
                    simd.add(simd.load(panel.as_ptr().add(f * width + j)), simd.splat(offset[f]));
                top = [top[1], simd.max(top[0], sum)];
            }
            simd.store(out.as_mut_ptr().add(j), simd.max(top[0], top[1]));
        }
    }
}

/// `out[f] = max_j (panel[f, j] + column[j])`.
#[inline(always)]
pub(super) fn row_max<S: Simd>(simd: S, panel: &[S::T], column: &[S::T], out: &mut [S::T]) {
    let (m, width) = (out.len(), column.len());
    assert!(width.is_multiple_of(LANES) && panel.len() == m * width, "panel");
    for f in 0..m {
        let mut top = simd.splat(S::T::NEG_INFINITY);
        for j in (0..width).step_by(S::N) {
            // SAFETY: j + N ≤ width.
            unsafe {
                top = simd.max(
                    top,
                    simd.add(
                        simd.load(panel.as_ptr().add(f * width + j)),
                        simd.load(column.as_ptr().add(j)),
                    ),
                )
            }
        }
        out[f] = simd.top(top);
    }
}

/// `panel[f, j] = exp(panel[f, j] + offset[f] + column[j])` and `dot[j] = Σ_f panel[f,
/// j]·weight[f]`.
#[inline(always)]
pub(super) fn exp_dot<S: Simd>(
    simd: S,
    panel: &mut [S::T],
    offset: &[S::T],
    column: &[S::T],
    weight: &[S::T],
    dot: &mut [S::T],
) {
    let (m, width) = (offset.len(), column.len());
    assert!(width.is_multiple_of(LANES) && panel.len() == m * width, "panel");
    assert!(weight.len() == m && dot.len() == width, "weights and sums");
    for j in (0..width).step_by(S::N) {
        // SAFETY: j + N ≤ width, in `column`, `dot` and every row of the panel.
        unsafe {
            let shift = simd.load(column.as_ptr().add(j));
            let mut sum = simd.splat(S::T::ZERO);
            for f in 0..m {
                let at = panel.as_mut_ptr().add(f * width + j);
                let e = exp(simd, simd.add(simd.add(simd.load(at), simd.splat(offset[f])), shift));
                simd.store(at, e);
                sum = simd.mul_add(e, simd.splat(weight[f]), sum);
            }
            simd.store(dot.as_mut_ptr().add(j), sum);
        }
    }
}

/// `sums[j] += Σ_f a[f, j]·b[f, j]`.
#[inline(always)]
pub(super) fn column_dot<S: Simd>(simd: S, a: &[S::T], b: &[S::T], sums: &mut [S::T]) {
    let width = sums.len();
    assert!(
        width.is_multiple_of(LANES)
            && a.len() == b.len()
            && (width == 0 || a.len().is_multiple_of(width)),
        "panels"
    );
    for j in (0..width).step_by(S::N) {
        // SAFETY: j + N ≤ width, in `sums` and in every row of the panels.
        unsafe {
            let at = sums.as_mut_ptr().add(j);
            let mut sum = simd.load(at);
            for row in (j..a.len()).step_by(width) {
                sum = simd.mul_add(
                    simd.load(a.as_ptr().add(row)),
                    simd.load(b.as_ptr().add(row)),
                    sum,
                );
            }
            simd.store(at, sum);
        }
    }
}

/// `panel[f, j] = weight[f, j]·scale[j]·(panel[f, j] − row[f]·column[j])` and `sums[j] = Σ_f
/// panel[f, j]`: the derivative of a weighted mean by the logarithms of its weights.
#[inline(always)]
pub(super) fn log_weight_vjp<S: Simd>(
    simd: S,
    panel: &mut [S::T],
    weight: &[S::T],
    scale: &[S::T],
    row: &[S::T],
    column: &[S::T],
    sums: &mut [S::T],
) {
    let (m, width) = (row.len(), column.len());
    assert!(
        width.is_multiple_of(LANES) && panel.len() == m * width && weight.len() == m * width,
        "panels"
    );
    assert!(scale.len() == width && sums.len() == width, "columns");
    for j in (0..width).step_by(S::N) {
        // SAFETY: j + N ≤ width, in `scale`, `column`, `sums` and every row of the panels.
        unsafe {
            let scale = simd.load(scale.as_ptr().add(j));
            let negated = simd.sub(simd.splat(S::T::ZERO), simd.load(column.as_ptr().add(j)));
            let mut sum = simd.splat(S::T::ZERO);
            for f in 0..m {
                let at = panel.as_mut_ptr().add(f * width + j);
                let weight = simd.mul(simd.load(weight.as_ptr().add(f * width + j)), scale);
                let value =
                    simd.mul(weight, simd.mul_add(simd.splat(row[f]), negated, simd.load(at)));
                simd.store(at, value);
                sum = simd.add(sum, value);
            }
            simd.store(sums.as_mut_ptr().add(j), sum);
        }
    }
}

/// `sums[f] += Σ_j a[f, j]` and `products[f] += Σ_j a[f, j]·(b[f, j] − offset[f])`, LANES partial
/// sums of each: what is to be summed over many panels is added up across the lanes once, at the
/// end.
#[inline(always)]
pub(super) fn lane_sums<S: Simd>(
    simd: S,
    a: &[S::T],
    b: &[S::T],
    offset: &[S::T],
    sums: &mut [S::T],
    products: &mut [S::T],
) {
    let m = offset.len();
    assert!(sums.len() == m * LANES && products.len() == m * LANES, "lanes");
    if m == 0 {
        return;
    }
    let width = a.len() / m;
    assert!(width.is_multiple_of(LANES) && a.len() == m * width && b.len() == m * width, "panels");
    for f in 0..m {
        // SAFETY: j + N ≤ width in every row of the panels, and N ≤ LANES.
        unsafe {
            let (sum_at, product_at) =
                (sums.as_mut_ptr().add(f * LANES), products.as_mut_ptr().add(f * LANES));
            let offset = simd.splat(*offset.get_unchecked(f));
            let (mut sum, mut product) = (simd.load(sum_at), simd.load(product_at));
            for j in (0..width).step_by(S::N) {
                let (a, b) = (
                    simd.load(a.as_ptr().add(f * width + j)),
                    simd.load(b.as_ptr().add(f * width + j)),
                );
                sum = simd.add(sum, a);
                product = simd.mul_add(a, simd.sub(b, offset), product);
            }
            simd.store(sum_at, sum);
            simd.store(product_at, product);
        }
    }
}

/// With z = x − center: `sums[i] += Σ_j z[i, j]·total[j]`, LANES partial sums of each, and unless
/// it is empty `grad[i, j] += scale[i]·y[i, j] + (tilt[i] − envelope·z[i, j])·total[j]`.
#[inline(always)]
pub(super) fn input_vjp<S: Simd>(
    simd: S,
    x: &[S::T],
    center: &[S::T],
    y: &[S::T],
    scale: &[S::T],
    total: &[S::T],
    tilt: &[S::T],
    envelope: S::T,
    grad: &mut [S::T],
    sums: &mut [S::T],
) {
    let (d, width) = (center.len(), total.len());
    assert!(width.is_multiple_of(LANES) && x.len() == d * width && y.len() == d * width, "panels");
    assert!(grad.is_empty() || grad.len() == d * width, "gradient");
    assert!(scale.len() == d && tilt.len() == d && sums.len() == d * LANES, "rows");
    let envelope = simd.splat(envelope);
    for i in 0..d {
        // SAFETY: i < d, and j + N ≤ width in `total` and every row of the panels; N ≤ LANES.
        unsafe {
            let (center, scale) =
                (simd.splat(*center.get_unchecked(i)), simd.splat(*scale.get_unchecked(i)));
            let tilt = simd.splat(*tilt.get_unchecked(i));
            let sum_at = sums.as_mut_ptr().add(i * LANES);
            let mut sum = simd.load(sum_at);
            for j in (0..width).step_by(S::N) {
                let at = i * width + j;
                let (z, total) = (
                    simd.sub(simd.load(x.as_ptr().add(at)), center),
                    simd.load(total.as_ptr().add(j)),
                );
                sum = simd.mul_add(z, total, sum);
                if !grad.is_empty() {
                    let to = grad.as_mut_ptr().add(at);
                    let value = simd.mul_add(scale, simd.load(y.as_ptr().add(at)), simd.load(to));
                    simd.store(
                        to,
                        simd.mul_add(simd.sub(tilt, simd.mul(envelope, z)), total, value),
                    );
                }
            }
            simd.store(sum_at, sum);
        }
    }
}

/// `panel[f, j] = exp(panel[f, j] + offset[f] + column[j])`.
#[inline(always)]
pub(super) fn exp_panel<S: Simd>(simd: S, panel: &mut [S::T], offset: &[S::T], column: &[S::T]) {
    let (m, width) = (offset.len(), column.len());
    assert!(width.is_multiple_of(LANES) && panel.len() == m * width, "panel");
    for f in 0..m {
        exp_row(simd, &mut panel[f * width..(f + 1) * width], offset[f], column);
    }
}

/// `panel[f, j] = exp(panel[f, j] − reference[f] + column[j])` and `sums[f] = Σ_j panel[f, j]`.
#[inline(always)]
pub(super) fn weigh<S: Simd>(
    simd: S,
    panel: &mut [S::T],
    reference: &[S::T],
    column: &[S::T],
    sums: &mut [S::T],
) {
    let (m, width) = (reference.len(), column.len());
    assert!(width.is_multiple_of(LANES) && panel.len() == m * width && sums.len() == m, "panel");
    for f in 0..m {
        sums[f] =
            simd.sum(exp_row(simd, &mut panel[f * width..(f + 1) * width], -reference[f], column));
    }
}

/// `row[j] = exp(row[j] + offset + column[j])`, returns the sums of every N-th element.
#[inline(always)]
fn exp_row<S: Simd>(simd: S, row: &mut [S::T], offset: S::T, column: &[S::T]) -> S::V {
    let offset = simd.splat(offset);
    let mut total = simd.splat(S::T::ZERO);
    for j in (0..row.len().min(column.len())).step_by(S::N) {
        // SAFETY: j + N ≤ len, the lengths are multiples of LANES.
        unsafe {
            let at = row.as_mut_ptr().add(j);
            let e = exp(
                simd,
                simd.add(simd.add(simd.load(at), offset), simd.load(column.as_ptr().add(j))),
            );
            simd.store(at, e);
            total = simd.add(total, e);
        }
    }
    total
}

/// `sums[f] += Σ_j panel[f, j]`.
#[inline(always)]
pub(super) fn add_row_sums<S: Simd>(simd: S, panel: &[S::T], sums: &mut [S::T]) {
    if sums.is_empty() {
        return;
    }
    let width = panel.len() / sums.len();
    assert!(width.is_multiple_of(LANES) && panel.len() == sums.len() * width, "panel");
    for (f, sum) in sums.iter_mut().enumerate() {
        let mut total = simd.splat(S::T::ZERO);
        for j in (0..width).step_by(S::N) {
            // SAFETY: j + N ≤ width.
            unsafe { total = simd.add(total, simd.load(panel.as_ptr().add(f * width + j))) }
        }
        *sum += simd.sum(total);
    }
}

/// Keeps the lower triangle of `p` `[rows, width]` (column j ≤ row i + `diagonal`), zeroes the
/// rest, and adds the row sums to `sums`. Elements of the register with the diagonal must be
/// finite.
#[inline(always)]
pub(super) fn mask_triangle<S: Simd>(
    simd: S,
    p: &mut [S::T],
    width: usize,
    diagonal: usize,
    sums: &mut [S::T],
) {
    assert!(width.is_multiple_of(LANES) && p.len() >= sums.len() * width, "scores");
    for (i, (sum, row)) in sums.iter_mut().zip(p.chunks_exact_mut(width)).enumerate() {
        *sum += simd.sum(keep_until(simd, row, i + diagonal + 1, S::T::ZERO));
    }
}

/// `p[i, j] −= minus[i]` in the lower triangle (column j ≤ row i), zeroes the rest. Elements of the
/// register with the diagonal must be finite.
#[inline(always)]
pub(super) fn lower_less<S: Simd>(simd: S, p: &mut [S::T], width: usize, minus: &[S::T]) {
    assert!(width.is_multiple_of(LANES) && p.len() == minus.len() * width, "products");
    for (i, (row, &minus)) in p.chunks_exact_mut(width).zip(minus).enumerate() {
        keep_until(simd, row, i + 1, minus);
    }
}

/// `p[i, j] −= minus[j]` in the upper triangle (column j ≥ row i), zeroes the rest. Elements of the
/// register with the diagonal must be finite.
#[inline(always)]
pub(super) fn upper_less<S: Simd>(simd: S, p: &mut [S::T], minus: &[S::T]) {
    let width = minus.len();
    assert!(width.is_multiple_of(LANES) && p.len().is_multiple_of(width), "products");
    let mut step = [S::T::ZERO; 2 * LANES];
    step[LANES..].fill(S::T::ONE);
    for (start, row) in p.chunks_exact_mut(width).enumerate() {
        for j in (0..width).step_by(S::N) {
            // SAFETY: j + N ≤ width, which is the length of `row` and `minus`; where 0 < start − j
            // < N ≤ LANES, so is the step.
            unsafe {
                let at = row.as_mut_ptr().add(j);
                let less = simd.sub(simd.load(at), simd.load(minus.as_ptr().add(j)));
                let kept = if j + S::N <= start {
                    simd.splat(S::T::ZERO)
                } else if j >= start {
                    less
                } else {
                    simd.mul(less, simd.load(step.as_ptr().add(LANES + j - start)))
                };
                simd.store(at, kept);
            }
        }
    }
}

/// Subtracts `minus` from the first `end` elements of `row` (a multiple of LANES long) and zeroes
/// the others; returns the sums of every N-th element.
#[inline(always)]
fn keep_until<S: Simd>(simd: S, row: &mut [S::T], end: usize, minus: S::T) -> S::V {
    let mut step = [S::T::ZERO; 2 * LANES];
    step[..LANES].fill(S::T::ONE);
    let (minus, zero) = (simd.splat(minus), simd.splat(S::T::ZERO));
    let mut total = zero;
    for j in (0..row.len()).step_by(S::N) {
        // SAFETY: j + N ≤ len; where 0 < end − j < N ≤ LANES, the step lies within its table.
        unsafe {
            let at = row.as_mut_ptr().add(j);
            let kept = if j >= end {
                zero
            } else if j + S::N <= end {
                simd.sub(simd.load(at), minus)
            } else {
                simd.mul(
                    simd.sub(simd.load(at), minus),
                    simd.load(step.as_ptr().add(LANES + j - end)),
                )
            };
            total = simd.add(total, kept);
            simd.store(at, kept);
        }
    }
    total
}

/// Largest element of `row` (a multiple of LANES long).
#[inline(always)]
pub(super) fn slice_max<S: Simd>(simd: S, row: &[S::T]) -> S::T {
    assert!(row.len().is_multiple_of(LANES), "whole lane groups");
    let mut top = simd.splat(S::T::NEG_INFINITY);
    for j in (0..row.len()).step_by(S::N) {
        // SAFETY: j + N ≤ len.
        unsafe { top = simd.max(top, simd.load(row.as_ptr().add(j))) }
    }
    simd.top(top)
}

/// `row[j] = exp(row[j] + shift)`, returns their sum (`row` a multiple of LANES long).
#[inline(always)]
pub(super) fn exp_sum<S: Simd>(simd: S, row: &mut [S::T], shift: S::T) -> S::T {
    assert!(row.len().is_multiple_of(LANES), "whole lane groups");
    let shift = simd.splat(shift);
    let mut total = simd.splat(S::T::ZERO);
    for j in (0..row.len()).step_by(S::N) {
        // SAFETY: j + N ≤ len.
        unsafe {
            let at = row.as_mut_ptr().add(j);
            let e = exp(simd, simd.add(simd.load(at), shift));
            simd.store(at, e);
            total = simd.add(total, e);
        }
    }
    simd.sum(total)
}

/// `x[f] += factor·y[f] + shift` for the elements that y has, −∞ for those behind them; returns the
/// largest.
#[inline(always)]
pub(super) fn offset_max<S: Simd>(
    simd: S,
    x: &mut [S::T],
    factor: S::T,
    y: &[S::T],
    shift: S::T,
) -> S::T {
    let (x, padding) = x.split_at_mut(y.len());
    padding.fill(S::T::NEG_INFINITY);
    let whole = x.len() / S::N * S::N;
    let (factors, shifts) = (simd.splat(factor), simd.splat(shift));
    let mut top = simd.splat(S::T::NEG_INFINITY);
    for i in (0..whole).step_by(S::N) {
        // SAFETY: i + N ≤ len of both.
        unsafe {
            let at = x.as_mut_ptr().add(i);
            let value = simd
                .add(simd.mul_add(factors, simd.load(y.as_ptr().add(i)), simd.load(at)), shifts);
            simd.store(at, value);
            top = simd.max(top, value);
        }
    }
    let mut top = simd.top(top);
    for (x, &y) in x[whole..].iter_mut().zip(&y[whole..]) {
        *x = (*x + factor * y) + shift;
        top = top.max(*x);
    }
    top
}

/// `x[f] = exp(x[f] + shift)` (`x` a multiple of LANES long), returns Σ_f x[f]·weight[f] over the
/// weights there are.
#[inline(always)]
pub(super) fn exp_weighted<S: Simd>(simd: S, x: &mut [S::T], shift: S::T, weight: &[S::T]) -> S::T {
    assert!(x.len().is_multiple_of(LANES) && weight.len() <= x.len(), "whole lane groups");
    let shift = simd.splat(shift);
    let whole = weight.len() / S::N * S::N;
    let mut total = simd.splat(S::T::ZERO);
    for j in (0..x.len()).step_by(S::N) {
        // SAFETY: j + N ≤ len of x, and of the weights where they are read.
        unsafe {
            let at = x.as_mut_ptr().add(j);
            let e = exp(simd, simd.add(simd.load(at), shift));
            simd.store(at, e);
            if j < whole {
                total = simd.mul_add(e, simd.load(weight.as_ptr().add(j)), total);
            }
        }
    }
    x[whole..]
        .iter()
        .zip(&weight[whole..])
        .fold(simd.sum(total), |sum, (&x, &weight)| sum + x * weight)
}

/// `out = factor·(a − b)`.
#[inline(always)]
pub(super) fn difference<S: Simd>(simd: S, a: &[S::T], b: &[S::T], factor: S::T, out: &mut [S::T]) {
    assert!(a.len() == b.len() && out.len() == a.len(), "lengths");
    let (whole, factors) = (a.len() / S::N * S::N, simd.splat(factor));
    for i in (0..whole).step_by(S::N) {
        // SAFETY: i + N ≤ len.
        unsafe {
            let difference = simd.sub(simd.load(a.as_ptr().add(i)), simd.load(b.as_ptr().add(i)));
            simd.store(out.as_mut_ptr().add(i), simd.mul(difference, factors));
        }
    }
    for i in whole..a.len() {
        out[i] = (a[i] - b[i]) * factor;
    }
}

/// With u = a − factor·base and w = b − factor·base: Σ u·w, Σ w², Σ (a − b)².
#[inline(always)]
pub(super) fn shares<S: Simd>(
    simd: S,
    a: &[S::T],
    b: &[S::T],
    factor: S::T,
    base: &[S::T],
) -> [S::T; 3] {
    assert!(a.len() == b.len() && base.len() == a.len(), "lengths");
    let (whole, factors) = (a.len() / S::N * S::N, simd.splat(factor));
    let mut sums = [simd.splat(S::T::ZERO); 3];
    for i in (0..whole).step_by(S::N) {
        // SAFETY: i + N ≤ len.
        unsafe {
            let (a, b) = (simd.load(a.as_ptr().add(i)), simd.load(b.as_ptr().add(i)));
            let base = simd.mul(factors, simd.load(base.as_ptr().add(i)));
            let (u, w, difference) = (simd.sub(a, base), simd.sub(b, base), simd.sub(a, b));
            sums = [
                simd.mul_add(u, w, sums[0]),
                simd.mul_add(w, w, sums[1]),
                simd.mul_add(difference, difference, sums[2]),
            ];
        }
    }
    let mut sums = each!([0 1 2], |i| simd.sum(sums[i]));
    for i in whole..a.len() {
        let (u, w, difference) = (a[i] - factor * base[i], b[i] - factor * base[i], a[i] - b[i]);
        sums = [sums[0] + u * w, sums[1] + w * w, sums[2] + difference * difference];
    }
    sums
}

/// Moves what it can of `rest` into `sums`: sums' = sums + rest rounded, rest' = what rounding lost
/// [Kahan; Dekker's fast two-sum]. So a sum of very many small numbers keeps them all.
#[inline(always)]
pub(super) fn fold<S: Simd>(simd: S, sums: &mut [S::T], rest: &mut [S::T]) {
    assert!(sums.len() == rest.len(), "sums and their rest");
    let whole = sums.len() / S::N * S::N;
    for i in (0..whole).step_by(S::N) {
        // SAFETY: i + N ≤ len.
        unsafe {
            let (sum_at, rest_at) = (sums.as_mut_ptr().add(i), rest.as_mut_ptr().add(i));
            let (sum, rest) = (simd.load(sum_at), simd.load(rest_at));
            let total = simd.add(sum, rest);
            simd.store(sum_at, total);
            simd.store(rest_at, simd.sub(rest, simd.sub(total, sum)));
        }
    }
    for (sum, rest) in sums[whole..].iter_mut().zip(&mut rest[whole..]) {
        let total = *sum + *rest;
        *rest -= total - *sum;
        *sum = total;
    }
}

/// `out = xᵀ·A (+ out)`, A `[k, n]` without gaps, n a multiple of LANES: the product of one token.
/// As many chains of additions as hide their latency, more than one per element where there are few
/// columns, so that bits differ from [`matmul`]'s.
#[inline(always)]
pub(super) fn vecmat<S: Simd>(simd: S, x: &[S::T], a: &[S::T], accumulate: bool, out: &mut [S::T]) {
    let n = out.len();
    assert!(n.is_multiple_of(LANES) && a.len() >= x.len() * n, "matrix");
    let mut i = 0;
    while i < n {
        let registers = (n - i) / S::N;
        // SAFETY: `registers` registers of columns lie between i and n.
        i += S::N
            * unsafe {
                match registers {
                    8.. if S::REGISTERS == 16 => {
                        vecmat_columns::<S, 8, 1>(simd, x, a, accumulate, out, i)
                    }
                    4.. if S::REGISTERS == 16 => {
                        vecmat_columns::<S, 4, 2>(simd, x, a, accumulate, out, i)
                    }
                    4.. => vecmat_columns::<S, 4, 4>(simd, x, a, accumulate, out, i),
                    2.. => vecmat_columns::<S, 2, 4>(simd, x, a, accumulate, out, i),
                    _ => vecmat_columns::<S, 1, 4>(simd, x, a, accumulate, out, i),
                }
            };
    }
}

/// C registers of columns of [`vecmat`], from column i, in U chains each; returns C.
///
/// # Safety
/// i + C·N ≤ n; the lengths are those that [`vecmat`] checks.
#[inline(always)]
unsafe fn vecmat_columns<S: Simd, const C: usize, const U: usize>(
    simd: S,
    x: &[S::T],
    a: &[S::T],
    accumulate: bool,
    out: &mut [S::T],
    i: usize,
) -> usize {
    let n = out.len();
    let mut sums = [[simd.splat(S::T::ZERO); C]; U];
    let whole = x.len() / U * U;
    // SAFETY: the caller's promise.
    unsafe {
        for f in (0..whole).step_by(U) {
            for u in 0..U {
                let x = simd.splat(*x.get_unchecked(f + u));
                for c in 0..C {
                    let a = simd.load(a.as_ptr().add((f + u) * n + i + c * S::N));
                    sums[u][c] = simd.mul_add(x, a, sums[u][c]);
                }
            }
        }
        for f in whole..x.len() {
            let x = simd.splat(*x.get_unchecked(f));
            for c in 0..C {
                let a = simd.load(a.as_ptr().add(f * n + i + c * S::N));
                sums[0][c] = simd.mul_add(x, a, sums[0][c]);
            }
        }
        for c in 0..C {
            let at = out.as_mut_ptr().add(i + c * S::N);
            let sum = match U {
                1 => sums[0][c],
                2 => simd.add(sums[0][c], sums[1][c]),
                _ => simd.add(simd.add(sums[0][c], sums[1][c]), simd.add(sums[2][c], sums[3][c])),
            };
            simd.store(at, if accumulate { simd.add(simd.load(at), sum) } else { sum });
        }
    }
    C
}

/// The DCT-II of one vector of any length, u = post ⊙ C(pre ⊙ x): `out = u + row + offset`, and
/// unless it is empty `mirror = mirror_row + offset − u`.
///
/// Even rows of C are symmetric, odd ones antisymmetric, so that half of each is enough: with h =
/// ⌈d/2⌉ and rows of h padded to whole lane groups, `halves` is `[h, h_padded]` of C[2g, i] (row i,
/// column g), then `[⌊d/2⌋, h_padded]` of C[2g+1, i]. `scratch` is 4·h_padded elements.
#[inline(always)]
pub(super) fn dct_token<S: Simd>(
    simd: S,
    halves: &[S::T],
    x: &[S::T],
    pre: &[S::T],
    post: &[S::T],
    offset: S::T,
    row: &[S::T],
    out: &mut [S::T],
    mirror_row: &[S::T],
    mirror: &mut [S::T],
    scratch: &mut [S::T],
) {
    let d = x.len();
    let (more, fewer, stride) = (d.div_ceil(2), d / 2, padded(d.div_ceil(2)));
    let (even, odd) = halves.split_at(more * stride);
    let (pre, post, row, out) = (&pre[..d], &post[..d], &row[..d], &mut out[..d]);
    let (inputs, outputs) = scratch[..4 * stride].split_at_mut(2 * stride);
    let (sums, differences) = inputs.split_at_mut(stride);
    let (evens, odds) = outputs.split_at_mut(stride);
    let low = x.iter().zip(pre).take(fewer);
    let high = x[more..].iter().zip(&pre[more..]).rev();
    for ((sum, difference), ((&x, &pre), (&x_high, &pre_high))) in
        sums.iter_mut().zip(differences.iter_mut()).zip(low.zip(high))
    {
        *sum = x * pre + x_high * pre_high;
        *difference = x * pre - x_high * pre_high;
    }
    if more > fewer {
        sums[fewer] = x[fewer] * pre[fewer];
    }
    vecmat(simd, &sums[..more], even, false, evens);
    vecmat(simd, &differences[..fewer], odd, false, odds);
    let u = inputs;
    for (pair, (&even, &odd)) in u.as_chunks_mut::<2>().0.iter_mut().zip(evens.iter().zip(&*odds)) {
        *pair = [even, odd];
    }
    for (out, ((&u, &post), &row)) in out.iter_mut().zip(u.iter().zip(post).zip(row)) {
        *out = post * u + (row + offset);
    }
    for (out, ((&u, &post), &row)) in mirror.iter_mut().zip(u.iter().zip(post).zip(mirror_row)) {
        *out = (row + offset) - post * u;
    }
}

/// `x[i] *= a`.
#[inline(always)]
pub(super) fn scale<S: Simd>(simd: S, a: S::T, x: &mut [S::T]) {
    let (body, tail) = x.split_at_mut(x.len() / S::N * S::N);
    let factor = simd.splat(a);
    for part in body.chunks_exact_mut(S::N) {
        // SAFETY: the part holds N elements.
        unsafe { simd.store(part.as_mut_ptr(), simd.mul(factor, simd.load(part.as_ptr()))) }
    }
    for x in tail {
        *x *= a;
    }
}

/// `out[t, i] += Σ_j a[i, j]·x[t, j]`, rows of everything contiguous, k columns in `a`: the
/// products of tokens by a weight matrix. Every element is added up in the same order whatever the
/// number of tokens; a few rows of `a` at a time meet all of them.
#[inline(always)]
pub(super) fn matvec<S: Simd>(simd: S, a: &[S::T], k: usize, x: &[S::T], out: &mut [S::T]) {
    if k == 0 {
        return;
    }
    let (rows, tokens) = (a.len() / k, x.len() / k);
    assert!(a.len() == rows * k && x.len() == tokens * k && out.len() == rows * tokens, "matrices");
    for first in (0..rows).step_by(TILE) {
        let tile = first..rows.min(first + TILE);
        let mut t = 0;
        while t < tokens {
            let group = (tokens - t).min(GROUP);
            for i in tile.clone() {
                let row = &a[i * k..(i + 1) * k];
                let x = &x[t * k..(t + group) * k];
                let totals = if group == GROUP {
                    dots::<S, GROUP>(simd, row, x)
                } else {
                    alone(simd, row, x)
                };
                for (u, total) in totals.iter().take(group).enumerate() {
                    out[(t + u) * rows + i] += *total;
                }
            }
            t += group;
        }
    }
}

/// Rows of a matrix that meet all tokens before the next ones do: they stay in the fastest cache.
const TILE: usize = 8;
/// Tokens that meet a row at the same time.
const GROUP: usize = 4;

/// Fewer than [`GROUP`] tokens, one after the other.
#[inline(always)]
fn alone<S: Simd>(simd: S, row: &[S::T], x: &[S::T]) -> [S::T; GROUP] {
    let mut totals = [S::T::ZERO; GROUP];
    for (total, x) in totals.iter_mut().zip(x.chunks_exact(row.len())) {
        [*total] = dots::<S, 1>(simd, row, x);
    }
    totals
}

/// The dot products of a row with G tokens `[G, k]`, four chains of additions each.
#[inline(always)]
fn dots<S: Simd, const G: usize>(simd: S, row: &[S::T], x: &[S::T]) -> [S::T; G] {
    let k = row.len();
    assert!(x.len() == G * k, "tokens");
    let whole = k / S::N * S::N;
    let mut sums = [[simd.splat(S::T::ZERO); 4]; G];
    let mut j = 0;
    // SAFETY: every access stays below `whole` ≤ k, in one of the G rows of `x`.
    unsafe {
        while j + 4 * S::N <= whole {
            for u in 0..4 {
                let at = j + u * S::N;
                let a = simd.load(row.as_ptr().add(at));
                for t in 0..G {
                    let x = simd.load(x.as_ptr().add(t * k + at));
                    sums[t][u] = simd.mul_add(a, x, sums[t][u]);
                }
            }
            j += 4 * S::N;
        }
        while j < whole {
            let a = simd.load(row.as_ptr().add(j));
            for t in 0..G {
                let x = simd.load(x.as_ptr().add(t * k + j));
                sums[t][0] = simd.mul_add(a, x, sums[t][0]);
            }
            j += S::N;
        }
    }
    let mut totals = [S::T::ZERO; G];
    for t in 0..G {
        let [a, b, c, d] = sums[t];
        totals[t] = simd.sum(simd.add(simd.add(a, b), simd.add(c, d)));
        for j in whole..k {
            totals[t] += row[j] * x[t * k + j];
        }
    }
    totals
}
