//! The lower tiers of this worker's KV blocks: the scheduler's [`KvTiers`] over `baton-tiers`, run by the engine thread.
//!
//! The engine thread copies blocks out of and into the arena, between steps; reads and writes run on the
//! runtime and answer with a [`Command`]. A block is copied out in the plan that evicts it, before anybody writes there, so
//! there is nothing to pin; and only this thread copies in, so a late read has nowhere to land. A copy costs microseconds
//! where the block's computation costs milliseconds; still all copies of one turn share a budget, because streams
//! wait meanwhile: what exceeds it is not kept, or loaded in the next turn. What comes and goes below the pool is told to routers
//! with the pool's own events ([`crate::block_feed`]).
//!
//! Not here: what is kept and whether loading pays (`baton-tiers`), the sequence's states (`baton-engine`).

use crate::block_feed::TierChanges;
use crate::config::TierConfig;
use crate::engine_thread::{Command, EngineHandle};
use crate::{WorkerConfig, WorkerError};
use baton_engine::{BlockEvent, KvTiers, LoadRequest, LoadStart, Plan, Scheduler, SeqId};
use baton_kvtransfer::Region;
use baton_model::KvGeometry;
use baton_proto::block_hash::{BlockHash, short};
use baton_proto::{cluster, limits};
use baton_tiers::record::Shape;
use baton_tiers::{Block, DiskTier, Done, Limits, ObjectTier, Pool, Tier, TierIo, TierUsage, Tiers};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Time that copies may take in one turn of the engine: half of the default step target. Only an admission that evicts hundreds
/// of blocks gets near it, and its prompt then computes for seconds. With a fifth of this, a 2,000-token prompt
/// lost the beginnings of what it evicted, without which the rest is of no use (`docs/kv-tiers.md`).
const COPY_BUDGET: Duration = Duration::from_millis(75);
/// Memory for blocks that wait to be written, for each of disk and store, and blocks in any case: a second or so of a
/// quick machine's prefill at the speed of a slow disk.
const WRITES_QUEUED_BYTES: usize = 32 << 20;
const WRITES_QUEUED_MIN: usize = 64;
const WRITES_QUEUED_MAX: usize = 1024;
/// Memory for blocks that are read ahead, and blocks in any case.
const READS_BYTES: usize = 32 << 20;
const READS_MIN: usize = 32;
const READS_MAX: usize = 256;
/// Memory for blocks that are read because of a router's hint, and blocks in any case: several prompts' worth, since a hint
/// takes no room from loads, and a prompt that would not fit is read as far as it does.
const AHEAD_BYTES: usize = 64 << 20;
const AHEAD_MIN: usize = 32;
const AHEAD_MAX: usize = limits::READ_AHEAD_BLOCKS_MAX;
/// Blocks of each tier that a router is told of when it is told everything: some 6 MiB here, and 4 there. Of a larger tier it
/// learns of the rest as it changes.
const TOLD_MAX: usize = 1 << 18;
/// Sequences that wait for loads at once.
const LOADS_MAX: usize = 64;

/// The next plan of a worker with or without lower tiers.
pub(crate) fn plan(tiers: Option<&mut WorkerTiers>, scheduler: &mut Scheduler) -> Plan {
    let Some(tiers) = tiers else {
        return scheduler.plan();
    };
    tiers.turn(scheduler);
    let plan = scheduler.plan_with(tiers);
    tiers.pump();
    plan
}

/// What was opened before the engine thread starts.
pub(crate) struct OpenTiers {
    core: Tiers<Block>,
    pool: Pool,
    disk: Option<DiskTier>,
    object: Option<ObjectTier>,
}

impl OpenTiers {
    /// Blocks that routers are told of at most.
    pub(crate) fn blocks_told_max(&self) -> usize {
        let stats = self.core.stats();
        let told = |usage: TierUsage| usize::try_from(usage.blocks_max).unwrap_or(usize::MAX).min(TOLD_MAX);
        told(stats.host) + told(stats.disk) + told(stats.object)
    }
}

/// Memory that the tiers take at most.
pub(crate) fn memory_bytes_max(config: &TierConfig) -> u64 {
    let writers = u64::from(config.disk > 0) + u64::from(config.object_url.is_some());
    let reading = if writers > 0 { READS_BYTES + AHEAD_BYTES } else { 0 };
    config
        .host
        .saturating_add(writers * WRITES_QUEUED_BYTES as u64 + reading as u64)
}

