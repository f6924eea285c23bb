//! One member of the group without clock, thread or network: proposals and messages go in, time is told, answers and
//! messages come out. The only place that drives raft-rs. What came of it is written down in [`Progress`].

mod apply;
mod members;
mod query;

use crate::config::{
    APPLY_BYTES_MAX, COMMAND_BYTES_MAX, INFLIGHT_MESSAGES_MAX, LOG_ENTRIES_HELD_MAX, MESSAGE_BYTES_MAX,
    RaftStoreConfig, UNCOMMITTED_BYTES_MAX,
};
use crate::database::Store;
use crate::log::LogStore;
use crate::membership::Members;
use crate::overlay::flush::Flusher;
use crate::raft_log_drain::logger;
use crate::reads::{ReadId, Reads};
use crate::snapshot::{SnapshotSource, Staged};
use crate::tables::Writer;
use crate::{RaftStoreError, SnapshotError};
use baton_state::{Outcome, Refused};
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{Config, ProgressState, RawNode, SnapshotStatus, StateRole};
use std::collections::HashMap;

/// Names a proposal of this process. Travels as the entry's context, never into the state machine.
pub(crate) type ProposalId = u64;

/// Bytes of commands that go to the leader in one message; with one command on top it stays below [`MESSAGE_BYTES_MAX`].
const PROPOSE_BYTES: usize = MESSAGE_BYTES_MAX as usize / 2;

/// raft-rs' mark on an election that a leader asked for.
const CAMPAIGN_TRANSFER: &[u8] = b"CampaignTransfer";

/// Entries between two flushes, in multiples of what the log keeps anyway: a start applies these again, in well under a second.
/// Tests are to flush often.
const FLUSH_KEEPS: u64 = if cfg!(test) { 2 } else { 8 };

/// Something for another member.
pub(crate) enum Outgoing {
    Message(Message),
    /// A snapshot's message, and the state that goes with it. [`Node::report_snapshot`] must be told how it went.
    Snapshot(Message, Box<SnapshotSource>),
}

/// A command that was applied, as whoever follows the state gets it.
#[derive(Debug)]
pub(crate) struct AppliedEntry {
    pub(crate) index: u64,
    pub(crate) command: Vec<u8>,
    pub(crate) applied: baton_state::Applied,
}

/// What came of driving the node.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Proposals of this process that were applied.
    pub(crate) answers: Vec<(ProposalId, Outcome)>,
    /// Changes of the membership, asked for here, that took effect.
    pub(crate) changed: Vec<ProposalId>,
    /// Proposals of this process that were not taken, and why.
    pub(crate) dropped: Vec<(ProposalId, RaftStoreError)>,
    /// Proposals whose fate is open, because the leader changed.
    pub(crate) orphans: Vec<ProposalId>,
    /// Reads that may be made now.
    pub(crate) reads: Vec<ReadId>,
    /// What followers of the state should see, in order.
    pub(crate) followed: Vec<AppliedEntry>,
    /// A snapshot replaced the whole state.
    pub(crate) replaced: bool,
    /// This member does not belong to the group any more, and must stop once all messages are sent.
    pub(crate) removed: bool,
}

pub(crate) struct Node {
    raw: RawNode<LogStore>,
    writer: Writer,
    flusher: Flusher,
    log_entries_keep: u64,
    tick_ms: u64,
    ticks_max: u64,
    heartbeat_ms: u64,
    /// Time, in the caller's milliseconds, up to which ticks were given.
    ticked_ms: u64,
    now_ms: u64,
    /// Until then this member, which may have forgotten whom it heard, votes for nobody. See `reads`.
    votes_from_ms: u64,
    applied: u64,
    /// Term of the last applied entry.
    applied_term: u64,
    members: Members,
    removed: bool,
    /// Tells this process's proposals from those of an earlier life with the same ids.
    life: u64,
    next_id: ProposalId,
    /// Proposals that raft-rs was not given yet, their ids, and their size.
    queued: Vec<Entry>,
    queued_ids: Vec<ProposalId>,
    queued_bytes: usize,
    /// Proposals that nobody took.
    dropped: Vec<(ProposalId, RaftStoreError)>,
    /// Proposals that are not answered yet, and the term in which each was made.
    open: HashMap<ProposalId, u64>,
    /// The change of the membership that is applied but needs both majorities still.
    changing: Option<ProposalId>,
    reads: Reads,
    /// A whole snapshot that raft-rs was told of.
    staged: Option<Staged>,
    led: bool,
}

