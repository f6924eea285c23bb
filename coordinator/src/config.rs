//! The coordinator's configuration file, one documented field per setting.

use crate::CoordinatorError;
use baton_router::Mode;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Members in a configuration: groups have up to five voters, and a few more while members are exchanged.
const MEMBERS_MAX: usize = 16;

/// `baton coordinator --config FILE`.
#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CoordinatorConfig {
    /// Name of this process in logs, and of its certificate in `identity_dir`.
    #[serde(default = "default_name")]
    pub name: String,
    /// Directory of the durable state: members and usage records. Belongs to one coordinator.
    pub data_dir: PathBuf,
    /// Address of the OpenAI API; port 0 takes a free one. Beyond loopback, `api_key` must be set.
    #[serde(default = "default_http_addr")]
    pub http_addr: SocketAddr,
    /// gRPC address that workers join at; port 0 takes a free one.
    #[serde(default = "default_cluster_addr")]
    pub cluster_addr: SocketAddr,
    /// Directory with `ca.pem`, `<name>.pem` and `<name>.key`.
    pub identity_dir: PathBuf,
    /// This coordinator's id in its group: not 0, and for ever the same for one data directory.
    #[serde(default = "default_node_id")]
    pub node_id: u64,
    /// All members of the group, this one among them; empty for a lone coordinator. Founds the group when all start with
    /// empty data directories, all with the same list; afterwards the replicated state says who is a member, and this only
    /// where to find them.
    #[serde(default)]
    pub members: Vec<MemberConfig>,
    /// This coordinator joins a group that exists, and founds none: `baton coordinators add` takes it in. Without effect once
    /// its data directory has state.
    #[serde(default)]
    pub join: bool,
    /// Time without a leader after which another is elected, in milliseconds: the least; a member waits up to twice as long.
    #[serde(default = "default_election_timeout_ms")]
    pub election_timeout_ms: u64,
    /// The models served; a worker that offers another is refused.
    pub models: Vec<ModelConfig>,
    /// Prompts of which more than this is not cached, in tokens, are computed on a prefill worker when there is one, as
    /// long as prefill and transfer rates are not measured; then the rates decide whether a hand-over pays. 0: every
    /// prompt is, always.
    #[serde(default = "default_prefill_threshold_tokens")]
    pub prefill_threshold_tokens: usize,
    /// How the worker that streams a request is chosen: `cache-aware`, or for comparison `least-loaded`, `round-robin` or
    /// `random`.
    #[serde(default)]
    pub routing: RoutingMode,
    /// How much a prompt's cached part holds a request to its worker: it waits there for up to (1 + this) times what the
    /// cache saves. 0 is the shortest wait for each request, 3 computes less in all. 0 to 100; see `docs/routing.md`.
    #[serde(default = "default_stay")]
    pub stay: f64,
    /// How often workers report, in milliseconds.
    #[serde(default = "default_heartbeat_interval_ms")]
    pub heartbeat_interval_ms: u32,
    /// Silence after which a worker is declared lost, in milliseconds; at least twice the heartbeat interval. One
    /// whose connections both broke is lost at once.
    #[serde(default = "default_lost_after_ms")]
    pub lost_after_ms: u32,
    /// Requests placed on one worker at once, running and queued; one more is refused as overload.
    #[serde(default = "default_requests_per_worker_max")]
    pub requests_per_worker_max: u32,
    /// Longest wait of a running request for a worker to appear after its own is gone and no other is left, in
    /// milliseconds.
    #[serde(default = "default_worker_wait_ms")]
    pub worker_wait_ms: u64,
    /// Whether a worker is told to read a prompt's blocks from its disk or the object store while the request still waits.
    #[serde(default = "default_read_ahead")]
    pub read_ahead: bool,
    /// Who is let in when there is more to do than can be done; see `docs/admission.md`.
    #[serde(default)]
    pub admission: baton_admission::AdmissionConfig,
    /// Applied Raft log entries kept.
    #[serde(default = "default_log_entries_keep")]
    pub log_entries_keep: u64,
    /// The key clients send as `Authorization: Bearer …`. The same setting as `gateway.api_key`.
    #[serde(default)]
    pub api_key: Option<String>,
    /// The HTTP front end's limits.
    #[serde(default)]
    pub gateway: baton_gateway::GatewayConfig,
}

/// The ways to choose a worker ([`baton_router::mode`]), as configured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingMode {
    /// By cached blocks, load and measured rates.
    #[default]
    CacheAware,
    /// The worker with the fewest streams.
    LeastLoaded,
    /// One after another.
    RoundRobin,
    /// Any.
    Random,
}

impl RoutingMode {
    pub(crate) fn mode(self) -> Mode {
        match self {
            Self::CacheAware => Mode::CacheAware,
            Self::LeastLoaded => Mode::LeastLoaded,
            Self::RoundRobin => Mode::RoundRobin,
            // Any seed will do: it only has to be unlike the workers' order.
            Self::Random => Mode::Random { seed: 0 },
        }
    }
}

/// A member of the group of coordinators.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberConfig {
    /// Its `node_id`.
    pub id: u64,
    /// Its `name`.
    pub name: String,
    /// Where members and workers reach it, as "host:port".
    pub cluster_addr: String,
    /// Base URL of its API, such as "http://10.0.0.1:8080".
    #[serde(default)]
    pub api_url: String,
}

/// A model that the API offers.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelConfig {
    /// The name clients send.
    pub name: String,
    /// Directory with `tokenizer.json` and the chat template. Weights are read by workers only.
    pub path: PathBuf,
}

