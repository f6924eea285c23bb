//! A soak of the engine: the real scheduler and the real CPU engine under random load for minutes, watched.
//!
//! `cargo run --release -p baton-engine --example soak -- --minutes 10 [--threads N] [--seed S] [--model DIR]`
//! (the demo model unless told otherwise).
//!
//! Load: bursts and lulls of requests of three tenants with shared prefixes, short and long, greedy and sampled; cancels at
//! any point; prefill-only requests whose blocks are held for a while; remote fills that fail; a pool so small that
//! sequences are preempted all the time. Checked:
//! - after every step the scheduler's invariants, block accounting among them, and that at idle no block is held;
//! - of sampled requests, cancelled ones too, that the tokens are those of a run alone, in one piece, without cache (P1);
//! - every second that resident memory has not grown since the warm-up (a fifth of the time, at least 30 seconds);
//! - that the load did reach what it is meant to: preemptions, cache hits, cancels.
//!
//! Prints a line every ten seconds and a verdict; ends with a status other than 0 on the first failure.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use baton_engine::{
    Engine, FinishReason, ModelEngine, Output, PrefillRequest, Request, SamplingParams, Scheduler, SchedulerConfig,
    SeqId,
};
use baton_model::{LoadOptions, ModelConfig, ModelFiles};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const BLOCK_SIZE: usize = 16;
/// Room for about six prompts of the load's middling length.
const BLOCKS: u32 = 96;
/// What resident memory may gain after the warm-up: the allocator's own unrest, far below any leak of minutes.
const GROWTH_BYTES_MAX: usize = 8 << 20;
/// Finished requests that wait to be run alone; more are let go unchecked.
const UNCHECKED_MAX: usize = 32;

/// Requests run alone every second: about a tenth of the time.
const CHECKS_PER_SECOND: usize = 4;
/// The warm-up is a fifth of the time, and at least this long.
const WARM_UP_MIN: Duration = Duration::from_secs(30);

type Failure = String;

struct Live {
    request: Request,
    tokens: Vec<u32>,
}

struct Soak {
    config: SchedulerConfig,
    scheduler: Scheduler,
    engine: ModelEngine,
    /// Runs requests alone.
    reference: ModelEngine,
    rng: SmallRng,
    stems: Vec<Vec<u32>>,
    live: BTreeMap<SeqId, Live>,
    /// Step at which a transport lets go: fills fail, pushes and drains are released.
    transports: BTreeMap<SeqId, u64>,
    unchecked: VecDeque<(Live, FinishReason)>,
    step: u64,
    ended: u64,
    cancelled: u64,
    refused: u64,
    checked: u64,
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|at| args.get(at + 1));
    let number = |name: &str, default: f64| option(name).and_then(|v| v.parse().ok()).unwrap_or(default);
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/model");
    let model = option("--model").map_or(demo, PathBuf::from);
    let minutes = number("--minutes", 10.0);
    let (threads, seed) = (number("--threads", 2.0) as usize, number("--seed", 1.0) as u64);
    println!("soak: {minutes} minutes, {threads} threads, seed {seed}, {BLOCKS} blocks of {BLOCK_SIZE}");
    let outcome = Soak::new(&model, threads, seed).and_then(|soak| soak.run(Duration::from_secs_f64(minutes * 60.0)));
    match outcome {
        Ok(()) => {
            println!("PASSED");
            ExitCode::SUCCESS
        }
        Err(failure) => {
            println!("FAILED: {failure}");
            ExitCode::FAILURE
        }
    }
}

impl Soak {
    fn new(model: &Path, threads: usize, seed: u64) -> Result<Self, Failure> {
        let files = ModelFiles::open(model).map_err(text)?;
        let load = || {
            let config = ModelConfig::from_dir(model).map_err(text)?;
            ModelEngine::load(&files, config, BLOCK_SIZE, BLOCKS, &LoadOptions::threads(threads), &()).map_err(text)
        };
        let (engine, reference) = (load()?, load()?);
        let config = SchedulerConfig {
            batch_tokens_max: 256,
            prefill_chunk_tokens_max: 256,
            seqs_max: 16,
            waiting_max: 64,
            // The demo model is quick: a target that does cut its chunks.
            step_target: Duration::from_millis(5),
            ..SchedulerConfig::new(BLOCK_SIZE, BLOCKS, engine.context_length(), engine.vocab_size())
        };
        let mut rng = SmallRng::seed_from_u64(seed);
        let vocab = config.vocab_size as u32;
        let stems = (0..2)
            .map(|_| (0..600).map(|_| rng.random_range(0..vocab)).collect())
            .collect();
        Ok(Soak {
            scheduler: Scheduler::new(config.clone()).map_err(text)?,
            config,
            engine,
            reference,
            rng,
            stems,
            live: BTreeMap::new(),
            transports: BTreeMap::new(),
            unchecked: VecDeque::new(),
            step: 0,
            ended: 0,
            cancelled: 0,
            refused: 0,
            checked: 0,
        })
    }

