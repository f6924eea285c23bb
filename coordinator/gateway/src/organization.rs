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
mod deployments;
mod keys;
mod ledger;
mod params;
mod prices;
mod projects;
mod usage;

pub(crate) use params::Params;

use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::{Extension, Json};
use baton_proto::state::command::Kind;
use baton_state::{Applied, Tables};
use serde::Serialize;
use serde_json::{Value, json};

use crate::accounts::Accounts;
use crate::accounts::store::{StoreError, TablesBox, command};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::openapi::{About, Api, Purpose};

/// Of everything, until a cluster serves several.
const ORGANIZATION_ID: &str = "org-default";

/// Adds the routes. They need [`Accounts`] as an extension.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(api: Api<S>) -> Api<S> {
    const PROJECTS: &str = "/v1/organization/projects";
    const PROJECT: &str = "/v1/organization/projects/{project}";
    const PROJECT_KEYS: &str = "/v1/organization/projects/{project}/api_keys";
    const PROJECT_KEY: &str = "/v1/organization/projects/{project}/api_keys/{key}";
    const ADMIN_KEYS: &str = "/v1/organization/admin_api_keys";
    const ADMIN_KEY: &str = "/v1/organization/admin_api_keys/{key}";
    let reads = |summary, query| About::new(Purpose::Read, summary).query(query);
    let changes = |summary| About::new(Purpose::Change, summary);
    api.get(
        "/v1/organization/usage/completions",
        usage::completions,
        reads("What was used", usage::QUERY),
    )
    .get(
        "/v1/organization/costs",
        costs::costs,
        reads("What it cost", costs::QUERY),
    )
    .get(
        "/v1/ledger/rows",
        ledger::rows,
        reads("Every request, gap-free", &["after", "checkpoints_after", "limit"]),
    )
    .get(
        "/v1/ledger/checkpoints",
        ledger::checkpoints,
        reads("The ledger's signed ends", &["after", "limit"]),
    )
    .post("/v1/ledger/seal", ledger::seal, changes("Seals the ledger up to now"))
    .get(
        PROJECTS,
        projects::list,
        reads("Projects", &["after", "limit", "include_archived"]),
    )
    .post(
        PROJECTS,
        projects::create,
        changes("Makes a project").example(projects::EXAMPLE),
    )
    .get(PROJECT, projects::get, reads("A project", &[]))
    .post(
        PROJECT,
        projects::update,
        changes("Changes a project").example(projects::EXAMPLE),
    )
    .post(
        "/v1/organization/projects/{project}/archive",
        projects::archive,
        changes("Archives a project: its keys are refused"),
    )
    .get(
        PROJECT_KEYS,
        keys::list,
        reads("Keys of a project", &["after", "limit", "include_revoked", "order"]),
    )
    .post(
        PROJECT_KEYS,
        keys::create,
        changes("Makes a key; its secret is told once").example(keys::EXAMPLE),
    )
    .get(PROJECT_KEY, keys::get, reads("A key", &[]))
    .post(PROJECT_KEY, keys::update, changes("Changes a key"))
    .delete(PROJECT_KEY, keys::revoke, changes("Revokes a key"))
    .get(
        ADMIN_KEYS,
        keys::list_admin,
        reads(
            "Keys for administration",
            &["after", "limit", "include_revoked", "order"],
        ),
    )
    .post(
        ADMIN_KEYS,
        keys::create_admin,
        changes("Makes a key for administration; its secret is told once").example(r#"{"name": "operator"}"#),
    )
    .get(ADMIN_KEY, keys::get_admin, reads("A key for administration", &[]))
    .delete(
        ADMIN_KEY,
        keys::revoke_admin,
        changes("Revokes a key for administration"),
    )
    .get(
        "/v1/organization/prices",
        prices::list,
        reads("Prices", &["after", "limit", "model"]),
    )
    .post(
        "/v1/organization/prices",
        prices::create,
        changes("Sets a price from now on").example(prices::EXAMPLE),
    )
    .get(
        "/v1/organization/budgets",
        budgets::list,
        reads("Budgets", &["after", "limit", "project_ids"]),
    )
    .post(
        "/v1/organization/budgets",
        budgets::put,
        changes("Sets a budget").example(budgets::EXAMPLE),
    )
    .get(
        "/v1/organization/budgets/{budget}",
        budgets::get,
        reads("A budget", &[]),
    )
    .get(
        "/v1/organization/deployments",
        deployments::list,
        reads(
            "Deployments: which revision of a model is to be served",
            &["after", "limit"],
        ),
    )
    .post(
        "/v1/organization/deployments",
        deployments::put,
        changes("Deploys a revision of a model"),
    )
    .get(
        "/v1/organization/deployments/{model}",
        deployments::get,
        reads("A deployment", &[]),
    )
    .delete(
        "/v1/organization/deployments/{model}",
        deployments::remove,
        changes("Removes a deployment"),
    )
    .post(
        "/v1/organization/corrections",
        corrections::create,
        changes("Corrects what a request cost, by a new row").example(corrections::EXAMPLE),
    )
    .get(
        "/v1/organization/audit_logs",
        audit_logs::list,
        reads("What was changed, by whom", audit_logs::QUERY),
    )
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
