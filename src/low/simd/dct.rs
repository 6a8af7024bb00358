//! Batched DCT-II and its transpose, the DCT-III, with tokens along the lanes: lengths 2^k, 3·2^k
//! and 5·2^k, k ≥ 3, up to 256.
//!
//! Lee's factorisation [B. G. Lee, "A new algorithm to compute the discrete cosine transform", IEEE
//! Trans. ASSP 32, 1984]:
//!
//! ```text
//! X_f = Σ_i x_i cos(π(2i+1)f / 2n)
//! a_i = x_i + x_{n−1−i}      b_i = (x_i − x_{n−1−i}) / (2 cos(π(2i+1) / 2n))      i < n/2
//! X_{2f} = DCT(a)_f          X_{2f+1} = DCT(b)_f + DCT(b)_{f+1}
//! ```
//!
//! Each level is one pass over registers of tokens, down to a *leaf* of 8 to 32 points, which the
//! compiler keeps in registers as far as they go. At the end of it all are one, three or five
//! points, by the definition.
//!
//! The transpose runs through the same graph from its end:
//!
//! ```text
//! A_f = X_{2f}           B_f = X_{2f−1} + X_{2f+1}       X_{−1} = 0
//! a = DCTᵀ(A)            b = DCTᵀ(B)
//! x_i = a_i + b_i / (2 cos(π(2i+1) / 2n))      x_{n−1−i} = a_i − b_i / (2 cos(π(2i+1) / 2n))
//! ```

use std::mem::MaybeUninit;

use super::lane::{Simd, each};
use crate::Real;
use crate::simd::LANES;

/// Lengths the batched transform can do.
pub(crate) fn supports(len: usize) -> bool {
    len > 0 && len.is_multiple_of(8) && len <= MOST && matches!(odd(len), 1 | 3 | 5)
}

/// The longest transform.
const MOST: usize = 256;

/// What is left of a length after all halvings.
fn odd(len: usize) -> usize {
    len >> len.trailing_zeros()
}

/// Points of the leaves of a transform.
#[inline(always)]
fn leaf_points(len: usize) -> usize {
    match odd(len) {
        1 => len.min(32),
        3 => 24,
        _ => 20,
    }
}

/// Tables of one affine transform of a panel, see [`transform`] and [`transposed`].
#[derive(Debug, Clone)]
pub(crate) struct DctTables<T> {
    /// 1 / (2 cos(π(2i+1) / 2n)) for n = d, d/2, … as long as n is even: n/2 of each.
    twiddles: Vec<T>,
    /// Factor of every input row.
    pre: Vec<T>,
    /// Added to every input row after the factor.
    shift: Vec<T>,
    /// Factor of every output row, normalisation of the transform included.
    post: Vec<T>,
}

impl<T: Real> DctTables<T> {
    /// Tables of out = `post` ⊙ C(`pre` ⊙ x + `shift`), C orthonormal, d ≥ 1 elements each.
    pub(crate) fn new(pre: &[f64], shift: &[f64], post: &[f64]) -> Self {
        let d = pre.len();
        debug_assert!(shift.len() == d && post.len() == d && supports(d));
        let cast = |values: &[f64]| values.iter().map(|&x| T::from_f64(x)).collect();
        let levels =
            std::iter::successors(Some(d), |n| Some(n / 2)).take_while(|n| n.is_multiple_of(2));
        let angle = |n: usize, i: usize| std::f64::consts::PI * (2 * i + 1) as f64 / (2 * n) as f64;
        let twiddles = levels
            .flat_map(|n| (0..n / 2).map(move |i| T::from_f64(0.5 / angle(n, i).cos())))
            .collect();
        let norm = |f: usize| (if f == 0 { 1.0 } else { 2.0 } / d as f64).sqrt();
        Self {
            twiddles,
            pre: cast(pre),
            shift: cast(shift),
            post: post.iter().enumerate().map(|(f, &post)| T::from_f64(post * norm(f))).collect(),
        }
    }
}

