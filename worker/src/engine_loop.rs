//! The engine thread: take commands, plan, compute a step, hand out tokens, again.
//!
//! It maps the scheduler's sequences to requests and callers, starts fills, and queues pushes between layers. It waits
//! for nothing but commands, and for those only when there is nothing to compute.

use crate::caller::{CallerId, Flushed, Outbox};
use crate::engine_thread::{Command, EngineHandle, PrefillCommand, Shared, Ticket};
use crate::fill::{FillContext, FillEnd, FillJob, fill};
use crate::push::LayerPush;
use crate::rates::StepRates;
use crate::tiers::{self, WorkerTiers};
use baton_engine::{
    Engine, EngineError, Finish, FinishReason, Output, Plan, PrefillRequest, Request, SamplingParams, Scheduler, SeqId,
};
use baton_proto::cluster::Heartbeat;
use baton_proto::worker::{self, Generate, PrefillDone, PrefillPeer, Sampling, SequenceDelta};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{Instrument, Span};

/// Commands taken between two steps: enough for any burst a batch can absorb, few enough not to delay the step.
const COMMANDS_PER_STEP_MAX: usize = 256;
/// Pause before a slow caller is tried again while there is nothing to compute.
const SLOW_CALLER_PAUSE: Duration = Duration::from_millis(1);
/// Why a draining worker takes nothing.
const DRAINING: &str = "the worker is being drained";

/// One request as this worker sees it.
struct Job {
    ticket: Ticket,
    caller: CallerId,
    /// The caller's id of the request.
    id: u64,
    request_id: String,
    kind: Kind,
    /// Open as long as the job is, under the request's own trace.
    span: Span,
    submitted: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    /// The caller was told the end; only a transfer still holds the blocks.
    answered: bool,
}

impl Job {
    fn new(ticket: Ticket, caller: CallerId, id: u64, request_id: String, span: Span, kind: Kind) -> Self {
        Self {
            ticket,
            caller,
            id,
            request_id,
            kind,
            span,
            submitted: Instant::now(),
            scheduled: None,
            first_token: None,
            answered: false,
        }
    }
}

enum Kind {
    Generate {
        /// What a fill needs, until it is started.
        fill: Option<FillSpec>,
        fill_cancelled: CancellationToken,
        /// Who computed the prompt; set by a fill that succeeded.
        filled: Option<String>,
        /// Prompt tokens that the prefill worker found in its prefix cache. Counts even if it dies before it is done: the
        /// caller is told what it would have been told without that.
        fill_cached: u32,
    },
    Prefill {
        layers: LayerPush,
        prefilled: Option<oneshot::Sender<PrefillDone>>,
        cancelled: CancellationToken,
    },
}

struct FillSpec {
    peer: PrefillPeer,
    traceparent: String,
    sampling: Option<Sampling>,
    cache_salt: Vec<u8>,
    priority: i32,
}

pub(crate) struct EngineLoop {
    engine: Box<dyn Engine>,
    scheduler: Scheduler,
    commands: mpsc::Receiver<Command>,
    handle: EngineHandle,
    shared: Arc<Shared>,
    fills: Arc<FillContext>,
    tiers: Option<WorkerTiers>,
    runtime: Handle,
    callers: HashMap<CallerId, Outbox>,
    jobs: HashMap<SeqId, Job>,
    seqs: HashMap<Ticket, SeqId>,
    rates: StepRates,
}

impl EngineLoop {
    pub(crate) fn new(
        engine: Box<dyn Engine>,
        scheduler: Scheduler,
        commands: mpsc::Receiver<Command>,
        handle: EngineHandle,
        shared: Arc<Shared>,
        fills: Arc<FillContext>,
        tiers: Option<WorkerTiers>,
    ) -> Self {
        Self {
            engine,
            scheduler,
            commands,
            handle,
            shared,
            fills,
            tiers,
            runtime: Handle::current(),
            callers: HashMap::new(),
            jobs: HashMap::new(),
            seqs: HashMap::new(),
            rates: StepRates::default(),
        }
    }

