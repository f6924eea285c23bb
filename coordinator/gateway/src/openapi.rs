//! The API's description: every route is registered together with what is said of it, so that neither can be without the other.
//! `GET /openapi.json` gives it to programs (OpenAPI 3.1), `GET /docs` to people, `GET /` in a few lines.
//!
//! Bodies of inference requests are described field by field ([`schemas`]), from the same lists of fields by which they are
//! checked; bodies of administration by an example. Statuses are those of every kind of route ([`Purpose`]).

mod page;
pub(crate) mod schemas;

use std::sync::Arc;

use axum::extract::Extension;
use axum::handler::Handler;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, on};
use axum::{Router, body::Bytes};
use serde_json::{Map, Value as Json, json};

/// What a route is for: decides which answers it may give beside its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Open without a key, and says yes or no.
    Health,
    /// Calls a model, or its tokenizer.
    Inference,
    /// Tells what is.
    Read,
    /// Changes something.
    Change,
}

impl Purpose {
    fn tag(self) -> &'static str {
        match self {
            Self::Health => "health",
            Self::Inference => "inference",
            Self::Read => "reading",
            Self::Change => "administration",
        }
    }

    /// Statuses of refusals and failures.
    fn errors(self) -> &'static [u16] {
        match self {
            Self::Health => &[503],
            Self::Inference => &[400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503],
            Self::Read => &[400, 401, 403, 404, 500, 503],
            Self::Change => &[400, 401, 403, 404, 408, 409, 413, 415, 422, 500, 503],
        }
    }
}

/// What is said of a route.
#[derive(Clone, Debug)]
pub(crate) struct About {
    purpose: Purpose,
    summary: &'static str,
    /// Schema of the body.
    body: Option<Json>,
    /// Query parameters, each text.
    query: &'static [&'static str],
    status: u16,
    media: &'static [&'static str],
}

impl About {
    /// A route that answers 200 with JSON.
    pub fn new(purpose: Purpose, summary: &'static str) -> Self {
        Self {
            purpose,
            summary,
            body: None,
            query: &[],
            status: 200,
            media: &["application/json"],
        }
    }

    /// Takes a body of that schema.
    pub fn body(self, schema: Json) -> Self {
        Self {
            body: Some(schema),
            ..self
        }
    }

    /// Takes a JSON object such as this one.
    pub fn example(self, example: &str) -> Self {
        let example: Json = serde_json::from_str(example).unwrap_or_default();
        self.body(json!({"type": "object", "examples": [example]}))
    }

    /// Takes query parameters.
    pub fn query(self, query: &'static [&'static str]) -> Self {
        Self { query, ..self }
    }

    /// Answers with this status.
    pub fn status(self, status: u16) -> Self {
        Self { status, ..self }
    }

    /// Answers in these media types.
    pub fn media(self, media: &'static [&'static str]) -> Self {
        Self { media, ..self }
    }
}

/// JSON, or events if `stream` is set.
pub(crate) const JSON_OR_EVENTS: &[&str] = &["application/json", "text/event-stream"];
/// Events.
pub(crate) const EVENTS: &[&str] = &["text/event-stream"];
/// Text for people or scrapers.
pub(crate) const TEXT: &[&str] = &["text/plain"];

struct Operation {
    method: &'static str,
    /// As the router has it.
    route: &'static str,
    about: About,
}

/// Routes, each with its description.
pub(crate) struct Api<S> {
    router: Router<S>,
    operations: Vec<Operation>,
}

impl<S: Clone + Send + Sync + 'static> Api<S> {
    pub fn new() -> Self {
        Self {
            router: Router::new(),
            operations: Vec::new(),
        }
    }

    /// Registers a route to be read.
    pub fn get<H, T>(self, route: &'static str, handler: H, about: About) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.on(MethodFilter::GET, "get", route, handler, about)
    }

    /// Registers a route to be posted to.
    pub fn post<H, T>(self, route: &'static str, handler: H, about: About) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.on(MethodFilter::POST, "post", route, handler, about)
    }

    /// Registers a route whose things can be deleted.
    pub fn delete<H, T>(self, route: &'static str, handler: H, about: About) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.on(MethodFilter::DELETE, "delete", route, handler, about)
    }

    fn on<H, T>(
        mut self,
        filter: MethodFilter,
        method: &'static str,
        route: &'static str,
        handler: H,
        about: About,
    ) -> Self
    where
        H: Handler<T, S>,
        T: 'static,
    {
        self.operations.push(Operation { method, route, about });
        Self {
            router: self.router.route(route, on(filter, handler)),
            operations: self.operations,
        }
    }

    /// The router, which also serves the description.
    pub fn into_router(self) -> Router<S> {
        let of = |summary, media| About::new(Purpose::Read, summary).media(media);
        let described = self
            .get("/", index, of("The routes in a few lines", TEXT))
            .get(
                "/openapi.json",
                document,
                of("This description, for programs", &["application/json"]),
            )
            .get("/docs", page, of("This description, for people", &["text/html"]));
        let document = describe(&described.operations);
        let description = Description {
            index: lines(&described.operations).into(),
            page: page::render(&document).into(),
            document: document.to_string().into(),
        };
        described.router.layer(Extension(Arc::new(description)))
    }
}

