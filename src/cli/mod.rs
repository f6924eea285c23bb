//! The command line: every command and flag with its documentation, nothing else. `docs/cli.md` is generated from it
//! and compared in the test run.

pub mod accounts;
pub mod bench;
pub mod bench_engine;
pub mod bench_simulate;
#[cfg(test)]
mod docs;
pub mod doctor;
pub mod gpu_check;
pub mod ledger;
pub mod mock;
pub mod prices;
pub mod size;
pub mod tenant;

use clap::{Args, Parser, Subcommand};
use std::ffi::OsString;
use std::path::PathBuf;

/// An LLM inference cluster in one binary: disaggregated prefill and decode, OpenAI API, exact ledger.
///
/// Without a command, `baton` means `baton up`: a little cluster on this machine.
#[derive(Debug, Parser)]
#[command(name = "baton", version, propagate_version = true, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Runs a cluster on this machine: a coordinator, prefill and decode workers, each its own process.
    ///
    /// It talks over the real protocols, serves the OpenAI API, and stops cleanly with Ctrl-C (a second Ctrl-C forces). With
    /// no flags it serves the bundled demo model at http://127.0.0.1:8080/v1.
    Up(Box<UpArgs>),
    /// Runs one coordinator: API, router, ledger.
    Coordinator(ServeArgs),
    /// Runs one worker: the engine for one model.
    Worker(ServeArgs),
    /// Shows and changes the group of coordinators.
    Coordinators(CoordinatorsArgs),
    /// Saves the coordinators' whole state into a file, and makes a new group of one from such a file.
    Snapshot(SnapshotArgs),
    /// Shows the coordinators and workers of a running cluster: role, process, state, load, blocks, last heartbeat.
    Status(StatusArgs),
    /// Takes a worker out of service: its running requests go on elsewhere, and it exits once nothing is left on it.
    ///
    /// Clients notice a pause at most. Where no other worker has room, requests end where they are, up to the timeout; what
    /// is left then is broken off. Waits until the worker has left. A worker drained under `baton up` is not started again
    /// until `baton up` is.
    Drain(DrainArgs),
    /// Exports the ledger, and verifies exports offline.
    #[command(subcommand)]
    Ledger(ledger::LedgerCommand),
    /// Sets and lists the prices of a running cluster, and converts price lists.
    #[command(subcommand)]
    Prices(prices::PricesCommand),
    /// Makes, lists and revokes API keys.
    #[command(subcommand)]
    Keys(accounts::KeysCommand),
    /// Makes, lists, changes and archives projects, which keys and budgets belong to.
    #[command(subcommand)]
    Projects(accounts::ProjectsCommand),
    /// Sets and lists budgets: the money that a project or a key may spend.
    #[command(subcommand)]
    Budgets(accounts::BudgetsCommand),
    /// Says which revision of a model the cluster is meant to serve; workers with another are refused.
    #[command(subcommand)]
    Deployments(accounts::DeploymentsCommand),
    /// Shows how many requests and tokens were used.
    Usage(accounts::UsageArgs),
    /// Shows what usage cost, by day.
    Costs(accounts::ReportArgs),
    /// Shows who changed what.
    Audit(accounts::AuditArgs),
    /// Writes a GGUF file's tokenizer, chat template and context length to a directory that a coordinator can read.
    ///
    /// `baton up` does this by itself. On real hosts, run it once, give the directory as the model's `path` in the
    /// coordinator's configuration, and the GGUF file as `model_path` in the workers'.
    ConvertTokenizer(ConvertTokenizerArgs),
    /// Runs a cluster of mock workers on this machine, for load tests: everything is real but the models.
    ///
    /// One coordinator as its own process, and any number of workers (hundreds) in this one, over the real protocols. Steps
    /// take as long as the profile of a machine says, and the answers mean nothing. Stops with Ctrl-C.
    Mock(Box<mock::MockArgs>),
    /// Says what there is on this machine for workers on a GPU: driver, devices, NVRTC, peer access, NCCL.
    ///
    /// Exits with 0 if a worker can compute on a GPU here, with 1 if not, and says why. Workers on the CPU need none of it.
    Doctor(doctor::DoctorArgs),
    /// Compares everything a GPU worker computes with the CPU, then measures it; one row of a table each.
    ///
    /// Each row is a process of its own, so that one that crashes or hangs leaves the others. Needs a GPU and nothing but this
    /// program. Exits with 0 if no row failed.
    GpuCheck(gpu_check::GpuCheckArgs),
    /// Measures any OpenAI URL with streaming chat requests, and reports what its clients saw.
    Bench(Box<bench::BenchArgs>),
}

