//! The two ways to answer: all at once, or as it comes.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};

use super::output::{Choice, Collected};
use super::run::{Run, Step};
use super::stream::{self, Render};
use crate::accounts::idempotency::REPLAYED_HEADER;
use crate::api_error::ApiError;
use crate::backend::Backend;
use crate::config::GatewayConfig;

/// Runs to the end and settles.
pub(crate) async fn whole<B: Backend>(mut run: Run<B>) -> Result<Collected, ApiError> {
    let mut choices: Vec<Choice> = Vec::new();
    while let Step::Piece(piece) = run.step().await? {
        let at = piece.choice as usize;
        if choices.len() <= at {
            choices.resize_with(at + 1, Choice::default);
        }
        choices[at].take(piece);
    }
    let outcome = run.settle().await?;
    choices.resize_with(outcome.ends.len(), Choice::default);
    Ok(Collected { choices, outcome })
}

/// A response of JSON.
pub(crate) fn json(body: Vec<u8>) -> Response {
    let kind = HeaderValue::from_static("application/json");
    ([(header::CONTENT_TYPE, kind)], body).into_response()
}

/// A response of server-sent events. A failure before the first token is still an HTTP error, which clients know how to
/// retry.
pub(crate) async fn streamed<B: Backend>(
    config: &GatewayConfig,
    mut run: Run<B>,
    render: impl Render,
) -> Result<Response, ApiError> {
    let wait = Duration::from_millis(config.first_token_wait_ms);
    let first = tokio::time::timeout(wait, run.step()).await.ok().transpose()?;
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    Ok((headers, stream::body(run, render, config.keep_alive(), first)).into_response())
}

/// Says that the answer is one that was given before.
pub(crate) fn mark_replayed(headers: &mut HeaderMap) {
    headers.insert(REPLAYED_HEADER, HeaderValue::from_static("true"));
}
