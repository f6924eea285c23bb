//! Connections to peers: a few each, made when first needed, shared by all pushes to that peer.
//!
//! quinn drives a connection (sealing, opening, acknowledging) in one task, so one connection is one core at most. A lane
//! goes to the connection to its peer that carries the fewest; only when all are busy another one is made, so that a
//! quiet pair keeps one. Concurrent pushes share an attempt and its outcome, so a dead peer costs each of them one
//! timeout, not a queue of them. A failed or lost connection is replaced by the next push; nothing is retried behind
//! the caller's back. The first connection is the one that shared memory and TCP are agreed on over.

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
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

/// Most connections to one peer. Four cores' worth of QUIC is more than a 25 Gbit/s network takes; every one costs its
/// flow windows and keep-alives on both sides.
const CONNECTIONS_PER_PEER: usize = 4;

/// How long nobody tries TCP to a peer after that has failed. A path that lets only UDP pass stays like that, and finding it
/// out costs one push up to the time a handshake may take.
const TCP_AGAIN: Duration = Duration::from_secs(15);

/// A connection being made, or the outcome.
type Attempt = Shared<BoxFuture<'static, Result<Arc<Session>, PushError>>>;

/// A connection that stands, and what came of it.
pub(crate) struct Session {
    pub(super) connection: Connection,
    shared_memory: Option<Arc<Link>>,
    nixl: Option<Arc<Link>>,
    tcp: Mutex<Tcp>,
}

/// What is known of TCP to the peer.
enum Tcp {
    /// It does not listen.
    Absent,
    /// It listens.
    Open,
    /// It listens, but could not be reached at that time.
    Failed(Instant),
}

impl Session {
    /// The links that can carry pushes, the best first.
    pub(crate) fn links(&self) -> [Option<&Arc<Link>>; 2] {
        [self.shared_memory.as_ref(), self.nixl.as_ref()].map(|link| link.filter(|link| link.alive()))
    }

    /// Whether TCP to the peer is worth a try.
    pub(crate) fn try_tcp(&self) -> bool {
        match *lock(&self.tcp) {
            Tcp::Absent => false,
            Tcp::Open => true,
            Tcp::Failed(at) => at.elapsed() > TCP_AGAIN,
        }
    }

    /// The peer could not be reached over TCP: for a while nobody tries.
    pub(crate) fn tcp_failed(&self) {
        *lock(&self.tcp) = Tcp::Failed(Instant::now());
    }

    /// Resolves once the connection has ended, with what that means to pushes.
    pub(crate) async fn lost(&self) -> PushError {
        lost_error(self.connection.remote_address(), &self.connection.closed().await)
    }

    /// A link whose peer is gone tells sooner than the connection does.
    fn usable(&self) -> bool {
        let linked = self.shared_memory.as_ref().is_none_or(|link| link.alive());
        linked && self.connection.close_reason().is_none()
    }
}

/// A place for a connection to a peer.
struct Slot {
    attempt: Attempt,
    /// The one that other transports are asked for through.
    first: bool,
    /// One reference is held here and one by each lane on the connection.
    load: Arc<()>,
}

/// A connection, and the lane's share in its load: to be kept as long as the lane is on it.
pub(super) struct Lease {
    pub(super) session: Arc<Session>,
    _load: Arc<()>,
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
    slots: Mutex<HashMap<SocketAddr, Vec<Slot>>>,
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
            slots: Mutex::default(),
        }
    }

    pub(super) fn limits(&self) -> &TransferLimits {
        &self.limits
    }

    /// The first connection to `peer`, made if there is none.
    pub(super) async fn session(&self, peer: SocketAddr) -> Result<Arc<Session>, PushError> {
        let (attempt, _) = self.attempt(peer, |here| here.iter().find(|slot| slot.first))?;
        attempt.await
    }

    /// A connection to `peer` for one lane, made if there is none to spare.
    pub(super) async fn lease(&self, peer: SocketAddr) -> Result<Lease, PushError> {
        let (attempt, load) = self.attempt(peer, |here| {
            let load = |slot: &&Slot| Arc::strong_count(&slot.load);
            here.iter()
                .min_by_key(load)
                .filter(|slot| load(slot) == 1 || here.len() >= CONNECTIONS_PER_PEER)
        })?;
        Ok(Lease {
            session: attempt.await?,
            _load: load,
        })
    }

    /// Forgets all connections.
    pub(super) fn clear(&self) {
        lock(&self.slots).clear();
    }

    /// The place that `choose` takes of those to `peer`, or a new one, or any if there may be no new one.
    fn attempt(
        &self,
        peer: SocketAddr,
        choose: impl FnOnce(&[Slot]) -> Option<&Slot>,
    ) -> Result<(Attempt, Arc<()>), PushError> {
        let max = self.limits.connections_max;
        let mut slots = lock(&self.slots);
        slots.retain(|_, here| {
            here.retain(|slot| usable(&slot.attempt));
            !here.is_empty()
        });
        let held: usize = slots.values().map(Vec::len).sum();
        let here = slots.entry(peer).or_default();
        let any = here.first().filter(|_| held >= max);
        if let Some(slot) = choose(here).or(any) {
            return Ok((slot.attempt.clone(), slot.load.clone()));
        }
        if held >= max {
            let detail = format!("this agent holds {max} connections, the most it may");
            return Err(PushError::Unreachable { peer, detail });
        }
        let slot = self.dial(peer, !here.iter().any(|slot| slot.first));
        let found = (slot.attempt.clone(), slot.load.clone());
        here.push(slot);
        Ok(found)
    }

    fn dial(&self, peer: SocketAddr, first: bool) -> Slot {
        let mut hello = self.hello.clone();
        if !first {
            // One link per peer is enough: this asks for no other.
            let hello = Arc::make_mut(&mut hello);
            (hello.host, hello.nixl) = (None, None);
        }
        let attempt = dial(
            self.endpoint.clone(),
            self.client.clone(),
            peer,
            hello,
            self.limits.clone(),
            self.shared_memory.clone().filter(|_| first),
            self.nixl.clone().filter(|_| first),
        )
        .boxed()
        .shared();
        // Driven on its own, so that it goes on when the push that asked first is dropped.
        self.runtime.spawn(attempt.clone());
        Slot {
            attempt,
            first,
            load: Arc::default(),
        }
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
            tcp: Mutex::new(if theirs.tcp { Tcp::Open } else { Tcp::Absent }),
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
