//! RDMA and whatever else NVIDIA's NIXL reaches, through its library found at run time.
//!
//! ```text
//! dialler (sender)                                owner (receiver)
//! QUIC: hello {nixl}                    ◄──►      hello {nixl}
//! first stream after it: the link       ──►       serves it as one of crate::pull
//! REGION_AT base, len, metadata         ──►       tells its library of the peer's memory
//! ... OPEN, PULL                        ──►       reads peer memory → region under the window's fence
//! ```
//!
//! A receiver *reads* from the sender's registered memory. So the receiver decides what lands and when, and the fences
//! of a window hold as with any other transport: reads are waited for while the window's lock is held, so once a window is
//! over, none into it is under way. One-sided writes by the sender could not be fenced without taking the memory's
//! registration back.
//!
//! # The invariants
//!
//! 1. **Who.** Metadata, which the library parses itself, is taken only on the authenticated connection, from peers whose
//!    hello says that they have NIXL, and only if this agent's operator turned it on.
//! 2. **Fence.** A read ends within [`peer::READ_TIMEOUT`] or is cancelled, and then the peer is forgotten, which closes
//!    the connections that could still deliver it. Its pushes go on over QUIC.
//! 3. **Registered as long as it is used.** Reads go only from and to registered memory, whose region lives as long as
//!    its registration.
//!
//! Not here: device memory, until there is a CUDA backend, and the control messages, which travel with the session.

#[allow(unsafe_code)]
mod agent;
#[allow(unsafe_code)]
mod library;
mod peer;

pub(crate) use agent::{NixlAgent, NixlPiece};
pub(crate) use peer::NixlPeer;

use crate::pull::{Copiers, Link, Receiving, Socket, receive, send};
use crate::transport::TransportKind;
use crate::window_table::WindowTable;
use crate::{PushError, TransferLimits};
use peer::Peers;
use quinn::{RecvStream, SendStream};
use std::net::SocketAddr;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Why NIXL could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NixlError {
    /// There is no library, or not one that fits.
    #[error("NIXL's library cannot be used: {0}")]
    Library(String),
    /// A call failed.
    #[error("NIXL's {call} failed with status {status}; NIXL_LOG_LEVEL=DEBUG shows why")]
    Call {
        /// Which.
        call: &'static str,
        /// What it answered.
        status: i32,
    },
    /// A name that cannot be handed over.
    #[error("the name {0:?} contains a zero byte")]
    Name(String),
    /// The peer was given up after a read that failed.
    #[error("the peer's memory could not be read before; it is not tried again on this connection")]
    GivenUp,
    /// Metadata of another process than before.
    #[error("the metadata are another agent's than those before on this connection")]
    OtherPeer,
}

/// What an agent needs for NIXL with others.
pub(crate) struct Nixl {
    agent: Arc<NixlAgent>,
    peers: Arc<Peers>,
    copiers: Arc<Copiers>,
    table: Arc<WindowTable>,
    limits: Arc<TransferLimits>,
    runtime: Handle,
    /// Dropped or set to end every link.
    stop: watch::Sender<bool>,
}

impl Nixl {
    /// Loads the library and starts its agent. `None`, with a warning in the log, if that is not to be had.
    pub(crate) fn open(
        name: &str,
        table: Arc<WindowTable>,
        limits: Arc<TransferLimits>,
        runtime: Handle,
    ) -> Option<Arc<Self>> {
        let mut unique = [0; 8];
        let random = rustls::crypto::ring::default_provider().secure_random;
        random.fill(&mut unique).ok()?;
        // Unlike a worker's id, its library's name must not outlive the process.
        let agent = NixlAgent::open(&format!("{name}-{:016x}", u64::from_le_bytes(unique)));
        let agent = agent
            .map_err(|error| tracing::warn!(%error, "NIXL is turned on and cannot be used; the other transports are"))
            .ok()?;
        tracing::info!("NIXL is ready for kv transfers");
        Some(Arc::new(Self {
            peers: Peers::new(agent.clone()),
            agent,
            copiers: Arc::new(Copiers::new(runtime.clone())),
            table,
            limits,
            runtime,
            stop: watch::Sender::new(false),
        }))
    }

    /// Makes the link that is the given stream. It ends, and its pushes fail, when `lost` resolves.
    pub(crate) fn join(
        &self,
        send: SendStream,
        recv: RecvStream,
        peer: SocketAddr,
        pushes_max: u32,
        lost: impl Future<Output = PushError> + Send + 'static,
    ) -> Arc<Link> {
        let pushes_max = pushes_max.min(self.limits.pushes_per_connection_max);
        let socket = Socket::quic(send, recv);
        let link = Link::new(
            socket,
            peer,
            Some(self.agent.clone()),
            pushes_max,
            self.limits.stall_timeout,
        );
        self.runtime.spawn(send::run(link.clone(), lost, self.stop.subscribe()));
        link
    }

    /// Lands what arrives on the link that is the given stream, until that ends, as it does with its connection.
    pub(crate) fn serve(self: &Arc<Self>, send: SendStream, recv: RecvStream, peer: Arc<str>) {
        let receiving = Receiving {
            copiers: self.copiers.clone(),
            table: self.table.clone(),
            limits: self.limits.clone(),
            nixl: Some(self.clone()),
            stop: self.stop.subscribe(),
        };
        let socket = Arc::new(Socket::quic(send, recv));
        let void = std::future::pending();
        self.runtime
            .spawn(receive::serve(socket, peer, TransportKind::Nixl, void, receiving));
    }

    /// Learns from `metadata` of a peer, or of more memory of one that is known. May take a while.
    pub(crate) fn peer(&self, metadata: &[u8], known: Option<Arc<NixlPeer>>) -> Result<Arc<NixlPeer>, NixlError> {
        self.peers.learn(metadata, known)
    }

    /// Ends every link.
    pub(crate) fn close(&self) {
        self.stop.send_replace(true);
    }
}
