//! `baton ledger prove` and `check`: the proof of one request, made and checked offline.

use super::{keys, open};
use crate::cli::ledger::{CheckArgs, ProveArgs};
use crate::up::{print, say};
use anyhow::{Context, bail};
use baton_ledger::json::RowJson;
use baton_ledger::proof::{self, Proof};
use std::fs::File;
use std::io::{BufReader, Read};
use std::process::ExitCode;

/// Longest proof read: a row with 64 hashes is a few kilobytes.
const PROOF_BYTES_MAX: u64 = 1 << 20;

/// Makes a proof.
pub fn prove(args: &ProveArgs) -> anyhow::Result<ExitCode> {
    let proof = proof::prove(
        || Ok(BufReader::with_capacity(1 << 20, File::open(&args.file)?)),
        &args.request,
    )?;
    let text = serde_json::to_string_pretty(&proof)? + "\n";
    match &args.output {
        None => print(&text),
        Some(path) => {
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            say(&format!("{} proves {}", path.display(), args.request));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Checks one.
pub fn check(args: &CheckArgs) -> anyhow::Result<ExitCode> {
    let keys = keys::read(&args.keys.keys)?;
    if keys.is_empty() {
        bail!("give the public keys of the coordinators with --key");
    }
    let mut text = String::new();
    let read = open(&args.file)?.take(PROOF_BYTES_MAX).read_to_string(&mut text);
    read.with_context(|| format!("cannot read {}", args.file.display()))?;
    let proof: Proof = serde_json::from_str(&text).context("this is no inclusion proof")?;
    let row = proof::check(&proof, &keys)?;
    let text = if args.json {
        serde_json::to_string_pretty(&RowJson::from(row))?
    } else {
        let checkpoint = &proof.checkpoint.0;
        let (first, last) = (checkpoint.first_sequence, checkpoint.last_sequence);
        format!(
            "{}\nincluded in rows {first}..={last}, as signed",
            proof::describe(&row)
        )
    };
    print(&(text + "\n"));
    Ok(ExitCode::SUCCESS)
}
