//! Settings of a member of the Raft group. No file format here: the coordinator's configuration fills this in.

use crate::RaftStoreError;
use std::collections::BTreeSet;

/// How a member of the group behaves. [`RaftStoreConfig::single`] is a group of one.
#[derive(Debug, Clone)]
pub struct RaftStoreConfig {
    /// This member's id; not 0, and for ever the same for one data directory.
    pub node_id: u64,
    /// The founders, 1, 3 or 5, of a group that starts from nothing; none for a member that joins a group. Ignored once the
    /// store exists: then the log decides.
    pub voters: Vec<u64>,
    /// Applied log entries kept for members that lag; older ones are deleted. A member further behind gets a snapshot.
    /// While a member is connected and catches up, up to [`LOG_ENTRIES_HELD_MAX`] are kept for it.
    pub log_entries_keep: u64,
    /// Length of a Raft tick in milliseconds.
    pub tick_ms: u64,
    /// Ticks without a leader before an election. At least twice `heartbeat_ticks`.
    pub election_ticks: usize,
    /// Ticks between a leader's heartbeats.
    pub heartbeat_ticks: usize,
    /// Longest wait for a proposal's answer in milliseconds.
    pub propose_timeout_ms: u64,
}

impl RaftStoreConfig {
    /// A group of one, whose only member is 1.
    pub fn single() -> Self {
        Self::member(1, vec![1])
    }

    /// A member that joins a group which has added it as a learner. It gets everything from the leader.
    pub fn join(node_id: u64) -> Self {
        Self::member(node_id, Vec::new())
    }

    /// A member of a group, with the defaults: ticks of 100 ms, elections after 1 to 2 s without a leader.
    pub fn member(node_id: u64, voters: Vec<u64>) -> Self {
        Self {
            node_id,
            voters,
            log_entries_keep: 4096,
            tick_ms: 100,
            election_ticks: 10,
            heartbeat_ticks: 2,
            propose_timeout_ms: 5000,
        }
    }

    pub(crate) fn check(&self) -> Result<(), RaftStoreError> {
        let refuse = |reason: &str| Err(RaftStoreError::Config(reason.into()));
        if self.node_id == 0 || self.voters.contains(&0) {
            return refuse("node ids must not be 0");
        }
        let founders: BTreeSet<_> = self.voters.iter().collect();
        if !matches!(self.voters.len(), 0 | 1 | 3 | 5) || founders.len() != self.voters.len() {
            return refuse("a group has 1, 3 or 5 founders, each named once");
        }
        Ok(())
    }
}

/// Applied log entries kept for a connected member that lags or receives a snapshot. Beyond it the member starts over with
/// a newer snapshot, rather than filling the leader's disk: at a few hundred bytes each, this is some hundred MB.
pub const LOG_ENTRIES_HELD_MAX: u64 = 1 << 20;
/// Reads that wait for a confirmation by a majority; each stands for all that were asked for in one batch.
pub(crate) const READS_MAX: usize = 64;

/// Largest command in bytes. A registration or a usage record is a few hundred; names are the only free-length part.
pub(crate) const COMMAND_BYTES_MAX: usize = 64 << 10;
/// Largest append message between members, in bytes: keeps a heartbeat from waiting long behind one.
pub(crate) const MESSAGE_BYTES_MAX: u64 = 1 << 20;
/// Append messages under way to one member.
pub(crate) const INFLIGHT_MESSAGES_MAX: usize = 64;
/// Bytes of proposals logged and not yet committed; beyond it proposals are refused as overload.
pub(crate) const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of entries applied in one transaction: bounds its memory and the wait of a reader.
pub(crate) const APPLY_BYTES_MAX: u64 = 8 << 20;
