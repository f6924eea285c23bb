//! Where requests go, in a simulation: the seam between the simulated cluster and a router, and the names of the modes of
//! baton's own.
//!
//! A policy sees what a coordinator sees: its own placements at once, workers' block events and loads with a delay. It
//! sees no clock but the time it is told.

use super::SimulationOptions;
use super::routed::Routed;
use baton_engine::BlockEvents;
use baton_proto::block_hash::BlockHash;
use baton_router::Mode;
use std::time::Duration;

/// A request to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Its number.
    pub request: usize,
    /// Virtual time.
    pub now: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub output_tokens: usize,
    /// Names of the prompt's whole blocks, in order.
    pub hashes: &'a [BlockHash],
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// Index of the worker.
    pub worker: usize,
    /// Prompt tokens it is thought to compute.
    pub uncached_tokens: usize,
}

/// What the coordinator knows of a worker by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerView {
    /// Requests placed there and not finished.
    pub requests: usize,
}

/// What a worker says of itself now and then.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct WorkerLoad {
    /// Prompt tokens that are queued or being computed and are not cached.
    pub pending_prompt_tokens: u64,
    /// Blocks it can give out.
    pub available_blocks: u32,
    /// Prompt tokens computed per second of prefill; 0 where none was.
    pub prefill_tokens_per_s: f32,
    /// Time of a decode step, in microseconds; 0 where none was.
    pub decode_step_us: u32,
}

/// Chooses workers.
pub trait Policy {
    /// Who takes the request. `workers` is never empty.
    fn choose(&mut self, ask: &Ask<'_>, workers: &[WorkerView]) -> Placement;

    /// News of the prefix cache of a worker, in order, some time after they happened.
    fn block_events(&mut self, _worker: usize, _events: &BlockEvents, _now: Duration) {}

    /// A heartbeat.
    fn load(&mut self, _worker: usize, _load: WorkerLoad) {}

    /// The first token of a request has come.
    fn first_token(&mut self, _request: usize, _now: Duration) {}
}

/// The policies there are, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyKind {
    /// Any.
    Random,
    /// The next.
    RoundRobin,
    /// The one with the fewest requests.
    LeastLoaded,
    /// By caches, rates and load.
    CacheAware,
}

impl PolicyKind {
    /// All of them, in the order of the report.
    pub const ALL: [PolicyKind; 4] = [Self::Random, Self::RoundRobin, Self::LeastLoaded, Self::CacheAware];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastLoaded => "least-loaded",
            Self::CacheAware => "cache-aware",
        }
    }

    /// A fresh one for such a cluster.
    pub fn build(self, options: &SimulationOptions) -> Box<dyn Policy> {
        let mode = match self {
            Self::Random => Mode::Random { seed: options.seed },
            Self::RoundRobin => Mode::RoundRobin,
            Self::LeastLoaded => Mode::LeastLoaded,
            Self::CacheAware => Mode::CacheAware,
        };
        Box::new(Routed::new(options, mode))
    }
}

impl std::str::FromStr for PolicyKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}
