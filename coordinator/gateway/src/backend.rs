//! The one seam between the gateway and the cluster: what the gateway asks for ([`Backend`], [`Job`]) and what it gets
//! back ([`Generation`], [`GenerationEvent`], [`ClusterSnapshot`]).
//!
//! Deliberately knows nothing of HTTP, text, routing or Raft. Survival of a worker's death is the implementer's job:
//! a `Generation` that continues elsewhere looks to the gateway like a pause.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use baton_proto::state::{Attempt, UsageRecord};
use baton_proto::worker;
use baton_state::bounds::ATTEMPTS_MAX;
use serde::Serialize;
use tokio::sync::mpsc;

use crate::accounts::store::AccountStore;
use crate::coordinators::{CoordinatorGroup, GroupChange};
use crate::tier_metrics::KvTiersStatus;

/// Events buffered between the cluster and one response. An event carries the tokens of one engine step, so this is a
/// few seconds of a fast model; a client that reads slower than that is held back by the response, and one that does
/// not read at all is cut by the gateway's write-stall limit.
pub const GENERATION_EVENTS_MAX: usize = 1024;

/// How the gateway sees the cluster.
pub trait Backend: Send + Sync + 'static {
    /// Every model the cluster knows of, whether a live worker serves it now or not.
    fn models(&self) -> Vec<ModelInfo>;

    /// Places a job. May wait for its turn, within bounds that the implementer sets; a job that is not to be taken is an
    /// error, as soon as that is known. Dropping the future gives the place in the queue up.
    fn generate(&self, job: Job) -> impl Future<Output = Result<Generation, BackendError>> + Send;

    /// Makes a usage record durable; durable on `Ok`. Called exactly once per request id for which
    /// [`generate`](Self::generate) returned `Ok`, and idempotent by request id. The implementer bounds the time.
    fn settle(&self, record: UsageRecord) -> impl Future<Output = Result<(), BackendError>> + Send;

    /// The cluster as of now, for `GET /cluster/workers`, `/ready` and the gauges of `/metrics`.
    fn snapshot(&self) -> ClusterSnapshot;

    /// Takes a worker out of service: nothing new from now on, its requests go on elsewhere, and it leaves when nothing is
    /// left, at the latest after `deadline`. Returns at once, with the worker as it is now. A backend without workers of
    /// its own knows none.
    fn drain(&self, worker_id: &str, deadline: Duration) -> Result<WorkerStatus, BackendError> {
        let _ = deadline;
        Err(BackendError::UnknownWorker {
            worker_id: worker_id.to_owned(),
        })
    }

    /// What exactly is served under a model's name, for records: a digest of the model, as its workers tell. `None` where
    /// no worker has told yet.
    fn revision(&self, model: &str) -> Option<String> {
        let _ = model;
        None
    }

    /// The replicated state of keys, prices, budgets and the ledger. A backend without one serves whoever has a configured
    /// key, and has no `/v1/organization`.
    fn accounts(&self) -> Option<Arc<dyn AccountStore>> {
        None
    }

    /// Whether what must not be lost can be kept at the moment: the coordinators have a leader. Part of `/ready`.
    fn has_quorum(&self) -> bool {
        true
    }

    /// The coordinators, for `GET /cluster/coordinators`. Asks the others; the implementer bounds the time.
    fn coordinators(&self) -> impl Future<Output = Result<CoordinatorGroup, BackendError>> + Send {
        async { Ok(CoordinatorGroup::default()) }
    }

    /// Changes the group of coordinators; done on `Ok`. The implementer bounds the time.
    fn change_group(&self, change: GroupChange) -> impl Future<Output = Result<(), BackendError>> + Send {
        let _ = change;
        async {
            Err(BackendError::Refused {
                reason: "this backend has no group".into(),
            })
        }
    }

    /// Writes a backup of the whole durable state, as of one moment, and flushes it. Blocks.
    fn save_snapshot(&self, to: &mut dyn std::io::Write) -> Result<(), BackendError> {
        let _ = to;
        Err(BackendError::Refused {
            reason: "this backend has no state to save".into(),
        })
    }

    /// Adds the cluster's own metrics to what `/metrics` shows. Called once, at the start; names are whole, with the
    /// prefix `baton:`. Nothing by default.
    fn register_metrics(&self, registry: &mut prometheus_client::registry::Registry) {
        let _ = registry;
    }
}

