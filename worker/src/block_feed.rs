//! What happens to the prefix cache and the lower tiers, between the engine thread, which logs it, and the Join stream, which tells it.
//!
//! ```text
//!            publish(reset)                 too many pending, or a new stream
//! (lost) ───────────────────▶ (flowing) ────────────────────────────────────▶ (lost)
//!    └─ the reader asks the engine to tell everything anew, once
//! ```
//!
//! Bounded: what is not taken in time is thrown away and told anew, so that a slow or absent coordinator costs memory for
//! events on twice as many blocks as there can be, and no more. A message is about one tier, and compacted to the last thing
//! that happened to each block; what happens in one tier is told in order, between tiers there is none.
//!
//! Not here: the stream and its message numbers ([`crate::membership`]).

use baton_engine::{BlockEvent, BlockEvents};
use baton_proto::block_hash::short;
use baton_proto::cluster::{self, BlockRun, Tier};
use baton_tiers::Change;
use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// Events in one message: some 10 KiB, 20 where no two blocks are in a chain, well below what a coordinator takes, and an update that its index has taken in
/// before a request notices.
const MESSAGE_EVENTS_MAX: usize = 1024;
/// Smallest bound on pending events, for tiny pools.
const PENDING_MIN: usize = 4096;

/// Changes of one tier in a row.
pub(crate) type TierChanges = (baton_tiers::Tier, Vec<Change>);

/// Tiers, the device among them.
const TIERS: [Tier; 4] = [Tier::Device, Tier::Host, Tier::Disk, Tier::Object];

#[derive(Debug, Default)]
struct Inner {
    /// In order of [`TIERS`].
    pending: [VecDeque<Change>; 4],
    pending_max: usize,
    /// The next message begins anew.
    reset: bool,
    /// What is pending is void; nothing is told before the engine tells all.
    lost: bool,
    /// The engine was asked to.
    asked: bool,
}

impl Inner {
    fn clear(&mut self) {
        self.pending = Default::default();
    }

    fn has_changes(&self) -> bool {
        self.pending.iter().any(|pending| !pending.is_empty())
    }
}

