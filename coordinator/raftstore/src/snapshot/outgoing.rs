//! A snapshot that is to be sent to a member, as the transport gets it.

use super::{SnapshotChunk, SnapshotSource};
use crate::RaftStoreError;
use raft::eraftpb::Message;

/// Tells Raft how the sending went: true if the member has the snapshot.
pub(crate) type Report = Box<dyn FnOnce(bool) + Send>;

/// The sending end of one stream: first the [`message`](Self::message), then every chunk, then wait until the other side's
/// [`finish`](crate::SnapshotSink::finish) is through, then [`delivered`](Self::delivered). Dropped before that it counts as
/// failed, and Raft tries again after a heartbeat.
pub struct OutgoingSnapshot {
    message: Message,
    source: Box<SnapshotSource>,
    report: Option<Report>,
}

impl OutgoingSnapshot {
    pub(crate) fn new(message: Message, source: Box<SnapshotSource>, report: Report) -> Self {
        Self {
            message,
            source,
            report: Some(report),
        }
    }

    /// The member it is for.
    pub fn to(&self) -> u64 {
        self.message.to
    }

    /// Log index of the last command in it.
    pub fn index(&self) -> u64 {
        self.source.index()
    }

    /// Goes first: for [`receive_snapshot`](crate::RaftStore::receive_snapshot) on the other side. Carries no state.
    pub fn message(&self) -> &Message {
        &self.message
    }

    /// The next chunk, of about 1 MiB; `None` after the last one. Blocks on the disk.
    pub fn next_chunk(&mut self) -> Result<Option<SnapshotChunk>, RaftStoreError> {
        self.source.next_chunk()
    }

    /// Makes chunks small.
    #[cfg(test)]
    pub(crate) fn set_chunk_bytes(&mut self, bytes: usize) {
        self.source.chunk_bytes = bytes;
    }

    /// Pairs read so far, and in all: 0 before the first chunk.
    pub fn progress(&self) -> (u64, u64) {
        self.source.progress()
    }

    /// The other side has it all, durably.
    pub fn delivered(mut self) {
        if let Some(report) = self.report.take() {
            report(true);
        }
    }
}

impl Drop for OutgoingSnapshot {
    fn drop(&mut self) {
        if let Some(report) = self.report.take() {
            report(false);
        }
    }
}
