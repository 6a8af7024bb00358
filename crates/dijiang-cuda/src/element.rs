//! [`Element`]: what q, k, v and outputs are made of.

use cudarc::driver::{DeviceRepr, ValidAsZeroBits};
use half::{bf16, f16};

mod sealed {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
}

/// Elements of q, k, v and outputs: `bf16`, `f16` or `f32`. Sums and states are f32 with each of
/// them; the first two take the tensor cores, `f32` does not (no TF32).
pub trait Element: sealed::Sealed + DeviceRepr + ValidAsZeroBits + Copy + Default + Unpin {
    /// Name of the type.
    const NAME: &'static str;
    #[doc(hidden)]
    const CODE: u32;
    /// The nearest element.
    fn from_f64(x: f64) -> Self;
    /// The number it is.
    fn to_f64(self) -> f64;
    #[doc(hidden)]
    fn to_bytes(self) -> [u8; 4];
    #[doc(hidden)]
    fn from_bytes(bytes: &[u8]) -> Self;
}

macro_rules! element {
    ($type:ty, $code:literal, $bytes:literal, $from:expr) => {
        impl Element for $type {
            const NAME: &'static str = stringify!($type);
            const CODE: u32 = $code;
            fn from_f64(x: f64) -> Self {
                $from(x)
            }
            fn to_f64(self) -> f64 {
                self.into()
            }
            fn to_bytes(self) -> [u8; 4] {
                let mut bytes = [0; 4];
                bytes[..$bytes].copy_from_slice(&self.to_le_bytes());
                bytes
            }
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut own = [0; $bytes];
                own.copy_from_slice(&bytes[..$bytes]);
                Self::from_le_bytes(own)
            }
        }
    };
}

element!(bf16, 0, 2, bf16::from_f64);
element!(f16, 1, 2, f16::from_f64);
element!(f32, 2, 4, |x| x as f32);
