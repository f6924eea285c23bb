//! `POST /v1/chat/completions`: body, preparation, placement, and the answer, whole or streamed.
//!
//! A client that hangs up drops whatever future serves it, in every phase; the `Run` in it then cancels and settles.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use crate::accounts::hold::{Ask, Hold};
use crate::accounts::idempotency::{Claim, REPLAYED_HEADER};
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::{Backend, Generation, Job};
use crate::gateway::{Gateway, Origin, Prepared};
use crate::response::{self, ChunkWriter, Heading};
use crate::run::{self, Opened, Run, Step, unix_ms};
use crate::sse;
use crate::targets::targets;
use crate::trace::RequestNames;

/// Bodies up to this many bytes are parsed and tokenised on the connection's own task (well under a millisecond); larger
/// ones on a thread that may block, so that one long prompt delays nobody's tokens.
const INLINE_BYTES_MAX: usize = 4 << 10;
/// Rest of a too large body that is read and thrown away, so that a client that looks only after sending finds the
/// answer and not a reset connection.
const DRAIN_BYTES_MAX: usize = 32 << 20;

/// The route, as records name it.
const ENDPOINT: &str = "/v1/chat/completions";

/// A place among the requests in work, and among the bodies in memory.
type Permits = (OwnedSemaphorePermit, OwnedSemaphorePermit);

/// The handler.
pub(crate) async fn completions<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(names): Extension<RequestNames>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let arrived_unix_ms = unix_ms();
    require_json(request.headers())?;
    let origin = Origin {
        names,
        caller,
        targets: targets(request.headers())?,
    };
    let permit = gateway.in_flight.clone().try_acquire_owned().map_err(|_| {
        let message = format!(
            "This gateway already has {} requests in work; retry.",
            gateway.config.in_flight_max
        );
        ApiError::overloaded("queue_full", message, 1)
    })?;
    let headers = request.headers().clone();
    let (body, memory) = read_body(&gateway, request).await?;
    let claim = Claim::of(&headers, &body)?;
    let (prepared, (permit, _)) = prepare(&gateway, &origin, body, (permit, memory)).await?;
    let Prepared {
        mut job,
        reader,
        stream,
        include_usage,
        max_tokens_asked,
        seeded,
        user,
    } = prepared;
    if let Some(claim) = claim.as_ref().filter(|_| !seeded) {
        job.sampling.seed = claim.seed(&origin.caller.key_id);
    }
    let ask = Ask {
        request_id: &job.request_id,
        model: &job.model,
        endpoint: ENDPOINT,
        prompt_tokens: u32::try_from(job.prompt.len()).unwrap_or(u32::MAX),
        max_tokens: job.max_tokens,
        max_tokens_asked,
        user,
        started_unix_ms: arrived_unix_ms,
        claim,
        revision: gateway.revision(&job.model),
    };
    let hold = Hold::open(gateway.accounts.as_ref(), &origin.caller, ask).await?;
    let replayed = hold.replayed().map(str::to_owned);
    let opened = Opened {
        request_id: job.request_id.clone(),
        model: job.model.clone(),
        prompt_tokens: u32::try_from(job.prompt.len()).unwrap_or(u32::MAX),
        arrived,
        arrived_unix_ms,
    };
    let heading = Heading {
        // A retry is answered as the request that it repeats.
        id: replayed.clone().unwrap_or_else(|| job.request_id.clone()),
        created: arrived_unix_ms / 1000,
        model: job.model.clone(),
    };
    // A client that hangs up while it waits here drops this future, and with it its place in the queue.
    let generation = place(&gateway, job, hold.cut()).await?;
    let run = Run::new(gateway.ledger.clone(), opened, hold, generation, reader, permit);
    let answer = if stream {
        streamed(&gateway, run, ChunkWriter { heading, include_usage }).await
    } else {
        whole(run, &heading).await
    };
    answer.map(|mut response| {
        if replayed.is_some() {
            let yes = HeaderValue::from_static("true");
            response.headers_mut().insert(REPLAYED_HEADER, yes);
        }
        response
    })
}

/// Waits for a place, as long as the request may run at all.
async fn place<B: Backend>(
    gateway: &Gateway<B>,
    job: Job,
    cut: Option<CancellationToken>,
) -> Result<Generation, ApiError> {
    let generation = gateway.ledger.backend.generate(job);
    let Some(cut) = cut else {
        return Ok(generation.await?);
    };
    tokio::select! {
        biased;
        () = cut.cancelled() => Err(run::budget_lost()),
        generation = generation => Ok(generation?),
    }
}

