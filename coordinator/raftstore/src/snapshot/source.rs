//! Reads the state of one moment, chunk by chunk.

use super::SnapshotChunk;
use super::chunk::{CHUNK_BYTES, SnapshotPair, Tally};
use crate::RaftStoreError;
use crate::database::Store;
use crate::tables::StateView;
use baton_state::Tables as _;
use std::ops::ControlFlow;

/// Beyond every key: tables are numbered below it.
const END: &[u8] = &[0xff];

/// One moment of the state. While it lives, the file keeps that version's pages, and memory the layers over it, so it should not live
/// for long.
pub(crate) struct SnapshotSource {
    state: StateView,
    index: u64,
    term: u64,
    pairs_total: u64,
    /// From how many bytes on a chunk is full.
    pub(crate) chunk_bytes: usize,
    tally: Tally,
}

impl SnapshotSource {
    /// As of the last batch.
    pub(crate) fn open(store: &Store) -> Result<Self, RaftStoreError> {
        let state = StateView::open(store)?;
        let (mut index, term) = state.applied();
        if planted!(AppliesTwiceAfterSnapshot) {
            index -= 1;
        }
        Ok(Self {
            state,
            index,
            term,
            pairs_total: 0,
            chunk_bytes: CHUNK_BYTES,
            tally: Tally::new(index),
        })
    }

    /// The planted bug: reads on in the newest version.
    #[cfg(test)]
    pub(super) fn look_again(&mut self, store: &Store) -> Result<(), RaftStoreError> {
        self.state = StateView::open(store)?;
        Ok(())
    }

    /// What it reads.
    pub(crate) fn state(&self) -> &StateView {
        &self.state
    }

    /// Term of the last command in it.
    pub(crate) fn term(&self) -> u64 {
        self.term
    }

    /// Log index of the last command in it.
    pub(crate) fn index(&self) -> u64 {
        self.index
    }

    /// Pairs read so far, and in all: 0 before the first chunk.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.tally.pairs, self.pairs_total)
    }

    /// The next chunk; `None` after the last one.
    pub(crate) fn next_chunk(&mut self) -> Result<Option<SnapshotChunk>, RaftStoreError> {
        if self.tally.ended {
            return Ok(None);
        }
        if self.tally.chunks == 0 {
            self.pairs_total = self.state.len()?;
        }
        // The first key after another is that with a zero byte more.
        let from = self
            .tally
            .last_key()
            .map_or_else(Vec::new, |last| [last, &[0]].concat());
        let (mut pairs, mut bytes, mut last) = (Vec::new(), 0, true);
        self.state.scan(&from, END, &mut |key, value| {
            if bytes >= self.chunk_bytes {
                last = false;
                return Ok(ControlFlow::Break(()));
            }
            bytes += key.len() + value.len();
            pairs.push(SnapshotPair {
                key: key.to_vec(),
                value: value.to_vec(),
            });
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Some(self.tally.seal(pairs, last)))
    }
}
