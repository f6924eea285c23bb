//! Hand-over of a prompt: fills that bring its blocks here, pushes that send them away, and the end of either.
//!
//! The transfers run as tasks of their own (`crate::fill`, `crate::push`); here is what the engine thread does for them.
//! A layer is pushed as soon as a step has computed it, by the loop itself.

use super::EngineLoop;
use super::job::{Job, Kind};
use crate::engine_thread::{Command, Ticket};
use crate::fill::{FillEnd, FillJob, fill};
use baton_engine::{Plan, SeqId};
use baton_proto::worker::{self, SequenceDelta};
use std::time::Instant;
use tracing::Instrument;

impl EngineLoop {
    pub(super) fn start_fills(&mut self, plan: &Plan) {
        for wanted in &plan.fills {
            let Some(job) = self.jobs.get_mut(&wanted.seq) else {
                continue;
            };
            let Kind::Generate {
                fill: spec,
                fill_cancelled,
                ..
            } = &mut job.kind
            else {
                continue;
            };
            let Some(spec) = spec.take() else { continue };
            job.scheduled.get_or_insert_with(Instant::now);
            let request = FillJob {
                peer: spec.peer,
                request_id: job.request_id.clone(),
                traceparent: spec.traceparent,
                prompt: wanted.prompt.to_vec(),
                sampling: spec.sampling,
                cache_salt: spec.cache_salt,
                priority: spec.priority,
                emitted_tokens: spec.emitted_tokens,
                stop_token_ids: spec.stop_token_ids,
                cached_tokens: wanted.cached_tokens,
                blocks: wanted.blocks.clone(),
            };
            let (fills, cancelled) = (self.fills.clone(), fill_cancelled.clone());
            let (handle, ticket) = (self.handle.clone(), job.ticket);
            let span = tracing::info_span!(parent: &job.span, "hand_over", peer = %request.peer.worker_id);
            let task = async move {
                let end = fill(&fills, request, &cancelled, &handle, ticket).await;
                handle.send(Command::FillEnded { ticket, end }).await;
            };
            self.runtime.spawn(task.instrument(span));
        }
    }

    pub(super) fn fill_cached(&mut self, ticket: Ticket, cached_tokens: u32) {
        let Some(&seq) = self.seqs.get(&ticket) else { return };
        if let Some(Job {
            kind: Kind::Generate { fill_cached, .. },
            ..
        }) = self.jobs.get_mut(&seq)
        {
            *fill_cached = cached_tokens;
            self.answer_cached(seq);
        }
    }

    pub(super) fn fill_ended(&mut self, ticket: Ticket, end: FillEnd) {
        let Some(&seq) = self.seqs.get(&ticket) else { return };
        let Some(job) = self.jobs.get_mut(&seq) else { return };
        if job.answered {
            // Cancelled meanwhile; the window is closed now, so the blocks may go.
            self.scheduler.release(seq);
            return self.forget(seq);
        }
        match end {
            FillEnd::Done((worker_id, done)) if (done.first_token as usize) < self.engine.vocab_size() => {
                let Some(output) = self.scheduler.fill_done_with(seq, done.first_token, done.logprobs) else {
                    tracing::warn!(request_id = %job.request_id, "the hand-over lacks logprobs; prefilling here");
                    return;
                };
                if let Kind::Generate {
                    filled, fill_cached, ..
                } = &mut job.kind
                {
                    *filled = Some(worker_id);
                    *fill_cached = done.cached_tokens;
                }
                self.answer_cached(seq);
                self.emit(output);
            }
            end => {
                let reason = match end {
                    FillEnd::Done(_) => "the first token is outside the vocabulary".to_owned(),
                    FillEnd::Failed(reason) => reason,
                    FillEnd::Cancelled => "cancelled".to_owned(),
                };
                tracing::warn!(request_id = %job.request_id, %reason, "hand-over failed; prefilling here");
                self.scheduler.fill_failed(seq);
            }
        }
    }

    /// Blocks found in the prefix cache appear in no step, so they are pushed when they are found.
    pub(super) fn push_reused(&mut self, plan: &Plan) {
        for reuse in plan.reused.iter().filter(|reuse| reuse.prefill_only) {
            let Some(Job {
                kind: Kind::Prefill { layers, .. },
                ..
            }) = self.jobs.get_mut(&reuse.seq)
            else {
                continue;
            };
            layers.all_layers(&reuse.blocks, reuse.positions.clone());
        }
    }

    /// A caller that closed its window wants no more of this prompt.
    pub(super) fn end_broken_push(&mut self, seq: SeqId) {
        let Some(job) = self.jobs.get(&seq) else { return };
        let Kind::Prefill { layers, .. } = &job.kind else {
            return;
        };
        if let Some(error) = layers.failed() {
            tracing::debug!(request_id = %job.request_id, %error, "the push broke; the prompt is dropped");
            let ticket = job.ticket;
            self.cancel(ticket);
        }
    }

    pub(super) fn push_ended(&mut self, ticket: Ticket, finish: worker::Finish) {
        let Some(&seq) = self.seqs.get(&ticket) else { return };
        self.scheduler.release(seq);
        if let Some(job) = self.jobs.get_mut(&seq)
            && !std::mem::replace(&mut job.answered, true)
        {
            let (caller, id) = (job.caller, job.id);
            self.shared.ended(ticket);
            self.tell(
                caller,
                SequenceDelta {
                    id,
                    finish: Some(finish),
                    ..Default::default()
                },
            );
        }
        self.forget(seq);
    }
}
