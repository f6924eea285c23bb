//! What a run found, as data, JSON and a table. All times are milliseconds, all rates per second of the measured run.

use crate::tally::Tally;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt;
use std::time::Duration;

/// Results of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The URL measured.
    pub url: String,
    /// The model asked for.
    pub model: String,
    /// How requests arrived, in words.
    pub load: String,
    /// Seed of the run.
    pub seed: u64,
    /// From the first request to the last answer.
    pub duration_s: f64,
    /// Whether the run was interrupted before its end.
    pub interrupted: bool,
    /// Requests put on the wire.
    pub requests_sent: u64,
    /// Requests answered in full.
    pub requests_completed: u64,
    /// Requests that failed.
    pub requests_failed: u64,
    /// Requests still in flight when the run was interrupted; neither completed nor failed.
    pub requests_unfinished: u64,
    /// Prompt tokens of completed requests, as the server counted them.
    pub input_tokens: u64,
    /// Of those, tokens whose KV was cached.
    pub cached_tokens: u64,
    /// The same as a share of the prompt tokens, 0 to 1.
    pub hit_rate: f64,
    /// What an infinite cache would have hit of the part of the trace that was replayed; only where prompts have the lengths
    /// recorded, and those are what the server counts.
    pub hit_rate_bound: Option<f64>,
    /// Tokens of completed answers.
    pub output_tokens: u64,
    /// Events with content of completed answers: a server may put several tokens into one.
    pub output_chunks: u64,
    /// Completed requests whose answer brought no usage, so that chunks were counted as tokens.
    pub answers_without_usage: u64,
    /// Share of the requests sent whose answer met the targets; where none were given, of those answered.
    pub good_share: f64,
    /// The same per second.
    pub goodput_per_s: f64,
    /// Completed requests per second.
    pub requests_per_s: f64,
    /// Output tokens per second.
    pub output_tokens_per_s: f64,
    /// Input and output tokens per second.
    pub total_tokens_per_s: f64,
    /// Time to first token, from the intended send time.
    pub ttft_ms: Latency,
    /// Inter-token latency: from one chunk with content to the next.
    pub itl_ms: Latency,
    /// Time per output token after the first, one mean per request.
    pub tpot_ms: Latency,
    /// From the intended send time to the end of the answer.
    pub e2e_ms: Latency,
    /// How late requests were sent. Large values mean that the generator, not only the server, was at its limit.
    pub send_delay_ms: Latency,
    /// Failures by kind.
    pub errors: Vec<ErrorCount>,
}

/// A distribution in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Latency {
    /// Number of samples.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Median.
    pub p50: f64,
    /// 90th percentile.
    pub p90: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

/// Failures of one kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorCount {
    /// `connect`, `http_<status>`, `timeout`, `cut`, `stream_error` or `malformed`.
    pub kind: String,
    /// How many.
    pub count: u64,
    /// The first one's message.
    pub example: String,
}

/// What a report says about its run, beside the numbers.
#[derive(Debug, Clone)]
pub struct Heading {
    /// See [`Report::url`].
    pub url: String,
    /// See [`Report::model`].
    pub model: String,
    /// See [`Report::load`].
    pub load: String,
    /// See [`Report::seed`].
    pub seed: u64,
    /// See [`Report::hit_rate_bound`].
    pub hit_rate_bound: Option<f64>,
}

