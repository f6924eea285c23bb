//! A virtual cluster behind admission: workers with a first-in-first-out queue, noisy speed and a limit on streams, in
//! steps of virtual time. After every step the invariants, the bound on the queue, and that nobody waits while a worker has
//! room. `BATON_ADMISSION_SEEDS` runs more seeds than the usual few.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use baton_admission::{
    Admission, AdmissionConfig, Ask, Decision, Fleet, Outcome, Outlook, OwnLoad, Prospect, Reason, Targets, Tenant,
    Ticket, Used, WorkerLoad, WorkerRole,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Length of a step of the simulation, and of a decode step.
const STEP: Duration = Duration::from_millis(10);

fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("BATON_ADMISSION_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    0..count.unwrap_or(4)
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    prompt_tokens: u32,
    output_tokens: u32,
    priority: i32,
    targets: Targets,
}

impl Shape {
    fn cost(&self) -> u64 {
        u64::from(self.prompt_tokens) + 2 * u64::from(self.output_tokens)
    }
}

struct Live {
    tenant: &'static str,
    shape: Shape,
    offered: Duration,
    /// Prompt tokens yet to be computed, tokens yet to be generated.
    left: (u32, u32),
}

#[derive(Default)]
struct Worker {
    queue: VecDeque<Ticket>,
    streams: Vec<Ticket>,
    /// Tokens of the speed that were not used up by a whole prompt token.
    credit: f64,
}

#[derive(Debug, Clone, Copy)]
struct Grant {
    tenant: &'static str,
    cost: u64,
    offered: Duration,
    granted: Duration,
}

struct Cluster {
    admission: Admission,
    rng: SmallRng,
    now: Duration,
    workers: Vec<Worker>,
    names: Vec<String>,
    /// True speed, and the share of it that is told.
    tokens_per_s: f64,
    told: f64,
    noise: f64,
    streams_max: usize,
    live: BTreeMap<Ticket, Live>,
    grants: Vec<Grant>,
    refused: Vec<(&'static str, Reason)>,
    /// From the offer on, of those with a target.
    ttfts: Vec<Duration>,
    ended: BTreeMap<&'static str, u64>,
    /// No worker answers.
    nobody: bool,
}

/// The fleet, unless nobody is there.
struct View<'a>(Fleet<'a>, bool);

impl Outlook for View<'_> {
    fn prospect(&self, uncached_tokens: u32, own: &OwnLoad) -> Option<Prospect> {
        if self.1 {
            None
        } else {
            self.0.prospect(uncached_tokens, own)
        }
    }
}

fn view<'a>(cluster: (&'a [Worker], &'a [String], f64, usize, &AdmissionConfig), nobody: bool) -> View<'a> {
    let (workers, names, tokens_per_s, streams_max, config) = cluster;
    let loads = workers.iter().zip(names).map(|(worker, id)| WorkerLoad {
        id,
        role: WorkerRole::Combined,
        streams: worker.streams.len() as u32,
        full: worker.queue.len() + worker.streams.len() >= 2 * streams_max,
        prefill_tokens_per_s: tokens_per_s as f32,
        decode_step: STEP,
    });
    let fleet = Fleet {
        workers: loads.collect(),
        unstarted_max: config.worker_unstarted_max,
        prefill_max: Duration::from_millis(config.worker_prefill_ms_max),
    };
    View(fleet, nobody)
}

macro_rules! outlook {
    ($c:expr) => {
        view(
            (
                &$c.workers,
                &$c.names,
                $c.tokens_per_s * $c.told,
                $c.streams_max,
                $c.admission.config(),
            ),
            $c.nobody,
        )
    };
}

impl Cluster {
    fn new(config: AdmissionConfig, tenants: &[(&str, Tenant)], workers: usize, seed: u64) -> Self {
        let tenants: HashMap<Arc<str>, Tenant> =
            tenants.iter().map(|(name, tenant)| ((*name).into(), *tenant)).collect();
        Self {
            admission: Admission::new(config, tenants),
            rng: SmallRng::seed_from_u64(seed),
            now: Duration::from_secs(1),
            workers: (0..workers).map(|_| Worker::default()).collect(),
            names: (0..workers).map(|i| format!("w{i}")).collect(),
            tokens_per_s: 10_000.0,
            told: 1.0,
            noise: 0.0,
            streams_max: 16,
            live: BTreeMap::new(),
            grants: Vec::new(),
            refused: Vec::new(),
            ttfts: Vec::new(),
            ended: BTreeMap::new(),
            nobody: false,
        }
    }

