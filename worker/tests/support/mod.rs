//! A little cluster in one process for the worker's tests: real sockets, real mutual TLS, real transfers; the
//! coordinator is a listener that notes heartbeats, and the model a `MockEngine`, whose tokens are wrong as soon as one
//! byte of KV is.
// Each test binary compiles its own copy and uses a part of it.
#![allow(dead_code)]

use baton_engine::{Engine, MockConfig, MockEngine, MockTiming};
use baton_identity::{Authority, Identity, Role};
use baton_proto::cluster::cluster_server::{Cluster, ClusterServer};
use baton_proto::cluster::{
    BlockEvents, CoordinatorOrder, Drain, Heartbeat, Registered, ResyncBlocks, Tier, WorkerReport, coordinator_order,
    worker_report,
};
use baton_proto::worker::worker_client::WorkerClient;
use baton_proto::worker::{
    Cancel, Finish, FromWorker, Generate, Hello, PrefillPeer, ReadAhead, Sampling, ToWorker, TokenLogprobs,
    from_worker, to_worker,
};
use baton_worker::{Startup, WorkerConfig, WorkerRole};
use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub const TIMEOUT: Duration = Duration::from_secs(60);

/// Fails the test instead of hanging it.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(TIMEOUT, future)
        .await
        .unwrap_or_else(|_| panic!("{what}: not within {TIMEOUT:?}"))
}

/// An engine whose every step takes this long.
pub fn slow_engine(step: Duration) -> MockEngine {
    let timing = MockTiming {
        step,
        ..MockTiming::default()
    };
    MockEngine::new(MockConfig {
        total_blocks: 512,
        timing,
        ..MockConfig::default()
    })
    .expect("a valid mock")
}

/// What a coordinator has heard of a worker.
#[derive(Default)]
pub struct Heard {
    pub heartbeat: Option<Heartbeat>,
    /// Names of the blocks that it has by its events: in the pool, ...
    pub blocks: HashSet<u64>,
    /// ... and in each tier below it.
    pub lower: HashMap<Tier, HashSet<u64>>,
    /// Messages that began anew.
    pub resets: usize,
    /// Events of the present stream.
    events: u64,
    orders: Option<mpsc::Sender<Result<CoordinatorOrder, Status>>>,
}

impl Heard {
    fn events(&mut self, events: BlockEvents) {
        self.events += 1;
        assert_eq!(events.number, self.events, "messages are numbered");
        if events.reset {
            self.blocks.clear();
            self.lower.clear();
            self.resets += 1;
        }
        assert!(self.resets > 0, "a stream begins with a reset");
        let blocks = match events.tier() {
            Tier::Device => &mut self.blocks,
            tier => self.lower.entry(tier).or_default(),
        };
        for name in &events.evicted {
            blocks.remove(name);
        }
        blocks.extend(events.stored.iter().flat_map(|run| &run.names));
    }
}

/// A coordinator that registers everybody and remembers what it has heard of each.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<HashMap<String, Heard>>>);

#[tonic::async_trait]
impl Cluster for Notes {
    type JoinStream = ReceiverStream<Result<CoordinatorOrder, Status>>;

