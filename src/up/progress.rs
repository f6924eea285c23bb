//! What a starting cluster shows on stderr: spinners and bars on a terminal, plain lines elsewhere. Gone once the
//! cluster serves; later news are lines either way.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::time::Duration;

/// Redraw interval of spinners.
const TICK: Duration = Duration::from_millis(100);

/// The display.
pub struct Progress {
    bars: Option<MultiProgress>,
    open: BTreeMap<String, ProgressBar>,
}

impl Progress {
    /// A display fit for where stderr goes.
    pub fn new() -> Self {
        Self {
            bars: std::io::stderr().is_terminal().then(MultiProgress::new),
            open: BTreeMap::new(),
        }
    }

    /// Something began: `what` names it until [`done`](Self::done).
    pub fn begin(&mut self, what: &str, text: &str) {
        match &self.bars {
            Some(bars) => {
                let bar = bars.add(
                    ProgressBar::new_spinner()
                        .with_message(text.to_owned())
                        .with_prefix(what.to_owned()),
                );
                set_style(&bar, "{spinner} {prefix:16} {wide_msg}");
                bar.enable_steady_tick(TICK);
                self.open.insert(what.to_owned(), bar);
            }
            None => say(&format!("{what}: {text}")),
        }
    }

    /// It is `done` of `total` bytes along.
    pub fn bytes(&mut self, what: &str, text: &str, done: u64, total: u64) {
        let Some(bar) = self.open.get(what) else { return };
        if bar.length() != Some(total) {
            bar.set_length(total);
            set_style(
                bar,
                "{spinner} {prefix:16} {bar:30} {percent:>3} % of {total_bytes} {wide_msg}",
            );
        }
        bar.set_message(text.to_owned());
        bar.set_position(done);
    }

    /// It goes on with something else.
    pub fn update(&mut self, what: &str, text: &str) {
        match self.open.get(what) {
            Some(bar) => {
                set_style(bar, "{spinner} {prefix:16} {wide_msg}");
                bar.set_message(text.to_owned());
            }
            None => say(&format!("{what}: {text}")),
        }
    }

    /// It is finished.
    pub fn done(&mut self, what: &str, text: &str) {
        match self.open.get(what) {
            Some(bar) => {
                set_style(bar, "✓ {prefix:16} {wide_msg}");
                bar.finish_with_message(text.to_owned());
            }
            None => say(&format!("{what}: {text}")),
        }
    }

    /// Leaves what is shown as it is and stops drawing.
    pub fn close(&mut self) {
        for bar in std::mem::take(&mut self.open).into_values() {
            bar.disable_steady_tick();
            if !bar.is_finished() {
                bar.abandon();
            }
        }
    }
}

/// Prints a line of news. A terminal that has gone is no reason to end.
pub fn say(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Prints what the user asked for, on stdout.
pub fn print(text: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

fn set_style(bar: &ProgressBar, template: &str) {
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
}
