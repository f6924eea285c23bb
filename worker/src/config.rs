//! The worker's configuration file, one documented field per setting.

use crate::WorkerError;
use crate::compression::KvCompression;
use crate::device::{Device, GpuKv};
use crate::mock::{EngineKind, MockSettings};
use baton_model::Quantization;
use serde::{Deserialize, Serialize};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

/// What a worker tells the router it is for. Policy only: every worker can do both jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WorkerRole {
    /// Computes prompts for others and hands their KV blocks over.
    Prefill,
    /// Streams tokens; long prompts are computed for it elsewhere.
    Decode,
    /// Both.
    Combined,
}

impl WorkerRole {
    pub(crate) fn to_proto(self) -> baton_proto::cluster::Role {
        match self {
            Self::Prefill => baton_proto::cluster::Role::Prefill,
            Self::Decode => baton_proto::cluster::Role::Decode,
            Self::Combined => baton_proto::cluster::Role::Combined,
        }
    }
}

/// `baton worker --config FILE`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// Unique in the cluster, and the name of the certificate in `identity_dir`: letters, digits, `-`, `_`, `.`.
    pub worker_id: String,
    /// `prefill`, `decode` or `combined`.
    #[serde(default = "default_role")]
    pub role: WorkerRole,
    /// `model`, or `mock` for a load test: a worker without a model, which answers nonsense as fast as its profile says.
    #[serde(default)]
    pub engine: EngineKind,
    /// Settings of the mock.
    #[serde(default)]
    pub mock: MockSettings,
    /// Directory with `config.json`, `*.safetensors` and `tokenizer.json`.
    pub model_path: PathBuf,
    /// The name clients use for the model.
    pub model_name: String,
    /// Cluster addresses of the coordinators, tried in order.
    pub coordinator_addrs: Vec<SocketAddr>,
    /// gRPC address to serve requests on; port 0 takes a free one. Must be reachable from coordinators and workers.
    #[serde(default = "loopback")]
    pub listen_addr: SocketAddr,
    /// UDP address of the KV transfer agent; port 0 takes a free one.
    #[serde(default = "loopback")]
    pub transfer_addr: SocketAddr,
    /// The address other hosts reach this one by; needed when listening on `0.0.0.0` or `[::]`.
    #[serde(default)]
    pub advertise_ip: Option<IpAddr>,
    /// Directory with `ca.pem`, `<worker_id>.pem` and `<worker_id>.key`.
    pub identity_dir: PathBuf,
    /// Compute threads; 0 takes every core. Workers that share a machine divide its cores between them.
    #[serde(default)]
    pub threads: usize,
    /// What computes: `cpu`, `cuda` (the first GPU that the driver shows), `cuda:N`, or `auto` (a GPU if there is one that
    /// the kernels run on, else the CPU). See `docs/gpu.md`.
    #[serde(default)]
    pub device: Device,
    /// Where a GPU's KV blocks are: `device` (its own memory; such a worker does not hand blocks over yet, and has the role
    /// `combined`) or `host` (`kv_bytes` of this machine's memory, read over the bus; everything works).
    #[serde(default)]
    pub gpu_kv: GpuKv,
    /// Memory for KV blocks on a GPU, in bytes; 0 takes what the weights leave, but for a reserve.
    #[serde(default)]
    pub gpu_kv_bytes: u64,
    /// Ranks that the model is divided among, each with its share of the threads: its own weights and heads, on cores of
    /// its own where the worker has the machine to itself. 1 keeps the model in one piece: where all cores have the
    /// memory equally near, more are about as fast. Workers of different degrees can hand blocks over, but round
    /// differently: give all workers of a model the same degree if an answer must not depend on who computes it.
    #[serde(default = "default_tensor_parallel")]
    pub tensor_parallel: usize,
    /// What weight matrices become when they are loaded: `none` (as stored), `int8` (W8A8) or `int4`. Workers that hand
    /// blocks over must agree.
    #[serde(default)]
    pub quantization: Quantization,
    /// Other busy processes use the same cores, for example workers that together have more threads than the machine has
    /// cores. Threads then park as soon as they have nothing to do instead of spinning for a moment: some 20 microseconds
    /// more per job of a lone worker, but those who share a core do not wait for each other's spinning. With more
    /// threads than cores in one worker this is so without asking.
    #[serde(default)]
    pub cores_shared: bool,
    /// Memory for KV blocks, in bytes.
    #[serde(default = "default_kv_bytes")]
    pub kv_bytes: u64,
    /// Tokens per KV block. Workers that hand blocks over need not agree.
    #[serde(default = "default_block_size")]
    pub block_size: usize,
    /// Most tokens computed in one engine step, and so the longest prefill chunk. Working memory grows with it.
    #[serde(default = "default_batch_tokens_max")]
    pub batch_tokens_max: usize,
    /// Time a step shall take while streams run, in milliseconds: prompts are computed in chunks that fit, so that no stream
    /// waits much longer for its next token. Smaller is smoother, larger computes prompts a little faster. 0: no such limit.
    #[serde(default = "default_step_target_ms")]
    pub step_target_ms: u64,
    /// Most sequences in one engine step.
    #[serde(default = "default_seqs_max")]
    pub seqs_max: usize,
    /// Most requests waiting for a place; one more is refused as overload.
    #[serde(default = "default_waiting_max")]
    pub waiting_max: usize,
    /// Longest wait for a prefill worker before the prompt is computed here, in milliseconds.
    #[serde(default = "default_fill_timeout_ms")]
    pub fill_timeout_ms: u64,
    /// How this worker wants KV blocks from prefill workers: `none` (as they are) or `int8` (8-bit integers with a scale per
    /// head and token, about half the bytes of bf16). For links that are slower than prefill; answers are then no longer
    /// the same to the bit as those of a worker that computes its prompts itself.
    #[serde(default)]
    pub kv_compression: KvCompression,
    /// Whether KV blocks from and to workers on other hosts go through NVIDIA's NIXL (RDMA, where there is some), where
    /// its library is found at run time on both sides; see `docs/kv-transfer.md`.
    #[serde(default)]
    pub kv_nixl: bool,
    /// Where KV blocks go that leave `kv_bytes`.
    #[serde(default)]
    pub tiers: TierConfig,
}

