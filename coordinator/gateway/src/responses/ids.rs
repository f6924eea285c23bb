//! Names of responses and of their items. An item's name is made of its response's, so that an answer that is computed
//! again has the same names.

use crate::trace::RequestNames;

/// What a response's id begins with.
const PREFIX: &str = "resp_";

/// Names the request of a response in the ledger as the response is named.
pub(crate) fn rename(mut names: RequestNames) -> RequestNames {
    let hex = names.request_id.rsplit(['-', '_']).next().unwrap_or_default();
    names.request_id = format!("{PREFIX}{hex}");
    names
}

/// Whether it can be the name of a response: nothing else is looked up, least of all in the keys of a table.
pub(crate) fn is_response(id: &str) -> bool {
    id.strip_prefix(PREFIX)
        .is_some_and(|rest| rest.len() == 32 && rest.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

/// The name of an item of a response: `msg_<response><i|o><number>`, `i` for its input.
pub(crate) fn item(kind: &str, response_id: &str, side: char, number: usize) -> String {
    let hex = response_id.strip_prefix(PREFIX).unwrap_or(response_id);
    format!("{kind}_{hex}{side}{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_made_of_the_request() {
        let names = rename(RequestNames::from_headers(
            &axum::http::HeaderMap::new(),
            "/v1/responses",
        ));
        assert!(is_response(&names.request_id), "{}", names.request_id);
        assert!(item("msg", &names.request_id, 'o', 3).ends_with("o3"));
        for wrong in [
            "",
            "resp_",
            "resp_zz",
            "resp_0123",
            "file-0123",
            "resp_0123456789abcdef0123456789abcdef.open",
        ] {
            assert!(!is_response(wrong), "{wrong}");
        }
    }
}