/// X_{2f} = A_f, X_{2f+1} = B_f + B_{f+1} from A, B of n/2 points each, one after the other, in n
/// registers.
macro_rules! interleave {
    ($simd:expr, $n:expr, $from:expr, |$f:ident, $value:ident| $put:expr) => {{
        let (simd, half, from): (S, usize, *const S::V) = ($simd, $n / 2, $from);
        let mut odd = *from.add(half);
        for i in 0..half - 1 {
            let next = *from.add(half + i + 1);
            let ($f, $value) = (2 * i, *from.add(i));
            $put;
            let ($f, $value) = (2 * i + 1, simd.add(odd, next));
            $put;
            odd = next;
        }
        let ($f, $value) = (2 * half - 2, *from.add(half - 1));
        $put;
        let ($f, $value) = (2 * half - 1, odd);
        $put;
    }};
}

/// `out[f, j] = u[f, j] + row[f] + column[j]` with `u = post ⊙ C(pre ⊙ x + shift)`; and, unless it
/// is empty, `mirror[f, j] = −u[f, j] + mirror_row[f] + column[j]`.
#[inline(always)]
pub(super) fn transform<S: Simd>(
    simd: S,
    tables: &DctTables<S::T>,
    x: &[S::T],
    column: &[S::T],
    row: &[S::T],
    out: &mut [S::T],
    mirror_row: &[S::T],
    mirror: &mut [S::T],
) {
    let (d, width) = (tables.pre.len(), column.len());
    assert!(width.is_multiple_of(LANES) && x.len() >= d * width, "input panel");
    assert!(out.len() == d * width && row.len() == d, "output panel");
    assert!(
        mirror.is_empty() || (mirror.len() == d * width && mirror_row.len() == d),
        "mirror panel"
    );
    assert!(
        supports(d)
            && tables.twiddles.len() == d - odd(d)
            && tables.shift.len() == d
            && tables.post.len() == d,
        "tables"
    );
    let points = leaf_points(d);
    let twiddles = tables.twiddles.as_ptr();
    let input = Input { simd, x: x.as_ptr(), width, tables };
    let mut output = Output {
        simd,
        tables,
        width,
        row,
        out: out.as_mut_ptr(),
        mirror_row,
        mirror: mirror.as_mut_ptr(),
    };
    let mirrored = !mirror.is_empty();
    for j in (0..width).step_by(S::N) {
        let mut here: Buffer<S::V> = [MaybeUninit::uninit(); MOST];
        let mut there: Buffer<S::V> = [MaybeUninit::uninit(); MOST];
        let (here, there) = (here.as_mut_ptr().cast::<S::V>(), there.as_mut_ptr().cast::<S::V>());
        // SAFETY: the panels ([d, width], j + N ≤ width) and tables (d elements, twiddles of all
        // even levels) were checked above; the buffers hold d ≤ MOST registers, and every one is
        // written before it is read: each pass writes all d.
        unsafe {
            let (mut from, mut to) = (here, there);
            // Down: n points become two blocks of n/2, until a block fits into registers.
            let (mut n, mut level) = (d, twiddles);
            if d <= points {
                for i in 0..d {
                    from.add(i).write(input.at(i, j));
                }
            } else {
                for i in 0..d / 2 {
                    butterfly(
                        simd,
                        input.at(i, j),
                        input.at(d - 1 - i, j),
                        level.add(i),
                        from.add(i),
                        from.add(d / 2 + i),
                    );
                }
                (n, level) = (d / 2, level.add(d / 2));
            }
            while n > points {
                for block in (0..d).step_by(n) {
                    let (from, to) = (from.add(block), to.add(block));
                    for i in 0..n / 2 {
                        butterfly(
                            simd,
                            *from.add(i),
                            *from.add(n - 1 - i),
                            level.add(i),
                            to.add(i),
                            to.add(n / 2 + i),
                        );
                    }
                }
                (from, to) = (to, from);
                (n, level) = (n / 2, level.add(n / 2));
            }
            for block in (0..d).step_by(points) {
                leaf(simd, points, from.add(block), level);
            }
            // Up: two blocks of n/2 points become the even and odd ones of n.
            while n < d / 2 {
                n *= 2;
                for block in (0..d).step_by(n) {
                    let (from, to) = (from.add(block), to.add(block));
                    interleave!(simd, n, from, |f, value| to.add(f).write(value));
                }
                (from, to) = (to, from);
            }
            let column = simd.load(column.as_ptr().add(j));
            if d <= points {
                for f in 0..d {
                    output.put(f, j, *from.add(f), column, mirrored);
                }
            } else {
                interleave!(simd, d, from, |f, value| output.put(f, j, value, column, mirrored));
            }
        }
    }
}