    async fn join(&self, request: Request<Streaming<WorkerReport>>) -> Result<Response<Self::JoinStream>, Status> {
        let (orders, replies) = mpsc::channel(4);
        let Notes(notes) = self.clone();
        tokio::spawn(async move {
            let mut reports = request.into_inner();
            let mut worker_id = String::new();
            while let Ok(Some(report)) = reports.message().await {
                match report.kind {
                    Some(worker_report::Kind::Register(register)) => {
                        worker_id = register.worker_id;
                        let registered = Registered {
                            epoch: 1,
                            heartbeat_interval_ms: 50,
                            lost_after_ms: 1000,
                            coordinators: None,
                        };
                        let heard = Heard {
                            orders: Some(orders.clone()),
                            ..Heard::default()
                        };
                        notes.lock().unwrap().insert(worker_id.clone(), heard);
                        let kind = Some(coordinator_order::Kind::Registered(registered));
                        let _ = orders.send(Ok(CoordinatorOrder { kind })).await;
                    }
                    Some(worker_report::Kind::Heartbeat(heartbeat)) => {
                        notes.lock().unwrap().entry(worker_id.clone()).or_default().heartbeat = Some(heartbeat);
                    }
                    Some(worker_report::Kind::BlockEvents(events)) => {
                        notes
                            .lock()
                            .unwrap()
                            .entry(worker_id.clone())
                            .or_default()
                            .events(events);
                    }
                    _ => break,
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

pub struct Cell {
    dir: tempfile::TempDir,
    pub coordinator: Identity,
    coordinator_addr: SocketAddr,
    notes: Notes,
}

pub struct Node {
    pub id: String,
    pub addr: SocketAddr,
    shutdown: CancellationToken,
    /// Ends when the worker has.
    ended: watch::Receiver<bool>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl Node {
    pub fn peer(&self) -> PrefillPeer {
        PrefillPeer {
            worker_id: self.id.clone(),
            epoch: 1,
            addr: self.addr.to_string(),
        }
    }

    /// Death without a word: every task of the worker stops where it is, and its sockets close.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Stands still, as a stopped process does: the system keeps its connections, nothing answers on them.
    pub fn freeze(&self, time: Duration) {
        // The one thread of its runtime, and whoever takes over from it.
        for _ in 0..2 {
            self.runtime
                .as_ref()
                .unwrap()
                .spawn(async move { std::thread::sleep(time) });
        }
    }

    /// Ends when the worker has.
    pub async fn ended(&mut self) {
        let _ = within("the worker's end", self.ended.wait_for(|ended| *ended)).await;
    }

    pub async fn stop(mut self) {
        self.shutdown.cancel();
        let _ = within("a clean stop", self.ended.wait_for(|ended| *ended)).await;
        self.kill();
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Cell {
    pub async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::load_or_create(dir.path()).unwrap();
        let coordinator = authority.issue(Role::Coordinator, "coordinator-0").unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let coordinator_addr = listener.local_addr().unwrap();
        let notes = Notes::default();
        let server = tonic::transport::Server::builder()
            .tls_config(coordinator.tonic_server())
            .unwrap()
            .add_service(ClusterServer::new(notes.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        Self {
            dir,
            coordinator,
            coordinator_addr,
            notes,
        }
    }

    pub fn identity_dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn config(&self, id: &str, role: WorkerRole) -> WorkerConfig {
        WorkerConfig {
            worker_id: id.into(),
            role,
            engine: Default::default(),
            mock: Default::default(),
            model_path: PathBuf::new(),
            model_name: "mock".into(),
            coordinator_addrs: vec![self.coordinator_addr],
            listen_addr: "127.0.0.1:0".parse().unwrap(),
            transfer_addr: "127.0.0.1:0".parse().unwrap(),
            advertise_ip: None,
            identity_dir: self.dir.path().into(),
            threads: 1,
            device: Default::default(),
            gpu_kv: Default::default(),
            gpu_kv_bytes: 0,
            tensor_parallel: 1,
            quantization: Default::default(),
            cores_shared: false,
            kv_bytes: 1 << 20,
            block_size: 16,
            batch_tokens_max: 64,
            step_target_ms: 150,
            seqs_max: 32,
            waiting_max: 1024,
            fill_timeout_ms: 20_000,
            kv_compression: Default::default(),
            kv_nixl: false,
            tiers: Default::default(),
        }
    }

    /// Starts a worker on a runtime of its own, so that it can be killed; waits until it is registered.
    pub async fn worker(&self, id: &str, role: WorkerRole, engine: impl Engine + 'static) -> Node {
        self.worker_of_model(id, role, engine, [7; 32]).await
    }

    pub async fn worker_of_model(
        &self,
        id: &str,
        role: WorkerRole,
        engine: impl Engine + 'static,
        model: [u8; 32],
    ) -> Node {
        self.worker_with(self.config(id, role), engine, model).await
    }

    pub async fn worker_with(&self, config: WorkerConfig, engine: impl Engine + 'static, model: [u8; 32]) -> Node {
        let id = config.worker_id.clone();
        let id = id.as_str();
        Authority::load_or_create(self.dir.path())
            .unwrap()
            .issue(Role::Worker, id)
            .unwrap()
            .save(self.dir.path(), id)
            .unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let shutdown = CancellationToken::new();
        let (ready, registered) = oneshot::channel();
        let state = Mutex::new((None, Some(ready)));
        let startup = Arc::new(move |event: Startup| {
            let mut state = state.lock().unwrap();
            match event {
                Startup::Listening { addr, .. } => state.0 = Some(addr),
                Startup::Registered { .. } => {
                    if let (Some(addr), Some(ready)) = (state.0, state.1.take()) {
                        let _ = ready.send(addr);
                    }
                }
                Startup::Loading { .. } => {}
            }
        });
        let stop = shutdown.clone();
        let (ended_sender, ended) = watch::channel(false);
        runtime.spawn(async move {
            let result = baton_worker::serve(config, Box::new(engine), model, startup, stop).await;
            if let Err(error) = result {
                eprintln!("worker ended: {error}");
            }
            let _ = ended_sender.send(true);
        });
        let addr = within("registration", registered).await.expect("the worker starts");
        Node {
            id: id.into(),
            addr,
            shutdown,
            ended,
            runtime: Some(runtime),
        }
    }

    /// Orders a worker to drain.
    pub fn drain(&self, id: &str, deadline: Duration) {
        let order = Drain {
            reason: "a test".into(),
            deadline_ms: deadline.as_millis() as u32,
        };
        let kind = Some(coordinator_order::Kind::Drain(order));
        let orders = self.heard(id, |heard| heard.orders.clone());
        let orders = orders.expect("a registered worker");
        orders.try_send(Ok(CoordinatorOrder { kind })).unwrap();
    }

    /// The last heartbeat; an empty one before the first.
    pub fn heartbeat(&self, id: &str) -> Heartbeat {
        self.heard(id, |heard| heard.heartbeat).unwrap_or_default()
    }

    /// Looks at what was heard of a worker.
    pub fn heard<T: Default>(&self, id: &str, look: impl FnOnce(&Heard) -> T) -> T {
        self.notes.0.lock().unwrap().get(id).map(look).unwrap_or_default()
    }

    /// Asks a worker to tell all its blocks anew.
    pub async fn resync(&self, id: &str) {
        let orders = self
            .heard(id, |heard| heard.orders.clone())
            .expect("a registered worker");
        let kind = Some(coordinator_order::Kind::ResyncBlocks(ResyncBlocks {}));
        orders
            .send(Ok(CoordinatorOrder { kind }))
            .await
            .expect("the stream is up");
    }

    /// The worker's load once it says that nothing is held, running or waiting.
    pub async fn at_rest(&self, id: &str) -> Heartbeat {
        within("rest", async {
            loop {
                let seen = self.heard(id, |heard| heard.heartbeat);
                if let Some(load) = seen
                    && load.held_blocks + load.running + load.waiting + load.transferring == 0
                    && load.free_blocks + load.cached_blocks > 0
                {
                    return load;
                }
                // Let a heartbeat sent before the last event pass by.
                tokio::time::sleep(Duration::from_millis(60)).await;
            }
        })
        .await
    }

    pub async fn gateway(&self, node: &Node) -> Gateway {
        Gateway::attach(&self.coordinator, node.addr)
            .await
            .expect("the worker takes a coordinator")
    }
}

/// Requests by id: the tokens so far, and who waits for the end.
type Waiting = Arc<Mutex<HashMap<u64, (Vec<u32>, Vec<TokenLogprobs>, oneshot::Sender<Answer>)>>>;

/// A gateway's end of an Attach stream.
pub struct Gateway {
    outbound: mpsc::Sender<ToWorker>,
    waiting: Waiting,
    next_id: std::sync::atomic::AtomicU64,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    pub finish: Finish,
}

impl Gateway {
    pub async fn attach(identity: &Identity, addr: SocketAddr) -> Result<Self, Status> {
        let channel = tonic::transport::Endpoint::from_shared(format!("https://{addr}"))
            .unwrap()
            .tls_config(identity.tonic_client(Role::Worker))
            .unwrap()
            .connect()
            .await
            .map_err(|error| Status::unavailable(error.to_string()))?;
        let (outbound, queued) = mpsc::channel(1024);
        let hello = Hello {
            protocol_version: baton_proto::PROTOCOL_VERSION,
            caller: "test".into(),
            kv_digest: Vec::new().into(),
        };
        outbound
            .send(ToWorker {
                kind: Some(to_worker::Kind::Hello(hello)),
            })
            .await
            .unwrap();
        let mut inbound = WorkerClient::new(channel)
            .attach(ReceiverStream::new(queued))
            .await?
            .into_inner();
        match inbound.message().await? {
            Some(FromWorker {
                kind: Some(from_worker::Kind::Hello(_)),
            }) => {}
            other => panic!("no greeting: {other:?}"),
        }
        let waiting = Waiting::default();
        let shared = waiting.clone();
        tokio::spawn(async move {
            while let Ok(Some(message)) = inbound.message().await {
                let step = match message.kind {
                    Some(from_worker::Kind::Step(step)) => step,
                    Some(from_worker::Kind::Pulse(_)) => continue,
                    other => panic!("neither tokens nor a pulse: {other:?}"),
                };
                let mut waiting = shared.lock().unwrap();
                for delta in step.deltas {
                    let (tokens, logprobs, _) = waiting.get_mut(&delta.id).expect("a delta after the finish of its id");
                    tokens.extend(delta.token_ids);
                    logprobs.extend(delta.logprobs);
                    if let Some(finish) = delta.finish {
                        let (tokens, logprobs, sender) = waiting.remove(&delta.id).unwrap();
                        let _ = sender.send(Answer {
                            tokens,
                            logprobs,
                            finish,
                        });
                    }
                }
            }
            shared.lock().unwrap().clear();
        });
        Ok(Self {
            outbound,
            waiting,
            next_id: 1.into(),
        })
    }

    pub async fn submit(&self, mut request: Generate) -> (u64, oneshot::Receiver<Answer>) {
        let id = self.next_id.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        request.id = id;
        let (sender, answer) = oneshot::channel();
        self.waiting
            .lock()
            .unwrap()
            .insert(id, (Vec::new(), Vec::new(), sender));
        self.outbound
            .send(ToWorker {
                kind: Some(to_worker::Kind::Generate(request)),
            })
            .await
            .unwrap();
        (id, answer)
    }

    pub async fn cancel(&self, id: u64) {
        let _ = self
            .outbound
            .send(ToWorker {
                kind: Some(to_worker::Kind::Cancel(Cancel { id })),
            })
            .await;
    }

    /// Says that these blocks will be asked for.
    pub async fn read_ahead(&self, parent: u64, names: &[[u8; 16]]) {
        let hint = ReadAhead {
            parent,
            names: names.concat().into(),
        };
        let kind = Some(to_worker::Kind::ReadAhead(hint));
        self.outbound.send(ToWorker { kind }).await.unwrap();
    }

    pub async fn generate(&self, request: Generate) -> Answer {
        let (_, answer) = self.submit(request).await;
        within("an answer", answer).await.expect("the stream stays up")
    }
}

/// The `n`th request of a fixed mixture: lengths from one token to many blocks, greedy and sampled, shared prefixes.
pub fn request(n: u64) -> Generate {
    let length = [1, 15, 16, 17, 40, 100, 161, 333][(n % 8) as usize];
    let family = n % 5;
    Generate {
        id: 0,
        request_id: format!("request-{n}"),
        traceparent: String::new(),
        prompt: (0..length)
            .map(|i| ((family * 7 + i * 31 + if i > 48 { n } else { 0 }) % 90) as u32)
            .collect(),
        max_tokens: 1 + (n * 7 % 40) as u32,
        sampling: Some(Sampling {
            temperature: (n % 3) as f32 * 0.5,
            top_p: 0.95,
            top_k: 0,
            seed: n,
            ..Sampling::default()
        }),
        stop_token_ids: vec![3],
        cache_salt: vec![(n % 2) as u8].into(),
        prefill_peer: None,
        priority: 0,
        emitted_tokens: 0,
    }
}
