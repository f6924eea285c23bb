//! The live cluster: the registry and the links behind their locks, the clock, and the tasks that carry out what the
//! registry wants. Deliberately holds no policy: who is lost is the registry's word, who gets work the router's.

use crate::admission::Doors;
use crate::link::{Link, Submission, Target};
use crate::metrics::Metrics;
use crate::registry::{Effect, Registry, RegistryConfig, State};
use crate::router::{self, Ask, Candidate, Choice};
use crate::{CoordinatorConfig, CoordinatorError};
use baton_gateway::Placement;
use baton_identity::Identity;
use baton_proto::cluster::{Heartbeat, Register};
use baton_proto::state::{Command, RegisterWorker, RemoveWorker, command};
use baton_proto::worker::{Generate, PrefillPeer};
use baton_raftstore::{Applied, RaftStore, RaftStoreError};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// First pause before a link is tried again; doubles up to [`LINK_PAUSE_MAX`].
const LINK_PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between attempts at a link: below the silence after which the worker would be lost anyway.
const LINK_PAUSE_MAX: Duration = Duration::from_millis(500);
/// Attempts to write a removal into the replicated state. After that it stays there until the worker registers again
/// or this coordinator restarts, which is harmless: the registry has forgotten it.
const REMOVE_ATTEMPTS_MAX: u32 = 5;

/// Why a request could not be placed now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum PlaceError {
    /// Every worker has as many requests as it takes.
    Full,
    /// No worker serves the model.
    Nobody,
}

pub(crate) struct Cluster {
    pub(crate) config: CoordinatorConfig,
    pub(crate) store: RaftStore,
    pub(crate) metrics: Metrics,
    pub(crate) doors: Doors,
    pub(crate) started_unix_s: u64,
    /// Every task of this cluster, so that the end can wait for them.
    pub(crate) tasks: TaskTracker,
    pub(crate) shutdown: CancellationToken,
    identity: Identity,
    registry: Mutex<Registry>,
    /// By worker id; only lives whose registration stands.
    lives: Mutex<HashMap<String, Life>>,
    /// Counts changes that may make room for a waiting request.
    changes: watch::Sender<u64>,
    clock: Instant,
}

/// One registration of a worker: its id and epoch.
pub(crate) type LifeId = (String, u64);

/// Where a request goes.
struct Route {
    decode: LifeId,
    prefill: Option<LifeId>,
    /// The prefill worker as the decode worker is told of it.
    peer: Option<PrefillPeer>,
}

/// The running side of one registration.
struct Life {
    epoch: u64,
    /// Ends the link's task and the Join session.
    over: CancellationToken,
    link: Option<Link>,
}

