//! The API key check: constant in time, on hashes, so that neither the key nor its length leaks through timing. One
//! key for now; it does not tell tenants apart.

use axum::http::{HeaderMap, header};
use subtle::ConstantTimeEq;

/// The hash of the one accepted key.
#[derive(Clone)]
pub(crate) struct KeyCheck([u8; 32]);

impl KeyCheck {
    pub fn new(key: &str) -> Self {
        Self(*blake3::hash(key.as_bytes()).as_bytes())
    }

    /// True if the request carries the key.
    pub fn allows(&self, headers: &HeaderMap) -> bool {
        let Some(token) = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| bearer(value.as_bytes()))
        else {
            return false;
        };
        blake3::hash(token).as_bytes().ct_eq(&self.0).into()
    }
}

/// The token of a `Bearer` header; the scheme's case does not matter (RFC 9110).
fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, token) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"Bearer ").then(|| token.trim_ascii())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_the_key_and_nothing_else() {
        let check = KeyCheck::new("sk-0123456789abcdef");
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            check.allows(&headers)
        };
        assert!(with("Bearer sk-0123456789abcdef"));
        assert!(with("bearer  sk-0123456789abcdef "));
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer sk-0123456789abcdeF",
            "Basic sk-0123456789abcdef",
            "sk-0123456789abcdef",
        ] {
            assert!(!with(wrong), "{wrong}");
        }
        assert!(!check.allows(&HeaderMap::new()));
    }
}
