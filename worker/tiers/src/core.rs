//! The core: which block is in which tier, what is read and written next. A state machine without IO, threads or clocks;
//! `B` is a block's bytes, which it passes on and never looks at.
//!
//! # Ways of a block
//!
//! ```text
//!  stored  (full in the pool) ───────────────▶ write queues ──▶ disk, object store
//!  evicted (leaves the pool)  ──▶ host memory ──(leaves it, not on disk)──▶ disk queue
//!  load ──▶ from host at once; else a read ──▶ Here ──take──▶ the pool
//!  hint ──▶ a read ──▶ held ahead ──load, take──▶ the pool
//! ```
//!
//! Disk and store are written through, when a block becomes full: only so does it survive a kill. Host memory takes what
//! leaves the pool and nothing before: holding the same block twice in one machine's memory would waste half of it.
//!
//! # A load
//!
//! It names blocks in order and ends at the first that cannot be had. Its parts go Unasked → Host, or Reading → Here, and are
//! taken in order; a few more are read ahead (`window`). A read that fails is asked for again elsewhere, or cuts the
//! load short. Two loads of one block share one read. At its deadline whoever runs it ends it, with what was taken.
//!
//! # Invariants ([`Tiers::check`])
//!
//! 1. Those of every [`Shelf`]; host slots have bytes exactly where a block is present.
//! 2. A disk slot is pinned exactly while a read of it is queued or under way, so nothing is written there meanwhile; a slot
//!    being written is read by nobody. Late answers carry a generation and change nothing when it is over.
//! 3. Reads under way for loads + blocks read and not taken ≤ `reads_max`; for hints likewise ≤ `ahead_max`; queued writes ≤
//!    `writes_queued_max` per tier. So the number of buffers is bounded by [`Limits::buffers`].
//! 4. A load is taken in order, never beyond its end; every part that waits has a read that names it.
//! 5. What [`Tiers::take_changes`] told since [`Tiers::present`] leads from that to what each tier has now.
//!
//! Not here: bytes, files and sockets (the shells), checksums ([`crate::record`]; a shell answers `Broken`).

mod ahead;
mod loads;
mod writes;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use baton_proto::block_hash::BlockHash;

use crate::changes::Change;
use crate::rates::Rates;
use crate::shelf::{Found, Shelf};
use crate::stats::{AheadStats, TierStats, TierUsage};
use ahead::Ahead;
use loads::{Load, Part, Reading};
use writes::{Breaker, Queue};

/// Names of the store that are remembered to be there, or not: some 100 bytes each.
const OBJECTS_KNOWN_MAX: usize = 1 << 18;
/// How long a block that the store did not have is not asked for again: another worker may put it any time.
const ABSENT_FOR: Duration = Duration::from_secs(30);

/// Where a block can be, quickest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// Memory of this process.
    Host = 0,
    /// Files on this machine.
    Disk = 1,
    /// An object store, perhaps shared with other workers.
    Object = 2,
}

/// Sizes of the tiers and bounds on what is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Blocks in host memory; 0 without that tier.
    pub host_blocks: usize,
    /// Blocks on disk; 0 without that tier.
    pub disk_blocks: usize,
    /// Whether there is an object store.
    pub object: bool,
    /// Blocks that wait to be written, for each of disk and store; more are dropped.
    pub writes_queued_max: usize,
    /// Blocks being written at once, for each of them.
    pub writes_in_flight_max: usize,
    /// Blocks being read, or read and not taken yet.
    pub reads_max: usize,
    /// Loads at once; more find nothing.
    pub loads_max: usize,
    /// Blocks being read because of a hint, or held until a load takes them.
    pub ahead_max: usize,
}

impl Limits {
    /// Buffers that suffice for everything at its bound; one more is being filled.
    pub fn buffers(&self) -> usize {
        let targets = usize::from(self.disk_blocks > 0) + usize::from(self.object);
        self.host_blocks
            + targets * (self.writes_queued_max + self.writes_in_flight_max)
            + self.reads_max
            + self.ahead_max
            + 1
    }
}

