//! Random workloads against the scheduler and the mock engine: submits, cancels, remote fills that succeed or fail at random
//! times while a hostile transport scribbles over the blocks it was lent, prefill-only sequences whose blocks must keep
//! still until released, a lower tier that loads blocks at once, later, in part or never, hints of what
//! will be asked for, shared prefixes, salts, and pools
//! small enough to preempt. After every step the invariants;
//! at the end, every answer equals the answer of the same request run alone (P1), and no block is held (P4).

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use baton_engine::spans::{Table, pieces};
use baton_engine::{
    Engine, FillRequest, FinishReason, MockEngine, Output, PASSES_PER_PRIORITY, Plan, PrefillRequest, SamplingParams,
    Scheduler, SchedulerConfig, SeqId, Stats,
};
use baton_proto::block_hash;
use baton_proto::worker::TokenLogprobs;
use common::tiers::SimTiers;
use common::{Job, Truth, alone_told, bytes, copy, engine_for, shaped};
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// A request in flight, as its caller sees it.
struct Live {
    job: Job,
    prefill_only: bool,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprobs>,
}

/// A fill in flight, as the transport sees it.
struct Fill {
    request: FillRequest,
    due: u64,
    cancelled: bool,
}

/// A prefill-only sequence, as the transport sees it.
struct Push {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    blocks: Vec<u32>,
    computed: usize,
    /// When to release it; unknown while it computes.
    due: Option<u64>,
}

struct Simulation {
    config: SchedulerConfig,
    scheduler: Scheduler,
    engine: MockEngine,
    tiers: Option<SimTiers>,
    rng: SmallRng,
    clock: u64,
    stems: Vec<Vec<u32>>,
    live: BTreeMap<SeqId, Live>,
    fills: BTreeMap<SeqId, Fill>,
    pushes: BTreeMap<SeqId, Push>,
    ended: Vec<(Live, FinishReason)>,
    emitted: u64,
    /// Who has not been admitted yet: blocks it needs, and blocks of those who passed it at the head of the queue.
    /// Sorted as the queue shall be: by age, where a step of priority is worth some arrivals.
    queued: BTreeMap<(i64, SeqId), (usize, usize)>,
    keys: BTreeMap<SeqId, i64>,
    passed: usize,
}

impl Simulation {
    fn new(config: SchedulerConfig, seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let vocab = config.vocab_size as u32;
        let stems = (0..3)
            .map(|_| (0..config.context_length).map(|_| rng.random_range(0..vocab)).collect())
            .collect();
        let engine = engine_for(&config);
        let mut scheduler = Scheduler::new(config.clone()).expect("valid");
        let tiers = rng.random_bool(0.7).then(|| {
            scheduler.enable_tiers();
            SimTiers::new(engine.region(), engine.geometry(), seed)
        });
        Simulation {
            scheduler,
            engine,
            tiers,
            config,
            rng,
            clock: 0,
            stems,
            live: BTreeMap::new(),
            fills: BTreeMap::new(),
            pushes: BTreeMap::new(),
            ended: Vec::new(),
            emitted: 0,
            queued: BTreeMap::new(),
            keys: BTreeMap::new(),
            passed: 0,
        }
    }

    fn job(&mut self) -> Job {
        let rng = &mut self.rng;
        let longest = self
            .config
            .context_length
            .min(self.config.block_size * self.config.total_blocks as usize)
            - 1;
        // Mostly short, now and then as long as can be.
        let bound = if rng.random_bool(0.15) {
            longest
        } else {
            longest.div_ceil(3)
        };
        let len = rng.random_range(1..=bound.max(1));
        let shared = rng.random_range(0..=len);
        let stem = &self.stems[rng.random_range(0..3)];
        let mut prompt = stem[..shared].to_vec();
        prompt.extend((shared..len).map(|_| rng.random_range(0..self.config.vocab_size as u32)));
        let sampling = match rng.random_range(0..3) {
            0 => SamplingParams::GREEDY,
            1 => SamplingParams::new(1.0, 0, 1.0, rng.random()).expect("in range"),
            _ => SamplingParams::new(0.7, 10, 0.9, rng.random()).expect("in range"),
        };
        let extras = rng.random_bool(0.5).then(|| shaped(rng.random_range(0..1000)));
        Job {
            prompt,
            extras,
            max_tokens: rng.random_range(1..30),
            sampling,
            stop_token_ids: (0..rng.random_range(0..3)).map(|_| rng.random_range(0..64)).collect(),
            priority: [0, 0, 0, -1, 1][rng.random_range(0..5)],
            salt: if rng.random_bool(0.3) {
                b"other tenant".to_vec()
            } else {
                Vec::new()
            },
        }
    }

