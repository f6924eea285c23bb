//! The table in which a snapshot is gathered before it becomes the state, and whose turn it is to write there.
//!
//! ```text
//!             begin              all chunks checked            installed, or not wanted
//!   Free ───────────▶ Receiving ─────────────────────▶ Staged ─────────────────────────▶ Free
//!                      │    ▲
//!                      └────┘ begin: a newer stream takes over, the older one's chunks are refused
//! ```

use super::{SnapshotChunk, SnapshotError};
use crate::RaftStoreError;
use crate::database::{STAGING, STATE, StateTable, Store};
use crate::tables::segment;
use redb::{TableHandle as _, WriteTransaction};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Chunks between two fsyncs. Pages that were freed without one cannot be used again, so this bounds the file's growth.
pub(super) const CHUNKS_PER_SYNC: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Free,
    Receiving(u64),
    Staged(u64),
}

/// The staging table of one member. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Staging {
    store: Store,
    /// Also held while the table is written.
    turn: Arc<Mutex<(Turn, u64)>>,
}

/// Proof that a whole, checked snapshot stands in the table. Dropping it gives the table free.
pub(crate) struct Staged {
    staging: Staging,
    stream: u64,
}

impl Staging {
    /// Drops what an earlier life left in the table.
    pub(crate) fn open(store: Store) -> Result<Self, RaftStoreError> {
        let left = {
            let txn = store.read_state()?;
            txn.list_tables()?
                .any(|table| STAGING.iter().any(|staging| staging.name() == table.name()))
        };
        if left {
            let txn = store.write_state_derived()?;
            for table in STAGING {
                txn.delete_table(table)?;
            }
            txn.commit()?;
        }
        Ok(Self {
            store,
            turn: Arc::new(Mutex::new((Turn::Free, 0))),
        })
    }

    fn turn(&self) -> MutexGuard<'_, (Turn, u64)> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Empties the table for a new stream and returns its number.
    pub(super) fn begin(&self) -> Result<u64, RaftStoreError> {
        self.store.noted(self.try_begin())
    }

    fn try_begin(&self) -> Result<u64, RaftStoreError> {
        let mut turn = self.turn();
        if let Turn::Staged(_) = turn.0 {
            return Err(SnapshotError::Busy.into());
        }
        let txn = self.store.write_state_derived()?;
        for table in STAGING {
            if !planted!(StagingNotEmptied) {
                txn.delete_table(table)?;
            }
            txn.open_table(table)?;
        }
        txn.commit()?;
        turn.1 += 1;
        turn.0 = Turn::Receiving(turn.1);
        Ok(turn.1)
    }

    pub(super) fn write(&self, stream: u64, chunk: &SnapshotChunk) -> Result<(), RaftStoreError> {
        self.store.noted(self.try_write(stream, chunk))
    }

    fn try_write(&self, stream: u64, chunk: &SnapshotChunk) -> Result<(), RaftStoreError> {
        let turn = self.turn();
        if turn.0 != Turn::Receiving(stream) {
            return Err(SnapshotError::Superseded.into());
        }
        let txn = if chunk.number.is_multiple_of(CHUNKS_PER_SYNC) {
            self.store.write_state_durable()?
        } else {
            self.store.write_state_derived()?
        };
        write_pairs(&txn, STAGING, chunk)?;
        Ok(txn.commit()?)
    }

    pub(super) fn complete(&self, stream: u64) -> Result<Staged, RaftStoreError> {
        let mut turn = self.turn();
        if turn.0 != Turn::Receiving(stream) {
            return Err(SnapshotError::Superseded.into());
        }
        turn.0 = Turn::Staged(stream);
        Ok(Staged {
            staging: self.clone(),
            stream,
        })
    }

    /// A stream that ended early.
    pub(super) fn give_up(&self, stream: u64) {
        let mut turn = self.turn();
        if turn.0 == Turn::Receiving(stream) {
            turn.0 = Turn::Free;
        }
    }
}

/// Writes a chunk's pairs into the tables of the state, or of what is to become it.
pub(super) fn write_pairs(
    txn: &WriteTransaction,
    into: [StateTable; 3],
    chunk: &SnapshotChunk,
) -> Result<(), RaftStoreError> {
    let mut pairs = chunk.pairs.as_slice();
    while let Some(first) = pairs.first() {
        let at = segment(&first.key);
        let (run, rest) = pairs.split_at(pairs.iter().take_while(|pair| segment(&pair.key) == at).count());
        let mut table = txn.open_table(into[at])?;
        for pair in run {
            table.insert(pair.key.as_slice(), pair.value.as_slice())?;
        }
        pairs = rest;
    }
    Ok(())
}

impl Staged {
    /// Makes the table the state, within `txn`.
    pub(crate) fn switch(&self, txn: &WriteTransaction) -> Result<(), RaftStoreError> {
        for (staging, state) in STAGING.into_iter().zip(STATE) {
            txn.delete_table(state)?;
            txn.rename_table(staging, state)?;
        }
        Ok(())
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let mut turn = self.staging.turn();
        if turn.0 == Turn::Staged(self.stream) {
            turn.0 = Turn::Free;
        }
    }
}