async fn whole<B: Backend>(mut run: Run<B>, heading: &Heading) -> Result<Response, ApiError> {
    let mut content = String::new();
    let end = loop {
        match run.step().await? {
            Step::Text(text) => content.push_str(&text),
            Step::Last(text, end) => {
                content.push_str(&text);
                break end;
            }
        }
    };
    let counts = run.settle(end).await?;
    let body = response::completion(heading, &content, end.reason(), counts);
    Ok((
        [(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))],
        body,
    )
        .into_response())
}

async fn streamed<B: Backend>(
    gateway: &Gateway<B>,
    mut run: Run<B>,
    chunks: ChunkWriter,
) -> Result<Response, ApiError> {
    // A failure before the first token is still an HTTP error, which clients know how to retry.
    let wait = Duration::from_millis(gateway.config.first_token_wait_ms);
    let first = tokio::time::timeout(wait, run.step()).await.ok().transpose()?;
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
    ];
    Ok((headers, sse::body(run, chunks, gateway.config.keep_alive(), first)).into_response())
}

/// The permits go along: a client that hangs up does not make room while its prompt is still being worked on.
async fn prepare<B: Backend>(
    gateway: &Arc<Gateway<B>>,
    origin: &Origin,
    body: Bytes,
    permits: Permits,
) -> Result<(Prepared, Permits), ApiError> {
    if body.len() <= INLINE_BYTES_MAX {
        return Ok((gateway.prepare(&body, origin)?, permits));
    }
    let turn = gateway
        .preparing
        .clone()
        .acquire_owned()
        .await
        .map_err(|_| ApiError::internal())?;
    let (gateway, origin) = (gateway.clone(), origin.clone());
    let task = tokio::task::spawn_blocking(move || {
        let prepared = gateway.prepare(&body, &origin);
        drop(turn);
        (prepared, permits)
    });
    let (prepared, permits) = task.await.map_err(|_| ApiError::internal())?;
    Ok((prepared?, permits))
}

/// JSON only. That also keeps web pages out: a browser asks before it sends this type to another site.
fn require_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        Ok(())
    } else {
        Err(ApiError::media_type())
    }
}

/// Reads the body within its limits of size, time and memory.
async fn read_body<B>(gateway: &Gateway<B>, request: Request) -> Result<(Bytes, OwnedSemaphorePermit), ApiError> {
    let bytes_max = gateway.config.body_bytes_max;
    let asks_first = request.headers().contains_key(header::EXPECT);
    let announced = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse().ok());
    let too_large = announced.is_some_and(|bytes: usize| bytes > bytes_max);
    if too_large && asks_first {
        return Err(ApiError::body_too_large(bytes_max));
    }
    let kib = announced.unwrap_or(bytes_max).min(bytes_max).div_ceil(1024);
    let memory = gateway
        .body_kib
        .clone()
        .try_acquire_many_owned(u32::try_from(kib).unwrap_or(u32::MAX));
    let memory = memory.map_err(|_| {
        ApiError::overloaded(
            "queue_full",
            "This gateway already reads as many bodies as it may; retry.",
            1,
        )
    })?;
    let read = collect(request.into_body(), if too_large { 0 } else { bytes_max });
    match tokio::time::timeout(gateway.config.body_timeout(), read).await {
        Ok(Ok(Some(bytes))) if !too_large => Ok((bytes, memory)),
        Ok(Ok(_)) => Err(ApiError::body_too_large(bytes_max)),
        Ok(Err(())) => Err(ApiError::bad_request("The body broke off.")),
        Err(_) if too_large => Err(ApiError::body_too_large(bytes_max)),
        Err(_) => Err(ApiError::body_timeout()),
    }
}

/// The body, or `None` if it is larger than `bytes_max`.
async fn collect(mut body: Body, bytes_max: usize) -> Result<Option<Bytes>, ()> {
    let mut bytes = BytesMut::new();
    let mut surplus = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| ())?.into_data() else {
            continue;
        };
        if surplus == 0 && bytes.len() + data.len() <= bytes_max {
            bytes.extend_from_slice(&data);
            continue;
        }
        surplus += data.len();
        bytes = BytesMut::new();
        if surplus > DRAIN_BYTES_MAX {
            break;
        }
    }
    Ok((surplus == 0).then(|| bytes.freeze()))
}
