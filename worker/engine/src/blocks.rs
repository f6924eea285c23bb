//! Who owns which KV block, and which content the unowned ones still remember.
//!
//! Every block of the pool is in exactly one of three states:
//!
//! - **free**: nobody holds it and it holds nothing;
//! - **held**: one or more sequences hold it (`refs` of them);
//! - **cached**: nobody holds it, but it is full, its content has a name (a chained hash), and it may be shared again.
//!
//! Invariants, which [`BlockManager::check`] verifies against the owners' own lists:
//! 1. free + held + cached = total.
//! 2. `refs` of a block is the number of sequences that list it, each at most once; more than one only for a named block.
//! 3. The index maps a name to exactly one block, and that block carries the name. A free block carries none.
//! 4. The free list holds exactly the free blocks, the LRU list exactly the cached ones.
//!
//! A name is given only to a full block whose KV is complete, and a named block is never written again. Allocation takes
//! free blocks first and then forgets the cached block that was released longest ago. Every operation is O(1).
//!
//! Not here: bytes (the region's), tokens (the sequence's), and when to preempt whom (the scheduler's).

use std::collections::HashMap;

use baton_proto::block_hash::BlockHash;

use crate::block_events::{BlockEvent, BlockEventLog, BlockEvents};

/// End of a linked list; no pool has this many blocks.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone)]
struct Meta {
    refs: u32,
    hash: Option<BlockHash>,
    /// The name before it in its chain; meaningful while named.
    parent: BlockHash,
    /// Neighbours in the LRU list, meaningful while cached.
    older: u32,
    newer: u32,
}

/// The pool's bookkeeping.
#[derive(Debug)]
pub struct BlockManager {
    meta: Vec<Meta>,
    free: Vec<u32>,
    index: HashMap<BlockHash, u32>,
    /// Ends of the LRU list of cached blocks.
    oldest: u32,
    newest: u32,
    cached: usize,
    version: u64,
    log: BlockEventLog,
    /// The same for a reader of its own: the tiers.
    tier_log: BlockEventLog,
}

impl BlockManager {
    /// A pool of `total` free blocks.
    pub fn new(total: u32) -> Self {
        let meta = Meta {
            refs: 0,
            hash: None,
            parent: BlockHash::default(),
            older: NONE,
            newer: NONE,
        };
        BlockManager {
            meta: vec![meta; total as usize],
            // Popped from the end: low ids first, so that a lightly used arena stays small in physical memory.
            free: (0..total).rev().collect(),
            index: HashMap::new(),
            oldest: NONE,
            newest: NONE,
            cached: 0,
            version: 0,
            log: BlockEventLog::default(),
            tier_log: BlockEventLog::default(),
        }
    }

    /// Records what happens to named blocks from now on; see `block_events.rs`. Twice the pool's size is more
    /// than a few steps can bring about.
    pub fn enable_events(&mut self) {
        self.log.enable(2 * self.total());
    }

    /// Events since the last call; empty if they were not enabled.
    pub fn take_events(&mut self) -> BlockEvents {
        self.log.take(|| named_blocks(&self.meta))
    }

    /// Likewise, for a second reader.
    pub fn enable_tier_events(&mut self) {
        self.tier_log.enable(2 * self.total());
    }

    /// The second reader's [`take_events`](Self::take_events).
    pub fn take_tier_events(&mut self) -> BlockEvents {
        self.tier_log.take(|| named_blocks(&self.meta))
    }

    /// Makes the next [`take_events`](Self::take_events) tell everything anew.
    pub fn void_events(&mut self) {
        self.log.void();
    }

    /// All blocks.
    pub fn total(&self) -> usize {
        self.meta.len()
    }

    /// Blocks that hold nothing.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Blocks that sequences hold.
    pub fn held(&self) -> usize {
        self.total() - self.free() - self.cached
    }

    /// Blocks that nobody holds and that are remembered.
    pub fn cached(&self) -> usize {
        self.cached
    }

    /// Blocks that [`allocate`](Self::allocate) can give out.
    pub fn available(&self) -> usize {
        self.free.len() + self.cached
    }

    /// Changes whenever a block became available or a name was given: an allocation or a match that failed before
    /// cannot succeed while this stands still.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The block of that name, held or cached.
    pub fn lookup(&self, hash: &BlockHash) -> Option<u32> {
        self.index.get(hash).copied()
    }

    /// Whether nobody holds the block, so that sharing it takes it out of what is available.
    pub fn is_idle(&self, block: u32) -> bool {
        self.meta[block as usize].refs == 0
    }

    /// One more holder of a named block, from [`lookup`](Self::lookup).
    pub fn share(&mut self, block: u32) {
        debug_assert!(self.meta[block as usize].hash.is_some(), "only named blocks are shared");
        if self.meta[block as usize].refs == 0 {
            self.unlink(block);
        }
        self.meta[block as usize].refs += 1;
    }

