//! Flags of the commands that administer and read accounts: keys, projects, budgets, usage, costs, audit.

use super::Remote;
use clap::{Args, Subcommand, ValueEnum};

/// How to reach the cluster, and how to print.
#[derive(Debug, Clone, Args)]
pub struct At {
    #[command(flatten)]
    pub remote: Remote,
    /// Print the answer as JSON
    #[arg(long)]
    pub json: bool,
}

/// What to do with keys.
#[derive(Debug, Clone, Subcommand)]
pub enum KeysCommand {
    /// Makes a key and prints its secret, which is shown this once and kept nowhere.
    Create(KeyCreateArgs),
    /// Lists keys, without their secrets.
    List(KeyListArgs),
    /// Changes what a key may do and its share; its secret stays.
    Update(KeyUpdateArgs),
    /// Revokes a key for good, at once.
    Revoke(KeyRevokeArgs),
}

/// Which keys are meant.
#[derive(Debug, Clone, Args)]
pub struct KeysOf {
    /// Of this project
    #[arg(
        long,
        value_name = "PROJECT",
        required_unless_present = "admin",
        conflicts_with = "admin"
    )]
    pub project: Option<String>,
    /// For administration, which call no models
    #[arg(long)]
    pub admin: bool,
}

/// A key's share of the workers, where more is asked for than there is.
#[derive(Debug, Clone, Copy, Args)]
pub struct ShareArgs {
    /// Its share against that of other keys, from 1 to 1000 [default: 1]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub weight: Option<u32>,
    /// The most urgent (lowest) `priority` with which its requests compete with those of others [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub priority_min: Option<i32>,
}

/// Flags of `baton keys create`.
#[derive(Debug, Clone, Args)]
pub struct KeyCreateArgs {
    /// What it is for
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub of: KeysOf,
    /// What it may do; may be repeated
    #[arg(long = "scope", value_name = "SCOPE", default_values = ["inference"], conflicts_with = "admin")]
    pub scopes: Vec<KeyScope>,
    /// A model it may call; may be repeated [default: all]
    #[arg(long = "model", value_name = "MODEL", conflicts_with = "admin")]
    pub models: Vec<String>,
    /// Seconds after which it expires [default: never]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub expires_in: Option<u64>,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub share: ShareArgs,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton keys update`.
#[derive(Debug, Clone, Args)]
pub struct KeyUpdateArgs {
    /// Id of the key, not its secret
    #[arg(value_name = "KEY")]
    pub key: String,
    /// Project it belongs to
    #[arg(long, value_name = "PROJECT")]
    pub project: String,
    /// Its new name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// What it may do from now on, instead; may be repeated
    #[arg(long = "scope", value_name = "SCOPE")]
    pub scopes: Vec<KeyScope>,
    /// A model it may call from now on, instead; may be repeated
    #[arg(long = "model", value_name = "MODEL")]
    pub models: Vec<String>,
    /// Seconds from now after which it expires
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..))]
    pub expires_in: Option<u64>,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub share: ShareArgs,
    #[command(flatten)]
    pub at: At,
}

/// What a key may do.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum KeyScope {
    /// Call models
    Inference,
    /// Read usage, costs and the ledger
    Usage,
    /// Change everything, and read it
    Admin,
}

impl KeyScope {
    /// As the API names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Inference => "inference",
            Self::Usage => "usage",
            Self::Admin => "admin",
        }
    }
}

/// Rates.
#[derive(Debug, Clone, Copy, Args)]
pub struct LimitArgs {
    /// Requests per minute [default: no limit]
    #[arg(long, value_name = "N")]
    pub rpm: Option<u64>,
    /// Tokens per minute, of prompts and answers [default: no limit]
    #[arg(long, value_name = "N")]
    pub tpm: Option<u64>,
}

