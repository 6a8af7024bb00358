//! Vector loops chosen at run time, and the general matrix product.
//!
//! [`body`] holds every loop once, written against the trait of [`lane`]; [`x86`] implements that
//! trait for AVX2 and AVX-512; this file compiles the loops for each of them, puts them into tables
//! and hands out the fastest table that the CPU can run.

#![allow(clippy::too_many_arguments, reason = "operands of kernels, each in a register")]
#![allow(clippy::needless_range_loop, reason = "tiles of registers are indexed by constants")]

mod ahead;
mod body;
mod dct;
mod lane;
mod product;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::marker::PhantomData;

pub(crate) use ahead::Ahead;
pub(crate) use dct::{DctTables, supports as supports_dct};
pub(crate) use product::{Gemm, product};

use crate::Real;
use crate::low::mat::{Accum, MatMut, MatRef};
use lane::{Portable, Simd};

/// Panels (`[rows, tokens]`) have a width that is a multiple of this, on every CPU and for both
/// types.
pub(crate) const LANES: usize = 16;

/// `n` rounded up to whole lane groups.
pub(crate) fn padded(n: usize) -> usize {
    n.next_multiple_of(LANES)
}

/// The transpose of a panel `[rows, width]`, times `scale`; `rows` and `width` are multiples of
/// LANES.
pub(crate) fn transpose<T: Real>(ops: &Ops<T>, width: usize, panel: &[T], scale: T, out: &mut [T]) {
    let rows = panel.len() / width;
    for group in (0..rows).step_by(LANES) {
        let lanes: [&[T]; LANES] =
            std::array::from_fn(|lane| &panel[(group + lane) * width..][..width]);
        (ops.gather)(&lanes, scale, &mut out[group..], rows);
    }
}

