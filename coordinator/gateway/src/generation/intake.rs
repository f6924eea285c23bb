//! The way in: a request's head and body, within limits of size, time, memory and number. Knows no endpoint.

use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, header};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use tokio::sync::OwnedSemaphorePermit;

use crate::accounts::idempotency::Claim;
use crate::api_error::ApiError;
use crate::auth::Caller;
use crate::backend::{Backend, LatencyTargets};
use crate::gateway::Gateway;
use crate::targets::targets;
use crate::trace::RequestNames;

use crate::clock::unix_ms;

/// Rest of a too large body that is read and thrown away, so that a client that looks only after sending finds the
/// answer and not a reset connection.
const DRAIN_BYTES_MAX: usize = 32 << 20;

/// What a request's head says of it.
#[derive(Clone)]
pub(crate) struct Origin {
    pub names: RequestNames,
    pub caller: Caller,
    pub targets: LatencyTargets,
}

/// A request that was read and not looked at yet.
pub(crate) struct Received {
    pub origin: Origin,
    pub body: Bytes,
    /// Of its `Idempotency-Key`.
    pub claim: Option<Claim>,
    /// The route, as records name it.
    pub endpoint: &'static str,
    pub arrived: Instant,
    pub arrived_unix_ms: u64,
    /// A place among the requests in work, ...
    pub permit: OwnedSemaphorePermit,
    /// ... and the body's among those in memory.
    pub memory: OwnedSemaphorePermit,
}

/// Reads a request of an endpoint.
pub(crate) async fn receive<B: Backend>(
    gateway: &Arc<Gateway<B>>,
    endpoint: &'static str,
    names: RequestNames,
    caller: Caller,
    request: Request,
) -> Result<Received, ApiError> {
    let arrived = Instant::now();
    let arrived_unix_ms = unix_ms();
    require_json(request.headers())?;
    let origin = Origin {
        names,
        caller,
        targets: targets(request.headers())?,
    };
    let permit = gateway.in_flight.clone().try_acquire_owned();
    let permit = permit.map_err(|_| gateway.too_many_in_work())?;
    let headers = request.headers().clone();
    let (body, memory) = read_body(gateway, request).await?;
    Ok(Received {
        origin,
        claim: Claim::of(&headers, &body)?,
        body,
        endpoint,
        arrived,
        arrived_unix_ms,
        permit,
        memory,
    })
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
