//! Runs workloads on an engine and times them.

use std::time::Instant;

use super::report::median;
use super::{BenchError, BenchPlan, Costs, Figure, Limits, Workload};
use crate::rng;
use crate::sampling::SamplingParams;
use crate::step::{Engine, SeqId, StepBatch, StepSeq};

/// Measures every workload of the plan. `progress(workload, done, total)` counts the steps of one workload, warm-up
/// included.
///
/// # Errors
/// [`BenchError::Plan`] if the engine's context or blocks are too few, [`BenchError::Engine`] if a step fails.
pub fn measure(
    engine: &mut dyn Engine,
    costs: &Costs,
    limits: Option<&Limits>,
    plan: &BenchPlan,
    progress: &mut dyn FnMut(Workload, usize, usize),
) -> Result<Vec<Figure>, BenchError> {
    plan.check(engine.context_length())?;
    let (needed, have) = (
        plan.blocks_needed(engine.geometry().block_size),
        engine.total_blocks() as usize,
    );
    if needed > have {
        return Err(BenchError::Plan(format!(
            "the plan needs {needed} KV blocks and the engine has {have}"
        )));
    }
    let mut figures = Vec::with_capacity(plan.workloads.len());
    for workload in &plan.workloads {
        let mut run = Run::new(engine, plan, *workload, progress);
        let seconds = match *workload {
            Workload::Prefill { tokens } => run.prefill(tokens)?,
            Workload::Decode { depth, .. } => run.decode(depth)?,
        };
        figures.push(summarise(*workload, plan, costs, limits, seconds));
    }
    Ok(figures)
}

/// The work of one repeat over the seconds each took.
fn summarise(
    workload: Workload,
    plan: &BenchPlan,
    costs: &Costs,
    limits: Option<&Limits>,
    seconds: Vec<f64>,
) -> Figure {
    let (tokens, steps, operations, bytes) = match workload {
        Workload::Prefill { tokens } => {
            let n = tokens as u64;
            let operations = costs.operations(n, n * (n + 1) / 2, 1);
            (tokens, tokens.div_ceil(plan.chunk_tokens), operations, None)
        }
        Workload::Decode { batch, depth } => {
            let (steps, batch, depth) = (plan.decode_tokens as u64, batch as u64, depth as u64);
            let tokens = steps * batch;
            // Step i of a sequence attends to depth + i positions before it and to itself.
            let pairs = batch * (steps * depth + steps * (steps + 1) / 2);
            let bytes = (steps * costs.weight_bytes) as f64 + pairs as f64 * costs.kv_bytes_per_token as f64;
            let operations = costs.operations(tokens, pairs, tokens);
            (tokens as usize, plan.decode_tokens, operations, Some(bytes))
        }
    };
    let typical = median(&seconds);
    let gb_per_s = bytes.map(|bytes| bytes / typical / 1e9);
    let gop_per_s = operations / typical / 1e9;
    let peak = limits.and_then(|limits| limits.best_gop_per_s(&costs.arithmetic));
    Figure {
        name: workload.to_string(),
        workload,
        tokens_per_s: tokens as f64 / typical,
        step_ms: 1e3 * typical / steps as f64,
        bytes_per_step: bytes.map(|bytes| bytes / steps as f64),
        gb_per_s,
        memory_fraction: gb_per_s
            .zip(limits)
            .map(|(rate, limits)| rate / limits.memory_gb_per_s()),
        operations_per_token: operations / tokens as f64,
        gop_per_s,
        arithmetic_fraction: peak.map(|peak| gop_per_s / peak),
        samples_tokens_per_s: seconds.iter().map(|s| tokens as f64 / s).collect(),
    }
}

/// One workload on an engine.
struct Run<'a> {
    engine: &'a mut dyn Engine,
    plan: &'a BenchPlan,
    workload: Workload,
    progress: &'a mut dyn FnMut(Workload, usize, usize),
    done: usize,
    total: usize,
    batch: usize,
    block_size: usize,
    /// Last token of each sequence.
    last: Vec<u32>,
}

