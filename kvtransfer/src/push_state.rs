//! A push's life as a state machine: no locks, no tasks; the time is passed in.
//!
//! ```text
//!   Writing ── finish ──► Finishing ── Done reply ──► Settled(Ok(report))
//!      └── fail / abort / refusal / last lane gone ──► Settled(Err(error))
//!
//!   a slot:   Unused ── open ──► Live ── FINISH sent ──► Finished
//!                        ▲        │ broke                  │ broke
//!                        └────── Waiting (backoff) ◄───────┤
//!                                                          └── retries used up ──► Dead
//! ```
//!
//! Compute appends descriptors with `write`. Each lane takes them with `take_batch`, keeps what it took until the
//! receiver says that it landed, and gives it back to the queue when it breaks.
//!
//! Invariants: every descriptor is in the queue, in flight on exactly one live lane, or landed; adjacent ones are merged;
//! FINISH leaves a lane after its last descriptor, when the queue is empty, and names the number of different bytes
//! written; a push settles once, and successfully only if the receiver has acknowledged exactly that number; retries
//! are bounded, and the error reported is the first cause.

use crate::PushError;
use crate::busy::BusyClock;
use crate::coverage::Coverage;
use crate::limits::{
    COVERAGE_FRAGMENTS_MAX, FRAME_BYTES_MAX, LANE_DESCRIPTORS_MAX, LANES_MAX, MARK_BYTES, SEND_CHUNK_BYTES,
};
use crate::ranges::{Descriptor, aligned};
use crate::transport::TransportKind;
use crate::wire::{LaneKey, Reply};
use bytes::Bytes;
use std::collections::VecDeque;
use std::ops::Range;
use std::time::{Duration, Instant};

// A batch becomes WRITE frames no longer than this, which every receiver takes.
const _: () = assert!(SEND_CHUNK_BYTES <= FRAME_BYTES_MAX);

/// What a completed push did.
#[derive(Debug, Clone, PartialEq)]
pub struct PushReport {
    /// Bytes that landed at the receiver.
    pub bytes: u64,
    /// WRITE frames they travelled in, after merging adjacent writes.
    pub frames: u64,
    /// When the first write was queued; equal to `finished` if there was none.
    pub first_write: Instant,
    /// When `finish` was called.
    pub finished: Instant,
    /// When the receiver's acknowledgement arrived.
    pub last_ack: Instant,
    /// Share of the sending time, from 0 to 1, that fell before `finish` was called, so was hidden behind compute.
    /// Sending time is the time during which some byte was written but not yet known to have landed, plus the
    /// finishing round trip.
    pub overlap: f64,
    /// What carried the bytes.
    pub transport: TransportKind,
}

impl PushReport {
    /// From the first write to the acknowledgement.
    pub fn elapsed(&self) -> Duration {
        self.last_ack.saturating_duration_since(self.first_write)
    }

    /// From `finish` to the acknowledgement: what the request waits for.
    pub fn exposed(&self) -> Duration {
        self.last_ack.saturating_duration_since(self.finished)
    }
}

/// What comes after the writes of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum After {
    /// More writes; ask again at once.
    More,
    /// Ask the receiver how much has landed, and ask again.
    Mark,
    /// Nothing to send for now.
    Idle,
    /// The end of the lane.
    Finish { total: u64, payload: Bytes, notify: bool },
    /// The push is over, or another lane has taken this one's place.
    Over,
}

#[derive(Debug)]
enum Phase {
    Writing,
    Finishing { payload: Bytes, notify: bool, at: Instant },
    Settled(Result<PushReport, PushError>),
}

/// Limits of one push.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PushLimits {
    /// Descriptors queued and not yet taken by a lane.
    pub(crate) descriptors_max: usize,
    /// Bytes of the finishing payload.
    pub(crate) payload_max: usize,
    /// How often one slot is opened again.
    pub(crate) retries_max: u32,
    /// Wait before the first reopening; doubled by each.
    pub(crate) backoff: Duration,
    /// How long a push without a lane tries to get one: as long as the receiver's window waits for it.
    pub(crate) grace: Duration,
}

/// Whether a slot may still carry something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    Unused,
    Live,
    Finished,
    Waiting,
    Dead,
}

