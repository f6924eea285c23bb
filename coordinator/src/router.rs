//! The router's place in the coordinator: names a prompt's blocks, turns what the registry knows of workers into
//! candidates, keeps count of prompt tokens that were placed and not yet computed, and takes the time. The rules are in
//! [`baton_router`].
//!
//! Locks: the router's own is taken after the registry's, never the other way round, and is held for one message of
//! block events (1,024 names from our own workers), one sweep step, or one choice.

use crate::metrics::RouterMetrics;
use crate::registry::{State, Worker};
use baton_gateway::WorkerRole;
use baton_proto::cluster::{self, BlockEvents};
use baton_router::{
    Ask, BlockUpdate, Candidate, Choice, Estimate, Namer, Policy, Prefix, Prefixes, Rates, Role, Router, Seat, Tier,
    Verdict,
};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Instant;

/// Kinds of names computed for one prompt: workers of one model have one weights' digest and block size, or a few while
/// they are being exchanged. Those beyond count as cold.
const KINDS_MAX: usize = 4;
/// Steps of the index's sweep in one tick of the cluster: at most some 10 ms of work in 100 ms while workers that have
/// departed are swept out, and everything is swept within seconds.
const SWEEPS_PER_TICK: usize = 64;

/// What names depend on, beside prompt and salt: model digest and block size.
pub(crate) type Kind = (Vec<u8>, u32);

/// A prompt's blocks as each kind of worker names them.
pub(crate) struct Names(Vec<(Kind, Arc<[u64]>)>);

/// What was found of a prompt in the index.
pub(crate) struct Found<'a>(Vec<(&'a Kind, Prefixes)>);

struct Inner {
    router: Router,
    /// By epoch, which is unique in the cluster.
    seats: HashMap<u64, Seated>,
}

struct Seated {
    seat: Seat,
    /// Uncached prompt tokens placed here whose first token has not come.
    pending_tokens: u64,
}

/// See the module. Cheap to clone: clones are the same router.
#[derive(Clone)]
pub(crate) struct Routing {
    inner: Arc<RwLock<Inner>>,
    namer: Arc<Namer>,
    metrics: RouterMetrics,
}

impl Routing {
    pub(crate) fn new(policy: Policy, metrics: RouterMetrics) -> Self {
        Self {
            inner: Arc::new(RwLock::new(Inner {
                router: Router::new(policy),
                seats: HashMap::new(),
            })),
            namer: Arc::default(),
            metrics,
        }
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A registration stands.
    pub(crate) fn join(&self, epoch: u64) {
        let mut inner = self.write();
        let seat = inner.router.join();
        let seated = Seated {
            seat,
            pending_tokens: 0,
        };
        if let Some(old) = inner.seats.insert(epoch, seated) {
            inner.router.leave(old.seat);
        }
    }

    /// A registration is over.
    pub(crate) fn leave(&self, epoch: u64) {
        let mut inner = self.write();
        if let Some(seated) = inner.seats.remove(&epoch) {
            inner.router.leave(seated.seat);
        }
    }

    /// Takes in what a worker tells of its blocks; true if it must tell everything anew.
    pub(crate) fn block_events(&self, epoch: u64, events: &BlockEvents, now_ms: u64) -> bool {
        let tier = match events.tier() {
            cluster::Tier::Device => Tier::Device,
            cluster::Tier::Host => Tier::Host,
            cluster::Tier::Disk => Tier::Disk,
            cluster::Tier::Object => Tier::Object,
        };
        let update = BlockUpdate {
            number: events.number,
            reset: events.reset,
            tier,
            evicted: &events.evicted,
            stored: events.stored.iter().map(|run| run.names.as_slice()),
        };
        let mut inner = self.write();
        let Some(seat) = inner.seats.get(&epoch).map(|seated| seated.seat) else {
            return false;
        };
        inner.router.apply(seat, update, now_ms) == Verdict::Resync
    }

    /// Gives memory of departed workers back, a little per call.
    pub(crate) fn tick(&self) {
        for _ in 0..SWEEPS_PER_TICK {
            // Requests come in between.
            if !self.write().router.sweep() {
                return;
            }
        }
    }

    /// The kinds of names that these workers use.
    pub(crate) fn kinds<'w>(workers: impl Iterator<Item = &'w Worker>) -> Vec<Kind> {
        let mut kinds: Vec<Kind> = Vec::new();
        for worker in workers {
            let register = &worker.register;
            let known = kinds
                .iter()
                .any(|(digest, size)| *digest == register.model_digest && *size == register.block_size);
            if !known && kinds.len() < KINDS_MAX {
                kinds.push((register.model_digest.to_vec(), register.block_size));
            }
        }
        kinds
    }

