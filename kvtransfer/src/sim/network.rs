//! The network of the simulation: lanes, what arrives on them, and how they break.

use super::job::{Life, Wire};
use super::world::{Cut, Event, STALL, World};
use crate::incoming::Incoming;
use crate::push::Next;
use crate::wire::{Integrity, Reply, ReplyDecoder};
use crate::{AbortReason, PushError, WindowError};
use bytes::BytesMut;
use rand::Rng;
use std::collections::VecDeque;

impl World {
    pub(super) fn wake(&mut self, job: usize) {
        for wire in 0..self.wires.len() {
            if self.wires[wire].job == job && self.wires[wire].lane.is_some() && !self.wires[wire].scheduled {
                self.wires[wire].scheduled = true;
                self.soon(5, Event::Send(wire));
            }
        }
    }

    pub(super) fn open(&mut self, job: usize, slot: u16) {
        let Some(push) = self.jobs[job].push.clone() else {
            return;
        };
        let Some(mut lane) = push.lane(slot, self.integrity) else {
            return;
        };
        if lane.again() {
            self.tally.lanes_replaced += 1;
        }
        let opening = lane.opening();
        let Life { table, .. } = &self.lives[self.lives.len() - 1];
        let incoming = Incoming::with_integrity(table.clone(), "sim".into(), self.integrity);
        let index = self.wires.len();
        self.wires.push(Wire {
            job,
            slot,
            replies: lane.replies(),
            lane: Some(lane),
            decoder: ReplyDecoder::new(self.integrity),
            incoming: Some(incoming),
            forward: opening.iter().copied().collect(),
            backward: VecDeque::new(),
            sent: opening.to_vec(),
            silent: false,
            latency_ms: self.rng.random_range(1..60),
            scheduled: true,
        });
        self.travel(index);
        self.soon(5, Event::Send(index));
        self.after(STALL.as_millis() as u64, Event::Stall(index, push.progress()));
        if self.rng.random_bool(0.3) {
            let how = match self.rng.random_range(0..3) {
                0 => Cut::Loud,
                1 => Cut::HalfOpen,
                _ => Cut::Silent,
            };
            self.soon(700, Event::Cut(index, how));
        }
        if self.rng.random_bool(0.15) {
            self.soon(4000, Event::Replay(index));
        }
    }

    /// Schedules the arrival of what was sent.
    pub(super) fn travel(&mut self, wire: usize) {
        let ms = self.wires[wire].latency_ms;
        let jitter = self.rng.random_range(0..=ms);
        self.after(ms + jitter, Event::Deliver(wire));
    }

    pub(super) fn send(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        wire.scheduled = false;
        let Some(lane) = &mut wire.lane else { return };
        match lane.next(&mut Vec::new()) {
            Next::Send(bytes) => {
                wire.forward.extend(&bytes);
                wire.sent.extend(&bytes);
                wire.scheduled = true;
                self.travel(index);
                self.soon(10, Event::Send(index));
            }
            Next::Last(bytes) => {
                wire.forward.extend(&bytes);
                wire.sent.extend(&bytes);
                self.travel(index);
            }
            Next::Wait | Next::Over => {}
        }
    }

    pub(super) fn deliver(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if wire.silent || wire.forward.is_empty() {
            return;
        }
        let count = if self.rng.random_bool(0.5) {
            wire.forward.len()
        } else {
            self.rng.random_range(1..=wire.forward.len())
        };
        let mut part: Vec<u8> = wire.forward.drain(..count).collect();
        let rest = !wire.forward.is_empty();
        if self.integrity == Integrity::Checksum && self.rng.random_bool(0.02) {
            let at = self.rng.random_range(0..part.len());
            part[at] ^= 1 << self.rng.random_range(0..8);
            self.tally.damaged += 1;
        }
        let job = wire.job;
        let Some(mut incoming) = wire.incoming.take() else {
            return;
        };
        let over = self.jobs[job].over;
        let before = over.then(|| self.memory());
        let result = incoming.feed_at(&part, self.now);
        if let Some(before) = before {
            assert!(
                self.memory() == before,
                "a byte of job {job} landed after its window was over"
            );
            self.tally.late_bytes_refused += u64::from(result.is_err());
        }
        let mut reply = BytesMut::new();
        match result {
            Ok(answer) => {
                answer
                    .into_iter()
                    .for_each(|answer| answer.put_with(&mut reply, self.integrity));
                self.wires[index].incoming = Some(incoming);
            }
            Err(refusal) => {
                incoming.broken("refused".into(), self.now);
                Reply::Refused(refusal).put_with(&mut reply, self.integrity);
            }
        }
        self.reply(index, &reply);
        if rest {
            self.travel(index);
        }
    }

    pub(super) fn reply(&mut self, index: usize, reply: &[u8]) {
        if reply.is_empty() {
            return;
        }
        let wire = &mut self.wires[index];
        wire.backward.extend(reply);
        let ms = wire.latency_ms + self.rng.random_range(0..=wire.latency_ms);
        self.after(ms, Event::Answer(index));
    }

