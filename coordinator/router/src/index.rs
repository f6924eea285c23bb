//! Which worker holds which block: a map from block names to sets of workers, and the walk along a prompt's chain of
//! names that finds how much of it each worker holds.
//!
//! # Slots
//!
//! A worker's content is kept under a *slot*, a number below 4096. Closing a slot makes all it holds invisible at once,
//! by one bit; a sweep takes it out later, a little at a time ([`Index::sweep`]), and only when the sweep has been
//! everywhere since is the slot given out again. Telling a worker's content anew (a resync, or a new epoch) means a new
//! slot, so nothing of the old telling can ever be found under the new one.
//!
//! ```text
//! free ──open──▶ live ──close──▶ dead (invisible, swept part by part) ──swept everywhere──▶ free
//! ```
//!
//! # The walk
//!
//! The names of a prompt are known before the walk, so all of them are looked up in independent steps, which the
//! processor overlaps; then the set of candidates is narrowed block by block. Where a block has the same owners as the
//! one before (one comparison of fingerprints), nothing can change and nothing is done: a prefix that a thousand workers
//! share costs a step per block, not a thousand. Each worker drops out of the candidates once. The result is exact, also
//! where a worker holds blocks behind a hole: those do not count. Skipping along the chain, which trees and positional
//! indexes do, would save lookups, but has to trust that a worker that holds a block holds all before it; it does not
//! always.
//!
//! Not here: whether events came in order ([`crate::feed`]), and what cached blocks are worth ([`crate::cost`]).

use crate::owners::{Bitmap, Owners, SLOTS, WORDS};
use crate::table::{PARTS, Table};

/// Blocks of a prompt looked up before their owners are compared: enough for the processor to overlap, few enough that
/// a short match looks up little in vain.
const LOOKAHEAD: usize = 64;
/// Blocks that one slot can hold. Eight tebibytes of 128 KiB blocks; a bound against a worker that tells nonsense.
pub const BLOCKS_PER_SLOT_MAX: u32 = 1 << 26;
/// Entries (worker-block pairs) of an index, some 2 GiB. What is told beyond is not kept: a worker then looks colder than
/// it is.
pub const PAIRS_MAX: u64 = 1 << 27;
/// Parts that one call of [`Index::sweep`] looks at, where they are empty.
const SWEEP_EMPTY_MAX: usize = 64;

/// Where a block's bytes are. A block may be in several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tier {
    /// The arena that the engine computes in.
    Device,
    /// Host memory beside it.
    Host,
    /// A local disk.
    Disk,
    /// An object store.
    Object,
}

impl Tier {
    /// Tiers other than the device.
    pub const LOWER: usize = 3;

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// Where a worker's content is kept; see the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Slot(pub(crate) u16);

#[derive(Clone, Copy, Default)]
struct SlotState {
    live: bool,
    /// Dead: parts swept, in all, after which it is free.
    free_at: Option<u64>,
    blocks: u32,
    /// Of these, blocks that are only in lower tiers.
    lower: u32,
}

/// See the module.
pub struct Index {
    table: Table,
    owners: Owners,
    slots: Vec<SlotState>,
    live: Box<Bitmap>,
    pairs: u64,
    dead: usize,
    /// Parts swept since the beginning; the next one is this modulo [`PARTS`].
    swept: u64,
}

/// Figures of an index.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IndexStats {
    /// Distinct blocks.
    pub blocks: usize,
    /// Worker-block pairs of live slots.
    pub pairs: u64,
    /// Bytes allocated.
    pub bytes: usize,
    /// Slots in use.
    pub live_slots: usize,
    /// Slots that wait for the sweep.
    pub dead_slots: usize,
}

impl Default for Index {
    fn default() -> Self {
        Self::new()
    }
}

impl Index {
    /// An empty index.
    pub fn new() -> Self {
        Self {
            table: Table::new(),
            owners: Owners::default(),
            slots: Vec::new(),
            live: Box::new([0; WORDS]),
            pairs: 0,
            dead: 0,
            swept: 0,
        }
    }

