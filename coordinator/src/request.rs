//! The life of one request: on a worker, and if that one is lost, on the next, from where the last one stopped. What
//! the gateway sees is one stream without gap or repetition, because a token depends only on the tokens before it, the
//! parameters, the seed and its position (promise P1).
//!
//! ```text
//!            placed                   finish                        end
//!  (start) ─────────▶ on a worker ───────────────────────────────────────▶ (over)
//!                      │  ▲    ▲ │ the worker drains, and another has room: placed there first, then cancelled here
//!   broken: the link   │  │    └─┘
//!   broke, or the      │  │ placed: prompt + emitted tokens
//!   watchdog gave up;  ▼  │
//!   or refused       looking ── nobody in `worker_wait_ms`, or five failures without a token ──▶ (failed, retryable)
//! ```
//!
//! What a worker keeps per sequence (sampler position, counts of penalties, the state of a grammar) is a function of prompt and
//! emitted tokens, and is built again from them; text, stop strings and their state live above, in the gateway, which
//! does not notice.
//!
//! Deliberately not here: which worker (router), and what a client sees of it (gateway).

use crate::admission::Admitted;
use crate::cluster::{Cluster, LifeId, PlaceError};
use crate::link::Submission;
use crate::mailbox::{Delivery, End};
use crate::placement::Placed;
use baton_gateway::{GenerationEvent, GenerationSender, Job};
use baton_proto::limits::PROMPT_TOKENS_MAX;
use baton_proto::worker::{Finish, FinishReason, Generate, TokenLogprobs};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Failed attempts in a row, without a single new token, before the request fails. Attempts that bring tokens do not
/// count: they are bounded by `max_tokens`.
const ATTEMPTS_MAX: u32 = 5;
/// First pause after a worker refused (a full queue, say); doubles with each attempt. After a broken link there is
/// none: another worker is as good at once.
const REFUSED_PAUSE: Duration = Duration::from_millis(50);
/// How often a request that waits for room looks by itself. Changes of the cluster wake it earlier.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Longest wait for the worker's word on a cancelled request. It only makes the counts exact, and the gateway waits a
/// little longer for it (500 ms).
const CANCELLED_WAIT: Duration = Duration::from_millis(400);

/// The request as it is for the worker, without tokens emitted so far.
pub(crate) fn first_generate(job: &Job) -> Generate {
    Generate {
        id: 0,
        request_id: job.request_id.clone(),
        traceparent: job.traceparent.clone(),
        prompt: job.prompt.to_vec(),
        max_tokens: job.max_tokens,
        sampling: Some(job.sampling.clone()),
        stop_token_ids: job.stop_token_ids.clone(),
        cache_salt: job.cache_salt.clone().into(),
        prefill_peer: None,
        priority: job.priority,
        emitted_tokens: 0,
    }
}

pub(crate) struct Running {
    cluster: Arc<Cluster>,
    job: Job,
    sender: GenerationSender,
    cancel: CancellationToken,
    /// Tokens of all attempts, in order.
    emitted: Vec<u32>,
    /// Times it was placed.
    attempts: u32,
    /// Prompt tokens from a prefix cache, as told by the first attempt that told any, and which attempt that was. What a
    /// replay finds cached is partly the request's own doing, and none of the client's business.
    cached: Option<(u32, u32)>,
    /// Lives of workers that failed it.
    avoid: Vec<LifeId>,
    /// Its place among those that were let in.
    admitted: Admitted,
}

/// How an attempt ended.
enum Attempt {
    /// The request is over.
    Over,
    /// It was moved off a draining worker.
    Moved(Box<Placed>),
    /// It is to go on elsewhere.
    Failed(Retry),
}

/// Why a request is to go on elsewhere.
enum Retry {
    /// Go on elsewhere at once.
    Broken(String),
    /// The worker could not take it now.
    Refused(String),
}

impl Running {
    pub(crate) fn new(
        cluster: Arc<Cluster>,
        job: Job,
        sender: GenerationSender,
        cancel: CancellationToken,
        admitted: Admitted,
    ) -> Self {
        Self {
            cluster,
            job,
            sender,
            cancel,
            emitted: Vec::new(),
            attempts: 0,
            cached: None,
            avoid: Vec::new(),
            admitted,
        }
    }

