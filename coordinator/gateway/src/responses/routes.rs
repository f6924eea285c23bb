//! What is asked of a response by its id: itself, its events, its input; to cancel it, to forget it.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, Query, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::desk::{Found, Responses, missing};
use super::event_stream;
use super::log::follow;
use super::object::Status;
use super::request::INCLUDES;
use super::store::{Stored, open_name};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;
use crate::generation::stream::KEEP_ALIVE;
use crate::organization::{Params, page};

/// OpenAI's.
const ITEMS_DEFAULT: usize = 20;
const ITEMS_MAX: usize = 100;
/// How often it is looked whether a response elsewhere has ended.
const LOOK_EVERY: std::time::Duration = std::time::Duration::from_millis(500);

type Shared<B> = State<Arc<Gateway<B>>>;
type Pairs = Query<Vec<(String, String)>>;

/// The responses, where there is a place for them: elsewhere there are none.
fn desk<B: Backend>(gateway: &Gateway<B>, id: &str) -> Result<Arc<Responses>, ApiError> {
    gateway.responses.clone().ok_or_else(|| missing(id))
}

/// `GET /v1/responses/{id}`.
pub(crate) async fn retrieve<B: Backend>(
    State(gateway): Shared<B>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Query(pairs): Pairs,
) -> Result<Response, ApiError> {
    let mut params = Params::new(pairs)?;
    check_include(&mut params)?;
    let streams = params.one::<bool>("stream", "true or false")?.unwrap_or(false);
    let after = params.one::<usize>("starting_after", "the number of an event")?;
    // Events come as they were sent first.
    params.one::<bool>("include_obfuscation", "true or false")?;
    params.end()?;
    if after.is_some() && !streams {
        let message = "`starting_after` is only allowed with `stream=true`.";
        return Err(ApiError::field("starting_after", message));
    }
    let responses = desk(&gateway, &id)?;
    let found = responses.find(&caller, &id).await?;
    if !streams {
        return Ok(Json(shown(&found)).into_response());
    }
    let from = after.map_or(0, |number| number.saturating_add(1));
    let body = match found {
        Found::Here(background) => {
            let log = background.log.clone().ok_or_else(not_streamed)?;
            follow(log, from, gateway.config.keep_alive())
        }
        Found::Ended(stored) => Body::from_stream(frames(stored, from)?),
        // Its events are another coordinator's until it has ended.
        Found::Elsewhere(_) => when_ended(responses, caller, id, from, gateway.config.keep_alive()),
    };
    Ok(event_stream(body))
}

fn not_streamed() -> ApiError {
    let message = "Only a response that was created with `background: true` and `stream: true` can be streamed again.";
    ApiError::field("stream", message)
}

type Frame = Result<Bytes, Infallible>;

/// The stored events from number `from` on.
fn frames(stored: Stored, from: usize) -> Result<impl futures_util::Stream<Item = Frame> + Send, ApiError> {
    let events = stored.events.ok_or_else(not_streamed)?;
    Ok(stream::iter(
        events.into_iter().skip(from).map(|event| Ok(Bytes::from(event))),
    ))
}

/// The events of a response that runs elsewhere, once it has ended. Bounded as the response is: one whose process is gone is
/// found to have failed.
fn when_ended(
    responses: Arc<Responses>,
    caller: Caller,
    id: String,
    from: usize,
    keep_alive: std::time::Duration,
) -> Body {
    let waiting = stream::unfold(Some((responses, caller, id)), move |state| async move {
        let (responses, caller, id) = state?;
        let since = Instant::now();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match responses.find(&caller, &id).await {
                Ok(Found::Ended(stored)) => {
                    let events = stored.events.unwrap_or_default().into_iter().skip(from);
                    let events: Vec<Frame> = events.map(|event| Ok(Bytes::from(event))).collect();
                    return Some((stream::iter(events), None));
                }
                // Deleted meanwhile.
                Err(error) if error.status == axum::http::StatusCode::NOT_FOUND => return None,
                _ if since.elapsed() >= keep_alive => {
                    return Some((stream::iter(vec![Ok(KEEP_ALIVE)]), Some((responses, caller, id))));
                }
                _ => {}
            }
        }
    });
    Body::from_stream(waiting.flatten())
}

