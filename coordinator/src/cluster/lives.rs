//! The lives of workers: a registration through Raft, what is heard under it, the link that it keeps, and its end. Whose life
//! is over is the registry's word.

use super::{Cluster, DrainError, LINK_PAUSE_MAX, LINK_PAUSE_MIN, Life, Orders, Session, unix_ms};
use crate::link::{Link, Target};
use crate::registry::Effect;
use baton_proto::cluster::{BlockEvents, CoordinatorOrder, Drain, Heartbeat, Register, coordinator_order};
use baton_proto::state::{Command, RegisterWorker, command};
use baton_raftstore::{Applied, RaftStoreError};
use baton_state::view;
use std::cmp::Ordering;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Longest wait for a registration that was committed through another member to be applied here. A member that is further
/// behind is not one to send work through; the worker comes again.
const APPLY_WAIT: Duration = Duration::from_secs(2);
/// Pause between two looks.
const APPLY_LOOK: Duration = Duration::from_millis(10);

/// What the applied state says of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Standing {
    /// It stands.
    Current,
    /// Its epoch was not given yet, as far as is known here: this member is behind, or the state is another cluster's.
    Ahead,
    /// It was removed.
    Over,
    /// Another process has registered under its id since.
    Replaced,
}

/// Whether two registrations are of one process: the address is bound by it.
fn is_same_process(one: &Register, other: &Register) -> bool {
    one.addr == other.addr && one.pid == other.pid
}

/// Names one attempt to register among all.
fn nonce() -> Vec<u8> {
    rand::random::<[u8; 16]>().to_vec()
}

pub(crate) fn command(kind: command::Kind) -> Command {
    Command {
        at_unix_ms: unix_ms(),
        kind: Some(kind),
        ..Command::default()
    }
}

impl Cluster {
    /// Registers a worker through Raft, once, whoever of the group does it. `None` if a newer registration came first.
    pub(crate) async fn register(
        self: &Arc<Self>,
        register: Register,
        orders: Orders,
    ) -> Result<(u64, Option<Session>), RaftStoreError> {
        let kind = command::Kind::RegisterWorker(RegisterWorker {
            worker: Some(Register {
                epoch: 0,
                ..register.clone()
            }),
            at_unix_ms: unix_ms(),
            nonce: nonce().into(),
        });
        let epoch = match self.store.propose(command(kind)).await? {
            Applied::Registered { epoch } => epoch,
            other => {
                return Err(RaftStoreError::Stopped(format!(
                    "a registration was answered with {other:?}"
                )));
            }
        };
        tracing::info!(worker_id = %register.worker_id, epoch, "worker registered");
        Ok((epoch, self.open_session(register, epoch, orders)))
    }

    /// A worker comes with an epoch that it got elsewhere, or before its stream broke. What it claims is checked against the
    /// applied state, which may be a moment behind.
    pub(crate) async fn rejoin(
        self: &Arc<Self>,
        register: Register,
        orders: Orders,
    ) -> Result<Result<Session, Standing>, RaftStoreError> {
        let deadline = tokio::time::Instant::now() + APPLY_WAIT;
        let standing = loop {
            let standing = self.standing(&register)?;
            if standing != Standing::Ahead || tokio::time::Instant::now() >= deadline {
                break standing;
            }
            tokio::time::sleep(APPLY_LOOK).await;
        };
        if standing != Standing::Current {
            return Ok(Err(standing));
        }
        let epoch = register.epoch;
        tracing::info!(worker_id = %register.worker_id, epoch, "worker joined");
        Ok(self.open_session(register, epoch, orders).ok_or(Standing::Over))
    }

    /// What the applied state says of the registration that `register` claims to be.
    pub(crate) fn standing(&self, register: &Register) -> Result<Standing, RaftStoreError> {
        let state = self.store.state()?;
        if register.epoch > view::last_epoch(&state)? {
            return Ok(Standing::Ahead);
        }
        let Some(record) = view::worker(&state, &register.worker_id)? else {
            return Ok(Standing::Over);
        };
        let same = record.worker.is_some_and(|worker| is_same_process(&worker, register));
        Ok(match record.epoch.cmp(&register.epoch) {
            Ordering::Equal if same => Standing::Current,
            // Its own, made through a coordinator whose answer it never got, does not shut a worker out.
            Ordering::Greater if same => Standing::Over,
            Ordering::Equal | Ordering::Greater => Standing::Replaced,
            Ordering::Less => Standing::Over,
        })
    }

    /// The worker is heard under this epoch from now on. `None` if that is over here.
    fn open_session(self: &Arc<Self>, register: Register, epoch: u64, orders: Orders) -> Option<Session> {
        let worker_id = register.worker_id.clone();
        let effects = self.registry().known(register, epoch, self.now_ms());
        self.carry_out(effects);
        // One after the other: a loss between the two finds the life, or keeps it from being.
        let mut lives = self.lives();
        if !self.registry().rejoined(&worker_id, epoch, self.now_ms()) {
            return None;
        }
        let session = |life: &CancellationToken| Session {
            over: life.child_token(),
            orders: orders.clone(),
        };
        let session = match lives.get_mut(&worker_id).filter(|life| life.epoch == epoch) {
            Some(life) => {
                life.session.over.cancel();
                life.session = session(&life.over);
                life.session.clone()
            }
            None => {
                let over = self.shutdown.child_token();
                let session = session(&over);
                let life = Life {
                    epoch,
                    over,
                    link: None,
                    session: session.clone(),
                };
                self.routing.join(epoch);
                lives.insert(worker_id, life);
                session
            }
        };
        drop(lives);
        // Others may believe it lost.
        self.differs.notify_one();
        Some(session)
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

    /// A session's stream broke. Without effect if another session has taken its place.
    pub(crate) fn join_closed(self: &Arc<Self>, worker_id: &str, epoch: u64, session: &Session) {
        if session.over.is_cancelled() {
            return;
        }
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
            life.map(|life| life.session.orders.clone())
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

    /// Sends an order to every worker that is heard here. One that takes none is told at its next registration.
    pub(crate) fn order_all(&self, order: &CoordinatorOrder) {
        for life in self.lives().values() {
            let _ = life.session.orders.try_send(Ok(order.clone()));
        }
    }

    /// Tells the registry the time.
    pub(crate) fn tick(self: &Arc<Self>) {
        let effects = self.registry().tick(self.now_ms());
        self.carry_out(effects);
        self.routing.tick();
        self.poll_doors();
    }

    pub(super) fn carry_out(self: &Arc<Self>, effects: Vec<Effect>) {
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
                Effect::Lost {
                    worker_id,
                    epoch,
                    reason,
                } => {
                    tracing::warn!(%worker_id, epoch, %reason, "worker lost");
                    self.metrics.workers_lost.inc();
                    self.forget_load(&worker_id);
                    self.end_life(&worker_id, epoch, "the worker is lost");
                    self.differs.notify_one();
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
}
