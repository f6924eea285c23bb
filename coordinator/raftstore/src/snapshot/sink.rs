//! Takes a snapshot that a leader sends, chunk by chunk, into the staging table.

use super::chunk::Tally;
use super::{SnapshotChunk, SnapshotError, Staged, Staging};
use crate::RaftStoreError;
use raft::eraftpb::{Message, MessageType};

/// Hands a whole snapshot to Raft and waits until it is installed, or not wanted.
pub(crate) type Hand = Box<dyn FnOnce(Message, Staged) -> Result<(), RaftStoreError> + Send>;

/// The receiving end of one stream. Every method blocks on the disk. Dropping it drops what came; the leader sends again.
pub struct SnapshotSink {
    staging: Staging,
    stream: u64,
    message: Option<Message>,
    tally: Tally,
    hand: Option<Hand>,
}

impl SnapshotSink {
    pub(crate) fn begin(staging: &Staging, message: Message, hand: Hand) -> Result<Self, RaftStoreError> {
        if message.get_msg_type() != MessageType::MsgSnapshot || !message.get_snapshot().get_data().is_empty() {
            return Err(SnapshotError::Header("it is another kind of message, or carries data").into());
        }
        let index = message.get_snapshot().get_metadata().index;
        if index == 0 {
            return Err(SnapshotError::Header("its log index is 0").into());
        }
        Ok(Self {
            stream: staging.begin()?,
            staging: staging.clone(),
            message: Some(message),
            tally: Tally::new(index),
            hand: Some(hand),
        })
    }

    /// Takes the next chunk. After an error the stream is over.
    pub fn chunk(&mut self, chunk: &SnapshotChunk) -> Result<(), RaftStoreError> {
        self.tally.check(chunk)?;
        self.staging.write(self.stream, chunk)
    }

    /// Chunks and pairs so far.
    pub fn progress(&self) -> (u64, u64) {
        (self.tally.chunks, self.tally.pairs)
    }

    /// After the last chunk: the snapshot becomes this member's state. Returns when that is durable.
    pub fn finish(mut self) -> Result<(), RaftStoreError> {
        if !self.tally.ended {
            return Err(SnapshotError::Damaged("its end is missing").into());
        }
        let staged = self.staging.complete(self.stream)?;
        match (self.message.take(), self.hand.take()) {
            (Some(message), Some(hand)) => hand(message, staged),
            _ => Err(SnapshotError::Refused.into()),
        }
    }

    /// Whether the last chunk came.
    #[cfg(test)]
    pub(crate) fn whole(&self) -> bool {
        self.tally.ended
    }

    /// The parts that [`finish`](Self::finish) would hand over, for a driver without threads.
    #[cfg(test)]
    pub(crate) fn into_staged(mut self) -> Result<(Message, Staged), RaftStoreError> {
        assert!(self.tally.ended);
        let staged = self.staging.complete(self.stream)?;
        Ok((self.message.take().unwrap(), staged))
    }
}

impl Drop for SnapshotSink {
    fn drop(&mut self) {
        self.staging.give_up(self.stream);
    }
}