impl Cluster {
    pub(crate) fn new(
        config: CoordinatorConfig,
        store: RaftStore,
        identity: Identity,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, CoordinatorError> {
        let registry = Registry::new(RegistryConfig {
            heartbeat_interval_ms: config.heartbeat_interval_ms.into(),
            lost_after_ms: config.lost_after_ms.into(),
        });
        let cluster = Self {
            metrics: Metrics::new(store.clone()),
            doors: Doors::new(&config),
            started_unix_s: unix_ms() / 1000,
            tasks: TaskTracker::new(),
            shutdown,
            identity,
            registry: Mutex::new(registry),
            lives: Mutex::new(HashMap::new()),
            changes: watch::Sender::new(0),
            clock: Instant::now(),
            config,
            store,
        };
        let now_ms = cluster.now_ms();
        for record in cluster.store.workers()? {
            if let Some(register) = record.worker {
                cluster.registry().recover(register, record.epoch, now_ms);
            }
        }
        Ok(Arc::new(cluster))
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    pub(crate) fn now_ms(&self) -> u64 {
        u64::try_from(self.now().as_millis()).unwrap_or(u64::MAX)
    }

    /// Time since this coordinator's start.
    pub(crate) fn now(&self) -> Duration {
        self.clock.elapsed()
    }

    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lives(&self) -> MutexGuard<'_, HashMap<String, Life>> {
        self.lives.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes at the next change that may make room for a request.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        self.poll_doors();
    }

    /// Registers a worker through Raft. The token ends when this registration is over; `None` if a newer one came
    /// first.
    pub(crate) async fn register(
        self: &Arc<Self>,
        register: Register,
    ) -> Result<(u64, Option<CancellationToken>), RaftStoreError> {
        let kind = command::Kind::RegisterWorker(RegisterWorker {
            worker: Some(register.clone()),
            at_unix_ms: unix_ms(),
        });
        let epoch = match self.store.propose(Command { kind: Some(kind) }).await? {
            Applied::Registered { epoch } => epoch,
            other => {
                return Err(RaftStoreError::Stopped(format!(
                    "a registration was answered with {other:?}"
                )));
            }
        };
        let worker_id = register.worker_id.clone();
        let (taken, effects) = self.registry().registered(register, epoch, self.now_ms());
        if !taken {
            return Ok((epoch, None));
        }
        tracing::info!(%worker_id, epoch, "worker registered");
        self.carry_out(effects);
        let over = self.shutdown.child_token();
        let life = Life {
            epoch,
            over: over.clone(),
            link: None,
        };
        self.lives().insert(worker_id, life);
        Ok((epoch, Some(over)))
    }

    pub(crate) fn heartbeat(self: &Arc<Self>, worker_id: &str, epoch: u64, heartbeat: Heartbeat) {
        let (waiting, pending) = (heartbeat.waiting, heartbeat.pending_prompt_tokens);
        let effects = self.registry().heartbeat(worker_id, epoch, heartbeat, self.now_ms());
        self.carry_out(effects);
        self.observe_load(worker_id, waiting, pending);
    }

    pub(crate) fn join_closed(self: &Arc<Self>, worker_id: &str, epoch: u64) {
        let effects = self.registry().join_closed(worker_id, epoch, self.now_ms());
        self.carry_out(effects);
    }

    pub(crate) fn left(self: &Arc<Self>, worker_id: &str, epoch: u64, reason: &str) {
        let effects = self.registry().left(worker_id, epoch, reason, self.now_ms());
        self.carry_out(effects);
    }

    /// Tells the registry the time.
    pub(crate) fn tick(self: &Arc<Self>) {
        let effects = self.registry().tick(self.now_ms());
        self.carry_out(effects);
        self.poll_doors();
    }

    fn carry_out(self: &Arc<Self>, effects: Vec<Effect>) {
        for effect in effects {
            match effect {
                Effect::Connect { worker_id, epoch, addr } => {
                    let over = self
                        .lives()
                        .get(&worker_id)
                        .filter(|life| life.epoch == epoch)
                        .map(|life| life.over.clone());
                    if let Some(over) = over {
                        self.tasks.spawn(self.clone().keep_link(worker_id, epoch, addr, over));
                    }
                }
                Effect::Replaced { worker_id, epoch } => {
                    tracing::info!(%worker_id, epoch, "a newer registration took this worker's place");
                    self.end_life(&worker_id, epoch, "the worker registered anew");
                }
                Effect::Remove {
                    worker_id,
                    epoch,
                    reason,
                } => {
                    tracing::warn!(%worker_id, epoch, %reason, "worker lost");
                    self.metrics.workers_lost.inc();
                    self.forget_load(&worker_id);
                    self.end_life(&worker_id, epoch, "the worker is lost");
                    self.tasks.spawn(self.clone().remove(worker_id, epoch, reason));
                }
            }
        }
    }

    fn end_life(&self, worker_id: &str, epoch: u64, reason: &str) {
        let life = {
            let mut lives = self.lives();
            match lives.get(worker_id) {
                Some(life) if life.epoch == epoch => lives.remove(worker_id),
                _ => None,
            }
        };
        if let Some(life) = life {
            life.over.cancel();
            if let Some(link) = life.link {
                link.break_off(reason);
            }
        }
    }

    async fn remove(self: Arc<Self>, worker_id: String, epoch: u64, reason: String) {
        let kind = command::Kind::RemoveWorker(RemoveWorker {
            worker_id: worker_id.clone(),
            epoch,
            reason,
            at_unix_ms: unix_ms(),
        });
        let command = Command { kind: Some(kind) };
        for attempt in 1..=REMOVE_ATTEMPTS_MAX {
            match self.store.propose(command.clone()).await {
                Ok(_) => return,
                Err(error) => tracing::warn!(%worker_id, attempt, %error, "a worker's removal was not committed"),
            }
            tokio::select! {
                () = tokio::time::sleep(LINK_PAUSE_MAX * attempt) => {}
                () = self.shutdown.cancelled() => return,
            }
        }
    }

    /// Keeps the link to one life of a worker up until that life is over.
    async fn keep_link(self: Arc<Self>, worker_id: String, epoch: u64, addr: String, over: CancellationToken) {
        let kept = async {
            let mut pause = LINK_PAUSE_MIN;
            let target = Target {
                worker_id: &worker_id,
                epoch,
                addr: &addr,
            };
            loop {
                match Link::connect(&target, &self.identity, &self.config.name).await {
                    Ok((link, reader)) => {
                        if !self.link_up(&worker_id, epoch, &link) {
                            return;
                        }
                        tracing::info!(%worker_id, epoch, "worker attached");
                        pause = LINK_PAUSE_MIN;
                        let reason = reader.run().await;
                        tracing::warn!(%worker_id, epoch, %reason, "the link to a worker broke");
                    }
                    Err(error) => tracing::warn!(%worker_id, epoch, %error, "cannot attach to a worker"),
                }
                self.link_down(&worker_id, epoch);
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LINK_PAUSE_MAX);
            }
        };
        tokio::select! {
            () = over.cancelled() => {}
            () = kept => {}
        }
    }

