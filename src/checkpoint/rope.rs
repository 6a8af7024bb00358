//! What a config says of the rotary embedding.
//!
//! Base, share of rotated coordinates and rule stand in `rope_scaling` (files of transformers 4),
//! in `rope_parameters` (5) or beside them; what is inside counts before what is beside. Keys
//! inside that the rule does not have are refused.

use serde_json::{Map, Value};

use super::json::{Object, quoted_value};
use crate::error::Result;
use crate::layer::{Rotary, RotaryScaling};

/// Where a family keeps what, and what stands in for absent keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// Beside the objects.
    pub(super) theta: &'static str,
    pub(super) default_theta: f64,
    /// The share of rotated coordinates beside the objects, and its default; none where all are
    /// rotated.
    pub(super) share: Option<(&'static str, f64)>,
    /// The value of `original_max_position_embeddings` that is in force if it is absent beside the
    /// objects, whatever they say.
    pub(super) default_original: Option<usize>,
    /// Whether what is beside the objects counts before what is inside for
    /// `original_max_position_embeddings`.
    pub(super) original_beside: bool,
}

impl Rules {
    pub(super) const fn new(default_theta: f64) -> Self {
        let theta = "rope_theta";
        Self { theta, default_theta, share: None, default_original: None, original_beside: true }
    }
}

/// What the rotary embedding of a head depends on beside the config's keys.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    /// d.
    pub(super) dim: usize,
    /// Tokens of the longest sequence, where the caller said so.
    pub(super) length: Option<usize>,
}

/// The rotary embedding of a family whose layers all have the same.
pub(super) fn rotary(config: Object<'_>, rules: Rules, heads: Heads) -> Result<Rotary> {
    let empty = Map::new();
    let (place, map) = match (config.object("rope_scaling")?, config.object("rope_parameters")?) {
        (Some(scaling), Some(parameters)) if scaling != parameters => {
            return Err(config.fault(
                "rope_parameters",
                "absent or as rope_scaling, where both are given",
                quoted_value(&Value::Object(parameters.clone())),
            ));
        }
        (Some(scaling), _) => ("rope_scaling.", scaling),
        (None, Some(parameters)) => ("rope_parameters.", parameters),
        (None, None) => ("rope_parameters.", &empty),
    };
    nested(config, Object { place, map, ..config }, rules, heads)
}

/// The rotary embedding that `inside` and the keys beside it say.
pub(super) fn nested(
    config: Object<'_>,
    inside: Object<'_>,
    rules: Rules,
    heads: Heads,
) -> Result<Rotary> {
    let theta = match inside.number("rope_theta")? {
        Some(theta) => theta,
        None => config.number(rules.theta)?.unwrap_or(rules.default_theta),
    };
    let mut rotary = Rotary::new(theta);
    let share = inside.number("partial_rotary_factor")?;
    if let Some((key, default)) = rules.share {
        let (object, key, share) = match share {
            Some(share) => (inside, "partial_rotary_factor", share),
            None => (config, key, config.number(key)?.unwrap_or(default)),
        };
        if !(share > 0.0 && share <= 1.0) {
            return Err(object.unfit(key, "more than 0 and at most 1"));
        }
        if share < 1.0 {
            rotary = rotary.with_dims((heads.dim as f64 * share) as usize);
        }
    } else if share.is_some_and(|share| share != 1.0) {
        return Err(inside.unfit("partial_rotary_factor", "absent or 1 in this family"));
    }
    let dims = rotary.dims.unwrap_or(heads.dim);
    let scaling = Scaling { config, inside, rules, length: heads.length, pairs: dims / 2 };
    Ok(rotary.with_scaling(scaling.read()?))
}

/// Reading the rule of one object.
#[derive(Clone, Copy)]
struct Scaling<'a> {
    config: Object<'a>,
    inside: Object<'a>,
    rules: Rules,
    length: Option<usize>,
    /// r/2.
    pairs: usize,
}

