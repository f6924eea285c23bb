//! Numbers for metrics.

use std::time::Duration;

/// One tier.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierUsage {
    /// Blocks in it now.
    pub blocks: u64,
    /// Blocks it may hold; 0 without the tier. For an object store: names remembered, which bounds nothing in the store.
    pub blocks_max: u64,
    /// Blocks that loads took from it.
    pub hits: u64,
    /// Blocks written to it.
    pub writes: u64,
    /// Blocks that were not written because a queue, the tier or memory was full, or a write failed.
    pub dropped: u64,
    /// Blocks that were found torn, corrupt or foreign, and removed; for an object store also reads that failed.
    pub broken: u64,
}

/// What hints brought about: `read` = `hits` + `wasted` + `held`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AheadStats {
    /// Blocks in memory now that no load has taken yet.
    pub held: u64,
    /// Blocks that were read because of a hint.
    pub read: u64,
    /// Of these, blocks that a load took.
    pub hits: u64,
    /// Blocks that nobody took in time.
    pub wasted: u64,
    /// Blocks of hints for which there was no room.
    pub refused: u64,
}

/// All of them. Totals since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TierStats {
    /// Host memory.
    pub host: TierUsage,
    /// The local disk.
    pub disk: TierUsage,
    /// The object store.
    pub object: TierUsage,
    /// Blocks asked for that no tier had.
    pub misses: u64,
    /// Blocks that were there but would have come later than they can be computed.
    pub declined: u64,
    /// Loads that had to wait for a read, ended in any way.
    pub loads: u64,
    /// Of these, those that gave up at their deadline.
    pub expired: u64,
    /// Time that sequences waited for loads, all added up.
    pub load_time: Duration,
    /// Read ahead.
    pub ahead: AheadStats,
}
