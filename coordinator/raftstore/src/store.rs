//! The thread around a [`Node`], and the handle to it. The thread owns the clock; callers queue and wait.

use crate::database::{Store, contain_panic, panic_text};
use crate::node::{Node, ProposalId};
use crate::queries::{self, Position};
use crate::tables::StateView;
use crate::{RaftStoreConfig, RaftStoreError};
use baton_proto::state::{Command, UsageRecord, WorkerRecord};
use baton_state::view::{self, Settled};
use baton_state::{Applied, Tables};
use prost::Message as _;
use raft::eraftpb::Message;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::oneshot;

/// Proposals and messages that may wait for the thread: many fsyncs' worth, and far more than requests end at once.
const QUEUE_MAX: usize = 8192;
/// Inputs taken between two fsyncs: bounds a batch's memory (64 KiB each at the very most) and its latency.
const BATCH_MAX: usize = 1024;
/// Name of the file inside the data directory.
const FILE_NAME: &str = "raft.redb";

/// Sends messages to the other members. Must not block: a message that cannot go now is dropped, and Raft sends again.
pub trait Peers: Send + 'static {
    /// Sends `message` to the member `message.to`.
    fn send(&mut self, message: Message);
}

/// For a group of one, which has no peers. A message would be a bug of the configuration; it is dropped.
struct NoPeers;

impl Peers for NoPeers {
    fn send(&mut self, message: Message) {
        tracing::warn!(to = message.to, "a message for a peer, but this group has no network");
    }
}

/// How the member is doing, as of the last batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Status {
    /// The leader's id, 0 if unknown.
    pub leader_id: u64,
    /// This member leads.
    pub leads: bool,
    /// Raft term.
    pub term: u64,
    /// Log index of the last applied entry.
    pub applied_index: u64,
    /// Log index of the oldest entry kept.
    pub first_index: u64,
    /// Commands answered since start.
    pub proposals_total: u64,
    /// Batches that carried them: their ratio is how many commands share an fsync.
    pub batches_total: u64,
    /// Milliseconds spent in batches.
    pub batch_ms_total: u64,
}

/// What a caller of `propose` waits for.
type Answer = Result<Applied, RaftStoreError>;

enum Input {
    Propose(Vec<u8>, oneshot::Sender<Answer>),
    Message(Box<Message>),
    Stop,
}

/// A member of the Raft group. Cheap to clone; [`close`](Self::close), or the last clone to go, stops the thread and
/// closes the file.
#[derive(Clone)]
pub struct RaftStore {
    shared: Arc<Shared>,
}

struct Shared {
    inputs: SyncSender<Input>,
    /// None once closed.
    store: Mutex<Option<Store>>,
    status: Arc<Mutex<Status>>,
    failure: Arc<OnceLock<RaftStoreError>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    propose_timeout: Duration,
}

impl RaftStore {
    /// Opens or creates the store in `dir` for a group of one, and elects it leader. Blocks on the disk.
    pub fn open(dir: &Path, config: &RaftStoreConfig) -> Result<Self, RaftStoreError> {
        Self::open_with_peers(dir, config, NoPeers)
    }

    /// Opens or creates the store in `dir` for a member that reaches the others through `peers`. Blocks on the disk.
    pub fn open_with_peers(dir: &Path, config: &RaftStoreConfig, peers: impl Peers) -> Result<Self, RaftStoreError> {
        if config.node_id == 0 {
            return Err(RaftStoreError::Config("the node id must not be 0".into()));
        }
        std::fs::create_dir_all(dir).map_err(|error| RaftStoreError::from_io(&error))?;
        let path = dir.join(FILE_NAME);
        Self::start(Store::open(&path)?, config, peers)
    }

