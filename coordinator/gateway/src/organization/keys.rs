//! `…/projects/{project}/api_keys` and `/v1/organization/admin_api_keys`: listing, showing and deleting are as OpenAI's;
//! making a project's key and changing it is ours. The secret is in the answer to its making and nowhere else: the state has its SHA-256.
//! A key that is deleted is revoked for good and kept for its history; lists show it with `include_revoked=true`.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query};
use axum::{Extension, Json};
use baton_proto::state::{ApiKey, Limits, Project, PutKey, PutProject, RevokeKey, Scope, command::Kind};
use baton_state::{Tables, view};
use ring::rand::{SecureRandom, SystemRandom};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::projects::{self, LimitsBody};
use super::{Answer, Calls, ORGANIZATION_ID, Shared, body, collect, new_id, page};
use crate::accounts::Accounts;
use crate::accounts::keys::sha256;
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Share;
use crate::clock::unix_ms;

/// The project of keys that administer.
const ADMIN_PROJECT: &str = "proj_default";
/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Characters of a secret that are kept in the clear, at its beginning and at its end, so that a person recognises it.
/// Half of the random ones would be 64; these are 8.
const HINT_CHARS: usize = 4;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KeyBody {
    name: Option<String>,
    /// "inference", "usage", "admin".
    scopes: Option<Vec<String>>,
    models: Option<Vec<String>>,
    /// Seconds of Unix time.
    expires_at: Option<u64>,
    /// As OpenAI's: from now.
    expires_in_seconds: Option<u64>,
    limits: Option<LimitsBody>,
    /// Of the workers, against those of others.
    weight: Option<u32>,
    priority_min: Option<i32>,
}

pub(super) const EXAMPLE: &str =
    r#"{"name": "web", "scopes": ["inference"], "models": ["llama"], "expires_in_seconds": 86400}"#;

/// `GET …/projects/{project}/api_keys`.
pub(super) async fn list(
    Extension(accounts): Shared,
    Path(project): Path<String>,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Answer {
    projects::find(&*accounts.store.tables()?, &project)?;
    keys(&accounts, pairs, move |key| key.project_id == project).await
}

/// `GET /v1/organization/admin_api_keys`.
pub(super) async fn list_admin(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    keys(&accounts, pairs, is_admin).await
}

async fn keys(
    accounts: &std::sync::Arc<Accounts>,
    pairs: Vec<(String, String)>,
    of: impl Fn(&ApiKey) -> bool + Send + 'static,
) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let after = params.one::<String>("after", "a key's id")?.unwrap_or_default();
    let revoked = params.one("include_revoked", "true or false")?.unwrap_or(false);
    if params
        .one::<String>("order", "asc")?
        .is_some_and(|order| order != "asc")
    {
        return Err(ApiError::field("order", "`order` must be asc."));
    }
    params.end()?;
    let found = accounts.read(move |tables| {
        let next = |tables: &dyn Tables, after: &str| view::keys_after(tables, after, view::PAGE_RECORDS_MAX);
        let keep = |key: ApiKey| Ok((of(&key) && (revoked || !key.revoked)).then(|| shown(&key)));
        collect(&*tables, after, limit, next, |key| &key.id, keep)
    });
    Ok(Json(page(found.await?, limit, id_of)))
}

/// The id of something shown.
pub(super) fn id_of(shown: &Value) -> String {
    shown["id"].as_str().unwrap_or_default().to_owned()
}

/// `POST …/projects/{project}/api_keys`.
pub(super) async fn create(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    Path(project): Path<String>,
    json: Result<Json<KeyBody>, JsonRejection>,
) -> Answer {
    let new: KeyBody = body(json, EXAMPLE)?;
    let project = projects::find(&*accounts.store.tables()?, &project)?;
    if project.archived {
        return Err(ApiError::bad_request(
            "The project is archived; make the key in another.",
        ));
    }
    let scopes = match &new.scopes {
        None => vec![Scope::Inference],
        Some(names) => names.iter().map(|name| scope(name)).collect::<Result<_, _>>()?,
    };
    make(&accounts, &caller, project.id, scopes, new, "sk-proj-").await
}