    fn offer(&mut self, tenant: &'static str, shape: Shape) -> Option<Ticket> {
        let ask = Ask {
            tenant: tenant.into(),
            priority: shape.priority,
            prompt_tokens: shape.prompt_tokens,
            uncached_tokens: None,
            max_tokens: shape.output_tokens.max(1000),
            targets: shape.targets,
        };
        let view = outlook!(self);
        match self.admission.offer(&ask, &view, self.now) {
            Err(refusal) => {
                self.refused.push((tenant, refusal.reason));
                None
            }
            Ok(ticket) => {
                let live = Live {
                    tenant,
                    shape,
                    offered: self.now,
                    left: (shape.prompt_tokens, shape.output_tokens),
                };
                assert!(self.live.insert(ticket, live).is_none(), "a ticket was given twice");
                self.poll();
                Some(ticket)
            }
        }
    }

    /// Until nothing is decided any more: a placement tells more than the promise of one.
    fn poll(&mut self) {
        while self.poll_once() {}
        if self.admission.waiting() > 0 && !self.nobody {
            let prospect = outlook!(self).prospect(1, self.admission.own_load());
            assert!(
                !prospect.expect("workers").room,
                "requests wait while a worker has room"
            );
        }
    }

    fn poll_once(&mut self) -> bool {
        let view = outlook!(self);
        let decisions = self.admission.poll(&view, self.now);
        let decided = !decisions.is_empty();
        for Decision { ticket, outcome } in decisions {
            let live = &self.live[&ticket];
            match outcome {
                Outcome::Granted { waited } => {
                    assert_eq!(waited, self.now - live.offered);
                    self.grants.push(Grant {
                        tenant: live.tenant,
                        cost: live.shape.cost(),
                        offered: live.offered,
                        granted: self.now,
                    });
                    let least = (0..self.workers.len())
                        .min_by_key(|i| (self.workers[*i].queue.len(), self.workers[*i].streams.len()))
                        .expect("workers");
                    self.workers[least].queue.push_back(ticket);
                    let name = &self.names[least];
                    self.admission.placed(ticket, name, name, self.now);
                }
                Outcome::Refused(refusal) => {
                    self.refused.push((live.tenant, refusal.reason));
                    self.live.remove(&ticket);
                }
            }
        }
        self.admission.check().expect("invariants");
        assert!(self.admission.waiting() <= self.admission.config().queue_max);
        decided
    }

    fn end(&mut self, ticket: Ticket, complete: bool) {
        let live = self.live.remove(&ticket).expect("alive");
        let used = Used {
            cached_tokens: 0,
            completion_tokens: live.shape.output_tokens - live.left.1,
            complete,
        };
        self.admission.release(ticket, used, self.now);
        if complete {
            *self.ended.entry(live.tenant).or_default() += live.shape.cost();
        }
    }

    /// A client hangs up, whatever its request does.
    fn hang_up(&mut self) {
        let nth = self.rng.random_range(0..self.live.len());
        let ticket = *self.live.keys().nth(nth).expect("in range");
        let mut granted = false;
        for worker in &mut self.workers {
            let before = worker.queue.len() + worker.streams.len();
            worker.queue.retain(|t| *t != ticket);
            worker.streams.retain(|t| *t != ticket);
            granted |= before != worker.queue.len() + worker.streams.len();
        }
        if granted {
            self.end(ticket, false);
        } else {
            self.live.remove(&ticket);
        }
        // Of no effect on the granted; of none on anything a second time.
        self.admission.cancel(ticket);
        self.admission.cancel(ticket);
        self.admission.release(ticket, Used::default(), self.now);
        self.poll();
    }

