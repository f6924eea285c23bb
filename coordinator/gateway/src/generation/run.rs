//! One request from its placement to its settled record. Whatever ends it (the model, a stop string, a failure, a
//! client that hangs up), exactly one usage record is settled, and the work in the cluster is cancelled if it still runs.
//!
//! For a request that succeeds the record is durable before its end is told to the client. For one that does not, the
//! record is settled by a task of its own, which outlives the connection, keeps the request's place among those in work
//! (so the number of such tasks is bounded), and is waited for at shutdown.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use baton_proto::state::UsageStatus;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use tokio_util::sync::CancellationToken;

use super::draft::{Draft, Ledger, Opened, SETTLE_PAUSE, Witness};
use super::output::{End, EndReason, Outcome, Piece};
use super::sequence::Sequence;
use crate::accounts::hold::Hold;
use crate::api_error::ApiError;
use crate::backend::{Backend, GenerationEvent};
use crate::metrics::Counts;

/// A request that runs. Dropping it cancels the work and settles the record as cancelled.
pub(crate) struct Run<B: Backend> {
    ledger: Arc<Ledger<B>>,
    opened: Opened,
    /// What it holds of limits and budgets.
    hold: Hold,
    /// Cancelled when a budget is no longer set aside for it.
    cut: Option<CancellationToken>,
    sequences: Vec<Sequence>,
    /// Whom to ask first: the one after the last that spoke.
    turn: usize,
    first_tokens_seen: bool,
    permit: Option<OwnedSemaphorePermit>,
    settled: bool,
}

/// What a step brought.
pub(crate) enum Step {
    /// More of one choice.
    Piece(Piece),
    /// All choices are complete. Not settled yet.
    Over,
}

impl<B: Backend> Run<B> {
    /// `permit` holds a place for every choice.
    pub fn new(
        ledger: Arc<Ledger<B>>,
        opened: Opened,
        hold: Hold,
        sequences: Vec<Sequence>,
        permit: OwnedSemaphorePermit,
    ) -> Self {
        ledger.metrics.in_flight.inc();
        Self {
            ledger,
            opened,
            cut: hold.cut(),
            hold,
            sequences,
            turn: 0,
            first_tokens_seen: false,
            permit: Some(permit),
            settled: false,
        }
    }

    /// How many choices it has.
    pub fn choices(&self) -> u32 {
        u32::try_from(self.sequences.len()).unwrap_or(u32::MAX)
    }

    /// Waits for the next tokens. Cancel-safe. After an error or [`Step::Over`] there is nothing more to wait for.
    pub async fn step(&mut self) -> Result<Step, ApiError> {
        if self.sequences.iter().all(|sequence| sequence.end.is_some()) {
            return Ok(Step::Over);
        }
        let cut = self.cut.clone();
        let (sequences, turn) = (&mut self.sequences, &mut self.turn);
        let next = std::future::poll_fn(|context| poll_any(sequences, turn, context));
        let next = match cut {
            None => Some(next.await),
            Some(cut) => tokio::select! {
                biased;
                () = cut.cancelled() => None,
                next = next => Some(next),
            },
        };
        let Some((at, event)) = next else {
            self.fail("a slice of a budget could not be prolonged");
            return Err(budget_lost());
        };
        let Some(event) = event else {
            self.fail("the generation ended without a finish");
            return Err(ApiError::unavailable(
                "The generation was lost before it finished; retry.",
            ));
        };
        self.time(at, &event);
        match self.sequences[at].take(event) {
            Ok(piece) => Ok(Step::Piece(piece)),
            Err(failure) => {
                self.fail(&failure.cause);
                if let Some(field) = failure.field {
                    let param = if field == "grammar" {
                        self.opened.grammar_param.to_owned()
                    } else {
                        field
                    };
                    return Err(ApiError::field(param, failure.cause));
                }
                let error = ApiError::unavailable("The generation failed on the cluster; retry.");
                Err(if failure.retryable { error } else { ApiError::internal() })
            }
        }
    }

    /// What this choice has shown so far is in the connection's hands.
    pub fn mark_delivered(&mut self, choice: u32) {
        if let Some(sequence) = self.sequences.get_mut(choice as usize) {
            sequence.delivered = sequence.tokens();
        }
    }

    /// Usage so far, of what was read. What of the prompt was cached is known in the end.
    pub fn counts(&self) -> Counts {
        let sum = |of: fn(&Sequence) -> u32| self.sequences.iter().fold(0u32, |sum, one| sum.saturating_add(of(one)));
        Counts {
            prompt: self.opened.prompt_tokens_total(),
            cached: 0,
            completion: sum(Sequence::tokens),
            reasoning: sum(|sequence| sequence.reasoning_tokens),
        }
    }