/// `POST /v1/organization/admin_api_keys`.
pub(super) async fn create_admin(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<KeyBody>, JsonRejection>,
) -> Answer {
    let new: KeyBody = body(json, r#"{"name": "operator"}"#)?;
    if new.scopes.is_some()
        || new.models.as_ref().is_some_and(|models| !models.is_empty())
        || new.weight.is_some()
        || new.priority_min.is_some()
    {
        let message = "A key for administration has its scopes by itself, and calls no models.";
        return Err(ApiError::bad_request(message));
    }
    let known = view::project(&*accounts.store.tables()?, ADMIN_PROJECT).map_err(StoreError::from)?;
    if known.is_none() {
        let project = Project {
            id: ADMIN_PROJECT.into(),
            organization_id: ORGANIZATION_ID.into(),
            name: "Default project".into(),
            ..Project::default()
        };
        let kind = Kind::PutProject(PutProject { project: Some(project) });
        accounts.change(&caller, kind).await?;
    }
    make(
        &accounts,
        &caller,
        ADMIN_PROJECT.into(),
        vec![Scope::Admin],
        new,
        "sk-admin-",
    )
    .await
}

async fn make(
    accounts: &Accounts,
    caller: &Caller,
    project_id: String,
    scopes: Vec<Scope>,
    new: KeyBody,
    prefix: &str,
) -> Answer {
    let name = new.name.ok_or_else(|| ApiError::field("name", "`name` is missing."))?;
    let mut random = [0; SECRET_BYTES];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|_| ApiError::internal())?;
    let secret = format!("{prefix}{}", baton_ledger::hex(&random));
    let hint = format!(
        "{}...{}",
        &secret[..prefix.len() + HINT_CHARS],
        &secret[secret.len() - HINT_CHARS..]
    );
    let now_ms = unix_ms();
    let key = ApiKey {
        id: new_id("key"),
        sha256: sha256(secret.as_bytes()).to_vec().into(),
        hint,
        name,
        project_id,
        scopes: scopes.into_iter().map(i32::from).collect(),
        models: new.models.unwrap_or_default(),
        expires_unix_ms: end_of(new.expires_at, new.expires_in_seconds, now_ms)?.unwrap_or(0),
        created_unix_ms: now_ms,
        limits: new.limits.map(Limits::from),
        weight: weight(new.weight)?.unwrap_or(1),
        priority_min: new.priority_min.unwrap_or(0),
        ..ApiKey::default()
    };
    let mut shown = shown(&key);
    shown["value"] = secret.into();
    accounts.change(caller, Kind::PutKey(PutKey { key: Some(key) })).await?;
    Ok(Json(shown))
}

/// When a key ends, by what is given, in milliseconds of Unix time.
fn end_of(at_s: Option<u64>, in_s: Option<u64>, now_ms: u64) -> Result<Option<u64>, ApiError> {
    match (at_s, in_s) {
        (None, None) => Ok(None),
        (Some(at), None) if at.saturating_mul(1000) > now_ms => Ok(Some(at.saturating_mul(1000))),
        (None, Some(seconds)) if seconds > 0 => Ok(Some(now_ms.saturating_add(seconds.saturating_mul(1000)))),
        (Some(_), Some(_)) => {
            let message = "`expires_at` and `expires_in_seconds` are both there; keep one.";
            Err(ApiError::bad_request(message))
        }
        _ => Err(ApiError::bad_request("The key would be expired already.")),
    }
}

fn weight(asked: Option<u32>) -> Result<Option<u32>, ApiError> {
    match asked {
        Some(weight) if !(1..=Share::WEIGHT_MAX).contains(&weight) => {
            let message = format!("`weight` must be from 1 to {}.", Share::WEIGHT_MAX);
            Err(ApiError::field("weight", message))
        }
        weight => Ok(weight),
    }
}

