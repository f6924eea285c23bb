//! `/v1/responses`: OpenAI's other way to generate, over [`generation`](crate::generation). What it has beyond chat
//! completions: typed items in and out, events with names and numbers, and responses that are kept, so that the next one
//! may follow them and that they may be made without a connection.
//!
//! ```text
//!  POST ─▶ request ─┬─▶ start ─▶ Run ─▶ events ─┬─ stream: events, then stored, then `completed`
//!                   │                           ╰─ whole: stored, then the last event's response
//!                   ╰─▶ background ─▶ the same in a task of its own, with a log of events
//!  GET, DELETE, cancel, input_items ─▶ desk ─▶ what runs here, or store
//! ```
//!
//! `docs/responses.md` says what is kept where, for how long, and what happens when a coordinator dies.
//!
//! Deliberately not here: tokens, templates, tools' parsing and billing (`generation`), the bytes' place (`files`).

mod background;
mod config;
mod desk;
mod events;
mod fields;
mod ids;
mod input;
mod log;
mod object;
mod request;
mod routes;
mod store;
mod tools;

pub use config::ResponsesConfig;
pub(crate) use desk::Responses;
pub(crate) use routes::{cancel, delete, input_items, retrieve};

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::{Json, http::HeaderMap};
use serde_json::{Value, json};

use self::desk::Found;
use self::events::{Events, Style, status_of};
use self::object::Face;
use self::request::{Peek, Wish};
use self::store::{Kept, Stored};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::clock::unix_ms;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::receive;
use crate::generation::output::{Outcome, Piece};
use crate::generation::prepare::prepare;
use crate::generation::run::Step;
use crate::generation::start::{Started, on_body, start};
use crate::generation::stream::{Frames, Render};
use crate::metrics::Counts;
use crate::model::SamplingDefaults;
use crate::trace::RequestNames;

/// The route, as records name it.
const ENDPOINT: &str = "/v1/responses";

/// `POST /v1/responses`. A client that hangs up drops this future or the response's body; the run in it then cancels and
/// settles. One in the background goes on.
pub(crate) async fn create<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, ENDPOINT, ids::rename(names), caller.clone(), request).await?;
    let id = received.origin.names.request_id.clone();
    let peek = Peek::of(&received.body);
    let earlier = earlier(&gateway, &caller, peek.previous_response_id.as_deref()).await?;
    if peek.is_background() {
        let (request, mut wish) = request::parse(&received.body, &gateway.config, &id, earlier)?;
        let responses = gateway.responses.as_ref().ok_or_else(|| {
            let message = "`background` is not supported by this server: it has no place to store responses.";
            ApiError::unsupported("background", message)
        })?;
        fill_defaults(&mut wish, gateway.served(&request.model, &caller)?.defaults());
        return background::begin(&gateway, responses, received, wish).await;
    }
    let parse = move |body: &[u8], config: &_| request::parse(body, config, &id, earlier);
    let started = start(&gateway, received, parse).await.map_err(for_input)?;
    let Started {
        run,
        heading,
        own: mut wish,
        replayed,
    } = started;
    if wish.background {
        // Of a body that says it twice.
        return Err(ApiError::field("background", "`background` must be given once."));
    }
    fill_defaults(&mut wish, gateway.served(&heading.model, &caller)?.defaults());
    let face = Face {
        id: heading.id,
        created_at: heading.created,
        echo: std::mem::take(&mut wish.echo),
    };
    let style = Style {
        quiet: !wish.stream,
        obfuscation: wish.obfuscation,
        background: false,
    };
    let mut answering = Answering {
        events: Events::new(face, style),
        keeping: gateway.responses.clone().filter(|_| wish.store),
        caller,
        items: [wish.earlier, wish.input].concat(),
        response: Value::Null,
    };
    answering.events.set_stored(answering.keeping.is_some());
    let mut response = if wish.stream {
        answer::streamed(&gateway.config, run, answering).await?
    } else {
        answer::json(whole(run, answering).await?.to_string().into_bytes())
    };
    if replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}

/// The whole response, stored.
async fn whole<B: Backend>(
    mut run: crate::generation::run::Run<B>,
    mut answering: Answering,
) -> Result<Value, ApiError> {
    let mut nowhere = Frames::default();
    while let Step::Piece(piece) = run.step().await.map_err(for_input)? {
        answering.events.piece(piece, &mut nowhere);
    }
    let outcome = run.settle().await?;
    answering.before_end(&outcome).await;
    Ok(answering.response)
}