    fn run(mut self, time: Duration) -> Result<(), Failure> {
        let start = Instant::now();
        let (mut second, mut warm_bytes) = (0, 0);
        while start.elapsed() < time {
            // Twelve seconds of load, then a lull until all is done.
            if start.elapsed().as_secs() % 16 < 12 {
                self.arrive();
            } else if self.scheduler.is_idle() {
                self.at_idle()?;
                std::thread::sleep(Duration::from_millis(20));
            }
            self.turn()?;
            if start.elapsed().as_secs() > second {
                second = start.elapsed().as_secs();
                let bytes = resident_bytes();
                let warming = start.elapsed() < (time / 5).max(WARM_UP_MIN);
                if warming {
                    warm_bytes = warm_bytes.max(bytes);
                } else if bytes > warm_bytes + GROWTH_BYTES_MAX {
                    return Err(format!("resident memory grew from {warm_bytes} to {bytes} bytes"));
                }
                for _ in 0..CHECKS_PER_SECOND {
                    self.check_one()?;
                }
                if second.is_multiple_of(10) {
                    self.report(second, bytes, warming);
                }
            }
        }
        while !self.scheduler.is_idle() {
            self.turn()?;
        }
        self.at_idle()?;
        while !self.unchecked.is_empty() {
            self.check_one()?;
        }
        self.report(start.elapsed().as_secs(), resident_bytes(), false);
        let stats = self.scheduler.stats();
        let reached = [stats.preemptions, stats.cached_tokens, self.cancelled, self.checked];
        match reached.iter().all(|count| *count > 10) {
            true => Ok(()),
            false => Err(format!("the load was too tame to show anything: {stats:?}")),
        }
    }

    fn report(&self, second: u64, bytes: usize, warming: bool) {
        let s = self.scheduler.stats();
        println!(
            "{second:4} s: {} steps, {} ended, {} cancelled, {} refused, {} checked; {} preemptions, {} of {} prompt tokens cached, \
             {} generated; running {}, waiting {}, blocks {} free {} held {} cached; {:.1} MiB resident{}",
            s.steps,
            self.ended,
            self.cancelled,
            self.refused,
            self.checked,
            s.preemptions,
            s.cached_tokens,
            s.prompt_tokens,
            s.generation_tokens,
            s.running,
            s.waiting,
            s.free_blocks,
            s.held_blocks,
            s.cached_blocks,
            bytes as f64 / f64::from(1 << 20),
            if warming { ", warming up" } else { "" },
        );
    }

    fn request(&mut self) -> Request {
        let rng = &mut self.rng;
        let len = match rng.random_range(0..10) {
            0 => rng.random_range(500..1000),
            1..=3 => rng.random_range(150..400),
            _ => rng.random_range(8..100),
        };
        let shared = if rng.random_bool(0.6) {
            rng.random_range(0..=len.min(600))
        } else {
            0
        };
        let mut prompt = self.stems[rng.random_range(0..2)][..shared].to_vec();
        prompt.extend((shared..len).map(|_| rng.random_range(0..self.config.vocab_size as u32)));
        let sampling = match rng.random_range(0..3) {
            0 => Ok(SamplingParams::GREEDY),
            1 => SamplingParams::new(1.0, 0, 0.95, rng.random()),
            _ => SamplingParams::new(0.7, 40, 1.0, rng.random()),
        };
        Request {
            prompt: prompt.into(),
            max_tokens: rng.random_range(1..400),
            sampling: sampling.unwrap_or(SamplingParams::GREEDY),
            shaping: None,
            stop_token_ids: vec![2],
            cache_salt: vec![rng.random_range(0..3)],
            remote_prefill: rng.random_bool(0.1),
            priority: rng.random_range(-2..=2),
        }
    }

    /// What may come in before a step: requests, and cancels.
    fn arrive(&mut self) {
        if self.rng.random_bool(0.06) {
            for _ in 0..self.rng.random_range(1..4) {
                let request = self.request();
                match self.scheduler.submit(request.clone()) {
                    Ok(id) => drop(self.live.insert(
                        id,
                        Live {
                            request,
                            tokens: Vec::new(),
                        },
                    )),
                    Err(_) => self.refused += 1,
                }
            }
        }
        if self.rng.random_bool(0.01) {
            let Request {
                prompt,
                sampling,
                cache_salt,
                ..
            } = self.request();
            let request = PrefillRequest {
                prompt,
                sampling,
                shaping: None,
                cache_salt,
                skip_tokens: 0,
                priority: 0,
            };
            self.refused += u64::from(self.scheduler.submit_prefill(request).is_err());
        }
        if self.rng.random_bool(0.02) && !self.live.is_empty() {
            let nth = self.rng.random_range(0..self.live.len());
            if let Some(id) = self.live.keys().nth(nth).copied()
                && let Some(cancelled) = self.scheduler.cancel(id)
            {
                if cancelled.draining {
                    self.lend(id);
                }
                self.cancelled += 1;
                self.end(id, FinishReason::Cancelled);
            }
        }
    }

