//! [`RotaryScaling`]: frequencies for contexts longer than the training one.

use std::f64::consts::TAU;

use crate::check::{check_factor, check_len, check_positive, check_value};
use crate::error::Result;

/// How the frequencies are stretched for contexts longer than the training one. The rules are those
/// of Hugging Face transformers 5, whose names stand at the variants.
#[derive(Debug, Clone, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[non_exhaustive]
pub enum RotaryScaling {
    /// Not at all.
    #[default]
    None,
    /// Every frequency is divided by `factor`.
    Linear {
        /// How much longer the context becomes.
        factor: f64,
    },
    /// The rule of Llama 3.1: wavelengths beyond `original_context / low_freq_factor` are stretched
    /// by `factor`, those below `original_context / high_freq_factor` stay, those between move
    /// smoothly from one to the other.
    Llama3 {
        /// How much longer the context becomes.
        factor: f64,
        /// Below the high one. Llama 3.1: 1.
        low_freq_factor: f64,
        /// Above the low one. Llama 3.1: 4.
        high_freq_factor: f64,
        /// Context the model was trained with first. Llama 3.1: 8192.
        original_context: usize,
    },
    /// The NTK-aware rule (`dynamic`) for sequences of one length: the base grows by
    /// `(factor·length/original_context − factor + 1)^(r/(r−2))`, and stays as it is where `length`
    /// is at most `original_context`. transformers takes the longest sequence so far for `length`,
    /// so that keys it has cached keep frequencies that are no longer in force; here there is one.
    Dynamic {
        /// How much longer the context becomes.
        factor: f64,
        /// Context the model was trained with.
        original_context: usize,
        /// Length of the sequences, in tokens.
        length: usize,
    },
    /// YaRN [Peng et al. 2023, equations 22 to 25] (`yarn`): pair i stays if it turns more than
    /// `beta_fast` times in the original context, is stretched by `factor` if it turns less than
    /// `beta_slow` times, and moves from one to the other linearly in i, between whole numbers.
    Yarn {
        /// How much longer the context becomes.
        factor: f64,
        /// Context the model was trained with first.
        original_context: usize,
        /// At least the slow one. Usual: 32.
        beta_fast: f64,
        /// At most the fast one. Usual: 1.
        beta_slow: f64,
        /// Every rotated coordinate is multiplied by it. Usual: 0.1·ln(factor) + 1.
        attention_factor: f64,
    },
    /// LongRoPE (`longrope`): every frequency is divided by a factor of its own.
    LongRope {
        /// `[r/2]`: the model's short or long factors, as the length of its sequences asks for.
        factors: Vec<f64>,
        /// Every rotated coordinate is multiplied by it. Usual: √(1 + ln s / ln n) for a context s
        /// times as long as the original n.
        attention_factor: f64,
    },
}

impl RotaryScaling {
    /// `dims` is even and at least 2, `base` finite and positive.
    pub(super) fn check(&self, dims: usize, base: f64) -> Result<()> {
        match self {
            Self::None => Ok(()),
            Self::Linear { factor } => check_factor("rotary.factor", *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                check_factor("rotary.factor", *factor)?;
                check_factor("rotary.low_freq_factor", *low_freq_factor)?;
                check_factor("rotary.high_freq_factor", *high_freq_factor)?;
                check_positive("rotary.original_context", *original_context)?;
                check_value(
                    high_freq_factor > low_freq_factor,
                    "rotary.high_freq_factor",
                    "above low_freq_factor",
                    *high_freq_factor,
                )
            }
            Self::Dynamic { factor, original_context, length } => {
                check_value(*factor >= 1.0, "rotary.factor", "at least 1", *factor)?;
                check_factor("rotary.factor", *factor)?;
                check_positive("rotary.original_context", *original_context)?;
                check_positive("rotary.length", *length)?;
                check_value(dims > 2, "rotary.dims", "above 2 where it is dynamic", dims as f64)
            }
            Self::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor } => {
                check_factor("rotary.factor", *factor)?;
                check_positive("rotary.original_context", *original_context)?;
                check_factor("rotary.beta_slow", *beta_slow)?;
                check_factor("rotary.beta_fast", *beta_fast)?;
                check_value(
                    beta_fast >= beta_slow,
                    "rotary.beta_fast",
                    "at least beta_slow",
                    *beta_fast,
                )?;
                check_value(base > 1.0, "rotary.base", "above 1 for YaRN", base)?;
                check_attention_factor(*attention_factor)
            }
            Self::LongRope { factors, attention_factor } => {
                check_len("rotary.factors", dims / 2, factors.len())?;
                factors.iter().try_for_each(|&factor| check_factor("rotary.factors", factor))?;
                check_attention_factor(*attention_factor)
            }
        }
    }

    /// A number that no frequency is above, without memory or time for `dims` of them, which may be
    /// any number here; NaN if there is none.
    pub(super) fn largest(&self, base: f64, dims: usize) -> f64 {
        let base = base * self.base_growth(dims);
        let theta = |i: usize| base.powf(-2.0 * i as f64 / dims as f64);
        let plain = theta(0).max(theta(dims / 2 - 1));
        match self {
            Self::None | Self::Dynamic { .. } => plain,
            Self::Linear { factor } => plain / factor,
            Self::Llama3 { factor, .. } | Self::Yarn { factor, .. } => plain / factor.min(1.0),
            Self::LongRope { factors, .. } => {
                factors.iter().enumerate().map(|(i, factor)| theta(i) / factor).fold(0.0, f64::max)
            }
        }
    }

    /// What the base is multiplied by.
    pub(super) fn base_growth(&self, dims: usize) -> f64 {
        match self {
            Self::Dynamic { factor, original_context, length } => {
                let (context, r) = (*original_context as f64, dims as f64);
                let longer = (*length as f64).max(context) / context;
                (factor * longer - (factor - 1.0)).powf(r / (r - 2.0))
            }
            _ => 1.0,
        }
    }

    /// The frequency of pair i, which is `theta` without this.
    pub(super) fn stretched(&self, i: usize, theta: f64, dims: usize, base: f64) -> f64 {
        match self {
            Self::None | Self::Dynamic { .. } => theta,
            Self::Linear { factor } => theta / factor,
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let turns = *original_context as f64 * theta / TAU; // in the original context
                let kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                    .clamp(0.0, 1.0);
                theta * (kept + (1.0 - kept) / factor)
            }
            Self::Yarn { factor, original_context, beta_fast, beta_slow, .. } => {
                // The pair, as a real number, that turns so often in the original context.
                let pair = |turns: f64| {
                    let wavelength = *original_context as f64 / (turns * TAU);
                    dims as f64 * wavelength.ln() / (2.0 * base.ln())
                };
                let low = pair(*beta_fast).floor().max(0.0);
                let high = pair(*beta_slow).ceil().min(dims as f64 - 1.0);
                let high = if high == low { low + 0.001 } else { high };
                let kept = 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                theta * (kept + (1.0 - kept) / factor)
            }
            Self::LongRope { factors, .. } => theta / factors[i],
        }
    }

    /// What every rotated coordinate is multiplied by.
    pub(super) fn attention_factor(&self) -> f64 {
        match self {
            Self::Yarn { attention_factor, .. } | Self::LongRope { attention_factor, .. } => {
                *attention_factor
            }
            _ => 1.0,
        }
    }
}

/// It multiplies queries and keys, which must stay numbers that can be worked with.
fn check_attention_factor(got: f64) -> Result<()> {
    let holds = (1e-6..=1e6).contains(&got);
    check_value(holds, "rotary.attention_factor", "from 10⁻⁶ to 10⁶", got)
}
