//! Where requests go, in a simulation: the seam between the simulated cluster and a router, and three simple routers to
//! compare with.
//!
//! A policy sees what a coordinator sees: its own placements at once, workers' block events and loads with a delay. It
//! sees no clock but the time it is told.

use super::SimulationOptions;
use baton_engine::BlockEvents;
use baton_proto::block_hash::BlockHash;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use std::time::Duration;

/// A request to be placed.
#[derive(Debug, Clone, Copy)]
pub struct Ask<'a> {
    /// Virtual time.
    pub now: Duration,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Most tokens of the answer.
    pub output_tokens: usize,
    /// Names of the prompt's whole blocks, in order.
    pub hashes: &'a [BlockHash],
}

/// What the coordinator knows of a worker by itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerView {
    /// Requests placed there and not finished.
    pub requests: usize,
    /// Prompt tokens of requests placed there that have no first token yet.
    pub prompt_tokens_pending: usize,
    /// Blocks of the pool.
    pub total_blocks: usize,
}

/// Chooses workers.
pub trait Policy {
    /// The index of the worker that takes the request. `workers` is never empty.
    fn choose(&mut self, ask: &Ask<'_>, workers: &[WorkerView]) -> usize;

    /// News of the prefix cache of a worker, in order, some time after they happened.
    fn block_events(&mut self, _worker: usize, _events: &BlockEvents) {}

    /// A request's first token has come from `worker`.
    fn first_token(&mut self, _worker: usize, _now: Duration) {}
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
}

impl PolicyKind {
    /// All of them, in the order of the report.
    pub const ALL: [PolicyKind; 3] = [Self::Random, Self::RoundRobin, Self::LeastLoaded];

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Random => "random",
            Self::RoundRobin => "round-robin",
            Self::LeastLoaded => "least-loaded",
        }
    }

    /// A fresh one for such a cluster.
    pub fn build(self, options: &SimulationOptions) -> Box<dyn Policy> {
        match self {
            Self::Random => Box::new(Random(SmallRng::seed_from_u64(options.seed))),
            Self::RoundRobin => Box::new(RoundRobin(0)),
            Self::LeastLoaded => Box::new(LeastLoaded),
        }
    }
}

impl std::str::FromStr for PolicyKind {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| format!("there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

struct Random(SmallRng);

impl Policy for Random {
    fn choose(&mut self, _: &Ask<'_>, workers: &[WorkerView]) -> usize {
        self.0.random_range(0..workers.len())
    }
}

struct RoundRobin(usize);

impl Policy for RoundRobin {
    fn choose(&mut self, _: &Ask<'_>, workers: &[WorkerView]) -> usize {
        self.0 = (self.0 + 1) % workers.len();
        self.0
    }
}

struct LeastLoaded;

impl Policy for LeastLoaded {
    fn choose(&mut self, _: &Ask<'_>, workers: &[WorkerView]) -> usize {
        let least = workers.iter().enumerate().min_by_key(|(_, worker)| worker.requests);
        least.map_or(0, |(index, _)| index)
    }
}
