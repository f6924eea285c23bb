//! The routes, and what every request passes on its way: names, the key check, counting. Handlers of more than a few
//! lines live elsewhere.

use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, Extension, MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::api_error::ApiError;
use crate::auth::{self, Caller, Scopes};
use crate::backend::{Backend, WorkerStatus};
use crate::batches::{self, Internal};
use crate::chat;
use crate::coordinators;
use crate::drain;
use crate::files;
use crate::gateway::Gateway;
use crate::model_card::{ModelCard, ModelList};
use crate::organization;
use crate::responses;
use crate::resume::{self, Streams};
use crate::snapshot;
use crate::trace::RequestNames;

/// Open without a key: load balancers and orchestrators ask them, and they tell nothing but yes or no.
pub(crate) const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];

/// Every key opens these: what is served here, and the answer for paths that do not exist.
const ANY_KEY_ROUTES: [&str; 4] = ["/", "/v1/models", "/v1/models/{*id}", UNKNOWN];

/// Stands for all paths without a route.
const UNKNOWN: &str = "other";

/// Bytes of a body that an extractor reads by itself: settings, not prompts. Handlers that read more do so within limits of
/// their own.
const SMALL_BODY_BYTES_MAX: usize = 256 << 10;

const INDEX: &str = "baton: an OpenAI-compatible API.\n\n\
    POST /v1/chat/completions   chat, whole or streamed (\"stream\": true)\n\
    GET  /v1/streams/{id}       the rest of a stream that broke off\n\
    POST /v1/responses          responses: stored, followed, in the background\n\
    GET  /v1/models             the models served here\n\
    /v1/files, /v1/batches      files of requests, run in idle capacity at half the price\n\
    GET  /health                is this process alive?\n\
    GET  /ready                 can requests be taken?\n\
    GET  /metrics               Prometheus metrics\n\
    GET  /cluster/workers       the workers, as JSON\n\
    POST /cluster/workers/{id}/drain   take a worker out of service\n\
    GET  /cluster/coordinators  the coordinators, as JSON\n\
    POST /cluster/coordinators  take a coordinator in\n\
    POST /cluster/coordinators/{id}/remove take one out\n\
    POST /cluster/coordinators/transfer    let another one lead\n\
    GET  /cluster/snapshot      a backup of the coordinators' state\n\n\
    GET  /v1/organization/usage/completions, /v1/organization/costs        what was used, and what it cost\n\
    GET  /v1/ledger/rows, /v1/ledger/checkpoints                           every request, gap-free\n\
    /v1/organization/projects, /admin_api_keys, /prices, /budgets, ...     administration\n";

/// The whole application.
pub(crate) fn router<B: Backend>(gateway: Arc<Gateway<B>>, streams: Arc<Streams>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/v1/chat/completions", post(chat::completions::<B>))
        .route("/v1/streams/{id}", get(resume::resume::<B>))
        .route("/v1/responses", post(responses::create::<B>))
        .route("/v1/responses/input_tokens", post(responses::input_tokens::<B>))
        .route(
            "/v1/responses/{id}",
            get(responses::retrieve::<B>).delete(responses::delete::<B>),
        )
        .route("/v1/responses/{id}/cancel", post(responses::cancel::<B>))
        .route("/v1/responses/{id}/input_items", get(responses::input_items::<B>))
        .route("/v1/models", get(models::<B>))
        .route("/v1/models/{*id}", get(model::<B>))
        .route("/health", get(health))
        .route("/ready", get(ready::<B>))
        .route("/metrics", get(metrics::<B>))
        .route("/cluster/workers", get(workers::<B>))
        .route("/cluster/workers/{id}/drain", post(drain::drain::<B>))
        .merge(organization::routes(gateway.accounts.as_ref()))
        .merge(files::routes(gateway.files.as_ref()))
        .merge(batches::routes(gateway.files.as_ref(), &gateway.config.batches))
        .route(
            "/cluster/coordinators",
            get(coordinators::list::<B>).post(coordinators::add::<B>),
        )
        .route("/cluster/coordinators/transfer", post(coordinators::transfer::<B>))
        .route("/cluster/coordinators/{id}/remove", post(coordinators::remove::<B>))
        .route("/cluster/snapshot", get(snapshot::save::<B>))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(DefaultBodyLimit::max(SMALL_BODY_BYTES_MAX))
        .layer(middleware::from_fn_with_state(gateway.clone(), envelope::<B>))
        .layer(Extension(streams))
        .with_state(gateway)
}

/// A request that was refused before it came here: what it is answered, once it has its names.
#[derive(Clone)]
pub(crate) struct Refusal(pub ApiError);

