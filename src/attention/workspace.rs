//! Scratch memory of the attention loops.

use crate::attention::pages::Pages;
use crate::attention::state::{HeadState, Shape};
use crate::error::{Error, Result};
use crate::real::Real;
use crate::simd::{LANES, padded};
use crate::threads::max_threads;

/// Tokens worked on at a time: a block's panels stay in the L2 cache, and 64 rows fill the matrix
/// products.
pub(super) const BLOCK: usize = 64;

/// Tokens of a block of purely causal attention, forward and back: the products within a block grow
/// with its length, and at 32 they are two fifths of those with the state.
pub(super) const CAUSAL_BLOCK: usize = 32;

/// Sizes that scratch memory depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    /// Head dimension d.
    pub(super) dim: usize,
    /// Features m; 0 for exact attention.
    pub(super) features: usize,
    /// Value dimension e.
    pub(super) value_dim: usize,
    /// Columns of the widest row of scores.
    pub(super) scores: usize,
    /// Scratch of the largest map.
    pub(super) map: usize,
}

impl Sizes {
    /// Whether a workspace made for sizes `got` serves an operator of these.
    pub(super) fn check_workspace(self, got: Self) -> Result<()> {
        let pairs = [
            ("head dimension", self.dim, got.dim),
            ("number of features", self.features, got.features),
            ("value dimension", self.value_dim, got.value_dim),
            ("local window", self.scores, got.scores),
            ("map scratch", self.map, got.map),
        ];
        match pairs.into_iter().find(|(_, expected, got)| expected != got) {
            Some((what, expected, got)) => {
                Err(Error::Foreign { argument: "workspace", what, expected, got })
            }
            None => Ok(()),
        }
    }
}

/// Scratch memory for the methods of one attention operator.
///
/// Its size depends on the operator and the number of threads, never on the number of tokens. Its
/// contents mean nothing before or after a call. Make it once by the operator's `workspace` and use
/// it for every call; another operator of the same shape may share it.
#[derive(Debug, Clone)]
pub struct Workspace<T> {
    sizes: Sizes,
    pub(super) scratches: Vec<Scratch<T>>,
    /// Where a long prefill keeps the state it started from, until all its arguments are known to
    /// be good.
    pub(super) snapshot: Vec<HeadState<T>>,
    /// One for each head, once heads were too few for the threads.
    pub(super) pages: Vec<Pages<T>>,
    /// Sums over parts of the keys, once heads of full attention were too few for the threads.
    pub(super) parts: Vec<HeadState<T>>,
}

/// What one thread works in. Panels are `[rows, width]` with `width` ≤ BLOCK.
#[derive(Debug, Clone)]
pub(super) struct Scratch<T> {
    /// Scaled queries `[d, width]`.
    pub(super) x: Vec<T>,
    /// Scaled keys `[d, width]`.
    pub(super) y: Vec<T>,
    /// Query features `[m, width]`.
    pub(super) a: Vec<T>,
    /// Key features `[m, width]`.
    pub(super) b: Vec<T>,
    /// Values `[width, e_padded]`.
    pub(super) v: Vec<T>,
    /// Scores `[width, scores]`.
    pub(super) p: Vec<T>,
    /// Weighted sums of values `[width, e_padded]`.
    pub(super) o: Vec<T>,
    /// The sums of full attention, which outlive no call.
    pub(super) sums: HeadState<T>,
    /// Those over a part of its keys.
    pub(super) part: HeadState<T>,
    /// One number per feature.
    pub(super) feature: Vec<T>,
    /// One number per token: exponents of keys, or shifts of queries.
    pub(super) column: Vec<T>,
    /// One number per token: largest exponents.
    pub(super) top: Vec<T>,
    /// One number per token: normalisers.
    pub(super) total: Vec<T>,
    /// A row of d zeros, standing in for absent tokens.
    pub(super) zeros: Vec<T>,
    /// The feature map's own.
    pub(super) map: Vec<T>,
}

impl<T: Real> Workspace<T> {
    pub(super) fn new(sizes: Sizes, snapshot: Vec<HeadState<T>>) -> Self {
        Self {
            sizes,
            scratches: vec![Scratch::new(sizes); max_threads()],
            snapshot,
            pages: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// For one thread.
    pub(super) fn for_steps(sizes: Sizes) -> Self {
        Self {
            sizes,
            scratches: vec![Scratch::new(sizes)],
            snapshot: Vec::new(),
            pages: Vec::new(),
            parts: Vec::new(),
        }
    }

    /// Keeps `states` in the snapshot.
    pub(super) fn keep(&mut self, states: &[HeadState<T>]) {
        if self.snapshot.len() != states.len() {
            self.snapshot = states.to_vec();
        }
        self.snapshot.iter_mut().zip(states).for_each(|(kept, state)| kept.copy(state));
    }

    /// Makes room for every head to be worked on by several threads.
    pub(super) fn share_heads(&mut self, shape: Shape) {
        if self.pages.len() != shape.heads {
            self.pages = vec![Pages::new(self.sizes, shape); shape.heads];
        }
    }

    /// Makes room for the sums of as many parts of full attention's keys.
    pub(super) fn share_keys(&mut self, parts: usize) {
        if self.parts.len() != parts {
            self.parts = vec![self.scratches[0].part.clone(); parts];
        }
    }

    /// The one scratch of work that stays on the calling thread.
    pub(super) fn first(&mut self) -> &mut Scratch<T> {
        &mut self.scratches[0]
    }

    /// Whether this workspace was made for these sizes.
    pub(super) fn check(&self, sizes: Sizes) -> Result<()> {
        sizes.check_workspace(self.sizes)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        let snapshot = self.snapshot.iter().chain(&self.parts).map(HeadState::len);
        let pages = self.pages.iter().map(Pages::len);
        self.scratches.iter().map(Scratch::len).chain(snapshot).chain(pages).sum::<usize>()
            * size_of::<T>()
    }
}

impl<T: Real> Scratch<T> {
    pub(super) fn new(sizes: Sizes) -> Self {
        let Sizes { dim, features, value_dim, scores, map } = sizes;
        let zeros = |len| vec![T::zero(); len];
        let sums = HeadState::new(Shape { heads: 1, dim, features, value_dim, window: None });
        Self {
            x: zeros(dim * BLOCK),
            y: zeros(dim * BLOCK),
            // A token's features are padded to whole lane groups.
            a: zeros(features * BLOCK + LANES),
            b: zeros(features * BLOCK + LANES),
            v: zeros(BLOCK * padded(value_dim)),
            p: zeros(BLOCK * scores),
            o: zeros(BLOCK * padded(value_dim)),
            sums: sums.clone(),
            part: sums,
            feature: zeros(features),
            column: zeros(BLOCK),
            top: zeros(BLOCK),
            total: zeros(BLOCK),
            zeros: zeros(dim.max(LANES)),
            map: zeros(map),
        }
    }

    pub(super) fn len(&self) -> usize {
        [
            &self.x,
            &self.y,
            &self.a,
            &self.b,
            &self.v,
            &self.p,
            &self.o,
            &self.feature,
            &self.column,
            &self.top,
            &self.total,
        ]
        .into_iter()
        .chain([&self.zeros, &self.map])
        .map(Vec::len)
        .sum::<usize>()
            + self.sums.len()
            + self.part.len()
    }
}
