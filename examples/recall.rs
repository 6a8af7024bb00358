//! What does a model with a state of constant size still recall of what it has read?
//!
//! ```sh
//! cargo run --release --example recall -- --model path/to/model --text text \
//!     --maps maps.safetensors
//! ```
//!
//! A pass key and a line of other text are planted at five depths of a long text; at its end the
//! model is asked for both. Maps are those that `convert_lm --save` wrote; several files are
//! several budgets. A window with sinks and nothing behind it, of as many bytes as the first of
//! them, stands beside.

#[allow(dead_code, reason = "each example uses its own part")]
mod lm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use dijiang::attention::Window;
use dijiang::checkpoint::load_maps;
use dijiang::layer::{Attention, DijiangAttention, DijiangOptions};
use ndarray::Array1;
use rand::rngs::ChaCha12Rng;
use rand::{RngExt, SeedableRng};
use serde::Serialize;

use crate::lm::error::{Error, Result};
use crate::lm::generate::sample;
use crate::lm::llama::Llama;
use crate::lm::progress::Progress;
use crate::lm::stream::Stream;
use crate::lm::text::Text;
use crate::lm::tokens::{Token, Tokenizer};

/// Where in the text things are planted, as a share of it.
const DEPTHS: [f64; 5] = [0.05, 0.25, 0.5, 0.75, 0.95];
/// Digits of a pass key.
const DIGITS: u32 = 5;
/// Tokens of the planted line, and how many of them are given when it is asked for.
const LINE: usize = 24;
const GIVEN: usize = 8;
/// Sinks of the window without maps.
const SINKS: usize = 4;

/// Plant a pass key and a line at five depths of a text, and count how often softmax attention, a
/// window with sinks, and linear attention recall them.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Directory with config.json, model.safetensors (or its shards) and tokenizer.json
    #[arg(long, value_name = "DIR", default_value = lm::MODEL, hide_default_value = true)]
    model: PathBuf,
    /// Files that `convert_lm --save` wrote for this model
    #[arg(long, value_name = "FILE", value_delimiter = ',')]
    maps: Vec<PathBuf>,
    /// Text that things are planted in [default: valid.txt in the model's directory]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Tokens of text
    #[arg(
        long, value_name = "N,…", value_delimiter = ',',
        default_values_t = [1000, 2000, 4000, 8000]
    )]
    tokens: Vec<usize>,
    /// Other texts, keys and lines for every depth
    #[arg(long, value_name = "N", default_value_t = 1)]
    trials: usize,
    /// Print one JSON object instead of text
    #[arg(long)]
    json: bool,
}

/// What was found; the names are the keys of `--json`.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    text: String,
    trials: usize,
    rows: Vec<Row>,
}

#[derive(Debug, Serialize)]
struct Row {
    name: String,
    tokens: usize,
    /// What attention holds after them.
    state_bytes: usize,
    /// Share of the keys that were recalled whole.
    keys: f64,
    /// Share of the lines' tokens that were recalled.
    lines: f64,
}

/// A text with things planted in it, and the questions.
struct Trial {
    text: Vec<Token>,
    key_question: Vec<Token>,
    key: Vec<Token>,
    line_question: Vec<Token>,
    line: Vec<Token>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    lm::exit(run(&args))
}

fn run(args: &Args) -> Result<()> {
    let softmax = Llama::load(&args.model)?;
    let text = args.text.clone().unwrap_or_else(|| args.model.join("valid.txt"));
    let linear = args.maps.iter().map(|path| {
        let convert = |layer: &_| DijiangAttention::from_softmax(layer, DijiangOptions::new());
        let mut model = softmax.exchange(convert)?;
        let file =
            std::fs::read(path).map_err(|source| Error::Io { path: path.clone(), source })?;
        load_maps(model.attention_mut(), &file)?;
        Ok(model)
    });
    let linear: Vec<_> = linear.collect::<Result<_>>()?;
    let bytes = |model: &Llama<DijiangAttention<f32>>| -> usize {
        model.attention().iter().map(|layer| layer.new_state().bytes()).sum()
    };
    let held = linear.first().map(|model| bytes(model) / softmax.config().kv_cache_bytes(1));
    let window = held.map(|held| Window::new(held.saturating_sub(SINKS).div_ceil(8).max(1), 7));
    let windowed = window
        .map(|window| softmax.exchange(|layer| layer.clone().with_windows(vec![window], SINKS)));
    let windowed = windowed.transpose()?;

    let progress = Progress::new();
    let models = 1 + linear.len() + usize::from(windowed.is_some());
    progress.stage("recalling", args.tokens.len() * DEPTHS.len() * args.trials * models);
    let mut rows = Vec::new();
    for &tokens in &args.tokens {
        let text = Text::read(&text, softmax.tokenizer(), tokens)?;
        let trials: Vec<Trial> = trials(softmax.tokenizer(), &text, args.trials)?;
        let cache = softmax.config().kv_cache_bytes(tokens);
        rows.push(row("softmax", &softmax, cache, &trials, tokens, &progress)?);
        if let (Some(model), Some(window)) = (&windowed, window) {
            let held = softmax.config().kv_cache_bytes(tokens.min(window.tokens() + SINKS));
            rows.push(row("window + sinks", model, held, &trials, tokens, &progress)?);
        }
        for (model, path) in linear.iter().zip(&args.maps) {
            let name = path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy();
            rows.push(row(&name, model, bytes(model), &trials, tokens, &progress)?);
        }
    }
    progress.finish();
    let report = Report {
        model: args.model.display().to_string(),
        text: text.display().to_string(),
        trials: args.trials,
        rows,
    };
    lm::print(&report, args.json, Report::text)
}

