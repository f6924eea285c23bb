//! One layer: keys that were set or deleted. A layer that somebody reads is never changed.

use super::map::Map;

/// Maps of a layer: one for each table of the state, by the first byte of its keys, since comparing within a small map is
/// cheaper than within a large one. The last is for all from there on.
const MAPS: usize = 32;
/// About what a key takes besides its bytes and its value's: two vectors and its place in the map.
const KEY_OVERHEAD_BYTES: usize = 64;

#[derive(Debug, Clone)]
pub(crate) struct Layer {
    maps: [Map; MAPS],
    keys: usize,
    bytes: usize,
}

impl Default for Layer {
    fn default() -> Self {
        Self {
            maps: std::array::from_fn(Map::of_table),
            keys: 0,
            bytes: 0,
        }
    }
}

fn place(key: &[u8]) -> usize {
    usize::from(key.first().copied().unwrap_or_default()).min(MAPS - 1)
}

impl Layer {
    /// An empty one that is to become as large as this one.
    pub(crate) fn emptied(&self) -> Self {
        Self {
            maps: std::array::from_fn(|at| self.maps[at].emptied()),
            keys: 0,
            bytes: 0,
        }
    }

    /// Keys in it, deleted ones too.
    pub(crate) fn keys(&self) -> usize {
        self.keys
    }

    /// About what it takes in memory.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The value, or `Some(None)` if the key was deleted; `None` if this layer knows nothing of it.
    pub(crate) fn get(&self, key: &[u8]) -> Option<Option<&[u8]>> {
        self.maps[place(key)].get(key).map(Option::as_deref)
    }

    pub(crate) fn set(&mut self, key: &[u8], value: Option<&[u8]>) {
        let map = &mut self.maps[place(key)];
        let bytes = value.map_or(0, <[u8]>::len);
        if let Some(known) = map.get_mut(key) {
            self.bytes = self.bytes - known.as_ref().map_or(0, Vec::len) + bytes;
            match (known, value) {
                (Some(known), Some(value)) => {
                    known.clear();
                    known.extend_from_slice(value);
                }
                (known, value) => *known = value.map(<[u8]>::to_vec),
            }
        } else {
            map.insert(key.into(), value.map(<[u8]>::to_vec));
            self.keys += 1;
            self.bytes += key.len() + bytes + KEY_OVERHEAD_BYTES;
        }
    }

    /// Puts a newer layer on top of this one.
    pub(crate) fn absorb(&mut self, newer: &Self) {
        for (key, value) in newer.all() {
            if planted!(OlderLayerWins) && self.get(key).is_some() {
                continue;
            }
            self.set(key, value);
        }
    }

    /// What is known of the keys with `from <= key < to`, in order.
    pub(crate) fn range<'l>(
        &'l self,
        from: &'l [u8],
        to: &'l [u8],
    ) -> impl DoubleEndedIterator<Item = (&'l [u8], Option<&'l [u8]>)> {
        // A range that ends before it begins is empty, not a panic.
        let to = to.max(from);
        self.maps[place(from)..=place(to)]
            .iter()
            .flat_map(move |map| map.range(from, to))
    }

    /// Everything that is known, in order.
    pub(crate) fn all(&self) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.range(&[], END)
    }
}

/// Beyond every key: tables are numbered far below it.
const END: &[u8] = &[0xff; 2];

/// Layers as one, in the order of keys or against it: of each key only what the newest layer knows.
pub(crate) struct Merged<I: Iterator> {
    /// The newest first.
    sources: Vec<std::iter::Peekable<I>>,
    backwards: bool,
}

impl<'l, I: Iterator<Item = (&'l [u8], Option<&'l [u8]>)>> Merged<I> {
    /// `sources`, the newest first, each in the order that `backwards` says.
    pub(crate) fn of(sources: impl Iterator<Item = I>, backwards: bool) -> Self {
        Self {
            sources: sources.map(Iterator::peekable).collect(),
            backwards,
        }
    }
}

impl<'l, I: Iterator<Item = (&'l [u8], Option<&'l [u8]>)>> Iterator for Merged<I> {
    type Item = (&'l [u8], Option<&'l [u8]>);

    fn next(&mut self) -> Option<Self::Item> {
        if let [only] = self.sources.as_mut_slice() {
            return only.next();
        }
        let mut first: Option<&'l [u8]> = None;
        for source in &mut self.sources {
            if let Some((key, _)) = source.peek()
                && first.is_none_or(|first| if self.backwards { *key > first } else { *key < first })
            {
                first = Some(key);
            }
        }
        let first = first?;
        let mut newest = None;
        for source in &mut self.sources {
            if let Some(item) = source.next_if(|(key, _)| *key == first) {
                newest.get_or_insert(item);
            }
        }
        newest
    }
}