    fn lend(&mut self, id: SeqId) {
        let due = self.step + self.rng.random_range(0..60);
        self.transports.entry(id).or_insert(due);
    }

    fn turn(&mut self) -> Result<(), Failure> {
        self.step += 1;
        let due: Vec<SeqId> = self
            .transports
            .iter()
            .filter(|t| *t.1 <= self.step)
            .map(|t| *t.0)
            .collect();
        for id in due {
            self.transports.remove(&id);
            if !self.scheduler.release(id) && !self.scheduler.fill_failed(id) {
                return Err(format!("{id} was lent out, but there is nothing to give back"));
            }
        }
        let plan = self.scheduler.plan();
        plan.fills.iter().for_each(|fill| self.lend(fill.seq));
        if !plan.batch.is_empty() {
            let started = Instant::now();
            let sampled = self.engine.step(&plan.batch, &mut |_| {}).map_err(text)?;
            self.scheduler.observe_step(&plan.batch, started.elapsed());
            for output in self.scheduler.commit(&plan.batch, &sampled) {
                self.take(output)?;
            }
        }
        self.scheduler.check()?;
        let stats = self.scheduler.stats();
        match stats.free_blocks + stats.held_blocks + stats.cached_blocks == stats.total_blocks {
            true => Ok(()),
            false => Err(format!("blocks do not add up: {stats:?}")),
        }
    }

    fn take(&mut self, output: Output) -> Result<(), Failure> {
        if let Some(live) = self.live.get_mut(&output.seq) {
            live.tokens.extend(&output.tokens);
        }
        match output.finish.map(|finish| (finish.reason, finish.error)) {
            None => {}
            Some((FinishReason::Error, error)) => return Err(format!("{}: {error}", output.seq)),
            Some((FinishReason::Prefilled, _)) => self.lend(output.seq),
            Some((reason, _)) => self.end(output.seq, reason),
        }
        Ok(())
    }

    fn end(&mut self, id: SeqId, reason: FinishReason) {
        self.ended += 1;
        if let Some(live) = self.live.remove(&id)
            && self.unchecked.len() < UNCHECKED_MAX
        {
            self.unchecked.push_back((live, reason));
        }
    }

    fn at_idle(&self) -> Result<(), Failure> {
        let stats = self.scheduler.stats();
        match stats.held_blocks == 0 && self.live.is_empty() && self.transports.is_empty() {
            true => Ok(()),
            false => Err(format!("idle, but something is left: {stats:?}")),
        }
    }

    /// Runs one ended request alone, in one piece, without cache.
    fn check_one(&mut self) -> Result<(), Failure> {
        let Some((live, reason)) = self.unchecked.pop_front() else {
            return Ok(());
        };
        let config = SchedulerConfig {
            prefix_cache: false,
            batch_tokens_max: self.config.context_length + 1,
            prefill_chunk_tokens_max: self.config.context_length,
            step_target: Duration::ZERO,
            ..self.config.clone()
        };
        let mut alone = Scheduler::new(config).map_err(text)?;
        let request = Request {
            remote_prefill: false,
            ..live.request
        };
        alone.submit(request).map_err(text)?;
        let (mut tokens, mut ends) = (Vec::new(), None);
        while !alone.is_idle() {
            let plan = alone.plan();
            let sampled = self.reference.step(&plan.batch, &mut |_| {}).map_err(text)?;
            for output in alone.commit(&plan.batch, &sampled) {
                tokens.extend(output.tokens);
                ends = output.finish.map(|finish| finish.reason).or(ends);
            }
        }
        self.checked += 1;
        let same = match reason {
            FinishReason::Cancelled => tokens.starts_with(&live.tokens),
            _ => tokens == live.tokens && ends == Some(reason),
        };
        match same {
            true => Ok(()),
            false => Err(format!(
                "{:?} ({reason:?}), but alone {tokens:?} ({ends:?})",
                live.tokens
            )),
        }
    }
}

fn text(error: impl ToString) -> Failure {
    error.to_string()
}

/// Resident memory of this process; 0 where /proc does not say.
fn resident_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches(" kB").parse::<usize>().ok());
    kib.unwrap_or(0) * 1024
}
