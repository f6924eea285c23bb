//! The keys of one table in a layer.
//!
//! Most tables are kept in order, because applying walks them. Those that it only looks things up in, and which are large (sums and
//! request ids), are hashed, which spares a dozen comparisons of long keys that begin alike; they are put in order when somebody walks them:
//! a report, a snapshot, a flush.

use baton_state::keys;
use std::collections::{BTreeMap, HashMap, btree_map};
use std::ops::Bound;
use std::sync::{Arc, OnceLock};

type Value = Option<Vec<u8>>;

#[derive(Debug, Clone)]
pub(super) enum Map {
    Ordered(BTreeMap<Arc<[u8]>, Value>),
    Hashed(Hashed),
}

#[derive(Debug, Clone, Default)]
pub(super) struct Hashed {
    values: HashMap<Arc<[u8]>, Value>,
    /// Its keys in order, if somebody asked since the last one came.
    order: OnceLock<Vec<Arc<[u8]>>>,
}

impl Map {
    /// For the table that a byte names.
    pub(super) fn of_table(table: usize) -> Self {
        let sums = usize::from(keys::USAGE_HOURS)..=usize::from(keys::USAGE_USER_DAYS);
        if table == usize::from(keys::REQUESTS) || sums.contains(&table) {
            Self::Hashed(Hashed::default())
        } else {
            Self::Ordered(BTreeMap::new())
        }
    }

    /// An empty one with room for as many keys, if it is hashed: moving a map to a larger place hashes all its keys again.
    pub(super) fn emptied(&self) -> Self {
        match self {
            Self::Ordered(_) => Self::Ordered(BTreeMap::new()),
            Self::Hashed(map) => Self::Hashed(Hashed {
                values: HashMap::with_capacity(map.values.len()),
                order: OnceLock::new(),
            }),
        }
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<&Value> {
        match self {
            Self::Ordered(map) => map.get(key),
            Self::Hashed(map) => map.values.get(key),
        }
    }

    pub(super) fn get_mut(&mut self, key: &[u8]) -> Option<&mut Value> {
        match self {
            Self::Ordered(map) => map.get_mut(key),
            Self::Hashed(map) => map.values.get_mut(key),
        }
    }

    /// Adds a key that is not there.
    pub(super) fn insert(&mut self, key: Arc<[u8]>, value: Value) {
        match self {
            Self::Ordered(map) => drop(map.insert(key, value)),
            Self::Hashed(map) => {
                map.order.take();
                map.values.insert(key, value);
            }
        }
    }

    /// `from` must not be beyond `to`.
    pub(super) fn range<'m>(&'m self, from: &[u8], to: &[u8]) -> Range<'m> {
        match self {
            Self::Ordered(map) => Range::Ordered(map.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)))),
            Self::Hashed(map) => {
                let order = map.order.get_or_init(|| {
                    let mut order: Vec<_> = map.values.keys().cloned().collect();
                    order.sort_unstable();
                    order
                });
                let at = |bound: &[u8]| order.partition_point(|key| **key < *bound);
                Range::Hashed(order[at(from)..at(to)].iter(), &map.values)
            }
        }
    }
}

pub(super) enum Range<'m> {
    Ordered(btree_map::Range<'m, Arc<[u8]>, Value>),
    Hashed(std::slice::Iter<'m, Arc<[u8]>>, &'m HashMap<Arc<[u8]>, Value>),
}

type Known<'m> = (&'m [u8], Option<&'m [u8]>);

fn hashed<'m>(key: &'m Arc<[u8]>, values: &'m HashMap<Arc<[u8]>, Value>) -> Known<'m> {
    (key, values.get(key).and_then(Option::as_deref))
}

impl<'m> Iterator for Range<'m> {
    type Item = Known<'m>;

    fn next(&mut self) -> Option<Known<'m>> {
        match self {
            Self::Ordered(range) => range.next().map(|(key, value)| (&**key, value.as_deref())),
            Self::Hashed(order, values) => order.next().map(|key| hashed(key, values)),
        }
    }
}

impl<'m> DoubleEndedIterator for Range<'m> {
    fn next_back(&mut self) -> Option<Known<'m>> {
        match self {
            Self::Ordered(range) => range.next_back().map(|(key, value)| (&**key, value.as_deref())),
            Self::Hashed(order, values) => order.next_back().map(|key| hashed(key, values)),
        }
    }
}