impl<'a> Run<'a> {
    fn new(
        engine: &'a mut dyn Engine,
        plan: &'a BenchPlan,
        workload: Workload,
        progress: &'a mut dyn FnMut(Workload, usize, usize),
    ) -> Self {
        let chunks = |tokens: usize| tokens.div_ceil(plan.chunk_tokens);
        let (batch, total) = match workload {
            Workload::Prefill { tokens } => (1, (1 + plan.repeats) * chunks(tokens)),
            Workload::Decode { batch, depth } => {
                (batch, batch * chunks(depth) + (1 + plan.repeats) * plan.decode_tokens)
            }
        };
        progress(workload, 0, total);
        let block_size = engine.geometry().block_size;
        let mut run = Run {
            engine,
            plan,
            workload,
            progress,
            done: 0,
            total,
            batch,
            block_size,
            last: Vec::new(),
        };
        run.last = (0..batch).map(|seq| run.token(seq, 0)).collect();
        run
    }

    /// Seconds of each repeat.
    fn prefill(&mut self, tokens: usize) -> Result<Vec<f64>, BenchError> {
        self.repeat(|run| run.fill(0, tokens, true))
    }

    /// Seconds of each repeat: all overwrite the same positions behind the same beginning.
    fn decode(&mut self, depth: usize) -> Result<Vec<f64>, BenchError> {
        for seq in 0..self.batch {
            self.fill(seq, depth, false)?;
        }
        self.repeat(|run| {
            for step in 0..run.plan.decode_tokens {
                let spans = (0..run.batch).map(|seq| run.span(seq, depth + step, vec![run.last[seq]], true));
                run.step(spans.collect())?;
            }
            Ok(())
        })
    }

    fn repeat(&mut self, work: impl Fn(&mut Self) -> Result<(), BenchError>) -> Result<Vec<f64>, BenchError> {
        work(self)?;
        let mut seconds = Vec::with_capacity(self.plan.repeats);
        for _ in 0..self.plan.repeats {
            let start = Instant::now();
            work(self)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        Ok(seconds)
    }

    /// Computes the first `tokens` positions of a sequence, chunk by chunk; samples after the last if asked to.
    fn fill(&mut self, seq: usize, tokens: usize, sample: bool) -> Result<(), BenchError> {
        let mut start = 0;
        while start < tokens {
            let end = tokens.min(start + self.plan.chunk_tokens);
            let chunk = (start..end).map(|position| self.token(seq, position)).collect();
            let span = self.span(seq, start, chunk, sample && end == tokens);
            self.step(vec![span])?;
            start = end;
        }
        Ok(())
    }

    fn span(&self, seq: usize, start_pos: usize, tokens: Vec<u32>, sample: bool) -> StepSeq {
        let blocks = (start_pos + tokens.len()).div_ceil(self.block_size);
        StepSeq {
            seq: SeqId(seq as u64),
            tokens,
            start_pos,
            // Sequences take turns in the arena, as those that grow side by side do.
            blocks: (0..blocks).map(|block| (block * self.batch + seq) as u32).collect(),
            sample: sample.then_some(SamplingParams::GREEDY),
            shaping: None,
        }
    }

    fn step(&mut self, seqs: Vec<StepSeq>) -> Result<(), BenchError> {
        let sampled = self.engine.step(&StepBatch { seqs }, &mut |_| {})?;
        for (last, token) in self.last.iter_mut().zip(sampled) {
            // A model of random weights may overflow; its speed is the same.
            *last = token.unwrap_or(*last);
        }
        self.done += 1;
        (self.progress)(self.workload, self.done, self.total);
        Ok(())
    }

    fn token(&self, seq: usize, position: usize) -> u32 {
        let uniform = rng::uniform(self.plan.seed ^ ((seq as u64) << 32), position as u64);
        (uniform * self.engine.vocab_size() as f64) as u32
    }
}
