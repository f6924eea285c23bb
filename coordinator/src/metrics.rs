//! What the coordinator itself counts: placements, replays, lost workers, and the Raft store. Requests and latencies
//! are the gateway's to count.

use baton_raftstore::RaftStore;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PlacementLabel {
    prefill: &'static str,
}

/// The counters. Cheap to clone: clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    placements: Family<PlacementLabel, Counter>,
    pub(crate) replays: Counter,
    pub(crate) moves: Counter,
    pub(crate) workers_lost: Counter,
    store: StoreMetrics,
}

impl Metrics {
    pub(crate) fn new(store: RaftStore) -> Self {
        Self {
            placements: Family::default(),
            replays: Counter::default(),
            moves: Counter::default(),
            workers_lost: Counter::default(),
            store: StoreMetrics(store),
        }
    }

    /// A request was placed; `prefill` if its prompt is computed by another worker than the one that streams.
    pub(crate) fn placed(&self, prefill: bool) {
        let prefill = if prefill { "remote" } else { "local" };
        self.placements.get_or_create(&PlacementLabel { prefill }).inc();
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
        registry.register_collector(Box::new(self.store.clone()));
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
