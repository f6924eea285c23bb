//! How blocks come into the tiers: what is offered, what is queued, and what is left alone for a while because it fails.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use baton_proto::block_hash::BlockHash;

use super::{Action, Tier, Tiers};

/// Failures in a row after which a device is left alone...
const FAILURES_MAX: u32 = 3;
/// ...for this long: a full disk or a store that is down costs three requests now and then, not each one its deadline.
const LEFT_ALONE_FOR: Duration = Duration::from_secs(10);

/// Keeps a device that fails from being asked all the time.
#[derive(Debug, Default)]
pub(super) struct Breaker {
    failures: u32,
    closed_until: Duration,
}

impl Breaker {
    pub(super) fn is_open(&self, now: Duration) -> bool {
        now >= self.closed_until
    }

    pub(super) fn observe(&mut self, worked: bool, now: Duration) {
        if worked {
            self.failures = 0;
            return;
        }
        self.failures += 1;
        if self.failures >= FAILURES_MAX {
            // One more failure after the pause is enough for the next.
            self.failures = FAILURES_MAX - 1;
            self.closed_until = now + LEFT_ALONE_FOR;
        }
    }
}

/// Blocks on their way to one tier.
#[derive(Debug)]
pub(super) struct Queue<B> {
    max: usize,
    /// Name, short name of the parent, bytes.
    blocks: VecDeque<(BlockHash, u64, B)>,
    /// Of what is queued or being written, each with the short name of its parent.
    names: HashMap<BlockHash, u64>,
    pub(super) in_flight: usize,
}

impl<B> Queue<B> {
    pub(super) fn new(max: usize) -> Self {
        Queue {
            max,
            blocks: VecDeque::new(),
            names: HashMap::new(),
            in_flight: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.blocks.len()
    }

    fn is_full(&self) -> bool {
        self.blocks.len() >= self.max
    }

    fn push(&mut self, name: BlockHash, parent: u64, block: B) {
        if self.names.insert(name, parent).is_none() {
            self.blocks.push_back((name, parent, block));
        }
    }

    fn pop(&mut self) -> Option<(BlockHash, u64, B)> {
        let next = self.blocks.pop_front();
        self.in_flight += usize::from(next.is_some());
        next
    }

    /// It was written, or not. Answers the short name of its parent.
    fn done(&mut self, name: &BlockHash) -> Option<u64> {
        let parent = self.names.remove(name)?;
        self.in_flight = self.in_flight.saturating_sub(1);
        Some(parent)
    }

    pub(super) fn check(&self) -> Result<(), String> {
        if self.blocks.len() > self.max || self.names.len() != self.blocks.len() + self.in_flight {
            return Err(format!(
                "{} blocks of at most {}, {} being written, {} names",
                self.blocks.len(),
                self.max,
                self.in_flight,
                self.names.len()
            ));
        }
        Ok(())
    }
}

impl<B: Clone> Tiers<B> {
    /// A block is full and named, and its parent has that short name; `copy` makes a copy of its bytes, or fails if there is no buffer. Called at most once, and
    /// only if somebody wants it.
    pub fn stored(&mut self, name: BlockHash, parent: u64, copy: impl FnOnce() -> Option<B>) {
        let wanted = [self.wants(Tier::Disk, &name), self.wants(Tier::Object, &name)];
        if wanted == [false; 2] {
            return;
        }
        let block = copy();
        for (wanted, tier) in wanted.into_iter().zip([Tier::Disk, Tier::Object]) {
            match (&block, tier) {
                _ if !wanted => {}
                (Some(block), Tier::Disk) => self.disk_queue.push(name, parent, block.clone()),
                (Some(block), _) => self.object_queue.push(name, parent, block.clone()),
                (None, tier) => self.usage(tier).dropped += 1,
            }
        }
    }

    /// A block leaves the pool; see [`stored`](Self::stored).
    pub fn evicted(&mut self, name: BlockHash, parent: u64, copy: impl FnOnce() -> Option<B>) {
        if self.limits.host_blocks == 0 {
            // One more chance for what found its queue full before.
            return self.stored(name, parent, copy);
        }
        if let Some(slot) = self.host.get(&name) {
            return self.host.touch(slot);
        }
        let Some(place) = self.host.place(name, parent) else {
            return;
        };
        let at = place.slot as usize;
        if self.host_bytes.len() <= at {
            self.host_bytes.resize(at + 1, None);
        }
        let old = self.host_bytes[at].take();
        if let (Some((evicted, before)), Some(bytes)) = (place.evicted, old)
            && self.wants(Tier::Disk, &evicted)
        {
            self.disk_queue.push(evicted, before, bytes);
        }
        self.host_bytes[at] = copy();
        let written = self.host_bytes[at].is_some();
        self.host.finish(place.slot, place.generation, written);
        match written {
            true => self.stats.host.writes += 1,
            false => self.stats.host.dropped += 1,
        }
    }

    /// Whether a block shall be queued for a tier. Counts what finds no room.
    fn wants(&mut self, tier: Tier, name: &BlockHash) -> bool {
        let (there, shelf, queue) = match tier {
            Tier::Host => return false,
            Tier::Disk => (self.limits.disk_blocks > 0, &self.disk, &self.disk_queue),
            Tier::Object => (self.limits.object, &self.objects, &self.object_queue),
        };
        if !there || shelf.knows(name) || queue.names.contains_key(name) {
            return false;
        }
        let full = queue.is_full();
        self.usage(tier).dropped += u64::from(full);
        !full
    }

    pub(super) fn next_write(&mut self) -> Option<Action<B>> {
        while self.disk_queue.in_flight < self.limits.writes_in_flight_max && self.disk_breaker.is_open(self.now) {
            let Some((name, parent, block)) = self.disk_queue.pop() else {
                break;
            };
            match self.disk.place(name, parent) {
                Some(place) => {
                    return Some(Action::WriteDisk {
                        slot: place.slot,
                        generation: place.generation,
                        name,
                        parent,
                        block,
                    });
                }
                // Every slot is being read or written.
                None => {
                    self.disk_queue.done(&name);
                    self.stats.disk.dropped += 1;
                }
            }
        }
        if self.object_queue.in_flight < self.limits.writes_in_flight_max && self.object_breaker.is_open(self.now) {
            let (name, parent, block) = self.object_queue.pop()?;
            return Some(Action::PutObject { name, parent, block });
        }
        None
    }

    pub(super) fn wrote_disk(&mut self, slot: u32, generation: u64, written: bool) {
        let Some(name) = self.disk.writing_name(slot, generation) else {
            return;
        };
        self.disk.finish(slot, generation, written);
        self.disk_queue.done(&name);
        self.disk_breaker.observe(written, self.now);
        match written {
            true => self.stats.disk.writes += 1,
            false => self.stats.disk.dropped += 1,
        }
    }

    pub(super) fn put_object(&mut self, name: BlockHash, written: bool) {
        let parent = self.object_queue.done(&name).unwrap_or(0);
        self.object_breaker.observe(written, self.now);
        if written {
            self.know_object(name, parent);
            self.stats.object.writes += 1;
        } else {
            self.stats.object.dropped += 1;
        }
    }
}
