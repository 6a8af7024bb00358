//! The command line.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};
use dijiang::attention::Window;
use dijiang::calibrate::{Budget, Plan, Planner, ProjectionFit};
use dijiang::kernel::DctMapConfig;
use dijiang::layer::DijiangOptions;
use serde::Serialize;

use crate::lm::error::{Error, Result};

/// Exchange the softmax attention of a LLaMA-format model for DCT-kernelized linear attention and
/// measure what it costs.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Directory with config.json, model.safetensors (or its shards) and tokenizer.json, which a
    /// vocabulary of the 256 bytes does without
    #[arg(long, value_name = "DIR", default_value = crate::lm::MODEL, hide_default_value = true)]
    pub(crate) model: PathBuf,
    /// Text to measure on [default: valid.txt in the model's directory]
    #[arg(long, value_name = "FILE")]
    text: Option<PathBuf>,
    /// Text to calibrate on [default: calibration.txt in the model's directory]
    #[arg(long, value_name = "FILE")]
    calibration: Option<PathBuf>,
    /// Windows of the text to measure on; 0 means all
    #[arg(long, value_name = "N", default_value_t = 40)]
    pub(crate) windows: usize,
    /// What to measure, comma-separated [default: softmax, window, planned_window, planned, and
    /// planned_refit with --refit]
    #[arg(long, value_name = "ROWS", value_enum, value_delimiter = ',')]
    rows: Vec<Row>,
    /// Windows of the calibration text to calibrate on [default: 32768 tokens, 98304 with
    /// --thorough]
    #[arg(long, value_name = "N")]
    calibration_windows: Option<usize>,
    /// Steps of calibration by gradient, 0 for the closed form alone [default: 250 for the model
    /// that comes with the example, 100 for others, 300 with --thorough]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Windows in every step [default: 8192 tokens, 16384 with --thorough]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,
    /// Length of the first steps
    #[arg(long, value_name = "X", default_value_t = 0.1)]
    pub(crate) learning_rate: f64,
    /// Give the projections two more transforms each to fit: better, and slower per token
    #[arg(long, conflicts_with = "dense")]
    deep: bool,
    /// Fit the projections as dense matrices: better, and slower per token
    #[arg(long)]
    dense: bool,
    /// Most bytes of state for the planned rows, instead of --average-window
    #[arg(long, value_name = "BYTES")]
    budget_bytes: Option<usize>,
    /// Refit the output projections too, in closed form: the row planned_refit
    #[arg(long)]
    refit: bool,
    /// Tokens at the beginning that stay exact for every later query
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub(crate) sinks: usize,
    /// Seconds after which calibration by gradient ends, all models together [default: 60 for the
    /// model that comes with the example, no limit for others and with --thorough]
    #[arg(long, value_name = "X")]
    seconds: Option<f64>,
    /// Calibrate for minutes instead of seconds
    #[arg(long)]
    thorough: bool,
    /// Calibrate in closed form only
    #[arg(long, conflicts_with_all = ["thorough", "steps"])]
    quick: bool,
    /// Tokens per window [default: the model's max_position_embeddings]
    #[arg(long, value_name = "N")]
    pub(crate) context: Option<usize>,
    /// Half of the tokens that a local window holds, on average over all key-value heads where they
    /// are planned: a chunk, if there is one chunk back. All of the state, with sinks and what maps
    /// need, takes at most 8/7 of the bytes of so many tokens: 128 at a context of 2048 is a
    /// seventh of softmax's cache [default: 96, longer for heads narrower than 64]
    #[arg(long, value_name = "N", visible_alias = "chunk")]
    average_window: Option<usize>,
    /// Whole chunks of the local window before the query's own. The more of them, the more of
    /// what is held a query sees
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub(crate) back: usize,
    /// Blocks of head_dim features each
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) blocks: usize,
    /// Tokens of text to generate from the linear model
    #[arg(long, value_name = "N", default_value_t = 400)]
    pub(crate) generate: usize,
    /// What the generated text continues
    #[arg(long, value_name = "TEXT", default_value = "And it came to pass")]
    pub(crate) prompt: String,
    /// Temperature of sampling; 0 takes the likeliest token
    #[arg(long, value_name = "X", default_value_t = 0.7)]
    pub(crate) temperature: f64,
    /// Seed of the feature maps and of sampling
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Threads; 0 means one per core
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,
    /// Where to keep what was fitted, of the last row with maps: what `recall` reads, and
    /// `dijiang::checkpoint::load_maps`
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
    /// Print one JSON object instead of text
    #[arg(long)]
    pub(crate) json: bool,
}