    /// A nameless block with one holder: a free one, else the cached block released longest ago, which is forgotten.
    pub fn allocate(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None if self.oldest != NONE => {
                let block = self.oldest;
                self.unlink(block);
                if let Some(hash) = self.meta[block as usize].hash.take() {
                    self.index.remove(&hash);
                    let parent = self.meta[block as usize].parent;
                    self.note(BlockEvent::Evicted { parent, hash, block });
                }
                block
            }
            None => return None,
        };
        self.meta[block as usize].refs = 1;
        Some(block)
    }

    /// Names a full block whose KV is complete; `parent` is the name before it in its chain. When another block has that name already nothing changes: the content is
    /// the same, and this one goes back to the free list when it is released.
    pub fn register(&mut self, block: u32, hash: BlockHash, parent: BlockHash) {
        debug_assert!(self.meta[block as usize].refs > 0, "only held blocks are named");
        debug_assert!(self.meta[block as usize].hash.is_none_or(|h| h == hash));
        if let std::collections::hash_map::Entry::Vacant(entry) = self.index.entry(hash) {
            entry.insert(block);
            self.meta[block as usize].hash = Some(hash);
            self.meta[block as usize].parent = parent;
            self.version += 1;
            self.note(BlockEvent::Stored { parent, hash, block });
        }
    }

    /// One holder fewer. The last one leaves the block cached if it has a name, free otherwise.
    pub fn release(&mut self, block: u32) {
        let meta = &mut self.meta[block as usize];
        debug_assert!(meta.refs > 0, "released more often than held");
        meta.refs = meta.refs.saturating_sub(1);
        if meta.refs > 0 {
            return;
        }
        self.version += 1;
        if self.meta[block as usize].hash.is_some() {
            self.link_newest(block);
        } else {
            self.free.push(block);
        }
    }

    fn note(&mut self, event: BlockEvent) {
        self.log.push(event);
        self.tier_log.push(event);
    }

    fn link_newest(&mut self, block: u32) {
        let newest = self.newest;
        self.meta[block as usize].older = newest;
        self.meta[block as usize].newer = NONE;
        match newest {
            NONE => self.oldest = block,
            _ => self.meta[newest as usize].newer = block,
        }
        self.newest = block;
        self.cached += 1;
    }

    fn unlink(&mut self, block: u32) {
        let (older, newer) = (self.meta[block as usize].older, self.meta[block as usize].newer);
        match older {
            NONE => self.oldest = newer,
            _ => self.meta[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            _ => self.meta[newer as usize].older = older,
        }
        self.cached -= 1;
    }

    /// Verifies the invariants against the block lists of all owners. O(pool): for tests and debugging.
    pub fn check<'a>(&self, owners: impl Iterator<Item = &'a [u32]>) -> Result<(), String> {
        let mut refs = vec![0u32; self.total()];
        let mut last_owner = vec![usize::MAX; self.total()];
        for (owner, blocks) in owners.enumerate() {
            for &block in blocks {
                let slot = refs
                    .get_mut(block as usize)
                    .ok_or(format!("block {block} does not exist"))?;
                *slot += 1;
                if std::mem::replace(&mut last_owner[block as usize], owner) == owner {
                    return Err(format!("block {block} is listed twice by one sequence"));
                }
            }
        }
        let mut is_free = vec![false; self.total()];
        for &block in &self.free {
            if std::mem::replace(&mut is_free[block as usize], true) {
                return Err(format!("block {block} is twice in the free list"));
            }
        }
        let mut is_cached = vec![false; self.total()];
        let (mut at, mut walked) = (self.oldest, 0);
        while at != NONE {
            if std::mem::replace(&mut is_cached[at as usize], true) {
                return Err(format!("the LRU list loops at block {at}"));
            }
            walked += 1;
            at = self.meta[at as usize].newer;
        }
        if walked != self.cached {
            return Err(format!("{walked} blocks in the LRU list, {} counted", self.cached));
        }
        let mut named = 0;
        for (block, meta) in self.meta.iter().enumerate() {
            let states = [refs[block] > 0, is_free[block], is_cached[block]];
            if states.iter().filter(|s| **s).count() != 1 {
                return Err(format!("block {block}: held, free, cached = {states:?}"));
            }
            if meta.refs != refs[block] {
                return Err(format!(
                    "block {block}: {} references counted, {} owners",
                    meta.refs, refs[block]
                ));
            }
            match meta.hash {
                Some(hash) => {
                    named += 1;
                    if self.index.get(&hash) != Some(&(block as u32)) {
                        return Err(format!("block {block} has a name that the index gives to another"));
                    }
                    if is_free[block] {
                        return Err(format!("free block {block} has a name"));
                    }
                }
                None if is_cached[block] => return Err(format!("cached block {block} has no name")),
                None if refs[block] > 1 => return Err(format!("block {block} is shared but has no name")),
                None => {}
            }
        }
        if named != self.index.len() {
            return Err(format!("{} names in the index, {named} on blocks", self.index.len()));
        }
        Ok(())
    }
}

