//! The QUIC transport: one UDP socket, a few connections per peer and direction, one stream per push.
//!
//! Mutual TLS with role-bound certificates decides who may talk; the hello on the first stream decides whether talking
//! makes sense. Keep-alives and the idle timeout find a dead peer. A stream's two directions are independent, so a
//! refusal overtakes queued data, and a reset overtakes everything. What the bytes mean is not decided here.

mod config;
mod dial;
mod receive;
mod send;

use crate::hello::Hello;
use crate::nixl::Nixl;
use crate::push::{Lane, Outgoing};
use crate::shared_memory::SharedMemory;
use crate::window_table::WindowTable;
use crate::{PushError, SetupError, TransferLimits};
use baton_identity::Identity;
use dial::Pool;
pub(crate) use dial::Session;
use quinn::{ConnectionError, Endpoint, VarInt};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;

/// Close code: this agent shuts down.
const CLOSE_SHUTDOWN: VarInt = VarInt::from_u32(1);
/// Close code: the hellos do not match; the reason is the sentence.
const CLOSE_INCOMPATIBLE: VarInt = VarInt::from_u32(2);
/// Stop code: the reply stream says why.
const STOP_REFUSED: VarInt = VarInt::from_u32(1);

/// How long closing waits for the peers to hear of it. A round trip suffices; they notice on their own otherwise.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The QUIC transport of one agent.
pub(crate) struct QuicTransport {
    endpoint: Endpoint,
    local_addr: SocketAddr,
    pool: Arc<Pool>,
}

impl QuicTransport {
    /// Binds the socket and begins to accept. Must be called inside a tokio runtime.
    pub(crate) fn bind(
        addr: SocketAddr,
        identity: &Identity,
        hello: Hello,
        table: Arc<WindowTable>,
        limits: Arc<TransferLimits>,
        shared_memory: Option<Arc<SharedMemory>>,
        nixl: Option<Arc<Nixl>>,
    ) -> Result<Self, SetupError> {
        let runtime = Handle::try_current().map_err(|_| SetupError::NoRuntime)?;
        let (endpoint, client) = config::endpoint(addr, identity, &limits)?;
        let local_addr = endpoint
            .local_addr()
            .map_err(|source| SetupError::Bind { addr, source })?;
        let hello = Arc::new(hello);
        let greeting = receive::Greeting {
            hello: hello.clone(),
            shared_memory: shared_memory.clone(),
            nixl: nixl.clone(),
        };
        runtime.spawn(receive::accept(endpoint.clone(), greeting, table, limits.clone()));
        Ok(Self {
            pool: Arc::new(Pool::new(
                endpoint.clone(),
                client,
                hello,
                limits,
                shared_memory,
                nixl,
                runtime,
            )),
            endpoint,
            local_addr,
        })
    }

    /// Where peers reach this agent.
    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The authenticated connection to `peer`, made if there is none.
    pub(crate) async fn session(&self, peer: SocketAddr) -> Result<Arc<Session>, PushError> {
        self.pool.session(peer).await
    }

    /// Carries what `lane` takes of `push`, until that is settled or the lane breaks: how long to wait for another one, if
    /// there is to be one.
    pub(crate) async fn carry(&self, peer: SocketAddr, push: &Arc<Outgoing>, lane: &mut Lane) -> Option<Duration> {
        send::carry(&self.pool, peer, push, lane).await
    }

    /// Closes everything at once. The future resolves when the peers have been told, or after a bounded time.
    pub(crate) fn close(&self) -> impl Future<Output = ()> + Send + use<> {
        self.endpoint.close(CLOSE_SHUTDOWN, b"the agent is shutting down");
        self.pool.clear();
        let endpoint = self.endpoint.clone();
        async move {
            // Too late to tell anybody after the timeout; nothing to do about it.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, endpoint.wait_idle()).await;
        }
    }
}

/// What a failure before or during the hello means to a push.
fn connect_error(peer: SocketAddr, error: &ConnectionError) -> PushError {
    // TLS alerts are transport errors 0x100 to 0x1ff (RFC 9001, 4.8).
    let tls = |code: quinn::TransportErrorCode| (0x100..0x200).contains(&u64::from(code));
    let detail = error.to_string();
    match error {
        ConnectionError::TransportError(cause) if tls(cause.code) => PushError::Identity { peer, detail },
        ConnectionError::ConnectionClosed(cause) if tls(cause.error_code) => PushError::Identity { peer, detail },
        ConnectionError::ApplicationClosed(cause) if cause.error_code == CLOSE_INCOMPATIBLE => {
            PushError::Incompatible {
                peer,
                mismatch: String::from_utf8_lossy(&cause.reason).into_owned(),
            }
        }
        ConnectionError::LocallyClosed => PushError::AgentClosed,
        _ => PushError::Unreachable { peer, detail },
    }
}

/// What the loss of an established connection means to a push.
fn lost_error(peer: SocketAddr, error: &ConnectionError) -> PushError {
    match error {
        ConnectionError::LocallyClosed => PushError::AgentClosed,
        ConnectionError::ApplicationClosed(_) => PushError::PeerClosed { peer },
        _ => PushError::PeerLost {
            peer,
            detail: error.to_string(),
        },
    }
}