    /// Runs the request to its end, beginning with a placement already made.
    pub(crate) async fn run(mut self, first: Placed) {
        let mut placed = first;
        let mut failures = 0;
        loop {
            self.attempts += 1;
            self.sender
                .placed(placed.placement(self.attempts), placed.decode.worker.1);
            self.admitted.placed(&placed);
            let worker = placed.decode.worker.clone();
            let before = self.emitted.len();
            let retry = match self.attempt(placed).await {
                Attempt::Over => return,
                Attempt::Moved(next) => {
                    tracing::info!(from = %worker.0, to = %next.decode.worker.0, "moved off a draining worker");
                    self.cluster.metrics.moves.inc();
                    placed = *next;
                    continue;
                }
                Attempt::Failed(retry) => retry,
            };
            if let Some(finish) = self.already_over() {
                return self.end(Vec::new(), Vec::new(), finish).await;
            }
            failures = if self.emitted.len() > before { 1 } else { failures + 1 };
            let (reason, pause) = match retry {
                Retry::Broken(reason) => (reason, Duration::ZERO),
                Retry::Refused(reason) => (reason, REFUSED_PAUSE * 2u32.pow(failures.min(6) - 1)),
            };
            tracing::warn!(worker_id = %worker.0, %reason, emitted = self.emitted.len(), "going on elsewhere");
            self.cluster.metrics.replays.inc();
            if failures >= ATTEMPTS_MAX {
                return self.end(Vec::new(), Vec::new(), failed(reason)).await;
            }
            if self.job.prompt.len() + self.emitted.len() > PROMPT_TOKENS_MAX {
                return self
                    .end(
                        Vec::new(),
                        Vec::new(),
                        failed(format!("too long to go on elsewhere after: {reason}")),
                    )
                    .await;
            }
            self.avoid.push(worker);
            match self.place_again(pause, &reason).await {
                Ok(next) => placed = next,
                Err(finish) => return self.end(Vec::new(), Vec::new(), finish).await,
            }
        }
    }

    /// One attempt.
    async fn attempt(&mut self, mut placed: Placed) -> Attempt {
        let leaving = placed.submission.leaving();
        let began = self.emitted.len();
        let mut changes = self.cluster.changes();
        // Set once another worker was looked for in vain.
        let mut look_again: Option<Instant> = None;
        loop {
            let may_move = async {
                leaving.cancelled().await;
                if let Some(at) = look_again {
                    tokio::select! {
                        _ = changes.changed() => {}
                        () = tokio::time::sleep_until(at) => {}
                    }
                }
            };
            let delivery = tokio::select! {
                biased;
                () = self.cancel.cancelled() => {
                    self.cancelled(&mut placed.submission).await;
                    return Attempt::Over;
                }
                delivery = placed.submission.next() => delivery,
                () = may_move => {
                    changes.mark_unchanged();
                    if let Some(next) = self.place_elsewhere() {
                        // Dropping the old one cancels it; tokens it still has under way come again from the new one.
                        return Attempt::Moved(Box::new(next));
                    }
                    look_again = Some(Instant::now() + LOOK_AGAIN);
                    continue;
                }
            };
            let Delivery {
                tokens,
                logprobs,
                end,
                cached_tokens,
            } = delivery;
            if let Some(cached_tokens) = cached_tokens {
                self.note_cached(cached_tokens);
            }
            self.take(&tokens);
            if !tokens.is_empty() {
                placed.first_token();
                self.admitted.progressed();
            }
            let (retry, finish) = match end {
                None => (None, None),
                Some(End::Broken(reason)) => (Some(Retry::Broken(reason)), None),
                Some(End::Finished(finish)) => {
                    placed.finished(&finish);
                    self.compare(&placed.decode.worker, &finish, began);
                    self.judge(finish)
                }
            };
            if let Some(finish) = finish {
                self.end(tokens, logprobs, finish).await;
                return Attempt::Over;
            }
            if !tokens.is_empty() {
                let event = GenerationEvent {
                    tokens,
                    logprobs,
                    finish: None,
                };
                tokio::select! {
                    biased;
                    () = self.cancel.cancelled() => {
                        self.cancelled(&mut placed.submission).await;
                        return Attempt::Over;
                    }
                    sent = self.sender.send(event) => {
                        if sent.is_err() {
                            return Attempt::Over;
                        }
                    }
                }
            }
            if let Some(retry) = retry {
                return Attempt::Failed(retry);
            }
        }
    }

    /// What a worker's finish means for the request.
    fn judge(&mut self, finish: Finish) -> (Option<Retry>, Option<Finish>) {
        match finish.reason() {
            FinishReason::Error if finish.retryable => (Some(Retry::Refused(finish.error)), None),
            // Nobody here asked for that: the worker is going away.
            FinishReason::Cancelled => (Some(Retry::Broken("the worker cancelled it".into())), None),
            _ => {
                self.note_cached(finish.cached_tokens);
                (None, Some(finish))
            }
        }
    }

    /// Tokens came from the present worker.
    fn take(&mut self, tokens: &[u32]) {
        self.sender.sampled(tokens.len());
        self.emitted.extend_from_slice(tokens);
    }

    /// The sampler's own count against the token ids that came from it. A difference is a bug or a broken worker; what came is
    /// what counts.
    fn compare(&self, worker: &LifeId, finish: &Finish, began: usize) {
        let came = self.emitted.len() - began;
        let complete = matches!(finish.reason(), FinishReason::Stop | FinishReason::Length);
        if complete && finish.completion_tokens as usize != came {
            self.cluster.metrics.miscounts.inc();
            let counted = finish.completion_tokens;
            tracing::error!(worker_id = %worker.0, counted, came, "a worker counted other tokens than it sent");
        }
    }

