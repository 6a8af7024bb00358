//! [`FeatureMaps`]: the numbers of all heads' feature maps as parameters of a module, and the
//! log-features they make.

use burn::module::{Module, Param};
use burn::tensor::{DType, Device, Element, Int, Tensor, TensorData};
use dijiang::kernel::{DctParams, Envelope, Pairing, Projection, SideParams, Sides};
use dijiang::reference::dct_matrix;

use crate::config::ProjectionKind;
use crate::error::{Error, Result};

/// The parameters of one side of every head, queries or keys.
#[derive(Module, Debug)]
pub struct SideMaps {
    /// Centres μ, `[h_kv, d]`.
    pub center: Param<Tensor<2>>,
    /// Input scales s, `[h_kv, G·d]` (`[h_kv, d]` for a dense projection).
    pub scale: Param<Tensor<2>>,
    /// Radii t, `[h_kv, P]`, P = G·d.
    pub radii: Param<Tensor<2>>,
    /// What only this side has of the projection: p and r of a deep one, `[h_kv, 2·G, d]`, W of a
    /// dense one, `[h_kv, P, d]`, nothing of others.
    pub projection: Option<Param<Tensor<3>>>,
}

/// The feature maps of all key-value heads and their decays, as module parameters: they train, and
/// burn's stores save and load them. The equations are in [`dijiang::kernel`].
#[derive(Module, Debug)]
pub struct FeatureMaps {
    /// The query side.
    pub query: SideMaps,
    /// The key side.
    pub key: SideMaps,
    /// Log-weights w, `[h_kv, m]`.
    pub log_weight: Param<Tensor<2>>,
    /// Mixes g, `[h_kv]`.
    pub log_mix: Param<Tensor<1>>,
    /// log γ, `[h_kv]`. Used as min(log γ, 0), so that an optimizer may overshoot; a bidirectional
    /// layer does not use it.
    pub log_decay: Param<Tensor<1>>,
    /// The diagonals of a mixed projection, `[h_kv, 3·G, d]`, which are not trained.
    pub signs: Option<Param<Tensor<3>>>,
    #[module(skip)]
    pub(crate) kind: MapKind,
}

/// What all heads' maps have in common.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct MapKind {
    pub(crate) projection: ProjectionKind,
    pub(crate) envelope: Envelope,
    pub(crate) pairing: Pairing,
}

impl MapKind {
    pub(crate) fn of(params: &DctParams) -> Self {
        let projection = match params.projection {
            Projection::Dct => ProjectionKind::Dct,
            Projection::Mixed { .. } => ProjectionKind::Mixed,
            Projection::Deep { .. } => ProjectionKind::Deep,
            Projection::Dense { .. } => ProjectionKind::Dense,
        };
        Self { projection, envelope: params.envelope, pairing: params.pairing }
    }
}

impl FeatureMaps {
    /// Of one [`DctParams`] per key-value head, all of one shape, which are not checked.
    pub(crate) fn new(
        params: &[DctParams],
        log_decay: &[f64],
        (device, dtype): (&Device, DType),
    ) -> Result<Self> {
        let Some(first) = params.first() else {
            return Err(dijiang::Error::Empty { argument: "maps" }.into());
        };
        let (kind, heads, dim) = (MapKind::of(first), params.len(), first.dim());
        for params in params {
            let shape =
                |params: &DctParams| [params.dim(), params.query.radii.len(), params.features()];
            if MapKind::of(params) != kind || shape(params) != shape(first) {
                let other = "a map of another kind in the same layer";
                return Err(dijiang::Error::Conflict { argument: "map", other }.into());
            }
        }
        let data =
            |of: &dyn Fn(&DctParams) -> Vec<f64>| params.iter().flat_map(of).collect::<Vec<f64>>();
        let matrix = |values: Vec<f64>| {
            let shape = [heads, values.len() / heads];
            Param::from_tensor(Tensor::<2>::from_data(
                TensorData::new(values, shape),
                (device, dtype),
            ))
        };
        let vector = |values: Vec<f64>| {
            let shape = [values.len()];
            Param::from_tensor(Tensor::<1>::from_data(
                TensorData::new(values, shape),
                (device, dtype),
            ))
        };
        let cube = |values: Vec<f64>| {
            (!values.is_empty()).then(|| {
                let shape = [heads, values.len() / (heads * dim), dim];
                let data = TensorData::new(values, shape);
                Param::from_tensor(Tensor::<3>::from_data(data, (device, dtype)))
            })
        };
        let side = |of: &dyn Fn(&DctParams) -> (&SideParams, &[f64])| SideMaps {
            center: matrix(data(&|params| of(params).0.center.clone())),
            scale: matrix(data(&|params| of(params).0.scale.clone())),
            radii: matrix(data(&|params| of(params).0.radii.clone())),
            projection: cube(data(&|params| of(params).1.to_vec())),
        };
        Ok(Self {
            query: side(&|params| (&params.query, sides(&params.projection).0)),
            key: side(&|params| (&params.key, sides(&params.projection).1)),
            log_weight: matrix(data(&|params| params.log_weight.clone())),
            log_mix: vector(params.iter().map(|params| params.log_mix).collect()),
            log_decay: vector(log_decay.to_vec()),
            signs: cube(data(&|params| match &params.projection {
                Projection::Mixed { signs } => signs.clone(),
                _ => Vec::new(),
            }))
            .map(|signs| signs.set_require_grad(false)),
            kind,
        })
    }

