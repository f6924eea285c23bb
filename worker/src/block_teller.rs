//! Fans the block feed out to the coordinators: one task takes messages from the feed, each session reads them at its own
//! pace.
//!
//! ```text
//! BlockFeed ──take, paced──▶ BlockTeller ──ring of messages──▶ reader per session (numbers, waits for a reset)
//!     ▲                                                             │
//!     └──────── restart: tell everything anew ◀─────────────────────┘  at the start, on request, or fallen behind
//! ```
//!
//! A reader says nothing before it has seen a reset. When one needs everything anew the others see the reset too, which costs
//! them a repetition and nothing else. A reader that has fallen behind the ring asks again, after a pause, so that one slow
//! coordinator does not keep the engine telling.

use crate::block_feed::{BlockFeed, Taken};
use crate::engine_thread::{Command, EngineHandle};
use baton_proto::cluster::BlockEvents;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::time::{Instant, sleep_until};

/// Block events are told at most this often, so that those of several steps share a message. A router knows of a block
/// that much later; until then its own record of what it placed stands in.
const EVENTS_INTERVAL: Duration = Duration::from_millis(25);
/// Messages in one go; some 80,000 blocks a second.
const BURST_MAX: usize = 2;
/// Messages that a reader may be behind: over a second at full rate, and at most some 3 MiB.
const RING: usize = 128;
/// Pause before a reader that fell behind asks for everything anew.
const BEHIND_PAUSE: Duration = Duration::from_secs(1);

/// What a reader has for its coordinator.
#[derive(Debug, PartialEq)]
pub(crate) enum Next {
    /// Send this.
    Events(BlockEvents),
    /// The worker ends.
    Over,
}

/// See the module.
pub(crate) struct BlockTeller {
    engine: EngineHandle,
    ring: broadcast::Sender<Arc<BlockEvents>>,
}

impl BlockTeller {
    pub(crate) fn new(engine: EngineHandle) -> Arc<Self> {
        Arc::new(Self {
            engine,
            ring: broadcast::Sender::new(RING),
        })
    }

    /// Takes messages from the feed, for ever.
    pub(crate) async fn run(&self) {
        let engine = &self.engine;
        loop {
            engine.blocks().ready().await;
            for _ in 0..BURST_MAX {
                match engine.blocks().take() {
                    Taken::Nothing => break,
                    // Waits for room in the command queue at most, as every command does.
                    Taken::Ask => engine.send(Command::TellBlocks).await,
                    // Without readers nobody needs it.
                    Taken::Message(events) => drop(self.ring.send(Arc::new(events))),
                }
            }
            tokio::time::sleep(EVENTS_INTERVAL).await;
        }
    }

    /// A reader for a new session. It has nothing before [`Reader::restart`].
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader {
            feed: self.engine.blocks(),
            messages: self.ring.subscribe(),
            synced: false,
            number: 0,
            behind_pause: BEHIND_PAUSE,
            ask_at: None,
        }
    }
}

/// One session's view of the ring.
pub(crate) struct Reader<'t> {
    feed: &'t BlockFeed,
    messages: broadcast::Receiver<Arc<BlockEvents>>,
    /// A reset was seen, and nothing lost since.
    synced: bool,
    /// Number of the last message.
    number: u64,
    behind_pause: Duration,
    /// When to ask for everything anew.
    ask_at: Option<Instant>,
}

impl Reader<'_> {
    /// The coordinator must be told everything anew.
    pub(crate) fn restart(&mut self) {
        self.synced = false;
        self.ask_at = None;
        self.feed.restart();
    }

    /// The next message. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Next {
        loop {
            let ask = async {
                match self.ask_at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            let received = tokio::select! {
                received = self.messages.recv() => received,
                () = ask => {
                    self.ask_at = None;
                    self.feed.restart();
                    continue;
                }
            };
            match received {
                Ok(events) => {
                    self.synced |= events.reset;
                    if self.synced {
                        self.ask_at = None;
                        self.number += 1;
                        let number = self.number;
                        return Next::Events(BlockEvents {
                            number,
                            ..BlockEvents::clone(&events)
                        });
                    }
                }
                Err(RecvError::Lagged(_)) => {
                    self.synced = false;
                    self.ask_at = Some(Instant::now() + self.behind_pause);
                }
                Err(RecvError::Closed) => return Next::Over,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use baton_engine::BlockEvents as EngineEvents;

    fn reset() -> EngineEvents {
        EngineEvents {
            reset: true,
            events: Vec::new(),
        }
    }

    fn reader<'t>(feed: &'t BlockFeed, ring: &broadcast::Sender<Arc<BlockEvents>>) -> Reader<'t> {
        Reader {
            feed,
            messages: ring.subscribe(),
            synced: false,
            number: 0,
            behind_pause: Duration::from_millis(200),
            ask_at: None,
        }
    }

    fn message(reset: bool) -> Arc<BlockEvents> {
        Arc::new(BlockEvents {
            reset,
            ..BlockEvents::default()
        })
    }

    #[tokio::test]
    async fn each_reader_begins_with_a_reset_and_counts_for_itself() {
        let feed = BlockFeed::new(10);
        let ring = broadcast::Sender::new(4);
        let mut first = reader(&feed, &ring);
        first.restart();
        assert_eq!(feed.take(), Taken::Ask);
        ring.send(message(false)).expect("a reader");
        ring.send(message(true)).expect("a reader");
        ring.send(message(false)).expect("a reader");
        let number = |next| match next {
            Next::Events(events) => (events.number, events.reset),
            Next::Over => panic!("it is not over"),
        };
        assert_eq!(number(first.next().await), (1, true));
        assert_eq!(number(first.next().await), (2, false));
        let mut second = reader(&feed, &ring);
        ring.send(message(false)).expect("readers");
        ring.send(message(true)).expect("readers");
        assert_eq!(number(second.next().await), (1, true));
        assert_eq!(number(first.next().await), (3, false));
        assert_eq!(number(first.next().await), (4, true));
    }

    #[tokio::test]
    async fn a_reader_that_fell_behind_asks_once_and_says_nothing_before_a_reset() {
        let feed = BlockFeed::new(10);
        let ring = broadcast::Sender::new(4);
        let mut reader = reader(&feed, &ring);
        reader.restart();
        feed.publish(reset(), []);
        ring.send(message(true)).expect("a reader");
        assert!(matches!(reader.next().await, Next::Events(_)));
        assert!(matches!(feed.take(), Taken::Message(_)));
        for _ in 0..10 {
            ring.send(message(false)).expect("a reader");
        }
        let waited = tokio::time::timeout(Duration::from_millis(50), reader.next()).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(feed.take(), Taken::Nothing, "not asked yet");
        let waited = tokio::time::timeout(Duration::from_millis(400), reader.next()).await;
        assert!(waited.is_err(), "{waited:?}");
        assert_eq!(feed.take(), Taken::Ask);
        ring.send(message(true)).expect("a reader");
        assert!(matches!(reader.next().await, Next::Events(events) if events.reset));
    }
}
