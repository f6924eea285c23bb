//! What a request holds while it runs, and what its record says of its caller. Made before the request is placed; what is
//! held goes back when its record is on its way, or on drop.
//!
//! **Worst case.** A request is reserved with all of its prompt at the dearer of the two input prices and all of
//! `max_tokens`, plus two nano-units: each class is rounded by itself, so that parts of a prompt can cost one more than the
//! whole.

use std::sync::Arc;

use baton_ledger::charge;
use baton_limits::{Limited, ReserveError};
use baton_proto::state::{Posting, Price, UsageRecord, UsageStatus};
use baton_state::view;
use tokio_util::sync::CancellationToken;

use super::idempotency::{Claim, InUse};
use super::store::StoreError;
use super::wallet::{Held, NotReserved};
use super::{Accounts, idempotency};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::whole_seconds;

/// Parts of a prompt can cost this much more than the whole, in nano-units.
const ROUNDING_NANO: u64 = 2;
/// The slice of a posting to a budget that only counts.
const NO_SLICE: &str = "none";

/// What a request asks for.
pub(crate) struct Ask<'a> {
    pub model: &'a str,
    pub endpoint: &'static str,
    pub prompt_tokens: u32,
    pub max_tokens: u32,
    /// The client said how many; otherwise it is the room there is.
    pub max_tokens_asked: bool,
    /// As the client named it.
    pub user: String,
    pub started_unix_ms: u64,
    pub claim: Option<Claim>,
    /// What exactly is served, as its workers say.
    pub revision: String,
}

/// See the module.
#[derive(Default)]
pub(crate) struct Hold {
    /// What the record says of caller, price and budgets.
    template: UsageRecord,
    accounts: Option<Arc<Accounts>>,
    price: Option<Price>,
    rate: Option<baton_limits::Charge>,
    held: Option<Held>,
    claim: Option<Claim>,
    in_use: Option<InUse>,
    /// The request whose row this one will be settled as.
    replayed: Option<String>,
}

impl Hold {
    /// Checks everything that is counted, and holds what the request may use at most.
    ///
    /// # Errors
    /// What the client is told; nothing is held then.
    pub async fn open(accounts: Option<&Arc<Accounts>>, caller: &Caller, ask: Ask<'_>) -> Result<Self, ApiError> {
        let mut hold = Self::default();
        hold.template = UsageRecord {
            key_id: caller.key_id.to_string(),
            user: ask.user,
            revision: ask.revision,
            endpoint: ask.endpoint.to_owned(),
            service_tier: caller.service_tier().to_owned(),
            ..UsageRecord::default()
        };
        if let Some(account) = &caller.account {
            hold.template
                .organization_id
                .clone_from(&account.project.organization_id);
            hold.template.project_id.clone_from(&account.project.id);
        }
        let Some(accounts) = accounts else {
            return Ok(hold);
        };
        hold.accounts = Some(accounts.clone());
        {
            let tables = accounts.store.tables()?;
            let price = view::price_at(&*tables, ask.model, caller.service_tier(), ask.started_unix_ms);
            hold.price = price.map_err(StoreError::from)?;
            let deployment = view::deployment(&*tables, ask.model).map_err(StoreError::from)?;
            if let Some(deployment) = deployment.filter(|deployment| !deployment.revision.is_empty()) {
                hold.template.revision = deployment.revision;
            }
        }
        if let Some(price) = &hold.price {
            hold.template.price_id.clone_from(&price.id);
        }
        if let Some(claim) = ask.claim {
            let (in_use, known) = idempotency::take(&accounts.in_flight, &*accounts.store, &caller.key_id, &claim)?;
            hold.in_use = Some(in_use);
            hold.claim = Some(claim);
            hold.replayed = known;
        }
        let Some(account) = &caller.account else {
            return Ok(hold);
        };
        let rate = accounts
            .rates
            .admit(account, ask.prompt_tokens, ask.max_tokens, ask.max_tokens_asked);
        hold.rate = rate.map_err(|limited| rate_limited(&limited))?;
        if hold.replayed.is_some() {
            return Ok(hold);
        }
        let Some(price) = hold.price.clone() else {
            return Ok(hold);
        };
        // A budget counts what is charged in its currency.
        let budgets = account
            .budgets
            .iter()
            .filter(|budget| budget.currency == price.currency);
        let (hard, soft): (Vec<_>, Vec<_>) = budgets.partition(|budget| budget.hard);
        for budget in soft {
            hold.template.postings.push(Posting {
                budget_id: budget.id.clone(),
                slice_id: NO_SLICE.to_owned(),
                reserved_nano: 0,
            });
        }
        if !hard.is_empty() {
            let nano = worst_case(&price, ask.prompt_tokens, ask.max_tokens)?;
            let ids: Vec<String> = hard.iter().map(|budget| budget.id.clone()).collect();
            let held = accounts.wallet.reserve(accounts, &ids, nano).await;
            let held = held.map_err(|error| not_reserved(&error, &price))?;
            let postings = held.slices().map(|(budget_id, slice_id, reserved_nano)| Posting {
                budget_id: budget_id.to_owned(),
                slice_id: slice_id.to_owned(),
                reserved_nano,
            });
            hold.template.postings.extend(postings);
            hold.held = Some(held);
        }
        Ok(hold)
    }

