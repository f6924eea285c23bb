//! Names of a request: the ledger's id, the client's own id, and the W3C trace context. Spans are recorded elsewhere.

use axum::http::HeaderMap;
use uuid::Uuid;

/// Longest client-chosen `x-request-id` that is echoed; longer or odd ones are replaced.
const CLIENT_ID_CHARS_MAX: usize = 128;

/// A request's names.
#[derive(Clone, Debug)]
pub(crate) struct RequestNames {
    /// Unique id in the ledger and of the completion. Never the client's: an id reused by a client must not make the
    /// ledger take two requests for one.
    pub request_id: String,
    /// Echoed as `x-request-id`: the client's if it sent a sane one, else ours.
    pub shown_id: String,
    /// Our span in the client's trace, or in a new one.
    pub traceparent: String,
}

impl RequestNames {
    /// `route` tells how the id begins, which clients of the endpoint look at.
    pub fn from_headers(headers: &HeaderMap, route: &str) -> Self {
        let prefix = match route {
            "/v1/completions" => "cmpl-",
            "/v1/messages" => "msg_",
            _ => "chatcmpl-",
        };
        let request_id = format!("{prefix}{}", Uuid::now_v7().simple());
        let shown_id = headers
            .get("x-request-id")
            .and_then(|value| value.to_str().ok())
            .filter(|id| is_sane(id))
            .map_or_else(|| request_id.clone(), str::to_owned);
        let parent = headers
            .get("traceparent")
            .and_then(|value| value.to_str().ok())
            .and_then(parse_traceparent);
        let span = Uuid::new_v4().as_u64_pair().0;
        let traceparent = match parent {
            Some((trace_id, flags)) => format!("00-{trace_id}-{span:016x}-{flags}"),
            None => format!("00-{}-{span:016x}-01", Uuid::new_v4().simple()),
        };
        Self {
            request_id,
            shown_id,
            traceparent,
        }
    }
}

/// A random sampling seed.
pub(crate) fn random_seed() -> u64 {
    // A v4 UUID has six fixed bits; folding its halves leaves 64 random ones.
    let (high, low) = Uuid::new_v4().as_u64_pair();
    high ^ low.rotate_left(32)
}

fn is_sane(id: &str) -> bool {
    (1..=CLIENT_ID_CHARS_MAX).contains(&id.len())
        && id
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte))
}

/// Trace id and flags of a valid `traceparent`.
fn parse_traceparent(value: &str) -> Option<(&str, &str)> {
    let mut parts = value.trim().split('-');
    let (version, trace_id, span_id, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |part: &str, len: usize| {
        part.len() == len
            && part
                .bytes()
                .all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let valid = hex(version, 2) && version != "ff" && (version != "00" || parts.next().is_none());
    let ids_valid = hex(trace_id, 32) && hex(span_id, 16) && hex(flags, 2);
    let non_zero = |id: &str| id.bytes().any(|byte| byte != b'0');
    (valid && ids_valid && non_zero(trace_id) && non_zero(span_id)).then_some((trace_id, flags))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(pairs: &[(&'static str, &'static str)]) -> RequestNames {
        let headers = pairs
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        RequestNames::from_headers(&headers, "/v1/chat/completions")
    }

    #[test]
    fn the_trace_is_continued_with_a_new_span() {
        let trace_id = "4bf92f3577b34da6a3ce929d0e0e4736";
        let taken = names(&[("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00")]).traceparent;
        assert!(
            taken.starts_with(&format!("00-{trace_id}-")) && taken.ends_with("-00"),
            "{taken}"
        );
        assert!(!taken.contains("00f067aa0ba902b7"));
        for bad in [
            "",
            "00-0-0-01",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
        ] {
            let fresh = names(&[("traceparent", bad)]).traceparent;
            assert!(
                parse_traceparent(&fresh).is_some() && !fresh.contains(trace_id),
                "{fresh}"
            );
        }
    }

    #[test]
    fn a_client_id_is_echoed_only_if_sane_and_never_in_the_ledger() {
        let named = names(&[("x-request-id", "job-17")]);
        assert_eq!(named.shown_id, "job-17");
        assert!(named.request_id.starts_with("chatcmpl-"));
        assert_eq!(names(&[("x-request-id", "a b")]).shown_id.len(), named.request_id.len());
    }
}
