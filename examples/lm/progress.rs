//! One progress bar on standard error; nothing is drawn where that is not a terminal.

use indicatif::{ProgressBar, ProgressStyle};

pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new() -> Self {
        let style = ProgressStyle::with_template("{msg:32} {wide_bar} {pos}/{len} {elapsed}");
        Self(ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// Starts counting `steps` steps of the work called `name`.
    pub(crate) fn stage(&self, name: &'static str, steps: usize) {
        self.0.set_message(name);
        self.0.set_length(steps as u64);
        self.0.set_position(0);
    }

    /// One step is done.
    pub(crate) fn tick(&self) {
        self.0.inc(1);
    }

    /// Takes the bar off the screen.
    pub(crate) fn finish(&self) {
        self.0.finish_and_clear();
    }
}
