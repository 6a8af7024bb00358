//! [`File`]: what a file says, each part checked as it is read.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use ndarray::{Array1, Array2};
use safetensors::tensor::{Dtype, Metadata, TensorInfo};

use super::{
    CHECKSUM, Checksum, FIRST_VERSION, HOLD, VERSION, Word, config_notes, dtype, weights_shape,
};
use crate::Real;
use crate::attention::{LinearConfig, Window};
use crate::check::within;
use crate::error::{Error, Result};
use crate::files::{elements, fault, header, quoted};
use crate::kernel::{DctMap, DctParams, Pairing, Projection, SideParams};
use crate::layer::{
    AttentionConfig, AttentionWeights, DijiangAttention, QkvProj, Rotary, RotaryScaling,
};

/// A file whose header is sound. Every count in it that leads to memory being taken is first
/// compared with a tensor's shape.
pub(super) struct File<'a> {
    metadata: Metadata,
    data: &'a [u8],
}

/// A fault that a constructor found in what lies at `place`.
fn fault_at(place: &str, expected: &str, error: Error) -> Error {
    fault(place.trim_end_matches('.'), expected, error)
}

impl<'a> File<'a> {
    pub(super) fn open(bytes: &'a [u8]) -> Result<Self> {
        let (metadata, start) = header(bytes)?;
        let file = Self { metadata, data: &bytes[start..] };
        match file.note("dijiang.version")? {
            FIRST_VERSION => Ok(file),
            VERSION => {
                let (expected, got) = (file.checksum(), file.note(CHECKSUM)?);
                if got != expected {
                    return Err(fault(
                        CHECKSUM,
                        format!("{expected}, that of the contents"),
                        quoted(got),
                    ));
                }
                Ok(file)
            }
            other => Err(fault("dijiang.version", "1 or 2", quoted(other))),
        }
    }

    fn checksum(&self) -> String {
        let mut checksum = Checksum::default();
        let notes: BTreeMap<_, _> = self.metadata.metadata().iter().flatten().collect();
        for (name, value) in notes.into_iter().filter(|(name, _)| Checksum::covers(name)) {
            checksum.add(name, value.as_bytes());
        }
        let tensors: BTreeMap<_, _> = self.metadata.tensors().into_iter().collect();
        for (name, info) in tensors.into_iter().filter(|(name, _)| Checksum::covers(name)) {
            let (start, end) = info.data_offsets;
            checksum.add(&name, self.data.get(start..end).unwrap_or_default());
        }
        checksum.finish()
    }

    fn is_first_version(&self) -> bool {
        self.note("dijiang.version").is_ok_and(|version| version == FIRST_VERSION)
    }

    fn note(&self, name: &str) -> Result<&str> {
        let note = self.metadata.metadata().as_ref().and_then(|notes| notes.get(name));
        note.map(String::as_str).ok_or_else(|| fault(name, "in the metadata", "nothing"))
    }

    /// A number in the metadata.
    fn number<N: FromStr>(&self, name: &str, expected: &str) -> Result<N> {
        let note = self.note(name)?;
        note.parse().map_err(|_| fault(name, expected, quoted(note)))
    }

    fn count(&self, name: &str) -> Result<usize> {
        self.number(name, "a whole number")
    }

    fn float(&self, name: &str) -> Result<f64> {
        self.number(name, "a number")
    }

    fn choice<W: Word>(&self, name: &str) -> Result<W> {
        let note = self.note(name)?;
        let found = W::ALL.iter().find(|choice| choice.word() == note);
        found.copied().ok_or_else(|| {
            let words: Vec<_> = W::ALL.iter().map(|choice| choice.word()).collect();
            fault(name, words.join(" or "), quoted(note))
        })
    }

    pub(super) fn layers(&self) -> Result<usize> {
        match self.count("dijiang.layers")? {
            0 => Err(fault("dijiang.layers", "at least 1", 0)),
            layers => Ok(layers),
        }
    }

    fn info(&self, name: &str, expected: impl Fn() -> String) -> Result<&TensorInfo> {
        self.metadata.info(name).ok_or_else(|| fault(name, expected(), "nothing"))
    }

