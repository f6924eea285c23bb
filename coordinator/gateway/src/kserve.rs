//! KServe's open inference protocol, as far as it is about generating text: the server's and the models' state under `/v2`,
//! and `generate`, whole or streamed. A model's name with slashes is percent-encoded in a path, as the protocol has it.

pub(crate) mod generate;

use std::sync::Arc;

use axum::extract::{Extension, Path, State};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::StatusCode};
use serde_json::{Value, json};

use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;

/// `GET /v2`.
pub(crate) async fn server() -> Json<Value> {
    Json(json!({"name": "baton", "version": env!("CARGO_PKG_VERSION"), "extensions": ["generate"]}))
}

/// `GET /v2/health/live`: this process is alive.
pub(crate) async fn live() -> Json<Value> {
    Json(json!({"live": true}))
}

/// `GET /v2/health/ready`: requests can be taken.
pub(crate) async fn ready<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Result<Json<Value>, ApiError> {
    match gateway.missing() {
        None => Ok(Json(json!({"ready": true}))),
        Some(missing) => Err(ApiError::unavailable(missing)),
    }
}

/// `GET /v2/models/{model}`.
pub(crate) async fn model<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let model = gateway.served(&name, &caller)?;
    let tensor = |name: &str| json!({"name": name, "datatype": "BYTES", "shape": [1]});
    let revision = gateway.revision(model.name());
    let versions: Vec<String> = (!revision.is_empty()).then_some(revision).into_iter().collect();
    Ok(Json(
        json!({"name": model.name(), "versions": versions, "platform": "baton",
        "inputs": [tensor("text_input")], "outputs": [tensor("text_output")]}),
    ))
}

/// `GET /v2/models/{model}/ready`.
pub(crate) async fn model_ready<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(caller): Extension<Caller>,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let model = gateway.served(&name, &caller)?;
    let ready = gateway.is_served(model);
    let status = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok((status, Json(json!({"name": model.name(), "ready": ready}))).into_response())
}