    pub(crate) fn start(store: Store, config: &RaftStoreConfig, peers: impl Peers) -> Result<Self, RaftStoreError> {
        let path = store.path().to_owned();
        let life = RandomState::new().hash_one(std::process::id());
        let node = contain_panic(&path, || {
            let mut node = Node::open(store.clone(), config, life)?;
            node.campaign_if_alone()?;
            // A group of one leads when this returns; with peers, nothing is sent before an election is due.
            node.process()?;
            Ok(node)
        })?;
        let (inputs, queue) = sync_channel(QUEUE_MAX);
        let status = Arc::new(Mutex::new(Status::default()));
        let failure = Arc::new(OnceLock::new());
        let mut runner = Runner {
            node,
            peers: Box::new(peers),
            waiting: HashMap::new(),
            status: status.clone(),
            start: Instant::now(),
            tick: Duration::from_millis(config.tick_ms.max(1)),
        };
        runner.report();
        let thread = {
            let failure = failure.clone();
            std::thread::Builder::new()
                .name("raft".into())
                .spawn(move || runner.run_contained(&queue, &failure))
                .map_err(|error| RaftStoreError::Stopped(format!("no thread: {error}")))?
        };
        Ok(Self {
            shared: Arc::new(Shared {
                inputs,
                store: Mutex::new(Some(store)),
                status,
                failure,
                thread: Mutex::new(Some(thread)),
                propose_timeout: Duration::from_millis(config.propose_timeout_ms),
            }),
        })
    }

    /// Proposes a command and waits until it is durable, committed and applied here. Dropping the future does not take
    /// the command back. Repeating a `SettleUsage` or a `RemoveWorker` after an error is safe; repeating a
    /// `RegisterWorker` gives a newer epoch. A command without a time gets this machine's.
    pub async fn propose(&self, mut command: Command) -> Result<Applied, RaftStoreError> {
        if command.at_unix_ms == 0 {
            command.at_unix_ms = unix_ms();
        }
        let (sender, answer) = oneshot::channel();
        match self
            .shared
            .inputs
            .try_send(Input::Propose(command.encode_to_vec(), sender))
        {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(RaftStoreError::Overloaded { limit: QUEUE_MAX }),
            Err(TrySendError::Disconnected(_)) => return Err(self.stopped()),
        }
        let timeout = self.shared.propose_timeout;
        match tokio::time::timeout(timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(self.stopped()),
            Err(_) => Err(RaftStoreError::Timeout {
                timeout_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
            }),
        }
    }

    /// Takes a message from a peer, which the caller has authenticated as a coordinator. Dropped if the queue is full.
    pub fn receive(&self, message: Message) {
        let _ = self.shared.inputs.try_send(Input::Message(Box::new(message)));
    }

    /// How the member is doing.
    pub fn status(&self) -> Status {
        *self.shared.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Why the store stopped, if it did.
    pub fn failure(&self) -> Option<RaftStoreError> {
        self.shared.failure.get().cloned()
    }

    /// Applied index, state hash and number of settled records, all of one moment.
    pub fn position(&self) -> Result<Position, RaftStoreError> {
        queries::position(&self.shared.open_store()?)
    }

    /// One consistent version of the applied state, to read with [`baton_state::view`].
    pub fn state(&self) -> Result<impl Tables + use<>, RaftStoreError> {
        StateView::open(&self.shared.open_store()?)
    }

    /// The registered workers, by id.
    pub fn workers(&self) -> Result<Vec<WorkerRecord>, RaftStoreError> {
        Ok(view::workers(&self.state()?)?)
    }

    /// The record settled for a request.
    pub fn usage(&self, request_id: &str) -> Result<Option<Settled>, RaftStoreError> {
        Ok(view::usage(&self.state()?, request_id)?)
    }

    /// Settled records after `sequence`, oldest first, at most `limit` and at most 1000.
    pub fn usage_after(&self, sequence: u64, limit: usize) -> Result<Vec<Settled>, RaftStoreError> {
        Ok(view::usage_after(&self.state()?, sequence, limit)?)
    }

    /// Settles a usage record: durable on `Ok`, idempotent by request id. Returns its number.
    pub async fn settle(&self, record: UsageRecord) -> Result<u64, RaftStoreError> {
        use baton_proto::state::{SettleUsage, command};
        let kind = command::Kind::SettleUsage(SettleUsage { record: Some(record) });
        match self
            .propose(Command {
                kind: Some(kind),
                ..Command::default()
            })
            .await?
        {
            Applied::Settled { sequence } => Ok(sequence),
            other => Err(RaftStoreError::Stopped(format!(
                "a settlement was answered with {other:?}"
            ))),
        }
    }

    /// Stops the thread and closes the file, whatever clones there are; they answer "closed" from now on. What was not
    /// answered yet may or may not be logged. Blocks for at most one batch; the file can be opened again afterwards.
    pub fn close(&self) {
        self.shared.close();
    }

    fn stopped(&self) -> RaftStoreError {
        self.failure()
            .unwrap_or_else(|| RaftStoreError::Stopped("it was closed".into()))
    }
}

impl Shared {
    fn open_store(&self) -> Result<Store, RaftStoreError> {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store
            .clone()
            .ok_or_else(|| RaftStoreError::Stopped("it was closed".into()))
    }

