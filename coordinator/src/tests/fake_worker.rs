//! A worker without an engine: registers, reports, and answers `Attach` with tokens that are a function of the tokens
//! before, the seed and the position, as a real worker's are. It runs in a runtime of its own, so that it can be killed.

use baton_identity::{Identity, Role, require_role};
use baton_proto::PROTOCOL_VERSION;
use baton_proto::cluster::cluster_client::ClusterClient;
use baton_proto::cluster::{
    self, BlockEvents, CoordinatorOrder, Heartbeat, KvTiers, Register, WorkerReport, coordinator_order, worker_report,
};
use baton_proto::worker::worker_server::{Worker, WorkerServer};
use baton_proto::worker::{
    Finish, FinishReason, FromWorker, Generate, HelloReply, Pulse, ReadAhead, SequenceDelta, StepOutput, ToWorker,
    TokenLogprobs, from_worker, to_worker,
};
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status, Streaming};

/// The token that ends a sequence; the function below never makes it before [`STOP_AT`].
pub(super) const STOP: u32 = 9999;
/// Position at which every sequence stops.
pub(super) const STOP_AT: usize = 500;
/// Prompt tokens that every request finds cached here.
pub(super) const CACHED: u32 = 3;

/// The "model".
pub(super) fn next_token(sequence: &[u32], seed: u64) -> u32 {
    if sequence.len() >= STOP_AT {
        return STOP;
    }
    let mixed = sequence.iter().fold(seed, |hash, token| {
        hash.wrapping_mul(31).wrapping_add(u64::from(*token))
    });
    (mixed % 5000) as u32
}

/// What an undisturbed worker generates.
pub(super) fn expected(prompt: &[u32], count: usize) -> Vec<u32> {
    let mut sequence = prompt.to_vec();
    for _ in 0..count {
        let token = next_token(&sequence, 11);
        sequence.push(token);
        if token == STOP {
            break;
        }
    }
    sequence.split_off(prompt.len())
}

/// What a test can see and turn.
#[derive(Default)]
pub(super) struct Controls {
    /// Tokens that may still be generated before the engine stalls; negative is no limit.
    budget: AtomicI64,
    refilled: Notify,
    pub(super) generates: Mutex<Vec<Generate>>,
    pub(super) cancels: AtomicU64,
    /// Streams that callers have opened.
    pub(super) attaches: AtomicU64,
    /// Answer every request with a retryable error.
    pub(super) refuse: AtomicBool,
    /// Says that it sampled one token more than it sends.
    pub(super) miscounts: AtomicBool,
    /// Tells [`logprobs`] of each token, asked or not.
    pub(super) tells_logprobs: AtomicBool,
    /// Answers every request as one that names a grammar nobody can follow.
    pub(super) refuses_grammars: AtomicBool,
    /// Whether it greets as one that pulses, and does so every 50 ms while requests are open.
    pub(super) pulsing: AtomicBool,
    /// Stands still as a stopped process does: takes nothing in that would show, sends nothing; connections stand.
    pub(super) frozen: AtomicBool,
    /// Prompt tokens it says it found cached; 0 is [`CACHED`].
    pub(super) cached: AtomicU64,
    /// Says in its heartbeats that it drains.
    pub(super) draining: AtomicBool,
    /// Deadline of the order to drain, in milliseconds.
    pub(super) ordered_to_drain: Mutex<Option<u32>>,
    /// Speeds to report: prompt tokens per second, and a decode step in microseconds.
    pub(super) prefill_tokens_per_s: AtomicU64,
    pub(super) decode_step_us: AtomicU64,
    /// Leave heartbeats out.
    pub(super) mute: AtomicBool,
    /// Epoch to claim in greetings instead of the true one; 0 is the true one.
    pub(super) claim_epoch: AtomicU64,
    pub(super) epoch: AtomicU64,
    /// Reason of a refusal by the coordinator.
    pub(super) refused: Mutex<Option<String>>,
    /// Block events to tell, with their numbers.
    pub(super) events: Mutex<VecDeque<BlockEvents>>,
    /// Times the coordinator asked for all of them.
    pub(super) resyncs: AtomicU64,
    /// Lower tiers to report.
    pub(super) kv_tiers: Mutex<Option<KvTiers>>,
    /// Hints of what will be asked for, each with the number of requests that had come before.
    pub(super) hints: Mutex<Vec<(ReadAhead, usize)>>,
}

