//! The scheduler: decides which sequence computes what in the next step, and in which blocks. A state machine without IO,
//! clocks or threads; the worker server drives it, tests and simulations too.
//!
//! # States of a sequence
//!
//! ```text
//! submit ──▶ Waiting ──admit──▶ Running ──stop / length──▶ (gone)
//!               ▲  │               │ ▲
//!               │  ├─blocks below──┼─┼─▶ Loading ──load_ended──▶ Loaded ──▶ Running or Filling
//!               │  └─admit, remote─┼─┼─▶ Filling ──fill_done───▶ Running, first token emitted
//!               └────preempted─────┘ └───fill_failed──┘
//! submit_prefill ──▶ Waiting ──▶ Running ──first token──▶ Pushing ──release──▶ (gone)
//! cancel:  Waiting, Loading, Loaded, or Running to generate ──▶ (gone)
//!          Filling, Pushing, or prefill-only and not Waiting ──▶ Draining ──release (or fill_*)──▶ (gone)
//! ```
//!
//! # The loop
//!
//! `plan` → the engine computes `plan.batch` → `commit` (or `step_failed`). Between `plan` and `commit` every other call is
//! allowed: blocks freed then are given out by the next `plan` at the earliest, and that answers with nothing while a
//! step is open.
//!
//! # Rules
//!
//! - **Decode first.** Every sequence whose only uncomputed token is its last gets one token of the step; prefill chunks
//!   share the rest.
//! - **Prefill budget.** What decodes leave of `batch_tokens_max`, cut so that a step takes [`SchedulerConfig::step_target`]
//!   by the times seen so far (`pace`), but never to nothing. Half goes to the oldest prompt, so that every one
//!   ends in bounded time; the other half to the shortest, one after another, so that a short prompt never waits
//!   behind the whole of a long one, and prompts that arrive together end one by one instead of all at the last one's time.
//! - **Order** is by priority and age (`rank`): "older" and "younger" below mean earlier and later in it. A step of
//!   priority passes so many later arrivals and no more, so a low priority waits longer, not for ever.
//! - **Admission** is in that order. A sequence gets the blocks of all its tokens at once, so a prefill never stalls half-way,
//!   and one spare block per running sequence must remain, so that admitting does not lead straight to preempting.
//! - **Passing.** While the oldest waiting one does not fit, younger ones that do may pass it, together with no more blocks
//!   than it needs itself: so a long prompt does not close the door for short ones, and waits for at most its own
//!   size of them. A preempted sequence is not passed: blocks are short then, and its client is in mid-stream.
//! - **Preemption by recompute.** A decode that needs a block when none is left sends the youngest younger sequence back
//!   to the queue, with all its tokens; one that has no younger waits where it is. So the oldest always progresses.
//!   Sequences whose blocks a transport may touch, or prefill-only ones, are never preempted; those need no further
//!   block and end by themselves.
//! - **Length.** A sequence ends at `max_tokens` or at [`SchedulerConfig::length_max`], which is fixed: the context, or the whole
//!   pool if that is smaller. So a sequence alone always fits, and where it is cut does not depend on its mates.
//! - **Lower tiers** ([`crate::tiers`]). What follows the cached prefix may be in host memory, on disk or in an object
//!   store. Asked at admission, when the sequence owns the blocks; it waits for what is read in the background, and
//!   computes what does not come. Asked before a remote prefill, which then sends only what is left.
//! - **Prefix cache.** Full computed blocks, generated ones included, are named at `commit` and `fill_done`. A sequence takes
//!   the longest run of named blocks at admission, and again before each chunk; when several are about to compute the
//!   same block, one does and the others wait for it that step. At least the last token is always computed.
//!
//! # Invariants ([`Scheduler::check`])
//!
//! Those of the [block manager](crate::blocks) and of sequences; nobody was passed by more blocks than it needs; the queue, the running set and the transport set
//! partition the sequences by state; a waiting sequence holds nothing; at most `seqs_max` sequences hold blocks.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use baton_proto::block_hash;
use baton_proto::limits::STOP_TOKEN_IDS_MAX;
use baton_proto::worker::TokenLogprobs;