/// One slot: a lane and those that took its place.
#[derive(Debug)]
struct Slot {
    condition: Condition,
    generation: u32,
    /// Sent and not known to have landed, in the order sent.
    flying: VecDeque<Descriptor>,
    /// Bytes sent on the current lane, and how many of them have landed.
    sent: u64,
    landed: u64,
    /// Bytes and descriptors sent since the last MARK.
    unmarked: u64,
    unmarked_count: usize,
}

impl Slot {
    fn new() -> Self {
        Self {
            condition: Condition::Unused,
            generation: 0,
            flying: VecDeque::new(),
            sent: 0,
            landed: 0,
            unmarked: 0,
            unmarked_count: 0,
        }
    }

    fn open(&self) -> bool {
        matches!(self.condition, Condition::Live | Condition::Finished)
    }
}

/// One push.
#[derive(Debug)]
pub(crate) struct PushState {
    phase: Phase,
    memory_len: usize,
    limits: PushLimits,
    queue: VecDeque<Descriptor>,
    queued_bytes: u64,
    /// Queued or in flight: written and not known to have landed.
    outstanding: u64,
    /// Places at the receiver that were written.
    written: Coverage,
    slots: Vec<Slot>,
    /// Why a lane first broke.
    first_break: Option<PushError>,
    /// Since when no lane has brought an answer: the last one broke then.
    orphaned: Option<Instant>,
    progress: u64,
    frames: u64,
    first_write: Option<Instant>,
    clock: BusyClock,
    transport: TransportKind,
}

impl PushState {
    pub(crate) fn new(memory_len: usize, limits: PushLimits) -> Self {
        Self {
            phase: Phase::Writing,
            memory_len,
            limits,
            queue: VecDeque::new(),
            queued_bytes: 0,
            outstanding: 0,
            written: Coverage::default(),
            slots: Vec::new(),
            first_break: None,
            orphaned: None,
            progress: 0,
            frames: 0,
            first_write: None,
            clock: BusyClock::default(),
            transport: TransportKind::Quic,
        }
    }

    /// How the push ended, once it has.
    pub(crate) fn settled(&self) -> Option<&Result<PushReport, PushError>> {
        match &self.phase {
            Phase::Settled(result) => Some(result),
            Phase::Writing | Phase::Finishing { .. } => None,
        }
    }

    /// Grows with every acknowledgement: a push whose progress stands still is stalled.
    pub(crate) fn progress(&self) -> u64 {
        self.progress
    }

    /// Says which transport carries the push.
    pub(crate) fn carried_by(&mut self, transport: TransportKind) {
        self.transport = transport;
    }

    /// Bytes that no lane has taken yet.
    pub(crate) fn queued_bytes(&self) -> u64 {
        self.queued_bytes
    }

    /// Queues a write of the local `range` to `remote`.
    pub(crate) fn write(&mut self, range: Range<usize>, remote: usize, now: Instant) -> Result<(), PushError> {
        self.writing()?;
        if range.start == range.end {
            return Err(PushError::EmptyWrite { local: range.start });
        }
        let inside = range.start < range.end && range.end <= self.memory_len;
        if !inside || remote.checked_add(range.len()).is_none() {
            return Err(PushError::OutOfRange {
                range,
                remote,
                region_len: self.memory_len,
            });
        }
        if !aligned(range.start) || !aligned(range.end) || !aligned(remote) {
            return Err(PushError::Misaligned { range, remote });
        }
        let piece = Descriptor {
            local: range.start,
            remote,
            len: range.len(),
        };
        let mut last = self.queue.back().copied();
        let joins = last.as_mut().is_some_and(|last| last.absorb(&piece));
        if !joins && self.queue.len() >= self.limits.descriptors_max {
            return Err(PushError::QueueFull {
                max: self.limits.descriptors_max,
            });
        }
        self.written
            .insert(remote..remote + piece.len)
            .map_err(|_| PushError::TooScattered {
                max: COVERAGE_FRAGMENTS_MAX,
            })?;
        match (joins, last) {
            (true, Some(joined)) => {
                self.queue.pop_back();
                self.queue.push_back(joined);
            }
            _ => self.queue.push_back(piece),
        }
        self.queued_bytes += piece.len as u64;
        self.outstanding += piece.len as u64;
        self.first_write.get_or_insert(now);
        self.clock.start(now);
        Ok(())
    }

