//! What arrives for the agent itself rather than for a window: notifications, kept in a bounded queue, and control
//! messages, handed at once to whoever serves them.

use crate::Refusal;
use crate::limits::NOTIFICATIONS_MAX;
use crate::window_table::lock;
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::{Mutex, OnceLock};
use tokio::sync::Notify;

/// A peer's word, delivered once: by itself, or with the last byte of a write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notification {
    /// Name and address of the sending agent, for logs.
    pub peer: String,
    /// What it says; at most [`PAYLOAD_BYTES_MAX`](crate::limits::PAYLOAD_BYTES_MAX) bytes.
    pub payload: Bytes,
}

/// Takes one control message; must not block.
type Handler = Box<dyn Fn(&str, Bytes) -> Result<(), Refusal> + Send + Sync>;

/// The queue and the handler.
#[derive(Default)]
pub(crate) struct Inbox {
    queue: Mutex<Queue>,
    arrived: Notify,
    handler: OnceLock<Handler>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Notification>,
    closed: bool,
}

impl Inbox {
    /// Sets who serves control messages; the first one stays.
    pub(crate) fn serve(&self, handler: Handler) {
        // An agent is bound once, so there is no second.
        let _ = self.handler.set(handler);
    }

    /// A control message arrives.
    pub(crate) fn control(&self, peer: &str, message: Bytes) -> Result<(), Refusal> {
        match self.handler.get() {
            Some(handler) => handler(peer, message),
            None => Err(Refusal::BadControl),
        }
    }

    /// Whether another notification fits.
    pub(crate) fn room(&self) -> Result<(), Refusal> {
        if lock(&self.queue).waiting.len() < NOTIFICATIONS_MAX {
            Ok(())
        } else {
            Err(Refusal::Busy {
                max: NOTIFICATIONS_MAX as u64,
            })
        }
    }

    /// Queues a notification. The caller has asked for room; a few more that asked at the same time do no harm.
    pub(crate) fn notify(&self, peer: &str, payload: Bytes) {
        lock(&self.queue).waiting.push_back(Notification {
            peer: peer.to_owned(),
            payload,
        });
        self.arrived.notify_one();
    }

    /// The next notification; `None` once the agent is closed and all are taken.
    pub(crate) async fn next(&self) -> Option<Notification> {
        loop {
            {
                let mut queue = lock(&self.queue);
                if let Some(notification) = queue.waiting.pop_front() {
                    if !queue.waiting.is_empty() || queue.closed {
                        // For whoever else waits.
                        self.arrived.notify_one();
                    }
                    return Some(notification);
                }
                if queue.closed {
                    self.arrived.notify_one();
                    return None;
                }
            }
            self.arrived.notified().await;
        }
    }

    /// No more will come.
    pub(crate) fn shut(&self) {
        lock(&self.queue).closed = true;
        self.arrived.notify_one();
    }
}

impl std::fmt::Debug for Inbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbox").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn notifications_come_in_order_and_are_bounded() {
        let inbox = Inbox::default();
        for at in 0..NOTIFICATIONS_MAX {
            inbox.room().unwrap();
            inbox.notify("peer", Bytes::from(at.to_le_bytes().to_vec()));
        }
        assert!(matches!(inbox.room(), Err(Refusal::Busy { .. })));
        let first = inbox.next().now_or_never().flatten().unwrap();
        assert_eq!(first.payload, Bytes::from(0usize.to_le_bytes().to_vec()));
        inbox.room().unwrap();
        inbox.shut();
        let rest = std::iter::from_fn(|| inbox.next().now_or_never().expect("nothing waits")).count();
        assert_eq!(rest, NOTIFICATIONS_MAX - 1);
        assert_eq!(inbox.next().now_or_never(), Some(None), "and it stays closed");
    }

    #[test]
    fn control_without_a_server_is_refused() {
        assert_eq!(Inbox::default().control("peer", Bytes::new()), Err(Refusal::BadControl));
    }
}
