//! [`MapTensors`]: the numbers of one head's feature map as candle tensors, so that they can be
//! trained.

use candle_core::{DType, Device, Result, Tensor};

use crate::error::Error;
use crate::kernel::{DctGradients, DctParams, Envelope, Pairing, Projection, SideParams, Sides};

/// The parameters of one side, queries or keys: [`SideParams`] as tensors.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SideTensors {
    /// Centre μ, `[d]`.
    pub center: Tensor,
    /// Input scales s, `[G·d]` (`[d]` for a dense projection).
    pub scale: Tensor,
    /// Radii t, `[G·d]` (`[P]` for a dense projection).
    pub radii: Tensor,
}

/// [`Projection`] as tensors.
#[derive(Debug, Clone)]
pub enum ProjectionTensors {
    /// One transform per block.
    Dct,
    /// Three transforms per block with sign diagonals between them, which have no gradients.
    Mixed {
        /// `[G, 3, d]`.
        signs: Tensor,
    },
    /// Three transforms per block with scales between them.
    Deep {
        /// p and r of the queries, `[G, 2, d]`.
        query: Tensor,
        /// p and r of the keys, `[G, 2, d]`.
        key: Tensor,
    },
    /// One matrix for each side.
    Dense {
        /// W of the queries, `[P, d]`.
        query: Tensor,
        /// W of the keys, `[P, d]`.
        key: Tensor,
    },
}

/// The parameters of one key-value head's map, and its decay: [`DctParams`] as tensors.
///
/// Tensors may be of any floating-point type; they are read in f64. Those that are variables, or
/// come from variables, get gradients. To tie both sides, give the same tensor to both.
///
/// # Examples
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use dijiang::candle::{AttentionOptions, MapTensors, causal};
/// use dijiang::kernel::DctMapConfig;
///
/// // One head of dimension 8 whose radii are to be trained.
/// let mut map = MapTensors::new(&DctMapConfig::new().params(8)?, 0.0)?;
/// let radii = Var::from_tensor(&map.query.radii)?;
/// map.query.radii = radii.as_tensor().clone();
///
/// let q = Tensor::randn(0f32, 1.0, (1, 1, 20, 8), &Device::Cpu)?;
/// let out = causal(&q, &q, &q, &[map], &AttentionOptions::new())?;
/// let gradients = out.sqr()?.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&radii).expect("a gradient").dims(), [8]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MapTensors {
    /// The linear map between scales and radii.
    pub projection: ProjectionTensors,
    /// The envelope p of both sides.
    pub envelope: Envelope,
    /// Features per projected coordinate.
    pub pairing: Pairing,
    /// The query side.
    pub query: SideTensors,
    /// The key side.
    pub key: SideTensors,
    /// Log-weights w, `[m]`.
    pub log_weight: Tensor,
    /// Mix g, one element.
    pub log_mix: Tensor,
    /// log γ ≤ 0 per token, one element.
    pub log_decay: Tensor,
}

impl MapTensors {
    /// Constants with these values, in f64. [`Sides`] is not taken over.
    ///
    /// # Errors
    /// None that sound parameters lead to; candle's result type is that of its constructors.
    pub fn new(params: &DctParams, log_decay: f64) -> Result<Self> {
        let vector = |values: &[f64]| Tensor::new(values, &Device::Cpu);
        let matrix = |values: &[f64]| {
            vector(values)?.reshape((values.len() / params.dim().max(1), params.dim()))
        };
        let side = |side: &SideParams| {
            Ok::<_, candle_core::Error>(SideTensors {
                center: vector(&side.center)?,
                scale: vector(&side.scale)?,
                radii: vector(&side.radii)?,
            })
        };
        let projection = match &params.projection {
            Projection::Dct => ProjectionTensors::Dct,
            Projection::Mixed { signs } => ProjectionTensors::Mixed {
                signs: vector(signs)?.reshape((params.blocks(), 3, params.dim()))?,
            },
            Projection::Deep { query, key } => {
                let scales =
                    |values: &[f64]| vector(values)?.reshape((params.blocks(), 2, params.dim()));
                ProjectionTensors::Deep { query: scales(query)?, key: scales(key)? }
            }
            Projection::Dense { query, key } => {
                ProjectionTensors::Dense { query: matrix(query)?, key: matrix(key)? }
            }
        };
        Ok(Self {
            projection,
            envelope: params.envelope,
            pairing: params.pairing,
            query: side(&params.query)?,
            key: side(&params.key)?,
            log_weight: vector(&params.log_weight)?,
            log_mix: Tensor::new(params.log_mix, &Device::Cpu)?,
            log_decay: Tensor::new(log_decay, &Device::Cpu)?,
        })
    }

    /// The present values, and log γ. Sides are [`Sides::Untied`].
    ///
    /// # Errors
    /// [`Error::Tensor`] for a tensor that is not of floating-point numbers on the CPU.
    pub fn params(&self) -> Result<(DctParams, f64)> {
        let values = Self::pack(std::slice::from_ref(self))?.to_vec1::<f64>()?;
        self.read(&mut &values[..])
    }