impl Report {
    /// Computes the report.
    pub fn new(heading: Heading, tally: &Tally, elapsed: Duration, interrupted: bool) -> Self {
        let seconds = elapsed.as_secs_f64();
        let per_s = |count: u64| match seconds > 0.0 {
            true => count as f64 / seconds,
            false => 0.0,
        };
        Self {
            url: heading.url,
            model: heading.model,
            load: heading.load,
            seed: heading.seed,
            duration_s: seconds,
            interrupted,
            requests_sent: tally.sent,
            requests_completed: tally.completed,
            requests_failed: tally.failed(),
            requests_unfinished: tally.sent - tally.completed - tally.failed(),
            input_tokens: tally.input_tokens,
            cached_tokens: tally.cached_tokens,
            hit_rate: tally.cached_tokens as f64 / tally.input_tokens.max(1) as f64,
            hit_rate_bound: heading.hit_rate_bound,
            output_tokens: tally.output_tokens,
            output_chunks: tally.chunks,
            answers_without_usage: tally.without_usage,
            good_share: tally.good as f64 / tally.sent.max(1) as f64,
            goodput_per_s: per_s(tally.good),
            requests_per_s: per_s(tally.completed),
            output_tokens_per_s: per_s(tally.output_tokens),
            total_tokens_per_s: per_s(tally.output_tokens + tally.input_tokens),
            ttft_ms: Latency::of(&tally.ttft),
            itl_ms: Latency::of(&tally.itl),
            tpot_ms: Latency::of(&tally.tpot),
            e2e_ms: Latency::of(&tally.e2e),
            send_delay_ms: Latency::of(&tally.send_delay),
            errors: tally
                .failures
                .iter()
                .map(|(kind, (count, example))| ErrorCount {
                    kind: kind.to_string(),
                    count: *count,
                    example: example.clone(),
                })
                .collect(),
        }
    }
}

impl Latency {
    /// The distribution of recorded microseconds.
    pub(crate) fn of(histogram: &Histogram<u64>) -> Self {
        let ms = |micros: u64| micros as f64 / 1000.0;
        Self {
            count: histogram.len(),
            mean: histogram.mean() / 1000.0,
            p50: ms(histogram.value_at_quantile(0.50)),
            p90: ms(histogram.value_at_quantile(0.90)),
            p99: ms(histogram.value_at_quantile(0.99)),
            max: ms(histogram.max()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} at {}: {}, seed {}", self.model, self.url, self.load, self.seed)?;
        let broken = if self.interrupted { " (interrupted)" } else { "" };
        writeln!(f, "{:.2} s measured{broken}\n", self.duration_s)?;
        write!(
            f,
            "requests   {} sent, {} completed, {} failed",
            self.requests_sent, self.requests_completed, self.requests_failed
        )?;
        if self.requests_unfinished > 0 {
            write!(f, ", {} unfinished", self.requests_unfinished)?;
        }
        writeln!(f)?;
        writeln!(
            f,
            "tokens     {} in ({} cached, {:.2} %{}), {} out in {} chunks{}",
            self.input_tokens,
            self.cached_tokens,
            self.hit_rate * 100.0,
            match self.hit_rate_bound {
                None => String::new(),
                Some(bound) => format!(" of at most {:.2} %", bound * 100.0),
            },
            self.output_tokens,
            self.output_chunks,
            match self.answers_without_usage {
                0 => String::new(),
                some => format!(" ({some} answers without usage: their chunks were counted)"),
            }
        )?;
        writeln!(
            f,
            "rates      {:.2} requests/s ({:.2} good, {:.1} %), {:.1} output tokens/s, {:.1} tokens/s in all\n",
            self.requests_per_s,
            self.goodput_per_s,
            self.good_share * 100.0,
            self.output_tokens_per_s,
            self.total_tokens_per_s
        )?;
        writeln!(
            f,
            "{:<12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}",
            "ms", "mean", "p50", "p90", "p99", "max", "samples"
        )?;
        let rows = [
            ("TTFT", &self.ttft_ms),
            ("ITL", &self.itl_ms),
            ("TPOT", &self.tpot_ms),
            ("E2E", &self.e2e_ms),
            ("send delay", &self.send_delay_ms),
        ];
        for (name, l) in rows {
            match l.count {
                0 => writeln!(
                    f,
                    "{name:<12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>9}",
                    "-", "-", "-", "-", "-", 0
                )?,
                _ => writeln!(
                    f,
                    "{name:<12}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>10.2}{:>9}",
                    l.mean, l.p50, l.p90, l.p99, l.max, l.count
                )?,
            }
        }
        for error in &self.errors {
            write!(f, "\n{} x {}: {}", error.count, error.kind, error.example)?;
        }
        if !self.errors.is_empty() {
            writeln!(f)?;
        }
        Ok(())
    }
}
