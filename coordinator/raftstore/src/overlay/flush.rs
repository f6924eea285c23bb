//! Flushes: layers into the state's file, in one transaction with the applied index and the membership.
//!
//! ```text
//!   Idle ── due ──▶ Frozen ──▶ written and fsynced ──▶ layers dropped; the log may be deleted up to there ──▶ Idle
//! ```
//!
//! The writing is done by a thread of its own, so that callers do not wait for it; or, where there are to be no threads (the
//! simulation, the tests), in the next turn. A failure stops the member: the file then is as of the flush before.

use super::{FLUSH_BYTES, Frozen, Merged};
use crate::RaftStoreError;
use crate::database::{META, STATE, Store, meta, pair_bytes, panic_text};
use crate::log::{bytes, put};
use crate::tables::segment;
use raft::eraftpb::ConfState;
use redb::WriteTransaction;
use std::thread::JoinHandle;

/// What is due, and under way.
pub(crate) struct Flusher {
    store: Store,
    /// Entries after which a flush is due.
    entries_max: u64,
    threads: bool,
    under_way: UnderWay,
}

enum UnderWay {
    Nothing,
    /// To be written in the next turn.
    Next(Frozen, ConfState),
    Thread(JoinHandle<Result<(), RaftStoreError>>),
}

impl Flusher {
    pub(crate) fn new(store: Store, entries_max: u64) -> Self {
        Self {
            store,
            entries_max,
            threads: false,
            under_way: UnderWay::Nothing,
        }
    }

    /// Lets a thread write.
    pub(crate) fn use_threads(&mut self) {
        self.threads = true;
    }

    /// Ends what has been written, and begins what is due. `conf_state` is the membership at the applied index.
    pub(crate) fn turn(&mut self, applied: u64, conf_state: &ConfState) -> Result<(), RaftStoreError> {
        let overlay = self.store.overlay();
        let bytes = overlay.unflushed_bytes();
        let over = bytes >= 2 * FLUSH_BYTES;
        match &self.under_way {
            UnderWay::Thread(thread) if !thread.is_finished() && !over => return Ok(()),
            UnderWay::Nothing => {}
            _ => self.finish()?,
        }
        let overlay = self.store.overlay();
        if bytes < FLUSH_BYTES && applied.saturating_sub(overlay.flushed()) < self.entries_max {
            return Ok(());
        }
        let (frozen, conf_state) = (overlay.freeze(), conf_state.clone());
        if !self.threads {
            self.under_way = UnderWay::Next(frozen, conf_state);
            return Ok(());
        }
        let store = self.store.clone();
        let thread = std::thread::Builder::new()
            .name("flush".into())
            .spawn(move || write(&store, &frozen, &conf_state))
            .map_err(|error| RaftStoreError::Stopped(format!("no thread: {error}")))?;
        self.under_way = UnderWay::Thread(thread);
        Ok(())
    }

    /// Writes everything, and returns when it is on the disk.
    pub(crate) fn flush(&mut self, conf_state: &ConfState) -> Result<(), RaftStoreError> {
        self.finish()?;
        write(&self.store, &self.store.overlay().freeze(), conf_state)
    }

    /// Waits for what is under way.
    pub(crate) fn finish(&mut self) -> Result<(), RaftStoreError> {
        match std::mem::replace(&mut self.under_way, UnderWay::Nothing) {
            UnderWay::Nothing => Ok(()),
            UnderWay::Next(frozen, conf_state) => write(&self.store, &frozen, &conf_state),
            UnderWay::Thread(thread) => match thread.join() {
                Ok(result) => result,
                Err(panic) => Err(RaftStoreError::Stopped(panic_text(&*panic))),
            },
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        // So that whoever closed the member can open its files again.
        if let UnderWay::Thread(thread) = std::mem::replace(&mut self.under_way, UnderWay::Nothing) {
            let _ = thread.join();
        }
    }
}

fn write(store: &Store, frozen: &Frozen, conf_state: &ConfState) -> Result<(), RaftStoreError> {
    let txn = store.write_state_durable()?;
    write_layers(&txn, frozen)?;
    if !planted!(AppliedNotSaved) {
        put(&txn, meta::APPLIED, &pair_bytes(frozen.applied))?;
    }
    put(&txn, meta::CONF_STATE, &bytes(conf_state)?)?;
    txn.open_table(META)?.remove(meta::INSTALLED)?;
    txn.commit()?;
    store.overlay().drop_flushed(frozen.applied);
    Ok(())
}

fn write_layers(txn: &WriteTransaction, frozen: &Frozen) -> Result<(), RaftStoreError> {
    let [state, rows, requests] = STATE;
    let mut tables = [txn.open_table(state)?, txn.open_table(rows)?, txn.open_table(requests)?];
    let newest_first = frozen.layers.iter().rev().map(|layer| layer.all());
    for (key, value) in Merged::of(newest_first, false) {
        let table = &mut tables[segment(key)];
        match value {
            Some(value) => drop(table.insert(key, value)?),
            None if planted!(DeletionsNotFlushed) => {}
            None => drop(table.remove(key)?),
        }
    }
    Ok(())
}
