//! Sequence-parallel layers.

use dijiang::Real;
use dijiang::attention::{KeyMask, Qkv};
use dijiang::layer::{Attention, DijiangAttention, DijiangState};
use ndarray::{Array2, Array3, ArrayRef2};

use crate::attention::valid;
use crate::error::Result;
use crate::fingerprint::Fingerprint;
use crate::ranks::{Opening, Ranks, attempt};

/// Weights that the fingerprint of a projection is made of, at most.
const SAMPLES: usize = 1024;

impl Ranks {
    /// [`prefill`](Attention::prefill) of a layer, of whose next tokens this rank holds a piece:
    /// what it gives for all pieces at once, up to rounding. Collective.
    ///
    /// States as for [`prefill`](Self::prefill) of its attention.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, any number of tokens, none too; `mask`: n keys; returns `[n, D]`.
    ///
    /// # Errors
    /// As [`prefill`](Self::prefill), and [`Error::Differ`](crate::Error::Differ) for ranks with
    /// other weights; of every projection 1024 are looked at.
    pub fn prefill_layer<T: Real>(
        &self,
        layer: &DijiangAttention<T>,
        state: &mut DijiangState<T>,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
    ) -> Result<Array2<T>> {
        let (attention, config) = (layer.operator(), layer.config());
        let place = self.open(attempt(|| {
            layer.resume(state.attention().clone())?;
            if x.ncols() != config.model_dim {
                let (expected, got) = (config.model_dim, x.ncols());
                return Err(dijiang::Error::Shape { argument: "x", axis: 1, expected, got });
            }
            let weights = layer.weights();
            let samples = [&weights.q, &weights.k, &weights.v, &weights.o].into_iter();
            let samples = samples.flat_map(|w| w.iter().step_by(w.len().div_ceil(SAMPLES)));
            let fingerprint = Fingerprint::new("layer", (self.scan(), config), attention)?
                .with_weights(samples.copied());
            let valid = valid(x.nrows(), mask);
            Ok(Opening { tokens: x.nrows(), valid, position: state.position(), fingerprint })
        }))?;
        let projected = attempt(|| match x.nrows() {
            0 => Ok([config.heads, config.kv_heads, config.kv_heads]
                .map(|heads| Array3::zeros((heads, 0, attention.value_dim())))),
            _ => layer.project_at(x, place.start),
        });
        let qkv = projected.as_ref().map(|[q, k, v]| Qkv::new(q, k, v).with_mask(mask));
        let qkv = qkv.map_err(String::clone);
        let (out, next) = self.attend(attention, state.attention(), place, qkv)?;
        let result = attempt(|| {
            let y = match x.nrows() {
                0 => Array2::zeros((0, config.model_dim)),
                _ => layer.output(&out)?,
            };
            Ok((y, layer.resume(next)?))
        });
        let (y, next) = self.agree(result)?;
        *state = next;
        Ok(y)
    }
}
