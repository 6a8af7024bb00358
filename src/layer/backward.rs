//! The backward pass of [`DijiangAttention`]: through its projections, rotary embedding and
//! attention.
//!
//! ```text
//! y = o Woᵀ + bo      ȯ = ẏ Wo      Ẇo = ẏᵀ o      ḃo = Σ_i ẏ_i
//! q = R(x Wqᵀ + bq)   q̂ = Rᵀ q̇      Ẇq = q̂ᵀ x      ḃq = Σ_i q̂_i      (k too; v without R)
//! ẋ = q̂ Wq + k̂ Wk + v̇ Wv
//! ```
//!
//! R turns pairs of coordinates (rotary embedding), so Rᵀ turns them back; a dot marks the
//! gradient. Where queries and keys have a norm, q̂ goes through it before anything else is made of
//! it.

use ndarray::{Array1, Array2, ArrayRef2, ArrayView2, ArrayViewMut2, Axis, CowArray, Ix2};

use crate::Real;
use crate::attention::{KeyMask, Operator, Qkv};
use crate::check::{check_elements, check_len, check_shape};
use crate::error::Result;
use crate::kernel::DctGradients;
use crate::layer::dijiang::DijiangAttention;
use crate::layer::qkv_proj::{ProjectedQkv, ROWS};
use crate::layer::weights::AttentionWeights;
use crate::simd::product;
use crate::threads::{for_each, max_threads};

/// The gradients of a scalar with respect to everything a layer computes its output from.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct LayerGradients<T> {
    /// Of the hidden states, `[n, D]`.
    pub x: Array2<T>,
    /// Of the projections, and of those biases and norms the layer has.
    pub weights: AttentionWeights<T>,
    /// Of the maps' parameters, one per key-value head.
    pub maps: Vec<DctGradients>,
    /// Of log γ, one per key-value head.
    pub log_decay: Vec<f64>,
}

impl<T: Real> DijiangAttention<T> {
    /// Gradients of a scalar through [`forward`](crate::layer::Attention::forward), from its
    /// gradient with respect to the output.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: n keys, `grad_out`: `[n, D]`.
    ///
    /// # Cost
    /// The attention's backward pass and one forward pass of the layer, and twice the matrix
    /// products of its projections: O(n) time and memory. Heads and rows in parallel; the same bits
    /// on any number of threads.
    ///
    /// # Errors
    /// As [`forward`](crate::layer::Attention::forward), `grad_out` being checked like `x`.
    ///
    /// # Examples
    /// ```
    /// use dijiang::attention::KeyMask;
    /// use dijiang::layer::{
    ///     AttentionConfig, AttentionWeights, DijiangAttention, DijiangOptions, SoftmaxAttention,
    /// };
    /// use ndarray::Array2;
    ///
    /// let matrix = |p: usize| {
    ///     Array2::from_shape_fn((4, 4), |(i, j)| ((i * 37 + j * p) % 17) as f64 / 17.0 - 0.3)
    /// };
    /// let weights = AttentionWeights::new(matrix(5), matrix(7), matrix(11), matrix(13));
    /// let softmax = SoftmaxAttention::new(AttentionConfig::new(4, 2), weights)?;
    /// let options = DijiangOptions::new().with_window(None);
    /// let layer = DijiangAttention::from_softmax(&softmax, options)?;
    ///
    /// let x = Array2::from_shape_fn((9, 4), |(i, j)| ((i * 13 + j * 29) % 23) as f64 / 8.0 - 1.0);
    /// let gradients = layer.backward(&x, KeyMask::All, &Array2::ones((9, 4)))?;
    /// assert_eq!(gradients.x.dim(), (9, 4));
    /// assert_eq!(gradients.weights.o.dim(), (4, 4));
    /// # Ok::<(), dijiang::Error>(())
    /// ```
    pub fn backward(
        &self,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
        grad_out: &ArrayRef2<T>,
    ) -> Result<LayerGradients<T>> {
        self.vjp(x, mask, |_| grad_out.view().into())
    }

    /// [`backward`](Self::backward) for a gradient that depends on the outputs, which are computed
    /// on the way anyway: `loss` is given them and returns the gradient with respect to them.
    ///
    /// # Shapes
    /// - `x`: `[n, D]`, `mask`: n keys, `loss`: from `[n, D]` to `[n, D]`.
    ///
    /// # Cost
    /// As [`backward`](Self::backward), and the output projection: less than
    /// [`forward`](crate::layer::Attention::forward) and `backward`, one after the other.
    ///
    /// # Errors
    /// As [`backward`](Self::backward), what `loss` returns being `grad_out`.
    pub fn backward_with(
        &self,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
        loss: impl FnOnce(Array2<T>) -> Array2<T>,
    ) -> Result<LayerGradients<T>> {
        self.vjp(x, mask, |o| loss(self.proj.output(o)).into())
    }

