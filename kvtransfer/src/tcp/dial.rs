//! Connections to peers: one for each lane in flight, kept for the next lane when it is done.
//!
//! A lane takes an idle connection to its peer or makes one; nothing is retried behind the caller's back. Their number
//! is bounded: at the bound an idle connection to whomever is closed first; with none idle a lane waits, and the next
//! connection that falls idle is closed for it.

use super::channel::{Broken, Channel};
use super::frame::Frame;
use super::tls::Tls;
use crate::hello::Hello;
use crate::window_table::lock;
use crate::{PushError, TransferLimits};
use baton_identity::Role;
use rustls::ClientConfig;
use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

/// How long a connection may wait for its next push. Long enough for a conversation's next turn; shorter than
/// [`super::receive::IDLE_MAX`], so that a push seldom meets a connection that the receiver is just closing.
const IDLE_MAX: Duration = Duration::from_secs(30);

/// Longest the making of a connection may take; QUIC carries the push otherwise. The peer has just answered over QUIC, so
/// only a path without TCP, or a starved CPU, needs longer.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The connections this agent has dialled.
pub(super) struct Pool {
    client: Arc<ClientConfig>,
    hello: Arc<Hello>,
    limits: Arc<TransferLimits>,
    permits: Arc<Semaphore>,
    /// Pushes that wait for a permit.
    waiting: AtomicUsize,
    /// The longest idle first.
    idle: Mutex<VecDeque<(Connection, Instant)>>,
}

/// A connection of the pool.
pub(crate) struct Connection {
    pub(super) channel: Channel,
    pub(super) peer: SocketAddr,
    /// Lanes that this side has ended and the peer has not yet: so many END frames are to come before what the peer
    /// says is about the present lane.
    pub(super) owed: u32,
    _permit: OwnedSemaphorePermit,
}

impl Connection {
    /// Takes what the peer has said and hands `take` what is about the present lane, until that returns false.
    pub(super) fn receive(&mut self, mut take: impl FnMut(Frame<'_>) -> bool) -> Result<(), Broken> {
        let owed = &mut self.owed;
        self.channel.receive(|frame| match frame {
            Frame::End if *owed > 0 => {
                *owed -= 1;
                true
            }
            Frame::Data(_) if *owed > 0 => true,
            frame => take(frame),
        })
    }

    /// Tells the peer that the lane is given up, in bounded time.
    pub(super) async fn abort(self, code: u32) {
        self.channel.abort(code).await;
    }
}

/// Counts a waiting push while it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    pub(super) fn new(client: ClientConfig, hello: Arc<Hello>, limits: Arc<TransferLimits>) -> Self {
        Self {
            client: Arc::new(client),
            hello,
            permits: Arc::new(Semaphore::new(limits.connections_max)),
            waiting: AtomicUsize::new(0),
            limits,
            idle: Mutex::default(),
        }
    }

    pub(super) fn limits(&self) -> &TransferLimits {
        &self.limits
    }

    /// A connection to `peer` with nothing on it.
    pub(super) async fn take(&self, peer: SocketAddr) -> Result<Connection, PushError> {
        while let Some(mut connection) = self.take_idle(peer) {
            // A ping that crossed the last reply may be there; an end of the connection must not.
            let mut quiet = true;
            let alive = connection.receive(|frame| {
                quiet &= matches!(frame, Frame::Ping);
                quiet
            });
            if alive.is_ok() && quiet {
                return Ok(connection);
            }
        }
        let permit = self.permit().await?;
        let limit = self.limits.handshake_timeout.min(CONNECT_TIMEOUT);
        match timeout(limit, self.dial(peer)).await {
            Ok(channel) => Ok(Connection {
                channel: channel?,
                peer,
                owed: 0,
                _permit: permit,
            }),
            Err(_) => Err(PushError::Unreachable {
                peer,
                detail: format!("no handshake within {limit:?}"),
            }),
        }
    }

    /// Keeps a connection whose lane has been ended.
    pub(super) fn keep(&self, connection: Connection) {
        if connection.channel.flushed() {
            let mut idle = lock(&self.idle);
            idle.push_back((connection, Instant::now()));
            // Whoever waits has counted itself before it looked here for something to close.
            if self.waiting.load(Ordering::Relaxed) > 0 {
                idle.pop_front();
            }
        }
    }

    /// Closes connections that nobody has used for a while.
    pub(super) async fn sweep(&self) {
        loop {
            tokio::time::sleep(IDLE_MAX / 4).await;
            let mut idle = lock(&self.idle);
            while idle.front().is_some_and(|(_, since)| since.elapsed() > IDLE_MAX) {
                idle.pop_front();
            }
        }
    }

    /// Closes all idle connections.
    pub(super) fn clear(&self) {
        lock(&self.idle).clear();
    }

    /// The one used last: its windows and caches are warmest, and the others may age.
    fn take_idle(&self, peer: SocketAddr) -> Option<Connection> {
        let mut idle = lock(&self.idle);
        let at = idle.iter().rposition(|(connection, _)| connection.peer == peer)?;
        idle.remove(at).map(|(connection, _)| connection)
    }

    async fn permit(&self) -> Result<OwnedSemaphorePermit, PushError> {
        if let Ok(permit) = self.permits.clone().try_acquire_owned() {
            return Ok(permit);
        }
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        // Frees a permit, for this push or for one that waits already.
        drop(lock(&self.idle).pop_front());
        let limit = self.limits.stall_timeout;
        match timeout(limit, self.permits.clone().acquire_owned()).await {
            Ok(permit) => permit.map_err(|_| PushError::AgentClosed),
            Err(_) => Err(PushError::Stalled { limit }),
        }
    }

    async fn dial(&self, peer: SocketAddr) -> Result<Channel, PushError> {
        let unreachable = |detail: String| PushError::Unreachable { peer, detail };
        let name = ServerName::try_from(Role::Worker.dns_name()).map_err(|error| unreachable(error.to_string()))?;
        let session = UnbufferedClientConnection::new(self.client.clone(), name)
            .map_err(|error| unreachable(error.to_string()))?;
        let socket = TcpStream::connect(peer)
            .await
            .map_err(|error| unreachable(error.to_string()))?;
        let mut channel = Channel::new(socket, Tls::client(session), &self.limits);
        let theirs = channel
            .introduce(&self.hello, true)
            .await
            .map_err(|broken| match broken {
                Broken::Lost(detail) => unreachable(detail),
                Broken::Tls(error) => PushError::Identity {
                    peer,
                    detail: error.to_string(),
                },
                Broken::Foreign(mismatch) => PushError::Incompatible { peer, mismatch },
            })?;
        match self.hello.mismatch(&theirs) {
            Some(mismatch) => Err(PushError::Incompatible { peer, mismatch }),
            None => {
                tracing::debug!(%peer, name = theirs.name, "kv transfer connection established over tcp");
                Ok(channel)
            }
        }
    }
}
