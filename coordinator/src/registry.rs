//! Which workers there are and how they are doing, from what is told: registrations, heartbeats, connections that come
//! and go, and the time. No IO and no clock; what must happen is returned as [`Effect`]s.
//!
//! ```text
//!             registered                first heartbeat: Connect            link up
//!   (none) ───────────────▶ Joining ─────────────────────────────▶ Joining ─────────▶ Ready ◀──▶ Suspect
//!                                                                                       │ drain     │
//!                                                                                       ▼           │
//!   (forgotten) ◀── a while ── Lost ◀── no heartbeat for `lost_after_ms`, or Join stream ◀──────────┘
//!                               │ ▲     and request link both gone, or it left, or the group removed it:  Lost
//!                               ▼ └──────────────────────────┐
//!                    heard again under the same epoch: Joining
//! ```
//!
//! What is lost here is only not heard by this coordinator. Whether the registration is over is for the replicated state to
//! say ([`Registry::removed`]); until then a worker that is heard again goes on where it was.
//!
//! A worker is *suspect* while its Join stream is broken or a heartbeat is late: it keeps its requests and gets new
//! ones only if no other worker can take them. Every registration has a new epoch; what is told under an older one is
//! without effect.

use baton_gateway::{KvTierStatus, KvTiersStatus, WorkerRole, WorkerState, WorkerStatus};
use baton_proto::cluster::{Heartbeat, KvTiers, Register, Role, TierUsage};
use std::collections::BTreeMap;

/// Workers in one cluster. Far above what one coordinator can route to; a bound all the same.
pub const WORKERS_MAX: usize = 4096;
/// How long a lost worker stays in the list, in milliseconds, so that an operator sees what happened.
const LOST_KEPT_MS: u64 = 60_000;

/// Times that the registry works with.
#[derive(Debug, Clone, Copy)]
pub struct RegistryConfig {
    /// How often workers report, in milliseconds.
    pub heartbeat_interval_ms: u64,
    /// Silence after which a worker is lost, in milliseconds.
    pub lost_after_ms: u64,
}

/// What the registry wants done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Open a request link to the worker.
    Connect {
        /// The worker.
        worker_id: String,
        /// Its epoch, which the link must find.
        epoch: u64,
        /// Its gRPC address.
        addr: String,
    },
    /// Close the link and the Join stream of this life of the worker: a newer one took its place.
    Replaced {
        /// The worker.
        worker_id: String,
        /// The epoch that is over.
        epoch: u64,
    },
    /// The worker drains: requests on its link go on elsewhere where they can.
    Drain {
        /// The worker.
        worker_id: String,
        /// Its epoch.
        epoch: u64,
    },
    /// Close link and Join stream. The group is told that this coordinator has lost the worker, unless it knows.
    Lost {
        /// The worker.
        worker_id: String,
        /// Its epoch.
        epoch: u64,
        /// Why, for people.
        reason: String,
    },
}

/// How a worker is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Registered, not attached.
    Joining,
    /// Takes work.
    Ready,
    /// Keeps its work; gets new work only if nobody else can take it.
    Suspect,
    /// Keeps its work and gets none.
    Draining,
    /// Gone.
    Lost,
}

/// A registered worker.
#[derive(Debug, Clone)]
pub struct Worker {
    /// What it said of itself.
    pub register: Register,
    /// Its role.
    pub role: WorkerRole,
    /// Which registration this is.
    pub epoch: u64,
    /// Its latest report.
    pub heartbeat: Heartbeat,
    /// Requests that this coordinator has placed on it and that have not ended.
    pub assigned: u32,
    /// Prompts that it computes for requests placed elsewhere by this coordinator.
    pub prefilling: u32,
    last_heartbeat_ms: u64,
    reported: bool,
    join_open: bool,
    link_up: bool,
    draining: bool,
    lost_at_ms: Option<u64>,
    /// Why, for people.
    lost_reason: String,
    /// It said goodbye.
    left: bool,
    /// The replicated state has it no more.
    removed: bool,
}

impl Worker {
    /// How it is doing at `now_ms`.
    fn state(&self, now_ms: u64, config: &RegistryConfig) -> State {
        if self.lost_at_ms.is_some() {
            State::Lost
        } else if self.draining {
            State::Draining
        } else if !self.link_up {
            State::Joining
        } else if !self.join_open || self.silence_ms(now_ms) > 2 * config.heartbeat_interval_ms {
            State::Suspect
        } else {
            State::Ready
        }
    }

    fn silence_ms(&self, now_ms: u64) -> u64 {
        now_ms.saturating_sub(self.last_heartbeat_ms)
    }

    /// Why this coordinator has lost it, if it has.
    pub fn lost(&self) -> Option<&str> {
        self.lost_at_ms.map(|_| self.lost_reason.as_str())
    }

