//! Puts a coordinator together and takes it apart again: store, cluster gRPC, HTTP gateway, ticks.
//!
//! At the end the gateway goes first, so that running requests finish and are settled while workers and store are
//! still there. Workers are ordered nothing: they look for a coordinator again, as after a crash.

use crate::accounts::{self, Accounts, Sealer};
use crate::backend::ClusterBackend;
use crate::cluster::Cluster;
use crate::cluster_service::Service;
use crate::files::{CHUNK_MESSAGE_BYTES_MAX, Disk, FilesService, MemberChunks};
use crate::group::{AddressBook, BATCH_BYTES_MAX, Group, Outbox, Peering, RaftService};
use crate::{CoordinatorConfig, CoordinatorError, MemberConfig};
use baton_gateway::{GatewayConfig, ServedModel};
use baton_identity::Identity;
use baton_proto::cluster::cluster_server::ClusterServer;
use baton_proto::files::files_server::FilesServer;
use baton_proto::raft::raft_server::RaftServer;
use baton_proto::state::Member;
use baton_raftstore::{RaftStore, RaftStoreConfig};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

/// How often the registry is told the time: a tenth of the shortest sensible heartbeat interval would be waste, and
/// this delays a loss by no more than a twentieth of the usual limit.
const TICK: Duration = Duration::from_millis(100);
/// A worker's connection is probed this often. Heartbeats tell more; this closes half-open connections.
const KEEP_ALIVE: Duration = Duration::from_secs(2);
/// Largest message from a worker on the cluster service: a registration is a few hundred bytes.
const REPORT_BYTES_MAX: usize = 64 << 10;
/// Streams on one worker's connection. A worker opens one, and another while the first is breaking.
const STREAMS_PER_CONNECTION_MAX: u32 = 8;
/// At the end, how long tasks may take to notice.
const TASKS_WAIT: Duration = Duration::from_secs(2);
/// Connections that the kernel holds until they are accepted; it cuts this at its own limit (4096 on Linux). The usual 128 is
/// overrun by a few hundred clients that come at once, and whoever is dropped tries again after a whole second.
const BACKLOG: u32 = 4096;

/// Where a coordinator serves, once it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ready {
    /// The OpenAI API.
    pub http_addr: SocketAddr,
    /// The gRPC service that workers join.
    pub cluster_addr: SocketAddr,
}