    /// The present attempt told how many prompt tokens were cached; a later word of the same attempt replaces it.
    fn note_cached(&mut self, cached_tokens: u32) {
        if self.cached.is_none_or(|(attempt, _)| attempt == self.attempts) {
            self.cached = Some((self.attempts, cached_tokens));
        }
    }

    /// A place for the rest of the request on a worker that stays; `None` if there is none now, or no rest.
    fn place_elsewhere(&self) -> Option<Placed> {
        if self.already_over().is_some() || self.job.prompt.len() + self.emitted.len() > PROMPT_TOKENS_MAX {
            return None;
        }
        self.cluster.place(&self.job.model, self.rest(), &self.avoid).ok()
    }

    /// A worker can die after its last token and before it says so: then nothing is left to do.
    fn already_over(&self) -> Option<Finish> {
        let last = *self.emitted.last()?;
        let reason = if self.job.stop_token_ids.contains(&last) {
            FinishReason::Stop
        } else if self.emitted.len() >= self.job.max_tokens as usize {
            FinishReason::Length
        } else {
            return None;
        };
        Some(Finish {
            reason: reason.into(),
            ..Finish::default()
        })
    }

    /// Finds a worker for the rest of the request; waits a while if there is none.
    async fn place_again(&mut self, pause: Duration, reason: &str) -> Result<Placed, Finish> {
        let cancelled = Finish {
            reason: FinishReason::Cancelled.into(),
            ..Finish::default()
        };
        let deadline = Instant::now() + pause + Duration::from_millis(self.cluster.config.worker_wait_ms);
        tokio::select! {
            () = self.cancel.cancelled() => return Err(cancelled),
            () = tokio::time::sleep(pause) => {}
        }
        let mut changes = self.cluster.changes();
        loop {
            changes.mark_unchanged();
            let error = match self.cluster.place(&self.job.model, self.rest(), &self.avoid) {
                Ok(placed) => return Ok(placed),
                Err(error) => error,
            };
            if Instant::now() >= deadline {
                let missing = match error {
                    PlaceError::Full => "every other worker is full",
                    PlaceError::Nobody => "no other worker appeared",
                };
                return Err(failed(format!(
                    "{missing} in {} ms after: {reason}",
                    self.cluster.config.worker_wait_ms
                )));
            }
            tokio::select! {
                () = self.cancel.cancelled() => return Err(cancelled),
                _ = changes.changed() => {}
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// The request from where it stands: sampling depends on positions, so the rest comes out as it would have.
    fn rest(&self) -> Generate {
        let mut generate = first_generate(&self.job);
        generate.prompt.extend_from_slice(&self.emitted);
        let emitted = u32::try_from(self.emitted.len()).unwrap_or(u32::MAX);
        generate.emitted_tokens = emitted;
        generate.max_tokens = self.job.max_tokens.saturating_sub(emitted);
        generate
    }

    /// The gateway hung up: the worker is told before anything else, and then asked what it had done.
    async fn cancelled(&mut self, submission: &mut Submission) {
        submission.cancel();
        let end = async {
            loop {
                let delivery = submission.next().await;
                self.take(&delivery.tokens);
                if let Some(cached_tokens) = delivery.cached_tokens {
                    self.note_cached(cached_tokens);
                }
                if let Some(end) = delivery.end {
                    return end;
                }
            }
        };
        let told = tokio::time::timeout(CANCELLED_WAIT, end).await;
        let mut finish = match told {
            Ok(End::Finished(finish)) if finish.reason() != FinishReason::Error => {
                self.note_cached(finish.cached_tokens);
                finish
            }
            _ => Finish::default(),
        };
        finish.reason = FinishReason::Cancelled.into();
        self.end(Vec::new(), Vec::new(), finish).await;
    }

    /// Hands up the last event, with counts as if nothing had happened in between.
    async fn end(&mut self, tokens: Vec<u32>, logprobs: Vec<TokenLogprobs>, mut finish: Finish) {
        let prompt_tokens = u32::try_from(self.job.prompt.len()).unwrap_or(u32::MAX);
        finish.prompt_tokens = prompt_tokens;
        finish.completion_tokens = u32::try_from(self.emitted.len()).unwrap_or(u32::MAX);
        let cached_tokens = self.cached.map_or(finish.cached_tokens, |(_, tokens)| tokens);
        finish.cached_tokens = cached_tokens.min(prompt_tokens);
        let complete = matches!(finish.reason(), FinishReason::Stop | FinishReason::Length);
        self.admitted
            .used(finish.cached_tokens, finish.completion_tokens, complete);
        let event = GenerationEvent {
            tokens,
            logprobs,
            finish: Some(finish),
        };
        // After a cancellation nobody may listen any more; that is not a failure.
        if self.cancel.is_cancelled() {
            let _ = self.sender.try_send(event);
            return;
        }
        tokio::select! {
            () = self.cancel.cancelled() => {}
            _ = self.sender.send(event) => {}
        }
    }
}

fn failed(error: String) -> Finish {
    Finish {
        reason: FinishReason::Error.into(),
        error,
        retryable: true,
        ..Finish::default()
    }
}
