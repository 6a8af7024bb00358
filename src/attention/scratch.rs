//! What one thread works in.

use std::ops::Range;

use ndarray::ArrayViewMut2;

use crate::Real;
use crate::attention::Window;
use crate::attention::linear::state::{HeadShape, HeadState, PENDING, Ring, Sums};
use crate::attention::rows::{OutOfRange, normalise};
use crate::check::check_same;
use crate::error::Result;
use crate::low::aligned::Aligned;
use crate::low::simd::{Ahead, LANES, padded};

/// Tokens worked on at a time: a block's panels stay in the L2 cache, and 64 rows fill the matrix
/// products.
pub(crate) const BLOCK: usize = 64;

/// Tokens of a block of purely causal attention, forward and back: the products within a block grow
/// with its length, and at 32 they are two fifths of those with the state.
pub(crate) const CAUSAL_BLOCK: usize = 32;

/// Tokens of a segment, counted from the first of a prefill: no block of work goes beyond one.
pub(crate) const SEGMENT: usize = 512;

/// Sizes that scratch memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sizes {
    /// Head dimension d.
    pub(crate) dim: usize,
    /// Features m; 0 for softmax attention.
    pub(crate) features: usize,
    /// Value dimension e.
    pub(crate) value_dim: usize,
    /// As large as the largest local window of linear attention.
    pub(crate) window: Option<Window>,
    pub(crate) sinks: usize,
    /// Scratch of the largest map.
    pub(crate) map: usize,
}

impl Sizes {
    /// Whether a workspace made for sizes `got` serves an operator of these.
    pub(crate) fn check_workspace(self, got: Self) -> Result<()> {
        let window = |sizes: Self| sizes.window.unwrap_or(Window::new(0, 0));
        let pairs = [
            ("head dimension", self.dim, got.dim),
            ("number of features", self.features, got.features),
            ("value dimension", self.value_dim, got.value_dim),
            ("window chunk", window(self).chunk, window(got).chunk),
            ("window back", window(self).back, window(got).back),
            ("window kept", window(self).kept, window(got).kept),
            ("number of sinks", self.sinks, got.sinks),
            ("map scratch", self.map, got.map),
        ];
        check_same("workspace", pairs)
    }
}

/// One thread's scratch, and the states that outlive no call.
#[derive(Debug, Clone)]
pub(crate) struct Worker<T> {
    sizes: Sizes,
    pub(crate) scratch: Scratch<T>,
    whole: Option<Whole<T>>,
}

/// What a worker needs beyond steps.
#[derive(Debug, Clone)]
pub(crate) struct Whole<T> {
    /// Of a sequence that is computed whole.
    pub(crate) state: HeadState<T>,
    /// Sums that join others.
    pub(crate) part: Sums<T>,
}

impl<T: Real> Worker<T> {
    /// For steps; what else it needs it makes when it needs it.
    pub(crate) fn for_steps(sizes: Sizes) -> Self {
        Self { sizes, scratch: Scratch::new(sizes), whole: None }
    }

    pub(crate) fn new(sizes: Sizes) -> Self {
        let mut worker = Self::for_steps(sizes);
        worker.all();
        worker
    }

    /// Everything it has.
    pub(crate) fn all(&mut self) -> (&mut Scratch<T>, &mut Whole<T>) {
        let Sizes { dim, features, value_dim, window, sinks, .. } = self.sizes;
        let whole = self.whole.get_or_insert_with(|| Whole {
            state: HeadState::new(HeadShape { dim, features, value_dim, window, sinks }),
            part: Sums::new(features, value_dim, PENDING),
        });
        (&mut self.scratch, whole)
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        let whole = self.whole.as_ref().map_or(0, |whole| whole.state.len() + whole.part.len());
        self.scratch.len() + whole
    }
}

/// Panels and rows of a block. Panels are `[rows, width]` with `width` ≤ BLOCK.
#[derive(Debug, Clone)]
pub(crate) struct Scratch<T> {
    /// Scaled queries `[d, width]`.
    pub(crate) x: Aligned<T>,
    /// Scaled keys `[d, width]`.
    pub(crate) y: Aligned<T>,
    /// Values `[width, e_padded]`.
    pub(crate) v: Aligned<T>,
    /// Scores `[width, scores]`.
    pub(crate) p: Aligned<T>,
    /// Weighted sums of values `[width, e_padded]`.
    pub(crate) o: Aligned<T>,
    /// One number per token: normalisers.
    pub(crate) total: Aligned<T>,
    /// A row of d zeros, standing in for absent tokens.
    pub(crate) zeros: Aligned<T>,
    pub(crate) features: FeatureScratch<T>,
}

/// What log-features and their weights are computed in.
#[derive(Debug, Clone)]
pub(crate) struct FeatureScratch<T> {
    /// Query features `[m, width]`.
    pub(crate) a: Aligned<T>,
    /// Key features `[m, width]`.
    pub(crate) b: Aligned<T>,
    /// One number per feature.
    pub(crate) feature: Aligned<T>,
    /// One number per token: exponents of keys, or shifts of queries.
    pub(crate) column: Aligned<T>,
    /// One number per token: largest exponents.
    pub(crate) top: Aligned<T>,
    /// The feature map's own.
    pub(crate) map: Aligned<T>,
    /// What will be read next.
    pub(crate) ahead: Ahead<T>,
}

impl<T: Real> Scratch<T> {
    pub(crate) fn new(sizes: Sizes) -> Self {
        let Sizes { dim, features, value_dim, window, sinks, map } = sizes;
        let zeros = |len| Aligned::filled(len, T::ZERO);
        let scores = window.map_or(BLOCK, |window| Ring::<T>::scores(window).max(BLOCK));
        let scores = scores + padded(sinks);
        Self {
            x: zeros(dim * BLOCK),
            y: zeros(dim * BLOCK),
            v: zeros(BLOCK * padded(value_dim)),
            p: zeros(BLOCK * scores),
            o: zeros(BLOCK * padded(value_dim)),
            total: zeros(BLOCK),
            zeros: zeros(dim.max(LANES)),
            features: FeatureScratch {
                // A token's features are padded to whole lane groups.
                a: zeros(features * BLOCK + LANES),
                b: zeros(features * BLOCK + LANES),
                feature: zeros(features),
                column: zeros(BLOCK),
                top: zeros(BLOCK),
                map: zeros(map),
                ahead: Ahead::of([]),
            },
        }
    }

    /// Outputs of a block's queries, rows of `out`: the sums of `stride` each in `o` by the
    /// normalisers in `total`.
    pub(crate) fn put_outputs(
        &self,
        stride: usize,
        queries: Range<usize>,
        mut out: ArrayViewMut2<'_, T>,
    ) -> Result<(), OutOfRange> {
        queries.enumerate().try_for_each(|(i, query)| {
            normalise(&self.o[i * stride..], self.total[i], out.row_mut(query))
        })
    }

    /// Elements held.
    pub(crate) fn len(&self) -> usize {
        let Self { x, y, v, p, o, total, zeros, features } = self;
        let FeatureScratch { a, b, feature, column, top, map, .. } = features;
        [x, y, v, p, o, total, zeros, a, b, feature, column, top, map]
            .into_iter()
            .map(|buffer| buffer.len())
            .sum()
    }
}