impl Scaling<'_> {
    fn read(self) -> Result<RotaryScaling> {
        let Self { inside, .. } = self;
        // Older files say `type`.
        let (new, old) = (inside.text("rope_type")?, inside.text("type")?);
        if let (Some(new), Some(old)) = (new, old)
            && new != old
        {
            return Err(inside.unfit("type", format!("absent or {new:?} as rope_type is")));
        }
        match new.or(old).unwrap_or("default") {
            "default" => self.known(&[]).map(|()| RotaryScaling::None),
            "linear" => {
                self.known(&["factor"])?;
                Ok(RotaryScaling::Linear { factor: self.needed("factor")? })
            }
            "dynamic" => {
                self.known(&["factor"])?;
                let original_context = self.config.needed_size("max_position_embeddings")?;
                Ok(RotaryScaling::Dynamic {
                    factor: self.needed("factor")?,
                    original_context,
                    length: self.length.unwrap_or(original_context),
                })
            }
            "llama3" => {
                self.known(&[
                    "factor",
                    "low_freq_factor",
                    "high_freq_factor",
                    "original_max_position_embeddings",
                ])?;
                Ok(RotaryScaling::Llama3 {
                    factor: self.needed("factor")?,
                    low_freq_factor: self.needed("low_freq_factor")?,
                    high_freq_factor: self.needed("high_freq_factor")?,
                    original_context: self.original()?,
                })
            }
            "yarn" => self.yarn(),
            "longrope" | "su" => self.longrope(),
            _ => {
                let key = if new.is_some() { "rope_type" } else { "type" };
                let types = "default, linear, dynamic, llama3, yarn or longrope";
                Err(inside.unfit(key, types))
            }
        }
    }

    /// YaRN, with the factor on rotated coordinates as transformers 5 finds it.
    fn yarn(self) -> Result<RotaryScaling> {
        self.known(&[
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ])?;
        let Self { inside, .. } = self;
        if inside.flag("truncate")? == Some(false) {
            return Err(inside.unfit("truncate", "absent or true"));
        }
        let factor = self.needed("factor")?;
        let grown = |by: f64| if factor <= 1.0 { 1.0 } else { 0.1 * by * factor.ln() + 1.0 };
        let given = |key| Ok(inside.number(key)?.filter(|&number| number != 0.0));
        let attention_factor = match (
            inside.number("attention_factor")?,
            given("mscale")?,
            given("mscale_all_dim")?,
        ) {
            (Some(given), ..) => given,
            (None, Some(scale), Some(all)) => grown(scale) / grown(all),
            (None, ..) => grown(1.0),
        };
        Ok(RotaryScaling::Yarn {
            factor,
            original_context: self.original()?,
            beta_fast: given("beta_fast")?.unwrap_or(32.0),
            beta_slow: given("beta_slow")?.unwrap_or(1.0),
            attention_factor,
        })
    }

    /// The factors for short or for long sequences, as the caller's length asks for.
    fn longrope(self) -> Result<RotaryScaling> {
        let keys = [
            "short_factor",
            "long_factor",
            "factor",
            "attention_factor",
            "original_max_position_embeddings",
        ];
        self.known(&keys)?;
        let Self { inside, config, .. } = self;
        let (short, long) = (self.factors("short_factor")?, self.factors("long_factor")?);
        let original = self.original()?;
        let longest = config.needed_size("max_position_embeddings")?;
        let factors = match self.length {
            Some(length) if length > original => long,
            None if longest > original && short != long => {
                let expected = format!(
                    "given with a length of sequences (CheckpointOptions::with_length), as it has \
                     other factors beyond {original} tokens"
                );
                return Err(inside.fault("long_factor", expected, "no length"));
            }
            _ => short,
        };
        let factor = inside.number("factor")?.unwrap_or(longest as f64 / original as f64);
        let attention_factor = match inside.number("attention_factor")? {
            Some(given) => given,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
        };
        Ok(RotaryScaling::LongRope { factors, attention_factor })
    }

    /// One number for each pair of coordinates.
    fn factors(self, key: &str) -> Result<Vec<f64>> {
        let factors: Option<Vec<f64>> =
            self.inside.list(key)?.and_then(|list| list.iter().map(Value::as_f64).collect());
        let pairs = self.pairs;
        factors
            .filter(|factors| factors.len() == pairs)
            .ok_or_else(|| self.inside.unfit(key, format!("a list of {pairs} numbers")))
    }

    /// The context the model was trained with first.
    fn original(self) -> Result<usize> {
        const KEY: &str = "original_max_position_embeddings";
        let Self { inside, config, rules, .. } = self;
        let beside = match rules.original_beside {
            true => config.size(KEY)?.or(rules.default_original),
            false => None,
        };
        match beside.or(inside.size(KEY)?) {
            Some(original) => Ok(original),
            None => config.needed_size("max_position_embeddings"),
        }
    }

    fn needed(self, key: &str) -> Result<f64> {
        self.inside.number(key)?.ok_or_else(|| self.inside.unfit(key, "a number"))
    }

    /// Refuses keys that the rule does not have.
    fn known(self, keys: &[&str]) -> Result<()> {
        const COMMON: [&str; 4] = ["rope_type", "type", "rope_theta", "partial_rotary_factor"];
        let is_known = |key: &str| COMMON.contains(&key) || keys.contains(&key);
        match self.inside.map.iter().find(|(key, value)| !value.is_null() && !is_known(key)) {
            Some((key, _)) => Err(self.inside.unfit(
                key,
                match keys {
                    [] => "absent where there is no rope_type, or the default one".to_owned(),
                    keys => format!("absent: this rope_type has {}", keys.join(", ")),
                },
            )),
            None => Ok(()),
        }
    }
}
