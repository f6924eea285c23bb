//! `/cluster/coordinators`: the members of the group, and what an operator changes about them. The answers are JSON; field
//! names are a contract with `baton coordinators` and `baton status`.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};

use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::gateway::Gateway;

/// What a member of the group does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CoordinatorRole {
    /// Orders what goes into the log.
    Leader,
    /// Votes.
    Follower,
    /// Is catching up and does not vote yet.
    Learner,
}

/// One member.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CoordinatorStatus {
    /// Its id, for ever.
    pub id: u64,
    /// Its name, which is its certificate's.
    pub name: String,
    /// What it does.
    pub role: CoordinatorRole,
    /// Whether it answered just now; what follows is 0 or empty if not.
    pub reachable: bool,
    /// gRPC "host:port" for members and workers.
    pub cluster_addr: String,
    /// Base URL of its API.
    pub api_url: String,
    /// The term it is in.
    pub term: u64,
    /// How far it has applied the log.
    pub applied_index: u64,
    /// Log entries that it is behind the member that is furthest.
    pub lag: u64,
    /// Hash of the state at `applied_index`, hexadecimal: members at one index have the same.
    pub state_hash: String,
    /// Usage records settled at `applied_index`.
    pub settled: u64,
}

/// The group as one member sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CoordinatorGroup {
    /// The member that answers.
    pub answered_by: u64,
    /// The leader it knows; 0 if none.
    pub leader_id: u64,
    /// The members, by id.
    pub coordinators: Vec<CoordinatorStatus>,
}

/// What an operator asks of the group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GroupChange {
    /// Take a new member in. It learns until it has caught up, and then votes.
    Add(NewCoordinator),
    /// Take a member out.
    Remove {
        /// Its id.
        id: u64,
    },
    /// Let another member lead.
    Transfer {
        /// Its id; 0 for whoever is furthest.
        to: u64,
    },
}

/// A member to be.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewCoordinator {
    /// Its id: not 0, and never used before in this group.
    pub id: u64,
    /// Its name, which is its certificate's.
    pub name: String,
    /// gRPC "host:port" for members and workers.
    pub cluster_addr: String,
    /// Base URL of its API.
    pub api_url: String,
}

/// The body of a transfer.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TransferRequest {
    /// Whoever is furthest, if not given.
    to: Option<u64>,
}

/// `GET /cluster/coordinators`.
pub(crate) async fn list<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
) -> Result<Json<CoordinatorGroup>, ApiError> {
    Ok(Json(gateway.ledger.backend.coordinators().await?))
}

/// `POST /cluster/coordinators`.
pub(crate) async fn add<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    body: Result<Json<NewCoordinator>, JsonRejection>,
) -> Result<(StatusCode, Json<CoordinatorGroup>), ApiError> {
    let example =
        r#"{"id": 4, "name": "coordinator-3", "cluster_addr": "10.0.0.4:7070", "api_url": "http://10.0.0.4:8080"}"#;
    let Json(new) = body.map_err(|rejection| unreadable(&rejection, example))?;
    change(&gateway, GroupChange::Add(new)).await
}

/// The body of a removal; JSON, so that no foreign web page can send it with a plain form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RemoveRequest {}

/// `POST /cluster/coordinators/{id}/remove`.
pub(crate) async fn remove<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Path(id): Path<String>,
    body: Result<Json<RemoveRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<CoordinatorGroup>), ApiError> {
    let Json(RemoveRequest {}) = body.map_err(|rejection| unreadable(&rejection, "{}"))?;
    let id = id.parse();
    let id = id.map_err(|_| ApiError::bad_request("A coordinator is named by its id, a number."))?;
    change(&gateway, GroupChange::Remove { id }).await
}

/// `POST /cluster/coordinators/transfer`.
pub(crate) async fn transfer<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    body: Result<Json<TransferRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<CoordinatorGroup>), ApiError> {
    let Json(request) = body.map_err(|rejection| unreadable(&rejection, "{\"to\": 2}, or {}"))?;
    let to = request.to.unwrap_or(0);
    change(&gateway, GroupChange::Transfer { to }).await
}

async fn change<B: Backend>(
    gateway: &Gateway<B>,
    change: GroupChange,
) -> Result<(StatusCode, Json<CoordinatorGroup>), ApiError> {
    gateway.ledger.backend.change_group(change).await?;
    let group = gateway.ledger.backend.coordinators().await?;
    Ok((StatusCode::OK, Json(group)))
}

fn unreadable(rejection: &JsonRejection, example: &str) -> ApiError {
    match rejection {
        JsonRejection::MissingJsonContentType(_) => ApiError::media_type(),
        _ => ApiError::bad_request(format!("The body must be a JSON object such as {example}.")),
    }
}
