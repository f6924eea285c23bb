//! The gateway's settings, with the limits that keep every queue, body and wait bounded (promise P5), and the check
//! that nothing is served to a network without a key (promise P6). Paths and models are the coordinator's business.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use baton_proto::limits::{GRAMMAR_BYTES_MAX, TOP_LOGPROBS_MAX};
use baton_state::SLICE_LEASE_MS_MAX;
use serde::Deserialize;

use crate::auth::DEFAULT_TENANT;
use crate::batches::BatchesConfig;
use crate::clients::ClientRange;
use crate::error::GatewayError;
use crate::family::ParserChoice;
use crate::files::FilesConfig;
use crate::responses::ResponsesConfig;
use crate::tls::TlsConfig;

/// Shortest API key taken: 16 characters, so that nobody guards a cluster with a word.
pub const API_KEY_CHARS_MIN: usize = 16;

/// Shortest lease of a budget's slice: a few rounds of the group.
const BUDGET_LEASE_MS_MIN: u64 = 1_000;

/// Tenants in one configuration: each request is compared with the key of every one.
const TENANTS_MAX: usize = 1024;
/// Bytes of a tenant's name, which labels metrics.
const TENANT_NAME_BYTES_MAX: usize = 64;
/// Largest weight of a tenant against another's 1.
const WEIGHT_MAX: u32 = crate::backend::Share::WEIGHT_MAX;

/// A tenant: who shares the cluster with others, and salts a prefix cache of its own.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantConfig {
    /// Its name, in metrics and logs.
    pub name: String,
    /// The key its clients send as `Authorization: Bearer …`.
    pub api_key: String,
    /// Its share of the workers against that of others, where both want more than there is.
    #[serde(default = "one")]
    pub weight: u32,
    /// The most urgent (lowest) `priority` with which its requests compete with those of others; among its own, any counts.
    #[serde(default)]
    pub priority_min: i32,
}

fn one() -> u32 {
    1
}

