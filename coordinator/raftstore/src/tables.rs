//! The state machine's tables in the redb file: one version of them to read, or within a transaction to write.
//!
//! Within a transaction, what many commands of a batch read and write (single values, sums by time, budgets) is kept in
//! memory: see [`hot`]. So a batch reads and writes each once. Whoever looks at the tables through [`StateTxn`] cannot tell.

use crate::RaftStoreError;
use crate::database::{STATE, Store};
use baton_state::{Pair, Tables, TablesError, TablesMut, Visit, keys};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, ReadableTableMetadata, Table, WriteTransaction};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

type Bytes = &'static [u8];

/// Which of [`STATE`] a key is in.
pub(crate) fn segment(key: &[u8]) -> usize {
    match key.first() {
        Some(&keys::ROWS) => 1,
        Some(&keys::REQUESTS) => 2,
        _ => 0,
    }
}

/// The order of keys over the segments: segment, from, and (exclusive) to; an empty end is none.
const PIECES: [(usize, &[u8], &[u8]); 4] = [
    (0, &[], &[keys::ROWS]),
    (1, &[keys::ROWS], &[keys::REQUESTS]),
    (2, &[keys::REQUESTS], &[keys::REQUESTS + 1]),
    (0, &[keys::REQUESTS + 1], &[]),
];

/// The parts of a range that lie in one segment each.
fn pieces<'k>(from: &'k [u8], to: &'k [u8]) -> impl DoubleEndedIterator<Item = (usize, &'k [u8], &'k [u8])> {
    PIECES.into_iter().filter_map(move |(segment, first, end)| {
        let from = from.max(first);
        let to = if end.is_empty() { to } else { to.min(end) };
        (from < to).then_some((segment, from, to))
    })
}

/// One consistent version of the state.
pub(crate) struct StateView([ReadOnlyTable<Bytes, Bytes>; 3]);

impl StateView {
    pub(crate) fn open(store: &Store) -> Result<Self, RaftStoreError> {
        Self::of(&store.read()?)
    }

    /// The version that `txn` sees.
    pub(crate) fn of(txn: &ReadTransaction) -> Result<Self, RaftStoreError> {
        let [state, rows, requests] = STATE;
        Ok(Self([
            txn.open_table(state)?,
            txn.open_table(rows)?,
            txn.open_table(requests)?,
        ]))
    }

    /// Keys in it.
    pub(crate) fn len(&self) -> Result<u64, RaftStoreError> {
        let mut total = 0;
        for table in &self.0 {
            total += table.len()?;
        }
        Ok(total)
    }
}

impl Tables for StateView {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        get(&self.0, key)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        scan(&self.0, from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        last(&self.0, from, to)
    }
}

/// The state within a transaction. [`finish`](Self::finish) it before that is committed.
pub(crate) struct StateTxn<'txn> {
    tables: RefCell<[Table<'txn, Bytes, Bytes>; 3]>,
    cache: RefCell<BTreeMap<Vec<u8>, Cached>>,
    /// The first key of tables that were asked for what is due in them: every command asks, and hardly ever is anything.
    firsts: RefCell<BTreeMap<u8, Option<Vec<u8>>>>,
}

struct Cached {
    value: Option<Vec<u8>>,
    /// The file has another one.
    changed: bool,
}

/// Whether a key is one of few that many commands of a batch use.
fn hot(key: &[u8]) -> bool {
    match key.first() {
        Some(&(keys::PRICES | keys::BUDGETS | keys::WINDOWS | keys::SLICES)) => true,
        Some(&table) => table == keys::HASH[0] || (keys::USAGE_MINUTES..=keys::USAGE_USER_DAYS).contains(&table),
        None => false,
    }
}

impl<'txn> StateTxn<'txn> {
    pub(crate) fn open(txn: &'txn WriteTransaction) -> Result<Self, RaftStoreError> {
        let [state, rows, requests] = STATE;
        Ok(Self {
            tables: RefCell::new([txn.open_table(state)?, txn.open_table(rows)?, txn.open_table(requests)?]),
            cache: RefCell::default(),
            firsts: RefCell::default(),
        })
    }

    /// Writes what is only in memory yet. To be called before the transaction is committed.
    pub(crate) fn finish(self) -> Result<(), RaftStoreError> {
        Ok(self.flush(Bound::Unbounded, Bound::Unbounded)?)
    }

