//! Drives [`baton_admission`], one queue per model: tells it of the workers and the time, wakes those whose turn it is, and
//! counts. Deliberately decides nothing itself.
//!
//! Locks are taken in one order, a model's queue and then the registry, and held for a decision, never for a wait.

use crate::cluster::Cluster;
use crate::metrics::Metrics;
use crate::placement::Placed;
use crate::registry::{Registry, State};
use baton_admission::{
    Admission, Ask, Decision, Fleet, Outcome, Refusal, Targets, Tenant, Ticket, Used, WorkerLoad, WorkerRole,
};
use baton_gateway::{BackendError, Job, Placement};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::oneshot;

/// The queues of all configured models.
pub(crate) struct Doors(HashMap<String, Mutex<Door>>);

/// One model's queue, and who waits in it.
struct Door {
    core: Admission,
    waiting: HashMap<Ticket, oneshot::Sender<Result<(), Refusal>>>,
}

impl Doors {
    pub(crate) fn new(config: &crate::CoordinatorConfig) -> Self {
        let door = || Door {
            core: Admission::new(config.admission.clone()),
            waiting: HashMap::new(),
        };
        Self(
            config
                .models
                .iter()
                .map(|model| (model.name.clone(), Mutex::new(door())))
                .collect(),
        )
    }

    fn door(&self, model: &str) -> Option<MutexGuard<'_, Door>> {
        self.0.get(model).map(lock)
    }
}

fn lock(door: &Mutex<Door>) -> MutexGuard<'_, Door> {
    door.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Door {
    /// Decides what can be decided and wakes those concerned.
    fn poll(&mut self, model: &str, fleet: &Fleet<'_>, now: Duration, metrics: &Metrics) {
        for Decision { ticket, outcome } in self.core.poll(fleet, now) {
            let decided = match outcome {
                Outcome::Granted { waited } => {
                    metrics.queued_for(model, waited);
                    Ok(())
                }
                Outcome::Refused(refusal) => Err(refusal),
            };
            // Who does not listen any more is about to give its place back.
            if let Some(waiting) = self.waiting.remove(&ticket) {
                let _ = waiting.send(decided);
            }
        }
        metrics.queue_length(model, self.core.waiting());
    }
}

impl Cluster {
    /// Waits until the request may be placed.
    pub(crate) async fn admit(self: &Arc<Self>, job: &Job) -> Result<Admitted, BackendError> {
        let admitted = self.wait_for_turn(job).await;
        let outcome = match &admitted {
            Ok(_) => "admitted",
            Err(refusal) => refusal.reason.word(),
        };
        self.metrics.decided(&job.model, &job.tenant, outcome);
        admitted.map_err(|refusal| refused(&refusal, &job.model))
    }

    async fn wait_for_turn(self: &Arc<Self>, job: &Job) -> Result<Admitted, Refusal> {
        let ask = Ask {
            tenant: job.share.name.clone(),
            share: Tenant {
                weight: job.share.weight,
                // The API's priorities are vLLM's, where lower is first.
                priority_max: job.share.priority_min.saturating_neg(),
            },
            priority: job.priority,
            prompt_tokens: u32::try_from(job.prompt.len()).unwrap_or(u32::MAX),
            uncached_tokens: None,
            max_tokens: job.max_tokens,
            targets: Targets {
                ttft: job.targets.ttft,
                itl: job.targets.itl,
            },
        };
        let (send, mut decided) = oneshot::channel();
        let (admitted, queued) = {
            let Some(mut door) = self.doors.door(&job.model) else {
                return Err(Refusal {
                    reason: baton_admission::Reason::NoWorker,
                    retry_after: Duration::from_secs(1),
                    expected: None,
                });
            };
            let now = self.now();
            let registry = self.registry();
            let fleet = self.fleet(&registry, &job.model);
            let ticket = door.core.offer(&ask, &fleet, now)?;
            // Before anything is decided of it: dropped, it gives the place back, whatever that was.
            let admitted = Admitted {
                cluster: self.clone(),
                model: job.model.clone(),
                ticket,
                started: false,
                used: Used::default(),
            };
            door.waiting.insert(ticket, send);
            door.poll(&job.model, &fleet, now, &self.metrics);
            (admitted, door.core.waiting())
        };
        // Reading can begin while it waits.
        let decided = match decided.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => {
                self.hint_queued(job, queued);
                decided.await.ok()
            }
            decided => decided.ok(),
        };
        match decided {
            Some(Ok(())) => Ok(admitted),
            Some(Err(refusal)) => Err(refusal),
            // The sender is dropped unused only with the whole cluster.
            None => Err(self.no_capacity(&job.model)),
        }
    }

    /// Requests that wait to be let in.
    #[cfg(test)]
    pub(crate) fn queued(&self, model: &str) -> usize {
        self.doors.door(model).map_or(0, |door| {
            door.core.check().expect("invariants");
            assert_eq!(door.core.waiting(), door.waiting.len(), "each has somebody who waits");
            door.core.waiting()
        })
    }

    /// Something happened that may let waiting requests in, or turn them away.
    pub(crate) fn poll_doors(&self) {
        for model in self.doors.0.keys() {
            self.poll_door(model);
        }
    }

    fn poll_door(&self, model: &str) {
        if let Some(mut door) = self.doors.door(model)
            && door.core.waiting() > 0
        {
            let registry = self.registry();
            let fleet = self.fleet(&registry, model);
            door.poll(model, &fleet, self.now(), &self.metrics);
        }
    }

    /// A worker told of its queue.
    pub(crate) fn observe_load(&self, worker_id: &str, waiting: u32, pending_tokens: u64) {
        let model = match self.config.models.as_slice() {
            [only] => Some(only.name.clone()),
            _ => {
                let registry = self.registry();
                let mut workers = registry.workers(self.now_ms());
                let found = workers.find(|(worker, _)| worker.register.worker_id == worker_id);
                found.map(|(worker, _)| worker.register.model.clone())
            }
        };
        let Some(model) = model else { return };
        if let Some(mut door) = self.doors.door(&model) {
            door.core.heartbeat(worker_id, waiting, pending_tokens);
        }
        self.poll_door(&model);
    }

    /// A worker is lost.
    pub(crate) fn forget_load(&self, worker_id: &str) {
        for door in self.doors.0.values() {
            lock(door).core.worker_gone(worker_id);
        }
    }

    pub(crate) fn no_capacity(&self, model: &str) -> Refusal {
        let known = self.doors.door(model).map(|door| door.core.no_capacity());
        known.unwrap_or(Refusal {
            reason: baton_admission::Reason::NoCapacity,
            retry_after: Duration::from_secs(1),
            expected: None,
        })
    }

    fn fleet<'a>(&self, registry: &'a Registry, model: &str) -> Fleet<'a> {
        let workers = registry
            .workers(self.now_ms())
            .filter(|(worker, state)| matches!(state, State::Ready | State::Suspect) && worker.register.model == model)
            .map(|(worker, _)| WorkerLoad {
                id: &worker.register.worker_id,
                role: match worker.role {
                    baton_gateway::WorkerRole::Prefill => WorkerRole::Prefill,
                    baton_gateway::WorkerRole::Decode => WorkerRole::Decode,
                    baton_gateway::WorkerRole::Combined => WorkerRole::Combined,
                },
                streams: worker.heartbeat.running,
                full: worker.assigned >= self.config.requests_per_worker_max,
                prefill_tokens_per_s: worker.heartbeat.prefill_tokens_per_s,
                decode_step: Duration::from_micros(worker.heartbeat.decode_step_us.into()),
            });
        Fleet {
            workers: workers.collect(),
            unstarted_max: self.config.admission.worker_unstarted_max,
            prefill_max: Duration::from_millis(self.config.admission.worker_prefill_ms_max),
        }
    }
}