    /// An empty slot. `None` while all are in use or wait for the sweep.
    pub fn open(&mut self) -> Option<Slot> {
        let free = self
            .slots
            .iter()
            .position(|state| !state.live && state.free_at.is_none());
        let slot = match free {
            Some(slot) => slot,
            None if self.slots.len() < SLOTS => {
                self.slots.push(SlotState::default());
                self.slots.len() - 1
            }
            None => return None,
        };
        self.slots[slot] = SlotState {
            live: true,
            ..SlotState::default()
        };
        self.live[slot / 16] |= 1 << (slot % 16);
        Some(Slot(slot as u16))
    }

    /// Makes all that the slot holds invisible. The slot must not be used again.
    pub fn close(&mut self, slot: Slot) {
        let at = usize::from(slot.0);
        let Some(state) = self.slots.get_mut(at).filter(|state| state.live) else {
            return;
        };
        state.live = false;
        state.free_at = Some(self.swept + PARTS as u64);
        self.pairs -= u64::from(state.blocks);
        self.dead += 1;
        self.live[at / 16] &= !(1 << (at % 16));
    }

    /// The worker has these blocks in this tier now.
    pub fn store(&mut self, slot: Slot, tier: Tier, names: &[u64]) {
        for &name in names {
            let Some(state) = self.slots.get_mut(usize::from(slot.0)).filter(|state| state.live) else {
                return;
            };
            if state.blocks >= BLOCKS_PER_SLOT_MAX || self.pairs >= PAIRS_MAX {
                return;
            }
            let (owners, pairs) = (&mut self.owners, &mut self.pairs);
            self.table
                .change(key(name), |set| match owners.add(set, slot.0, tier.bit()) {
                    None => set,
                    Some((new, before)) => {
                        if before == 0 {
                            state.blocks += 1;
                            *pairs += 1;
                        }
                        state.lower += lower(before | tier.bit());
                        state.lower -= lower(before);
                        new
                    }
                });
        }
    }

    /// The worker has these blocks in this tier no more.
    pub fn evict(&mut self, slot: Slot, tier: Tier, names: &[u64]) {
        for &name in names {
            let Some(state) = self.slots.get_mut(usize::from(slot.0)).filter(|state| state.live) else {
                return;
            };
            let (owners, pairs) = (&mut self.owners, &mut self.pairs);
            self.table
                .change(key(name), |set| match owners.remove(set, slot.0, tier.bit()) {
                    None => set,
                    Some((new, before)) => {
                        let left = before & !tier.bit();
                        if left == 0 {
                            state.blocks -= 1;
                            *pairs -= 1;
                        }
                        state.lower += lower(left);
                        state.lower -= lower(before);
                        new
                    }
                });
        }
    }

    /// Takes a little of what dead slots hold out: one part of the table, about 0.1 ms. True while there is more to do.
    pub fn sweep(&mut self) -> bool {
        if self.dead == 0 {
            return false;
        }
        for _ in 0..SWEEP_EMPTY_MAX {
            let part = (self.swept % PARTS as u64) as usize;
            let (live, owners) = (&self.live, &mut self.owners);
            let mut seen = 0usize;
            let mut dead = Vec::new();
            self.table.change_part(part, |mut set| {
                seen += 1;
                dead.clear();
                owners.for_each(set, |owner| {
                    if !is_live(live, owner.slot()) {
                        dead.push(owner);
                    }
                });
                for owner in &dead {
                    if let Some((new, _)) = owners.remove(set, owner.slot(), owner.tiers()) {
                        set = new;
                    }
                }
                set
            });
            self.swept += 1;
            for state in &mut self.slots {
                if state.free_at.is_some_and(|at| at <= self.swept) {
                    state.free_at = None;
                    self.dead -= 1;
                }
            }
            if seen > 0 || self.dead == 0 {
                break;
            }
        }
        self.dead > 0
    }

