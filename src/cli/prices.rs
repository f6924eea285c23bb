//! Flags of `baton prices`.

use super::accounts::At;
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What to do with prices.
#[derive(Debug, Clone, Subcommand)]
pub enum PricesCommand {
    /// Turns LiteLLM's model_prices_and_context_window.json into a price list in TOML, digit by digit.
    ///
    /// Takes input, cached input and output prices per token, and those of batches. What is left out is named.
    Import(ImportArgs),
    /// Sets a model's price in a running cluster, from now or a later time on.
    ///
    /// What started before keeps the price it started with.
    Set(SetArgs),
    /// Sets every price of a list in TOML, such as `baton prices import` writes. Prices that are there already stay.
    Apply(ApplyArgs),
    /// Lists the prices of a running cluster.
    List(ListArgs),
}

/// Flags of `baton prices set`.
#[derive(Debug, Clone, Args)]
pub struct SetArgs {
    /// Name of the model, or * for all that have no price of their own
    #[arg(value_name = "MODEL")]
    pub model: String,
    /// Per million prompt tokens, such as 20
    #[arg(long, value_name = "AMOUNT")]
    pub input: String,
    /// Per million prompt tokens found in a cache [default: as --input]
    #[arg(long, value_name = "AMOUNT")]
    pub cached_input: Option<String>,
    /// Per million tokens of answers, such as 80
    #[arg(long, value_name = "AMOUNT")]
    pub output: String,
    /// ISO 4217
    #[arg(long, value_name = "CURRENCY", default_value = "USD")]
    pub currency: String,
    /// Start, in milliseconds of Unix time [default: now]
    #[arg(long, value_name = "UNIX_MS")]
    pub effective_from: Option<u64>,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton prices apply`.
#[derive(Debug, Clone, Args)]
pub struct ApplyArgs {
    /// The list
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton prices list`.
#[derive(Debug, Clone, Args)]
pub struct ListArgs {
    /// Only of this model
    #[arg(long, value_name = "MODEL")]
    pub model: Option<String>,
    #[command(flatten)]
    pub at: At,
}

/// Flags of `baton prices import`.
#[derive(Debug, Clone, Args)]
pub struct ImportArgs {
    /// LiteLLM's file; it is only read
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// A model to import, and its name here if it has another; may be repeated [default: all]
    #[arg(long = "model", value_name = "NAME[=HERE]", value_parser = model)]
    pub models: Vec<(String, String)>,
    /// Round what is finer than 10^-9 per million tokens, half to even, instead of leaving the model out
    #[arg(long)]
    pub round: bool,
    /// Start of the prices, in milliseconds of Unix time [default: now]
    #[arg(long, value_name = "UNIX_MS")]
    pub effective_from: Option<u64>,
    /// Where to write the list; must not exist yet
    #[arg(
        long,
        short,
        value_name = "FILE",
        required_unless_present = "dry_run",
        conflicts_with = "dry_run"
    )]
    pub output: Option<PathBuf>,
    /// Print the list instead
    #[arg(long)]
    pub dry_run: bool,
}

fn model(text: &str) -> Result<(String, String), String> {
    let (name, here) = text.split_once('=').unwrap_or((text, text));
    if name.is_empty() || here.is_empty() {
        return Err("give NAME or NAME=HERE".to_owned());
    }
    Ok((name.to_owned(), here.to_owned()))
}
