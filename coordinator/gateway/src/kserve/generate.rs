//! `POST /v2/models/{model}/generate` and `generate_stream`: `text_input` is continued as it is, without a chat template.

use std::sync::Arc;

use axum::extract::{Extension, Path, Request, State};
use axum::response::Response;
use serde_json::{Map, Value as Json, json};

use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::body::Body;
use crate::config::GatewayConfig;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::receive;
use crate::generation::output::{Delta, End, EndReason, Outcome, Piece, StopHit};
use crate::generation::request::{GenerationRequest, Prompt};
use crate::generation::start::{Heading, Started, start};
use crate::generation::stream::{Frames, Render};
use crate::metrics::Counts;
use crate::params::Params;
use crate::trace::RequestNames;

/// Tokens of an answer where the request says nothing: as completions have it.
const MAX_TOKENS_DEFAULT: u32 = 16;
/// Bytes of the client's own id.
const ID_BYTES_MAX: usize = 256;

/// The routes, as records name them.
const ENDPOINT: &str = "/v2/models/generate";
const ENDPOINT_STREAM: &str = "/v2/models/generate_stream";

/// What `parameters` may hold; others are refused.
pub(crate) const PARAMETERS: &[&str] = &[
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "details",
    "priority",
    "user",
    "cache_salt",
];

/// What of a request is this endpoint's own.
#[derive(Debug, Default)]
struct Options {
    /// The client's id; the request's own where there is none.
    id: Option<String>,
    /// How it ended is told too.
    details: bool,
}

/// The whole answer.
pub(crate) async fn whole<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, ENDPOINT, names, caller, request).await?;
    let started = start(&gateway, received, move |bytes, config| parse(bytes, config, model)).await?;
    let (writer, replayed, run) = taken_apart(started);
    let collected = answer::whole(run).await?;
    let text = collected.choices.first();
    let text = text.map_or(String::new(), |choice| {
        [choice.reasoning.as_str(), &choice.text].concat()
    });
    let details = writer.details(&collected.outcome);
    let mut response = answer::json(writer.json(&text, details));
    if replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}

/// The answer as it comes.
pub(crate) async fn streamed<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    Path(model): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, ENDPOINT_STREAM, names, caller, request).await?;
    let started = start(&gateway, received, move |bytes, config| parse(bytes, config, model)).await?;
    let (writer, replayed, run) = taken_apart(started);
    let mut response = answer::streamed(&gateway.config, run, writer).await?;
    if replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}

fn taken_apart<B: Backend>(started: Started<B, Options>) -> (Writer, bool, crate::generation::run::Run<B>) {
    let writer = Writer {
        heading: started.heading,
        options: started.own,
    };
    (writer, started.replayed, started.run)
}

fn parse(bytes: &[u8], config: &GatewayConfig, model: String) -> Result<(GenerationRequest, Options), ApiError> {
    let mut body = Body::parse(bytes)?;
    let text = body.needed_text("text_input")?;
    let id = body.text("id")?;
    if id.as_ref().is_some_and(|id| id.len() > ID_BYTES_MAX) {
        return Err(body.wrong("id", format_args!("must be a string of at most {ID_BYTES_MAX} bytes")));
    }
    let parameters = match body.take("parameters") {
        None => Map::new(),
        Some(Json::Object(mut parameters)) => {
            parameters.retain(|_, value| !value.is_null());
            parameters
        }
        Some(_) => return Err(body.wrong("parameters", "must be an object")),
    };
    body.finish()?;
    let params = Params(parameters);
    params.only(PARAMETERS)?;
    let options = Options {
        id,
        details: params.boolean("details")?,
    };
    let request = GenerationRequest {
        model,
        prompts: vec![Prompt::Text(text)],
        n: 1,
        max_tokens: params.max_tokens(&["max_tokens"], "max_tokens")?,
        max_tokens_default: Some(MAX_TOKENS_DEFAULT),
        sampling: params.sampling()?,
        stop: params.stop(config)?,
        priority: params.priority()?,
        user: params.user()?,
        cache_salt: params.cache_salt()?,
        ..GenerationRequest::default()
    };
    Ok((request, options))
}

/// Writes answers and their parts, which have one shape.
struct Writer {
    heading: Heading,
    options: Options,
}

impl Writer {
    fn json(&self, text: &str, details: Option<Json>) -> Vec<u8> {
        let id = self.options.id.as_ref().unwrap_or(&self.heading.id);
        let mut answer = json!({"id": id, "model_name": self.heading.model, "text_output": text});
        if let Some(details) = details {
            answer["details"] = details;
        }
        answer.to_string().into_bytes()
    }

    fn details(&self, outcome: &Outcome) -> Option<Json> {
        let end = outcome.ends.first().filter(|_| self.options.details)?;
        Some(
            json!({"finish_reason": finish_reason(end), "prompt_tokens": outcome.counts.prompt,
            "generated_tokens": outcome.counts.completion}),
        )
    }
}

/// The protocol's words.
fn finish_reason(end: &End) -> &'static str {
    match (end.reason, &end.stop) {
        (EndReason::Length, _) => "length",
        (_, Some(StopHit::Text(_))) => "stop_sequence",
        _ => "eos_token",
    }
}

impl Render for Writer {
    fn begin(&mut self, _: &mut Frames) {}

    fn piece(&mut self, piece: Piece, _: &dyn Fn() -> Counts, frames: &mut Frames) {
        for delta in piece.deltas {
            if let Delta::Text(text) | Delta::Reasoning(text) = delta {
                frames.data(&self.json(&text, None));
            }
        }
    }

    fn end(&mut self, outcome: &Outcome, frames: &mut Frames) {
        frames.data(&self.json("", self.details(outcome)));
    }

    fn error(&mut self, error: &ApiError, frames: &mut Frames) {
        frames.data(json!({"error": error.message}).to_string().as_bytes());
    }
}
