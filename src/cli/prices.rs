//! Flags of `baton prices`.

use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What to do with prices.
#[derive(Debug, Clone, Subcommand)]
pub enum PricesCommand {
    /// Turns LiteLLM's model_prices_and_context_window.json into a price list in TOML, digit by digit.
    ///
    /// Takes input, cached input and output prices per token, and those of batches. What is left out is named.
    Import(ImportArgs),
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