/// Settings of the HTTP front end. Every field has a default.
#[derive(Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct GatewayConfig {
    /// The key clients send as `Authorization: Bearer …`. Needed to bind beyond loopback.
    pub api_key: Option<String>,
    /// Further keys, each of a tenant with a share and a prefix cache of its own.
    pub tenants: Vec<TenantConfig>,
    /// Serves HTTPS, and nothing else on that port. Without it the API is plain HTTP: for loopback, and behind a proxy.
    pub tls: Option<TlsConfig>,
    /// Addresses, as ranges, that the limits per client do not count: proxies and load balancers, and this machine. They
    /// give no rights.
    pub trusted_clients: Vec<ClientRange>,
    /// Largest request body in bytes. 4 MiB is a prompt of about a million tokens.
    pub body_bytes_max: usize,
    /// Bytes of request bodies in memory at once, at least one largest body. One more is answered 429.
    pub bodies_bytes_max: usize,
    /// Open connections. Each costs a task and a few KiB; one more is answered 503 and closed.
    pub connections_max: usize,
    /// Connections of one client: an IPv4 address, or an IPv6 network of 64 bits. By default three quarters of all, so that
    /// no single one takes the last place.
    pub connections_per_client_max: usize,
    /// Requests in work at once, of whatever route, until their answers are taken. One more is answered 429; probes of
    /// `/health` and `/ready` are always answered.
    pub requests_max: usize,
    /// Requests in work at once of one client. One more is answered 429.
    pub requests_per_client_max: usize,
    /// Requests in work at once, each choice of one for itself, from tokenising to the settled record. One more is answered 429.
    pub in_flight_max: usize,
    /// Messages in one request.
    pub messages_max: usize,
    /// Prompts in one request to `/v1/completions`.
    pub prompts_max: usize,
    /// Choices of one request: its prompts times its `n`.
    pub choices_max: usize,
    /// Choices per prompt (`n`). Each is a sequence on a worker, counts against `in_flight_max`, and multiplies what is
    /// reserved of a budget: `n` times the tokens that may be generated.
    pub n_max: usize,
    /// Most likely tokens told beside each (`top_logprobs`), at most 20. Each costs bytes for every token.
    pub top_logprobs_max: usize,
    /// Stop strings in one request.
    pub stops_max: usize,
    /// Tools in one request.
    pub tools_max: usize,
    /// Bytes of one JSON schema: of an output format, or of a tool's parameters.
    pub schema_bytes_max: usize,
    /// Bytes of a grammar or regular expression that an answer must follow.
    pub grammar_bytes_max: usize,
    /// By model name: the parsers of tool calls and thoughts, where the chat template does not tell the right ones.
    pub parsers: BTreeMap<String, ParserChoice>,
    /// Time for a TLS handshake, for a request's headers, and for an idle connection to send its next request, in
    /// milliseconds.
    pub header_timeout_ms: u64,
    /// Time for a whole request body, in milliseconds.
    pub body_timeout_ms: u64,
    /// A client that takes no byte of a response for this long, in milliseconds, is cut: the connection if that is stuck, or
    /// the one HTTP/2 stream.
    pub write_stall_ms_max: u64,
    /// Silence on a stream after which a comment is sent to keep proxies from closing it, in milliseconds.
    pub keep_alive_ms: u64,
    /// How long a stream's status line waits for the first token, so that an early failure is an HTTP error and not
    /// an error event, in milliseconds.
    pub first_token_wait_ms: u64,
    /// How long a stream whose client asked to resume it (`x-stream-resume: true`) is kept after its connection broke or its
    /// end, in milliseconds.
    pub stream_resume_ms: u64,
    /// At shutdown, how long running requests may go on, in milliseconds; and then, again, how long their usage
    /// records may take to be settled.
    pub drain_ms_max: u64,
    /// Uploaded files.
    pub files: FilesConfig,
    /// Batches.
    pub batches: BatchesConfig,
    /// Stored responses.
    pub responses: ResponsesConfig,
    /// How long money of a hard budget is set aside for this gateway at once, in milliseconds. One that dies keeps it from
    /// the others for that long and two minutes more; one that is cut off from the group stops requests under such
    /// budgets shortly before the end.
    pub budget_lease_ms: u64,
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            api_key: None,
            tenants: Vec::new(),
            tls: None,
            trusted_clients: ClientRange::loopback(),
            body_bytes_max: 4 << 20,
            bodies_bytes_max: 256 << 20,
            connections_max: 4096,
            connections_per_client_max: 3072,
            requests_max: 2048,
            requests_per_client_max: 1536,
            in_flight_max: 1024,
            messages_max: 2048,
            prompts_max: 128,
            choices_max: 256,
            n_max: 128,
            top_logprobs_max: 20,
            stops_max: 4,
            tools_max: 128,
            schema_bytes_max: 128 << 10,
            grammar_bytes_max: 64 << 10,
            parsers: BTreeMap::new(),
            header_timeout_ms: 30_000,
            body_timeout_ms: 30_000,
            write_stall_ms_max: 30_000,
            keep_alive_ms: 10_000,
            first_token_wait_ms: 1_000,
            stream_resume_ms: 15_000,
            drain_ms_max: 5_000,
            files: FilesConfig::default(),
            batches: BatchesConfig::default(),
            responses: ResponsesConfig::default(),
            budget_lease_ms: 30_000,
        }
    }
}

