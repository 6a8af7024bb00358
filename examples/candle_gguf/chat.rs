//! Text from a prompt, and the state of a chat on disk.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use dijiang::attention::Storage;
use ndarray::aview1;
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};

use crate::args::RunArgs;
use crate::attention::{Attend, Linear};
use crate::lm::error::Error;
use crate::lm::generate::sample;
use crate::lm::tokens::{Token, Tokenizer};
use crate::model::{Model, Stream, fault};
use crate::{Opened, Result, memory};

pub(crate) fn run(args: &RunArgs) -> Result<()> {
    if !(args.temperature.is_finite() && args.temperature >= 0.0) {
        return Err(format!("--temperature must be at least 0, found {}", args.temperature).into());
    }
    let opened = Opened::open(&args.common.model)?;
    let (text, name) = match (&args.prompt, &args.prompt_file) {
        (Some(text), _) => (text.clone().into_bytes(), Path::new("--prompt")),
        (None, Some(path)) => {
            let read = std::fs::read(path);
            (read.map_err(|source| Error::Io { path: path.clone(), source })?, path.as_path())
        }
        (None, None) => return Err("--prompt or --prompt-file is needed".into()),
    };
    let prompt = opened.tokenizer.encode(text, name)?.tokens;
    if prompt.is_empty() {
        return Err(fault(name, "the prompt", "at least one token", "none"));
    }
    let out = &mut std::io::stdout().lock();
    let Some(maps) = &args.maps else {
        let model = opened.softmax();
        return write(&mut model.stream(), &opened, &prompt, args, out);
    };
    let model = opened.linear(maps)?;
    // A state means something to the maps it was made with, and to no others.
    let maps = std::fs::read(maps).map_err(|source| Error::Io { path: maps.clone(), source })?;
    let maps = format!("{:08x}", crc32fast::hash(&maps));
    let mut stream = match &args.resume {
        Some(path) => resume(&model, path, &maps)?,
        None => model.stream(),
    };
    write(&mut stream, &opened, &prompt, args, out)?;
    match &args.save {
        Some(path) => save(&stream, path, &maps),
        None => Ok(()),
    }
}

/// Reads the prompt and writes what follows, token by token. All of it is in the stream then.
pub(crate) fn write<A: Attend>(
    stream: &mut Stream<'_, A>,
    opened: &Opened,
    prompt: &[Token],
    args: &RunArgs,
    out: &mut impl Write,
) -> Result<()> {
    let Tokenizer::Subwords(tokenizer) = &opened.tokenizer else {
        return Err("a vocabulary of bytes cannot be written piece by piece".into());
    };
    let mut pieces = tokenizer.decode_stream(true);
    let mut random = ChaCha12Rng::seed_from_u64(args.seed);
    let start = Instant::now();
    let mut logits = stream.read(prompt)?;
    let read = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut written = 0;
    while written < args.generate {
        let token = sample(aview1(&logits), args.temperature, random.random());
        logits = stream.read(&[token])?;
        written += 1;
        if let Some(piece) = pieces.step(token)? {
            write!(out, "{piece}")?;
            out.flush()?;
        }
        if args.report.is_some_and(|every| written.is_multiple_of(every)) {
            report(stream, written as f64 / start.elapsed().as_secs_f64());
        }
        if Some(token) == opened.end && !args.endless {
            break;
        }
    }
    writeln!(out)?;
    eprintln!("{} tokens read at {:.1} tokens/s", prompt.len(), prompt.len() as f64 / read);
    report(stream, written as f64 / start.elapsed().as_secs_f64());
    Ok(())
}

fn report<A: Attend>(stream: &Stream<'_, A>, speed: f64) {
    let resident = memory::resident_kb().map_or(String::new(), |kilobytes| {
        format!(", {:.1} MB of memory in all", kilobytes as f64 * 1.024e-3)
    });
    eprintln!(
        "{} tokens, written at {speed:.1} tokens/s, {:.1} kB of state{resident}",
        stream.position(),
        stream.bytes() as f64 / 1e3
    );
}

/// Name of a layer's state in a file.
fn name(l: usize) -> String {
    format!("layers.{l}")
}

/// Writes the states of all layers, with the checksum of the maps they were made with.
pub(crate) fn save(stream: &Stream<'_, Linear>, path: &Path, maps: &str) -> Result<()> {
    let states = stream.states.iter().map(|state| state.state.to_bytes(Storage::Exact));
    let states: Vec<Vec<u8>> = states.collect();
    let views = states
        .iter()
        .enumerate()
        .map(|(l, bytes)| Ok((name(l), TensorView::new(Dtype::U8, vec![bytes.len()], bytes)?)));
    let views = views.collect::<Result<Vec<_>>>()?;
    let notes = HashMap::from([("maps".to_owned(), maps.to_owned())]);
    let bytes = safetensors::serialize(views, Some(notes))?;
    std::fs::write(path, bytes)
        .map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}

/// What [`save`] wrote.
pub(crate) fn resume<'a>(
    model: &'a Model<'_, Linear>,
    path: &Path,
    maps: &str,
) -> Result<Stream<'a, Linear>> {
    let damaged =
        |error: &dyn std::fmt::Display| fault(path, "the state", "what --save wrote", error);
    let bytes =
        std::fs::read(path).map_err(|source| Error::Io { path: path.to_path_buf(), source })?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| damaged(&error))?;
    let of_maps = header.metadata().as_ref().and_then(|notes| notes.get("maps"));
    if of_maps.is_none_or(|of_maps| of_maps != maps) {
        let found = of_maps.map_or("none", String::as_str);
        return Err(fault(path, "checksum of the maps", maps, found));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|error| damaged(&error))?;
    if file.len() != model.attention.len() {
        return Err(fault(path, "layers", &model.attention.len().to_string(), file.len()));
    }
    let state = |(l, layer): (usize, &Linear)| {
        let tensor = file.tensor(&name(l)).map_err(|error| damaged(&error))?;
        let state = layer.attention.state_from_bytes(tensor.data());
        Ok(layer.resume(state.map_err(|error| damaged(&error))?))
    };
    let states = model.attention.iter().enumerate().map(state).collect::<Result<Vec<_>>>()?;
    let mut positions = states.iter().map(|state| state.state.position());
    let position = positions.next().unwrap_or(0);
    match positions.all(|other| other == position) {
        true => Ok(model.resume(states, position)),
        false => Err(damaged(&"layers at different positions")),
    }
}
