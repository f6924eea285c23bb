//! A simulated worker: the real scheduler over a pool of blocks without bytes, and steps that take as long as a timing
//! profile says. Deliberately no hand-over between workers: every worker is a combined one.

use super::prompts::{GENERATED, VOCABULARY};
use baton_engine::{
    BlockEvents, ConfigError, MockTiming, Output, Request, SamplingParams, Scheduler, SchedulerConfig, SeqId, StepBatch,
};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// One worker.
#[derive(Debug)]
pub struct SimWorker {
    scheduler: Scheduler,
    timing: MockTiming,
    /// Request of each sequence.
    requests: HashMap<SeqId, usize>,
    step: Option<(StepBatch, Duration)>,
    generated: u32,
    /// Time spent in steps.
    pub busy: Duration,
}

/// What came out of a step for one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    /// Which request.
    pub request: usize,
    /// Of the prompt, tokens found in the prefix cache; set with the last token.
    pub finished: Option<usize>,
}

impl SimWorker {
    /// An idle worker.
    pub fn new(config: SchedulerConfig, timing: MockTiming) -> Result<Self, ConfigError> {
        let mut scheduler = Scheduler::new(config)?;
        scheduler.enable_block_events();
        Ok(Self {
            scheduler,
            timing,
            requests: HashMap::new(),
            step: None,
            generated: 0,
            busy: Duration::ZERO,
        })
    }

    /// Limits fit for `block_size` and `total_blocks`; any length that fits the pool is taken.
    pub fn config(block_size: usize, total_blocks: u32) -> SchedulerConfig {
        SchedulerConfig::new(block_size, total_blocks, 1 << 24, VOCABULARY)
    }

    /// Queues a request; false if the worker refuses it.
    pub fn submit(&mut self, request: usize, prompt: Arc<[u32]>, max_tokens: usize) -> bool {
        let submitted = self.scheduler.submit(Request {
            prompt,
            max_tokens,
            sampling: SamplingParams::GREEDY,
            stop_token_ids: Vec::new(),
            cache_salt: Vec::new(),
            remote_prefill: false,
        });
        match submitted {
            Ok(seq) => {
                self.requests.insert(seq, request);
                true
            }
            Err(_) => false,
        }
    }

    /// Starts a step if none is under way and there is something to compute; answers how long it takes.
    pub fn start(&mut self) -> Option<Duration> {
        if self.step.is_some() {
            return None;
        }
        let plan = self.scheduler.plan();
        if plan.batch.is_empty() {
            return None;
        }
        let took = self.timing.step_time(&plan.batch);
        self.step = Some((plan.batch, took));
        Some(took)
    }

    /// Ends the step: hands its tokens to `token`, and answers what happened to the prefix cache.
    pub fn finish(&mut self, mut token: impl FnMut(Token)) -> BlockEvents {
        let Some((batch, took)) = self.step.take() else {
            return BlockEvents::default();
        };
        self.busy += took;
        self.scheduler.observe_step(&batch, took);
        let sampled: Vec<Option<u32>> = batch
            .seqs
            .iter()
            .map(|span| {
                span.sample.map(|_| {
                    // Never the same twice (within 2^31), so that no two answers share a block.
                    self.generated = (self.generated + 1) % GENERATED;
                    GENERATED + self.generated
                })
            })
            .collect();
        for Output { seq, finish, .. } in self.scheduler.commit(&batch, &sampled) {
            let finished = finish.map(|finish| finish.cached_tokens);
            let request = match finished {
                Some(_) => self.requests.remove(&seq),
                None => self.requests.get(&seq).copied(),
            };
            if let Some(request) = request {
                token(Token { request, finished });
            }
        }
        self.scheduler.take_block_events()
    }

    /// The real scheduler, for its statistics and its self-check.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}
