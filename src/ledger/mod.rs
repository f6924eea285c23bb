//! `baton ledger`: exports, and what is shown about them offline. The ledger's own rules live in `baton-ledger`.

mod export;
mod keys;
mod proof;
mod verify;

use crate::cli::ledger::LedgerCommand;
use anyhow::Context;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::ExitCode;

/// Runs a command.
pub fn run(command: &LedgerCommand) -> anyhow::Result<ExitCode> {
    match command {
        LedgerCommand::Export(args) => export::run(args),
        LedgerCommand::Verify(args) => verify::run(args),
        LedgerCommand::Prove(args) => proof::prove(args),
        LedgerCommand::Check(args) => proof::check(args),
    }
}

/// Opens a file, or standard input for `-`.
fn open(path: &Path) -> anyhow::Result<Box<dyn BufRead>> {
    if path.as_os_str() == "-" {
        return Ok(Box::new(BufReader::new(std::io::stdin())));
    }
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(Box::new(BufReader::with_capacity(1 << 20, file)))
}
