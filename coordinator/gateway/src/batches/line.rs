//! One line: a request of the batch's creator to one of the gateway's own routes, without a socket. It passes everything that
//! a request from outside passes, as the creator is now: a key that was revoked, a budget that is spent, a model that the key
//! may not call make an error line.
//!
//! The request has an idempotency key made of the batch and the line's number. A line that is run again, because the member
//! that ran it died before its result was told, has the same seed and so the same tokens, and is settled as the row that
//! stands: one line, one charge.

use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderValue, Method, Request, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;
use tower::ServiceExt;

use super::{input, output};
use crate::accounts::idempotency::IDEMPOTENCY_KEY_HEADER;
use crate::api_error::ApiError;
use crate::auth::Caller;

/// Bytes of one answer, so that what gathers of a batch's results stays below a chunk: half a million tokens of text.
const ANSWER_BYTES_MAX: usize = 2 << 20;
/// Tries of a line that the server itself fails at.
const FAILED_TRIES_MAX: u32 = 3;
/// Pause before a line is tried again where the answer names none.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Put on a request by the gateway itself: who calls, and that it comes from a batch. Nothing from outside can carry it.
#[derive(Clone)]
pub(crate) struct Internal(pub Caller);

/// A line to run.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// From 0.
    pub index: u32,
    pub text: Bytes,
    pub failures: u32,
}

/// Tokens of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tokens {
    pub input: u64,
    pub cached: u64,
    pub output: u64,
    pub reasoning: u64,
}

/// What became of a line.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It is done.
    Done(Done),
    /// The cluster has no room; the line is as if it had not been run.
    Again(Job, Duration),
}

/// The result of a line.
#[derive(Debug)]
pub(super) struct Done {
    pub index: u32,
    pub completed: bool,
    pub line: Value,
    pub tokens: Tokens,
}

/// The id of a line's result: the same whoever runs it.
pub(super) fn result_id(batch_id: &str, index: u32) -> String {
    let hash = blake3::hash(format!("{batch_id}/{index}").as_bytes());
    format!("batch_req_{}", &hash.to_hex()[..32])
}

/// Runs a line as `caller`.
pub(super) async fn run(
    router: Router,
    caller: Result<Caller, ApiError>,
    batch_id: String,
    endpoint: String,
    mut job: Job,
) -> Outcome {
    let id = result_id(&batch_id, job.index);
    let Some(request) = input::request(&job.text) else {
        // It was valid before.
        return failed(
            job.index,
            output::unanswered(&id, "", "invalid_json_line", "This line cannot be read."),
        );
    };
    let custom_id = request.custom_id.unwrap_or_default();
    let answered = |status: StatusCode, request_id: &str, body: &Value| {
        output::answered(&id, &custom_id, status.as_u16(), request_id, body)
    };
    let caller = match caller {
        Ok(caller) => caller,
        Err(refused) => return failed(job.index, answered(refused.status, "", &refused.body())),
    };
    let body = Bytes::copy_from_slice(request.body.map(|body| body.get()).unwrap_or_default().as_bytes());
    let key = format!("{batch_id}/{}", job.index);
    let Some(request) = http_request(&endpoint, &key, body, caller) else {
        return failed(
            job.index,
            output::unanswered(&id, &custom_id, "internal_error", "The request cannot be made."),
        );
    };
    let response = match router.oneshot(request).await {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let status = response.status();
    match again(&response) {
        Some(Again::Load(after)) => return Outcome::Again(job, after),
        Some(Again::Failure(after)) if job.failures + 1 < FAILED_TRIES_MAX => {
            job.failures += 1;
            return Outcome::Again(job, after);
        }
        _ => {}
    }
    let request_id = response
        .headers()
        .get("x-request-id")
        .and_then(|id| id.to_str().ok())
        .unwrap_or_default()
        .to_owned();
    let body = match Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let message = format!("The answer has more than {ANSWER_BYTES_MAX} bytes.");
            return failed(
                job.index,
                output::unanswered(&id, &custom_id, "response_too_large", &message),
            );
        }
        Err(_) => return Outcome::Again(job, RETRY_AFTER),
    };
    let body: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let line = answered(status, &request_id, &body);
    if !status.is_success() {
        return failed(job.index, line);
    }
    Outcome::Done(Done {
        index: job.index,
        completed: true,
        line,
        tokens: tokens(&body),
    })
}