/// What is measured: softmax attention or what takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub(crate) enum Row {
    /// The model as it was trained
    Softmax,
    /// One local window for all heads and sinks, and nothing for older tokens
    Window,
    /// The same, and linear attention with the maps as they are made
    Exchanged,
    /// The same, the maps calibrated in closed form
    ClosedForm,
    /// The same, the maps calibrated by gradient
    Calibrated,
    /// A window for each head by plan and sinks, and nothing for older tokens
    PlannedWindow,
    /// The same, and linear attention with calibrated maps
    Planned,
    /// The same, and the output projections refitted
    PlannedRefit,
    /// Linear attention for all tokens, the maps calibrated by gradient
    Pure,
}

impl Row {
    /// Whether older tokens go through feature maps.
    pub(crate) fn has_maps(self) -> bool {
        !matches!(self, Self::Softmax | Self::Window | Self::PlannedWindow)
    }

    /// Whether every head has a window of its own.
    pub(crate) fn is_planned(self) -> bool {
        matches!(self, Self::PlannedWindow | Self::Planned | Self::PlannedRefit)
    }

    /// Whether its maps are calibrated at all.
    pub(crate) fn is_calibrated(self) -> bool {
        self.has_maps() && self != Self::Exchanged
    }

    /// Whether its maps are calibrated by gradient.
    pub(crate) fn is_by_gradient(self) -> bool {
        self.is_calibrated() && self != Self::ClosedForm
    }
}