/// Flags of `baton keys list`.
#[derive(Debug, Clone, Args)]
pub struct KeyListArgs {
    #[command(flatten)]
    pub of: KeysOf,
    /// Also those that are revoked
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton keys revoke`.
#[derive(Debug, Clone, Args)]
pub struct KeyRevokeArgs {
    /// Id of the key, not its secret
    #[arg(value_name = "KEY")]
    pub key: String,
    #[command(flatten)]
    pub of: KeysOf,
    #[command(flatten)]
    pub at: At,
}

/// What to do with projects.
#[derive(Debug, Clone, Subcommand)]
pub enum ProjectsCommand {
    /// Makes a project.
    Create(ProjectCreateArgs),
    /// Lists projects.
    List(ProjectListArgs),
    /// Changes a project's name or limits.
    Set(ProjectSetArgs),
    /// Archives a project: its keys are refused from then on, its history stays. There is no way back.
    Archive(ProjectArchiveArgs),
}

/// Flags of `baton projects create`.
#[derive(Debug, Clone, Args)]
pub struct ProjectCreateArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    pub name: String,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton projects list`.
#[derive(Debug, Clone, Args)]
pub struct ProjectListArgs {
    /// Also those that are archived
    #[arg(long)]
    pub all: bool,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton projects set`.
#[derive(Debug, Clone, Args)]
pub struct ProjectSetArgs {
    /// Id of the project
    #[arg(value_name = "PROJECT")]
    pub project: String,
    /// Its new name
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    #[command(flatten)]
    pub limits: LimitArgs,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton projects archive`.
#[derive(Debug, Clone, Args)]
pub struct ProjectArchiveArgs {
    /// Id of the project
    #[arg(value_name = "PROJECT")]
    pub project: String,
    #[command(flatten)]
    pub at: At,
}

/// What to do with budgets.
#[derive(Debug, Clone, Subcommand)]
pub enum BudgetsCommand {
    /// Makes a budget, or changes the limit of one.
    Set(BudgetSetArgs),
    /// Lists budgets, with what became of the present period.
    List(BudgetListArgs),
}

/// Flags of `baton budgets set`.
#[derive(Debug, Clone, Args)]
pub struct BudgetSetArgs {
    /// Most that may be spent in a period, such as 100.00
    #[arg(value_name = "AMOUNT")]
    pub limit: String,
    /// Project whose money it is
    #[arg(long, value_name = "PROJECT")]
    pub project: String,
    /// One key of the project [default: the whole project]
    #[arg(long, value_name = "KEY")]
    pub key: Option<String>,
    /// Id of the budget to change [default: a new one]
    #[arg(long, value_name = "BUDGET")]
    pub id: Option<String>,
    /// ISO 4217; only requests priced in it count
    #[arg(long, value_name = "CURRENCY", default_value = "USD")]
    pub currency: String,
    /// When it starts anew, by UTC
    #[arg(long, value_name = "PERIOD", default_value = "month")]
    pub period: BudgetPeriod,
    /// Only count, refuse nothing
    #[arg(long)]
    pub soft: bool,
    #[command(flatten)]
    pub at: At,
}

/// When a budget starts anew.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum BudgetPeriod {
    /// Never
    Total,
    /// Each day
    Day,
    /// Each month
    Month,
}

impl BudgetPeriod {
    /// As the API names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Total => "total",
            Self::Day => "day",
            Self::Month => "month",
        }
    }
}

/// Flags of `baton budgets list`.
#[derive(Debug, Clone, Args)]
pub struct BudgetListArgs {
    /// Only of this project
    #[arg(long, value_name = "PROJECT")]
    pub project: Option<String>,
    #[command(flatten)]
    pub at: At,
}

/// What to do with deployments.
#[derive(Debug, Clone, Subcommand)]
pub enum DeploymentsCommand {
    /// Lists deployments.
    List(DeploymentListArgs),
    /// Makes a deployment, or changes the one of that model; what is not given stays.
    Set(DeploymentSetArgs),
    /// Removes a deployment: workers with any revision of the model are taken again.
    Remove(DeploymentRemoveArgs),
}

/// Flags of `baton deployments list`.
#[derive(Debug, Clone, Args)]
pub struct DeploymentListArgs {
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton deployments set`.
#[derive(Debug, Clone, Args)]
pub struct DeploymentSetArgs {
    /// Name of the model, as clients send it
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// What is served: the digest of the model, which workers are held to, or any name for records
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// File with settings of the workers, in TOML, for people and controllers
    #[arg(long, value_name = "FILE")]
    pub settings: Option<std::path::PathBuf>,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton deployments remove`.
#[derive(Debug, Clone, Args)]
pub struct DeploymentRemoveArgs {
    /// Name of the model
    #[arg(value_name = "MODEL")]
    pub model: String,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton usage` and `baton costs`.
#[derive(Debug, Clone, Args)]
pub struct ReportArgs {
    /// Days back from now, when no start is given
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u64).range(1..=3660))]
    pub days: u64,
    /// Start, in seconds of Unix time
    #[arg(long, value_name = "UNIX_S")]
    pub start: Option<u64>,
    /// End, exclusive, in seconds of Unix time [default: now]
    #[arg(long, value_name = "UNIX_S")]
    pub end: Option<u64>,
    /// Tell apart by this, such as project_id, api_key_id, model (usage) or line_item (costs); may be repeated
    #[arg(long, value_name = "FIELD")]
    pub group_by: Vec<String>,
    /// Only this project; may be repeated
    #[arg(long, value_name = "PROJECT")]
    pub project: Vec<String>,
    /// Only this key, by its id; may be repeated
    #[arg(long, value_name = "KEY")]
    pub key: Vec<String>,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton usage`.
#[derive(Debug, Clone, Args)]
pub struct UsageArgs {
    /// Width of a bucket: 1m, 1h or 1d
    #[arg(long, value_name = "WIDTH", default_value = "1d")]
    pub bucket: String,
    #[command(flatten)]
    pub report: ReportArgs,
}

/// Flags of `baton audit`.
#[derive(Debug, Clone, Args)]
pub struct AuditArgs {
    /// Changes to show, newest first
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=100))]
    pub limit: u64,
    /// Those before this one, by its id
    #[arg(long, value_name = "ID")]
    pub after: Option<String>,
    #[command(flatten)]
    pub at: At,
}