    /// Whether it said goodbye.
    pub fn left(&self) -> bool {
        self.left
    }

    /// Whether it is heard here at the moment.
    pub fn is_heard(&self) -> bool {
        self.lost_at_ms.is_none() && self.join_open && self.reported
    }
}

/// The workers. Times are milliseconds on any one clock.
#[derive(Debug)]
pub struct Registry {
    config: RegistryConfig,
    workers: BTreeMap<String, Worker>,
    last_tick_ms: Option<u64>,
}

impl Registry {
    /// An empty registry.
    pub fn new(config: RegistryConfig) -> Self {
        Self {
            config,
            workers: BTreeMap::new(),
            last_tick_ms: None,
        }
    }

    /// Whether a registration under `worker_id` would find room.
    pub fn has_room_for(&self, worker_id: &str) -> bool {
        self.workers.contains_key(worker_id) || self.workers.len() < WORKERS_MAX
    }

    /// The replicated state has this registration, made through another coordinator or in an earlier life of this one. The
    /// worker has the usual time to be heard here. Without effect if it is known, or a newer one.
    pub fn known(&mut self, register: Register, epoch: u64, now_ms: u64) -> Vec<Effect> {
        let worker_id = register.worker_id.clone();
        let (new, effects) = self.registered(register, epoch, now_ms);
        if let Some(worker) = self.workers.get_mut(&worker_id).filter(|_| new) {
            worker.join_open = false;
        }
        effects
    }

    /// A Join stream of a known registration was opened. False if that registration is not the current one, or over.
    pub fn rejoined(&mut self, worker_id: &str, epoch: u64, now_ms: u64) -> bool {
        let Some(worker) = self.workers.get_mut(worker_id).filter(|worker| worker.epoch == epoch) else {
            return false;
        };
        if worker.left || worker.removed {
            return false;
        }
        if worker.lost_at_ms.take().is_some() {
            // Its link went with its loss: it is made anew at the first heartbeat.
            worker.reported = false;
        }
        worker.join_open = true;
        worker.last_heartbeat_ms = now_ms;
        true
    }

    /// The replicated state has this registration no more.
    pub fn removed(&mut self, worker_id: &str, epoch: u64, now_ms: u64) -> Vec<Effect> {
        let Some(worker) = self.workers.get_mut(worker_id).filter(|worker| worker.epoch == epoch) else {
            return Vec::new();
        };
        if std::mem::replace(&mut worker.removed, true) {
            return Vec::new();
        }
        match worker.lost_at_ms {
            Some(_) => Vec::new(),
            None => self.lose(worker_id, "the group has removed it".into(), now_ms),
        }
    }

    /// A registration was committed under `epoch`. False if it, or a newer one, is known.
    pub fn registered(&mut self, register: Register, epoch: u64, now_ms: u64) -> (bool, Vec<Effect>) {
        let worker_id = register.worker_id.clone();
        let mut effects = Vec::new();
        if let Some(old) = self.workers.get(&worker_id) {
            if old.epoch >= epoch {
                return (false, effects);
            }
            if old.lost_at_ms.is_none() {
                effects.push(Effect::Replaced {
                    worker_id: worker_id.clone(),
                    epoch: old.epoch,
                });
            }
        }
        self.workers.insert(worker_id, new_worker(register, epoch, now_ms));
        (true, effects)
    }

    /// A report came. The first one says that the worker knows its epoch, so the link can be made.
    pub fn heartbeat(&mut self, worker_id: &str, epoch: u64, heartbeat: Heartbeat, now_ms: u64) -> Vec<Effect> {
        let Some(worker) = self.current(worker_id, epoch) else {
            return Vec::new();
        };
        worker.heartbeat = heartbeat;
        worker.last_heartbeat_ms = now_ms;
        let mut effects = Vec::new();
        if !std::mem::replace(&mut worker.reported, true) {
            effects.push(Effect::Connect {
                worker_id: worker_id.to_owned(),
                epoch,
                addr: worker.register.addr.clone(),
            });
        }
        // Told to stop by a signal, or by another coordinator.
        if heartbeat.draining {
            effects.extend(worker.drain());
        }
        effects
    }

    /// The Join stream ended without a goodbye.
    pub fn join_closed(&mut self, worker_id: &str, epoch: u64, now_ms: u64) -> Vec<Effect> {
        match self.current(worker_id, epoch) {
            None => Vec::new(),
            Some(worker) => {
                worker.join_open = false;
                self.lose_if_unreachable(worker_id, now_ms)
            }
        }
    }

    /// The worker said goodbye.
    pub fn left(&mut self, worker_id: &str, epoch: u64, reason: &str, now_ms: u64) -> Vec<Effect> {
        match self.current(worker_id, epoch) {
            None => Vec::new(),
            Some(worker) => {
                worker.left = true;
                self.lose(worker_id, format!("it left: {reason}"), now_ms)
            }
        }
    }