    /// The numbers of a tensor of exactly this type and shape, at most `limit` in magnitude.
    fn tensor<E: Real>(&self, name: &str, shape: &[usize], limit: f64) -> Result<Vec<E>> {
        let described = |dtype: Dtype, shape: &[usize]| format!("{dtype:?} {shape:?}");
        let expected = || described(dtype::<E>(), shape);
        let info = self.info(name, expected)?;
        if info.dtype != dtype::<E>() || info.shape != shape {
            return Err(fault(name, expected(), described(info.dtype, &info.shape)));
        }
        let (start, end) = info.data_offsets;
        let bytes = self
            .data
            .get(start..end)
            .ok_or_else(|| fault(name, expected(), "an end of the file"))?;
        let numbers: Vec<E> = match dtype::<E>() {
            Dtype::F64 => elements(bytes, |bytes| E::from_f64(f64::from_le_bytes(bytes))),
            _ => elements(bytes, |bytes| E::from_f64(f64::from(f32::from_le_bytes(bytes)))),
        };
        match numbers.iter().position(|number| !within(number.to_f64(), limit)) {
            None => Ok(numbers),
            Some(index) => {
                let got = format!("{:e} at index {index}", numbers[index].to_f64());
                Err(fault(name, format!("finite and at most {limit:e} in magnitude"), got))
            }
        }
    }

    fn matrix<T: Real>(&self, name: &str, shape: &[usize]) -> Result<Array2<T>> {
        let numbers = self.tensor(name, shape, T::LIMIT)?;
        Array2::from_shape_vec((shape[0], shape[1]), numbers)
            .map_err(|error| fault(name, "a matrix", error))
    }

    /// A tensor without axes.
    fn scalar(&self, name: &str, limit: f64) -> Result<f64> {
        Ok(self.tensor(name, &[], limit)?.first().copied().unwrap_or(0.0))
    }

    pub(super) fn layer<T: Real>(&self, place: &str) -> Result<DijiangAttention<T>> {
        let config = self.config(&format!("{place}dijiang."))?;
        config
            .check()
            .map_err(|error| fault_at(&format!("{place}dijiang"), "a config of a layer", error))?;
        let weights = Arc::new(self.weights(place, &config)?);
        let projections =
            QkvProj::new(config, weights).map_err(|error| fault_at(place, "a layer", error))?;
        self.heads(place, projections)
    }

    /// `layer` with other maps, decays and local window.
    pub(super) fn maps<T: Real>(
        &self,
        place: &str,
        layer: &DijiangAttention<T>,
    ) -> Result<DijiangAttention<T>> {
        let projections = &layer.proj;
        for (name, value) in
            config_notes(projections.config(), projections.head_dim(), projections.scale())
        {
            let name = format!("{place}dijiang.{name}");
            if self.is_first_version() && name.ends_with("qk_norm") && value == "none" {
                continue;
            }
            let got = self.note(&name)?;
            if got != value {
                return Err(fault(name, format!("{value} as in this layer"), quoted(got)));
            }
        }
        let hold = self.hold(&format!("{place}dijiang."))?;
        let held = projections.clone().with_rotary_hold(hold);
        self.heads(place, held.map_err(|error| fault_at(place, "a layer", error))?)
    }

    /// Of the rotary embedding.
    fn hold(&self, place: &str) -> Result<Option<usize>> {
        let name = format!("{place}{HOLD}");
        self.note(&name).ok().map(|_| self.count(&name)).transpose()
    }

    /// Counts with spaces between them.
    fn counts(&self, name: &str) -> Result<Vec<usize>> {
        let counts = self.note(name)?.split_terminator(' ').map(str::parse);
        let counts = counts.collect::<Result<_, _>>();
        counts.map_err(|error| fault(name, "numbers with spaces between them", error))
    }