    /// Something that may happen at any time, in a step or between two.
    fn event(&mut self) {
        match self.rng.random_range(0..10) {
            0..=3 => {
                let job = self.job();
                let remote = self.rng.random_bool(0.4);
                let waiting = self.scheduler.stats().waiting;
                self.hint(&job);
                match self.scheduler.submit(job.request(remote)) {
                    Ok(id) => self.enqueued(id, job, false),
                    Err(e) => assert!(e.retryable() && waiting >= self.config.waiting_max, "{e}"),
                }
            }
            4 | 5 => {
                let job = self.job();
                let request = PrefillRequest {
                    prompt: job.prompt.clone().into(),
                    sampling: job.sampling,
                    shaping: job.shaping(&[]),
                    cache_salt: job.salt.clone(),
                    skip_tokens: 0,
                    priority: job.priority,
                };
                if let Ok(id) = self.scheduler.submit_prefill(request) {
                    let push = Push {
                        prompt: job.prompt.clone(),
                        sampling: job.sampling,
                        blocks: Vec::new(),
                        computed: 0,
                        due: None,
                    };
                    self.pushes.insert(id, push);
                    self.enqueued(id, job, true);
                }
            }
            6 if !self.live.is_empty() => self.cancel(),
            _ => self.transport(),
        }
        self.scheduler.check().expect("invariants after an event");
    }

    /// A router's hint of a request, which may yet be refused.
    fn hint(&mut self, job: &Job) {
        let Some(tiers) = self.tiers.as_mut().filter(|_| self.rng.random_bool(0.3)) else {
            return;
        };
        let root = block_hash::cache_root(&self.config.model_digest, &job.salt);
        let names = block_hash::chain(&root, &job.prompt, self.config.block_size);
        tiers.read_ahead(&names, |name| self.scheduler.has_block(name));
    }

    fn enqueued(&mut self, id: SeqId, job: Job, prefill_only: bool) {
        let blocks = job.prompt.len().div_ceil(self.config.block_size);
        let key = id.0 as i64 - i64::from(job.priority) * PASSES_PER_PRIORITY;
        self.queued.insert((key, id), (blocks, 0));
        self.keys.insert(id, key);
        let tokens = Vec::new();
        let live = Live {
            job,
            prefill_only,
            tokens,
            logprobs: Vec::new(),
        };
        self.live.insert(id, live);
    }

    fn cancel(&mut self) {
        let nth = self.rng.random_range(0..self.live.len());
        let id = *self.live.keys().nth(nth).expect("in range");
        let live = self.live.remove(&id).expect("known");
        let cancelled = self.scheduler.cancel(id).expect("alive");
        self.queued.remove(&(self.keys[&id], id));
        if let Some(tiers) = &mut self.tiers {
            tiers.cancel(id);
        }
        assert_eq!(cancelled.finish.completion_tokens, live.tokens.len());
        let due = self.clock + self.rng.random_range(0..20);
        match (self.fills.get_mut(&id), self.pushes.get_mut(&id)) {
            (Some(fill), _) => {
                assert!(cancelled.draining);
                fill.cancelled = true;
            }
            (None, Some(push)) if cancelled.draining => push.due = Some(due),
            (None, _) => {
                assert!(!cancelled.draining);
                self.pushes.remove(&id);
            }
        }
        assert_eq!(self.scheduler.cancel(id), None);
        self.ended.push((live, FinishReason::Cancelled));
    }

