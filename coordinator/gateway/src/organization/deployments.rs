//! `/v1/organization/deployments`: ours. What the cluster is meant to serve under a model's name: with a revision that is a
//! digest of the model, coordinators take no worker that has another; with any other revision it only goes into records.
//! Which models a coordinator can serve at all is its own configuration.

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query};
use axum::{Extension, Json};
use baton_proto::state::{Deployment, PutDeployment, RemoveDeployment, command::Kind};
use baton_state::{Applied, Tables, view};
use serde::Deserialize;
use serde_json::{Value, json};

use super::params::Params;
use super::{Answer, Calls, Shared, body, collect, page};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct DeploymentBody {
    /// The name clients send.
    model: String,
    /// A digest of the model as workers tell it, or any name.
    revision: Option<String>,
    /// Of the workers, as TOML: for people and controllers, not read here.
    settings: Option<String>,
}

const EXAMPLE: &str = r#"{"model": "llama", "revision": "main-2026-11"}"#;

/// `GET`.
pub(super) async fn list(Extension(accounts): Shared, Query(pairs): Query<Vec<(String, String)>>) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let after = params.one::<String>("after", "a model's name")?.unwrap_or_default();
    params.end()?;
    let found = accounts.read(move |tables| {
        let next = |tables: &dyn Tables, after: &str| view::deployments_after(tables, after, view::PAGE_RECORDS_MAX);
        let keep = |deployment: Deployment| Ok(Some(shown(&deployment)));
        collect(&*tables, after, limit, next, |deployment| &deployment.model, keep)
    });
    Ok(Json(page(found.await?, limit, super::keys::id_of)))
}

/// `GET …/{model}`.
pub(super) async fn get(Extension(accounts): Shared, Path(model): Path<String>) -> Answer {
    Ok(Json(shown(&find(&accounts, &model)?)))
}

/// `POST`: makes one, or changes the one of that model. What is not given stays.
pub(super) async fn put(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<DeploymentBody>, JsonRejection>,
) -> Answer {
    let new: DeploymentBody = body(json, EXAMPLE)?;
    let known = view::deployment(&*accounts.store.tables()?, &new.model).map_err(StoreError::from)?;
    let known = known.unwrap_or_default();
    let deployment = Deployment {
        model: new.model,
        revision: new.revision.unwrap_or(known.revision),
        settings: new.settings.unwrap_or(known.settings),
    };
    let shown = shown(&deployment);
    let kind = Kind::PutDeployment(PutDeployment {
        deployment: Some(deployment),
    });
    accounts.change(&caller, kind).await?;
    Ok(Json(shown))
}

/// `DELETE …/{model}`.
pub(super) async fn remove(Extension(accounts): Shared, Extension(caller): Calls, Path(model): Path<String>) -> Answer {
    let kind = Kind::RemoveDeployment(RemoveDeployment { model: model.clone() });
    match accounts.change(&caller, kind).await? {
        Applied::Removed { removed: false } => Err(ApiError::no_such("deployment", &model)),
        _ => Ok(Json(
            json!({"object": "organization.deployment.deleted", "id": model, "deleted": true}),
        )),
    }
}

fn find(accounts: &super::Accounts, model: &str) -> Result<Deployment, ApiError> {
    let found = view::deployment(&*accounts.store.tables()?, model).map_err(StoreError::from)?;
    found.ok_or_else(|| ApiError::no_such("deployment", model))
}

fn shown(deployment: &Deployment) -> Value {
    json!({
        "object": "organization.deployment",
        "id": deployment.model,
        "model": deployment.model,
        "revision": deployment.revision,
        "settings": deployment.settings,
    })
}
