//! `config.json`, checked: what it says of attention, by the defaults and the order of precedence
//! of Hugging Face transformers 5.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::family::{COMMON, Defaults, ROTARY};
use super::json::{Object, quoted_value, read};
use super::rope::{self, Heads, Rules};
use super::{CheckpointOptions, Family, fault_in, keys};
use crate::error::Result;
use crate::files::{fault, quoted};
use crate::layer::{AttentionConfig, Causality, Rotary};

/// What `config.json` says of attention.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) family: Family,
    pub(super) layers: usize,
    /// Of a layer that sees every token and has the rotary embedding, if the model has any.
    pub(super) attention: AttentionConfig,
    /// d.
    pub(super) head_dim: usize,
    pub(super) biases: Biases,
    /// What is added to the weights of the norms of queries and keys.
    pub(super) norm_shift: f64,
    windows: Windows,
    /// Layers that rotate; the others have no rotary embedding.
    rotating: Layers,
}

/// Which projections have biases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Biases {
    None,
    /// Queries, keys and values.
    Qkv,
    All,
}

impl Biases {
    fn all_if(announced: bool) -> Self {
        if announced { Self::All } else { Self::None }
    }
}

/// The layers with a sliding window.
#[derive(Debug)]
struct Windows {
    layers: Layers,
    tokens: Option<usize>,
    /// Their own rotary embedding, where it is another one.
    rotary: Option<Rotary>,
}

/// Some of the layers of a model.
#[derive(Debug)]
enum Layers {
    All,
    None,
    /// The one with this index and those after it.
    From(usize),
    /// Every so-many-th.
    Every(usize),
    /// All others.
    NotEvery(usize),
    /// One entry per layer.
    Listed(Vec<bool>),
}

impl Layers {
    fn contain(&self, layer: usize) -> bool {
        match self {
            Self::All => true,
            Self::None => false,
            Self::From(first) => layer >= *first,
            Self::Every(interval) => (layer + 1).is_multiple_of(*interval),
            Self::NotEvery(interval) => !(layer + 1).is_multiple_of(*interval),
            Self::Listed(listed) => listed.get(layer).copied().unwrap_or(false),
        }
    }
}

impl Config {
    /// Reads and checks `config.json` in `directory`.
    pub(super) fn read(directory: &Path, options: &CheckpointOptions) -> Result<Self> {
        let path = directory.join("config.json");
        let mut map: Map<String, Value> = read(&path)?;
        if let Some(text) = &options.config {
            let given: Map<String, Value> = serde_json::from_str(text)
                .map_err(|error| fault("the config given", "an object in JSON", error))?;
            map.extend(given);
        }
        let object = Object { path: &path, place: "", map: &map };
        let family = family(object)?;
        let config = Reader { object, family, defaults: family.defaults() };
        config.check_kind()?;
        config.read(options.length)
    }

    /// The config of the layer with this index.
    pub(super) fn of_layer(&self, layer: usize) -> AttentionConfig {
        let mut attention = self.attention.clone();
        if self.windows.layers.contain(layer) {
            attention.sliding_window = self.windows.tokens;
            if self.windows.rotary.is_some() {
                attention.rotary = self.windows.rotary.clone();
            }
        }
        if !self.rotating.contain(layer) {
            attention.rotary = None;
        }
        attention
    }
}

/// The family that `model_type` names, or `architectures` without it; both, if both are there.
fn family(config: Object<'_>) -> Result<Family> {
    if let Some(nested) = config.object("text_config")? {
        let inside = nested.get("model_type").map_or("a model".to_owned(), quoted_value);
        return Err(config.fault(
            "text_config",
            "absent: of a model for more than text, its language model alone can be read, with \
             these keys as CheckpointOptions::with_config and text_config as null",
            format!("the config of {inside}"),
        ));
    }
    let classes = config.list("architectures")?.unwrap_or_default();
    let by_class = |class: &Value| class.as_str().and_then(Family::of_class);
    let family = match (config.text("model_type")?, classes.first()) {
        (Some(name), _) => {
            let family = Family::ALL.into_iter().find(|family| family.model_type() == name);
            family.ok_or_else(|| config.fault("model_type", names(), quoted(name)))?
        }
        (None, None) => return Err(config.unfit("model_type", names())),
        (None, Some(class)) => by_class(class)
            .ok_or_else(|| config.unfit("architectures", format!("of a family {}", names())))?,
    };
    if classes.iter().any(|class| by_class(class) != Some(family)) {
        let expected = format!("absent or of the family {}", family.model_type());
        return Err(config.unfit("architectures", expected));
    }
    Ok(family)
}

