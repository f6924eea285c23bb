//! A hash table from 64-bit block names to 32-bit values, for tens of millions of entries behind a lock that nobody may
//! hold for long.
//!
//! Names are hashes already, so the key is its own hash. The table is cut into [`PARTS`] parts by the key's top bits;
//! each part is open-addressed with linear probing and grows by itself, so the longest pause is that of one part, not of
//! the table. Deletion shifts entries back instead of leaving tombstones: a cache that turns over for weeks stays as
//! fast as a fresh one.
//!
//! Memory: 12 bytes an entry at loads from 0.53 to 0.8, so 15 to 23 bytes.
//!
//! Not here: what the values mean ([`crate::owners`]).

/// Parts of the table. With 50 million entries a part has some 12,000 and is rebuilt in about 0.1 ms.
pub(crate) const PARTS: usize = 4096;
const PART_BITS: u32 = PARTS.trailing_zeros();
/// Smallest part with anything in it.
const CAPACITY_MIN: usize = 8;

/// Three words, so that an entry has no padding and mostly lies in one cache line.
#[derive(Clone, Copy)]
struct Entry {
    low: u32,
    high: u32,
    /// 0: the entry is empty.
    value: u32,
}

const EMPTY: Entry = Entry {
    low: 0,
    high: 0,
    value: 0,
};

impl Entry {
    fn key(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }
}

#[derive(Default)]
struct Part {
    entries: Box<[Entry]>,
    len: usize,
}

/// See the module.
pub(crate) struct Table {
    parts: Vec<Part>,
    len: usize,
}

impl Table {
    pub(crate) fn new() -> Self {
        Self {
            parts: (0..PARTS).map(|_| Part::default()).collect(),
            len: 0,
        }
    }

    /// Entries.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes allocated.
    pub(crate) fn bytes(&self) -> usize {
        let entries: usize = self.parts.iter().map(|part| part.entries.len()).sum();
        entries * size_of::<Entry>() + self.parts.len() * size_of::<Part>()
    }

    /// The value of `key`, 0 if there is none.
    pub(crate) fn get(&self, key: u64) -> u32 {
        let part = &self.parts[part_of(key)];
        match part.find(key) {
            Some((at, true)) => part.entries[at].value,
            _ => 0,
        }
    }

    /// Replaces the value of `key`, 0 where there is none, by what `change` makes of it; 0 takes the entry out.
    pub(crate) fn change(&mut self, key: u64, change: impl FnOnce(u32) -> u32) {
        let part = &mut self.parts[part_of(key)];
        match part.find(key) {
            Some((at, true)) => match change(part.entries[at].value) {
                0 => {
                    part.take_out(at);
                    self.len -= 1;
                }
                value => part.entries[at].value = value,
            },
            free => {
                let value = change(0);
                if value != 0 {
                    part.put_in(free.map(|(at, _)| at), key, value);
                    self.len += 1;
                }
            }
        }
    }

    /// Puts every value of one part through `change`; 0 takes the entry out.
    pub(crate) fn change_part(&mut self, part: usize, mut change: impl FnMut(u32) -> u32) {
        let part = &mut self.parts[part];
        let before = part.len;
        let mut at = 0;
        while at < part.entries.len() {
            let old = part.entries[at].value;
            if old != 0 {
                match change(old) {
                    // What was shifted to this place is looked at next. An entry that is shifted from the beginning to
                    // the end is looked at twice, which is harmless: `change` of a changed value changes nothing.
                    0 => {
                        part.take_out(at);
                        continue;
                    }
                    value => part.entries[at].value = value,
                }
            }
            at += 1;
        }
        self.len -= before - part.len;
        if part.len * 4 < part.entries.len() {
            part.resize();
        }
    }
}

fn part_of(key: u64) -> usize {
    (key >> (64 - PART_BITS)) as usize
}

impl Part {
    /// Where a key would like to be: its bits below the part's, scaled to the capacity.
    fn home(&self, key: u64) -> usize {
        ((u128::from(key << PART_BITS) * self.entries.len() as u128) >> 64) as usize
    }