impl Controls {
    pub(super) fn allow(&self, tokens: i64) {
        self.budget.store(tokens, Ordering::SeqCst);
        self.refilled.notify_waiters();
    }

    fn cached(&self) -> u32 {
        match self.cached.load(Ordering::SeqCst) {
            0 => CACHED,
            cached => cached as u32,
        }
    }
}

pub(super) struct FakeWorker {
    pub(super) controls: Arc<Controls>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeWorker {
    /// Starts a worker that generates without limit.
    pub(super) fn start(id: &str, role: cluster::Role, coordinator: SocketAddr, identity: Identity) -> Self {
        Self::start_stalling(id, role, coordinator, identity, -1)
    }

    /// Starts a worker whose engine stalls after so many tokens.
    pub(super) fn start_stalling(
        id: &str,
        role: cluster::Role,
        coordinator: SocketAddr,
        identity: Identity,
        tokens: i64,
    ) -> Self {
        Self::start_with(id, role, coordinator, identity, |controls| {
            controls.budget.store(tokens, Ordering::SeqCst);
        })
    }

    /// Starts a worker with its controls set beforehand.
    pub(super) fn start_with(
        id: &str,
        role: cluster::Role,
        coordinator: SocketAddr,
        identity: Identity,
        adjust: impl FnOnce(&Controls),
    ) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let controls = Arc::new(Controls::default());
        controls.budget.store(-1, Ordering::SeqCst);
        adjust(&controls);
        let id = id.to_owned();
        let shared = controls.clone();
        runtime.spawn(async move {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let addr = listener.local_addr().unwrap();
            let service = Service {
                worker_id: id.clone(),
                controls: shared.clone(),
            };
            let server = tonic::transport::Server::builder()
                .tls_config(identity.tonic_server())
                .unwrap()
                .add_service(WorkerServer::new(service))
                .serve_with_incoming(TcpListenerStream::new(listener));
            tokio::spawn(server);
            let register = register(&id, role, addr);
            let channel = channel(coordinator, &identity).await.unwrap();
            let _ = member(channel, register, &shared).await;
        });
        Self {
            controls,
            runtime: Some(runtime),
        }
    }

