//! Keeps the registry and the replicated state together, level by level and not event by event: whatever was missed in
//! between, the next look finds it.
//!
//! ```text
//! the state has it, the registry does not      known: another member registered it
//! the registry has it, the state does not      removed: over, whatever this member hears
//! lost here, and it said goodbye, or this      RemoveWorker
//!   member is alone
//! lost here, others may still hear it          WitnessWorker(lost): most voters' word removes it
//! heard here, and witnessed lost before        WitnessWorker(not lost)
//! ```
//!
//! A registration that is newer than the version of the state looked at is left alone.

use super::lives::command;
use super::{Cluster, LifeId, unix_ms};
use baton_proto::state::{RemoveWorker, WitnessWorker, WorkerRecord, command};
use baton_raftstore::RaftStoreError;
use baton_state::view;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How often the state is looked at, if something was applied since: bounds how late a member learns of a worker that joined
/// elsewhere. (The worker itself comes sooner.)
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How often the two are compared whether anything happened or not, so that what could not be proposed is proposed again.
const COMPARE_EVERY: Duration = Duration::from_secs(1);

impl Cluster {
    /// Runs until the shutdown.
    pub(crate) async fn follow(self: Arc<Self>) {
        let mut compared_at = 0;
        let mut due = tokio::time::Instant::now();
        loop {
            let told = tokio::select! {
                () = self.shutdown.cancelled() => return,
                () = self.differs.notified() => true,
                () = tokio::time::sleep(LOOK_EVERY) => false,
            };
            let applied = self.store.status().applied_index;
            if !told && applied == compared_at && tokio::time::Instant::now() < due {
                continue;
            }
            compared_at = applied;
            due = tokio::time::Instant::now() + COMPARE_EVERY;
            if let Err(error) = self.compare() {
                tracing::warn!(%error, "the replicated state cannot be read");
            }
            if let Err(error) = self.group.follow(&self) {
                tracing::warn!(%error, "the members in the replicated state cannot be read");
            }
        }
    }

    fn compare(self: &Arc<Self>) -> Result<(), RaftStoreError> {
        let state = self.store.state()?;
        let last_epoch = view::last_epoch(&state)?;
        let records: HashMap<String, WorkerRecord> = view::workers(&state)?
            .into_iter()
            .map(|record| (record.worker.clone().unwrap_or_default().worker_id, record))
            .collect();
        let now_ms = self.now_ms();
        let mut changes = Vec::new();
        let mut over: Vec<LifeId> = Vec::new();
        {
            let registry = self.registry();
            for (worker, _) in registry.workers(now_ms) {
                let id = &worker.register.worker_id;
                match records.get(id).filter(|record| record.epoch == worker.epoch) {
                    None if worker.epoch <= last_epoch => over.push((id.clone(), worker.epoch)),
                    None => {}
                    Some(record) => {
                        let witnessed = record.lost_by.contains(&self.group.id());
                        let alone = self.group.is_alone();
                        let kind = match worker.lost() {
                            Some(reason) if worker.left() || alone => Some(removal(record, reason)),
                            Some(_) if !witnessed => Some(self.witness(record, true)),
                            None if witnessed && worker.is_heard() => Some(self.witness(record, false)),
                            _ => None,
                        };
                        changes.extend(kind.map(|kind| ((id.clone(), worker.epoch), kind)));
                    }
                }
            }
        }
        for (id, epoch) in over {
            let effects = self.registry().removed(&id, epoch, now_ms);
            self.carry_out(effects);
        }
        for record in records.into_values() {
            if let Some(register) = record.worker {
                let effects = self.registry().known(register, record.epoch, now_ms);
                self.carry_out(effects);
            }
        }
        for (life, kind) in changes {
            self.propose_change(life, kind);
        }
        Ok(())
    }

    fn witness(&self, record: &WorkerRecord, lost: bool) -> command::Kind {
        let worker = record.worker.as_ref();
        command::Kind::WitnessWorker(WitnessWorker {
            worker_id: worker.map(|worker| worker.worker_id.clone()).unwrap_or_default(),
            epoch: record.epoch,
            member_id: self.group.id(),
            lost,
            voters: self.group.voters(),
        })
    }

    /// Proposes, unless something about this registration is on its way already. What fails is found again.
    fn propose_change(self: &Arc<Self>, life: LifeId, kind: command::Kind) {
        let proposed = || self.proposed.lock().unwrap_or_else(PoisonError::into_inner);
        if !proposed().insert(life.clone()) {
            return;
        }
        let cluster = self.clone();
        self.tasks.spawn(async move {
            let done = tokio::select! {
                done = cluster.store.propose(command(kind)) => done,
                () = cluster.shutdown.cancelled() => return,
            };
            if let Err(error) = done {
                tracing::warn!(worker_id = %life.0, epoch = life.1, %error, "what is seen of a worker was not committed");
            }
            let mut proposed = cluster.proposed.lock().unwrap_or_else(PoisonError::into_inner);
            proposed.remove(&life);
        });
    }
}

fn removal(record: &WorkerRecord, reason: &str) -> command::Kind {
    let worker = record.worker.as_ref();
    command::Kind::RemoveWorker(RemoveWorker {
        worker_id: worker.map(|worker| worker.worker_id.clone()).unwrap_or_default(),
        epoch: record.epoch,
        reason: reason.to_owned(),
        at_unix_ms: unix_ms(),
    })
}