/// Runs a coordinator until `shutdown`, or until something it cannot do without fails. Tells `ready` once it serves.
pub async fn run(
    config: CoordinatorConfig,
    ready: oneshot::Sender<Ready>,
    shutdown: CancellationToken,
) -> Result<(), CoordinatorError> {
    config.validate()?;
    let identity = Identity::load(&config.identity_dir, &config.name)?;
    let http = bind(config.http_addr, "API")?;
    let joining = bind(config.cluster_addr, "cluster")?;
    let bound = Ready {
        http_addr: local_addr(&http, config.http_addr, "API")?,
        cluster_addr: local_addr(&joining, config.cluster_addr, "cluster")?,
    };
    let gateway_config = GatewayConfig {
        api_key: config.api_key.clone().or_else(|| config.gateway.api_key.clone()),
        ..config.gateway.clone()
    };
    gateway_config.validate(bound.http_addr)?;
    let over = CancellationToken::new();
    let peering = Peering::new(address_book(&config, &bound), identity.clone(), over.clone());
    let (models, store) = load(&config, peering.outbox()).await?;
    let disk = open_files(&config).await?;
    let sealer = Sealer::open(&config.data_dir, peering.book().me().clone())?;
    let accounts = Accounts::new(store.clone(), config.node_id, sealer);
    let housekeeping = accounts::keep(accounts.clone(), store.clone(), over.clone());
    let group = Group::new(store.clone(), peering);
    let cluster = Cluster::new(config, store, group, identity, over.clone())?;
    cluster.tasks.spawn(cluster.clone().follow());
    let mut grpc = tokio::spawn(serve_cluster(cluster.clone(), disk.clone(), joining));
    cluster.tasks.spawn(housekeeping);
    let chunks = MemberChunks::new(disk, cluster.group.clone(), cluster.store.clone());
    cluster.tasks.spawn(chunks.clone().tend(over.clone()));
    let backend = Arc::new(ClusterBackend(cluster.clone(), accounts, chunks));
    // Ends the gateway on our own failure too.
    let stop_gateway = shutdown.child_token();
    let mut gateway = tokio::spawn(baton_gateway::serve(
        http,
        gateway_config,
        backend,
        models,
        stop_gateway.clone(),
    ));
    tracing::info!(http = %bound.http_addr, cluster = %bound.cluster_addr, "serving");
    let _ = ready.send(bound);

    // At the beginning of the end: requests that still run are settled by whoever leads then.
    let handing_over = tokio::spawn({
        let (group, shutdown) = (cluster.group.clone(), shutdown.clone());
        async move {
            shutdown.cancelled().await;
            group.hand_over().await;
        }
    });
    let failed = |error: tokio::task::JoinError| CoordinatorError::Cluster(error.to_string());
    let mut result = tokio::select! {
        ended = &mut gateway => ended.map_err(failed)?.map_err(CoordinatorError::from),
        ended = &mut grpc => ended.map_err(failed)?,
        error = watch(&cluster) => Err(error),
    };
    stop_gateway.cancel();
    if !gateway.is_finished() {
        let ended = gateway.await.map_err(failed)?;
        result = result.and(ended.map_err(CoordinatorError::from));
    }
    if shutdown.is_cancelled() {
        // Bounded by itself.
        let _ = handing_over.await;
    } else {
        handing_over.abort();
    }
    over.cancel();
    cluster.tasks.close();
    if tokio::time::timeout(TASKS_WAIT, cluster.tasks.wait()).await.is_err() {
        tracing::warn!(tasks = cluster.tasks.len(), "tasks were still running at the end");
    }
    if !grpc.is_finished() {
        let _ = grpc.await;
    }
    // Connections of workers may hold the cluster a moment longer than we do; the next process must not wait for them.
    let _ = tokio::task::spawn_blocking(move || cluster.store.close()).await;
    result
}

/// Serves workers and the other members until the cluster's shutdown.
pub(crate) async fn serve_cluster(
    cluster: Arc<Cluster>,
    disk: Arc<Disk>,
    listener: TcpListener,
) -> Result<(), CoordinatorError> {
    let shutdown = cluster.shutdown.clone();
    let failed = |error: tonic::transport::Error| CoordinatorError::Cluster(error.to_string());
    let raft = RaftService::new(cluster.group.clone(), shutdown.clone());
    let raft = RaftServer::new(raft).max_decoding_message_size(BATCH_BYTES_MAX);
    let files = FilesServer::new(FilesService {
        disk,
        shutdown: shutdown.clone(),
    })
    .max_decoding_message_size(CHUNK_MESSAGE_BYTES_MAX)
    .max_encoding_message_size(CHUNK_MESSAGE_BYTES_MAX);
    let server = tonic::transport::Server::builder()
        .tls_config(cluster.identity().tonic_server())
        .map_err(failed)?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .max_concurrent_streams(Some(STREAMS_PER_CONNECTION_MAX))
        .add_service(raft)
        .add_service(files)
        .add_service(ClusterServer::new(Service(cluster)).max_decoding_message_size(REPORT_BYTES_MAX))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)));
    // Not a graceful end: a worker's stream has none by itself.
    tokio::select! {
        ended = server => ended.map_err(failed),
        () = shutdown.cancelled() => Ok(()),
    }
}

/// Tells the registry the time; returns when the store has failed, without which nothing can be settled.
async fn watch(cluster: &Arc<Cluster>) -> CoordinatorError {
    let mut ticks = tokio::time::interval(TICK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        cluster.tick();
        if let Some(error) = cluster.store.failure() {
            return error.into();
        }
    }
}