/// Trials of every depth, each with a text, a key and a line of its own.
fn trials(tokenizer: &Tokenizer, text: &Text, trials: usize) -> Result<Vec<Trial>> {
    let mut random = ChaCha12Rng::seed_from_u64(17);
    let encode = |text: &str| -> Result<Vec<Token>> {
        Ok(tokenizer.encode(text.as_bytes().to_vec(), Path::new("recall"))?.tokens)
    };
    let windows = text.windows();
    let mut all = Vec::new();
    for (i, depth) in DEPTHS.into_iter().cycle().take(DEPTHS.len() * trials).enumerate() {
        let key = random.random_range(10_u32.pow(DIGITS - 1)..10_u32.pow(DIGITS)).to_string();
        let filler = text.input(i % windows);
        // A line of the same text, from another place.
        let other = text.input((i + 1) % windows);
        let at = random.random_range(0..=other.len().saturating_sub(LINE));
        let line = &other[at..(at + LINE).min(other.len())];
        let planted = encode(&format!("\nThe pass key is {key}. Remember it: {key}.\n"))?;
        let (given, asked) = line.split_at(GIVEN.min(line.len()));
        let mark = encode("\nRemember this line: ")?;
        let cut = (depth * filler.len() as f64) as usize;
        let (before, after) = filler.split_at(cut);
        all.push(Trial {
            text: [before, &planted, &mark, line, &encode("\n")?, after].concat(),
            key_question: encode("\nThe pass key is ")?,
            key: encode(&key)?,
            line_question: [&mark, given].concat(),
            line: asked.to_vec(),
        });
    }
    Ok(all)
}

/// What one model recalls of these trials.
fn row<A: Attention<f32>>(
    name: &str,
    model: &Llama<A>,
    state_bytes: usize,
    trials: &[Trial],
    tokens: usize,
    progress: &Progress,
) -> Result<Row> {
    let (mut keys, mut lines) = (0.0, 0.0);
    for trial in trials {
        let mut stream = model.stream();
        stream.prefill(&trial.text)?;
        let key = recalled(&mut stream, &trial.key_question, &trial.key)?;
        keys += f64::from(u8::from(key == trial.key.len()));
        let line = recalled(&mut stream, &trial.line_question, &trial.line)?;
        lines += line as f64 / trial.line.len().max(1) as f64;
        progress.tick();
    }
    let count = trials.len() as f64;
    Ok(Row { name: name.to_owned(), tokens, state_bytes, keys: keys / count, lines: lines / count })
}

/// Of the tokens that are expected after a question, how many are the likeliest ones.
fn recalled<A: Attention<f32>>(
    stream: &mut Stream<'_, A>,
    question: &[Token],
    expected: &[Token],
) -> Result<usize> {
    let mut logits: Array1<f32> = stream.prefill(question)?;
    let mut right = 0;
    for &token in expected {
        right += usize::from(sample(logits.view(), 0.0, 0.0) == token);
        logits = stream.step(token)?;
    }
    Ok(right)
}

impl Report {
    fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "tokens",
            "attention",
            "state",
            "pass keys",
            "line, tokens",
        ]);
        for row in &self.rows {
            table.add_row([
                row.tokens.to_string(),
                row.name.clone(),
                format!("{} kB", row.state_bytes / 1000),
                format!("{:.0} %", 100.0 * row.keys),
                format!("{:.0} %", 100.0 * row.lines),
            ]);
        }
        for column in table.column_iter_mut() {
            column.set_cell_alignment(CellAlignment::Right);
        }
        format!(
            "recalled, of {} texts a row (depths {DEPTHS:?})\n{table}",
            DEPTHS.len() * self.trials
        )
    }
}