    fn step(&mut self) {
        self.now += STEP;
        for at in 0..self.workers.len() {
            let factor = 1.0 + self.noise * self.rng.random_range(-1.0..=1.0);
            self.workers[at].credit += self.tokens_per_s * STEP.as_secs_f64() * factor;
            let streams = std::mem::take(&mut self.workers[at].streams);
            for ticket in streams {
                let live = self.live.get_mut(&ticket).expect("alive");
                live.left.1 -= 1;
                if live.left.1 == 0 {
                    self.end(ticket, true);
                } else {
                    self.workers[at].streams.push(ticket);
                }
            }
            while let Some(&ticket) = self.workers[at].queue.front() {
                let live = self.live.get_mut(&ticket).expect("alive");
                let tokens = live.left.0.min(self.workers[at].credit as u32);
                live.left.0 -= tokens;
                self.workers[at].credit -= f64::from(tokens);
                if live.left.0 > 0 || self.workers[at].streams.len() >= self.streams_max {
                    break;
                }
                self.workers[at].queue.pop_front();
                live.left.1 -= 1;
                if live.shape.targets.ttft.is_some() {
                    self.ttfts.push(self.now - live.offered);
                }
                self.admission.first_token(ticket, self.now);
                if self.live[&ticket].left.1 == 0 {
                    self.end(ticket, true);
                } else {
                    self.workers[at].streams.push(ticket);
                }
            }
            if self.workers[at].queue.is_empty() {
                self.workers[at].credit = 0.0;
            }
        }
        self.poll();
    }

    /// Everything ends, and nothing is left.
    fn drain(mut self) {
        for _ in 0..100_000 {
            if self.live.is_empty() {
                break;
            }
            self.step();
        }
        assert!(self.live.is_empty(), "{} requests never ended", self.live.len());
        assert_eq!(self.admission.waiting(), 0);
        self.admission.check().expect("invariants");
    }

    fn waiting(&self, tenant: &str) -> usize {
        let placed: usize = self
            .workers
            .iter()
            .flat_map(|w| w.queue.iter().chain(&w.streams))
            .filter(|t| self.live[t].tenant == tenant)
            .count();
        self.live.values().filter(|live| live.tenant == tenant).count() - placed
    }
}

fn shape(prompt_tokens: u32, output_tokens: u32) -> Shape {
    Shape {
        prompt_tokens,
        output_tokens,
        priority: 0,
        targets: Targets::default(),
    }
}

const FLOOD: &str = "flood";
const MEEK: &str = "meek";

/// Short queues on the workers, so that shares are decided here.
fn config() -> AdmissionConfig {
    AdmissionConfig {
        queue_max: 300,
        queue_per_tenant_max: 200,
        worker_unstarted_max: 4,
        worker_prefill_ms_max: 100,
        output_tokens_expected: 20,
        ..AdmissionConfig::default()
    }
}

/// The bound of `docs/admission.md`: however much one tenant sends, between another's offer and its grant it is granted no
/// more than two of its own largest requests and one of the other's, in tokens.
#[test]
fn a_flood_costs_others_a_bounded_wait() {
    for seed in seeds() {
        let mut cluster = Cluster::new(config(), &[], 2, seed);
        let (small, large) = (shape(50, 20), shape(800, 20));
        let mut meek: Option<Ticket> = None;
        for _ in 0..3000 {
            while cluster.waiting(FLOOD) < 200 {
                let prompt = cluster.rng.random_range(1..=large.prompt_tokens);
                assert!(
                    cluster.offer(FLOOD, shape(prompt, 20)).is_some(),
                    "{:?}",
                    cluster.refused
                );
            }
            if meek.is_none_or(|ticket| !cluster.live.contains_key(&ticket)) && cluster.rng.random_bool(0.3) {
                meek = cluster.offer(MEEK, small);
                assert!(meek.is_some());
            }
            cluster.step();
        }
        let bound = 2 * large.cost() + small.cost();
        let mine: Vec<Grant> = cluster.grants.iter().filter(|g| g.tenant == MEEK).copied().collect();
        assert!(mine.len() > 50, "{}", mine.len());
        for grant in &mine {
            let between = cluster
                .grants
                .iter()
                .filter(|g| g.tenant == FLOOD && g.granted > grant.offered && g.granted < grant.granted);
            let cost: u64 = between.map(|g| g.cost).sum();
            assert!(
                cost <= bound,
                "seed {seed}: {cost} tokens of the flood went before {grant:?}"
            );
        }
        assert!(cluster.refused.iter().all(|(tenant, _)| *tenant == FLOOD));
        cluster.drain();
    }
}