    fn flush(&self, from: Bound<&[u8]>, to: Bound<&[u8]>) -> Result<(), TablesError> {
        for (key, cached) in self.cache.borrow_mut().range_mut::<[u8], _>((from, to)) {
            if !std::mem::take(&mut cached.changed) {
                continue;
            }
            let table = &mut self.tables.borrow_mut()[segment(key)];
            match &cached.value {
                Some(value) => drop(table.insert(key.as_slice(), value.as_slice()).map_err(medium)?),
                None => drop(table.remove(key.as_slice()).map_err(medium)?),
            }
        }
        Ok(())
    }

    /// So that a walk over the file finds everything.
    fn flush_between(&self, from: &[u8], to: &[u8]) -> Result<(), TablesError> {
        if from < to {
            self.flush(Bound::Included(from), Bound::Excluded(to))?;
        }
        Ok(())
    }

    /// Whether nothing of a table, from its start, is below `to`. Known without looking, once looked.
    fn nothing_below(&self, table: u8, to: &[u8]) -> Result<bool, TablesError> {
        if let Some(first) = self.firsts.borrow().get(&table) {
            return Ok(first.as_ref().is_none_or(|first| first.as_slice() >= to));
        }
        let (from, end) = keys::whole(table);
        self.flush_between(&from, &end)?;
        let mut first = None;
        scan(&self.tables.borrow(), &from, &end, &mut |key, _| {
            first = Some(key.to_vec());
            Ok(ControlFlow::Break(()))
        })?;
        let nothing = first.as_ref().is_none_or(|first| first.as_slice() >= to);
        self.firsts.borrow_mut().insert(table, first);
        Ok(nothing)
    }

    fn set(&mut self, key: &[u8], value: Option<&[u8]>) -> Result<(), TablesError> {
        let (table, firsts) = (key.first().copied().unwrap_or_default(), self.firsts.get_mut());
        if value.is_none() {
            firsts.remove(&table);
        } else if let Some(first) = firsts.get_mut(&table)
            && first.as_ref().is_none_or(|first| key < first.as_slice())
        {
            *first = Some(key.to_vec());
        }
        if hot(key) {
            let (value, changed) = (value.map(<[u8]>::to_vec), true);
            match self.cache.get_mut().get_mut(key) {
                Some(cached) => *cached = Cached { value, changed },
                None => drop(self.cache.get_mut().insert(key.to_vec(), Cached { value, changed })),
            }
            return Ok(());
        }
        let table = &mut self.tables.get_mut()[segment(key)];
        match value {
            Some(value) => drop(table.insert(key, value).map_err(medium)?),
            None => drop(table.remove(key).map_err(medium)?),
        }
        Ok(())
    }
}

impl Tables for StateTxn<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        if !hot(key) {
            return get(&self.tables.borrow(), key);
        }
        if let Some(cached) = self.cache.borrow().get(key) {
            return Ok(cached.value.clone());
        }
        let value = get(&self.tables.borrow(), key)?;
        let cached = Cached {
            value: value.clone(),
            changed: false,
        };
        self.cache.borrow_mut().insert(key.to_vec(), cached);
        Ok(value)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        if let &[table] = from
            && to <= keys::whole(table).1.as_slice()
            && self.nothing_below(table, to)?
        {
            return Ok(());
        }
        self.flush_between(from, to)?;
        scan(&self.tables.borrow(), from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.flush_between(from, to)?;
        last(&self.tables.borrow(), from, to)
    }
}

impl TablesMut for StateTxn<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.set(key, Some(value))
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        self.set(key, None)
    }
}

fn get<T: ReadableTable<Bytes, Bytes>>(tables: &[T; 3], key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
    let value = tables[segment(key)].get(key).map_err(medium)?;
    Ok(value.map(|value| value.value().to_vec()))
}

fn scan<T: ReadableTable<Bytes, Bytes>>(
    tables: &[T; 3],
    from: &[u8],
    to: &[u8],
    visit: &mut Visit<'_>,
) -> Result<(), TablesError> {
    for (segment, from, to) in pieces(from, to) {
        for item in tables[segment].range(from..to).map_err(medium)? {
            let (key, value) = item.map_err(medium)?;
            if visit(key.value(), value.value())?.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

fn last<T: ReadableTable<Bytes, Bytes>>(tables: &[T; 3], from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
    for (segment, from, to) in pieces(from, to).rev() {
        let item = tables[segment].range(from..to).map_err(medium)?.next_back();
        if let Some((key, value)) = item.transpose().map_err(medium)? {
            return Ok(Some((key.value().to_vec(), value.value().to_vec())));
        }
    }
    Ok(None)
}

fn medium(error: redb::StorageError) -> TablesError {
    // The kind must survive: a full disk has its own sentence.
    match RaftStoreError::from(error) {
        RaftStoreError::DiskFull => TablesError::Full,
        other => TablesError::Medium(other.to_string()),
    }
}
