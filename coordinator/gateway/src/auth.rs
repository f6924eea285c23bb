//! The API key check: constant in time, on hashes, so that neither the key nor its length leaks through timing. A key tells
//! which tenant calls: whose share a request counts against, and whose prefix cache it may find.

use std::sync::Arc;

use axum::http::{HeaderMap, header};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::config::GatewayConfig;

/// Whose requests are those with the one `api_key`, or without a key where none is needed.
pub const DEFAULT_TENANT: &str = "default";

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    pub tenant: Arc<str>,
}

impl Caller {
    pub fn anonymous() -> Self {
        Self {
            tenant: DEFAULT_TENANT.into(),
        }
    }

    /// Separates the tenant's prefix cache from those of others.
    pub fn cache_salt(&self) -> Vec<u8> {
        if self.tenant.as_ref() == DEFAULT_TENANT {
            return Vec::new();
        }
        self.tenant.as_bytes().to_vec()
    }
}

/// The hashes of the accepted keys, each with its tenant.
#[derive(Clone)]
pub(crate) struct Keys(Vec<([u8; 32], Caller)>);

impl Keys {
    /// `None` if no key is configured.
    pub fn new(config: &GatewayConfig) -> Option<Self> {
        let single = config.api_key.iter().map(|key| (key, Caller::anonymous()));
        let tenants = config.tenants.iter().map(|tenant| {
            let caller = Caller {
                tenant: tenant.name.as_str().into(),
            };
            (&tenant.api_key, caller)
        });
        let keys: Vec<_> = single
            .chain(tenants)
            .map(|(key, caller)| (*blake3::hash(key.as_bytes()).as_bytes(), caller))
            .collect();
        (!keys.is_empty()).then_some(Self(keys))
    }

    /// Whose key the request carries. Looks at every key, whichever it is.
    pub fn caller(&self, headers: &HeaderMap) -> Option<Caller> {
        let token = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| bearer(value.as_bytes()))?;
        let hash = blake3::hash(token);
        let (mut found, mut at) = (Choice::from(0), 0u32);
        for (index, (key, _)) in self.0.iter().enumerate() {
            let same = hash.as_bytes().ct_eq(key);
            at.conditional_assign(&(index as u32), same);
            found |= same;
        }
        if !bool::from(found) {
            return None;
        }
        self.0.get(at as usize).map(|(_, caller)| caller.clone())
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
    use crate::config::TenantConfig;

    fn tenant(name: &str, key: &str) -> TenantConfig {
        TenantConfig {
            name: name.into(),
            api_key: key.into(),
            weight: 1,
            priority_min: 0,
        }
    }

    #[test]
    fn takes_the_keys_and_nothing_else() {
        assert!(Keys::new(&GatewayConfig::default()).is_none());
        let keys = Keys::new(&GatewayConfig {
            api_key: Some("sk-0123456789abcdef".into()),
            tenants: vec![tenant("a", "sk-aaaaaaaaaaaaaaaa"), tenant("b", "sk-bbbbbbbbbbbbbbbb")],
            ..GatewayConfig::default()
        })
        .unwrap();
        let with = |value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::AUTHORIZATION, value.parse().unwrap());
            keys.caller(&headers).map(|caller| caller.tenant.to_string())
        };
        assert_eq!(with("Bearer sk-0123456789abcdef").as_deref(), Some(DEFAULT_TENANT));
        assert_eq!(with("bearer  sk-0123456789abcdef ").as_deref(), Some(DEFAULT_TENANT));
        assert_eq!(with("Bearer sk-aaaaaaaaaaaaaaaa").as_deref(), Some("a"));
        assert_eq!(with("Bearer sk-bbbbbbbbbbbbbbbb").as_deref(), Some("b"));
        for wrong in [
            "",
            "Bearer",
            "Bearer ",
            "Bearer sk-0123456789abcdeF",
            "Basic sk-0123456789abcdef",
            "sk-0123456789abcdef",
        ] {
            assert_eq!(with(wrong), None, "{wrong}");
        }
        assert!(keys.caller(&HeaderMap::new()).is_none());
    }

    #[test]
    fn tenants_do_not_share_a_cache() {
        let salt = |name: &str| Caller { tenant: name.into() }.cache_salt();
        assert_ne!(salt("a"), salt("b"));
        assert_eq!(Caller::anonymous().cache_salt(), b"");
    }
}
