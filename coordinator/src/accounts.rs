//! The replicated state as the gateway's accounts see it ([`AccountStore`]), the signing of the ledger's periods
//! ([`seals`]), and the settling of records.
//!
//! Deliberately not here: what callers may do (gateway) and what commands do (`baton-state`).

mod seals;

use std::sync::Arc;
use std::time::Duration;

use baton_gateway::{AccountStore, BackendError, Proposed, StoreError, TablesBox, command};
use baton_proto::state::command::Kind;
use baton_proto::state::{Checkpoint, Command, SettleUsage, UsageRecord, UsageStatus};
use baton_raftstore::{RaftStore, RaftStoreError};
use baton_state::{Applied, Refused};
use tokio::time::Instant;

pub(crate) use seals::{Sealer, keep};

/// Longest time for a command to be committed, elections included: several of them, each at most twice the election timeout,
/// and less than a client waits for the end of a stream that it has.
const PROPOSE_MAX: Duration = Duration::from_secs(20);
/// Longest wait for one attempt. A proposal that was forwarded to a leader that died is answered by nobody.
const ATTEMPT_MAX: Duration = Duration::from_secs(1);
/// Pause between attempts, which an election needs anyway.
const PAUSE: Duration = Duration::from_millis(50);

/// See the module.
pub(crate) struct Accounts {
    store: RaftStore,
    member_id: u64,
    sealer: Sealer,
}

impl Accounts {
    pub(crate) fn new(store: RaftStore, member_id: u64, sealer: Sealer) -> Arc<Self> {
        Arc::new(Self {
            store,
            member_id,
            sealer,
        })
    }

    /// Proposes, again where that may help: every command of this module may be repeated, and changes nothing the second
    /// time. Elections included.
    async fn propose_again(&self, command: Command) -> Result<Applied, StoreError> {
        let deadline = Instant::now() + PROPOSE_MAX;
        loop {
            let attempt = tokio::time::timeout(ATTEMPT_MAX, self.store.propose(command.clone())).await;
            let reason = match attempt {
                Ok(Ok(applied)) => return Ok(applied),
                Ok(Err(
                    error @ (RaftStoreError::NoLeader
                    | RaftStoreError::LeaderChanged
                    | RaftStoreError::Timeout { .. }
                    | RaftStoreError::Overloaded { .. }),
                )) => error.to_string(),
                Ok(Err(error)) => return Err(store_error(error)),
                Err(_) => format!("no answer within {ATTEMPT_MAX:?}"),
            };
            if Instant::now() + PAUSE >= deadline {
                return Err(StoreError::Unavailable(reason));
            }
            tracing::warn!(%reason, "proposing again");
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Makes a usage record durable. One that the state refuses for what it says of budget or price is settled all the same,
    /// charged nothing: what was delivered is on record, and a budget is not overrun by a gateway's mistake.
    pub(crate) async fn settle(&self, record: UsageRecord) -> Result<(), BackendError> {
        match self.settle_as(record.clone()).await {
            Err(StoreError::Refused(refused)) if may_be_free(&refused) => {
                tracing::error!(request_id = %record.request_id, %refused, "a record is settled without charge");
                let free = without_charge(record, &refused);
                self.settle_as(free).await
            }
            settled => settled,
        }
        .map_err(|error| BackendError::Unavailable {
            reason: format!("the usage record could not be committed: {error}"),
        })
    }

    async fn settle_as(&self, record: UsageRecord) -> Result<(), StoreError> {
        let kind = Kind::SettleUsage(SettleUsage { record: Some(record) });
        self.propose_again(command("", kind)).await.map(|_| ())
    }
}

/// Whether a record is refused for something other than its counts.
fn may_be_free(refused: &Refused) -> bool {
    matches!(
        refused,
        Refused::BeyondReservation { .. }
            | Refused::WrongPrice { .. }
            | Refused::Unknown { .. }
            | Refused::Invalid(_)
            | Refused::IdempotencyConflict { .. }
    )
}

fn without_charge(mut record: UsageRecord, refused: &Refused) -> UsageRecord {
    record.idempotency_key_sha256.clear();
    record.request_sha256.clear();
    // Two bodies under one key ran on two members at once: both were delivered, so both are billed.
    if !matches!(refused, Refused::IdempotencyConflict { .. }) {
        record.status = UsageStatus::Expired.into();
        record.price_id.clear();
        record.postings.clear();
    }
    record
}

fn store_error(error: RaftStoreError) -> StoreError {
    match error {
        RaftStoreError::Refused(refused) => StoreError::Refused(refused),
        other => StoreError::Unavailable(other.to_string()),
    }
}

impl AccountStore for Accounts {
    fn tables(&self) -> Result<TablesBox, StoreError> {
        let tables = self.store.state().map_err(store_error)?;
        Ok(Box::new(tables))
    }

    fn applied_index(&self) -> u64 {
        self.store.status().applied_index
    }

    fn member_id(&self) -> u64 {
        self.member_id
    }

    fn propose(&self, command: Command) -> Proposed<'_, Applied> {
        Box::pin(self.propose_again(command))
    }

    fn seal(&self, actor: &str) -> Proposed<'_, Option<Checkpoint>> {
        let actor = actor.to_owned();
        Box::pin(async move { self.sealer.seal(self, &actor).await })
    }
}