    /// Transports touch what they were lent, and end when they are due.
    fn transport(&mut self) {
        let region = self.engine.region();
        let geometry = self.engine.geometry();
        let due: Vec<SeqId> = self
            .fills
            .iter()
            .filter(|(_, f)| f.due <= self.clock)
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let fill = self.fills.remove(&id).expect("listed");
            if self.rng.random_bool(0.3) {
                assert!(self.scheduler.fill_failed(id));
            } else {
                let request = &fill.request;
                let shaping = self.live.get(&id).and_then(|live| live.job.shaping(&[]));
                let truth = Truth::shaped(&self.config, &request.prompt, request.sampling, shaping);
                for layer in 0..geometry.layers {
                    let from = Table {
                        start: 0,
                        block_size: geometry.block_size,
                        blocks: &truth.blocks,
                    };
                    let to = Table {
                        start: request.cached_tokens,
                        block_size: geometry.block_size,
                        blocks: &request.blocks,
                    };
                    let positions = request.cached_tokens..request.prompt.len();
                    for piece in pieces(&geometry, layer, positions, from, to).expect("covered") {
                        copy(&truth.engine.region(), piece.local, &region, piece.remote_offset);
                    }
                }
                let output = self.scheduler.fill_done_with(id, truth.first_token, truth.logprobs);
                assert_eq!(output.is_none(), fill.cancelled);
                self.take(output.into_iter().collect());
            }
            assert!(!self.scheduler.fill_failed(id), "answered once");
        }
        for fill in self.fills.values() {
            for &block in &fill.request.blocks {
                let garbage = vec![self.rng.random(); geometry.block_bytes()];
                assert!(region.copy_in(geometry.block_range(block).start, &garbage));
            }
        }
        let due: Vec<SeqId> = self
            .pushes
            .iter()
            .filter(|(_, p)| p.due.is_some_and(|d| d <= self.clock))
            .map(|(id, _)| *id)
            .collect();
        for id in due {
            let push = self.pushes.remove(&id).expect("listed");
            let truth = Truth::of(&self.config, &push.prompt, push.sampling);
            for layer in 0..geometry.layers {
                let here = Table {
                    start: 0,
                    block_size: geometry.block_size,
                    blocks: &push.blocks,
                };
                let there = Table {
                    start: 0,
                    block_size: geometry.block_size,
                    blocks: &truth.blocks,
                };
                for piece in pieces(&geometry, layer, 0..push.computed, here, there).expect("covered") {
                    let len = piece.local.len();
                    assert_eq!(
                        bytes(&region, piece.local),
                        bytes(&truth.engine.region(), piece.remote_offset..piece.remote_offset + len),
                        "blocks of {id} changed while a transport was reading them"
                    );
                }
            }
            assert!(self.scheduler.release(id));
            assert!(!self.scheduler.release(id));
        }
    }

    fn take(&mut self, outputs: Vec<Output>) {
        for output in outputs {
            self.emitted += output.tokens.len() as u64;
            let live = self
                .live
                .get_mut(&output.seq)
                .expect("output of a sequence that is over");
            live.tokens.extend(&output.tokens);
            live.logprobs.extend(output.logprobs.iter().cloned());
            let Some(finish) = output.finish else {
                continue;
            };
            assert_eq!(finish.completion_tokens, live.tokens.len());
            assert_eq!(finish.prompt_tokens, live.job.prompt.len());
            assert!(finish.cached_tokens < finish.prompt_tokens);
            assert!(self.config.prefix_cache || finish.cached_tokens == 0);
            let live = self.live.remove(&output.seq).expect("present");
            if live.prefill_only {
                let push = self.pushes.get_mut(&output.seq).expect("pushing");
                assert_eq!(push.computed, push.prompt.len());
                push.due = Some(self.clock + self.rng.random_range(0..20));
            }
            self.ended.push((live, finish.reason));
        }
    }

    /// Plan, events in between, compute, events in between, commit.
    fn step(&mut self, events: bool) {
        self.clock += 1;
        let plan = match &mut self.tiers {
            Some(tiers) => {
                tiers.clock = self.clock;
                tiers.turn(&mut self.scheduler);
                self.scheduler.check().expect("invariants after loads");
                self.scheduler.plan_with(tiers)
            }
            None => self.scheduler.plan(),
        };
        self.scheduler.check().expect("invariants after plan");
        self.note(&plan);
        if !plan.batch.is_empty() {
            let tokens = self.engine.step(&plan.batch, &mut |_| {}).expect("a valid batch");
            if events && self.rng.random_bool(0.5) {
                self.event();
                assert_eq!(self.scheduler.plan(), Plan::default(), "one step at a time");
            }
            // A machine of changing mood: chunks are cut anew all the time.
            if self.rng.random_bool(0.9) {
                let per_token = 1 << self.rng.random_range(0..7);
                let took_ms = self.rng.random_range(0..100) + per_token * plan.batch.tokens() as u64;
                self.scheduler.observe_step(&plan.batch, Duration::from_millis(took_ms));
            }
            let outputs = self.scheduler.commit(&plan.batch, &tokens);
            self.take(outputs);
        }
        self.scheduler.check().expect("invariants after commit");
        let stats = self.scheduler.stats();
        assert_eq!(
            stats.free_blocks + stats.held_blocks + stats.cached_blocks,
            stats.total_blocks
        );
        assert_eq!(stats.generation_tokens, self.emitted);
        assert!(stats.cached_tokens <= stats.prompt_tokens);
    }

    fn note(&mut self, plan: &Plan) {
        assert!(plan.batch.tokens() <= self.config.batch_tokens_max);
        for id in &plan.admitted {
            let key = (self.keys[id], *id);
            let (blocks, _) = self.queued.remove(&key).expect("admitted once, after it was queued");
            if let Some(mut head) = self.queued.first_entry().filter(|head| *head.key() < key) {
                let (needed, passed) = head.get_mut();
                *passed += blocks;
                assert!(passed <= needed, "{:?} was passed by too many", head.key());
                self.passed += 1;
            }
        }
        for request in &plan.fills {
            let due = self.clock + self.rng.random_range(0..25);
            let fill = Fill {
                request: request.clone(),
                due,
                cancelled: false,
            };
            assert!(self.fills.insert(request.seq, fill).is_none(), "asked for once");
        }
        for reuse in plan.reused.iter().filter(|r| r.prefill_only) {
            let push = self.pushes.get_mut(&reuse.seq).expect("known");
            assert_eq!(push.computed, reuse.positions.start);
            assert_eq!(reuse.positions.start % self.config.block_size, 0);
            push.blocks.truncate(reuse.positions.start / self.config.block_size);
            push.blocks.extend(&reuse.blocks);
            push.computed = reuse.positions.end;
        }
        for span in &plan.batch.seqs {
            assert!(span.tokens.len() <= self.config.prefill_chunk_tokens_max.max(1));
            if let Some(push) = self.pushes.get_mut(&span.seq) {
                assert_eq!(push.computed, span.start_pos, "every position once, in order");
                assert_eq!(
                    push.blocks[..span.start_pos / self.config.block_size],
                    span.blocks[..span.start_pos / self.config.block_size],
                    "a pushed block never moves"
                );
                push.blocks.clone_from(&span.blocks);
                push.computed = span.end_pos();
            }
        }
    }

    /// Answers the totals, how each request ended, and how often one passed another in the queue.
    fn run(mut self, steps: usize) -> (Stats, Vec<FinishReason>, usize, Option<SimTiers>) {
        for _ in 0..steps {
            for _ in 0..self.rng.random_range(0..3) {
                self.event();
            }
            self.step(true);
        }
        // No starvation: the oldest gets at least one token of every step that no transport delays (but one in 32, which
        // looks for the time of decodes alone), so all that is left ends within the sum of its tokens and a bit.
        let work: usize = self.live.values().map(|l| l.job.prompt.len() + l.job.max_tokens).sum();
        let mut left = work + work / 16 + 30 * (self.live.len() + self.fills.len() + self.pushes.len() + 1);
        // A preempted sequence may wait for a load again.
        left *= if self.tiers.is_some() { 2 } else { 1 };
        while !self.scheduler.is_idle() {
            assert!(left > 0, "{} sequences starve: {:?}", self.live.len(), self.scheduler);
            left -= 1;
            self.step(false);
            self.transport();
        }
        assert!(self.live.is_empty());
        assert!(self.tiers.as_ref().is_none_or(SimTiers::is_idle));
        assert_eq!(self.scheduler.stats().held_blocks, 0);
        assert!(!self.scheduler.has_work());
        for (live, reason) in &self.ended {
            if live.prefill_only {
                let truth = Truth::shaped(&self.config, &live.job.prompt, live.job.sampling, live.job.shaping(&[]));
                assert!(*reason == FinishReason::Cancelled || live.tokens == [truth.first_token]);
                continue;
            }
            let (tokens, told, right) = alone_told(&self.config, &live.job);
            assert!(told.starts_with(&live.logprobs), "{:?}", live.job);
            let asks = live
                .job
                .extras
                .as_ref()
                .is_some_and(|extras| extras.top_logprobs.is_some());
            assert_eq!(live.logprobs.len(), if asks { live.tokens.len() } else { 0 });
            match reason {
                FinishReason::Cancelled => assert!(tokens.starts_with(&live.tokens), "{:?}", live.job),
                _ => assert_eq!((&live.tokens, *reason), (&tokens, right), "{:?}", live.job),
            }
        }
        (
            self.scheduler.stats(),
            self.ended.into_iter().map(|(_, reason)| reason).collect(),
            self.passed,
            self.tiers,
        )
    }
}