impl GatewayConfig {
    /// Checks the settings against each other and against the address they are to serve on.
    pub fn validate(&self, addr: SocketAddr) -> Result<(), GatewayError> {
        let open = self.api_key.is_none() && self.tenants.is_empty();
        if open && !addr.ip().to_canonical().is_loopback() {
            return Err(GatewayError::OpenToAll { addr });
        }
        let keys = self.tenants.iter().map(|tenant| &tenant.api_key);
        for key in self.api_key.iter().chain(keys) {
            if key.len() < API_KEY_CHARS_MIN || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
                return Err(GatewayError::Setting {
                    name: "api_key",
                    problem: format!("must be at least {API_KEY_CHARS_MIN} visible ASCII characters"),
                });
            }
        }
        self.validate_tenants()?;
        self.files.validate()?;
        self.batches.validate()?;
        self.responses.validate()?;
        if !(BUDGET_LEASE_MS_MIN..=SLICE_LEASE_MS_MAX).contains(&self.budget_lease_ms) {
            return Err(GatewayError::Setting {
                name: "budget_lease_ms",
                problem: format!("must be from {BUDGET_LEASE_MS_MIN} to {SLICE_LEASE_MS_MAX}"),
            });
        }
        let positive: [(&'static str, u64); 23] = [
            ("body_bytes_max", self.body_bytes_max as u64),
            ("bodies_bytes_max", self.bodies_bytes_max as u64),
            ("connections_max", self.connections_max as u64),
            ("connections_per_client_max", self.connections_per_client_max as u64),
            ("requests_max", self.requests_max as u64),
            ("requests_per_client_max", self.requests_per_client_max as u64),
            ("tls.reload_ms", self.tls.as_ref().map_or(1, |tls| tls.reload_ms)),
            ("in_flight_max", self.in_flight_max as u64),
            ("messages_max", self.messages_max as u64),
            ("prompts_max", self.prompts_max as u64),
            ("choices_max", self.choices_max as u64),
            ("n_max", self.n_max as u64),
            ("stops_max", self.stops_max as u64),
            ("tools_max", self.tools_max as u64),
            ("schema_bytes_max", self.schema_bytes_max as u64),
            ("grammar_bytes_max", self.grammar_bytes_max as u64),
            ("header_timeout_ms", self.header_timeout_ms),
            ("body_timeout_ms", self.body_timeout_ms),
            ("write_stall_ms_max", self.write_stall_ms_max),
            ("keep_alive_ms", self.keep_alive_ms),
            ("first_token_wait_ms", self.first_token_wait_ms),
            ("stream_resume_ms", self.stream_resume_ms),
            ("drain_ms_max", self.drain_ms_max),
        ];
        for (name, value) in positive {
            // The upper end keeps semaphores and timers in range.
            if value == 0 || value > u64::from(u32::MAX) {
                return Err(GatewayError::Setting {
                    name,
                    problem: format!("must be from 1 to {}", u32::MAX),
                });
            }
        }
        // What the wire takes.
        for (name, value, most) in [
            ("top_logprobs_max", self.top_logprobs_max, TOP_LOGPROBS_MAX as usize),
            ("schema_bytes_max", self.schema_bytes_max, GRAMMAR_BYTES_MAX),
            ("grammar_bytes_max", self.grammar_bytes_max, GRAMMAR_BYTES_MAX),
        ] {
            if value > most {
                let problem = format!("must be at most {most}");
                return Err(GatewayError::Setting { name, problem });
            }
        }
        if self.bodies_bytes_max < self.body_bytes_max {
            let problem = "must be at least `body_bytes_max`, or the largest body could never be read".into();
            return Err(GatewayError::Setting {
                name: "bodies_bytes_max",
                problem,
            });
        }
        Ok(())
    }