    /// Runs until ordered to stop. An error means that the engine cannot go on.
    pub(crate) fn run(mut self) -> Result<(), String> {
        let mut idle = true;
        let mut slow_caller = false;
        self.scheduler.enable_block_events();
        // The first heartbeat may leave before the first command comes.
        self.shared.publish(self.load());
        loop {
            if idle && slow_caller {
                std::thread::sleep(SLOW_CALLER_PAUSE);
            } else if idle {
                match self.commands.blocking_recv() {
                    None | Some(Command::Stop) => return Ok(()),
                    Some(command) => self.take(command),
                }
            }
            for _ in 0..COMMANDS_PER_STEP_MAX {
                match self.commands.try_recv() {
                    Ok(Command::Stop) => return Ok(()),
                    Ok(command) => self.take(command),
                    Err(_) => break,
                }
            }
            let plan = tiers::plan(self.tiers.as_mut(), &mut self.scheduler);
            for seq in &plan.preempted {
                tracing::debug!(%seq, "preempted: blocks ran out");
            }
            self.start_fills(&plan);
            self.tell_cached(&plan);
            self.push_reused(&plan);
            idle = plan.batch.is_empty() && !self.tiers.as_ref().is_some_and(WorkerTiers::has_work);
            if !plan.batch.is_empty() {
                self.step(&plan)?;
            }
            self.shared.publish(self.load());
            self.shared.blocks.publish(self.scheduler.take_block_events());
            slow_caller = self.flush();
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Attach { caller, sender } => {
                self.callers.insert(caller, Outbox::new(sender));
            }
            Command::CallerGone { caller } => {
                self.callers.remove(&caller);
                let tickets: Vec<_> = self
                    .jobs
                    .values()
                    .filter(|j| j.caller == caller)
                    .map(|j| j.ticket)
                    .collect();
                for ticket in tickets {
                    self.cancel(ticket);
                }
            }
            Command::Generate {
                ticket,
                caller,
                request,
            } => self.generate(ticket, caller, *request),
            Command::Prefill(command) => self.prefill(*command),
            Command::Cancel { ticket } => self.cancel(ticket),
            Command::FillCached { ticket, cached_tokens } => self.fill_cached(ticket, cached_tokens),
            Command::FillEnded { ticket, end } => self.fill_ended(ticket, end),
            Command::PushEnded { ticket, finish } => self.push_ended(ticket, finish),
            Command::TellBlocks => self.scheduler.void_block_events(),
            Command::Tier(done) => {
                if let Some(tiers) = &mut self.tiers {
                    tiers.done(*done);
                }
            }
            // The plan that comes now looks at all deadlines; a stop is handled where commands are received.
            Command::TierDeadline | Command::Stop => {}
        }
    }

    fn generate(&mut self, ticket: Ticket, caller: CallerId, request: Generate) {
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
        } = request;
        if self.shared.is_draining() {
            return self.refuse(ticket, caller, id, DRAINING.into(), true);
        }
        let params = match SamplingParams::try_from(&sampling.unwrap_or_default()) {
            Ok(params) => params,
            Err(error) => return self.refuse(ticket, caller, id, error.to_string(), false),
        };
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