    /// Every tensor with the name it has in files, after `dijiang.{h}.`.
    pub fn named(&self) -> Vec<(&'static str, &Tensor)> {
        let mut named = vec![
            ("query.center", &self.query.center),
            ("query.scale", &self.query.scale),
            ("query.radii", &self.query.radii),
            ("key.center", &self.key.center),
            ("key.scale", &self.key.scale),
            ("key.radii", &self.key.radii),
            ("log_weight", &self.log_weight),
            ("log_mix", &self.log_mix),
            ("log_decay", &self.log_decay),
        ];
        match &self.projection {
            ProjectionTensors::Dct => {}
            ProjectionTensors::Mixed { signs } => named.push(("signs", signs)),
            ProjectionTensors::Deep { query, key } => {
                named.extend([("deep.query", query), ("deep.key", key)])
            }
            ProjectionTensors::Dense { query, key } => {
                named.extend([("dense.query", query), ("dense.key", key)])
            }
        }
        named
    }

    /// All numbers of all heads that have gradients, one after another in the order of
    /// [`named`](Self::named), in f64.
    pub(super) fn pack(maps: &[Self]) -> Result<Tensor> {
        let mut parts = Vec::new();
        for (name, tensor) in maps.iter().flat_map(Self::named).filter(|(name, _)| *name != "signs")
        {
            if !(tensor.dtype().is_float() && tensor.device().is_cpu()) {
                let got = format!("{:?} on {:?}", tensor.dtype(), tensor.device().location());
                return Err(Error::Tensor {
                    argument: name,
                    expected: "of floating-point numbers, on the CPU",
                    got,
                }
                .into());
            }
            parts.push(tensor.flatten_all()?.to_dtype(DType::F64)?);
        }
        Tensor::cat(&parts, 0)
    }

    /// This head's parameters from what [`pack`](Self::pack) made, which is shortened by them.
    pub(super) fn read(&self, values: &mut &[f64]) -> Result<(DctParams, f64)> {
        let mut take = |tensor: &Tensor| {
            let (taken, rest) = values.split_at(tensor.elem_count().min(values.len()));
            *values = rest;
            taken.to_vec()
        };
        let mut side = |side: &SideTensors| SideParams {
            center: take(&side.center),
            scale: take(&side.scale),
            radii: take(&side.radii),
        };
        let (query, key) = (side(&self.query), side(&self.key));
        let log_weight = take(&self.log_weight);
        let (log_mix, log_decay) =
            (single("log_mix", take(&self.log_mix))?, single("log_decay", take(&self.log_decay))?);
        let projection = match &self.projection {
            ProjectionTensors::Dct => Projection::Dct,
            ProjectionTensors::Mixed { signs } => {
                Projection::Mixed { signs: signs.flatten_all()?.to_dtype(DType::F64)?.to_vec1()? }
            }
            ProjectionTensors::Deep { query, key } => {
                Projection::Deep { query: take(query), key: take(key) }
            }
            ProjectionTensors::Dense { query, key } => {
                Projection::Dense { query: take(query), key: take(key) }
            }
        };
        let (envelope, pairing, sides) = (self.envelope, self.pairing, Sides::Untied);
        Ok((
            DctParams { projection, envelope, pairing, sides, query, key, log_weight, log_mix },
            log_decay,
        ))
    }

    /// The same with every tensor replaced by what `replace` makes of it and its name.
    ///
    /// # Errors
    /// Those of `replace`.
    pub fn try_map(
        &self,
        mut replace: impl FnMut(&'static str, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        let mut side = |names: [&'static str; 3], side: &SideTensors| {
            let [center, scale, radii] = names;
            Ok::<_, candle_core::Error>(SideTensors {
                center: replace(center, &side.center)?,
                scale: replace(scale, &side.scale)?,
                radii: replace(radii, &side.radii)?,
            })
        };
        Ok(Self {
            envelope: self.envelope,
            pairing: self.pairing,
            query: side(["query.center", "query.scale", "query.radii"], &self.query)?,
            key: side(["key.center", "key.scale", "key.radii"], &self.key)?,
            log_weight: replace("log_weight", &self.log_weight)?,
            log_mix: replace("log_mix", &self.log_mix)?,
            log_decay: replace("log_decay", &self.log_decay)?,
            projection: match &self.projection {
                ProjectionTensors::Dct => ProjectionTensors::Dct,
                ProjectionTensors::Mixed { signs } => {
                    ProjectionTensors::Mixed { signs: replace("signs", signs)? }
                }
                ProjectionTensors::Deep { query, key } => ProjectionTensors::Deep {
                    query: replace("deep.query", query)?,
                    key: replace("deep.key", key)?,
                },
                ProjectionTensors::Dense { query, key } => ProjectionTensors::Dense {
                    query: replace("dense.query", query)?,
                    key: replace("dense.key", key)?,
                },
            },
        })
    }
}

fn single(argument: &'static str, values: Vec<f64>) -> Result<f64> {
    match values[..] {
        [value] => Ok(value),
        _ => Err(Error::Length { argument, expected: 1, got: values.len() }.into()),
    }
}

/// Gradients in the order of [`MapTensors::named`].
pub(super) fn packed_gradients(map: &DctGradients, log_decay: f64) -> impl Iterator<Item = f64> {
    let side = |side: &crate::kernel::SideGradients| {
        [side.center.clone(), side.scale.clone(), side.radii.clone()].concat()
    };
    let scalars = [map.log_mix, log_decay];
    let projections = [map.query.projection.clone(), map.key.projection.clone()].concat();
    let parts =
        [side(&map.query), side(&map.key), map.log_weight.clone(), scalars.to_vec(), projections];
    parts.into_iter().flatten()
}
