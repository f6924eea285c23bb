//! The state machine's tables in the redb file: one version of them to read, or within a transaction to write.

use crate::RaftStoreError;
use crate::database::{STATE, Store};
use baton_state::{Pair, Tables, TablesError, TablesMut, Visit};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, WriteTransaction};
use std::cell::RefCell;
use std::collections::BTreeMap;

/// One consistent version of the state.
pub(crate) struct StateView(ReadOnlyTable<&'static [u8], &'static [u8]>);

/// The state within a transaction. Single values, such as the hash that every command changes, are kept in memory until
/// [`finish`](Self::finish), so that a batch writes each once.
pub(crate) struct StateTxn<'txn> {
    table: RefCell<Table<'txn, &'static [u8], &'static [u8]>>,
    singles: RefCell<BTreeMap<Vec<u8>, Single>>,
}

struct Single {
    value: Option<Vec<u8>>,
    /// The table has another one.
    changed: bool,
}

impl StateView {
    pub(crate) fn open(store: &Store) -> Result<Self, RaftStoreError> {
        Self::of(&store.read()?)
    }

    /// The version that `txn` sees.
    pub(crate) fn of(txn: &ReadTransaction) -> Result<Self, RaftStoreError> {
        Ok(Self(txn.open_table(STATE)?))
    }
}

impl<'txn> StateTxn<'txn> {
    pub(crate) fn open(txn: &'txn WriteTransaction) -> Result<Self, RaftStoreError> {
        Ok(Self {
            table: RefCell::new(txn.open_table(STATE)?),
            singles: RefCell::default(),
        })
    }

    /// Writes what is only in memory yet. To be called before the transaction is committed.
    pub(crate) fn finish(self) -> Result<(), RaftStoreError> {
        Ok(self.flush()?)
    }

    fn flush(&self) -> Result<(), TablesError> {
        let mut table = self.table.borrow_mut();
        for (key, single) in self.singles.borrow_mut().iter_mut() {
            if !std::mem::take(&mut single.changed) {
                continue;
            }
            match &single.value {
                Some(value) => drop(table.insert(key.as_slice(), value.as_slice()).map_err(medium)?),
                None => drop(table.remove(key.as_slice()).map_err(medium)?),
            }
        }
        Ok(())
    }

    /// So that a walk over the table finds everything.
    fn flush_for(&self, from: &[u8], to: &[u8]) -> Result<(), TablesError> {
        if from < SINGLES_END && to > SINGLES {
            self.flush()?;
        }
        Ok(())
    }
}

/// The table of single values, from and (exclusive) to: see `baton_state::keys`.
const SINGLES: &[u8] = &[0x01];
const SINGLES_END: &[u8] = &[0x02];

fn is_single(key: &[u8]) -> bool {
    key.starts_with(SINGLES)
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

impl Tables for StateTxn<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        if !is_single(key) {
            return get(&*self.table.borrow(), key);
        }
        if let Some(single) = self.singles.borrow().get(key) {
            return Ok(single.value.clone());
        }
        let value = get(&*self.table.borrow(), key)?;
        let single = Single {
            value: value.clone(),
            changed: false,
        };
        self.singles.borrow_mut().insert(key.to_vec(), single);
        Ok(value)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        self.flush_for(from, to)?;
        scan(&*self.table.borrow(), from, to, visit)
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        self.flush_for(from, to)?;
        last(&*self.table.borrow(), from, to)
    }
}

impl TablesMut for StateTxn<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        if is_single(key) {
            let single = Single {
                value: Some(value.to_vec()),
                changed: true,
            };
            self.singles.get_mut().insert(key.to_vec(), single);
            return Ok(());
        }
        self.table.get_mut().insert(key, value).map_err(medium)?;
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        if is_single(key) {
            let single = Single {
                value: None,
                changed: true,
            };
            self.singles.get_mut().insert(key.to_vec(), single);
            return Ok(());
        }
        self.table.get_mut().remove(key).map_err(medium)?;
        Ok(())
    }
}

type Bytes = &'static [u8];

fn get(table: &impl ReadableTable<Bytes, Bytes>, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
    let value = table.get(key).map_err(medium)?;
    Ok(value.map(|value| value.value().to_vec()))
}

fn scan(
    table: &impl ReadableTable<Bytes, Bytes>,
    from: &[u8],
    to: &[u8],
    visit: &mut Visit<'_>,
) -> Result<(), TablesError> {
    if from >= to {
        return Ok(());
    }
    for item in table.range(from..to).map_err(medium)? {
        let (key, value) = item.map_err(medium)?;
        if visit(key.value(), value.value())?.is_break() {
            break;
        }
    }
    Ok(())
}

fn last(table: &impl ReadableTable<Bytes, Bytes>, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
    if from >= to {
        return Ok(None);
    }
    let item = table.range(from..to).map_err(medium)?.next_back();
    let Some((key, value)) = item.transpose().map_err(medium)? else {
        return Ok(None);
    };
    Ok(Some((key.value().to_vec(), value.value().to_vec())))
}

fn medium(error: redb::StorageError) -> TablesError {
    // The kind must survive: a full disk has its own sentence.
    match RaftStoreError::from(error) {
        RaftStoreError::DiskFull => TablesError::Full,
        other => TablesError::Medium(other.to_string()),
    }
}
