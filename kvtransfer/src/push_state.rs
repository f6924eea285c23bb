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
mod tests {
    use super::*;
    use crate::limits::PAYLOAD_BYTES_MAX;
    use crate::{AbortReason, Refusal};
    use proptest::prelude::*;

    fn state(descriptors_max: usize, memory_len: usize) -> PushState {
        PushState::new(
            memory_len,
            PushLimits {
                descriptors_max,
                payload_max: PAYLOAD_BYTES_MAX,
                retries_max: 2,
                backoff: Duration::from_millis(10),
                grace: Duration::from_secs(1),
            },
        )
    }

    fn lost() -> PushError {
        PushError::PeerLost {
            peer: "127.0.0.1:1".parse().unwrap(),
            detail: "cut".into(),
        }
    }

    fn drain(push: &mut PushState, key: LaneKey) -> (Vec<Descriptor>, After) {
        let (mut all, mut batch) = (Vec::new(), Vec::new());
        loop {
            let after = push.take_batch(key, &mut batch);
            let idle = batch.is_empty();
            all.append(&mut batch);
            if after != After::More && (after != After::Mark || idle) {
                return (all, after);
            }
        }
    }

    fn finish(total: u64) -> After {
        After::Finish {
            total,
            payload: Bytes::new(),
            notify: false,
        }
    }

    #[test]
    fn misuse_is_a_typed_error() {
        let now = Instant::now();
        let mut push = state(2, 1024);
        assert!(matches!(
            push.write(8..8, 0, now),
            Err(PushError::EmptyWrite { local: 8 })
        ));
        #[allow(clippy::reversed_empty_ranges)]
        let reversed = push.write(16..8, 0, now);
        assert!(matches!(reversed, Err(PushError::OutOfRange { .. })));
        assert!(matches!(push.write(0..1032, 0, now), Err(PushError::OutOfRange { .. })));
        assert!(matches!(
            push.write(0..8, usize::MAX - 7, now),
            Err(PushError::OutOfRange { .. })
        ));
        assert!(matches!(push.write(0..12, 0, now), Err(PushError::Misaligned { .. })));
        assert!(matches!(push.write(0..8, 4, now), Err(PushError::Misaligned { .. })));
        push.write(0..8, 0, now).unwrap();
        push.write(8..16, 64, now).unwrap();
        assert!(matches!(
            push.write(16..24, 128, now),
            Err(PushError::QueueFull { max: 2 })
        ));
        push.write(16..24, 72, now)
            .expect("an adjacent write merges even into a full queue");
        let long = Bytes::from(vec![0; PAYLOAD_BYTES_MAX + 1]);
        assert!(matches!(
            push.finish(long, false, now),
            Err(PushError::PayloadTooLong { .. })
        ));
        push.finish(Bytes::new(), false, now).unwrap();
        assert_eq!(push.write(0..8, 0, now), Err(PushError::Finished));
        assert_eq!(push.finish(Bytes::new(), false, now), Err(PushError::Finished));
        assert_eq!(push.open(LANES_MAX), None);
    }

    #[test]
    fn a_push_settles_once_and_only_on_an_exact_acknowledgement() {
        let now = Instant::now();
        let mut push = state(8, 1024);
        let lane = push.open(0).unwrap();
        assert_eq!(push.open(0), None, "the slot is in use");
        push.write(0..64, 0, now).unwrap();
        assert!(push.reply(lane, Reply::Done(0), now).is_err(), "not finished yet");
        assert!(push.reply(lane, Reply::Landed(64), now).is_err(), "not sent yet");
        assert_eq!(push.take_batch(lane, &mut Vec::new()), After::Mark);
        assert_eq!(push.take_batch(lane, &mut Vec::new()), After::Idle);
        push.reply(lane, Reply::Landed(64), now).unwrap();
        assert!(push.reply(lane, Reply::Landed(8), now).is_err(), "going backwards");
        push.finish(Bytes::new(), false, now).unwrap();
        assert!(push.reply(lane, Reply::Done(64), now).is_err(), "FINISH has not left");
        assert_eq!(drain(&mut push, lane), (vec![], finish(64)));
        assert!(push.reply(lane, Reply::Done(63), now).is_err());
        push.reply(lane, Reply::Done(64), now).unwrap();
        assert!(matches!(push.settled(), Some(Ok(report)) if report.bytes == 64 && report.frames == 1));
        assert!(!push.fail(PushError::AgentClosed));
        assert_eq!(drain(&mut push, lane), (vec![], After::Over));
    }

