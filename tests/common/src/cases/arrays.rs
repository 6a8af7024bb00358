//! Arrays of any layout.

use dijiang::Real;
use ndarray::{Array3, ArrayView3, Axis, s};

/// How an array lies in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layout {
    Standard,
    /// Columns one after another.
    Columns,
    /// Every second element, NaN between them.
    Gaps,
    /// Every axis backwards.
    Backwards,
}

pub const LAYOUTS: [Layout; 4] =
    [Layout::Standard, Layout::Columns, Layout::Gaps, Layout::Backwards];

/// An array laid out in some way; [`view`](Self::view) is the array.
#[derive(Debug, Clone)]
pub struct Laid<T> {
    layout: Layout,
    memory: Array3<T>,
}

impl<T: Real> Laid<T> {
    pub fn new(layout: Layout, array: &Array3<T>) -> Self {
        let (a, b, c) = array.dim();
        let memory = match layout {
            Layout::Standard => array.clone(),
            Layout::Columns => array.view().reversed_axes().as_standard_layout().into_owned(),
            Layout::Gaps => {
                let mut memory = Array3::from_elem((a, b, 2 * c), T::from_f64(f64::NAN));
                memory.slice_mut(s![.., .., ..;2]).assign(array);
                memory
            }
            Layout::Backwards => {
                array.slice(s![..;-1, ..;-1, ..;-1]).as_standard_layout().into_owned()
            }
        };
        Self { layout, memory }
    }

    pub fn view(&self) -> ArrayView3<'_, T> {
        match self.layout {
            Layout::Standard => self.memory.view(),
            Layout::Columns => self.memory.view().reversed_axes(),
            Layout::Gaps => self.memory.slice(s![.., .., ..;2]),
            Layout::Backwards => {
                let mut view = self.memory.view();
                (0..3).for_each(|axis| view.invert_axis(Axis(axis)));
                view
            }
        }
    }
}
