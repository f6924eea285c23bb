//! One member: the real runner and store, on a simulated disk, with what it promised to others.

use super::disk::Disk;
use super::power::{Point, Power};
use crate::database::{LOG, META, Store, meta};
use crate::runner::{Board, Input, Runner};
use crate::snapshot::{OutgoingSnapshot, Staging};
use crate::{Peers, RaftStoreConfig, RaftStoreError};
use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState, Message, MessageType};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{broadcast, watch};

pub(super) enum Sent {
    Message(Message),
    Snapshot(OutgoingSnapshot),
}

/// What a member has said that it has on its disk.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Promise {
    /// Highest term it said anything in.
    pub(super) term: u64,
    /// Whom it voted for in that term.
    pub(super) vote: u64,
    /// Log index that it said to have in that term.
    pub(super) index: u64,
    /// Greatest commit index that it told as a leader, in whatever term.
    pub(super) commit: u64,
}

pub(super) struct Life {
    pub(super) runner: Runner,
    pub(super) store: Store,
    pub(super) staging: Staging,
    pub(super) board: Board,
    pub(super) outbox: Arc<Mutex<Vec<Sent>>>,
    pub(super) started_ms: u64,
}

pub(super) struct Member {
    pub(super) config: RaftStoreConfig,
    pub(super) disk: Disk,
    pub(super) power: Power,
    pub(super) life: Option<Life>,
    pub(super) lives: u64,
    pub(super) inbox: Vec<Input>,
    pub(super) turn_at: Option<u64>,
    /// Stopped by SIGSTOP, or by its host, until then.
    pub(super) paused_until_ms: u64,
    /// Its clock's speed, in thousandths.
    pub(super) clock: u64,
    pub(super) promise: Promise,
    /// Left the group.
    pub(super) removed: bool,
    /// Its disk broke its word, and the member noticed: it is not started again.
    pub(super) gone: bool,
    /// Its disk broke its word.
    pub(super) betrayed: bool,
    /// Applied index at the last look.
    pub(super) looked_at: u64,
}

struct Wire {
    outbox: Arc<Mutex<Vec<Sent>>>,
    power: Power,
}

impl Peers for Wire {
    fn send(&mut self, message: Message) {
        if self.power.point(Point::Send) {
            self.outbox.lock().unwrap().push(Sent::Message(message));
        }
    }

    fn send_snapshot(&mut self, mut snapshot: OutgoingSnapshot) {
        if self.power.point(Point::Send) {
            snapshot.set_chunk_bytes(600);
            self.outbox.lock().unwrap().push(Sent::Snapshot(snapshot));
        }
    }
}

impl Member {
    pub(super) fn new(config: RaftStoreConfig, clock: u64) -> Self {
        let power = Power::default();
        Self {
            config,
            disk: Disk::with(Default::default(), power.clone()),
            power,
            life: None,
            lives: 0,
            inbox: Vec::new(),
            turn_at: None,
            paused_until_ms: 0,
            clock,
            promise: Promise::default(),
            removed: false,
            gone: false,
            betrayed: false,
            looked_at: 0,
        }
    }

    pub(super) fn up(&self) -> bool {
        self.life.is_some()
    }

    /// Starts a life on the disk as it is.
    pub(super) fn open(&mut self, life: u64, now_ms: u64) -> Result<(), RaftStoreError> {
        let opened = crate::runner::contained(|| {
            let store = Store::on(self.disk.clone())?;
            let (node, staging) = crate::store::open_member(&store, &self.config, life)?;
            Ok((store, node, staging))
        });
        let (store, node, staging) = opened?;
        let outbox = Arc::new(Mutex::new(Vec::new()));
        let wire = Wire {
            outbox: outbox.clone(),
            power: self.power.clone(),
        };
        let board = Board {
            status: watch::Sender::default(),
            members: Arc::default(),
            followers: broadcast::Sender::new(1),
            failure: Arc::default(),
        };
        let runner = Runner::new(node, Box::new(wire), board.clone(), self.config.tick_ms);
        self.lives += 1;
        self.inbox.clear();
        self.life = Some(Life {
            runner,
            store,
            staging,
            board,
            outbox,
            started_ms: now_ms,
        });
        Ok(())
    }

    /// The time since it started, by its own clock.
    pub(super) fn own_time(&self, now_ms: u64) -> Duration {
        let started = self.life.as_ref().map_or(now_ms, |life| life.started_ms);
        Duration::from_millis((now_ms - started) * self.clock / 1000)
    }

