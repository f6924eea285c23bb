//! The way in: a command with a request becomes a sequence of the scheduler and a job, or is refused.
//!
//! Not here: when the sequence gets its blocks (the scheduler), and what starts then.

use super::EngineLoop;
use super::job::{FillSpec, Job, Kind};
use crate::caller::CallerId;
use crate::engine_thread::{PrefillCommand, Ticket};
use crate::grammars::Refusal;
use baton_engine::{Asked, PrefillRequest, Request, SamplingError, SamplingParams, SeqId, Shaping};
use baton_grammar::TokenMatcher;
use baton_proto::worker::{self, Generate, Sampling, SequenceDelta};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

/// Why a draining worker takes nothing.
const DRAINING: &str = "the worker is being drained";
/// Why a worker whose KV blocks no transport reaches computes for nobody else.
const BLOCKS_STAY: &str = "this worker keeps its KV blocks in a GPU's memory and cannot hand them over; give it \
                           gpu_kv = \"host\", or the role combined";

impl EngineLoop {
    pub(super) fn generate(
        &mut self,
        ticket: Ticket,
        caller: CallerId,
        request: Generate,
        grammar: Option<Box<TokenMatcher>>,
    ) {
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
            emitted_tokens,
        } = request;
        if self.is_given_up(ticket, caller, id) {
            return;
        }
        if self.shared.is_draining() {
            return self.refuse(ticket, caller, id, Refusal::elsewhere(DRAINING));
        }
        let wire = sampling.unwrap_or_default();
        let (params, shaping) = match self.sampling(&wire, &prompt, emitted_tokens, &stop_token_ids, grammar) {
            Ok(sampling) => sampling,
            Err(error) => return self.refuse(ticket, caller, id, error.into()),
        };
        // Where blocks cannot be brought here, the prompt is computed here.
        let prefill_peer = prefill_peer.filter(|_| self.engine.blocks_move());
        let peers_stops = prefill_peer.is_some().then(|| stop_token_ids.clone());
        let submitted = self.scheduler.submit(Request {
            prompt: prompt.into(),
            max_tokens: max_tokens as usize,
            sampling: params,
            shaping,
            stop_token_ids,
            cache_salt: cache_salt.to_vec(),
            remote_prefill: prefill_peer.is_some(),
            priority,
        });
        let span = tracing::info_span!("decode", %request_id, %traceparent);
        let fill = prefill_peer.map(|peer| FillSpec {
            peer,
            traceparent,
            sampling: Some(wire),
            cache_salt: cache_salt.to_vec(),
            priority,
            emitted_tokens,
            stop_token_ids: peers_stops.unwrap_or_default(),
        });
        let kind = Kind::Generate {
            fill,
            fill_cancelled: CancellationToken::new(),
            filled: None,
            fill_cached: 0,
        };
        match submitted {
            Ok(seq) => self.admit(seq, Job::new(ticket, caller, id, request_id, span, kind)),
            Err(error) => self.refuse(ticket, caller, id, error.into()),
        }
    }

    pub(super) fn prefill(&mut self, command: PrefillCommand) {
        let PrefillCommand {
            ticket,
            caller,
            request,
            grammar,
            layers,
            prefilled,
            cancelled,
        } = command;
        if self.is_given_up(ticket, caller, request.id) {
            return;
        }
        if self.shared.is_draining() {
            return self.refuse(ticket, caller, request.id, Refusal::elsewhere(DRAINING));
        }
        if !self.engine.blocks_move() {
            return self.refuse(ticket, caller, request.id, Refusal::elsewhere(BLOCKS_STAY));
        }
        let span = tracing::info_span!(
            "prefill",
            request_id = %request.request_id,
            traceparent = %request.traceparent
        );
        let sampling = self.sampling(
            &request.sampling.unwrap_or_default(),
            &request.prompt,
            request.emitted_tokens,
            &request.stop_token_ids,
            grammar,
        );
        let (params, shaping) = match sampling {
            Ok(sampling) => sampling,
            Err(error) => return self.refuse(ticket, caller, request.id, error.into()),
        };
        let block_size = self.scheduler.config().block_size;
        let submitted = self.scheduler.submit_prefill(PrefillRequest {
            prompt: request.prompt.into(),
            sampling: params,
            shaping,
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
            Err(error) => self.refuse(ticket, caller, request.id, error.into()),
        }
    }

    /// The parameters of a request, and the state of those that ask for more.
    fn sampling(
        &self,
        sampling: &Sampling,
        prompt: &[u32],
        emitted_tokens: u32,
        stop_token_ids: &[u32],
        grammar: Option<Box<TokenMatcher>>,
    ) -> Result<(SamplingParams, Option<Arc<Shaping>>), SamplingError> {
        let asked = Asked {
            sampling,
            prompt,
            emitted_tokens: emitted_tokens as usize,
            stop_token_ids,
            vocab_size: self.engine.vocab_size(),
        };
        let shaping = Shaping::new(asked, grammar.map(|grammar| *grammar))?;
        Ok((SamplingParams::try_from(sampling)?, shaping.map(Arc::new)))
    }

    /// Whether a request whose grammar was being compiled is wanted no more; then its caller is told.
    fn is_given_up(&mut self, ticket: Ticket, caller: CallerId, id: u64) -> bool {
        if !self.given_up.remove(&ticket) && self.callers.contains_key(&caller) {
            return false;
        }
        self.shared.ended(ticket);
        let finish = worker::Finish {
            reason: worker::FinishReason::Cancelled as i32,
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
        true
    }

    fn admit(&mut self, seq: SeqId, job: Job) {
        self.seqs.insert(job.ticket, seq);
        self.jobs.insert(seq, job);
    }

    pub(super) fn refuse(&mut self, ticket: Ticket, caller: CallerId, id: u64, refusal: Refusal) {
        self.given_up.remove(&ticket);
        self.shared.ended(ticket);
        let finish = worker::Finish {
            reason: worker::FinishReason::Error as i32,
            error: refusal.error,
            retryable: refusal.retryable,
            invalid_field: refusal.invalid_field.unwrap_or_default().to_owned(),
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
