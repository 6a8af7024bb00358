//! Matrices with their strides: the operands of the matrix products of the inner loops.

use std::ops::Range;

/// A matrix to read. Its rows and its columns may lie at any distance from each other.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MatRef<'a, T> {
    pub(super) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(super) row_stride: usize,
    pub(super) col_stride: usize,
}

/// A matrix to write, each row of which is contiguous.
#[derive(Debug)]
pub(crate) struct MatMut<'a, T> {
    pub(super) data: &'a mut [T],
    pub(crate) rows: usize,
    pub(super) cols: usize,
    pub(super) row_stride: usize,
}

/// What a product does to the numbers it finds in its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accum {
    /// They are overwritten.
    Replace,
    /// They are added to.
    Add,
}

impl<'a, T> MatRef<'a, T> {
    /// Rows of `cols` elements each, `stride` apart.
    pub(crate) fn new(data: &'a [T], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// Rows without gaps.
    pub(crate) fn packed(data: &'a [T], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// The transpose; nothing is moved.
    pub(crate) fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }

    /// One element.
    pub(crate) fn at(self, row: usize, col: usize) -> T
    where
        T: Copy,
    {
        self.data[row * self.row_stride + col * self.col_stride]
    }

    /// Some of the columns.
    pub(crate) fn cols(self, cols: Range<usize>) -> Self {
        Self { data: &self.data[cols.start * self.col_stride..], cols: cols.len(), ..self }
    }
}

impl<'a, T> MatMut<'a, T> {
    /// Rows of `cols` elements each, `stride` apart.
    pub(crate) fn new(data: &'a mut [T], rows: usize, cols: usize, stride: usize) -> Self {
        Self { data, rows, cols, row_stride: stride }
    }

    /// Rows without gaps.
    pub(crate) fn packed(data: &'a mut [T], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }
}
