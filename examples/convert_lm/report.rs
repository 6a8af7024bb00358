//! What was found, as a table or as JSON.

use std::io::Write;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use dijiang::attention::Window;
use dijiang::layer::{CalibrateReport, ChooseReport, HeadReport, ProjectionFit, Trial};
use serde::Serialize;

use crate::lm::error::{Error, Result};

/// One run's findings; the names are the keys of `--json`.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) model: String,
    pub(crate) text: String,
    pub(crate) windows: usize,
    /// Bytes per window.
    pub(crate) context: usize,
    pub(crate) chunk: usize,
    pub(crate) back: usize,
    /// m, per head.
    pub(crate) features: usize,
    pub(crate) softmax_bpb: f64,
    pub(crate) exchanged_bpb: f64,
    /// Calibrated in closed form.
    pub(crate) closed_form_bpb: f64,
    pub(crate) calibrated_bpb: f64,
    pub(crate) window_only_bpb: f64,
    pub(crate) pure_bpb: f64,
    /// Largest difference from the golden logits, where the model comes with some.
    pub(crate) logits_difference: Option<f32>,
    pub(crate) calibration_tokens: usize,
    pub(crate) calibration_seconds: f64,
    /// Steps by gradient.
    pub(crate) steps: usize,
    /// What was chosen for each layer; empty if nothing was.
    pub(crate) choices: Vec<ChoiceReport>,
    /// With the local window, first layer first.
    pub(crate) layers: Vec<LayerReport>,
    /// Without.
    pub(crate) pure_layers: Vec<LayerReport>,
    pub(crate) prompt: String,
    pub(crate) generated: String,
    /// Tokens read and written when the sizes below were taken.
    pub(crate) tokens: usize,
    pub(crate) tokens_per_second: f64,
    /// Bytes of the linear model's state, all layers together; the same at any length.
    pub(crate) state_bytes: usize,
    /// Bytes of the key-value cache softmax attention would hold after as many tokens.
    pub(crate) kv_bytes: usize,
    /// From start to end.
    pub(crate) seconds: f64,
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
        let window = format!("local window ({} tokens, {} chunk back)", self.chunk, self.back);
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "attention",
            "bits/byte",
            "over softmax",
        ]);
        for (name, bits) in [
            ("softmax".to_owned(), self.softmax_bpb),
            (format!("linear + {window}, as exchanged"), self.exchanged_bpb),
            (format!("linear + {window}, closed form"), self.closed_form_bpb),
            (
                if self.choices.is_empty() {
                    format!("linear + {window}, calibrated")
                } else {
                    "linear, structure chosen, calibrated".to_owned()
                },
                self.calibrated_bpb,
            ),
            (format!("{window} alone"), self.window_only_bpb),
            ("linear alone with decay, calibrated".to_owned(), self.pure_bpb),
        ] {
            table.add_row([name, format!("{bits:.4}"), format!("{:+.4}", bits - self.softmax_bpb)]);
        }
        for column in 1..=2 {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
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
            "{}{}\n\n{table}\n{chosen}{}{} windows of {} bytes, m = {} features per head, calibrated on {} tokens in {} steps and {:.1} s; {:.1} s in all\n\
             decoding: {:.0} tokens/s, state {} kB at any length; softmax's key-value cache is {} kB after {} tokens, {} kB after {}",
            self.prompt,
            self.generated,
            check.unwrap_or_default(),
            self.windows,
            self.context,
            self.features,
            self.calibration_tokens,
            self.steps,
            self.calibration_seconds,
            self.seconds,
            self.tokens_per_second,
            self.state_bytes / 1000,
            self.kv_bytes / 1000,
            self.tokens,
            self.kv_bytes / self.tokens.max(1) * self.context / 1000,
            self.context,
        )
    }
}
