//! Bytes of a file as burn's data set of windows.

use std::path::Path;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::Result;

/// Batches of windows.
pub(crate) type Loader = Arc<dyn DataLoader<Batch>>;

/// A text, cut into windows of one length and the byte after each.
pub(crate) struct Text {
    bytes: Vec<u8>,
    window: usize,
}

impl Text {
    /// Reads a file that holds at least one window of `window` bytes and the byte after it.
    pub(crate) fn read(path: &Path, window: usize) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        if bytes.len() <= window {
            let (path, got) = (path.display(), bytes.len());
            return Err(format!("{path}: {got} bytes are no window of {window} and one").into());
        }
        Ok(Self { bytes, window })
    }

    /// All windows, one after another.
    pub(crate) fn windows(&self) -> Vec<Vec<u8>> {
        self.spread(usize::MAX)
    }

    /// At most `count` windows, spread evenly over the text.
    pub(crate) fn spread(&self, count: usize) -> Vec<Vec<u8>> {
        let windows = (self.bytes.len() - 1) / self.window;
        let count = count.min(windows);
        let starts = (0..count).map(|i| i * windows / count * self.window);
        starts.map(|start| self.bytes[start..=start + self.window].to_vec()).collect()
    }
}

/// Some windows.
#[derive(Clone, Debug)]
pub(crate) struct Batch {
    /// `[b, n]`.
    pub(crate) inputs: Tensor<2, Int>,
    /// The byte after each, `[b, n]`.
    pub(crate) targets: Tensor<2, Int>,
}

impl Batch {
    /// Of windows with the byte after each.
    pub(crate) fn new(windows: &[Vec<u8>], device: &Device) -> Self {
        let (batch, n) = (windows.len(), windows.first().map_or(0, |window| window.len() - 1));
        let tensor = |skip: usize| {
            let bytes = windows.iter().flat_map(|window| &window[skip..skip + n]);
            let ids: Vec<i32> = bytes.map(|&byte| i32::from(byte)).collect();
            Tensor::from_data(TensorData::new(ids, [batch, n]), device)
        };
        Self { inputs: tensor(0), targets: tensor(1) }
    }
}

struct Windows;

impl Batcher<Vec<u8>, Batch> for Windows {
    fn batch(&self, items: Vec<Vec<u8>>, device: &Device) -> Batch {
        Batch::new(&items, device)
    }
}

/// Batches of `windows`, in another order every time if there is a seed.
pub(crate) fn loader(
    windows: Vec<Vec<u8>>,
    batch: usize,
    shuffle: Option<u64>,
    device: &Device,
) -> Loader {
    let builder = DataLoaderBuilder::new(Windows).batch_size(batch).set_device(device.clone());
    let builder = match shuffle {
        Some(seed) => builder.shuffle(seed),
        None => builder,
    };
    builder.build(InMemDataset::new(windows))
}