    /// The request that this one repeats.
    pub fn replayed(&self) -> Option<&str> {
        self.replayed.as_deref()
    }

    /// Cancelled when the request must stop, because a budget is no longer set aside for it.
    pub fn cut(&self) -> Option<CancellationToken> {
        self.held.as_ref().map(|held| held.cut.clone())
    }

    /// Completes a record with what is known here.
    pub fn fill(&self, record: &mut UsageRecord) {
        let template = self.template.clone();
        record.organization_id = template.organization_id;
        record.project_id = template.project_id;
        record.key_id = template.key_id;
        record.user = template.user;
        record.revision = template.revision;
        record.endpoint = template.endpoint;
        record.service_tier = template.service_tier;
        record.postings = template.postings;
        record.price_id = template.price_id;
        let ended_well = matches!(record.status(), UsageStatus::Completed | UsageStatus::Length);
        if let Some(claim) = self.claim.as_ref().filter(|_| ended_well || self.replayed.is_some()) {
            record.idempotency_key_sha256 = claim.key_sha256.to_vec().into();
            record.request_sha256 = claim.request_sha256.to_vec().into();
        }
    }

    /// The record is on its way: what it does not use is free again. Later records of the same request change nothing here.
    pub fn settled(&mut self, record: &UsageRecord) {
        let Some(accounts) = &self.accounts else { return };
        if self.replayed.is_none() {
            accounts.remember_own(&record.request_id);
        }
        if let Some(rate) = self.rate.take() {
            let tokens = u64::from(record.prompt_tokens) + u64::from(record.completion_tokens);
            accounts.rates.settle(rate, tokens);
        }
        if let Some(mut held) = self.held.take() {
            let charge = charge::of_record(record, self.price.as_ref()).map(|charge| charge::total(&charge));
            // A record that cannot be charged is refused by the group too; until then all of it is spent here.
            held.post(charge.map_or(u64::MAX, |nano| u64::try_from(nano).unwrap_or(u64::MAX)));
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        // Never placed, or never settled: it counts as a request, and no tokens.
        if let (Some(accounts), Some(rate)) = (&self.accounts, self.rate.take()) {
            accounts.rates.settle(rate, 0);
        }
    }
}

/// The most that a request can cost, in nano-units.
fn worst_case(price: &Price, prompt_tokens: u32, max_tokens: u32) -> Result<u64, ApiError> {
    let input = price.input_nano_per_mtok.max(price.cached_input_nano_per_mtok);
    let prompt = charge::amount(prompt_tokens, input);
    let output = charge::amount(max_tokens, price.output_nano_per_mtok);
    match (prompt, output) {
        (Ok(prompt), Ok(output)) => Ok(prompt.saturating_add(output).saturating_add(ROUNDING_NANO)),
        _ => Err(ApiError::bad_request(
            "The request may cost more than can be counted; ask for fewer tokens.",
        )),
    }
}

fn rate_limited(limited: &Limited) -> ApiError {
    match limited {
        Limited::Wait { unit, retry_after, .. } => {
            let kind = match unit {
                baton_limits::Unit::Requests => "requests",
                baton_limits::Unit::Tokens => "tokens",
            };
            let message = sentence(&limited.to_string());
            ApiError {
                kind,
                ..ApiError::overloaded("rate_limit", message, whole_seconds(*retry_after))
            }
        }
        Limited::TooLarge { .. } => ApiError {
            kind: "tokens",
            retry_after_s: None,
            no_retry: true,
            ..ApiError::overloaded("rate_limit", sentence(&limited.to_string()), 1)
        },
    }
}

fn not_reserved(error: &NotReserved, price: &Price) -> ApiError {
    match error {
        NotReserved::Unanswered => {
            ApiError::unavailable("The budget of this request could not be set aside in time; retry.")
        }
        NotReserved::Exhausted(error) => {
            let detail = match error {
                ReserveError::Exhausted {
                    budget_id,
                    left_nano,
                    nano,
                } => format!(
                    "budget `{budget_id}` has {} {} left here and the request may cost {}",
                    baton_ledger::money::Nano((*left_nano).into()),
                    price.currency,
                    baton_ledger::money::Nano((*nano).into()),
                ),
                ReserveError::Short { budget_id } => format!("budget `{budget_id}` is used up"),
            };
            ApiError::insufficient_quota(format!(
                "You exceeded your current quota: {detail}. Ask for fewer tokens (`max_completion_tokens`), or have the \
                 budget raised."
            ))
        }
    }
}

fn sentence(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => format!("{}{}.", first.to_uppercase(), chars.as_str()),
        None => String::new(),
    }
}