/// Flags of `baton up`.
#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// Model to serve: a directory with config.json, *.safetensors and tokenizer.json, a GGUF file, or a Hugging Face
    /// hub id such as Qwen/Qwen2.5-0.5B-Instruct [default: the bundled demo model]
    #[arg(
        long,
        value_name = "DIR|FILE.gguf|HUB ID",
        env = "BATON_MODEL",
        hide_env_values = true
    )]
    pub model: Option<String>,
    /// Name clients use for the model [default: the hub id, or the directory's or file's name]
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// Workers that compute prompts; 0 lets the decode workers do it themselves
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub prefill: u16,
    /// Workers that stream tokens
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub decode: u16,
    /// Coordinators, each its own process: 1, or a group of 3 or 5 in which any serves the API and one or two may fail. With
    /// more than one, their APIs are on --port and the ports after it
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub coordinators: u16,
    /// Address the API listens on
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    pub host: std::net::IpAddr,
    /// Port of the API; 0 takes a free one and prints it
    #[arg(
        long,
        short,
        value_name = "P",
        default_value_t = 8080,
        env = "BATON_PORT",
        hide_env_values = true
    )]
    pub port: u16,
    /// Where state is kept between runs: certificates, the ledger, logs [default: $XDG_DATA_HOME/baton or
    /// ~/.local/share/baton]
    #[arg(long, value_name = "DIR", env = "BATON_DATA_DIR", hide_env_values = true)]
    pub data_dir: Option<PathBuf>,
    /// Memory for KV blocks per worker, such as 512MiB or 2GiB [default: room for 64 full contexts, at most a quarter
    /// of the available memory over all workers]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub kv_mem: Option<u64>,
    /// Memory per worker for KV blocks that no longer fit --kv-mem [default: none; on a CPU a larger --kv-mem serves better]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub kv_host_mem: Option<u64>,
    /// Disk space per worker for KV blocks, below --data-dir: known prompts are loaded instead of computed, also after a
    /// restart [default: none]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    pub kv_disk: Option<u64>,
    /// Object store for KV blocks, shared by all workers: s3://bucket/prefix with AWS_* variables for endpoint, region and
    /// credentials, or file:///directory. baton sets no limit there: give the bucket a lifecycle rule [default: none]
    #[arg(long, value_name = "URL")]
    pub kv_object: Option<String>,
    /// Compute threads per worker [default: the cores of this machine divided by the number of workers]. With more,
    /// workers share cores: one that is alone in being busy gets more of the machine, and several slow each other down
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Ranks that each worker divides the model among, each with its share of the worker's threads
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub tensor_parallel: u16,
    /// What the model's weights become in memory: as they are stored, int8 (W8A8: about half the size of bf16 and twice
    /// as fast) or int4 (a quarter)
    #[arg(
        long,
        value_name = "none|int8|int4",
        default_value = "none",
        env = "BATON_QUANTIZE",
        hide_env_values = true
    )]
    pub quantize: baton_model::Quantization,
    /// How KV blocks travel from prefill to decode workers: as they are, or as 8-bit integers for links slower than
    /// prefill; answers are then no longer the same to the bit as one worker's
    #[arg(long, value_name = "none|int8", default_value = "none")]
    pub kv_compression: baton_worker::KvCompression,
    /// Time an engine step shall take while streams run: long prompts are computed in chunks that fit. Smaller is
    /// smoother for the streams, 0 sets no limit [default: 150]
    #[arg(long, value_name = "MS")]
    pub step_target_ms: Option<u64>,
    /// Prompts with more uncached tokens than this are computed by a prefill worker until measured rates decide; 0: all,
    /// always [default: 256; 16 with the demo model]
    #[arg(long, value_name = "TOKENS")]
    pub prefill_threshold: Option<u32>,
    /// Key clients must send as a bearer token; needed when --host is not a loopback address
    #[arg(long, value_name = "KEY", env = "BATON_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// A tenant with a key, a prefix cache and a share of its own, by weight (1 if not given) against others'; may be
    /// repeated
    #[arg(long = "tenant", value_name = "NAME[:WEIGHT]=KEY", value_parser = tenant::parse)]
    pub tenants: Vec<tenant::Tenant>,
    /// Serve HTTPS with this certificate: a PEM file with the chain, read again when it changes
    #[arg(long, value_name = "FILE.pem", requires = "tls_key")]
    pub tls_cert: Option<PathBuf>,
    /// Private key of --tls-cert, PEM
    #[arg(long, value_name = "FILE.pem", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
    /// Refuse requests whose first token would take longer, in milliseconds, unless they say otherwise
    #[arg(long, value_name = "MS")]
    pub ttft_target_ms: Option<u64>,
    /// Refuse requests whose tokens would come at longer intervals, in milliseconds, unless they say otherwise
    #[arg(long, value_name = "MS")]
    pub itl_target_ms: Option<u64>,
}

