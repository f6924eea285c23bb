//! One chat request from its placement to its settled record. Whatever ends it (the model, a stop string, a failure, a
//! client that hangs up), exactly one usage record is settled, and the work in the cluster is cancelled if it still runs.
//!
//! For a request that succeeds the record is durable before its end is told to the client. For one that does not, the
//! record is settled by a task of its own, which outlives the connection, keeps the request's place among those in work
//! (so the number of such tasks is bounded), and is waited for at shutdown.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use baton_proto::state::{UsageRecord, UsageStatus};
use baton_proto::worker::{Finish, FinishReason};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio_util::task::TaskTracker;

use crate::api_error::ApiError;
use crate::backend::{Backend, Generation, Placement};
use crate::metrics::{Counts, Metrics};
use crate::reader::TokenReader;

/// How long a cancelled generation's exact counts are waited for. A worker answers a cancel within one engine step.
const STOP_WAIT_MAX: Duration = Duration::from_millis(500);
/// Tries of a record that nobody waits for: long enough for a new Raft leader. Settling is idempotent.
const SETTLE_TRIES: u32 = 5;
const SETTLE_PAUSE: Duration = Duration::from_secs(1);

/// What outlives a request.
pub(crate) struct Ledger<B> {
    pub backend: Arc<B>,
    pub metrics: Metrics,
    pub settling: TaskTracker,
    /// Drops happen wherever a connection's task does; records are settled here.
    pub runtime: tokio::runtime::Handle,
}

/// What the record of a request says from its start.
#[derive(Clone)]
pub(crate) struct Opened {
    pub request_id: String,
    pub model: String,
    pub prompt_tokens: u32,
    /// When the request arrived.
    pub arrived: Instant,
    /// The same by the wall clock, in milliseconds of Unix time.
    pub arrived_unix_ms: u64,
}

/// A request that runs. Dropping it cancels the work and settles the record as cancelled.
pub(crate) struct Run<B: Backend> {
    ledger: Arc<Ledger<B>>,
    opened: Opened,
    generation: Option<Generation>,
    /// The work was cancelled because the text is complete; brings its exact counts.
    stopping: Option<Stopping>,
    reader: TokenReader,
    /// Known once the generation is over.
    finish: Option<Finish>,
    placement: Placement,
    /// Tokens whose text was handed to the connection: what a client that hangs up is billed for.
    delivered: u32,
    first_token_at: Option<Instant>,
    last_tokens_at: Option<Instant>,
    permit: Option<OwnedSemaphorePermit>,
    settled: bool,
}

type Stopping = Pin<Box<dyn Future<Output = Option<Finish>> + Send>>;

/// What a step brought.
pub(crate) enum Step {
    /// Text to show; may be empty.
    Text(String),
    /// The last text, and why it is the last. Not settled yet.
    Last(String, End),
}

/// Why a generation ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Stop,
    Length,
}

