//! What the examples share: a small byte-level language model of burn's own layers, its text, and
//! burn's learner to train it.

use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderBuilder};
use burn::data::dataset::InMemDataset;
use burn::module::Module;
use burn::nn::attention::{
    MhaInput, MultiHeadAttention, MultiHeadAttentionConfig, generate_autoregressive_mask,
};
use burn::nn::loss::CrossEntropyLossConfig;
use burn::nn::transformer::{PositionWiseFeedForward, PositionWiseFeedForwardConfig};
use burn::nn::{Embedding, EmbeddingConfig, LayerNorm, LayerNormConfig, Linear, LinearConfig};
use burn::optim::AdamWConfig;
use burn::tensor::{Device, Int, Tensor, TensorData};
use burn::train::metric::{LossMetric, PerplexityMetric};
use burn::train::{
    ClassificationOutput, InferenceStep, Learner, SupervisedTraining, TrainOutput, TrainStep,
};
use dijiang::attention::Causality;
use dijiang::calibrate::CalibrateOptions;
use dijiang::layer::DijiangOptions;
use dijiang_burn::{DijiangAttention, Error};

/// Every byte is a token.
const VOCABULARY: usize = 256;

/// The attention of a block, before the exchange or after it.
#[derive(Module, Debug)]
#[allow(clippy::large_enum_variant)]
pub enum Mixer {
    Softmax(MultiHeadAttention),
    Linear(DijiangAttention),
}

#[derive(Module, Debug)]
pub struct Block {
    attention_norm: LayerNorm,
    mixer: Mixer,
    feed_norm: LayerNorm,
    feed: PositionWiseFeedForward,
}

#[derive(Module, Debug)]
pub struct TextModel {
    tokens: Embedding,
    positions: Embedding,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl TextModel {
    /// A model with softmax attention: `layers` blocks of width `d_model`, heads of 32.
    pub fn new(d_model: usize, layers: usize, context: usize, device: &Device) -> Self {
        let norm = || LayerNormConfig::new(d_model).init(device);
        let block = |_| Block {
            attention_norm: norm(),
            mixer: Mixer::Softmax(
                MultiHeadAttentionConfig::new(d_model, d_model / 32).with_dropout(0.0).init(device),
            ),
            feed_norm: norm(),
            feed: PositionWiseFeedForwardConfig::new(d_model, 4 * d_model)
                .with_dropout(0.0)
                .init(device),
        };
        Self {
            tokens: EmbeddingConfig::new(VOCABULARY, d_model).init(device),
            positions: EmbeddingConfig::new(context, d_model).init(device),
            blocks: (0..layers).map(block).collect(),
            norm: norm(),
            head: LinearConfig::new(d_model, VOCABULARY).init(device),
        }
    }

    /// Logits `[b, n, 256]` of the next bytes; `see` is shown what each block's attention is given.
    pub fn forward(
        &self,
        tokens: Tensor<2, Int>,
        mut see: impl FnMut(&Tensor<3>),
    ) -> Result<Tensor<3>, Error> {
        let [batch, n] = tokens.dims();
        let device = tokens.device();
        let positions = Tensor::<1, Int>::arange(0..n as i64, &device).reshape([1, n]);
        let mut x = self.tokens.forward(tokens) + self.positions.forward(positions);
        for block in &self.blocks {
            let normed = block.attention_norm.forward(x.clone());
            see(&normed);
            x = x + match &block.mixer {
                Mixer::Softmax(attention) => {
                    let mask = generate_autoregressive_mask(batch, n, &device);
                    attention.forward(MhaInput::self_attn(normed).mask_attn(mask)).context
                }
                Mixer::Linear(attention) => attention.forward(normed)?,
            };
            x = x.clone() + block.feed.forward(block.feed_norm.forward(x));
        }
        Ok(self.head.forward(self.norm.forward(x)))
    }

    /// Exchanges the attention of every block; fits the maps to these texts, if there are any.
    pub fn exchange(
        &self,
        options: &DijiangOptions,
        texts: Option<Tensor<2, Int>>,
    ) -> Result<Self, Error> {
        let mut hidden = Vec::new();
        if let Some(texts) = texts {
            self.forward(texts, |x| hidden.push(x.clone()))?;
        }
        let (mut exchanged, mut hidden) = (self.clone(), hidden.into_iter());
        for block in &mut exchanged.blocks {
            let Mixer::Softmax(softmax) = &block.mixer else { continue };
            let mut linear =
                DijiangAttention::from_mha(softmax, Causality::Causal, options.clone())?;
            if let Some(x) = hidden.next() {
                linear.calibrate(x, &CalibrateOptions::new(), |_| ControlFlow::Continue(()))?;
            }
            block.mixer = Mixer::Linear(linear);
        }
        Ok(exchanged)
    }

    /// Mean loss in bits per byte.
    pub fn bits_per_byte(&self, texts: &[TextBatch]) -> Result<f64, Error> {
        let mut bits = 0.0;
        for text in texts {
            let loss = self.output(text.clone())?.loss;
            bits += loss.into_scalar::<f64>() / 2f64.ln() / texts.len() as f64;
        }
        Ok(bits)
    }

    fn output(&self, text: TextBatch) -> Result<ClassificationOutput, Error> {
        let logits = self.forward(text.inputs, |_| ())?.flatten::<2>(0, 1);
        let targets = text.targets.flatten::<1>(0, 1);
        let loss = CrossEntropyLossConfig::new().init(&logits.device());
        let loss = loss.forward(logits.clone(), targets.clone());
        Ok(ClassificationOutput::new(loss, logits, targets))
    }
}

impl TrainStep for TextModel {
    type Input = TextBatch;
    type Output = ClassificationOutput;