    /// Names the full blocks of a prompt for each kind of worker, but for the block with the last token, which is always
    /// computed. Takes none of the router's locks.
    pub(crate) fn names(&self, kinds: Vec<Kind>, salt: &[u8], prompt: &[u32]) -> Names {
        let all_but_last = &prompt[..prompt.len().saturating_sub(1)];
        let named = kinds.into_iter().map(|(digest, size)| {
            let names = match <&[u8; 32]>::try_from(digest.as_slice()) {
                Ok(digest) => self.namer.names(digest, salt, all_but_last, size),
                // A worker that tells no digest is cold.
                Err(_) => Arc::from([]),
            };
            ((digest, size), names)
        });
        Names(named.collect())
    }

    /// What each worker has of the prompt.
    pub(crate) fn look_up<'n>(&self, names: &'n Names, now_ms: u64) -> Found<'n> {
        let inner = self.read();
        let found = names.0.iter().map(|(kind, names)| {
            let mut prefixes = Prefixes::default();
            inner.router.look_up(names, now_ms, &mut prefixes);
            (kind, prefixes)
        });
        Found(found.collect())
    }

    /// Chooses among workers, each with its state and whether to avoid it.
    pub(crate) fn choose(&self, workers: &[Considered<'_>], found: &Found<'_>, ask: &Ask, started: Instant) -> Choice {
        let inner = self.read();
        let candidates: Vec<Candidate<'_>> = workers
            .iter()
            .map(|considered| {
                let worker = considered.worker;
                let seated = inner.seats.get(&worker.epoch);
                let prefix = seated.map_or_else(Prefix::default, |seated| found.of(worker, seated.seat));
                candidate(considered, prefix, seated.map_or(0, |seated| seated.pending_tokens))
            })
            .collect();
        let choice = inner.router.choose(&candidates, ask);
        self.metrics.decided(started.elapsed());
        choice
    }

    /// A request was sent where the choice said. The answer is to be kept until its first token.
    pub(crate) fn placed(
        &self,
        decode: (u64, &Kind),
        prefill: Option<(u64, &Kind)>,
        names: &Names,
        estimate: Estimate,
        now_ms: u64,
    ) -> Pending {
        let mut inner = self.write();
        for (epoch, kind) in std::iter::once(decode).chain(prefill) {
            let Some(seat) = inner.seats.get(&epoch).map(|seated| seated.seat) else {
                continue;
            };
            if let Some(names) = names.of(kind) {
                inner.router.placed(seat, names, estimate.ttft_s, now_ms);
            }
        }
        let computes = prefill.map_or(decode.0, |(epoch, _)| epoch);
        let tokens = estimate.uncached_tokens as u64;
        if let Some(seated) = inner.seats.get_mut(&computes) {
            seated.pending_tokens += tokens;
        }
        drop(inner);
        Pending {
            routing: self.clone(),
            computes,
            tokens,
            remote: prefill.is_some(),
            estimate,
            placed: Instant::now(),
        }
    }

    /// How many cached tokens a request turned out to have.
    pub(crate) fn finished(&self, predicted_cached_tokens: usize, cached_tokens: u32) {
        self.metrics.cached(predicted_cached_tokens, cached_tokens);
    }

    pub(crate) fn metrics(&self) -> &RouterMetrics {
        &self.metrics
    }

    pub(crate) fn stats(&self) -> baton_router::RouterStats {
        self.read().router.stats()
    }
}

