//! `/v1/organization/projects`: as OpenAI's, with limits. A project without keys costs nothing; one that is archived is kept
//! for its history and its keys are refused. When a project was archived is told by the audit log only.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query};
use axum::{Extension, Json};
use baton_proto::state::{Limits, Project, PutProject, command::Kind};
use baton_state::{Tables, view};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Calls, ORGANIZATION_ID, Shared, body, collect, made_unix_s, new_id, page};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

/// Per minute; 0 is no limit.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct LimitsBody {
    requests_per_min: u64,
    tokens_per_min: u64,
}

impl From<LimitsBody> for Limits {
    fn from(body: LimitsBody) -> Self {
        Self {
            requests_per_min: body.requests_per_min,
            tokens_per_min: body.tokens_per_min,
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProjectBody {
    name: Option<String>,
    limits: Option<LimitsBody>,
}

pub(super) const EXAMPLE: &str = r#"{"name": "search", "limits": {"requests_per_min": 600, "tokens_per_min": 100000}}"#;

/// `GET …/projects`.
pub(super) async fn list(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let after = params.one::<String>("after", "a project's id")?.unwrap_or_default();
    let archived = params.one("include_archived", "true or false")?.unwrap_or(false);
    params.end()?;
    let projects = accounts.read(move |tables| {
        let next = |tables: &dyn Tables, after: &str| view::projects_after(tables, after, view::PAGE_RECORDS_MAX);
        let keep = |project: Project| Ok((archived || !project.archived).then(|| shown(&project)));
        collect(&*tables, after, limit, next, |project| &project.id, keep)
    });
    Ok(Json(page(projects.await?, limit, super::keys::id_of)))
}

/// `POST …/projects`.
pub(super) async fn create(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<ProjectBody>, JsonRejection>,
) -> Answer {
    let new: ProjectBody = body(json, EXAMPLE)?;
    let project = Project {
        id: new_id("proj"),
        organization_id: ORGANIZATION_ID.into(),
        name: new.name.ok_or_else(|| ApiError::field("name", "`name` is missing."))?,
        limits: new.limits.map(Limits::from),
        archived: false,
    };
    put(&accounts, &caller, project).await
}

/// `GET …/projects/{project}`.
pub(super) async fn get(Extension(accounts): Shared, Path(id): Path<String>) -> Answer {
    let tables = accounts.store.tables()?;
    Ok(Json(shown(&find(&*tables, &id)?)))
}

/// `POST …/projects/{project}`: what is given changes.
pub(super) async fn update(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    Path(id): Path<String>,
    json: Result<Json<ProjectBody>, JsonRejection>,
) -> Answer {
    let change: ProjectBody = body(json, EXAMPLE)?;
    let mut project = find(&*accounts.store.tables()?, &id)?;
    if let Some(name) = change.name {
        project.name = name;
    }
    if let Some(limits) = change.limits {
        project.limits = Some(limits.into());
    }
    put(&accounts, &caller, project).await
}

/// `POST …/projects/{project}/archive`. Without a way back, as OpenAI's.
pub(super) async fn archive(Extension(accounts): Shared, Extension(caller): Calls, Path(id): Path<String>) -> Answer {
    let mut project = find(&*accounts.store.tables()?, &id)?;
    project.archived = true;
    put(&accounts, &caller, project).await
}

async fn put(accounts: &super::Accounts, caller: &crate::auth::Caller, project: Project) -> Answer {
    let shown = shown(&project);
    let kind = Kind::PutProject(PutProject { project: Some(project) });
    accounts.change(caller, kind).await?;
    Ok(Json(shown))
}

pub(super) fn find(tables: &dyn Tables, id: &str) -> Result<Project, ApiError> {
    let found = view::project(tables, id).map_err(StoreError::from)?;
    found.ok_or_else(|| ApiError::no_such("project", id))
}

/// Limits as JSON.
pub(super) fn limits(limits: Option<Limits>) -> Value {
    let limits = limits.unwrap_or_default();
    json!({"requests_per_min": limits.requests_per_min, "tokens_per_min": limits.tokens_per_min})
}

fn shown(project: &Project) -> Value {
    json!({
        "id": project.id,
        "object": "organization.project",
        "name": project.name,
        "created_at": made_unix_s(&project.id),
        "archived_at": Value::Null,
        "status": if project.archived { "archived" } else { "active" },
        "organization_id": project.organization_id,
        "limits": limits(project.limits),
    })
}
