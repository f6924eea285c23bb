//! The owner's side of reads: exported bytes, the leases on them, and the pushes that serve reads.
//!
//! The rules are in [`crate::lease`]; here are the lock around them, the pushes, and a task that waits for terms to
//! run out. The order at a lease's end is what the owner relies on: first every push that reads the bytes is fenced,
//! then [`Export::ended`] resolves. A read begins, and its push is entered, under the same lock under which leases end,
//! so none slips between.

use crate::control::ReadRequest;
use crate::lease::{Ended, LeaseEnd, LeaseOptions, LeaseTable, ReadEnd};
use crate::push::Outgoing;
use crate::ranges::RangeSet;
use crate::storage::Memory;
use crate::window_table::lock;
use crate::{AbortReason, PushError, Refusal, SetupError};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// The permission to read an export: hand it to the reader by other means. Whoever knows it may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportGrant {
    /// Random, not guessable.
    pub id: u64,
    /// The term of the lease in milliseconds; the reader sends a heartbeat three times as often.
    pub term_ms: u64,
}

impl ExportGrant {
    /// The term of the lease.
    pub fn term(&self) -> Duration {
        Duration::from_millis(self.term_ms)
    }

    /// How often the reader shows that it lives: three times in a term, so that one lost heartbeat is no death; not
    /// more often than a network can bear.
    pub(crate) fn heartbeat(&self) -> Duration {
        (self.term() / 3).max(Duration::from_millis(5))
    }
}

/// One export.
#[derive(Debug)]
struct Served {
    memory: Memory,
    /// By the reader's window.
    reads: HashMap<u64, Arc<Outgoing>>,
    /// Acknowledged bytes of its reads when last looked at.
    progress: u64,
    ended: watch::Sender<Option<LeaseEnd>>,
}

#[derive(Debug, Default)]
struct State {
    leases: LeaseTable,
    served: HashMap<u64, Served>,
    closed: bool,
}

/// All exports of an agent.
#[derive(Debug, Default)]
pub(crate) struct Exports {
    state: Mutex<State>,
    /// A term has begun that may be the first to run out.
    changed: Notify,
}

impl Exports {
    /// Grants a lease on `ranges` of `memory`.
    pub(crate) fn grant(
        self: &Arc<Self>,
        memory: Memory,
        ranges: RangeSet,
        options: LeaseOptions,
        exports_max: usize,
        mut random_id: impl FnMut() -> Result<u64, SetupError>,
    ) -> Result<Export, SetupError> {
        let mut state = lock(&self.state);
        if state.closed {
            return Err(SetupError::AgentClosed);
        }
        if state.leases.len() >= exports_max {
            return Err(SetupError::Exports { max: exports_max });
        }
        let grant = ExportGrant {
            id: loop {
                let id = random_id()?;
                if state.leases.grant(id, ranges.clone(), options.clone(), Instant::now()) {
                    break id;
                }
            },
            term_ms: u64::try_from(options.term.as_millis()).unwrap_or(u64::MAX),
        };
        let (ended, watching) = watch::channel(None);
        let served = Served {
            memory,
            reads: HashMap::new(),
            progress: 0,
            ended,
        };
        state.served.insert(grant.id, served);
        drop(state);
        self.changed.notify_one();
        Ok(Export {
            grant,
            exports: self.clone(),
            ended: watching,
        })
    }

    /// Begins a read; `start` starts the push that serves it.
    pub(crate) fn begin(
        &self,
        request: &ReadRequest,
        start: impl FnOnce(Memory) -> Arc<Outgoing>,
    ) -> Result<Arc<Outgoing>, Refusal> {
        let mut state = lock(&self.state);
        let State { leases, served, .. } = &mut *state;
        let now = Instant::now();
        leases.begin(request.export, request.window, &request.pieces, now)?;
        let served = served.get_mut(&request.export).ok_or(Refusal::UnknownExport)?;
        let push = start(served.memory.clone());
        served.reads.insert(request.window, push.clone());
        drop(state);
        self.changed.notify_one();
        Ok(push)
    }

