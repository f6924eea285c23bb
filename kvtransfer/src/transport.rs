//! The seam between pushes and what carries them, and the choice.
//!
//! A QUIC connection to the peer comes first, always: it authenticates both sides and finds out whether they can work
//! together. If they then find that they can share memory, that carries every push whose region can be shared. What is
//! left goes over TCP if the peer takes that and it connects, else over QUIC itself; see [`crate::network`]. Control
//! messages stay on QUIC, where they cost no connection. Between hosts NIXL comes before
//! both if the two sides have it turned on.
//!
//! A transport is made with the agent's window table, into which it lands what arrives, and promises:
//!
//! * every push handed to [`Transport::carry`] is settled, in bounded time once the peer is gone;
//! * a push that is given up on either side is over on the other side without waiting for queued bytes;
//! * after a push is settled, no byte of its region that is read can reach a completed window, and after a window is
//!   over its region is not written.

use crate::PushError;
use crate::network::Network;
use crate::nixl::Nixl;
use crate::pull::Carried;
use crate::push::Outgoing;
use crate::shared_memory::SharedMemory;
use crate::wire::CONTROL_WINDOW;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use tokio::runtime::Handle;

/// What an agent may carry pushes with, beside QUIC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportOptions {
    /// Share memory with agents on the same host that do, too. Linux only; elsewhere this changes nothing.
    pub shared_memory: bool,
    /// Push over TCP to agents that do, too, and take such pushes, on the port number of the UDP socket.
    pub tcp: bool,
    /// Read from peers through NVIDIA's NIXL, where its library is found at run time and the peer has it, too. Linux
    /// only. Off by default.
    pub nixl: bool,
}

impl Default for TransportOptions {
    fn default() -> Self {
        Self {
            shared_memory: true,
            tcp: true,
            nixl: false,
        }
    }
}

/// What carried a push.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TransportKind {
    /// QUIC over UDP, encrypted.
    Quic,
    /// TLS over TCP.
    Tcp,
    /// The receiver copied out of the sender's memory.
    SharedMemory,
    /// The receiver read from the sender's memory through NIXL.
    Nixl,
}

impl std::fmt::Display for TransportKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Quic => "quic",
            Self::Tcp => "tcp",
            Self::SharedMemory => "shared_memory",
            Self::Nixl => "nixl",
        })
    }
}

/// Carries pushes to peers and lands those that arrive.
pub(crate) trait Transport: Send + Sync + 'static {
    /// Where peers reach this agent.
    fn local_addr(&self) -> SocketAddr;

    /// Carries `push` to `peer` in the background. Returns at once, from any thread.
    fn carry(&self, peer: SocketAddr, push: Arc<Outgoing>);

    /// Stops everything, at once; pushes and windows fail. The future resolves when the peers have been told, or after
    /// a bounded time.
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// Carries each push over the best transport that both sides have.
pub(crate) struct Best {
    network: Arc<Network>,
    shared_memory: Option<Arc<SharedMemory>>,
    nixl: Option<Arc<Nixl>>,
    runtime: Handle,
}

impl Best {
    pub(crate) fn new(
        network: Network,
        shared_memory: Option<Arc<SharedMemory>>,
        nixl: Option<Arc<Nixl>>,
        runtime: Handle,
    ) -> Self {
        Self {
            network: Arc::new(network),
            shared_memory,
            nixl,
            runtime,
        }
    }
}

/// Settles the push if its task ends for any other reason, a stopped runtime included.
struct Settle(Arc<Outgoing>);

impl Drop for Settle {
    fn drop(&mut self) {
        self.0.fail(PushError::AgentClosed);
    }
}

impl Transport for Best {
    fn local_addr(&self) -> SocketAddr {
        self.network.local_addr()
    }

    fn carry(&self, peer: SocketAddr, push: Arc<Outgoing>) {
        // Made before the future is first polled, so that a push handed to a stopped runtime fails instead of hanging.
        let settle = Settle(push);
        let network = self.network.clone();
        self.runtime.spawn(async move {
            let push = &settle.0;
            let session = tokio::select! {
                biased;
                _ = push.settled() => return,
                session = network.session(peer) => session,
            };
            let session = match session {
                Ok(session) => session,
                Err(error) => return push.fail(error),
            };
            // A message carries no bytes that would be worth another connection.
            if push.window() == CONTROL_WINDOW {
                return network.carry(peer, push, None).await;
            }
            for link in session.links().into_iter().flatten() {
                match link.carry(push).await {
                    Carried::Over => return,
                    Carried::NotShared => {}
                    // What it carried goes on over QUIC, which also finds out whether the peer lives.
                    Carried::Broke(wait) => {
                        tokio::select! {
                            biased;
                            _ = push.settled() => return,
                            () = tokio::time::sleep(wait) => {}
                        }
                        return network.carry(peer, push, None).await;
                    }
                }
            }
            network.carry(peer, push, Some(&session)).await;
        });
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        if let Some(shared_memory) = &self.shared_memory {
            shared_memory.close();
        }
        if let Some(nixl) = &self.nixl {
            nixl.close();
        }
        Box::pin(self.network.close())
    }
}