impl Args {
    /// What to measure, in the order of the table.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let asked = |row: &Row| match self.rows.is_empty() {
            true => match row {
                Row::Exchanged | Row::ClosedForm | Row::Calibrated | Row::Pure => false,
                Row::PlannedRefit => self.refit,
                _ => true,
            },
            false => self.rows.contains(row),
        };
        Row::value_variants().iter().copied().filter(asked).collect()
    }

    /// The models with maps that the rows ask for, but for the refit of one of them.
    pub(crate) fn models(&self) -> Vec<Row> {
        let rows = self.rows();
        let asked = |row: &Row| match row {
            Row::PlannedRefit => false,
            Row::Planned => rows.contains(row) || rows.contains(&Row::PlannedRefit),
            row => row.has_maps() && rows.contains(row),
        };
        Row::value_variants().iter().copied().filter(asked).collect()
    }

    /// Options that make no sense by themselves.
    pub(crate) fn check(&self) -> Result<()> {
        let fault =
            |option, expected, found: String| Err(Error::Option { option, expected, found });
        if self.prompt.is_empty() {
            return fault("prompt", "at least one letter", "none".to_owned());
        }
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return fault("temperature", "at least 0", self.temperature.to_string());
        }
        for (option, value) in [("context", self.context), ("average-window", self.average_window)]
        {
            if value == Some(0) {
                return fault(option, "at least 1", "0".to_owned());
            }
        }
        if let Some(found) =
            self.seconds().filter(|seconds| !(seconds.is_finite() && *seconds > 0.0))
        {
            return fault("seconds", "finite and more than 0", found.to_string());
        }
        Ok(())
    }

    /// What to fit the projections as.
    pub(crate) fn projection(&self) -> ProjectionFit {
        match (self.deep, self.dense) {
            (true, _) => ProjectionFit::Deep,
            (_, true) => ProjectionFit::Dense,
            (false, false) => ProjectionFit::Keep,
        }
    }

    /// The text to measure on.
    pub(crate) fn text(&self) -> Result<PathBuf> {
        self.file(self.text.as_ref(), "valid.txt", "text")
    }

    /// The text to calibrate on.
    pub(crate) fn calibration(&self) -> Result<PathBuf> {
        self.file(self.calibration.as_ref(), "calibration.txt", "calibration")
    }

    fn file(
        &self,
        given: Option<&PathBuf>,
        default: &str,
        option: &'static str,
    ) -> Result<PathBuf> {
        let path = given.cloned().unwrap_or_else(|| self.model.join(default));
        if path.exists() { Ok(path) } else { Err(Error::NoText { path, option }) }
    }

    /// The exact local window of heads of this dimension.
    pub(crate) fn window(&self, head_dim: usize) -> Window {
        let default = Window::for_dim(head_dim).chunk * 3 / 2;
        self.window_of(2 * self.average_window.unwrap_or(default))
    }

    /// A window that holds no more than so many tokens.
    pub(crate) fn window_of(&self, tokens: usize) -> Window {
        Window::new(tokens / self.back.saturating_add(1), self.back)
    }

    /// The layers before they are calibrated, but for their windows.
    pub(crate) fn options(&self) -> DijiangOptions {
        DijiangOptions::new()
            .with_map(DctMapConfig::new().with_blocks(self.blocks).with_seed(self.seed))
            .with_sinks(self.sinks)
    }

    /// The plan within the budget; a token's keys and values take `token_bytes` in all heads.
    pub(crate) fn plan(
        &self,
        planner: &Planner,
        head_dim: usize,
        token_bytes: usize,
    ) -> dijiang::Result<Plan> {
        let tokens = self.window(head_dim).tokens();
        let bytes = self.budget_bytes.unwrap_or(tokens * token_bytes * 8 / 7);
        let plan = planner.plan(Budget::Bytes(bytes))?;
        match self.budget_bytes.is_none() && 2.0 * plan.average_window() > tokens as f64 {
            true => planner.plan(Budget::AverageWindow(tokens as f64 / 2.0)),
            false => Ok(plan),
        }
    }

    /// Limit of calibration by gradient.
    pub(crate) fn seconds(&self) -> Option<f64> {
        self.seconds.or((!self.thorough && self.is_own_model()).then_some(60.0))
    }

    /// Whether this model's maps are calibrated once the plan is made. Those in closed form that a
    /// plan was measured with are as good as new ones.
    pub(crate) fn is_fitted(&self, row: Row) -> bool {
        row.is_calibrated() && !(row.is_planned() && self.steps() == 0)
    }

    /// How often a conversion goes through the model.
    pub(crate) fn walks(&self) -> usize {
        let rows = self.rows();
        usize::from(rows.iter().any(|row| row.is_planned()))
            + usize::from(self.models().iter().any(|&row| self.is_fitted(row)))
            + usize::from(rows.contains(&Row::PlannedRefit))
    }

    /// The model that comes with the example.
    fn is_own_model(&self) -> bool {
        self.model.ends_with("lm-kjv")
    }

    /// Windows of `context` tokens to calibrate on.
    pub(crate) fn calibration_windows(&self, context: usize) -> usize {
        self.calibration_windows
            .unwrap_or((if self.thorough { 98_304 } else { 32_768 } / context).max(2))
    }

    /// Steps of calibration by gradient.
    pub(crate) fn steps(&self) -> usize {
        self.steps.unwrap_or(match (self.quick, self.thorough) {
            (true, _) => 0,
            (false, true) => 300,
            (false, false) if self.is_own_model() => 250,
            (false, false) => 100,
        })
    }

    /// Windows of `context` tokens in every step.
    pub(crate) fn batch(&self, context: usize) -> usize {
        self.batch.unwrap_or((if self.thorough { 16_384 } else { 8192 } / context).max(1))
    }
}