/// What a shell is to do. Each is answered by one [`Done`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<B> {
    /// Write a block to a slot of the disk.
    WriteDisk {
        /// Where.
        slot: u32,
        /// To be handed back.
        generation: u64,
        /// Its name.
        name: BlockHash,
        /// The short name of the block before it.
        parent: u64,
        /// Its bytes.
        block: B,
    },
    /// Read the slot that holds `name`.
    ReadDisk {
        /// Where.
        slot: u32,
        /// To be handed back.
        generation: u64,
        /// What must be there.
        name: BlockHash,
        /// Only a hint asks for it: others go first.
        ahead: bool,
    },
    /// Put a block into the store.
    PutObject {
        /// Its name.
        name: BlockHash,
        /// The short name of the block before it.
        parent: u64,
        /// Its bytes.
        block: B,
    },
    /// Get a block from the store, if it is there.
    GetObject {
        /// Its name.
        name: BlockHash,
        /// Only a hint asks for it: others go first.
        ahead: bool,
    },
}

/// What came of a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Read<B> {
    /// The block, verified.
    Found(B),
    /// Something else is there: torn, corrupt, foreign, of another length. The shell has removed it.
    Broken,
    /// Nothing is there.
    Missing,
    /// The device or the network failed, or no buffer was to be had.
    Failed,
}

/// The answer to an [`Action`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done<B> {
    /// Of [`Action::WriteDisk`].
    WroteDisk {
        /// From the action.
        slot: u32,
        /// From the action.
        generation: u64,
        /// Whether the block is there now.
        written: bool,
    },
    /// Of [`Action::ReadDisk`].
    ReadDisk {
        /// From the action.
        slot: u32,
        /// From the action.
        generation: u64,
        /// From the action.
        name: BlockHash,
        /// What was there.
        read: Read<B>,
    },
    /// Of [`Action::PutObject`].
    PutObject {
        /// From the action.
        name: BlockHash,
        /// Whether it is there now.
        written: bool,
    },
    /// Of [`Action::GetObject`].
    GotObject {
        /// From the action.
        name: BlockHash,
        /// What was there.
        read: Read<B>,
    },
}

/// See the module.
#[derive(Debug)]
pub struct Tiers<B> {
    limits: Limits,
    /// The latest time anybody mentioned.
    now: Duration,
    host: Shelf,
    host_bytes: Vec<Option<B>>,
    disk: Shelf,
    /// Names that the store is known to have.
    objects: Shelf,
    /// Names that it did not have, and until when that is believed; and their order.
    absent: HashMap<BlockHash, Duration>,
    absent_order: VecDeque<BlockHash>,
    disk_queue: Queue<B>,
    object_queue: Queue<B>,
    disk_breaker: Breaker,
    object_breaker: Breaker,
    loads: BTreeMap<u64, Load<B>>,
    reads: HashMap<BlockHash, Reading>,
    read_queue: VecDeque<Action<B>>,
    /// Reads for hints.
    ahead_queue: VecDeque<Action<B>>,
    ahead: Ahead<B>,
    /// Parts that are Here.
    here: usize,
    rates: Rates,
    stats: TierStats,
}

impl<B: Clone> Tiers<B> {
    /// Empty tiers.
    pub fn new(limits: Limits) -> Self {
        Tiers {
            now: Duration::ZERO,
            host: Shelf::new(limits.host_blocks),
            host_bytes: Vec::new(),
            disk: Shelf::new(limits.disk_blocks),
            objects: Shelf::new(if limits.object { OBJECTS_KNOWN_MAX } else { 0 }),
            absent: HashMap::new(),
            absent_order: VecDeque::new(),
            disk_queue: Queue::new(if limits.disk_blocks > 0 {
                limits.writes_queued_max
            } else {
                0
            }),
            object_queue: Queue::new(if limits.object { limits.writes_queued_max } else { 0 }),
            disk_breaker: Breaker::default(),
            object_breaker: Breaker::default(),
            loads: BTreeMap::new(),
            reads: HashMap::new(),
            read_queue: VecDeque::new(),
            ahead_queue: VecDeque::new(),
            ahead: Ahead::new(limits.ahead_max),
            here: 0,
            rates: Rates::default(),
            stats: TierStats::default(),
            limits,
        }
    }

