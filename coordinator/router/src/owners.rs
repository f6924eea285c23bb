//! Sets of workers that hold a block, in 32 bits where one or two hold it (nearly always) and in a slab where more do.
//!
//! An *owner* is 16 bits: the worker's slot (12 bits) and the tiers in which it has the block (4 bits, at least one). A
//! *set* is 32 bits: nothing (0), one or two owners themselves, or the handle of a list in the slab. The tier bits tell
//! which: they are zero only in a handle.
//!
//! A list has a header with its length and a fingerprint, the XOR over a mix of its owners, so that two lists are
//! compared in one step. Lists that may have more than a hundred-odd owners also carry a bitmap of their slots, so that
//! a thousand candidates are intersected with a thousand owners in a few dozen steps. Lists come in sizes that double
//! (32 bytes upwards), are cut from large chunks, and go back to their size's free list.
//!
//! Not here: names ([`crate::table`]) and which slots are alive ([`crate::index`]).

/// Slots that an owner's 12 bits can name.
pub(crate) const SLOTS: usize = 4096;
/// Words of a bitmap over all slots.
pub(crate) const WORDS: usize = SLOTS / 16;
/// A bitmap over all slots.
pub(crate) type Bitmap = [u16; WORDS];

/// One worker and where it has the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Owner(u16);

impl Owner {
    pub(crate) fn new(slot: u16, tiers: u8) -> Self {
        Self(slot << 4 | u16::from(tiers & 15))
    }

    pub(crate) fn slot(self) -> u16 {
        self.0 >> 4
    }

    pub(crate) fn tiers(self) -> u8 {
        (self.0 & 15) as u8
    }
}

/// Length and fingerprint before a list, in 16-bit units.
const HEADER: usize = 5;
/// Units of the smallest list with its header; each class has twice the one before, the first with a bitmap four times.
const CLASS_UNITS_MIN: usize = 16;
/// First class whose lists carry a bitmap.
const BITMAP_CLASS: usize = 5;
/// Classes: the largest holds every slot.
const CLASSES: usize = 9;
/// Units of a chunk: 128 KiB, eight of the largest lists.
const CHUNK_UNITS: usize = 1 << 16;
/// Lists of one class that a handle can name.
const LISTS_MAX: u32 = 1 << 24;

#[derive(Default)]
struct Class {
    chunks: Vec<Box<[u16]>>,
    free: Vec<u32>,
    used: u32,
}

/// The slab.
#[derive(Default)]
pub(crate) struct Owners {
    classes: [Class; CLASSES],
}

/// A list's place.
#[derive(Clone, Copy)]
struct Handle {
    class: usize,
    index: u32,
}

fn units(class: usize) -> usize {
    let doubled = if class < BITMAP_CLASS { class } else { class + 1 };
    CLASS_UNITS_MIN << doubled
}

/// Where the owners begin.
fn offset(class: usize) -> usize {
    if class < BITMAP_CLASS { HEADER } else { HEADER + WORDS }
}

fn capacity(class: usize) -> usize {
    units(class) - offset(class)
}

impl Handle {
    fn decode(set: u32) -> Option<Self> {
        (set != 0 && set & 15 == 0).then(|| Self {
            class: (set >> 28) as usize - 1,
            index: set >> 4 & (LISTS_MAX - 1),
        })
    }

    fn encode(self) -> u32 {
        (self.class as u32 + 1) << 28 | self.index << 4
    }

    fn place(self) -> (usize, usize) {
        let per_chunk = CHUNK_UNITS / units(self.class);
        let index = self.index as usize;
        (index / per_chunk, index % per_chunk * units(self.class))
    }
}

/// The owners that a set names itself.
fn inline(set: u32) -> [u16; 2] {
    [set as u16, (set >> 16) as u16]
}

fn pair(a: u16, b: u16) -> u32 {
    // In order, so that equal sets are equal numbers.
    let (low, high) = if a < b { (a, b) } else { (b, a) };
    if low == 0 {
        u32::from(high)
    } else {
        u32::from(high) << 16 | u32::from(low)
    }
}

