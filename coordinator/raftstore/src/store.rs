//! The handle to a member: callers queue what they want of its thread, and wait.

use crate::database::{Store, contain_panic};
use crate::membership::{MemberProgress, Members, MembershipChange};
use crate::node::Node;
use crate::peers::NoPeers;
use crate::queries::{self, Position};
use crate::runner::{Board, Input, Runner, Waiting};
use crate::snapshot::{self, BackupInfo, SnapshotSink, Staging};
use crate::tables::StateView;
use crate::{Peers, RaftStoreConfig, RaftStoreError, SnapshotError};
use baton_proto::state::{Command, UsageRecord, WorkerRecord};
use baton_state::view::{self, Settled};
use baton_state::{Applied, Tables};
use prost::Message as _;
use raft::eraftpb::Message;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{broadcast, oneshot, watch};

/// Proposals and messages that may wait for the thread: many fsyncs' worth, and far more than requests end at once.
const QUEUE_MAX: usize = 8192;
/// Changes that a follower of the state may lag behind before it must read everything again.
const FOLLOWED_MAX: usize = 1024;

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

/// What others see of the state's changes: see [`RaftStore::follow`].
#[derive(Debug, Clone)]
pub enum Followed {
    /// A command was applied and changed something. Settled usage is left out: it is read by its numbers.
    Command {
        /// Log index of the command.
        index: u64,
        /// The command.
        command: Arc<Command>,
        /// Its answer.
        applied: Applied,
    },
    /// A snapshot replaced the whole state: read it again.
    Replaced {
        /// Log index of the last command in it.
        applied_index: u64,
    },
}

/// How a read is made to see everything that was answered before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// A majority says that the leader still leads. Rests on no clock.
    ReadIndex,
    /// The leader relies on what a majority said up to 0.8 election timeouts ago, if members' clocks run within a tenth of
    /// each other's speed; otherwise, and on followers, as `ReadIndex`.
    Lease,
}

/// A member of the Raft group. Cheap to clone; [`close`](Self::close), or the last clone to go, stops the thread and
/// closes the files.
#[derive(Clone)]
pub struct RaftStore {
    shared: Arc<Shared>,
}

