//! Reading ahead: blocks that a hint says will be asked for soon are read before anybody asks, because the sequence that wants
//! them still waits for its turn, in a coordinator's queue or behind the step that runs.
//!
//! ```text
//!  hint ─▶ reading ──Found──▶ held ──take──▶ the pool        (a hit)
//!            │                  └──after HELD_FOR──▶ dropped (wasted)
//!            └──anything else──▶ nothing; a load will see for itself
//! ```
//!
//! A hint is only a hint. It has buffers of its own ([`Limits::ahead_max`](super::Limits::ahead_max)), so it takes none from
//! loads; what finds no room is refused, and nothing that is held or kept anywhere makes way for it. A read for a hint does not
//! count as asking for the block: it stays where it is in its tier's order until a sequence takes it. A load that
//! wants a block which is being read for a hint waits for that read.
//!
//! Invariants ([`Tiers::check`]): reading + held ≤ `ahead_max`; read = hits + wasted + held.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use baton_proto::block_hash::{BlockHash, short};

use super::{Tier, Tiers};

/// How long a block that nobody took is held: about as long as a request may wait to be let in.
const HELD_FOR: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Held<B> {
    block: B,
    tier: Tier,
    number: u64,
}

/// What was read ahead.
#[derive(Debug)]
pub(super) struct Ahead<B> {
    max: usize,
    /// Reads for hints that are queued or under way.
    pub(super) reading: usize,
    held: HashMap<BlockHash, Held<B>>,
    /// The same in order, each with the time it is held until.
    order: BTreeMap<u64, (BlockHash, Duration)>,
    next: u64,
}

impl<B: Clone> Ahead<B> {
    pub(super) fn new(max: usize) -> Self {
        Ahead {
            max,
            reading: 0,
            held: HashMap::new(),
            order: BTreeMap::new(),
            next: 0,
        }
    }

    /// Blocks held.
    pub(super) fn len(&self) -> usize {
        self.held.len()
    }

    pub(super) fn holds(&self, name: &BlockHash) -> bool {
        self.held.contains_key(name)
    }

    fn has_room(&self) -> bool {
        self.reading + self.len() < self.max
    }

    pub(super) fn hold(&mut self, name: BlockHash, tier: Tier, block: B, now: Duration) {
        let number = self.next;
        self.next += 1;
        self.order.insert(number, (name, now + HELD_FOR));
        if let Some(old) = self.held.insert(name, Held { block, tier, number }) {
            self.order.remove(&old.number);
        }
    }

    pub(super) fn take(&mut self, name: &BlockHash) -> Option<(Tier, B)> {
        let Held { block, tier, number } = self.held.remove(name)?;
        self.order.remove(&number);
        Some((tier, block))
    }

    /// Drops what was held long enough; answers how many.
    pub(super) fn expire(&mut self, now: Duration) -> u64 {
        let mut dropped = 0;
        while let Some(first) = self.order.first_entry()
            && first.get().1 <= now
        {
            let (name, _) = first.remove();
            self.held.remove(&name);
            dropped += 1;
        }
        dropped
    }

    pub(super) fn check(&self) -> Result<(), String> {
        let listed = self.order.iter().all(|(number, (name, _))| {
            let held = self.held.get(name);
            held.is_some_and(|held| held.number == *number)
        });
        if !listed || self.order.len() != self.held.len() || self.reading + self.len() > self.max {
            return Err(format!(
                "{} blocks held ahead, {} in order, {} being read, at most {}",
                self.held.len(),
                self.order.len(),
                self.reading,
                self.max
            ));
        }
        Ok(())
    }
}

impl<B: Clone> Tiers<B> {
    /// A sequence that will come wants `names`, in order, whose first has a parent of that short name: reads what is below host
    /// memory and not in the pool, up to the first block that is nowhere, as far as there is room.
    pub fn read_ahead(
        &mut self,
        parent: u64,
        names: &[BlockHash],
        in_pool: impl Fn(&BlockHash) -> bool,
        now: Duration,
    ) {
        self.tick(now);
        let mut parent = parent;
        for (index, name) in names.iter().enumerate() {
            let before = std::mem::replace(&mut parent, short(name));
            if in_pool(name) || self.reads.contains_key(name) {
                continue;
            }
            match self.locate(name) {
                None => break,
                Some(Tier::Host) => {}
                Some(tier) if self.ahead.has_room() => {
                    self.ahead.reading += 1;
                    self.begin_read(tier, *name, before, None);
                }
                Some(_) => {
                    self.stats.ahead.refused += (names.len() - index) as u64;
                    break;
                }
            }
        }
    }
}