    /// The bounds it was made with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Takes over what the disk has from an earlier life, oldest first. Before anything else.
    pub fn restore_disk(&mut self, found: impl Iterator<Item = Found>) {
        self.disk.restore(found);
    }

    /// Records which blocks come and go from now on, for [`take_changes`](Self::take_changes).
    pub fn watch(&mut self) {
        self.host.watch();
        self.disk.watch();
        self.objects.watch();
    }

    /// What came and went in each tier since the last call. `None` if that is not known, at first or because there was too much:
    /// then [`present`](Self::present) is where to begin.
    pub fn take_changes(&mut self) -> Option<[(Tier, Vec<Change>); 3]> {
        let host = self.host.take_changes();
        let (disk, object) = (self.disk.take_changes(), self.objects.take_changes());
        Some([(Tier::Host, host?), (Tier::Disk, disk?), (Tier::Object, object?)])
    }

    /// What each tier has, of the store what this worker knows of: at most `max` blocks of each, those that will stay longest.
    pub fn present(&mut self, max: usize) -> [(Tier, Vec<Change>); 3] {
        [
            (Tier::Host, self.host.present(max)),
            (Tier::Disk, self.disk.present(max)),
            (Tier::Object, self.objects.present(max)),
        ]
    }

    /// What a block of a tier takes to come, as loads have measured it; `None` while none has.
    pub fn block_time(&self, tier: Tier) -> Option<Duration> {
        self.rates.block_time(tier)
    }

    /// The quickest tier that has a block, as far as is known; what was read ahead is in memory. The store's answer may turn out wrong; the others' may turn
    /// out broken.
    pub fn locate(&self, name: &BlockHash) -> Option<Tier> {
        if self.ahead.holds(name) || self.host.get(name).is_some() {
            Some(Tier::Host)
        } else if self.disk.get(name).is_some() && self.disk_breaker.is_open(self.now) {
            Some(Tier::Disk)
        } else if self.objects.get(name).is_some() && self.object_breaker.is_open(self.now) {
            Some(Tier::Object)
        } else {
            None
        }
    }

    /// What to do next, if anything. Reads first: somebody waits for them, or soon will.
    pub fn poll(&mut self, now: Duration) -> Option<Action<B>> {
        self.tick(now);
        let read = self.read_queue.pop_front().or_else(|| self.ahead_queue.pop_front());
        read.or_else(|| self.next_write())
    }

    /// An action was carried out.
    pub fn done(&mut self, done: Done<B>, now: Duration) {
        self.tick(now);
        match done {
            Done::WroteDisk {
                slot,
                generation,
                written,
            } => self.wrote_disk(slot, generation, written),
            Done::PutObject { name, written } => self.put_object(name, written),
            Done::ReadDisk {
                slot,
                generation,
                name,
                read,
            } => self.did_read_disk(slot, generation, name, read),
            Done::GotObject { name, read } => self.got_object(name, read),
        }
        self.ask_ahead();
    }

    fn tick(&mut self, now: Duration) {
        self.now = self.now.max(now);
        self.stats.ahead.wasted += self.ahead.expire(self.now);
    }

    /// The store has a block, for all that is known.
    fn know_object(&mut self, name: BlockHash, parent: u64) {
        self.absent.remove(&name);
        if let Some(slot) = self.objects.get(&name) {
            return self.objects.touch(slot);
        }
        if let Some(place) = self.objects.place(name, parent) {
            self.objects.finish(place.slot, place.generation, true);
        }
    }

    /// The store does not have it.
    fn miss_object(&mut self, name: BlockHash) {
        if let Some(slot) = self.objects.get(&name) {
            self.objects.remove(slot);
        }
        if self.absent.insert(name, self.now + ABSENT_FOR).is_none() {
            self.absent_order.push_back(name);
        }
        while self.absent_order.len() > OBJECTS_KNOWN_MAX {
            if let Some(oldest) = self.absent_order.pop_front() {
                self.absent.remove(&oldest);
            }
        }
    }

