//! Accepts connections and lands the pushes that arrive: a task per connection, and one per push.

use super::dial::{Failure, read_hello};
use super::{CLOSE_INCOMPATIBLE, STOP_REFUSED};
use crate::hello::Hello;
use crate::incoming::Incoming;
use crate::nixl::Nixl;
use crate::shared_memory::{Invitation, SharedMemory};
use crate::window_table::WindowTable;
use crate::wire::Reply;
use crate::{AbortReason, Refusal, TransferLimits, WindowError};
use bytes::{Bytes, BytesMut};
use quinn::{Connection, ConnectionError, Endpoint, ReadError, RecvStream, SendStream};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep_until, timeout};

/// Segments taken from a stream at once. Each is at most a datagram long, so between two looks at the window less
/// than half a megabyte is copied.
const SEGMENTS: usize = 64;

/// What to say to whoever connects.
#[derive(Clone)]
pub(super) struct Greeting {
    pub(super) hello: Arc<Hello>,
    pub(super) shared_memory: Option<Arc<SharedMemory>>,
    pub(super) nixl: Option<Arc<Nixl>>,
}

/// Accepts connections until the endpoint is closed.
pub(super) async fn accept(
    endpoint: Endpoint,
    greeting: Greeting,
    table: Arc<WindowTable>,
    limits: Arc<TransferLimits>,
) {
    let slots = Arc::new(Semaphore::new(limits.connections_max));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(slot) = slots.clone().try_acquire_owned() else {
            tracing::warn!(peer = %incoming.remote_address(), max = limits.connections_max,
                "kv transfer connection refused: too many connections");
            incoming.refuse();
            continue;
        };
        let (greeting, table, limits) = (greeting.clone(), table.clone(), limits.clone());
        tokio::spawn(async move {
            let peer = incoming.remote_address();
            let established = timeout(limits.handshake_timeout, async { incoming.accept()?.await }).await;
            match established {
                Ok(Ok(connection)) => serve(connection, &greeting, table, limits).await,
                Ok(Err(error)) => tracing::warn!(%peer, %error, "kv transfer connection failed"),
                Err(_) => tracing::warn!(%peer, "kv transfer connection failed: no handshake in time"),
            }
            drop(slot);
        });
    }
}

/// Says hello and lands pushes until the connection ends.
async fn serve(connection: Connection, greeting: &Greeting, table: Arc<WindowTable>, limits: Arc<TransferLimits>) {
    let peer = connection.remote_address();
    let hello = &greeting.hello;
    // Kept while the connection lives: the link for shared memory goes with it.
    let (theirs, _invitation) = match timeout(limits.handshake_timeout, greet(&connection, greeting)).await {
        Ok(Ok(greeted)) => greeted,
        Ok(Err(Failure::Lost(error))) => {
            tracing::warn!(%peer, %error, "kv transfer connection lost before its hello");
            return;
        }
        Ok(Err(Failure::Foreign(what))) => {
            tracing::warn!(%peer, what, "kv transfer connection refused");
            return connection.close(CLOSE_INCOMPATIBLE, what.as_bytes());
        }
        Err(_) => {
            tracing::warn!(%peer, "kv transfer connection refused: no hello in time");
            return connection.close(CLOSE_INCOMPATIBLE, b"no hello in time");
        }
    };
    if let Some(mismatch) = hello.mismatch(&theirs) {
        tracing::warn!(%peer, mismatch, "kv transfer connection refused");
        // The peer compares too and closes; closing from here at once could overtake the hello on its way.
        let _ = timeout(limits.handshake_timeout, connection.closed()).await;
        return connection.close(CLOSE_INCOMPATIBLE, mismatch.as_bytes());
    }
    table.counters().connections_in.add(1);
    let name: Arc<str> = describe(&theirs, &connection).into();
    // Where both sides have NIXL, the first stream is its link.
    let mut nixl = greeting.nixl.clone().filter(|_| theirs.nixl.is_some());
    // Their number is bounded by the stream limit of the connection.
    while let Ok((send, recv)) = connection.accept_bi().await {
        if let Some(nixl) = nixl.take() {
            nixl.serve(send, recv, name.clone());
            continue;
        }
        let incoming = Incoming::new(table.clone(), name.clone());
        tokio::spawn(receive(send, recv, incoming, name.clone(), limits.clone()));
    }
    table.counters().connections_in.sub(1);
    tracing::debug!(%peer, name = theirs.name, reason = ?connection.close_reason(), "kv transfer connection ended");
}

