//! Carries one push over one connection: a task that turns what compute queues into sealed bytes and the receiver's
//! replies into the push's outcome.

use super::channel::{Broken, Channel};
use super::dial::Pool;
use super::frame::Frame;
use crate::push::{Next, Outgoing};
use crate::wire::{Reply, ReplyDecoder};
use crate::{AbortReason, PushError, TransferLimits};
use bytes::Bytes;
use futures_util::FutureExt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::time::sleep;

/// Plaintext sealed and handed to the kernel at once. The receiver opens a slice while the next one is sealed, and both
/// slices and the ciphertext stay in the second-level cache; smaller ones cost more wake-ups.
const SLICE_BYTES: usize = 128 << 10;

/// Settles the push if its task ends for any other reason, a stopped runtime or a closed agent included.
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
        let taken = tokio::select! {
            biased;
            _ = push.settled() => return,
            taken = pool.take(peer) => taken,
        };
        let mut connection = match taken {
            Ok(connection) => connection,
            Err(error) => return push.fail(error),
        };
        match exchange(&mut connection.channel, peer, push, pool.limits()).await {
            Ok(()) => pool.keep(connection),
            Err(error) => {
                let reason = match &error {
                    PushError::Aborted(reason) => *reason,
                    _ => AbortReason::Transport,
                };
                // A refusing receiver knows, and waits for the connection to close; a lost one hears nothing.
                let tell = !matches!(error, PushError::Refused(_) | PushError::PeerLost { .. });
                push.fail(error);
                if tell {
                    connection.channel.abort(reason.code()).await;
                }
            }
        }
    }
}

/// What the sending half is at.
enum Sending {
    /// Ask the push for more.
    Asking,
    /// The push has nothing for now.
    Waiting,
    /// FINISH was handed over; the receiver's answer is waited for since everything left.
    Finished(Instant),
}

/// Sends and listens until the receiver's last reply.
async fn exchange(
    channel: &mut Channel,
    peer: SocketAddr,
    push: &Outgoing,
    limits: &TransferLimits,
) -> Result<(), PushError> {
    let lost = |broken: Broken| PushError::PeerLost {
        peer,
        detail: broken.to_string(),
    };
    let limit = limits.stall_timeout;
    let mut settled = std::pin::pin!(push.settled());
    let mut replies = ReplyDecoder::default();
    let mut batch = Vec::new();
    let mut sending = Sending::Asking;
    // What the push handed over last and is not sealed yet.
    let mut rest = Bytes::new();
    // The connection may have been idle for long.
    channel.heard = Instant::now();
    channel.say(&push.opening()).map_err(lost)?;
    loop {
        if let Some(result) = (&mut settled).now_or_never() {
            return result.map(|_| ());
        }
        // Replies first: a refusal must not wait until everything is sent.
        let mut last = None;
        let received = channel.receive(|frame| {
            let Frame::Data(bytes) = frame else { return true };
            last = take_replies(&mut replies, bytes, push);
            last.is_none()
        });
        if let Some(outcome) = last {
            return outcome;
        }
        received.map_err(lost)?;
        if channel.flushed() && rest.is_empty() && matches!(sending, Sending::Asking) {
            (rest, sending) = match push.next(&mut batch) {
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
        let waited = match &mut sending {
            Sending::Finished(since) if drained => now - *since,
            Sending::Finished(since) => {
                *since = now;
                now - channel.progressed
            }
            Sending::Asking | Sending::Waiting if channel.flushed() => Duration::ZERO,
            Sending::Asking | Sending::Waiting => now - channel.progressed,
        };
        if waited > limit {
            return Err(PushError::Stalled { limit });
        }
        if now - channel.heard > limits.idle_timeout {
            return Err(lost(Broken::Lost(format!(
                "nothing heard for {:?}",
                limits.idle_timeout
            ))));
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
            () = push.work(), if matches!(sending, Sending::Waiting) => sending = Sending::Asking,
            () = sleep(limits.keep_alive) => {}
        }
    }
}

/// The outcome of the push, if its last reply is among `bytes`.
fn take_replies(decoder: &mut ReplyDecoder, mut bytes: &[u8], push: &Outgoing) -> Option<Result<(), PushError>> {
    loop {
        match decoder.next(&mut bytes) {
            Ok(Some(reply)) => match push.reply(reply) {
                Ok(()) if matches!(reply, Reply::Done(_)) => return Some(Ok(())),
                Ok(()) => {}
                Err(error) => return Some(Err(error)),
            },
            Ok(None) => return None,
            Err(what) => return Some(Err(PushError::Protocol(what))),
        }
    }
}
