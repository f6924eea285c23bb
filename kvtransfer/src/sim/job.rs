//! One job of the simulation: a push, or a read of an export, with the model of what it must leave behind.

use crate::Region;
use crate::incoming::Incoming;
use crate::push::{Lane, LaneReplies, Outgoing};
use crate::window_table::{WindowCell, WindowTable};
use crate::wire::ReplyDecoder;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// Bytes of a block, and blocks of the receiver's memory.
pub(super) const BLOCK: usize = 256;
pub(super) const BLOCKS: usize = 24;

/// What overwrites memory that is not lent any more. No pattern contains it.
pub(super) const POISON: u8 = 0xee;

/// The byte that job `job` writes at offset `at` of the receiver's memory: odd, so never the poison.
pub(super) fn pattern(job: usize, at: usize) -> u8 {
    (((at / 8).wrapping_mul(31) ^ job.wrapping_mul(0x9d)) as u8) | 1
}

/// One life of the receiving process.
pub(super) struct Life {
    pub(super) table: Arc<WindowTable>,
    pub(super) region: Arc<Region>,
}

/// The reader's and owner's side of a read.
pub(super) struct Reading {
    /// The reader still wants it: heartbeats go on.
    pub(super) wanted: bool,
    /// The owner has taken the request.
    pub(super) begun: bool,
    /// The lease is over.
    pub(super) ended: bool,
    /// Acknowledged bytes when the owner last looked.
    pub(super) progress: u64,
    /// When the owner was last heard of.
    pub(super) heard: Instant,
}

pub(super) struct Job {
    pub(super) started: Instant,
    /// Which life of the receiver opened the window.
    pub(super) life: usize,
    pub(super) cell: Arc<WindowCell>,
    /// `None` until a read has begun.
    pub(super) push: Option<Arc<Outgoing>>,
    pub(super) source: Arc<Region>,
    /// The receiver's blocks, and which of them are still to be written.
    pub(super) blocks: Vec<usize>,
    pub(super) to_write: Vec<usize>,
    pub(super) reading: Option<Reading>,
    /// The window is over, and what its ranges are is nobody's business any more.
    pub(super) over: bool,
    /// Its window was completed and checked.
    pub(super) completed: bool,
    /// The sender's memory was overwritten.
    pub(super) poisoned: bool,
    /// Since when one side is over and the other is not.
    pub(super) half_since: Option<Instant>,
}

impl Job {
    pub(super) fn settled(&self) -> bool {
        let push = match &self.push {
            Some(push) => push.result().is_some(),
            None => self.reading.is_some(),
        };
        push && self.over && self.reading.as_ref().is_none_or(|reading| reading.ended)
    }
}

/// One lane on its way.
pub(super) struct Wire {
    pub(super) job: usize,
    pub(super) slot: u16,
    /// The sender's end, while it has one.
    pub(super) lane: Option<Lane>,
    pub(super) replies: LaneReplies,
    pub(super) decoder: ReplyDecoder,
    /// The receiver's end, while it has one.
    pub(super) incoming: Option<Incoming>,
    pub(super) forward: VecDeque<u8>,
    pub(super) backward: VecDeque<u8>,
    /// Everything sent, to be replayed.
    pub(super) sent: Vec<u8>,
    /// Nothing gets through any more, in both directions.
    pub(super) silent: bool,
    /// Typical delay in milliseconds.
    pub(super) latency_ms: u64,
    /// A Send event is due.
    pub(super) scheduled: bool,
}
