//! The latencies a client wants, from its headers. They are headers and not fields of the body because OpenAI's clients let
//! anyone add headers, and because they say nothing about the answer.

use std::time::Duration;

use axum::http::HeaderMap;

use crate::api_error::ApiError;
use crate::backend::LatencyTargets;

/// Longest time to the first token that is wanted, in milliseconds.
pub const TTFT_TARGET_HEADER: &str = "x-baton-ttft-target-ms";
/// Longest time between two tokens that is wanted, in milliseconds.
pub const ITL_TARGET_HEADER: &str = "x-baton-itl-target-ms";
/// An hour: beyond it a target is none.
const TARGET_MS_MAX: u64 = 3_600_000;

/// Reads both headers; an odd value is an error rather than no target.
pub(crate) fn targets(headers: &HeaderMap) -> Result<LatencyTargets, ApiError> {
    Ok(LatencyTargets {
        ttft: target(headers, TTFT_TARGET_HEADER)?,
        itl: target(headers, ITL_TARGET_HEADER)?,
    })
}

fn target(headers: &HeaderMap, name: &'static str) -> Result<Option<Duration>, ApiError> {
    let Some(value) = headers.get(name) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|text| text.trim().parse::<u64>().ok());
    match parsed.filter(|target_ms| (1..=TARGET_MS_MAX).contains(target_ms)) {
        Some(target_ms) => Ok(Some(Duration::from_millis(target_ms))),
        None => Err(ApiError::field(
            name,
            format!("The header `{name}` must be a whole number of milliseconds from 1 to {TARGET_MS_MAX}."),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn milliseconds_or_an_error_that_names_the_header() {
        let with = |value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(TTFT_TARGET_HEADER, value.parse().unwrap());
            targets(&headers)
        };
        assert_eq!(targets(&HeaderMap::new()).unwrap(), LatencyTargets::default());
        assert_eq!(with(" 250 ").unwrap().ttft, Some(Duration::from_millis(250)));
        for bad in ["", "0", "-1", "1.5", "250ms", "3600001", "99999999999999999999"] {
            let error = with(bad).expect_err(bad);
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some(TTFT_TARGET_HEADER))
            );
        }
    }
}