    fn config(&self, place: &str) -> Result<AttentionConfig> {
        let name = |name: &str| format!("{place}{name}");
        let mut config =
            AttentionConfig::new(self.count(&name("model_dim"))?, self.count(&name("heads"))?)
                .with_kv_heads(self.count(&name("kv_heads"))?)
                .with_head_dim(self.count(&name("head_dim"))?)
                .with_scale(self.float(&name("scale"))?)
                .with_causality(self.choice(&name("causality"))?);
        if !self.is_first_version() && self.note(&name("qk_norm"))? != "none" {
            config.qk_norm = Some(self.float(&name("qk_norm"))?);
        }
        if self.note(&name("rotary"))? == "none" {
            return Ok(config);
        }
        let dims = match self.note(&name("rotary.dims"))? {
            "all" => None,
            _ => Some(self.count(&name("rotary.dims"))?),
        };
        let factor = |which: &str| self.float(&name(which));
        let scaling = match self.note(&name("rotary.scaling"))? {
            "none" => RotaryScaling::None,
            "linear" => RotaryScaling::Linear { factor: factor("rotary.factor")? },
            "llama3" => RotaryScaling::Llama3 {
                factor: factor("rotary.factor")?,
                low_freq_factor: factor("rotary.low_freq_factor")?,
                high_freq_factor: factor("rotary.high_freq_factor")?,
                original_context: self.count(&name("rotary.original_context"))?,
            },
            "dynamic" => RotaryScaling::Dynamic {
                factor: factor("rotary.factor")?,
                original_context: self.count(&name("rotary.original_context"))?,
                length: self.count(&name("rotary.length"))?,
            },
            "yarn" => RotaryScaling::Yarn {
                factor: factor("rotary.factor")?,
                original_context: self.count(&name("rotary.original_context"))?,
                beta_fast: factor("rotary.beta_fast")?,
                beta_slow: factor("rotary.beta_slow")?,
                attention_factor: factor("rotary.attention_factor")?,
            },
            "longrope" => {
                let note = name("rotary.factors");
                let factors = self.note(&note)?.split(' ').map(str::parse);
                RotaryScaling::LongRope {
                    factors: factors
                        .collect::<Result<_, _>>()
                        .map_err(|error| fault(note, "numbers with spaces between them", error))?,
                    attention_factor: factor("rotary.attention_factor")?,
                }
            }
            other => {
                let words = "none, linear, llama3, dynamic, yarn or longrope";
                return Err(fault(name("rotary.scaling"), words, quoted(other)));
            }
        };
        let (base, pairing) = (factor("rotary.base")?, self.choice(&name("rotary"))?);
        let hold = self.hold(place)?;
        Ok(config.with_rotary(Rotary { base, dims, pairing, scaling, hold }))
    }

    /// `config` has been checked.
    fn weights<T: Real>(
        &self,
        place: &str,
        config: &AttentionConfig,
    ) -> Result<AttentionWeights<T>> {
        let matrix = |which: char| {
            self.matrix(&format!("{place}{which}_proj.weight"), &weights_shape(config, which))
        };
        let weights = AttentionWeights::new(matrix('q')?, matrix('k')?, matrix('v')?, matrix('o')?);
        let note = format!("{place}dijiang.biases");
        let biases = self.note(&note)?;
        if !biases.chars().all(|which| "qkvo".contains(which)) {
            return Err(fault(note, "some of the letters qkvo", quoted(biases)));
        }
        let bias = |which: char| {
            let bias = || {
                self.tensor(
                    &format!("{place}{which}_proj.bias"),
                    &weights_shape(config, which)[..1],
                    T::LIMIT,
                )
            };
            biases.contains(which).then(bias).transpose().map(|bias| bias.map(Array1::from))
        };
        let norm = |which: char| {
            let norm = || {
                let shape = config.head_dim.as_slice();
                self.tensor(&format!("{place}{which}_norm.weight"), shape, T::LIMIT)
            };
            config.qk_norm.map(|_| norm()).transpose().map(|norm| norm.map(Array1::from))
        };
        Ok(AttentionWeights {
            q_norm: norm('q')?,
            k_norm: norm('k')?,
            q_bias: bias('q')?,
            k_bias: bias('k')?,
            v_bias: bias('v')?,
            o_bias: bias('o')?,
            ..weights
        })
    }

    /// Windows and sinks.
    fn exact_part(&self, place: &str) -> Result<LinearConfig> {
        let name = |name: &str| format!("{place}dijiang.{name}");
        if self.is_first_version() {
            let config = LinearConfig::new();
            return match self.note(&name("near"))? {
                "none" => Ok(config),
                "chunks" => {
                    let chunk = self.count(&name("near.chunk"))?;
                    Ok(config.with_window(Window::new(chunk, self.count(&name("near.back"))?)))
                }
                other => Err(fault(name("near"), "none or chunks", quoted(other))),
            };
        }
        let numbers = self.counts(&name("windows"))?;
        if !numbers.len().is_multiple_of(2) {
            let got = quoted(self.note(&name("windows"))?);
            return Err(fault(name("windows"), "pairs of chunk and back", got));
        }
        let windows = numbers.chunks_exact(2).map(|pair| Window::new(pair[0], pair[1]));
        let kept = match self.note(&name("kept")) {
            Ok(_) => self.counts(&name("kept"))?,
            Err(_) => vec![0; windows.len()],
        };
        if kept.len() != windows.len() {
            return Err(fault(name("kept"), format!("{} numbers", windows.len()), kept.len()));
        }
        let windows = windows.zip(kept).map(|(window, kept)| window.with_kept(kept));
        let sinks = self.count(&name("sinks"))?;
        Ok(LinearConfig::new().with_windows(windows.collect()).with_sinks(sinks))
    }

