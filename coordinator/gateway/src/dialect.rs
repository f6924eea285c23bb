//! Errors in the words of the API that a route belongs to. Everything inside speaks [`ApiError`], whose own JSON is OpenAI's;
//! on the way out an answer that is one is said again where clients expect another shape.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::api_error::ApiError;

/// Whose words a route speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    OpenAi,
    Anthropic,
    /// KServe's open inference protocol.
    OpenInference,
}

impl Dialect {
    /// Of a route as it is registered.
    pub fn of(route: &str) -> Self {
        if route.starts_with("/v1/messages") {
            Self::Anthropic
        } else if route == "/v2" || route.starts_with("/v2/") {
            Self::OpenInference
        } else {
            Self::OpenAi
        }
    }

    /// An answer, translated if it is an error in OpenAI's words.
    pub fn translate(self, response: Response, request_id: &str) -> Response {
        if self == Self::OpenAi {
            return response;
        }
        let Some(error) = response.extensions().get::<ApiError>() else {
            return response;
        };
        let body = match self {
            Self::Anthropic => anthropic(error, request_id),
            _ => json!({"error": error.message}),
        };
        let (mut parts, _) = response.into_parts();
        parts.headers.remove(header::CONTENT_LENGTH);
        parts
            .headers
            .insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let bytes = Json(body).into_response().into_body();
        Response::from_parts(parts, bytes)
    }
}

/// Anthropic's body of an error.
pub(crate) fn anthropic(error: &ApiError, request_id: &str) -> Value {
    let kind = match error.status {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        StatusCode::NOT_FOUND => "not_found_error",
        StatusCode::PAYLOAD_TOO_LARGE => "request_too_large",
        StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
        StatusCode::SERVICE_UNAVAILABLE => "overloaded_error",
        StatusCode::REQUEST_TIMEOUT => "timeout_error",
        status if status.is_server_error() => "api_error",
        _ => "invalid_request_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": error.message}, "request_id": request_id})
}
