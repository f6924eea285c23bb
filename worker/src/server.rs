//! Serves an engine: engine thread, transfer agent, gRPC server, membership; and stops them in order.

use crate::block_teller::BlockTeller;
use crate::engine_thread::{self, EngineHandle};
use crate::fill::FillContext;
use crate::grammars::Grammars;
use crate::mock::{EngineKind, MockAnswers};
use crate::peers::Peers;
use crate::service::{AttachService, Service};
use crate::{WorkerConfig, WorkerError, drain, membership, tiers};
use baton_engine::{Engine, SchedulerConfig};
use baton_identity::Identity;
use baton_kvtransfer::{Agent, AgentConfig, TransferLimits, TransportOptions};
use baton_model::KvGeometry;
use baton_proto::limits;
use baton_proto::worker::worker_server::WorkerServer;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::TcpIncoming;

/// Silence after which a caller's connection is probed, and how long the answer may take.
const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// What a starting worker reports, for progress bars and logs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Startup {
    /// Weights being made ready.
    Loading {
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The server takes requests.
    Listening {
        /// gRPC address.
        addr: SocketAddr,
        /// KV transfer address (UDP).
        transfer_addr: SocketAddr,
    },
    /// A coordinator has taken this worker into the cluster.
    Registered {
        /// The epoch of this registration.
        epoch: u64,
    },
}

/// What others are told of this worker.
pub(crate) struct Advertised {
    pub(crate) worker_id: String,
    pub(crate) addr: SocketAddr,
    pub(crate) transfer_addr: SocketAddr,
    pub(crate) geometry: KvGeometry,
    pub(crate) kv_digest: [u8; 32],
    pub(crate) model_digest: [u8; 32],
    pub(crate) total_blocks: u32,
    pub(crate) context_length: usize,
    epoch: AtomicU64,
}

impl Advertised {
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    pub(crate) fn set_epoch(&self, epoch: u64) {
        self.epoch.store(epoch, Ordering::Release);
    }
}

/// Serves an engine that is ready, until `shutdown` or an order to drain, and then until nothing is left or time is up
/// (see the module `drain`). `model_digest` names the weights, so that only workers with the
/// same ones exchange KV blocks.
pub async fn serve(
    config: WorkerConfig,
    engine: Box<dyn Engine>,
    model_digest: [u8; 32],
    startup: Arc<dyn Fn(Startup) + Send + Sync>,
    shutdown: CancellationToken,
) -> Result<(), WorkerError> {
    let identity = Identity::load(&config.identity_dir, &config.worker_id)?;
    let geometry = engine.geometry();
    let kv_digest = geometry.digest(&model_digest);
    let region = engine.region();
    let agent = Agent::bind(AgentConfig {
        name: config.worker_id.clone(),
        bind: config.transfer_addr,
        identity: &identity,
        digest: kv_digest,
        limits: TransferLimits::default(),
        transports: TransportOptions {
            nixl: config.kv_nixl,
            ..TransportOptions::default()
        },
    })
    .map_err(|error| WorkerError::Transfer(error.to_string()))?;
    let bind_error = |source| WorkerError::Bind {
        addr: config.listen_addr,
        source,
    };
    let listener = tokio::net::TcpListener::bind(config.listen_addr)
        .await
        .map_err(bind_error)?;
    let advertised = Arc::new(Advertised {
        worker_id: config.worker_id.clone(),
        addr: config.advertise(listener.local_addr().map_err(bind_error)?)?,
        transfer_addr: config.advertise(agent.local_addr())?,
        geometry,
        kv_digest,
        model_digest,
        total_blocks: engine.total_blocks(),
        context_length: engine.context_length(),
        epoch: AtomicU64::new(0),
    });
    let fills = FillContext {
        agent: agent.clone(),
        transfer_addr: advertised.transfer_addr,
        region: region.clone(),
        geometry,
        peers: Peers::new(identity.clone(), config.worker_id.clone(), kv_digest),
        timeout: Duration::from_millis(config.fill_timeout_ms),
        compression: config.kv_compression,
    };
    let scheduler = SchedulerConfig {
        batch_tokens_max: config.batch_tokens_max,
        step_target: Duration::from_millis(config.step_target_ms),
        prefill_chunk_tokens_max: config.batch_tokens_max,
        seqs_max: config.seqs_max,
        waiting_max: config.waiting_max,
        model_digest,
        ..SchedulerConfig::new(
            geometry.block_size,
            engine.total_blocks(),
            engine.context_length(),
            engine.vocab_size(),
        )
    };
    let opening = config.clone();
    let tiers = tokio::task::spawn_blocking(move || tiers::open(&opening, geometry, kv_digest)).await;
    let tiers = tiers.map_err(|error| WorkerError::Engine(error.to_string()))??;
    let (handle, engine_thread): (EngineHandle, _) = engine_thread::spawn(engine, scheduler, fills, tiers)?;
    tracing::info!(
        worker_id = %config.worker_id,
        role = ?config.role,
        addr = %advertised.addr,
        transfer_addr = %advertised.transfer_addr,
        blocks = advertised.total_blocks,
        "serving"
    );
    startup(Startup::Listening {
        addr: advertised.addr,
        transfer_addr: advertised.transfer_addr,
    });

    let service = Arc::new(Service {
        engine: handle.clone(),
        agent,
        region,
        advertised: advertised.clone(),
        grammars: Arc::new(Grammars::new(match (config.engine, config.mock.answers) {
            (EngineKind::Mock, MockAnswers::Cheap) => {
                Err("this mock worker heeds no grammar; give it mock.answers = \"honest\"")
            }
            _ => Ok(config.model_path.clone()),
        })),
    });
    // Connections end with the process: a caller's stream may be open for days, so there is nothing to wait for.
    let stop_serving = CancellationToken::new();
    // On the listener: the server's own setting of this name holds only for listeners it binds itself. Without it a
    // token waits for the caller's delayed acknowledgement of the one before, 40 ms on Linux.
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    let server = tonic::transport::Server::builder()
        .tls_config(identity.tonic_server())
        .map_err(|error| WorkerError::Server(error.to_string()))?
        .http2_keepalive_interval(Some(KEEP_ALIVE))
        .http2_keepalive_timeout(Some(KEEP_ALIVE))
        .add_service(
            WorkerServer::new(AttachService(service))
                .max_decoding_message_size(limits::MESSAGE_BYTES_MAX)
                .max_encoding_message_size(limits::MESSAGE_BYTES_MAX),
        )
        .serve_with_incoming(incoming);
    let server = {
        let stop_serving = stop_serving.clone();
        tokio::spawn(async move {
            tokio::select! {
                result = server => result.map_err(|error| WorkerError::Server(error.to_string())),
                () = stop_serving.cancelled() => Ok(()),
            }
        })
    };
    let leave = CancellationToken::new();
    let (drain_orders, ordered) = mpsc::channel(1);
    let member = membership::Member {
        config: Arc::new(config),
        identity: identity.clone(),
        advertised,
        blocks: BlockTeller::new(handle.clone()),
        engine: handle.clone(),
        drain_orders,
    };
    let draining = async {
        drain::run(&handle, ordered, &shutdown, &leave).await;
        // What follows is membership's to end.
        std::future::pending().await
    };
    let result = tokio::select! {
        result = membership::run(&member, &*startup, &leave) => result,
        result = draining => result,
        reason = engine_thread.failed() => Err(WorkerError::Engine(reason)),
    };
    stop_serving.cancel();
    let _ = server.await;
    handle.stop().await;
    result
}
