//! The state machine of admission.
//!
//! ```text
//! offer ──▶ Waiting ──poll: next, and a worker has room──▶ Granted ──placed──▶ on a worker ──first_token──▶ streaming
//!   │          ├──poll: its time is up──▶ (refused)           │                   │                          │
//!   │          ├──another tenant's offer displaces it──▶ (refused)                │                          │
//!   │          └──cancel──▶ (gone)                            └───────────────────┴────────release───────────┴──▶ (gone)
//!   └──▶ (refused)
//! ```
//!
//! # Rules
//!
//! - **Refused at the door**: nobody serves the model; the predicted time to the first token, queue included, or between
//!   tokens, misses the target; the tenant's or the whole queue is full; the wait would by estimate be more than twice
//!   what is allowed.
//! - **Granted** in the order of [`fair_queue`](crate::fair_queue), as long as the [`Outlook`] says that a worker has room.
//!   Nothing is held back while there is room, whoever asks: a tenant alone may use everything.
//! - **Bounded**: `queue_max` waiting, `queue_per_tenant_max` of them of one tenant. To a full queue a tenant is let in
//!   that has less waiting, for its weight, than another: whose last request is refused in its place.
//! - **Time is up** after `wait_ms_max`, or when the request could no longer meet its target if it went at once.
//! - **Charged** is what a request is expected to cost, uncached prompt tokens and `output_token_cost` for each token of a
//!   usual answer of its tenant; when it ends, what it did cost.
//!
//! # Invariants ([`Admission::check`])
//!
//! A waiting ticket is in the queue once and has one deadline, a granted one has neither; what is counted as on its way to
//! a first token is the sum over the granted ones without one; nothing is left of a ticket that is over.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use crate::ask::{Ask, RETRY_AFTER_MAX, Reason, Refusal, Ticket, Used};
use crate::config::AdmissionConfig;
use crate::estimate::{Correction, Habits, Rate};
use crate::fair_queue::FairQueue;
use crate::outlook::{Outlook, Prospect};
use crate::own_load::{OwnLoad, Stage};

/// Advised where nothing is known: about a short request's time.
const RETRY_AFTER_UNKNOWN: Duration = Duration::from_secs(1);
/// An estimated wait is believed, and refused for, when it is this many times what is allowed.
const HOPELESS: u32 = 2;

/// See the module.
#[derive(Debug)]
pub struct Admission {
    config: AdmissionConfig,
    queue: FairQueue,
    requests: HashMap<Ticket, Request>,
    deadlines: BTreeSet<(Duration, Ticket)>,
    own: OwnLoad,
    correction: Correction,
    /// Cost granted per second while requests wait.
    drain: Rate,
    /// Requests ended per second while some run.
    ends: Rate,
    running: usize,
    next: u64,
    /// Decided outside of a poll; told by the next one.
    displaced: Vec<Decision>,
}

#[derive(Debug)]
struct Request {
    tenant: Arc<str>,
    prompt_tokens: u32,
    uncached_tokens: u32,
    cost: u64,
    offered: Duration,
    ttft_target: Option<Duration>,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting {
        deadline: Duration,
    },
    Granted {
        at: Duration,
        /// Time to the first token, before correction; until it came.
        predicted: Option<Duration>,
        stage: Stage,
    },
}

/// What was decided of a waiting request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Decision {
    /// Whose.
    pub ticket: Ticket,
    /// What.
    pub outcome: Outcome,
}

/// See [`Decision`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It is to be placed now. Told to [`Admission::placed`], [`Admission::first_token`] and [`Admission::release`].
    Granted {
        /// How long it waited.
        waited: Duration,
    },
    /// It is over.
    Refused(Refusal),
}

/// A first token, beside what was predicted of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FirstToken {
    /// From the grant on, correction included.
    pub predicted: Duration,
    /// The same, measured.
    pub measured: Duration,
}

impl Admission {
    /// With an empty queue.
    pub fn new(config: AdmissionConfig) -> Self {
        Self {
            queue: FairQueue::new(config.aging()),
            config,
            requests: HashMap::new(),
            deadlines: BTreeSet::new(),
            own: OwnLoad::default(),
            correction: Correction::new(),
            drain: Rate::default(),
            ends: Rate::default(),
            running: 0,
            next: 0,
            displaced: Vec::new(),
        }
    }

