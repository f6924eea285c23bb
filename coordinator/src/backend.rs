//! [`baton_gateway::Backend`] over the live cluster.

use crate::accounts::Accounts;
use crate::admission::refused;
use crate::cluster::{Cluster, DrainError, PlaceError};
use crate::files::MemberChunks;
use crate::request::{Running, first_generate};
use baton_gateway::{
    AccountStore, Backend, BackendError, ChunkStore, ClusterSnapshot, CoordinatorGroup, Generation, GroupChange, Job,
    ModelInfo, WorkerStatus,
};
use baton_proto::state::UsageRecord;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

/// The gateway's view of this coordinator's cluster.
pub(crate) struct ClusterBackend(
    pub(crate) Arc<Cluster>,
    pub(crate) Arc<Accounts>,
    pub(crate) Arc<MemberChunks>,
);

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
        sender.placed(placed.placement(1), placed.decode.worker.1);
        let running = Running::new(cluster.clone(), job, sender, cancel, admitted);
        cluster.tasks.spawn(running.run(placed).instrument(span));
        Ok(generation)
    }

    async fn settle(&self, record: UsageRecord) -> Result<(), BackendError> {
        self.1.settle(record).await
    }

    fn revision(&self, model: &str) -> Option<String> {
        self.0.revision(model)
    }

    fn accounts(&self) -> Option<Arc<dyn AccountStore>> {
        Some(self.1.clone())
    }

    fn chunks(&self) -> Option<Arc<dyn ChunkStore>> {
        Some(self.2.clone())
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
