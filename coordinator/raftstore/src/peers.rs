//! How a member reaches the others: implemented by the transport.

use crate::OutgoingSnapshot;
use raft::eraftpb::Message;

/// Sends to the other members. Both calls come from the Raft thread and must not block: a message that cannot go now is
/// dropped, and Raft sends again.
pub trait Peers: Send + 'static {
    /// Sends `message` to the member `message.to`. Messages to one member should arrive in order; Raft survives if not.
    fn send(&mut self, message: Message);

    /// Sends a whole state to the member [`snapshot.to()`](OutgoingSnapshot::to), on a stream and a thread of its own.
    /// Dropping it says that it failed.
    fn send_snapshot(&mut self, snapshot: OutgoingSnapshot);
}

/// For a group of one, which has no peers. A message would be a bug of the configuration; it is dropped.
pub(crate) struct NoPeers;

impl Peers for NoPeers {
    fn send(&mut self, message: Message) {
        tracing::warn!(to = message.to, "a message for a peer, but this group has no network");
    }

    fn send_snapshot(&mut self, snapshot: OutgoingSnapshot) {
        tracing::warn!(
            to = snapshot.to(),
            "a snapshot for a peer, but this group has no network"
        );
    }
}
