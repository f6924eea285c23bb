//! Raft's side of the network: messages are sorted into one bounded lane per member and sent by tasks. Never blocks the Raft
//! thread; what finds no room is dropped, and Raft sends again.

use super::address_book::AddressBook;
use super::lane;
use baton_identity::Identity;
use baton_raftstore::{Message, OutgoingSnapshot, Peers};
use prost::bytes::Bytes;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Messages waiting for one member: several times what Raft has under way to it (64 appends), heartbeats and votes beside.
/// A message is up to a little over 1 MiB, as appends are; usually a few hundred bytes.
const LANE_MESSAGES_MAX: usize = 256;

/// The tasks that carry messages, and what they share.
pub(crate) struct Peering {
    pub(super) book: Arc<AddressBook>,
    pub(super) identity: Identity,
    pub(super) shutdown: CancellationToken,
    /// Which group's state this member has, as `RaftMessages` tells it.
    group: Mutex<Option<Bytes>>,
    tasks: TaskTracker,
    lanes: Mutex<HashMap<u64, mpsc::Sender<Message>>>,
    runtime: Handle,
}

impl Peering {
    /// Must be called inside a tokio runtime, which then carries the messages.
    pub(crate) fn new(book: AddressBook, identity: Identity, shutdown: CancellationToken) -> Arc<Self> {
        Arc::new(Self {
            book: Arc::new(book),
            identity,
            shutdown,
            group: Mutex::default(),
            tasks: TaskTracker::new(),
            lanes: Mutex::default(),
            runtime: Handle::current(),
        })
    }

    pub(crate) fn book(&self) -> &Arc<AddressBook> {
        &self.book
    }

    /// This member's state is of this group, from now on.
    pub(super) fn set_group(&self, group: Option<Bytes>) {
        *self.group.lock().unwrap_or_else(PoisonError::into_inner) = group;
    }

    /// Which group this member's state is of; nothing while it has none.
    pub(super) fn group(&self) -> Option<Bytes> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What the Raft thread gets.
    pub(crate) fn outbox(self: &Arc<Self>) -> Outbox {
        Outbox(self.clone())
    }

    fn lanes(&self) -> MutexGuard<'_, HashMap<u64, mpsc::Sender<Message>>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lane to a member that the book has; its task starts with the first message.
    fn lane(self: &Arc<Self>, id: u64) -> Option<mpsc::Sender<Message>> {
        let mut lanes = self.lanes();
        if let Some(lane) = lanes.get(&id) {
            return Some(lane.clone());
        }
        self.book.get(id)?;
        let (lane, queue) = mpsc::channel(LANE_MESSAGES_MAX);
        let carrying = lane::carry(self.clone(), id, queue);
        let shutdown = self.shutdown.clone();
        self.tasks.spawn_on(
            async move {
                tokio::select! {
                    () = carrying => {}
                    () = shutdown.cancelled() => {}
                }
            },
            &self.runtime,
        );
        lanes.insert(id, lane.clone());
        Some(lane)
    }
}

/// See the module.
pub(crate) struct Outbox(Arc<Peering>);

impl Peers for Outbox {
    fn send_snapshot(&mut self, snapshot: OutgoingSnapshot) {
        let peering = self.0.clone();
        let shutdown = peering.shutdown.clone();
        let sending = lane::send_snapshot(peering.clone(), snapshot);
        peering.tasks.spawn_on(
            async move {
                tokio::select! {
                    () = sending => {}
                    () = shutdown.cancelled() => {}
                }
            },
            &peering.runtime,
        );
    }

    fn send(&mut self, message: Message) {
        let to = message.to;
        match self.0.lane(to) {
            Some(lane) => {
                if lane.try_send(message).is_err() {
                    tracing::trace!(to, "a member's lane is full; Raft will send again");
                }
            }
            None => tracing::debug!(to, "a message for a member whose address is not known"),
        }
    }
}
