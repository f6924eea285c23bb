//! [`baton_gateway::Backend`] over the live cluster.

use crate::admission::refused;
use crate::cluster::{Cluster, DrainError, PlaceError};
use crate::request::{Running, first_generate};
use baton_gateway::{
    Backend, BackendError, ClusterSnapshot, CoordinatorGroup, Generation, GroupChange, Job, ModelInfo, WorkerStatus,
};
use baton_proto::state::UsageRecord;
use baton_raftstore::RaftStoreError;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// Longest time for a record to be settled, elections included: several of them, each at most twice the election timeout,
/// and less than a client waits for the end of a stream that it has.
const SETTLE_MAX: Duration = Duration::from_secs(20);
/// Longest wait for one attempt. A proposal that was forwarded to a leader that died is answered by nobody; a record is
/// settled once, however often it is proposed.
const SETTLE_ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// Pause between attempts, which an election needs anyway.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);

/// The gateway's view of this coordinator's cluster.
pub(crate) struct ClusterBackend(pub(crate) Arc<Cluster>);

impl Backend for ClusterBackend {
    fn models(&self) -> Vec<ModelInfo> {
        let models = self.0.config.models.iter();
        models
            .map(|model| {
                let served = self.0.served(&model.name);
                ModelInfo {
                    id: model.name.clone(),
                    created_unix_s: self.0.started_unix_s,
                    context_length: served.unwrap_or(0),
                    served: served.is_some(),
                }
            })
            .collect()
    }

    async fn generate(&self, job: Job) -> Result<Generation, BackendError> {
        let cluster = &self.0;
        if cluster.shutdown.is_cancelled() {
            return Err(BackendError::Unavailable {
                reason: "it is shutting down".into(),
            });
        }
        if !cluster.config.models.iter().any(|model| model.name == job.model) {
            return Err(BackendError::UnknownModel { model: job.model });
        }
        let admitted = cluster.admit(&job).await?;
        let span = tracing::info_span!("request", request_id = %job.request_id, traceparent = %job.traceparent);
        let placed = match span.in_scope(|| cluster.place(&job.model, first_generate(&job), &[])) {
            Ok(placed) => placed,
            Err(PlaceError::Nobody) => return Err(BackendError::NoWorker { model: job.model }),
            Err(PlaceError::Full) => return Err(refused(&cluster.no_capacity(&job.model), &job.model)),
        };
        let cancel = CancellationToken::new();
        let (sender, generation) = Generation::channel({
            let cancel = cancel.clone();
            move || cancel.cancel()
        });
        // Known to the gateway from the first moment on, not only once the task has run.
        sender.placed(placed.placement(1));
        let running = Running::new(cluster.clone(), job, sender, cancel, admitted);
        cluster.tasks.spawn(running.run(placed).instrument(span));
        Ok(generation)
    }

    async fn settle(&self, record: UsageRecord) -> Result<(), BackendError> {
        let deadline = Instant::now() + SETTLE_MAX;
        loop {
            let attempt = tokio::time::timeout(SETTLE_ATTEMPT_MAX, self.0.store.settle(record.clone())).await;
            let reason = match attempt {
                Ok(Ok(_)) => return Ok(()),
                Ok(Err(
                    error @ (RaftStoreError::NoLeader
                    | RaftStoreError::LeaderChanged
                    | RaftStoreError::Timeout { .. }
                    | RaftStoreError::Overloaded { .. }),
                )) => error.to_string(),
                Ok(Err(error)) => return Err(not_committed(&error.to_string())),
                Err(_) => format!("no answer within {SETTLE_ATTEMPT_MAX:?}"),
            };
            if Instant::now() + SETTLE_PAUSE >= deadline {
                return Err(not_committed(&reason));
            }
            tracing::warn!(request_id = %record.request_id, %reason, "settling again");
            tokio::time::sleep(SETTLE_PAUSE).await;
        }
    }

    fn has_quorum(&self) -> bool {
        self.0.group.has_leader()
    }

    async fn coordinators(&self) -> Result<CoordinatorGroup, BackendError> {
        let report = self.0.group.report().await;
        report.map_err(|error| BackendError::Unavailable {
            reason: error.to_string(),
        })
    }

    async fn change_group(&self, change: GroupChange) -> Result<(), BackendError> {
        self.0.group.change(change).await
    }

    fn save_snapshot(&self, to: &mut dyn std::io::Write) -> Result<(), BackendError> {
        let info = self.0.store.save(to).map_err(|error| BackendError::Unavailable {
            reason: error.to_string(),
        })?;
        tracing::info!(
            applied_index = info.applied_index,
            bytes = info.bytes,
            "a backup was taken"
        );
        Ok(())
    }

    fn snapshot(&self) -> ClusterSnapshot {
        ClusterSnapshot {
            workers: self.0.registry().statuses(self.0.now_ms()),
        }
    }

    fn drain(&self, worker_id: &str, deadline: Duration) -> Result<WorkerStatus, BackendError> {
        let unknown = || BackendError::UnknownWorker {
            worker_id: worker_id.to_owned(),
        };
        let deadline_ms = u32::try_from(deadline.as_millis()).unwrap_or(u32::MAX);
        self.0.drain(worker_id, deadline_ms).map_err(|error| match error {
            DrainError::Unknown => unknown(),
            DrainError::Unreachable => BackendError::Unavailable {
                reason: format!("{worker_id} gets no new work, but could not be told to leave; ask again in a moment"),
            },
        })?;
        let workers = self.snapshot().workers;
        workers
            .into_iter()
            .find(|worker| worker.id == worker_id)
            .ok_or_else(unknown)
    }

    fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        self.0.metrics.register(registry);
    }
}

fn not_committed(reason: &str) -> BackendError {
    BackendError::Unavailable {
        reason: format!("the usage record could not be committed: {reason}"),
    }
}