/// A_f = X_{2f} and B_f = X_{2f−1} + X_{2f+1}, one after the other in n registers: [`interleave`]
/// transposed.
macro_rules! deinterleave {
    ($simd:expr, $n:expr, $to:expr, |$f:ident| $get:expr) => {{
        let (simd, half, to): (S, usize, *mut S::V) = ($simd, $n / 2, $to);
        let $f = 0;
        to.write($get);
        let $f = 1;
        let mut odd = $get;
        to.add(half).write(odd);
        for i in 1..half {
            let $f = 2 * i;
            to.add(i).write($get);
            let $f = 2 * i + 1;
            let next = $get;
            to.add(half + i).write(simd.add(odd, next));
            odd = next;
        }
    }};
}

/// `out = pre ⊙ Cᵀ(post ⊙ (x − minus))`, the transpose of the linear part of [`transform`]; without
/// `minus` if it is empty.
#[inline(always)]
pub(super) fn transposed<S: Simd>(
    simd: S,
    tables: &DctTables<S::T>,
    width: usize,
    x: &[S::T],
    minus: &[S::T],
    out: &mut [S::T],
) {
    let d = tables.pre.len();
    assert!(
        width.is_multiple_of(LANES) && x.len() == d * width && out.len() == d * width,
        "panels"
    );
    assert!(minus.is_empty() || minus.len() == d * width, "mirror panel");
    assert!(supports(d) && tables.twiddles.len() == d - odd(d) && tables.post.len() == d, "tables");
    let points = leaf_points(d);
    let input = Difference {
        simd,
        x: x.as_ptr(),
        minus: (!minus.is_empty()).then_some(minus.as_ptr()),
        width,
        tables,
    };
    for j in (0..width).step_by(S::N) {
        let mut here: Buffer<S::V> = [MaybeUninit::uninit(); MOST];
        let mut there: Buffer<S::V> = [MaybeUninit::uninit(); MOST];
        let (mut from, mut to) =
            (here.as_mut_ptr().cast::<S::V>(), there.as_mut_ptr().cast::<S::V>());
        // SAFETY: the panels ([d, width], j + N ≤ width) and tables (d elements, twiddles of n
        // points from d − n on) were checked above; the buffers hold d ≤ MOST registers, and every
        // one is written before it is read: each pass writes all d.
        unsafe {
            let twiddles = tables.twiddles.as_ptr();
            // Down: the even and odd ones of n points become two blocks of n/2.
            if d <= points {
                for f in 0..d {
                    from.add(f).write(input.at(f, j));
                }
            } else {
                deinterleave!(simd, d, from, |f| input.at(f, j));
                let mut n = d / 2;
                while n > points {
                    for block in (0..d).step_by(n) {
                        let (from, to) = (from.add(block), to.add(block));
                        deinterleave!(simd, n, to, |f| *from.add(f));
                    }
                    (from, to) = (to, from);
                    n /= 2;
                }
            }
            for block in (0..d).step_by(points) {
                leaf_transposed(simd, points, from.add(block), twiddles.add(d - points));
            }
            // Up: two blocks of n/2 become n points.
            let mut n = points;
            while n < d / 2 {
                n *= 2;
                for block in (0..d).step_by(n) {
                    let (from, to) = (from.add(block), to.add(block));
                    for i in 0..n / 2 {
                        let (a, b) = (
                            *from.add(i),
                            simd.mul(*from.add(n / 2 + i), simd.splat(*twiddles.add(d - n + i))),
                        );
                        to.add(i).write(simd.add(a, b));
                        to.add(n - 1 - i).write(simd.sub(a, b));
                    }
                }
                (from, to) = (to, from);
            }
            let out = out.as_mut_ptr().add(j);
            let pre = Factors::<S>(tables.pre.as_ptr());
            if d <= points {
                for i in 0..d {
                    simd.store(out.add(i * width), simd.mul(*from.add(i), pre.at(simd, i)));
                }
            } else {
                for i in 0..d / 2 {
                    let (a, b) = (
                        *from.add(i),
                        simd.mul(*from.add(d / 2 + i), simd.splat(*twiddles.add(i))),
                    );
                    simd.store(out.add(i * width), simd.mul(simd.add(a, b), pre.at(simd, i)));
                    simd.store(
                        out.add((d - 1 - i) * width),
                        simd.mul(simd.sub(a, b), pre.at(simd, d - 1 - i)),
                    );
                }
            }
        }
    }
}