/// Flags of `baton coordinator` and `baton worker`.
#[derive(Debug, Clone, Args)]
pub struct ServeArgs {
    /// TOML configuration. Every setting can also come from the environment, which wins: `BATON_COORDINATOR_<SETTING>`
    /// or `BATON_WORKER_<SETTING>`, in capitals
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// Set by `baton up` on its children: reports go to stdout as JSON lines, the process ends with that parent.
    #[arg(long, value_name = "PID", hide = true)]
    pub supervisor: Option<u32>,
}

/// Arguments of `baton convert-tokenizer`.
#[derive(Debug, Clone, Args)]
pub struct ConvertTokenizerArgs {
    /// The GGUF file; it is only read
    #[arg(value_name = "FILE.gguf")]
    pub file: PathBuf,
    /// Where to write; must not hold such files yet
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// How to reach a running cluster.
#[derive(Debug, Clone, Args)]
pub struct Remote {
    /// Base URL of the API
    #[arg(
        long,
        value_name = "URL",
        env = "BATON_URL",
        hide_env_values = true,
        default_value = "http://127.0.0.1:8080"
    )]
    pub url: String,
    /// Key to send as a bearer token
    #[arg(long, value_name = "KEY", env = "BATON_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// Arguments of `baton coordinators`.
#[derive(Debug, Clone, Args)]
pub struct CoordinatorsArgs {
    #[command(subcommand)]
    pub action: CoordinatorsAction,
}

/// What to do about the coordinators.
#[derive(Debug, Clone, Subcommand)]
pub enum CoordinatorsAction {
    /// Lists the coordinators: role, term, how far each has applied the log.
    List(CoordinatorsList),
    /// Takes a new coordinator in: it learns what the group knows, and then votes.
    ///
    /// Start it first, with an id and a data directory that were never used, with `join = true`, and with all members in its
    /// configuration. Waits until it votes.
    Add(CoordinatorsAdd),
    /// Takes a coordinator out of the group. Stop its process afterwards.
    Remove(CoordinatorsId),
    /// Lets another coordinator lead.
    Transfer(CoordinatorsTransfer),
}