/// A model the cluster knows of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelInfo {
    /// The name clients send in `model`.
    pub id: String,
    /// Unix time, in seconds, since when it is known.
    pub created_unix_s: u64,
    /// Tokens that prompt and completion may have together, the smallest of all its workers. 0 where none has
    /// registered yet: the gateway then uses the model files' own limit.
    pub context_length: u32,
    /// At least one live worker (with decode capacity) serves it.
    pub served: bool,
}

/// One request, tokenised and validated.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// The client-visible request id; unique in the ledger.
    pub request_id: String,
    /// W3C trace context, always present.
    pub traceparent: String,
    /// A model id of [`Backend::models`].
    pub model: String,
    /// Prompt token ids; never empty.
    pub prompt: Arc<[u32]>,
    /// Most tokens to generate, at least 1. Prompt and these fit the context.
    pub max_tokens: u32,
    /// Sampling parameters. The seed is always set, so that a replay after a worker's death gives the same tokens.
    pub sampling: worker::Sampling,
    /// Any of these ends the sequence and is reported as its last token; empty with `ignore_eos`.
    pub stop_token_ids: Vec<u32>,
    /// Salts the prefix cache (tenant isolation).
    pub cache_salt: Vec<u8>,
    /// Whose share it counts against.
    pub tenant: Arc<str>,
    /// Higher goes first; 0 is the usual. The API's `priority` is the other way round, as vLLM's.
    pub priority: i32,
    /// The latencies that the client wants.
    pub targets: LatencyTargets,
}

/// Latencies that a client wants; `None` is no wish.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LatencyTargets {
    /// From the request's arrival to its first token.
    pub ttft: Option<Duration>,
    /// Between two tokens.
    pub itl: Option<Duration>,
}

/// Why the backend refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// It is not taken now. Becomes 429.
    #[error("the request was refused for load: {reason}; retry after {} s", whole_seconds(*retry_after))]
    Overloaded {
        /// The word for programs, in the header `x-baton-reject-reason`.
        word: &'static str,
        /// Why, for people.
        reason: String,
        /// When a retry is likely to be taken.
        retry_after: Duration,
    },
    /// No live worker serves the model at the moment. Becomes 503.
    #[error("no worker serves the model `{model}` at the moment; retry shortly")]
    NoWorker {
        /// The model asked for.
        model: String,
    },
    /// The cluster does not know the model. Becomes 404.
    #[error("the model `{model}` does not exist")]
    UnknownModel {
        /// The model asked for.
        model: String,
    },
    /// No such worker is in the cluster. Becomes 404.
    #[error("no worker `{worker_id}` is in the cluster")]
    UnknownWorker {
        /// The id asked for.
        worker_id: String,
    },
    /// What an operator asked for makes no sense as the cluster is. Becomes 409.
    #[error("refused: {reason}")]
    Refused {
        /// Why.
        reason: String,
    },
    /// The coordinator cannot serve now (no Raft leader, shutting down, a record that could not be committed in
    /// time). Becomes 503.
    #[error("the coordinator is unavailable: {reason}")]
    Unavailable {
        /// What is missing.
        reason: String,
    },
}

/// A time for `Retry-After`: rounded up, at least 1.
pub(crate) fn whole_seconds(time: Duration) -> u64 {
    time.as_secs().saturating_add(u64::from(time.subsec_nanos() > 0)).max(1)
}

/// What happened in a generation since the last event.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationEvent {
    /// New tokens, in order; never repeated and never lost, across workers too. May be empty.
    pub tokens: Vec<u32>,
    /// One for each of `tokens` where the job asks for them (`Sampling::top_logprobs`), else none.
    pub logprobs: Vec<worker::TokenLogprobs>,
    /// Set exactly once, on the last event. Its counts are those of the whole request, whatever the number of
    /// workers it took; its reason is never `PREFILLED`. With a
    /// non-empty `invalid_field` no worker can serve the request as it is: the client's fault, in a sentence for it.
    pub finish: Option<worker::Finish>,
}

/// Which workers hold a request, as far as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// The worker that streams; empty until placed.
    pub decode_worker_id: String,
    /// The worker asked to compute the prompt; empty if the streaming one does.
    pub prefill_worker_id: String,
    /// Times the request was placed; 1 without failures.
    pub attempts: u32,
}

