//! The way out: tokens, cached counts and ends, each as a delta in the outbox of the caller that asked.
//!
//! Not here: how an outbox waits for a slow caller (`crate::caller`).

use super::EngineLoop;
use super::job::Kind;
use super::saturate;
use crate::caller::{CallerId, Flushed};
use baton_engine::{Finish, FinishReason, Output, Plan, SeqId};
use baton_proto::worker::{self, PrefillDone, SequenceDelta, TokenLogprobs};
use std::time::Instant;

impl EngineLoop {
    pub(super) fn emit(&mut self, output: Output) {
        let Output {
            seq,
            tokens,
            logprobs,
            finish,
        } = output;
        let Some(job) = self.jobs.get_mut(&seq) else { return };
        if !tokens.is_empty() && job.first_token.is_none() {
            job.first_token = Some(Instant::now());
            tracing::debug!(parent: &job.span, "first token");
        }
        if let Kind::Prefill { prefilled, .. } = &mut job.kind {
            match finish {
                Some(finish) if finish.reason == FinishReason::Prefilled => {
                    if let (Some(prefilled), Some(&first_token)) = (prefilled.take(), tokens.first()) {
                        let _ = prefilled.send(PrefillDone {
                            first_token,
                            cached_tokens: saturate(finish.cached_tokens),
                            queued_us: micros(job.submitted, job.scheduled),
                            prefill_us: job.scheduled.map_or(0, |at| micros(at, job.first_token)),
                            logprobs: logprobs.into_iter().next(),
                        });
                    }
                }
                // The engine failed: dropping `prefilled` ends the push, whose end releases the blocks.
                Some(finish) => {
                    drop(prefilled.take());
                    self.answer(seq, Vec::new(), Vec::new(), Some(finish));
                }
                None => {}
            }
            return;
        }
        let ended = finish.is_some();
        self.answer(seq, tokens, logprobs, finish);
        if ended {
            self.forget(seq);
        }
    }

    /// Sends tokens, and at most once the end.
    pub(super) fn answer(
        &mut self,
        seq: SeqId,
        token_ids: Vec<u32>,
        logprobs: Vec<TokenLogprobs>,
        finish: Option<Finish>,
    ) {
        let Some(job) = self.jobs.get_mut(&seq) else { return };
        if job.answered {
            return;
        }
        let finish = finish.map(|finish| {
            job.answered = true;
            self.shared.ended(job.ticket);
            let (filled, elsewhere) = match &job.kind {
                Kind::Generate {
                    filled, fill_cached, ..
                } => (filled.clone(), *fill_cached),
                Kind::Prefill { .. } => (None, 0),
            };
            let prompt_tokens = saturate(finish.prompt_tokens);
            worker::Finish {
                reason: worker::FinishReason::from(finish.reason) as i32,
                prompt_tokens,
                cached_tokens: saturate(finish.cached_tokens).max(elsewhere).min(prompt_tokens),
                completion_tokens: saturate(finish.completion_tokens),
                error: finish.error,
                retryable: finish.reason == FinishReason::Error && finish.invalid_field.is_none(),
                invalid_field: finish.invalid_field.unwrap_or_default().to_owned(),
                prefill_worker_id: filled.unwrap_or_default(),
                queued_us: micros(job.submitted, job.scheduled),
                prefill_us: job.scheduled.map_or(0, |at| micros(at, job.first_token)),
                decode_us: job.first_token.map_or(0, |at| micros(at, Some(Instant::now()))),
            }
        });
        let cached_tokens = finish.as_ref().map(|finish| finish.cached_tokens);
        let delta = SequenceDelta {
            id: job.id,
            token_ids,
            finish,
            cached_tokens,
            logprobs,
        };
        let caller = job.caller;
        self.tell(caller, delta);
    }

    /// Callers hear what was cached before the prompt is computed: a count that must outlive this process. It leaves with
    /// the step's tokens, so it costs a message only where a prompt takes several steps or a fill.
    pub(super) fn tell_cached(&mut self, plan: &Plan) {
        let found = plan.reused.iter().map(|reuse| reuse.seq);
        for seq in plan.admitted.iter().copied().chain(found) {
            self.answer_cached(seq);
        }
    }

    pub(super) fn answer_cached(&mut self, seq: SeqId) {
        let Some(job) = self.jobs.get(&seq) else { return };
        let Some(here) = self.scheduler.cached_tokens(seq).filter(|_| !job.answered) else {
            return;
        };
        let elsewhere = match &job.kind {
            Kind::Generate { fill_cached, .. } => *fill_cached,
            Kind::Prefill { .. } => 0,
        };
        let delta = SequenceDelta {
            id: job.id,
            cached_tokens: Some(saturate(here).max(elsewhere)),
            ..Default::default()
        };
        self.tell(job.caller, delta);
    }

    pub(super) fn tell(&mut self, caller: CallerId, delta: SequenceDelta) {
        if let Some(outbox) = self.callers.get_mut(&caller) {
            outbox.add(delta);
        }
    }

    /// Sends what callers take now; true if one of them is slow.
    pub(super) fn flush(&mut self) -> bool {
        let mut slow = false;
        self.callers.retain(|_, outbox| match outbox.flush() {
            Flushed::Empty => true,
            Flushed::Full => {
                slow = true;
                true
            }
            // Its requests are cancelled by the CallerGone that its task sends.
            Flushed::Gone => false,
        });
        slow
    }
}

fn micros(from: Instant, to: Option<Instant>) -> u64 {
    to.map_or(0, |to| {
        u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
    })
}