fn names() -> String {
    let [names @ .., last] = Family::ALL.map(Family::model_type);
    format!("{} or {last}", names.join(", "))
}

/// Reading one config of a known family.
struct Reader<'a> {
    object: Object<'a>,
    family: Family,
    defaults: Defaults,
}

impl Reader<'_> {
    /// Refuses what this crate does not compute.
    fn check_kind(&self) -> Result<()> {
        let config = self.object;
        for key in ["quantization_config", "quantization", "compression_config"] {
            if let Some(found) = config.object(key)? {
                let method = found.get("quant_method").map(quoted_value);
                return Err(config.fault(
                    key,
                    "absent: weights that are quantised are not read",
                    method.map_or("a method without a name".to_owned(), |m| format!("method {m}")),
                ));
            }
        }
        if config.get("attn_logit_softcapping").is_some()
            || self.family == Family::Gemma2 && !config.says_none("attn_logit_softcapping")
        {
            let expected = "null: soft caps of attention's scores are not computed";
            let got = config.get("attn_logit_softcapping").map(quoted_value);
            let got = got.unwrap_or("nothing, which stands for 50".to_owned());
            return Err(config.fault("attn_logit_softcapping", expected, got));
        }
        let (rotary, own) = (self.defaults.rotary.is_some(), self.family.keys());
        let windows = own.contains(&"sliding_window");
        keys::check(config, |key| {
            COMMON.contains(&key)
                || rotary && ROTARY.contains(&key)
                || own.contains(&key)
                || key == "max_window_layers" && !windows // of nothing
        })
    }

    fn read(&self, length: Option<usize>) -> Result<Config> {
        let (config, family, defaults) = (self.object, self.family, self.defaults);
        let heads = config.needed_size("num_attention_heads")?;
        let hidden = config.needed_size("hidden_size")?;
        let layers = config.needed_size("num_hidden_layers")?;
        let kv_heads = self.kv_heads(heads)?;
        let head_dim = self.head_dim(hidden, heads)?;

        let mut attention =
            AttentionConfig::new(hidden, heads).with_kv_heads(kv_heads).with_head_dim(head_dim);
        if defaults.norm.is_some() {
            let epsilon = config.number("rms_norm_eps")?;
            attention.qk_norm = epsilon.or(defaults.norm);
        }
        if matches!(family, Family::Gemma2 | Family::Gemma3) {
            let scalar = config.number("query_pre_attn_scalar")?.unwrap_or(256.0);
            attention.scale = Some(1.0 / scalar.sqrt());
        }
        let heads = Heads { dim: head_dim, length };
        let mut local_rotary = None;
        match (family, defaults.rotary) {
            (Family::Gemma3, Some(rules)) => {
                let [local, global] = self.two_rotaries(rules, heads)?;
                (attention.rotary, local_rotary) = (Some(global), Some(local));
            }
            (Family::GptNeox, Some(rules)) => {
                attention.rotary = Some(rope::rotary(config, rules, heads)?);
                self.check_neox(rules)?;
            }
            (_, Some(rules)) => attention.rotary = Some(rope::rotary(config, rules, heads)?),
            (_, None) => {}
        }
        if family == Family::Bert {
            let kind = config.text("position_embedding_type")?;
            if kind.is_some_and(|kind| kind != "absolute") {
                return Err(config.unfit("position_embedding_type", "\"absolute\""));
            }
            if !config.flag("is_decoder")?.unwrap_or(false) {
                attention.causality = Causality::Bidirectional;
            }
        }
        let windows = Windows { rotary: local_rotary, ..self.windows(layers)? };
        let rotating = self.rotating(layers)?;
        let biases = self.biases()?;
        let norm_shift = if family == Family::Gemma3 { 1.0 } else { 0.0 };
        let config =
            Config { family, layers, attention, head_dim, biases, norm_shift, windows, rotating };
        // Layers are of two kinds at most, and every check is passed or failed by one of them.
        let local = AttentionConfig {
            rotary: config.windows.rotary.clone().or(config.attention.rotary.clone()),
            sliding_window: config.windows.tokens,
            ..config.attention.clone()
        };
        for attention in [&config.attention, &local] {
            attention.check().map_err(|error| {
                fault_in(self.object.path, "attention", "the shape of a layer", error)
            })?;
        }
        Ok(config)
    }

    fn kv_heads(&self, heads: usize) -> Result<usize> {
        const KEY: &str = "num_key_value_heads";
        let config = self.object;
        if !self.family.keys().contains(&KEY) {
            return match config.get(KEY) {
                Some(_) if config.size(KEY)? != Some(heads) => {
                    Err(config.unfit(KEY, "absent or as num_attention_heads in this family"))
                }
                _ => Ok(heads),
            };
        }
        let kv_heads = match config.size(KEY)? {
            Some(kv_heads) => kv_heads,
            None if config.says_none(KEY) => heads,
            None => self.defaults.kv_heads.unwrap_or(heads),
        };
        if !heads.is_multiple_of(kv_heads) {
            let expected = format!("a divisor of num_attention_heads, {heads}");
            return Err(config.fault(KEY, expected, kv_heads));
        }
        Ok(kv_heads)
    }

    fn head_dim(&self, hidden: usize, heads: usize) -> Result<usize> {
        let config = self.object;
        let given = config.size("head_dim")?;
        if let Some(dim) = given.or(self.defaults.head_dim)
            && !matches!(self.family, Family::GptNeox | Family::Opt | Family::Bert)
        {
            return Ok(dim);
        }
        if !hidden.is_multiple_of(heads) {
            let expected = format!("a multiple of num_attention_heads, {heads}");
            return Err(config.fault("hidden_size", expected, hidden));
        }
        match given {
            Some(dim) if dim != hidden / heads => {
                Err(config.unfit("head_dim", "absent or hidden_size / num_attention_heads"))
            }
            _ => Ok(hidden / heads),
        }
    }

    fn biases(&self) -> Result<Biases> {
        let announced = |key| self.object.flag(key);
        Ok(match self.family {
            Family::Qwen2 => Biases::Qkv,
            Family::Bert => Biases::All,
            Family::Opt => Biases::all_if(announced("enable_bias")?.unwrap_or(true)),
            Family::GptNeox => Biases::all_if(announced("attention_bias")?.unwrap_or(true)),
            Family::Mistral | Family::Phi3 => Biases::None,
            _ => Biases::all_if(announced("attention_bias")?.unwrap_or(false)),
        })
    }

    /// The rotary embeddings of Gemma 3's layers with and without a window.
    fn two_rotaries(&self, rules: Rules, heads: Heads) -> Result<[Rotary; 2]> {
        const KINDS: [&str; 2] = ["sliding_attention", "full_attention"];
        let config = self.object;
        let empty = Map::new();
        let both = config.object("rope_parameters")?.unwrap_or(&empty);
        let object = Object { place: "rope_parameters.", map: both, ..config };
        if let Some((key, _)) =
            both.iter().find(|(key, value)| !value.is_null() && !KINDS.contains(&key.as_str()))
        {
            return Err(
                object.unfit(key, "absent: this family has one object for each kind of layer")
            );
        }
        let mut full = object.object(KINDS[1])?.cloned().unwrap_or_default();
        // Files of transformers 4 have one rule, for the layers that see everything. Its older name
        // is not looked at by every version.
        if let Some(scaling) = config.object("rope_scaling")? {
            let scaling_object = Object { place: "rope_scaling.", map: scaling, ..config };
            if scaling_object.get("type").is_some() && scaling_object.get("rope_type").is_none() {
                return Err(
                    scaling_object.unfit("type", "absent, and rope_type there, in this family")
                );
            }
            full.extend(scaling.clone());
        }
        let sliding = object.object(KINDS[0])?.unwrap_or(&empty);
        let read = |kind, map, theta, default_theta| {
            let place = format!("rope_parameters.{kind}.");
            let inside = Object { place: &place, map, ..config };
            rope::nested(config, inside, Rules { theta, default_theta, ..rules }, heads)
        };
        Ok([
            read(KINDS[0], sliding, "rope_local_base_freq", 1e4)?,
            read(KINDS[1], &full, rules.theta, rules.default_theta)?,
        ])
    }

    /// GPT-NeoX has names of its own for base and share; the usual ones may say the same.
    fn check_neox(&self, rules: Rules) -> Result<()> {
        let config = self.object;
        let inside = config.object("rope_scaling")?.or(config.object("rope_parameters")?);
        let share = rules.share.map_or(("", 1.0), |share| share);
        for (own, default, usual) in [
            (rules.theta, rules.default_theta, "rope_theta"),
            (share.0, share.1, "partial_rotary_factor"),
        ] {
            let within = inside.and_then(|map| map.get(usual)).and_then(Value::as_f64);
            let in_force = within.or(config.number(own)?).unwrap_or(default);
            if config.number(usual)?.is_some_and(|other| other != in_force) {
                let expected = format!("absent or {in_force}, as {own} is");
                return Err(config.unfit(usual, expected));
            }
        }
        Ok(())
    }

    /// The layers with a sliding window, without their rotary embedding.
    fn windows(&self, layers: usize) -> Result<Windows> {
        let config = self.object;
        let has = |key: &str| self.family.keys().contains(&key);
        let none = Windows { layers: Layers::None, tokens: None, rotary: None };
        if !has("sliding_window") {
            return Ok(none); // refused by name
        }
        let listed = if has("layer_types") { self.layer_types(layers)? } else { None };
        let switched =
            !has("use_sliding_window") || config.flag("use_sliding_window")? == Some(true);
        let given = match config.size("sliding_window")? {
            Some(tokens) => Some(tokens),
            None if config.says_none("sliding_window") => None,
            None => self.defaults.window,
        };
        let tokens = given.filter(|_| switched);
        if let (Some(types), None) = (&listed, tokens)
            && types.contains(&true)
            && !(switched && config.says_none("sliding_window"))
        {
            let expected = "without sliding_attention, as there is no sliding_window";
            return Err(config.unfit("layer_types", expected));
        }
        let by_kind = match self.family {
            Family::Mistral | Family::Phi3 => Layers::All,
            Family::Qwen2 | Family::Qwen3 => {
                Layers::From(self.count("max_window_layers")?.unwrap_or(28))
            }
            Family::Gemma2 => Layers::NotEvery(2),
            Family::Gemma3 => Layers::NotEvery(self.pattern(listed.is_some())?),
            // SmolLM 3: those without rotary embedding.
            _ => match self.rotating(layers)? {
                Layers::NotEvery(interval) => Layers::Every(interval),
                Layers::Listed(rotating) => {
                    Layers::Listed(rotating.into_iter().map(|rotates| !rotates).collect())
                }
                _ => Layers::None,
            },
        };
        if let (Family::Mistral, Some(types)) = (self.family, &listed)
            && types.iter().any(|&sliding| sliding != tokens.is_some())
        {
            let expected = "absent or the same for all layers in this family, as sliding_window is";
            return Err(config.unfit("layer_types", expected));
        }
        let sliding = listed.map_or(by_kind, Layers::Listed);
        // Without a window a layer may still be of its own kind.
        let kept = tokens.is_some() || self.family == Family::Gemma3;
        Ok(if kept { Windows { layers: sliding, tokens, rotary: None } } else { none })
    }

    /// Every how many layers one of Gemma 3 sees everything. Files of transformers 5 keep the
    /// number under another name, beside the list of layers that counts.
    fn pattern(&self, listed: bool) -> Result<usize> {
        const NEW: &str = "_sliding_window_pattern";
        let pattern = self.object.size("sliding_window_pattern")?.unwrap_or(6);
        if !listed && self.object.size(NEW)?.is_some_and(|new| new != pattern) {
            return Err(self.object.unfit(NEW, format!("absent or {pattern} without layer_types")));
        }
        Ok(pattern)
    }

    /// A number of layers, which may be none.
    fn count(&self, key: &str) -> Result<Option<usize>> {
        match self.object.get(key) {
            Some(value) if value.as_f64() == Some(0.0) => Ok(Some(0)),
            _ => self.object.size(key),
        }
    }

    /// Which layers have a sliding window, if `layer_types` says.
    fn layer_types(&self, layers: usize) -> Result<Option<Vec<bool>>> {
        const KEY: &str = "layer_types";
        let Some(types) = self.object.list(KEY)? else { return Ok(None) };
        let is_sliding = |kind: &Value| match kind.as_str() {
            Some("full_attention") => Some(false),
            Some("sliding_attention") => Some(true),
            _ => None,
        };
        let listed: Option<Vec<bool>> = types.iter().map(is_sliding).collect();
        listed.filter(|types| types.len() == layers).map(Some).ok_or_else(|| {
            let kinds = "full_attention or sliding_attention";
            self.object.unfit(KEY, format!("{kinds} for each of {layers} layers"))
        })
    }

    /// The layers with rotary embedding.
    fn rotating(&self, layers: usize) -> Result<Layers> {
        const KEY: &str = "no_rope_layers";
        if self.family != Family::SmolLm3 {
            return Ok(Layers::All);
        }
        let Some(list) = self.object.list(KEY)? else {
            let interval = self.object.size("no_rope_layer_interval")?.unwrap_or(4);
            return Ok(Layers::NotEvery(interval));
        };
        // Contrary to the name, 1 stands for layers that rotate.
        let rotates = |entry: &Value| match entry {
            entry if entry == &json!(1) || entry == &json!(true) => Some(true),
            entry if entry == &json!(0) || entry == &json!(false) => Some(false),
            _ => None,
        };
        let listed: Option<Vec<bool>> = list.iter().map(rotates).collect();
        listed.filter(|listed| listed.len() >= layers).map(Layers::Listed).ok_or_else(|| {
            self.object.unfit(KEY, format!("1 or 0 for each of {layers} layers at least"))
        })
    }
}