/// All three forms, made once.
struct Description {
    index: Bytes,
    document: Bytes,
    page: Bytes,
}

type Described = Extension<Arc<Description>>;

fn sent(kind: &'static str, body: Bytes) -> Response {
    ([(header::CONTENT_TYPE, HeaderValue::from_static(kind))], body).into_response()
}

async fn index(Extension(description): Described) -> Response {
    sent("text/plain; charset=utf-8", description.index.clone())
}

async fn document(Extension(description): Described) -> Response {
    sent("application/json", description.document.clone())
}

async fn page(Extension(description): Described) -> Response {
    let mut response = sent("text/html; charset=utf-8", description.page.clone());
    // The page has no scripts and fetches nothing.
    let policy = HeaderValue::from_static("default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, policy);
    response
}

fn lines(operations: &[Operation]) -> String {
    let mut text = String::from(
        "baton: an OpenAI-compatible API. GET /docs shows the fields, GET /openapi.json is for programs.\n\n",
    );
    for Operation { method, route, about } in operations {
        text += &format!("{:<6} {:<60} {}\n", method.to_uppercase(), shown(route), about.summary);
    }
    text
}

/// A route as OpenAPI spells it: `{*id}` is `{id}`.
fn shown(route: &str) -> String {
    route.replace("{*", "{")
}

fn describe(operations: &[Operation]) -> Json {
    let mut paths = Map::new();
    for operation in operations {
        let path = paths.entry(shown(operation.route)).or_insert_with(|| json!({}));
        path[operation.method] = self::operation(operation);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "baton",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "An LLM inference cluster. Fields that are not listed are refused by name.",
            "license": {"name": "MIT OR Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
            "schemas": {"Error": schemas::error()},
        },
        "security": [{}, {"bearer": []}, {"key": []}],
    })
}

fn operation(Operation { route, about, .. }: &Operation) -> Json {
    let mut parameters: Vec<Json> = Vec::new();
    let names = route.split('{').skip(1).filter_map(|rest| rest.split_once('}'));
    for (name, _) in names {
        let name = name.trim_start_matches('*');
        parameters
            .push(json!({"name": name, "in": "path", "required": true, "schema": {"type": "string", "minLength": 1}}));
    }
    let query = about.query.iter();
    parameters.extend(query.map(|name| json!({"name": name, "in": "query", "schema": {"type": "string"}})));
    let mut responses = Map::new();
    let content = about.media.iter().map(|media| ((*media).to_owned(), json!({})));
    let content: Map<String, Json> = content.collect();
    responses.insert(
        about.status.to_string(),
        json!({"description": "It worked.", "content": content}),
    );
    for status in about.purpose.errors() {
        let schema = json!({"$ref": "#/components/schemas/Error"});
        let error = json!({"description": meaning(*status), "content": {"application/json": {"schema": schema}}});
        responses.insert(status.to_string(), error);
    }
    let mut operation = json!({"summary": about.summary, "tags": [about.purpose.tag()], "responses": responses});
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(schema) = &about.body {
        operation["requestBody"] = json!({"required": true, "content": {"application/json": {"schema": schema}}});
    }
    operation
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request is wrong; the message says how, and `param` where.",
        401 => "No key, or one that is not known.",
        403 => "The key may not do this.",
        404 => "There is no such thing.",
        408 => "The body did not arrive in time.",
        409 => "It contradicts what is there.",
        413 => "The body is too large.",
        415 => "The body is not declared as JSON.",
        422 => "The body is JSON of another shape.",
        429 => "Too much at once, or the budget is used up; see `retry-after` and `x-baton-reject-reason`.",
        503 => "It cannot be served now; see `retry-after`.",
        _ => "The server failed; its log has the details under the `x-request-id`.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn handler() {}

    #[test]
    fn a_route_is_described_with_its_parameters_and_answers() {
        let about = About::new(Purpose::Change, "does something")
            .query(&["limit"])
            .status(202)
            .example(r#"{"a": 1}"#);
        let api = Api::<()>::new().post("/things/{*id}", handler, about);
        let document = describe(&api.operations);
        let operation = &document["paths"]["/things/{id}"]["post"];
        assert_eq!(operation["parameters"][0]["name"], "id");
        assert_eq!(operation["parameters"][1]["in"], "query");
        assert!(operation["responses"]["202"].is_object() && operation["responses"]["409"].is_object());
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
        assert_eq!(schema["examples"], json!([{"a": 1}]));
        assert!(page::render(&document).contains("/things/{id}"));
        assert!(lines(&api.operations).contains("POST   /things/{id}"));
    }

    /// Only what goes through [`Api`] is described.
    #[test]
    fn no_route_goes_around_the_description() {
        for (name, source) in [
            ("routes.rs", include_str!("routes.rs")),
            ("organization.rs", include_str!("organization.rs")),
        ] {
            assert!(
                !source.contains(".route("),
                "{name} registers a route without a description; use Api"
            );
        }
    }
}
