//! The routes, and what every request passes on its way: names, the key check, counting. Handlers of more than a few
//! lines live elsewhere.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody as _, to_bytes};
use axum::extract::{DefaultBodyLimit, Extension, MatchedPath, Path, Request, State};
use axum::http::{HeaderValue, Method, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::{Json, Router};

use crate::anthropic;
use crate::api_error::ApiError;
use crate::auth::{self, Caller, Scopes};
use crate::backend::{Backend, WorkerStatus};
use crate::batches::{self, Internal};
use crate::chat;
use crate::completions;
use crate::coordinators;
use crate::dialect::Dialect;
use crate::drain;
use crate::files;
use crate::gateway::Gateway;
use crate::kserve;
use crate::model_card::{ModelCard, ModelList};
use crate::openapi::{About, Api, EVENTS, JSON_OR_EVENTS, Purpose, TEXT, schemas};
use crate::organization;
use crate::responses;
use crate::resume::{self, Streams};
use crate::sagemaker;
use crate::snapshot;
use crate::tokenize;
use crate::trace::RequestNames;

/// Open without a key: load balancers and orchestrators ask them, and they tell nothing but yes or no.
pub(crate) const OPEN_ROUTES: [&str; 5] = ["/health", "/ready", "/ping", "/v2/health/live", "/v2/health/ready"];

/// Every key opens these: what is served here and how it is called, and the answer for paths that do not exist.
const ANY_KEY_ROUTES: [&str; 9] = [
    "/",
    "/openapi.json",
    "/docs",
    "/v1/models",
    "/v1/models/{*id}",
    "/v2",
    "/v2/models/{model}",
    "/v2/models/{model}/ready",
    UNKNOWN,
];

/// Stands for all paths without a route.
const UNKNOWN: &str = "other";

/// Bytes of a body that an extractor reads by itself: settings, not prompts. Handlers that read more do so within limits of
/// their own.
const SMALL_BODY_BYTES_MAX: usize = 256 << 10;

/// The whole application.
pub(crate) fn router<B: Backend>(gateway: Arc<Gateway<B>>, streams: Arc<Streams>) -> Router {
    let mut api = inference(operation(Api::new()));
    if gateway.accounts.is_some() {
        api = organization::routes(api);
    }
    if gateway.files.is_some() {
        api = batches::routes(files::routes(api));
    }
    let mut router = api.into_router();
    if let Some(accounts) = &gateway.accounts {
        router = router.layer(Extension(accounts.clone()));
    }
    if let Some(files) = &gateway.files {
        let config = Arc::new(gateway.config.batches.clone());
        router = router.layer(Extension(files.clone())).layer(Extension(config));
    }
    router
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

type GatewayApi<B> = Api<Arc<Gateway<B>>>;

/// What calls models, under the names of several APIs.
fn inference<B: Backend>(api: GatewayApi<B>) -> GatewayApi<B> {
    let calls = |summary, schema| About::new(Purpose::Inference, summary).body(schema);
    let reads = |summary| About::new(Purpose::Read, summary);
    api.post(
        "/v1/chat/completions",
        chat::completions::<B>,
        calls("OpenAI's chat completions", schemas::chat()).media(JSON_OR_EVENTS),
    )
    .post(
        "/v1/completions",
        completions::completions::<B>,
        calls("OpenAI's completions, without a chat template", schemas::completion()).media(JSON_OR_EVENTS),
    )
    .post(
        "/v1/messages",
        anthropic::create::<B>,
        calls("Anthropic's messages", schemas::message()).media(JSON_OR_EVENTS),
    )
    .post(
        "/v1/messages/count_tokens",
        anthropic::count::<B>,
        calls("What a message would be billed as its prompt", schemas::message_count()),
    )
    .post(
        "/tokenize",
        tokenize::tokenize::<B>,
        calls("vLLM's: a text or a conversation as token ids", schemas::tokenize()),
    )
    .post(
        "/detokenize",
        tokenize::detokenize::<B>,
        calls("vLLM's: token ids as text", schemas::detokenize()),
    )
    .get(
        "/v1/streams/{id}",
        resume::resume::<B>,
        reads("The rest of a stream that broke off").media(EVENTS),
    )
    .post(
        "/v1/responses",
        responses::create::<B>,
        About::new(
            Purpose::Inference,
            "OpenAI's responses: stored, followed, in the background",
        )
        .example(r#"{"model": "demo", "input": "Hello"}"#)
        .media(JSON_OR_EVENTS),
    )
    .post(
        "/v1/responses/input_tokens",
        responses::input_tokens::<B>,
        About::new(Purpose::Inference, "How long a response's prompt would be")
            .example(r#"{"model": "demo", "input": "Hello"}"#),
    )
    .get(
        "/v1/responses/{id}",
        responses::retrieve::<B>,
        reads("A stored response")
            .query(&["stream", "starting_after", "include", "include_obfuscation"])
            .media(JSON_OR_EVENTS),
    )
    .delete(
        "/v1/responses/{id}",
        responses::delete::<B>,
        About::new(Purpose::Change, "Deletes a stored response"),
    )
    .post(
        "/v1/responses/{id}/cancel",
        responses::cancel::<B>,
        About::new(Purpose::Change, "Cancels a response that runs in the background"),
    )
    .get(
        "/v1/responses/{id}/input_items",
        responses::input_items::<B>,
        reads("What a response was asked").query(&["after", "limit", "order", "include"]),
    )
    .get("/v1/models", models::<B>, reads("The models served here"))
    .get("/v1/models/{*id}", model::<B>, reads("One of them"))
    .post(
        "/invocations",
        sagemaker::invocations::<B>,
        calls(
            "SageMaker's: a chat or a completion, by the body's shape",
            schemas::invocation(),
        )
        .media(JSON_OR_EVENTS),
    )
    .get("/v2", kserve::server, reads("KServe's: what this server is"))
    .get(
        "/v2/models/{model}",
        kserve::model::<B>,
        reads("KServe's: what a model is"),
    )
    .get(
        "/v2/models/{model}/ready",
        kserve::model_ready::<B>,
        reads("KServe's: can it be called?"),
    )
    .post(
        "/v2/models/{model}/generate",
        kserve::generate::whole::<B>,
        calls("KServe's: a text continued", schemas::generate()),
    )
    .post(
        "/v2/models/{model}/generate_stream",
        kserve::generate::streamed::<B>,
        calls("KServe's: the same as it comes", schemas::generate()).media(EVENTS),
    )
}

/// What operates a cluster.
fn operation<B: Backend>(api: GatewayApi<B>) -> GatewayApi<B> {
    let health = |summary| About::new(Purpose::Health, summary);
    let reads = |summary| About::new(Purpose::Read, summary);
    let changes = |summary, example| About::new(Purpose::Change, summary).example(example);
    api.get("/health", self::health, health("Is this process alive?").media(TEXT))
        .get("/ready", ready::<B>, health("Can requests be taken?").media(TEXT))
        .get("/ping", sagemaker::ping::<B>, health("SageMaker's: can requests be taken?").media(TEXT))
        .get("/v2/health/live", kserve::live, health("KServe's: is this process alive?"))
        .get("/v2/health/ready", kserve::ready::<B>, health("KServe's: can requests be taken?"))
        .get(
            "/metrics",
            metrics::<B>,
            reads("Prometheus metrics").media(&["application/openmetrics-text"]),
        )
        .get("/cluster/workers", workers::<B>, reads("The workers"))
        .post(
            "/cluster/workers/{id}/drain",
            drain::drain::<B>,
            changes("Takes a worker out of service", r#"{"deadline_ms": 60000}"#).status(202),
        )
        .get("/cluster/coordinators", coordinators::list::<B>, reads("The coordinators"))
        .post(
            "/cluster/coordinators",
            coordinators::add::<B>,
            changes(
                "Takes a coordinator in",
                r#"{"id": 4, "name": "coordinator-3", "cluster_addr": "10.0.0.4:7070", "api_url": "http://10.0.0.4:8080"}"#,
            ),
        )
        .post(
            "/cluster/coordinators/transfer",
            coordinators::transfer::<B>,
            changes("Lets another coordinator lead", r#"{"to": 2}"#),
        )
        .post(
            "/cluster/coordinators/{id}/remove",
            coordinators::remove::<B>,
            changes("Takes a coordinator out", "{}"),
        )
        .get(
            "/cluster/snapshot",
            snapshot::save::<B>,
            reads("A backup of the coordinators' state").media(&["application/octet-stream"]),
        )
}

/// Around every request, the unknown ones too.
async fn envelope<B: Backend>(State(gateway): State<Arc<Gateway<B>>>, mut request: Request, next: Next) -> Response {
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or(UNKNOWN, MatchedPath::as_str)
        .to_owned();
    let names = RequestNames::from_headers(request.headers(), &route);
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
            let request = without_body(request, gateway.config.body_timeout()).await;
            let mut response = shaped(resumable(&gateway, &names, &caller, request, next).await);
            if let (Some(accounts), Some(account)) = (&gateway.accounts, account) {
                accounts.rates.headers(&account, response.headers_mut());
            }
            response
        }
        Err(refused) => refused.into_response(),
    };
    gateway.ledger.metrics.responded(&route, response.status().as_u16());
    let dialect = Dialect::of(&route);
    response = dialect.translate(response, &names.request_id);
    let headers = response.headers_mut();
    for (name, value) in [("x-request-id", &names.shown_id), ("traceparent", &names.traceparent)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    }
    if dialect == Dialect::Anthropic
        && let Ok(value) = HeaderValue::from_str(&names.request_id)
    {
        headers.insert("request-id", value);
    }
    // Answers are JSON, text, events or, once, a page; a browser must not guess otherwise.
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A GET means nothing by its body, and no handler reads it. Left unread when the connection closes, it would make the system drop
/// what of the answer is still on its way.
async fn without_body(request: Request, patience: Duration) -> Request {
    if request.method() != Method::GET || request.body().is_end_stream() {
        return request;
    }
    let (parts, body) = request.into_parts();
    // One that is too long or does not come is no reason not to answer.
    let _ = tokio::time::timeout(patience, to_bytes(body, SMALL_BODY_BYTES_MAX)).await;
    Request::from_parts(parts, Body::empty())
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
    let calls = ["/v1/completions", "/tokenize", "/detokenize", "/invocations"];
    let generates = route.ends_with("/generate") || route.ends_with("/generate_stream");
    let kept = ["/v1/streams/", "/v1/responses", "/v1/files", "/v1/batches"];
    if OPEN_ROUTES.contains(&route) || ANY_KEY_ROUTES.contains(&route) {
        None
    } else if under("/v1/chat/")
        || under("/v1/messages")
        || kept.into_iter().any(under)
        || calls.contains(&route)
        || generates
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
