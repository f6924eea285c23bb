//! `baton prices`: price lists from and to files.

use crate::cli::prices::{ImportArgs, PricesCommand};
use crate::up::{print, say};
use anyhow::{Context, bail};
use baton_ledger::prices::list;
use baton_ledger::prices::litellm::{Settings, import};
use std::fs::File;
use std::io::Write;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

/// Largest list read; LiteLLM's is about 2 MiB.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// Runs a command.
pub fn run(command: &PricesCommand) -> anyhow::Result<ExitCode> {
    match command {
        PricesCommand::Import(args) => convert(args),
    }
}

fn convert(args: &ImportArgs) -> anyhow::Result<ExitCode> {
    let path = args.file.display();
    let size = std::fs::metadata(&args.file)
        .with_context(|| format!("cannot read {path}"))?
        .len();
    if size > FILE_BYTES_MAX {
        bail!("{path} is larger than any price list");
    }
    let text = std::fs::read_to_string(&args.file).with_context(|| format!("cannot read {path}"))?;
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis();
    let settings = Settings {
        models: args.models.iter().cloned().collect(),
        effective_from_unix_ms: args.effective_from.unwrap_or(u64::try_from(now).unwrap_or(u64::MAX)),
        round: args.round,
    };
    let imported = import(&text, &settings)?;
    for (model, note) in &imported.notes {
        say(&format!("{model}: {note}"));
    }
    let list = list::print(&imported.prices);
    match &args.output {
        None => print(&list),
        Some(path) => {
            let file = File::create_new(path).and_then(|mut file| file.write_all(list.as_bytes()));
            file.with_context(|| format!("cannot write {}", path.display()))?;
            say(&format!("{} prices in {}", imported.prices.len(), path.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}