    /// The request link is attached. False if this life of the worker is over: close the link.
    pub fn link_up(&mut self, worker_id: &str, epoch: u64) -> bool {
        match self.current(worker_id, epoch) {
            None => false,
            Some(worker) => {
                worker.link_up = true;
                true
            }
        }
    }

    /// The request link broke, or could not be made while the Join stream was gone.
    pub fn link_down(&mut self, worker_id: &str, epoch: u64, now_ms: u64) -> Vec<Effect> {
        match self.current(worker_id, epoch) {
            None => Vec::new(),
            Some(worker) => {
                worker.link_up = false;
                self.lose_if_unreachable(worker_id, now_ms)
            }
        }
    }

    /// No new work for the worker from now on. Its epoch, and what is to be done; `None` if it is not there.
    pub fn drain(&mut self, worker_id: &str) -> Option<(u64, Vec<Effect>)> {
        let worker = self.workers.get_mut(worker_id)?;
        (worker.lost_at_ms.is_none()).then(|| (worker.epoch, worker.drain().into_iter().collect()))
    }

    /// Whether this life of the worker drains.
    pub fn is_draining(&self, worker_id: &str, epoch: u64) -> bool {
        self.workers
            .get(worker_id)
            .is_some_and(|worker| worker.epoch == epoch && worker.draining)
    }

    /// Time passes: silent workers are lost, and lost ones are forgotten after a while.
    pub fn tick(&mut self, now_ms: u64) -> Vec<Effect> {
        // If this process was stopped for a while, the workers' silence is our deafness: what they sent is still in
        // the sockets.
        let gap = now_ms.saturating_sub(self.last_tick_ms.unwrap_or(now_ms));
        self.last_tick_ms = Some(now_ms);
        if gap > self.config.lost_after_ms / 2 {
            for worker in self.workers.values_mut() {
                worker.last_heartbeat_ms = (worker.last_heartbeat_ms + gap).min(now_ms);
            }
        }
        // One that the state still has stays: it may be heard again.
        self.workers.retain(|_, worker| {
            let lost_for_ms = worker.lost_at_ms.map_or(0, |at| now_ms.saturating_sub(at));
            !worker.removed || lost_for_ms < LOST_KEPT_MS
        });
        let lost_after_ms = self.config.lost_after_ms;
        let silent: Vec<String> = self
            .workers
            .iter()
            .filter(|(_, worker)| worker.lost_at_ms.is_none() && worker.silence_ms(now_ms) >= lost_after_ms)
            .map(|(id, _)| id.clone())
            .collect();
        let reason = format!("no heartbeat for {lost_after_ms} ms");
        silent
            .iter()
            .flat_map(|id| self.lose(id, reason.clone(), now_ms))
            .collect()
    }

    /// A request was placed on, or a prompt given to, a worker. Balanced by [`released`](Self::released).
    pub fn assigned(&mut self, worker_id: &str, epoch: u64, prefill: bool) {
        if let Some(worker) = self.current(worker_id, epoch) {
            *worker.count(prefill) += 1;
        }
    }

    /// What was assigned has ended.
    pub fn released(&mut self, worker_id: &str, epoch: u64, prefill: bool) {
        if let Some(worker) = self.workers.get_mut(worker_id)
            && worker.epoch == epoch
        {
            let count = worker.count(prefill);
            *count = count.saturating_sub(1);
        }
    }

    /// Every worker and its state, by id.
    pub fn workers(&self, now_ms: u64) -> impl Iterator<Item = (&Worker, State)> {
        self.workers
            .values()
            .map(move |worker| (worker, worker.state(now_ms, &self.config)))
    }

    /// Workers of a model that may be given work, and their states, by id.
    pub fn serving<'r>(&'r self, model: &'r str, now_ms: u64) -> impl Iterator<Item = (&'r Worker, State)> {
        self.workers(now_ms).filter(move |(worker, state)| {
            matches!(state, State::Ready | State::Suspect) && worker.register.model == model
        })
    }

    /// The list for `baton status`, by id.
    pub fn statuses(&self, now_ms: u64) -> Vec<WorkerStatus> {
        self.workers(now_ms)
            .map(|(worker, state)| status(worker, state, now_ms))
            .collect()
    }

    /// The worker, if `epoch` is its current one and it is not lost.
    fn current(&mut self, worker_id: &str, epoch: u64) -> Option<&mut Worker> {
        let worker = self.workers.get_mut(worker_id)?;
        (worker.epoch == epoch && worker.lost_at_ms.is_none()).then_some(worker)
    }

    fn lose_if_unreachable(&mut self, worker_id: &str, now_ms: u64) -> Vec<Effect> {
        match self.workers.get(worker_id) {
            Some(worker) if !worker.join_open && !worker.link_up => {
                self.lose(worker_id, "both its connections broke".into(), now_ms)
            }
            _ => Vec::new(),
        }
    }

    fn lose(&mut self, worker_id: &str, reason: String, now_ms: u64) -> Vec<Effect> {
        let Some(worker) = self.workers.get_mut(worker_id) else {
            return Vec::new();
        };
        worker.lost_at_ms = Some(now_ms);
        worker.lost_reason.clone_from(&reason);
        worker.link_up = false;
        worker.join_open = false;
        vec![Effect::Lost {
            worker_id: worker_id.to_owned(),
            epoch: worker.epoch,
            reason,
        }]
    }
}