// Structs and macros in place of closures, see `each`.

/// pre ⊙ x + shift
struct Input<'a, S: Simd> {
    simd: S,
    x: *const S::T,
    width: usize,
    tables: &'a DctTables<S::T>,
}

impl<S: Simd> Input<'_, S> {
    /// # Safety
    /// `i` is below d, and `x` valid for a register at `i·width + j`.
    #[inline(always)]
    unsafe fn at(&self, i: usize, j: usize) -> S::V {
        let Self { simd, x, width, tables } = *self;
        // SAFETY: the caller's promise.
        unsafe {
            let value = simd.load(x.add(i * width + j));
            simd.mul_add(
                value,
                simd.splat(*tables.pre.get_unchecked(i)),
                simd.splat(*tables.shift.get_unchecked(i)),
            )
        }
    }
}

/// post ⊙ (x − minus)
struct Difference<'a, S: Simd> {
    simd: S,
    x: *const S::T,
    minus: Option<*const S::T>,
    width: usize,
    tables: &'a DctTables<S::T>,
}

impl<S: Simd> Difference<'_, S> {
    /// # Safety
    /// `f` is below d, `x` and `minus` are valid for a register at `f·width + j`.
    #[inline(always)]
    unsafe fn at(&self, f: usize, j: usize) -> S::V {
        let Self { simd, x, minus, width, tables } = *self;
        // SAFETY: the caller's promise.
        unsafe {
            let mut value = simd.load(x.add(f * width + j));
            if let Some(minus) = minus {
                value = simd.sub(value, simd.load(minus.add(f * width + j)));
            }
            simd.mul(value, simd.splat(*tables.post.get_unchecked(f)))
        }
    }
}

/// Where the transform goes.
struct Output<'a, S: Simd> {
    simd: S,
    tables: &'a DctTables<S::T>,
    width: usize,
    row: &'a [S::T],
    out: *mut S::T,
    mirror_row: &'a [S::T],
    mirror: *mut S::T,
}

impl<S: Simd> Output<'_, S> {
    /// # Safety
    /// `f` is below d, `out` and, if `mirrored`, `mirror` are valid for a register at `f·width +
    /// j`.
    #[inline(always)]
    unsafe fn put(&mut self, f: usize, j: usize, value: S::V, column: S::V, mirrored: bool) {
        let simd = self.simd;
        // SAFETY: the caller's promise.
        unsafe {
            let u = simd.mul(value, simd.splat(*self.tables.post.get_unchecked(f)));
            let added = simd.add(simd.splat(*self.row.get_unchecked(f)), column);
            simd.store(self.out.add(f * self.width + j), simd.add(u, added));
            if mirrored {
                let added = simd.add(simd.splat(*self.mirror_row.get_unchecked(f)), column);
                simd.store(self.mirror.add(f * self.width + j), simd.sub(added, u));
            }
        }
    }
}

/// Registers of tokens that need no initial value.
type Buffer<V> = [MaybeUninit<V>; MOST];

/// a = x + y and b = (x − y)·twiddle.
///
/// # Safety
/// `twiddle` is readable, `a` and `b` are writable.
#[inline(always)]
unsafe fn butterfly<S: Simd>(
    simd: S,
    x: S::V,
    y: S::V,
    twiddle: *const S::T,
    a: *mut S::V,
    b: *mut S::V,
) {
    // SAFETY: the caller's promise.
    unsafe {
        a.write(simd.add(x, y));
        b.write(simd.mul(simd.sub(x, y), simd.splat(*twiddle)));
    }
}