/// Reads the peer's hello and answers, with an offer of shared memory if it is on this host.
async fn greet(connection: &Connection, greeting: &Greeting) -> Result<(Hello, Option<Invitation>), Failure> {
    let (mut send, mut recv) = connection.accept_bi().await.map_err(Failure::Lost)?;
    let theirs = read_hello(&mut recv).await?;
    let mut ours = Hello::clone(&greeting.hello);
    let mut invitation = None;
    if ours.mismatch(&theirs).is_none()
        && let Some(shared_memory) = &greeting.shared_memory
        && let Some((offer, kept)) = shared_memory.offer(&theirs, &describe(&theirs, connection))
    {
        (ours.offer, invitation) = (Some(offer), Some(kept));
    }
    // If the answer cannot be sent, the connection is going away and the next step says so.
    let _ = send.write_all(&ours.encode()).await;
    let _ = send.finish();
    Ok((theirs, invitation))
}

/// The peer, for logs and errors.
fn describe(theirs: &Hello, connection: &Connection) -> String {
    format!("{} ({})", theirs.name, connection.remote_address())
}

/// The task of one incoming push.
async fn receive(
    mut send: SendStream,
    mut recv: RecvStream,
    mut incoming: Incoming,
    peer: Arc<str>,
    limits: Arc<TransferLimits>,
) {
    let refusal = match land(&mut send, &mut recv, &mut incoming, &limits).await {
        End::Done => return,
        End::Aborted(reason @ AbortReason::LaneReplaced) => {
            return incoming.broken(reason.to_string(), std::time::Instant::now());
        }
        End::Aborted(reason) => return incoming.lost(WindowError::Aborted(reason)),
        End::Lost(ConnectionError::LocallyClosed) => return incoming.lost(WindowError::AgentClosed),
        // The peer's agent was closed: nobody is left to try again.
        End::Lost(error @ ConnectionError::ApplicationClosed(_)) => {
            return incoming.lost(WindowError::PeerLost {
                peer: peer.to_string(),
                detail: error.to_string(),
            });
        }
        End::Lost(error) => return incoming.broken(error.to_string(), std::time::Instant::now()),
        End::Breach(refusal) => {
            incoming.refuse(refusal);
            refusal
        }
        End::Refused(refusal) => refusal,
    };
    tracing::debug!(%peer, %refusal, "kv push refused");
    let _ = recv.stop(STOP_REFUSED);
    if reply(&mut send, Reply::Refused(refusal), limits.stall_timeout)
        .await
        .is_ok()
    {
        let _ = send.finish();
    }
}

/// Why a push stopped being read.
enum End {
    /// Completed and acknowledged.
    Done,
    /// The sender gave it up.
    Aborted(AbortReason),
    /// The connection is gone.
    Lost(ConnectionError),
    /// Refused by the session; the window knows already.
    Refused(Refusal),
    /// A breach that only the transport sees.
    Breach(Refusal),
}

async fn land(send: &mut SendStream, recv: &mut RecvStream, incoming: &mut Incoming, limits: &TransferLimits) -> End {
    let too_slow = |limit: Duration| Refusal::TooSlow {
        limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
    };
    let open_by = Instant::now() + limits.handshake_timeout;
    let mut segments: [Bytes; SEGMENTS] = std::array::from_fn(|_| Bytes::new());
    loop {
        let read = tokio::select! {
            biased;
            refusal = incoming.interrupted() => return End::Refused(refusal),
            read = recv.read_chunks(&mut segments) => read,
            () = sleep_until(open_by), if !incoming.opened() => return End::Breach(too_slow(limits.handshake_timeout)),
        };
        let count = match read {
            Ok(Some(count)) => count,
            // A sender lets go of its other lanes when one has brought the last acknowledgement.
            Ok(None) if incoming.complete() => return End::Done,
            Ok(None) => return End::Breach(Refusal::Unfinished),
            Err(ReadError::Reset(code)) => return End::Aborted(AbortReason::from_code(code.into_inner())),
            Err(ReadError::ConnectionLost(error)) => return End::Lost(error),
            Err(ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected) => {
                return End::Breach(Refusal::Unfinished);
            }
        };
        let mut answer = None;
        for segment in segments.iter_mut().take(count) {
            match incoming.feed(&std::mem::take(segment)) {
                Ok(asked) => answer = asked.or(answer),
                Err(refusal) => return End::Refused(refusal),
            }
        }
        let Some(answer) = answer else { continue };
        match reply(send, answer, limits.stall_timeout).await {
            Ok(()) if incoming.done() => {
                let _ = send.finish();
                return End::Done;
            }
            Ok(()) => {}
            Err(Some(error)) => return End::Lost(error),
            Err(None) => return End::Breach(too_slow(limits.stall_timeout)),
        }
    }
}

/// Sends a reply. An error without a cause means that the peer does not read its replies.
async fn reply(send: &mut SendStream, reply: Reply, limit: Duration) -> Result<(), Option<ConnectionError>> {
    let mut bytes = BytesMut::with_capacity(32);
    reply.put(&mut bytes);
    match timeout(limit, send.write_chunk(bytes.freeze())).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(quinn::WriteError::ConnectionLost(error))) => Err(Some(error)),
        Ok(Err(_)) | Err(_) => Err(None),
    }
}