impl CoordinatorConfig {
    /// A configuration with every default.
    pub fn new(data_dir: PathBuf, identity_dir: PathBuf, models: Vec<ModelConfig>) -> Self {
        Self {
            name: default_name(),
            data_dir,
            http_addr: default_http_addr(),
            cluster_addr: default_cluster_addr(),
            identity_dir,
            node_id: default_node_id(),
            members: Vec::new(),
            join: false,
            election_timeout_ms: default_election_timeout_ms(),
            models,
            prefill_threshold_tokens: default_prefill_threshold_tokens(),
            routing: RoutingMode::default(),
            stay: default_stay(),
            heartbeat_interval_ms: default_heartbeat_interval_ms(),
            lost_after_ms: default_lost_after_ms(),
            requests_per_worker_max: default_requests_per_worker_max(),
            worker_wait_ms: default_worker_wait_ms(),
            read_ahead: default_read_ahead(),
            admission: baton_admission::AdmissionConfig::default(),
            log_entries_keep: default_log_entries_keep(),
            api_key: None,
            gateway: baton_gateway::GatewayConfig::default(),
        }
    }

    /// Checks the settings against each other.
    pub fn validate(&self) -> Result<(), CoordinatorError> {
        let wrong = |message: String| Err(CoordinatorError::Config(message));
        if self.models.is_empty() {
            return wrong("models is empty; name at least one model and its directory".into());
        }
        for (i, model) in self.models.iter().enumerate() {
            if model.name.is_empty() {
                return wrong(format!("models[{i}] has an empty name"));
            }
            if self.models[..i].iter().any(|other| other.name == model.name) {
                return wrong(format!("the model name {:?} is used twice", model.name));
            }
        }
        self.validate_group()?;
        if self.heartbeat_interval_ms < 50 {
            return wrong("heartbeat_interval_ms must be at least 50".into());
        }
        if self.lost_after_ms < 2 * self.heartbeat_interval_ms {
            return wrong("lost_after_ms must be at least twice heartbeat_interval_ms".into());
        }
        if self.api_key.is_some() && self.gateway.api_key.is_some() {
            return wrong("api_key and gateway.api_key are both set; keep one".into());
        }
        let stream_max = baton_proto::limits::REQUESTS_PER_STREAM_MAX;
        if self.requests_per_worker_max == 0 || self.requests_per_worker_max as usize > stream_max {
            return wrong(format!("requests_per_worker_max must be from 1 to {stream_max}"));
        }
        if !(0.0..=100.0).contains(&self.stay) {
            return wrong("stay must be from 0 to 100".into());
        }
        self.admission
            .validate()
            .map_err(|error| CoordinatorError::Config(error.to_string()))
    }
}

/// Whether `addr` is a "host:port" that could be connected to.
pub(crate) fn is_host_and_port(addr: &str) -> bool {
    addr.parse::<tonic::codegen::http::uri::Authority>()
        .is_ok_and(|addr| addr.port_u16().is_some_and(|port| port != 0))
}

impl CoordinatorConfig {
    fn validate_group(&self) -> Result<(), CoordinatorError> {
        let wrong = |message: String| Err(CoordinatorError::Config(message));
        if self.node_id == 0 {
            return wrong("node_id must not be 0".into());
        }
        if !(200..=60_000).contains(&self.election_timeout_ms) {
            return wrong("election_timeout_ms must be from 200 to 60000".into());
        }
        if self.members.is_empty() {
            return match self.join {
                true => wrong("join needs members: those of the group, and this one".into()),
                false => Ok(()),
            };
        }
        if !self.join && !matches!(self.members.len(), 1 | 3 | 5) {
            return wrong("members has to have 1, 3 or 5 entries; 2 or 4 survive no more than 1 or 3".into());
        }
        if self.members.len() > MEMBERS_MAX {
            return wrong(format!(
                "members has more than {MEMBERS_MAX} entries; a group has 1, 3 or 5"
            ));
        }
        for (i, member) in self.members.iter().enumerate() {
            if self.members[..i]
                .iter()
                .any(|other| other.id == member.id || other.name == member.name)
            {
                return wrong(format!("members[{i}] has the id or name of another"));
            }
            if member.id == 0 || baton_identity::Role::Coordinator.named(&member.name).is_none() {
                return wrong(format!(
                    "members[{i}] needs an id other than 0 and a name of letters, digits and '-'"
                ));
            }
            if !is_host_and_port(&member.cluster_addr) {
                return wrong(format!("members[{i}].cluster_addr must be \"host:port\""));
            }
        }
        match self.members.iter().find(|member| member.id == self.node_id) {
            Some(me) if me.name == self.name => Ok(()),
            _ => wrong(format!(
                "members must have an entry with this coordinator's own id {} and name {:?}",
                self.node_id, self.name
            )),
        }
    }
}

impl std::fmt::Debug for CoordinatorConfig {
    /// Everything but the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CoordinatorConfig")
            .field("name", &self.name)
            .field("data_dir", &self.data_dir)
            .field("http_addr", &self.http_addr)
            .field("cluster_addr", &self.cluster_addr)
            .field("models", &self.models)
            .finish_non_exhaustive()
    }
}

fn default_node_id() -> u64 {
    1
}
fn default_election_timeout_ms() -> u64 {
    600
}
fn default_name() -> String {
    "coordinator-0".into()
}
fn default_http_addr() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 8080))
}
fn default_cluster_addr() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 7070))
}
fn default_stay() -> f64 {
    baton_router::Policy::default().stay
}
fn default_prefill_threshold_tokens() -> usize {
    256
}
fn default_heartbeat_interval_ms() -> u32 {
    500
}
fn default_lost_after_ms() -> u32 {
    2000
}
fn default_requests_per_worker_max() -> u32 {
    1024
}
fn default_worker_wait_ms() -> u64 {
    10_000
}
fn default_read_ahead() -> bool {
    true
}
fn default_log_entries_keep() -> u64 {
    4096
}
