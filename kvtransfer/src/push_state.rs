//! A push's life as a state machine: no locks, no tasks; the time is passed in.
//!
//! ```text
//!   Writing ── finish ──► Finishing ── Done reply ──► Settled(Ok(report))
//!      └────────── fail / abort / refusal ──────────► Settled(Err(error))
//! ```
//!
//! Compute appends descriptors with `write`, a transport takes them with `take_batch` and reports replies with
//! `reply`. Invariants: descriptors leave in the order written, adjacent ones merged; FINISH leaves after all of them
//! and once; a push settles once, and successfully only if the receiver has acknowledged exactly the bytes sent.

use crate::PushError;
use crate::busy::BusyClock;
use crate::limits::{FRAME_BYTES_MAX, PAYLOAD_BYTES_MAX, SEND_CHUNK_BYTES};
use crate::ranges::{Descriptor, aligned};
use crate::transport::TransportKind;
use crate::wire::Reply;
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
    /// The queue is empty for now: ask the receiver how much has landed.
    Mark,
    /// Nothing to send at all.
    Idle,
    /// The end of the push.
    Finish { total: u64, payload: Bytes },
    /// The push is over.
    Over,
}

#[derive(Debug)]
enum Phase {
    Writing,
    Finishing { payload: Option<Bytes>, at: Instant },
    Settled(Result<PushReport, PushError>),
}

/// One push.
#[derive(Debug)]
pub(crate) struct PushState {
    phase: Phase,
    region_len: usize,
    queue: VecDeque<Descriptor>,
    descriptors_max: usize,
    queued: u64,
    taken: u64,
    landed: u64,
    frames: u64,
    first_write: Option<Instant>,
    clock: BusyClock,
    transport: TransportKind,
}

