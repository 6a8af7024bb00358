//! What was found, as a table or as JSON.

use std::collections::BTreeMap;

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use dijiang::attention::Window;
use dijiang::calibrate::{CalibrateReport, HeadPlan, HeadReport, Plan, Point};
use serde::Serialize;

use crate::args::Row;
use crate::lm;
use crate::lm::error::Result;
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
    /// Half of the tokens that a local window holds, on average over all key-value heads.
    pub(crate) average_window: f64,
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
    /// The plan, if there was one.
    pub(crate) plan: Option<PlanReport>,
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
            Self::Window => "window + sinks alone",
            Self::PlannedWindow => "planned windows + sinks alone",
            Self::Planned => "planned + maps, calibrated",
            Self::PlannedRefit => "planned + maps, calibrated, refitted",
            Self::Exchanged => "window + maps, as exchanged",
            Self::ClosedForm => "window + maps, closed form",
            Self::Calibrated => "window + maps, calibrated",
            Self::Pure => "maps alone with decay, calibrated",
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

/// Which head got which window.
#[derive(Debug, Serialize)]
pub(crate) struct PlanReport {
    sinks: usize,
    /// Tokens that the window of every key-value head holds, first layer first.
    windows: Vec<Vec<usize>>,
    /// How many of them are kept keys beyond it.
    kept: Vec<Vec<usize>>,
    /// Energy that every head's error was measured to leave in the residual stream.
    errors: Vec<Vec<f64>>,
    /// What less memory would have cost: half of the tokens a window holds on average, bytes of
    /// state, error of all heads.
    frontier: Vec<(f64, usize, f64)>,
}

impl From<&Plan> for PlanReport {
    fn from(plan: &Plan) -> Self {
        let heads = |value: &dyn Fn(&HeadPlan) -> f64| -> Vec<Vec<f64>> {
            plan.layers().iter().map(|layer| layer.iter().map(value).collect()).collect()
        };
        let windows = |value: &dyn Fn(&Window) -> usize| -> Vec<Vec<usize>> {
            let layers = plan.layers().iter();
            layers.map(|layer| layer.iter().map(|head| value(&head.window)).collect()).collect()
        };
        let point = |point: &Point| (point.average_window, point.bytes, point.error);
        Self {
            sinks: plan.sinks(),
            windows: windows(&|window| window.tokens()),
            kept: windows(&|window| window.kept),
            errors: heads(&|head| head.error),
            frontier: plan.frontier().iter().map(point).collect(),
        }
    }
}

impl PlanReport {
    /// How many heads got which window, and a few points of the frontier.
    fn text(&self) -> String {
        let mut counts = BTreeMap::new();
        for &tokens in self.windows.iter().flatten() {
            *counts.entry(tokens).or_insert(0) += 1;
        }
        let counts: Vec<String> =
            counts.iter().map(|(tokens, heads)| format!("{tokens} in {heads} heads")).collect();
        let tokens = self.windows.iter().flatten().sum::<usize>() as f64;
        let kept = 100.0 * self.kept.iter().flatten().sum::<usize>() as f64 / tokens;
        let step = self.frontier.len().div_ceil(6).max(1);
        let points = self.frontier.iter().rev().step_by(step).collect::<Vec<_>>();
        let points: Vec<String> = points
            .iter()
            .rev()
            .map(|(average, bytes, error)| {
                format!("{error:.2e} at {:.0} ({} kB)", 2.0 * average, bytes / 1000)
            })
            .collect();
        format!(
            "plan: tokens held exactly: {}; {kept:.0} % of them are kept keys\n\
             predicted error by their average: {}\n",
            counts.join(", "),
            points.join(", ")
        )
    }
}

impl Report {
    /// Writes the report to standard output.
    pub(crate) fn print(&self, json: bool) -> Result<()> {
        lm::print(self, json, Self::text)
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
        let chosen = self.plan.as_ref().map_or(String::new(), PlanReport::text);
        let check = self
            .logits_difference
            .map(|found| format!("softmax logits agree with the golden ones within {found:.1e}\n"));
        format!(
            "{}{}\n\n{table}\n{chosen}{}{} windows of {} {}, {:.0} tokens held exactly per head, \
             m = {} features\n\
             planned and calibrated on {} tokens in {} steps and {:.1} s; {:.1} s in all\n\
             decoding ({}): {:.0} tokens/s; softmax's key-value cache is {} kB after {} tokens and \
             goes on growing",
            self.prompt,
            self.generated,
            check.unwrap_or_default(),
            self.windows,
            self.context,
            if self.vocabulary == 256 { "bytes" } else { "tokens" },
            2.0 * self.average_window,
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
