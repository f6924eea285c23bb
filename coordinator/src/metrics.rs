//! What the coordinator itself counts: placements, the router's predictions, replays, lost workers, and the Raft store. Requests and latencies
//! are the gateway's to count.

use crate::router::Routing;
use baton_raftstore::RaftStore;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::{Family, MetricConstructor};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::time::Duration;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlacementLabel {
    prefill: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model_name: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DecisionLabel {
    model_name: String,
    tenant: String,
    outcome: &'static str,
}

/// Bucket bounds.
#[derive(Clone, Copy, Debug)]
struct Buckets(&'static [f64]);

impl MetricConstructor<Histogram> for Buckets {
    fn new_metric(&self) -> Histogram {
        Histogram::new(self.0.iter().copied())
    }
}

const QUEUE_S: &[f64] = &[
    0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0,
];
/// About a factor of 1, where predictions should be.
const RATIO: &[f64] = &[0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 4.0, 10.0];

type HistogramByModel = Family<ModelLabel, Histogram, Buckets>;

/// The counters. Cheap to clone: clones count together.
#[derive(Clone)]
pub(crate) struct Metrics {
    placements: Family<PlacementLabel, Counter>,
    pub(crate) replays: Counter,
    pub(crate) moves: Counter,
    pub(crate) workers_lost: Counter,
    decisions: Family<DecisionLabel, Counter>,
    queued: Family<ModelLabel, Gauge>,
    queue_time: HistogramByModel,
    ttft_ratio: HistogramByModel,
    store: StoreMetrics,
    routing: Routing,
}

impl Metrics {
    pub(crate) fn new(store: RaftStore, routing: Routing) -> Self {
        Self {
            placements: Family::default(),
            replays: Counter::default(),
            moves: Counter::default(),
            workers_lost: Counter::default(),
            decisions: Family::default(),
            queued: Family::default(),
            queue_time: Family::new_with_constructor(Buckets(QUEUE_S)),
            ttft_ratio: Family::new_with_constructor(Buckets(RATIO)),
            store: StoreMetrics(store),
            routing,
        }
    }

    /// A request was placed; `prefill` if its prompt is computed by another worker than the one that streams.
    pub(crate) fn placed(&self, prefill: bool) {
        let prefill = if prefill { "remote" } else { "local" };
        self.placements.get_or_create(&PlacementLabel { prefill }).inc();
    }

    /// Admission let a request in (`admitted`), or said why not.
    pub(crate) fn decided(&self, model: &str, tenant: &str, outcome: &'static str) {
        let label = DecisionLabel {
            model_name: model.to_owned(),
            tenant: tenant.to_owned(),
            outcome,
        };
        self.decisions.get_or_create(&label).inc();
    }

    pub(crate) fn queue_length(&self, model: &str, waiting: usize) {
        let waiting = i64::try_from(waiting).unwrap_or(i64::MAX);
        self.queued.get_or_create(&label(model)).set(waiting);
    }

    pub(crate) fn queued_for(&self, model: &str, waited: Duration) {
        self.queue_time
            .get_or_create(&label(model))
            .observe(waited.as_secs_f64());
    }

    /// A first token came, `measured` after its request was let in.
    pub(crate) fn predicted(&self, model: &str, predicted: Duration, measured: Duration) {
        let ratio = measured.as_secs_f64() / predicted.as_secs_f64().max(1e-6);
        self.ttft_ratio.get_or_create(&label(model)).observe(ratio);
    }

    /// Makes them visible in the registry behind `/metrics`.
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "baton:router_placements",
            "Requests placed on a worker, by where the prompt is computed",
            self.placements.clone(),
        );
        registry.register(
            "baton:request_replays",
            "Times a running request had to go on on another worker",
            self.replays.clone(),
        );
        registry.register(
            "baton:request_moves",
            "Times a running request was moved off a draining worker",
            self.moves.clone(),
        );
        registry.register(
            "baton:workers_lost",
            "Workers that left or were declared lost",
            self.workers_lost.clone(),
        );
        registry.register(
            "baton:admission_decisions",
            "Requests let in, or refused by reason, by tenant",
            self.decisions.clone(),
        );
        registry.register(
            "baton:num_requests_queued",
            "Requests that wait in this coordinator to be let in",
            self.queued.clone(),
        );
        registry.register(
            "baton:request_queue_time_seconds",
            "Time that requests let in had waited for it",
            self.queue_time.clone(),
        );
        registry.register(
            "baton:ttft_measured_over_predicted",
            "Time from being let in to the first token, divided by what was predicted of it",
            self.ttft_ratio.clone(),
        );
        registry.register_collector(Box::new(self.store.clone()));
        self.routing.metrics().register(registry);
        registry.register_collector(Box::new(IndexMetrics(self.routing.clone())));
    }
}

/// What the router took and how right it was. Clones count together.
#[derive(Clone, Debug)]
pub(crate) struct RouterMetrics {
    decision: Histogram,
    ttft_error: Histogram,
    cached_predicted: Counter,
    cached_measured: Counter,
    cached_missed: Counter,
    hints: Counter,
    hinted_blocks: Counter,
}