impl Node {
    /// `life` must differ between lives of one member (a random number). `now_ms` is the caller's time.
    pub(crate) fn open(store: Store, config: &RaftStoreConfig, life: u64, now_ms: u64) -> Result<Self, RaftStoreError> {
        config.check()?;
        let flusher = Flusher::new(
            store.clone(),
            config.log_entries_keep.max(1).saturating_mul(FLUSH_KEEPS),
        );
        let (log, applied) = LogStore::open(store, config, life)?;
        let members = Members::of(log.conf_state());
        if members != Members::default() && !members.contains(config.node_id) {
            return Err(RaftStoreError::Removed);
        }
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
        let tick_ms = config.tick_ms.max(1);
        let election_ticks = config.election_ticks as u64;
        Ok(Self {
            raw,
            writer: Writer::default(),
            flusher,
            log_entries_keep: config.log_entries_keep.max(1),
            tick_ms,
            ticks_max: 2 * election_ticks,
            heartbeat_ms: config.heartbeat_ticks as u64 * tick_ms,
            ticked_ms: now_ms,
            now_ms,
            votes_from_ms: now_ms.saturating_add(election_ticks * tick_ms),
            applied,
            applied_term: 0,
            members,
            removed: false,
            life,
            next_id: 0,
            queued: Vec::new(),
            queued_ids: Vec::new(),
            queued_bytes: 0,
            dropped: Vec::new(),
            open: HashMap::new(),
            changing: None,
            reads: Reads::new(election_ticks, tick_ms),
            staged: None,
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

    /// Takes a command for the log of the leader, if there is one. It goes there with others in one message, so that they
    /// share an fsync on every member; nothing is durable before [`process`](Self::process), which tells of those that the
    /// leader had no room for.
    pub(crate) fn propose(&mut self, command: Vec<u8>) -> Result<ProposalId, RaftStoreError> {
        if command.is_empty() || command.len() > COMMAND_BYTES_MAX {
            let reason = format!("it has {} bytes; 1 to {COMMAND_BYTES_MAX} are taken", command.len());
            return Err(Refused::Invalid(reason).into());
        }
        let raft = &self.raw.raft;
        // While it hands over, a leader takes nothing more.
        if raft.leader_id == 0 || raft.lead_transferee.is_some() {
            return Err(RaftStoreError::NoLeader);
        }
        let id = self.next_id;
        self.next_id += 1;
        self.queued_bytes += command.len();
        self.queued.push(Entry {
            context: self.context(id).into(),
            data: command.into(),
            ..Entry::default()
        });
        self.queued_ids.push(id);
        self.open.insert(id, self.raw.raft.term);
        if self.queued_bytes >= PROPOSE_BYTES {
            self.propose_queued();
        }
        Ok(id)
    }

    /// Gives raft-rs what was proposed.
    fn propose_queued(&mut self) {
        if self.queued.is_empty() {
            return;
        }
        self.queued_bytes = 0;
        let mut message = Message::default();
        message.set_msg_type(MessageType::MsgPropose);
        message.from = self.raw.raft.id;
        message.set_entries(std::mem::take(&mut self.queued).into());
        let proposed = self.raw.raft.step(message);
        let term = self.raw.raft.term;
        for id in std::mem::take(&mut self.queued_ids) {
            match &proposed {
                // The caller may have gone meanwhile.
                Ok(()) => drop(self.open.get_mut(&id).map(|made_in| *made_in = term)),
                Err(error) => {
                    let limit = self.open.len();
                    self.open.remove(&id);
                    self.dropped.push((id, self.dropped_because(error, limit)));
                }
            }
        }
    }

    fn dropped_because(&self, error: &raft::Error, limit: usize) -> RaftStoreError {
        match error {
            raft::Error::ProposalDropped if self.leads() && self.raw.raft.lead_transferee.is_none() => {
                RaftStoreError::Overloaded { limit }
            }
            raft::Error::ProposalDropped => RaftStoreError::NoLeader,
            error => RaftStoreError::Stopped(error.to_string()),
        }
    }

    fn context(&self, id: u64) -> Vec<u8> {
        [self.life.to_le_bytes(), id.to_le_bytes()].concat()
    }

    /// Takes a peer's message. What raft-rs would trip over, or what only goes through this member's own checks, is dropped.
    pub(crate) fn step(&mut self, message: Message) {
        let dropped = match message.get_msg_type() {
            // Comes with its state, through `step_snapshot`.
            MessageType::MsgSnapshot => true,
            MessageType::MsgPropose => {
                message.get_entries().is_empty()
                    || message.get_entries().iter().any(|entry| {
                        entry.get_entry_type() != EntryType::EntryNormal || entry.data.len() > COMMAND_BYTES_MAX
                    })
            }
            MessageType::MsgReadIndex | MessageType::MsgReadIndexResp => message.get_entries().len() != 1,
            // Only the leader is asked for these, by its own process.
            MessageType::MsgTransferLeader => true,
            MessageType::MsgRequestVote | MessageType::MsgRequestPreVote => {
                self.now_ms < self.votes_from_ms && message.context != CAMPAIGN_TRANSFER
            }
            _ => false,
        };
        if dropped {
            return;
        }
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "a peer's message was not taken");
        }
    }

    /// Takes a snapshot whose state stands in the staging table. The next [`process`](Self::process) installs it.
    pub(crate) fn step_snapshot(&mut self, message: Message, staged: Staged) -> Result<(), SnapshotError> {
        if let Err(error) = self.raw.step(message) {
            tracing::debug!(%error, "a snapshot was not taken");
        }
        if self.raw.snap().is_none() {
            return Err(SnapshotError::Refused);
        }
        self.staged = Some(staged);
        Ok(())
    }

    /// How the sending of a snapshot went. Whatever is said of one that is not under way has no effect.
    pub(crate) fn report_snapshot(&mut self, to: u64, delivered: bool) {
        let status = if delivered {
            SnapshotStatus::Finish
        } else {
            SnapshotStatus::Failure
        };
        self.raw.report_snapshot(to, status);
    }

    /// Messages to this member get lost at the moment.
    pub(crate) fn report_unreachable(&mut self, id: u64) {
        self.raw.report_unreachable(id);
    }

    /// Tells the time. A caller that was asleep for long gets at most two election timeouts' ticks. To be told before
    /// messages are stepped that came in meanwhile: a tick after a heartbeat must be of the time after it.
    pub(crate) fn advance_to(&mut self, now_ms: u64) {
        self.now_ms = self.now_ms.max(now_ms);
        let due = now_ms.saturating_sub(self.ticked_ms) / self.tick_ms;
        self.ticked_ms += due * self.tick_ms;
        for _ in 0..due.min(self.ticks_max) {
            self.raw.raft.set_randomized_election_timeout(self.election_timeout());
            self.raw.tick();
        }
        self.ask_again();
    }

    /// Ticks without a leader before this member wants to be one: between one and two election timeouts, another number in
    /// each life and term. In place of raft-rs' own random number, so that a run can be repeated.
    fn election_timeout(&self) -> usize {
        let raft = &self.raw.raft;
        let mut mixed = self.life ^ raft.id.rotate_left(32) ^ raft.term.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        // The finisher of SplitMix64 (Steele, Lea, Flood, 2014).
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let least = raft.election_timeout();
        least + ((mixed ^ (mixed >> 31)) % least as u64) as usize
    }

    /// Nobody waits for this proposal any more.
    pub(crate) fn forget(&mut self, id: ProposalId) {
        self.open.remove(&id);
    }

    /// Persists, commits and applies whatever is due. What `send` gets must go out in that order, and may go out at once:
    /// a leader's entries are sent before they are on its own disk, what a follower says after. After an error the node must
    /// be dropped: the store decides, on the next start, what happened.
    pub(crate) fn process(&mut self, send: &mut dyn FnMut(Outgoing)) -> Result<Progress, RaftStoreError> {
        self.raw.store().store.check()?;
        self.propose_queued();
        let mut progress = Progress {
            dropped: std::mem::take(&mut self.dropped),
            ..Progress::default()
        };
        // What may tell others of a membership that is not on this disk yet.
        let mut held = Vec::new();
        while !self.removed && self.raw.has_ready() {
            let mut ready = self.raw.ready();
            held.extend(ready.take_messages());
            if !self.changes_unsaved() {
                self.send(std::mem::take(&mut held), send);
            }
            for state in ready.take_read_states() {
                self.read_confirmed(&state.request_ctx, state.index);
            }
            let installed = !ready.snapshot().is_empty();
            if installed {
                self.install(ready.snapshot(), &mut progress)?;
            }
            if planted!(AnswersBeforeFsync) {
                let messages = ready.take_persisted_messages();
                self.send(messages, send);
            }
            if !ready.entries().is_empty() || (ready.must_sync() && ready.hs().is_some()) {
                let entries = ready.take_entries();
                // Whole, and not only if it changed, so that the commit index on the disk is at most one batch old.
                let hard_state = self.raw.raft.hard_state();
                self.raw.mut_store().append(&entries, &hard_state)?;
                #[cfg(test)]
                if planted!(RepliesBeforeCommit) {
                    self.reply_early(&entries, &mut progress)?;
                }
            }
            self.send(ready.take_persisted_messages(), send);
            let mut committed = ready.take_committed_entries();
            let mut light = self.raw.advance_append(ready);
            if installed && !planted!(SnapshotNotToldApplied) {
                // Else raft-rs would look for the entries before it when it campaigns next, and panic.
                self.raw.advance_apply_to(self.applied);
            }
            held.extend(light.take_messages());
            if !self.changes_unsaved() {
                self.send(std::mem::take(&mut held), send);
            }
            committed.extend(light.take_committed_entries());
            self.apply(committed, &mut progress)?;
        }
        self.send(held, send);
        if self.led && !self.leads() {
            progress.orphans.extend(self.open.drain().map(|(id, _)| id));
            self.changing = None;
        }
        self.led = self.leads();
        let readable = if planted!(ReadsBeforeApplied) {
            u64::MAX
        } else {
            self.applied
        };
        progress.reads = self.reads.take(readable);
        progress.removed = self.removed;
        let applied = self.applied;
        let conf_state = self.raw.store().conf_state();
        self.flusher.turn(applied, conf_state)?;
        self.compact()?;
        Ok(progress)
    }

    /// Whether a committed change of the members waits to be applied by this leader. A removed member that hears of it stops
    /// and votes no more; a leader that then forgot it, with its power, would ask for that vote for ever.
    fn changes_unsaved(&self) -> bool {
        let raft = &self.raw.raft;
        let pending = raft.pending_conf_index;
        !planted!(ChangeToldBeforeSaved) && self.leads() && pending > self.applied && raft.raft_log.committed >= pending
    }

    fn send(&mut self, messages: Vec<Message>, send: &mut dyn FnMut(Outgoing)) {
        for message in messages {
            if message.get_msg_type() != MessageType::MsgSnapshot {
                send(Outgoing::Message(message));
            } else if let Some(source) = self.raw.store().take_source(message.to) {
                send(Outgoing::Snapshot(message, Box::new(source)));
            }
        }
    }

    /// Deletes applied and flushed entries in batches of a quarter of what is kept. Members that are connected keep what they lack, so
    /// that one which receives a snapshot finds the log where the snapshot ends.
    fn compact(&mut self) -> Result<(), RaftStoreError> {
        let keep = self.log_entries_keep;
        let applied = if planted!(CompactsBeyondApplied) {
            self.raw.raft.raft_log.committed.max(self.applied) + keep + 1
        } else {
            self.applied
        };
        let mut to = applied.saturating_sub(keep);
        if self.leads() {
            for (_, member) in self.raw.raft.prs().iter() {
                if member.state == ProgressState::Snapshot {
                    to = to.min(member.pending_snapshot);
                } else if member.recent_active {
                    to = to.min(member.matched);
                }
            }
            to = to.max(self.applied.saturating_sub(keep.max(LOG_ENTRIES_HELD_MAX)));
        }
        let log = self.raw.mut_store();
        let mut flushed = log.store.overlay().flushed();
        for planted in [planted!(CompactsUnflushed), planted!(CompactsBeyondApplied)] {
            flushed = if planted { u64::MAX } else { flushed };
        }
        to = to.min(flushed);
        if (to + 1).saturating_sub(log.first_index_kept()) > keep / 4 {
            log.compact(to)?;
        }
        Ok(())
    }

    /// Lets flushes be written by threads of their own.
    pub(crate) fn flush_by_threads(&mut self) {
        self.flusher.use_threads();
    }

    /// Writes everything that was applied into the state's file: a start then need not apply it again.
    pub(crate) fn flush(&mut self) -> Result<(), RaftStoreError> {
        let conf_state = self.raw.store().conf_state();
        self.flusher.flush(conf_state)
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

    /// Log index up to which this member knows that entries are committed.
    #[cfg(test)]
    pub(crate) fn committed(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    pub(crate) fn first_index(&self) -> u64 {
        self.raw.store().first_index_kept()
    }
}

fn stopped(error: raft::Error) -> RaftStoreError {
    RaftStoreError::from_raft(error)
}
