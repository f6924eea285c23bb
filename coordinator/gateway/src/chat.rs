//! `POST /v1/chat/completions`: the first endpoint over [`generation`](crate::generation), and the pattern of the others.

pub(crate) mod format;
pub(crate) mod request;
pub(crate) mod response;
mod tools;

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::response::Response;

use self::response::ChunkWriter;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::Backend;
use crate::gateway::Gateway;
use crate::generation::answer;
use crate::generation::intake::{Received, receive};
use crate::generation::start::start;
use crate::trace::RequestNames;

/// The route, as records name it.
const ENDPOINT: &str = "/v1/chat/completions";

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
    let started = start(gateway, received, request::parse).await?;
    let (run, heading, options) = (started.run, started.heading, started.own);
    let mut response = if options.stream {
        let chunks = ChunkWriter::new(heading, &options, run.choices());
        answer::streamed(&gateway.config, run, chunks).await?
    } else {
        answer::json(response::completion(&heading, &options, &answer::whole(run).await?))
    };
    if started.replayed {
        answer::mark_replayed(response.headers_mut());
    }
    Ok(response)
}
