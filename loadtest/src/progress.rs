//! Progress on stderr while a run goes on: a live bar on a terminal, a line now and then in a log. It never touches
//! stdout, which belongs to the report.

use crate::options::ProgressStyle;
use indicatif::{ProgressBar, ProgressStyle as Template};
use std::time::Duration;
use tokio::time::Instant;

/// A log line this often.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// The bar is redrawn this often.
const TICK: Duration = Duration::from_millis(200);

/// What there is to show.
#[derive(Debug, Clone, Copy)]
pub struct Counts {
    /// Requests that ended.
    pub ended: u64,
    /// Of those, failures.
    pub failed: u64,
    /// Requests in flight.
    pub in_flight: u64,
    /// Output tokens so far.
    pub output_tokens: u64,
}

/// A progress display.
pub struct Progress {
    style: ProgressStyle,
    bar: Option<ProgressBar>,
    started: Instant,
    printed: Instant,
    total: Option<u64>,
}

impl Progress {
    /// A display for `total` requests, or for as long as it takes.
    pub fn new(style: ProgressStyle, total: Option<u64>) -> Self {
        let bar = (style == ProgressStyle::Bar).then(|| {
            let (bar, template) = match total {
                Some(total) => (
                    ProgressBar::new(total),
                    "{bar:32} {pos}/{len} {msg} [{elapsed} < {eta}]",
                ),
                None => (ProgressBar::new_spinner(), "{spinner} {pos} {msg} [{elapsed}]"),
            };
            if let Ok(template) = Template::with_template(template) {
                bar.set_style(template);
            }
            bar.enable_steady_tick(TICK);
            bar
        });
        Self {
            style,
            bar,
            started: Instant::now(),
            printed: Instant::now(),
            total,
        }
    }

    /// How often [`Progress::show`] wants to be called.
    pub fn interval(&self) -> Duration {
        TICK
    }

    /// Shows the state of the run.
    pub fn show(&mut self, counts: Counts) {
        let seconds = self.started.elapsed().as_secs_f64().max(1e-3);
        let rate = counts.output_tokens as f64 / seconds;
        let text = format!(
            "{} in flight, {} failed, {rate:.0} tokens/s",
            counts.in_flight, counts.failed
        );
        match (&self.bar, self.style) {
            (Some(bar), _) => {
                bar.set_position(counts.ended);
                bar.set_message(text);
            }
            (None, ProgressStyle::Lines) if self.printed.elapsed() >= LINE_INTERVAL => {
                self.printed = Instant::now();
                let total = self.total.map(|total| format!("/{total}")).unwrap_or_default();
                eprintln!("{seconds:.0} s: {}{total} requests, {text}", counts.ended);
            }
            _ => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
