//! What happens to the named blocks of the prefix cache, for whoever keeps an index of them or copies of them elsewhere.
//!
//! The log is off until [`BlockEventLog::enable`]. It is bounded: a reader that does not drain it in time finds
//! [`BlockEvents::reset`] set and reads the present state instead, so nothing is ever silently missing.
//!
//! Not here: the wire, and what readers make of it.

use baton_proto::block_hash::BlockHash;

/// Something happened to a named block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockEvent {
    /// The block is full and computed, and can be shared from now on.
    Stored {
        /// The name of the block before it, or the root's.
        parent: BlockHash,
        /// Its name.
        hash: BlockHash,
        /// Where its KV is. Valid until the event that evicts it.
        block: u32,
    },
    /// The block's content is about to be overwritten; the name finds nothing any more.
    Evicted {
        /// The name of the block before it, or the root's.
        parent: BlockHash,
        /// Its name.
        hash: BlockHash,
        /// Where its KV was, and is until the next step.
        block: u32,
    },
}

/// Events since the last reading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BlockEvents {
    /// Earlier events are void: `events` begins with a `Stored` for every block that is named now.
    pub reset: bool,
    /// In order.
    pub events: Vec<BlockEvent>,
}

/// The log; see the module.
#[derive(Debug, Default)]
pub(crate) struct BlockEventLog {
    /// 0: off.
    max: usize,
    lost: bool,
    events: Vec<BlockEvent>,
}

impl BlockEventLog {
    /// Records from now on, at most `max` events between two readings. The first reading is a reset.
    pub(crate) fn enable(&mut self, max: usize) {
        *self = BlockEventLog {
            max: max.max(1),
            lost: true,
            events: Vec::new(),
        };
    }

    pub(crate) fn push(&mut self, event: BlockEvent) {
        if self.max == 0 || self.lost {
            return;
        }
        if self.events.len() >= self.max {
            self.lost = true;
            self.events = Vec::new();
            return;
        }
        self.events.push(event);
    }

    /// Makes the next reading a reset.
    pub(crate) fn void(&mut self) {
        self.lost = self.max > 0;
        self.events = Vec::new();
    }

    /// The events since the last call; `all` gives the present state for a reset.
    pub(crate) fn take(&mut self, all: impl FnOnce() -> Vec<BlockEvent>) -> BlockEvents {
        if std::mem::take(&mut self.lost) {
            self.events = Vec::new();
            return BlockEvents {
                reset: true,
                events: all(),
            };
        }
        BlockEvents {
            reset: false,
            events: std::mem::take(&mut self.events),
        }
    }
}
