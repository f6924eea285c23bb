//! The routes, and what every request passes on its way: names, the key check, counting. Handlers of more than a few
//! lines live elsewhere.

use std::sync::Arc;

use axum::extract::{Extension, MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};

use crate::api_error::ApiError;
use crate::auth::{self, Caller, Scopes};
use crate::backend::{Backend, WorkerStatus};
use crate::chat;
use crate::completions;
use crate::coordinators;
use crate::drain;
use crate::gateway::Gateway;
use crate::model_card::{ModelCard, ModelList};
use crate::organization;
use crate::snapshot;
use crate::trace::RequestNames;

/// Open without a key: load balancers and orchestrators ask them, and they tell nothing but yes or no.
const OPEN_ROUTES: [&str; 2] = ["/health", "/ready"];

const INDEX: &str = "baton: an OpenAI-compatible API.\n\n\
    POST /v1/chat/completions   chat, whole or streamed (\"stream\": true)\n\
    GET  /v1/models             the models served here\n\
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
pub(crate) fn router<B: Backend>(gateway: Arc<Gateway<B>>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/v1/chat/completions", post(chat::completions::<B>))
        .route("/v1/completions", post(completions::completions::<B>))
        .route("/v1/models", get(models::<B>))
        .route("/v1/models/{*id}", get(model::<B>))
        .route("/health", get(health))
        .route("/ready", get(ready::<B>))
        .route("/metrics", get(metrics::<B>))
        .route("/cluster/workers", get(workers::<B>))
        .route("/cluster/workers/{id}/drain", post(drain::drain::<B>))
        .merge(organization::routes(gateway.accounts.as_ref()))
        .route(
            "/cluster/coordinators",
            get(coordinators::list::<B>).post(coordinators::add::<B>),
        )
        .route("/cluster/coordinators/transfer", post(coordinators::transfer::<B>))
        .route("/cluster/coordinators/{id}/remove", post(coordinators::remove::<B>))
        .route("/cluster/snapshot", get(snapshot::save::<B>))
        .fallback(unknown)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(gateway.clone(), envelope::<B>))
        .with_state(gateway)
}

/// Around every request, the unknown ones too.
async fn envelope<B: Backend>(State(gateway): State<Arc<Gateway<B>>>, mut request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("other", MatchedPath::as_str)
        .to_owned();
    let names = RequestNames::from_headers(request.headers(), &route);
    let caller = if OPEN_ROUTES.contains(&route.as_str()) {
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
            request.extensions_mut().insert(caller);
            let mut response = next.run(request).await;
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

/// What a route needs of a key. The list of models is for all.
fn needed(method: &Method, route: &str) -> Option<Scopes> {
    let under = |prefix: &str| route.starts_with(prefix);
    if under("/v1/chat/") || route == "/v1/completions" {
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
        None
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
