//! `POST /v1/organization/corrections`: ours. A correction is a new row of differences; nothing is edited. Sent again under
//! its id it changes nothing.

use axum::extract::rejection::JsonRejection;
use axum::{Extension, Json};
use baton_proto::state::{CorrectUsage, Correction, command::Kind};
use baton_state::{Applied, view};
use serde::Deserialize;
use serde_json::json;

use super::{Answer, Calls, Shared, body};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CorrectionBody {
    /// Chosen by who corrects.
    id: String,
    request_id: String,
    reason: String,
    #[serde(default)]
    prompt_tokens: i64,
    #[serde(default)]
    cached_tokens: i64,
    #[serde(default)]
    completion_tokens: i64,
    #[serde(default)]
    input_nano: i64,
    #[serde(default)]
    cached_input_nano: i64,
    #[serde(default)]
    output_nano: i64,
}

pub(super) const EXAMPLE: &str =
    r#"{"id": "refund-17", "request_id": "chatcmpl-1", "reason": "a broken answer", "output_nano": -1600}"#;

/// The handler.
pub(super) async fn create(
    Extension(accounts): Shared,
    Extension(caller): Calls,
    json: Result<Json<CorrectionBody>, JsonRejection>,
) -> Answer {
    let new: CorrectionBody = body(json, EXAMPLE)?;
    let row = view::usage_row(&*accounts.store.tables()?, &new.request_id).map_err(StoreError::from)?;
    let row = row.ok_or_else(|| ApiError::no_such("request", &new.request_id))?;
    let correction = Correction {
        request_id: new.request_id,
        sequence: row.sequence,
        prompt_tokens: new.prompt_tokens,
        cached_tokens: new.cached_tokens,
        completion_tokens: new.completion_tokens,
        input_nano: new.input_nano,
        cached_input_nano: new.cached_input_nano,
        output_nano: new.output_nano,
        reason: new.reason,
        correction_id: new.id,
    };
    let (id, request_id) = (correction.correction_id.clone(), correction.request_id.clone());
    let kind = Kind::CorrectUsage(CorrectUsage {
        correction: Some(correction),
    });
    let sequence = match accounts.change(&caller, kind).await? {
        Applied::Corrected { sequence } => sequence,
        _ => return Err(ApiError::internal()),
    };
    Ok(Json(json!({
        "object": "organization.correction",
        "id": id,
        "request_id": request_id,
        "corrects": row.sequence,
        "sequence": sequence,
    })))
}
