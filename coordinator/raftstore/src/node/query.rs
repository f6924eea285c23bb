//! Reads that see everything answered before: see [`reads`](crate::reads).

use super::Node;
use crate::RaftStoreError;
use crate::config::READS_MAX;
use crate::database::number;
use crate::reads::ReadId;

/// Heartbeat intervals after which a read that was not confirmed is asked for again.
const ASK_AGAIN_HEARTBEATS: u64 = 2;

impl Node {
    /// Asks for a read; it is in [`Progress::reads`](super::Progress::reads) once it may be made. With `lease` it need not
    /// ask a majority, if this member leads and a majority has confirmed it a moment ago by `now_ms`.
    pub(crate) fn read(&mut self, lease: bool, now_ms: u64) -> Result<ReadId, RaftStoreError> {
        let raft = &self.raw.raft;
        if raft.leader_id == 0 {
            return Err(RaftStoreError::NoLeader);
        }
        let term = raft.term;
        if (lease && self.in_lease(now_ms)) || (planted!(OldLeaderAnswersReads) && self.leads()) {
            let index = raft.raft_log.committed;
            return Ok(self.reads.add(self.now_ms, term, Some(index)));
        }
        if self.reads.len() >= READS_MAX {
            return Err(RaftStoreError::Overloaded { limit: READS_MAX });
        }
        let id = self.reads.add(self.now_ms, term, None);
        self.raw.read_index(self.context(id));
        Ok(id)
    }

    /// Whether this member leads, and by `now_ms` no other can.
    pub(crate) fn in_lease(&self, now_ms: u64) -> bool {
        let raft = &self.raw.raft;
        self.leads() && self.reads.in_lease(now_ms, raft.term) && raft.commit_to_current_term()
    }

    /// Nobody waits for this read any more.
    pub(crate) fn forget_read(&mut self, id: ReadId) {
        self.reads.forget(id);
    }

    pub(super) fn read_confirmed(&mut self, context: &[u8], index: u64) {
        let Some((life, id)) = context.split_at_checked(8) else {
            return;
        };
        if life == self.life.to_le_bytes()
            && let Some(id) = number(id)
        {
            let (leads, term) = (self.leads(), self.raw.raft.term);
            self.reads.confirmed(id, index, leads, term);
        }
    }

    /// Reads whose question or answer may be lost are asked for again.
    pub(super) fn ask_again(&mut self) {
        if self.raw.raft.leader_id == 0 {
            return;
        }
        for id in self.reads.due(self.now_ms, ASK_AGAIN_HEARTBEATS * self.heartbeat_ms) {
            self.raw.read_index(self.context(id));
        }
    }
}
