//! The directory of one bounded tier: which block is in which slot, and whose slot is given away next.
//!
//! # States of a slot
//!
//! ```text
//! free ──place──▶ writing ──finish(ok)──▶ present ──pin/unpin──▶ present
//!   ▲                │ finish(failed)       │ remove, or chosen by place: only while nobody has it pinned
//!   └────────────────┴──────────────────────┘
//! ```
//!
//! # Whom it forgets
//!
//! A segmented LRU. New blocks come to the *probation* list; one that is asked for moves to the *protected* list, which
//! may take `PROTECTED_SHARE` of the tier; its oldest goes back to probation. The slot given away is the oldest of
//! probation. So prompts that never come back, however many, push out only each other, while system prompts and
//! running conversations stay; plain LRU loses those to one burst of long documents. Counting more uses than "more than
//! one" (LFU) would keep yesterday's prompts. Within a prompt the pool evicts the deepest blocks first, so
//! they are older here and go first, and a beginning that is left is still of use.
//!
//! # Invariants ([`Shelf::check`])
//!
//! Free + writing + present = slots made, at most the capacity. A name is in one slot at most. Present slots are in exactly one
//! list; others in none, and unpinned. A slot's generation grows with each `place`: who comes with an old one is told so.
//! Its [changes](Shelf::take_changes), applied in order to what was present when they were last complete, give what is.

use std::collections::HashMap;

use baton_proto::block_hash::BlockHash;

use crate::changes::{Change, ChangeLog};

/// Eighths of a tier that blocks which were asked for may take.
const PROTECTED_SHARE: usize = 6;
/// End of a list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Free,
    Writing,
    Present,
}

#[derive(Debug, Clone)]
struct Slot {
    name: BlockHash,
    parent: u64,
    state: State,
    pins: u32,
    generation: u64,
    protected: bool,
    older: u32,
    newer: u32,
}

#[derive(Debug, Clone, Copy)]
struct List {
    oldest: u32,
    newest: u32,
    len: usize,
}

const EMPTY: List = List {
    oldest: NONE,
    newest: NONE,
    len: 0,
};

/// A slot given to a writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which.
    pub slot: u32,
    /// Of this giving.
    pub generation: u64,
    /// Who had to go for it: name, and short name of its parent.
    pub evicted: Option<(BlockHash, u64)>,
}

/// A block that an earlier life left in a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// Where.
    pub slot: u32,
    /// Its name.
    pub name: BlockHash,
    /// The short name of the block before it in its chain; 0 where that is not known.
    pub parent: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Shelf {
    capacity: usize,
    slots: Vec<Slot>,
    free: Vec<u32>,
    index: HashMap<BlockHash, u32>,
    probation: List,
    protected: List,
    generation: u64,
    log: ChangeLog,
}

impl Shelf {
    /// An empty tier of `capacity` slots. Bookkeeping grows with use.
    pub fn new(capacity: usize) -> Self {
        Shelf {
            // The last number means "none".
            capacity: capacity.min(NONE as usize),
            slots: Vec::new(),
            free: Vec::new(),
            index: HashMap::new(),
            probation: EMPTY,
            protected: EMPTY,
            generation: 0,
            log: ChangeLog::default(),
        }
    }

    /// Slots there may be.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Blocks that are present.
    pub fn len(&self) -> usize {
        self.probation.len + self.protected.len
    }

    /// Whether no block is present.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The slot of a present block.
    pub fn get(&self, name: &BlockHash) -> Option<u32> {
        let slot = *self.index.get(name)?;
        (self.slots[slot as usize].state == State::Present).then_some(slot)
    }

    /// Whether it is present or being written.
    pub fn knows(&self, name: &BlockHash) -> bool {
        self.index.contains_key(name)
    }

    /// Somebody asked for a present block.
    pub fn touch(&mut self, slot: u32) {
        if self.slots[slot as usize].state != State::Present {
            return;
        }
        self.unlink(slot);
        self.slots[slot as usize].protected = true;
        self.link(slot);
        let most = self.capacity * PROTECTED_SHARE / 8;
        while self.protected.len > most {
            let oldest = self.protected.oldest;
            self.unlink(oldest);
            self.slots[oldest as usize].protected = false;
            self.link(oldest);
        }
    }

