//! What an organisation administers and reads: projects, keys, prices, budgets, corrections, the audit log; usage, costs,
//! and the ledger itself. Shapes are OpenAI's where OpenAI has them, with more fields where the state has more; each file
//! says which are ours.
//!
//! Every change is a command that goes through the group; reads are of what this member has applied. Scopes were checked
//! before ([`routes`](crate::routes)). Money is decimal text, never a float.

mod audit_logs;
mod budgets;
mod corrections;
mod costs;
mod keys;
mod ledger;
mod params;
mod prices;
mod projects;
mod usage;

pub(crate) use params::Params;

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use baton_proto::state::command::Kind;
use baton_state::{Applied, Tables};
use serde::Serialize;
use serde_json::{Value, json};

use crate::accounts::Accounts;
use crate::accounts::store::{StoreError, TablesBox, command};
use crate::api_error::ApiError;
use crate::auth::Caller;

/// Of everything, until a cluster serves several.
const ORGANIZATION_ID: &str = "org-default";

/// The routes; none where there is no replicated state.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(accounts: Option<&Arc<Accounts>>) -> Router<S> {
    let Some(accounts) = accounts else {
        return Router::new();
    };
    Router::new()
        .route("/v1/organization/usage/completions", get(usage::completions))
        .route("/v1/organization/costs", get(costs::costs))
        .route("/v1/ledger/rows", get(ledger::rows))
        .route("/v1/ledger/checkpoints", get(ledger::checkpoints))
        .route("/v1/ledger/seal", post(ledger::seal))
        .route("/v1/organization/projects", get(projects::list).post(projects::create))
        .route(
            "/v1/organization/projects/{project}",
            get(projects::get).post(projects::update),
        )
        .route("/v1/organization/projects/{project}/archive", post(projects::archive))
        .route(
            "/v1/organization/projects/{project}/api_keys",
            get(keys::list).post(keys::create),
        )
        .route(
            "/v1/organization/projects/{project}/api_keys/{key}",
            get(keys::get).delete(keys::revoke),
        )
        .route(
            "/v1/organization/admin_api_keys",
            get(keys::list_admin).post(keys::create_admin),
        )
        .route(
            "/v1/organization/admin_api_keys/{key}",
            get(keys::get_admin).delete(keys::revoke_admin),
        )
        .route("/v1/organization/prices", get(prices::list).post(prices::create))
        .route("/v1/organization/budgets", get(budgets::list).post(budgets::put))
        .route("/v1/organization/budgets/{budget}", get(budgets::get))
        .route("/v1/organization/corrections", post(corrections::create))
        .route("/v1/organization/audit_logs", get(audit_logs::list))
        .layer(Extension(accounts.clone()))
}

type Answer = Result<Json<Value>, ApiError>;
type Shared = Extension<Arc<Accounts>>;
type Calls = Extension<Caller>;

impl Accounts {
    /// Reads the state on a thread that may block.
    async fn read<T: Send + 'static>(
        self: &Arc<Self>,
        read: impl FnOnce(TablesBox) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let store = self.store.clone();
        let reading = tokio::task::spawn_blocking(move || read(store.tables()?));
        reading.await.map_err(|_| ApiError::internal())?
    }

    /// Changes the state.
    async fn change(&self, caller: &Caller, kind: Kind) -> Result<Applied, ApiError> {
        Ok(self.store.propose(command(caller.actor(), kind)).await?)
    }
}

/// The body of a request.
pub(crate) fn body<T>(body: Result<Json<T>, JsonRejection>, example: &str) -> Result<T, ApiError> {
    body.map(|Json(body)| body).map_err(|rejection| match rejection {
        JsonRejection::MissingJsonContentType(_) => ApiError::media_type(),
        JsonRejection::JsonDataError(error) => ApiError::bad_request(format!(
            "The body is wrong: {}. An example: {example}.",
            error.body_text()
        )),
        _ => ApiError::bad_request(format!("The body must be a JSON object such as {example}.")),
    })
}

/// OpenAI's list: of `items`, of which there may be one more than fits.
pub(crate) fn page<T: Serialize>(mut items: Vec<T>, limit: usize, id: impl Fn(&T) -> String) -> Value {
    let has_more = items.len() > limit;
    items.truncate(limit);
    let (first, last) = (items.first().map(&id), items.last().map(&id));
    json!({"object": "list", "data": items, "first_id": first, "last_id": last, "has_more": has_more})
}

/// Of what `next` lists after a name, those that `keep` keeps: at most one more than `limit`.
fn collect<T, K>(
    tables: &dyn Tables,
    mut after: String,
    limit: usize,
    next: impl Fn(&dyn Tables, &str) -> Result<Vec<T>, baton_state::TablesError>,
    name: impl Fn(&T) -> &str,
    mut keep: impl FnMut(T) -> Result<Option<K>, ApiError>,
) -> Result<Vec<K>, ApiError> {
    let mut found = Vec::new();
    loop {
        let page = next(tables, &after).map_err(StoreError::from)?;
        let Some(last) = page.last() else { return Ok(found) };
        name(last).clone_into(&mut after);
        for item in page {
            found.extend(keep(item)?);
            if found.len() > limit {
                return Ok(found);
            }
        }
    }
}

/// When something with a time-ordered id (`proj_018f…`) was made, in seconds of Unix time; 0 if the id does not say.
fn made_unix_s(id: &str) -> u64 {
    let (_, hex) = id.rsplit_once('_').unwrap_or(("", id));
    let ms = hex.get(..12).filter(|_| hex.len() == 32);
    ms.and_then(|ms| u64::from_str_radix(ms, 16).ok())
        .map_or(0, |ms| ms / 1000)
}

/// A new time-ordered id.
fn new_id(prefix: &str) -> String {
    format!("{prefix}_{}", uuid::Uuid::now_v7().simple())
}

/// An amount as decimal text.
fn money(nano: impl Into<i128>) -> String {
    baton_ledger::money::Nano(nano.into()).to_string()
}

/// A decimal as JSON text or number, read digit by digit.
#[derive(Debug, Clone, serde::Deserialize)]
#[serde(untagged)]
enum Decimal {
    Text(String),
    Number(serde_json::Number),
}

impl Decimal {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Number(number) => number.to_string(),
        }
    }
}