use crate::block_events::BlockEvents;
use crate::blocks::BlockManager;
use crate::config::SchedulerConfig;
use crate::error::{AdmitError, ConfigError};
use crate::rank::Rank;
use crate::request::{Cancelled, Finish, FinishReason, Output, PrefillRequest, Request};
use crate::sampling::{SamplingParams, Shaping};
use crate::sequence::{Sequence, State, Task};
use crate::stats::Stats;
use crate::step::{SeqId, StepBatch};

mod accounting;
mod loading;
mod pace;
mod planning;

use pace::Pace;

/// See the module.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    blocks: BlockManager,
    seqs: HashMap<SeqId, Sequence>,
    /// A preempted sequence keeps its rank.
    waiting: BTreeSet<Rank>,
    running: BTreeSet<Rank>,
    /// Loading, Loaded, Filling, Pushing and Draining.
    transport: BTreeSet<SeqId>,
    next_id: u64,
    step_open: bool,
    /// The head of the queue and the situation in which it did not fit: not tried again before that changes.
    blocked: Option<(SeqId, u64, usize)>,
    pace: Pace,
    /// Somebody below keeps blocks.
    has_tiers: bool,
    /// Totals; gauges are filled in by `stats`.
    totals: Stats,
}

impl Scheduler {
    /// A scheduler over an empty pool.
    pub fn new(config: SchedulerConfig) -> Result<Self, ConfigError> {
        config.validate()?;
        Ok(Scheduler {
            blocks: BlockManager::new(config.total_blocks),
            pace: Pace::new(config.step_target),
            config,
            seqs: HashMap::new(),
            waiting: BTreeSet::new(),
            running: BTreeSet::new(),
            transport: BTreeSet::new(),
            next_id: 0,
            step_open: false,
            blocked: None,
            has_tiers: false,
            totals: Stats::default(),
        })
    }

    /// The configuration it was made with.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// Queues a request to generate. Refused at once if it can never fit or the queue is full.
    pub fn submit(&mut self, request: Request) -> Result<SeqId, AdmitError> {
        if request.max_tokens == 0 {
            return Err(AdmitError::NoTokensAsked);
        }
        if request.stop_token_ids.len() > STOP_TOKEN_IDS_MAX {
            return Err(AdmitError::TooManyStops {
                count: request.stop_token_ids.len(),
                max: STOP_TOKEN_IDS_MAX,
            });
        }
        let task = Task::Generate {
            max_tokens: request.max_tokens,
            stop_token_ids: request.stop_token_ids,
            remote_prefill: request.remote_prefill,
        };
        self.enqueue(
            task,
            request.prompt,
            (request.sampling, request.shaping),
            &request.cache_salt,
            request.priority,
        )
    }

    /// Queues a prefill for another worker. Its blocks are held from its first step until [`release`](Self::release).
    pub fn submit_prefill(&mut self, request: PrefillRequest) -> Result<SeqId, AdmitError> {
        let (skip, prompt_tokens) = (request.skip_tokens, request.prompt.len());
        if !skip.is_multiple_of(self.config.block_size) || (skip > 0 && skip >= prompt_tokens) {
            return Err(AdmitError::BadSkip {
                skip_tokens: skip,
                block_size: self.config.block_size,
                prompt_tokens,
            });
        }
        self.enqueue(
            Task::Prefill,
            request.prompt,
            (request.sampling, request.shaping),
            &request.cache_salt,
            request.priority,
        )
    }

