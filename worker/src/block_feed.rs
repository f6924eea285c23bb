//! What happens to the prefix cache, between the engine thread, which logs it, and the Join stream, which tells it.
//!
//! ```text
//!            publish(reset)                 too many pending, or a new stream
//! (lost) ───────────────────▶ (flowing) ────────────────────────────────────▶ (lost)
//!    └─ the reader asks the engine to tell everything anew, once
//! ```
//!
//! Bounded: what is not taken in time is thrown away and told anew, so that a slow or absent coordinator costs memory for
//! two pools' worth of events and no more. A message is compacted to the last thing that happened to each block.
//!
//! Not here: the stream and its message numbers ([`crate::membership`]).

use baton_engine::{BlockEvent, BlockEvents};
use baton_proto::block_hash::short;
use baton_proto::cluster::{self, BlockRun, Tier};
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Events in one message: some 10 KiB, well below what a coordinator takes, and an update that its index has taken in
/// before a request notices.
const MESSAGE_EVENTS_MAX: usize = 1024;
/// Smallest bound on pending events, for tiny pools.
const PENDING_MIN: usize = 4096;

#[derive(Debug, Clone, Copy)]
enum Event {
    Stored { parent: u64, name: u64 },
    Evicted { name: u64 },
}

#[derive(Debug, Default)]
struct Inner {
    pending: VecDeque<Event>,
    pending_max: usize,
    /// The next message begins anew.
    reset: bool,
    /// What is pending is void; nothing is told before the engine tells all.
    lost: bool,
    /// The engine was asked to.
    asked: bool,
}