/// The members that the configuration names; a lone coordinator is where it listens.
pub(crate) fn address_book(config: &CoordinatorConfig, bound: &Ready) -> AddressBook {
    let member = |member: &MemberConfig| Member {
        id: member.id,
        name: member.name.clone(),
        cluster_addr: member.cluster_addr.clone(),
        api_url: member.api_url.clone(),
        ..Member::default()
    };
    let me = config.members.iter().find(|member| member.id == config.node_id);
    let me = me.map_or_else(
        || Member {
            id: config.node_id,
            name: config.name.clone(),
            cluster_addr: bound.cluster_addr.to_string(),
            api_url: match config.gateway.tls {
                None => format!("http://{}", bound.http_addr),
                Some(_) => format!("https://{}", bound.http_addr),
            },
            ..Member::default()
        },
        member,
    );
    AddressBook::new(me, config.members.iter().map(member))
}

/// The Raft settings that follow from the configuration.
pub(crate) fn raft_config(config: &CoordinatorConfig) -> RaftStoreConfig {
    let voters = match (config.join, config.members.is_empty()) {
        (true, _) => Vec::new(),
        (false, true) => vec![config.node_id],
        (false, false) => config.members.iter().map(|member| member.id).collect(),
    };
    let base = RaftStoreConfig::member(config.node_id, voters);
    RaftStoreConfig {
        log_entries_keep: config.log_entries_keep,
        tick_ms: config.election_timeout_ms / base.election_ticks as u64,
        ..base
    }
}

async fn load(config: &CoordinatorConfig, outbox: Outbox) -> Result<(Vec<ServedModel>, RaftStore), CoordinatorError> {
    let config = config.clone();
    let loading = tokio::task::spawn_blocking(move || {
        let models = config
            .models
            .iter()
            .map(|model| ServedModel::load(&model.name, &model.path));
        let models = models.collect::<Result<Vec<_>, _>>()?;
        let store = RaftStore::open_with_peers(&config.data_dir, &raft_config(&config), outbox)?;
        Ok((models, store))
    });
    loading
        .await
        .map_err(|error| CoordinatorError::Cluster(error.to_string()))?
}

/// The directory of uploaded files, beside the store.
async fn open_files(config: &CoordinatorConfig) -> Result<Arc<Disk>, CoordinatorError> {
    let dir = config.data_dir.join("files");
    let failed = |error: String| CoordinatorError::Config(format!("the directory of files: {error}"));
    let opening = tokio::task::spawn_blocking(move || Disk::open(&dir)).await;
    let disk = opening.map_err(|error| failed(error.to_string()))?;
    disk.map(Arc::new).map_err(|error| failed(error.to_string()))
}

/// As `TcpListener::bind`, with a longer queue.
fn listen(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = match addr {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A coordinator that restarts takes its port although old connections linger; elsewhere this would mean to share it.
    #[cfg(unix)]
    socket.set_reuseaddr(true)?;
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

fn bind(addr: SocketAddr, purpose: &'static str) -> Result<TcpListener, CoordinatorError> {
    listen(addr).map_err(|source| CoordinatorError::Bind { addr, purpose, source })
}

fn local_addr(listener: &TcpListener, addr: SocketAddr, purpose: &'static str) -> Result<SocketAddr, CoordinatorError> {
    let local = listener.local_addr();
    local.map_err(|source| CoordinatorError::Bind { addr, purpose, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three hundred clients connect before one is accepted, and none waits for a second try.
    #[tokio::test]
    async fn a_burst_of_connections_is_held() {
        let held_max = std::fs::read_to_string("/proc/sys/net/core/somaxconn");
        if held_max.is_ok_and(|text| text.trim().parse::<u32>().is_ok_and(|max| max < 512)) {
            eprintln!("skipped: this kernel holds fewer");
            return;
        }
        let listener = listen(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port");
        let addr = listener.local_addr().expect("bound");
        let mut clients = Vec::new();
        for _ in 0..300 {
            let client = tokio::time::timeout(Duration::from_secs(30), tokio::net::TcpStream::connect(addr));
            clients.push(client.await.expect("the kernel holds it").expect("connected"));
        }
        assert_eq!(clients.len(), 300);
    }
}
