//! The state as an ordered map of bytes, so that the machine runs on a file, in memory, or on a faulty disk in a
//! simulation, and so that a snapshot is a walk over it. Keys are made in [`keys`](crate::keys).

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};

/// Why the tables could not be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TablesError {
    /// The medium failed.
    #[error("{0}")]
    Medium(String),
    /// The medium has no space left.
    #[error("no space is left")]
    Full,
    /// What was read is not what was written: the medium, or a bug.
    #[error("the state is damaged: {0}")]
    Corrupt(String),
}

/// A key and its value.
pub type Pair = (Vec<u8>, Vec<u8>);

/// Sees a key and its value, and says whether to go on.
pub type Visit<'v> = dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, TablesError> + 'v;

/// One consistent version of the state.
pub trait Tables {
    /// The value at `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError>;

    /// Visits the pairs with `from <= key < to` in order, until `visit` breaks.
    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError>;

    /// The last pair with `from <= key < to`.
    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError>;
}

/// The state within a transaction that writes it.
pub trait TablesMut: Tables {
    /// Sets the value at `key`.
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError>;

    /// Takes `key` away; nothing happens if it is not there.
    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError>;
}

/// Tables in memory, for tests and models.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MemoryTables(pub BTreeMap<Vec<u8>, Vec<u8>>);

impl Tables for MemoryTables {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, TablesError> {
        Ok(self.0.get(key).cloned())
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut Visit<'_>) -> Result<(), TablesError> {
        if from >= to {
            return Ok(());
        }
        for (key, value) in self.0.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to))) {
            if visit(key, value)?.is_break() {
                break;
            }
        }
        Ok(())
    }

    fn last(&self, from: &[u8], to: &[u8]) -> Result<Option<Pair>, TablesError> {
        if from >= to {
            return Ok(None);
        }
        let mut range = self.0.range::<[u8], _>((Bound::Included(from), Bound::Excluded(to)));
        Ok(range.next_back().map(|(key, value)| (key.clone(), value.clone())))
    }
}

impl TablesMut for MemoryTables {
    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), TablesError> {
        self.0.insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn delete(&mut self, key: &[u8]) -> Result<(), TablesError> {
        self.0.remove(key);
        Ok(())
    }
}
