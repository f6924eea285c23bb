//! Carries one push: a task that turns what compute queues into the bytes of one or more lanes, each a stream, and the
//! receiver's replies into the push's outcome. A lane that breaks is opened again as the push's session says.

use super::dial::Pool;
use super::{STOP_REFUSED, lost_error};
use crate::limits::LANES_MAX;
use crate::push::{Lane, LaneReplies, Next, Outgoing};
use crate::transport::TransportKind;
use crate::wire::{Integrity, Reply, ReplyDecoder};
use crate::{AbortReason, PushError, TransferLimits};
use bytes::Bytes;
use futures_util::future::join_all;
use quinn::{ReadError, RecvStream, SendStream, VarInt, WriteError};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How long to wait for the reason after the receiver has stopped the stream. The two travel together.
const REASON_TIMEOUT: Duration = Duration::from_secs(1);

/// Most bytes taken from the reply stream at once; replies are a few bytes each.
const REPLY_CHUNK_BYTES: usize = 4096;

/// Carries a push to its end, on as many lanes as it fills.
pub(super) async fn carry(pool: &Pool, peer: SocketAddr, push: &Arc<Outgoing>) {
    push.carried_by(TransportKind::Quic);
    // TLS authenticates every packet.
    let integrity = Integrity::of(true);
    let slots = 0..pool.limits().lanes_per_push.clamp(1, LANES_MAX);
    join_all(slots.map(|slot| carry_slot(pool, peer, push, slot, integrity))).await;
}

/// Carries what one slot's lanes take, until the push is settled or the slot is used up.
async fn carry_slot(pool: &Pool, peer: SocketAddr, push: &Arc<Outgoing>, slot: u16, integrity: Integrity) {
    if slot > 0 {
        // Most pushes are too small to gain from it.
        tokio::select! {
            biased;
            _ = push.settled() => return,
            () = push.crowded(slot) => {}
        }
    }
    while let Some(mut lane) = push.lane(slot, integrity) {
        let wait = carry_lane(pool, peer, push, &mut lane).await;
        let Some(wait) = wait else { return };
        tracing::debug!(%peer, slot, ?wait, "a lane of a kv push broke; it is opened again");
        tokio::select! {
            biased;
            _ = push.settled() => return,
            () = sleep(wait) => {}
        }
    }
}

/// Carries one lane to its end; how long to wait for the next one, if there is to be one.
async fn carry_lane(pool: &Pool, peer: SocketAddr, push: &Arc<Outgoing>, lane: &mut Lane) -> Option<Duration> {
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
    let (mut send, mut recv) = match opened {
        Ok(streams) => streams,
        Err(error) => return lane.broke(error),
    };
    let outcome = tokio::select! {
        biased;
        result = push.settled() => result.map(|_| ()),
        result = exchange(&mut send, &mut recv, peer, push, lane, pool.limits()) => result,
    };
    let Err(error) = outcome else { return None };
    let reason = if error.lane_only() {
        AbortReason::LaneReplaced
    } else {
        error.abort_reason()
    };
    let wait = lane.broke(error);
    let reason = match push.result() {
        // This lane was the last hope.
        Some(Err(error)) if reason == AbortReason::LaneReplaced => error.abort_reason(),
        _ => reason,
    };
    // A reset overtakes the bytes still queued. It fails only on a stream that is over anyway.
    let _ = send.reset(VarInt::from_u32(reason.code()));
    let _ = recv.stop(STOP_REFUSED);
    wait
}

async fn open(pool: &Pool, peer: SocketAddr) -> Result<(SendStream, RecvStream), PushError> {
    let session = pool.session(peer).await?;
    let limit = pool.limits().stall_timeout;
    // Waits while the peer's limit of concurrent pushes is reached.
    match timeout(limit, session.connection.open_bi()).await {
        Ok(streams) => streams.map_err(|error| lost_error(peer, &error)),
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
