//! The lower tiers of workers' KV blocks, as `/cluster/workers` and `/metrics` show them.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::backend::{ClusterSnapshot, WorkerState};

/// One tier of one worker. Totals since the worker's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvTierStatus {
    /// Blocks in it; of a store, those the worker knows of.
    pub blocks: u64,
    /// Most it may hold.
    pub blocks_max: u64,
    /// Blocks loaded from it.
    pub hits_total: u64,
    /// Blocks written to it.
    pub writes_total: u64,
    /// Blocks that found no room or could not be written.
    pub dropped_total: u64,
    /// Blocks found torn, corrupt, foreign or unreadable.
    pub broken_total: u64,
    /// Measured speed of loads from it, in bytes per second; 0 while nothing was measured.
    pub load_bytes_per_s: u64,
}

/// All tiers of one worker.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct KvTiersStatus {
    /// Host memory.
    pub host: Option<KvTierStatus>,
    /// Local disk.
    pub disk: Option<KvTierStatus>,
    /// Object store.
    pub object: Option<KvTierStatus>,
    /// Blocks that no tier had.
    pub misses_total: u64,
    /// Blocks that would have come later than they can be computed.
    pub declined_total: u64,
    /// Loads that waited for a read.
    pub loads_total: u64,
    /// Of these, those that gave up at their deadline.
    pub expired_total: u64,
    /// Microseconds that all loads waited.
    pub load_us_total: u64,
    /// Blocks read because of a router's hint.
    pub ahead_read_total: u64,
    /// Of these, blocks that a load took.
    pub ahead_hits_total: u64,
    /// Of these, blocks that nobody took in time.
    pub ahead_wasted_total: u64,
    /// Blocks of hints that found no room.
    pub ahead_refused_total: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TierLabel {
    model_name: String,
    tier: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model_name: String,
}

type ByTier = Family<TierLabel, Gauge>;
type ByModel = Family<ModelLabel, Gauge>;

/// Sums over live workers. Gauges, because a worker that restarts begins at 0.
#[derive(Debug, Default)]
pub(crate) struct TierMetrics {
    bytes: ByTier,
    hits: ByTier,
    writes: ByTier,
    dropped: ByTier,
    broken: ByTier,
    misses: ByModel,
    declined: ByModel,
    loads: ByModel,
    expired: ByModel,
    load_us: ByModel,
    ahead_read: ByModel,
    ahead_hits: ByModel,
    ahead_wasted: ByModel,
    ahead_refused: ByModel,
}

impl TierMetrics {
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let this = Self::default();
        let by_tier = [
            (
                "baton:kv_tier_bytes",
                "Bytes of KV blocks in a tier below the pool",
                &this.bytes,
            ),
            ("baton:kv_tier_hits", "KV blocks loaded from a tier", &this.hits),
            ("baton:kv_tier_writes", "KV blocks written to a tier", &this.writes),
            (
                "baton:kv_tier_dropped",
                "KV blocks that a tier had no room for, or failed to write",
                &this.dropped,
            ),
            (
                "baton:kv_tier_broken",
                "KV blocks found torn, corrupt, foreign or unreadable",
                &this.broken,
            ),
        ];
        for (name, help, family) in by_tier {
            registry.register(name, help, family.clone());
        }
        let by_model = [
            (
                "baton:kv_tier_misses",
                "KV blocks asked for that no tier had",
                &this.misses,
            ),
            (
                "baton:kv_tier_declined",
                "KV blocks computed because loading would have taken longer",
                &this.declined,
            ),
            ("baton:kv_tier_loads", "Loads that waited for a read", &this.loads),
            (
                "baton:kv_tier_loads_expired",
                "Loads that gave up at their deadline",
                &this.expired,
            ),
            (
                "baton:kv_tier_load_microseconds",
                "Time that loads waited, all together",
                &this.load_us,
            ),
            (
                "baton:kv_tier_ahead_read",
                "KV blocks read because of a router's hint",
                &this.ahead_read,
            ),
            (
                "baton:kv_tier_ahead_hits",
                "KV blocks read ahead that a load took",
                &this.ahead_hits,
            ),
            (
                "baton:kv_tier_ahead_wasted",
                "KV blocks read ahead that nobody took in time",
                &this.ahead_wasted,
            ),
            (
                "baton:kv_tier_ahead_refused",
                "KV blocks of hints that found no room",
                &this.ahead_refused,
            ),
        ];
        for (name, help, family) in by_model {
            registry.register(name, help, family.clone());
        }
        this
    }

    pub(crate) fn update(&self, snapshot: &ClusterSnapshot) {
        let add = |family: &ByTier, label: &TierLabel, value: u64| {
            family
                .get_or_create(label)
                .inc_by(i64::try_from(value).unwrap_or(i64::MAX));
        };
        let families = [&self.bytes, &self.hits, &self.writes, &self.dropped, &self.broken];
        families.iter().for_each(|family| family.clear());
        let by_model = [
            &self.misses,
            &self.declined,
            &self.loads,
            &self.expired,
            &self.load_us,
            &self.ahead_read,
            &self.ahead_hits,
            &self.ahead_wasted,
            &self.ahead_refused,
        ];
        by_model.iter().for_each(|family| family.clear());
        for worker in snapshot.workers.iter().filter(|w| w.state != WorkerState::Lost) {
            let tiers = &worker.kv_tiers;
            let mut any = false;
            for (tier, status) in [("host", tiers.host), ("disk", tiers.disk), ("object", tiers.object)] {
                let Some(status) = status else { continue };
                any = true;
                let label = TierLabel {
                    model_name: worker.model.clone(),
                    tier,
                };
                add(
                    &self.bytes,
                    &label,
                    status.blocks.saturating_mul(worker.kv_bytes_per_block),
                );
                add(&self.hits, &label, status.hits_total);
                add(&self.writes, &label, status.writes_total);
                add(&self.dropped, &label, status.dropped_total);
                add(&self.broken, &label, status.broken_total);
            }
            let totals = [
                tiers.misses_total,
                tiers.declined_total,
                tiers.loads_total,
                tiers.expired_total,
                tiers.load_us_total,
                tiers.ahead_read_total,
                tiers.ahead_hits_total,
                tiers.ahead_wasted_total,
                tiers.ahead_refused_total,
            ];
            let label = ModelLabel {
                model_name: worker.model.clone(),
            };
            for (family, total) in by_model.iter().zip(totals).filter(|_| any) {
                family
                    .get_or_create(&label)
                    .inc_by(i64::try_from(total).unwrap_or(i64::MAX));
            }
        }
    }
}
