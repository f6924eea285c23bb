//! The routes: create, get, list, cancel. They read and write the replicated state; whoever runs a batch sees it there.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, Query};
use axum::{Extension, Json};
use baton_proto::state::{Batch, BatchLabel, BatchOutput, BatchStatus, CancelBatch, PutBatch, command::Kind};
use baton_state::{batch_status_name, view};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{BatchesConfig, ENDPOINTS};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::files::{EXPIRES_AFTER_S, Files, Shared, new_id};
use crate::openapi::{About, Api, Purpose};
use crate::organization::{Params, body, page};

/// The only time a batch may take.
const WINDOW: &str = "24h";
/// Characters of a label's name and value: OpenAI's.
const LABEL_CHARS_MAX: (usize, usize) = (64, 512);
const LABELS_MAX: usize = baton_state::bounds::BATCH_LABELS_MAX;
const EXAMPLE: &str = r#"{"input_file_id": "file-…", "endpoint": "/v1/chat/completions", "completion_window": "24h"}"#;

type Calls = Extension<Caller>;
type Answer = Result<Json<Value>, ApiError>;

/// Adds the routes. They need [`Files`] and [`BatchesConfig`] as extensions.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>(api: Api<S>) -> Api<S> {
    let reads = |summary| About::new(Purpose::Read, summary);
    let changes = |summary| About::new(Purpose::Change, summary);
    api.get("/v1/batches", list, reads("The batches").query(&["after", "limit"]))
        .post(
            "/v1/batches",
            create,
            changes("Runs a file of requests in idle capacity, at half the price").example(
                r#"{"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"}"#,
            ),
        )
        .get("/v1/batches/{id}", retrieve, reads("A batch"))
        .post("/v1/batches/{id}/cancel", cancel, changes("Cancels a batch"))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Create {
    input_file_id: String,
    endpoint: String,
    completion_window: String,
    #[serde(default)]
    metadata: Option<BTreeMap<String, String>>,
    #[serde(default)]
    output_expires_after: Option<ExpiresAfter>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ExpiresAfter {
    anchor: String,
    seconds: u64,
}

async fn create(
    Extension(files): Shared,
    Extension(config): Extension<Arc<BatchesConfig>>,
    Extension(caller): Calls,
    request: Result<Json<Create>, JsonRejection>,
) -> Answer {
    let request = body(request, EXAMPLE)?;
    if !ENDPOINTS.contains(&request.endpoint.as_str()) {
        let served = ENDPOINTS.join(", ");
        let message = format!("`endpoint` must be one that batches can call here: {served}.");
        return Err(ApiError::field("endpoint", message));
    }
    if request.completion_window != WINDOW {
        let message = format!("`completion_window` must be `{WINDOW}`.");
        return Err(ApiError::field("completion_window", message));
    }
    let metadata = labels(request.metadata.unwrap_or_default())?;
    let output_expires_after_s = match request.output_expires_after {
        None => 0,
        Some(after) if after.anchor == "created_at" && EXPIRES_AFTER_S.contains(&after.seconds) => after.seconds,
        Some(_) => {
            let (least, most) = EXPIRES_AFTER_S.into_inner();
            let message = format!("`output_expires_after` has the anchor `created_at` and {least} to {most} seconds.");
            return Err(ApiError::field("output_expires_after", message));
        }
    };
    let input = files
        .file(&caller, &request.input_file_id)
        .await
        .map_err(|error| ApiError {
            param: Some("input_file_id".into()),
            ..error
        })?;
    if input.purpose != "batch" {
        let message = "The input file must have been uploaded with the purpose `batch`.";
        return Err(ApiError::field("input_file_id", message));
    }
    let output = || {
        Some(BatchOutput {
            file_id: new_id(),
            ..BatchOutput::default()
        })
    };
    let batch = Batch {
        id: format!("batch_{}", uuid::Uuid::now_v7().simple()),
        owner: caller.owner(),
        key_id: caller.key_id.to_string(),
        endpoint: request.endpoint,
        input_file_id: input.id,
        metadata,
        output_expires_after_s,
        output: output(),
        errors_output: output(),
        ..Batch::default()
    };
    let id = batch.id.clone();
    let kind = Kind::PutBatch(PutBatch {
        batch: Some(batch),
        owner_open_max: config.project_open_max,
    });
    files.change(caller.actor(), kind).await?;
    Ok(Json(shown(&found(&files, &caller, &id).await?)))
}

fn labels(metadata: BTreeMap<String, String>) -> Result<Vec<BatchLabel>, ApiError> {
    let (key_max, value_max) = LABEL_CHARS_MAX;
    let fits = |(key, value): (&String, &String)| key.chars().count() <= key_max && value.chars().count() <= value_max;
    if metadata.len() > LABELS_MAX || !metadata.iter().all(fits) {
        let message = format!(
            "`metadata` has at most {LABELS_MAX} pairs, of names of at most {key_max} characters and values of at most \
             {value_max}."
        );
        return Err(ApiError::field("metadata", message));
    }
    let label = |(key, value)| BatchLabel { key, value };
    Ok(metadata.into_iter().map(label).collect())
}

/// The caller's batch of that id.
async fn found(files: &Files, caller: &Caller, id: &str) -> Result<Batch, ApiError> {
    let (owner, name) = (caller.owner(), id.to_owned());
    let batch = files.state(move |tables| Ok(view::batch(&*tables, &name).map_err(StoreError::from)?));
    let batch = batch.await?.filter(|batch| batch.owner == owner);
    batch.ok_or_else(|| ApiError {
        param: Some("id".into()),
        ..ApiError::no_such("Batch object", id)
    })
}

async fn retrieve(Extension(files): Shared, Extension(caller): Calls, Path(id): Path<String>) -> Answer {
    Ok(Json(shown(&found(&files, &caller, &id).await?)))
}

async fn list(
    Extension(files): Shared,
    Extension(caller): Calls,
    Query(pairs): Query<Vec<(String, String)>>,
) -> Answer {
    let mut params = Params::new(pairs)?;
    let limit = params.limit(20, 100)?;
    let after = params.one::<String>("after", "a batch's id")?.unwrap_or_default();
    params.end()?;
    let owner = caller.owner();
    let batches =
        files.state(move |tables| Ok(view::batches_of(&*tables, &owner, &after, limit + 1).map_err(StoreError::from)?));
    let batches: Vec<Value> = batches.await?.iter().map(shown).collect();
    Ok(Json(page(batches, limit, |batch| {
        batch["id"].as_str().unwrap_or_default().to_owned()
    })))
}

async fn cancel(Extension(files): Shared, Extension(caller): Calls, Path(id): Path<String>) -> Answer {
    let batch = found(&files, &caller, &id).await?;
    let kind = Kind::CancelBatch(CancelBatch {
        batch_id: batch.id,
        owner: batch.owner,
    });
    files.change(caller.actor(), kind).await?;
    Ok(Json(shown(&found(&files, &caller, &id).await?)))
}

/// A batch as the API shows it. What is not there yet is left out, as OpenAI's description has it.
fn shown(batch: &Batch) -> Value {
    let metadata: serde_json::Map<String, Value> = batch
        .metadata
        .iter()
        .map(|label| (label.key.clone(), label.value.clone().into()))
        .collect();
    let mut shown = json!({
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "input_file_id": batch.input_file_id,
        "completion_window": WINDOW,
        "status": batch_status_name(batch.status()),
        "created_at": batch.created_unix_ms / 1000,
        "expires_at": batch.expires_unix_ms / 1000,
        "request_counts": {"total": batch.total, "completed": batch.completed, "failed": batch.failed},
        "usage": {
            "input_tokens": batch.input_tokens,
            "input_tokens_details": {"cached_tokens": batch.cached_tokens},
            "output_tokens": batch.output_tokens,
            "output_tokens_details": {"reasoning_tokens": batch.reasoning_tokens},
            "total_tokens": batch.input_tokens + batch.output_tokens,
        },
        "metadata": metadata,
    });
    if !batch.model.is_empty() {
        shown["model"] = batch.model.as_str().into();
    }
    let over = batch.ended_unix_ms != 0;
    for (name, output) in [
        ("output_file_id", &batch.output),
        ("error_file_id", &batch.errors_output),
    ] {
        if let Some(output) = output.as_ref().filter(|output| over && output.chunks > 0) {
            shown[name] = output.file_id.as_str().into();
        }
    }
    let ended = match batch.status() {
        BatchStatus::Completed => "completed_at",
        BatchStatus::Failed => "failed_at",
        BatchStatus::Expired => "expired_at",
        _ => "cancelled_at",
    };
    for (name, unix_ms) in [
        ("in_progress_at", batch.in_progress_unix_ms),
        ("finalizing_at", batch.finalizing_unix_ms),
        ("cancelling_at", batch.cancelling_unix_ms),
        (ended, batch.ended_unix_ms),
    ] {
        if unix_ms != 0 {
            shown[name] = (unix_ms / 1000).into();
        }
    }
    if !batch.errors.is_empty() {
        let errors: Vec<Value> = batch
            .errors
            .iter()
            .map(|error| {
                let param = Some(&error.param).filter(|param| !param.is_empty());
                let line = Some(error.line).filter(|line| *line != 0);
                json!({"code": error.code, "message": error.message, "param": param, "line": line})
            })
            .collect();
        shown["errors"] = json!({"object": "list", "data": errors});
    }
    shown
}