    /// Notes what a message promises.
    pub(super) fn note_promise(&mut self, message: &Message) {
        if matches!(
            message.get_msg_type(),
            MessageType::MsgAppend | MessageType::MsgHeartbeat
        ) {
            self.promise.commit = self.promise.commit.max(message.commit);
        }
        let vote = match message.get_msg_type() {
            MessageType::MsgRequestVoteResponse if !message.reject => message.to,
            MessageType::MsgAppendResponse => 0,
            _ => return,
        };
        let promise = &mut self.promise;
        if message.term > promise.term {
            *promise = Promise {
                term: message.term,
                commit: promise.commit,
                ..Promise::default()
            };
        }
        if message.term < promise.term {
            return;
        }
        if vote != 0 {
            promise.vote = vote;
        } else if !message.reject {
            promise.index = promise.index.max(message.index);
        }
    }

    /// Whether its disk holds what it promised; says what is missing. `change` is the last change of the members that it told
    /// as committed, 0 if none.
    pub(super) fn broken_promise(&self, change: u64) -> Result<Option<String>, RaftStoreError> {
        let Some(life) = &self.life else { return Ok(None) };
        let (hard_state, last) = read_log_end(&life.store)?;
        if let Some(broken) = broken_log(&life.store)? {
            return Ok(Some(broken));
        }
        let knows = hard_state.commit.max(life.runner.node.applied());
        if knows < change {
            return Ok(Some(format!(
                "it told that the change of the members at {change} is committed, and knows of {knows}"
            )));
        }
        let Promise { term, vote, index, .. } = self.promise;
        if hard_state.term < term {
            return Ok(Some(format!(
                "it spoke in term {term} and remembers {}",
                hard_state.term
            )));
        }
        if hard_state.term > term {
            return Ok(None);
        }
        if vote != 0 && hard_state.vote != vote {
            return Ok(Some(format!(
                "it voted for {vote} in term {term} and remembers {}",
                hard_state.vote
            )));
        }
        if last < index {
            return Ok(Some(format!(
                "it said it had entry {index} in term {term}, and its log ends at {last}"
            )));
        }
        Ok(None)
    }
}

/// Hard state, and the index of the last entry.
pub(super) fn read_log_end(store: &Store) -> Result<(HardState, u64), RaftStoreError> {
    let txn = store.read()?;
    let table = txn.open_table(META)?;
    let hard_state = table.get(meta::HARD_STATE)?.map(|value| value.value().to_vec());
    let hard_state = HardState::parse_from_bytes(&hard_state.unwrap_or_default()).unwrap_or_default();
    let truncated = table.get(meta::TRUNCATED)?.map(|value| value.value().to_vec());
    let truncated = truncated
        .and_then(|value| crate::database::number(&value[..8]))
        .unwrap_or(0);
    let last = txn.open_table(LOG)?.range::<u64>(..)?.next_back();
    let last = last.transpose()?.map_or(truncated, |(key, _)| key.value());
    Ok((hard_state, last))
}

/// A log has no gaps, and its terms never fall.
fn broken_log(store: &Store) -> Result<Option<String>, RaftStoreError> {
    let txn = store.read()?;
    let mut before = None;
    for item in txn.open_table(LOG)?.range::<u64>(..)? {
        let (key, value) = item?;
        let entry = Entry::parse_from_bytes(value.value()).unwrap_or_default();
        let now = (key.value(), entry.term);
        if let Some((index, term)) = before
            && (now.0 != index + 1 || now.1 < term)
        {
            return Ok(Some(format!(
                "entry {index} of term {term} is followed by {} of {}",
                now.0, now.1
            )));
        }
        before = Some(now);
    }
    Ok(None)
}

/// The entry at an index in a store's log, or that it is deleted because it is in the state.
pub(super) fn holds_entry(store: &Store, index: u64) -> Result<bool, RaftStoreError> {
    let txn = store.read()?;
    let truncated = txn
        .open_table(META)?
        .get(meta::TRUNCATED)?
        .map(|value| value.value().to_vec());
    let truncated = truncated
        .and_then(|value| crate::database::number(&value[..8]))
        .unwrap_or(0);
    Ok(index <= truncated || txn.open_table(LOG)?.get(index)?.is_some())
}
