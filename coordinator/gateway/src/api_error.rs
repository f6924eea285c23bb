//! A refused or failed request in OpenAI's nested shape: `{"error":{"message","type","param","code"}}`. Messages say
//! what to change; nothing internal is told.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use baton_state::Refused;

use crate::accounts::store::StoreError;
use crate::backend::{BackendError, whole_seconds};

/// Seconds to wait before a retry, where the cluster has no better guess.
const RETRY_AFTER_S: u64 = 1;

/// An error as its client sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// The field at fault.
    pub param: Option<String>,
    pub message: String,
    pub retry_after_s: Option<u64>,
    /// Why it was refused for load, as a word for programs.
    pub reject_reason: Option<&'static str>,
    /// Clients that retry by themselves are told not to.
    pub no_retry: bool,
}

/// Header with the word that says why a request was refused for load.
pub const REJECT_REASON_HEADER: &str = "x-baton-reject-reason";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            code,
            param: None,
            message: message.into(),
            retry_after_s: None,
            reject_reason: None,
            no_retry: false,
        }
    }

    /// Any other.
    pub fn with(
        status: StatusCode,
        kind: &'static str,
        code: Option<&'static str>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(status, kind, code, message)
    }

    /// 401: a key that is known and not to be taken.
    pub fn key_refused(why: &str) -> Self {
        let message = format!("This API key {why}. Send another one.");
        Self {
            message,
            ..Self::unauthorized()
        }
    }

    /// 403: the key's scopes do not cover the route.
    pub fn missing_scope(scope: &str) -> Self {
        let message = format!("You have insufficient permissions for this operation. Missing scope: {scope}.");
        Self::new(
            StatusCode::FORBIDDEN,
            "invalid_request_error",
            Some("missing_scope"),
            message,
        )
    }

    /// 403: the key's list of models leaves this one out.
    pub fn model_forbidden(model: &str) -> Self {
        let shown: String = model.chars().take(128).collect();
        let message = format!("This API key does not have access to model `{shown}`.");
        Self {
            param: Some("model".into()),
            ..Self::new(
                StatusCode::FORBIDDEN,
                "invalid_request_error",
                Some("model_not_found"),
                message,
            )
        }
    }

    /// 429: a budget has too little left. Trying again does not help.
    pub fn insufficient_quota(message: impl Into<String>) -> Self {
        let word = "insufficient_quota";
        Self {
            no_retry: true,
            reject_reason: Some(word),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, word, Some(word), message)
        }
    }

    /// 404 for a thing of the admin API.
    pub fn no_such(what: &str, id: &str) -> Self {
        let shown: String = id.chars().take(128).collect();
        let message = format!("No such {what}: {shown}.");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("not_found"),
            message,
        )
    }

    /// 400, about the whole request.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", None, message)
    }

    /// 400, about one field.
    pub fn field(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::bad_request(message)
        }
    }

    /// 400 for a field of OpenAI's that this server does not implement, or an unknown one.
    pub fn unsupported(param: &str, message: impl Into<String>) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::field(param, message)
        }
    }

    pub fn context_length(message: impl Into<String>) -> Self {
        Self {
            code: Some("context_length_exceeded"),
            ..Self::field("messages", message)
        }
    }

    pub fn model_not_found(model: &str) -> Self {
        let shown: String = model.chars().take(128).collect();
        let message = format!("The model `{shown}` does not exist. GET /v1/models lists what is served.");
        let code = Some("model_not_found");
        Self {
            param: Some("model".into()),
            ..Self::new(StatusCode::NOT_FOUND, "invalid_request_error", code, message)
        }
    }

    pub fn worker_not_found(worker_id: &str) -> Self {
        let shown: String = worker_id.chars().take(128).collect();
        let message = format!("No worker `{shown}` is in the cluster. GET /cluster/workers lists them.");
        let code = Some("worker_not_found");
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", code, message)
    }

    pub fn unauthorized() -> Self {
        let message = "Missing or wrong API key. Send it as `Authorization: Bearer KEY`.";
        Self::new(
            StatusCode::UNAUTHORIZED,
            "invalid_request_error",
            Some("invalid_api_key"),
            message,
        )
    }

    pub fn not_found(method: &str, path: &str) -> Self {
        let shown: String = path.chars().take(256).collect();
        let message = format!("Unknown request URL: {method} {shown}. The API is described at GET /.");
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            Some("unknown_url"),
            message,
        )
    }

    pub fn method_not_allowed(method: &str, path: &str) -> Self {
        let shown: String = path.chars().take(256).collect();
        let message = format!("{method} is not allowed for {shown}; the Allow header lists what is.");
        Self::new(
            StatusCode::METHOD_NOT_ALLOWED,
            "invalid_request_error",
            Some("method_not_allowed"),
            message,
        )
    }

    pub fn media_type() -> Self {
        let message = "The body must be JSON: send the header `Content-Type: application/json`.";
        Self::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "invalid_request_error",
            Some("unsupported_media_type"),
            message,
        )
    }

    pub fn body_too_large(bytes_max: usize) -> Self {
        let message = format!("The body is larger than {bytes_max} bytes.");
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            Some("request_too_large"),
            message,
        )
    }

    pub fn body_timeout() -> Self {
        let message = "The body did not arrive in time.";
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            Some("request_timeout"),
            message,
        )
    }

    /// 429: too much at once. `word` says why to programs.
    pub fn overloaded(word: &'static str, message: impl Into<String>, retry_after_s: u64) -> Self {
        let code = Some("rate_limit_exceeded");
        let error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", code, message);
        Self {
            retry_after_s: Some(retry_after_s.max(1)),
            reject_reason: Some(word),
            ..error
        }
    }

    /// 503: nothing wrong with the request.
    pub fn unavailable(message: impl Into<String>) -> Self {
        let error = Self::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "server_error",
            Some("service_unavailable"),
            message,
        );
        Self {
            retry_after_s: Some(RETRY_AFTER_S),
            ..error
        }
    }

    /// 500: our fault. The reason goes to the log, not to the client.
    pub fn internal() -> Self {
        let message = "The server failed to process the request. The log has the details under the x-request-id.";
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "server_error",
            Some("internal_error"),
            message,
        )
    }

    /// The JSON body, also the data of an error event.
    pub fn body(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}})
    }
}