impl Names {
    fn of(&self, kind: &Kind) -> Option<&[u64]> {
        let found = self.0.iter().find(|(known, _)| known == kind);
        found.map(|(_, names)| &**names)
    }
}

impl Found<'_> {
    fn of(&self, worker: &Worker, seat: Seat) -> Prefix {
        let register = &worker.register;
        let found = self.0.iter();
        let mut found =
            found.filter(|((digest, size), _)| *digest == register.model_digest && *size == register.block_size);
        found
            .next()
            .map_or_else(Prefix::default, |(_, prefixes)| prefixes.of(seat))
    }
}

/// A worker that may be chosen.
pub(crate) struct Considered<'a> {
    pub(crate) worker: &'a Worker,
    pub(crate) state: State,
    /// It has failed this very request before.
    pub(crate) avoid: bool,
    pub(crate) requests_max: u32,
}

/// What names of `worker` depend on.
pub(crate) fn kind_of(worker: &Worker) -> Kind {
    (worker.register.model_digest.to_vec(), worker.register.block_size)
}

fn candidate<'a>(considered: &Considered<'a>, prefix: Prefix, pending_tokens: u64) -> Candidate<'a> {
    let worker = considered.worker;
    let (register, heartbeat) = (&worker.register, &worker.heartbeat);
    Candidate {
        id: &register.worker_id,
        role: match worker.role {
            WorkerRole::Prefill => Role::Prefill,
            WorkerRole::Decode => Role::Decode,
            WorkerRole::Combined => Role::Combined,
        },
        kv_digest: &register.kv_digest,
        prefix,
        // Heartbeats lag behind what was placed since; what was placed knows nothing of other coordinators.
        streams: worker.assigned.max(heartbeat.running.saturating_add(heartbeat.waiting)),
        prefilling: worker.prefilling,
        pending_prompt_tokens: heartbeat.pending_prompt_tokens.max(pending_tokens),
        available_blocks: heartbeat.free_blocks.saturating_add(heartbeat.cached_blocks),
        total_blocks: register.total_blocks,
        block_size: register.block_size,
        kv_bytes_per_block: register.kv_bytes_per_block,
        rates: Rates {
            prefill_tokens_per_s: heartbeat.prefill_tokens_per_s,
            decode_step_us: heartbeat.decode_step_us,
            transfer_bytes_per_s: heartbeat.transfer_bytes_per_s,
            load_bytes_per_s: load_rates(heartbeat.kv_tiers.as_ref()),
        },
        full: worker.assigned >= considered.requests_max,
        doubtful: considered.state == State::Suspect || considered.avoid,
    }
}

/// Measured loads from host memory, disk and object store.
fn load_rates(tiers: Option<&cluster::KvTiers>) -> [f32; Tier::LOWER] {
    let rate = |usage: Option<cluster::TierUsage>| usage.map_or(0.0, |usage| usage.load_bytes_per_s);
    tiers.map_or([0.0; Tier::LOWER], |tiers| {
        [rate(tiers.host), rate(tiers.disk), rate(tiers.object)]
    })
}

/// A prompt that is being computed somewhere. Dropped at the first token, or when there will be none.
pub(crate) struct Pending {
    routing: Routing,
    /// Epoch of the worker that computes.
    computes: u64,
    tokens: u64,
    remote: bool,
    estimate: Estimate,
    placed: Instant,
}

impl Pending {
    /// The first token came.
    pub(crate) fn first_token(self) {
        let measured_s = self.placed.elapsed().as_secs_f64();
        self.routing.metrics.first_token(self.estimate.ttft_s, measured_s);
        // Released before `self`, whose drop takes the lock again.
        let mut inner = self.routing.write();
        inner
            .router
            .first_token(self.remote, self.estimate.modelled_s, measured_s);
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(seated) = self.routing.write().seats.get_mut(&self.computes) {
            seated.pending_tokens = seated.pending_tokens.saturating_sub(self.tokens);
        }
    }
}