    /// The settings.
    pub fn config(&self) -> &AdmissionConfig {
        &self.config
    }

    /// Requests that wait.
    pub fn waiting(&self) -> usize {
        self.queue.len()
    }

    /// What is on its way to a first token, for an [`Outlook`] asked outside of a decision.
    pub fn own_load(&self) -> &OwnLoad {
        &self.own
    }

    /// Takes a request into the queue, or refuses it. [`poll`](Self::poll) next: it may be granted at once.
    pub fn offer(&mut self, ask: &Ask, outlook: &impl Outlook, now: Duration) -> Result<Ticket, Refusal> {
        self.advance(now);
        let expected = self.config.output_tokens_expected;
        let flow = self.queue.flow_or_new(&ask.tenant, || Habits::new(expected));
        let Some(flow) = flow else {
            return Err(self.refusal(Reason::QueueFull, &ask.tenant));
        };
        flow.tenant = ask.share.bounded();
        let uncached_tokens = match ask.uncached_tokens {
            Some(tokens) => tokens.clamp(1, ask.prompt_tokens.max(1)),
            None => flow.habits.uncached_tokens(ask.prompt_tokens),
        };
        let output_tokens = flow.habits.output_tokens(ask.max_tokens);
        let waiting = flow.waiting();
        let cost = self.cost(uncached_tokens, output_tokens);

        let Some(prospect) = outlook.prospect(uncached_tokens, &self.own) else {
            return Err(self.refusal(Reason::NoWorker, &ask.tenant));
        };
        let targets = self.config.targets(ask.targets);
        if let (Some(target), Some(itl)) = (targets.itl, prospect.itl)
            && itl > target
        {
            return Err(self.too_slow(target, itl, prospect.streams));
        }
        let wait = if self.queue.is_empty() && prospect.room {
            Duration::ZERO
        } else {
            self.wait(&ask.tenant, cost).unwrap_or_default()
        };
        let ttft = prospect.ttft.map(|ttft| self.correction.apply(ttft));
        if let (Some(target), Some(ttft)) = (targets.ttft, ttft) {
            let expected = wait.saturating_add(ttft);
            if expected > target {
                return Err(too_late(target, expected));
            }
        }
        if waiting >= self.config.queue_per_tenant_max {
            return Err(self.refusal(Reason::TenantShare, &ask.tenant));
        }
        let wait_max = self.config.wait_max();
        if wait > wait_max.saturating_mul(HOPELESS) {
            return Err(self.refusal(Reason::WaitTimeout, &ask.tenant));
        }
        if self.queue.len() >= self.config.queue_max {
            let Some(displaced) = self.queue.displaced_by(&ask.tenant) else {
                return Err(self.refusal(Reason::QueueFull, &ask.tenant));
            };
            self.refuse(displaced, Reason::TenantShare);
        }

        let ticket = Ticket(self.next);
        self.next += 1;
        self.queue.push(&ask.tenant, ticket, ask.priority, cost, now);
        let allowed = targets.ttft.map_or(wait_max, |target| {
            wait_max.min(target.saturating_sub(ttft.unwrap_or_default()))
        });
        let deadline = now.saturating_add(allowed);
        self.deadlines.insert((deadline, ticket));
        let request = Request {
            tenant: ask.tenant.clone(),
            prompt_tokens: ask.prompt_tokens,
            uncached_tokens,
            cost,
            offered: now,
            ttft_target: targets.ttft,
            state: State::Waiting { deadline },
        };
        self.requests.insert(ticket, request);
        Ok(ticket)
    }

    /// Decides what can be decided now. To be called after everything that may change it: an offer, a first token, an
    /// end, news of the workers, and every now and then for time itself. O(tenants) per decision; nothing while nobody waits.
    pub fn poll(&mut self, outlook: &impl Outlook, now: Duration) -> Vec<Decision> {
        self.advance(now);
        let mut decisions = std::mem::take(&mut self.displaced);
        self.grant(outlook, now, &mut decisions);
        // After the grants: who can go now shall not be told that it is too late.
        while let Some(&(deadline, ticket)) = self.deadlines.first()
            && deadline <= now
        {
            let request = &self.requests[&ticket];
            let reason = if outlook.prospect(request.uncached_tokens, &self.own).is_none() {
                Reason::NoWorker
            } else if deadline < request.offered.saturating_add(self.config.wait_max()) {
                Reason::TtftTarget
            } else {
                Reason::WaitTimeout
            };
            self.refuse(ticket, reason);
        }
        decisions.append(&mut self.displaced);
        decisions
    }

