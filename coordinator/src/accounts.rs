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

pub(crate) use seals::{Sealer, keep};

/// Attempts when the store says that trying again may help.
const ATTEMPTS_MAX: u32 = 3;
/// Pause between them.
const PAUSE: Duration = Duration::from_millis(100);

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

    /// Proposes, again where that may help and cannot hurt: every command of this module may be repeated.
    async fn propose_again(&self, command: Command) -> Result<Applied, StoreError> {
        let mut attempt = 1;
        loop {
            match self.store.propose(command.clone()).await {
                Ok(applied) => return Ok(applied),
                Err(
                    error @ (RaftStoreError::NoLeader
                    | RaftStoreError::LeaderChanged
                    | RaftStoreError::Overloaded { .. }),
                ) if attempt < ATTEMPTS_MAX => tracing::warn!(attempt, %error, "proposing again"),
                Err(error) => return Err(store_error(error)),
            }
            attempt += 1;
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