/// Two tenants that always wait are served by their weights, in tokens that were really used, although nobody knows before
/// how long an answer is and one of them is always guessed wrong at first.
#[test]
fn shares_follow_weights_though_costs_are_guessed() {
    for seed in seeds() {
        let third = Tenant {
            weight: 3,
            ..Tenant::default()
        };
        let mut cluster = Cluster::new(config(), &[("heavy", third)], 2, seed);
        cluster.noise = 0.5;
        for _ in 0..4000 {
            while cluster.waiting("heavy") < 20 {
                let (prompt, output) = (cluster.rng.random_range(1..400), cluster.rng.random_range(1..120));
                cluster.offer("heavy", shape(prompt, output));
            }
            while cluster.waiting("light") < 20 {
                let prompt = cluster.rng.random_range(1..100);
                cluster.offer("light", shape(prompt, 5));
            }
            cluster.step();
        }
        let (heavy, light) = (cluster.ended["heavy"] as f64, cluster.ended["light"] as f64);
        let share = heavy / light;
        assert!(
            (2.7..3.3).contains(&share),
            "seed {seed}: {heavy} to {light} is {share}, not 3"
        );
        cluster.drain();
    }
}

/// A tenant of the lowest priority, under a flood of the highest that others may claim, waits no longer than the steps
/// between them take to age and a few grants, and a request of low priority among its own tenant's likewise.
#[test]
fn nobody_starves() {
    for seed in seeds() {
        let config = AdmissionConfig {
            aging_ms: 200,
            wait_ms_max: 60_000,
            ..config()
        };
        let (aging, steps) = (Duration::from_millis(200), 5);
        let mut cluster = Cluster::new(config, &[], 1, seed);
        let mut low = None;
        let mut tickets = 0;
        for _ in 0..3000 {
            while cluster.waiting(FLOOD) < 50 {
                cluster.offer(FLOOD, shape(100, 5));
            }
            for tenant in [MEEK, FLOOD] {
                if tenant == MEEK || tickets < 20 {
                    let wait = low.is_some_and(|ticket| cluster.live.contains_key(&ticket));
                    if !wait {
                        let shape = Shape {
                            priority: -steps,
                            ..shape(77, 5)
                        };
                        low = cluster.offer(tenant, shape);
                        tickets += 1;
                    }
                }
            }
            cluster.step();
        }
        let meek: Vec<Duration> = cluster
            .grants
            .iter()
            .filter(|g| g.tenant == MEEK)
            .map(|g| g.granted - g.offered)
            .collect();
        assert!(meek.len() > 10, "{}", meek.len());
        let longest = *meek.iter().max().expect("some");
        let limit = aging * steps.unsigned_abs() + Duration::from_millis(200);
        assert!(longest <= limit, "seed {seed}: {longest:?} is over {limit:?}");
        assert!(longest >= aging, "priority had no effect");
        // 77 tokens mark those of low priority among the flood's own.
        let own = cluster.grants.iter().filter(|g| g.tenant == FLOOD && g.cost == 87);
        for grant in own {
            let passed = cluster.grants.iter().filter(|g| {
                g.tenant == FLOOD
                    && g.offered > grant.offered + aging * steps.unsigned_abs()
                    && g.granted < grant.granted
            });
            assert_eq!(
                passed.count(),
                0,
                "seed {seed}: passed by later ones than its priority allows"
            );
        }
        cluster.drain();
    }
}

