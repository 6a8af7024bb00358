//! [`Writer`]: what becomes a file.

use std::slice::from_ref;

use ndarray::ArrayViewD;
use safetensors::tensor::Dtype;

use super::{CHECKSUM, Checksum, HOLD, VERSION, Word, config_notes, dtype, weights_shape};
use crate::Real;
use crate::error::{Error, Result};
use crate::files::MAX_HEADER;
use crate::kernel::{DctParams, Projection};
use crate::layer::{Attention, DijiangAttention};

/// A file being put together: metadata and tensors in the order they are written. The `safetensors`
/// crate would write the metadata in another order each time.
pub(super) struct Writer<'a, T> {
    notes: Vec<(String, String)>,
    tensors: Vec<(String, Vec<usize>, Numbers<'a, T>)>,
}

enum Numbers<'a, T> {
    Params(&'a [f64]),
    Weights(ArrayViewD<'a, T>),
}

impl<T: Real> Numbers<'_, T> {
    fn dtype(&self) -> Dtype {
        match self {
            Numbers::Params(_) => Dtype::F64,
            Numbers::Weights(_) => dtype::<T>(),
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Numbers::Params(numbers) => size_of_val(*numbers),
            Numbers::Weights(numbers) => numbers.len() * size_of::<T>(),
        }
    }

    fn write(&self, out: &mut Vec<u8>) {
        match self {
            Numbers::Params(numbers) => {
                out.extend(numbers.iter().flat_map(|number| number.to_le_bytes()))
            }
            Numbers::Weights(numbers) if dtype::<T>() == Dtype::F64 => {
                out.extend(numbers.iter().flat_map(|w| w.to_f64().to_le_bytes()))
            }
            Numbers::Weights(numbers) => {
                out.extend(numbers.iter().flat_map(|w| (w.to_f64() as f32).to_le_bytes()))
            } // exact
        }
    }
}

impl<'a, T: Real> Writer<'a, T> {
    pub(super) fn new() -> Self {
        let mut writer = Self { notes: Vec::new(), tensors: Vec::new() };
        writer.note("dijiang.version", VERSION);
        writer
    }

    pub(super) fn note(&mut self, name: impl ToString, value: impl ToString) {
        self.notes.push((name.to_string(), value.to_string()));
    }

    fn params(&mut self, name: String, shape: &[usize], numbers: &'a [f64]) {
        self.tensors.push((name, shape.to_vec(), Numbers::Params(numbers)));
    }

    /// Everything but the weights.
    pub(super) fn maps(&mut self, place: &str, layer: &'a DijiangAttention<T>) {
        let projections = &layer.proj;
        for (name, value) in
            config_notes(projections.config(), projections.head_dim(), projections.scale())
        {
            self.note(format!("{place}dijiang.{name}"), value);
        }
        if let Some(hold) = projections.config().rotary.as_ref().and_then(|rotary| rotary.hold) {
            self.note(format!("{place}dijiang.{HOLD}"), hold);
        }
        let windows = layer.windows().iter().flat_map(|window| [window.chunk, window.back]);
        self.note(format!("{place}dijiang.windows"), joined(windows));
        if layer.windows().iter().any(|window| window.kept > 0) {
            let kept = layer.windows().iter().map(|window| window.kept);
            self.note(format!("{place}dijiang.kept"), joined(kept));
        }
        self.note(format!("{place}dijiang.sinks"), layer.sinks());
        for (h, (map, log_decay)) in layer.maps().iter().zip(layer.log_decay()).enumerate() {
            let place = format!("{place}dijiang.{h}.");
            self.map(&place, map.params());
            self.params(format!("{place}log_decay"), &[], from_ref(log_decay));
        }
        if let Some(delta) = layer.output_delta() {
            let numbers = Numbers::Weights(delta.view().into_dyn());
            let name = format!("{place}dijiang.output_delta");
            self.tensors.push((name, delta.shape().to_vec(), numbers));
        }
    }

