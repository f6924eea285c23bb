//! The core under everything that disks, stores and crashes do: torn and lost writes, flipped bits, slow, failing and late
//! reads, loads that are given up, hints that are followed by a load or by none, tiers and queues that are full, restarts in the
//! middle of writes. After every event the invariants; never a wrong byte; never more buffers than promised; what a reader of the
//! changes believes is what each tier has; in the end nothing is left under way.
//!
//! `BATON_TIER_SEEDS=20000 cargo test -p baton-tiers --test faults --release` runs more of them.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use baton_proto::block_hash::{BlockHash, short};
use baton_tiers::{Action, Block, Change, Done, Found, Limits, Pool, Read, Tier, TierStats, Tiers};
use common::{BYTES, bytes, name, parent};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A record on a medium: whose it is, and whether its checksum would hold.
#[derive(Clone)]
struct Record {
    name: BlockHash,
    parent: u64,
    bytes: Vec<u8>,
    sound: bool,
}

struct World {
    rng: SmallRng,
    limits: Limits,
    pool: Pool,
    tiers: Tiers<Block>,
    now: Duration,
    disk: BTreeMap<u32, Record>,
    store: HashMap<BlockHash, Record>,
    running: Vec<(Action<Block>, Duration)>,
    loads: BTreeMap<u64, (Vec<BlockHash>, usize)>,
    next: u64,
    total: TierStats,
    wrong_would_be: usize,
    /// What somebody who was told of all changes believes: names in each tier, with their parents.
    told: HashMap<Tier, BTreeMap<u64, u64>>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let limits = Limits {
            host_blocks: if rng.random_bool(0.7) {
                rng.random_range(1..12)
            } else {
                0
            },
            disk_blocks: if rng.random_bool(0.8) {
                rng.random_range(1..30)
            } else {
                0
            },
            object: rng.random_bool(0.6),
            writes_queued_max: rng.random_range(1..8),
            writes_in_flight_max: rng.random_range(1..4),
            reads_max: rng.random_range(1..10),
            loads_max: rng.random_range(1..6),
            ahead_max: rng.random_range(0..8),
        };
        let mut tiers = Tiers::new(limits);
        tiers.watch();
        World {
            pool: Pool::new(BYTES, limits.buffers()),
            tiers,
            limits,
            rng,
            now: Duration::ZERO,
            disk: BTreeMap::new(),
            store: HashMap::new(),
            running: Vec::new(),
            loads: BTreeMap::new(),
            next: 0,
            total: TierStats::default(),
            wrong_would_be: 0,
            told: HashMap::new(),
        }
    }

    fn event(&mut self) {
        let n = if self.rng.random_bool(0.5) {
            self.rng.random_range(0..10)
        } else {
            self.rng.random_range(0..60)
        };
        let pool = self.pool.clone();
        let copy = || Some(bytes(&pool, &name(n)).expect("the promised number of buffers suffices"));
        match self.rng.random_range(0..14) {
            0..=2 => self.tiers.stored(name(n), parent(n), copy),
            3 | 4 => self.tiers.evicted(name(n), parent(n), copy),
            5 | 6 => self.begin(n),
            7 | 8 => self.take(),
            9 if !self.loads.is_empty() => {
                let id = *self.loads.keys().next().expect("not empty");
                self.end(id);
            }
            10 => self.hint(n),
            11 => self.listen(),
            // Now and then so long that nobody holds for anybody.
            12 if self.rng.random_bool(0.05) => self.now += Duration::from_secs(31),
            12 => self.now += Duration::from_millis(self.rng.random_range(0..400)),
            _ => self.rot(),
        }
        self.check();
        self.issue();
        self.complete();
    }

    /// Somebody will come for these blocks, perhaps.
    fn hint(&mut self, n: u32) {
        let names: Vec<BlockHash> = (n..n + self.rng.random_range(1..12)).map(name).collect();
        let in_pool = self.rng.random_range(0..names.len());
        self.tiers
            .read_ahead(parent(n), &names, |name| *name == names[in_pool], self.now);
    }

    /// Whoever tells routers reads the changes.
    fn listen(&mut self) {
        let changes = self.tiers.take_changes().unwrap_or_else(|| {
            self.told.clear();
            self.tiers.present(usize::MAX)
        });
        for (tier, changes) in changes {
            let told = self.told.entry(tier).or_default();
            for change in changes {
                match change {
                    Change::Stored { parent, name } => assert_eq!(told.insert(name, parent), None, "told twice"),
                    Change::Evicted { name } => assert!(told.remove(&name).is_some(), "it was not told before"),
                }
            }
        }
        for (tier, present) in self.tiers.present(usize::MAX) {
            let told = &self.told[&tier];
            assert_eq!(told.len(), present.len(), "{tier:?}");
            for change in present {
                let Change::Stored { parent, name } = change else {
                    panic!("{change:?} is not there")
                };
                assert_eq!(told.get(&name), Some(&parent), "{tier:?}");
            }
        }
        let known: HashMap<u64, u64> = (0..80).map(|n| (short(&name(n)), parent(n))).collect();
        for (name, parent) in self.told.values().flatten() {
            assert_eq!(known.get(name), Some(parent), "a wrong parent");
        }
    }

    fn begin(&mut self, n: u32) {
        let names: Vec<BlockHash> = (n..n + self.rng.random_range(1..12)).map(name).collect();
        let compute = self
            .rng
            .random_bool(0.8)
            .then(|| Duration::from_millis(self.rng.random_range(0..600)));
        let id = self.next;
        self.next += 1;
        let count = names.len();
        let may = self.tiers.load(id, parent(n), names.clone(), compute, self.now);
        assert!(may <= count);
        if may > 0 {
            self.loads.insert(id, (names, 0));
        }
    }

    fn take(&mut self) {
        let ids: Vec<u64> = self.loads.keys().copied().collect();
        for id in ids {
            let (names, taken) = self.loads.get_mut(&id).expect("known");
            while let Some(block) = self.tiers.take(id) {
                let mut right = names[*taken];
                right.reverse();
                assert_eq!(block.as_ref(), right, "a wrong byte came back");
                *taken += 1;
            }
            if self.tiers.is_over(id) {
                self.end(id);
            }
        }
        for id in self.tiers.expired(self.now) {
            self.end(id);
        }
    }

    fn end(&mut self, id: u64) {
        let (_, taken) = self.loads.remove(&id).expect("known");
        assert_eq!(self.tiers.end(id, self.now), taken);
        assert!(self.tiers.take(id).is_none() && self.tiers.is_over(id));
    }

    /// Media lose, flip and mix up what they hold.
    fn rot(&mut self) {
        let at = self.rng.random_range(0..30);
        match self.rng.random_range(0..4) {
            0 => drop(self.disk.remove(&at)),
            1 => drop(self.store.remove(&name(at))),
            2 => {
                if let Some(record) = self.disk.get_mut(&at) {
                    record.bytes[3] ^= 0x10;
                    record.sound = false;
                }
            }
            _ => {
                if let Some(record) = self.store.get_mut(&name(at)) {
                    record.bytes[0] ^= 0x01;
                    record.sound = false;
                }
            }
        }
    }

    fn issue(&mut self) {
        while self.rng.random_bool(0.8)
            && let Some(action) = self.tiers.poll(self.now)
        {
            self.fence(&action);
            let late = if self.rng.random_bool(0.05) { 3000 } else { 40 };
            let due = self.now + Duration::from_millis(self.rng.random_range(0..late));
            self.running.push((action, due));
        }
        self.check();
    }

    /// Nothing may be written to a slot that is read or written, nor read from one that is written.
    fn fence(&self, new: &Action<Block>) {
        let slot = |action: &Action<Block>| match action {
            Action::WriteDisk { slot, .. } => Some((*slot, true)),
            Action::ReadDisk { slot, .. } => Some((*slot, false)),
            _ => None,
        };
        let Some((at, writes)) = slot(new) else { return };
        for (other, _) in &self.running {
            assert!(
                slot(other).is_none_or(|(o, w)| o != at || !(w || writes)),
                "two at slot {at}"
            );
        }
    }

    fn complete(&mut self) {
        let (due, rest): (Vec<_>, Vec<_>) = self.running.drain(..).partition(|(_, due)| *due <= self.now);
        self.running = rest;
        for (action, _) in due {
            let fails = self.rng.random_bool(0.06);
            let done = self.carry_out(action, fails);
            self.tiers.done(done, self.now);
            self.check();
        }
    }

    fn record(&mut self, name: BlockHash, parent: u64, block: &Block) -> Record {
        // Some writes are reported done and are not whole.
        let sound = self.rng.random_bool(0.95);
        let mut bytes = block.as_ref().to_vec();
        bytes[BYTES - 1] ^= u8::from(!sound);
        Record {
            name,
            parent,
            bytes,
            sound,
        }
    }

    fn read(&mut self, name: &BlockHash, record: Option<&Record>, fails: bool) -> Read<Block> {
        match record {
            _ if fails => Read::Failed,
            None => Read::Missing,
            Some(record) if record.sound && record.name == *name => {
                let bytes = record.bytes.clone();
                let fill = |to: &mut [u8]| {
                    to.copy_from_slice(&bytes);
                    true
                };
                Read::Found(self.pool.fill(fill).expect("the promised number of buffers suffices"))
            }
            Some(_) => {
                self.wrong_would_be += 1;
                Read::Broken
            }
        }
    }

    fn carry_out(&mut self, action: Action<Block>, fails: bool) -> Done<Block> {
        match action {
            Action::WriteDisk {
                slot,
                generation,
                name,
                parent,
                block,
            } => {
                assert!((slot as usize) < self.limits.disk_blocks);
                let mut record = self.record(name, parent, &block);
                record.sound &= !fails;
                self.disk.insert(slot, record);
                Done::WroteDisk {
                    slot,
                    generation,
                    written: !fails,
                }
            }
            Action::ReadDisk {
                slot, generation, name, ..
            } => {
                let record = self.disk.get(&slot).cloned();
                let read = self.read(&name, record.as_ref(), fails);
                if matches!(read, Read::Broken) {
                    self.disk.remove(&slot);
                }
                Done::ReadDisk {
                    slot,
                    generation,
                    name,
                    read,
                }
            }
            Action::PutObject { name, parent, block } => {
                if !fails {
                    let record = self.record(name, parent, &block);
                    self.store.insert(name, record);
                }
                Done::PutObject { name, written: !fails }
            }
            Action::GetObject { name, .. } => {
                let record = self.store.get(&name).cloned();
                let read = self.read(&name, record.as_ref(), fails);
                if matches!(read, Read::Broken) {
                    self.store.remove(&name);
                }
                Done::GotObject { name, read }
            }
        }
    }

    /// The process dies, in the middle of its writes, and another one begins with what is on the disk.
    fn restart(&mut self) {
        self.add_up();
        for (action, _) in std::mem::take(&mut self.running) {
            if let Action::WriteDisk {
                slot,
                name,
                parent,
                block,
                ..
            } = action
            {
                match self.rng.random_range(0..3) {
                    0 => {}
                    1 => drop(self.disk.insert(slot, self.record_whole(name, parent, &block))),
                    // The new name over the old block, or the other way round.
                    _ => {
                        let record = self.record_whole(name, parent, &block);
                        self.disk.insert(slot, Record { sound: false, ..record });
                    }
                }
            }
        }
        self.loads.clear();
        self.pool = Pool::new(BYTES, self.limits.buffers());
        self.tiers = Tiers::new(self.limits);
        self.tiers.watch();
        let found = |(slot, record): (&u32, &Record)| Found {
            slot: *slot,
            name: record.name,
            parent: record.parent,
        };
        let mut found: Vec<Found> = self.disk.iter().map(found).collect();
        // A scan may find anything.
        found.push(Found {
            slot: self.limits.disk_blocks as u32,
            name: name(1),
            parent: parent(1),
        });
        self.tiers.restore_disk(found.into_iter());
        self.check();
    }

    fn record_whole(&self, name: BlockHash, parent: u64, block: &Block) -> Record {
        let bytes = block.as_ref().to_vec();
        Record {
            name,
            parent,
            bytes,
            sound: true,
        }
    }

    fn check(&self) {
        self.tiers.check().expect("invariants");
        let stats = self.tiers.stats();
        assert!(
            stats.host.blocks <= self.limits.host_blocks as u64 && stats.disk.blocks <= self.limits.disk_blocks as u64
        );
    }

    fn add_up(&mut self) {
        let stats = self.tiers.stats();
        self.total.host.hits += stats.host.hits;
        self.total.disk.hits += stats.disk.hits;
        self.total.object.hits += stats.object.hits;
        self.total.disk.dropped += stats.disk.dropped;
        self.total.expired += stats.expired;
        self.total.declined += stats.declined;
        self.total.ahead.hits += stats.ahead.hits;
        self.total.ahead.wasted += stats.ahead.wasted;
        self.total.ahead.refused += stats.ahead.refused;
    }

    fn run(mut self, events: usize) -> (TierStats, usize) {
        for _ in 0..events {
            self.event();
            if self.rng.random_bool(0.004) {
                self.restart();
            }
        }
        // No more faults, no more requests: everything under way comes to its end.
        for round in 0.. {
            assert!(round < 1000, "something never ends: {:?}", self.tiers.stats());
            self.now += Duration::from_millis(500);
            while let Some(action) = self.tiers.poll(self.now) {
                self.running.push((action, self.now));
            }
            self.complete();
            self.take();
            if self.tiers.is_idle() && self.running.is_empty() {
                break;
            }
        }
        assert!(self.loads.is_empty());
        self.listen();
        let kept = (self.tiers.stats().host.blocks + self.tiers.stats().ahead.held) as usize;
        assert_eq!(self.pool.available(), self.limits.buffers() - kept, "buffers leak");
        self.add_up();
        (self.total, self.wrong_would_be)
    }
}