fn failed(index: u32, line: Value) -> Outcome {
    Outcome::Done(Done {
        index,
        completed: false,
        line,
        tokens: Tokens::default(),
    })
}

fn http_request(endpoint: &str, key: &str, body: Bytes, caller: Caller) -> Option<Request<Body>> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(endpoint)
        .header(header::CONTENT_TYPE, "application/json")
        .header(header::CONTENT_LENGTH, HeaderValue::from(body.len()))
        .header(IDEMPOTENCY_KEY_HEADER, key)
        .body(Body::from(body))
        .ok()?;
    request.extensions_mut().insert(Internal(caller));
    Some(request)
}

enum Again {
    /// There is no room; as often as it takes.
    Load(Duration),
    /// The server failed, which the line itself may be the cause of.
    Failure(Duration),
}

/// Whether an answer is about the moment, not about the request.
fn again(response: &Response) -> Option<Again> {
    let headers = response.headers();
    let after = headers
        .get(header::RETRY_AFTER)
        .and_then(|seconds| seconds.to_str().ok()?.parse().ok())
        .map_or(RETRY_AFTER, Duration::from_secs);
    let final_word = headers.get("x-should-retry").is_some_and(|word| word == "false");
    match response.status() {
        _ if final_word => None,
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => Some(Again::Load(after)),
        // The life before this one still settles it; another use of a key is not possible here.
        StatusCode::CONFLICT => Some(Again::Load(after)),
        status if status.is_server_error() => Some(Again::Failure(after)),
        _ => None,
    }
}

/// From the answer's `usage`, in either of OpenAI's spellings.
fn tokens(body: &Value) -> Tokens {
    let usage = &body["usage"];
    let count = |paths: [&str; 2]| paths.iter().find_map(|path| usage.pointer(path)?.as_u64()).unwrap_or(0);
    Tokens {
        input: count(["/prompt_tokens", "/input_tokens"]),
        cached: count([
            "/prompt_tokens_details/cached_tokens",
            "/input_tokens_details/cached_tokens",
        ]),
        output: count(["/completion_tokens", "/output_tokens"]),
        reasoning: count([
            "/completion_tokens_details/reasoning_tokens",
            "/output_tokens_details/reasoning_tokens",
        ]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::response::IntoResponse;

    #[test]
    fn what_is_tried_again() {
        let load = |error: ApiError| matches!(again(&error.into_response()), Some(Again::Load(_)));
        assert!(load(ApiError::overloaded("queue_full", "full", 7)));
        assert!(load(ApiError::unavailable("no worker")));
        assert!(!load(ApiError::insufficient_quota("spent")));
        assert!(!load(ApiError::bad_request("wrong")));
        assert!(!load(ApiError::unauthorized()));
        assert!(matches!(
            again(&ApiError::internal().into_response()),
            Some(Again::Failure(_))
        ));
        let after = again(&ApiError::overloaded("queue_full", "full", 7).into_response());
        assert!(matches!(after, Some(Again::Load(after)) if after == Duration::from_secs(7)));
    }

    #[test]
    fn ids_are_those_of_the_line() {
        assert_eq!(result_id("batch_a", 1), result_id("batch_a", 1));
        assert_ne!(result_id("batch_a", 1), result_id("batch_a", 11));
        assert_ne!(result_id("batch_a", 1), result_id("batch_b", 1));
    }

    #[test]
    fn usage_is_read_in_both_spellings() {
        let chat = serde_json::json!({"usage": {"prompt_tokens": 5, "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 2}}});
        let responses = serde_json::json!({"usage": {"input_tokens": 5, "output_tokens": 3,
            "input_tokens_details": {"cached_tokens": 2}}});
        let expected = Tokens {
            input: 5,
            cached: 2,
            output: 3,
            reasoning: 0,
        };
        assert_eq!((tokens(&chat), tokens(&responses)), (expected, expected));
        assert_eq!(tokens(&Value::Null), Tokens::default());
    }
}