/// Opens the configured tiers; `None` without any. Blocking: it looks through the disk.
pub(crate) fn open(
    config: &WorkerConfig,
    geometry: KvGeometry,
    kv_digest: [u8; 32],
) -> Result<Option<OpenTiers>, WorkerError> {
    let TierConfig {
        host,
        disk_dir,
        disk,
        object_url,
    } = &config.tiers;
    let block_bytes = geometry.block_bytes();
    let shape = Shape { kv_digest, block_bytes };
    let host_blocks = usize::try_from(host / block_bytes as u64).unwrap_or(usize::MAX);
    if *disk > 0 && disk_dir.is_none() {
        return Err(WorkerError::Config(
            "tiers.disk has a size, but tiers.disk_dir is missing; name a directory".into(),
        ));
    }
    let started = Instant::now();
    let disk = match disk_dir {
        Some(dir) if *disk > 0 => Some(DiskTier::open(dir, *disk, shape)?),
        _ => None,
    };
    let variables = std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)));
    let object = object_url
        .as_ref()
        .map(|url| ObjectTier::open(url, shape, variables))
        .transpose()?;
    if host_blocks == 0 && disk.is_none() && object.is_none() {
        return Ok(None);
    }
    let writes = (WRITES_QUEUED_BYTES / block_bytes).clamp(WRITES_QUEUED_MIN, WRITES_QUEUED_MAX);
    let limits = Limits {
        host_blocks,
        disk_blocks: disk.as_ref().map_or(0, |(disk, _)| disk.slots()),
        object: object.is_some(),
        writes_queued_max: writes / 2,
        // Half of them are handed over before a step, so that writing goes on while it runs.
        writes_in_flight_max: writes / 2,
        reads_max: (READS_BYTES / block_bytes).clamp(READS_MIN, READS_MAX),
        loads_max: LOADS_MAX,
        ahead_max: if disk.is_some() || object.is_some() {
            (AHEAD_BYTES / block_bytes).clamp(AHEAD_MIN, AHEAD_MAX)
        } else {
            0
        },
    };
    let mut core = Tiers::new(limits);
    let disk = disk.map(|(disk, found)| {
        tracing::info!(blocks = found.len(), took = ?started.elapsed(), "found KV blocks on disk");
        core.restore_disk(found.into_iter());
        disk
    });
    core.watch();
    Ok(Some(OpenTiers {
        core,
        pool: Pool::new(block_bytes, limits.buffers()),
        disk,
        object,
    }))
}

/// A sequence that waits.
struct Waiting {
    blocks: Vec<u32>,
    filled: usize,
    /// Filled before the scheduler was told to wait.
    at_once: usize,
}

/// See the module.
pub(crate) struct WorkerTiers {
    core: Tiers<Block>,
    pool: Pool,
    io: TierIo,
    region: Arc<Region>,
    geometry: KvGeometry,
    handle: EngineHandle,
    runtime: Handle,
    started: Instant,
    /// Spent on copies in this turn.
    copied_for: Duration,
    waiting: HashMap<SeqId, Waiting>,
    /// Blocks are here that the budget left for the next turn.
    unfinished: bool,
}