    fn link_up(&self, worker_id: &str, epoch: u64, link: &Link) -> bool {
        match self.lives().get_mut(worker_id) {
            Some(life) if life.epoch == epoch => life.link = Some(link.clone()),
            _ => return false,
        }
        let up = self.registry().link_up(worker_id, epoch);
        self.changed();
        up
    }

    fn link_down(self: &Arc<Self>, worker_id: &str, epoch: u64) {
        if let Some(life) = self.lives().get_mut(worker_id)
            && life.epoch == epoch
        {
            life.link = None;
        }
        let effects = self.registry().link_down(worker_id, epoch, self.now_ms());
        self.carry_out(effects);
    }

    /// Routes a request and sends it. `avoid` names lives of workers that have failed it; they get it only if nobody
    /// else can.
    pub(crate) fn place(
        self: &Arc<Self>,
        model: &str,
        mut generate: Generate,
        avoid: &[LifeId],
    ) -> Result<Placed, PlaceError> {
        let mut tried = avoid.to_vec();
        // A link can break between the choice and the sending; then its worker is no candidate the next time.
        let mut unreachable: Vec<LifeId> = Vec::new();
        loop {
            let Route { decode, prefill, peer } = self.route(model, generate.prompt.len(), &tried, &unreachable)?;
            let link = {
                let lives = self.lives();
                let life = lives.get(&decode.0).filter(|life| life.epoch == decode.1);
                life.and_then(|life| life.link.clone())
            };
            generate.prefill_peer = peer;
            match link.map(|link| link.submit(generate.clone())) {
                Some(Ok(submission)) => {
                    let placed = Placed {
                        submission,
                        decode: Assignment::new(self, decode, false),
                        prefill: prefill.map(|prefill| Assignment::new(self, prefill, true)),
                    };
                    self.metrics.placed(placed.prefill.is_some());
                    return Ok(placed);
                }
                _ => {
                    tried.push(decode.clone());
                    unreachable.push(decode);
                }
            }
        }
    }