fn mix(owner: u16) -> u64 {
    let mut z = (u64::from(owner) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

impl Owners {
    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        let class = |class: &Class| class.chunks.len() * (CHUNK_UNITS * 2 + 16) + class.free.capacity() * 4;
        self.classes.iter().map(class).sum()
    }

    /// Equal for equal sets, and different for different ones but for 64-bit collisions.
    pub(crate) fn fingerprint(&self, set: u32) -> u64 {
        match Handle::decode(set) {
            Some(handle) => fingerprint(self.list(handle)) | 1 << 63,
            None => u64::from(set),
        }
    }

    /// Adds tiers to an owner, or the owner. `None` where the set is as it was; else the new set and the owner's tiers
    /// before. A set that can grow no more (millions of lists of one size) stays as it was.
    pub(crate) fn add(&mut self, set: u32, slot: u16, tiers: u8) -> Option<(u32, u8)> {
        let before = self.tiers(set, slot);
        if before | tiers == before {
            return None;
        }
        let new = Owner::new(slot, before | tiers).0;
        if before != 0 {
            return Some((self.replace(set, Owner::new(slot, before).0, new), before));
        }
        let Some(handle) = Handle::decode(set) else {
            let [a, b] = inline(set);
            if b == 0 {
                return Some((pair(a, new), 0));
            }
            let handle = self.allocate(0)?;
            for owner in [a, b, new] {
                self.push(handle, owner);
            }
            return Some((handle.encode(), 0));
        };
        let handle = if len(self.list(handle)) == capacity(handle.class) {
            self.rehouse(handle, handle.class + 1)?
        } else {
            handle
        };
        self.push(handle, new);
        Some((handle.encode(), 0))
    }

    /// Takes tiers from an owner, and the owner out if none are left. `None` where the set is as it was; else the new set
    /// and the owner's tiers before.
    pub(crate) fn remove(&mut self, set: u32, slot: u16, tiers: u8) -> Option<(u32, u8)> {
        let before = self.tiers(set, slot);
        if before & tiers == 0 {
            return None;
        }
        let old = Owner::new(slot, before).0;
        let left = before & !tiers;
        let new = if left == 0 { 0 } else { Owner::new(slot, left).0 };
        Some((self.replace(set, old, new), before))
    }

    /// Puts `new` in the place of `old`, which is there; 0 takes it out.
    fn replace(&mut self, set: u32, old: u16, new: u16) -> u32 {
        let Some(handle) = Handle::decode(set) else {
            let [a, b] = inline(set);
            return if a == old { pair(new, b) } else { pair(a, new) };
        };
        let start = offset(handle.class);
        let list = self.list_mut(handle);
        let count = len(list);
        let Some(at) = list[start..start + count].iter().position(|owner| *owner == old) else {
            return set;
        };
        let print = fingerprint(list) ^ mix(old);
        if new != 0 {
            list[start + at] = new;
            set_header(list, count, print ^ mix(new));
            return set;
        }
        list[start + at] = list[start + count - 1];
        list[start + count - 1] = 0;
        set_header(list, count - 1, print);
        if handle.class >= BITMAP_CLASS {
            let slot = usize::from(old >> 4);
            list[HEADER + slot / 16] &= !(1 << (slot % 16));
        }
        if count - 1 <= 2 {
            let (a, b) = (list[start], list[start + 1]);
            self.free(handle);
            return pair(a, b);
        }
        // Down a size at a little over half of it, so that one coming and going does not move the list each time.
        if handle.class > 0
            && count - 1 <= capacity(handle.class - 1) * 3 / 4
            && let Some(smaller) = self.rehouse(handle, handle.class - 1)
        {
            return smaller.encode();
        }
        set
    }

    /// The tiers of an owner, 0 if it is none.
    pub(crate) fn tiers(&self, set: u32, slot: u16) -> u8 {
        let of = |owners: &[u16]| owners.iter().find(|owner| **owner >> 4 == slot).copied();
        let found = match Handle::decode(set) {
            None => of(&inline(set)).filter(|owner| owner & 15 != 0),
            Some(handle) => {
                let list = self.list(handle);
                let absent =
                    handle.class >= BITMAP_CLASS && list[HEADER + usize::from(slot) / 16] & (1 << (slot % 16)) == 0;
                (!absent).then(|| of(owners(handle.class, list))).flatten()
            }
        };
        found.map_or(0, |owner| Owner(owner).tiers())
    }

    /// Every owner.
    pub(crate) fn for_each(&self, set: u32, mut see: impl FnMut(Owner)) {
        match Handle::decode(set) {
            None => inline(set).into_iter().filter(|o| *o != 0).for_each(|o| see(Owner(o))),
            Some(handle) => owners(handle.class, self.list(handle))
                .iter()
                .for_each(|o| see(Owner(*o))),
        }
    }

    /// Keeps of `alive` the owners of the set, and tells `dropped` the others, by slot. Only the first `words` words of
    /// `alive` are in use.
    pub(crate) fn retain(&self, set: u32, alive: &mut Bitmap, words: usize, mut dropped: impl FnMut(u16)) {
        let mut of_list: Bitmap = [0; WORDS];
        let owned: &[u16] = match Handle::decode(set) {
            Some(handle) if handle.class >= BITMAP_CLASS => &self.list(handle)[HEADER..HEADER + WORDS],
            _ => {
                self.for_each(set, |owner| {
                    of_list[usize::from(owner.slot()) / 16] |= 1 << (owner.slot() % 16);
                });
                &of_list
            }
        };
        for (word, (alive, owned)) in alive.iter_mut().zip(owned).take(words).enumerate() {
            let mut gone = *alive & !*owned;
            *alive &= *owned;
            while gone != 0 {
                dropped((word * 16) as u16 + gone.trailing_zeros() as u16);
                gone &= gone - 1;
            }
        }
    }

    fn push(&mut self, handle: Handle, owner: u16) {
        let start = offset(handle.class);
        let list = self.list_mut(handle);
        let count = len(list);
        list[start + count] = owner;
        set_header(list, count + 1, fingerprint(list) ^ mix(owner));
        if handle.class >= BITMAP_CLASS {
            let slot = usize::from(owner >> 4);
            list[HEADER + slot / 16] |= 1 << (slot % 16);
        }
    }

    /// Moves a list to another size.
    fn rehouse(&mut self, from: Handle, class: usize) -> Option<Handle> {
        let to = self.allocate(class)?;
        let (chunk, at) = from.place();
        let moved = std::mem::take(&mut self.classes[from.class].chunks[chunk]);
        for &owner in owners(from.class, &moved[at..at + units(from.class)]) {
            self.push(to, owner);
        }
        self.classes[from.class].chunks[chunk] = moved;
        self.free(from);
        Some(to)
    }

    fn allocate(&mut self, class: usize) -> Option<Handle> {
        let of = self.classes.get_mut(class)?;
        let index = match of.free.pop() {
            Some(index) => index,
            None if of.used == LISTS_MAX => return None,
            None => {
                let per_chunk = CHUNK_UNITS / units(class);
                if (of.used as usize).is_multiple_of(per_chunk) {
                    of.chunks.push(vec![0; CHUNK_UNITS].into());
                }
                of.used += 1;
                of.used - 1
            }
        };
        Some(Handle { class, index })
    }

    fn free(&mut self, handle: Handle) {
        self.list_mut(handle).fill(0);
        self.classes[handle.class].free.push(handle.index);
    }

    fn list(&self, handle: Handle) -> &[u16] {
        let (chunk, at) = handle.place();
        &self.classes[handle.class].chunks[chunk][at..at + units(handle.class)]
    }

    fn list_mut(&mut self, handle: Handle) -> &mut [u16] {
        let (chunk, at) = handle.place();
        &mut self.classes[handle.class].chunks[chunk][at..at + units(handle.class)]
    }
}

fn owners(class: usize, list: &[u16]) -> &[u16] {
    &list[offset(class)..offset(class) + len(list)]
}

fn len(list: &[u16]) -> usize {
    usize::from(list[0])
}

fn fingerprint(list: &[u16]) -> u64 {
    (1..HEADER).fold(0, |print, unit| print << 16 | u64::from(list[unit]))
}

fn set_header(list: &mut [u16], len: usize, print: u64) {
    list[0] = len as u16;
    for unit in 1..HEADER {
        list[unit] = (print >> (16 * (HEADER - 1 - unit))) as u16;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    fn listed(owners: &Owners, set: u32) -> BTreeMap<u16, u8> {
        let mut all = BTreeMap::new();
        owners.for_each(set, |owner| {
            assert!(all.insert(owner.slot(), owner.tiers()).is_none(), "listed twice");
        });
        all
    }

    #[test]
    fn grows_to_every_slot_and_shrinks_to_nothing_without_losing_memory() {
        let mut owners = Owners::default();
        for round in 0..3 {
            let mut set = 0;
            for slot in 0..SLOTS as u16 {
                set = owners.add(set, slot, 1).expect("new").0;
                assert!(owners.add(set, slot, 1).is_none());
            }
            assert_eq!(listed(&owners, set).len(), SLOTS);
            for slot in (0..SLOTS as u16).rev() {
                set = owners.remove(set, slot, 1).expect("there").0;
                assert!(owners.remove(set, slot, 1).is_none());
            }
            assert_eq!(set, 0);
            let bytes = owners.bytes();
            assert!(bytes < 2 << 20, "{bytes} bytes in round {round}");
        }
    }

    proptest! {
        #[test]
        fn behaves_as_a_map_of_slots(ops in prop::collection::vec((0u16..400, 0u8..4, prop::bool::weighted(0.7)), 0..900)) {
            let mut owners = Owners::default();
            let (mut set, mut model) = (0, BTreeMap::new());
            for (slot, tier, add) in ops {
                let bit = 1 << tier;
                let before = model.get(&slot).copied().unwrap_or(0u8);
                let after = if add { before | bit } else { before & !bit };
                let changed = if add { owners.add(set, slot, bit) } else { owners.remove(set, slot, bit) };
                prop_assert_eq!(changed.is_some(), before != after);
                if let Some((new, told)) = changed {
                    prop_assert_eq!(told, before);
                    set = new;
                }
                if after == 0 { model.remove(&slot); } else { model.insert(slot, after); }
                prop_assert_eq!(owners.tiers(set, slot), after);
                prop_assert_eq!(set == 0, model.is_empty());
            }
            prop_assert_eq!(&listed(&owners, set), &model);
            // The same set, built in another order, has the same fingerprint and one owner fewer another.
            let again = model.iter().rev().fold(0, |set, (slot, tiers)| owners.add(set, *slot, *tiers).unwrap().0);
            prop_assert_eq!(owners.fingerprint(set), owners.fingerprint(again));
            if let Some((slot, tiers)) = model.iter().next() {
                let fewer = owners.remove(again, *slot, *tiers).unwrap().0;
                prop_assert_ne!(owners.fingerprint(set), owners.fingerprint(fewer));
            }
            let mut alive: Bitmap = [0xffff; WORDS];
            let mut gone = Vec::new();
            owners.retain(set, &mut alive, WORDS, |slot| gone.push(slot));
            for slot in 0..SLOTS as u16 {
                let kept = alive[usize::from(slot) / 16] & (1 << (slot % 16)) != 0;
                prop_assert_eq!(kept, model.contains_key(&slot));
                prop_assert_eq!(kept, gone.binary_search(&slot).is_err());
            }
        }
    }
}
