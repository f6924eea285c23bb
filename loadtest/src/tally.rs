//! Adds up what requests report. Memory is constant however long a run is: histograms and counters, no lists.

use crate::client::{Completion, Failure, FailureKind};
use hdrhistogram::Histogram;
use std::collections::BTreeMap;
use std::time::Duration;

/// Histograms hold microseconds up to two hours at three significant digits.
const MICROS_MAX: u64 = 2 * 3600 * 1_000_000;

/// Counts and histograms of a run.
#[derive(Debug, Clone)]
pub struct Tally {
    /// From intended send time to first content.
    pub ttft: Histogram<u64>,
    /// Between chunks with content.
    pub itl: Histogram<u64>,
    /// Mean time per token after the first, one sample per request.
    pub tpot: Histogram<u64>,
    /// From intended send time to the end.
    pub e2e: Histogram<u64>,
    /// From intended to actual send time.
    pub send_delay: Histogram<u64>,
    /// Requests put on the wire.
    pub sent: u64,
    /// Requests answered in full.
    pub completed: u64,
    /// Failures by kind, with one message each as an example.
    pub failures: BTreeMap<FailureKind, (u64, String)>,
    /// Tokens of answered requests' prompts, where the server counted them.
    pub input_tokens: u64,
    /// Of those, tokens whose KV was cached.
    pub cached_tokens: u64,
    /// Tokens of answers: counted by the server, else chunks.
    pub output_tokens: u64,
    /// Answers whose tokens had to be counted as chunks.
    pub without_usage: u64,
    /// Events with content.
    pub chunks: u64,
    /// Answers within the targets.
    pub good: u64,
    targets: Targets,
}

/// What makes an answer good.
#[derive(Debug, Clone, Copy, Default)]
pub struct Targets {
    /// Longest time to first token.
    pub ttft: Option<Duration>,
    /// Longest mean time per further token.
    pub tpot: Option<Duration>,
}

impl Default for Tally {
    fn default() -> Self {
        let histogram = || Histogram::new_with_bounds(1, MICROS_MAX, 3).expect("the bounds are valid constants");
        Self {
            ttft: histogram(),
            itl: histogram(),
            tpot: histogram(),
            e2e: histogram(),
            send_delay: histogram(),
            sent: 0,
            completed: 0,
            failures: BTreeMap::new(),
            input_tokens: 0,
            cached_tokens: 0,
            output_tokens: 0,
            without_usage: 0,
            chunks: 0,
            good: 0,
            targets: Targets::default(),
        }
    }
}

impl Tally {
    /// An empty one.
    pub fn new(targets: Targets) -> Self {
        Self {
            targets,
            ..Self::default()
        }
    }

    /// A request goes out `delay` later than it should.
    pub fn sent(&mut self, delay: Duration) {
        self.sent += 1;
        record(&mut self.send_delay, delay);
    }

    /// A request ended.
    pub fn ended(&mut self, outcome: &Result<Completion, Failure>) {
        match outcome {
            Ok(completion) => self.completed(completion),
            Err(failure) => {
                // Kinds are few by construction (status codes are three digits), so the map is bounded.
                let entry = self
                    .failures
                    .entry(failure.kind)
                    .or_insert_with(|| (0, failure.message.clone()));
                entry.0 += 1;
            }
        }
    }

    /// Requests that failed.
    pub fn failed(&self) -> u64 {
        self.failures.values().map(|(count, _)| count).sum()
    }

    fn completed(&mut self, completion: &Completion) {
        self.completed += 1;
        record(&mut self.ttft, completion.first);
        record(&mut self.e2e, completion.total);
        completion.gaps.iter().for_each(|gap| record(&mut self.itl, *gap));
        let tokens = match completion.usage {
            Some(usage) => {
                self.input_tokens += usage.prompt_tokens;
                self.cached_tokens += usage.prompt_tokens_details.unwrap_or_default().cached_tokens;
                usage.completion_tokens
            }
            None => {
                self.without_usage += 1;
                completion.chunks
            }
        };
        self.output_tokens += tokens;
        self.chunks += completion.chunks;
        let rest = completion.total.saturating_sub(completion.first);
        let tpot = rest.checked_div(u32::try_from(tokens.saturating_sub(1)).unwrap_or(u32::MAX));
        if let Some(tpot) = tpot {
            record(&mut self.tpot, tpot);
        }
        let within = |time: Duration, target: Option<Duration>| target.is_none_or(|target| time <= target);
        let good = within(completion.first, self.targets.ttft) && within(tpot.unwrap_or_default(), self.targets.tpot);
        self.good += u64::from(good);
    }
}

fn record(histogram: &mut Histogram<u64>, time: Duration) {
    histogram.saturating_record(u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
}