/// Where a request is and was, written by the backend and read by the gateway.
#[derive(Clone, Debug, Default)]
pub struct Track(Arc<Mutex<Places>>);

#[derive(Debug, Default)]
struct Places {
    now: Placement,
    attempts: Vec<Attempt>,
    /// Tokens of all attempts.
    sampled: u32,
}

impl Track {
    fn lock(&self) -> std::sync::MutexGuard<'_, Places> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the request runs, as last told by the backend.
    pub fn placement(&self) -> Placement {
        self.lock().now.clone()
    }

    /// The last placements, oldest first, each with the tokens it brought, as many as a record takes; and the tokens of all.
    pub fn attempts(&self) -> (Vec<Attempt>, u32) {
        let places = self.lock();
        (places.attempts.clone(), places.sampled)
    }

    fn placed(&self, placement: Placement, decode_epoch: u64) {
        let mut places = self.lock();
        // Told twice of one attempt: the second time is more exact.
        if placement.attempts == places.now.attempts {
            places.attempts.pop();
        } else if places.attempts.len() >= ATTEMPTS_MAX {
            places.attempts.remove(0);
        }
        places.attempts.push(Attempt {
            prefill_worker_id: placement.prefill_worker_id.clone(),
            decode_worker_id: placement.decode_worker_id.clone(),
            decode_epoch,
            tokens: 0,
        });
        places.now = placement;
    }

    fn sampled(&self, tokens: usize) {
        let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
        let mut places = self.lock();
        places.sampled = places.sampled.saturating_add(tokens);
        if let Some(last) = places.attempts.last_mut() {
            last.tokens = last.tokens.saturating_add(tokens);
        }
    }
}

/// A running request: a bounded stream of events. Dropping it cancels the work on every worker.
pub struct Generation {
    events: mpsc::Receiver<GenerationEvent>,
    track: Track,
    cancel: Option<Box<dyn FnOnce() + Send + Sync>>,
    finished: bool,
}

impl Generation {
    /// A generation and the end that feeds it. `cancel` runs at most once, from [`stop`](Self::stop) or from drop,
    /// unless the finish was received before; it must not block.
    pub fn channel(cancel: impl FnOnce() + Send + Sync + 'static) -> (GenerationSender, Self) {
        let (sender, events) = mpsc::channel(GENERATION_EVENTS_MAX);
        let track = Track::default();
        let generation = Self {
            events,
            track: track.clone(),
            cancel: Some(Box::new(cancel)),
            finished: false,
        };
        (GenerationSender { events: sender, track }, generation)
    }

    /// The next event; `None` after the finish, or if the backend went away without one. Cancel-safe.
    pub async fn next(&mut self) -> Option<GenerationEvent> {
        std::future::poll_fn(|context| self.poll_next(context)).await
    }

    /// The same for one that listens to several.
    pub fn poll_next(&mut self, context: &mut Context<'_>) -> Poll<Option<GenerationEvent>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = ready!(self.events.poll_recv(context));
        if event.as_ref().is_some_and(|event| event.finish.is_some()) {
            self.finished = true;
        }
        Poll::Ready(event)
    }

    /// Cancels the work at once, before the future is first polled; the future then waits at most `wait_max` for the
    /// finish, which tells the exact counts. Tokens that still arrive are discarded. `None` if the finish was received
    /// before, or does not arrive in time.
    pub fn stop(mut self, wait_max: Duration) -> impl Future<Output = Option<worker::Finish>> + Send + use<> {
        if !self.finished
            && let Some(cancel) = self.cancel.take()
        {
            cancel();
        }
        async move {
            let finish = async {
                while let Some(event) = self.next().await {
                    if event.finish.is_some() {
                        return event.finish;
                    }
                }
                None
            };
            tokio::time::timeout(wait_max, finish).await.ok().flatten()
        }
    }

    /// Where the request runs, as last told by the backend.
    pub fn placement(&self) -> Placement {
        self.track.placement()
    }

    /// Where it is and was; goes on telling after the generation is gone.
    pub fn track(&self) -> Track {
        self.track.clone()
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        if !self.finished
            && let Some(cancel) = self.cancel.take()
        {
            cancel();
        }
    }
}

