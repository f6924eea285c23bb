//! The seam between pushes and what carries them. QUIC is the one that exists; shared memory on one host and RDMA
//! through NIXL fit behind the same verbs.
//!
//! A transport is made with the agent's window table, into which it lands what arrives, and promises:
//!
//! * every push handed to [`Transport::carry`] is settled, in bounded time once the peer is gone;
//! * a push that is given up on either side is over on the other side without waiting for queued bytes;
//! * after a push is settled its region is not read, and after a window is over its region is not written.

use crate::push::Outgoing;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

/// Carries pushes to peers and lands those that arrive.
pub(crate) trait Transport: Send + Sync + 'static {
    /// Where peers reach this agent.
    fn local_addr(&self) -> SocketAddr;

    /// Whether what arrives is what the peer sent, and nothing else: TLS, or memory that both map. If not, frames carry
    /// hashes, and damage ends a lane.
    fn authenticates(&self) -> bool;

    /// Carries `push` to `peer` in the background. Returns at once, from any thread.
    fn carry(&self, peer: SocketAddr, push: Arc<Outgoing>);

    /// Stops everything, at once; pushes and windows fail. The future resolves when the peers have been told, or after
    /// a bounded time.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}
