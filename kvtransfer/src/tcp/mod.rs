//! The TCP transport: TLS 1.3 over one TCP connection per lane in flight, pooled.
//!
//! It carries the same frames under the same certificates and hellos as QUIC, and exists because it measures faster
//! where QUIC's per-packet work in user space is the bound: loopback and fast networks (docs/kv-transfer.md has the
//! figures). The kernel segments, acknowledges and paces; this process seals and opens large records.
//!
//! # The invariants
//!
//! 1. A connection carries one lane at a time, so a lane is never behind another's bytes. END frames of both sides
//!    separate lanes: what arrives before the peer's END belongs to the lane before.
//! 2. A lane that breaks takes its connection with it, but not the push. Whatever is under way ends there. The sender's
//!    reason goes ahead of everything it has not sealed yet; the receiver's refusal has the other direction to itself.
//! 3. During a lane both sides speak at least every `keep_alive` and give the other up after `idle_timeout` of silence,
//!    so a stopped process is found like a dead one. Idle connections are left to the kernel's keep-alive; one that
//!    has ended is found when it is taken.
//! 4. Back-pressure is TCP's: the receiver reads only what it lands at once, the sender seals only what the kernel took.
//!
//! What the bytes mean is not decided here, and neither is when to prefer this transport.

mod channel;
mod dial;
mod frame;
mod receive;
mod send;
mod tls;

use crate::hello::Hello;
use crate::push::{Lane, Outgoing};
use crate::quic::Session;
use crate::window_table::WindowTable;
use crate::{PushError, SetupError, TransferLimits};
use baton_identity::{Identity, Role};
use dial::{Connection, Pool};
use receive::Receiver;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// The protocol in TLS. Without a version: versions are compared in the hello, which can say what is wrong.
const ALPN: &[u8] = b"baton-kv";

/// How long closing waits for the tasks to let go of their connections; they need no time but the scheduler's.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// The TCP transport of one agent.
pub(crate) struct TcpTransport {
    pool: Arc<Pool>,
    runtime: Handle,
    tasks: TaskTracker,
    closing: CancellationToken,
}

impl TcpTransport {
    /// Binds the listener and begins to accept. Must be called inside a tokio runtime.
    pub(crate) fn bind(
        addr: SocketAddr,
        identity: &Identity,
        hello: Hello,
        table: Arc<WindowTable>,
        limits: Arc<TransferLimits>,
    ) -> Result<Self, SetupError> {
        let runtime = Handle::try_current().map_err(|_| SetupError::NoRuntime)?;
        let tls = |error: baton_identity::IdentityError| SetupError::Identity(error.to_string());
        let server = identity.quic_server(&[Role::Worker], ALPN).map_err(tls)?;
        let client = identity.quic_client(ALPN).map_err(tls)?;

        let bind_error = |source: std::io::Error| SetupError::Bind { addr, source };
        let listener = std::net::TcpListener::bind(addr).map_err(bind_error)?;
        listener.set_nonblocking(true).map_err(bind_error)?;
        let listener = TcpListener::from_std(listener).map_err(bind_error)?;

        let hello = Arc::new(hello);
        let receiver = Arc::new(Receiver {
            server: Arc::new(server),
            hello: hello.clone(),
            table,
            limits: limits.clone(),
        });
        let transport = Self {
            pool: Arc::new(Pool::new(client, hello, limits)),
            runtime,
            tasks: TaskTracker::new(),
            closing: CancellationToken::new(),
        };
        let accept = receive::accept(listener, receiver, transport.tasks.clone(), transport.closing.clone());
        transport.spawn(accept);
        let pool = transport.pool.clone();
        transport.spawn(async move { pool.sweep().await });
        Ok(transport)
    }

    /// Runs `task` until it ends or the transport is closed.
    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let closing = self.closing.clone();
        let bounded = async move {
            closing.run_until_cancelled_owned(task).await;
        };
        self.tasks.spawn_on(bounded, &self.runtime);
    }

    /// A connection to `peer` with nothing on it.
    pub(crate) async fn connect(&self, peer: SocketAddr) -> Result<Connection, PushError> {
        let taken = self.closing.run_until_cancelled(self.pool.take(peer)).await;
        taken.unwrap_or(Err(PushError::AgentClosed))
    }

    /// Carries what `lane` takes of `push`, until that is settled or the lane breaks: how long to wait for another one, if
    /// there is to be one. `session` is the one with the same peer.
    pub(crate) async fn carry(
        &self,
        mut connection: Connection,
        session: &Session,
        push: &Arc<Outgoing>,
        lane: &mut Lane,
    ) -> Option<Duration> {
        let limits = self.pool.limits();
        let carrying = send::carry(&mut connection, session, push, lane, limits);
        let outcome = self.closing.run_until_cancelled(carrying).await;
        match outcome.unwrap_or(Err(PushError::AgentClosed)) {
            Ok(()) => {
                self.pool.keep(connection);
                None
            }
            Err(error) => {
                // A refusing receiver knows, and waits for the connection to close; a lost one hears nothing.
                let hears = !matches!(
                    error,
                    PushError::Refused(_) | PushError::PeerLost { .. } | PushError::PeerClosed { .. }
                );
                let (wait, reason) = lane.replies().give_up(error);
                if hears {
                    self.spawn(connection.abort(reason.code()));
                }
                wait
            }
        }
    }

    /// Closes everything at once. The future resolves when the tasks have let go of their connections, or after a bounded
    /// time.
    pub(crate) fn close(&self) -> impl Future<Output = ()> + Send + use<> {
        self.closing.cancel();
        self.tasks.close();
        self.pool.clear();
        let tasks = self.tasks.clone();
        async move {
            // The kernel tells the peers when the tasks drop their sockets.
            let _ = tokio::time::timeout(CLOSE_TIMEOUT, tasks.wait()).await;
        }
    }
}