/// What the reader shall do.
#[derive(Debug, PartialEq)]
pub(crate) enum Taken {
    /// Nothing has happened.
    Nothing,
    /// Send this; its number is the reader's to set.
    Message(cluster::BlockEvents),
    /// Ask the engine to tell everything anew.
    Ask,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct BlockFeed {
    inner: Mutex<Inner>,
    something: Notify,
}

impl BlockFeed {
    pub(crate) fn new(total_blocks: usize) -> Self {
        let inner = Inner {
            pending_max: (2 * total_blocks).max(PENDING_MIN),
            // Until there is a stream, nobody listens.
            lost: true,
            asked: true,
            ..Inner::default()
        };
        Self {
            inner: Mutex::new(inner),
            something: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine's side: what happened in a step.
    pub(crate) fn publish(&self, events: BlockEvents) {
        if !events.reset && events.events.is_empty() {
            return;
        }
        let mut inner = self.lock();
        if events.reset {
            inner.pending.clear();
            (inner.reset, inner.lost, inner.asked) = (true, false, false);
        } else if inner.lost {
            return;
        }
        if inner.pending.len() + events.events.len() > inner.pending_max {
            inner.pending = VecDeque::new();
            (inner.reset, inner.lost) = (false, true);
        } else {
            inner.pending.extend(events.events.iter().map(|event| match event {
                BlockEvent::Stored { parent, hash, .. } => Event::Stored {
                    parent: short(parent),
                    name: short(hash),
                },
                BlockEvent::Evicted { hash, .. } => Event::Evicted { name: short(hash) },
            }));
        }
        drop(inner);
        self.something.notify_one();
    }

    /// Whoever listens must be told everything anew.
    pub(crate) fn restart(&self) {
        let mut inner = self.lock();
        inner.pending = VecDeque::new();
        (inner.reset, inner.lost, inner.asked) = (false, true, false);
        drop(inner);
        self.something.notify_one();
    }

    /// Waits until [`take`](Self::take) has something. Cancel-safe; for one reader.
    pub(crate) async fn ready(&self) {
        loop {
            {
                let inner = self.lock();
                if (inner.lost && !inner.asked) || inner.reset || !inner.pending.is_empty() {
                    return;
                }
            }
            self.something.notified().await;
        }
    }

    /// The reader's side: the next thing to do.
    pub(crate) fn take(&self) -> Taken {
        let mut inner = self.lock();
        if inner.lost {
            return match std::mem::replace(&mut inner.asked, true) {
                true => Taken::Nothing,
                false => Taken::Ask,
            };
        }
        if !inner.reset && inner.pending.is_empty() {
            return Taken::Nothing;
        }
        let reset = std::mem::take(&mut inner.reset);
        let count = inner.pending.len().min(MESSAGE_EVENTS_MAX);
        let events: Vec<Event> = inner.pending.drain(..count).collect();
        drop(inner);
        Taken::Message(message(&events, reset))
    }
}

/// The wire applies evictions before stores, so of each block only the last event counts.
fn message(events: &[Event], reset: bool) -> cluster::BlockEvents {
    let name = |event: &Event| match event {
        Event::Stored { name, .. } | Event::Evicted { name } => *name,
    };
    let last: HashMap<u64, usize> = events.iter().enumerate().map(|(at, event)| (name(event), at)).collect();
    let mut message = cluster::BlockEvents {
        reset,
        tier: Tier::Device.into(),
        ..Default::default()
    };
    for (at, event) in events.iter().enumerate() {
        if last.get(&name(event)) != Some(&at) {
            continue;
        }
        match *event {
            Event::Evicted { name } => message.evicted.push(name),
            Event::Stored { parent, name } => match message.stored.last_mut() {
                Some(run) if run.names.last() == Some(&parent) => run.names.push(name),
                _ => message.stored.push(BlockRun {
                    parent,
                    names: vec![name],
                }),
            },
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hash(name: u64) -> [u8; 16] {
        let mut hash = [0; 16];
        hash[..8].copy_from_slice(&name.to_le_bytes());
        hash
    }

    fn stored(parent: u64, name: u64) -> BlockEvent {
        BlockEvent::Stored {
            parent: hash(parent),
            hash: hash(name),
            block: 0,
        }
    }

    fn events(reset: bool, events: Vec<BlockEvent>) -> BlockEvents {
        BlockEvents { reset, events }
    }

    #[test]
    fn runs_are_chains_and_the_last_event_of_a_block_counts() {
        let feed = BlockFeed::new(10);
        feed.publish(events(true, vec![stored(1, 2), stored(2, 3), stored(9, 10)]));
        feed.publish(events(
            false,
            vec![
                BlockEvent::Evicted {
                    hash: hash(3),
                    block: 0,
                },
                stored(3, 4),
                BlockEvent::Evicted {
                    hash: hash(10),
                    block: 0,
                },
                stored(9, 10),
                stored(10, 11),
            ],
        ));
        let Taken::Message(message) = feed.take() else { panic!() };
        assert!(message.reset);
        assert_eq!(message.evicted, [3]);
        let runs: Vec<_> = message
            .stored
            .iter()
            .map(|run| (run.parent, run.names.clone()))
            .collect();
        assert_eq!(runs, [(1, vec![2]), (3, vec![4]), (9, vec![10, 11])]);
        assert_eq!(feed.take(), Taken::Nothing);
    }

    #[test]
    fn nothing_is_told_between_a_loss_and_the_next_reset() {
        let feed = BlockFeed::new(10);
        feed.publish(events(false, vec![stored(1, 2)]));
        assert_eq!(feed.take(), Taken::Nothing, "nobody listens yet");
        feed.restart();
        assert_eq!(feed.take(), Taken::Ask);
        assert_eq!(feed.take(), Taken::Nothing, "asked once");
        feed.publish(events(false, vec![stored(1, 2)]));
        assert_eq!(feed.take(), Taken::Nothing);
        feed.publish(events(true, vec![]));
        assert!(matches!(feed.take(), Taken::Message(message) if message.reset && message.stored.is_empty()));
        // A reader that does not come.
        for i in 0..PENDING_MIN as u64 + 1 {
            feed.publish(events(false, vec![stored(i, i + 1)]));
        }
        assert_eq!(feed.take(), Taken::Ask);
        feed.publish(events(true, (0..3000).map(|i| stored(i, i + 1)).collect()));
        let mut resets = Vec::new();
        while let Taken::Message(message) = feed.take() {
            resets.push((message.reset, message.stored[0].names.len()));
        }
        assert_eq!(resets, [(true, 1024), (false, 1024), (false, 952)]);
    }
}
