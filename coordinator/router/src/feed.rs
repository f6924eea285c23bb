//! One worker's stream of block events: what of it may be believed.
//!
//! ```text
//!                    reset, any number                  number ≠ expected: close the slot
//! (unsynchronised) ────────────────────▶ (synchronised) ──────────────────────────────────┐
//!        ▲  │ anything else: ask for a resync, again only after a while                     │
//!        │  └───┐                              │ reset: a new slot                          │
//!        └──────┴──────────────────────────────┴────────────────────────────────────────────┘
//! ```
//!
//! Invariants: an unsynchronised worker has no slot, so it counts as cold; what a slot holds is what the events of one
//! reset and those after it, without a gap, have told. So the index is a subset of what the worker had at its last
//! event, and whatever was told under an older registration is under an older slot.
//!
//! A run's parent is not checked: a name covers all before it, and the walk along a chain stops at the first block that
//! is not there, so a run without its beginning finds nothing.
//!
//! Not here: the streams themselves, and epochs: a registration has a feed of its own.

use crate::index::{Index, Slot, Tier};

/// Time between two requests for a resync of one worker, in milliseconds: a resync tells everything, and a worker that
/// keeps losing events must not spend its time on that.
pub const RESYNC_PAUSE_MS: u64 = 1000;

/// A message of block events.
#[derive(Debug, Clone, Copy)]
pub struct BlockUpdate<'a, S> {
    /// Its number in the stream.
    pub number: u64,
    /// Everything told before is void.
    pub reset: bool,
    /// The tier it is about.
    pub tier: Tier,
    /// Names of blocks that are there no more; applied first.
    pub evicted: &'a [u64],
    /// Runs of names of blocks that are there now.
    pub stored: S,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The index has it.
    Applied,
    /// The worker is unsynchronised and was asked already.
    Ignored,
    /// The worker must be asked to tell everything anew.
    Resync,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Feed {
    slot: Option<Slot>,
    next: u64,
    asked_ms: Option<u64>,
}

impl Feed {
    /// Where the worker's content is, if it is known.
    pub(crate) fn slot(&self) -> Option<Slot> {
        self.slot
    }

    pub(crate) fn apply<'n, S>(&mut self, index: &mut Index, update: BlockUpdate<'_, S>, now_ms: u64) -> Verdict
    where
        S: IntoIterator<Item = &'n [u64]>,
    {
        if update.reset {
            self.end(index);
            self.slot = index.open();
            self.asked_ms = None;
        } else if self.slot.is_some() && update.number != self.next {
            self.end(index);
        }
        let Some(slot) = self.slot else {
            // Also where no slot was free: by the next time the sweep may have brought one.
            let wait = self
                .asked_ms
                .is_some_and(|asked| now_ms.saturating_sub(asked) < RESYNC_PAUSE_MS);
            if wait {
                return Verdict::Ignored;
            }
            self.asked_ms = Some(now_ms);
            return Verdict::Resync;
        };
        self.next = update.number.wrapping_add(1);
        index.evict(slot, update.tier, update.evicted);
        for run in update.stored {
            index.store(slot, update.tier, run);
        }
        Verdict::Applied
    }

    /// Nothing told so far holds any more.
    pub(crate) fn end(&mut self, index: &mut Index) {
        if let Some(slot) = self.slot.take() {
            index.close(slot);
        }
    }
}