fn change(event: &BlockEvent) -> Change {
    match event {
        BlockEvent::Stored { parent, hash, .. } => Change::Stored {
            parent: short(parent),
            name: short(hash),
        },
        BlockEvent::Evicted { hash, .. } => Change::Evicted { name: short(hash) },
    }
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
    /// For a pool and lower tiers that hold, or tell of, so many blocks in all.
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

    /// The engine's side: what happened in a step to the pool and to the tiers below it. With a reset, `lower` tells them anew
    /// too.
    pub(crate) fn publish(&self, events: BlockEvents, lower: impl IntoIterator<Item = TierChanges>) {
        let device = events.events.iter().map(change).collect();
        let mut told = [device, Vec::new(), Vec::new(), Vec::new()];
        for (tier, changes) in lower {
            told[1 + tier as usize] = changes;
        }
        let count: usize = told.iter().map(Vec::len).sum();
        if !events.reset && count == 0 {
            return;
        }
        let mut inner = self.lock();
        if events.reset {
            inner.clear();
            (inner.reset, inner.lost, inner.asked) = (true, false, false);
        } else if inner.lost {
            return;
        }
        if inner.pending.iter().map(VecDeque::len).sum::<usize>() + count > inner.pending_max {
            inner.clear();
            (inner.reset, inner.lost) = (false, true);
        } else {
            for (pending, changes) in inner.pending.iter_mut().zip(told) {
                pending.extend(changes);
            }
        }
        drop(inner);
        self.something.notify_one();
    }

    /// Whoever listens must be told everything anew.
    pub(crate) fn restart(&self) {
        let mut inner = self.lock();
        inner.clear();
        (inner.reset, inner.lost, inner.asked) = (false, true, false);
        drop(inner);
        self.something.notify_one();
    }

    /// Waits until [`take`](Self::take) has something. Cancel-safe; for one reader.
    pub(crate) async fn ready(&self) {
        loop {
            {
                let inner = self.lock();
                if (inner.lost && !inner.asked) || inner.reset || inner.has_changes() {
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
        if !inner.reset && !inner.has_changes() {
            return Taken::Nothing;
        }
        let reset = std::mem::take(&mut inner.reset);
        let at = inner
            .pending
            .iter()
            .position(|pending| !pending.is_empty())
            .unwrap_or(0);
        let count = inner.pending[at].len().min(MESSAGE_EVENTS_MAX);
        let changes: Vec<Change> = inner.pending[at].drain(..count).collect();
        drop(inner);
        Taken::Message(message(TIERS[at], &changes, reset))
    }
}

/// The wire applies evictions before stores, so of each block only the last event counts.
fn message(tier: Tier, events: &[Change], reset: bool) -> cluster::BlockEvents {
    let name = |event: &Change| match event {
        Change::Stored { name, .. } | Change::Evicted { name } => *name,
    };
    let last: HashMap<u64, usize> = events.iter().enumerate().map(|(at, event)| (name(event), at)).collect();
    let mut message = cluster::BlockEvents {
        reset,
        tier: tier.into(),
        ..Default::default()
    };
    for (at, event) in events.iter().enumerate() {
        if last.get(&name(event)) != Some(&at) {
            continue;
        }
        match *event {
            Change::Evicted { name } => message.evicted.push(name),
            Change::Stored { parent, name } => match message.stored.last_mut() {
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
        feed.publish(events(true, vec![stored(1, 2), stored(2, 3), stored(9, 10)]), []);
        feed.publish(
            events(
                false,
                vec![
                    BlockEvent::Evicted {
                        parent: hash(0),
                        hash: hash(3),
                        block: 0,
                    },
                    stored(3, 4),
                    BlockEvent::Evicted {
                        parent: hash(0),
                        hash: hash(10),
                        block: 0,
                    },
                    stored(9, 10),
                    stored(10, 11),
                ],
            ),
            [],
        );
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

    /// Each message is about one tier; a reset is said once, and a tier that overflows loses all.
    #[test]
    fn lower_tiers_are_told_in_messages_of_their_own() {
        use baton_tiers::Tier as Lower;
        let at = |parent, name| Change::Stored { parent, name };
        let feed = BlockFeed::new(10);
        feed.publish(
            events(true, vec![stored(1, 2)]),
            [(Lower::Disk, vec![at(1, 2), at(2, 3)]), (Lower::Host, vec![])],
        );
        feed.publish(
            events(false, vec![]),
            [
                (Lower::Disk, vec![Change::Evicted { name: 2 }]),
                (Lower::Object, vec![at(3, 4)]),
            ],
        );
        let mut told = Vec::new();
        while let Taken::Message(message) = feed.take() {
            let runs: Vec<_> = message
                .stored
                .iter()
                .map(|run| (run.parent, run.names.clone()))
                .collect();
            told.push((message.tier(), message.reset, runs, message.evicted));
        }
        let expected = [
            (Tier::Device, true, vec![(1, vec![2])], vec![]),
            (Tier::Disk, false, vec![(2, vec![3])], vec![2]),
            (Tier::Object, false, vec![(3, vec![4])], vec![]),
        ];
        assert_eq!(told, expected);
        let many = (0..PENDING_MIN as u64).map(|n| at(n, n + 1)).collect();
        feed.publish(events(false, vec![stored(1, 5)]), [(Lower::Disk, many)]);
        assert_eq!(feed.take(), Taken::Ask);
        feed.publish(events(true, vec![]), [(Lower::Disk, vec![at(1, 2)])]);
        assert!(matches!(feed.take(), Taken::Message(message) if message.reset && message.tier() == Tier::Disk));
        assert_eq!(feed.take(), Taken::Nothing);
    }

    #[test]
    fn nothing_is_told_between_a_loss_and_the_next_reset() {
        let feed = BlockFeed::new(10);
        feed.publish(events(false, vec![stored(1, 2)]), []);
        assert_eq!(feed.take(), Taken::Nothing, "nobody listens yet");
        feed.restart();
        assert_eq!(feed.take(), Taken::Ask);
        assert_eq!(feed.take(), Taken::Nothing, "asked once");
        feed.publish(events(false, vec![stored(1, 2)]), []);
        assert_eq!(feed.take(), Taken::Nothing);
        feed.publish(events(true, vec![]), []);
        assert!(matches!(feed.take(), Taken::Message(message) if message.reset && message.stored.is_empty()));
        // A reader that does not come.
        for i in 0..PENDING_MIN as u64 + 1 {
            feed.publish(events(false, vec![stored(i, i + 1)]), []);
        }
        assert_eq!(feed.take(), Taken::Ask);
        feed.publish(events(true, (0..3000).map(|i| stored(i, i + 1)).collect()), []);
        let mut resets = Vec::new();
        while let Taken::Message(message) = feed.take() {
            resets.push((message.reset, message.stored[0].names.len()));
        }
        assert_eq!(resets, [(true, 1024), (false, 1024), (false, 952)]);
    }
}
