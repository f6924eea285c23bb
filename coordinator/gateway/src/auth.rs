//! Who calls: from the `Authorization` header to a [`Caller`]. Keys come from the configuration, which are few and compared in
//! constant time, by hash; and from the replicated state ([`accounts::keys`](crate::accounts::keys)).
//!
//! Without a configured key, and as long as nobody has made a key for administration, whoever reaches the server may use
//! it: it is then bound to loopback only. A key of the state counts there too, so that its limits and budgets can be tried;
//! one that was revoked is refused.

use std::sync::Arc;

use axum::http::{HeaderMap, header};
use baton_proto::state::Scope;
use baton_state::view;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use crate::accounts::Accounts;
use crate::accounts::keys::{Account, Presented, sha256};
use crate::accounts::store::StoreError;
use crate::api_error::ApiError;
use crate::backend::Share;
use crate::config::{GatewayConfig, TenantConfig};

/// Whose requests are those with the one `api_key`, or without a key where none is needed.
pub const DEFAULT_TENANT: &str = "default";

/// The actor of the audit log, where no key of the state is known.
const OPERATOR: &str = "operator";

/// What a caller may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Scopes(u8);

impl Scopes {
    /// Call models.
    pub const INFERENCE: Self = Self(1);
    /// Read usage, costs and the ledger.
    pub const USAGE: Self = Self(2);
    /// Keys, projects, prices, budgets, corrections.
    pub const ADMIN: Self = Self(4);
    /// Metrics, workers, coordinators.
    pub const CLUSTER: Self = Self(8);
    const ALL: Self = Self(15);
    /// What a route needs that nobody has thought about: everything.
    pub const UNNAMED: Self = Self::ALL;

    const fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `needed` are there.
    pub const fn hold(self, needed: Self) -> bool {
        self.0 & needed.0 == needed.0
    }

    /// For messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::INFERENCE => "inference",
            Self::USAGE => "usage",
            _ => "admin",
        }
    }

    /// Of a key of the state. Who may change everything may read everything; calling models is another thing.
    fn of(account: &Account) -> Self {
        account.key.scopes().fold(Self::default(), |all, scope| match scope {
            Scope::Inference => all.and(Self::INFERENCE),
            Scope::Usage => all.and(Self::USAGE),
            Scope::Admin => all.and(Self::ADMIN).and(Self::USAGE).and(Self::CLUSTER),
            Scope::Unspecified => all,
        })
    }
}

/// Who calls.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// A configured tenant's name, or a project's id: for metrics.
    pub tenant: Arc<str>,
    /// What its requests count against: a tenant's share, or that of a key of the state.
    pub share: Share,
    pub scopes: Scopes,
    /// Names the key in records: the id of one of the state, "operator" or "tenant NAME" for configured ones, else empty.
    pub key_id: Arc<str>,
    /// Of a key of the state.
    pub account: Option<Arc<Account>>,
    /// Sets its prefix cache apart.
    salt: Arc<str>,
    /// It is a line of a batch.
    batch: bool,
}

/// The tier of requests that are answered while their client waits, and of those of batches.
const SERVICE_TIERS: [&str; 2] = ["default", "batch"];
/// Below every other request, in the coordinator's queue and on the workers: the least priority that counts there.
const BATCH_PRIORITY: i32 = -100;

impl Caller {
    /// Whoever reaches an open server.
    pub fn anonymous() -> Self {
        Self {
            tenant: DEFAULT_TENANT.into(),
            share: Share::usual(DEFAULT_TENANT),
            scopes: Scopes::ALL,
            key_id: "".into(),
            account: None,
            salt: "".into(),
            batch: false,
        }
    }

    fn operator() -> Self {
        Self {
            key_id: OPERATOR.into(),
            ..Self::anonymous()
        }
    }

    fn tenant(config: &TenantConfig) -> Self {
        let name = config.name.as_str();
        Self {
            tenant: name.into(),
            share: Share {
                name: name.into(),
                weight: config.weight,
                priority_min: config.priority_min,
            },
            scopes: Scopes::INFERENCE.and(Scopes::CLUSTER),
            key_id: format!("tenant {name}").into(),
            account: None,
            salt: name.into(),
            batch: false,
        }
    }

    fn of(account: Arc<Account>) -> Self {
        let key = &account.key;
        Self {
            tenant: account.project.id.as_str().into(),
            share: Share {
                name: key.id.as_str().into(),
                // 0 where a key was made without one.
                weight: key.weight.clamp(1, Share::WEIGHT_MAX),
                priority_min: key.priority_min,
            },
            scopes: Scopes::of(&account),
            key_id: account.key.id.as_str().into(),
            // No tenant's name has a space.
            salt: format!("project {}", account.project.id).into(),
            account: Some(account),
            batch: false,
        }
    }

    /// Separates the tenant's prefix cache from those of others.
    pub fn cache_salt(&self) -> Vec<u8> {
        self.salt.as_bytes().to_vec()
    }

    /// Who changes something, for the audit log.
    pub fn actor(&self) -> &str {
        if self.key_id.is_empty() { OPERATOR } else { &self.key_id }
    }

    /// Whose files and batches it sees: all of its project, or of its configured tenant.
    pub fn owner(&self) -> String {
        match &self.account {
            Some(account) => format!("project {}", account.project.id),
            None => format!("tenant {}", self.tenant),
        }
    }

