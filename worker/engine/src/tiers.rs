//! The seam to wherever KV blocks live when they are not in the pool: host memory, disk, an object store.
//!
//! ```text
//!  scheduler ──observe(Stored | Evicted)──▶ KvTiers        copies bytes out, if it wants them
//!            ──load(names, blocks)────────▶                copies bytes in: some now, the rest later
//!            ◀─────────── load_ended(seq, how many)
//! ```
//!
//! The rules that make it safe:
//!
//! - While `observe` runs, the bytes of the event's block are whole: nothing computes, and no block of this plan was handed
//!   to anyone yet. So there is no pin, and nothing to wait for.
//! - Only the thread that plans and computes writes loaded bytes into blocks, within `load` or between steps, and
//!   only until it says `load_ended` or the sequence is cancelled. A late read has no block to land in.
//! - A block that was loaded holds the bytes that its name stands for (P1), so it is named and shared like a computed one.
//!   What cannot promise that counts as not loaded.
//!
//! Not here: which tier a block is in, whether loading pays, files and sockets (`baton-tiers` and the worker).

use std::time::Duration;

use baton_proto::block_hash::BlockHash;

use crate::block_events::BlockEvent;
use crate::step::SeqId;

/// Blocks that a sequence needs next, in order, and that the pool does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadRequest {
    /// Who wants them.
    pub seq: SeqId,
    /// The name before the first of them, or the root's.
    pub parent: BlockHash,
    /// Their names: the continuation of what the pool had.
    pub names: Vec<BlockHash>,
    /// The blocks to fill, one for each name. They belong to the sequence and hold nothing yet.
    pub blocks: Vec<u32>,
    /// How long computing all of them instead would take, by the step times seen so far; `None` where none were.
    pub compute: Option<Duration>,
}

/// Answer to a [`LoadRequest`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LoadStart {
    /// Leading blocks that are in place already.
    pub now: usize,
    /// More will follow: the sequence waits for [`load_ended`](crate::Scheduler::load_ended).
    pub pending: bool,
}

/// See the module.
pub trait KvTiers {
    /// Something happened to a named block, whose bytes are whole until this returns.
    fn observe(&mut self, event: &BlockEvent);
    /// Fills as many leading blocks as can be had sooner than they can be computed, or begins to.
    fn load(&mut self, request: &LoadRequest) -> LoadStart;
}

/// None at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoTiers;

impl KvTiers for NoTiers {
    fn observe(&mut self, _: &BlockEvent) {}

    fn load(&mut self, _: &LoadRequest) -> LoadStart {
        LoadStart::default()
    }
}