    /// No more writes; `payload` goes to the receiver with the last byte, also as a notification if `notify`.
    pub(crate) fn finish(&mut self, payload: Bytes, notify: bool, now: Instant) -> Result<(), PushError> {
        self.writing()?;
        let max = self.limits.payload_max;
        if payload.len() > max {
            return Err(PushError::PayloadTooLong {
                len: payload.len(),
                max,
            });
        }
        self.clock.finish(now);
        self.phase = Phase::Finishing {
            payload,
            notify,
            at: now,
        };
        Ok(())
    }

    /// A slot gets a lane, its first or the next. `None` if the push is over, or the slot used up or in use.
    pub(crate) fn open(&mut self, slot: u16) -> Option<LaneKey> {
        if self.settled().is_some() || slot >= LANES_MAX {
            return None;
        }
        let index = usize::from(slot);
        while self.slots.len() <= index {
            self.slots.push(Slot::new());
        }
        let place = &mut self.slots[index];
        match place.condition {
            Condition::Unused => {}
            Condition::Waiting => place.generation += 1,
            Condition::Live | Condition::Finished | Condition::Dead => return None,
        }
        place.condition = Condition::Live;
        (place.sent, place.landed, place.unmarked, place.unmarked_count) = (0, 0, 0, 0);
        Some(LaneKey {
            slot,
            generation: place.generation,
        })
    }

    /// Fills `batch` with up to [`SEND_CHUNK_BYTES`] of writes for a lane and says what follows them.
    pub(crate) fn take_batch(&mut self, key: LaneKey, batch: &mut Vec<Descriptor>) -> After {
        batch.clear();
        if self.settled().is_some() {
            return After::Over;
        }
        let Some(slot) = current(&mut self.slots, key) else {
            return After::Over;
        };
        if slot.condition != Condition::Live {
            return After::Idle;
        }
        let mut budget = SEND_CHUNK_BYTES;
        while let Some(front) = self
            .queue
            .front_mut()
            .filter(|_| budget > 0 && slot.flying.len() < LANE_DESCRIPTORS_MAX)
        {
            let piece = front.split_front(budget);
            if front.len == 0 {
                self.queue.pop_front();
            }
            budget -= piece.len;
            slot.sent += piece.len as u64;
            slot.unmarked += piece.len as u64;
            slot.unmarked_count += 1;
            slot.flying.push_back(piece);
            self.queued_bytes -= piece.len as u64;
            self.frames += 1;
            batch.push(piece);
        }
        let last = self.queue.is_empty();
        if let (true, Phase::Finishing { payload, notify, .. }) = (last, &self.phase) {
            slot.condition = Condition::Finished;
            return After::Finish {
                total: self.written.bytes(),
                payload: payload.clone(),
                notify: *notify,
            };
        }
        // Nothing more to send for now, by lack of work or by too much in flight: ask what has landed, once.
        let pause = last || batch.is_empty();
        let due = slot.unmarked >= MARK_BYTES || slot.unmarked_count >= LANE_DESCRIPTORS_MAX / 4;
        if slot.unmarked > 0 && (pause || due) {
            (slot.unmarked, slot.unmarked_count) = (0, 0);
            return After::Mark;
        }
        if batch.is_empty() { After::Idle } else { After::More }
    }