impl End {
    pub fn reason(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

impl<B: Backend> Run<B> {
    pub fn new(
        ledger: Arc<Ledger<B>>,
        opened: Opened,
        generation: Generation,
        reader: TokenReader,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        ledger.metrics.in_flight.inc();
        Self {
            ledger,
            opened,
            generation: Some(generation),
            stopping: None,
            reader,
            finish: None,
            placement: Placement::default(),
            delivered: 0,
            first_token_at: None,
            last_tokens_at: None,
            permit: Some(permit),
            settled: false,
        }
    }

    /// Waits for the next tokens. Cancel-safe. After an error or a [`Step::Last`] there is nothing
    /// more to wait for.
    pub async fn step(&mut self) -> Result<Step, ApiError> {
        let event = match &mut self.generation {
            Some(generation) => generation.next().await,
            None => None,
        };
        let Some(event) = event else {
            self.fail("the generation ended without a finish");
            return Err(ApiError::unavailable(
                "The generation was lost before it finished; retry.",
            ));
        };
        self.time(event.tokens.len());
        let reason = event.finish.as_ref().map(Finish::reason);
        let mut text = self.reader.push(&event.tokens, reason == Some(FinishReason::Stop));
        if let Some(finish) = event.finish {
            self.time_outside(&finish);
            self.finish = Some(finish);
            self.placement = self
                .generation
                .take()
                .map(|generation| generation.placement())
                .unwrap_or_default();
        }
        if self.reader.stopped() {
            self.cancel();
            return Ok(Step::Last(text, End::Stop));
        }
        let end = match reason {
            None => return Ok(Step::Text(text)),
            Some(FinishReason::Stop) => End::Stop,
            Some(FinishReason::Length) => End::Length,
            Some(_) => {
                let retryable = self.finish.as_ref().is_some_and(|finish| finish.retryable);
                let cause = self
                    .finish
                    .as_ref()
                    .map(|finish| finish.error.clone())
                    .unwrap_or_default();
                self.fail(&cause);
                let error = ApiError::unavailable("The generation failed on the cluster; retry.");
                return Err(if retryable { error } else { ApiError::internal() });
            }
        };
        text.push_str(&self.reader.finish());
        // Flushing may itself complete a stop string; nothing is left to cancel.
        let end = if self.reader.stopped() { End::Stop } else { end };
        Ok(Step::Last(text, end))
    }

    /// The text of all tokens so far is in the connection's hands.
    pub fn mark_delivered(&mut self) {
        self.delivered = self.reader.tokens();
    }

    /// Settles a request that ended well. The record is durable on `Ok`; on an error the client must not be told of
    /// success, and the request is recorded as failed, with what was shown of it, as soon as that works.
    pub async fn settle(&mut self, end: End) -> Result<Counts, ApiError> {
        let shown = std::mem::replace(&mut self.delivered, self.reader.tokens());
        self.settled = true;
        let draft = self.draft(match end {
            End::Stop => UsageStatus::Completed,
            End::Length => UsageStatus::Length,
        });
        let elapsed = self.opened.arrived.elapsed();
        let ledger = self.ledger.clone();
        let permit = self.permit.take();
        let (tell, told) = oneshot::channel();
        // A task of its own: a client that hangs up now must not undo a commit half-way.
        let task = async move {
            let mut draft = draft.complete().await;
            let counts = draft.counts();
            ledger.metrics.ended(&draft.opened.model, end.reason(), counts, elapsed);
            let result = ledger.backend.settle(draft.record()).await;
            let failed = result.is_err();
            // Nobody may be there to hear it; the record stands all the same.
            let _ = tell.send(result.map(|()| counts));
            if failed {
                draft.status = UsageStatus::Failed;
                draft.completion_tokens = shown;
                tokio::time::sleep(SETTLE_PAUSE).await;
                ledger.settle(draft).await;
            }
            drop(permit);
        };
        self.ledger.settling.spawn_on(task, &self.ledger.runtime);
        match told.await {
            Ok(Ok(counts)) => Ok(counts),
            Ok(Err(error)) => {
                tracing::warn!(request_id = %self.opened.request_id, %error, "a finished request could not be settled");
                Err(ApiError::unavailable(
                    "The usage of this request could not be recorded; retry.",
                ))
            }
            Err(_) => Err(ApiError::internal()),
        }
    }

    fn fail(&mut self, cause: &str) {
        tracing::warn!(request_id = %self.opened.request_id, cause, "a generation failed");
        self.settle_later(UsageStatus::Failed, "error");
    }

    /// Cancels what still runs, now, and settles in a task of its own.
    fn settle_later(&mut self, status: UsageStatus, reason: &'static str) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        self.cancel();
        let draft = self.draft(status);
        let elapsed = self.opened.arrived.elapsed();
        let ledger = self.ledger.clone();
        let permit = self.permit.take();
        let task = async move {
            let draft = draft.complete().await;
            ledger
                .metrics
                .ended(&draft.opened.model, reason, draft.counts(), elapsed);
            ledger.settle(draft).await;
            drop(permit);
        };
        self.ledger.settling.spawn_on(task, &self.ledger.runtime);
    }

    /// Cancels the work, if it runs.
    fn cancel(&mut self) {
        if let Some(generation) = self.generation.take() {
            self.placement = generation.placement();
            self.stopping = Some(Box::pin(generation.stop(STOP_WAIT_MAX)));
        }
    }

    fn draft(&mut self, status: UsageStatus) -> Draft {
        Draft {
            opened: self.opened.clone(),
            status,
            placement: self.placement.clone(),
            finish: self.finish.take(),
            stopping: self.stopping.take(),
            completion_tokens: self.delivered,
            received_tokens: self.reader.tokens(),
        }
    }

    /// What the first token took beyond the worker that streamed to the end; a request that moved had others before it, and
    /// tells nothing.
    fn time_outside(&self, finish: &Finish) {
        let moved = self
            .generation
            .as_ref()
            .is_some_and(|generation| generation.placement().attempts > 1);
        if let Some(first) = self.first_token_at.filter(|_| !moved) {
            let at_workers = Duration::from_micros(finish.queued_us.saturating_add(finish.prefill_us));
            let metrics = &self.ledger.metrics;
            metrics.outside_workers(&self.opened.model, first - self.opened.arrived, at_workers);
        }
    }

    fn time(&mut self, tokens: usize) {
        if tokens == 0 {
            return;
        }
        let now = Instant::now();
        let metrics = &self.ledger.metrics;
        match self.last_tokens_at.replace(now) {
            None => {
                self.first_token_at = Some(now);
                metrics.first_token(&self.opened.model, now - self.opened.arrived);
            }
            Some(last) => metrics.next_tokens(&self.opened.model, now - last),
        }
    }
}

impl<B: Backend> Drop for Run<B> {
    fn drop(&mut self) {
        self.settle_later(UsageStatus::Cancelled, "abort");
        self.ledger.metrics.in_flight.dec();
    }
}

impl<B: Backend> Ledger<B> {
    /// Settles a record that nobody waits for.
    async fn settle(&self, draft: Draft) {
        // Made once: a try that was committed and not answered must not differ from the next.
        let record = draft.record();
        for attempt in 1..=SETTLE_TRIES {
            match self.backend.settle(record.clone()).await {
                Ok(()) => return,
                Err(error) if attempt == SETTLE_TRIES => {
                    self.metrics.settle_failures.inc();
                    tracing::error!(request_id = %draft.opened.request_id, %error, "a usage record could not be settled");
                }
                Err(_) => tokio::time::sleep(SETTLE_PAUSE).await,
            }
        }
    }
}

/// A usage record in the making.
struct Draft {
    opened: Opened,
    status: UsageStatus,
    placement: Placement,
    finish: Option<Finish>,
    stopping: Option<Stopping>,
    completion_tokens: u32,
    /// Tokens that came, shown or not.
    received_tokens: u32,
}

impl Draft {
    /// Waits for the counts of a cancelled generation; bounded by [`STOP_WAIT_MAX`].
    async fn complete(mut self) -> Self {
        if let Some(stopping) = self.stopping.take() {
            self.finish = stopping.await;
        }
        self
    }

    fn counts(&self) -> Counts {
        let cached = self.finish.as_ref().map_or(0, |finish| finish.cached_tokens);
        let prompt = self.opened.prompt_tokens;
        Counts {
            prompt,
            cached: cached.min(prompt),
            completion: self.completion_tokens,
        }
    }

    fn record(&self) -> UsageRecord {
        let counts = self.counts();
        let told = self.finish.as_ref().map(|finish| finish.prefill_worker_id.clone());
        let prefill_worker_id = told
            .filter(|id| !id.is_empty())
            .unwrap_or_else(|| self.placement.prefill_worker_id.clone());
        UsageRecord {
            request_id: self.opened.request_id.clone(),
            model: self.opened.model.clone(),
            status: self.status.into(),
            prompt_tokens: counts.prompt,
            cached_tokens: counts.cached,
            completion_tokens: counts.completion,
            // The other witness of what was delivered: the cluster's count. Where it never came, what came of the tokens.
            sampled_tokens: self
                .finish
                .as_ref()
                .map_or(self.received_tokens, |finish| finish.completion_tokens),
            prefill_worker_id,
            decode_worker_id: self.placement.decode_worker_id.clone(),
            started_unix_ms: self.opened.arrived_unix_ms,
            settled_unix_ms: unix_ms(),
            attempts: self.placement.attempts,
            ..UsageRecord::default()
        }
    }
}

/// Milliseconds of Unix time.
pub(crate) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