    /// Settles a request of which every choice ended well. The record is durable on `Ok`; on an error the client must not be
    /// told of success, and the request is recorded as failed, with what was shown of it, as soon as that works.
    pub async fn settle(&mut self) -> Result<Outcome, ApiError> {
        let ends: Vec<End> = self
            .sequences
            .iter()
            .filter_map(|sequence| sequence.end.clone())
            .collect();
        let cut_short = ends.iter().any(|end| end.reason == EndReason::Length);
        let status = if cut_short {
            UsageStatus::Length
        } else {
            UsageStatus::Completed
        };
        let word = if cut_short { "length" } else { "stop" };
        let mut shown = Vec::with_capacity(self.sequences.len());
        for sequence in &mut self.sequences {
            let tokens = sequence.tokens();
            shown.push(std::mem::replace(&mut sequence.delivered, tokens));
        }
        self.settled = true;
        let draft = self.draft(status);
        let elapsed = self.opened.arrived.elapsed();
        let ledger = self.ledger.clone();
        let permit = self.permit.take();
        let (tell, told) = oneshot::channel();
        // A task of its own: a client that hangs up now must not undo a commit half-way.
        let task = async move {
            let mut draft = draft.complete().await;
            let counts = draft.counts();
            ledger.metrics.ended(&draft.opened.model, word, counts, elapsed);
            let record = draft.record();
            draft.hold.settled(&record);
            let result = ledger.backend.settle(record).await;
            let failed = result.is_err();
            // Nobody may be there to hear it; the record stands all the same.
            let _ = tell.send(result.map(|()| counts));
            if failed {
                draft.fail(&shown);
                tokio::time::sleep(SETTLE_PAUSE).await;
                ledger.settle(draft).await;
            }
            drop(permit);
        };
        self.ledger.settling.spawn_on(task, &self.ledger.runtime);
        match told.await {
            Ok(Ok(counts)) => Ok(Outcome { ends, counts }),
            Ok(Err(error)) => {
                tracing::warn!(request_id = %self.opened.request_id, %error, "a finished request could not be settled");
                Err(ApiError::unavailable(
                    "The usage of this request could not be recorded; retry.",
                ))
            }
            Err(_) => Err(ApiError::internal()),
        }
    }

    /// Something outside went wrong: the request is recorded as failed.
    pub fn fail(&mut self, cause: &str) {
        tracing::warn!(request_id = %self.opened.request_id, cause, "a generation failed");
        self.settle_later(UsageStatus::Failed, "error");
    }

    /// Cancels what still runs, now, and settles in a task of its own.
    fn settle_later(&mut self, status: UsageStatus, reason: &'static str) {
        if std::mem::replace(&mut self.settled, true) {
            return;
        }
        self.sequences.iter_mut().for_each(Sequence::cancel);
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

    fn draft(&mut self, status: UsageStatus) -> Draft {
        Draft {
            opened: self.opened.clone(),
            status,
            hold: std::mem::take(&mut self.hold),
            witnesses: self.sequences.iter_mut().map(Witness::of).collect(),
        }
    }

    fn time(&mut self, at: usize, event: &GenerationEvent) {
        let arrived = self.opened.arrived;
        let sequence = &mut self.sequences[at];
        let metrics = &self.ledger.metrics;
        if !event.tokens.is_empty() {
            let now = Instant::now();
            match sequence.last_tokens_at.replace(now) {
                None => {
                    sequence.first_tokens_at = Some(now);
                    // Of a request, the first of all its choices.
                    if !std::mem::replace(&mut self.first_tokens_seen, true) {
                        metrics.first_token(&self.opened.model, now - arrived);
                    }
                }
                Some(last) => metrics.next_tokens(&self.opened.model, now - last),
            }
        }
        // What the first token took beyond the worker that streamed to the end; a choice that moved had others before it, and
        // one of several waited for its like.
        if let Some(finish) = &event.finish
            && let Some(first) = sequence.first_tokens_at
            && self.opened.n == 1
            && !sequence.moved()
        {
            let at_workers = Duration::from_micros(finish.queued_us.saturating_add(finish.prefill_us));
            metrics.outside_workers(&self.opened.model, first - arrived, at_workers);
        }
    }
}

/// The next event of any, in turns, so that one that is quick does not silence the others.
fn poll_any(
    sequences: &mut [Sequence],
    turn: &mut usize,
    context: &mut Context<'_>,
) -> Poll<(usize, Option<GenerationEvent>)> {
    let count = sequences.len();
    for step in 0..count {
        let at = (*turn + step) % count;
        if let Poll::Ready(event) = sequences[at].poll_event(context) {
            *turn = at + 1;
            return Poll::Ready((at, event));
        }
    }
    Poll::Pending
}

impl<B: Backend> Drop for Run<B> {
    fn drop(&mut self) {
        self.settle_later(UsageStatus::Cancelled, "abort");
        self.ledger.metrics.in_flight.dec();
    }
}

/// What the client of a request is told that had to stop because its budget is no longer set aside.
pub(crate) fn budget_lost() -> ApiError {
    ApiError::unavailable("The budget of this request could not be kept set aside; retry.")
}
