//! Connections to peers: a few each, made when first needed, shared by all pushes to that peer.
//!
//! quinn drives a connection (sealing, opening, acknowledging) in one task, so one connection is one core at most. A push
//! goes to the connection to its peer that carries the fewest; only when all are busy another one is made, so that a
//! quiet pair keeps one. Concurrent pushes share an attempt and its outcome, so a dead peer costs each of them one
//! timeout, not a queue of them. A failed or lost connection is replaced by the next push; nothing is retried behind
//! the caller's back.

use super::{CLOSE_INCOMPATIBLE, connect_error};
use crate::hello::{HELLO_HEADER_BYTES, Hello};
use crate::window_table::lock;
use crate::{PushError, TransferLimits};
use baton_identity::Role;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use quinn::{ClientConfig, Connection, Endpoint, ReadExactError, RecvStream, WriteError};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::runtime::Handle;

/// Most connections to one peer. Four cores' worth of QUIC is more than a 25 Gbit/s network takes; every one costs its
/// flow windows and keep-alives on both sides.
const CONNECTIONS_PER_PEER: usize = 4;

/// A connection being made, or the outcome.
type Attempt = Shared<BoxFuture<'static, Result<Connection, PushError>>>;

/// A place for a connection to a peer.
struct Slot {
    attempt: Attempt,
    /// One reference is held here and one by each push on the connection.
    load: Arc<()>,
}

/// A connection, and the push's share in its load: to be kept as long as the push is on it.
pub(super) struct Lease {
    pub(super) connection: Connection,
    _load: Arc<()>,
}

/// The connections this agent has dialled.
pub(super) struct Pool {
    endpoint: Endpoint,
    client: ClientConfig,
    hello: Arc<Hello>,
    limits: Arc<TransferLimits>,
    runtime: Handle,
    slots: Mutex<HashMap<SocketAddr, Vec<Slot>>>,
}

impl Pool {
    pub(super) fn new(
        endpoint: Endpoint,
        client: ClientConfig,
        hello: Arc<Hello>,
        limits: Arc<TransferLimits>,
        runtime: Handle,
    ) -> Self {
        Self {
            endpoint,
            client,
            hello,
            limits,
            runtime,
            slots: Mutex::default(),
        }
    }

    pub(super) fn limits(&self) -> &TransferLimits {
        &self.limits
    }

    /// A connection to `peer`, made if there is none to spare.
    pub(super) async fn connection(&self, peer: SocketAddr) -> Result<Lease, PushError> {
        let (attempt, load) = self.attempt(peer)?;
        Ok(Lease {
            connection: attempt.await?,
            _load: load,
        })
    }

    /// Forgets all connections.
    pub(super) fn clear(&self) {
        lock(&self.slots).clear();
    }

    fn attempt(&self, peer: SocketAddr) -> Result<(Attempt, Arc<()>), PushError> {
        let max = self.limits.connections_max;
        let mut slots = lock(&self.slots);
        slots.retain(|_, here| {
            here.retain(|slot| usable(&slot.attempt));
            !here.is_empty()
        });
        let held: usize = slots.values().map(Vec::len).sum();
        let here = slots.entry(peer).or_default();
        let load = |slot: &&Slot| Arc::strong_count(&slot.load);
        if let Some(slot) = here.iter().min_by_key(load)
            && (load(&slot) == 1 || here.len() >= CONNECTIONS_PER_PEER || held >= max)
        {
            return Ok((slot.attempt.clone(), slot.load.clone()));
        }
        if held >= max {
            let detail = format!("this agent holds {max} connections, the most it may");
            return Err(PushError::Unreachable { peer, detail });
        }
        let slot = self.dial(peer);
        let found = (slot.attempt.clone(), slot.load.clone());
        here.push(slot);
        Ok(found)
    }

    fn dial(&self, peer: SocketAddr) -> Slot {
        let attempt = dial(
            self.endpoint.clone(),
            self.client.clone(),
            peer,
            self.hello.clone(),
            self.limits.clone(),
        )
        .boxed()
        .shared();
        // Driven on its own, so that it goes on when the push that asked first is dropped.
        self.runtime.spawn(attempt.clone());
        Slot {
            attempt,
            load: Arc::default(),
        }
    }
}

/// Under way, or standing.
fn usable(attempt: &Attempt) -> bool {
    match attempt.peek() {
        None => true,
        Some(Ok(connection)) => connection.close_reason().is_none(),
        Some(Err(_)) => false,
    }
}

async fn dial(
    endpoint: Endpoint,
    client: ClientConfig,
    peer: SocketAddr,
    hello: Arc<Hello>,
    limits: Arc<TransferLimits>,
) -> Result<Connection, PushError> {
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
        Ok(connection)
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
    Ok(Hello::decode(&header, &name))
}
