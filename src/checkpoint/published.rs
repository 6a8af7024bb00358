//! The layer of the code published with the paper, from the files that code saves.

use super::families::by_heads;
use super::{Tensors, fault};
use crate::Real;
use crate::error::Result;
use crate::kernel::published_radii;
use crate::layer::{AttentionConfig, PublishedAttention, PublishedWeights};

impl<T: Real> PublishedAttention<T> {
    /// The layer whose tensors have names beginning with `place` (`gpt_neox.layers.0.attention.`):
    /// `query_key_value.*`, `dense.*`, `group_norm.*`, `W_G`, `proj_matrix` and `D1`, as the code
    /// published with the paper saves them in its GPT-NeoX form.
    ///
    /// Radii and decays come from `proj_matrix` and `D1`, which that code keeps in f32: outputs
    /// agree with it to about 10⁻⁶.
    ///
    /// # Shapes
    /// - `query_key_value.weight`: `[3·D, D]`, query, key and value of each head together;
    ///   `dense.weight`, `W_G`: `[D, D]`; biases `[3·D]`, `[D]`; `group_norm.*`: `[D]`;
    ///   `proj_matrix`: `[d, d]`; `D1`: `[1, h, positions, 1]`.
    ///
    /// # Cost
    /// One pass over the tensors, and the memory of the weights in `T`.
    ///
    /// # Errors
    /// [`Error::Format`](crate::Error::Format) for tensors that are missing or do not fit `config`,
    /// and what [`new`](PublishedAttention::new) finds.
    pub fn from_tensors(tensors: &Tensors, place: &str, config: AttentionConfig) -> Result<Self> {
        let name = |name: &str| format!("{place}{name}");
        let (config, d) = config.resolved()?;
        let (channels, heads) = (config.model_dim, config.heads);
        let (qkv, out) = (name("query_key_value"), name("dense"));
        let weights = by_heads(&config, d, true, tensors, &qkv, &out)?;
        let radii = published_radii(&tensors.matrix(&name("proj_matrix"), d, d)?);
        let decays = name("D1");
        let positions = match tensors.shape(&decays) {
            Some(&[1, found, positions, 1]) if found == heads && positions > 1 => positions,
            found => {
                return Err(fault(
                    decays,
                    format!("a tensor [1, {heads}, positions, 1]"),
                    format!("{found:?}"),
                ));
            }
        };
        let powers: Vec<f64> = tensors.numbers(&decays, &[1, heads, positions, 1])?;
        // γ to the last position that is a normal number in f32: its logarithm is the one rounding
        // has touched least.
        let log_decay = powers.chunks_exact(positions).map(|powers| {
            let last = powers
                .iter()
                .rposition(|&power| power >= f64::from(f32::MIN_POSITIVE))
                .filter(|&last| last > 0);
            last.map(|last| powers[last].ln() / last as f64)
        });
        let Some(log_decay) = log_decay.collect::<Option<_>>() else {
            return Err(fault(
                decays,
                "powers of a decay of each head",
                "none at the second position".to_owned(),
            ));
        };
        let log_decay: Vec<f64> = log_decay;
        for (powers, &decay) in powers.chunks_exact(positions).zip(&log_decay) {
            // Rounded to 16 bits at most.
            let differs = |(j, power): (usize, &f64)| {
                let expected = (decay * j as f64).exp();
                (power - expected).abs() > 0.01 * expected + 1e-7
            };
            if let Some(at) = powers.iter().enumerate().position(differs) {
                let expected = format!("powers of {:e}", decay.exp());
                return Err(fault(decays, expected, format!("{:e} at {at}", powers[at])));
            }
        }
        let published = PublishedWeights::new(
            radii,
            log_decay,
            tensors.matrix(&name("W_G"), channels, channels)?,
            tensors.vector(&name("group_norm.weight"), channels)?,
            tensors.vector(&name("group_norm.bias"), channels)?,
        );
        Self::new(config, weights, published)
    }
}