/// `POST …/projects/{project}/api_keys/{key}`: what is given changes. What a key is, its secret and project, does not.
pub(super) async fn update(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    Path((project, id)): Path<(String, String)>,
    json: Result<Json<KeyBody>, JsonRejection>,
) -> Answer {
    let change: KeyBody = body(json, r#"{"weight": 3, "limits": {"requests_per_min": 600}}"#)?;
    let mut key = find(&accounts, &id, |key| key.project_id == project)?;
    if let Some(name) = change.name {
        key.name = name;
    }
    if let Some(names) = change.scopes {
        let scopes: Vec<Scope> = names.iter().map(|name| scope(name)).collect::<Result<_, _>>()?;
        key.scopes = scopes.into_iter().map(i32::from).collect();
    }
    if let Some(models) = change.models {
        key.models = models;
    }
    if let Some(end_ms) = end_of(change.expires_at, change.expires_in_seconds, unix_ms())? {
        key.expires_unix_ms = end_ms;
    }
    if let Some(limits) = change.limits {
        key.limits = Some(limits.into());
    }
    if let Some(weight) = weight(change.weight)? {
        key.weight = weight;
    }
    if let Some(priority_min) = change.priority_min {
        key.priority_min = priority_min;
    }
    let shown = shown(&key);
    accounts
        .change(&caller, Kind::PutKey(PutKey { key: Some(key) }))
        .await?;
    Ok(Json(shown))
}

/// `GET …/projects/{project}/api_keys/{key}`.
pub(super) async fn get(Extension(accounts): Shared, Path((project, id)): Path<(String, String)>) -> Answer {
    let key = find(&accounts, &id, |key| key.project_id == project)?;
    Ok(Json(shown(&key)))
}

/// `GET …/admin_api_keys/{key}`.
pub(super) async fn get_admin(Extension(accounts): Shared, Path(id): Path<String>) -> Answer {
    Ok(Json(shown(&find(&accounts, &id, is_admin)?)))
}

/// `DELETE …/projects/{project}/api_keys/{key}`.
pub(super) async fn revoke(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    Path((project, id)): Path<(String, String)>,
) -> Answer {
    let key = find(&accounts, &id, |key| key.project_id == project)?;
    let object = "organization.project.api_key.deleted";
    end(&accounts, &caller, key.id, object).await
}

/// `DELETE …/admin_api_keys/{key}`.
pub(super) async fn revoke_admin(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    Path(id): Path<String>,
) -> Answer {
    let key = find(&accounts, &id, is_admin)?;
    end(&accounts, &caller, key.id, "organization.admin_api_key.deleted").await
}

async fn end(accounts: &Accounts, caller: &Caller, id: String, object: &str) -> Answer {
    accounts
        .change(caller, Kind::RevokeKey(RevokeKey { id: id.clone() }))
        .await?;
    Ok(Json(json!({"object": object, "id": id, "deleted": true})))
}

fn find(accounts: &Accounts, id: &str, of: impl Fn(&ApiKey) -> bool) -> Result<ApiKey, ApiError> {
    let found = view::key(&*accounts.store.tables()?, id).map_err(StoreError::from)?;
    found.filter(of).ok_or_else(|| ApiError::no_such("API key", id))
}

fn is_admin(key: &ApiKey) -> bool {
    key.scopes().any(|scope| scope == Scope::Admin)
}

fn scope(name: &str) -> Result<Scope, ApiError> {
    match name {
        "inference" => Ok(Scope::Inference),
        "usage" => Ok(Scope::Usage),
        "admin" => Ok(Scope::Admin),
        _ => Err(ApiError::field("scopes", "`scopes` takes inference, usage and admin.")),
    }
}

fn scope_name(scope: Scope) -> &'static str {
    match scope {
        Scope::Inference => "inference",
        Scope::Usage => "usage",
        Scope::Admin => "admin",
        Scope::Unspecified => "unknown",
    }
}

fn shown(key: &ApiKey) -> Value {
    let admin = is_admin(key);
    let created_at = key.created_unix_ms / 1000;
    let expires_at = (key.expires_unix_ms > 0).then_some(key.expires_unix_ms / 1000);
    let owner = if admin {
        json!({"type": "user", "object": "organization.user", "id": key.id, "name": key.name,
            "created_at": created_at, "role": "owner"})
    } else {
        json!({"type": "service_account", "service_account": {"id": key.id, "name": key.name,
            "created_at": created_at, "role": "member"}})
    };
    json!({
        "object": if admin { "organization.admin_api_key" } else { "organization.project.api_key" },
        "id": key.id,
        "name": key.name,
        "redacted_value": key.hint,
        "created_at": created_at,
        "expires_at": expires_at,
        "last_used_at": Value::Null,
        "owner_project_access": if key.revoked { "inactive" } else { "active" },
        "owner": owner,
        "project_id": key.project_id,
        "scopes": key.scopes().map(scope_name).collect::<Vec<_>>(),
        "models": key.models,
        "limits": projects::limits(key.limits),
        "weight": key.weight.max(1),
        "priority_min": key.priority_min,
        "revoked": key.revoked,
    })
}
