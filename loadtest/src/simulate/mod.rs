//! A whole cluster in virtual time: recorded arrivals, a router, and workers with the real scheduler whose steps take as
//! long as a machine's profile says. An hour of sixteen GPUs is simulated in seconds, and equal seeds give equal runs.
//!
//! What is real: the scheduler with its prefix cache, block events, and the routing policy. What is assumed: step times
//! ([`baton_engine::profile`]), a fixed delay until block events reach the router, a network that takes no other time,
//! and workers that both prefill and decode.
//!
//! ```text
//! trace ─▶ Arrival ─▶ policy.choose ─▶ scheduler.submit ─▶ plan ─▶ StepEnd ─▶ commit ─▶ tokens, latencies
//!                        ▲                                            │
//!                        └───────────── News (after a delay) ◀── block events
//! ```

mod policy;
mod report;
mod routed;
mod worker;

pub use policy::{Ask, Placement, Policy, PolicyKind, WorkerLoad, WorkerView};
pub use report::{SimulationReport, table};

use crate::BenchError;
#[cfg(test)]
mod tests;

use crate::trace::Trace;
pub use crate::trace_prompts::CacheBound;
use crate::trace_prompts::Prompts;
use baton_engine::{BlockEvents, MockProfile};
use baton_proto::block_hash;
use baton_proto::block_hash::cache_root;
use report::Tally;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::time::Duration;
use worker::SimWorker;

/// Workers of a simulation at most: far past what one router is asked to serve.
const WORKERS_MAX: usize = 4096;

/// Interval of the workers' reports, as a coordinator asks for by default.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// A cluster and how to load it.
#[derive(Debug, Clone)]
pub struct SimulationOptions {
    /// Number of workers, 1 to 4096.
    pub workers: usize,
    /// What each of them is.
    pub profile: MockProfile,
    /// KV memory of each, in bytes of the profile's machine.
    pub kv_bytes: u64,
    /// Tokens per KV block.
    pub block_size: usize,
    /// Most tokens of one step.
    pub batch_tokens_max: usize,
    /// Most sequences of one step.
    pub seqs_max: usize,
    /// Replay this many times faster than recorded.
    pub speed: f64,
    /// Arrivals and steps are this many times faster, heartbeats and news are not: what a live replay in less time does
    /// (`baton bench --speed` against `baton mock --speed`). Targets shrink with it; times are reported as they then are.
    pub time_scale: f64,
    /// Requests of the trace at most.
    pub requests_max: usize,
    /// Until block events reach the router.
    pub event_delay: Duration,
    /// A request is good if its first token comes within this, ...
    pub ttft_target: Duration,
    /// ... and the mean time between its tokens is at most this.
    pub tpot_target: Duration,
    /// How much cached blocks hold a request to their worker ([`baton_router::Policy::stay`]).
    pub stay: f64,
    /// Seed of the policy.
    pub seed: u64,
}

impl Default for SimulationOptions {
    fn default() -> Self {
        let profile = MockProfile::H100X8_LLAMA3_70B;
        Self {
            workers: 8,
            profile,
            kv_bytes: profile.kv_bytes,
            block_size: 16,
            batch_tokens_max: 2048,
            seqs_max: 256,
            speed: 1.0,
            time_scale: 1.0,
            requests_max: usize::MAX,
            event_delay: Duration::from_millis(10),
            ttft_target: Duration::from_secs(2),
            tpot_target: Duration::from_millis(100),
            stay: baton_router::Policy::default().stay,
            seed: 0,
        }
    }
}

impl SimulationOptions {
    fn check(&self) -> Result<(), BenchError> {
        let wrong = |option, value: String, expected| {
            Err(BenchError::Option {
                option,
                value,
                expected,
            })
        };
        if !(1..=WORKERS_MAX).contains(&self.workers) {
            return wrong(
                "--workers",
                self.workers.to_string(),
                "1 to 4096 workers can be simulated",
            );
        }
        if !(1..=8192).contains(&self.block_size) {
            return wrong(
                "--block-size",
                self.block_size.to_string(),
                "16 is usual, 1 to 8192 are taken",
            );
        }
        if !(self.speed.is_finite() && self.speed > 0.0) {
            return wrong("--speed", self.speed.to_string(), "give a positive factor");
        }
        if !(self.time_scale.is_finite() && self.time_scale > 0.0) {
            return wrong("--time-scale", self.time_scale.to_string(), "give a positive factor");
        }
        if !(0.0..=100.0).contains(&self.stay) {
            return wrong("--stay", self.stay.to_string(), "1 is usual, 0 to 100 are taken");
        }
        Ok(())
    }
}