    /// The reader lives.
    pub(crate) fn beat(&self, export: u64, window: Option<u64>) -> Result<(), Refusal> {
        lock(&self.state).leases.beat(export, window, Instant::now())
    }

    /// A read's push has settled.
    pub(crate) fn end_read(&self, export: u64, window: u64, how: ReadEnd) {
        let mut state = lock(&self.state);
        if let Some(served) = state.served.get_mut(&export)
            && let Some(push) = served.reads.remove(&window)
        {
            // What it moved shall not be missed as progress of the others.
            served.progress = served.progress.saturating_sub(push.progress());
        }
        let ended = state.leases.end_read(export, window, how);
        state.apply(ended);
    }

    /// Ends an export, if it is there: fences its reads, then tells the owner.
    pub(crate) fn end(&self, export: u64, why: LeaseEnd) {
        let mut state = lock(&self.state);
        let ended = state.leases.end(export, why);
        state.apply(ended);
    }

    /// Ends all exports and grants none any more.
    pub(crate) fn shut(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        let all: Vec<u64> = state.served.keys().copied().collect();
        for export in all {
            let ended = state.leases.end(export, LeaseEnd::Revoked);
            state.apply(ended);
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Ends leases when their terms run out, until the agent is closed.
    pub(crate) async fn run(self: Arc<Self>) {
        loop {
            let deadline = {
                let mut state = lock(&self.state);
                if state.closed {
                    return;
                }
                state.expire(Instant::now());
                state.leases.deadline()
            };
            let changed = self.changed.notified();
            match deadline {
                None => changed.await,
                // Either is a reason to look again.
                Some(at) => drop(tokio::time::timeout_at(at.into(), changed).await),
            }
        }
    }
}

impl State {
    fn expire(&mut self, now: Instant) {
        for (&export, served) in &mut self.served {
            let progress = served.reads.values().map(|push| push.progress()).sum();
            if std::mem::replace(&mut served.progress, progress) < progress {
                // Acknowledged bytes are a sign of life. A lease that is over by now stays over.
                let _ = self.leases.beat(export, None, now);
            }
        }
        for ended in self.leases.expire(now) {
            self.apply(Some(ended));
        }
    }

    fn apply(&mut self, ended: Option<Ended>) {
        let Some(ended) = ended else { return };
        let Some(served) = self.served.remove(&ended.export) else {
            return;
        };
        for window in &ended.reads {
            if let Some(push) = served.reads.get(window) {
                push.fail(PushError::Aborted(AbortReason::LeaseEnded));
            }
        }
        tracing::debug!(why = %ended.why, "an export ended");
        served.ended.send_replace(Some(ended.why));
    }
}

/// Bytes lent for reading. The owner must not change or free them before [`Export::ended`] has resolved or the export
/// is dropped; from then on nothing reads them. Dropping it ends the lease at once.
#[derive(Debug)]
pub struct Export {
    grant: ExportGrant,
    exports: Arc<Exports>,
    ended: watch::Receiver<Option<LeaseEnd>>,
}

impl Export {
    /// What to hand to the reader.
    pub fn grant(&self) -> ExportGrant {
        self.grant
    }

    /// Resolves once the lease is over, with the reason. Resolves within the term if no reader shows that it lives.
    pub async fn ended(&self) -> LeaseEnd {
        let mut ended = self.ended.clone();
        match ended.wait_for(Option::is_some).await {
            Ok(why) => why.unwrap_or(LeaseEnd::Revoked),
            // The agent is gone.
            Err(_) => LeaseEnd::Revoked,
        }
    }

    /// The reason if the lease is over.
    pub fn end(&self) -> Option<LeaseEnd> {
        *self.ended.borrow()
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.exports.end(self.grant.id, LeaseEnd::Revoked);
    }
}
