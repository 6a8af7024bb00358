//! What was found, as a table or as JSON.

use std::io::Write;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use dijiang::attention::Window;
use dijiang::calibrate::{CalibrateReport, HeadReport, ProjectionFit};
use dijiang::layer::{ChooseReport, Trial};
use serde::Serialize;

use crate::args::Row;
use crate::lm::error::{Error, Result};
use crate::lm::evaluate::Score;

/// One run's findings; the names are the keys of `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) text: String,
    /// Entries of the vocabulary; with 256, a token is a byte.
    pub(crate) vocabulary: usize,
    pub(crate) windows: usize,
    /// Tokens per window.
    pub(crate) context: usize,
    /// Chunk length of the exact local window, on average over all key-value heads.
    pub(crate) average_window: usize,
    /// Whole chunks of the local window before the query's own.
    pub(crate) back: usize,
    /// m, per head.
    pub(crate) features: usize,
    pub(crate) rows: Vec<RowReport>,
    /// Largest difference from the golden logits, where the model comes with some.
    pub(crate) logits_difference: Option<f32>,
    pub(crate) calibration_tokens: usize,
    pub(crate) calibration_seconds: f64,
    /// Steps by gradient.
    pub(crate) steps: usize,
    /// What was chosen for each layer; empty if nothing was.
    pub(crate) choices: Vec<ChoiceReport>,
    /// What calibration by gradient did with the local window, first layer first.
    pub(crate) layers: Vec<LayerReport>,
    /// And without.
    pub(crate) pure_layers: Vec<LayerReport>,
    pub(crate) prompt: String,
    pub(crate) generated: String,
    /// The row whose model wrote it.
    pub(crate) writer: Row,
    /// While it wrote.
    pub(crate) tokens_per_second: f64,
    /// Bytes of the key-value cache softmax attention holds after a window, all layers together.
    pub(crate) kv_bytes: usize,
    /// From start to end.
    pub(crate) seconds: f64,
}

/// How well one model predicts the text.
#[derive(Debug, Serialize)]
pub(crate) struct RowReport {
    name: Row,
    /// Mean −ln of the likelihood of the next token.
    nats: f64,
    /// e to that power.
    perplexity: f64,
    bits_per_byte: f64,
    /// What attention holds after a window, all layers together.
    state_bytes: usize,
    /// `nats` in every window.
    window_nats: Vec<f64>,
}

impl RowReport {
    pub(crate) fn new(name: Row, score: &Score, state_bytes: usize) -> Self {
        Self {
            name,
            nats: score.nats(),
            perplexity: score.perplexity(),
            bits_per_byte: score.bits_per_byte(),
            state_bytes,
            window_nats: score.windows.clone(),
        }
    }
}

impl Row {
    /// In words.
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Softmax => "softmax",
            Self::Window => "window alone",
            Self::Exchanged => "linear + window, as exchanged",
            Self::ClosedForm => "linear + window, closed form",
            Self::Calibrated => "linear + window, calibrated",
            Self::Pure => "linear alone with decay, calibrated",
        }
    }
}

/// What calibration did to the heads of a layer: relative errors of their outputs on held-out text.
#[derive(Debug, Serialize)]
pub(crate) struct LayerReport {
    before: Vec<f64>,
    closed_form: Vec<f64>,
    after: Vec<f64>,
    log_mix: Vec<f64>,
    log_decay: Vec<f64>,
    /// Share of softmax attention's mass on far keys.
    far_mass: Vec<f64>,
}

impl From<&CalibrateReport> for LayerReport {
    fn from(report: &CalibrateReport) -> Self {
        let all = |value: fn(&HeadReport) -> f64| report.heads.iter().map(value).collect();
        Self {
            before: all(|head| head.before),
            closed_form: all(|head| head.closed_form),
            after: all(|head| head.after),
            log_mix: all(|head| head.log_mix),
            log_decay: all(|head| head.log_decay),
            far_mass: all(|head| head.far_mass),
        }
    }
}