    fn route(
        &self,
        model: &str,
        prompt_tokens: usize,
        avoid: &[LifeId],
        unreachable: &[LifeId],
    ) -> Result<Route, PlaceError> {
        let listed = |list: &[LifeId], id: &str, epoch: u64| list.iter().any(|(i, e)| i == id && *e == epoch);
        let registry = self.registry();
        let workers: Vec<_> = registry
            .workers(self.now_ms())
            .filter(|(worker, state)| {
                matches!(state, State::Ready | State::Suspect)
                    && worker.register.model == model
                    && !listed(unreachable, &worker.register.worker_id, worker.epoch)
            })
            .collect();
        let candidates: Vec<Candidate<'_>> = workers
            .iter()
            .map(|(worker, state)| Candidate {
                id: &worker.register.worker_id,
                role: worker.role,
                kv_digest: &worker.register.kv_digest,
                // Heartbeats lag behind what was placed since; what was placed knows nothing of other coordinators.
                load: worker.assigned.max(worker.heartbeat.running + worker.heartbeat.waiting),
                prefilling: worker.prefilling,
                free_blocks: worker.heartbeat.free_blocks,
                full: worker.assigned >= self.config.requests_per_worker_max,
                doubtful: *state == State::Suspect || listed(avoid, &worker.register.worker_id, worker.epoch),
            })
            .collect();
        let ask = Ask {
            prompt_tokens,
            prefill_threshold_tokens: self.config.prefill_threshold_tokens,
        };
        let named = |index: usize| {
            let worker = workers[index].0;
            (worker.register.worker_id.clone(), worker.epoch)
        };
        match router::choose(&candidates, ask) {
            Choice::Nobody => Err(PlaceError::Nobody),
            Choice::Full => Err(PlaceError::Full),
            Choice::Place { decode, prefill } => {
                let peer = prefill.map(|index| {
                    let worker = workers[index].0;
                    PrefillPeer {
                        worker_id: worker.register.worker_id.clone(),
                        epoch: worker.epoch,
                        addr: worker.register.addr.clone(),
                    }
                });
                Ok(Route {
                    decode: named(decode),
                    prefill: prefill.map(named),
                    peer,
                })
            }
        }
    }

    /// Whether a live worker serves the model, and the smallest context length of those that do.
    pub(crate) fn served(&self, model: &str) -> Option<u32> {
        let registry = self.registry();
        let lengths = registry
            .workers(self.now_ms())
            .filter(|(worker, state)| matches!(state, State::Ready | State::Suspect) && worker.register.model == model)
            .map(|(worker, _)| worker.register.context_length);
        lengths.min()
    }
}

/// A request on a worker. Dropping it cancels it there and gives its place back.
pub(crate) struct Placed {
    pub(crate) submission: Submission,
    pub(crate) decode: Assignment,
    /// Dropped when the first token shows that the prompt is computed.
    pub(crate) prefill: Option<Assignment>,
}

impl Placed {
    pub(crate) fn placement(&self, attempts: u32) -> Placement {
        Placement {
            decode_worker_id: self.decode.worker.0.clone(),
            prefill_worker_id: self.prefill.as_ref().map(|a| a.worker.0.clone()).unwrap_or_default(),
            attempts,
        }
    }
}

/// A place in a worker's load, given back on drop.
pub(crate) struct Assignment {
    cluster: Arc<Cluster>,
    pub(crate) worker: LifeId,
    prefill: bool,
}

impl Assignment {
    fn new(cluster: &Arc<Cluster>, worker: LifeId, prefill: bool) -> Self {
        cluster.registry().assigned(&worker.0, worker.1, prefill);
        Self {
            cluster: cluster.clone(),
            worker,
            prefill,
        }
    }
}

impl Drop for Assignment {
    fn drop(&mut self) {
        self.cluster
            .registry()
            .released(&self.worker.0, self.worker.1, self.prefill);
        self.cluster.changed();
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