    fn prefill(&mut self, command: PrefillCommand) {
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

    fn tell(&mut self, caller: CallerId, delta: SequenceDelta) {
        if let Some(outbox) = self.callers.get_mut(&caller) {
            outbox.add(delta);
        }
    }

    fn cancel(&mut self, ticket: Ticket) {
        let Some(&seq) = self.seqs.get(&ticket) else { return };
        let Some(cancelled) = self.scheduler.cancel(seq) else {
            return;
        };
        if let Some(tiers) = &mut self.tiers {
            tiers.cancel(seq);
        }
        if let Some(job) = self.jobs.get_mut(&seq) {
            tracing::debug!(parent: &job.span, "cancelled");
            match &mut job.kind {
                Kind::Generate { fill_cancelled, .. } => fill_cancelled.cancel(),
                Kind::Prefill {
                    prefilled, cancelled, ..
                } => {
                    drop(prefilled.take());
                    cancelled.cancel();
                }
            }
        }
        self.answer(seq, Vec::new(), Some(cancelled.finish));
        if !cancelled.draining {
            self.forget(seq);
        }
    }

    /// The sequence is gone from the scheduler.
    fn forget(&mut self, seq: SeqId) {
        if let Some(job) = self.jobs.remove(&seq) {
            self.seqs.remove(&job.ticket);
        }
    }

    fn start_fills(&mut self, plan: &Plan) {
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

    fn fill_ended(&mut self, ticket: Ticket, end: FillEnd) {
        let Some(&seq) = self.seqs.get(&ticket) else { return };
        let Some(job) = self.jobs.get_mut(&seq) else { return };
        if job.answered {
            // Cancelled meanwhile; the window is closed now, so the blocks may go.
            self.scheduler.release(seq);
            return self.forget(seq);
        }
        match end {
            FillEnd::Done((worker_id, done)) if (done.first_token as usize) < self.engine.vocab_size() => {
                if let Kind::Generate {
                    filled, fill_cached, ..
                } = &mut job.kind
                {
                    *filled = Some(worker_id);
                    *fill_cached = done.cached_tokens;
                }
                self.answer_cached(seq);
                if let Some(output) = self.scheduler.fill_done(seq, done.first_token) {
                    self.emit(output);
                }
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

    fn push_ended(&mut self, ticket: Ticket, finish: worker::Finish) {
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

    /// Callers hear what was cached before the prompt is computed: a count that must outlive this process. It leaves with
    /// the step's tokens, so it costs a message only where a prompt takes several steps or a fill.
    fn tell_cached(&mut self, plan: &Plan) {
        let found = plan.reused.iter().map(|reuse| reuse.seq);
        for seq in plan.admitted.iter().copied().chain(found) {
            self.answer_cached(seq);
        }
    }

    fn fill_cached(&mut self, ticket: Ticket, cached_tokens: u32) {
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

    fn answer_cached(&mut self, seq: SeqId) {
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

    /// Blocks found in the prefix cache appear in no step, so they are pushed when they are found.
    fn push_reused(&mut self, plan: &Plan) {
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

    /// An error means that the engine is lost. Nobody is told: this process ends, and the gateway replays elsewhere what
    /// ran here.
    fn step(&mut self, plan: &Plan) -> Result<(), String> {
        let now = Instant::now();
        let mut pushing = Vec::new();
        for (index, span) in plan.batch.seqs.iter().enumerate() {
            if let Some(job) = self.jobs.get_mut(&span.seq) {
                job.scheduled.get_or_insert(now);
                if let Kind::Prefill { .. } = job.kind {
                    pushing.push(index);
                }
            }
        }
        let jobs = &mut self.jobs;
        let started = Instant::now();
        let sampled = self.engine.step(&plan.batch, &mut |layer| {
            for &index in &pushing {
                let span = &plan.batch.seqs[index];
                if let Some(Job {
                    kind: Kind::Prefill { layers, .. },
                    ..
                }) = jobs.get_mut(&span.seq)
                {
                    layers.layer_done(&span.blocks, layer, span.start_pos..span.end_pos());
                }
            }
        });
        let took = started.elapsed();
        self.shared.stepped(took);
        self.scheduler.observe_step(&plan.batch, took);
        self.rates.observe(&plan.batch, took);
        let outputs = match sampled {
            Ok(sampled) => self.scheduler.commit(&plan.batch, &sampled),
            Err(error @ EngineError::Lost(_)) => return Err(error.to_string()),
            Err(error) => {
                tracing::error!(%error, "a step failed; its requests are answered with an error");
                self.scheduler.step_failed(&plan.batch, &error.to_string())
            }
        };
        for output in outputs {
            self.emit(output);
        }
        for index in pushing {
            self.end_broken_push(plan.batch.seqs[index].seq);
        }
        Ok(())
    }

    /// A caller that closed its window wants no more of this prompt.
    fn end_broken_push(&mut self, seq: SeqId) {
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

    fn emit(&mut self, output: Output) {
        let Output { seq, tokens, finish } = output;
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
                        });
                    }
                }
                // The engine failed: dropping `prefilled` ends the push, whose end releases the blocks.
                Some(finish) => {
                    drop(prefilled.take());
                    self.answer(seq, Vec::new(), Some(finish));
                }
                None => {}
            }
            return;
        }
        let ended = finish.is_some();
        self.answer(seq, tokens, finish);
        if ended {
            self.forget(seq);
        }
    }

    /// Sends tokens, and at most once the end.
    fn answer(&mut self, seq: SeqId, token_ids: Vec<u32>, finish: Option<Finish>) {
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
                retryable: finish.reason == FinishReason::Error,
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
        };
        let caller = job.caller;
        self.tell(caller, delta);
    }

    /// Sends what callers take now; true if one of them is slow.
    fn flush(&mut self) -> bool {
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

    fn load(&self) -> Heartbeat {
        let stats = self.scheduler.stats();
        Heartbeat {
            running: saturate(stats.running),
            waiting: saturate(stats.waiting),
            free_blocks: saturate(stats.free_blocks),
            held_blocks: saturate(stats.held_blocks),
            cached_blocks: saturate(stats.cached_blocks),
            transferring: saturate(stats.transferring()),
            prompt_tokens_total: stats.prompt_tokens,
            cached_tokens_total: stats.cached_tokens,
            generation_tokens_total: stats.generation_tokens,
            preemptions_total: stats.preemptions,
            transferred_bytes_total: 0,
            push_overlap: 0.0,
            pending_prompt_tokens: self.scheduler.pending_prompt_tokens(),
            prefill_tokens_per_s: self.rates.prefill_tokens_per_s(),
            decode_step_us: self.rates.decode_step_us(),
            kv_tiers: self.tiers.as_ref().map(WorkerTiers::stats),
            ..Default::default()
        }
    }
}

fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn micros(from: Instant, to: Option<Instant>) -> u64 {
    to.map_or(0, |to| {
        u64::try_from(to.saturating_duration_since(from).as_micros()).unwrap_or(u64::MAX)
    })
}