/// Workloads in a normal run; BATON_SIMULATIONS asks for another number.
fn cases() -> u32 {
    let asked = std::env::var("BATON_SIMULATIONS").ok();
    asked.and_then(|n| n.parse().ok()).unwrap_or(64)
}

prop_compose! {
    fn configs()(
        block_size in 1usize..9, total_blocks in 2u32..40, context_length in 8usize..120, seqs_max in 1usize..9,
        spare in 1usize..50, chunk in 1usize..64, waiting_max in 1usize..12, remote_min in 1usize..20, prefix_cache in prop::bool::weighted(0.85),
    ) -> SchedulerConfig {
        SchedulerConfig {
            batch_tokens_max: seqs_max + spare,
            prefill_chunk_tokens_max: chunk,
            seqs_max,
            waiting_max,
            remote_prefill_min_tokens: remote_min,
            prefix_cache,
            ..SchedulerConfig::new(block_size, total_blocks, context_length, 64)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_workloads_keep_every_promise(config in configs(), seed: u64) {
        Simulation::new(config, seed).run(150);
    }
}

/// One long life on a pool that is always too small.
#[test]
fn a_long_life_under_pressure() {
    let config = SchedulerConfig {
        batch_tokens_max: 24,
        prefill_chunk_tokens_max: 16,
        seqs_max: 8,
        waiting_max: 16,
        ..SchedulerConfig::new(4, 24, 90, 64)
    };
    let (stats, reasons, passed, tiers) = Simulation::new(config, 7).run(3000);
    // The workload did reach what it is meant to reach.
    assert!(passed > 30, "{passed}");
    assert!(stats.preemptions > 30 && stats.cached_tokens > 500, "{stats:?}");
    let tiers = tiers.expect("this seed has tiers");
    assert!(tiers.ahead > 10, "{} loads thanks to hints", tiers.ahead);
    assert!(tiers.loaded > 200 && tiers.broken > 30 && stats.loaded_tokens == 4 * tiers.loaded as u64);
    for reason in [
        FinishReason::Stop,
        FinishReason::Length,
        FinishReason::Cancelled,
        FinishReason::Prefilled,
    ] {
        assert!(
            reasons.iter().filter(|r| **r == reason).count() > 30,
            "{reason:?} was rare"
        );
    }
}
