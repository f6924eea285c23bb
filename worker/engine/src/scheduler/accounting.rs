//! What a scheduler says about itself: numbers for heartbeats and metrics, and the check of its invariants.

use super::Scheduler;
use crate::sequence::{Sequence, State};
use crate::stats::Stats;

impl Scheduler {
    /// Gauges of this instant and totals since the start. O(sequences that hold blocks).
    pub fn stats(&self) -> Stats {
        let in_state = |state| self.transport.iter().filter(|id| self.seqs[id].state == state).count();
        Stats {
            running: self.running.len(),
            waiting: self.waiting.len(),
            filling: in_state(State::Filling),
            loading: in_state(State::Loading) + in_state(State::Loaded),
            pushing: in_state(State::Pushing),
            draining: in_state(State::Draining),
            free_blocks: self.blocks.free(),
            held_blocks: self.blocks.held(),
            cached_blocks: self.blocks.cached(),
            total_blocks: self.blocks.total(),
            ..self.totals
        }
    }

    /// Prompt tokens that are queued or being computed here and are not in the cache; those that wait are estimated by
    /// what was cached when they were submitted. O(sequences).
    pub fn pending_prompt_tokens(&self) -> u64 {
        let of = |id: &crate::step::SeqId| self.seqs.get(id).map_or(0, Sequence::pending_tokens) as u64;
        self.waiting.iter().chain(&self.running).map(|rank| of(&rank.id)).sum()
    }

    /// Verifies every invariant of the scheduler, its sequences and its blocks. O(pool + sequences): for tests, and for
    /// an operator's self-check between steps.
    pub fn check(&self) -> Result<(), String> {
        self.blocks.check(self.seqs.values().map(|s| s.blocks.as_slice()))?;
        let counted = self.waiting.len() + self.running.len() + self.transport.len();
        if counted != self.seqs.len() {
            return Err(format!("{counted} sequences in the sets, {} known", self.seqs.len()));
        }
        let holders = self.running.len() + self.transport.len();
        if holders > self.config.seqs_max {
            return Err(format!(
                "{holders} sequences hold blocks, at most {} may",
                self.config.seqs_max
            ));
        }
        self.seqs.values().try_for_each(|seq| self.check_sequence(seq))
    }

    fn check_sequence(&self, seq: &Sequence) -> Result<(), String> {
        let size = self.config.block_size;
        let in_its_set = match seq.state {
            State::Waiting => self.waiting.contains(&seq.rank),
            State::Running => self.running.contains(&seq.rank),
            State::Loading | State::Loaded | State::Filling | State::Pushing | State::Draining => {
                self.transport.contains(&seq.id)
            }
        };
        let rules = [
            (in_its_set, "is not in the set of its state"),
            (
                seq.state != State::Waiting || (seq.blocks.is_empty() && seq.computed == 0),
                "waits and holds blocks",
            ),
            (seq.computed < seq.len(), "has nothing left to compute"),
            (
                !matches!(seq.state, State::Loading | State::Loaded)
                    || (seq.blocks.len() == seq.blocks_needed() && seq.computed == seq.registered * size),
                "loads, but not whole blocks into a whole table",
            ),
            (
                seq.blocks.len() * size >= seq.computed,
                "has computed beyond its blocks",
            ),
            (
                seq.blocks.len() <= seq.blocks_needed(),
                "holds more blocks than its tokens need",
            ),
            (
                seq.registered * size <= seq.computed,
                "has named blocks it did not compute",
            ),
            (
                seq.cached_tokens < seq.prompt.len(),
                "took its whole prompt from the cache",
            ),
            (seq.len() <= self.config.length_max(), "is longer than the limit"),
            (
                seq.passed_blocks <= seq.blocks_needed(),
                "was passed by more blocks than it needs",
            ),
            (!seq.in_step || self.step_open, "is in a step, but none is open"),
        ];
        match rules.iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(format!("{} ({:?}) {what}: {seq:?}", seq.id, seq.state)),
            None => Ok(()),
        }
    }
}
