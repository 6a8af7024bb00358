//! [`Product`]: candle's products with quantised weights, prepared for the CPU.

use std::borrow::Cow;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QMatMul, QStorage, QTensor};
use candle_core::{D, Device, Module, Result, Tensor};

/// Rows from which on a matrix is better dequantised for the moment and multiplied in f32.
const MANY: usize = 32;

/// y = x·Wᵀ by candle, for the stacked rows of one or several matrices.
pub(crate) struct Product(Vec<QMatMul>);

impl Product {
    /// Matrices with rows of one length, of which the outputs follow each other. Those of one type
    /// become one matrix: one product costs less than several of the same size.
    pub(crate) fn new(matrices: Vec<Arc<QTensor>>) -> Result<Self> {
        let mut stacked: Vec<Arc<QTensor>> = Vec::new();
        for matrix in matrices {
            let matrix = prepared(matrix)?;
            match stacked.pop_if(|last| last.dtype() == matrix.dtype()) {
                None => stacked.push(matrix),
                Some(last) => stacked.push(Arc::new(stack(&last, &matrix)?)),
            }
        }
        Ok(Self(stacked.into_iter().map(QMatMul::from_arc).collect::<Result<_>>()?))
    }

    /// `[n, in]` to `[n, out]`.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let many = x.dim(0)? >= MANY;
        let product = |weight: &QMatMul| match weight {
            QMatMul::QTensor(weight) if many => x.matmul(&weight.dequantize(&Device::Cpu)?.t()?),
            weight => weight.forward(x),
        };
        match &self.0[..] {
            [weight] => product(weight),
            weights => {
                let parts = weights.iter().map(product).collect::<Result<Vec<_>>>()?;
                Tensor::cat(&parts, D::Minus1)
            }
        }
    }
}

/// The weights in a type that candle multiplies with vector instructions: these three have none on
/// x86. 8 bits in place of Q4_1 cost 0.3 % of SmolLM2-135M's perplexity (2048 tokens, 2026-11-29).
fn prepared(weight: Arc<QTensor>) -> Result<Arc<QTensor>> {
    match weight.dtype() {
        GgmlDType::Q4_1 | GgmlDType::Q5_0 | GgmlDType::Q5_1 if cfg!(target_arch = "x86_64") => {
            let numbers = weight.dequantize(&Device::Cpu)?;
            Ok(Arc::new(QTensor::quantize(&numbers, GgmlDType::Q8_0)?))
        }
        _ => Ok(weight),
    }
}

/// The rows of both.
fn stack(first: &QTensor, second: &QTensor) -> Result<QTensor> {
    let ((rows, columns), (more, _)) = (first.shape().dims2()?, second.shape().dims2()?);
    let bytes = [first.data()?, second.data()?].concat();
    let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, first.dtype())?;
    QTensor::new(storage, (rows + more, columns))
}
