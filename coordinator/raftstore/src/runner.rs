//! The thread around a [`Node`]: it owns the clock, gathers what callers queue into batches, and hands out answers.

use crate::database::panic_text;
use crate::membership::{MemberProgress, Members, MembershipChange};
use crate::node::{AppliedEntry, Node, Outgoing, ProposalId};
use crate::reads::ReadId;
use crate::snapshot::{OutgoingSnapshot, Staged};
use crate::{Followed, Peers, RaftStoreError, Status};
use baton_proto::state::Command;
use baton_state::Applied;
use prost::Message as _;
use raft::eraftpb::Message;
use std::collections::HashMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{broadcast, oneshot, watch};

/// Inputs taken between two fsyncs: bounds a batch's memory (64 KiB each at the very most) and its latency.
const BATCH_MAX: usize = 1024;

/// What a caller waits for.
pub(crate) type Waiting<T> = oneshot::Sender<Result<T, RaftStoreError>>;

pub(crate) enum Input {
    Propose(Vec<u8>, Waiting<Applied>),
    Change(MembershipChange, Waiting<()>),
    /// To that member, or to the one that is furthest. Answered with whom.
    Transfer(Option<u64>, Waiting<u64>),
    /// Answered with an index that is applied by then. True: a lease will do.
    Read(bool, Waiting<u64>),
    Message(Box<Message>),
    Snapshot(Box<Message>, Staged, SyncSender<Result<(), RaftStoreError>>),
    Unreachable(u64),
    Stop,
}

/// What the thread shares with the handles.
#[derive(Clone)]
pub(crate) struct Board {
    pub(crate) status: watch::Sender<Status>,
    pub(crate) members: Arc<Mutex<(Members, Vec<MemberProgress>)>>,
    pub(crate) followers: broadcast::Sender<Followed>,
    pub(crate) failure: Arc<OnceLock<RaftStoreError>>,
}

/// What comes after a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    GoOn,
    Stop,
}

pub(crate) struct Runner {
    pub(crate) node: Node,
    peers: Box<dyn Peers>,
    /// How the sending of snapshots went, by the member they were for. Not in the queue: that drops what does not fit, and
    /// raft-rs waits for this.
    reports: Arc<Mutex<Vec<(u64, bool)>>>,
    board: Board,
    proposing: HashMap<ProposalId, Waiting<Applied>>,
    changing: HashMap<ProposalId, Waiting<()>>,
    /// Reads of the batch that is being gathered: by read-index, and by lease.
    asking: [Vec<Waiting<u64>>; 2],
    reading: HashMap<ReadId, Vec<Waiting<u64>>>,
    installing: Vec<SyncSender<Result<(), RaftStoreError>>>,
    tick: Duration,
    /// When callers that went away are swept out next.
    next_tick: Duration,
}

impl Runner {
    pub(crate) fn new(node: Node, peers: Box<dyn Peers>, board: Board, tick_ms: u64) -> Self {
        let mut runner = Self {
            node,
            peers,
            reports: Arc::default(),
            board,
            proposing: HashMap::new(),
            changing: HashMap::new(),
            asking: [Vec::new(), Vec::new()],
            reading: HashMap::new(),
            installing: Vec::new(),
            tick: Duration::from_millis(tick_ms.max(1)),
            next_tick: Duration::from_millis(tick_ms.max(1)),
        };
        runner.report(0, 0, Duration::ZERO);
        runner.report_members();
        runner
    }

    /// Runs until stopped. raft-rs asserts its invariants; a panic stops the store and nothing else.
    pub(crate) fn run_contained(mut self, queue: &Receiver<Input>) {
        if let Err(error) = contained(|| self.run(queue)) {
            self.fail(error);
        }
    }