    /// Key-value heads.
    pub fn heads(&self) -> usize {
        self.log_mix.lazy_shape()[0]
    }

    /// Features m of a head.
    pub fn features(&self) -> usize {
        self.log_weight.lazy_shape()[1]
    }

    /// Head dimension d.
    pub fn dim(&self) -> usize {
        self.query.center.lazy_shape()[1]
    }

    /// log γ as it is used.
    pub(crate) fn decay(&self) -> Tensor<1> {
        self.log_decay.val().clamp_max(0.0)
    }

    /// All numbers with gradients, one after another in the order in which [`read`](Self::read)
    /// takes them.
    pub(crate) fn pack(&self) -> Tensor<1> {
        let mut parts = Vec::new();
        for side in [&self.query, &self.key] {
            parts.extend(
                [&side.center, &side.scale, &side.radii].map(|x| x.val().flatten::<1>(0, 1)),
            );
            parts.extend(side.projection.as_ref().map(|x| x.val().flatten::<1>(0, 2)));
        }
        parts.extend([self.log_weight.val().flatten::<1>(0, 1), self.log_mix.val(), self.decay()]);
        Tensor::cat(parts, 0)
    }

    /// Where [`pack`](Self::pack) puts what, and the signs.
    pub(crate) fn layout(&self) -> Result<Layout> {
        let per_head = |x: &Param<Tensor<2>>| x.lazy_shape()[1];
        let projection =
            self.query.projection.as_ref().map_or(0, |x| x.lazy_shape()[1] * x.lazy_shape()[2]);
        let signs = self.signs.as_ref().map(|signs| elements(signs.val())).transpose()?;
        Ok(Layout {
            kind: self.kind,
            heads: self.heads(),
            side: [
                per_head(&self.query.center),
                per_head(&self.query.scale),
                per_head(&self.query.radii),
                projection,
            ],
            features: self.features(),
            signs,
        })
    }

    /// The present values, one [`DctParams`] per key-value head, and log γ. Sides are
    /// [`Sides::Untied`].
    ///
    /// # Errors
    /// [`Error::Tensor`] if the device does not give them.
    pub fn params(&self) -> Result<(Vec<DctParams>, Vec<f64>)> {
        Ok(self.layout()?.read(&elements(self.pack())?))
    }

    /// What the log-features of some of the heads are made of.
    pub(crate) fn prepare(&self, heads: Option<&Tensor<1, Int>>) -> Prepared {
        let (dim, like) = (self.dim(), working(self.log_mix.val()));
        let (device, dtype) = (like.device(), like.dtype());
        let cosines: Vec<f64> = dct_matrix(dim).into_iter().collect();
        let cosines =
            Tensor::<2>::from_data(TensorData::new(cosines, [dim, dim]), (&device, dtype));
        let signs = self.signs.as_ref().map(|signs| working(signs.val()));
        let side = |side: &SideMaps| PreparedSide {
            matrix: of_heads(side.matrix(self.kind.projection, &cosines, signs.as_ref()), heads),
            center: of_heads(working(side.center.val()), heads),
        };
        Prepared {
            query: side(&self.query),
            key: side(&self.key),
            log_weight: of_heads(working(self.log_weight.val()), heads),
            log_mix: of_heads(like, heads),
            log_decay: of_heads(working(self.decay()), heads),
            kind: self.kind,
        }
    }
}