    fn validate_tenants(&self) -> Result<(), GatewayError> {
        let wrong = |problem: String| {
            Err(GatewayError::Setting {
                name: "tenants",
                problem,
            })
        };
        if self.tenants.len() > TENANTS_MAX {
            return wrong(format!("must be at most {TENANTS_MAX}"));
        }
        let (mut names, mut keys) = (HashSet::from([DEFAULT_TENANT]), HashSet::new());
        keys.extend(self.api_key.as_deref());
        for tenant in &self.tenants {
            let name = &tenant.name;
            if name.is_empty() || name.len() > TENANT_NAME_BYTES_MAX || !name.bytes().all(|b| b.is_ascii_graphic()) {
                return wrong(format!(
                    "has the name {name:?}; a name is 1 to {TENANT_NAME_BYTES_MAX} visible ASCII characters"
                ));
            }
            if !names.insert(name) {
                return wrong(format!(
                    "has the name {name} twice, or it is the one of requests without a tenant"
                ));
            }
            if !keys.insert(&tenant.api_key) {
                return wrong(format!("has a key twice, the second time for {name}"));
            }
            if !(1..=WEIGHT_MAX).contains(&tenant.weight) {
                return wrong(format!(
                    "gives {name} a weight of {}; it must be from 1 to {WEIGHT_MAX}",
                    tenant.weight
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn header_timeout(&self) -> Duration {
        Duration::from_millis(self.header_timeout_ms)
    }

    pub(crate) fn body_timeout(&self) -> Duration {
        Duration::from_millis(self.body_timeout_ms)
    }

    pub(crate) fn write_stall(&self) -> Duration {
        Duration::from_millis(self.write_stall_ms_max)
    }

    pub(crate) fn keep_alive(&self) -> Duration {
        Duration::from_millis(self.keep_alive_ms)
    }

    pub(crate) fn drain(&self) -> Duration {
        Duration::from_millis(self.drain_ms_max)
    }
}

impl fmt::Debug for GatewayConfig {
    /// Everything but the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GatewayConfig")
            .field("api_key", &self.api_key.as_ref().map(|_| "…"))
            .field("body_bytes_max", &self.body_bytes_max)
            .field("connections_max", &self.connections_max)
            .field("in_flight_max", &self.in_flight_max)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_address_needs_a_key() {
        let open = GatewayConfig::default();
        for loopback in ["127.0.0.1:80", "[::1]:80", "[::ffff:127.0.0.1]:80"] {
            open.validate(loopback.parse().unwrap()).unwrap();
        }
        for network in ["0.0.0.0:80", "[::]:80", "10.0.0.1:80"] {
            let error = open.validate(network.parse().unwrap()).unwrap_err();
            assert!(matches!(error, GatewayError::OpenToAll { .. }), "{error}");
        }
        let keyed = GatewayConfig {
            api_key: Some("sk-0123456789abcdef".into()),
            ..GatewayConfig::default()
        };
        keyed.validate("0.0.0.0:80".parse().unwrap()).unwrap();
        let weak = GatewayConfig {
            api_key: Some("secret".into()),
            ..GatewayConfig::default()
        };
        assert!(weak.validate("127.0.0.1:80".parse().unwrap()).is_err());
    }

    #[test]
    fn tenants_are_told_apart() {
        let addr = "0.0.0.0:80".parse().unwrap();
        let tenant = |name: &str, key: &str, weight| TenantConfig {
            name: name.into(),
            api_key: key.into(),
            weight,
            priority_min: 0,
        };
        let check = |tenants: Vec<TenantConfig>| {
            let config = GatewayConfig {
                tenants,
                ..GatewayConfig::default()
            };
            config.validate(addr)
        };
        let (a, b) = ("sk-aaaaaaaaaaaaaaaa", "sk-bbbbbbbbbbbbbbbb");
        check(vec![tenant("a", a, 1), tenant("b", b, 1000)]).unwrap();
        for wrong in [
            vec![tenant("a", a, 1), tenant("a", b, 1)],
            vec![tenant("a", a, 1), tenant("b", a, 1)],
            vec![tenant("default", a, 1)],
            vec![tenant("", a, 1)],
            vec![tenant("a b", a, 1)],
            vec![tenant("a", "short", 1)],
            vec![tenant("a", a, 0)],
            vec![tenant("a", a, 1001)],
        ] {
            assert!(matches!(check(wrong), Err(GatewayError::Setting { .. })));
        }
    }

    /// serde's complaint about an unknown field lists the known ones.
    #[test]
    fn every_setting_is_documented() {
        let page = include_str!("../../../docs/hardening.md");
        let unknown = serde_json::from_str::<GatewayConfig>(r#"{"?": 1}"#)
            .err()
            .unwrap()
            .to_string();
        let names: Vec<&str> = unknown.split('`').skip(3).step_by(2).collect();
        assert!(names.contains(&"connections_max") && names.len() > 15, "{unknown}");
        for name in names {
            assert!(
                page.contains(&format!("`{name}`")),
                "docs/hardening.md does not name `{name}`"
            );
        }
    }

    #[test]
    fn the_key_is_not_printed() {
        let keyed = GatewayConfig {
            api_key: Some("sk-0123456789abcdef".into()),
            ..GatewayConfig::default()
        };
        assert!(!format!("{keyed:?}").contains("0123"));
    }
}
