//! The coordinator with fake workers over real mTLS on loopback: only the engine is made up.

mod accounts;
mod admission;
mod drain;
mod fake_worker;
mod files;
mod group;
mod hangs;
mod lives;
mod read_ahead;
mod requests;
mod routing;
mod whole;

use crate::accounts::{Accounts, Sealer};
use crate::backend::ClusterBackend;
use crate::cluster::Cluster;
use crate::files::{Disk, MemberChunks};
use crate::group::{Group, Peering};
use crate::{CoordinatorConfig, MemberConfig, ModelConfig, Ready, server};
use baton_gateway::{Backend, Generation, Job, WorkerState, WorkerStatus};
use baton_identity::{Authority, Identity, Role};
use baton_proto::cluster::Role as WorkerRole;
use baton_proto::worker::{Finish, Sampling};
use baton_raftstore::RaftStore;
use fake_worker::FakeWorker;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

/// Bound on every wait of a test; reached only by a failure.
const PATIENCE: Duration = Duration::from_secs(20);
const MODEL: &str = "m";
const MODEL_DIGEST: [u8; 32] = [5; 32];

/// A coordinator without its HTTP front end.
struct Coordinator {
    cluster: Arc<Cluster>,
    backend: ClusterBackend,
    accounts: Arc<Accounts>,
    cluster_addr: SocketAddr,
    authority: Authority,
    _dir: Arc<tempfile::TempDir>,
}

impl Coordinator {
    async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    async fn start_with(adjust: impl FnOnce(&mut CoordinatorConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path());
        adjust(&mut config);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self::serve(Arc::new(dir), config, listener)
    }