/// What only one side has of a projection, queries and keys.
fn sides(projection: &Projection) -> (&[f64], &[f64]) {
    match projection {
        Projection::Dct | Projection::Mixed { .. } => (&[], &[]),
        Projection::Deep { query, key } | Projection::Dense { query, key } => (query, key),
    }
}

/// The type that attention is computed in: f32 for what is narrower.
pub(crate) fn working<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    match x.dtype() {
        DType::F32 | DType::F64 => x,
        _ => x.cast(DType::F32),
    }
}

/// The rows of some heads, or of all.
fn of_heads<const D: usize>(x: Tensor<D>, heads: Option<&Tensor<1, Int>>) -> Tensor<D> {
    match heads {
        Some(heads) => x.select(0, heads.clone()),
        None => x,
    }
}

/// The elements on the host, converted.
pub(crate) fn elements<T: Element, const D: usize>(x: Tensor<D>) -> Result<Vec<T>> {
    x.try_into_vec_as().map_err(|error| unreadable(&error))
}

/// A device does not give what is on it.
pub(crate) fn unreadable(error: &dyn std::fmt::Debug) -> Error {
    let got = format!("{error:?}");
    Error::Tensor { argument: "tensor", expected: "readable from its device", got }
}

impl SideMaps {
    /// t ⊙ C(s ⊙ ·) and its kin written out, `[h_kv, P, d]`.
    fn matrix(
        &self,
        kind: ProjectionKind,
        cosines: &Tensor<2>,
        signs: Option<&Tensor<3>>,
    ) -> Tensor<3> {
        let [dim, _] = cosines.dims();
        let [heads, rows] = self.radii.val().dims();
        let blocks = rows / dim;
        let scale = working(self.scale.val());
        let radii = working(self.radii.val()).reshape([heads, rows, 1]);
        // C · diag(·) of every block, `[h_kv·G, d, d]`.
        let cosines = cosines.clone().reshape([1, dim, dim]);
        let of_blocks = |diagonal: Tensor<2>| diagonal.reshape([heads * blocks, 1, dim]);
        let diagonal = |of: &Tensor<3>, which: usize, count: usize| {
            of.clone().reshape([heads * blocks, count, dim]).narrow(1, which, 1)
        };
        let matrix = match (kind, signs, self.projection.as_ref().map(|x| working(x.val()))) {
            (ProjectionKind::Mixed, Some(signs), _) => {
                let first = cosines.clone() * of_blocks(scale) * diagonal(signs, 2, 3);
                let second = (cosines.clone() * diagonal(signs, 1, 3)).matmul(first);
                (cosines * diagonal(signs, 0, 3)).matmul(second)
            }
            (ProjectionKind::Deep, _, Some(scales)) => {
                let first = cosines.clone() * diagonal(&scales, 0, 2);
                let back = cosines.clone().swap_dims(1, 2) * diagonal(&scales, 1, 2);
                (cosines * of_blocks(scale)).matmul(back.matmul(first))
            }
            (ProjectionKind::Dense, _, Some(matrix)) => matrix * scale.reshape([heads, 1, dim]),
            _ => cosines * of_blocks(scale),
        };
        matrix.reshape([heads, rows, dim]) * radii
    }
}

/// Where the numbers of a layer's maps lie in one vector.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    kind: MapKind,
    heads: usize,
    /// Elements per head of centre, scale, radii and projection, of either side.
    side: [usize; 4],
    features: usize,
    signs: Option<Vec<f64>>,
}

impl Layout {
    /// Elements per head of every part, in order.
    fn parts(&self) -> impl Iterator<Item = usize> {
        self.side.into_iter().chain(self.side).chain([self.features, 1, 1])
    }

