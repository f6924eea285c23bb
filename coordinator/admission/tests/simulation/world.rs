//! The virtual cluster: workers, requests and the clock. What must hold is in the tests beside.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use baton_admission::{
    Admission, AdmissionConfig, Ask, Decision, Fleet, Outcome, Outlook, OwnLoad, Prospect, Reason, Targets, Tenant,
    Ticket, Used, WorkerLoad, WorkerRole,
};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Length of a step of the simulation, and of a decode step.
pub const STEP: Duration = Duration::from_millis(10);

pub fn seeds() -> std::ops::Range<u64> {
    let count = std::env::var("BATON_ADMISSION_SEEDS")
        .ok()
        .and_then(|text| text.parse().ok());
    0..count.unwrap_or(4)
}

#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub prompt_tokens: u32,
    pub output_tokens: u32,
    pub priority: i32,
    pub targets: Targets,
}

impl Shape {
    pub fn cost(&self) -> u64 {
        u64::from(self.prompt_tokens) + 2 * u64::from(self.output_tokens)
    }
}

pub struct Live {
    pub tenant: &'static str,
    pub shape: Shape,
    pub offered: Duration,
    /// Prompt tokens yet to be computed, tokens yet to be generated.
    pub left: (u32, u32),
}

#[derive(Default)]
pub struct Worker {
    pub queue: VecDeque<Ticket>,
    pub streams: Vec<Ticket>,
    /// Tokens of the speed that were not used up by a whole prompt token.
    pub credit: f64,
}

#[derive(Debug, Clone, Copy)]
pub struct Grant {
    pub tenant: &'static str,
    pub cost: u64,
    pub offered: Duration,
    pub granted: Duration,
}

pub struct Cluster {
    pub admission: Admission,
    /// Those whose share is not the usual one.
    pub tenants: HashMap<&'static str, Tenant>,
    pub rng: SmallRng,
    pub now: Duration,
    pub workers: Vec<Worker>,
    pub names: Vec<String>,
    /// True speed, and the share of it that is told.
    pub tokens_per_s: f64,
    pub told: f64,
    pub noise: f64,
    pub streams_max: usize,
    pub live: BTreeMap<Ticket, Live>,
    pub grants: Vec<Grant>,
    pub refused: Vec<(&'static str, Reason)>,
    /// From the offer on, of those with a target.
    pub ttfts: Vec<Duration>,
    pub ended: BTreeMap<&'static str, u64>,
    /// No worker answers.
    pub nobody: bool,
}

/// The fleet, unless nobody is there.
pub struct View<'a>(Fleet<'a>, bool);

impl Outlook for View<'_> {
    fn prospect(&self, uncached_tokens: u32, own: &OwnLoad) -> Option<Prospect> {
        if self.1 {
            None
        } else {
            self.0.prospect(uncached_tokens, own)
        }
    }
}

pub fn view<'a>(cluster: (&'a [Worker], &'a [String], f64, usize, &AdmissionConfig), nobody: bool) -> View<'a> {
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
    pub fn new(config: AdmissionConfig, tenants: &[(&'static str, Tenant)], workers: usize, seed: u64) -> Self {
        Self {
            admission: Admission::new(config),
            tenants: tenants.iter().copied().collect(),
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

    pub fn offer(&mut self, tenant: &'static str, shape: Shape) -> Option<Ticket> {
        let ask = Ask {
            tenant: tenant.into(),
            share: self.tenants.get(tenant).copied().unwrap_or_default(),
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
    pub fn poll(&mut self) {
        while self.poll_once() {}
        if self.admission.waiting() > 0 && !self.nobody {
            let prospect = outlook!(self).prospect(1, self.admission.own_load());
            assert!(
                !prospect.expect("workers").room,
                "requests wait while a worker has room"
            );
        }
    }

    pub fn poll_once(&mut self) -> bool {
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

    pub fn end(&mut self, ticket: Ticket, complete: bool) {
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
    pub fn hang_up(&mut self) {
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

    pub fn step(&mut self) {
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
    pub fn drain(mut self) {
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

    pub fn waiting(&self, tenant: &str) -> usize {
        let placed: usize = self
            .workers
            .iter()
            .flat_map(|w| w.queue.iter().chain(&w.streams))
            .filter(|t| self.live[t].tenant == tenant)
            .count();
        self.live.values().filter(|live| live.tenant == tenant).count() - placed
    }
}
