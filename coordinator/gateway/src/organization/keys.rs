//! `…/projects/{project}/api_keys` and `/v1/organization/admin_api_keys`: listing, showing and deleting are as OpenAI's;
//! making a project's key is ours. The secret is in the answer to its making and nowhere else: the state has its SHA-256.
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
    #[serde(default)]
    models: Vec<String>,
    /// Seconds of Unix time.
    expires_at: Option<u64>,
    /// As OpenAI's: from now.
    expires_in_seconds: Option<u64>,
    limits: Option<LimitsBody>,
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
    if new.scopes.is_some() || !new.models.is_empty() {
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
    let expires_unix_ms = match (new.expires_at, new.expires_in_seconds) {
        (None, None) => 0,
        (Some(at), None) if at.saturating_mul(1000) > now_ms => at.saturating_mul(1000),
        (None, Some(seconds)) if seconds > 0 => now_ms.saturating_add(seconds.saturating_mul(1000)),
        (Some(_), Some(_)) => {
            let message = "`expires_at` and `expires_in_seconds` are both there; keep one.";
            return Err(ApiError::bad_request(message));
        }
        _ => return Err(ApiError::bad_request("The key would be expired already.")),
    };
    let key = ApiKey {
        id: new_id("key"),
        sha256: sha256(secret.as_bytes()).to_vec().into(),
        hint,
        name,
        project_id,
        scopes: scopes.into_iter().map(i32::from).collect(),
        models: new.models,
        expires_unix_ms,
        created_unix_ms: now_ms,
        limits: new.limits.map(Limits::from),
        weight: 1,
        ..ApiKey::default()
    };
    let mut shown = shown(&key);
    shown["value"] = secret.into();
    accounts.change(caller, Kind::PutKey(PutKey { key: Some(key) })).await?;
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
        "revoked": key.revoked,
    })
}
