//! The live cluster: the registry and the links behind their locks, the clock, and the tasks that carry out what the
//! registry wants. Deliberately holds no policy: who is lost is the registry's word, who gets work the router's.

use crate::admission::Doors;
use crate::link::{Link, Target};
use crate::metrics::{Metrics, RouterMetrics};
use crate::placement::{Assignment, Placed};
use crate::registry::{Effect, Registry, RegistryConfig};
use crate::router::{Considered, Kind, Names, Routing, kind_of};
use crate::{CoordinatorConfig, CoordinatorError};
use baton_identity::Identity;
use baton_proto::cluster::{BlockEvents, CoordinatorOrder, Drain, Heartbeat, Register, coordinator_order};
use baton_proto::state::{Command, RegisterWorker, RemoveWorker, command};
use baton_proto::worker::{Generate, PrefillPeer};
use baton_raftstore::{Applied, RaftStore, RaftStoreError};
use baton_router::{Ask, Choice, Estimate};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};
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
    routing: Routing,
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
pub(crate) struct Route {
    pub(crate) decode: LifeId,
    prefill: Option<LifeId>,
    /// The prefill worker as the decode worker is told of it.
    peer: Option<PrefillPeer>,
    /// How the two name blocks.
    pub(crate) kinds: (Kind, Option<Kind>),
    pub(crate) estimate: Estimate,
}

/// The running side of one registration.
struct Life {
    epoch: u64,
    /// Ends the link's task and the Join session.
    over: CancellationToken,
    link: Option<Link>,
    /// What the Join session sends to the worker.
    orders: Orders,
}

/// Orders to one worker. Bounded; a full queue is one whose worker reads nothing.
pub(crate) type Orders = mpsc::Sender<Result<CoordinatorOrder, tonic::Status>>;

