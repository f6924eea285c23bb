//! Raft's view of the store: log entries, hard state and configuration, as raft-rs' `Storage` wants them, and the
//! writes of them. Small values are kept in memory; the files are the truth after a restart.
//!
//! At a start, with the state's file as of index A and the log from T (deleted) to L (last), committed to C:
//!
//! - T ≤ A ≤ L, and the log has A's entry or ends its deleted part with it: C becomes max(C, A), and what lies between A and C is
//!   applied again. The commit index is written with entries, not with what is applied, and so may be older than A.
//! - Otherwise, if the state is a snapshot that was just installed (`INSTALLED` is A): the log is made to begin after it. An
//!   installation writes the state first, because the log may hold entries that count for a majority until the state has them.
//! - Anything else is damage, or a lost fsync.

use crate::RaftStoreError;
use crate::config::RaftStoreConfig;
use crate::database::{FORMAT, LOG, META, Store, meta, number, pair, pair_bytes};
use crate::founding::{self, Founding};
use crate::snapshot::{SnapshotSource, Staged};
use protobuf::Message as _;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use redb::{ReadOnlyTable, WriteTransaction};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};

/// Bytes of the newest entries that are kept in memory: what is committed was appended a moment ago, and is applied and sent
/// from here instead of being read and decoded again.
const RECENT_BYTES_MAX: usize = 16 << 20;

pub(crate) struct LogStore {
    pub(crate) store: Store,
    hard_state: HardState,
    conf_state: ConfState,
    /// Index and term of the last deleted entry.
    truncated: (u64, u64),
    /// Index and term of the last entry.
    last: (u64, u64),
    /// The newest entries, without gaps up to `last`, and their size.
    recent: VecDeque<Entry>,
    recent_bytes: usize,
    /// Snapshots that raft-rs asked for and whose messages were not taken yet, by the member they are for.
    sources: RefCell<BTreeMap<u64, SnapshotSource>>,
}

impl LogStore {
    /// Reads what is there, or founds the group that `config` describes, in which case `store_id` must be a new one. Returns the
    /// applied index too.
    pub(crate) fn open(store: Store, config: &RaftStoreConfig, store_id: u64) -> Result<(Self, u64), RaftStoreError> {
        founding::found(&store, &Founding::of(config), store_id)?;
        let txn = store.read()?;
        let values = Values {
            store: &store,
            table: txn.open_table(META)?,
        };
        let format = values.number(meta::FORMAT)?;
        if format != FORMAT {
            return Err(RaftStoreError::Format {
                path: store.path().into(),
                found: format,
                expected: FORMAT,
            });
        }
        let node_id = values.number(meta::NODE_ID)?;
        if node_id != config.node_id {
            return Err(RaftStoreError::OtherMember {
                path: store.path().into(),
                found: node_id,
                expected: config.node_id,
            });
        }
        let state_values = Values {
            store: &store,
            table: store.read_state()?.open_table(META)?,
        };
        let ours = (values.number(meta::STORE_ID)?, FORMAT);
        if (state_values.number(meta::STORE_ID)?, state_values.number(meta::FORMAT)?) != ours {
            return Err(store.corrupt("the state's file beside it belongs to another store"));
        }
        let mut hard_state = HardState::parse_from_bytes(&values.bytes(meta::HARD_STATE)?)
            .map_err(|error| store.corrupt(format!("hard state: {error}")))?;
        let conf_state = ConfState::parse_from_bytes(&state_values.bytes(meta::CONF_STATE)?)
            .map_err(|error| store.corrupt(format!("configuration: {error}")))?;
        let mut truncated = values.pair(meta::TRUNCATED)?;
        let applied = state_values.pair(meta::APPLIED)?;
        let log = txn.open_table(LOG)?;
        let mut last = match log.range::<u64>(..)?.next_back() {
            None => truncated,
            Some(entry) => {
                let entry = decode(&store, entry?.1.value())?;
                (entry.index, entry.term)
            }
        };
        let fits = applied == truncated
            || match log.get(applied.0)? {
                Some(entry) => decode(&store, entry.value())?.term == applied.1,
                None => false,
            };
        if !fits {
            if state_values.optional_number(meta::INSTALLED)? != Some(applied.0) {
                return Err(store.corrupt(format!(
                    "a log from {} to {} does not fit a state at {}",
                    truncated.0, last.0, applied.0
                )));
            }
            if applied.1 > hard_state.term {
                hard_state.term = applied.1;
                hard_state.vote = 0;
            }
            hard_state.commit = applied.0;
            begin_after(&store, applied, &hard_state)?;
            (truncated, last) = (applied, applied);
        }
        hard_state.commit = hard_state.commit.max(applied.0);
        // raft-rs would panic on these; only damage or a lost fsync can bring them about.
        let ordered = truncated.0 <= applied.0 && hard_state.commit <= last.0;
        if !ordered {
            return Err(store.corrupt(format!(
                "log from {} to {}, committed to {}, applied to {} do not fit together",
                truncated.0, last.0, hard_state.commit, applied.0
            )));
        }
        store.overlay().start(applied);
        drop((log, values, state_values));
        let log = Self {
            store,
            hard_state,
            conf_state,
            truncated,
            last,
            recent: VecDeque::new(),
            recent_bytes: 0,
            sources: RefCell::default(),
        };
        Ok((log, applied.0))
    }

