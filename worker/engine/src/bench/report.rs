//! What was found, as data, JSON and a table.

use std::fmt;

use serde::Serialize;

use super::{Limits, Workload};

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// The workload in words.
    pub name: String,
    /// What was run.
    pub workload: Workload,
    /// Tokens per second over all sequences; the median of the repeats.
    pub tokens_per_s: f64,
    /// Milliseconds of a step (a chunk, or one token of every sequence), on average in the median repeat.
    pub step_ms: f64,
    /// Bytes of weights and KV that a decode step has to read, on average.
    pub bytes_per_step: Option<f64>,
    /// The same as a rate, 10^9 bytes per second.
    pub gb_per_s: Option<f64>,
    /// That rate over the best read bandwidth of the machine. Above 1 only if caches hold much of it.
    pub memory_fraction: Option<f64>,
    /// Operations a token needs, on average; a multiply-add is two.
    pub operations_per_token: f64,
    /// The same as a rate, 10^9 per second.
    pub gop_per_s: f64,
    /// That rate over the peak of the fastest arithmetic for the weights' format.
    pub arithmetic_fraction: Option<f64>,
    /// Tokens per second of each repeat, in order.
    pub samples_tokens_per_s: Vec<f64>,
}

/// Results of one run.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The model's path.
    pub model: String,
    /// Compute threads.
    pub threads: usize,
    /// Seconds from the files to a loaded engine.
    pub load_s: f64,
    /// Bytes of weights a decode step reads.
    pub weight_bytes: u64,
    /// Most prompt tokens of one step.
    pub chunk_tokens: usize,
    /// Tokens each sequence of a decode figure generated per repeat.
    pub decode_tokens: usize,
    /// Measured runs of each figure.
    pub repeats: usize,
    /// The machine, if it was measured.
    pub limits: Option<Limits>,
    /// The figures.
    pub figures: Vec<Figure>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{}: {} threads, {:.0} MB of weights per step, loaded in {:.1} s",
            self.model,
            self.threads,
            self.weight_bytes as f64 / 1e6,
            self.load_s
        )?;
        writeln!(
            f,
            "chunks of {} tokens, {} tokens generated, median of {}\n",
            self.chunk_tokens, self.decode_tokens, self.repeats
        )?;
        writeln!(
            f,
            "{:<20}{:>10}{:>10}{:>10}{:>9}{:>12}{:>9}{:>10}",
            "", "tokens/s", "ms/step", "GB/s", "of best", "GOP/s", "of peak", "spread"
        )?;
        for figure in &self.figures {
            let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1}"));
            writeln!(
                f,
                "{:<20}{:>10.1}{:>10.2}{:>10}{:>9}{:>12.1}{:>9}{:>10}",
                figure.name,
                figure.tokens_per_s,
                figure.step_ms,
                number(figure.gb_per_s),
                percent(figure.memory_fraction),
                figure.gop_per_s,
                percent(figure.arithmetic_fraction),
                percent(spread(&figure.samples_tokens_per_s)),
            )?;
        }
        Ok(())
    }
}

fn percent(fraction: Option<f64>) -> String {
    fraction.map_or("-".to_owned(), |fraction| format!("{:.1} %", 100.0 * fraction))
}

/// Distance from the slowest to the fastest sample, as a fraction of the median; of two samples at least.
fn spread(samples: &[f64]) -> Option<f64> {
    let least = samples.iter().copied().reduce(f64::min)?;
    let most = samples.iter().copied().reduce(f64::max)?;
    (samples.len() > 1).then(|| (most - least) / median(samples))
}

/// The middle value, or the mean of the two middle ones; 0 of none.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread() {
        assert_eq!(median(&[]), 0.0);
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 9.0]), 3.0);
        assert_eq!(spread(&[2.0]), None);
        assert_eq!(spread(&[1.0, 2.0, 4.0]), Some(1.5));
    }
}
