//! Connections to peers: one each, made when first needed, shared by all pushes to that peer.
//!
//! Concurrent pushes share one attempt and its outcome, so a dead peer costs each of them one timeout, not a queue of
//! them. A failed or lost connection is replaced by the next push; nothing is retried behind the caller's back.

use super::{CLOSE_INCOMPATIBLE, connect_error, lost_error};
use crate::hello::{HELLO_HEADER_BYTES, Hello, TAIL_BYTES_MAX};
use crate::nixl::Nixl;
use crate::pull::Link;
use crate::shared_memory::SharedMemory;
use crate::window_table::lock;
use crate::{PushError, TransferLimits};
use baton_identity::Role;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use quinn::{ClientConfig, Connection, Endpoint, ReadExactError, ReadToEndError, RecvStream, WriteError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;

/// A connection being made, or the outcome.
type Attempt = Shared<BoxFuture<'static, Result<Arc<Session>, PushError>>>;

/// A connection that stands, and what came of it.
pub(crate) struct Session {
    pub(super) connection: Connection,
    shared_memory: Option<Arc<Link>>,
    nixl: Option<Arc<Link>>,
}

impl Session {
    /// The links that can carry pushes, the best first.
    pub(crate) fn links(&self) -> [Option<&Arc<Link>>; 2] {
        [self.shared_memory.as_ref(), self.nixl.as_ref()].map(|link| link.filter(|link| link.alive()))
    }

    /// A link whose peer is gone tells sooner than the connection does.
    fn usable(&self) -> bool {
        let linked = self.shared_memory.as_ref().is_none_or(|link| link.alive());
        linked && self.connection.close_reason().is_none()
    }
}

/// The connections this agent has dialled.
pub(super) struct Pool {
    endpoint: Endpoint,
    client: ClientConfig,
    hello: Arc<Hello>,
    limits: Arc<TransferLimits>,
    shared_memory: Option<Arc<SharedMemory>>,
    nixl: Option<Arc<Nixl>>,
    runtime: Handle,
    attempts: Mutex<HashMap<SocketAddr, Attempt>>,
}

impl Pool {
    pub(super) fn new(
        endpoint: Endpoint,
        client: ClientConfig,
        hello: Arc<Hello>,
        limits: Arc<TransferLimits>,
        shared_memory: Option<Arc<SharedMemory>>,
        nixl: Option<Arc<Nixl>>,
        runtime: Handle,
    ) -> Self {
        Self {
            endpoint,
            client,
            hello,
            limits,
            shared_memory,
            nixl,
            runtime,
            attempts: Mutex::default(),
        }
    }

    pub(super) fn limits(&self) -> &TransferLimits {
        &self.limits
    }

    /// The connection to `peer`, made if there is none.
    pub(super) async fn session(&self, peer: SocketAddr) -> Result<Arc<Session>, PushError> {
        self.attempt(peer)?.await
    }

    /// Forgets all connections.
    pub(super) fn clear(&self) {
        lock(&self.attempts).clear();
    }

    fn attempt(&self, peer: SocketAddr) -> Result<Attempt, PushError> {
        let mut attempts = lock(&self.attempts);
        if let Some(attempt) = attempts.get(&peer).filter(|attempt| usable(attempt)) {
            return Ok(attempt.clone());
        }
        attempts.retain(|_, attempt| usable(attempt));
        if attempts.len() >= self.limits.connections_max {
            return Err(PushError::Unreachable {
                peer,
                detail: format!(
                    "this agent holds {} connections, the most it may",
                    self.limits.connections_max
                ),
            });
        }
        let attempt = dial(
            self.endpoint.clone(),
            self.client.clone(),
            peer,
            self.hello.clone(),
            self.limits.clone(),
            self.shared_memory.clone(),
            self.nixl.clone(),
        )
        .boxed()
        .shared();
        // Driven on its own, so that it goes on when the push that asked first is dropped.
        self.runtime.spawn(attempt.clone());
        attempts.insert(peer, attempt.clone());
        Ok(attempt)
    }
}

/// Under way, or standing.
fn usable(attempt: &Attempt) -> bool {
    match attempt.peek() {
        None => true,
        Some(Ok(session)) => session.usable(),
        Some(Err(_)) => false,
    }
}

async fn dial(
    endpoint: Endpoint,
    client: ClientConfig,
    peer: SocketAddr,
    hello: Arc<Hello>,
    limits: Arc<TransferLimits>,
    shared_memory: Option<Arc<SharedMemory>>,
    nixl: Option<Arc<Nixl>>,
) -> Result<Arc<Session>, PushError> {
    let attempt = async {
        let connection = endpoint
            .connect_with(client, peer, Role::Worker.dns_name())
            .map_err(|error| PushError::Unreachable {
                peer,
                detail: error.to_string(),
            })?
            .await
            .map_err(|error| connect_error(peer, &error))?;
        let theirs = greet(&connection, &hello).await.map_err(|failure| match failure {
            Failure::Lost(error) => connect_error(peer, &error),
            Failure::Foreign(mismatch) => PushError::Incompatible { peer, mismatch },
        })?;
        if let Some(mismatch) = hello.mismatch(&theirs) {
            connection.close(CLOSE_INCOMPATIBLE, mismatch.as_bytes());
            return Err(PushError::Incompatible { peer, mismatch });
        }
        tracing::debug!(%peer, name = theirs.name, "kv transfer connection established");
        let lost = || {
            let ended = connection.clone();
            async move { lost_error(peer, &ended.closed().await) }
        };
        // The first stream after the hello, where both have NIXL; the peer serves it as the link.
        let nixl = match (nixl, theirs.nixl) {
            (Some(nixl), Some(pushes_max)) => {
                let (send, recv) = connection
                    .open_bi()
                    .await
                    .map_err(|error| connect_error(peer, &error))?;
                Some(nixl.join(send, recv, peer, pushes_max, lost()))
            }
            _ => None,
        };
        let shared_memory = match (shared_memory, theirs.offer) {
            (Some(shared_memory), Some(offer)) => shared_memory.join(&offer, peer, lost()).await,
            _ => None,
        };
        Ok(Arc::new(Session {
            connection,
            shared_memory,
            nixl,
        }))
    };
    match tokio::time::timeout(limits.handshake_timeout, attempt).await {
        Ok(result) => result,
        Err(_) => Err(PushError::Unreachable {
            peer,
            detail: format!("no handshake within {:?}", limits.handshake_timeout),
        }),
    }
}

/// Why no hello came.
pub(super) enum Failure {
    /// The connection is gone.
    Lost(quinn::ConnectionError),
    /// What came is no hello.
    Foreign(String),
}

/// Says hello first and reads the answer.
async fn greet(connection: &Connection, hello: &Hello) -> Result<Hello, Failure> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(Failure::Lost)?;
    send.write_all(&hello.encode()).await.map_err(|error| match error {
        WriteError::ConnectionLost(error) => Failure::Lost(error),
        other => Failure::Foreign(format!("it does not take a hello: {other}")),
    })?;
    // The peer may have closed the stream by now; reading its hello tells.
    let _ = send.finish();
    read_hello(&mut recv).await
}

/// Reads the peer's hello.
pub(super) async fn read_hello(recv: &mut RecvStream) -> Result<Hello, Failure> {
    let failure = |error: ReadExactError| match error {
        ReadExactError::ReadError(quinn::ReadError::ConnectionLost(error)) => Failure::Lost(error),
        other => Failure::Foreign(format!("it sends no whole hello: {other}")),
    };
    let mut header = [0; HELLO_HEADER_BYTES];
    recv.read_exact(&mut header).await.map_err(failure)?;
    let mut name = vec![0; Hello::name_bytes(&header).map_err(Failure::Foreign)?];
    recv.read_exact(&mut name).await.map_err(failure)?;
    // Both sides say nothing but their hello on this stream.
    let tail = recv.read_to_end(TAIL_BYTES_MAX).await.map_err(|error| match error {
        ReadToEndError::Read(quinn::ReadError::ConnectionLost(error)) => Failure::Lost(error),
        other => Failure::Foreign(format!("its hello does not end: {other}")),
    })?;
    Ok(Hello::decode(&header, &name, &tail))
}
