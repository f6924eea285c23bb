//! What a simulation found, as data, JSON and a table.

use super::SimulationOptions;
use crate::report::Latency;
use crate::trace_prompts::CacheBound;
use baton_engine::MockProfile;
use hdrhistogram::Histogram;
use serde::Serialize;
use std::fmt::Write;
use std::time::Duration;

/// Counts and latencies of a run.
#[derive(Debug, Default)]
pub struct Tally {
    pub completed: u64,
    pub refused: u64,
    pub good: u64,
    pub prompt_tokens: u64,
    pub cached_tokens: u64,
    pub output_tokens: u64,
    pub ttft: Latencies,
    pub itl: Latencies,
    pub e2e: Latencies,
}

/// Durations, to three digits.
#[derive(Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        // Three digits of microseconds, up to a year.
        Self(Histogram::new_with_bounds(1, 365 * 86_400 * 1_000_000, 3).expect("the bounds are within its range"))
    }
}

impl Latencies {
    pub fn record(&mut self, value: Duration) {
        self.0
            .saturating_record(u64::try_from(value.as_micros()).unwrap_or(u64::MAX));
    }

    fn summary(&self) -> Latency {
        Latency::of(&self.0)
    }
}

/// Results of one simulated run.
#[derive(Debug, Clone, Serialize)]
pub struct SimulationReport {
    /// The policy.
    pub policy: String,
    /// Workers.
    pub workers: usize,
    /// What each of them pretends to be.
    pub profile: MockProfile,
    /// KV memory of each.
    pub kv_bytes_per_worker: u64,
    /// Tokens of KV that all workers hold together.
    pub kv_tokens: u64,
    /// Tokens per block.
    pub block_size: usize,
    /// Speed of the replay.
    pub speed: f64,
    /// How many times shorter all times are than those of the machine pretended to be.
    pub time_scale: f64,
    /// Seed of the policy.
    pub seed: u64,
    /// Virtual time from the first arrival to the last token.
    pub duration_s: f64,
    /// Requests answered in full.
    pub requests_completed: u64,
    /// Requests that no worker could ever take: longer than its whole KV memory.
    pub requests_refused: u64,
    /// Prompt tokens of completed requests.
    pub prompt_tokens: u64,
    /// Of those, found in the prefix cache.
    pub cached_tokens: u64,
    /// Tokens of the answers.
    pub output_tokens: u64,
    /// Share of prompt tokens found in the prefix cache.
    pub hit_rate: f64,
    /// The same for an infinite cache that all workers share.
    pub hit_rate_bound: f64,
    /// Time to first token.
    pub ttft_ms: Latency,
    /// Time between tokens.
    pub itl_ms: Latency,
    /// Arrival to last token.
    pub e2e_ms: Latency,
    /// The targets of a good request: time to first token, ...
    pub ttft_target_ms: f64,
    /// ... and mean time per further token.
    pub tpot_target_ms: f64,
    /// Share of all requests that meet both.
    pub good_share: f64,
    /// Good requests per second.
    pub goodput_per_s: f64,
    /// Mean share of the time that workers computed.
    pub busy_mean: f64,
    /// The busiest worker's busy time over the mean: 1 is perfect balance.
    pub busy_max_over_mean: f64,
}

impl SimulationReport {
    pub(super) fn new(
        policy: &str,
        options: &SimulationOptions,
        bound: CacheBound,
        tally: &Tally,
        end: Duration,
        busy: &[f64],
    ) -> Self {
        let seconds = end.as_secs_f64().max(f64::MIN_POSITIVE);
        let mean = busy.iter().sum::<f64>() / busy.len().max(1) as f64;
        let most = busy.iter().copied().fold(0.0, f64::max);
        let all = (tally.completed + tally.refused).max(1) as f64;
        let blocks = u64::from(options.profile.blocks(options.kv_bytes, options.block_size));
        Self {
            policy: policy.to_owned(),
            workers: options.workers,
            profile: options.profile,
            kv_bytes_per_worker: options.kv_bytes,
            kv_tokens: blocks * options.block_size as u64 * options.workers as u64,
            block_size: options.block_size,
            speed: options.speed,
            time_scale: options.time_scale,
            seed: options.seed,
            duration_s: end.as_secs_f64(),
            requests_completed: tally.completed,
            requests_refused: tally.refused,
            prompt_tokens: tally.prompt_tokens,
            cached_tokens: tally.cached_tokens,
            output_tokens: tally.output_tokens,
            hit_rate: tally.cached_tokens as f64 / tally.prompt_tokens.max(1) as f64,
            hit_rate_bound: bound.rate(),
            ttft_ms: tally.ttft.summary(),
            itl_ms: tally.itl.summary(),
            e2e_ms: tally.e2e.summary(),
            ttft_target_ms: options.ttft_target.as_secs_f64() * 1e3,
            tpot_target_ms: options.tpot_target.as_secs_f64() * 1e3,
            good_share: tally.good as f64 / all,
            goodput_per_s: tally.good as f64 / seconds,
            busy_mean: mean / seconds,
            busy_max_over_mean: if mean > 0.0 { most / mean } else { 1.0 },
        }
    }
}

/// Reports of one trace as a table for people (Markdown).
pub fn table(reports: &[SimulationReport]) -> String {
    let mut text = String::new();
    if let Some(first) = reports.first() {
        let _ = writeln!(
            text,
            "{} requests, {:.1} M prompt tokens, {} workers, replay at {} x; an infinite shared cache would hit {:.2} %; good: \
             first token within {} ms, {} ms per further one\n",
            first.requests_completed + first.requests_refused,
            first.prompt_tokens as f64 / 1e6,
            first.workers,
            first.speed,
            first.hit_rate_bound * 100.0,
            first.ttft_target_ms,
            first.tpot_target_ms,
        );
    }
    text += "| policy | KV tokens per worker | hit rate | TTFT p50 / p90 / p99 ms | ITL p50 / p99 ms | good | good/s | busy | busiest / mean |\n";
    text += "|---|---|---|---|---|---|---|---|---|\n";
    for r in reports {
        let _ = writeln!(
            text,
            "| {} | {:.2} M | {:.2} % | {:.0} / {:.0} / {:.0} | {:.1} / {:.1} | {:.1} % | {:.2} | {:.0} % | {:.2} |",
            r.policy,
            r.kv_tokens as f64 / r.workers as f64 / 1e6,
            r.hit_rate * 100.0,
            r.ttft_ms.p50,
            r.ttft_ms.p90,
            r.ttft_ms.p99,
            r.itl_ms.p50,
            r.itl_ms.p99,
            r.good_share * 100.0,
            r.goodput_per_s,
            r.busy_mean * 100.0,
            r.busy_max_over_mean,
        );
    }
    text
}