struct Shared {
    inputs: SyncSender<Input>,
    /// None once closed.
    store: Mutex<Option<(Store, Staging)>>,
    node_id: u64,
    board: Board,
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
        config.check()?;
        std::fs::create_dir_all(dir).map_err(|error| RaftStoreError::from_io(&error))?;
        Self::start(Store::open(dir)?, config, peers)
    }

    pub(crate) fn start(store: Store, config: &RaftStoreConfig, peers: impl Peers) -> Result<Self, RaftStoreError> {
        let life = RandomState::new().hash_one(std::process::id());
        let (mut node, staging) = open_member(&store, config, life)?;
        node.flush_by_threads();
        let (inputs, queue) = sync_channel(QUEUE_MAX);
        let board = Board {
            status: watch::Sender::default(),
            members: Arc::default(),
            followers: broadcast::Sender::new(FOLLOWED_MAX),
            failure: Arc::default(),
        };
        let runner = Runner::new(node, Box::new(peers), board.clone(), config.tick_ms);
        let thread = std::thread::Builder::new()
            .name("raft".into())
            .spawn(move || runner.run_contained(&queue))
            .map_err(|error| RaftStoreError::Stopped(format!("no thread: {error}")))?;
        Ok(Self {
            shared: Arc::new(Shared {
                inputs,
                store: Mutex::new(Some((store, staging))),
                node_id: config.node_id,
                board,
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
        self.ask(|waiting| Input::Propose(command.encode_to_vec(), waiting))
            .await
    }

    /// Queues an input and waits for its answer.
    async fn ask<T>(&self, input: impl FnOnce(Waiting<T>) -> Input) -> Result<T, RaftStoreError> {
        let (sender, answer) = oneshot::channel();
        match self.shared.inputs.try_send(input(sender)) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return Err(RaftStoreError::Overloaded { limit: QUEUE_MAX }),
            Err(TrySendError::Disconnected(_)) => return Err(self.stopped()),
        }
        match tokio::time::timeout(self.shared.propose_timeout, answer).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(self.stopped()),
            Err(_) => Err(self.timeout()),
        }
    }

    fn timeout(&self) -> RaftStoreError {
        RaftStoreError::Timeout {
            timeout_ms: u64::try_from(self.shared.propose_timeout.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// Takes a message from a peer, which the caller has authenticated as a coordinator. Dropped if the queue is full.
    pub fn receive(&self, message: Message) {
        let _ = self.shared.inputs.try_send(Input::Message(Box::new(message)));
    }

    /// Begins to take a snapshot from a peer, which the caller has authenticated as a coordinator: `message` is
    /// [`OutgoingSnapshot::message`](crate::OutgoingSnapshot::message) of the other side. Blocks on the disk.
    pub fn receive_snapshot(&self, message: Message) -> Result<SnapshotSink, RaftStoreError> {
        wanted(&message, self.shared.node_id, &self.status())?;
        let (_, staging) = self.shared.open_store()?;
        let inputs = self.shared.inputs.clone();
        let failure = self.shared.board.failure.clone();
        let hand = move |message, staged| {
            let stopped = || failure.get().cloned().unwrap_or_else(closed);
            let (sender, installed) = sync_channel(1);
            let input = Input::Snapshot(Box::new(message), staged, sender);
            inputs.send(input).map_err(|_| stopped())?;
            installed.recv().map_err(|_| stopped())?
        };
        SnapshotSink::begin(&staging, message, Box::new(hand))
    }

    /// Messages to a member get lost at the moment; saves the leader from sending it much.
    pub fn report_unreachable(&self, id: u64) {
        let _ = self.shared.inputs.try_send(Input::Unreachable(id));
    }

    /// Changes who belongs to the group, and returns when the change has taken effect. Only the leader can.
    pub async fn change_members(&self, change: MembershipChange) -> Result<(), RaftStoreError> {
        self.ask(|waiting| Input::Change(change, waiting)).await
    }

    /// Hands the leadership to a voter, `None`: to the one that has most of the log. Returns the new leader once this member
    /// follows it. Proposals that come meanwhile are answered [`NoLeader`](RaftStoreError::NoLeader).
    pub async fn transfer(&self, to: Option<u64>) -> Result<u64, RaftStoreError> {
        let mut status = self.watch();
        let to = self.ask(|waiting| Input::Transfer(to, waiting)).await?;
        let done = status.wait_for(|status| status.leader_id == to);
        match tokio::time::timeout(self.shared.propose_timeout, done).await {
            Ok(Ok(_)) => Ok(to),
            Ok(Err(_)) => Err(self.stopped()),
            Err(_) => Err(self.timeout()),
        }
    }

    /// Waits until a read of [`state`](Self::state) sees everything that was answered anywhere before this call. Returns the
    /// applied index. Reads that wait at the same time share one round to the majority.
    pub async fn read(&self, consistency: Consistency) -> Result<u64, RaftStoreError> {
        let lease = consistency == Consistency::Lease;
        self.ask(|waiting| Input::Read(lease, waiting)).await
    }

    /// Waits until the entry at `index` is applied here: for a read that must see a write made through another member.
    pub async fn wait_applied(&self, index: u64) -> Result<(), RaftStoreError> {
        let mut status = self.watch();
        let failed = || self.failure().is_some();
        let reached = status.wait_for(|status| status.applied_index >= index || failed());
        match tokio::time::timeout(self.shared.propose_timeout, reached).await {
            Ok(Ok(status)) if status.applied_index >= index => Ok(()),
            Ok(_) => Err(self.stopped()),
            Err(_) => Err(self.timeout()),
        }
    }

    /// How the member is doing.
    pub fn status(&self) -> Status {
        *self.shared.board.status.borrow()
    }

    /// How the member is doing, to wait for changes of: leader, applied index.
    pub fn watch(&self) -> watch::Receiver<Status> {
        self.shared.board.status.subscribe()
    }

    /// The changes of the state from now on, in order, whichever member they came through. Subscribe first, then read the
    /// state, then follow; what was read already may come again. A receiver that lags by more than a thousand gets `Lagged`
    /// and must read the state again.
    pub fn follow(&self) -> broadcast::Receiver<Followed> {
        self.shared.board.followers.subscribe()
    }

    /// Who belongs to the group, at most a tick ago.
    pub fn members(&self) -> Members {
        self.shared.board.members().0.clone()
    }

    /// How far each member is, at most a tick ago; empty unless this member leads.
    pub fn members_progress(&self) -> Vec<MemberProgress> {
        self.shared.board.members().1.clone()
    }

    /// Why the store stopped, if it did.
    pub fn failure(&self) -> Option<RaftStoreError> {
        self.shared.board.failure.get().cloned()
    }

    /// Writes a backup of the state, as of one moment, while the member goes on. Blocks on the disk and on `to`.
    pub fn save(&self, to: &mut dyn std::io::Write) -> Result<BackupInfo, RaftStoreError> {
        snapshot::save(&self.shared.open_store()?.0, to)
    }

    /// Applied index, state hash and number of settled records, all of one moment.
    pub fn position(&self) -> Result<Position, RaftStoreError> {
        queries::position(&self.shared.open_store()?.0)
    }

    /// One consistent version of the applied state, to read with [`baton_state::view`].
    pub fn state(&self) -> Result<impl Tables + use<>, RaftStoreError> {
        StateView::open(&self.shared.open_store()?.0)
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
    /// answered yet may or may not be logged. Blocks for at most one batch; the file can be opened again afterwards, once
    /// snapshots that are still under way have ended.
    pub fn close(&self) {
        self.shared.close();
    }

    fn stopped(&self) -> RaftStoreError {
        self.failure().unwrap_or_else(closed)
    }
}

/// The parts of a member that the thread around it drives. A group of one leads when this returns; with peers, nothing is
/// sent before an election is due.
pub(crate) fn open_member(
    store: &Store,
    config: &RaftStoreConfig,
    life: u64,
) -> Result<(Node, Staging), RaftStoreError> {
    contain_panic(store.path(), || {
        let staging = Staging::open(store.clone())?;
        let mut node = Node::open(store.clone(), config, life, 0)?;
        node.campaign_if_alone()?;
        node.process(&mut |_| {})?;
        Ok((node, staging))
    })
}

/// Whether a member should take a snapshot at all.
pub(crate) fn wanted(message: &Message, node_id: u64, status: &Status) -> Result<(), SnapshotError> {
    let index = message.get_snapshot().get_metadata().index;
    if message.to != node_id {
        return Err(SnapshotError::Header("it is for another member"));
    }
    if message.term < status.term || index <= status.applied_index {
        return Err(SnapshotError::Stale { index });
    }
    Ok(())
}

fn closed() -> RaftStoreError {
    RaftStoreError::Stopped("it was closed".into())
}

impl Board {
    fn members(&self) -> std::sync::MutexGuard<'_, (Members, Vec<MemberProgress>)> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Shared {
    fn open_store(&self) -> Result<(Store, Staging), RaftStoreError> {
        let store = self.store.lock().unwrap_or_else(PoisonError::into_inner);
        store.clone().ok_or_else(closed)
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

/// Milliseconds of Unix time.
fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