    fn step(&self, text: TextBatch) -> TrainOutput<ClassificationOutput> {
        let output = self.output(text).expect("texts are as long as the model's context");
        let gradients = output.loss.backward();
        TrainOutput::new(self, gradients, output)
    }
}

impl InferenceStep for TextModel {
    type Input = TextBatch;
    type Output = ClassificationOutput;

    fn step(&self, text: TextBatch) -> ClassificationOutput {
        self.output(text).expect("texts are as long as the model's context")
    }
}

/// Texts of one length: `[b, n]` bytes and the bytes after them.
#[derive(Debug, Clone)]
pub struct TextBatch {
    pub inputs: Tensor<2, Int>,
    pub targets: Tensor<2, Int>,
}

/// Makes batches of texts of n + 1 bytes.
#[derive(Debug, Clone, Copy)]
pub struct TextBatcher;

impl Batcher<Vec<u8>, TextBatch> for TextBatcher {
    fn batch(&self, items: Vec<Vec<u8>>, device: &Device) -> TextBatch {
        let (batch, n) = (items.len(), items[0].len() - 1);
        let tensor = |start: usize| {
            let bytes = items.iter().flat_map(|item| &item[start..start + n]);
            let bytes: Vec<i64> = bytes.map(|&byte| i64::from(byte)).collect();
            Tensor::from_data(TensorData::new(bytes, [batch, n]), device)
        };
        TextBatch { inputs: tensor(0), targets: tensor(1) }
    }
}

/// The first `count` texts of `context` + 1 bytes of a file of the repository's example data.
pub fn texts(file: &str, context: usize, count: usize) -> std::io::Result<Vec<Vec<u8>>> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples/data/lm-kjv");
    let bytes = fs::read(data.join(file))?;
    Ok(bytes.chunks_exact(context + 1).take(count).map(<[u8]>::to_vec).collect())
}

/// Trains by burn's learner, with its progress and metrics; its log goes to `directory`.
pub fn train(
    model: TextModel,
    (training, validation): (Vec<Vec<u8>>, Vec<Vec<u8>>),
    (epochs, learning_rate): (usize, f64),
    directory: &Path,
) -> TextModel {
    let loader = |texts, device| -> Arc<dyn DataLoader<TextBatch>> {
        DataLoaderBuilder::new(TextBatcher)
            .batch_size(8)
            .shuffle(0)
            .set_device(device)
            .build(InMemDataset::new(texts))
    };
    let device = model.head.weight.val().device();
    let (training, validation) =
        (loader(training, device.clone()), loader(validation, device.inner()));
    SupervisedTraining::new(directory, training, validation)
        .metrics((LossMetric::new(), PerplexityMetric::new()))
        .num_epochs(epochs)
        .summary()
        .launch(Learner::new(model, AdamWConfig::new().init(), learning_rate))
        .model
}
