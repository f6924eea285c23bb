//! What one push may send next, as a state machine: no sockets, no locks; the time is passed in.
//!
//! ```text
//!   pulling ── every byte landed, the push is finished ──► finishing ── DONE ──► over
//! ```
//!
//! Invariants: at most [`PULLS_AHEAD`] PULLs are unanswered; FINISH comes once, after the answer to the last PULL.

use super::frames::PULL_PIECES_MAX;
use crate::push_state::After;
use crate::ranges::Descriptor;
use crate::window_state::Finish;
use std::time::Instant;

/// PULLs that a push may have under way: enough that a copying thread never waits for the next one.
pub(crate) const PULLS_AHEAD: usize = 4;

/// A PULL is full when it asks for this many bytes: some hundreds of µs of copying, beside which a round trip between two
/// processes is small. Giving up does not wait for it: the receiver looks at its window before every chunk.
const PULL_BYTES: usize = 16 << 20;

/// One push's way over a link.
#[derive(Debug)]
pub(crate) struct Flow {
    /// Pieces taken from the push; those before `next` are sent.
    batch: Vec<Descriptor>,
    next: usize,
    asked: u64,
    landed: u64,
    unanswered: usize,
    /// What FINISH will say.
    finish: Option<Finish>,
    finishing: bool,
    /// When something was last sent after a pause, or answered.
    progress: Instant,
}

/// What to send.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// PULL the pieces.
    Pull,
    /// FINISH, if the push is still alive.
    Finish(Finish),
    /// Nothing, before an answer or more work comes.
    Wait,
}