    #[test]
    fn a_failed_push_sends_nothing_more_and_tells_the_writer() {
        let now = Instant::now();
        let mut push = state(8, 1024);
        let lane = push.open(0).unwrap();
        push.write(0..64, 0, now).unwrap();
        let refused = PushError::Refused(Refusal::WindowClosed);
        assert!(push.fail(refused.clone()));
        assert!(!push.fail(PushError::Aborted(AbortReason::Dropped)));
        assert_eq!(drain(&mut push, lane), (vec![], After::Over));
        assert_eq!(push.write(0..8, 0, now), Err(refused.clone()));
        assert_eq!(push.finish(Bytes::new(), false, now), Err(refused));
        assert_eq!(push.open(1), None);
    }

    #[test]
    fn what_a_broken_lane_carried_is_sent_again() {
        let now = Instant::now();
        let mut push = state(8, 1024);
        let (one, two) = (push.open(0).unwrap(), push.open(1).unwrap());
        let mut batch = Vec::new();
        push.write(0..64, 0, now).unwrap();
        assert_eq!(push.take_batch(one, &mut batch), After::Mark);
        push.write(64..128, 512, now).unwrap();
        assert_eq!(push.take_batch(one, &mut batch), After::Mark);
        push.reply(one, Reply::Landed(72), now).unwrap();
        assert_eq!(push.broke(one, lost(), now), Some(Duration::from_millis(10)));
        assert_eq!(push.broke(one, lost(), now), None, "told once");
        push.finish(Bytes::new(), false, now).unwrap();
        let rest = Descriptor {
            local: 72,
            remote: 520,
            len: 56,
        };
        assert_eq!(drain(&mut push, two), (vec![rest], finish(128)));
        assert_eq!(push.take_batch(one, &mut batch), After::Idle);
        let again = push.open(0).unwrap();
        assert_eq!(again.generation, 1);
        assert_eq!(push.take_batch(one, &mut batch), After::Over, "its place is taken");
        assert_eq!(
            push.reply(one, Reply::Done(1), now),
            Ok(()),
            "late replies of it are nothing"
        );
        assert_eq!(drain(&mut push, again), (vec![], finish(128)));
        push.reply(again, Reply::Done(128), now).unwrap();
        assert!(matches!(push.settled(), Some(Ok(_))));
    }

    #[test]
    fn retries_are_bounded_and_name_the_first_cause() {
        let now = Instant::now();
        let mut push = state(8, 1024);
        push.write(0..64, 0, now).unwrap();
        let unreachable = PushError::Unreachable {
            peer: "127.0.0.1:1".parse().unwrap(),
            detail: "nobody".into(),
        };
        let lane = push.open(0).unwrap();
        assert_eq!(push.broke(lane, lost(), now), Some(Duration::from_millis(10)));
        let lane = push.open(0).unwrap();
        assert_eq!(
            push.broke(lane, unreachable.clone(), now),
            Some(Duration::from_millis(20))
        );
        let lane = push.open(0).unwrap();
        assert_eq!(push.broke(lane, unreachable.clone(), now), None);
        assert_eq!(push.settled(), Some(&Err(lost())));

        let mut slow = state(8, 1024);
        let lane = slow.open(0).unwrap();
        assert!(slow.broke(lane, lost(), now).is_some());
        let lane = slow.open(0).unwrap();
        assert_eq!(
            slow.broke(lane, unreachable.clone(), now + Duration::from_secs(1)),
            None
        );
        assert_eq!(
            slow.settled(),
            Some(&Err(lost())),
            "the receiver's window does not wait longer"
        );

        let mut never = state(8, 1024);
        let lane = never.open(0).unwrap();
        assert_eq!(never.broke(lane, unreachable.clone(), now), None);
        assert_eq!(never.settled(), Some(&Err(unreachable)), "a first dial is not repeated");
    }

