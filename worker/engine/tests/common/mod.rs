//! What the integration tests share: jobs, and the truth about what a job answers when it has a worker to itself.
#![allow(dead_code)]

pub mod tiers;
pub mod tiny_model;

use std::sync::{Arc, LazyLock};

use baton_engine::{
    Asked, Engine, FinishReason, MockConfig, MockEngine, Output, Request, SamplingParams, Scheduler, SchedulerConfig,
    SeqId, Shaping, StepBatch, StepSeq,
};
use baton_grammar::{GrammarCompiler, Vocabulary};
use baton_kvtransfer::Region;
use baton_proto::worker::grammar::Kind;
use baton_proto::worker::{self, Grammar, TokenLogprobs};

/// Ids of the vocabulary that grammars are over: as many as the simulated configurations have.
pub const GRAMMAR_VOCAB: usize = 64;

/// Letters, digits, pairs of letters, and an end.
static GRAMMARS: LazyLock<GrammarCompiler> = LazyLock::new(|| {
    let word = |id: usize| match id {
        0..26 => vec![b'a' + id as u8],
        26..36 => vec![b'0' + (id - 26) as u8],
        _ => vec![b'a' + (id % 26) as u8, b'a' + (id % 7) as u8],
    };
    let words = (0..GRAMMAR_VOCAB).map(word).collect();
    let vocabulary = Vocabulary::from_words(words, &[GRAMMAR_VOCAB as u32 - 1]).expect("it has an end");
    GrammarCompiler::new(vocabulary).expect("usable")
});

/// What a request asks for that changes logits: everything, in small.
pub fn shaped(seed: u64) -> worker::Sampling {
    let regexes = [
        "([a-c]{1,3}[0-9])*",
        "[a-z]+",
        "(ab|ba|[0-9]{2}){3,9}",
        "[a-z0-9]{0,40}",
    ];
    let regex = regexes[seed as usize % 4].to_owned();
    let grammar = Grammar {
        kind: Some(Kind::Regex(regex)),
    };
    worker::Sampling {
        presence_penalty: if seed.is_multiple_of(2) { 0.5 } else { 0.0 },
        frequency_penalty: if seed.is_multiple_of(3) { 1.5 } else { -0.5 },
        repetition_penalty: if seed.is_multiple_of(5) { 1.3 } else { 0.0 },
        logit_bias: vec![worker::LogitBias {
            token_id: seed as u32 % 64,
            bias: 3.0,
        }],
        min_tokens: seed as u32 % 7,
        top_logprobs: (seed % 4 < 3).then_some(seed as u32 % 4),
        grammar: (seed % 6 < 3).then_some(grammar),
        ..Default::default()
    }
}

