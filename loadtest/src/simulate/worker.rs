//! A simulated worker: the real scheduler over a pool of blocks without bytes, and steps that take as long as a timing
//! profile says. Deliberately no hand-over between workers: every worker is a combined one.

use super::policy::WorkerLoad;
use crate::trace_prompts::{GENERATED, VOCABULARY};
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
    /// Steps take this many times less.
    time_scale: f64,
    jobs: HashMap<SeqId, Job>,
    step: Option<(StepBatch, Duration)>,
    generated: u32,
    /// Measured, as running means: prompt tokens per second of prefill, and seconds of a decode step.
    prefill_per_s: Option<f64>,
    decode_step_s: Option<f64>,
    /// Time spent in steps.
    pub busy: Duration,
}

/// Weight of a new sample in the running means.
const BLEND: f64 = 0.1;

/// A request as the worker sees it.
#[derive(Debug)]
struct Job {
    request: usize,
    prompt_tokens: usize,
    /// Prompt tokens not yet computed; a guess until it is admitted.
    uncached_tokens: usize,
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
    pub fn new(config: SchedulerConfig, timing: MockTiming, time_scale: f64) -> Result<Self, ConfigError> {
        let mut scheduler = Scheduler::new(config)?;
        scheduler.enable_block_events();
        Ok(Self {
            scheduler,
            timing,
            time_scale,
            jobs: HashMap::new(),
            step: None,
            generated: 0,
            prefill_per_s: None,
            decode_step_s: None,
            busy: Duration::ZERO,
        })
    }

    /// Limits fit for `block_size` and `total_blocks`; any length that fits the pool is taken.
    pub fn config(block_size: usize, total_blocks: u32) -> SchedulerConfig {
        SchedulerConfig::new(block_size, total_blocks, 1 << 24, VOCABULARY)
    }

    /// Queues a request; false if the worker refuses it.
    pub fn submit(&mut self, request: usize, prompt: Arc<[u32]>, uncached_tokens: usize, max_tokens: usize) -> bool {
        let prompt_tokens = prompt.len();
        let submitted = self.scheduler.submit(Request {
            prompt,
            max_tokens,
            sampling: SamplingParams::GREEDY,
            shaping: None,
            stop_token_ids: Vec::new(),
            cache_salt: Vec::new(),
            remote_prefill: false,
            priority: 0,
        });
        match submitted {
            Ok(seq) => {
                let job = Job {
                    request,
                    prompt_tokens,
                    uncached_tokens,
                };
                self.jobs.insert(seq, job);
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
        for reuse in &plan.reused {
            self.computed(reuse.seq, reuse.positions.end);
        }
        if plan.batch.is_empty() {
            return None;
        }
        let took = self.timing.step_time(&plan.batch).div_f64(self.time_scale);
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
        self.measure(&batch, took);
        for span in &batch.seqs {
            self.computed(span.seq, span.end_pos());
        }
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
                Some(_) => self.jobs.remove(&seq).map(|job| job.request),
                None => self.jobs.get(&seq).map(|job| job.request),
            };
            if let Some(request) = request {
                token(Token { request, finished });
            }
        }
        self.scheduler.take_block_events()
    }

    fn computed(&mut self, seq: SeqId, until: usize) {
        if let Some(job) = self.jobs.get_mut(&seq) {
            job.uncached_tokens = job.prompt_tokens.saturating_sub(until);
        }
    }

    fn measure(&mut self, batch: &StepBatch, took: Duration) {
        let decodes = batch.seqs.iter().filter(|span| span.tokens.len() == 1).count();
        let (prefill, seconds) = (batch.tokens() - decodes, took.as_secs_f64());
        let blend = |mean: Option<f64>, sample: f64| Some(mean.map_or(sample, |mean| mean + BLEND * (sample - mean)));
        if prefill == 0 {
            self.decode_step_s = blend(self.decode_step_s, seconds);
        } else {
            // What the streams would have taken anyway is not the prompts'.
            let own = (seconds - self.decode_step_s.filter(|_| decodes > 0).unwrap_or(0.0)).max(seconds * 0.1);
            if own > 0.0 {
                self.prefill_per_s = blend(self.prefill_per_s, prefill as f64 / own);
            }
        }
    }

    /// What a heartbeat says.
    pub fn load(&self) -> WorkerLoad {
        let stats = self.scheduler.stats();
        WorkerLoad {
            pending_prompt_tokens: self.jobs.values().map(|job| job.uncached_tokens as u64).sum(),
            available_blocks: u32::try_from(stats.free_blocks + stats.cached_blocks).unwrap_or(u32::MAX),
            prefill_tokens_per_s: self.prefill_per_s.unwrap_or(0.0) as f32,
            decode_step_us: self.decode_step_s.map_or(0, |s| (s * 1e6) as u32),
        }
    }

    /// The real scheduler, for its statistics and its self-check.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }
}