    /// Whether the store may have a block that it is not known to have.
    fn may_have_object(&self, name: &BlockHash) -> bool {
        self.limits.object
            && self.object_breaker.is_open(self.now)
            && self.absent.get(name).is_none_or(|until| *until <= self.now)
    }

    /// Numbers for metrics.
    pub fn stats(&self) -> TierStats {
        let gauges = |shelf: &Shelf, usage: TierUsage| TierUsage {
            blocks: shelf.len() as u64,
            blocks_max: shelf.capacity() as u64,
            ..usage
        };
        TierStats {
            host: gauges(&self.host, self.stats.host),
            disk: gauges(&self.disk, self.stats.disk),
            object: gauges(&self.objects, self.stats.object),
            ahead: AheadStats {
                held: self.ahead.len() as u64,
                ..self.stats.ahead
            },
            ..self.stats
        }
    }

    fn usage(&mut self, tier: Tier) -> &mut TierUsage {
        match tier {
            Tier::Host => &mut self.stats.host,
            Tier::Disk => &mut self.stats.disk,
            Tier::Object => &mut self.stats.object,
        }
    }

    /// Whether nothing is queued, under way, or waited for.
    pub fn is_idle(&self) -> bool {
        let written = |queue: &Queue<B>| queue.len() + queue.in_flight == 0;
        self.loads.is_empty()
            && self.reads.is_empty()
            && self.read_queue.is_empty()
            && self.ahead_queue.is_empty()
            && written(&self.disk_queue)
            && written(&self.object_queue)
    }

    /// Verifies the invariants. O(everything): for tests.
    pub fn check(&self) -> Result<(), String> {
        let disk_reads = self.reads.values().filter(|r| r.disk.is_some()).count();
        self.host.check(0)?;
        self.disk.check(disk_reads)?;
        self.objects.check(0)?;
        let filled = self.host_bytes.iter().filter(|bytes| bytes.is_some()).count();
        if filled != self.host.len() {
            return Err(format!(
                "{} blocks in host memory, {filled} with bytes",
                self.host.len()
            ));
        }
        if self.disk.writing() != self.disk_queue.in_flight {
            return Err(format!(
                "{} slots are written, {} writes under way",
                self.disk.writing(),
                self.disk_queue.in_flight
            ));
        }
        for (queue, what) in [(&self.disk_queue, "disk"), (&self.object_queue, "store")] {
            queue.check().map_err(|error| format!("{what} queue: {error}"))?;
            if queue.in_flight > self.limits.writes_in_flight_max {
                return Err(format!("{} writes to the {what}", queue.in_flight));
            }
        }
        let here = self.loads.values().flat_map(|load| &load.parts);
        let here = here.filter(|part| matches!(part, Part::Here(..))).count();
        let ahead = self.reads.values().filter(|read| read.ahead).count();
        let stats = self.stats().ahead;
        self.ahead.check()?;
        if ahead != self.ahead.reading || stats.read != stats.hits + stats.wasted + stats.held {
            return Err(format!(
                "{ahead} reads for hints, {} counted; {stats:?}",
                self.ahead.reading
            ));
        }
        if here != self.here || here + self.reads.len() - ahead > self.limits.reads_max {
            return Err(format!(
                "{here} blocks read, {} counted, {} reads, at most {}",
                self.here,
                self.reads.len() - ahead,
                self.limits.reads_max
            ));
        }
        for (id, load) in &self.loads {
            load.check().map_err(|error| format!("load {id}: {error}"))?;
            for (index, part) in load.parts.iter().enumerate().take(load.end) {
                let awaited = |read: &Reading| read.waiters.contains(&(*id, index));
                if matches!(part, Part::Reading) && !self.reads.get(&load.names[index]).is_some_and(awaited) {
                    return Err(format!("part {index} of load {id} waits for nothing"));
                }
            }
        }
        if self.loads.len() > self.limits.loads_max || self.absent.len() > self.absent_order.len() {
            return Err("too many loads, or names that are never forgotten".to_owned());
        }
        Ok(())
    }
}