impl WorkerTiers {
    /// Must be called within the runtime that IO is to run on.
    pub(crate) fn new(open: OpenTiers, region: Arc<Region>, geometry: KvGeometry, handle: EngineHandle) -> Self {
        let runtime = Handle::current();
        Self {
            core: open.core,
            io: TierIo::new(open.pool.clone(), open.disk, open.object, runtime.clone()),
            pool: open.pool,
            region,
            geometry,
            handle,
            runtime,
            started: Instant::now(),
            copied_for: Duration::ZERO,
            waiting: HashMap::new(),
            unfinished: false,
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Before a plan: loads go on, and those that are over or too late end.
    fn turn(&mut self, scheduler: &mut Scheduler) {
        self.copied_for = Duration::ZERO;
        self.unfinished = false;
        let now = self.now();
        let late = self.core.expired(now);
        let seqs: Vec<SeqId> = self.waiting.keys().copied().collect();
        for seq in seqs {
            self.fill(seq);
            let over = self.core.is_over(seq.0);
            if !over && !late.contains(&seq.0) {
                continue;
            }
            if !over {
                tracing::debug!(%seq, "a load took too long; computing the rest");
            }
            if let Some(waiting) = self.waiting.remove(&seq) {
                self.core.end(seq.0, now);
                scheduler.load_ended(seq, waiting.filled - waiting.at_once);
            }
        }
    }

    /// After a plan: begins what reads and writes there are.
    fn pump(&mut self) {
        let now = self.now();
        while let Some(action) = self.core.poll(now) {
            let handle = self.handle.clone();
            self.io.run(action, |done| async move {
                handle.send(Command::Tier(Box::new(done))).await
            });
        }
    }

    /// Whether the next turn has something to do without hearing from anybody.
    pub(crate) fn has_work(&self) -> bool {
        self.unfinished
    }

    pub(crate) fn done(&mut self, done: Done<Block>) {
        self.core.done(done, self.now());
    }

    /// A router says that these blocks will be asked for soon, and what precedes the first of them.
    pub(crate) fn read_ahead(&mut self, scheduler: &Scheduler, parent: u64, names: &[BlockHash]) {
        let in_pool = |name: &BlockHash| scheduler.has_block(name);
        self.core.read_ahead(parent, names, in_pool, self.now());
    }

    /// What came and went in each tier since the last call; `None` if routers must be told of all of it.
    pub(crate) fn take_changes(&mut self) -> Option<[TierChanges; 3]> {
        self.core.take_changes()
    }

    /// What each tier has.
    pub(crate) fn present(&mut self) -> [TierChanges; 3] {
        self.core.present(TOLD_MAX)
    }

    /// The sequence is gone, or its blocks only wait for a push to end.
    pub(crate) fn cancel(&mut self, seq: SeqId) {
        if self.waiting.remove(&seq).is_some() {
            self.core.end(seq.0, self.now());
        }
    }

    /// Copies what has come into the sequence's blocks, in order.
    fn fill(&mut self, seq: SeqId) {
        let Some(waiting) = self.waiting.get_mut(&seq) else {
            return;
        };
        while let Some(&block) = waiting.blocks.get(waiting.filled) {
            if self.copied_for >= COPY_BUDGET {
                self.unfinished = true;
                return;
            }
            let started = Instant::now();
            let Some(bytes) = self.core.take(seq.0) else { return };
            // Inside the arena: the scheduler has only blocks of this engine.
            let _ = self
                .region
                .copy_in(self.geometry.block_range(block).start, bytes.as_ref());
            waiting.filled += 1;
            self.copied_for += started.elapsed();
        }
    }

    pub(crate) fn stats(&self) -> cluster::KvTiers {
        let stats = self.core.stats();
        let block_bytes = self.pool.block_bytes() as f64;
        let rate = |tier| {
            let time = self.core.block_time(tier).filter(|time| !time.is_zero());
            // Rounded to what the wire carries.
            time.map_or(0.0, |time| (block_bytes / time.as_secs_f64()) as f32)
        };
        let usage = |tier, usage: TierUsage| cluster::TierUsage {
            load_bytes_per_s: rate(tier),
            blocks: usage.blocks,
            blocks_max: usage.blocks_max,
            hits_total: usage.hits,
            writes_total: usage.writes,
            dropped_total: usage.dropped,
            broken_total: usage.broken,
        };
        cluster::KvTiers {
            host: (stats.host.blocks_max > 0).then(|| usage(Tier::Host, stats.host)),
            disk: (stats.disk.blocks_max > 0).then(|| usage(Tier::Disk, stats.disk)),
            object: (stats.object.blocks_max > 0).then(|| usage(Tier::Object, stats.object)),
            misses_total: stats.misses,
            declined_total: stats.declined,
            loads_total: stats.loads,
            expired_total: stats.expired,
            load_us_total: u64::try_from(stats.load_time.as_micros()).unwrap_or(u64::MAX),
            ahead_read_total: stats.ahead.read,
            ahead_hits_total: stats.ahead.hits,
            ahead_wasted_total: stats.ahead.wasted,
            ahead_refused_total: stats.ahead.refused,
        }
    }
}

impl KvTiers for WorkerTiers {
    fn observe(&mut self, event: &BlockEvent) {
        let (BlockEvent::Stored { parent, hash, block } | BlockEvent::Evicted { parent, hash, block }) = *event;
        let parent = short(&parent);
        let (pool, region, copied_for) = (&self.pool, &self.region, &mut self.copied_for);
        let start = self.geometry.block_range(block).start;
        let copy = || {
            if *copied_for >= COPY_BUDGET {
                return None;
            }
            let started = Instant::now();
            let copy = pool.fill(|bytes| region.copy_out(start, bytes));
            *copied_for += started.elapsed();
            copy
        };
        match event {
            BlockEvent::Stored { .. } => self.core.stored(hash, parent, copy),
            BlockEvent::Evicted { .. } => self.core.evicted(hash, parent, copy),
        }
    }

    fn load(&mut self, request: &LoadRequest) -> LoadStart {
        let (seq, now) = (request.seq, self.now());
        let parent = short(&request.parent);
        if self
            .core
            .load(seq.0, parent, request.names.clone(), request.compute, now)
            == 0
        {
            return LoadStart::default();
        }
        let waiting = Waiting {
            blocks: request.blocks.clone(),
            filled: 0,
            at_once: 0,
        };
        self.waiting.insert(seq, waiting);
        self.fill(seq);
        let over = self.core.is_over(seq.0);
        let filled = self.waiting.get(&seq).map_or(0, |waiting| waiting.filled);
        if over {
            self.cancel(seq);
        } else if let Some(waiting) = self.waiting.get_mut(&seq) {
            waiting.at_once = filled;
            let left = self.core.deadline(seq.0).unwrap_or(now).saturating_sub(now);
            let handle = self.handle.clone();
            self.runtime.spawn(async move {
                tokio::time::sleep(left).await;
                handle.send(Command::TierDeadline).await;
            });
        }
        LoadStart {
            now: filled,
            pending: !over,
        }
    }
}