    fn enqueue(
        &mut self,
        task: Task,
        prompt: Arc<[u32]>,
        (sampling, shaping): (SamplingParams, Option<Arc<Shaping>>),
        salt: &[u8],
        priority: i32,
    ) -> Result<SeqId, AdmitError> {
        let config = &self.config;
        if prompt.is_empty() {
            return Err(AdmitError::EmptyPrompt);
        }
        if prompt.len() >= config.context_length {
            return Err(AdmitError::TooLong {
                prompt_tokens: prompt.len(),
                context_length: config.context_length,
            });
        }
        let needed = prompt.len().div_ceil(config.block_size);
        if needed > self.blocks.total() {
            return Err(AdmitError::NeverFits {
                needed,
                total: self.blocks.total(),
            });
        }
        if let Some(&token) = prompt.iter().find(|t| **t as usize >= config.vocab_size) {
            return Err(AdmitError::UnknownToken {
                token,
                vocab_size: config.vocab_size,
            });
        }
        if self.waiting.len() >= config.waiting_max {
            return Err(AdmitError::QueueFull {
                waiting_max: config.waiting_max,
            });
        }
        let id = SeqId(self.next_id);
        self.next_id += 1;
        let rank = Rank::new(id, priority);
        let root = block_hash::root(&block_hash::cache_root(&config.model_digest, salt));
        let mut seq = Sequence::new(rank, task, prompt, sampling, shaping, root, config.block_size);
        if config.prefix_cache {
            seq.expected_cached = expected_cached(&mut seq, &self.blocks);
        }
        self.seqs.insert(id, seq);
        self.waiting.insert(rank);
        Ok(id)
    }

    /// Takes in what the engine computed for `batch`, the one of the last plan. Spans of sequences that were cancelled
    /// meanwhile are ignored.
    pub fn commit(&mut self, batch: &StepBatch, sampled: &[Option<u32>]) -> Vec<Output> {
        self.close_step(batch);
        let mut outputs = Vec::new();
        for (index, span) in batch.seqs.iter().enumerate() {
            self.totals.computed_tokens += span.tokens.len() as u64;
            let Some(seq) = self.seqs.get_mut(&span.seq) else {
                continue;
            };
            if seq.state != State::Running || seq.computed != span.start_pos {
                continue;
            }
            seq.computed = span.end_pos();
            self.register_computed(span.seq);
            if span.sample.is_some() {
                let output = match sampled.get(index).copied().flatten() {
                    Some(token) => self.emit(span.seq, token),
                    None => self.fail_sampling(span.seq),
                };
                outputs.extend(output);
            }
        }
        self.totals.steps += u64::from(!batch.is_empty());
        outputs
    }

    /// Says how long the engine took for `batch`. Only sizes of later prefill chunks depend on it, never a token.
    pub fn observe_step(&mut self, batch: &StepBatch, took: Duration) {
        if !batch.is_empty() {
            let decodes = batch.seqs.iter().filter(|span| span.tokens.len() == 1).count();
            self.pace.observe(batch.tokens() - decodes, took);
        }
    }

    /// Ends every sequence of a step that the engine could not compute, with [`FinishReason::Error`] and `error` as the
    /// sentence. Prefill-only ones then drain: `release` them once their push is aborted.
    pub fn step_failed(&mut self, batch: &StepBatch, error: &str) -> Vec<Output> {
        self.close_step(batch);
        batch
            .seqs
            .iter()
            .filter_map(|span| self.fail(span.seq, error))
            .collect()
    }

    fn close_step(&mut self, batch: &StepBatch) {
        self.step_open = false;
        for span in &batch.seqs {
            if let Some(seq) = self.seqs.get_mut(&span.seq) {
                seq.in_step = false;
            }
        }
    }

    /// The blocks of a [`FillRequest`](crate::FillRequest) are complete, and the prefill worker sampled `first_token`.
    /// Answers with that token's output; `None` if the sequence was cancelled meanwhile (this releases it) or is unknown.
    ///
    /// `logprobs` are the token's where the request asks for them; if they are missing then the fill failed.
    pub fn fill_done_with(&mut self, id: SeqId, first_token: u32, logprobs: Option<TokenLogprobs>) -> Option<Output> {
        let shaping = self.seqs.get(&id).and_then(|seq| seq.shaping.clone());
        let top = shaping.as_ref().and_then(|shaping| shaping.top_logprobs());
        let told = match (&logprobs, top) {
            (None, None) => true,
            (Some(told), Some(top)) => {
                told.top_ids.len() == told.top_logprobs.len() && told.top_ids.len() <= top as usize
            }
            _ => false,
        };
        if first_token as usize >= self.config.vocab_size || !told {
            self.fill_failed(id);
            return None;
        }
        if let Some(shaping) = &shaping {
            shaping.tell_logprobs(logprobs);
        }
        let seq = self.leave_transport(id)?;
        seq.computed = seq.prompt.len();
        self.register_computed(id);
        self.emit(id, first_token)
    }

