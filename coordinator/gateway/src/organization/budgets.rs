//! `/v1/organization/budgets`: ours. Shown with what became of the present period: charged, set aside by coordinators for
//! running requests, and free.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query};
use axum::{Extension, Json};
use baton_ledger::money;
use baton_proto::state::{Budget, Period, PutBudget, command::Kind};
use baton_state::{Tables, period_start, view};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Calls, Decimal, Shared, body, collect, new_id, page};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::clock::unix_ms;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct BudgetBody {
    /// Of the budget to change; a new one otherwise.
    id: Option<String>,
    project_id: String,
    key_id: Option<String>,
    currency: Option<String>,
    /// Decimal, in units of the currency.
    limit: Decimal,
    /// "total", "day" or "month".
    period: String,
    hard: Option<bool>,
}

pub(super) const EXAMPLE: &str =
    r#"{"project_id": "proj_1", "limit": "100.00", "currency": "USD", "period": "month", "hard": true}"#;

/// `GET`.
pub(super) async fn list(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let after = params.one::<String>("after", "a budget's id")?.unwrap_or_default();
    let projects = params.list("project_ids");
    params.end()?;
    let found = accounts.read(move |tables| {
        let next = |tables: &dyn Tables, after: &str| view::budgets_after(tables, after, view::PAGE_RECORDS_MAX);
        let keep = |budget: Budget| {
            let wanted = projects.is_empty() || projects.contains(&budget.project_id);
            wanted.then(|| shown(&*tables, &budget)).transpose()
        };
        collect(&*tables, after, limit, next, |budget| &budget.id, keep)
    });
    Ok(Json(page(found.await?, limit, super::keys::id_of)))
}

/// `GET …/{budget}`.
pub(super) async fn get(Extension(accounts): Shared, Path(id): Path<String>) -> Answer {
    let tables = accounts.store.tables()?;
    let found = view::budget(&*tables, &id).map_err(StoreError::from)?;
    let budget = found.ok_or_else(|| ApiError::no_such("budget", &id))?;
    Ok(Json(shown(&*tables, &budget)?))
}

/// `POST`: makes one, or changes the limit of the one named.
pub(super) async fn put(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<BudgetBody>, JsonRejection>,
) -> Answer {
    let new: BudgetBody = body(json, EXAMPLE)?;
    let limit_nano = money::parse_nano(&new.limit.text());
    let period = match new.period.as_str() {
        "total" => Period::Total,
        "day" => Period::Day,
        "month" => Period::Month,
        _ => return Err(ApiError::field("period", "`period` must be total, day or month.")),
    };
    let budget = Budget {
        id: new.id.unwrap_or_else(|| new_id("budget")),
        project_id: new.project_id,
        key_id: new.key_id.unwrap_or_default(),
        currency: new.currency.unwrap_or_else(|| "USD".into()),
        limit_nano: limit_nano.map_err(|error| ApiError::field("limit", format!("`limit`: {error}.")))?,
        period: period.into(),
        hard: new.hard.unwrap_or(true),
    };
    let kind = Kind::PutBudget(PutBudget {
        budget: Some(budget.clone()),
    });
    accounts.change(&caller, kind).await?;
    Ok(Json(shown(&*accounts.store.tables()?, &budget)?))
}

fn shown(tables: &dyn Tables, budget: &Budget) -> Result<Value, ApiError> {
    let now_ms = unix_ms().max(view::time(tables).map_err(StoreError::from)?);
    let start = period_start(budget.period(), now_ms);
    let window = view::window(tables, &budget.id, start).map_err(StoreError::from)?;
    let (posted, open) = window.map_or((0, 0), |window| (window.posted_nano, window.open_nano));
    let free = u128::from(budget.limit_nano).saturating_sub(posted + open);
    let amount = |nano: u128| super::money(i128::try_from(nano).unwrap_or(i128::MAX));
    Ok(json!({
        "id": budget.id,
        "object": "organization.budget",
        "project_id": budget.project_id,
        "key_id": if budget.key_id.is_empty() { Value::Null } else { budget.key_id.clone().into() },
        "currency": budget.currency,
        "limit": super::money(budget.limit_nano),
        "period": match budget.period() {
            Period::Day => "day",
            Period::Month => "month",
            Period::Total | Period::Unspecified => "total",
        },
        "period_start": start / 1000,
        "hard": budget.hard,
        "spent": amount(posted),
        "set_aside": amount(open),
        "free": amount(free),
    }))
}