    /// Three members of one group.
    async fn start_group(adjust: impl Fn(&mut CoordinatorConfig)) -> Vec<Self> {
        let dir = Arc::new(tempfile::tempdir().unwrap());
        let mut listeners = Vec::new();
        let mut members = Vec::new();
        for index in 0..3 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            members.push(MemberConfig {
                id: index + 1,
                name: format!("coordinator-{index}"),
                cluster_addr: listener.local_addr().unwrap().to_string(),
                api_url: String::new(),
            });
            listeners.push(listener);
        }
        let start = |(listener, member): (TcpListener, &MemberConfig)| {
            let mut config = config(dir.path());
            config.name.clone_from(&member.name);
            config.node_id = member.id;
            config.data_dir = dir.path().join(&member.name);
            config.members.clone_from(&members);
            adjust(&mut config);
            config.validate().unwrap();
            Self::serve(dir.clone(), config, listener)
        };
        listeners.into_iter().zip(&members).map(start).collect()
    }

    /// A member to be of this one's group, which is to be added.
    async fn newcomer(&self, id: u64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let me = MemberConfig {
            id,
            name: format!("coordinator-{}", id - 1),
            cluster_addr: listener.local_addr().unwrap().to_string(),
            api_url: String::new(),
        };
        let mut config = config(self._dir.path());
        config.name.clone_from(&me.name);
        config.node_id = id;
        config.data_dir = self._dir.path().join(&me.name);
        config.members = self.cluster.config.members.iter().cloned().chain([me]).collect();
        config.join = true;
        config.validate().unwrap();
        Self::serve(self._dir.clone(), config, listener)
    }

    fn serve(dir: Arc<tempfile::TempDir>, config: CoordinatorConfig, listener: TcpListener) -> Self {
        let authority = Authority::load_or_create(&dir.path().join("identity")).unwrap();
        let identity = authority.issue(Role::Coordinator, &config.name).unwrap();
        let cluster_addr = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let bound = Ready {
            http_addr: cluster_addr,
            cluster_addr,
        };
        let peering = Peering::new(
            server::address_book(&config, &bound),
            identity.clone(),
            shutdown.clone(),
        );
        let store =
            RaftStore::open_with_peers(&config.data_dir, &server::raft_config(&config), peering.outbox()).unwrap();
        let sealer = Sealer::open(&config.data_dir, peering.book().me().clone()).unwrap();
        let accounts = Accounts::new(store.clone(), config.node_id, sealer);
        let group = Group::new(store.clone(), peering);
        let cluster = Cluster::new(config, store, group, identity, shutdown).unwrap();
        tokio::spawn(cluster.clone().follow());
        let disk = Arc::new(Disk::open(&cluster.config.data_dir.join("files")).unwrap());
        tokio::spawn(server::serve_cluster(cluster.clone(), disk.clone(), listener));
        let chunks = MemberChunks::new(disk, cluster.group.clone(), cluster.store.clone());
        tokio::spawn(chunks.clone().tend(cluster.shutdown.clone()));
        let ticking = cluster.clone();
        tokio::spawn(async move {
            while !ticking.shutdown.is_cancelled() {
                ticking.tick();
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        Self {
            backend: ClusterBackend(cluster.clone(), accounts.clone(), chunks),
            accounts,
            cluster,
            cluster_addr,
            authority,
            _dir: dir,
        }
    }

    /// As `kill -9`, as far as others can tell: nothing is sent any more, and connections break.
    fn kill(&self) {
        self.cluster.shutdown.cancel();
        self.cluster.store.close();
    }

    fn worker_identity(&self, name: &str) -> Identity {
        self.authority.issue(Role::Worker, name).unwrap()
    }

    fn status(&self, id: &str) -> Option<WorkerStatus> {
        self.backend
            .snapshot()
            .workers
            .into_iter()
            .find(|worker| worker.id == id)
    }

    fn worker(&self, id: &str, role: WorkerRole) -> FakeWorker {
        FakeWorker::start(id, role, self.cluster_addr, self.worker_identity(id))
    }

    fn stalling(&self, id: &str, role: WorkerRole, tokens: i64) -> FakeWorker {
        FakeWorker::start_stalling(id, role, self.cluster_addr, self.worker_identity(id), tokens)
    }

    async fn wait_ready(&self, id: &str) {
        until(&format!("{id} ready"), || {
            self.status(id).is_some_and(|status| status.state == WorkerState::Ready)
        })
        .await;
    }

    async fn wait_lost(&self, id: &str) {
        until(&format!("{id} lost"), || {
            self.status(id).is_some_and(|status| status.state == WorkerState::Lost)
        })
        .await;
    }
}

impl Drop for Coordinator {
    fn drop(&mut self) {
        self.cluster.shutdown.cancel();
    }
}

fn config(dir: &std::path::Path) -> CoordinatorConfig {
    let model = ModelConfig {
        name: MODEL.into(),
        path: dir.join("model"),
    };
    let mut config = CoordinatorConfig::new(dir.join("data"), dir.join("identity"), vec![model]);
    config.heartbeat_interval_ms = 50;
    // Long: a busy machine must not lose workers by itself. Tests of silence set it lower.
    config.lost_after_ms = 15_000;
    config.prefill_threshold_tokens = 8;
    config
}

/// Waits for a condition, which something else brings about.
async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let reached = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, reached)
        .await
        .unwrap_or_else(|_| panic!("never: {what}"));
}

fn job(prompt: &[u32], max_tokens: u32) -> Job {
    Job {
        request_id: format!("r-{max_tokens}"),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".into(),
        model: MODEL.into(),
        prompt: prompt.into(),
        max_tokens,
        sampling: Sampling {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            seed: 11,
            ..Sampling::default()
        },
        stop_token_ids: vec![fake_worker::STOP],
        cache_salt: b"salt".to_vec(),
        tenant: "default".into(),
        priority: 0,
        targets: Default::default(),
    }
}

/// Tokens up to a count, or to the finish.
async fn read(generation: &mut Generation, count: usize) -> (Vec<u32>, Option<Finish>) {
    let mut tokens = Vec::new();
    let reading = async {
        while tokens.len() < count {
            let event = generation.next().await.expect("an event before the finish");
            tokens.extend(event.tokens);
            if event.finish.is_some() {
                return event.finish;
            }
        }
        None
    };
    let finish = tokio::time::timeout(PATIENCE, reading).await.expect("tokens");
    (tokens, finish)
}
