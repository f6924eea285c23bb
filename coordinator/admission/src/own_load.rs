//! What this coordinator has sent to workers and got no first token for, by worker. Known at once, where heartbeats come
//! twice a second; what heartbeats tell beyond it is the work of other coordinators.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::estimate::Rate;

/// Requests and prompt tokens on their way to a first token. Invariant: the sum over all tickets that are granted and not
/// started, which `Admission::check` verifies.
#[derive(Debug, Default)]
pub struct OwnLoad {
    workers: HashMap<Arc<str>, Own>,
    unplaced_requests: u32,
    unplaced_tokens: u64,
    speed: Rate,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Own {
    unstarted: u32,
    prefill_tokens: u64,
    others_unstarted: u32,
    others_tokens: u64,
}

/// How far a granted request has come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The router has not said where it goes.
    Unplaced,
    /// On a worker that streams, and one that computes the prompt; at what time.
    Placed {
        decode: Arc<str>,
        computes: Arc<str>,
        at: Duration,
        /// Nothing else was waiting for a first token there.
        alone: bool,
    },
    /// It has its first token, or its end.
    Started,
}

impl OwnLoad {
    /// Requests on the worker without a first token, those of other coordinators as of its last heartbeat.
    pub fn unstarted(&self, worker: &str) -> u32 {
        self.workers
            .get(worker)
            .map_or(0, |own| own.unstarted.saturating_add(own.others_unstarted))
    }

    /// Prompt tokens that the worker has yet to compute, likewise.
    pub fn prefill_tokens(&self, worker: &str) -> u64 {
        self.workers
            .get(worker)
            .map_or(0, |own| own.prefill_tokens.saturating_add(own.others_tokens))
    }

    /// Requests and prompt tokens that were granted and are on no worker yet: a matter of microseconds.
    pub fn unplaced(&self) -> (u32, u64) {
        (self.unplaced_requests, self.unplaced_tokens)
    }

    /// Prompt tokens per second as seen from here, for workers that report no speed.
    pub fn tokens_per_s(&self) -> Option<f64> {
        self.speed.per_s()
    }

    pub(crate) fn heartbeat(&mut self, worker: &str, waiting: u32, pending_tokens: u64) {
        let own = self.workers.get(worker).copied().unwrap_or_default();
        let told = Own {
            others_unstarted: waiting.saturating_sub(own.unstarted),
            others_tokens: pending_tokens.saturating_sub(own.prefill_tokens),
            ..own
        };
        if told != own {
            self.put(worker, told);
        }
    }

    /// One entry per worker with something to say, so they are bounded by workers and own requests.
    fn put(&mut self, worker: &str, own: Own) {
        if own == Own::default() {
            self.workers.remove(worker);
        } else if let Some(old) = self.workers.get_mut(worker) {
            *old = own;
        } else {
            self.workers.insert(worker.into(), own);
        }
    }

    fn change(&mut self, worker: &str, change: impl FnOnce(&mut Own)) {
        let mut own = self.workers.get(worker).copied().unwrap_or_default();
        change(&mut own);
        self.put(worker, own);
    }

    pub(crate) fn granted(&mut self, tokens: u32) -> Stage {
        self.unplaced_requests += 1;
        self.unplaced_tokens += u64::from(tokens);
        Stage::Unplaced
    }

    /// From wherever it was.
    pub(crate) fn placed(&mut self, stage: &Stage, tokens: u32, decode: &str, computes: &str, now: Duration) -> Stage {
        self.leave(stage, tokens);
        let mut alone = true;
        self.change(decode, |own| own.unstarted += 1);
        self.change(computes, |own| {
            alone = own.prefill_tokens == 0 && own.others_tokens == 0;
            own.prefill_tokens += u64::from(tokens);
        });
        Stage::Placed {
            decode: decode.into(),
            computes: computes.into(),
            at: now,
            alone,
        }
    }

    /// Its first token came at `now`, or it ended without one.
    pub(crate) fn started(&mut self, stage: &Stage, tokens: u32, now: Option<Duration>) -> Stage {
        if let (Stage::Placed { at, alone: true, .. }, Some(now)) = (stage, now) {
            // The clock of this rate is the sum of the times that prompts took alone.
            let took = now.saturating_sub(*at);
            self.speed.advance_by(took);
            self.speed.count(tokens.into());
        }
        self.leave(stage, tokens);
        Stage::Started
    }

    fn leave(&mut self, stage: &Stage, tokens: u32) {
        let tokens = u64::from(tokens);
        match stage {
            Stage::Unplaced => {
                self.unplaced_requests -= 1;
                self.unplaced_tokens -= tokens;
            }
            Stage::Placed { decode, computes, .. } => {
                self.change(decode, |own| own.unstarted -= 1);
                self.change(computes, |own| own.prefill_tokens -= tokens);
            }
            Stage::Started => {}
        }
    }

    /// Compares with what the tickets say: stages and tokens.
    pub(crate) fn check<'a>(&self, stages: impl Iterator<Item = (&'a Stage, u32)>) -> Result<(), String> {
        let mut sum = OwnLoad::default();
        for (stage, tokens) in stages {
            match stage {
                Stage::Unplaced => drop(sum.granted(tokens)),
                Stage::Placed { decode, computes, .. } => {
                    sum.change(decode, |own| own.unstarted += 1);
                    sum.change(computes, |own| own.prefill_tokens += u64::from(tokens));
                }
                Stage::Started => {}
            }
        }
        if (sum.unplaced_requests, sum.unplaced_tokens) != self.unplaced() {
            return Err(format!(
                "{:?} are unplaced, {:?} counted",
                sum.unplaced(),
                self.unplaced()
            ));
        }
        for worker in self.workers.keys().chain(sum.workers.keys()) {
            let ours = self.workers.get(worker).copied().unwrap_or_default();
            let theirs = sum.workers.get(worker).copied().unwrap_or_default();
            if (ours.unstarted, ours.prefill_tokens) != (theirs.unstarted, theirs.prefill_tokens) {
                return Err(format!("{worker} has {theirs:?}, counted {ours:?}"));
            }
        }
        Ok(())
    }
}