    /// As `kill -9`: every task gone, every socket closed by the system.
    pub(super) fn kill(mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

pub(super) async fn channel(addr: SocketAddr, identity: &Identity) -> Result<Channel, tonic::transport::Error> {
    Endpoint::from_shared(format!("https://{addr}"))?
        .tls_config(identity.tonic_client(Role::Coordinator))?
        .connect()
        .await
}

pub(super) fn register(id: &str, role: cluster::Role, addr: SocketAddr) -> Register {
    Register {
        protocol_version: PROTOCOL_VERSION,
        worker_id: id.into(),
        role: role.into(),
        model: super::MODEL.into(),
        kv_digest: vec![7; 32].into(),
        addr: addr.to_string(),
        transfer_addr: addr.to_string(),
        pid: 42,
        total_blocks: 100,
        block_size: 16,
        context_length: 1024,
        kv_bytes_per_block: 4096,
        device: "none".into(),
        model_digest: super::MODEL_DIGEST.to_vec().into(),
        epoch: 0,
    }
}

/// Registers and reports until the coordinator ends it.
async fn member(channel: Channel, register: Register, controls: &Controls) -> Result<(), Status> {
    let (reports, queued) = mpsc::channel(4);
    let report = |kind| WorkerReport { kind: Some(kind) };
    let _ = reports.send(report(worker_report::Kind::Register(register))).await;
    let mut orders = ClusterClient::new(channel)
        .join(ReceiverStream::new(queued))
        .await?
        .into_inner();
    let mut beat = tokio::time::interval(Duration::from_millis(50));
    loop {
        tokio::select! {
            order = orders.message() => match order?.and_then(|CoordinatorOrder { kind }| kind) {
                Some(coordinator_order::Kind::Registered(registered)) => {
                    controls.epoch.store(registered.epoch, Ordering::SeqCst);
                }
                Some(coordinator_order::Kind::Drain(order)) => {
                    *controls.ordered_to_drain.lock().unwrap() = Some(order.deadline_ms);
                }
                Some(coordinator_order::Kind::Refused(refused)) => {
                    *controls.refused.lock().unwrap() = Some(refused.reason);
                    return Ok(());
                }
                Some(coordinator_order::Kind::ResyncBlocks(_)) => {
                    controls.resyncs.fetch_add(1, Ordering::SeqCst);
                }
                _ => return Ok(()),
            },
            _ = beat.tick() => {
                let silent = controls.mute.load(Ordering::SeqCst) || controls.frozen.load(Ordering::SeqCst);
                if controls.epoch.load(Ordering::SeqCst) != 0 && !silent {
                    let heartbeat = Heartbeat {
                        free_blocks: 90,
                        cached_blocks: 10,
                        prefill_tokens_per_s: controls.prefill_tokens_per_s.load(Ordering::SeqCst) as f32,
                        decode_step_us: controls.decode_step_us.load(Ordering::SeqCst) as u32,
                        draining: controls.draining.load(Ordering::SeqCst),
                        kv_tiers: *controls.kv_tiers.lock().unwrap(),
                        ..Heartbeat::default()
                    };
                    let _ = reports.try_send(report(worker_report::Kind::Heartbeat(heartbeat)));
                    let events = controls.events.lock().unwrap().pop_front();
                    if let Some(events) = events {
                        let _ = reports.send(report(worker_report::Kind::BlockEvents(events))).await;
                    }
                }
            }
        }
    }
}

struct Service {
    worker_id: String,
    controls: Arc<Controls>,
}

type Outbound = mpsc::Sender<Result<FromWorker, Status>>;

#[tonic::async_trait]
impl Worker for Service {
    type AttachStream = ReceiverStream<Result<FromWorker, Status>>;

    async fn attach(&self, request: Request<Streaming<ToWorker>>) -> Result<Response<Self::AttachStream>, Status> {
        require_role(&request, &[Role::Coordinator])?;
        let mut inbound = request.into_inner();
        let (outbound, replies) = mpsc::channel(64);
        self.controls.attaches.fetch_add(1, Ordering::SeqCst);
        let controls = self.controls.clone();
        let claimed = controls.claim_epoch.load(Ordering::SeqCst);
        let hello = HelloReply {
            protocol_version: PROTOCOL_VERSION,
            worker_id: self.worker_id.clone(),
            epoch: if claimed == 0 {
                controls.epoch.load(Ordering::SeqCst)
            } else {
                claimed
            },
            pulse_interval_ms: if controls.pulsing.load(Ordering::SeqCst) { 50 } else { 0 },
            ..HelloReply::default()
        };
        let _ = outbound
            .send(Ok(FromWorker {
                kind: Some(from_worker::Kind::Hello(hello)),
            }))
            .await;
        let taken = Arc::new(AtomicU64::new(0));
        if controls.pulsing.load(Ordering::SeqCst) {
            tokio::spawn(pulses(controls.clone(), outbound.clone(), taken.clone()));
        }
        tokio::spawn(async move {
            let mut running = HashMap::new();
            while let Ok(Some(message)) = inbound.message().await {
                match message.kind {
                    Some(to_worker::Kind::Generate(generate)) => {
                        taken.fetch_max(generate.id, Ordering::SeqCst);
                        controls.generates.lock().unwrap().push(generate.clone());
                        let id = generate.id;
                        let task = tokio::spawn(sequence(generate, controls.clone(), outbound.clone()));
                        running.insert(id, task);
                    }
                    Some(to_worker::Kind::ReadAhead(hint)) => {
                        let before = controls.generates.lock().unwrap().len();
                        controls.hints.lock().unwrap().push((hint, before));
                    }
                    Some(to_worker::Kind::Cancel(cancel)) => {
                        controls.cancels.fetch_add(1, Ordering::SeqCst);
                        while controls.frozen.load(Ordering::SeqCst) {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                        }
                        if let Some(task) = running.remove(&cancel.id) {
                            task.abort();
                            let end = finish(&controls, FinishReason::Cancelled);
                            send(&controls, &outbound, cancel.id, vec![], Some(end)).await;
                        }
                    }
                    _ => {}
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(replies)))
    }
}

async fn sequence(generate: Generate, controls: Arc<Controls>, outbound: Outbound) {
    let id = generate.id;
    if controls.refuse.load(Ordering::SeqCst) {
        let refusal = Finish {
            error: "the queue is full".into(),
            retryable: true,
            ..finish(&controls, FinishReason::Error)
        };
        return send(&controls, &outbound, id, vec![], Some(refusal)).await;
    }
    if controls.refuses_grammars.load(Ordering::SeqCst) {
        let refusal = Finish {
            error: "the grammar is not usable".into(),
            invalid_field: "grammar".into(),
            ..finish(&controls, FinishReason::Error)
        };
        return send(&controls, &outbound, id, vec![], Some(refusal)).await;
    }
    let seed = generate.sampling.map_or(0, |sampling| sampling.seed);
    let mut sequence = generate.prompt;
    for count in 1..=generate.max_tokens {
        loop {
            let refilled = controls.refilled.notified();
            let budget = controls.budget.load(Ordering::SeqCst);
            if budget != 0 && !controls.frozen.load(Ordering::SeqCst) {
                if budget > 0 {
                    controls.budget.store(budget - 1, Ordering::SeqCst);
                }
                break;
            }
            refilled.await;
        }
        let token = next_token(&sequence, seed);
        sequence.push(token);
        let reason = if generate.stop_token_ids.contains(&token) {
            Some(FinishReason::Stop)
        } else if count == generate.max_tokens {
            Some(FinishReason::Length)
        } else {
            None
        };
        let end = reason.map(|reason| Finish {
            completion_tokens: count + u32::from(controls.miscounts.load(Ordering::SeqCst)),
            ..finish(&controls, reason)
        });
        let over = end.is_some();
        send(&controls, &outbound, id, vec![token], end).await;
        if over {
            return;
        }
    }
}

/// An engine that steps, whether it gets anywhere or not.
async fn pulses(controls: Arc<Controls>, outbound: Outbound, taken: Arc<AtomicU64>) {
    let mut steps_total = 0;
    while !outbound.is_closed() {
        tokio::time::sleep(Duration::from_millis(50)).await;
        if controls.frozen.load(Ordering::SeqCst) {
            continue;
        }
        steps_total += 1;
        let pulse = Pulse {
            steps_total,
            taken: taken.load(Ordering::SeqCst),
            ..Pulse::default()
        };
        let kind = Some(from_worker::Kind::Pulse(pulse));
        let _ = outbound.send(Ok(FromWorker { kind })).await;
    }
}

/// What a worker tells of a token.
pub(super) fn logprobs(token: u32) -> TokenLogprobs {
    TokenLogprobs {
        logprob: -(token as f32),
        top_ids: vec![token],
        top_logprobs: vec![-0.5],
    }
}

fn finish(controls: &Controls, reason: FinishReason) -> Finish {
    Finish {
        reason: reason.into(),
        prompt_tokens: 77,
        cached_tokens: controls.cached(),
        ..Finish::default()
    }
}

async fn send(controls: &Controls, outbound: &Outbound, id: u64, token_ids: Vec<u32>, finish: Option<Finish>) {
    let told = controls.tells_logprobs.load(Ordering::SeqCst);
    let logprobs = token_ids
        .iter()
        .filter(|_| told)
        .map(|token| logprobs(*token))
        .collect();
    let deltas = vec![SequenceDelta {
        id,
        token_ids,
        finish,
        cached_tokens: Some(controls.cached()),
        logprobs,
    }];
    let step = from_worker::Kind::Step(StepOutput { deltas });
    let _ = outbound.send(Ok(FromWorker { kind: Some(step) })).await;
}