    fn map(&mut self, place: &str, params: &'a DctParams) {
        let (dim, rows) = (params.dim(), params.query.radii.len());
        let projection = match &params.projection {
            Projection::Dct => "dct",
            Projection::Mixed { signs } => {
                self.params(format!("{place}signs"), &[params.blocks(), 3, dim], signs);
                "mixed"
            }
            Projection::Deep { query, key } => {
                self.params(format!("{place}deep.query"), &[params.blocks(), 2, dim], query);
                self.params(format!("{place}deep.key"), &[params.blocks(), 2, dim], key);
                "deep"
            }
            Projection::Dense { query, key } => {
                self.params(format!("{place}dense.query"), &[rows, dim], query);
                self.params(format!("{place}dense.key"), &[rows, dim], key);
                "dense"
            }
        };
        self.note(format!("{place}projection"), projection);
        self.note(format!("{place}envelope"), params.envelope.word());
        self.note(format!("{place}pairing"), params.pairing.word());
        self.note(format!("{place}sides"), params.sides.word());
        for (name, side) in [("query", &params.query), ("key", &params.key)] {
            for (what, numbers) in
                [("center", &side.center), ("scale", &side.scale), ("radii", &side.radii)]
            {
                self.params(format!("{place}{name}.{what}"), &[numbers.len()], numbers);
            }
        }
        self.params(format!("{place}log_weight"), &[params.log_weight.len()], &params.log_weight);
        self.params(format!("{place}log_mix"), &[], from_ref(&params.log_mix));
    }

    pub(super) fn weights(&mut self, place: &str, layer: &'a DijiangAttention<T>) {
        let weights = layer.proj.plain_weights();
        let mut biases = String::new();
        for (name, matrix, bias) in [
            ('q', &weights.q, &weights.q_bias),
            ('k', &weights.k, &weights.k_bias),
            ('v', &weights.v, &weights.v_bias),
            ('o', &weights.o, &weights.o_bias),
        ] {
            let matrix = Numbers::Weights(matrix.view().into_dyn());
            self.tensors.push((
                format!("{place}{name}_proj.weight"),
                weights_shape(layer.config(), name),
                matrix,
            ));
            if let Some(bias) = bias {
                let numbers = Numbers::Weights(bias.view().into_dyn());
                self.tensors.push((format!("{place}{name}_proj.bias"), vec![bias.len()], numbers));
                biases.push(name);
            }
        }
        self.note(format!("{place}dijiang.biases"), biases);
        for (name, norm) in [('q', &weights.q_norm), ('k', &weights.k_norm)] {
            if let Some(norm) = norm {
                let name = format!("{place}{name}_norm.weight");
                let numbers = Numbers::Weights(norm.view().into_dyn());
                self.tensors.push((name, norm.shape().to_vec(), numbers));
            }
        }
    }

    fn checksum(&mut self) -> String {
        self.notes.sort();
        self.tensors.sort_by(|(one, ..), (other, ..)| one.cmp(other));
        let (mut checksum, mut bytes) = (Checksum::default(), Vec::new());
        for (name, value) in &self.notes {
            checksum.add(name, value.as_bytes());
        }
        for (name, _, numbers) in &self.tensors {
            bytes.clear();
            numbers.write(&mut bytes);
            checksum.add(name, &bytes);
        }
        checksum.finish()
    }

    /// The bytes. Wide numbers lie first, so that every tensor is aligned.
    pub(super) fn finish(mut self) -> Result<Vec<u8>> {
        let checksum = self.checksum();
        self.note(CHECKSUM, checksum);
        self.tensors.sort_by_key(|(_, _, numbers)| numbers.dtype() != Dtype::F64);
        let notes: Vec<_> =
            self.notes.iter().map(|(name, value)| format!(r#""{name}":"{value}""#)).collect();
        let mut header = format!(r#"{{"__metadata__":{{{}}}"#, notes.join(","));
        let mut end = 0;
        for (name, shape, numbers) in &self.tensors {
            let start = end;
            end += numbers.bytes();
            header += &format!(
                r#","{name}":{{"dtype":"{:?}","shape":{shape:?},"data_offsets":[{start},{end}]}}"#,
                numbers.dtype()
            );
        }
        header.push('}');
        let len = header.len().next_multiple_of(8);
        if len > MAX_HEADER {
            return Err(Error::TooLarge {
                argument: "bytes of header",
                limit: MAX_HEADER,
                got: len,
            });
        }
        let mut bytes = Vec::with_capacity(8 + len + end);
        bytes.extend((len as u64).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.resize(8 + len, b' ');
        self.tensors.iter().for_each(|(_, _, numbers)| numbers.write(&mut bytes));
        Ok(bytes)
    }
}

/// Numbers with spaces between them.
fn joined(numbers: impl Iterator<Item = usize>) -> String {
    numbers.map(|number| number.to_string()).collect::<Vec<_>>().join(" ")
}