    /// The same for a request that asks for no log probabilities.
    pub fn fill_done(&mut self, id: SeqId, first_token: u32) -> Option<Output> {
        self.fill_done_with(id, first_token, None)
    }

    /// The fill will not be completed and its window is closed: the sequence prefills here, from its cached prefix on. If
    /// it was cancelled meanwhile this releases it. False if there is no such fill.
    pub fn fill_failed(&mut self, id: SeqId) -> bool {
        let filling = self
            .seqs
            .get(&id)
            .is_some_and(|s| matches!(s.state, State::Filling | State::Draining));
        self.leave_transport(id);
        filling
    }

    /// Filling → Running; a draining sequence is released instead.
    fn leave_transport(&mut self, id: SeqId) -> Option<&mut Sequence> {
        match self.seqs.get(&id)?.state {
            State::Filling => {
                self.transport.remove(&id);
                let seq = self.seqs.get_mut(&id)?;
                self.running.insert(seq.rank);
                seq.state = State::Running;
                Some(seq)
            }
            State::Draining => {
                self.release(id);
                None
            }
            State::Waiting | State::Running | State::Loading | State::Loaded | State::Pushing => None,
        }
    }

    /// Ends a sequence in any state. `None` if it is over already.
    pub fn cancel(&mut self, id: SeqId) -> Option<Cancelled> {
        let seq = self.seqs.get(&id)?;
        if seq.state == State::Draining {
            return None;
        }
        let finish = finish(seq, FinishReason::Cancelled, "");
        let draining = self.retire(id);
        Some(Cancelled { finish, draining })
    }

    /// No transport touches the blocks of this sequence any more: a prefill-only one whose push was acknowledged or
    /// aborted, or a draining one. False if it is neither.
    pub fn release(&mut self, id: SeqId) -> bool {
        let released = self
            .seqs
            .get(&id)
            .is_some_and(|s| matches!(s.state, State::Pushing | State::Draining));
        if released {
            self.remove(id);
        }
        released
    }

    /// Records what happens to the prefix cache from now on, for [`take_block_events`](Self::take_block_events).
    pub fn enable_block_events(&mut self) {
        self.blocks.enable_events();
    }

    /// What happened to the prefix cache since the last call: call it once a step.
    pub fn take_block_events(&mut self) -> BlockEvents {
        self.blocks.take_events()
    }

    /// Makes the next [`take_block_events`](Self::take_block_events) tell everything anew: a reader has lost some.
    pub fn void_block_events(&mut self) {
        self.blocks.void_events();
    }

    /// Prompt tokens that a sequence has taken from the prefix cache so far; `None` once it is over. Final with its first
    /// token.
    pub fn cached_tokens(&self, id: SeqId) -> Option<usize> {
        self.seqs.get(&id).map(|seq| seq.cached_tokens)
    }

    /// Whether a plan may have something to compute or to ask for.
    pub fn has_work(&self) -> bool {
        let loaded = |id| self.seqs[id].state == State::Loaded;
        !self.running.is_empty() || !self.waiting.is_empty() || self.transport.iter().any(loaded)
    }

    /// Whether no sequence is left in any state.
    pub fn is_idle(&self) -> bool {
        self.seqs.is_empty()
    }

    /// A sampled token: keeps it, and ends the sequence if it is the last.
    fn emit(&mut self, id: SeqId, token: u32) -> Option<Output> {
        let length_max = self.config.length_max();
        let seq = self.seqs.get_mut(&id)?;
        let mut logprobs = None;
        if let Some(shaping) = &seq.shaping {
            match shaping.push(token) {
                Ok(told) => logprobs = told,
                // The token is not part of an answer that its grammar refuses.
                Err(error) => return self.fail_for(id, &error.to_string(), Some("grammar")),
            }
        }
        seq.generated.push(token);
        self.totals.generation_tokens += 1;
        let reason = match &seq.task {
            Task::Prefill => Some(FinishReason::Prefilled),
            Task::Generate { stop_token_ids, .. } if stop_token_ids.contains(&token) => Some(FinishReason::Stop),
            Task::Generate { max_tokens, .. } if seq.generated.len() >= *max_tokens => Some(FinishReason::Length),
            Task::Generate { .. } if seq.len() >= length_max => Some(FinishReason::Length),
            Task::Generate { .. } => None,
        };
        let finish = reason.map(|reason| finish(seq, reason, ""));
        match reason {
            None => {}
            Some(FinishReason::Prefilled) => self.hold(id, State::Pushing),
            Some(_) => self.remove(id),
        }
        Some(Output {
            seq: id,
            tokens: vec![token],
            logprobs: logprobs.into_iter().collect(),
            finish,
        })
    }

