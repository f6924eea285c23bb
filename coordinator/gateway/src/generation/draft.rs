//! A request's usage record in the making, and how it gets into the ledger. One record per request, whatever its number of
//! choices: each prompt counted once, completions and what the workers sampled summed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use baton_proto::state::{UsageRecord, UsageStatus};
use baton_proto::worker::Finish;
use baton_state::bounds::ATTEMPTS_MAX;
use tokio_util::task::TaskTracker;

use super::sequence::{Sequence, Stopping};
use crate::accounts::hold::Hold;
use crate::backend::{Backend, Track};
use crate::clock::unix_ms;
use crate::metrics::{Counts, Metrics};

/// Tries of a record that nobody waits for: long enough for a new Raft leader. Settling is idempotent.
const SETTLE_TRIES: u32 = 5;
pub(crate) const SETTLE_PAUSE: Duration = Duration::from_secs(1);

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
    /// Of each prompt.
    pub prompt_tokens: Vec<u32>,
    /// Choices of each prompt.
    pub n: u32,
    /// Where in the request the grammar comes from, if it has one.
    pub grammar_param: &'static str,
    /// When the request arrived.
    pub arrived: Instant,
    /// The same by the wall clock, in milliseconds of Unix time.
    pub arrived_unix_ms: u64,
}

impl Opened {
    /// All prompts together.
    pub fn prompt_tokens_total(&self) -> u32 {
        self.prompt_tokens
            .iter()
            .fold(0, |sum, tokens| sum.saturating_add(*tokens))
    }
}

/// See the module.
pub(crate) struct Draft {
    pub opened: Opened,
    pub status: UsageStatus,
    pub hold: Hold,
    /// In order of the choices; those that were never placed are missing at the end.
    pub witnesses: Vec<Witness>,
}

/// What is known of one choice.
pub(crate) struct Witness {
    track: Track,
    finish: Option<Finish>,
    stopping: Option<Stopping>,
    delivered: u32,
    /// Tokens that came, shown or not.
    received: u32,
    reasoning: u32,
}

impl Witness {
    /// Takes what a sequence knows, and leaves it without.
    pub fn of(sequence: &mut Sequence) -> Self {
        Self {
            track: sequence.track.clone(),
            finish: sequence.finish.take(),
            stopping: sequence.stopping.take(),
            delivered: sequence.delivered,
            received: sequence.tokens(),
            reasoning: sequence.reasoning_tokens,
        }
    }
}

impl Draft {
    /// Waits for the counts of cancelled generations; bounded, as each of them is, since they wait at the same time.
    pub async fn complete(mut self) -> Self {
        let waits = self.witnesses.iter_mut().map(|witness| async {
            if let Some(stopping) = witness.stopping.take() {
                witness.finish = stopping.await;
            }
        });
        futures_util::future::join_all(waits).await;
        self
    }

    /// The request is to be recorded as failed after all, with what was `shown` of each choice.
    pub fn fail(&mut self, shown: &[u32]) {
        self.status = UsageStatus::Failed;
        for (witness, &shown) in self.witnesses.iter_mut().zip(shown) {
            witness.delivered = shown;
        }
    }

    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            prompt: self.opened.prompt_tokens_total(),
            ..Counts::default()
        };
        let first_choices = self.witnesses.iter().step_by(self.opened.n.max(1) as usize);
        for (witness, &prompt) in first_choices.zip(&self.opened.prompt_tokens) {
            let cached = witness.finish.as_ref().map_or(0, |finish| finish.cached_tokens);
            counts.cached = counts.cached.saturating_add(cached.min(prompt));
        }
        for witness in &self.witnesses {
            counts.completion = counts.completion.saturating_add(witness.delivered);
            counts.reasoning = counts
                .reasoning
                .saturating_add(witness.reasoning.min(witness.delivered));
        }
        counts
    }

    pub fn record(&self) -> UsageRecord {
        let counts = self.counts();
        let mut record = UsageRecord {
            request_id: self.opened.request_id.clone(),
            model: self.opened.model.clone(),
            status: self.status.into(),
            prompt_tokens: counts.prompt,
            cached_tokens: counts.cached,
            completion_tokens: counts.completion,
            reasoning_tokens: counts.reasoning,
            started_unix_ms: self.opened.arrived_unix_ms,
            settled_unix_ms: unix_ms(),
            ..UsageRecord::default()
        };
        for witness in &self.witnesses {
            let placement = witness.track.placement();
            let (attempts, attempts_sampled) = witness.track.attempts();
            let finish = witness.finish.as_ref();
            // The other witness of what was delivered: the cluster's count. Where it never came, what came of the tokens.
            let told = finish.map_or(witness.received, |finish| finish.completion_tokens);
            record.sampled_tokens = record.sampled_tokens.saturating_add(told.max(attempts_sampled));
            record.attempts = record.attempts.saturating_add(placement.attempts);
            record.attempt_list.extend(attempts);
            if record.decode_worker_id.is_empty() {
                record.decode_worker_id = placement.decode_worker_id;
                let told = finish.map(|finish| finish.prefill_worker_id.clone());
                record.prefill_worker_id = told.filter(|id| !id.is_empty()).unwrap_or(placement.prefill_worker_id);
            }
        }
        let surplus = record.attempt_list.len().saturating_sub(ATTEMPTS_MAX);
        record.attempt_list.drain(..surplus);
        self.hold.fill(&mut record);
        record
    }
}

impl<B: Backend> Ledger<B> {
    /// Settles a record that nobody waits for.
    pub async fn settle(&self, mut draft: Draft) {
        // Made once: a try that was committed and not answered must not differ from the next.
        let record = draft.record();
        draft.hold.settled(&record);
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
