//! [`Pool`]: the states of many streams on the device.

use std::marker::PhantomData;

use cudarc::driver::CudaSlice;

use crate::call::SinkPositions;
use crate::element::Element;

/// The states of many streams, of constant size, on the device. Made by
/// [`Attention::new_pool`](crate::Attention::new_pool), fed by its `prefill` and `step`.
#[derive(Debug)]
pub struct Pool<E> {
    pub(crate) states: CudaSlice<u8>,
    pub(crate) streams: Vec<Stream>,
    /// Of the operator that made it.
    pub(crate) fingerprint: u64,
    pub(crate) element: PhantomData<E>,
}

/// What the host knows of one stream.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stream {
    pub(crate) position: usize,
    pub(crate) sinks: SinkPositions,
}

impl<E: Element> Pool<E> {
    /// How many streams there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.streams.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Position of the next token of a stream, if there is such a stream.
    #[must_use]
    pub fn position(&self, stream: usize) -> Option<usize> {
        self.streams.get(stream).map(|stream| stream.position)
    }

    /// Bytes on the device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.states.len()
    }

    /// Back to the empty state of a new sequence, if there is such a stream; nothing is done on the
    /// device.
    pub fn reset(&mut self, stream: usize) {
        if let Some(stream) = self.streams.get_mut(stream) {
            *stream = Stream::default();
        }
    }
}