    /// No token could be sampled.
    fn fail_sampling(&mut self, id: SeqId) -> Option<Output> {
        let shaping = self.seqs.get(&id).and_then(|seq| seq.shaping.clone());
        match shaping.and_then(|shaping| shaping.take_error()) {
            Some(error) => self.fail_for(id, &error.to_string(), Some("grammar")),
            None => self.fail(id, "the model gave no usable logits"),
        }
    }

    fn fail(&mut self, id: SeqId, error: &str) -> Option<Output> {
        self.fail_for(id, error, None)
    }

    fn fail_for(&mut self, id: SeqId, error: &str, invalid_field: Option<&'static str>) -> Option<Output> {
        let seq = self.seqs.get(&id).filter(|s| s.state == State::Running)?;
        let finish = Finish {
            invalid_field,
            ..finish(seq, FinishReason::Error, error)
        };
        self.retire(id);
        Some(Output {
            seq: id,
            tokens: Vec::new(),
            logprobs: Vec::new(),
            finish: Some(finish),
        })
    }

    /// Over for the caller: gone, or draining if a transport may touch its blocks. Answers whether it drains.
    fn retire(&mut self, id: SeqId) -> bool {
        let drains = self.seqs.get(&id).is_some_and(|s| match s.state {
            State::Waiting => false,
            // What is loaded only this thread writes; but a pusher may be reading what was in the cache.
            State::Running | State::Loading | State::Loaded => s.is_prefill_only(),
            State::Filling | State::Pushing | State::Draining => true,
        });
        if drains {
            self.hold(id, State::Draining);
        } else {
            self.remove(id);
        }
        drains
    }

    /// Into a state in which blocks are only held.
    fn hold(&mut self, id: SeqId, state: State) {
        if let Some(seq) = self.seqs.get_mut(&id) {
            seq.state = state;
            self.running.remove(&seq.rank);
            self.transport.insert(id);
        }
    }

    fn remove(&mut self, id: SeqId) {
        self.transport.remove(&id);
        if let Some(mut seq) = self.seqs.remove(&id) {
            self.waiting.remove(&seq.rank);
            self.running.remove(&seq.rank);
            self.release_blocks(&mut seq);
        }
    }

    /// Deepest first, so that the cache forgets the ends of prefixes before their beginnings.
    fn release_blocks(&mut self, seq: &mut Sequence) {
        for block in seq.blocks.drain(..).rev() {
            self.blocks.release(block);
        }
        seq.computed = 0;
        seq.registered = 0;
    }

    /// Names the blocks that became full and computed.
    fn register_computed(&mut self, id: SeqId) {
        let Some(seq) = self.seqs.get_mut(&id).filter(|_| self.config.prefix_cache) else {
            return;
        };
        while (seq.registered + 1) * self.config.block_size <= seq.computed {
            let (hash, parent) = (seq.hash(seq.registered), seq.parent(seq.registered));
            self.blocks.register(seq.blocks[seq.registered], hash, parent);
            seq.registered += 1;
        }
    }
}

/// Leading tokens that are in the cache now.
fn expected_cached(seq: &mut Sequence, blocks: &BlockManager) -> usize {
    let (reusable, block_size) = (seq.reusable_blocks(), seq.block_size());
    let known = |index: &usize| blocks.lookup(&seq.hash(*index)).is_some();
    (0..reusable).take_while(known).count() * block_size
}

fn finish(seq: &Sequence, reason: FinishReason, error: &str) -> Finish {
    Finish {
        reason,
        prompt_tokens: seq.prompt.len(),
        cached_tokens: seq.cached_tokens,
        completion_tokens: seq.generated.len(),
        error: error.to_owned(),
        invalid_field: None,
    }
}
