//! Rotary embedding as an operation of candle's graph, by the table the ndarray layer has.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::tensors::Element;
use crate::error::Error;
use crate::layer::RotaryTable;
use crate::threads::{for_each, max_threads};

/// Rows that one thread turns at a time.
const ROWS: usize = 64;

#[derive(Debug, Clone, Copy)]
enum Turn {
    Forth,
    Back,
}

/// Turns every head of every row of `[b, n, h·d]`; row j of each sequence is the token at `start` +
/// j.
struct Rotate {
    table: Arc<RotaryTable>,
    start: usize,
    turn: Turn,
}

/// `x` `[b, n, h·d]`, f32 or f64, turned by the positions from `start` on. Its backward pass turns
/// back.
pub(super) fn rotate(x: &Tensor, table: &Arc<RotaryTable>, start: usize) -> Result<Tensor> {
    x.contiguous()?.apply_op1(Rotate { table: Arc::clone(table), start, turn: Turn::Forth })
}

impl Rotate {
    fn apply<T: Element>(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (Some((start, end)), &[_, tokens, width]) =
            (layout.contiguous_offsets(), layout.dims())
        else {
            let got = format!("{layout:?}");
            return Err(Error::Tensor {
                argument: "rows to rotate",
                expected: "of three axes without gaps",
                got,
            }
            .into());
        };
        let mut rows = T::cpu_storage_as_slice(storage)?[start..end].to_vec();
        let blocks = rows.chunks_mut((tokens * width).max(1));
        let blocks =
            blocks.flat_map(|sequence| sequence.chunks_mut((ROWS * width).max(1)).enumerate());
        for_each(&mut vec![(); max_threads()], blocks, |(), (block, rows)| {
            let start = self.start + block * ROWS;
            match self.turn {
                Turn::Forth => self.table.rotate(rows, width, start, &mut self.table.angles()),
                Turn::Back => self.table.unrotate(rows, width, start),
            }
        });
        Ok((T::to_cpu_storage_owned(rows), layout.shape().clone()))
    }
}

impl CustomOp1 for Rotate {
    fn name(&self) -> &'static str {
        "dijiang-rotary"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        match storage {
            CpuStorage::F32(_) => self.apply::<f32>(storage, layout),
            CpuStorage::F64(_) => self.apply::<f64>(storage, layout),
            _ => Err(Error::Tensor {
                argument: "rows to rotate",
                expected: "of type F32 or F64",
                got: "another".to_owned(),
            }
            .into()),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let back = Rotate { table: Arc::clone(&self.table), start: self.start, turn: Turn::Back };
        Ok(Some(grad.contiguous()?.apply_op1_no_bwd(&back)?))
    }
}