/// Around every request, the unknown ones too.
async fn envelope<B: Backend>(State(gateway): State<Arc<Gateway<B>>>, mut request: Request, next: Next) -> Response {
    let names = RequestNames::from_headers(request.headers());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or(UNKNOWN, MatchedPath::as_str)
        .to_owned();
    let caller = if let Some(Refusal(error)) = request.extensions_mut().remove() {
        Err(error)
    } else if let Some(Internal(caller)) = request.extensions_mut().remove() {
        Ok(caller)
    } else if OPEN_ROUTES.contains(&route.as_str()) {
        Ok(Caller::anonymous())
    } else {
        auth::caller(gateway.keys.as_ref(), gateway.accounts.as_ref(), request.headers())
    };
    let needed = needed(request.method(), &route);
    let caller = caller.and_then(|caller| match needed {
        Some(scope) if !caller.scopes.hold(scope) => Err(ApiError::missing_scope(scope.name())),
        _ => Ok(caller),
    });
    request.extensions_mut().insert(names.clone());
    let mut response = match caller {
        Ok(caller) => {
            let account = caller.account.clone();
            request.extensions_mut().insert(caller.clone());
            let mut response = shaped(resumable(&gateway, &names, &caller, request, next).await);
            if let (Some(accounts), Some(account)) = (&gateway.accounts, account) {
                accounts.rates.headers(&account, response.headers_mut());
            }
            response
        }
        Err(refused) => refused.into_response(),
    };
    gateway.ledger.metrics.responded(&route, response.status().as_u16());
    let headers = response.headers_mut();
    for (name, value) in [("x-request-id", &names.shown_id), ("traceparent", &names.traceparent)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    // Answers are JSON, text or events; a browser must not guess otherwise.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// Errors that an extractor made by itself (a path that is no UTF-8, a query that cannot be read) are text for people; clients
/// are told in the one shape.
fn shaped(response: Response) -> Response {
    let status = response.status();
    let kind = response.headers().get(header::CONTENT_TYPE);
    let json = kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/json"));
    if json || !(status.is_client_error() || status.is_server_error()) {
        return response;
    }
    let message = match status.is_client_error() {
        true => "The request's path, query or body cannot be read.",
        false => return ApiError::internal().into_response(),
    };
    ApiError {
        status,
        ..ApiError::bad_request(message)
    }
    .into_response()
}

/// Has a request answered, and its stream kept if it asks for that.
async fn resumable<B: Backend>(
    gateway: &Gateway<B>,
    names: &RequestNames,
    caller: &Caller,
    request: Request,
    next: Next,
) -> Response {
    let streams = request.extensions().get::<Arc<Streams>>().cloned();
    let streams = match (resume::wanted(request.headers()), streams) {
        (Err(refused), _) => return refused.into_response(),
        (Ok(false), _) | (_, None) => return next.run(request).await,
        (Ok(true), Some(streams)) => streams,
    };
    let response = next.run(request).await;
    let backend = &*gateway.ledger.backend;
    streams.keep(response, &names.request_id, caller, backend).await
}

/// What a route needs of a key. One that is not named here needs the most: whoever adds a route and forgets it finds it
/// closed, and a test that reads the routes' source says so.
fn needed(method: &Method, route: &str) -> Option<Scopes> {
    let under = |prefix: &str| route.starts_with(prefix);
    if OPEN_ROUTES.contains(&route) || ANY_KEY_ROUTES.contains(&route) {
        None
    } else if under("/v1/chat/")
        || under("/v1/streams/")
        || under("/v1/responses")
        || under("/v1/files")
        || under("/v1/batches")
    {
        Some(Scopes::INFERENCE)
    } else if under("/v1/organization/usage/") || route == "/v1/organization/costs" {
        Some(Scopes::USAGE)
    } else if route == "/v1/ledger/seal" {
        Some(Scopes::ADMIN)
    } else if under("/v1/ledger/") {
        Some(Scopes::USAGE)
    } else if under("/v1/organization/") {
        Some(Scopes::ADMIN)
    } else if route == "/cluster/snapshot" || (under("/cluster/coordinators") && method != Method::GET) {
        // Who has the whole state, or the group, has everything.
        Some(Scopes::ADMIN)
    } else if under("/cluster/") || route == "/metrics" {
        Some(Scopes::CLUSTER)
    } else {
        Some(Scopes::UNNAMED)
    }
}

async fn index() -> &'static str {
    INDEX
}

async fn health() -> &'static str {
    "ok\n"
}

async fn ready<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Response {
    match gateway.missing() {
        None => "ready\n".into_response(),
        Some(missing) => ApiError::unavailable(missing).into_response(),
    }
}

async fn models<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Extension(caller): Extension<Caller>,
) -> Json<ModelList> {
    Json(gateway.models(&caller))
}

/// The id may have slashes ("org/model").
async fn model<B: Backend>(
    State(gateway): State<Arc<Gateway<B>>>,
    Path(id): Path<String>,
    Extension(caller): Extension<Caller>,
) -> Result<Json<ModelCard>, ApiError> {
    gateway
        .model(&id, &caller)
        .map(Json)
        .ok_or_else(|| ApiError::model_not_found(&id))
}

async fn metrics<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Result<Response, ApiError> {
    let text = gateway
        .ledger
        .metrics
        .render(&gateway.ledger.backend.snapshot())
        .map_err(|_| ApiError::internal())?;
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

async fn workers<B: Backend>(State(gateway): State<Arc<Gateway<B>>>) -> Json<Vec<WorkerStatus>> {
    Json(gateway.ledger.backend.snapshot().workers)
}

async fn unknown(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(method.as_str(), uri.path())
}

async fn wrong_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(method.as_str(), uri.path())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::route_list;

    /// Whoever adds a route says in [`needed`] who may use it.
    #[test]
    fn every_route_says_what_it_needs() {
        let routes = route_list::routes();
        assert!(
            routes.len() > 20 && routes.contains("/v1/chat/completions"),
            "{routes:?}"
        );
        for route in routes {
            for method in [Method::GET, Method::POST, Method::DELETE] {
                assert_ne!(needed(&method, &route), Some(Scopes::UNNAMED), "{method} {route}");
            }
        }
        let unnamed = needed(&Method::GET, "/v1/new").unwrap();
        assert!(unnamed.hold(Scopes::ADMIN) && unnamed.hold(Scopes::INFERENCE));
    }
}