    fn close(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        *self.store.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(thread) = thread {
            // If the queue is full the thread takes this after one batch; if the thread is gone there is no queue.
            let _ = self.inputs.send(Input::Stop);
            let _ = thread.join();
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // Joined, so that whoever dropped the store can open the file again.
        self.close();
    }
}

struct Runner {
    node: Node,
    peers: Box<dyn Peers>,
    waiting: HashMap<ProposalId, oneshot::Sender<Answer>>,
    status: Arc<Mutex<Status>>,
    start: Instant,
    tick: Duration,
}

impl Runner {
    /// Runs until stopped. raft-rs asserts its invariants; a panic stops the store and nothing else.
    fn run_contained(mut self, queue: &Receiver<Input>, failure: &OnceLock<RaftStoreError>) {
        let run = std::panic::AssertUnwindSafe(|| self.run(queue));
        let error = match std::panic::catch_unwind(run) {
            Ok(Ok(())) => return,
            Ok(Err(error)) => error,
            Err(panic) => RaftStoreError::Stopped(panic_text(&*panic)),
        };
        tracing::error!(%error, "the Raft store stopped");
        let _ = failure.set(error.clone());
        for (_, waiting) in self.waiting.drain() {
            let _ = waiting.send(Err(error.clone()));
        }
    }

    fn run(&mut self, queue: &Receiver<Input>) -> Result<(), RaftStoreError> {
        let mut next_tick = self.tick;
        loop {
            let wait = next_tick.saturating_sub(self.start.elapsed());
            let first = match queue.recv_timeout(wait) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            let began = Instant::now();
            // Everything that queued while the last batch was written shares this one's fsync.
            let inputs = first.into_iter().chain(queue.try_iter().take(BATCH_MAX));
            for input in inputs.collect::<Vec<_>>() {
                match input {
                    Input::Propose(command, waiting) => match self.node.propose(command) {
                        Ok(id) => drop(self.waiting.insert(id, waiting)),
                        Err(error) => drop(waiting.send(Err(error))),
                    },
                    Input::Message(message) => self.node.step(*message),
                    Input::Stop => return Ok(()),
                }
            }
            let now = self.start.elapsed();
            if now >= next_tick {
                next_tick = now + self.tick;
                self.node.advance_to(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
                self.sweep();
            }
            self.process(began)?;
        }
    }

    fn process(&mut self, began: Instant) -> Result<(), RaftStoreError> {
        let progress = self.node.process()?;
        for message in progress.messages {
            self.peers.send(message);
        }
        let answered = progress.answers.len() as u64;
        if answered > 0 {
            let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
            status.proposals_total += answered;
            status.batches_total += 1;
            status.batch_ms_total += u64::try_from(began.elapsed().as_millis()).unwrap_or(0);
        }
        // Before the answers, so that whoever has one finds it in the status.
        self.report();
        for (id, outcome) in progress.answers {
            if let Some(waiting) = self.waiting.remove(&id) {
                let _ = waiting.send(outcome.map_err(RaftStoreError::from));
            }
        }
        for id in progress.orphans {
            if let Some(waiting) = self.waiting.remove(&id) {
                let _ = waiting.send(Err(RaftStoreError::LeaderChanged));
            }
        }
        Ok(())
    }

    /// Forgets proposals whose callers gave up.
    fn sweep(&mut self) {
        let node = &mut self.node;
        self.waiting.retain(|id, waiting| {
            let gone = waiting.is_closed();
            if gone {
                node.forget(*id);
            }
            !gone
        });
    }

    fn report(&mut self) {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        status.leader_id = self.node.leader_id();
        status.leads = self.node.leads();
        status.term = self.node.term();
        status.applied_index = self.node.applied();
        status.first_index = self.node.first_index();
    }
}

/// Milliseconds of Unix time.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
