//! What the integration tests share: jobs, and the truth about what a job answers when it has a worker to itself.
#![allow(dead_code)]

pub mod tiers;
pub mod tiny_model;

use baton_engine::{
    Engine, FinishReason, MockConfig, MockEngine, Output, Request, SamplingParams, Scheduler, SchedulerConfig, SeqId,
    StepBatch, StepSeq,
};
use baton_kvtransfer::Region;

/// A request, minus what must not matter.
#[derive(Debug, Clone)]
pub struct Job {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    pub stop_token_ids: Vec<u32>,
    pub salt: Vec<u8>,
    pub priority: i32,
}

impl Job {
    pub fn new(prompt: Vec<u32>, max_tokens: usize) -> Self {
        Job {
            prompt,
            max_tokens,
            sampling: SamplingParams::GREEDY,
            stop_token_ids: Vec::new(),
            salt: Vec::new(),
            priority: 0,
        }
    }

    pub fn request(&self, remote_prefill: bool) -> Request {
        Request {
            prompt: self.prompt.clone().into(),
            max_tokens: self.max_tokens,
            sampling: self.sampling,
            stop_token_ids: self.stop_token_ids.clone(),
            cache_salt: self.salt.clone(),
            remote_prefill,
            priority: self.priority,
        }
    }
}

pub fn sampled(seed: u64) -> SamplingParams {
    SamplingParams::new(0.8, 20, 0.95, seed).expect("in range")
}

/// A mock engine as large as the scheduler believes.
pub fn engine_for(config: &SchedulerConfig) -> MockEngine {
    MockEngine::new(MockConfig {
        block_size: config.block_size,
        total_blocks: config.total_blocks,
        context_length: config.context_length,
        vocab_size: config.vocab_size,
        ..MockConfig::default()
    })
    .expect("valid dimensions")
}

/// One turn: plan, compute, commit.
pub fn turn(scheduler: &mut Scheduler, engine: &mut dyn Engine) -> (StepBatch, Vec<Output>) {
    let plan = scheduler.plan();
    let tokens = engine.step(&plan.batch, &mut |_| {}).expect("a valid batch");
    let outputs = if plan.batch.is_empty() {
        Vec::new()
    } else {
        scheduler.commit(&plan.batch, &tokens)
    };
    scheduler.check().expect("invariants");
    (plan.batch, outputs)
}

/// Runs one job to its end; answers its tokens, the reason, and the cached tokens.
pub fn finish(scheduler: &mut Scheduler, engine: &mut dyn Engine, id: SeqId) -> (Vec<u32>, FinishReason, usize) {
    let mut tokens = Vec::new();
    loop {
        let (batch, outputs) = turn(scheduler, engine);
        assert!(!batch.is_empty(), "no progress");
        for output in outputs.into_iter().filter(|o| o.seq == id) {
            tokens.extend(output.tokens);
            if let Some(finish) = output.finish {
                assert_eq!(finish.completion_tokens, tokens.len());
                return (tokens, finish.reason, finish.cached_tokens);
            }
        }
    }
}

/// What the job answers on a worker of its own, without cache, its prompt in one piece, from a mock engine.
pub fn alone(config: &SchedulerConfig, job: &Job) -> (Vec<u32>, FinishReason) {
    alone_on(&mut engine_for(config), config, job)
}

/// The same from `engine`, which has as many blocks as `config` says.
pub fn alone_on(engine: &mut dyn Engine, config: &SchedulerConfig, job: &Job) -> (Vec<u32>, FinishReason) {
    let config = SchedulerConfig {
        prefix_cache: false,
        batch_tokens_max: config.context_length.max(config.seqs_max) + 1,
        prefill_chunk_tokens_max: config.context_length,
        ..config.clone()
    };
    let mut scheduler = Scheduler::new(config).expect("valid");
    let id = scheduler.submit(job.request(false)).expect("admissible");
    let (tokens, reason, cached) = finish(&mut scheduler, engine, id);
    assert_eq!(cached, 0);
    assert_eq!(scheduler.stats().held_blocks, 0);
    (tokens, reason)
}

/// A prompt computed in one piece in a region of its own: the KV bytes and the first token that are right.
pub struct Truth {
    pub engine: MockEngine,
    pub blocks: Vec<u32>,
    pub first_token: u32,
}

impl Truth {
    pub fn of(config: &SchedulerConfig, prompt: &[u32], sampling: SamplingParams) -> Self {
        let mut engine = engine_for(config);
        let blocks: Vec<u32> = (0..prompt.len().div_ceil(config.block_size) as u32).collect();
        let span = StepSeq {
            seq: SeqId(0),
            tokens: prompt.to_vec(),
            start_pos: 0,
            blocks: blocks.clone(),
            sample: Some(sampling),
        };
        let tokens = engine
            .step(&StepBatch { seqs: vec![span] }, &mut |_| {})
            .expect("valid batch");
        Truth {
            first_token: tokens[0].expect("usable logits"),
            engine,
            blocks,
        }
    }
}

/// Copies bytes between regions, as a transfer would.
pub fn copy(from: &Region, range: std::ops::Range<usize>, to: &Region, offset: usize) {
    let mut bytes = vec![0; range.len()];
    assert!(from.copy_out(range.start, &mut bytes));
    assert!(to.copy_in(offset, &bytes));
}

pub fn bytes(region: &Region, range: std::ops::Range<usize>) -> Vec<u8> {
    let mut bytes = vec![0; range.len()];
    assert!(region.copy_out(range.start, &mut bytes));
    bytes
}
