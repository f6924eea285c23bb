//! From flags to a plan: which model, which workers, how much of the machine each gets. Everything that can be refused
//! is refused here, before any process starts.

use super::data_dir::DataDir;
use super::memory::{self, ModelNeeds};
use super::progress::Progress;
use crate::cli::UpArgs;
use crate::cli::tenant::Tenant;
use crate::{demo, model_dir};
use anyhow::{Context, bail};
use baton_model::gguf::gguf_file;
use baton_model::{MemoryNeed, ModelConfig, ModelFiles, Quantization, ShardSlices, Stage};
use baton_worker::KvCompression;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Name of the model's line in the progress display.
const MODEL: &str = "model";
/// Tokens per KV block. All workers of a cluster agree on it.
pub const BLOCK_TOKENS: usize = 16;

/// Most tokens in one engine step: the worker's own default, named here because working memory follows from it.
pub const BATCH_TOKENS_MAX: usize = 512;
/// Most sequences in one engine step, likewise.
pub const SEQUENCES_MAX: usize = 64;

/// What a worker is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Computes prompts.
    Prefill,
    /// Streams tokens.
    Decode,
}

impl Role {
    /// As in configurations and `ready.json`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// A cluster about to be started.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Where the API is to listen.
    pub http_addr: SocketAddr,
    /// The model's directory or GGUF file, as workers load it.
    pub model_path: PathBuf,
    /// The directory with the model's tokenizer, chat template and configuration, as the coordinator loads it.
    pub text_path: PathBuf,
    /// The model's name for clients.
    pub model_name: String,
    /// How many coordinators.
    pub coordinators: usize,
    /// Names and roles of the workers.
    pub workers: Vec<(String, Role)>,
    /// Compute threads of each worker.
    pub threads: usize,
    /// Ranks of each worker; at most `threads`.
    pub tensor_parallel: usize,
    /// What weights become in memory.
    pub quantization: Quantization,
    /// How KV travels between workers.
    pub kv_compression: KvCompression,
    /// The pace of engine steps, where not the workers' default.
    pub step_target_ms: Option<u64>,
    /// Whether workers together have more threads than there are cores, so that none may spin. Cores are divided by
    /// number only, not pinned: on a machine that people also use, the system places threads better than a plan can.
    pub cores_shared: bool,
    /// KV memory of each worker.
    pub kv_bytes: u64,
    /// Host memory of each worker for KV blocks beyond that; 0 for none.
    pub kv_host_bytes: u64,
    /// Disk space of each worker for KV blocks; 0 for none.
    pub kv_disk_bytes: u64,
    /// Object store for KV blocks.
    pub kv_object_url: Option<String>,
    /// Key that clients must send.
    pub api_key: Option<String>,
    /// The API's certificate and its key, if it speaks TLS.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Further keys, of tenants.
    pub tenants: Vec<Tenant>,
    /// Targets of requests without their own, in milliseconds.
    pub ttft_target_ms: Option<u64>,
    pub itl_target_ms: Option<u64>,
    /// Uncached tokens above which a prefill worker computes the prompt; the coordinator's default if not given.
    pub prefill_threshold: Option<u32>,
}

