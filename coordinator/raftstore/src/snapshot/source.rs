//! Reads the state of one version of the file, chunk by chunk.

use super::SnapshotChunk;
use super::chunk::{CHUNK_BYTES, SnapshotPair, Tally};
use crate::RaftStoreError;
use crate::database::{META, STATE, Store, meta, number};
use redb::{ReadOnlyTable, ReadTransaction, ReadableTableMetadata};
use std::ops::Bound;

/// One version of the state. While it lives, the file keeps that version's pages, so it should not live for long.
pub(crate) struct SnapshotSource {
    table: ReadOnlyTable<&'static [u8], &'static [u8]>,
    index: u64,
    pairs_total: u64,
    /// From how many bytes on a chunk is full.
    pub(crate) chunk_bytes: usize,
    tally: Tally,
}

impl SnapshotSource {
    /// Of the newest version.
    pub(crate) fn open(store: &Store) -> Result<Self, RaftStoreError> {
        Self::of(store, &store.read()?)
    }

    /// Of the version that `txn` sees.
    pub(crate) fn of(store: &Store, txn: &ReadTransaction) -> Result<Self, RaftStoreError> {
        let applied = txn.open_table(META)?.get(meta::APPLIED)?;
        let applied = applied.and_then(|value| number(value.value()));
        let mut index = applied.ok_or_else(|| store.corrupt("`applied` is not a number"))?;
        if planted!(AppliesTwiceAfterSnapshot) {
            index -= 1;
        }
        let table = txn.open_table(STATE)?;
        let pairs_total = table.len()?;
        Ok(Self {
            table,
            index,
            pairs_total,
            chunk_bytes: CHUNK_BYTES,
            tally: Tally::new(index),
        })
    }

    /// Log index of the last command in it.
    pub(crate) fn index(&self) -> u64 {
        self.index
    }

    /// Pairs read so far, and in all.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.tally.pairs, self.pairs_total)
    }

    /// The next chunk; `None` after the last one.
    pub(crate) fn next_chunk(&mut self) -> Result<Option<SnapshotChunk>, RaftStoreError> {
        if self.tally.ended {
            return Ok(None);
        }
        let from = self.tally.last_key().map_or(Bound::Unbounded, Bound::Excluded);
        let mut range = self.table.range::<&[u8]>((from, Bound::Unbounded))?;
        let mut pairs = Vec::new();
        let mut bytes = 0;
        let mut last = true;
        while let Some(item) = range.next() {
            let (key, value) = item?;
            bytes += key.value().len() + value.value().len();
            pairs.push(SnapshotPair {
                key: key.value().to_vec(),
                value: value.value().to_vec(),
            });
            if bytes >= self.chunk_bytes {
                last = range.next().transpose()?.is_none();
                break;
            }
        }
        drop(range);
        Ok(Some(self.tally.seal(pairs, last)))
    }
}
