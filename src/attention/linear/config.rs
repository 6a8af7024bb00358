//! [`LinearConfig`]: how linear attention is to be built.

use std::marker::PhantomData;

use crate::Real;
use crate::attention::check::{
    MAX_STATE, check_exact_part, check_scale, check_size, check_state_size, each_head,
};
use crate::attention::linear::LinearAttention;
use crate::attention::linear::state::Shape;
use crate::attention::scratch::{BLOCK, Sizes};
use crate::attention::{Causality, Window};
use crate::check::{check_finite, check_len, check_positive};
use crate::error::{Error, Result};
use crate::kernel::{FeatureMap, hash, word};

/// How [`LinearAttention`] is to be built.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(default, deny_unknown_fields)
)]
#[non_exhaustive]
pub struct LinearConfig {
    /// Query heads h. Default: one per map. A multiple of the number of maps (grouped queries: one
    /// map, one state and one key-value head serve h / maps consecutive query heads).
    pub heads: Option<usize>,
    /// Value dimension e. Default: the maps' dimension d.
    pub value_dim: Option<usize>,
    /// Softmax scale σ, at most 10⁶/d. Default: 1/√d.
    pub scale: Option<f64>,
    /// Which keys a query sees. Default: [`Causality::Causal`].
    pub causality: Causality,
    /// Local windows of causal attention: none, one for all key-value heads, or one for each.
    /// Default: none.
    pub windows: Vec<Window>,
    /// Sinks s: the first s unmasked tokens of a sequence stay exact for every later query. At most
    /// 64, no more than a chunk, and only beside a local window. Default: 0.
    pub sinks: usize,
    /// log γ ≤ 0 per token (and at least −[`Real::LIMIT`]), one per map, causal attention only.
    /// Default: empty, which stands for zeros (γ = 1).
    pub log_decay: Vec<f64>,
}

impl LinearConfig {
    /// All defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Query heads h, a multiple of the number of maps.
    #[must_use]
    pub fn with_heads(self, heads: usize) -> Self {
        Self { heads: Some(heads), ..self }
    }

    /// Value dimension e.
    #[must_use]
    pub fn with_value_dim(self, value_dim: usize) -> Self {
        Self { value_dim: Some(value_dim), ..self }
    }

    /// Softmax scale σ.
    #[must_use]
    pub fn with_scale(self, scale: f64) -> Self {
        Self { scale: Some(scale), ..self }
    }

    /// Which keys a query sees.
    #[must_use]
    pub fn with_causality(self, causality: Causality) -> Self {
        Self { causality, ..self }
    }

    /// One local window for all heads.
    #[must_use]
    pub fn with_window(self, window: Window) -> Self {
        self.with_windows(vec![window])
    }

    /// A local window for each key-value head.
    #[must_use]
    pub fn with_windows(self, windows: Vec<Window>) -> Self {
        Self { windows, ..self }
    }

    /// Sinks s.
    #[must_use]
    pub fn with_sinks(self, sinks: usize) -> Self {
        Self { sinks, ..self }
    }

    /// log γ per map.
    #[must_use]
    pub fn with_log_decay(self, log_decay: Vec<f64>) -> Self {
        Self { log_decay, ..self }
    }

    /// Checks everything: one map per key-value head.
    ///
    /// # Cost
    /// A pass over the maps. Keeps them; states and workspaces are made when they are asked for.
    ///
    /// # Errors
    /// [`Error::Empty`] without maps, [`Error::Shape`] for maps of different d or m,
    /// [`Error::NotDivisible`] for heads that are no multiple of the maps, [`Error::Value`] and
    /// [`Error::Length`] for the numbers, [`Error::Conflict`] for a window or decay of
    /// bidirectional attention, [`Error::TooLarge`] for dimensions and local windows beyond 2²⁰,
    /// and a state or scratch memory of a map of more than 2³⁰ elements.
    pub fn build<T: Real, M: FeatureMap<T>>(self, maps: Vec<M>) -> Result<LinearAttention<T, M>> {
        let Some(first) = maps.first() else { return Err(Error::Empty { argument: "maps" }) };
        let (dim, features, kv_heads) = (first.dim(), first.features(), maps.len());
        check_size("map dimension", dim)?;
        check_positive("map features", features)?;
        for map in &maps {
            for (axis, expected, got) in [(0, features, map.features()), (1, dim, map.dim())] {
                if got != expected {
                    return Err(Error::Shape { argument: "maps", axis, expected, got });
                }
            }
        }
        let heads = self.heads.unwrap_or(kv_heads);
        check_positive("heads", heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(Error::NotDivisible {
                argument: "heads",
                divisor: "the number of maps",
                divisor_value: kv_heads,
                got: heads,
            });
        }
        let value_dim = self.value_dim.unwrap_or(dim);
        check_size("value_dim", value_dim)?;
        let scale = self.scale.unwrap_or(1.0 / (dim as f64).sqrt());
        check_scale(scale, dim)?;
        let windows = each_head("windows", self.windows, kv_heads)?;
        check_exact_part(&windows, self.sinks)?;
        let largest = largest(&windows);
        check_state_size(kv_heads, dim, features, value_dim, largest)?;
        let log_decay =
            if self.log_decay.is_empty() { vec![0.0; kv_heads] } else { self.log_decay };
        check_len("log_decay", kv_heads, log_decay.len())?;
        for &decay in &log_decay {
            check_finite("log_decay", decay)?;
            if decay > 0.0 {
                return Err(Error::Value {
                    argument: "log_decay",
                    expected: "at most 0",
                    got: decay,
                });
            }
            if decay < -T::LIMIT {
                return Err(Error::Value {
                    argument: "log_decay",
                    expected: "at least -Real::LIMIT",
                    got: decay,
                });
            }
        }
        let scratch = maps.iter().map(|map| map.scratch_len(BLOCK).max(map.token_scratch_len()));
        let scratch = scratch.max().unwrap_or(0);
        if scratch > MAX_STATE {
            let argument = "scratch elements of a map";
            return Err(Error::TooLarge { argument, limit: MAX_STATE, got: scratch });
        }
        let of_heads = maps.iter().zip(&log_decay);
        let of_heads = of_heads.flat_map(|(map, &decay)| [map.fingerprint(), word(decay)]);
        let fingerprint = hash(of_heads.chain([word(scale)])).max(1);
        let sizes =
            Sizes { dim, features, value_dim, window: largest, sinks: self.sinks, map: scratch };
        let attention = LinearAttention {
            maps,
            heads,
            causality: Causality::Causal,
            scale,
            log_decay,
            sizes,
            shape: Shape {
                heads: kv_heads,
                dim,
                features,
                value_dim,
                windows: windows.into(),
                sinks: self.sinks,
                fingerprint,
            },
            element: PhantomData,
        };
        attention.with_causality(self.causality)
    }
}

/// The window that every ring of these windows fits in.
pub(crate) fn largest(windows: &[Window]) -> Option<Window> {
    let largest = |a: Window, b: &Window| {
        Window::new(a.chunk.max(b.chunk), a.back.max(b.back)).with_kept(a.kept.max(b.kept))
    };
    windows.split_first().map(|(first, rest)| rest.iter().fold(*first, largest))
}