impl Default for RouterMetrics {
    fn default() -> Self {
        // 10 us to 20 ms; a decision that takes longer has waited for a lock.
        let decision = prometheus_client::metrics::histogram::exponential_buckets(1e-5, 2.0, 12);
        let error = prometheus_client::metrics::histogram::exponential_buckets(1e-3, 2.0, 15);
        Self {
            decision: Histogram::new(decision),
            ttft_error: Histogram::new(error),
            cached_predicted: Counter::default(),
            cached_measured: Counter::default(),
            cached_missed: Counter::default(),
            hints: Counter::default(),
            hinted_blocks: Counter::default(),
        }
    }
}

impl RouterMetrics {
    /// A choice was made, from the naming of the prompt's blocks on.
    pub(crate) fn decided(&self, took: Duration) {
        self.decision.observe(took.as_secs_f64());
    }

    /// A first token came.
    pub(crate) fn first_token(&self, predicted_s: f64, measured_s: f64) {
        self.ttft_error.observe((predicted_s - measured_s).abs());
    }

    /// A worker was told that so many blocks on its disk or in the store will be asked for.
    pub(crate) fn hinted(&self, blocks: u32) {
        self.hints.inc();
        self.hinted_blocks.inc_by(u64::from(blocks));
    }

    /// A request ended that had so many prompt tokens from a cache.
    pub(crate) fn cached(&self, predicted_tokens: usize, measured_tokens: u32) {
        let (predicted, measured) = (predicted_tokens as u64, u64::from(measured_tokens));
        self.cached_predicted.inc_by(predicted);
        self.cached_measured.inc_by(measured);
        self.cached_missed.inc_by(predicted.saturating_sub(measured));
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "baton:router_decision_seconds",
            "Time to choose the workers of a request, from the naming of its blocks on",
            self.decision.clone(),
        );
        registry.register(
            "baton:router_ttft_error_seconds",
            "Difference between predicted and measured time from placement to first token",
            self.ttft_error.clone(),
        );
        registry.register(
            "baton:router_predicted_cached_tokens",
            "Prompt tokens that the router expected to be found in the chosen worker's cache",
            self.cached_predicted.clone(),
        );
        registry.register(
            "baton:router_measured_cached_tokens",
            "Prompt tokens of the same requests that were found there",
            self.cached_measured.clone(),
        );
        registry.register(
            "baton:router_missed_cached_tokens",
            "Prompt tokens that were expected in a cache and were not there",
            self.cached_missed.clone(),
        );
        registry.register(
            "baton:router_read_ahead_hints",
            "Times a worker was told which blocks it will be asked for",
            self.hints.clone(),
        );
        registry.register(
            "baton:router_read_ahead_blocks",
            "Blocks on a disk or in a store that these hints were about",
            self.hinted_blocks.clone(),
        );
    }
}

/// Read from the router when scraped.
struct IndexMetrics(Routing);

impl std::fmt::Debug for IndexMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("IndexMetrics")
    }
}

impl Collector for IndexMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let stats = self.0.stats();
        let resyncs = ConstCounter::new(stats.resyncs);
        let help = "Times a worker was asked to tell its blocks anew";
        resyncs.encode(encoder.encode_descriptor("baton:router_resyncs", help, None, resyncs.metric_type())?)?;
        let gauges = [
            (
                "baton:router_index_blocks",
                "Distinct blocks in the router's index",
                signed(stats.index.blocks as u64),
            ),
            (
                "baton:router_index_pairs",
                "Worker-block pairs in the router's index",
                signed(stats.index.pairs),
            ),
            (
                "baton:router_index_bytes",
                "Bytes of the router's index",
                signed(stats.index.bytes as u64),
            ),
            (
                "baton:router_cold_workers",
                "Workers whose blocks the router does not know",
                signed(stats.cold as u64),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

fn label(model: &str) -> ModelLabel {
    ModelLabel {
        model_name: model.to_owned(),
    }
}

/// Read from the store when scraped.
#[derive(Clone)]
struct StoreMetrics(RaftStore);

impl std::fmt::Debug for StoreMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StoreMetrics")
    }
}

impl Collector for StoreMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let status = self.0.status();
        let counters = [
            ("baton:raft_proposals", "Commands answered", status.proposals_total),
            (
                "baton:raft_batches",
                "Batches of commands, each with one fsync",
                status.batches_total,
            ),
            (
                "baton:raft_batch_milliseconds",
                "Time spent in batches",
                status.batch_ms_total,
            ),
        ];
        for (name, help, value) in counters {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let gauges = [
            (
                "baton:raft_leader",
                "1 if this coordinator leads",
                i64::from(status.leads),
            ),
            (
                "baton:raft_applied_index",
                "Last applied log index",
                signed(status.applied_index),
            ),
            (
                "baton:raft_first_index",
                "Oldest log entry kept",
                signed(status.first_index),
            ),
        ];
        for (name, help, value) in gauges {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        Ok(())
    }
}

fn signed(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}