/// Why a worker could not be drained.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum DrainError {
    /// No such worker, or it is lost.
    Unknown,
    /// It gets no new work and its requests move, but it could not be told to leave.
    Unreachable,
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
        let routing = Routing::new(
            config.prefill_threshold_tokens,
            config.routing.mode(),
            RouterMetrics::default(),
        );
        let cluster = Self {
            metrics: Metrics::new(store.clone(), routing.clone()),
            routing,
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

    pub(crate) fn routing_metrics(&self) -> &RouterMetrics {
        self.routing.metrics()
    }

    #[cfg(test)]
    pub(crate) fn routing(&self) -> &Routing {
        &self.routing
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

    /// There may be room for a waiting request.
    pub(crate) fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
        self.poll_doors();
    }

    /// Registers a worker through Raft. The token ends when this registration is over; `None` if a newer one came
    /// first.
    pub(crate) async fn register(
        self: &Arc<Self>,
        register: Register,
        orders: Orders,
    ) -> Result<(u64, Option<CancellationToken>), RaftStoreError> {
        let kind = command::Kind::RegisterWorker(RegisterWorker {
            worker: Some(register.clone()),
            at_unix_ms: unix_ms(),
        });
        let epoch = match self
            .store
            .propose(Command {
                kind: Some(kind),
                ..Command::default()
            })
            .await?
        {
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
            orders,
        };
        self.routing.join(epoch);
        self.lives().insert(worker_id, life);
        Ok((epoch, Some(over)))
    }

    pub(crate) fn heartbeat(self: &Arc<Self>, worker_id: &str, epoch: u64, heartbeat: Heartbeat) {
        let (waiting, pending) = (heartbeat.waiting, heartbeat.pending_prompt_tokens);
        let effects = self.registry().heartbeat(worker_id, epoch, heartbeat, self.now_ms());
        self.carry_out(effects);
        self.observe_load(worker_id, waiting, pending);
    }

    /// Takes in what a worker tells of its prefix cache; true if it must tell everything anew.
    pub(crate) fn block_events(&self, epoch: u64, events: &BlockEvents) -> bool {
        self.routing.block_events(epoch, events, self.now_ms())
    }

    pub(crate) fn join_closed(self: &Arc<Self>, worker_id: &str, epoch: u64) {
        let effects = self.registry().join_closed(worker_id, epoch, self.now_ms());
        self.carry_out(effects);
    }

    pub(crate) fn left(self: &Arc<Self>, worker_id: &str, epoch: u64, reason: &str) {
        let effects = self.registry().left(worker_id, epoch, reason, self.now_ms());
        self.carry_out(effects);
    }

    /// Takes a worker out of service: no new work from now on, its requests go on elsewhere, and it is ordered to leave once
    /// it has nothing left, after `deadline_ms` at the latest.
    pub(crate) fn drain(self: &Arc<Self>, worker_id: &str, deadline_ms: u32) -> Result<(), DrainError> {
        let drained = self.registry().drain(worker_id);
        let (epoch, effects) = drained.ok_or(DrainError::Unknown)?;
        tracing::info!(%worker_id, epoch, deadline_ms, "draining");
        self.carry_out(effects);
        let orders = {
            let lives = self.lives();
            let life = lives.get(worker_id).filter(|life| life.epoch == epoch);
            life.map(|life| life.orders.clone())
        };
        let order = Drain {
            reason: "an operator asked for it".into(),
            deadline_ms,
        };
        let order = CoordinatorOrder {
            kind: Some(coordinator_order::Kind::Drain(order)),
        };
        match orders.map(|orders| orders.try_send(Ok(order))) {
            Some(Ok(())) => Ok(()),
            _ => Err(DrainError::Unreachable),
        }
    }

    /// Tells the registry the time.
    pub(crate) fn tick(self: &Arc<Self>) {
        let effects = self.registry().tick(self.now_ms());
        self.carry_out(effects);
        self.routing.tick();
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
                Effect::Drain { worker_id, epoch } => {
                    tracing::info!(%worker_id, epoch, "worker draining");
                    let lives = self.lives();
                    let life = lives.get(&worker_id).filter(|life| life.epoch == epoch);
                    if let Some(link) = life.and_then(|life| life.link.as_ref()) {
                        link.leave();
                    }
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
            self.routing.leave(epoch);
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
        let command = Command {
            kind: Some(kind),
            ..Command::default()
        };
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
        if self.registry().is_draining(worker_id, epoch) {
            link.leave();
        }
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
        let started = Instant::now();
        let names = self.names(model, &generate.cache_salt, &generate.prompt);
        let ask = Ask {
            prompt_tokens: generate.prompt.len(),
            max_tokens: generate.max_tokens as usize,
        };
        let mut tried = avoid.to_vec();
        // A link can break between the choice and the sending; then its worker is no candidate the next time.
        let mut unreachable: Vec<LifeId> = Vec::new();
        loop {
            let route = self.route(model, &ask, &names, started, &tried, &unreachable)?;
            if route.estimate.waits {
                self.hint(&route, &generate.cache_salt, &generate.prompt);
            }
            let (decode, prefill, peer) = (route.decode, route.prefill, route.peer);
            let link = self.link(&decode);
            generate.prefill_peer = peer;
            match link.map(|link| link.submit(generate.clone())) {
                Some(Ok(submission)) => {
                    let pending = self.routing.placed(
                        (decode.1, &route.kinds.0),
                        prefill.as_ref().map(|(_, epoch)| *epoch).zip(route.kinds.1.as_ref()),
                        &names,
                        route.estimate,
                        self.now_ms(),
                    );
                    let placed = Placed {
                        submission,
                        decode: Assignment::new(self, decode, false),
                        prefill: prefill.map(|prefill| Assignment::new(self, prefill, true)),
                        pending: Some(pending),
                        predicted_cached_tokens: route.estimate.cached_tokens,
                        routing: self.routing.clone(),
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

    /// How each kind of worker that serves the model names the prompt's blocks.
    pub(crate) fn names(&self, model: &str, salt: &[u8], prompt: &[u32]) -> Names {
        let kinds = Routing::kinds(self.registry().serving(model, self.now_ms()).map(|(worker, _)| worker));
        self.routing.names(kinds, salt, prompt)
    }

    /// The link to one life of a worker, if it stands.
    pub(crate) fn link(&self, decode: &LifeId) -> Option<Link> {
        let lives = self.lives();
        let life = lives.get(&decode.0).filter(|life| life.epoch == decode.1);
        life.and_then(|life| life.link.clone())
    }

    pub(crate) fn route(
        &self,
        model: &str,
        ask: &Ask,
        names: &Names,
        started: Instant,
        avoid: &[LifeId],
        unreachable: &[LifeId],
    ) -> Result<Route, PlaceError> {
        let now_ms = self.now_ms();
        let found = self.routing.look_up(names, now_ms);
        let listed = |list: &[LifeId], id: &str, epoch: u64| list.iter().any(|(i, e)| i == id && *e == epoch);
        let registry = self.registry();
        let workers: Vec<Considered<'_>> = registry
            .serving(model, now_ms)
            .filter(|(worker, _)| !listed(unreachable, &worker.register.worker_id, worker.epoch))
            .map(|(worker, state)| Considered {
                worker,
                state,
                avoid: listed(avoid, &worker.register.worker_id, worker.epoch),
                requests_max: self.config.requests_per_worker_max,
            })
            .collect();
        let life = |index: usize| {
            let worker = workers[index].worker;
            (worker.register.worker_id.clone(), worker.epoch)
        };
        match self.routing.choose(&workers, &found, ask, started) {
            Choice::Nobody => Err(PlaceError::Nobody),
            Choice::Full => Err(PlaceError::Full),
            Choice::Place {
                decode,
                prefill,
                estimate,
            } => {
                let peer = prefill.map(|index| {
                    let worker = workers[index].worker;
                    PrefillPeer {
                        worker_id: worker.register.worker_id.clone(),
                        epoch: worker.epoch,
                        addr: worker.register.addr.clone(),
                    }
                });
                Ok(Route {
                    decode: life(decode),
                    prefill: prefill.map(life),
                    peer,
                    kinds: (
                        kind_of(workers[decode].worker),
                        prefill.map(|index| kind_of(workers[index].worker)),
                    ),
                    estimate,
                })
            }
        }
    }

    /// Whether a live worker serves the model, and the smallest context length of those that do.
    pub(crate) fn served(&self, model: &str) -> Option<u32> {
        let registry = self.registry();
        let serving = registry.serving(model, self.now_ms());
        let lengths = serving.map(|(worker, _)| worker.register.context_length);
        lengths.min()
    }

    /// The model as its workers have it, as hexadecimal digits of its digest.
    pub(crate) fn revision(&self, model: &str) -> Option<String> {
        let registry = self.registry();
        let (worker, _) = registry.serving(model, self.now_ms()).next()?;
        Some(baton_ledger::hex(&worker.register.model_digest))
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
