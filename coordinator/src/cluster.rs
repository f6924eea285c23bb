//! The live cluster: the registry and the links behind their locks, the clock, and the tasks that carry out what the
//! registry wants. Deliberately holds no policy: who is lost is the registry's word, who gets work the router's.

mod follow;
mod lives;
mod placing;

pub(crate) use lives::{Standing, command};
pub(crate) use placing::Route;

use crate::admission::Doors;
use crate::group::Group;
use crate::link::Link;
use crate::metrics::{Metrics, RouterMetrics};
use crate::registry::{Registry, RegistryConfig};
use crate::router::Routing;
use crate::{CoordinatorConfig, CoordinatorError};
use baton_identity::Identity;
use baton_proto::cluster::CoordinatorOrder;
use baton_raftstore::RaftStore;
use baton_router::Policy;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// First pause before a link is tried again; doubles up to [`LINK_PAUSE_MAX`].
const LINK_PAUSE_MIN: Duration = Duration::from_millis(20);
/// Longest pause between attempts at a link: below the silence after which the worker would be lost anyway.
const LINK_PAUSE_MAX: Duration = Duration::from_millis(500);

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
    pub(crate) group: Arc<Group>,
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
    /// Told when the registry and the replicated state may differ.
    differs: Notify,
    /// Registrations of which a change is on its way through Raft.
    proposed: Mutex<HashSet<LifeId>>,
    /// Counts changes that may make room for a waiting request.
    changes: watch::Sender<u64>,
    clock: Instant,
}

/// One registration of a worker: its id and epoch.
pub(crate) type LifeId = (String, u64);

/// The running side of one registration that is heard here.
struct Life {
    epoch: u64,
    /// Ends the link's task and the Join session.
    over: CancellationToken,
    link: Option<Link>,
    /// The Join session. A later one under the same epoch takes its place.
    session: Session,
}

/// One Join stream of a worker.
#[derive(Clone)]
pub(crate) struct Session {
    /// Ends with the life, or when a later session takes its place.
    pub(crate) over: CancellationToken,
    /// What is sent to the worker.
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
        group: Arc<Group>,
        identity: Identity,
        shutdown: CancellationToken,
    ) -> Result<Arc<Self>, CoordinatorError> {
        let registry = Registry::new(RegistryConfig {
            heartbeat_interval_ms: config.heartbeat_interval_ms.into(),
            lost_after_ms: config.lost_after_ms.into(),
        });
        let policy = Policy {
            mode: config.routing.mode(),
            prefill_threshold_tokens: config.prefill_threshold_tokens,
            stay: config.stay,
            ..Policy::default()
        };
        let routing = Routing::new(policy, RouterMetrics::default());
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
            differs: Notify::new(),
            proposed: Mutex::new(HashSet::new()),
            group,
            changes: watch::Sender::new(0),
            clock: Instant::now(),
            config,
            store,
        };
        let now_ms = cluster.now_ms();
        for record in cluster.store.workers()? {
            if let Some(register) = record.worker {
                cluster.registry().known(register, record.epoch, now_ms);
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

    /// Whether a live worker serves the model, and the smallest context length of those that do.
    pub(crate) fn served(&self, model: &str) -> Option<u32> {
        let registry = self.registry();
        let serving = registry.serving(model, self.now_ms());
        let lengths = serving.map(|(worker, _)| worker.register.context_length);
        lengths.min()
    }
}

pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
