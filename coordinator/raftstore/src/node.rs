//! One member of the group without clock, thread or network: proposals and messages go in, time is told, answers and
//! messages come out. The only place that drives raft-rs.

use crate::RaftStoreError;
use crate::config::{
    APPLY_BYTES_MAX, COMMAND_BYTES_MAX, INFLIGHT_MESSAGES_MAX, MESSAGE_BYTES_MAX, RaftStoreConfig,
    UNCOMMITTED_BYTES_MAX,
};
use crate::database::{Store, meta};
use crate::log::{LogStore, put};
use crate::raft_log_drain::logger;
use crate::tables::StateTxn;
use baton_state::{Outcome, Refused};
use protobuf::Message as _;
use raft::eraftpb::{ConfChange, ConfChangeV2, Entry, EntryType, Message};
use raft::{Config, RawNode, StateRole};
use std::collections::HashSet;

/// Names a proposal of this process. Travels as the entry's context, never into the state machine.
pub(crate) type ProposalId = u64;

/// What came of driving the node.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// To be sent to peers, in order.
    pub(crate) messages: Vec<Message>,
    /// Proposals of this process that were applied.
    pub(crate) answers: Vec<(ProposalId, Outcome)>,
    /// Proposals whose fate is open, because this member stopped leading.
    pub(crate) orphans: Vec<ProposalId>,
}

pub(crate) struct Node {
    raw: RawNode<LogStore>,
    log_entries_keep: u64,
    tick_ms: u64,
    ticks_max: u64,
    /// Time, in the caller's milliseconds, up to which ticks were given.
    ticked_ms: u64,
    applied: u64,
    /// Tells this process's proposals from those of an earlier life with the same ids.
    life: u64,
    next_id: ProposalId,
    open: HashSet<ProposalId>,
    led: bool,
}

impl Node {
    /// `life` must differ between lives of one member (a random number).
    pub(crate) fn open(store: Store, config: &RaftStoreConfig, life: u64) -> Result<Self, RaftStoreError> {
        let (log, applied) = LogStore::open(store, config)?;
        let raft_config = Config {
            id: config.node_id,
            election_tick: config.election_ticks,
            heartbeat_tick: config.heartbeat_ticks,
            applied,
            max_size_per_msg: MESSAGE_BYTES_MAX,
            max_inflight_msgs: INFLIGHT_MESSAGES_MAX,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: APPLY_BYTES_MAX,
            check_quorum: true,
            pre_vote: true,
            ..Config::default()
        };
        raft_config
            .validate()
            .map_err(|error| RaftStoreError::Config(error.to_string()))?;
        let raw = RawNode::new(&raft_config, log, &logger()).map_err(stopped)?;
        Ok(Self {
            raw,
            log_entries_keep: config.log_entries_keep.max(1),
            tick_ms: config.tick_ms.max(1),
            ticks_max: 2 * config.election_ticks as u64,
            ticked_ms: 0,
            applied,
            life,
            next_id: 0,
            open: HashSet::new(),
            led: false,
        })
    }

    /// A group of one need not wait for an election timeout.
    pub(crate) fn campaign_if_alone(&mut self) -> Result<(), RaftStoreError> {
        let voters = self.raw.raft.prs().conf().voters().ids();
        if voters.len() == 1 && voters.contains(self.raw.raft.id) {
            self.raw.campaign().map_err(stopped)?;
        }
        Ok(())
    }

    /// Takes a command into the log of the leader, if there is one. Nothing is durable before [`process`](Self::process).
    pub(crate) fn propose(&mut self, command: Vec<u8>) -> Result<ProposalId, RaftStoreError> {
        if command.is_empty() || command.len() > COMMAND_BYTES_MAX {
            let reason = format!("it has {} bytes; 1 to {COMMAND_BYTES_MAX} are taken", command.len());
            return Err(Refused::Invalid(reason).into());
        }
        let id = self.next_id;
        let context = [self.life.to_le_bytes(), id.to_le_bytes()].concat();
        match self.raw.propose(context, command) {
            Ok(()) => {
                self.next_id += 1;
                self.open.insert(id);
                Ok(id)
            }
            Err(raft::Error::ProposalDropped) if self.leads() => {
                Err(RaftStoreError::Overloaded { limit: self.open.len() })
            }
            Err(raft::Error::ProposalDropped) => Err(RaftStoreError::NoLeader),
            Err(error) => Err(stopped(error)),
        }
    }