/// What happens next. Ordered by time, then by order of creation.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Event {
    at: Duration,
    number: u64,
    kind: Kind,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Arrival(usize),
    StepEnd(usize),
    /// All workers report.
    Heartbeats,
    /// Index into the list of events under way.
    News(usize, usize),
}

/// One request under way.
#[derive(Debug, Clone, Copy)]
struct Flight {
    worker: usize,
    arrived: Duration,
    prompt_tokens: usize,
    first: Option<Duration>,
    last: Duration,
    tokens: u32,
}

struct Simulation<'a> {
    options: &'a SimulationOptions,
    trace: &'a Trace,
    policy: &'a mut dyn Policy,
    workers: Vec<SimWorker>,
    views: Vec<WorkerView>,
    flights: Vec<Option<Flight>>,
    prompts: Prompts,
    root: Vec<u8>,
    events: BinaryHeap<Reverse<Event>>,
    news: Vec<Option<BlockEvents>>,
    number: u64,
    now: Duration,
    /// Of the last step.
    end: Duration,
    tally: Tally,
}

/// Runs the trace through the cluster. `progress` is told requests arrived and requests in all, now and then.
pub fn simulate(
    trace: &Trace,
    options: &SimulationOptions,
    policy_name: &str,
    policy: &mut dyn Policy,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<SimulationReport, BenchError> {
    options.check()?;
    let total_blocks = options.profile.blocks(options.kv_bytes, options.block_size);
    let config = baton_engine::SchedulerConfig {
        batch_tokens_max: options.batch_tokens_max,
        prefill_chunk_tokens_max: options.batch_tokens_max,
        seqs_max: options.seqs_max,
        // A trace is replayed whole; refusing would flatter the latencies.
        waiting_max: usize::MAX,
        step_target: baton_engine::STEP_TARGET_DEFAULT.div_f64(options.time_scale),
        ..SimWorker::config(options.block_size, total_blocks)
    };
    let root = cache_root(&config.model_digest, &[]);
    let timing = options.profile.timing();
    let workers: Result<Vec<_>, _> = (0..options.workers)
        .map(|_| SimWorker::new(config.clone(), timing, options.time_scale))
        .collect();
    let workers = workers.map_err(|error| BenchError::Simulation(error.to_string()))?;
    let requests = trace.requests.len().min(options.requests_max);
    let mut simulation = Simulation {
        options,
        trace,
        policy,
        workers,
        views: vec![WorkerView::default(); options.workers],
        flights: vec![None; requests],
        prompts: Prompts::default(),
        root,
        events: BinaryHeap::new(),
        news: Vec::new(),
        number: 0,
        now: Duration::ZERO,
        end: Duration::ZERO,
        tally: Tally::default(),
    };
    simulation.run(requests, progress);
    for worker in &simulation.workers {
        let sound = worker
            .scheduler()
            .check()
            .and_then(|()| match worker.scheduler().is_idle() {
                true => Ok(()),
                false => Err("a request is stuck".to_owned()),
            });
        sound.map_err(|error| BenchError::Simulation(format!("the scheduler is not sound: {error}")))?;
    }
    let bound = CacheBound::of(trace, requests, options.block_size);
    let busy: Vec<f64> = simulation.workers.iter().map(|w| w.busy.as_secs_f64()).collect();
    let end = simulation.end;
    Ok(SimulationReport::new(
        policy_name,
        options,
        bound,
        &simulation.tally,
        end,
        &busy,
    ))
}

impl Simulation<'_> {
    fn run(&mut self, requests: usize, progress: &mut dyn FnMut(usize, usize)) {
        if requests > 0 {
            self.arrive_at(0);
            self.schedule(Duration::ZERO, Kind::Heartbeats);
        }
        while let Some(Reverse(event)) = self.events.pop() {
            self.now = event.at;
            match event.kind {
                Kind::Arrival(request) => {
                    if request % 64 == 0 {
                        progress(request, requests);
                    }
                    if request + 1 < requests {
                        self.arrive_at(request + 1);
                    }
                    self.arrive(request);
                }
                Kind::StepEnd(worker) => self.step_ended(worker),
                Kind::Heartbeats => self.heartbeats(),
                Kind::News(worker, index) => {
                    if let Some(events) = self.news[index].take() {
                        self.policy.block_events(worker, &events, self.now);
                    }
                }
            }
        }
        progress(requests, requests);
    }

    fn schedule(&mut self, at: Duration, kind: Kind) {
        self.number += 1;
        let number = self.number;
        self.events.push(Reverse(Event { at, number, kind }));
    }

    fn arrive_at(&mut self, request: usize) {
        let at = self.trace.requests[request]
            .at
            .div_f64(self.options.speed * self.options.time_scale);
        self.schedule(at, Kind::Arrival(request));
    }

    fn arrive(&mut self, index: usize) {
        let request = &self.trace.requests[index];
        let prompt = self.prompts.tokens(request);
        // As a coordinator does: the block with the last token is computed in any case.
        let named = (prompt.len() - 1) / self.options.block_size * self.options.block_size;
        let hashes = block_hash::chain(&self.root, &prompt[..named], self.options.block_size);
        let (prompt_tokens, output_tokens) = (prompt.len(), request.output_tokens.max(1) as usize);
        let ask = Ask {
            request: index,
            now: self.now,
            prompt_tokens,
            output_tokens,
            hashes: &hashes,
        };
        let Placement {
            worker,
            uncached_tokens,
        } = self.policy.choose(&ask, &self.views);
        if !self.workers[worker].submit(index, prompt.into(), uncached_tokens, output_tokens) {
            self.tally.refused += 1;
            return;
        }
        self.flights[index] = Some(Flight {
            worker,
            arrived: self.now,
            prompt_tokens,
            first: None,
            last: self.now,
            tokens: 0,
        });
        self.views[worker].requests += 1;
        self.start(worker);
    }

    fn heartbeats(&mut self) {
        for (index, worker) in self.workers.iter().enumerate() {
            self.policy.load(index, worker.load());
        }
        // The last one comes when nothing else will.
        if !self.events.is_empty() {
            self.schedule(self.now + HEARTBEAT, Kind::Heartbeats);
        }
    }

    fn start(&mut self, worker: usize) {
        if let Some(took) = self.workers[worker].start() {
            self.schedule(self.now + took, Kind::StepEnd(worker));
        }
    }

    fn step_ended(&mut self, worker: usize) {
        self.end = self.now;
        let (now, options) = (self.now, self.options);
        let (flights, views, tally, policy) = (&mut self.flights, &mut self.views, &mut self.tally, &mut self.policy);
        let events = self.workers[worker].finish(|token| {
            let Some(flight) = &mut flights[token.request] else {
                return;
            };
            match flight.first {
                None => {
                    flight.first = Some(now);
                    tally.ttft.record(now - flight.arrived);
                    policy.first_token(token.request, now);
                }
                Some(_) => tally.itl.record(now - flight.last),
            }
            flight.last = now;
            flight.tokens += 1;
            if let Some(cached) = token.finished {
                let ttft = flight.first.unwrap_or(now) - flight.arrived;
                let tpot = (now - flight.first.unwrap_or(now))
                    .checked_div(flight.tokens - 1)
                    .unwrap_or_default();
                tally.completed += 1;
                tally.good += u64::from(
                    ttft <= options.ttft_target.div_f64(options.time_scale)
                        && tpot <= options.tpot_target.div_f64(options.time_scale),
                );
                tally.prompt_tokens += flight.prompt_tokens as u64;
                tally.cached_tokens += cached as u64;
                tally.output_tokens += u64::from(flight.tokens);
                tally.e2e.record(now - flight.arrived);
                views[flight.worker].requests -= 1;
                flights[token.request] = None;
            }
        });
        if events.reset || !events.events.is_empty() {
            let index = self.news.iter().position(Option::is_none).unwrap_or(self.news.len());
            self.news.resize_with(self.news.len().max(index + 1), || None);
            self.news[index] = Some(events);
            self.schedule(now + options.event_delay, Kind::News(worker, index));
        }
        self.start(worker);
    }
}