/// The structure chosen for a layer.
#[derive(Debug, Serialize)]
pub(crate) struct ChoiceReport {
    structure: Structure,
    /// The projection of every key-value head.
    projections: Vec<&'static str>,
    microseconds_per_token: f64,
    trials: Vec<TrialReport>,
}

#[derive(Debug, Serialize)]
struct Structure {
    chunk: usize,
    back: usize,
    blocks: usize,
}

/// One structure that was tried, with its error on held-out text; none if it was beyond the budget.
#[derive(Debug, Serialize)]
struct TrialReport {
    structure: Structure,
    projection: &'static str,
    microseconds_per_token: f64,
    error: Option<f64>,
}

impl Structure {
    fn new(window: Option<Window>, blocks: usize) -> Self {
        let (chunk, back) = window.map_or((0, 0), |window| (window.chunk, window.back));
        Self { chunk, back, blocks }
    }
}

impl From<&ChooseReport> for ChoiceReport {
    fn from(report: &ChooseReport) -> Self {
        let trial = |trial: &Trial| TrialReport {
            structure: Structure::new(trial.window, trial.blocks),
            projection: name(trial.projection),
            microseconds_per_token: 1e6 * trial.time.as_secs_f64(),
            error: trial.error,
        };
        Self {
            structure: Structure::new(report.window, report.blocks),
            projections: report.projections.iter().map(|&projection| name(projection)).collect(),
            microseconds_per_token: 1e6 * report.time.as_secs_f64(),
            trials: report.trials.iter().map(trial).collect(),
        }
    }
}

fn name(projection: ProjectionFit) -> &'static str {
    match projection {
        ProjectionFit::Keep => "plain",
        ProjectionFit::Deep => "deep",
        ProjectionFit::Dense => "dense",
    }
}

impl Report {
    /// Writes the report to standard output.
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        let mut text = match json {
            true => serde_json::to_string(self).map_err(|error| Error::Output(error.into()))?,
            false => self.text(),
        };
        text.push('\n');
        std::io::stdout().lock().write_all(text.as_bytes()).map_err(Error::Output)
    }

    fn text(&self) -> String {
        let softmax = self.rows.iter().find(|row| row.name == Row::Softmax);
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "attention",
            "perplexity",
            "over softmax",
            "bits/byte",
            "state",
        ]);
        for row in &self.rows {
            let over = softmax
                .map(|softmax| 100.0 * (row.perplexity / softmax.perplexity - 1.0))
                .map_or(String::new(), |percent| format!("{percent:+.1} %"));
            table.add_row([
                row.name.label().to_owned(),
                format!("{:.3}", row.perplexity),
                over,
                format!("{:.4}", row.bits_per_byte),
                format!("{} kB", row.state_bytes / 1000),
            ]);
        }
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut chosen = String::new();
        for (
            l,
            ChoiceReport {
                structure: Structure { chunk, back, blocks },
                projections,
                microseconds_per_token,
                ..
            },
        ) in self.choices.iter().enumerate()
        {
            let projections = projections.join(" ");
            chosen += &format!(
                "layer {l}: chunks of {chunk}, {back} back, {blocks} block(s), heads {projections}, {microseconds_per_token:.2} µs per token\n"
            );
        }
        let check = self
            .logits_difference
            .map(|found| format!("softmax logits agree with the golden ones within {found:.1e}\n"));
        format!(
            "{}{}\n\n{table}\n{chosen}{}{} windows of {} {}, local window of {} tokens and {} chunk(s) back, m = {} features per head\n\
             calibrated on {} tokens in {} steps and {:.1} s; {:.1} s in all\n\
             decoding ({}): {:.0} tokens/s; softmax's key-value cache is {} kB after {} tokens and goes on growing",
            self.prompt,
            self.generated,
            check.unwrap_or_default(),
            self.windows,
            self.context,
            if self.vocabulary == 256 { "bytes" } else { "tokens" },
            self.average_window,
            self.back,
            self.features,
            self.calibration_tokens,
            self.steps,
            self.calibration_seconds,
            self.seconds,
            self.writer.label(),
            self.tokens_per_second,
            self.kv_bytes / 1000,
            self.context,
        )
    }
}