    /// Takes a peer's message.
    pub(crate) fn step(&mut self, message: Message) {
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "a peer's message was not taken");
        }
    }

    /// Tells the time. A caller that was asleep for long gets at most two election timeouts' ticks.
    pub(crate) fn advance_to(&mut self, now_ms: u64) {
        let due = now_ms.saturating_sub(self.ticked_ms) / self.tick_ms;
        self.ticked_ms += due * self.tick_ms;
        for _ in 0..due.min(self.ticks_max) {
            self.raw.tick();
        }
    }

    /// Nobody waits for this proposal any more.
    pub(crate) fn forget(&mut self, id: ProposalId) {
        self.open.remove(&id);
    }

    /// Persists, commits and applies whatever is due. After an error the node must be dropped: the store decides, on
    /// the next start, what happened.
    pub(crate) fn process(&mut self) -> Result<Progress, RaftStoreError> {
        let mut progress = Progress::default();
        while self.raw.has_ready() {
            let mut ready = self.raw.ready();
            progress.messages.extend(ready.take_messages());
            let hard_state = ready.hs().cloned();
            if !ready.snapshot().is_empty() {
                // Whole, and not only if it changed: the snapshot must not end up beyond the commit index.
                let state = self.raw.raft.hard_state();
                let snapshot = ready.snapshot().clone();
                self.raw.mut_store().install(&snapshot, &state)?;
                self.applied = snapshot.get_metadata().index;
            }
            if !ready.entries().is_empty() || (ready.must_sync() && hard_state.is_some()) {
                let entries = ready.take_entries();
                self.raw.mut_store().append(&entries, hard_state.as_ref())?;
            }
            progress.messages.extend(ready.take_persisted_messages());
            let mut committed = ready.take_committed_entries();
            let mut light = self.raw.advance_append(ready);
            progress.messages.extend(light.take_messages());
            committed.extend(light.take_committed_entries());
            self.apply(committed, &mut progress)?;
        }
        if self.led && !self.leads() {
            progress.orphans.extend(self.open.drain());
        }
        self.led = self.leads();
        self.compact()?;
        Ok(progress)
    }

    fn apply(&mut self, committed: Vec<Entry>, progress: &mut Progress) -> Result<(), RaftStoreError> {
        let Some(last) = committed.last().map(|entry| entry.index) else {
            return Ok(());
        };
        let hard_state = self.raw.raft.hard_state();
        let store = self.raw.store().store.clone();
        let txn = store.write_derived()?;
        let mut tables = StateTxn::open(&txn)?;
        let mut changes = Vec::new();
        let mut answers = Vec::new();
        for entry in committed {
            // An election leaves an empty entry.
            match entry.get_entry_type() {
                _ if entry.data.is_empty() => {}
                EntryType::EntryNormal => {
                    let outcome = baton_state::apply(&mut tables, entry.index, &entry.data)?;
                    if let Some(id) = self.own_proposal(&entry) {
                        answers.push((id, outcome));
                    }
                }
                EntryType::EntryConfChange | EntryType::EntryConfChangeV2 => changes.push(entry),
            }
        }
        drop(tables);
        put(&txn, meta::APPLIED, &last.to_le_bytes())?;
        self.raw.store().put_hard_state(&txn, &hard_state)?;
        txn.commit()?;
        self.raw.mut_store().committed(hard_state);
        for entry in changes {
            self.change_members(&entry)?;
        }
        self.applied = last;
        self.raw.advance_apply_to(last);
        for (id, outcome) in answers {
            if self.open.remove(&id) {
                progress.answers.push((id, outcome));
            }
        }
        Ok(())
    }

    fn own_proposal(&self, entry: &Entry) -> Option<ProposalId> {
        let (life, id) = entry.context.split_at_checked(8)?;
        (life == self.life.to_le_bytes()).then(|| crate::database::number(id))?
    }

    fn change_members(&mut self, entry: &Entry) -> Result<(), RaftStoreError> {
        let undecodable = |error| RaftStoreError::Stopped(format!("a membership change cannot be read: {error}"));
        let conf_state = if entry.get_entry_type() == EntryType::EntryConfChange {
            let change = ConfChange::parse_from_bytes(&entry.data).map_err(undecodable)?;
            self.raw.apply_conf_change(&change)
        } else {
            let change = ConfChangeV2::parse_from_bytes(&entry.data).map_err(undecodable)?;
            self.raw.apply_conf_change(&change)
        };
        self.raw.mut_store().set_conf_state(conf_state.map_err(stopped)?)
    }

    /// Deletes applied entries in batches of a quarter of what is kept.
    fn compact(&mut self) -> Result<(), RaftStoreError> {
        let keep = self.log_entries_keep;
        let applied = self.applied;
        let log = self.raw.mut_store();
        if applied.saturating_sub(log.first_index_kept()) > keep + keep / 4 {
            log.compact(applied - keep)?;
        }
        Ok(())
    }

    pub(crate) fn leads(&self) -> bool {
        self.raw.raft.state == StateRole::Leader
    }

    /// The leader's id, 0 if unknown.
    pub(crate) fn leader_id(&self) -> u64 {
        self.raw.raft.leader_id
    }

    pub(crate) fn term(&self) -> u64 {
        self.raw.raft.term
    }

    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }

    pub(crate) fn first_index(&self) -> u64 {
        self.raw.store().first_index_kept()
    }
}

fn stopped(error: raft::Error) -> RaftStoreError {
    RaftStoreError::Stopped(error.to_string())
}