impl Plan {
    /// Checks what needs no model, cheapest first. Blocking.
    pub fn check_flags(args: &UpArgs) -> anyhow::Result<SocketAddr> {
        if !matches!(args.coordinators, 1 | 3 | 5) {
            bail!(
                "--coordinators {} makes no group: 3 survive the loss of one, 5 of two, and 1 is alone",
                args.coordinators
            );
        }
        if !args.host.is_loopback() && args.api_key.is_none() && args.tenants.is_empty() {
            bail!(
                "{} can be reached from other machines, so clients must have a key; give one with --api-key",
                args.host
            );
        }
        let addr = SocketAddr::new(args.host, args.port);
        if args.threads.is_some_and(|threads| threads < args.tensor_parallel) {
            bail!(
                "--tensor-parallel {} needs as many threads per worker at least; raise --threads or lower it",
                args.tensor_parallel
            );
        }
        // The coordinator binds it in a moment; asking now saves the user from waiting for a model first.
        match std::net::TcpListener::bind(addr) {
            Ok(_) => Ok(addr),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => {
                bail!(
                    "port {} on {} is taken by another program; stop it, or choose another with --port (0 picks a free one)",
                    args.port,
                    args.host
                )
            }
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                bail!(
                    "this user may not listen on port {}; choose one above 1023 with --port",
                    args.port
                )
            }
            Err(error) => {
                Err(error).with_context(|| format!("cannot listen on {addr}; choose another with --host and --port"))
            }
        }
    }

    /// Finds the model, judges whether it fits, and divides the machine. Blocking: it may download.
    pub fn make(args: &UpArgs, http_addr: SocketAddr, data: &DataDir, progress: &mut Progress) -> anyhow::Result<Self> {
        let (model_path, default_name) = match &args.model {
            None => (demo::extract(&data.models())?, demo::NAME.to_owned()),
            Some(spec) => {
                let path = resolve(spec, progress)?;
                let name = model_name(spec, &path);
                (path, name)
            }
        };
        let model_name = args.model_name.clone().unwrap_or(default_name);
        if model_name.is_empty() || model_name.len() > 200 || model_name.chars().any(char::is_control) {
            bail!("{model_name:?} cannot be the model's name; give a short printable one with --model-name");
        }
        // Both refuse what the workers would refuse, with the same sentence.
        let config = ModelConfig::from_dir(&model_path)?;
        let files = ModelFiles::open(&model_path)?;
        let text_path = match gguf_file(&model_path)? {
            Some(file) => model_dir::place_gguf_text(&file, &data.models())?,
            None => model_path.clone(),
        };
        let tensor_parallel = usize::from(args.tensor_parallel);
        ShardSlices::of_shared_arena(&config, tensor_parallel)?;
        let weight_bytes = files.packed_bytes(&config, args.quantize);
        let need = MemoryNeed::estimate(&config, weight_bytes, 0, BATCH_TOKENS_MAX, SEQUENCES_MAX).on_ranks(
            &config,
            tensor_parallel,
            BATCH_TOKENS_MAX,
            SEQUENCES_MAX,
        );
        let needs = ModelNeeds {
            weight_bytes: need.weights,
            scratch_bytes: need.scratch,
            kv_token_bytes: (config.kv_geometry(BLOCK_TOKENS).block_bytes() / BLOCK_TOKENS) as u64,
            context_tokens: config.context_length as u64,
            host_tier_bytes: args.kv_host_mem.unwrap_or(0),
        };
        let workers = workers(args.prefill, args.decode);
        let kv_bytes = memory::kv_bytes(
            &model_name,
            needs,
            workers.len() as u64,
            args.kv_mem,
            baton_model::available_memory(),
        )?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = args
            .threads
            .map_or((cores / workers.len()).max(tensor_parallel), usize::from);
        Ok(Self {
            http_addr,
            model_path,
            text_path,
            model_name,
            threads,
            tensor_parallel,
            cores_shared: threads * workers.len() > cores,
            coordinators: args.coordinators.into(),
            workers,
            quantization: args.quantize,
            kv_compression: args.kv_compression,
            step_target_ms: args.step_target_ms,
            kv_bytes,
            kv_host_bytes: needs.host_tier_bytes,
            kv_disk_bytes: args.kv_disk.unwrap_or(0),
            kv_object_url: args.kv_object.clone(),
            api_key: args.api_key.clone(),
            tls: tls(args)?,
            tenants: args.tenants.clone(),
            ttft_target_ms: args.ttft_target_ms,
            itl_target_ms: args.itl_target_ms,
            prefill_threshold: args
                .prefill_threshold
                .or(args.model.is_none().then_some(demo::PREFILL_THRESHOLD_TOKENS)),
        })
    }
}

/// Absolute, because children may be started elsewhere.
fn tls(args: &UpArgs) -> anyhow::Result<Option<(PathBuf, PathBuf)>> {
    let (Some(cert), Some(key)) = (&args.tls_cert, &args.tls_key) else {
        return Ok(None);
    };
    let absolute = |path: &Path| std::path::absolute(path).with_context(|| format!("{} is no path", path.display()));
    Ok(Some((absolute(cert)?, absolute(key)?)))
}

fn resolve(spec: &str, progress: &mut Progress) -> anyhow::Result<PathBuf> {
    progress.begin(MODEL, &format!("looking for {spec}"));
    let display = Mutex::new(&mut *progress);
    let path = baton_model::resolve(spec, &|stage: Stage<'_>, done: u64, total: u64| {
        display
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .bytes(MODEL, &stage.to_string(), done, total);
    })?;
    progress.done(MODEL, &path.display().to_string());
    Ok(path)
}

fn workers(prefill: u16, decode: u16) -> Vec<(String, Role)> {
    let named = |role: Role, count: u16| (0..count).map(move |i| (format!("{}-{i}", role.name()), role));
    named(Role::Prefill, prefill)
        .chain(named(Role::Decode, decode))
        .collect()
}

/// A hub id is its own name; a directory is called by its last component, a GGUF file likewise but without its ending.
pub fn model_name(spec: &str, path: &Path) -> String {
    if !Path::new(spec).exists() {
        return spec.to_owned();
    }
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if path.is_file() {
        path.file_stem()
    } else {
        path.file_name()
    };
    name.map_or_else(|| spec.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_are_named_by_role() {
        let names: Vec<_> = workers(2, 1).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["prefill-0", "prefill-1", "decode-0"]);
        assert_eq!(workers(0, 1).len(), 1);
    }

    #[test]
    fn models_are_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("tiny-llama");
        std::fs::create_dir(&path).expect("writable");
        let spec = format!("{}/./", path.display());
        assert_eq!(model_name(&spec, &path), "tiny-llama");
        let file = directory.path().join("tiny.Q4_K_M.gguf");
        std::fs::write(&file, "").expect("writable");
        assert_eq!(model_name(&file.to_string_lossy(), &file), "tiny.Q4_K_M");
        assert_eq!(
            model_name("org/no-such-model", Path::new("/cache/x")),
            "org/no-such-model"
        );
    }
}