/// The backend's end of a [`Generation`].
#[derive(Clone, Debug)]
pub struct GenerationSender {
    events: mpsc::Sender<GenerationEvent>,
    track: Track,
}

impl GenerationSender {
    /// Hands over an event without waiting. `Full` means that the client reads slower than the model writes: keep the
    /// tokens and send them with the next event ([`reserve`](Self::reserve) tells when there is room). `Closed` means
    /// that nobody listens any more: cancel.
    #[expect(
        clippy::result_large_err,
        reason = "the error gives the event back, so that no token is lost"
    )]
    pub fn try_send(&self, event: GenerationEvent) -> Result<(), mpsc::error::TrySendError<GenerationEvent>> {
        self.events.try_send(event)
    }

    /// Hands over an event, waiting for room. The error gives it back if nobody listens any more.
    pub async fn send(&self, event: GenerationEvent) -> Result<(), GenerationEvent> {
        self.events.send(event).await.map_err(|error| error.0)
    }

    /// Waits until there is room for an event; false if nobody listens any more.
    pub async fn reserve(&self) -> bool {
        self.events.reserve().await.is_ok()
    }

    /// Waits until nobody listens any more.
    pub async fn closed(&self) {
        self.events.closed().await;
    }

    /// Tells where the request runs now, and under which epoch of the streaming worker. Read by the gateway when it settles
    /// the request.
    pub fn placed(&self, placement: Placement, decode_epoch: u64) {
        self.track.placed(placement, decode_epoch);
    }

    /// Tells of tokens that came from the present placement: before they are handed over, so that never more are delivered
    /// than were sampled.
    pub fn sampled(&self, tokens: usize) {
        self.track.sampled(tokens);
    }
}

/// The workers as of now.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ClusterSnapshot {
    /// Registered workers, in a stable order; lost ones stay a while with state `lost`.
    pub workers: Vec<WorkerStatus>,
}

/// What a worker may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerRole {
    /// Computes prompts for others.
    Prefill,
    /// Streams tokens.
    Decode,
    /// Both.
    Combined,
}

/// How a worker is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerState {
    /// Registered, and its stream is not attached yet.
    Joining,
    /// Takes work.
    Ready,
    /// Finishes what it has and takes nothing new.
    Draining,
    /// No heartbeat for too long, or its connection broke.
    Lost,
}

/// One worker: an element of the JSON array of `GET /cluster/workers`. Field names are a contract with `baton status`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkerStatus {
    /// The worker's id.
    pub id: String,
    /// Which registration of this id it is.
    pub epoch: u64,
    /// What it may do.
    pub role: WorkerRole,
    /// How it is doing.
    pub state: WorkerState,
    /// Process id on its host.
    pub pid: u32,
    /// The model it serves.
    pub model: String,
    /// What it computes on ("cpu, 2 threads").
    pub device: String,
    /// gRPC address, "ip:port".
    pub addr: String,
    /// KV transfer address, "ip:port" (UDP).
    pub transfer_addr: String,
    /// Tokens that a sequence may have.
    pub context_length: u32,
    /// Tokens of a KV block.
    pub block_size: u32,
    /// Bytes of a KV block.
    pub kv_bytes_per_block: u64,
    /// KV blocks: all, ...
    pub total_blocks: u32,
    /// ... free, ...
    pub free_blocks: u32,
    /// ... in use by sequences, ...
    pub held_blocks: u32,
    /// ... and kept only for their prefix.
    pub cached_blocks: u32,
    /// Sequences in the batch.
    pub running: u32,
    /// Sequences queued.
    pub waiting: u32,
    /// Sequences whose blocks are on their way from or to a peer.
    pub transferring: u32,
    /// Prompt tokens taken in since start.
    pub prompt_tokens_total: u64,
    /// Of these, found in the prefix cache.
    pub cached_tokens_total: u64,
    /// Tokens generated since start.
    pub generation_tokens_total: u64,
    /// Sequences put back for lack of blocks since start.
    pub preemptions_total: u64,
    /// KV bytes sent to peers since start.
    pub transferred_bytes_total: u64,
    /// Mean share of push time hidden behind compute, 0 to 1.
    pub push_overlap: f32,
    /// Milliseconds since the last heartbeat.
    pub heartbeat_age_ms: u64,
    /// KV blocks below the pool.
    pub kv_tiers: KvTiersStatus,
}