macro_rules! leaf {
    ($(#[doc = $doc:literal])* $name:ident, $($points:literal => $transform:ident),*) => {
        $(#[doc = $doc])*
        ///
        /// # Safety
        /// `x` holds `points` registers, `twiddles` the levels `points`, `points`/2, …, the last
        /// even one.
        #[inline(always)]
        unsafe fn $name<S: Simd>(simd: S, points: usize, x: *mut S::V, twiddles: *const S::T) {
            // SAFETY: the caller's promise; the arrays hold what they say.
            unsafe {
                let twiddles = Factors::<S>(twiddles);
                match points {
                    $($points => {
                        let x = x.cast::<[S::V; $points]>();
                        x.write($transform(simd, x.read(), twiddles));
                    })*
                    _ => unreachable!("as `leaf_points` says"),
                }
            }
        }
    };
}

leaf! {
    /// The transform of a leaf, in place.
    leaf, 8 => points8, 16 => points16, 20 => points20, 24 => points24, 32 => points32
}
leaf! {
    /// Its transpose.
    leaf_transposed, 8 => transposed8, 16 => transposed16, 20 => transposed20,
    24 => transposed24, 32 => transposed32
}

/// Factors of rows; the twiddles of a level have those of the level below behind them, and so on.
/// Those that are asked for are there: the promise of who makes it.
#[derive(Clone, Copy)]
struct Factors<S: Simd>(*const S::T);

impl<S: Simd> Factors<S> {
    #[inline(always)]
    fn at(self, simd: S, i: usize) -> S::V {
        // SAFETY: as the type says.
        unsafe { simd.splat(*self.0.add(i)) }
    }

    #[inline(always)]
    fn behind(self, level: usize) -> Self {
        Self(self.0.wrapping_add(level))
    }
}

macro_rules! points {
    (
        $name:ident, $half_name:ident, $transposed:ident, $half_transposed:ident,
        $n:literal $all:tt, $half:literal $halves:tt
    ) => {
        #[inline(always)]
        fn $name<S: Simd>(simd: S, x: [S::V; $n], twiddles: Factors<S>) -> [S::V; $n] {
            let a = each!($halves, |i| simd.add(x[i], x[$n - 1 - i]));
            let b = each!($halves, |i| {
                simd.mul(simd.sub(x[i], x[$n - 1 - i]), twiddles.at(simd, i))
            });
            let a = $half_name(simd, a, twiddles.behind($half));
            let b = $half_name(simd, b, twiddles.behind($half));
            each!($all, |f| match f % 2 {
                0 => a[f / 2],
                _ if f == $n - 1 => b[$half - 1],
                _ => simd.add(b[f / 2], b[f / 2 + 1]),
            })
        }

        #[inline(always)]
        fn $transposed<S: Simd>(simd: S, x: [S::V; $n], twiddles: Factors<S>) -> [S::V; $n] {
            let a = each!($halves, |f| x[2 * f]);
            let b = each!($halves, |f| {
                if f == 0 { x[1] } else { simd.add(x[2 * f - 1], x[2 * f + 1]) }
            });
            let a = $half_transposed(simd, a, twiddles.behind($half));
            let b = $half_transposed(simd, b, twiddles.behind($half));
            let b = each!($halves, |i| simd.mul(b[i], twiddles.at(simd, i)));
            each!($all, |i| {
                if i < $half {
                    simd.add(a[i], b[i])
                } else {
                    simd.sub(a[$n - 1 - i], b[$n - 1 - i])
                }
            })
        }
    };
}

#[inline(always)]
fn points1<S: Simd>(_: S, x: [S::V; 1], _: Factors<S>) -> [S::V; 1] {
    x
}
points!(points2, points1, transposed2, points1, 2 [0 1], 1 [0]);
points!(points4, points2, transposed4, transposed2, 4 [0 1 2 3], 2 [0 1]);
points!(points8, points4, transposed8, transposed4, 8 [0 1 2 3 4 5 6 7], 4 [0 1 2 3]);
points!(
    points16, points8, transposed16, transposed8,
    16 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15],
    8 [0 1 2 3 4 5 6 7]
);
points!(
    points32, points16, transposed32, transposed16,
    32 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31],
    16 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]
);

