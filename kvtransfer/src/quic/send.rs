//! Carries one lane of a push: turns what compute queues into the bytes of a stream, and the receiver's replies into the
//! push's outcome.

use super::dial::{Lease, Pool};
use super::{STOP_REFUSED, lost_error};
use crate::push::{Lane, LaneReplies, Next, Outgoing};
use crate::transport::TransportKind;
use crate::wire::{Reply, ReplyDecoder};
use crate::{PushError, TransferLimits};
use bytes::Bytes;
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long to wait for the reason after the receiver has stopped the stream. The two travel together.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);

/// Most bytes taken from the reply stream at once; replies are a few bytes each.
const REPLY_CHUNK_BYTES: usize = 4096;

/// Carries one lane to its end; how long to wait for the next one, if there is to be one.
pub(super) async fn carry(pool: &Pool, peer: SocketAddr, push: &Arc<Outgoing>, lane: &mut Lane) -> Option<Duration> {
    push.carried_by(TransportKind::Quic);
    let opened = tokio::select! {
        biased;
        _ = push.settled() => return None,
        opened = open(pool, peer) => opened,
        // The receiver's window does not wait longer for another lane.
        () = sleep(pool.limits().lane_grace), if lane.again() => Err(PushError::Unreachable {
            peer,
            detail: "no connection within the grace of a broken lane".into(),
        }),
    };
    // The lease lives as long as the lane is on the connection.
    let (_lease, mut send, mut recv) = match opened {
        Ok(opened) => opened,
        Err(error) => return lane.broke(error),
    };
    let outcome = tokio::select! {
        biased;
        result = push.settled() => result.map(|_| ()),
        result = exchange(&mut send, &mut recv, peer, push, lane, pool.limits()) => result,
    };
    let Err(error) = outcome else { return None };
    let (wait, reason) = lane.replies().give_up(error);
    // A reset overtakes the bytes still queued. It fails only on a stream that is over anyway.
    let _ = send.reset(VarInt::from_u32(reason.code()));
    let _ = recv.stop(STOP_REFUSED);
    wait
}

async fn open(pool: &Pool, peer: SocketAddr) -> Result<(Lease, SendStream, RecvStream), PushError> {
    let lease = pool.lease(peer).await?;
    let limit = pool.limits().stall_timeout;
    // Waits while the peer's limit of concurrent pushes is reached.
    match timeout(limit, lease.session.connection.open_bi()).await {
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
    lane: &mut Lane,
    limits: &TransferLimits,
) -> Result<(), PushError> {
    let stalled = PushError::Stalled {
        limit: limits.stall_timeout,
    };
    let replying = lane.replies();
    let mut sending = std::pin::pin!(send_all(send, peer, lane, limits.stall_timeout));
    let mut replies = std::pin::pin!(read_replies(recv, peer, &replying));
    // Set once nothing more is sent: until when the last reply must be here, and what its absence means.
    let mut last_call: Option<(Instant, PushError)> = None;
    let mut progress = push.progress();
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
                // Other lanes may still be busy; then the last reply is not due yet.
                if std::mem::replace(&mut progress, push.progress()) != push.progress()
                    && let Some((until, PushError::Stalled { .. })) = &mut last_call
                {
                    *until = Instant::now() + limits.stall_timeout;
                    continue;
                }
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
    lane: &mut Lane,
    limit: Duration,
) -> Result<Sent, PushError> {
    let mut batch = Vec::new();
    let mut next = Next::Send(lane.opening());
    loop {
        match next {
            Next::Send(bytes) => {
                if !send_some(send, peer, bytes, limit).await? {
                    return Ok(Sent::Stopped);
                }
            }
            Next::Last(bytes) => {
                let taken = send_some(send, peer, bytes, limit).await?;
                // The stream stays open until the push is settled, so that the receiver sees it break.
                return Ok(if taken { Sent::All } else { Sent::Stopped });
            }
            Next::Wait => lane.work().await,
            // Settled elsewhere; whoever waits for that ends this task.
            Next::Over => std::future::pending().await,
        }
        next = lane.next(&mut batch);
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
async fn read_replies(recv: &mut RecvStream, peer: SocketAddr, lane: &LaneReplies) -> Result<(), PushError> {
    let mut decoder = ReplyDecoder::default();
    loop {
        let chunk = match recv.read_chunk(REPLY_CHUNK_BYTES, true).await {
            Ok(Some(chunk)) => chunk.bytes,
            Ok(None) => return Err(PushError::Protocol("it ended the push without a last reply")),
            Err(ReadError::ConnectionLost(error)) => return Err(lost_error(peer, &error)),
            Err(_) => return Err(PushError::Protocol("it reset the push without a last reply")),
        };
        let mut input = &chunk[..];
        while let Some(reply) = decoder.next(&mut input)? {
            lane.reply(reply)?;
            if matches!(reply, Reply::Done(_)) {
                return Ok(());
            }
        }
    }
}