/// `[tiers]`: KV blocks below the pool, so that a prefix is loaded instead of computed again. All off unless set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TierConfig {
    /// Host memory for blocks that were evicted, in bytes or as `"2GiB"`; 0 for none. Lost with the process.
    #[serde(deserialize_with = "size")]
    pub host: u64,
    /// Directory for blocks on disk. Each worker needs one of its own; it survives restarts.
    pub disk_dir: Option<PathBuf>,
    /// Disk space for blocks, in bytes or as `"20GiB"`; 0 for none.
    #[serde(deserialize_with = "size")]
    pub disk: u64,
    /// Object store for blocks, shared by as many workers as like: `s3://bucket/prefix`, with endpoint and credentials from
    /// the environment (`AWS_ENDPOINT`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`), or
    /// `file:///directory`. Nothing is ever deleted there but what is broken.
    pub object_url: Option<String>,
}

/// Bytes, as a number or as text with a binary unit.
fn size<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Size {
        Bytes(u64),
        Text(String),
    }
    let text = match Size::deserialize(deserializer)? {
        Size::Bytes(bytes) => return Ok(bytes),
        Size::Text(text) => text,
    };
    let wrong = || {
        serde::de::Error::custom(format!(
            "{text:?} is not a size; write bytes or something like \"2GiB\""
        ))
    };
    let units = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("TiB", 40), ("", 0)];
    let (number, shift) = units
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .ok_or_else(wrong)?;
    let number: u64 = number.trim().parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

impl WorkerConfig {
    /// A configuration with every default.
    pub fn new(
        worker_id: String,
        model_path: PathBuf,
        model_name: String,
        coordinator_addrs: Vec<SocketAddr>,
        identity_dir: PathBuf,
    ) -> Self {
        Self {
            worker_id,
            role: default_role(),
            engine: EngineKind::default(),
            mock: MockSettings::default(),
            model_path,
            model_name,
            coordinator_addrs,
            listen_addr: loopback(),
            transfer_addr: loopback(),
            advertise_ip: None,
            identity_dir,
            threads: 0,
            device: Device::default(),
            gpu_kv: GpuKv::default(),
            gpu_kv_bytes: 0,
            tensor_parallel: default_tensor_parallel(),
            quantization: Quantization::default(),
            cores_shared: false,
            kv_bytes: default_kv_bytes(),
            block_size: default_block_size(),
            batch_tokens_max: default_batch_tokens_max(),
            step_target_ms: default_step_target_ms(),
            seqs_max: default_seqs_max(),
            waiting_max: default_waiting_max(),
            fill_timeout_ms: default_fill_timeout_ms(),
            kv_compression: KvCompression::None,
            kv_nixl: false,
            tiers: TierConfig::default(),
        }
    }

    /// How others reach a socket bound to `bound`.
    pub(crate) fn advertise(&self, bound: SocketAddr) -> Result<SocketAddr, WorkerError> {
        match self.advertise_ip {
            Some(ip) => Ok(SocketAddr::new(ip, bound.port())),
            None if bound.ip().is_unspecified() => Err(WorkerError::Config(format!(
                "listening on {bound}, but others cannot connect to that address; set advertise_ip to this host's own"
            ))),
            None => Ok(bound),
        }
    }
}

fn default_tensor_parallel() -> usize {
    1
}
fn default_role() -> WorkerRole {
    WorkerRole::Combined
}
fn loopback() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}
fn default_kv_bytes() -> u64 {
    1 << 30
}
fn default_block_size() -> usize {
    16
}
fn default_batch_tokens_max() -> usize {
    512
}
fn default_step_target_ms() -> u64 {
    u64::try_from(baton_engine::STEP_TARGET_DEFAULT.as_millis()).unwrap_or(0)
}
fn default_seqs_max() -> usize {
    64
}
fn default_waiting_max() -> usize {
    1024
}
fn default_fill_timeout_ms() -> u64 {
    60_000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_are_read_and_nonsense_is_refused() {
        let read = |json: &str| serde_json::from_str::<TierConfig>(json).map_err(|error| error.to_string());
        assert_eq!(read("{}"), Ok(TierConfig::default()));
        let tiers =
            read(r#"{"host": "2GiB", "disk_dir": "/kv", "disk": 4096, "object_url": "s3://b/p"}"#).expect("usable");
        assert_eq!((tiers.host, tiers.disk), (2 << 30, 4096));
        for bad in [
            r#"{"host": "much"}"#,
            r#"{"host": "-1"}"#,
            r#"{"disk": "99999999999TiB"}"#,
            r#"{"dsik": 1}"#,
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        assert!(read(r#"{"host": "2 GB"}"#).expect_err("no such unit").contains("2GiB"));
    }
}