points!(points6, points3, transposed6, transposed3, 6 [0 1 2 3 4 5], 3 [0 1 2]);
points!(
    points12, points6, transposed12, transposed6,
    12 [0 1 2 3 4 5 6 7 8 9 10 11],
    6 [0 1 2 3 4 5]
);
points!(
    points24, points12, transposed24, transposed12,
    24 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23],
    12 [0 1 2 3 4 5 6 7 8 9 10 11]
);

points!(points10, points5, transposed10, transposed5, 10 [0 1 2 3 4 5 6 7 8 9], 5 [0 1 2 3 4]);
points!(
    points20, points10, transposed20, transposed10,
    20 [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19],
    10 [0 1 2 3 4 5 6 7 8 9]
);

#[inline(always)]
fn points3<S: Simd>(simd: S, x: [S::V; 3], _: Factors<S>) -> [S::V; 3] {
    let sum = simd.add(x[0], x[2]);
    let (half, cos) = (simd.constant(0.5), simd.constant(COS_30));
    [simd.add(sum, x[1]), simd.mul(simd.sub(x[0], x[2]), cos), simd.sub(simd.mul(sum, half), x[1])]
}

#[inline(always)]
fn transposed3<S: Simd>(simd: S, x: [S::V; 3], _: Factors<S>) -> [S::V; 3] {
    let (half, cos) = (simd.constant(0.5), simd.constant(COS_30));
    let (even, odd) = (simd.mul_add(x[2], half, x[0]), simd.mul(x[1], cos));
    [simd.add(even, odd), simd.sub(x[0], x[2]), simd.sub(even, odd)]
}

#[inline(always)]
fn points5<S: Simd>(simd: S, x: [S::V; 5], _: Factors<S>) -> [S::V; 5] {
    let [c18, c36, c54, c72] = each!([0 1 2 3], |i| simd.constant(COS_18[i]));
    let (outer, inner) = (simd.add(x[0], x[4]), simd.add(x[1], x[3]));
    let (outer_odd, inner_odd) = (simd.sub(x[0], x[4]), simd.sub(x[1], x[3]));
    [
        simd.add(simd.add(outer, inner), x[2]),
        simd.mul_add(outer_odd, c18, simd.mul(inner_odd, c54)),
        simd.sub(simd.sub(simd.mul(outer, c36), simd.mul(inner, c72)), x[2]),
        simd.sub(simd.mul(outer_odd, c54), simd.mul(inner_odd, c18)),
        simd.add(simd.sub(simd.mul(outer, c72), simd.mul(inner, c36)), x[2]),
    ]
}

#[inline(always)]
fn transposed5<S: Simd>(simd: S, x: [S::V; 5], _: Factors<S>) -> [S::V; 5] {
    let [c18, c36, c54, c72] = each!([0 1 2 3], |i| simd.constant(COS_18[i]));
    let outer = simd.mul_add(x[4], c72, simd.mul_add(x[2], c36, x[0]));
    let inner = simd.sub(simd.sub(x[0], simd.mul(x[2], c72)), simd.mul(x[4], c36));
    let outer_odd = simd.mul_add(x[1], c18, simd.mul(x[3], c54));
    let inner_odd = simd.sub(simd.mul(x[1], c54), simd.mul(x[3], c18));
    [
        simd.add(outer, outer_odd),
        simd.add(inner, inner_odd),
        simd.add(simd.sub(x[0], x[2]), x[4]),
        simd.sub(inner, inner_odd),
        simd.sub(outer, outer_odd),
    ]
}

/// cos 30°
const COS_30: f64 = 0.866_025_403_784_438_6;
/// cos 18°, cos 36°, cos 54°, cos 72°
const COS_18: [f64; 4] = [
    0.951_056_516_295_153_5,
    0.809_016_994_374_947_4,
    0.587_785_252_292_473_1,
    0.309_016_994_374_947_4,
];