    /// Takes the receiver's reply on a lane.
    pub(crate) fn reply(&mut self, key: LaneKey, reply: Reply, now: Instant) -> Result<(), PushError> {
        let total = self.written.bytes();
        let Some(slot) = current(&mut self.slots, key) else {
            // A lane that another replaced; what it carried is being sent again.
            return Ok(());
        };
        self.orphaned = None;
        match reply {
            Reply::Landed(bytes) if bytes < slot.landed || bytes > slot.sent => {
                Err(PushError::Protocol("it counts bytes that were not sent"))
            }
            Reply::Landed(bytes) => {
                let mut news = bytes - slot.landed;
                slot.landed = bytes;
                self.progress += news;
                self.outstanding = self.outstanding.saturating_sub(news);
                while let Some(front) = slot.flying.front_mut().filter(|_| news > 0) {
                    let known = (front.len as u64).min(news);
                    front.split_front(known as usize);
                    news -= known;
                    if front.len == 0 {
                        slot.flying.pop_front();
                    }
                }
                if self.outstanding == 0 && matches!(self.phase, Phase::Writing) {
                    self.clock.stop(now);
                }
                Ok(())
            }
            Reply::Done(bytes) => {
                let sent = self.slots.iter().any(|slot| slot.condition == Condition::Finished);
                let Phase::Finishing { at, .. } = self.phase else {
                    return Err(PushError::Protocol("it acknowledged a push that is not finished"));
                };
                // FINISH may have left on a lane that broke since; a repeated push is answered at its first frame.
                let retried = self.slots.iter().any(|slot| slot.generation > 0);
                if !sent && !retried {
                    return Err(PushError::Protocol("it acknowledged a push that is not finished"));
                }
                if bytes != total {
                    return Err(PushError::Protocol(
                        "it acknowledged another number of bytes than were sent",
                    ));
                }
                self.clock.stop(now);
                self.end(Ok(PushReport {
                    bytes,
                    frames: self.frames,
                    first_write: self.first_write.unwrap_or(at),
                    finished: at,
                    last_ack: now,
                    overlap: self.clock.hidden_share(),
                    transport: self.transport,
                }));
                Ok(())
            }
            Reply::Refused(refusal) => Err(PushError::Refused(refusal)),
        }
    }

    /// A lane ended with `error`. How long to wait before the slot is opened again; `None` if it is not: the push may
    /// go on over other lanes, or has failed.
    pub(crate) fn broke(&mut self, key: LaneKey, error: PushError, now: Instant) -> Option<Duration> {
        if self.settled().is_some() {
            return None;
        }
        let PushLimits {
            retries_max,
            backoff,
            grace,
            ..
        } = self.limits;
        let slot = current(&mut self.slots, key)?;
        if !slot.open() {
            return None;
        }
        // A peer that could be reached before may be back in a moment.
        let retry = error.lane_only() || (slot.generation > 0 && matches!(error, PushError::Unreachable { .. }));
        if !retry {
            self.fail(error);
            return None;
        }
        let wait = backoff.saturating_mul(1 << slot.generation.min(8));
        let since = *self.orphaned.get_or_insert(now);
        let again = slot.generation < retries_max && now + wait < since + grace;
        slot.condition = if again { Condition::Waiting } else { Condition::Dead };
        // What it carried goes first: it was written first.
        while let Some(piece) = slot.flying.pop_back() {
            self.queued_bytes += piece.len as u64;
            self.queue.push_front(piece);
        }
        let cause = self.first_break.get_or_insert(error).clone();
        if self.slots.iter().any(Slot::open) {
            self.orphaned = None;
        }
        if again {
            return Some(wait);
        }
        let has = |condition| self.slots.iter().any(|slot| slot.condition == condition);
        let hope = has(Condition::Live)
            || has(Condition::Waiting)
            || (has(Condition::Finished) && self.queue.is_empty() && matches!(self.phase, Phase::Finishing { .. }));
        if !hope {
            self.fail(cause);
        }
        None
    }

    /// Ends the push with `error`. False if it was settled already.
    pub(crate) fn fail(&mut self, error: PushError) -> bool {
        let open = self.settled().is_none();
        if open {
            self.end(Err(error));
        }
        open
    }

    fn end(&mut self, result: Result<PushReport, PushError>) {
        self.phase = Phase::Settled(result);
        self.queue = VecDeque::new();
        self.queued_bytes = 0;
        self.written = Coverage::default();
        for slot in &mut self.slots {
            slot.flying = VecDeque::new();
        }
    }

    fn writing(&self) -> Result<(), PushError> {
        match &self.phase {
            Phase::Writing => Ok(()),
            Phase::Finishing { .. } | Phase::Settled(Ok(_)) => Err(PushError::Finished),
            Phase::Settled(Err(error)) => Err(error.clone()),
        }
    }
}

/// The slot of a lane, unless another lane has taken its place.
fn current(slots: &mut [Slot], key: LaneKey) -> Option<&mut Slot> {
    slots
        .get_mut(usize::from(key.slot))
        .filter(|slot| slot.generation == key.generation && slot.condition != Condition::Unused)
}

#[cfg(test)]
mod tests;