/// A request's place: in the queue, and then among those that run. Given back on drop.
pub(crate) struct Admitted {
    cluster: Arc<Cluster>,
    model: String,
    ticket: Ticket,
    /// The first token of the present placement was told.
    started: bool,
    used: Used,
}

impl Admitted {
    /// It is on these workers now.
    pub(crate) fn placed(&mut self, placed: &Placed) {
        let Placement {
            decode_worker_id: decode,
            prefill_worker_id: prefill,
            ..
        } = placed.placement(0);
        let computes = if prefill.is_empty() { &decode } else { &prefill };
        self.started = false;
        if let Some(mut door) = self.cluster.doors.door(&self.model) {
            door.core.placed(self.ticket, &decode, computes, self.cluster.now());
        }
        self.cluster.poll_door(&self.model);
    }

    /// It has tokens: the first ones count.
    pub(crate) fn progressed(&mut self) {
        if std::mem::replace(&mut self.started, true) {
            return;
        }
        let first = self.cluster.doors.door(&self.model).and_then(|mut door| {
            let now = self.cluster.now();
            door.core.first_token(self.ticket, now)
        });
        if let Some(first) = first {
            self.cluster
                .metrics
                .predicted(&self.model, first.predicted, first.measured);
        }
        self.cluster.poll_door(&self.model);
    }

    /// What it used in all; to be told before it is dropped.
    pub(crate) fn used(&mut self, cached_tokens: u32, completion_tokens: u32, complete: bool) {
        self.used = Used {
            cached_tokens,
            completion_tokens,
            complete,
        };
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        if let Some(mut door) = self.cluster.doors.door(&self.model) {
            door.waiting.remove(&self.ticket);
            door.core.cancel(self.ticket);
            door.core.release(self.ticket, self.used, self.cluster.now());
            self.cluster.metrics.queue_length(&self.model, door.core.waiting());
        }
        self.cluster.poll_door(&self.model);
    }
}

/// A refusal as the gateway knows it.
pub(crate) fn refused(refusal: &Refusal, model: &str) -> BackendError {
    use baton_admission::Reason;
    let ms = |time: Duration| time.as_millis();
    let expected = refusal.expected.map(ms).unwrap_or_default();
    let reason = match refusal.reason {
        Reason::NoWorker => return BackendError::NoWorker { model: model.into() },
        Reason::TtftTarget if expected > 0 => {
            format!("its first token is expected after {expected} ms, later than the target")
        }
        Reason::TtftTarget => "its first token can no longer come within the target".into(),
        Reason::ItlTarget => format!("tokens come every {expected} ms, slower than the target"),
        Reason::TenantShare => "this tenant already has its share of the queue".into(),
        Reason::QueueFull => "the queue is full".into(),
        Reason::WaitTimeout => "its turn did not, or would not, come in time".into(),
        Reason::NoCapacity => "every worker has as many requests as it takes".into(),
    };
    BackendError::Overloaded {
        word: refusal.reason.word(),
        reason,
        retry_after: refusal.retry_after,
    }
}