    /// The gradients from that with respect to the outputs, which `upstream` makes of the heads'
    /// outputs `[n, h·d]`.
    fn vjp<'g>(
        &self,
        x: &ArrayRef2<T>,
        mask: KeyMask<'_>,
        upstream: impl FnOnce(&Array2<T>) -> CowArray<'g, T, Ix2>,
    ) -> Result<LayerGradients<T>> {
        let projections = &self.proj;
        projections.check_sequence("x", x)?;
        if let KeyMask::Valid(valid) = mask {
            check_len("mask", x.nrows(), valid.len())?;
        }
        let weights = &**projections.weights();
        let ProjectedQkv { q, k, v } = projections.project(x, 0);
        let heads = |rows| projections.heads(rows);
        let (q_heads, k_heads, v_heads) = (heads(&q), heads(&k), heads(&v));

        let mut o = Array2::zeros(q.raw_dim());
        let mut workspace = self.attention.workspace();
        let o_heads = &mut projections.heads_mut(&mut o);
        let qkv = Qkv::new(&q_heads, &k_heads, &v_heads).with_mask(mask);
        self.attention.forward_into(qkv, o_heads, &mut workspace)?;
        let grad_out = upstream(&o);
        check_shape("grad_out", &grad_out, &[x.nrows(), x.ncols()])?;
        check_elements("grad_out", &grad_out)?;
        let mut grad_o = Array2::zeros(q.raw_dim());
        by_rows(grad_out.view(), &mut grad_o, |grad_out, grad_o| {
            product(grad_out, weights.o.view(), grad_o, false)
        });
        let grad_heads = projections.heads(&grad_o);
        let gradients = self.attention.backward(qkv, &grad_heads)?;
        drop((q, k, v, grad_o));

        let [mut grad_q, mut grad_k, grad_v] =
            [gradients.q, gradients.k, gradients.v].map(|heads| {
                let (h, n, d) = heads.dim();
                let mut rows = Array2::zeros((n, h * d));
                projections.heads_mut(&mut rows).assign(&heads);
                rows
            });
        projections.unrotate(&mut grad_q);
        projections.unrotate(&mut grad_k);
        let grad_norms = projections.unnorm(x, &mut grad_q, &mut grad_k);

        let mut grad_x = Array2::zeros(x.raw_dim());
        for (grad, weight) in [(&grad_q, &weights.q), (&grad_k, &weights.k), (&grad_v, &weights.v)]
        {
            by_rows(grad.view(), &mut grad_x, |grad, grad_x| {
                product(grad, weight.view(), grad_x, true)
            });
        }
        let mut of_weights = AttentionWeights::new(
            Array2::zeros(weights.q.raw_dim()),
            Array2::zeros(weights.k.raw_dim()),
            Array2::zeros(weights.v.raw_dim()),
            Array2::zeros(weights.o.raw_dim()),
        );
        let jobs = [
            (&mut of_weights.q, grad_q.view(), x.view()),
            (&mut of_weights.k, grad_k.view(), x.view()),
            (&mut of_weights.v, grad_v.view(), x.view()),
            (&mut of_weights.o, grad_out.view(), o.view()),
        ];
        for_each(
            &mut vec![(); max_threads().min(jobs.len())],
            jobs.into_iter(),
            |(), (to, grad, input)| {
                product(grad.t(), input, to.view_mut(), false);
            },
        );
        let sum = |bias: &Option<Array1<T>>, grad: ArrayView2<'_, T>| {
            bias.as_ref().map(|_| grad.sum_axis(Axis(0)))
        };
        of_weights.q_bias = sum(&weights.q_bias, grad_q.view());
        of_weights.k_bias = sum(&weights.k_bias, grad_k.view());
        of_weights.v_bias = sum(&weights.v_bias, grad_v.view());
        of_weights.o_bias = sum(&weights.o_bias, grad_out.view());
        (of_weights.q_norm, of_weights.k_norm) = grad_norms.unzip();
        Ok(LayerGradients {
            x: grad_x,
            weights: of_weights,
            maps: gradients.maps,
            log_decay: gradients.log_decay,
        })
    }
}

/// `work` on blocks of rows of both, on all threads.
fn by_rows<T: Real>(
    from: ArrayView2<'_, T>,
    to: &mut Array2<T>,
    work: impl Fn(ArrayView2<'_, T>, ArrayViewMut2<'_, T>) + Sync,
) {
    let blocks = from.nrows().div_ceil(ROWS);
    let pairs = from.axis_chunks_iter(Axis(0), ROWS).zip(to.axis_chunks_iter_mut(Axis(0), ROWS));
    for_each(&mut vec![(); max_threads().min(blocks)], pairs, |(), (from, to)| work(from, to));
}
