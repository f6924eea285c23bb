//! Carries one lane of a push over one connection: turns what compute queues into sealed bytes and the receiver's replies
//! into the push's outcome.

use super::channel::Broken;
use super::dial::Connection;
use super::frame::Frame;
use crate::push::{Lane, LaneReplies, Next, Outgoing};
use crate::quic::Session;
use crate::transport::TransportKind;
use crate::wire::{Reply, ReplyDecoder};
use crate::{PushError, TransferLimits};
use bytes::Bytes;
use futures_util::FutureExt;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout};

/// Plaintext sealed and handed to the kernel at once. The receiver opens a slice while the next one is sealed, and both
/// slices and the ciphertext stay in the second-level cache; smaller ones cost more wake-ups.
const SLICE_BYTES: usize = 128 << 10;

/// How long the end of a connection waits for the peer's goodbye over QUIC, which tells a closed agent from a dead one.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(50);

/// Carries what `lane` takes until the push is settled well; the connection is then ready for another lane.
///
/// # Errors
/// What the lane ended with; the connection is of no more use.
pub(super) async fn carry(
    connection: &mut Connection,
    session: &Session,
    push: &Arc<Outgoing>,
    lane: &mut Lane,
    limits: &TransferLimits,
) -> Result<(), PushError> {
    push.carried_by(TransportKind::Tcp);
    match exchange(connection, push, lane, limits).await {
        Ok(()) => {
            // Whoever uses the connection next finds out if this cannot be said.
            let channel = &mut connection.channel;
            if channel.end().and_then(|()| channel.try_flush()).is_ok() {
                connection.owed += 1;
            }
            Ok(())
        }
        Err(lost @ PushError::PeerLost { .. }) => Err(timeout(GOODBYE_TIMEOUT, session.lost()).await.unwrap_or(lost)),
        Err(error) => Err(error),
    }
}

/// What the sending half is at.
enum Sending {
    /// Ask the lane for more.
    Asking,
    /// The lane has nothing for now.
    Waiting,
    /// FINISH was handed over. Since then, or since the push last made progress, the receiver's answer is waited for.
    Finished(Instant),
}

/// Sends and listens until the receiver's last reply, or until the push is settled by another lane.
async fn exchange(
    connection: &mut Connection,
    push: &Outgoing,
    lane: &mut Lane,
    limits: &TransferLimits,
) -> Result<(), PushError> {
    let peer = connection.peer;
    let lost = |broken: Broken| PushError::PeerLost {
        peer,
        detail: broken.to_string(),
    };
    let limit = limits.stall_timeout;
    let mut settled = std::pin::pin!(push.settled());
    let replying = lane.replies();
    let mut replies = ReplyDecoder::default();
    let mut batch = Vec::new();
    let mut sending = Sending::Asking;
    let mut progress = push.progress();
    // What the lane handed over last and is not sealed yet.
    let mut rest = Bytes::new();
    // The connection may have been idle for long.
    connection.channel.heard = Instant::now();
    connection.channel.say(&lane.opening()).map_err(lost)?;
    loop {
        if let Some(result) = (&mut settled).now_or_never() {
            return result.map(|_| ());
        }
        // Replies first: a refusal must not wait until everything is sent.
        let mut last = None;
        let received = connection.receive(|frame| {
            last = match frame {
                Frame::Data(bytes) => take_replies(&mut replies, bytes, &replying),
                Frame::End => Some(Err(PushError::Protocol("it ended the push without a last reply"))),
                Frame::Abort { .. } | Frame::Ping => None,
            };
            last.is_none()
        });
        if let Some(outcome) = last {
            return outcome;
        }
        received.map_err(lost)?;
        let channel = &mut connection.channel;
        if channel.flushed() && rest.is_empty() && matches!(sending, Sending::Asking) {
            (rest, sending) = match lane.next(&mut batch) {
                Next::Send(bytes) => (bytes, Sending::Asking),
                Next::Last(bytes) => (bytes, Sending::Finished(Instant::now())),
                // Over: settled elsewhere; the next turn sees it.
                Next::Wait | Next::Over => (Bytes::new(), Sending::Waiting),
            };
        }
        if channel.flushed() && !rest.is_empty() {
            let slice = rest.split_to(rest.len().min(SLICE_BYTES));
            channel.say(&slice).map_err(lost)?;
        }
        channel.try_flush().map_err(lost)?;
        let now = Instant::now();
        let drained = channel.flushed() && rest.is_empty();
        if let Sending::Finished(since) = &mut sending {
            // Other lanes may still be busy; then the last reply is not due yet.
            let moved = std::mem::replace(&mut progress, push.progress()) != push.progress();
            if moved || !drained {
                *since = now;
            }
        }
        let waited = match sending {
            Sending::Finished(since) if drained => now - since,
            _ if channel.flushed() => Duration::ZERO,
            _ => now - channel.progressed,
        };
        if waited > limit {
            return Err(PushError::Stalled { limit });
        }
        if now - channel.heard > limits.idle_timeout {
            let detail = format!("nothing heard for {:?}", limits.idle_timeout);
            return Err(lost(Broken::Lost(detail)));
        }
        if channel.flushed() && now - channel.said >= limits.keep_alive {
            channel.ping().map_err(lost)?;
            continue;
        }
        if channel.flushed() && (!drained || matches!(sending, Sending::Asking)) {
            // Others in this runtime get their turn.
            tokio::task::consume_budget().await;
            continue;
        }
        tokio::select! {
            biased;
            result = &mut settled => return result.map(|_| ()),
            ready = channel.ready() => ready.map_err(lost)?,
            () = lane.work(), if matches!(sending, Sending::Waiting) => sending = Sending::Asking,
            () = sleep(limits.keep_alive) => {}
        }
    }
}

/// The outcome of the lane, if its last reply is among `bytes`.
fn take_replies(decoder: &mut ReplyDecoder, mut bytes: &[u8], lane: &LaneReplies) -> Option<Result<(), PushError>> {
    loop {
        match decoder.next(&mut bytes) {
            Ok(Some(reply)) => match lane.reply(reply) {
                Ok(()) if matches!(reply, Reply::Done(_)) => return Some(Ok(())),
                Ok(()) => {}
                Err(error) => return Some(Err(error)),
            },
            Ok(None) => return None,
            Err(bad) => return Some(Err(bad.into())),
        }
    }
}
