//! Reads of the simulation: what reader and owner tell each other about a lease, over a network that loses some of it.

use super::job::BLOCK;
use super::world::{Event, PAYLOAD, TERM, World, local};
use crate::lease::{Ended, LeaseEnd};
use crate::ranges::Descriptor;
use crate::window_state::Phase;
use crate::{AbortReason, PushError, Refusal};
use bytes::Bytes;
use rand::Rng;

impl World {
    pub(super) fn ask(&mut self, index: usize, attempt: u32) {
        let Some(reading) = &self.jobs[index].reading else {
            return;
        };
        if !reading.wanted || reading.begun {
            return;
        }
        if attempt >= 5 {
            return self.close(index);
        }
        if self.rng.random_bool(0.8) {
            self.soon(80, Event::Asked(index));
        }
        self.after(300, Event::Ask(index, attempt + 1));
        if attempt == 0 {
            self.after(TERM.as_millis() as u64 / 3, Event::Beat(index));
        }
    }

    pub(super) fn asked(&mut self, index: usize) {
        let job = &self.jobs[index];
        let pieces: Vec<Descriptor> = job
            .blocks
            .iter()
            .map(|&block| Descriptor {
                local: local(block),
                remote: block * BLOCK,
                len: BLOCK,
            })
            .collect();
        match self.leases.begin(index as u64, index as u64 + 1, &pieces, self.now) {
            Ok(()) => {
                if let Some(reading) = &mut self.jobs[index].reading {
                    reading.begun = true;
                }
                self.begin_push(index);
                let (job, now) = (&mut self.jobs[index], self.now);
                let Some(push) = job.push.clone() else { return };
                job.to_write.clear();
                for piece in pieces {
                    push.write(piece.local..piece.local + piece.len, piece.remote, now)
                        .unwrap();
                }
                push.finish(Bytes::from_static(PAYLOAD), false, now).unwrap();
                self.soon(80, Event::Answered(index, Ok(())));
            }
            // A repetition of a request that was taken.
            Err(Refusal::WindowTaken | Refusal::Busy { .. }) => {}
            Err(refusal) => self.soon(80, Event::Answered(index, Err(refusal))),
        }
    }

    pub(super) fn beat(&mut self, index: usize) {
        let job = &self.jobs[index];
        let Some(reading) = &job.reading else { return };
        if !reading.wanted || job.over {
            return;
        }
        if self.now.saturating_duration_since(reading.heard) >= TERM * 2 {
            return self.close(index);
        }
        if self.rng.random_bool(0.9) {
            self.soon(80, Event::Beaten(index));
        }
        self.after(TERM.as_millis() as u64 / 3, Event::Beat(index));
    }

    pub(super) fn beaten(&mut self, index: usize) {
        let begun = self.jobs[index].reading.as_ref().is_some_and(|reading| reading.begun);
        let window = begun.then_some(index as u64 + 1);
        let answer = self.leases.beat(index as u64, window, self.now);
        if self.rng.random_bool(0.9) {
            self.soon(80, Event::Answered(index, answer));
        }
    }

    pub(super) fn answered(&mut self, index: usize, answer: Result<(), Refusal>) {
        let now = self.now;
        let Some(reading) = &mut self.jobs[index].reading else {
            return;
        };
        reading.heard = now;
        // What ended the lease may be that the read was done.
        if answer.is_err() && !matches!(self.jobs[index].cell.phase(), Phase::Completed(_)) {
            self.close(index);
        }
    }

    /// A lease is over: its push is fenced, and from that moment the bytes are somebody else's.
    pub(super) fn ended(&mut self, ended: Option<Ended>) {
        let Some(ended) = ended else { return };
        let index = ended.export as usize;
        self.tally.leases_expired += u64::from(ended.why == LeaseEnd::Expired);
        if let Some(reading) = &mut self.jobs[index].reading {
            assert!(!std::mem::replace(&mut reading.ended, true), "a lease ends once");
        }
        self.fail(index, PushError::Aborted(AbortReason::LeaseEnded));
        self.poison(index);
    }
}
