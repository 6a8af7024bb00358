//! Speed of prefill and decoding, both attentions.

use std::time::Instant;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use ndarray::aview1;
use serde::Serialize;

use crate::args::BenchArgs;
use crate::attention::Attend;
use crate::lm::generate::sample;
use crate::lm::progress::Progress;
use crate::lm::text::Text;
use crate::lm::tokens::Token;
use crate::model::Model;
use crate::plan::Choices;
use crate::{Opened, Result, plan};

/// Windows of text that windows are planned on without a file of maps, and their tokens.
const PLAN: (usize, usize) = (2, 1024);

/// What was measured; the names are the keys of `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    /// As asked for; none for one per core.
    pub(crate) threads: Option<u16>,
    pub(crate) repeat: usize,
    pub(crate) rows: Vec<Row>,
}

/// One attention after one number of tokens.
#[derive(Debug, Serialize)]
pub(crate) struct Row {
    pub(crate) engine: &'static str,
    /// Tokens read.
    pub(crate) context: usize,
    pub(crate) prefill_tokens_per_second: f64,
    pub(crate) decode_tokens_per_second: f64,
    /// What attention holds, all layers together.
    pub(crate) state_bytes: usize,
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let report = measure(args)?;
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
        return Ok(());
    }
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header([
        "attention",
        "context",
        "prefill tokens/s",
        "decode tokens/s",
        "state",
    ]);
    for row in &report.rows {
        table.add_row([
            row.engine.to_owned(),
            row.context.to_string(),
            format!("{:.1}", row.prefill_tokens_per_second),
            format!("{:.1}", row.decode_tokens_per_second),
            format!("{} kB", row.state_bytes / 1000),
        ]);
    }
    table.column_iter_mut().skip(1).for_each(|column| {
        column.set_cell_alignment(CellAlignment::Right);
    });
    println!("{table}");
    Ok(())
}

pub(crate) fn measure(args: &BenchArgs) -> Result<Report> {
    let opened = Opened::open(&args.common.model)?;
    let longest = args.contexts.iter().max().copied().unwrap_or(1);
    let text = Text::read(&args.text, &opened.tokenizer, longest + args.decode)?;
    let progress = Progress::new();
    let layers = match &args.maps {
        Some(maps) => plan::load(&opened.gguf, maps)?,
        None => {
            let (windows, tokens) = PLAN;
            let text = Text::read(&args.text, &opened.tokenizer, tokens.min(longest))?;
            let samples: Vec<_> = text.spread(windows).collect();
            let choices =
                Choices { sinks: 4, average_window: 128.0, hold: None, calibration: None };
            progress.stage("planning", opened.body.layers());
            let tick = || progress.tick();
            plan::plan(&opened.gguf, &opened.body, &samples, &choices, tick)?.1
        }
    };
    let (linear, softmax) = (opened.linear_of(&layers), opened.softmax());
    let engines = if args.linear_only { 1 } else { 2 };
    progress.stage("measuring", engines * args.repeat * args.contexts.len());
    let mut rows = Vec::new();
    for &context in &args.contexts {
        let tokens = text.input(0).split_at(context);
        let tokens = (tokens.0, &tokens.1[..args.decode]);
        let (mut of_softmax, mut of_linear) = (Vec::new(), Vec::new());
        for _ in 0..args.repeat {
            of_linear.push(timed("linear", &linear, tokens)?);
            progress.tick();
            if !args.linear_only {
                of_softmax.push(timed("softmax", &softmax, tokens)?);
                progress.tick();
            }
        }
        rows.extend(median(of_softmax));
        rows.extend(median(of_linear));
    }
    progress.finish();
    Ok(Report {
        model: args.common.model.display().to_string(),
        threads: args.common.threads,
        repeat: args.repeat,
        rows,
    })
}

/// Reads tokens at once and others one by one.
fn timed<A: Attend>(
    engine: &'static str,
    model: &Model<'_, A>,
    (prompt, rest): (&[Token], &[Token]),
) -> Result<Row> {
    let mut stream = model.stream();
    let start = Instant::now();
    stream.read(prompt)?;
    let prefill = start.elapsed().as_secs_f64();
    let state_bytes = stream.bytes();
    let start = Instant::now();
    for &token in rest {
        let logits = stream.read(&[token])?;
        std::hint::black_box(sample(aview1(&logits), 0.0, 0.0));
    }
    let decode = start.elapsed().as_secs_f64();
    Ok(Row {
        engine,
        context: prompt.len(),
        prefill_tokens_per_second: prompt.len() as f64 / prefill,
        decode_tokens_per_second: rest.len() as f64 / decode,
        state_bytes,
    })
}

/// Each speed's own median.
fn median(mut rows: Vec<Row>) -> Option<Row> {
    let mut middle = |speed: fn(&Row) -> f64| {
        rows.sort_by(|a, b| speed(a).total_cmp(&speed(b)));
        rows.get(rows.len() / 2).map(speed)
    };
    let prefill_tokens_per_second = middle(|row| row.prefill_tokens_per_second)?;
    let decode_tokens_per_second = middle(|row| row.decode_tokens_per_second)?;
    let row = rows.pop()?;
    Some(Row { prefill_tokens_per_second, decode_tokens_per_second, ..row })
}