    /// Where `key` is (true), or where it would be put (false). `None` in a part without room.
    fn find(&self, key: u64) -> Option<(usize, bool)> {
        if self.entries.is_empty() {
            return None;
        }
        let mut at = self.home(key);
        loop {
            let entry = self.entries[at];
            if entry.value == 0 {
                return Some((at, false));
            }
            if entry.key() == key {
                return Some((at, true));
            }
            at = self.next(at);
        }
    }

    fn next(&self, at: usize) -> usize {
        if at + 1 == self.entries.len() { 0 } else { at + 1 }
    }

    /// How far `to` lies behind `from`, going round.
    fn distance(&self, from: usize, to: usize) -> usize {
        if to >= from {
            to - from
        } else {
            to + self.entries.len() - from
        }
    }

    fn put_in(&mut self, free: Option<usize>, key: u64, value: u32) {
        // At least one entry stays empty, or a search would not end.
        let full = (self.len + 1) * 5 > self.entries.len() * 4;
        let at = match free {
            Some(at) if !full => at,
            _ => {
                self.resize();
                match self.find(key) {
                    Some((at, _)) => at,
                    None => return,
                }
            }
        };
        self.entries[at] = Entry {
            low: key as u32,
            high: (key >> 32) as u32,
            value,
        };
        self.len += 1;
    }

    fn take_out(&mut self, at: usize) {
        let (mut hole, mut at) = (at, at);
        loop {
            at = self.next(at);
            let entry = self.entries[at];
            if entry.value == 0 {
                break;
            }
            // It may move to the hole unless that lies before its home.
            if self.distance(self.home(entry.key()), at) >= self.distance(hole, at) {
                self.entries[hole] = entry;
                hole = at;
            }
        }
        self.entries[hole] = EMPTY;
        self.len -= 1;
    }

    /// Moves to a capacity that suits the present length: one and a half times what is full.
    fn resize(&mut self) {
        let capacity = match self.len {
            0 => CAPACITY_MIN,
            len => (len + len / 2 + len / 3).max(CAPACITY_MIN),
        };
        let old = std::mem::replace(&mut self.entries, vec![EMPTY; capacity].into());
        for entry in old.into_iter().filter(|entry| entry.value != 0) {
            if let Some((at, _)) = self.find(entry.key()) {
                self.entries[at] = entry;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    proptest! {
        /// The table is a map, whatever happens to it, also where keys crowd around the same home or wrap around.
        #[test]
        fn behaves_as_a_map(ops in prop::collection::vec((0u64..80, 0u32..4, any::<bool>()), 0..400)) {
            let mut table = Table::new();
            let mut model: HashMap<u64, u32> = HashMap::new();
            for (key, value, crowded) in ops {
                // Crowded keys share one part, and most share a home at its very end.
                let key = if crowded { 0x0001_ffff_ffff_ff00 | key } else { key.wrapping_mul(0x9e37_79b9_7f4a_7c15) };
                let before = model.get(&key).copied().unwrap_or(0);
                table.change(key, |old| { assert_eq!(old, before); value });
                if value == 0 { model.remove(&key); } else { model.insert(key, value); }
                prop_assert_eq!(table.len(), model.len());
            }
            for (key, value) in &model {
                prop_assert_eq!(table.get(*key), *value);
            }
            // A sweep that takes the threes out and leaves the others.
            for part in 0..PARTS {
                table.change_part(part, |value| if value == 3 { 0 } else { value });
            }
            model.retain(|_, value| *value != 3);
            prop_assert_eq!(table.len(), model.len());
            for key in (0..80).flat_map(|k: u64| [0x0001_ffff_ffff_ff00 | k, k.wrapping_mul(0x9e37_79b9_7f4a_7c15)]) {
                prop_assert_eq!(table.get(key), model.get(&key).copied().unwrap_or(0));
            }
        }
    }

    #[test]
    fn memory_follows_what_is_in_it() {
        let mut table = Table::new();
        let key = |i: u64| i.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (0..400_000).for_each(|i| table.change(key(i), |_| 1));
        let full = table.bytes();
        assert!(full < 400_000 * 24 + PARTS * 64, "{full}");
        (0..PARTS).for_each(|part| table.change_part(part, |_| 0));
        assert!(table.len() == 0 && table.bytes() < PARTS * 160, "{}", table.bytes());
    }
}