/// A `Stored` for every block that is named now.
fn named_blocks(meta: &[Meta]) -> Vec<BlockEvent> {
    let named = |(block, meta): (usize, &Meta)| {
        meta.hash.map(|hash| BlockEvent::Stored {
            parent: meta.parent,
            hash,
            block: block as u32,
        })
    };
    meta.iter().enumerate().filter_map(named).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hash(n: u8) -> BlockHash {
        [n; 16]
    }

    #[test]
    fn cached_blocks_are_forgotten_in_order_of_release() {
        let mut blocks = BlockManager::new(3);
        let ids: Vec<u32> = (0..3).map(|_| blocks.allocate().expect("free")).collect();
        for (i, &b) in ids.iter().enumerate() {
            blocks.register(b, hash(i as u8), hash(99));
        }
        for i in [1, 0, 2] {
            blocks.release(ids[i]);
        }
        assert_eq!((blocks.free(), blocks.held(), blocks.cached()), (0, 0, 3));
        // Used again: now the newest when released.
        blocks.share(ids[1]);
        blocks.release(ids[1]);
        assert_eq!(blocks.allocate(), Some(ids[0]));
        assert_eq!(blocks.allocate(), Some(ids[2]));
        assert_eq!(blocks.lookup(&hash(1)), Some(ids[1]));
        assert_eq!(blocks.lookup(&hash(0)), None);
        assert_eq!(blocks.allocate(), Some(ids[1]));
        assert_eq!(blocks.allocate(), None);
    }

    #[test]
    fn a_second_block_of_the_same_content_stays_nameless() {
        let mut blocks = BlockManager::new(2);
        let (a, b) = (blocks.allocate().expect("free"), blocks.allocate().expect("free"));
        blocks.register(a, hash(1), hash(99));
        blocks.register(b, hash(1), hash(99));
        assert_eq!(blocks.lookup(&hash(1)), Some(a));
        blocks.release(b);
        assert_eq!((blocks.free(), blocks.cached()), (1, 0));
        blocks.release(a);
        assert_eq!((blocks.free(), blocks.cached()), (1, 1));
    }

    proptest! {
        /// Any sequence of operations keeps the invariants, against owners that keep their own lists.
        #[test]
        fn invariants_hold(total in 1u32..12, ops in prop::collection::vec((0u8..4, 0usize..64, 0u8..10), 0..300)) {
            let mut blocks = BlockManager::new(total);
            let mut owners: Vec<Vec<u32>> = vec![Vec::new(); 4];
            // What a reader of the events knows, reading at random moments.
            let mut mirror = std::collections::BTreeMap::new();
            blocks.enable_events();
            for (op, pick, name) in ops {
                let owner = pick % 4;
                match op {
                    0 => {
                        let available = blocks.available();
                        let got = blocks.allocate();
                        prop_assert_eq!(got.is_some(), available > 0);
                        owners[owner].extend(got);
                    }
                    1 => if let Some(b) = blocks.lookup(&hash(name)).filter(|b| !owners[owner].contains(b)) {
                        blocks.share(b);
                        owners[owner].push(b);
                    },
                    2 => if let Some(&b) = owners[owner].last() && blocks.meta[b as usize].hash.is_none() {
                        blocks.register(b, hash(name), hash(99));
                    },
                    _ => if !owners[owner].is_empty() {
                        let at = pick / 4 % owners[owner].len();
                        blocks.release(owners[owner].swap_remove(at));
                    },
                }
                if pick % 3 == 0 {
                    let BlockEvents { reset, events } = blocks.take_events();
                    if reset {
                        mirror.clear();
                    }
                    for event in events {
                        match event {
                            BlockEvent::Stored { hash, block, .. } => prop_assert_eq!(mirror.insert(hash, block), None),
                            BlockEvent::Evicted { hash, .. } => prop_assert!(mirror.remove(&hash).is_some()),
                        }
                    }
                    let known: std::collections::BTreeMap<_, _> = blocks.index.iter().map(|(h, b)| (*h, *b)).collect();
                    prop_assert_eq!(&mirror, &known);
                }
                prop_assert_eq!(blocks.check(owners.iter().map(Vec::as_slice)), Ok(()));
                prop_assert_eq!(blocks.free() + blocks.held() + blocks.cached(), total as usize);
            }
            for b in owners.concat() {
                blocks.release(b);
            }
            prop_assert_eq!(blocks.held(), 0);
            prop_assert_eq!(blocks.check(std::iter::empty()), Ok(()));
        }
    }
}
