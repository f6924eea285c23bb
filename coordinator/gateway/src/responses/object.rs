//! The JSON of a response. As values rather than structs: what it repeats of the request is whatever the request said, and
//! it is written once per request, not per token.

use serde_json::{Map, Value as Json, json};

use crate::api_error::ApiError;
use crate::generation::output::TokenLogprob;
use crate::metrics::Counts;

/// What does not change of a response.
#[derive(Clone, Debug)]
pub(crate) struct Face {
    pub id: String,
    /// Seconds of Unix time.
    pub created_at: u64,
    /// What it repeats of the request.
    pub echo: Map<String, Json>,
}

/// How far a response is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Status {
    Queued,
    InProgress,
    Completed,
    /// It used up its tokens.
    Incomplete,
    Cancelled,
    Failed {
        code: &'static str,
        message: String,
    },
}

impl Status {
    pub fn word(&self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::InProgress => "in_progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Cancelled => "cancelled",
            Self::Failed { .. } => "failed",
        }
    }

    /// What a response says whose request went wrong.
    pub fn failed(error: &ApiError) -> Self {
        let code = match error.status.as_u16() {
            429 => "rate_limit_exceeded",
            400..=499 => "invalid_prompt",
            _ => "server_error",
        };
        Self::Failed {
            code,
            message: error.message.clone(),
        }
    }
}

impl Face {
    /// The response. `ended_at` in seconds of Unix time; `counts` once they are known.
    pub fn shown(&self, status: &Status, output: Vec<Json>, counts: Option<Counts>, ended_at: u64) -> Json {
        let mut fields = self.echo.clone();
        let error = match status {
            Status::Failed { code, message } => json!({"code": code, "message": message}),
            _ => Json::Null,
        };
        let incomplete = match status {
            Status::Incomplete => json!({"reason": "max_output_tokens"}),
            _ => Json::Null,
        };
        let completed_at = match status {
            Status::Completed => json!(ended_at),
            _ => Json::Null,
        };
        for (name, value) in [
            ("id", json!(self.id)),
            ("object", json!("response")),
            ("created_at", json!(self.created_at)),
            ("completed_at", completed_at),
            ("status", json!(status.word())),
            ("error", error),
            ("incomplete_details", incomplete),
            ("output", Json::Array(output)),
        ] {
            fields.insert(name.to_owned(), value);
        }
        // Where it is not known yet, it is not there: OpenAI's description has no null for it.
        if let Some(counts) = counts {
            fields.insert("usage".into(), usage(counts));
        }
        Json::Object(fields)
    }
}

/// Tokens of a request, exact. Writing a prompt into the cache is not charged here, so nothing is told of it.
fn usage(counts: Counts) -> Json {
    json!({
        "input_tokens": counts.prompt,
        "input_tokens_details": {"cached_tokens": counts.cached, "cache_write_tokens": 0},
        "output_tokens": counts.completion,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning},
        "total_tokens": counts.prompt.saturating_add(counts.completion),
    })
}

/// Log-probabilities of a text's tokens.
pub(crate) fn logprobs(positions: &[TokenLogprob]) -> Vec<Json> {
    let shown = positions.iter().map(|position| {
        let top = position
            .top
            .iter()
            .map(|(token, logprob)| json!({"token": token.text, "logprob": finite(*logprob), "bytes": token.bytes}));
        json!({"token": position.token.text, "logprob": finite(position.logprob), "bytes": position.token.bytes,
            "top_logprobs": top.collect::<Vec<_>>()})
    });
    shown.collect()
}

/// OpenAI's spelling of "as good as impossible"; JSON has no infinity.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() {
        logprob.max(-9999.0)
    } else {
        -9999.0
    }
}
