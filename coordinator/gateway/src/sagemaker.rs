//! What Amazon SageMaker asks of a container: `GET /ping`, and `POST /invocations` with whatever the model takes. Here that is
//! a chat completion or a completion, told apart by the body's shape.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;
use crate::generation::intake::receive;
use crate::trace::RequestNames;
use crate::{chat, completions};

/// The route, as records name it.
const ENDPOINT: &str = "/invocations";

/// What tells the shapes apart.
#[derive(Deserialize)]
struct Shape {
    messages: Option<IgnoredAny>,
    prompt: Option<IgnoredAny>,
}

/// `GET /ping`: as `/ready`.
pub(crate) async fn ping<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Result<&'static str, ApiError> {
    match gateway.missing() {
        None => Ok("ready\n"),
        Some(missing) => Err(ApiError::unavailable(missing)),
    }
}

/// `POST /invocations`.
pub(crate) async fn invocations<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let received = receive(&gateway, ENDPOINT, names, caller, request).await?;
    // A body that is no JSON is told so by either.
    match serde_json::from_slice::<Shape>(&received.body) {
        Ok(Shape {
            messages: None,
            prompt: Some(_),
        }) => completions::respond(&gateway, received).await,
        Ok(Shape {
            messages: None,
            prompt: None,
        }) => {
            let message = "The body must have `messages` (a chat) or `prompt` (a completion).";
            Err(ApiError::bad_request(message))
        }
        _ => chat::respond(&gateway, received).await,
    }
}
