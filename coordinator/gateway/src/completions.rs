//! `POST /v1/completions`: text to continue, without a chat template; OpenAI's older endpoint, which evaluation harnesses
//! and base models still want.

mod request;
mod response;

pub(crate) use self::request::FIELDS;

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use self::response::{Echo, Writer};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::{Received, receive};
use crate::generation::request::Prompt;
use crate::generation::start::start;
use crate::trace::RequestNames;

/// The route, as records name it.
const ENDPOINT: &str = "/v1/completions";

/// The handler. A client that hangs up drops this future or the response's body; the run in it then cancels and settles.
pub(crate) async fn completions<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, ENDPOINT, names, caller, request).await?;
    respond(&gateway, received).await
}

/// Answers a request that was read.
pub(crate) async fn respond<B: Backend>(gateway: &Arc<Gateway<B>>, received: Received) -> Result<Response, ApiError> {
    let caller = received.origin.caller.clone();
    let started = start(gateway, received, request::parse).await?;
    let (run, heading, options) = (started.run, started.heading, started.own);
    let echo = match options.echo.as_slice() {
        [] => Echo::default(),
        prompts => Echo::new(texts(gateway, &heading.model, prompts, &caller)?, options.n),
    };
    let mut response = if options.stream {
        let writer = Writer::new(heading, &options, echo, run.choices());
        answer::streamed(&gateway.config, run, writer).await?
    } else {
        answer::json(response::completion(
            &heading,
            &options,
            &echo,
            &answer::whole(run).await?,
        ))
    };
    if started.replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}

/// The prompts as text: those of tokens as the model's tokenizer reads them.
fn texts<B: Backend>(
    gateway: &Gateway<B>,
    model: &str,
    prompts: &[Prompt],
    caller: &Caller,
) -> Result<Vec<String>, ApiError> {
    let model = gateway.served(model, caller)?;
    let text = |prompt: &Prompt| match prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Tokens(ids) => model.decode(ids, false),
        Prompt::Chat(_) => String::new(),
    };
    Ok(prompts.iter().map(text).collect())
}