/// Whoever runs it, it is the same: waiting for its place is a part of being run.
fn shown(found: &Found) -> Value {
    match found {
        Found::Here(background) => background.face.shown(&Status::InProgress, Vec::new(), None, 0),
        Found::Elsewhere(stored) => {
            let mut response = stored.response.clone();
            response["status"] = Status::InProgress.word().into();
            response
        }
        Found::Ended(stored) => stored.response.clone(),
    }
}

/// `POST /v1/responses/{id}/cancel`. One that has ended is left as it is.
pub(crate) async fn cancel<B: Backend>(
    State(gateway): Shared<B>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let responses = desk(&gateway, &id)?;
    let stored = match responses.find(&caller, &id).await? {
        Found::Here(background) => {
            responses.cancel_here(&background).await?;
            match responses.find(&caller, &id).await? {
                Found::Ended(stored) => stored,
                _ => return Err(ApiError::unavailable("The response is being cancelled; look again.")),
            }
        }
        Found::Elsewhere(open) => responses.end_unfinished(&caller, &id, open, &Status::Cancelled).await?,
        Found::Ended(stored) if stored.response["background"] == true => stored,
        Found::Ended(_) => {
            let message = "Only responses that were created with `background: true` can be cancelled.";
            return Err(ApiError::field("response_id", message));
        }
    };
    Ok(Json(stored.response))
}

/// `DELETE /v1/responses/{id}`. One that runs is cancelled.
pub(crate) async fn delete<B: Backend>(
    State(gateway): Shared<B>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let responses = desk(&gateway, &id)?;
    if let Found::Here(background) = responses.find(&caller, &id).await? {
        responses.cancel_here(&background).await?;
    }
    // A run elsewhere finds that it is not wanted any more.
    responses.store.forget(&caller, &open_name(&id)).await?;
    responses.store.forget(&caller, &id).await?;
    Ok(Json(json!({"id": id, "object": "response", "deleted": true})))
}

/// `GET /v1/responses/{id}/input_items`: the conversation that the response continues, the last item first.
pub(crate) async fn input_items<B: Backend>(
    State(gateway): Shared<B>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Query(pairs): Pairs,
) -> Result<Json<Value>, ApiError> {
    let mut params = Params::new(pairs)?;
    check_include(&mut params)?;
    let limit = params.limit(ITEMS_DEFAULT, ITEMS_MAX)?;
    let after = params.one::<String>("after", "an item's id")?;
    let ascending = match params.one::<String>("order", "asc or desc")?.as_deref() {
        None | Some("desc") => false,
        Some("asc") => true,
        Some(_) => return Err(ApiError::field("order", "`order` must be asc or desc.")),
    };
    params.end()?;
    let responses = desk(&gateway, &id)?;
    let mut items = match responses.find(&caller, &id).await? {
        Found::Here(_) => responses.store.open(&caller, &id).await?.map(|open| open.items),
        Found::Elsewhere(stored) | Found::Ended(stored) => Some(stored.items),
    }
    .ok_or_else(|| missing(&id))?;
    if !ascending {
        items.reverse();
    }
    if let Some(after) = after {
        let at = items.iter().position(|item| item["id"] == *after);
        let at = at.ok_or_else(|| ApiError::field("after", "`after` must be the id of an item of this response."))?;
        items.drain(..=at);
    }
    let mut list = page(items, limit, |item| item["id"].as_str().unwrap_or_default().to_owned());
    for end in ["first_id", "last_id"] {
        if list[end].is_null() {
            // OpenAI's description has no null here.
            list[end] = "".into();
        }
    }
    Ok(Json(list))
}

/// What more is to be shown: nothing here has it.
fn check_include(params: &mut Params) -> Result<(), ApiError> {
    let names = params.list("include");
    match names.iter().find(|name| !INCLUDES.contains(&name.as_str())) {
        None => Ok(()),
        Some(_) => Err(ApiError::field(
            "include",
            format!("`include` must be of {}.", INCLUDES.join(", ")),
        )),
    }
}