impl From<BackendError> for ApiError {
    fn from(error: BackendError) -> Self {
        match &error {
            BackendError::Overloaded { word, retry_after, .. } => {
                Self::overloaded(word, error.to_string(), whole_seconds(*retry_after))
            }
            BackendError::UnknownModel { model } => Self::model_not_found(model),
            BackendError::UnknownWorker { worker_id } => Self::worker_not_found(worker_id),
            BackendError::NoWorker { .. } => Self {
                reject_reason: Some("no_worker"),
                ..Self::unavailable(error.to_string())
            },
            BackendError::Refused { reason } => Self::new(
                StatusCode::CONFLICT,
                "invalid_request_error",
                Some("conflict"),
                reason.clone(),
            ),
            BackendError::Unavailable { .. } => Self::unavailable(error.to_string()),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let invalid = "invalid_request_error";
        match error {
            StoreError::Refused(refused) => {
                let message = format!("Refused: {refused}.");
                match refused {
                    Refused::Unknown { .. } => Self::with(StatusCode::NOT_FOUND, invalid, Some("not_found"), message),
                    Refused::Invalid(_) | Refused::BelowZero { .. } | Refused::TooMany { .. } => {
                        Self::bad_request(message)
                    }
                    _ => Self::with(StatusCode::CONFLICT, invalid, Some("conflict"), message),
                }
            }
            StoreError::Tables(error) => {
                tracing::error!(%error, "the state could not be read");
                Self::internal()
            }
            StoreError::Unavailable(reason) => Self::unavailable(format!("The coordinator is unavailable: {reason}.")),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.no_retry {
            // OpenAI's clients honour it.
            headers.insert("x-should-retry", HeaderValue::from_static("false"));
        }
        if let Some(word) = self.reject_reason {
            headers.insert(REJECT_REASON_HEADER, HeaderValue::from_static(word));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For APIs that say it in other words (`dialect`).
        response.extensions_mut().insert(self);
        response
    }
}
