//! [`Sample`]: what softmax attention makes of a sequence.

use ndarray::{Array2, ArrayRef2};

use crate::Real;
use crate::attention::{Operator, Qkv};
use crate::check::check_same;
use crate::error::Result;
use crate::layer::{DijiangAttention, Layer, ProjectedQkv, QkvProj, softmax_of};

/// What softmax attention makes of a sequence, which calibration and plan compare with: computed
/// once, in O(n²), for a layer as it was trained, and used for every layer that takes its place.
///
/// # Examples
/// ```
/// use std::ops::ControlFlow;
///
/// use dijiang::attention::KeyMask;
/// use dijiang::calibrate::{CalibrateOptions, Sample};
/// use dijiang::kernel::DctMapConfig;
/// use dijiang::layer::{
///     Attention, AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions,
///     SoftmaxAttention,
/// };
/// use ndarray::Array2;
///
/// let matrix = |p: usize| {
///     Array2::from_shape_fn((8, 8), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3)
/// };
/// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
/// let softmax = SoftmaxAttention::new(AttentionConfig::new(8, 2), weights)?;
/// let x = Array2::from_shape_fn((200, 8), |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0);
///
/// let sample = [Sample::new(&softmax, &x)?];
/// for blocks in [1, 2] {
///     let options = DijiangOptions::new().with_map(DctMapConfig::new().with_blocks(blocks));
///     let mut layer = DijiangAttention::from_softmax(&softmax, options)?;
///     let options = CalibrateOptions::new().with_steps(0);
///     layer.calibrate_on(&sample, &options, |_| ControlFlow::Continue(()))?;
/// }
/// // The layer's output goes on to the next block of the model.
/// assert_eq!(sample[0].output(&softmax)?, softmax.forward(&x, KeyMask::All)?);
/// # Ok::<(), dijiang::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Sample<T> {
    /// Scaled queries, `[n, h·d]`.
    pub(super) x: Array2<T>,
    /// Scaled keys, `[n, h_kv·d]`.
    pub(super) y: Array2<T>,
    /// `[n, h_kv·d]`
    pub(super) v: Array2<T>,
    /// The heads' outputs, `[n, h·d]`.
    pub(super) teacher: Array2<T>,
    head_dim: usize,
}

impl<T: Real> Sample<T> {
    /// Softmax attention, with the projections of `layer`, of one sequence, positions from 0: as it
    /// was trained, without a [hold](crate::layer::Rotary::hold). The queries and keys beside it
    /// are held as `layer` holds them.
    ///
    /// # Shapes
    /// - `x`: hidden states as the layer receives them, `[n, D]`.
    ///
    /// # Cost
    /// O(n²) on all threads; keeps 2·n·(h + h_kv)·d numbers.
    ///
    /// # Errors
    /// As [`forward`](crate::layer::Attention::forward).
    pub fn new<A: Operator<T>>(layer: &Layer<T, A>, x: &ArrayRef2<T>) -> Result<Self> {
        let proj = &layer.proj;
        proj.check_sequence("samples", x)?;
        let trained = proj.clone().with_rotary_hold(None)?;
        let ProjectedQkv { mut q, mut k, v } = trained.project(x, 0);
        let exact = softmax_of(&trained, Vec::new(), 0)?;
        let mut teacher = Array2::zeros(q.raw_dim());
        {
            let (q, k, v) = (proj.heads(&q), proj.heads(&k), proj.heads(&v));
            let (mut out, mut workspace) = (proj.heads_mut(&mut teacher), exact.workspace());
            exact.forward_into(Qkv::new(&q, &k, &v), &mut out, &mut workspace)?;
        }
        if proj.config().rotary.as_ref().is_some_and(|rotary| rotary.hold.is_some()) {
            ProjectedQkv { q, k, .. } = proj.project(x, 0);
        }
        let root = T::from_f64(proj.scale().sqrt());
        q.mapv_inplace(|q| q * root);
        k.mapv_inplace(|k| k * root);
        Ok(Self { x: q, y: k, v, teacher, head_dim: proj.head_dim() })
    }

    /// What `layer` makes of the heads' outputs, `[n, D]`: of the layer the sample was made with,
    /// its output.
    ///
    /// # Errors
    /// [`Error::Foreign`](crate::Error::Foreign) for a layer of another shape.
    pub fn output<A: Operator<T>>(&self, layer: &Layer<T, A>) -> Result<Array2<T>> {
        self.check(&layer.proj)?;
        Ok(layer.proj.output(&self.teacher))
    }

    /// What `layer`'s attention makes of it, `[n, h·d]`.
    pub(super) fn outputs(&self, layer: &DijiangAttention<T>) -> Result<Array2<T>> {
        let proj = &layer.proj;
        let (q, k, v) = (proj.heads(&self.x), proj.heads(&self.y), proj.heads(&self.v));
        let attention = layer.attention.config().with_scale(1.0).build(layer.maps().to_vec())?;
        let mut out = Array2::zeros(self.x.raw_dim());
        let mut heads = proj.heads_mut(&mut out);
        let mut workspace = attention.workspace();
        attention.forward_into(Qkv::new(&q, &k, &v), &mut heads, &mut workspace)?;
        Ok(out)
    }

    /// Tokens.
    pub(super) fn len(&self) -> usize {
        self.x.nrows()
    }

    /// Whether it is of a layer of this shape.
    pub(super) fn check(&self, proj: &QkvProj<T>) -> Result<()> {
        let (config, d) = (proj.config(), proj.head_dim());
        let heads = |rows: &Array2<T>| rows.ncols() / self.head_dim;
        check_same(
            "sample",
            [
                ("head dimension", d, self.head_dim),
                ("number of heads", config.heads, heads(&self.x)),
                ("number of key-value heads", config.kv_heads, heads(&self.y)),
            ],
        )
    }
}