/// Flags of `baton coordinators list`.
#[derive(Debug, Clone, Args)]
pub struct CoordinatorsList {
    #[command(flatten)]
    pub remote: Remote,
    /// Print the group as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Flags of `baton coordinators add`.
#[derive(Debug, Clone, Args)]
pub struct CoordinatorsAdd {
    /// Its `node_id`
    #[arg(value_name = "ID")]
    pub id: u64,
    /// Its `name`, which is its certificate's
    #[arg(long, value_name = "NAME")]
    pub name: String,
    /// Where members and workers reach it
    #[arg(long, value_name = "HOST:PORT")]
    pub cluster_addr: String,
    /// Base URL of its API
    #[arg(long = "coordinator-url", value_name = "URL")]
    pub api_url: String,
    #[command(flatten)]
    pub list: CoordinatorsList,
}

/// Flags of `baton coordinators remove`.
#[derive(Debug, Clone, Args)]
pub struct CoordinatorsId {
    /// The coordinator's id, as `baton coordinators list` shows it
    #[arg(value_name = "ID")]
    pub id: u64,
    #[command(flatten)]
    pub list: CoordinatorsList,
}

/// Flags of `baton coordinators transfer`.
#[derive(Debug, Clone, Args)]
pub struct CoordinatorsTransfer {
    /// Who shall lead [default: whoever is furthest of the others]
    #[arg(value_name = "ID")]
    pub id: Option<u64>,
    #[command(flatten)]
    pub list: CoordinatorsList,
}

/// Arguments of `baton snapshot`.
#[derive(Debug, Clone, Args)]
pub struct SnapshotArgs {
    #[command(subcommand)]
    pub action: SnapshotAction,
}

/// What to do about a backup.
#[derive(Debug, Clone, Subcommand)]
pub enum SnapshotAction {
    /// Saves the state of a running group, as of one moment, while it goes on.
    Save(SnapshotSave),
    /// Makes the data directory of a new coordinator, alone in its group, from a backup. Others then join it.
    ///
    /// No member of the old group must run any more: the two would know different histories.
    Restore(SnapshotRestore),
}

/// Flags of `baton snapshot save`.
#[derive(Debug, Clone, Args)]
pub struct SnapshotSave {
    /// Where to; it appears only when it is whole
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub remote: Remote,
}

/// Flags of `baton snapshot restore`.
#[derive(Debug, Clone, Args)]
pub struct SnapshotRestore {
    /// The backup
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The coordinator's `data_dir`, which must hold no state
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
    /// The coordinator's `node_id`
    #[arg(long, value_name = "ID", default_value_t = 1)]
    pub id: u64,
}

/// Flags of `baton status`.
#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    pub remote: Remote,
    /// Print the workers as a JSON array (one per line with --watch)
    #[arg(long)]
    pub json: bool,
    /// Refresh every second until interrupted
    #[arg(long)]
    pub watch: bool,
}

/// Flags of `baton drain`.
#[derive(Debug, Clone, Args)]
pub struct DrainArgs {
    /// The worker's id, as `baton status` shows it
    #[arg(value_name = "WORKER")]
    pub worker: String,
    #[command(flatten)]
    pub remote: Remote,
    /// Seconds after which the worker leaves with whatever it still has
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub timeout: u32,
    /// Print the outcome as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Reads the command line; without a command it means `up`.
pub fn parse() -> Cli {
    Cli::parse_from(with_default_command(std::env::args_os().collect()))
}

/// Inserts `up` where no command is given: nothing at all, or flags that are not the program's own.
fn with_default_command(mut args: Vec<OsString>) -> Vec<OsString> {
    let own = ["-h", "--help", "-V", "--version"];
    let defaulted = match args.get(1) {
        None => true,
        Some(first) => {
            let first = first.to_string_lossy();
            first.starts_with('-') && !own.contains(&first.as_ref())
        }
    };
    if defaulted {
        args.insert(1.min(args.len()), "up".into());
    }
    args
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn command(args: &[&str]) -> Result<Command, clap::Error> {
        let args = args.iter().map(|a| OsString::from(*a)).collect();
        Cli::try_parse_from(with_default_command(args)).map(|cli| cli.command)
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_means_up() {
        assert!(matches!(command(&["baton"]), Ok(Command::Up(_))));
        assert!(matches!(
            command(&["baton", "--port", "0"]),
            Ok(Command::Up(args)) if args.port == 0
        ));
        assert!(matches!(command(&["baton", "status"]), Ok(Command::Status(_))));
        let help = command(&["baton", "--help"]).map(|_| ()).map_err(|e| e.kind());
        assert_eq!(help, Err(clap::error::ErrorKind::DisplayHelp));
        assert!(command(&["baton", "nonsense"]).is_err());
    }

    #[test]
    fn out_of_range_is_refused() {
        assert!(command(&["baton", "up", "--decode", "0"]).is_err());
        assert!(command(&["baton", "up", "--prefill", "-1"]).is_err());
        assert!(command(&["baton", "up", "--port", "65536"]).is_err());
        assert!(command(&["baton", "up", "--kv-mem", "lots"]).is_err());
    }
}