impl Flow {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            batch: Vec::new(),
            next: 0,
            asked: 0,
            landed: 0,
            unanswered: 0,
            finish: None,
            finishing: false,
            progress: now,
        }
    }

    /// What to send next. `pieces` receives those of a PULL; `take` fetches the next batch from the push.
    pub(crate) fn next(
        &mut self,
        pieces: &mut Vec<Descriptor>,
        now: Instant,
        mut take: impl FnMut(&mut Vec<Descriptor>) -> After,
    ) -> Step {
        pieces.clear();
        if self.unanswered >= PULLS_AHEAD {
            return Step::Wait;
        }
        let mut bytes = 0;
        loop {
            let room = PULL_PIECES_MAX - pieces.len();
            let some = &self.batch[self.next..self.batch.len().min(self.next + room)];
            pieces.extend_from_slice(some);
            bytes += some.iter().map(|piece| piece.len).sum::<usize>();
            self.next += some.len();
            if self.next < self.batch.len() || bytes >= PULL_BYTES || self.finish.is_some() || self.finishing {
                break;
            }
            self.next = 0;
            match take(&mut self.batch) {
                After::More | After::Mark => {}
                After::Finish { total, payload, notify } => {
                    self.finish = Some(Finish { total, payload, notify });
                }
                After::Idle | After::Over => {
                    self.batch.clear();
                    break;
                }
            }
        }
        if !pieces.is_empty() {
            if self.unanswered == 0 {
                self.progress = now;
            }
            self.unanswered += 1;
            self.asked += bytes as u64;
            return Step::Pull;
        }
        if self.landed < self.asked {
            return Step::Wait;
        }
        match self.finish.take() {
            Some(finish) => {
                self.finishing = true;
                self.progress = now;
                Step::Finish(finish)
            }
            None => Step::Wait,
        }
    }

    /// The receiver answers a PULL: `bytes` have landed in all.
    pub(crate) fn landed(&mut self, bytes: u64, now: Instant) -> Result<(), &'static str> {
        if self.unanswered == 0 || bytes < self.landed || bytes > self.asked {
            return Err("it counts bytes that were not sent");
        }
        self.unanswered -= 1;
        self.landed = bytes;
        self.progress = now;
        Ok(())
    }

    /// Since when the receiver has owed an answer, if it does.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        (self.unanswered > 0 || self.finishing).then_some(self.progress)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    fn piece(at: usize, len: usize) -> Descriptor {
        Descriptor {
            local: at,
            remote: at,
            len,
        }
    }

    proptest! {
        /// Whatever sizes a push writes and whenever answers come: pieces leave in order and once, few PULLs are ahead,
        /// and FINISH comes last, once, only when all has landed.
        #[test]
        fn finish_never_overtakes_a_byte(
            batches in prop::collection::vec(prop::collection::vec(1usize..300_000, 0..2000), 0..6),
            answers in prop::collection::vec(any::<bool>(), 1..40),
        ) {
            let now = Instant::now();
            let mut at = 0;
            let mut cut: VecDeque<Vec<Descriptor>> = batches.iter().map(|lens| lens.iter().map(|&len| {
                at += len;
                piece(at - len, len)
            }).collect()).collect();
            let total = at as u64;
            let mut finished = false;
            let mut take = |batch: &mut Vec<Descriptor>| {
                batch.clear();
                match cut.pop_front() {
                    Some(next) => { *batch = next; After::More }
                    None if finished => After::Idle,
                    None => { finished = true; After::Finish { total, payload: Bytes::new(), notify: false } }
                }
            };
            let (mut flow, mut pieces) = (Flow::new(now), Vec::new());
            let (mut under_way, mut landed, mut cursor) = (VecDeque::new(), 0u64, 0usize);
            let mut answers = answers.into_iter().cycle();
            for _ in 0..100_000 {
                match flow.next(&mut pieces, now, &mut take) {
                    Step::Pull => {
                        prop_assert!(!pieces.is_empty() && pieces.len() <= PULL_PIECES_MAX);
                        for piece in &pieces {
                            prop_assert_eq!(piece.local, cursor);
                            cursor += piece.len;
                        }
                        under_way.push_back(pieces.iter().map(|piece| piece.len as u64).sum::<u64>());
                        prop_assert!(under_way.len() <= PULLS_AHEAD);
                    }
                    Step::Finish(Finish { total: claimed, .. }) => {
                        prop_assert!(under_way.is_empty() && landed == total && claimed == total);
                        prop_assert_eq!(cursor as u64, total);
                        prop_assert_eq!(flow.next(&mut pieces, now, &mut take), Step::Wait);
                        prop_assert!(flow.waiting_since().is_some());
                        return Ok(());
                    }
                    Step::Wait => {
                        prop_assert!(!under_way.is_empty(), "waits for nothing");
                        landed += under_way.pop_front().unwrap();
                        flow.landed(landed, now).unwrap();
                        continue;
                    }
                }
                if answers.next().unwrap() && let Some(bytes) = under_way.pop_front() {
                    landed += bytes;
                    flow.landed(landed, now).unwrap();
                }
            }
            prop_assert!(false, "never finished");
        }
    }

    #[test]
    fn answers_to_nothing_are_breaches() {
        let now = Instant::now();
        let (mut flow, mut pieces) = (Flow::new(now), Vec::new());
        assert!(flow.landed(0, now).is_err());
        let mut once = true;
        let step = flow.next(&mut pieces, now, |batch| {
            batch.clear();
            batch.extend(std::mem::take(&mut once).then(|| piece(0, 64)));
            After::Idle
        });
        assert_eq!(
            (step, flow.waiting_since()),
            (Step::Wait, None),
            "idle means nothing to take"
        );
        let step = flow.next(&mut pieces, now, |batch| {
            batch.clear();
            if std::mem::replace(&mut once, true) {
                return After::Idle;
            }
            batch.push(piece(0, 64));
            After::Mark
        });
        assert_eq!((step, flow.waiting_since()), (Step::Pull, Some(now)));
        assert!(flow.landed(65, now).is_err());
        flow.landed(64, now).unwrap();
        assert!(flow.landed(64, now).is_err());
        assert_eq!(flow.waiting_since(), None);
    }
}