    fn grant(&mut self, outlook: &impl Outlook, now: Duration, decisions: &mut Vec<Decision>) {
        while let Some(ticket) = self.queue.first(now) {
            let request = &self.requests[&ticket];
            let Some(prospect) = outlook.prospect(request.uncached_tokens, &self.own) else {
                return;
            };
            if !prospect.room {
                return;
            }
            let waited = now.saturating_sub(request.offered);
            if let Some((target, expected)) = self.misses(request, waited, prospect) {
                let refusal = too_late(target, expected);
                self.remove_waiting(ticket);
                self.requests.remove(&ticket);
                decisions.push(Decision {
                    ticket,
                    outcome: Outcome::Refused(refusal),
                });
                continue;
            }
            self.remove_waiting(ticket);
            let Some(request) = self.requests.get_mut(&ticket) else {
                return;
            };
            if !waited.is_zero() {
                self.drain.count(request.cost);
            }
            self.queue.charge(&request.tenant, request.cost, now);
            self.running += 1;
            request.state = State::Granted {
                at: now,
                predicted: prospect.ttft,
                stage: self.own.granted(request.uncached_tokens),
            };
            decisions.push(Decision {
                ticket,
                outcome: Outcome::Granted { waited },
            });
        }
    }

    /// Target and expectation of a request that would miss the one if it went now.
    fn misses(&self, request: &Request, waited: Duration, prospect: Prospect) -> Option<(Duration, Duration)> {
        let target = request.ttft_target?;
        let expected = waited.saturating_add(self.correction.apply(prospect.ttft?));
        (expected > target).then_some((target, expected))
    }

    /// A granted request is on a worker that streams, and one that computes its prompt; again after a worker was lost.
    pub fn placed(&mut self, ticket: Ticket, decode: &str, computes: &str, now: Duration) {
        if let Some(request) = self.requests.get_mut(&ticket)
            && let State::Granted { stage, .. } = &mut request.state
        {
            *stage = self.own.placed(stage, request.uncached_tokens, decode, computes, now);
        }
    }

    /// A granted request has a token. `Some` for its first one, if it was predicted.
    pub fn first_token(&mut self, ticket: Ticket, now: Duration) -> Option<FirstToken> {
        let request = self.requests.get_mut(&ticket)?;
        let State::Granted { at, predicted, stage } = &mut request.state else {
            return None;
        };
        *stage = self.own.started(stage, request.uncached_tokens, Some(now));
        let raw = predicted.take()?;
        let measured = now.saturating_sub(*at);
        let predicted = self.correction.apply(raw);
        self.correction.learn(raw, measured);
        Some(FirstToken { predicted, measured })
    }

    /// A granted request is over.
    pub fn release(&mut self, ticket: Ticket, used: Used, now: Duration) {
        self.advance(now);
        if !matches!(self.requests.get(&ticket), Some(request) if matches!(request.state, State::Granted { .. })) {
            return;
        }
        let Some(request) = self.requests.remove(&ticket) else {
            return;
        };
        if let State::Granted { stage, .. } = &request.state {
            self.own.started(stage, request.uncached_tokens, None);
        }
        self.running -= 1;
        self.ends.count(1);
        let uncached = request.prompt_tokens.saturating_sub(used.cached_tokens);
        let cost = self.cost(uncached, used.completion_tokens);
        self.queue.settle(&request.tenant, request.cost, cost);
        if used.complete {
            // One that was forgotten was idle, which this tenant was not.
            if let Some(flow) = self.queue.flow(&request.tenant) {
                flow.habits
                    .learn(request.prompt_tokens, used.cached_tokens, used.completion_tokens);
            }
        }
    }

    /// Nobody wants a waiting request any more. For a granted one see [`release`](Self::release).
    pub fn cancel(&mut self, ticket: Ticket) {
        if self.remove_waiting(ticket) {
            self.requests.remove(&ticket);
        }
    }

    /// What a worker told of its queue: requests without a first token, and prompt tokens yet to be computed.
    pub fn heartbeat(&mut self, worker: &str, waiting: u32, pending_tokens: u64) {
        self.own.heartbeat(worker, waiting, pending_tokens);
    }