    pub(crate) fn first_index_kept(&self) -> u64 {
        self.truncated.0 + 1
    }

    /// Writes entries and hard state with one fsync. Entries replace any of the same or a higher index.
    pub(crate) fn append(&mut self, entries: &[Entry], hard_state: &HardState) -> Result<(), RaftStoreError> {
        let txn = if planted!(AppendsWithoutFsync) {
            self.store.write_derived()?
        } else {
            self.store.write_durable()?
        };
        if let Some(first) = entries.first() {
            let mut log = txn.open_table(LOG)?;
            if first.index <= self.last.0 && !planted!(KeepsOldTail) {
                log.retain_in(first.index.., |_, _| false)?;
            }
            for entry in entries {
                log.insert(entry.index, encode(entry)?.as_slice())?;
            }
        }
        let mut saved = hard_state.clone();
        if planted!(VoteNotSaved) {
            saved.vote = self.hard_state.vote;
        }
        put_hard_state(&txn, &saved)?;
        txn.commit()?;
        self.remember(entries);
        self.hard_state = hard_state.clone();
        Ok(())
    }

    /// Notes what is the end of the log now.
    fn remember(&mut self, entries: &[Entry]) {
        let (Some(first), Some(last)) = (entries.first(), entries.last()) else {
            return;
        };
        while self.recent.back().is_some_and(|entry| entry.index >= first.index) {
            self.recent_bytes -= self.recent.pop_back().map_or(0, |entry| size(&entry));
        }
        for entry in entries {
            self.recent_bytes += size(entry);
            self.recent.push_back(entry.clone());
        }
        while self.recent_bytes > RECENT_BYTES_MAX {
            self.recent_bytes -= self.recent.pop_front().map_or(0, |entry| size(&entry));
        }
        self.last = (last.index, last.term);
    }

    /// The entries from `low` on that are in memory, if that one is.
    fn recent_from(&self, low: u64) -> Option<impl Iterator<Item = &Entry>> {
        let first = self.recent.front()?.index;
        let skip = usize::try_from(low.checked_sub(first)?).ok()?;
        (skip < self.recent.len()).then(|| self.recent.iter().skip(skip))
    }

    pub(crate) fn conf_state(&self) -> &ConfState {
        &self.conf_state
    }

    /// Notes how far the state is.
    pub(crate) fn applied(&mut self, hard_state: HardState, conf_state: Option<ConfState>) {
        self.hard_state = hard_state;
        if let Some(conf_state) = conf_state {
            self.conf_state = conf_state;
        }
    }

    /// The state that goes with a snapshot message for `to`.
    pub(crate) fn take_source(&self, to: u64) -> Option<SnapshotSource> {
        self.sources.borrow_mut().remove(&to)
    }

    /// Deletes entries up to `index`, which must be in the state's file.
    pub(crate) fn compact(&mut self, index: u64) -> Result<(), RaftStoreError> {
        if index <= self.truncated.0 {
            return Ok(());
        }
        let term = Storage::term(self, index).map_err(RaftStoreError::from_raft)?;
        let txn = self.store.write_derived()?;
        txn.open_table(LOG)?.retain_in(..=index, |_, _| false)?;
        put(&txn, meta::TRUNCATED, &pair_bytes((index, term)))?;
        txn.commit()?;
        self.truncated = (index, term);
        Ok(())
    }

    /// Replaces everything by a leader's snapshot, which stands in the staging table: first the state, then the log.
    pub(crate) fn install(
        &mut self,
        received: &Snapshot,
        staged: &Staged,
        hard_state: &HardState,
    ) -> Result<(), RaftStoreError> {
        let at = received.get_metadata();
        let position = (at.index, at.term);
        let txn = self.store.write_state_durable()?;
        staged.switch(&txn)?;
        put(&txn, meta::APPLIED, &pair_bytes(position))?;
        put(&txn, meta::CONF_STATE, &bytes(at.get_conf_state())?)?;
        put(&txn, meta::INSTALLED, &at.index.to_le_bytes())?;
        self.store.overlay().replace(position, || Ok(txn.commit()?))?;
        begin_after(&self.store, position, hard_state)?;
        self.truncated = (at.index, at.term);
        self.last = self.truncated;
        self.recent.clear();
        self.recent_bytes = 0;
        self.conf_state = at.get_conf_state().clone();
        self.hard_state = hard_state.clone();
        Ok(())
    }