    pub(super) fn answer(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if wire.silent || wire.lane.is_none() {
            return;
        }
        let mut part: Vec<u8> = wire.backward.drain(..).collect();
        if !part.is_empty() && self.integrity == Integrity::Checksum && self.rng.random_bool(0.02) {
            let at = self.rng.random_range(0..part.len());
            part[at] ^= 1 << self.rng.random_range(0..8);
            self.tally.damaged += 1;
        }
        let mut input = &part[..];
        loop {
            let wire = &mut self.wires[index];
            let result = match wire.decoder.next(&mut input) {
                Ok(Some(reply)) => wire.replies.reply_at(reply, self.now),
                Ok(None) => break,
                Err(bad) => Err(bad.into()),
            };
            if let Err(error) = result {
                return self.sender_breaks(index, error);
            }
        }
        let job = self.wires[index].job;
        self.wake(job);
        self.push_settled(job);
    }

    pub(super) fn sender_breaks(&mut self, index: usize, error: PushError) {
        let wire = &mut self.wires[index];
        if wire.lane.take().is_none() {
            return;
        }
        let (job, slot) = (wire.job, wire.slot);
        let wait = wire.replies.broke_at(error, self.now);
        if let Some(wait) = wait {
            self.after(wait.as_millis() as u64, Event::Open(job, slot));
        }
        // A reset, which overtakes what is queued; but the connection may be gone, or some of it be there already.
        if self.rng.random_bool(0.7) {
            self.soon(60, Event::ReceiverBreaks(index, None));
        } else {
            self.after(STALL.as_millis() as u64, Event::ReceiverBreaks(index, None));
        }
        self.wake(job);
        self.push_settled(job);
    }

    pub(super) fn receiver_breaks(&mut self, index: usize, reason: Option<AbortReason>) {
        let Some(mut incoming) = self.wires[index].incoming.take() else {
            return;
        };
        match reason {
            Some(reason) => incoming.lost(WindowError::Aborted(reason)),
            None => incoming.broken("cut".into(), self.now),
        }
    }

    pub(super) fn stall(&mut self, index: usize, before: u64) {
        let wire = &self.wires[index];
        let Some(push) = self.jobs[wire.job].push.clone() else {
            return;
        };
        if wire.lane.is_none() || push.result().is_some() {
            return;
        }
        let progress = push.progress();
        // Only a silent lane stalls here; compute that takes its time does not.
        if progress == before && wire.silent {
            self.sender_breaks(index, PushError::Stalled { limit: STALL });
        } else {
            // As a transport would do whose lane is damaged in a way that leaves the peer waiting.
            let damaged =
                progress == before && self.integrity == Integrity::Checksum && self.jobs[wire.job].to_write.is_empty();
            if damaged {
                self.sender_breaks(index, PushError::Stalled { limit: STALL });
            } else {
                self.after(STALL.as_millis() as u64, Event::Stall(index, progress));
            }
        }
    }

    /// Everything a lane ever sent arrives once more, at whatever the receiver is by then.
    pub(super) fn replay(&mut self, index: usize) {
        let wire = &self.wires[index];
        let (job, sent) = (wire.job, wire.sent.clone());
        let Life { table, .. } = &self.lives[self.lives.len() - 1];
        let mut incoming = Incoming::with_integrity(table.clone(), "replay".into(), self.integrity);
        let over = self.jobs[job].over;
        let before = self.memory();
        let cut = self.rng.random_range(0..=sent.len());
        let result = incoming.feed_at(&sent[..cut], self.now);
        if over {
            assert!(
                self.memory() == before,
                "a replayed byte of job {job} landed after its window was over"
            );
            self.tally.late_bytes_refused += u64::from(result.is_err());
        }
        incoming.broken("replayed".into(), self.now);
    }

    pub(super) fn cut(&mut self, index: usize, how: Cut) {
        if self.wires[index].lane.is_none() {
            return;
        }
        let lost = PushError::PeerLost {
            peer: ([127, 0, 0, 1], 1).into(),
            detail: "cut".into(),
        };
        match how {
            Cut::Loud => {
                self.wires[index].silent = true;
                self.soon(100, Event::SenderBreaks(index, lost));
                self.soon(100, Event::ReceiverBreaks(index, None));
            }
            Cut::HalfOpen => self.sender_breaks(index, lost),
            Cut::Silent => {
                self.wires[index].silent = true;
                self.after(STALL.as_millis() as u64, Event::ReceiverBreaks(index, None));
            }
        }
    }

    pub(super) fn tell(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        let Some(refusal) = wire.incoming.as_ref().and_then(Incoming::given_up) else {
            return;
        };
        wire.incoming = None;
        let mut reply = BytesMut::new();
        Reply::Refused(refusal).put_with(&mut reply, self.integrity);
        self.reply(index, &reply);
    }
}