    /// A worker is gone, and so is what others have on it.
    pub fn worker_gone(&mut self, worker: &str) {
        self.own.heartbeat(worker, 0, 0);
    }

    /// For a granted request that the router found no place for.
    pub fn no_capacity(&self) -> Refusal {
        let one_end = self.ends.per_s().map(|rate| time(1.0 / rate));
        Refusal {
            reason: Reason::NoCapacity,
            retry_after: one_end.unwrap_or(RETRY_AFTER_UNKNOWN).min(RETRY_AFTER_MAX),
            expected: None,
        }
    }

    /// Verifies every invariant. O(requests): for tests.
    pub fn check(&self) -> Result<(), String> {
        self.queue.check()?;
        let mut granted = 0;
        for (ticket, request) in &self.requests {
            match &request.state {
                State::Waiting { deadline } if self.deadlines.contains(&(*deadline, *ticket)) => {}
                State::Waiting { .. } => return Err(format!("{ticket:?} waits without a deadline")),
                State::Granted { .. } => granted += 1,
            }
        }
        let waiting = self.requests.len() - granted;
        if (waiting, waiting, granted) != (self.queue.len(), self.deadlines.len(), self.running) {
            return Err(format!(
                "{waiting} wait and {granted} run; {} are queued, {} have deadlines, {} are counted as running",
                self.queue.len(),
                self.deadlines.len(),
                self.running
            ));
        }
        if waiting > self.config.queue_max {
            return Err(format!("{waiting} wait, {} may", self.config.queue_max));
        }
        self.own
            .check(self.requests.values().filter_map(|request| match &request.state {
                State::Granted { stage, .. } => Some((stage, request.uncached_tokens)),
                State::Waiting { .. } => None,
            }))
    }

    fn advance(&mut self, now: Duration) {
        self.drain.advance(now, !self.queue.is_empty());
        self.ends.advance(now, self.running > 0);
    }

    fn cost(&self, prompt_tokens: u32, output_tokens: u32) -> u64 {
        u64::from(prompt_tokens) + u64::from(output_tokens) * u64::from(self.config.output_token_cost)
    }

    /// Estimated wait of one more request of the tenant; `None` while nothing is known.
    fn wait(&self, tenant: &str, cost: u64) -> Option<Duration> {
        let ahead = self.queue.cost_ahead(tenant).saturating_add(cost);
        Some(time(ahead as f64 / self.drain.per_s()?))
    }

    fn remove_waiting(&mut self, ticket: Ticket) -> bool {
        match self.requests.get(&ticket).map(|request| &request.state) {
            Some(&State::Waiting { deadline }) => {
                self.deadlines.remove(&(deadline, ticket));
                self.queue.remove(ticket);
                true
            }
            _ => false,
        }
    }

    fn refuse(&mut self, ticket: Ticket, reason: Reason) {
        self.remove_waiting(ticket);
        if let Some(request) = self.requests.remove(&ticket) {
            let refusal = self.refusal(reason, &request.tenant);
            self.displaced.push(Decision {
                ticket,
                outcome: Outcome::Refused(refusal),
            });
        }
    }

    fn refusal(&self, reason: Reason, tenant: &str) -> Refusal {
        let wait = self.wait(tenant, 0).filter(|wait| !wait.is_zero());
        Refusal {
            reason,
            retry_after: wait.unwrap_or(RETRY_AFTER_UNKNOWN).min(RETRY_AFTER_MAX),
            expected: None,
        }
    }

    /// Steps get shorter as streams end: about in proportion, so that many have to.
    fn too_slow(&self, target: Duration, itl: Duration, streams: u32) -> Refusal {
        let surplus = f64::from(streams) * (1.0 - target.as_secs_f64() / itl.as_secs_f64());
        let until = self.ends.per_s().map(|rate| time(surplus.ceil().max(1.0) / rate));
        Refusal {
            reason: Reason::ItlTarget,
            retry_after: until.unwrap_or(RETRY_AFTER_UNKNOWN).min(RETRY_AFTER_MAX),
            expected: Some(itl),
        }
    }
}

/// Work ahead shrinks by a second a second, so what is expected too late by so much is in time after as long.
fn too_late(target: Duration, expected: Duration) -> Refusal {
    Refusal {
        reason: Reason::TtftTarget,
        retry_after: expected.saturating_sub(target).min(RETRY_AFTER_MAX),
        expected: Some(expected),
    }
}

fn time(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}
