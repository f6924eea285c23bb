//! The way in: a command with a request becomes a sequence of the scheduler and a job, or is refused.
//!
//! Not here: when the sequence gets its blocks (the scheduler), and what starts then.

use super::EngineLoop;
use super::job::{FillSpec, Job, Kind};
use crate::caller::CallerId;
use crate::engine_thread::{PrefillCommand, Ticket};
use baton_engine::{PrefillRequest, Request, SamplingParams, SeqId};
use baton_proto::worker::{self, Generate, SequenceDelta};
use tokio_util::sync::CancellationToken;

/// Why a draining worker takes nothing.
const DRAINING: &str = "the worker is being drained";
/// Why a worker whose KV blocks no transport reaches computes for nobody else.
const BLOCKS_STAY: &str = "this worker keeps its KV blocks in a GPU's memory and cannot hand them over; give it \
                           gpu_kv = \"host\", or the role combined";

impl EngineLoop {
    pub(super) fn generate(&mut self, ticket: Ticket, caller: CallerId, request: Generate) {
        let Generate {
            id,
            request_id,
            traceparent,
            prompt,
            max_tokens,
            sampling,
            stop_token_ids,
            cache_salt,
            prefill_peer,
            priority,
            emitted_tokens: _,
        } = request;
        if self.shared.is_draining() {
            return self.refuse(ticket, caller, id, DRAINING.into(), true);
        }
        let params = match SamplingParams::try_from(&sampling.clone().unwrap_or_default()) {
            Ok(params) => params,
            Err(error) => return self.refuse(ticket, caller, id, error.to_string(), false),
        };
        // Where blocks cannot be brought here, the prompt is computed here.
        let prefill_peer = prefill_peer.filter(|_| self.engine.blocks_move());
        let submitted = self.scheduler.submit(Request {
            prompt: prompt.into(),
            max_tokens: max_tokens as usize,
            sampling: params,
            stop_token_ids,
            cache_salt: cache_salt.to_vec(),
            remote_prefill: prefill_peer.is_some(),
            priority,
        });
        let span = tracing::info_span!("decode", %request_id, %traceparent);
        let fill = prefill_peer.map(|peer| FillSpec {
            peer,
            traceparent,
            sampling,
            cache_salt: cache_salt.to_vec(),
            priority,
        });
        let kind = Kind::Generate {
            fill,
            fill_cancelled: CancellationToken::new(),
            filled: None,
            fill_cached: 0,
        };
        match submitted {
            Ok(seq) => self.admit(seq, Job::new(ticket, caller, id, request_id, span, kind)),
            Err(error) => self.refuse(ticket, caller, id, error.to_string(), error.retryable()),
        }
    }

    pub(super) fn prefill(&mut self, command: PrefillCommand) {
        let PrefillCommand {
            ticket,
            caller,
            request,
            layers,
            prefilled,
            cancelled,
        } = command;
        if self.shared.is_draining() {
            return self.refuse(ticket, caller, request.id, DRAINING.into(), true);
        }
        if !self.engine.blocks_move() {
            return self.refuse(ticket, caller, request.id, BLOCKS_STAY.into(), true);
        }
        let span = tracing::info_span!(
            "prefill",
            request_id = %request.request_id,
            traceparent = %request.traceparent
        );
        let params = match SamplingParams::try_from(&request.sampling.unwrap_or_default()) {
            Ok(params) => params,
            Err(error) => return self.refuse(ticket, caller, request.id, error.to_string(), false),
        };
        let block_size = self.scheduler.config().block_size;
        let submitted = self.scheduler.submit_prefill(PrefillRequest {
            prompt: request.prompt.into(),
            sampling: params,
            cache_salt: request.cache_salt.to_vec(),
            // In blocks of this worker's size; what lies between is computed with them and not sent.
            skip_tokens: request.cached_tokens as usize / block_size * block_size,
            priority: request.priority,
        });
        let kind = Kind::Prefill {
            layers,
            prefilled: Some(prefilled),
            cancelled,
        };
        match submitted {
            Ok(seq) => self.admit(
                seq,
                Job::new(ticket, caller, request.id, request.request_id, span, kind),
            ),
            // Dropping `prefilled` ends the push.
            Err(error) => self.refuse(ticket, caller, request.id, error.to_string(), error.retryable()),
        }
    }

    fn admit(&mut self, seq: SeqId, job: Job) {
        self.seqs.insert(job.ticket, seq);
        self.jobs.insert(seq, job);
    }

    fn refuse(&mut self, ticket: Ticket, caller: CallerId, id: u64, error: String, retryable: bool) {
        self.shared.ended(ticket);
        let finish = worker::Finish {
            reason: worker::FinishReason::Error as i32,
            error,
            retryable,
            ..Default::default()
        };
        self.tell(
            caller,
            SequenceDelta {
                id,
                finish: Some(finish),
                ..Default::default()
            },
        );
    }
}