macro_rules! ops {
    ($($(#[doc = $doc:literal])* $name:ident: fn($($arg:ident: $ty:ty),*) $(-> $ret:ty)?;)*) => {
        /// One implementation of every vector loop; see the functions of the same names in
        /// [`body`].
        #[allow(unreachable_pub)]
        pub struct Ops<T: 'static> {
            /// Which instruction set this table was compiled for.
            pub(crate) name: &'static str,
            $($(#[doc = $doc])* pub(crate) $name: fn($($ty),*) $(-> $ret)?,)*
        }

        /// The portable table.
        const fn portable<T>() -> Ops<T>
        where
            T: Real,
            Portable<T>: Simd<T = T>,
        {
            Ops {
                name: "portable",
                $($name: |$($arg),*| body::$name(Portable::<T>(PhantomData), $($arg),*),)*
            }
        }

        /// A table of the loops compiled under CPU features.
        #[cfg(target_arch = "x86_64")]
        macro_rules! table {
            ($label:literal, $features:literal, $token:path, $t:ty) => {{
                type T = $t;
                Ops::<T> {
                    name: $label,
                    $($name: |$($arg),*| {
                        #[target_feature(enable = $features)]
                        fn run($($arg: $ty),*) $(-> $ret)? {
                            body::$name($token(()), $($arg),*)
                        }
                        // SAFETY: `all` hands this table out only where the CPU has these features.
                        unsafe { run($($arg),*) }
                    },)*
                }
            }};
        }
    };
}

ops! {
    /// C (+)= A·B on operands that stay in the cache, while others come into it.
    matmul_ahead: fn(
        c: MatMut<'_, T>,
        accum: Accum,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
        ahead: Option<&mut Ahead<T>>
    );
    /// u = post ⊙ C(pre ⊙ x + shift), the batched DCT-II; out = u + row + column, mirror = −u +
    /// mirror_row + column.
    dct: fn(
        tables: &DctTables<T>,
        x: &[T],
        column: &[T],
        row: &[T],
        out: &mut [T],
        mirror_row: &[T],
        mirror: &mut [T]
    );
    /// out = pre ⊙ Cᵀ(post ⊙ (x − minus)), the transpose of its linear part.
    dct_transposed: fn(tables: &DctTables<T>, width: usize, x: &[T], minus: &[T], out: &mut [T]);
    /// The DCT-II of one vector by the halves of its matrix: out = post ⊙ C(pre ⊙ x) + row +
    /// offset, mirrored as in `dct`.
    dct_token: fn(
        halves: &[T],
        x: &[T],
        pre: &[T],
        post: &[T],
        offset: T,
        row: &[T],
        out: &mut [T],
        mirror_row: &[T],
        mirror: &mut [T],
        scratch: &mut [T]
    );
    /// Every element is a number of at most this magnitude.
    all_within: fn(x: &[T], limit: T) -> bool;
    /// LANES rows become LANES columns of a panel; returns the sum of squares.
    gather: fn(rows: &[&[T]; LANES], scale: T, panel: &mut [T], width: usize) -> T;
    /// `to = from`; returns the sum of squares.
    copy: fn(from: &[T], to: &mut [T]) -> T;
    /// `out[j] = max_f (panel[f, j] + offset[f])`
    column_max: fn(panel: &[T], offset: &[T], out: &mut [T]);
    /// `out[f] = max_j (panel[f, j] + column[j])`
    row_max: fn(panel: &[T], column: &[T], out: &mut [T]);
    /// `panel[f, j] = exp(panel[f, j] + offset[f] + column[j])`, `dot[j] = Σ_f panel[f,
    /// j]·weight[f]`
    exp_dot: fn(panel: &mut [T], offset: &[T], column: &[T], weight: &[T], dot: &mut [T]);
    /// `panel[f, j] = exp(panel[f, j] + offset[f] + column[j])`
    exp_panel: fn(panel: &mut [T], offset: &[T], column: &[T]);
    /// `panel[f, j] = exp(panel[f, j] − reference[f] + column[j])`, `sums[f] = Σ_j panel[f, j]`
    weigh: fn(panel: &mut [T], reference: &[T], column: &[T], sums: &mut [T]);
    /// `sums[j] += Σ_f a[f, j]·b[f, j]`
    column_dot: fn(a: &[T], b: &[T], sums: &mut [T]);
    /// `panel[f, j] = weight[f, j]·scale[j]·(panel[f, j] − row[f]·column[j])`, `sums[j] = Σ_f
    /// panel[f, j]`
    log_weight_vjp: fn(
        panel: &mut [T],
        weight: &[T],
        scale: &[T],
        row: &[T],
        column: &[T],
        sums: &mut [T]
    );
    /// `sums[f] += Σ_j panel[f, j]`
    add_row_sums: fn(panel: &[T], sums: &mut [T]);
    /// `sums[f] += Σ_j a[f, j]`, `products[f] += Σ_j a[f, j]·(b[f, j] − offset[f])`, in LANES
    /// partial sums each.
    lane_sums: fn(a: &[T], b: &[T], offset: &[T], sums: &mut [T], products: &mut [T]);
    /// z = x − center: `sums[i] += Σ_j z[i, j]·total[j]` in LANES partial sums,
    /// `grad[i, j] += scale[i]·y[i, j] + (tilt[i] − envelope·z[i, j])·total[j]`.
    input_vjp: fn(
        x: &[T],
        center: &[T],
        y: &[T],
        scale: &[T],
        total: &[T],
        tilt: &[T],
        envelope: T,
        grad: &mut [T],
        sums: &mut [T]
    );
    /// Zeroes above the diagonal, adds row sums.
    mask_triangle: fn(p: &mut [T], width: usize, diagonal: usize, sums: &mut [T]);
    /// `p[i, j] −= minus[i]` for j ≤ i, zero elsewhere.
    lower_less: fn(p: &mut [T], width: usize, minus: &[T]);
    /// `p[i, j] −= minus[j]` for j ≥ i, zero elsewhere.
    upper_less: fn(p: &mut [T], minus: &[T]);
    /// Largest element.
    slice_max: fn(row: &[T]) -> T;
    /// `row[j] = exp(row[j] + shift)`, returns their sum.
    exp_sum: fn(row: &mut [T], shift: T) -> T;
    /// `x[f] += factor·y[f] + shift`, −∞ where there is no y; returns the largest.
    offset_max: fn(x: &mut [T], factor: T, y: &[T], shift: T) -> T;
    /// `x[f] = exp(x[f] + shift)`, returns Σ_f x[f]·weight[f].
    exp_weighted: fn(x: &mut [T], shift: T, weight: &[T]) -> T;
    /// `out = factor·(a − b)`
    difference: fn(a: &[T], b: &[T], factor: T, out: &mut [T]);
    /// With u = a − factor·base and w = b − factor·base: Σ u·w, Σ w², Σ (a − b)².
    shares: fn(a: &[T], b: &[T], factor: T, base: &[T]) -> [T; 3];
    /// `sums + rest` rounded into `sums`, what rounding lost into `rest`.
    fold: fn(sums: &mut [T], rest: &mut [T]);
    /// `out = xᵀ·A (+ out)`
    vecmat: fn(x: &[T], a: &[T], accumulate: bool, out: &mut [T]);
    /// `x *= a`
    scale: fn(a: T, x: &mut [T]);
    /// `out[t] += A·x[t]` for every token t, rows of A `[rows, k]` contiguous.
    matvec: fn(a: &[T], k: usize, x: &[T], out: &mut [T]);
}

impl<T> Ops<T> {
    /// C (+)= A·B on operands that stay in the cache.
    pub(crate) fn matmul(
        &self,
        c: MatMut<'_, T>,
        accum: Accum,
        a: MatRef<'_, T>,
        b: MatRef<'_, T>,
    ) {
        (self.matmul_ahead)(c, accum, a, b, None);
    }
}

macro_rules! tables {
    ($select:ident, $all:ident, $t:ident, $avx512:path, $avx2:path) => {
        static PORTABLE: Ops<$t> = portable();
        #[cfg(target_arch = "x86_64")]
        static AVX2: Ops<$t> = table!("avx2", "avx2,fma", $avx2, $t);
        #[cfg(target_arch = "x86_64")]
        static AVX512: Ops<$t> = table!("avx512", "avx512f,avx2,fma", $avx512, $t);

        /// Every table this CPU can run, the fastest first.
        pub(crate) fn $all() -> impl Iterator<Item = &'static Ops<$t>> {
            #[cfg(target_arch = "x86_64")]
            let fast = {
                let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
                let avx512 = avx2 && is_x86_feature_detected!("avx512f");
                [avx512.then_some(&AVX512), avx2.then_some(&AVX2)].into_iter().flatten()
            };
            #[cfg(not(target_arch = "x86_64"))]
            let fast = std::iter::empty();
            fast.chain(std::iter::once(&PORTABLE))
        }

        /// The fastest table this CPU can run.
        pub(crate) fn $select() -> &'static Ops<$t> {
            $all().next().unwrap_or(&PORTABLE)
        }
    };
}

mod single {
    use super::*;
    tables!(select, all, f32, x86::Avx512F32, x86::Avx2F32);
}

mod double {
    use super::*;
    tables!(select, all, f64, x86::Avx512F64, x86::Avx2F64);
}

pub(crate) use double::select as ops_f64;
pub(crate) use single::select as ops_f32;