/// Whatever happens: tenants of any weight and priority, sizes, targets, clients that hang up in any state, workers that all
/// vanish for a while. The checks are in `poll` and `drain`.
#[test]
fn anything_goes_and_nothing_leaks() {
    let tenants: [(&'static str, Tenant); 3] = [
        (
            "a",
            Tenant {
                weight: 5,
                priority_max: 3,
            },
        ),
        (
            "b",
            Tenant {
                weight: 1,
                priority_max: -2,
            },
        ),
        ("c", Tenant::default()),
    ];
    let mut reasons = BTreeMap::new();
    for seed in seeds() {
        let config = AdmissionConfig {
            queue_max: 40,
            queue_per_tenant_max: 25,
            wait_ms_max: 400,
            ..config()
        };
        let mut cluster = Cluster::new(config, &tenants, 3, seed);
        cluster.noise = 0.9;
        for at in 0..2000 {
            cluster.nobody = at % 500 > 420;
            for _ in 0..cluster.rng.random_range(0..6) {
                let tenant = ["a", "b", "c", "d"][cluster.rng.random_range(0..4)];
                let targets = Targets {
                    ttft: cluster
                        .rng
                        .random_bool(0.3)
                        .then(|| Duration::from_millis(cluster.rng.random_range(1..600))),
                    itl: cluster
                        .rng
                        .random_bool(0.2)
                        .then(|| Duration::from_millis(cluster.rng.random_range(1..30))),
                };
                let shape = Shape {
                    prompt_tokens: cluster.rng.random_range(1..1500),
                    output_tokens: cluster.rng.random_range(1..60),
                    priority: cluster.rng.random_range(-200..200),
                    targets,
                };
                cluster.offer(tenant, shape);
            }
            if !cluster.live.is_empty() && cluster.rng.random_bool(0.4) {
                cluster.hang_up();
            }
            cluster.step();
        }
        for (_, reason) in &cluster.refused {
            *reasons.entry(*reason).or_insert(0) += 1;
        }
        assert!(cluster.grants.len() > 500, "{}", cluster.grants.len());
        cluster.nobody = false;
        cluster.drain();
    }
    for reason in [
        Reason::TtftTarget,
        Reason::ItlTarget,
        Reason::TenantShare,
        Reason::WaitTimeout,
        Reason::NoWorker,
    ] {
        assert!(
            reasons.get(&reason).is_some_and(|count| *count > 10),
            "{reason:?} was rare: {reasons:?}"
        );
    }
}

/// Workers tell a speed that is off by a factor: predictions learn it, and most of what is let in meets its target, while
/// more is asked for than can be done.
#[test]
fn targets_are_met_by_those_let_in() {
    for (seed, told) in seeds().flat_map(|seed| [(seed, 0.5), (seed, 1.0), (seed, 2.0)]) {
        let mut cluster = Cluster::new(
            AdmissionConfig {
                worker_prefill_ms_max: 1000,
                worker_unstarted_max: 32,
                ..config()
            },
            &[],
            2,
            seed,
        );
        (cluster.told, cluster.noise, cluster.streams_max) = (told, 0.3, 1000);
        let target = Duration::from_millis(300);
        for _ in 0..4000 {
            for _ in 0..cluster.rng.random_range(0..3) {
                let shape = Shape {
                    targets: Targets {
                        ttft: Some(target),
                        itl: None,
                    },
                    ..shape(cluster.rng.random_range(50..500), 10)
                };
                cluster.offer("t", shape);
            }
            cluster.step();
        }
        let (all, late) = (
            cluster.ttfts.len(),
            cluster.ttfts.iter().filter(|ttft| **ttft > target + target / 4).count(),
        );
        assert!(late * 10 <= all, "seed {seed}, told {told}: {late} of {all} came late");
        // Two workers of 10,000 tokens a second for 40 s; three quarters of that is a good use.
        let tokens: u64 = cluster.ended.values().sum();
        assert!(tokens >= 600_000, "seed {seed}, told {told}: only {tokens} tokens");
        let refused = cluster
            .refused
            .iter()
            .filter(|(_, reason)| *reason == Reason::TtftTarget)
            .count();
        assert!(refused > 500, "seed {seed}, told {told}: {refused}");
        cluster.drain();
    }
}
