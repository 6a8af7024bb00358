//! States through serde: the bytes of [`CausalState::to_bytes`], read back with every check of
//! them.

use std::fmt::{Formatter, Result as FmtResult};
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};
use serde::ser::{Serialize, Serializer};

use super::{CausalState, Storage};
use crate::Real;

/// As the bytes of [`CausalState::to_bytes`] in [`Storage::Exact`]. Serialise those of another
/// storage yourself for less.
impl<T: Real> Serialize for CausalState<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.to_bytes(Storage::Exact))
    }
}

/// By [`CausalState::from_bytes`]: nothing unchecked becomes a state.
impl<'de, T: Real> Deserialize<'de> for CausalState<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_byte_buf(Bytes(PhantomData))
    }
}

struct Bytes<T>(PhantomData<T>);

/// Bytes that a format without any, such as JSON, is believed to have before it has shown them.
const BELIEVED: usize = 1 << 16;

impl<'de, T: Real> Visitor<'de> for Bytes<T> {
    type Value = CausalState<T>;

    fn expecting(&self, formatter: &mut Formatter<'_>) -> FmtResult {
        write!(formatter, "the bytes of a state of {}", T::NAME)
    }

    fn visit_bytes<E: Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
        CausalState::from_bytes(bytes).map_err(E::custom)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut elements: A) -> Result<Self::Value, A::Error> {
        let mut bytes = Vec::with_capacity(elements.size_hint().unwrap_or(0).min(BELIEVED));
        while let Some(byte) = elements.next_element()? {
            bytes.push(byte);
        }
        self.visit_bytes(&bytes)
    }
}