/// A request, minus what must not matter.
#[derive(Debug, Clone)]
pub struct Job {
    pub prompt: Vec<u32>,
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// What else it asks for.
    pub extras: Option<worker::Sampling>,
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
            extras: None,
            stop_token_ids: Vec::new(),
            salt: Vec::new(),
            priority: 0,
        }
    }

    /// The state of the job after `emitted` tokens, as a worker that has not seen the others makes it.
    pub fn shaping(&self, emitted: &[u32]) -> Option<Arc<Shaping>> {
        let sampling = self.extras.as_ref()?;
        let prompt = [&self.prompt, emitted].concat();
        let grammar = sampling.grammar.as_ref().map(|grammar| {
            let mut matcher = GRAMMARS.matcher(grammar).expect("usable");
            emitted
                .iter()
                .for_each(|token| matcher.advance(*token).expect("admitted"));
            matcher
        });
        let asked = Asked {
            sampling,
            prompt: &prompt,
            emitted_tokens: emitted.len(),
            stop_token_ids: &self.stop_token_ids,
            vocab_size: GRAMMAR_VOCAB,
        };
        Shaping::new(asked, grammar).expect("in range").map(Arc::new)
    }

    pub fn request(&self, remote_prefill: bool) -> Request {
        Request {
            prompt: self.prompt.clone().into(),
            max_tokens: self.max_tokens,
            sampling: self.sampling,
            shaping: self.shaping(&[]),
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
    let (tokens, _, reason, cached) = finish_told(scheduler, engine, id);
    (tokens, reason, cached)
}

/// The same with what was told of each token.
pub fn finish_told(
    scheduler: &mut Scheduler,
    engine: &mut dyn Engine,
    id: SeqId,
) -> (Vec<u32>, Vec<TokenLogprobs>, FinishReason, usize) {
    let (mut tokens, mut told) = (Vec::new(), Vec::new());
    loop {
        let (batch, outputs) = turn(scheduler, engine);
        assert!(!batch.is_empty(), "no progress");
        for output in outputs.into_iter().filter(|o| o.seq == id) {
            tokens.extend(output.tokens);
            told.extend(output.logprobs);
            if let Some(finish) = output.finish {
                assert_eq!(finish.completion_tokens, tokens.len());
                return (tokens, told, finish.reason, finish.cached_tokens);
            }
        }
    }
}

/// What the job answers on a worker of its own, without cache, its prompt in one piece, from a mock engine.
pub fn alone(config: &SchedulerConfig, job: &Job) -> (Vec<u32>, FinishReason) {
    alone_on(&mut engine_for(config), config, job)
}

/// The same with what is told of each token.
pub fn alone_told(config: &SchedulerConfig, job: &Job) -> (Vec<u32>, Vec<TokenLogprobs>, FinishReason) {
    told_on(&mut engine_for(config), config, job)
}

/// The same from `engine`, which has as many blocks as `config` says.
pub fn alone_on(engine: &mut dyn Engine, config: &SchedulerConfig, job: &Job) -> (Vec<u32>, FinishReason) {
    let (tokens, _, reason) = told_on(engine, config, job);
    (tokens, reason)
}

fn told_on(
    engine: &mut dyn Engine,
    config: &SchedulerConfig,
    job: &Job,
) -> (Vec<u32>, Vec<TokenLogprobs>, FinishReason) {
    let config = SchedulerConfig {
        prefix_cache: false,
        batch_tokens_max: config.context_length.max(config.seqs_max) + 1,
        prefill_chunk_tokens_max: config.context_length,
        ..config.clone()
    };
    let mut scheduler = Scheduler::new(config).expect("valid");
    let id = scheduler.submit(job.request(false)).expect("admissible");
    let (tokens, told, reason, cached) = finish_told(&mut scheduler, engine, id);
    assert_eq!(cached, 0);
    assert_eq!(scheduler.stats().held_blocks, 0);
    (tokens, told, reason)
}

/// A prompt computed in one piece in a region of its own: the KV bytes and the first token that are right.
pub struct Truth {
    pub engine: MockEngine,
    pub blocks: Vec<u32>,
    pub first_token: u32,
    pub logprobs: Option<TokenLogprobs>,
}

impl Truth {
    pub fn of(config: &SchedulerConfig, prompt: &[u32], sampling: SamplingParams) -> Self {
        Self::shaped(config, prompt, sampling, None)
    }

    pub fn shaped(
        config: &SchedulerConfig,
        prompt: &[u32],
        sampling: SamplingParams,
        shaping: Option<Arc<Shaping>>,
    ) -> Self {
        let mut engine = engine_for(config);
        let blocks: Vec<u32> = (0..prompt.len().div_ceil(config.block_size) as u32).collect();
        let span = StepSeq {
            seq: SeqId(0),
            tokens: prompt.to_vec(),
            start_pos: 0,
            blocks: blocks.clone(),
            sample: Some(sampling),
            shaping: shaping.clone(),
        };
        let tokens = engine
            .step(&StepBatch { seqs: vec![span] }, &mut |_| {})
            .expect("valid batch");
        let first_token = tokens[0].expect("usable logits");
        Truth {
            first_token,
            logprobs: shaping.and_then(|shaping| shaping.push(first_token).expect("admitted")),
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
