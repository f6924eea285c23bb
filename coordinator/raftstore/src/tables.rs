//! The state machine's tables in the redb file: one version of them to read, or within a transaction to write.

use crate::RaftStoreError;
use crate::database::{STATE, Store};
use baton_state::{Pair, Tables, TablesError, TablesMut, Visit};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTable, Table, WriteTransaction};

/// One consistent version of the state.
pub(crate) struct StateView(ReadOnlyTable<&'static [u8], &'static [u8]>);

/// The state within a transaction.
pub(crate) struct StateTxn<'txn>(Table<'txn, &'static [u8], &'static [u8]>);

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
        Ok(Self(txn.open_table(STATE)?))
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

impl Tables for StateTxn<'_> {
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

impl TablesMut for StateTxn<'_> {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.0.insert(key, value).map_err(medium)?;
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        self.0.remove(key).map_err(medium)?;
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