impl PushState {
    pub(crate) fn new(region_len: usize, descriptors_max: usize) -> Self {
        Self {
            phase: Phase::Writing,
            region_len,
            queue: VecDeque::new(),
            descriptors_max,
            queued: 0,
            taken: 0,
            landed: 0,
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

    /// Says which transport carries the push.
    pub(crate) fn carried_by(&mut self, transport: TransportKind) {
        self.transport = transport;
    }

    /// Queues a write of the local `range` to `remote`.
    pub(crate) fn write(&mut self, range: Range<usize>, remote: usize, now: Instant) -> Result<(), PushError> {
        match &self.phase {
            Phase::Writing => {}
            Phase::Finishing { .. } | Phase::Settled(Ok(_)) => return Err(PushError::Finished),
            Phase::Settled(Err(error)) => return Err(error.clone()),
        }
        if range.start == range.end {
            return Err(PushError::EmptyWrite { local: range.start });
        }
        let inside = range.start < range.end && range.end <= self.region_len;
        if !inside || remote.checked_add(range.len()).is_none() {
            return Err(PushError::OutOfRange {
                range,
                remote,
                region_len: self.region_len,
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
        if !self.queue.back_mut().is_some_and(|last| last.absorb(&piece)) {
            if self.queue.len() >= self.descriptors_max {
                return Err(PushError::QueueFull {
                    max: self.descriptors_max,
                });
            }
            self.queue.push_back(piece);
        }
        self.queued += piece.len as u64;
        self.first_write.get_or_insert(now);
        self.clock.start(now);
        Ok(())
    }

    /// No more writes; `payload` goes to the receiver with the last byte.
    pub(crate) fn finish(&mut self, payload: Bytes, now: Instant) -> Result<(), PushError> {
        match &self.phase {
            Phase::Writing => {}
            Phase::Finishing { .. } | Phase::Settled(Ok(_)) => return Err(PushError::Finished),
            Phase::Settled(Err(error)) => return Err(error.clone()),
        }
        if payload.len() > PAYLOAD_BYTES_MAX {
            return Err(PushError::PayloadTooLong {
                len: payload.len(),
                max: PAYLOAD_BYTES_MAX,
            });
        }
        self.clock.finish(now);
        self.phase = Phase::Finishing {
            payload: Some(payload),
            at: now,
        };
        Ok(())
    }

    /// Fills `batch` with up to [`SEND_CHUNK_BYTES`] of writes and says what follows them.
    pub(crate) fn take_batch(&mut self, batch: &mut Vec<Descriptor>) -> After {
        batch.clear();
        if self.settled().is_some() {
            return After::Over;
        }
        let mut budget = SEND_CHUNK_BYTES;
        while let Some(front) = self.queue.front_mut().filter(|_| budget > 0) {
            let piece = front.split_front(budget);
            if front.len == 0 {
                self.queue.pop_front();
            }
            budget -= piece.len;
            self.taken += piece.len as u64;
            self.frames += 1;
            batch.push(piece);
        }
        if !self.queue.is_empty() {
            return After::More;
        }
        match &mut self.phase {
            Phase::Finishing { payload, .. } => match payload.take() {
                Some(payload) => After::Finish {
                    total: self.taken,
                    payload,
                },
                None => After::Idle,
            },
            Phase::Writing | Phase::Settled(_) if batch.is_empty() => After::Idle,
            Phase::Writing | Phase::Settled(_) => After::Mark,
        }
    }

    /// Takes the receiver's reply.
    pub(crate) fn reply(&mut self, reply: Reply, now: Instant) -> Result<(), PushError> {
        match reply {
            Reply::Landed(bytes) if bytes < self.landed || bytes > self.taken => {
                Err(PushError::Protocol("it counts bytes that were not sent"))
            }
            Reply::Landed(bytes) => {
                self.landed = bytes;
                if bytes == self.queued && matches!(self.phase, Phase::Writing) {
                    self.clock.stop(now);
                }
                Ok(())
            }
            Reply::Done(bytes) => {
                let Phase::Finishing { payload: None, at } = self.phase else {
                    return Err(PushError::Protocol("it acknowledged a push that is not finished"));
                };
                if bytes != self.taken {
                    return Err(PushError::Protocol(
                        "it acknowledged another number of bytes than were sent",
                    ));
                }
                self.clock.stop(now);
                self.phase = Phase::Settled(Ok(PushReport {
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

    /// Ends the push with `error`. False if it was settled already.
    pub(crate) fn fail(&mut self, error: PushError) -> bool {
        let open = self.settled().is_none();
        if open {
            self.phase = Phase::Settled(Err(error));
            self.queue = VecDeque::new();
        }
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{AbortReason, Refusal};
    use proptest::prelude::*;

    fn drain(push: &mut PushState) -> (Vec<Descriptor>, After) {
        let (mut all, mut batch) = (Vec::new(), Vec::new());
        loop {
            let after = push.take_batch(&mut batch);
            all.append(&mut batch);
            if after != After::More {
                return (all, after);
            }
        }
    }

    #[test]
    fn misuse_is_a_typed_error() {
        let now = Instant::now();
        let mut push = PushState::new(1024, 2);
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
        assert!(matches!(push.finish(long, now), Err(PushError::PayloadTooLong { .. })));
        push.finish(Bytes::new(), now).unwrap();
        assert_eq!(push.write(0..8, 0, now), Err(PushError::Finished));
        assert_eq!(push.finish(Bytes::new(), now), Err(PushError::Finished));
    }

    #[test]
    fn a_push_settles_once_and_only_on_an_exact_acknowledgement() {
        let now = Instant::now();
        let mut push = PushState::new(1024, 8);
        push.write(0..64, 0, now).unwrap();
        assert!(push.reply(Reply::Done(0), now).is_err(), "not finished yet");
        assert!(push.reply(Reply::Landed(64), now).is_err(), "not sent yet");
        assert_eq!(drain(&mut push).1, After::Mark);
        assert_eq!(drain(&mut push).1, After::Idle);
        push.reply(Reply::Landed(64), now).unwrap();
        assert!(push.reply(Reply::Landed(8), now).is_err(), "going backwards");
        push.finish(Bytes::from_static(b"x"), now).unwrap();
        assert!(push.reply(Reply::Done(64), now).is_err(), "FINISH has not left");
        let (_, after) = drain(&mut push);
        assert_eq!(
            after,
            After::Finish {
                total: 64,
                payload: Bytes::from_static(b"x")
            }
        );
        assert!(push.reply(Reply::Done(63), now).is_err());
        push.reply(Reply::Done(64), now).unwrap();
        assert!(matches!(push.settled(), Some(Ok(report)) if report.bytes == 64 && report.frames == 1));
        assert!(!push.fail(PushError::AgentClosed));
        assert_eq!(drain(&mut push), (vec![], After::Over));
    }

    #[test]
    fn a_failed_push_sends_nothing_more_and_tells_the_writer() {
        let now = Instant::now();
        let mut push = PushState::new(1024, 8);
        push.write(0..64, 0, now).unwrap();
        let refused = PushError::Refused(Refusal::WindowClosed);
        assert!(push.fail(refused.clone()));
        assert!(!push.fail(PushError::Aborted(AbortReason::Dropped)));
        assert_eq!(drain(&mut push), (vec![], After::Over));
        assert_eq!(push.write(0..8, 0, now), Err(refused.clone()));
        assert_eq!(push.finish(Bytes::new(), now), Err(refused));
    }

    proptest! {
        /// What leaves is what was written: same bytes to the same places in the same order, whenever the transport
        /// comes for it.
        #[test]
        fn batches_carry_exactly_the_writes(
            writes in prop::collection::vec((0usize..64, 1usize..20_000, 0usize..1_000_000, any::<bool>()), 1..40),
        ) {
            let now = Instant::now();
            let mut push = PushState::new(1 << 20, 64);
            let (mut expected, mut sent, mut batch) = (Vec::new(), Vec::new(), Vec::new());
            let mut end = (0, 0);
            for (local, words, remote, take) in writes {
                // Half of the writes continue the one before, so that merging happens.
                let (local, remote) = if take { end } else { (local * 8, remote * 8) };
                let range = local..local + words * 8;
                if push.write(range.clone(), remote, now).is_ok() {
                    end = (range.end, remote + range.len());
                    expected.extend(range.step_by(8).zip((remote..).step_by(8)));
                }
                if take {
                    push.take_batch(&mut batch);
                    sent.append(&mut batch);
                }
            }
            push.finish(Bytes::new(), now).unwrap();
            let (rest, after) = drain(&mut push);
            sent.extend(rest);
            let words = |d: &Descriptor| (d.local..d.local + d.len).step_by(8).zip((d.remote..).step_by(8));
            prop_assert!(sent.iter().all(|piece| piece.len <= SEND_CHUNK_BYTES));
            prop_assert_eq!(sent.iter().flat_map(words).collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(after, After::Finish { total: expected.len() as u64 * 8, payload: Bytes::new() });
        }
    }
}
