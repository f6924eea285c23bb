//! The engine thread: take commands, plan, compute a step, hand out tokens, again.
//!
//! It maps the scheduler's sequences to requests and callers, starts fills, and queues pushes between layers. It waits
//! for nothing but commands, and for those only when there is nothing to compute.
//!
//! Here are the loop, its step, and the end of a job. A request comes in by `intake` and becomes a `job`; `handover`
//! moves its prompt's blocks between workers, `answers` carries what it gets to its caller, and `load_report` says how
//! much there is to do.

mod answers;
mod handover;
mod intake;
mod job;
mod load_report;

use crate::caller::{CallerId, Outbox};
use crate::engine_thread::{Command, EngineHandle, Shared, Ticket};
use crate::fill::FillContext;
use crate::masks::MaskThread;
use crate::rates::StepRates;
use crate::tiers::{self, WorkerTiers};
use baton_engine::{Engine, EngineError, Plan, Scheduler, SeqId};
use job::{Job, Kind};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// Commands taken between two steps: enough for any burst a batch can absorb, few enough not to delay the step.
const COMMANDS_PER_STEP_MAX: usize = 256;
/// Pause before a slow caller is tried again while there is nothing to compute.
const SLOW_CALLER_PAUSE: Duration = Duration::from_millis(1);

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
    /// Cancelled before they came here. Each is taken out when it comes or is refused.
    given_up: HashSet<Ticket>,
    masks: MaskThread,
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
            given_up: HashSet::new(),
            masks: MaskThread::default(),
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
            self.publish_blocks();
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
                grammar,
            } => self.generate(ticket, caller, *request, grammar),
            Command::Refuse {
                ticket,
                caller,
                id,
                refusal,
            } => self.refuse(ticket, caller, id, refusal),
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
            Command::ReadAhead { parent, names } => {
                if let Some(tiers) = &mut self.tiers {
                    tiers.read_ahead(&self.scheduler, parent, &names);
                }
            }
            // The plan that comes now looks at all deadlines; a stop is handled where commands are received.
            Command::TierDeadline | Command::Stop => {}
        }
    }

    /// Tells routers what happened to blocks, in the pool and below. Where either log was lost, both are told anew.
    fn publish_blocks(&mut self) {
        let mut changes = None;
        if let Some(tiers) = &mut self.tiers {
            changes = tiers.take_changes();
            if changes.is_none() {
                self.scheduler.void_block_events();
            }
        }
        let events = self.scheduler.take_block_events();
        if let Some(tiers) = self.tiers.as_mut().filter(|_| events.reset) {
            changes = Some(tiers.present());
        }
        self.shared.blocks.publish(events, changes.into_iter().flatten());
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
        self.masks.prepare(&plan.batch);
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

    fn cancel(&mut self, ticket: Ticket) {
        let Some(&seq) = self.seqs.get(&ticket) else {
            // On its way here, while its grammar is compiled; or over.
            if self.handle.is_live(ticket) {
                self.given_up.insert(ticket);
            }
            return;
        };
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
        self.answer(seq, Vec::new(), Vec::new(), Some(cancelled.finish));
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
}

/// A count for the wire.
fn saturate(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