/// `POST /v1/responses/input_tokens`: how long a request's prompt is. Nothing is generated, and nothing is recorded.
pub(crate) async fn input_tokens<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let received = receive(&gateway, ENDPOINT, ids::rename(names), caller.clone(), request).await?;
    let id = received.origin.names.request_id.clone();
    let previous = Peek::of(&received.body).previous_response_id;
    let earlier = earlier(&gateway, &caller, previous.as_deref()).await?;
    let parse = move |body: &[u8], config: &_| request::parse(body, config, &id, earlier);
    let prepared = on_body(&gateway, received, move |gateway, origin, body| {
        let (request, _) = parse(body, &gateway.config)?;
        prepare(gateway, request, origin)
    });
    let (prepared, _) = prepared.await.map_err(for_input)?;
    let tokens: u64 = prepared.prompt_tokens().into_iter().map(u64::from).sum();
    Ok(Json(json!({"object": "response.input_tokens", "input_tokens": tokens})))
}

/// The conversation that the request follows.
async fn earlier<B: Backend>(
    gateway: &Gateway<B>,
    caller: &Caller,
    previous: Option<&str>,
) -> Result<Vec<Value>, ApiError> {
    let Some(id) = previous else {
        return Ok(Vec::new());
    };
    let wrong = |code, message: String| ApiError {
        code: Some(code),
        ..ApiError::field("previous_response_id", message)
    };
    let shown: String = id.chars().take(128).collect();
    let unknown = || {
        let message = format!("Previous response with id '{shown}' not found.");
        wrong("previous_response_not_found", message)
    };
    let responses = gateway.responses.as_ref().ok_or_else(unknown)?;
    let found = match responses.find(caller, id).await {
        Err(error) if error.status == axum::http::StatusCode::NOT_FOUND => return Err(unknown()),
        found => found?,
    };
    match found {
        Found::Ended(stored)
            if ["completed", "incomplete"]
                .iter()
                .any(|word| stored.response["status"] == *word) =>
        {
            Ok(stored.conversation())
        }
        _ => {
            let message = format!("The response '{shown}' has no answer that could be followed.");
            Err(wrong("previous_response_not_ended", message))
        }
    }
}

/// A response says what it was sampled with.
fn fill_defaults(wish: &mut Wish, defaults: SamplingDefaults) {
    for (name, value) in [("temperature", defaults.temperature), ("top_p", defaults.top_p)] {
        if wish.echo.get(name).is_none_or(Value::is_null) {
            // As it was written, not as 32 bits have it.
            let shown = (f64::from(value) * 1e6).round() / 1e6;
            wish.echo.insert(name.to_owned(), shown.into());
        }
    }
}

/// What a chat calls its messages, a response calls its input.
fn for_input(mut error: ApiError) -> ApiError {
    error.param = error.param.map(|param| match param.as_str() {
        "messages" => "input".into(),
        "reasoning_effort" => "reasoning.effort".into(),
        _ if param.starts_with("messages[") => "input".into(),
        _ => param,
    });
    error
}

/// A stream of events.
fn event_stream(body: Body) -> Response {
    let mut headers = HeaderMap::new();
    let kind = HeaderValue::from_static("text/event-stream; charset=utf-8");
    headers.insert(header::CONTENT_TYPE, kind);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    (headers, body).into_response()
}

/// Answers whoever waits.
struct Answering {
    events: Events,
    /// Where it is to be stored.
    keeping: Option<Arc<Responses>>,
    caller: Caller,
    items: Vec<Value>,
    /// In the end.
    response: Value,
}

impl Render for Answering {
    fn begin(&mut self, frames: &mut Frames) {
        self.events.begin(frames);
        self.events.started(frames);
    }

    fn piece(&mut self, piece: Piece, _: &dyn Fn() -> Counts, frames: &mut Frames) {
        self.events.piece(piece, frames);
    }

    /// Stored before anybody is told of its end: whoever knows the id finds it.
    async fn before_end(&mut self, outcome: &Outcome) {
        let (status, ended_at) = (status_of(outcome), unix_ms() / 1000);
        self.response = self.events.shown(&status, Some(outcome.counts), ended_at);
        let Some(responses) = self.keeping.take() else { return };
        let stored = Stored {
            response: self.response.clone(),
            items: std::mem::take(&mut self.items),
            ..Stored::default()
        };
        let id = &self.events.face().id;
        let problem = match responses.store.keep(&self.caller, id, &stored).await {
            // Of one that is computed again, the first stands.
            Ok(Kept::Yes | Kept::Other) => return,
            Ok(Kept::No) => "it is larger than may be stored".to_owned(),
            Err(error) => error.message,
        };
        // An answer that is there and paid for is not thrown away because it cannot be kept; it says so.
        tracing::warn!(id, problem, "a response was not stored");
        self.response["store"] = false.into();
    }

    fn end(&mut self, outcome: &Outcome, frames: &mut Frames) {
        self.events.end(outcome, &self.response, frames);
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        self.events.fail(error, frames);
    }
}