    /// A slot to write `name` to, whose parent has that short name: a free one, else that of the block to forget. `None` if
    /// the name is known already, or no slot can be had.
    pub fn place(&mut self, name: BlockHash, parent: u64) -> Option<Place> {
        if self.knows(&name) {
            return None;
        }
        let mut evicted = None;
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < self.capacity => {
                self.slots.push(Slot {
                    name,
                    parent,
                    state: State::Free,
                    pins: 0,
                    generation: 0,
                    protected: false,
                    older: NONE,
                    newer: NONE,
                });
                (self.slots.len() - 1) as u32
            }
            None => {
                let slot = self.victim()?;
                let Slot { name, parent, .. } = self.slots[slot as usize];
                self.remove(slot);
                self.free.pop();
                evicted = Some((name, parent));
                slot
            }
        };
        self.generation += 1;
        let entry = &mut self.slots[slot as usize];
        (entry.name, entry.parent) = (name, parent);
        entry.state = State::Writing;
        entry.protected = false;
        entry.generation = self.generation;
        self.index.insert(name, slot);
        Some(Place {
            slot,
            generation: self.generation,
            evicted,
        })
    }

    /// The oldest that nobody reads. Pinned ones are few (reads under way), so the walk is short.
    fn victim(&self) -> Option<u32> {
        [self.probation, self.protected].iter().find_map(|list| {
            let mut at = list.oldest;
            while at != NONE && self.slots[at as usize].pins > 0 {
                at = self.slots[at as usize].newer;
            }
            (at != NONE).then_some(at)
        })
    }

    /// The writer of a place is done. False, and nothing changed, for a generation that is over.
    pub fn finish(&mut self, slot: u32, generation: u64, written: bool) -> bool {
        let Some(entry) = self.slots.get_mut(slot as usize) else {
            return false;
        };
        if entry.state != State::Writing || entry.generation != generation {
            return false;
        }
        if written {
            entry.state = State::Present;
            self.log.push(Change::stored(&entry.name, entry.parent));
            self.link(slot);
        } else {
            self.vacate(slot);
        }
        true
    }

    /// The present block in a slot will be read: the slot stays as it is until `unpin`. Answers the generation.
    pub fn pin(&mut self, slot: u32) -> u64 {
        let entry = &mut self.slots[slot as usize];
        debug_assert!(entry.state == State::Present, "only what is there is read");
        entry.pins += 1;
        entry.generation
    }

    /// One reader less; `keep` says whether the block may stay. False for a generation that is over.
    pub fn unpin(&mut self, slot: u32, generation: u64, keep: bool) -> bool {
        let Some(entry) = self.slots.get_mut(slot as usize) else {
            return false;
        };
        if entry.state != State::Present || entry.generation != generation || entry.pins == 0 {
            return false;
        }
        entry.pins -= 1;
        if !keep && entry.pins == 0 {
            self.remove(slot);
        }
        true
    }

    /// Forgets a present block that nobody reads.
    pub fn remove(&mut self, slot: u32) {
        if self.slots[slot as usize].state != State::Present || self.slots[slot as usize].pins > 0 {
            return;
        }
        self.unlink(slot);
        self.log.push(Change::evicted(&self.slots[slot as usize].name));
        self.vacate(slot);
    }

    fn vacate(&mut self, slot: u32) {
        let entry = &mut self.slots[slot as usize];
        entry.state = State::Free;
        self.index.remove(&entry.name);
        self.free.push(slot);
    }

    /// Records what becomes present and what leaves from now on, for [`take_changes`](Self::take_changes).
    pub fn watch(&mut self) {
        self.log.enable();
    }

    /// Changes since the last call, in order. `None` if there were too many, or never any call: then
    /// [`present`](Self::present) is where to begin.
    pub fn take_changes(&mut self) -> Option<Vec<Change>> {
        self.log.take()
    }

    /// What is present, as changes that lead there from nothing, the least likely to be forgotten last; of more than `max`
    /// blocks those. Changes so far count as taken.
    pub fn present(&mut self, max: usize) -> Vec<Change> {
        self.log.begin();
        let mut newest_first = Vec::with_capacity(self.len().min(max));
        for list in [self.protected, self.probation] {
            let mut at = list.newest;
            while at != NONE && newest_first.len() < max {
                let slot = &self.slots[at as usize];
                newest_first.push(Change::stored(&slot.name, slot.parent));
                at = slot.older;
            }
        }
        newest_first.reverse();
        newest_first
    }

    /// Takes over what an earlier life left, oldest first. Only on an empty shelf. Names that come twice
    /// and slots beyond the capacity are left out.
    pub fn restore(&mut self, found: impl Iterator<Item = Found>) {
        debug_assert!(self.slots.is_empty(), "only once, before anything else");
        let capacity = self.capacity;
        for Found { slot, name, parent } in found.filter(|found| (found.slot as usize) < capacity) {
            while self.slots.len() <= slot as usize {
                self.free.push(self.slots.len() as u32);
                self.slots.push(Slot {
                    name: BlockHash::default(),
                    parent: 0,
                    state: State::Free,
                    pins: 0,
                    generation: 0,
                    protected: false,
                    older: NONE,
                    newer: NONE,
                });
            }
            if self.slots[slot as usize].state == State::Free && !self.knows(&name) {
                self.generation += 1;
                let entry = &mut self.slots[slot as usize];
                (entry.name, entry.parent) = (name, parent);
                (entry.state, entry.generation) = (State::Present, self.generation);
                self.log.push(Change::stored(&name, parent));
                self.index.insert(name, slot);
                self.link(slot);
            }
        }
        let slots = &self.slots;
        self.free.retain(|slot| slots[*slot as usize].state == State::Free);
    }

    /// What is being written to a slot, if this giving of it is not over.
    pub fn writing_name(&self, slot: u32, generation: u64) -> Option<BlockHash> {
        let entry = self.slots.get(slot as usize)?;
        (entry.state == State::Writing && entry.generation == generation).then_some(entry.name)
    }

    /// Slots being written. O(slots): for checks.
    pub fn writing(&self) -> usize {
        self.slots.iter().filter(|slot| slot.state == State::Writing).count()
    }

    fn list(&mut self, protected: bool) -> &mut List {
        if protected {
            &mut self.protected
        } else {
            &mut self.probation
        }
    }

    /// As the newest of its list.
    fn link(&mut self, slot: u32) {
        let protected = self.slots[slot as usize].protected;
        let newest = self.list(protected).newest;
        self.slots[slot as usize].older = newest;
        self.slots[slot as usize].newer = NONE;
        match newest {
            NONE => self.list(protected).oldest = slot,
            _ => self.slots[newest as usize].newer = slot,
        }
        let list = self.list(protected);
        list.newest = slot;
        list.len += 1;
    }

    fn unlink(&mut self, slot: u32) {
        let Slot {
            older,
            newer,
            protected,
            ..
        } = self.slots[slot as usize];
        match older {
            NONE => self.list(protected).oldest = newer,
            _ => self.slots[older as usize].newer = newer,
        }
        match newer {
            NONE => self.list(protected).newest = older,
            _ => self.slots[newer as usize].older = older,
        }
        self.list(protected).len -= 1;
    }

    /// Verifies the invariants; `pins` is how many readers there are, all together. O(slots).
    pub fn check(&self, pins: usize) -> Result<(), String> {
        let mut listed = vec![0; self.slots.len()];
        for (list, protected) in [(self.probation, false), (self.protected, true)] {
            let (mut at, mut older, mut walked) = (list.oldest, NONE, 0);
            while at != NONE {
                let slot = &self.slots[at as usize];
                walked += 1;
                listed[at as usize] += 1;
                if slot.older != older || slot.protected != protected || walked > self.slots.len() {
                    return Err(format!("a list is broken at slot {at}"));
                }
                (older, at) = (at, slot.newer);
            }
            if walked != list.len || list.newest != older {
                return Err(format!("{walked} slots in a list, {} counted", list.len));
            }
        }
        let mut free = vec![0; self.slots.len()];
        self.free.iter().for_each(|slot| free[*slot as usize] += 1);
        for (at, slot) in self.slots.iter().enumerate() {
            let right = match slot.state {
                State::Free => (0, 1, false),
                State::Writing => (0, 0, true),
                State::Present => (1, 0, true),
            };
            let indexed = self.index.get(&slot.name) == Some(&(at as u32));
            if (listed[at], free[at]) != (right.0, right.1) || (right.2 && !indexed) {
                return Err(format!(
                    "slot {at} is {:?}, but listed {}, free {}, indexed {indexed}",
                    slot.state, listed[at], free[at]
                ));
            }
            if slot.pins > 0 && slot.state != State::Present {
                return Err(format!("slot {at} is {:?} and is read", slot.state));
            }
        }
        let named = self.slots.iter().filter(|s| s.state != State::Free).count();
        let pinned: u32 = self.slots.iter().map(|s| s.pins).sum();
        if named != self.index.len() || self.slots.len() > self.capacity || pinned as usize != pins {
            return Err(format!(
                "{named} names, {} in the index; {} slots of {}; {pinned} pins, {pins} reads",
                self.index.len(),
                self.slots.len(),
                self.capacity
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_proto::block_hash::short;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn name(n: u8) -> BlockHash {
        [n; 16]
    }

    /// What a reader of the changes believes: parents by name.
    fn apply(mirror: &mut BTreeMap<u64, u64>, shelf: &mut Shelf) {
        let changes = shelf.take_changes().unwrap_or_else(|| {
            mirror.clear();
            shelf.present(usize::MAX)
        });
        for change in changes {
            match change {
                Change::Stored { parent, name } => assert!(mirror.insert(name, parent).is_none(), "told twice"),
                Change::Evicted { name } => assert!(mirror.remove(&name).is_some(), "was not there"),
            }
        }
    }

    fn put(shelf: &mut Shelf, n: u8) -> Option<BlockHash> {
        let place = shelf.place(name(n), 0).expect("a slot");
        assert!(shelf.finish(place.slot, place.generation, true));
        place.evicted.map(|(name, _)| name)
    }

    #[test]
    fn what_was_asked_for_outlives_a_flood() {
        let mut shelf = Shelf::new(8);
        for n in 0..4 {
            put(&mut shelf, n);
        }
        for n in 0..4 {
            shelf.touch(shelf.get(&name(n)).expect("present"));
        }
        for n in 10..250 {
            put(&mut shelf, n);
        }
        assert!((0..4).all(|n| shelf.get(&name(n)).is_some()));
        // But not for ever: others that are asked for take their places.
        for n in 10..250u8 {
            let _ = shelf.knows(&name(n)) || put(&mut shelf, n).is_some();
            shelf.touch(shelf.get(&name(n)).expect("present"));
        }
        assert!((0..4).all(|n| shelf.get(&name(n)).is_none()));
        shelf.check(0).expect("sound");
    }

    #[test]
    fn a_slot_that_is_read_is_not_given_away_and_old_generations_are_refused() {
        let mut shelf = Shelf::new(1);
        put(&mut shelf, 1);
        let generation = shelf.pin(0);
        assert_eq!(shelf.place(name(2), 0), None);
        assert!(shelf.unpin(0, generation, true));
        let place = shelf.place(name(2), 0).expect("given away now");
        assert_eq!(place.evicted, Some((name(1), 0)));
        assert!(!shelf.unpin(0, generation, false) && !shelf.finish(0, generation, true));
        assert!(shelf.finish(0, place.generation, false), "the write failed");
        assert!(shelf.is_empty() && !shelf.knows(&name(2)));
        shelf.check(0).expect("sound");
    }

    proptest! {
        #[test]
        fn invariants_hold(capacity in 1usize..9, ops in prop::collection::vec((0u8..6, 0u8..20, any::<bool>()), 0..200)) {
            let mut shelf = Shelf::new(capacity);
            let (mut writing, mut reading) = (Vec::new(), Vec::new());
            shelf.watch();
            let mut mirror = BTreeMap::new();
            for (op, n, flag) in ops {
                match op {
                    0 | 1 => writing.extend(shelf.place(name(n), u64::from(n))),
                    2 if !writing.is_empty() => {
                        let place: Place = writing.swap_remove(n as usize % writing.len());
                        prop_assert!(shelf.finish(place.slot, place.generation, flag));
                    }
                    3 => if let Some(slot) = shelf.get(&name(n)) { reading.push((slot, shelf.pin(slot))) },
                    4 if !reading.is_empty() => {
                        let (slot, generation) = reading.swap_remove(n as usize % reading.len());
                        prop_assert!(shelf.unpin(slot, generation, flag));
                    }
                    _ => if let Some(slot) = shelf.get(&name(n)) { shelf.touch(slot) },
                }
                prop_assert_eq!(shelf.check(reading.len()), Ok(()));
                if flag {
                    apply(&mut mirror, &mut shelf);
                    let now: BTreeMap<u64, u64> =
                        (0..20).filter(|n| shelf.get(&name(*n)).is_some()).map(|n| (short(&name(n)), n.into())).collect();
                    prop_assert_eq!(&mirror, &now, "what was told is what is present");
                }
            }
            let told = shelf.present(usize::MAX);
            prop_assert_eq!(told.len(), shelf.len());
            prop_assert_eq!(&shelf.present(2), &told[told.len().saturating_sub(2)..]);
            // A later life finds what was present, whatever else lies about.
            let at = |slot, n: u8| Found { slot, name: name(n), parent: n.into() };
            let found: Vec<_> = (0..20).filter_map(|n| Some(at(shelf.get(&name(n))?, n))).collect();
            let mut next = Shelf::new(capacity);
            next.restore(found.iter().copied().chain([at(0, 99), at(capacity as u32, 98)]));
            prop_assert_eq!(next.check(0), Ok(()));
            prop_assert!(found.iter().all(|found| next.get(&found.name) == Some(found.slot)));
        }
    }
}