    fn heads<T: Real>(&self, place: &str, proj: QkvProj<T>) -> Result<DijiangAttention<T>> {
        let name = |name: &str| format!("{place}dijiang.{name}");
        let config = self.exact_part(place)?;
        let dim = proj.head_dim();
        let head = |h: usize| {
            let place = name(&format!("{h}."));
            let log_decay = self.scalar(&format!("{place}log_decay"), f64::MAX)?;
            let map = DctMap::from_params(self.params::<T>(&place, dim)?);
            Ok((
                map.map_err(|error| fault_at(&place, "the parameters of a map", error))?,
                log_decay,
            ))
        };
        let heads = (0..proj.config().kv_heads).map(head).collect::<Result<Vec<_>>>()?;
        let (maps, log_decay) = heads.into_iter().unzip();
        let mut proj = proj.without_output_delta();
        let delta = name("output_delta");
        if self.metadata.info(&delta).is_some() {
            let numbers = self.matrix(&delta, &weights_shape(proj.config(), 'o'))?;
            proj = proj
                .with_output_delta(numbers)
                .map_err(|error| fault_at(&delta, "a delta that W_o has room for", error))?;
        }
        let layer = DijiangAttention::from_parts(proj, config.with_log_decay(log_decay), maps);
        layer.map_err(|error| {
            fault_at(&name(""), "maps, decays and local windows of one layer", error)
        })
    }

    /// The parameters of one head; their lengths agree, the rest is for [`DctMap::from_params`] to
    /// check.
    fn params<T: Real>(&self, place: &str, dim: usize) -> Result<DctParams> {
        let name = |name: &str| format!("{place}{name}");
        let numbers = |what: &str, shape: &[usize]| self.tensor(&name(what), shape, T::LIMIT);
        let radii = name("query.radii");
        let expected = || "F64 of one axis".to_owned();
        let info = self.info(&radii, expected)?;
        let [rows] = info.shape[..] else {
            return Err(fault(radii, expected(), format!("{:?}", info.shape)));
        };
        let (projection, scales) = match self.note(&name("projection"))? {
            "dct" => (Projection::Dct, rows),
            "mixed" => {
                (Projection::Mixed { signs: numbers("signs", &[rows / dim, 3, dim])? }, rows)
            }
            "deep" => {
                let shape = [rows / dim, 2, dim];
                (
                    Projection::Deep {
                        query: numbers("deep.query", &shape)?,
                        key: numbers("deep.key", &shape)?,
                    },
                    rows,
                )
            }
            "dense" => {
                let (query, key) =
                    (numbers("dense.query", &[rows, dim])?, numbers("dense.key", &[rows, dim])?);
                (Projection::Dense { query, key }, dim)
            }
            other => {
                return Err(fault(name("projection"), "dct, mixed, deep or dense", quoted(other)));
            }
        };
        let side = |side: &str| {
            let (center, scale) = (
                numbers(&format!("{side}.center"), &[dim])?,
                numbers(&format!("{side}.scale"), &[scales])?,
            );
            Ok(SideParams { center, scale, radii: numbers(&format!("{side}.radii"), &[rows])? })
        };
        let pairing = self.choice(&name("pairing"))?;
        let features = match pairing {
            Pairing::Single => rows,
            Pairing::Antithetic => rows.saturating_mul(2),
        };
        Ok(DctParams {
            projection,
            envelope: self.choice(&name("envelope"))?,
            pairing,
            sides: self.choice(&name("sides"))?,
            query: side("query")?,
            key: side("key")?,
            log_weight: numbers("log_weight", &[features])?,
            log_mix: self.scalar(&name("log_mix"), T::LIMIT)?,
        })
    }
}
