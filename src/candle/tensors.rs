//! What lies in candle's tensors, seen as the arrays the crate works on, without copying.

use candle_core::{DType, Device, Layout, Shape, Storage, StorageRef, Tensor, WithDType};
use ndarray::{ArrayView3, ArrayViewMut3, ShapeBuilder};

use crate::Real;
use crate::error::{Error, Result};

/// In which order the axes of q, k and v lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HeadLayout {
    /// `[b, h, n, d]`: candle's models after their `transpose(1, 2)`.
    #[default]
    HeadsFirst,
    /// `[b, n, h, d]`: what a projection gives after its `reshape`, and candle's flash attention
    /// takes.
    TokensFirst,
}

impl HeadLayout {
    /// Axis of the heads, axis of the tokens.
    pub(super) fn axes(self) -> (usize, usize) {
        match self {
            HeadLayout::HeadsFirst => (1, 2),
            HeadLayout::TokensFirst => (2, 1),
        }
    }

    /// `[b, h, n, d]` in this order.
    pub(super) fn shape(self, [b, h, n, d]: [usize; 4]) -> Shape {
        match self {
            HeadLayout::HeadsFirst => Shape::from((b, h, n, d)),
            HeadLayout::TokensFirst => Shape::from((b, n, h, d)),
        }
    }

    /// One sequence's memory, without gaps in this order, as `[h, n, d]`.
    pub(super) fn split<T>(
        self,
        memory: &mut [T],
        [h, n, d]: [usize; 3],
    ) -> Result<ArrayViewMut3<'_, T>> {
        let (shape, len) = ((h, n, d), memory.len());
        let view = match self {
            HeadLayout::HeadsFirst => {
                ArrayViewMut3::from_shape(shape.strides((n * d, d, 1)), memory)
            }
            HeadLayout::TokensFirst => {
                ArrayViewMut3::from_shape(shape.strides((d, h * d, 1)), memory)
            }
        };
        view.map_err(|_| Error::Length { argument: "output", expected: h * n * d, got: len })
    }
}

/// An element type of both libraries.
pub(super) trait Element: Real + WithDType {}

impl Element for f32 {}
impl Element for f64 {}

/// Sizes of a tensor by what they count, whichever order they lie in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sizes {
    pub(super) batch: usize,
    pub(super) heads: usize,
    pub(super) tokens: usize,
    pub(super) dim: usize,
}

impl Sizes {
    /// Of a tensor of four axes on the CPU.
    pub(super) fn of(argument: &'static str, x: &Tensor, layout: HeadLayout) -> Result<Self> {
        check_cpu(argument, x)?;
        let (heads, tokens) = layout.axes();
        match *x.dims() {
            [batch, _, _, dim] => {
                Ok(Self { batch, heads: x.dims()[heads], tokens: x.dims()[tokens], dim })
            }
            _ => Err(Error::Tensor {
                argument,
                expected: "of four axes",
                got: format!("{:?}", x.dims()),
            }),
        }
    }

    /// Every size is that of `expected`.
    pub(super) fn check(
        self,
        argument: &'static str,
        expected: Self,
        layout: HeadLayout,
    ) -> Result<()> {
        let (heads, tokens) = layout.axes();
        for (axis, expected, got) in [
            (0, expected.batch, self.batch),
            (heads, expected.heads, self.heads),
            (tokens, expected.tokens, self.tokens),
            (3, expected.dim, self.dim),
        ] {
            if got != expected {
                return Err(Error::Shape { argument, axis, expected, got });
            }
        }
        Ok(())
    }
}

/// The tensor lies in the CPU's memory.
pub(super) fn check_cpu(argument: &'static str, x: &Tensor) -> Result<()> {
    match x.device() {
        Device::Cpu => Ok(()),
        other => Err(Error::Tensor {
            argument,
            expected: "on the CPU",
            got: format!("{:?}", other.location()),
        }),
    }
}

/// The tensor has elements of this type.
pub(super) fn check_dtype(
    argument: &'static str,
    x: &Tensor,
    dtype: DType,
    expected: &'static str,
) -> Result<()> {
    if x.dtype() == dtype {
        Ok(())
    } else {
        Err(Error::Tensor { argument, expected, got: format!("{:?}", x.dtype()) })
    }
}

/// The type attention is computed in for elements of this type: f64 for f64, otherwise f32.
pub(super) fn working_dtype(argument: &'static str, dtype: DType) -> Result<DType> {
    match dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        other => Err(Error::Tensor {
            argument,
            expected: "of type F64, F32, F16 or BF16",
            got: format!("{other:?}"),
        }),
    }
}

/// A mask of type U8 and this shape, row by row.
pub(super) fn mask_rows(
    mask: &Tensor,
    batch: usize,
    tokens: usize,
) -> candle_core::Result<Vec<Vec<bool>>> {
    check_cpu("key_mask", mask)?;
    check_dtype("key_mask", mask, DType::U8, "of type U8")?;
    let &[rows, columns] = mask.dims() else {
        return Err(Error::Tensor {
            argument: "key_mask",
            expected: "of two axes",
            got: format!("{:?}", mask.dims()),
        }
        .into());
    };
    for (axis, expected, got) in [(0, batch, rows), (1, tokens, columns)] {
        if got != expected {
            return Err(Error::Shape { argument: "key_mask", axis, expected, got }.into());
        }
    }
    Ok(mask
        .to_vec2::<u8>()?
        .into_iter()
        .map(|row| row.into_iter().map(|key| key != 0).collect())
        .collect())
}

/// A tensor of four axes, locked for reading.
pub(super) struct Reading<'a> {
    argument: &'static str,
    storage: StorageRef<'a>,
    layout: &'a Layout,
    order: HeadLayout,
}

impl<'a> Reading<'a> {
    pub(super) fn new(argument: &'static str, x: &'a Tensor, order: HeadLayout) -> Self {
        let (storage, layout) = x.storage_and_layout();
        Self { argument, storage, layout, order }
    }

    /// Sequence `i` of the batch as `[h, n, d]`, with whatever strides the tensor has.
    pub(super) fn sequence<T: Element>(&self, i: usize) -> candle_core::Result<ArrayView3<'_, T>> {
        let Storage::Cpu(storage) = &*self.storage else {
            let got = format!("{:?}", self.storage.device().location());
            return Err(
                Error::Tensor { argument: self.argument, expected: "on the CPU", got }.into()
            );
        };
        let (dims, strides, (heads, tokens)) =
            (self.layout.dims(), self.layout.stride(), self.order.axes());
        let elements = T::cpu_storage_as_slice(storage)?;
        let start = self.layout.start_offset() + i * strides[0];
        let shape = (dims[heads], dims[tokens], dims[3]).strides((
            strides[heads],
            strides[tokens],
            strides[3],
        ));
        let view = ArrayView3::from_shape(shape, elements.get(start..).unwrap_or_default());
        Ok(view.map_err(|_| Error::Length {
            argument: self.argument,
            expected: self.layout.shape().elem_count(),
            got: elements.len(),
        })?)
    }
}

/// candle's functions return candle's errors; ours keep their message.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        Self::wrap(error)
    }
}