    /// Each head's parameters and log γ.
    pub(crate) fn read(&self, packed: &[f64]) -> (Vec<DctParams>, Vec<f64>) {
        (0..self.heads)
            .map(|head| {
                let mut start = 0;
                let mut parts = self.parts().map(|len| {
                    let part = &packed[start + head * len..][..len];
                    start += self.heads * len;
                    part.to_vec()
                });
                let mut part = || parts.next().unwrap_or_default();
                let mut side = || {
                    let mut side = DctParams::new(1).query;
                    (side.center, side.scale, side.radii) = (part(), part(), part());
                    (side, part())
                };
                let ((query, of_query), (key, of_key)) = (side(), side());
                let mut params = DctParams::new(1);
                params.projection = match self.kind.projection {
                    ProjectionKind::Dct => Projection::Dct,
                    ProjectionKind::Mixed => {
                        let len = 3 * self.side[2];
                        let signs = self.signs.as_deref().unwrap_or_default();
                        Projection::Mixed { signs: signs[head * len..][..len].to_vec() }
                    }
                    ProjectionKind::Deep => Projection::Deep { query: of_query, key: of_key },
                    ProjectionKind::Dense => Projection::Dense { query: of_query, key: of_key },
                };
                (params.envelope, params.pairing) = (self.kind.envelope, self.kind.pairing);
                (params.sides, params.query, params.key) = (Sides::Untied, query, key);
                params.log_weight = part();
                params.log_mix = part()[0];
                (params, part()[0])
            })
            .unzip()
    }

    /// The gradients of every head in the order of [`read`](Self::read): `of_heads[h][part]`.
    pub(crate) fn write(&self, of_heads: &[[&[f64]; 11]]) -> Vec<f64> {
        (0..11).flat_map(|part| of_heads.iter().flat_map(move |head| head[part]).copied()).collect()
    }
}

/// One side of [`Prepared`].
#[derive(Debug)]
struct PreparedSide {
    /// `[h_kv, P, d]`.
    matrix: Tensor<3>,
    /// `[h_kv, d]`.
    center: Tensor<2>,
}

/// What log-features are made of.
#[derive(Debug)]
pub(crate) struct Prepared {
    query: PreparedSide,
    key: PreparedSide,
    log_weight: Tensor<2>,
    log_mix: Tensor<1>,
    /// log γ ≤ 0, `[h_kv]`.
    pub(crate) log_decay: Tensor<1>,
    kind: MapKind,
}

impl Prepared {
    /// a_f, mix included: `[b, h_kv, n, d]` to `[b, h_kv, n, m]`.
    pub(crate) fn query_features(&self, x: Tensor<4>) -> Tensor<4> {
        let (heads, centers) = (self.log_mix.dims()[0], &self.query.center);
        let across =
            (centers.clone() * self.key.center.clone()).sum_dim(1).reshape([1, heads, 1, 1]);
        let rest =
            along(&x, &self.key.center) - across + self.log_mix.clone().reshape([1, heads, 1, 1]);
        self.features(&self.query, x) + rest
    }

    /// b_f: `[b, h_kv, n, d]` to `[b, h_kv, n, m]`.
    pub(crate) fn key_features(&self, y: Tensor<4>) -> Tensor<4> {
        let [heads, m] = self.log_weight.dims();
        let rest = along(&y, &self.query.center);
        self.features(&self.key, y) + rest + self.log_weight.clone().reshape([1, heads, 1, m])
    }

    /// ±u_f(z − μ) + p(z − μ).
    fn features(&self, side: &PreparedSide, z: Tensor<4>) -> Tensor<4> {
        let [heads, _, dim] = side.matrix.dims();
        let z = z - side.center.clone().reshape([1, heads, 1, dim]);
        let u = z.clone().matmul(side.matrix.clone().swap_dims(1, 2).unsqueeze_dim(0));
        let u = match self.kind.pairing {
            Pairing::Single => u,
            Pairing::Antithetic => Tensor::cat(vec![u.clone(), u.neg()], 3),
        };
        match self.kind.envelope {
            Envelope::None => u,
            Envelope::Gaussian => u - z.square().sum_dim(3) * 0.5,
        }
    }
}

/// z·μ of every row, `[b, h_kv, n, 1]`.
fn along(z: &Tensor<4>, center: &Tensor<2>) -> Tensor<4> {
    let [heads, dim] = center.dims();
    z.clone().matmul(center.clone().reshape([1, heads, dim, 1]))
}