impl Worker {
    /// Starts draining, once.
    fn drain(&mut self) -> Option<Effect> {
        (!std::mem::replace(&mut self.draining, true)).then(|| Effect::Drain {
            worker_id: self.register.worker_id.clone(),
            epoch: self.epoch,
        })
    }

    fn count(&mut self, prefill: bool) -> &mut u32 {
        if prefill {
            &mut self.prefilling
        } else {
            &mut self.assigned
        }
    }
}

fn new_worker(register: Register, epoch: u64, now_ms: u64) -> Worker {
    let role = match register.role() {
        Role::Prefill => WorkerRole::Prefill,
        Role::Decode => WorkerRole::Decode,
        Role::Combined | Role::Unspecified => WorkerRole::Combined,
    };
    // Until it reports, a worker is as empty as it says it is large.
    let heartbeat = Heartbeat {
        free_blocks: register.total_blocks,
        ..Heartbeat::default()
    };
    Worker {
        register,
        role,
        epoch,
        heartbeat,
        assigned: 0,
        prefilling: 0,
        last_heartbeat_ms: now_ms,
        reported: false,
        join_open: true,
        link_up: false,
        draining: false,
        lost_at_ms: None,
        lost_reason: String::new(),
        left: false,
        removed: false,
    }
}

fn status(worker: &Worker, state: State, now_ms: u64) -> WorkerStatus {
    let (register, heartbeat) = (&worker.register, &worker.heartbeat);
    WorkerStatus {
        id: register.worker_id.clone(),
        epoch: worker.epoch,
        role: worker.role,
        state: match state {
            State::Joining => WorkerState::Joining,
            // To an operator a late heartbeat shows as its age.
            State::Ready | State::Suspect => WorkerState::Ready,
            State::Draining => WorkerState::Draining,
            State::Lost => WorkerState::Lost,
        },
        pid: register.pid,
        model: register.model.clone(),
        device: register.device.clone(),
        addr: register.addr.clone(),
        transfer_addr: register.transfer_addr.clone(),
        context_length: register.context_length,
        block_size: register.block_size,
        kv_bytes_per_block: register.kv_bytes_per_block,
        total_blocks: register.total_blocks,
        free_blocks: heartbeat.free_blocks,
        held_blocks: heartbeat.held_blocks,
        cached_blocks: heartbeat.cached_blocks,
        running: heartbeat.running,
        waiting: heartbeat.waiting,
        transferring: heartbeat.transferring,
        prompt_tokens_total: heartbeat.prompt_tokens_total,
        cached_tokens_total: heartbeat.cached_tokens_total,
        generation_tokens_total: heartbeat.generation_tokens_total,
        preemptions_total: heartbeat.preemptions_total,
        transferred_bytes_total: heartbeat.transferred_bytes_total,
        push_overlap: heartbeat.push_overlap,
        heartbeat_age_ms: worker.silence_ms(now_ms),
        kv_tiers: heartbeat.kv_tiers.as_ref().map(tier_status).unwrap_or_default(),
    }
}

fn tier_status(tiers: &KvTiers) -> KvTiersStatus {
    let status = |usage: &Option<TierUsage>| {
        usage.map(|usage| KvTierStatus {
            blocks: usage.blocks,
            blocks_max: usage.blocks_max,
            hits_total: usage.hits_total,
            writes_total: usage.writes_total,
            dropped_total: usage.dropped_total,
            broken_total: usage.broken_total,
            // Whole bytes are plenty; a float beyond the range saturates.
            load_bytes_per_s: usage.load_bytes_per_s as u64,
        })
    };
    KvTiersStatus {
        host: status(&tiers.host),
        disk: status(&tiers.disk),
        object: status(&tiers.object),
        misses_total: tiers.misses_total,
        declined_total: tiers.declined_total,
        loads_total: tiers.loads_total,
        expired_total: tiers.expired_total,
        load_us_total: tiers.load_us_total,
        ahead_read_total: tiers.ahead_read_total,
        ahead_hits_total: tiers.ahead_hits_total,
        ahead_wasted_total: tiers.ahead_wasted_total,
        ahead_refused_total: tiers.ahead_refused_total,
    }
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