    /// The same caller for the lines of its batch: behind everybody else, with a share of its own, so that a project's batches
    /// take nothing from its other requests.
    fn for_batch(mut self) -> Self {
        self.tenant = format!("batch {}", self.tenant).into();
        self.batch = true;
        self
    }

    /// The tier that its requests are billed by.
    pub fn service_tier(&self) -> &'static str {
        SERVICE_TIERS[usize::from(self.batch)]
    }

    /// The priority of a request that asks for `asked`; higher goes first.
    pub fn priority(&self, asked: i32) -> i32 {
        if self.batch { BATCH_PRIORITY } else { asked }
    }

    /// Whether it may call a model; what others may not is not shown to it either.
    pub fn allows(&self, model: &str) -> bool {
        self.account.as_ref().is_none_or(|account| account.allows(model))
    }
}

/// Who sends a request. `keys` are the configured ones.
///
/// # Errors
/// 401, or 503 if the state cannot be read.
pub(crate) fn caller(
    keys: Option<&Keys>,
    accounts: Option<&Arc<Accounts>>,
    headers: &HeaderMap,
) -> Result<Caller, ApiError> {
    if let Some(caller) = keys.and_then(|keys| keys.caller(headers)) {
        return Ok(caller);
    }
    let token = presented(headers);
    if let (Some(accounts), Some(token)) = (accounts, token) {
        match accounts.keys.presented(&*accounts.store, &sha256(token))? {
            Presented::Valid(account) => return Ok(Caller::of(account)),
            Presented::Refused(why) => return Err(ApiError::key_refused(why)),
            Presented::Unknown => {}
        }
    }
    let closed = match accounts {
        _ if keys.is_some() => true,
        Some(accounts) => accounts.keys.has_admin(&*accounts.store)?,
        None => false,
    };
    if closed {
        Err(ApiError::unauthorized())
    } else {
        Ok(Caller::anonymous())
    }
}

/// Who the lines of a batch are run as: whoever made it, as they are now.
///
/// # Errors
/// As for a request with that key: 401 if it is gone or not to be taken, 403 without the scope, 503 if the state cannot be read.
pub(crate) fn caller_of_batch(
    keys: Option<&Keys>,
    accounts: Option<&Arc<Accounts>>,
    key_id: &str,
) -> Result<Caller, ApiError> {
    if let Some(caller) = keys.and_then(|keys| keys.of_id(key_id)) {
        return Ok(caller.for_batch());
    }
    let accounts = accounts.ok_or_else(ApiError::unauthorized)?;
    let known = view::key(&*accounts.store.tables()?, key_id).map_err(StoreError::from)?;
    if let Some(key) = known
        && let Ok(sha256) = <[u8; 32]>::try_from(key.sha256.as_ref())
    {
        let caller = match accounts.keys.presented(&*accounts.store, &sha256)? {
            Presented::Valid(account) => Caller::of(account),
            Presented::Refused(why) => return Err(ApiError::key_refused(why)),
            Presented::Unknown => return Err(ApiError::unauthorized()),
        };
        return if caller.scopes.hold(Scopes::INFERENCE) {
            Ok(caller.for_batch())
        } else {
            Err(ApiError::missing_scope(Scopes::INFERENCE.name()))
        };
    }
    let open = keys.is_none() && key_id.is_empty() && !accounts.keys.has_admin(&*accounts.store)?;
    if open {
        Ok(Caller::anonymous().for_batch())
    } else {
        Err(ApiError::unauthorized())
    }
}

/// The hashes of the configured keys, each with its tenant.
#[derive(Clone)]
pub(crate) struct Keys(Vec<([u8; 32], Caller)>);

impl Keys {
    /// `None` if no key is configured.
    pub fn new(config: &GatewayConfig) -> Option<Self> {
        let single = config.api_key.iter().map(|key| (key, Caller::operator()));
        let tenants = config
            .tenants
            .iter()
            .map(|tenant| (&tenant.api_key, Caller::tenant(tenant)));
        let keys: Vec<_> = single
            .chain(tenants)
            .map(|(key, caller)| (*blake3::hash(key.as_bytes()).as_bytes(), caller))
            .collect();
        (!keys.is_empty()).then_some(Self(keys))
    }

    /// Whose key has this id in records.
    fn of_id(&self, key_id: &str) -> Option<Caller> {
        let found = self.0.iter().find(|(_, caller)| &*caller.key_id == key_id);
        found.map(|(_, caller)| caller.clone())
    }

    /// Whose key the request carries. Looks at every key, whichever it is.
    pub fn caller(&self, headers: &HeaderMap) -> Option<Caller> {
        let token = presented(headers)?;
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

/// The key that a request carries: `Authorization: Bearer KEY`, or where there is no such header Anthropic's `x-api-key: KEY`.
fn presented(headers: &HeaderMap) -> Option<&[u8]> {
    match headers.get(header::AUTHORIZATION) {
        Some(value) => bearer(value.as_bytes()),
        None => headers.get("x-api-key").map(|value| value.as_bytes().trim_ascii()),
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
        let salt = |name: &str| Caller::tenant(&tenant(name, "sk-0123456789abcdef")).cache_salt();
        assert_ne!(salt("a"), salt("b"));
        assert_eq!(Caller::anonymous().cache_salt(), b"");
    }
}