    /// Tells everybody that the member stopped.
    pub(crate) fn fail(mut self, error: RaftStoreError) {
        if let RaftStoreError::Removed = error {
            tracing::info!("this member was removed from the group, and stops");
        } else {
            tracing::error!(%error, "the Raft store stopped");
        }
        let _ = self.board.failure.set(error.clone());
        for (_, waiting) in self.proposing.drain() {
            let _ = waiting.send(Err(error.clone()));
        }
        for (_, waiting) in self.changing.drain() {
            let _ = waiting.send(Err(error.clone()));
        }
        // Whoever watches finds the failure.
        self.board.status.send_modify(|status| {
            status.leads = false;
            status.leader_id = 0;
        });
    }

    fn run(&mut self, queue: &Receiver<Input>) -> Result<(), RaftStoreError> {
        let start = Instant::now();
        loop {
            let wait = self.next_tick.saturating_sub(start.elapsed());
            let first = match queue.recv_timeout(wait) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return self.node.flush(),
            };
            // Everything that queued while the last batch was written shares this one's fsync.
            let inputs = first.into_iter().chain(queue.try_iter().take(BATCH_MAX)).collect();
            if self.turn(start.elapsed(), inputs)? == Turn::Stop {
                return self.node.flush();
            }
        }
    }

    /// One batch: takes the inputs, and does all that is due at `now`, the time since the member started. The only place
    /// that says in which order things happen, so that the simulation runs the same.
    pub(crate) fn turn(&mut self, now: Duration, inputs: Vec<Input>) -> Result<Turn, RaftStoreError> {
        let began = Instant::now();
        self.node.advance_to(millis(now));
        for input in inputs {
            if let Input::Stop = input {
                return Ok(Turn::Stop);
            }
            self.take(input);
        }
        self.ask(now);
        for (to, delivered) in std::mem::take(&mut *lock(&self.reports)) {
            self.node.report_snapshot(to, delivered);
        }
        if now >= self.next_tick {
            self.next_tick = now + self.tick;
            self.sweep();
            self.report_members();
        }
        self.process(began)?;
        Ok(Turn::GoOn)
    }

    fn take(&mut self, input: Input) {
        match input {
            Input::Propose(command, waiting) => match self.node.propose(command) {
                Ok(id) => drop(self.proposing.insert(id, waiting)),
                Err(error) => drop(waiting.send(Err(error))),
            },
            Input::Change(change, waiting) => match self.node.change_members(change) {
                Ok(Some(id)) => drop(self.changing.insert(id, waiting)),
                Ok(None) => drop(waiting.send(Ok(()))),
                Err(error) => drop(waiting.send(Err(error))),
            },
            Input::Transfer(to, waiting) => {
                let _ = waiting.send(self.node.transfer(to));
            }
            Input::Read(lease, waiting) => self.asking[usize::from(lease)].push(waiting),
            Input::Message(message) => self.node.step(*message),
            Input::Snapshot(message, staged, waiting) => match self.node.step_snapshot(*message, staged) {
                Ok(()) => self.installing.push(waiting),
                Err(error) => drop(waiting.send(Err(error.into()))),
            },
            Input::Unreachable(id) => self.node.report_unreachable(id),
            Input::Stop => {}
        }
    }

    /// All reads of a batch share one question to the majority.
    fn ask(&mut self, now: Duration) {
        for lease in [false, true] {
            let waiting = std::mem::take(&mut self.asking[usize::from(lease)]);
            if waiting.is_empty() {
                continue;
            }
            match self.node.read(lease, millis(now)) {
                Ok(id) => drop(self.reading.insert(id, waiting)),
                Err(error) => {
                    for waiting in waiting {
                        let _ = waiting.send(Err(error.clone()));
                    }
                }
            }
        }
    }

    fn process(&mut self, began: Instant) -> Result<(), RaftStoreError> {
        let (peers, reports) = (&mut self.peers, &self.reports);
        let progress = self.node.process(&mut |outgoing| match outgoing {
            Outgoing::Message(message) => peers.send(message),
            Outgoing::Snapshot(message, source) => {
                let (to, reports) = (message.to, reports.clone());
                let report = Box::new(move |delivered| lock(&reports).push((to, delivered)));
                peers.send_snapshot(OutgoingSnapshot::new(message, source, report));
            }
        })?;
        // Before the answers, so that whoever has one finds it in the status.
        let answered = progress.answers.len() as u64;
        self.report(answered, u64::from(answered > 0), began.elapsed());
        if !progress.changed.is_empty() || progress.replaced {
            self.report_members();
        }
        for waiting in self.installing.drain(..) {
            let _ = waiting.send(Ok(()));
        }
        self.tell_followers(progress.replaced, progress.followed);
        for (id, outcome) in progress.answers {
            if let Some(waiting) = self.proposing.remove(&id) {
                let _ = waiting.send(outcome.map_err(RaftStoreError::from));
            }
        }
        for (id, error) in progress.dropped {
            if let Some(waiting) = self.proposing.remove(&id) {
                let _ = waiting.send(Err(error));
            }
        }
        for id in progress.changed {
            if let Some(waiting) = self.changing.remove(&id) {
                let _ = waiting.send(Ok(()));
            }
        }
        for id in progress.orphans {
            if let Some(waiting) = self.proposing.remove(&id) {
                let _ = waiting.send(Err(RaftStoreError::LeaderChanged));
            }
            if let Some(waiting) = self.changing.remove(&id) {
                let _ = waiting.send(Err(RaftStoreError::LeaderChanged));
            }
        }
        for id in progress.reads {
            for waiting in self.reading.remove(&id).unwrap_or_default() {
                let _ = waiting.send(Ok(self.node.applied()));
            }
        }
        if progress.removed {
            return Err(RaftStoreError::Removed);
        }
        Ok(())
    }

    fn tell_followers(&self, replaced: bool, entries: Vec<AppliedEntry>) {
        let followers = &self.board.followers;
        if followers.receiver_count() == 0 {
            return;
        }
        let applied_index = self.node.applied();
        if replaced {
            let _ = followers.send(Followed::Replaced { applied_index });
        }
        for entry in entries {
            // What was applied was decoded before.
            let Ok(command) = Command::decode(entry.command.as_slice()) else {
                continue;
            };
            let _ = followers.send(Followed::Command {
                index: entry.index,
                command: Arc::new(command),
                applied: entry.applied,
            });
        }
    }

    /// Forgets what nobody waits for any more.
    fn sweep(&mut self) {
        let node = &mut self.node;
        self.proposing.retain(|id, waiting| {
            let gone = waiting.is_closed();
            if gone {
                node.forget(*id);
            }
            !gone
        });
        self.changing.retain(|_, waiting| !waiting.is_closed());
        self.reading.retain(|id, waiting| {
            let gone = waiting.iter().all(Waiting::is_closed);
            if gone {
                node.forget_read(*id);
            }
            !gone
        });
    }

    fn report(&mut self, proposals: u64, batches: u64, took: Duration) {
        let node = &self.node;
        self.board.status.send_modify(|status| {
            status.leader_id = node.leader_id();
            status.leads = node.leads();
            status.term = node.term();
            status.applied_index = node.applied();
            status.first_index = node.first_index();
            status.proposals_total += proposals;
            status.batches_total += batches;
            status.batch_ms_total += batches * millis(took);
        });
    }

    fn report_members(&mut self) {
        let mut members = lock(&self.board.members);
        members.0.clone_from(self.node.members());
        members.1 = self.node.members_progress();
    }
}

/// Turns a panic into an error.
pub(crate) fn contained<T>(run: impl FnOnce() -> Result<T, RaftStoreError>) -> Result<T, RaftStoreError> {
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run))
        .unwrap_or_else(|panic| Err(RaftStoreError::Stopped(panic_text(&*panic))))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