    /// How many leading blocks of `names`, a prompt's chain, each live slot holds in any tier. `matches` is overwritten.
    pub fn match_chain(&self, names: &[u64], matches: &mut Matches) {
        matches.clear(self.slots.len());
        let words = self.slots.len().div_ceil(16);
        let mut alive: Bitmap = *self.live;
        let mut before = None;
        for (batch, names) in names.chunks(LOOKAHEAD).enumerate() {
            let mut sets = [0u32; LOOKAHEAD];
            for (set, name) in sets.iter_mut().zip(names) {
                *set = self.table.get(key(*name));
            }
            let sets = &sets[..names.len()];
            let mut prints = [0u64; LOOKAHEAD];
            for (print, set) in prints.iter_mut().zip(sets) {
                *print = self.owners.fingerprint(*set);
            }
            for (at, (set, print)) in sets.iter().zip(prints).enumerate() {
                let depth = (batch * LOOKAHEAD + at) as u32;
                if before != Some(print) {
                    before = Some(print);
                    let dropped = |slot| matches.hit(slot, depth);
                    self.owners.retain(*set, &mut alive, words, dropped);
                    if alive[..words].iter().all(|word| *word == 0) {
                        return;
                    }
                }
                matches.sets.push((*set, print));
            }
        }
        let depth = names.len() as u32;
        self.owners
            .retain(0, &mut alive, words, |slot| matches.hit(slot, depth));
    }

    /// Of the blocks that `slot` holds by `matches`, those that are in no better tier than host, disk and object store.
    pub fn lower_tiers(&self, matches: &Matches, slot: Slot) -> [u32; Tier::LOWER] {
        let mut counts = [0; Tier::LOWER];
        if self.slots.get(usize::from(slot.0)).is_none_or(|state| state.lower == 0) {
            return counts;
        }
        let (mut before, mut tiers) = (None, 0);
        for (set, print) in matches.sets.iter().take(matches.depth(slot) as usize) {
            if before != Some(*print) {
                before = Some(*print);
                tiers = self.owners.tiers(*set, slot.0);
            }
            // The lowest bit is the best tier: bit 0 is the device, and no tier at all is beyond the counts.
            let best = tiers.trailing_zeros() as usize;
            if let Some(count) = best.checked_sub(1).and_then(|lower| counts.get_mut(lower)) {
                *count += 1;
            }
        }
        counts
    }

    /// Blocks under a slot.
    pub fn blocks_of(&self, slot: Slot) -> u32 {
        self.slots.get(usize::from(slot.0)).map_or(0, |state| state.blocks)
    }

    /// Size and bytes.
    pub fn stats(&self) -> IndexStats {
        IndexStats {
            blocks: self.table.len(),
            pairs: self.pairs,
            bytes: self.table.bytes() + self.owners.bytes() + size_of::<Self>() + size_of::<Bitmap>(),
            live_slots: self.slots.iter().filter(|state| state.live).count(),
            dead_slots: self.dead,
        }
    }
}

/// 1 if a block with these tiers counts as one of the lower ones.
fn lower(tiers: u8) -> u32 {
    u32::from(tiers != 0 && tiers & Tier::Device.bit() == 0)
}

fn is_live(live: &Bitmap, slot: u16) -> bool {
    live[usize::from(slot) / 16] & (1 << (slot % 16)) != 0
}

/// The table takes any key; the name 0 of a hash is as unlikely as any other and means the same as 1.
fn key(name: u64) -> u64 {
    name.max(1)
}

/// What [`Index::match_chain`] found. Made once and used again, it allocates nothing.
#[derive(Debug, Default)]
pub struct Matches {
    depths: Vec<u32>,
    hits: Vec<(Slot, u32)>,
    /// Owners of the blocks up to the deepest match, with their fingerprints.
    sets: Vec<(u32, u64)>,
}

impl Matches {
    fn clear(&mut self, slots: usize) {
        self.depths.clear();
        self.depths.resize(slots, 0);
        self.hits.clear();
        self.sets.clear();
    }

    fn hit(&mut self, slot: u16, depth: u32) {
        if depth > 0 {
            self.depths[usize::from(slot)] = depth;
            self.hits.push((Slot(slot), depth));
        }
    }

    /// Leading blocks that the slot holds.
    pub fn depth(&self, slot: Slot) -> u32 {
        self.depths.get(usize::from(slot.0)).copied().unwrap_or(0)
    }

    /// Slots that hold at least one block, shallow ones first, by number among equals.
    pub fn hits(&self) -> &[(Slot, u32)] {
        &self.hits
    }
}
