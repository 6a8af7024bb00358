//! What public functions check, each once.

use ndarray::{ArrayRef, Dimension};

use crate::Real;
use crate::error::{Error, Result};

/// `got` elements where `expected` are needed.
pub(crate) fn check_len(argument: &'static str, expected: usize, got: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(Error::Length { argument, expected, got }) }
}

/// Every axis of `array` has the length `expected` names.
pub(crate) fn check_shape<T, D: Dimension>(
    argument: &'static str,
    array: &ArrayRef<T, D>,
    expected: &[usize],
) -> Result<()> {
    debug_assert_eq!(array.ndim(), expected.len());
    for (axis, (&got, &expected)) in array.shape().iter().zip(expected).enumerate() {
        if got != expected {
            return Err(Error::Shape { argument, axis, expected, got });
        }
    }
    Ok(())
}

/// What belongs to an operator, a state or scratch memory say, was made by one of the same shape:
/// pairs of what, expected and got.
pub(crate) fn check_same(
    argument: &'static str,
    pairs: impl IntoIterator<Item = (&'static str, usize, usize)>,
) -> Result<()> {
    match pairs.into_iter().find(|(_, expected, got)| expected != got) {
        Some((what, expected, got)) => Err(Error::Foreign { argument, what, expected, got }),
        None => Ok(()),
    }
}

/// A count that must be at least one.
pub(crate) fn check_positive(argument: &'static str, got: usize) -> Result<()> {
    if got > 0 { Ok(()) } else { Err(Error::Value { argument, expected: "at least 1", got: 0.0 }) }
}

/// There is room for `sizes[0]·sizes[1]·…` elements: an axis without stride costs its owner
/// nothing, and what is made of it must not bring the process down. The room is asked for and given
/// back at once.
pub(crate) fn check_room<T>(argument: &'static str, sizes: &[usize]) -> Result<()> {
    let elements = sizes.iter().fold(1, |product: usize, &size| product.saturating_mul(size));
    let mut room = Vec::<T>::new();
    let fits = room.try_reserve_exact(elements).is_ok();
    std::hint::black_box(&room); // or the compiler takes the room for granted
    // How much less there would be room for, nobody knows.
    if fits {
        Ok(())
    } else {
        Err(Error::TooLarge { argument, limit: elements - 1, got: elements })
    }
}

/// A single parameter that must be finite.
pub(crate) fn check_finite(argument: &'static str, got: f64) -> Result<()> {
    if got.is_finite() { Ok(()) } else { Err(Error::Value { argument, expected: "finite", got }) }
}

/// A single parameter that something is multiplied or divided by.
pub(crate) fn check_factor(argument: &'static str, got: f64) -> Result<()> {
    check_value(got.is_finite() && got > 0.0, argument, "finite and positive", got)
}

/// A single parameter of which something `expected` holds.
pub(crate) fn check_value(
    holds: bool,
    argument: &'static str,
    expected: &'static str,
    got: f64,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Value { argument, expected, got }) }
}

/// A number of at most this magnitude; NaN is not one.
pub(crate) fn within<T: Real>(value: T, limit: T) -> bool {
    value.abs() <= limit
}

/// Every element of `array` is finite and at most [`Real::LIMIT`] in magnitude.
pub(crate) fn check_elements<T: Real, D: Dimension>(
    argument: &'static str,
    array: &ArrayRef<T, D>,
) -> Result<()> {
    let limit = T::from_f64(T::LIMIT);
    let fits = |slice: &[T]| (T::ops().all_within)(slice, limit);
    let clean = match array.as_slice_memory_order() {
        Some(slice) => fits(slice),
        None => array.rows().into_iter().all(|row| match row.to_slice() {
            Some(slice) => fits(slice),
            None => row.iter().all(|&v| within(v, limit)),
        }),
    };
    if clean {
        return Ok(());
    }
    match array.iter().enumerate().find(|(_, v)| !within(**v, limit)) {
        Some((index, v)) => {
            Err(Error::NonFinite { argument, index, limit: T::LIMIT, got: v.to_f64() })
        }
        None => Ok(()),
    }
}