    #[test]
    fn a_lane_waits_when_too_much_is_in_flight() {
        let now = Instant::now();
        let mut push = state(usize::MAX, LANE_DESCRIPTORS_MAX * 32);
        let lane = push.open(0).unwrap();
        for at in 0..LANE_DESCRIPTORS_MAX + 10 {
            push.write(at * 16..at * 16 + 8, at * 16, now).unwrap();
        }
        let (sent, after) = drain(&mut push, lane);
        assert_eq!((sent.len(), after), (LANE_DESCRIPTORS_MAX, After::Idle));
        push.reply(lane, Reply::Landed(80), now).unwrap();
        assert_eq!(drain(&mut push, lane).0.len(), 10);
        assert_eq!(push.progress(), 80);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        /// What leaves on all lanes together is what was written, whenever lanes come, break and acknowledge.
        #[test]
        fn lanes_carry_exactly_the_writes(
            writes in prop::collection::vec((0usize..64, 1usize..20_000, any::<bool>(), 0u16..3, 0u8..4), 1..40),
        ) {
            let now = Instant::now();
            let mut push = state(64, 1 << 20);
            let mut lanes = [push.open(0).unwrap(), push.open(1).unwrap(), push.open(2).unwrap()];
            let mut sent = [vec![], vec![], vec![]];
            let (mut expected, mut landed) = (std::collections::BTreeMap::new(), std::collections::BTreeMap::new());
            let (mut batch, mut end) = (Vec::new(), 0);
            let words = |d: &Descriptor| (d.local..d.local + d.len).step_by(8).zip((d.remote..).step_by(8));
            for (local, count, joined, slot, what) in writes {
                let start = if joined { end } else { local * 8 };
                let range = start..start + count * 8;
                // One place in the region has one place at the receiver, as with blocks.
                if push.write(range.clone(), range.start + 4096, now).is_ok() {
                    end = range.end;
                    expected.extend(range.step_by(8).map(|at| (at + 4096, at)));
                }
                let at = slot as usize;
                match what {
                    0 | 1 => {
                        push.take_batch(lanes[at], &mut batch);
                        prop_assert!(batch.iter().all(|piece| piece.len <= SEND_CHUNK_BYTES));
                        sent[at].append(&mut batch);
                    }
                    2 => {
                        let bytes = sent[at].iter().map(|piece: &Descriptor| piece.len as u64).sum();
                        push.reply(lanes[at], Reply::Landed(bytes), now).unwrap();
                        landed.extend(sent[at].iter().flat_map(words).map(|(local, remote)| (remote, local)));
                    }
                    _ => if lanes[at].generation < 2 && push.broke(lanes[at], lost(), now).is_some() {
                        sent[at].clear();
                        lanes[at] = push.open(slot).unwrap();
                    },
                }
            }
            push.finish(Bytes::new(), false, now).unwrap();
            for at in 0..3 {
                let (rest, after) = drain(&mut push, lanes[at]);
                sent[at].extend(rest);
                landed.extend(sent[at].iter().flat_map(words).map(|(local, remote)| (remote, local)));
                prop_assert_eq!(after, finish(expected.len() as u64 * 8));
            }
            prop_assert_eq!(&landed, &expected);
            push.reply(lanes[0], Reply::Done(expected.len() as u64 * 8), now).unwrap();
        }
    }
}
