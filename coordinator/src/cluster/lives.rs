//! The lives of workers: a registration through Raft, what is heard under it, the link that it keeps, and its end. Whose life
//! is over is the registry's word.

use super::{Cluster, DrainError, LINK_PAUSE_MAX, LINK_PAUSE_MIN, Life, Orders, REMOVE_ATTEMPTS_MAX, unix_ms};
use crate::link::{Link, Target};
use crate::registry::Effect;
use baton_proto::cluster::{BlockEvents, CoordinatorOrder, Drain, Heartbeat, Register, coordinator_order};
use baton_proto::state::{Command, RegisterWorker, RemoveWorker, command};
use baton_raftstore::{Applied, RaftStoreError};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

impl Cluster {
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
}
