//! Carries one push: a task that turns what compute queues into stream bytes and the receiver's replies into the
//! push's outcome.

use super::dial::{Lease, Pool};
use super::{STOP_REFUSED, lost_error};
use crate::push::{Next, Outgoing};
use crate::wire::{Reply, ReplyDecoder};
use crate::{AbortReason, PushError, TransferLimits};
use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until, timeout};

/// How long to wait for the reason after the receiver has stopped the stream. The two travel together.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);

/// Most bytes taken from the reply stream at once; replies are a few bytes each.
const REPLY_CHUNK_BYTES: usize = 4096;

/// Settles the push if its task ends for any other reason, a stopped runtime included.
struct Settle(Arc<Outgoing>);

impl Drop for Settle {
    fn drop(&mut self) {
        self.0.fail(PushError::AgentClosed);
    }
}

/// The task of one push. The guard is made before the future is first polled, so that a push handed to a stopped
/// runtime fails instead of hanging.
pub(super) fn carry(pool: Arc<Pool>, peer: SocketAddr, push: Arc<Outgoing>) -> impl Future<Output = ()> + Send {
    let settle = Settle(push);
    async move {
        let push = &settle.0;
        let opened = tokio::select! {
            biased;
            _ = push.settled() => return,
            opened = open(&pool, peer) => opened,
        };
        // The lease lives as long as the push is on the connection.
        let (_lease, mut send, mut recv) = match opened {
            Ok(opened) => opened,
            Err(error) => return push.fail(error),
        };
        let outcome = tokio::select! {
            biased;
            result = push.settled() => result.map(|_| ()),
            result = exchange(&mut send, &mut recv, peer, push, pool.limits()) => result,
        };
        if let Err(error) = outcome {
            let reason = match &error {
                PushError::Aborted(reason) => *reason,
                _ => AbortReason::Transport,
            };
            push.fail(error);
            // A reset overtakes the bytes still queued. It fails only on a stream that is over anyway.
            let _ = send.reset(VarInt::from_u32(reason.code()));
            let _ = recv.stop(STOP_REFUSED);
        }
    }
}

async fn open(pool: &Pool, peer: SocketAddr) -> Result<(Lease, SendStream, RecvStream), PushError> {
    let lease = pool.connection(peer).await?;
    let limit = pool.limits().stall_timeout;
    // Waits while the peer's limit of concurrent pushes is reached.
    match timeout(limit, lease.connection.open_bi()).await {
        Ok(Ok((send, recv))) => Ok((lease, send, recv)),
        Ok(Err(error)) => Err(lost_error(peer, &error)),
        Err(_) => Err(PushError::Stalled { limit }),
    }
}

/// Sends and listens until the receiver's last reply.
async fn exchange(
    send: &mut SendStream,
    recv: &mut RecvStream,
    peer: SocketAddr,
    push: &Outgoing,
    limits: &TransferLimits,
) -> Result<(), PushError> {
    let stalled = PushError::Stalled {
        limit: limits.stall_timeout,
    };
    let mut sending = std::pin::pin!(send_all(send, peer, push, limits.stall_timeout));
    let mut replies = std::pin::pin!(read_replies(recv, peer, push));
    // Set once nothing more is sent: until when the last reply must be here, and what its absence means.
    let mut last_call: Option<(Instant, PushError)> = None;
    loop {
        let until = last_call.as_ref().map_or_else(Instant::now, |(until, _)| *until);
        tokio::select! {
            biased;
            result = &mut replies => return result,
            sent = &mut sending, if last_call.is_none() => {
                last_call = Some(match sent? {
                    Sent::All => (Instant::now() + limits.stall_timeout, stalled.clone()),
                    Sent::Stopped => (
                        Instant::now() + REASON_TIMEOUT,
                        PushError::Protocol("it stopped the push without saying why"),
                    ),
                });
            }
            () = sleep_until(until), if last_call.is_some() => {
                return Err(last_call.map_or(stalled, |(_, error)| error));
            }
        }
    }
}

/// How sending ended.
enum Sent {
    /// FINISH is out.
    All,
    /// The receiver takes no more; its last reply says why.
    Stopped,
}

async fn send_all(
    send: &mut SendStream,
    peer: SocketAddr,
    push: &Outgoing,
    limit: Duration,
) -> Result<Sent, PushError> {
    let mut batch = Vec::new();
    let mut next = Next::Send(push.opening());
    loop {
        match next {
            Next::Send(bytes) => {
                if !send_some(send, peer, bytes, limit).await? {
                    return Ok(Sent::Stopped);
                }
            }
            Next::Last(bytes) => {
                let taken = send_some(send, peer, bytes, limit).await?;
                // Fails only if the receiver has stopped the stream, and then its reply says why.
                let _ = send.finish();
                return Ok(if taken { Sent::All } else { Sent::Stopped });
            }
            Next::Wait => push.work().await,
            // Settled elsewhere; whoever waits for that ends this task.
            Next::Over => std::future::pending().await,
        }
        next = push.next(&mut batch);
    }
}

/// False if the receiver has stopped the stream.
async fn send_some(send: &mut SendStream, peer: SocketAddr, bytes: Bytes, limit: Duration) -> Result<bool, PushError> {
    match timeout(limit, send.write_chunk(bytes)).await {
        Ok(Ok(())) => Ok(true),
        Ok(Err(WriteError::Stopped(_))) => Ok(false),
        Ok(Err(WriteError::ConnectionLost(error))) => Err(lost_error(peer, &error)),
        Ok(Err(WriteError::ClosedStream | WriteError::ZeroRttRejected)) => {
            Err(PushError::Protocol("it closed the push's stream"))
        }
        Err(_) => Err(PushError::Stalled { limit }),
    }
}

/// Takes replies until the last one.
async fn read_replies(recv: &mut RecvStream, peer: SocketAddr, push: &Outgoing) -> Result<(), PushError> {
    let mut decoder = ReplyDecoder::default();
    loop {
        let chunk = match recv.read_chunk(REPLY_CHUNK_BYTES, true).await {
            Ok(Some(chunk)) => chunk.bytes,
            Ok(None) => return Err(PushError::Protocol("it ended the push without a last reply")),
            Err(ReadError::ConnectionLost(error)) => return Err(lost_error(peer, &error)),
            Err(_) => return Err(PushError::Protocol("it reset the push without a last reply")),
        };
        let mut input = &chunk[..];
        while let Some(reply) = decoder.next(&mut input).map_err(PushError::Protocol)? {
            push.reply(reply)?;
            if matches!(reply, Reply::Done(_)) {
                return Ok(());
            }
        }
    }
}