#[test]
fn thousands_of_lives_with_faults() {
    let asked = std::env::var("BATON_TIER_SEEDS").ok().and_then(|n| n.parse().ok());
    let seeds: u64 = asked.unwrap_or(300);
    let (mut sum, mut broken) = (TierStats::default(), 0);
    for seed in 0..seeds {
        println!("seed {seed}");
        let (stats, wrong_would_be) = World::new(seed).run(400);
        sum.host.hits += stats.host.hits;
        sum.disk.hits += stats.disk.hits;
        sum.object.hits += stats.object.hits;
        sum.disk.dropped += stats.disk.dropped;
        sum.expired += stats.expired;
        sum.declined += stats.declined;
        sum.ahead.hits += stats.ahead.hits;
        sum.ahead.wasted += stats.ahead.wasted;
        sum.ahead.refused += stats.ahead.refused;
        broken += wrong_would_be;
    }
    println!("{sum:?}, {broken} broken records met");
    // The faults and the hits that this is about did happen.
    let reached = [
        sum.host.hits,
        sum.disk.hits,
        sum.object.hits,
        sum.disk.dropped,
        sum.expired,
        sum.ahead.hits,
        sum.ahead.wasted,
        sum.ahead.refused,
        broken as u64,
    ];
    assert!(reached.iter().all(|count| *count > seeds / 3), "{reached:?}");
}