    fn read_entries(&self, low: u64, high: u64, bytes_max: Option<u64>) -> Result<Vec<Entry>, RaftStoreError> {
        if let Some(recent) = self.recent_from(low) {
            let mut bytes = 0;
            let fitting = recent.take_while(|entry| {
                bytes += size(entry) as u64;
                // One at least, however large.
                entry.index < high && (entry.index == low || bytes_max.is_none_or(|max| bytes <= max))
            });
            return Ok(fitting.cloned().collect());
        }
        let txn = self.store.read()?;
        let table = txn.open_table(LOG)?;
        let mut entries = Vec::new();
        let mut size = 0;
        for item in table.range(low..high)? {
            let (_, value) = item?;
            size += value.value().len() as u64;
            if !entries.is_empty() && bytes_max.is_some_and(|max| size > max) {
                break;
            }
            entries.push(decode(&self.store, value.value())?);
        }
        Ok(entries)
    }
}

impl Storage for LogStore {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.truncated.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last.0 + 1 {
            return Err(StorageError::Unavailable.into());
        }
        Ok(self.read_entries(low, high, max_size.into())?)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index == self.truncated.0 {
            return Ok(self.truncated.1);
        }
        if index == self.last.0 {
            return Ok(self.last.1);
        }
        if index < self.truncated.0 {
            return Err(StorageError::Compacted.into());
        }
        match self.read_entries(index, index.saturating_add(1), None)?.first() {
            Some(entry) => Ok(entry.term),
            None => Err(StorageError::Unavailable.into()),
        }
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.truncated.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last.0)
    }

    /// Metadata only: the state stays in a [`SnapshotSource`] until the message is taken.
    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let source = SnapshotSource::open(&self.store)?;
        let index = source.index();
        if index < request_index {
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        let mut made = Snapshot::default();
        let at = made.mut_metadata();
        at.index = index;
        at.term = self.term(index)?;
        // Of the same moment as the index: this thread changes both.
        at.set_conf_state(self.conf_state.clone());
        self.sources.borrow_mut().insert(to, source);
        Ok(made)
    }
}

/// Deletes the whole log; the next entry follows `position`.
fn begin_after(store: &Store, position: (u64, u64), hard_state: &HardState) -> Result<(), RaftStoreError> {
    let txn = store.write_durable()?;
    txn.open_table(LOG)?.retain(|_, _| false)?;
    put(&txn, meta::TRUNCATED, &pair_bytes(position))?;
    put_hard_state(&txn, hard_state)?;
    Ok(txn.commit()?)
}

/// Single values of one of the files.
struct Values<'s> {
    store: &'s Store,
    table: ReadOnlyTable<&'static str, &'static [u8]>,
}

impl Values<'_> {
    fn optional(&self, key: &str) -> Result<Option<Vec<u8>>, RaftStoreError> {
        Ok(self.table.get(key)?.map(|value| value.value().to_vec()))
    }

    fn bytes(&self, key: &str) -> Result<Vec<u8>, RaftStoreError> {
        let missing = || self.store.corrupt(format!("`{key}` is missing"));
        self.optional(key)?.ok_or_else(missing)
    }

    fn number(&self, key: &str) -> Result<u64, RaftStoreError> {
        let damaged = || self.store.corrupt(format!("`{key}` is not a number"));
        number(&self.bytes(key)?).ok_or_else(damaged)
    }

    fn optional_number(&self, key: &str) -> Result<Option<u64>, RaftStoreError> {
        Ok(self.optional(key)?.and_then(|value| number(&value)))
    }

    fn pair(&self, key: &str) -> Result<(u64, u64), RaftStoreError> {
        let damaged = || self.store.corrupt(format!("`{key}` is not two numbers"));
        pair(&self.bytes(key)?).ok_or_else(damaged)
    }
}

pub(crate) fn put_hard_state(txn: &WriteTransaction, hard_state: &HardState) -> Result<(), RaftStoreError> {
    put(txn, meta::HARD_STATE, &bytes(hard_state)?)
}

/// About what an entry takes in memory and on the wire.
fn size(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len() + 32
}

pub(crate) fn put(txn: &WriteTransaction, key: &str, value: &[u8]) -> Result<(), RaftStoreError> {
    txn.open_table(META)?.insert(key, value)?;
    Ok(())
}

pub(crate) fn bytes(message: &impl protobuf::Message) -> Result<Vec<u8>, RaftStoreError> {
    message
        .write_to_bytes()
        .map_err(|error| RaftStoreError::Stopped(format!("a Raft message cannot be encoded: {error}")))
}

fn encode(entry: &Entry) -> Result<Vec<u8>, RaftStoreError> {
    bytes(entry)
}

fn decode(store: &Store, value: &[u8]) -> Result<Entry, RaftStoreError> {
    Entry::parse_from_bytes(value).map_err(|error| store.corrupt(format!("a log entry: {error}")))
}
