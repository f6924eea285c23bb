//! Anthropic's messages API: `POST /v1/messages` and `POST /v1/messages/count_tokens`. Another spelling of a chat: system
//! text apart, blocks for text, thoughts, calls and their results. Keys may come as `x-api-key`, errors have Anthropic's
//! shape (see [`dialect`](crate::dialect)).

pub(crate) mod messages;
pub(crate) mod request;
mod response;
mod stream;

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::json;

use self::stream::EventWriter;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;
use crate::generation::intake::{Origin, receive};
use crate::generation::start::{on_body, start};
use crate::generation::{answer, prepare};
use crate::trace::RequestNames;

/// The route, as records name it.
const ENDPOINT: &str = "/v1/messages";
const ENDPOINT_COUNT: &str = "/v1/messages/count_tokens";

/// Versions that clients may send: the one whose shapes these are, the first, and what the official package sends today.
const VERSIONS: [&str; 3] = ["2023-06-01", "2023-01-01", "2026-10-21"];

/// `POST /v1/messages`.
pub(crate) async fn create<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    check_version(request.headers())?;
    let received = receive(&gateway, ENDPOINT, names, caller, request).await?;
    let started = start(&gateway, received, request::parse).await?;
    let (run, heading, options) = (started.run, started.heading, started.own);
    let mut response = if options.stream {
        let counts = run.counts();
        answer::streamed(&gateway.config, run, EventWriter::new(heading, counts)).await?
    } else {
        answer::json(response::message(&heading, &answer::whole(run).await?))
    };
    if started.replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}

/// `POST /v1/messages/count_tokens`: what the same request would be billed as its prompt. Nothing is generated or billed.
pub(crate) async fn count<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    check_version(request.headers())?;
    let received = receive(&gateway, ENDPOINT_COUNT, names, caller, request).await?;
    on_body(&gateway, received, counted)
        .await
        .map(|(body, _)| answer::json(body))
}

fn counted<B: Backend>(gateway: &Gateway<B>, origin: &Origin, bytes: &[u8]) -> Result<Vec<u8>, ApiError> {
    let request = request::parse_count(bytes, &gateway.config)?;
    let prepared = prepare::prepare(gateway, request, origin)?;
    let tokens: u32 = prepared.prompt_tokens().iter().sum();
    Ok(json!({"input_tokens": tokens}).to_string().into_bytes())
}

/// A version that is not known may promise what is not kept. None at all is taken for the one there is.
fn check_version(headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get("anthropic-version") {
        None => Ok(()),
        Some(version) if VERSIONS.iter().any(|known| version == known) => Ok(()),
        Some(_) => {
            let message = format!("The header `anthropic-version` must be {}.", VERSIONS[0]);
            Err(ApiError::field("anthropic-version", message))
        }
    }
}
