//! `POST /cluster/workers/{id}/drain`: takes a worker out of service. Answers at once with the worker as it is; how far it
//! is shows `GET /cluster/workers`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::Deserialize;

use crate::api_error::ApiError;
use crate::backend::{Backend, WorkerStatus};
use crate::gateway::Gateway;

/// Time a worker has by default to get rid of what it has: most answers are shorter.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);
/// Longest time that can be given. A worker that shall go some day is to be drained that day.
const DEADLINE_MAX: Duration = Duration::from_secs(3600);

/// The body; JSON, so that no foreign web page can send it with a plain form.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DrainRequest {
    /// After this long the worker leaves with whatever it still has.
    deadline_ms: Option<u64>,
}

/// The handler.
pub(crate) async fn drain<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Path(id): Path<String>,
    body: Result<Json<DrainRequest>, JsonRejection>,
) -> Result<(StatusCode, Json<WorkerStatus>), ApiError> {
    let Json(request) = body.map_err(|rejection| match rejection {
        JsonRejection::MissingJsonContentType(_) => ApiError::media_type(),
        _ => ApiError::bad_request("The body must be a JSON object such as {\"deadline_ms\": 60000}, or {}."),
    })?;
    let deadline = request.deadline_ms.map_or(DEADLINE_DEFAULT, Duration::from_millis);
    if deadline > DEADLINE_MAX {
        let message = format!("`deadline_ms` is at most {}.", DEADLINE_MAX.as_millis());
        return Err(ApiError::field("deadline_ms", message));
    }
    let worker = gateway.ledger.backend.drain(&id, deadline)?;
    Ok((StatusCode::ACCEPTED, Json(worker)))
}
