//! Flags of `baton ledger`.

use super::Remote;
use baton_ledger::export::Format;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What to do with the ledger.
#[derive(Debug, Clone, Subcommand)]
pub enum LedgerCommand {
    /// Writes the ledger's rows to a file, to standard output or to PostgreSQL.
    ///
    /// Every row is checked on the way: its number, its hash and the chain. The format `jsonl` holds all that `baton ledger
    /// verify` needs.
    Export(ExportArgs),
    /// Verifies an export in the format jsonl, offline: numbering, hash chain, charges, signatures, sums.
    ///
    /// Says which row is wrong, if one is, and what the rows add up to. The exit code is 1 if anything is wrong, or if nothing
    /// in the export is signed by a key given.
    Verify(VerifyArgs),
    /// Takes the proof that one request stands in the ledger out of an export in the format jsonl.
    Prove(ProveArgs),
    /// Checks such a proof, offline.
    Check(CheckArgs),
}

/// Flags of `baton ledger export`.
#[derive(Debug, Clone, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub remote: Remote,
    /// What to write: jsonl (verifiable), csv, parquet, cloudevents (OpenMeter) or focus (FOCUS 1.2)
    #[arg(long, value_name = "FORMAT", default_value = "jsonl", conflicts_with = "postgres")]
    pub format: Format,
    /// Where to; an existing file is overwritten [default: standard output]
    #[arg(long, short, value_name = "FILE", conflicts_with = "postgres")]
    pub output: Option<PathBuf>,
    /// First row
    #[arg(long, value_name = "ROW", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "postgres")]
    pub from: u64,
    /// Go on with rows as they come, until interrupted with Ctrl-C, which ends the export properly
    #[arg(long)]
    pub follow: bool,
    /// Write to tables of this PostgreSQL database, exactly once: an export that was killed goes on where it was
    #[arg(long, value_name = "URL", env = "BATON_POSTGRES_URL", hide_env_values = true)]
    pub postgres: Option<String>,
    /// Certificates (PEM) to check PostgreSQL's with [default: the system's]
    #[arg(long, value_name = "FILE", requires = "postgres")]
    pub postgres_ca: Option<PathBuf>,
}

/// Flags of `baton ledger verify`.
#[derive(Debug, Clone, Args)]
pub struct VerifyArgs {
    /// The export; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub keys: KeyArgs,
    /// Accept an export without any checkpoint: then only its own consistency is shown, not who made it
    #[arg(long)]
    pub allow_unsigned: bool,
    /// Print the outcome as a JSON object
    #[arg(long)]
    pub json: bool,
}

/// Who may have signed.
#[derive(Debug, Clone, Args)]
pub struct KeyArgs {
    /// Public key of a coordinator that may have signed: 64 hexadecimal digits, or a file with them or with the key as
    /// PEM; may be repeated
    #[arg(long = "key", value_name = "KEY|FILE")]
    pub keys: Vec<String>,
}

/// Flags of `baton ledger prove`.
#[derive(Debug, Clone, Args)]
pub struct ProveArgs {
    /// The export
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Id of the request, as its answer has it
    #[arg(long, value_name = "ID")]
    pub request: String,
    /// Where to write the proof [default: standard output]
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Flags of `baton ledger check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// The proof; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub keys: KeyArgs,
    /// Print the row as a JSON object
    #[arg(long)]
    pub json: bool,
}
